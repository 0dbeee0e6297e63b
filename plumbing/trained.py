"""
A trained pair, with all that it takes to write texts with it.
"""
import os

from plumbing.checkpoint import load_checkpoint, pair_from
from plumbing.device import pick_device, pick_dtype
from plumbing.tokenizer import load_tokenizer

DEFAULT, DEMO = "out/l2d_gsm8k", "demo"
ABOUT_DEMO = ("a GPT with 0.7M parameters and its path. It solves small word problems like the default "
              "question, 78% of them at T = 2, and can do nothing else")


def find_model(out_dir, say=print):
    """Return the folder of the model to use: out_dir; or if it is empty, out/l2d_gsm8k or else the demo's."""
    if out_dir or os.path.exists(os.path.join(DEFAULT, "best.pt")):
        return out_dir or DEFAULT
    demo = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), DEMO)
    say(f"--- there is no {DEFAULT}, so this is the demo's model: {ABOUT_DEMO}")
    return demo


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
