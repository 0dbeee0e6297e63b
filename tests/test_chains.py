"""experiments/chains.py: what is asked has the answer that following the shown links gives."""
import random
import sys
from pathlib import Path

import pytest
import torch

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"
sys.path.insert(0, str(EXPERIMENTS))
import chains

import diffusion


def test_every_answer_is_the_end_of_the_chain_that_the_pairs_show():
    rng = random.Random(0)
    for most_links in (1, 3, 9):
        idx, (rows, columns), y, links = chains.draw_batch(rng, 20, most_links)
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
    """The path is sampled at the times it was trained at: t_hold, ..., t_hold, t_end."""
    config = diffusion.SamplerConfig(steps=6, **chains.UNROLLED)
    assert config.plan(torch.zeros(1, 4))[0] == [0, .5, .5, .5, .5, .9]


def test_an_interval_is_that_of_paired_sequences():
    a, b = [0, 4, 8, 4], [4, 4, 8, 8]                             # right answers of two seeds, of 8 per sequence
    mean, half = chains.find_interval(a, b, n_seeds=2)
    assert mean == pytest.approx(0.25) and half == pytest.approx(1.96 * (1 / 12) ** 0.5 / 2)


def test_a_run_from_end_to_end(tmp_path, monkeypatch, capsys):
    """A trunk, L2D and a control of few steps, their table, and the trace of one answer."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(chains, "OUT", tmp_path / "out")
    monkeypatch.setattr(chains, "HERE", tmp_path)
    monkeypatch.setattr(chains, "STEPS", (1, 2, 8))
    monkeypatch.setattr(chains.test, "__defaults__", (chains.draw_batch, chains.TEST_SEED, 50, 25))
    monkeypatch.setattr(chains, "plan_training", lambda method: ([(3, 3, 4)], 1e-3, 4))
    for method in ("trunk", "l2d", "loop8"):
        chains.main([f"--method={method}"])
    chains.main(["--method=table"])
    printed = capsys.readouterr().out
    assert "| L2D | 8 |" in printed and "L2D, at T = 8 minus blocks applied 8 times, seeds [0]" in printed
    assert '   {"steps": 8, "right"' in (tmp_path / "chains.json").read_text()
    chains.main(["--method=trace", "--links=3", "--steps=5"])
    chain, guesses = capsys.readouterr().out.splitlines()
    assert chain.count("->") == 3 and len(guesses.split()) == 1 + 5
