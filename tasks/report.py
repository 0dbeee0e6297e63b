"""
What an evaluation says: statistics, the rows of its table, the table as text, as a file, as a figure.

A row is a dict with all the numbers of one T. Its "right" lists how many answers to each problem are right.
"""
import fcntl
import json
import math
import os
from statistics import fmean

from plumbing.files import write_file
from plumbing.provenance import pyplot
from tasks import pass_at_k

KINDS = ("result", "number", "rest")    # of a target: a number that follows an "=", another number, all else


# ------------------------------------------------------------------------------------------ statistics
def wilson(k, n, z=1.96):
    """Return the ends of the 95% interval of a share k / n (Wilson 1927)."""
    p = k / n
    q = z * z / n
    center = (p + q / 2) / (1 + q)
    half = z / (1 + q) * math.sqrt(p * (1 - p) / n + q / (4 * n))
    return max(0.0, min(p, center - half)), min(1.0, max(p, center + half))  # rounding could leave [0, 1]


def sign_test(gained, lost):
    """Return the exact two-sided p of so many pairs gained and lost, if each could have fallen either way."""
    n = gained + lost
    tail = sum(math.comb(n, i) for i in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2 ** n)


def mcnemar(a, b):
    """Compare two lists pair by pair: bools, or how many samples, or seeds, are right.

    Returns in how many pairs b has more, in how many a has more, and the exact two-sided p.
    """
    gained = sum(y > x for x, y in zip(a, b))
    lost = sum(x > y for x, y in zip(a, b))
    return gained, lost, sign_test(gained, lost)


def compare(row, other):
    """Compare a row with another one, on the same problems: how many became right, how many wrong, and p."""
    gained, lost, p = mcnemar(other["right"], row["right"])
    return {"gained": gained, "lost": lost, "p": p}


def add_comparisons(rows):
    """Compare every row, and its "choices", with the first row and with the previous one."""
    for part in ("right", "choices"):
        if part not in rows[0]:
            continue
        results = [row["choices"] if part == "choices" else row for row in rows]
        for i in range(1, len(rows)):
            results[i]["vs_first"] = {"steps": rows[0]["steps"]} | compare(results[i], results[0])
            results[i]["vs_previous"] = {"steps": rows[i - 1]["steps"]} | compare(results[i], results[i - 1])


def compute_shares(name, right, k, subjects):
    """Return {name: the share that is right, "interval": ..., "right": ...} of problems with k samples each.

    right: for each problem, how many of its samples are right. subjects: the subject of each problem. With
    several subjects the dict also has by_subject, {subject: (share, problems)}, and macro, the mean of these
    shares. The interval counts problems, not samples, because samples of one problem are alike.
    """
    n = len(right)
    row = {name: sum(right) / (n * k), "interval": wilson(sum(right) / k, n), "right": right}
    shares = {}
    for subject, count in zip(subjects, right):
        shares.setdefault(subject, []).append(count / k)
    if len(shares) > 1:
        row["by_subject"] = {subject: (fmean(each), len(each)) for subject, each in sorted(shares.items())}
        row["macro"] = fmean(share for share, _ in row["by_subject"].values())
    return row


def summarize(records, k, subjects):
    """Return the numbers of a row, from the scored answers to each problem, with k samples each."""
    n = len(records)
    names = ("flexible", "well_formed", "ended", "fits", "predicted", "nfe", "computed", "seconds")
    total = {name: sum(record[name] for record in records) for name in names}
    row = {"n": n} | compute_shares("strict", [record["strict"] for record in records], k, subjects)
    row["flexible"] = total["flexible"] / (n * k)
    row["well_formed"] = total["well_formed"] / (n * k)
    row["cut"] = 1 - total["ended"] / n
    row["too_long"] = n - total["fits"]
    row["tokens"] = total["predicted"] / n
    row["nfe"] = total["nfe"] / max(total["predicted"], 1)
    row["computed"] = total["computed"] / max(total["predicted"], 1)
    if k > 1:
        row["pass_at"] = {m: fmean(pass_at_k(k, record["strict"], m) for record in records)
                          for m in sorted({1, 10, 100, k}) if m <= k}
    row["seconds"] = total["seconds"]
    return row


# ------------------------------------------------------------------------------------------- the table
def format_comparison(found):
    return f"+{found['gained']} -{found['lost']} p={found['p']:.3g}" if found else ""


