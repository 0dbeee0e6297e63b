"""
Does more compute help? Right answers and teacher-forced accuracy against steps, on unseen problems.

    python evaluate.py --out_dir=out/demo_l2d --steps=1,2,4,8,16
    python evaluate.py --out_dir=out/l2d_gsm8k --split=test --steps=1,16 --solver=midpoint
    python evaluate.py --data_dir=data/mmlu --split=test --shots=2 --max_new_tokens=4     # letters, two ways
    python evaluate.py --data_dir=data/mbpp --split=test --run_code --samples=10 --temperature=0.8
    torchrun --nproc_per_node=8 evaluate.py --split=test                                  # shared out

Every number of steps answers the same problems with the same noise, so they are compared pair by pair (exact
McNemar test). Each answer is written to out_dir/eval as soon as it is there, under a hash of all that it
depends on: a run that was cut goes on where it stopped. A problem that does not fit is wrong, not dropped.
"""
import hashlib
import json
import os
import sys
from dataclasses import asdict, dataclass, fields
from types import SimpleNamespace
from typing import Literal

import torch

from checkpoint import data_changes, load
from configurator import UserError, at_least, configure, require, run, without_effect
from decode import Decoding, generate
from exam import Exam, answers, equals_and_digits, of_choices, of_true_answers, report
from files import write_file
from machine import pick_device, ranks_of
from packed import pack
from prepare_data import Split, encode_split, load_manifest, load_split
from sample import label_of
from tasks import TASKS, allow_code, few_shot


@dataclass(frozen=True)
class Config(Decoding):
    # how a token is predicted
    steps: str = "1,2,4,8,16"       # numbers of steps to compare
    # what to evaluate, on what
    out_dir: str = "out/l2d_gsm8k"  # of train.py
    checkpoint: Literal["best", "last"] = "best"
    data_dir: str = ""              # empty: the data the checkpoint was trained on
    split: str = "val"              # test is for the end only
    limit: int = 0                  # evaluate the first `limit` problems only; 0 = all
    label: str = ""                 # guidance label of every problem, by name; empty = none
    use_label: bool = False         # give every problem its own label (the right one)
    shots: int = 0                  # worked examples before each problem (deviation 11)
    votes: int = 1                  # answers sampled per problem; the most frequent one counts
    samples: int = 1                # answers sampled per problem; each counts: pass@1 to pass@samples
    run_code: bool = False          # run the code that the model writes, where scoring needs it, in a sandbox
    batch_size: int = 64            # texts written side by side; changes no answer in float32 on a CPU
    exact_match: bool = True        # write answers and score them; False leaves the teacher-forced numbers
    # what to show
    mistakes: int = 3               # wrong answers to print
    show_change: bool = False       # trace an answer, wrong at the first number of steps, right at the last
    plot: bool = False              # draw the share right against path calls, to out_dir/eval
    # machine
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of weights; auto: float32 on a CPU

    def __post_init__(self):
        at_least(self, limit=0, shots=0, mistakes=0, votes=1, samples=1, batch_size=1)
        several, n_steps = max(self.votes, self.samples), len(self.decodings())
        require(min(self.votes, self.samples) == 1,
                f"votes={self.votes} and samples={self.samples} count answers in two ways; choose one")
        require(several == 1 or self.temperature > 0,
                f"votes={self.votes}, samples={self.samples}: at temperature=0 all answers to a problem are "
                "the same; add one such as --temperature=0.7")
        require(not (self.use_label and self.label),
                f"--use_label gives each problem its own label, --label={self.label} one to all; choose one")
        require(self.guidance == 1 or self.use_label or self.label,
                f"guidance={self.guidance} needs --label=NAME or --use_label")
        require(self.exact_match or not (self.plot or self.show_change),
                "--plot and --show_change need answers; leave out --exact_match=False")
        without_effect(self, "answers", self.exact_match, "votes", "samples", "run_code")
        require(not self.show_change or several == 1 < n_steps,
                f"--show_change compares one answer at two numbers of steps, as with --steps=1,16; there are "
                f"steps={self.steps}, {several} answers each")

    def decodings(self, **changes):
        """A Decoding for each number of steps."""
        words = [word.strip() for word in self.steps.split(",")]
        require(all(word.isdecimal() and len(word) < 10 for word in words),
                f"steps={self.steps!r}, but it must be numbers and commas, such as 1,2,4,8,16")
        shared = {f.name: getattr(self, f.name) for f in fields(Decoding)} | changes
        return [Decoding(**shared | {"steps": steps}) for steps in dict.fromkeys(map(int, words))]


