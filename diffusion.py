"""
The diffusion of L2D: noising, loss, velocity, solvers and Algorithm 1, as functions on tensors.

Time runs from t = 0, pure noise, to t = 1, data. A language model predicts the next token from its context c
alone; L2D reads that as one evaluation at t = 0, and goes on. With Euler's steps, T evaluations are

    x_t = sigma * torch.randn(N, D)
    logits = trunk.head(c.h)                                # T = 1: the untouched model
    for a, b in pairwise(times):                            # 0, 1/T, 2/T, ..., to 15/16 at most
        x_1_hat = V[logits.argmax(-1)]                      # the guess, a point of the token space
        x_t = x_t + (b - a) * (x_1_hat - x_t) / (1 - a)     # Eq. 4: a step towards it
        logits = pair(x_t, b, c)                            # Eq. 6: a path call

Symbols are those of model.py, except T: evaluations of one token, the option `steps`. "Eq." is the paper's.
"""
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F

from configurator import at_least, require, without_effect
from denoiser import Denoiser, Tables


# -------------------------------------------------------------------------------------------- training
def noise(x_1, x_0, t):
    """Eq. 1: x_t = t x_1 + (1 - t) x_0. x_1, x_0 (N, D), t (N,) -> (N, D)."""
    return t[:, None] * x_1 + (1 - t[:, None]) * x_0


def draw(n, path_config, generator):
    """t ~ U[0, 1) (n,) and x_0 ~ N(0, sigma^2 I) (n, D), float32, independent for every position."""
    t = torch.rand(n, generator=generator, device=generator.device)
    x_0 = torch.randn(n, path_config.x_dim, generator=generator, device=generator.device)
    return t, path_config.sigma * x_0


def nll(model, idx, at, y, label, t=None, x_0=None, T=None):
    """Eq. 3: -log f(x_t, t, c)_y at each target, float32 (N,). The caller sums and weighs.

    idx (B, length) tokens; at = (rows, columns), each (N,): where the targets are predicted; y (N,) the
    targets; label (B,) guidance labels; t (N,) and x_0 (N, D) as from draw. T, in place of t: x_t comes not
    from the truth but from the model's own mean guesses, by Algorithm 1 with T evaluations of the solver
    fixed_point, and the gradient goes through all of them (deviation 12). Without a path: plain
    cross-entropy of the trunk.
    """
    c = model.read(idx, at)
    if model.path is None:
        logits = model.trunk.head(c.h)
    elif T is None:
        x_1 = model.embed(y)                                      # (N, D)
        x_t = noise(x_1, x_0, t)
        logits = model(x_t, t, c, label[at[0]])                   # (N, V_size)
    else:
        sampler = Sampler(steps=T, solver="fixed_point", guess="mean")
        logits = predict(Denoiser(model, sampler, Tables(model), c, label[at[0]], x_0))
    return F.cross_entropy(logits.float(), y, reduction="none")


# --------------------------------------------------------------------------------------------- solvers
def velocity(x_t, t, x_1_hat):
    """Eq. 4: dx_t/dt = (x_1_hat - x_t) / (1 - t), (N, D). t a float below 1, or (N,)."""
    rest = 1 - (t[:, None] if torch.is_tensor(t) else t)
    return (x_1_hat - x_t) / rest


def euler_step(dx, x, a, b):
    """From time a to b with the slope at a: one evaluation. dx(x, t) is the slope; there is none at t = 1."""
    return x + (b - a) * dx(x, a)


def midpoint_step(dx, x, a, b):
    """From time a to b with the slope at the midpoint: two evaluations. The paper's solver."""
    m = (a + b) / 2
    return x + (b - a) * dx(euler_step(dx, x, a, m), m)


def heun_step(dx, x, a, b):
    """From time a to b with the mean of the slopes at both ends: two evaluations, one where b = 1."""
    v_a = dx(x, a)
    x_b = x + (b - a) * v_a
    if b == 1:                                                    # there the slope does not exist
        return x_b
    return x + (b - a) / 2 * (v_a + dx(x_b, b))


