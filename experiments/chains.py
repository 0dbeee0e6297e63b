"""
Steps that pay: the end of a chain of links, from a trunk that was taught one link.

    export PYTHONPATH=.
    python experiments/chains.py                            # seed 0: trunk, L2D, controls, table and figure
    python experiments/chains.py --method=l2d --seed=1      # one of them
    python experiments/chains.py --method=trace --seed=0    # one token on its way along its chain

A sequence shows ten of twenty names, each with the one it leads to ("a b ;"), the last of a chain with
itself, in random order. Then it asks four times for the end of a chain ("? a = e"). Chains have up to nine
links. Only the name after "=" counts.

L2D is trained through Algorithm 1 in two runs: on chains of at most three links with up to four path calls,
then on all with up to sixteen. Controls see the same sequences in the same order: LoRA and full finetuning of
the trunk, and the trunk's blocks applied four or eight times (a model of fixed depth, finetuned in full).
"as long": the same on about as much training time as L2D takes. "at most 5 links": L2D and fixed depth that
never see a longer chain in training; l2d_long does so in three runs, for 12,000 steps. Nothing is chosen on
the test sequences: their seed is their own.
"""
import json
import random
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import diffusion
from batches import draw_unroll
from configurator import UserError, configure, run
from denoiser import Denoiser, Tables
from diffusion import Sampler, predict, teacher_forced
from exam.report import commit, mcnemar, pyplot
from model import GPT, L2D, DiffusionPath, GPTConfig, PathConfig

N_NAMES, N_SHOWN, N_ASKED, MOST_LINKS, N_TEST, TEST_SEED = 20, 10, 4, 9, 1000, 27182
SEMICOLON, LAST, EQUALS, VOCAB = 100, 101, 102, 112
TRUNK = GPTConfig(block_size=96, vocab_size=VOCAB, n_layer=2, n_head=4, n_embd=128)
PATH = PathConfig(x_dim=64, t_dim=64, sigma=0.5, time_scale=30.0)
HOW = dict(solver="fixed_point", guess="mean")
PHASES = [(1000, 3, 4), (3000, 9, 16)]      # optimizer steps, most links, most path calls
LONG = [(1000, 3, 4), (3000, 5, 8), (8000, 5, 12)]
STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64)
METHODS = {"l2d": "L2D", "lora": "LoRA on the trunk", "full": "full finetuning",
           "full_time": "full finetuning, as long", "loop4": "blocks applied 4 times",
           "loop4_time": "blocks applied 4 times, as long", "loop8": "blocks applied 8 times",
           "l2d_5": "L2D, at most 5 links", "loop4_5": "blocks applied 4 times, at most 5 links",
           "l2d_long": "L2D, at most 5 links, 12,000 steps", "full_long": "full finetuning, as long as that",
           "loop4_long": "blocks applied 4 times, as long as that",
           "loop8_long": "blocks applied 8 times, as long as that"}
LENGTH = {"full_time": 1.6, "loop4_time": 0.4,      # factor on the optimizer steps: seconds of L2D / its own
          "full_long": 5.1, "loop4_long": 1.26, "loop8_long": 0.56}
OUT, HERE = Path("out/chains"), Path(__file__).parent


@dataclass(frozen=True)
class Config:
    method: Literal["all", "trunk", "table", "trace", *METHODS] = "all"
    seed: int = 0
    links: int = 7                  # trace: of the chain that is followed
    steps: int = 16                 # trace: T


def sequence(rng, most_links):
    """Token ids, where they are asked (columns), the answers, and how many links each takes."""
    names = left = rng.sample(range(N_NAMES), N_SHOWN)
    pairs, end, links = [], {}, {}
    while left:
        n = rng.randint(0, most_links) + 1
        chain, left = left[:n], left[n:]
        for i, name in enumerate(chain):
            pairs.append((name, chain[min(i + 1, len(chain) - 1)]))
            end[name], links[name] = chain[-1], len(chain) - 1 - i
    rng.shuffle(pairs)
    idx = [token for pair in pairs for token in (*pair, SEMICOLON)]
    columns, asked = [], sorted(rng.sample(names, N_ASKED), key=lambda _: rng.random())
    for name in asked:
        columns.append(len(idx) + 2)
        idx += [LAST, name, EQUALS, end[name]]
    return idx, columns, [end[name] for name in asked], [links[name] for name in asked]


