"""
Faster decoding on a CPU: store large matrices in the memory layout that this machine reads fastest.

Which layout that is depends on the CPU, and on the number of rows to multiply. pack measures it, for one row
and for several. Small matrices stay in the CPU's cache and gain nothing.
"""
import statistics
import time
from collections import defaultdict

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import LoRALinear, borrow

LARGE = 1 << 18                     # weights of a matrix that is packed, such as 512 x 512
SEVERAL = 8                         # rows for which the layout for several rows is measured
LAYOUTS = {"rows": lambda W: W,                                          # W (out, in) as nn.Linear has it
           "columns": lambda W: W.t().contiguous().t(),
           "packed": lambda W: torch.ops.mkldnn._reorder_linear_weight(W, None)}     # for oneDNN


def product(x, W, bias):
    """Return W x + bias, for W in any of the layouts."""
    if W.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, W, bias, "none", [], "")
    return F.linear(x, W, bias)


class PackedLinear(nn.Module):
    """y = W x + bias for inference: W (out, in) in two layouts, for one row x and for several."""
    def __init__(self, W, bias, one_row, several):
        super().__init__()
        borrow(self, "weight", LAYOUTS[one_row](W))
        borrow(self, "several", self.weight if several == one_row else LAYOUTS[several](W))
        borrow(self, "bias", bias)

    def forward(self, x):
        return product(x, self.weight if x.numel() == x.size(-1) else self.several, self.bias)


def fastest(matrices, n_rows, repeats=3):
    """Return the layout in which n_rows rows times the matrices take the least time (median of repeats)."""
    ready = {name: [make(W) for W in matrices] for name, make in LAYOUTS.items()}
    seconds = defaultdict(list)
    for _ in range(1 + repeats):
        for name, weights in ready.items():
            start = time.perf_counter()
            for W in weights:
                product(torch.zeros(n_rows, W.size(1)), W, None)
            seconds[name].append(time.perf_counter() - start)
    return min(LAYOUTS, key=lambda name: statistics.median(seconds[name][1:]))


@torch.no_grad()
def pack(model):
    """Repack an L2D pair in place, and return it. It can then only decode: not train, save, move or compile.

    Nothing changes on a GPU, in another dtype than float32, without oneDNN, and where a LoRA is added.
    """
    head = model.trunk.head_weight().detach()
    if head.device.type != "cpu" or head.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return model
    linears = [(owner, name, child.weight.detach(), child.bias) for owner in model.modules()
               if not isinstance(owner, LoRALinear) for name, child in owner.named_children()
               if type(child) is nn.Linear and child.weight.numel() >= LARGE]
    linears += [(model.trunk, "lm_head", head, None)] if head.numel() >= LARGE else []
    sample = [W for _, _, W, _ in linears[:4] + linears[-1:]]            # a block and the head
    layouts = [fastest(sample, n_rows) for n_rows in (1, SEVERAL)] if sample else []
    for owner, name, W, bias in linears:
        put = setattr if name in owner._modules else borrow              # lm_head is a method
        put(owner, name, PackedLinear(W, bias, *layouts))
    return model
