"""
Costs that can be counted: parameters, FLOPs and bytes of a pass, and how many passes a run made.
"""
from collections import Counter
from typing import NamedTuple

from llama import LlamaConfig
from model import GPTConfig


class Shape(NamedTuple):
    """What costs of a block and of the rest of a trunk depend on."""
    maps: list                      # (inputs, outputs) of the linear maps of a block
    path_maps: list                 # the same, of a block of the path, which has no keys and values
    small: int                      # biases and norms of a block
    path_small: int
    queries: int                    # width of all queries of a position
    keys: int                       # width of all keys of a position, and that of its values
    others: int                     # parameters of the trunk besides blocks, wte and the final norm
    norm: int                       # of a norm


def gpt2_shape(size):
    C = size.n_embd
    mlp = [(C, 4 * C), (4 * C, C)]
    return Shape([(C, 3 * C), (C, C), *mlp], [(C, C), (C, C), *mlp], 13 * C, 11 * C, C, C,
                 size.block_size * C, 2 * C)


def llama_shape(size):
    C = size.n_embd
    q = size.n_head * size.head_size
    k = size.n_kv_head * size.head_size
    mlp = [(C, size.n_hidden), (C, size.n_hidden), (size.n_hidden, C)]
    return Shape([(C, q), (C, k), (C, k), (q, C), *mlp], [(C, q), (q, C), *mlp],
                 2 * C + size.qkv_bias * (q + 2 * k), 2 * C + size.qkv_bias * q, q, k,
                 0 if size.tied else size.vocab_size * C, C)


SHAPES = {GPTConfig: gpt2_shape, LlamaConfig: llama_shape}


def count_parameters(size, path):
    """{part: its number of parameters}. size: a trunk's config. path: a PathConfig, with one group."""
    L, C = size.n_layer, size.n_embd
    D, E, r = path.x_dim, path.t_dim, path.lora_rank
    shape = SHAPES[type(size)](size)
    n = {
        "trunk_blocks": L * (sum(a * b for a, b in shape.maps) + shape.small),
        "head": size.vocab_size * C,
        "trunk_lora": L * r * sum(a + b for a, b in shape.maps),
        "path_blocks": L * (sum(a * b for a, b in shape.path_maps) + shape.path_small),
        "path_lora": L * r * sum(a + b for a, b in shape.path_maps),
        "modulation": L * (E * E + E + 6 * C * E + 6 * C),
        "W": C * D,
        "x_in": D * D + D + D * C + C,
        "t_in_group_w": 2 * (E * E + E) + 2 * E + (E * E + E + E * C),
    }
    n["trunk"] = n["trunk_blocks"] + size.vocab_size * C + shape.others + shape.norm
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
    shape = SHAPES[type(size)](size)
    trunk_maps, path_maps = (L * sum(a * b for a, b in maps) for maps in (shape.maps, shape.path_maps))
    lora = n["path_lora"] if path.path_mode == "lora" else 0
    attention = 4 * L * S * shape.queries
    kv = 2 * L * S * shape.keys
    return {
        "trunk": {"flops": 2 * trunk_maps + attention, "weights": n["trunk_blocks"], "kv": kv},
        "path": {"flops": 2 * (path_maps + D * D + D * C + lora) + attention,
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
