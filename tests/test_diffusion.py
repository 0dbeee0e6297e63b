"""diffusion.py against closed forms, fields with known solutions, and a naive Algorithm 1 written from the paper."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F

import diffusion
from configurator import UserError
from diffusion import (Denoiser, Sampler, adaptive, choose, draw, generate, integrate, last_time, nll, noise, row_noise, sample_t,
                       teacher_forced, time_grid, velocity)
from model import GPT, GPTConfig, L2D, PathConfig, build

SOLVERS = ("euler", "midpoint", "heun")
TINY = GPTConfig(block_size=24, vocab_size=29, n_layer=2, n_head=3, n_embd=24)
EOT = 4


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def model():
    """A tiny pair with large random weights, so that guesses change on the way: see test_guesses_change."""
    torch.manual_seed(0)
    pair = build(GPT(TINY), PathConfig(x_dim=8, t_dim=16, sigma=2.0, n_labels=3, time_scale=10.0))
    g = generator(1)
    std = {"trunk.wpe": 1.0, "trunk.wte": 0.5, "trunk.h": 0.2, "trunk.ln_f": 0.2, "path.w": 0.6, "path.x_in": 0.6, "path.label": 1.0}
    with torch.no_grad():
        for name, p in pair.named_parameters():
            p.copy_(std.get(".".join(name.split(".")[:2]), 0.25) * torch.randn(p.shape, generator=g)
                    + ("ln_" in name and name.endswith("weight")))
    return pair.requires_grad_(False)


@pytest.fixture
def trainable(model):
    pair = copy.deepcopy(model)
    pair.path.requires_grad_(True)
    return pair


PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7], [9, 3], [1, 2, 3, 4]]


# ------------------------------------------------------------------------------------------ noise and time
def test_noise():
    x_1, x_0 = torch.randn(3, 4), torch.randn(3, 4)
    x_t = noise(x_1, x_0, torch.tensor([0.0, 1.0, 0.25]))
    assert torch.equal(x_t[0], x_0[0]) and torch.equal(x_t[1], x_1[1])
    torch.testing.assert_close(x_t[2], 0.25 * x_1[2] + 0.75 * x_0[2])


@pytest.mark.parametrize("stratified", [False, True])
def test_sample_t_is_uniform(stratified):
    n = 20_000
    t = sample_t(n, generator(), stratified)
    assert t.dtype == torch.float32 and t.shape == (n,) and 0 <= t.min() and t.max() < 1
    assert (t.sort().values - (torch.arange(n) + 0.5) / n).abs().max() < 1.95 / n ** 0.5           # Kolmogorov-Smirnov, 0.1%
    # each place of the batch is uniform too, and neighbours are independent: the bins are shuffled
    places = torch.stack([sample_t(4, generator(i), stratified) for i in range(4000)])
    assert (places.mean(0) - 0.5).abs().max() < 0.02 and (places.var(0) - 1 / 12).abs().max() < 0.005
    assert abs(torch.corrcoef(torch.stack([t[:-1], t[1:]]))[0, 1]) < 0.03


def test_stratified_t():
    for n in (1, 2, 7, 1000):
        t = sample_t(n, generator(n))
        assert torch.equal((t * n).floor().sort().values, torch.arange(n).float())                  # one in each bin
    means = {s: torch.stack([sample_t(16, generator(i), s).mean() for i in range(500)]).var() for s in (False, True)}
    # theory: 1 / (12 n) against 1 / (12 n^3)
    assert means[False] == pytest.approx(1 / (12 * 16), rel=0.3) and means[True] == pytest.approx(1 / (12 * 16 ** 3), rel=0.3)


def test_draw():
    config = PathConfig(x_dim=16, sigma=64.0)
    t, x_0 = draw(5000, config, generator())
    assert x_0.shape == (5000, 16) and x_0.dtype == t.dtype == torch.float32
    assert abs(x_0.std() / 64 - 1) < 0.01 and abs(x_0.mean()) < 1
    correlation = torch.corrcoef(torch.cat([x_0, t[:, None]], 1).T) - torch.eye(17)
    assert correlation.abs().max() < 0.06
    assert torch.corrcoef(x_0[:40]).fill_diagonal_(0).abs().max() < 0.95 and t.unique().numel() > 4990
    again = draw(5000, config, generator())
    assert torch.equal(again[0], t) and torch.equal(again[1], x_0)
    other = draw(5000, config, generator(1))
    assert not torch.equal(other[0], t) and not torch.equal(other[1], x_0)


# -------------------------------------------------------------------------------------- velocity and solvers
def test_velocity_is_the_derivative_of_eq_1():
    x_1, x_0, t = torch.randn(50, 4), 64 * torch.randn(50, 4), 0.98 * torch.rand(50)
    torch.testing.assert_close(velocity(noise(x_1, x_0, t), t, x_1), x_1 - x_0, atol=1e-2, rtol=1e-3)
    torch.testing.assert_close(velocity(noise(x_1, x_0, torch.full((50,), 0.5)), 0.5, x_1), x_1 - x_0, atol=1e-3, rtol=1e-4)


class Field:
    """A denoiser that writes down when it is asked."""
    def __init__(self, denoiser):
        self.denoiser, self.times = denoiser, []

    def __call__(self, x, t, rows=None):
        self.times.append(t)
        return self.denoiser(x, t)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("t_end", [None, 0.3, 1.0])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_constant_guess_gives_the_straight_line(solver, t_end, shift):
    x_0, x_1 = 64 * torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    for steps in range(2, 18):
        x, t = integrate(lambda x, t: x_1, x_0, steps, solver, t_end or last_time(steps), shift)
        assert t == pytest.approx(min(1 - 1 / steps, 0.9375) if t_end is None else t_end, abs=1e-12)
        torch.testing.assert_close(x, (1 - t) * x_0 + t * x_1, atol=1e-9, rtol=1e-9)
        if t_end == 1:
            torch.testing.assert_close(x, x_1, atol=1e-9, rtol=1e-9)
    x, t = integrate(lambda x, t: 1 / 0, x_0, 1, solver, 0.5)
    assert t == 0 and torch.equal(x, x_0)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("t_end", [None, 0.5, 1.0])
@pytest.mark.parametrize("shift", [1.0, 2.5, 0.4])
def test_evaluations_spent(solver, t_end, shift):
    for steps in range(2, 18):
        f = Field(lambda x, t: torch.sin(x))
        x, t = integrate(f, torch.ones(2, 3), steps, solver, t_end or last_time(steps), shift)
        saved = solver == "heun" and t_end == 1 and steps > 2               # its last slope would be the one at t = 1
        assert len(f.times) == steps - 1 - saved
        assert f.times[0] == 0 and f.times == sorted(f.times) and f.times[-1] < 1
        assert torch.isfinite(x).all() and f.times[-1] <= t


def test_time_grid():
    for n in (1, 2, 3, 10, 16):
        for t_end in (0.1, 0.9, 1 - 1 / 16, 1.0):
            torch.testing.assert_close(torch.tensor(time_grid(n, t_end)), torch.linspace(0, t_end, n + 1))
            for shift in (0.1, 0.3, 0.7, 1.1, 1.5, 3.3, 4.9, 10.0, 49.0):
                times = time_grid(n, t_end, shift)
                assert times[0] == 0 and times[-1] == t_end and len(times) == n + 1          # t_end exactly: never past 1
                assert all(a < b for a, b in zip(times, times[1:]))
                widths = [b - a for a, b in zip(times, times[1:])]
                assert n == 1 or (widths[-1] < widths[0]) == (shift > 1)
                for i, t in enumerate(times):
                    assert t == pytest.approx(t_end * shift * i / (n + (shift - 1) * i))
    assert time_grid(0, 0.5) == [0.0]


SIGMA, MEAN, STD = 4.0, 1.5, 0.7


def gaussian_denoiser(x, t):
    """E[x_1 | x_t] where x_1 ~ N(MEAN, STD^2)."""
    t = t[:, None] if torch.is_tensor(t) else t
    return MEAN + t * STD ** 2 / (t ** 2 * STD ** 2 + (1 - t) ** 2 * SIGMA ** 2) * (x - t * MEAN)


def gaussian_solution(x_0, t):
    """Where the exact flow carries x_0: it maps N(0, SIGMA^2) to the marginal at t, order preserved."""
    return t * MEAN + math.sqrt(t ** 2 * STD ** 2 + (1 - t) ** 2 * SIGMA ** 2) / SIGMA * x_0


def wave_denoiser(x, t):
    """The field dx/dt = x cos 3t - x^2 / 4, which no solver gets right by luck: midpoint is third order on the Gaussian."""
    return x + (1 - t) * (x * math.cos(3 * t) - x * x / 4)


def wave_solution(x_0, t, n=20_000):
    """Bernoulli's equation: 1/x = e^-A (1/x_0 + 1/4 int e^A dt), with A = sin(3t) / 3."""
    s = torch.linspace(0, t, n + 1, dtype=torch.float64)
    return math.exp(math.sin(3 * t) / 3) / (1 / x_0 + torch.trapezoid((s.mul(3).sin() / 3).exp(), s) / 4)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("midpoint", 2), ("heun", 2)])
