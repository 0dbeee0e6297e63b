"""
A trained pair, with all that it takes to write texts with it.
"""
import os

from plumbing.checkpoint import load_checkpoint, pair_from
from plumbing.device import pick_device, pick_dtype
from plumbing.tokenizer import load_tokenizer


def load(out_dir, which="best", device="auto", dtype="auto"):
    """
    Return (model, encoding, checkpoint): the pair on its device, its tokenizer, and the dict it came from.

    out_dir: a folder of train.py. which: "best" or "last". device, dtype: as the options of that name. Raises
    UserError where there is no checkpoint, or it cannot be read.
    """
    device = pick_device(device)
    path = os.path.join(out_dir, f"{which}.pt")
    checkpoint = load_checkpoint(path)
    encoding = load_tokenizer(checkpoint["tokenizer"])
    model = pair_from(checkpoint, path).requires_grad_(False)
    return model.to(device, pick_dtype(dtype, device)), encoding, checkpoint
