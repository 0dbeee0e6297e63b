"""
What Algorithm 1 asks of the pair: f(x_t, t, c) at N positions, and the guess x_1_hat that moves x_t.

Read x_1_hat and path_call. The rest may be skipped: the stop rule, the count of path calls, the trace, and
what is computed once for all tokens. Symbols are those of model.py. The way of a token, at N positions:

                in training: the N targets of a batch       in decoding: of K drafted positions of B rows
    trunk       idx (B, T) -> c.h = h[at] (N, C)            passes over (B, 1): h (B, K, C) -> c.h (N, C)
    x_t         t x_1 + (1 - t) x_0, (N, D)                 from x_0 (N, D), by the solver
    condition   of each t: L x (N, 6C), w_d (N, C)          the same, from a table of each time and label
    attention   q (N, C) -> (B, T, C), causal -> (N, C)     q (N, C) -> (B, K, C), mask (B, 1, K, S) -> (N, C)
    logits      (N, V_size), against y (N,)                 (N, V_size) -> y (N,) -> (B, K), a prefix is kept
"""
import torch


def choose(logits, u, temperature=1.0, top_k=0):
    """A token for each row of logits (N, V_size): argmax at temperature 0, else by inversion with u (N,)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if 0 < top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    cdf = logits.softmax(-1).cumsum(-1)
    token = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)[:, 0]
    return token.clamp(max=logits.size(-1) - 1)


def probability(logits, token):
    """What logits (N, V_size) say of the token of each row, (N,)."""
    return logits.softmax(-1).gather(1, token[:, None])[:, 0]


class Tables(dict):
    """What stays from token to token: V (V_size, D), and for each time the path's condition of each label."""
    def __init__(self, model):
        self.path, self.V = model.path, model.embed(slice(None))

    def __missing__(self, t):
        label = torch.arange(self.path.n_labels + 1, device=self.V.device)
        self[t] = self.path.condition(torch.full(label.shape, t, device=label.device), label)
        return self[t]


class Denoiser:
    """What Algorithm 1 asks of the pair at N positions: logits(x_t, t), and the guess x_1_hat(x_t, t).

    The first evaluation, at t = 0, is the trunk's head: no path call. The others are counted in nfe (N,).
    latest (N, V_size) and guess (N,): each position's newest logits and guess. Those of a position that has
    stopped stay as they are.

    c: the Context of the positions. label (N,): guidance labels. x_0 (N, D): the noise it starts from. u (N,
    steps + 1): uniform numbers for sampled guesses. trunk_logits (N, V_size): if known. trace: keep, for each
    position, a list of (t, guess, probability) of its evaluations.
    """
    def __init__(self, model, sampler, tables, c, label, x_0, u=None, trunk_logits=None, trace=False):
        self.model, self.sampler, self.tables = model, sampler, tables
        self.c, self.label, self.x_0, self.u = c, label, x_0, u
        self.nfe = torch.zeros_like(c.pos)
        self.running = torch.ones_like(c.pos, dtype=torch.bool)
        self.trace = [[] for _ in c.pos] if trace else None
        self.n_evaluations = 1
        self.latest = (model.trunk.head(c.h) if trunk_logits is None else trunk_logits).float()
        self.guess = self.best(self.latest)
        self.write_trace(0.0)

    def logits(self, x_t, t):
        """f(x_t, t, c), (N, V_size), at the time t."""
        self.evaluate(x_t, t)
        return self.latest

    def x_1_hat(self, x_t, t, where=None):
        """The guess at (x_t, t), (N, D): V_y of one token y, or the mean over all. With guidance w, Eq. 7
        (deviation 8): w x_1_hat(label) + (1 - w) x_1_hat(no label), two path calls."""
        before, w = self.guess, self.sampler.guidance
        i = self.evaluate(x_t, t, where)
        x_1_hat = self.embed(self.latest, self.guess)
        if w != 1 and i is not None:
            free = self.path_call(x_t, t, i, torch.full_like(self.label, self.model.no_label))
            x_1_hat[i] = w * x_1_hat[i] + (1 - w) * self.embed(free, self.best(free, i))
        if self.sampler.stop and i is not None:
            t = t[:, None] if torch.is_tensor(t) else t
            far = self.distance(x_t, t, x_1_hat) > self.sampler.stop
            self.running[i] = (far | (self.guess != before))[i]
        return x_1_hat

    def distance(self, x_t, t, x_1_hat):
        """|x_1_hat - m| / sqrt(D), (N,): how far the newest guess is from the mean m of those before it, to
        which x_t = (1 - t) x_0 + t m points."""
        m = (x_t - (1 - t) * self.x_0) / t
        return (x_1_hat - m).norm(dim=1) / x_t.size(1) ** 0.5

    def evaluate(self, x_t, t, where=None):
        """Evaluate at t, a float or (N,), the positions that have not stopped; of these only where (N,) bool.
        Returns their index, or None for none."""
        if not torch.is_tensor(t) and t == 0:                 # the trunk's, known from the start
            return None
        i = slice(None)
        if where is not None or self.sampler.stop:
            where = self.running if where is None else where & self.running
            if not where.any():
                return None
            i = i if where.all() else where.nonzero()[:, 0]
        self.n_evaluations += 1
        last = self.path_call(x_t, t, i, self.label)
        guess = self.best(last, i)
        if isinstance(i, slice):
            self.latest, self.guess = last, guess
        else:
            self.latest[i], self.guess = last, self.guess.index_put((i,), guess)  # x_1_hat has the old
        self.write_trace(t, i)
        return i

    def path_call(self, x_t, t, i, label):
        """Logits (n, V_size) of the pair at the positions i, with these labels (N,)."""
        self.nfe[i] += 1
        x_t, label = x_t[i], label[i]
        if torch.is_tensor(t):                                # each position has its own time
            t = t[i]
            condition = self.model.path.condition(t, label)
        else:
            modulations, w_d = self.tables[t]
            condition = [m[label] for m in modulations], w_d[label]
            t = torch.full_like(x_t[:, 0], t)
        c = self.c if isinstance(i, slice) else self.c.select(i)
        return self.model(x_t, t, c, label, condition).float()

    def best(self, logits, i=slice(None)):
        """The guess (n,) at the positions i: the most probable token, or a sampled one."""
        if self.sampler.guess == "sample":
            return choose(logits, self.u[i, self.n_evaluations])
        return logits.argmax(-1)

    def embed(self, logits, guess):
        """x_1_hat (n, D); in float32 also under autocast."""
        if self.sampler.guess != "mean":
            return self.tables.V[guess]
        with torch.autocast(logits.device.type, enabled=False):
            return logits.softmax(-1) @ self.tables.V

    def write_trace(self, t, i=slice(None)):
        if self.trace is not None:
            p, t = probability(self.latest, self.guess), torch.as_tensor(t).expand(len(self.guess))
            for n in torch.arange(len(p), device=p.device)[i].tolist():
                self.trace[n].append((t[n].item(), self.guess[n].item(), p[n].item()))