@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_order_of_convergence(solver, order, shift):
    x_0 = (torch.rand(100, 1, generator=generator(), dtype=torch.float64) + 0.5) * 4
    for f, solution in ((wave_denoiser, wave_solution), (gaussian_denoiser, gaussian_solution)):
        errors = []
        for n in (32, 64, 128, 256):                                        # intervals
            x, t = integrate(f, x_0, n * order + 1, solver, 0.95, shift)
            errors.append((x - solution(x_0, t)).abs().max().item())
        slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
        expected = 3 if solver == "midpoint" and f is gaussian_denoiser else order
        assert all(abs(slope - expected) < 0.15 for slope in slopes[1:]), slopes


# ------------------------------------------------------------------------------------------------ adaptive
class Flips:
    """Guess 0 before time `flip[i]` in row i, guess 1 after it; counts evaluations per row."""
    def __init__(self, flip):
        self.flip, self.n = torch.tensor(flip), torch.zeros(len(flip), dtype=torch.long)
        self.latest = torch.zeros(len(flip))

    def __call__(self, x, t, rows=None):
        rows = torch.ones(len(self.flip), dtype=torch.bool) if rows is None else rows
        t = t if torch.is_tensor(t) else torch.full(self.flip.shape, t)
        self.n += rows
        self.latest = torch.where(rows, t, self.latest)
        return torch.where(t > self.flip, 10.0, 0.0)[:, None].expand_as(x).contiguous()


