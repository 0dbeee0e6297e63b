"""
Faster decoding on a CPU: GPT-2's large matrices in the memory layout that this machine reads fastest.

A decoding step multiplies a few rows by each matrix, and what it costs is reading the matrix. Which of three layouts
is read fastest depends on the CPU and on the number of rows (docs/LOG.md): W (out, in) as nn.Linear has it, the same
column by column, or repacked for oneDNN, which torch comes with. So pack measures, for one row and for several. The
products are the same, rounded in another order. Small matrices stay in the cache and gain nothing.
"""
import statistics
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import LoRALinear, borrow

LARGE = 1 << 18         # weights: from 512 x 512
SEVERAL = 8             # rows, by which the layout for more than one is chosen
LAYOUTS = {"rows": lambda W: W,
           "columns": lambda W: W.t().contiguous().t(),
           "packed": lambda W: torch.ops.mkldnn._reorder_linear_weight(W, None)}


def product(x, W, bias):
    """W x + bias, for W in any of the layouts."""
    return torch.ops.mkldnn._linear_pointwise(x, W, bias, "none", [], "") if W.is_mkldnn else F.linear(x, W, bias)


class PackedLinear(nn.Module):
    """y = W x + bias for inference: W (out, in) in two layouts, for one row x and for several; bias (out,) or None."""
    def __init__(self, W, bias, one_row, several):
        super().__init__()
        borrow(self, "one_row", LAYOUTS[one_row](W.detach()))
        borrow(self, "several", self.one_row if several == one_row else LAYOUTS[several](W.detach()))
        borrow(self, "bias", bias)

    def forward(self, x):
        return product(x, self.one_row if x.numel() == x.size(-1) else self.several, self.bias)


@torch.no_grad()
def fastest(matrices, n_rows, repeats=5):
    """The layout in which n_rows rows are multiplied by the matrices in the least time: median of alternating repeats."""
    inputs = [torch.zeros(n_rows, W.size(1)) for W in matrices]
    ready = {name: [make(W) for W in matrices] for name, make in LAYOUTS.items()}
    seconds = {name: [] for name in LAYOUTS}
    for _ in range(1 + repeats):
        for name, weights in ready.items():
            start = time.perf_counter()
            for x, W in zip(inputs, weights):
                product(x, W, None)
            seconds[name].append(time.perf_counter() - start)
    return min(LAYOUTS, key=lambda name: statistics.median(seconds[name][1:]))


def pack(model):
    """Repack an L2D pair in place, to decode and no more: it can then not be trained, saved, moved or compiled.

    Nothing happens where it would not help: off the CPU, in other dtypes, without oneDNN. The weights that a LoRA is
    added to stay as they are.
    """
    head = model.trunk.wte.weight
    if head.device.type != "cpu" or head.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return model
    linears = [(owner, name, child.weight.detach(), child.bias) for owner in model.modules()
               if not isinstance(owner, LoRALinear) for name, child in owner.named_children()
               if type(child) is nn.Linear and child.weight.numel() >= LARGE]
    large_head = [head.detach()] if head.numel() >= LARGE else []
    sample = [W for _, _, W, _ in linears[:8]] + large_head              # two blocks and the head: more than a cache
    layouts = [fastest(sample, n_rows) for n_rows in (1, SEVERAL)] if sample else []
    for owner, name, W, bias in linears:
        setattr(owner, name, PackedLinear(W, bias, *layouts))
    if large_head:
        borrow(model.trunk, "lm_head", PackedLinear(head, None, *layouts))
    return model
