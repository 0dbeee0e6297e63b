"""
files.py: faults are real ones (a full disk, a killed process, a server that misbehaves on purpose), and the
truth is the bytes that should be there.
"""
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import files
from configurator import UserError
from files import download, lock, read_records, write_file

ROOT = Path(__file__).resolve().parent.parent

DATA = os.urandom(300_000)
OTHER = os.urandom(300_000)
SHA256 = hashlib.sha256(DATA).hexdigest()


# ---------------------------------------------------------------------------------- writing and reading
def python(code, *args, **kwargs):
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], cwd=ROOT, capture_output=True,
                          text=True, **kwargs)


def test_a_file_is_whole_or_as_it_was(tmp_path):
    """An error half-way, Ctrl-C half-way: the old bytes, and nothing beside them."""
    path = tmp_path / "deep" / "file"
    write_file(path, lambda f: f.write(b"old"))
    for trouble in (ValueError, KeyboardInterrupt, UserError("x")):
        def half(f):
            f.write(b"new" * 10_000)
            raise trouble
        with pytest.raises(BaseException) as e:
            write_file(path, half)
        assert e.type is (trouble if isinstance(trouble, type) else UserError)
        assert path.read_bytes() == b"old" and only_file(path)


def test_a_disk_that_fills_leaves_the_old_file_and_one_line(tmp_path):
    """RLIMIT_FSIZE of a process makes every write beyond 50,000 bytes fail, as a full disk does."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    done = python("""if True:
        import resource, sys, files
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        files.write_file(sys.argv[1], lambda f: f.write(bytes(100_000)))""", path)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: cannot write {path}: File too large")
    assert path.read_bytes() == b"old" and only_file(path)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "plain").write_text("")
    for path in (tmp_path / "plain" / "file", tmp_path / "plain" / "deeper" / "file", "/proc/file"):
        with pytest.raises(UserError, match=f"cannot write {path}: "):
            write_file(path, lambda f: f.write(b"x"))


def test_two_writers_never_mix(tmp_path):
    """The second finishes while the first is half-way: each file that is seen is one of theirs."""
    path = tmp_path / "file"

    def slow(f):
        f.write(b"first " * 1000)
        write_file(path, lambda g: g.write(b"second"))
        assert path.read_bytes() == b"second"
        f.write(b"first " * 1000)

    write_file(path, slow)
    assert path.read_bytes() == b"first " * 2000 and only_file(path)


def test_written_files_have_the_users_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "file", lambda f: f.write(b"x"))
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_no_log_is_an_empty_log(tmp_path):
    assert read_records(tmp_path / "none.jsonl") == []


LINES = [b'{"id": 1}', b'{"id": 2, "text": "a \\u00e4"}', b'{"id": 3}']


@pytest.mark.parametrize("damage", [b"", b'{"id": ', b"\0" * 40, b"3", b"[1]", b"null", b"\xff\xfe",
                                    b"[" * 100_000, b'{"id": 2}{"id": 9}', b"nan"])
@pytest.mark.parametrize("place", range(3))
def test_a_damaged_line_of_a_log_costs_that_line_alone(damage, place, tmp_path):
    lines = LINES.copy()
    lines[place] = damage
    for end in (b"\n", b""):
        (tmp_path / "log").write_bytes(b"\n".join(lines) + end)
        assert read_records(tmp_path / "log") == [json.loads(x) for i, x in enumerate(LINES) if i != place]


@given(st.binary(max_size=30).filter(lambda junk: b"\n" not in junk), st.integers(0, 3))
def test_any_bytes_in_a_log_cost_no_other_line(tmp_path_factory, junk, place):
    path = tmp_path_factory.getbasetemp() / "log"
    lines = LINES[:place] + [junk] + LINES[place:]
    path.write_bytes(b"\n".join(lines) + b"\n")
    found = read_records(path)
    assert [record for record in found if record.get("id")] == [json.loads(line) for line in LINES]


LOCK = "import sys, time, files\nkeep = files.lock(sys.argv[1])\nprint('locked', flush=True)\ntime.sleep(60)"


def test_a_folder_has_one_worker_until_that_one_is_dead(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", LOCK, tmp_path / "out"], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"locked\n"
        done = python(LOCK, tmp_path / "out")
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert f"{tmp_path / 'out'} is in use by process {other.pid};" in done.stderr
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
        other.stdout.close()
    lock(tmp_path / "out").close()                           # the system has released it


def test_a_folder_that_cannot_be_locked_is_named(tmp_path):
    (tmp_path / "plain").write_text("")
    with pytest.raises(UserError, match="cannot write .*plain/lock"):
        lock(tmp_path / "plain")


# ---------------------------------------------------------------------------------- downloads
class Server(ThreadingHTTPServer):
    """Serves `content` with ETag and Range; `faults` holds one fault per request, None: behave."""
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
    monkeypatch.setattr(files, "ATTEMPTS", 1)
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
    monkeypatch.setattr(files, "ATTEMPTS", 1)
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
    assert len(server.requests) == files.ATTEMPTS


def test_a_fresh_file_with_a_wrong_hash_is_refused_at_once(server, tmp_path):
    server.content = OTHER
    path = tmp_path / "file"
    with pytest.raises(UserError, match=f"sha256 {hashlib.sha256(OTHER).hexdigest()} instead of {SHA256}"):
        fetch(server, path)
    assert len(server.requests) == 1 and list(tmp_path.iterdir()) == [tmp_path / "file.part.etag"]


def test_a_file_of_another_size_is_refused(server, tmp_path):
    server.content = DATA + b"more"
    with pytest.raises(UserError, match="300004 bytes instead of 300000"):
        fetch(server, tmp_path / "file")


@pytest.mark.parametrize("sha256", [SHA256, None])
def test_a_part_that_is_complete_costs_one_request(server, tmp_path, sha256):
    path, part = tmp_path / "file", tmp_path / "file.part"
    part.write_bytes(DATA)
    (tmp_path / "file.part.etag").write_text('"one"')
    fetch(server, path, size=None, sha256=sha256)    # the end is not known, so it asks, and gets a 416
    assert server.requests[0]["Range"] == "bytes=300000-" and path.read_bytes() == DATA and only_file(path)
    assert len(server.requests) == 1


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
