"""plumbing/costs.py: how far speculation looks ahead, against enumeration and simulation."""
import pytest
import torch
from helpers import EOT, wild_pair
from test_decode import PROMPTS, each_alone, same_texts

import plumbing.costs
import speculate
from decode import Continuation, DecodingConfig
from plumbing.costs import choose_sizes, interpolate


@pytest.fixture(scope="module")
def model():
    return wild_pair()


def written(tokens, rejected=0, changes=0, calls=15, rows=1):
    """What choose_sizes looks at, of `rows` rows."""
    return [Continuation(predicted=tokens, nfe=calls * tokens, rejected=list(range(rejected)), changes=changes)
            for _ in range(rows)]


def costs(free=32, trunk=1.0, path=1.0, operation=0.0):
    """A machine on which a call over n queries takes 1 + n / free times as long as one of none."""
    return trunk, [(n, path * (1 + n / free)) for n in (1, 4, 16, 64, 256, 1024)], operation


def test_between_measured_points_the_cost_is_a_line_and_behind_them_proportional():
    points = [(2, 1.0), (4, 3.0), (8, 4.0)]
    assert [interpolate(points, n) for n in (1, 2, 3, 4, 6, 8, 24)] == [1.0, 1.0, 2.0, 3.0, 3.5, 4.0, 12.0]


def test_the_next_draft_has_the_length_of_the_least_expected_time():
    """The expectation by enumerating where a draft's first rejected token lies, for a share of 0.8."""
    def time_per_token(K):
        share = [0.2 * 0.8 ** j for j in range(K)] + [0.8 ** K]   # rejected at j, or not at all
        kept = sum(p * min(j + 1, K) for j, p in enumerate(share))
        return (K + 15 * (1 + K / 32)) / kept
    n = 10 ** 4                                                   # the ten assumed vanish
    best = min([1, 2, 4, 8, 16], key=time_per_token)
    assert choose_sizes(written(n, n // 5), Continuation(), DecodingConfig(), 16, 1, costs()) == (best, 1)


@pytest.mark.parametrize("q", [0.01, 0.05, 0.3, 0.9])
@pytest.mark.parametrize("free", [4, 32])
def test_the_window_takes_about_the_least_time_there_is(q, free):
    """For a share q of evaluations at which the guess changes, by simulation; drafts are off."""
    g = torch.Generator().manual_seed(0)
    change = (torch.rand(2000, 15, generator=g) < q).tolist()

    def seconds(W):
        total = 0.0
        for token in change:
            known = 0
            while known < 15:
                end = min(known + W, 15)
                total += 1 + (end - known) / free
                known = next((e + 1 for e in range(known, end) if token[e]), end)
        return total
    n = 10 ** 5
    K, W = choose_sizes(written(n, changes=int(15 * q * n)), Continuation(), DecodingConfig(), 1, 15, costs(free))
    assert K == 1 and seconds(W) < 1.1 * min(seconds(w) for w in (1, 2, 4, 8, 15))


def test_drafts_are_longer_where_more_was_kept_and_shorter_where_positions_are_dear():
    def length(out, **machine):
        return choose_sizes(out, Continuation(), DecodingConfig(), 16, 1, costs(**machine))[0]
    assert length(written(0)) > 2                                 # nothing known yet
    assert 1 < length(written(100, 60)) < length(written(100, 1)) == 16
    assert length(written(100, 40, rows=64)) == 1                 # arithmetic binds: drafts only waste
    assert length(written(100, 8, calls=1)) < length(written(100, 8))
    assert length(written(100, 8), trunk=50.0) < length(written(100, 8))
    assert length(written(100, 40), operation=1.0) > length(written(100, 40))     # a round has a price of its own


@pytest.mark.parametrize("longest, widest", [(1, 1), (1, 5), (3, 3), (16, 63)])
def test_where_all_is_free_and_nothing_is_lost_drafts_and_windows_are_the_largest(longest, widest):
    out = written(10 ** 6)
    assert choose_sizes(out, Continuation(), DecodingConfig(), longest, widest, costs(free=10 ** 6, trunk=0.0)) == (longest, widest)


@pytest.mark.parametrize("more, most", [(dict(draft=0), (1, 3)), (dict(ahead=1), (5, 1)), (dict(ahead=2), (5, 2)),
                                        (dict(guess="mean"), (5, 1)), (dict(solver="adaptive"), (5, 1)),
                                        (dict(draft=99, max_new_tokens=4), (4, 3))])
def test_sizes_keep_to_their_options(model, monkeypatch, more, most):
    asked, choose = [], speculate.choose_sizes
    def looked_at(out, earlier, config, longest, widest, costs):
        asked.append((longest, widest))
        return choose(out, earlier, config, longest, widest, costs)
    monkeypatch.setattr(speculate, "choose_sizes", looked_at)
    speculate.generate(model, PROMPTS, EOT, DecodingConfig(**dict(steps=4, draft=5, max_new_tokens=6) | more))
    assert set(asked) == {most}


@pytest.mark.parametrize("B", [1, 63, 64, 150])
def test_costs_can_be_measured_for_any_number_of_rows(model, monkeypatch, B):
    monkeypatch.setattr(plumbing.costs, "COSTS", type(plumbing.costs.COSTS)())
    config = DecodingConfig(steps=3, max_new_tokens=1)
    same_texts(speculate.generate(model, [[1, 2]] * B, EOT, config), each_alone(model, [[1, 2]] * B, EOT, config))
    ((_, path, _),) = plumbing.costs.COSTS[model].values()
    assert path[0][0] == B and len(path) > 1


def test_costs_are_measured_once_for_a_model_and_a_batch(model, monkeypatch):
    config = DecodingConfig(steps=4, max_new_tokens=6)
    monkeypatch.setattr(plumbing.costs, "COSTS", type(plumbing.costs.COSTS)())
    measured, time_of = [], plumbing.costs.time_of
    monkeypatch.setattr(plumbing.costs, "time_of", lambda *args: measured.append(1) or time_of(*args))
    expected = each_alone(model, PROMPTS, EOT, config)
    for _ in range(2):                                            # measuring changes no text
        same_texts(speculate.generate(model, PROMPTS, EOT, config), expected)
        n = len(measured)
    speculate.generate(model, PROMPTS, EOT, config)
    assert len(measured) == n > 2
    for trunk, path, operation in plumbing.costs.COSTS[model].values():
        assert 0 < operation < trunk < 1 and [n for n, _ in path] == sorted({n for n, _ in path})
        assert all(0 < seconds < 1 for _, seconds in path)
