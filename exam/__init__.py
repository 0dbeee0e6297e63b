"""
A model sits an exam: the answers that it writes, and what it makes of the true answers.

The problems are shared out among the ranks. Written answers are kept in a file as they come. The rest is
teacher-forced: every target is given its true context, no text is generated, and nothing is kept.
"""
import math
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from batches import batch_of
from configurator import UserError, require
from decode import generate
from diffusion import teacher_forced
from files import append_records, read_records
from machine import Ranks
from prepare_data import Split
from tasks import score, vote
from tokens import choice_tokens

ROWS = 32               # of a teacher-forced batch. Its noise depends on it, so it is no option
COSTS = ("predicted", "nfe", "computed")        # of an answer, summed over its samples
KINDS = ("result", "number", "rest")    # of a target: a number that follows an "=", another number, all else


@dataclass
class Exam:
    """A model and the n problems that it is asked."""
    config: object                  # of evaluate.py
    ranks: Ranks
    model: torch.nn.Module
    encoding: object
    data: Split                     # with the worked examples before each problem, if there are any
    n: int
    labels: list                    # guidance label of each problem, a number

    def __post_init__(self):
        self.problems, self.device = self.data.problems[:self.n], self.model.trunk.wte.weight.device
        self.lengths, self.block_size = np.diff(self.data.offsets), self.model.trunk.config.block_size
        spans = [slice(*span) for span in zip(self.data.offsets, self.data.offsets[1:self.n + 1])]
        self.prompts = [self.data.tokens[span][~self.data.mask[span]].tolist() for span in spans]

    def sum(self, tensor):
        """The sum of a tensor over all ranks."""
        return self.ranks.sum(tensor.to(self.ranks.device)).cpu() if self.ranks.world > 1 else tensor


# ------------------------------------------------------------------------------------ written answers
def read_answers(path, k=math.inf):
    """{problem: its scored answer} of a file that `answers` writes; k samples count. Damaged ones are out."""
    most = dict.fromkeys(("strict", "flexible", "well_formed"), k) | {"fits": 1, "ended": 1} | \
        dict.fromkeys(("id", "seconds", *COSTS), math.inf)

    def sound(record):
        return isinstance(record.get("output"), str) and all(
            isinstance(record.get(name), (int, float)) and 0 <= record[name] <= high
            for name, high in most.items())
    return {record["id"]: record for record in read_records(path) if sound(record)}


def answer(exam, decoding, ids):
    """The scored answers of some problems, as dicts.

    strict, flexible and well_formed count samples; with votes = k the majority of k samples counts as one.
    Tokens, path calls and seconds are summed over samples. A problem that does not fit is wrong.
    """
    config, began, drawn = exam.config, time.time(), {i: [] for i in ids}
    k = max(config.votes, config.samples)
    fits = [i for i in ids if len(exam.prompts[i]) <= exam.block_size]
    rows = [(i, i * k + j) for i in fits for j in range(k)]              # each sample has its own noise
    for start in range(0, len(rows), config.batch_size):
        ids_, noise = zip(*rows[start:start + config.batch_size])
        outputs = generate(exam.model, [exam.prompts[i] for i in ids_], exam.encoding.eot_token, decoding,
                           [exam.labels[i] for i in ids_], noise)
        for i, output in zip(ids_, outputs):
            drawn[i].append(output)
    seconds, records = (time.time() - began) / len(ids), []
    for i, outputs in drawn.items():
        texts = [exam.encoding.decode(o.tokens) for o in outputs]
        if config.samples > 1 or not texts:
            text, scores = "".join(texts[:1]), [score(exam.problems[i], t, config.run_code) for t in texts]
        else:
            text, *scores = vote(exam.problems[i], texts, config.run_code)
        record = {"id": i, "output": text, "fits": bool(outputs), "seconds": seconds,
                  "ended": bool(outputs) and all(o.ended for o in outputs)}
        record |= {name: sum(getattr(o, name) for o in outputs) for name in COSTS}
        record |= {"strict": sum(s.right for s in scores), "flexible": sum(s.flexible for s in scores),
                   "well_formed": sum(s.well_formed for s in scores)}
        records.append(record)
    return records


