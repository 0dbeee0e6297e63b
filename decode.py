"""
Texts: Algorithm 1 position after position, with the trunk's key-value cache, for prompts of any lengths
at once.

The trunk drafts. In a *round* the trunk writes K tokens by plain decoding. Then Algorithm 1 runs at the K
positions together, each path call over all of them. Kept is the longest prefix on which its tokens equal the
drafted ones, and the first that differs. K = 1 is Algorithm 1 token by token.

Why the text is the same for every K. A path call at position k reads x_t of k, the trunk's keys and values at
positions <= k, and nothing else. Its noise and uniform numbers are fixed by (seed, row, position),
max_new_tokens and steps. So a prediction depends on the tokens before it alone, and every token kept
had the right ones before it. What is wasted: trunk passes and path calls behind the first token that differs.
What is gained: the path reads its weights once for K positions. It is speculative decoding (Leviathan et al.
2023) whose draft model is the trunk itself, whose passes over the tokens kept were needed anyway.
"""
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from configurator import at_least
from denoiser import Denoiser, Tables, choose
from diffusion import Sampler, predict
from model import Context

HALF = 32               # a pass over n positions takes about (1 + n / HALF) times one over a single position


@dataclass(frozen=True)
class Decoding(Sampler):
    # how a text is written
    max_new_tokens: int = 320
    draft: int = 16                 # tokens the trunk drafts in a round, at most; 0 = none (deviation 14)
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        at_least(self, max_new_tokens=1, draft=0, seed=0)


@dataclass
class Generated:
    """One row of generate: its new tokens without the end of text, whether it ended, and what it cost."""
    tokens: list = field(default_factory=list)
    ended: bool = False
    predicted: int = 0              # tokens predicted, the end of text included
    nfe: int = 0                    # path calls at the positions of these tokens
    computed: int = 0               # path calls in all, those behind a rejected token of a draft included
    rounds: int = 0
    rejected: list = field(default_factory=list)    # indices of the tokens that differ from the draft
    trace: list = field(default_factory=list)       # per token, (t, guess, probability) of each evaluation


@dataclass
class Rows:
    """The B rows that are still being written."""
    out: list                       # the Generated of each
    positions: list                 # the position of token, as numbers: shapes and masks depend on them
    token: torch.Tensor             # (B,) the last token known
    h: torch.Tensor | None          # (B, C) the trunk's state there; None: the trunk has not read it yet
    label: torch.Tensor             # (B,) guidance labels
    x_0: torch.Tensor               # (B, max_new_tokens, D)
    u: torch.Tensor                 # (B, max_new_tokens, steps + 1)
    cache: list                     # L pairs (k, v), each (B, H, S or more, C/H)

    def keep(self, rows):
        """Only these rows go on."""
        i = torch.tensor(rows, dtype=torch.long, device=self.token.device)
        self.out, self.positions = [self.out[r] for r in rows], [self.positions[r] for r in rows]
        self.token, self.label, self.x_0, self.u = self.token[i], self.label[i], self.x_0[i], self.u[i]
        self.cache = [(k[i], v[i]) for k, v in self.cache]

    def grow(self, S):
        """Room for S positions in the cache, and 7 to spare: a CPU reads a small one faster."""
        if S > self.cache[0][0].size(2):
            self.cache = [tuple(F.pad(z, (0, 0, 0, S + 7 - z.size(2))) for z in pair) for pair in self.cache]

    def keys(self, ahead, pos):
        """kv (views), and mask (B, 1, Q, S) or None, for queries at pos (B, Q), position + ahead and on."""
        S = max(self.positions) + ahead + pos.size(1)
        kv = [(k[:, :, :S], v[:, :, :S]) for k, v in self.cache]
        if pos.size(1) == 1 and min(self.positions) == max(self.positions):  # every row sees all S keys
            return kv, None
        return kv, (torch.arange(S, device=pos.device) <= pos[:, :, None])[:, None]

    def count_from(self, first, K):
        """first, first + 1, ..., K numbers for each row: (B, K)."""
        device = self.token.device
        return torch.tensor(first, device=device)[:, None] + torch.arange(K, device=device)


