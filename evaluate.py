"""
Does more compute help? Measure a model at several T (--steps), on problems that it has not seen.

    python evaluate.py --out_dir=out/demo_l2d --steps=1,2,4,8,16
    python evaluate.py --out_dir=out/l2d_gsm8k --split=test --steps=1,16 --temperature=0.7 --votes=5
    python evaluate.py --data_dir=data/mmlu --split=test --shots=2 --max_new_tokens=4     # letters, two ways
    python evaluate.py --data_dir=data/mbpp --split=test --run_code --samples=10 --temperature=0.8
    torchrun --nproc_per_node=8 evaluate.py --split=test                      # the ranks share the problems

For each T the table has a row, with two kinds of numbers.
    teacher-forced  Each token of the true answers is predicted from its true context, at temperature 1. This
                    gives token accuracy, NLL, p(true), which is the mean probability of the true token, and
                    entropy.
    written         The model writes an answer to each problem, as in sample.py, and the answer is scored. A
                    problem that does not fit the model is wrong, not left out.
Every T answers the same problems with the same noise. So two T are compared problem by problem, by an exact
McNemar test. The texts are kept in out_dir/eval as they come: a run that was stopped goes on where it was.
They are scored anew each time, so no score of an older scorer is ever shown.
"""
import os

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # before torch: idle threads wait less busily for the others

import sys
import time
from dataclasses import asdict, dataclass, fields
from functools import partial
from types import SimpleNamespace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from configurator import at_least, configure, require, run, without_effect
from decode import DecodingConfig, fit_to_trunk, predict_given
from diffusion import Tables
from model import PathConfig
from plumbing.batches import choose_batch
from plumbing.dataset import Split, load_batch, load_manifest
from plumbing.device import pick_device
from plumbing.files import write_file
from plumbing.packed import pack
from plumbing.provenance import provenance, pyplot
from plumbing.ranks import Ranks, ranks_of
from plumbing.run_folder import data_changes
from plumbing.sampling import find_group
from plumbing.tokenizer import choice_tokens
from plumbing.trace import format_trace
from plumbing.trained import find_model, load
from speculate import generate
from tasks import TASKS, allow_code, few_shot, load_problems
from tasks.answers import COSTS, answer_all, hash_of, hash_scorer
from tasks.problem import encode_problem, make_split
from tasks.report import KINDS, add_comparisons, compute_shares, format_table, plot, summarize, write_results

ROWS = 32       # texts of a teacher-forced batch. A batch draws its noise together, so this is not an option


@dataclass(frozen=True)
class Config(DecodingConfig):       # `--help` prints the comments of this class
    # how a token is predicted
    steps: str = "1,2,4,8,16"       # the T to compare
    # what to evaluate, on what
    out_dir: str = ""               # of train.py; empty: out/l2d_gsm8k, or demo if that is not there
    checkpoint: Literal["best", "last"] = "best"
    data_dir: str = ""              # empty: the data the checkpoint was trained on
    split: str = "val"              # test is for the end only
    limit: int = 0                  # evaluate the first `limit` problems only; 0: all
    group: str = ""                 # guidance group of every problem, by name; empty: none
    use_group: bool = False         # give every problem its own guidance group (the right one)
    shots: int = 0                  # worked examples before each problem; the paper has some (deviation 11)
    votes: int = 1                  # answers sampled per problem; the most frequent one counts
    samples: int = 1                # answers sampled per problem; each counts: pass@1 to pass@samples
    run_code: bool = False          # run the code that the model writes, where scoring needs it, in a sandbox
    batch_size: int = 0             # texts written side by side; 0: 64, or as many as fit on a GPU
    exact_match: bool = True        # write answers and score them; False: teacher-forced numbers only
    # what to show
    mistakes: int = 3               # wrong answers to print
    show_change: bool = False       # trace an answer that is wrong at the first T and right at the last
    plot: bool = False              # draw the share right against path calls, to out_dir/eval
    # machine
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of weights; auto: float32 on a CPU
    hints: ClassVar = dict.fromkeys(vars(PathConfig()), "it was chosen in training") | {
        "T": "T is --steps",
        "sigma": "sigma was chosen in training (train.py --sigma=8) and is kept in the checkpoint",
        "label": "it is now called --group",
        "use_label": "it is now called --use_group",
    }

    def __post_init__(self):
        at_least(self, limit=0, shots=0, mistakes=0, votes=1, samples=1, batch_size=0)
        k = max(self.votes, self.samples)
        n_steps = len(list_decodings(self))                              # refuses what a sampler refuses
        require(min(self.votes, self.samples) == 1,
                f"votes={self.votes} and samples={self.samples} count answers in two ways; choose one")
        require(k == 1 or self.temperature > 0,
                f"votes={self.votes}, samples={self.samples}: at temperature=0 all answers to a problem are "
                "the same; add one such as --temperature=0.7")
        require(not (self.use_group and self.group),
                f"--use_group gives each problem its own group, --group={self.group} one to all; choose one")
        require(self.guidance == 1 or self.use_group or self.group,
                f"guidance={self.guidance} needs --group=NAME or --use_group")
        require(self.exact_match or not (self.plot or self.show_change),
                "--plot and --show_change need answers; leave out --exact_match=False")
        without_effect(self, "answers", self.exact_match, "votes", "samples", "run_code")
        require(not self.show_change or k == 1 and n_steps > 1,
                f"--show_change compares one answer at two T, as with --steps=1,16; there are "
                f"steps={self.steps}, {k} answers each")


