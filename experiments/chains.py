"""
Do steps help where a token needs depth? The end of a chain, from a trunk that was taught two links of it; about an
hour on two CPU cores.

    export PYTHONPATH=.
    python experiments/chains.py --method=trunk             # 14 minutes; then, for the seeds 0, 1, 2:
    python experiments/chains.py --method=unrolled --seed=0 # L2D trained through Algorithm 1, 5 minutes
    python experiments/chains.py --method=truth --seed=0    # L2D as in the paper, x_t from the truth
    python experiments/chains.py --method=lora --seed=0     # the controls, as many trained parameters
    python experiments/chains.py --method=full --seed=0
    python experiments/chains.py --method=table             # prints the table, writes chains.json and chains.png

A sequence shows seven of twenty names, each with the one it leads to ("a b ;"), the last of a chain with itself, in
random order; then it asks four times for the end of a chain ("? a = c"). The trunk learns chains of up to two
links, asked for the next name or the last; the task has up to six. Only the name after "=" counts. Nothing is
chosen on the test sequences, whose generator has a seed of its own.
"""
import json
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import diffusion
from configurator import UserError, configure, run
from diffusion import Sampler, teacher_forced
from model import GPT, L2D, DiffusionPath, GPTConfig, PathConfig
from report import commit, mcnemar, pyplot

N_NAMES, N_SHOWN, N_ASKED, N_TEST = 20, 7, 4, 1000
TEST_SEED = 31415                           # what the settings were chosen on had another (docs/LOG.md)
SEMICOLON, LAST, EQUALS, NEXT, VOCAB = 100, 101, 102, 103, 112
T_BEGIN, T_END, MOST_CALLS = 0.5, 0.9, 31     # the grid of the unrolled path, in training and after, and its calls in training
UNROLLED = dict(guess="mean", t_begin=T_BEGIN, t_end=T_END)     # how it is sampled
METHODS = {"unrolled": "L2D, trained through Algorithm 1", "truth": "L2D, x_t from the truth", "lora": "LoRA on the trunk", "full": "full finetuning"}
OUT = Path("out/chains")


@dataclass(frozen=True)
class Config:
    method: Literal["trunk", "unrolled", "truth", "lora", "full", "table"] = "table"
    seed: int = 0
    steps: int = 0                  # optimizer steps; 0: 6000 of 64 sequences for the trunk, else 1200 of 32


def sequence(rng, most_links, next_too):
    """Token ids, targets (-1 where none counts), and how many links each of the answers takes."""
    names = left = rng.sample(range(N_NAMES), N_SHOWN)
    pairs, end, following, links = [], {}, {}, {}
    while left:
        chain = left[:rng.randint(0, most_links) + 1]
        left = left[len(chain):]
        for i, name in enumerate(chain):
            following[name], end[name], links[name] = chain[min(i + 1, len(chain) - 1)], chain[-1], len(chain) - 1 - i
            pairs.append((name, following[name]))
    rng.shuffle(pairs)
    idx = [token for pair in pairs for token in (*pair, SEMICOLON)]
    targets, asked = [-1] * len(idx), sorted(rng.sample(names, N_ASKED), key=lambda _: rng.random())
    for name in asked:
        is_next = next_too and rng.random() < 0.5
        answer = following[name] if is_next else end[name]
        idx += [NEXT if is_next else LAST, name, EQUALS, answer]
        targets += [-1, -1, answer, -1]
    return idx, targets, [links[name] for name in asked]


def batch(rng, n, most_links=6, next_too=False):
    """n sequences: idx, targets (n, T), and the links of the N answers (N,)."""
    return [torch.tensor(z) for z in zip(*(sequence(rng, most_links, next_too) for _ in range(n)))]


