"""
Evaluations spent where they are needed: an adaptive solver and a stop rule, each token on its own.

diffusion.py evaluates all N positions together, at the same times. Here a position may have times of its own
(--solver=adaptive), and may stop before its T evaluations are spent (--stop). Neither is needed to understand
Algorithm 1. Words, symbols and shapes are those of model.py.
"""
import torch

from diffusion import Denoiser, find_probability, velocity
from model import Context


def adaptive(x_1_hat, x, steps, tol, t_end):
    """Euler's steps from (x, t = 0), with sizes chosen by Heun's error estimate, per position (deviation 7).

    A position at (x, t) with velocity v tries the step to x' = x + dt v, at the time t + dt, and evaluates
    there, which gives the velocity v'. Heun's step and Euler's differ by e = dt/2 |v' - v| / sqrt(D).
        e <= tol: the position moves to x' and keeps v', so an accepted step costs one evaluation.
        e > tol: it stays, and tries again with a smaller dt.
    With argmax guesses e is 0 exactly where the guess has not changed.

    A position ends at t_end, or when its evaluations are spent. Its token is chosen from its last evaluation,
    whether that step was accepted or not.

    x_1_hat(x, t, where): evaluates the positions that are True in where (N,). x: (N, D) noise. steps: T, the
    most evaluations. Returns x (N, D) and t (N,) that each position has reached.
    """
    t = torch.zeros(len(x), device=x.device)
    dt = torch.full_like(t, 0.25)
    going = torch.ones_like(t, dtype=torch.bool)
    v = velocity(x, t, x_1_hat(x, 0.0, going))
    for _ in range(steps - 1):
        if not going.any():
            break
        t_new = torch.where(t + 1.01 * dt > t_end, t_end, t + dt)  # 1.01: leave no tiny rest for a last step
        dt = t_new - t
        x_new = x + dt[:, None] * v
        guess = x_1_hat(x_new, t_new, going)
        at_1 = t_new == 1                                         # no velocity there, it would divide by 0:
        v_new = velocity(x_new, torch.where(at_1, t, t_new), guess)
        v_new = torch.where(at_1[:, None], v, v_new)              # keep v, so that the step is accepted
        error = dt / 2 * (v_new - v).norm(dim=1) / x.size(1) ** 0.5  # (N,)
        accept = going & (error <= tol)
        x = torch.where(accept[:, None], x_new, x)
        v = torch.where(accept[:, None], v_new, v)
        t = torch.where(accept, t_new, t)
        # The error of Euler's step grows as dt^2, so this dt would meet tol, with a margin of 0.9.
        factor = (0.9 * (tol / error.clamp(min=1e-9)).sqrt()).clamp(0.3, 2.0)
        dt = torch.where(going, dt * factor, dt)
        going = going & (t < t_end)
    return x, t


def find_distance(x_t, t, x_0, x_1_hat):
    """|x_1_hat - m| / sqrt(D), (N,): how far the newest guess is from the mean m of those before it (--stop).

    x_t = (1 - t) x_0 + t m, which gives m. t: a float, or (N,).
    """
    if torch.is_tensor(t):
        t = t[:, None]
    m = (x_t - (1 - t) * x_0) / t
    return (x_1_hat - m).norm(dim=1) / x_t.size(1) ** 0.5