def list_decodings(config):
    """Return a DecodingConfig for each T in config.steps. UserError where there cannot be one."""
    words = [word.strip() for word in config.steps.split(",")]
    require(all(word.isdecimal() and len(word) < 10 for word in words),
            f"steps={config.steps!r}, but it must be numbers and commas, such as 1,2,4,8,16")
    shared = {f.name: getattr(config, f.name) for f in fields(DecodingConfig)}
    return [DecodingConfig(**shared | {"steps": steps}) for steps in dict.fromkeys(map(int, words))]


# ---------------------------------------------------------------------------------------------- set up
@dataclass
class Exam:
    """A model and the n problems that it is asked."""
    config: Config
    ranks: Ranks
    model: torch.nn.Module
    encoding: object
    decodings: list                 # a DecodingConfig for each T
    problems: list                  # with the worked examples before each, if there are any
    prompts: list                   # their tokens
    data: Split                     # the tokens of prompts and true answers
    groups: list                    # the guidance group of each problem, a number
    n_all: int                      # problems of the split, of which these are the first
    depends: dict                   # all that a text depends on, beside T and the problem's number
    batch_size: int                 # texts written side by side; halved where memory runs out

    def __post_init__(self):
        self.n = len(self.problems)
        self.device = self.model.trunk.wte.weight.device
        self.block_size = self.model.trunk.config.block_size
        self.subjects = [problem.subject or problem.task for problem in self.problems]
        self.tables = Tables(self.model) if self.model.path is not None else None

    def halve(self, n):
        """Go on with half as many texts side by side, after n were too many for the memory."""
        self.batch_size = n // 2
        torch.cuda.empty_cache()                                         # does nothing without a GPU
        print(f"note: out of memory with {n} texts side by side: going on with {self.batch_size}", flush=True)

    def sum(self, tensor):
        """Return the sum of a tensor over all ranks, on the CPU."""
        return self.ranks.sum(tensor.to(self.ranks.device)).cpu() if self.ranks.world > 1 else tensor


