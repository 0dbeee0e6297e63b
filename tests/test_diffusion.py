"""diffusion.py against closed forms, fields with known solutions, and a naive Algorithm 1 from the paper."""
import ast
import copy
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import EOT, ROOT, WILD, Naive, error_of, generator, says, wild_pair

import diffusion
from batches import draw_unroll
from decode import Decoding
from denoiser import Denoiser, Tables, choose
from diffusion import (
    Sampler,
    adaptive,
    algorithm_1,
    draw,
    nll,
    noise,
    teacher_forced,
    time_grid,
    velocity,
)
from model import L2D, PathConfig

SOLVERS = [solver for solver in diffusion.SOLVERS if solver != "adaptive"]


@pytest.fixture(scope="module")
def model():
    return wild_pair()


@pytest.fixture
def trainable(model):
    pair = copy.deepcopy(model)
    pair.path.requires_grad_(True)
    return pair


# ------------------------------------------------------------------------------------------ noise and time
def test_noise_is_eq_1():
    x_1, x_0 = torch.randn(3, 4), torch.randn(3, 4)
    x_t = noise(x_1, x_0, torch.tensor([0.0, 1.0, 0.25]))
    assert torch.equal(x_t[0], x_0[0]) and torch.equal(x_t[1], x_1[1])
    torch.testing.assert_close(x_t[2], 0.25 * x_1[2] + 0.75 * x_0[2])


def test_t_is_uniform_at_every_place_of_the_batch():
    n, config = 20_000, PathConfig(x_dim=1)
    t = draw(n, config, generator())[0]
    assert t.dtype == torch.float32 and t.shape == (n,) and 0 <= t.min() and t.max() < 1
    distance = (t.sort().values - (torch.arange(n) + 0.5) / n).abs().max()
    assert distance < 1.95 / n ** 0.5                             # Kolmogorov-Smirnov, 0.1%
    # each place is uniform too, and neighbours are independent
    places = torch.stack([draw(4, config, generator(i))[0] for i in range(4000)])
    assert (places.mean(0) - 0.5).abs().max() < 0.02 and (places.var(0) - 1 / 12).abs().max() < 0.005
    assert abs(torch.corrcoef(torch.stack([t[:-1], t[1:]]))[0, 1]) < 0.03

def test_t_and_x_0_are_independent_and_x_0_has_standard_deviation_sigma():
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


def test_unrolled_passes_have_one_to_so_many_calls():
    counts = [draw_unroll(5, generator(i)) - 1 for i in range(400)]
    assert set(counts) == {1, 2, 3, 4, 5}
    share = [math.log((n + 1) / n) / math.log(6) for n in range(1, 6)]    # uniform in the logarithm of the calls
    assert all(abs(counts.count(n) / 400 - share[n - 1]) < 0.08 for n in range(1, 6))


# -------------------------------------------------------------------------------------- velocity and solvers
def test_velocity_is_the_derivative_of_eq_1():
    x_1, x_0, t = torch.randn(50, 4), 64 * torch.randn(50, 4), 0.98 * torch.rand(50)
    torch.testing.assert_close(velocity(noise(x_1, x_0, t), t, x_1), x_1 - x_0, atol=1e-2, rtol=1e-3)
    half = torch.full((50,), 0.5)
    torch.testing.assert_close(velocity(noise(x_1, x_0, half), 0.5, x_1), x_1 - x_0, atol=1e-3, rtol=1e-4)


class Field:
    """What Algorithm 1 asks of a Denoiser, for a field with a known solution: writes down when it is asked, and
    gives as its last logits where x_t has come."""
    def __init__(self, x_1_hat):
        self.field, self.times = x_1_hat, []

    def x_1_hat(self, x, t, where=None):
        self.times.append(t)
        return self.field(x, t)

    def logits(self, x, t):
        self.read_at = t
        return x


