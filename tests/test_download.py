"""plumbing/download.py: servers that misbehave on purpose; the truth is the bytes that should be there."""
import hashlib
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import plumbing.download as fetching
from configurator import UserError
from plumbing.download import download, hash_of_the_hub

DATA = os.urandom(300_000)
OTHER = os.urandom(300_000)
SHA256 = hashlib.sha256(DATA).hexdigest()


def only_file(path):
    """Nothing but the finished file is left."""
    return [p.name for p in path.parent.iterdir()] == [path.name]


class Server(ThreadingHTTPServer):
    """Serves `content` with ETag and Range; `faults` holds one fault per request, None: behave."""
    content, etag, ranges, faults, sha256 = DATA, '"one"', True, (), None

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
        if server.sha256:
            self.send_header("X-Linked-Etag", f'"{server.sha256}"')
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[:100_000] if fault in ("cut", "no length") else body)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(fetching, "BACKOFF", 0.01)
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


def test_a_verified_file_is_kept_and_a_damaged_one_is_fetched_again(server, tmp_path, capsys):
    path = tmp_path / "deep" / "file"
    assert fetch(server, path) == path and path.read_bytes() == DATA and only_file(path)
    assert server.requests[0]["Accept-Encoding"] == "identity" and "Range" not in server.requests[0]
    fetch(server, path)
    assert len(server.requests) == 1                 # verified, not fetched again
    path.write_bytes(DATA[:-1] + bytes([DATA[-1] ^ 1]))           # whatever byte was there
    capsys.readouterr()
    fetch(server, path)                              # damaged: fetched again, and said so
    assert f"{path} has sha256" in capsys.readouterr().err
    assert len(server.requests) == 2 and path.read_bytes() == DATA


def test_a_cut_download_continues_where_it_stopped(server, tmp_path):
    server.faults = ["cut", "cut", None]
    path = tmp_path / "file"
    fetch(server, path)
    assert path.read_bytes() == DATA and only_file(path)
    assert "Range" not in server.requests[0] and all(r["If-Range"] == '"one"' for r in server.requests[1:])
    assert 80_000 < start_of(server.requests[1]) <= 100_000
    assert 160_000 < start_of(server.requests[2]) <= 200_000


def test_a_later_call_continues_the_part(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "ATTEMPTS", 1)
    server.faults = ["cut", 503]
    path = tmp_path / "file"
    with pytest.raises(UserError, match="503.*run the command again"):
        fetch(server, path)
    kept = (tmp_path / "file.part").read_bytes()
    assert not path.exists() and len(kept) > 80_000 and DATA.startswith(kept)
    fetch(server, path)
    assert path.read_bytes() == DATA and start_of(server.requests[-1]) == len(kept)


def test_a_cut_without_content_length_is_found_by_the_known_size(server, tmp_path):
    server.faults = ["no length"]                    # only the known size tells that bytes are missing
    path = tmp_path / "file"
    fetch(server, path)
    assert path.read_bytes() == DATA


def test_a_server_that_ignores_ranges_starts_again(server, tmp_path):
    server.ranges, server.faults = False, ["cut", None]
    path = tmp_path / "file"
    fetch(server, path)
    assert path.read_bytes() == DATA and "Range" in server.requests[1]


def test_a_range_that_was_not_asked_for_is_not_appended(server, tmp_path):
    server.faults = ["cut", "shift", None]
    path = tmp_path / "file"
    fetch(server, path)
    assert path.read_bytes() == DATA and "Range" not in server.requests[2]


def test_a_file_that_changed_between_parts_is_never_mixed(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "ATTEMPTS", 1)
    server.content, server.etag, server.faults = OTHER, '"old"', ["cut", 503]
    path = tmp_path / "file"
    with pytest.raises(UserError):
        fetch(server, path)
    server.content, server.etag = DATA, '"new"'
    fetch(server, path, sha256=None)                 # no hash to save it: If-Range alone prevents the mixture
    assert server.requests[-1]["If-Range"] == '"old"' and path.read_bytes() == DATA


def test_without_a_strong_etag_nothing_is_resumed(server, tmp_path):
    server.etag, server.faults = 'W/"one"', ["cut", None]
    path = tmp_path / "file"
    fetch(server, path)
    assert path.read_bytes() == DATA and "Range" not in server.requests[1]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_passing_trouble_is_retried(server, tmp_path, status):
    server.faults = [status, status, None]
    fetch(server, tmp_path / "file")
    assert len(server.requests) == 3


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_is_not_retried(server, tmp_path, status):
    server.faults = [status]
    with pytest.raises(UserError) as e:
        fetch(server, tmp_path / "file")
    message = str(e.value.code)
    assert len(server.requests) == 1 and not (tmp_path / "file").exists()
    assert server.url in message and str(tmp_path / "file") in message and str(status) in message


