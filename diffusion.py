"""
The diffusion of L2D: noising, loss, velocity, solvers and Algorithm 1, as functions on tensors.

A language model predicts the next token y from its context c alone. L2D predicts it T times. The predictor
f(x_t, t, c) is also shown a noised point x_t, which carries what was guessed so far. Time runs from t = 0,
where x_t is pure noise, to t = 1, where x_t = V_y is the point of a token. Algorithm 1, with Euler's steps:

    x_t = x_0                                             # noise: sigma * torch.randn(N, D)
    for a, b in pairwise(times):                          # T times from 0 on, so T - 1 pairs
        logits = f(x_t, a, c)                             # predict. At a = 0 this is the trunk alone
        x_1_hat = V[logits.argmax(-1)]                    # guess: the point of the most probable token
        x_t = x_t + (b - a) * (x_1_hat - x_t) / (1 - a)   # a solver step towards the guess (Eq. 4)
    logits = f(x_t, times[-1], c)                         # the last prediction: the token is chosen from it

Training does not run this loop. It builds x_t from the true token: x_t = t V_y + (1 - t) x_0 (Eq. 1).
Words, symbols and shapes are those of model.py.
"""
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F

from configurator import at_least, require, without_effect


# -------------------------------------------------------------------------------------------- training
def noise(x_1, x_0, t):
    """Eq. 1: x_t = t x_1 + (1 - t) x_0. x_1 and x_0 (N, D), t (N,) -> (N, D)."""
    return t[:, None] * x_1 + (1 - t[:, None]) * x_0


def draw(n, path_config, generator):
    """Draw t ~ U[0, 1), (n,), and x_0 ~ N(0, sigma^2 I), (n, D), independently for every position."""
    t = torch.rand(n, generator=generator, device=generator.device)
    x_0 = torch.randn(n, path_config.x_dim, generator=generator, device=generator.device)
    return t, path_config.sigma * x_0


def drop_groups(group, no_group, share, generator):
    """Replace a random share of the guidance groups (B,) by no_group: whole examples, not single tokens."""
    drop = torch.rand(len(group), generator=generator, device=group.device) < share
    return torch.where(drop, no_group, group)


def draw_steps(most_path_calls, generator):
    """Draw T for a pass of unrolled training: 1 to most_path_calls path calls, uniform in the logarithm."""
    u = torch.rand((), generator=generator, device=generator.device)
    return 1 + int((most_path_calls + 1) ** u)


def nll(model, idx, at, y, group, t, x_0):
    """Eq. 3, the loss: -log softmax(f(x_t, t, c))_y for each target, float32 (N,). The caller takes the mean.

    idx: (B, S) token ids. at: (rows, columns), each (N,), the positions whose next token is a target.
    y: (N,) these targets. group: (B,) guidance groups. t: (N,) and x_0: (N, D), from draw.
    """
    c = model.read_context(idx, at)                               # one pass of the trunk
    x_1 = model.embed(y)                                          # (N, D), Eq. 5
    x_t = noise(x_1, x_0, t)                                      # (N, D), Eq. 1
    h = model.merge(x_t, t, c, group[at[0]])                      # (N, C), Eq. 6
    return model.trunk.cross_entropy(h, y)


def unrolled_nll(model, idx, at, y, group, x_0, steps):
    """The loss of train.py --unroll: -log p(y) after Algorithm 1 with T = steps, float32 (N,).

    x_t comes not from the true token but from the model's own mean guesses, and the gradient goes through
    all evaluations (deviation 12). Arguments as in nll.
    """
    c = model.read_context(idx, at)
    config = SamplerConfig(steps=steps, **UNROLLED)
    f = Denoiser(model, config, Tables(model), c, group[at[0]], x_0)
    return F.cross_entropy(f.predict(), y, reduction="none")


def trunk_nll(model, idx, at, y):
    """The loss of the trunk alone, at the same targets: (N,)."""
    return model.trunk.cross_entropy(model.read_context(idx, at).h, y)


# --------------------------------------------------------------------------------------------- solvers
# A solver step moves x (N, D) from time a to time b. dx(x, t) is the velocity there; each call of it is one
# evaluation of the model. It must not be called at t = 1, where the velocity is undefined.
def velocity(x_t, t, x_1_hat):
    """Eq. 4: dx_t/dt = (x_1_hat - x_t) / (1 - t), (N, D). t: a float below 1, or (N,)."""
    if torch.is_tensor(t):
        t = t[:, None]
    return (x_1_hat - x_t) / (1 - t)


