"""plumbing/files.py: the faults are real ones (a full disk, a killed process)."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configurator import UserError
from plumbing.files import append_records, lock, read_records, write_file

ROOT = Path(__file__).resolve().parent.parent


# ---------------------------------------------------------------------------------- writing and reading
def only_file(path):
    """Nothing but the finished file is left."""
    return [p.name for p in path.parent.iterdir()] == [path.name]


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
        import resource, sys
        from plumbing import files
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


LOCK = "import sys, time\nfrom plumbing import files\nkeep = files.lock(sys.argv[1])\nprint('locked', flush=True)\ntime.sleep(60)"


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


def test_records_are_added_after_a_line_that_was_cut(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b'{"id": 1}\n{"id": 2, "te')
    append_records(log, [{"id": 3}, {"id": 4}])
    append_records(log, [{"id": 5}])
    assert [record["id"] for record in read_records(log)] == [1, 3, 4, 5]


def test_a_log_on_a_full_disk_is_one_line_that_names_it(tmp_path):
    with pytest.raises(UserError, match="cannot write /dev/full: No space left on device; what is in it is kept"):
        append_records("/dev/full", [{"id": 1}])
