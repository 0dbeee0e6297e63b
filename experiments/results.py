"""
Many runs of evaluate.py over training seeds, as tables and one figure. Run it where out/ is:

    python experiments/results.py            # out/*/eval/test_*.json -> experiments/results_test.json, tables
    python experiments/results.py --split=val
    python experiments/results.py --draw=experiments/results_test.json --show=demo_l2d --lines=demo_lora

A condition is what several runs share that differ in their training seed only: out/demo_l2d, out/demo_l2d_s1
and out/demo_l2d_s2 are the seeds 0, 1, 2 of demo_l2d. Options of evaluate.py that are not at their default
are part of its name, as in demo_l2d:temperature=1.0. Files in experiments/ that older code wrote keep its
settings and commands as they were, such as label for what is now called group.

Means and standard deviations (n - 1) are over seeds. McNemar's test has one pair for each problem: it is
gained where more seeds are right than at the T compared with, and lost where fewer are. The seeds share
problems, and at T = 1 a trunk. So counting each seed's pairs would count the same evidence several times.
"""
import glob
import json
import os
import re
import statistics
import sys
from dataclasses import dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))    # the project's folder

import evaluate
from bench.compact_json import write_json
from configurator import UserError, configure, require, run
from plumbing.files import write_file
from plumbing.provenance import pyplot
from tasks.report import KINDS, mcnemar, read_results, wilson

DEFAULTS = {f.name: f.default for f in fields(evaluate.Config)}
NOT_A_CONDITION = {"steps", "batch_size", "draft", "ahead", "out_dir", "mistakes", "show_change", "plot",
                   "device", "dtype", "max_new_tokens", "split", "checkpoint", "seed", "run_code"}
NUMBERS = ["strict", "flexible", "nfe", "token_accuracy", "nll", "tokens", "cut", "well_formed"]
RECORDED = ["path", "command", "commit", "torch", "machine", "weights_sha256"]


@dataclass(frozen=True)
class Config:                       # `--help` prints the comments of this class
    split: str = "test"             # read every out/*/eval/{split}_*.json
    out: str = ""                   # JSON file to write; empty: experiments/results_{split}.json
    # or draw what such a file holds, without out/
    draw: str = ""                  # JSON file to read
    show: str = ""                  # conditions, separated by commas: accuracy against T
    lines: str = ""                 # conditions whose T = 1 is drawn as a line: controls
    names: str = ""                 # what to call them in the figure, those of show first
    png: str = "experiments/results.png"    # figure to write

    def __post_init__(self):
        require(bool(self.draw) == bool(self.show or self.lines),
                f"draw={self.draw!r}, show={self.show!r}, lines={self.lines!r}, but a figure needs both: "
                "--draw=experiments/results_test.json --show=CONDITION,CONDITION")


# --------------------------------------------------------------------------------------------- reading
def read_runs(split):
    """{condition: {training seed: run}}. A run is what evaluate.py wrote, with its path, settings and n."""
    conditions = {}
    for path in sorted(glob.glob(f"out/*/eval/{split}_*.json")):
        if not re.fullmatch(re.escape(split) + r"(_first\d+)?_[0-9a-f]{8}", Path(path).stem):
            continue                                              # of a split with a longer name
        evaluation = read_results(path)
        require(evaluation["rows"], f"{path} is damaged or of another version of evaluate.py; move it away, "
                "or evaluate again")
        settings = {name: value for name, value in sorted(evaluation["config"].items())
                    if name not in NOT_A_CONDITION and value != DEFAULTS.get(name)}
        folder, seed = re.fullmatch(r"(.*?)(?:_s(\d+))?", Path(path).parts[1]).groups()
        name = ":".join([folder, *(f"{key}={value}" for key, value in settings.items())])
        runs = conditions.setdefault(name, {})
        seed = int(seed or 0)
        require(seed not in runs, f"{runs.get(seed, {}).get('path')} and {path} are the same condition and "
                "training seed (other weights, device, dtype, checkpoint, seed or max_new_tokens make no "
                "condition of their own); move one of them away")
        runs[seed] = evaluation | {"path": path, "settings": settings, "n": evaluation["rows"][0]["n"]}
    require(conditions, f"no evaluation matches out/*/eval/{split}_*.json; run: python evaluate.py "
            f"--split={split}")
    for name, runs in conditions.items():
        counts = {found["path"]: found["n"] for found in runs.values()}
        listed = ", ".join(f"{path}: {n}" for path, n in counts.items())
        require(len(set(counts.values())) == 1, f"the runs of {name} answered different numbers of problems: "
                f"{listed}; evaluate them on the same data")
    return conditions


