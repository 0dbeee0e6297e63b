"""
Sample from a checkpoint of train.py: Algorithm 1, with the key-value cache of the trunk.

    python sample.py --out_dir=out/demo_l2d --steps=16                 # answer the default question
    python sample.py --out_dir=out/demo_l2d --steps=16 --trace         # and see each token's guess change over the steps
    python sample.py --steps=1 --num_samples=3 --temperature=0.8       # the untouched trunk of out/l2d_gsm8k
"""
import os
import sys
import time
from dataclasses import dataclass, fields
from typing import Literal

import torch

from configurator import UserError, configure
from diffusion import Sampler, generate
from model import device_kind, dtype_name, load_checkpoint, model_from_checkpoint
from packed import pack
from prepare_data import encode_prompt, fingerprint, load_tokenizer

QUESTION = "Jack buys 5 trays of 10 lemons each. He throws 45 lemons away. How many lemons does Jack have now?"


@dataclass(frozen=True)
class Config(Sampler):
    # what to sample, and from what
    out_dir: str = "out/l2d_gsm8k"  # of train.py
    checkpoint: Literal["best", "last"] = "best"
    prompt: str = QUESTION          # the question
    label: int = -1                 # guidance label; -1 = none
    num_samples: int = 1
    max_new_tokens: int = 320
    seed: int = 0
    trace: bool = False             # show how each token's guess changes over the steps
    compile: bool = False           # one compiled graph per token, on a GPU a CUDA graph (not yet run on one); no gain on a CPU
    # machine
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the weights; auto: bfloat16 on cuda, float32 on cpu


def load(out_dir, which, device="auto", dtype="auto"):
    """The model on its device, ready to sample, its tokenizer and its checkpoint. Raises UserError."""
    device = device_kind(device)
    path = os.path.join(out_dir, f"{which}.pt")
    checkpoint = load_checkpoint(path)
    if missing := {"tokenizer", "data", "config"} - checkpoint.keys():
        raise UserError(f"error: {path} has no {', '.join(sorted(missing))}: another version of train.py wrote it; train it again")
    encoding = load_tokenizer(checkpoint["tokenizer"]["name"])
    if fingerprint(encoding) != checkpoint["tokenizer"]["fingerprint"]:
        raise UserError(f"error: {path} was trained with another version of the tokenizer {checkpoint['tokenizer']['name']}; train it again")
    model = model_from_checkpoint(checkpoint, path).requires_grad_(False)
    return model.to(device, getattr(torch, dtype_name(dtype, device))), encoding, checkpoint


def check(sampler, label, model, checkpoint, out_dir):
    """Raise UserError where a sampler or a label (-1 = none, None = each problem's own) does not fit the model."""
    names = checkpoint["data"]["label_names"]
    if model.path is None and sampler.steps > 1:
        raise UserError(f"error: {out_dir} holds a trunk without a path, which has only --steps=1, not {sampler.steps}; "
                        f"train a path on it: python train.py --trunk={out_dir}/best.pt --data_dir={checkpoint['config']['data_dir']} --out_dir=out/l2d")
    if label is not None and not -1 <= label < len(names):
        raise UserError(f"error: label={label}, but the labels are " + ", ".join(f"{i}: {n}" for i, n in enumerate(names)) + ", -1: none")
    if sampler.guidance != 1 and label == -1:
        raise UserError(f"error: guidance={sampler.guidance} needs a --label from 0 to {len(names) - 1}")


def format_trace(tokens, trace, encoding, color):
    """A line for each token: the trunk's guess, each change of guess and when, and its probability over the steps.

    A star marks a token other than the trunk's best: greedily decoded, one that the steps changed.
    """
    show = lambda token: repr(encoding.decode([token]))[1:-1]
    bold = (lambda s: f"\033[1;33m{s}\033[0m") if color else (lambda s: s)
    width = max(len(evaluations) for evaluations in trace)
    lines = [f"  {'token':<14} {'p at each step':<{max(width, 14)}}  guesses (t: guess, its probability)"]
    for token, evaluations in zip(tokens, trace):
        bars = "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * p))] for _, _, p in evaluations)
        changes, before = [], None
        for t, guess, p in evaluations:
            if guess != before:
                changes.append(f"{t:.2f}: {show(guess)} {p:.2f}")
            before = guess
        changed = token != evaluations[0][1]
        line = f"{'*' if changed else ' '} {show(token):<14} {bars:<{max(width, 14)}}  {'  ->  '.join(changes)}"
        lines.append(bold(line) if changed else line)
    return "\n".join(lines)


def main(argv=None):
    config = configure(Config, argv, __doc__)
    model, encoding, checkpoint = load(config.out_dir, config.checkpoint, config.device, config.dtype)
    sampler = Sampler(**{f.name: getattr(config, f.name) for f in fields(Sampler)})
    check(sampler, config.label, model, checkpoint, config.out_dir)
    if config.num_samples < 1 or config.max_new_tokens < 1:
        raise UserError(f"error: num_samples={config.num_samples} and max_new_tokens={config.max_new_tokens} must be at least 1")
    if config.compile and (config.trace or not sampler.fixed):
        raise UserError("error: --compile needs the same evaluations for every token; leave out --trace, --stop and --solver=adaptive")
    prompt = encode_prompt(encoding, config.prompt)
    if len(prompt) > model.trunk.config.block_size:
        raise UserError(f"error: the prompt has {len(prompt)} tokens, more than the {model.trunk.config.block_size} positions of the model; shorten it")
    label = None if config.label == -1 else [config.label] * config.num_samples
    if not config.compile:
        pack(model)
    start = time.time()
    outputs = generate(model, [prompt] * config.num_samples, encoding.eot_token, config.max_new_tokens, sampler, label,
                       config.seed, trace=config.trace, compile=config.compile)
    seconds = time.time() - start
    for i, output in enumerate(outputs):
        print(f"--- sample {i + 1} of {config.num_samples}")
        print(encoding.decode(prompt) + encoding.decode(output.tokens) + ("" if output.ended else "  [cut: no end of text]"))
        if output.trace:
            tokens = output.tokens + [encoding.eot_token] * output.ended
            print(format_trace(tokens, output.trace, encoding, sys.stdout.isatty()))
    n, nfe = sum(o.predicted for o in outputs), sum(o.nfe for o in outputs)
    print(f"--- steps={config.steps} {config.solver}: {n} tokens, NFE {nfe / n:.2f} path calls per token, {n / seconds:.1f} tokens/s")


if __name__ == "__main__":
    main()