def run(field, x_0, steps, solver, t_end=0.0, t_hold=0.0, **more):
    """x at the time of the last evaluation, and that time; by the one Algorithm 1."""
    f = field if isinstance(field, Field) else Field(field)
    more |= dict(t_hold=t_hold) if solver == "fixed_point" else {}
    sampler = Sampler(steps=steps, solver=solver, t_end=t_end, **more)
    return algorithm_1(f, x_0, *sampler.plan(x_0)), f.read_at


GRIDS = [*((solver, 0.0, t_end) for solver in SOLVERS for t_end in (0.0, 0.3, 1.0)), ("fixed_point", 0.2, 0.9), ("fixed_point", 0.6, 1.0)]


@pytest.mark.parametrize("solver, t_hold, t_end", GRIDS)
def test_a_constant_guess_gives_the_straight_line(solver, t_hold, t_end):
    x_0, x_1 = 64 * torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    for steps in range(2, 18):
        x, t = run(lambda x, t: x_1, x_0, steps, solver, t_end, t_hold)
        assert t == pytest.approx(t_end or (0.9 if solver == "fixed_point" else min(1 - 1 / steps, 0.9375)), abs=1e-12)
        torch.testing.assert_close(x, (1 - t) * x_0 + t * x_1, atol=1e-9, rtol=1e-9)
        if t_end == 1:
            torch.testing.assert_close(x, x_1, atol=1e-9, rtol=1e-9)
    x, t = run(lambda x, t: 1 / 0, x_0, 1, solver, 0.5)           # T = 1 asks for no guess
    assert t == 0 and torch.equal(x, x_0)


@pytest.mark.parametrize("solver, t_hold, t_end", GRIDS)
def test_a_solver_spends_the_evaluations_it_is_given_on_times_that_move(solver, t_hold, t_end):
    for steps in range(2, 18):
        f = Field(lambda x, t: torch.sin(x))
        x, t = run(f, torch.ones(2, 3), steps, solver, t_end, t_hold)
        saved = solver == "heun" and t_end == 1 and steps > 2     # its last slope would be the one at t = 1
        assert len(f.times) + 1 == steps - saved                  # the last evaluation is the one that is read
        assert f.times[0] == 0 and f.times == sorted(f.times) and f.times[-1] < 1
        if solver != "fixed_point":                               # which alone moves x_t where time stands
            times = Sampler(steps=steps, solver=solver, t_end=t_end).plan(None)[0]
            assert times == sorted(set(times))
        assert torch.isfinite(x).all() and f.times[-1] <= t


def test_time_grid_is_even_or_holds_and_ends_exactly():
    for n in (1, 2, 3, 10, 16):
        for t_end in (0.1, 0.9, 1 - 1 / 16, 1.0):
            torch.testing.assert_close(torch.tensor(time_grid(n, t_end)), torch.linspace(0, t_end, n + 1))
            assert time_grid(n, t_end)[-1] == t_end               # never past 1
            assert time_grid(n, t_end, 0.07) == [0.0] + [0.07] * (n - 1) + [t_end]
    assert time_grid(0, 0.5) == time_grid(0, 0.5, 0.2) == [0.0]
    assert Sampler(steps=1, solver="fixed_point").plan(None)[0] == [0.0]


SIGMA, MEAN, STD = 4.0, 1.5, 0.7


def gaussian_denoiser(x, t):
    """E[x_1 | x_t] where x_1 ~ N(MEAN, STD^2)."""
    t = t[:, None] if torch.is_tensor(t) else t
    return MEAN + t * STD ** 2 / (t ** 2 * STD ** 2 + (1 - t) ** 2 * SIGMA ** 2) * (x - t * MEAN)


def gaussian_solution(x_0, t):
    """Where the exact flow carries x_0: it maps N(0, SIGMA^2) to the marginal at t, order preserved."""
    return t * MEAN + math.sqrt(t ** 2 * STD ** 2 + (1 - t) ** 2 * SIGMA ** 2) / SIGMA * x_0


