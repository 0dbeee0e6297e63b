"""
The diffusion of L2D: noising, loss, velocity, solvers, guidance and Algorithm 1, as functions on tensors.

    Time runs from t = 0, pure noise, to t = 1, data.    x_t = t x_1 + (1 - t) x_0

A language model predicts the next token from the context c alone; that is one step of diffusion, taken at
t = 0 where x_t carries nothing. L2D goes on: the guess moves x_t towards the guessed token's embedding, and
the path looks again, now with x_t in hand. Symbols and shapes are those of model.py, but T, here and in README, counts
evaluations of the model for one token (`steps`); "Eq." is the paper's. Training predicts at N positions, sampling at the last of B rows.

A denoiser, `f` of the solvers, is anything that maps (x_t, t) to x_1_hat (B, D), an estimate of x_1: the embedding of the most probable
token, or the mean over all (the paper's f(x_t, t, c), which gives logits, is L2D.forward). The solvers know nothing else, so tests can
hand them fields with a known solution.
"""
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

from configurator import UserError
from model import Context, first_keys, new_cache


# ----------------------------------------------------------------------------------------------- training
def noise(x_1, x_0, t):
    """Eq. 1: x_t = t x_1 + (1 - t) x_0. x_1, x_0 (N, D), t (N,) -> (N, D)."""
    return t[:, None] * x_1 + (1 - t[:, None]) * x_0


def sample_t(n, generator, stratified=True):
    """t ~ U[0, 1), one for each of n positions, on the generator's device.

    stratified: one draw from each of n equal bins, in random order. Each t alone is still uniform, and the mean
    over the batch varies less (deviation 5; as in VDM, Kingma et al. 2021, App. I).
    """
    device = generator.device
    u = torch.rand(n, generator=generator, device=device)
    if not stratified:
        return u
    bins = torch.randperm(n, generator=generator, device=device)
    return ((bins + u) / n).clamp(max=1 - 2 ** -24)                           # float32 must not round up to 1


def draw(n, path_config, generator, stratified=True):
    """t (n,) and x_0 ~ N(0, sigma^2 I) (n, D), both float32, independent for every position."""
    t = sample_t(n, generator, stratified)
    x_0 = torch.randn(n, path_config.x_dim, generator=generator, device=generator.device) * path_config.sigma
    return t, x_0


def draw_times(most_calls, t_end, shift, generator):
    """The times of one unrolled pass: 1 to most_calls path calls, few as often as many (uniform in the logarithm), on time_grid."""
    n_calls = int((most_calls + 1) ** torch.rand((), generator=generator, device=generator.device))
    return time_grid(n_calls, t_end, shift)


def nll(model, idx, targets, label, t=None, x_0=None, times=None):
    """Eq. 3: -log f(x_t, t, c)_y at each target, float32 (N,); the caller sums and weighs.

    idx (B, T) tokens; targets (B, T) the next token of each, -1 where none counts, in row order N of them;
    label (B,) guidance labels; t (N,) and x_0 (N, D) as from draw. times, if given, instead of t: the model is unrolled
    (see unrolled). Without a path: plain cross-entropy of the trunk.
    """
    at = (targets >= 0).nonzero(as_tuple=True)                                # (rows, cols), each (N,)
    y = targets[at]                                                           # (N,)
    c = model.read(idx, at)
    if model.path is None:
        return F.cross_entropy(model.trunk.head(c.h).float(), y, reduction="none")
    label = label[at[0]]
    if times is not None:
        logits = unrolled(model, x_0, times, c, label)
    else:
        x_1 = model.embed(y)                                                  # (N, D)
        x_t = noise(x_1, x_0, t)
        logits = model(x_t, t, c, label)                                      # (N, V_size)
    return F.cross_entropy(logits.float(), y, reduction="none")


def unrolled(model, x_0, times, c, label):
    """Logits (N, V_size) of the last evaluation of Algorithm 1, differentiable through all of them (deviation 12).

    Euler from x_0 (N, D) through times (0, ..., t_end), with the mean x_1_hat: x_t is built from what the model guessed, as in
    sampling, and what a guess is good for is what the last prediction makes of it.
    """
    V = model.embed(slice(None))                                              # (V_size, D)
    x_t, logits = x_0, model.trunk.head(c.h)                                  # at t = 0 the trunk's
    for a, b in pairwise(times):
        x_1_hat = logits.float().softmax(-1) @ V                              # (N, D)
        x_t = euler_step(lambda x, t: x_1_hat, x_t, a, b)
        logits = model(x_t, x_t.new_full((len(x_t),), b), c, label)
    return logits


