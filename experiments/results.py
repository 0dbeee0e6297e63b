"""
Many runs of evaluate.py over training seeds, as tables and one figure. Run it where out/ is:

    export PYTHONPATH=.
    python experiments/results.py            # out/*/eval/test_*.json -> experiments/results_test.json, tables
    python experiments/results.py --split=val
    python experiments/results.py --draw=experiments/results_test.json --show=demo_l2d --lines=demo_lora

A group is one condition over its training seeds: out/demo_l2d, out/demo_l2d_s1, out/demo_l2d_s2 are seeds
0, 1, 2 of demo_l2d; what evaluate.py was told beside its defaults follows, as in demo_l2d:temperature=1.0.
Means and standard deviations (n - 1) are over seeds. McNemar's test has one pair for each problem: gained
where more seeds are right than at the T compared with, lost where fewer are. The seeds share problems, and at
T = 1 a trunk, so that counting each seed's pairs by themselves would count the same evidence several times.
"""
import glob
import json
import os
import re
import statistics
from dataclasses import dataclass, fields
from pathlib import Path

import evaluate
from configurator import UserError, configure, run
from exam import KINDS, read_answers
from exam.report import mcnemar, pyplot, read_results, wilson
from files import write_file

DEFAULTS = {f.name: f.default for f in fields(evaluate.Config)}
NOT_A_CONDITION = {"steps", "batch_size", "draft", "out_dir", "mistakes", "show_change", "plot",
                   "device", "dtype", "max_new_tokens", "split", "checkpoint", "seed", "run_code"}
NUMBERS = ["strict", "flexible", "nfe", "token_accuracy", "nll", "tokens", "cut", "well_formed"]
RECORDED = ["path", "command", "commit", "torch", "machine", "weights_sha256"]


@dataclass(frozen=True)
class Config:
    split: str = "test"             # read every out/*/eval/{split}_*.json
    out: str = ""                   # JSON file to write; empty: experiments/results_{split}.json
    # or draw what such a file holds, without out/
    draw: str = ""                  # JSON file to read
    show: str = ""                  # groups, separated by commas: accuracy against steps
    lines: str = ""                 # groups whose T = 1 is a line: controls
    names: str = ""                 # what to call them in the figure, with commas, first those of show
    png: str = "experiments/results.png"    # figure to write

    def __post_init__(self):
        if bool(self.draw) != bool(self.show or self.lines):
            raise UserError(f"draw={self.draw!r}, show={self.show!r}, lines={self.lines!r}, but a "
                            "figure needs both: --draw=experiments/results_test.json --show=GROUP,GROUP")


# --------------------------------------------------------------------------------------------- reading
def read_runs(split):
    """{group: {training seed: run}}; a run is what evaluate.py wrote, its path, its settings."""
    groups = {}
    for path in sorted(glob.glob(f"out/*/eval/{split}_*.json")):
        if not re.fullmatch(re.escape(split) + r"(_first\d+)?_[0-9a-f]{8}", Path(path).stem):
            continue                                                     # of a split whose name goes on
        evaluation = read_results(path)
        if not evaluation["rows"]:
            raise UserError(f"{path} is damaged or of another version of evaluate.py; move it away, "
                            "or evaluate again")
        settings = {name: value for name, value in sorted(evaluation["config"].items())
                    if name not in NOT_A_CONDITION and value != DEFAULTS.get(name)}
        base, seed = re.fullmatch(r"(.*?)(?:_s(\d+))?", Path(path).parts[1]).groups()
        seeds = groups.setdefault(":".join([base, *(f"{k}={v}" for k, v in settings.items())]), {})
        if other := seeds.get(int(seed or 0)):
            raise UserError(f"{other['path']} and {path} are the same condition and training seed "
                            "(other weights, device, dtype, checkpoint, seed or max_new_tokens make no group "
                            "of their own); move one of them away")
        n = evaluation["rows"][0]["n"]
        seeds[int(seed or 0)] = evaluation | {"path": path, "settings": settings, "n": n}
    for name, seeds in groups.items():
        if len({evaluation["n"] for evaluation in seeds.values()}) > 1:
            counts = ", ".join(f"{evaluation['path']}: {evaluation['n']}" for evaluation in seeds.values())
            raise UserError(f"the runs of {name} answered different numbers of problems: {counts}; "
                            "evaluate them on the same data")
    if not groups:
        raise UserError(f"no evaluation matches out/*/eval/{split}_*.json; run: python evaluate.py "
                        f"--split={split}")
    return groups


