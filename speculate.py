"""
The same texts sooner: the trunk drafts several tokens, and the path checks them all at once.

The paper does not have this (deviation 14). One *round* goes so:
    1. draft   The trunk writes K tokens by plain decoding (T = 1), one after the other.
    2. refine  Algorithm 1 runs at these K positions together. Each path call serves all of them.
    3. accept  We compare refined and drafted tokens from left to right. Those that agree are kept, and so is
               the first that differs, in its refined form. What lies behind it is thrown away.

Why the text does not change. A path call at position k reads x_t of k and the trunk's keys and values at
positions up to k. Its noise is fixed by the seed, the text and the position. So a prediction depends only on
the tokens before it. Every token that is kept was predicted after the same tokens as in decode.py.

What is gained: the path's weights are read once for K positions. What is wasted: the trunk passes and path
calls behind the first token that differs. This is speculative decoding (Leviathan et al. 2023). The draft
model is the trunk itself, whose passes over the kept tokens are needed anyway.
"""
from typing import NamedTuple

import torch

import decode
from adaptive import denoiser_class
from decode import fit_to_trunk, read_prompts
from diffusion import Tables, choose
from model import Context

# A call over n positions takes about (1 + n / HALF) / (1 + 1 / HALF) times as long as one over a single
# position. Fitted on a CPU; it only steers the length of drafts.
HALF = 32


def generate(model, prompts, eot, config, group=None, ids=None, trace=False):
    """Continue B prompts. Returns B Continuations; arguments as in decode.generate_batch.

    Without drafts (config.draft = 0, or T = 1) decode.py does it, and for one prompt in the plain way.
    """
    if config.draft > 0 and config.steps > 1:
        return generate_with_drafts(model, prompts, eot, config, group, ids, trace)
    if len(prompts) > 1:
        return decode.generate_batch(model, prompts, eot, config, group, ids, trace)
    group = group[0] if group else None
    return [decode.generate_one(model, prompts[0], eot, config, group, ids[0] if ids else 0, trace)]


@torch.no_grad()
def generate_with_drafts(model, prompts, eot, config, group=None, ids=None, trace=False):
    """generate_batch in rounds of up to config.draft tokens. In float32 the texts are the same."""
    assert model.path is not None, "without a path there is nothing to refine"
    config = fit_to_trunk(config, model)
    block_size = model.trunk.config.block_size
    tables = Tables(model)
    rows = read_prompts(model, prompts, config, group, ids or range(len(prompts)))
    out = rows.out                                                # of all; rows.out loses those that end
    while rows.out:
        K = min(choose_length(rows.out, config), block_size - max(rows.positions))
        draft = write_draft(model, rows, K, eot, config)
        y, f = refine(model, rows, draft, tables, config, trace)
        accept(rows, draft, y, f, eot)
        rows.drop_finished(config, block_size)
    return out


class Draft(NamedTuple):
    """K tokens that the trunk wrote in each of B rows, and what it computed for them."""
    y: torch.Tensor                 # (B, K) the drafted tokens
    logits: torch.Tensor            # (B, K, V_size) that they were chosen from: the first evaluation
    token: torch.Tensor             # (B, K) the token before each
    h: torch.Tensor                 # (B, K, C) the trunk's hidden state there
    pos: torch.Tensor               # (B, K) its position
    n: torch.Tensor                 # (B, K) the index of y among the new tokens of its row
    valid: torch.Tensor             # (B, K) False behind a drafted end of text, and beyond max_new_tokens


def count_from(first, K, device):
    """(B, K): first[i], first[i] + 1, ... in row i."""
    return torch.tensor(first, device=device)[:, None] + torch.arange(K, device=device)


