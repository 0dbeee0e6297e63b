"""
Prepared data on disk, in a folder as prepare_data.py describes it, and batches of it.
"""
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from configurator import UserError

KEYS = {"task", "tokenizer", "n_vocab", "eot", "prompt", "shots", "counts", "max_tokens", "group_names"}


class Split(NamedTuple):
    tokens: np.ndarray                  # (N,) uint16, or uint32 where the vocabulary is larger
    mask: np.ndarray                    # (N,) bool, True where the token is a target
    offsets: np.ndarray                 # (n + 1,) int64: example i is tokens[offsets[i]:offsets[i + 1]]
    groups: np.ndarray                  # (n,) uint8: the group of each example, an index into group_names


# ----------------------------------------------------------------------------------------------- read
def remedy(data_dir):
    """Return the command that makes the data of data_dir."""
    path = Path(data_dir)
    if path.parent == Path("data"):
        return f"python prepare_data.py {path.name}"
    return f"python prepare_data.py TASK --out_dir={path} (without a TASK it lists them)"


def load_manifest(data_dir):
    """Return the manifest of prepared data, a dict. Raises UserError if there is none or it is damaged."""
    path = Path(data_dir) / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        missing = KEYS - manifest.keys() or {"name", "fingerprint"} - manifest["tokenizer"].keys()
        if missing or not isinstance(manifest["counts"], dict):
            raise ValueError(f"it has no {', '.join(sorted(missing)) or 'counts'}")
    except OSError as e:
        raise UserError(f"no prepared data in {data_dir} ({path.name}: {e.strerror}); "
                        f"make it with: {remedy(data_dir)}") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{path} is damaged, or was written by another version ({e}); make it again with: "
                        f"{remedy(data_dir)}") from None
    return manifest


def load_split(data_dir, split):
    """Return one Split of prepared data. Raises UserError if it is missing or damaged."""
    manifest = load_manifest(data_dir)
    if split not in manifest["counts"]:
        raise UserError(f"{data_dir} has no split {split!r}; it has {', '.join(manifest['counts'])}")
    path = Path(data_dir) / f"{split}.npz"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            data = Split(*(arrays[name] for name in Split._fields))
        wrong = what_is_wrong(data, manifest, manifest["counts"][split])
        if wrong:
            raise ValueError(f"inconsistent {wrong}")
    except Exception as e:              # zipfile and numpy raise anything on a damaged file
        raise UserError(f"{path} is missing or damaged ({e}); make it again with: "
                        f"{remedy(data_dir)}") from None
    return data


def what_is_wrong(data, manifest, n):
    """Return which property of a Split of n examples does not hold, or ""."""
    tokens, mask, offsets, groups = data
    dtypes = [array.dtype for array in data[1:]]
    if tokens.dtype not in (np.uint16, np.uint32) or dtypes != [np.bool_, np.int64, np.uint8]:
        return "dtypes"
    if not n == len(groups) == len(offsets) - 1 or len(tokens) != len(mask):
        return "counts"
    if offsets[0] != 0 or offsets[-1] != len(tokens) or (np.diff(offsets) < 2).any():
        return "offsets"
    first, last = offsets[:-1], offsets[1:] - 1
    if tokens.max() >= manifest["n_vocab"] or (tokens[last] != manifest["eot"]).any():
        return "tokens"
    if not mask[last].all() or mask[first].any():
        return "mask"
    return "groups" if groups.max() >= len(manifest["group_names"]) else ""


# -------------------------------------------------------------------------------------------- batches
def load_batch(data, ids, device):
    """
    Return the examples ids of a Split as one batch, padded on the right: (idx, at, y, group).

    idx (B, S): the tokens. at: a pair (rows, columns), each (N,): the positions whose next token is a target.
    y (N,): those targets. group (B,): the group of each example.
    """
    length = max(data.offsets[i + 1] - data.offsets[i] for i in ids) - 1
    idx = np.zeros((len(ids), length), np.int64)
    targets = np.full((len(ids), length), -1)
    for row, i in enumerate(ids):
        example = slice(data.offsets[i], data.offsets[i + 1])
        tokens = data.tokens[example].astype(np.int64)
        idx[row, :len(tokens) - 1] = tokens[:-1]
        targets[row, :len(tokens) - 1] = np.where(data.mask[example][1:], tokens[1:], -1)
    rows, columns = (targets >= 0).nonzero()
    group = data.groups[list(ids)].astype(np.int64)

    tensors = [torch.from_numpy(array) for array in (idx, rows, columns, targets[rows, columns], group)]
    if torch.device(device).type == "cuda":
        tensors = [tensor.pin_memory() for tensor in tensors]        # so that the copies wait for nothing
    idx, rows, columns, y, group = (tensor.to(device, non_blocking=True) for tensor in tensors)
    return idx, (rows, columns), y, group


def batches_of_epoch(lengths, batch_size, n_micro, seed):
    """
    Return the example ids of one epoch: (steps, n_micro, batch_size / n_micro), for all ranks together.

    Shuffled examples are sorted by length within chunks of 50 batches, so that a batch has little padding and
    no rank waits long for another. What fills no batch is left out until the next epoch. Data smaller than a
    batch is repeated to fill one.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths))
    if len(order) < batch_size:
        order = np.resize(order, batch_size)
    order = order[:len(order) // batch_size * batch_size]
    chunks = np.split(order, range(50 * batch_size, len(order), 50 * batch_size))
    by_length = np.concatenate([chunk[np.argsort(lengths[chunk], kind="stable")] for chunk in chunks])
    batches = rng.permutation(by_length.reshape(-1, batch_size))
    return batches.reshape(-1, n_micro, batch_size // n_micro)


def iters_per_epoch(data, batch_size):
    return max(1, len(data.groups) // batch_size)


def iterate_batches(data, batch_size, n_micro, seed, iter_num):
    """Yield the example ids (n_micro, batch_size / n_micro) of iteration iter_num and of all that follow."""
    lengths = np.diff(data.offsets)
    while True:
        epoch, place = divmod(iter_num, iters_per_epoch(data, batch_size))
        order = batches_of_epoch(lengths, batch_size, n_micro, [seed, epoch])
        yield from order[place:]
        iter_num += len(order) - place


def count_targets(data, ids):
    """Return the number of targets in the examples ids, an array of any shape."""
    return int(sum(data.mask[data.offsets[i]:data.offsets[i + 1]].sum() for i in ids.flatten()))
