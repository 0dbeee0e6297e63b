"""
Train L2D, or one of its controls, on data made by prepare_data.py.

    python train.py config/l2d_gsm8k.py                                # GPT-2 and GSM8K, one GPU
    torchrun --nproc_per_node=8 train.py                               # the same configuration on eight
    python train.py config/demo_l2d.py --out_dir=out/mine --steps=500  # after demo.sh: two CPU cores, no network

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
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import diffusion
from configurator import UserError, configure
from model import (GPT, GPTConfig, PathConfig, build, describe, device_kind, dtype_name, load_checkpoint, load_state,
                   model_from_checkpoint)
from prepare_data import load_manifest, load_split, write_file


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
    input_scale: Literal["wiener", "unit"] = "wiener"  # how x_t enters the path; unit is the official code's
    time_scale: float = 1000.0      # factor on t before its sinusoidal features; the official code has 1
    gate_init: float = 1.0          # residual gates of the path at the start; the official code has 0
    token_input: bool = True        # the path's input holds the context's last token too; the paper has x_t alone: use w_init=0 with that
    w_init: float = 1.0             # weight w_d of the path at the start, for t > 0; the official code has 0
    stratified: bool = True         # draw t from equal bins over the micro-batch
    unroll: int = 0                 # train through Algorithm 1: x_t from 1 to so many of the model's own mean guesses; 0 = x_t from the truth
    unroll_t_end: float = 0.9       # time of its last evaluation, and
    unroll_shift: float = 3.0       # its time grid; to be sampled with --t_end and --shift of the same values and --guess=mean
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
                        lora_rank=1, x_dim=1, t_dim=2, warmup=0, weight_decay=0, grad_clip=0, unroll=0, label_dropout=0, min_lr=0, seed=0)
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
        if self.label_dropout > 1:
            raise UserError(f"error: label_dropout={self.label_dropout}, but it is a share and must be at most 1")
        if not 0 < self.unroll_t_end <= 1 or self.unroll_shift <= 0:
            raise UserError(f"error: unroll_t_end={self.unroll_t_end} must be in (0, 1] and unroll_shift={self.unroll_shift} above 0")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"error: {name}={getattr(self, name)}, but it must be at least 0 and below 1")
        if self.t_dim % 2:
            raise UserError(f"error: t_dim={self.t_dim} must be even: half of it cosines, half sines")


# ------------------------------------------------------------------------------------------------- machine
class Ranks:
    """Where this process stands among those torchrun started; one process alone is rank 0 of 1."""
    def __init__(self, config):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        kind = device_kind(config.device)
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

    @contextmanager
    def main_first(self):
        """The main rank runs the block before the others do: what it downloads or makes is there for them."""
        if self.world > 1 and not self.main:
            dist.barrier()
        yield
        if self.world > 1 and self.main:
            dist.barrier()

    def sum(self, tensor):
        """The sum of tensor over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_grads(self, params):
        """Data parallel in one all-reduce of one flat vector (deviation 9). Each rank's loss is already divided by the global
        number of target tokens, so gradients are summed: no mean of means."""
        if self.world > 1:
            flat = self.sum(torch.cat([p.grad.flatten() for p in params]))
            for p, grad in zip(params, flat.split([p.numel() for p in params])):
                p.grad.copy_(grad.view_as(p))


# ---------------------------------------------------------------------------------------------------- data
def load_fitting(config, split):
    """A split of the data, checked to fit block_size."""
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


