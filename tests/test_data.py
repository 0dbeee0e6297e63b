"""prepare_data.py: what it writes is checked against independent computations on the texts themselves."""
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import zipfile
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare_data
from configurator import UserError
from prepare_data import batch_of, batches_of_epoch, load_manifest, load_split, main
from tokens import PROMPT, encode_question, fingerprint, load_tokenizer

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
    """Every <<expression=result>> recomputed with fractions; #### is the last result; all numbers in 0..99."""
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
    """Each operation uses the result before it, once; its other number is told in the question or an older result."""
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
    assert 0.4 * total < found < 0.6 * total         # half the mixture; a family this test does not know would show
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
    assert [encoding.decode([i]) for i in encoding.encode_ordinary("a 3*12 = <<3*12=36>>36 cups.\n#### 36")] == \
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
        assert encoding.decode(tokens[~mask]) == problem.prompt == f"Question: {question_of(problem)}\nAnswer:"
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
    assert manifest["label_names"] == ["1 step", "2 steps", "3 steps", "4 or more steps"] and manifest["n_labels"] == 4
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
                            "answer": f"{i}+1 = <<{i}+1={i + 1}>>{i + 1}, {i}-0=$<<{i}-0={i}>>{i}\n#### {i + 1}"})
                for i in range(n)]
        if line is not None:
            rows[16] = line
        (folder / "train.jsonl").write_text("\n".join(rows) + "\n")
        (folder / "test.jsonl").write_text("\n".join(rows[:3]) + "\n")
        return folder
    return write


@needs_gpt2
def test_a_subset_is_nested_and_never_touches_what_is_held_out(source, tmp_path, capsys):
    sizes = {}
    for n in (0, 5, 10):
        out_dir = tmp_path / f"out{n}"
        main(["gsm8k", f"--source={source()}", f"--out_dir={out_dir}", f"--subset={n}", "--strip_annotations"])
        sizes[n] = check_split(out_dir, "train", load_tokenizer("gpt2"), strip=True).problems
        assert (out_dir / "val.npz").read_bytes() == (tmp_path / "out0" / "val.npz").read_bytes()
    for problem in sizes[0]:
        i = int(question_of(problem).split()[2])
        assert problem.answer == f" {i}+1 = {i + 1}, {i}-0=${i}\n#### {i + 1}"
    assert "is not the original file" in capsys.readouterr().out
    questions = {n: [question_of(p) for p in problems] for n, problems in sizes.items()}
    assert [len(q) for q in questions.values()] == [20, 5, 10]
    assert questions[5] == questions[10][:5] and questions[10] == questions[0][:10]
    held_out = {question_of(p) for p in load_split(tmp_path / "out0", "val").problems}
    assert len(held_out) == 500 and held_out.isdisjoint(questions[0])
    manifest = load_manifest(tmp_path / "out0")
    assert manifest["strip_annotations"] is True and set(manifest["sources"]) == {"train.jsonl", "test.jsonl"}
    assert error("gsm8k", f"--source={source()}", f"--out_dir={tmp_path}/x", "--subset=21").count("1 to 20")
    assert error("gsm8k", f"--source={source()}", f"--out_dir={tmp_path}/x", "--subset=-1").count("1 to 20")


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
    (tmp_path / "train.jsonl").write_text("".join(f'{{"question": "Is {i} even?", "answer": "{i % 2 == 0}"}}\n'
                                                  for i in range(200)))
    out_dir = tmp_path / "out"
    return ["jsonl", f"--source={tmp_path}", "--val=9", "--tokenizer=arithmetic", f"--out_dir={out_dir}"], out_dir


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
    originals = {file: [json.loads(line) for line in open(SHARED / "gsm8k" / f"{file}.jsonl", encoding="utf-8")]
                 for file in ("train", "test")}
    def original(file):
        return sorted((r["question"], r["answer"]) for r in originals[file])
    def ours(*names):
        return sorted((question_of(p), p.answer[1:]) for name in names for p in splits[name].problems)
    assert ours("train", "val") == original("train") and ours("test") == original("test")
    assert load_manifest(tmp_path)["max_tokens"] == 439
    # results are compared across machines and years: which problems are held out must never change
    held_out = hashlib.sha256("\n".join(question_of(p) for p in splits["val"].problems).encode()).hexdigest()
    assert held_out[:16] == "09ee493ae76a7879"


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


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"counts": {}, "n_labels": 1, "label_names": []}', "\x00"])
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
    for i in range(40):                              # one flipped byte, in the arrays or in the zip's own fields
        place = random.Random(i).randrange(len(good))
        path.write_bytes(good[:place] + bytes([good[place] ^ 255]) + good[place + 1:])
        try:
            data = load_split(copy, "val")           # fine if it hit a field that says nothing about the content
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
    assert "subset" in error("arithmetic", "--subset=3")         # an option of the other task
    assert "train" in error("arithmetic", "--train=many")
    for n in (0, -1, 10**9):
        assert "out of range" in error("arithmetic", f"--train={n}", f"--out_dir={tmp_path}/x")
    (tmp_path / "plain").write_text("")
    assert "plain" in error("arithmetic", f"--out_dir={tmp_path}/plain/x")
    main([])
    assert "arithmetic|styles|gsm8k" in capsys.readouterr().out
    result = subprocess.run([sys.executable, ROOT / "prepare_data.py", "nonsense"], capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and not result.stdout


def test_an_unknown_tokenizer_is_refused():
    with pytest.raises(UserError, match="gpt2 and arithmetic"):
        load_tokenizer("gpt3")
