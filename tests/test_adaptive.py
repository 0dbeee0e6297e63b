"""adaptive.py against flows with known solutions, and each position against itself alone."""
import pytest
import torch
from helpers import SETTINGS, example, generator, tokens, wild_pair
from test_diffusion import SIGMA, gaussian_denoiser, gaussian_solution
from test_model import noisy, pair

from adaptive import AdaptiveDenoiser, adaptive, select
from decode import denoiser_class
from diffusion import Denoiser, SamplerConfig, Tables


class Flips:
    """Guess 0 before time flip[i] in row i, 10 after it. n counts the evaluations of each row."""
    def __init__(self, flip):
        self.flip = torch.tensor(flip)
        self.n = torch.zeros(len(flip), dtype=torch.long)
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
    x, t = adaptive(f, torch.ones(3, 4), steps, tol=1e-6, t_end=SamplerConfig(steps=steps, solver="adaptive").last_time())
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
        asked = []

        def f(x, t, where):
            asked.append(t)
            return gaussian_denoiser(x, t)
        x, t = adaptive(f, x_0, 3000, tol, 0.9)
        assert (t == torch.tensor(0.9)).all()
        errors.append((x - gaussian_solution(x_0, 0.9)).abs().max().item())
        spent.append(len(asked))
    assert all(b < 0.6 * a for a, b in zip(errors, errors[1:])) and errors[-1] < 0.05
    assert all(b > 1.5 * a for a, b in zip(spent[1:], spent[2:]))


@torch.no_grad()
def test_positions_selected_from_a_context_give_what_they_give_among_all():
    """In any order, from a grid that is full or has holes, with rows left out."""
    model, idx = pair(), tokens(3, 9)
    grid = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([3, 4, 6, 7, 1, 2])     # two columns of each row
    c, (x_t, t, group) = model.read_context(idx, grid), noisy(6)
    expected = model(x_t, t, c, group)
    mask = (torch.arange(9) <= grid[1].view(3, 2, 1))[:, None]    # (B, 1, Q, S)
    places = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 1, 0, 1, 0, 1])
    contexts = {"trained on": c, "full grid": c._replace(at=None, mask=mask), "places": c._replace(at=places, mask=mask)}
    for name, context in contexts.items():
        for i in ([0, 1, 2, 3, 4, 5], [5, 0], [3, 2], [4], [1, 5, 3]):
            i = torch.tensor(i)
            got = model(x_t[i], t[i], select(context, i), group[i])
            torch.testing.assert_close(got, expected[i], atol=1e-5, rtol=1e-5, msg=f"{name} {i}")
    last = torch.arange(3), torch.tensor([8, 8, 8])               # one query a row: it sees all keys, unmasked
    c = model.read_context(idx, last)._replace(at=None)
    expected = model(x_t[:3], t[:3], c, group[:3])
    for i in ([2], [1, 2], [2, 0], [0, 1, 2]):
        i = torch.tensor(i)
        got = model(x_t[i], t[i], select(c, i), group[i])
        torch.testing.assert_close(got, expected[i], atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------ positions that go separate ways
@pytest.fixture(scope="module")
def model():
    return wild_pair()


@torch.no_grad()
def predicted(model, which, setting, i=slice(None), **more):
    """A Denoiser of all targets of a batch, or of those in i, after Algorithm 1. trace=True."""
    idx, at, y, group = example()
    config = SamplerConfig(**SETTINGS[setting] | more)
    g = generator(5)
    x_0 = 2.0 * torch.randn(len(y), 8, generator=g)[i]
    u = torch.rand(len(y), config.steps + 1, generator=g)[i]
    at = at[0][i], at[1][i]
    f = which(model, config, Tables(model), model.read_context(idx, at), group[at[0]], x_0, u, trace=True)
    f.predict()
    return f


def same_evaluations(f, other, i=slice(None)):
    """Whether `other` did for its positions what f did for the positions i."""
    torch.testing.assert_close(other.logits, f.logits[i], atol=1e-3, rtol=1e-3)
    assert torch.equal(other.nfe, f.nfe[i])
    of_f = [f.trace[n] for n in torch.arange(len(f.trace))[i].tolist()]
    assert [[guess for _, guess, _ in token] for token in other.trace] == \
        [[guess for _, guess, _ in token] for token in of_f]


@pytest.mark.parametrize("setting", ["two", "euler", "midpoint odd", "heun to 1", "fixed_point late", "guidance",
                                     "sampled guesses", "mean"])
def test_where_all_positions_go_one_way_it_is_the_plain_denoiser(model, setting):
    plain = predicted(model, Denoiser, setting)
    general = predicted(model, AdaptiveDenoiser, setting)
    assert torch.equal(general.logits, plain.logits) and torch.equal(general.nfe, plain.nfe)
    for ours, theirs in zip(general.trace, plain.trace, strict=True):
        assert torch.tensor(ours).equal(torch.tensor(theirs))     # in float32, as a position's own times are
    assert denoiser_class(SamplerConfig(**SETTINGS[setting])) is Denoiser


@pytest.mark.parametrize("setting", ["adaptive", "adaptive short", "adaptive to 1", "adaptive stop", "stop",
                                     "stop midpoint", "stop fixed_point", "sampled stop", "guidance stop",
                                     "guidance adaptive", "sampled adaptive"])
def test_a_position_does_among_others_what_it_does_alone(model, setting):
    assert denoiser_class(SamplerConfig(**SETTINGS[setting])) is AdaptiveDenoiser
    more = dict(tol=2.0) if setting == "guidance adaptive" else {}
    f = predicted(model, AdaptiveDenoiser, setting, **more)
    assert len(set(f.nfe.tolist())) > 1                           # they do not all end together
    for n in range(len(f.nfe)):
        same_evaluations(f, predicted(model, AdaptiveDenoiser, setting, [n], **more), [n])


def test_a_position_that_stopped_keeps_its_logits_and_spends_no_more(model):
    """Its evaluations are a beginning of those it would have had, and it stopped where its guess had repeated."""
    free = predicted(model, AdaptiveDenoiser, "stop", stop=1e-9)
    f = predicted(model, AdaptiveDenoiser, "stop")
    n_stopped = 0
    for n, (short, whole) in enumerate(zip(f.trace, free.trace, strict=True)):
        assert [guess for _, guess, _ in short] == [guess for _, guess, _ in whole[:len(short)]]
        p = f.logits[n].softmax(-1)
        assert short[-1][1] == f.guess[n] == p.argmax() and short[-1][2] == pytest.approx(p.max().item(), rel=1e-5)
        if len(short) < len(whole):
            n_stopped += 1
            assert short[-1][1] == short[-2][1]
    assert 0 < n_stopped
    assert free.nfe.tolist() == [7] * len(free.nfe)               # never so close: the whole T = 8


@pytest.mark.parametrize("solver", ["euler", "adaptive"])
def test_t_1_of_a_denoiser_that_could_stop_is_the_trunk_alone(model, solver):
    f = predicted(model, AdaptiveDenoiser, "trunk", solver=solver, **dict(stop=0.5) if solver == "euler" else {})
    assert torch.equal(f.logits, f.trunk_logits) and not f.nfe.any()