def wave_denoiser(x, t):
    """dx/dt = x cos 3t - x^2 / 4, which no solver gets right by luck: midpoint is third order on the Gaussian."""
    return x + (1 - t) * (x * math.cos(3 * t) - x * x / 4)


def wave_solution(x_0, t, n=20_000):
    """Bernoulli's equation: 1/x = e^-A (1/x_0 + 1/4 int e^A dt), with A = sin(3t) / 3."""
    s = torch.linspace(0, t, n + 1, dtype=torch.float64)
    return math.exp(math.sin(3 * t) / 3) / (1 / x_0 + torch.trapezoid((s.mul(3).sin() / 3).exp(), s) / 4)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("midpoint", 2), ("heun", 2)])
def test_a_solver_converges_with_its_order(solver, order):
    x_0 = (torch.rand(100, 1, generator=generator(), dtype=torch.float64) + 0.5) * 4
    for f, solution in ((wave_denoiser, wave_solution), (gaussian_denoiser, gaussian_solution)):
        errors = []
        for n in (32, 64, 128, 256):                              # intervals
            x, t = run(f, x_0, n * order + 1, solver, 0.95)
            errors.append((x - solution(x_0, t)).abs().max().item())
        slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
        expected = 3 if solver == "midpoint" and f is gaussian_denoiser else order
        assert all(abs(slope - expected) < 0.15 for slope in slopes[1:]), slopes


def test_fixed_point_with_eulers_own_weight_is_euler():
    """(b - a) / ((1 - a) b) at every step; on a guess that travels, with every grid."""
    x_0 = 4 * torch.randn(6, 3, generator=generator(), dtype=torch.float64)
    for times in (time_grid(7, 0.9), time_grid(5, 1.0, 0.3), [0.0, 0.2, 0.25, 0.9]):
        def fixed_point(dx, x, a, b):
            return diffusion.fixed_point_step(dx, x, a, b, x_0, (b - a) / ((1 - a) * b))
        euler, other = Field(wave_denoiser), Field(wave_denoiser)
        expected = algorithm_1(euler, x_0, times)
        torch.testing.assert_close(algorithm_1(other, x_0, times, fixed_point), expected, atol=1e-9, rtol=1e-9)
        assert other.times == euler.times == times[:-1]


def test_fixed_point_moves_the_mean_guess_by_its_weight():
    """x_t = (1 - t) x_0 + t m, where m starts at the first guess and moves by `weight` at every later one."""
    x_0 = 4 * torch.randn(6, 3, generator=generator(), dtype=torch.float64)
    guesses = torch.randn(8, 6, 3, generator=generator(1), dtype=torch.float64)
    for weight in (0.25, 0.6, 1.0):
        given = iter(guesses)
        x, t = run(lambda x, t: next(given), x_0, 9, "fixed_point", weight=weight)
        m = guesses[0]
        for guess in guesses[1:]:
            m = m + weight * (guess - m)
        torch.testing.assert_close(x, (1 - t) * x_0 + t * m, atol=1e-9, rtol=1e-9)


# ------------------------------------------------------------------------------------------------ adaptive
class Flips:
    """Guess 0 before time `flip[i]` in row i, guess 1 after it; counts evaluations per row."""
    def __init__(self, flip):
        self.flip, self.n = torch.tensor(flip), torch.zeros(len(flip), dtype=torch.long)
        self.latest = torch.zeros(len(flip))

    def __call__(self, x, t, where):
        t = t if torch.is_tensor(t) else torch.full(self.flip.shape, t)
        self.n += where
        self.latest = torch.where(where, t, self.latest)
        return torch.where(t > self.flip, 10.0, 0.0)[:, None].expand_as(x).contiguous()


