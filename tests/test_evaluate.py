"""evaluate.py and tasks/answers.py: answers, likelihoods, bookkeeping, each against an independent computation."""
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import Process, error_of, free_port, says

import evaluate
import tasks.answers
from bench.memory import Meter
from configurator import UserError
from decode import Continuation, DecodingConfig
from diffusion import Tables
from model import GPT, L2D, DiffusionPath, GPTConfig, PathConfig
from plumbing import batches
from plumbing.batches import choose_batch, count_row_bytes, fit_batch
from plumbing.dataset import load_manifest, load_split
from plumbing.tokenizer import describe_tokenizer
from plumbing.trained import load
from prepare_data import write_manifest, write_split
from tasks import few_shot, load_problems, score
from tasks.arithmetic import make_tokenizer
from tasks.problem import Problem, encode_problem, make_split
from tasks.report import wilson

ROOT = Path(__file__).resolve().parent.parent
LETTERS = " A", " B", " C", " D"


# -------------------------------------------------------------------------------------- what is evaluated
def made_up(folder, problems, **manifest):
    """Prepared data of other problems, {split: [Problem]}, by the tiny tokenizer."""
    encoding = make_tokenizer()
    names = list(dict.fromkeys(p.group for each in problems.values() for p in each))
    for split, each in problems.items():
        data = make_split([encode_problem(encoding, p) for p in each], [names.index(p.group) for p in each],
                          encoding.n_vocab)
        write_split(folder, split, data, [{k: v for k, v in p._asdict().items() if k != "place"} for p in each])
    known = dict(task="?", tokenizer=describe_tokenizer(encoding), prompt="{}", n_vocab=encoding.n_vocab,
                 eot=encoding.eot_token, shots="", counts={split: len(each) for split, each in problems.items()},
                 max_tokens=1, group_names=names)
    write_manifest(folder, known | manifest)
    return folder


@pytest.fixture(scope="session")
def questions(tmp_path_factory):
    """40 problems with four choices, 20 in law, 15 in art, 5 in math; and worked examples."""
    def problem(i):
        subject = "law" if i < 20 else "art" if i < 35 else "math"
        lines = "\n".join(f"{letter}. {3 * i + j}" for j, letter in enumerate("ABCD"))
        question = f"How many {'books ' * (i % 7)}are {i}?\n{lines}"
        prompt, answer = f"Question: {question}\nAnswer:", LETTERS[i * i % 4]
        return Problem(prompt, answer, "mmlu", "knowledge", subject, LETTERS)
    splits = {"val": [problem(i) for i in range(40)], "dev": [problem(i) for i in (47, 53, 59)]}
    return made_up(tmp_path_factory.mktemp("evaluated") / "questions", splits, shots="dev",
                   prompt="Question: {}\nAnswer:")


def random_pair(folder, manifest, positions=128, with_path=True, sampler=None):
    """out_dir of a random pair: a talkative trunk, and a path that changes its mind at every step."""
    generator = torch.manual_seed(0)                              # it draws the biases of the modules, too
    trunk = GPT(GPTConfig(positions, manifest["n_vocab"], 2, 2, 32))
    path_config = PathConfig(x_dim=16, t_dim=32, sigma=4.0)
    model = L2D(trunk, DiffusionPath(trunk, path_config, len(manifest["group_names"])) if with_path else None)
    tensors = {}
    for name, w in model.state_dict().items():
        std = {"trunk.wte.weight": 0.4, "path.w.2.weight": 0.02}.get(name, 0.3)
        tensors[name] = std * torch.randn(w.shape, generator=generator) if w.dim() == 2 else w
    folder.mkdir()
    torch.save({"trunk_config": vars(trunk.config), "trunk_lora": None, "trunk_sha256": None,
                "path_config": vars(path_config) if with_path else None, "n_groups": model.no_group,
                "model": tensors, "config": {"data_dir": "data/arithmetic"}, "data": manifest, "world": 1,
                "iter_num": 1, "best_val_loss": 1.0, "tokenizer": manifest["tokenizer"], "sampler": sampler or {}},
               folder / "best.pt")
    return folder


@pytest.fixture
def out_dir(arithmetic, tmp_path):
    return random_pair(tmp_path / "wild", load_manifest(arithmetic))


@pytest.fixture
def run(out_dir, arithmetic, capsys, monkeypatch):
    """main, counting the answers that it has written: (results, what it printed)."""
    generate = evaluate.generate
    def counted(model, prompts, *args, **named):
        call.generated += len(prompts)
        return generate(model, prompts, *args, **named)
    monkeypatch.setattr(evaluate, "generate", counted)
    def call(*args, out_dir=out_dir, data_dir=arithmetic):
        call.generated = 0
        capsys.readouterr()
        evaluate.main([f"--out_dir={out_dir}", f"--data_dir={data_dir}", "--max_new_tokens=12",
                       "--batch_size=8", *args])
        printed = capsys.readouterr().out
        return json.loads(Path(re.search(r"written to (.*\.json)", printed)[1]).read_text()), printed
    return call


def answers_of(out_dir, results, steps):
    """{id: record} of the file that a row names. Lines that are damaged are left out."""
    (row,) = (row for row in results["rows"] if row["steps"] == steps)
    records = {}
    for line in (out_dir / "eval" / row["answers"]).read_text().splitlines():
        with suppress(ValueError):
            record = json.loads(line)
            records[record["id"]] = record
    return records


def timeless(x):
    """Rows or records without what differs from run to run."""
    if isinstance(x, dict):
        return {k: timeless(v) for k, v in x.items() if k not in ("seconds", "command", "commit", "computed")}
    return [timeless(each) for each in x] if isinstance(x, list) else x


