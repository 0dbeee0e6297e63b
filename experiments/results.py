"""
Many runs of evaluate.py over training seeds, as tables and one figure.

    python results.py                    # reads out/*/eval/test_*.json, writes docs/results_test.json, prints a table per group
    python results.py --split=val
    python results.py --draw=docs/results_test.json --show=demo_l2d,demo_l2d:temperature=1.0 --lines=demo_lora   # needs matplotlib

A group is one condition over its training seeds: out/demo_l2d, out/demo_l2d_s1, out/demo_l2d_s2 are seeds 0, 1, 2 of demo_l2d; what
evaluate.py was told beside its defaults follows, as in demo_l2d:temperature=1.0. Means and standard deviations (n - 1) are over seeds.
McNemar's test has one pair for each problem: gained where more seeds are right than at the T compared with, lost where fewer are. The
seeds share problems, and at T = 1 a trunk, so that counting each seed's pairs by themselves would count the same evidence several times.
"""
import glob
import json
import os
import re
import statistics
from dataclasses import dataclass, fields
from pathlib import Path

import evaluate
from configurator import UserError, configure
from evaluate import KINDS, mcnemar, pyplot, read_records, wilson
from prepare_data import write_file

DEFAULTS = {f.name: f.default for f in fields(evaluate.Config)}
NOT_A_CONDITION = {"steps", "limit", "batch_size", "out_dir", "mistakes", "plot", "controls", "device", "dtype", "max_new_tokens",
                   "split", "checkpoint", "seed"}
NUMBERS = ["strict", "flexible", "nfe", "token_accuracy", "nll", "tokens", "cut", "well_formed"]
RECORDED = ["path", "command", "commit", "torch", "machine", "weights_sha256"]


@dataclass(frozen=True)
class Config:
    split: str = "test"             # read every out/*/eval/{split}_*.json
    out: str = ""                   # JSON file to write; empty: docs/results_{split}.json
    # or draw what such a file holds, without out/
    draw: str = ""                  # JSON file to read
    show: str = ""                  # groups, separated by commas: accuracy against steps
    lines: str = ""                 # groups whose T = 1 is a line: controls
    names: str = ""                 # what to call them in the figure, separated by commas, first those of show
    png: str = "docs/results.png"   # figure to write

    def __post_init__(self):
        if bool(self.draw) != bool(self.show or self.lines):
            raise UserError(f"error: draw={self.draw!r}, show={self.show!r}, lines={self.lines!r}, but a figure needs both its data and "
                            "its groups: --draw=docs/results_test.json --show=GROUP,GROUP")


# ------------------------------------------------------------------------------------------------- reading
def read_runs(split):
    """{group: {training seed: run}}; a run is what evaluate.py wrote, its path and its settings beside the defaults."""
    groups = {}
    for path in sorted(glob.glob(f"out/*/eval/{split}_*.json")):
        if not re.fullmatch(re.escape(split) + "_[0-9a-f]{8}", Path(path).stem):
            continue                                                          # of a split whose name goes on
        try:
            run = json.loads(Path(path).read_text())
            assert all("by_kind" in row for row in run["rows"]), "no by_kind"
        except (ValueError, KeyError, AssertionError) as e:
            raise UserError(f"error: {path} is damaged or of another version of evaluate.py ({e}); move it away, or evaluate again")
        settings = {k: v for k, v in sorted(run["config"].items()) if k not in NOT_A_CONDITION and v != DEFAULTS.get(k)}
        base, seed = re.fullmatch(r"(.*?)(?:_s(\d+))?", Path(path).parts[1]).groups()
        seeds = groups.setdefault(":".join([base, *(f"{k}={v}" for k, v in settings.items())]), {})
        if (other := seeds.setdefault(int(seed or 0), run)) is not run:
            raise UserError(f"error: {other['path']} and {path} are the same condition and training seed (other weights, batch_size, "
                            "device, dtype, checkpoint, seed or max_new_tokens make no group of their own); move one of them away")
        run |= {"path": path, "settings": settings, "n": run["rows"][0].get("n", run["rows"][0]["teacher_forced_n"])}
    for name, seeds in groups.items():
        if len({run["n"] for run in seeds.values()}) > 1:
            raise UserError(f"error: the runs of {name} answered different numbers of problems: "
                            + ", ".join(f"{run['path']}: {run['n']}" for run in seeds.values()) + "; evaluate them with the same --limit")
    if not groups:
        raise UserError(f"error: no evaluation matches out/*/eval/{split}_*.json; run: python evaluate.py --split={split}")
    return groups


