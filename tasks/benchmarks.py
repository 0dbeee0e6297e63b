"""
The benchmarks: how the rows of their files become problems. Each task is an entry of TASKS in
tasks/__init__.py.
"""
import csv
import hashlib
import io
import random
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

from configurator import UserError, require
from tasks.formulas import boxed, normalise
from tasks.problem import PROMPT, Problem
from tasks.sources import (
    SEED,
    FileOptions,
    HeldOutOptions,
    Options,
    get_texts,
    hold_out,
    is_texts,
    make_loader,
    obtain,
)

LETTERS = "ABCDEFGHIJ"


# ---------------------------------------------------------------------------------- worked answers
def make_worked_problem(task, question, answer, group, place, options):
    """The Problem of a question and an answer as GSM8K writes them."""
    answer = re.sub("<<.*?>>", "", answer) if options.strip_annotations else answer
    return Problem(PROMPT.format(question.strip()), f" {answer.strip()}", task, group, place=place)


def name_steps(n):
    """The groups "1 step", "2 steps", ..., "n or more steps"."""
    return ("1 step", *(f"{i} steps" for i in range(2, n)), f"{n} or more steps")


def group_by_steps(answer, n):
    """The group of an answer with so many solution steps, the lines before "####"."""
    lines = answer.split("####")[0].splitlines()
    steps = sum(bool(line.strip()) for line in lines)
    return name_steps(n)[min(max(steps, 1), n) - 1]


def gsm8k(row, place, options):
    question, answer = get_texts(row, place, "question", "answer")
    group = group_by_steps(answer.strip(), 8)
    return "", make_worked_problem("gsm8k", question, answer, group, place, options)


def jsonl(row, place, options):                              # a user's own data
    question, answer = get_texts(row, place, "question", "answer")
    group = get_texts(row, place, "group")[0].strip() if "group" in row else "all"
    return "", make_worked_problem("jsonl", question, answer, group, place, options)


def competition(row, place, options):                        # MATH
    question, solution = get_texts(row, place, "problem", "solution")
    if "answer" in row and normalise(*get_texts(row, place, "answer")) != normalise(boxed(solution) or ""):
        raise UserError(f"{place}: the solution does not box its answer {row['answer']!r}")
    problem = make_worked_problem("math", question, solution, "math", place, options)
    return "", problem._replace(subject=str(row.get("subject") or row.get("type") or ""))


# ---------------------------------------------------------------------------------- code
def humaneval(row, place, options):
    keys = ("prompt", "canonical_solution", "test", "entry_point")
    prompt, answer, test, name = get_texts(row, place, *keys)
    test = f"{test}\ncheck({name})"
    return "", Problem(prompt, answer.rstrip(), "humaneval", "code", test=test, place=place)


def mbpp(row, place, options):
    question, code = (text.strip() for text in get_texts(row, place, "text", "code"))
    tests = row.get("test_list")
    number = row.get("task_id")
    setup = row.get("test_setup_code") or ""
    if not is_texts(tests) or not isinstance(setup, str) or type(number) is not int:
        raise UserError(f"{place} needs a list of texts test_list and a number task_id")
    split = "dev" if number <= 10 else "test" if number <= 510 else "val" if number <= 600 else "train"
    prompt = PROMPT.format("\n".join([question, *tests]))
    test = "\n".join([setup, *tests])
    return split, Problem(prompt, f"\n{code}", "mbpp", "code", test=test, place=place)


# ---------------------------------------------------------------------------------- multiple choice
def multiple_choice(task, question, options, letter, subject, place):
    """
    The Problem of a question with 2 to 10 options, texts, and the letter of the right one.

    The options lose the white space around them: in published files only the right one has it here and there.
    """
    letter = letter.strip()
    if not 2 <= len(options) <= len(LETTERS) or letter not in list(LETTERS[:len(options)]):
        raise UserError(f"{place} has {len(options)} options and the answer {letter!r}; expected 2 to "
                        f"{len(LETTERS)} options and the letter of one")
    lines = [question.strip(), *(f"{c}. {option.strip()}" for c, option in zip(LETTERS, options))]
    choices = tuple(f" {c}" for c in LETTERS[:len(options)])
    prompt = PROMPT.format("\n".join(lines))
    return Problem(prompt, f" {letter}", task, "knowledge", subject, choices, place=place)


def mmlu_pro(row, place, options):
    question, letter, subject = get_texts(row, place, "question", "answer", "category")
    given = row.get("options")
    require(is_texts(given), f"{place} has no list of texts options")
    return "", multiple_choice("mmlu_pro", question, given, letter, subject, place)


