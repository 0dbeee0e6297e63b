"""
What does a step cost? Counted and measured, with random weights of a model's size, so without a download.

    python -m bench --baseline                  # decoding of GPT-2 124M, with transformers' beside ours
    python -m bench --out_dir=out/demo_l2d      # decoding of a trained run, on its validation prompts
    python -m bench --decode=False --train      # training steps of L2D and of its controls
    python -m bench --gpu_report                # the first thing on a new GPU: see bench/gpu_report.py
    python -m bench --gpu_report --only=decoding        # one part of it

Within each repeat all variants run one after the other, so that what else the machine does hits them alike. A
cell with three numbers is the median [least, greatest] of the repeats. Ratios are taken within each repeat.

Decoding is greedy, and its time includes reading the prompts. Columns:
    x plain    time per token, as a multiple of that of plain decoding (T = 1)
    a round    tokens that are kept of a draft
    NFE        path calls per token, at the tokens that were kept
    computed   path calls per token, with those that speculation threw away
    passes     how often the path ran per token; the rows of a batch share a pass
    floor      the least possible time as a share of the measured one. It assumes that every pass reads its
               weights, keys and values once, or computes its FLOPs, at the best speed of three probes. These
               are a copy, a matrix-vector product and a matrix product, measured in the same run. The
               passes of CUDA graphs cannot be counted
    same       whether the tokens are those of the reference: without drafts, or of plain decoding
The share of a draft that is kept is a property of a trained model. With random weights we set it: the path
is new and writes what plain decoding writes, at every T, and then a seeded share of its tokens is changed.
The share of tokens whose guess changes at the first path call is set in the same way.

Training is the optimizer step of train.py on one batch. Columns:
    x full     time, as a multiple of that of full finetuning
    matmul     FLOPs per second, padding included, as a share of the speed of the matrix product (an MFU)
    stays      GB that remain between steps, as bench/memory.py counts them
    peak       GB at the worst moment of a step, as bench/memory.py counts them
    measured   the peak on a GPU
"""
import json
import os
from dataclasses import asdict, dataclass
from typing import Literal

import torch

from bench.compact_json import write_json
from bench.costs import count_parameters
from bench.decoding import measure_decoding, parse_numbers
from bench.gpu_report import ITEMS, run_report
from bench.models import SIZES
from bench.training import measure_training
from configurator import at_least, configure, require, run
from model import PathConfig
from plumbing.device import pick_device, pick_dtype
from plumbing.files import write_file
from plumbing.provenance import provenance