def outcomes(evaluation, row):
    """How often each of a row's n problems was right, in order, or None where not all answers are there."""
    if "answers" not in row:
        return None
    records = read_answers(Path(evaluation["path"]).with_name(row["answers"]))
    n = range(evaluation["n"])
    return [records[i]["strict"] for i in n] if all(i in records for i in n) else None


# ------------------------------------------------------------------------------------------ statistics
def over_seeds(values):
    """Mean, standard deviation (n - 1; None for one value) and the values."""
    sd = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": sd, "values": values}


def paired(first, second):
    """Strict exact match of second against first, each {seed: outcomes}, over the seeds in both: problems
    gained and lost, p; each seed's alone. None where answers are missing."""
    pairs = [(first[seed], second[seed]) for seed in second if seed in first]
    if not pairs or None in sum(pairs, ()):
        return None
    before, after = ([sum(seed) for seed in zip(*side)] for side in zip(*pairs))    # over seeds
    gained, lost, p = mcnemar(before, after)
    return {"gained": gained, "lost": lost, "p": p, "each": [mcnemar(a, b) for a, b in pairs]}


def summarize(seeds):
    """A group of the JSON, from {training seed: run}."""
    found, rows = {}, []                                                 # {steps: {seed: row of evaluate.py}}
    for seed, evaluation in sorted(seeds.items()):
        for row in evaluation["rows"]:
            found.setdefault(row["steps"], {})[seed] = row
    right = {steps: {seed: outcomes(seeds[seed], row) for seed, row in by_seed.items()}
             for steps, by_seed in found.items()}
    second = min((steps for steps in found if steps > 1), default=None)
    for steps, by_seed in sorted(found.items()):
        each, row = list(by_seed.values()), {"steps": steps, "seeds": list(by_seed)}
        row |= {k: over_seeds([r[k] for r in each]) for k in NUMBERS if all(k in r for r in each)}
        row["by_kind"] = {kind: {k: over_seeds([r["by_kind"][kind][k] for r in each])
                                 for k in ("accuracy", "nfe")} for kind in KINDS}
        for name, other in (("vs_one", 1), ("vs_second", second)):
            if other in found and steps > other and (pairs := paired(right[other], right[steps])):
                row[name] = {"steps": other} | pairs
        rows.append(row)
    runs = [{"seed": seed} | {k: seeds[seed][k] for k in RECORDED} for seed in sorted(seeds)]
    first = next(iter(seeds.values()))                                   # all have the same settings and n
    return {"settings": first["settings"], "n": first["n"], "runs": runs, "rows": rows}


# --------------------------------------------------------------------------------------------- showing
def spread(row, n):
    """Ends of a row's error bar: mean - sd, mean + sd over seeds; Wilson's 95% interval for one seed."""
    mean, sd = row["strict"]["mean"], row["strict"]["sd"]
    return wilson(round(mean * n), n) if sd is None else (mean - sd, mean + sd)


