"""experiments/: results.py on evaluations made by hand, with numbers worked out by hand; the commands and files."""
import json
import math
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from helpers import error_of, says

import evaluate
import train
from configurator import configure
from tasks.report import KINDS, wilson

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"
sys.path.insert(0, str(EXPERIMENTS))
import results


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """tree(name, {T: whether each problem is right}, **settings) writes an evaluation as evaluate.py does."""
    monkeypatch.chdir(tmp_path)
    def make(name, right, key="0123abcd", nll=1.0, split="test", **settings):
        folder = tmp_path / "out" / name / "eval"
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for T, strict in right.items():
            n = len(strict)
            kinds = {kind: {"n": 1, "accuracy": 0.25, "nfe": T - 1} for kind in KINDS}
            rows.append({"steps": T, "solver": "euler", "token_accuracy": 0.5, "nll": nll,
                         "teacher_forced_n": n, "n": n, "by_kind": kinds, "strict": sum(strict) / n,
                         "interval": wilson(sum(strict), n), "right": strict, "flexible": 1.0,
                         "well_formed": 0.75, "cut": 0.25, "tokens": 9, "nfe": T - 1})
        steps = ",".join(map(str, right))
        config = asdict(evaluate.Config(out_dir=f"out/{name}", split=split, steps=steps, **settings))
        run = {"config": config, "depends": {}, "rows": rows, "weights_sha256": f"sha of {name}", "commit": "c0ffee",
               "command": f"evaluate.py {name}", "torch": "2.0", "python": "3", "machine": "m"}
        part = f"_first{settings['limit']}" if settings.get("limit") else ""
        path = folder / f"{split}{part}_{key}.json"
        path.write_text(json.dumps(run))
        return path
    return make


def read(*args):
    results.main(list(args))
    return json.loads(Path("experiments/results_test.json").read_text())["groups"]


def three_seeds(tree):
    """Right of ten, at T = 1, 2, 8: 3, 5, 8; 3, 6, 6; 3, 7, 10."""
    def ones(*at):
        return [int(i in at) for i in range(10)]
    tree("a", {1: ones(0, 1, 2), 2: ones(1, 2, 3, 4, 5), 8: ones(*range(8))}, nll=1.0)
    tree("a_s1", {1: ones(0, 1, 2), 2: ones(0, 1, 2, 3, 4, 5), 8: ones(1, 2, 3, 4, 5, 6)}, nll=2.0)
    tree("a_s12", {1: ones(0, 1, 2), 2: ones(0, 2, 3, 4, 5, 6, 7), 8: ones(*range(10))}, nll=4.5)


