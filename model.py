"""
GPT-2 and the diffusion path of L2D (Cetin, Zhao, Tang, "Large Language Models to Diffusion Finetuning",
arXiv 2501.15781). "Eq." means an equation of that paper.

Words:
    trunk        the language model, here GPT-2. It is frozen.
    path         the diffusion path, a second stack of blocks beside the trunk. Its input is a noised
                 embedding x_t of the token to predict, the time t, and the embeddings of the last token and
                 its position. It attends to the trunk's keys and values. Its output is added to the trunk's
                 once, before the final norm and the head.
    pair         trunk and path together: class L2D.
    T            the number of predictions per token, option --steps. T = 1 is the trunk alone.
    evaluation   one of these T predictions. The first, at t = 0, is the trunk's own.
    path call    one run of the path for one token. Each of the other T - 1 evaluations takes one. With
                 guidance (Eq. 7) all but the last take two.
    solver step  a move of x_t from one time to the next, along the velocity of Eq. 4. Euler's solver takes
                 one evaluation for each step, the midpoint method takes two.

Shapes and symbols, here and in diffusion.py:
    B           rows of a batch                            V_size  size of the vocabulary
    S           number of keys: the length of the texts
    Q           queries of a row; without a cache, Q = S
    C, L, H     n_embd, n_layer, n_head
    N           positions at which a token is predicted, as a flat list: in training the targets of a batch,
                in decoding one position (or several) of each row
    D           x_dim, the size of a token's point V_y     V       (V_size, D), the table of Eq. 5
    x_t         (N, D)  noised token embedding             t       (N,) in [0, 1]: 0 is noise, 1 is data
    w_d         (N, C)  weight of the path (Eq. 6), exactly 0 at t = 0
    kv          a list of L tuples (k, v), each (B, H, S, C/H): the trunk's keys and values
    c           a Context, the c of the paper's f(x_t, t, c): what the trunk computed for N positions

README.md follows one token through the code, with shapes.
"""
import copy
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import at_least, require


# ------------------------------------------------------------------------------------------- the trunk
@dataclass(frozen=True)
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768

    def __post_init__(self):
        at_least(self, block_size=1, vocab_size=1, n_layer=1, n_head=1, n_embd=1)
        require(self.n_embd % self.n_head == 0,
                f"n_embd={self.n_embd} does not divide into n_head={self.n_head} heads")


def borrow(module, name, value):
    """Set module.name = value without registering it as a part of the module.

    parameters(), state_dict() and to() then see a borrowed weight once, in the module that owns it.
    """
    object.__setattr__(module, name, value)


