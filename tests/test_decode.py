"""decode.py: one prompt in the plain way against the naive Algorithm 1, then batches against one prompt alone."""
import copy
import dataclasses
import os
from functools import lru_cache

import pytest
import torch
from helpers import EOT, SETTINGS, SOLVERS, Naive, error_of, example, generator, says, wild_pair
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from decode import (
    Cache,
    DecodingConfig,
    denoiser_class,
    draw_noise,
    generate_batch,
    generate_one,
    predict_given,
)
from diffusion import SamplerConfig
from model import L2D, GPTConfig

PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7], [9, 3], [1, 2, 3, 4]]
GROUPS = [0, 1, 2, 3, 1]
IDS = [7, 0, 3, 11, 5]


@pytest.fixture(scope="module")
def model():
    return wild_pair()


def text_of(output):
    """What no way of decoding may change: all but what it cost."""
    trace = [[guess for _, guess, _ in token] for token in output.trace]
    return output.tokens, output.ended, output.predicted, output.nfe, trace


def same_texts(outputs, expected):
    """Of two lists of Continuations; of their traces, times and probabilities to 1e-3."""
    assert list(map(text_of, outputs)) == list(map(text_of, expected))
    numbers = [[x for o in side for token in o.trace for t, _, p in token for x in (t, p)]
               for side in (outputs, expected)]
    assert numbers[0] == pytest.approx(numbers[1], abs=1e-3)


def each_alone(model, prompts, eot, config, group=None, ids=None, trace=False):
    """What generate_one writes for each prompt: the truth for all that write several at once."""
    group = group or [None] * len(prompts)
    ids = ids or range(len(prompts))
    denoise = denoiser_class(config)
    return [generate_one(model, *one, trace, denoise=denoise) for one in zip(
        prompts, [eot] * len(prompts), [config] * len(prompts), group, ids, strict=True)]


# ------------------------------------------------------------------------------------------- the plain way
@pytest.mark.parametrize("setting", SETTINGS)
def test_generate_one_is_the_naive_algorithm_1(model, setting):
    """With a cache and tables of conditions, against neither; path calls included."""
    config = DecodingConfig(max_new_tokens=6, seed=4, **SETTINGS[setting])
    for prompt, group, id in list(zip(PROMPTS, GROUPS, IDS))[1:4]:               # the last without a group
        output = generate_one(model, prompt, EOT, config, group, id, denoise=denoiser_class(config))
        tokens, ended, calls = Naive(model, config, group).generate(prompt, id)
        assert (output.tokens, output.ended, output.nfe) == (tokens, ended, sum(calls))
        assert output.predicted == len(calls) == len(output.tokens) + output.ended == output.rounds
        assert output.computed == output.nfe and output.rejected == output.trace == []
        if config.solver != "adaptive" and not config.stop:
            per_token = config.steps - 1 - (setting == "heun to 1")
            per_token = 2 * per_token - 1 if config.guidance != 1 else per_token
            assert output.nfe == per_token * output.predicted


def test_these_settings_and_prompts_show_something(model):
    """The tests here would see little if diffusion changed nothing, or rows or settings agreed."""
    runs = [generate_batch(model, PROMPTS, EOT, DecodingConfig(max_new_tokens=6, seed=4, **s), GROUPS)
            for s in SETTINGS.values()]
    assert len({tuple(tuple(o.tokens) for o in run) for run in runs}) > len(runs) - 6
    config = DecodingConfig(steps=8, max_new_tokens=6, seed=4)
    traced = each_alone(model, PROMPTS, EOT, config, GROUPS, trace=True)
    guesses = [[guess for _, guess, _ in token] for o in traced for token in o.trace]
    assert sum(len(set(token)) > 1 for token in guesses) > len(guesses) / 3
    assert any(o.ended for run in runs for o in run) and not all(o.ended for run in runs for o in run)
    differ = sum(token[0] != token[-1] for token in guesses)      # from what the trunk would have written
    assert 0.2 < differ / len(guesses) < 0.8


