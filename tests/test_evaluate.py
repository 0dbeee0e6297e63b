"""evaluate.py: scoring, statistics and bookkeeping, each against its definition."""
import hashlib
import itertools
import json
import math
import re
import shutil
import signal
import subprocess
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import evaluate
import sample
from configurator import UserError
from evaluate import flexible_answer, majority, mcnemar, sign_test, strict_answer, vote, wilson
from model import load_checkpoint
from prepare_data import load_split
from test_train import arithmetic, child, encoding, l2d, trunk, wild  # noqa: F401  (fixtures)

ROOT = Path(__file__).resolve().parent.parent


# ------------------------------------------------------------------------------------------------- scoring
def score(output, gold):
    """(strict, flexible, well-formed) of a single output."""
    return vote([output], gold)[1:]


@pytest.mark.parametrize("output, gold, strict, flexible, well_formed", [
    (" 9+9 = 18.\n#### 18", "#### 18", True, True, True),
    ("#### 18.", "#### 18", True, True, True),
    ("#### 18. ", "#### 18", True, True, True),
    ("#### $18", "#### 18", False, True, False),
    ("####18", "#### 18", False, True, False),
    ("####  18", "#### 18", False, True, False),
    ("#### 18 apples, not 7", "#### 18", True, True, True),
    ("#### 1,234", "#### 1234", True, True, True),
    ("#### 1234", "#### 1,234", True, True, True),
    ("#### 1,234.50", "#### 1234.5", True, True, True),
    ("#### -3", "#### -3", True, True, True),
    ("#### -3", "#### 3", False, False, True),
    ("#### \u22123", "#### -3", False, True, False),
    ("#### -$3", "#### -3", False, True, False),
    ("#### $-3", "#### -3", False, True, False),
    ("#### 18.00", "#### 18", True, True, True),
    ("#### 18.01", "#### 18", False, False, True),
    ("#### 180", "#### 18", False, False, True),
    ("#### 0", "#### 0", True, True, True),
    ("#### 3/4", "#### 3", True, False, True),                    # the authors' pattern stops at the slash
    ("#### 3/4", "#### 4", False, False, True),
    ("#### 3/0", "#### 3", True, False, True),
    ("The answer is 18", "#### 18", False, True, False),
    ("18 apples and 3 pears.", "#### 18", False, False, False),
    ("18 apples and 3 pears.", "#### 3", False, True, False),
    ("no number at all", "#### 18", False, False, False),
    ("#### 7\nQuestion: 9+9?\nAnswer: 18\n#### 18", "#### 18", False, False, True),    # run-on text does not count
    ("#### 18\nQuestion: 3+4?\nAnswer: 7\n#### 7", "#### 18", True, True, True),
    ("7\nQuestion: 9+9?\nAnswer: 18\n#### 18", "#### 18", False, False, False),
    ("#### 7\n#### 18", "#### 18", False, False, True),                               # the first counts
    ("####\n#### 18", "#### 18", True, True, True),
    ("#### .", "#### 18", False, False, False),
    ("#### ,", "#### 18", False, False, False),
    ("#### 1.2.3", "#### 1", False, False, False),
    ("####", "#### 18", False, False, False),
    ("", "#### 18", False, False, False),
    ("", "#### 0", False, False, False),
])
def test_score(output, gold, strict, flexible, well_formed):
    assert score(output, " some steps\n" + gold) == (strict, flexible, well_formed)


@pytest.mark.parametrize("answers, chosen", [
    ([], None), ([None], None), ([None, None], None), ([7], 7), ([None, 7], 7), ([None, None, 7], 7), ([7, None, None, None], 7),
    ([1, 2, 2], 2), ([2, 1, 2], 2), ([1, 2], 1), ([2, 1], 2), ([3, 1, 1, 2, 2], 1), ([3, 2, 1, 1, 2], 2), ([None, 0, 5, 0], 0),
    ([0, 5], 0), ([1, None, 2, None, 2], 2),
])
def test_majority(answers, chosen):
    """The most frequent number; of equally frequent ones the first; nothing is no answer, zero is one."""
    assert majority(answers) == chosen and majority(iter(answers)) == chosen


