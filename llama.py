"""
Llama, a second trunk: Llama 3, SmolLM2, and with biases Qwen 2.5. Read model.py first.

What differs from GPT-2, one by one, and how it reaches the path:

    GPT-2                       Llama                                    in the path
    LayerNorm                   RMSNorm: no mean is subtracted, and      the same; t still adds a shift,
                                there is a weight but no bias            which starts at 0
    wpe is added to the input   rotary positions: queries and keys are   queries are rotated, too, and so
                                rotated by angles that grow with them    no wpe enters: no deviation 1
    a head of queries has its   n_head / n_kv_head heads share keys      it reads the trunk's keys and values,
    own keys and values         and values, which are cached once        shared in the same way
    q, k, v: one map c_attn     c_q, c_k, c_v                            a copy of c_q, or a LoRA on it
    MLP: GELU(c_fc x)           SwiGLU: SiLU(c_gate x) * (c_fc x)        the same, copies or LoRAs
    every map has a bias        only c_q, c_k, c_v, and only in Qwen     the same
    the head is tied to wte     tied, or a matrix of its own             it has no head of its own

Everything else is inherited from GPT: forward, head, the LoRA of the trunk. Parameters have GPT's names where
they do the same.
"""
import copy
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import at_least, require
from model import GPT, LoRALinear, PathBlock, attend_at, attention, borrow, two_layers


@dataclass(frozen=True)
class LlamaConfig:
    block_size: int = 2048
    vocab_size: int = 49152
    n_layer: int = 30
    n_head: int = 9
    n_kv_head: int = 3              # heads of keys and values
    n_embd: int = 576
    head_size: int = 64
    n_hidden: int = 1536            # width of the MLP
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0     # base of the rotary frequencies
    rope_scaling: tuple = ()        # Llama 3's: (factor, low_freq_factor, high_freq_factor, positions before)
    qkv_bias: bool = False
    tied: bool = True               # whether the head is the embedding

    def __post_init__(self):
        at_least(self, block_size=1, vocab_size=1, n_layer=1, n_head=1, n_kv_head=1, n_embd=1, n_hidden=1)
        require(self.n_head % self.n_kv_head == 0,
                f"n_head={self.n_head} does not divide into n_kv_head={self.n_kv_head} groups")
        require(self.head_size % 2 == 0, f"head_size={self.head_size}, but rotary positions need an even one")


# ---------------------------------------------------------------------------------------- rotary positions
def rotary_frequencies(config):
    """The angles per position of the pairs of coordinates, (head_size / 2,): theta^(-2i / head_size).

    Llama 3's scaling divides the low frequencies by `factor`. Those that turn less than low_freq_factor times
    within the positions of the first training are low, those that turn more than high_freq_factor times are
    left as they are, and between these two it interpolates.
    """
    i = torch.arange(0, config.head_size, 2, dtype=torch.int64).float()
    freqs = 1.0 / config.rope_theta ** (i / config.head_size)
    if not config.rope_scaling:
        return freqs
    factor, low, high, before = config.rope_scaling
    turns = before * freqs / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * freqs / factor + kept * freqs


class Rotary(nn.Module):
    """Rotates queries and keys: coordinates i and i + head_size / 2 as one point, by the position's angle.

    The product of a query and a key then depends on the distance of their positions alone.
    """
    def __init__(self, config):
        super().__init__()
        pos = torch.arange(config.block_size).float()
        angles = torch.outer(pos, rotary_frequencies(config))
        table = torch.cat([angles.cos(), angles.sin()], 1)        # (block_size, head_size)
        self.register_buffer("table", table, persistent=False)    # it follows from the config

    def forward(self, x, pos):
        """x (..., H head_size) at positions pos (...) -> the same shape."""
        cos, sin = self.table[pos].to(x.dtype)[..., None, :].chunk(2, dim=-1)     # (..., 1, head_size / 2)
        x_1, x_2 = x.unflatten(-1, (-1, self.table.size(1))).chunk(2, dim=-1)     # (..., H, head_size / 2)
        return torch.cat([x_1 * cos - x_2 * sin, x_2 * cos + x_1 * sin], -1).flatten(-2)