def test_adaptive_steps_each_row_on_its_own():
    flips = [2.0, 0.5, 0.83, 2.0, 0.1]                                       # 2: never
    x_0 = 3 * torch.randn(5, 4, generator=generator())
    f = Flips(flips)
    x, t = adaptive(f, x_0, 40, tol=0.05, t_end=0.9)
    assert (t == torch.tensor(0.9)).all()
    torch.testing.assert_close(x[[0, 3]], 0.1 * x_0[[0, 3]], atol=1e-6, rtol=1e-6)        # constant guess: the straight line
    assert f.n[0] == f.n[3] <= 4 and (f.n[[1, 2, 4]] > f.n[0]).all()
    for i, flip in enumerate(flips):
        alone = Flips([flip])
        x_alone, t_alone = adaptive(alone, x_0[i:i + 1], 40, tol=0.05, t_end=0.9)
        assert torch.equal(x_alone[0], x[i]) and t_alone[0] == t[i] and alone.n[0] == f.n[i]
        exact = torch.full((4,), 10.0 if flip < 0.9 else 0.0)                # solution: two straight lines
        x_flip = (1 - min(flip, 0.9)) * x_0[i]
        exact = x_flip + (exact - x_flip) * (0.9 - min(flip, 0.9)) / (1 - min(flip, 0.9))
        assert (x[i] - exact).norm() / 2 < 0.5


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 9])
def test_adaptive_keeps_to_its_budget(steps):
    """The evaluation that is read counts too: never more than `steps` of them, and a row that needs them all gets them."""
    f = Flips([0.01, 0.4, 2.0])
    x, t = adaptive(f, torch.ones(3, 4), steps, tol=1e-6, t_end=last_time(steps))
    assert f.n.max() <= steps and (t < 1).all() and torch.isfinite(x).all()
    assert f.n[0] == steps                                                   # the row that is refused spends all of it
    assert t[2] == f.latest[2] or f.n[2] == steps


@pytest.mark.parametrize("t_end", [0.5, 0.9, 15 / 16, 0.95, 1.0])
def test_adaptive_ends_at_t_end(t_end):
    steps, seen = 30, []
    def f(x, t, rows=None):
        assert torch.isfinite(x[rows] if rows is not None else x).all()
        seen.append(t if torch.is_tensor(t) else torch.tensor([t] * 3))
        assert torch.isfinite(seen[-1]).all()
        return gaussian_denoiser(x, t)
    x, t = adaptive(f, torch.randn(3, 1, generator=generator()), steps, 0.05, t_end)
    assert (t == torch.tensor(t_end)).all()
    assert torch.isfinite(x).all()


def test_adaptive_tolerance_is_accuracy():
    x_0, errors, spent = SIGMA * torch.randn(64, 1, generator=generator()), [], []
    for tol in (1e-1, 1e-2, 1e-3, 1e-4):
        f = Field(gaussian_denoiser)
        x, t = adaptive(f, x_0, 3000, tol, 0.9)
        assert (t == torch.tensor(0.9)).all()
        errors.append((x - gaussian_solution(x_0, 0.9)).abs().max().item())
        spent.append(len(f.times))
    assert all(b < 0.6 * a for a, b in zip(errors, errors[1:])) and errors[-1] < 0.05
    assert all(b > 1.5 * a for a, b in zip(spent[1:], spent[2:]))


# ---------------------------------------------------------------------------------------------------- the loss
def example(B=3, T=9, seed=0):
    g = generator(seed)
    idx = torch.randint(TINY.vocab_size, (B, T), generator=g)
    targets = idx.roll(-1, 1).masked_fill(torch.rand(B, T, generator=g) < 0.4, -1)
    targets[:, -1] = -1
    return idx, targets, torch.tensor([0, 3, 2])[:B], int((targets >= 0).sum())


def test_nll_position_by_position(model):
    """Each target alone: its prompt cut after it, a batch of one, a noised x built by hand."""
    idx, targets, label, n = example()
    t, x_0 = draw(n, model.path.config, generator())
    losses = nll(model, idx, targets, label, t, x_0)
    assert losses.shape == (n,) and losses.dtype == torch.float32
    V = model.trunk.wte.weight @ model.path.W.weight.T
    V = math.sqrt(8) * V / V.norm(dim=1, keepdim=True)
    i = 0
    for row in range(3):
        for k in range(9):
            if (y := targets[row, k]) == -1:
                continue
            at = torch.tensor([0]), torch.tensor([k])
            c = model.read(idx[row:row + 1, :k + 1], at)
            x_t = (t[i] * V[y] + (1 - t[i]) * x_0[i])[None]
            logits = model(x_t, t[i:i + 1], c, label[row:row + 1])
            torch.testing.assert_close(losses[i], -logits.log_softmax(-1)[0, y], atol=1e-4, rtol=1e-4)
            i += 1
    assert i == n


