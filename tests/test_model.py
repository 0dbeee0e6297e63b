"""model.py against transformers' GPT-2, closed forms, finite differences and invariances."""
import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F
from helpers import error_of, everywhere, generator, says, tokens

from diffusion import draw, nll, trunk_nll
from model import GPT, L2D, DiffusionPath, GPTConfig, PathConfig, scale_input, time_features
from plumbing.gpt2_weights import GPT2_SIZES

TINY = GPTConfig(block_size=16, vocab_size=31, n_layer=3, n_head=3, n_embd=24)
SMALL_PATH = dict(x_dim=16, t_dim=20, sigma=4.0, lora_rank=4, lora_alpha=8.0)


def randomise(module, seed=0, std=0.2):
    """Every parameter random: zero biases, heads and gates would hide mistakes."""
    g = generator(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(std * torch.randn(p.shape, generator=g) + ("ln_" in name and name.endswith("weight")))
    return module


def pair(mode="full", lora=None, random_path=True, **path):
    """A tiny random trunk and, unless mode is None, a path with random weights."""
    torch.manual_seed(0)
    trunk = randomise(GPT(TINY))
    model = L2D(trunk, DiffusionPath(trunk, PathConfig(path_mode=mode, **(SMALL_PATH | path)), 3) if mode else None)
    if lora:
        trunk.add_lora(*lora)
        learned = {n.replace(".", "_"): p for n, p in trunk.named_parameters() if "lora_" in n}
        randomise(torch.nn.ParameterDict(learned), 1)
    if mode and random_path:
        randomise(model.path, seed=2)
    return model


def noisy(n, seed=0, D=SMALL_PATH["x_dim"]):
    """x_t and t for n positions, and groups."""
    g = generator(seed)
    return torch.randn(n, D, generator=g), torch.rand(n, generator=g), torch.randint(4, (n,), generator=g)


# -------------------------------------------------- the trunk; against transformers: tests/test_weights.py
@torch.no_grad()
def our_logits(trunk, idx):
    return trunk.head(trunk(idx)[0])


def test_trunk_sizes_that_do_not_fit_are_refused():
    says(error_of(GPTConfig, n_embd=10, n_head=3), "n_embd=10")
    says(error_of(GPTConfig, n_layer=0), "n_layer=0")


# ---------------------------------------------------------------------------------------------- the trunk
def cache_of(kv, S):
    """kv with room for S positions, as decoding keeps it."""
    return [tuple(F.pad(z, (0, 0, 0, S - z.size(2)), value=torch.nan) for z in layer) for layer in kv]


def first_keys(cache, S):
    return [(k[:, :, :S], v[:, :, :S]) for k, v in cache]


def test_cached_decoding_is_the_full_forward():
    """Ragged prompts in one right-padded cache, decoded token by token, against each row alone, uncached."""
    trunk, full = pair(None).trunk, tokens(3, 16)
    lengths = torch.tensor([5, 2, 9])
    padded = full[:, :9].masked_fill(torch.arange(9) >= lengths[:, None], 0)
    with torch.no_grad():
        h, kv = trunk(padded)
        cache, pos = cache_of(kv, 16), lengths - 1
        seen = [h[torch.arange(3), pos]]
        for n in range(1, 8):
            pos, S = pos + 1, 9 + n
            for k, v in cache:
                k[:, :, S - 1], v[:, :, S - 1] = 0, 0             # whatever padding holds, but not nan
            mask = (torch.arange(S) <= pos[:, None])[:, None, None]
            h, _ = trunk(full[torch.arange(3), pos][:, None], pos[:, None], first_keys(cache, S), mask)
            seen.append(h[:, 0])
        for row, length in enumerate(lengths.tolist()):
            expected = trunk(full[row:row + 1])[0][0, length - 1:length + 7]
            torch.testing.assert_close(torch.stack(seen, 1)[row], expected, atol=1e-5, rtol=1e-5)


def test_cached_decoding_in_chunks_and_without_a_mask_is_the_full_forward():
    """Several new tokens at once with a mask; one at a time without any, where it sees the whole cache."""
    trunk, idx = pair(None).trunk, tokens(2, 8)
    with torch.no_grad():
        expected, kv = trunk(idx)
        cache = cache_of(trunk(idx[:, :3])[1], 8)
        pos = torch.arange(3, 7).expand(2, 4)
        mask = (torch.arange(7) <= pos[:, :, None])[:, None]
        chunk = trunk(idx[:, 3:7], pos, first_keys(cache, 7), mask)[0]
        torch.testing.assert_close(chunk, expected[:, 3:7], atol=1e-5, rtol=1e-5)
        h, kv_cached = trunk(idx[:, 7:], torch.full((2, 1), 7), cache)
        torch.testing.assert_close(h, expected[:, 7:], atol=1e-5, rtol=1e-5)
        for ours, theirs in zip(kv_cached, kv):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_right_padding_changes_nothing_and_the_trunk_is_causal():
    trunk, idx = pair(None).trunk, tokens(2, 16)
    with torch.no_grad():
        h = trunk(idx)[0]
        torch.testing.assert_close(trunk(idx[:, :7])[0], h[:, :7], atol=1e-5, rtol=1e-5)
        for j in (0, 7, 15):
            other = idx.clone()
            other[0, j] = (other[0, j] + 1) % TINY.vocab_size
            change = (trunk(other)[0] - h).abs().amax(-1)
            assert change[0, :j].max() < 1e-6 if j else True
            assert change[0, j:].min() > 1e-3 and change[1].max() < 1e-6


def test_a_lora_on_the_trunk_adds_its_product_and_merges_into_the_weights():
    plain, model = pair(None).trunk, pair(None, lora=(4, 8.0))
    trunk, idx = model.trunk, tokens(2, 9)
    assert all(p.requires_grad == ("lora_" in n) for n, p in trunk.named_parameters())
    before = our_logits(trunk, idx)
    assert (before - our_logits(plain, idx)).abs().max() > 1e-2   # pair() made B random
    layer = trunk.h[0].attn.c_attn
    W = layer.linear.weight + 8.0 / 4 * layer.lora_B @ layer.lora_A
    x = torch.randn(5, 24)
    torch.testing.assert_close(layer(x), x @ W.T + layer.linear.bias, atol=1e-5, rtol=1e-5)
    trunk.merge_lora()
    torch.testing.assert_close(our_logits(trunk, idx), before, atol=1e-5, rtol=1e-5)
    assert trunk.state_dict().keys() == plain.state_dict().keys()


def test_a_fresh_lora_is_the_trunk_bit_for_bit():
    plain, lora = pair(None).trunk, GPT(TINY)
    lora.load_state_dict(plain.state_dict())
    lora.add_lora(4, 8.0)
    assert torch.equal(our_logits(lora, tokens(2, 9)), our_logits(plain, tokens(2, 9)))


# ----------------------------------------------------------------------------------------------- the pair
@pytest.mark.parametrize("mode", [None, "full", "lora"])
def test_the_pair_freezes_its_trunk_and_trains_its_path(mode):
    torch.manual_seed(0)
    trunk = GPT(TINY)
    assert all(p.requires_grad for p in trunk.parameters())
    path = DiffusionPath(trunk, PathConfig(path_mode=mode, **SMALL_PATH), 3) if mode else None
    model = L2D(trunk, path)
    assert not any(p.requires_grad for p in model.trunk.parameters())
    assert all(p.requires_grad for p in path.parameters()) if mode else model.no_group == 0
    before_the_path = L2D(GPT(TINY)).trunk                        # nor does it matter which was made first
    path = DiffusionPath(before_the_path, PathConfig(**SMALL_PATH), 3)
    assert all(p.requires_grad for p in path.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("scale", ["unit", "wiener"])
@torch.no_grad()
def test_logits_at_t_0_are_the_trunks_bit_for_bit(mode, dtype, scale):
    model = pair(mode, input_scale=scale).to(dtype)
    for B, S in ((1, 1), (1, 7), (13, 16)):
        idx, at = tokens(B, S), everywhere(B, S)
        c = model.read_context(idx, at)
        h = c.h
        x_t, t, group = noisy(B * S)
        assert torch.equal(model(4 * x_t, 0 * t, c, group), model.trunk.head(h))
        mixed = torch.where(torch.arange(B * S) % 2 == 0, 0.0, 0.5 + t / 2)       # some at 0, others not
        logits, trunk = model(x_t, mixed, c, group), model.trunk.head(h)
        assert torch.equal(logits[mixed == 0], trunk[mixed == 0])
        assert ((logits - trunk)[mixed > 0].abs().amax(-1) > 1e-3).all()
        mask = torch.ones(B, 1, 1, S, dtype=torch.bool)           # and as in sampling
        last = at[1] == S - 1
        one = c._replace(h=h[last], token=c.token[last], pos=c.pos[last], at=None, mask=mask)
        assert torch.equal(model(x_t[last], 0 * t[last], one, group[last]), model.trunk.head(h[last]))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(x_t, 0 * t, c, group), model.trunk.head(h))


@pytest.mark.parametrize("mode", ["full", "lora"])
@torch.no_grad()
def test_a_fresh_path_computes_the_trunks_own_states(mode):
    """What the initialisation is for: before training h_path is h_trunk, whatever x_t and t are; no change."""
    model, idx, at = pair(mode, random_path=False), tokens(2, 9), everywhere(2, 9)
    c, (x_t, t, group) = model.read_context(idx, at), noisy(18)
    modulations, w_d = model.path.condition(t, group)
    h_path = model.path(x_t, t, model.trunk.wpe(at[1]) + model.trunk.wte(idx[at]), modulations, c)
    torch.testing.assert_close(h_path, c.h, atol=1e-5, rtol=1e-5)
    assert (w_d > 0).all()
    torch.testing.assert_close(model(x_t, t, c, group), model.trunk.head(c.h), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["full", "lora"])
@torch.no_grad()
def test_a_fresh_path_of_the_papers_kind_adds_nothing_and_its_gates_are_shut(mode):
    model, idx, at = pair(mode, random_path=False, path_init="paper"), tokens(2, 9), everywhere(2, 9)
    c, (x_t, t, group) = model.read_context(idx, at), noisy(18)
    assert not model.path.condition(t, group)[1].any()
    assert torch.equal(model(x_t, t, c, group), model.trunk.head(c.h))
    entered = torch.randn(18, 24, generator=generator())
    for block, kv in zip(model.path.h, c.kv):                     # each block passes on what it is given
        assert torch.equal(block(entered, block.modulate(torch.randn(18, 20)), kv, c), entered)
    assert (model.path.x_in(x_t).abs().amax(1) > 0).all()         # and x_t enters from the beginning


@pytest.mark.parametrize("path_init, start", [("trunk", 1.0), ("paper", 0.0)])
@pytest.mark.parametrize("time_scale", [1000.0, 1.0])
@torch.no_grad()
def test_w_d_is_0_at_t_0_and_starts_at_one_value_elsewhere(time_scale, path_init, start):
    path = DiffusionPath(GPT(TINY), PathConfig(time_scale=time_scale, path_init=path_init, **SMALL_PATH), 3)
    t = torch.tensor([0.0, 1e-6, 0.3, 1.0, 0.0])
    group = torch.tensor([0, 1, 2, 3, 3])
    assert torch.equal(path.condition(t, group)[1], start * (t > 0)[:, None].expand(5, 24))
    randomise(path)
    w_d = path.condition(t, group)[1]
    assert not w_d[t == 0].any() and w_d[t > 0].unique().numel() > 24


@pytest.mark.parametrize("path_init", ["trunk", "paper"])
@pytest.mark.parametrize("mode", ["full", "lora"])
@torch.no_grad()
def test_the_path_is_what_it_is_by_hand(mode, path_init):
    """One position at a time, written from the paper, with no code of model.py but the trunk's pass."""
    model = pair(mode, time_scale=30.0, path_init=path_init)
    trunk, path, idx, at = model.trunk, model.path, tokens(2, 9), everywhere(2, 9)
    c = model.read_context(idx, at)
    h_trunk, kv = c.h, c.kv
    x_t, t, group = noisy(18)
    t[3] = 0
    logits = model(x_t, t, c, group)

    def mlp(net, x):
        y = net[2].weight @ F.silu(net[0].weight @ x + net[0].bias)
        return y if net[2].bias is None else y + net[2].bias

    def ln(x):
        return (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()

    def weights(owner, name, rows=None):
        layer = getattr(owner, name)
        if mode == "full":
            return layer.weight, layer.bias
        source = layer.linear
        return source.weight[:rows] + 8.0 / 4 * layer.lora_B @ layer.lora_A, source.bias[:rows]

    def embed(time, i):
        angles = torch.tensor([30.0 * float(time) / 10000 ** (j / 10) for j in range(10)])
        return mlp(path.t_in, torch.cat([angles.cos(), angles.sin()])) + path.group.weight[group[i]]

    for i in range(18):
        row, k, C, d = at[0][i], at[1][i], 24, 8
        emb = embed(t[i], i)
        x = x_t[i] * t[i] / (t[i] ** 2 + (1 - t[i]) ** 2 * 4.0 ** 2)
        h = mlp(path.x_in, x) + trunk.wpe.weight[k] + (trunk.wte.weight[idx[row, k]] if path_init == "trunk" else 0)
        for block, own, (keys, values) in zip(trunk.h, path.h, kv):
            scale_1, shift_1, gate_1, scale_2, shift_2, gate_2 = mlp(own.modulation, emb).view(6, C)
            norms = (own.ln_1, own.ln_2) if mode == "full" else (block.ln_1, block.ln_2)
            z = ln(h) * (norms[0].weight + scale_1) + norms[0].bias + shift_1
            w, b = weights(own, "c_q", 24)
            q = (w @ z + b).view(3, d)
            heads = []
            for n in range(3):
                p = (keys[row, n, :k + 1] @ q[n] / math.sqrt(d)).softmax(0)
                heads.append(p @ values[row, n, :k + 1])
            w, b = weights(own, "c_proj")
            h = h + gate_1 * (w @ torch.cat(heads) + b)
            z = ln(h) * (norms[1].weight + scale_2) + norms[1].bias + shift_2
            (w_1, b_1), (w_2, b_2) = weights(own.mlp, "c_fc"), weights(own.mlp, "c_proj")
            h = h + gate_2 * (w_2 @ F.gelu(w_1 @ z + b_1, approximate="tanh") + b_2)
        w_d = mlp(path.w, emb) - mlp(path.w, embed(0.0, i)) + (path_init == "trunk" and t[i] > 0)
        merged = h_trunk[i] + w_d * h
        expected = trunk.wte.weight @ (ln(merged) * trunk.ln_f.weight + trunk.ln_f.bias)
        torch.testing.assert_close(logits[i], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_flat_queries_are_masked_queries_and_a_known_condition_changes_nothing():
    """at = (rows, columns), as in training, and at = None with a mask, as in sampling, are one function."""
    model = pair()
    lengths, idx = torch.tensor([4, 9, 1]), tokens(3, 9)
    at = torch.arange(3), lengths - 1
    c = model.read_context(idx, at)
    x_t, t, group = noisy(3)
    mask = (torch.arange(9) <= at[1][:, None])[:, None, None]
    logits = model(x_t, t, c, group)
    torch.testing.assert_close(model(x_t, t, c._replace(at=None, mask=mask), group), logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(model(x_t, t, c, None, model.path.condition(t, group)), logits)


@pytest.mark.parametrize("mode", ["full", "lora"])
@torch.no_grad()
def test_what_can_change_what(mode):
    """Noise, time and group at a position change it alone; a token changes only what comes after it."""
    model, B, S = pair(mode), 2, 11
    idx, at = tokens(B, S), everywhere(B, S)
    x_t, t, group = noisy(B * S)
    t = 0.3 + 0.7 * t

    def logits(idx=idx, x_t=x_t, t=t, group=group):
        return model(x_t, t, model.read_context(idx, at), group)
    base = logits()
    i, others = 5, torch.arange(B * S) != 5
    for name, value in dict(x_t=x_t[i] + 1, t=t[i] / 2, group=(group[i] + 1) % 4).items():
        new = dict(x_t=x_t, t=t, group=group)[name].clone()
        new[i] = value
        change = (logits(**{name: new}) - base).abs().amax(-1)
        assert change[i] > 1e-3 and change[others].max() < 1e-5
    for j in (0, 6, 10):
        new = idx.clone()
        new[0, j] = (new[0, j] + 1) % TINY.vocab_size
        change = (logits(new) - base).abs().amax(-1).view(B, S)
        assert change[0, :j].numel() == 0 or change[0, :j].max() < 1e-5
        assert change[0, j:].min() > 1e-3 and change[1].max() < 1e-5


def without_merge(model, idx, x_t, t, group):
    """The path's own output, before w_d weighs it."""
    at = everywhere(*idx.shape)
    return model.path(x_t, t, model.trunk.wpe(at[1]), model.path.condition(t, group)[0], model.read_context(idx, at))


@torch.no_grad()
def test_the_path_reads_the_context():
    """Through the trunk's keys and values, not only h_trunk: at the last position every token matters."""
    model, idx = pair(), tokens(1, 8)
    x_t, t, group = noisy(8)
    base = without_merge(model, idx, x_t, t, group)[-1]
    for j in range(8):
        other = idx.clone()
        other[0, j] = (other[0, j] + 1) % TINY.vocab_size
        assert (without_merge(model, other, x_t, t, group)[-1] - base).abs().max() > 1e-4


@pytest.mark.parametrize("mode", ["full", "lora"])
@torch.no_grad()
def test_a_fresh_block_with_open_gates_is_the_trunks_block(mode):
    """Fed the trunk's input of a block, the path's gives the trunk's output."""
    model = pair(mode, random_path=False)
    idx, at = tokens(2, 7), everywhere(2, 7)
    c = model.read_context(idx, at)
    x = model.trunk.wte(idx) + model.trunk.wpe(torch.arange(7))
    for block, own in zip(model.trunk.h, model.path.h):
        y, kv = block(x)
        raw = own.modulation(torch.randn(14, 20))
        assert raw.view(14, 6, 24)[:, [2, 5]].eq(1).all() and raw.sum() == 14 * 2 * 24
        torch.testing.assert_close(own(x[at], own.modulate(torch.randn(14, 20)), kv, c), y[at],
                                   atol=1e-5, rtol=1e-5)
        x = y


@torch.no_grad()
def test_a_lora_path_starts_as_the_full_path():
    full, lora = pair("full"), pair("lora", random_path=False)
    fresh = DiffusionPath(full.trunk, full.path.config, 3)        # undo the randomised copies
    own = r"h\.\d+\.(c_q|ln_1|c_proj|ln_2|mlp)\."
    copies = {k: v for k, v in fresh.state_dict().items() if re.match(own, k)}
    full.path.load_state_dict(copies, strict=False)
    shared = {k: v for k, v in full.path.state_dict().items() if k not in copies}
    assert not lora.path.load_state_dict(shared, strict=False).unexpected_keys
    idx, (x_t, t, group) = tokens(2, 7), noisy(14)
    torch.testing.assert_close(without_merge(lora, idx, x_t, t, group), without_merge(full, idx, x_t, t, group),
                               atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------- ownership, counting
def test_the_copies_of_a_full_path_share_nothing_with_the_trunk():
    model = pair(random_path=False)
    for block, own in zip(model.trunk.h, model.path.h):
        assert torch.equal(own.c_q.weight, block.attn.c_attn.weight[:24])
        assert torch.equal(own.c_q.bias, block.attn.c_attn.bias[:24])
        for ours, theirs in ((own.ln_1, block.ln_1), (own.ln_2, block.ln_2), (own.c_proj, block.attn.c_proj),
                             (own.mlp, block.mlp)):
            for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
                assert torch.equal(p, q) and p.requires_grad and not q.requires_grad
    storages = {p.untyped_storage().data_ptr() for p in model.trunk.parameters()}
    assert not storages & {p.untyped_storage().data_ptr() for p in model.path.parameters()}


@pytest.mark.parametrize("mode, lora", [("full", None), ("lora", None), ("lora", (4, 8.0)), (None, (4, 8.0))])
def test_nothing_is_saved_or_counted_twice(mode, lora):
    model = pair(mode, lora=lora)
    ours = [(n, p.untyped_storage().data_ptr()) for n, p in model.named_parameters(remove_duplicate=False)]
    assert len({s for _, s in ours}) == len(ours) == len(model.state_dict())
    assert {n for n, _ in ours} == set(model.state_dict())
    C, L, r, E, D = 24, 3, 4, 20, 16
    full = L * ((C * C + C) * 2 + (8 * C * C + 5 * C) + 4 * C)    # c_q, c_proj; the MLP; two norms
    path = D * C + (D * D + D + D * C + C) + 2 * (E * E + E) + (E * E + E + E * C) + 4 * E
    path += L * (E * E + E + 6 * C * (E + 1))
    path += {"full": full, "lora": L * r * (2 * 2 * C + 2 * 5 * C)}.get(mode, 0)
    if mode:
        assert sum(p.numel() for p in model.path.parameters()) == path
    trunk = sum(p.numel() for p in GPT(TINY).parameters())
    trunk += L * r * (4 * C + 2 * C + 2 * 5 * C) if lora else 0
    assert sum(p.numel() for p in model.trunk.parameters()) == trunk


def test_the_path_has_its_published_size():
    with torch.device("meta"):
        path = DiffusionPath(GPT(GPT2_SIZES["gpt2"]), PathConfig(path_mode="lora"), 5)
    count = lambda word: sum(p.numel() for n, p in path.named_parameters() if word in n)
    lora, heads, group = count("lora_"), count("modulation"), count("group")
    assert (lora, heads, group) == (4_128_768, 15_000_576, 6 * 256)
    assert count("") - group == 19_983_872 - 768                  # the official w has a bias, which cancels


def test_borrowed_weights_follow_the_trunk():
    """Converted, loaded or copied, the path's LoRA looks at its own trunk, in its dtype."""
    model = pair("lora", lora=(4, 8.0))
    for one in (model, copy.deepcopy(model), model.double().to(torch.bfloat16)):
        for block, own in zip(one.trunk.h, one.path.h):
            assert own.c_q.linear is block.attn.c_attn.linear and own.ln_1 is block.ln_1
            assert own.mlp.c_fc.linear is block.mlp.c_fc.linear
    at = everywhere(1, 4)
    x_t, t, group = noisy(4)
    assert model(x_t, t, model.read_context(tokens(1, 4), at), group).dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def some_targets(idx, seed=1):
    """at and y of about four of five positions of idx."""
    at = (torch.rand(idx.shape, generator=generator(seed)) >= 0.2).nonzero(as_tuple=True)
    return at, idx.roll(-1, 1)[at]


def step_losses(model, parameters, steps, lr=0.01):
    """Train on one batch; the names of the parameters that had a gradient at each step."""
    idx, group, g = tokens(4, 12), torch.tensor([0, 1, 2, 3]), generator(2)
    at, y = some_targets(idx)
    optimizer = torch.optim.Adam(parameters, lr=lr)
    for _ in range(steps):
        if model.path:
            losses = nll(model, idx, at, y, group, *draw(len(y), model.path.config, g))
        else:
            losses = trunk_nll(model, idx, at, y)
        losses.mean().backward()
        yield {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("path_init", ["paper", "trunk"])
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_every_path_parameter_wakes_up_and_the_trunk_never_moves(mode, path_init):
    """All parameters are given to the optimizer: that the pair froze its trunk is what keeps it."""
    model = pair(mode, random_path=False, path_init=path_init)
    before = copy.deepcopy(model.trunk.state_dict())
    start = copy.deepcopy(model.path.state_dict())
    seen = list(step_losses(model, model.parameters(), 8))
    first = {"path.w.2.weight"}
    if path_init == "paper":                                             # then only the head of w_d
        assert seen[0] == first
    else:
        assert first < seen[0]
        assert any("modulation" in n for n in seen[0]) and any("mlp" in n for n in seen[0])
    names = {"path." + n for n, _ in model.path.named_parameters()}
    assert not names - set().union(*seen)
    assert not any(n.startswith("trunk") for step in seen for n in step)
    assert all(torch.equal(before[k], v) for k, v in model.trunk.state_dict().items())
    assert not any(torch.equal(v, start[k]) for k, v in model.path.state_dict().items())


def saved_by(function):
    """Tensors that autograd keeps for backward while function runs."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        result = function()
    return kept, result


def test_a_frozen_trunk_stores_nothing_for_backward():
    model, at = pair(), everywhere(2, 9)
    kept, c = saved_by(lambda: model.read_context(tokens(2, 9), at))
    assert not kept and not c.h.requires_grad and not any(z.requires_grad for kv in c.kv for z in kv)
    model.trunk.requires_grad_(True)
    kept, c = saved_by(lambda: model.read_context(tokens(2, 9), at))
    assert kept and c.h.requires_grad and c.kv[0][0].requires_grad
    with torch.no_grad():
        assert not model.read_context(tokens(2, 9), at).kv[0][0].requires_grad    # nor where the caller wants none


@pytest.mark.parametrize("mode", [None, "full", "lora"])
@pytest.mark.parametrize("lora", [None, (4, 8.0)])
def test_a_trunk_that_was_unfrozen_gets_gradients(mode, lora):
    model = pair(mode, lora=lora)
    if not lora:
        model.trunk.requires_grad_(True)
    (seen,) = step_losses(model, [p for p in model.parameters() if p.requires_grad], 1)
    wanted = {n for n, p in model.named_parameters() if p.requires_grad}
    assert not wanted - seen
    if lora:
        assert all(("lora_" in n) == (n in seen) for n, _ in model.named_parameters() if n.startswith("trunk"))


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_gradients_are_the_slopes_of_the_loss(mode):
    """Against finite differences along a random direction, in float64: a detach in the wrong place shows."""
    model = pair(mode).double()
    idx = tokens(2, 6)
    t, x_0 = draw(12, model.path.config, generator())
    nll_double(model, idx, t, x_0).backward()
    g = generator(3)
    for name, p in model.path.named_parameters():
        direction = torch.randn(p.shape, generator=g, dtype=p.dtype)
        slope = (p.grad * direction).sum()
        with torch.no_grad():
            values = []
            for eps in (1e-5, -1e-5):
                p.add_(eps * direction)
                values.append(nll_double(model, idx, t, x_0))
                p.sub_(eps * direction)
        # token_space and nll end in float32: differences are only good to a few parts in a thousand
        torch.testing.assert_close((values[0] - values[1]) / 2e-5, slope, atol=2e-4, rtol=1e-3,
                                   msg=lambda s: f"{name}: {s}")


def nll_double(model, idx, t, x_0):
    """Eq. 3 in float64 throughout, from the pair's own pieces."""
    at = everywhere(*idx.shape)
    y, path = idx.roll(-1, 1)[at], model.path
    e = path.W(model.trunk.wte.weight[y])
    x_t = t[:, None] * 4 * e / e.norm(dim=1, keepdim=True) + (1 - t[:, None]) * x_0        # sqrt(D) = 4
    return F.cross_entropy(model(x_t, t.double(), model.read_context(idx, at), y % 4), y)


# ----------------------------------------------------------------------- token space, time, scaling of x_t
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_token_space_is_eq_5_in_float32(dtype):
    model = pair().to(dtype)
    ids = torch.tensor([[3, 7], [30, 0]])
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        V = model.embed(ids)
    assert V.shape == (2, 2, 16) and V.dtype == torch.float32
    torch.testing.assert_close(V.norm(dim=-1), torch.full((2, 2), 4.0))           # sqrt(D)
    e = model.trunk.wte.weight[ids].float() @ model.path.W.weight.float().T
    tol = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(V / 4, e / e.norm(dim=-1, keepdim=True), atol=tol, rtol=tol)


def test_the_token_space_trains_W_and_leaves_the_embedding():
    model = pair()
    model.trunk.requires_grad_(True)
    (model.embed(torch.tensor([1, 2])) * torch.randn(2, 16)).sum().backward()
    assert model.path.W.weight.grad.abs().max() > 0 and model.trunk.wte.weight.grad is None


def test_time_features_are_cosines_and_sines():
    t = torch.tensor([0.0, 0.25, 1.0])
    features = time_features(t, 8, 100.0)
    for i, time in enumerate(t.tolist()):
        angles = [100 * time * 10000 ** (-k / 4) for k in range(4)]
        expected = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
        torch.testing.assert_close(features[i], expected, atol=1e-4, rtol=1e-4)


def test_the_input_is_of_unit_variance_or_the_best_linear_estimate():
    """unit: unit variance at every t. wiener: the least-squares coefficient of x_1 on x_t, by Monte Carlo."""
    g, n, sigma = generator(), 400_000, 3.0
    x_1, x_0 = torch.randn(n, generator=g), sigma * torch.randn(n, generator=g)
    for time in (0.0, 0.2, 0.5, 0.8, 0.99, 1.0):
        x_t = time * x_1 + (1 - time) * x_0
        t = torch.full((n,), time)
        assert abs(scale_input(x_t[:, None], t, sigma, "unit").std() - 1) < 0.01
        coefficient = (x_1 * x_t).mean() / (x_t * x_t).mean()
        estimate = scale_input(x_t[:, None], t, sigma, "wiener")[:, 0]
        assert (estimate - coefficient * x_t).std() < 0.01