def test_means_and_pooled_pairs(tree, capsys):
    three_seeds(tree)
    (name, condition), = read().items()
    assert name == "a" and condition["n"] == 10 and condition["settings"] == {}
    assert [run["seed"] for run in condition["runs"]] == [0, 1, 12]
    assert condition["runs"][2] == {
        "seed": 12, "path": "out/a_s12/eval/test_0123abcd.json", "command": "evaluate.py a_s12",
        "commit": "c0ffee", "torch": "2.0", "machine": "m", "weights_sha256": "sha of a_s12"}
    one, two, eight = condition["rows"]
    assert [(row["steps"], row["seeds"]) for row in condition["rows"]] == [(T, [0, 1, 12]) for T in (1, 2, 8)]
    def close(mean, sd, values):
        return {"mean": pytest.approx(mean), "sd": pytest.approx(sd), "values": values}
    assert one["strict"] == close(0.3, 0, [0.3] * 3)
    assert two["strict"] == close(0.6, 0.1, [0.5, 0.6, 0.7])
    assert eight["strict"] == close(0.8, 0.2, [0.8, 0.6, 1.0])
    assert one["nll"] == close(2.5, math.sqrt((1.5 ** 2 + 0.5 ** 2 + 2 ** 2) / 2), [1, 2, 4.5])
    assert eight["nfe"]["mean"] == 7 and eight["cut"]["mean"] == 0.25 and eight["well_formed"]["mean"] == 0.75

    assert "vs_one" not in one and "vs_second" not in one and "vs_second" not in two
    # seeds that are right on problems 0..9: T = 1: 3330000000, T = 2: 2233331100, T = 8: 2333333211
    def exact(v):
        return v["gained"], v["lost"], v["p"], [tuple(seed[:2]) for seed in v["each"]]
    assert exact(two["vs_one"]) == (5, 2, 2 * (1 + 7 + 21) / 2 ** 7, [(3, 1), (3, 0), (5, 1)])
    assert exact(eight["vs_one"]) == (7, 1, 2 * (1 + 8) / 2 ** 8, [(5, 0), (4, 1), (7, 0)])
    assert exact(eight["vs_second"]) == (5, 0, 2 / 2 ** 5, [(3, 0), (1, 1), (3, 0)])
    assert eight["vs_second"]["steps"] == 2
    assert eight["vs_second"]["each"][1][2] == 1
    printed = capsys.readouterr().out
    assert ("| 2 | 1.00 | 0.600 ± 0.100 | 0.500, 0.600, 0.700 | 5 / 2, 0.45 |  | 0.5000 ± 0.0000 | "
            "0.250 (1.00) | 2.5000 ± 1.8028 |") in printed and "vs T = 2 |" in printed
    assert "| 8 | 7.00 | 0.800 ± 0.200 | 0.800, 0.600, 1.000 | 7 / 1, 0.07 | 5 / 0, 0.062 |" in printed
    rows = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(rows) == 5 and {row.count("|") for row in rows} == {10}
    lines = Path("experiments/results_test.json").read_text().splitlines()
    assert [line.lstrip()[:11] for line in lines].count('{"steps": 2') == 1      # a row of the table is a line


def test_conditions(tree):
    """A trailing _s<digits> is the training seed; settings that change answers make a condition, others do not."""
    tree("a", {1: [1, 0]})
    tree("a_s3", {1: [1, 1]}, batch_size=3, draft=0, mistakes=0, device="cpu")
    tree("a_s3", {1: [1]}, key="00000006", limit=1)               # of the first problem only
    tree("a_small", {1: [0, 0]})
    tree("a_s1_b", {1: [0, 0]})
    tree("a", {1: [0, 1]}, key="00000001", temperature=0.7, votes=5)
    tree("a_s3", {1: [0, 1]}, key="00000002", temperature=0.7, votes=5)
    tree("a_s3", {1: [0, 1]}, key="00000003", temperature=0.7)
    tree("a", {2: [0, 1]}, key="00000004", solver="adaptive", use_group=True)
    tree("a", {1: [1, 1]}, key="00000005", split="test_hard")     # another split, whose name begins alike
    conditions = read()
    assert {name: [run["seed"] for run in condition["runs"]] for name, condition in conditions.items()} == {
        "a": [0, 3], "a_small": [0], "a_s1_b": [0], "a:temperature=0.7:votes=5": [0, 3],
        "a:temperature=0.7": [3], "a:limit=1": [3], "a:solver=adaptive:use_group=True": [0]}
    assert conditions["a:temperature=0.7:votes=5"]["settings"] == {"temperature": 0.7, "votes": 5}
    assert conditions["a"]["rows"][0]["strict"]["values"] == [0.5, 1.0]
    assert conditions["a_small"]["rows"][0]["strict"] == {"mean": 0, "sd": None, "values": [0]}


def test_seeds_with_other_steps(tree, capsys):
    """A row is over the seeds that have it, a pair over those that have both; T = 4 is the least above 1."""
    tree("a", {1: [0, 0, 1], 4: [1, 0, 1], 8: [1, 1, 0]})
    tree("a_s1", {4: [1, 1, 1], 8: [0, 1, 1]})
    one, four, eight = read()["a"]["rows"]
    assert (one["seeds"], four["seeds"], eight["seeds"]) == ([0], [0, 1], [0, 1])
    assert [eight["vs_one"][k] for k in ("gained", "lost", "each")] == [2, 1, [[2, 1, 1]]]
    assert eight["vs_second"] == {"steps": 4, "gained": 1, "lost": 2, "p": 1, "each": [[1, 1, 1], [0, 1, 1]]}
    printed = capsys.readouterr().out
    assert "vs T = 4 |" in printed and "| 1 | 0.00 | 0.333 [0.061, 0.792] | 0.333 (seeds 0) |" in printed


