"""
Where the code runs: device, dtype, attention kernels, the ranks that torchrun starts, and signals to stop.
"""
import os
import signal
import sys
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
    """Whether torch.compile can work here; says so where not."""
    if device.type == "cuda":
        try:
            import triton  # noqa: F401
        except ImportError:
            print("torch.compile needs Triton, which is not installed: running uncompiled", file=sys.stderr)
            return False
        if torch.cuda.get_device_capability(device) < (7, 0):
            print("torch.compile needs a GPU of compute capability 7.0: running uncompiled", file=sys.stderr)
            return False
    return True


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
    except torch.OutOfMemoryError as e:
        why = str(e).splitlines()[0]
        raise UserError(f"out of memory; {remedy} ({why})") from None
    except RuntimeError as e:
        if not isinstance(e, dist.DistError) and "Connection" not in str(e):
            raise
        raise SystemExit(f"rank {ranks.rank}: another rank has ended, see its line") from None
    except UserError:
        if int(os.environ.get("LOCAL_RANK", 0)):
            raise SystemExit(1) from None
        raise
    finally:
        ranks.close()


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