def euler_step(dx, x, a, b):
    """Move with the velocity at a. One evaluation."""
    return x + (b - a) * dx(x, a)


def midpoint_step(dx, x, a, b):
    """Move with the velocity half-way between a and b. Two evaluations. The paper's solver."""
    m = (a + b) / 2
    return x + (b - a) * dx(euler_step(dx, x, a, m), m)


def heun_step(dx, x, a, b):
    """Move with the mean of the velocities at a and b. Two evaluations, or one where b = 1."""
    v_a = dx(x, a)
    x_b = x + (b - a) * v_a
    if b == 1:                                                    # no velocity there: Euler's step stands
        return x_b
    return x + (b - a) / 2 * (v_a + dx(x_b, b))


def fixed_point_step(dx, x, a, b, x_0, relaxation):
    """Move along the line from x_0 to m, a running mean of the guesses. One evaluation.

    Every solver here keeps x_t on such a line: x_t = (1 - t) x_0 + t m. Solvers differ in how m weighs the
    guesses so far. Euler's step gives the newest guess the weight (b - a) / ((1 - a) b), which falls as the
    grid gets finer. Here the weight is the same at every step: m <- m + relaxation (x_1_hat - m). This is a
    relaxed fixed-point iteration for m = x_1_hat, and it is not in the paper (deviation 5).
    """
    x_1_hat = x + (1 - a) * dx(x, a)
    m = x_1_hat if a == 0 else (x - (1 - a) * x_0) / a            # the mean so far, computed back from x
    m = m + relaxation * (x_1_hat - m)
    return (1 - b) * x_0 + b * m


SOLVERS = {                                                       # name: (solver step, its evaluations)
    "euler": (euler_step, 1),
    "midpoint": (midpoint_step, 2),
    "heun": (heun_step, 2),
}
UNROLLED = {"solver": "fixed_point", "guess": "mean"}             # how a path of --unroll is sampled


def make_time_grid(n, t_end, t_hold=0.0):
    """0 and n further times up to t_end: evenly spaced, or all but the last at t_hold, if that is not 0."""
    times = [t_end * (i / n) for i in range(1, n + 1)]
    if t_hold:
        times = [t_hold] * (n - 1) + times[-1:]
    return [0.0, *times]


# ----------------------------------------------------------------------------------------- Algorithm 1
def algorithm_1(f, x_0, times, solver_steps):
    """Algorithm 1 for N tokens at once: the logits (N, V_size) of the last of T evaluations.

    f: a Denoiser. x_0: (N, D) ~ N(0, sigma^2 I). times: from 0, never falling; [0.0] is T = 1, the trunk
    alone. solver_steps: a function for each move between two times. For Euler there are T times and T - 1
    moves, all of them euler_step. A solver with two evaluations per step has about half as many.
    """
    def dx(x_t, t):
        x_1_hat = f.x_1_hat(x_t, t)                               # predict and guess
        return velocity(x_t, t, x_1_hat)                          # Eq. 4

    x_t = x_0
    for (a, b), step in zip(pairwise(times), solver_steps):
        x_t = step(dx, x_t, a, b)
    return f.evaluate(x_t, times[-1])


