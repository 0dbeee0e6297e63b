"""prepare_data.py: what it writes is checked against independent computations on the texts themselves."""
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare_data
from batches import batch_of, batches_of_epoch
from configurator import UserError
from prepare_data import load_manifest, load_split, main
from tasks.arithmetic import PROMPT
from tokens import encode_question, fingerprint, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
SPLITS = ("train", "val", "test", "mix", "mix_val", "mix_test")


@pytest.fixture(scope="module")
def arithmetic(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("data") / "arithmetic"
    main(["arithmetic", f"--out_dir={out_dir}", "--train=1500", "--mix=3000"])
    return out_dir


@pytest.fixture(scope="module")
def encoding():
    return load_tokenizer("arithmetic")


def question_of(problem):
    return problem.prompt.removeprefix("Question: ").removesuffix("\nAnswer:")


def error(*argv):
    """The one line a bad command ends with."""
    with pytest.raises(UserError) as e:
        main(list(map(str, argv)))
    message = str(e.value.code)
    assert "\n" not in message and message.startswith("error: ")
    return message


# ---------------------------------------------------------------- the generator

def test_every_annotation_is_right_and_the_last_result_is_the_answer(arithmetic):
    """Every <<expression=result>> recomputed with fractions; #### is the last; all numbers in 0..99."""
    for split in SPLITS:
        for problem in load_split(arithmetic, split).problems:
            *lines, last = problem.answer.removeprefix(" ").split("\n")
            final = int(last.removeprefix("#### "))
            results = []
            for expression, result, spoken in re.findall(r"<<([^=]+)=(\d+)>>(\d+)", problem.answer):
                left, op, right = re.fullmatch(r"(\d+)([-+*/])(\d+)", expression).groups()
                left, right = Fraction(left), Fraction(right)
                exact = {"+": left + right, "-": left - right, "*": left * right, "/": left / right}[op]
                assert exact == int(result) == int(spoken)
                assert f"{expression} = <<" in problem.answer
                results.append(int(result))
            assert all(int(n) <= 99 for n in re.findall(r"\d+", question_of(problem) + problem.answer))
            if results:
                assert final == results[-1] and len(results) == len(lines)
            if not split.startswith("mix"):
                assert 2 <= len(results) <= 4


def test_stories_follow_from_their_question(arithmetic):
    """Each operation uses the result before it, once; its other number is told or an older result."""
    for problem in load_split(arithmetic, "train").problems:
        told = [int(n) for n in re.findall(r"\d+", question_of(problem))]
        known = {*told, 1, 2}                        # "and 5 friends" is one more, "half", "twice"
        used, results = set(), told[:1]
        for left, right, result in re.findall(r"<<(\d+).(\d+)=(\d+)>>", problem.answer):
            operands = [int(left), int(right)]
            used |= set(operands)
            if results[1:]:
                operands.remove(results[-1])
            assert set(operands) <= known | set(results[:-1])
            results.append(int(result))
        assert set(told) <= used                     # no number of the question is idle


def drill_answer(question):
    """The answer of a small exercise, read off its question independently of the generator; None: not one."""
    numbers = [int(n) for n in re.findall(r"\d+", question)]
    if m := re.fullmatch(r"What is (\d+) ([-+*/]) (\d+)\?", question):
        return Fraction(eval(f"Fraction({m[1]}) {m[2]} {m[3]}"))
    if question.startswith("Which is "):
        return max(numbers) if "larger" in question else min(numbers)
    if m := re.match(r"What is the (first|second|last) number", question):
        return numbers[{"first": 0, "second": 1, "last": -1}[m[1]]]
    if question.startswith("How often"):
        return Counter(numbers[1:])[numbers[0]]
    if question.startswith("Reverse"):
        return numbers[0]
    if question.startswith("Continue"):
        assert len(set(np.diff(numbers))) == 1
        return numbers[-1] + numbers[1] - numbers[0]
    if m := re.fullmatch(r"(\w+) has (\d+) \w+ and (\w+) has (\d+)\. How many has (\w+)\?", question):
        return int({m[1]: m[2], m[3]: m[4]}[m[5]])
    return None


def test_every_drill_has_the_answer_that_its_question_asks_for(arithmetic):
    found = 0
    for split in ("mix", "mix_val", "mix_test"):
        problems = load_split(arithmetic, split).problems
        for problem in problems:
            expected = drill_answer(question_of(problem))
            if expected is not None:
                found += 1
                assert int(problem.answer.split("#### ")[1]) == expected, problem
                assert re.search(rf"\b{expected}\b", problem.answer.split("####")[0])
    total = 3000 + 500 + 1000
    assert 0.4 * total < found < 0.6 * total         # half the mixture; a family not known here would show
    assert all(drill_answer(question_of(p)) is None for p in load_split(arithmetic, "train").problems)


def test_no_two_splits_share_a_question_or_its_numbers(arithmetic):
    """No question twice, and no two splits share the numbers of a question in their order."""
    questions, calculations = Counter(), {}
    for split in SPLITS:
        for problem in load_split(arithmetic, split).problems:
            questions[question_of(problem)] += 1
            key = tuple(re.findall(r"\d+", question_of(problem)))
            assert calculations.setdefault(key, split) == split
    assert max(questions.values()) == 1 and sum(questions.values()) == 1500 + 500 + 1000 + 3000 + 500 + 1000


def test_problems_are_short_and_various(arithmetic):
    """Short enough for the demo, and not a handful of sums: what training on it takes for granted."""
    split = load_split(arithmetic, "train")
    length = np.diff(split.offsets)
    targets = np.add.reduceat(split.mask.astype(int), split.offsets[:-1])
    assert 25 < (length - targets).mean() < 40 and 35 < targets.mean() < 52 and length.max() < 128
    sums = Counter(re.findall(r"<<(\d+[-+*/]\d+)=", "".join(p.answer for p in split.problems)))
    assert len(sums) > 0.4 * sums.total()                       # numbers end at 99, so operations do repeat
    finals = Counter(p.answer.split("#### ")[1] for p in split.problems)
    assert finals.most_common(1)[0][1] < 0.04 * len(split.problems)      # no constant answer scores


def test_the_size_of_a_split_disturbs_no_other(arithmetic, tmp_path):
    main(["arithmetic", f"--out_dir={tmp_path}", "--train=100", "--mix=1"])
    for split in ("val", "test", "mix_test"):
        assert (tmp_path / f"{split}.npz").read_bytes() == (arithmetic / f"{split}.npz").read_bytes()
    assert load_split(tmp_path, "train").problems == [
        p._replace(where=q.where) for p, q in zip(load_split(arithmetic, "train").problems,
                                                  load_split(tmp_path, "train").problems)]
    main(["arithmetic", f"--out_dir={tmp_path}", "--train=100", "--mix=1", "--seed=5"])
    assert (tmp_path / "val.npz").read_bytes() != (arithmetic / "val.npz").read_bytes()


def test_the_same_input_gives_the_same_bytes(tmp_path):
    """Two processes with different hash seeds; and no clock in the zip files."""
    contents = []
    for hash_seed in ("1", "2"):
        out_dir = tmp_path / hash_seed / "arithmetic"
        subprocess.run([sys.executable, ROOT / "prepare_data.py", "arithmetic", f"--out_dir={out_dir}",
                        "--train=200", "--mix=200"], check=True, capture_output=True,
                       env={**os.environ, "PYTHONHASHSEED": hash_seed})
        contents.append({p.name: p.read_bytes() for p in out_dir.iterdir()})
    assert contents[0] == contents[1] and len(contents[0]) == 2 * len(SPLITS) + 1
    with zipfile.ZipFile(out_dir / "val.npz") as archive:
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


# ---------------------------------------------------------------- tokens

def test_every_number_is_one_token(encoding):
    assert encoding.n_vocab <= 2500
    for n in range(100):
        assert len(encoding.encode_ordinary(f" {n}")) == 1
        assert encoding.decode(encoding.encode_ordinary(f" {n}")) == f" {n}"
        pieces = [encoding.decode([i]) for i in encoding.encode_ordinary(f"7+{n}*{n}/{n}-{n}={n}>>{n}")]
        assert pieces == ["7", "+", str(n), "*", str(n), "/", str(n), "-", str(n), "=", str(n), ">>", str(n)]


def test_the_vocabulary_covers_the_generator(arithmetic, encoding):
    """No word is spelt: a token of one character is never part of a longer word."""
    for split in SPLITS:
        for problem in load_split(arithmetic, split).problems[:500]:
            text = problem.prompt + problem.answer
            pieces = [encoding.decode([i]) for i in encoding.encode_ordinary(text)]
            for left, right in zip(pieces, pieces[1:]):
                assert not (left[-1].isalpha() and right[0].isalpha()), (left, right)
    pieces = [encoding.decode([i]) for i in encoding.encode_ordinary("a 3*12 = <<3*12=36>>36 cups.\n#### 36")]
    assert pieces == \
        ["a", " 3", "*", "12", " = <<", "3", "*", "12", "=", "36", ">>", "36", " cups", ".\n", "####", " 36"]


@settings(max_examples=300, deadline=None)
@given(st.text() | st.text(alphabet=" \n.=<>#0123456789abÄ€\t", max_size=40))
def test_any_text_round_trips(encoding, text):
    assert encoding.decode(encoding.encode_ordinary(text)) == text


def check_split(out_dir, split, encoding, strip=False):
    """Masks cover exactly the answer and end of text; ids, labels and texts belong together."""
    data, manifest = load_split(out_dir, split), load_manifest(out_dir)
    assert data.tokens.dtype == np.uint16 and data.mask.dtype == np.bool_
    assert data.offsets.dtype == np.int64 and data.labels.dtype == np.uint8
    assert len(data.offsets) == len(data.problems) + 1 == manifest["counts"][split] + 1
    for i, problem in enumerate(data.problems):
        tokens = data.tokens[data.offsets[i]:data.offsets[i + 1]]
        mask = data.mask[data.offsets[i]:data.offsets[i + 1]]
        assert encoding.decode(tokens[mask]) == f"{problem.answer}<|endoftext|>"
        assert tokens[mask][-1] == encoding.eot_token and (tokens == encoding.eot_token).sum() == 1
        assert encoding.decode(tokens[~mask]) == problem.prompt
        assert problem.prompt == f"Question: {question_of(problem)}\nAnswer:"
        assert encode_question(encoding, PROMPT, question_of(problem)) == tokens[~mask].tolist()
        assert not mask[:(~mask).sum()].any()        # the prompt comes first, in one piece
        steps = sum(1 for line in problem.answer.split("####")[0].split("\n") if line)
        assert data.labels[i] == min(steps, manifest["n_labels"]) - 1
        assert manifest["label_names"][data.labels[i]] == problem.label
        assert ("<<" in problem.answer) <= (not strip)
    assert np.diff(data.offsets).max() <= manifest["max_tokens"]
    return data


@pytest.mark.parametrize("split", SPLITS)
def test_masks_cover_exactly_the_answer_and_the_end_of_text(arithmetic, encoding, split):
    check_split(arithmetic, split, encoding)


def test_the_manifest_says_what_is_there(arithmetic, encoding):
    manifest = load_manifest(arithmetic)
    assert manifest["tokenizer"] == "arithmetic" and manifest["fingerprint"] == fingerprint(encoding)
    assert manifest["n_vocab"] == encoding.n_vocab and manifest["eot"] == encoding.n_vocab - 1
    assert manifest["counts"] == dict(train=1500, val=500, test=1000, mix=3000, mix_val=500, mix_test=1000)
    assert manifest["label_names"] == ["1 step", "2 steps", "3 steps", "4 or more steps"]
    assert manifest["n_labels"] == 4
    longest = max(np.diff(load_split(arithmetic, split).offsets).max() for split in SPLITS)
    assert manifest["max_tokens"] == longest


def test_the_fingerprint_tells_tokenizers_apart(encoding):
    import tiktoken
    def variant(pattern=encoding._pat_str, ranks=encoding._mergeable_ranks, special="<|endoftext|>"):
        return fingerprint(tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks,
                                             special_tokens={special: len(ranks)}))
    swapped = dict(encoding._mergeable_ranks)
    swapped[b" 1"], swapped[b" 2"] = swapped[b" 2"], swapped[b" 1"]
    same, *others = variant(), variant(pattern=".|\\n"), variant(ranks=swapped), variant(special="<|end|>")
    assert same == fingerprint(encoding) and len({same, *others}) == 4


