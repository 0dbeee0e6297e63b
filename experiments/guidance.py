r"""
Does guidance steer? Two groups answer the same questions in different styles, and only the group tells which.

    python prepare_data.py styles
    python train.py config/demo_trunk.py --data_dir=data/styles --out_dir=out/styles_trunk
    python train.py config/demo_l2d.py --data_dir=data/styles --trunk=out/styles_trunk/best.pt --sigma=2 \
        --max_iters=2000 --seed=0 --out_dir=out/styles_l2d_s0   # then seeds 1 and 2
    python experiments/guidance.py                              # table, guidance.json

The group "words" answers in sentences, the group "sums" in bare sums. For each group and each strength w of
guidance we count two shares: answers in the style of the group that was given, and right results.

The "config" of guidance.json and guidance_val.json is as older code wrote it, like all numbers in them.
"""
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))    # the project's folder

from bench.compact_json import write_json
from configurator import configure, run
from decode import DecodingConfig
from plumbing.tokenizer import encode_prompt
from plumbing.trained import load
from speculate import generate
from tasks import load_problems, score
from tasks.arithmetic import is_in_style


@dataclass(frozen=True)
class Config:                       # `--help` prints the comments of this class
    runs: str = "out/styles_l2d_s0,out/styles_l2d_s1,out/styles_l2d_s2"
    data_dir: str = "data/styles"
    split: str = "test"
    limit: int = 300                # problems
    steps: int = 4                  # T
    strengths: str = "0,0.5,1,1.5,2,4"
    out: str = "experiments/guidance.json"


def measure_run(run_dir, config, settings):
    """{(group, w): (share of answers in the style of the group, share right)} for the settings (group, w)."""
    model, encoding, checkpoint = load(run_dir)
    names = checkpoint["data"]["group_names"]
    problems = load_problems(config.data_dir, config.split)[:config.limit]
    prompts = [encode_prompt(encoding, problem.prompt, problem.place) for problem in problems]
    found = {}
    for group, w in settings:
        decoding = DecodingConfig(steps=config.steps, guidance=w, max_new_tokens=64)
        number = names.index(group) if group else model.no_group
        out = generate(model, prompts, encoding.eot_token, decoding, [number] * len(prompts))
        texts = [encoding.decode(text.tokens) for text in out]
        styled = [is_in_style(group or "words", text) for text in texts]
        right = [score(problem, text).right for problem, text in zip(problems, texts)]
        found[group, w] = sum(styled) / len(styled), sum(right) / len(right)
    return found


def main(argv=None):
    config = configure(Config, argv, __doc__)
    strengths = [float(w) for w in config.strengths.split(",")]
    settings = [("", 1.0), *product(("words", "sums"), strengths)]
    runs = config.runs.split(",")
    found = [measure_run(run_dir, config, settings) for run_dir in runs]
    rows = []
    print("| group | w | in the group's style | right |\n" + "|---" * 4 + "|")
    for group, w in settings:
        styled, right = zip(*(of_run[group, w] for of_run in found))
        rows.append({"group": group, "w": w, "in_style": styled, "right": right})
        cells = [" ".join(f"{x:.3f}" for x in values) for values in (styled, right)]
        print(f"| {group or 'none (words)'} | {w:g} | {cells[0]} | {cells[1]} |", flush=True)
    write_json(config.out, {"config": vars(config), "runs": runs, "rows": rows}, levels=2)


if __name__ == "__main__":
    run(main)
