r"""
tasks/: what an answer is worth, over the whole files of the benchmarks where they are.

Truths: the authors' own reading of GSM8K, values computed from formulas, the benchmarks' reference solutions,
enumeration. L2D_FULL=1 runs every reference solution of HumanEval and MBPP; without it a sample.
"""
import csv
import itertools
import math
import os
import random
import re
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tasks
from configurator import UserError
from tasks import TASKS, Problem, allow_code, check_gold, few_shot, pass_at_k, sandbox, score, vote
from tasks.arithmetic import OBJECTS, ONLY, in_style
from tasks.sandbox import run
from tasks.scoring import boxed, flexible_answer, majority, normalise, strict_answer
from tokens import choice_tokens, load_tokenizer

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"
BENCHMARKS = SHARED / "benchmarks"
needs_benchmarks = pytest.mark.skipif(not BENCHMARKS.is_dir(),
                                      reason=f"the benchmarks' files are not in {BENCHMARKS}")


def problem(answer, task="gsm8k", **more):
    return Problem("Question: How many?\nAnswer:", f" {answer}", task, where="here", **more)


def load(name, tmp_path, **options):
    """{split: [Problem]} of a task's files."""
    return TASKS[name].load(TASKS[name].options(**options), tmp_path / "source")[0]


def perturbed(text, rng):
    """The text with one of its digits changed."""
    i = rng.choice([m.start() for m in re.finditer("[0-9]", text)])
    return text[:i] + str((int(text[i]) + rng.randint(1, 9)) % 10) + text[i + 1:]


# ---------------------------------------------------------------------------------- numbers after ####
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
    ("#### 3/0", "#### 3", True, True, True),
    ("The answer is 18", "#### 18", False, True, False),
    ("18 apples and 3 pears.", "#### 18", False, False, False),
    ("18 apples and 3 pears.", "#### 3", False, True, False),
    ("no number at all", "#### 18", False, False, False),
    ("#### 7\nQuestion: 9+9?\nAnswer: 18\n#### 18", "#### 18", False, False, True),   # run-on text: no
    ("#### 18\nQuestion: 3+4?\nAnswer: 7\n#### 7", "#### 18", True, True, True),
    ("7\nQuestion: 9+9?\nAnswer: 18\n#### 18", "#### 18", False, False, False),
    ("#### 7\n#### 18", "#### 18", False, False, True),           # the first counts
    ("####\n#### 18", "#### 18", True, True, True),
    ("#### .", "#### 18", False, False, False),
    ("#### ,", "#### 18", False, False, False),
    ("#### 1.2.3", "#### 1", False, False, False),
    ("####", "#### 18", False, False, False),
    ("", "#### 18", False, False, False),
    ("", "#### 0", False, False, False),
])
def test_an_output_is_worth_what_its_number_is(output, gold, strict, flexible, well_formed):
    assert score(problem("some steps\n" + gold), output) == (strict, flexible, well_formed)


@pytest.mark.parametrize("answers, chosen", [
    ([], None), ([None], None), ([None, None], None), ([7], 7), ([None, 7], 7), ([None, None, 7], 7),
    ([7, None, None, None], 7), ([1, 2, 2], 2), ([2, 1, 2], 2), ([1, 2], 1), ([2, 1], 2),
    ([3, 1, 1, 2, 2], 1),
    ([3, 2, 1, 1, 2], 2), ([None, 0, 5, 0], 0), ([0, 5], 0), ([1, None, 2, None, 2], 2),
])
def test_the_majority_is_the_first_of_the_most_frequent_answers(answers, chosen):
    """Nothing is no answer, zero is one."""
    assert majority(answers) == chosen and majority(iter(answers)) == chosen


@pytest.mark.parametrize("text, strict, flexible", [("#### .5", "1/2", "1/2"), ("#### 12/0", "12", "12"), ("it is .25 or so", None, "1/4"),
                                                    ("so...5", None, "5"), ("about 3.", None, "3")])
def test_the_flexible_reader_reads_what_the_strict_one_does(text, strict, flexible):
    assert tasks.scoring.read_number(None, text) == tuple(x and Fraction(x) for x in (strict, flexible))


@pytest.mark.parametrize("outputs, chosen, strict, flexible, well_formed", [
    (["a #### 7", "b #### 18", "c #### 18"], 1, True, True, True),        # its first sample is the text
    (["a #### 18", "b #### 7"], 0, True, True, True),                     # a tie: the first
    (["a #### 7", "b #### 18"], 0, False, False, True),
    (["none", "b #### 18", "none"], 1, True, True, True),
    (["none", "nothing"], 0, False, False, False),
    (["", ""], 0, False, False, False),
    (["18", "so 18", "#### 7"], 2, False, True, True),                    # strict and flexible vote apart
    (["18", "#### 7", "#### 7"], 1, False, False, True),
    (["7", "7", "#### 18"], 2, True, False, True),
    (["a #### 1,234", "b #### 18", "c #### 18.00"], 1, True, True, True),  # numbers, not how they are written
    (["a #### 7\nQuestion: #### 18", "b #### 18", "c #### 7"], 0, False, False, True),
    (["7\nQuestion: 9+9?\n#### 18", "#### 18"], 1, True, False, True),   # flexible: 7 and 18, so 7
])
def test_a_vote_counts_strict_and_flexible_answers_apart(outputs, chosen, strict, flexible, well_formed):
    assert vote(problem("some steps\n#### 18"), outputs) == (outputs[chosen], (strict, flexible, well_formed))


