r"""
tasks/formulas.py: one spelling for the many of a formula, and no two formulas that differ with one spelling.

Truths: the authors' examples, values computed from formulas, and changes of which one knows what they change.
"""
import itertools
import math
import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scoring import perturbed, problem

from tasks import TASKS, check_gold, score
from tasks.formulas import boxed, normalise

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "shared" / "benchmarks"


# ---------------------------------------------------------------------------------- formulas
@pytest.mark.parametrize("text, inside", [
    (r"so \boxed{5}.", "5"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{1} no, \boxed{2}", "2"),
    (r"\boxed{\{1,\{2\}\}}", r"\{1,\{2\}\}"), (r"\boxed{", None), (r"\boxed{\frac{1}{2}", None), ("5", None),
    ("", None),
    (r"\fbox{3}", "3"), (r"\boxed{}", ""), (r"\boxed{a}\boxed{b", None), (r"\boxed {2}", "2"), (r"\boxed{]0,\}}", r"]0,\}"),
    (r"\boxed{\boxed{2}}", "2"), (r"\boxed", None), (r"\boxed ", None), (r"\boxedup 3", None),
    # without braces: up to the dollar in a formula, elsewhere a number, a command or a sign
    (r"$\boxed 2$", "2"), (r"$\boxed2$.", "2"), (r"\boxed 2", "2"), (r"\boxed 25 apples.", "25"), (r"so $x = \boxed 2\pi$", r"2\pi"),
    (r"$\boxed\frac{9}{256}$", r"\frac{9}{256}"), (r"it is \boxed\frac12 here", r"\frac12"), (r"\boxed -3.5.", "-3.5"),
    (r"\boxed 1,234.", "1,234"), (r"costs \$4, $\boxed 3$", "3"), (r"$x$ is \boxed x since $x$", "x"), (r"\boxed{1} \fbox 2", "2"),
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
    # numbers
    ("7", "007", "7.0", "7.", "x=007", "7.00"), ("0", "00", "0.0", "0."), ("-0.5", "-.5", "-.50", r"-\frac12", "\u2212.5"),
    (r"0.\overline{3}", r".\overline{3}", r"0.\overline{3}."), ("0." + "3" * 5000, "." + "3" * 5000, "0." + "3" * 5000 + "0"),
    # units: beside a number, wherever it stands
    ("5", r"5\text{ cm}", r"5\,\text{cm}", r"5~\mathrm{ cm}", "5 cm", "5cm.", r"5\text{ cm.}", r"5\text{ m}", r"5\text{ cm}^2",
     r"5\text{ cm}^{3}", r"5\text{ square feet}", r"5\text{ miles per hour}", r"5\text{ km/h}", r"5\text{ m/s}", r"\$5", r"\$ 5.00", r"5\$",
     r"5\%", "5%", r"5^\circ", r"5^{\circ}", r"5\degree", "5°", r"x=5\text{ cm}", r"x = 5^\circ", r"5\text{ students}", "$5$"),
    ("-5", r"-\$5", r"\$-5", r"-5\text{ cm}", r"-5^\circ"), (r"30,60", r"30^\circ, 60^\circ", r"30\text{ cm}, 60\text{ cm}", r"30\%,60\%",
     r"\$30, \$60"), (r"\{30,60\}", r"\{30^\circ, 60^\circ\}", r"\left\{30\text{ cm},60\text{ cm}\right\}"),
    (r"[0,90]", r"[0^\circ,90^\circ]", r"\left[0, 90\right]"), (r"12\pi", r"12\pi\text{ cm}^3", r"12 \pi \mbox{ square inches}"),
    (r"10\sqrt{2}", r"10\sqrt2\text{ feet}"), (r"(6+\sqrt{3})", r"(6+\sqrt3)\text{ cm}"), ("1234.5", r"\$1,234.50", r"1{,}234.5\text{ cm}"),
    ("x=5,y=6", "x = 5, y = 6"), (r"\text{red},\text{blue}", r"\text{red}, \text{blue}", "red, blue"), (r"(0.5,1)", r"(\frac12,1)", "(1/2, 1.0)"),
    (r"2^{1/2}", r"2^{\frac12}", "2^{0.5}"), (r"\frac{\pi}{2}", r"\frac\pi2", r"\frac{\pi}2", r"\dfrac\pi 2"), (r"x\le 5", r"x\leq5"),
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
    # words are no units, and a unit follows a number
    r"\text{red}, \text{blue}", r"\text{red}, \text{green}", r"n\text{ even}", r"n\text{ odd}", r"x\text{-axis}",
    r"x\text{-intercept}", "n", r"5\text{ or fewer}", r"5\text{ million}", r"5\text{ dozen}", r"5\text{ tens}", r"x\text{ cm}",
    r"5\text{ even}", r"5\text{ odd}", r"\text{even}", r"\text{odd}", r"\text{cm}", r"\text{inch}", r"5\text{ p.m.}", r"5\text{ a.m.}",
    r"\sin 30^\circ", r"\sin 30", r"2\text{ red}", r"2\text{ blue}", r"\text{A and B}", r"\text{A or B}", r"10\text{A}", r"10\text{B}",
    # digits of a period, of a base, of an index, of a time; decimals that go on
    r"0.\overline{09}", r"0.\overline{9}", r"0.\overline{90}", r"0.0\overline{9}", r"0.\overline{009}", "0.333...", "0.333", "x_{01}",
    "x_1", "10_{02}", r"0.\dot{3}", r"0.\dot{03}", "12:05", "12:5", r"1.\overline{0}", "0.09", "0.9",
    # sets, intervals, tuples, lists, equations
    r"\{1,2,3\}", "(1,2,3)", "[1,2,3]", "1,2,3", "(0,1)", "[0,1]", "(0,1]", "[0,1)", "(1,234)", r"\{100,200\}", "100, 200",
    "100200", "(100,200)", "x=5,y=6", "x=6,y=5", "a=5,y=6", "x=y=5", "x<5", "x>5", r"x\le5", "x=-5", "f(x)=5",
    # arguments of commands end where TeX ends them, and a slash is a fraction only if it stands alone
    r"\sqrt{12}x", r"\frac{1}{2}x", r"\frac{1}{2x}", "2^{1/2}", "2^1/2", r"\frac{1}{2^2}", "3/2^2", r"\frac{3}{2}^2", r"\sqrt{1/2}",
    r"\sqrt1/2", r"x\int t", r"x\in t", "1 2", r"5-\frac{1}{3}", r"5\frac{-1}{3}", r"2\frac12", r"2\cdot\frac12", "1.2.3",
]


@pytest.mark.parametrize("spellings", SAME, ids=lambda spellings: spellings[0])
def test_spellings_of_one_formula_are_one(spellings):
    assert len({normalise(text) for text in spellings}) == 1, [normalise(text) for text in spellings]


def test_formulas_that_differ_stay_apart():
    for a, b in itertools.combinations([*DIFFERENT], 2):
        assert normalise(a) != normalise(b), (a, b)


@pytest.fixture(scope="module")
def math500():
    if not BENCHMARKS.is_dir():
        pytest.skip(f"the benchmarks' files are not in {BENCHMARKS}")
    return TASKS["math"].load(TASKS["math"].options(source=str(BENCHMARKS / "math500_test.jsonl")), None)[0]["test"]


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




# ---------------------------------------------------------------------------------- what may not become equal
def near_misses(gold, rng):
    """Other answers, each one change away: a sign, a digit, a bracket, a word, an order, a variable."""
    number = re.compile(r"\d+")
    changes = [
        lambda f: number.sub(lambda m: str(int(m[0]) + 1), f, count=1), lambda f: number.sub(lambda m: m[0] + "0", f, count=1),
        lambda f: number.sub(lambda m: m[0][::-1], f, count=1), lambda f: f"-{f}", lambda f: f"{f}+1", lambda f: f"{f}, 0",
        lambda f: f.replace("(", "[", 1), lambda f: f.replace(")", "]", 1), lambda f: f.replace("+", "-", 1), lambda f: f.replace("x", "z"),
        lambda f: f.replace(r"\sqrt", r"\pi", 1), lambda f: f.replace(r"\pi", ""), lambda f: f.replace("^2", ""), lambda f: f"{f}^2",
        lambda f: rf"\sqrt{{{f}}}", lambda f: f"x^{{{f}}}", lambda f: rf"{f}\text{{ or more}}", lambda f: rf"{f}\text{{ million}}",
        lambda f: rf"\frac{{1}}{{{f}}}", lambda f: rf"\overline{{{f}}}", lambda f: rf"n\text{{ {f}}}", lambda f: f"0.{f}", lambda f: f"({f})",
        lambda f: ",".join(reversed(f.split(","))), lambda f: rf"\{{{f}\}}"]
    return rng.choice(changes)(gold)


def test_no_gold_equals_another_or_a_near_miss(math500):
    """All pairs of the 500 golds, and 200 near misses against each of them. The truth of two golds is their text."""
    rng = random.Random(0)
    golds = {gold: normalise(gold) for gold in sorted({boxed(p.answer) for p in math500})}
    by_form = {}
    for gold, form in golds.items():
        by_form.setdefault(form, []).append(gold)
    same = sorted(tuple(group) for group in by_form.values() if len(group) > 1)
    for group in same:                       # spelt in two ways: the same for whoever leaves out signs that say nothing
        plain = {re.sub(r"\\text\{ .*?\}|\^\\circ|\\[!$]|\\d?|x=|\\mbox\{.*?\}\^2|[{}, ]|\.$", "", gold) for gold in group}
        assert len({value(gold) for gold in group}) == 1 and value(group[0]) is not None or len(plain) == 1, group
    wrong = []
    while len(wrong) < 200:
        gold = rng.choice(list(golds))
        miss = near_misses(gold, rng)
        a, b = value(gold), value(miss)
        if miss != gold and (a is None or b is None or abs(a - b) > 1e-9):
            wrong.append((gold, miss))
    for gold, miss in wrong:
        assert normalise(miss) != golds[gold], (gold, miss)
        for other in by_form.get(normalise(miss), ()):                   # it may happen to be another gold
            assert value(other) == value(miss) is not None or other.replace(" ", "") == miss.replace(" ", ""), (other, miss)


PIECES = ["0", "2", "12", "0.5", "07", "1,234", "-", "/", "^", "_", "=", ",", "(", ")", "[", r"\{", r"\frac", r"\sqrt", "{", "}", r"\pi",
          "x", "n", r"\overline{09}", r"\text{ even}", r"\text{ cm}", r"\$", r"^\circ", r"\in ", ".", r"\text{red}", "cm", ":", " "]
UNIT = r"(cm|\\\$|\^\\circ)"
MAY_GO = [                                                           # what two formulas may differ by, and be equal
    (" ", ""), (r"\\text\{(red|even|cm)\}", r"\1"), (r"(?<!\.)\.$", ""),                     # a full stop
    (rf"(?<=[\d}}).]){UNIT}|(?<=\\pi){UNIT}|\\\$(?=-?[\d.]\d?)", ""),                        # a unit beside a number
    (r"^[xn](=|\\in)(?!.*=)", ""),                                                           # the name in x = 5
    (r"(?<![\d.])(?<!line\{)(?<!frac)0+(?=\d)", ""), (r"(?<!\d)(?=\.(\d|\\over))", "0"), (r"(\.\d*?)0+(?!\d)", r"\1"),
    (r"(?<=\d)\.(?=[=,)}\]]|$)", ""), (r"0\.5", r"\\frac12"), (r"(\d+)/(\d)", r"\\frac\1\2")]


def test_no_rule_makes_different_answers_equal():
    """All formulas of up to three pieces: those with one normal form differ by what may go, and by nothing else."""
    forms = {}
    for formula in map("".join, itertools.chain(*(itertools.product(PIECES, repeat=n) for n in (1, 2, 3)))):
        if not re.search(r"\d\.?0* +0*\.?\d", formula):                  # a blank between two numbers counts
            forms.setdefault(normalise(formula), set()).add(formula)
    assert len(forms) > 30_000
    for form, formulas in forms.items():
        plain = set()
        for formula in formulas:
            for pattern, replacement in MAY_GO:
                formula = re.sub(pattern, replacement, formula)
            plain.add(formula)
        assert len(plain) == 1, (form, plain, formulas)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=6), st.data())
