"""
What decoding costs, counted, and measured beside plain decoding. bench/__main__.py explains the columns.
"""
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import numpy as np
import torch

import decode
import diffusion
import speculate
from bench.baseline import make_baseline
from bench.costs import count_parameters, count_pass, count_passes, least_seconds
from bench.models import SIZES, random_pair
from bench.timing import best_speeds, make_probes, print_table, spread, time_by_turns
from decode import DecodingConfig
from diffusion import Tables
from fast.ahead import LookAhead
from model import L2D, PathConfig
from plumbing.dataset import load_split
from plumbing.packed import pack
from plumbing.trained import load


def parse_numbers(text, kind=int):
    """The numbers in a text such as "1,8", in ascending order."""
    return sorted(set(map(kind, text.split(","))))


# ------------------------------------------------------------------------------------- the share accepted
@contextmanager
def changed_tokens(share, model, ids, config):
    """Within this context Algorithm 1 predicts other tokens at about this share of the positions.

    The random numbers of each text (ids) say which, so every way of decoding changes the same ones. What the
    trunk drafts stays as it is, so that a changed token differs from its draft.
    """
    u = decode.draw_noise(model, ids, config)[1][:, :, 0]         # a number for each text and position
    least = u.quantile(share).item() if share else 0.0
    n_vocab = model.trunk.config.vocab_size
    choose = decode.choose
    accept = speculate.accept

    def change(y, u):
        return torch.where(u < least, (y + 1) % n_vocab, y)

    def choose_and_change(logits, u, *options):
        return change(choose(logits, u, *options), u)

    def change_and_accept(rows, grid, *rest):
        u = rows.u if rows.u is not None else rows.store.u[rows.places]          # (B, tokens, ...)
        n = decode.count_from([out.predicted for out in rows.out], grid.size(2), u.device)
        u = u[:, :, 0].gather(1, n.clamp(max=u.size(1) - 1)).to(grid.device)     # (B, K)
        grid[2] = change(grid[2], u)                              # the refined tokens
        accept(rows, grid, *rest)
    decode.choose = choose_and_change
    speculate.accept = change_and_accept
    try:
        yield
    finally:
        decode.choose = choose
        speculate.accept = accept


@contextmanager
def changed_guesses(share, model):
    """Within this context the guess is another one from the first path call on, at this share of positions.

    The tokens that are chosen in the end stay as they are. Not for the adaptive solver and --stop, nor for
    CUDA graphs, which hold what pick did when they were recorded.
    """
    if share == 0:
        yield
        return
    n_vocab = model.trunk.config.vocab_size
    one_by_one = diffusion.Denoiser.pick
    ahead = LookAhead.pick
    finish = LookAhead.finish

    def change(guess, u, after_first):
        return torch.where(after_first & (u > 1 - share), (guess + 1) % n_vocab, guess)

    def pick(self, logits):
        return change(one_by_one(self, logits), self.u[:, 0], torch.tensor(self.n_evaluations > 1))

    def pick_ahead(self, logits, e, n=slice(None)):
        return change(ahead(self, logits, e, n), self.u[n, 0], e > 0)

    def finish_unchanged(self, s, *args):                         # a greedy token is its last guess
        new = finish(self, s, *args)
        y = torch.where(new.done & ~s.done & (self.u[:, 0] > 1 - share), (new.y - 1) % n_vocab, new.y)
        return new._replace(y=y)
    diffusion.Denoiser.pick = pick
    LookAhead.pick = pick_ahead
    LookAhead.finish = finish_unchanged
    try:
        yield
    finally:
        diffusion.Denoiser.pick = one_by_one
        LookAhead.pick = ahead
        LookAhead.finish = finish


def write(model, prompts, batch, eot, config, acceptance=1.0, changes=0.0, tables=None):
    """The Continuation of every prompt, `batch` of them at once.

    acceptance: share of tokens that are not changed. changes: share of tokens whose guess is. tables: the
    Tables of the model, made once for all batches.
    """
    out = []
    ids = range(len(prompts))
    with changed_tokens(1 - acceptance, model, ids, config), changed_guesses(changes, model):
        for i in range(0, len(prompts), batch):
            out += speculate.generate(model, prompts[i:i + batch], eot, config, ids=range(i, i + batch),
                                      tables=tables)
    return out