def test_a_gold_answer_without_a_number_is_never_met():
    """Nothing equals nothing, so an empty output would be right where the gold has no strict number."""
    assert score(problem("#### $18"), "")[:2] == (False, False)
    assert score(problem("#### unknown"), "no idea")[:2] == (False, False)


def authors(text):
    """The pattern and the cleaning of grade_school_math/dataset.py, read as a decimal."""
    match = re.compile(r"#### (\-?[0-9\.\,]+)").search(text)
    cleaned = match[1].strip().replace(",", "").rstrip(".") if match else ""
    return Decimal(cleaned) if re.fullmatch(r"-?(\d+\.?\d*|\.\d+)", cleaned) else None


def test_strict_is_the_authors_scoring():
    """On every short text of these signs."""
    for n in range(5):
        for text in map("".join, itertools.product("-1,.$", repeat=n)):
            assert strict_answer(f"#### {text} x") == authors(f"#### {text} x"), text


@pytest.mark.skipif(not (SHARED / "gsm8k").is_dir(), reason="GSM8K is not in ../shared/gsm8k")
def test_every_answer_of_gsm8k_scores_itself_and_no_perturbed_one_does(tmp_path):
    splits, rng = load("gsm8k", tmp_path, source=str(SHARED / "gsm8k")), random.Random(0)
    assert {k: len(v) for k, v in splits.items()} == dict(train=6973, val=500, test=1319)
    for p in itertools.chain(*splits.values()):
        check_gold(p)
        assert score(p, p.answer) == (True, True, True)
        steps, last = p.answer.split("#### ")
        assert strict_answer(p.answer) == int(last.replace(",", "")) == authors(p.answer)
        wrong = perturbed(last, rng)
        assert score(p, f"{steps}#### {wrong}") == (False, False, True) and not any(score(p, ""))


# ------------------------------------------------------------------------------- golds that can be read
@pytest.mark.parametrize("tail", ["18", "-3", "1,234", "12,345,678.90", "0", "18.", "0.5", ".5", "007", "18 ",
                                  "18\n"])
def test_a_plain_number_is_a_gold(tail):
    check_gold(problem(f"so it is\n#### {tail}"))
    check_gold(problem(f"so it is\n#### {tail}", task="jsonl"))


@pytest.mark.parametrize("answer", [
    "#### $18", "####18", "#### \u22125", "#### 1/2", "#### 18%", "#### 18 apples", "#### 1e3", "#### 1 234",
    "#### 1,2", "#### 12,34", "#### 1,234,5", "#### 1.2.3", "#### 1.234,5", "#### ,5", "#### --5", "#### 5-3",
    "#### \u0663", "#### \uff11", "#### \u00bd", "#### +5", "#### (5)", "#### 5\u00b0", "####\t18",
    "####\n18",
    "####  18", "#### ", "####", "####.", "#### .", "#### -", "#### 18\nor 19", "#### 18 #### 18",
    "#### 3\n#### 4",
    "#### 18 <<x>>", "#### 18\nQuestion: And?", "Question:\nQuestion: no\n#### 18", "#### 0x12", "#### 1_000",
    "#### inf", "#### nan", "#### " + "9" * 5000, "#### 18\u200b", "#### \u202e18", "####\u00a018",
    "### 18",
    "18", "It is 18.",
])
def test_a_gold_that_scoring_cannot_read_whole_is_refused(answer):
    with pytest.raises(UserError) as e:
        check_gold(problem(answer))
    message = str(e.value)
    assert message.startswith("error: here: ") and '"#### " and a plain number' in message
    assert "\n" not in message


@settings(max_examples=500, deadline=None)
@given(st.text("0123456789,.-$ /\n#e\u2212", max_size=12) | st.text(max_size=8),
       st.sampled_from(["#### ", "####"]))
@example("1,000", "#### ")
def test_whatever_gold_is_accepted_is_read_by_everybody_as_the_same_number(tail, mark):
    """Golds as anyone may write them: those that pass are one number for the authors, us and Python."""
    text = f"steps 3+4 = 7\n{mark}{tail}"
    p = problem(text)
    try:
        check_gold(p)
    except UserError:
        return
    plain = text.split("####")[1].strip().replace(",", "").rstrip(".")
    assert strict_answer(text) == flexible_answer(text) == authors(text) == Fraction(plain)
    assert score(p, p.answer) == (True, True, True)
    other = plain + "1" if "." in plain else str(int(plain) + 1)
    assert score(p, f"#### {other}")[:2] == (False, False)


# ---------------------------------------------------------------------------------- one's own data
@pytest.mark.parametrize("output, right", [
    ("Paris", True), (" paris.", True), ("PARIS\n", True), ("\u201cParis", False), ("Paris, France", False),
    ("", False),
    ("Paris\nQuestion: And of Spain?\nAnswer: Madrid", True), ("Madrid", False), ("the Paris", False),
    ("'Paris'!", True),
])
def test_words_are_compared_but_for_case_spacing_and_final_signs(output, right):
    assert score(problem("Paris", task="jsonl"), output) == (right, right, bool(output))
    check_gold(problem("Paris", task="jsonl"))


