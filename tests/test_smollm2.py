"""experiments/smollm2.py and .sh: numbers against those of evaluate.py and by hand, intervals, the commands."""
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import error_of, says

import evaluate
import train
from configurator import configure
from decode import predict_given
from diffusion import SamplerConfig
from plumbing.dataset import load_batch, load_split
from plumbing.trained import load

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"
sys.path.insert(0, str(EXPERIMENTS))
import smollm2
import word_chains


@pytest.fixture(scope="module")
def root(l2d, trunk, tmp_path_factory):
    """A folder with a measured pair, called a run of two seeds, and a measured trunk, called a control."""
    root = tmp_path_factory.mktemp("smollm2")
    for name, source in (("l2d_s0", l2d), ("l2d_s1", l2d), ("full_s0", trunk)):
        shutil.copytree(source, root / name)
        seed = name[-1]
        smollm2.main([f"--measure={root / name}", "--split=val", "--limit=10", "--dtype=float32", f"--seed={seed}"])
    return root


def sums_of(root, name):
    return json.loads((root / name / "measured_val_float32.json").read_text())["sums"]


def test_the_numbers_are_those_of_evaluate(root, l2d, tmp_path, monkeypatch, capsys):
    """At T = 1, where no noise enters; evaluate.py has other batches."""
    shutil.copytree(l2d, tmp_path / "run", ignore=shutil.ignore_patterns("eval"))
    evaluate.main([f"--out_dir={tmp_path / 'run'}", "--steps=1", "--limit=10", "--exact_match=False"])
    (path,) = (tmp_path / "run/eval").glob("*.json")
    row = json.loads(path.read_text())["rows"][0]
    sums = sums_of(root, "l2d_s0")["T=1"]
    n = sum(sums["n"])
    for ours, theirs in (("right", "token_accuracy"), ("nll", "nll"), ("sampled 1", "p_true"), ("entropy", "entropy")):
        assert sum(sums[ours]) / n == pytest.approx(row[theirs], rel=1e-5), ours


def test_probabilities_at_other_temperatures_by_hand(root, l2d, arithmetic):
    """Softmax of logits / temperature in float64, problem by problem, each alone in its batch."""
    model, _, _ = load(str(l2d))
    data = load_split(str(arithmetic), "val")
    sums = sums_of(root, "l2d_s0")["T=1"]
    for i in (0, 7):
        idx, at, y, _ = load_batch(data, [i], "cpu")
        logits = predict_given(model, idx, at, SamplerConfig(steps=1), torch.Generator())[0].double()
        assert sums["n"][i] == len(y)
        for tau in smollm2.TEMPERATURES:
            p = (logits / tau).softmax(-1)[torch.arange(len(y)), y]
            assert sums[f"sampled {tau:g}"][i] == pytest.approx(p.sum().item(), rel=1e-4)


def test_what_is_measured(root):
    """A pair at every T and by the authors' solver; noise differs between seeds where it enters; controls at T = 1."""
    pair, other = sums_of(root, "l2d_s0"), sums_of(root, "l2d_s1")
    assert list(pair) == [f"T={T}" for T in (1, 2, 4, 8, 16, 32)] + [f"midpoint T={T}" for T in (3, 7, 15)] \
        + [f"T={T} to t={t}" for T, t in ((2, 0.001), (2, 0.9375), (4, 0.9375), (16, 0.5), (16, 0.75), (16, 0.875))] \
        + ["held T=2", "held T=4", "held T=16"]
    assert pair["T=1"] == other["T=1"] and pair["T=2"]["nll"] != other["T=2"]["nll"]
    assert list(sums_of(root, "full_s0")) == ["T=1"]


def test_comparison(root, tmp_path, capsys):
    """Means over seeds, and a difference, worked out here from the files."""
    smollm2.main([f"--root={root}", "--split=val", "--limit=10", "--dtype=float32", f"--out={tmp_path / 'found'}"])
    found = json.loads((tmp_path / "found.json").read_text())
    rows = {(row["kind"], row["setting"]): row for row in found["rows"]}
    each = [sums_of(root, f"l2d_s{seed}") for seed in (0, 1)]
    n = sum(each[0]["T=1"]["n"])
    nll = [sum(sums["T=16"]["nll"]) / n for sums in each]
    assert rows["l2d", "T=16"]["seeds"] == [0, 1]
    assert rows["l2d", "T=16"]["nll of seeds"] == pytest.approx(nll)
    assert rows["l2d", "T=16"]["nll"][0] == pytest.approx(sum(nll) / 2)
    assert rows["full", "T=1"]["seeds"] == [0]
    differences = {row["what"]: row["value"] for row in found["differences"]}
    base = sum(sum(sums["T=2"]["nll"]) for sums in each) / 2 / n
    value, low, high = differences["l2d, nll: T=16 minus T=2"]
    assert value == pytest.approx(sum(nll) / 2 - base, abs=1e-12) and low <= value <= high
    sampled = sum(sum(sums["T=16"]["sampled 1"]) - sum(sums["T=2"]["right"]) for sums in each) / 2 / n
    assert differences["l2d, T=16 at temperature 1 minus T=2 greedy"][0] == pytest.approx(sampled)
    assert (tmp_path / "found.png").stat().st_size > 10_000
    assert set(found["runs"]) == {"l2d_s0", "l2d_s1", "full_s0"}
    assert "| L2D | 16 | 2 |" in capsys.readouterr().out