def write_draft(model, rows, K, eot, config):
    """Draft K tokens in each row by plain decoding. Their keys and values go into the cache."""
    device = rows.token.device
    pos = count_from(rows.positions, K, device)                   # (B, K)
    n = count_from([out.predicted for out in rows.out], K, device)
    beyond = n >= config.max_new_tokens
    n = n.clamp(max=config.max_new_tokens - 1)
    u = rows.u[:, :, 0].gather(1, n)                              # (B, K)
    token = rows.token
    h = rows.h
    columns = []
    for j in range(K):
        if h is None:                                             # the trunk has not read this token yet
            kv, mask = rows.visible(pos[:, j:j + 1], max(rows.positions) + j)
            h, _ = model.trunk(token[:, None], pos[:, j:j + 1], kv, mask)
            h = h[:, 0]                                           # (B, C)
        logits = model.trunk.head(h).float()                      # (B, V_size)
        y = choose(logits, u[:, j], config.temperature, config.top_k)
        columns.append((y, logits, token, h))
        token = y
        h = None
    y, logits, token, h = (torch.stack(column, 1) for column in zip(*columns))
    ends = (y == eot).long()
    first_end_or_before = ends.cumsum(1) == ends
    return Draft(y, logits, token, h, pos, n, ~beyond & first_end_or_before)


def refine(model, rows, draft, tables, config, trace):
    """Run Algorithm 1 at the N valid positions of a draft, all at once.

    Returns the refined tokens (N,) and the Denoiser.
    """
    if draft.valid.all():
        at = None                                                 # they fill the grid (B, K): N = B K

        def flatten(z):
            return z.flatten(0, 1)
    else:
        at = draft.valid.nonzero(as_tuple=True)                   # (rows, columns), each (N,)

        def flatten(z):
            return z[at]
    K = draft.y.size(1)
    kv, mask = rows.visible(draft.pos, max(rows.positions) + K - 1)
    c = Context(flatten(draft.h), flatten(draft.token), flatten(draft.pos), kv, at, mask)
    own = torch.arange(len(draft.n), device=draft.n.device)[:, None], draft.n
    u = flatten(rows.u[own])                                      # (N, T + 1)
    x_0 = flatten(rows.x_0[own])                                  # (N, D)
    group = flatten(rows.group[:, None].expand_as(draft.n))       # (N,)
    denoise = denoiser_class(config)
    f = denoise(model, config, tables, c, group, x_0, u, flatten(draft.logits), trace)
    return choose(f.predict(), u[:, 0], config.temperature, config.top_k), f


def accept(rows, draft, y, f, eot):
    """Add to each row its refined tokens, up to the first that differs from the draft.

    y: (N,) the refined tokens at the valid positions. f: their Denoiser.
    """
    grid = torch.zeros(3, *draft.y.shape, dtype=torch.long, device=y.device)
    grid[0] = draft.y
    grid[1, draft.valid] = y
    grid[2, draft.valid] = f.nfe
    drafted, refined, nfe = grid.tolist()                         # one transfer from the device
    n_valid = draft.valid.sum(1).tolist()
    n_kept = []
    start = 0                                                     # of the row among the N positions
    for i, out in enumerate(rows.out):
        differs = [j for j in range(n_valid[i]) if refined[i][j] != drafted[i][j]]
        kept = differs[0] + 1 if differs else n_valid[i]
        if differs:
            out.rejected.append(out.predicted + kept - 1)
        for j in range(kept):
            out.add(refined[i][j], eot, nfe[i][j], f.trace and f.trace[start + j])
        out.computed += sum(nfe[i])
        out.rounds += 1
        rows.positions[i] += kept
        n_kept.append(kept)
        start += n_valid[i]
    last = torch.tensor(n_kept, device=y.device)[:, None] - 1
    rows.token = grid[1].gather(1, last)[:, 0]
    rows.h = None                                                 # the trunk has not read these tokens


def choose_length(out, config):
    """The length K of the next draft, at most config.draft, that should take the least time per token.

    out: the Continuations of the B rows. A share a of their tokens was as drafted so far, so a draft of K
    tokens yields (1 - a^K) / (1 - a) tokens on average. It costs K trunk passes over B positions, and as many
    path calls over K B positions as a token took so far. To begin with we assume that ten tokens came before,
    nine of them as drafted.
    """
    B = len(out)
    n = 10 + sum(o.predicted for o in out)
    differ = (1 + sum(len(o.rejected) for o in out)) / n          # 1 - a
    calls = (10 * (config.steps - 1) + sum(o.nfe for o in out)) / n

    def time_per_token(K):
        tokens = (1 - (1 - differ) ** K) / differ
        return (K * (1 + B / HALF) + calls * (1 + K * B / HALF)) / tokens
    longest = min(config.draft, config.max_new_tokens)
    return min(range(1, longest + 1), key=time_per_token)
