r"""
What a task is: where its problems come from, how prompt and answer are written, how an output is scored.

A task is one entry of TASKS, at the end of this file; nothing elsewhere knows a task by its name. To add one,
write a function (row, where, options) -> (split or "", Problem) for a line of its file (by multiple_choice,
if it is that: then the likelihood of each choice is scored, too), choose the reader of its answers in
scoring.py, and write the entry. Most prompts are "Question: {}\nAnswer:", GSM8K's; the answer follows after
a space.
"""
import csv
import gzip
import hashlib
import io
import json
import math
import os
import random
import re
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Literal, NamedTuple

from configurator import UserError, require
from files import download, file_sha256
from tasks import sandbox, scoring
from tasks.arithmetic import PROMPT, STYLES, bucket, in_style, mix_problem, styled, task_problem
from tasks.scoring import boxed, cut, majority, normalise

GROUPS = ("math", "code", "knowledge")
LETTERS = "ABCDEFGHIJ"
SEED = 1337                          # of what is held out for validation
TRAINED_ON = "train", "mix"          # splits; with val and mix_val, those that train.py reads


class Problem(NamedTuple):
    prompt: str                      # the whole text that the model sees
    answer: str                      # the text that it should write, with the space or newline that begins it
    task: str                        # who scores it, a key of TASKS
    label: str = ""                  # for guidance: the group, or whatever the task divides its problems by
    subject: str = ""                # results are also given by subject
    choices: tuple = ()              # the texts whose likelihood can be compared: " A", " B", ...
    test: str = ""                   # code that raises unless the answer before it is right
    where: str = ""                  # file and line


class Score(NamedTuple):
    right: bool                      # as the benchmark's authors score
    flexible: bool                   # by a more forgiving reader
    well_formed: bool                # there is an answer to be read


# ---------------------------------------------------------------------------------- scoring
def vote(problem, outputs, run_code=False):
    """(output, Score) of the majority of k outputs, each a whole text without <|endoftext|>.

    Strict and flexible answers are counted apart; output is the first that gives the strict majority, or else
    the first. Code that a problem's test needs is run, in the sandbox, and only if run_code says so.
    """
    task = TASKS[problem.task]
    texts = [cut(output, task.stops) for output in outputs]
    strict, flexible = zip(*(task.read(problem, text) for text in texts))
    chosen, loose = majority(strict), majority(flexible)
    first = strict.index(chosen)
    if problem.test:
        if not run_code:
            raise ValueError("allow_code comes first")
        compiled, passed, _ = sandbox.run(chosen)
        return outputs[first], Score(passed, passed, compiled)
    want = task.read(problem, problem.answer)[0]
    well_formed = chosen is not None and task.well_formed(problem, texts[first])
    return outputs[first], Score(chosen is not None and chosen == want, loose is not None and loose == want,
                                 well_formed)


def score(problem, output, run_code=False):
    """The Score of an output, the whole text that a model wrote up to <|endoftext|>."""
    return vote(problem, [output], run_code)[1]


def pass_at_k(n, right, k):
    """The chance that one of k samples is right: unbiased, from n of which so many are (Chen 2021)."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def allow_code(problems, run_code):
    """Raises UserError if problems need the model's code to be run, and it may not or cannot be."""
    needs = next((p for p in problems if p.test), None)
    if needs and not run_code:
        raise UserError(f"{needs.task} is scored by running the code that the model writes, in a "
                        "process with limits; allow it with --run_code")
    if needs:
        _, passed, lacks = sandbox.run("import collections, heapq, math, re, typing")
        require(passed, "no Python runs in the sandbox here; run as an ordinary user, not as root, with a "
                "Python that everybody may read")
        if lacks:
            print(f"note: the sandbox of the model's code lacks here: {', '.join(lacks)}")


def check_gold(problem):
    """Raises UserError unless the scorer reads the true answer whole and exactly."""
    task, text = TASKS[problem.task], problem.answer
    strict, flexible = task.read(problem, text)
    plain = r"-?([0-9]{1,3}(,[0-9]{3})+|[0-9]*)(\.[0-9]+)?\.?"
    tail = text.split("####", 1)[1].strip() if "####" in text and not problem.test else "0"
    whole = re.fullmatch(plain, tail) and cut(text, task.stops) == text
    if not whole or strict is None or strict != flexible:
        raise UserError(f"{problem.where}: scoring cannot read the whole answer, which ends in "
                        f"{text[-40:]!r}; expected {task.expects}")


