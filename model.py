"""
GPT-2 and the diffusion path of L2D (Cetin, Zhao, Tang, "Large Language Models to Diffusion
Finetuning", arXiv 2501.15781; "Eq." below are the paper's).

The *trunk* is GPT-2, left as it is. The *path* runs beside it: it takes a noised embedding x_t of the
token to predict, attends to the trunk's keys and values, and its output is added to the trunk's once,
before the final norm and the head. diffusion.py says where x_t comes from and how it is used.

Shapes and symbols, here and in diffusion.py:
    B, T    batch, sequence                        C, L, H  n_embd, n_layer, n_head
    S       keys visible to a query                V_size   vocabulary
    N       positions at which a token is predicted: in training the targets of the whole batch, flat;
            in sampling the rows, one position each
    D       x_dim, the size of the token space     V        (V_size, D), the table of Eq. 5
    x_t     (N, D)  noised token embedding         t        (N,) in [0, 1]: 0 is noise, 1 is data
    w_d     (N, C)  weight of the path (Eq. 6), exactly 0 at t = 0
    kv      a list of L pairs (k, v), each (B, H, S, C/H): the trunk's keys and values, a plain value
    c       a Context: what the trunk has read, the c of f(x_t, t, c)

Classes go from leaf to root: LoRALinear, Attention, MLP, Block, GPT; then PathBlock, DiffusionPath; then
Context and L2D, the pair.
"""
import copy
import math
import os
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import UserError
from gpt2_weights import load_gpt2


# ---------------------------------------------------------------------------------------------- the trunk
@dataclass(frozen=True)
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768

    def __post_init__(self):
        if min(self.block_size, self.vocab_size, self.n_layer, self.n_head, self.n_embd) < 1:
            raise UserError(f"error: every size of the trunk must be at least 1, not {self}")
        if self.n_embd % self.n_head:
            raise UserError(f"error: n_embd={self.n_embd} is not divisible by n_head={self.n_head}; "
                            f"each head takes n_embd / n_head channels")


GPT2_SIZES = {
    "gpt2":        GPTConfig(),                                      # 124M parameters
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),    # 355M
    "gpt2-large":  GPTConfig(n_layer=36, n_head=20, n_embd=1280),    # 774M
    "gpt2-xl":     GPTConfig(n_layer=48, n_head=25, n_embd=1600),    # 1558M
}


def borrow(module, name, value):
    """Set module.name without registering it: used, but never saved, counted or moved a second time."""
    object.__setattr__(module, name, value)


class LoRALinear(nn.Module):
    """y = W x + b + (alpha / rank) B A x (Hu et al. 2021), with B = 0 at the start.

    linear: the nn.Linear that holds W and b. owned: register it here (the trunk's own LoRA), or only borrow
    it from the trunk (the path's LoRA). rows: use only the first `rows` outputs of W (the queries of c_attn).
    """
    def __init__(self, linear, rank, alpha, owned, rows=None):
        super().__init__()
        rows = rows or linear.out_features
        if owned:
            self.linear = linear.requires_grad_(False)
        else:
            borrow(self, "linear", linear)
        self.rows, self.scale = rows, alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features))
        self.lora_B = nn.Parameter(torch.zeros(rows, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        y = F.linear(x, self.linear.weight[:self.rows], self.linear.bias[:self.rows])
        return y + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)

    @torch.no_grad()
    def merged(self):
        """The same map as a plain nn.Linear."""
        self.linear.weight += self.scale * self.lora_B @ self.lora_A
        return self.linear


def attention(q, k, v, mask=None):
    """softmax(q k^T / sqrt(C/H)) v, as in GPT-2.

    q (B, T, C); k, v (B, H, S, C/H); mask (B, 1, T, S), True = visible. Without a mask, T = S queries attend
    causally and a single query attends to everything. Returns (B, T, C).
    """
    B, T, C = q.shape
    q = q.view(B, T, k.size(1), -1).transpose(1, 2)                           # (B, H, T, C/H)
    assert mask is not None or T in (1, k.size(2)), "the causal mask needs as many queries as keys"
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1)
    return y.transpose(1, 2).reshape(B, T, C)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)             # query, key, value
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None, pos=None, mask=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        k, v = (z.view(B, T, self.n_head, -1).transpose(1, 2) for z in (k, v))  # (B, H, T, C/H)
        if cache is not None:
            k, v = write_cache(cache, k, v, pos)                              # (B, H, S, C/H)
        return self.c_proj(attention(q, k, v, mask)), (k, v)


