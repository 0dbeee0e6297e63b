"""
Chains in words, on a real language model: does each step follow a chain further there, too?

    python experiments/word_chains.py --trunk=SmolLM2-135M-Instruct --method=trunk      # first
    python experiments/word_chains.py --trunk=SmolLM2-135M-Instruct --method=l2d --seed=0
    python experiments/word_chains.py --method=table        # of all runs that are there

The task of chains.py, told in English. Each of eighteen people trusts one, some trust themselves. The text
says in random order who trusts whom, then asks where it ends:

    Ted trusts Meg. Leo trusts Leo. Meg trusts Leo.
    In the end Ted trusts Leo

The person asked about is up to eight links from the end. Every number of links is drawn equally often, but
the last chain of a text is cut short where the people run out. Up to four chains are asked about, each once.
Whoever has been named as an answer is not the next one, so guessing gets easier from question to question.

The trunk is SmolLM2-135M. It is first finetuned to follow at most one link, and then frozen. L2D's path is
trained through Algorithm 1 as in chains.py, on at most three links and then on all. Controls start from the
same trunk, and train for about as long.
"""
import json
import random
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))    # the project's folder

from chains import test, train
from smollm2 import Bootstrap

from bench.compact_json import write_json
from configurator import UserError, configure, run
from model import L2D, DiffusionPath, PathConfig
from plumbing.hub_tokenizer import load_hub_tokenizer
from plumbing.hub_weights import load_llama
from plumbing.provenance import provenance

# the task
NAMES = tuple("""Ted Meg Leo Tom Ann Bob Sam Kim Joe Max Eva Ben Amy Dan Sue Tim Jim Roy Ian Mary John Paul
              Anna Jack Lucy Adam Jane Luke Kate Carl Emma Alan Sara Eric Lisa Ryan Nina Peter Alice
              James""".split())
N_PEOPLE = 18                       # people of a text
N_ASKED = 4                         # most questions of a text
MOST_LINKS = 8
MOST_BEFORE = 2                     # people of the chain before the one who is asked about
N_TEST = 200                        # test texts
TEST_SEED = 27182
STEPS = (1, 2, 3, 4, 6, 8, 12, 16)  # values of T in the test

# models and training
PATH = PathConfig(sigma=0.5, time_scale=30.0)       # of chains.py
BATCH_SIZE = 8
METHODS = {"l2d": "L2D", "lora": "LoRA on the trunk", "full": "full finetuning"}
PHASES = {                          # optimizer steps, most links, most path calls, as in chains.py
    "trunk": [(100, 1, 0)],
    "l2d": [(300, 3, 4), (450, MOST_LINKS, 8)],
    "full": [(240, 3, 0), (480, MOST_LINKS, 0)],
    "lora": [(200, 3, 0), (400, MOST_LINKS, 0)],
}
LEARNING_RATES = {"trunk": 2e-4, "l2d": 3e-4, "lora": 6e-4, "full": 2e-4}
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Config:                       # `--help` prints the comments of this class
    method: Literal["trunk", *METHODS, "table"] = "table"
    trunk: str = "SmolLM2-135M-Instruct"    # as train.py's --trunk
    seed: int = 0
    out_dir: str = "out/word_chains"


# -------------------------------------------------------------------------------------------- the task
def draw_text(rng, most_links):
    """Draw a text: its sentences, and the questions (who is asked about, the end of the chain, links)."""
    left = rng.sample(NAMES, N_PEOPLE)
    sentences = []
    questions = []
    while left:
        links = rng.randint(0, most_links)
        n = links + 1 + rng.randint(0, MOST_BEFORE)
        chain = left[:n]                                          # its end comes first
        left = left[n:]
        links = min(links, len(chain) - 1)
        questions.append((chain[links], chain[0], links))
        sentences += [f" {a} trusts {b}." for a, b in zip(chain, chain[:1] + chain)]
    rng.shuffle(sentences)
    rng.shuffle(questions)
    return sentences, questions[:N_ASKED]


def encode_text(encoding, sentences, questions):
    """Token ids of a text, and for each question the column of its last token and the token of its answer."""
    idx = encoding.encode_ordinary("".join(sentences))
    columns = []
    answers = []
    for name, end, _ in questions:
        idx += encoding.encode_ordinary(f"\nIn the end {name} trusts")
        columns.append(len(idx) - 1)
        idx += encoding.encode_ordinary(f" {end}")
        answers.append(idx[-1])
    return idx, columns, answers


def draw_batch(encoding, rng, n, most_links=MOST_LINKS):
    """Draw n texts: idx (n, S), and for N answers at = (rows, columns), y (N,), a list of links."""
    texts = []
    rows = []
    columns = []
    y = []
    links = []
    for row in range(n):
        sentences, questions = draw_text(rng, most_links)
        idx, places, answers = encode_text(encoding, sentences, questions)
        texts.append(torch.tensor(idx))
        rows += [row] * len(places)
        columns += places
        y += answers
        links += [n_links for _, _, n_links in questions]
    at = torch.tensor(rows), torch.tensor(columns)
    return pad_sequence(texts, batch_first=True), at, torch.tensor(y), links


