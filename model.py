"""
GPT-2 and the diffusion path of L2D (Cetin, Zhao, Tang, "Large Language Models to Diffusion Finetuning",
arXiv 2501.15781; "Eq." below are the paper's).

The *trunk* is GPT-2, frozen. The *path* runs beside it. It takes a noised embedding x_t of the token to
predict, attends to the trunk's keys and values, and is added to the trunk once, before the final norm and the
head. diffusion.py says where x_t comes from.

Shapes and symbols, here and in diffusion.py:
    B, T    batch, sequence length (in diffusion.py T is the evaluations of one token)
    C, L, H n_embd, n_layer, n_head                V_size   vocabulary
    S       keys that a query may look at
    N       positions at which a token is predicted, flat: in training the targets of a batch, in decoding
            one or more positions of each row
    D       x_dim, size of the token space         V        (V_size, D), the table of Eq. 5
    x_t     (N, D)  noised token embedding         t        (N,) in [0, 1]: 0 is noise, 1 is data
    w_d     (N, C)  weight of the path (Eq. 6), exactly 0 at t = 0             E  t_dim, of the time embedding
    kv      a list of L pairs (k, v), each (B, H, S, C/H): the trunk's keys and values
    c       a Context: what the trunk has read, the c of the paper's f(x_t, t, c)
"""
import copy
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import UserError, at_least, require


# ------------------------------------------------------------------------------------------- the trunk
@dataclass(frozen=True)
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768

    def __post_init__(self):
        if min(self.block_size, self.vocab_size, self.n_layer, self.n_head, self.n_embd) < 1:
            raise UserError(f"every size of the trunk must be at least 1, not {self}")
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd={self.n_embd} does not divide into n_head={self.n_head} heads")


def borrow(module, name, value):
    """Set module.name without registering it: used, but never saved, counted or moved a second time."""
    object.__setattr__(module, name, value)


