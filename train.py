"""
Train L2D, or one of its controls, on data made by prepare_data.py.

    python train.py config/l2d_gsm8k.py                                # GPT-2 and GSM8K, one GPU
    torchrun --nproc_per_node=8 train.py                               # the same on eight
    python train.py config/demo_l2d.py --out_dir=out/mine --steps=500  # after demo.sh: two CPU cores

    --trunk_mode  --path_mode
    frozen        full, lora    L2D
    full, lora    none          the controls: finetuning of the trunk
    full, lora    full, lora    both at once

The trunk is GPT-2, or the trunk of a checkpoint of this script (finetune first, then L2D on top), or starts
from scratch. A path trained with --unroll is sampled with --solver=fixed_point --guess=mean.

Writes to out_dir: see checkpoint.py; and metrics.jsonl. What a step draws depends on (seed, step,
micro-batch) alone: a resumed run is the same run, and k ranks with one micro-batch each are the same run as
one process with k. Ctrl-C and SIGTERM finish the step, save, and end with status 130 and 143; a second one
ends at once.
"""
import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch: else threads spin at every barrier

import math
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import diffusion
from checkpoint import Log, check_same_run, load_path, load_trunk, open_out_dir, pair_from, save_run
from configurator import UserError, at_least, configure, require, without_effect
from configurator import run as run_script
from machine import StopSignals, compiles, pick_device, pick_dtype, ranks_of, use_kernels_for_training
from model import GPT, L2D, DiffusionPath, GPTConfig, PathConfig
from prepare_data import batch_of, batches_of_epoch, load_manifest, load_split


@dataclass(frozen=True)
class Config(PathConfig):
    # data and output
    data_dir: str = "data/gsm8k"    # made by prepare_data.py
    train_split: str = "train"
    val_split: str = "val"
    out_dir: str = "out/l2d_gsm8k"
    resume: bool = False            # go on from out_dir/last.pt
    # the trunk
    trunk: str = "gpt2"             # GPT-2 size, .safetensors file or directory, checkpoint, or scratch
    trunk_mode: Literal["frozen", "lora", "full"] = "frozen"
    n_layer: int = 12               # n_layer, n_head, n_embd: of a trunk from scratch
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 512           # longest example, in tokens; positions of a trunk from scratch
    # diffusion
    label_dropout: float = 0.2      # share of examples trained without their guidance label
    unroll: int = 0                 # train through Algorithm 1, with 1 to so many path calls (deviation 12)
    path_from: str = ""             # a checkpoint whose path to start from, for a later phase
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
    # evaluation and progress
    eval_every: int = 250           # steps between evaluations; each writes last.pt, the best one best.pt
    eval_examples: int = 500        # of the validation split
    log_every: int = 10
    # machine
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of autocast; auto: float32 on a CPU
    compile: Literal["auto", "on", "off"] = "auto"  # auto: on for cuda, off when unrolled
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        at_least(self, steps=1, batch_size=1, grad_accum=1, eval_every=1, eval_examples=1, log_every=1,
                 seed=0, block_size=2, warmup=0, weight_decay=0, grad_clip=0, unroll=0, min_lr=0,
                 label_dropout=0, beta1=0, beta2=0)
        require(self.out_dir, "out_dir is empty; name a folder")
        require((self.trunk_mode, self.path_mode) != ("frozen", "none"), "trunk_mode=frozen with "
                "path_mode=none trains nothing; choose a path, or lora or full for the trunk")
        require(self.trunk != "scratch" or self.trunk_mode == "full", f"trunk=scratch with trunk_mode="
                f"{self.trunk_mode} would keep its random weights; use trunk_mode=full")
        without_effect(self, "a path", self.path_mode != "none", "unroll", "path_from")
        require(self.warmup < self.steps, f"warmup={self.warmup} must be below steps={self.steps}")
        require(self.learning_rate > 0, f"learning_rate={self.learning_rate}, but it must be above 0")
        require(self.label_dropout <= 1, f"label_dropout={self.label_dropout}, but it must be at most 1")
        require(max(self.beta1, self.beta2) < 1, f"beta1={self.beta1} and beta2={self.beta2} must be below 1")
        require(self.min_lr <= self.learning_rate, f"min_lr={self.min_lr} is above learning_rate="
                f"{self.learning_rate}: the decay would be a rise; lower it")


# ------------------------------------------------------------------------------------------------ data
def load_fitting(config, split):
    """A split of the data, checked to fit block_size."""
    data = load_split(config.data_dir, split)
    longest = int(np.diff(data.offsets).max())
    if longest - 1 > config.block_size:
        raise UserError(f"error: {config.data_dir}: the longest example of {split} has {longest} tokens, but "
                        f"block_size={config.block_size}; raise it (no example is cut or dropped)")
    return data


