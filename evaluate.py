"""
Does more compute help? Exact match and teacher-forced accuracy against steps, on unseen problems.

    python evaluate.py --out_dir=out/demo_l2d --steps=1,2,4,8,16
    python evaluate.py --out_dir=out/l2d_gsm8k --split=test --steps=1,16 --solver=midpoint
    python evaluate.py --out_dir=out/demo_l2d --steps=1,2 --temperature=0.7 --votes=5         # majority vote of 5 samples
    python evaluate.py --out_dir=out/demo_l2d --plot --controls=out/demo_lora,out/demo_finetune   # needs matplotlib

Every number of steps answers the same questions with the same noise, so they are compared pair by pair (exact
McNemar test). Each answer is written to out_dir/eval as soon as it is there: a run that was cut goes on where it
stopped. A question that does not fit counts as wrong; none is dropped.
"""
import hashlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from typing import Literal

import torch
from tqdm import tqdm

from configurator import UserError, configure
from diffusion import Sampler, generate, teacher_forced
from packed import pack
from prepare_data import encode_prompt, file_sha256, load_manifest, load_split, write_file
from sample import check, load
from train import batch_of


@dataclass(frozen=True)
class Config(Sampler):
    steps: str = "1,2,4,8,16"       # numbers of steps to compare
    # what to evaluate, on what
    out_dir: str = "out/l2d_gsm8k"  # of train.py
    checkpoint: Literal["best", "last"] = "best"
    data_dir: str = ""              # empty: the data the checkpoint was trained on
    split: str = "val"              # test is for the end only
    limit: int = 0                  # evaluate the first `limit` problems only; 0 = all
    use_label: bool = False         # give every problem its own label (the right one)
    label: int = -1                 # give every problem this label; -1 = none
    votes: int = 1                  # answers sampled per problem; the most frequent one counts. Above 1 needs a temperature
    max_new_tokens: int = 320
    batch_size: int = 64
    seed: int = 0
    exact_match: bool = True        # generate answers and score them; False leaves only the teacher-forced numbers
    mistakes: int = 3               # wrong answers to print
    # figure
    plot: bool = False              # draw accuracy against path calls to out_dir/eval (needs matplotlib)
    controls: str = ""              # out_dirs, separated by commas, evaluated before: drawn as lines
    # machine
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self):
        self.samplers()
        if self.plot and not self.exact_match:
            raise UserError("error: --plot draws exact match; leave out --exact_match=False")
        if self.use_label and self.label >= 0:
            raise UserError(f"error: --use_label gives every problem its own label, --label={self.label} all the same; choose one")
        if self.limit < 0 or self.batch_size < 1 or self.max_new_tokens < 1 or self.votes < 1:
            raise UserError(f"error: limit={self.limit}, batch_size={self.batch_size}, max_new_tokens={self.max_new_tokens}, "
                            f"votes={self.votes}: limit must be at least 0, the others at least 1")
        if self.votes > 1 and self.temperature == 0:
            raise UserError(f"error: votes={self.votes} counts answers that were sampled, but temperature={self.temperature}; "
                            "add a temperature such as --temperature=0.7")

    def samplers(self):
        """A Sampler for each number of steps."""
        words = self.steps.split(",")
        if not all(word.strip().isdecimal() for word in words):
            raise UserError(f"error: steps={self.steps!r}, but it must be numbers separated by commas, such as 1,2,4,8,16")
        shared = {f.name: getattr(self, f.name) for f in fields(Sampler) if f.name != "steps"}
        return [Sampler(steps=int(word), **shared) for word in words]


# ------------------------------------------------------------------------------------------------- scoring
def number(text):
    """The number that text spells, such as -1,234.50, or None."""
    try:
        return Fraction(text.replace(",", "").replace("\u2212", "-").rstrip("."))
    except (ValueError, ZeroDivisionError):
        return None


def strict_answer(text):
    """The number after the first "#### ", as the GSM8K authors read it."""
    match = re.search(r"#### (\-?[0-9\.\,]+)", text)
    return number(match[1]) if match else None


def flexible_answer(text):
    """The number after the first ####, allowing $, spaces, a Unicode minus or a fraction; else the last number."""
    pattern = r"[-\u2212]?\d[\d,]*(?:\.\d+)?(?:/\d+)?"
    after = re.search(r"####[\s$]*([-\u2212]?)[\s$]*(" + pattern + ")", text)
    if after:
        return number(after[1] + after[2])
    numbers = re.findall(pattern, text)
    return number(numbers[-1]) if numbers else None


def majority(answers):
    """The most frequent of the answers that are not None, the first of several; None if there is none."""
    counts = Counter(answer for answer in answers if answer is not None)
    return max(counts, key=counts.get, default=None)                          # a Counter keeps the order of arrival


