r"""
What an answer is: read from a text strictly, as a benchmark's authors read it, and flexibly.

A reader takes (problem, text) and returns both answers, hashable and comparable with ==, each None where
there is none. The same reader reads a model's output and the true answer, in a time linear in the text's
length.
"""
import re
import unicodedata
from collections import Counter
from fractions import Fraction

from tasks.formulas import boxed, normalise


def number(text):
    """The number that a text spells, such as -1,234.50. None if there is none, or thousands of digits."""
    try:
        return Fraction(text.replace(",", "").replace("\u2212", "-").rstrip("."))
    except (ValueError, ZeroDivisionError):
        return None


def strict_answer(text):
    """The number after the first "#### ", as the GSM8K authors read it."""
    match = re.search(r"#### (\-?[0-9\.\,]+)", text)
    return number(match[1]) if match else None


def flexible_answer(text):
    """The number after the first ####, even with $, blanks, U+2212 or a fraction; else the last number."""
    pattern = r"[-\u2212]?(?:\d[\d,]*(?:\.\d+)?|(?<![\w.])\.\d+)(?:/\d+)?"
    after = re.search(r"####[\s$]*+((?:[-\u2212][\s$]*+)?)(" + pattern + ")", text)
    if after:
        return number(after[1][:1] + after[2])
    numbers = re.findall(pattern, text)
    return number(numbers[-1]) if numbers else None


def read_number(problem, text):
    strict = strict_answer(text)
    flexible = flexible_answer(text)
    return strict, strict if flexible is None else flexible


def read_text(problem, text):
    """The number after #### where the true answer has one, else the whole text but for case and spacing."""
    if "####" in problem.answer:
        return read_number(problem, text)
    words = " ".join(unicodedata.normalize("NFC", text).casefold().split()).strip(" ,;:\"'")
    words = re.sub(r"(?<=[^\W\d])[!?.,;:\"' ]+$", "", words).rstrip(" .")     # but 5! is not 5, nor is .5
    answer = words if re.search(r"\w", words) else None
    return answer, answer


# A letter that is an answer ends there. A and I are words, too: "A body at rest", "I think", "I, for one".
STANDS = r"(?<![\w'\u2019/-])"
ENDS = r"(?![\w'\u2019/-]|\.\w)(?!(?<=[AI])[^\S\n]+\w)(?!(?<=I),)"
OR_ENDS = ENDS.replace(r"\w)(?!(?<=I)", r"(?!or\b|and\b)\w)(?!(?<=I)")         # also the A of "A or B"
SAYS = r"(?:[Aa]nswer|ANSWER|[Oo]ption|[Cc]hoice)"


def read_letter(problem, text):
    """
    The letter of a choice: strictly, the one with which the text begins.

    Flexibly, what comes first of these: the strict one; the letter with which the text begins, in brackets or
    bold; the last letter behind "answer is", "answer:" or the like; the letter that stands alone, if there is
    only one.
    """
    letter = "([" + "".join(choice.strip() for choice in problem.choices) + "])"
    strict = re.match(rf"\s*+{letter}{ENDS}", text)
    if strict:
        return strict[1], strict[1]
    marked = re.match(rf"\s*+[(*\[_]++{letter}[)*\]_]", text)
    announced = re.findall(rf"\b{SAYS}(?: is|:|\*)*+\s*+(?:{SAYS}\s*+)?[(*\[_]*+{letter}{ENDS}", text)
    alone = set(re.findall(STANDS + letter + OR_ENDS, text))
    found = marked[1] if marked else announced[-1] if announced else alone.pop() if len(alone) == 1 else None
    return None, found


def read_boxed(problem, text):
    r"""The formula in the last \boxed; without one, flexibly, the last between dollars or the last number."""
    box = boxed(text)
    if box is not None:
        answer = normalise(box) or None
        return answer, answer
    loose = re.findall(r"\$([^$]+)\$|(-?\d[\d,]*(?:\.\d+)?)", text)
    return None, loose and normalise("".join(loose[-1])) or None


def read_code(program):
    """Make a reader of code. It compares whether program(problem, text) passes the problem's test."""
    def read(problem, text):
        code = f"{program(problem, text)}\n{problem.test}"
        return code, code
    return read


def cut(text, stops):
    """The text up to the first of the stops: what a model writes behind its answer does not count."""
    return text[:min((i for i in map(text.find, stops) if i >= 0), default=len(text))]


def majority(answers):
    """The most frequent of the answers that are not None, the first of several; None if there is none."""
    counts = Counter(answer for answer in answers if answer is not None)
    return max(counts, key=counts.get, default=None)         # a Counter keeps the order of arrival