# --------------------------------------------------------------------------------------------- answers
def test_results(run, out_dir, arithmetic, encoding):
    """Every number of the table from the records; the records from texts written alone, and scored alone."""
    results, printed = run("--steps=1,2,4", "--limit=20", "--mistakes=2")
    assert run.generated == 60
    sha256 = hashlib.sha256((out_dir / "best.pt").read_bytes()).hexdigest()
    assert results["weights_sha256"] == results["rows"][0]["weights_sha256"] == sha256
    assert results["config"]["steps"] == "1,2,4" and results["config"]["split"] == "val"
    assert results["torch"] == torch.__version__ and results["machine"] and results["command"]
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    assert results["commit"].removesuffix("-dirty") == git.stdout.strip()

    problems = load_problems(arithmetic, "val")
    all_records = {T: answers_of(out_dir, results, T) for T in (1, 2, 4)}
    all_scores = {T: [score(problems[i], r["texts"][0]) for i, r in sorted(records.items())]
                  for T, records in all_records.items()}
    for row, T in zip(results["rows"], (1, 2, 4), strict=True):
        records = all_records[T]
        assert set(records) == set(range(20)) and row["steps"] == T and row["n"] == 20
        for i, r in records.items():
            assert r["nfe"] == (T - 1) * r["predicted"] <= r["computed"] and 1 <= r["predicted"] <= 12
            assert r["ended"] == (r["predicted"] < 12) and len(r["texts"]) == 1
        def mean(key):
            return sum(r[key] for r in records.values()) / 20
        means = [sum(score) / 20 for score in zip(*all_scores[T])]
        assert [row["strict"], row["flexible"], row["well_formed"]] == means
        assert row["right"] == [int(s.right) for s in all_scores[T]]
        assert row["cut"] == pytest.approx(1 - mean("ended")) and row["tokens"] == mean("predicted")
        assert row["nfe"] == T - 1 and row["computed"] == pytest.approx(mean("computed") / mean("predicted"))
        assert row["interval"] == list(wilson(sum(row["right"]), 20))
        assert re.search(rf"^{T}  +{T - 1}\.00  ", printed, re.M)
    assert len({tuple(r["texts"][0] for r in records.values()) for records in all_records.values()}) == 3
    assert printed.count("wrong, steps=4") == 2 and all(p.prompt in printed for p in problems[:2])

    model, _, _ = load(str(out_dir))                              # they are Algorithm 1's, whatever the batch
    for i in (3, 17):
        prompt = encoding.encode_ordinary(problems[i].prompt)
        decoding = DecodingConfig(steps=4, max_new_tokens=12, draft=0)
        (alone,) = evaluate.generate(model, [prompt], encoding.eot_token, decoding, None, [i])
        assert encoding.decode(alone.tokens) == all_records[4][i]["texts"][0]


def saying(monkeypatch, encoding, text):
    """Have texts written by text(steps, id) in place of the model, unless they are traced."""
    by_model = evaluate.generate
    def generate(model, prompts, eot, decoding, groups, ids, trace=False, tables=None):
        if trace:
            return by_model(model, prompts, eot, decoding, groups, ids, trace)
        return [Continuation(encoding.encode_ordinary(text(decoding.steps, i)), True, 10, 4, 5) for i in ids]
    monkeypatch.setattr(evaluate, "generate", generate)


RIGHT = {1: {0, 1, 2}, 2: {1, 2, 3, 4, 5, 6}, 4: {0, 4, 5, 6, 7, 8, 9, 10, 11}}


def test_comparisons(run, arithmetic, monkeypatch, encoding):
    """Against the first row and the previous one, on the same questions."""
    problems = load_problems(arithmetic, "val")
    saying(monkeypatch, encoding, lambda T, i: problems[i].answer if i in RIGHT[T] else "#### 100000")
    results, printed = run("--steps=1,2,4", "--limit=20")
    one, two, four = results["rows"]
    assert [r["strict"] for r in results["rows"]] == [3 / 20, 6 / 20, 9 / 20] and "vs_first" not in one
    assert two["vs_first"] == two["vs_previous"] == {"steps": 1, "gained": 4, "lost": 1,
                                                     "p": pytest.approx(2 * (1 + 5) / 32)}
    assert four["vs_first"]["p"] == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert four["vs_previous"] == {"steps": 2, "gained": 6, "lost": 3,
                                   "p": pytest.approx(2 * (1 + 9 + 36 + 84) / 512)}
    assert "+8 -2 p=0.109" in printed and "+6 -3 p=0.508" in printed


@pytest.mark.parametrize("votes", [1, 5])
def test_votes(votes, run, out_dir, arithmetic, encoding):
    """The texts are those of samples generated one by one, and their votes are counted by hand."""
    results, _ = run("--steps=3", "--limit=6", "--temperature=0.4", f"--votes={votes}")
    assert run.generated == 6 * votes
    (row,) = results["rows"]
    found, problems = answers_of(out_dir, results, 3), load_problems(arithmetic, "val")
    model, _, _ = load(str(out_dir))
    decoding = DecodingConfig(steps=3, temperature=0.4, max_new_tokens=12)
    def number(text):
        match = re.search(r"#### (-?[0-9,]+)", text.split("\nQuestion:")[0])
        return match and int(match[1].replace(",", ""))
    for i in range(6):
        prompt = encoding.encode_ordinary(problems[i].prompt)
        alone = [evaluate.generate(model, [prompt], encoding.eot_token, decoding, None, [i * votes + j])[0]
                 for j in range(votes)]
        texts = [encoding.decode(o.tokens) for o in alone]
        counts = Counter(number(text) for text in texts if number(text) is not None)
        chosen = max(counts, key=counts.get) if counts else None
        r = found[i]
        scores = tasks.answers.score_texts(problems[i], texts, voted=True, run_code=False)
        assert r["texts"] == texts
        assert scores["output"] == next((text for text in texts if number(text) == chosen), texts[0])
        assert row["right"][i] == scores["strict"] == (chosen == number(problems[i].answer))
        assert scores["well_formed"] == (chosen is not None)
        assert r["predicted"] == sum(o.predicted for o in alone) and r["nfe"] == sum(o.nfe for o in alone)
        assert votes == 1 or len(set(texts)) > 1


def test_no_more_texts_are_written_at_once_than_batch_size_says(run, monkeypatch):
    generate, sizes = evaluate.generate, []
    monkeypatch.setattr(evaluate, "generate", lambda model, prompts, *args, **named: sizes.append(len(prompts)) or
                        generate(model, prompts, *args, **named))
    run("--steps=1", "--limit=4", "--votes=19", "--temperature=1")
    assert sizes == 4 * [8, 8, 3]


def short_of_memory(monkeypatch, most):
    """Writing more than `most` texts at once runs out of memory, half-way. Returns the sizes that were tried."""
    generate, sizes = evaluate.generate, []
    def limited(model, prompts, *args, **named):
        sizes.append(len(prompts))
        if len(prompts) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return generate(model, prompts, *args, **named)
    monkeypatch.setattr(evaluate, "generate", limited)
    return sizes


def test_memory_that_runs_out_halves_the_batch_and_loses_no_text(run, out_dir, monkeypatch):
    """The same answers, each written once; it stays at the size that fits, also for the next T."""
    expected = answers_of(out_dir, run("--steps=1", "--limit=13")[0], 1)
    for file in (out_dir / "eval").iterdir():
        file.unlink()
    sizes = short_of_memory(monkeypatch, 3)
    results, printed = run("--steps=1", "--limit=13")
    found = answers_of(out_dir, results, 1)
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 2, 1] and timeless(found) == timeless(expected) and len(found) == 13
    notes = [line for line in printed.splitlines() if line.startswith("note: out of")]
    assert notes == ["note: out of memory with 8 texts side by side: going on with 4",
                     "note: out of memory with 4 texts side by side: going on with 2"]