# ------------------------------------------------------------------------------------------------ solvers
def velocity(x_t, t, x_1_hat):
    """Eq. 4: dx_t/dt = (x_1_hat - x_t) / (1 - t). Never asked for at t = 1. t a float < 1 or (B,)."""
    rest = 1 - (t[:, None] if torch.is_tensor(t) else t)
    return (x_1_hat - x_t) / rest


def euler_step(f, x, a, b):
    """From time a to b with the slope at a: one evaluation."""
    return x + (b - a) * velocity(x, a, f(x, a))


def midpoint_step(f, x, a, b):
    """From time a to b with the slope at the midpoint: two evaluations. The paper's solver."""
    m = (a + b) / 2
    x_m = euler_step(f, x, a, m)
    return x + (b - a) * velocity(x_m, m, f(x_m, m))


def heun_step(f, x, a, b):
    """From time a to b with the mean of the slopes at both ends: two evaluations, one where b = 1."""
    v_a = velocity(x, a, f(x, a))
    x_b = x + (b - a) * v_a
    if b == 1:                                                                # there the slope does not exist
        return x_b
    return x + (b - a) / 2 * (v_a + velocity(x_b, b, f(x_b, b)))


STEP = {"euler": euler_step, "midpoint": midpoint_step, "heun": heun_step}
SOLVERS = (*STEP, "adaptive")


def last_time(steps):
    """The time of the last of `steps` evaluations, where nothing else is asked for (deviation 6): (steps - 1) / steps, at most 15/16.

    At 1 an Euler grid would end on x_t = V_guess exactly, which holds nothing but the guess. Above 15/16 x_t shows the guess, right or
    wrong, to a path that was trained on x_t built from the truth, and accuracy falls (measured, see docs/LOG.md).
    """
    return min((steps - 1) / steps, 15 / 16)


def time_grid(n, t_end, shift=1.0):
    """n + 1 times from 0 to t_end: uniform, or with shift > 1 denser towards the end.

    u = i / n is mapped to shift u / (1 + (shift - 1) u), then scaled by t_end.
    """
    return [t_end * (shift * i / (n - i + shift * i)) for i in range(n + 1)] if n else [0.0]


def integrate(f, x, steps, solver, t_end, shift=1.0):
    """Spend steps - 1 evaluations of f on the way from x at t = 0 (heun to t = 1: steps - 2), and return (x, t) for the last.

    A two-evaluation solver with an odd number to spend takes its first interval by Euler. t_end is the time
    of the last evaluation.
    """
    cost = 1 if solver == "euler" else 2
    n_whole, n_euler = divmod(steps - 1, cost)
    times = time_grid(n_whole + n_euler, t_end, shift)
    for i, (a, b) in enumerate(pairwise(times)):
        step = euler_step if i < n_euler else STEP[solver]
        x = step(f, x, a, b)
    return x, times[-1]


def adaptive(f, x, steps, tol, t_end, first_step=0.25):
    """Heun's error estimate steering Euler steps, for each row on its own (deviation 7): its own t, dt, error and evaluations.

    With slope v at (x, t), the trial x' = x + dt v is evaluated at t + dt, which gives the slope v' there.
    Heun and Euler differ by e = dt/2 |v' - v| / sqrt(D): if e <= tol the row moves to x', with v' already known,
    so that an accepted step costs one evaluation; else it tries again with a smaller dt. With argmax guesses the
    field is piecewise constant and e is 0 exactly when the guess has not changed.
    A row ends at t_end or when its `steps` evaluations are spent: whichever comes
    first, its last evaluation is the prediction. f(x, t, rows) is asked for the rows (B,) bool only; t is (B,).
    Returns x and t (B,), where each row stands.
    """
    t = torch.zeros(len(x), device=x.device)
    dt = torch.full_like(t, first_step)
    rows = torch.full_like(t, steps > 1, dtype=torch.bool)
    v = velocity(x, t, f(x, 0.0))
    for _ in range(steps - 1):
        if not rows.any():
            break
        t_new = torch.where(t + 1.01 * dt > t_end, t_end, t + dt)             # no crumb of a step before the end
        dt = t_new - t
        x_new = x + dt[:, None] * v
        x_1_hat, at_end = f(x_new, t_new, rows), t_new == 1                   # at 1 there is no slope: the step stands
        v_new = torch.where(at_end[:, None], v, velocity(x_new, torch.where(at_end, t, t_new), x_1_hat))
        error = dt / 2 * (v_new - v).norm(dim=1) / x.size(1) ** 0.5           # (B,)
        accept = rows & (error <= tol)
        x, v = (torch.where(accept[:, None], new, old) for new, old in ((x_new, x), (v_new, v)))
        t = torch.where(accept, t_new, t)
        dt = torch.where(rows, dt * (0.9 * (tol / error.clamp(min=1e-9)).sqrt()).clamp(0.3, 2.0), dt)
        rows = rows & (t < t_end)
    return x, t