# ------------------------------------------------------------------------------------ models and training
def make_model(config, trunk):
    """The pair of a method. All but the trunk's own training start from the trunk that follows one link."""
    torch.manual_seed(config.seed)
    if config.method == "trunk":
        model = L2D(trunk)
        trunk.requires_grad_(True)
        return model
    path = Path(config.out_dir, "trunk.pt")
    if not path.exists():
        raise UserError(f"there is no {path}; make it first, with --method=trunk")
    trunk.load_state_dict(torch.load(path, weights_only=True))
    if config.method == "l2d":
        return L2D(trunk.bfloat16(), DiffusionPath(trunk, PATH, 0).float())
    model = L2D(trunk)
    if config.method == "lora":
        trunk.add_lora(PATH.lora_rank, PATH.lora_alpha)
    else:
        trunk.requires_grad_(True)
    return model


def make(config):
    """Train, test, and keep the numbers (of the trunk its weights, too). What is there is kept as it is."""
    method = config.method
    name = "trunk" if method == "trunk" else f"{method}_s{config.seed}"
    path = Path(config.out_dir, f"{name}.json")
    if path.exists():
        print(f"{path} is there already")
        return
    encoding = load_hub_tokenizer(config.trunk)
    model = make_model(config, load_llama(config.trunk, encoding.n_vocab))
    draw = partial(draw_batch, encoding, random.Random(7 * config.seed + 2), BATCH_SIZE)
    start = time.time()
    train(model, PHASES[method], LEARNING_RATES[method], draw, config.seed, name, every=20, bfloat16=True)
    seconds = time.time() - start
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        right, links = test(model, STEPS if model.path else (1,), partial(draw_batch, encoding), TEST_SEED,
                            N_TEST, chunk=50)
    print(f"{name}: " + "  ".join(f"T={T} {sum(r) / len(r):.3f}" for T, r in right.items()), flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"method": method, "seed": config.seed, "seconds": round(seconds), "phases": PHASES[method],
              "links": links, "right": right} | provenance(torch.device("cpu"))
    write_json(path, record, levels=2)
    if method == "trunk":
        torch.save(model.trunk.state_dict(), path.with_suffix(".pt"))


# ------------------------------------------------------------------------------------------- the table
def read_runs(out_dir):
    """{method: [what make wrote for each seed]} of all runs in out_dir."""
    found = {}
    for method in METHODS:
        records = [json.loads(path.read_text()) for path in sorted(Path(out_dir).glob(f"{method}_s*.json"))]
        if records:
            found[method] = records
    if not found:
        raise UserError(f"there are no runs in {out_dir}; make one, for example with --method=l2d")
    return found


def share_right(runs, T):
    """For each answer with T evaluations the share of the seeds that have it right."""
    return np.mean([run["right"][str(T)] for run in runs], axis=0)


def make_rows(method, runs, sums, bootstrap):
    """A row for each T, a dict. sums: shares of answers -> their sum over each test text."""
    links = np.array(runs[0]["links"])
    rows = []
    for T in map(int, runs[0]["right"]):
        right = share_right(runs, T)
        row = {"method": METHODS[method], "steps": T, "seeds": [run["seed"] for run in runs],
               "right": bootstrap.ratio(sums(right)),
               "by_links": [float(right[links == k].mean()) for k in range(MOST_LINKS + 1)]}
        if T > 2:
            row["minus_2"] = bootstrap.ratio(sums(right - share_right(runs, 2)))
        rows.append(row)
    return rows


def show_table(config):
    """Print the table, and write it to word_chains.json beside this file."""
    found = read_runs(config.out_dir)
    rng = random.Random(TEST_SEED)
    n_asked = [len(draw_text(rng, MOST_LINKS)[1]) for _ in range(N_TEST)]
    firsts = np.cumsum([0, *n_asked[:-1]])                        # the first answer of each text
    sums = partial(np.add.reduceat, indices=firsts)
    bootstrap = Bootstrap(n_asked)
    rows = [row for method, runs in found.items() for row in make_rows(method, runs, sums, bootstrap)]
    print("| | T | seeds | right | minus T = 2 | by links, 0 to 8 |")
    print("|---" * 6 + "|")
    for row in rows:
        minus = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*row["minus_2"]) if "minus_2" in row else ""
        print("| {} | {} | {} | {:.3f} [{:.3f}, {:.3f}] | {} | {} |".format(
            row["method"], row["steps"], len(row["seeds"]), *row["right"], minus,
            " ".join(f"{x:.2f}" for x in row["by_links"])))
    differences = []
    for method in [method for method in found if method != "l2d" and "l2d" in found]:
        difference = sums(share_right(found["l2d"], 8) - share_right(found[method], 1))
        differences.append({"what": f"L2D at T = 8 minus {METHODS[method]}",
                            "value": bootstrap.ratio(difference)})
        print("{what}: {value[0]:+.3f} [{value[1]:+.3f}, {value[2]:+.3f}]".format(**differences[-1]))
    kept = ("seed", "seconds", "phases", "commit", "command", "machine", "torch")
    made = {method: [{key: run[key] for key in kept} for run in runs] for method, runs in found.items()}
    write_json(HERE / "word_chains.json", {"rows": rows, "differences": differences, "runs": made}, levels=2)


def main(argv=None):
    config = configure(Config, argv, __doc__)
    if config.method == "table":
        show_table(config)
        return
    torch.set_num_threads(1)        # for the same numbers on any machine of this kind
    make(config)


if __name__ == "__main__":
    run(main)
