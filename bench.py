"""
What does a step cost? Counted and measured, with random weights of any GPT-2 size: no download.

    python bench.py --baseline                          # decoding of GPT-2 124M, and transformers' beside ours
    python bench.py --out_dir=out/demo_l2d              # decoding of a trained run, on its validation prompts
    python bench.py --decode=False --train              # training steps of L2D and of its controls
    python bench.py --gpu_report                        # all that a new GPU has to show, see gpu_report.py

All variants run by turns within each repeat, so that what else the machine does hits them alike: median [least,
greatest] of the repeats, ratios within each.

Decoding is decode.generate, greedy. x plain: time per token against plain decoding (T = 1), the reading of the prompts
in both. a round: tokens kept of a draft. kept, computed: path calls a token, at the tokens kept and in all. floor: the
share of the speed at which every pass would read its weights and its keys and values once, or compute its FLOPs, as
fast as the probes (copy, matrix-vector product, matmul) do in the same run.
How many drafted tokens are kept is a property of the model. Random weights have none, so there it is set: the path is
fresh, at every T it writes what plain decoding writes, and then a seeded share of the tokens is changed. Each variant
must write what plain decoding with these changes writes.

Training is the step of train.py on one batch. matmul: FLOPs of the step, padding included, against the matmul probe
(MFU by a measured peak). peak: the memory that memory.py predicts, on a GPU beside what was measured.
"""
import json
import os
import platform
import re
import statistics
import sys
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import decode
from checkpoint import load
from configurator import UserError, at_least, configure, run
from decode import Decoding, Generated, generate
from files import write_file
from machine import pick_device, pick_dtype, use_kernels_for_training
from memory import MODES, Trainee, random_pair, step_bytes
from model import GPT2_SIZES, GPTConfig, PathConfig
from packed import pack
from prepare_data import batch_of, load_split

SIZES = GPT2_SIZES | {"tiny": GPTConfig(vocab_size=1024, n_layer=2, n_head=2, n_embd=64)}


@dataclass(frozen=True)
class Config:
    # what to measure
    model: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "tiny"] = "gpt2"   # random weights
    out_dir: str = ""               # of train.py: decode with this run's best.pt, in place of random weights
    decode: bool = True
    train: bool = False
    gpu_report: bool = False        # correctness on this device, then decoding, training and memory
    baseline: bool = False          # decode with transformers' GPT-2 too, on the same weights
    repeats: int = 5
    out: str = "out/bench.json"     # settings, machine, and every repeat
    # decoding
    steps: str = "16"               # evaluations per token; 1, plain decoding, is always measured
    draft: str = "0,8,16"           # tokens that the trunk drafts in a round, at most
    acceptance: str = "0.5,0.8,0.95,1"  # random weights: shares of drafted tokens that the path leaves as they are
    stop: float = 0.9               # a trained run: with --stop, too; 0 = not
    batch: str = "1,8"              # prompts decoded at once
    texts: int = 8                  # a trained run: prompts in all, or `batch` if that is more
    prompt: int = 64                # random weights: tokens of a prompt
    new_tokens: int = 48            # and new ones
    path_mode: Literal["full", "lora"] = "full"
    # training, on examples of GSM8K's lengths
    train_batch: int = 8
    train_prompt: int = 60          # mean tokens of a prompt
    train_answer: int = 96          # mean tokens of an answer
    ragged: bool = True             # lengths vary as GSM8K's do; a batch holds similar ones, as in train.py
    compile: bool = False           # training steps
    # machine
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"   # of weights in decoding, autocast in training
    seed: int = 0

    def __post_init__(self):
        at_least(self, repeats=1, prompt=1, new_tokens=1, train_batch=1, train_prompt=1, train_answer=1, texts=1, seed=0)
        for name, kind, low, high in (("steps", int, 1, 10 ** 4), ("draft", int, 0, 10 ** 4), ("batch", int, 1, 10 ** 6),
                                      ("acceptance", float, 0, 1)):
            try:
                fits = all(low <= x <= high for x in numbers(getattr(self, name), kind))
            except ValueError:
                fits = False
            if not fits:
                raise UserError(f"error: {name}={getattr(self, name)!r}, but it must be numbers from {low} to {high}, "
                                "separated by commas, such as 1,8")
        for a, b in (("prompt", "new_tokens"), ("train_prompt", "train_answer")):
            if (total := getattr(self, a) + getattr(self, b)) > SIZES[self.model].block_size:
                raise UserError(f"error: {a} + {b} = {total}, but {self.model} has {SIZES[self.model].block_size} "
                                "positions; lower one")


def numbers(text, kind=int):
    return sorted(set(map(kind, text.split(","))))