def test_one_step_is_the_trunk_and_never_calls_the_path(monkeypatch):
    model = wild_pair()
    def refuse(*args, **kwargs):
        raise AssertionError("the path was asked")
    for name in ("forward", "condition", "token_space"):
        monkeypatch.setattr(model.path, name, refuse)
    config = DecodingConfig(steps=1, max_new_tokens=8)
    outputs = each_alone(model, PROMPTS, EOT, config, GROUPS, trace=True)
    for prompt, output in zip(PROMPTS, outputs):
        ids = list(prompt)
        for _ in range(8):
            y = model.trunk.head(model.trunk(torch.tensor([ids]))[0])[0, -1].argmax().item()
            if y == EOT:
                break
            ids.append(y)
        assert output.tokens == ids[len(prompt):] and output.nfe == 0
        assert all(len(token) == 1 for token in output.trace)
    same_texts(generate_batch(model, PROMPTS, EOT, config, GROUPS, trace=True), outputs)
    alone = L2D(model.trunk)                                      # a pair without a path
    same_texts(each_alone(alone, PROMPTS, EOT, config, trace=True), outputs)
    same_texts(generate_batch(alone, PROMPTS, EOT, config, trace=True), outputs)
    two = DecodingConfig(steps=2)
    with pytest.raises(AssertionError, match="the path was asked"):
        generate_one(model, PROMPTS[0], EOT, two)
    with pytest.raises(AssertionError, match="without a path"):
        generate_one(alone, PROMPTS[0], EOT, two)
    with pytest.raises(AssertionError, match="without a path"):
        generate_batch(alone, PROMPTS, EOT, two)


def test_a_cache_keeps_what_is_in_it_while_it_grows():
    g = generator()
    kv = [tuple(torch.randn(2, 3, 5, 4, generator=g) for _ in "kv") for _ in range(2)]
    cache = Cache(kv)
    for S in (5, 3, 6, 7, 14, 40):
        first = cache.first(S)
        n = min(S, 5)
        for got, expected in zip(first, kv, strict=True):
            for z, w in zip(got, expected, strict=True):
                assert z.shape == (2, 3, S, 4) and torch.equal(z[:, :, :n], w[:, :, :n])
    cache.first(41)[1][0][:, :, 40] = 7.0                         # what is written into a view stays
    assert (cache.first(41)[1][0][:, :, 40] == 7).all()
    cache.keep(torch.tensor([1]))
    assert torch.equal(cache.first(5)[0][1], kv[0][1][1:])


# --------------------------------------------------------------------------------- a batch is each prompt alone
@lru_cache
def random_pair(seed, n_layer, strength=None):
    """A tiny pair whose path seldom agrees with its trunk; short, so that block_size is reached.

    strength: of the path's weight w_d. 0.01 lets guesses stay, but for a few.
    """
    config = GPTConfig(block_size=18, vocab_size=13, n_layer=n_layer, n_head=2, n_embd=16)
    pair = wild_pair(seed, config, path_init="paper" if strength else "trunk")
    for p in pair.path.w.parameters() if strength else ():
        p.data *= strength ** 0.5                                 # of two layers
    return pair


EXAMPLES = int(os.environ.get("DRAFT_EXAMPLES", 60))              # more of them: another, random search
SEARCH = settings(max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES == 60,
                  suppress_health_check=[HealthCheck.too_slow])
PAIR = st.tuples(st.integers(1, 6), st.integers(1, 2), st.sampled_from([None, 0.3, 0.1]))
STEPS = st.sampled_from([*range(1, 8), 16, 40])
ROWS = st.lists(st.tuples(st.lists(st.integers(0, 12), min_size=1, max_size=10), st.integers(0, 3),
                          st.integers(0, 50)), min_size=1, max_size=5)


