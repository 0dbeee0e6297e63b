"""
Texts: Algorithm 1 token after token, with the trunk's keys and values kept in a cache.

generate_one is the plain way: one prompt, one token at a time. Read it first. Tests compare the other ways
with it. generate_batch writes several texts side by side. speculate.py writes the same texts sooner, and is
what sample.py uses by default. Words, symbols and shapes are those of model.py.
"""
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from configurator import at_least
from diffusion import Denoiser, SamplerConfig, Tables, choose
from model import Context


@dataclass(frozen=True)
class DecodingConfig(SamplerConfig):  # `--help` prints the comments of this class
    # how a text is written
    max_new_tokens: int = 320
    draft: int = 16                 # most tokens that the trunk drafts at once; 0: none
    ahead: int = 1000               # most evaluations of a token in one pass; 0: one after another
    seed: int = 0
    graphs: Literal["auto", "on", "off"] = "auto"  # CUDA graphs. auto: on a GPU, but for adaptive and traces

    def __post_init__(self):
        super().__post_init__()
        at_least(self, max_new_tokens=1, draft=0, ahead=0, seed=0)


@dataclass
class Continuation:
    """What was written after one prompt, and what it cost."""
    tokens: list = field(default_factory=list)      # without the end of text
    ended: bool = False             # whether the end of text was written
    predicted: int = 0              # tokens predicted, the end of text included
    nfe: int = 0                    # path calls at the positions of these tokens
    computed: int = 0               # path calls in all, with those that speculation threw away
    passes: int = 0                 # how often the path ran for this row; the rows of a batch share a pass
    changes: int = 0                # how often the guess changed between two evaluations (speculate.py)
    rounds: int = 0                 # of drafting and refining, see speculate.py
    rejected: list = field(default_factory=list)    # indices of the tokens that differ from their draft
    trace: list = field(default_factory=list)       # per token, (t, guess, probability) of each evaluation

    def add(self, token, eot, nfe, trace=None):
        """Add a predicted token, which took nfe path calls."""
        self.ended = token == eot
        self.tokens += [] if self.ended else [token]
        self.predicted += 1
        self.nfe += nfe
        self.trace += [trace] if trace is not None else []


# ---------------------------------------------------------------------------------------- the plain way
@torch.no_grad()
def generate_one(model, prompt, eot, config, group=None, text_id=0, trace=False, tables=None,
                 denoise=Denoiser):
    """Continue one prompt until the end of text, each token by Algorithm 1. Returns a Continuation.

    prompt: a non-empty list of token ids. eot: the id that ends a text. config: a DecodingConfig. group: a
    guidance group, None for none. text_id: with config.seed it determines the noise. trace: keep the guesses
    of every token. tables: Tables of the model, which several texts may share. denoise: the class that
    evaluates; for --stop and the adaptive solver that of adaptive.py.
    """
    assert model.path is not None or config.steps == 1, "without a path T must be 1"
    config = fit_to_trunk(config, model)
    device = model.trunk.wte.weight.device
    if tables is None and config.steps > 1:
        tables = Tables(model)
    x_0, u = draw_noise(model, [text_id], config)                 # x_0: (1, max_new_tokens, D)
    group = torch.tensor([model.no_group if group is None else group], device=device)
    # a prompt that fills all positions still predicts one token
    n_places = model.trunk.config.block_size - len(prompt) + 1
    out = Continuation()

    idx = torch.tensor([prompt], device=device)                   # (1, S)
    pos = torch.arange(len(prompt), device=device)[None]          # (1, S)
    h, kv = model.trunk(idx)                                      # (1, S, C)
    cache = Cache(kv)
    for n in range(min(config.max_new_tokens, n_places)):
        c = Context(h[:, -1], idx[:, -1], pos[:, -1], kv)         # of the last token: N = 1
        f = denoise(model, config, tables, c, group, x_0[:, n], u[:, n], trace=trace)
        logits = f.predict()                                      # (1, V_size), by Algorithm 1
        y = choose(logits, u[:, n, 0], config.temperature, config.top_k)
        out.add(y.item(), eot, f.nfe.item(), f.trace and f.trace[0])
        if out.ended or n + 1 == n_places:
            break
        idx = y[:, None]                                          # (1, 1)
        pos = pos[:, -1:] + 1
        kv = cache.first(len(prompt) + n + 1)                     # room for one more position
        h, _ = model.trunk(idx, pos, kv)                          # (1, 1, C); writes into the cache
    out.computed = out.passes = out.nfe
    out.rounds = out.predicted
    return out


