"""
Answer questions with a model that train.py has trained: Algorithm 1, token after token.

    python sample.py --steps=16                                  # the default question
    python sample.py --steps=16 --trace                          # show how the guess of each token changes
    python sample.py --steps=16 --trace=trace.json               # the same as data, one record per token
    python sample.py --steps=16 --prompt=-                       # questions from standard input, one per line
    python sample.py --out_dir=out/mine --steps=1 --num_samples=3 --temperature=0.8     # the trunk alone

Without --out_dir it takes the model of out/l2d_gsm8k, and if there is none, the demo's, which is in demo/.
"""
import os

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # before torch: idle threads wait less busily for the others

import json
import sys
import time
from dataclasses import dataclass
from typing import ClassVar, Literal

from configurator import at_least, configure, require, run, without_effect
from decode import DecodingConfig
from diffusion import Tables
from model import PathConfig
from plumbing.packed import pack
from plumbing.sampling import find_group
from plumbing.tokenizer import encode_question
from plumbing.trace import format_trace, trace_records
from plumbing.trained import find_model, load
from speculate import generate

QUESTION = "Leo makes 42 stamps and Tom makes 5 for him. He wants 59 stamps. How many more does he need?"
MOST_ROWS = 64                      # samples written side by side; more would need much memory


@dataclass(frozen=True)
class Config(DecodingConfig):       # `--help` prints the comments of this class
    # what to sample, and from what
    out_dir: str = ""               # of train.py; empty: out/l2d_gsm8k, or demo if that is not there
    checkpoint: Literal["best", "last"] = "best"
    prompt: str = QUESTION          # the question; -: questions from standard input, one per line
    group: str = ""                 # guidance group, by name; empty: none
    num_samples: int = 1            # answers to each question
    trace: bool | str = False       # show how the guess of each token changes; FILE.json: write it there
    # machine
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the weights
    hints: ClassVar = dict.fromkeys(vars(PathConfig()), "it was chosen in training") | {
        "T": "T is --steps",
        "sigma": "sigma was chosen in training (train.py --sigma=8) and is kept in the checkpoint",
        "label": "it is now called --group",
        "max_iters": "that is an option of train.py",
    }


def read_questions(config):
    """Yield the questions: --prompt, or the lines of standard input that are not empty."""
    if config.prompt != "-":
        yield config.prompt
        return
    for line in sys.stdin:
        if line.strip():
            yield line.strip()


def main(argv=None):
    config = configure(Config, argv, __doc__)
    at_least(config, num_samples=1)
    without_effect(config, "--steps=2 or more", config.steps > 1, "solver", "t_end", "stop", "guess")
    out_dir = find_model(config.out_dir)
    model, encoding, checkpoint = load(out_dir, config.checkpoint, config.device, config.dtype)
    sampler = checkpoint["sampler"]                               # other defaults, after train.py --unroll
    config = configure(Config, argv, __doc__, defaults=sampler | {"out_dir": out_dir})
    if sampler and config.steps > 1:
        options = " ".join(f"--{name}={value}" for name, value in sampler.items())
        print(f"--- trained with --unroll, so by default it is sampled with {options}")
    group = find_group(config, model, checkpoint)
    pack(model)
    tables = Tables(model) if config.steps > 1 else None

    start = time.time()
    outputs = []
    records = []
    for question in read_questions(config):
        prompt = encode_question(encoding, checkpoint["data"]["prompt"], question)
        n_positions = model.trunk.config.block_size
        require(len(prompt) <= n_positions, f"the prompt has {len(prompt)} tokens, but the model only "
                f"{n_positions} positions; shorten it")
        for first in range(0, config.num_samples, MOST_ROWS):
            ids = range(first, min(first + MOST_ROWS, config.num_samples))
            prompts = [prompt] * len(ids)
            groups = [group] * len(ids)
            wanted = bool(config.trace)
            new = generate(model, prompts, encoding.eot_token, config, groups, ids, wanted, tables)
            for i, output in zip(ids, new):
                print(f"--- sample {i + 1} of {config.num_samples}")
                print_answer(output, prompt, encoding, config)
                if config.trace:
                    records += trace_records(output, encoding, question=question, sample=i + 1)
            outputs += new
    if isinstance(config.trace, str):
        with open(config.trace, "w", encoding="utf-8") as file:
            json.dump(records, file, ensure_ascii=False)
        print(f"--- written to {config.trace}: {len(records)} tokens")
    if outputs:
        print_costs(outputs, config, time.time() - start)


def print_answer(output, prompt, encoding, config):
    end = "" if output.ended else "  [cut: no end of text]"
    print(encoding.decode(prompt) + encoding.decode(output.tokens) + end, flush=True)
    if config.trace is True:
        print(format_trace(output, encoding, sys.stdout.isatty()))


def print_costs(outputs, config, seconds):
    n_tokens = sum(output.predicted for output in outputs)
    nfe = sum(output.nfe for output in outputs) / n_tokens
    computed = sum(output.computed for output in outputs) / n_tokens
    per_round = n_tokens / sum(output.rounds for output in outputs)
    print(f"--- steps={config.steps} {config.solver}: {n_tokens} tokens, NFE {nfe:.2f} path calls per token "
          f"({computed:.2f} computed, {per_round:.1f} tokens per round), {n_tokens / seconds:.1f} tokens/s")


if __name__ == "__main__":
    run(main, "lower --num_samples, --steps or --max_new_tokens")
