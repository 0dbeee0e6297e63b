"""
Choose the device and the number format to compute with.
"""
import os

import torch

from configurator import require


def read_environment():
    """Return (rank, world, local rank), as torchrun sets them; (0, 1, 0) where there is one process.

    The local rank counts the processes of this host. One process ignores it: it may be left over from another
    program. Raises UserError where the variables do not go together.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    found = [os.environ.get(name) for name in names]
    if found[0] in (None, "0") and found[1] in (None, "1"):
        return 0, 1, 0
    try:
        rank, world, local = map(int, found[:3])
        together = 0 <= rank < world and 0 <= local and None not in found
    except (TypeError, ValueError):
        together = False
    values = " ".join(f"{name}={value}" for name, value in zip(names, found))
    require(together, f"{values} in the environment do not go together; start several ranks by torchrun, or "
            "unset these for one process")
    return rank, world, local


def pick_device(want):
    """Return the torch.device that --device asks for: "auto" (CUDA where it exists), "cpu" or "cuda".

    Under torchrun each rank gets the GPU of its local rank. Raises UserError where there is no such GPU.
    """
    if want == "cpu" or want == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    require(torch.cuda.is_available(),
            "--device=cuda, but this machine, or its torch, has no CUDA; use --device=cpu")
    local = read_environment()[2]
    n_gpus = torch.cuda.device_count()
    require(local < n_gpus, f"rank {local} of this host has no GPU of its own, there are {n_gpus}; use "
            f"torchrun --nproc_per_node={n_gpus}")
    torch.cuda.set_device(local)
    torch.set_float32_matmul_precision("high")
    # cuDNN's attention makes a new plan for every shape, and each decoded token has a new shape
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device("cuda", local)


def pick_dtype(want, device):
    """Return the torch.dtype that --dtype names. "auto" is float32 on a CPU and bfloat16 on a GPU.

    On an old GPU, which only emulates bfloat16, "auto" is float16.
    """
    if want != "auto":
        return getattr(torch, want)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
