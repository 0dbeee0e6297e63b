"""
How many texts are written side by side: as many as fit on a GPU, and fewer where that was too many.
"""
import torch

ON_A_CPU = 64
MOST = 256                          # more gain little: then arithmetic takes the time
SHARE = 0.8                         # of the free memory. The rest is for fragments, and what is not counted


@torch.no_grad()
def count_cache_bytes(model, length):
    """Count the bytes of the keys and values of a text with this length."""
    idx = torch.zeros(1, 1, dtype=torch.long, device=model.trunk.wte.weight.device)
    _, kv = model.trunk(idx)                                      # of one position
    return length * sum(k.nbytes + v.nbytes for k, v in kv)


def count_row_bytes(model, config, longest):
    """Count the bytes that each text takes on the device while texts are written side by side, at the most.

    model: an L2D pair. config: a DecodingConfig. longest: tokens of the longest prompt.
    """
    n_vocab, C = model.trunk.wte.weight.shape
    length = min(longest + config.max_new_tokens, model.trunk.config.block_size)
    keys_and_values = count_cache_bytes(model, length)
    noise = 4 * config.max_new_tokens
    logits = 4 * n_vocab * 8                                      # four tokens a round on a GPU, and stacked
    queries = longest                                             # of one pass; first it reads the prompt
    if config.steps > 1:
        draft = max(1, config.draft)
        window = max(1, min(config.ahead, config.steps - 1))
        noise *= model.path.config.x_dim + 1 + config.steps
        logits = 4 * n_vocab * (6 * draft + window)               # about six copies of them for each position
        queries = max(queries, draft * window)
    held = 16 * 4 * C * queries                                   # one block, and the path's conditions
    return 2 * keys_and_values + noise + logits + held            # twice: they are copied as they grow


def fit_batch(free, row_bytes):
    """How many texts with row_bytes each fit into `free` bytes: a power of two, from 1 to MOST."""
    fitting = max(1, min(MOST, int(SHARE * free / row_bytes)))
    return 1 << (fitting.bit_length() - 1)


def choose_batch(model, config, longest, say):
    """Choose the batch size, and say which it is where it was counted. Arguments as in count_row_bytes."""
    device = model.trunk.wte.weight.device
    if device.type != "cuda":
        return ON_A_CPU
    free, _ = torch.cuda.mem_get_info(device)
    row_bytes = count_row_bytes(model, config, longest)
    size = fit_batch(free, row_bytes)
    say(f"batch_size={size}: a text takes up to {row_bytes / 1e6:,.0f} MB, and {free / 1e9:,.1f} GB are free")
    return size