def make_model(method):
    trunk = GPT(GPTConfig(96, VOCAB, n_layer=3, n_head=4, n_embd=128))
    model = L2D(trunk)                                      # freezes the trunk
    if method == "trunk":
        trunk.requires_grad_(True)
        return model
    if not (OUT / "trunk.pt").exists():
        raise UserError(f"error: no {OUT / 'trunk.pt'}; make it first: python experiments/chains.py --method=trunk")
    trunk.load_state_dict(torch.load(OUT / "trunk.pt", weights_only=True))
    trunk.requires_grad_(method == "full")
    if method == "lora":
        trunk.add_lora(112, 112.0)
    if method in ("unrolled", "truth"):
        path_config = PathConfig(x_dim=64, t_dim=64, sigma=1.0 if method == "unrolled" else 4.0)
        model = L2D(trunk, DiffusionPath(trunk, path_config, n_labels=1))
    return model


def train(config, model):
    """Adam, linear warm-up over 100 steps and decay to a tenth; a new batch each step."""
    trunk = config.method == "trunk"
    steps, size = config.steps or (6000 if trunk else 1200), 64 if trunk else 32
    rng, generator = random.Random(1 if trunk else 7 * config.seed + 2), torch.Generator().manual_seed(config.seed)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, betas=(0.9, 0.95), weight_decay=0.01)
    start, mean = time.time(), 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = (5e-4 if config.method == "full" else 1e-3) * min(1, (step + 1) / 100) * (1 - 0.9 * step / steps)
        idx, targets, _ = batch(rng, size, *((2, True) if trunk else ()))
        at, t, x_0, unroll = (targets >= 0).nonzero(as_tuple=True), None, None, None
        if model.path:
            t, x_0 = diffusion.draw(size * N_ASKED, model.path.config, generator)
        if config.method == "unrolled":
            unroll = diffusion.draw_times(MOST_CALLS, T_BEGIN, T_END, generator), 0.0      # Euler
        label = torch.full((size,), model.no_label)
        loss = diffusion.nll(model, idx, at, targets[at], label, t, x_0, unroll).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean += (loss.item() - mean) / min(step + 1, 50)
        if (step + 1) % 100 == 0:
            print(f"{config.method} seed {config.seed}: step {step + 1}/{steps}  loss {mean:.4f}  {time.time() - start:.0f} s", flush=True)


def samplers(method):
    """{name: [Sampler]}: how a method is tested."""
    if method == "unrolled":
        return {"": [Sampler(steps=T, **UNROLLED) for T in (1, 2, 3, 4, 8, 16, 32)]}
    if method == "truth":       # with T = 2 the one call is at t_end: early it sees next to nothing, late only the trunk's guess
        grids = {f", to t = {t_end}": dict(t_end=t_end) for t_end in (0.25, 0.9)}
        grids[", mean guess, from t = 0.5 to 0.9"] = UNROLLED
        return {name: [Sampler(steps=T, **grid) for T in (1, 2, 4, 16, 32)] for name, grid in grids.items()}
    return {"": [Sampler(steps=1)]}


@torch.no_grad()
def test(config, model):
    """{name: {T: which of the N_TEST * N_ASKED answers are right}}, and the links of each."""
    rng, results, links = random.Random(TEST_SEED), {}, []
    for start in range(0, N_TEST, 250):
        idx, targets, n_links = batch(rng, 250)
        links += n_links.flatten().tolist()
        for name, each in samplers(config.method).items():
            for sampler in each:
                at = (targets >= 0).nonzero(as_tuple=True)
                logits, _ = teacher_forced(model, idx, at, sampler, torch.Generator().manual_seed(start))
                right = (logits.argmax(-1) == targets[at]).int().tolist()
                results.setdefault(name, {}).setdefault(sampler.steps, []).extend(right)
    return results, links


def over_seeds(runs):
    """A table's rows of one condition from [{T: [0 or 1]}], one of each seed: share right, links, gained and lost sequences."""
    per_sequence = lambda T: [sum(run[T][i + j] for run in runs for j in range(N_ASKED)) for i in range(0, N_TEST * N_ASKED, N_ASKED)]
    def versus(T, other):
        if T <= other or other not in runs[0]:
            return None
        gained, lost, p = mcnemar(per_sequence(other), per_sequence(T))
        return {"gained": gained, "lost": lost, "p": p}
    return [{"steps": T, "right": [sum(run[T]) / len(run[T]) for run in runs], "vs_1": versus(T, 1), "vs_2": versus(T, 2)} for T in runs[0]]


