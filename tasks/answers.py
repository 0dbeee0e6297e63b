"""
The answers that a model has written: kept in a file as they come, shared among ranks, and scored when read.

A file holds one JSON record per line, each for one problem. Its key says what its texts depend on, so a file
is not believed by its name. Scores are not kept, so they are always those of the present scorer. Only
where scoring runs the model's code, which takes long, are they kept, with a hash of the scorer.

    id          the number of the problem
    key         a hash of all that the texts depend on: weights, problems, T, ...
    texts       its k samples; none where the prompt does not fit the model
    ended       whether all of them end with the end of text
    seconds, predicted, nfe, computed       what the samples cost, added up
    scorer, scores                          for code only
"""
import hashlib
import json
import math
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from configurator import require
from plumbing.files import append_records, read_records
from tasks import score, vote

COSTS = ("predicted", "nfe", "computed")                                 # attributes of a Continuation


def hash_of(value):
    """Return the sha256 of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_scorer():
    """Return a hash of the source files in this folder, which say what is right."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


# --------------------------------------------------------------------------------------------- reading
def read_answers(path, key, k):
    """Return {problem: record} of a file's records with this key and k texts. Damaged ones are left out.

    If a problem has several records, the last one counts.
    """
    return {record["id"]: record for record in read_records(path)
            if record.get("key") == key and is_sound(record, k)}


def is_sound(record, k):
    texts = record.get("texts")
    numbers = [record.get(name) for name in ("id", "ended", "seconds", *COSTS)]
    return (isinstance(texts, list) and len(texts) in (0, k) and all(isinstance(text, str) for text in texts)
            and all(isinstance(number, (int, float)) and 0 <= number < math.inf for number in numbers)
            and record["ended"] <= 1)


# --------------------------------------------------------------------------------------------- scoring
def score_texts(problem, texts, voted, run_code):
    """Return {"output": a text to show, "strict": n, "flexible": n, "well_formed": n} of a problem's samples.

    voted: their majority counts as one answer; otherwise each of them counts. A problem without texts, whose
    prompt does not fit the model, is wrong.
    """
    output = ""
    scores = []
    if texts and voted:
        output, *scores = vote(problem, texts, run_code)
    elif texts:
        output = texts[0]
        scores = [score(problem, text, run_code) for text in texts]
    return {"output": output, "strict": sum(s.right for s in scores),
            "flexible": sum(s.flexible for s in scores), "well_formed": sum(s.well_formed for s in scores)}


def needs_run(problem, record, scorer):
    """Return whether code must be run to score a record: it has code, and no score by this scorer."""
    return bool(problem.test and record["texts"]) and record.get("scorer") != scorer


def score_record(problem, record, voted):
    """Return the record with its scores, and with fits: whether there was room for an answer."""
    if problem.test and record["texts"]:
        scores = record["scores"]
    else:
        scores = score_texts(problem, record["texts"], voted, run_code=False)
    return record | scores | {"fits": bool(record["texts"])}


# ------------------------------------------------------------------------------------------- all answers
def answer_all(exam, write, path, steps):
    """Return the scored answers to all problems of an Exam (evaluate.py), records in order.

    write(ids) writes the answers to some problems, and returns their records without key. Texts that are in
    path are taken from there, and the others are added to it as they come. A rank has every world-th problem,
    in the order of their lengths, whatever is there already. steps: T.
    """
    config = exam.config
    ranks = exam.ranks
    voted = config.samples == 1
    k = max(config.votes, config.samples)
    key = hash_of(exam.depends | {"steps": steps})
    own = sorted(range(exam.n), key=lambda i: len(exam.prompts[i]))[ranks.rank::ranks.world]

    done = read_answers(path, key, k)
    todo = [i for i in own if i not in done]
    at_once = max(1, exam.batch_size // k)
    with progress_bar(ranks, f"steps={steps}", len(own), len(own) - len(todo)) as advance:
        for start in range(0, len(todo), at_once):
            records = write(todo[start:start + at_once])
            append_records(path, [record | {"key": key} for record in records])
            advance(len(records))

    done = read_answers(path, key, k)
    scorer = hash_scorer()
    todo = [i for i in own if i in done and needs_run(exam.problems[i], done[i], scorer)]
    with progress_bar(ranks, "running code", len(todo)) as advance:
        for i in todo:
            scores = score_texts(exam.problems[i], done[i]["texts"], voted, config.run_code)
            append_records(path, [done[i] | {"scorer": scorer, "scores": scores}])
            advance(1)

    n_shared_out = exam.sum(torch.tensor(len(own))).item()               # here each rank waits for the others
    assert n_shared_out == exam.n, f"the ranks have {n_shared_out} problems together, of {exam.n}"
    done = read_answers(path, key, k)
    missing = [i for i, problem in enumerate(exam.problems)
               if i not in done or needs_run(problem, done[i], scorer)]
    require(not missing, f"{len(missing)} of {exam.n} answers are not in {path}; it must be one file for all "
            "ranks, that only evaluate.py writes. Run it again: what is there is kept")
    return [score_record(problem, done[i], voted) for i, problem in enumerate(exam.problems)]


@contextmanager
def progress_bar(ranks, title, total, done=0):
    """Show how many problems are done: a bar on a terminal, else a line now and then. Gives advance(n)."""
    bar = tqdm(total=total, initial=done, unit="problem", desc=title,
               disable=not (ranks.main and total > done and sys.stderr.isatty()))
    count = done
    calls = 0

    def advance(n):
        nonlocal count, calls
        count += n
        calls += 1
        bar.update(n)
        if bar.disable and calls % 4 == 0:
            ranks.say(f"{title}: {count}/{total} problems")
    with bar:
        yield advance
