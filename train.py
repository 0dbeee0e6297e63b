"""
Train L2D, or one of its controls, on data made by prepare_data.py.

    python train.py config/l2d_gsm8k.py                                # GPT-2 and GSM8K, one GPU
    torchrun --nproc_per_node=8 train.py                               # or, instead, eight
    python train.py config/demo_l2d.py --out_dir=out/mine --steps=500  # after demo.sh: two CPU cores

    --trunk_mode  --path_mode
    frozen        full, lora    L2D
    full, lora    none          the controls: finetuning of the trunk
    full, lora    full, lora    both at once

The trunk is GPT-2, or the trunk of a checkpoint of this script (finetune first, then L2D on top), or starts
from scratch. A path trained with --unroll is sampled with --solver=fixed_point --guess=mean.

Writes to out_dir: see checkpoint.py; and metrics.jsonl. What a step draws depends on (seed, step,
micro-batch) alone: a resumed run is the same run, and k ranks with one micro-batch each are the same run as
one process with k. Ctrl-C and SIGTERM finish the step, save, and end with status 130 or 143; a second one
ends at once.
"""
import os

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # before torch: else threads spin at every barrier

import math
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import diffusion
from batches import batch_of, batches_of_epoch, draw_noise, generator_for, load_fitting, steps_of_epoch
from checkpoint import check_same_run, make_model, open_out_dir, pair_from, save_run
from configurator import at_least, configure, require, without_effect
from configurator import run as run_script
from machine import StopSignals, compiles, pick_device, pick_dtype, ranks_of, use_kernels_for_training
from model import PathConfig
from prepare_data import Split, load_manifest
from progress import Log, report, stop_if_bad, validate


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
    trunk_mode: Literal["frozen", "lora", "full"] = "frozen"  # trains: nothing, a LoRA on it, all of it
    n_layer: int = 12               # n_layer, n_head, n_embd: of a trunk from scratch
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 512           # longest example, in tokens; positions of a trunk from scratch
    # diffusion
    label_dropout: float = 0.2      # share of examples trained without their guidance label
    unroll: int = 0                 # K: train through Algorithm 1, T = 2 to K + 1 (deviation 12); 0 = off
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
        require(self.train_split != self.val_split, f"val_split={self.val_split} is trained on")
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


# ------------------------------------------------------------------------------------------ what it learns
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


# ------------------------------------------------------------------------------------------------ the run
@dataclass
class Run:
    """What a training run is made of, and where it stands."""
    manifest: dict
    data: Split                     # the training examples
    val: Split
    model: nn.Module
    loss_of: nn.Module              # (idx, at, y, label, t, x_0, T) -> -log p (N,)
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
        scaler.load_state_dict(checkpoint["scaler"] or scaler.state_dict())
    log = Log(config, ranks, checkpoint["step"] if checkpoint else 0)
    run = Run(manifest, data, val, model, loss_of, ddp, optimizer, scaler, autocast, log, lock_file)
    if checkpoint:
        run.step, run.best, run.saved = checkpoint["step"], checkpoint["best"], checkpoint["step"]
        if not os.path.exists(os.path.join(config.out_dir, "best.pt")):
            run.best = math.inf
            ranks.say(f"note: {config.out_dir}/best.pt is missing: the next evaluation writes it")
    n_trunk, n_trained = (sum(p.numel() for p in z) for z in (model.trunk.parameters(), trained(model)))
    ranks.say(f"{len(data.labels)} examples, {steps_of_epoch(data, config)} steps an epoch; "
              f"trunk {n_trunk:,} parameters, {n_trained:,} trained; {ranks.world} x {kind}, {dtype}")
    return run


def evaluate_and_save(run, config, ranks):
    loss = validate(run, config, ranks)
    better, run.best = loss < run.best, min(loss, run.best)
    save_run(run, config, ranks, better)


def train(config, ranks):
    # batches.py draws, diffusion.nll is the loss, progress.py watches, checkpoint.py saves
    run, device, stop = set_up(config, ranks), ranks.device, StopSignals()
    lengths, n_micro = np.diff(run.data.offsets), ranks.world * config.grad_accum
    n_targets_of = np.add.reduceat(run.data.mask, run.data.offsets[:-1], dtype=np.int64)   # of each example
    epoch, start, tokens = None, (time.time(), run.step), 0
    bad_in_a_row = torch.zeros((), device=device)             # steps whose gradient was not finite
    progress = tqdm(total=config.steps, initial=run.step, disable=not (ranks.main and sys.stderr.isatty()))
    if run.saved < 0 or run.step >= config.steps and run.best == math.inf:  # a new run, or its best is lost
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
            label, t, x_0, T = draw_noise(config, run.model, label, len(y), generator)
            more = run.ddp and micro + ranks.world < n_micro  # ranks sum their gradients once a step
            with (run.ddp.no_sync() if more else nullcontext()), run.autocast:
                losses = (run.ddp or run.loss_of)(idx, at, y, label, t, x_0, T)       # (N,), Eq. 3
                loss = losses.sum() / n_targets               # deviation 9: no mean of means
            run.scaler.scale(loss * ranks.world).backward()   # DDP averages over ranks: times world, the sum
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
