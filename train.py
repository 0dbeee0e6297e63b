"""
Train L2D, or one of its controls, on data made by prepare_data.py.

    python train.py config/l2d_gsm8k.py                                # GPT-2 and GSM8K, one GPU
    torchrun --nproc_per_node=8 train.py                               # the same on eight
    python train.py config/demo_l2d.py --out_dir=out/mine --steps=500  # two CPU cores, no network

trunk_mode x path_mode: frozen + full or lora is L2D; lora or full + none are the controls; lora or full with a
path trains both at once. A trunk comes from GPT-2's weights, from a checkpoint of this script (its trunk alone,
its LoRA merged in: finetune first, then L2D on top), or from scratch.

Writes to out_dir: last.pt (everything --resume needs), best.pt (lowest loss on the validation split; weights only)
and metrics.jsonl. What a step draws depends on (seed, step, micro-batch) alone, so a resumed run is the same run,
and k ranks with one micro-batch each are the same run as one process with k micro-batches.
"""
import json
import math
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import diffusion
from configurator import UserError, configure
from model import (GPT, GPT2_SIZES, GPTConfig, PathConfig, build, describe, load_checkpoint, model_from_checkpoint)
from prepare_data import load_manifest, load_split


@dataclass(frozen=True)
class Config:
    # data and output
    data_dir: str = "data/gsm8k"    # made by prepare_data.py
    train_split: str = "train"
    val_split: str = "val"
    out_dir: str = "out/l2d_gsm8k"
    resume: bool = False            # go on from out_dir/last.pt
    # model
    trunk: str = "gpt2"             # a GPT-2 size, a .safetensors file or its directory, a checkpoint (.pt), or scratch
    trunk_mode: Literal["frozen", "lora", "full"] = "frozen"
    path_mode: Literal["none", "lora", "full"] = "full"
    lora_rank: int = 32             # of the trunk's and the path's LoRA
    lora_alpha: float = 32.0
    n_layer: int = 12               # n_layer, n_head, n_embd: of a trunk from scratch
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 512           # longest example in tokens; of a trunk from scratch, its number of positions
    # diffusion
    x_dim: int = 256                # D, size of the token space
    t_dim: int = 256                # width of the time embedding
    sigma: float = 64.0             # standard deviation of the noise
    input_scale: Literal["wiener", "unit"] = "wiener"  # how x_t enters the path; unit is the paper's
    time_scale: float = 1000.0      # factor on t before its sinusoidal features; the official code has 1
    gate_init: float = 0.0          # residual gates of the path at the start
    stratified: bool = True         # draw t from equal bins over the micro-batch
    own_guess: float = 0.0          # share of positions whose x_t is built from the model's own guess
    label_dropout: float = 0.2      # share of examples trained without their guidance label
    # optimisation
    steps: int = 3000               # optimizer steps
    batch_size: int = 32            # examples per optimizer step, over all ranks
    grad_accum: int = 1             # micro-batches per rank and step
    learning_rate: float = 1e-4
    min_lr: float = 1e-6
    warmup: int = 100               # steps of linear warm-up; then linear decay to min_lr
    weight_decay: float = 0.01      # on matrices
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0          # 0 = off
    overfit: bool = False           # train and evaluate on one and the same batch
    # evaluation and progress
    eval_every: int = 250           # steps between evaluations; each writes last.pt, and best.pt if it is the best
    eval_examples: int = 500        # of the validation split
    log_every: int = 10
    # machine
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of autocast; auto: bfloat16 on cuda, float32 on cpu
    compile: Literal["auto", "on", "off"] = "auto"  # auto: on for cuda
    seed: int = 0

    def __post_init__(self):
        at_least = dict(steps=1, batch_size=1, grad_accum=1, eval_every=1, eval_examples=1, log_every=1, block_size=2,
                        lora_rank=1, x_dim=1, t_dim=2, warmup=0, weight_decay=0, grad_clip=0, own_guess=0, label_dropout=0)
        for name, low in at_least.items():
            if getattr(self, name) < low:
                raise UserError(f"error: {name}={getattr(self, name)}, but it must be at least {low}")
        if self.trunk_mode == "frozen" and self.path_mode == "none":
            raise UserError("error: trunk_mode=frozen with path_mode=none trains nothing; choose a path, or lora or full for the trunk")
        if self.trunk == "scratch" and self.trunk_mode == "lora":
            raise UserError("error: trunk=scratch with trunk_mode=lora would train a LoRA on random weights; use trunk_mode=full")
        if self.warmup >= self.steps:
            raise UserError(f"error: warmup={self.warmup} steps is not shorter than the training, steps={self.steps}")
        if self.sigma <= 0 or self.learning_rate <= 0:
            raise UserError(f"error: sigma={self.sigma} and learning_rate={self.learning_rate} must be above 0")
        if self.t_dim % 2:
            raise UserError(f"error: t_dim={self.t_dim} must be even: half of it cosines, half sines")


