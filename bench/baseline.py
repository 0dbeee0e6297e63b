"""
transformers' GPT-2, to compare the speed of plain decoding with.
"""
import torch

from configurator import UserError, require
from decode import Continuation
from model import GPTConfig


def make_baseline(trunk, eot, max_new_tokens):
    """transformers' GPT-2 with the trunk's weights: a function of (prompts, batch), list of Continuations."""
    gpt2 = make_gpt2(trunk)
    block_size = trunk.config.block_size

    def write_texts(prompts, batch):
        out = []
        for first in range(0, len(prompts), batch):
            rows = prompts[first:first + batch]
            longest = max(map(len, rows))
            idx, mask = pad_left(rows, longest, gpt2.device)
            y = gpt2.generate(idx, attention_mask=mask, do_sample=False, use_cache=True, pad_token_id=0,
                              max_new_tokens=min(max_new_tokens, block_size - longest),
                              eos_token_id=eot if eot >= 0 else None)
            for tokens in y[:, longest:].tolist():
                ended = eot in tokens
                n = tokens.index(eot) if ended else len(tokens)
                out.append(Continuation(tokens[:n], ended, n + ended))
        return out
    return write_texts


def pad_left(rows, longest, device):
    """Token ids and attention mask, both (B, longest)."""
    idx = [[0] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(idx, device=device), torch.tensor(mask, device=device)


def make_gpt2(trunk):
    """A GPT2LMHeadModel with the weights, the device and the dtype of the trunk."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        raise UserError("--baseline needs transformers: pip install -r requirements-dev.txt") from None
    require(type(trunk.config) is GPTConfig, "--baseline is transformers' GPT-2; choose a size of GPT-2")
    weights = {f"transformer.{name}": w for name, w in trunk.state_dict().items()}
    for name in weights:
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            weights[name] = weights[name].t()                     # theirs are (in, out)
    c = trunk.config
    config = GPT2Config(vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
                        n_head=c.n_head, bos_token_id=None, eos_token_id=None)
    gpt2 = GPT2LMHeadModel(config)
    gpt2.load_state_dict(weights | {"lm_head.weight": trunk.wte.weight})
    return gpt2.eval().to(trunk.wte.weight.device, trunk.wte.weight.dtype)