def batch(rng, n, most_links=MOST_LINKS):
    """n sequences: idx (n, T); at = (rows, columns), each (4 n,); answers y (4 n,); their links, a list."""
    idx, columns, y, links = zip(*(sequence(rng, most_links) for _ in range(n)))
    at = torch.arange(n).repeat_interleave(N_ASKED), torch.tensor(columns).flatten()
    return torch.tensor(idx), at, torch.tensor(y).flatten(), sum(links, [])


class Looped(GPT):
    """The trunk with its blocks applied `times` times: a fixed depth."""
    times = 1

    def forward(self, idx, pos=None, cache=None, mask=None):
        x = self.wte(idx) + self.wpe(torch.arange(idx.size(1)))
        for _ in range(self.times):
            for block in self.h:
                x, _ = block(x)
        return x, []


def make_model(method, seed):
    torch.manual_seed(seed)
    trunk = (Looped if "loop" in method else GPT)(TRUNK)
    if method != "trunk":
        if not (OUT / "trunk.pt").exists():
            raise UserError(f"no {OUT / 'trunk.pt'}; python experiments/chains.py --method=trunk")
        trunk.load_state_dict(torch.load(OUT / "trunk.pt", weights_only=True))
    model = L2D(trunk, DiffusionPath(trunk, PATH, 0) if "l2d" in method else None)
    if method == "lora":
        trunk.add_lora(112, 112.0)
    elif model.path is None:
        trunk.requires_grad_(True)
        trunk.times = int(method[4]) if "loop" in method else 1
    return model


def train(model, method, seed):
    """AdamW; in each phase a linear warm-up over 100 steps and decay to a tenth; a new batch each step."""
    phases, limit = LONG if method == "l2d_long" else PHASES, 5 if method.endswith("_5") else MOST_LINKS
    phases = [(round(n * LENGTH.get(method, 1)), min(links, limit), calls) for n, links, calls in phases]
    rate, size = 1e-3 if model.path or method == "lora" else 5e-4, 32
    if method == "trunk":
        phases, rate, size = [(2000, 1, 0)], 1e-3, 64
    rng, generator = random.Random(7 * seed + 2), torch.Generator().manual_seed(seed)
    params, start = [p for p in model.parameters() if p.requires_grad], time.time()
    for steps, most_links, most_calls in phases:
        optimizer, mean = torch.optim.AdamW(params, betas=(0.9, 0.95), weight_decay=0.01), 0.0
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1, (step + 1) / 100) * (1 - 0.9 * step / steps)
            idx, at, y, _ = batch(rng, size, most_links)
            label, x_0, unroll = torch.full((size,), model.no_label), None, None
            if model.path:
                x_0 = diffusion.draw(len(y), PATH, generator)[1]
                unroll = draw_unroll(most_calls, generator)
            loss = diffusion.nll(model, idx, at, y, label, None, x_0, unroll).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            mean += (loss.item() - mean) / min(step + 1, 50)
            if (step + 1) % 200 == 0:
                print(f"{method} seed {seed}, up to {most_links} links: step {step + 1}/{steps}  "
                      f"loss {mean:.4f}  {time.time() - start:.0f} s", flush=True)


def test(model, seed=TEST_SEED, n=N_TEST, chunk=250):
    """{T: which of the answers are right, 0 or 1}, and the links of each."""
    rng, right, links = random.Random(seed), {}, []
    for start in range(0, n, chunk):
        idx, at, y, n_links = batch(rng, chunk)
        links += n_links
        for steps in STEPS if model.path else (1,):
            generator = torch.Generator().manual_seed(start)
            logits, _ = teacher_forced(model, idx, at, Sampler(steps=steps, **HOW), generator)
            right.setdefault(steps, []).extend((logits.argmax(-1) == y).int().tolist())
    return right, links