@pytest.mark.parametrize("outputs, chosen, strict, flexible, well_formed", [
    (["a #### 7", "b #### 18", "c #### 18"], 1, True, True, True),                    # its first sample is the text
    (["a #### 18", "b #### 7"], 0, True, True, True),                                 # a tie: the first
    (["a #### 7", "b #### 18"], 0, False, False, True),
    (["none", "b #### 18", "none"], 1, True, True, True),
    (["none", "nothing"], 0, False, False, False),
    (["", ""], 0, False, False, False),
    (["18", "so 18", "#### 7"], 2, False, True, True),                                # strict and flexible vote apart
    (["18", "#### 7", "#### 7"], 1, False, False, True),
    (["7", "7", "#### 18"], 2, True, False, True),
    (["a #### 1,234", "b #### 18", "c #### 18.00"], 1, True, True, True),             # numbers are compared, not how they are written
    (["a #### 7\nQuestion: #### 18", "b #### 18", "c #### 7"], 0, False, False, True),
    (["7\nQuestion: 9+9?\n#### 18", "#### 18"], 1, True, False, True),                # flexible: 7 and 18, the first counts
])
def test_vote(outputs, chosen, strict, flexible, well_formed):
    assert vote(outputs, " some steps\n#### 18") == (outputs[chosen], strict, flexible, well_formed)


def test_a_gold_answer_without_a_number_is_never_met():
    """nothing equals nothing, so an empty output is flexibly right where gold has no strict number."""
    assert score("", "#### $18")[:2] == (False, False)
    assert score("no idea", "#### unknown")[:2] == (False, False)


def test_strict_is_the_authors_scoring():
    """On every short text of these signs: the pattern and the cleaning of grade_school_math/dataset.py, read as decimals."""
    for n in range(5):
        for text in map("".join, itertools.product("-1,.$", repeat=n)):
            match = re.compile(r"#### (\-?[0-9\.\,]+)").search(f"#### {text} x")
            theirs = match[1].strip().replace(",", "").rstrip(".") if match else ""
            want = Decimal(theirs) if re.fullmatch(r"-?(\d+\.?\d*|\.\d+)", theirs) else None
            assert strict_answer(f"#### {text} x") == want, text


def test_every_gold_answer_scores_itself(arithmetic):
    for problem in load_split(arithmetic, "test").problems:
        assert score(" " + problem.answer, problem.answer) == (True, True, True)
        want = int(problem.answer.split("#### ")[1])
        assert strict_answer(problem.answer) == flexible_answer(problem.answer) == want
        assert score(problem.answer.replace(f"#### {want}", f"#### {want + 1}"), problem.answer) == (False, False, True)


def test_gsm8k_answers_score_themselves():
    path = ROOT.parent / "shared/gsm8k/test.jsonl"
    if not path.exists():
        pytest.skip("needs ../shared/gsm8k")
    for line in path.read_text().splitlines():
        answer = json.loads(line)["answer"]
        assert score(answer, answer) == (True, True, True)
        assert strict_answer(answer) == int(answer.split("#### ")[1].replace(",", ""))


# ---------------------------------------------------------------------------------------------- statistics
@pytest.mark.parametrize("k, n, low, high", [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)])
def test_wilson_as_published(k, n, low, high):
    """Newcombe 1998, Table I, method 3."""
    assert wilson(k, n) == pytest.approx((low, high), abs=6e-5)


def test_wilson_holds_its_share():
    for n in range(1, 600):
        for k in (0, n):
            assert wilson(k, n)[0] <= k / n <= wilson(k, n)[1]            # rounding included: an error bar has no negative length