@dataclass(frozen=True)
class Config:                       # `--help` prints the comments of this class
    # what to measure
    model: Literal[(*SIZES,)] = "gpt2"
    out_dir: str = ""               # of train.py: decode with its best.pt, in place of random weights
    decode: bool = True
    train: bool = False
    gpu_report: bool = False        # check this device, then measure training and decoding on it
    only: str = ""                  # of the report: these items alone, such as training,decoding
    time_limit: int = 120           # of the report: seconds; what is not reached by then is listed
    baseline: bool = False          # decode with transformers' GPT-2, too, on the same weights
    repeats: int = 5
    out: str = "out/bench.json"     # receives the settings, the machine, and every repeat
    # decoding
    steps: str = "16"               # values of T; T = 1, plain decoding, is always measured
    draft: str = "0,8,16"           # most tokens that the trunk drafts in a round
    ahead: str = "1000"             # most evaluations of a token in one pass of the path; 0: one
    acceptance: str = "0.5,0.8,0.95,1"  # random weights: shares of tokens that are not changed
    changes: str = "0"              # random weights: shares of tokens whose guess changes
    stop: float = 0.1               # a trained run: measure with --stop, too; 0: do not
    batch: str = "1,8"              # prompts decoded at once
    texts: int = 8                  # a trained run: prompts in all, or `batch` where that is more
    prompt: int = 64                # random weights: tokens of a prompt
    new_tokens: int = 48            # random weights: tokens to decode
    path_mode: Literal["full", "lora"] = "full"
    # training, on examples of GSM8K's lengths
    train_batch: int = 8
    train_prompt: int = 60          # mean tokens of a prompt
    train_answer: int = 96          # mean tokens of an answer; a batch holds similar lengths, as in train.py
    compile: bool = False           # compile training steps
    # machine
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of weights; training: of autocast
    seed: int = 0

    def __post_init__(self):
        at_least(self, repeats=1, prompt=1, new_tokens=1, texts=1, seed=0, stop=0, train_batch=1,
                 train_prompt=1, train_answer=1, time_limit=1)
        require(self.gpu_report or not self.only, f"only={self.only} is a part of --gpu_report; add that")
        require(set(self.only.split(",")) <= {"", *ITEMS},
                f"only={self.only!r}, but it must be of {', '.join(ITEMS)}, separated by commas")
        require(self.decode or self.train or self.gpu_report,
                "decode=False leaves nothing to measure; add --train")
        self.check_numbers("steps", int, 1, 1000)
        self.check_numbers("draft", int, 0, 10 ** 4)
        self.check_numbers("ahead", int, 0, 10 ** 4)
        self.check_numbers("batch", int, 1, 10 ** 6)
        self.check_numbers("acceptance", float, 0, 1)
        self.check_numbers("changes", float, 0, 1)
        most = SIZES[self.model].block_size
        for a, b in (("prompt", "new_tokens"), ("train_prompt", "train_answer")):
            total = getattr(self, a) + getattr(self, b)
            require(total <= most, f"{a} + {b} = {total}, but {self.model} has {most} positions; lower one")

    def check_numbers(self, name, kind, low, high):
        text = getattr(self, name)
        try:
            fits = all(low <= x <= high for x in parse_numbers(text, kind))
        except ValueError:
            fits = False
        require(fits, f"{name}={text!r}, but it must be numbers from {low} to {high}, separated by commas, "
                f"such as {getattr(Config, name)}")


def check_out(path):
    """Raise UserError now, not after the work, where path cannot be written, or holds what is not ours."""
    if os.path.exists(path):
        try:
            with open(path, encoding="utf-8") as file:
                ours = "parameters" in json.load(file)
        except (OSError, ValueError, TypeError):
            ours = False
        require(ours, f"{path} was not written by python -m bench and would be lost; choose another --out")
    write_file(f"{path}.probe", lambda file: file.write(b"{}"))
    os.unlink(f"{path}.probe")


def find_failures(result, exact):
    """List, as texts, what is not as it must be. exact: whether all tokens must be the same."""
    failed = [f"check {name}" for name, (passed, _) in result.get("checks", {}).items() if not passed]
    if exact:
        for batch, measured in result.get("decode", {}).items():
            failed += [f"the tokens of {name} at batch {batch}"
                       for name, row in measured["rows"].items() if not row["same"]]
    return failed


def main(argv=None):
    config = configure(Config, argv, __doc__)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    check_out(config.out)
    counted = count_parameters(SIZES[config.model], PathConfig())
    print(f"{config.model}: " + ", ".join(f"{name} {n:,}" for name, n in counted.items()), flush=True)
    result = {"config": asdict(config), "threads": torch.get_num_threads(), "parameters": counted}
    result |= provenance(device)
    if config.gpu_report:
        names = config.only.split(",") if config.only else ITEMS
        run_report(config, result, {name: ITEMS[name] for name in ITEMS if name in names})
    else:
        if config.decode:
            result["decode"] = {}
            for batch, measured in measure_decoding(config, device, dtype):
                result["decode"][batch] = measured
                write_json(config.out, result, levels=4)
        if config.train:
            result["train"] = measure_training(config, device, dtype)
        write_json(config.out, result, levels=4)
    print(f"\n{result['machine']}, {result['threads']} threads, torch {result['torch']}; median [least, "
          f"greatest] of {config.repeats} repeats; written to {config.out}")
    # off the CPU, and in other dtypes, a product rounds differently where its shape differs
    failed = find_failures(result, exact=dtype == torch.float32 and device.type == "cpu")
    require(not failed, f"not as it must be: {', '.join(failed)}")


if __name__ == "__main__":
    run(main)