def outcomes(run, steps):
    """Which of the run's n problems were strictly right, a list of bool in order, or None where not all answers are there."""
    records = read_records(run["path"].removesuffix(".json") + f"_steps{steps}.jsonl")
    return [records[i]["strict"] for i in range(run["n"])] if all(i in records for i in range(run["n"])) else None


# --------------------------------------------------------------------------------------------- statistics
def over_seeds(values):
    """Mean, standard deviation (n - 1; None for one value) and the values."""
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else None, "values": values}


def paired(first, second):
    """Strict exact match of second against first, each {seed: outcomes}, over the seeds in both: problems gained and lost, p; each
    seed's alone. None where answers are missing."""
    pairs = [(first[seed], second[seed]) for seed in second if seed in first]
    if not pairs or None in sum(pairs, ()):
        return None
    before, after = ([sum(seed) for seed in zip(*side)] for side in zip(*pairs))      # of each problem: how many seeds are right
    gained, lost, p = mcnemar(before, after)
    return {"gained": gained, "lost": lost, "p": p, "each": [mcnemar(a, b) for a, b in pairs]}


def summarize(seeds):
    """A group of the JSON, from {training seed: run}."""
    found, rows = {}, []                                                      # {steps: {seed: row of evaluate.py}}
    for seed, run in sorted(seeds.items()):
        for row in run["rows"]:
            found.setdefault(row["steps"], {})[seed] = row
    right = {steps: {seed: outcomes(seeds[seed], steps) for seed in by_seed} for steps, by_seed in found.items()}
    for steps, by_seed in sorted(found.items()):
        row = {"steps": steps, "seeds": list(by_seed)}
        row |= {k: over_seeds([r[k] for r in by_seed.values()]) for k in NUMBERS if all(k in r for r in by_seed.values())}
        row["by_kind"] = {kind: {k: over_seeds([r["by_kind"][kind][k] for r in by_seed.values()]) for k in ("accuracy", "nfe")} for kind in KINDS}
        for name, other in (("vs_one", 1), ("vs_second", min((s for s in found if s > 1), default=steps))):
            if other in found and steps > other and (pairs := paired(right[other], right[steps])):
                row[name] = {"steps": other} | pairs
        rows.append(row)
    runs = [{"seed": seed} | {k: run[k] for k in RECORDED} for seed, run in sorted(seeds.items())]
    first = next(iter(seeds.values()))                                        # all have the same settings and n
    return {"settings": first["settings"], "n": first["n"], "runs": runs, "rows": rows}


# ------------------------------------------------------------------------------------------------- showing
def spread(row, n):
    """Ends of the error bar of a row's strict exact match: mean - sd, mean + sd over seeds; Wilson's 95% interval for one seed."""
    mean, sd = row["strict"]["mean"], row["strict"]["sd"]
    return wilson(round(mean * n), n) if sd is None else (mean - sd, mean + sd)


