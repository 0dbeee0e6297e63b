"""
The same texts sooner, by two kinds of speculation. The paper has neither (deviation 14).

A *pass* is one run of the trunk or of the path. Decoding is slow because each pass reads all weights to serve
one position. A pass that serves several positions takes hardly longer. So we assume what will be needed,
compute it all in one pass, check the assumptions, and throw away what was assumed wrongly.

**Ahead in time.** All evaluations of a token are made at once, on the assumption that its guess stays. See
fast/ahead.py.

**Ahead in the text: drafts.** One round goes so:
    draft    The trunk writes K tokens by plain decoding (T = 1), one after the other.
    refine   Algorithm 1 runs at these K positions together. Each pass of the path serves all of them.
    accept   We compare refined and drafted tokens from left to right. Those that agree are kept, and so is
             the first that differs, in its refined form. What lies behind it is thrown away.
The draft model of this speculative decoding (Leviathan et al. 2023) is the trunk itself, whose passes over
the kept tokens are needed anyway.

Why the text does not change. An evaluation at position k reads x_t of k and the trunk's keys and values at
positions up to k. The noise is fixed by the seed, the text and the position. So an evaluation depends only on
the tokens and the guesses before it. Every evaluation that is kept was computed from the right ones.
"""
from functools import partial
from typing import NamedTuple

import torch

import decode
from decode import count_from, denoiser_class, fit_to_trunk, read_prompts
from diffusion import Denoiser, Tables, choose
from fast.ahead import LookAhead, can_look_ahead
from model import Context
from plumbing.costs import choose_sizes, measure_costs


def generate(model, prompts, eot, config, group=None, ids=None, trace=False, tables=None):
    """Continue B prompts. Returns B Continuations; arguments as in decode.generate_batch.

    With T = 1, or where neither drafts nor looking ahead are possible, decode.py does it. One prompt is then
    written in the plain way. What goes through fixed shapes goes through generate_in_rounds, too.
    """
    fixed = in_fixed_shapes(model, config, trace)
    if fixed or config.steps > 1 and (config.draft > 0 or can_look_ahead(config)):
        return generate_in_rounds(model, prompts, eot, config, group, ids, trace, tables, fixed)
    if len(prompts) > 1:
        return decode.generate_batch(model, prompts, eot, config, group, ids, trace, tables)
    group = group[0] if group else None
    text_id = ids[0] if ids else 0
    denoise = denoiser_class(config)
    return [decode.generate_one(model, prompts[0], eot, config, group, text_id, trace, tables, denoise)]


def in_fixed_shapes(model, config, trace):
    """Whether --graphs asks for the fixed shapes of CUDA graphs, and they can do it (fast/fixed_shapes.py).

    They cannot where numbers are read back between evaluations: for a trace, with the adaptive solver, and
    with --stop where no evaluations are looked ahead. On a CPU --graphs=on gives the shapes without a graph.
    """
    on_gpu = model.trunk.wte.weight.device.type == "cuda"
    wanted = config.graphs == "on" or config.graphs == "auto" and on_gpu
    return wanted and not trace and (
        config.steps == 1 or can_look_ahead(config) or denoiser_class(config) is Denoiser)


@torch.no_grad()
def generate_in_rounds(model, prompts, eot, config, group, ids, trace, tables, fixed):
    """generate_batch in rounds of drafting, refining and accepting. In float32 the texts are the same.

    fixed: in fixed shapes, as CUDA graphs need them.
    """
    assert model.path is not None or config.steps == 1, "without a path T must be 1"
    config = fit_to_trunk(config, model)
    if tables is None and config.steps > 1:
        tables = Tables(model)
    rows = read_prompts(model, prompts, config, group, ids or range(len(prompts)))
    out = rows.out                                                # of all; rows.out loses those that end
    earlier = decode.Continuation()                               # texts before these, summed up
    if tables is not None:
        earlier = tables.earlier.setdefault(config, earlier)
    longest = max(1, min(config.draft, config.max_new_tokens))
    widest = min(config.ahead, config.steps - 1) if can_look_ahead(config) else 1
    if fixed:
        from fast.fixed_shapes import FixedRounds, FixedRows  # here, since few runs need it
        rows = FixedRows(model, rows, config, tables)
        write_round = FixedRounds(model, rows, eot, config, tables).write
    else:
        write_round = partial(write_a_round, model, rows, eot, config, tables, trace)
    while rows.out:
        accept(rows, *write_round(earlier, longest, widest), eot)
        rows.drop_finished(config, model.trunk.config.block_size)
    for text in out:
        earlier.predicted += text.predicted
        earlier.nfe += text.nfe
        earlier.changes += text.changes
        earlier.rejected += text.rejected
    return out