def vote(outputs, gold):
    """(output, strict, flexible, well-formed) of the majority of k outputs against the gold answer, all whole texts.

    Strict and flexible answers are counted apart; output is the first that gives the strict majority, or else the first.
    """
    texts = [output.split("\nQuestion:")[0] for output in outputs]
    strict, want = [strict_answer(text) for text in texts], strict_answer(gold)
    chosen, flexible = majority(strict), majority(flexible_answer(text) for text in texts)
    output = outputs[strict.index(chosen)]                                    # None is chosen where all are None: the first
    return output, chosen is not None and chosen == want, flexible is not None and flexible == want, chosen is not None


def wilson(k, n, z=1.96):
    """95% interval of a share k / n (Wilson 1927)."""
    p, q = k / n, z * z / n
    center, half = (p + q / 2) / (1 + q), z / (1 + q) * math.sqrt(p * (1 - p) / n + q / (4 * n))
    return min(p, center - half), max(p, center + half)                      # at p = 0 or 1 rounding could leave it outside


def mcnemar(a, b):
    """Paired comparison of two lists of bool, or of how many seeds are right: where b has more, where a has more, exact two-sided p."""
    gained, lost = sum(y > x for x, y in zip(a, b)), sum(x > y for x, y in zip(a, b))
    return gained, lost, sign_test(gained, lost)


def sign_test(gained, lost):
    """Exact two-sided p of so many pairs gained and lost, if each could have fallen either way."""
    n = gained + lost
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(gained, lost) + 1)) / 2 ** n)


# -------------------------------------------------------------------------------------------------- running
def read_records(path):
    """{problem: its scored answer} of a file that answers writes; none where there is no file, and without a last line cut by a kill."""
    if not os.path.exists(path):
        return {}
    with open(path) as file:
        return {record["id"]: record for record in (json.loads(line) for line in file if line.endswith("\n"))}


