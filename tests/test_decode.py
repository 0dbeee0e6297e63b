"""decode.py against the naive Algorithm 1, and drafts against no drafts: the same text, the same path calls."""
import copy
import dataclasses
import os
from functools import lru_cache

import pytest
import torch
from helpers import EOT, Naive, error_of, says, wild_pair
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_diffusion import SETTINGS, SOLVERS

import decode
from decode import HALF, Decoding, generate, next_length, row_noise
from model import L2D, GPTConfig

PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7], [9, 3], [1, 2, 3, 4]]
LABELS = [0, 1, 2, 3, 1]


@pytest.fixture(scope="module")
def model():
    return wild_pair()


def text_of(output):
    """What a draft must not change: all but what it cost."""
    trace = [[guess for _, guess, _ in token] for token in output.trace]
    return output.tokens, output.ended, output.predicted, output.nfe, output.rejected, trace


def same_texts(outputs, expected):
    """Of two lists of Generated; of their traces, times and probabilities to 1e-3."""
    assert list(map(text_of, outputs)) == list(map(text_of, expected))
    numbers = [[x for o in side for token in o.trace for t, _, p in token for x in (t, p)]
               for side in (outputs, expected)]
    assert numbers[0] == pytest.approx(numbers[1], abs=1e-3)


# ---------------------------------------------------------------------------- against the naive Algorithm 1
@pytest.mark.parametrize("setting", SETTINGS)
def test_generate_is_the_naive_algorithm_1(model, setting):
    """A ragged batch, cached, drafted or not, memoised, against each row alone; path calls included."""
    plain, ids = Decoding(max_new_tokens=6, draft=0, seed=4, **SETTINGS[setting]), [7, 0, 3, 11, 5]
    for config in (plain, dataclasses.replace(plain, draft=4)):
        outputs = generate(model, PROMPTS, EOT, config, LABELS, ids)
        if config is plain:
            naive = [Naive(model, config, label) for label in LABELS]
            texts = [n.generate(prompt, id) for n, prompt, id in zip(naive, PROMPTS, ids)]
        for output, one, (tokens, ended, calls) in zip(outputs, naive, texts, strict=True):
            assert (output.tokens, output.ended, output.nfe) == (tokens, ended, sum(calls))
            assert output.predicted == len(calls) == len(output.tokens) + output.ended
            assert output.rejected == one.differ                  # from what the trunk alone would have written
    if config.solver != "adaptive" and not config.stop:
        per_token = config.steps - 1 - (setting == "heun to 1")
        per_token = 2 * per_token - 1 if config.guidance != 1 else per_token
        assert all(o.nfe == per_token * o.predicted for o in outputs)


def test_these_settings_and_prompts_show_something(model):
    """The tests here would see little if diffusion changed nothing, or rows or settings agreed."""
    runs = [generate(model, PROMPTS, EOT, Decoding(max_new_tokens=6, seed=4, **s), LABELS)
            for s in SETTINGS.values()]
    assert len({tuple(tuple(o.tokens) for o in run) for run in runs}) > len(runs) - 6
    config = Decoding(steps=8, max_new_tokens=6, seed=4)
    traced = generate(model, PROMPTS, EOT, config, LABELS, trace=True)
    guesses = [len({guess for _, guess, _ in token}) for o in traced for token in o.trace]
    assert sum(n > 1 for n in guesses) > len(guesses) / 3
    assert any(o.ended for run in runs for o in run) and not all(o.ended for run in runs for o in run)
    rejected = sum(len(o.rejected) for o in traced)
    assert 0.2 < rejected / sum(o.predicted for o in traced) < 0.8


# ------------------------------------------------------------------------------------------------- drafts
@lru_cache
def random_pair(seed, n_layer):
    """A tiny pair whose path seldom agrees with its trunk; short, so that block_size is reached."""
    return wild_pair(seed, GPTConfig(block_size=18, vocab_size=13, n_layer=n_layer, n_head=2, n_embd=16))