def make(method, seed):
    """Train, test, and keep both; what is there already is kept."""
    name = "trunk" if method == "trunk" else f"{method}_s{seed}"
    if (OUT / f"{name}.pt").exists():
        return
    model, start = make_model(method, seed), time.time()
    train(model, method, seed)
    seconds = time.time() - start
    right, links = test(model)
    record = {"method": method, "seed": seed, "seconds": round(seconds), "commit": commit(), "links": links,
              "right": right}
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / f"{name}.json").write_text(json.dumps(record))
    torch.save((model.trunk if method == "trunk" else model).state_dict(), OUT / f"{name}.pt")
    print(f"{name}: " + "  ".join(f"T={T} {sum(r) / len(r):.3f}" for T, r in right.items()), flush=True)


def per_sequence(runs, T):
    """Of each sequence, how many answers of all seeds are right."""
    starts = range(0, len(runs[0][T]), N_ASKED)
    return [sum(run[T][i + j] for run in runs for j in range(N_ASKED)) for i in starts]


def interval(a, b, n_seeds):
    """Mean and half of the 95% interval of b - a, shares of right answers, paired by sequence."""
    differences = [(y - x) / (N_ASKED * n_seeds) for x, y in zip(a, b)]
    return statistics.fmean(differences), 1.96 * statistics.stdev(differences) / len(differences) ** 0.5


def table():
    """Print the table, write its JSON and draw it."""
    groups, links = {}, None
    for method in METHODS:
        loaded = [json.loads(file.read_text()) for file in sorted(OUT.glob(f"{method}_s*.json"))]
        if not loaded:
            continue
        links = links or loaded[0]["links"]
        if any(record["links"] != links for record in loaded):
            raise UserError(f"the runs of {method} in {OUT} were tested on other sequences; move them")
        runs = [{int(T): r for T, r in record["right"].items()} for record in loaded]
        groups[method] = {"seeds": [r["seed"] for r in loaded], "runs": runs,
                          "seconds": [r["seconds"] for r in loaded]}
    print(f"answers by links 0 to {MOST_LINKS}: {[links.count(k) for k in range(MOST_LINKS + 1)]}\n")
    print("| | T | right | each seed | to the T before | gained / lost, p | by links, 0 to 9 |")
    print("|---" * 7 + "|")
    result = {}
    for method, group in groups.items():
        runs, before, rows = group["runs"], None, []
        for T in runs[0]:
            each = [sum(run[T]) / len(run[T]) for run in runs]
            by_links = [sum(run[T][i] for run in runs for i, n in enumerate(links) if n == k)
                        / links.count(k) / len(runs) for k in range(MOST_LINKS + 1)]
            versus = ["", ""]
            if before:
                a, b = per_sequence(runs, before), per_sequence(runs, T)
                (mean, half), (gained, lost, p) = interval(a, b, len(runs)), mcnemar(a, b)
                versus = [f"{mean:+.4f} ± {half:.4f}", f"{gained} / {lost}, {p:.2g}"]
            cells = [METHODS[method], str(T), f"{sum(each) / len(each):.3f}",
                     ", ".join(f"{x:.3f}" for x in each), *versus, " ".join(f"{x:.2f}" for x in by_links)]
            print(f"| {' | '.join(cells)} |")
            rows.append({"steps": T, "right": each, "by_links": by_links, "versus_before": versus})
            before = T
        result[METHODS[method]] = {k: group[k] for k in ("seeds", "seconds")} | {"rows": rows}
    versus_controls(groups, result)
    (HERE / "chains.json").write_text(json.dumps(result, indent=1))
    draw(result)


