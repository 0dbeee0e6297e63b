r"""
Does guidance steer? Two groups answer the same questions in different styles; only the label tells which.

    export PYTHONPATH=.
    python prepare_data.py styles
    python train.py config/demo_trunk.py --data_dir=data/styles --out_dir=out/styles_trunk
    python train.py config/demo_l2d.py --data_dir=data/styles --trunk=out/styles_trunk/best.pt --sigma=2 \
        --steps=2000 --seed=0 --out_dir=out/styles_l2d_s0   # then seeds 1 and 2
    python experiments/guidance.py                          # table, guidance.json

Group "words" answers in sentences, group "sums" in bare sums. Counted, for each label and strength w of the
guidance: the share of answers in the style of the label that was given, and the share of right results.
"""
import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from checkpoint import load
from configurator import configure, run
from decode import Decoding, generate
from prepare_data import load_split
from tasks import score
from tasks.arithmetic import in_style
from tokens import encode_text


@dataclass(frozen=True)
class Config:
    runs: str = "out/styles_l2d_s0,out/styles_l2d_s1,out/styles_l2d_s2"
    data_dir: str = "data/styles"
    split: str = "test"
    limit: int = 300                # problems
    steps: int = 4
    strengths: str = "0,0.5,1,1.5,2,4"
    out: str = "experiments/guidance.json"


def outcome(run_dir, config, settings):
    """{setting: (share in the style of the label, share right)}; a setting is (label, w)."""
    model, encoding, checkpoint = load(run_dir)
    names = checkpoint["data"]["label_names"]
    problems = load_split(config.data_dir, config.split).problems[:config.limit]
    prompts, found = [encode_text(encoding, p.prompt, p.where) for p in problems], {}
    for label, w in settings:
        how = Decoding(steps=config.steps, guidance=w, max_new_tokens=64)
        labels = [names.index(label) if label else model.no_label] * len(prompts)
        texts = [encoding.decode(o.tokens) for o in generate(model, prompts, encoding.eot_token, how, labels)]
        styled = [in_style(label or "words", text) for text in texts]
        right = [score(p, text).right for p, text in zip(problems, texts)]
        found[label, w] = sum(styled) / len(styled), sum(right) / len(right)
    return found


def main(argv=None):
    config = configure(Config, argv, __doc__)
    strengths = [float(w) for w in config.strengths.split(",")]
    settings = [("", 1.0), *product(("words", "sums"), strengths)]
    runs = config.runs.split(",")
    found = [outcome(run_dir, config, settings) for run_dir in runs]
    rows = []
    print("| label | w | in the label's style | right |\n" + "|---" * 4 + "|")
    for setting in settings:
        styled, right = zip(*(each[setting] for each in found))
        label, w = setting
        rows.append({"label": label, "w": w, "in_style": styled, "right": right})
        cells = [" ".join(f"{x:.3f}" for x in values) for values in (styled, right)]
        print(f"| {label or 'none (words)'} | {w:g} | {cells[0]} | {cells[1]} |", flush=True)
    result = {"config": vars(config), "runs": runs, "rows": rows}
    Path(config.out).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    run(main)