def few_shot(problem, examples, k):
    """The problem's prompt after k worked examples, Problems, of its subject if there are any."""
    others = [e for e in examples if e.prompt != problem.prompt]
    of_subject = [e for e in others if problem.subject and e.subject == problem.subject]
    return "".join(f"{e.prompt}{e.answer}\n\n" for e in (of_subject or others)[:k]) + problem.prompt


# ---------------------------------------------------------------------------------- where problems come from
@dataclass(frozen=True)
class Options:
    out_dir: str = ""                # where the data goes; default: data/<task>
    tokenizer: Literal["auto", "gpt2", "arithmetic"] = "auto"    # auto: the task's own
    drop_long: bool = False          # leave out training problems that are longer than 1,024 tokens

@dataclass(frozen=True)
class Generated(Options):
    train: int = 20000               # problems of the task, to train L2D on
    mix: int = 30000                 # problems of the broader mixture, to pre-train the trunk on
    seed: int = 1337                 # of the generator
    strip_annotations: bool = False  # remove the calculator annotations <<...>> from the answers

@dataclass(frozen=True)
class Files(Options):
    source: str = ""                 # folder of the task's files, or its only file; default: the net

@dataclass(frozen=True)
class HeldOut(Files):
    val: int = 500                   # training problems held out for validation, where no file has them
    strip_annotations: bool = False  # remove the calculator annotations <<...>> from the answers

@dataclass(frozen=True)
class Mix(Options):
    gsm8k: str = ""                  # folders as for --source of each task; default: download
    mbpp: str = ""
    mmlu: str = ""
    math: str = ""                   # MATH with its train.jsonl; default: leave it out


def generated(name, style=None):
    """A loader of the embedded task (train, val, test) and of a broader mixture for its trunk (mix...)."""
    def load(options, folder):
        counts = dict(train=options.train, val=500, test=1000, mix=options.mix, mix_val=500, mix_test=1000)
        splits = {}
        for split, count in counts.items():
            require(1 <= count <= 1_000_000, f"--{split}={count} is out of range: 1 to 1000000")
            rng, found = random.Random(f"{options.seed} {split}"), {}    # its own: sizes do not interact
            make = mix_problem if split.startswith("mix") else task_problem
            while len(found) < count:
                question, answer = make(rng)
                if bucket(question) == split and question not in found:
                    answer, label = style(rng, question, answer) if style else \
                        (answer, solution_steps(answer, 4))
                    where = f"{split} problem {len(found) + 1}"
                    found[question] = worked(name, question, answer, label, where, options)
            splits[split] = list(found.values())
        return splits, {}
    return load


def worked(name, question, answer, label, where, options):
    """The Problem of a question and an answer as GSM8K writes them."""
    answer = re.sub("<<.*?>>", "", answer) if options.strip_annotations else answer
    return Problem(PROMPT.format(question.strip()), f" {answer.strip()}", name, label, where=where)


def step_names(n):
    return ("1 step", *(f"{i} steps" for i in range(2, n)), f"{n} or more steps")


def solution_steps(answer, n):
    """The label of an answer by its solution steps, the lines before "####"."""
    lines = answer.split("####")[0].splitlines()
    return step_names(n)[min(max(sum(bool(line.strip()) for line in lines), 1), n) - 1]


def rows(path):
    """Yields (object, "FILE line N") of a JSONL file, gzipped or not; UserError at the first bad line."""
    try:
        data = Path(path).read_bytes()
        lines = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig").split("\n")
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text: {e}") from None
    for number, line in enumerate(lines, 1):                 # not splitlines: U+2028 may be in a string
        if line.strip():
            where = f"{path} line {number}"
            try:
                row = json.loads(line)
                json.dumps(row, ensure_ascii=False).encode()             # a lone surrogate is no text
            except (ValueError, RecursionError, MemoryError) as e:
                raise UserError(f"{where} is not JSON that can be read: {e}") from None
            yield row, where


def texts(row, where, *keys):
    """The texts under the keys of a row. Raises UserError if one is not there."""
    for key in keys:
        if not isinstance(row, dict) or not isinstance(row.get(key), str) or not row[key].strip():
            expected = ", ".join(f'"{k}": "..."' for k in keys)
            raise UserError(f'{where} has no text "{key}"; expected {{{expected}}}')
    return [row[key].replace("\r\n", "\n") for key in keys]


