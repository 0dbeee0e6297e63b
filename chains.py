"""
The second embedded task: follow a chain to its end, in one prediction. A generator, no network.

    Question: 17 24, 28 28, 24 28, ... What is the last number of 17, 12, 24, 20?
    Answer: 17 28, 12 15, 24 28, 20 15.
    #### 15

Every number leads to the one beside it; the last of a chain leads to itself. The end of a chain of n links is n look-ups, each of what the one
before it found: work that no amount of width does at once. A language model has one pass for the token, its depth; L2D
has as many as it takes steps. (The word problems of arithmetic.py ask for one sum or product a token: for facts, not for depth.)

mix_problem, on which the trunk is pre-trained, has chains of one or two links, and asks for the next number as often as for
the last. task_problem has one of LINKS links, on which the trunk, too short, stops on the way. Both take a random.Random and
return (question, answer); numbers and words are those of arithmetic.py's tokenizer.
"""
NUMBERS = range(10, 30)             # each one token
N_SHOWN = 9                         # numbers in a question
N_ASKED = 4
LINKS = 6                           # of the task's long chain


def chains(rng, links):
    """Chains with so many links each, of different numbers: {number: the next}, the last of a chain leading to itself."""
    numbers, following = iter(rng.sample(NUMBERS, sum(n + 1 for n in links))), {}
    for n in links:
        chain = [next(numbers) for _ in range(n + 1)]
        following |= zip(chain, chain[1:] + chain[-1:])
    return following


def end(following, number):
    """The last number of the chain that number is in."""
    while following[number] != number:
        number = following[number]
    return number


def problem(rng, links, which):
    """Ask for the last or the next ("first") number of some that are not the last of their chains."""
    following = chains(rng, links)
    asked = rng.sample([x for x in following if following[x] != x], N_ASKED)
    answers = [end(following, x) if which == "last" else following[x] for x in asked]
    shown = ", ".join(f"{x} {following[x]}" for x in rng.sample(list(following), len(following)))
    question = f"{shown}. What is the {which} number of {', '.join(map(str, asked))}?"
    return question, ", ".join(f"{x} {y}" for x, y in zip(asked, answers)) + f".\n#### {answers[-1]}"


def task_problem(rng):
    return problem(rng, [LINKS, N_SHOWN - LINKS - 2], "last")


def mix_problem(rng):
    return problem(rng, rng.choice([[2, 2, 2], [2, 1, 1, 1]]), rng.choice(["last", "first"]))