@st.composite
def configs(draw, **more):
    """A DecodingConfig of any solver and option."""
    options = draw(st.fixed_dictionaries(dict(steps=STEPS, max_new_tokens=st.integers(1, 14),
                                              seed=st.integers(0, 3), **more), optional=dict(
        solver=st.sampled_from([*SOLVERS, "adaptive"]), guess=st.sampled_from(["argmax", "sample", "mean"]),
        temperature=st.sampled_from([0.0, 0.7, 1.5]), top_k=st.integers(0, 5), t_end=st.sampled_from([0.0, 0.8, 1.0]),
        stop=st.sampled_from([0.0, 0.3, 0.8]), guidance=st.sampled_from([1.0, 2.5]))))
    if not options.get("temperature"):
        options.pop("top_k", None)                                # which would do nothing
    if options["steps"] > 7:
        options["max_new_tokens"] = min(3, options["max_new_tokens"])             # for the time that it takes
    return DecodingConfig(**options)


@SEARCH
@given(pair=PAIR, config=configs(), rows=ROWS, eot=st.integers(-1, 12))
def test_a_batch_of_any_prompts_is_each_alone(pair, config, rows, eot):
    model, (prompts, group, ids) = random_pair(*pair), map(list, zip(*rows))
    expected = each_alone(model, prompts, eot, config, group, ids, trace=True)
    outputs = generate_batch(model, prompts, eot, config, group, ids, trace=True)
    same_texts(outputs, expected)
    for output, one, prompt in zip(outputs, expected, prompts):
        assert (output.computed, output.rounds) == (one.computed, one.rounds) == (one.nfe, one.predicted)
        full = len(prompt) + len(output.tokens) > 18
        assert output.ended or output.predicted == config.max_new_tokens or full     # no other reason to stop
        assert output.predicted <= config.max_new_tokens and len(prompt) + output.predicted <= 19


@pytest.mark.parametrize("setting", ["trunk sampled", "euler", "midpoint odd", "fixed_point late", "sampled guesses",
                                     "adaptive stop", "guidance adaptive", "guidance stop"])
def test_a_ragged_batch_is_each_prompt_alone_in_any_order(model, setting):
    config = DecodingConfig(max_new_tokens=6, seed=4, **SETTINGS[setting])
    expected = each_alone(model, PROMPTS, EOT, config, GROUPS, IDS)
    same_texts(generate_batch(model, PROMPTS, EOT, config, GROUPS, IDS), expected)
    order = [3, 0, 4, 1, 2]
    prompts, group, ids = ([column[i] for i in order] for column in (PROMPTS, GROUPS, IDS))
    same_texts(generate_batch(model, prompts, EOT, config, group, ids), [expected[i] for i in order])


@pytest.mark.parametrize("setting", ["trunk sampled", "euler", "sampled guesses"])
def test_a_text_has_noise_of_its_own(model, setting):
    """By the seed and its id; nothing else of the batch matters."""
    config = DecodingConfig(max_new_tokens=8, seed=1, **SETTINGS[setting])
    texts = [generate_batch(model, PROMPTS, EOT, dataclasses.replace(config, seed=seed), GROUPS, ids)
             for seed, ids in ((1, None), (1, [0, 1, 2, 3, 4]), (2, None), (1, [9, 8, 7, 6, 5]))]
    assert texts[0] == texts[1] and texts[0] != texts[2] and texts[0] != texts[3] != texts[2]


def test_many_rows_are_each_alone(model):
    prompts = [[i % 29, (7 * i) % 29] for i in range(150)]
    config = DecodingConfig(steps=4, max_new_tokens=4)
    together = generate_batch(model, prompts, EOT, config)
    for i in (0, 77, 149):
        same_texts([together[i]], [generate_one(model, prompts[i], EOT, config, text_id=i)])


# ---------------------------------------------------------------------------------------------------- groups
def test_no_group_is_the_last_index(model):
    config = DecodingConfig(steps=5, max_new_tokens=5)
    none = generate_batch(model, PROMPTS, EOT, config)
    assert none == generate_batch(model, PROMPTS, EOT, config, [3] * 5)
    assert none != generate_batch(model, PROMPTS, EOT, config, [0] * 5)
    same_texts([generate_one(model, PROMPTS[0], EOT, config)], none[:1])