def test_adaptive_steps_each_row_on_its_own():
    flips = [2.0, 0.5, 0.83, 2.0, 0.1]                            # 2: never
    x_0 = 3 * torch.randn(5, 4, generator=generator())
    f = Flips(flips)
    x, t = adaptive(f, x_0, 40, tol=0.05, t_end=0.9)
    assert (t == torch.tensor(0.9)).all()
    torch.testing.assert_close(x[[0, 3]], 0.1 * x_0[[0, 3]], atol=1e-6, rtol=1e-6)       # the straight line
    assert f.n[0] == f.n[3] <= 4 and (f.n[[1, 2, 4]] > f.n[0]).all()
    for i, flip in enumerate(flips):
        alone = Flips([flip])
        x_alone, t_alone = adaptive(alone, x_0[i:i + 1], 40, tol=0.05, t_end=0.9)
        assert torch.equal(x_alone[0], x[i]) and t_alone[0] == t[i] and alone.n[0] == f.n[i]
        exact = torch.full((4,), 10.0 if flip < 0.9 else 0.0)     # solution: two straight lines
        x_flip = (1 - min(flip, 0.9)) * x_0[i]
        exact = x_flip + (exact - x_flip) * (0.9 - min(flip, 0.9)) / (1 - min(flip, 0.9))
        assert (x[i] - exact).norm() / 2 < 0.5


@pytest.mark.parametrize("steps", [2, 3, 5, 9])
def test_adaptive_keeps_to_its_budget(steps):
    """The evaluation that is read counts too; a row that needs all of them gets them."""
    f = Flips([0.01, 0.4, 2.0])
    x, t = adaptive(f, torch.ones(3, 4), steps, tol=1e-6, t_end=Sampler(steps=steps, solver="adaptive").last_time())
    assert f.n.max() <= steps and (t < 1).all() and torch.isfinite(x).all()
    assert f.n[0] == steps                                        # the row that is refused spends all of it
    assert t[2] == f.latest[2] or f.n[2] == steps


@pytest.mark.parametrize("t_end", [0.5, 0.9, 15 / 16, 0.95, 1.0])
def test_adaptive_ends_at_t_end(t_end):
    def f(x, t, where):
        assert torch.isfinite(x[where]).all() and torch.isfinite(torch.as_tensor(t)).all()
        return gaussian_denoiser(x, t)
    x, t = adaptive(f, torch.randn(3, 1, generator=generator()), 30, 0.05, t_end)
    assert (t == torch.tensor(t_end)).all() and torch.isfinite(x).all()


def test_a_smaller_tolerance_is_more_accurate_and_costs_more():
    x_0, errors, spent = SIGMA * torch.randn(64, 1, generator=generator()), [], []
    for tol in (1e-1, 1e-2, 1e-3, 1e-4):
        f = Field(gaussian_denoiser)
        x, t = adaptive(f.x_1_hat, x_0, 3000, tol, 0.9)
        assert (t == torch.tensor(0.9)).all()
        errors.append((x - gaussian_solution(x_0, 0.9)).abs().max().item())
        spent.append(len(f.times))
    assert all(b < 0.6 * a for a, b in zip(errors, errors[1:])) and errors[-1] < 0.05
    assert all(b > 1.5 * a for a, b in zip(spent[1:], spent[2:]))


# ---------------------------------------------------------------------------------------------------- the loss
def example(B=3, T=9, seed=0):
    """idx, at, y, label."""
    g = generator(seed)
    idx = torch.randint(WILD.vocab_size, (B, T), generator=g)
    is_target = torch.rand(B, T, generator=g) >= 0.4
    is_target[:, -1] = False
    at = is_target.nonzero(as_tuple=True)
    return idx, at, idx.roll(-1, 1)[at], torch.tensor([0, 3, 2])[:B]