def test_a_question_that_cannot_be_asked_is_refused(encoding):
    for bad, why in (("", "empty"), (" \n", "empty"), ("What is <|endoftext|>?", "endoftext")):
        with pytest.raises(UserError, match=why):
            encode_question(encoding, PROMPT, bad)
    want = encoding.encode_ordinary("Question: What is 2 + 3?\nAnswer:")
    assert want == encode_question(encoding, PROMPT, " What is 2 + 3?\n")
    assert encode_question(encoding, "{}", "What is {x}?") == encoding.encode_ordinary("What is {x}?")


# ---------------------------------------------------------------- GSM8K's path, on files of our own

needs_gpt2 = pytest.mark.skipif(not (SHARED / "tiktoken_cache").is_dir(),
                                reason="no ../shared/tiktoken_cache, and tests do not download")


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A small source folder, and a function that writes it with one line of train.jsonl replaced."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    folder = tmp_path / "source"
    folder.mkdir()
    def write(line=None, n=520):
        rows = [json.dumps({"question": f"What is {i} + 1?",
                            "answer": f"{i}+1 = <<{i}+1={i + 1}>>{i + 1}, {i}-0=$<<{i}-0={i}>>{i}\n"
                                      f"#### {i + 1}"})
                for i in range(n)]
        if line is not None:
            rows[16] = line
        (folder / "train.jsonl").write_text("\n".join(rows) + "\n")
        (folder / "test.jsonl").write_text("\n".join(rows[:3]) + "\n")
        return folder
    return write


