"""
What does a step cost? Counted and measured, with random weights of any GPT-2 size: no download.

    python bench.py --baseline                  # decoding of GPT-2 124M, and transformers' beside ours
    python bench.py --out_dir=out/demo_l2d      # decoding of a trained run, on its validation prompts
    python bench.py --decode=False --train      # training steps of L2D and of its controls
    python bench.py --gpu_report                # the first thing to run on a new GPU: see gpu_report.py

All variants run by turns within each repeat, so that what else the machine does hits them alike: median
[least, greatest] of the repeats, ratios within each.

Decoding is decode.generate, greedy. x plain: time per token against plain decoding (T = 1), with reading the
prompts. a round: tokens kept of a draft. NFE: path calls for a token kept; computed: all path calls for it.
floor: the share of the speed at which every pass would read its weights, keys and values once, or compute
its FLOPs, as fast as the probes (copy, matrix-vector product, matmul) do in the same run.
How much of a draft is kept is a property of the model. Random weights have none, so it is set: the path is
fresh, it writes what plain decoding writes at every T, and then a seeded share of the tokens is changed.
same: it wrote what it must, plain decoding with these changes, or Algorithm 1 without drafts.

Training is the step of train.py on one batch. matmul: FLOPs of the step, padding included, against the matmul
probe (MFU by a measured peak). stays, peak: GB as memory.py counts them; measured: the peak on a GPU.
"""
import json
import os
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import decode
import train
from batches import batch_of
from checkpoint import load
from configurator import UserError, at_least, configure, require, run
from decode import Decoding, Generated, generate
from files import write_file
from gpt2_weights import GPT2_SIZES
from machine import pick_device, pick_dtype, use_kernels_for_training
from measure import alternate, passes_of, peaks, print_table, probes, spread
from memory import MODES, Trainee, random_pair, step_bytes
from model import GPTConfig, PathConfig
from packed import pack
from prepare_data import load_split
from report import provenance

SIZES = GPT2_SIZES | {"tiny": GPTConfig(vocab_size=1024, n_layer=2, n_head=2, n_embd=64)}


@dataclass(frozen=True)
class Config:
    # what to measure
    model: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "tiny"] = "gpt2"
    out_dir: str = ""               # of train.py: decode with its best.pt, in place of random weights
    decode: bool = True
    train: bool = False
    gpu_report: bool = False        # check this device, then decoding and training on it
    baseline: bool = False          # decode with transformers' GPT-2, too, on the same weights
    repeats: int = 5
    out: str = "out/bench.json"     # settings, machine, and every repeat
    # decoding
    steps: str = "16"               # evaluations per token; 1, plain decoding, is always measured
    draft: str = "0,8,16"           # tokens that the trunk drafts in a round, at most
    acceptance: str = "0.5,0.8,0.95,1"  # random weights: shares of tokens not changed
    stop: float = 0.1               # a trained run: with --stop, too; 0 = not
    batch: str = "1,8"              # prompts decoded at once
    texts: int = 8                  # a trained run: prompts in all, or `batch` where that is more
    prompt: int = 64                # random weights: tokens of a prompt
    new_tokens: int = 48            # and new ones
    path_mode: Literal["full", "lora"] = "full"
    # training, on examples of GSM8K's lengths
    train_batch: int = 8
    train_prompt: int = 60          # mean tokens of a prompt
    train_answer: int = 96          # mean tokens of an answer; a batch holds similar lengths, as in train.py
    compile: bool = False           # training steps
    # machine
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of weights; training: of autocast
    seed: int = 0

    def __post_init__(self):
        at_least(self, repeats=1, prompt=1, new_tokens=1, texts=1, seed=0, stop=0, train_batch=1,
                 train_prompt=1, train_answer=1)
        for name, kind, low, high in (("steps", int, 1, 10 ** 4), ("draft", int, 0, 10 ** 4),
                                      ("batch", int, 1, 10 ** 6), ("acceptance", float, 0, 1)):
            try:
                fits = all(low <= x <= high for x in numbers(getattr(self, name), kind))
            except ValueError:
                fits = False
            require(fits, f"{name}={getattr(self, name)!r}, but it must be numbers from {low} to {high}, "
                    f"separated by commas, such as {getattr(Config, name)}")
        for a, b in (("prompt", "new_tokens"), ("train_prompt", "train_answer")):
            total, most = getattr(self, a) + getattr(self, b), SIZES[self.model].block_size
            require(total <= most, f"{a} + {b} = {total}, but {self.model} has {most} positions")