def list_share_cells(found, name, heading):
    """Yield the heading and the text of the cells for a share, what it gained and what it lost."""
    low, high = found["interval"]
    yield f"{heading} [95%]", f"{found[name]:.3f} [{low:.3f}, {high:.3f}]"
    if "macro" in found:
        yield "macro", f"{found['macro']:.3f}"
    yield "vs first", format_comparison(found.get("vs_first"))
    yield "vs previous", format_comparison(found.get("vs_previous"))


def list_cells(row):
    """Yield the heading and the text of each cell of a row."""
    yield "steps", str(row["steps"])
    if "strict" in row:
        yield "NFE", f"{row['nfe']:.2f}"
        yield "computed", f"{row['computed']:.2f}"
        yield from list_share_cells(row, "strict", "right")
        for k, share in row.get("pass_at", {}).items():
            yield f"pass@{k}", f"{share:.3f}"
        for name in ("flexible", "well_formed", "cut"):
            yield name.replace("_", "-"), f"{row[name]:.3f}"
        yield "tokens", f"{row['tokens']:.1f}"
    if "choices" in row:
        yield from list_share_cells(row["choices"], "accuracy", "likeliest choice")
        yield "its NLL", f"{row['choices']['nll']:.4f}"
    yield "token acc.", f"{row['token_accuracy']:.4f}"
    yield "NLL", f"{row['nll']:.4f}"
    yield "p(true)", f"{row['p_true']:.4f}"
    yield "entropy", f"{row['entropy']:.4f}"
    for heading, kind in zip(("after = (NFE)", "other numbers", "rest"), row["by_kind"].values()):
        yield heading, f"{kind['accuracy']:.4f} ({kind['nfe']:.2f})" if kind["n"] else "-"


def align(lines):
    """Return lines, lists of equally many cells, as text. Every column is as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def format_table(rows):
    """Return the rows as text, with a table of the subjects below, where there are several."""
    cells = [list(list_cells(row)) for row in rows]
    headings = [heading for heading, _ in cells[0]]
    tables = [align([headings, *([text for _, text in line] for line in cells)])]
    for title, found in (("right", rows), ("likeliest choice", [row.get("choices", {}) for row in rows])):
        lines = [[f"{title}, by subject", "n", *(f"T = {row['steps']}" for row in rows)]]
        for subject, (_, n) in found[0].get("by_subject", {}).items():
            lines.append([subject, str(n), *(f"{row['by_subject'][subject][0]:.3f}" for row in found)])
        if len(lines) > 1:
            tables.append(align(lines))
    return "\n\n".join(tables)


# -------------------------------------------------------------------------------------------- the file
def read_results(path):
    """Return what write_results wrote to path; {"rows": []} where nothing is there, or something else."""
    try:
        with open(path, encoding="utf-8") as file:
            results = json.load(file)
        if results.keys() >= {"config", "depends"} and all("by_kind" in row for row in results["rows"]):
            return results
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return {"rows": []}


def write_results(path, results):
    """Write results as JSON, one row a line. results["depends"] says what their rows depend on, beside T.

    Rows of other T that are in the file already stay if they depend on the same. Returns the T of the rows
    that do not, and are therefore left out.
    """
    with open(os.path.join(os.path.dirname(path), "lock"), "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)                                 # another run may write just now
        before = read_results(path)
        rows = {row["steps"]: row for row in before["rows"]}
        dropped = []
        if before.get("depends") != json.loads(json.dumps(results["depends"])):
            dropped = sorted(rows.keys() - {row["steps"] for row in results["rows"]})
            rows = {}
        rows |= {row["steps"]: row for row in results["rows"]}
        whole = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in results.items() if key != "rows"]
        lines = ",\n".join(json.dumps(rows[steps]) for steps in sorted(rows))
        whole.append(f'"rows": [\n{lines}\n]')
        text = "{" + ",\n".join(whole) + "}\n"
        write_file(path, lambda file: file.write(text.encode()))
    return dropped


# ------------------------------------------------------------------------------------------ the figure
def plot(file, results):
    """Draw the share right against path calls per token, with 95% intervals, as PNG."""
    plt = pyplot("--plot")
    rows = results["rows"]
    x = [row["nfe"] for row in rows]
    y = [row["strict"] for row in rows]
    bars = [[abs(row["strict"] - row["interval"][end]) for row in rows] for end in (0, 1)]
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.errorbar(x, y, bars, marker="o", capsize=3)
    axes.set(xlabel="path calls per token",
             ylabel=f"share right ({results['config']['split']}, n = {rows[0]['n']})")
    figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
