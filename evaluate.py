"""
Does more compute help? Right answers and teacher-forced accuracy against steps, on unseen problems.

    python evaluate.py --out_dir=out/demo_l2d --steps=1,2,4,8,16
    python evaluate.py --out_dir=out/l2d_gsm8k --split=test --steps=1,16 --solver=midpoint
    python evaluate.py --data_dir=data/mmlu --split=test --shots=2 --max_new_tokens=4       # also letters by likelihood
    python evaluate.py --data_dir=data/humaneval --split=test --run_code --samples=10 --temperature=0.8    # pass@1, 10
    python evaluate.py --out_dir=out/demo_l2d --plot --controls=out/demo_lora,out/demo_finetune   # needs matplotlib
    torchrun --nproc_per_node=8 evaluate.py --split=test                                    # shares out the problems

Every number of steps answers the same problems with the same noise, so they are compared pair by pair (exact McNemar
test). Each answer is written to out_dir/eval as soon as it is there, filed under all that it depends on: a run that was
cut goes on where it stopped. A problem that does not fit counts as wrong; none is dropped.
"""
import fcntl
import glob
import hashlib
import json
import os
import sys
from dataclasses import asdict, dataclass, fields
from types import SimpleNamespace
from typing import Literal

import torch

from checkpoint import load
from configurator import UserError, at_least, configure, run
from decode import Decoding, generate
from exam import Exam, answers, equals_and_digits, of_answers, of_choices
from files import write_file
from machine import Ranks, pick_device
from packed import pack
from prepare_data import Split, encode_split, load_manifest, load_split
from report import compare, plot, provenance, pyplot, read_results, shares, summary, table
from sample import check, format_trace
from tasks import TASKS, allow_code, few_shot


@dataclass(frozen=True)
class Config(Decoding):
    steps: str = "1,2,4,8,16"       # numbers of steps to compare
    # what to evaluate, on what
    out_dir: str = "out/l2d_gsm8k"  # of train.py
    checkpoint: Literal["best", "last"] = "best"
    data_dir: str = ""              # empty: the data the checkpoint was trained on
    split: str = "val"              # test is for the end only
    limit: int = 0                  # evaluate the first `limit` problems only; 0 = all
    label: str = ""                 # guidance label of every problem, by name; empty = none
    use_label: bool = False         # give every problem its own label (the right one)
    shots: int = 0                  # worked examples before each problem
    votes: int = 1                  # answers sampled per problem; the most frequent one counts. Needs a temperature
    samples: int = 1                # answers sampled per problem; each counts: pass@1 to pass@samples
    run_code: bool = False          # run the code that the model writes, where scoring needs it, in a sandbox
    batch_size: int = 64            # texts generated side by side. Changes no answer
    exact_match: bool = True        # generate answers and score them; False leaves only the teacher-forced numbers
    # what to show
    mistakes: int = 3               # wrong answers to print
    show_change: bool = False       # trace an answer that the first number of steps gets wrong, and the last right
    plot: bool = False              # draw accuracy against path calls to out_dir/eval (needs matplotlib)
    controls: str = ""              # out_dirs, separated by commas, evaluated before: drawn as lines
    # machine
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the weights; auto: float32 on a CPU

    def __post_init__(self):
        at_least(self, limit=0, shots=0, mistakes=0, votes=1, samples=1, batch_size=1)
        several, n_steps = max(self.votes, self.samples), len(self.decodings())
        must = {f"votes={self.votes} and samples={self.samples} are two ways to count; choose one":
                min(self.votes, self.samples) == 1,
                f"{several} answers to a problem are the same at temperature=0; add one such as --temperature=0.7":
                several == 1 or self.temperature > 0,
                f"--use_label gives every problem its own label, --label={self.label} all the same; choose one":
                not (self.use_label and self.label),
                f"guidance={self.guidance} needs --label=NAME, or --use_label": self.guidance == 1 or self.use_label or
                self.label, "--plot and --show_change need answers; leave out --exact_match=False":
                self.exact_match or not (self.plot or self.show_change),
                "--show_change compares two numbers of steps, one answer of each: --steps=1,16, no votes or samples":
                not self.show_change or several == 1 < n_steps}
        for message, holds in must.items():
            if not holds:
                raise UserError(f"error: {message}")

    def decodings(self, **changes):
        """A Decoding for each number of steps."""
        words = [word.strip() for word in self.steps.split(",")]
        if not all(word.isdecimal() for word in words):
            raise UserError(f"error: steps={self.steps!r}, but it must be numbers separated by commas: 1,2,4,8,16")
        shared = {f.name: getattr(self, f.name) for f in fields(Decoding)} | changes
        return [Decoding(**shared | {"steps": steps}) for steps in dict.fromkeys(map(int, words))]