EXAMPLES = int(os.environ.get("DRAFT_EXAMPLES", 60))              # more of them: another, random search
HOW = st.fixed_dictionaries({}, optional=dict(
    solver=st.sampled_from([*SOLVERS, "adaptive"]), guess=st.sampled_from(["argmax", "sample", "mean"]),
    temperature=st.sampled_from([0.0, 0.7, 1.5]), top_k=st.integers(0, 5), guidance=st.sampled_from([1.0, 2.5]),
    stop=st.sampled_from([0.0, 0.3, 0.8]), t_end=st.sampled_from([0.0, 0.8, 1.0])))
PROMPT = st.lists(st.integers(0, 12), min_size=1, max_size=10)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES == 60, suppress_health_check=[HealthCheck.too_slow])
@given(pair=st.tuples(st.integers(1, 6), st.integers(1, 2)), how=HOW, steps=st.integers(1, 7),
       rows=st.lists(st.tuples(PROMPT, st.integers(0, 3), st.integers(0, 50)), min_size=1, max_size=5),
       draft=st.integers(1, 16), n=st.integers(1, 14), seed=st.integers(0, 3), eot=st.integers(-1, 12))
def test_drafts_change_no_token(pair, how, steps, rows, draft, n, seed, eot):
    """Nor any count of path calls at the tokens kept, nor the trace; whatever the model, prompts and setting."""
    model, (prompts, label, ids) = random_pair(*pair), map(list, zip(*rows))
    how = how if how.get("temperature") else how | {"top_k": 0}
    plain = Decoding(steps=steps, max_new_tokens=n, draft=0, seed=seed, **how)
    drafted = dataclasses.replace(plain, draft=draft)
    expected = generate(model, prompts, eot, plain, label, ids, trace=True)
    outputs = generate(model, prompts, eot, drafted, label, ids, trace=True)
    same_texts(outputs, expected)
    for output, one, prompt in zip(outputs, expected, prompts):
        assert output.computed >= output.nfe and one.computed == one.nfe and one.rounds == one.predicted
        assert output.rounds <= one.rounds
        full = len(prompt) + len(output.tokens) > 18
        assert output.ended or output.predicted == n or full      # there is no other reason to stop
        assert output.predicted <= n and len(prompt) + output.predicted <= 19


@pytest.mark.parametrize("draft, setting", [(8, "trunk sampled"), (0, "euler"), (8, "midpoint odd"), (8, "fixed_point"),
                                            (8, "sampled guesses"), (0, "adaptive stop"), (8, "stop"),
                                            (8, "guidance adaptive")])
def test_a_ragged_batch_is_each_row_alone(model, setting, draft):
    config = Decoding(max_new_tokens=8, draft=draft, seed=1, **SETTINGS[setting])
    together = generate(model, PROMPTS, EOT, config, LABELS)
    order = [3, 0, 4, 1, 2]
    shuffled = generate(model, [PROMPTS[i] for i in order], EOT, config, [LABELS[i] for i in order], order)
    for i, output in enumerate(together):
        (alone,) = generate(model, [PROMPTS[i]], EOT, config, [LABELS[i]], [i])
        assert text_of(output) == text_of(alone) == text_of(shuffled[order.index(i)])
    other_seed = dataclasses.replace(config, seed=2)              # the noise is the row's own
    assert generate(model, PROMPTS, EOT, other_seed, LABELS) != together
    assert generate(model, PROMPTS, EOT, config, LABELS, [9, 8, 7, 6, 5]) != together


def test_many_rows_are_each_row_alone(model):
    prompts = [[i % 29, (7 * i) % 29] for i in range(150)]
    config = Decoding(steps=4, max_new_tokens=4, draft=8)
    together = generate(model, prompts, EOT, config)
    for i in (0, 77, 149):
        assert text_of(generate(model, [prompts[i]], EOT, config, ids=[i])[0]) == text_of(together[i])


