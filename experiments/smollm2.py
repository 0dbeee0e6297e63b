"""
What do more steps do on a real language model? Measure the runs of experiments/smollm2.sh, and compare them.

    python experiments/smollm2.py --measure=out/smollm2/l2d_s0               # its measured_test.json
    python experiments/smollm2.py --measure=out/smollm2/l2d_s0 --shots=5     # its trunk, after examples
    python experiments/smollm2.py          # compare: smollm2.json, smollm2.png, and the tables

Everything is teacher-forced: each token of a true answer is predicted from its true context. "Greedy" is the
share of tokens whose most probable prediction is right. "Sampled" at a temperature is the mean probability of
the true token at that temperature, which is the accuracy of a sampled token without the noise of sampling.

Intervals are 95% bootstrap intervals over problems, since the tokens of one problem are not independent. With
several seeds each problem counts with its mean over the seeds. Differences are taken problem by problem.
"""
import glob
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))    # the project's folder

import numpy as np
import torch
from tqdm import tqdm

from bench.compact_json import write_json
from configurator import at_least, configure, require, run
from diffusion import UNROLLED, Denoiser, SamplerConfig, Tables
from evaluate import judge
from plumbing.dataset import load_batch
from plumbing.provenance import provenance, pyplot
from plumbing.trained import load
from tasks import few_shot, load_problems
from tasks.problem import encode_problem, make_split

TEMPERATURES = (1.0, 0.7, 0.5, 0.3)
STEPS = (1, 2, 4, 8, 16, 32)        # of the default grid
MIDPOINT = (3, 7, 15)               # of the authors' solver, whose last evaluation is at t = 1
LAST = 15 / 16                      # the last time of the default grid from T = 16 on
# T and its last time: which of the two is it?
TIMES = ((2, 0.001), (2, LAST), (4, LAST), (16, 0.5), (16, 0.75), (16, 0.875))
SWAPPED = (2, 4, 16)                # T with the sampler of the other training: which of the two does it?
KINDS = {"l2d": "L2D", "lora_path": "L2D, LoRA path", "paper": "L2D, the paper's start and input",
         "unroll": "L2D, trained through Algorithm 1", "lora": "LoRA", "full": "full finetuning",
         "five_shot": "trunk, five examples"}
CONTROLS = ("five_shot", "lora", "full")


@dataclass(frozen=True)
class Config:                       # `--help` prints the comments of this class
    root: str = "out/smollm2"       # folder of the runs, called KIND_sSEED
    measure: str = ""               # measure this run; empty: compare all that have been measured
    split: str = "test"             # val while anything is still chosen
    limit: int = 64                 # problems; 0: all
    settings: str = ""              # measure these alone, such as T=2,T=16; empty: all
    shots: int = 0                  # worked examples before each problem; with them only T = 1 is measured
    seed: int = 0                   # of the noise
    rows: int = 4                   # problems of a batch, whose noise is drawn at once
    dtype: str = "bfloat16"         # of the weights
    device: str = "auto"
    out: str = "experiments/smollm2"        # .json and .png are added

    def __post_init__(self):
        at_least(self, limit=0, shots=0, seed=0, rows=1)
        require(not self.shots or self.measure, f"shots={self.shots} needs --measure=RUN")


# ------------------------------------------------------------------------------------------- measuring
def list_settings(checkpoint, has_path, shots):
    """{name: SamplerConfig} of all that is measured on a run."""
    if not has_path or shots:
        return {"T=1": SamplerConfig(steps=1)}
    settings = {f"T={T}": SamplerConfig(steps=T, **(checkpoint["sampler"] if T > 1 else {})) for T in STEPS}
    if not checkpoint["sampler"]:
        for T in MIDPOINT:
            settings[f"midpoint T={T}"] = SamplerConfig(steps=T, solver="midpoint", t_end=1.0)
        for T, t_end in TIMES:
            settings[f"T={T} to t={t_end:.4g}"] = SamplerConfig(steps=T, t_end=t_end)
        for T in SWAPPED:
            settings[f"held T={T}"] = SamplerConfig(steps=T, **UNROLLED)
    else:
        for T in SWAPPED:
            settings[f"Euler T={T}"] = SamplerConfig(steps=T)
    return settings


def predict(model, tables, c, group, sampler, seed):
    """The logits (N, V_size) of Algorithm 1 at the N positions of c. The same seed gives the same noise."""
    N = len(c.pos)
    x_0 = None
    if sampler.steps > 1:
        generator = torch.Generator(c.h.device).manual_seed(seed)
        path_config = model.path.config
        x_0 = path_config.sigma * torch.randn(N, path_config.x_dim, generator=generator, device=c.h.device)
    return Denoiser(model, sampler, tables, c, group, x_0).predict().float()


