"""
What does a step cost? Counted and measured, with random weights of any GPT-2 size: no download.

    python bench.py --baseline                  # decoding of GPT-2 124M, and transformers' beside ours
    python bench.py --out_dir=out/demo_l2d      # decoding of a trained run, on its validation prompts
    python bench.py --decode=False --train      # training steps of L2D and of its controls
    python bench.py --gpu_report                # the first thing on a new GPU: see measure/gpu_report.py

All variants run by turns within each repeat, so that what else the machine does hits them alike: median
[least, greatest] of the repeats, ratios within each.

Decoding is decode.generate, greedy. x plain: time per token against plain decoding (T = 1), with reading the
prompts. a round: tokens kept of a draft. NFE: path calls for a token kept; computed: all path calls for it.
floor: the share of the speed at which every pass would read its weights, keys and values once, or compute
its FLOPs, as fast as the probes (copy, matrix-vector product, matmul) do in the same run.
How much of a draft is kept is a property of the model. Random weights have none, so it is set: the path is
fresh, it writes what plain decoding writes at every T, and then a seeded share of the tokens is changed.
same: it wrote what it must, plain decoding with these changes, or Algorithm 1 without drafts.

Training is the step of train.py on one batch. matmul: FLOPs of the step, padding included, against the matmul
probe (MFU by a measured peak). stays, peak: GB as measure/memory.py counts them; measured: the peak on a GPU.
"""
import json
import os
from dataclasses import asdict, dataclass
from typing import Literal

import torch

from configurator import at_least, configure, require, run
from exam.report import provenance
from files import write_file
from machine import pick_device, pick_dtype
from measure import SIZES, numbers
from measure.decoding import measure_decoding, parameters
from measure.gpu_report import check
from measure.training import measure_training
from model import PathConfig


@dataclass(frozen=True)
class Config:
    # what to measure
    model: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "tiny"] = "gpt2"
    out_dir: str = ""               # of train.py: decode with its best.pt, in place of random weights
    decode: bool = True
    train: bool = False
    gpu_report: bool = False        # check this device, then decoding and training on it
    baseline: bool = False          # decode with transformers' GPT-2, too, on the same weights
    repeats: int = 5
    out: str = "out/bench.json"     # settings, machine, and every repeat
    # decoding
    steps: str = "16"               # evaluations per token; 1, plain decoding, is always measured
    draft: str = "0,8,16"           # tokens that the trunk drafts in a round, at most
    acceptance: str = "0.5,0.8,0.95,1"  # random weights: shares of tokens not changed
    stop: float = 0.1               # a trained run: with --stop, too; 0 = not
    batch: str = "1,8"              # prompts decoded at once
    texts: int = 8                  # a trained run: prompts in all, or `batch` where that is more
    prompt: int = 64                # random weights: tokens of a prompt
    new_tokens: int = 48            # and new ones
    path_mode: Literal["full", "lora"] = "full"
    # training, on examples of GSM8K's lengths
    train_batch: int = 8
    train_prompt: int = 60          # mean tokens of a prompt
    train_answer: int = 96          # mean tokens of an answer; a batch holds similar lengths, as in train.py
    compile: bool = False           # training steps
    # machine
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of weights; training: of autocast
    seed: int = 0

    def __post_init__(self):
        at_least(self, repeats=1, prompt=1, new_tokens=1, texts=1, seed=0, stop=0, train_batch=1,
                 train_prompt=1, train_answer=1)
        for name, kind, low, high in (("steps", int, 1, 10 ** 4), ("draft", int, 0, 10 ** 4),
                                      ("batch", int, 1, 10 ** 6), ("acceptance", float, 0, 1)):
            try:
                fits = all(low <= x <= high for x in numbers(getattr(self, name), kind))
            except ValueError:
                fits = False
            require(fits, f"{name}={getattr(self, name)!r}, but it must be numbers from {low} to {high}, "
                    f"separated by commas, such as {getattr(Config, name)}")
        for a, b in (("prompt", "new_tokens"), ("train_prompt", "train_answer")):
            total, most = getattr(self, a) + getattr(self, b), SIZES[self.model].block_size
            require(total <= most, f"{a} + {b} = {total}, but {self.model} has {most} positions")


# ------------------------------------------------------------------------------------------------ main
def check_out(path):
    """Fail now, not after the work, where path cannot be written, or holds what is not ours."""
    if os.path.exists(path):
        try:
            with open(path, encoding="utf-8") as file:
                ours = "parameters" in json.load(file)
        except (OSError, ValueError, TypeError):
            ours = False
        require(ours, f"{path} was not written by bench.py and would be lost; choose another --out")
    write_file(f"{path}.probe", lambda file: file.write(b"{}"))
    os.unlink(f"{path}.probe")


def main(argv=None):
    config = configure(Config, argv, __doc__)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    require(config.decode or config.train or config.gpu_report, "decode=False leaves nothing to measure; add "
            "--train")
    check_out(config.out)
    counted = parameters(SIZES[config.model], PathConfig())
    print(f"{config.model}: " + ", ".join(f"{name} {n:,}" for name, n in counted.items()), flush=True)
    result = {"config": asdict(config), "threads": torch.get_num_threads(), "parameters": counted}
    if config.gpu_report:
        result["checks"] = check(config, device, dtype)
    if config.decode:
        result["decode"] = measure_decoding(config, device, dtype)
    if config.train or config.gpu_report:
        result["train"] = measure_training(config, device, dtype)
    result |= provenance(device)
    write_file(config.out, lambda file: file.write(json.dumps(result, indent=1).encode()))
    print(f"\n{result['machine']}, {result['threads']} threads, torch {result['torch']}; median [least, "
          f"greatest] of {config.repeats} repeats; written to {config.out}")
    failed = [f"check {name}" for name, (passed, _) in result.get("checks", {}).items() if not passed]
    if dtype == torch.float32 and device.type == "cpu":                  # elsewhere products round by shape
        failed += [f"the tokens of {name} at batch {batch}" for batch, r in result.get("decode", {}).items()
                   for name, row in r["rows"].items() if not row["same"]]
    require(not failed, f"not as it must be: {', '.join(failed)}")


if __name__ == "__main__":
    run(main)