def test_an_end_of_text_inside_a_draft_ends_it(model):
    """The token most often written is made the end of text: what follows it in the draft is never kept."""
    for setting in ("euler", "temperature", "fixed_point"):
        free = Decoding(max_new_tokens=9, draft=9, **SETTINGS[setting])
        written = [t for o in generate(model, PROMPTS, -1, free, LABELS) for t in o.tokens]
        eot = max(set(written), key=written.count)
        plain = generate(model, PROMPTS, eot, dataclasses.replace(free, draft=0), LABELS)
        outputs = generate(model, PROMPTS, eot, free, LABELS)
        assert list(map(text_of, outputs)) == list(map(text_of, plain))
        assert sum(o.ended for o in outputs) > 1 and not any(eot in o.tokens for o in outputs)


def test_a_path_that_agrees_with_the_trunk_keeps_whole_drafts(model):
    """Then a text takes few rounds and nothing computed is thrown away but behind the end."""
    pair = wild_pair()
    with torch.no_grad():
        for p in pair.path.w.parameters():
            p.zero_()
    pair.path.config = dataclasses.replace(pair.path.config, w_init=0.0)          # w_d = 0: the trunk's logits
    (output,) = generate(pair, [[3, 1]], -1, Decoding(steps=5, max_new_tokens=20, draft=16))
    (plain,) = generate(pair, [[3, 1]], -1, Decoding(steps=1, max_new_tokens=20))
    assert output.tokens == plain.tokens and output.rejected == [] and output.rounds <= 3
    assert output.nfe == output.computed == 4 * 20


def test_a_rejected_draft_costs_what_was_computed_behind_it(model):
    """By hand, from the lengths of the rounds: every position of a round has T - 1 path calls."""
    lengths, refine = [], decode.refine
    def counted(model, rows, draft, *rest):
        lengths.append(int(draft.valid.sum()))
        return refine(model, rows, draft, *rest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "refine", counted)
        (output,) = generate(model, [PROMPTS[0]], -1, Decoding(steps=6, max_new_tokens=15, draft=8))
    assert output.computed == 5 * sum(lengths) > output.nfe == 5 * 15
    assert output.rounds == len(lengths) < 15


def written(rows, tokens, rejected, calls=15):
    """What next_length looks at, of `rows` rows."""
    return [decode.Generated(predicted=tokens, nfe=calls * tokens, rejected=list(range(rejected)))] * rows