# ------------------------------------------------------------------------------------------ statistics
def summarize_seeds(values):
    """Mean, standard deviation (n - 1; None for one value) and the values."""
    sd = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": sd, "values": values}


def compare_seeds(first, second):
    """Strict exact match of second against first, over the seeds that both have.

    first, second: {seed: a row of evaluate.py}. Returns problems gained and lost, p, and the same for each
    seed alone; None where there are no answers.
    """
    pairs = [(first[seed].get("right"), second[seed].get("right")) for seed in second if seed in first]
    if not pairs or any(right is None for pair in pairs for right in pair):
        return None
    before = [sum(right) for right in zip(*(a for a, _ in pairs))]  # seeds that are right on each problem
    after = [sum(right) for right in zip(*(b for _, b in pairs))]
    gained, lost, p = mcnemar(before, after)
    return {"gained": gained, "lost": lost, "p": p, "each": [mcnemar(a, b) for a, b in pairs]}


def summarize(runs):
    """What the JSON says of a condition. runs: {training seed: run}."""
    found = {}                                                    # {T: {seed: row of evaluate.py}}
    for seed in sorted(runs):
        for row in runs[seed]["rows"]:
            found.setdefault(row["steps"], {})[seed] = row
    second = min((steps for steps in found if steps > 1), default=None)
    rows = []
    for steps, by_seed in sorted(found.items()):
        each = list(by_seed.values())
        row = {"steps": steps, "seeds": list(by_seed)}
        for name in NUMBERS:
            if all(name in r for r in each):
                row[name] = summarize_seeds([r[name] for r in each])
        row["by_kind"] = {kind: {name: summarize_seeds([r["by_kind"][kind][name] for r in each])
                                 for name in ("accuracy", "nfe")} for kind in KINDS}
        for name, other in (("vs_one", 1), ("vs_second", second)):
            compared = compare_seeds(found[other], by_seed) if other in found and steps > other else None
            if compared:
                row[name] = {"steps": other} | compared
        rows.append(row)
    recorded = [{"seed": seed} | {key: runs[seed][key] for key in RECORDED} for seed in sorted(runs)]
    first = next(iter(runs.values()))                             # all have the same settings and n
    return {"settings": first["settings"], "n": first["n"], "runs": recorded, "rows": rows}


# --------------------------------------------------------------------------------------------- showing
def find_ends(row, n):
    """Ends of a row's error bar: mean - sd, mean + sd over seeds; for one seed Wilson's 95% interval."""
    mean, sd = row["strict"]["mean"], row["strict"]["sd"]
    return wilson(round(mean * n), n) if sd is None else (mean - sd, mean + sd)


def format_mean(value, form):
    text = f"{value['mean']:{form}}"
    return text if value["sd"] is None else f"{text} ± {value['sd']:{form}}"


def format_comparison(value):
    return f"{value['gained']} / {value['lost']}, {value['p']:.2g}" if value else ""