@needs_gpt2
def test_what_is_held_out_of_gsm8k_is_not_trained_on(source, tmp_path, capsys):
    main(["gsm8k", f"--source={source()}", f"--out_dir={tmp_path}/out", "--strip_annotations"])
    train = check_split(tmp_path / "out", "train", load_tokenizer("gpt2"), strip=True).problems
    for problem in train:
        i = int(question_of(problem).split()[2])
        assert problem.answer == f" {i}+1 = {i + 1}, {i}-0=${i}\n#### {i + 1}"
    assert "is not the original file" in capsys.readouterr().out
    held_out = {question_of(p) for p in load_split(tmp_path / "out", "val").problems}
    assert len(train) == 20 and len(held_out) == 500 and held_out.isdisjoint(map(question_of, train))
    manifest = load_manifest(tmp_path / "out")
    assert manifest["strip_annotations"] is True and set(manifest["sources"]) == {"train.jsonl", "test.jsonl"}


@needs_gpt2
@pytest.mark.parametrize("line, why", [
    ('{"question": "Why?", "answer": "Because', "is not JSON"),
    ("Why?", "is not JSON"),
    ('["Why?", "#### 1"]', '"question"'),
    ('{"question": "Why?"}', '"answer"'),
    ('{"question": "", "answer": "#### 1"}', '"question"'),
    ('{"question": 3, "answer": "#### 1"}', '"question"'),
    ('{"question": "Why?", "answer": "It is 1."}', "####"),
    ('{"question": "Why?", "answer": "It is 1.\\n####  "}', "####"),
    ('{"question": "Why <|endoftext|>?", "answer": "#### 1"}', "special token"),
    ('{"question": "Why?", "answer": "<|endoftext|> #### 1"}', "special token"),
    (json.dumps({"question": "Why? " * 1100, "answer": "#### 1"}), "longer than 1024 tokens"),
])
def test_a_bad_line_is_named_and_nothing_is_written(source, tmp_path, line, why):
    message = error("gsm8k", f"--source={source(line)}", f"--out_dir={tmp_path}/out")
    assert why in message and "train.jsonl line 17" in message
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_bad_source_is_named(source, tmp_path):
    assert "501" in error("gsm8k", f"--source={source(n=500)}", f"--out_dir={tmp_path}/out")
    assert "cannot read" in error("gsm8k", f"--source={tmp_path}/nowhere", f"--out_dir={tmp_path}/out")
    (source() / "test.jsonl").write_bytes(b'{"question": "\xff"}\n')
    assert "UTF-8" in error("gsm8k", f"--source={tmp_path}/source", f"--out_dir={tmp_path}/out")
    (source() / "test.jsonl").write_text("\n")
    assert "holds no problems" in error("gsm8k", f"--source={tmp_path}/source", f"--out_dir={tmp_path}/out")