# ------------------------------------------------------------------------------------------ what to decode
@dataclass
class Job:
    """A model, and the ways to decode with it."""
    model: L2D
    eot: int
    texts: list                     # prompts, lists of token ids
    least_texts: int                # prompts to decode, where the batch is not larger
    variants: dict                  # {name: (DecodingConfig, acceptance, changes)}, "plain" first

    def prompts(self, batch):
        return self.texts[:max(batch, self.least_texts)]


def choose_job(config, device, dtype):
    """The Job that the options ask for. Raises UserError where a trained run cannot be read."""
    if config.out_dir:
        return trained_job(config, device, dtype)
    size = SIZES[config.model]
    # w_d is 0, so Algorithm 1 writes what plain decoding writes, at every T
    model = random_pair(size, "frozen", config.path_mode, config.seed, path_init="paper")
    model.requires_grad_(False).to(device, dtype)
    rng = np.random.default_rng(config.seed)
    n_texts = max(parse_numbers(config.batch))
    texts = rng.integers(size.vocab_size, size=(n_texts, config.prompt)).tolist()
    shares = parse_numbers(config.acceptance, float)
    changes = parse_numbers(config.changes, float)
    variants = make_variants(config, {"max_new_tokens": config.new_tokens}, [0.0], shares, changes)
    return Job(model, -1, texts, 1, variants)


def trained_job(config, device, dtype):
    """The Job of a trained run: its best.pt, the solver that it asks for, prompts of its validation data."""
    model, encoding, checkpoint = load(config.out_dir, "best", device.type, str(dtype)[6:])
    data = load_split(checkpoint["config"]["data_dir"], checkpoint["config"]["val_split"])
    n_texts = max(config.texts, *parse_numbers(config.batch))
    texts = []
    for first, end in list(zip(data.offsets, data.offsets[1:]))[:n_texts]:
        n_prompt = data.mask[first:end].argmax()
        texts.append(data.tokens[first:first + n_prompt].tolist())
    options = checkpoint["sampler"] | {"max_new_tokens": model.trunk.config.block_size}
    if model.path is None:
        config = replace(config, steps="1")
    variants = make_variants(config, options, sorted({0.0, config.stop}), None, [0.0])
    return Job(model, encoding.eot_token, texts, config.texts, variants)


def make_variants(config, options, stops, shares, changes):
    """{name: (DecodingConfig, acceptance, changes)}, "plain" first.

    shares: of drafts that are kept, None for the model's own. changes: shares of tokens whose guess changes.
    """
    variants = {"plain": (DecodingConfig(steps=1, draft=0, ahead=0, **options), 1.0, 0.0)}
    steps = [T for T in parse_numbers(config.steps) if T > 1]
    drafts = parse_numbers(config.draft)
    for T, stop, draft, ahead in product(steps, stops, drafts, parse_numbers(config.ahead)):
        decoding = DecodingConfig(steps=T, draft=draft, ahead=ahead, stop=stop, **options)
        name = f"T={T}, drafts up to {draft}" if draft else f"T={T}, no drafts"
        if ahead:
            name += f", ahead up to {ahead}"
        if stop:
            name += f", stop={stop}"
        for change in changes:
            new = f", {change:.0%} changing" if change else ""
            decoding = replace(decoding, graphs="off" if change else "auto")
            if draft and shares:
                variants |= {f"{name}, {share:.0%} kept{new}": (decoding, share, change) for share in shares}
            else:
                variants[name + new] = decoding, 1.0, change
    return variants


