"""The embedded task: its problems are checked against independent computations on the texts themselves."""
import os
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

from plumbing.dataset import load_manifest, load_split
from plumbing.tokenizer import describe_tokenizer, encode_question
from prepare_data import main
from tasks import TASKS, load_problems, score
from tasks.arithmetic import OBJECTS, ONLY, is_in_style, make_tokenizer
from tasks.problem import PROMPT

ROOT = Path(__file__).resolve().parent.parent
SPLITS = ("train", "val", "test", "mix", "mix_val", "mix_test")


@pytest.fixture(scope="module")
def arithmetic(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("data") / "arithmetic"
    main(["arithmetic", f"--out_dir={out_dir}", "--train=1500", "--mix=3000"])
    return out_dir


@pytest.fixture(scope="module")
def encoding():
    return make_tokenizer()


def question_of(problem):
    return problem.prompt.removeprefix("Question: ").removesuffix("\nAnswer:")


# ---------------------------------------------------------------- the generator

def test_every_annotation_is_right_and_the_last_result_is_the_answer(arithmetic):
    """Every <<expression=result>> recomputed with fractions; #### is the last; all numbers in 0..99."""
    for split in SPLITS:
        for problem in load_problems(arithmetic, split):
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
    for problem in load_problems(arithmetic, "train"):
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
        problems = load_problems(arithmetic, split)
        for problem in problems:
            expected = drill_answer(question_of(problem))
            if expected is not None:
                found += 1
                assert int(problem.answer.split("#### ")[1]) == expected, problem
                assert re.search(rf"\b{expected}\b", problem.answer.split("####")[0])
    total = 3000 + 500 + 1000
    assert 0.4 * total < found < 0.6 * total         # half the mixture; a family not known here would show
    assert all(drill_answer(question_of(p)) is None for p in load_problems(arithmetic, "train"))


def test_no_two_splits_share_a_question_or_its_numbers(arithmetic):
    """No question twice, and no two splits share the numbers of a question in their order."""
    questions, calculations = Counter(), {}
    for split in SPLITS:
        for problem in load_problems(arithmetic, split):
            questions[question_of(problem)] += 1
            key = tuple(re.findall(r"\d+", question_of(problem)))
            assert calculations.setdefault(key, split) == split
    assert max(questions.values()) == 1 and sum(questions.values()) == 1500 + 500 + 1000 + 3000 + 500 + 1000


def test_problems_are_short_and_various(arithmetic):
    """Short enough for the demo, and not a handful of sums: what training on it takes for granted."""
    split = load_split(arithmetic, "train")
    problems = load_problems(arithmetic, "train")
    length = np.diff(split.offsets)
    targets = np.add.reduceat(split.mask.astype(int), split.offsets[:-1])
    assert 25 < (length - targets).mean() < 40 and 35 < targets.mean() < 52 and length.max() < 128
    sums = Counter(re.findall(r"<<(\d+[-+*/]\d+)=", "".join(p.answer for p in problems)))
    assert len(sums) > 0.4 * sums.total()                       # numbers end at 99, so operations do repeat
    finals = Counter(p.answer.split("#### ")[1] for p in problems)
    assert finals.most_common(1)[0][1] < 0.04 * len(problems)      # no constant answer scores


def test_the_size_of_a_split_disturbs_no_other(arithmetic, tmp_path):
    main(["arithmetic", f"--out_dir={tmp_path}", "--train=100", "--mix=1"])
    for split in ("val", "test", "mix_test"):
        assert (tmp_path / f"{split}.npz").read_bytes() == (arithmetic / f"{split}.npz").read_bytes()
    assert load_problems(tmp_path, "train") == [
        p._replace(place=q.place) for p, q in zip(load_problems(arithmetic, "train"),
                                                  load_problems(tmp_path, "train"))]
    main(["arithmetic", f"--out_dir={tmp_path}", "--train=100", "--mix=1", "--seed=5"])
    assert (tmp_path / "val.npz").read_bytes() != (arithmetic / "val.npz").read_bytes()


def test_the_same_input_gives_the_same_bytes(arithmetic, tmp_path):
    """In a process with another hash seed, too; and no clock in the zip files."""
    subprocess.run([sys.executable, ROOT / "prepare_data.py", "arithmetic", f"--out_dir={tmp_path}", "--train=1500",
                    "--mix=3000"], check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": "1"})
    ours, theirs = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in (arithmetic, tmp_path))
    assert ours == theirs and len(ours) == 2 * len(SPLITS) + 1
    with zipfile.ZipFile(tmp_path / "val.npz") as archive:
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
        for problem in load_problems(arithmetic, split)[:500]:
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
    """Masks cover exactly the answer and end of text; ids, groups and texts belong together."""
    data, manifest = load_split(out_dir, split), load_manifest(out_dir)
    problems = load_problems(out_dir, split)
    assert data.tokens.dtype == np.uint16 and data.mask.dtype == np.bool_
    assert data.offsets.dtype == np.int64 and data.groups.dtype == np.uint8
    assert len(data.offsets) == len(problems) + 1 == manifest["counts"][split] + 1
    for i, problem in enumerate(problems):
        tokens = data.tokens[data.offsets[i]:data.offsets[i + 1]]
        mask = data.mask[data.offsets[i]:data.offsets[i + 1]]
        assert encoding.decode(tokens[mask]) == f"{problem.answer}<|endoftext|>"
        assert tokens[mask][-1] == encoding.eot_token and (tokens == encoding.eot_token).sum() == 1
        assert encoding.decode(tokens[~mask]) == problem.prompt
        assert problem.prompt == f"Question: {question_of(problem)}\nAnswer:"
        assert encode_question(encoding, PROMPT, question_of(problem)) == tokens[~mask].tolist()
        assert not mask[:(~mask).sum()].any()        # the prompt comes first, in one piece
        steps = sum(1 for line in problem.answer.split("####")[0].split("\n") if line)
        assert data.groups[i] == min(steps, len(manifest["group_names"])) - 1
        assert manifest["group_names"][data.groups[i]] == problem.group
        assert ("<<" in problem.answer) <= (not strip)
    assert np.diff(data.offsets).max() <= manifest["max_tokens"]
    return data


@pytest.mark.parametrize("split", SPLITS)
def test_masks_cover_exactly_the_answer_and_the_end_of_text(arithmetic, encoding, split):
    check_split(arithmetic, split, encoding)


def test_the_manifest_says_what_is_there(arithmetic, encoding):
    manifest = load_manifest(arithmetic)
    assert manifest["tokenizer"] == describe_tokenizer(encoding)
    assert manifest["n_vocab"] == encoding.n_vocab and manifest["eot"] == encoding.n_vocab - 1
    assert manifest["counts"] == dict(train=1500, val=500, test=1000, mix=3000, mix_val=500, mix_test=1000)
    assert manifest["group_names"] == ["1 step", "2 steps", "3 steps", "4 or more steps"]
    longest = max(np.diff(load_split(arithmetic, split).offsets).max() for split in SPLITS)
    assert manifest["max_tokens"] == longest


@pytest.fixture(scope="module")
def styles(tmp_path_factory):
    return TASKS["styles"].load(TASKS["styles"].options(train=2000, mix=200), None)[0]


def test_only_the_group_tells_the_style_and_some_things_are_asked_by_one_group_alone(styles):
    """Of three questions in four either group may ask; both ways of answering are in every split."""
    for split in ("train", "val", "test"):
        problems = styles[split]
        alone = [p for p in problems if any(f" {thing}" in p.prompt for thing in ONLY)]
        assert 0.15 < len(alone) / len(problems) < 0.35
        for p in alone:
            (thing,) = [thing for thing in ONLY if f" {thing}" in p.prompt]
            assert p.group == ONLY[thing]
        shared = [p for p in problems if p not in alone]
        assert 0.4 < sum(p.group == "sums" for p in shared) / len(shared) < 0.6
        for thing in OBJECTS[6:]:                            # and no other thing tells
            groups = {p.group for p in shared if f" {thing}" in p.prompt}
            assert len(groups) == 2 or split != "train"


def test_both_styles_answer_the_same_questions_with_the_same_numbers(styles):
    """The calculations of an answer are those of the arithmetic task, whose problems these are."""
    def sums(text):
        return re.findall(r"<<[^>]*>>\d+", text), text.split("####")[1]

    plain = {p.prompt: p.answer for p in TASKS["arithmetic"].load(TASKS["arithmetic"].options(train=2000, mix=200), None)[0]["train"]}
    same = 0
    for p in styles["train"]:
        assert score(p, p.answer) == (True, True, True)
        assert is_in_style(p.group, p.answer) and not is_in_style({"words": "sums", "sums": "words"}[p.group],
                                                            p.answer)
        if p.prompt in plain:
            same += 1
            assert sums(p.answer) == sums(plain[p.prompt])
            assert p.group == "sums" or p.answer == plain[p.prompt]
            other = p._replace(group="words" if p.group == "sums" else "sums")
            assert score(other, p.answer) == (True, True, False)         # right, and in the other group's way
    assert same > 200