# -------------------------------------------------------------------------------------------- Algorithm 1
@dataclass(frozen=True)
class Sampler:
    """How a token is predicted. T = steps counts evaluations, the trunk's own at t = 0 included."""
    steps: int = 16                 # evaluations of the model for one token; 1 is the untouched trunk
    solver: Literal["euler", "midpoint", "heun", "adaptive"] = "euler"  # adaptive: at most `steps` evaluations
    t_end: float = 0.0              # time of the last evaluation; 0 means (steps - 1) / steps, at most 15/16; the paper has 1
    shift: float = 1.0              # time grid: 1 uniform, above 1 denser towards t = 1
    tol: float = 0.1                # adaptive: error allowed per step, in units of x_1's standard deviation
    stop: float = 0.0               # stop a token early: same guess twice, its probability above this; 0 = never
    guess: Literal["argmax", "sample", "mean"] = "argmax"  # x_1_hat: embedding of the best token, a sampled one, or the mean
    guidance: float = 1.0           # w of Eq. 7; 1 = off. Needs a label
    temperature: float = 0.0        # of the final choice of the token; 0 = the most probable
    top_k: int = 0                  # choose among the k most probable tokens; 0 = all
    shortlist: int = 0              # path calls but the last see only the trunk's k best tokens, a cheaper head; 0 = off

    def __post_init__(self):
        must = {"steps": (self.steps >= 1, "at least 1 (1 is the untouched trunk)"), "t_end": (0 <= self.t_end <= 1, "in [0, 1]"),
                "shift": (self.shift > 0, "above 0"), "tol": (self.tol > 0, "above 0"), "stop": (0 <= self.stop < 1, "in [0, 1)"),
                "temperature": (self.temperature >= 0, "at least 0"), "top_k": (self.top_k >= 0, "at least 0"),
                "shortlist": (self.shortlist == 0 or self.shortlist > 0 and self.fixed, "0 or more, and 0 with stop or the adaptive solver, "
                              "which cannot know their last evaluation")}
        for name, (holds, expected) in must.items():
            if not holds:
                raise UserError(f"error: {name}={getattr(self, name)}, but it must be {expected}")

    @property
    def fixed(self):
        """Whether every token takes the same evaluations."""
        return self.solver != "adaptive" and not self.stop


@dataclass
class Generated:
    """One row of generate: its new tokens (without the end of text), whether it ended, its path calls."""
    tokens: list = field(default_factory=list)
    ended: bool = False
    predicted: int = 0              # tokens predicted, the end of text included
    nfe: int = 0                    # path calls, over all tokens
    trace: list = field(default_factory=list)   # per predicted token, (t, guess, probability) of each evaluation


