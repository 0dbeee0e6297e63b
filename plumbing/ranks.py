"""
Ranks: the processes that torchrun starts for one run. Here they meet, add up their numbers, and end together.
"""
import hashlib
import os
import signal
import sys
import traceback
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from configurator import UserError, discard_output, first_line, out_of_memory
from plumbing.device import read_environment

TIMEOUT = timedelta(hours=1)            # longer than the main rank's downloads, for which the others wait


class Ranks:
    """This process among its ranks: rank, world (their number) and device. One process is rank 0 of 1."""
    def __init__(self, device):
        self.device = device
        self.store = None               # a table of key and value that all ranks share
        self.rank, self.world, _ = read_environment()
        if self.world > 1:
            self.meet()

    def meet(self):
        """Wait for the other ranks, and join them. Raises UserError where they cannot be reached."""
        # while it waits, Python could not run its own handlers: Ctrl-C and SIGTERM shall end it at once
        handlers = {s: signal.signal(s, signal.SIG_DFL) for s in (signal.SIGINT, signal.SIGTERM)}
        cuda = self.device.type == "cuda"
        try:
            self.store, rank, world = next(dist.rendezvous("env://", timeout=TIMEOUT))
            dist.init_process_group("nccl" if cuda else "gloo", store=self.store, rank=rank, world_size=world,
                                    timeout=TIMEOUT, device_id=self.device if cuda else None)
        except Exception as e:          # each cause raises another type
            address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise UserError(f"the ranks did not meet at {address} ({e}); check that address") from None
        for s, handler in handlers.items():
            signal.signal(s, handler)

    @property
    def main(self):
        """Whether this is the rank that prints and writes files."""
        return self.rank == 0

    @contextmanager
    def main_first(self):
        """Run the block on the main rank before the others run it: they find what it downloaded or made."""
        if self.world > 1 and not self.main:
            dist.barrier()
        yield
        if self.world > 1 and self.main:
            dist.barrier()

    def sum(self, tensor):
        """Add up tensor over all ranks, in place, and return it."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag):
        """Return whether flag is true on any rank."""
        return bool(self.sum(torch.tensor(float(flag), device=self.device)))

    def say(self, text):
        """Print a line, on the main rank only. If nobody reads it any more (`| head`), the work goes on."""
        try:
            if self.main:
                print(text, flush=True)
        except BrokenPipeError:
            discard_output()

    def first_to_say(self, text):
        """Return whether no other rank of this host has called this with the same text before."""
        host = os.environ.get("GROUP_RANK", "")          # torchrun counts the hosts in it
        key = f"said {host} {hashlib.sha256(text.encode()).hexdigest()}"
        try:
            return self.store is None or self.store.add(key, 1) == 1
        except Exception:               # the rank that keeps the table has ended
            return True

    def end(self):
        """Wait for the other ranks, then leave them: a rank that leaves early can abort one that still works."""
        if self.world > 1:
            self.any(False)
            dist.destroy_process_group()


@contextmanager
def ranks_of(device, remedy):
    """
    Give the Ranks of this process to the block, and end them in order.

    remedy: what to do when memory runs out, for the message. An error that several ranks of a host share is
    printed by one of them; any other is printed by the rank that met it.
    """
    ranks = Ranks(device)
    try:
        yield ranks
        ranks.end()
    except (Exception, UserError) as e:
        error = explain(e, ranks, remedy)
        if ranks.world == 1:
            raise error from None if error is not e else e.__cause__
        if isinstance(error, SystemExit):
            said = str(error)
            shared = said.partition(" (")[0]             # what stands in brackets may differ between ranks
            said = f"{said}\n" if ranks.first_to_say(shared) else ""
        else:
            said = traceback.format_exc()
        sys.stderr.write(said)
        sys.stderr.flush()
        os._exit(1)                     # to leave the group in order, other ranks would have to do so, too


def explain(error, ranks, remedy):
    """Return the error, or a UserError or SystemExit with one line in its place if it is of a known kind."""
    text = str(error).strip()
    if out_of_memory(error):
        return UserError(f"out of memory; {remedy} ({first_line(error)})")
    if isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and "Connection" in text:
        last = text.splitlines()[-1] if text else ""
        return SystemExit(f"rank {ranks.rank}: another rank has ended, see its line ({last})")
    return error


class StopSignals:
    """Note Ctrl-C and SIGTERM instead of obeying them. number is the signal's, and 0 before the first.

    A second signal ends the process at once. A script that stops exits with status 128 + number.
    """
    def __init__(self):
        self.number = 0
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, self.note)

    def note(self, number, frame):
        if self.number:
            os._exit(128 + number)
        self.number = number
