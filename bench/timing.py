"""
Time functions side by side, show the spread of the repeats, and find out how fast this machine is at best.
"""
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

from tasks.report import align

PROBE_CALLS = 5                     # of a probe, in one run


def time_by_turns(variants, repeats, device, title):
    """Run every variant `repeats` times, one after the other, in each second round backwards.

    So whatever else the machine does hits all of them alike. variants: {name: function}; all have run before.
    Returns {name: seconds of each repeat} and, on a GPU, {name: the peak of its memory in the last repeat, in
    bytes beyond what was allocated before}.
    """
    seconds = {name: [] for name in variants}
    peak = {}
    cuda = device.type == "cuda"
    bar = tqdm(total=repeats * len(variants), desc=title, leave=False, disable=not sys.stderr.isatty())
    for i in range(repeats):
        for name in list(variants)[::-1 if i % 2 else 1]:
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                allocated = torch.cuda.memory_allocated()
            start = time.perf_counter()
            variants[name]()
            if cuda:
                torch.cuda.synchronize()
                peak[name] = torch.cuda.max_memory_allocated() - allocated
            seconds[name].append(time.perf_counter() - start)
            bar.update()
    bar.close()
    return seconds, peak


# ---------------------------------------------------------------------------------------------- tables
def spread(values):
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def format_cell(x):
    """The text of a cell. A spread is shown as median [least, greatest]."""
    if isinstance(x, dict):
        return f"{format_cell(x['median'])} [{format_cell(x['min'])}, {format_cell(x['max'])}]"
    if isinstance(x, float):
        return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"
    if x is None:
        return "-"
    return f"{x:,}" if type(x) is int else str(x)


def print_table(rows):
    """Print {row: {column: value}}."""
    head = ["", *next(iter(rows.values()))]
    lines = [[name, *map(format_cell, row.values())] for name, row in rows.items()]
    print(align([head, *lines]), flush=True)


# ---------------------------------------------------------------------------------------------- probes
def make_probes(n_weights, dtype, device):
    """Three functions that show the speed of this machine, and the work that each of them does.

    copy and matvec (a matrix-vector product) read as many numbers as there are weights. matmul multiplies two
    large square matrices. All have run once. Returns {name: function} and {name: its bytes or FLOPs}.
    """
    n = 8192 if device.type == "cuda" else 1536
    A = torch.randn(n, n, device=device).to(dtype)
    M = torch.ones(2, max(1, n_weights // 2048), 1024, dtype=dtype, device=device)
    calls = {
        "copy": lambda: M[0].copy_(M[1]),
        "matvec": lambda: F.linear(M[0, :1], M.view(-1, 1024)),
        "matmul": lambda: A @ A,
    }
    functions = {name: lambda f=f: [f() for _ in range(PROBE_CALLS)] for name, f in calls.items()}
    for f in functions.values():
        f()
    work = {"copy": M.nbytes, "matvec": M.nbytes, "matmul": 2 * n ** 3}
    return functions, {name: PROBE_CALLS * amount for name, amount in work.items()}


def best_speeds(seconds, work):
    """Bytes/s and FLOP/s by the medians of the probes. Bytes/s: the better of copy and matvec."""
    speed = {name: amount / statistics.median(seconds[name]) for name, amount in work.items()}
    return max(speed["copy"], speed["matvec"]), speed["matmul"]
