"""
Read a checkpoint: a dict of tensors and primitives, which train.py saved.

Where the trunk was frozen, the file holds the path alone. The file trunk.pt beside it holds the trunk.
"""
import hashlib
import io
import os
import zipfile
from dataclasses import asdict

import torch

from configurator import UserError, first_line, out_of_memory, require
from model import GPT, L2D, DiffusionPath, GPTConfig, PathConfig

PARTS = {"trunk_config", "trunk_lora", "trunk_sha256", "path_config", "n_groups", "model", "config", "world",
         "iter_num", "best_val_loss", "data", "tokenizer", "sampler"}


def families():
    """Return {name in a checkpoint: (class, class of its config)} of every kind of trunk."""
    from llama import Llama, LlamaConfig  # here: GPT-2 needs none of it

    return {"gpt2": (GPT, GPTConfig), "llama": (Llama, LlamaConfig)}


def describe_trunk(trunk):
    """Return what make_trunk needs to build a trunk like this one, a dict."""
    family = next(name for name, (kind, _) in families().items() if type(trunk) is kind)
    return {"family": family} | asdict(trunk.config)


def make_trunk(description):
    """Return the trunk that was described, with random weights. Without a family it is a GPT-2."""
    options = dict(description)
    trunk_class, config_class = families()[options.pop("family", "gpt2")]
    return trunk_class(config_class(**options))


def load_state(module, tensors, source):
    """Load tensors into a module. Raises UserError, which names all that are missing or do not fit."""
    own = module.state_dict()
    differ = [f"missing {k}" for k in own.keys() - tensors.keys()]
    differ += [f"unexpected {k}" for k in tensors.keys() - own.keys()]
    differ += [f"{k} is {tuple(tensors[k].shape)}, not {tuple(own[k].shape)}"
               for k in own.keys() & tensors.keys() if own[k].shape != tensors[k].shape]
    require(not differ, f"{source} does not fit this model: {'; '.join(sorted(differ))}; choose the settings "
            "that it was made with, or another file")
    bad = sorted(k for k, z in tensors.items() if not z.isfinite().all())
    require(not bad, f"{source} holds numbers that are not finite, in {', '.join(bad[:3])}; it is damaged, "
            "or its training went wrong")
    module.load_state_dict(tensors)


def read(path):
    """Return the dict in a file, and the sha256 of its bytes. Raises UserError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            data = file.read()
        wrong = zipfile.ZipFile(io.BytesIO(data)).testzip()     # torch.load does not look at checksums
        if wrong:
            raise ValueError(f"the checksum of {wrong} is wrong")
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}")
    except Exception as e:              # torch raises anything on a damaged file
        if out_of_memory(e):
            raise
        raise UserError(f"{path} is no checkpoint of train.py, or damaged "
                        f"({type(e).__name__}: {first_line(e)})") from None
    return found, hashlib.sha256(data).hexdigest()


def load_checkpoint(path):
    """Return a checkpoint, with its hash as "sha256". Raises UserError where it cannot be read."""
    folder, name = os.path.split(path)
    if not os.path.exists(path):
        others = [other for other in ("best.pt", "last.pt") if os.path.exists(os.path.join(folder, other))]
        require(not others, f"no checkpoint at {path}; the one in this folder is {' and '.join(others)}")
        config = f"config/{os.path.basename(folder)}.py"        # config/NAME.py writes to out/NAME
        config = config if os.path.exists(config) else "config/demo_trunk.py, or bash demo.sh"
        raise UserError(f"no checkpoint at {path}; make one first: python train.py {config}")
    checkpoint, sha256 = read(path)
    missing = ", ".join(sorted(PARTS - checkpoint.keys()))
    require(not missing, f"{path} is not a checkpoint of this train.py: it has no {missing}; name the "
            "best.pt or last.pt of a run")
    if checkpoint["trunk_sha256"]:
        trunk_path = os.path.join(folder, "trunk.pt")
        require(os.path.exists(trunk_path), f"{path} holds the path alone, and its trunk, {trunk_path}, is "
                "not there; keep both files in one folder")
        trunk, found = read(trunk_path)
        require(found == checkpoint["trunk_sha256"],
                f"{trunk_path} is not the trunk that {path} was trained on, or is damaged")
        checkpoint["model"] |= {f"trunk.{k}": v for k, v in trunk.items()}
    return checkpoint | {"sha256": sha256}


def pair_from(checkpoint, source):
    """Return the L2D pair of a checkpoint, on the CPU in float32, its trunk frozen.

    source: where it came from, for the message of a UserError.
    """
    try:
        trunk = make_trunk(checkpoint["trunk_config"])
        path = None
        if checkpoint["path_config"]:
            path = DiffusionPath(trunk, PathConfig(**checkpoint["path_config"]), checkpoint["n_groups"])
        model = L2D(trunk, path)
        if checkpoint["trunk_lora"]:
            trunk.add_lora(*checkpoint["trunk_lora"])
        load_state(model, checkpoint["model"], source)
        model.trunk_sha256 = checkpoint["trunk_sha256"]         # a resumed run leaves its trunk.pt as it is
    except Exception as e:              # it may hold anything
        if out_of_memory(e):
            raise
        raise UserError(f"{source} was written by another version of this code, or is damaged "
                        f"({type(e).__name__}: {first_line(e)})") from None
    return model
