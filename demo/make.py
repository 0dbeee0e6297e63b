"""
Make the demo's model anew, in half precision, from what demo.sh has trained.

    bash demo.sh && python demo/make.py

Writes demo/best.pt (the path), demo/trunk.pt, and demo/README.md, which says where they come from.
"""
import hashlib
import io
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import glob
import json

import torch

from configurator import require, run
from plumbing.checkpoint import load_checkpoint

SOURCE, HERE = "out/demo_l2d", os.path.dirname(os.path.abspath(__file__))
TEXT = """# The demo's model

`best.pt` is the diffusion path and `trunk.pt` the small GPT that `bash demo.sh` trains, in half precision.
They are an artefact, not a result: `python sample.py --steps=16` uses them where nothing else has been
trained.

| | |
|---|---|
| made by | `bash demo.sh` at commit {commit}, then `python demo/make.py` |
| trunk | `python train.py config/demo_trunk.py`, seed {trunk_seed} |
| path | `python train.py config/demo_l2d.py`, seed {seed}, {iter_num} iterations |
| validation loss | {loss:.4f} |
| library | torch {torch} |
| correct, of {n} test problems, in float32 | {accuracy} |
"""


def half(tensors):
    return {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def find_accuracy():
    """"T = 1: 0.471 [0.440, 0.502]; ...", the number of problems, the commit, from what demo.sh measured."""
    found = sorted(glob.glob(f"{SOURCE}/eval/test_*.json"), key=os.path.getmtime)
    require(found, f"no evaluation in {SOURCE}/eval; run bash demo.sh first")
    with open(found[-1], encoding="utf-8") as file:
        rows = json.load(file)["rows"]
    texts = ["T = {}: {:.3f} [{:.3f}, {:.3f}]".format(r["steps"], r["strict"], *r["interval"]) for r in rows]
    return "; ".join(texts), rows[0]["n"], rows[0]["commit"]


def main():
    checkpoint = load_checkpoint(f"{SOURCE}/best.pt")
    trunk = {k.removeprefix("trunk."): v for k, v in checkpoint["model"].items() if k.startswith("trunk.")}
    path = {k: v for k, v in checkpoint["model"].items() if not k.startswith("trunk.")}
    buffer = io.BytesIO()
    torch.save(half(trunk), buffer)
    with open(f"{HERE}/trunk.pt", "wb") as file:
        file.write(buffer.getvalue())
    checkpoint |= {"model": half(path), "trunk_sha256": hashlib.sha256(buffer.getvalue()).hexdigest()}
    del checkpoint["sha256"]
    torch.save(checkpoint, f"{HERE}/best.pt")
    accuracy, n, commit = find_accuracy()
    trunk_seed = load_checkpoint(checkpoint["config"]["trunk"])["config"]["seed"]
    text = TEXT.format(commit=commit, seed=checkpoint["config"]["seed"], trunk_seed=trunk_seed, n=n,
                       iter_num=checkpoint["iter_num"], loss=checkpoint["best_val_loss"],
                       torch=torch.__version__, accuracy=accuracy)
    with open(f"{HERE}/README.md", "w", encoding="utf-8") as file:
        file.write(text)
    print(text)


if __name__ == "__main__":
    run(main)
