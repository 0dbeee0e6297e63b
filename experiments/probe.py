"""
Does a path read x_t? Teacher-forced NLL on validation answers where x_t is built from the truth, from nothing
(x_1 = 0), or from a random token.

    PYTHONPATH=. python experiments/probe.py out/demo_l2d 200      # a run with a path, and how many examples
"""
import sys

import torch
import torch.nn.functional as F

from batches import batch_of
from checkpoint import load
from diffusion import noise
from prepare_data import load_split

TIMES = (0.5, 0.75, 0.875, 0.9375, 0.99, 1.0)


@torch.no_grad()
def main(out_dir, n):
    model, _, checkpoint = load(out_dir, "best", "cpu")
    data, path = load_split(checkpoint["config"]["data_dir"], "val"), model.path
    g, sums, count = torch.Generator().manual_seed(0), {}, 0
    for start in range(0, n, 20):
        idx, at, y, _ = batch_of(data, range(start, min(start + 20, n)), "cpu")
        c, label, count = model.read(idx, at), torch.full_like(y, model.no_label), count + len(y)
        x_0 = path.config.sigma * torch.randn(len(y), path.config.x_dim, generator=g)
        other = model.embed(torch.randint(model.trunk.config.vocab_size, y.shape, generator=g))
        for t in TIMES:
            ts = torch.full(y.shape, t)
            for name, x_1 in (("truth", model.embed(y)), ("nothing", 0 * other), ("other", other)):
                logits = model(noise(x_1, x_0, ts), ts, c, label)
                loss = F.cross_entropy(logits, y, reduction="sum").item()
                sums[t, name] = sums.get((t, name), 0) + loss
    print(out_dir, count, "targets")
    for t in TIMES:
        print(t, *(f"{name} {sums[t, name] / count:.4f}" for name in ("truth", "nothing", "other")))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
