"""
Ahead in time: all evaluations of a token at once. speculate.py says why the text does not change.

Algorithm 1 needs x_t before it can evaluate, and x_t needs the guess of the evaluation before. But the guess
is a token, and it seldom changes from one evaluation to the next. As long as it stays, x_t at every later
time follows without running the path.
    assume   that the guess stays as it is, and compute x_t at the next W times, the *window*;
    run      the path once, with all W of them as queries (queries do not see each other);
    check    the guesses that come back. Up to and including the first that differs from the assumption, each
             evaluation was made at the right x_t. The rest is thrown away, and we go on from the new guess.
A token whose guess never changes takes one pass of the path instead of T - 1.
"""
from typing import NamedTuple

import torch

from decode import make_mask
from diffusion import algorithm_1, choose, find_probability
from model import Context

HEAD_ROWS = 256                     # hidden states that the head turns into logits at once, for memory


def can_look_ahead(config):
    """Whether several path calls can be made at once: at times that are known, with guesses that may stay.

    With T = 2 there is one path call, and nothing ahead of it. A mean guess changes at every evaluation, if
    only a little.
    """
    return config.ahead > 0 and config.steps > 2 and config.guess != "mean" and config.times_are_known


class Replay:
    """Stands in for the Denoiser where the guesses are given: it notes every x_t, and calls no network.

    guess: (N, E, G) tokens of the E evaluations, as in State. w: guidance.
    """
    def __init__(self, V, guess, w):
        self.points = V[guess[:, :, 0]]                           # (N, E, D)
        if w != 1:                                                # Eq. 7, but for the first, at t = 0
            self.points[:, 1:] = w * self.points[:, 1:] + (1 - w) * V[guess[:, 1:, 1]]
        self.x = []
        self.times = []

    def evaluate(self, x_t, t):
        self.x.append(x_t)
        self.times.append(t)

    def x_1_hat(self, x_t, t):
        e = len(self.times)
        self.evaluate(x_t, t)
        return self.points[:, e]


class State(NamedTuple):
    """How far Algorithm 1 has come at N positions, with E evaluations each."""
    guess: torch.Tensor             # (N, E, G) guesses: what is known, and behind it what is assumed. G = 2
                                    # with guidance: with the group, and without one. Else G = 1
    known: torch.Tensor             # (N,) evaluations that are known
    end: torch.Tensor               # (N,) the last evaluation: E - 1, or less with --stop
    done: torch.Tensor              # (N,) whether the token is chosen
    active: torch.Tensor            # (N,) False if done, or behind a token that may differ from its draft
    y: torch.Tensor                 # (N,) the tokens that come out; the draft's, where it is not done
    computed: torch.Tensor          # (N,) path calls so far
    p: torch.Tensor                 # (N, E, G) the probability of each guess, for a trace; else (0,)


