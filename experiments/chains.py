"""
Steps that pay: the end of a chain of links, from a trunk that was taught one link.

    python experiments/chains.py                            # seed 0: trunk, L2D, controls, table and figure
    python experiments/chains.py --method=l2d --seed=1      # one of them
    python experiments/chains.py --method=trace --seed=0    # one token on its way along its chain

The task. A sequence shows ten of twenty names in random order, each with the name that it leads to
("a b ;"). The last name of a chain leads to itself. Then the sequence asks four times for the end of a chain
("? a = e"). Chains have up to nine links. Only the name after "=" counts.

The methods. L2D is trained through Algorithm 1 in two phases: on chains of at most three links with up to
four path calls, then on all chains with up to sixteen. Controls see the same sequences in the same order.
They are a LoRA on the trunk, full finetuning of the trunk, and the trunk's blocks applied four or eight
times, which is a model of fixed depth. In METHODS below:
    _time   the same control, for about as much training time as L2D takes
    _5      trained on chains of at most five links
    _long   l2d_long is trained on at most five links, in three phases of 12,000 steps together; the controls
            of that name are trained on all chains, for about as much time as l2d_long
Nothing is chosen on the test sequences: they have a seed of their own.
"""
import json
import random
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))    # the project's folder

import diffusion
from bench.compact_json import write_json
from configurator import UserError, configure, run
from decode import predict_given
from diffusion import UNROLLED, Denoiser, SamplerConfig, Tables
from model import GPT, L2D, DiffusionPath, GPTConfig, PathConfig
from plumbing.provenance import commit, pyplot
from tasks.report import mcnemar

# the task
N_NAMES = 20
N_SHOWN = 10                        # names of a sequence
N_ASKED = 4                         # questions of a sequence
MOST_LINKS = 9
N_TEST = 1000                       # test sequences
TEST_SEED = 27182
SEMICOLON, LAST, EQUALS, VOCAB = 100, 101, 102, 112                # token ids; a name is its number

# models and training
TRUNK = GPTConfig(block_size=96, vocab_size=VOCAB, n_layer=2, n_head=4, n_embd=128)
PATH = PathConfig(x_dim=64, t_dim=64, sigma=0.5, time_scale=30.0)
PHASES = [(1000, 3, 4), (3000, 9, 16)]  # optimizer steps, most links, most path calls
LONG = [(1000, 3, 4), (3000, 5, 8), (8000, 5, 12)]
METHODS = {
    "l2d": "L2D",
    "lora": "LoRA on the trunk",
    "full": "full finetuning",
    "full_time": "full finetuning, as long",
    "loop4": "blocks applied 4 times",
    "loop4_time": "blocks applied 4 times, as long",
    "loop8": "blocks applied 8 times",
    "l2d_5": "L2D, at most 5 links",
    "loop4_5": "blocks applied 4 times, at most 5 links",
    "l2d_long": "L2D, at most 5 links, 12,000 steps",
    "full_long": "full finetuning, as long as that",
    "loop4_long": "blocks applied 4 times, as long as that",
    "loop8_long": "blocks applied 8 times, as long as that",
}
# Factor on the optimizer steps: seconds of L2D (of l2d_long) divided by those of the control.
LENGTH = {"full_time": 1.6, "loop4_time": 0.4, "full_long": 5.1, "loop4_long": 1.26, "loop8_long": 0.56}
STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64)                         # values of T in the test
OUT = Path("out/chains")
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Config:                       # `--help` prints the comments of this class
    method: Literal["all", "trunk", "table", "trace", *METHODS] = "all"
    seed: int = 0
    links: int = 7                  # trace: links of the chain that is followed
    steps: int = 16                 # trace: T


# -------------------------------------------------------------------------------------------- the task
def draw_sequence(rng, most_links):
    """Draw a sequence: token ids, the columns of its questions' "=", their answers, and the links of each."""
    names = rng.sample(range(N_NAMES), N_SHOWN)
    left = names
    pairs = []
    end = {}
    links = {}
    while left:
        n = rng.randint(0, most_links) + 1
        chain = left[:n]
        left = left[n:]
        for i, name in enumerate(chain):
            pairs.append((name, chain[min(i + 1, len(chain) - 1)]))
            end[name] = chain[-1]
            links[name] = len(chain) - 1 - i
    rng.shuffle(pairs)
    idx = [token for a, b in pairs for token in (a, b, SEMICOLON)]
    columns = []
    asked = sorted(rng.sample(names, N_ASKED), key=lambda _: rng.random())
    for name in asked:
        columns.append(len(idx) + 2)
        idx += [LAST, name, EQUALS, end[name]]
    return idx, columns, [end[name] for name in asked], [links[name] for name in asked]