def table(name, group):
    """The group as Markdown."""
    second = min((row["steps"] for row in group["rows"] if row["steps"] > 1), default=2)
    seeds = [run["seed"] for run in group["runs"]]
    lines = [f"**{name}**: {group['n']} problems, training seeds {', '.join(map(str, seeds))}\n",
             f"| T | NFE | exact match | each seed | gained / lost, p vs T = 1 | vs T = {second} | token acc. | after = (NFE) | NLL |",
             "|" + "---|" * 9]
    versus = lambda v: f"{v['gained']} / {v['lost']}, {v['p']:.2g}" if v else ""
    mean = lambda v, form: f"{v['mean']:{form}}" + (f" ± {v['sd']:{form}}" if v["sd"] is not None else "")
    for row in group["rows"]:
        cells = [""] * 3
        if "strict" in row:
            cells = [f"{row['nfe']['mean']:.2f}", mean(row["strict"], ".3f"), ", ".join(f"{v:.3f}" for v in row["strict"]["values"])]
            if len(row["seeds"]) == 1:
                cells[1] += " [{:.3f}, {:.3f}]".format(*spread(row, group["n"]))
        if row["seeds"] != seeds:
            cells[2] += f" (seeds {', '.join(map(str, row['seeds']))})"
        kind = "{:.3f} ({:.2f})".format(*(row["by_kind"]["result"][k]["mean"] for k in ("accuracy", "nfe")))
        cells += [versus(row.get("vs_one")), versus(row.get("vs_second")), mean(row["token_accuracy"], ".4f"), kind, mean(row["nll"], ".4f")]
        lines.append(f"| {row['steps']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(config):
    """Exact match against steps, from the JSON file alone: points with their spread and a dot for each seed; controls as lines."""
    plt = pyplot("--draw")
    try:
        data = json.loads(Path(config.draw).read_text())
        assert "groups" in data, "it has no groups"
    except (OSError, ValueError, AssertionError) as e:
        raise UserError(f"error: cannot read {config.draw}: {e}; python results.py --out={config.draw} writes it")
    show, controls = ([name for name in names.split(",") if name] for names in (config.show, config.lines))
    rows = {name: [row for row in data["groups"].get(name, {"rows": []})["rows"] if "strict" in row] for name in show + controls}
    for name in show + controls:
        if not rows[name] or name in controls and rows[name][0]["steps"] != 1:
            raise UserError(f"error: {config.draw} has no exact match{' at T = 1' * (name in controls)} of a group {name!r}; "
                            f"its groups: {', '.join(data['groups'])}")
    called = dict(zip(show + controls, config.names.split(",") if config.names else show + controls))
    if len(called) < len(rows):
        raise UserError(f"error: names={config.names!r} are {len(called)}, but show and lines are {len(rows)} groups; name them all")
    n = {name: data["groups"][name]["n"] for name in rows}
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for i, name in enumerate(show):
        x, y = [row["steps"] for row in rows[name]], [row["strict"]["mean"] for row in rows[name]]
        low, high = zip(*(spread(row, n[name]) for row in rows[name]))
        axes.errorbar(x, y, [[v - l for v, l in zip(y, low)], [h - v for v, h in zip(y, high)]], marker="o", capsize=3, label=called[name], color=f"C{i}")
        dots = [(row["steps"], v) for row in rows[name] for v in row["strict"]["values"]]
        axes.scatter(*zip(*dots), s=8, color=f"C{i}", alpha=0.6)
    for i, name in enumerate(controls, len(show)):
        axes.axhline(rows[name][0]["strict"]["mean"], color=f"C{i}", linestyle="--", label=called[name])
        axes.axhspan(*spread(rows[name][0], n[name]), color=f"C{i}", alpha=0.1)
    axes.set_xscale("log", base=2)
    ticks = sorted({row["steps"] for name in show for row in rows[name]})
    axes.set_xticks(ticks, ticks)
    axes.set(xlabel="steps T (evaluations per token)", ylabel=f"exact match ({data['split']}, n = {', '.join(map(str, sorted({*n.values()})))})")
    axes.legend()
    save(config.png, lambda file: figure.savefig(file, format="png", dpi=110))
    plt.close(figure)


def save(path, write):
    """write_file, making its folder."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        write_file(path, write)
    except OSError as e:
        raise UserError(f"error: cannot write {path}: {e.strerror}")
    print(f"written to {path}")


def main(argv=None):
    config = configure(Config, argv, __doc__)
    if config.draw:
        return draw(config)
    groups = {name: summarize(seeds) for name, seeds in sorted(read_runs(config.split).items())}
    results = {"split": config.split, "groups": groups}
    save(config.out or f"docs/results_{config.split}.json", lambda file: file.write(json.dumps(results, indent=1).encode()))
    print("\n" + "\n\n".join(table(name, group) for name, group in groups.items()))


if __name__ == "__main__":
    main()