def load_mmlu(options, folder):
    """MMLU's tables, from the folders dev, val, test of --source or from data.tar."""
    source = Path(options.source or folder)
    sources = {}
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
    splits = {}
    for name, data in tables:
        if found := re.search(r"(?:^|/)(dev|val|test)/(\w+)_\1\.csv$", name):
            splits.setdefault(found[1], []).extend(read_table(name, data, found[2].replace("_", " ")))
    require("test" in splits, f"no test/<subject>_test.csv in {source}; expected MMLU's folders dev, val and "
            "test")
    return splits, sources


def read_table(name, data, subject):
    """The Problems of a table of MMLU, bytes. A row is a question, its options, and a letter."""
    problems = []
    try:
        reader = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        for question, *given, letter in reader:
            place = f"{name} line {reader.line_num}"
            problems.append(multiple_choice("mmlu", question, given, letter, subject, place))
    except (csv.Error, ValueError) as e:                     # a row of one cell, bytes that are no text
        raise UserError(f"{name} is not a table of MMLU: {e}") from None
    return problems


# ---------------------------------------------------------------------------------- files
# split: (name, url, size, sha256)
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
MMLU_TAR = ("https://huggingface.co/datasets/cais/mmlu/resolve/"
            "c30699e8356da336a370243923dbaf21066bb9fe/data.tar", 166184960,
            "bec563ba4bac1d6aaf04141cd7d1605d7a5ca833e38f994051e818489592989b")
# In place of an address, how to get the file:
PRO_HELP = (", saved by datasets.load_dataset('TIGER-Lab/MMLU-Pro', split='test').to_json('test.jsonl'), and "
            "validation.jsonl likewise")
PRO_FILES = {"val": ("validation.jsonl", PRO_HELP), "test": ("test.jsonl", PRO_HELP)}
HUMANEVAL_FILES = {"test": ("HumanEval.jsonl.gz", "https://raw.githubusercontent.com/openai/human-eval/"
                            "6d43fb980f9fee3c892a914eda09951f772ad10d/data/HumanEval.jsonl.gz", 44877,
                            "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef")}
MBPP_FILES = {"all": ("mbpp.jsonl", "https://raw.githubusercontent.com/google-research/google-research/"
                      "f82046ba5aabbbb427dbfd38a254d26bff08b533/mbpp/mbpp.jsonl", 563743,
                      "ccf64ceae9c5403bf50a044cb6d505bfd2a2963ee58338ba268fd65beab92a9f")}

load_gsm8k = make_loader(gsm8k, GSM8K_FILES)
load_math = make_loader(competition, MATH_FILES, ["train"])
load_mbpp = make_loader(mbpp, MBPP_FILES)


# ---------------------------------------------------------------------------------- the mix
@dataclass(frozen=True)
class MixOptions(Options):
    gsm8k: str = ""                      # folder with the files of each task, as --source is; empty: download
    mbpp: str = ""
    mmlu: str = ""
    math: str = ""                       # MATH with its train.jsonl; empty: leave it out


MIX = {                                  # loader, options, group, splits that are trained on
    "gsm8k": (load_gsm8k, HeldOutOptions, "math", ["train"]),
    "math": (load_math, HeldOutOptions, "math", ["train"]),
    "mbpp": (load_mbpp, FileOptions, "code", ["train"]),
    "mmlu": (load_mmlu, FileOptions, "knowledge", ["dev", "val"]),
}


def load_mix(options, folder):
    """The training splits of several tasks, with the group of each in the mix; validation from each, too."""
    parts = {"train": [], "val": []}
    sources = {}
    for name, (load, options_class, group, joined) in MIX.items():
        if name == "math" and not options.math:
            print("note: the mix is without MATH; --math=DIR is a folder with its train.jsonl")
            continue
        options_of_task = options_class(source=getattr(options, name))
        splits, found = load(options_of_task, folder.parents[1] / name / "source")
        sources |= {f"{name}/{file}": sha256 for file, sha256 in found.items()}
        own = {"train": sum((splits.get(split, []) for split in joined), []), "val": splits.get("val", [])}
        if "val" in joined:                                  # validate on what is not trained on
            own = hold_out(own, len(own["train"]) // 10)
        for split in parts:
            parts[split] += [problem._replace(group=group) for problem in own[split]]
    for problems in parts.values():
        random.Random(SEED).shuffle(problems)                # so that --limit takes some of each
    return parts, sources
