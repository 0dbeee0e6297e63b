"""
Read a GGUF file, which holds config, weights and tokenizer, with the package gguf (pip install gguf).
"""
import os
from functools import lru_cache

import torch

from configurator import UserError, require
from llama import LlamaConfig

# llama.py's names within a block, and GGUF's
NAMES = {"ln_1": "attn_norm", "ln_2": "ffn_norm", "attn.c_q": "attn_q", "attn.c_k": "attn_k",
         "attn.c_v": "attn_v", "attn.c_proj": "attn_output", "mlp.c_gate": "ffn_gate", "mlp.c_fc": "ffn_up",
         "mlp.c_proj": "ffn_down"}


@lru_cache(maxsize=1)
def open_gguf(name):
    """Return a GGUFReader. Raises UserError where the file or the package is missing, or the file damaged."""
    try:
        import gguf
    except ImportError:
        raise UserError(f"{name} needs the package gguf, to be read: pip install gguf") from None
    try:
        return gguf.GGUFReader(os.path.expanduser(name))
    except Exception as e:              # it raises anything on a damaged file
        raise UserError(f"{name} cannot be read as GGUF ({type(e).__name__}: {e}); fetch it again") from None


def field(name, key, default=None):
    """The value of a field of the file. Raises UserError where it is missing, and there is no default."""
    found = open_gguf(name).fields.get(key)
    require(found is not None or default is not None, f"{name} has no {key}; it is not of Llama's type")
    return default if found is None else found.contents()


def read_gguf_config(name):
    """Return the LlamaConfig of a GGUF file. Raises UserError where it is another network's."""
    kind = field(name, "general.architecture")
    require(kind in ("llama", "qwen2"),
            f"{name} has general.architecture={kind!r}; read here are: llama, qwen2")
    tensors = {tensor.name: tensor for tensor in open_gguf(name).tensors}
    require("rope_freqs.weight" not in tensors and f"{kind}.rope.scaling.type" not in open_gguf(name).fields,
            f"{name} has scaled rotary positions, which are not read from GGUF; use the hub's safetensors")
    n_head = field(name, f"{kind}.attention.head_count")
    C = field(name, f"{kind}.embedding_length")
    head_size = field(name, f"{kind}.attention.key_length", C // n_head)
    require(field(name, f"{kind}.rope.dimension_count", head_size) == head_size,
            f"{name} rotates only a part of each head, which is not computed here; use another model")
    return LlamaConfig(
        block_size=field(name, f"{kind}.context_length"),
        vocab_size=len(field(name, "tokenizer.ggml.tokens")), n_layer=field(name, f"{kind}.block_count"),
        n_head=n_head, n_kv_head=field(name, f"{kind}.attention.head_count_kv", n_head), n_embd=C,
        head_size=head_size, n_hidden=field(name, f"{kind}.feed_forward_length"),
        norm_eps=round(field(name, f"{kind}.attention.layer_norm_rms_epsilon"), 12),        # a float32
        rope_theta=float(field(name, f"{kind}.rope.freq_base", 10000.0)), qkv_bias=kind == "qwen2",
        tied="output.weight" not in tensors)


def read_gguf(name):
    """Return the LlamaConfig and the tensors, under llama.py's names, in float32. Raises UserError."""
    from gguf.quants import dequantize

    config = read_gguf_config(name)
    permuted = field(name, "general.architecture") == "llama"
    names = {"token_embd.weight": "wte.weight", "output_norm.weight": "ln_f.weight",
             "output.weight": "output"}
    for i in range(config.n_layer):
        for ours, theirs in NAMES.items():
            for end in ("weight", "bias"):
                names[f"blk.{i}.{theirs}.{end}"] = f"h.{i}.{ours}.{end}"
    found = {}
    for tensor in open_gguf(name).tensors:
        require(tensor.name in names, f"{name} holds {tensor.name}, unknown to llama.py; use another "
                "model")
        try:
            weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        except (NotImplementedError, ValueError) as e:
            raise UserError(f"{name}: {tensor.name} cannot be read ({e}); use a file of another "
                            "quantization") from None
        ours = names[tensor.name]
        if permuted and ours.endswith(("attn.c_q.weight", "attn.c_k.weight")):
            weight = unpermute(weight, config.head_size)
        found[ours] = weight
    return config, found


def unpermute(weight, head_size):
    """Undo what GGUF does to the rows of Llama's q and k.

    There the two coordinates of a rotated point lie side by side; in llama.py they lie half a head apart.
    """
    pairs = weight.view(-1, head_size // 2, 2, weight.size(1))    # (heads, points, 2, C)
    return pairs.transpose(1, 2).reshape(weight.shape)


def read_gguf_tokenizer(name):
    """Return a dict: the name of the pattern, and arguments of make_tokenizer. Raises UserError."""
    kind = field(name, "tokenizer.ggml.model")
    require(kind == "gpt2", f"{name} has a tokenizer of type {kind}; read here is gpt2, a byte-level BPE")
    texts = field(name, "tokenizer.ggml.tokens")
    types = field(name, "tokenizer.ggml.token_type")
    vocab = {text: token for token, text in enumerate(texts)}
    special = {text: token for token, text in enumerate(texts) if types[token] != 1}    # 1: an ordinary one
    begin = ""
    if field(name, "tokenizer.ggml.add_bos_token", False):
        begin = texts[field(name, "tokenizer.ggml.bos_token_id")]
    merges = [tuple(merge.split(" ")) for merge in field(name, "tokenizer.ggml.merges")]
    return dict(pattern_name=field(name, "tokenizer.ggml.pre"), vocab=vocab, merges=merges, special=special,
                begin=begin, end=field(name, "tokenizer.ggml.eos_token_id"))