def fixed_point_step(dx, x, a, b, x_0, weight):
    """From time a to b on the line from x_0 to m, a mean of the guesses that each call moves by `weight`.

    Every solver here keeps x_t on a line from x_0: x_t = (1 - t) x_0 + t m, where m combines the guesses so
    far, with weights that sum to 1. Euler gives the newest guess the weight (b - a) / ((1 - a) b): 1 at the
    first call, and the less the finer the times. Here it is the same at every call but the first: a relaxed
    fixed-point iteration m <- x_1_hat (deviation 5). m is read off x_t: the step has no state. One
    evaluation.
    """
    x_1_hat = x + (1 - a) * dx(x, a)
    m = x_1_hat if a == 0 else (x - (1 - a) * x_0) / a
    m = m + weight * (x_1_hat - m)
    return (1 - b) * x_0 + b * m


def time_grid(n, t_end, t_hold=0.0):
    """0, and n times up to t_end: evenly; or, with t_hold, all but the last at t_hold."""
    return [0.0] + [t_hold if t_hold and i < n else t_end * (i / n) for i in range(1, n + 1)]


def adaptive(x_1_hat, x, steps, tol, t_end):
    """Euler's steps, of sizes chosen by Heun's error estimate, for each position on its own (deviation 7).

    From (x, t) with slope v, the trial x' = x + dt v is evaluated at t + dt, which gives the slope v' there.
    Heun and Euler differ by e = dt/2 |v' - v| / sqrt(D). If e <= tol the position moves to x' and keeps v',
    so that an accepted step costs one evaluation; else it tries again with a smaller dt. With argmax guesses
    e is 0 exactly where the guess has not changed. A position ends at t_end or when its `steps` evaluations
    are spent; the token is then chosen from its last evaluation, be that of an accepted step or of a trial.
    where (N,) bool: the positions still on their way, which alone x_1_hat(x, t, where) evaluates. Returns the
    x and t (N,) that each has reached.
    """
    t = torch.zeros(len(x), device=x.device)
    dt = torch.full_like(t, 0.25)
    where = torch.ones_like(t, dtype=torch.bool)
    v = velocity(x, t, x_1_hat(x, 0.0, where))
    for _ in range(steps - 1):
        if not where.any():
            break
        t_new = torch.where(t + 1.01 * dt > t_end, t_end, t + dt)  # leave no sliver for a last step
        dt = t_new - t
        x_new = x + dt[:, None] * v
        guess, at_1 = x_1_hat(x_new, t_new, where), t_new == 1    # at 1 there is no slope: the step stands
        v_new = torch.where(at_1[:, None], v, velocity(x_new, torch.where(at_1, t, t_new), guess))
        error = dt / 2 * (v_new - v).norm(dim=1) / x.size(1) ** 0.5  # (N,)
        accept = where & (error <= tol)
        x, v = (torch.where(accept[:, None], new, old) for new, old in ((x_new, x), (v_new, v)))
        t = torch.where(accept, t_new, t)
        factor = (0.9 * (tol / error.clamp(min=1e-9)).sqrt()).clamp(0.3, 2.0)
        dt = torch.where(where, dt * factor, dt)
        where = where & (t < t_end)
    return x, t


SOLVERS = {"euler": (euler_step, 1), "midpoint": (midpoint_step, 2), "heun": (heun_step, 2),
           "fixed_point": (fixed_point_step, 1),              # a step, and the evaluations it takes
           "adaptive": (adaptive, 1)}                         # at times of its own: see predict


# ----------------------------------------------------------------------------------------- Algorithm 1
def algorithm_1(f, x_0, times, step=euler_step):
    """Algorithm 1 of the paper, for N tokens at once: logits (N, V_size) of the last of T evaluations.

    f: a Denoiser. x_0 (N, D) ~ N(0, sigma^2 I). times: from 0, never falling; [0] is T = 1, plain decoding.
    step: the solver's way from one time to the next. Training with --unroll runs this.
    """
    def dx(x_t, t):
        x_1_hat = f.x_1_hat(x_t, t)                           # V_y of the guess y, given x_t and c
        return velocity(x_t, t, x_1_hat)                      # Eq. 4

    x_t = x_0                                                 # noise
    for a, b in pairwise(times):                              # Euler: T - 1 steps of the ODE
        x_t = step(dx, x_t, a, b)
    return f.logits(x_t, times[-1])                           # the token is chosen from these