def answers(config, sampler, model, encoding, data, n, labels, path):
    """The scored answer of each of the first n problems, a list of dicts in order; those already in path are kept.

    With votes = k it is the majority of k samples, whose tokens, path calls and seconds are summed.
    """
    done, k = read_records(path), config.votes
    size = max(1, config.batch_size // k)                                     # problems in a batch, k rows each
    block_size = model.trunk.config.block_size
    prompts = [encode_prompt(encoding, problem.question) for problem in data.problems[:n]]
    todo = sorted((i for i in range(n) if i not in done), key=lambda i: len(prompts[i]))
    progress = tqdm(total=n, initial=len(done), unit="problem", desc=f"steps={sampler.steps}", disable=not sys.stderr.isatty())
    kept = "".join(json.dumps(record) + "\n" for record in done.values())     # drops a cut line before going on
    write_file(path, lambda file: file.write(kept.encode()))
    with open(path, "a") as file:
        for start in range(0, len(todo), size):
            ids, began = todo[start:start + size], time.time()
            rows = [(i, j) for i in ids if len(prompts[i]) <= block_size for j in range(k)]   # each draws its own randomness
            outputs = generate(model, [prompts[i] for i, _ in rows], encoding.eot_token, config.max_new_tokens, sampler,
                               [labels[i] for i, _ in rows], config.seed, [i * k + j for i, j in rows]) if rows else []
            seconds, samples = (time.time() - began) / len(ids), {i: [] for i in ids}
            for (i, _), o in zip(rows, outputs):
                samples[i].append(o)
            for i, drawn in samples.items():
                texts = [encoding.decode(o.tokens) for o in drawn] or [""]
                output, strict, flexible, well_formed = vote(texts, data.problems[i].answer)
                done[i] = {"id": i, "output": output, "strict": strict, "flexible": flexible, "well_formed": well_formed,
                           "ended": bool(drawn) and all(o.ended for o in drawn), "predicted": sum(o.predicted for o in drawn),
                           "nfe": sum(o.nfe for o in drawn), "seconds": seconds}
                file.write(json.dumps(done[i]) + "\n")
            file.flush()
            progress.update(len(ids))
            if progress.disable and (start // size) % 4 == 3:
                print(f"steps={sampler.steps}: {len(done)}/{n} problems", flush=True)
    progress.close()
    return [done[i] for i in range(n)]


KINDS = ["result", "number", "rest"]    # of a target: a number that follows an "=", another number, all else


def equals_and_digits(encoding, device):
    """Which tokens end with an "=", and which are numbers, each (V_size,) bool: what the KINDS are told by."""
    texts = [encoding.decode([i]) for i in range(encoding.n_vocab)]
    return torch.tensor([t.endswith("=") for t in texts], device=device), torch.tensor([t.strip().isdecimal() for t in texts], device=device)


def teacher_forced_numbers(config, sampler, model, equals, digits, data, n, labels):
    """Mean token accuracy and -log p of the true answers, every target given its true context; accuracy and path calls by kind."""
    device = model.trunk.wte.weight.device
    sums = torch.zeros(4, len(KINDS), dtype=torch.float64, device=device)     # targets, right ones, -log p, path calls; by kind
    fits = [i for i in range(n) if data.offsets[i + 1] - data.offsets[i] - 1 <= model.trunk.config.block_size]
    for start in range(0, len(fits), config.batch_size):
        ids = fits[start:start + config.batch_size]
        idx, targets, _ = batch_of(data, ids, device)
        generator = torch.Generator(device).manual_seed((config.seed * 1_000_003 + start) % 2 ** 63)
        label = torch.tensor([labels[i] for i in ids], device=device)
        nll, hit, nfe = teacher_forced(model, idx, targets, sampler, generator, label)
        at = targets >= 0
        kind = torch.where(digits[targets[at]], torch.where(equals[idx[at]], 0, 1), 2)
        sums.index_add_(1, kind, torch.stack([torch.ones_like(nll), hit, nll, nfe]).double())
    count, right, loss, _ = sums.sum(1).tolist()
    by_kind = {name: {"n": int(m), "accuracy": r / max(m, 1), "nfe": calls / max(m, 1)} for name, m, r, calls in zip(KINDS, *sums[[0, 1, 3]].tolist())}
    return {"token_accuracy": right / max(count, 1), "nll": loss / max(count, 1), "teacher_forced_n": len(fits), "by_kind": by_kind}


def summary(records, before, first):
    """The numbers of one table row, from the records of its steps, of the previous steps and of the first."""
    n, strict = len(records), [r["strict"] for r in records]
    total = sum(r["predicted"] for r in records)
    row = {"n": n, "strict": sum(strict) / n, "interval": wilson(sum(strict), n),
           "flexible": sum(r["flexible"] for r in records) / n, "well_formed": sum(r["well_formed"] for r in records) / n,
           "cut": sum(not r["ended"] for r in records) / n, "tokens": total / n,
           "nfe": sum(r["nfe"] for r in records) / max(total, 1), "seconds": sum(r["seconds"] for r in records)}
    for name, other in (("vs_first", first), ("vs_previous", before)):
        if other is not None:
            row[name] = mcnemar([r["strict"] for r in other], strict)
    return row


def show(rows):
    """The table as text."""
    lines = ["steps    NFE  exact match [95%]        vs first          vs previous       flexible  well-formed  cut    tokens  token acc.  NLL     "
             "right (NFE) after =, other numbers, the rest"]
    def versus(v):
        return f"+{v[0]} -{v[1]} p={v[2]:.3g}" if v else ""
    for row in rows:
        left = f"{row['steps']:>5}  "
        if "strict" in row:
            low, high = row["interval"]
            left += (f"{row['nfe']:5.2f}  {row['strict']:.3f} [{low:.3f}, {high:.3f}]  {versus(row.get('vs_first')):<17} "
                     f"{versus(row.get('vs_previous')):<17} {row['flexible']:.3f}     {row['well_formed']:.3f}        "
                     f"{row['cut']:.3f}  {row['tokens']:5.1f}   ")
        kinds = "  ".join(f"{kind['accuracy']:.4f} ({kind['nfe']:.2f})" if kind["n"] else "-" for kind in row["by_kind"].values())
        lines.append(left + f"{row['token_accuracy']:.4f}      {row['nll']:.4f}  {kinds}")
    return "\n".join(lines)


def pyplot(option):
    """matplotlib.pyplot, drawing to files. Raises UserError, naming the option that asks for it, where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError(f"error: {option} needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def plot(path, results, controls):
    """Accuracy against path calls per token with 95% intervals; controls [(name, results)] as lines."""
    plt = pyplot("--plot")
    rows = results["rows"]
    x, y = [r["nfe"] for r in rows], [r["strict"] for r in rows]
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.errorbar(x, y, [[v - r["interval"][0] for v, r in zip(y, rows)], [r["interval"][1] - v for v, r in zip(y, rows)]],
                  marker="o", capsize=3, label="L2D")
    for i, (name, control) in enumerate(controls):
        first = control["rows"][0]
        axes.axhline(first["strict"], color=f"C{i + 1}", linestyle="--", label=name)
        axes.axhspan(*first["interval"], color=f"C{i + 1}", alpha=0.1)
    axes.set(xlabel="path calls per token", ylabel=f"exact match ({results['config']['split']}, n = {rows[0]['n']})")
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def read_controls(config):
    """[(name, results)] of the out_dirs in config.controls, evaluated before; and a check that matplotlib is there."""
    pyplot("--plot")                                                          # rather now than after the work
    controls, same = [], {k: getattr(config, k) for k in ("temperature", "top_k", "votes", "limit")}
    for name in filter(None, config.controls.split(",")):
        try:
            with open(os.path.join(name, "eval", f"{config.split}.json")) as file:
                control = json.load(file)
        except OSError:
            control = {"config": {}, "rows": [{}]}
        if "strict" not in control["rows"][0] or any(control["config"][k] != v for k, v in same.items()):
            raise UserError(f"error: no evaluation in {name} on {config.split}, or the last one had other settings; run: python evaluate.py "
                            f"--out_dir={name} --split={config.split} --steps=1 " + " ".join(f"--{k}={v}" for k, v in same.items()))
        controls.append((os.path.basename(name), control))
    return controls


def commit():
    """The commit of this code, -dirty where files have changed since; an empty string where git cannot tell."""
    try:
        command = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "describe", "--always", "--dirty", "--abbrev=40", "--match="]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:                                                           # no git here
        return ""


def main(argv=None):
    config = configure(Config, argv, __doc__)
    controls = read_controls(config) if config.plot else []
    model, encoding, checkpoint = load(config.out_dir, config.checkpoint, config.device, config.dtype)
    samplers = config.samplers()
    for sampler in samplers:
        check(sampler, None if config.use_label else config.label, model, checkpoint, config.out_dir)
    pack(model)
    data_dir = config.data_dir or checkpoint["config"]["data_dir"]
    manifest = load_manifest(data_dir)
    if manifest["fingerprint"] != checkpoint["tokenizer"]["fingerprint"]:
        raise UserError(f"error: {data_dir} was made with tokenizer {manifest['tokenizer']}, the checkpoint with "
                        f"{checkpoint['tokenizer']['name']}; choose the data it was trained on")
    data = load_split(data_dir, config.split)
    n = min(config.limit or len(data.problems), len(data.problems))
    labels = data.labels.tolist() if config.use_label else [config.label if config.label >= 0 else model.no_label] * len(data.problems)

    folder = os.path.join(config.out_dir, "eval")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as e:
        raise UserError(f"error: cannot write to {folder}: {e.strerror}")
    weights = file_sha256(os.path.join(config.out_dir, f"{config.checkpoint}.pt"))
    same = {k: v for k, v in asdict(config).items() if k not in ("steps", "limit", "batch_size", "mistakes", "plot", "controls", "out_dir", "data_dir")}
    problems = file_sha256(os.path.join(data_dir, f"{config.split}.jsonl"))
    key = hashlib.sha256(json.dumps([same, weights, problems], sort_keys=True).encode()).hexdigest()[:8]

    equals, digits = equals_and_digits(encoding, model.trunk.wte.weight.device)
    rows, first, before = [], None, None
    for sampler in samplers:
        row = {"steps": sampler.steps, "solver": sampler.solver} | teacher_forced_numbers(config, sampler, model, equals, digits, data, n, labels)
        if config.exact_match:
            path = os.path.join(folder, f"{config.split}_{key}_steps{sampler.steps}.jsonl")
            records = answers(config, sampler, model, encoding, data, n, labels, path)
            row |= summary(records, before, first)
            first, before = first or records, records
        rows.append(row)
    print(f"{config.out_dir} on {n} problems of {data_dir}/{config.split}, solver {config.solver}, seed {config.seed}\n" + show(rows))
    if config.exact_match:
        for record in [r for r in before if not r["strict"]][:config.mistakes]:
            problem = data.problems[record["id"]]
            print(f"\nwrong, steps={samplers[-1].steps}: {problem.question}\n  gold:   {problem.answer!r}\n  output: {record['output']!r}")
    results = {"config": asdict(config), "rows": rows, "weights_sha256": weights, "commit": commit(), "command": " ".join(sys.argv),
               "torch": torch.__version__, "python": platform.python_version(), "machine": platform.processor() or platform.machine()}
    out = os.path.join(folder, f"{config.split}_{key}.json")
    for path in (out, os.path.join(folder, f"{config.split}.json")):          # by settings, and the latest under a plain name
        write_file(path, lambda file: file.write(json.dumps(results, indent=1).encode()))
    print(f"\nwritten to {out}")
    if config.plot:
        plot(out.replace(".json", ".png"), results, controls)
        print(f"figure: {out.replace('.json', '.png')}")


if __name__ == "__main__":
    main()
