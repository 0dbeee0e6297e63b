"""
Answer a question with a model that train.py has trained: Algorithm 1, token after token.

    python sample.py --out_dir=out/demo_l2d --steps=16              # the default question
    python sample.py --out_dir=out/demo_l2d --steps=16 --trace      # show how the guess of each token changes
    python sample.py --steps=1 --num_samples=3 --temperature=0.8    # the trunk alone, of out/l2d_gsm8k
"""
import sys
import time
from dataclasses import dataclass
from typing import ClassVar, Literal

from configurator import at_least, configure, require, run, without_effect
from decode import DecodingConfig
from plumbing.packed import pack
from plumbing.sampling import find_group
from plumbing.tokenizer import encode_question
from plumbing.trace import format_trace
from plumbing.trained import load
from speculate import generate

QUESTION = "Leo makes 42 stamps and Tom makes 5 for him. He wants 59 stamps. How many more does he need?"
MOST_ROWS = 64                      # samples written side by side; more would need much memory


@dataclass(frozen=True)
class Config(DecodingConfig):       # `--help` prints the comments of this class
    # what to sample, and from what
    out_dir: str = "out/l2d_gsm8k"  # of train.py
    checkpoint: Literal["best", "last"] = "best"
    prompt: str = QUESTION          # the question
    group: str = ""                 # guidance group, by name; empty: none
    num_samples: int = 1
    trace: bool = False             # show how the guess of each token changes
    # machine
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the weights
    hints: ClassVar = {
        "T": "T is --steps",
        "sigma": "sigma was chosen in training (train.py --sigma=8) and is kept in the checkpoint",
        "label": "it is now called --group",
        "max_iters": "that is an option of train.py",
    }


def main(argv=None):
    config = configure(Config, argv, __doc__)
    at_least(config, num_samples=1)
    without_effect(config, "--steps=2 or more", config.steps > 1, "solver", "t_end", "stop", "guess")
    model, encoding, checkpoint = load(config.out_dir, config.checkpoint, config.device, config.dtype)
    wishes = checkpoint["sampler"]                                # of a path trained with --unroll
    config = configure(Config, argv, __doc__, defaults=wishes)
    if wishes and config.steps > 1:
        options = " ".join(f"--{name}={value}" for name, value in wishes.items())
        print(f"--- trained with --unroll, so by default it is sampled with {options}")
    group = find_group(config, model, checkpoint)
    prompt = encode_question(encoding, checkpoint["data"]["prompt"], config.prompt)
    n_positions = model.trunk.config.block_size
    require(len(prompt) <= n_positions,
            f"the prompt has {len(prompt)} tokens, but the model only {n_positions} positions; shorten it")
    pack(model)

    start = time.time()
    outputs = []
    while len(outputs) < config.num_samples:
        n = min(MOST_ROWS, config.num_samples - len(outputs))
        ids = range(len(outputs), len(outputs) + n)
        prompts = [prompt] * n
        for output in generate(model, prompts, encoding.eot_token, config, [group] * n, ids, config.trace):
            outputs.append(output)
            print(f"--- sample {len(outputs)} of {config.num_samples}")
            end = "" if output.ended else "  [cut: no end of text]"
            print(encoding.decode(prompt) + encoding.decode(output.tokens) + end)
            if config.trace:
                tokens = output.tokens + [encoding.eot_token] * output.ended
                print(format_trace(output, tokens, encoding, sys.stdout.isatty()))
    seconds = time.time() - start

    n_tokens = sum(output.predicted for output in outputs)
    nfe = sum(output.nfe for output in outputs) / n_tokens
    computed = sum(output.computed for output in outputs) / n_tokens
    per_round = n_tokens / sum(output.rounds for output in outputs)
    print(f"--- steps={config.steps} {config.solver}: {n_tokens} tokens, NFE {nfe:.2f} path calls per token "
          f"({computed:.2f} computed, {per_round:.1f} tokens per round), {n_tokens / seconds:.1f} tokens/s")


if __name__ == "__main__":
    run(main)