def batches_of_epoch(lengths, batch_size, n_micro, seed):
    """The example ids of one epoch, (steps, n_micro, batch_size / n_micro): a step's micro-batches, all ranks together.

    Shuffled, then sorted by length within chunks of 50 batches and cut into micro-batches, so that a micro-batch
    holds similar lengths and little padding; a step takes its micro-batches at random, so that with several of them it
    sees several lengths (with one it sees one: the loss then swings from step to step).
    The rest that fills no batch waits for another epoch's shuffle; data smaller than a batch is repeated to fill one.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths))
    if len(order) < batch_size:
        order = np.resize(order, batch_size)
    order = order[:len(order) // batch_size * batch_size]
    chunks = np.split(order, range(50 * batch_size, len(order), 50 * batch_size))
    order = np.concatenate([chunk[np.argsort(lengths[chunk], kind="stable")] for chunk in chunks])
    micro_batches = rng.permutation(order.reshape(-1, batch_size // n_micro))
    return micro_batches.reshape(-1, n_micro, batch_size // n_micro)


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
    path_config = PathConfig(mode=config.path_mode, n_labels=manifest["n_labels"], rank=config.lora_rank, alpha=config.lora_alpha,
                             x_dim=config.x_dim, t_dim=config.t_dim, sigma=config.sigma, input_scale=config.input_scale,
                             time_scale=config.time_scale, gate_init=config.gate_init, token_input=config.token_input, w_init=config.w_init)
    return build(trunk, path_config, lora)


def make_optimizer(params, config):
    groups = [{"params": [p for p in params if p.dim() >= 2], "weight_decay": config.weight_decay},
              {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def attention_kernels(device, dtype):
    """The attention kernels that training may use in dtype: all, but on a CPU in half precision, where the backward of the fused one
    takes many times as long as that of plain matmuls (8 to 9 times at the demo's size)."""
    fused = [] if device.type == "cpu" and dtype != torch.float32 else [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    return [*fused, SDPBackend.MATH]


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


def draw_noise(config, model, targets, label, generator):
    """What one micro-batch draws: labels after dropout (B,), t (N,), x_0 (N, D), and for unrolled training the times of 1 to config.unroll
    path calls, or None."""
    if model.path is None:
        return label, None, None, None
    n, device = int((targets >= 0).sum()), targets.device
    t, x_0 = diffusion.draw(n, model.path.config, generator, config.stratified)
    drop = torch.rand(len(label), generator=generator, device=device) < config.label_dropout
    label = torch.where(drop, model.no_label, label)                          # per example, not per position
    times = None
    if config.unroll:
        times = diffusion.draw_times(config.unroll, config.unroll_t_end, config.unroll_shift, generator)
        t = torch.full_like(t, times[-1])
    return label, t, x_0, times


# ---------------------------------------------------------------------------------------------- evaluation
N_BINS = 8


@torch.no_grad()
def evaluate(model, data, ids, config, ranks, autocast):
    """Teacher-forced loss on the examples ids: of the trunk, of the pair, and of the pair for each of N_BINS bins
    of t. Without labels, as in sampling by default: a label comes from the true answer. The noise is the same at every
    evaluation. Without a path the trunk's loss is the loss."""
    sums = torch.zeros(2, N_BINS + 2, dtype=torch.float64, device=ranks.device)  # sums and counts: bins, all, trunk
    trunk_only = type(model)(model.trunk)
    for start in range(ranks.rank * 32, len(ids), ranks.world * 32):
        idx, targets, label = batch_of(data, ids[start:start + 32], ranks.device)
        label = torch.full_like(label, model.no_label)
        _, t, x_0, times = draw_noise(config, model, targets, label, generator_for(ranks.device, 1, config.seed, start))
        with autocast:
            trunk_loss = diffusion.nll(trunk_only, idx, targets, label)
            loss = diffusion.nll(model, idx, targets, label, t, x_0, times) if model.path else trunk_loss
        sums[0, -1] += trunk_loss.sum()
        sums[0, -2] += loss.sum()
        sums[1, -2:] += len(loss)
        if model.path:
            bins = (t * N_BINS).long().clamp(max=N_BINS - 1)
            sums[0].index_add_(0, bins, loss.double())
            sums[1].index_add_(0, bins, torch.ones_like(loss).double())
    mean = (ranks.sum(sums)[0] / sums[1]).tolist()
    result = {"val_loss": mean[-2], "trunk_loss": mean[-1]}
    return result | ({"val_loss_by_t": [round(x, 4) if n else None for x, n in zip(mean, sums[1, :N_BINS].tolist())]} if model.path else {})


# ------------------------------------------------------------------------------------------------------ run
def save(checkpoint, path):
    """Write whole or not at all: a kill while writing leaves the old file."""
    write_file(path, lambda file: torch.save(checkpoint, file))


class Run:
    """One training run: everything that main needs between two steps, set up from the config."""
    def __init__(self, config):
        self.config, self.ranks = config, Ranks(config)
        self.device = self.ranks.device
        self.last, self.metrics = (os.path.join(config.out_dir, name) for name in ("last.pt", "metrics.jsonl"))
        with self.ranks.main_first():                                         # it may download, and makes out_dir
            self.open_out_dir()
            self.manifest = load_manifest(config.data_dir)
            self.train, self.val = load_fitting(config, config.train_split), load_fitting(config, config.val_split)
            torch.manual_seed(config.seed)                                    # the same initial weights on every rank
            self.model = make_model(config, self.manifest).to(self.device)
        self.lengths, self.epoch = np.diff(self.train.offsets), None
        self.per_epoch = max(1, len(self.lengths) // config.batch_size)
        self.eval_data, self.eval_ids = self.val, range(min(config.eval_examples, len(self.val.labels)))
        if config.overfit:
            self.eval_data, self.eval_ids = self.train, self.batch(0).flatten()

        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.params, config)
        on_gpu = self.device.type == "cuda"
        self.dtype = dtype_name(config.dtype, self.device.type)
        dtype = getattr(torch, self.dtype)
        self.autocast = torch.autocast(self.device.type, dtype) if dtype != torch.float32 else nullcontext()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == "float16")
        self.kernels = attention_kernels(self.device, dtype)
        self.step, self.best = 0, math.inf
        if config.resume:
            self.resume()
        if on_gpu:
            torch.set_float32_matmul_precision("high")
        if config.compile == "on" or config.compile == "auto" and on_gpu:
            self.model.compile()                                              # in place: names stay as they are
            self.model.trunk.compile()

    def open_out_dir(self):
        """Make out_dir, check that it can be written, and that nothing in it would be lost."""
        config = self.config
        try:
            os.makedirs(config.out_dir, exist_ok=True)
            if self.ranks.main:
                open(self.metrics, "a").close()
        except OSError as e:
            raise UserError(f"error: cannot write to out_dir={config.out_dir}: {e.strerror}; choose another --out_dir")
        if os.path.exists(self.last) and not config.resume:
            raise UserError(f"error: {self.last} exists; go on with --resume, or choose another --out_dir")
        if config.resume and not os.path.exists(self.last):
            raise UserError(f"error: nothing to resume: {self.last} does not exist; start without --resume")

    def resume(self):
        """Go on from last.pt: model, optimizer, scaler, step and best loss; metrics of steps to be repeated are dropped."""
        checkpoint, now = load_checkpoint(self.last), asdict(self.config)
        may_differ = {"resume", "device", "compile", "log_every", "eval_every", "data_dir", "out_dir", "trunk"}
        differ = [f"{k} was {v!r}, now {now.get(k)!r}" for k, v in checkpoint["config"].items() if k not in may_differ and now.get(k) != v]
        differ += [f"{k} of the data was {checkpoint['data'].get(k)!r}, now {v!r}" for k, v in self.manifest.items() if checkpoint["data"].get(k) != v]
        differ += [f"ranks were {checkpoint['world']}, now {self.ranks.world}"] if checkpoint["world"] != self.ranks.world else []
        if differ:
            raise UserError(f"error: {self.last} belongs to another configuration: {'; '.join(differ)}")
        if "optimizer" not in checkpoint:
            raise UserError(f"error: {self.last} has no optimizer state (is it a best.pt?); start without --resume, in another --out_dir")
        load_state(self.model, checkpoint["model"], self.last)
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scaler.load_state_dict(checkpoint["scaler"])
        self.step, self.best = checkpoint["step"], checkpoint["best"]
        if self.ranks.main:
            with open(self.metrics) as file:
                kept = [line for line in file if line.endswith("\n") and json.loads(line)["step"] <= self.step]
            write_file(self.metrics, lambda file: file.write("".join(kept).encode()))

    def say(self, text):
        if self.ranks.main:
            tqdm.write(text)
            sys.stdout.flush()

    def report(self, record):
        if self.ranks.main:
            with open(self.metrics, "a") as file:
                file.write(json.dumps(record) + "\n")

    def batch(self, step):
        """The ids of the examples of a step, (micro-batches, examples of each), all ranks together."""
        config = self.config
        epoch, i = (0, 0) if config.overfit else divmod(step, self.per_epoch)
        if self.epoch != epoch:
            n_micro = self.ranks.world * config.grad_accum
            self.epoch, self.order = epoch, batches_of_epoch(self.lengths, config.batch_size, n_micro, [config.seed, epoch])
        return self.order[i]

    def train_step(self):
        """One optimizer step: micro-batches, backward, sum over ranks, clip, step. Returns loss, gradient norm, targets."""
        config, train, micro_batches = self.config, self.train, self.batch(self.step)
        n_targets = sum(int(train.mask[train.offsets[i] + 1:train.offsets[i + 1]].sum()) for i in micro_batches.flat)  # of all ranks
        loss_sum = torch.zeros((), device=self.device)
        for micro in range(self.ranks.rank, len(micro_batches), self.ranks.world):
            idx, targets, label = batch_of(train, micro_batches[micro], self.device)
            generator = generator_for(self.device, 0, config.seed, self.step, micro)
            label, t, x_0, times = draw_noise(config, self.model, targets, label, generator)
            with self.autocast, sdpa_kernel(self.kernels):
                loss = diffusion.nll(self.model, idx, targets, label, t, x_0, times).sum() / n_targets
            self.scaler.scale(loss).backward()
            loss_sum += loss.detach()
        self.ranks.sum_grads(self.params)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.params, config.grad_clip or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, config)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.ranks.sum(loss_sum).item()
        self.check(loss, "loss")
        self.step += 1
        return loss, float(norm), n_targets

    def check(self, loss, name):
        """Stop, before anything is written, where a loss is nan or infinite."""
        if not math.isfinite(loss):
            raise UserError(f"error: the {name} is {loss} at step {self.step}; lower learning_rate or use another dtype. "
                            f"{self.last} holds the last evaluated state")

    def evaluate_and_save(self):
        config = self.config
        result = evaluate(self.model, self.eval_data, self.eval_ids, config, self.ranks, self.autocast)
        self.check(result["val_loss"], "validation loss")
        text = f"step {self.step}: validation loss {result['val_loss']:.4f}"
        if self.model.path:
            text += f" (trunk {result['trunk_loss']:.4f})  by t " + " ".join("-" if x is None else f"{x:.3f}" for x in result["val_loss_by_t"])
        self.say(text)
        self.report({"step": self.step} | result)
        better, self.best = result["val_loss"] < self.best, min(result["val_loss"], self.best)
        if self.ranks.main:
            lora = [config.lora_rank, config.lora_alpha] if config.trunk_mode == "lora" else None
            checkpoint = describe(self.model, lora) | {
                "config": asdict(config), "world": self.ranks.world, "step": self.step, "best": self.best, "data": self.manifest,
                "tokenizer": {"name": self.manifest["tokenizer"], "fingerprint": self.manifest["fingerprint"]}}
            if better:
                save(checkpoint, os.path.join(config.out_dir, "best.pt"))
            save(checkpoint | {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}, self.last)