def judge_at_temperatures(logits, y):
    """As judge without p(y), and p(y) at each of TEMPERATURES: (3 + 4, N)."""
    right, nll, _, entropy = judge(logits, y)
    logit = logits.gather(1, y[:, None])[:, 0]
    sampled = [(logit / tau - (logits / tau).logsumexp(-1)).exp().cpu() for tau in TEMPERATURES]
    return torch.stack([right, nll, entropy, *sampled])


def read_problems(config, encoding, data_dir, block_size):
    """The problems that are measured, as token ids: a Split. Raises UserError if one is too long."""
    problems = load_problems(data_dir, config.split)[:config.limit or None]
    if config.shots:
        pool = load_problems(data_dir, "train")
        problems = [p._replace(prompt=few_shot(p, pool, config.shots)) for p in problems]
    data = make_split([encode_problem(encoding, p) for p in problems], [0] * len(problems), encoding.n_vocab)
    longest = int(np.diff(data.offsets).max()) - 1
    require(longest <= block_size, f"a problem of {config.split} has {longest} tokens, which is beyond the "
            f"trunk's {block_size} positions; use fewer shots")
    return data


def choose_settings(config, settings, before):
    """Those of `settings` that --settings names, or all, without those in `before`, which are measured."""
    wanted = config.settings.split(",") if config.settings else list(settings)
    for name in wanted:
        require(name in settings, f"settings={name!r} is unknown for {config.measure}; there are "
                f"{', '.join(settings)}")
    return {name: settings[name] for name in wanted if name not in before}


@torch.no_grad()
def sum_by_problem(model, data, settings, config):
    """For each setting {number: its sum over the targets of each problem}."""
    names = ["n", "right", "nll", "entropy", *(f"sampled {tau:g}" for tau in TEMPERATURES)]
    found = {setting: {name: [] for name in names} for setting in settings}
    tables = Tables(model) if model.path is not None else None
    n = len(data.groups)
    for start in tqdm(range(0, n, config.rows), disable=not sys.stderr.isatty()):
        ids = range(start, min(start + config.rows, n))
        idx, at, y, _ = load_batch(data, ids, model.trunk.wte.weight.device)
        c = model.read_context(idx, at)
        group = torch.full_like(y, model.no_group)
        for setting, sampler in settings.items():
            logits = predict(model, tables, c, group, sampler, config.seed * 1_000_003 + start)
            values = torch.cat([torch.ones(1, len(y)), judge_at_temperatures(logits, y)]).double()
            sums = torch.zeros(len(names), len(ids), dtype=torch.float64).index_add_(1, at[0].cpu(), values)
            for name, of_problems in zip(names, sums.tolist()):
                found[setting][name] += [round(x, 6) for x in of_problems]
        print(f"{ids.stop} of {n} problems", flush=True)
    return found


def measure(config):
    """Write the sums over the targets of each problem, for each setting, to measured_SPLIT.json of a run."""
    model, encoding, checkpoint = load(config.measure, "best", config.device, config.dtype)
    data = read_problems(config, encoding, checkpoint["config"]["data_dir"], model.trunk.config.block_size)
    asked = {"split": config.split, "limit": config.limit, "shots": config.shots, "seed": config.seed,
             "rows": config.rows, "dtype": config.dtype, "weights_sha256": checkpoint["sha256"]}
    name = f"measured_{config.split}" + (f"_{config.shots}shots" if config.shots else "")
    name += f"_{config.dtype}" if config.dtype != Config.dtype else ""
    path = os.path.join(config.measure, f"{name}.json")
    before = read_before(path, asked)
    settings = list_settings(checkpoint, model.path is not None, config.shots)
    settings = choose_settings(config, settings, before)
    if not settings:
        print(f"{path} has it all")
        return
    found = sum_by_problem(model, data, settings, config)
    for setting, sums in found.items():
        means = [f"{name} {sum(values) / sum(sums['n']):.4f}" for name, values in sums.items() if name != "n"]
        print(setting, *means)
    record = asked | {"training": checkpoint["config"], "val_loss": checkpoint["best_val_loss"],
                      "sums": before | found} | provenance(model.trunk.wte.weight.device)
    write_json(path, record, levels=3)


def read_before(path, asked):
    """The sums of settings that were measured before, on the same weights and problems: they are kept."""
    if not os.path.exists(path):
        return {}
    with open(path) as file:
        record = json.load(file)
    return record["sums"] if all(record.get(key) == value for key, value in asked.items()) else {}