class LookAhead:
    """Algorithm 1 at N positions, with passes of the path that evaluate a window of times at once.

    It changes no tensor in place: a State goes in, and the next one comes out.

    c, group, x_0, u, trace: as for Denoiser. row: (N,) the row of each position, in ascending order.
    draft: (N,) the drafted tokens.
    """
    def __init__(self, model, config, tables, c, row, group, x_0, u, draft, trace=False):
        self.model = model
        self.config = config
        self.tables = tables
        self.c = c
        self.row = row
        self.group = group
        self.x_0 = x_0
        self.u = u
        self.draft = draft
        self.trace = trace
        self.plan = config.plan(x_0)
        self.replayed = None, None                                # guesses, and their Replay

    def start(self, trunk_logits):
        """The State after the first evaluation, the trunk's, whose logits are (N, V_size)."""
        logits = trunk_logits.float()
        first = self.pick(logits, torch.zeros_like(self.row))
        N = len(first)
        G = 1 if self.config.guidance == 1 else 2
        guess = first[:, None, None].expand(N, self.config.steps, G)
        replay = self.replay(guess)
        E = len(replay.times)                                     # T; Heun to t = 1 has T - 1
        guess = guess[:, :E].clone()
        self.replayed = guess, replay
        p = logits.new_zeros(0)
        if self.trace:
            p = logits.new_zeros(N, E, G)
            p[:, 0] = find_probability(logits, first)[:, None]
        done = torch.zeros_like(first, dtype=torch.bool)
        return State(guess, torch.ones_like(first), torch.full_like(first, E - 1), done, ~done, self.draft,
                     torch.zeros_like(first), p)

    def advance(self, s, W):
        """One pass of the path over the next W evaluations of the active positions of the State s."""
        replay = self.replay(s.guess)
        E = len(replay.times)
        e = torch.arange(E, device=self.row.device)
        window_end = torch.minimum(s.known + W, s.end + 1)        # (N,)
        window = (e >= s.known[:, None]) & (e < window_end[:, None]) & s.active[:, None]   # (N, E)
        asked = window[:, :, None]
        if s.guess.size(2) == 2:                                  # the last evaluation is not guided
            asked = torch.stack([window, window & (e < E - 1)], 2)                         # (N, E, G)
        at = self.list_queries(asked, s.known, W)                 # position, evaluation, kind of each query
        h = self.query(replay, *at)
        guess, p = self.guesses(h, *at[:2])
        found = s.guess.index_put(at, guess)
        differs = (asked & (found != s.guess)).any(2)             # what was not asked for does not count
        wrong = torch.where(differs, e, E).amin(1)                # (N,) the first that differs, or E
        newest = found.gather(1, wrong.clamp(max=E - 1)[:, None, None].expand(-1, 1, found.size(2)))
        behind = (e >= wrong[:, None])[:, :, None]
        s = s._replace(guess=torch.where(behind, newest, s.guess),             # assume that the new one stays
                       known=torch.where(s.active, torch.minimum(wrong + 1, window_end), s.known),
                       computed=s.computed + asked.sum((1, 2)))
        if self.trace:
            s = s._replace(p=s.p.index_put(at, p))
        if self.config.stop:
            s = self.stop_settled(s)
        s = self.finish(s, h, at)
        return s._replace(active=~s.done & ~self.behind_a_doubt(s))

    def run(self, trunk_logits, W):
        """Evaluate until every position is done that is not behind a wrong draft. Returns the last State.

        Afterwards n_passes is the number of passes.
        """
        s = self.start(trunk_logits)
        self.n_passes = 0
        while s.active.any():
            new = self.advance(s, W)
            # the same tensor, where no guess has changed: then x_t at all times is still known
            s = new._replace(guess=s.guess) if torch.equal(new.guess, s.guess) else new
            self.n_passes += 1
        return s

    def replay(self, guess):
        """x_t at all times, if these are the guesses (N, E, G). Remembered until others are asked for."""
        if self.replayed[0] is not guess:
            replay = Replay(self.tables.V, guess, self.config.guidance)
            times, steps = self.plan
            algorithm_1(replay, self.x_0, times, steps)
            self.replayed = guess, replay
        return self.replayed[1]

    # fixed_shapes.py has a list_queries, choose_some and context of its own, which select nothing.
    def list_queries(self, asked, known, W):
        """The queries of a pass: position, evaluation and kind of each, where asked (N, E, G) is True."""
        return asked.nonzero(as_tuple=True)

    def choose_some(self, mask):
        """The positions at which mask (N,) is True."""
        return mask.nonzero()[:, 0]

    def query(self, replay, n, e, kind):
        """Hidden states (Q, C), one for each query: evaluation e of position n, with its group or without."""
        times, modulations, w_d = self.tables.at(tuple(replay.times))     # of all times and groups
        no_group = self.model.no_group
        group = torch.where(kind == 0, self.group[n], no_group)
        place = e * (no_group + 1) + group
        of_queries = (m.index_select(0, place) for m in modulations)  # a generator: one at a time in memory
        condition = of_queries, w_d.index_select(0, place)
        x_t = torch.stack(replay.x, 1)[n, e]
        return self.model.merge(x_t, times[e], self.context(n), group, condition)

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
        if len(n) == B * Q:
            return self.full_grid(n, kv)
        pos = c.pos[n]
        first = counts.cumsum(0) - counts                         # the first query of each row
        column = torch.arange(len(n), device=n.device) - first[row]          # place of a query in its row
        grid = pos.new_zeros(B, Q).index_put((row, column), pos)
        return Context(c.h[n], c.token[n], pos, kv, (row, column), make_mask(grid, kv[0][0].size(2)))

    def full_grid(self, n, kv):
        """The Context of queries at the positions n, as many in each row of kv."""
        B, _, S, _ = kv[0][0].shape
        pos = self.c.pos[n]
        return Context(self.c.h[n], self.c.token[n], pos, kv, None, make_mask(pos.view(B, -1), S))

    def guesses(self, h, n, e):
        """The guessed token of each hidden state (n, C), and its probability, where a trace needs it."""
        guess = []
        p = []
        for start in range(0, len(h), HEAD_ROWS):
            part = slice(start, start + HEAD_ROWS)
            logits = self.model.trunk.head(h[part]).float()
            guess.append(self.pick(logits, e[part], n[part]))
            if self.trace:
                p.append(find_probability(logits, guess[-1]))
        return torch.cat(guess), torch.cat(p) if p else None

    def pick(self, logits, e, n=slice(None)):
        """As Denoiser.pick, for evaluations e at the positions n."""
        if self.config.guess == "sample":
            u = self.u[n]
            return choose(logits, u.gather(1, e[:, None] + 1)[:, 0])
        return logits.argmax(-1)

    def stop_settled(self, s):
        """--stop, decided from the trajectory: a position ends at its first evaluation that has settled."""
        from adaptive import find_distance  # here, since few runs need it

        replay = self.replay(s.guess)
        guess = s.guess[:, :, 0]
        end = s.end
        for e in range(1, len(replay.times) - 1):
            x_1_hat = replay.points[:, e]
            far = find_distance(replay.x[e], replay.times[e], self.x_0, x_1_hat) > self.config.stop
            settled = ~far & (guess[:, e] == guess[:, e - 1])
            end = torch.where(settled & (e < s.known) & (e < end), e, end)
        return s._replace(end=end)

    def finish(self, s, h, at):
        """Choose the tokens of the positions whose last evaluation became known in this pass.

        h: (Q, C) what the pass computed, for the queries at. The last evaluation is one of them.
        """
        new = (s.known > s.end) & ~s.done
        if self.config.temperature == 0 and self.config.guess == "argmax":
            last = s.guess[:, :, 0].gather(1, s.end[:, None])[:, 0]
            return s._replace(y=torch.where(new, last, s.y), done=s.done | new)
        n = self.choose_some(new)
        which = torch.arange(len(h), device=h.device)
        query = torch.zeros_like(s.guess).index_put(at, which)    # the query of each evaluation
        y = s.y
        for some in n.split(HEAD_ROWS) if len(n) else ():
            logits = self.model.trunk.head(h[query[some, s.end[some], 0]]).float()
            token = choose(logits, self.u[some, 0], self.config.temperature, self.config.top_k)
            y = y.index_put((some,), torch.where(new[some], token, s.y[some]))
        return s._replace(y=y, done=s.done | new)

    def behind_a_doubt(self, s):
        """(N,) whether an earlier token of the row differs from its draft, or may do so.

        It may where it is not done and its newest guess differs. When sampling, a guess does not tell.
        """
        guess = s.guess[:, :, 0].gather(1, (s.known - 1)[:, None])[:, 0]
        doubt = ~s.done & (guess != self.draft) & (self.config.temperature == 0)
        doubt |= s.done & (s.y != self.draft)
        count = doubt.cumsum(0)                                   # of doubts up to each position
        start = torch.searchsorted(self.row, self.row)            # where its row begins
        before = torch.cat([count.new_zeros(1), count])           # of doubts before each position
        return before[:-1] > before[start]

    # What a text has cost, from a State.
    def path_calls(self, s):
        """(N,) path calls of Algorithm 1 up to the last evaluation, one after another."""
        if self.config.guidance == 1:
            return s.end
        return s.end + s.end.clamp(max=s.guess.size(1) - 2)

    def changes(self, s):
        """(N,) how often the guess changed."""
        guess = s.guess[:, :, 0]
        before_end = torch.arange(1, guess.size(1), device=guess.device) <= s.end[:, None]
        return ((guess[:, 1:] != guess[:, :-1]) & before_end).sum(1)

    def make_trace(self, s):
        """For each position, the list of (t, guess, probability) of its evaluations."""
        times = self.replay(s.guess).times
        guesses, p, end = (z.tolist() for z in (s.guess[:, :, 0], s.p[:, :, 0], s.end))
        return [list(zip(times, guesses[i], p[i]))[:end[i] + 1] for i in range(len(end))]