def test_intervals_are_those_of_a_mean():
    """With equal n and many problems, the interval is mean +- 1.96 standard errors."""
    values = np.random.default_rng(1).exponential(size=400)
    value, low, high = smollm2.Bootstrap(np.ones(400)).ratio(values)
    assert value == pytest.approx(values.mean())
    error = 1.96 * values.std(ddof=1) / math.sqrt(400)
    assert value - low == pytest.approx(error, rel=0.1) and high - value == pytest.approx(error, rel=0.1)


def test_intervals_count_problems_not_tokens():
    """Forty tokens of a problem that are all right or all wrong are one observation, not forty."""
    right = np.random.default_rng(1).integers(2, size=100) * 40.0
    _, low, high = smollm2.Bootstrap(np.full(100, 40.0)).ratio(right)
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 10, rel=0.1)


def test_five_examples_come_before_the_problem(l2d, tmp_path):
    shutil.copytree(l2d, tmp_path / "l2d_s0")
    options = [f"--measure={tmp_path / 'l2d_s0'}", "--split=val", "--limit=1", "--dtype=float32"]
    smollm2.main([*options, "--shots=1"])
    found = json.loads((tmp_path / "l2d_s0/measured_val_1shots_float32.json").read_text())
    assert list(found["sums"]) == ["T=1"] and found["shots"] == 1
    says(error_of(smollm2.main, [*options, "--shots=5"]), "128 positions", "use fewer shots")


def test_the_published_numbers_follow_from_the_published_sums(tmp_path, capsys):
    """experiments/smollm2.json from the sums over problems in experiments/smollm2."""
    smollm2.main([f"--root={EXPERIMENTS / 'smollm2'}", f"--out={tmp_path / 'again'}"])
    again, published = (json.loads(path.read_text()) for path in (tmp_path / "again.json", EXPERIMENTS / "smollm2.json"))
    for ours, theirs in zip(again["rows"], published["rows"], strict=True):
        assert ours["setting"] == theirs["setting"] and ours["right"] == pytest.approx(theirs["right"], abs=1e-5)
        assert ours["nll"] == pytest.approx(theirs["nll"], abs=1e-5)
    for ours, theirs in zip(again["differences"], published["differences"], strict=True):
        assert ours["what"] == theirs["what"] and ours["value"] == pytest.approx(theirs["value"], abs=1e-5)


def test_errors(tmp_path):
    says(error_of(smollm2.main, [f"--root={tmp_path}"]), "no run in", "--measure=RUN")
    says(error_of(smollm2.main, ["--shots=5"]), "shots=5", "--measure=RUN")


def test_some_settings_alone_and_then_the_others(root, tmp_path):
    """What is measured in two parts is what is measured at once. An unknown setting is refused by its name."""
    shutil.copytree(root / "l2d_s0", tmp_path / "l2d_s0", ignore=shutil.ignore_patterns("measured*"))
    options = [f"--measure={tmp_path / 'l2d_s0'}", "--split=val", "--limit=10", "--dtype=float32"]
    smollm2.main([*options, "--settings=T=16,T=2"])
    assert set(sums_of(tmp_path, "l2d_s0")) == {"T=2", "T=16"}
    smollm2.main(options)
    assert sums_of(tmp_path, "l2d_s0") == sums_of(root, "l2d_s0")
    says(error_of(smollm2.main, [*options, "--settings=T=2,T=5"]), "T=5", "unknown", "T=4")


def test_every_command_has_options_that_exist():
    kinds = {"train.py": train.Config, "evaluate.py": evaluate.Config, "experiments/smollm2.py": smollm2.Config,
             "experiments/word_chains.py": word_chains.Config}
    env = {name: value for name, value in os.environ.items() if name not in ("SMOLLM2", "TRUNK", "GSM8K")}
    listed = subprocess.run(["bash", "experiments/smollm2.sh"], capture_output=True, text=True, check=True,
                            cwd=EXPERIMENTS.parent, env=env | {"LIST": "1"})
    names = set()
    for python, name, *options in map(shlex.split, listed.stdout.splitlines()):
        assert python == "python"
        names.add(name)
        if name in kinds:
            configure(kinds[name], options)
        else:
            assert name == "prepare_data.py" and options[0] == "gsm8k"
    assert names == {*kinds, "prepare_data.py"}
