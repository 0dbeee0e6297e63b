r"""
What a task is, and the scores of its answers. Each task is an entry of TASKS, at the end of this file.

To add a task, write a function (row, place, options) -> ("" or the split, Problem) for a line of its file, as
those in benchmarks.py. Pass it to make_loader, choose a reader of answers in scoring.py, and write the entry.
Each Problem's group must be one of the entry's groups; groups=() takes the groups that the problems have.
multiple_choice makes problems with choices: then the likelihood of each choice is scored, too.

problem.py says what a problem is and how it becomes tokens. sources.py reads files, formulas.py and
scoring.py read answers, sandbox.py runs code. arithmetic.py is the embedded task.
"""
import math
import re
from pathlib import Path
from typing import Callable, NamedTuple

from configurator import UserError, require
from plumbing.dataset import load_manifest, remedy
from plumbing.tokenizer import load_gpt2_tokenizer
from tasks import arithmetic, benchmarks, sandbox, scoring
from tasks.benchmarks import mmlu_pro, name_steps
from tasks.problem import GROUPS, PROMPT, Problem
from tasks.scoring import cut, majority
from tasks.sources import FileOptions, HeldOutOptions, make_loader, read_lines

TRAINED_ON = ("train", "mix")        # splits; with val and mix_val, those that train.py reads


class Score(NamedTuple):
    right: bool                      # as the benchmark's authors score
    flexible: bool                   # by a more forgiving reader
    well_formed: bool                # there is an answer to be read


# ---------------------------------------------------------------------------------- scoring
def vote(problem, outputs, run_code=False):
    """
    Return (output, Score) for the majority of k outputs, each a whole text without <|endoftext|>.

    Strict and flexible answers are counted apart. output is the first that gives the strict majority, or else
    the first. Code that a problem's test needs is run in the sandbox, and only if run_code is True.
    """
    task = TASKS[problem.task]
    texts = [cut(output, task.stops) for output in outputs]
    strict, flexible = zip(*(task.read_answer(problem, text) for text in texts))
    chosen = majority(strict)
    chosen_flexibly = majority(flexible)
    first = strict.index(chosen)
    if problem.test:
        if not run_code:
            raise ValueError("allow_code comes first")
        compiled, passed, _ = sandbox.run(chosen)
        return outputs[first], Score(passed, passed, compiled)
    gold = task.read_answer(problem, problem.answer)[0]
    right = chosen is not None and chosen == gold
    flexibly_right = chosen_flexibly is not None and chosen_flexibly == gold
    well_formed = chosen is not None and task.well_formed(problem, texts[first])
    return outputs[first], Score(right, flexibly_right, well_formed)


def score(problem, output, run_code=False):
    """Return the Score of an output, the whole text that a model wrote up to <|endoftext|>."""
    return vote(problem, [output], run_code)[1]


def pass_at_k(n, right, k):
    """The chance that one of k samples or more is right, from n of which `right` are right (Chen 2021)."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def allow_code(problems, run_code):
    """Raise UserError if problems need the model's code to be run, and it may not or cannot be."""
    needs = next((problem for problem in problems if problem.test), None)
    if not needs:
        return
    require(run_code, f"{needs.task} is scored by running the code that the model writes, in a process "
            "with limits; allow it with --run_code")
    _, passed, lacks = sandbox.run("import collections, heapq, math, re, typing")
    require(passed, "no Python runs in the sandbox here; run as an ordinary user, not as root, with a "
            "Python that everybody may read")
    if lacks:
        print(f"note: the sandbox of the model's code lacks here: {', '.join(lacks)}")


def check_gold(problem):
    """Raise UserError unless the scorer reads the true answer whole and exactly."""
    task = TASKS[problem.task]
    text = problem.answer
    strict, flexible = task.read_answer(problem, text)
    plain = r"-?([0-9]{1,3}(,[0-9]{3})+|[0-9]*)(\.[0-9]+)?\.?"
    tail = text.split("####", 1)[1].strip() if "####" in text and not problem.test else "0"
    whole = re.fullmatch(plain, tail) and cut(text, task.stops) == text
    if not whole or strict is None or strict != flexible:
        raise UserError(f"{problem.place}: scoring cannot read the whole answer, which ends in "
                        f"{text[-40:]!r}; expected {task.expects}")


def few_shot(problem, examples, k):
    """
    Return the problem's prompt after k worked examples, Problems, of its subject if there are any.

    Raises UserError if there are fewer than k.
    """
    others = [e for e in examples if e.prompt != problem.prompt]
    of_subject = [e for e in others if problem.subject and e.subject == problem.subject]
    chosen = (of_subject or others)[:k]
    subject = f" of the subject {problem.subject!r}" if of_subject else ""
    require(len(chosen) == k, f"shots={k}, but there are only {len(chosen)} worked examples{subject} for "
            f"a problem; use --shots={len(chosen)} or fewer")
    return "".join(f"{e.prompt}{e.answer}\n\n" for e in chosen) + problem.prompt


