"""
Save and load a run. A checkpoint is a dict of tensors and primitives, read with weights_only=True.

out_dir holds last.pt (all that --resume needs), previous.pt (the one before), best.pt (lowest validation
loss; weights only) and, where the trunk is frozen, trunk.pt: written once, and named by its hash in the
others, which then hold the path alone.
"""
import hashlib
import io
import os
import zipfile
from dataclasses import asdict, fields

import torch

from configurator import UserError, require
from files import lock, write_file
from machine import first_line, pick_device, pick_dtype
from model import GPT, L2D, DiffusionPath, GPTConfig, PathConfig
from tokens import fingerprint, load_tokenizer


def load_state(module, tensors, source):
    """load_state_dict that names all missing, unexpected and misshapen tensors at once, in one line."""
    own = module.state_dict()
    differ = [f"missing {k}" for k in own.keys() - tensors.keys()]
    differ += [f"unexpected {k}" for k in tensors.keys() - own.keys()]
    differ += [f"{k} is {tuple(tensors[k].shape)}, not {tuple(own[k].shape)}"
               for k in own.keys() & tensors.keys() if own[k].shape != tensors[k].shape]
    require(not differ, f"{source} does not fit this model: {'; '.join(sorted(differ))}; choose the settings "
            "that it was made with, or another file")
    if bad := sorted(k for k, z in tensors.items() if not z.isfinite().all()):
        raise UserError(f"{source} holds numbers that are not finite, in {', '.join(bad[:3])}; it is "
                        "damaged, or its training went wrong")
    module.load_state_dict(tensors)


def pretrained_trunk(name):
    """GPT-2's weights by hub name, file or directory, as a GPT. UserError where they cannot be had."""
    from gpt2_weights import load_gpt2
    tensors, n_head, path = load_gpt2(name)
    block_size, (vocab_size, n_embd) = tensors["wpe.weight"].shape[0], tensors["wte.weight"].shape
    n_layer = len({key.split(".")[1] for key in tensors if key.startswith("h.")})
    trunk = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd))
    load_state(trunk, tensors, path)
    return trunk


def load_trunk(name, manifest):
    """The trunk of a checkpoint (.pt), its LoRA merged in, or GPT-2's, for data with this manifest."""
    if name.endswith(".pt"):
        checkpoint = load_checkpoint(name)
        if checkpoint["tokenizer"]["fingerprint"] != manifest["fingerprint"]:
            raise UserError(f"the data has tokenizer {manifest['tokenizer']}, but the trunk {name} "
                            f"was trained with {checkpoint['tokenizer']['name']}; prepare the data for it")
        trunk = pair_from(checkpoint, name).trunk
        if checkpoint["trunk_lora"]:
            trunk.merge_lora()
    else:
        trunk = pretrained_trunk(name)
    if trunk.config.vocab_size != manifest["n_vocab"]:
        raise UserError(f"the trunk {name} has {trunk.config.vocab_size} tokens, but the data's "
                        f"tokenizer, {manifest['tokenizer']}, has {manifest['n_vocab']}; prepare it anew")
    return trunk


def make_model(config, manifest):
    """The pair that config asks for, on the CPU in float32, its trunk frozen."""
    if config.trunk == "scratch":
        sizes = config.n_layer, config.n_head, config.n_embd
        trunk = GPT(GPTConfig(config.block_size, manifest["n_vocab"], *sizes))
    else:
        trunk = load_trunk(config.trunk, manifest)
        for name in ("n_layer", "n_head", "n_embd"):
            asked, found = getattr(config, name), getattr(trunk.config, name)
            require(asked in (getattr(type(config), name), found), f"{name}={asked}, but the trunk "
                    f"{config.trunk} has {found}; leave it out, or train one from scratch")
    require(config.block_size <= trunk.config.block_size,
            f"block_size={config.block_size} is beyond the trunk's {trunk.config.block_size} positions")
    path_config = PathConfig(**{f.name: getattr(config, f.name) for f in fields(PathConfig)})
    path = DiffusionPath(trunk, path_config, manifest["n_labels"]) if config.path_mode != "none" else None
    if path and config.path_from:
        load_path(path, config.path_from, manifest["label_names"])
    return L2D(trunk, path)


def load_path(path, name, label_names):
    """The weights of the path in a checkpoint of train.py, into this path."""
    checkpoint, now = load_checkpoint(name), asdict(path.config)
    before, tensors = checkpoint["path_config"], checkpoint["model"]
    require(before, f"{name} holds a trunk without a path; --path_from needs one with a path")
    before |= {"labels": checkpoint["data"]["label_names"]}
    now |= {"labels": label_names}
    differ = [f"{k}={v}, not {now.get(k)}" for k, v in before.items() if k != "gate_init" and v != now.get(k)]
    require(not differ, f"the path in {name} was trained with {', '.join(differ)}; train on with that")
    load_state(path, {k[5:]: v for k, v in tensors.items() if k.startswith("path.")}, name)