def generator_for(device, *key):
    """A generator that depends on the key alone: every step, micro-batch and rank draws its own numbers."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(seed >> np.uint64(1)))


def draw_noise(config, model, label, n, generator):
    """What one micro-batch of n targets draws: label (B,) after dropout, t (n,), x_0 (n, D), and None; or,
    unrolled, T in place of t; or, without a path, the label alone."""
    if model.path is None:
        return label, None, None, None
    t, x_0 = diffusion.draw(n, config, generator)
    drop = torch.rand(len(label), generator=generator, device=label.device) < config.label_dropout
    label = torch.where(drop, model.no_label, label)          # per example, not per position
    if config.unroll:
        return label, None, x_0, diffusion.draw_unroll(config.unroll, generator)
    return label, t, x_0, None


# ----------------------------------------------------------------------------------------------- model
def make_model(config, manifest):
    """The pair that config asks for, on the CPU in float32, its trunk frozen."""
    if config.trunk == "scratch":
        sizes = config.n_layer, config.n_head, config.n_embd
        trunk = GPT(GPTConfig(config.block_size, manifest["n_vocab"], *sizes))
    else:
        trunk = load_trunk(config.trunk, manifest)
        for name in ("n_layer", "n_head", "n_embd"):
            asked, found = getattr(config, name), getattr(trunk.config, name)
            require(asked in (getattr(Config, name), found), f"{name}={asked}, but the trunk {config.trunk} "
                    f"has {found}; leave it out, or train one from scratch")
    require(config.block_size <= trunk.config.block_size,
            f"block_size={config.block_size} is beyond the trunk's {trunk.config.block_size} positions")
    path_config = PathConfig(**{f.name: getattr(config, f.name) for f in fields(PathConfig)})
    path = DiffusionPath(trunk, path_config, manifest["n_labels"]) if config.path_mode != "none" else None
    if path and config.path_from:
        load_path(path, config.path_from)
    return L2D(trunk, path)


class Loss(nn.Module):
    """Eq. 3 at each target, as diffusion.nll: what is compiled whole, and what DDP wraps."""
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *batch_and_noise):
        return diffusion.nll(self.model, *batch_and_noise)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def make_optimizer(model, config):
    params = trained(model)
    groups = [{"params": [p for p in params if p.dim() >= 2], "weight_decay": config.weight_decay},
              {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def learning_rate(step, config):
    """Linear warm-up to learning_rate, then linear decay to min_lr at the last step. step counts from 0."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - 1 - config.warmup)
    return config.learning_rate + (config.min_lr - config.learning_rate) * done


# ------------------------------------------------------------------------------------------ evaluation
N_BINS = 8


@torch.no_grad()
def evaluate(loss_of, data, config, ranks, autocast):
    """Mean loss per target on the first eval_examples, without labels, as in sampling by default: of the
    pair, in all and for each of N_BINS bins of t, and of the trunk. The noise is the same at every
    evaluation."""
    model, n = loss_of.model, min(config.eval_examples, len(data.labels))
    sums = torch.zeros(3, N_BINS, dtype=torch.float64, device=ranks.device)  # targets, loss, the trunk's loss
    for start in range(ranks.rank * 32, n, ranks.world * 32):
        idx, at, y, label = batch_of(data, range(start, min(start + 32, n)), ranks.device)
        generator = generator_for(ranks.device, 1, config.seed, start)
        _, t, x_0, unroll = draw_noise(config, model, label, len(y), generator)
        label = torch.full_like(label, model.no_label)
        with autocast:
            loss = trunk_loss = loss_of(idx, at, y, label, t, x_0, unroll)
            if model.path:
                trunk_logits = model.trunk.head(model.read(idx, at).h).float()
                trunk_loss = F.cross_entropy(trunk_logits, y, reduction="none")
        bins = (t * N_BINS).long() if t is not None else torch.zeros_like(y)
        sums.index_add_(1, bins, torch.stack([torch.ones_like(loss), loss, trunk_loss]).double())
    counts, losses, trunk_losses = ranks.sum(sums).tolist()
    by_t = [round(loss / count, 4) if count else None for loss, count in zip(losses, counts)]
    return {"val_loss": sum(losses) / sum(counts), "trunk_loss": sum(trunk_losses) / sum(counts),
            "val_loss_by_t": by_t if model.path and not config.unroll else None}