# ------------------------------------------------------------------------------------------- comparing
class Bootstrap:
    """95% intervals of ratios sum(values) / sum(n) over problems drawn with replacement, always the same."""
    def __init__(self, n, repeats=10_000):
        generator = np.random.default_rng(0)
        problems = len(n)
        draws = generator.integers(problems, size=(repeats, problems))
        self.counts = np.zeros((repeats, problems))
        np.add.at(self.counts, (np.arange(repeats)[:, None], draws), 1)
        self.n = np.asarray(n)

    def ratio(self, values):
        """The ratio and the ends of its interval: (3,)."""
        values = np.asarray(values)
        drawn = self.counts @ values / (self.counts @ self.n)
        return [float(values.sum() / self.n.sum()), *map(float, np.quantile(drawn, [0.025, 0.975]))]


def read_runs(config):
    """{kind: {seed: what measure wrote}}. The trunk after examples is the kind five_shot."""
    runs = {}
    for path in sorted(glob.glob(os.path.join(config.root, "*", f"measured_{config.split}*.json"))):
        with open(path) as file:
            record = json.load(file)
        if (record["limit"], record.get("dtype", "bfloat16")) != (config.limit, config.dtype):
            continue
        kind, _, seed = Path(path).parent.name.rpartition("_s")
        kind = "five_shot" if record["shots"] else kind
        runs.setdefault(kind, {})[int(seed)] = record
    require(runs, f"no run in {config.root} has been measured on {config.limit} problems of {config.split}; "
            "start with --measure=RUN")
    return runs


def compare(runs):
    """Rows for the JSON: of every kind and setting the mean over seeds of each number, with its interval."""
    n = next(iter(next(iter(runs.values())).values()))["sums"]["T=1"]["n"]
    bootstrap = Bootstrap(n)
    means = {}                      # {(kind, setting, number): (problems,), the mean over seeds}
    rows = []
    for kind, by_seed in runs.items():
        for setting in dict.fromkeys(setting for record in by_seed.values() for setting in record["sums"]):
            seeds = [seed for seed, record in by_seed.items() if setting in record["sums"]]
            of_seeds = [by_seed[seed]["sums"][setting] for seed in seeds]
            assert all(sums["n"] == n for sums in of_seeds), "runs were measured on other problems"
            row = {"kind": kind, "setting": setting, "seeds": seeds}
            for name in of_seeds[0]:
                if name == "n":
                    continue
                each = np.array([sums[name] for sums in of_seeds])           # (seeds, problems)
                means[kind, setting, name] = each.mean(0)
                row[name] = bootstrap.ratio(each.mean(0))
                row[f"{name} of seeds"] = (each.sum(1) / sum(n)).tolist()
            rows.append(row)
    return rows, means, bootstrap


def list_pairs(kind, settings):
    """The pairs (what, (kind, setting, number), the same of what is subtracted) that the claims are about."""
    for number in ("right", "sampled 1", "nll", "entropy"):
        for setting in settings:
            base = setting.partition("T=")[0] + ("T=3" if setting.startswith("midpoint") else "T=2")
            if setting not in ("T=1", base):
                yield f"{number}: {setting} minus {base}", (kind, setting, number), (kind, base, number)
        for many, few in (("T=32", "T=16"), ("midpoint T=15", "midpoint T=7"),
                          ("T=16", f"T=2 to t={LAST:.4g}"), ("T=16", f"T=4 to t={LAST:.4g}"),
                          ("T=16 to t=0.75", "T=4"), ("T=16 to t=0.875", "T=8")):
            yield f"{number}: {many} minus {few}", (kind, many, number), (kind, few, number)
    if kind != "l2d":
        for number in ("right", "sampled 1", "nll", "entropy"):
            for setting in [setting for setting in settings if setting != "T=1"]:     # the trunk is the same
                yield f"{number}: {setting} minus l2d's", (kind, setting, number), ("l2d", setting, number)
    for setting in ("T=16", "midpoint T=15"):
        many = kind, setting, "sampled 1"
        yield f"{setting} at temperature 1 minus T=2 greedy", many, (kind, "T=2", "right")
        for tau in TEMPERATURES[1:]:
            few = kind, "T=2", f"sampled {tau:g}"
            yield f"{setting} at temperature 1 minus T=2 at temperature {tau:g}", many, few
            yield f"{setting} minus T=2, both at temperature {tau:g}", (kind, setting, few[2]), few
    for control in CONTROLS:
        yield f"{control} minus T=2, greedy", (control, "T=1", "right"), (kind, "T=2", "right")
        yield f"{control} minus T=16, sampled", (control, "T=1", "sampled 1"), (kind, "T=16", "sampled 1")


def list_differences(rows, means, bootstrap):
    """The differences of list_pairs, problem by problem: [(what, [difference, lower end, upper end])].

    Settings of one kind are compared where the same seeds have both.
    """
    seeds = {(row["kind"], row["setting"]): row["seeds"] for row in rows}
    found = []
    kinds = sorted({kind for kind, _, _ in means} - set(CONTROLS), key=list(KINDS).index)
    for kind in kinds:
        settings = list(dict.fromkeys(setting for other, setting, _ in means if other == kind))
        for what, a, b in list_pairs(kind, settings):
            if a in means and b in means and (a[0] != b[0] or seeds[a[:2]] == seeds[b[:2]]):
                found.append((f"{kind}, {what}", bootstrap.ratio(means[a] - means[b])))
    return found