def test_wilson_by_definition():
    """The shares p for which k of n lies within z standard errors of p, found by bisection."""
    for n in (1, 2, 7, 40, 1319):
        for k in {0, 1, n // 3, n - 1, n}:
            far = lambda p: abs(k / n - p) - 1.96 * math.sqrt(p * (1 - p) / n)
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
            assert mcnemar(a, b) == (gained, lost, pytest.approx(want)) and sign_test(gained, lost) == pytest.approx(want)
    assert mcnemar([True] * 10 + [False] * 2, [False] * 9 + [True] * 3)[2] == pytest.approx(2 * (1 + 11 + 55) / 2 ** 11)
    assert mcnemar([False] * 1319, [True] * 1319)[2] < 1e-300


# --------------------------------------------------------------------------------------------------- main
@pytest.fixture
def out_dir(wild, tmp_path):
    """A copy of the random pair that may be written to."""
    return Path(shutil.copytree(wild, tmp_path / "wild", ignore=shutil.ignore_patterns("eval")))


@pytest.fixture
def run(out_dir, arithmetic, capsys, monkeypatch):
    """main, counting the problems that it generates answers for: (results, what it printed)."""
    generate = evaluate.generate
    def counted(model, prompts, *args):
        call.generated += len(prompts)
        return generate(model, prompts, *args)
    monkeypatch.setattr(evaluate, "generate", counted)
    def call(*args, out_dir=out_dir):
        call.generated = 0
        capsys.readouterr()
        evaluate.main([f"--out_dir={out_dir}", f"--data_dir={arithmetic}", "--max_new_tokens=12", "--batch_size=8", *args])
        return json.loads((out_dir / "eval/val.json").read_text()), capsys.readouterr().out
    return call


def records(out_dir, steps):
    (path,) = (out_dir / "eval").glob(f"val_*_steps{steps}.jsonl")
    return {r["id"]: r for r in map(json.loads, path.read_text().splitlines())}


def timeless(results):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in results["rows"]]


def test_results(run, out_dir, arithmetic, encoding):
    results, printed = run("--steps=1,2,4", "--limit=20", "--mistakes=2")
    assert run.generated == 60
    assert results["weights_sha256"] == hashlib.sha256((out_dir / "best.pt").read_bytes()).hexdigest()
    assert results["config"]["steps"] == "1,2,4" and results["config"]["seed"] == 0 and results["config"]["split"] == "val"
    assert results["torch"] == torch.__version__ and results["machine"] and results["command"]
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert results["commit"] in (git, f"{git}-dirty" if git else "")
    assert len(list((out_dir / "eval").glob("val_*.json"))) == 1 and not list((out_dir / "eval").glob("*.tmp"))

    problems, all_records = load_split(arithmetic, "val").problems, {T: records(out_dir, T) for T in (1, 2, 4)}
    for row, T in zip(results["rows"], (1, 2, 4), strict=True):
        rs = all_records[T]
        assert set(rs) == set(range(20)) and row["steps"] == T and row["n"] == 20 and row["solver"] == "euler"
        for i, r in rs.items():
            assert (r["strict"], r["flexible"], r["well_formed"]) == score(r["output"], problems[i].answer)
            assert r["nfe"] == (T - 1) * r["predicted"] and 1 <= r["predicted"] <= 12 and r["ended"] == (r["predicted"] < 12)
        mean = lambda key: sum(r[key] for r in rs.values()) / 20
        assert row["flexible"] == mean("flexible") and row["strict"] == mean("strict") and row["well_formed"] == mean("well_formed")
        assert row["cut"] == pytest.approx(1 - mean("ended")) and row["tokens"] == pytest.approx(mean("predicted"))
        assert row["nfe"] == T - 1 and row["interval"] == list(wilson(sum(r["strict"] for r in rs.values()), 20))
        assert re.search(rf"^ +{T}  +{T - 1}\.00  ", printed, re.M)
    assert "vs_first" not in results["rows"][0] and results["rows"][2]["vs_previous"][2] <= 1
    assert len({tuple(r["output"] for r in rs.values()) for rs in all_records.values()}) == 3   # each number of steps its own answers
    assert printed.count("wrong, steps=4") == 2 and all(p.question in printed for p in problems[:2])

    model, _, _ = sample.load(str(out_dir), "best")                       # and they are Algorithm 1's, whatever the batch
    for i in (3, 17):
        prompt = encoding.encode_ordinary(f"Question: {problems[i].question}\nAnswer:")
        (alone,) = evaluate.generate(model, [prompt], encoding.eot_token, 12, evaluate.Sampler(steps=4), None, 0, [i])
        assert encoding.decode(alone.tokens) == all_records[4][i]["output"]


