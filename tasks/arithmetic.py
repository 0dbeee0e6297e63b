"""
The embedded task: a generator of arithmetic word problems in GSM8K's format. It needs no network.

make_problem makes the problems that L2D is trained and tested on. make_mixed_problem makes a broader
mixture, half of it word problems, on which the tiny trunk is pre-trained. Both take a random.Random and
return (question, answer). choose_split says to which split a question belongs. apply_style writes an answer
in the way of one of two groups.

A story has a running quantity v, which starts as a number a. Each scene is a sentence of the question, with
any number of steps (operation, sentence of the answer). In an operation, b is a new number that the sentence
tells, and u is the quantity before the last step. {e} in a sentence stands for the operation, such as "3*12
= <<3*12=36>>36".
"""
import hashlib
import random
import re
from dataclasses import dataclass
from functools import cache

import tiktoken

from configurator import require
from plumbing.tokenizer import ENDOFTEXT
from tasks import sources
from tasks.benchmarks import group_by_steps, make_worked_problem
from tasks.problem import PROMPT

MAX_NUMBER = 99                     # of all numbers, intermediate results included; each is one token

WOMEN = "Emma Mia Anna Lily Zoe Ruth Eva Nina Ivy Rosa Jane Lucy".split()
MEN = "Tom Noah Ben Sam Max Leo Paul Jack Omar Luis Hugo Finn".split()
PEOPLE = [(name, "she", "her") for name in WOMEN] + [(name, "he", "him") for name in MEN]
OBJECTS = ("apples pears books coins cards stamps pencils shells marbles stickers cookies buttons beads "
           "candles cups eggs flowers roses lemons nuts pens plates rings stones toys tickets").split()
CONTAINERS = "boxes bags baskets packs jars crates bowls trays".split()

STARTS = [
    ("{n} has {a} {o}.", []),
    ("{n} finds {a} {o} at home.", []),
    ("{n} starts the day with {a} {o}.", []),
    ("There are {a} {o} in the shop of {n}.", []),
    ("{n} has {a} red {o} and {b} blue {o}.", [("v+b", "{n} has {e} {o}.")]),
    ("{n} collects {a} {o} in May and {b} in June.", [("v+b", "{n} collects {e} {o}.")]),
    ("{n} makes {a} {o} and {m} makes {b} for {her}.", [("v+b", "They make {e} {o}.")]),
    ("{n} buys {b} {c} of {a} {o} each.", [("v*b", "{n} buys {e} {o}.")]),
    ("{n} fills {b} {c} with {a} {o} each.", [("v*b", "The {c} hold {e} {o}.")]),
    ("{n} makes {a} {o} a day for {b} days.", [("v*b", "{n} makes {e} {o}.")]),
    ("{n} has {a} {o} but {b} of them are broken.", [("v-b", "{e} {o} are good.")]),
    ("{n} and {b} friends find {a} {o} each.",
     [("b+1", "They are {e} people."), ("a*v", "They find {e} {o}.")]),
]
EVENTS = [
    ("Then {she} buys {b} more.", [("v+b", "Now {n} has {e} {o}.")]),
    ("{m} gives {her} {b} {o}.", [("v+b", "With the gift {she} has {e}.")]),
    ("{She} finds {b} more {o}.", [("v+b", "{She} has {e} {o}.")]),
    ("{She} gives {b} of them to {m}.", [("v-b", "{She} keeps {e} {o}.")]),
    ("Later {she} loses {b} {o}.", [("v-b", "Then {she} has {e} {o}.")]),
    ("{She} sells {b} of the {o}.", [("v-b", "After the sale {she} has {e}.")]),
    ("{She} throws {b} {o} away.", [("v-b", "That leaves {e} {o}.")]),
    ("{She} gives half of them to {m}.", [("v/2", "Half of them is {e} {o}.")]),
    ("After a week {she} has twice as many.", [("v*2", "Twice as many is {e}.")]),
    ("After a year {she} has {b} times as many.", [("v*b", "After a year {she} has {e}.")]),
]
ENDINGS = [
    ("How many {o} does {n} have now?", []),
    ("How many {o} are there in the end?", []),
    ("{She} shares them equally among {b} friends. How many {o} does each get?",
     [("v/b", "Each friend gets {e} {o}.")]),
    ("{She} packs them in {d} of {b}. How many {d} does {she} fill?", [("v/b", "{She} fills {e} {d}.")]),
    ("{She} sells them for {b} dollars each. How many dollars does {she} get?",
     [("v*b", "{She} gets {e} dollars.")]),
    ("Each of them weighs {b} grams. How many grams do they weigh?", [("v*b", "They weigh {e} grams.")]),
    ("{She} wants {b} {o}. How many more does {she} need?", [("b-v", "{She} needs {e} more.")]),
    ("{k} has {b} {o}. How many do they have together?", [("v+b", "Together they have {e} {o}.")]),
    ("{k} has {b} more {o} than {n}. How many does {k} have?", [("v+b", "{k} has {e} {o}.")]),
    ("{k} has {b} fewer {o} than {n}. How many does {k} have?", [("v-b", "{k} has {e} {o}.")]),
    ("{k} has {b} times as many. How many {o} does {k} have?", [("v*b", "{k} has {e} {o}.")]),
    ("{k} has {b} times as many. How many do they have together?",
     [("v*b", "{k} has {e} {o}."), ("v+u", "Together they have {e}.")]),
    ("{k} has {b} fewer {o}. How many do they have together?",
     [("v-b", "{k} has {e} {o}."), ("v+u", "Together they have {e}.")]),
]
COMPUTE = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b,
           "/": lambda a, b: a // b if a % b == 0 else -1}     # -1: no such problem