class Cache:
    """The trunk's keys and values, with room for positions to come.

    kv: L tuples (k, v), each (B, H, S, C/H). final: the S that it may reach, if it is to grow only once.
    """
    def __init__(self, kv, final=0):
        self.kv = kv
        self.final = final

    def first(self, S):
        """kv of the first S positions. The tensors are views, into which the trunk may write."""
        known = self.kv[0][0].size(2)
        if S > known:                                             # grow by 7 more: most tokens need no copy
            room = (0, 0, 0, max(S + 7, self.final) - known)
            self.kv = [(F.pad(k, room), F.pad(v, room)) for k, v in self.kv]
        return [(k[:, :, :S], v[:, :, :S]) for k, v in self.kv]

    def keep(self, i):
        """Drop all rows but i (n,)."""
        self.kv = [(k[i], v[i]) for k, v in self.kv]


def fit_to_trunk(config, model):
    """The DecodingConfig with max_new_tokens no larger than the trunk's number of positions."""
    return replace(config, max_new_tokens=min(config.max_new_tokens, model.trunk.config.block_size))


def draw_noise(model, ids, config):
    """x_0 (B, max_new_tokens, D) and uniform numbers u (B, max_new_tokens, 1 or T + 1) of the texts ids.

    Each text has its own generator, so it draws the same numbers whatever else is in its batch. Column 0 of u
    chooses the token; the other T columns exist only where guesses are sampled. For T = 1 D is 0.
    """
    device = model.trunk.wte.weight.device
    n = config.max_new_tokens
    path_config = model.path.config if config.steps > 1 else None
    x_0 = []
    u = []
    for i in ids:
        generator = torch.Generator().manual_seed((config.seed * 1_000_003 + i) % 2 ** 63)
        u.append(torch.rand(n, 1, generator=generator))
        x_0.append(torch.randn(n, path_config.x_dim if path_config else 0, generator=generator))
        if config.guess == "sample":
            of_guesses = torch.rand(n, config.steps, generator=generator)
            u[-1] = torch.cat([u[-1], of_guesses], 1)
    sigma = path_config.sigma if path_config else 1.0
    return sigma * torch.stack(x_0).to(device), torch.stack(u).to(device)


def denoiser_class(config):
    """The class that evaluates for this SamplerConfig: Denoiser, unless positions go separate ways."""
    if config.times_are_known and not config.stop:
        return Denoiser
    from adaptive import AdaptiveDenoiser  # here, since few runs need it
    return AdaptiveDenoiser


# ------------------------------------------------------------------------------------ many prompts at once
@dataclass
class Rows:
    """The B texts that are still being written."""
    out: list                       # the Continuation of each
    positions: list                 # the position of each row's last token; a list, as shapes depend on it
    token: torch.Tensor             # (B,) that token
    h: torch.Tensor                 # (B, C) the trunk's hidden state there (in speculate.py None: not known)
    group: torch.Tensor             # (B,) guidance groups
    x_0: torch.Tensor               # (B, max_new_tokens, D)
    u: torch.Tensor                 # (B, max_new_tokens, 1 or T + 1)
    cache: Cache

    def keep(self, rows):
        """Go on with these rows only, a list of indices."""
        i = torch.tensor(rows, dtype=torch.long, device=self.token.device)
        self.out = [self.out[r] for r in rows]
        self.positions = [self.positions[r] for r in rows]
        self.token = self.token[i]
        self.group = self.group[i]
        self.x_0 = self.x_0[i]
        self.u = self.u[i]
        self.cache.keep(i)

    def drop_finished(self, config, block_size):
        """Go on with the rows that have not ended and still have room."""
        going = [i for i, (out, position) in enumerate(zip(self.out, self.positions))
                 if not out.ended and out.predicted < config.max_new_tokens and position < block_size]
        if len(going) < len(self.out):
            self.keep(going)

    def visible(self, pos, last):
        """kv and mask for queries at the positions pos (B, Q): each sees the keys up to its own position.

        last: the greatest of these positions. mask: (B, 1, Q, S), or None where every query sees every key.
        """
        S = last + 1
        kv = self.cache.first(S)
        if pos.size(1) == 1 and len(set(self.positions)) == 1:
            return kv, None
        return kv, make_mask(pos, S)