class Draft(NamedTuple):
    """What the trunk wrote at K positions of each row, and what it read there."""
    y: torch.Tensor                 # (B, K) the tokens
    logits: torch.Tensor            # (B, K, V_size) it chose them from: the first evaluation of Algorithm 1
    token: torch.Tensor             # (B, K) the token before each
    h: torch.Tensor                 # (B, K, C) the trunk's state there
    pos: torch.Tensor               # (B, K) the position there
    n: torch.Tensor                 # (B, K) the index of y among the new tokens of its row
    valid: torch.Tensor             # (B, K) bool: not behind a drafted end of text, nor beyond max_new_tokens


def row_noise(ids, config, x_dim, device):
    """x_0 / sigma (B, max_new_tokens, x_dim) and uniforms u (B, max_new_tokens, steps + 1) of the rows ids.

    Every row has its own generator, so that it draws the same whatever else is in its batch. u[:, :, 0], for
    the final choice, and x_0 come first, so that they are the same for every number of steps.
    """
    x_0, u, n = [], [], config.max_new_tokens
    for i in ids:
        generator = torch.Generator().manual_seed((config.seed * 1_000_003 + i) % 2 ** 63)
        choice = torch.rand(n, 1, generator=generator)
        x_0.append(torch.randn(n, x_dim, generator=generator))
        u.append(torch.cat([choice, torch.rand(n, config.steps, generator=generator)], 1))
    return torch.stack(x_0).to(device), torch.stack(u).to(device)


def read_prompts(model, prompts, config, label, ids):
    """The Rows before the first round. Prompts are padded on the right: a row sees only keys up to its own
    position, and overwrites the padding as it grows."""
    device, positions = model.trunk.wte.weight.device, [len(prompt) - 1 for prompt in prompts]
    idx = pad_sequence([torch.tensor(p) for p in prompts], batch_first=True).to(device)        # (B, P)
    c = model.read(idx, (torch.arange(len(prompts), device=device), torch.tensor(positions, device=device)))
    D, sigma = (model.path.config.x_dim, model.path.config.sigma) if config.steps > 1 else (0, 1.0)
    x_0, u = row_noise(ids, config, D, device)
    label = torch.tensor(label, device=device)
    return Rows([Generated() for _ in prompts], positions, c.token, c.h, label, sigma * x_0, u, c.kv)


def write_draft(model, rows, K, eot, config):
    """A Draft of K tokens by plain decoding. Their keys and values are written into the cache."""
    token, h, columns = rows.token, rows.h, []
    pos, n = rows.count_from(rows.positions, K), rows.count_from([o.predicted for o in rows.out], K)
    beyond, n = n >= config.max_new_tokens, n.clamp(max=config.max_new_tokens - 1)
    u = rows.u[:, :, 0].gather(1, n)
    for j in range(K):
        if h is None:
            here = pos[:, j:j + 1]
            h = model.trunk(token[:, None], here, *rows.keys(j, here))[0][:, 0]  # fills the cache
        logits = model.trunk.head(h).float()                      # (B, V_size)
        y = choose(logits, u[:, j], config.temperature, config.top_k)
        columns.append((y, logits, token, h))
        token, h = y, None
    y, logits, token, h = (torch.stack(column, 1) for column in zip(*columns))
    ends = (y == eot).long()
    return Draft(y, logits, token, h, pos, n, ~beyond & (ends.cumsum(1) == ends))


def refine(model, rows, draft, tables, config, trace):
    """Algorithm 1 at the N valid positions of a draft, all at once: its tokens (N,), and the Denoiser."""
    at = None if draft.valid.all() else draft.valid.nonzero(as_tuple=True)  # (rows, columns), each (N,)
    flat = (lambda z: z.flatten(0, 1)) if at is None else (lambda z: z[at])
    kv, mask = rows.keys(0, draft.pos)
    c = Context(flat(draft.h), flat(draft.token), flat(draft.pos), kv, at, mask)
    own = torch.arange(len(draft.n), device=draft.n.device)[:, None], draft.n
    u, x_0 = flat(rows.u[own]), flat(rows.x_0[own])               # (N, steps + 1), (N, D)
    label = flat(rows.label[:, None].expand_as(draft.n))
    f = Denoiser(model, config, tables, c, label, x_0, u, flat(draft.logits), trace)
    return choose(predict(f), u[:, 0], config.temperature, config.top_k), f