@needs_gpt2
def test_a_bad_source_leaves_the_old_data(source, tmp_path):
    main(["gsm8k", f"--source={source()}", f"--out_dir={tmp_path}/out"])
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    error("gsm8k", f"--source={source('bad')}", f"--out_dir={tmp_path}/out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def own(tmp_path):
    """A command that prepares a few problems of one's own, and the folder where they go."""
    lines = [f'{{"question": "Is {i} even?", "answer": "{i % 2 == 0}"}}\n' for i in range(200)]
    (tmp_path / "train.jsonl").write_text("".join(lines))
    out_dir = tmp_path / "out"
    command = ["jsonl", f"--source={tmp_path}", "--val=9", "--tokenizer=arithmetic", f"--out_dir={out_dir}"]
    return command, out_dir


@pytest.mark.parametrize("stop_at", range(5))
def test_an_interrupted_preparation_leaves_what_was_there(own, monkeypatch, stop_at):
    """Ctrl-C while the new files are written, each of the five."""
    command, out_dir = own
    main(command)
    before, write, calls = contents(out_dir), prepare_data.write_file, []

    def interrupted(path, content):
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        calls.append(path)
        write(path, content)

    monkeypatch.setattr(prepare_data, "write_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main([*command, "--val=20"])
    assert contents(out_dir) == before and len(list(out_dir.iterdir())) == len(before) == 5


def test_a_kill_between_two_renames_never_passes_for_finished_data(own, monkeypatch):
    command, out_dir = own
    main(command)
    replace, calls = os.replace, []

    def killed(old, new):
        if Path(new).parent == out_dir:
            calls.append(new)
            if len(calls) == 3:
                raise KeyboardInterrupt
        replace(old, new)

    monkeypatch.setattr(prepare_data.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        main([*command, "--val=20"])
    with pytest.raises(UserError, match="no prepared data .*make it with: python prepare_data.py"):
        load_split(out_dir, "val")


def test_a_disk_that_fills_leaves_the_old_data_and_one_line(own):
    command, out_dir = own
    main(command)
    before = contents(out_dir)
    done = subprocess.run([sys.executable, "-c", f"""if True:
        import resource, prepare_data
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        prepare_data.main({[*command, "--val=20"]})"""], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: cannot write {out_dir}")
    assert contents(out_dir) == before and len(list(out_dir.iterdir())) == len(before)


def test_two_preparations_into_one_folder_are_one_too_many(own):
    """The second says whose the folder is, and spoils nothing; one that was killed leaves nothing behind."""
    command, out_dir = own
    main(command)
    before = contents(out_dir)
    code = "import prepare_data, time\n" \
           "prepare_data.make = lambda *words: (print('here', flush=True), time.sleep(60))\n" \
           f"prepare_data.main({command})"
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"here\n"
        (out_dir / ".new/half.npz").write_text("half")
        assert f"is in use by process {other.pid}" in error(*command)
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    main(command)
    assert contents(out_dir) == before


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_what_was_there(own, stop):
    """Ctrl-C: one line, status 130 and no leftover."""
    command, out_dir = own
    main(command)
    before = contents(out_dir)
    code = "import configurator, prepare_data, time\n" \
           "prepare_data.check_gold = lambda p: (print('here', flush=True), time.sleep(60))\n" \
           f"configurator.run(lambda: prepare_data.main({command}))"
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE)
    assert other.stdout.readline() == b"here\n"
    other.send_signal(stop)
    _, stderr = other.communicate(timeout=20)
    if stop == signal.SIGINT:
        assert other.returncode == 130 and stderr.count(b"\n") == 1 and contents(out_dir) == before
    main(command)
    assert contents(out_dir) == before


def test_a_closed_pipe_ends_quietly():
    for words in ("--help", "arithmetic --help"):
        done = subprocess.run(f"{sys.executable} prepare_data.py {words} | head -1", shell=True, cwd=ROOT,
                              capture_output=True, text=True)
        assert done.stdout.count("\n") == 1 and done.stderr == ""


def test_a_failure_leaves_no_new_folder(own):
    command, out_dir = own
    assert "--val=200" in error(*command, "--val=200") and not out_dir.exists()
    out_dir.mkdir()
    error(*command, "--val=200")
    assert not list(out_dir.iterdir())                       # one that was there stays


@needs_gpt2
def test_all_of_gsm8k_is_prepared_and_its_split_never_changes(tmp_path, monkeypatch, capsys):
    if not (SHARED / "gsm8k" / "train.jsonl").exists():
        pytest.skip("no ../shared/gsm8k")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    main(["gsm8k", f"--source={SHARED / 'gsm8k'}", f"--out_dir={tmp_path}"])
    assert "note:" not in capsys.readouterr().out    # the pinned files
    assert load_manifest(tmp_path)["counts"] == dict(train=6973, val=500, test=1319)
    encoding = load_tokenizer("gpt2")
    assert encoding.encode_ordinary("The dog") == [464, 3290]            # ids known from GPT-2 itself
    splits = {split: check_split(tmp_path, split, encoding) for split in ("train", "val", "test")}

    def original(file):
        lines = (SHARED / "gsm8k" / f"{file}.jsonl").read_text(encoding="utf-8").strip().split("\n")
        return sorted((r["question"], r["answer"]) for r in map(json.loads, lines))

    def ours(*names):
        return sorted((question_of(p), p.answer[1:]) for name in names for p in splits[name].problems)

    assert ours("train", "val") == original("train") and ours("test") == original("test")
    assert load_manifest(tmp_path)["max_tokens"] == 439
    # results are compared across machines and years: which problems are held out must never change
    held_out = hashlib.sha256("\n".join(question_of(p) for p in splits["val"].problems).encode()).hexdigest()
    assert held_out[:16] == "09ee493ae76a7879"


# ---------------------------------------------------------------- one's own data, and the other tasks

def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))


OWN = [{"question": f"Is {i} even?", "answer": str(i % 2 == 0)} for i in range(30)]


def test_own_data_is_one_command(tmp_path):
    """Question and answer on each line, a test file if there is one, or just one file."""
    write_lines(tmp_path / "in/train.jsonl", OWN)
    main(["jsonl", f"--source={tmp_path}/in", "--val=10", "--tokenizer=arithmetic",
          f"--out_dir={tmp_path}/a"])
    assert load_manifest(tmp_path / "a")["counts"] == dict(train=20, val=10)
    assert load_manifest(tmp_path / "a")["label_names"] == ["all"]
    write_lines(tmp_path / "in/test.jsonl", [{"question": "Is 77 even?", "answer": "False"}])
    main(["jsonl", f"--source={tmp_path}/in/", "--val=10", "--tokenizer=arithmetic",
          f"--out_dir={tmp_path}/b/"])
    assert load_manifest(tmp_path / "b")["counts"] == dict(train=20, val=10, test=1)
    main(["jsonl", f"--source={tmp_path}/in/train.jsonl", "--val=10", "--tokenizer=arithmetic",
          f"--out_dir={tmp_path}/c"])
    for split in ("train", "val"):
        a, b, c = (load_split(tmp_path / name, split) for name in "abc")
        assert [p[:-1] for p in a.problems] == [p[:-1] for p in b.problems] == [p[:-1] for p in c.problems]
    texts = [(question_of(p), p.answer[1:]) for split in ("train", "val") for p in load_split(tmp_path / "a",
                                                                                              split).problems]
    assert sorted(texts) == sorted((row["question"], row["answer"]) for row in OWN)


def test_own_validation_problems_are_used_and_a_question_in_two_splits_is_named(tmp_path, capsys):
    for split, rows in dict(train=OWN[:20], val=OWN[18:24], test=OWN[24:]).items():
        write_lines(tmp_path / f"in/{split}.jsonl", rows)
    main(["jsonl", f"--source={tmp_path}/in", "--tokenizer=arithmetic", f"--out_dir={tmp_path}/out"])
    assert load_manifest(tmp_path / "out")["counts"] == dict(train=20, val=6, test=6)
    assert [question_of(p) for p in load_split(tmp_path / "out", "val").problems] == [r["question"] for r in OWN[18:24]]
    printed = capsys.readouterr().out
    assert "note: 2 questions of val are in the training data" in printed and "of test are in" not in printed


def test_own_data_may_have_labels(tmp_path):
    write_lines(tmp_path / "train.jsonl", [row | {"label": "big" if i > 5 else "a"} for i,
                                           row in enumerate(OWN)])
    main(["jsonl", f"--source={tmp_path}", "--val=10", "--tokenizer=arithmetic", f"--out_dir={tmp_path}/out"])
    assert load_manifest(tmp_path / "out")["label_names"] == ["a", "big"]
    data = load_split(tmp_path / "out", "train")
    for label, p in zip(data.labels, data.problems, strict=True):
        assert (label == 1) == (p.label == "big") == (int(question_of(p).split()[1]) > 5)


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_a_text(tmp_path):
    text = "".join(json.dumps(row) + "\r\n" for row in OWN)
    (tmp_path / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    main(["jsonl", f"--source={tmp_path}", "--val=10", "--tokenizer=arithmetic", f"--out_dir={tmp_path}/out"])
    assert len(load_split(tmp_path / "out", "train").problems) == 20


def test_a_home_directory_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_lines(tmp_path / "in/train.jsonl", OWN)
    main(["jsonl", "--source=~/in", "--val=10", "--tokenizer=arithmetic", "--out_dir=~/out"])
    assert len(load_split("~/out", "val").problems) == 10 and (tmp_path / "out").is_dir()


BAD_OWN = {
    "a lone surrogate in the answer": (r'{"question": "Why?", "answer": "\ud800"}',
                                       "is not JSON that can be read"),
    "a lone surrogate in the question": (r'{"question": "\udfff", "answer": "x"}',
                                         "is not JSON that can be read"),
    "a surrogate beside": (r'{"question": "Why?", "answer": "x", "note": "\ud800"}',
                           "is not JSON that can be read"),
    "nesting": ('{"question": ' + "[" * 100_000, "is not JSON that can be read"),
    "a nested text": ('{"question": {"text": "Why?"}, "answer": "x"}', 'no text "question"'),
    "a huge number": ('{"question": ' + "9" * 10_000 + ', "answer": "x"}', "is not JSON"),
    "NaN": ("NaN", 'no text "question"'), "half a line": ('{"question": "Why?", "ans', "is not JSON"),
    "NULs": ("\0" * 20, "is not JSON"), "two objects": ('{"question": "a"}{"answer": "b"}', "is not JSON"),
    "another key": ('{"question": "Why?", "response": "x"}', 'no text "answer"'),
    "an empty label": ('{"question": "Why?", "answer": "x", "label": ""}', 'no text "label"'),
    "a number as label": ('{"question": "Why?", "answer": "x", "label": 3}', 'no text "label"'),
    "an answer of signs": ('{"question": "Why?", "answer": "?!"}', "scoring cannot read"),
    "an unreadable number": ('{"question": "Why?", "answer": "#### $18"}', "scoring cannot read"),
    "end of text": ('{"question": "Why?", "answer": "x<|endoftext|>"}', "special token"),
    "too long": (json.dumps({"question": "Why? " * 1000, "answer": "x"}), "longer than 1024 tokens"),
}


@pytest.mark.parametrize("name", BAD_OWN)
def test_own_data_that_cannot_be_used_is_one_line_and_the_old_data_stays(name, tmp_path):
    line, why = BAD_OWN[name]
    write_lines(tmp_path / "in/train.jsonl", OWN)
    command = ["jsonl", f"--source={tmp_path}/in", "--val=10", "--tokenizer=arithmetic",
               f"--out_dir={tmp_path}/out"]
    main(command)
    before = contents(tmp_path)
    write_lines(tmp_path / "in/train.jsonl", [*OWN[:4], line + "\n", *OWN[4:]])
    message = error(*command)
    assert why in message and "train.jsonl line 5" in message and len(message) < 1000
    write_lines(tmp_path / "in/train.jsonl", OWN)
    assert contents(tmp_path) == before
    write_lines(tmp_path / "in/test.jsonl", [*OWN[:4], line + "\n"])
    if name == "too long":                                   # a test problem that does not fit stays
        main(command)
        assert load_manifest(tmp_path / "out")["counts"]["test"] == 5
    else:
        assert why in error(*command)


def test_long_problems_are_left_out_only_where_the_user_says_so(tmp_path, capsys):
    write_lines(tmp_path / "train.jsonl", [*OWN, {"question": "Why? " * 1000, "answer": "x"}])
    main(["jsonl", f"--source={tmp_path}", "--val=10", "--tokenizer=arithmetic", f"--out_dir={tmp_path}/out",
          "--drop_long"])
    assert sum(load_manifest(tmp_path / "out")["counts"].values()) == 30
    assert "note: 1 problems of" in capsys.readouterr().out


@pytest.mark.parametrize("val", [0, -1, 30, 31, 10 ** 9])
def test_what_is_held_out_leaves_something_to_train_on(val, tmp_path):
    write_lines(tmp_path / "train.jsonl", OWN)
    assert f"--val={val}" in error("jsonl", f"--source={tmp_path}", f"--val={val}",
                                   f"--out_dir={tmp_path}/out")


def test_data_that_is_nowhere_to_be_downloaded_says_what_to_do(tmp_path):
    assert "--source=DIR, a folder with train.jsonl" in error("jsonl", f"--out_dir={tmp_path}")
    assert "TIGER-Lab/MMLU-Pro" in error("mmlu_pro", f"--out_dir={tmp_path}")
    assert "expected MMLU's folders" in error("mmlu", f"--source={tmp_path}", f"--out_dir={tmp_path}/out")
    assert "train.jsonl in it" in error("jsonl", f"--source={tmp_path}/none", f"--out_dir={tmp_path}/out")


TEXT = st.text(max_size=30).filter(lambda text: "<|endoftext|>" not in text)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=2, max_size=5))
def test_whatever_is_accepted_comes_back_as_it_was(tmp_path_factory, rows):
    """Any texts: the tokens say them, the problems hold them, the labels name them; or one line says why."""
    folder = tmp_path_factory.mktemp("any")
    rows = [dict(zip(("question", "answer", "label"), row, strict=True)) for row in rows]
    write_lines(folder / "train.jsonl", rows)
    try:
        main(["jsonl", f"--source={folder}", "--val=1", "--tokenizer=arithmetic", f"--out_dir={folder}/out"])
    except UserError as e:
        assert str(e).startswith("error: ") and "\n" not in str(e)
        return
    manifest, encoding, found = load_manifest(folder / "out"), load_tokenizer("arithmetic"), []
    for split in ("train", "val"):
        data = load_split(folder / "out", split)
        for i, p in enumerate(data.problems):
            tokens, mask = (z[data.offsets[i]:data.offsets[i + 1]] for z in (data.tokens, data.mask))
            assert encoding.decode(tokens) == p.prompt + p.answer + "<|endoftext|>"
            assert encoding.decode(tokens[mask]) == p.answer + "<|endoftext|>"
            assert manifest["label_names"][data.labels[i]] == p.label
            found.append((question_of(p), p.answer[1:], p.label))
    clean = [tuple(row[k].replace("\r\n", "\n").strip() for k in ("question", "answer",
                                                                  "label")) for row in rows]
    assert sorted(found) == sorted(clean)