def print_tables(rows, differences):
    names = ["right", "sampled 1", "nll", "entropy", "sampled 0.7", "sampled 0.5", "sampled 0.3"]
    print("| | T | seeds | greedy | sampled | NLL | entropy | at 0.7 | at 0.5 | at 0.3 |")
    print("|---" * 10 + "|")
    for row in rows:
        cells = ["{:.3f} [{:.3f}, {:.3f}]".format(*row[name]) for name in names]
        setting = row["setting"].replace("T=", "")
        print(f"| {KINDS[row['kind']]} | {setting} | {len(row['seeds'])} | {' | '.join(cells)} |")
    print("\n| difference | [95%] |\n|---|---|")
    for what, (value, low, high) in differences:
        print(f"| {what} | {value:+.4f} [{low:+.4f}, {high:+.4f}] |")


def draw(rows, differences, path):
    """Left: accuracy against T, with T = 2 at lower temperatures, the trunk, and the controls as lines.

    Right: the differences from T = 2 of the same problems, whose intervals are much narrower.
    """
    of_l2d = {row["setting"]: row for row in rows if row["kind"] == "l2d"}
    require(of_l2d, "the figure shows L2D against its controls, but no run l2d_sSEED has been measured")
    plt = pyplot("experiments/smollm2.py")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    trunk = of_l2d["T=1"]
    for number, line, color, how in (("right", "-", "C0", "greedy"), ("sampled 1", "--", "C1", "sampled")):
        left.plot(1, trunk[number][0], "*", color=color, markersize=9, label=f"trunk, {how}")
        for prefix, marker, name, steps in (("T=", "o", "L2D", STEPS[1:]),
                                            ("midpoint T=", "s", "authors' solver", MIDPOINT)):
            fill = "full" if marker == "o" else "none"
            values = np.array([of_l2d[f"{prefix}{T}"][number] for T in steps])
            left.plot(steps, values[:, 0], marker + line, color=color, fillstyle=fill, markersize=5,
                      label=f"{name}, {how}")
            base = f"{prefix}{steps[0]}"
            found = [differences[f"l2d, {number}: {prefix}{T} minus {base}"] for T in steps[1:]]
            values = np.array(found)                                         # (steps, 3)
            bars = abs(values[:, 1:] - values[:, :1]).T
            right.errorbar(steps[1:], values[:, 0], bars, fmt=marker + line, color=color, fillstyle=fill,
                           capsize=2, markersize=5, label=f"{name}, {how}, minus T = {steps[0]}")
    for tau in TEMPERATURES[1:]:
        value = of_l2d["T=2"][f"sampled {tau:g}"][0]
        left.plot(2, value, "_", color="C1", markersize=14)
        left.annotate(f"{tau:g}", (2, value), (8, -3), fontsize=8, textcoords="offset points", color="C1")
    for row, color in zip([row for row in rows if row["kind"] in CONTROLS], ("C7", "C2", "C3")):
        for number, line, how in (("right", "-", "greedy"), ("sampled 1", ":", "sampled")):
            left.axhline(row[number][0], color=color, ls=line, lw=1, label=f"{KINDS[row['kind']]}, {how}")
    right.axhline(0, color="black", lw=0.5)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(STEPS, STEPS)
        axes.set(xlabel="T (evaluations per token)")
        axes.legend(fontsize=7)
    n_seeds = len(trunk["seeds"])
    left.set(ylabel="accuracy of a token, teacher-forced",
             title=f"SmolLM2-135M on GSM8K, seeds: {n_seeds}\nmarks at T = 2: lower temperatures")
    right.set(ylabel="difference", title="the same, paired by problem, 95% intervals")
    figure.savefig(path, dpi=110)


def main(argv=None):
    config = configure(Config, argv, __doc__)
    if config.measure:
        measure(config)
        return
    runs = read_runs(config)
    rows, means, bootstrap = compare(runs)
    differences = list_differences(rows, means, bootstrap)
    print_tables(rows, differences)
    kept = ("command", "commit", "torch", "machine", "weights_sha256", "training", "val_loss")
    made = {f"{kind}_s{seed}": {key: record[key] for key in kept}
            for kind, by_seed in runs.items() for seed, record in by_seed.items()}
    result = {"split": config.split, "limit": config.limit, "runs": made, "rows": rows,
              "differences": [{"what": what, "value": value} for what, value in differences]}
    write_json(f"{config.out}.json", result, levels=2)
    draw(rows, dict(differences), f"{config.out}.png")


if __name__ == "__main__":
    run(main)