@pytest.mark.parametrize("gold, others", [("5", ["5!", ".5", "-5", "5%", "5 5"]), (".5", ["5", "5."]), ("x", ["-x", "x'"])])
def test_signs_that_change_a_number_count(gold, others):
    assert score(problem(gold, task="jsonl"), f" {gold}.\n").right
    assert [other for other in others if score(problem(gold, task="jsonl"), other).right] == (["x'"] if gold == "x" else [])


def test_accents_match_however_they_are_composed():
    assert score(problem("Caf\u00e9", task="jsonl"), "cafe\u0301").right
    assert not score(problem("Caf\u00e9", task="jsonl"), "cafe").right


def test_own_data_with_a_number_is_scored_by_the_number():
    p = problem("3+4 = 7\n#### 7", task="jsonl")
    assert score(p, "seven: #### 7").right and not score(p, "3+4 = 8\n#### 8").right


@pytest.mark.parametrize("answer", ["...", "!", "#### many", "yes\nQuestion: no"])
def test_own_data_that_scoring_cannot_read_is_refused(answer):
    with pytest.raises(UserError, match='here: .*expected words, or "#### "'):
        check_gold(problem(answer, task="jsonl"))


# ---------------------------------------------------------------------------------- letters
FOUR = (" A", " B", " C", " D")
TEN = tuple(f" {c}" for c in "ABCDEFGHIJ")


@pytest.mark.parametrize("output, strict, flexible", [
    ("B", True, True), (" B", True, True), ("\nB", True, True), ("B.", True, True),
    ("B) because", True, True),
    ("B\nQuestion: next", True, True), ("Because", False, False), ("B's", False, False), ("BC", False, False),
    ("C", False, False), ("", False, False), ("The answer is B.", False, True), ("The answer is (B)", False,
                                                                                 True),
    ("It is A or B", False, False), ("I think B", False, True), ("b", False, False), ("E", False, False),
    ("A, so the answer is B", False, False), ("(B)", False, True),
])
def test_a_letter_is_the_first_thing_that_is_written(output, strict, flexible):
    assert score(problem("B", task="mmlu", choices=FOUR), output)[:2] == (strict, flexible)


def test_every_letter_scores_itself_and_no_other():
    for right, written in itertools.product(TEN, TEN):
        assert score(problem(right.strip(), task="mmlu_pro", choices=TEN),
                     written) == (right == written,) * 2 + (True,)


@needs_benchmarks
def test_all_golds_of_mmlu_score_themselves(tmp_path):
    splits = load("mmlu", tmp_path, source=str(BENCHMARKS / "mmlu"))
    assert {k: len(v) for k, v in splits.items()} == {"dev": 285, "test": 14042}
    assert len({p.subject for p in splits["test"]}) == 57
    for p in itertools.chain(*splits.values()):
        assert score(p, p.answer) == (True, True, True)
        wrong = [c for c in p.choices if c != p.answer]
        assert len(wrong) == 3 and not any(score(p, c).right for c in wrong) and not any(score(p, ""))
    # an independent reading of one table
    path = BENCHMARKS / "mmlu/test/anatomy_test.csv"
    with open(path, newline="") as f:
        for row, p in zip(csv.reader(f), [p for p in splits["test"] if p.subject == "anatomy"], strict=True):
            assert p.prompt == "Question: {}\nA. {}\nB. {}\nC. {}\nD. {}\nAnswer:".format(*map(str.strip,
                                                                                               row[:1]),
                                                                                               *row[1:5])
            assert p.answer == f" {row[5]}"