# --------------------------------------------------------------------------------------------- counted
def parameters(size, path):
    """How many parameters each part has."""
    L, C, V, P, D, E, r = (size.n_layer, size.n_embd, size.vocab_size, size.block_size, path.x_dim, path.t_dim,
                           path.lora_rank)
    n = {"trunk_blocks": L * (12 * C * C + 13 * C),
         "head": V * C,                                                  # tied to the embedding
         "trunk_lora": L * r * 16 * C,
         "path_blocks": L * (10 * C * C + 11 * C),                       # no keys and values
         "path_lora": L * r * 14 * C,
         "modulation": L * (E * E + E + 6 * C * E + 6 * C),
         "W": C * D,
         "x_in": D * D + D + D * C + C,
         "t_in_label_w": 2 * (E * E + E) + 2 * E + (E * E + E + E * C)}  # one label, and none
    n["trunk"] = n["trunk_blocks"] + n["head"] + P * C + 2 * C
    rest = n["modulation"] + n["W"] + n["x_in"] + n["t_in_label_w"]
    return n | {"l2d_full_path": n["path_blocks"] + rest, "l2d_lora_path": n["path_lora"] + rest}


def cost_of_a_pass(size, path, path_mode, S):
    """FLOPs of a token at context S, numbers read for all tokens together, and keys and values read for a row.

    Modulations and w_d come from a table. FLOPs: 2 x the weights of the matmuls, and attention.
    """
    n, lora = parameters(size, path), path_mode == "lora"
    L, C, D = size.n_layer, size.n_embd, path.x_dim
    attention, path_lora = 4 * L * S * C, lora * n["path_lora"]
    return {"trunk": {"flops": 2 * 12 * L * C * C + attention, "weights": n["trunk_blocks"]},
            "path": {"flops": 2 * (10 * L * C * C + D * D + D * C + path_lora) + attention,
                     "weights": n["path_blocks"] + n["x_in"] + path_lora},
            "head": {"flops": 2 * n["head"], "weights": n["head"]}, "kv": 2 * L * C * S}


def least_seconds(cost, passes, n_bytes, bandwidth, flops):
    """The floor of a generate. passes {(part, positions, rows): how often}, from passes_of."""
    return sum(times * max(n_bytes * (cost[part]["weights"] + (part != "head") * rows * cost["kv"]) / bandwidth,
                           positions * cost[part]["flops"] / flops)
               for (part, positions, rows), times in passes.items())


def passes_of(model, f):
    """{(trunk, path or head, positions, rows): how often it ran} in f(), and what f() returns."""
    passes = Counter()
    def note(part, positions, rows):
        passes[part, positions, rows] += 1
    hooks = [model.trunk.register_forward_hook(lambda _, args, out: note("trunk", args[0].numel(), len(args[0])))]
    if model.path is not None:
        rows = lambda c: c.kv[0][0].size(0)
        hooks.append(model.path.register_forward_hook(lambda _, args, out: note("path", len(args[0]), rows(args[4]))))
    hooks.append(model.trunk.ln_f.register_forward_hook(lambda _, args, out: note("head", len(args[0]), 0)))
    result = f()
    for hook in hooks:
        hook.remove()
    return passes, result


# ------------------------------------------------------------------------------------------- measuring
def alternate(variants, repeats, device, title):
    """Run the functions {name: f} by turns: once to warm up, then `repeats` times, every other time backwards.

    Returns {name: seconds of each repeat} and {name: bytes of the last run's peak beyond what was there}, on a GPU.
    """
    seconds, peak, cuda = {name: [] for name in variants}, {}, device.type == "cuda"
    total = (repeats + 1) * len(variants)
    progress = tqdm(total=total, desc=title, unit="run", leave=False, disable=not sys.stderr.isatty())
    for i in range(repeats + 1):
        for name in list(variants)[::-1 if i % 2 else 1]:
            progress.set_postfix_str(name)
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                peak[name] = -torch.cuda.memory_allocated()
            start = time.perf_counter()
            variants[name]()
            if cuda:
                torch.cuda.synchronize()
                peak[name] += torch.cuda.max_memory_allocated()
            seconds[name].append(time.perf_counter() - start)
            progress.update()
    progress.close()
    return {name: s[1:] for name, s in seconds.items()}, peak


def spread(values):
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def cell(x):
    """A cell of a table; a spread is median [min, max]."""
    if isinstance(x, dict):
        return f"{cell(x['median'])} [{cell(x['min'])}, {cell(x['max'])}]"
    if isinstance(x, float):
        return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"
    return "-" if x is None else f"{x:,}" if type(x) is int else str(x)


def print_table(rows):
    """Print {row: {column: value}}."""
    lines = [["", *next(iter(rows.values()))]] + [[name, *map(cell, row.values())] for name, row in rows.items()]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  " + "  ".join(map(str.ljust, line, widths)).rstrip(), flush=True)


CALLS = 5                           # of a probe, in one run


