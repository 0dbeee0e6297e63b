"""
Ranks: the processes that torchrun starts for one run. Here they meet, add up numbers, and end together.
"""
import gc
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
    """This process among the ranks: rank, world (how many there are), device. One process is rank 0 of 1.

    Raises UserError where the others cannot be reached.
    """
    def __init__(self, device):
        self.device = device
        self.store = None               # keys and values that all ranks share
        self.rank, self.world, _ = read_environment()
        if self.world == 1:
            return
        # Python's own handlers could not run while it waits here; Ctrl-C and SIGTERM shall end it at once
        handlers = {s: signal.signal(s, signal.SIG_DFL) for s in (signal.SIGINT, signal.SIGTERM)}
        cuda = device.type == "cuda"
        try:
            self.store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
            dist.init_process_group("nccl" if cuda else "gloo", store=self.store, rank=self.rank,
                                    world_size=self.world, timeout=TIMEOUT,
                                    device_id=device if cuda else None)
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
        """Run the block on the main rank before the others: they find what it downloaded or made."""
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
        """Return whether no other rank of this host has asked this about the same text before."""
        host = os.environ.get("GROUP_RANK", "")         # torchrun's number of the host
        try:
            return self.store is None or self.store.add(f"said on host {host}: {text}", 1) == 1
        except RuntimeError:            # the process that keeps the store has ended
            return True

    def end(self):
        """Leave the other ranks, once all have come here: one that leaves early may abort one that works."""
        if self.world > 1:
            self.any(False)
            gc.collect()                # DDP's objects hold the group, whose threads must not outlive Python
            dist.destroy_process_group()


@contextmanager
def ranks_of(device, remedy):
    """
    Run the block with the Ranks of this process, and end them in order.

    remedy: what to do when memory runs out, for the message. A user's error is printed by the rank that meets
    it; where several ranks of a host meet the same one, by the first of them.
    """
    ranks = Ranks(device)
    try:
        yield ranks
        ranks.end()
    except (Exception, UserError) as e:
        error = explain(e, ranks, remedy)
        if ranks.world == 1:
            if error is e:
                raise
            raise error from None
        said = traceback.format_exc()
        if isinstance(error, SystemExit):               # what follows " (" may differ between ranks
            said = f"{error}\n" if ranks.first_to_say(str(error).partition(" (")[0]) else ""
        sys.stdout.flush()
        sys.stderr.write(said)
        sys.stderr.flush()
        os._exit(1)                     # NCCL's farewell would wait for ranks that wait for this one
    except SystemExit:                  # all ranks stop here together
        ranks.end()
        raise


def explain(error, ranks, remedy):
    """Return what a user should read in place of the error: a UserError or SystemExit, or else the error."""
    lines = str(error).strip().splitlines() or [""]
    if out_of_memory(error):
        return UserError(f"out of memory; {remedy} ({first_line(error)})")
    if isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and "Connection" in str(error):
        return SystemExit(f"rank {ranks.rank}: another rank has ended, see its line ({lines[-1]})")
    return error


class StopSignals:
    """Note Ctrl-C and SIGTERM instead of obeying them. number is the signal's, 0 before; a second one ends
    the process at once. A script that stops for one exits with status 128 + number."""
    def __init__(self):
        self.number = 0
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, self.note)

    def note(self, number, frame):
        if self.number:
            os._exit(128 + number)
        self.number = number