# ---------------------------------------------------------------------------------- reading
def load_problems(data_dir, split):
    """Return the Problems of a split of prepared data. Raises UserError if they are missing or damaged."""
    manifest = load_manifest(data_dir)
    n = manifest["counts"].get(split)
    require(n is not None, f"{data_dir} has no split {split!r}; it has {', '.join(manifest['counts'])}")
    path = Path(data_dir) / f"{split}.jsonl"
    try:
        problems = [Problem(**row | {"choices": tuple(row.get("choices", ())), "place": place})
                    for row, place in read_lines(path)]
        if len(problems) != n:
            raise ValueError(f"it has {len(problems)} problems instead of {n}")
        if not all(p.task in TASKS and p.group in manifest["group_names"] for p in problems):
            raise ValueError("a task or a group in it is unknown")
    except (TypeError, AttributeError, ValueError, UserError) as e:
        raise UserError(f"{path} is missing or damaged ({e}); make it again with: "
                        f"{remedy(data_dir)}") from None
    return problems


# ---------------------------------------------------------------------------------- the tasks
NUMBER = '"#### " and a plain number, such as #### 1,234.5'
TOKENIZERS = {"gpt2": load_gpt2_tokenizer, "arithmetic": arithmetic.make_tokenizer}  # they return Encodings


class Task(NamedTuple):
    load: Callable                   # (options, folder for downloads) -> ({split: [Problem]}, {file: sha256})
    read_answer: Callable            # (problem, text) -> (strict, flexible) answer, None where there is none
    options: type = FileOptions      # dataclass of its command-line options
    mix_group: str = ""              # one of GROUPS: its group where several tasks are trained on together
    groups: tuple = GROUPS           # what guidance may steer by; (): the groups that the problems have
    tokenizer: str = "gpt2"          # a key of TOKENIZERS
    prompt: str = PROMPT             # a user's own question becomes a prompt by this
    shots: str = ""                  # the split whose problems are worked examples; "": there is none
    stops: tuple = ("\nQuestion:",)  # an output ends before the first of these
    expects: str = NUMBER            # of a true answer, for the message where it is another
    counts: dict = {}                # how many problems each split has, where no hash tells the original
    well_formed: Callable = lambda problem, text: True       # of a text that has an answer: its form is right


TASKS = {
    "arithmetic": Task(arithmetic.load, scoring.read_number, arithmetic.Options,
                       groups=name_steps(4), tokenizer="arithmetic", shots="train"),
    "styles": Task(arithmetic.load_styles, scoring.read_number, arithmetic.Options,
                   groups=arithmetic.STYLES, tokenizer="arithmetic", shots="train",
                   well_formed=lambda problem, text: arithmetic.is_in_style(problem.group, text)),
    "gsm8k": Task(benchmarks.load_gsm8k, scoring.read_number, HeldOutOptions,
                  mix_group="math", groups=name_steps(8), shots="train"),
    "jsonl": Task(make_loader(benchmarks.jsonl, benchmarks.JSONL_FILES, ["val", "test"]), scoring.read_text,
                  HeldOutOptions, groups=(), shots="train", expects=f"words, or {NUMBER}"),
    "math": Task(benchmarks.load_math, scoring.read_boxed, HeldOutOptions,
                 mix_group="math", shots="train", expects=r"a formula in \boxed{}"),
    "mmlu": Task(benchmarks.load_mmlu, scoring.read_letter, mix_group="knowledge", shots="dev",
                 counts={"dev": 285, "val": 1531, "test": 14042}),
    "mmlu_pro": Task(make_loader(mmlu_pro, benchmarks.PRO_FILES), scoring.read_letter, mix_group="knowledge",
                     shots="val", counts={"val": 70, "test": 12032}),
    "humaneval": Task(make_loader(benchmarks.humaneval, benchmarks.HUMANEVAL_FILES),
                      scoring.read_code(lambda problem, text: problem.prompt + text),
                      mix_group="code", prompt="{}", stops=("\nclass", "\ndef", "\n#", "\nif", "\nprint")),
    "mbpp": Task(benchmarks.load_mbpp, scoring.read_code(lambda problem, text: text), mix_group="code",
                 shots="dev", stops=("\nQuestion:", "\nassert"),
                 counts={"dev": 10, "test": 500, "val": 90, "train": 374}),
    "mix": Task(benchmarks.load_mix, scoring.read_number, benchmarks.MixOptions),
}