class Misfit(Exception):
    """The numbers drawn lead to a fraction or out of range: draw again."""


def draw_number(rng, low, high):
    """An integer in low..high. Its logarithm is uniform, so small numbers are as frequent as large ones."""
    if low > high:
        raise Misfit
    return int(low * ((high + 1) / low) ** rng.random())


def annotate(left, op, right):
    """GSM8K's way to write an operation, "3*12 = <<3*12=36>>36", and its result."""
    result = COMPUTE[op](left, right)
    if not 1 <= result <= MAX_NUMBER:
        raise Misfit
    return f"{left}{op}{right} = <<{left}{op}{right}={result}>>{result}", result


def draw_operand(rng, operation, v):
    """A number b for "v+b", "b-v", ... that is neither trivial nor out of range."""
    op = operation[1]
    if op == "+":
        return rng.randint(2, 9) if operation == "b+1" else draw_number(rng, 3, MAX_NUMBER - v)
    if op == "-":
        return draw_number(rng, v + 3, MAX_NUMBER) if operation == "b-v" else draw_number(rng, 3, v - 3)
    if op == "*":
        return rng.randint(2, max(2, min(12, MAX_NUMBER // v)))
    divisors = [b for b in range(3, 13) if v % b == 0 and v > 2 * b]
    if not divisors:
        rng.choice([0])             # draws in any case; else every problem after this one would differ
        raise Misfit
    return rng.choice(divisors)


def tell_story(rng, n_steps):
    """A word problem with n_steps operations."""
    while True:
        try:
            return try_story(rng, n_steps)
        except Misfit:
            pass


def try_story(rng, n_steps):
    start = rng.choice(STARTS)
    ending = rng.choice(ENDINGS)
    n_events = n_steps - len(start[1]) - len(ending[1])
    if n_events < 0:
        raise Misfit
    (n, she, her), (m, *_), (k, *_) = rng.sample(PEOPLE, 3)
    c, d = rng.sample(CONTAINERS, 2)
    words = dict(n=n, m=m, k=k, she=she, She=she.title(), her=her, o=rng.choice(OBJECTS), c=c, d=d)
    a = u = v = draw_number(rng, 4, 60)
    question = []
    answer = []
    for sentence, steps in [start, *rng.sample(EVENTS, n_events), ending]:
        b = draw_operand(rng, steps[0][0], v) if "{b}" in sentence else None
        for operation, line in steps:
            values = dict(a=a, b=b, u=u, v=v)
            left, op, right = operation
            e, result = annotate(values.get(left), op, int(right) if right.isdigit() else values[right])
            u = v
            v = result
            answer.append(line.format(e=e, **words))
        question.append(sentence.format(a=a, b=b, **words))
    return " ".join(question), "\n".join([*answer, f"#### {v}"])


def make_drill(rng):
    """A small exercise of another kind, for the trunk's pre-training only."""
    numbers = [draw_number(rng, 1, MAX_NUMBER) for _ in range(rng.randint(3, 5))]
    a, b = numbers[:2]
    shown = ", ".join(map(str, numbers))
    kind = rng.randrange(8)
    if kind <= 1:                                              # twice as often as the others
        operation = rng.choice(["v+b", "v-b", "v*b", "v/b"])
        v = draw_number(rng, 4, 89)
        op = operation[1]
        b = draw_operand(rng, operation, v)
        e, result = annotate(v, op, b)
        question = f"What is {v} {op} {b}?"
        line = f"{e}."
    elif kind == 2:
        which, result = rng.choice([("larger", max(a, b)), ("smaller", min(a, b))])
        question = f"Which is {which}, {a} or {b}?"
        line = f"The {which} is {result}."
    elif kind == 3:
        which, result = rng.choice([("first", a), ("second", b), ("last", numbers[-1])])
        question = f"What is the {which} number of {shown}?"
        line = f"The {which} is {result}."
    elif kind == 4:
        numbers = [rng.choice([a, b, numbers[2]]) for _ in range(rng.randint(4, 7))]
        result = numbers.count(numbers[0])
        question = f"How often is {numbers[0]} in {', '.join(map(str, numbers))}?"
        line = f"The count is {result}."
    elif kind == 5:
        result = a
        question = f"Reverse {shown}. What is the last number?"
        line = f"Reversed: {', '.join(map(str, numbers[::-1]))}."
    elif kind == 6:
        b = draw_number(rng, 2, 99)
        first = annotate(a + b, "-", a)[0]
        last = a + 3 * b
        result = a + 4 * b
        question = f"Continue {a}, {a + b}, {a + 2 * b}, {last}."
        line = f"The step is {first}.\nNext is {annotate(last, '+', b)[0]}."
    else:
        (n, *_), (m, *_) = rng.sample(PEOPLE, 2)
        o = rng.choice(OBJECTS)
        who, result = rng.choice([(n, a), (m, b)])
        question = f"{n} has {a} {o} and {m} has {b}. How many has {who}?"
        line = f"{who} has {result} {o}."
    return question, f"{line}\n#### {result}"


def make_problem(rng):
    return tell_story(rng, rng.choice([2, 3]))


def make_mixed_problem(rng):
    if rng.random() < 0.5:
        return tell_story(rng, rng.choice([1, 2, 2, 3]))
    while True:
        try:
            return make_drill(rng)
        except Misfit:
            pass


# ---------------------------------------------------------------------------------- splits
# The numbers in a question decide which split it may be in. So no question, nor the same calculation about
# other things, is in two splits, whatever the seed and the numbers of problems are.
SHARES = dict(train=30, val=10, test=10, mix=30, mix_val=10, mix_test=10)      # percent


def choose_split(question):
    """The only split that a question may be in."""
    numbers = " ".join(re.findall("[0-9]+", question))
    place = int.from_bytes(hashlib.sha256(numbers.encode()).digest()[:8], "big") % 100
    for split, share in SHARES.items():
        place -= share
        if place < 0:
            return split


# ---------------------------------------------------------------------------------- two ways to answer
# Guidance has something to show where only the group tells how to answer. The group "words" answers in
# sentences, the group "sums" with the bare calculations. Some things are asked about by one of the two
# groups alone.
STYLES = ("words", "sums")
ONLY = {thing: STYLES[i % 2] for i, thing in enumerate(OBJECTS[:6])}           # a quarter of the questions


def apply_style(rng, question, answer):
    """Return the answer in the way of a group, and the group: one that asks about the thing, at random."""
    group = next((ONLY[thing] for thing in ONLY if f" {thing}" in question), None) or rng.choice(STYLES)
    steps = re.findall(r"\d+[-+*/]\d+ = <<[^>]*>>\d+", answer)
    if group == "sums" and steps:
        answer = "\n".join([*(f"{step}." for step in steps), answer.split("\n")[-1]])
    return answer, group


def is_in_style(group, answer):
    """Whether every line of an answer before the last is written as the group's are: in words or without."""
    lines = answer.split("####")[0].strip().split("\n")
    return all(any(map(str.isalpha, line)) == (group == "words") for line in lines)


# ---------------------------------------------------------------------------------- as a task
@dataclass(frozen=True)
class Options(sources.Options):
    train: int = 20000                  # problems of the task, to train L2D on
    mix: int = 30000                    # problems of the broader mixture, to pre-train the trunk on
    seed: int = 1337                    # of the generator
    strip_annotations: bool = False     # remove the calculator annotations <<...>> from the answers


def load(options, folder, task="arithmetic", style=None):
    """Return the Problems of the task (train, ...) and of its trunk's mixture (mix, ...); and no files."""
    counts = dict(train=options.train, val=500, test=1000, mix=options.mix, mix_val=500, mix_test=1000)
    splits = {}
    for split, count in counts.items():
        require(1 <= count <= 1_000_000, f"--{split}={count} is out of range: 1 to 1000000")
        rng = random.Random(f"{options.seed} {split}")       # its own: sizes do not interact
        make = make_mixed_problem if split.startswith("mix") else make_problem
        found = {}
        while len(found) < count:
            question, answer = make(rng)
            if choose_split(question) != split or question in found:
                continue
            answer, group = style(rng, question, answer) if style else (answer, group_by_steps(answer, 4))
            place = f"{split} problem {len(found) + 1}"
            found[question] = make_worked_problem(task, question, answer, group, place, options)
        splits[split] = list(found.values())
    return splits, {}


def load_styles(options, folder):
    return load(options, folder, "styles", apply_style)


@cache
def make_tokenizer():
    """
    Return a tiny tiktoken Encoding: 256 bytes, 0 to 99 with and without a leading blank, and the generator's
    words.

    tiktoken makes one token of a piece that it knows as a whole. Any other text falls back to smaller
    pieces, at worst to bytes, so that every text can be encoded.
    """
    pattern = r"Question:|\nAnswer:| = <<|<<|>>|\.\n|####| ?[A-Za-z]+| ?[0-9]{1,3}| ?[^\sA-Za-z0-9]|\s"
    rng = random.Random(0)              # not --seed: the vocabulary is the same whatever the data is
    problems = [make(rng) for make in (make_problem, make_mixed_problem) for _ in range(3000)]
    text = "".join(f"{PROMPT.format(question)} {answer}" for question, answer in problems)
    numbers = {f"{space}{n}" for space in ("", " ") for n in range(MAX_NUMBER + 1)}
    pieces = set(re.findall(pattern, text)) | numbers
    ranks = {bytes([i]): i for i in range(256)}
    for piece in sorted(p.encode() for p in pieces):
        ranks.setdefault(piece, len(ranks))
    return tiktoken.Encoding("arithmetic", pat_str=pattern, mergeable_ranks=ranks,
                             special_tokens={ENDOFTEXT: len(ranks)})