# ------------------------------------------------------------------------------------------------ main
def set_up(config, ranks):
    """The Exam, a Decoding for each number of steps, and what an answer depends on besides steps, a dict."""
    with ranks.main_first():                                             # it may download a tokenizer
        model, encoding, checkpoint = load(config.out_dir, config.checkpoint, config.device, config.dtype)
    data_dir = config.data_dir or checkpoint["config"]["data_dir"]
    manifest, data = load_manifest(data_dir), load_split(data_dir, config.split)
    if manifest["fingerprint"] != checkpoint["tokenizer"]["fingerprint"]:
        raise UserError(f"error: {data_dir} was made with tokenizer {manifest['tokenizer']}, the checkpoint with "
                        f"{checkpoint['tokenizer']['name']}; make it with --tokenizer={checkpoint['tokenizer']['name']}")
    if config.shots:
        if manifest["shots"] not in manifest["counts"]:
            raise UserError(f"error: shots={config.shots}, but {data_dir} has no worked examples; leave it out")
        examples = load_split(data_dir, manifest["shots"]).problems
        problems = [p._replace(prompt=few_shot(p, examples, config.shots)) for p in data.problems]
        arrays, _, _ = encode_split(encoding, config.split, problems, manifest["label_names"], False)
        data = Split(**arrays, problems=problems)
    labels = labels_of(config, model, checkpoint, manifest, data.problems)
    decodings = config.decodings(max_new_tokens=min(config.max_new_tokens, model.trunk.config.block_size))
    exam = Exam(config, ranks, pack(model), encoding, data, min(config.limit or len(labels), len(labels)), labels)
    allow_code(exam.problems if config.exact_match else [], config.run_code)
    problems = json.dumps([p._replace(where="") for p in data.problems])
    same = {k: v for k, v in asdict(decodings[0]).items() if k not in ("steps", "draft")} | {
        "votes": config.votes, "samples": config.samples, "exact_match": config.exact_match, "labels": labels,
        "device": exam.device.type, "dtype": str(model.trunk.wte.weight.dtype), "weights_sha256": checkpoint["sha256"],
        "problems_sha256": hashlib.sha256(problems.encode()).hexdigest()}
    return exam, decodings, same


def labels_of(config, model, checkpoint, manifest, problems):
    """The number of each problem's guidance label. A problem whose data has other labels goes by its task's group."""
    names, has_path = checkpoint["data"]["label_names"], model.path is not None
    if not config.use_label:
        asked = SimpleNamespace(out_dir=config.out_dir, label=config.label, guidance=1.0,
                                steps=max(decoding.steps for decoding in config.decodings()))
        return [check(asked, model, checkpoint)] * len(problems)
    wanted = [p.label if manifest["label_names"] == names else TASKS[p.task].group for p in problems]
    if strange := set(wanted) - set(names if has_path else ()):
        raise UserError(f"error: --use_label needs the labels {', '.join(sorted(strange))}, but those of {config.out_dir} "
                        f"are: {', '.join(names) if has_path else 'none, for want of a path'}; leave it out")
    return [names.index(name) for name in wanted]


def read_controls(config, problems):
    """[(name, row)] of the out_dirs in controls: their latest evaluation on these problems, by hash, with these settings."""
    pyplot("--plot")                                                     # rather now than after the work
    found, same = [], {k: getattr(config, k) for k in ("split", "temperature", "top_k", "votes", "samples", "shots", "limit")}
    for out_dir in filter(None, config.controls.split(",")):
        paths = glob.glob(os.path.join(glob.escape(out_dir), "eval", "*.json"))
        fitting = [r["rows"][0] for r in map(read_results, sorted(paths, key=os.path.getmtime))
                   if r["rows"] and "strict" in r["rows"][0] and r["problems_sha256"] == problems
                   and all(r["config"].get(k) == v for k, v in same.items())]
        if not fitting:
            raise UserError(f"error: no evaluation in {out_dir} on the same problems with the same settings; run: python "
                            f"evaluate.py --out_dir={out_dir} --steps=1 " + " ".join(f"--{k}={v}" for k, v in same.items()))
        found.append((os.path.basename(os.path.normpath(out_dir)), fitting[-1]))
    return found


