"""
How far decoding should look ahead (speculate.py), chosen by what calls cost on this machine.
"""
import time
from weakref import WeakKeyDictionary

import torch

from model import Context

COSTS = WeakKeyDictionary()         # {model: {B: what measure_costs found}}


def measure_costs(model, rows):
    """What calls take here, in seconds: of a trunk pass over B rows, [(queries, seconds) of path calls], and
    of a small operation. Measured once for each model and (rounded) B, when decoding starts.
    """
    B = len(rows.out)
    known = COSTS.setdefault(model, {})
    key = B.bit_length()
    if key in known:
        return known[key]
    device = rows.token.device
    pos = torch.tensor(rows.positions, device=device)[:, None]
    kv, mask = rows.visible(pos, max(rows.positions))
    token = rows.token[:, None]
    if rows.h is None:
        h, _ = model.trunk(token, pos, kv, mask)
        rows.h = h[:, 0]

    def trunk_pass():
        model.trunk.head(model.trunk(token, pos, kv, mask)[0][:, 0]).argmax(-1)

    def path_call(Q):
        index = torch.arange(B, device=device).repeat_interleave(Q)
        S = torch.arange(kv[0][0].size(2), device=device)
        c = Context(rows.h[index], rows.token[index], pos[index, 0], kv, None,
                    (S <= pos[:, :, None].expand(B, Q, 1))[:, None])
        x = rows.x_0[index, 0]
        t = torch.full((len(index),), 0.5, device=device)
        group = rows.group[index]
        condition = model.path.condition(t[:1], group[:1])
        return lambda: model.trunk.head(model.merge(x, t, c, group, condition)).argmax(-1)
    path = []
    for Q in (1, 4, 16, 64, 256, 1024):
        path.append((B * Q, time_of(path_call(Q), device)))
        if Q > 1 and B * Q >= 64 and path[-1][1] > 3 * path[-2][1]:  # from here on it is about proportional
            break
    # More queries take no less time. Where they seem to, something else disturbed the call with fewer.
    path = [(Q, min(seconds for _, seconds in path[i:])) for i, (Q, _) in enumerate(path)]
    small = torch.zeros(8, 8, device=device)
    operation = time_of(lambda: [small + small for _ in range(100)], device) / 100
    known[key] = time_of(trunk_pass, device), path, operation
    return known[key]


def time_of(f, device):
    """Seconds of f(): the least of three repeats after a first run, or of ten where that takes no time."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = []
    while len(seconds) < 4 or len(seconds) < 11 and sum(seconds) < 0.02:
        wait()
        start = time.perf_counter()
        f()
        wait()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def interpolate(points, n):
    """Seconds of a call over n queries, from measured points: lines between them, proportional behind."""
    for (a, s_a), (b, s_b) in zip(points, points[1:]):
        if n <= b:
            return s_a + max(0.0, (n - a) / (b - a)) * (s_b - s_a)
    last, seconds = points[-1]
    return seconds * max(1.0, n / last)


def choose_sizes(out, earlier, config, longest, widest, costs):
    """The draft length K and the window W that should take the least time per token.

    out: the Continuations of the B rows. earlier: the sum of those written before. longest, widest: the most
    that K and W may be. costs: from measure_costs.
    """
    trunk, path, operation = costs
    B = len(out)

    def seconds(K, W, calls, again, share):
        # what is neither trunk nor path, counted in small operations. Fitted to the demo on a CPU
        of_a_pass = 300 + B * K * config.steps / 7
        of_a_round = 700 + 30 * config.steps + (calls + again) * of_a_pass
        first = of_a_round * operation + K * trunk + calls * interpolate(path, B * K * W)
        return first + again * interpolate(path, max(1, B * share) * W)
    sizes = [(K, W) for K in powers_of_two(longest) for W in powers_of_two(widest)]
    return least_time(out, earlier, config, sizes, seconds)


def choose_shape(out, earlier, config, measured):
    """The same in fixed shapes, of which there are few, and where all positions take part in every pass.

    measured: {(K, W): seconds of a round with one pass of the path, and of each further pass}.
    """
    def seconds(K, W, calls, again, share):
        first, further = measured[K, W]
        return first + max(0, calls + again - 1) * further
    return least_time(out, earlier, config, measured, seconds)


def least_time(out, earlier, config, sizes, seconds):
    """The (K, W) of sizes that should take the least time per token.

    seconds: a function of K, W, the calls of all B K positions in a round, further calls, and the share of
    rows that take part in these.

    A share a of the tokens was as drafted so far, so a draft of K tokens yields (1 - a^K) / (1 - a) tokens on
    average. The guess changed at a share q of the evaluations, so a window of W serves (1 - (1 - q)^W) / q of
    them. To begin with we assume that ten tokens came before: one of them differed from its draft, and two
    changed their guess.
    """
    B = len(out)
    known = [*out, earlier]
    n = 10 + sum(o.predicted for o in known)
    differ = (1 + sum(len(o.rejected) for o in known)) / n        # 1 - a
    E = max(1, (10 * (config.steps - 1) + sum(o.nfe for o in known)) / n)   # path calls of a token
    q = min(1.0, (2 + sum(o.changes for o in known)) / n / E)

    def time_per_token(K, W):
        tokens = (1 - (1 - differ) ** K) / differ
        again = tokens * E * (q / (1 - (1 - q) ** W) - 1 / W)     # one more call for each change of guess
        rows_again = min(1.0, again)                              # share of the rows that need one
        n_again = again if B == 1 else max(again, 1 - (1 - rows_again) ** B)
        return seconds(K, W, E / W, n_again, rows_again) / tokens
    return min(sizes, key=lambda size: time_per_token(*size))


def powers_of_two(most):
    """1, 2, 4, ..., and most."""
    return [2 ** i for i in range(most.bit_length()) if 2 ** i < most] + [most]