def draw_batch(rng, n, most_links=MOST_LINKS):
    """Draw n sequences: idx (n, S), and for 4 n answers at = (rows, columns), y, a list of links."""
    idx, columns, y, links = zip(*(draw_sequence(rng, most_links) for _ in range(n)))
    at = torch.arange(n).repeat_interleave(N_ASKED), torch.tensor(columns).flatten()
    return torch.tensor(idx), at, torch.tensor(y).flatten(), sum(links, [])


# ---------------------------------------------------------------------------------- models, training, test
class Looped(GPT):
    """The trunk with its blocks applied `times` times: a fixed depth."""
    times = 1

    def forward(self, idx, pos=None, cache=None, mask=None):
        h = self.wte(idx) + self.wpe(torch.arange(idx.size(1)))
        for _ in range(self.times):
            for block in self.h:
                h, _ = block(h)
        return h, []


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


def plan_training(method):
    """How a method is trained: its phases, as PHASES has them, its learning rate, and sequences per batch."""
    if method == "trunk":
        return [(2000, 1, 0)], 1e-3, 64
    limit = 5 if method.endswith("_5") else MOST_LINKS
    phases = [(round(n * LENGTH.get(method, 1)), min(most_links, limit), most_calls)
              for n, most_links, most_calls in (LONG if method == "l2d_long" else PHASES)]
    return phases, 1e-3 if "l2d" in method or method == "lora" else 5e-4, 32


def compute_loss(model, idx, at, y, most_calls, generator):
    """The mean loss over the answers. L2D: after Algorithm 1, with a random number of path calls."""
    if not model.path:
        return diffusion.trunk_nll(model, idx, at, y).mean()
    x_0 = diffusion.draw(len(y), model.path.config, generator)[1]
    group = torch.full((len(idx),), model.no_group)
    steps = diffusion.draw_steps(most_calls, generator)
    return diffusion.unrolled_nll(model, idx, at, y, group, x_0, steps).mean()


