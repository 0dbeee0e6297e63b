"""
What does a step cost? Counted and measured, with random weights of any GPT-2 size: no download.

    python bench.py                                                    # decoding of GPT-2 124M, batch 1 and 8
    python bench.py --train --baseline                                 # training steps, and transformers' GPT-2 beside ours
    python bench.py --compile --train --train_batch=32 --train_prompt=64 --train_answer=448 --ragged=False    # one GPU

Counted: every number is the value of the formula beside it. Measured: in one run, all variants by turns within each
repeat, so that what else the machine does hits them alike; median [least, greatest] of the repeats, ratios within each.

Decoding is diffusion.generate, greedy, with an end of text that never comes. The path is fresh and w_init = 0: at every T it must
write what plain decoding writes, and an adaptive solver sees a guess that never changes. nfe: path calls per token;
vs_plain: time against plain decoding (T = 1), the reading of the prompt in both; call_ms, call_vs_plain: one more path
call, in ms and in tokens of plain decoding; floor: each pass reads its weights and the KV cache once, or computes its
FLOPs, as fast as the probes (copy, matrix-vector product, matmul) do in the same run; floor_share: of that speed;
floor_vs_plain: what vs_plain would be there.

Training is the step of train.py on one batch; everyone has the head at the targets only. matmul_share: FLOPs of the step,
padding included, against the matmul probe (MFU by a measured peak); state: weights and optimizer; saved: kept for the
backward pass; peak (GPU): state and all that a step allocates.
"""
import json
import os
import platform
import re
import statistics
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import diffusion
import train
from configurator import UserError, configure
from diffusion import SOLVERS, Sampler
from evaluate import commit
from model import GPT, GPT2_SIZES, GPTConfig, PathConfig, build, dtype_name
from packed import pack

SIZES = GPT2_SIZES | {"tiny": GPTConfig(vocab_size=1024, n_layer=2, n_head=2, n_embd=64)}


@dataclass(frozen=True)
class Config:
    # what to measure
    model: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "tiny"] = "gpt2"
    decode: bool = True
    train: bool = False
    baseline: bool = False          # decode with transformers' GPT-2 too, on the same weights
    repeats: int = 5
    out: str = "out/bench.json"     # settings, machine, counts and the raw repeats
    # decoding
    steps: str = "1,2,4,8,16"       # evaluations per token; 1, plain decoding, is always measured
    solvers: str = "euler"          # of euler, midpoint, heun, adaptive
    batch: str = "1,8"              # prompts decoded at once
    shortlist: int = 0              # every one of them with a shortlist of so many words, too; 0 = not
    path_mode: Literal["full", "lora"] = "full"
    prompt: int = 64                # tokens
    new_tokens: int = 32
    # training, on examples of GSM8K's lengths
    train_batch: int = 8
    train_prompt: int = 60          # mean tokens of a prompt
    train_answer: int = 96          # mean tokens of an answer
    ragged: bool = True             # lengths vary as GSM8K's do; a batch holds similar ones, as in train.py
    # machine
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of weights in decoding, autocast in training; auto: bfloat16 on cuda
    compile: bool = False
    seed: int = 0

    def __post_init__(self):
        self.numbers("steps"), self.numbers("batch")
        for name in ("repeats", "prompt", "new_tokens", "train_batch", "train_prompt", "train_answer"):
            if getattr(self, name) < 1:
                raise UserError(f"error: {name}={getattr(self, name)}, but it must be at least 1")
        for a, b in (("prompt", "new_tokens"), ("train_prompt", "train_answer")):
            if (total := getattr(self, a) + getattr(self, b)) > SIZES[self.model].block_size:
                raise UserError(f"error: {a} + {b} = {total}, but {self.model} has {SIZES[self.model].block_size} positions; lower one")
        if wrong := [s for s in self.solvers.split(",") if s not in SOLVERS]:
            raise UserError(f"error: solvers={self.solvers!r}: {wrong[0]!r} is not one of {', '.join(SOLVERS)}")
        if "adaptive" in self.solvers and (self.compile or self.shortlist):
            raise UserError("error: --compile and --shortlist need the same evaluations for every token, which --solvers=adaptive does not make")

    def numbers(self, name):
        """The numbers that an option lists."""
        words = getattr(self, name).split(",")
        if not all(word.strip().isdecimal() and int(word) for word in words):
            raise UserError(f"error: {name}={getattr(self, name)!r}, but it must be numbers from 1 up, separated by commas, such as 1,2,4")
        return sorted(set(map(int, words)))


