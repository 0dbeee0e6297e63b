"""
Train L2D, or one of its controls, on data that prepare_data.py has made.

    python train.py config/l2d_gsm8k.py                                    # GPT-2 and GSM8K, one GPU
    torchrun --nproc_per_node=8 train.py                                   # or, instead, eight GPUs
    python train.py config/demo_l2d.py --out_dir=out/mine --max_iters=500  # two CPU cores, after demo.sh

What trains is chosen by two options:

    --trunk_mode  --path_mode
    frozen        full or lora  L2D
    full or lora  none          a control: the trunk is finetuned, without a path
    full or lora  full or lora  both at once

The trunk is GPT-2, a model of Llama's type (a folder from Hugging Face, a .gguf file, or a name such as
SmolLM2-135M), the trunk of a checkpoint of this script, or it starts from random weights.

out_dir receives the checkpoints last.pt and best.pt, and metrics.jsonl. What an iteration draws depends only
on the seed, the iteration and the micro-batch. So a resumed run is the same run. And eight ranks with one
micro-batch each are the same run as one process with --gradient_accumulation_steps=8.

Ctrl-C and SIGTERM finish the iteration, save, and end with status 130 or 143. A second one ends at once.
"""
import os

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # before torch: idle threads wait less busily for the others

import math
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import diffusion
from configurator import at_least, configure, require, without_effect
from configurator import run as run_script
from model import GPT, L2D, DiffusionPath, GPTConfig, PathConfig
from plumbing.checkpoint import pair_from
from plumbing.dataset import (
    Split,
    count_targets,
    iterate_batches,
    iters_per_epoch,
    load_batch,
    load_manifest,
    load_split,
)
from plumbing.device import pick_device, pick_dtype
from plumbing.kernels import compile_blocks, compiles, use_kernels_for_training
from plumbing.ranks import StopSignals, ranks_of
from plumbing.run_folder import MetricsLog, check_same_run, open_out_dir, save_run
from plumbing.stepping import Stepper
from plumbing.trunks import load_trunk

N_BINS = 8                          # of t, in which the validation loss is reported