def test_it_gives_up_after_a_few_attempts(server, tmp_path):
    server.faults = [503] * 100
    with pytest.raises(UserError, match="503"):
        fetch(server, tmp_path / "file")
    assert len(server.requests) == fetching.ATTEMPTS


def test_a_fresh_file_with_a_wrong_hash_is_refused_at_once(server, tmp_path):
    server.content = OTHER
    path = tmp_path / "file"
    with pytest.raises(UserError, match=f"sha256 {hashlib.sha256(OTHER).hexdigest()} instead of {SHA256}"):
        fetch(server, path)
    assert len(server.requests) == 1 and list(tmp_path.iterdir()) == [tmp_path / "file.part.etag"]


def test_a_file_of_another_size_is_refused(server, tmp_path):
    server.content = DATA + b"more"
    with pytest.raises(UserError, match="more than 300000 bytes"):
        fetch(server, tmp_path / "file")


def test_a_part_that_is_complete_costs_no_request(server, tmp_path):
    (tmp_path / "file.part").write_bytes(DATA)
    fetch(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == DATA and server.requests == []


def test_a_part_that_is_not_of_the_file_is_thrown_away(server, tmp_path):
    path, part = tmp_path / "file", tmp_path / "file.part"
    for bad in (OTHER, OTHER + b"more"):             # as long as the file but not it; longer
        part.write_bytes(bad)
        (tmp_path / "file.part.etag").write_text('"one"')
        fetch(server, path, size=None)
        assert path.read_bytes() == DATA
        path.unlink()


def test_a_damaged_part_is_found_by_the_hash_and_fetched_again(server, tmp_path):
    (tmp_path / "file.part").write_bytes(OTHER[:1000])
    (tmp_path / "file.part.etag").write_text('"one"')
    fetch(server, tmp_path / "file")                 # continues, sees the wrong hash, starts again
    assert (tmp_path / "file").read_bytes() == DATA and len(server.requests) == 2


def test_an_address_without_a_server_is_named(server, tmp_path):
    for url, why in (("http://127.0.0.1:9/x", "connection failed"), ("nonsense", "nonsense"),
                     ("ftp://x/y", "ftp")):
        with pytest.raises(UserError, match=why):
            download(url, tmp_path / "file", 1, None)


def test_a_target_that_cannot_be_written_is_named(server, tmp_path):
    (tmp_path / "plain").write_text("")
    with pytest.raises(UserError, match="plain/file"):
        fetch(server, tmp_path / "plain" / "file")


PAGES = [b"<!DOCTYPE html>\n<html><body>Sign in to the network</body></html>", b"<html>login</html>",
         b"\xef\xbb\xbf\r\n  <HTML lang=en>", b"<!-- portal --><html>", b"<?xml version='1.0'?><html xmlns='x'>"]


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("known", [dict(), dict(size=None), dict(size=None, sha256=None)])
def test_a_sign_in_page_is_never_taken_for_the_file(server, tmp_path, page, known):
    server.content = page
    with pytest.raises(UserError, match="web page; perhaps this network asks you to sign in"):
        fetch(server, tmp_path / "file", **known)
    assert not (tmp_path / "file").exists()


def test_a_sign_in_page_that_was_kept_before_is_replaced(server, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(PAGES[0])
    fetch(server, path, size=None, sha256=None)
    assert path.read_bytes() == DATA


@pytest.mark.parametrize("known", [dict(), dict(size=None, sha256=None)])
def test_a_file_without_an_end_does_not_fill_the_disk(server, tmp_path, monkeypatch, known):
    """Neither one that is longer than its known size, nor one of unknown size beyond the limit."""
    monkeypatch.setattr(fetching, "LARGEST", 200_000)
    server.content = DATA * 3
    with pytest.raises(UserError, match=f"more than {known and 200_000 or 300_000} bytes"):
        fetch(server, tmp_path / "file", **known)
    assert not list(tmp_path.glob("file*")) or [p.name for p in tmp_path.iterdir()] == ["file.part.etag"]


def test_without_a_hash_a_file_whose_end_is_not_told_is_refused(server, tmp_path):
    """It could be a part of it: the connection ends in either case. A hash tells."""
    server.faults = ["no length"]
    with pytest.raises(UserError, match="does not say where the file ends"):
        fetch(server, tmp_path / "file", size=None, sha256=None)
    server.faults = ["no length"]
    with pytest.raises(UserError, match="it has sha256"):
        fetch(server, tmp_path / "file", size=None)


def test_an_empty_file_is_refused(server, tmp_path):
    server.content = b""
    with pytest.raises(UserError, match="0 bytes"):
        fetch(server, tmp_path / "file", size=None, sha256=None)


def test_the_hubs_hash_or_a_line(server):
    server.sha256 = SHA256
    assert hash_of_the_hub(server.url) == SHA256
    server.sha256 = "abc"
    with pytest.raises(UserError, match="without a sha256"):
        hash_of_the_hub(server.url)