def test_nll_and_padding(model):
    """What follows the last target of a row cannot matter, padding least of all; what precedes it does."""
    idx, targets, label, n = example()
    t, x_0 = draw(n, model.path.config, generator())
    base = nll(model, idx, targets, label, t, x_0)
    padded, padded_targets = F.pad(idx, (0, 5), value=EOT), F.pad(targets, (0, 5), value=-1)
    torch.testing.assert_close(nll(model, padded, padded_targets, label, t, x_0), base, atol=1e-5, rtol=1e-5)
    idx[:, -1] = (idx[:, -1] + 1) % TINY.vocab_size
    torch.testing.assert_close(nll(model, idx, targets, label, t, x_0), base, atol=1e-5, rtol=1e-5)
    idx[:, 0] = (idx[:, 0] + 1) % TINY.vocab_size
    assert (nll(model, idx, targets, label, t, x_0) - base).abs().max() > 1e-2


def test_nll_without_path_is_cross_entropy(model):
    idx, targets, label, n = example()
    alone = L2D(model.trunk)
    expected = F.cross_entropy(model.trunk.head(model.trunk(idx)[0]).flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
    torch.testing.assert_close(nll(alone, idx, targets, label), expected[targets.flatten() >= 0], atol=1e-5, rtol=1e-5)
    t, x_0 = draw(n, model.path.config, generator())
    torch.testing.assert_close(nll(model, idx, targets, label, 0 * t, x_0), expected[targets.flatten() >= 0], atol=1e-5, rtol=1e-5)


def test_unrolled_is_algorithm_1(model):
    """Training through the sampler: the logits that sampling gives, and a gradient that goes through every evaluation."""
    idx, targets, label, n = example()
    for steps, t_end, shift in ((2, 0.99, 10.0), (3, 0.9, 1.0), (6, 15 / 16, 4.0)):
        sampler = Sampler(steps=steps, guess="mean", t_end=t_end, shift=shift)
        expected = teacher_forced(model, idx, targets, sampler, generator(3), label)[0]
        x_0 = model.path.config.sigma * torch.randn(n, model.path.config.x_dim, generator=generator(3))
        losses = nll(model, idx, targets, label, x_0=x_0, times=time_grid(steps - 1, t_end, shift))
        torch.testing.assert_close(losses, expected, atol=1e-4, rtol=1e-4)

    model = copy.deepcopy(model)
    loss = lambda: nll(model, idx, targets, label, x_0=x_0, times=time_grid(3, 0.9)).sum()
    params = [p.requires_grad_() for p in (model.path.W.weight, model.path.x_in[0].weight, model.path.h[0].mlp.c_fc.weight)]
    grads = torch.autograd.grad(loss(), params)
    for p, grad in zip(params, grads):
        step, values = 1e-2 * torch.nn.functional.normalize(grad.flatten(), dim=0).view_as(p), []
        with torch.no_grad():
            for sign in (1, -2, 1):                                           # + step, - step, back
                p += sign * step
                values.append(loss().double())
        assert (values[0] - values[1]).item() == pytest.approx(2e-2 * grad.norm().item(), rel=0.05)


def test_micro_batches_add_up(trainable):
    """Token-weighted: the gradient of the whole batch is the sum of its unequal parts."""
    idx, targets, label, n = example()
    t, x_0 = draw(n, trainable.path.config, generator())
    counts = (targets >= 0).sum(1).tolist()
    assert len(set(counts)) > 1

    def gradients(parts):
        trainable.zero_grad()
        for rows in parts:
            where = slice(sum(counts[:rows.start]), sum(counts[:rows.stop]))
            (nll(trainable, idx[rows], targets[rows], label[rows], t[where], x_0[where]).sum() / n).backward()
        return {name: p.grad.clone() for name, p in trainable.path.named_parameters()}
    whole, parts = gradients([slice(0, 3)]), gradients([slice(0, 1), slice(1, 3)])
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], atol=1e-6, rtol=1e-4, msg=lambda s: f"{name}: {s}")
    assert whole["W.weight"].abs().max() > 0