def table(name, group):
    """The group as Markdown."""
    def versus(v):
        return f"{v['gained']} / {v['lost']}, {v['p']:.2g}" if v else ""
    def mean(v, form):
        return f"{v['mean']:{form}}" + (f" ± {v['sd']:{form}}" if v["sd"] is not None else "")
    second = min((row["steps"] for row in group["rows"] if row["steps"] > 1), default=2)
    seeds = [evaluation["seed"] for evaluation in group["runs"]]
    lines = [f"**{name}**: {group['n']} problems, training seeds {', '.join(map(str, seeds))}\n",
             "| T | NFE | exact match | each seed | gained / lost, p vs T = 1 | "
             f"vs T = {second} | token acc. | after = (NFE) | NLL |", "|" + "---|" * 9]
    for row in group["rows"]:
        cells = [""] * 3
        if "strict" in row:
            each = ", ".join(f"{v:.3f}" for v in row["strict"]["values"])
            cells = [f"{row['nfe']['mean']:.2f}", mean(row["strict"], ".3f"), each]
            if len(row["seeds"]) == 1:
                cells[1] += " [{:.3f}, {:.3f}]".format(*spread(row, group["n"]))
        if row["seeds"] != seeds:
            cells[2] += f" (seeds {', '.join(map(str, row['seeds']))})"
        result = row["by_kind"]["result"]
        cells += [versus(row.get("vs_one")), versus(row.get("vs_second")), mean(row["token_accuracy"], ".4f"),
                  f"{result['accuracy']['mean']:.3f} ({result['nfe']['mean']:.2f})", mean(row["nll"], ".4f")]
        lines.append(f"| {row['steps']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def read_groups(config):
    """What --draw names: {group: rows with exact match}, {group: what to call it}, {group: n}, the split."""
    try:
        data = json.loads(Path(config.draw).read_text())
        if "groups" not in data:
            raise ValueError("it has no groups")
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {config.draw}: {e}; python experiments/results.py "
                        f"--out={config.draw} writes it") from None
    show, lines = ([name for name in names.split(",") if name] for names in (config.show, config.lines))
    rows = {name: [row for row in data["groups"].get(name, {"rows": []})["rows"] if "strict" in row]
            for name in show + lines}
    for name in rows:
        if not rows[name] or name in lines and rows[name][0]["steps"] != 1:
            raise UserError(f"{config.draw} has no exact match{' at T = 1' * (name in lines)} of a "
                            f"group {name!r}; its groups: {', '.join(data['groups'])}")
    called = dict(zip(rows, config.names.split(",") if config.names else rows))
    if len(called) < len(rows):
        raise UserError(f"names={config.names!r} are {len(called)}, but show and lines are "
                        f"{len(rows)} groups; name them all")
    return rows, called, {name: data["groups"][name]["n"] for name in rows}, data["split"]


def draw(config):
    """Exact match against steps: points with their spread and a dot for each seed; controls as lines."""
    plt, (rows, called, n, split) = pyplot("--draw"), read_groups(config)
    lines = set(config.lines.split(","))
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for i, (name, own) in enumerate(rows.items()):
        if name in lines:
            axes.axhline(own[0]["strict"]["mean"], color=f"C{i}", linestyle="--", label=called[name])
            axes.axhspan(*spread(own[0], n[name]), color=f"C{i}", alpha=0.1)
            continue
        x, y = [row["steps"] for row in own], [row["strict"]["mean"] for row in own]
        bars = [[abs(mean - spread(row, n[name])[end]) for row, mean in zip(own, y)] for end in (0, 1)]
        axes.errorbar(x, y, bars, marker="o", capsize=3, label=called[name], color=f"C{i}")
        dots = [(row["steps"], value) for row in own for value in row["strict"]["values"]]
        axes.scatter(*zip(*dots), s=8, color=f"C{i}", alpha=0.6)
    axes.set_xscale("log", base=2)
    ticks = sorted({row["steps"] for name, own in rows.items() if name not in lines for row in own})
    axes.set_xticks(ticks, ticks)
    counts = ", ".join(map(str, sorted({*n.values()})))
    axes.set(xlabel="steps T (evaluations per token)", ylabel=f"exact match ({split}, n = {counts})")
    axes.legend()
    save(config.png, lambda file: figure.savefig(file, format="png", dpi=110))
    plt.close(figure)


def save(path, write):
    write_file(os.path.expanduser(path), write)
    print(f"written to {path}")


def main(argv=None):
    config = configure(Config, argv, __doc__)
    if config.draw:
        return draw(config)
    groups = {name: summarize(seeds) for name, seeds in sorted(read_runs(config.split).items())}
    text = json.dumps({"split": config.split, "groups": groups}, indent=1)
    save(config.out or f"experiments/results_{config.split}.json", lambda file: file.write(text.encode()))
    print("\n" + "\n\n".join(table(name, group) for name, group in groups.items()))


if __name__ == "__main__":
    run(main)
