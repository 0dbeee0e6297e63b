"""download() against a local server that misbehaves on purpose. The truth is the bytes the server holds."""
import hashlib
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import files
from configurator import UserError
from files import download

DATA = os.urandom(300_000)
OTHER = os.urandom(300_000)
SHA256 = hashlib.sha256(DATA).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `content` with ETag and Range; `faults` holds one fault per request, None or nothing = behave."""
    content, etag, ranges, faults = DATA, '"one"', True, ()

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.requests = [], []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/file"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.requests.append(dict(self.headers))
        fault = server.faults.pop(0) if server.faults else None
        if isinstance(fault, int):                   # a bare status
            self.send_response(fault)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        start, wanted, total = 0, self.headers.get("Range"), len(server.content)
        if wanted and server.ranges and self.headers.get("If-Range", server.etag) == server.etag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= total:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{total}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start + (fault == 'shift')}-{total - 1}/{total}")
        else:
            self.send_response(200)
        body = server.content[start:]
        if server.etag:
            self.send_header("ETag", server.etag)
        if fault != "no length":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:100_000] if fault in ("cut", "no length") else body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(files, "BACKOFF", 0.01)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def fetch(server, path, **changes):
    return download(server.url, path, **{"size": len(DATA), "sha256": SHA256, **changes})


def start_of(request):
    return int(request["Range"].removeprefix("bytes=").removesuffix("-"))


def only_file(path):
    """Nothing but the finished file is left."""
    return [p.name for p in path.parent.iterdir()] == [path.name]


def test_plain_then_kept(server, tmp_path):
    path = tmp_path / "deep" / "file"
    assert fetch(server, path) == path and path.read_bytes() == DATA and only_file(path)
    assert server.requests[0]["Accept-Encoding"] == "identity" and "Range" not in server.requests[0]
    fetch(server, path)
    assert len(server.requests) == 1                 # verified, not fetched again
    path.write_bytes(DATA[:-1] + b"x")
    fetch(server, path)                              # damaged: fetched again
    assert len(server.requests) == 2 and path.read_bytes() == DATA


def test_cut_then_resumed(server, tmp_path):
    server.faults = ["cut", "cut", None]
    path = tmp_path / "file"
    fetch(server, path)
    assert path.read_bytes() == DATA and only_file(path)
    assert "Range" not in server.requests[0] and all(r["If-Range"] == '"one"' for r in server.requests[1:])
    assert 80_000 < start_of(server.requests[1]) <= 100_000 and 160_000 < start_of(server.requests[2]) <= 200_000


def test_resumed_by_a_later_call(server, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "ATTEMPTS", 1)
    server.faults = ["cut", 503]
    path = tmp_path / "file"
    with pytest.raises(UserError, match="503.*run the command again"):
        fetch(server, path)
    kept = (tmp_path / "file.part").read_bytes()
    assert not path.exists() and len(kept) > 80_000 and DATA.startswith(kept)
    fetch(server, path)
    assert path.read_bytes() == DATA and start_of(server.requests[-1]) == len(kept)


def test_cut_without_content_length(server, tmp_path):
    server.faults = ["no length"]                    # only the known size tells that bytes are missing
    path = tmp_path / "file"
    fetch(server, path)
    assert path.read_bytes() == DATA


def test_server_ignores_range(server, tmp_path):
    server.ranges, server.faults = False, ["cut", None]
    path = tmp_path / "file"
    fetch(server, path)
    assert path.read_bytes() == DATA and "Range" in server.requests[1]


def test_server_sends_another_range(server, tmp_path):
    server.faults = ["cut", "shift", None]
    path = tmp_path / "file"
    fetch(server, path)
    assert path.read_bytes() == DATA and "Range" not in server.requests[2]


def test_file_changed_between_parts(server, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "ATTEMPTS", 1)
    server.content, server.etag, server.faults = OTHER, '"old"', ["cut", 503]
    path = tmp_path / "file"
    with pytest.raises(UserError):
        fetch(server, path)
    server.content, server.etag = DATA, '"new"'
    fetch(server, path, sha256=None)                 # no hash to save it: If-Range alone must prevent the mixture
    assert server.requests[-1]["If-Range"] == '"old"' and path.read_bytes() == DATA


def test_without_strong_etag_no_resuming(server, tmp_path):
    server.etag, server.faults = 'W/"one"', ["cut", None]
    path = tmp_path / "file"
    fetch(server, path)
    assert path.read_bytes() == DATA and "Range" not in server.requests[1]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_retried(server, tmp_path, status):
    server.faults = [status, status, None]
    fetch(server, tmp_path / "file")
    assert len(server.requests) == 3


@pytest.mark.parametrize("status", [401, 403, 404])
def test_not_retried(server, tmp_path, status):
    server.faults = [status]
    with pytest.raises(UserError) as e:
        fetch(server, tmp_path / "file")
    message = str(e.value.code)
    assert len(server.requests) == 1 and not (tmp_path / "file").exists()
    assert server.url in message and str(tmp_path / "file") in message and str(status) in message


def test_gives_up(server, tmp_path):
    server.faults = [503] * 100
    with pytest.raises(UserError, match="503"):
        fetch(server, tmp_path / "file")
    assert len(server.requests) == files.ATTEMPTS


def test_wrong_hash(server, tmp_path):
    server.content = OTHER
    path = tmp_path / "file"
    with pytest.raises(UserError, match=f"sha256 {hashlib.sha256(OTHER).hexdigest()} instead of {SHA256}"):
        fetch(server, path)
    assert len(server.requests) == 1 and list(tmp_path.iterdir()) == [tmp_path / "file.part.etag"]


def test_wrong_size(server, tmp_path):
    server.content = DATA + b"more"
    with pytest.raises(UserError, match="300004 bytes instead of 300000"):
        fetch(server, tmp_path / "file")


@pytest.mark.parametrize("sha256", [SHA256, None])
def test_complete_part(server, tmp_path, sha256):
    path, part = tmp_path / "file", tmp_path / "file.part"
    part.write_bytes(DATA)
    (tmp_path / "file.part.etag").write_text('"one"')
    fetch(server, path, size=None, sha256=sha256)    # the end is not known, so it asks, and gets a 416
    assert server.requests[0]["Range"] == "bytes=300000-" and path.read_bytes() == DATA and only_file(path)
    assert len(server.requests) == 1


def test_416_for_a_part_that_is_wrong(server, tmp_path):
    path, part = tmp_path / "file", tmp_path / "file.part"
    for bad in (OTHER, OTHER + b"more"):             # as long as the file but not it; longer
        part.write_bytes(bad)
        (tmp_path / "file.part.etag").write_text('"one"')
        fetch(server, path, size=None)
        assert path.read_bytes() == DATA
        path.unlink()


def test_damaged_part_with_known_size(server, tmp_path):
    (tmp_path / "file.part").write_bytes(OTHER[:1000])
    (tmp_path / "file.part.etag").write_text('"one"')
    fetch(server, tmp_path / "file")                 # continues, sees the wrong hash, starts again
    assert (tmp_path / "file").read_bytes() == DATA and len(server.requests) == 2


def test_no_server_and_bad_addresses(server, tmp_path):
    for url, why in (("http://127.0.0.1:9/x", "connection failed"), ("nonsense", "nonsense"), ("ftp://x/y", "ftp")):
        with pytest.raises(UserError, match=why):
            download(url, tmp_path / "file", 1, None)


def test_target_cannot_be_written(server, tmp_path):
    (tmp_path / "plain").write_text("")
    with pytest.raises(UserError, match="plain/file"):
        fetch(server, tmp_path / "plain" / "file")