# ------------------------------------------------------------------------------------------------ save
def save(checkpoint, path, previous=None):
    """Write whole or not at all; what was there before becomes `previous`."""
    def write(file):
        try:
            torch.save(checkpoint, file)
        except RuntimeError as e:                             # torch's own, after the OSError of a full disk
            raise e.__context__ if isinstance(e.__context__, OSError) else e
    write_file(f"{path}.new", write)
    if previous and os.path.exists(path):
        os.replace(path, previous)
    os.replace(f"{path}.new", path)


def describe(model, trunk_lora, out_dir):
    """The part of a checkpoint that says what the model is, trunk_lora = (rank, alpha) or None. A frozen
    trunk goes to out_dir/trunk.pt, once."""
    tensors, trunk_sha256 = model.state_dict(), None
    if not trunk_lora and not any(p.requires_grad for p in model.trunk.parameters()):
        path, buffer = os.path.join(out_dir, "trunk.pt"), io.BytesIO()
        if not getattr(model, "trunk_sha256", None):              # once: it cannot change
            torch.save(model.trunk.state_dict(), buffer)
            model.trunk_sha256 = hashlib.sha256(buffer.getvalue()).hexdigest()
            write_file(path, lambda file: file.write(buffer.getvalue()))
        tensors = {k: v for k, v in tensors.items() if not k.startswith("trunk.")}
        trunk_sha256 = model.trunk_sha256
    return {"trunk_config": asdict(model.trunk.config), "trunk_lora": trunk_lora, "n_labels": model.no_label,
            "path_config": asdict(model.path.config) if model.path else None,
            "trunk_sha256": trunk_sha256, "model": tensors}


def save_run(run, config, ranks, better=False):
    """Write last.pt; and best.pt, if this is better than all before. run: see train.py."""
    saved, run.saved = run.saved, run.step
    if not ranks.main:
        return
    lora = [config.lora_rank, config.lora_alpha] if config.trunk_mode == "lora" else None
    tokenizer = {"name": run.manifest["tokenizer"], "fingerprint": run.manifest["fingerprint"]}
    checkpoint = describe(run.model, lora, config.out_dir) | {
        "config": asdict(config), "world": ranks.world, "step": run.step, "best": run.best,
        "data": run.manifest, "tokenizer": tokenizer}
    best, last, previous = (os.path.join(config.out_dir, f"{name}.pt")
                            for name in ("best", "last", "previous"))
    try:
        if better:
            save(checkpoint, best)
        checkpoint |= {"optimizer": run.optimizer.state_dict(), "scaler": run.scaler.state_dict()}
        save(checkpoint, last, previous)
    except UserError as e:
        raise UserError(f"{e}. {last} holds step {saved}" if saved >= 0 else str(e)) from None


# ---------------------------------------------------------------------------------------------- resume
def open_out_dir(config, ranks):
    """Make out_dir, lock it against a second writer, and see that nothing in it would be lost. Returns the
    lock, and the checkpoint to go on from, or None."""
    last, previous = (os.path.join(config.out_dir, name) for name in ("last.pt", "previous.pt"))
    if config.resume and not (os.path.exists(last) or os.path.exists(previous)):
        raise UserError(f"nothing to resume: {last} does not exist; start without --resume")
    lock_file = lock(config.out_dir) if ranks.main else None
    for name in os.listdir(config.out_dir) if ranks.main else ():
        if name.startswith(".") and name.endswith(".tmp"):        # left by a kill while writing
            os.remove(os.path.join(config.out_dir, name))
    if not config.resume:
        for name in ("last.pt", "previous.pt", "best.pt", "trunk.pt"):
            path = os.path.join(config.out_dir, name)
            if os.path.exists(path):
                raise UserError(f"{path} exists; go on with --resume, or choose another --out_dir")
        return lock_file, None
    try:
        return lock_file, load_checkpoint(last) | {"path": last}
    except UserError as e:
        if not os.path.exists(previous):
            raise
        ranks.say(f"{e}\ngoing on from {previous}, the one before")
        return lock_file, load_checkpoint(previous) | {"path": previous}


def data_changes(checkpoint, manifest, of=""):
    """What of the data's manifest is not as it was when the checkpoint was trained on it."""
    before = checkpoint["data"]
    return [f"{k}{of} was {before.get(k)!r}, now {v!r}" for k, v in manifest.items() if before.get(k) != v]