# ------------------------------------------------------------------------------------------------ measured
def measure_decoding(config, device, dtype):
    """Measure each variant beside plain decoding. Prints each table, and yields (batch, result)."""
    job = choose_job(config, device, dtype)
    plain, _, _ = job.variants["plain"]
    baseline = make_baseline(job.model.trunk, job.eot, plain.max_new_tokens) if config.baseline else None
    pack(job.model)
    for batch in parse_numbers(config.batch):
        yield batch, measure_batch(config, job, batch, baseline, device, dtype)


def measure_batch(config, job, batch, baseline, device, dtype):
    """The result of measure_decoding for one size of batch."""
    model = job.model
    prompts = job.prompts(batch)
    tables = Tables(model) if model.path is not None else None
    runs = {name: partial(write, model, prompts, batch, job.eot, *variant, tables)
            for name, variant in job.variants.items()}
    if baseline:
        runs["transformers"] = partial(baseline, prompts, batch)
    passes = {}
    out = {}
    for name, f in runs.items():
        f()                                                       # warms up, and may measure what calls cost
        passes[name], out[name] = count_passes(model, f)
    passes["transformers"] = passes["plain"]                      # it has no modules of ours to count
    size = model.trunk.config
    path = model.path.config if model.path is not None else PathConfig()
    probes, work = make_probes(count_parameters(size, path)["trunk"], dtype, device)
    seconds, _ = time_by_turns(runs | probes, config.repeats, device, f"batch {batch}")
    bytes_per_s, flops_per_s = best_speeds(seconds, work)

    n_plain = sum(text.predicted for text in out["plain"])
    mean_context = (sum(map(len, prompts)) + n_plain / 2) / len(prompts)
    cost = count_pass(size, path, mean_context)
    same = compare_tokens(config, job, prompts, batch, out)
    rows = {}
    for name in runs:
        decoding, _, _ = job.variants.get(name, job.variants["plain"])
        floor = least_seconds(cost, passes[name], dtype.itemsize, bytes_per_s, flops_per_s)
        if speculate.in_fixed_shapes(model, decoding, False):     # a graph's passes are not seen
            floor = None
        rows[name] = make_row(seconds[name], out[name], seconds["plain"], n_plain, floor)
        rows[name]["same"] = same[name]
    print(f"\ndecoding {config.out_dir or config.model}, batch {batch}, {len(prompts)} texts, {n_plain} "
          f"tokens, {str(dtype)[6:]}, {device}; {bytes_per_s / 1e9:.1f} GB/s, "
          f"{flops_per_s / 1e12:.3f} TFLOP/s")
    print_table(rows)
    return {"rows": rows, "bytes_per_s": bytes_per_s, "flops_per_s": flops_per_s, "seconds": seconds}


def compare_tokens(config, job, prompts, batch, out):
    """{variant: whether it wrote the tokens that it must}.

    A trained run must write what Algorithm 1 writes without drafts. With random weights every T must write
    what plain decoding does, with the same tokens changed.
    """
    plain, _, _ = job.variants["plain"]
    known = {variant: out[name] for name, variant in job.variants.items()}
    same = {}
    for name in out:
        decoding, share, _ = job.variants.get(name, job.variants["plain"])
        reference = replace(decoding, draft=0, ahead=0) if config.out_dir else plain, share, 0.0
        if reference not in known:
            known[reference] = write(job.model, prompts, batch, job.eot, *reference)
        same[name] = [text.tokens for text in out[name]] == [text.tokens for text in known[reference]]
    return same


def make_row(seconds, out, plain, n_plain, floor):
    """A row of the table. seconds: of the variant. plain: of plain decoding, which wrote n_plain tokens."""
    n = sum(text.predicted for text in out)
    rounds = sum(text.rounds for text in out)
    return {
        "tokens/s": spread(n / s for s in seconds),
        "x plain": spread(s / n / p * n_plain for s, p in zip(seconds, plain)),
        "a round": n / rounds if rounds else None,
        "NFE": sum(text.nfe for text in out) / n,
        "computed": sum(text.computed for text in out) / n,
        "passes": sum(text.passes for text in out) / n,
        "floor": spread(floor / s for s in seconds) if floor is not None else None,
    }