# ---------------------------------------------------------------------------------------------- set up
def set_up(config, ranks):
    """The Exam, a Decoding for each number of steps, and all else that an answer depends on, a dict."""
    with ranks.main_first():                                             # it may download a tokenizer
        model, encoding, checkpoint = load(config.out_dir, config.checkpoint, config.device, config.dtype)
    data_dir, name = config.data_dir or checkpoint["config"]["data_dir"], checkpoint["tokenizer"]["name"]
    manifest, data = load_manifest(data_dir), load_split(data_dir, config.split)
    require(manifest["fingerprint"] == checkpoint["tokenizer"]["fingerprint"],
            f"{data_dir} was made with tokenizer {manifest['tokenizer']}, the checkpoint with {name}; make "
            f"it with --tokenizer={name}, or choose the data it was trained on")
    differ = data_changes(checkpoint, manifest)
    require(config.data_dir or not differ, f"{data_dir} is no longer the data that {config.out_dir} was "
            f"trained on: {'; '.join(differ)}; its {config.split} may hold training problems. Make it as "
            f"it was, or name it: --data_dir={data_dir}")
    if config.shots:
        data = with_examples(config, data_dir, manifest, data, encoding)
    labels = labels_of(config, model, checkpoint, manifest, data.problems)
    n, weight = min(config.limit or len(labels), len(labels)), model.trunk.wte.weight
    allow_code(data.problems[:n] if config.exact_match else [], config.run_code)
    decodings = config.decodings(max_new_tokens=min(config.max_new_tokens, model.trunk.config.block_size))
    problems = json.dumps([problem._replace(where="") for problem in data.problems])
    same = {k: v for k, v in asdict(decodings[0]).items() if k != "steps"} | {
        "votes": config.votes, "samples": config.samples, "exact_match": config.exact_match, "labels": labels,
        "weights_sha256": checkpoint["sha256"],
        "problems_sha256": hashlib.sha256(problems.encode()).hexdigest(), "device": weight.device.type,
        "dtype": str(weight.dtype), "batch_size": config.batch_size}
    if (weight.device.type, weight.dtype) == ("cpu", torch.float32):     # elsewhere products round by shape
        same["batch_size"] = 0
    return Exam(config, ranks, pack(model), encoding, data, n, labels), decodings, same


def with_examples(config, data_dir, manifest, data, encoding):
    """The Split with config.shots worked examples before each problem."""
    require(manifest["shots"] in manifest["counts"],
            f"shots={config.shots}, but {data_dir} has no worked examples; leave it out")
    examples = load_split(data_dir, manifest["shots"]).problems
    problems = [p._replace(prompt=few_shot(p, examples, config.shots)) for p in data.problems]
    name = f"{config.split} with {config.shots} examples"
    arrays, _, _ = encode_split(encoding, name, problems, manifest["label_names"], drop_long=False)
    return Split(**arrays, problems=problems)


def labels_of(config, model, checkpoint, manifest, problems):
    """The number of each problem's guidance label; its task's group, where the data has other labels."""
    names, has_path = checkpoint["data"]["label_names"], model.path is not None
    if not config.use_label:
        asked = SimpleNamespace(out_dir=config.out_dir, label=config.label, guidance=1.0,
                                steps=max(decoding.steps for decoding in config.decodings()))
        return [label_of(asked, model, checkpoint)] * len(problems)
    wanted = [p.label if manifest["label_names"] == names else TASKS[p.task].group or p.label
              for p in problems]
    if strange := set(wanted) - set(names if has_path else ()):
        known = ", ".join(names) if has_path else "none, for want of a path"
        raise UserError(f"--use_label needs the labels {sorted(strange)}, but those of "
                        f"{config.out_dir} are: {known}; leave it out")
    return [names.index(name) for name in wanted]