def answers(exam, decoding, path):
    """The scored answers of all n problems, dicts in order.

    Those in path are kept; the others are added to it as they come. A rank has every world-th problem, in the
    order of their lengths, whatever is there already. Raises UserError where answers are missing in the end.
    """
    config, ranks = exam.config, exam.ranks
    done = read_answers(path, config.samples)
    own = sorted(range(exam.n), key=lambda i: len(exam.prompts[i]))[ranks.rank::ranks.world]
    todo = [i for i in own if i not in done]
    n_done, size = len(own) - len(todo), max(1, config.batch_size // max(config.votes, config.samples))
    progress = tqdm(total=len(own), initial=n_done, unit="problem", desc=f"steps={decoding.steps}",
                    disable=not (ranks.main and sys.stderr.isatty()))
    for start in range(0, len(todo), size):
        ids = todo[start:start + size]
        append_records(path, answer(exam, decoding, ids))
        progress.update(len(ids))
        if progress.disable and (start // size) % 4 == 3:
            ranks.say(f"steps={decoding.steps}: {n_done + start + len(ids)}/{len(own)} problems")
    progress.close()
    n_shared_out = exam.sum(torch.tensor(len(own))).item()               # here each rank waits for the others
    assert n_shared_out == exam.n, f"the ranks have {n_shared_out} problems together, of {exam.n}"
    done = read_answers(path, config.samples)                            # of all ranks
    if missing := exam.n - sum(i in done for i in range(exam.n)):
        raise UserError(f"{missing} of {exam.n} answers are not in {path}; it must be one file for "
                        "all ranks, that only evaluate.py writes. Run it again: what is there is kept")
    return [done[i] for i in range(exam.n)]


# ------------------------------------------------------------------------------------- teacher-forced
def batches(exam, ids, lengths):
    """(ids, their labels, the generator of their noise) of this rank's batches of ROWS, by length."""
    order = sorted(ids, key=lambda i: lengths[i])
    for start in range(exam.ranks.rank * ROWS, len(order), exam.ranks.world * ROWS):
        ids, seed = order[start:start + ROWS], (exam.config.seed * 1_000_003 + start) % 2 ** 63
        label = torch.tensor([exam.labels[i] for i in ids], device=exam.device)
        yield ids, label, torch.Generator(exam.device).manual_seed(seed)


def equals_and_digits(encoding):
    """Which tokens end with an "=", and which are numbers, (V_size,) bool each: they tell the KINDS."""
    texts = [encoding.decode([i]) for i in range(encoding.n_vocab)]
    return tuple(torch.tensor(z) for z in ([t.endswith("=") for t in texts],
                                           [t.strip().isdecimal() for t in texts]))


def of_true_answers(exam, decoding, equals, digits):
    """Mean token accuracy and -log p over the targets of the problems that fit; by kind, with path calls."""
    sums = torch.zeros(4, len(KINDS), dtype=torch.float64)               # targets, right, -log p, path calls
    fits = [i for i in range(exam.n) if exam.lengths[i] - 1 <= exam.block_size]
    require(fits, f"none of {exam.n} problems fits the model's {exam.block_size} positions with its true "
            "answer; there is nothing to measure")
    for ids, label, generator in batches(exam, fits, exam.lengths):
        idx, at, y, _ = batch_of(exam.data, ids, exam.device)
        logits, nfe = teacher_forced(exam.model, idx, at, decoding, generator, label)
        nll = F.cross_entropy(logits, y, reduction="none")
        each = torch.stack([z.float().cpu() for z in (torch.ones_like(y), logits.argmax(-1) == y, nll, nfe)])
        kind = torch.where(digits[y.cpu()], torch.where(equals[idx[at].cpu()], 0, 1), 2)
        sums.index_add_(1, kind, each.double())
    sums = exam.sum(sums)
    n, right, nll, _ = sums.sum(1).tolist()
    kinds = {name: {"n": int(m), "accuracy": r / max(m, 1), "nfe": calls / max(m, 1)}
             for name, m, r, calls in zip(KINDS, *sums[[0, 1, 3]].tolist())}
    return {"token_accuracy": right / n, "nll": nll / n, "teacher_forced_n": len(fits), "by_kind": kinds}


def of_choices(exam, decoding):
    """Which problems have the right choice as the likeliest next token; the mean -log p of the right choice.

    Returns [0 or 1] of the problems with choices, in order, those that do not fit being wrong; and the mean
    over those that fit, p being a distribution over the choices alone.
    """
    asked = [i for i in range(exam.n) if exam.problems[i].choices]
    tokens = {choices: choice_tokens(exam.encoding, choices) for choices in
              {exam.problems[i].choices for i in asked}}                 # (ids before, id of each choice)
    prompts = {i: exam.prompts[i] + tokens[exam.problems[i].choices][0] for i in asked}
    lengths = {i: len(prompt) for i, prompt in prompts.items()}
    found = torch.zeros(3, exam.n, dtype=torch.float64)                  # right, -log p, fits
    for ids, label, generator in batches(exam, [i for i in asked if lengths[i] <= exam.block_size], lengths):
        idx = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompts[i]) for i in ids], batch_first=True)
        at = torch.arange(len(ids)), torch.tensor([lengths[i] - 1 for i in ids])
        at = tuple(z.to(exam.device) for z in at)                        # the last position of each prompt
        logits, _ = teacher_forced(exam.model, idx.to(exam.device), at, decoding, generator, label)
        for i, row in zip(ids, logits.float().cpu()):
            choices, true = exam.problems[i].choices, exam.problems[i].answer
            log_p, right = row[tokens[choices][1]].log_softmax(0), choices.index(true)
            found[:, i] = torch.tensor([float(log_p.argmax() == right), -log_p[right].item(), 1])
    right, nll, fits = exam.sum(found)[:, asked]
    require(fits.any(), f"no problem with choices fits the model's {exam.block_size} positions")
    return right.int().tolist(), (nll.sum() / fits.sum()).item()