def numbers(text, kind=int):
    return sorted(set(map(kind, text.split(","))))


# --------------------------------------------------------------------------------------------- counted
def parameters(size, path):
    """How many parameters each part has; the path with one label, and none."""
    L, C, D, E, r = size.n_layer, size.n_embd, path.x_dim, path.t_dim, path.lora_rank
    n = {"trunk_blocks": L * (12 * C * C + 13 * C),
         "head": size.vocab_size * C,                                    # tied to the embedding
         "trunk_lora": L * r * 16 * C,
         "path_blocks": L * (10 * C * C + 11 * C),                       # no keys and values
         "path_lora": L * r * 14 * C,
         "modulation": L * (E * E + E + 6 * C * E + 6 * C),
         "W": C * D,
         "x_in": D * D + D + D * C + C,
         "t_in_label_w": 2 * (E * E + E) + 2 * E + (E * E + E + E * C)}
    n["trunk"] = n["trunk_blocks"] + n["head"] + size.block_size * C + 2 * C
    rest = n["modulation"] + n["W"] + n["x_in"] + n["t_in_label_w"]
    return n | {"l2d_full_path": n["path_blocks"] + rest, "l2d_lora_path": n["path_lora"] + rest}


def cost_of_a_pass(size, path, S):
    """FLOPs of a position at context S, and the numbers that all positions together read: weights, and keys
    and values of a row. Modulations and w_d come from a table."""
    n, L, C, D = parameters(size, path), size.n_layer, size.n_embd, path.x_dim
    lora, attention = n["path_lora"] * (path.path_mode == "lora"), 4 * L * S * C
    path_flops = 2 * (10 * L * C * C + D * D + D * C + lora) + attention
    kv, path_weights = 2 * L * C * S, n["path_blocks"] + n["x_in"] + lora
    return {"trunk": {"flops": 24 * L * C * C + attention, "weights": n["trunk_blocks"], "kv": kv},
            "path": {"flops": path_flops, "weights": path_weights, "kv": kv},
            "head": {"flops": 2 * n["head"], "weights": n["head"], "kv": 0}}


def least_seconds(cost, passes, n_bytes, bandwidth, flops):
    """The floor for {(part, positions, rows): how often}, as from passes_of; n_bytes: of a number."""
    return sum(times * max(n_bytes * (cost[part]["weights"] + rows * cost[part]["kv"]) / bandwidth,
                           positions * cost[part]["flops"] / flops)
               for (part, positions, rows), times in passes.items())


# -------------------------------------------------------------------------------------------- decoding
@contextmanager
def changed(share, ids, config):
    """Within it, the tokens that Algorithm 1 predicts are changed at a seeded share of the positions."""
    refine, u = decode.refine, decode.row_noise(ids, config, 0, "cpu")[1][:, :, 0]    # a position's own
    least = u.quantile(share).item() if share else 0.0

    def refine_and_change(*args):
        y, f = refine(*args)
        return torch.where(f.u[:, 0] < least, (y + 1) % f.latest.size(1), y), f
    decode.refine = refine_and_change
    try:
        yield
    finally:
        decode.refine = refine


def write(model, prompts, batch, eot, config, acceptance=1.0):
    """The Generated of every prompt, `batch` of them at once."""
    with changed(1 - acceptance, range(len(prompts)), config):
        return [o for i in range(0, len(prompts), batch)
                for o in generate(model, prompts[i:i + batch], eot, config, ids=range(i, i + batch))]