# ------------------------------------------------------------------------------------------- the trunk
class LlamaAttention(nn.Module):
    def __init__(self, config, rotary):
        super().__init__()
        C, size = config.n_embd, config.head_size
        borrow(self, "rotary", rotary)                            # one table for all blocks
        self.head_size = size
        self.c_q = nn.Linear(C, config.n_head * size, bias=config.qkv_bias)
        self.c_k = nn.Linear(C, config.n_kv_head * size, bias=config.qkv_bias)
        self.c_v = nn.Linear(C, config.n_kv_head * size, bias=config.qkv_bias)
        self.c_proj = nn.Linear(config.n_head * size, C, bias=False)

    def forward(self, x, cache, pos, mask):
        """As Attention.forward, with fewer heads in k and v. Keys are rotated before they are kept."""
        q = self.rotary(self.c_q(x), pos)                         # (B, Q, H head_size)
        k = self.rotary(self.c_k(x), pos)
        k = k.unflatten(-1, (-1, self.head_size)).transpose(1, 2)  # (B, n_kv_head, Q, head_size)
        v = self.c_v(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
        if cache is not None:
            columns = pos[:, None, :, None].expand_as(k)
            k = cache[0].scatter_(2, columns, k)                  # (B, n_kv_head, S, head_size)
            v = cache[1].scatter_(2, columns, v)
        return self.c_proj(attention(q, k, v, mask)), (k, v)


class SwiGLU(nn.Module):
    """Llama's MLP, given its three maps, since the path's may be LoRAs on the trunk's."""
    def __init__(self, c_gate, c_fc, c_proj):
        super().__init__()
        self.c_gate = c_gate
        self.c_fc = c_fc
        self.c_proj = c_proj

    def forward(self, x):
        return self.c_proj(F.silu(self.c_gate(x)) * self.c_fc(x))


class LlamaBlock(nn.Module):
    def __init__(self, config, rotary):
        super().__init__()
        C, n_hidden = config.n_embd, config.n_hidden
        self.ln_1 = nn.RMSNorm(C, config.norm_eps)
        self.attn = LlamaAttention(config, rotary)
        self.ln_2 = nn.RMSNorm(C, config.norm_eps)
        self.mlp = SwiGLU(nn.Linear(C, n_hidden, bias=False), nn.Linear(C, n_hidden, bias=False),
                          nn.Linear(n_hidden, C, bias=False))

    def forward(self, x, cache=None, pos=None, mask=None):
        y, kv = self.attn(self.ln_1(x), cache, pos, mask)
        x = x + y
        return x + self.mlp(self.ln_2(x)), kv

    def linears(self):
        """(module, name) of every linear map of the block, for LoRA."""
        attn = [(self.attn, name) for name in ("c_q", "c_k", "c_v", "c_proj")]
        return attn + [(self.mlp, name) for name in ("c_gate", "c_fc", "c_proj")]

    def path_block(self, config):
        return LlamaPathBlock(self, config)


class Llama(GPT):
    """A trunk of Llama's type. What a trunk must offer stands in class GPT, which this one follows."""
    def __init__(self, config):
        nn.Module.__init__(self)                                  # not GPT's, which would build GPT-2
        self.config = config
        self.rotary = Rotary(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList(LlamaBlock(config, self.rotary) for _ in range(config.n_layer))
        self.ln_f = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.output = None if config.tied else nn.Parameter(torch.empty(config.vocab_size, config.n_embd))
        self.init_weights()

    def embed(self, idx, pos):
        return self.wte(idx)                                      # positions enter in the attention

    def embed_position(self, pos):
        return torch.zeros((), device=pos.device)

    def head_weight(self):
        return self.wte.weight if self.output is None else self.output


# ----------------------------------------------------------------------------------- the diffusion path
class LlamaPathBlock(PathBlock):
    """PathBlock with the differences above. forward is told the positions of its queries by the Context."""
    def __init__(self, block, config):
        nn.Module.__init__(self)
        C = block.ln_1.weight.numel()
        attn = block.attn
        mlp = block.mlp
        borrow(self, "rotary", attn.rotary)
        self.eps = block.ln_1.eps
        if config.path_mode == "full":                            # copies that train
            self.c_q = copy.deepcopy(attn.c_q)
            self.ln_1 = copy.deepcopy(block.ln_1)
            self.c_proj = copy.deepcopy(attn.c_proj)
            self.ln_2 = copy.deepcopy(block.ln_2)
            self.mlp = copy.deepcopy(mlp)
            self.requires_grad_(True)
        else:                                                     # LoRAs on the trunk's own weights
            def lora(linear):
                return LoRALinear(linear, config.lora_rank, config.lora_alpha, owned=False)
            borrow(self, "ln_1", block.ln_1)
            borrow(self, "ln_2", block.ln_2)
            self.c_q = lora(attn.c_q)
            self.c_proj = lora(attn.c_proj)
            self.mlp = SwiGLU(lora(mlp.c_gate), lora(mlp.c_fc), lora(mlp.c_proj))
        self.modulation = two_layers(config.t_dim, config.t_dim, 6 * C, zero=True)
        if config.path_init == "trunk":                           # open gates (deviation 2)
            with torch.no_grad():
                self.modulation[2].bias.view(6, C)[[2, 5]] = 1.0

    def modulate(self, emb):
        """Time embedding (N, E) -> scale, shift and gate of attention, then of the MLP: (N, 6C)."""
        none = torch.zeros_like(self.ln_1.weight)                 # RMSNorm has no bias, and a gate no norm
        norms = [self.ln_1.weight, none, none, self.ln_2.weight, none, none]
        return self.modulation(emb) + torch.cat(norms)

    def forward(self, h, modulation, kv, c):
        """h (N, C) -> (N, C). Arguments as in PathBlock.forward."""
        scale_1, shift_1, gate_1, scale_2, shift_2, gate_2 = modulation.chunk(6, dim=-1)
        q = self.c_q(self.norm(h) * scale_1 + shift_1)
        q = self.rotary(q, c.pos)                                 # (N, H head_size)
        h = h + gate_1 * self.c_proj(attend_at(q, *kv, c.at, c.mask))
        return h + gate_2 * self.mlp(self.norm(h) * scale_2 + shift_2)

    def norm(self, h):
        return F.rms_norm(h, h.shape[-1:], eps=self.eps)