def test_comparisons(run, arithmetic, monkeypatch, encoding):
    """Against the first row and the previous one, on the same questions."""
    right = {1: {0, 1, 2}, 2: {1, 2, 3, 4, 5, 6}, 4: {0, 4, 5, 6, 7, 8, 9, 10, 11}}
    problems = load_split(arithmetic, "val").problems
    def generate(model, prompts, eot, n, sampler, label, seed, ids):
        return [evaluate_output(problems[i].answer if i in right[sampler.steps] else "#### 100000") for i in ids]
    def evaluate_output(text):
        from diffusion import Generated
        return Generated(encoding.encode_ordinary(text), True, 1, 0)
    monkeypatch.setattr(evaluate, "generate", generate)
    results, printed = run("--steps=1,2,4", "--limit=20")
    rows = results["rows"]
    assert [r["strict"] for r in rows] == [3 / 20, 6 / 20, 9 / 20] and [r["flexible"] for r in rows] == [3 / 20, 6 / 20, 9 / 20]
    assert rows[1]["vs_first"] == rows[1]["vs_previous"] == [4, 1, pytest.approx(2 * (1 + 5) / 32)]
    assert rows[2]["vs_first"] == [8, 2, pytest.approx(2 * (1 + 10 + 45) / 1024)]
    assert rows[2]["vs_previous"] == [6, 3, pytest.approx(2 * (1 + 9 + 36 + 84) / 512)]
    assert "+8 -2 p=0.109" in printed and "+6 -3 p=0.508" in printed


@pytest.mark.parametrize("cut", [0, 1, 40, 700])
def test_goes_on_after_a_kill(cut, run, out_dir):
    """The file of answers cut in the middle of a line: only what is missing is generated, and the results are the same."""
    whole, _ = run("--steps=2", "--limit=20")
    assert run.generated == 20
    (path,) = (out_dir / "eval").glob("*.jsonl")
    bytes_, before = path.read_bytes(), records(out_dir, 2)
    path.write_bytes(bytes_[:len(bytes_) - cut])
    kept = bytes_[:len(bytes_) - cut].count(b"\n")
    assert (kept == 20) == (cut == 0)
    again, _ = run("--steps=2", "--limit=20")
    assert run.generated == 20 - kept and timeless(again) == timeless(whole)
    untimed = lambda rs: {i: {k: v for k, v in r.items() if k != "seconds"} for i, r in rs.items()}
    assert untimed(records(out_dir, 2)) == untimed(before) and len(path.read_text().splitlines()) == 20