def test_the_next_draft_has_the_length_of_the_least_expected_time():
    """The expectation by enumerating where a draft's first rejected token lies, for a share of 0.8."""
    def time_per_token(K):
        share = [0.2 * 0.8 ** j for j in range(K)] + [0.8 ** K]                   # rejected at j, or not at all
        kept = sum(p * min(j + 1, K) for j, p in enumerate(share))
        return (K * (1 + 1 / HALF) + 15 * (1 + K / HALF)) / kept
    n = 10 ** 4                                                                   # the ten assumed vanish
    assert next_length(written(1, n, n // 5), Decoding()) == min(range(1, 17), key=time_per_token)


def test_drafts_are_longer_where_more_was_kept_and_shorter_where_positions_or_trunk_passes_are_dear():
    config = Decoding(draft=16)
    assert next_length(written(1, 0, 0), config) > 4                              # nothing known yet
    good, bad = next_length(written(1, 100, 1), config), next_length(written(1, 100, 60), config)
    assert 1 < bad < good == 16
    assert next_length(written(64, 100, 40), config) == 1                         # arithmetic binds: drafts only waste
    assert next_length(written(1, 100, 8, calls=1), config) < next_length(written(1, 100, 8), config)
    for draft in (0, 1):
        assert next_length(written(2, 9, 0), Decoding(draft=draft)) == 1


def test_plain_decoding_drafts_nothing(model):
    outputs = generate(model, PROMPTS, EOT, Decoding(steps=1, max_new_tokens=6, draft=16))
    assert all(o.rounds == o.predicted and o.computed == o.nfe == 0 and o.rejected == [] for o in outputs)


# --------------------------------------------------------------------------------------------- T = 1, labels
def test_one_step_is_the_trunk_and_never_asks_the_path(monkeypatch):
    model = wild_pair()
    def refuse(*args, **kwargs):
        raise AssertionError("the path was asked")
    for name in ("forward", "condition", "token_space"):
        monkeypatch.setattr(model.path, name, refuse)
    outputs = generate(model, PROMPTS, EOT, Decoding(steps=1, max_new_tokens=8), LABELS)
    for prompt, output in zip(PROMPTS, outputs):
        ids = list(prompt)
        for _ in range(8):
            y = model.trunk.head(model.trunk(torch.tensor([ids]))[0])[0, -1].argmax().item()
            if y == EOT:
                break
            ids.append(y)
        assert output.tokens == ids[len(prompt):] and output.nfe == 0
    alone = generate(L2D(model.trunk), PROMPTS, EOT, Decoding(steps=1, max_new_tokens=8))
    assert alone == outputs
    with pytest.raises(AssertionError, match="the path was asked"):
        generate(model, PROMPTS, EOT, Decoding(steps=2))
    with pytest.raises(AssertionError, match="without a path"):
        generate(L2D(model.trunk), PROMPTS, EOT, Decoding(steps=2))


def test_no_label_is_the_last_index(model):
    config = Decoding(steps=5, max_new_tokens=5)
    none = generate(model, PROMPTS, EOT, config)
    assert none == generate(model, PROMPTS, EOT, config, [3] * 5)
    assert none != generate(model, PROMPTS, EOT, config, [0] * 5)


def test_one_label_for_all_rows_gives_what_it_gives_among_others(model):
    config = Decoding(steps=5, max_new_tokens=5)
    same = generate(model, PROMPTS, EOT, config, [2] * 5)
    mixed = generate(model, PROMPTS, EOT, config, [2, 0, 2, 1, 2])
    assert [text_of(same[i]) for i in (0, 2, 4)] == [text_of(mixed[i]) for i in (0, 2, 4)]


# ------------------------------------------------------------------------------------------------- the ends
@pytest.mark.parametrize("draft", [0, 3])
def test_rows_that_end_leave_the_batch(monkeypatch, draft):
    """With the most frequent token as end of text, rows end at different times; the trunk sees the others."""
    model = wild_pair()
    free = generate(model, PROMPTS, -1, Decoding(steps=4, max_new_tokens=8), LABELS)
    tokens = [t for o in free for t in o.tokens]
    eot = max(set(tokens), key=tokens.count)
    sizes, forward = [], model.trunk.forward
    monkeypatch.setattr(model.trunk, "forward", lambda idx, *args: sizes.append(len(idx)) or forward(idx, *args))
    outputs = generate(model, PROMPTS, eot, Decoding(steps=4, max_new_tokens=8, draft=draft), LABELS)
    cut = [o.tokens.index(eot) if eot in o.tokens else 8 for o in free]
    assert len(set(cut)) > 2
    for o, f, c in zip(outputs, free, cut):
        assert o.tokens == f.tokens[:c] and o.ended == (c < 8) and o.predicted == min(c + 1, 8)
    if draft == 0:
        assert sizes == [sum(c >= n for c in cut) for n in range(8) if any(c >= n for c in cut)]
    else:
        assert sizes == sorted(sizes, reverse=True) and sizes[-1] < len(PROMPTS)


@pytest.mark.parametrize("draft", [0, 16])
def test_a_row_is_cut_where_block_size_is_reached(model, draft):
    prompts, config = [[1] * 24, [2] * 20, [3, 4]], Decoding(steps=3, max_new_tokens=30, draft=draft)
    outputs = generate(model, prompts, -1, config)
    assert [len(o.tokens) for o in outputs] == [1, 5, 23] and not any(o.ended for o in outputs)
    for i in range(3):
        assert text_of(generate(model, prompts[i:i + 1], -1, config, ids=[i])[0]) == text_of(outputs[i])


def test_max_new_tokens_ends_a_row_inside_a_draft(model):
    for n in (1, 2, 3, 5, 6, 11):
        config = Decoding(steps=4, max_new_tokens=n, draft=5)
        drafted, plain = (generate(model, PROMPTS, -1, dataclasses.replace(config, draft=k), LABELS) for k in (5, 0))
        assert [o.tokens for o in drafted] == [o.tokens for o in plain]
        assert all(o.predicted == len(o.tokens) == n and o.nfe == 3 * n for o in drafted)


def test_the_noise_of_a_row_is_the_same_for_every_number_of_steps():
    """Else T = 2 and T = 16 would not be compared on the same noise."""
    draws = [row_noise([3, 5], Decoding(steps=steps, max_new_tokens=6, seed=7), 4, "cpu") for steps in (1, 2, 16)]
    for x_0, u in draws:
        assert torch.equal(x_0, draws[0][0]) and torch.equal(u[:, :, 0], draws[0][1][:, :, 0])
    assert not torch.equal(draws[0][0][0], draws[0][0][1]) and u.shape == (2, 6, 17)
    far = row_noise([0], Decoding(seed=10 ** 15), 4, "cpu")       # whose product with a prime leaves 64 bits
    assert not torch.equal(far[0], row_noise([0], Decoding(), 4, "cpu")[0])


# --------------------------------------------------------------------------------------------- trace, stop
@pytest.mark.parametrize("draft", [0, 6])
def test_the_trace_has_an_entry_for_every_evaluation(model, draft):
    for setting in ("trunk", "euler", "midpoint", "heun", "fixed_point", "adaptive", "stop"):
        config = Decoding(max_new_tokens=6, draft=draft, seed=4, **SETTINGS[setting])
        for o in generate(model, PROMPTS, EOT, config, LABELS, trace=True):
            assert len(o.trace) == o.predicted
            assert sum(len(token) - 1 for token in o.trace) == o.nfe      # the first is the trunk's, and free
            for token, y in zip(o.trace, o.tokens + [EOT]):
                times = [t for t, _, _ in token]
                assert times[0] == 0 and token[-1][1] == y and all(0 < p <= 1 for _, _, p in token)
                assert setting == "adaptive" or times == sorted(times)
            changed = [n for n, token in enumerate(o.trace) if token[0][1] != token[-1][1]]
            assert o.rejected == changed                          # greedy: where the trunk's guess did not stand
    assert not generate(model, PROMPTS, EOT, Decoding(steps=3, max_new_tokens=2))[0].trace


def test_stopping_early_saves_path_calls(model):
    def run(stop):
        return generate(model, PROMPTS, -1, Decoding(steps=12, max_new_tokens=8, draft=4, stop=stop), LABELS)
    calls = [sum(o.nfe for o in outputs) for outputs in (run(0.0), run(0.2), run(0.99))]
    assert calls[0] == 11 * 8 * 5 and calls[0] > calls[1] > calls[2] >= 8 * 5


# -------------------------------------------------------------------------------------- precision, settings
def test_half_precision_keeps_the_state_in_float32(monkeypatch):
    half, seen = copy.deepcopy(wild_pair()).to(torch.bfloat16), []
    forward = half.path.forward
    def looked_at(x_t, t, *args):
        seen.append((x_t.dtype, t.dtype))
        return forward(x_t, t, *args)
    monkeypatch.setattr(half.path, "forward", looked_at)
    for solver in (*SOLVERS, "adaptive"):
        config = Decoding(steps=6, max_new_tokens=3, solver=solver, guidance=2.0)
        assert all(o.predicted for o in generate(half, PROMPTS, EOT, config, LABELS))
    assert set(seen) == {(torch.float32, torch.float32)}


@pytest.mark.parametrize("wrong", [dict(max_new_tokens=0), dict(draft=-1), dict(seed=-1), dict(steps=0)])
def test_settings_out_of_range_are_refused(wrong):
    ((name, value),) = wrong.items()
    says(error_of(Decoding, **wrong), f"{name}={value}", "at least")
