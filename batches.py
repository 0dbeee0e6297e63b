"""
What a training step is given: examples as padded batches, and the label, time and noise that it draws.
"""
import numpy as np
import torch

from configurator import require
from diffusion import draw
from prepare_data import load_split


def load_fitting(config, split):
    """A split of the data, checked to fit block_size."""
    data = load_split(config.data_dir, split)
    longest = int(np.diff(data.offsets).max())
    require(longest - 1 <= config.block_size, f"{config.data_dir}: the longest example of {split} has "
            f"{longest} tokens, but block_size={config.block_size}; raise it (no example is cut or dropped)")
    return data


def batch_of(data, ids, device):
    """The examples ids of a Split as one right-padded batch: idx, at, y, label.

    idx (B, T) tokens; at = (rows, columns), each (N,): the positions whose next token is a target; y (N,)
    those targets; label (B,).
    """
    length = max(data.offsets[i + 1] - data.offsets[i] for i in ids) - 1
    idx, targets = np.zeros((len(ids), length), np.int64), np.full((len(ids), length), -1)
    for row, i in enumerate(ids):
        tokens, mask = (array[data.offsets[i]:data.offsets[i + 1]] for array in (data.tokens, data.mask))
        idx[row, :len(tokens) - 1] = tokens[:-1]
        targets[row, :len(tokens) - 1] = np.where(mask[1:], tokens[1:].astype(np.int64), -1)
    at = (targets >= 0).nonzero()
    label = data.labels[list(ids)].astype(np.int64)
    arrays = [torch.from_numpy(z) for z in (idx, *at, targets[at], label)]
    if torch.device(device).type == "cuda":                   # pinned: the copies wait for nothing
        arrays = [z.pin_memory() for z in arrays]
    idx, rows_, columns, y, label = (z.to(device, non_blocking=True) for z in arrays)
    return idx, (rows_, columns), y, label


def steps_of_epoch(data, config):
    return max(1, len(data.labels) // config.batch_size)


def batches_of_epoch(lengths, batch_size, n_micro, seed):
    """The example ids of one epoch, (steps, n_micro, batch_size / n_micro): of each step, for all ranks.

    Shuffled, sorted by length within chunks of 50 batches, and cut: the examples of a step are of similar
    length, so that there is little padding and no rank waits long for another. What fills no batch is left
    out until the next epoch's shuffle; data smaller than a batch is repeated to fill one.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths))
    if len(order) < batch_size:
        order = np.resize(order, batch_size)
    order = order[:len(order) // batch_size * batch_size]
    chunks = np.split(order, range(50 * batch_size, len(order), 50 * batch_size))
    order = np.concatenate([chunk[np.argsort(lengths[chunk], kind="stable")] for chunk in chunks])
    return rng.permutation(order.reshape(-1, batch_size)).reshape(-1, n_micro, batch_size // n_micro)


def generator_for(device, *key):
    """A generator that depends on the key alone, which begins with 0 in training and 1 in validation: every
    step and micro-batch draws its own numbers, on whatever rank."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(seed >> np.uint64(1)))


def draw_unroll(most_calls, generator):
    """T of one unrolled pass: 1 to most_calls path calls, uniform in the logarithm, and the trunk's."""
    return 1 + int((most_calls + 1) ** torch.rand((), generator=generator, device=generator.device))


def draw_noise(config, model, label, n, generator):
    """What one micro-batch of n targets draws, for nll: label (B,) after dropout, t (n,), x_0 (n, D), T.

    T is None, unless unrolled: then t is. Without a path t, x_0 and T are None.
    """
    if model.path is None:
        return label, None, None, None
    t, x_0 = draw(n, config, generator)
    drop = torch.rand(len(label), generator=generator, device=label.device) < config.label_dropout
    label = torch.where(drop, model.no_label, label)          # per example, not per position (deviation 8)
    if config.unroll:
        return label, None, x_0, draw_unroll(config.unroll, generator)
    return label, t, x_0, None