@dataclass(frozen=True)
class SamplerConfig:                # `--help` prints the comments of this class
    # how a token is predicted
    steps: int = 16                 # T, evaluations per token; 1 is the trunk alone
    solver: Literal[(*SOLVERS, "fixed_point", "adaptive")] = "euler"  # the paper's: midpoint
    t_end: float = 0.0              # time of the last evaluation; 0: 1 - 1/T, at most 15/16; fixed_point: 0.9
    t_hold: float = 0.5             # fixed_point: time of all path calls but the last; 0: evenly up to t_end
    relaxation: float = 0.5         # fixed_point: weight of the newest guess
    tol: float = 0.1                # adaptive: error allowed per solver step
    stop: float = 0.0               # end when a guess repeats, and is this close to the mean guess; 0: never
    guess: Literal["argmax", "sample", "mean"] = "argmax"  # what x_t moves to: a token, or a mean
    guidance: float = 1.0           # w of Eq. 7; 1: off. Needs a group
    temperature: float = 0.0        # of the choice of the token; 0: the most probable
    top_k: int = 0                  # choose among the k most probable tokens; 0: all

    def __post_init__(self):
        at_least(self, steps=1, t_hold=0, t_end=0, stop=0, temperature=0, top_k=0)
        require(self.steps <= 1000, f"steps={self.steps}, but it must be at most 1000")
        require(self.t_end <= 1, f"t_end={self.t_end}, but it must be at most 1")
        require(self.temperature == 0 or self.temperature >= 1e-4, f"temperature={self.temperature}, but it "
                "must be 0, for the most probable token, or at least 0.0001")
        require(abs(self.guidance) <= 1000, f"guidance={self.guidance}, but it must be from -1000 to 1000")
        require(self.tol > 0, f"tol={self.tol}, but it must be above 0")
        require(0 < self.relaxation <= 1,
                f"relaxation={self.relaxation}, but it must be above 0 and at most 1")
        without_effect(self, "solver=fixed_point", self.solver == "fixed_point", "t_hold", "relaxation")
        without_effect(self, "solver=adaptive", self.solver == "adaptive", "tol")
        without_effect(self, "a temperature", self.temperature > 0, "top_k")
        if self.solver == "fixed_point":
            require(self.t_hold <= self.last_time() and self.t_hold < 1,
                    f"t_hold={self.t_hold}, but it must be below 1, and at most t_end={self.last_time()}")

    @property
    def times_are_known(self):
        """Whether the times of all evaluations are known before the first."""
        return self.solver != "adaptive"

    def last_time(self):
        """The time of the last evaluation: t_end, or (T - 1) / T but at most 15/16, or 0.9 for fixed_point.

        At t = 1 Euler's x_t is the point of the guess and nothing else. After 15/16 it shows the guess, right
        or wrong, so clearly that a path trained on the truth believes it, and accuracy falls (deviation 6).
        """
        if self.t_end:
            return self.t_end
        if self.solver == "fixed_point":
            return 0.9
        return min((self.steps - 1) / self.steps, 15 / 16)

    def plan(self, x_0):
        """The times of Algorithm 1 and the solver steps between them.

        The steps take T - 1 evaluations, and the last evaluation is the prediction. If T - 1 is odd, a solver
        that takes two evaluations per step begins with a step of Euler. Heun with t_end=1 takes one
        evaluation less, since there is no velocity at t = 1.
        """
        n_before = self.steps - 1                                 # evaluations before the last one
        if n_before == 0:
            return [0.0], []
        if self.solver == "fixed_point":
            step = partial(fixed_point_step, x_0=x_0, relaxation=self.relaxation)
            return make_time_grid(n_before, self.last_time(), self.t_hold), [step] * n_before
        step, cost = SOLVERS[self.solver]
        n_steps, n_left = divmod(n_before, cost)
        times = make_time_grid(n_left + n_steps, self.last_time())
        return times, [euler_step] * n_left + [step] * n_steps


