"""
What a training step costs, of L2D and of its controls. bench.py says what the columns mean.
"""
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train
from batches import batch_of
from machine import use_kernels_for_training
from measure import SIZES, alternate, peaks, print_table, probes, spread
from measure.memory import MODES, Trainee, random_pair, step_bytes


def random_batch(config):
    """Random examples as of prepare_data.load_split, and the ids of a batch of similar, about mean length."""
    rng, n, size = np.random.default_rng(config.seed), 50 * config.train_batch, SIZES[config.model]
    prompt, answer = (rng.gamma(shape, mean / shape, n).astype(int).clip(1)      # GSM8K: 99% below 321
                      for mean, shape in ((config.train_prompt, 9), (config.train_answer, 4)))
    total = (prompt + answer).clip(max=size.block_size)
    data = SimpleNamespace(offsets=np.append(0, total.cumsum()), labels=np.zeros(n, int),
                           tokens=rng.integers(size.vocab_size, size=total.sum()),
                           mask=np.concatenate([np.arange(t) >= p for p, t in zip(prompt, total)]))
    start = min((total < total.mean()).sum(), n - config.train_batch)
    return data, np.argsort(total, kind="stable")[start:start + config.train_batch]


def flops_of(trainee, device):
    """FLOPs of a step, padding included. The counter knows no fused attention of a CPU."""
    with sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext():
        with FlopCounterMode(display=False) as counter:
            trainee()
    return counter.get_total_flops()


def measure_training(config, device, dtype):
    """One optimizer step of L2D and of its controls, on the same batch; printed, too."""
    use_kernels_for_training(device, dtype)
    (data, ids), size = random_batch(config), SIZES[config.model]
    idx, _, y, _ = batch = batch_of(data, ids, device)
    trainees, counted = {}, {}
    for name, modes in MODES.items():
        trainees[name] = Trainee(random_pair(size, *modes, config.seed).to(device), batch, dtype)
        stays, (peak,) = step_bytes(size, name, [(*idx.shape, len(y))], dtype)
        counted[name] = flops_of(trainees[name], device), stays, peak
        if config.compile:
            trainees[name].loss_of.compile()                             # in place, as in train.py
            trainees[name]()
    probe, work = probes(1 << 24, dtype, device)
    seconds, peak = alternate(trainees | probe, config.repeats, device, "training")
    flops, rows, full = peaks(seconds, work)[1], {}, "full finetuning"
    n_tokens = int(np.diff(data.offsets)[ids].sum())
    for name, (n_flops, stays, most) in counted.items():
        s, trained = seconds[name], train.trained(trainees[name].model)
        rows[name] = {"trained": sum(p.numel() for p in trained), "seconds": spread(s),
                      "tokens/s": spread(n_tokens / x for x in s),
                      "x full": spread(x / f for x, f in zip(s, seconds[full])),
                      "FLOPs x full": n_flops / counted[full][0],
                      "matmul": spread(n_flops / flops / x for x in s),
                      "stays": stays / 1e9, "peak": most / 1e9,
                      "measured": (trainees[name].state_bytes() + peak[name]) / 1e9 if peak else None}
    padding = 1 - (n_tokens - len(ids)) / idx.numel()
    print(f"\ntraining {config.model}{', compiled' * config.compile}, {len(ids)} rows, {n_tokens} tokens, "
          f"{padding:.0%} padding, {len(y)} targets, {str(dtype)[6:]}, {device}; {flops / 1e12:.3f} TFLOP/s")
    print_table(rows)
    return {"rows": rows, "examples": len(ids), "tokens": n_tokens, "targets": len(y), "padding": padding,
            "flops": {name: n[0] for name, n in counted.items()}, "flops_per_s": flops, "seconds": seconds}
