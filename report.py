"""
What an evaluation says: intervals and paired tests, the rows of its table, the table as text, the figure.
"""
import json
import math
import os
import platform
import subprocess
import sys
from statistics import fmean

import torch

from configurator import UserError
from tasks import pass_at_k


# ------------------------------------------------------------------------------------------ statistics
def wilson(k, n, z=1.96):
    """95% interval of a share k / n (Wilson 1927)."""
    p, q = k / n, z * z / n
    center, half = (p + q / 2) / (1 + q), z / (1 + q) * math.sqrt(p * (1 - p) / n + q / (4 * n))
    return min(p, center - half), max(p, center + half)      # at p = 0 or 1 rounding could leave it outside


def sign_test(gained, lost):
    """Exact two-sided p of so many pairs gained and lost, if each could have fallen either way."""
    n = gained + lost
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(gained, lost) + 1)) / 2 ** n)


def mcnemar(a, b):
    """Paired comparison of two lists of bool, or of how many samples or seeds are right: where b has more, where a
    has more, exact two-sided p."""
    gained, lost = sum(y > x for x, y in zip(a, b)), sum(x > y for x, y in zip(a, b))
    return gained, lost, sign_test(gained, lost)


def compare(right, steps):
    """Right answers after `steps` evaluations against those after the first and the previous number of evaluations.
    right: {steps: of each problem, whether it is right}, in order. {} for the first."""
    others, row = list(right)[:list(right).index(steps)], {}
    for name, other in zip(("vs_first", "vs_previous"), (others[0], others[-1]) if others else ()):
        row[name] = {"steps": other} | dict(zip(("gained", "lost", "p"), mcnemar(right[other], right[steps])))
    return row


def shares(name, right, k, subjects):
    """{name: the share of right samples, and its interval}, right in 0..k of each problem; where there are several
    subjects, macro: the mean of their shares, and each one's share and number of problems."""
    n, of = len(right), {}
    for subject, r in zip(subjects, right):
        of.setdefault(subject, []).append(r / k)
    row = {name: sum(right) / (n * k), "interval": wilson(sum(right) / k, n)}    # n problems, not n k: they are alike
    if len(of) > 1:
        row["by_subject"] = {subject: [fmean(each), len(each)] for subject, each in sorted(of.items())}
        row["macro"] = fmean(share for share, _ in row["by_subject"].values())
    return row


def summary(records, k, subjects):
    """The numbers of a row of the table, from the records of its steps, with k samples each."""
    n, of = len(records), {}
    for name in records[0].keys() - {"id", "output"}:
        of[name] = sum(r[name] for r in records)
    row = {"n": n, **shares("strict", [r["strict"] for r in records], k, subjects),
           "flexible": of["flexible"] / (n * k), "well_formed": of["well_formed"] / (n * k), "cut": 1 - of["ended"] / n,
           "too_long": n - of["fits"], "tokens": of["predicted"] / n, "nfe": of["nfe"] / max(of["predicted"], 1),
           "computed": of["computed"] / max(of["predicted"], 1), "seconds": of["seconds"]}
    if k > 1:
        row["pass_at"] = {m: sum(pass_at_k(k, r["strict"], m) for r in records) / n for m in {1, 10, 100, k} if m <= k}
    return row


# ------------------------------------------------------------------------------------------- the table
def cells(row):
    """The heading and the text of each cell of a row."""
    def versus(v):
        return f"+{v['gained']} -{v['lost']} p={v['p']:.3g}" if v else ""
    def share(found, key, heading):
        yield f"{heading} [95%]", "{:.3f} [{:.3f}, {:.3f}]".format(found[key], *found["interval"])
        if "macro" in found:
            yield "macro", f"{found['macro']:.3f}"
        yield from (("vs first", versus(found.get("vs_first"))), ("vs previous", versus(found.get("vs_previous"))))
    yield "steps", str(row["steps"])
    if "strict" in row:
        yield from (("NFE", f"{row['nfe']:.2f}"), ("computed", f"{row['computed']:.2f}"))
        yield from share(row, "strict", "right")
        yield from ((f"pass@{k}", f"{p:.3f}") for k, p in row.get("pass_at", {}).items())
        yield from ((key.replace("_", "-"), f"{row[key]:.3f}") for key in ("flexible", "well_formed", "cut"))
        yield "tokens", f"{row['tokens']:.1f}"
    if "choices" in row:
        yield from share(row["choices"], "accuracy", "likeliest choice")
        yield "its NLL", f"{row['choices']['nll']:.4f}"
    yield from (("token acc.", f"{row['token_accuracy']:.4f}"), ("NLL", f"{row['nll']:.4f}"))
    for heading, kind in zip(("after = (NFE)", "other numbers", "rest"), row["by_kind"].values()):
        yield heading, f"{kind['accuracy']:.4f} ({kind['nfe']:.2f})" if kind["n"] else "-"


def aligned(lines):
    """Lists of cells as lines of text, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def table(rows):
    """The rows as text, and below it the subjects, where there are several."""
    rows = [list(cells(row)) for row in rows], rows
    text = aligned([[heading for heading, _ in rows[0][0]], *([cell for _, cell in row] for row in rows[0])])
    for title, found in (("right", rows[1]), ("likeliest choice", [row.get("choices", {}) for row in rows[1]])):
        if "by_subject" in found[0]:
            steps = [f"T = {row['steps']}" for row in rows[1]]
            lines = [[subject, str(n), *(f"{row['by_subject'][subject][0]:.3f}" for row in found)]
                     for subject, (_, n) in found[0]["by_subject"].items()]
            text += f"\n\n{aligned([[f'{title}, by subject', 'n', *steps], *lines])}"
    return text


# ------------------------------------------------------------------------------------------ the figure
def pyplot(option):
    """matplotlib.pyplot, drawing to files. UserError, naming the option that asks for it, where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError(f"error: {option} needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def plot(file, results, controls):
    """Share right against path calls per token with 95% intervals, as PNG; controls [(name, row)] as lines."""
    plt, rows = pyplot("--plot"), results["rows"]
    x, y = [row["nfe"] for row in rows], [row["strict"] for row in rows]
    bars = [[abs(row["strict"] - row["interval"][end]) for row in rows] for end in (0, 1)]
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.errorbar(x, y, bars, marker="o", capsize=3, label="L2D")
    for i, (name, row) in enumerate(controls):
        axes.axhline(row["strict"], color=f"C{i + 1}", linestyle="--", label=name)
        axes.axhspan(*row["interval"], color=f"C{i + 1}", alpha=0.1)
    axes.set(xlabel="path calls per token", ylabel=f"right ({results['config']['split']}, n = {rows[0]['n']})")
    axes.legend()
    figure.savefig(file, format="png", dpi=110)
    plt.close(figure)


# ------------------------------------------------------------------------------------------ provenance
def commit():
    """The commit of this code, -dirty where files have changed since; an empty string where git cannot tell."""
    folder = os.path.dirname(os.path.abspath(__file__))
    try:
        command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=40", "--match="]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:                                                      # no git here
        return ""


def provenance(device):
    """What made these numbers: commit, command, versions, machine."""
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"commit": commit(), "command": " ".join(sys.argv), "torch": torch.__version__,
            "python": platform.python_version(), "machine": machine}


def read_results(path):
    """The results that evaluate.py wrote to path, a dict with rows; without any where it is not there, or damaged."""
    try:
        with open(path, encoding="utf-8") as file:
            results = json.load(file)
        return results if all("steps" in row for row in results["rows"]) else {"rows": []}
    except (OSError, ValueError, KeyError, TypeError):
        return {"rows": []}
