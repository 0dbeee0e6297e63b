"""
Where the code runs: device, dtype, attention kernels, the ranks that torchrun starts, and signals to stop.
"""
import os
import signal
import sys
import traceback
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from configurator import UserError, discard_output, require


def pick_device(want):
    """The torch.device of --device, under torchrun this rank's own GPU. auto: CUDA where it is; a Mac works
    on its CPU. Raises UserError where there is no CUDA to use."""
    if want == "cpu" or want == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--device=cuda, but this machine, or its torch, has no CUDA; use --device=cpu")
    local, n = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    require(local < n, f"rank {local} of this host has no GPU of its own, there are {n}; use torchrun "
            f"--nproc_per_node={n}")
    torch.cuda.set_device(local)
    torch.set_float32_matmul_precision("high")
    # cuDNN's attention plans anew for every shape, and decoding has a new one for every token
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device("cuda", local)


def pick_dtype(want, device):
    """The torch.dtype of --dtype. auto: float32 on a CPU; bfloat16 on a GPU, float16 if that is emulated."""
    if want == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return getattr(torch, want)


def use_kernels_for_training(device, dtype):
    """Every kernel, except on a CPU in half precision: the fused one's backward is 8 times slower there."""
    torch.backends.cuda.enable_flash_sdp(device.type != "cpu" or dtype == torch.float32)  # a CPU obeys, too


def compiles(device):
    """Whether torch.compile works here; says so where not: no Triton, no C compiler, an old GPU."""
    if device.type == "cuda":
        try:
            torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
        except Exception as e:                                    # of many kinds, by what is missing
            print(f"note: torch.compile fails here ({first_line(e)}): going on without", file=sys.stderr)
            return False
    return True


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Ranks:
    """Where this process stands among those torchrun started; one process alone is rank 0 of 1."""
    def __init__(self, device):
        self.device = device
        try:
            self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        except ValueError:
            self.rank, self.world = 0, 0
        missing = [k for k in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if k not in os.environ]
        if not 0 <= self.rank < self.world or self.world > 1 and missing:
            names = dict.fromkeys(("RANK", "WORLD_SIZE", *missing))
            values = " ".join(f"{k}={os.environ.get(k)}" for k in names)
            raise UserError(f"{values} in the environment do not go together; start several ranks by "
                            "torchrun, or unset these for one process")
        if self.world > 1:                                        # the timeout outlasts rank 0's downloads
            handlers = {s: signal.signal(s, signal.SIG_DFL) for s in (signal.SIGINT, signal.SIGTERM)}
            try:
                dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                        timeout=timedelta(hours=1),
                                        device_id=device if device.type == "cuda" else None)
            except Exception as e:                                # of many kinds, by what is wrong
                raise UserError(f"the ranks did not meet at {os.environ['MASTER_ADDR']}:"
                                f"{os.environ['MASTER_PORT']} ({e}); check that address") from None
            for s, handler in handlers.items():                   # while waiting, Python could not run them
                signal.signal(s, handler)

    @property
    def main(self):
        return self.rank == 0

    @contextmanager
    def main_first(self):
        """The main rank runs the block before the others do: what it downloads or makes is there for them."""
        if self.world > 1 and not self.main:
            dist.barrier()
        yield
        if self.world > 1 and self.main:
            dist.barrier()

    def sum(self, tensor):
        """The sum of tensor over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag):
        """Whether flag is true on any rank."""
        return bool(self.sum(torch.tensor(float(flag), device=self.device)))

    def say(self, text):
        """Print a line, on the main rank only. Where nobody reads any more (`| head`), the work goes on."""
        try:
            if self.main:
                print(text, flush=True)
        except BrokenPipeError:
            discard_output()

    def close(self):
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def ranks_of(device, remedy):
    """The Ranks of this process, closed in the end. A user's error is said once a host. So is running out of
    memory, with this remedy."""
    ranks = Ranks(device)
    try:
        yield ranks
    except (Exception, UserError) as e:
        error = line_of(e, ranks, remedy)
        if ranks.world > 1 and device.type == "cuda":             # closing waits for ranks that wait for this
            said = error.code if isinstance(error, SystemExit) else traceback.format_exc()
            sys.stderr.write(f"{said}\n" if isinstance(said, str) else "")
            sys.stderr.flush()
            os._exit(1)
        if error is e:
            raise
        raise error from None
    finally:
        ranks.close()


def line_of(error, ranks, remedy):
    """The error as what a user should read of it, if it is of a known kind: a UserError or a SystemExit."""
    text = str(error)
    if isinstance(error, RuntimeError) and ("out of memory" in text or "ALLOC_FAILED" in text):
        error = UserError(f"out of memory; {remedy} ({first_line(error)})")
    elif isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and "Connection" in text:
        last = text.strip().splitlines()[-1] if text.strip() else ""
        return SystemExit(f"rank {ranks.rank}: another rank has ended, see its line ({last})")
    if isinstance(error, UserError) and int(os.environ.get("LOCAL_RANK", 0)):
        return SystemExit(1)                                      # another rank of this host says it
    return error


class StopSignals:
    """Ctrl-C and SIGTERM, noted instead of obeyed: number is that of the signal, 0 before. A second one ends
    the process at once. Exit with status 128 + number."""
    def __init__(self):
        self.number = 0
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, self.note)

    def note(self, number, frame):
        if self.number:
            os._exit(128 + number)
        self.number = number
