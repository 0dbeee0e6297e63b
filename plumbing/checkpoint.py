"""
Read what train.py saved. A checkpoint is a dict of tensors and primitives, read with weights_only=True.

Where the trunk was frozen, a checkpoint holds the path alone, and names the file trunk.pt beside it by its hash.
"""
import hashlib
import io
import os
import zipfile

import torch

from configurator import UserError, first_line, out_of_memory, require
from model import GPT, L2D, DiffusionPath, GPTConfig, PathConfig
from plumbing.device import pick_device, pick_dtype
from plumbing.tokenizer import load_tokenizer

PARTS = {"trunk_config", "trunk_lora", "trunk_sha256", "path_config", "n_groups", "model", "config", "world",
         "iter_num", "best_val_loss", "data", "tokenizer", "sampler"}


def load_state(module, tensors, source):
    """Load tensors into a module. Raises UserError that names all missing, unexpected and misshapen ones."""
    own = module.state_dict()
    differ = [f"missing {k}" for k in own.keys() - tensors.keys()]
    differ += [f"unexpected {k}" for k in tensors.keys() - own.keys()]
    differ += [f"{k} is {tuple(tensors[k].shape)}, not {tuple(own[k].shape)}"
               for k in own.keys() & tensors.keys() if own[k].shape != tensors[k].shape]
    require(not differ, f"{source} does not fit this model: {'; '.join(sorted(differ))}; choose the settings "
            "that it was made with, or another file")
    bad = sorted(k for k, z in tensors.items() if not z.isfinite().all())
    require(not bad, f"{source} holds numbers that are not finite, in {', '.join(bad[:3])}; it is damaged, or its "
            "training went wrong")
    module.load_state_dict(tensors)


def read(path):
    """Return the dict in a file, and the sha256 of its bytes. Raises UserError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            data = file.read()
        wrong = zipfile.ZipFile(io.BytesIO(data)).testzip()          # torch.load does not look at checksums
        if wrong:
            raise ValueError(f"the checksum of {wrong} is wrong")
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if not isinstance(found, dict):
            raise ValueError("wrong contents")
    except Exception as e:              # torch raises anything on a damaged file
        if out_of_memory(e):
            raise
        raise UserError(f"{path} is no checkpoint of train.py, or damaged ({type(e).__name__}: {first_line(e)})")
    return found, hashlib.sha256(data).hexdigest()


def load_checkpoint(path):
    """Return a checkpoint, with its hash as "sha256". Raises UserError where it cannot be read."""
    if not os.path.exists(path):
        config = f"config/{os.path.basename(os.path.dirname(path))}.py"  # config/NAME.py writes to out/NAME
        config = config if os.path.exists(config) else "config/demo_trunk.py, or bash demo.sh"
        raise UserError(f"no checkpoint at {path}; make one first: python train.py {config}")
    checkpoint, sha256 = read(path)
    missing = ", ".join(sorted(PARTS - checkpoint.keys()))
    require(not missing, f"{path} is not a checkpoint of this train.py: it has no {missing}")
    if checkpoint["trunk_sha256"]:
        trunk_path = os.path.join(os.path.dirname(path), "trunk.pt")
        require(os.path.exists(trunk_path), f"{path} holds the path alone, and its trunk, {trunk_path}, is "
                "not there; keep both files in one folder")
        trunk, found = read(trunk_path)
        require(found == checkpoint["trunk_sha256"],
                f"{trunk_path} is not the trunk that {path} was trained on, or is damaged")
        checkpoint["model"] |= {f"trunk.{k}": v for k, v in trunk.items()}
    return checkpoint | {"sha256": sha256}


def pair_from(checkpoint, source):
    """Return the L2D pair of a checkpoint, on the CPU in float32, its trunk frozen."""
    try:
        trunk = GPT(GPTConfig(**checkpoint["trunk_config"]))
        path = None
        if checkpoint["path_config"]:
            path = DiffusionPath(trunk, PathConfig(**checkpoint["path_config"]), checkpoint["n_groups"])
        model = L2D(trunk, path)
        if checkpoint["trunk_lora"]:
            trunk.add_lora(*checkpoint["trunk_lora"])
        load_state(model, checkpoint["model"], source)
    except Exception as e:              # it may hold anything
        if out_of_memory(e):
            raise
        raise UserError(f"{source} was written by another version of this code, or is damaged "
                        f"({type(e).__name__}: {first_line(e)})") from None
    return model


def load(out_dir, which="best", device="auto", dtype="auto"):
    """Return the pair, ready to sample on its device, its tokenizer and its checkpoint. Raises UserError."""
    device = pick_device(device)
    path = os.path.join(out_dir, f"{which}.pt")
    checkpoint = load_checkpoint(path)
    encoding = load_tokenizer(checkpoint["tokenizer"])
    model = pair_from(checkpoint, path).requires_grad_(False)
    return model.to(device, pick_dtype(dtype, device)), encoding, checkpoint
