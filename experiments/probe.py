"""
Does a path read x_t? We compare three x_t by the NLL of true validation answers: x_t built from the true
token, from nothing (x_1 = 0), and from a random token. If the path does not read x_t, all give the same.

    python experiments/probe.py out/demo_l2d 200      # a run with a path, and how many examples
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))    # the project's folder

from configurator import require, run
from diffusion import noise
from plumbing.dataset import load_batch, load_split
from plumbing.trained import load

TIMES = (0.5, 0.75, 0.875, 0.9375, 0.99, 1.0)
KINDS = ("truth", "nothing", "other")


@torch.no_grad()
def measure(out_dir, n):
    """The number of targets in the first n examples, and {(t, kind of x_1): mean NLL}."""
    model, _, checkpoint = load(out_dir, "best", "cpu")
    require(model.path is not None, f"{out_dir} has no path")
    data = load_split(checkpoint["config"]["data_dir"], "val")
    path = model.path.config
    generator = torch.Generator().manual_seed(0)
    sums = dict.fromkeys(((t, kind) for t in TIMES for kind in KINDS), 0.0)
    count = 0
    for first in range(0, n, 20):
        idx, at, y, _ = load_batch(data, range(first, min(first + 20, n)), "cpu")
        count += len(y)
        c = model.read_context(idx, at)
        group = torch.full_like(y, model.no_group)
        x_0 = path.sigma * torch.randn(len(y), path.x_dim, generator=generator)
        other = model.embed(torch.randint(model.trunk.config.vocab_size, y.shape, generator=generator))
        for t in TIMES:
            times = torch.full(y.shape, t)
            for kind, x_1 in zip(KINDS, (model.embed(y), torch.zeros_like(other), other)):
                logits = model(noise(x_1, x_0, times), times, c, group)
                sums[t, kind] += F.cross_entropy(logits, y, reduction="sum").item()
    return count, {key: total / count for key, total in sums.items()}


def main():
    require(len(sys.argv) == 3 and sys.argv[2].isdecimal(),
            "expected a run and a number of examples: python experiments/probe.py out/demo_l2d 200")
    out_dir, n = sys.argv[1:]
    count, nll = measure(out_dir, int(n))
    print(out_dir, count, "targets")
    for t in TIMES:
        print(t, *(f"{kind} {nll[t, kind]:.4f}" for kind in KINDS))


if __name__ == "__main__":
    run(main)