# ------------------------------------------------------------------------------------------------ Algorithm 1
class Naive:
    """Algorithm 1 from DESIGN's text for one prompt: no cache, no batch, no table, a full forward per evaluation."""
    def __init__(self, model, sampler, label):
        self.model, self.s, self.label = model, sampler, label
        V = model.trunk.wte.weight @ model.path.W.weight.T
        self.V = math.sqrt(model.path.config.x_dim) * V / V.norm(dim=1, keepdim=True)

    def path_logits(self, x, t, label, last=False):
        self.nfe += 1
        at = torch.tensor([0]), torch.tensor([len(self.ids) - 1])
        logits = self.model(x[None], torch.tensor([t]), self.model.read(torch.tensor([self.ids]), at), torch.tensor([label]))[0]
        if self.s.shortlist and not last:
            likely = self.first.sort(descending=True).indices[:self.s.shortlist].tolist()
            return torch.tensor([z if i in likely else -math.inf for i, z in enumerate(logits.tolist())])
        return logits

    def pick(self, logits, u):
        p = logits.softmax(-1)
        if self.s.guess == "mean":
            return logits.argmax().item(), p @ self.V
        guess = logits.argmax().item() if self.s.guess == "argmax" else min(int((p.cumsum(0) <= u).sum()), len(p) - 1)
        return guess, self.V[guess]

    def f(self, x, t, last=False):
        """x_1_hat, and the logits of the latest evaluation in self.logits."""
        if self.stopped:
            return self.x_1_hat
        self.calls += 1
        u = self.u[self.calls]
        if t == 0:
            self.logits = self.model.trunk.head(self.model.trunk(torch.tensor([self.ids]))[0])[0, -1]
            self.guess, self.x_1_hat = self.pick(self.logits, u)
            self.first = self.logits
            return self.x_1_hat
        self.logits = self.path_logits(x, t, self.label, last)
        guess, x_1_hat = self.pick(self.logits, u)
        if self.s.guidance != 1 and not last:
            free = self.pick(self.path_logits(x, t, self.model.path.config.n_labels), u)[1]
            x_1_hat = self.s.guidance * x_1_hat + (1 - self.s.guidance) * free
        if self.s.stop and guess == self.guess and self.logits.softmax(-1)[guess] > self.s.stop:
            self.stopped = True
        self.guess, self.x_1_hat = guess, x_1_hat
        return x_1_hat

    def v(self, x, t):
        return (self.f(x, t) - x) / (1 - t)

    def solve(self, x):
        s, T = self.s, self.s.steps
        end = s.t_end or min((T - 1) / T, 15 / 16)
        if s.solver == "adaptive":
            t, dt, v = 0.0, 0.25, self.v(x, 0.0)
            for _ in range(T - 1):
                dt = end - t if t + 1.01 * dt > end else dt
                x_new = x + dt * v
                if t + dt == 1:                                              # no slope there: the step stands
                    self.f(x_new, 1.0)
                    break
                v_new = self.v(x_new, t + dt)
                error = float(dt / 2 * ((v_new - v) ** 2).mean().sqrt())
                factor = min(2.0, max(0.3, 0.9 * math.sqrt(s.tol / max(error, 1e-9))))
                if error <= s.tol:
                    x, v, t = x_new, v_new, t + dt
                dt *= factor
                if t >= end - 1e-6:
                    break
            return
        per = 1 if s.solver == "euler" else 2
        n = (T - 1) // per + (T - 1) % per
        grid = [end * s.shift * i / n / (1 + (s.shift - 1) * i / n) for i in range(n)] + [end]
        for i in range(n):
            a, b = grid[i], grid[i + 1]
            h = b - a
            if s.solver == "euler" or (i == 0 and (T - 1) % 2):
                x = x + h * self.v(x, a)
            elif s.solver == "midpoint":
                x = x + h * self.v(x + h / 2 * self.v(x, a), a + h / 2)
            else:
                v = self.v(x, a)
                x = x + h * v if b == 1 else x + h / 2 * (v + self.v(x + h * v, b))
        self.f(x, end, last=True)

    @torch.no_grad()
    def generate(self, prompt, max_new_tokens, seed, id):
        x_0, u = (z[0] for z in row_noise([id], seed, max_new_tokens, self.model.path.config.x_dim, self.s, "cpu"))
        self.ids, new, self.total = list(prompt), [], []
        for n in range(max_new_tokens):
            self.u, self.calls, self.nfe, self.stopped = u[n], 0, 0, False
            if self.s.steps == 1:
                self.f(None, 0.0)
            else:
                self.solve(self.model.path.config.sigma * x_0[n])
            self.total.append(self.nfe)
            logits = self.logits
            if self.s.temperature:
                p = (logits / self.s.temperature).softmax(-1)
                if self.s.top_k:
                    p = torch.where(p >= p.topk(self.s.top_k).values[-1], p, 0)
                y = min(int(((p / p.sum()).cumsum(0) <= u[n, 0]).sum()), len(p) - 1)
            else:
                y = logits.argmax().item()
            if y == EOT:
                return new, True
            new.append(y)
            self.ids.append(y)
            if len(self.ids) > TINY.block_size:
                break
        return new, False


SETTINGS = {
    "trunk": dict(steps=1), "trunk sampled": dict(steps=1, temperature=1.0, top_k=5),
    "two": dict(steps=2), "euler": dict(steps=8), "euler shift": dict(steps=7, shift=3.0), "many": dict(steps=24), "euler to 1": dict(steps=5, t_end=1.0),
    "midpoint": dict(steps=9, solver="midpoint"), "midpoint odd": dict(steps=6, solver="midpoint", shift=2.0),
    "midpoint to 1": dict(steps=15, solver="midpoint", t_end=1.0), "heun": dict(steps=7, solver="heun"),
    "heun to 1": dict(steps=8, solver="heun", t_end=1.0), "adaptive": dict(steps=12, solver="adaptive", tol=0.3),
    "adaptive short": dict(steps=4, solver="adaptive", tol=0.05), "adaptive to 1": dict(steps=12, solver="adaptive", tol=0.5, t_end=1.0),
    "stop": dict(steps=8, stop=0.3), "sampled stop": dict(steps=8, stop=0.1, guess="sample"),
    "stop midpoint": dict(steps=9, solver="midpoint", stop=0.2), "adaptive stop": dict(steps=12, solver="adaptive", stop=0.3),
    "temperature": dict(steps=6, temperature=0.8), "sampled guesses": dict(steps=6, guess="sample", temperature=1.0, top_k=7),
    "sampled adaptive": dict(steps=9, solver="adaptive", guess="sample", tol=0.5), "mean": dict(steps=6, solver="heun", guess="mean"),
    "guidance": dict(steps=6, guidance=2.5), "guidance stop": dict(steps=6, guidance=2.5, stop=0.3, solver="midpoint"),
    "guidance adaptive": dict(steps=6, guidance=1.5, solver="adaptive"),
    "shortlist": dict(steps=6, shortlist=3, temperature=1.0), "shortlist of all": dict(steps=8, shortlist=99),
    "shortlist guidance": dict(steps=6, shortlist=2, guidance=2.5, guess="mean", solver="midpoint"),
    "shortlist sampled": dict(steps=5, shortlist=4, guess="sample")}