# ---------------------------------------------------------------------------------------------------- counted
FORMULAS = {                        # a later one may use the names of earlier ones
    # parameters
    "trunk_blocks": "L*(12*C*C + 13*C)",
    "head": "V*C",                                                            # tied to the embedding
    "trunk": "trunk_blocks + head + P*C + 2*C",
    "trunk_lora": "L*r*16*C",
    "path_blocks": "L*(10*C*C + 11*C)",                                       # no keys and values
    "path_lora": "L*r*14*C",
    "modulation": "L*(E*E + E + 6*C*E + 6*C)",
    "W": "C*D",
    "x_in": "D*D + D + D*C + C",
    "t_in_label_w": "2*(E*E + E) + E + (E*E + E + E*C)",
    "l2d_full_path": "path_blocks + modulation + W + x_in + t_in_label_w",
    "l2d_lora_path": "path_lora + modulation + W + x_in + t_in_label_w",
    # one token at context S: 2 x matmul parameters + attention. Modulations and w_d come from a table
    "trunk_flops": "2*(L*12*C*C + V*C) + L*4*S*C",
    "path_flops": "2*(L*10*C*C + D*D + D*C + V*C + lora*path_lora) + L*4*S*C",
    # read for one token at batch 1
    "trunk_bytes": "b*(trunk_blocks + head)",
    "head_bytes": "b*head",
    "path_bytes": "b*(path_blocks + x_in + head + lora*path_lora)",
    "kv_bytes": "b*2*L*C*S",                                                  # of a row at context S
    # the least a token can cost, in plain tokens: one trunk pass and T - 1 path calls
    "path_per_trunk": "path_bytes / trunk_bytes",
    "floor_T16": "1 + 15*path_per_trunk",
    "floor_T16_shortlist": "floor_T16 - 14*head_bytes/trunk_bytes",           # one head at the start, one at the end
}


