"""
Show how the guess of each token changes over the evaluations (sample.py --trace).
"""
import sys


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
