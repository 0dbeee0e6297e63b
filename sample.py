"""
Answer a question with a checkpoint of train.py: Algorithm 1, token by token.

    python sample.py --out_dir=out/demo_l2d --steps=16                 # the default question
    python sample.py --out_dir=out/demo_l2d --steps=16 --trace         # and how each token's guess changed
    python sample.py --steps=1 --num_samples=3 --temperature=0.8       # the untouched trunk of out/l2d_gsm8k
"""
import sys
import time
from dataclasses import dataclass
from typing import Literal

from checkpoint import load
from configurator import UserError, at_least, configure, require, run, without_effect
from decode import Decoding, generate
from exam.report import format_trace
from packed import pack
from tokens import encode_question

QUESTION = "Leo makes 42 stamps and Tom makes 5 for him. He wants 59 stamps. How many more does he need?"
AT_ONCE = 64                        # samples written side by side, for memory


@dataclass(frozen=True)
class Config(Decoding):
    # what to sample, and from what
    out_dir: str = "out/l2d_gsm8k"  # of train.py
    checkpoint: Literal["best", "last"] = "best"
    prompt: str = QUESTION          # the question
    label: str = ""                 # guidance label, by name; empty = none
    num_samples: int = 1
    trace: bool = False             # show how each token's guess changes over the steps
    # machine
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the weights


def label_of(config, model, checkpoint):
    """The number of the label that config names. UserError for what the checkpoint does not have."""
    names, out_dir = checkpoint["data"]["label_names"], config.out_dir
    if model.path is None and config.steps > 1:
        raise UserError(f"{out_dir} holds a trunk without a path, which has only --steps=1, not "
                        f"{config.steps}; train a path on it: python train.py --trunk={out_dir}/best.pt "
                        f"--data_dir={checkpoint['config']['data_dir']} --out_dir=out/l2d")
    if config.label and (model.path is None or config.label not in names):
        known = ", ".join(names) if model.path else "none, for want of a path"
        raise UserError(f"label={config.label!r}, but the labels of {out_dir} are: {known}")
    if config.guidance != 1 and not config.label:
        raise UserError(f"guidance={config.guidance} needs a --label: one of {', '.join(names)}")
    if config.guidance != 1 and config.steps <= 2:
        raise UserError(f"guidance={config.guidance} acts through x_t, needs --steps=3 or more, not "
                        f"{config.steps}: the last is read with the label alone")
    if config.label and config.steps == 1:
        raise UserError(f"label={config.label!r} does nothing at steps=1, which is the trunk alone; "
                        "use --steps=2 or more")
    return names.index(config.label) if config.label else model.no_label


def main(argv=None):
    config = configure(Config, argv, __doc__)
    at_least(config, num_samples=1)
    without_effect(config, "--steps=2 or more", config.steps > 1, "solver", "t_end", "stop", "guess")
    model, encoding, checkpoint = load(config.out_dir, config.checkpoint, config.device, config.dtype)
    label = label_of(config, model, checkpoint)
    prompt = encode_question(encoding, checkpoint["data"]["prompt"], config.prompt)
    require(len(prompt) <= model.trunk.config.block_size, f"the prompt has {len(prompt)} tokens, but the "
            f"model only {model.trunk.config.block_size} positions; shorten it")
    pack(model)
    start, outputs = time.time(), []
    for first in range(0, config.num_samples, AT_ONCE):
        ids = range(first, min(first + AT_ONCE, config.num_samples))
        n_rows, eot = len(ids), encoding.eot_token
        for output in generate(model, [prompt] * n_rows, eot, config, [label] * n_rows, ids, config.trace):
            outputs.append(output)
            print(f"--- sample {len(outputs)} of {config.num_samples}")
            end = "" if output.ended else "  [cut: no end of text]"
            print(encoding.decode(prompt) + encoding.decode(output.tokens) + end)
            if output.trace:
                tokens = output.tokens + [eot] * output.ended
                print(format_trace(output, tokens, encoding, sys.stdout.isatty()))
    seconds = time.time() - start
    counts = ("predicted", "nfe", "computed", "rounds")
    n, nfe, computed, rounds = (sum(getattr(output, name) for output in outputs) for name in counts)
    print(f"--- steps={config.steps} {config.solver}: {n} tokens, NFE {nfe / n:.2f} path calls per token "
          f"({computed / n:.2f} computed, {n / rounds:.1f} tokens a round), {n / seconds:.1f} tokens/s")


if __name__ == "__main__":
    run(main)