def accept(rows, draft, y, f, eot):
    """Write what a round has settled into the rows: y (N,), up to the first that differs from the draft."""
    grid = torch.stack([draft.y, draft.y, torch.zeros_like(draft.y)])  # drafted, refined, path calls
    grid[1:, draft.valid] = torch.stack([y, f.nfe])
    drafted, refined, nfe = grid.tolist()                         # one transfer
    traces, n_kept = iter(f.trace or ()), []
    for row, (out, n_valid) in enumerate(zip(rows.out, draft.valid.sum(1).tolist())):
        differs = [j for j in range(n_valid) if refined[row][j] != drafted[row][j]]
        kept = differs[0] + 1 if differs else n_valid             # the first that differs had a right context
        out.rejected += [out.predicted + kept - 1] if differs else []
        out.trace += list(islice(traces, n_valid))[:kept]
        out.tokens += refined[row][:kept]
        out.predicted += kept
        out.nfe += sum(nfe[row][:kept])
        out.computed += sum(nfe[row])
        out.rounds += 1
        if out.tokens[-1] == eot:
            out.tokens.pop()
            out.ended = True
        rows.positions[row] += kept
        n_kept.append(kept)
    last = torch.tensor(n_kept, device=y.device)[:, None] - 1
    rows.token, rows.h = grid[1].gather(1, last)[:, 0], None


def next_length(out, config):
    """The length K of the next draft, at most config.draft, by which a token should take the least time.

    out: the Generated of the B rows. Of the tokens so far a share a was as drafted, so a draft of K gives
    (1 - a^K) / (1 - a) tokens on average. It takes K trunk passes over B positions, and as many path calls
    over K B positions as a token took so far. Ten tokens are assumed to have come before, nine as drafted.
    """
    B, n = len(out), 10 + sum(o.predicted for o in out)
    differ = (1 + sum(len(o.rejected) for o in out)) / n          # 1 - a
    calls = (10 * (config.steps - 1) + sum(o.nfe for o in out)) / n

    def time_per_token(K):
        return (K * (1 + B / HALF) + calls * (1 + K * B / HALF)) * differ / (1 - (1 - differ) ** K)
    return min(range(1, max(1, min(config.draft, config.max_new_tokens)) + 1), key=time_per_token)


@torch.no_grad()
def generate(model, prompts, eot, config, label=None, ids=None, trace=False):
    """Continue each prompt until the end of text, each token by Algorithm 1, in rounds (see above).

    prompts: B non-empty lists of token ids, of any lengths; eot: the id that ends a text; config: a Decoding;
    label: B guidance labels, or None for none; ids: B integers, 0..B-1 by default: what row i draws depends
    on (seed, ids[i], max_new_tokens, steps) alone. A row is cut where block_size is reached. Rows that have
    ended leave the batch. Returns B Generated; with trace, each says how its guesses changed.
    """
    assert model.path is not None or config.steps == 1, "without a path there is only steps = 1"
    B, block_size = len(prompts), model.trunk.config.block_size
    config = replace(config, max_new_tokens=min(config.max_new_tokens, block_size))
    rows = read_prompts(model, prompts, config, label or [model.no_label] * B, ids or range(B))
    tables = Tables(model) if config.steps > 1 else None
    out = rows.out                                                # of all; rows.out loses those that end
    while rows.out:
        K = 1 if config.steps == 1 else min(next_length(rows.out, config), block_size - max(rows.positions))
        rows.grow(max(rows.positions) + K)
        draft = write_draft(model, rows, K, eot, config)
        y, f = refine(model, rows, draft, tables, config, trace)
        accept(rows, draft, y, f, eot)
        going = [i for i, (o, p) in enumerate(zip(rows.out, rows.positions))
                 if not o.ended and o.predicted < config.max_new_tokens and p < block_size]
        if len(going) < len(rows.out):
            rows.keep(going)
    return out