def check_same_run(checkpoint, config, manifest, ranks):
    """Raise UserError where --resume would be another run. It may be longer, and k ranks may become k
    micro-batches."""
    require("optimizer" in checkpoint, f"{checkpoint['path']} has no optimizer state; start without --resume")
    may_differ = {"resume", "device", "compile", "log_every", "eval_every", "data_dir", "out_dir",
                  "grad_accum"}
    before, now = checkpoint["config"], asdict(config)
    if config.steps > before["steps"]:
        ranks.say(f"steps was {before['steps']}, now {config.steps}: the learning rate goes on as that of a "
                  f"run of {config.steps} steps, higher than at the end of the shorter one")
        may_differ.add("steps")
    differ = [f"{k} was {v!r}, now {now.get(k)!r}" for k, v in before.items()
              if k not in may_differ and now.get(k) != v]
    differ += data_changes(checkpoint, manifest, " of the data")
    micro = before["grad_accum"] * checkpoint["world"], config.grad_accum * ranks.world
    differ += [f"ranks x grad_accum were {micro[0]}, now {micro[1]}"] if micro[0] != micro[1] else []
    require(not differ, f"{checkpoint['path']} belongs to another configuration: {'; '.join(differ)}")


# ------------------------------------------------------------------------------------------------ load
def load_checkpoint(path):
    """What train.py saved, and its hash as "sha256". Raises UserError where it cannot be read."""
    if not os.path.exists(path):
        config = f"config/{os.path.basename(os.path.dirname(path))}.py"  # config/NAME.py writes to out/NAME
        config = config if os.path.exists(config) else "config/demo_trunk.py, or bash demo.sh"
        raise UserError(f"no checkpoint at {path}; make one first: python train.py {config}")
    checkpoint, sha256 = read(path)
    parts = {"trunk_config", "trunk_lora", "trunk_sha256", "path_config", "n_labels", "model"}
    if missing := ", ".join(sorted(parts - checkpoint.keys())):
        raise UserError(f"{path} is not a checkpoint of this train.py: it has no {missing}")
    if checkpoint["trunk_sha256"]:
        trunk_path = os.path.join(os.path.dirname(path), "trunk.pt")
        require(os.path.exists(trunk_path), f"{path} holds the path alone, and its trunk, {trunk_path}, is "
                "not there; keep both files in one folder")
        trunk, found = read(trunk_path)
        if found != checkpoint["trunk_sha256"]:
            raise UserError(f"{trunk_path} is not the trunk that {path} was trained on, or is damaged")
        checkpoint["model"] |= {f"trunk.{k}": v for k, v in trunk.items()}
    return checkpoint | {"sha256": sha256}


def read(path):
    """The dict in a file, and the sha256 of the bytes that were read."""
    try:
        with open(path, "rb") as file:
            data = file.read()
        if wrong := zipfile.ZipFile(io.BytesIO(data)).testzip():  # torch.load does not look at checksums
            raise ValueError(f"the checksum of {wrong} is wrong")
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if not isinstance(found, dict):
            raise ValueError("wrong contents")
        return found, hashlib.sha256(data).hexdigest()
    except Exception as e:                                        # torch raises anything on a damaged file
        why = str(e).splitlines()[0] if str(e) else "wrong contents"
        raise UserError(f"{path} is no checkpoint of train.py, or damaged ({type(e).__name__}: {why})")


def pair_from(checkpoint, source):
    """The L2D pair of a loaded checkpoint, on the CPU in float32, trunk frozen."""
    try:
        trunk = GPT(GPTConfig(**checkpoint["trunk_config"]))
        path_config = PathConfig(**checkpoint["path_config"]) if checkpoint["path_config"] else None
        path = DiffusionPath(trunk, path_config, checkpoint["n_labels"]) if path_config else None
        model = L2D(trunk, path)
        if checkpoint["trunk_lora"]:
            trunk.add_lora(*checkpoint["trunk_lora"])
        load_state(model, checkpoint["model"], source)
    except Exception as e:                                        # it may hold anything
        raise UserError(f"{source} was written by another version of this code, or is damaged "
                        f"({first_line(e)}); train it again") from None
    model.trunk_sha256 = checkpoint["trunk_sha256"]
    return model


def load(out_dir, which="best", device="auto", dtype="auto"):
    """The pair on its device, ready to sample, its tokenizer and its checkpoint. Raises UserError."""
    device, path = pick_device(device), os.path.join(out_dir, f"{which}.pt")
    checkpoint = load_checkpoint(path)
    if missing := ", ".join(sorted({"tokenizer", "data", "config"} - checkpoint.keys())):
        raise UserError(f"{path} has no {missing}: another version of train.py wrote it")
    name = checkpoint["tokenizer"]["name"]
    encoding = load_tokenizer(name)
    if fingerprint(encoding) != checkpoint["tokenizer"]["fingerprint"]:
        raise UserError(f"{path} was trained with another version of tokenizer {name}; train again")
    model = pair_from(checkpoint, path).requires_grad_(False)
    return model.to(device, pick_dtype(dtype, device)), encoding, checkpoint
