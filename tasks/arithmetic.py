"""
The embedded task: a generator of arithmetic word problems in GSM8K's format, no network.

task_problem is the task that is finetuned and tested; mix_problem a broader mixture, half of it word
problems, on which the tiny trunk is pre-trained. Both take a random.Random and return (question, answer).
bucket says to which split a question belongs. styled writes an answer in the way of one of two groups.

A story has a running quantity v. It starts as a number a; each scene is a sentence of the question with no,
one or more steps (operation, sentence of the answer). In an operation b is a new number that the sentence
tells, u is the quantity before the last step, {e} in the sentence is "3*12 = <<3*12=36>>36".
"""
import hashlib
import re

PROMPT = "Question: {}\nAnswer:"     # GSM8K's, and of most tasks; the answer follows after a space
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

def number(rng, low, high):
    """An integer in low..high, as often with two digits as with three (uniform in its logarithm)."""
    if low > high:
        raise Misfit
    return int(low * ((high + 1) / low) ** rng.random())

def annotate(left, op, right):
    """GSM8K's way to write an operation, "3*12 = <<3*12=36>>36", and its result."""
    result = COMPUTE[op](left, right)
    if not 1 <= result <= MAX_NUMBER:
        raise Misfit
    return f"{left}{op}{right} = <<{left}{op}{right}={result}>>{result}", result

def operand(rng, operation, v):
    """A number b for "v+b", "b-v", ... that is neither trivial nor out of range."""
    op = operation[1]
    if op == "+":
        return rng.randint(2, 9) if operation == "b+1" else number(rng, 3, MAX_NUMBER - v)
    if op == "-":
        return number(rng, v + 3, MAX_NUMBER) if operation == "b-v" else number(rng, 3, v - 3)
    if op == "*":
        return rng.randint(2, max(2, min(12, MAX_NUMBER // v)))
    return rng.choice([b for b in range(3, 13) if v % b == 0 and v > 2 * b] or [0]) or number(rng, 1, 0)

def story(rng, n_steps):
    """A word problem with n_steps operations."""
    while True:
        try:
            return tell(rng, n_steps)
        except Misfit:
            pass

def tell(rng, n_steps):
    start, ending = rng.choice(STARTS), rng.choice(ENDINGS)
    n_events = n_steps - len(start[1]) - len(ending[1])
    if n_events < 0:
        raise Misfit
    (n, she, her), (m, *_), (k, *_) = rng.sample(PEOPLE, 3)
    c, d = rng.sample(CONTAINERS, 2)
    words = dict(n=n, m=m, k=k, she=she, She=she.title(), her=her, o=rng.choice(OBJECTS), c=c, d=d)
    a = v = number(rng, 4, 60)
    u, question, answer = v, [], []
    for sentence, steps in [start, *rng.sample(EVENTS, n_events), ending]:
        b = operand(rng, steps[0][0], v) if "{b}" in sentence else None
        for operation, line in steps:
            values = dict(a=a, b=b, u=u, v=v)
            left, op, right = operation
            e, result = annotate(values.get(left), op, int(right) if right.isdigit() else values[right])
            u, v = v, result
            answer.append(line.format(e=e, **words))
        question.append(sentence.format(a=a, b=b, **words))
    return " ".join(question), "\n".join([*answer, f"#### {v}"])

def drill(rng):
    """A small exercise of another kind: for the trunk's pre-training only."""
    numbers = [number(rng, 1, MAX_NUMBER) for _ in range(rng.randint(3, 5))]
    a, b = numbers[:2]
    shown, kind = ", ".join(map(str, numbers)), rng.randrange(8)
    if kind <= 1:                                              # twice as often as the others
        operation = rng.choice(["v+b", "v-b", "v*b", "v/b"])
        v = number(rng, 4, 89)
        op, b = operation[1], operand(rng, operation, v)
        e, result = annotate(v, op, b)
        question, line = f"What is {v} {op} {b}?", f"{e}."
    elif kind == 2:
        which, result = rng.choice([("larger", max(a, b)), ("smaller", min(a, b))])
        question, line = f"Which is {which}, {a} or {b}?", f"The {which} is {result}."
    elif kind == 3:
        which, result = rng.choice([("first", a), ("second", b), ("last", numbers[-1])])
        question, line = f"What is the {which} number of {shown}?", f"The {which} is {result}."
    elif kind == 4:
        numbers = [rng.choice([a, b, numbers[2]]) for _ in range(rng.randint(4, 7))]
        result = numbers.count(numbers[0])
        question = f"How often is {numbers[0]} in {', '.join(map(str, numbers))}?"
        line = f"The count is {result}."
    elif kind == 5:
        result, turned = a, ", ".join(map(str, numbers[::-1]))
        question, line = f"Reverse {shown}. What is the last number?", f"Reversed: {turned}."
    elif kind == 6:
        b = number(rng, 2, 99)
        first, (last, result) = annotate(a + b, "-", a)[0], (a + 3 * b, a + 4 * b)
        question = f"Continue {a}, {a + b}, {a + 2 * b}, {last}."
        line = f"The step is {first}.\nNext is {annotate(last, '+', b)[0]}."
    else:
        (n, *_), (m, *_) = rng.sample(PEOPLE, 2)
        o = rng.choice(OBJECTS)
        who, result = rng.choice([(n, a), (m, b)])
        question, line = f"{n} has {a} {o} and {m} has {b}. How many has {who}?", f"{who} has {result} {o}."
    return question, f"{line}\n#### {result}"

def task_problem(rng):
    return story(rng, rng.choice([2, 3]))

def mix_problem(rng):
    if rng.random() < 0.5:
        return story(rng, rng.choice([1, 2, 2, 3]))
    while True:
        try:
            return drill(rng)
        except Misfit:
            pass

# Which split a problem may be in follows from the numbers in its question, so that no question, nor the
# same calculation about other things, is in two splits, whatever the seed and the numbers of problems.
SHARES = dict(train=30, val=10, test=10, mix=30, mix_val=10, mix_test=10)      # percent

def bucket(question):
    """The only split that a question may be in."""
    numbers = " ".join(re.findall("[0-9]+", question))
    place = int.from_bytes(hashlib.sha256(numbers.encode()).digest()[:8], "big") % 100
    for split, share in SHARES.items():
        place -= share
        if place < 0:
            return split


# Guidance has something to show where only a label can tell how to answer: the group "words" answers in
# sentences, the group "sums" with the bare calculations. Of some things only one of the two is ever asked.
STYLES = ("words", "sums")
ONLY = {thing: STYLES[i % 2] for i, thing in enumerate(OBJECTS[:6])}           # a quarter of the questions

def styled(rng, question, answer):
    """The answer to a question in the way of a group, and the group: the thing's own, or either."""
    group = next((ONLY[thing] for thing in ONLY if f" {thing}" in question), None) or rng.choice(STYLES)
    steps = re.findall(r"\d+[-+*/]\d+ = <<[^>]*>>\d+", answer)
    if group == "sums" and steps:
        answer = "\n".join([*(f"{step}." for step in steps), answer.split("\n")[-1]])
    return answer, group

def in_style(group, answer):
    """Whether every line of an answer before the last is written as the group's are: in words or without."""
    lines = answer.split("####")[0].strip().split("\n")
    return all(any(map(str.isalpha, line)) == (group == "words") for line in lines)