def test_one_group_for_all_rows_gives_what_it_gives_among_others(model):
    config = DecodingConfig(steps=5, max_new_tokens=5)
    same = generate_batch(model, PROMPTS, EOT, config, [2] * 5)
    mixed = generate_batch(model, PROMPTS, EOT, config, [2, 0, 2, 1, 2])
    same_texts([same[i] for i in (0, 2, 4)], [mixed[i] for i in (0, 2, 4)])


# ------------------------------------------------------------------------------------------------- the ends
def test_rows_that_end_leave_the_batch(monkeypatch):
    """With the most frequent token as end of text, rows end at different times; the trunk sees the others."""
    model = wild_pair()
    config = DecodingConfig(steps=4, max_new_tokens=8)
    free = each_alone(model, PROMPTS, -1, config, GROUPS)
    tokens = [t for o in free for t in o.tokens]
    eot = max(set(tokens), key=tokens.count)
    sizes, forward = [], model.trunk.forward
    monkeypatch.setattr(model.trunk, "forward", lambda idx, *args: sizes.append(len(idx)) or forward(idx, *args))
    outputs = generate_batch(model, PROMPTS, eot, config, GROUPS)
    cut = [o.tokens.index(eot) if eot in o.tokens else 8 for o in free]
    assert len(set(cut)) > 2
    for o, f, c in zip(outputs, free, cut):
        assert o.tokens == f.tokens[:c] and o.ended == (c < 8) and o.predicted == min(c + 1, 8)
    assert sizes == [sum(c >= n for c in cut) for n in range(8) if any(c >= n for c in cut)]


def test_a_row_is_cut_where_the_trunks_positions_end(model):
    """The last position still predicts a token. A prompt may fill all of them."""
    prompts, config = [[1] * 24, [2] * 20, [3, 4]], DecodingConfig(steps=3, max_new_tokens=30)
    alone = each_alone(model, prompts, -1, config)
    assert [len(o.tokens) for o in alone] == [1, 5, 23] and not any(o.ended for o in alone)
    same_texts(generate_batch(model, prompts, -1, config), alone)
    for prompt, output in zip(prompts, alone):
        naive = Naive(model, dataclasses.replace(config, max_new_tokens=24), 3, eot=-1)   # the same noise
        assert naive.generate(prompt, prompts.index(prompt))[0] == output.tokens


@pytest.mark.parametrize("n", [1, 2, 5])
def test_max_new_tokens_ends_a_text(model, n):
    config = DecodingConfig(steps=4, max_new_tokens=n)
    for outputs in (each_alone(model, PROMPTS, -1, config, GROUPS), generate_batch(model, PROMPTS, -1, config, GROUPS)):
        assert all(len(o.tokens) == o.predicted == n and o.nfe == 3 * n and not o.ended for o in outputs)


# -------------------------------------------------------------------------------------------- noise, trace, stop
def test_the_noise_of_a_text_is_the_same_for_every_number_of_steps(model):
    """Else T = 2 and T = 16 would not be compared on the same noise."""
    def draws(ids, steps, **more):
        return draw_noise(model, ids, DecodingConfig(steps=steps, max_new_tokens=6, seed=7, **more))
    x_0, u = draws([3, 5], 2)
    for steps, more in ((16, {}), (16, dict(guess="sample")), (2, dict(solver="adaptive"))):
        other = draws([3, 5], steps, **more)
        assert torch.equal(other[0], x_0) and torch.equal(other[1][:, :, :1], u)
        assert other[1].size(2) == (steps + 1 if more.get("guess") else 1)
    assert torch.equal(draws([3, 5], 1)[1], u)                    # nor do the choices of the plain trunk differ
    assert not torch.equal(x_0[0], x_0[1]) and torch.equal(draws([5], 2)[0][0], x_0[1])
    many = draw_noise(model, range(200), DecodingConfig(steps=2, max_new_tokens=20))
    assert abs(many[0].std() / 2 - 1) < 0.02 and abs(many[0].mean()) < 0.05      # sigma = 2
    assert abs(many[1].mean() - 0.5) < 0.02
    far = draw_noise(model, [0], DecodingConfig(steps=2, seed=10 ** 15))         # whose product leaves 64 bits
    assert not torch.equal(far[0], draw_noise(model, [0], DecodingConfig(steps=2))[0])