LABELS = [0, 1, 2, 3, 1]


@pytest.mark.parametrize("setting", SETTINGS)
def test_generate_is_the_naive_algorithm_1(model, setting):
    """A ragged batch, cached and memoised, against each row alone, naive; path calls included."""
    sampler, ids, n = Sampler(**SETTINGS[setting]), [7, 0, 3, 11, 5], 6
    outputs = generate(model, PROMPTS, EOT, n, sampler, LABELS, seed=4, ids=ids, trace=True)
    for prompt, label, id, output in zip(PROMPTS, LABELS, ids, outputs, strict=True):
        naive = Naive(model, sampler, label)
        assert (output.tokens, output.ended) == naive.generate(prompt, n, 4, id)
        assert output.nfe == sum(naive.total) and output.predicted == len(naive.total) == len(output.tokens) + output.ended
    if sampler.solver != "adaptive" and not sampler.stop:
        per_token = sampler.steps - 1 - (setting == "heun to 1")
        per_token = 2 * per_token - 1 if sampler.guidance != 1 else per_token
        assert all(o.nfe == per_token * o.predicted for o in outputs)


def test_a_shortlist_of_all_changes_nothing(model):
    assert generate(model, PROMPTS, EOT, 6, Sampler(**SETTINGS["shortlist of all"]), LABELS) == generate(model, PROMPTS, EOT, 6, Sampler(steps=8), LABELS)
    wrong = dict(steps=4, shortlist=3)
    for extra in (dict(stop=0.5), dict(solver="adaptive"), dict(shortlist=-1)):
        with pytest.raises(UserError, match="shortlist="):
            Sampler(**(wrong | extra))


@pytest.mark.parametrize("setting", ["trunk", "trunk sampled", "euler", "midpoint odd", "heun to 1", "sampled guesses", "mean", "guidance", "shortlist"])
def test_a_compiled_step_writes_the_same(model, monkeypatch, setting):
    """Rows end at different times and one is cut by block_size; one graph serves all tokens. (tests/test_bench.py has inductor.)"""
    torch._dynamo.reset()
    real, graphs = torch.compile, []
    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    monkeypatch.setattr(torch, "compile", lambda f, mode, **options: real(f, backend=backend, **options))
    prompts, n, sampler = [*PROMPTS, [2] * 20], 9, Sampler(**SETTINGS[setting])
    run = lambda compile: generate(model, prompts, EOT, n, sampler, [*LABELS, 0], compile=compile)
    outputs = run(True)
    assert outputs == run(False) and len(graphs) == 1 and len(outputs[-1].tokens) <= 5
    assert run(True) == outputs and len(graphs) == 1                          # nor does a second call compile again
    written = [n for n in graphs[0].graph.nodes if n.op == "placeholder" and any("scatter" in str(user.target) for user in n.users)]
    assert len(written) == 2 * TINY.n_layer                                   # the cache: a CUDA graph may write to what stays in place
    assert all("_dynamo_static_input_type" in n.meta["tensor_dict"] for n in written)
    assert len({len(o.tokens) for o in outputs}) > 1


def test_guesses_change(model):
    """The tests of Algorithm 1 would see little if diffusion changed nothing here, or rows or settings agreed."""
    runs = [generate(model, PROMPTS, EOT, 6, Sampler(**s), LABELS, seed=4) for s in SETTINGS.values()]
    assert len({tuple(tuple(o.tokens) for o in run) for run in runs}) > len(runs) - 5
    traced = generate(model, PROMPTS, EOT, 6, Sampler(steps=8), LABELS, seed=4, trace=True)
    guesses = [len({guess for _, guess, _ in token}) for o in traced for token in o.trace]
    assert sum(n > 1 for n in guesses) > len(guesses) / 3
    assert any(o.ended for run in runs for o in run) and not all(o.ended for run in runs for o in run)


@pytest.mark.parametrize("setting", ["trunk sampled", "euler", "midpoint odd", "heun", "adaptive", "sampled guesses", "adaptive stop", "guidance"])
def test_a_ragged_batch_is_each_row_alone(model, setting):
    sampler = Sampler(**SETTINGS[setting])
    together = generate(model, PROMPTS, EOT, 8, sampler, LABELS, seed=1)
    order = [3, 0, 4, 1, 2]
    shuffled = generate(model, [PROMPTS[i] for i in order], EOT, 8, sampler, [LABELS[i] for i in order], seed=1, ids=order)
    for i, output in enumerate(together):
        (alone,) = generate(model, [PROMPTS[i]], EOT, 8, sampler, [LABELS[i]], seed=1, ids=[i])
        assert output == alone == shuffled[order.index(i)]
    assert generate(model, PROMPTS, EOT, 8, sampler, LABELS, seed=2) != together                   # the noise is the row's own
    assert generate(model, PROMPTS, EOT, 8, sampler, LABELS, seed=1, ids=[9, 8, 7, 6, 5]) != together