PRO = {"question_id": 70, "question": "Typical advertising regulatory bodies?", "answer": "I",
       "answer_index": 8,
       "options": [f"Option {i}" for i in range(10)], "category": "business", "src": "ori_mmlu",
       "cot_content": ""}


def test_mmlu_pro_in_the_form_of_its_rows(tmp_path):
    write_lines(tmp_path / "in/validation.jsonl", [PRO])
    write_lines(tmp_path / "in/test.jsonl", [PRO | {"options": ["yes", "no", "never"], "answer": "C",
                                                    "answer_index": 2}])
    command = ["mmlu_pro", f"--source={tmp_path}/in", "--tokenizer=arithmetic", f"--out_dir={tmp_path}/out"]
    main(command)
    (shot,), (p,) = (load_split(tmp_path / "out", split).problems for split in ("val", "test"))
    assert shot.answer == " I" and len(shot.choices) == 10 and shot.prompt.count("\n") == 11
    assert shot.subject == "business"
    assert p.prompt == "Question: Typical advertising regulatory bodies?\nA. yes\nB. no\nC. never\nAnswer:"
    assert p.answer == " C" and p.choices == (" A", " B", " C") and p.label == "knowledge"
    manifest = load_manifest(tmp_path / "out")
    assert manifest["label_names"] == ["math", "code", "knowledge"] and manifest["shots"] == "val"
    for change, why in [({"answer": "K"}, "answer 'K'"), ({"answer": "AB"}, "answer 'AB'"),
                        ({"options": ["one"]}, "1 options"),
                        ({"options": "abc"}, "no list of texts options"),
                        ({"options": ["a", 3]}, "no list of texts"),
                        ({"options": ["x"] * 11}, "11 options"), ({"category": None}, 'no text "category"'),
                        ({"answer": "C", "options": ["a", "b"]}, "2 options and the answer 'C'"),
                        ({"answer": ""}, '"answer"')]:
        write_lines(tmp_path / "in/test.jsonl", [PRO, PRO | change])
        assert why in (message := error(*command)) and "test.jsonl line 2" in message