# ------------------------------------------------------------------------------------------------- machine
class Ranks:
    """Where this process stands among those torchrun started; one process alone is rank 0 of 1."""
    def __init__(self, config):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        want = config.device
        if want == "cuda" and not torch.cuda.is_available():
            raise UserError("error: --device=cuda, but this machine (or this build of torch) has no CUDA; use --device=cpu")
        kind = "cuda" if want != "cpu" and torch.cuda.is_available() else "cpu"
        self.device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device("cpu")
        if kind == "cuda":
            torch.cuda.set_device(self.device)
        if config.batch_size % (self.world * config.grad_accum):
            raise UserError(f"error: batch_size={config.batch_size} does not divide into {self.world} ranks x "
                            f"grad_accum={config.grad_accum} micro-batches")
        if self.world > 1:
            dist.init_process_group("nccl" if kind == "cuda" else "gloo")

    @property
    def main(self):
        return self.rank == 0

    def sum(self, tensor):
        """The sum of tensor over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_grads(self, params):
        """Data parallel in one all-reduce of one flat vector. Each rank's loss is already divided by the global
        number of target tokens, so gradients are summed: no mean of means."""
        if self.world > 1:
            flat = self.sum(torch.cat([p.grad.flatten() for p in params]))
            for p, grad in zip(params, flat.split([p.numel() for p in params])):
                p.grad.copy_(grad.view_as(p))


# ---------------------------------------------------------------------------------------------------- data
def load(config, split, manifest):
    data = load_split(config.data_dir, split)
    longest = int(np.diff(data.offsets).max())
    if longest - 1 > config.block_size:
        raise UserError(f"error: {config.data_dir}: the longest example of {split} has {longest} tokens, but block_size="
                        f"{config.block_size}; raise it (no example is cut or dropped)")
    return data


def batch_of(data, ids, device):
    """The examples ids, one per row, right-padded: idx (B, T), targets (B, T) the next token or -1, label (B,)."""
    length = max(data.offsets[i + 1] - data.offsets[i] for i in ids) - 1
    idx = torch.zeros(len(ids), length, dtype=torch.long)
    targets = torch.full((len(ids), length), -1)
    for row, i in enumerate(ids):
        tokens = torch.from_numpy(data.tokens[data.offsets[i]:data.offsets[i + 1]].astype(np.int64))
        counts = torch.from_numpy(data.mask[data.offsets[i]:data.offsets[i + 1]])
        idx[row, :len(tokens) - 1] = tokens[:-1]
        targets[row, :len(tokens) - 1] = torch.where(counts[1:], tokens[1:], -1)
    label = torch.from_numpy(data.labels[list(ids)].astype(np.int64))
    return idx.to(device), targets.to(device), label.to(device)


def batches_of_epoch(lengths, batch_size, seed):
    """The batches of one epoch, (n, batch_size) example ids: shuffled, then sorted by length within chunks of 50
    batches, so that a batch holds similar lengths and little padding. The rest that fills no batch waits for
    another epoch's shuffle; data smaller than a batch is repeated to fill one."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths))
    if len(order) < batch_size:
        order = np.resize(order, batch_size)
    order = order[:len(order) // batch_size * batch_size]
    chunks = np.split(order, range(50 * batch_size, len(order), 50 * batch_size))
    order = np.concatenate([chunk[np.argsort(lengths[chunk], kind="stable")] for chunk in chunks])
    return rng.permutation(order.reshape(-1, batch_size))


# --------------------------------------------------------------------------------------------------- model
def make_model(config, manifest):
    """The pair that config asks for, on the CPU in float32, with the right parameters frozen."""
    if config.trunk == "scratch":
        trunk = GPT(GPTConfig(config.block_size, manifest["n_vocab"], config.n_layer, config.n_head, config.n_embd))
    elif config.trunk.endswith(".pt"):
        checkpoint = load_checkpoint(config.trunk)
        if checkpoint["tokenizer"]["fingerprint"] != manifest["fingerprint"]:
            raise UserError(f"error: {config.data_dir} was made with tokenizer {manifest['tokenizer']}, but the trunk {config.trunk} "
                            f"was trained with {checkpoint['tokenizer']['name']}; prepare the data for this trunk")
        trunk = model_from_checkpoint(checkpoint, config.trunk).trunk
        if checkpoint["trunk_lora"]:
            trunk.merge_lora()
    else:
        trunk = GPT.from_pretrained(config.trunk)
    if trunk.config.vocab_size != manifest["n_vocab"]:
        raise UserError(f"error: the trunk has {trunk.config.vocab_size} tokens, but the tokenizer of {config.data_dir} "
                        f"({manifest['tokenizer']}) has {manifest['n_vocab']}; prepare the data for this trunk")
    if trunk.config.block_size < config.block_size:
        raise UserError(f"error: block_size={config.block_size} is beyond the trunk's {trunk.config.block_size} positions")
    trunk.requires_grad_(config.trunk_mode == "full")
    lora = (config.lora_rank, config.lora_alpha) if config.trunk_mode == "lora" else None
    if config.path_mode == "none":
        return build(trunk, None, lora)
    path_config = PathConfig(config.path_mode, config.x_dim, config.t_dim, config.sigma, config.input_scale, config.time_scale,
                             config.gate_init, manifest["n_labels"], config.lora_rank, config.lora_alpha)
    return build(trunk, path_config, lora)


def make_optimizer(model, config):
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in params if p.dim() >= 2], "weight_decay": config.weight_decay},
              {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def learning_rate(step, config):
    """Linear warm-up to learning_rate, then linear decay to min_lr at the last step. step counts from 0."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - 1 - config.warmup)
    return config.learning_rate + (config.min_lr - config.learning_rate) * done


def generator_for(device, *key):
    """A generator that depends on the key alone: every step, micro-batch and rank draws its own numbers."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(seed >> np.uint64(1)))


def draw(config, model, targets, label, generator):
    """What one micro-batch draws: labels after dropout (B,), t (N,), x_0 (N, D), own_guess (N,) or None."""
    if model.path is None:
        return label, None, None, None
    n, device = int((targets >= 0).sum()), targets.device
    t, x_0 = diffusion.draw(n, model.path.config, generator, config.stratified)
    drop = torch.rand(len(label), generator=generator, device=device) < config.label_dropout
    label = torch.where(drop, model.path.config.n_labels, label)              # per example, not per position
    own_guess = None
    if config.own_guess:
        own_guess = torch.rand(n, generator=generator, device=device)
        own_guess = own_guess * (torch.rand(n, generator=generator, device=device) < config.own_guess)
    return label, t, x_0, own_guess


# ---------------------------------------------------------------------------------------------- evaluation
N_BINS = 8


@torch.no_grad()
def evaluate(model, data, ids, config, ranks, autocast):
    """Teacher-forced loss on the examples ids: of the trunk, of the pair, and of the pair for each of N_BINS bins
    of t. The noise is the same at every evaluation. Without a path the trunk's loss is the loss."""
    sums = torch.zeros(2, N_BINS + 2, dtype=torch.float64, device=ranks.device)  # sums and counts: bins, all, trunk
    trunk_only = type(model)(model.trunk)
    for start in range(ranks.rank * 32, len(ids), ranks.world * 32):
        idx, targets, label = batch_of(data, ids[start:start + 32], ranks.device)
        _, t, x_0, _ = draw(config, model, targets, label, generator_for(ranks.device, 1, config.seed, start))
        with autocast:
            trunk_loss = diffusion.nll(trunk_only, idx, targets, label)
            loss = diffusion.nll(model, idx, targets, label, t, x_0) if model.path else trunk_loss
        sums[0, -1] += trunk_loss.sum()
        sums[0, -2] += loss.sum()
        sums[1, -2:] += len(loss)
        if model.path:
            bins = (t * N_BINS).long()
            sums[0].index_add_(0, bins, loss.double())
            sums[1].index_add_(0, bins, torch.ones_like(loss).double())
    mean = (ranks.sum(sums)[0] / sums[1]).tolist()
    result = {"val_loss": mean[-2], "trunk_loss": mean[-1]}
    return result | ({"val_loss_by_t": [round(x, 4) for x in mean[:N_BINS]]} if model.path else {})


# -------------------------------------------------------------------------------------------------- saving
def save(checkpoint, path):
    """Write whole or not at all: a kill while writing leaves the old file."""
    torch.save(checkpoint, path + ".part")
    os.replace(path + ".part", path)


def open_out_dir(config):
    """Make out_dir, check that it can be written, and that nothing in it would be lost."""
    last = os.path.join(config.out_dir, "last.pt")
    try:
        os.makedirs(config.out_dir, exist_ok=True)
        with open(os.path.join(config.out_dir, "metrics.jsonl"), "a"):
            pass
    except OSError as e:
        raise UserError(f"error: cannot write to out_dir={config.out_dir}: {e.strerror}; choose another --out_dir")
    if os.path.exists(last) and not config.resume:
        raise UserError(f"error: {last} exists; go on with --resume, or choose another --out_dir")
    if config.resume and not os.path.exists(last):
        raise UserError(f"error: nothing to resume: {last} does not exist; start without --resume")
    return last


def resume(last, config, model, optimizer, scaler):
    """Load last.pt into model, optimizer and scaler; return the step to go on with and the best loss so far."""
    checkpoint = load_checkpoint(last)
    may_differ = {"resume", "device", "compile", "log_every", "eval_every", "data_dir", "out_dir", "trunk"}
    differ = [f"{k} was {v!r}, now {asdict(config)[k]!r}" for k, v in checkpoint["config"].items()
              if k not in may_differ and asdict(config).get(k) != v]
    if differ:
        raise UserError(f"error: {last} belongs to another configuration: {'; '.join(differ)}")
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    scaler.load_state_dict(checkpoint["scaler"])
    metrics = os.path.join(config.out_dir, "metrics.jsonl")                   # drop what is about to be repeated
    with open(metrics) as file:
        kept = [line for line in file if line.endswith("\n") and json.loads(line)["step"] <= checkpoint["step"]]
    with open(metrics + ".part", "w") as file:
        file.writelines(kept)
    os.replace(metrics + ".part", metrics)
    return checkpoint["step"], checkpoint["best"]


# ---------------------------------------------------------------------------------------------------- main
def main(argv=None):
    config = configure(Config, argv, __doc__)
    ranks = Ranks(config)
    device = ranks.device
    last = open_out_dir(config) if ranks.main else os.path.join(config.out_dir, "last.pt")
    manifest = load_manifest(config.data_dir)
    train, val = load(config, config.train_split, manifest), load(config, config.val_split, manifest)
    lengths = np.diff(train.offsets)

    torch.manual_seed(config.seed)                                            # the same initial weights on every rank
    model = make_model(config, manifest).to(device)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(model, config)
    dtype = config.dtype if config.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    autocast = torch.autocast(device.type, getattr(torch, dtype)) if dtype != "float32" else nullcontext()
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")
    step, best = resume(last, config, model, optimizer, scaler) if config.resume else (0, math.inf)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    if config.compile == "on" or config.compile == "auto" and device.type == "cuda":
        model.compile()                                                       # in place: names stay as they are
        model.trunk.compile()

    def say(text):
        if ranks.main:
            tqdm.write(text)

    def report(record):
        if ranks.main:
            with open(os.path.join(config.out_dir, "metrics.jsonl"), "a") as file:
                file.write(json.dumps(record) + "\n")

    def batches(epoch):
        return batches_of_epoch(lengths, config.batch_size, [config.seed, epoch])

    per_epoch = len(batches(0))
    overfit_ids = batches(0)[0] if config.overfit else None
    eval_data, eval_ids = (train, overfit_ids) if config.overfit else (val, range(min(config.eval_examples, len(val.labels))))
    n_trunk, n_trained = sum(p.numel() for p in model.trunk.parameters()), sum(p.numel() for p in params)
    say(f"{len(train.labels)} examples, {per_epoch} steps an epoch; trunk {n_trunk:,} parameters, {n_trained:,} trained; "
        f"{ranks.world} x {device.type}, {dtype}")

    checkpoint = lambda: describe(model, [config.lora_rank, config.lora_alpha] if config.trunk_mode == "lora" else None) | {
        "config": asdict(config), "step": step, "best": best, "data": manifest,
        "tokenizer": {"name": manifest["tokenizer"], "fingerprint": manifest["fingerprint"]}}

    def evaluate_and_save():
        nonlocal best
        result = evaluate(model, eval_data, eval_ids, config, ranks, autocast)
        by_t = "  by t " + " ".join(f"{x:.3f}" for x in result.get("val_loss_by_t", []))
        say(f"step {step}: validation loss {result['val_loss']:.4f}" + (f" (trunk {result['trunk_loss']:.4f}){by_t}" if model.path else ""))
        report({"step": step} | result)
        better, best = result["val_loss"] < best, min(best, result["val_loss"])
        if ranks.main:
            save(checkpoint() | {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}, last)
            if better:
                save(checkpoint(), os.path.join(config.out_dir, "best.pt"))

    progress = tqdm(total=config.steps, initial=step, unit="step", disable=not (ranks.main and sys.stderr.isatty()))
    if step == 0:
        evaluate_and_save()
    epoch, order = -1, None
    tokens, start, first = 0, time.time(), step
    # CPU: the backward of fused attention in bfloat16 is many times slower than that of plain matmuls (DESIGN 9)
    kernels = [SDPBackend.MATH] if device.type == "cpu" else list(SDPBackend.__members__.values())

    while step < config.steps:
        if epoch != step // per_epoch:
            epoch = step // per_epoch
            order = batches(epoch)
        ids = overfit_ids if config.overfit else order[step % per_epoch]
        n_targets = sum(int(train.mask[train.offsets[i] + 1:train.offsets[i + 1]].sum()) for i in ids)   # of all ranks
        micro_batches = np.array_split(ids, ranks.world * config.grad_accum)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)

        loss_sum = torch.zeros((), device=device)
        for micro in range(ranks.rank, len(micro_batches), ranks.world):
            idx, targets, label = batch_of(train, micro_batches[micro], device)
            label, t, x_0, own_guess = draw(config, model, targets, label, generator_for(device, 0, config.seed, step, micro))
            with autocast, sdpa_kernel(kernels):
                loss = diffusion.nll(model, idx, targets, label, t, x_0, own_guess).sum() / n_targets
            scaler.scale(loss).backward()
            loss_sum += loss.detach()
        ranks.sum_grads(params)
        ranks.sum(loss_sum)
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(params, config.grad_clip or math.inf)
        if not math.isfinite(loss_sum.item()):
            raise UserError(f"error: the loss is {loss_sum.item()} at step {step}; lower learning_rate, or use another dtype. "
                            f"{last} has the last evaluated state")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        step += 1
        tokens += n_targets
        progress.update()
        if step % config.log_every == 0 or step == config.steps:
            seconds = time.time() - start
            eta = seconds / (step - first) * (config.steps - step)
            say(f"step {step}/{config.steps}  loss {loss_sum.item():.4f}  lr {learning_rate(step - 1, config):.2e}  norm {norm:.2f}  "
                f"{tokens / seconds:,.0f} target tokens/s  ETA {int(eta) // 60}:{int(eta) % 60:02d}")
            report({"step": step, "loss": loss_sum.item(), "lr": learning_rate(step - 1, config), "grad_norm": float(norm),
                    "seconds": round(seconds, 1), "tokens_per_second": round(tokens / seconds)})
        if step % config.eval_every == 0 or step == config.steps:
            evaluate_and_save()
    progress.close()
    if ranks.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
