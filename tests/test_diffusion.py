"""diffusion.py against closed forms, fields with known solutions, and finite differences."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import EOT, SOLVERS, WILD, error_of, everywhere, example, generator, says, wild_pair

import diffusion
from decode import predict_given
from diffusion import (
    UNROLLED,
    Denoiser,
    SamplerConfig,
    Tables,
    algorithm_1,
    choose,
    draw,
    draw_steps,
    drop_groups,
    euler_step,
    make_time_grid,
    nll,
    noise,
    trunk_nll,
    unrolled_nll,
    velocity,
)
from model import L2D, PathConfig


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
    counts = [draw_steps(5, generator(i)) - 1 for i in range(400)]
    assert set(counts) == {1, 2, 3, 4, 5}
    share = [math.log((n + 1) / n) / math.log(6) for n in range(1, 6)]    # uniform in the logarithm of the calls
    assert all(abs(counts.count(n) / 400 - share[n - 1]) < 0.08 for n in range(1, 6))


def test_groups_are_dropped_as_often_as_asked_and_for_whole_examples():
    group = torch.arange(4000) % 4
    new = drop_groups(group, 4, 0.2, generator(1))
    dropped = new == 4
    assert abs(dropped.float().mean() - 0.2) < 0.03 and torch.equal(new[~dropped], group[~dropped])
    assert torch.equal(drop_groups(group, 4, 0.0, generator(1)), group)
    assert (drop_groups(group, 4, 1.0, generator(1)) == 4).all()


# -------------------------------------------------------------------------------------- velocity and solvers
def test_velocity_is_the_derivative_of_eq_1():
    x_1, x_0, t = torch.randn(50, 4), 64 * torch.randn(50, 4), 0.98 * torch.rand(50)
    torch.testing.assert_close(velocity(noise(x_1, x_0, t), t, x_1), x_1 - x_0, atol=1e-2, rtol=1e-3)
    half = torch.full((50,), 0.5)
    torch.testing.assert_close(velocity(noise(x_1, x_0, half), 0.5, x_1), x_1 - x_0, atol=1e-3, rtol=1e-4)


class Field:
    """What Algorithm 1 asks of a Denoiser, for a field with a known solution.

    It writes down when it is asked. Its last logits are where x_t has come to.
    """
    def __init__(self, x_1_hat):
        self.field = x_1_hat
        self.times = []

    def x_1_hat(self, x, t):
        self.times.append(t)
        return self.field(x, t)

    def evaluate(self, x, t):
        self.last_time = t
        return x


def run(field, x_0, steps, solver, t_end=0.0, t_hold=0.0, **more):
    """x at the time of the last evaluation, and that time; by the one Algorithm 1."""
    f = field if isinstance(field, Field) else Field(field)
    more |= dict(t_hold=t_hold) if solver == "fixed_point" else {}
    config = SamplerConfig(steps=steps, solver=solver, t_end=t_end, **more)
    return algorithm_1(f, x_0, *config.plan(x_0)), f.last_time


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
            times = SamplerConfig(steps=steps, solver=solver, t_end=t_end).plan(None)[0]
            assert times == sorted(set(times))
        assert torch.isfinite(x).all() and f.times[-1] <= t


def test_time_grid_is_even_or_holds_and_ends_exactly():
    for n in (1, 2, 3, 10, 16):
        for t_end in (0.1, 0.9, 1 - 1 / 16, 1.0):
            torch.testing.assert_close(torch.tensor(make_time_grid(n, t_end)), torch.linspace(0, t_end, n + 1))
            assert make_time_grid(n, t_end)[-1] == t_end               # never past 1
            assert make_time_grid(n, t_end, 0.07) == [0.0] + [0.07] * (n - 1) + [t_end]
    assert make_time_grid(0, 0.5) == make_time_grid(0, 0.5, 0.2) == [0.0]
    assert SamplerConfig(steps=1, solver="fixed_point").plan(None)[0] == [0.0]


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
    for times in (make_time_grid(7, 0.9), make_time_grid(5, 1.0, 0.3), [0.0, 0.2, 0.25, 0.9]):
        def fixed_point(dx, x, a, b):
            return diffusion.fixed_point_step(dx, x, a, b, x_0, (b - a) / ((1 - a) * b))
        euler, other = Field(wave_denoiser), Field(wave_denoiser)
        n = len(times) - 1
        expected = algorithm_1(euler, x_0, times, [euler_step] * n)
        got = algorithm_1(other, x_0, times, [fixed_point] * n)
        torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)
        assert other.times == euler.times == times[:-1]


def test_fixed_point_moves_the_mean_guess_by_its_relaxation():
    """x_t = (1 - t) x_0 + t m, where m starts at the first guess and moves by `relaxation` at every later one."""
    x_0 = 4 * torch.randn(6, 3, generator=generator(), dtype=torch.float64)
    guesses = torch.randn(8, 6, 3, generator=generator(1), dtype=torch.float64)
    for relaxation in (0.25, 0.6, 1.0):
        given = iter(guesses)
        x, t = run(lambda x, t: next(given), x_0, 9, "fixed_point", relaxation=relaxation)
        m = guesses[0]
        for guess in guesses[1:]:
            m = m + relaxation * (guess - m)
        torch.testing.assert_close(x, (1 - t) * x_0 + t * m, atol=1e-9, rtol=1e-9)


# ---------------------------------------------------------------------------------------------------- the loss
def test_nll_is_eq_3_position_by_position(model):
    """Each target alone: its prompt cut after it, a batch of one, a noised x built by hand."""
    idx, at, y, group = example()
    t, x_0 = draw(len(y), model.path.config, generator())
    losses = nll(model, idx, at, y, group, t, x_0)
    assert losses.shape == (len(y),) and losses.dtype == torch.float32 and len(y) > 9
    V = model.trunk.wte.weight @ model.path.W.weight.T
    V = math.sqrt(8) * V / V.norm(dim=1, keepdim=True)
    for i, (row, k) in enumerate(zip(*(z.tolist() for z in at))):
        c = model.read_context(idx[row:row + 1, :k + 1], (torch.tensor([0]), torch.tensor([k])))
        x_t = (t[i] * V[y[i]] + (1 - t[i]) * x_0[i])[None]
        logits = model(x_t, t[i:i + 1], c, group[row:row + 1])
        torch.testing.assert_close(losses[i], -logits.log_softmax(-1)[0, y[i]], atol=1e-4, rtol=1e-4)


def test_what_follows_the_last_target_of_a_row_cannot_matter(model):
    """Padding least of all; what precedes it does."""
    idx, at, y, group = example()
    t, x_0 = draw(len(y), model.path.config, generator())
    base = nll(model, idx, at, y, group, t, x_0)
    padded = F.pad(idx, (0, 5), value=EOT)
    torch.testing.assert_close(nll(model, padded, at, y, group, t, x_0), base, atol=1e-5, rtol=1e-5)
    idx[:, -1] = (idx[:, -1] + 1) % WILD.vocab_size
    torch.testing.assert_close(nll(model, idx, at, y, group, t, x_0), base, atol=1e-5, rtol=1e-5)
    idx[:, 0] = (idx[:, 0] + 1) % WILD.vocab_size
    assert (nll(model, idx, at, y, group, t, x_0) - base).abs().max() > 1e-2


def test_trunk_nll_and_nll_at_t_0_are_the_trunks_cross_entropy(model):
    idx, at, y, group = example()
    alone = L2D(model.trunk)
    expected = F.cross_entropy(model.trunk.head(model.trunk(idx)[0])[at], y, reduction="none")
    for pair in (alone, model):
        torch.testing.assert_close(trunk_nll(pair, idx, at, y), expected, atol=1e-5, rtol=1e-5)
    t, x_0 = draw(len(y), model.path.config, generator())
    torch.testing.assert_close(nll(model, idx, at, y, group, 0 * t, x_0), expected, atol=1e-5, rtol=1e-5)


def test_training_through_algorithm_1_sees_the_samplers_logits(model):
    """unrolled_nll against predict_given with the sampler that such a path asks for."""
    idx, at, y, group = example()
    config = model.path.config
    for steps in (1, 2, 3, 6):
        logits, _ = predict_given(model, idx, at, SamplerConfig(steps=steps, **UNROLLED), generator(3), group)
        x_0 = config.sigma * torch.randn(len(y), config.x_dim, generator=generator(3))
        losses = unrolled_nll(model, idx, at, y, group, x_0, steps)
        torch.testing.assert_close(losses, F.cross_entropy(logits, y, reduction="none"), atol=1e-4, rtol=1e-4)


def test_the_gradient_goes_through_every_step_of_algorithm_1(model):
    """Against finite differences along itself; and the first of four steps has a share in it."""
    idx, at, y, group = example()
    model, x_0 = copy.deepcopy(model), 2.0 * torch.randn(len(y), 8, generator=generator(3))

    def loss():
        return unrolled_nll(model, idx, at, y, group, x_0, 4).sum()
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
    idx, at, y, group = example()
    t, x_0 = draw(len(y), trainable.path.config, generator())
    assert len(set(at[0].bincount().tolist())) > 1

    def gradients(parts):
        trainable.zero_grad()
        for rows in parts:
            mine = (at[0] >= rows.start) & (at[0] < rows.stop)
            here = at[0][mine] - rows.start, at[1][mine]
            losses = nll(trainable, idx[rows], here, y[mine], group[rows], t[mine], x_0[mine])
            (losses.sum() / len(y)).backward()
        return {name: p.grad.clone() for name, p in trainable.path.named_parameters()}
    whole, parts = gradients([slice(0, 3)]), gradients([slice(0, 1), slice(1, 3)])
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], atol=1e-6, rtol=1e-4,
                                   msg=lambda s, name=name: f"{name}: {s}")
    assert whole["W.weight"].abs().max() > 0


# ------------------------------------------------------------------------------------------------ Algorithm 1
@torch.no_grad()
def denoiser(model, config, group, **more):
    """A Denoiser of two positions after one prompt, V, and the pair as a function of x, t and group."""
    idx, at = torch.tensor([[3, 1, 4, 1, 5]] * 2), (torch.tensor([0, 1]), torch.tensor([4, 4]))
    c, tables = model.read_context(idx, at), Tables(model)
    x_0, u = torch.randn(2, 8, generator=generator()), torch.rand(2, config.steps + 1, generator=generator())
    f = Denoiser(model, config, tables, c, group, x_0, u, **more)
    return f, tables.V, lambda x, t, group: model(x, torch.full((2,), t), c, group)


@torch.no_grad()
def test_guidance_is_eq_7_with_a_plus(model):
    group, x = torch.tensor([0, 2]), torch.randn(2, 8, generator=generator())
    none = torch.tensor([3, 3])
    for guess in ("argmax", "mean"):
        f, V, logits = denoiser(model, SamplerConfig(steps=5, guidance=3.0, guess=guess), group)
        hat = (lambda z: V[z.argmax(-1)]) if guess == "argmax" else (lambda z: z.softmax(-1) @ V)
        differ = False
        for t in (0.6, 0.8, 0.95):
            a, b = hat(logits(x, t, group)), hat(logits(x, t, none))
            before = f.nfe.clone()
            torch.testing.assert_close(f.x_1_hat(x, t), 3 * a - 2 * b, atol=1e-4, rtol=1e-4)
            assert (f.nfe - before).tolist() == [2, 2]
            torch.testing.assert_close(f.logits, logits(x, t, group), atol=1e-4, rtol=1e-4)
            differ |= (a - b).abs().max() > 0.1
        assert differ
        before = f.nfe.clone()
        torch.testing.assert_close(f.evaluate(x, 0.9), logits(x, 0.9, group), atol=1e-4, rtol=1e-4)
        assert (f.nfe - before).tolist() == [1, 1]                # the last call is read with the group alone
    f, V, logits = denoiser(model, SamplerConfig(steps=5, guidance=1.0), group)
    torch.testing.assert_close(f.x_1_hat(x, 0.8), V[logits(x, 0.8, group).argmax(-1)])
    assert f.nfe.tolist() == [1, 1]


def refuse_path_calls(monkeypatch, path):
    """From here on a path call is an error."""
    def refuse(*args, **kwargs):
        raise AssertionError("the path was called")
    for name in ("forward", "condition"):
        monkeypatch.setattr(path, name, refuse)


@torch.no_grad()
def test_the_first_evaluation_is_the_trunks_own_bit_for_bit_and_no_path_call(model, monkeypatch):
    """In T = 1, where it is the only one; and before others, where it depends on neither x_0 nor guidance."""
    group = torch.tensor([0, 2])
    trunk = model.trunk.head(model.read_context(torch.tensor([[3, 1, 4, 1, 5]]), everywhere(1, 5)).h)[4:]
    refuse_path_calls(monkeypatch, model.path)
    for guess in ("argmax", "mean", "sample"):
        f, V, _ = denoiser(model, SamplerConfig(steps=1, guess=guess), group)
        assert torch.equal(f.predict(), f.trunk_logits) and torch.equal(f.logits, f.trunk_logits)
        torch.testing.assert_close(f.logits, trunk.expand(2, -1), atol=1e-5, rtol=1e-5)
        assert f.nfe.tolist() == [0, 0]
    f, V, _ = denoiser(model, SamplerConfig(steps=5, guidance=3.0), group, trace=True)
    x_1_hat = f.x_1_hat(torch.full((2, 8), torch.nan), 0.0)
    assert torch.equal(f.logits, f.trunk_logits)
    assert torch.equal(x_1_hat, V[trunk.argmax(-1)].expand(2, -1)) and f.nfe.tolist() == [0, 0]
    for ((t, guess, p),) in f.trace:
        assert t == 0 and guess == trunk.argmax() and p == pytest.approx(trunk.softmax(-1).max().item(), rel=1e-4)
    with pytest.raises(AssertionError, match="the path was called"):
        f.predict()


@torch.no_grad()
def test_a_table_is_the_condition_of_each_position(model):
    """What Tables computes once for all groups, against the path asked for each position on its own."""
    tables = Tables(model)
    group = torch.tensor([2, 0, 3, 1, 0])
    for t in (0.0, 0.3, 0.9375):
        modulations, w_d = tables[t]
        expected, expected_w_d = model.path.condition(torch.full((5,), t), group)
        for own, layer in zip(modulations, expected, strict=True):
            torch.testing.assert_close(own[group], layer, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(w_d[group], expected_w_d, atol=1e-5, rtol=1e-5)
        assert t > 0 or not w_d.any()
    assert torch.equal(tables.V, model.embed(torch.arange(WILD.vocab_size)))


# --------------------------------------------------------------------------------------- choosing, options
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


@pytest.mark.parametrize("wrong", [dict(steps=0), dict(t_end=-0.1), dict(t_end=1.1), dict(t_hold=-0.1), dict(t_hold=0.4), dict(tol=0.0),
                                   dict(stop=-0.1), dict(temperature=-1.0), dict(top_k=-1),
                                   dict(relaxation=0.0), dict(relaxation=1.5)])
def test_settings_out_of_range_are_refused(wrong):
    ((name, value),) = wrong.items()
    says(error_of(SamplerConfig, **wrong), f"{name}={value}")


def test_the_solvers_that_are_offered_all_exist(model):
    """--solver's Literal against plan: none falls through to Euler in silence."""
    x_0 = torch.randn(4, 8, generator=generator())
    given = torch.randn(40, 4, 8, generator=generator(1))
    ends = {}
    for solver in SOLVERS:
        guesses = iter(given)
        ends[solver] = run(lambda x, t: next(guesses), x_0, 9, solver)[0]
    offered = SamplerConfig.__dataclass_fields__["solver"].type
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
    idx, at, _, group = example()
    for steps in range(1, 19):
        sampler = SamplerConfig(steps=steps, solver="rk4", guess="sample")
        assert set(predict_given(model, idx, at, sampler, generator(), group)[1].tolist()) == {steps - 1}
    x_0 = torch.randn(3, 8, generator=generator(), dtype=torch.float64)
    def end(solver, steps):                                       # x_1_hat = cos 5t: a smooth field
        return run(lambda x, t: torch.full_like(x, math.cos(5 * t)), x_0, steps, solver, 0.8)[0]
    truth = end("midpoint", 999)
    coarse, fine = ((end("rk4", steps) - truth).norm() for steps in (33, 65))
    assert fine < coarse / 10                                     # 16 in the limit: order four


def test_no_call_is_held_at_the_time_of_the_data():
    """There the velocity is 0 / 0."""
    says(error_of(SamplerConfig, steps=4, solver="fixed_point", t_hold=1.0, t_end=1.0), "t_hold=1.0", "below 1")