@dataclass(frozen=True)
class Config(PathConfig):           # `--help` prints the comments of this class
    # data and output
    data_dir: str = "data/gsm8k"    # made by prepare_data.py
    train_split: str = "train"
    val_split: str = "val"
    out_dir: str = "out/l2d_gsm8k"
    resume: bool = False            # go on from out_dir/last.pt
    # the trunk
    trunk: str = "gpt2"             # a size of GPT-2, a model like SmolLM2-135M, a folder, a file, or scratch
    trunk_mode: Literal["frozen", "lora", "full"] = "frozen"  # what of the trunk trains: nothing, LoRAs, all
    trunk_dtype: Literal["float32", "bfloat16"] = "float32"  # of a frozen trunk's weights
    n_layer: int = 12               # n_layer, n_head and n_embd: of a trunk from scratch
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 512           # tokens of the longest example; positions of a trunk from scratch
    # diffusion
    group_dropout: float = 0.2      # share of the examples that train without their guidance group
    unroll: int = 0                 # K: train through Algorithm 1, 1 to K path calls; 0: x_t from the truth
    # optimisation
    max_iters: int = 3000           # optimizer steps
    batch_size: int = 32            # examples of an optimizer step, over all ranks and micro-batches
    gradient_accumulation_steps: int = 1  # micro-batches of a rank, which batch_size is divided into
    learning_rate: float = 1e-4
    min_lr: float = 1e-6
    warmup_iters: int = 100         # linear warm-up; then linear decay to min_lr
    weight_decay: float = 0.01      # of matrices
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0          # 0: off
    # validation and progress
    eval_interval: int = 250        # iterations between validations; last.pt is saved, best.pt if better
    eval_examples: int = 500        # examples of the validation split
    log_interval: int = 10
    # machine
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of autocast; auto: float32 on a CPU
    compile: Literal["auto", "on", "off"] = "auto"  # auto: on for CUDA
    seed: int = 0
    hints: ClassVar = dict.fromkeys(vars(diffusion.SamplerConfig()), "it is an option of sample.py") | {
        "steps": "in train.py the number of optimizer steps is --max_iters. --steps is T, of sample.py",
        "T": "T is --steps, of sample.py and evaluate.py; training does not need it",
        "solver": "training does not use a solver; choose it in sample.py and evaluate.py",
    }

    def __post_init__(self):
        super().__post_init__()
        at_least(self, max_iters=1, batch_size=1, gradient_accumulation_steps=1, eval_interval=1,
                 eval_examples=1, log_interval=1, seed=0, block_size=2, warmup_iters=0, weight_decay=0,
                 grad_clip=0, unroll=0, min_lr=0, group_dropout=0, beta1=0, beta2=0)
        require(self.out_dir, "out_dir is empty; name a folder")
        require(self.train_split != self.val_split, f"val_split={self.val_split} is trained on")
        require((self.trunk_mode, self.path_mode) != ("frozen", "none"), "trunk_mode=frozen with "
                "path_mode=none trains nothing; choose a path, or lora or full for the trunk")
        require(self.trunk != "scratch" or self.trunk_mode == "full", f"trunk=scratch with trunk_mode="
                f"{self.trunk_mode} would keep its random weights; use trunk_mode=full")
        require(self.trunk_dtype == "float32" or self.trunk_mode == "frozen", "trunk_dtype=bfloat16 with "
                f"trunk_mode={self.trunk_mode} would train weights in half precision; use float32")
        without_effect(self, "a path", self.path_mode != "none", "unroll")
        without_effect(self, "trunk=scratch", self.trunk == "scratch", "n_layer", "n_head", "n_embd")
        require(self.warmup_iters < self.max_iters,
                f"warmup_iters={self.warmup_iters} must be below max_iters={self.max_iters}")
        require(self.learning_rate > 0, f"learning_rate={self.learning_rate}, but it must be above 0")
        require(self.group_dropout <= 1, f"group_dropout={self.group_dropout}, but it must be at most 1")
        require(max(self.beta1, self.beta2) < 1, f"beta1={self.beta1} and beta2={self.beta2} must be below 1")
        require(self.min_lr <= self.learning_rate, f"min_lr={self.min_lr} is above learning_rate="
                f"{self.learning_rate}: the decay would be a rise; lower it")


# ------------------------------------------------------------------------------------------ what is trained
def make_model(config, manifest):
    """The pair that the options ask for, on the CPU in float32. Raises UserError where they do not fit."""
    if config.trunk == "scratch":
        sizes = config.n_layer, config.n_head, config.n_embd
        trunk = GPT(GPTConfig(config.block_size, manifest["n_vocab"], *sizes))
    else:
        trunk = load_trunk(config.trunk, manifest)
    require(config.block_size <= trunk.config.block_size,
            f"block_size={config.block_size} is beyond the trunk's {trunk.config.block_size} positions")
    path = None
    if config.path_mode != "none":
        path_config = PathConfig(**{f.name: getattr(config, f.name) for f in fields(PathConfig)})
        path = DiffusionPath(trunk, path_config, len(manifest["group_names"]))
    model = L2D(trunk, path)                                  # freezes the trunk
    if config.trunk_mode == "lora":
        trunk.add_lora(config.lora_rank, config.lora_alpha)
    return model


class Loss(nn.Module):
    """The loss as a module, to be wrapped by DDP."""
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, idx, at, y, group, t, x_0, steps=None):
        """-log p(y) of each target, (N,): for L2D Eq. 3. steps is T where training is unrolled, else None."""
        if self.model.path is None:
            return diffusion.trunk_nll(self.model, idx, at, y)
        if steps is not None:
            return diffusion.unrolled_nll(self.model, idx, at, y, group, x_0, steps)
        return diffusion.nll(self.model, idx, at, y, group, t, x_0)


def trained_parameters(model):
    return [p for p in model.parameters() if p.requires_grad]