def write_results(path, results):
    """Results as JSON. Rows that are there of other numbers of steps stay: all is the same but steps, by the name."""
    with open(os.path.join(os.path.dirname(path), "lock"), "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)                                 # while this block lasts: another may write, too
        rows = {row["steps"]: row for row in read_results(path)["rows"] + results["rows"]}
        whole = results | {"rows": [rows[steps] for steps in sorted(rows)]}
        write_file(path, lambda file: file.write(json.dumps(whole, indent=1).encode()))


def show_change(exam, decoding, first, last):
    """Print, of the problems that the first records have wrong and the last right, the shortest, both answers, and how
    each token of the last came about."""
    changed = [b for a, b in zip(first, last) if b["strict"] > a["strict"]]
    if not changed:
        print("\nno problem is wrong at the first number of steps and right at the last: nothing to show")
        return
    i = min(changed, key=lambda record: record["predicted"])["id"]
    (output,) = generate(exam.model, [exam.prompts[i]], exam.encoding.eot_token, decoding, [exam.labels[i]], [i], trace=True)
    tokens = output.tokens + [exam.encoding.eot_token] * output.ended
    print(f"\nof {len(changed)} problems that the steps put right, the one with the shortest answer:\n"
          f"{exam.problems[i].prompt}\n  true answer: {exam.problems[i].answer!r}\n  first: {first[i]['output']!r}\n"
          f"  last:  {last[i]['output']!r}\nevery token of the last; a star marks one that the steps changed\n"
          + format_trace(output, tokens, exam.encoding, sys.stdout.isatty()))


def evaluate(config, ranks):
    exam, decodings, same = set_up(config, ranks)
    controls = read_controls(config, same["problems_sha256"]) if config.plot else []
    key = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:8]
    folder, which = os.path.join(config.out_dir, "eval"), f"_first{exam.n}" if exam.n < len(exam.data.problems) else ""
    os.makedirs(folder, exist_ok=True)
    if config.guidance != 1 and (small := [str(d.steps) for d in decodings if d.steps <= 2]):
        ranks.say(f"note: guidance={config.guidance} does nothing at steps={','.join(small)}: it moves x_t, which only a "
                  "later path call reads")
    rows, records, right, likeliest, kinds = [], {}, {}, {}, equals_and_digits(exam.encoding)
    for decoding in decodings:
        steps = decoding.steps
        row = {"steps": steps, "solver": decoding.solver, "n": exam.n, **of_answers(exam, decoding, *kinds)}
        if subjects := [p.subject for p in exam.problems if p.choices]:
            likeliest[steps], nll = of_choices(exam, decoding)
            row["choices"] = shares("accuracy", likeliest[steps], 1, subjects) | compare(likeliest, steps) | {
                "nll": nll, "right": "".join(map(str, likeliest[steps]))}
        if config.exact_match:
            name = f"{config.split}_{key}_steps{steps}.jsonl"
            records[steps] = answers(exam, decoding, os.path.join(folder, name))
            right[steps] = [record["strict"] for record in records[steps]]
            row |= summary(records[steps], config.samples, [p.subject for p in exam.problems])
            row |= compare(right, steps) | {"answers": name}
        rows.append(row)
    if ranks.main:
        made = {k: v for k, v in same.items() if k.endswith("sha256")} | provenance(exam.device)
        results = {"config": asdict(config), "rows": [row | made for row in rows], **made}
        report(exam, decodings[-1], results, records, os.path.join(folder, f"{config.split}{which}_{key}"), controls)


def report(exam, decoding, results, records, path, controls):
    """Print the table, mistakes and a change; write results and figure to path.json and path.png."""
    config, rows = exam.config, results["rows"]
    print(f"{config.out_dir} on {exam.n} problems of {config.split}, solver {config.solver}, seed {config.seed}\n{table(rows)}")
    if too_long := rows[0].get("too_long"):
        print(f"{too_long} problems do not fit {exam.block_size} positions: wrong at every number of steps")
    for record in [r for r in records.get(decoding.steps, []) if not r["strict"]][:config.mistakes]:
        problem = exam.problems[record["id"]]
        print(f"\nwrong, steps={decoding.steps}: {problem.prompt}\n  gold:   {problem.answer!r}\n  output: {record['output']!r}")
    write_results(f"{path}.json", results)
    print(f"\nwritten to {path}.json")
    if config.plot:
        write_file(f"{path}.png", lambda file: plot(file, results, controls))
        print(f"figure: {path}.png")
    if config.show_change:
        first, *_, last = records.values()
        show_change(exam, decoding, first, last)


def main(argv=None):
    config = configure(Config, argv, __doc__)
    ranks = Ranks(pick_device(config.device))
    try:
        evaluate(config, ranks)
    except torch.OutOfMemoryError as e:
        raise UserError(f"error: out of memory ({str(e).splitlines()[0]}); lower --batch_size") from None
    except UserError:
        if int(os.environ.get("LOCAL_RANK", 0)):                         # the first rank of the host says it
            raise SystemExit(1) from None
        raise
    finally:
        ranks.close()


if __name__ == "__main__":
    run(main)