def test_nll_is_eq_3_position_by_position(model):
    """Each target alone: its prompt cut after it, a batch of one, a noised x built by hand."""
    idx, at, y, label = example()
    t, x_0 = draw(len(y), model.path.config, generator())
    losses = nll(model, idx, at, y, label, t, x_0)
    assert losses.shape == (len(y),) and losses.dtype == torch.float32 and len(y) > 9
    V = model.trunk.wte.weight @ model.path.W.weight.T
    V = math.sqrt(8) * V / V.norm(dim=1, keepdim=True)
    for i, (row, k) in enumerate(zip(*(z.tolist() for z in at))):
        c = model.read(idx[row:row + 1, :k + 1], (torch.tensor([0]), torch.tensor([k])))
        x_t = (t[i] * V[y[i]] + (1 - t[i]) * x_0[i])[None]
        logits = model(x_t, t[i:i + 1], c, label[row:row + 1])
        torch.testing.assert_close(losses[i], -logits.log_softmax(-1)[0, y[i]], atol=1e-4, rtol=1e-4)


def test_what_follows_the_last_target_of_a_row_cannot_matter(model):
    """Padding least of all; what precedes it does."""
    idx, at, y, label = example()
    t, x_0 = draw(len(y), model.path.config, generator())
    base = nll(model, idx, at, y, label, t, x_0)
    padded = F.pad(idx, (0, 5), value=EOT)
    torch.testing.assert_close(nll(model, padded, at, y, label, t, x_0), base, atol=1e-5, rtol=1e-5)
    idx[:, -1] = (idx[:, -1] + 1) % WILD.vocab_size
    torch.testing.assert_close(nll(model, idx, at, y, label, t, x_0), base, atol=1e-5, rtol=1e-5)
    idx[:, 0] = (idx[:, 0] + 1) % WILD.vocab_size
    assert (nll(model, idx, at, y, label, t, x_0) - base).abs().max() > 1e-2


def test_nll_without_a_path_or_at_t_0_is_the_trunks_cross_entropy(model):
    idx, at, y, label = example()
    alone = L2D(model.trunk)
    expected = F.cross_entropy(model.trunk.head(model.trunk(idx)[0])[at], y, reduction="none")
    torch.testing.assert_close(nll(alone, idx, at, y, label), expected, atol=1e-5, rtol=1e-5)
    t, x_0 = draw(len(y), model.path.config, generator())
    torch.testing.assert_close(nll(model, idx, at, y, label, 0 * t, x_0), expected, atol=1e-5, rtol=1e-5)


def test_training_through_algorithm_1_sees_the_samplers_logits(model):
    """nll with T, against teacher_forced: the logits of --solver=fixed_point --guess=mean."""
    idx, at, y, label = example()
    for steps in (1, 2, 3, 6):
        sampler = Sampler(steps=steps, solver="fixed_point", guess="mean")
        logits, _ = teacher_forced(model, idx, at, sampler, generator(3), label)
        config = model.path.config
        x_0 = config.sigma * torch.randn(len(y), config.x_dim, generator=generator(3))
        losses = nll(model, idx, at, y, label, x_0=x_0, T=steps)
        torch.testing.assert_close(losses, F.cross_entropy(logits, y, reduction="none"), atol=1e-4, rtol=1e-4)


def test_the_gradient_goes_through_every_step_of_algorithm_1(model):
    """Against finite differences along itself; and the first of four steps has a share in it."""
    idx, at, y, label = example()
    model, x_0 = copy.deepcopy(model), 2.0 * torch.randn(len(y), 8, generator=generator(3))

    def loss():
        return nll(model, idx, at, y, label, x_0=x_0, T=4).sum()
    weights = (model.path.W.weight, model.path.x_in[0].weight, model.path.h[0].mlp.c_fc.weight)
    params = [p.requires_grad_() for p in weights]
    grads = torch.autograd.grad(loss(), params)
    for p, grad in zip(params, grads):
        step, values = 1e-2 * F.normalize(grad.flatten(), dim=0).view_as(p), []
        with torch.no_grad():
            for sign in (1, -2, 1):                               # + step, - step, back
                p += sign * step
                values.append(loss().double())
        assert (values[0] - values[1]).item() == pytest.approx(2e-2 * grad.norm().item(), rel=0.05)
    x_0.requires_grad_()
    assert torch.autograd.grad(loss(), x_0)[0].abs().max() > 1e-4


