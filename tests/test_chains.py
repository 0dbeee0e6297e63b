"""experiments/chains.py: what is asked has the answer that following the shown links gives."""
import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments"))
import chains

import diffusion


def test_every_answer_is_the_end_of_the_chain_that_the_pairs_show():
    rng = random.Random(0)
    for most_links in (1, 3, 9):
        idx, (rows, columns), y, links = chains.batch(rng, 20, most_links)
        assert max(links) <= most_links
        for row, column, answer, n_links in zip(rows.tolist(), columns.tolist(), y.tolist(), links):
            tokens = idx[row].tolist()
            leads = dict(zip(tokens[0:30:3], tokens[1:30:3]))
            assert tokens[column] == chains.EQUALS and tokens[column - 2] == chains.LAST
            assert tokens[column + 1] == answer
            name, followed = tokens[column - 1], 0
            while leads[name] != name:
                name, followed = leads[name], followed + 1
            assert (name, followed) == (answer, n_links)


def test_blocks_applied_once_are_the_trunk():
    trunk, looped = chains.GPT(chains.TRUNK), chains.Looped(chains.TRUNK)
    looped.load_state_dict(trunk.state_dict())
    idx = torch.randint(0, 20, (2, 9))
    assert torch.equal(trunk(idx)[0], looped(idx)[0])
    looped.times = 2
    assert not torch.allclose(trunk(idx)[0], looped(idx)[0])


def test_training_and_test_ask_at_the_same_times():
    """The path is sampled at the times it was trained at, those of nll's sampler: t_hold, ..., t_hold, t_end."""
    sampler = diffusion.Sampler(steps=6, **chains.HOW)
    assert sampler == diffusion.Sampler(steps=6, solver="fixed_point", guess="mean")
    assert sampler.plan(torch.zeros(1, 4))[0] == [0, .5, .5, .5, .5, .9]


def test_an_interval_is_that_of_paired_sequences():
    a, b = [0, 4, 8, 4], [4, 4, 8, 8]                             # right answers of two seeds, of 8 a sequence
    mean, half = chains.interval(a, b, n_seeds=2)
    assert mean == pytest.approx(0.25) and half == pytest.approx(1.96 * (1 / 12) ** 0.5 / 2)
