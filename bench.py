"""
What does a step cost? Counted and measured, with random weights of any GPT-2 size: no download.

    python bench.py                                                    # decoding of GPT-2 124M, batch 1 and 8
    python bench.py --train --baseline --repeats=7                     # training steps too; transformers' GPT-2 beside ours
    python bench.py --model=gpt2-xl --compile --train --train_batch=32 --train_prompt=1 --train_answer=512 --ragged=False  # GPU

Counted: every number is the value of the formula printed beside it. Measured: in one run, all variants by turns within
each repeat, so that what else the machine does hits them alike; medians [least, greatest] over the repeats, ratios taken
within each repeat. Decoding is diffusion.generate, greedy, with an end of text that never comes. A fresh path has
w_d = 0: every number of steps must write the trunk's tokens, and an adaptive solver sees a guess that never changes.
"""
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import diffusion
import train
from configurator import UserError, configure
from diffusion import SOLVERS, Sampler
from model import GPT, GPT2_SIZES, GPTConfig, PathConfig, build

SIZES = GPT2_SIZES | {"tiny": GPTConfig(vocab_size=1024, n_layer=2, n_head=2, n_embd=64)}


@dataclass(frozen=True)
class Config:
    # what to measure
    model: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "tiny"] = "gpt2"
    decode: bool = True             # measure decoding
    train: bool = False             # measure training steps
    baseline: bool = False          # decode with transformers' GPT-2 as well, same weights (needs transformers)
    repeats: int = 5
    out: str = "out/bench.json"     # settings, machine, counts and all raw repeats
    # decoding
    steps: str = "1,2,4,8,16"       # evaluations per token; 1, plain decoding, is always measured
    solvers: str = "euler"          # of euler, midpoint, heun, adaptive
    batch: str = "1,8"              # prompts decoded at once
    path_mode: Literal["full", "lora"] = "full"
    prompt: int = 64                # tokens of a prompt
    new_tokens: int = 32
    # training: examples of GSM8K's lengths
    train_batch: int = 8            # examples of a batch
    train_prompt: int = 60          # mean tokens of a prompt
    train_answer: int = 96          # mean tokens of an answer
    ragged: bool = True             # lengths vary as GSM8K's do; a batch holds similar ones, as in train.py
    # machine
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # weights in decoding, autocast in training; auto: bfloat16 on cuda
    compile: bool = False
    seed: int = 0

    def __post_init__(self):
        self.numbers("steps"), self.numbers("batch")
        for name in ("repeats", "prompt", "new_tokens", "train_batch", "train_prompt", "train_answer"):
            if getattr(self, name) < 1:
                raise UserError(f"error: {name}={getattr(self, name)}, but it must be at least 1")
        if wrong := [s for s in self.solvers.split(",") if s not in SOLVERS]:
            raise UserError(f"error: solvers={self.solvers!r} has {wrong[0]!r}; the solvers are {', '.join(SOLVERS)}, separated by commas")
        for total, what in ((self.prompt + self.new_tokens, "prompt + new_tokens"), (self.train_prompt + self.train_answer, "train_prompt + train_answer")):
            if total > SIZES[self.model].block_size:
                raise UserError(f"error: {what} = {total} is beyond the {SIZES[self.model].block_size} positions of {self.model}; lower one")

    def numbers(self, name):
        """The whole numbers that an option lists, without repeats, in order."""
        words = [word.strip() for word in getattr(self, name).split(",")]
        if not all(word.isdecimal() and int(word) for word in words):
            raise UserError(f"error: {name}={getattr(self, name)!r}, but it must be numbers from 1 up, separated by commas, such as 1,2,4")
        return sorted({int(word) for word in words})


