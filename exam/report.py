"""
What an evaluation says: statistics, the rows of its table, the table as text, as a file, as a figure.
"""
import fcntl
import json
import math
import os
import platform
import subprocess
import sys
from statistics import fmean

import torch

from configurator import UserError
from files import write_file
from tasks import pass_at_k


# ------------------------------------------------------------------------------------------ statistics
def wilson(k, n, z=1.96):
    """95% interval of a share k / n (Wilson 1927)."""
    p, q = k / n, z * z / n
    center, half = (p + q / 2) / (1 + q), z / (1 + q) * math.sqrt(p * (1 - p) / n + q / (4 * n))
    return max(0.0, min(p, center - half)), min(1.0, max(p, center + half))  # rounding could leave [0, 1]


def sign_test(gained, lost):
    """Exact two-sided p of so many pairs gained and lost, if each could have fallen either way."""
    n = gained + lost
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(gained, lost) + 1)) / 2 ** n)


def mcnemar(a, b):
    """Paired comparison of two lists of bool, or of how many samples, or seeds, are right.

    Returns where b has more, where a has more, and the exact two-sided p.
    """
    gained, lost = sum(y > x for x, y in zip(a, b)), sum(x > y for x, y in zip(a, b))
    return gained, lost, sign_test(gained, lost)


def compare(right, steps):
    """What is right after `steps` evaluations against the first and against the previous number of them.

    right: {steps: how often each problem is right}, in the order of evaluation; {} for the first of it.
    """
    others = list(right)[:list(right).index(steps)]
    return {name: {"steps": other} | dict(zip(("gained", "lost", "p"), mcnemar(right[other], right[steps])))
            for name, other in zip(("vs_first", "vs_previous"), others[:1] + others[-1:])}


def shares(name, right, k, subjects):
    """{name: share that is right, "interval": ...} of n problems with k samples each, right in 0..k of each.

    Where there are several subjects, also by_subject, {subject: (share, problems)}, and macro, the mean of
    these shares. The interval counts problems, not samples: samples of one problem are alike.
    """
    n, of = len(right), {}
    for subject, r in zip(subjects, right):
        of.setdefault(subject, []).append(r / k)
    row = {name: sum(right) / (n * k), "interval": wilson(sum(right) / k, n)}
    if len(of) > 1:
        row["by_subject"] = {subject: (fmean(each), len(each)) for subject, each in sorted(of.items())}
        row["macro"] = fmean(share for share, _ in row["by_subject"].values())
    return row


def summary(records, k, subjects):
    """The numbers of a row of the table, from the records of its steps, with k samples each."""
    n = len(records)
    total = {name: sum(r[name] for r in records) for name in records[0] if name not in ("id", "output")}
    row = {"n": n} | shares("strict", [r["strict"] for r in records], k, subjects)
    row |= {name: total[name] / (n * k) for name in ("flexible", "well_formed")}
    row |= {"cut": 1 - total["ended"] / n, "too_long": n - total["fits"], "tokens": total["predicted"] / n}
    row |= {name: total[name] / max(total["predicted"], 1) for name in ("nfe", "computed")}
    if k > 1:
        row["pass_at"] = {m: fmean(pass_at_k(k, r["strict"], m) for r in records)
                          for m in sorted({1, 10, 100, k}) if m <= k}
    return row | {"seconds": total["seconds"]}


