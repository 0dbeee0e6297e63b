"""
Show how the guess of each token changes over the evaluations (sample.py --trace).
"""
import sys


def tokens_of(output, encoding):
    """Return the tokens of a Continuation, the end of text included."""
    return output.tokens + [encoding.eot_token] * output.ended


def format_trace(output, encoding, color):
    """Return a line for each token of a Continuation: its bars, and each change of its guess.

    A bar shows the probability of the guess at one evaluation. A change is written as "t: guess probability".
    A star marks a token that differs from the trunk's best. A "|" marks another token at which a draft ended.
    """
    blocks = "▁▂▃▄▅▆▇█" if can_print("▁▂▃▄▅▆▇█") else "12345678"
    width = max(14, *(len(evaluations) for evaluations in output.trace))
    lines = [f"  {'token':<14} {'p at each step':<{width}}  guesses (t: guess, its probability)"]
    for place, (token, evaluations) in enumerate(zip(tokens_of(output, encoding), output.trace)):
        bars = "".join(blocks[min(7, int(8 * p))] for _, _, p in evaluations)
        changes = [f"{t:.2f}: {show(guess, encoding)} {p:.2f}" for i, (t, guess, p) in enumerate(evaluations)
                   if i == 0 or guess != evaluations[i - 1][1]]
        changed = token != evaluations[0][1]
        mark = "*" if changed else "|" if place in output.rejected else " "
        line = f"{mark} {show(token, encoding):<14} {bars:<{width}}  {'  ->  '.join(changes)}"
        lines.append(f"\033[1;33m{line}\033[0m" if changed and color else line)
    return "\n".join(lines)


def trace_records(output, encoding, **common):
    """Return the trace of a Continuation as data: a dict for each token, which JSON can hold.

    token, text: the token. evaluations: a dict of t, guess, text and probability for each. common goes into
    every record.
    """
    records = []
    for token, evaluations in zip(tokens_of(output, encoding), output.trace):
        found = [{"t": t, "guess": guess, "text": encoding.decode([guess]), "probability": p}
                 for t, guess, p in evaluations]
        records.append(common | {"token": token, "text": encoding.decode([token]), "evaluations": found})
    return records


def show(token, encoding):
    """Return the text of a token, with escapes for line breaks and the like."""
    return repr(encoding.decode([token]))[1:-1]


def can_print(text):
    try:
        return bool(text.encode(sys.stdout.encoding or "ascii"))
    except UnicodeEncodeError:
        return False