def configure_optimizer(model, config):
    """AdamW, with weight decay on matrices only."""
    params = trained_parameters(model)
    groups = [{"params": [p for p in params if p.dim() >= 2], "weight_decay": config.weight_decay},
              {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def get_lr(iter_num, config):
    """Linear warm-up to learning_rate, then linear decay, which reaches min_lr in the last iteration."""
    if iter_num < config.warmup_iters:
        return config.learning_rate * (iter_num + 1) / config.warmup_iters
    done = (iter_num - config.warmup_iters) / max(1, config.max_iters - 1 - config.warmup_iters)
    return config.learning_rate + (config.min_lr - config.learning_rate) * done


def make_generator(device, *key):
    """A random generator seeded by the numbers in key. The first is 0 in training, 1 in validation."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(seed >> np.uint64(1)))


def draw_inputs(config, model, group, n, generator):
    """Draw t (n,) and x_0 (n, D) for n targets, drop some groups (B,), and draw T, if unrolled."""
    t, x_0 = diffusion.draw(n, config, generator)
    group = diffusion.drop_groups(group, model.no_group, config.group_dropout, generator)
    steps = diffusion.draw_steps(config.unroll, generator) if config.unroll else None
    return t, x_0, group, steps


@torch.no_grad()
def estimate_loss(run, config, ranks):
    """Mean validation losses per target, no guidance groups: L2D's, L2D's by bin of t, and the trunk's.

    Every call draws the same t and noise. Returns a dict of numbers.
    """
    model = run.model
    n = min(config.eval_examples, len(run.val.groups))
    sums = torch.zeros(3, N_BINS, dtype=torch.float64, device=ranks.device)  # targets, loss, the trunk's loss
    for start in range(32 * ranks.rank, n, 32 * ranks.world):
        idx, at, y, group = load_batch(run.val, range(start, min(start + 32, n)), ranks.device)
        generator = make_generator(ranks.device, 1, config.seed, start)
        t, x_0, group, steps = draw_inputs(config, model, group, len(y), generator)
        group = torch.full_like(group, model.no_group)
        with run.autocast:
            trunk_losses = diffusion.trunk_nll(model, idx, at, y) if model.path else None
            losses = run.loss(idx, at, y, group, t, x_0, steps)
        trunk_losses = losses if trunk_losses is None else trunk_losses
        bins = torch.zeros_like(y) if steps or not model.path else (t * N_BINS).long()
        sums.index_add_(1, bins, torch.stack([torch.ones_like(losses), losses, trunk_losses]).double())
    counts, losses, trunk_losses = ranks.sum(sums).tolist()
    by_t = None
    if model.path and not config.unroll:
        by_t = [round(loss / count, 4) if count else None for loss, count in zip(losses, counts)]
    return {"val_loss": sum(losses) / sum(counts), "trunk_loss": sum(trunk_losses) / sum(counts),
            "val_loss_by_t": by_t}


# ------------------------------------------------------------------------------------------------ the run
@dataclass
class Run:
    """What a training run consists of, and how far it has come."""
    manifest: dict                  # of the data
    data: Split                     # training examples
    val: Split
    model: L2D
    loss: nn.Module                 # class Loss
    ddp: nn.Module                  # the same, which also adds up gradients over the ranks; None for one rank
    autocast: object                # the context in which the loss is computed
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    stepper: Stepper
    sampler: dict                   # default options for sampling this model, such as its solver
    lock: object                    # an open file, which keeps other processes out of out_dir
    compiled: bool                  # whether the blocks are
    log: MetricsLog = None
    iter_num: int = 0
    best_val_loss: float = math.inf
    saved_iter: int = -1            # the iteration of last.pt


def set_up(config, ranks):
    """The Run, new or resumed. Raises UserError."""
    n_micro = ranks.world * config.gradient_accumulation_steps
    require(config.batch_size % n_micro == 0, f"batch_size={config.batch_size} does not divide into "
            f"{n_micro} micro-batches: {ranks.world} ranks x gradient_accumulation_steps="
            f"{config.gradient_accumulation_steps}")
    manifest = load_manifest(config.data_dir)
    data = load_fitting(config, config.train_split)
    val = load_fitting(config, config.val_split)
    with ranks.main_first():                                  # the main rank makes out_dir, and may download
        lock, checkpoint = open_out_dir(config, ranks)
        torch.manual_seed(config.seed)
        model = pair_from(checkpoint, checkpoint["path"]) if checkpoint else make_model(config, manifest)
    if config.trunk_mode == "full":
        model.trunk.requires_grad_(True)                      # the pair has frozen it
    model.to(ranks.device)

    device_type = ranks.device.type
    dtype = pick_dtype(config.dtype, ranks.device)
    if config.trunk_dtype == "bfloat16":
        require(dtype == torch.bfloat16, f"trunk_dtype=bfloat16 needs dtype=bfloat16, but it is {dtype}")
        model.trunk.bfloat16()
    use_kernels_for_training(ranks.device, dtype)
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast(device_type, dtype)
    optimizer = configure_optimizer(model, config)
    scaler = torch.amp.GradScaler(device_type, enabled=dtype == torch.float16)
    stepper = Stepper(trained_parameters(model), optimizer, scaler, config.grad_clip)

    loss = Loss(model)
    wanted = config.compile == "on" or config.compile == "auto" and device_type == "cuda"
    compiled = wanted and compiles(ranks.device)
    if compiled:
        compile_blocks(model)
        ranks.say("compiling: the first step takes longer; --compile=off does without")
    options = dict(gradient_as_bucket_view=True, forward_sync_buffers=False)
    ddp = DistributedDataParallel(loss, **options) if ranks.world > 1 else None
    sampler = diffusion.UNROLLED if config.unroll else {}
    run = Run(manifest, data, val, model, loss, ddp, autocast, optimizer, scaler, stepper, sampler, lock,
              compiled)
    if checkpoint:
        check_same_run(checkpoint, config, manifest, ranks)
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"] or scaler.state_dict())
        run.iter_num = run.saved_iter = checkpoint["iter_num"]
        run.best_val_loss = checkpoint["best_val_loss"]
        if not os.path.exists(os.path.join(config.out_dir, "best.pt")):
            run.best_val_loss = math.inf
            ranks.say(f"note: {config.out_dir}/best.pt is missing: the next evaluation writes it")
    run.log = MetricsLog(config, ranks, run.iter_num)
    n_trunk = sum(p.numel() for p in model.trunk.parameters())
    n_trained = sum(p.numel() for p in trained_parameters(model))
    n_iters = iters_per_epoch(data, config.batch_size)
    ranks.say(f"{len(data.groups)} examples, {n_iters} iterations per epoch; "
              f"trunk {n_trunk:,} parameters, {n_trained:,} trained; {ranks.world} x {device_type}, {dtype}")
    return run


def load_fitting(config, split):
    """A split of the data. Raises UserError where an example is longer than block_size."""
    data = load_split(config.data_dir, split)
    longest = int(np.diff(data.offsets).max())
    require(longest - 1 <= config.block_size, f"{config.data_dir}: the longest example of {split} has "
            f"{longest} tokens, but block_size={config.block_size}; raise it (no example is cut or dropped)")
    return data


def kept(run, config):
    """What a message says of the last checkpoint."""
    if run.saved_iter < 0:
        return "Nothing is saved"
    return f"{config.out_dir}/last.pt holds iteration {run.saved_iter}"


def evaluate_and_save(run, config, ranks):
    """Print and log the validation loss, and save. Raises UserError where the loss is not finite."""
    found = estimate_loss(run, config, ranks)
    val_loss = found["val_loss"]
    require(math.isfinite(val_loss), f"the validation loss is {val_loss} at iteration {run.iter_num}; lower "
            f"learning_rate, or use another dtype. {kept(run, config)}")
    text = f"iter {run.iter_num}: validation loss {val_loss:.4f}"
    if run.model.path:
        text += f" (trunk {found['trunk_loss']:.4f})"
    if found["val_loss_by_t"]:
        text += "  by t " + " ".join("-" if x is None else f"{x:.3f}" for x in found["val_loss_by_t"])
    ranks.say(text)
    run.log(iter_num=run.iter_num, **found)
    better = val_loss < run.best_val_loss
    run.best_val_loss = min(val_loss, run.best_val_loss)
    save_run(run, config, ranks, better)


def report(run, config, ranks, loss, norm, lr, speed, seconds_left):
    """Print and log a line about the last iteration. loss, norm: tensors. speed: target tokens per second."""
    loss = ranks.sum(loss).item()
    norm = norm.item()
    minutes, seconds = divmod(int(seconds_left), 60)
    ranks.say(f"iter {run.iter_num}/{config.max_iters}  loss {loss:.4f}  lr {lr:.2e}  norm {norm:.2f}  "
              f"{speed:,.0f} target tokens/s  ETA {minutes}:{seconds:02d}")
    run.log(iter_num=run.iter_num, loss=loss if math.isfinite(loss) else None, lr=lr,
            grad_norm=norm if math.isfinite(norm) else None, tokens_per_second=round(speed))


def asked_to_stop(stop, ranks, iter_num):
    """Whether a signal has come, on any rank. Ranks ask each other in every tenth iteration."""
    if ranks.world == 1:
        return stop.number != 0
    return iter_num % 10 == 0 and ranks.any(stop.number)


def train(config, ranks):
    run = set_up(config, ranks)
    stop = StopSignals()
    n_micro = ranks.world * config.gradient_accumulation_steps
    batches = iterate_batches(run.data, config.batch_size, n_micro, config.seed, run.iter_num)
    first_iter = run.iter_num
    n_seen = 0                                                # targets since then, for the speed
    start = time.time()
    progress = tqdm(total=config.max_iters, initial=run.iter_num,
                    disable=not (ranks.main and sys.stderr.isatty()))
    if run.saved_iter < 0 or run.iter_num >= config.max_iters and run.best_val_loss == math.inf:
        evaluate_and_save(run, config, ranks)                 # a new run, or one whose best.pt is lost

    while run.iter_num < config.max_iters:
        # which examples: the same on every rank
        ids = next(batches)                                   # (n_micro, examples of a micro-batch)
        n_targets = count_targets(run.data, ids)              # of the whole batch, on all ranks
        loss_sum = torch.zeros((), device=ranks.device)

        # forward and backward, for the micro-batches of this rank
        for micro in range(ranks.rank, n_micro, ranks.world):
            idx, at, y, group = load_batch(run.data, ids[micro], ranks.device)  # (B, S), 2 x (N,), (N,), (B,)
            generator = make_generator(ranks.device, 0, config.seed, run.iter_num, micro)
            t, x_0, group, steps = draw_inputs(config, run.model, group, len(y), generator)  # (N,), (N, D)
            more = run.ddp and micro + ranks.world < n_micro  # ranks add up gradients after the last one only
            with run.ddp.no_sync() if more else nullcontext(), run.autocast:
                losses = (run.ddp or run.loss)(idx, at, y, group, t, x_0, steps)  # (N,), Eq. 3
                loss = losses.sum() / n_targets               # a mean over all targets, not a mean of means
            run.scaler.scale(loss * ranks.world).backward()   # DDP averages over ranks; this makes it a sum
            loss_sum += loss.detach()

        # one optimizer step
        lr = get_lr(run.iter_num, config)
        norm = run.stepper.step(lr)
        run.iter_num += 1
        n_seen += n_targets
        progress.update()
        if run.compiled and run.iter_num == first_iter + 1:
            ranks.say(f"compiled; the first step ended after {time.time() - start:.0f} s")

        # report, evaluate, save, stop
        last = run.iter_num == config.max_iters
        log_now = last or run.iter_num % config.log_interval == 0
        if log_now or ranks.device.type == "cpu":             # reading a number blocks until the GPU is done
            run.stepper.check(run.iter_num, losses, kept(run, config))
        if log_now:
            seconds = time.time() - start
            left = seconds / (run.iter_num - first_iter) * (config.max_iters - run.iter_num)
            report(run, config, ranks, loss_sum, norm, lr, n_seen / seconds, left)
        stopped = asked_to_stop(stop, ranks, run.iter_num)
        if last or run.iter_num % config.eval_interval == 0:
            evaluate_and_save(run, config, ranks)
        elif stopped:
            save_run(run, config, ranks)
        if stopped and not last:
            ranks.say(f"stopped at iteration {run.iter_num}; go on with --resume")
            raise SystemExit(128 + (stop.number or 15))
    progress.close()


def main(argv=None):
    config = configure(Config, argv, __doc__)
    remedy = "raise gradient_accumulation_steps, or lower batch_size"
    with ranks_of(pick_device(config.device), remedy) as ranks:
        train(config, ranks)


if __name__ == "__main__":
    run_script(main)
