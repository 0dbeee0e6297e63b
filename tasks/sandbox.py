"""
Runs code that a model wrote: in a process of its own, with limits, away from the network and the files.

    run("assert sorted([2, 1]) == [1, 2]")  ->  Outcome(compiled=True, passed=True, lacks=())

The evaluating process starts this file as a script. That second process asks the system for a network
without a connection, for process numbers of its own, and for a file system that can only be read. It then
forks a third process, which gives up its rights, takes its limits, and runs the program as __main__ in an
empty directory. When the time is up, the second process kills the third, and all that the third has started.
Outcome.lacks names what the system does not grant. There the program is less confined.

A program passes if it runs to its own end. The third process then writes a secret, which Python code cannot
find while the program runs. Machine code, called by ctypes, could.
"""
import ctypes
import json
import linecache
import os
import platform
import resource
import signal
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

SECONDS = 10                         # of real time for a program
MEMORY = 512 << 20                   # bytes
DISK = 16 << 20
PROCESSES = 8
OPEN_FILES = 64
GRACE = 20                           # more seconds until the second process is killed, too
NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 1 << 17, 1 << 27, 1 << 28, 1 << 29, 1 << 30      # of unshare(2)
NOSUID, NODEV, NOEXEC, REC, PRIVATE = 1 << 1, 1 << 2, 1 << 3, 1 << 14, 1 << 18            # of mount(2)
DAC_READ_SEARCH = 1 << 2             # the capability to read any file
ARCHITECTURES = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}    # in seccomp; socket(2)


class Outcome(NamedTuple):
    compiled: bool                   # the program is Python
    passed: bool                     # it ran to its end without an exception
    lacks: tuple                     # what the system did not grant, such as ("network",)


def run(program, seconds=SECONDS):
    """Return the Outcome of a program, a string. It comes within seconds + GRACE."""
    secret = os.urandom(16).hex()
    job = json.dumps([program, secret, seconds]).encode()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, \
         tempfile.TemporaryFile() as result:
        process = subprocess.Popen([sys.executable, "-I", __file__], cwd=folder, start_new_session=True,
                                   stdin=subprocess.PIPE, stdout=result, stderr=subprocess.DEVNULL,
                                   env={"HOME": folder, "TMPDIR": folder})
        try:
            process.communicate(job, seconds + GRACE)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        result.seek(0)
        lacks, *words = result.read(4096).decode(errors="replace").split("\n")
    return Outcome("compiled" in words, secret in words, tuple(filter(None, lacks.split(", "))))


# ------------------------------------------------------------------------------ in the second process
def isolate(libc, folder):
    """Leave the network, the other processes and the writable files. Return what is not granted, a list."""
    uid, gid = os.getuid(), os.getgid()
    flags = NEWNS | NEWIPC | NEWPID | NEWNET
    everything = ["network", "processes of its own", "read-only files"]
    try:
        if libc.unshare(flags):                              # without rights: in a user namespace
            if libc.unshare(flags | NEWUSER):
                return everything
            maps = {"setgroups": "deny", "uid_map": f"{uid} {uid} 1", "gid_map": f"{gid} {gid} 1"}
            for name, text in maps.items():
                Path("/proc/self", name).write_text(text)
        libc.mount(None, b"/", None, REC | PRIVATE, None)    # mounts made here stay here
        attributes = (ctypes.c_uint64 * 4)(1, 0, 0, 0)       # struct mount_attr: set MOUNT_ATTR_RDONLY
        if libc.syscall(442, -100, b"/", 0x8000, attributes, 32):        # mount_setattr, AT_RECURSIVE
            return ["read-only files"]
        size = f"size={DISK},mode=777".encode()
        if libc.mount(b"tmpfs", folder.encode(), b"tmpfs", NOSUID | NODEV, size):
            return ["a working directory of limited size"]
        libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", NOSUID | NODEV, size)    # for multiprocessing
    except (AttributeError, OSError):                        # not Linux; a kernel that refuses half-way
        return everything
    return []


def count_threads():
    """Return how many threads each user has now: the system's limit counts them all."""
    counts = Counter()
    for status in Path("/proc").glob("[0-9]*/status"):
        with suppress(OSError, KeyError):                    # it may have ended since
            fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
            counts[int(fields["Uid"].split()[0])] += int(fields["Threads"])
    return counts