def test_the_gradient_of_a_batch_is_the_sum_over_its_unequal_parts(trainable):
    idx, at, y, label = example()
    t, x_0 = draw(len(y), trainable.path.config, generator())
    assert len(set(at[0].bincount().tolist())) > 1

    def gradients(parts):
        trainable.zero_grad()
        for rows in parts:
            mine = (at[0] >= rows.start) & (at[0] < rows.stop)
            here = at[0][mine] - rows.start, at[1][mine]
            losses = nll(trainable, idx[rows], here, y[mine], label[rows], t[mine], x_0[mine])
            (losses.sum() / len(y)).backward()
        return {name: p.grad.clone() for name, p in trainable.path.named_parameters()}
    whole, parts = gradients([slice(0, 3)]), gradients([slice(0, 1), slice(1, 3)])
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], atol=1e-6, rtol=1e-4,
                                   msg=lambda s, name=name: f"{name}: {s}")
    assert whole["W.weight"].abs().max() > 0


# ------------------------------------------------------------------------------------------------ Algorithm 1
SETTINGS = {
    "trunk": dict(steps=1), "trunk sampled": dict(steps=1, temperature=1.0, top_k=5),
    "two": dict(steps=2), "euler": dict(steps=8), "euler late": dict(steps=7, t_end=0.99),
    "many": dict(steps=17), "euler to 1": dict(steps=5, t_end=1.0),
    "midpoint": dict(steps=9, solver="midpoint"), "midpoint odd": dict(steps=6, solver="midpoint", t_end=0.95),
    "midpoint to 1": dict(steps=15, solver="midpoint", t_end=1.0), "heun": dict(steps=7, solver="heun"),
    "heun to 1": dict(steps=8, solver="heun", t_end=1.0), "fixed_point": dict(steps=8, solver="fixed_point"),
    "fixed_point late": dict(steps=6, solver="fixed_point", weight=0.3, t_hold=0.6, t_end=0.9, guess="mean"),
    "adaptive": dict(steps=12, solver="adaptive", tol=0.3),
    "adaptive short": dict(steps=4, solver="adaptive", tol=0.05),
    "adaptive to 1": dict(steps=12, solver="adaptive", tol=0.5, t_end=1.0),
    "stop": dict(steps=8, stop=0.5), "sampled stop": dict(steps=8, stop=0.1, guess="sample"),
    "stop midpoint": dict(steps=9, solver="midpoint", stop=0.3),
    "stop fixed_point": dict(steps=9, solver="fixed_point", stop=0.2, guess="mean"),
    "adaptive stop": dict(steps=12, solver="adaptive", stop=0.3),
    "temperature": dict(steps=6, temperature=0.8),
    "sampled guesses": dict(steps=6, guess="sample", temperature=1.0, top_k=7),
    "sampled adaptive": dict(steps=9, solver="adaptive", guess="sample", tol=0.5),
    "mean": dict(steps=6, solver="heun", guess="mean"), "guidance": dict(steps=6, guidance=2.5),
    "guidance stop": dict(steps=6, guidance=2.5, stop=0.9, solver="midpoint"),
    "guidance adaptive": dict(steps=6, guidance=1.5, solver="adaptive")}


def test_algorithm_1_is_one_function_of_at_most_25_lines():
    assert len(inspect.getsource(algorithm_1).splitlines()) <= 25
    assert "predict(" in inspect.getsource(nll)                   # training through it uses the same function
    assert "algorithm_1(f, f.x_0" in inspect.getsource(diffusion.predict)


