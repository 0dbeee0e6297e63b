"""
The same texts sooner, by two kinds of speculation. The paper has neither (deviation 14).

Decoding is slow because each pass through a network reads all of its weights to serve one position. A pass
that serves several positions takes hardly longer. So we assume what will be needed, compute it all in one
pass, check the assumptions, and throw away what was assumed wrongly.

**Ahead in time: all evaluations of a token at once.** Algorithm 1 needs x_t before it can evaluate, and x_t
needs the guess of the evaluation before. But the guess is a token, and it seldom changes from one evaluation
to the next. As long as it stays, x_t at every later time follows without running the path.
    assume   that the guess stays as it is, and compute x_t at the next W times, the *window*;
    run      the path once, with all W of them as queries (queries do not see each other);
    check    the guesses that come back. Up to and including the first that differs from the assumption, each
             evaluation was made at the right x_t. The rest is thrown away, and we go on from the new guess.
A token whose guess never changes takes one pass of the path instead of T - 1.

**Ahead in the text: drafts.** One round goes so:
    draft    The trunk writes K tokens by plain decoding (T = 1), one after the other.
    refine   Algorithm 1 runs at these K positions together. Each pass of the path serves all of them.
    accept   We compare refined and drafted tokens from left to right. Those that agree are kept, and so is
             the first that differs, in its refined form. What lies behind it is thrown away.
The draft model of this speculative decoding (Leviathan et al. 2023) is the trunk itself, whose passes over
the kept tokens are needed anyway.

Why the text does not change. An evaluation at position k reads x_t of k and the trunk's keys and values at
positions up to k. The noise is fixed by the seed, the text and the position. So it depends only on the tokens
and the guesses before it. Every evaluation that is kept was computed from the right ones.
"""
from typing import NamedTuple

import torch

import decode
from adaptive import denoiser_class, find_distance
from decode import fit_to_trunk, read_prompts
from diffusion import Tables, algorithm_1, choose, find_probability
from model import Context
from plumbing.costs import choose_sizes, measure_costs

HEAD_ROWS = 256                     # hidden states that the head turns into logits at once, for memory


def generate(model, prompts, eot, config, group=None, ids=None, trace=False, tables=None):
    """Continue B prompts. Returns B Continuations; arguments as in decode.generate_batch.

    With --draft=0 and --ahead=0, or with T = 1, decode.py does it, and for one prompt in the plain way.
    """
    if config.steps > 1 and (config.draft > 0 or can_look_ahead(config)):
        return generate_speculatively(model, prompts, eot, config, group, ids, trace, tables)
    if len(prompts) > 1:
        return decode.generate_batch(model, prompts, eot, config, group, ids, trace, tables)
    group = group[0] if group else None
    text_id = ids[0] if ids else 0
    denoise = denoiser_class(config)
    return [decode.generate_one(model, prompts[0], eot, config, group, text_id, trace, tables, denoise)]


def can_look_ahead(config):
    """Whether x_t can be foreseen. A mean guess cannot: it changes at every evaluation, if only a little."""
    return config.ahead > 0 and config.guess != "mean" and config.times_are_known