# ---------------------------------------------------------------------------------------------------- counted
FORMULAS = {                        # later ones may use earlier ones by name
    "trunk_blocks":      "L*(12*C*C + 13*C)",
    "head":              "V*C",                                               # tied to the embedding
    "trunk":             "trunk_blocks + head + P*C + 2*C",
    "trunk_lora":        "L*r*16*C",
    "path_blocks":       "L*(10*C*C + 11*C)",                                 # no keys and values
    "path_lora":         "L*r*14*C",
    "modulation_heads":  "L*(E*E + E + 6*C*E + 6*C)",
    "W":                 "C*D",
    "x_in":              "D*D + D + D*C + C",
    "t_in_label_w":      "2*(E*E + E) + E + (E*E + E + E*C + C)",
    "L2D_full_path":     "path_blocks + modulation_heads + W + x_in + t_in_label_w",
    "L2D_LoRA_path":     "path_lora + modulation_heads + W + x_in + t_in_label_w",
    "trunk_flops":       "2*(L*12*C*C + V*C) + L*4*S*C",
    "path_flops":        "2*(L*10*C*C + D*D + D*C + V*C) + L*4*S*C + lora*2*path_lora",
    "prefill_flops":     "2*(prompt*L*12*C*C + V*C)",                         # attention left out: a floor
    "trunk_bytes":       "b*(trunk_blocks + head)",
    "path_bytes":        "b*(path_blocks + x_in + head + lora*path_lora)",    # modulations and w_d are tabulated
    "path_per_trunk":    "path_bytes / trunk_bytes",
    "floor_T16":         "1 + 15*path_per_trunk",
    "kv_bytes_position": "b*2*L*C",
    "kv_bytes":          "S*kv_bytes_position",
}
HEADINGS = {"trunk_blocks": "parameters", "trunk_flops": "FLOPs: 2 x matmul parameters + attention, one token at context S",
            "trunk_bytes": "bytes read for one token at batch 1, least cost of T = 16 in plain tokens; KV cache per row"}