# ------------------------------------------------------------------------------------------------- run
@dataclass
class Run:
    """What a training run is made of, and where it stands."""
    manifest: dict
    data: tuple                     # a Split, of the training examples
    val: tuple
    model: nn.Module
    loss_of: nn.Module              # (idx, at, y, label, t, x_0, unroll) -> -log p (N,)
    ddp: nn.Module                  # the same, summing gradients over the ranks; None for one rank
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    autocast: object
    log: Log
    lock: object                    # the open file that keeps others out of out_dir
    step: int = 0
    best: float = math.inf          # lowest validation loss
    saved: int = -1                 # the step of last.pt


def set_up(config, ranks):
    """The Run, new or resumed."""
    require(config.batch_size % (ranks.world * config.grad_accum) == 0, f"batch_size={config.batch_size} "
            f"does not divide into {ranks.world} ranks x grad_accum={config.grad_accum} micro-batches")
    manifest = load_manifest(config.data_dir)
    data, val = load_fitting(config, config.train_split), load_fitting(config, config.val_split)

    with ranks.main_first():                                  # it may download, and makes out_dir
        lock_file, checkpoint = open_out_dir(config, ranks)
        torch.manual_seed(config.seed)
        model = pair_from(checkpoint, checkpoint["path"]) if checkpoint else make_model(config, manifest)
    if config.trunk_mode == "full":                           # the pair froze it
        model.trunk.requires_grad_(True)
    if config.trunk_mode == "lora" and not checkpoint:
        model.trunk.add_lora(config.lora_rank, config.lora_alpha)
    model.to(ranks.device)

    kind, dtype = ranks.device.type, pick_dtype(config.dtype, ranks.device)
    use_kernels_for_training(ranks.device, dtype)
    autocast = torch.autocast(kind, dtype) if dtype != torch.float32 else nullcontext()
    scaler = torch.amp.GradScaler(kind, enabled=dtype == torch.float16)
    optimizer = make_optimizer(model, config)

    loss_of = Loss(model)
    wanted = config.compile == "on" or config.compile == "auto" and kind == "cuda" and not config.unroll
    if wanted and compiles(ranks.device):
        loss_of.compile()                                     # in place: names stay as they are
    ddp = DistributedDataParallel(loss_of, gradient_as_bucket_view=True) if ranks.world > 1 else None

    if checkpoint:
        check_same_run(checkpoint, config, manifest, ranks)
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
    log = Log(config, ranks, checkpoint["step"] if checkpoint else 0)
    run = Run(manifest, data, val, model, loss_of, ddp, optimizer, scaler, autocast, log, lock_file)
    if checkpoint:
        run.step, run.best, run.saved = checkpoint["step"], checkpoint["best"], checkpoint["step"]
        if not os.path.exists(os.path.join(config.out_dir, "best.pt")):
            run.best = math.inf                               # the next evaluation writes it
    n_trunk, n_trained = (sum(p.numel() for p in z) for z in (model.trunk.parameters(), trained(model)))
    ranks.say(f"{len(data.labels)} examples, {steps_of_epoch(data, config)} steps an epoch; "
              f"trunk {n_trunk:,} parameters, {n_trained:,} trained; {ranks.world} x {kind}, {dtype}")
    return run


