"""
What decoding costs: counted, and measured beside plain decoding. bench.py says what the columns mean.
"""
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import torch

import decode
from checkpoint import load
from configurator import UserError
from decode import Decoding, Generated, generate
from measure import SIZES, alternate, numbers, passes_of, peaks, print_table, probes, spread
from measure.memory import random_pair
from model import PathConfig
from packed import pack
from prepare_data import load_split


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