def count(config, dtype):
    """The symbols of FORMULAS and their values; lora = 1 counts the FLOPs and bytes of a LoRA path."""
    size, path = SIZES[config.model], PathConfig()
    symbols = dict(L=size.n_layer, C=size.n_embd, V=size.vocab_size, P=size.block_size, D=path.x_dim, E=path.t_dim, r=path.rank,
                   S=config.prompt + config.new_tokens // 2, b=dtype.itemsize, lora=int(config.path_mode == "lora"))
    counts = {}
    for name, formula in FORMULAS.items():
        counts[name] = eval(formula, {}, symbols | counts)                    # our own text, never a user's
    return symbols, counts


def least_seconds(config, counts, batch, nfe, headless, bandwidth, flops):
    """The floor of one generate: each pass reads its weights and the KV cache once, or computes its FLOPs, whichever is slower.
    headless: how many of a token's nfe path calls use a shortlist, whose words cost nothing here."""
    def one(n_bytes, n_flops, kv=batch * counts["kv_bytes"]):
        return max((n_bytes + kv) / bandwidth, batch * n_flops / flops)
    prefill = one(counts["trunk_bytes"], 2 * (counts["head"] + config.prompt * counts["trunk_blocks"]), kv=0)
    trunk, path = (one(counts[f"{name}_bytes"], counts[f"{name}_flops"]) for name in ("trunk", "path"))
    short = one(counts["path_bytes"] - counts["head_bytes"], counts["path_flops"] - 2 * counts["head"])
    return prefill + (config.new_tokens - 1) * trunk + config.new_tokens * ((nfe - headless) * path + headless * short)


# -------------------------------------------------------------------------------------------------- measuring
def alternate(variants, repeats, device, title):
    """Run the functions {name: f} by turns: once to warm up, then `repeats` times, every other time backwards.

    Returns {name: seconds of each repeat}, {name: what the warm-up returned} and, on a GPU, {name: bytes of the last
    run's peak beyond what was allocated before}.
    """
    seconds, results, peak, cuda = {name: [] for name in variants}, {}, {}, device.type == "cuda"
    progress = tqdm(total=(repeats + 1) * len(variants), desc=title, unit="run", leave=False, disable=not sys.stderr.isatty())
    for i in range(repeats + 1):
        for name in list(variants)[::-1 if i % 2 else 1]:
            progress.set_postfix_str(name)
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                peak[name] = -torch.cuda.memory_allocated()
            start = time.perf_counter()
            result = variants[name]()
            if cuda:
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
            if cuda:
                peak[name] += torch.cuda.max_memory_allocated()
            results.setdefault(name, result)
            progress.update()
        if progress.disable:
            print(f"{title}: {f'repeat {i}/{repeats}' if i else 'warm-up'}, {sum(s[-1] for s in seconds.values()):.1f} s", flush=True)
    progress.close()
    return {name: s[1:] for name, s in seconds.items()}, results, peak


def spread(values):
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def text(x):
    """A cell of a table; a spread is median [min, max]."""
    if isinstance(x, dict):
        return f"{text(x['median'])} [{text(x['min'])}, {text(x['max'])}]"
    if isinstance(x, float):
        return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"
    return "-" if x is None else f"{x:,}" if type(x) is int else str(x)


def table(rows):
    """Print {row: {column: value}}."""
    lines = [["", *next(iter(rows.values()))]] + [[name, *map(text, row.values())] for name, row in rows.items()]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  " + "  ".join(map(str.ljust, line, widths)).rstrip())


CALLS = 5                           # of a probe, in one run


def probes(n_bytes, dtype, device):
    """{name: function}, {name: its bytes or FLOPs}: a copy and a matrix-vector product over n_bytes, and a large matmul."""
    n = 8192 if device.type == "cuda" else 1536
    A = torch.randn(n, n, device=device).to(dtype)
    M = torch.ones(2, max(1, n_bytes // dtype.itemsize // 2048), 1024, dtype=dtype, device=device)
    calls = {"copy": lambda: M[0].copy_(M[1]), "matvec": lambda: F.linear(M[0, :1], M.view(-1, 1024)), "matmul": lambda: A @ A}
    functions = {name: lambda f=f: [f() for _ in range(CALLS)] and None for name, f in calls.items()}
    return functions, {"copy": CALLS * M.nbytes, "matvec": CALLS * M.nbytes, "matmul": CALLS * 2 * n ** 3}


def peaks(seconds, work):
    """(bytes/s, FLOP/s) by the medians of the probes; bytes/s the better of copy and matvec."""
    copy, matvec, matmul = (n / statistics.median(seconds[name]) for name, n in work.items())
    return max(copy, matvec), matmul


def attention_of(f):
    """Which attention ran in f() and how often, by the names of torch's operators and, on a GPU, of its kernels."""
    with torch.profiler.profile() as profile:
        f()
    names = re.compile(r"aten::_scaled_dot_product\w+|(?!aten|autograd).*(flash|fmha|cutlass[FB]|sdpa).*")
    return Counter(e.name[:80] for e in profile.events() if names.fullmatch(e.name))


def make_model(config, trunk_mode, path_mode):
    """The pair with random weights, and what train.py freezes frozen."""
    torch.manual_seed(config.seed)
    trunk, path = GPT(SIZES[config.model]).requires_grad_(trunk_mode == "full"), PathConfig(mode=path_mode, w_init=0.0)
    return build(trunk, path if path_mode != "none" else None, (path.rank, path.alpha) if trunk_mode == "lora" else None)


# --------------------------------------------------------------------------------------------------- decoding
def decode(model, prompts, new_tokens, sampler, compile=False):
    """The new tokens of each prompt, and path calls per token."""
    out = diffusion.generate(model, prompts, -1, new_tokens, sampler, compile=compile)
    return [o.tokens for o in out], sum(o.nfe for o in out) / sum(o.predicted for o in out)


def transformers_gpt2(trunk):
    """transformers' GPT-2 with the trunk's weights, as a function like decode."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        raise UserError("error: --baseline needs transformers: pip install -r requirements-dev.txt")
    c, head = trunk.config, trunk.wte.weight
    hf = GPT2LMHeadModel(GPT2Config(vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
                                    bos_token_id=None, eos_token_id=None))
    transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    weights = {f"transformer.{k}": v.t() if k.endswith(transposed) else v for k, v in trunk.state_dict().items()}
    hf.load_state_dict(weights | {"lm_head.weight": head})
    hf.eval().to(head.device, head.dtype)

    def hf_decode(prompts, new_tokens):
        idx = torch.tensor(prompts, device=head.device)
        out = hf.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=new_tokens, do_sample=False, use_cache=True, pad_token_id=0)
        return out[:, idx.size(1):].tolist(), 0.0
    return hf_decode


def measure_decoding(config, counts, dtype, device):
    """{batch: result}, printed as it comes: every steps value and solver beside plain decoding."""
    model = make_model(config, "frozen", config.path_mode).requires_grad_(False).to(device, dtype)
    samplers = {"plain": Sampler(steps=1)} | {f"{solver} T={T}": Sampler(steps=T, solver=solver)
                                              for solver in config.solvers.split(",") for T in config.numbers("steps") if T > 1}
    if config.shortlist:
        samplers |= {f"{name}, shortlist {config.shortlist}": replace(s, shortlist=config.shortlist) for name, s in samplers.items() if s.steps > 2}
    baseline = transformers_gpt2(model.trunk) if config.baseline else None
    rng, n, results = np.random.default_rng(config.seed), config.new_tokens, {}
    if config.compile:
        torch._dynamo.config.recompile_limit = 100                            # one graph for each sampler and batch
    else:
        pack(model)                                                           # as sample.py does
    for batch in config.numbers("batch"):
        prompts = rng.integers(SIZES[config.model].vocab_size, size=(batch, config.prompt)).tolist()
        variants = {name: partial(decode, model, prompts, n, sampler, config.compile) for name, sampler in samplers.items()}
        if baseline:
            variants["transformers"] = partial(baseline, prompts, n)
        probe, work = probes(counts["trunk_bytes"], dtype, device)
        seconds, said, _ = alternate(variants | probe, config.repeats, device, f"decoding, batch {batch}")
        (bandwidth, flops), rows = peaks(seconds, work), {}
        plain_floor = least_seconds(config, counts, batch, 0, 0, bandwidth, flops)
        for name in variants:
            (tokens, nfe), s, plain = said[name], seconds[name], seconds["plain"]
            headless = nfe - 1 if name in samplers and samplers[name].shortlist else 0
            floor = least_seconds(config, counts, batch, nfe, headless, bandwidth, flops)
            rows[name] = {"nfe": nfe, "tokens_per_s": spread(batch * n / x for x in s), "vs_plain": spread(x / p for x, p in zip(s, plain)),
                          "floor_vs_plain": floor / plain_floor,
                          "call_ms": spread(1e3 * (x - p) / n / nfe for x, p in zip(s, plain)) if nfe else None,
                          "call_vs_plain": spread((x - p) / p / nfe for x, p in zip(s, plain)) if nfe else None,
                          "floor_share": spread(floor / x for x in s), "same_tokens": tokens == said["plain"][0]}
        results[batch] = {"rows": rows, "bytes_per_s": bandwidth, "flops_per_s": flops, "seconds": seconds}
        print(f"\ndecoding {config.model}, batch {batch}, prompt {config.prompt}, {n} new tokens, {config.path_mode} path, {str(dtype)[6:]} on {device}; "
              f"probes: {bandwidth / 1e9:.1f} GB/s, {flops / 1e12:.3f} TFLOP/s")
        table(rows)
        if device.type == "cuda":
            first, trunk, path = (attention_of(partial(decode, model, prompts, m, Sampler(steps=T))) for T, m in ((1, 1), (1, 2), (2, 1)))
            results[batch]["attention"] = {"prefill": dict(first), "trunk": dict(trunk - first), "path": dict(path - first)}
            print(f"  attention: {results[batch]['attention']}")
    return results


# --------------------------------------------------------------------------------------------------- training
TRAINED = {"full finetuning": ("full", "none"), "trunk LoRA": ("lora", "none"), "L2D, full path": ("frozen", "full"), "L2D, LoRA path": ("frozen", "lora")}


def random_batch(config):
    """Random examples as of prepare_data.load_split, and the ids of a batch of similar, about mean length as of train.py."""
    rng, n, size = np.random.default_rng(config.seed), 50 * config.train_batch, SIZES[config.model]
    def lengths(mean, shape):                                                 # GSM8K: mean 156 tokens, 99% below 321
        return rng.gamma(shape, mean / shape, n).astype(int).clip(1) if config.ragged else np.full(n, mean)
    prompt, answer = lengths(config.train_prompt, 9), lengths(config.train_answer, 4)
    total = (prompt + answer).clip(max=size.block_size)
    data = SimpleNamespace(offsets=np.append(0, total.cumsum()), tokens=rng.integers(size.vocab_size, size=total.sum()),
                           mask=np.concatenate([np.arange(t) >= p for p, t in zip(prompt, total)]), labels=np.zeros(n, int))
    start = min((total < total.mean()).sum(), n - config.train_batch)
    return data, np.argsort(total, kind="stable")[start:start + config.train_batch]


class Trainee:
    """A model, its optimizer and one training step, always on the same batch; the step is train.Run's."""
    def __init__(self, config, modes, batch, device, dtype):
        self.settings, self.batch, self.device = train.Config(), batch, device
        self.model = make_model(config, *modes).to(device)
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = train.make_optimizer(self.params, self.settings)
        self.autocast = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()
        self.kernels = train.attention_kernels(device, dtype)

    def __call__(self, kernels=None):
        idx, targets, label = self.batch
        label, t, x_0, times = train.draw_noise(self.settings, self.model, targets, label, train.generator_for(self.device, 0))
        with self.autocast, sdpa_kernel(kernels or self.kernels):
            loss = diffusion.nll(self.model, idx, targets, label, t, x_0, times).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params, self.settings.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def count(self):
        """Steps that are not compiled: their FLOPs, padding included, and the bytes kept for backward, weights apart."""
        weights, kept = {p.untyped_storage().data_ptr() for p in self.model.parameters()}, {}
        def pack(x):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x
        with saved_tensors_hooks(pack, lambda x: x):
            self()
        with FlopCounterMode(display=False) as counter:                       # it knows no fused kernel of the CPU
            self([SDPBackend.MATH] if self.device.type == "cpu" else None)
        state = [*self.model.parameters(), *(z for s in self.optimizer.state.values() for z in s.values())]
        return {"trained": sum(p.numel() for p in self.params), "flops": counter.get_total_flops(),
                "state_MB": sum(z.nbytes for z in state) // 10 ** 6,
                "saved_MB": sum(n for storage, n in kept.items() if storage not in weights) // 10 ** 6}


def measure_training(config, dtype, device):
    """One optimizer step of L2D and of its controls, on the same batch; printed, too."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")                            # as in train.py
    data, ids = random_batch(config)
    idx, targets, _ = batch = train.batch_of(data, ids, device)
    trainees = {name: Trainee(config, modes, batch, device, dtype) for name, modes in TRAINED.items()}
    counted = {name: trainee.count() for name, trainee in trainees.items()}
    if config.compile:
        for trainee in trainees.values():
            trainee.model.compile()                                           # in place, as in train.py
            trainee.model.trunk.compile()
    probe, work = probes(1 << 26, dtype, device)
    seconds, _, peak = alternate(trainees | probe, config.repeats, device, "training")
    flops, full, rows = peaks(seconds, work)[1], seconds["full finetuning"], {}
    n_tokens, n_targets = int(np.diff(data.offsets)[ids].sum()), int((targets >= 0).sum())
    for name, row in counted.items():
        s = seconds[name]
        rows[name] = {"trained": row["trained"], "seconds": spread(s), "tokens_per_s": spread(n_tokens / x for x in s),
                      "vs_full": spread(x / f for x, f in zip(s, full)), "flops_vs_full": row["flops"] / counted["full finetuning"]["flops"],
                      "matmul_share": spread(row["flops"] / flops / x for x in s), "state_MB": row["state_MB"], "saved_MB": row["saved_MB"],
                      "peak_MB": row["state_MB"] + peak[name] // 10 ** 6 if peak else None}
    result = {"rows": rows, "examples": len(ids), "tokens": n_tokens, "targets": n_targets, "padding": 1 - (n_tokens - len(ids)) / idx.numel(),
              "flops": {name: row["flops"] for name, row in counted.items()}, "flops_per_s": flops, "seconds": seconds}
    print(f"\ntraining {config.model}, a step on {len(ids)} examples, {n_tokens} tokens ({result['padding']:.0%} padding), {n_targets} targets, "
          f"{str(dtype)[6:]} on {device}; probe: {flops / 1e12:.3f} TFLOP/s")
    table(rows)
    if device.type == "cuda":
        result["attention"] = {name: dict(attention_of(trainee)) for name, trainee in trainees.items()}
        print(f"  attention, trunk and path: {result['attention']}")
    return result


# ------------------------------------------------------------------------------------------------------- main
def machine(device):
    """What the numbers depend on besides the code."""
    cpu = re.search(r"model name\s*: (.*)", open("/proc/cpuinfo").read()) if os.path.exists("/proc/cpuinfo") else None
    version = {name: getattr(sys.modules.get(name), "__version__", None) for name in ("torch", "numpy", "transformers")}
    return version | {"python": platform.python_version(), "platform": platform.platform(), "cpu": cpu[1] if cpu else platform.machine(),
                      "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None, "cores": os.cpu_count(),
                      "threads": torch.get_num_threads(), "load": os.getloadavg()[0], "time": time.strftime("%Y-%m-%d %H:%M:%S"),
                      "commit": commit()}


def main(argv=None):
    config = configure(Config, argv, __doc__)
    device = train.Ranks(train.Config(device=config.device)).device
    dtype = getattr(torch, dtype_name(config.dtype, device.type))
    try:
        os.makedirs(os.path.dirname(config.out) or ".", exist_ok=True)
        if os.path.isdir(config.out):
            raise IsADirectoryError(0, "it is a directory")
        open(config.out + ".part", "w").close()                               # rather now than after the work
    except OSError as e:
        raise UserError(f"error: cannot write {config.out}: {e.strerror}")
    before, (symbols, counts) = machine(device), count(config, dtype)
    print(f"counted for {config.model}: " + "  ".join(f"{name}={value}" for name, value in symbols.items()))
    counted = {name: {"value": counts[name], "formula": formula} for name, formula in FORMULAS.items()}
    table(counted)
    result = {"config": asdict(config), "command": " ".join(sys.argv), "symbols": symbols, "counted": counted,
              "decode": measure_decoding(config, counts, dtype, device) if config.decode else None,
              "train": measure_training(config, dtype, device) if config.train else None}
    result |= {"machine_before": before, "machine": (after := machine(device))}
    with open(config.out + ".part", "w") as file:
        json.dump(result, file, indent=1)
    os.replace(config.out + ".part", config.out)
    print(f"\n{after['gpu'] or after['cpu']}, {after['threads']} threads, torch {torch.__version__}, load average {before['load']:.1f} to {after['load']:.1f}; "
          f"median [min, max] of {config.repeats} repeats; written to {config.out}")
    differ = [f"{name} at batch {batch}" for batch, r in (result["decode"] or {}).items() for name, row in r["rows"].items() if not row["same_tokens"]]
    if differ and dtype == torch.float32:
        raise UserError(f"error: in float32 these wrote other tokens than plain decoding: {', '.join(differ)}")


if __name__ == "__main__":
    main()