def set_up(config, ranks, model, encoding, checkpoint):
    """Return the Exam that the options ask for. UserError where model, data and options do not fit."""
    data_dir = config.data_dir or checkpoint["config"]["data_dir"]
    manifest = load_manifest(data_dir)
    check_data(config, data_dir, manifest, checkpoint)
    problems = load_problems(data_dir, config.split)
    if config.shots:
        require(manifest["shots"] in manifest["counts"],
                f"shots={config.shots}, but {data_dir} has no worked examples; leave it out")
        pool = load_problems(data_dir, manifest["shots"])
        problems = [problem._replace(prompt=few_shot(problem, pool, config.shots)) for problem in problems]
    groups = find_groups(config, model, checkpoint, manifest, problems)
    decodings = [fit_to_trunk(decoding, model) for decoding in list_decodings(config)]
    depends = list_dependencies(config, model, checkpoint, decodings[0], problems, groups)

    asked = problems[:config.limit or None]
    if config.exact_match:
        allow_code(asked, config.run_code)
    examples = [encode_problem(encoding, problem) for problem in asked]
    data = make_split(examples, [0] * len(asked), encoding.n_vocab)      # the groups are in Exam.groups
    prompts = [prompt for prompt, _ in examples]
    most_steps = max(decodings, key=lambda decoding: decoding.steps)
    batch_size = config.batch_size or choose_batch(model, most_steps, max(map(len, prompts)), ranks.say)
    return Exam(config, ranks, pack(model), encoding, decodings, asked, prompts, data, groups[:len(asked)],
                len(problems), depends, batch_size)


def check_data(config, data_dir, manifest, checkpoint):
    """Raise UserError where the data does not suit the checkpoint, or is not what it was trained on."""
    theirs = manifest["tokenizer"]
    ours = checkpoint["tokenizer"]
    require(theirs["fingerprint"] == ours["fingerprint"],
            f"{data_dir} was made with tokenizer {theirs['name']}, the checkpoint with {ours['name']}; make "
            f"it with --tokenizer={ours['name']}, or choose the data it was trained on")
    differ = data_changes(checkpoint, manifest)
    require(config.data_dir or not differ, f"{data_dir} is no longer the data that {config.out_dir} was "
            f"trained on: {'; '.join(differ)}; its {config.split} may hold training problems. Make it as it "
            f"was, or name it: --data_dir={data_dir}")


def find_groups(config, model, checkpoint, manifest, problems):
    """Return the number of each problem's guidance group: its own, or the one that all get.

    Where the data has other groups than the model, a problem's own group is its task's group in the mix.
    """
    if not config.use_group:
        most = max(decoding.steps for decoding in list_decodings(config))
        asked = SimpleNamespace(out_dir=config.out_dir, group=config.group, guidance=1.0, steps=most)
        return [find_group(asked, model, checkpoint)] * len(problems)
    names = checkpoint["data"]["group_names"]
    require(model.path is not None, f"--use_group, but {config.out_dir} holds a trunk without a path, which "
            "knows no groups; leave it out")
    wanted = [problem.group for problem in problems]
    if manifest["group_names"] != names:
        wanted = [TASKS[problem.task].mix_group or problem.group for problem in problems]
    strange = sorted(set(wanted) - set(names))
    require(not strange, f"--use_group needs the groups {strange}, but those of {config.out_dir} are: "
            f"{', '.join(names)}; leave it out")
    return [names.index(name) for name in wanted]


def list_dependencies(config, model, checkpoint, decoding, problems, groups):
    """Return all that a written text depends on, beside T and the problem's number, as a dict for JSON.

    Texts are kept under a hash of it. What a text does not depend on, such as --limit, must not be in it, or
    the text would be written twice. exact_match is in it so that results without answers have a file of their
    own. problems, groups: those of the whole split.
    """
    weight = model.trunk.wte.weight
    depends = asdict(decoding)
    del depends["steps"]
    # In float32 on a CPU a text does not depend on what is written beside it. Elsewhere the shape of a batch
    # changes how products round.
    exact = weight.device.type == "cpu" and weight.dtype == torch.float32
    if exact:
        del depends["graphs"]
    return depends | {
        "votes": config.votes, "samples": config.samples, "exact_match": config.exact_match,
        "weights_sha256": checkpoint["sha256"],
        "problems_sha256": hash_of([problem._replace(place="") for problem in problems]),
        "groups_sha256": hash_of(groups), "device": weight.device.type, "dtype": str(weight.dtype),
        "batch_size": 0 if exact else config.batch_size}