def versus_controls(groups, result):
    """T = 8 of L2D against each control that saw the same chains or took as long, paired by sequence, the
    seeds both have."""
    for method in [m for m in groups if "l2d" not in m]:
        ours = "l2d" + method[method.rindex("_"):] if method.endswith(("_5", "_long")) else "l2d"
        for ours in [ours, "l2d_long"] if method == "loop8" else [ours]:
            seeds = [s for s in groups[method]["seeds"] if ours in groups and s in groups[ours]["seeds"]]
            if seeds:
                a, b = ([group["runs"][group["seeds"].index(s)] for s in seeds]
                        for group in (groups[method], groups[ours]))
                mean, half = interval(per_sequence(a, 1), per_sequence(b, 8), len(seeds))
                result[METHODS[method]][f"{ours}_at_8_minus_this"] = [mean, half]
                print(f"{METHODS[ours]}, at T = 8 minus {METHODS[method]}, seeds {seeds}: "
                      f"{mean:+.4f} ± {half:.4f}")


def draw(result):
    """Right answers against T: a curve for each number of links, and a line for each of some controls."""
    figure, axes = pyplot("--method=table").subplots(figsize=(7, 4.5), layout="constrained")
    best = METHODS["l2d_long"] if METHODS["l2d_long"] in result else METHODS["l2d"]
    steps = [row["steps"] for row in result[best]["rows"]]
    for k in range(1, MOST_LINKS + 1, 2):
        shade = 0.85 - 0.08 * k
        axes.plot(steps, [row["by_links"][k] for row in result[best]["rows"]], lw=1,
                  color=(shade, shade, 1 - 0.04 * k), label=f"{k} link{'s' * (k > 1)}")
    for i, method in enumerate("l2d_long l2d lora full loop4_5 loop4 loop8_long loop8".split()):
        name = METHODS[method]
        mean = [sum(row["right"]) / len(row["right"]) for row in result.get(name, {"rows": []})["rows"]]
        if len(mean) == 1:
            axes.axhline(mean[0], color=f"C{i}", ls="--", lw=1, label=name)
        elif mean:
            axes.plot(steps, mean, "o-", color=f"C{i}", lw=2.5 if name == best else 1, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(STEPS, STEPS)
    axes.set(xlabel="steps T (evaluations per token)", ylabel="share of right answers", ylim=(0.38, 1.02))
    axes.legend(fontsize=7, loc="lower right", ncols=2)
    figure.savefig(HERE / "chains.png", dpi=110)


@torch.no_grad()
def trace(seed, n_links, steps):
    """Print the guesses of one answer that takes n_links links, at each evaluation."""
    model, rng, letters = make_model("l2d", seed), random.Random(TEST_SEED + 1), "abcdefghijklmnopqrst"
    model.load_state_dict(torch.load(OUT / f"l2d_s{seed}.pt", weights_only=True))
    while True:
        idx, at, y, links = batch(rng, 1)
        if n_links in links:
            i = links.index(n_links)
            break
    c, sampler = model.read(idx, (at[0][i:i + 1], at[1][i:i + 1])), Sampler(steps=steps, **HOW)
    leads = dict(zip(idx[0, 0:30:3].tolist(), idx[0, 1:30:3].tolist()))
    chain = [idx[0, at[1][i] - 1].item()]
    while leads[chain[-1]] != chain[-1]:
        chain.append(leads[chain[-1]])
    x_0 = diffusion.draw(1, PATH, torch.Generator().manual_seed(0))[1]
    f = Denoiser(model, sampler, Tables(model), c, torch.zeros(1, dtype=torch.long), x_0, trace=True)
    predict(f)
    print("chain:   " + " -> ".join(letters[name] for name in chain))
    print("guesses: " + " ".join(letters[guess] if guess < 20 else "?" for _, guess, _ in f.trace[0]))


def main(argv=None):
    config = configure(Config, argv, __doc__)
    if config.method == "trace":
        return trace(config.seed, config.links, config.steps)
    if config.method == "table":
        return table()
    torch.set_num_threads(1)                                  # the same numbers on any machine of this kind
    make("trunk", 0)                                          # kept, if it is there
    if config.method != "all":
        return make(config.method, config.seed)
    with ProcessPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for done in [pool.submit(make, m, config.seed) for m in ("loop4", "l2d", "lora", "full")]:
            done.result()
    table()


if __name__ == "__main__":
    run(main)
