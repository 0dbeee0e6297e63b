"""
What train.py writes to out_dir, and how --resume goes on from it.

    last.pt        all that --resume needs               trunk.pt       the frozen trunk, written once
    previous.pt    the last.pt before                    metrics.jsonl  one JSON record a line
    best.pt        lowest validation loss, weights only  lock           held while a process works here
"""
import hashlib
import io
import json
import os
from dataclasses import asdict

import torch

from configurator import UserError, require
from plumbing.checkpoint import describe_trunk, load_checkpoint
from plumbing.files import append_records, lock, read_records, write_file

# options that --resume may change; also, a number of ranks may become as many micro-batches
MAY_DIFFER = {"resume", "device", "compile", "log_interval", "eval_interval", "data_dir", "out_dir",
              "gradient_accumulation_steps"}


# ------------------------------------------------------------------------------------------------ save
def save(checkpoint, path, previous=None):
    """Write a checkpoint whole or not at all. A file that is there becomes `previous`, if that is given."""
    def write(file):
        try:
            torch.save(checkpoint, file)
        except RuntimeError as e:       # torch's own, after the OSError of a full disk
            raise e.__context__ if isinstance(e.__context__, OSError) else e
    write_file(f"{path}.new", write)
    if previous and os.path.exists(path):
        os.replace(path, previous)
    os.replace(f"{path}.new", path)


def describe(model, trunk_lora, out_dir):
    """Return the part of a checkpoint that says what the model is.

    trunk_lora: [rank, alpha] or None. A frozen trunk goes to out_dir/trunk.pt, once: model.trunk_sha256 tells
    that it is there.
    """
    tensors = model.state_dict()
    trunk_sha256 = None
    if not trunk_lora and not any(p.requires_grad for p in model.trunk.parameters()):
        if not getattr(model, "trunk_sha256", None):
            buffer = io.BytesIO()
            torch.save(model.trunk.state_dict(), buffer)
            write_file(os.path.join(out_dir, "trunk.pt"), lambda file: file.write(buffer.getvalue()))
            model.trunk_sha256 = hashlib.sha256(buffer.getvalue()).hexdigest()
        tensors = {k: v for k, v in tensors.items() if not k.startswith("trunk.")}
        trunk_sha256 = model.trunk_sha256
    return {"trunk_config": describe_trunk(model.trunk), "trunk_lora": trunk_lora, "n_groups": model.no_group,
            "path_config": asdict(model.path.config) if model.path else None,
            "trunk_sha256": trunk_sha256, "model": tensors}


def save_run(run, config, ranks, better=False):
    """Write last.pt, and best.pt if this is better than all before. run: class Run of train.py."""
    saved = run.saved_iter
    run.saved_iter = run.iter_num
    if not ranks.main:
        return
    lora = [config.lora_rank, config.lora_alpha] if config.trunk_mode == "lora" else None
    checkpoint = describe(run.model, lora, config.out_dir) | {
        "config": asdict(config), "world": ranks.world, "iter_num": run.iter_num,
        "best_val_loss": run.best_val_loss, "data": run.manifest, "tokenizer": run.manifest["tokenizer"],
        "sampler": run.sampler}
    last = os.path.join(config.out_dir, "last.pt")
    try:
        if better:
            save(checkpoint, os.path.join(config.out_dir, "best.pt"))
        checkpoint |= {"optimizer": run.optimizer.state_dict(), "scaler": run.scaler.state_dict()}
        save(checkpoint, last, os.path.join(config.out_dir, "previous.pt"))
    except UserError as e:
        raise UserError(f"{e}. {last} holds iteration {saved}" if saved >= 0 else str(e)) from None


