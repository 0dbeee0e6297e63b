"""experiments/chains.py: its sequences checked by walking the chains, its numbers by hand, and a short run of every method."""
import importlib.util
import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from configurator import UserError

spec = importlib.util.spec_from_file_location("chains", Path(__file__).parent.parent / "experiments/chains.py")
chains = importlib.util.module_from_spec(spec)
spec.loader.exec_module(chains)


@pytest.mark.parametrize("most_links, next_too", [(6, False), (2, True)])
def test_answers_follow_from_what_is_shown(most_links, next_too):
    rng, walked = random.Random(0), Counter()
    for _ in range(300):
        idx, targets, links = chains.sequence(rng, most_links, next_too)
        shown, asked = idx[:3 * chains.N_SHOWN], idx[3 * chains.N_SHOWN:]
        following = dict(zip(shown[::3], shown[1::3]))
        assert set(shown[2::3]) == {chains.SEMICOLON} and set(following.values()) <= set(following) and len(following) == chains.N_SHOWN
        for i, n in zip(range(0, len(asked), 4), links):
            kind, name, equals, answer = asked[i:i + 4]
            walk = [name]
            while following[walk[-1]] != walk[-1]:
                walk.append(following[walk[-1]])
            assert equals == chains.EQUALS and answer == (walk[-1] if kind == chains.LAST else following[name]) and n == len(walk) - 1
            assert targets[len(shown) + i + 2] == answer and idx[len(shown) + i + 3] == answer         # predicted where "=" is read
            walked[kind, n] += 1
        assert sum(t >= 0 for t in targets) == chains.N_ASKED
    assert max(n for _, n in walked) == most_links and {kind for kind, _ in walked} == ({chains.LAST, chains.NEXT} if next_too else {chains.LAST})


def test_pairs_are_sequences(monkeypatch):
    """Two seeds, two sequences of four answers: one sequence gains two answers, the other loses one and gains one."""
    monkeypatch.setattr(chains, "N_TEST", 2)
    runs = [{1: [0, 0, 1, 1, 1, 0, 1, 1], 2: [1, 0, 1, 1, 0, 1, 1, 1]}, {1: [0, 0, 0, 0, 1, 1, 1, 1], 2: [0, 0, 0, 1, 1, 1, 1, 1]}]
    one, two = chains.over_seeds(runs)
    assert one["right"] == [5 / 8, 1 / 2] and one["vs_1"] is None and two["vs_2"] is None
    assert two["right"] == [6 / 8, 5 / 8] and two["vs_1"] == {"gained": 1, "lost": 0, "p": 1.0}


def test_every_method_and_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(chains, "N_TEST", 250)
    (tmp_path / "experiments").mkdir()
    with pytest.raises(UserError, match="--method=trunk"):
        chains.main(["--method=lora"])
    threads = torch.get_num_threads()
    for method in ("trunk", *chains.METHODS):
        chains.main([f"--method={method}", "--steps=2"])
    chains.main(["--method=lora", "--steps=2", "--seed=1"])
    chains.main([])
    data = json.loads((tmp_path / "experiments/chains.json").read_text())
    assert [len(data[title]["rows"]) for title in ("L2D, trained through Algorithm 1", "L2D, x_t from the truth, to t = 0.25", "LoRA on the trunk")] == [7, 5, 1]
    assert data["LoRA on the trunk"]["seeds"] == [0, 1] and (tmp_path / "experiments/chains.png").stat().st_size > 10_000
    trunk = json.loads((tmp_path / "out/chains/trunk_s0.json").read_text())["right"][""]["1"]
    assert data["L2D, trained through Algorithm 1"]["rows"][0]["right"] == [sum(trunk) / len(trunk)]   # T = 1 is the trunk
    chains.main(["--method=full", "--steps=3", "--seed=1"])
    with pytest.raises(UserError, match="full_s1.json was tested on other sequences .* or trained with another --steps"):
        chains.main([])
    torch.set_num_threads(threads)