def test_mmlu_from_its_folders_and_from_its_archive_is_the_same(tmp_path):
    """The archive's other folders, auxiliary_train, are left alone; a cell may hold a line end."""
    table = '"Which, of\nthese?",1,"a, b",3,4,B\nQ2?,1,2,3,4,D\n'
    for split in ("dev", "val", "test", "auxiliary_train"):
        for subject in ("high_school_physics", "law"):
            path = tmp_path / f"data/{split}/{subject}_{split}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(table)
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        tar.add(tmp_path / "data", "data")
    command = ["mmlu", "--tokenizer=arithmetic"]
    main([*command, f"--source={tmp_path}/data", f"--out_dir={tmp_path}/a"])
    main([*command, f"--source={tmp_path}/data.tar", f"--out_dir={tmp_path}/b"])
    main([*command, f"--source={tmp_path}", f"--out_dir={tmp_path}/c"])
    for split in ("dev", "val", "test"):
        a, b, c = (load_split(tmp_path / name, split).problems for name in "abc")
        assert [p[:-1] for p in a] == [p[:-1] for p in b] == [p[:-1] for p in c] and len(a) == 4
    assert [p.subject for p in a] == ["high school physics"] * 2 + ["law"] * 2
    assert a[0].prompt == "Question: Which, of\nthese?\nA. 1\nB. a, b\nC. 3\nD. 4\nAnswer:"
    assert a[0].answer == " B"
    for text, why in [("Q?,1,2,3,4,E\n", "the answer 'E'"), ("Q?\n", "not a table"), ('"Q', "not a table"),
                      ("Q?,1,2,3,4,5,6,7,8,9,10,11,A\n", "11 options"), ("\xff", "not a table")]:
        (tmp_path / "data/test/law_test.csv").write_bytes(("Q1?,1,2,3,4,A\n" + text).encode("latin-1"))
        message = error(*command, f"--source={tmp_path}/data", f"--out_dir={tmp_path}/a")
        assert why in message and "law_test.csv" in message
    (tmp_path / "data.tar").write_bytes(b"junk")
    assert "not a tar archive" in error(*command, f"--source={tmp_path}/data.tar", f"--out_dir={tmp_path}/a")