@pytest.mark.parametrize("votes", [1, 3, 9])
def test_votes(votes, run, out_dir, arithmetic, encoding, monkeypatch):
    """The records are those of samples generated one by one and voted on by hand; a run cut short goes on to the same ones."""
    sizes, generate, problems = [], evaluate.generate, load_split(arithmetic, "val").problems[:12]
    monkeypatch.setattr(evaluate, "generate", lambda *args: (sizes.append(len(args[1])), generate(*args))[1])
    options = ["--steps=3", "--limit=12", "--temperature=0.4", f"--votes={votes}"]
    results, _ = run(*options)
    assert run.generated == 12 * votes and set(sizes) == {1: {8, 4}, 3: {6}, 9: {9}}[votes]      # rows of a batch of 8
    found = records(out_dir, 3)
    model, _, _ = sample.load(str(out_dir), "best")
    for i, problem in enumerate(problems):
        prompt = encoding.encode_ordinary(f"Question: {problem.question}\nAnswer:")
        alone = [generate(model, [prompt], encoding.eot_token, 12, evaluate.Sampler(steps=3, temperature=0.4), None, 0, [i * votes + j])[0]
                 for j in range(votes)]
        texts, gold = [encoding.decode(o.tokens) for o in alone], strict_answer(problem.answer)
        tally = lambda given: max((x for x in given if x is not None), key=given.count, default=None)
        strict, flexible = tally([strict_answer(text) for text in texts]), tally([flexible_answer(text) for text in texts])
        assert found[i].pop("seconds") > 0 and found[i] == {
            "id": i, "output": next((text for text in texts if strict_answer(text) == strict), texts[0]), "strict": strict == gold,
            "flexible": flexible == gold, "well_formed": strict is not None, "ended": all(o.ended for o in alone),
            "predicted": sum(o.predicted for o in alone), "nfe": sum(o.nfe for o in alone)}
        assert votes == 1 or len(set(texts)) > 1
    row = results["rows"][0]
    assert row["tokens"] == pytest.approx(sum(r["predicted"] for r in found.values()) / 12) and row["nfe"] == 2

    (path,) = (out_dir / "eval").glob("*.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:5]) + lines[5][:20])
    again, _ = run(*options)
    assert run.generated == 7 * votes and timeless(again) == timeless(results)
    assert {i: r | {"seconds": 0} for i, r in records(out_dir, 3).items()} == {i: r | {"seconds": 0} for i, r in found.items()}


def test_votes_count(run, arithmetic, monkeypatch, encoding):
    """Three samples of each problem, their answers given: what is right is what most of them say."""
    from diffusion import Generated
    problems, asked = load_split(arithmetic, "val").problems, []
    said = {0: "RRW", 1: "RWW", 2: "WRR", 3: "RWX", 4: "WRX", 5: "XXR", 6: "XXX"}     # right, wrong (always the same number), nothing
    text = lambda i, letter: {"R": problems[i].answer, "W": "#### 100000", "X": "no idea"}[letter]
    def generate(model, prompts, eot, n, sampler, label, seed, ids):
        asked.extend(ids)
        return [Generated(encoding.encode_ordinary(text(i // 3, said[i // 3][i % 3])), i != 1, 10, 4) for i in ids]
    monkeypatch.setattr(evaluate, "generate", generate)
    results, printed = run("--steps=2", "--limit=7", "--temperature=1", "--votes=3")
    (row,) = results["rows"]
    assert sorted(asked) == list(range(21))
    assert row["strict"] == row["flexible"] == 4 / 7 and row["well_formed"] == 6 / 7         # 0, 2, 3, 5
    assert row["tokens"] == 30 and row["nfe"] == 0.4 and row["cut"] == 1 / 7 and "30.0" in printed


@pytest.mark.parametrize("options, part", [(["--votes=0"], "votes=0"), (["--votes=-2", "--temperature=1"], "votes=-2"),
                                           (["--votes=2"], "--temperature")])
def test_votes_that_cannot_be(options, part, run):
    """k greedy answers are one answer k times."""
    with pytest.raises(UserError, match=part) as error:
        run("--steps=1", "--limit=2", *options)
    assert str(error.value).startswith("error: ") and "\n" not in str(error.value)


KILL = """
import os, signal, sys, evaluate
generate, calls = evaluate.generate, []
def killed(*args):
    calls.append(1)
    if len(calls) == 3: os.kill(os.getpid(), signal.SIGKILL)
    return generate(*args)
evaluate.generate = killed
evaluate.main(sys.argv[1:])
"""


def test_answers_are_kept_as_they_come(run, out_dir, arithmetic):
    """SIGKILL in its third batch: the answers of two are there, and the next run makes the rest."""
    killed = child(["-c", KILL], f"--out_dir={out_dir}", f"--data_dir={arithmetic}", "--max_new_tokens=12", "--batch_size=8", "--steps=2", "--limit=30")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(records(out_dir, 2)) == 16
    run("--steps=2", "--limit=30")
    assert run.generated == 14 and len(records(out_dir, 2)) == 30


def test_answers_are_not_mixed_up(run, out_dir):
    """Another limit or batch size shares them; another seed, sampler, label or checkpoint does not."""
    run("--steps=2", "--limit=8")
    run("--steps=2", "--limit=12", "--batch_size=5")
    assert run.generated == 4
    run("--steps=2", "--limit=6")
    assert run.generated == 0
    for change in ("--seed=1", "--temperature=1", "--t_end=0.9", "--solver=adaptive", "--label=1", "--use_label", "--max_new_tokens=9"):
        run("--steps=2", "--limit=4", change)
        assert run.generated == 4, change
    run("--steps=2", "--limit=4", "--temperature=1", "--votes=2")
    assert run.generated == 8
    checkpoint = load_checkpoint(out_dir / "best.pt")
    torch.save(checkpoint | {"step": 1}, out_dir / "best.pt")
    run("--steps=2", "--limit=4")
    assert run.generated == 4


def test_labels(run, arithmetic, monkeypatch):
    """use_label: every problem its own; label: the same for all; neither: none, which is index 4."""
    given, generate = {}, evaluate.generate
    def spy(model, prompts, eot, n, sampler, label, seed, ids):
        given.update(zip(ids, label))
        return generate(model, prompts, eot, n, sampler, label, seed, ids)
    monkeypatch.setattr(evaluate, "generate", spy)
    def labels(*args):
        given.clear()
        results, _ = run("--steps=2", "--limit=30", *args)
        return given, results["rows"][0]["nll"]
    problems = load_split(arithmetic, "val").problems
    assert labels("--use_label")[0] == {i: min(problems[i].answer.count("\n"), 4) - 1 for i in range(30)}
    assert len(set(given.values())) > 1
    assert set(labels("--label=2")[0].values()) == {2} and set(labels()[0].values()) == {4}
    nlls = [labels(*args)[1] for args in ([], ["--label=2"], ["--label=2", "--guidance=3"], ["--use_label"])]
    assert len(set(nlls)) == 3 and nlls[1] == nlls[2]             # two evaluations: the last, at one call, has no guidance


def by_hand(model, data, n):
    """The trunk's mean accuracy and -log p over all targets of n problems, one problem at a time, without padding."""
    hits, loss = [], []
    for i in range(n):
        tokens = torch.from_numpy(data.tokens[data.offsets[i]:data.offsets[i + 1]].astype(np.int64))
        mask = torch.from_numpy(data.mask[data.offsets[i]:data.offsets[i + 1]])[1:]
        with torch.no_grad():
            logits = model.trunk.head(model.trunk(tokens[None, :-1])[0][0])[mask]
        hits += (logits.argmax(-1) == tokens[1:][mask]).tolist()
        loss += F.cross_entropy(logits, tokens[1:][mask], reduction="none").tolist()
    return np.mean(hits), np.mean(loss)


def test_teacher_forced_at_one_step_is_the_trunk(run, l2d, arithmetic, tmp_path):
    copy = Path(shutil.copytree(l2d, tmp_path / "l2d", ignore=shutil.ignore_patterns("eval")))
    checkpoint = load_checkpoint(copy / "best.pt")
    checkpoint["model"]["path.w.2.weight"] *= 3                   # a louder path: T = 1 does not hear it, T = 3 does
    torch.save(checkpoint, copy / "best.pt")
    results, _ = run("--steps=1,3", "--limit=11", "--batch_size=4", "--exact_match=False", out_dir=copy)
    assert run.generated == 0 and "strict" not in results["rows"][0]
    model, _, _ = sample.load(str(l2d), "best")
    accuracy, nll = by_hand(model, load_split(arithmetic, "val"), 11)
    one, three = results["rows"]
    assert one["token_accuracy"] == pytest.approx(accuracy, abs=1e-9) and one["nll"] == pytest.approx(nll, rel=1e-5)
    assert abs(three["nll"] - nll) > 0.01                         # the path has its say
    answers = [p.answer for p in load_split(arithmetic, "val").problems[:11]]
    kinds = one["by_kind"]                                        # a number is one token, with the space or sign before it apart
    assert kinds["result"]["n"] == sum(answer.count(">>") for answer in answers)
    assert kinds["number"]["n"] == sum(len(re.findall(r"[0-9]+", answer)) for answer in answers) - kinds["result"]["n"]
    n = sum(kind["n"] for kind in kinds.values())
    assert sum(kind["n"] * kind["accuracy"] for kind in kinds.values()) / n == pytest.approx(accuracy)
    assert all(kind["nfe"] == 0 for kind in kinds.values()) and all(kind["nfe"] == 2 for kind in three["by_kind"].values())


def shorten(out_dir, n):
    """Make the checkpoint's model one of n positions."""
    checkpoint = load_checkpoint(out_dir / "best.pt")
    checkpoint["trunk_config"]["block_size"] = n
    checkpoint["model"]["trunk.wpe.weight"] = checkpoint["model"]["trunk.wpe.weight"][:n].clone()
    torch.save(checkpoint, out_dir / "best.pt")


def test_questions_that_do_not_fit_are_wrong(out_dir, arithmetic, encoding, tmp_path):
    data = load_split(arithmetic, "val")
    lengths = [len(encoding.encode_ordinary(f"Question: {p.question}\nAnswer:")) for p in data.problems[:40]]
    fits = sorted(lengths)[15]                                    # the longest question that fits fills the model
    shorten(out_dir, fits)
    model, _, _ = sample.load(str(out_dir), "best")
    config = evaluate.Config(max_new_tokens=12, batch_size=8)
    found = evaluate.answers(config, evaluate.Sampler(steps=2), model, encoding, data, 40, [4] * 500, str(tmp_path / "x.jsonl"))
    assert [r["id"] for r in found] == list(range(40)) and max(lengths) > fits
    for r, length in zip(found, lengths):
        assert (r["predicted"] == 0) == (length > fits) and r["predicted"] <= max(0, fits - length + 1)
        if length > fits:
            assert (r["output"], r["strict"], r["flexible"], r["well_formed"], r["ended"]) == ("", False, False, False, False)
    row = evaluate.summary(found, None, None)
    assert row["n"] == 40 and row["cut"] >= sum(length > fits for length in lengths) / 40


def test_examples_that_do_not_fit(run, out_dir):
    """a question or answer beyond the model's positions ends in an IndexError."""
    shorten(out_dir, 60)
    results, _ = run("--steps=1,2", "--limit=20")
    assert [row["n"] for row in results["rows"]] == [20, 20] and all(0 < row["nll"] < math.inf for row in results["rows"])


def test_without_git(run, monkeypatch, tmp_path):
    """on a machine without git, all is generated and then nothing written."""
    monkeypatch.setenv("PATH", str(tmp_path))
    results, _ = run("--steps=1", "--limit=2")
    assert results["commit"] == ""


def test_plot(run, out_dir, tmp_path):
    pytest.importorskip("matplotlib")
    control = Path(shutil.copytree(out_dir, tmp_path / "control"))
    run("--steps=1", "--limit=8", out_dir=control)
    _, printed = run("--steps=1,2", "--limit=8", "--plot", f"--controls={control}")
    (figure,) = (out_dir / "eval").glob("*.png")
    assert figure.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and figure.stat().st_size > 5000 and str(figure) in printed


@pytest.mark.parametrize("other", ["--temperature=1", "--limit=7", "--exact_match=False"])
def test_a_control_at_other_settings_is_refused(run, out_dir, tmp_path, other):
    """The last evaluation counts: a sampled or shorter one would be drawn beside greedy points."""
    pytest.importorskip("matplotlib")
    control = Path(shutil.copytree(out_dir, tmp_path / "control"))
    run("--steps=1", "--limit=8", other, out_dir=control)
    with pytest.raises(UserError, match=f"--out_dir={control} --split=val --steps=1 --temperature=0.0 --top_k=0 --votes=1 --limit=8"):
        run("--steps=1,2", "--limit=8", "--plot", f"--controls={control}")


def test_other_problems_need_other_answers(run, arithmetic, tmp_path):
    """The same folder's name, but data made anew."""
    data = Path(shutil.copytree(arithmetic, tmp_path / "data"))
    run("--steps=1", "--limit=4", f"--data_dir={data}")
    run("--steps=1", "--limit=4")
    assert run.generated == 0                                     # the same problems elsewhere
    lines = (data / "val.jsonl").read_text().splitlines(keepends=True)
    (data / "val.jsonl").write_text("".join([*lines[:-1], lines[0]]))
    run("--steps=1", "--limit=4", f"--data_dir={data}")
    assert run.generated == 4


def test_plot_draws_what_was_measured(tmp_path, monkeypatch):
    """Points, error bars and the controls' lines, read back from the axes."""
    plt = pytest.importorskip("matplotlib.pyplot")
    shown = []
    monkeypatch.setattr(plt, "close", shown.append)
    row = lambda nfe, k: {"nfe": nfe, "strict": k / 100, "interval": wilson(k, 100), "n": 100}
    evaluate.plot(tmp_path / "x.png", {"rows": [row(0, 30), row(3, 45)], "config": {"split": "val"}}, [("lora", {"rows": [row(0, 40)]})])
    (axes,) = shown[0].axes
    points, control = axes.lines[0], next(line for line in axes.lines if line.get_label() == "lora")
    assert points.get_xdata().tolist() == [0, 3] and points.get_ydata().tolist() == [0.3, 0.45] and set(control.get_ydata()) == {0.4}
    ends = sorted(y for bars in axes.collections if hasattr(bars, "get_segments") for (_, low), (_, high) in bars.get_segments() for y in (low, high))
    assert ends == pytest.approx(sorted([*wilson(30, 100), *wilson(45, 100)]))


def test_plot_without_exact_match(run):
    """without exact match there is nothing to draw, and it ends in a KeyError."""
    with pytest.raises(UserError, match="plot"):
        run("--steps=1", "--limit=2", "--exact_match=False", "--plot")


def test_one_label_or_each_its_own(run):
    with pytest.raises(UserError, match="choose one"):
        run("--steps=1", "--use_label", "--label=2")