def test_one_step_is_the_trunk_and_never_asks_the_path(model, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the path was asked")
    for name in ("forward", "condition", "token_space"):
        monkeypatch.setattr(model.path, name, refuse)
    outputs = generate(model, PROMPTS, EOT, 8, Sampler(steps=1), LABELS)
    for prompt, output in zip(PROMPTS, outputs):
        ids = list(prompt)
        for _ in range(8):
            y = model.trunk.head(model.trunk(torch.tensor([ids]))[0])[0, -1].argmax().item()
            if y == EOT:
                break
            ids.append(y)
        assert output.tokens == ids[len(prompt):] and output.nfe == 0
    assert generate(L2D(model.trunk), PROMPTS, EOT, 8, Sampler(steps=1)) == outputs
    with pytest.raises(AssertionError, match="the path was asked"):
        generate(model, PROMPTS, EOT, 8, Sampler(steps=2))


def test_no_label_is_the_last_index(model):
    assert generate(model, PROMPTS, EOT, 5, Sampler(steps=5)) == generate(model, PROMPTS, EOT, 5, Sampler(steps=5), [3] * 5)
    assert generate(model, PROMPTS, EOT, 5, Sampler(steps=5)) != generate(model, PROMPTS, EOT, 5, Sampler(steps=5), [0] * 5)


def test_rows_that_end_leave_the_batch(model, monkeypatch):
    """With the most frequent token as end of text, rows end at different times; the trunk sees only the others."""
    sampler = Sampler(steps=4)
    free = generate(model, PROMPTS, -1, 8, sampler, LABELS)
    tokens = [t for o in free for t in o.tokens]
    eot = max(set(tokens), key=tokens.count)
    sizes, forward = [], model.trunk.forward
    monkeypatch.setattr(model.trunk, "forward", lambda idx, *args: sizes.append(len(idx)) or forward(idx, *args))
    outputs = generate(model, PROMPTS, eot, 8, sampler, LABELS)
    cut = [o.tokens.index(eot) if eot in o.tokens else 8 for o in free]
    assert len(set(cut)) > 2
    for o, f, c in zip(outputs, free, cut):
        assert o.tokens == f.tokens[:c] and o.ended == (c < 8) and o.predicted == min(c + 1, 8)
    assert sizes == [sum(c >= n for c in cut) for n in range(8) if any(c >= n for c in cut)]


def test_block_size_cuts(model):
    prompts = [[1] * 24, [2] * 20, [3, 4]]
    outputs = generate(model, prompts, -1, 30, Sampler(steps=3))
    assert [len(o.tokens) for o in outputs] == [1, 5, 23] and not any(o.ended for o in outputs)
    for i in range(3):
        assert generate(model, prompts[i:i + 1], -1, 30, Sampler(steps=3), ids=[i]) == outputs[i:i + 1]


def test_trace(model):
    for setting in ("trunk", "euler", "midpoint", "heun", "adaptive", "stop"):
        for o in generate(model, PROMPTS, EOT, 6, Sampler(**SETTINGS[setting]), LABELS, seed=4, trace=True):
            assert len(o.trace) == o.predicted
            assert sum(len(token) - 1 for token in o.trace) == o.nfe         # one entry an evaluation, the trunk's included
            for token, y in zip(o.trace, o.tokens + [EOT]):
                times = [t for t, _, _ in token]
                assert times[0] == 0 and token[-1][1] == y and all(0 < p <= 1 for _, _, p in token)
                assert setting == "adaptive" or times == sorted(times)
    assert not generate(model, PROMPTS, EOT, 2, Sampler(steps=3))[0].trace


def test_stopping_early_saves_path_calls(model):
    never, likely, always = (generate(model, PROMPTS, -1, 8, Sampler(steps=12, stop=p), LABELS) for p in (0.999999, 0.5, 1e-9))
    assert never == generate(model, PROMPTS, -1, 8, Sampler(steps=12), LABELS)
    calls = [sum(o.nfe for o in run) for run in (never, likely, always)]
    assert calls[0] == 11 * 8 * 5 and calls[0] > calls[1] > calls[2] >= 8 * 5


@torch.no_grad()
def denoiser(model, sampler, label):
    at = torch.tensor([0, 1]), torch.tensor([4, 4])
    c = model.read(torch.tensor([PROMPTS[0], PROMPTS[0]]), at)
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    V = model.path.token_space(model.trunk.wte.weight)
    f = Denoiser(model, sampler, V, {}, c._replace(at=None, mask=mask), label, torch.rand(2, sampler.steps + 1))
    return f, V, lambda x, t, label: model(x, torch.full((2,), t), c, label)


@torch.no_grad()
def test_guidance_is_eq_7_with_a_plus(model):
    label, x = torch.tensor([0, 2]), torch.randn(2, 8, generator=generator())
    none = torch.tensor([3, 3])
    for guess in ("argmax", "mean"):
        f, V, logits = denoiser(model, Sampler(steps=5, guidance=3.0, guess=guess), label)
        hat = lambda z: V[z.argmax(-1)] if guess == "argmax" else z.softmax(-1) @ V
        differ = False
        for t in (0.6, 0.8, 0.95):
            a, b = hat(logits(x, t, label)), hat(logits(x, t, none))
            before = f.nfe.clone()
            torch.testing.assert_close(f(x, t), 3 * a - 2 * b, atol=1e-4, rtol=1e-4)
            assert (f.nfe - before).tolist() == [2, 2]
            torch.testing.assert_close(f.logits, logits(x, t, label), atol=1e-4, rtol=1e-4)
            differ |= (a - b).abs().max() > 0.1
        assert differ
        before = f.nfe.clone()
        f(x, 0.9, last=True)
        assert (f.nfe - before).tolist() == [1, 1]
    f, V, logits = denoiser(model, Sampler(steps=5, guidance=1.0), label)
    torch.testing.assert_close(f(x, 0.8), V[logits(x, 0.8, label).argmax(-1)])
    assert f.nfe.tolist() == [1, 1]


@torch.no_grad()
def test_the_first_evaluation_is_free(model):
    f, V, _ = denoiser(model, Sampler(steps=5), torch.tensor([0, 2]))
    trunk = model.trunk.head(model.trunk(torch.tensor([PROMPTS[0]]))[0])[:, -1]
    torch.testing.assert_close(f.logits, trunk.expand(2, -1), atol=1e-5, rtol=1e-5)
    assert torch.equal(f(torch.full((2, 8), torch.nan), 0.0), V[trunk.argmax(-1)].expand(2, -1)) and f.nfe.tolist() == [0, 0]


def test_half_precision_keeps_the_state_in_float32(model, monkeypatch):
    half, seen = copy.deepcopy(model).to(torch.bfloat16), []
    forward = half.path.forward
    monkeypatch.setattr(half.path, "forward", lambda x_t, t, *args: seen.append((x_t.dtype, t.dtype)) or forward(x_t, t, *args))
    for solver in diffusion.SOLVERS:
        outputs = generate(half, PROMPTS, EOT, 3, Sampler(steps=6, solver=solver, guidance=2.0), LABELS)
        assert all(o.predicted for o in outputs)
    assert set(seen) == {(torch.float32, torch.float32)}


# --------------------------------------------------------------------------------- choosing, teacher forcing
def test_choose_follows_the_probabilities():
    n, logits = 40_000, torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0, 2.9])
    u = torch.rand(n, generator=generator())
    for temperature, top_k in ((1.0, 0), (0.5, 0), (2.0, 3), (1.0, 6), (1.0, 99), (3.0, 1)):
        p = (logits / temperature).softmax(0)
        if 0 < top_k < 6:
            p[logits.argsort(descending=True)[top_k:]] = 0
            p /= p.sum()
        counts = choose(logits.expand(n, 6), u, temperature, top_k).bincount(minlength=6)
        assert ((counts / n - p).abs() <= 4 * (p * (1 - p) / n).sqrt()).all()
    assert (choose(logits.expand(3, 6), u[:3], 0) == 3).all()
    ends = torch.tensor([0.0, 1 - 2 ** -24])                                 # no token of probability 0 at the ends of u
    assert choose(torch.tensor([-torch.inf, 0.0, 0.0, -torch.inf]).expand(2, 4), ends).tolist() == [1, 2]
    assert choose(logits.expand(2, 6), ends, 1.0, 2).tolist() == [3, 5]