# ---------------------------------------------------------------------------------------- the denoiser
def choose(logits, u, temperature=1.0, top_k=0):
    """Choose a token for each row of logits (N, V_size): the best at temperature 0, else sampled with u (N,).

    u are uniform random numbers. The token is the one at which the cumulative probability passes u.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if 0 < top_k < logits.size(-1):
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    cdf = logits.softmax(-1).cumsum(-1)
    token = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)[:, 0]
    return token.clamp(max=logits.size(-1) - 1)


def find_probability(logits, token):
    """The probability of the token (N,) of each row of logits (N, V_size): (N,)."""
    return logits.softmax(-1).gather(1, token[:, None])[:, 0]


class Tables(dict):
    """What is the same for every token: V (V_size, D), and for each time path.condition for every group.

    tables[t] is path.condition at t for the groups 0, 1, ..., no_group. It is computed when first asked for.
    """
    def __init__(self, model):
        self.path = model.path
        self.V = model.embed(slice(None))
        self.earlier = {}                                         # what speculate.py saw in earlier texts

    def at(self, times):
        """M times as a tensor, and their conditions for G groups: L x (M G, 6C) and w_d (M G, C)."""
        if times not in self:
            modulations, w_d = zip(*(self[t] for t in times))
            layers = [torch.cat(layer) for layer in zip(*modulations)]
            self[times] = torch.tensor(times, device=self.V.device), layers, torch.cat(w_d)
        return self[times]

    def __missing__(self, t):
        group = torch.arange(self.path.n_groups + 1, device=self.V.device)
        times = torch.full(group.shape, t, device=group.device)
        self[t] = self.path.condition(times, group)
        return self[t]


class Denoiser:
    """Evaluates f(x_t, t, c) at N positions, and looks up the point x_1_hat of the guess, for Algorithm 1.

    After an evaluation, logits (N, V_size) are its prediction, and guess (N,) the tokens that it guesses.
    nfe (N,) counts the path calls of each position (number of function evaluations; the trunk's is free).

    model: an L2D pair. config: a SamplerConfig. tables: Tables of the model, None for T = 1. c: the Context
    of the positions. group: (N,) guidance groups. x_0: (N, D), the noise to start from. u: (N, T + 1) uniform
    numbers, needed where guesses are sampled: evaluation i, from 1 on, uses column i. trunk_logits:
    (N, V_size), where they are known already. trace: keep for each position a list of (t, guess, probability)
    of its evaluations.
    """
    def __init__(self, model, config, tables, c, group, x_0, u=None, trunk_logits=None, trace=False):
        self.model = model
        self.config = config
        self.tables = tables
        self.c = c
        self.group = group
        self.x_0 = x_0
        self.u = u
        self.trunk_logits = model.trunk.head(c.h) if trunk_logits is None else trunk_logits
        self.trace = [[] for _ in c.pos] if trace else None
        self.nfe = torch.zeros_like(c.pos)
        self.n_evaluations = 0

    def predict(self):
        """Run Algorithm 1 from x_0. Returns the logits (N, V_size) that the tokens are chosen from."""
        times, solver_steps = self.config.plan(self.x_0)
        return algorithm_1(self, self.x_0, times, solver_steps)

    def evaluate(self, x_t, t):
        """One evaluation: f(x_t, t, c), logits (N, V_size), float32. t: a float."""
        if t == 0:                                                # w_d is 0: the trunk's own prediction
            self.logits = self.trunk_logits.float()
        else:
            self.logits = self.call_path(x_t, t, self.group)
        self.n_evaluations += 1
        self.guess = self.pick(self.logits)
        self.record(t)
        return self.logits

    def x_1_hat(self, x_t, t):
        """Evaluate, and return the guess as a point (N, D) of the token space."""
        self.evaluate(x_t, t)
        x_1_hat = self.embed(self.logits, self.guess)
        w = self.config.guidance
        if w != 1 and t > 0:                                      # Eq. 7, with a plus sign (deviation 8)
            no_group = torch.full_like(self.group, self.model.no_group)
            logits = self.call_path(x_t, t, no_group)
            x_1_hat = w * x_1_hat + (1 - w) * self.embed(logits, self.pick(logits))
        return x_1_hat

    def call_path(self, x_t, t, group):
        """A path call: logits (N, V_size) of the pair at time t, for these guidance groups (N,)."""
        self.nfe += 1
        modulations, w_d = self.tables[t]
        condition = [m[group] for m in modulations], w_d[group]   # L x (N, 6C), (N, C)
        times = torch.full_like(x_t[:, 0], t)
        return self.model(x_t, times, self.c, group, condition).float()

    def pick(self, logits):
        """The guessed tokens (N,): the most probable ones, or sampled ones."""
        if self.config.guess == "sample":
            return choose(logits, self.uniforms())
        return logits.argmax(-1)

    def uniforms(self):
        """The random numbers (N,) of the newest evaluation."""
        return self.u[:, self.n_evaluations]

    def embed(self, logits, guess):
        """The point (N, D) of the guessed tokens; with guess="mean" the mean of V under softmax(logits)."""
        if self.config.guess != "mean":
            return self.tables.V[guess]
        with torch.autocast(logits.device.type, enabled=False):   # float32
            return logits.softmax(-1) @ self.tables.V

    def record(self, t):
        if self.trace is not None:
            p = find_probability(self.logits, self.guess)
            for evaluations, guess, probability in zip(self.trace, self.guess.tolist(), p.tolist()):
                evaluations.append((t, guess, probability))