# ------------------------------------------------------------------------------------------- the table
def cells(row):
    """The heading and the text of each cell of a row."""
    def versus(v):
        return f"+{v['gained']} -{v['lost']} p={v['p']:.3g}" if v else ""
    def share(found, key, heading):
        yield f"{heading} [95%]", "{:.3f} [{:.3f}, {:.3f}]".format(found[key], *found["interval"])
        if "macro" in found:
            yield "macro", f"{found['macro']:.3f}"
        yield "vs first", versus(found.get("vs_first"))
        yield "vs previous", versus(found.get("vs_previous"))
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
    """Lines, lists of as many cells each, as text, every column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def table(rows):
    """The rows as text, and below it the subjects, where there are several."""
    lines = [list(zip(*cells(row))) for row in rows]
    text = aligned([lines[0][0], *(texts for _, texts in lines)])
    for title, found in (("right", rows), ("likeliest choice", [row.get("choices", {}) for row in rows])):
        lines = [[f"{title}, by subject", "n", *(f"T = {row['steps']}" for row in rows)]]
        for subject, (_, n) in found[0].get("by_subject", {}).items():
            lines.append([subject, str(n), *(f"{row['by_subject'][subject][0]:.3f}" for row in found)])
        text += "\n\n" + aligned(lines) if len(lines) > 1 else ""
    return text


# ------------------------------------------------------------------------------------------- the trace
def format_trace(output, tokens, encoding, color):
    """A line for each token: the trunk's guess, each change of guess and when, and its probability over the
    steps.

    A star marks a token other than the trunk's best: greedily decoded, one that the steps changed, where a
    draft ends. A bar marks the other ends of drafts, among sampled tokens.
    """
    def show(token):
        return repr(encoding.decode([token]))[1:-1]
    blocks = "▁▂▃▄▅▆▇█"
    if not can_print(blocks):
        blocks = "12345678"
    width = max(14, *(len(evaluations) for evaluations in output.trace))
    lines = [f"  {'token':<14} {'p at each step':<{width}}  guesses (t: guess, its probability)"]
    for place, (token, evaluations) in enumerate(zip(tokens, output.trace)):
        bars = "".join(blocks[min(7, int(8 * p))] for _, _, p in evaluations)
        changes = [f"{t:.2f}: {show(guess)} {p:.2f}" for i, (t, guess, p) in enumerate(evaluations)
                   if i == 0 or guess != evaluations[i - 1][1]]
        changed = token != evaluations[0][1]
        mark = "*" if changed else "|" if place in output.rejected else " "
        line = f"{mark} {show(token):<14} {bars:<{width}}  {'  ->  '.join(changes)}"
        lines.append(f"\033[1;33m{line}\033[0m" if changed and color else line)
    return "\n".join(lines)


def can_print(text):
    try:
        return bool(text.encode(sys.stdout.encoding or "ascii"))
    except UnicodeEncodeError:
        return False


# -------------------------------------------------------------------------------------------- the file
def commit():
    """The commit of this code, -dirty where files have changed since; "" where git cannot tell."""
    folder = os.path.dirname(os.path.abspath(__file__))
    try:
        command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=40", "--match="]
        return subprocess.run(command, capture_output=True, check=False, text=True).stdout.strip()
    except OSError:                                                      # no git here
        return ""


def provenance(device):
    """What made these numbers: commit, command, versions, machine."""
    cpu = platform.processor() or platform.machine()
    return {"commit": commit(), "command": " ".join(sys.argv), "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu}


def read_results(path):
    """What write_results wrote to path; {"rows": []} where nothing is there, or something else."""
    try:
        with open(path, encoding="utf-8") as file:
            results = json.load(file)
        if results.keys() >= {"config", "problems_sha256"} and all("by_kind" in r for r in results["rows"]):
            return results
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return {"rows": []}


def write_results(path, results):
    """Results as JSON. Rows of other numbers of steps stay: all else is the same, for the name says so."""
    with open(os.path.join(os.path.dirname(path), "lock"), "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)                                 # another run may write just now
        rows = {row["steps"]: row for row in read_results(path)["rows"] + results["rows"]}
        whole = results | {"rows": [rows[steps] for steps in sorted(rows)]}
        write_file(path, lambda file: file.write(json.dumps(whole, indent=1).encode()))


# ------------------------------------------------------------------------------------------ the figure
def pyplot(option):
    """matplotlib.pyplot, drawing to files. UserError, naming the option that needs it, if it is missing."""
    try:
        import matplotlib
    except ImportError:
        raise UserError(f"{option} needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def plot(file, results):
    """Share right against path calls per token, with 95% intervals, as PNG."""
    plt, rows = pyplot("--plot"), results["rows"]
    x, y = [row["nfe"] for row in rows], [row["strict"] for row in rows]
    bars = [[abs(row["strict"] - row["interval"][end]) for row in rows] for end in (0, 1)]
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.errorbar(x, y, bars, marker="o", capsize=3)
    split, n = results["config"]["split"], rows[0]["n"]
    axes.set(xlabel="path calls per token", ylabel=f"share right ({split}, n = {n})")
    figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