@pytest.mark.parametrize("setting", ["trunk", "euler", "midpoint odd", "heun", "adaptive", "guidance", "stop"])
def test_teacher_forced_is_algorithm_1_at_every_target(model, setting):
    """Greedy generation taught by its own answer: every target is the most probable, given the same noise."""
    sampler, (idx, targets, label, n) = Sampler(**SETTINGS[setting]), example()
    loss, right, nfe = teacher_forced(model, idx, targets, sampler, generator(), label)
    g = generator()                                                          # the same draws, in the same order
    x_0 = torch.randn(n, 8, generator=g) if sampler.steps > 1 else torch.zeros(n, 8)
    u = torch.rand(n, sampler.steps + 1, generator=g)
    at = (targets >= 0).nonzero(as_tuple=True)
    for i, (row, k) in enumerate(zip(*(z.tolist() for z in at))):
        naive = Naive(model, sampler, label[row].item())
        naive.ids, naive.u, naive.calls, naive.nfe, naive.stopped = idx[row, :k + 1].tolist(), u[i], 0, 0, False
        naive.f(None, 0.0) if sampler.steps == 1 else naive.solve(2.0 * x_0[i])
        y = targets[row, k]
        torch.testing.assert_close(loss[i], -naive.logits.log_softmax(-1)[y], atol=2e-3, rtol=2e-3)
        assert right[i] == (naive.logits.argmax() == y) and nfe[i] == naive.nfe


@pytest.mark.parametrize("wrong", [dict(steps=0), dict(t_end=-0.1), dict(t_end=1.1), dict(shift=0.0), dict(tol=0.0), dict(stop=1.0),
                                   dict(temperature=-1.0), dict(top_k=-1), dict(temperature=math.nan)])
def test_settings_out_of_range(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=f"error: {name}="):
        Sampler(**wrong)


def test_the_noise_of_a_row_is_the_same_for_every_number_of_steps():
    """Else T = 2 and T = 16 would not be compared on the same noise."""
    draws = [row_noise([3, 5], 7, 6, 4, Sampler(steps=steps), "cpu") for steps in (1, 2, 16)]
    for x_0, u in draws:
        assert torch.equal(x_0, draws[0][0]) and torch.equal(u[:, :, 0], draws[0][1][:, :, 0])
    assert not torch.equal(draws[0][0][0], draws[0][0][1]) and u.shape == (2, 6, 17)