def choose(logits, u, temperature=1.0, top_k=0):
    """A token for each row from logits (B, V_size): the argmax at temperature 0, else by inversion with u (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if 0 < top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    cdf = logits.softmax(-1).cumsum(-1)
    return torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)[:, 0].clamp(max=logits.size(-1) - 1)


def probability(logits, token):
    """What logits (B, V_size) say of the token of each row (B,), (B,)."""
    return logits.softmax(-1).gather(1, token[:, None])[:, 0]


class Denoiser:
    """f of Algorithm 1 for one token in each of B rows: (x_t, t) -> x_1_hat (B, D).

    Holds what the last evaluation of each row said, logits (B, V_size), guess (B,), x_1_hat (B, D), and counts
    path calls, nfe (B,). The first evaluation, at t = 0 where w_d = 0, is the trunk's head alone.

    c: the Context of the B predictions; label (B,) with index n_labels for none; V (V_size, D), the table of Eq. 5;
    u (B, steps + 1) uniform numbers, column 0 for the final choice, i for the guess of evaluation i; tables: a dict that
    keeps what depends on t alone from one token to the next; trace: a list of B lists to write guesses to.
    """
    def __init__(self, model, sampler, V, tables, c, label, u, trace=None):
        self.model, self.sampler, self.V, self.tables = model, sampler, V, tables
        self.c, self.label, self.u, self.trace, self.n_calls = c, label, u, trace, 0
        self.nfe = torch.zeros_like(label)
        self.running = torch.ones_like(label, dtype=torch.bool)               # rows the stopping rule has not ended
        self.logits = model.trunk.head(c.h).float()
        if sampler.shortlist:
            self.words = self.logits.topk(min(sampler.shortlist, self.logits.size(-1))).indices   # (B, shortlist)
        if sampler.steps > 1:
            self.guess, self.x_1_hat = self.estimate(self.logits, u[:, 1])
        else:
            self.guess = self.logits.argmax(-1)
        self.write_trace(0.0, slice(None))

    def __call__(self, x_t, t, rows=None, last=False):
        """Evaluate at x_t (B, D) and t, a float or (B,), the rows (B,) bool that have not stopped; return x_1_hat.

        Eq. 7 with guidance w (deviation 8): x_1_hat = w x_1_hat(label) + (1 - w) x_1_hat(no label), two path calls. A grid
        solver's last evaluation is read for its logits, those with the label, and costs one; adaptive cannot know its last.
        """
        if not torch.is_tensor(t) and t == 0:
            return self.x_1_hat
        s, r = self.sampler, self.select(rows)
        if r is None:
            return self.x_1_hat
        self.n_calls += 1
        u = self.u[r, 1 + self.n_calls]
        logits = self.path_logits(x_t, t, r, self.label, last)
        guess, x_1_hat = self.estimate(logits, u)
        if s.guidance != 1 and not last:
            no_label = torch.full_like(self.label, self.model.no_label)
            x_1_free = self.estimate(self.path_logits(x_t, t, r, no_label, last), u)[1]
            x_1_hat = s.guidance * x_1_hat + (1 - s.guidance) * x_1_free
        if s.stop:
            self.running[r] = (guess != self.guess[r]) | (probability(logits, guess) <= s.stop)
        self.logits[r], self.guess[r], self.x_1_hat[r] = logits, guess, x_1_hat
        self.write_trace(t, r)
        return self.x_1_hat

    def select(self, rows):
        """The rows to evaluate, as an index: all of them, some, or None for none."""
        if rows is None and not self.sampler.stop:
            return slice(None)
        rows = self.running if rows is None else rows & self.running
        index = rows.nonzero()[:, 0]
        return slice(None) if len(index) == len(rows) else index if len(index) else None

    def path_logits(self, x_t, t, r, label, last):
        """Logits of the rows r. Conditions at a shared t are computed once, for every label. Off the shortlist they are -inf."""
        path, label = self.model.path, label[r]
        if torch.is_tensor(t):
            t_row = t[r]
            condition = path.condition(t_row, label)
        else:
            t_row = torch.full(label.shape, t, device=x_t.device)
            if t not in self.tables:
                every = torch.arange(path.config.n_labels + 1, device=label.device)
                self.tables[t] = path.condition(torch.full(every.shape, t, device=x_t.device), every)
            modulations, w_d = self.tables[t]
            condition = [m[label] for m in modulations], w_d[label]
        self.nfe[r] += 1
        words = self.words[r] if self.sampler.shortlist and not last else None
        logits = self.model(x_t[r], t_row, self.c.select(r), label, condition, words).float()
        return logits if words is None else torch.full_like(self.logits[r], -torch.inf).scatter(1, words, logits)

    def estimate(self, logits, u):
        """The guess (B,) and x_1_hat (B, D) that logits (B, V_size) stand for."""
        guess = choose(logits, u, temperature=1.0 if self.sampler.guess == "sample" else 0.0)
        return guess, logits.softmax(-1) @ self.V if self.sampler.guess == "mean" else self.V[guess]

    def write_trace(self, t, r):
        if self.trace is None:
            return
        times = t.tolist() if torch.is_tensor(t) else [t] * len(self.label)
        p, guess = probability(self.logits, self.guess).tolist(), self.guess.tolist()
        for i in torch.arange(len(self.label))[r if isinstance(r, slice) else r.cpu()].tolist():
            self.trace[i].append((times[i], guess[i], p[i]))


def predict(f, x_0, sampler):
    """Algorithm 1 for one token: from x_0 (B, D) through sampler.steps evaluations of the denoiser f.

    Returns logits (B, V_size), those of each row's last evaluation.
    """
    if sampler.steps == 1:
        return f.logits                                                       # the trunk's
    t_end = sampler.t_end or last_time(sampler.steps)
    if sampler.solver == "adaptive":
        adaptive(f, x_0, sampler.steps, sampler.tol, t_end)                   # its last evaluation was the last
    else:
        x, t = integrate(f, x_0, sampler.steps, sampler.solver, t_end, sampler.shift)
        f(x, t, last=True)
    return f.logits


def row_noise(ids, seed, max_new_tokens, x_dim, sampler, device):
    """x_0 / sigma (B, max_new_tokens, x_dim) and uniforms u (B, max_new_tokens, steps + 1) of the rows ids.

    Every row has its own generator, so that it draws the same whatever else is in its batch. u[:, :, 0], for the final
    choice, and x_0 come first, so that they are the same for every number of steps.
    """
    x_0, u = [], []
    for i in ids:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + i) % 2 ** 63)
        choice = torch.rand(max_new_tokens, 1, generator=generator)
        x_0.append(torch.randn(max_new_tokens, x_dim, generator=generator))
        u.append(torch.cat([choice, torch.rand(max_new_tokens, sampler.steps, generator=generator)], 1))
    return torch.stack(x_0).to(device), torch.stack(u).to(device)


def next_token(model, sampler, V, tables, c, label, x_0, u, trace=None):
    """The next token of each row, (B,), by Algorithm 1, and its path calls (B,). Arguments as of Denoiser and predict.

    Where c has no h, the trunk first reads c.token at c.pos into c.kv.
    """
    if c.h is None:
        h, kv = model.trunk(c.token[:, None], c.pos[:, None], c.kv, c.mask)
        c = Context(h[:, 0], c.token, c.pos, kv, None, c.mask)
    f = Denoiser(model, sampler, V, tables, c, label, u, trace)
    logits = predict(f, x_0, sampler)
    return choose(logits, u[:, 0], sampler.temperature, sampler.top_k), f.nfe


def compiled_next_token(*constants):
    """next_token as one graph of static shapes; on a GPU a CUDA graph, in which no kernel waits for Python.

    constants: what stays where it is from token to token (nested tensors): a CUDA graph need not copy it, and may write to it.
    Not yet run on a GPU.
    """
    for z in tree_leaves(constants):
        if torch.is_tensor(z):
            torch._dynamo.mark_static_address(z, guard=False)
    return torch.compile(next_token, mode="reduce-overhead", fullgraph=True, dynamic=False)


@torch.no_grad()
def generate(model, prompts, eot, max_new_tokens, sampler=Sampler(), label=None, seed=0, ids=None, trace=False, compile=False):
    """Continue each prompt until the end of text: greedy or sampled decoding, each token by Algorithm 1.

    prompts: a list of B non-empty lists of token ids, of any lengths; eot: the id that ends a text; label: B
    guidance labels, or None for none; seed and ids (B integers, 0..B-1 by default): the randomness of row i
    depends on (seed, ids[i]) alone. A row is cut where block_size is reached. Rows that have ended leave the
    batch. compile: from the second token on, a step is one compiled graph (the first use takes minutes; rows that have
    ended stay, attention covers the whole cache); not with stop, adaptive or trace. Returns a list of B Generated; with
    trace, each says how its guesses changed.
    """
    device, path, B = model.trunk.wte.weight.device, model.path, len(prompts)
    assert path is not None or sampler.steps == 1, "without a path there is only steps = 1"
    assert not compile or sampler.fixed and not trace, "a compiled step makes the same evaluations for every token"
    ids = range(B) if ids is None else ids
    D, sigma = (path.config.x_dim, path.config.sigma) if sampler.steps > 1 else (0, 0.0)
    label = torch.tensor([model.no_label] * B if label is None else label, device=device)
    x_0, u = row_noise(ids, seed, max_new_tokens, D, sampler, device)
    V = path.token_space(model.trunk.wte.weight) if sampler.steps > 1 else None   # once: it is constant now
    tables, out = {}, [Generated() for _ in prompts]
    rows, live = list(range(B)), range(B)       # the output that each row of the batch writes to; the rows that go on

    lengths = [len(p) for p in prompts]
    idx = torch.nn.utils.rnn.pad_sequence([torch.tensor(p) for p in prompts], batch_first=True).to(device)  # (B, P)
    pos = torch.tensor(lengths, device=device) - 1                            # (B,) where the next token is predicted
    c = model.read(idx, (torch.arange(B, device=device), pos))
    token, block_size, P = c.token, model.trunk.config.block_size, idx.size(1)
    length = min(P + max_new_tokens, block_size)
    cache, predict_next, h = c.kv, next_token, c.h

    for n in range(max_new_tokens):
        # Right padding is harmless: a row sees keys up to its own position and overwrites the padding as it grows.
        S = length if compile else min(P + n, block_size)
        masked = compile or min(lengths[row] for row in rows) < P             # else every row sees all S keys
        mask = (torch.arange(S, device=device) <= pos[:, None])[:, None, None] if masked else None   # (B, 1, 1, S)
        if n == 0 or S > cache[0][0].size(2):                                 # little longer than S: a CPU then reads it faster
            cache = new_cache(cache, length if compile else min(S + 7, length))
        kv = cache if compile else first_keys(cache, S)                       # a CUDA graph wants the tensors themselves, no views
        c, traces = Context(h, token, pos, kv, None, mask), [[] for _ in rows] if trace else None
        token, nfe = predict_next(model, sampler, V, tables, c, label, sigma * x_0[:, n], u[:, n], traces)
        if compile and n == 0:                                                # now tables is full
            predict_next = compiled_next_token(V, tables, cache)
        token, h = token.clone(), None          # a CUDA graph will overwrite its output; from here on the trunk reads token

        going, ys, calls, positions = [], token.tolist(), nfe.tolist(), pos.tolist()
        for i in live:
            o = out[rows[i]]
            o.predicted, o.nfe, o.ended = o.predicted + 1, o.nfe + calls[i], ys[i] == eot
            if not o.ended:
                o.tokens.append(ys[i])
                if positions[i] + 1 < block_size:
                    going.append(i)
            if trace:
                o.trace.append(traces[i])
        live = going
        if not live:
            break
        if len(going) < len(rows) and not compile:                            # those that ended leave the batch
            keep = torch.tensor(going, device=device)
            rows, live = [rows[i] for i in going], range(len(going))
            token, pos, label, x_0, u = (z[keep] for z in (token, pos, label, x_0, u))
            cache = [(k[keep], v[keep]) for k, v in cache]
        pos = (pos + 1).clamp(max=length - 1)                                 # the limit is for rows that have ended
    return out


@torch.no_grad()
def teacher_forced(model, idx, targets, sampler, generator, label=None):
    """Algorithm 1 at every target given its true context, all at once: sharper than comparing generated texts.

    idx, targets (B, T) as in nll; label (B,) or None; generator draws the noise. Returns for the N targets, in row
    order, -log p of the target (N,), whether it was the most probable token (N,), and path calls (N,).
    """
    at = (targets >= 0).nonzero(as_tuple=True)
    y, path = targets[at], model.path
    label = torch.full_like(y, model.no_label) if label is None else label[at[0]]
    V = x_0 = None
    if sampler.steps > 1:
        V = path.token_space(model.trunk.wte.weight)
        x_0 = path.config.sigma * torch.randn(len(y), path.config.x_dim, generator=generator, device=y.device)
    u = torch.rand(len(y), sampler.steps + 1, generator=generator, device=y.device)
    f = Denoiser(model, sampler, V, {}, model.read(idx, at), label, u)
    logits = predict(f, x_0, sampler)
    return F.cross_entropy(logits, y, reduction="none"), logits.argmax(-1) == y, f.nfe