def test_texts_written_before_the_memory_ran_out_for_good_are_kept(run, out_dir, monkeypatch):
    sizes = short_of_memory(monkeypatch, 8)
    with monkeypatch.context() as m:
        short = short_of_memory(m, 8)
        calls = []
        def later(*args, **named):                                # nothing fits from the second batch on
            calls.append(1)
            if len(calls) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return limited(*args, **named)
        limited = evaluate.generate
        m.setattr(evaluate, "generate", later)
        says(error_of(run, "--steps=1", "--limit=13"), "out of memory", "lower batch_size")
        assert short == [8] and len(calls) == 1 + 3               # 5, 2 and 1 texts did not fit
    del sizes[:]
    run("--steps=1", "--limit=13")
    assert sizes == [5]                                           # the first eight are there


@pytest.mark.parametrize("options, with_path", [
    (dict(steps=1), False), (dict(steps=1), True), (dict(steps=4, draft=0, ahead=0), True),
    (dict(steps=8, draft=0), True), (dict(steps=8, draft=8), True)])
def test_the_memory_of_a_text_is_about_what_is_measured(options, with_path):
    """Bytes of live tensors at the peak, of twelve texts against four: between what is counted and a third of it."""
    torch.manual_seed(0)
    trunk = GPT(GPTConfig(256, 2000, 3, 4, 64))
    model = L2D(trunk, DiffusionPath(trunk, PathConfig(x_dim=32, t_dim=32), 1) if with_path else None).requires_grad_(False)
    config = DecodingConfig(max_new_tokens=100, **options)
    tables = Tables(model) if with_path else None

    def peak(n):
        with Meter() as meter:
            evaluate.generate(model, [[1] * 60] * n, -1, config, tables=tables)
        return meter.peak
    peak(4), peak(12)                                             # what calls cost is measured the first time
    measured = (peak(12) - peak(4)) / 8
    counted = count_row_bytes(model, config, 60)
    assert measured < counted < 3 * measured, (measured, counted)


