r"""
What an answer is: read from a text, strictly (as a benchmark's authors read it) and flexibly.

A reader takes (problem, text) and returns the two answers, hashable and comparable with ==, None where there
is none. The same reader reads a model's output and the true answer.
"""
import re
import unicodedata
from collections import Counter
from fractions import Fraction


def number(text):
    """The number that text spells, such as -1,234.50, or None."""
    try:
        return Fraction(text.replace(",", "").replace("\u2212", "-").rstrip("."))
    except (ValueError, ZeroDivisionError):
        return None


def strict_answer(text):
    """The number after the first "#### ", as the GSM8K authors read it."""
    match = re.search(r"#### (\-?[0-9\.\,]+)", text)
    return number(match[1]) if match else None


def flexible_answer(text):
    """The number after the first ####, allowing $, spaces, U+2212, a fraction; else the last number."""
    pattern = r"[-\u2212]?(?:\d[\d,]*(?:\.\d+)?|(?<![\w.])\.\d+)(?:/\d+)?"
    after = re.search(r"####[\s$]*([-\u2212]?)[\s$]*(" + pattern + ")", text)
    if after:
        return number(after[1] + after[2])
    numbers = re.findall(pattern, text)
    return number(numbers[-1]) if numbers else None


def read_number(problem, text):
    strict, flexible = strict_answer(text), flexible_answer(text)
    return strict, strict if flexible is None else flexible


def read_text(problem, text):
    """The number after #### where the true answer has one, else the whole text but for case and spacing."""
    if "####" in problem.answer:
        return read_number(problem, text)
    words = " ".join(unicodedata.normalize("NFC", text).casefold().split()).strip(" ,;:\"'")
    words = re.sub(r"(?<=[^\W\d])[!?.,;:\"' ]+$", "", words).rstrip(" .")     # 5! is not 5, nor is .5
    return (words if re.search(r"\w", words) else None,) * 2


def read_letter(problem, text):
    """The letter with which the text begins; flexibly, the first that stands alone."""
    letters = "[" + "".join(choice.strip() for choice in problem.choices) + "]"
    strict = re.match(rf"\s*({letters})(?![\w'])", text)
    flexible = strict or re.search(rf"answer is:?\s*\(?({letters})\b", text) or \
        re.search(rf"(?<![\w'])({letters})(?![\w'])", text)
    return strict and strict[1], flexible and flexible[1]


def read_boxed(problem, text):
    r"""The formula in the last \boxed{}; else, flexibly, the last between dollars or the last number."""
    box = boxed(text)
    loose = re.findall(r"\$([^$]+)\$|(-?\d[\d,]*(?:\.\d+)?)", text) if box is None else None
    strict = normalise(box) if box is not None else None
    return strict or None, strict or (normalise("".join(loose[-1])) if loose else None) or None


def boxed(text):
    r"""What stands in the last \boxed{...} of a text, its braces counted; None without one that is closed."""
    start = max(text.rfind(r"\boxed{"), text.rfind(r"\fbox{"))
    if start < 0:
        return None
    start, depth = text.index("{", start) + 1, 1
    for i in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start:i]
    return None


UNITS = r"(square |cubic )?(units?|degrees?|percent|cents?|dollars?|inch(es)?|feet|foot|miles?|[ckm]m|" \
        r"((centi|kilo|milli)?met(er|re)|second|minute|hour|day|year)s?)"
SPELLINGS = [                        # (pattern, replacement), applied one after the other
    (r"(?<!\\)\\[!,;: ]|~|\\(left|right|displaystyle)(?![a-zA-Z])|\\?[$%]|\^\s*\{?\s*\\circ\s*\}?|°", " "),
    (r"\{,\}", ","), (r"\\[dtc]frac", r"\\frac"), (r"\\(mbox|text[a-z]*|math(rm|bf))\s*\{", r"\\text{"),
    (r"(?<=[^\s]) *\\text\{[^{}]*\}(\^\{?\d\}?)?[ .]*$", ""),           # a unit, such as \text{ cm}^2
    (rf"(?<=\d) *({UNITS})[ .]*$", ""),                                  # a unit without \text
    (r"\\text\{([^{}]*)\}", r"\1"), (r"(?<=,) +(?=\d{3})", ""), (r"\s+", ""), (r"\.$", ""),
    (r"^[a-zA-Z](=|\\in(?![a-z]))", ""), (r"^\(([A-Z])\)$", r"\1"),     # x=5; the letter of a choice
    (r"\\(frac|sqrt)(\w)", r"\\\1{\2}"), (r"(\\frac\{(?:[^{}]|\{[^{}]*\})*\})(\w)", r"\1{\2}"),
    (r"(\d+)/(\d+)", r"\\frac{\1}{\2}"), (r"\\frac\{-(\w+)\}", r"-\\frac{\1}"), (r"([_^])\{(\w)\}", r"\1\2"),
    (r"^(-?\d{1,3}(?:,\d{3})+(?:\.\d+)?)$", lambda m: m[1].replace(",", "")),
    (r"(?<![\d.])\.(?=\d)", "0."), (r"(?<![\d.])0+(?=\d)", ""),       # 007, .5
    (r"(\.\d*?)0+(?!\d)", r"\1"), (r"\.(?!\d)", ""),                  # 18.90, 3.00
    (r"^(-?)(\d+\.\d+)$", lambda m: m[1] + "\\frac{%d}{%d}" % Fraction(m[2]).as_integer_ratio()),
]


def normalise(formula):
    r"""One spelling of a formula for its many: 1/2, .5, 0.50, \frac12, \frac{1}{2}\text{ cm}, ..."""
    for pattern, replacement in SPELLINGS:
        formula = re.sub(pattern, replacement, formula)
    return formula


def read_code(program):
    """A reader of code: what is compared is whether program(problem, text) passes the problem's test."""
    return lambda problem, text: (program(problem, text) + "\n" + problem.test,) * 2


def cut(text, stops):
    """The text up to the first of the stops: what a model writes behind its answer does not count."""
    return text[:min((i for i in map(text.find, stops) if i >= 0), default=len(text))]


def majority(answers):
    """The most frequent of the answers that are not None, the first of several; None if there is none."""
    counts = Counter(answer for answer in answers if answer is not None)
    return max(counts, key=counts.get, default=None)         # a Counter keeps the order of arrival