@pytest.mark.parametrize("file", ["model", "diffusion", "decode", "checkpoint", "machine", "train", "sample"])
def test_no_function_of_the_core_is_longer_than_60_lines_or_takes_more_than_8_arguments(file):
    for node in ast.walk(ast.parse((ROOT / f"{file}.py").read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 60, node.name
            own = [a.arg for a in node.args.args if a.arg not in ("self", "trace")]
            assert len(own) <= 8, (node.name, own)


@torch.no_grad()
def denoiser(model, sampler, label):
    """A Denoiser of two positions after one prompt, V, and the pair as a function of x, t and label."""
    idx, at = torch.tensor([[3, 1, 4, 1, 5]] * 2), (torch.tensor([0, 1]), torch.tensor([4, 4]))
    c, tables = model.read(idx, at), Tables(model)
    f = Denoiser(model, sampler, tables, c, label, torch.randn(2, 8), torch.rand(2, sampler.steps + 1))
    return f, tables.V, lambda x, t, label: model(x, torch.full((2,), t), c, label)


@torch.no_grad()
def test_guidance_is_eq_7_with_a_plus(model):
    label, x = torch.tensor([0, 2]), torch.randn(2, 8, generator=generator())
    none = torch.tensor([3, 3])
    for guess in ("argmax", "mean"):
        f, V, logits = denoiser(model, Sampler(steps=5, guidance=3.0, guess=guess), label)
        hat = (lambda z: V[z.argmax(-1)]) if guess == "argmax" else (lambda z: z.softmax(-1) @ V)
        differ = False
        for t in (0.6, 0.8, 0.95):
            a, b = hat(logits(x, t, label)), hat(logits(x, t, none))
            before = f.nfe.clone()
            torch.testing.assert_close(f.x_1_hat(x, t), 3 * a - 2 * b, atol=1e-4, rtol=1e-4)
            assert (f.nfe - before).tolist() == [2, 2]
            torch.testing.assert_close(f.latest, logits(x, t, label), atol=1e-4, rtol=1e-4)
            differ |= (a - b).abs().max() > 0.1
        assert differ
        before = f.nfe.clone()
        torch.testing.assert_close(f.logits(x, 0.9), logits(x, 0.9, label), atol=1e-4, rtol=1e-4)
        assert (f.nfe - before).tolist() == [1, 1]                # the last call is read with the label alone
    f, V, logits = denoiser(model, Sampler(steps=5, guidance=1.0), label)
    torch.testing.assert_close(f.x_1_hat(x, 0.8), V[logits(x, 0.8, label).argmax(-1)])
    assert f.nfe.tolist() == [1, 1]


@torch.no_grad()
def test_the_first_evaluation_is_the_trunks_and_free(model):
    f, V, _ = denoiser(model, Sampler(steps=5), torch.tensor([0, 2]))
    trunk = model.trunk.head(model.trunk(torch.tensor([[3, 1, 4, 1, 5]]))[0])[:, -1]
    torch.testing.assert_close(f.latest, trunk.expand(2, -1), atol=1e-5, rtol=1e-5)
    x_1_hat = f.x_1_hat(torch.full((2, 8), torch.nan), 0.0)
    assert torch.equal(x_1_hat, V[trunk.argmax(-1)].expand(2, -1)) and f.nfe.tolist() == [0, 0]


@torch.no_grad()
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
    ends = torch.tensor([0.0, 1 - 2 ** -24])                      # no token of probability 0 at the ends of u
    impossible = torch.tensor([-torch.inf, 0.0, 0.0, -torch.inf])
    assert choose(impossible.expand(2, 4), ends).tolist() == [1, 2]
    assert choose(logits.expand(2, 6), ends, 1.0, 2).tolist() == [3, 5]


@pytest.mark.parametrize("setting", ["trunk", "euler", "midpoint odd", "heun", "fixed_point", "adaptive", "guidance",
                                     "stop", "adaptive stop", "mean"])
def test_teacher_forced_is_the_naive_algorithm_1_at_every_target(model, setting):
    sampler, (idx, at, y, label) = Sampler(**SETTINGS[setting]), example()
    logits, nfe = teacher_forced(model, idx, at, sampler, generator(), label)
    g, n = generator(), len(y)                                    # the same draws, in the same order
    x_0 = 2.0 * torch.randn(n, 8, generator=g) if sampler.steps > 1 else torch.zeros(n, 8)
    u = torch.rand(n, sampler.steps + 1, generator=g)
    for i, (row, k) in enumerate(zip(*(z.tolist() for z in at))):
        naive = Naive(model, Decoding(**SETTINGS[setting]), label[row].item())
        expected = naive.predict(idx[row, :k + 1].tolist(), x_0[i], u[i])
        torch.testing.assert_close(logits[i], expected, atol=2e-3, rtol=2e-3)
        assert nfe[i] == naive.nfe


def test_teacher_forced_without_labels_means_no_label(model):
    idx, at, y, label = example()
    none = teacher_forced(model, idx, at, Sampler(steps=4), generator())[0]
    last = teacher_forced(model, idx, at, Sampler(steps=4), generator(), torch.full_like(label, 3))[0]
    torch.testing.assert_close(none, last, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wrong", [dict(steps=0), dict(t_end=-0.1), dict(t_end=1.1), dict(t_hold=-0.1), dict(t_hold=0.4), dict(tol=0.0),
                                   dict(stop=-0.1), dict(temperature=-1.0), dict(top_k=-1),
                                   dict(weight=0.0), dict(weight=1.5)])
def test_settings_out_of_range_are_refused(wrong):
    ((name, value),) = wrong.items()
    says(error_of(Sampler, **wrong), f"{name}={value}")


def test_the_solvers_that_are_offered_all_exist(model):
    """--solver's Literal against plan: none falls through to Euler in silence."""
    x_0 = torch.randn(4, 8, generator=generator())
    given = torch.randn(40, 4, 8, generator=generator(1))
    ends = {}
    for solver in SOLVERS:
        guesses = iter(given)
        ends[solver] = run(lambda x, t: next(guesses), x_0, 9, solver)[0]
    offered = Sampler.__dataclass_fields__["solver"].type
    assert set(offered.__args__) == {*SOLVERS, "adaptive"}
    assert len({tuple(x.flatten().tolist()) for x in ends.values()}) == len(SOLVERS)


def test_a_new_solver_is_a_function_and_an_entry(model, monkeypatch):
    """Runge and Kutta's, of four evaluations a step: T - 1 path calls whatever T is, and order four."""
    def rk4_step(dx, x, a, b):
        h, m = b - a, (a + b) / 2
        k_1 = dx(x, a)
        k_2 = dx(x + h / 2 * k_1, m)
        k_3 = dx(x + h / 2 * k_2, m)
        return x + h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + dx(x + h * k_3, b))
    monkeypatch.setitem(diffusion.SOLVERS, "rk4", (rk4_step, 4))
    idx, at, _, label = example()
    for steps in range(1, 19):
        sampler = Sampler(steps=steps, solver="rk4", guess="sample")
        assert set(teacher_forced(model, idx, at, sampler, generator(), label)[1].tolist()) == {steps - 1}
    x_0 = torch.randn(3, 8, generator=generator(), dtype=torch.float64)
    def end(solver, steps):                                       # x_1_hat = cos 5t: a smooth field
        return run(lambda x, t: torch.full_like(x, math.cos(5 * t)), x_0, steps, solver, 0.8)[0]
    truth = end("midpoint", 4001)
    coarse, fine = ((end("rk4", steps) - truth).norm() for steps in (33, 65))
    assert fine < coarse / 10                                     # 16 in the limit: order four


def test_no_call_is_held_at_the_time_of_the_data():
    """There the velocity is 0 / 0."""
    says(error_of(Sampler, steps=4, solver="fixed_point", t_hold=1.0, t_end=1.0), "t_hold=1.0", "below 1")