def test_letters_are_single_tokens_after_what_they_share(monkeypatch):
    """By both tokenizers: the text with the tokens put together is the text encoded at once."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    for name in ("arithmetic", "gpt2") if (SHARED / "tiktoken_cache").is_dir() else ("arithmetic",):
        encoding = load_tokenizer(name)
        first, ids = choice_tokens(encoding, TEN)
        assert [encoding.decode([*first, i]) for i in ids] == list(TEN) and len(set(ids)) == 10
        assert (first == []) == (name == "gpt2")
    with pytest.raises(UserError, match="no single token of arithmetic"):
        choice_tokens(load_tokenizer("arithmetic"), (" yes", " no"))


# ---------------------------------------------------------------------------------- formulas
@pytest.mark.parametrize("text, inside", [
    (r"so \boxed{5}.", "5"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{1} no, \boxed{2}", "2"),
    (r"\boxed{\{1,\{2\}\}}", r"\{1,\{2\}\}"), (r"\boxed{", None), (r"\boxed{\frac{1}{2}", None), ("5", None),
    ("", None),
    (r"\fbox{3}", "3"), (r"\boxed{}", ""), (r"\boxed{a}\boxed{b", None),
    ("x" * 10_000 + r"\boxed{7}" + "}" * 50, "7"),
])
def test_the_last_box_is_read_with_its_braces_counted(text, inside):
    assert boxed(text) == inside


SAME = [  # the examples in the comments of Hendrycks' math_equivalence.py, of Minerva's appendix, and our own
    (r"\frac12", r"\frac{1}{2}", "1/2", r"\dfrac{1}{2}", r"\tfrac12", "0.5", ".5", r"\frac 12",
     r"\frac{1}{2}.", "0.50"),
    (r"\frac1{72}", r"\frac{1}{72}", "1/72"), (r"\sqrt3", r"\sqrt{3}"), (r"\sqrt 3", r"\sqrt{3}"),
    ("10", "10.", "10.0", "010", r"10\%", r"\$10", "$10$", r"10^\circ", r"10^{\circ}", r"10 \text{ cm}",
     r"10\mbox{ cm}^2",
     "10 inches", r"x=10", "x = 10", r"10\!", r"\text{10}", r"10\text{ square units}", "10 square units",
     "10cm", "10 meters."),
    ("10,000", "10000", r"10,\!000", "10{,}000", r"\$10,000"), (r"\left( 1, 2 \right)", "(1,2)", r"(1,\,2)"),
    (r"\text{Evelyn}", "Evelyn", r"\textbf{Evelyn}", r"\mathrm{Evelyn}"), (r"\text{(C)}", "C", "(C)",
                                                                           r"\text{C}"),
    ("4210_{5}", "4210_5"), ("x^{2}+1", "x^2+1", "x^2 + 1"), (r"-\frac{1}{3}", r"\frac{-1}{3}", "-1/3",
                                                              r"-\frac13"),
    (r"x \in [-2,7]", "[-2,7]"), (r"\frac{\sqrt3}3", r"\frac{\sqrt{3}}{3}"), ("-.25", "-0.25"),
    ("3.210", "3.21"),
    (r"\begin{pmatrix} 1/5 \\ -2 \end{pmatrix}", r"\begin{pmatrix}\frac{1}{5}\\-2\end{pmatrix}"),
    (r"\frac{270}7\text{ degrees}", r"\frac{270}{7}^\circ", r"\frac{270}{7}"),
]
DIFFERENT = [
    "1", "-1", "2", "10", "12", r"\frac{1}{2}", r"\frac{2}{1}", r"-\frac{1}{2}", r"1\frac{1}{2}", "0.25",
    "2.5", "25", "0.2", "20", r"\sqrt{2}", r"\sqrt{12}", r"2\sqrt{2}", "x", "2x", "x^2", "x_2", "x^{12}",
    "x^{123}", "(1,2)", "[1,2]", "(1,2]", "(2,1)", "1,2", "(12)", r"\{1,2\}", r"\pi", r"2\pi",
    r"\frac{\pi}{2}", "i", "1+i", "1-i", r"1\pm i", "A", "B", "Evelyn", "Evel", r"\infty", r"-\infty",
    r"(1,2)\cup(3,4)", "10_2", "10_3", "y=2x+10", r"\begin{pmatrix}1\\2\end{pmatrix}",
    r"\begin{pmatrix}1\\-2\end{pmatrix}", r"\begin{pmatrix}12\end{pmatrix}", r"\frac{3}{4}",
    r"\frac{1}{34}", r"\frac{13}{4}", "1234", "12.34", "12,34", r"\cot x", r"\tan x", "5 or more",
    "5 or less", "5", "3 or 4", "3 and 4", "5m+1", "5t", "5m", "5k",
]


@pytest.mark.parametrize("spellings", SAME, ids=lambda spellings: spellings[0])
def test_spellings_of_one_formula_are_one(spellings):
    assert len({normalise(text) for text in spellings}) == 1, [normalise(text) for text in spellings]


def test_formulas_that_differ_stay_apart():
    for a, b in itertools.combinations([*DIFFERENT], 2):
        assert normalise(a) != normalise(b), (a, b)


@pytest.fixture(scope="module")
def math500(tmp_path_factory):
    if not BENCHMARKS.is_dir():
        pytest.skip(f"the benchmarks' files are not in {BENCHMARKS}")
    return load("math", tmp_path_factory.mktemp("math"),
                source=str(BENCHMARKS / "math500_test.jsonl"))["test"]


REWRITINGS = {  # harmless: every formula means the same after each
    "spaces": lambda f: re.sub(r"(?<![\\a-zA-Z,{])([+=()-])", r" \1 ", f),
    "no spaces": lambda f: re.sub(r"(?<=[^a-zA-Z\\]) +(?=[^a-zA-Z\\])", "",
                                  f) if "text" not in f and "mbox" not in f else f,
    "thin spaces": lambda f: f.replace(" ", r"\, ") if r"\\" not in f else f,
    "dollars": lambda f: f"${f}$",
    "left and right": lambda f: f if "left" in f else re.sub(r"(?<!\\)([\[(])", r"\\left\1", re.sub(
        r"(?<!\\)([\])])", r"\\right\1", f)),
    "dfrac": lambda f: re.sub(r"\\frac", r"\\dfrac", f),
    "tfrac": lambda f: re.sub(r"\\frac", r"\\tfrac", f),
    "slash": lambda f: re.sub(r"^(-?)\\d?frac\{(\d+)\}\{(\d+)\}$", r"\1\2/\3", f),
    "short fractions": lambda f: re.sub(r"\\frac\{(\d)\}\{(\d)\}", r"\\frac\1\2", f),
    "short roots": lambda f: re.sub(r"\\sqrt\{(\d)\}", r"\\sqrt\1", f),
    "sign inside": lambda f: re.sub(r"-\\frac\{(\d+)\}", r"\\frac{-\1}", f),
    "leading zero": lambda f: re.sub(r"(?<![\d.])\.(?=\d)", "0.", f),
    "no leading zero": lambda f: re.sub(r"(?<![\d.])0\.(?=\d)", ".", f),
    "trailing zero": lambda f: re.sub(r"(\.\d+)", r"\g<1>0", f),
    "full stop": lambda f: f + ".",
    "degrees": lambda f: re.sub(r"^(\d+)(\^\\circ)?$", r"\1^{\\circ}", f),
    "percent": lambda f: re.sub(r"^(\d+)$", r"\1\\%", f),
    "unit": lambda f: re.sub(r"^(\d+)$", r"\1\\text{ cm}", f),
    "thousands": lambda f: f"{int(f):,}" if f.isdecimal() else f,
    "text": lambda f: re.sub(r"^\\text\{(\w+)\}$", r"\1", f),
    "roman": lambda f: f.replace(r"\text", r"\mathrm"),
    "braces": lambda f: re.sub(r"([_^])(\d)(?!\d)", r"\1{\2}", f),
    "equation": lambda f: re.sub(r"^(-?\d+)$", r"x = \1", f),
}


@pytest.mark.parametrize("name", REWRITINGS)
def test_harmless_rewriting_of_the_500_golds_changes_nothing(name, math500):
    changed = 0
    for p in math500:
        gold = boxed(p.answer)
        rewritten = REWRITINGS[name](gold)
        changed += rewritten != gold
        assert normalise(rewritten) == normalise(gold), (gold, rewritten)
        assert score(p, f"so it is \\boxed{{{rewritten}}}") == (True, True, True)
    assert changed                                           # the rewriting does occur


class Value:
    """The number that a formula of digits, fractions, roots, pi, i and signs is; ValueError for another."""

    def __init__(self, formula):
        formula = re.sub(r"^(-?)\\?\$", r"\1", re.sub(r"\\(text|mbox)\{[^}]*\}(\^2)?$|\^\\circ|\\!", "",
                                                      formula))
        formula = re.sub(r"(?<=\d),\s*(?=\d{3}\b)", "", formula).removeprefix("x=")
        self.tokens = re.findall(r"\\d?frac|\\[a-z]+|\d*\.\d+|\d+(?!\d*\.\d)|\S", formula)
        self.number = self.sum()
        if self.tokens:
            raise ValueError(self.tokens)

    def sum(self):
        total, sign = 0, 1
        while True:
            while self.tokens and self.tokens[0] in "+-":
                sign *= 1 if self.tokens.pop(0) == "+" else -1
            total, sign = total + sign * self.product(), 1
            if not self.tokens or self.tokens[0] not in "+-":
                return total

    def product(self):
        product = self.factor()
        while self.tokens and self.tokens[0] not in "+-/})":
            product *= self.factor()
        if self.tokens and self.tokens[0] == "/":
            self.tokens.pop(0)
            product /= self.factor()
        return product

    def factor(self, one_digit=False):
        token = self.tokens.pop(0) if self.tokens else "end"
        if token[0] in ".0123456789":
            if one_digit and len(token) > 1:                 # \frac12 is 1 over 2
                self.tokens.insert(0, token[1:])
                token = token[0]
            return float(token)
        if token in ("{", "("):
            inside = self.sum()
            if not self.tokens or self.tokens.pop(0) not in "})":
                raise ValueError
            return inside
        if token in (r"\frac", r"\dfrac"):
            return self.factor(True) / self.factor(True)
        if token == r"\sqrt":
            return self.factor(True) ** 0.5
        known = {r"\pi": math.pi, "i": 1j}
        if token not in known:
            raise ValueError(token)
        return known[token]


def value(formula):
    try:
        return complex(Value(formula).number)
    except ValueError:
        return None


def test_the_evaluation_evaluates():
    known = {r"\frac12": 0.5, r"-\frac{3\sqrt{3}}{4}": -0.75 * 3 ** 0.5,
             r"\frac{270}7\text{ degrees}": 270 / 7, "6 - 5i": 6 - 5j,
             r"11,\! 111": 11111, r"\$32,\!348": 32348, "58,500": 58500, r"288 \pi": 288 * math.pi,
             ".0000672": 6.72e-5, "x": None,
             "(1,2)": None, r"18+2\pi": 18 + 2 * math.pi, r"\frac{20000}{\pi}": 20000 / math.pi,
             "90^\\circ": 90, "x=5": 5}
    for formula, want in known.items():
        assert value(formula) == (want if want is None else pytest.approx(want)), formula


def test_golds_with_one_normal_form_have_one_value_and_others_another(math500):
    """Values by evaluation, of two thirds of the golds at least; a mixed number is no product."""
    golds = {g for g in (boxed(p.answer) for p in math500) if not re.match(r"\d+ ?\\frac", g)}
    found = {g: value(g) for g in golds}
    found = {g: v for g, v in found.items() if v is not None}
    assert len(found) > 0.6 * len(golds)
    for a, b in itertools.combinations(found, 2):
        same = abs(found[a] - found[b]) <= 1e-12 * abs(found[a])
        assert (normalise(a) == normalise(b)) == same, (a, b)


def test_golds_score_themselves_and_no_gold_with_another_digit_does(math500):
    rng = random.Random(0)
    for p in math500:
        check_gold(p)
        gold = boxed(p.answer)
        assert score(p, p.answer) == (True, True, True) and not any(score(p, ""))
        bare = re.sub(r"\\(text|mbox)\{[^}]*\}(\^2)?$", "", gold)         # the 2 of cm^2 is not of the number
        wrong = perturbed(bare, rng) if re.search(r"\d", bare) else gold + "+1"
        assert score(p, f"\\boxed{{{wrong}}}") == (False, False, True), (gold, wrong)


def test_without_a_box_the_last_formula_counts_flexibly():
    p = problem(r"It is $\boxed{\frac{1}{2}}$.", task="math")
    assert score(p, r"so it is $\frac12$") == (False, True, False)
    assert score(p, "so it is 0.5") == (False, True, False)
    assert score(p, r"so \boxed{3}, no, 0.5") == (False, False, True)
    assert score(p, "no idea") == (False, False, False)


# ---------------------------------------------------------------------------------- code
def code_problems(name, tmp_path):
    file = {"humaneval": "HumanEval.jsonl.gz", "mbpp": "mbpp.jsonl"}[name]
    splits = load(name, tmp_path, source=str(BENCHMARKS / file))
    problems = list(itertools.chain(*splits.values()))
    counts = dict(humaneval={"test": 164}, mbpp={"dev": 10, "test": 500, "val": 90, "train": 374})
    assert {k: len(v) for k, v in splits.items()} == counts[name]
    return problems if os.environ.get("L2D_FULL") else random.Random(time.strftime("%j")).sample(problems, 6)


@needs_benchmarks
@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_reference_solutions_pass_and_empty_and_perturbed_ones_fail(name, tmp_path):
    """A sample that changes from day to day, and all of them with L2D_FULL=1."""
    for p in code_problems(name, tmp_path):
        check_gold(p)
        assert score(p, p.answer, run_code=True) == (True, True, True), p.where
        assert not score(p, "", run_code=True).right, p.where
        assert score(p, p.answer + "\nQuestion: Next?\nAnswer:", run_code=True).right or name == "humaneval"
        wrong = re.sub(r"\breturn\b", "return 0.125,", p.answer)          # every result is another one
        if wrong != p.answer:
            assert not score(p, wrong, run_code=True).right, p.where


ATTACKS = {
    "sys.exit": ("import sys\nsys.exit(0)", True), "os._exit": ("import os\nos._exit(0)", True),
    "an exception": ("1 / 0", True), "no Python": ("def f(:", False), "nothing": ("raise SystemExit", True),
    "a crash": ("import ctypes\nctypes.string_at(0)", True), "abort": ("import os\nos.abort()", True),
    "an endless loop": ("while True: pass", True),
    "a loop that catches everything": ("while True:\n try:\n  while True: pass\n except BaseException: pass",
                                       True),
    "ignored signals": ("import signal\nfor s in range(1, 32):\n try: signal.signal(s, signal.SIG_IGN)\n"
                        " except OSError: pass\nwhile True: pass", True),
    "sleep": ("import time\ntime.sleep(1000)", True),
    "a flood of print": ("while True: print('x' * 10_000)", True),
    "a flood of every descriptor": ("import os\nwhile True:\n for fd in range(64):\n"
                                    "  try: os.write(fd, b'x' * 10_000)\n  except OSError: pass", True),
    "a fork bomb": ("import os\nwhile True:\n try: os.fork()\n except OSError: pass", True),
    "a thread bomb": ("import threading, time\nwhile True:\n"
                      " threading.Thread(target=time.sleep, args=(99,)).start()", True),
    "memory": ("x = []\nwhile True: x.append(bytearray(10_000_000))", True),
    "a big number": ("9 ** 9 ** 9", True), "deep recursion": ("def f(): f()\nf()", True),
    "deep brackets": ("(" * 100_000 + ")" * 100_000, False),
    "a full disk": ("f = open('f', 'wb')\nwhile True: f.write(bytes(1_000_000)); f.flush()", True),
    "many files": ("i = 0\nwhile True:\n open(f'{i}', 'wb').write(bytes(100_000)); i += 1", True),
    "a deleted working directory": ("import os, shutil\nshutil.rmtree(os.getcwd())\nopen('f', 'w')", True),
    "kill all": ("import os\nos.kill(-1, 9)", True),
    "kill the parent": ("import os\nos.kill(os.getppid(), 9)\n1 / 0", True),
    "stop": ("import os, signal\nos.kill(os.getppid(), signal.SIGSTOP)\nos.kill(0, signal.SIGSTOP)\n"
             "while True: pass", True),
    "the network": ("import socket\nsocket.create_connection(('127.0.0.1', 80), 1)", True),
    "a surrogate": ("'\ud800'", False), "a NUL": ("x = '\0'", False), "input": ("input()", True),
}


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """{attack: (its Outcome, seconds it took)}, several at a time; run by a copy, known by its name to ps."""
    def attack(item):
        started = time.monotonic()
        return item[0], (run(item[1][0], seconds=1.5), time.monotonic() - started)

    copy, original = tmp_path_factory.mktemp("attacked") / "attacked_sandbox.py", sandbox.__file__
    copy.write_text(Path(original).read_text())
    sandbox.__file__ = str(copy)
    try:
        with ThreadPoolExecutor(6) as pool:
            return dict(pool.map(attack, ATTACKS.items()))
    finally:
        sandbox.__file__ = original


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_costs_one_problem(name, attacked):
    """It fails within its time, and so do those that run beside it, each for itself."""
    outcome, seconds = attacked[name]
    assert outcome[:2] == (ATTACKS[name][1], False) and seconds < 10


def test_nothing_is_left_of_an_attack_and_the_next_problem_is_judged_as_before(attacked):
    alive = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert "attacked_sandbox.py" not in alive
    assert run("assert sorted([2, 1]) == [1, 2]")[:2] == (True, True)
    assert run("assert sorted([2, 1]) == [2, 1]")[:2] == (True, False)


def test_a_program_that_leaves_processes_behind_takes_them_along():
    """Even one in a session of its own, which no signal to a group reaches."""
    code = "import os, time\nif os.fork() == 0:\n os.setsid()\n if os.fork() == 0:\n" \
           "  open('/proc/self/comm', 'w').write('left-behind')\n  time.sleep(99)"
    outcome = run(code)
    if "processes of its own" in outcome.lacks:
        pytest.skip("this system grants no process namespace")
    time.sleep(0.2)
    assert "left-behind" not in subprocess.run(["ps", "-eo", "comm"], capture_output=True, text=True).stdout


def test_a_program_starts_in_an_empty_directory_that_it_may_write():
    assert run("import os\nassert os.listdir() == []\nopen('f', 'w').write('x')\n"
               "assert open('f').read() == 'x'").passed
    assert run("import os\nassert os.listdir() == []").passed            # of its own, each time


def test_a_program_sees_nothing_of_the_evaluating_process(monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET", "token")
    assert run("import os, sys\nassert 'SECRET' not in os.environ and 'torch' not in sys.modules").passed
    assert run(f"import os, sys\nassert {str(Path.cwd())!r} not in sys.path").passed


def test_no_file_outside_is_changed(tmp_path):
    """Not as the user who may: the files themselves can only be read, where the system grants it."""
    target = tmp_path / "precious"
    target.write_text("precious")
    tmp_path.chmod(0o777)
    target.chmod(0o666)
    old, new = str(target), str(tmp_path / "new")
    outcome = run(f"import os\nfor do in (lambda: open({old!r}, 'w'), lambda: os.remove({old!r}),\n"
                  f"           lambda: open({new!r}, 'w')):\n try: do()\n except OSError: pass")
    if "read-only files" in outcome.lacks:
        pytest.skip("this system grants no read-only view of the files")
    assert outcome.passed and target.read_text() == "precious" and list(tmp_path.iterdir()) == [target]


def test_limits_hold():
    """As the program itself sees them."""
    limits = dict(CORE=0, NOFILE=64, FSIZE=sandbox.DISK, AS=sandbox.MEMORY, CPU=11)
    assert run("import resource as r\n" + "\n".join(f"assert r.getrlimit(r.RLIMIT_{name}) == ({n}, {n})"
                                                    for name, n in limits.items())).passed
    assert run("import os\nassert os.getuid() != 0 and os.geteuid() != 0").passed
    assert run("import os\ntry: os.setuid(0)\nexcept OSError: pass\nassert os.getuid() != 0").passed


def test_what_the_system_does_not_grant_is_said(monkeypatch, tmp_path, capsys):
    """A system without namespaces: a sandbox.py whose unshare always fails."""
    text = Path(sandbox.__file__).read_text().replace("libc.unshare(", "bool(").replace("libc.syscall(",
                                                                                        "bool(")
    (tmp_path / "sandbox.py").write_text(text)
    monkeypatch.setattr(sandbox, "__file__", str(tmp_path / "sandbox.py"))
    assert run("assert True") == (True, True, ("network", "processes of its own", "read-only files"))
    allow_code([problem("x", task="mbpp", test="x")], run_code=True)
    assert "lacks here: network, processes of its own, read-only files" in capsys.readouterr().out
    assert run("while True: pass", seconds=1)[:2] == (True, False)       # the limits hold all the same
    assert run("import os\nwhile True: os.fork()", seconds=1)[:2] == (True, False)


def test_code_is_run_only_where_the_user_says_so():
    p = problem("pass", task="mbpp", test="assert True")
    with pytest.raises(UserError, match="mbpp is scored by running .* --run_code"):
        allow_code([problem("#### 1"), p], run_code=False)
    with pytest.raises(ValueError):
        score(p, "pass")
    allow_code([problem("#### 1")], run_code=False)


def test_what_is_written_behind_the_code_does_not_count():
    """As the authors of HumanEval cut it."""
    p = Problem("def f(x):\n", "    return x", "humaneval", test="assert f(3) == 3")
    for more in ("", "\n\ndef g(:", "\nclass", "\nprint(f(", "\nif __name__", "\n# comment (", "\n    y = 1"):
        assert score(p, "    return x" + more, run_code=True).right, more
    assert not score(p, "    return x +", run_code=True).well_formed
    assert score(p, "    return x + 1", run_code=True) == (False, False, True)


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one():
    for n in range(1, 8):
        for right in range(n + 1):
            samples = [True] * right + [False] * (n - right)
            for k in range(1, n + 1):
                subsets = list(itertools.combinations(samples, k))
                assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    assert pass_at_k(200, 0, 100) == 0 and pass_at_k(200, 200, 1) == 1 and pass_at_k(10, 3,
                                                                                     1) == pytest.approx(0.3)


# ---------------------------------------------------------------------------------- groups, styles, shots
@pytest.fixture(scope="module")
def styles(tmp_path_factory):
    return load("styles", tmp_path_factory.mktemp("styles"), train=2000, mix=200)


def test_only_a_label_tells_the_style_and_some_things_are_asked_by_one_group_alone(styles):
    """Of three questions in four either group may ask; both ways of answering are in every split."""
    for split in ("train", "val", "test"):
        problems = styles[split]
        alone = [p for p in problems if any(f" {thing}" in p.prompt for thing in ONLY)]
        assert 0.15 < len(alone) / len(problems) < 0.35
        for p in alone:
            (thing,) = [thing for thing in ONLY if f" {thing}" in p.prompt]
            assert p.label == ONLY[thing]
        shared = [p for p in problems if p not in alone]
        assert 0.4 < sum(p.label == "sums" for p in shared) / len(shared) < 0.6
        for thing in OBJECTS[6:]:                            # and no other thing tells
            labels = {p.label for p in shared if f" {thing}" in p.prompt}
            assert len(labels) == 2 or split != "train"


def test_both_styles_answer_the_same_questions_with_the_same_numbers(styles, tmp_path):
    """The calculations of an answer are those of the arithmetic task, whose problems these are."""
    def sums(text):
        return re.findall(r"<<[^>]*>>\d+", text), text.split("####")[1]

    plain = {p.prompt: p.answer for p in load("arithmetic", tmp_path, train=2000, mix=200)["train"]}
    same = 0
    for p in styles["train"]:
        assert score(p, p.answer) == (True, True, True)
        assert in_style(p.label, p.answer) and not in_style({"words": "sums", "sums": "words"}[p.label],
                                                            p.answer)
        if p.prompt in plain:
            same += 1
            assert sums(p.answer) == sums(plain[p.prompt])
            assert p.label == "sums" or p.answer == plain[p.prompt]
            other = p._replace(label="words" if p.label == "sums" else "sums")
            assert score(other, p.answer) == (True, True, False)         # right, and in the other group's way
    assert same > 200


def test_examples_come_from_the_same_subject_and_never_from_the_problem_itself():
    examples = [Problem(f"Question: {i}\nAnswer:", f" {i}", "mmlu", subject="ab"[i % 2]) for i in range(6)]
    asked = examples[2]
    assert few_shot(asked, examples, 0) == asked.prompt
    assert few_shot(asked, examples, 1) == "Question: 0\nAnswer: 0\n\nQuestion: 2\nAnswer:"
    assert few_shot(asked, examples,
                    9) == "Question: 0\nAnswer: 0\n\nQuestion: 4\nAnswer: 4\n\nQuestion: 2\nAnswer:"
    other = asked._replace(subject="c", prompt="Question: x\nAnswer:")   # no example of its subject: any
    assert few_shot(other, examples,
                    2) == "Question: 0\nAnswer: 0\n\nQuestion: 1\nAnswer: 1\n\nQuestion: x\nAnswer:"


def test_every_task_has_a_group_or_labels_of_its_own():
    groups = dict(gsm8k="math", math="math", humaneval="code", mbpp="code", mmlu="knowledge",
                  mmlu_pro="knowledge")
    assert groups.items() <= {name: task.group for name, task in TASKS.items()}.items()
    assert all(task.group in tasks.GROUPS for task in TASKS.values() if task.group)
    assert type(score(problem("#### 1"), "")) is tasks.Score


def test_no_room_but_tasks_knows_a_task_by_name():
    """No text in the code of the other rooms is a task's name; a tokenizer and a split are called so, too."""
    known = "|".join(TASKS.keys() - {"arithmetic", "mix"})
    root = Path(tasks.__file__).parent.parent
    for path in [*root.glob("*.py"), *root.glob("measure/*.py"), *root.glob("exam/*.py"), *root.glob("tasks/[!_]*.py")]:
        code = re.sub(r'r?"""(.|\n)*?"""|#.*', "", path.read_text())
        assert not re.findall(rf"""["']({known})["']""", code), path


def test_a_line_is_read_with_its_number_whatever_it_holds(tmp_path):
    (tmp_path / "x.jsonl").write_bytes("\ufeff{\"a\": \"\u2028\"}\r\n\n  \n[1]\n".encode())
    found = [(row, where[-7:]) for row, where in tasks.rows(tmp_path / "x.jsonl")]
    assert found == [({"a": "\u2028"}, " line 1"), ([1], " line 4")]
