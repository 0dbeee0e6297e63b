"""
Costs that can be counted: parameters, FLOPs and bytes of a pass, and how many passes a run made.
"""
from collections import Counter


def count_parameters(size, path):
    """{part: its number of parameters}. size: a GPTConfig. path: a PathConfig, of a path with one group."""
    L, C = size.n_layer, size.n_embd
    D, E, r = path.x_dim, path.t_dim, path.lora_rank
    n = {
        "trunk_blocks": L * (12 * C * C + 13 * C),
        "head": size.vocab_size * C,                              # tied to the embedding
        "trunk_lora": L * r * 16 * C,
        "path_blocks": L * (10 * C * C + 11 * C),                 # they have no keys and values
        "path_lora": L * r * 14 * C,
        "modulation": L * (E * E + E + 6 * C * E + 6 * C),
        "W": C * D,
        "x_in": D * D + D + D * C + C,
        "t_in_group_w": 2 * (E * E + E) + 2 * E + (E * E + E + E * C),
    }
    n["trunk"] = n["trunk_blocks"] + n["head"] + size.block_size * C + 2 * C
    rest = n["modulation"] + n["W"] + n["x_in"] + n["t_in_group_w"]
    n["l2d_full_path"] = n["path_blocks"] + rest
    n["l2d_lora_path"] = n["path_lora"] + rest
    return n


def count_pass(size, path, S):
    """What one pass of the trunk, the path and the head costs: {part: {"flops", "weights", "kv"}}.

    flops: of one position that sees S keys. weights: the numbers that are read once for all positions. kv:
    the numbers that a row reads, its keys and values. Modulations and w_d are looked up, which we leave out.
    """
    n = count_parameters(size, path)
    L, C, D = size.n_layer, size.n_embd, path.x_dim
    lora = n["path_lora"] if path.path_mode == "lora" else 0
    attention = 4 * L * S * C
    kv = 2 * L * C * S
    return {
        "trunk": {"flops": 24 * L * C * C + attention, "weights": n["trunk_blocks"], "kv": kv},
        "path": {"flops": 2 * (10 * L * C * C + D * D + D * C + lora) + attention,
                 "weights": n["path_blocks"] + n["x_in"] + lora, "kv": kv},
        "head": {"flops": 2 * n["head"], "weights": n["head"], "kv": 0},
    }


def least_seconds(cost, passes, n_bytes, bytes_per_s, flops_per_s):
    """The time that passes take at least, if each reads its bytes or computes its FLOPs, whichever is slower.

    cost: as from count_pass. passes: as from count_passes. n_bytes: of one number.
    """
    total = 0
    for (part, positions, rows), times in passes.items():
        n_read = cost[part]["weights"] + rows * cost[part]["kv"]
        n_flops = positions * cost[part]["flops"]
        total += times * max(n_bytes * n_read / bytes_per_s, n_flops / flops_per_s)
    return total


def count_passes(model, f):
    """Run f() and count how often trunk, path and head ran, with how many positions in how many rows.

    Returns {(part, positions, rows): times} and what f() returned. The head's rows are 0: it reads no keys.
    """
    passes = Counter()

    def note_trunk(_, inputs, output):
        idx = inputs[0]                                           # (B, Q)
        passes["trunk", idx.numel(), len(idx)] += 1

    def note_head(_, inputs, output):
        passes["head", len(inputs[0]), 0] += 1

    def note_path(_, inputs, output):
        k, _ = inputs[-1].kv[0]                                   # of the Context: (B, H, S, C/H)
        passes["path", len(inputs[0]), len(k)] += 1
    hooks = [model.trunk.register_forward_hook(note_trunk),
             model.trunk.ln_f.register_forward_hook(note_head)]
    if model.path is not None:
        hooks.append(model.path.register_forward_hook(note_path))
    result = f()
    for hook in hooks:
        hook.remove()
    return passes, result