def steps_of_epoch(data, config):
    return max(1, len(data.labels) // config.batch_size)


def evaluate_and_save(run, config, ranks):
    result = evaluate(run.loss_of, run.val, config, ranks, run.autocast)
    loss = result["val_loss"]
    kept = f"{config.out_dir}/last.pt holds step {run.saved}" if run.saved >= 0 else "Nothing was written"
    require(math.isfinite(loss), f"the validation loss is {loss} at step {run.step}; lower learning_rate, or "
            f"use another dtype. {kept}")
    text = f"step {run.step}: validation loss {loss:.4f}"
    if run.model.path:
        text += f" (trunk {result['trunk_loss']:.4f})"
    if result["val_loss_by_t"]:
        text += "  by t " + " ".join("-" if x is None else f"{x:.3f}" for x in result["val_loss_by_t"])
    ranks.say(text)
    run.log(step=run.step, **result)
    better, run.best = loss < run.best, min(loss, run.best)
    save_run(run, config, ranks, better)


def report(run, config, ranks, loss_sum, norm, tokens, start):
    """A line on the terminal, and one in the log. tokens: since start, a (time, step)."""
    loss, norm, lr = ranks.sum(loss_sum).item(), norm.item(), learning_rate(run.step - 1, config)
    seconds = time.time() - start[0]
    eta = int(seconds / (run.step - start[1]) * (config.steps - run.step))
    ranks.say(f"step {run.step}/{config.steps}  loss {loss:.4f}  lr {lr:.2e}  norm {norm:.2f}  "
              f"{tokens / seconds:,.0f} target tokens/s  ETA {eta // 60}:{eta % 60:02d}")
    run.log(step=run.step, loss=loss if math.isfinite(loss) else None, lr=lr, seconds=round(seconds, 1),
            grad_norm=norm if math.isfinite(norm) else None, tokens_per_second=round(tokens / seconds))


def stop_if_bad(in_a_row, t, losses, run, config):
    """A user's error where several gradients in a row were not finite. None of these steps was taken."""
    if in_a_row < (30 if run.scaler.is_enabled() else 5):     # float16's scaler begins with a few
        return
    bad = ~losses.detach().isfinite()
    bins = sorted(set((t[bad] * N_BINS).long().tolist())) if t is not None else []
    where = "its loss" if bad.any() else "the gradient of its loss"
    at_t = " at t in " + ", ".join(f"[{b / N_BINS}, {(b + 1) / N_BINS}]" for b in bins) if bins else ""
    raise UserError(f"error: step {run.step} and the {int(in_a_row) - 1} before: {where} is not finite"
                    f"{at_t}. They changed nothing; {config.out_dir}/last.pt holds step {run.saved}. Lower "
                    "learning_rate, or use another dtype")


def train(config, ranks):
    run, device, stop = set_up(config, ranks), ranks.device, StopSignals()
    lengths, n_micro = np.diff(run.data.offsets), ranks.world * config.grad_accum
    n_targets_of = np.add.reduceat(run.data.mask, run.data.offsets[:-1], dtype=np.int64)   # of each example
    epoch, start, tokens, bad_in_a_row = None, (time.time(), run.step), 0, torch.zeros((), device=device)
    progress = tqdm(total=config.steps, initial=run.step, disable=not (ranks.main and sys.stderr.isatty()))
    if run.saved < 0:                                         # a new run
        evaluate_and_save(run, config, ranks)

    while run.step < config.steps:
        if epoch != run.step // steps_of_epoch(run.data, config):
            epoch = run.step // steps_of_epoch(run.data, config)
            order = batches_of_epoch(lengths, config.batch_size, n_micro, [config.seed, epoch])
        ids = order[run.step % len(order)]                    # (n_micro, examples of each), of all ranks
        n_targets, loss_sum = int(n_targets_of[ids].sum()), torch.zeros((), device=device)

        for micro in range(ranks.rank, n_micro, ranks.world):
            idx, at, y, label = batch_of(run.data, ids[micro], device)
            generator = generator_for(device, 0, config.seed, run.step, micro)
            label, t, x_0, unroll = draw_noise(config, run.model, label, len(y), generator)
            more = run.ddp and micro + ranks.world < n_micro  # ranks sum their gradients once a step
            with (run.ddp.no_sync() if more else nullcontext()), run.autocast:
                losses = (run.ddp or run.loss_of)(idx, at, y, label, t, x_0, unroll)       # (N,), Eq. 3
                loss = losses.sum() / n_targets               # no mean of means
            run.scaler.scale(loss * ranks.world).backward()   # DDP takes the mean over ranks, unless no_sync
            loss_sum += loss.detach()

        run.scaler.unscale_(run.optimizer)
        norm = nn.utils.clip_grad_norm_(trained(run.model), config.grad_clip or math.inf)     # of all ranks
        bad = (~norm.isfinite()).float()
        bad_in_a_row = (bad_in_a_row + bad) * bad
        if not run.scaler.is_enabled():
            run.optimizer.found_inf = bad                     # the fused AdamW skips the step where this is 1
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(run.step, config)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad(set_to_none=True)
        run.step, tokens = run.step + 1, tokens + n_targets
        progress.update()

        last, logs = run.step == config.steps, run.step % config.log_every == 0
        if logs or last or device.type == "cpu":              # to read a number from a GPU is to wait for it
            stop_if_bad(bad_in_a_row, t, losses, run, config)
        if logs or last:
            report(run, config, ranks, loss_sum, norm, tokens, start)
        stopped = stop.number                                 # ranks ask each other at every tenth step
        if ranks.world > 1:
            stopped = run.step % 10 == 0 and ranks.any(stop.number)
        if run.step % config.eval_every == 0 or last:
            evaluate_and_save(run, config, ranks)
        elif stopped:
            save_run(run, config, ranks)
        if stopped and not last:
            ranks.say(f"stopped at step {run.step}; go on with --resume")
            raise SystemExit(128 + (stop.number or 15))
    progress.close()


def main(argv=None):
    config = configure(Config, argv, __doc__)
    with ranks_of(pick_device(config.device), "raise grad_accum, or lower batch_size") as ranks:
        train(config, ranks)


if __name__ == "__main__":
    run_script(main)