def is_texts(value):
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def source_of(options, folder):
    return Path(os.path.expanduser(options.source)) if options.source else folder


def obtain(options, folder, sources, file, url="", size=None, sha256=None, lone=False):
    """The path of a source file, in --source (lone: or just that) or downloaded; its hash goes to sources."""
    path = source_of(options, folder)
    path = path if lone and path.is_file() else path / file
    if not options.source:
        if not url.startswith("https:"):
            raise UserError(f"this is not downloaded; give --source=DIR, a folder with {file}{url}")
        download(url, path, size, sha256)
    try:
        sources[file] = file_sha256(path)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}; --source needs {file} in it") from None
    if sha256 and sources[file] != sha256:
        print(f"note: {path} is not the original file (sha256 {sources[file]})")
    return path


def from_lines(make, files, optional=()):
    """A loader of files with a problem on each line: make(row, where, options) -> (split or "", Problem).

    files: {split: (name, url, size, sha256)}; those of optional splits may be absent from --source. Where the
    options have val, so many problems are held out from the training split, unless there is a file of them.
    """
    def load(options, folder):
        splits, sources = {}, {}
        for split, (file, *known) in files.items():
            if split in optional and not (source_of(options, folder) / file).exists():
                continue
            path = obtain(options, folder, sources, file, *known, lone=len(files) == 1 + len(optional))
            found = [make(row, where, options) for row, where in rows(path)]
            require(found, f"{path} holds no problems")
            for own, problem in found:
                splits.setdefault(own or split, []).append(problem)
        if hasattr(options, "val") and "train" in splits and "val" not in splits:
            splits = hold_out(splits, options.val)
        return splits, sources
    return load


def hold_out(splits, n):
    """Moves n problems of train to val; the choice depends on the texts only, not on a library's RNG."""
    def place(problem):
        question = problem.prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
        return hashlib.sha256(f"{SEED} {question}".encode()).digest()
    train = sorted(splits["train"], key=place)
    require(1 <= n < len(train), f"--val={n} problems cannot be held out from {len(train)}; at least {n + 1} "
            f"are needed, or --val=N with N from 1 to {len(train) - 1}")
    others = {split: problems for split, problems in splits.items() if split not in ("train", "val")}
    return {"train": train[n:], "val": train[:n], **others}


def gsm8k(row, where, options):
    question, answer = texts(row, where, "question", "answer")
    return "", worked("gsm8k", question, answer, solution_steps(answer.strip(), 8), where, options)


def jsonl(row, where, options):                              # a user's own
    question, answer = texts(row, where, "question", "answer")
    label = texts(row, where, "label")[0].strip() if "label" in row else "all"
    return "", worked("jsonl", question, answer, label, where, options)


def competition(row, where, options):                        # MATH
    question, solution = texts(row, where, "problem", "solution")
    if "answer" in row and normalise(*texts(row, where, "answer")) != normalise(boxed(solution) or ""):
        raise UserError(f"{where}: the solution does not box its answer {row['answer']!r}")
    problem = worked("math", question, solution, "math", where, options)
    return "", problem._replace(subject=str(row.get("subject") or row.get("type") or ""))


def humaneval(row, where, options):
    keys = ("prompt", "canonical_solution", "test", "entry_point")
    prompt, answer, test, name = texts(row, where, *keys)
    test = f"{test}\ncheck({name})"
    return "", Problem(prompt, answer.rstrip(), "humaneval", "code", test=test, where=where)


def mbpp(row, where, options):
    question, code = (text.strip() for text in texts(row, where, "text", "code"))
    tests, number, setup = row.get("test_list"), row.get("task_id"), row.get("test_setup_code")
    if not is_texts(tests) or not is_texts([setup or ""]) or type(number) is not int:
        raise UserError(f"{where} needs a list of texts test_list and a number task_id")
    split = "dev" if number <= 10 else "test" if number <= 510 else "val" if number <= 600 else "train"
    prompt = PROMPT.format("\n".join([question, *tests]))
    test = "\n".join([setup or "", *tests])
    return split, Problem(prompt, f"\n{code}", "mbpp", "code", test=test, where=where)