class LoRALinear(nn.Module):
    """y = W x + b + (alpha / rank) B A x (Hu et al. 2021), with B = 0 at the start.

    linear: the nn.Linear that holds W and b.
    owned: True registers `linear` here and freezes it (a LoRA on the trunk). False only borrows it, since the
        trunk owns it (the path's LoRA).
    n_out: use only the first n_out outputs of `linear`, such as the queries of c_attn. Default: all.
    """
    def __init__(self, linear, rank, alpha, owned, n_out=None):
        super().__init__()
        if owned:
            self.linear = linear.requires_grad_(False)
        else:
            borrow(self, "linear", linear)
        self.n_out = n_out or linear.out_features
        self.scale = alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features))
        self.lora_B = nn.Parameter(torch.zeros(self.n_out, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        bias = None if self.linear.bias is None else self.linear.bias[:self.n_out]
        y = F.linear(x, self.linear.weight[:self.n_out], bias)
        return y + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


def attention(q, k, v, mask=None):
    """softmax(q k^T / sqrt(C/H)) v, as flash attention where the device has it.

    q: (B, Q, C). k, v: (B, H, S, C/H), or fewer heads, each for several of q. mask: (B, 1, Q, S), True where
    the key is visible. Without a mask, Q = S queries attend causally, and a single query attends to every
    key. Returns (B, Q, C).
    """
    B, Q, C = q.shape
    _, H, S, size = k.shape
    assert mask is not None or Q in (1, S), "without a mask there is one query, or as many as keys"
    q = q.view(B, Q, C // size, size).transpose(1, 2)             # (B, H, Q, C/H)
    is_causal = True if mask is None and Q > 1 else False         # plain bools: torch.compile needs them
    shared = q.size(1) // H
    enable_gqa = True if shared > 1 and is_causal else False
    if shared > 1 and not is_causal:                              # heads that share keys: queries of one head
        q = q.reshape(B, H, shared * Q, size)
        mask = mask.repeat(1, 1, shared, 1) if mask is not None else None
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=enable_gqa)
    return y.reshape(B, C // size, Q, size).transpose(1, 2).reshape(B, Q, C)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key and value in one matrix
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None, pos=None, mask=None):
        """x (B, Q, C) -> the output (B, Q, C), and all keys and values (k, v), each (B, H, S, C/H)."""
        B, Q, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        k = k.view(B, Q, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, Q, C/H)
        v = v.view(B, Q, self.n_head, C // self.n_head).transpose(1, 2)
        if cache is not None:
            columns = pos[:, None, :, None].expand_as(k)          # where the new keys go in the cache
            k = cache[0].scatter_(2, columns, k)                  # (B, H, S, C/H), written in place
            v = cache[1].scatter_(2, columns, v)
        return self.c_proj(attention(q, k, v, mask)), (k, v)


class MLP(nn.Module):
    """GPT-2's MLP. It is given its two maps, since the path's may be LoRAs on the trunk's."""
    def __init__(self, c_fc, c_proj):
        super().__init__()
        self.c_fc = c_fc
        self.c_proj = c_proj

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # GPT-2's GELU is the tanh form


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.ln_1 = nn.LayerNorm(C)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(C)
        self.mlp = MLP(nn.Linear(C, 4 * C), nn.Linear(4 * C, C))

    def forward(self, x, cache=None, pos=None, mask=None):
        y, kv = self.attn(self.ln_1(x), cache, pos, mask)
        x = x + y
        return x + self.mlp(self.ln_2(x)), kv

    def linears(self):
        """(module, name) of every linear map of the block, for LoRA."""
        return [(self.attn, "c_attn"), (self.attn, "c_proj"), (self.mlp, "c_fc"), (self.mlp, "c_proj")]

    def path_block(self, config):
        """The block of the path that goes with this one."""
        return PathBlock(self, config)


class GPT(nn.Module):
    """GPT-2, the trunk. Parameters have the names of its released checkpoints; the head is tied to wte.

    What a trunk must offer (llama.py has another one):
        config                    a dataclass with block_size, vocab_size and n_embd
        wte                       the embedding, whose rows become the token space
        embed, embed_position     what enters the first block, and the part of it that tells the position
        h                         the blocks, with linears(), and path_block(), which makes a PathBlock
        forward, head, cross_entropy, head_weight, add_lora, merge_lora
    A new kind is also entered in families (plumbing/checkpoint.py) and in load_trunk (plumbing/trunks.py).
    """
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
            if "c_proj" in name and p.dim() == 2:                 # 2L of them add to the residual stream
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, idx, pos=None, cache=None, mask=None):
        """Run everything before the final norm.

        idx: (B, Q) token ids. pos: (B, Q) their positions, by default 0 to Q-1. cache: L tuples (k, v), each
        (B, H, S, C/H), into which the new keys and values are written at pos. mask: (B, 1, Q, S), as in
        attention. Returns the hidden states h (B, Q, C), and kv.
        """
        if pos is None:
            pos = torch.arange(idx.size(1), device=idx.device)[None].expand_as(idx)
        h = self.embed(idx, pos)                                  # (B, Q, C)
        kv = []
        for i, block in enumerate(self.h):
            block_cache = cache[i] if cache is not None else None
            h, k_and_v = block(h, block_cache, pos, mask)
            kv.append(k_and_v)
        return h, kv

    def embed(self, idx, pos):
        """Token ids (...) at positions pos (...) -> what enters the first block, (..., C)."""
        return self.wte(idx) + self.embed_position(pos)

    def embed_position(self, pos):
        return self.wpe(pos)

    def head_weight(self):
        return self.wte.weight                                    # tied to the embedding

    def lm_head(self, h):
        return F.linear(h, self.head_weight())

    def head(self, h):
        """Hidden states (..., C) -> logits (..., V_size)."""
        return self.lm_head(self.ln_f(h))

    def cross_entropy(self, h, y):
        """-log p(y) of the tokens y (N,), predicted from hidden states h (N, C): float32 (N,)."""
        return F.cross_entropy(self.head(h).float(), y, reduction="none")

    def add_lora(self, rank, alpha):
        """Wrap every linear map of every block in a LoRA. In a frozen trunk only the LoRAs then train."""
        for block in self.h:
            for owner, name in block.linears():
                setattr(owner, name, LoRALinear(getattr(owner, name), rank, alpha, owned=True))

    @torch.no_grad()
    def merge_lora(self):
        """Undo add_lora: add what the LoRAs have learned to the weights, W + (alpha / rank) B A."""
        for block in self.h:
            for owner, name in block.linears():
                lora = getattr(owner, name)
                lora.linear.weight += lora.scale * lora.lora_B @ lora.lora_A
                setattr(owner, name, lora.linear)


# ----------------------------------------------------------------------------------- the diffusion path
@dataclass(frozen=True)
class PathConfig:                   # `train.py --help` prints the comments of this class
    # the diffusion path
    path_mode: Literal["none", "lora", "full"] = "full"  # no path, a LoRA on the trunk's blocks, or a copy
    path_init: Literal["trunk", "paper"] = "trunk"  # a new path predicts as the trunk, or has w_d = 0
    lora_rank: int = 32             # of a LoRA path, and of a LoRA on the trunk
    lora_alpha: float = 32.0
    x_dim: int = 256                # D, size of the token space
    t_dim: int = 256                # width of the time embedding
    sigma: float = 64.0             # standard deviation of the noise x_0
    input_scale: Literal["wiener", "unit"] = "wiener"  # how x_t enters the path; unit is the paper's way
    time_scale: float = 1000.0      # factor on t before its sinusoids; 1 is the paper's

    def __post_init__(self):
        at_least(self, lora_rank=1, x_dim=1, t_dim=2)
        require(self.sigma > 0, f"sigma={self.sigma}, but it must be above 0")
        require(self.lora_alpha > 0, f"lora_alpha={self.lora_alpha}, but it must be above 0")
        require(self.t_dim % 2 == 0, f"t_dim={self.t_dim}, but it must be even: half cosines, half sines")


def two_layers(n_in, n_hidden, n_out, zero=False, bias=True):
    """Linear - SiLU - Linear. With zero=True the last layer starts at 0, so that the output starts at 0."""
    net = nn.Sequential(nn.Linear(n_in, n_hidden), nn.SiLU(), nn.Linear(n_hidden, n_out, bias))
    if zero:
        for p in net[2].parameters():
            nn.init.zeros_(p)
    return net


def time_features(t, dim, time_scale):
    """Sinusoids of time_scale * t, with periods from 2 pi to nearly 2 pi 10^4. t (N,) -> (N, dim).

    The paper's code feeds t itself, on which most sinusoids are constant. DiT has 1000 t (deviation 4).
    """
    freqs = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = time_scale * t[:, None] * freqs                      # (N, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def scale_input(x_t, t, sigma, input_scale):
    """Scale x_t (N, D) for the path, in float32.

    A coordinate of x_t = t x_1 + (1 - t) x_0 has the variance t^2 + (1 - t)^2 sigma^2, since a coordinate of
    x_1 has the variance 1 (Eq. 5).
        unit:    x_t / sqrt(variance), which has unit variance at every t, as in the paper's code.
        wiener:  t x_t / variance, the best linear estimate of x_1. It is near 0 while x_t is nearly all
                 noise, and a path learns faster with it (deviation 3).
    """
    variance = t * t + (1 - t) ** 2 * sigma ** 2                  # (N,)
    gain = t / variance if input_scale == "wiener" else variance.rsqrt()
    return x_t * gain[:, None]


class PathBlock(nn.Module):
    """A block of the path: a block of the trunk whose queries look at the trunk's keys and values.

    It has no keys and values of its own, so positions of the path do not see each other. The time t sets the
    scale and shift of both norms and the gates of both residuals, as in DiT.
    """
    def __init__(self, block, config):
        super().__init__()
        C = block.ln_1.normalized_shape[0]
        attn = block.attn
        mlp = block.mlp
        if config.path_mode == "full":                            # copies that train
            self.c_q = nn.Linear(C, C)
            self.c_q.weight.data.copy_(attn.c_attn.weight[:C])    # the query third of c_attn
            self.c_q.bias.data.copy_(attn.c_attn.bias[:C])
            self.ln_1 = copy.deepcopy(block.ln_1)
            self.c_proj = copy.deepcopy(attn.c_proj)
            self.ln_2 = copy.deepcopy(block.ln_2)
            self.mlp = copy.deepcopy(mlp)
            self.requires_grad_(True)                             # the trunk that they copy may be frozen
        else:                                                     # LoRAs on the trunk's own weights
            def lora(linear, n_out=None):
                return LoRALinear(linear, config.lora_rank, config.lora_alpha, owned=False, n_out=n_out)
            borrow(self, "ln_1", block.ln_1)
            borrow(self, "ln_2", block.ln_2)
            self.c_q = lora(attn.c_attn, n_out=C)
            self.c_proj = lora(attn.c_proj)
            self.mlp = MLP(lora(mlp.c_fc), lora(mlp.c_proj))
        self.modulation = two_layers(config.t_dim, config.t_dim, 6 * C, zero=True)
        if config.path_init == "trunk":                           # open gates (deviation 2)
            with torch.no_grad():
                self.modulation[2].bias.view(6, C)[[2, 5]] = 1.0

    def modulate(self, emb):
        """Time embedding (N, t_dim) -> scale, shift and gate of attention, then of the MLP: (N, 6C).

        Scale and shift are the weight and bias of the block's LayerNorm plus what t adds.
        """
        no_gate = torch.zeros_like(self.ln_1.weight)
        norms = [self.ln_1.weight, self.ln_1.bias, no_gate, self.ln_2.weight, self.ln_2.bias, no_gate]
        return self.modulation(emb) + torch.cat(norms)

    def forward(self, h, modulation, kv, c):
        """h (N, C) -> (N, C). modulation: (N, 6C) or (1, 6C), from modulate. kv: those of this layer in c."""
        scale_1, shift_1, gate_1, scale_2, shift_2, gate_2 = modulation.chunk(6, dim=-1)
        q = self.c_q(F.layer_norm(h, h.shape[-1:]) * scale_1 + shift_1)  # (N, C)
        h = h + gate_1 * self.c_proj(attend_at(q, *kv, c.at, c.mask))
        return h + gate_2 * self.mlp(F.layer_norm(h, h.shape[-1:]) * scale_2 + shift_2)


def attend_at(q, k, v, at, mask):
    """Attention of N single queries q (N, C) over the trunk's k, v (B, H, S, C/H). Returns (N, C).

    attention wants its queries as a grid (B, Q): at = (rows, columns) says where in it each query lies, and
    places without a query stay 0. at = None: the N queries fill the grid row by row, N = B Q.
    mask (B, 1, Q, S): the keys that each place sees. None: in training Q = S, and column k sees keys 0 to k;
    in decoding Q = 1, and the one query of a row sees all of its keys.
    """
    B, _, S, _ = k.shape
    C = q.size(1)
    if at is None:
        return attention(q.view(B, -1, C), k, v, mask).view(q.shape)
    Q = S if mask is None else mask.size(2)
    grid = q.new_zeros(B, Q, C).index_put(at, q)
    return attention(grid, k, v, mask)[at]


class DiffusionPath(nn.Module):
    """The path: a block for each block of the trunk, initialised from it, and layers that bring in x_t and t.

    With path_init="trunk" a new path computes the trunk's hidden states and ignores x_t and t, so the pair
    predicts at every t what the trunk does (deviation 2). With "paper" its gates and w_d start at 0.
    A guidance group is a number from 0 to n_groups - 1; n_groups itself means "no group".
    """
    def __init__(self, trunk, config, n_groups):
        super().__init__()
        self.config = config
        self.n_groups = n_groups
        C = trunk.config.n_embd
        D = config.x_dim
        t_dim = config.t_dim
        self.W = nn.Linear(C, D, bias=False)                      # Eq. 5
        self.x_in = two_layers(D, D, C, zero=config.path_init == "trunk")
        self.t_in = two_layers(t_dim, t_dim, t_dim)
        self.group = nn.Embedding(n_groups + 1, t_dim)
        nn.init.normal_(self.group.weight, std=0.02)
        self.h = nn.ModuleList(block.path_block(config) for block in trunk.h)
        self.w = two_layers(t_dim, t_dim, C, zero=True, bias=False)  # w(t) of Eq. 6; a bias would cancel

    def token_space(self, e):
        """Eq. 5: V_y = sqrt(D) W e_y / |W e_y|, in float32. e (..., C) token embeddings -> (..., D)."""
        with torch.autocast(e.device.type, enabled=False):
            V_y = self.W(e.to(self.W.weight.dtype)).float()
            return math.sqrt(self.config.x_dim) * F.normalize(V_y, dim=-1)

    def time_embedding(self, t, group):
        """t (N,) and group (N,) -> (N, t_dim)."""
        features = time_features(t, self.config.t_dim, self.config.time_scale)
        return self.t_in(features.to(self.W.weight.dtype)) + self.group(group)

    def condition(self, t, group):
        """All that depends on t (N,) and group (N,) alone: L modulations (N, 6C), and w_d (N, C) of Eq. 6."""
        emb = self.time_embedding(t, group)                       # (N, t_dim)
        emb_0 = self.time_embedding(torch.zeros_like(t), group)   # in the shape of emb, to round like it
        w_d = self.w(emb) - self.w(emb_0)                         # Eq. 6: exactly 0 at t = 0
        if self.config.path_init == "trunk":
            # A new path gives the trunk's own states. Added in full they double h, which the final norm
            # undoes. So training starts at the trunk's predictions (deviation 2).
            w_d = w_d + (t > 0)[:, None].to(w_d.dtype)
        return [block.modulate(emb) for block in self.h], w_d

    def forward(self, x_t, t, embedding, modulations, c):
        """h_path (N, C), from x_t (N, D), t (N,) and the Context c.

        embedding: (N, C), what enters beside x_t, see L2D.merge. modulations: L x (N, 6C), from condition.
        """
        x = scale_input(x_t, t, self.config.sigma, self.config.input_scale)
        dtype = self.W.weight.dtype
        h = self.x_in(x.to(dtype)) + embedding.to(dtype)          # (N, C)
        for block, modulation, kv in zip(self.h, modulations, c.kv):
            h = block(h, modulation, kv, c)
        return h


# -------------------------------------------------------------------------------------------- the pair
class Context(NamedTuple):
    """The c of f(x_t, t, c): what the trunk computed for N positions and for all that comes before them."""
    h: torch.Tensor                 # (N, C) the trunk's hidden states, before the final norm
    token: torch.Tensor             # (N,) the token at each position, the last that is known
    pos: torch.Tensor               # (N,) the position
    kv: list                        # L tuples (k, v), each (B, H, S, C/H)
    at: tuple = None                # where the N queries lie in a grid (B, Q), see attend_at
    mask: torch.Tensor = None       # (B, 1, Q, S), the keys that each place of the grid sees, see attend_at


class L2D(nn.Module):
    """The pair of trunk and path. path = None is the trunk alone.

    The constructor freezes the trunk. Finetuning it (train.py --trunk_mode) undoes that afterwards.
    no_group: the number that means "no guidance group".
    """
    def __init__(self, trunk, path=None):
        super().__init__()
        self.trunk = trunk.requires_grad_(False)
        self.path = path
        self.no_group = path.n_groups if path is not None else 0

    def read_context(self, idx, at):
        """Run the trunk once over idx (B, S); return the Context of the positions at = (rows, columns).

        A frozen trunk runs without autograd, so nothing is stored for a backward pass.
        """
        trains = any(p.requires_grad for p in self.trunk.parameters())
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            h, kv = self.trunk(idx)                               # (B, S, C)
        return Context(h[at], idx[at], at[1], kv, at)

    def embed(self, ids):
        """x_1 = V_y of token ids y (...): (..., D). W gets gradients, the trunk's embedding gets none."""
        return self.path.token_space(self.trunk.wte.weight.detach()[ids])

    def forward(self, x_t, t, c, group, condition=None):
        """f(x_t, t, c), the prediction: logits (N, V_size). Arguments as in merge."""
        return self.trunk.head(self.merge(x_t, t, c, group, condition))

    def merge(self, x_t, t, c, group, condition=None):
        """Eq. 6: h_trunk + w_d(t) h_path, hidden states (N, C) before the final norm and the head.

        x_t: (N, D) float32. t: (N,) float32. c: a Context. group: (N,) guidance groups. condition:
        path.condition(t, group) where it is known already, for each position or one for all.
        """
        modulations, w_d = condition if condition is not None else self.path.condition(t, group)
        embedding = self.trunk.embed_position(c.pos)              # (N, C): GPT-2 is not rotary (deviation 1)
        if self.path.config.path_init == "trunk":
            embedding = self.trunk.embed(c.token, c.pos)          # the trunk's own input (deviation 2)
        h_path = self.path(x_t, t, embedding, modulations, c)
        return (c.h + w_d * h_path).to(c.h.dtype)                 # Eq. 6
