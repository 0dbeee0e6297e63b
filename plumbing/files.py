"""
Write files whole or not at all, keep logs of one JSON record a line, and lock a folder.
"""
import errno
import fcntl
import json
import os
from contextlib import suppress
from pathlib import Path

from configurator import UserError


def write_file(path, write):
    """Call write(file), file binary, and put what it wrote at path: whole and on the disk, or not at all.

    Makes the folder if there is none. Raises UserError, naming path and reason, where that cannot be done.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}; is there space, "
                        "and may you write there?") from None
    finally:
        with suppress(OSError):         # it is still there after an error or Ctrl-C
            temporary.unlink(missing_ok=True)


def read_records(path):
    """Return the dicts in a log, [] without a file. A line that cannot be read is left out."""
    records = []
    if os.path.exists(path):
        for line in Path(path).read_bytes().split(b"\n"):
            with suppress(ValueError, RecursionError):          # half a line, or zeros after a power cut
                records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


def append_records(path, records):
    """Add records to a log, in one write, so that several ranks or runs may do so at once."""
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    try:
        with open(path, "a+b", buffering=0) as file:
            if file.seek(0, os.SEEK_END) > 0:
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":                        # the writer was killed within a line
                    data = b"\n" + data
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}; what is in it is kept: make room, and run it "
                        "again") from None


def lock(folder):
    """Make the folder, and lock it for this process as long as the returned file is open.

    Raises UserError, naming the process, where another one holds it.
    """
    path = Path(folder) / "lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)    # the system releases it with the process
        except BlockingIOError:
            file.seek(0)
            raise UserError(f"{folder} is in use by process {file.read().strip() or 'unknown'}; "
                            "wait for its end, stop it, or choose another folder") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}") from None
    return file
