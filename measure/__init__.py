"""
Measuring for bench.py: variants by turns, spreads, tables, and the speeds this machine reaches at best.
"""
import re
import statistics
import sys
import time
from collections import Counter

import torch
import torch.nn.functional as F
from tqdm import tqdm

from exam.report import aligned
from gpt2_weights import GPT2_SIZES
from model import GPTConfig

SIZES = GPT2_SIZES | {"tiny": GPTConfig(vocab_size=1024, n_layer=2, n_head=2, n_embd=64)}


def numbers(text, kind=int):
    """The numbers in a text such as 1,8."""
    return sorted(set(map(kind, text.split(","))))


def alternate(variants, repeats, device, title):
    """Run the functions {name: f} by turns, `repeats` times, every other time backwards; all have run before.

    Returns {name: seconds of each repeat} and, on a GPU, {name: bytes of the last run's peak beyond what was
    there}.
    """
    seconds, peak, cuda = {name: [] for name in variants}, {}, device.type == "cuda"
    bar = tqdm(total=repeats * len(variants), desc=title, leave=False, disable=not sys.stderr.isatty())
    for i in range(repeats):
        for name in list(variants)[::-1 if i % 2 else 1]:
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
            bar.update()
    bar.close()
    return seconds, peak


def spread(values):
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def cell(x):
    """A cell of a table; a spread is median [least, greatest]."""
    if isinstance(x, dict):
        return f"{cell(x['median'])} [{cell(x['min'])}, {cell(x['max'])}]"
    if isinstance(x, float):
        return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"
    return "-" if x is None else f"{x:,}" if type(x) is int else str(x)


def print_table(rows):
    """Print {row: {column: value}}."""
    lines = [[name, *map(cell, row.values())] for name, row in rows.items()]
    print(aligned([["", *next(iter(rows.values()))], *lines]), flush=True)


CALLS = 5                           # of a probe, in one run


def probes(n_weights, dtype, device):
    """{name: function}, {name: its bytes or FLOPs}: a copy and a matrix-vector product of so many weights,
    and a matmul. They have run once."""
    n = 8192 if device.type == "cuda" else 1536
    A = torch.randn(n, n, device=device).to(dtype)
    M = torch.ones(2, max(1, n_weights // 2048), 1024, dtype=dtype, device=device)
    calls = {"copy": lambda: M[0].copy_(M[1]), "matvec": lambda: F.linear(M[0, :1], M.view(-1, 1024)),
             "matmul": lambda: A @ A}
    functions = {name: lambda f=f: [f() for _ in range(CALLS)] for name, f in calls.items()}
    for f in functions.values():
        f()
    return functions, {"copy": CALLS * M.nbytes, "matvec": CALLS * M.nbytes, "matmul": CALLS * 2 * n ** 3}


def peaks(seconds, work):
    """(bytes/s, FLOP/s) by the medians of the probes; bytes/s the better of copy and matvec."""
    copy, matvec, matmul = (n / statistics.median(seconds[name]) for name, n in work.items())
    return max(copy, matvec), matmul


def attention_of(f):
    """Which attention ran in f() and how often, by the names of torch's operators and of a GPU's kernels."""
    with torch.profiler.profile() as profile:
        f()
    names = re.compile(r"aten::_scaled_dot_product\w+|(?!aten|autograd).*(flash|fmha|cutlass[FB]|sdpa).*")
    return Counter(e.name[:80] for e in profile.events() if names.fullmatch(e.name))


def passes_of(model, f):
    """How often trunk, path and head ran in f(), {(part, positions, rows): times}, and what f() returned."""
    passes, trunk = Counter(), model.trunk

    def count(module, part, shape_of):
        note = lambda _, inputs, output: passes.update([(part, *shape_of(inputs))])  # noqa: E731
        return module.register_forward_hook(note)
    hooks = [count(trunk, "trunk", lambda inputs: (inputs[0].numel(), len(inputs[0]))),
             count(trunk.ln_f, "head", lambda inputs: (len(inputs[0]), 0))]
    if model.path is not None:                                           # its inputs end with the Context
        hooks.append(count(model.path, "path", lambda inputs: (len(inputs[0]), len(inputs[-1].kv[0][0]))))
    result = f()
    for hook in hooks:
        hook.remove()
    return passes, result