def limit(seconds, threads, lacks):
    """Take the limits, and add to lacks those that the system does not know."""
    for name, value in (("CORE", 0), ("FSIZE", DISK), ("NOFILE", OPEN_FILES), ("CPU", int(seconds) + 1),
                        ("AS", MEMORY), ("NPROC", threads + PROCESSES)):
        try:
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
        except (AttributeError, ValueError, OSError):
            lacks.append(f"limit {name}")


def give_up_rights(libc):
    """Make root a user who owns nothing and may only read. Take all capabilities from anybody else."""
    keep = 0
    if os.getuid() == 0:
        keep = DAC_READ_SEARCH                               # Python may lie in root's home
        user = 50000 + int.from_bytes(os.urandom(2), "big") % 10000
        libc.prctl(8, 1, 0, 0, 0)                            # PR_SET_KEEPCAPS, over the change of user
        with suppress(OSError):                              # a namespace that knows no other user
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
    for caps in (keep, 0):                                   # capset, version 3: effective, permitted
        if libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(caps, caps)) == 0:
            break
    libc.prctl(38, 1, 0, 0, 0)                               # PR_SET_NO_NEW_PRIVS: no sudo
    libc.prctl(1, signal.SIGKILL, 0, 0, 0)                   # PR_SET_PDEATHSIG: never outlive the parent


def forbid_unix_sockets(libc):
    """
    Make the system refuse sockets of the file system, behind which D-Bus, docker or an ssh-agent may listen.

    Returns whether it does. socketpair(2) remains. The filter looks at every system call: seccomp(2)
    explains it.
    """
    architecture, socket = ARCHITECTURES.get(platform.machine(), (0, 0))
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    rules = [(load, 0, 0, 4), (equal, 0, 6, architecture),               # a program of this machine
             (load, 0, 0, 0), (at_least, 4, 0, 1 << 30), (equal, 3, 0, 425),     # refuse x32, io_uring_setup
             (equal, 0, 3, socket), (load, 0, 0, 16), (equal, 0, 1, 1),          # of socket(AF_UNIX, ...)
             (answer, 0, 0, 0x5000D), (answer, 0, 0, 0x7FFF0000)]                # EACCES; allowed
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    return socket and libc.prctl(22, 2, struct.pack("HP", len(rules), ctypes.addressof(code)), 0, 0) == 0


def play(program, secret, result):
    """Run the program as the module __main__, and write the secret to result if it reaches its end."""
    write = os.write
    leave = os._exit
    path = os.path.abspath("program.py")                     # there is none: the directory is empty
    program = program.removeprefix("\ufeff")                 # which a file may begin with
    code = compile(program, path, "exec")
    write(result, b"compiled\n")
    module = ModuleType("__main__")
    module.__file__ = path
    sys.modules["__main__"] = module
    linecache.cache[path] = len(program), None, program.splitlines(True), path           # inspect reads it

    def run_once(_, todo=[code]):
        try:
            if todo:
                exec(todo.pop(), module.__dict__)
        except BaseException:                                # SystemExit is not the end of the program either
            leave(1)
        return 0

    # CPython empties a list while it sorts it, and asks for the key of the first element first. So no frame,
    # and nothing that the garbage collector knows, holds the secret until the program has ended.
    job = ["first", secret]
    del secret
    job.sort(key=run_once)
    write(result, f"{job[1]}\n".encode())
    leave(0)                                                 # its threads and exit handlers do not count


def main():
    with open(0, "rb", closefd=False) as file:
        job = json.load(file)                                # program, secret, seconds
    folder = os.getcwd()
    libc = ctypes.CDLL(None, use_errno=True)
    threads = count_threads()
    lacks = isolate(libc, folder)
    if os.getuid() == 0:
        os.chmod(folder, 0o777)
    child = os.fork()
    if child:                                                # what follows the fork is the third process
        signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, job[2])
        os.waitpid(child, 0)
        return
    os.chdir(folder)                                         # the new file system over it
    if not lacks and libc.mount(b"proc", b"/proc", b"proc", NOSUID | NODEV | NOEXEC, None):
        lacks.append("a list of processes of its own")
    result = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    if hasattr(libc, "prctl"):
        give_up_rights(libc)
    if not (hasattr(libc, "prctl") and forbid_unix_sockets(libc)):
        lacks.append("no sockets of the file system")
    limit(job[2], threads[os.getuid()], lacks)
    os.write(result, (", ".join(lacks) + "\n").encode())
    play(job.pop(0), job.pop(0), result)


if __name__ == "__main__":
    main()