def test_a_change_of_a_piece_that_means_something_is_seen(pieces, data):
    """Change one piece for another of the same kind: the normal form changes, too."""
    kinds = [("2", "12"), ("2", "3"), ("(", "["), (")", "]"), ("x", "n"), ("x", "y"), (r"\text{red}", r"\text{blue}"),
             (r"\text{ even}", r"\text{ odd}"), (r"\overline{09}", r"\overline{9}"), (r"\overline{09}", r"\overline{90}"),
             ("+", "-"), (r"\pi", r"\sqrt"), (r"\cup", r"\cap"), (r"\{", "("), (r"\}", ")"), ("0.5", "0.05"), ("007", "070")]
    old, new = data.draw(st.sampled_from(kinds))
    i = data.draw(st.integers(0, len(pieces)))
    a, b = ("".join([*pieces[:i], piece, *pieces[i:]]) for piece in (old, new))
    names = {old, new} == {"x", "n"} or {old, new} == {"x", "y"}
    if not names or "=" not in a + b and r"\in" not in a + b:               # the name in x = 5 is not compared
        assert normalise(a) != normalise(b), (a, b)


@settings(max_examples=500, deadline=None)
@given(st.text(max_size=30) | st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_a_normal_form_exists_for_every_text(text):
    """And blanks, dollars and \\left around it change nothing."""
    assert isinstance(normalise(text), str)
    boxed(rf"\boxed{text}")
    if not text.endswith("\\"):
        assert normalise(f"  ${text}$ ") == normalise(text)