# ---------------------------------------------------------------------------------- teacher-forced numbers
def iterate_batches(exam, ids, lengths):
    """Yield the batches of this rank, of up to ROWS problems of similar length: (ids, group, generator).

    ids: which problems. lengths: their tokens. group: (B,) guidance groups. generator: of the batch's noise.
    """
    order = sorted(ids, key=lambda i: lengths[i])
    for start in range(exam.ranks.rank * ROWS, len(order), exam.ranks.world * ROWS):
        batch = order[start:start + ROWS]
        group = torch.tensor([exam.groups[i] for i in batch], device=exam.device)
        seed = (exam.config.seed * 1_000_003 + start) % 2 ** 63
        yield batch, group, torch.Generator(exam.device).manual_seed(seed)


def judge(logits, y):
    """Return whether y is the most probable token, -log p(y), p(y) and the entropy: (4, N), on the CPU."""
    found = []
    for some, target in zip(logits.split(256), y.split(256)):            # few at once, for memory
        log_p = some.log_softmax(-1)                                     # (n, V_size)
        log_p_y = log_p.gather(1, target[:, None])[:, 0]
        entropy = torch.special.entr(log_p.exp()).sum(-1)
        found.append(torch.stack([(some.argmax(-1) == target).float(), -log_p_y, log_p_y.exp(), entropy]))
    return torch.cat(found, 1).cpu()


def find_kinds(encoding):
    """Return two bool tensors (V_size,), which tell KINDS apart: tokens that end with "=", and numbers."""
    texts = [encoding.decode([i]) for i in range(encoding.n_vocab)]
    ends_with_equals = torch.tensor([text.endswith("=") for text in texts])
    is_number = torch.tensor([text.strip().isdecimal() for text in texts])
    return ends_with_equals, is_number


def measure_true_answers(exam, decoding, ends_with_equals, is_number):
    """Return the means of what judge says over the targets of problems that fit, and by kind of target."""
    sums = torch.zeros(6, len(KINDS), dtype=torch.float64)               # judge's 4, path calls, targets
    lengths = np.diff(exam.data.offsets)
    fits = [i for i in range(exam.n) if lengths[i] - 1 <= exam.block_size]
    require(fits, f"none of {exam.n} problems fits the model's {exam.block_size} positions with its true "
            "answer; there is nothing to measure")
    for ids, group, generator in iterate_batches(exam, fits, lengths):
        idx, at, y, _ = load_batch(exam.data, ids, exam.device)
        logits, nfe = predict_given(exam.model, idx, at, decoding, generator, group)
        number = torch.where(ends_with_equals[idx[at].cpu()], 0, 1)
        kind = torch.where(is_number[y.cpu()], number, 2)
        each = torch.cat([judge(logits, y), nfe.cpu()[None], torch.ones(1, len(y))])
        sums.index_add_(1, kind, each.double())
    sums = exam.sum(sums)
    right, nll, p_true, entropy, _, n = sums.sum(1).tolist()
    by_kind = {}
    for name, (right_of_kind, _, _, _, nfe, n_of_kind) in zip(KINDS, sums.T.tolist()):
        by_kind[name] = {"n": int(n_of_kind), "accuracy": right_of_kind / max(n_of_kind, 1),
                         "nfe": nfe / max(n_of_kind, 1)}
    return {"token_accuracy": right / n, "nll": nll / n, "p_true": p_true / n, "entropy": entropy / n,
            "teacher_forced_n": len(fits), "by_kind": by_kind}


def measure_choices(exam, decoding):
    """Compare the probabilities of the choices (" A", " B", ...) as next token, where problems have choices.

    Returns a part of a row: the share of problems whose right choice is the likeliest, and the mean -log p of
    the right choice, where p is a distribution over the choices alone. A problem that does not fit is wrong,
    and left out of that mean.
    """
    asked = [i for i, problem in enumerate(exam.problems) if problem.choices]
    tokens = {choices: choice_tokens(exam.encoding, choices)             # (ids before, the id of each choice)
              for choices in {exam.problems[i].choices for i in asked}}
    prompts = {i: exam.prompts[i] + tokens[exam.problems[i].choices][0] for i in asked}
    lengths = {i: len(prompt) for i, prompt in prompts.items()}
    fits = [i for i in asked if lengths[i] <= exam.block_size]
    require(fits, f"no problem with choices fits the model's {exam.block_size} positions")
    found = torch.zeros(2, exam.n, dtype=torch.float64)                  # right, -log p
    for ids, group, generator in iterate_batches(exam, fits, lengths):
        idx = pad_sequence([torch.tensor(prompts[i]) for i in ids], batch_first=True).to(exam.device)
        last = torch.tensor([lengths[i] - 1 for i in ids], device=exam.device)
        at = torch.arange(len(ids), device=exam.device), last            # the last position of each prompt
        logits, _ = predict_given(exam.model, idx, at, decoding, generator, group)
        for i, row in zip(ids, logits.float().cpu()):
            problem = exam.problems[i]
            log_p = row[tokens[problem.choices][1]].log_softmax(0)
            right = problem.choices.index(problem.answer)
            found[:, i] = torch.tensor([float(log_p.argmax() == right), -log_p[right].item()])
    right, nll = exam.sum(found)[:, asked]
    shares = compute_shares("accuracy", right.int().tolist(), 1, [exam.subjects[i] for i in asked])
    return shares | {"nll": nll.sum().item() / len(fits)}