MBPP = {"text": "Add two.", "code": "def add(a, b):\r\n  return a + b", "task_id": 700, "test_setup_code": "",
        "test_list": ["assert add(1, 2) == 3"], "challenge_test_list": []}
HUMANEVAL = {"task_id": "HumanEval/0", "prompt": "def add(a, b):\n    \"\"\" Add. \"\"\"\n",
             "entry_point": "add",
             "canonical_solution": "    return a + b\n", "test": "def check(f):\n    assert f(1, 2) == 3\n"}
MATH = {"problem": "1/2+1/2?", "solution": "It is $\\boxed{1}$.", "level": "Level 1", "type": "Algebra"}


@pytest.mark.parametrize("name, file, row, changes", [
    ("mbpp", "mbpp.jsonl", MBPP, [({"test_list": "assert"}, "test_list"), ({"test_list": [1]}, "test_list"),
                                  ({"code": ""}, '"code"'),
                                  ({"task_id": "7"}, "task_id"), ({"text": None}, '"text"')]),
    ("humaneval", "HumanEval.jsonl.gz", HUMANEVAL, [({"prompt": 3}, '"prompt"'), ({"test": " "}, '"test"'),
                                                    ({"entry_point": None}, '"entry_point"')]),
    ("math", "test.jsonl", MATH, [({"solution": "It is 1."}, "scoring cannot read"),
                                  ({"solution": r"\boxed{1"}, "scoring cannot read"),
                                  ({"solution": r"\boxed{}"}, "scoring cannot read"),
                                  ({"answer": "2"}, "does not box its answer"),
                                  ({"problem": ""}, '"problem"')]),
])
def test_a_bad_row_of_a_benchmark_is_named(name, file, row, changes, tmp_path, capsys):
    command = [name, f"--source={tmp_path}", "--tokenizer=arithmetic", f"--out_dir={tmp_path}/out"]
    write_lines(tmp_path / file, [row, row])
    main(command)
    assert "note: " in capsys.readouterr().out or name == "mbpp"         # not the file that everybody knows
    for change, why in changes:
        write_lines(tmp_path / file, [row, row | change])
        message = error(*command)
        assert why in message and f"{file} line 2" in message


def test_math_has_a_training_split_where_the_user_has_it(tmp_path):
    write_lines(tmp_path / "test.jsonl", [MATH])
    write_lines(tmp_path / "train.jsonl", [MATH | {"problem": f"{i}?"} for i in range(9)])
    main(["math", f"--source={tmp_path}", "--val=3", "--tokenizer=arithmetic", f"--out_dir={tmp_path}/out"])
    assert load_manifest(tmp_path / "out")["counts"] == dict(train=6, val=3, test=1)
    assert load_split(tmp_path / "out", "test").problems[0].subject == "Algebra"


def test_the_mix_labels_each_problem_by_its_group_and_keeps_its_task(tmp_path, capsys):
    """Validation has some of each that training has not; MATH only where the user gives it."""
    folder = tmp_path / "in"
    write_lines(folder / "g/train.jsonl",
                [{"question": f"{i}+1?", "answer": f"#### {i + 1}"} for i in range(540)])
    write_lines(folder / "g/test.jsonl", [{"question": "test?", "answer": "#### 1"}])
    write_lines(folder / "b/mbpp.jsonl", [MBPP | {"task_id": i} for i in (5, 100, 550, 700, 701)])
    for split in ("dev", "val", "test"):
        write_lines(folder / f"m/{split}/law_{split}.csv", [f"{split} {i}?,1,2,3,4,B\n" for i in range(20)])
    write_lines(folder / "x/test.jsonl", [MATH])
    write_lines(folder / "x/train.jsonl", [MATH | {"problem": f"{i}?"} for i in range(505)])
    command = ["mix", f"--gsm8k={folder}/g", f"--mbpp={folder}/b", f"--mmlu={folder}/m",
               "--tokenizer=arithmetic",
               f"--out_dir={tmp_path}/out"]
    main(command)
    assert "the mix is without MATH" in capsys.readouterr().out
    manifest = load_manifest(tmp_path / "out")
    assert manifest["label_names"] == ["math", "code", "knowledge"] and set(manifest["counts"]) == {"train",
                                                                                                    "val"}
    assert "gsm8k/train.jsonl" in manifest["sources"] and "mbpp/mbpp.jsonl" in manifest["sources"]
    def count(split):
        return Counter((p.task, p.label) for p in load_split(tmp_path / "out", split).problems)
    assert count("train") == {("gsm8k", "math"): 40, ("mbpp", "code"): 2, ("mmlu", "knowledge"): 36}
    assert count("val") == {("gsm8k", "math"): 500, ("mbpp", "code"): 1, ("mmlu", "knowledge"): 4}
    prompts = [{p.prompt for p in load_split(tmp_path / "out",
                                             split).problems if p.task != "mbpp"} for split in ("train",
                                                                                                "val")]
    assert prompts[0].isdisjoint(prompts[1]) and not any("test" in prompt for prompt in set.union(*prompts))
    main([*command, f"--math={folder}/x"])
    assert Counter(p.task for p in load_split(tmp_path / "out", "val").problems)["math"] == 500
    (folder / "g/test.jsonl").unlink()
    assert "g/test.jsonl" in error(*command)