def main(argv=None):
    config = configure(Config, argv, __doc__)
    run = Run(config)
    n_trunk, n_trained = sum(p.numel() for p in run.model.trunk.parameters()), sum(p.numel() for p in run.params)
    run.say(f"{len(run.train.labels)} examples, {run.per_epoch} steps an epoch; trunk {n_trunk:,} parameters, {n_trained:,} trained; "
            f"{run.ranks.world} x {run.device.type}, {run.dtype}")
    progress = tqdm(total=config.steps, initial=run.step, unit="step", disable=not (run.ranks.main and sys.stderr.isatty()))
    if not config.resume:
        run.evaluate_and_save()
    start, first, tokens = time.time(), run.step, 0
    while run.step < config.steps:
        loss, norm, n_targets = run.train_step()
        step, tokens, seconds = run.step, tokens + n_targets, time.time() - start
        progress.update()
        if step % config.log_every == 0 or step == config.steps:
            eta, lr = int(seconds / (step - first) * (config.steps - step)), learning_rate(step - 1, config)
            run.say(f"step {step}/{config.steps}  loss {loss:.4f}  lr {lr:.2e}  norm {norm:.2f}  "
                    f"{tokens / seconds:,.0f} target tokens/s  ETA {eta // 60}:{eta % 60:02d}")
            run.report({"step": step, "loss": loss, "lr": lr, "grad_norm": norm if math.isfinite(norm) else None, "seconds": round(seconds, 1),
                        "tokens_per_second": round(tokens / seconds)})
        if step % config.eval_every == 0 or step == config.steps:
            run.evaluate_and_save()
    progress.close()
    if run.ranks.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