def transformers_gpt2(trunk, eot, max_new_tokens):
    """transformers' GPT-2 with the trunk's weights, as a function (prompts, batch) -> list of Generated."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        raise UserError("--baseline needs transformers: pip install -r requirements-dev.txt") from None
    c, weights = trunk.config, {f"transformer.{k}": v for k, v in trunk.state_dict().items()}
    for key in weights:
        if key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            weights[key] = weights[key].t()
    sizes = dict(vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer)
    gpt2 = GPT2LMHeadModel(GPT2Config(**sizes, n_head=c.n_head, bos_token_id=None, eos_token_id=None))
    gpt2.load_state_dict(weights | {"lm_head.weight": trunk.wte.weight})
    gpt2.eval().to(trunk.wte.weight.device, trunk.wte.weight.dtype)

    def write_texts(prompts, batch):
        out = []
        for rows in (prompts[i:i + batch] for i in range(0, len(prompts), batch)):
            longest = max(map(len, rows))                                # padded on the left
            idx = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=gpt2.device)
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]).to(idx)
            y = gpt2.generate(idx, attention_mask=mask, do_sample=False, use_cache=True, pad_token_id=0,
                              max_new_tokens=min(max_new_tokens, c.block_size - longest),
                              eos_token_id=eot if eot >= 0 else None)
            for tokens in y[:, longest:].tolist():
                n = tokens.index(eot) if eot in tokens else len(tokens)
                out.append(Generated(tokens[:n], eot in tokens, n + (eot in tokens)))
        return out
    return write_texts


def what_to_decode(config, device, dtype):
    """A model, its end of text, prompts(batch), and {name: (Decoding, acceptance)}, plain decoding first."""
    trained, size = bool(config.out_dir), SIZES[config.model]
    if trained:
        model, encoding, checkpoint = load(config.out_dir, "best", device.type, str(dtype)[6:])
        data = load_split(checkpoint["config"]["data_dir"], checkpoint["config"]["val_split"])
        ends = list(zip(data.offsets, data.offsets[1:]))[:max(config.texts, *numbers(config.batch))]
        texts = [data.tokens[a:b][:data.mask[a:b].argmax()].tolist() for a, b in ends]
        eot, n = encoding.eot_token, model.trunk.config.block_size
    else:
        model = random_pair(size, "frozen", config.path_mode, config.seed).requires_grad_(False)
        eot, n, rng = -1, config.new_tokens, np.random.default_rng(config.seed)
        model.to(device, dtype)
        texts = rng.integers(size.vocab_size, size=(max(numbers(config.batch)), config.prompt)).tolist()
    variants = {"plain": (Decoding(steps=1, max_new_tokens=n, draft=0), 1.0)}
    for T in [T for T in numbers(config.steps) if T > 1 and model.path is not None]:
        for stop in sorted({0.0, config.stop}) if trained else [0.0]:
            for draft in numbers(config.draft):
                for share in numbers(config.acceptance, float) if draft and not trained else [1.0]:
                    name = f"T={T}, drafts up to {draft}" if draft else f"T={T}, no drafts"
                    name += f", stop={stop}" * bool(stop) + f", {share:.0%} kept" * (bool(draft) > trained)
                    variants[name] = Decoding(steps=T, draft=draft, stop=stop, max_new_tokens=n), share
    return model, eot, lambda batch: texts[:max(batch, config.texts if trained else 1)], variants


def measure_decoding(config, device, dtype):
    """{batch: result}, printed as it comes: each variant beside plain decoding."""
    model, eot, prompts_of, variants = what_to_decode(config, device, dtype)
    plain, path, results = variants["plain"][0], getattr(model.path, "config", PathConfig()), {}
    baseline = transformers_gpt2(model.trunk, eot, plain.max_new_tokens) if config.baseline else None
    pack(model)
    for batch in numbers(config.batch):
        prompts = prompts_of(batch)
        runs = {name: partial(write, model, prompts, batch, eot, *v) for name, v in variants.items()}
        runs |= {"transformers": partial(baseline, prompts, batch)} if baseline else {}
        first = {name: passes_of(model, f) for name, f in runs.items()}          # warms up, too
        probe, work = probes(parameters(model.trunk.config, path)["trunk"], dtype, device)
        seconds, _ = alternate(runs | probe, config.repeats, device, f"batch {batch}")
        (bandwidth, flops), rows, must = peaks(seconds, work), {}, {}
        n_plain = sum(o.predicted for o in first["plain"][1])
        S = (sum(map(len, prompts)) + n_plain / 2) / len(prompts)                # mean context
        cost = cost_of_a_pass(model.trunk.config, path, S)
        for name, (passes, out) in first.items():
            decoding, share = variants.get(name, variants["plain"])
            reference = replace(decoding, draft=0) if config.out_dir else plain, share
            if reference not in must:
                name_of = {v: k for k, v in variants.items()}
                must[reference] = (first[name_of[reference]][1] if reference in name_of
                                   else write(model, prompts, batch, eot, *reference))
            floor = least_seconds(cost, passes or first["plain"][0], dtype.itemsize, bandwidth, flops)
            rows[name] = row_of(seconds[name], out, seconds["plain"], n_plain, floor)
            rows[name]["same"] = [o.tokens for o in out] == [o.tokens for o in must[reference]]
        results[batch] = {"rows": rows, "bytes_per_s": bandwidth, "flops_per_s": flops, "seconds": seconds}
        print(f"\ndecoding {config.out_dir or config.model}, batch {batch}, {len(prompts)} texts, {n_plain} "
              f"tokens, {str(dtype)[6:]}, {device}; {bandwidth / 1e9:.1f} GB/s, {flops / 1e12:.3f} TFLOP/s")
        print_table(rows)
    return results


def row_of(seconds, out, plain, n_plain, floor):
    """What the table says of a variant that took `seconds`, and plain decoding `plain` for n_plain tokens."""
    n, rounds, nfe, computed = np.sum([(o.predicted, o.rounds, o.nfe, o.computed) for o in out], 0).tolist()
    return {"tokens/s": spread(n / s for s in seconds),
            "x plain": spread(s / n / p * n_plain for s, p in zip(seconds, plain)),
            "a round": n / rounds if rounds else None, "NFE": nfe / n, "computed": computed / n,
            "floor": spread(floor / s for s in seconds)}


# -------------------------------------------------------------------------------------------- training
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


# ------------------------------------------------------------------------------------------------ main
def check_out(path):
    """Fail now, not after the work, where path cannot be written, or holds what is not ours."""
    if os.path.exists(path):
        try:
            with open(path, encoding="utf-8") as file:
                ours = "parameters" in json.load(file)
        except (OSError, ValueError, TypeError):
            ours = False
        require(ours, f"{path} was not written by bench.py and would be lost; choose another --out")
    write_file(f"{path}.probe", lambda file: file.write(b"{}"))
    os.unlink(f"{path}.probe")


def main(argv=None):
    config = configure(Config, argv, __doc__)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    require(config.decode or config.train or config.gpu_report, "decode=False leaves nothing to measure; add "
            "--train")
    check_out(config.out)
    counted = parameters(SIZES[config.model], PathConfig())
    print(f"{config.model}: " + ", ".join(f"{name} {n:,}" for name, n in counted.items()), flush=True)
    result = {"config": asdict(config), "threads": torch.get_num_threads(), "parameters": counted}
    if config.gpu_report:
        from gpu_report import check
        result["checks"] = check(config, device, dtype)
    if config.decode:
        result["decode"] = measure_decoding(config, device, dtype)
    if config.train or config.gpu_report:
        result["train"] = measure_training(config, device, dtype)
    result |= provenance(device)
    write_file(config.out, lambda file: file.write(json.dumps(result, indent=1).encode()))
    print(f"\n{result['machine']}, {result['threads']} threads, torch {result['torch']}; median [least, "
          f"greatest] of {config.repeats} repeats; written to {config.out}")
    failed = [f"check {name}" for name, (passed, _) in result.get("checks", {}).items() if not passed]
    if dtype == torch.float32 and device.type == "cpu":                  # elsewhere products round by shape
        failed += [f"the tokens of {name} at batch {batch}" for batch, r in result.get("decode", {}).items()
                   for name, row in r["rows"].items() if not row["same"]]
    require(not failed, f"not as it must be: {', '.join(failed)}")


if __name__ == "__main__":
    run(main)