def write_cache(cache, k, v, pos):
    """Write k, v (B, H, T, C/H) at positions pos (B, T) of the preallocated pair cache; return the pair."""
    where = pos[:, None, :, None].expand_as(k)
    return cache[0].scatter_(2, where, k), cache[1].scatter_(2, where, v)


class MLP(nn.Module):
    def __init__(self, c_fc, c_proj):
        super().__init__()
        self.c_fc, self.c_proj = c_fc, c_proj

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))          # GPT-2's GELU is the tanh form


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
        """Matrices and embeddings N(0, 0.02^2), the two c_proj of each block N(0, 0.02^2 / 2L), biases 0, norms 1."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if "c_proj" in name else 0.02
                nn.init.normal_(p, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, idx, pos=None, cache=None, mask=None):
        """Everything before the final norm.

        idx (B, T) token ids; pos (B, T) their positions, 0..T-1 if not given. With a cache (made by new_cache, cut by first_keys)
        the keys and values are written into it at pos and attention sees what mask (B, 1, T, S) says, or without
        a mask all of it (a single query then).
        Returns h (B, T, C) and kv, a list of L pairs (k, v) of shape (B, H, S, C/H).
        """
        if pos is None:
            pos = torch.arange(idx.size(1), device=idx.device)[None].expand_as(idx)
        x = self.wte(idx) + self.wpe(pos)                                     # (B, T, C)
        kv = []
        for i, block in enumerate(self.h):
            x, pair = block(x, cache[i] if cache is not None else None, pos, mask)
            kv.append(pair)
        return x, kv

    def lm_head(self, h):
        return F.linear(h, self.wte.weight)                                   # tied to the embedding

    def head(self, h, words=None):
        """(..., C) -> logits (..., V_size); of h (N, C) and a list of token ids for each row, words (N, k), only theirs, (N, k)."""
        h = self.ln_f(h)
        if words is not None and words.numel() < len(self.wte.weight):        # else fetching them reads more than the whole head
            return (self.wte.weight[words] @ h[:, :, None])[:, :, 0]
        logits = self.lm_head(h)
        return logits if words is None else logits.gather(1, words)

    def add_lora(self, rank, alpha):
        """Freeze everything and put a LoRA on each linear map of each block."""
        self.requires_grad_(False)
        for block in self.h:
            for owner, name in linears(block):
                setattr(owner, name, LoRALinear(getattr(owner, name), rank, alpha, owned=True))

    def merge_lora(self):
        """Undo add_lora, keeping what the LoRA learned in the weights (a path that borrows them sees the change)."""
        for block in self.h:
            for owner, name in linears(block):
                setattr(owner, name, getattr(owner, name).merged())

    @classmethod
    def from_pretrained(cls, name):
        """GPT-2 weights from a hub name (see GPT2_SIZES), a .safetensors file or a directory that has one.

        Raises UserError where the file cannot be had, is damaged, or is not GPT-2.
        """
        tensors, n_head, path = load_gpt2(name)
        block_size, (vocab_size, n_embd) = tensors["wpe.weight"].shape[0], tensors["wte.weight"].shape
        n_layer = len({key.split(".")[1] for key in tensors if key.startswith("h.")})
        model = cls(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd))
        load_state(model, tensors, path)
        return model


def linears(block):
    return [(block.attn, "c_attn"), (block.attn, "c_proj"), (block.mlp, "c_fc"), (block.mlp, "c_proj")]


def new_cache(kv, length):
    """The keys and values of a prompt, kv, with room for `length` positions in all: a preallocated cache."""
    return [tuple(F.pad(z, (0, 0, 0, length - z.size(2))) for z in pair) for pair in kv]


def first_keys(cache, S):
    """A view of the first S positions of a cache."""
    return [(k[:, :, :S], v[:, :, :S]) for k, v in cache]


# ------------------------------------------------------------------------------------------------ loading
def load_state(module, tensors, source):
    """load_state_dict that names all missing, unexpected and misshapen tensors at once, in one line."""
    own = module.state_dict()
    differ = [f"missing {k}" for k in own.keys() - tensors.keys()]
    differ += [f"unexpected {k}" for k in tensors.keys() - own.keys()]
    differ += [f"{k} is {tuple(tensors[k].shape)}, not {tuple(own[k].shape)}"
               for k in own.keys() & tensors.keys() if own[k].shape != tensors[k].shape]
    if differ:
        raise UserError(f"error: {source} does not fit this model: " + "; ".join(sorted(differ)))
    module.load_state_dict(tensors)


# ----------------------------------------------------------------------------------------- the diffusion path
@dataclass(frozen=True)
class PathConfig:
    mode: str = "full"              # full: its own copy of the blocks; lora: the trunk's weights with a LoRA
    x_dim: int = 256                # D, the size of the token space
    t_dim: int = 256                # width of the time embedding and of the modulation heads
    sigma: float = 64.0             # standard deviation of the noise x_0
    input_scale: str = "wiener"     # how x_t enters: wiener (linear estimate of x_1) or unit (unit variance; official code)
    time_scale: float = 1000.0      # t is multiplied by this before its sinusoidal features (official code: 1)
    gate_init: float = 1.0          # deviation 2: residual gates of the path at the start (official code: 0)
    token_input: bool = True        # deviation 2: add the context's last token to the path's input (paper: x_t alone)
    w_init: float = 1.0             # deviation 2: w_d rises from 0 at t = 0 to about this at the start (official code: 0)
    n_labels: int = 0               # labels for guidance; index n_labels means "no label"
    rank: int = 32                  # of the LoRA, mode lora
    alpha: float = 32.0


def two_layers(n_in, n_hidden, n_out, zero=False, bias=True):
    """Linear - SiLU - Linear; zero: the last layer starts at 0, so that what it controls starts off."""
    net = nn.Sequential(nn.Linear(n_in, n_hidden), nn.SiLU(), nn.Linear(n_hidden, n_out, bias))
    if zero:
        for p in net[2].parameters():
            nn.init.zeros_(p)
    return net


def time_features(t, dim, time_scale):
    """Sinusoids of t (N,) (deviation 4: time_scale) -> (N, dim), with periods from 2 pi to 2 pi * 10^4 in units of t * time_scale."""
    freqs = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = time_scale * t[:, None] * freqs                                  # (N, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def scale_input(x_t, t, sigma, kind):
    """What the path is fed (deviation 3), float32 (N, D): x_t = t x_1 + (1 - t) x_0 has variance t^2 + (1 - t)^2 sigma^2 in each
    coordinate, where x_1 has 1 (|x_1|^2 = D, Eq. 5) and mean about 0.

    unit:   x_t / sqrt(variance), of unit variance at every t [official code].
    wiener: t x_t / variance, the best linear estimate of x_1: near 0 while x_t says nothing.
    """
    var = t * t + (1 - t) ** 2 * sigma ** 2                                   # (N,)
    gain = t / var if kind == "wiener" else var.rsqrt()
    return x_t * gain[:, None]


class PathBlock(nn.Module):
    """A block of the path: GPT-2's, but its queries look at the trunk's keys and values, and t modulates it."""
    def __init__(self, block, config):
        super().__init__()
        C = block.ln_1.normalized_shape[0]
        attn, mlp = block.attn, block.mlp
        if config.mode == "full":
            self.c_q = nn.Linear(C, C)
            self.c_q.weight.data.copy_(attn.c_attn.weight[:C])                # the query third of c_attn
            self.c_q.bias.data.copy_(attn.c_attn.bias[:C])
            self.ln_1, self.c_proj, self.ln_2, self.mlp = map(copy.deepcopy, (block.ln_1, attn.c_proj, block.ln_2, mlp))
            self.requires_grad_(True)
        else:
            borrow(self, "ln_1", block.ln_1)
            borrow(self, "ln_2", block.ln_2)
            lora = lambda linear, rows=None: LoRALinear(linear, config.rank, config.alpha, owned=False, rows=rows)
            self.c_q, self.c_proj = lora(attn.c_attn, rows=C), lora(attn.c_proj)
            self.mlp = MLP(lora(mlp.c_fc), lora(mlp.c_proj))
        self.modulation = two_layers(config.t_dim, config.t_dim, 6 * C, zero=True)
        with torch.no_grad():                   # chunks: scale, shift, gate of attention, then of the MLP
            self.modulation[2].bias.view(6, C)[[2, 5]] = config.gate_init

    def forward(self, h, modulation, k, v, at, mask):
        """h (N, C); modulation (N, 6C); k, v (B, H, S, C/H); at, mask as in Context."""
        scale_1, shift_1, gate_1, scale_2, shift_2, gate_2 = modulation.chunk(6, dim=-1)
        q = self.c_q(modulated_norm(h, self.ln_1, scale_1, shift_1))          # (N, C)
        h = h + gate_1 * self.c_proj(attend_at(q, k, v, at, mask))
        return h + gate_2 * self.mlp(modulated_norm(h, self.ln_2, scale_2, shift_2))


def modulated_norm(h, ln, scale, shift):
    """LayerNorm with gamma + scale and beta + shift in place of gamma and beta. All (N, C) or (1, C)."""
    return F.layer_norm(h, h.shape[-1:]) * (ln.weight + scale) + (ln.bias + shift)


def attend_at(q, k, v, at, mask):
    """Attention of N single queries (N, C) over the trunk's k, v (B, H, S, C/H) -> (N, C).

    at = (rows, cols): query i stands in row rows[i] at position cols[i] and sees the keys 0..cols[i] there.
    They are laid out as (B, S, C) so that one causal kernel (flash attention on GPU) serves them all.
    at = None: one query per row, which sees what mask (B, 1, 1, S) says.
    """
    if at is None:
        return attention(q[:, None], k, v, mask)[:, 0]
    B, H, S, d = k.shape
    laid_out = q.new_zeros(B, S, H * d).index_put(at, q)
    return attention(laid_out, k, v)[at]


class DiffusionPath(nn.Module):
    """The path of L2D: as many blocks as the trunk, initialised from it (see PathBlock).

    trunk: a GPT, read for the initial weights. Zero at the start: the shifts and scales, and what x_t adds to the
    input. So a fresh path computes the trunk's own states, added to the trunk's they keep their direction, and the pair
    predicts what the trunk does at every t (deviation 2; with token_input=False, gate_init=0, w_init=0 it starts as in the official code).
    """
    def __init__(self, trunk, config):
        super().__init__()
        self.config = config
        C, D, E = trunk.config.n_embd, config.x_dim, config.t_dim
        self.W = nn.Linear(C, D, bias=False)                                  # Eq. 5
        self.x_in = two_layers(D, D, C, zero=config.token_input)              # deviation 2
        self.t_in = two_layers(E, E, E)
        self.label = nn.Embedding(config.n_labels + 1, E)                     # the last one: no label
        nn.init.normal_(self.label.weight, std=0.02)
        self.h = nn.ModuleList(PathBlock(block, config) for block in trunk.h)
        self.w = two_layers(E, E, C, zero=True, bias=False)                   # w(t) of Eq. 6; a bias would cancel in w_d
        self.init_w_d()

    @torch.no_grad()
    def init_w_d(self):
        """Make w_d(t) about w_init for t in (0, 1], in every channel.

        w_d(t) = A (hidden(t) - hidden(0)) is linear in A, the last layer of w, so A follows by least squares. It rises from 0 at t = 0 within
        the first hundredth (time_scale 1000; slowly with 1). From A = 0 it would take either sign by chance, and a negative one makes the
        path undo the trunk.
        """
        hidden = self.w[:2](self.time_embedding(torch.linspace(0, 1, 1001), torch.tensor(self.config.n_labels)))   # (1001, E)
        fit = torch.linalg.pinv(hidden[1:] - hidden[0], rtol=0.01).sum(1)     # (E,)
        self.w[2].weight.copy_(self.config.w_init * fit)                      # the same in all C channels

    def token_space(self, e):
        """Eq. 5: V_y = sqrt(D) W e_y / |W e_y|, float32. e (..., C) token embeddings -> (..., D)."""
        with torch.autocast(e.device.type, enabled=False):
            return math.sqrt(self.config.x_dim) * F.normalize(self.W(e.to(self.W.weight.dtype)).float(), dim=-1)

    def time_embedding(self, t, label):
        """t (N,) and label (N,) -> (N, E)."""
        features = time_features(t, self.config.t_dim, self.config.time_scale)
        return self.t_in(features.to(self.W.weight.dtype)) + self.label(label)

    def condition(self, t, label):
        """What depends on t (N,) and label (N,) alone: the modulations, L times (N, 6C), and w_d (N, C)."""
        emb = self.time_embedding(t, label)                                   # (N, E)
        # w(0) is computed in the same shape as w(t): another shape may round differently, and w_d(0) must be 0
        w_d = self.w(emb) - self.w(self.time_embedding(torch.zeros_like(t), label))   # Eq. 6
        return [block.modulation(emb) for block in self.h], w_d

    def forward(self, x_t, t, start, modulations, c):
        """h_path (N, C), from x_t (N, D), t (N,) and the Context c; modulations from condition.

        start (N, C), what the blocks see besides x_t: wpe at each position (deviation 1: GPT-2 has no rotary positions, so without it the queries would
        not know where they stand), and with token_input the embedding of the token there (deviation 2).
        """
        x = scale_input(x_t, t, self.config.sigma, self.config.input_scale)
        h = self.x_in(x.to(self.W.weight.dtype)) + start                      # (N, C)
        for block, modulation, (k, v) in zip(self.h, modulations, c.kv):
            h = block(h, modulation, k, v, c.at, c.mask)
        return h


# ------------------------------------------------------------------------------------------------- the pair
class Context(NamedTuple):
    """c in the paper: what the trunk has read, and all that predicting the next token at N positions needs of it."""
    h: torch.Tensor                 # (N, C) the trunk's states there, before the final norm; None: token is still to be read
    token: torch.Tensor             # (N,) the token there, the last of its context
    pos: torch.Tensor               # (N,) its position
    kv: list                        # L pairs (k, v), each (B, H, S, C/H)
    at: tuple = None                # (rows, cols), each (N,): where the N positions are in kv; None: position i is row i's
    mask: torch.Tensor = None       # (B, 1, 1, S), only where at is None: True = visible; None = every key is

    def select(self, r):
        """The same for some of the positions: r an index tensor, or a slice."""
        if self.at is not None:
            return Context(self.h[r], self.token[r], self.pos[r], self.kv, tuple(z[r] for z in self.at))
        mask = None if self.mask is None else self.mask[r]
        return Context(self.h[r], self.token[r], self.pos[r], [(k[r], v[r]) for k, v in self.kv], None, mask)


class L2D(nn.Module):
    """Trunk and path. path = None is the trunk alone (the controls: a trunk finetuned or with LoRA)."""
    def __init__(self, trunk, path=None):
        super().__init__()
        self.trunk, self.path = trunk, path
        self.no_label = path.config.n_labels if path is not None else 0       # the label that means none

    def read(self, idx, at):
        """One trunk pass over idx (B, T): the Context of the positions at = (rows, cols), each (N,).

        A frozen trunk runs without autograd: nothing is stored for a backward pass.
        """
        trains = any(p.requires_grad for p in self.trunk.parameters())
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            h, kv = self.trunk(idx)
        return Context(h[at], idx[at], at[1], kv, at)

    def embed(self, ids):
        """x_1 of token ids (...): rows of V, (..., D). W gets gradients, the trunk's embedding none."""
        return self.path.token_space(self.trunk.wte.weight.detach()[ids])

    def forward(self, x_t, t, c, label, condition=None, words=None):
        """f(x_t, t, c), logits (N, V_size), by Eq. 6: the head of h = h_trunk + w_d(t) * h_path.

        x_t (N, D) and t (N,) float32; c a Context; label (N,) guidance labels; condition: the result of
        path.condition(t, label), where it is already known; words (N, k): logits of these tokens only, (N, k).
        """
        modulations, w_d = condition if condition is not None else self.path.condition(t, label)
        start = self.trunk.wpe(c.pos)                                         # (N, C), deviation 1
        if self.path.config.token_input:                                      # deviation 2
            start = start + self.trunk.wte(c.token)
        h_path = self.path(x_t, t, start, modulations, c)
        return self.trunk.head(c.h + w_d * h_path, words)


