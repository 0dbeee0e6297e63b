"""
Kernels for training: fused attention, and torch.compile.
"""
import sys

import torch

from configurator import first_line


def use_kernels_for_training(device, dtype):
    """Use fused attention, except in half precision on a CPU: its backward pass is 8 times slower there."""
    torch.backends.cuda.enable_flash_sdp(device.type != "cpu" or dtype == torch.float32)


def compiles(device):
    """Return whether torch.compile works on this device. If not, print a note that says why."""
    if device.type == "cuda":
        try:
            torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
        except Exception as e:          # no Triton, no C compiler, an old GPU: each raises another type
            print(f"note: torch.compile fails here ({first_line(e)}): going on without", file=sys.stderr)
            return False
    return True


def compile_blocks(model, **options):
    """Compile, in place, every block of the trunk and of the path, and the head with its loss.

    Blocks of one kind share their kernels, which serve all lengths of a batch. So the time to compile does
    not grow with the number of layers. options: of torch.compile.
    """
    blocks = [*model.trunk.h, *(model.path.h if model.path is not None else [])]
    for block in blocks:
        block.compile(dynamic=True, **options)                    # parameters keep their names
    model.trunk.cross_entropy = torch.compile(model.trunk.cross_entropy, dynamic=True, **options)