@pytest.mark.parametrize("setting", ["trunk", "euler", "midpoint", "heun", "fixed_point", "adaptive", "stop"])
def test_the_trace_has_an_entry_for_every_evaluation(model, setting):
    config = DecodingConfig(max_new_tokens=6, seed=4, **SETTINGS[setting])
    for o in each_alone(model, PROMPTS, EOT, config, GROUPS, trace=True):
        assert len(o.trace) == o.predicted
        assert sum(len(token) - 1 for token in o.trace) == o.nfe  # the first is the trunk's, and free
        for token, y in zip(o.trace, o.tokens + [EOT]):
            times = [t for t, _, _ in token]
            assert times[0] == 0 and token[-1][1] == y and all(0 < p <= 1 for _, _, p in token)
            assert setting == "adaptive" or times == sorted(times)


def test_stopping_early_saves_path_calls(model):
    def run(stop):
        return generate_batch(model, PROMPTS, -1, DecodingConfig(steps=12, max_new_tokens=8, stop=stop), GROUPS)
    calls = [sum(o.nfe for o in outputs) for outputs in (run(0.0), run(0.2), run(0.99))]
    assert calls[0] == 11 * 8 * 5 and calls[0] > calls[1] > calls[2] >= 8 * 5


# ------------------------------------------------------------------------------------------- texts that are known
@pytest.mark.parametrize("setting", ["trunk", "euler", "midpoint odd", "heun", "fixed_point", "adaptive", "guidance",
                                     "stop", "adaptive stop", "mean", "sampled guesses"])
def test_predict_given_is_the_naive_algorithm_1_at_every_target(model, setting):
    config, (idx, at, y, group) = SamplerConfig(**SETTINGS[setting]), example()
    logits, nfe = predict_given(model, idx, at, config, generator(), group)
    g, n = generator(), len(y)                                    # the same draws, in the same order
    x_0 = 2.0 * torch.randn(n, 8, generator=g) if config.steps > 1 else torch.zeros(n, 8)
    u = torch.rand(n, config.steps + 1, generator=g)
    for i, (row, k) in enumerate(zip(*(z.tolist() for z in at))):
        naive = Naive(model, config, group[row].item())
        expected = naive.predict(idx[row, :k + 1].tolist(), x_0[i], u[i])
        torch.testing.assert_close(logits[i], expected, atol=2e-3, rtol=2e-3)
        assert nfe[i] == naive.nfe


def test_predict_given_without_groups_means_no_group(model):
    idx, at, y, group = example()
    none = predict_given(model, idx, at, SamplerConfig(steps=4), generator())[0]
    last = predict_given(model, idx, at, SamplerConfig(steps=4), generator(), torch.full_like(group, 3))[0]
    torch.testing.assert_close(none, last, atol=1e-5, rtol=1e-5)


# -------------------------------------------------------------------------------------- precision, settings
def test_half_precision_keeps_the_state_in_float32(monkeypatch):
    half, seen = copy.deepcopy(wild_pair()).to(torch.bfloat16), []
    forward = half.path.forward
    def looked_at(x_t, t, *args):
        seen.append((x_t.dtype, t.dtype))
        return forward(x_t, t, *args)
    monkeypatch.setattr(half.path, "forward", looked_at)
    for solver in (*SOLVERS, "adaptive"):
        config = DecodingConfig(steps=6, max_new_tokens=3, solver=solver, guidance=2.0)
        assert all(o.predicted for o in generate_batch(half, PROMPTS, EOT, config, GROUPS))
    assert set(seen) == {(torch.float32, torch.float32)}


@pytest.mark.parametrize("wrong", [dict(max_new_tokens=0), dict(draft=-1), dict(seed=-1), dict(steps=0)])
def test_settings_out_of_range_are_refused(wrong):
    ((name, value),) = wrong.items()
    says(error_of(DecodingConfig, **wrong), f"{name}={value}", "at least")