def multiple_choice(name, question, options, letter, subject, where):
    """The Problem of a question with 2 to 10 options, texts, and the letter of the right one."""
    letter = letter.strip()
    if not 2 <= len(options) <= len(LETTERS) or letter not in list(LETTERS[:len(options)]):
        raise UserError(f"{where} has {len(options)} options and the answer {letter!r}; expected 2 to "
                        f"{len(LETTERS)} options and the letter of one")
    lines = [question.strip(), *(f"{c}. {option}" for c, option in zip(LETTERS, options))]
    choices = tuple(f" {c}" for c in LETTERS[:len(options)])
    prompt = PROMPT.format("\n".join(lines))
    return Problem(prompt, f" {letter}", name, "knowledge", subject, choices, where=where)


def mmlu_pro(row, where, options):
    question, letter, subject = texts(row, where, "question", "answer", "category")
    given = row.get("options")
    require(is_texts(given), f"{where} has no list of texts options")
    return "", multiple_choice("mmlu_pro", question, given, letter, subject, where)


def load_mmlu(options, folder):
    """MMLU's tables, from the folders dev, val, test of --source or from data.tar."""
    source, sources, splits = source_of(options, folder), {}, {}
    if options.source and source.is_dir() and not (source / "data.tar").exists():
        tables = [(str(path), path.read_bytes()) for path in sorted(source.glob("*/*.csv"))]
        sources["tables"] = hashlib.sha256(b"".join(data for _, data in tables)).hexdigest()
    else:
        path = obtain(options, folder, sources, "data.tar", *MMLU_TAR, lone=True)
        try:
            with tarfile.open(path) as tar:
                files = {m.name: m for m in tar if m.name.endswith(".csv") and m.isfile()}
                tables = [(name, tar.extractfile(files[name]).read()) for name in sorted(files)]
        except (tarfile.TarError, OSError, EOFError) as e:
            raise UserError(f"{path} is not a tar archive that can be read: {e}") from None
    for name, data in tables:
        if found := re.search(r"(?:^|/)(dev|val|test)/(\w+)_\1\.csv$", name):
            try:
                reader = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
                for question, *given, letter in reader:
                    where, subject = f"{name} line {reader.line_num}", found[2].replace("_", " ")
                    splits.setdefault(found[1], []).append(
                        multiple_choice("mmlu", question, given, letter, subject, where))
            except (csv.Error, ValueError) as e:             # a row of one cell, bytes that are no text
                raise UserError(f"{name} is not a table of MMLU: {e}") from None
    require("test" in splits, f"no test/<subject>_test.csv in {source}; expected MMLU's folders dev, val and "
            "test")
    return splits, sources