@dataclass(frozen=True)
class Sampler:
    # how a token is predicted
    steps: int = 16                 # T, evaluations of the model for one token; 1 is the untouched trunk
    solver: Literal[tuple(SOLVERS)] = "euler"  # the paper's: midpoint (deviation 10); adaptive: at most T
    t_end: float = 0.0              # time of the last evaluation; 0: 1 - 1/T, at most 15/16; fixed_point: 0.9
    t_hold: float = 0.5             # fixed_point: time of all path calls but the last; 0 = even up to t_end
    weight: float = 0.5             # fixed_point: of the newest guess
    tol: float = 0.1                # adaptive: error allowed per step, in units of x_1's standard deviation
    stop: float = 0.0               # ends at a guess repeated within stop sqrt(D) of the mean before; 0 = off
    guess: Literal["argmax", "sample", "mean"] = "argmax"  # x_1_hat: V of the best token, a sampled one, mean
    guidance: float = 1.0           # w of Eq. 7; 1 = off. Needs a label
    temperature: float = 0.0        # of the final choice of the token; 0 = the most probable
    top_k: int = 0                  # choose among the k most probable tokens; 0 = all

    def __post_init__(self):
        at_least(self, steps=1, t_hold=0, t_end=0, stop=0, temperature=0, top_k=0)
        require(self.t_end <= 1, f"t_end={self.t_end}, but it must be at most 1")
        require(self.temperature == 0 or self.temperature >= 1e-4, f"temperature={self.temperature}, but it "
                "must be 0, for the most probable token, or at least 0.0001")
        require(abs(self.guidance) <= 1000, f"guidance={self.guidance}, but it must be from -1000 to 1000")
        require(self.tol > 0, f"tol={self.tol}, but it must be above 0")
        require(0 < self.weight <= 1, f"weight={self.weight}, but it must be above 0 and at most 1")
        without_effect(self, "solver=fixed_point", self.solver == "fixed_point", "t_hold", "weight")
        without_effect(self, "solver=adaptive", self.solver == "adaptive", "tol")
        without_effect(self, "a temperature", self.temperature > 0, "top_k")
        require(self.solver != "fixed_point" or self.t_hold <= self.last_time() and self.t_hold < 1,
                f"t_hold={self.t_hold}, but it must be below 1, and at most t_end={self.last_time()}")

    def last_time(self):
        """t_end; by default (steps - 1) / steps, at most 15/16 (deviation 6), and of fixed_point 0.9.

        At 1 Euler's x_t is V of the guess, exactly, and holds nothing else. Above 15/16 x_t shows the guess,
        right or wrong, to a path trained on x_t from the truth, and accuracy falls (docs/LOG.md).
        """
        last = 0.9 if self.solver == "fixed_point" else min((self.steps - 1) / self.steps, 15 / 16)
        return self.t_end or last

    def plan(self, x_0):
        """The times and the step of Algorithm 1 that spend `steps` evaluations; of Heun to t = 1 one less."""
        (step, cost), t_hold = SOLVERS[self.solver], 0.0
        n, left = divmod(self.steps - 1, cost)
        if self.solver == "fixed_point":
            step, t_hold = partial(step, x_0=x_0, weight=self.weight), self.t_hold
        times = time_grid(n + left, self.last_time(), t_hold)

        def euler_first(dx, x, a, b):                         # evaluations left over are Euler steps
            return (euler_step if b <= times[left] else step)(dx, x, a, b)
        return times, euler_first if left else step


def predict(f):
    """Logits (N, V_size) of the last evaluation: by Algorithm 1, or each position at times of its own."""
    s = f.sampler
    if s.solver == "adaptive" and s.steps > 1:
        adaptive(f.x_1_hat, f.x_0, s.steps, s.tol, s.last_time())
        return f.latest
    return algorithm_1(f, f.x_0, *s.plan(f.x_0))


@torch.no_grad()
def teacher_forced(model, idx, at, sampler, generator, label=None):
    """Algorithm 1 at every position given its true context, all at once: sharper than comparing texts.

    idx (B, length); at = (rows, columns), each (N,); label (B,) or None; generator draws the noise. Returns
    logits (N, V_size) and path calls (N,).
    """
    c, n, tables, x_0 = model.read(idx, at), len(at[0]), None, None
    label = torch.full_like(at[0], model.no_label) if label is None else label[at[0]]
    if sampler.steps > 1:
        tables, config = Tables(model), model.path.config
        x_0 = config.sigma * torch.randn(n, config.x_dim, generator=generator, device=idx.device)
    u = torch.rand(n, sampler.steps + 1, generator=generator, device=idx.device)
    f = Denoiser(model, sampler, tables, c, label, x_0, u)
    return predict(f), f.nfe