def count(config, dtype):
    """(symbols, {name: value}) of FORMULAS. The path's FLOPs and bytes are those of config.path_mode."""
    size, path = SIZES[config.model], PathConfig()
    symbols = dict(L=size.n_layer, C=size.n_embd, V=size.vocab_size, P=size.block_size, D=path.x_dim, E=path.t_dim, r=path.rank,
                   S=config.prompt + config.new_tokens // 2, prompt=config.prompt, b=dtype.itemsize, lora=int(config.path_mode == "lora"))
    counts = {}
    for name, formula in FORMULAS.items():
        counts[name] = eval(formula, {}, symbols | counts)                    # our own text, never a user's
    return symbols, counts


def show_counts(config, symbols, counts):
    print(f"counted for {config.model}: " + "  ".join(f"{k}={v}" for k, v in symbols.items()))
    for name, formula in FORMULAS.items():
        if name in HEADINGS:
            print(f"  {HEADINGS[name]}")
        value = f"{counts[name]:,}" if isinstance(counts[name], int) else f"{counts[name]:.3f}"
        print(f"    {name:<18} {value:>16}  = {formula}")


# --------------------------------------------------------------------------------------------------- measuring
def alternate(variants, repeats, device, title):
    """Run the functions {name: f} by turns: once to warm up, then `repeats` times, each second time backwards.

    Returns {name: seconds of each repeat} and {name: what the warm-up returned}.
    """
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds, results = {name: [] for name in variants}, {}
    progress = tqdm(total=(repeats + 1) * len(variants), desc=title, unit="run", disable=not sys.stderr.isatty())
    for i in range(repeats + 1):
        began = time.perf_counter()
        for name in list(variants)[::-1 if i % 2 else 1]:
            progress.set_postfix_str(name)
            sync()
            start = time.perf_counter()
            result = variants[name]()
            sync()
            if i:
                seconds[name].append(time.perf_counter() - start)
            else:
                results[name] = result
            progress.update()
        if progress.disable:
            print(f"{title}: {f'repeat {i}/{repeats}' if i else 'warm-up'}, {time.perf_counter() - began:.1f} s", flush=True)
    progress.close()
    return seconds, results


def spread(values):
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def show(s, digits=2, scale=1):
    return f"{s['median'] * scale:.{digits}f} [{s['min'] * scale:.{digits}f}, {s['max'] * scale:.{digits}f}]"


def ratios(seconds, other):
    return spread([a / b for a, b in zip(seconds, other)])


CALLS = 5                           # of a probe, in one measurement


def probes(n_bytes, dtype, device):
    """{name: (function, what one run moves in bytes or computes in FLOPs)}: what the machine can do."""
    n = 8192 if device.type == "cuda" else 1536
    A = torch.randn(n, n, device=device).to(dtype)
    M = torch.ones(max(2, n_bytes // dtype.itemsize // 1024), 1024, dtype=dtype, device=device)
    half = len(M) // 2
    calls = {"copy": (lambda: M[half:2 * half].copy_(M[:half]), M[:2 * half].nbytes),
             "matrix-vector": (lambda: F.linear(M[:1], M), M.nbytes), "matmul": (lambda: A @ A, 2 * n ** 3)}
    def many(f):
        for _ in range(CALLS):
            f()
    return {f"probe {name}": (partial(torch.no_grad()(many), f), CALLS * work) for name, (f, work) in calls.items()}


def peaks(seconds, work):
    """(bytes/s, FLOP/s): of the medians of the probes, the better of copy and matrix-vector product."""
    rate = {name: work[name][1] / statistics.median(seconds[name]) for name in work}
    return max(rate["probe copy"], rate["probe matrix-vector"]), rate["probe matmul"]


def attention_kernels(f):
    """How often which attention ran in f(): torch's operators (CPU and GPU), kernels (GPU)."""
    with torch.profiler.profile() as profile:
        f()
    names = re.compile(r"aten::_(scaled_dot_product|flash|efficient|cudnn)\w*attention\w*|.*(flash_|fmha|cutlassF|cutlassB|sdpa).*")
    return Counter(e.name[:100] for e in profile.events() if names.fullmatch(e.name))


def make_model(config, trunk_mode, path_mode):
    """The pair with random weights, frozen and trained as train.py does it."""
    torch.manual_seed(config.seed)
    trunk = GPT(SIZES[config.model]).requires_grad_(trunk_mode == "full")
    path = PathConfig(mode=path_mode)
    return build(trunk, None if path_mode == "none" else path, (path.rank, path.alpha) if trunk_mode == "lora" else None)


def compile(model):
    model.compile()                                                           # as in train.py
    model.trunk.compile()


# ---------------------------------------------------------------------------------------------------- decoding
def ours(model, prompts, config, sampler, new_tokens=None):
    """The new tokens of each prompt, and path calls per token."""
    out = diffusion.generate(model, prompts, -1, new_tokens or config.new_tokens, sampler)
    return [o.tokens for o in out], sum(o.nfe for o in out) / sum(o.predicted for o in out)


def transformers_gpt2(trunk, config):
    """transformers' GPT-2 with the trunk's weights: a function of prompts, like ours."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        raise UserError("error: --baseline needs transformers: pip install -r requirements-dev.txt")
    c, weight = trunk.config, trunk.wte.weight
    hf = GPT2LMHeadModel(GPT2Config(vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
                                    bos_token_id=None, eos_token_id=None))
    state = {f"transformer.{k}": v.t() if k.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else v
             for k, v in trunk.state_dict().items()}
    hf.load_state_dict(state | {"lm_head.weight": weight})
    hf.eval().to(weight.device, weight.dtype)

    def decode(prompts):
        idx = torch.tensor(prompts, device=weight.device)
        out = hf.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=config.new_tokens, do_sample=False, use_cache=True, pad_token_id=0)
        return out[:, idx.size(1):].tolist(), 0.0
    return decode


def measure_decoding(config, counts, dtype, device):
    """{batch: result}: every steps value and solver beside plain decoding."""
    model = make_model(config, "frozen", config.path_mode).requires_grad_(False).to(device, dtype)
    baseline = transformers_gpt2(model.trunk, config) if config.baseline else None
    rng, vocab, n, result = np.random.default_rng(config.seed), SIZES[config.model].vocab_size, config.new_tokens, {}
    if config.compile:
        compile(model)
    for batch in config.numbers("batch"):
        prompts = rng.integers(vocab, size=(batch, config.prompt)).tolist()
        samplers = {"plain": Sampler(steps=1)}
        samplers |= {f"{solver} T={T}": Sampler(steps=T, solver=solver) for solver in config.solvers.split(",") for T in config.numbers("steps") if T > 1}
        variants = {name: partial(ours, model, prompts, config, sampler) for name, sampler in samplers.items()}
        if baseline:
            variants["transformers"] = partial(baseline, prompts)
        probe = probes(counts["trunk_bytes"], dtype, device)
        seconds, said = alternate(variants | {name: f for name, (f, _) in probe.items()}, config.repeats, device, f"decoding, batch {batch}")
        bandwidth, flops = peaks(seconds, probe)

        def floor(nfe):                                                       # of one generate, in seconds
            kv = batch * counts["kv_bytes"]
            least = lambda n_bytes, n_flops: max(n_bytes / bandwidth, batch * n_flops / flops)
            return (least(counts["trunk_bytes"], counts["prefill_flops"]) + n * nfe * least(counts["path_bytes"] + kv, counts["path_flops"])
                    + (n - 1) * least(counts["trunk_bytes"] + kv, counts["trunk_flops"]))
        rows, plain = {}, seconds["plain"]
        for name in variants:
            tokens, nfe = said[name]
            rows[name] = {"nfe": nfe, "tokens_per_second": spread([batch * n / s for s in seconds[name]]), "ratio": ratios(seconds[name], plain),
                          "floor_ratio": 1 + nfe * counts["path_per_trunk"], "share_of_floor": ratios([floor(nfe)] * config.repeats, seconds[name]),
                          "same_tokens": tokens == said["plain"][0]}
        slopes = {}                                                           # of the time of a token over its path calls
        for solver in config.solvers.split(","):
            names = [name for name in samplers if name == "plain" or name.startswith(solver + " ")]
            if len({rows[name]["nfe"] for name in names}) > 1:
                fits = [np.polyfit([rows[name]["nfe"] for name in names], [seconds[name][i] / n for name in names], 1)[0] for i in range(config.repeats)]
                slopes[solver] = {"seconds": spread(fits), "of_plain": ratios(fits, [s / n for s in plain])}
        first, one, two = (attention_kernels(partial(ours, model, prompts, config, Sampler(steps=T), new_tokens))
                           for T, new_tokens in ((1, 1), (1, 2), (2, 1)))
        result[batch] = {"rows": rows, "slopes": slopes, "bandwidth": bandwidth, "matmul_flops": flops, "seconds": seconds,
                         "attention": {"prefill": first, "trunk": one - first, "path": two - first}}
    return result


def show_decoding(config, dtype, device, result):
    for batch, r in result.items():
        print(f"\ndecoding {config.model}, batch {batch}, prompt {config.prompt}, {config.new_tokens} new tokens, {config.path_mode} path, "
              f"{str(dtype)[6:]} on {device.type}; median [min, max] of {config.repeats}\n"
              f"  probes: {r['bandwidth'] / 1e9:.1f} GB/s, {r['matmul_flops'] / 1e12:.3f} TFLOP/s. Floor of a pass: its weights and keys and values "
              f"read once, or its FLOPs, whichever takes longer\n"
              f"  {'':<16} {'NFE':>5}  {'tokens/s':<24} {'time / plain':<24} {'by bytes':<9} {'% of floor speed':<20} tokens")
        for name, row in r["rows"].items():
            print(f"  {name:<16} {row['nfe']:5.2f}  {show(row['tokens_per_second']):<24} {show(row['ratio']):<24} {row['floor_ratio']:<9.2f} "
                  f"{show(row['share_of_floor'], 0, 100):<20} {'same' if row['same_tokens'] else 'DIFFER'}")
        for solver, slope in r["slopes"].items():
            print(f"  {solver}: one more path call costs {show(slope['seconds'], 1, 1e3)} ms a token, {show(slope['of_plain'])} plain tokens")
        show_attention(r["attention"])


def show_attention(attention):
    for where, names in attention.items():
        print(f"  attention, {where}: " + (", ".join(f"{n} x {name}" for name, n in names.items()) or "none seen"))


# ---------------------------------------------------------------------------------------------------- training
TRAINED = {"full finetuning": ("full", "none"), "trunk LoRA": ("lora", "none"), "L2D, full path": ("frozen", "full"), "L2D, LoRA path": ("frozen", "lora")}


def examples(config):
    """Random examples as of prepare_data.load_split, and the ids of one batch of train.py's of about mean length."""
    rng, n = np.random.default_rng(config.seed), 50 * config.train_batch
    def lengths(mean, shape):                                                 # GSM8K: 156 tokens, 99% below 321
        return np.maximum(1, rng.gamma(shape, mean / shape, n).astype(int)) if config.ragged else np.full(n, mean)
    block_size = SIZES[config.model].block_size
    prompt = np.minimum(lengths(config.train_prompt, 9), block_size - 1)
    total = np.minimum(prompt + lengths(config.train_answer, 4), block_size)
    offsets = np.concatenate([[0], total.cumsum()])
    mask = np.concatenate([np.arange(t) >= p for p, t in zip(prompt, total)])
    data = SimpleNamespace(tokens=rng.integers(SIZES[config.model].vocab_size, size=offsets[-1]), mask=mask, offsets=offsets, labels=np.zeros(n, np.uint8))
    batches = train.batches_of_epoch(total, config.train_batch, config.seed)
    return data, min(batches, key=lambda ids: abs(total[ids].mean() - total.mean()))


class Trainee:
    """A model, its optimizer and one training step on always the same batch, as train.Run takes it."""
    def __init__(self, config, settings, trunk_mode, path_mode, batch, device, dtype):
        self.settings, self.batch, self.device = settings, batch, device
        self.model = make_model(config, trunk_mode, path_mode).to(device)
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = train.make_optimizer(self.params, settings)
        self.autocast = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()
        self.kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH] if device.type == "cuda" else [SDPBackend.MATH]

    def __call__(self):
        idx, targets, label = self.batch
        label, t, x_0, own_guess = train.draw(self.settings, self.model, targets, label, train.generator_for(self.device, 0, 0, 0))
        with self.autocast, sdpa_kernel(self.kernels):
            loss = diffusion.nll(self.model, idx, targets, label, t, x_0, own_guess).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params, self.settings.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def read(self):
        with self.autocast, sdpa_kernel(self.kernels):
            self.model.read(self.batch[0], (self.batch[1] >= 0).nonzero(as_tuple=True))

    def count(self):
        """One step, not compiled: its FLOPs, padding included, and the bytes kept for its backward pass, weights apart."""
        own, kept = {p.untyped_storage().data_ptr() for p in self.model.parameters()}, {}
        def pack(x):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x
        with FlopCounterMode(display=False) as flops, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            self()
        state = [p for p in self.model.parameters()] + [z for s in self.optimizer.state.values() for z in s.values()]
        return {"flops": flops.get_total_flops(), "trained": sum(p.numel() for p in self.params), "state_bytes": sum(z.nbytes for z in state),
                "saved_bytes": sum(n for pointer, n in kept.items() if pointer not in own)}

    def peak_bytes(self):
        """What one step allocates at its peak on the GPU, on top of what is there before; None on a CPU."""
        if self.device.type != "cuda":
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self()
        return torch.cuda.max_memory_allocated() - before


def measure_training(config, dtype, device):
    """One optimizer step of L2D and its controls, on the same batch."""
    settings = train.Config(seed=config.seed)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")                            # as in train.py
    data, ids = examples(config)
    idx, targets, label = batch = train.batch_of(data, ids, device)
    n_tokens, n_targets = int(np.diff(data.offsets)[ids].sum()), int((targets >= 0).sum())
    trainees = {name: Trainee(config, settings, *modes, batch, device, dtype) for name, modes in TRAINED.items()}
    rows = {name: trainee.count() for name, trainee in trainees.items()}
    if config.compile:
        for trainee in trainees.values():
            compile(trainee.model)
    probe = probes(1 << 26, dtype, device)
    seconds, _ = alternate(trainees | {name: f for name, (f, _) in probe.items()}, config.repeats, device, "training")
    _, flops = peaks(seconds, probe)
    full, attention = rows["full finetuning"], {}
    for name, row in rows.items():
        trainee, peak = trainees[name], trainees[name].peak_bytes()
        row |= {"step_seconds": spread(seconds[name]), "tokens_per_second": spread([n_tokens / s for s in seconds[name]]),
                "ratio": ratios(seconds[name], seconds["full finetuning"]), "flops_ratio": row["flops"] / full["flops"],
                "share_of_matmul": row["flops"] / flops / statistics.median(seconds[name]),
                "peak_bytes": None if peak is None else row["state_bytes"] + peak}
        forward, step = attention_kernels(trainee.read), attention_kernels(trainee)
        attention |= {f"{name}: trunk forward": forward, f"{name}: rest of the step": step - forward}
    return {"rows": rows, "examples": len(ids), "tokens": n_tokens, "targets": n_targets, "padding": 1 - (n_tokens - len(ids)) / idx.numel(),
            "matmul_flops": flops, "seconds": seconds, "attention": attention}


def show_training(config, dtype, device, r):
    print(f"\ntraining {config.model}, one optimizer step on {r['examples']} examples, {r['tokens']} tokens ({100 * r['padding']:.0f}% padding), {r['targets']} targets, "
          f"{str(dtype)[6:]} on {device.type}; median [min, max] of {config.repeats}\n"
          f"  % of matmul: FLOPs of the step, padding included, against {r['matmul_flops'] / 1e12:.3f} TFLOP/s of a matmul probe (on a GPU: MFU). "
          f"state: weights and optimizer; saved: kept for the backward pass; peak: state and all a step allocates\n"
          f"  {'':<16} {'trained':>12}  {'seconds':<22} {'tokens/s':<26} {'time / full':<20} {'FLOPs / full':<13} {'% of matmul':<12} "
          f"{'state MB':<9} {'saved MB':<9} peak MB")
    for name, row in r["rows"].items():
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"
        print(f"  {name:<16} {row['trained']:>12,}  {show(row['step_seconds'], 3):<22} {show(row['tokens_per_second'], 0):<26} {show(row['ratio']):<20} "
              f"{row['flops_ratio']:<13.2f} {100 * row['share_of_matmul']:<12.0f} {row['state_bytes'] / 1e6:<9.0f} {row['saved_bytes'] / 1e6:<9.0f} {peak}")
    show_attention(r["attention"])


# -------------------------------------------------------------------------------------------------------- main
def describe_machine(device):
    """What the numbers depend on besides the code."""
    try:
        cpu = re.search(r"model name\s*: (.*)", open("/proc/cpuinfo").read())[1]
    except (OSError, TypeError):
        cpu = platform.processor() or platform.machine()
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    versions = {name: getattr(sys.modules.get(name), "__version__", None) for name in ("torch", "numpy", "transformers")}
    return versions | {"python": platform.python_version(), "platform": platform.platform(), "cpu": cpu, "cores": os.cpu_count(),
                       "threads": torch.get_num_threads(), "load_average": os.getloadavg(), "cuda": torch.version.cuda,
                       "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
                       "commit": commit, "date": datetime.datetime.now().isoformat(timespec="seconds")}


def main(argv=None):
    config = configure(Config, argv, __doc__)
    device = train.Ranks(train.Config(device=config.device)).device
    dtype = getattr(torch, config.dtype if config.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32")
    try:
        os.makedirs(os.path.dirname(config.out) or ".", exist_ok=True)
        open(config.out + ".part", "w").close()
    except OSError as e:
        raise UserError(f"error: cannot write {config.out}: {e.strerror}")
    symbols, counts = count(config, dtype)
    result = {"config": asdict(config), "command": " ".join(sys.argv), "machine": describe_machine(device),
              "counted": {name: {"value": counts[name], "formula": formula} for name, formula in FORMULAS.items()}, "symbols": symbols}
    show_counts(config, symbols, counts)
    if config.decode:
        result["decode"] = measure_decoding(config, counts, dtype, device)
        show_decoding(config, dtype, device, result["decode"])
    if config.train:
        result["train"] = measure_training(config, dtype, device)
        show_training(config, dtype, device, result["train"])
    result["machine_after"] = describe_machine(device)
    with open(config.out + ".part", "w") as file:
        json.dump(result, file, indent=1)
    os.replace(config.out + ".part", config.out)
    print(f"\n{result['machine']['cpu']}, {torch.get_num_threads()} threads, torch {torch.__version__}, load average {os.getloadavg()[0]:.1f}; "
          f"written to {config.out}")
    differ = [f"{name} (batch {batch})" for batch, r in result.get("decode", {}).items() for name, row in r["rows"].items() if not row["same_tokens"]]
    if differ and dtype == torch.float32 and device.type == "cpu":
        raise UserError(f"error: in float32 these wrote other tokens than plain decoding: {', '.join(differ)}")


if __name__ == "__main__":
    main()