# ---------------------------------------------------------------------------------------------- resume
def open_out_dir(config, ranks):
    """Make out_dir, lock it, and see that nothing in it would be lost.

    Returns the lock, and the checkpoint to go on from, or None. Raises UserError.
    """
    last, previous = (os.path.join(config.out_dir, name) for name in ("last.pt", "previous.pt"))
    if config.resume and not (os.path.exists(last) or os.path.exists(previous)):
        raise UserError(f"nothing to resume: {last} does not exist; start without --resume")
    lock_file = lock(config.out_dir) if ranks.main else None
    for name in os.listdir(config.out_dir) if ranks.main else ():
        if name.startswith(".") and name.endswith(".tmp"):      # its writer was killed
            os.remove(os.path.join(config.out_dir, name))
    if config.resume:
        return lock_file, checkpoint_to_resume(last, previous, ranks)
    for name in ("last.pt", "previous.pt", "best.pt", "trunk.pt"):
        path = os.path.join(config.out_dir, name)
        require(not os.path.exists(path), f"{path} exists; go on with --resume, or choose another --out_dir")
    return lock_file, None


def checkpoint_to_resume(last, previous, ranks):
    """Return the checkpoint in last.pt, or where that cannot be read, in previous.pt; its file as "path"."""
    try:
        return load_checkpoint(last) | {"path": last}
    except UserError as e:
        if not os.path.exists(previous):
            raise
        checkpoint = load_checkpoint(previous) | {"path": previous}
        ranks.say(f"{e}\ngoing on from {previous}, the one before")
        # left there, it would take the name previous.pt in the next save, from the only one that can be read
        if ranks.main and os.path.exists(last):
            os.replace(last, f"{last}.damaged")
        return checkpoint


def data_changes(checkpoint, manifest, of=""):
    """Return what differs between this manifest and that of the data in the checkpoint, as texts."""
    def flat(manifest):
        return manifest | {"tokenizer": manifest["tokenizer"]["fingerprint"]}           # not all its pieces
    before = flat(checkpoint["data"])
    return [f"{k}{of} was {before.get(k)!r}, now {v!r}"
            for k, v in flat(manifest).items() if before.get(k) != v]


def check_same_run(checkpoint, config, manifest, ranks):
    """Raise UserError where --resume would be another run than the checkpoint's. It may be longer."""
    require("optimizer" in checkpoint, f"{checkpoint['path']} has no optimizer state; start without --resume")
    may_differ = set(MAY_DIFFER)
    before = checkpoint["config"]
    now = asdict(config)
    if config.max_iters > before["max_iters"]:
        ranks.say(f"max_iters was {before['max_iters']}, now {config.max_iters}: the learning rate goes on "
                  "as in a run of that length, higher than at the end of the shorter one")
        may_differ.add("max_iters")
    differ = [f"{k} was {v!r}, now {now.get(k)!r}" for k, v in before.items()
              if k not in may_differ and now.get(k) != v]
    differ += data_changes(checkpoint, manifest, " of the data")
    n_micro = before["gradient_accumulation_steps"] * checkpoint["world"]
    n_micro_now = config.gradient_accumulation_steps * ranks.world
    if n_micro != n_micro_now:
        differ.append(f"ranks x gradient_accumulation_steps were {n_micro}, now {n_micro_now}")
    require(not differ, f"{checkpoint['path']} belongs to another configuration: {'; '.join(differ)}")


class MetricsLog:
    """metrics.jsonl, written by the main rank: log(**record) adds a line.

    A new run starts the file afresh. A resumed one drops the records after iter_num, which it will repeat.
    """
    def __init__(self, config, ranks, iter_num):
        self.path = os.path.join(config.out_dir, "metrics.jsonl")
        self.main = ranks.main
        if self.main:
            before = read_records(self.path) if config.resume else []
            kept = [r for r in before if r.get("iter_num", 0) <= iter_num]
            text = "".join(json.dumps(r) + "\n" for r in kept)
            write_file(self.path, lambda file: file.write(text.encode()))

    def __call__(self, **record):
        if self.main:
            append_records(self.path, [record])