# ------------------------------------------------------------------------------------------ written answers
def write_texts(exam, decoding, ids):
    """Write the answers to some problems. Returns a record of tasks/answers.py for each, without its key."""
    config = exam.config
    began = time.time()
    k = max(config.votes, config.samples)
    written = {i: [] for i in ids}                                       # i: the Continuations
    wanted = [(i, i * k + j) for i in ids if len(exam.prompts[i]) <= exam.block_size for j in range(k)]
    while wanted:
        batch, text_ids = zip(*wanted[:exam.batch_size])                 # each sample has its own noise
        prompts = [exam.prompts[i] for i in batch]
        groups = [exam.groups[i] for i in batch]
        try:
            outputs = generate(exam.model, prompts, exam.encoding.eot_token, decoding, groups, text_ids,
                               tables=exam.tables)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            outputs = []
        if not outputs:                                                  # the error no longer holds memory
            exam.halve(len(batch))
        wanted = wanted[len(outputs):]
        for i, output in zip(batch, outputs):
            written[i].append(output)
    seconds = (time.time() - began) / len(ids)
    records = []
    for i, outputs in written.items():
        record = {"id": i, "texts": [exam.encoding.decode(output.tokens) for output in outputs],
                  "ended": bool(outputs) and all(output.ended for output in outputs), "seconds": seconds}
        records.append(record | {name: sum(getattr(output, name) for output in outputs) for name in COSTS})
    return records


# ---------------------------------------------------------------------------------------- table and files
def evaluate(exam):
    """Measure at each T, print the table, and keep it in out_dir/eval."""
    config = exam.config
    key = hash_of(exam.depends)[:8]
    folder = os.path.join(config.out_dir, "eval")
    os.makedirs(folder, exist_ok=True)
    note_guidance(exam)
    if config.plot:
        pyplot("--plot")                                                 # fail now, not after the work
    kinds = find_kinds(exam.encoding)
    rows = []
    answers = {}                                                         # T: the scored answers
    for decoding in exam.decodings:
        steps = decoding.steps
        row = {"steps": steps, "solver": decoding.solver, "n": exam.n}
        row |= measure_true_answers(exam, decoding, *kinds)
        if any(problem.choices for problem in exam.problems):
            row["choices"] = measure_choices(exam, decoding)
        if config.exact_match:
            name = f"{config.split}_{key}_steps{steps}.jsonl"
            write = partial(write_texts, exam, decoding)
            answers[steps] = answer_all(exam, write, os.path.join(folder, name), steps)
            row |= summarize(answers[steps], config.samples, exam.subjects) | {"answers": name}
        rows.append(row)
    add_comparisons(rows)
    if exam.ranks.main:
        part = f"_first{exam.n}" if exam.n < exam.n_all else ""          # never in place of all problems
        print_table(exam, rows)
        print_mistakes(exam, exam.decodings[-1].steps, answers)
        keep(exam, rows, os.path.join(folder, f"{config.split}{part}_{key}"))
        if config.show_change:
            print_change(exam, answers)