def test_a_batch_is_the_examples_padded_and_an_epoch_has_each_of_them_once(arithmetic):
    """Against loops over the examples."""
    data = load_split(arithmetic, "val")
    idx, (rows, columns), y, label = batch_of(data, [7, 3, 490], "cpu")
    found = {(int(r), int(c)): int(t) for r, c, t in zip(rows, columns, y, strict=True)}
    want, longest = {}, 0
    for row, i in enumerate((7, 3, 490)):
        tokens, mask = (z[data.offsets[i]:data.offsets[i + 1]].tolist() for z in (data.tokens, data.mask))
        longest = max(longest, len(tokens) - 1)
        assert idx[row, :len(tokens) - 1].tolist() == tokens[:-1] and label[row] == data.labels[i]
        want |= {(row, k): tokens[k + 1] for k in range(len(tokens) - 1) if mask[k + 1]}
    assert found == want and idx.shape == (3, longest)

    lengths = np.diff(data.offsets)
    epoch = batches_of_epoch(lengths, 16, 2, [1, 0])
    assert epoch.shape == (31, 2, 8) and len(set(epoch.flatten().tolist())) == 31 * 16
    assert np.mean([lengths[ids].max() - lengths[ids].mean() for step in epoch for ids in step]) < 1
    assert (batches_of_epoch(lengths, 16, 2, [1, 0]) == epoch).all()
    assert (batches_of_epoch(lengths, 16, 2, [1, 1]) != epoch).any()
    assert set(batches_of_epoch(lengths[:5], 8, 1, 0).flatten().tolist()) == set(range(5))    # to fill one


# ---------------------------------------------------------------- reading back

def test_missing_data_names_the_command(arithmetic, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"python prepare_data\.py gsm8k$"):
        load_split("data/gsm8k", "train")
    with pytest.raises(UserError, match=r"python prepare_data\.py arithmetic --out_dir=else/arithmetic$"):
        load_manifest(Path("else/arithmetic"))
    with pytest.raises(UserError, match="no split 'dev'.*train, val, test"):
        load_split(arithmetic, "dev")


@pytest.fixture
def copy(arithmetic, tmp_path):
    """A copy of the prepared data to damage."""
    for path in arithmetic.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}",
                                  '{"counts": {}, "n_labels": 1, "label_names": []}', "\x00"])
def test_a_damaged_manifest_is_refused(copy, text):
    (copy / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="manifest.json is damaged.*python prepare_data.py"):
        load_split(copy, "val")


def test_damaged_arrays_are_refused(copy):
    path = copy / "val.npz"
    good = path.read_bytes()
    arrays = dict(np.load(path))
    def refused(**changes):
        np.savez(path, **{k: v for k, v in {**arrays, **changes}.items() if v is not None})
        with pytest.raises(UserError, match="damaged.*python prepare_data.py"):
            load_split(copy, "val")
    load_split(copy, "val")
    for name, array in arrays.items():
        refused(**{name: None})                      # absent
        refused(**{name: array[:-1]})                # too short
        refused(**{name: array.astype(np.float32)})  # another type
        refused(**{name: array.astype(object)})      # a pickle
    offsets, tokens, labels, mask = (arrays[k].copy() for k in ("offsets", "tokens", "labels", "mask"))
    offsets[3], tokens[5], labels[0], mask[0] = offsets[9], 60000, 200, True
    shifted, endless = arrays["offsets"].copy(), arrays["tokens"].copy()
    shifted[0], endless[-1] = 1, 0
    for changes in (dict(offsets=offsets), dict(tokens=tokens), dict(labels=labels), dict(mask=mask),
                    dict(offsets=shifted), dict(tokens=endless)):
        refused(**changes)
    for bad in (b"", b"junk", good[:-100], good[:5000]):
        path.write_bytes(bad)
        with pytest.raises(UserError, match="damaged"):
            load_split(copy, "val")
    for i in range(40):                              # one flipped byte, in the arrays or in the zip's fields
        place = random.Random(i).randrange(len(good))
        path.write_bytes(good[:place] + bytes([good[place] ^ 255]) + good[place + 1:])
        try:
            data = load_split(copy, "val")           # fine if the byte says nothing about the content
        except UserError:
            continue
        assert all(np.array_equal(arrays[k], getattr(data, k)) for k in arrays)


def test_damaged_problems_are_refused(copy):
    path = copy / "val.jsonl"
    lines = path.read_text().splitlines()
    for content in ("\n".join(lines[:-1]), "junk", None):
        path.write_text(content) if content is not None else path.unlink()
        with pytest.raises(UserError, match="python prepare_data.py"):
            load_split(copy, "val")


# ---------------------------------------------------------------- the command line

def test_a_bad_command_is_one_line(tmp_path, capsys):
    assert "did you mean gsm8k" in error("gsm8")
    assert "unknown task" in error("--source=x")
    assert "'train'" in error("arithmetic", "train")
    assert "config" in error("gsm8k", "config/x.py")
    assert "sed" in error("arithmetic", "--sed=3")
    assert "source" in error("arithmetic", "--source=x")         # an option of the other tasks
    assert "train" in error("arithmetic", "--train=many")
    for n in (0, -1, 10**9):
        assert "out of range" in error("arithmetic", f"--train={n}", f"--out_dir={tmp_path}/x")
    (tmp_path / "plain").write_text("")
    assert "plain" in error("arithmetic", f"--out_dir={tmp_path}/plain/x")
    main([])
    assert "arithmetic|styles|gsm8k" in capsys.readouterr().out
    result = subprocess.run([sys.executable, ROOT / "prepare_data.py", "nonsense"], capture_output=True,
                            text=True)
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and not result.stdout


def test_an_unknown_tokenizer_is_refused():
    with pytest.raises(UserError, match="gpt2 and arithmetic"):
        load_tokenizer("gpt3")


def test_a_users_own_file_is_never_written_over(tmp_path):
    """As where --source is the folder that the data would go to."""
    lines = "".join(json.dumps({"question": f"{i}?", "answer": f"#### {i}"}) + "\n" for i in range(8))
    (tmp_path / "train.jsonl").write_text(lines)
    message = error("jsonl", f"--source={tmp_path}", "--val=2", f"--out_dir={tmp_path}")
    assert "train.jsonl was not written by prepare_data.py" in message and "--out_dir" in message
    assert (tmp_path / "train.jsonl").read_text() == lines and sorted(os.listdir(tmp_path)) == ["train.jsonl"]