def table():
    """Print the table, write its JSON and draw it."""
    groups, links, steps = {}, None, None
    for method, title in METHODS.items():
        files = sorted(OUT.glob(f"{method}_s*.json"))
        loaded = [json.loads(file.read_text()) for file in files]
        for file, run in zip(files, loaded):
            if links is None:
                links, steps = run["links"], run["steps"]
            if (run["links"], run["steps"]) != (links, steps):
                raise UserError(f"error: {file} was tested on other sequences than the runs before it, or trained with another --steps; move it away")
        for name in loaded[0]["right"] if loaded else []:
            runs = [{int(T): right for T, right in run["right"][name].items()} for run in loaded]
            rows = over_seeds(runs)
            for row in rows:
                row["by_links"] = [sum(run[row["steps"]][i] for run in runs for i, n in enumerate(links) if n == k) / links.count(k) / len(runs)
                                   for k in range(max(links) + 1)]
            groups[title + name] = {"seeds": [run["seed"] for run in loaded], "seconds": [run["seconds"] for run in loaded], "rows": rows}
    print(f"Answers by links 0 to 6: {[links.count(k) for k in range(7)]} of {N_TEST * N_ASKED} in {N_TEST} sequences\n")
    print("| | T | right | each seed | sequences gained / lost, p vs T = 1 | vs T = 2 | by links, 0 to 6 |\n" + "|---" * 7 + "|")
    show = lambda v: f"{v['gained']} / {v['lost']}, {v['p']:.2g}" if v else ""
    for name, group in groups.items():
        for row in group["rows"]:
            mean = sum(row["right"]) / len(row["right"])
            spread = f" ± {statistics.stdev(row['right']):.3f}" if len(row["right"]) > 1 else ""
            print(f"| {name} | {row['steps']} | {mean:.3f}{spread} | {', '.join(f'{x:.3f}' for x in row['right'])} | {show(row['vs_1'])} | "
                  f"{show(row['vs_2'])} | {' '.join(f'{x:.2f}' for x in row['by_links'])} |")
    Path("experiments/chains.json").write_text(json.dumps(groups, indent=1))
    figure, axes = pyplot("--method=table").subplots(figsize=(7, 4.5), layout="constrained")
    for i, (name, group) in enumerate(groups.items()):
        steps, right = [row["steps"] for row in group["rows"]], [row["right"] for row in group["rows"]]
        means = [sum(r) / len(r) for r in right]
        if len(steps) == 1:
            axes.axhline(means[0], color=f"C{i}", linestyle="--", label=name)
            axes.axhspan(min(right[0]), max(right[0]), color=f"C{i}", alpha=0.15)
        else:
            axes.errorbar(steps, means, [[abs(m - end(r)) for m, r in zip(means, right)] for end in (min, max)], marker="o", capsize=3, color=f"C{i}", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 2, 4, 8, 16, 32], [1, 2, 4, 8, 16, 32])
    axes.set(xlabel="steps T (evaluations per token)", ylabel=f"right answers (n = {N_TEST * N_ASKED}; bars: seeds)")
    axes.legend()
    figure.savefig("experiments/chains.png", dpi=110)


def main(argv=None):
    config = configure(Config, argv, __doc__)
    if config.method == "table":
        return table()
    torch.set_num_threads(1)        # two runs side by side
    torch.manual_seed(config.seed)
    OUT.mkdir(parents=True, exist_ok=True)
    model, start = make_model(config.method), time.time()
    train(config, model)
    trained, file = (model.trunk, "trunk.pt") if config.method == "trunk" else (model, f"{config.method}_s{config.seed}.pt")
    torch.save(trained.state_dict(), OUT / file)
    right, links = test(config, model)
    run = {"method": config.method, "seed": config.seed, "steps": config.steps, "seconds": round(time.time() - start), "command": " ".join(sys.argv),
           "commit": commit(), "links": links, "right": right}
    (OUT / f"{config.method}_s{config.seed}.json").write_text(json.dumps(run))
    for name, each in right.items():
        print(config.method, config.seed, name, {T: round(sum(r) / len(r), 3) for T, r in each.items()})


if __name__ == "__main__":
    run(main)
