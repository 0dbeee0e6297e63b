"""
What a training step costs, for L2D and for its controls. `python -m bench --help` says what the columns mean.
"""
from contextlib import nullcontext

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train
from bench.memory import step_bytes
from bench.models import MODES, SIZES, Trainee, random_pair
from bench.timing import best_speeds, make_probes, print_table, spread, time_by_turns
from plumbing.dataset import Split, load_batch
from plumbing.kernels import compile_blocks, use_kernels_for_training


def random_batch(config):
    """Random examples, a Split, and the ids of a batch of similar lengths, near the mean."""
    rng = np.random.default_rng(config.seed)
    n = 50 * config.train_batch
    size = SIZES[config.model]

    def draw_lengths(mean, shape):                                # of GSM8K: 99% of the sums are below 321
        return rng.gamma(shape, mean / shape, n).astype(int).clip(1)
    prompt = draw_lengths(config.train_prompt, 9)
    answer = draw_lengths(config.train_answer, 4)
    total = (prompt + answer).clip(max=size.block_size)
    tokens = rng.integers(size.vocab_size, size=total.sum())
    mask = np.concatenate([np.arange(length) >= of_prompt for of_prompt, length in zip(prompt, total)])
    data = Split(tokens, mask, np.append(0, total.cumsum()), np.zeros(n, int))
    first = min((total < total.mean()).sum(), n - config.train_batch)
    return data, np.argsort(total, kind="stable")[first:first + config.train_batch]


def count_flops(trainee, device):
    """FLOPs of a step, padding included."""
    # the counter does not know the fused attention of a CPU
    attention = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
    with attention, FlopCounterMode(display=False) as counter:
        trainee.step()
    return counter.get_total_flops()


def measure_training(config, device, dtype):
    """Time a step of L2D and of its controls, on the same batch. Prints a table and returns a dict."""
    use_kernels_for_training(device, dtype)
    size = SIZES[config.model]
    data, ids = random_batch(config)
    batch = load_batch(data, ids, device)
    idx, _, y, _ = batch
    trainees = {}
    counted = {}
    for name, modes in MODES.items():
        trainees[name] = Trainee(random_pair(size, *modes, config.seed).to(device), batch, dtype)
        stays, (peak,) = step_bytes(size, name, [(*idx.shape, len(y))], dtype)
        counted[name] = {"flops": count_flops(trainees[name], device), "stays": stays, "peak": peak}
        if config.compile:
            torch._dynamo.reset()                                 # so that no mode is compiled for another
            compile_blocks(trainees[name].model)                  # as in train.py
            trainees[name].step()

    probes, work = make_probes(1 << 24, dtype, device)
    steps = {name: trainee.step for name, trainee in trainees.items()}
    seconds, peaks = time_by_turns(steps | probes, config.repeats, device, "training")
    _, flops_per_s = best_speeds(seconds, work)
    n_tokens = int(np.diff(data.offsets)[ids].sum())
    rows = {}
    for name, trainee in trainees.items():
        rows[name] = make_row(name, trainee, counted, seconds, n_tokens, flops_per_s)
        measured = (trainee.state_bytes() + peaks[name]) / 1e9 if peaks else None
        rows[name]["measured"] = measured
    padding = 1 - (n_tokens - len(ids)) / idx.numel()
    print(f"\ntraining {config.model}{', compiled' if config.compile else ''}, {len(ids)} rows, {n_tokens} "
          f"tokens, {padding:.0%} padding, {len(y)} targets, {str(dtype)[6:]}, {device}; "
          f"{flops_per_s / 1e12:.3f} TFLOP/s")
    print_table(rows)
    return {"rows": rows, "examples": len(ids), "tokens": n_tokens, "targets": len(y), "padding": padding,
            "flops": {name: found["flops"] for name, found in counted.items()}, "flops_per_s": flops_per_s,
            "seconds": seconds}


def make_row(name, trainee, counted, seconds, n_tokens, flops_per_s):
    """What the table says of one control, or of L2D."""
    full = "full finetuning"
    own = counted[name]
    return {
        "trained": sum(p.numel() for p in train.trained_parameters(trainee.model)),
        "seconds": spread(seconds[name]),
        "tokens/s": spread(n_tokens / s for s in seconds[name]),
        "x full": spread(s / of_full for s, of_full in zip(seconds[name], seconds[full])),
        "FLOPs x full": own["flops"] / counted[full]["flops"],
        "matmul": spread(own["flops"] / flops_per_s / s for s in seconds[name]),
        "stays": own["stays"] / 1e9,
        "peak": own["peak"] / 1e9,
    }