class AdaptiveDenoiser(Denoiser):
    """A Denoiser that can evaluate some of its positions, each at its own time, and stop some of them.

    The logits and the guess of a position that is not evaluated stay as they are.
    """
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.running = torch.ones_like(self.c.pos, dtype=torch.bool)  # (N,) not stopped

    def predict(self):
        """Logits (N, V_size) of each position's last evaluation."""
        if self.config.solver != "adaptive":
            return super().predict()
        if self.config.steps == 1:
            return self.evaluate(self.x_0, 0.0)
        adaptive(self.x_1_hat, self.x_0, self.config.steps, self.config.tol, self.config.last_time())
        return self.logits                                        # which its evaluations have left here

    def evaluate(self, x_t, t, where=None):
        """Evaluate at t, a float or (N,), the positions that are running, and True in where (N,) if given.

        Returns the logits (N, V_size) of all positions. self.evaluated says which of them are new.
        """
        self.evaluated = slice(None)                              # all; else their indices (n,)
        if not torch.is_tensor(t) and t == 0:
            return super().evaluate(x_t, t)
        going = self.running if where is None else where & self.running
        if not going.all():
            self.evaluated = going.nonzero()[:, 0]
        if not going.any():
            return self.logits
        self.n_evaluations += 1
        logits = self.call_path(x_t, t, self.group)
        guess = self.pick(logits)
        if going.all():
            self.logits = logits
            self.guess = guess
        else:
            self.logits[self.evaluated] = logits
            self.guess = self.guess.index_put((self.evaluated,), guess)   # a copy: x_1_hat needs the old one
        self.record(t)
        return self.logits

    def x_1_hat(self, x_t, t, where=None):
        """Evaluate the positions as evaluate does, and return the guesses of all as points (N, D)."""
        first = not torch.is_tensor(t) and t == 0
        guess_before = None if first else self.guess
        self.evaluate(x_t, t, where)
        i = self.evaluated
        x_1_hat = self.embed(self.logits, self.guess)
        if first or (torch.is_tensor(i) and len(i) == 0):
            return x_1_hat
        w = self.config.guidance
        if w != 1:                                                # Eq. 7
            no_group = torch.full_like(self.group, self.model.no_group)
            logits = self.call_path(x_t, t, no_group)
            x_1_hat[i] = w * x_1_hat[i] + (1 - w) * self.embed(logits, self.pick(logits))
        if self.config.stop:
            far = find_distance(x_t, t, self.x_0, x_1_hat) > self.config.stop
            self.running[i] = (far | (self.guess != guess_before))[i]
        return x_1_hat

    def call_path(self, x_t, t, group):
        """A path call at the positions self.evaluated, of which there are n: logits (n, V_size)."""
        i = self.evaluated
        self.nfe[i] += 1
        x_t = x_t[i]
        group = group[i]
        if torch.is_tensor(t):                                    # each position has its own time: no table
            t = t[i]
            condition = self.model.path.condition(t, group)
        else:
            modulations, w_d = self.tables[t]
            condition = [m[group] for m in modulations], w_d[group]
            t = torch.full_like(x_t[:, 0], t)
        c = self.c if isinstance(i, slice) else select(self.c, i)
        return self.model(x_t, t, c, group, condition).float()

    def uniforms(self):
        return super().uniforms()[self.evaluated]

    def record(self, t):
        if self.trace is not None:
            traces = self.trace
            times = torch.as_tensor(t).expand(len(self.guess)).tolist()
            p = find_probability(self.logits, self.guess).tolist()
            guesses = self.guess.tolist()
            for n in torch.arange(len(traces), device=self.guess.device)[self.evaluated].tolist():
                traces[n].append((times[n], guesses[n], p[n]))


def select(c, i):
    """The Context of the positions i (n,) alone, in their order. Rows without one are left out."""
    B = c.kv[0][0].size(0)
    if c.at is None and c.mask is None:                           # one position per row, which sees every key
        return Context(c.h[i], c.token[i], c.pos[i], [(k[i], v[i]) for k, v in c.kv])
    if c.at is None:
        n_columns = len(c.pos) // B
        rows = i // n_columns
        columns = i % n_columns
    else:
        rows = c.at[0][i]
        columns = c.at[1][i]
    kept, rows = rows.unique(return_inverse=True)
    kv = c.kv
    mask = c.mask
    if len(kept) < B:
        kv = [(k[kept], v[kept]) for k, v in kv]
        mask = mask[kept] if mask is not None else None
    return Context(c.h[i], c.token[i], c.pos[i], kv, (rows, columns), mask)
