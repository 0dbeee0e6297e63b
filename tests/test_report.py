"""tasks/report.py: intervals, tests, shares and figures, each against its definition."""
import itertools
import json
import math
import multiprocessing

import pytest

from configurator import UserError
from plumbing import provenance
from tasks import report
from tasks.report import add_comparisons, compute_shares, mcnemar, sign_test, summarize, wilson


@pytest.mark.parametrize("k, n, low, high", [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605),
                                             (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)])
def test_wilson_as_published(k, n, low, high):
    """Newcombe 1998, Table I, method 3."""
    assert wilson(k, n) == pytest.approx((low, high), abs=6e-5)


def test_wilson_holds_its_share():
    for n in range(1, 600):
        for k in (0, n):                                      # rounding included: no bar of negative length
            assert wilson(k, n)[0] <= k / n <= wilson(k, n)[1]


def test_wilson_by_definition():
    """The shares p for which k of n lies within z standard errors of p, found by bisection."""
    for n in (1, 2, 7, 40, 1319):
        for k in {0, 1, n // 3, n - 1, n}:
            def far(p):
                return abs(k / n - p) - 1.96 * math.sqrt(p * (1 - p) / n)
            ends = []
            for outside, inside in ((0.0, k / n), (1.0, k / n)):
                if k in (0, n) and outside == inside:
                    ends.append(inside)
                    continue
                for _ in range(200):
                    middle = (outside + inside) / 2
                    outside, inside = (middle, inside) if far(middle) > 0 else (outside, middle)
                ends.append(inside)
            assert wilson(k, n) == pytest.approx(ends, abs=1e-9), (k, n)


def test_mcnemar_by_enumeration():
    """Of all ways in which the differing pairs could have fallen, the share that is at least as uneven."""
    for gained in range(7):
        for lost in range(7):
            n = gained + lost
            falls = [sum(fall) for fall in itertools.product((0, 1), repeat=n)]
            want = sum(abs(2 * f - n) >= abs(gained - lost) for f in falls) / len(falls)
            a = [False] * gained + [True] * lost + [True, False] * 5
            b = [True] * gained + [False] * lost + [True, False] * 5
            assert mcnemar(a, b) == (gained, lost, pytest.approx(want))
            assert sign_test(gained, lost) == pytest.approx(want)
    one_to_nine = mcnemar([True] * 10 + [False] * 2, [False] * 9 + [True] * 3)
    assert one_to_nine[2] == pytest.approx(2 * (1 + 11 + 55) / 2 ** 11)
    assert mcnemar([False] * 1319, [True] * 1319)[2] < 1e-300


def test_rows_are_compared_with_the_first_and_the_previous():
    """The choices likewise, on their own; a row alone is compared with nothing."""
    right = {1: [0, 0, 1], 8: [1, 0, 0], 4: [1, 1, 0]}
    rows = [{"steps": T, "right": each, "choices": {"right": each[::-1] if T == 4 else [1, 1, 1]}}
            for T, each in right.items()]
    add_comparisons(rows)
    one, eight, four = rows
    assert "vs_first" not in one and "vs_previous" not in one["choices"]
    same = {"steps": 1, "gained": 1, "lost": 1, "p": 1.0}
    assert eight["vs_first"] == eight["vs_previous"] == same
    assert four["vs_first"] == {"steps": 1, "gained": 2, "lost": 1, "p": 1.0}
    assert four["vs_previous"] == {"steps": 8, "gained": 1, "lost": 0, "p": 1.0}
    assert four["choices"]["vs_first"] == {"steps": 1, "gained": 0, "lost": 1, "p": 1.0}
    rows = [{"steps": 1, "nll": 1.0}, {"steps": 2, "nll": 1.0}]   # no answers, no choices
    add_comparisons(rows)
    assert rows == [{"steps": 1, "nll": 1.0}, {"steps": 2, "nll": 1.0}]


def test_micro_and_macro():
    """Three subjects of 4, 1 and 1 problems: micro weighs problems, macro weighs subjects."""
    row = compute_shares("accuracy", [1, 1, 1, 0, 0, 1], 1, ["law", "law", "law", "law", "art", "math"])
    assert row["accuracy"] == 4 / 6 and row["interval"] == wilson(4, 6)
    assert row["macro"] == pytest.approx((0.75 + 0 + 1) / 3)
    assert row["by_subject"] == {"art": (0, 1), "law": (0.75, 4), "math": (1, 1)}
    assert compute_shares("strict", [3, 0], 4, ["", ""]) == {
        "strict": 3 / 8, "interval": wilson(0.75, 2), "right": [3, 0]}


def record(i, strict, **others):
    return {"id": i, "output": "", "strict": strict, "flexible": strict, "well_formed": 1, "fits": True,
            "ended": True, "predicted": 10, "nfe": 20, "computed": 24, "seconds": 0.5} | others


def test_pass_at_k_by_enumeration():
    """Of all ways to draw m of the k samples of a problem, the share with a right one; mean over problems."""
    k, right = 12, [0, 1, 3, 12, 7]
    row = summarize([record(i, c) for i, c in enumerate(right)], k, [""] * 5)
    assert list(row["pass_at"]) == [1, 10, 12]
    for m, found in row["pass_at"].items():
        each = [[any(i < c for i in drawn) for drawn in itertools.combinations(range(k), m)] for c in right]
        assert found == pytest.approx(sum(sum(z) / len(z) for z in each) / 5)
    assert row["strict"] == pytest.approx(row["pass_at"][1]) == pytest.approx(23 / 60)
    assert row["interval"] == wilson(23 / 12, 5)


def test_the_numbers_of_a_row():
    records = [record(0, 1), record(1, 0, well_formed=0, ended=False, predicted=30, nfe=40, computed=56),
               record(2, 0, flexible=1),
               record(3, 0, fits=False, ended=False, predicted=0, nfe=0, computed=0)]
    row = summarize(records, 1, [""] * 4)
    assert (row["n"], row["strict"], row["flexible"], row["well_formed"]) == (4, 0.25, 0.5, 0.75)
    assert (row["cut"], row["too_long"], row["tokens"], row["seconds"]) == (0.5, 1, 12.5, 2.0)
    assert (row["nfe"], row["computed"]) == (80 / 50, 104 / 50) and "pass_at" not in row


def full_row(steps, k, n, **others):
    kinds = {kind: {"n": 1, "accuracy": 0.25, "nfe": steps - 1} for kind in ("result", "number", "rest")}
    right = compute_shares("strict", [1] * k + [0] * (n - k), 1, ["law"] * k + ["art"] * (n - k))
    return {"steps": steps, "solver": "euler", "n": n, "token_accuracy": 0.5, "nll": 1.0, "p_true": 0.25, "entropy": 2.5, "by_kind": kinds,
            "flexible": 1.0, "well_formed": 0.75, "cut": 0.25, "tokens": 9, "nfe": steps - 1,
            "computed": steps} | right | others


def test_the_table_is_aligned_and_has_its_subjects():
    choices = {"accuracy": 0.5, "interval": (0.25, 0.75), "nll": 1.25, "macro": 0.5,
               "by_subject": {"art": (0.5, 3)}}
    versus = {"vs_first": {"steps": 1, "gained": 12, "lost": 3, "p": 0.0352}}
    text = report.format_table([full_row(1, 2, 5, choices=choices), full_row(16, 3, 5, choices=choices, **versus)])
    table, right, likeliest = text.split("\n\n")
    heading, one, sixteen = table.splitlines()
    assert heading.split()[:3] == ["steps", "NFE", "computed"] and one.split()[0] == "1"
    assert sixteen.index("+12 -3 p=0.0352") == heading.index("vs first")
    assert one.index("0.2500") == heading.index("p(true)") and one.index("2.5000") == heading.index("entropy")
    assert one.index("0.400 [0.118, 0.769]") == heading.index("right [95%]")
    assert one.index("0.500 [0.250, 0.750]") == heading.index("likeliest choice [95%]")
    assert [line.split() for line in right.splitlines()[1:]] == [["art", "3", "0.000", "0.000"],
                                                                 ["law", "2", "1.000", "1.000"]]
    assert likeliest.splitlines()[1].split() == ["art", "3", "0.500", "0.500"]


def results(*rows, scorer="of this scorer"):
    return {"config": {"split": "val"}, "depends": {"scorer_sha256": scorer, "groups": (1, 2)}, "rows": list(rows)}


def test_rows_of_other_steps_stay(tmp_path):
    path = tmp_path / "val_0123abcd.json"
    report.write_results(path, results(full_row(1, 2, 5), full_row(16, 3, 5)))
    assert report.write_results(path, results(full_row(4, 4, 5), full_row(16, 5, 5))) == []
    rows = report.read_results(path)["rows"]
    assert [(row["steps"], row["strict"]) for row in rows] == [(1, 0.4), (4, 0.8), (16, 1.0)]
    assert sum(line.startswith('{"steps"') for line in path.read_text().splitlines()) == 3


def test_rows_that_depend_on_something_else_do_not_stay(tmp_path):
    """Those of T that are measured anew are no loss, and are not named."""
    path = tmp_path / "val_0123abcd.json"
    report.write_results(path, results(full_row(1, 2, 5), full_row(8, 2, 5), full_row(16, 3, 5)))
    assert report.write_results(path, results(full_row(8, 4, 5), scorer="of another")) == [1, 16]
    assert [(row["steps"], row["strict"]) for row in report.read_results(path)["rows"]] == [(8, 0.8)]


def test_damaged_results_are_replaced(tmp_path):
    path = tmp_path / "val_0123abcd.json"
    no_row = '{"rows": [{}], "config": {}, "depends": {}}'
    for damaged in ("", "{", "[]", "null", '{"rows": 1}', no_row):
        path.write_text(damaged)
        assert report.read_results(path) == {"rows": []}
        report.write_results(path, results(full_row(4, 4, 5)))
        assert [row["steps"] for row in report.read_results(path)["rows"]] == [4]


def write_one(path, steps):
    for _ in range(10):
        report.write_results(path, results(full_row(steps, 2, 5)))


def test_two_writers_lose_no_row(tmp_path):
    """Four processes write ten times each: nobody's rows are lost, and no temporary file is left."""
    path = tmp_path / "val_0123abcd.json"
    processes = [multiprocessing.get_context("fork").Process(target=write_one, args=(path, steps))
                 for steps in (1, 2, 4, 8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [row["steps"] for row in report.read_results(path)["rows"]] == [1, 2, 4, 8]
    assert {file.name for file in tmp_path.iterdir()} == {"val_0123abcd.json", "lock"}


def test_without_git_there_is_no_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.commit() == ""


def test_plot_draws_what_was_measured(tmp_path, monkeypatch):
    """Points and error bars, read back from the axes."""
    plt, shown = pytest.importorskip("matplotlib.pyplot"), []
    monkeypatch.setattr(plt, "close", shown.append)
    with open(tmp_path / "x.png", "wb") as file:
        report.plot(file, results(full_row(1, 30, 100), full_row(4, 45, 100)))
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    (axes,) = shown[0].axes
    points = axes.lines[0]
    assert points.get_xdata().tolist() == [0, 3] and points.get_ydata().tolist() == [0.3, 0.45]
    bars = [bar for bars in axes.collections if hasattr(bars, "get_segments") for bar in bars.get_segments()]
    assert sorted(y for (_, low), (_, high) in bars for y in (low, high)) == pytest.approx(
        sorted([*wilson(30, 100), *wilson(45, 100)]))


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(UserError, match="--plot needs matplotlib: pip install matplotlib"):
        provenance.pyplot("--plot")


def test_results_are_json(tmp_path):
    """nan and infinity are not; a whole file is written or none."""
    report.write_results(tmp_path / "x.json", results(full_row(1, 2, 5)))
    def refuse(word):
        raise AssertionError(word)
    json.loads((tmp_path / "x.json").read_text(), parse_constant=refuse)
