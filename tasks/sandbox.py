"""
Runs code that a model wrote: in a process of its own, with limits, away from the network and the files.

    run("assert sorted([2, 1]) == [1, 2]")  ->  Outcome(compiled=True, passed=True, lacks=())

The evaluating process starts this file as a script. That second process asks the system for a network
without a connection, for process numbers of its own, and for a file system that can only be read. It then
forks a third process, which gives up its rights, takes its limits, and runs the program in an empty
directory. When the time is up the third process is killed, and with it all that it started.
What the system does not grant is named in Outcome.lacks: on such a machine the program is less confined.
This confines harm, not cunning: a program that wants to be counted as passing can find a way.
"""
import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

SECONDS = 10                         # of real time for a program
MEMORY, DISK, PROCESSES, OPEN_FILES = 512 << 20, 16 << 20, 8, 64
GRACE = 20                           # more seconds until the second process is killed, too
NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 1 << 17, 1 << 27, 1 << 28, 1 << 29, 1 << 30      # of unshare(2)
NOSUID, NODEV, REC, PRIVATE = 1 << 1, 1 << 2, 1 << 14, 1 << 18                            # of mount(2)
DAC_READ_SEARCH = 1 << 2             # the capability to read any file


class Outcome(NamedTuple):
    compiled: bool                   # the program is Python
    passed: bool                     # it ran to its end without an exception
    lacks: tuple                     # what the system did not grant, such as ("network",)


def run(program, seconds=SECONDS):
    """The Outcome of a program, a string. Whatever the program does, this returns within seconds + GRACE."""
    secret = os.urandom(16).hex()    # a process that just ends, by sys.exit or a signal, does not write it
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, \
         tempfile.TemporaryFile() as job, tempfile.TemporaryFile() as result:
        job.write(json.dumps([program, secret, seconds]).encode())       # files, not pipes: nothing can block
        job.seek(0)
        process = subprocess.Popen([sys.executable, "-I", __file__], cwd=folder, start_new_session=True,
                                   stdin=job, stdout=result, stderr=subprocess.DEVNULL,
                                   env={"HOME": folder, "TMPDIR": folder})
        try:
            process.wait(seconds + GRACE)
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
    """Leaves the network, the other processes and the writable files; returns what is lacking, a list."""
    uid, gid, flags = os.getuid(), os.getgid(), NEWNS | NEWIPC | NEWPID | NEWNET
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
    except (AttributeError, OSError):                        # not Linux; a kernel that refuses half-way
        return everything
    return []


def running(uid):
    """How many threads the user has now: the system's limit counts them all."""
    count = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        with suppress(OSError, KeyError):                    # it may have ended since
            fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
            count += int(fields["Threads"]) * (fields["Uid"].split()[0] == str(uid))
    return count


def limit(seconds, lacks):
    """Takes the limits, and adds to lacks those that the system does not know."""
    for name, value in (("CORE", 0), ("FSIZE", DISK), ("NOFILE", OPEN_FILES), ("CPU", int(seconds) + 1),
                        ("AS", MEMORY), ("NPROC", running(os.getuid()) + PROCESSES)):
        try:
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
        except (AttributeError, ValueError, OSError):
            lacks.append(f"limit {name}")


def give_up_rights(libc):
    """Makes root a user who owns nothing and may only read; takes all capabilities from anybody else."""
    keep = 0
    if os.getuid() == 0:
        keep, user = DAC_READ_SEARCH, 50000 + os.getpid() % 10000        # Python may lie in root's home
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


def main():
    program, secret, seconds = json.load(sys.stdin)
    folder, libc = os.getcwd(), ctypes.CDLL(None, use_errno=True)
    lacks = isolate(libc, folder)
    if os.getuid() == 0:
        os.chmod(folder, 0o777)
    child = os.fork()
    if child:                                                # what follows the fork is the third process
        signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, seconds)
        os.waitpid(child, 0)
        return
    os.chdir(folder)                                         # the new file system over it
    result, nowhere = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    if hasattr(libc, "prctl"):
        give_up_rights(libc)
    limit(seconds, lacks)
    os.write(result, (", ".join(lacks) + "\n").encode())
    code = compile(program, "program", "exec")
    os.write(result, b"compiled\n")
    exec(code, {"__name__": "program"})
    os.write(result, f"{secret}\n".encode())
    os._exit(0)                                              # its threads and exit handlers do not count


if __name__ == "__main__":
    main()