def probes(n_weights, dtype, device):
    """{name: function}, {name: its bytes or FLOPs}: a copy and a matrix-vector product of so many weights, a matmul."""
    n = 8192 if device.type == "cuda" else 1536
    A = torch.randn(n, n, device=device).to(dtype)
    M = torch.ones(2, max(1, n_weights // 2048), 1024, dtype=dtype, device=device)
    calls = {"copy": lambda: M[0].copy_(M[1]), "matvec": lambda: F.linear(M[0, :1], M.view(-1, 1024)),
             "matmul": lambda: A @ A}
    functions = {name: lambda f=f: [f() for _ in range(CALLS)] for name, f in calls.items()}
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



# -------------------------------------------------------------------------------------------- decoding
@contextmanager
def changed(share):
    """Within it, tokens that Algorithm 1 predicts are changed at a seeded share of the positions."""
    refine = decode.refine
    def refine_and_change(*args):
        y, f = refine(*args)
        return torch.where(f.u[:, 0] < share, (y + 1) % f.last.size(1), y), f      # u: fixed for a position
    decode.refine = refine_and_change
    try:
        yield
    finally:
        decode.refine = refine


def write(model, prompts, batch, eot, config, acceptance=1.0):
    """The Generated of every prompt."""
    with changed(1 - acceptance):
        return [o for i in range(0, len(prompts), batch)
                for o in generate(model, prompts[i:i + batch], eot, config, ids=range(i, i + batch))]


def transformers_gpt2(trunk, eot, config):
    """transformers' GPT-2 with the trunk's weights, as a function (prompts, batch) -> Generated, of tokens alone."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        raise UserError("error: --baseline needs transformers: pip install -r requirements-dev.txt") from None
    c, head = trunk.config, trunk.wte.weight
    hf = GPT2LMHeadModel(GPT2Config(vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
                                    n_head=c.n_head, bos_token_id=None, eos_token_id=None))
    transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    weights = {f"transformer.{k}": v.t() if k.endswith(transposed) else v for k, v in trunk.state_dict().items()}
    hf.load_state_dict(weights | {"lm_head.weight": head})
    hf.eval().to(head.device, head.dtype)

    def hf_write(prompts, batch):
        out = []
        for i in range(0, len(prompts), batch):
            rows = prompts[i:i + batch]
            longest = max(map(len, rows))                                # padded on the left
            idx = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=head.device)
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=head.device)
            y = hf.generate(idx, attention_mask=mask, max_new_tokens=config.max_new_tokens, do_sample=False,
                            use_cache=True, pad_token_id=0, eos_token_id=eot if eot >= 0 else None)
            for tokens in y[:, longest:].tolist():
                n = tokens.index(eot) if eot in tokens else len(tokens)
                out.append(Generated(tokens[:n], eot in tokens, n + (eot in tokens)))
        return out
    return hf_write


def what_to_decode(config, device, dtype):
    """A model, its end of text and prompts for any batch; the Decoding and acceptance of each variant by name, after
    plain decoding; and for each the variant whose tokens it must write."""
    base, variants, same_as = dict(max_new_tokens=config.new_tokens), {}, {}
    if config.out_dir:
        model, encoding, checkpoint = load(config.out_dir, "best", device.type, config.dtype)
        data_dir, eot = checkpoint["config"]["data_dir"], encoding.eot_token
        data = load_split(data_dir, checkpoint["config"]["val_split"])
        texts = [data.tokens[a:b][:data.mask[a:b].argmax()].tolist() for a, b in zip(data.offsets, data.offsets[1:])]
        prompts, base = (lambda batch: texts[:max(batch, config.texts)]), {}
    else:
        model, eot = random_pair(SIZES[config.model], "frozen", config.path_mode).requires_grad_(False), -1
        model.to(device, dtype)
        prompts = lambda batch: np.random.default_rng(config.seed).integers(
            model.trunk.config.vocab_size, size=(batch, config.prompt)).tolist()
    variants["plain"] = Decoding(steps=1, **base), 1.0
    for T in [T for T in numbers(config.steps) if T > 1 and model.path is not None]:
        for draft in numbers(config.draft):
            name = f"T = {T}, " + (f"drafts of {draft}" if draft else "no drafts")
            settings = dict(steps=T, draft=draft, **base)
            if config.out_dir:
                for stop in sorted({0.0, config.stop}):
                    full = name + (f", stop {stop}" if stop else "")
                    variants[full] = Decoding(stop=stop, **settings), 1.0
                    same_as[full] = next(k for k, (d, _) in variants.items() if d.steps == T and d.stop == stop)
            else:
                for share in numbers(config.acceptance, float) if draft else [1.0]:
                    full = name + (f", {share:.0%} kept" if draft else "")
                    variants[full] = Decoding(**settings), share
    return model, eot, prompts, variants, same_as