def test_teacher_forced_only(tree, capsys):
    """--exact_match=False: a condition of its own, with the numbers that it has."""
    path = tree("a", {1: [0, 1], 2: [1, 1]}, exact_match=False)
    run = json.loads(path.read_text())
    kept = "steps", "n", "solver", "token_accuracy", "nll", "teacher_forced_n", "by_kind"
    run["rows"] = [{k: row[k] for k in kept} for row in run["rows"]]
    path.write_text(json.dumps(run))
    (name, condition), = read().items()
    assert name == "a:exact_match=False" and condition["n"] == 2
    assert not {"strict", "vs_one"} & condition["rows"][1].keys()
    assert "| 2 |  |  |  |  |  | 0.5000 | 0.250 (1.00) | 1.0000 |" in capsys.readouterr().out


def test_what_evaluate_writes_is_read(l2d, tmp_path, monkeypatch):
    """A real evaluation, and its pairs."""
    evaluate.main([f"--out_dir={l2d}", "--limit=4", "--steps=1,2", "--max_new_tokens=8", "--mistakes=0"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run_s1").symlink_to(l2d)
    monkeypatch.chdir(tmp_path)
    results.main(["--split=val"])
    conditions = json.loads(Path("experiments/results_val.json").read_text())["groups"]
    assert conditions["run:limit=4"]["n"] == 4
    one, two = conditions["run:limit=4"]["rows"]
    assert two["vs_one"]["steps"] == 1 and two["nfe"]["mean"] == 1 and one["seeds"] == [1]


def main_says(args, *parts):
    says(error_of(results.main, args), *parts)


def test_errors(tree, tmp_path):
    main_says([], "out/*/eval/test_*.json", "python evaluate.py --split=test")
    main_says(["--show=a"], "draw=''", "--draw=experiments/results_test.json")
    main_says(["--draw=x.json"], "draw='x.json'", "--show=")
    path = tree("a", {1: [0, 1]})
    main_says(["--out=/proc/none/x.json"], "cannot write /proc/none/x.json")
    again = tree("a", {1: [0, 1]}, key="00000001", seed=1)
    main_says([], "out/a/eval/test_00000001.json and out/a/eval/test_0123abcd.json", "move one")
    again.unlink()
    other = tree("a_s1", {1: [0, 1, 1]})
    main_says([], "runs of a ", "out/a/eval/test_0123abcd.json: 2", "out/a_s1/eval/test_0123abcd.json: 3")
    other.unlink()
    good = path.read_text()
    for bad in (good.replace("by_kind", "kinds"), good[:50], "{}"):
        path.write_text(bad)
        main_says([], "test_0123abcd.json is damaged or of another version")


def test_draw_errors(tree):
    pytest.importorskip("matplotlib")
    path = tree("a", {2: [0, 1]})
    tree("c", {2: [1, 1]})
    read()
    drawn = "--draw=experiments/results_test.json"
    main_says(["--draw=nothing.json", "--show=a"], "cannot read nothing.json")
    main_says([f"--draw={path}", "--show=a"], "it has no groups")
    main_says([drawn, "--show=a,b"], "'b'", "its conditions: a")
    main_says([drawn, "--show=a", "--lines=a"], "T = 1", "'a'")
    main_says([drawn, "--show=a,c", "--names=x"], "names='x' are 1", "2 conditions")


def test_draw(tree, tmp_path, monkeypatch, capsys):
    """From the JSON alone: means, their spread, a dot for each seed, controls as lines; read back."""
    plt = pytest.importorskip("matplotlib.pyplot")
    three_seeds(tree)
    tree("single", {1: [0, 1], 4: [1, 1]})
    tree("control", {1: [1, 1, 0, 0, 0]})
    tree("control_s1", {1: [1, 1, 1, 0, 0]})
    read()
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    shown = []
    monkeypatch.setattr(plt, "close", shown.append)
    results.main(["--draw=experiments/results_test.json", "--show=a,single", "--lines=control",
                  "--png=figures/x.png"])
    figure = tmp_path / "figures/x.png"
    assert figure.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and figure.stat().st_size > 5000
    assert "figures/x.png" in capsys.readouterr().out
    (axes,) = shown[0].axes
    assert axes.get_xscale() == "log"
    assert [t.get_text() for t in axes.get_xticklabels()] == ["1", "2", "4", "8"]
    points = [(*c.lines[0].get_xdata(), *c.lines[0].get_ydata()) for c in axes.containers]
    assert points == [pytest.approx((1, 2, 8, 0.3, 0.6, 0.8)), (1, 4, 0.5, 1.0)]
    ends = [[y for (_, low), (_, high) in bars.lines[2][0].get_segments() for y in (low, high)]
            for bars in axes.containers]
    assert ends[0] == pytest.approx([0.3, 0.3, 0.5, 0.7, 0.6, 1.0])
    assert ends[1] == pytest.approx([*wilson(1, 2), *wilson(2, 2)])
    dots = [c.get_offsets().tolist() for c in axes.collections if len(c.get_offsets()) > 1]
    assert dots[0] == [[1, 0.3]] * 3 + [[2, 0.5], [2, 0.6], [2, 0.7], [8, 0.8], [8, 0.6], [8, 1.0]]
    (line,) = [line for line in axes.lines if line.get_label() == "control"]
    sd = math.sqrt(0.02)
    assert set(line.get_ydata()) == {0.5} and line.get_linestyle() == "--"
    (patch,) = axes.patches
    height = patch.get_extents().transformed(axes.transData.inverted()).intervaly
    assert sorted({*height}) == pytest.approx([0.5 - sd, 0.5 + sd])


# ------------------------------------------------------------------------------------ commands and files
def test_every_command_of_experiments_sh_has_options_that_exist(monkeypatch):
    """Each is parsed and checked as its script would do; nothing runs."""
    monkeypatch.chdir(EXPERIMENTS.parent)
    listed = subprocess.run(["bash", "experiments/experiments.sh", "--list"], capture_output=True, text=True, check=True)
    kinds = {"train.py": train.Config, "evaluate.py": evaluate.Config, "experiments/results.py": results.Config}
    commands = [shlex.split(line) for line in listed.stdout.splitlines()]
    assert {command[1] for command in commands} == set(kinds)
    for python, name, *options in commands:
        assert python == "python"
        configure(kinds[name], options)


def test_every_script_finds_the_project_without_pythonpath(tmp_path):
    """From any folder: one is run, and all have the line that does it."""
    command = [sys.executable, EXPERIMENTS / "results.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={"PATH": "/usr/bin"})
    assert done.returncode == 0 and "Options, with their defaults" in done.stdout, done.stderr
    for script in EXPERIMENTS.glob("*.py"):
        assert "\nsys.path.insert(0, str(Path(__file__).resolve().parent.parent))" in script.read_text(), script


def test_guidance_counts_styles_and_right_answers(l2d, arithmetic):
    import guidance
    config = guidance.Config(data_dir=str(arithmetic), split="val", limit=3, steps=2)
    found = guidance.measure_run(str(l2d), config, [("", 1.0), ("3 steps", 2.0)])
    assert found.keys() == {("", 1.0), ("3 steps", 2.0)}
    assert all(0 <= share <= 1 for shares in found.values() for share in shares)


def test_probe_agrees_with_the_loss_by_hand(l2d):
    """At t = 1 x_t is x_1 itself, whatever the noise: the mean loss of the pair on it."""
    import probe
    import torch
    import torch.nn.functional as F

    from plumbing.dataset import load_batch, load_split
    from plumbing.trained import load
    count, nll = probe.measure(str(l2d), 20)
    model, _, checkpoint = load(str(l2d), device="cpu")
    idx, at, y, _ = load_batch(load_split(checkpoint["config"]["data_dir"], "val"), range(20), "cpu")
    with torch.no_grad():
        group = torch.full_like(y, model.no_group)
        logits = model(model.embed(y), torch.ones(len(y)), model.read_context(idx, at), group)
    assert count == len(y) and nll[1.0, "truth"] == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)