def test_a_gpu_gets_the_batch_that_fits_and_says_so(monkeypatch, capsys):
    assert [fit_batch(10 ** 10, size) for size in (1, 10 ** 8, 8 * 10 ** 9 // 64, 9 * 10 ** 9, 10 ** 12)] == [256, 64, 64, 1, 1]
    model = SimpleNamespace(trunk=SimpleNamespace(wte=torch.nn.Embedding(2, 2)))
    assert choose_batch(model, None, 1, print) == 64 and capsys.readouterr().out == ""
    model.trunk.wte = SimpleNamespace(weight=SimpleNamespace(device=torch.device("cuda", 0)))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (16 * 10 ** 9, 80 * 10 ** 9))
    monkeypatch.setattr(batches, "count_row_bytes", lambda model, config, longest: longest * 10 ** 6)
    assert choose_batch(model, None, 100, print) == 128
    says("error: " + capsys.readouterr().out, "batch_size=128", "100 MB", "16.0 GB")


def test_votes_and_samples_count(run, arithmetic, monkeypatch, encoding):
    """Three samples of each problem, given: the majority counts, or each of them does."""
    problems = load_problems(arithmetic, "val")
    said = ["RRW", "RWW", "WRR", "RWX", "WRX", "XXR", "XXX"]
    def text(T, i):
        say = {"R": problems[i // 3].answer, "W": "#### 100000", "X": "no idea"}
        return say[said[i // 3][i % 3]]
    saying(monkeypatch, encoding, text)
    (row,) = run("--steps=2", "--limit=7", "--temperature=1", "--votes=3")[0]["rows"]
    assert row["strict"] == row["flexible"] == 4 / 7 and row["well_formed"] == 6 / 7      # 0, 2, 3, 5
    assert row["tokens"] == 30 and row["nfe"] == 0.4 and row["computed"] == 0.5
    results, printed = run("--steps=2", "--limit=7", "--temperature=1", "--samples=3")
    (row,) = results["rows"]
    right = [word.count("R") for word in said]
    assert row["strict"] == pytest.approx(sum(right) / 21) == pytest.approx(row["pass_at"]["1"])
    assert row["pass_at"]["3"] == pytest.approx(6 / 7) and "pass@3" in printed
    assert row["well_formed"] == pytest.approx((21 - 7) / 21)


def test_answers_are_not_mixed_up(run, out_dir):
    """Another limit shares them, in float32 another batch size; what changes an answer, its path calls, or the
    weights, does not."""
    run("--steps=2", "--limit=8")
    for same in ("--batch_size=5", "--mistakes=0"):
        run("--steps=2", "--limit=12", same)
        assert run.generated == (4 if same == "--batch_size=5" else 0), same
    for batch in (8, 5):                                          # in bfloat16 its size rounds otherwise
        run("--steps=2", "--limit=4", "--dtype=bfloat16", f"--batch_size={batch}")
        assert run.generated == 4, batch
    run("--steps=2", "--limit=6")
    assert run.generated == 0
    for change in ("--seed=1", "--draft=0", "--temperature=1", "--t_end=0.9", "--solver=adaptive", "--group=2 steps",
                   "--use_group", "--max_new_tokens=9", "--stop=0.5", "--guess=mean"):
        run("--steps=2", "--limit=4", change)
        assert run.generated == 4, change
    checkpoint = torch.load(out_dir / "best.pt")
    torch.save(checkpoint | {"iter_num": 2}, out_dir / "best.pt")
    run("--steps=2", "--limit=4")
    assert run.generated == 4


def test_other_problems_need_other_answers(run, arithmetic, tmp_path):
    """The same folder's name, but data made anew; the same problems elsewhere are the same."""
    data = Path(shutil.copytree(arithmetic, tmp_path / "data"))
    run("--steps=1", "--limit=4", data_dir=data)
    run("--steps=1", "--limit=4")
    assert run.generated == 0
    rows = [json.loads(line) for line in (data / "val.jsonl").read_text().splitlines()]
    rows[-1]["answer"] = rows[-1]["answer"].replace("####", "So ####")
    (data / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("--steps=1", "--limit=4", data_dir=data)
    assert run.generated == 4


def test_answers_are_filed_under_the_weights_that_were_loaded(run, out_dir, monkeypatch):
    """best.pt is replaced while its answers are written, as a training does."""
    loaded, generate = (out_dir / "best.pt").read_bytes(), evaluate.generate
    def replaced(*args, **named):
        (out_dir / "best.pt").write_bytes(b"of another step")
        return generate(*args, **named)
    monkeypatch.setattr(evaluate, "generate", replaced)
    results, _ = run("--steps=1", "--limit=2")
    assert results["weights_sha256"] == hashlib.sha256(loaded).hexdigest()


def test_a_small_evaluation_replaces_no_large_one(run, out_dir):
    large, _ = run("--steps=1,2", "--limit=20")
    files = {path: path.read_bytes() for path in (out_dir / "eval").glob("*.json")}
    small, _ = run("--steps=1,2", "--limit=5")
    assert run.generated == 0 and [row["n"] for row in small["rows"]] == [5, 5]
    assert all(path.read_bytes() == before for path, before in files.items())
    more, _ = run("--steps=4", "--limit=20")                      # other steps: a row more, in the same file
    assert [row["steps"] for row in more["rows"]] == [1, 2, 4]
    assert timeless(more["rows"][:2]) == timeless(large["rows"]) and "vs_first" not in more["rows"][2]


def test_all_problems_have_a_name_of_their_own(run, out_dir, arithmetic):
    """The limit of all there are is no limit."""
    n = len(load_problems(arithmetic, "val"))
    for limit in (n, 0, n + 1):
        run("--steps=1", f"--limit={limit}", "--exact_match=False")
    (path,) = (out_dir / "eval").glob("*.json")
    assert re.fullmatch("val_[0-9a-f]{8}.json", path.name)


# ------------------------------------------------------------------------- what a file is believed for
def test_scores_are_those_of_the_present_scorer(run, monkeypatch):
    """Texts are kept, scores are not: after a change of the scorer nothing is written, and all is scored anew."""
    before, _ = run("--steps=1,2", "--limit=10")
    run("--steps=4", "--limit=10")
    vote = tasks.answers.vote
    monkeypatch.setattr(tasks.answers, "vote", lambda *args: (vote(*args)[0], tasks.Score(True, True, True)))
    monkeypatch.setattr(evaluate, "hash_scorer", lambda: "of another scorer")
    after, printed = run("--steps=1,2", "--limit=10")
    assert run.generated == 0 and [row["strict"] for row in after["rows"]] == [1, 1] != before["rows"][0]["strict"]
    assert "had rows of steps=4 that another scorer" in printed and before["depends"] != after["depends"]
    monkeypatch.undo()
    again, _ = run("--steps=1,2", "--limit=10", out_dir=Path(before["config"]["out_dir"]))
    assert timeless(again["rows"]) == timeless(before["rows"])


def test_a_change_in_tasks_is_another_scorer(monkeypatch, tmp_path):
    real = tasks.answers.hash_scorer()
    for path in Path(tasks.__file__).parent.glob("*.py"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(tasks.answers, "__file__", str(tmp_path / "answers.py"))
    assert tasks.answers.hash_scorer() == real
    with open(tmp_path / "scoring.py", "a") as file:
        file.write("# changed")
    assert tasks.answers.hash_scorer() != real


def test_answers_are_not_believed_by_the_name_of_their_file(run, out_dir, arithmetic, tmp_path):
    """The file of T = 1 under the name of T = 2, and that of another model: neither is read. What is added is."""
    one, two = run("--steps=1,2", "--limit=6")[0]["rows"]
    path = out_dir / "eval" / two["answers"]
    own = path.read_text()
    shutil.copy(out_dir / "eval" / one["answers"], path)
    again, _ = run("--steps=2", "--limit=6")
    assert run.generated == 6 and again["rows"][1]["right"] == two["right"]
    other = random_pair(tmp_path / "other", load_manifest(arithmetic), sampler={"guess": "argmax"})
    row = run("--steps=2", "--limit=6", out_dir=other)[0]["rows"][0]
    (other / "eval" / row["answers"]).write_text(own)
    run("--steps=2", "--limit=6", out_dir=other)
    assert run.generated == 6
    run("--steps=2", "--limit=6")
    assert run.generated == 0


def test_results_are_not_believed_by_the_name_of_their_file(run, out_dir):
    """Rows of another seed under this one's name are left out, and the note says so."""
    run("--steps=1", "--limit=4")
    (path,) = (out_dir / "eval").glob("*.json")
    run("--steps=2", "--limit=4", "--seed=7")
    (other,) = set((out_dir / "eval").glob("*.json")) - {path}
    shutil.copy(other, path)
    results, printed = run("--steps=1", "--limit=4")
    assert [row["steps"] for row in results["rows"]] == [1] and "had rows of steps=2" in printed
    assert results["depends"]["seed"] == 0 and results["depends"]["n"] == 4


# --------------------------------------------------------------------------------- cut, damaged, at once
@pytest.mark.parametrize("cut", [0, 1, 40, 700])
def test_goes_on_after_a_cut(cut, run, out_dir):
    """The file of answers cut within a line: what is missing is written, the results are the same."""
    whole, _ = run("--steps=2", "--limit=20")
    path = out_dir / "eval" / whole["rows"][0]["answers"]
    bytes_, before = path.read_bytes(), answers_of(out_dir, whole, 2)
    path.write_bytes(bytes_[:len(bytes_) - cut])
    kept = 0
    for line in filter(None, path.read_bytes().split(b"\n")):
        try:
            kept += "id" in json.loads(line)
        except ValueError:
            pass
    assert (kept == 20) == (cut < 2)
    again, _ = run("--steps=2", "--limit=20")
    assert run.generated == 20 - kept and timeless(again["rows"]) == timeless(whole["rows"])
    assert timeless(answers_of(out_dir, again, 2)) == timeless(before)


DAMAGED = [dict(texts=["a", "b"]), dict(texts="a"), dict(texts=[3]), dict(texts=None), dict(nfe=None), dict(computed=[3]),
           dict(predicted=-2), dict(seconds=math.nan), dict(id="3"), dict(ended=2), dict(key="of another model"),
           dict(key=None)]


@pytest.mark.parametrize("damage", [b'{"id": 3, "outp', b"\0" * 300, b"[]", b'{"id": 3}', b"\xff\xfe", b"7",
                                    *DAMAGED])
def test_a_damaged_line_costs_that_line(damage, run, out_dir):
    """damage: what is in place of the line, or what is changed in it."""
    whole, _ = run("--steps=1", "--limit=10")
    path = out_dir / "eval" / whole["rows"][0]["answers"]
    lines = [line for line in path.read_bytes().split(b"\n") if line]
    (lost,) = [i for i, line in enumerate(lines) if json.loads(line)["id"] == 3]
    if isinstance(damage, dict):
        damage = json.dumps(json.loads(lines[lost]) | damage).encode()
    path.write_bytes(b"\n".join([*lines[:lost], damage, *lines[lost + 1:]]))
    again, _ = run("--steps=1", "--limit=10")
    assert run.generated == 1 and timeless(again["rows"]) == timeless(whole["rows"])


SMALL = "--max_new_tokens=12", "--batch_size=8", "--steps=2", "--limit=30"


def stop_in_the_third_batch(number):
    generate, calls = evaluate.generate, []
    def stopping(*args, **named):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return generate(*args, **named)
    evaluate.generate = stopping


@pytest.mark.parametrize("number, status", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_answers_are_kept_as_they_come(number, status, run, out_dir, arithmetic, tmp_path):
    """Stopped in the third batch: the answers of two are there, and the next run makes the rest."""
    stopped = Process(tmp_path / "log", "evaluate", [f"--out_dir={out_dir}", f"--data_dir={arithmetic}", *SMALL],
                      before=partial(stop_in_the_third_batch, number))
    assert stopped.wait() == status and "Traceback" not in stopped.err(), stopped.err()
    (path,) = (out_dir / "eval").glob("*.jsonl")
    assert path.read_bytes().count(b"\n") == 16
    results, _ = run("--steps=2", "--limit=30")
    assert run.generated == 14 and set(answers_of(out_dir, results, 2)) == set(range(30))


def test_two_ranks_are_one_process(run, questions, tmp_path):
    """40 problems over two ranks: the same answers, none twice, the same rows and letters, one table."""
    one_folder = random_pair(tmp_path / "one", load_manifest(questions))
    two_folder = Path(shutil.copytree(one_folder, tmp_path / "two"))
    options = [f"--data_dir={questions}", "--max_new_tokens=12", "--batch_size=8", "--steps=1,3"]
    shared = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    ranks = [Process(tmp_path / f"rank{rank}", "evaluate", [f"--out_dir={two_folder}", *options], RANK=rank,
                     LOCAL_RANK=rank, **shared) for rank in "01"]
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].err() + ranks[1].err()
    printed = ranks[0].out()
    assert ranks[1].out() == "" and printed.count("written to") == 1
    one, _ = run("--steps=1,3", out_dir=one_folder, data_dir=questions)
    two = json.loads(Path(re.search(r"written to (.*\.json)", printed)[1]).read_text())
    for a, b in zip(one["rows"], two["rows"], strict=True):
        text = (two_folder / "eval" / b["answers"]).read_text()
        assert sorted(json.loads(line)["id"] for line in text.split("\n") if line) == list(range(40))
        found = answers_of(two_folder, two, b["steps"])
        assert timeless(found) == timeless(answers_of(one_folder, one, b["steps"]))
        for name in ("nll", "p_true", "entropy"):                 # the ranks' sums are added up in another order
            assert b.pop(name) == pytest.approx(a.pop(name), rel=1e-12)
        assert timeless(a) == timeless(b) and a["choices"]["right"] == b["choices"]["right"]


def test_runs_at_once_in_one_folder(run, out_dir, arithmetic, tmp_path):
    """Two processes with steps in common: all answers whole, one file of results with all rows."""
    common = [f"--out_dir={out_dir}", f"--data_dir={arithmetic}", "--max_new_tokens=12", "--batch_size=4", "--limit=24"]
    processes = [Process(tmp_path / f"log{T}", "evaluate", [*common, f"--steps={T}"]) for T in ("1,2,4", "2,4,8")]
    assert [process.wait() for process in processes] == [0, 0], processes[0].err() + processes[1].err()
    (path,) = (out_dir / "eval").glob("*.json")
    together = json.loads(path.read_text())
    assert [row["steps"] for row in together["rows"]] == [1, 2, 4, 8]
    alone, _ = run("--steps=1,2,4,8", "--limit=24")
    assert run.generated == 0
    for row, other in zip(together["rows"], alone["rows"]):
        assert (row["strict"], row["nll"], row["n"]) == (other["strict"], other["nll"], 24)
    for path in (out_dir / "eval").glob("*.jsonl"):
        assert all(json.loads(line)["id"] in range(24) for line in path.read_text().split("\n") if line)
    assert not list((out_dir / "eval").glob("*.tmp"))


def test_a_folder_that_cannot_be_written(run, out_dir):
    (out_dir / "eval").write_text("no folder")
    with pytest.raises((UserError, OSError)):
        run("--steps=1", "--limit=2")
    (out_dir / "eval").unlink()
    results, _ = run("--steps=1", "--limit=2")
    path = out_dir / "eval" / results["rows"][0]["answers"]
    path.unlink()
    path.mkdir()
    with pytest.raises((UserError, OSError)):
        run("--steps=1", "--limit=2")


# ------------------------------------------------------------------------------------- teacher-forced
def by_hand(model, data, n):
    """The trunk's mean accuracy and -log p over all targets of n problems, one at a time, without padding."""
    hits, loss = [], []
    for i in range(n):
        tokens = torch.from_numpy(data.tokens[data.offsets[i]:data.offsets[i + 1]].astype(np.int64))
        mask = torch.from_numpy(data.mask[data.offsets[i]:data.offsets[i + 1]])[1:]
        with torch.no_grad():
            logits = model.trunk.head(model.trunk(tokens[None, :-1])[0][0])[mask]
        hits += (logits.argmax(-1) == tokens[1:][mask]).tolist()
        loss += F.cross_entropy(logits, tokens[1:][mask], reduction="none").tolist()
    return np.mean(hits), np.mean(loss)


def test_teacher_forced_at_one_step_is_the_trunk(run, out_dir, arithmetic):
    results, _ = run("--steps=1,3", "--limit=41", "--exact_match=False")
    assert run.generated == 0 and "strict" not in results["rows"][0]
    model, _, _ = load(str(out_dir))
    accuracy, nll = by_hand(model, load_split(arithmetic, "val"), 41)
    one, three = results["rows"]
    assert one["token_accuracy"] == pytest.approx(accuracy, abs=1e-9)
    assert one["nll"] == pytest.approx(nll, rel=1e-5)
    assert abs(three["nll"] - nll) > 0.01                         # the path has its say
    answers = [p.answer for p in load_problems(arithmetic, "val")[:41]]
    kinds = one["by_kind"]                                        # a number is one token, its sign apart
    assert kinds["result"]["n"] == sum(answer.count(">>") for answer in answers)
    n_numbers = sum(len(re.findall(r"[0-9]+", answer)) for answer in answers)
    assert kinds["number"]["n"] == n_numbers - kinds["result"]["n"]
    n = sum(kind["n"] for kind in kinds.values())
    assert sum(kind["n"] * kind["accuracy"] for kind in kinds.values()) / n == pytest.approx(accuracy)
    assert all(kind["nfe"] == 0 for kind in kinds.values())
    assert all(kind["nfe"] == 2 for kind in three["by_kind"].values())


def test_probability_and_entropy_of_the_trunk(run, out_dir, arithmetic):
    """The mean of p(true token), and of -sum p log p, over all targets, in float64."""
    row = run("--steps=1", "--limit=9", "--exact_match=False")[0]["rows"][0]
    model, encoding, _ = load(str(out_dir))
    p_true, entropy = [], []
    for problem in load_problems(arithmetic, "val")[:9]:
        prompt, answer = encode_problem(encoding, problem)
        with torch.no_grad():
            logits = model.trunk.head(model.trunk(torch.tensor([(prompt + answer)[:-1]]))[0])[0]
        p = logits[len(prompt) - 1:].double().softmax(-1)
        p_true += [p[i, token].item() for i, token in enumerate(answer)]
        entropy += (-(p * p.log()).sum(-1)).tolist()
    assert row["p_true"] == pytest.approx(np.mean(p_true), rel=1e-5)
    assert row["entropy"] == pytest.approx(np.mean(entropy), rel=1e-5)


def test_what_is_said_of_a_prediction():
    """More positions than one chunk, a uniform and a certain one among them; a probability may be 0."""
    logits = torch.randn(300, 7, generator=torch.Generator().manual_seed(0))
    logits[0] = 0
    logits[1] = torch.tensor([0.0, 2000, 0, 0, 0, 0, 0])
    y = torch.arange(300) % 7
    right, nll, p_true, entropy = evaluate.judge(logits, y)
    assert torch.equal(nll, F.cross_entropy(logits, y, reduction="none"))
    assert torch.equal(right, (logits.argmax(-1) == y).float()) and torch.allclose(p_true, (-nll).exp())
    expected = torch.distributions.Categorical(logits=logits).entropy()
    assert torch.allclose(entropy, expected, atol=1e-6)
    assert entropy[0] == pytest.approx(math.log(7)) and entropy[1] == 0


def test_a_checkpoint_chooses_how_it_is_sampled(run, arithmetic, tmp_path):
    """A path of --unroll is sampled with its own solver and guess, unless an option says otherwise."""
    own = random_pair(tmp_path / "own", load_manifest(arithmetic),
                      sampler={"solver": "fixed_point", "guess": "mean"})
    asked = "--steps=3", "--limit=5"
    chosen, printed = run(*asked, out_dir=own)
    assert "note: --solver=fixed_point --guess=mean, because this path was trained with --unroll" in printed
    typed, _ = run(*asked, "--solver=fixed_point", "--guess=mean", out_dir=own)
    assert run.generated == 0 and typed["depends"] == chosen["depends"]
    euler, printed = run(*asked, "--solver=euler", out_dir=own)
    assert euler["rows"][0]["nll"] != chosen["rows"][0]["nll"] and "note: --guess=mean, because" in printed
    plain, printed = run(*asked)
    assert plain["rows"][0]["solver"] == "euler" and "unroll" not in printed


def choices_by_hand(model, encoding, problems):
    """Is the right letter the likeliest, and -log p of it among the letters, by plain forward passes."""
    found = []
    for p in problems:
        ids = encoding.encode_ordinary(p.prompt + " ")                # the tiny tokenizer has no token " A"
        letters = [encoding.encode_ordinary(choice.strip())[0] for choice in p.choices]
        with torch.no_grad():
            logits = model.trunk.head(model.trunk(torch.tensor([ids]))[0])[0, -1]
        p_of = logits.softmax(-1)[letters]
        right = p.choices.index(p.answer)
        found.append((p_of.argmax().item() == right, -math.log(p_of[right] / p_of.sum())))
    return zip(*found)


def test_likelihood_of_letters_at_one_step_is_a_plain_forward_pass(run, questions, encoding, tmp_path):
    asked = random_pair(tmp_path / "asked", load_manifest(questions))
    results, printed = run("--steps=1,2,4", out_dir=asked, data_dir=questions)
    problems, (model, _, _) = load_problems(questions, "val"), load(str(asked))
    right, nll = choices_by_hand(model, encoding, problems)
    one, two, four = (row["choices"] for row in results["rows"])
    assert one["right"] == [int(r) for r in right] and 0 < one["accuracy"] < 1
    assert one["accuracy"] == sum(right) / 40 and one["nll"] == pytest.approx(np.mean(nll), rel=1e-5)
    of = {"law": right[:20], "art": right[20:35], "math": right[35:]}
    assert one["by_subject"] == {subject: [pytest.approx(np.mean(r)), len(r)] for subject, r in of.items()}
    assert one["macro"] == pytest.approx(np.mean([np.mean(r) for r in of.values()]))
    assert len({tuple(x["right"]) for x in (one, two, four)}) == 3 and four["vs_previous"]["steps"] == 2
    gained = sum(a < b for a, b in zip(one["right"], four["right"]))
    assert four["vs_first"]["gained"] == gained
    assert printed.count("likeliest choice, by subject") == printed.count("right, by subject") == 1
    assert [row["steps"] for row in results["rows"]] == [1, 2, 4] and "strict" in results["rows"][0]
    assert results["rows"][0]["by_subject"]["law"][1] == 20

    with_answers, run_generated = results["rows"][0]["choices"], run.generated
    results, printed = run("--steps=1", "--exact_match=False", out_dir=asked, data_dir=questions)
    assert run.generated == 0 < run_generated and results["rows"][0]["choices"] == with_answers


def test_problems_of_several_tasks_are_told_apart(run, arithmetic, encoding, monkeypatch, tmp_path):
    """A mix of tasks without subjects: each task is one, and letters are asked for where there are any."""
    numbers = [p._replace(group="math", place="") for p in load_problems(arithmetic, "val")[:4]]
    letters = [Problem(f"Question: Which of {i}?\nAnswer:", LETTERS[i], "mmlu", "math", choices=LETTERS)
               for i in range(3)]
    problems = [x for pair in zip(numbers, letters) for x in pair] + numbers[3:]
    data = made_up(tmp_path / "mixed", {"val": problems})
    model = random_pair(tmp_path / "model", load_manifest(data))
    saying(monkeypatch, encoding, lambda T, i: problems[i].answer if i % 2 or i == 0 else "#### 100000")
    (row,) = run("--steps=1", out_dir=model, data_dir=data)[0]["rows"]
    assert row["by_subject"] == {"arithmetic": [0.25, 4], "mmlu": [1, 3]} and row["macro"] == 0.625
    right, _ = choices_by_hand(load(str(model))[0], encoding, letters)
    assert row["choices"]["right"] == [int(r) for r in right] and "macro" not in row["choices"]


def test_letters_that_the_trunk_knows(run, questions, encoding, monkeypatch, tmp_path):
    """The right letter written, right: all; a perturbed one: none."""
    asked = random_pair(tmp_path / "asked", load_manifest(questions))
    problems = load_problems(questions, "val")
    saying(monkeypatch, encoding, lambda T, i: problems[i].answer if T == 2 else LETTERS[(i * i + 1) % 4])
    one, two = run("--steps=1,2", out_dir=asked, data_dir=questions)[0]["rows"]
    assert (one["strict"], two["strict"], two["macro"], one["macro"]) == (0, 1, 1, 0)


# ---------------------------------------------------------------------------------------- what is asked
def test_groups(run, arithmetic, monkeypatch):
    """use_group: every problem its own; group: the same for all; neither: none, which is index 4."""
    given, generate = {}, evaluate.generate
    def spy(model, prompts, eot, decoding, groups, ids, **named):
        given.update(zip(ids, groups))
        return generate(model, prompts, eot, decoding, groups, ids, **named)
    monkeypatch.setattr(evaluate, "generate", spy)
    def groups(*args):
        given.clear()
        results, printed = run("--steps=2", "--limit=30", *args)
        return given, results["rows"][0]["nll"], printed
    problems = load_problems(arithmetic, "val")
    assert groups("--use_group")[0] == {i: min(problems[i].answer.count("\n"), 4) - 1 for i in range(30)}
    assert len(set(given.values())) > 1
    assert set(groups("--group=3 steps")[0].values()) == {2} and set(groups()[0].values()) == {4}
    options = [[], ["--group=3 steps"], ["--group=3 steps", "--guidance=3"], ["--use_group"]]
    _, nlls, printed = zip(*(groups(*args) for args in options))
    assert len(set(nlls)) == 3 and nlls[1] == nlls[2]             # the last call, the only one, is not guided
    notes = [[line for line in text.splitlines() if "guidance" in line] for text in printed]
    assert [len(lines) for lines in notes] == [0, 0, 1, 0]
    assert "guidance=3.0 changes nothing at steps=2" in notes[2][0]


def test_groups_of_a_mix(run, questions, arithmetic, tmp_path):
    """A model that knows groups, on data with groups of its own: a problem's group is its task's group."""
    manifest = load_manifest(arithmetic) | {"group_names": ["math", "code", "knowledge"]}
    model = random_pair(tmp_path / "mix", manifest)
    named, _ = run("--steps=2", "--limit=6", "--group=knowledge", out_dir=model, data_dir=questions)
    own, _ = run("--steps=2", "--limit=6", "--use_group", out_dir=model, data_dir=questions)
    assert run.generated == 0 and own["rows"][0]["nll"] == named["rows"][0]["nll"]
    with pytest.raises(UserError, match="use_group needs the groups .* are: math, code, knowledge"):
        run("--steps=2", "--use_group", out_dir=model)            # arithmetic has no group


def test_shots(run, questions, encoding, monkeypatch, tmp_path):
    """Worked examples stand before each question, in the answers, the letters and the true answers alike."""
    asked, prompts = random_pair(tmp_path / "asked", load_manifest(questions), positions=256), {}
    generate = evaluate.generate
    def spy(model, given, eot, decoding, groups, ids, **named):
        prompts.update(zip(ids, given))
        return generate(model, given, eot, decoding, groups, ids, **named)
    monkeypatch.setattr(evaluate, "generate", spy)
    results, _ = run("--steps=1", "--shots=2", "--limit=12", out_dir=asked, data_dir=questions)
    problems, examples = load_problems(questions, "val")[:12], load_problems(questions, "dev")
    texts = [few_shot(p, examples, 2) for p in problems]
    assert texts[0].count("Answer: ") == 2
    assert prompts == {i: encoding.encode_ordinary(text) for i, text in enumerate(texts)}
    prompted = [p._replace(prompt=text) for p, text in zip(problems, texts)]
    right, nll = choices_by_hand(load(str(asked))[0], encoding, prompted)
    assert results["rows"][0]["choices"]["right"] == [int(r) for r in right]
    assert results["rows"][0]["choices"]["nll"] == pytest.approx(np.mean(nll), rel=1e-5)
    plain, _ = run("--steps=1", "--limit=12", out_dir=asked, data_dir=questions)
    assert run.generated == 12 and plain["rows"][0]["nll"] != results["rows"][0]["nll"]


@pytest.mark.parametrize("asked", [4, 500])
def test_shots_that_there_are_not(asked, run, questions, tmp_path):
    """Three worked examples: more are refused, not silently taken as three; a problem is no example of itself."""
    model = random_pair(tmp_path / "asked", load_manifest(questions), positions=256)
    with pytest.raises(UserError, match=f"shots={asked}, but .* 3 worked examples.*--shots=3"):
        run("--steps=1", f"--shots={asked}", out_dir=model, data_dir=questions)
    assert run.generated == 0
    with pytest.raises(UserError, match="shots=3, but .* 2 worked examples"):
        run("--steps=1", "--shots=3", "--split=dev", out_dir=model, data_dir=questions)


def test_questions_that_do_not_fit_are_wrong(run, arithmetic, questions, encoding, monkeypatch, tmp_path):
    """As answers, as letters, as true answers: counted as wrong, named in a line, none dropped."""
    lengths = [len(encoding.encode_ordinary(p.prompt)) for p in load_problems(questions, "val")]
    positions = sorted(lengths)[25]                               # the longest that fits fills the model
    short = random_pair(tmp_path / "short", load_manifest(questions), positions=positions)
    results, printed = run("--steps=1,2", out_dir=short, data_dir=questions)
    for row in results["rows"]:
        found = answers_of(short, results, row["steps"])
        assert set(found) == set(range(40)) and row["n"] == 40
        assert row["too_long"] == sum(length > positions for length in lengths) > 0
        for i, length in enumerate(lengths):
            assert len(found[i]["texts"]) == (length <= positions) == (found[i]["predicted"] > 0)
            assert found[i]["predicted"] <= max(0, positions - length + 1)
            if length > positions:
                assert (row["right"][i], found[i]["ended"]) == (0, False)
        assert len(row["choices"]["right"]) == 40                 # with the space before a letter
        assert all(length < positions for length, r in zip(lengths, row["choices"]["right"]) if r)
        assert 0 < row["nll"] < math.inf and row["teacher_forced_n"] < 40
    note = f"{row['too_long']} problems do not fit the model's {positions} positions: they count as wrong"
    assert note in printed
    assert f"token acc. to entropy are of the {row['teacher_forced_n']} problems that fit" in printed
    none = random_pair(tmp_path / "none", load_manifest(questions), positions=3)
    with pytest.raises(UserError, match="none of 40 problems fits the model's 3 positions"):
        run("--steps=1", out_dir=none, data_dir=questions)


def test_code_is_run_only_when_asked_to(run, arithmetic, encoding, monkeypatch, tmp_path):
    """Problems with a test: refused without --run_code, before any answer; the true answer passes."""
    def problem(i):
        return Problem(f"Question: Add {i}.\nAnswer:", f"\ndef f(x):\n    return x + {i}", "mbpp", "code",
                       test=f"assert f(1) == {1 + i}")
    data = made_up(tmp_path / "code", {"val": [problem(i) for i in (1, 2)]})
    model = random_pair(tmp_path / "coder", load_manifest(data))
    with pytest.raises(UserError, match="--run_code"):
        run("--steps=1", out_dir=model, data_dir=data)
    assert run.generated == 0 and not list(model.glob("eval/*.jsonl"))
    saying(monkeypatch, encoding, lambda T, i: problem(1 + i).answer if T == 2 else "\ndef f(x): return 1")
    ran = []
    run_program = tasks.sandbox.run
    monkeypatch.setattr(tasks.sandbox, "run", lambda program: ran.append(program) or run_program(program))
    one, two = run("--steps=1,2", "--run_code", out_dir=model, data_dir=data)[0]["rows"]
    assert (one["strict"], two["strict"], one["well_formed"]) == (0, 1, 1)
    assert sum("assert f" in program for program in ran) == 4
    again = run("--steps=1,2", "--run_code", out_dir=model, data_dir=data)[0]["rows"]
    assert timeless(again) == timeless([one, two]) and sum("assert f" in program for program in ran) == 4
    monkeypatch.setattr(tasks.answers, "hash_scorer", lambda: "of another scorer")
    assert run("--steps=2", "--run_code", out_dir=model, data_dir=data)[0]["rows"][-1]["strict"] == 1
    assert sum("assert f" in program for program in ran) == 6     # another scorer runs the same texts anew
    run("--steps=1", "--exact_match=False", out_dir=model, data_dir=data)     # runs no code


def test_no_answer_is_longer_than_the_model(run, out_dir, monkeypatch):
    """--max_new_tokens of a thousand million is cut before anything is allocated for it."""
    seen, generate = [], evaluate.generate
    def spy(*args, **named):
        seen.append(args[3].max_new_tokens)
        return generate(*args, **named)
    monkeypatch.setattr(evaluate, "generate", spy)
    run("--steps=2", "--limit=2", "--max_new_tokens=1000000000")
    run("--steps=2", "--limit=3", "--max_new_tokens=128")
    assert seen == [128, 128] and run.generated == 1              # the same answers


# ------------------------------------------------------------------------------------------ what is shown
def test_show_change(run, arithmetic, monkeypatch, encoding):
    """Of the problems gained, the shortest is printed, with both answers and a trace of the model's own."""
    problems = load_problems(arithmetic, "val")
    saying(monkeypatch, encoding, lambda T, i: problems[i].answer if i in RIGHT[T] else "#### 100000")
    _, printed = run("--steps=1,4", "--limit=20", "--show_change", "--mistakes=0")
    _, shown = printed.split("\n8 problems are wrong at steps=1 and right at steps=4; the shortest:\n")
    gained = problems[4]                                          # all are given as of 10 tokens: the first
    assert shown.startswith(gained.prompt) and f"steps=4: {gained.answer!r}" in shown
    assert "steps=1: '#### 100000'" in shown and "guesses (t: guess, its probability)" in shown
    trace = shown.split("guesses (t: guess, its probability)\n")[1].splitlines()
    assert 1 <= len(trace) <= 12 and all("0.00: " in line for line in trace)
    _, printed = run("--steps=4,1", "--limit=3", "--show_change", "--mistakes=0")
    assert "4 problems" not in printed and "2 problems are wrong at steps=4 and right at steps=1" in printed
    saying(monkeypatch, encoding, lambda T, i: "#### 100000")
    _, printed = run("--steps=1,2", "--limit=3", "--seed=5", "--show_change", "--mistakes=0")
    assert printed.endswith("no problem is wrong at steps=1 and right at steps=2: none to trace\n")


def test_data_that_was_made_anew_is_no_longer_the_runs_own(run, out_dir, arithmetic, tmp_path):
    """Its validation problems may be those of the training. Named by --data_dir it is evaluated."""
    folder = Path(shutil.copytree(arithmetic, tmp_path / "data"))
    checkpoint = torch.load(out_dir / "best.pt")
    torch.save(checkpoint | {"config": {"data_dir": str(folder)}}, out_dir / "best.pt")
    run("--steps=1", "--limit=2", data_dir="")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"seed": 5}))
    with pytest.raises(UserError, match="no longer the data that .* was trained on: seed was 1337, now 5"):
        run("--steps=1", "--limit=2", data_dir="")
    run("--steps=1", "--limit=2", data_dir=folder)


def test_plot(run, out_dir):
    pytest.importorskip("matplotlib")
    _, printed = run("--steps=1,2", "--limit=8", "--plot")
    (figure,) = (out_dir / "eval").glob("*.png")
    assert figure.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and f"figure: {figure}" in printed


@pytest.mark.parametrize("options, parts", [
    (["--votes=0"], ["votes=0", "at least 1"]),
    (["--votes=2"], ["votes=2", "--temperature"]),
    (["--samples=5"], ["samples=5", "--temperature"]),
    (["--votes=2", "--samples=2", "--temperature=1"], ["votes=2", "samples=2", "choose one"]),
    (["--use_group", "--group=2 steps"], ["--use_group", "choose one"]),
    (["--guidance=2"], ["guidance=2.0", "--group"]),
    (["--group=2"], ["group='2'", "1 step, 2 steps, 3 steps, 4 or more steps"]),
    (["--steps="], ["steps=''", "1,2,4"]),
    (["--steps=1,x"], ["steps='1,x'"]),
    (["--steps=0,1"], ["steps=0", "at least 1"]),
    (["--steps=-1"], ["steps='-1'"]),
    (["--exact_match=False", "--plot"], ["--plot", "--exact_match=False"]),
    (["--limit=-1"], ["limit=-1"]),
    *[([f"--{option}", "--temperature=1", "--exact_match=False"], [name, "without answers"]) for option, name in
      (("votes=5", "votes=5"), ("samples=5", "samples=5"), ("run_code", "run_code=True"))],
    (["--top_k=4"], ["top_k=4", "without a temperature"]),
    (["--show_change", "--steps=4"], ["--show_change", "--steps=1,16"]),
    (["--show_change", "--votes=2", "--temperature=1"], ["--show_change", "2 answers"]),
    (["--split=nothing"], ["'nothing'", "val"]),
    (["--batch_size=-1"], ["batch_size=-1"]),
    (["--max_new_tokens=0"], ["max_new_tokens=0"]),
    (["--shots=-1"], ["shots=-1"]),
    (["--checkpoint=last"], ["last.pt"]),
    (["--data_dir=/nowhere"], ["/nowhere", "prepare_data.py"]),
    (["--out_dir=/nowhere"], ["/nowhere", "train.py"]),
])
def test_mistakes_are_one_line(options, parts, run):
    with pytest.raises(UserError) as error:
        run("--limit=2", *options)
    message = str(error.value)
    assert message.startswith("error: ") and "\n" not in message
    assert all(part in message for part in parts), message
    assert run.generated == 0


def test_a_trunk_alone(run, arithmetic, tmp_path):
    """T = 1 only, no groups."""
    trunk = random_pair(tmp_path / "trunk", load_manifest(arithmetic), with_path=False)
    results, _ = run("--steps=1", "--limit=3", out_dir=trunk)
    assert results["rows"][0]["nfe"] == 0
    for options, part in ((["--steps=1,2"], "--steps=1"), (["--group=2 steps"], "knows no group"),
                          (["--use_group"], "knows no groups")):
        with pytest.raises(UserError, match=part):
            run("--steps=1", "--limit=3", *options, out_dir=trunk)


def test_data_of_another_tokenizer(run, out_dir, arithmetic, tmp_path):
    data = Path(shutil.copytree(arithmetic, tmp_path / "data"))
    manifest = load_manifest(data)
    manifest["tokenizer"] |= {"name": "other", "fingerprint": "f"}
    (data / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="tokenizer other, the checkpoint with arithmetic"):
        run("--steps=1", data_dir=data)