def build(trunk, path_config=None, lora=None):
    """The pair around a trunk. lora = (rank, alpha) puts one on the trunk, after the path has taken its copies."""
    path = DiffusionPath(trunk, path_config) if path_config is not None else None
    if lora is not None:
        trunk.add_lora(*lora)
    return L2D(trunk, path)


def load_checkpoint(path):
    """What train.py saved: a dict of tensors and primitives. Raises UserError where it cannot be read."""
    if not os.path.exists(path):
        config = f"config/{os.path.basename(os.path.dirname(path))}.py"       # out/NAME is where config/NAME.py writes
        command = f"python train.py {config if os.path.exists(config) else 'config/demo_trunk.py, or bash demo.sh'}"
        raise UserError(f"error: no checkpoint at {path}; make one first: {command}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        assert isinstance(checkpoint, dict), "wrong contents"
        missing = {"trunk_config", "trunk_lora", "path_config", "model"} - checkpoint.keys()
        assert not missing, f"it has no {', '.join(sorted(missing))}"
        return checkpoint
    except Exception as e:
        raise UserError(f"error: {path} is not a checkpoint of train.py, or is damaged "
                        f"({type(e).__name__}: {str(e).splitlines()[0] if str(e) else 'wrong contents'})")


def model_from_checkpoint(checkpoint, source):
    """The L2D pair of a loaded checkpoint, on the CPU in float32."""
    try:
        trunk = GPT(GPTConfig(**checkpoint["trunk_config"]))
        path_config = PathConfig(**checkpoint["path_config"]) if checkpoint["path_config"] else None
    except TypeError as e:
        raise UserError(f"error: {source} was written by another version of this code ({e}); train it again")
    model = build(trunk, path_config, checkpoint["trunk_lora"])
    load_state(model, checkpoint["model"], source)
    return model


def describe(model, trunk_lora=None):
    """The part of a checkpoint that says what the model is: everything model_from_checkpoint needs."""
    return {"trunk_config": asdict(model.trunk.config), "trunk_lora": trunk_lora,
            "path_config": asdict(model.path.config) if model.path else None, "model": model.state_dict()}


def device_kind(want):
    """"cuda" or "cpu" for the option --device (auto, cpu, cuda). Raises UserError where there is no CUDA to use."""
    if want == "cuda" and not torch.cuda.is_available():
        raise UserError("error: --device=cuda, but this machine (or this build of torch) has no CUDA; use --device=cpu")
    return "cuda" if want != "cpu" and torch.cuda.is_available() else "cpu"


def dtype_name(want, kind):
    """The name of the dtype for the option --dtype: auto is bfloat16 on cuda, float32 on cpu."""
    return want if want != "auto" else "bfloat16" if kind == "cuda" else "float32"