def make_mask(pos, S):
    """(B, 1, Q, S): each query sees the keys up to its own position, pos (B, Q)."""
    return (torch.arange(S, device=pos.device) <= pos[:, :, None])[:, None]


def count_from(first, K, device):
    """(B, K): first[i], first[i] + 1, ... in row i."""
    return torch.tensor(first, device=device)[:, None] + torch.arange(K, device=device)


def read_prompts(model, prompts, config, group, ids):
    """Run the trunk over the prompts. Returns the Rows before their first new token.

    Prompts are padded on the right. That changes nothing: a row sees only keys up to its own position, and it
    overwrites the padding as it grows.
    """
    device = model.trunk.wte.weight.device
    positions = [len(prompt) - 1 for prompt in prompts]
    idx = pad_sequence([torch.tensor(p) for p in prompts], batch_first=True).to(device)        # (B, S)
    rows = torch.arange(len(prompts), device=device)
    c = model.read_context(idx, (rows, torch.tensor(positions, device=device)))
    x_0, u = draw_noise(model, ids, config)
    group = torch.tensor(group or [model.no_group] * len(prompts), device=device)
    out = [Continuation() for _ in prompts]
    # A GPU's allocator would keep every size that a growing cache has had.
    final = max(positions) + config.max_new_tokens + config.draft if device.type == "cuda" else 0
    return Rows(out, positions, c.token, c.h, group, x_0, u, Cache(c.kv, final))


@torch.no_grad()
def generate_batch(model, prompts, eot, config, group=None, ids=None, trace=False, tables=None):
    """Continue B prompts of any lengths side by side. Each gets the text that generate_one writes for it.

    group: B guidance groups, or None for none. ids: the text_id of each, by default 0 to B - 1. Rows that
    have ended leave the batch. Returns B Continuations. Other arguments as in generate_one.
    """
    assert model.path is not None or config.steps == 1, "without a path T must be 1"
    config = fit_to_trunk(config, model)
    if tables is None and config.steps > 1:
        tables = Tables(model)
    denoise = denoiser_class(config)
    rows = read_prompts(model, prompts, config, group, ids or range(len(prompts)))
    out = rows.out                                                # of all; rows.out loses those that end
    n = 0                                                         # new tokens of every row so far
    while rows.out:
        pos = torch.tensor(rows.positions, device=rows.token.device)[:, None]             # (B, 1)
        kv, mask = rows.visible(pos, max(rows.positions))
        if n > 0:
            h, _ = model.trunk(rows.token[:, None], pos, kv, mask)                        # (B, 1, C)
            rows.h = h[:, 0]
        c = Context(rows.h, rows.token, pos[:, 0], kv, mask=mask)                         # N = B
        f = denoise(model, config, tables, c, rows.group, rows.x_0[:, n], rows.u[:, n], trace=trace)
        logits = f.predict()                                      # (B, V_size), by Algorithm 1
        rows.token = choose(logits, rows.u[:, n, 0], config.temperature, config.top_k)
        for i, (token, nfe) in enumerate(zip(rows.token.tolist(), f.nfe.tolist())):
            rows.out[i].add(token, eot, nfe, f.trace and f.trace[i])
            rows.out[i].computed += nfe
            rows.out[i].passes += nfe
            rows.out[i].rounds += 1
            rows.positions[i] += 1
        rows.drop_finished(config, model.trunk.config.block_size)
        n += 1
    return out


# --------------------------------------------------------------------------------------- texts that are known
@torch.no_grad()
def predict_given(model, idx, at, config, generator, group=None):
    """Predict tokens of a known text, each from its true context, all at once ("teacher-forced").

    idx: (B, S) token ids. at: (rows, columns), each (N,): where the next token is predicted. config: a
    SamplerConfig. generator: draws the noise. group: (B,) or None. Returns the logits (N, V_size) of
    Algorithm 1 and the path calls (N,).
    """
    c = model.read_context(idx, at)
    N = len(at[0])
    group = torch.full_like(at[0], model.no_group) if group is None else group[at[0]]
    tables = None
    x_0 = None
    if config.steps > 1:
        tables = Tables(model)
        path_config = model.path.config
        x_0 = torch.randn(N, path_config.x_dim, generator=generator, device=idx.device)
        x_0 = path_config.sigma * x_0
    u = torch.rand(N, config.steps + 1, generator=generator, device=idx.device)
    f = denoiser_class(config)(model, config, tables, c, group, x_0, u)
    return f.predict(), f.nfe
