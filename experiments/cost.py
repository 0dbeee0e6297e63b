r"""
What steps cost: the time per token against T, with and without speculation, drawn from what bench wrote.

    python -m bench --out_dir=demo --steps=2,4,8,16,32,64 --draft=0,16 --ahead=0,1000 --stop=0 \
        --batch=1,8,64 --repeats=3 --out=experiments/bench_steps.json
    python experiments/cost.py                  # experiments/cost.png, and the table of docs/COST.md
"""
import json
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))    # the project's folder

from configurator import configure, run
from plumbing.provenance import pyplot

TICKS = [1, 2, 4, 8, 16, 32, 64]
STYLES = ("o--", "o-", "s--", "s-")
LABELS = {(False, False): "one after another", (False, True): "at once",
          (True, False): "drafts", (True, True): "at once, with drafts"}


@dataclass(frozen=True)
class Config:                       # `--help` prints the comments of this class
    bench: str = "experiments/bench_steps.json"     # what python -m bench wrote
    out: str = "experiments/cost.png"


def draw_batch(axes, batch, rows, settings, steps):
    """Draw the curves of one size of batch, and print them as rows of a table."""
    ways = product(settings["draft"].split(","), settings["ahead"].split(","))
    for (draft, ahead), style in zip(ways, STYLES):
        name = f"drafts up to {draft}" if draft != "0" else "no drafts"
        name += f", ahead up to {ahead}" if ahead != "0" else ""
        cells = [rows[f"T={T}, {name}"]["x plain"] for T in steps]
        medians = [cell["median"] for cell in cells]
        bars = [[abs(cell[end] - cell["median"]) for cell in cells] for end in ("min", "max")]
        label = LABELS[draft != "0", ahead != "0"]
        axes.errorbar(steps, medians, bars, fmt=style, capsize=2, label=label)
        numbers = [f"{m:.2f}" if m < 10 else f"{m:.1f}" for m in medians]
        print(f"| batch {batch}, {label} | {' | '.join(numbers)} |")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(steps, steps)
    axes.set_yticks(TICKS, TICKS)
    axes.set(xlabel="T (evaluations per token)", title=f"batch {batch}")


def main(argv=None):
    config = configure(Config, argv, __doc__)
    with open(config.bench) as file:
        result = json.load(file)
    settings = result["config"]
    steps = [int(T) for T in settings["steps"].split(",")]
    batches = result["decode"]
    figure, panels = pyplot("experiments/cost.py").subplots(1, len(batches), figsize=(11, 4), sharey=True,
                                                            squeeze=False, layout="constrained")
    print(f"| | {' | '.join(f'T = {T}' for T in steps)} |\n" + "|---" * (1 + len(steps)) + "|")
    for axes, (batch, measured) in zip(panels[0], batches.items()):
        draw_batch(axes, batch, measured["rows"], settings, steps)
    panels[0][0].set_ylabel("time per token / plain decoding's")
    panels[0][-1].legend(fontsize=8)
    figure.savefig(config.out, dpi=110)


if __name__ == "__main__":
    run(main)