def write_a_round(model, rows, eot, config, tables, trace, earlier, longest, widest):
    """Draft and refine, with draft and window as long as pays here. Returns what accept needs."""
    costs = measure_costs(model, rows)
    K, W = choose_sizes(rows.out, earlier, config, longest, widest, costs)
    K = min(K, model.trunk.config.block_size - max(rows.positions))
    draft = write_draft(model, rows, K, eot, config)
    return refine(model, rows, draft, tables, config, W, trace)


# ---------------------------------------------------------------------------------------------- drafting
class Draft(NamedTuple):
    """K tokens that the trunk wrote in each of B rows, and what it computed for them."""
    y: torch.Tensor                 # (B, K) the drafted tokens
    logits: torch.Tensor            # (B, K, V_size) that they were chosen from: the first evaluation
    token: torch.Tensor             # (B, K) the token before each
    h: torch.Tensor                 # (B, K, C) the trunk's hidden state there
    pos: torch.Tensor               # (B, K) its position
    n: torch.Tensor                 # (B, K) the index of y among the new tokens of its row
    valid: torch.Tensor             # (B, K) False behind a drafted end of text, and beyond max_new_tokens


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
    ended = torch.zeros_like(token, dtype=torch.bool)
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
        ended |= y == eot
        if device.type == "cpu" and ended.all():                  # on a GPU it would take time to look
            break
    y, logits, token, h = (torch.stack(column, 1) for column in zip(*columns))
    K = y.size(1)
    ends = (y == eot).long()
    first_end_or_before = ends.cumsum(1) == ends
    return Draft(y, logits, token, h, pos[:, :K], n[:, :K], ~beyond[:, :K] & first_end_or_before)


# ---------------------------------------------------------------------------------------------- refining
def refine(model, rows, draft, tables, config, W, trace):
    """Run Algorithm 1 at the N valid positions of a draft, with windows of W evaluations.

    Returns what accept needs: the grid, the number of passes of the path, and for each of the N positions its
    trace, or None. Tokens behind one that differs from the draft may be wrong.
    """
    at = draft.valid.nonzero(as_tuple=True)                       # (rows, columns), each (N,)
    kv, mask = rows.visible(draft.pos, max(rows.positions) + draft.y.size(1) - 1)
    full = len(at[0]) == draft.y.numel()                          # then the positions fill the grid (B, K)
    c = Context(draft.h[at], draft.token[at], draft.pos[at], kv, None if full else at, mask)
    u = rows.u[at[0], draft.n[at]]                                # (N, 1 or T + 1)
    x_0 = rows.x_0[at[0], draft.n[at]]                            # (N, D)
    group = rows.group[at[0]]                                     # (N,)
    if can_look_ahead(config):
        f = LookAhead(model, config, tables, c, at[0], group, x_0, u, draft.y[at], trace)
        state = f.run(draft.logits[at], W)
        found = [state.y, f.path_calls(state), state.computed, f.changes(state)]
        n_passes = f.n_passes
        traces = f.make_trace(state) if trace else None
    else:
        f = denoiser_class(config)(model, config, tables, c, group, x_0, u, draft.logits[at], trace)
        y = choose(f.predict(), u[:, 0], config.temperature, config.top_k)
        found = [y, f.nfe, f.nfe, torch.zeros_like(y)]
        n_passes = int(f.nfe.max())                               # some position takes part in every pass
        traces = f.trace
    grid = torch.zeros(6, *draft.y.shape, dtype=torch.long, device=at[0].device)
    grid[0] = draft.valid
    grid[1] = draft.y
    grid[2:, at[0], at[1]] = torch.stack(found)
    return grid, n_passes, traces


# ---------------------------------------------------------------------------------------------- accepting
def accept(rows, grid, n_passes, traces, eot):
    """Add to each row its refined tokens, up to the first that differs from the draft.

    grid: (6, B, K), for each place of the draft whether it is valid, the drafted token, the refined one, path
    calls of Algorithm 1, those that were computed, and changes of its guess. n_passes: of the path. traces:
    of the valid places, row by row, or None.
    """
    valid, drafted, refined, nfe, computed, changes = grid.tolist()   # one transfer from the device
    start = 0                                                     # of the row among the valid places
    tokens = []
    for i, out in enumerate(rows.out):
        n_valid = sum(valid[i])
        differs = [j for j in range(n_valid) if refined[i][j] != drafted[i][j]]
        kept = differs[0] + 1 if differs else n_valid
        if differs:
            out.rejected.append(out.predicted + kept - 1)
        for j in range(kept):
            out.add(refined[i][j], eot, nfe[i][j], traces and traces[start + j])
        out.computed += sum(computed[i])
        out.changes += sum(changes[i][:kept])
        out.passes += n_passes
        out.rounds += 1
        rows.positions[i] += kept
        tokens.append(refined[i][kept - 1])
        start += n_valid
    rows.token = torch.tensor(tokens, device=rows.token.device)
    rows.h = None                                                 # the trunk has not read these tokens