def note_guidance(exam):
    """Say at which T guidance does nothing."""
    w = exam.config.guidance
    idle = [str(decoding.steps) for decoding in exam.decodings if w != 1 and decoding.steps <= 2]
    if idle:
        exam.ranks.say(f"note: guidance={w} changes nothing at steps={','.join(idle)}: it moves x_t for a "
                       "later path call, and there is none")


def print_table(exam, rows):
    config = exam.config
    print(f"{config.out_dir} on {exam.n} problems of {config.split}, solver {config.solver}, "
          f"seed {config.seed}\n{format_table(rows)}")
    if n := rows[0].get("too_long"):
        print(f"{n} problems do not fit the model's {exam.block_size} positions: they count as wrong")
    if (n := rows[0]["teacher_forced_n"]) < exam.n:
        print(f"token acc. to entropy are of the {n} problems that fit with their true answers")


def print_mistakes(exam, steps, answers):
    """Print the first wrong answers at this T. answers: {T: the scored answers}."""
    wrong = [answer for answer in answers.get(steps, []) if not answer["strict"]]
    for answer in wrong[:exam.config.mistakes]:
        problem = exam.problems[answer["id"]]
        print(f"\nwrong, steps={steps}: {problem.prompt}\n  gold:   {problem.answer!r}\n"
              f"  output: {answer['output']!r}")


def keep(exam, rows, path):
    """Write the results to path.json and the figure, if one is wanted, to path.png."""
    made = {name: exam.depends[name] for name in ("weights_sha256", "problems_sha256")}
    made |= provenance(exam.device)
    results = {"config": asdict(exam.config), "n": exam.n,
               "depends": exam.depends | {"n": exam.n, "scorer_sha256": hash_scorer()},
               "rows": [row | made for row in rows]} | made
    dropped = write_results(f"{path}.json", results)
    if dropped:
        print(f"\nnote: {path}.json had rows of steps={','.join(map(str, dropped))} that another scorer, or "
              "something else, had made; they are left out. Their texts are kept: ask for them again")
    print(f"\nwritten to {path}.json")
    if exam.config.plot:
        write_file(f"{path}.png", lambda file: plot(file, results))
        print(f"figure: {path}.png")


def print_change(exam, answers):
    """Print how the last T came to a right answer where the first is wrong, for the shortest such answer.

    answers: {T: the scored answers}.
    """
    few = exam.decodings[0].steps
    many = exam.decodings[-1].steps
    changed = [b for a, b in zip(answers[few], answers[many]) if b["strict"] > a["strict"]]
    if not changed:
        print(f"\nno problem is wrong at steps={few} and right at steps={many}: none to trace")
        return
    eot = exam.encoding.eot_token
    i = min(changed, key=lambda answer: answer["predicted"])["id"]
    decoding = exam.decodings[-1]
    (output,) = generate(exam.model, [exam.prompts[i]], eot, decoding, [exam.groups[i]], [i], trace=True)
    print(f"\n{len(changed)} problems are wrong at steps={few} and right at steps={many}; the shortest:\n"
          f"{exam.problems[i].prompt}\n  steps={few}: {answers[few][i]['output']!r}\n"
          f"  steps={many}: {answers[many][i]['output']!r}\n"
          f"each token at steps={many}; a star marks one that the steps changed")
    print(format_trace(output, exam.encoding, sys.stdout.isatty()))


# ------------------------------------------------------------------------------------------------ main
def main(argv=None):
    config = configure(Config, argv, __doc__)
    with ranks_of(pick_device(config.device), "lower batch_size, or use --dtype=bfloat16") as ranks:
        out_dir = find_model(config.out_dir, ranks.say)
        with ranks.main_first():                                         # it may download a tokenizer
            model, encoding, checkpoint = load(out_dir, config.checkpoint, config.device, config.dtype)
        config = configure(Config, argv, __doc__, defaults=checkpoint["sampler"] | {"out_dir": out_dir})
        chosen = [f"--{name}={value}" for name, value in checkpoint["sampler"].items()
                  if getattr(config, name) == value]
        if chosen:
            ranks.say(f"note: {' '.join(chosen)}, because this path was trained with --unroll")
        evaluate(set_up(config, ranks, model, encoding, checkpoint))


if __name__ == "__main__":
    run(main)
