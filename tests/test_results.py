"""experiments/results.py: what it says of evaluations made by hand, against numbers worked out by hand."""
import importlib.util
import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest

import evaluate
from configurator import UserError
from exam import KINDS
from exam.report import wilson

path = Path(__file__).parent.parent / "experiments/results.py"
spec = importlib.util.spec_from_file_location("results", path)
results = importlib.util.module_from_spec(spec)
spec.loader.exec_module(results)

COUNTS = "fits", "ended", "flexible", "well_formed", "predicted", "nfe", "computed"


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """tree(name, {T: strict of each problem}, **settings) writes an evaluation as evaluate.py does."""
    monkeypatch.chdir(tmp_path)
    def make(name, right, key="0123abcd", answers=True, nll=1.0, split="test", **settings):
        folder = tmp_path / "out" / name / "eval"
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for T, strict in right.items():
            n, file = len(strict), f"{split}_{key}_steps{T}.jsonl"
            kinds = {kind: {"n": 1, "accuracy": 0.25, "nfe": T - 1} for kind in KINDS}
            rows.append({"steps": T, "solver": "euler", "token_accuracy": 0.5, "nll": nll,
                         "teacher_forced_n": n, "n": n, "by_kind": kinds, "strict": sum(strict) / n,
                         "interval": wilson(sum(strict), n), "flexible": 1.0,
                         "well_formed": 0.75, "cut": 0.25, "tokens": 9, "nfe": T - 1, "answers": file})
            if answers:                                            # in another order than the problems'
                fields = {"output": "", "seconds": 1} | dict.fromkeys(COUNTS, 1)
                lines = [json.dumps({"id": i, "strict": s} | fields) + "\n" for i, s in enumerate(strict)]
                (folder / file).write_text("\n" + "".join(lines[::-1]))
        steps = ",".join(map(str, right))
        config = asdict(evaluate.Config(out_dir=f"out/{name}", split=split, steps=steps, **settings))
        run = {"config": config, "rows": rows, "weights_sha256": f"sha of {name}", "commit": "c0ffee",
               "command": f"evaluate.py {name}", "torch": "2.0", "python": "3", "machine": "m",
               "problems_sha256": "of the problems"}
        part = f"_first{settings['limit']}" if settings.get("limit") else ""
        (folder / f"{split}{part}_{key}.json").write_text(json.dumps(run))
        return folder
    return make


def read(*args):
    results.main(list(args))
    return json.loads(open("experiments/results_test.json").read())["groups"]


def three_seeds(tree):
    """Right of ten, at T = 1, 2, 8: 3, 5, 8; 3, 6, 6; 3, 7, 10."""
    def ones(*at):
        return [int(i in at) for i in range(10)]
    tree("a", {1: ones(0, 1, 2), 2: ones(1, 2, 3, 4, 5), 8: ones(*range(8))}, nll=1.0)
    tree("a_s1", {1: ones(0, 1, 2), 2: ones(0, 1, 2, 3, 4, 5), 8: ones(1, 2, 3, 4, 5, 6)}, nll=2.0)
    tree("a_s12", {1: ones(0, 1, 2), 2: ones(0, 2, 3, 4, 5, 6, 7), 8: ones(*range(10))}, nll=4.5)


def test_means_and_pooled_pairs(tree, capsys):
    three_seeds(tree)
    (name, group), = read().items()
    assert name == "a" and group["n"] == 10 and group["settings"] == {}
    assert [run["seed"] for run in group["runs"]] == [0, 1, 12]
    assert group["runs"][2] == {
        "seed": 12, "path": "out/a_s12/eval/test_0123abcd.json", "command": "evaluate.py a_s12",
        "commit": "c0ffee", "torch": "2.0", "machine": "m", "weights_sha256": "sha of a_s12"}
    one, two, eight = group["rows"]
    assert [(row["steps"], row["seeds"]) for row in group["rows"]] == [(T, [0, 1, 12]) for T in (1, 2, 8)]
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


def test_groups(tree):
    """A trailing _s<digits> is the training seed; settings that change answers make a group, others not."""
    tree("a", {1: [1, 0]})
    tree("a_s3", {1: [1, 1]}, batch_size=3, draft=0, mistakes=0, device="cpu")
    tree("a_s3", {1: [1]}, key="00000006", limit=1)                 # of the first problem only
    tree("a_small", {1: [0, 0]})
    tree("a_s1_b", {1: [0, 0]})
    tree("a", {1: [0, 1]}, key="00000001", temperature=0.7, votes=5)
    tree("a_s3", {1: [0, 1]}, key="00000002", temperature=0.7, votes=5)
    tree("a_s3", {1: [0, 1]}, key="00000003", temperature=0.7)
    tree("a", {2: [0, 1]}, key="00000004", solver="adaptive", use_label=True)
    tree("a", {1: [1, 1]}, key="00000005", split="test_hard")      # another split, whose name begins alike
    groups = read()
    assert {name: [run["seed"] for run in group["runs"]] for name, group in groups.items()} == {
        "a": [0, 3], "a_small": [0], "a_s1_b": [0], "a:temperature=0.7:votes=5": [0, 3],
        "a:temperature=0.7": [3], "a:limit=1": [3], "a:solver=adaptive:use_label=True": [0]}
    assert groups["a:temperature=0.7:votes=5"]["settings"] == {"temperature": 0.7, "votes": 5}
    assert groups["a"]["rows"][0]["strict"]["values"] == [0.5, 1.0]
    assert groups["a_small"]["rows"][0]["strict"] == {"mean": 0, "sd": None, "values": [0]}


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


