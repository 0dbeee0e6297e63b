"""
The table at the end of bench/on_a_gpu.sh: what was wanted on a GPU, and what was measured.

    python -m bench.targets out/on_a_gpu
"""
import json
import re
import sys
from pathlib import Path

from bench.timing import print_table
from configurator import require, run

ON = ", graphs on"


def median(report, table, row, column):
    """A number of the report, the median of its repeats. Raises KeyError where it was not reached."""
    number = report[table][row][column]
    return number["median"] if isinstance(number, dict) else number


def against_transformers(report):
    def speed(row):
        return median(report, "decoding 1", row, "tokens/s")
    return speed(f"T = 1{ON}") / speed("transformers, T = 1")


def same_tokens(report):
    found = [passed for name, (passed, _) in report["checks"].items() if name.startswith("graphs")]
    return sum(found) / len(found)


TARGETS = {                                                       # name: (at least or at most, wanted, found)
    "T = 1, as fast as eager": (">=", 5, lambda r: median(r, "decoding 1", f"T = 1{ON}", "x as fast")),
    "T = 1, as fast as transformers": (">=", 5, against_transformers),
    "T = 16, no drafts, ms a token": (
        "<=", 3, lambda r: median(r, "decoding 1", f"T = 16{ON}", "ms a token")),
    "T = 16, drafts, 95% kept, tokens/s": (
        ">=", 500, lambda r: median(r, "decoding 1", f"T = 16, drafts, 95% kept{ON}", "tokens/s")),
    "64 texts, T = 16, as fast as eager": (
        ">=", 4, lambda r: median(r, "decoding 64", f"T = 16{ON}", "x as fast")),
    "texts the same with graphs, float32, share": (">=", 1, same_tokens),
    "64 texts, memory, x needed": ("<=", 1.3, lambda r: median(r, "decoding 64", f"T = 16{ON}", "x needed")),
    "train.py, first step after, s": ("<=", 45, lambda r: r["first step"]),
    "a step, compiled, of eager": (
        "<=", 1, lambda r: median(r, "training", "compiled", "ms") / median(r, "training", "eager", "ms")),
    "evaluate.py, chosen batch": (">=", 1, lambda r: r["batch"]),
    "tests/test_gpu.py, failed": ("<=", 0, lambda r: r["failed tests"]),
}


def read_results(folder):
    """The report, and what the logs of the other parts say, as one dict."""
    folder = Path(folder)
    result = {}
    if (folder / "report.json").exists():
        result = json.loads((folder / "report.json").read_text())
    for name, log, pattern in (("first step", "train", r"^(\d+) compiled; the first step ended"),
                               ("batch", "evaluate", r"^\d+ batch_size=(\d+):"),
                               ("tests", "tests", r"^\d+ .*?(\d+) passed")):
        path = folder / f"{log}.log"
        found = re.search(pattern, path.read_text(), re.M) if path.exists() else None
        if found:
            result[name] = int(found[1])
    if "tests" in result:
        failed = re.search(r"(\d+) failed", (folder / "tests.log").read_text())
        result["failed tests"] = int(failed[1]) if failed else 0
    return result


def make_rows(result):
    """The rows of the table. What was not reached has no number."""
    rows = {}
    for name, (relation, wanted, measure) in TARGETS.items():
        try:
            number = measure(result)
            met = number >= wanted if relation == ">=" else number <= wanted
            rows[name] = {"wanted": f"{relation} {wanted}", "measured": number, "": "yes" if met else "NO"}
        except (KeyError, ZeroDivisionError, TypeError):          # no graphs there, or nothing counted
            rows[name] = {"wanted": f"{relation} {wanted}", "measured": "not reached", "": ""}
    return rows


def main():
    require(len(sys.argv) == 2, "which folder? python -m bench.targets out/on_a_gpu")
    result = read_results(sys.argv[1])
    print(f"\n{result.get('machine', 'no report')}, torch {result.get('torch', '?')}, "
          f"commit {result.get('commit', '?')}")
    print_table(make_rows(result))


if __name__ == "__main__":
    run(main)