def format_table(name, condition):
    """A condition as Markdown."""
    second = min((row["steps"] for row in condition["rows"] if row["steps"] > 1), default=2)
    seeds = [recorded["seed"] for recorded in condition["runs"]]
    lines = [f"**{name}**: {condition['n']} problems, training seeds {', '.join(map(str, seeds))}\n",
             "| T | NFE | exact match | each seed | gained / lost, p vs T = 1 | "
             f"vs T = {second} | token acc. | after = (NFE) | NLL |", "|" + "---|" * 9]
    for row in condition["rows"]:
        nfe = exact = each = ""
        if "strict" in row:
            nfe = f"{row['nfe']['mean']:.2f}"
            exact = format_mean(row["strict"], ".3f")
            each = ", ".join(f"{value:.3f}" for value in row["strict"]["values"])
            if len(row["seeds"]) == 1:
                exact += " [{:.3f}, {:.3f}]".format(*find_ends(row, condition["n"]))
        if row["seeds"] != seeds:
            each += f" (seeds {', '.join(map(str, row['seeds']))})"
        result = row["by_kind"]["result"]
        cells = [str(row["steps"]), nfe, exact, each, format_comparison(row.get("vs_one")),
                 format_comparison(row.get("vs_second")), format_mean(row["token_accuracy"], ".4f"),
                 f"{result['accuracy']['mean']:.3f} ({result['nfe']['mean']:.2f})",
                 format_mean(row["nll"], ".4f")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@dataclass
class Figure:
    """What a figure shows. rows, names and n have the same keys: conditions, those of --show first."""
    split: str
    lines: list                     # conditions that are drawn as a line
    rows: dict                      # rows with exact match
    names: dict                     # what to call each condition
    n: dict                         # problems


def read_figure(config):
    """The Figure that the options ask for. Raises UserError where the file does not have it."""
    try:
        data = json.loads(Path(config.draw).read_text())
        if "groups" not in data:
            raise ValueError("it has no groups")
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {config.draw}: {e}; python experiments/results.py "
                        f"--out={config.draw} writes it") from None
    show, lines = ([name for name in names.split(",") if name] for names in (config.show, config.lines))
    conditions = data["groups"]
    rows = {}
    for name in show + lines:
        own = conditions.get(name, {"rows": []})["rows"]
        rows[name] = [row for row in own if "strict" in row]
        at_one = name in lines
        fits = rows[name] and not (at_one and rows[name][0]["steps"] != 1)
        require(fits, f"{config.draw} has no exact match{' at T = 1' if at_one else ''} of a condition "
                f"{name!r}; its conditions: {', '.join(conditions)}")
    names = config.names.split(",") if config.names else list(rows)
    require(len(names) == len(rows), f"names={config.names!r} are {len(names)}, but show and lines are "
            f"{len(rows)} conditions; name them all")
    return Figure(data["split"], lines, rows, dict(zip(rows, names)),
                  {name: conditions[name]["n"] for name in rows})


def draw(config):
    """Exact match against T: points with error bars and a dot for each seed; controls as lines."""
    plt = pyplot("--draw")
    shown = read_figure(config)
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    ticks = set()
    for i, (name, rows) in enumerate(shown.rows.items()):
        color = f"C{i}"
        means = [row["strict"]["mean"] for row in rows]
        ends = [find_ends(row, shown.n[name]) for row in rows]
        if name in shown.lines:
            axes.axhline(means[0], color=color, linestyle="--", label=shown.names[name])
            axes.axhspan(*ends[0], color=color, alpha=0.1)
            continue
        steps = [row["steps"] for row in rows]
        bars = [[abs(mean - end[side]) for mean, end in zip(means, ends)] for side in (0, 1)]
        axes.errorbar(steps, means, bars, marker="o", capsize=3, label=shown.names[name], color=color)
        dots = [(row["steps"], value) for row in rows for value in row["strict"]["values"]]
        axes.scatter(*zip(*dots), s=8, color=color, alpha=0.6)
        ticks |= set(steps)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(ticks), sorted(ticks))
    counts = ", ".join(map(str, sorted(set(shown.n.values()))))
    axes.set(xlabel="T (evaluations per token)", ylabel=f"exact match ({shown.split}, n = {counts})")
    axes.legend()
    write_file(os.path.expanduser(config.png), lambda file: figure.savefig(file, format="png", dpi=110))
    print(f"written to {config.png}")
    plt.close(figure)


def main(argv=None):
    config = configure(Config, argv, __doc__)
    if config.draw:
        return draw(config)
    conditions = {name: summarize(runs) for name, runs in sorted(read_runs(config.split).items())}
    path = config.out or f"experiments/results_{config.split}.json"
    write_json(path, {"split": config.split, "groups": conditions}, levels=4)
    print(f"written to {path}")
    print("\n" + "\n\n".join(format_table(name, condition) for name, condition in conditions.items()))


if __name__ == "__main__":
    run(main)