def test_without_all_answers(tree, capsys):
    """No pairs where a file of answers is missing, shorter or cut; longer is fine: the run's own count."""
    right = {1: [0, 0, 1], 2: [1, 1, 1]}
    folders = {name: tree(name, right, answers=name != "gone") for name in ("gone", "short", "cut", "long")}
    def path(name):
        return folders[name] / "test_0123abcd_steps2.jsonl"
    path("short").write_text(path("short").read_text().split("\n", 2)[2])
    path("cut").write_text(path("cut").read_text().rstrip("}\n"))
    more = {"id": 3, "strict": 0, "output": "", "seconds": 1} | dict.fromkeys(COUNTS, 1)
    path("long").write_text(path("long").read_text() + json.dumps(more) + "\n")
    two = {name: group["rows"][1] for name, group in read().items()}
    assert [name for name, row in two.items() if "vs_one" in row] == ["long"] and len(two) == 4
    assert two["long"]["vs_one"]["gained"] == 2 and all(row["strict"]["mean"] == 1 for row in two.values())


def test_teacher_forced_only(tree, capsys):
    """--exact_match=False: a group of its own, with the numbers that it has."""
    folder = tree("a", {1: [0, 1], 2: [1, 1]}, answers=False, exact_match=False)
    run = json.loads((folder / "test_0123abcd.json").read_text())
    kept = "steps", "n", "solver", "token_accuracy", "nll", "teacher_forced_n", "by_kind"
    run["rows"] = [{k: row[k] for k in kept} for row in run["rows"]]
    (folder / "test_0123abcd.json").write_text(json.dumps(run))
    (name, group), = read().items()
    assert name == "a:exact_match=False" and group["n"] == 2
    assert not {"strict", "vs_one"} & group["rows"][1].keys()
    assert "| 2 |  |  |  |  |  | 0.5000 | 0.250 (1.00) | 1.0000 |" in capsys.readouterr().out


def says(parts, *args):
    with pytest.raises(UserError) as error:
        results.main(list(args))
    message = str(error.value)
    assert message.startswith("error: ") and "\n" not in message
    assert all(part in message for part in parts), message


def test_errors(tree, tmp_path):
    says(["out/*/eval/test_*.json", "python evaluate.py --split=test"])
    says(["draw=''", "--draw=experiments/results_test.json"], "--show=a")
    says(["draw='x.json'", "--show="], "--draw=x.json")
    tree("a", {1: [0, 1]})
    says(["cannot write /proc/none/x.json"], "--out=/proc/none/x.json")
    tree("a", {1: [0, 1]}, key="00000001", seed=1)
    says(["out/a/eval/test_00000001.json and out/a/eval/test_0123abcd.json", "move one"])
    (tmp_path / "out/a/eval/test_00000001.json").unlink()
    tree("a_s1", {1: [0, 1, 1]})
    says(["runs of a ", "out/a/eval/test_0123abcd.json: 2", "out/a_s1/eval/test_0123abcd.json: 3"])


def test_draw_errors(tree):
    pytest.importorskip("matplotlib")
    tree("a", {2: [0, 1]})
    tree("c", {2: [1, 1]})
    read()
    says(["cannot read nothing.json"], "--draw=nothing.json", "--show=a")
    says(["'b'", "its groups: a"], "--draw=experiments/results_test.json", "--show=a,b")
    says(["T = 1", "'a'"], "--draw=experiments/results_test.json", "--show=a", "--lines=a")
    says(["names='x' are 1", "2 groups"], "--draw=experiments/results_test.json", "--show=a,c", "--names=x")


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


def test_files_of_another_kind_are_one_line(tree, tmp_path):
    path = tree("a", {1: [0, 1]}) / "test_0123abcd.json"
    good = path.read_text()
    for bad in (good.replace("by_kind", "kinds"), good[:50], "{}"):
        path.write_text(bad)
        with pytest.raises(UserError, match="test_0123abcd.json is damaged or of another version"):
            results.main([])
    path.write_text(good)
    (tmp_path / "docs").mkdir(exist_ok=True)
    with pytest.raises(UserError, match="it has no groups"):
        results.main([f"--draw={path}", "--show=a"])