def train(model, phases, learning_rate, draw, seed, name, every=200, bfloat16=False):
    """Train with AdamW. In each phase the rate rises over 100 steps, but at most a quarter of the phase, and
    falls to a tenth of its peak.

    phases: as PHASES. draw(most_links): a batch, as draw_batch returns it. every: steps between two reports.
    bfloat16: whether the loss is computed under autocast.
    """
    generator = torch.Generator().manual_seed(seed)
    params = [p for p in model.parameters() if p.requires_grad]
    start = time.time()
    for max_iters, most_links, most_calls in phases:
        optimizer = torch.optim.AdamW(params, betas=(0.9, 0.95), weight_decay=0.01)
        warmup_iters = min(100, max(1, max_iters // 4))
        mean = 0.0
        for iter_num in range(max_iters):
            for param_group in optimizer.param_groups:
                decay = 1 - 0.9 * iter_num / max_iters
                param_group["lr"] = learning_rate * min(1, (iter_num + 1) / warmup_iters) * decay
            idx, at, y, _ = draw(most_links)
            # one context per step: autocast keeps its copies of the weights until the context ends
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                loss = compute_loss(model, idx, at, y, most_calls, generator)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            mean += (loss.item() - mean) / min(iter_num + 1, 50)
            if (iter_num + 1) % every == 0:
                print(f"{name}, up to {most_links} links: iter {iter_num + 1}/{max_iters}  loss {mean:.4f}  "
                      f"{time.time() - start:.0f} s", flush=True)


def test(model, steps, draw=draw_batch, seed=TEST_SEED, n=N_TEST, chunk=250):
    """Answer n test sequences with each T of steps.

    draw(rng, n): a batch, as draw_batch returns it. Returns {T: for each answer 1 if right, else 0}, and the
    links of each answer.
    """
    rng = random.Random(seed)
    right = {T: [] for T in steps}
    links = []
    for start in range(0, n, chunk):
        idx, at, y, n_links = draw(rng, chunk)
        links += n_links
        for T in steps:
            generator = torch.Generator().manual_seed(start)
            logits, _ = predict_given(model, idx, at, SamplerConfig(steps=T, **UNROLLED), generator)
            right[T] += (logits.argmax(-1) == y).int().tolist()
    return right, links


def make(method, seed):
    """Train, test, and keep both. What is there already is kept as it is."""
    name = "trunk" if method == "trunk" else f"{method}_s{seed}"
    if (OUT / f"{name}.pt").exists():
        return
    model = make_model(method, seed)
    phases, learning_rate, batch_size = plan_training(method)
    draw = partial(draw_batch, random.Random(7 * seed + 2), batch_size)
    start = time.time()
    train(model, phases, learning_rate, draw, seed, f"{method} seed {seed}")
    seconds = time.time() - start
    right, links = test(model, STEPS if model.path else (1,))
    record = {"method": method, "seed": seed, "seconds": round(seconds), "commit": commit(), "links": links,
              "right": right}
    write_json(OUT / f"{name}.json", record, levels=2)
    torch.save((model.trunk if method == "trunk" else model).state_dict(), OUT / f"{name}.pt")
    print(f"{name}: " + "  ".join(f"T={T} {sum(r) / len(r):.3f}" for T, r in right.items()), flush=True)


# ------------------------------------------------------------------------------------------- the table
@dataclass
class Runs:
    """The runs of one method, one for each seed."""
    seeds: list
    seconds: list                   # of training
    right: list                     # {T: for each answer 1 if right, else 0}

    def of(self, seeds):
        """`right` of these seeds."""
        return [self.right[self.seeds.index(seed)] for seed in seeds]


def read_runs():
    """{method: Runs} of all that is in OUT, and the links of each test answer."""
    found = {}
    links = None
    for method in METHODS:
        records = [json.loads(file.read_text()) for file in sorted(OUT.glob(f"{method}_s*.json"))]
        for record in records:
            links = links or record["links"]
            if record["links"] != links:
                raise UserError(f"the runs of {method} in {OUT} were tested on other sequences; move them")
        if records:
            right = [{int(T): r for T, r in record["right"].items()} for record in records]
            found[method] = Runs([r["seed"] for r in records], [r["seconds"] for r in records], right)
    if not found:
        raise UserError(f"no runs in {OUT}; make them with: python experiments/chains.py")
    return found, links


def count_per_sequence(runs, T):
    """For each sequence the number of right answers, of all seeds together. runs: a list as Runs.right."""
    starts = range(0, len(runs[0][T]), N_ASKED)
    return [sum(run[T][i + j] for run in runs for j in range(N_ASKED)) for i in starts]


def find_interval(a, b, n_seeds):
    """Mean of b - a, as shares of right answers paired by sequence, and half of its 95% interval."""
    differences = [(y - x) / (N_ASKED * n_seeds) for x, y in zip(a, b)]
    return statistics.fmean(differences), 1.96 * statistics.stdev(differences) / len(differences) ** 0.5


def make_rows(runs, links):
    """One row for each T, a dict; runs: a list as Runs.right."""
    rows = []
    before = None
    for T in runs[0]:
        each = [sum(run[T]) / len(run[T]) for run in runs]
        by_links = []
        for k in range(MOST_LINKS + 1):
            n_right = sum(run[T][i] for run in runs for i, n in enumerate(links) if n == k)
            by_links.append(n_right / links.count(k) / len(runs))
        versus = ["", ""]
        if before:
            a = count_per_sequence(runs, before)
            b = count_per_sequence(runs, T)
            mean, half = find_interval(a, b, len(runs))
            gained, lost, p = mcnemar(a, b)
            versus = [f"{mean:+.4f} ± {half:.4f}", f"{gained} / {lost}, {p:.2g}"]
        rows.append({"steps": T, "right": each, "by_links": by_links, "versus_before": versus})
        before = T
    return rows


def compare_with_controls(found, result):
    """T = 8 of L2D against each control that saw the same chains or took as long.

    Answers are paired by sequence, over the seeds that both have. The differences are printed and added to
    result.
    """
    for method in [method for method in found if "l2d" not in method]:
        suffix = method[method.rindex("_"):] if method.endswith(("_5", "_long")) else ""
        for ours in [f"l2d{suffix}", "l2d_long"] if method == "loop8" else [f"l2d{suffix}"]:
            seeds = [s for s in found[method].seeds if ours in found and s in found[ours].seeds]
            if not seeds:
                continue
            a = count_per_sequence(found[method].of(seeds), 1)
            b = count_per_sequence(found[ours].of(seeds), 8)
            mean, half = find_interval(a, b, len(seeds))
            result[METHODS[method]][f"{ours}_at_8_minus_this"] = [mean, half]
            print(f"{METHODS[ours]}, at T = 8 minus {METHODS[method]}, seeds {seeds}: "
                  f"{mean:+.4f} ± {half:.4f}")


def show_table():
    """Print the table, write it to chains.json, and draw it."""
    found, links = read_runs()
    print(f"answers by links 0 to {MOST_LINKS}: {[links.count(k) for k in range(MOST_LINKS + 1)]}\n")
    print("| | T | right | each seed | to the T before | gained / lost, p | by links, 0 to 9 |")
    print("|---" * 7 + "|")
    result = {}
    for method, runs in found.items():
        rows = make_rows(runs.right, links)
        for row in rows:
            each = row["right"]
            cells = [METHODS[method], str(row["steps"]), f"{sum(each) / len(each):.3f}",
                     ", ".join(f"{x:.3f}" for x in each), *row["versus_before"],
                     " ".join(f"{x:.2f}" for x in row["by_links"])]
            print(f"| {' | '.join(cells)} |")
        result[METHODS[method]] = {"seeds": runs.seeds, "seconds": runs.seconds, "rows": rows}
    compare_with_controls(found, result)
    write_json(HERE / "chains.json", result, levels=3)
    draw(result)


def draw(result):
    """Right answers against T: a curve for each number of links, and a line for each of some controls."""
    figure, axes = pyplot("--method=table").subplots(figsize=(7, 4.5), layout="constrained")
    best = METHODS["l2d_long"] if METHODS["l2d_long"] in result else METHODS["l2d"]
    steps = [row["steps"] for row in result[best]["rows"]]
    for k in range(1, MOST_LINKS + 1, 2):
        shade = 0.85 - 0.08 * k
        axes.plot(steps, [row["by_links"][k] for row in result[best]["rows"]], lw=1,
                  color=(shade, shade, 1 - 0.04 * k), label=f"{k} link{'s' if k > 1 else ''}")
    for i, method in enumerate("l2d_long l2d lora full loop4_5 loop4 loop8_long loop8".split()):
        name = METHODS[method]
        mean = [sum(row["right"]) / len(row["right"]) for row in result.get(name, {"rows": []})["rows"]]
        if len(mean) == 1:
            axes.axhline(mean[0], color=f"C{i}", ls="--", lw=1, label=name)
        elif mean:
            axes.plot(steps, mean, "o-", color=f"C{i}", lw=2.5 if name == best else 1, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(STEPS, STEPS)
    axes.set(xlabel="T (evaluations per token)", ylabel="share of right answers", ylim=(0.38, 1.02))
    axes.legend(fontsize=7, loc="lower right", ncols=2)
    figure.savefig(HERE / "chains.png", dpi=110)


# ------------------------------------------------------------------------------------------- the trace
@torch.no_grad()
def make_denoiser(cls, seed, n_links, steps, **options):
    """A denoiser, of the class cls, of one answer that takes n_links links; and the names of the chain."""
    model = make_model("l2d", seed)
    model.load_state_dict(torch.load(OUT / f"l2d_s{seed}.pt", weights_only=True))
    rng = random.Random(TEST_SEED + 1)
    links = []
    while n_links not in links:
        idx, at, _, links = draw_batch(rng, 1)
    i = links.index(n_links)
    row = at[0][i:i + 1]
    column = at[1][i:i + 1]
    leads_to = dict(zip(idx[0, 0:30:3].tolist(), idx[0, 1:30:3].tolist()))
    chain = [idx[0, column - 1].item()]
    while leads_to[chain[-1]] != chain[-1]:
        chain.append(leads_to[chain[-1]])

    c = model.read_context(idx, (row, column))
    x_0 = diffusion.draw(1, PATH, torch.Generator().manual_seed(0))[1]
    config = SamplerConfig(steps=steps, **UNROLLED)
    group = torch.zeros(1, dtype=torch.long)
    return cls(model, config, Tables(model), c, group, x_0, **options), chain


@torch.no_grad()
def trace(seed, n_links, steps):
    """Print the guesses of one answer that takes n_links links, one for each evaluation."""
    f, chain = make_denoiser(Denoiser, seed, n_links, steps, trace=True)
    f.predict()
    letters = "abcdefghijklmnopqrst"
    print("chain:   " + " -> ".join(letters[name] for name in chain))
    print("guesses: " + " ".join(letters[guess] if guess < N_NAMES else "?" for _, guess, _ in f.trace[0]))


def main(argv=None):
    config = configure(Config, argv, __doc__)
    if config.method == "trace":
        return trace(config.seed, config.links, config.steps)
    if config.method == "table":
        return show_table()
    torch.set_num_threads(1)        # for the same numbers on any machine of this kind
    make("trunk", 0)
    if config.method != "all":
        return make(config.method, config.seed)
    with ProcessPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        jobs = [pool.submit(make, method, config.seed) for method in ("loop4", "l2d", "lora", "full")]
        for job in jobs:
            job.result()
    show_table()


if __name__ == "__main__":
    run(main)
