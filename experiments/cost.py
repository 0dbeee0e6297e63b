r"""
What steps cost: the time per token against T, with drafts and without, drawn from what bench wrote.

    python -m bench --out_dir=out/demo_l2d --steps=2,4,8,16,32 --draft=0,16 --stop=0 --batch=1,8 \
        --out=experiments/bench_steps.json
    python experiments/cost.py                  # experiments/cost.png
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))    # the project's folder

from configurator import configure, run
from plumbing.provenance import pyplot


@dataclass(frozen=True)
class Config:                       # `--help` prints the comments of this class
    bench: str = "experiments/bench_steps.json"     # what python -m bench wrote
    out: str = "experiments/cost.png"


def main(argv=None):
    config = configure(Config, argv, __doc__)
    with open(config.bench) as file:
        result = json.load(file)
    settings = result["config"]
    steps = [int(T) for T in settings["steps"].split(",")]
    figure, axes = pyplot("experiments/cost.py").subplots(figsize=(6, 4), layout="constrained")
    for color, (batch, measured) in enumerate(result["decode"].items()):
        for draft, style in zip(settings["draft"].split(","), ("o--", "o-")):
            name = f"drafts up to {draft}" if draft != "0" else "no drafts"
            cells = [measured["rows"][f"T={T}, {name}"]["x plain"] for T in steps]
            medians = [cell["median"] for cell in cells]
            bars = [[abs(cell[end] - cell["median"]) for cell in cells] for end in ("min", "max")]
            axes.errorbar(steps, medians, bars, fmt=style, color=f"C{color}", capsize=2,
                          label=f"batch {batch}, {name}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(steps, steps)
    axes.set(xlabel="T (evaluations per token)", ylabel="time per token / plain decoding's", ylim=0)
    axes.legend(fontsize=8)
    figure.savefig(config.out, dpi=110)


if __name__ == "__main__":
    run(main)