# ------------------------------------------------------------------------------------------------ show
def show_change(exam, decoding, records):
    """Of the problems that the first number of steps gets wrong and the last right, print the one with the
    shortest answer, both answers, and how each token of the last came about. records: {steps: the answers}.
    """
    (few, first), *_, (many, last) = records.items()
    changed = [b for a, b in zip(first, last) if b["strict"] > a["strict"]]
    if not changed:
        print(f"\nno problem is wrong at steps={few} and right at steps={many}: none to trace")
        return
    i, eot = min(changed, key=lambda record: record["predicted"])["id"], exam.encoding.eot_token
    (output,) = generate(exam.model, [exam.prompts[i]], eot, decoding, [exam.labels[i]], [i], trace=True)
    print(f"\n{len(changed)} problems are wrong at steps={few} and right at steps={many}; the shortest:\n"
          f"{exam.problems[i].prompt}\n  steps={few}: {first[i]['output']!r}\n"
          f"  steps={many}: {last[i]['output']!r}\n"
          f"each token at steps={many}; a star marks one that the steps changed")
    tokens = output.tokens + [eot] * output.ended
    print(report.format_trace(output, tokens, exam.encoding, sys.stdout.isatty()))


def show(exam, decoding, results, records, path):
    """Print the table, mistakes and a change; write results and figure to path.json and path.png."""
    config, rows = exam.config, results["rows"]
    print(f"{config.out_dir} on {exam.n} problems of {config.split}, solver {config.solver}, "
          f"seed {config.seed}\n{report.table(rows)}")
    if n := rows[0].get("too_long"):
        print(f"{n} problems do not fit the model's {exam.block_size} positions: they count as wrong")
    if (n := rows[0]["teacher_forced_n"]) < exam.n:
        print(f"token acc. and NLL are of the {n} problems that fit with their true answers")
    for record in [r for r in records.get(decoding.steps, []) if not r["strict"]][:config.mistakes]:
        problem = exam.problems[record["id"]]
        print(f"\nwrong, steps={decoding.steps}: {problem.prompt}\n  gold:   {problem.answer!r}\n"
              f"  output: {record['output']!r}")
    report.write_results(f"{path}.json", results)
    print(f"\nwritten to {path}.json")
    if config.plot:
        write_file(f"{path}.png", lambda file: report.plot(file, results))
        print(f"figure: {path}.png")
    if config.show_change:
        show_change(exam, decoding, records)


# ------------------------------------------------------------------------------------------------ main
def evaluate(config, ranks):
    exam, decodings, same = set_up(config, ranks)
    if config.plot:
        report.pyplot("--plot")                                          # fail now, not after the work
    folder = os.path.join(config.out_dir, "eval")
    part = f"_first{exam.n}" if exam.n < len(exam.data.problems) else ""     # never in place of all problems
    key = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:8]
    os.makedirs(folder, exist_ok=True)
    small = [str(d.steps) for d in decodings if d.guidance != 1 and d.steps <= 2]
    if small:
        ranks.say(f"note: guidance={config.guidance} changes nothing at steps={','.join(small)}: it moves "
                  "x_t for a later path call, and there is none")
    rows, records, right, likeliest, kinds = [], {}, {}, {}, equals_and_digits(exam.encoding)
    subjects = [problem.subject or problem.task for problem in exam.problems]
    for decoding in decodings:
        steps = decoding.steps
        row = {"steps": steps, "solver": decoding.solver, "n": exam.n}
        row |= of_true_answers(exam, decoding, *kinds)
        if asked := [i for i, problem in enumerate(exam.problems) if problem.choices]:
            likeliest[steps], nll = of_choices(exam, decoding)
            row["choices"] = report.shares("accuracy", likeliest[steps], 1, [subjects[i] for i in asked]) | {
                **report.compare(likeliest, steps), "nll": nll, "right": "".join(map(str, likeliest[steps]))}
        if config.exact_match:
            name = f"{config.split}_{key}_steps{steps}.jsonl"
            records[steps] = answers(exam, decoding, os.path.join(folder, name))
            right[steps] = [record["strict"] for record in records[steps]]
            row |= report.summary(records[steps], config.samples, subjects)
            row |= report.compare(right, steps) | {"answers": name}
        rows.append(row)
    if ranks.main:
        made = {k: v for k, v in same.items() if k.endswith("sha256")} | report.provenance(exam.device)
        results = {"config": asdict(config), "rows": [row | made for row in rows]} | made
        show(exam, decodings[-1], results, records, os.path.join(folder, f"{config.split}{part}_{key}"))


def main(argv=None):
    config = configure(Config, argv, __doc__)
    with ranks_of(pick_device(config.device), "lower batch_size") as ranks:
        evaluate(config, ranks)


if __name__ == "__main__":
    run(main)