def load_mix(options, folder):
    """The training splits of several tasks, labelled by their groups; validation from each, too."""
    parts, sources = {"train": [], "val": []}, {}
    for name, joined in dict(gsm8k=["train"], math=["train"], mbpp=["train"], mmlu=["dev", "val"]).items():
        if name == "math" and not options.math:
            print("note: the mix is without MATH; --math=DIR is a folder with its train.jsonl")
            continue
        task = TASKS[name]
        splits, found = task.load(task.options(source=getattr(options, name)),
                                  folder.parents[1] / name / "source")
        sources |= {f"{name}/{file}": sha256 for file, sha256 in found.items()}
        own = {"train": sum((splits.get(split, []) for split in joined), []), "val": splits.get("val", [])}
        if "val" in joined:          # validated on what is not trained on
            own = hold_out(own, len(own["train"]) // 10)
        for split in parts:
            parts[split] += [p._replace(label=task.group) for p in own[split]]
    for problems in parts.values():
        random.Random(SEED).shuffle(problems)                # --limit takes some of each
    return parts, sources


# ---------------------------------------------------------------------------------- the tasks
NUMBER = '"#### " and a plain number, such as #### 1,234.5'


class Task(NamedTuple):
    load: Callable                   # (options, folder for downloads) -> ({split: [Problem]}, {file: sha256})
    read: Callable                   # (problem, text) -> (strict, flexible) answer, None where there is none
    options: type = Files            # dataclass of its command-line options
    group: str = ""                  # one of GROUPS: its label in the mix
    labels: tuple = GROUPS           # names of the guidance labels; (): those that the problems have
    tokenizer: str = "gpt2"
    prompt: str = PROMPT             # a user's own question becomes a prompt by this
    shots: str = ""                  # the split whose problems are worked examples; "": there is none
    stops: tuple = ("\nQuestion:",)  # an output ends before the first of these
    expects: str = NUMBER            # of a true answer, for the message where it is another
    counts: dict = {}                # how many problems each split has, where no hash tells the original
    well_formed: Callable = lambda problem, text: True       # of a text that has an answer: its form is right


GSM8K = "https://raw.githubusercontent.com/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/"
GSM8K_FILES = {
    "train": ("train.jsonl", f"{GSM8K}grade_school_math/data/train.jsonl", 4166206,
              "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"),
    "test": ("test.jsonl", f"{GSM8K}grade_school_math/data/test.jsonl", 749738,
             "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14")}
JSONL_FILES = {split: (f"{split}.jsonl",) for split in ("train", "val", "test")}
MATH_FILES = {
    "train": ("train.jsonl",),
    "test": ("test.jsonl", "https://raw.githubusercontent.com/ZubinGou/math-evaluation-harness/"
             "db77bc6bb2a17c90ed2d63e88ebd8c40a82858c5/data/math_oai/test.jsonl", 446564,
             "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132")}
MMLU_TAR = ("https://people.eecs.berkeley.edu/~hendrycks/data.tar", None,
            "bec563ba4bac1d6aaf04141cd7d1605d7a5ca833e38f994051e818489592989b")
# In place of an address, how to get the file:
PRO_HELP = (", saved by datasets.load_dataset('TIGER-Lab/MMLU-Pro', split='test').to_json('test.jsonl'), and "
            "validation.jsonl likewise")
PRO_FILES = {"val": ("validation.jsonl", PRO_HELP), "test": ("test.jsonl", PRO_HELP)}
HUMANEVAL_FILES = {"test": ("HumanEval.jsonl.gz", "https://raw.githubusercontent.com/openai/human-eval/"
                            "6d43fb980f9fee3c892a914eda09951f772ad10d/data/HumanEval.jsonl.gz", 44877,
                            "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef")}
MBPP_FILES = {"all": ("mbpp.jsonl", "https://raw.githubusercontent.com/google-research/google-research/"
                      "2251e8c67a7fe7d6348714967ee101080b28e956/mbpp/mbpp.jsonl")}

TASKS = {
    "arithmetic": Task(generated("arithmetic"), scoring.read_number, Generated,
                       labels=step_names(4), tokenizer="arithmetic", shots="train"),
    "styles": Task(generated("styles", styled), scoring.read_number, Generated,
                   labels=STYLES, tokenizer="arithmetic", shots="train",
                   well_formed=lambda problem, text: in_style(problem.label, text)),
    "gsm8k": Task(from_lines(gsm8k, GSM8K_FILES), scoring.read_number, HeldOut,
                  group="math", labels=step_names(8), shots="train"),
    "jsonl": Task(from_lines(jsonl, JSONL_FILES, ["val", "test"]), scoring.read_text, HeldOut,
                  labels=(), shots="train", expects=f"words, or {NUMBER}"),
    "math": Task(from_lines(competition, MATH_FILES, ["train"]), scoring.read_boxed, HeldOut,
                 group="math", shots="train", expects=r"a formula in \boxed{}"),
    "mmlu": Task(load_mmlu, scoring.read_letter, group="knowledge", shots="dev",
                 counts={"dev": 285, "val": 1531, "test": 14042}),
    "mmlu_pro": Task(from_lines(mmlu_pro, PRO_FILES), scoring.read_letter, group="knowledge", shots="val",
                     counts={"val": 70, "test": 12032}),
    "humaneval": Task(from_lines(humaneval, HUMANEVAL_FILES),
                      scoring.read_code(lambda problem, text: problem.prompt + text), group="code",
                      prompt="{}", stops=("\nclass", "\ndef", "\n#", "\nif", "\nprint")),
    "mbpp": Task(from_lines(mbpp, MBPP_FILES), scoring.read_code(lambda problem, text: text), group="code",
                 shots="dev", stops=("\nQuestion:", "\nassert"),
                 counts={"dev": 10, "test": 500, "val": 90, "train": 374}),
    "mix": Task(load_mix, scoring.read_number, Mix),
}