@torch.no_grad()
def generate_speculatively(model, prompts, eot, config, group=None, ids=None, trace=False, tables=None):
    """generate_batch in rounds of drafting, refining and accepting. In float32 the texts are the same."""
    assert model.path is not None, "without a path there is nothing to refine"
    config = fit_to_trunk(config, model)
    block_size = model.trunk.config.block_size
    tables = Tables(model) if tables is None else tables
    rows = read_prompts(model, prompts, config, group, ids or range(len(prompts)))
    out = rows.out                                                # of all; rows.out loses those that end
    longest = max(1, min(config.draft, config.max_new_tokens))
    widest = min(config.ahead, config.steps - 1) if can_look_ahead(config) else 1
    earlier = tables.earlier.setdefault(config, decode.Continuation())       # texts before these, summed up
    while rows.out:
        costs = measure_costs(model, rows)
        K, W = choose_sizes(rows.out, earlier, config, longest, widest, costs)
        K = min(K, block_size - max(rows.positions))
        draft = write_draft(model, rows, K, eot, config)
        y, f = refine(model, rows, draft, tables, config, W, trace)
        accept(rows, draft, y, f, eot)
        rows.drop_finished(config, block_size)
    for text in out:
        earlier.predicted += text.predicted
        earlier.nfe += text.nfe
        earlier.changes += text.changes
        earlier.rejected += text.rejected
    return out


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

    Returns the refined tokens (N,), and an object f with the trace and, for each position, nfe, computed and
    changes. Tokens behind one that differs from the draft may be wrong.
    """
    at = draft.valid.nonzero(as_tuple=True)                       # (rows, columns), each (N,)
    kv, mask = rows.visible(draft.pos, max(rows.positions) + draft.y.size(1) - 1)
    full = len(at[0]) == draft.y.numel()                          # then the positions fill the grid (B, K)
    c = Context(draft.h[at], draft.token[at], draft.pos[at], kv, None if full else at, mask)
    u = rows.u[at[0], draft.n[at]]                                # (N, 1 or T + 1)
    x_0 = rows.x_0[at[0], draft.n[at]]                            # (N, D)
    group = rows.group[at[0]]                                     # (N,)
    if can_look_ahead(config):
        f = LookAhead(model, config, tables, c, at[0], group, x_0, u, draft.logits[at], draft.y[at], trace)
        return f.run(W), f
    f = denoiser_class(config)(model, config, tables, c, group, x_0, u, draft.logits[at], trace)
    y = choose(f.predict(), u[:, 0], config.temperature, config.top_k)
    f.computed = f.nfe
    f.changes = torch.zeros_like(f.nfe)
    f.n_passes = int(f.nfe.max())                                 # some position takes part in every pass
    return y, f


class Replay:
    """Stands in for the Denoiser where the guesses are given: it notes every x_t, and calls no network.

    guess: (N, E) tokens of the E evaluations. free: the same without a guidance group. w: guidance.
    """
    def __init__(self, V, guess, free, w):
        self.points = V[guess]                                    # (N, E, D)
        if w != 1:                                                # Eq. 7, but for the first, at t = 0
            self.points[:, 1:] = w * self.points[:, 1:] + (1 - w) * V[free[:, 1:]]
        self.x = []
        self.times = []

    def evaluate(self, x_t, t):
        self.x.append(x_t)
        self.times.append(t)

    def x_1_hat(self, x_t, t):
        e = len(self.times)
        self.evaluate(x_t, t)
        return self.points[:, e]


class LookAhead:
    """Algorithm 1 at N positions, with passes of the path that evaluate a window of times at once.

    c, group, x_0, u, trunk_logits, trace: as for Denoiser. row: (N,) the row of each position.
    draft: (N,) the drafted tokens.
    """
    def __init__(self, model, config, tables, c, row, group, x_0, u, trunk_logits, draft, trace):
        self.model = model
        self.config = config
        self.tables = tables
        self.c = c
        self.row = row
        self.group = group
        self.x_0 = x_0
        self.u = u
        self.draft = draft
        self.plan = config.plan(x_0)
        first = self.pick(trunk_logits.float(), torch.zeros_like(row))
        guess = first[:, None].expand(-1, config.steps)
        self.newest = self.replay(guess, guess)
        self.times = self.newest.times                            # E of them; Heun to t = 1 has T - 1
        N = len(row)
        E = len(self.times)
        self.guess = first[:, None].repeat(1, E)                  # (N, E): known, and behind that assumed
        self.free = self.guess.clone()
        self.known = torch.ones_like(row)                         # (N,) evaluations that are known
        self.end = torch.full_like(row, E - 1)                    # (N,) the last evaluation; less with --stop
        self.done = torch.zeros_like(row, dtype=torch.bool)       # (N,)
        self.h = c.h.new_zeros(N, E, c.h.size(1))                 # (N, E, C) hidden states before the head
        self.p = None
        if trace:
            self.p = torch.zeros(N, E, device=row.device)         # probability of each guess
            self.p[:, 0] = find_probability(trunk_logits.float(), first)
        self.y = draft.clone()                                    # (N,) the tokens that come out
        self.computed = torch.zeros_like(row)                     # (N,) queries
        self.n_passes = 0

    def run(self, W):
        """Evaluate until every position is done that is not behind a wrong draft. Returns the tokens (N,)."""
        active = ~self.done
        while active.any():
            self.run_path(torch.stack(self.newest.x, 1), active, W)  # x (N, E, D)
            self.newest = None
            if self.config.stop:
                self.stop_settled()
            self.finish()
            active = ~self.done & ~self.behind_a_doubt()
            if self.newest is None and active.any():
                self.newest = self.replay(self.guess, self.free)
        self.nfe = self.path_calls(self.end)
        before_end = torch.arange(self.guess.size(1), device=self.end.device)[None, 1:] <= self.end[:, None]
        self.changes = ((self.guess[:, 1:] != self.guess[:, :-1]) & before_end).sum(1)
        self.trace = self.make_trace() if self.p is not None else None
        return self.y

    def replay(self, guess, free):
        """x_t at all times, if these are the guesses."""
        times, steps = self.plan
        replay = Replay(self.tables.V, guess, free, self.config.guidance)
        algorithm_1(replay, self.x_0, times, steps)
        return replay

    def run_path(self, x, active, W):
        """One pass of the path over the next W evaluations of the active positions (N,)."""
        E = len(self.times)
        e = torch.arange(E, device=self.row.device)
        last = torch.minimum(self.known + W, self.end + 1)        # (N,) the end of each window
        window = (e >= self.known[:, None]) & (e < last[:, None]) & active[:, None]        # (N, E)
        kinds = [window]                                          # with the group, and for guidance without
        if self.config.guidance != 1:
            kinds.append(window & (e < E - 1))                    # the last evaluation is not guided
        n, e, kind = torch.stack(kinds, 2).nonzero(as_tuple=True)  # of each query: position, evaluation, kind
        h = self.query(x, n, e, torch.where(kind == 0, self.group[n], self.model.no_group))
        guess, p = self.guesses(h, n, e)
        self.computed += torch.bincount(n, minlength=len(self.row))
        self.n_passes += 1
        with_group = kind == 0
        self.h[n[with_group], e[with_group]] = h[with_group]
        if self.p is not None:
            self.p[n[with_group], e[with_group]] = p[with_group]
        self.check(n, e, kind, guess, last)

    def check(self, n, e, kind, guess, last):
        """Compare the guesses of all queries with what was assumed, and move on to the first that differs."""
        N, E = self.guess.shape
        assumed = torch.where(kind == 0, self.guess[n, e], self.free[n, e])
        differs = torch.where(guess == assumed, E, e)
        first = torch.full((N,), E, device=n.device).scatter_reduce(0, n, differs, "amin")    # (N,), E: none
        now = e == first[n]                                       # the queries at the first difference
        behind = torch.arange(E, device=n.device) >= first[:, None]                           # (N, E)
        for tokens, this in ((self.guess, now & (kind == 0)), (self.free, now & (kind == 1))):
            new = tokens[:, -1].clone()
            new[n[this]] = guess[this]
            tokens[:] = torch.where(behind, new[:, None], tokens)  # we assume that the new guess stays
        asked = torch.zeros_like(self.done)
        asked[n] = True
        self.known = torch.where(asked, torch.minimum(first + 1, last), self.known)

    def query(self, x, n, e, group):
        """Hidden states, one for each query: evaluation e of position n. x: (N, E, D). n, e, group: (Q,)."""
        modulations, w_d = self.tables.at(tuple(self.times))      # of all times and groups
        place = e * (self.model.no_group + 1) + group
        of_queries = (m.index_select(0, place) for m in modulations)  # a generator: one at a time in memory
        condition = of_queries, w_d.index_select(0, place)
        t = torch.tensor(self.times, device=n.device)[e]
        return self.model.merge(x[n, e], t, self.context(n), group, condition)

    def context(self, n):
        """The Context of queries at the positions n, in ascending order, several of them at one position."""
        c = self.c
        row = self.row[n]
        kv = c.kv
        used, row = row.unique_consecutive(return_inverse=True)
        if len(used) < kv[0][0].size(0):                          # not all rows are asked
            kv = [(k[used], v[used]) for k, v in kv]
        counts = torch.bincount(row)
        B, Q = len(used), int(counts.max())
        pos = c.pos[n]
        S = torch.arange(kv[0][0].size(2), device=n.device)
        if len(n) == B * Q:                                       # they fill a grid
            return Context(c.h[n], c.token[n], pos, kv, None, (S <= pos.view(B, Q, 1))[:, None])
        column = torch.arange(len(n), device=n.device) - (counts.cumsum(0) - counts)[row]
        grid = pos.new_zeros(B, Q).index_put((row, column), pos)
        return Context(c.h[n], c.token[n], pos, kv, (row, column), (S <= grid[:, :, None])[:, None])

    def guesses(self, h, n, e):
        """The guessed token of each hidden state (n, C), and its probability, where a trace needs it."""
        guess = []
        p = []
        for start in range(0, len(h), HEAD_ROWS):
            part = slice(start, start + HEAD_ROWS)
            logits = self.model.trunk.head(h[part]).float()
            guess.append(self.pick(logits, e[part], n[part]))
            if self.p is not None:
                p.append(find_probability(logits, guess[-1]))
        return torch.cat(guess), torch.cat(p) if p else None

    def pick(self, logits, e, n=slice(None)):
        """As Denoiser.pick, for evaluations e at the positions n."""
        if self.config.guess == "sample":
            u = self.u[n]
            return choose(logits, u.gather(1, e[:, None] + 1)[:, 0])
        return logits.argmax(-1)

    def stop_settled(self):
        """--stop, decided from the trajectory: a position ends at its first evaluation that has settled."""
        self.newest = self.replay(self.guess, self.free)
        for e in range(1, len(self.times) - 1):
            x_1_hat = self.newest.points[:, e]
            far = find_distance(self.newest.x[e], self.times[e], self.x_0, x_1_hat) > self.config.stop
            settled = ~far & (self.guess[:, e] == self.guess[:, e - 1])
            here = settled & (e < self.known) & (e < self.end)
            self.end = torch.where(here, e, self.end)

    def finish(self):
        """Choose the tokens of the positions whose last evaluation is known."""
        new = ((self.known > self.end) & ~self.done).nonzero()[:, 0]
        if len(new) > 0:
            logits = self.model.trunk.head(self.h[new, self.end[new]]).float()
            self.y[new] = choose(logits, self.u[new, 0], self.config.temperature, self.config.top_k)
            self.done[new] = True

    def behind_a_doubt(self):
        """(N,) whether an earlier position of the row differs from its draft, or its guess does so by now."""
        guess = self.guess.gather(1, (self.known - 1)[:, None])[:, 0]
        doubt = ~self.done & (guess != self.draft) & (self.config.temperature == 0)
        doubt |= self.done & (self.y != self.draft)
        count = doubt.cumsum(0)                                   # of doubts up to each position
        start = torch.searchsorted(self.row, self.row)            # where its row begins
        before = torch.cat([count.new_zeros(1), count])           # of doubts before each position
        return before[:-1] > before[start]

    def path_calls(self, end):
        """(N,) path calls of Algorithm 1 up to the evaluation end (N,), one after another."""
        if self.config.guidance == 1:
            return end
        return end + end.clamp(max=len(self.times) - 2)

    def make_trace(self):
        """For each position, the list of (t, guess, probability) of its evaluations."""
        guesses, p, end = self.guess.tolist(), self.p.tolist(), self.end.tolist()
        return [list(zip(self.times, guesses[i], p[i]))[:end[i] + 1] for i in range(len(end))]


# ---------------------------------------------------------------------------------------------- accepting
def accept(rows, draft, y, f, eot):
    """Add to each row its refined tokens, up to the first that differs from the draft.

    y: (N,) the refined tokens at the valid positions. f: as from refine.
    """
    grid = torch.zeros(5, *draft.y.shape, dtype=torch.long, device=y.device)
    grid[0] = draft.y
    grid[1:, draft.valid] = torch.stack([y, f.nfe, f.computed, f.changes])
    drafted, refined, nfe, computed, changes = grid.tolist()      # one transfer from the device
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
        out.computed += sum(computed[i])
        out.changes += sum(changes[i][:kept])
        out.passes += f.n_passes
        out.rounds += 1
        rows.positions[i] += kept
        n_kept.append(kept)
        start += n_valid[i]
    last = torch.tensor(n_kept, device=y.device)[:, None] - 1
    rows.token = grid[1].gather(1, last)[:, 0]
    rows.h = None                                                 # the trunk has not read these tokens
