"""
Does a path read x_t? Teacher-forced NLL on validation answers where x_t is built from the truth, from nothing (x_1 = 0), or from a random token.

    PYTHONPATH=. python docs/probe.py out/demo_l2d 200      # a run with a path, and how many examples
"""
import sys

import torch
import torch.nn.functional as F

from diffusion import noise
from prepare_data import load_split
from sample import load
from train import batch_of

TIMES = (0.5, 0.75, 0.875, 0.9375, 0.99, 1.0)
out_dir, n = sys.argv[1], int(sys.argv[2])
model, _, checkpoint = load(out_dir, "best")
data, path = load_split(checkpoint["config"]["data_dir"], "val"), model.path
g, sums, count = torch.Generator().manual_seed(0), {}, 0
with torch.no_grad():
    for start in range(0, n, 20):
        idx, targets, _ = batch_of(data, range(start, min(start + 20, n)), "cpu")
        at = (targets >= 0).nonzero(as_tuple=True)
        y, c = targets[at], model.read(idx, at)
        label, count = torch.full_like(y, model.no_label), count + len(y)
        x_0 = path.config.sigma * torch.randn(len(y), path.config.x_dim, generator=g)
        other = torch.randint(model.trunk.config.vocab_size, y.shape, generator=g)
        for t in TIMES:
            ts = torch.full(y.shape, t)
            for name, x_1 in (("truth", model.embed(y)), ("nothing", 0 * model.embed(y)), ("other", model.embed(other))):
                sums[t, name] = sums.get((t, name), 0) + F.cross_entropy(model(noise(x_1, x_0, ts), ts, c, label), y, reduction="sum").item()
print(out_dir, count, "targets")
for t in TIMES:
    print(t, *(f"{name} {sums[t, name] / count:.4f}" for name in ("truth", "nothing", "other")))