class LoRALinear(nn.Module):
    """y = W x + b + (alpha / rank) B A x (Hu et al. 2021), with B = 0 at the start.

    linear: the nn.Linear that holds W and b. owned: register it here, frozen (a LoRA on the trunk); or only
    borrow it from the trunk (the path's LoRA), with which it trains, if that does. n_out: use only the first
    n_out outputs of W (the queries of c_attn).
    """
    def __init__(self, linear, rank, alpha, owned, n_out=None):
        super().__init__()
        if owned:
            self.linear = linear.requires_grad_(False)
        else:
            borrow(self, "linear", linear)
        self.n_out, self.scale = n_out or linear.out_features, alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features))
        self.lora_B = nn.Parameter(torch.zeros(self.n_out, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        y = F.linear(x, self.linear.weight[:self.n_out], self.linear.bias[:self.n_out])
        return y + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


def attention(q, k, v, mask=None):
    """softmax(q k^T / sqrt(C/H)) v.

    q (B, T, C); k, v (B, H, S, C/H); mask (B, 1, T, S), True = visible. Without a mask, T = S queries attend
    causally and a single query attends to every key. Returns (B, T, C).
    """
    B, T, C = q.shape
    q = q.view(B, T, k.size(1), -1).transpose(1, 2)               # (B, H, T, C/H)
    assert mask is not None or T in (1, k.size(2)), "the causal mask needs as many queries as keys"
    is_causal = True if mask is None and T > 1 else False         # a symbolic bool breaks torch.compile
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
    return y.transpose(1, 2).reshape(B, T, C)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key, value
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None, pos=None, mask=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        k, v = (z.view(B, T, self.n_head, -1).transpose(1, 2) for z in (k, v))  # (B, H, T, C/H)
        if cache is not None:                                     # write k, v at pos, read them all
            where = pos[:, None, :, None].expand_as(k)
            k, v = cache[0].scatter_(2, where, k), cache[1].scatter_(2, where, v)  # (B, H, S, C/H)
        return self.c_proj(attention(q, k, v, mask)), (k, v)


class MLP(nn.Module):
    def __init__(self, c_fc, c_proj):
        super().__init__()
        self.c_fc, self.c_proj = c_fc, c_proj

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # GPT-2's GELU is the tanh form


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.ln_1, self.attn = nn.LayerNorm(C), Attention(config)
        self.ln_2, self.mlp = nn.LayerNorm(C), MLP(nn.Linear(C, 4 * C), nn.Linear(4 * C, C))

    def forward(self, x, cache=None, pos=None, mask=None):
        y, kv = self.attn(self.ln_1(x), cache, pos, mask)
        x = x + y
        return x + self.mlp(self.ln_2(x)), kv

    def linears(self):
        """(owner, name) of every linear map."""
        return [(self.attn, "c_attn"), (self.attn, "c_proj"), (self.mlp, "c_fc"), (self.mlp, "c_proj")]


class GPT(nn.Module):
    """GPT-2. Parameter names are those of its checkpoints; the head is tied to wte."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Matrices and embeddings N(0, 0.02^2); c_proj N(0, 0.02^2 / 2L); biases 0; norms 1."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                n_added = 2 * self.config.n_layer if "c_proj" in name else 1  # terms in the residual stream
                nn.init.normal_(p, std=0.02 / math.sqrt(n_added))
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, idx, pos=None, cache=None, mask=None):
        """Everything before the final norm.

        idx (B, T) token ids; pos (B, T) their positions, 0..T-1 if not given. cache: L pairs (k, v) of shape
        (B, H, S, C/H), into which keys and values are written at pos. mask (B, 1, T, S) as in attention.
        Returns the states h (B, T, C), and kv.
        """
        if pos is None:
            pos = torch.arange(idx.size(1), device=idx.device)[None].expand_as(idx)
        x = self.wte(idx) + self.wpe(pos)                         # (B, T, C)
        kv = []
        for i, block in enumerate(self.h):
            x, pair = block(x, cache[i] if cache is not None else None, pos, mask)
            kv.append(pair)
        return x, kv

    def lm_head(self, h):
        return F.linear(h, self.wte.weight)                       # tied to the embedding

    def head(self, h):
        """States (..., C) -> logits (..., V_size)."""
        return self.lm_head(self.ln_f(h))

    def add_lora(self, rank, alpha):
        """Put a LoRA on each linear map of each block, to be trained; the weights below do not."""
        for block in self.h:
            for owner, name in block.linears():
                setattr(owner, name, LoRALinear(getattr(owner, name), rank, alpha, owned=True))

    @torch.no_grad()
    def merge_lora(self):
        """Undo add_lora in place: what the LoRA learned goes into the weights, W + (alpha / rank) B A."""
        for block in self.h:
            for owner, name in block.linears():
                lora = getattr(owner, name)
                lora.linear.weight += lora.scale * lora.lora_B @ lora.lora_A
                setattr(owner, name, lora.linear)


# ----------------------------------------------------------------------------------- the diffusion path
@dataclass(frozen=True)
class PathConfig:
    # the diffusion path
    path_mode: Literal["none", "lora", "full"] = "full"  # no path; a LoRA; a copy (deviation 10)
    lora_rank: int = 32             # of the path's LoRA, and of the trunk's
    lora_alpha: float = 32.0
    x_dim: int = 256                # D, size of the token space
    t_dim: int = 256                # E, width of the time embedding
    sigma: float = 64.0             # standard deviation of the noise x_0
    input_scale: Literal["wiener", "unit"] = "wiener"  # how x_t enters (deviation 3); unit: the paper
    time_scale: float = 1000.0      # factor on t before its sinusoids (deviation 4); 1: the paper
    token_input: bool = True        # the last token enters the path, too (deviation 2); False: the paper
    gate_init: float = 1.0          # gates of the path's residuals at the start (deviation 2); 0: the paper
    w_init: float = 1.0             # w_d at the start, for t > 0 (deviation 2); 0: the paper

    def __post_init__(self):
        at_least(self, lora_rank=1, x_dim=1, t_dim=2)
        require(min(self.sigma, self.lora_alpha) > 0,
                f"sigma={self.sigma} and lora_alpha={self.lora_alpha} must be above 0")
        require(self.t_dim % 2 == 0, f"t_dim={self.t_dim} must be even: half of it cosines, half sines")


def two_layers(n_in, n_hidden, n_out, zero=False, bias=True):
    """Linear - SiLU - Linear. zero: the last layer starts at 0, so that what it controls starts off."""
    net = nn.Sequential(nn.Linear(n_in, n_hidden), nn.SiLU(), nn.Linear(n_hidden, n_out, bias))
    if zero:
        for p in net[2].parameters():
            nn.init.zeros_(p)
    return net


def time_features(t, dim, time_scale):
    """Sinusoids of time_scale * t (deviation 4), of periods 2 pi to nearly 2 pi 10^4. t (N,) -> (N, dim)."""
    freqs = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = time_scale * t[:, None] * freqs                      # (N, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def scale_input(x_t, t, sigma, input_scale):
    """What the path is fed (deviation 3), float32 (N, D).

    A coordinate of x_t = t x_1 + (1 - t) x_0 has variance t^2 + (1 - t)^2 sigma^2, since one of x_1 has 1
    (Eq. 5).
    unit:   x_t / sqrt(variance), of unit variance at every t [the paper's code].
    wiener: t x_t / variance, the best linear estimate of x_1: near 0 while x_t says nothing.
    """
    variance = t * t + (1 - t) ** 2 * sigma ** 2                  # (N,)
    gain = t / variance if input_scale == "wiener" else variance.rsqrt()
    return x_t * gain[:, None]


class PathBlock(nn.Module):
    """A block of the path: GPT-2's, whose queries look at the trunk's keys and values, modulated by t."""
    def __init__(self, block, config):
        super().__init__()
        C, attn, mlp = block.ln_1.normalized_shape[0], block.attn, block.mlp
        if config.path_mode == "full":
            self.c_q = nn.Linear(C, C)
            self.c_q.weight.data.copy_(attn.c_attn.weight[:C])    # the query third of c_attn
            self.c_q.bias.data.copy_(attn.c_attn.bias[:C])
            self.ln_1, self.c_proj = copy.deepcopy(block.ln_1), copy.deepcopy(attn.c_proj)
            self.ln_2, self.mlp = copy.deepcopy(block.ln_2), copy.deepcopy(mlp)
            self.requires_grad_(True)                             # copies of frozen weights are frozen
        else:
            borrow(self, "ln_1", block.ln_1)
            borrow(self, "ln_2", block.ln_2)
            def lora(linear, n_out=None):
                return LoRALinear(linear, config.lora_rank, config.lora_alpha, owned=False, n_out=n_out)
            self.c_q, self.c_proj = lora(attn.c_attn, n_out=C), lora(attn.c_proj)
            self.mlp = MLP(lora(mlp.c_fc), lora(mlp.c_proj))
        self.modulation = two_layers(config.t_dim, config.t_dim, 6 * C, zero=True)
        with torch.no_grad():                                     # weight, bias, gate of each norm: rows of C
            self.modulation[2].bias.view(6, C)[[2, 5]] = config.gate_init

    def modulate(self, emb):
        """Adaptive LayerNorm, as in DiT: time embedding (N, E) -> weight, bias and gate of attention's norm,
        then of the MLP's, (N, 6C); a norm's weight and bias are GPT-2's plus what t adds."""
        no_gate = torch.zeros_like(self.ln_1.weight)
        norms = [self.ln_1.weight, self.ln_1.bias, no_gate, self.ln_2.weight, self.ln_2.bias, no_gate]
        return self.modulation(emb) + torch.cat(norms)

    def forward(self, h, modulation, kv, at, mask):
        """h (N, C); modulation (N, 6C) or (1, 6C) from modulate; kv, at, mask as in Context."""
        weight_1, bias_1, gate_1, weight_2, bias_2, gate_2 = modulation.chunk(6, dim=-1)
        q = self.c_q(F.layer_norm(h, h.shape[-1:]) * weight_1 + bias_1)  # (N, C)
        h = h + gate_1 * self.c_proj(attend_at(q, *kv, at, mask))
        return h + gate_2 * self.mlp(F.layer_norm(h, h.shape[-1:]) * weight_2 + bias_2)


def attend_at(q, k, v, at, mask):
    """Attention of N single queries (N, C) over the trunk's k, v (B, H, S, C/H) -> (N, C).

    The queries lie in a grid (B, Q): query i in row at[0][i], column at[1][i]. at = None: they fill it in
    order. mask (B, 1, Q, S) says which keys each place of the grid sees. Without a mask there are two cases:
        at = None, Q = 1, in decoding: a row's one query sees all of its keys;
        Q = S, in training: column k sees the keys 0..k, by one causal kernel (flash attention).
    """
    B, _, S, _ = k.shape
    if at is None:
        return attention(q.view(B, -1, q.size(1)), k, v, mask).view(q.shape)
    grid = q.new_zeros(B, S if mask is None else mask.size(2), q.size(1)).index_put(at, q)
    return attention(grid, k, v, mask)[at]


class DiffusionPath(nn.Module):
    """The path of L2D: as many blocks as the trunk, initialised from it (see PathBlock).

    At the start x_t and t contribute zero, and w_d is w_init for t > 0: the path computes the trunk's own
    states, and the pair predicts at every t what the trunk does (deviation 2). With token_input=False,
    gate_init=0, w_init=0 it starts as in the paper. Label n_labels means "no label".
    """
    def __init__(self, trunk, config, n_labels):
        super().__init__()
        self.config, self.n_labels = config, n_labels
        C, D, E = trunk.config.n_embd, config.x_dim, config.t_dim
        self.W = nn.Linear(C, D, bias=False)                      # Eq. 5
        self.x_in = two_layers(D, D, C, zero=config.token_input)  # deviation 2
        self.t_in = two_layers(E, E, E)
        self.label = nn.Embedding(n_labels + 1, E)
        nn.init.normal_(self.label.weight, std=0.02)
        self.h = nn.ModuleList(PathBlock(block, config) for block in trunk.h)
        self.w = two_layers(E, E, C, zero=True, bias=False)       # w(t) of Eq. 6; a bias would cancel

    def token_space(self, e):
        """Eq. 5: V_y = sqrt(D) W e_y / |W e_y|, float32. e (..., C) token embeddings -> (..., D)."""
        with torch.autocast(e.device.type, enabled=False):
            V_y = self.W(e.to(self.W.weight.dtype)).float()
            return math.sqrt(self.config.x_dim) * F.normalize(V_y, dim=-1)

    def time_embedding(self, t, label):
        """t (N,) and label (N,) -> (N, E)."""
        features = time_features(t, self.config.t_dim, self.config.time_scale)
        return self.t_in(features.to(self.W.weight.dtype)) + self.label(label)

    def condition(self, t, label):
        """All that depends on t (N,) and label (N,) alone: L modulations (N, 6C), and w_d (N, C)."""
        emb = self.time_embedding(t, label)                       # (N, E)
        emb_0 = self.time_embedding(torch.zeros_like(t), label)   # of emb's shape, so that both round alike
        w_d = self.w(emb) - self.w(emb_0)                         # Eq. 6: exactly 0 at t = 0
        w_d = w_d + self.config.w_init * (t > 0)[:, None].to(w_d.dtype)  # deviation 2
        return [block.modulate(emb) for block in self.h], w_d

    def forward(self, x_t, t, start, modulations, c):
        """h_path (N, C), from x_t (N, D), t (N,) and the Context c; modulations from condition.

        start (N, C) is what enters besides x_t, see L2D.forward.
        """
        x = scale_input(x_t, t, self.config.sigma, self.config.input_scale)
        h = self.x_in(x.to(self.W.weight.dtype)) + start          # (N, C)
        for block, modulation, kv in zip(self.h, modulations, c.kv):
            h = block(h, modulation, kv, c.at, c.mask)
        return h


# -------------------------------------------------------------------------------------------- the pair
class Context(NamedTuple):
    """c in the paper: all that predicting the next token at N positions needs of what the trunk read."""
    h: torch.Tensor                 # (N, C) the trunk's states there, before the final norm
    token: torch.Tensor             # (N,) the token there, the last of its context
    pos: torch.Tensor               # (N,) its position
    kv: list                        # L pairs (k, v), each (B, H, S, C/H)
    at: tuple = None                # (rows, columns), each (N,), in the grid of queries: see attend_at
    mask: torch.Tensor = None       # (B, 1, Q, S), True = visible

    def select(self, i):
        """The same for the positions i (n,) alone, in their order; other rows are left out."""
        B = self.kv[0][0].size(0)
        if self.at is None and self.mask is None:                 # one query a row, which sees every key
            return Context(self.h[i], self.token[i], self.pos[i], [(k[i], v[i]) for k, v in self.kv])
        if self.at is None:
            n_columns = len(self.pos) // B
            rows, columns = i // n_columns, i % n_columns
        else:
            rows, columns = (z[i] for z in self.at)
        kept, rows = rows.unique(return_inverse=True)
        kv, mask = self.kv, self.mask
        if len(kept) < B:
            kv = [(k[kept], v[kept]) for k, v in kv]
            mask = mask[kept] if mask is not None else None
        return Context(self.h[i], self.token[i], self.pos[i], kv, (rows, columns), mask)


class L2D(nn.Module):
    """Trunk and path. The trunk is frozen here; a control unfreezes it: model.trunk.requires_grad_(True).

    path = None is the trunk alone. no_label: the number of the label that means none.
    """
    def __init__(self, trunk, path=None):
        super().__init__()
        self.trunk, self.path = trunk.requires_grad_(False), path
        self.no_label = path.n_labels if path is not None else 0

    def read(self, idx, at):
        """One trunk pass over idx (B, T): the Context of the positions at = (rows, columns), each (N,).

        A frozen trunk runs without autograd: nothing is stored for a backward pass.
        """
        trains = any(p.requires_grad for p in self.trunk.parameters())
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            h, kv = self.trunk(idx)
        return Context(h[at], idx[at], at[1], kv, at)

    def embed(self, ids):
        """x_1 of token ids (...): rows of V, (..., D). W gets gradients, the trunk's embedding none."""
        return self.path.token_space(self.trunk.wte.weight.detach()[ids])

    def forward(self, x_t, t, c, label, condition=None):
        """f(x_t, t, c), logits (N, V_size), by Eq. 6: the head of h = h_trunk + w_d(t) * h_path.

        x_t (N, D) and t (N,) float32; c a Context; label (N,) guidance labels. condition: path.condition(t,
        label) where it is already known, for each position or one for all.
        """
        modulations, w_d = condition if condition is not None else self.path.condition(t, label)
        start = self.trunk.wpe(c.pos)                             # (N, C), deviation 1
        if self.path.config.token_input:                          # deviation 2
            start = start + self.trunk.wte(c.token)
        h_path = self.path(x_t, t, start, modulations, c)
        return self.trunk.head(c.h + w_d * h_path)
