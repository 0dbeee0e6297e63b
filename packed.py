"""
Faster decoding on a CPU: GPT-2's large matrices, repacked for oneDNN.

A decoding step multiplies a few rows by each matrix. In float32 F.linear leaves that to a BLAS which, on some CPUs, runs such thin products on
one core; oneDNN, which torch comes with, reads a repacked copy with all of them (docs/LOG.md has both). Same products, rounded in
another order: bfloat16 already goes this way, and small matrices, which stay in the cache, gain nothing.
"""
import torch
import torch.nn as nn

from model import LoRALinear, borrow

LARGE = 1 << 18         # weights: from 512 x 512


class PackedLinear(nn.Module):
    """y = W x + b for inference: W (out, in) copied in oneDNN's layout, b (out,) or None."""
    def __init__(self, weight, bias=None):
        super().__init__()
        borrow(self, "weight", torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None))
        borrow(self, "bias", bias)

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def pack(model):
    """Repack an L2D pair in place, to decode and no more: it can then not be trained, saved, moved or compiled.

    Nothing happens where it would not help: off the CPU, in other dtypes, without oneDNN. The weights that a LoRA is added to stay as they are.
    """
    embedding = model.trunk.wte.weight
    if embedding.device.type != "cpu" or embedding.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return model
    for owner in list(model.modules()):
        for name, child in owner.named_children():
            if type(child) is nn.Linear and child.weight.numel() >= LARGE and not isinstance(owner, LoRALinear):
                setattr(owner, name, PackedLinear(child.weight, child.bias))
    if embedding.numel() >= LARGE:
        borrow(model.trunk, "lm_head", PackedLinear(embedding))
    return model
