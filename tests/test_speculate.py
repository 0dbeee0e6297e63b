"""speculate.py against plain decoding, one prompt at a time: the same text, the same path calls at its tokens."""
import dataclasses
from contextlib import contextmanager

import pytest
import torch
from helpers import EOT, SETTINGS, Naive, wild_pair
from hypothesis import given
from hypothesis import strategies as st
from test_decode import GROUPS, IDS, PAIR, PROMPTS, ROWS, SEARCH, configs, each_alone, random_pair, same_texts

import speculate
from decode import DecodingConfig
from speculate import generate


@pytest.fixture(scope="module")
def model():
    return wild_pair()


@contextmanager
def sizes(K, W):
    """Drafts of K tokens and windows of W evaluations, instead of those that are quickest on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculate, "measure_costs", lambda *args: None)
        patch.setattr(speculate, "choose_sizes", lambda *args: (K, W))
        yield


# --------------------------------------------------------------------------------------------- the same texts
def changes_of(token):
    """The evaluations, by number, whose guess is not that of the one before, in the trace of a token."""
    guesses = [guess for _, guess, _ in token]
    return [e for e in range(1, len(guesses)) if guesses[e] != guesses[e - 1]]


@SEARCH
@given(pair=PAIR, config=configs(draft=st.integers(0, 16), ahead=st.integers(0, 40)), rows=ROWS,
       eot=st.integers(-1, 12))
def test_speculation_changes_no_token(pair, config, rows, eot):
    """Nor a path call at the tokens kept, nor the trace; whatever the pair, the prompts and the setting."""
    model, (prompts, group, ids) = random_pair(*pair), map(list, zip(*rows))
    expected = each_alone(model, prompts, eot, config, group, ids, trace=True)
    with sizes(max(1, config.draft), max(1, config.ahead)):       # the longest drafts and windows allowed
        outputs = generate(model, prompts, eot, config, group, ids, trace=True)
    same_texts(outputs, expected)
    for output, one in zip(outputs, expected):
        assert output.computed >= output.nfe and output.rounds <= one.rounds
        if config.steps > 1 and not config.temperature and config.guess != "sample" and config.draft:
            changed = [n for n, token in enumerate(output.trace) if token[0][1] != token[-1][1]]
            assert output.rejected == changed
        if speculate.can_look_ahead(config) and config.guidance == 1 and config.steps > 1:
            assert output.changes == sum(len(changes_of(token)) for token in output.trace)


@pytest.mark.parametrize("setting", ["trunk sampled", "temperature", "sampled guesses", "sampled adaptive",
                                     "sampled stop", "guidance stop", "heun to 1"])
def test_rejected_tokens_are_those_where_the_path_overrules_the_trunk(model, setting):
    """By the naive Algorithm 1, for a ragged batch with groups."""
    config = DecodingConfig(max_new_tokens=6, draft=4, seed=4, **SETTINGS[setting])
    with sizes(4, 3):
        outputs = generate(model, PROMPTS, EOT, config, GROUPS, IDS)
    for output, prompt, group, id in zip(outputs, PROMPTS, GROUPS, IDS):
        naive = Naive(model, config, group)
        tokens, ended, calls = naive.generate(prompt, id)
        assert (output.tokens, output.ended, output.nfe) == (tokens, ended, sum(calls))
        assert output.rejected == (naive.differ if config.steps > 1 else [])


@pytest.mark.parametrize("setting", ["midpoint odd", "fixed_point late", "sampled guesses", "guidance adaptive"])
def test_the_order_of_a_ragged_batch_does_not_matter(model, setting):
    config = DecodingConfig(max_new_tokens=8, draft=8, seed=1, **SETTINGS[setting])
    together = generate(model, PROMPTS, EOT, config, GROUPS)
    order = [3, 0, 4, 1, 2]
    shuffled = generate(model, [PROMPTS[i] for i in order], EOT, config, [GROUPS[i] for i in order], order)
    same_texts([shuffled[order.index(i)] for i in range(5)], together)
    assert generate(model, PROMPTS, EOT, dataclasses.replace(config, seed=2), GROUPS) != together


def test_many_rows_are_each_alone(model):
    prompts = [[i % 29, (7 * i) % 29] for i in range(150)]
    config = DecodingConfig(steps=4, max_new_tokens=4, draft=8)
    together = generate(model, prompts, EOT, config)
    some = [0, 77, 149]
    same_texts([together[i] for i in some], each_alone(model, [prompts[i] for i in some], EOT, config, ids=some))


@pytest.mark.parametrize("more", [dict(steps=1, draft=16), dict(steps=6, draft=0, ahead=0)])
@pytest.mark.parametrize("rows", [1, 5])
def test_without_speculation_every_token_takes_a_round(model, more, rows):
    config = DecodingConfig(max_new_tokens=6, **more)
    outputs = generate(model, PROMPTS[:rows], EOT, config, GROUPS[:rows], IDS[:rows])
    same_texts(outputs, each_alone(model, PROMPTS[:rows], EOT, config, GROUPS[:rows], IDS[:rows]))
    assert all(o.rounds == o.predicted and o.computed == o.nfe and o.rejected == [] for o in outputs)


# ------------------------------------------------------------------------------------------------- the ends
@pytest.mark.parametrize("setting", ["euler", "temperature", "fixed_point", "midpoint odd"])
def test_an_end_of_text_inside_a_draft_ends_it(model, setting):
    """The token most often written is made the end of text: what follows it in the draft is never kept."""
    config = DecodingConfig(max_new_tokens=9, draft=9, **SETTINGS[setting])
    written = [t for o in each_alone(model, PROMPTS, -1, config, GROUPS) for t in o.tokens]
    eot = max(set(written), key=written.count)
    with sizes(9, 3):
        outputs = generate(model, PROMPTS, eot, config, GROUPS)
    same_texts(outputs, each_alone(model, PROMPTS, eot, config, GROUPS))
    assert sum(o.ended for o in outputs) > 1 and not any(eot in o.tokens for o in outputs)


def test_rows_that_end_leave_the_batch(model, monkeypatch):
    config = DecodingConfig(steps=4, max_new_tokens=8)
    free = each_alone(model, PROMPTS, -1, config, GROUPS)
    tokens = [t for o in free for t in o.tokens]
    eot = max(set(tokens), key=tokens.count)
    n_rows, forward = [], model.trunk.forward
    monkeypatch.setattr(model.trunk, "forward", lambda idx, *args: n_rows.append(len(idx)) or forward(idx, *args))
    with sizes(3, 2):
        generate(model, PROMPTS, eot, config, GROUPS)
    assert n_rows == sorted(n_rows, reverse=True) and n_rows[-1] < len(PROMPTS)


def test_a_row_is_cut_where_the_trunks_positions_end(model):
    prompts, config = [[1] * 24, [2] * 20, [3, 4]], DecodingConfig(steps=3, max_new_tokens=30, draft=16)
    with sizes(16, 2):
        outputs = generate(model, prompts, -1, config)
    assert [len(o.tokens) for o in outputs] == [1, 5, 23] and not any(o.ended for o in outputs)
    same_texts(outputs, each_alone(model, prompts, -1, config))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6, 11])
def test_max_new_tokens_ends_a_row_inside_a_draft(model, n):
    config = DecodingConfig(steps=4, max_new_tokens=n, draft=5)
    with sizes(5, 2):
        outputs = generate(model, PROMPTS, -1, config, GROUPS)
    same_texts(outputs, each_alone(model, PROMPTS, -1, config, GROUPS))
    assert all(o.predicted == len(o.tokens) == n and o.nfe == 3 * n for o in outputs)


# ------------------------------------------------------------------------------------------------- what it costs
@pytest.mark.parametrize("ahead", [0, 1000])
def test_a_path_that_agrees_with_the_trunk_keeps_whole_drafts(ahead):
    """Then a text takes few rounds, and nothing is thrown away. Its guesses stay: a window holds all of a token."""
    pair = wild_pair(path_init="paper")
    with torch.no_grad():
        for p in pair.path.w.parameters():                        # w_d = 0: the trunk's logits
            p.zero_()
    config = DecodingConfig(steps=5, max_new_tokens=20, ahead=ahead)
    with sizes(10, 4):
        (output,) = generate(pair, [[3, 1]], -1, config)
    (plain,) = each_alone(pair, [[3, 1]], -1, DecodingConfig(steps=1, max_new_tokens=20))
    assert output.tokens == plain.tokens and output.rejected == [] and output.rounds == 2
    assert output.nfe == output.computed == 4 * 20 and output.changes == 0
    assert output.passes == (2 if ahead else 2 * 4)


@pytest.mark.parametrize("setting", ["euler", "midpoint odd", "fixed_point", "heun to 1", "guidance"])
def test_a_rejected_draft_costs_what_was_computed_behind_it(model, monkeypatch, setting):
    """By hand, from the lengths of the rounds: one after another, every position of a round has all path calls."""
    lengths, refine = [], speculate.refine
    def counted(model, rows, draft, *rest):
        lengths.append(int(draft.valid.sum()))
        return refine(model, rows, draft, *rest)
    monkeypatch.setattr(speculate, "refine", counted)
    config = DecodingConfig(max_new_tokens=15, draft=8, ahead=0, **SETTINGS[setting])
    with sizes(8, 1):
        (output,) = generate(model, [PROMPTS[0]], -1, config)
    n_calls = output.nfe // 15
    assert output.computed == n_calls * sum(lengths) > output.nfe == n_calls * 15
    assert output.rounds == len(lengths) < 15 and output.passes == n_calls * len(lengths)


@pytest.mark.parametrize("setting", ["two", "euler", "many", "midpoint odd", "heun to 1", "fixed_point",
                                     "sampled guesses"])
@pytest.mark.parametrize("W", [1, 3, 100])
def test_a_token_takes_one_call_a_window_and_one_more_for_each_change(model, setting, W):
    """By hand, from the guesses of plain decoding: W evaluations a call, and those behind a change are lost."""
    config = DecodingConfig(max_new_tokens=10, draft=0, **SETTINGS[setting])
    (plain,) = each_alone(model, [PROMPTS[0]], -1, config, trace=True)
    calls, computed = 0, 0
    for token in plain.trace:
        known = 1
        while known < len(token):
            end = min(known + W, len(token))
            calls += 1
            computed += end - known
            changes = [e for e in changes_of(token) if known <= e < end]
            known = changes[0] + 1 if changes else end
    with sizes(1, W):
        (output,) = generate(model, [PROMPTS[0]], -1, config)
    assert (output.passes, output.computed, output.nfe) == (calls, computed, plain.nfe)
    assert W < 100 or setting in ("two", "sampled guesses") or calls < 0.7 * plain.nfe
