"""llama.py against transformers' Llama and Qwen2, and against what each row, each token and each draft gives alone."""
import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import Naive, error_of, everywhere, generator, says, tokens

import speculate
from decode import DecodingConfig, denoiser_class, generate_batch, generate_one
from diffusion import draw, nll, trunk_nll
from llama import Llama, LlamaConfig, rotary_frequencies
from model import L2D, DiffusionPath, PathConfig
from plumbing.checkpoint import pair_from
from plumbing.hub_weights import from_hub_names, read_config
from plumbing.packed import pack
from plumbing.run_folder import describe

TINY = LlamaConfig(block_size=24, vocab_size=29, n_layer=2, n_head=6, n_kv_head=2, n_embd=24, head_size=4, n_hidden=40,
                   rope_theta=100.0)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32, "rope_theta": 50.0}
KINDS = {                                                         # name: (class of transformers, its options)
    "grouped": ("Llama", dict(num_key_value_heads=2)),
    "ungrouped untied": ("Llama", dict(num_key_value_heads=6, tie_word_embeddings=False)),
    "one key": ("Llama", dict(num_key_value_heads=1)),
    "long heads": ("Llama", dict(num_key_value_heads=2, head_dim=10)),
    "scaled": ("Llama", dict(num_key_value_heads=3, rope_parameters=LLAMA3, max_position_embeddings=128)),
    "qwen": ("Qwen2", dict(num_key_value_heads=2)),
    "qwen untied": ("Qwen2", dict(num_key_value_heads=6, tie_word_embeddings=False)),
}


def randomise(module, seed=0, std=0.3):
    """Every parameter random: zero biases, heads and gates would hide mistakes."""
    g = generator(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(std * torch.randn(p.shape, generator=g) + ("norm" in name or "ln_" in name) * name.endswith("weight"))
    return module


def transformers_model(kind, **options):
    """A tiny model of transformers with random weights."""
    transformers = pytest.importorskip("transformers")
    family, own = KINDS[kind]
    config = dict(vocab_size=29, hidden_size=36, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6,
                  max_position_embeddings=64, tie_word_embeddings=True, rms_norm_eps=1e-3,
                  rope_parameters={"rope_type": "default", "rope_theta": 50.0}, attn_implementation="eager")
    config = getattr(transformers, f"{family}Config")(**config | own | options)
    return randomise(getattr(transformers, f"{family}ForCausalLM")(config).eval())


def ours(hf):
    """The same weights as a Llama."""
    config = read_config(hf.config.to_dict(), "test")
    trunk = Llama(config)
    trunk.load_state_dict(from_hub_names(hf.state_dict(), config, "test"))
    return trunk


def wild(mode="full", config=TINY, seed=1, **path):
    """A tiny pair with large random weights: what the trunk would write and what the path makes of it differ."""
    torch.manual_seed(0)
    trunk = Llama(config)
    path = PathConfig(path_mode=mode, **dict(x_dim=8, t_dim=16, sigma=2.0, time_scale=10.0, lora_rank=4) | path)
    pair = L2D(trunk, DiffusionPath(trunk, path, 3))
    std = {"trunk.wte": 0.7, "trunk.h": 0.3, "trunk.ln_f": 0.2, "path.w": 0.6, "path.x_in": 0.6, "path.group": 1.0}
    g = generator(seed)
    with torch.no_grad():
        for name, p in pair.named_parameters():
            p.copy_(std.get(".".join(name.split(".")[:2]), 0.3) * torch.randn(p.shape, generator=g)
                    + ("ln_" in name and name.endswith("weight")))
    return pair.requires_grad_(False)


# -------------------------------------------------------------------------------------------- the trunk
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_keys_and_values_are_those_of_transformers(kind):
    hf = transformers_model(kind)
    trunk = ours(hf)
    length = hf.config.max_position_embeddings
    idx = tokens(2, length, vocab=29)
    expected = hf(idx, use_cache=True)
    h, kv = trunk(idx)
    assert expected.logits.std() > 0.5
    torch.testing.assert_close(trunk.head(h), expected.logits, atol=1e-5, rtol=1e-5)
    for layer, (k, v) in enumerate(kv):
        theirs = expected.past_key_values.layers[layer]
        assert k.size(1) == hf.config.num_key_value_heads         # kept once per group
        torch.testing.assert_close(k, theirs.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(v, theirs.values, atol=1e-5, rtol=1e-5)
    pos = torch.arange(7, 15).expand(2, 8)                        # positions that do not begin at 0
    expected = hf(idx[:, :8], position_ids=pos).logits
    torch.testing.assert_close(trunk.head(trunk(idx[:, :8], pos)[0]), expected, atol=1e-5, rtol=1e-5)


def test_scaled_frequencies_lie_between_the_two():
    scaled = rotary_frequencies(LlamaConfig(head_size=64, rope_theta=5e5, rope_scaling=(32.0, 1.0, 4.0, 8192)))
    plain = rotary_frequencies(LlamaConfig(head_size=64, rope_theta=5e5))
    assert torch.equal(scaled[:8], plain[:8]) and torch.equal(scaled[-8:], plain[-8:] / 32)
    assert (scaled <= plain).all() and (scaled >= plain / 32).all()


def test_sizes_that_do_not_fit_are_refused():
    says(error_of(LlamaConfig, n_head=9, n_kv_head=2), "n_kv_head=2")
    says(error_of(LlamaConfig, head_size=7), "head_size=7")
    says(error_of(LlamaConfig, n_layer=0), "n_layer=0")


@pytest.mark.parametrize("n_kv_head", [1, 2, 6])
@torch.no_grad()
def test_cached_decoding_of_uneven_prompts_is_the_full_forward(n_kv_head):
    """Right-padded rows in one cache, one token at a time and in chunks, against each row alone."""
    trunk = wild(config=LlamaConfig(**vars(TINY) | {"n_kv_head": n_kv_head})).trunk
    idx = tokens(3, 16, vocab=29)
    expected = trunk(idx)[0]
    lengths = torch.tensor([5, 2, 9])
    _, kv = trunk(idx[:, :9].masked_fill(torch.arange(9) >= lengths[:, None], 0))
    cache = [(F.pad(k, (0, 0, 0, 7)), F.pad(v, (0, 0, 0, 7))) for k, v in kv]
    for n in (1, 1, 3):
        pos = lengths[:, None] + torch.arange(n)
        S = int(pos.max()) + 1
        mask = (torch.arange(S) <= pos[:, :, None])[:, None]
        h, _ = trunk(idx.gather(1, pos), pos, [(k[:, :, :S], v[:, :, :S]) for k, v in cache], mask)
        torch.testing.assert_close(h, expected.gather(1, pos[:, :, None].expand(-1, -1, 24)), atol=1e-4, rtol=1e-4)
        lengths = lengths + n
    kv = trunk(idx[:, :15])[1]                                    # one query without a mask sees the whole cache
    cache = [(F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))) for k, v in kv]
    h, _ = trunk(idx[:, 15:], torch.full((3, 1), 15), cache)
    torch.testing.assert_close(h, expected[:, 15:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_lora_on_the_trunk_merges_into_the_weights():
    trunk = wild(config=LlamaConfig(**vars(TINY) | {"qkv_bias": True})).trunk
    idx = tokens(2, 9, vocab=29)
    plain = copy.deepcopy(trunk)
    trunk.add_lora(4, 8.0)
    assert torch.equal(trunk(idx)[0], plain(idx)[0])              # a fresh LoRA adds nothing
    assert all(p.requires_grad == ("lora_" in n) for n, p in trunk.named_parameters() if n.startswith("h."))
    assert sum("lora_A" in n for n, _ in trunk.named_parameters()) == 2 * 7
    g = generator()
    for name, p in trunk.named_parameters():
        if "lora_B" in name:
            p.copy_(torch.randn(p.shape, generator=g))
    learned = trunk(idx)[0]
    assert (learned - plain(idx)[0]).abs().max() > 0.1
    trunk.merge_lora()
    torch.testing.assert_close(trunk(idx)[0], learned, atol=1e-4, rtol=1e-4)
    assert trunk.state_dict().keys() == plain.state_dict().keys()


# ----------------------------------------------------------------------------------------------- the path
@pytest.mark.parametrize("mode, tied", [*itertools.product(["full", "lora"], [True, False])])
@torch.no_grad()
def test_at_t_0_the_pair_is_its_trunk_bit_for_bit(mode, tied):
    for dtype in (torch.float32, torch.bfloat16):
        model = wild(mode, LlamaConfig(**vars(TINY) | {"tied": tied})).to(dtype)
        for B, S in ((1, 1), (1, 7), (13, 16)):
            idx, at = tokens(B, S, vocab=29), everywhere(B, S)
            c = model.read_context(idx, at)
            g = generator()
            x_t, t = torch.randn(B * S, 8, generator=g), torch.rand(B * S, generator=g)
            group = torch.randint(4, (B * S,), generator=g)
            assert torch.equal(model(4 * x_t, 0 * t, c, group), model.trunk.head(c.h))
            assert not torch.equal(model(x_t, 0.5 + t / 2, c, group), model.trunk.head(c.h))


@pytest.mark.parametrize("mode", ["full", "lora"])
@torch.no_grad()
def test_a_fresh_path_predicts_what_the_trunk_does_and_the_papers_adds_nothing(mode):
    """What the initialisation is for, and the check that queries are rotated and normed as the trunk's are."""
    for config in (TINY, LlamaConfig(**vars(TINY) | {"qkv_bias": True, "tied": False, "n_kv_head": 6})):
        torch.manual_seed(0)
        trunk = randomise(Llama(config))
        idx, at = tokens(2, 11, vocab=29), everywhere(2, 11)
        x_t, t, group = torch.randn(22, 8), torch.rand(22), torch.zeros(22, dtype=torch.long)
        small = dict(path_mode=mode, x_dim=8, t_dim=16, lora_rank=4)
        model = L2D(trunk, DiffusionPath(trunk, PathConfig(**small), 3))
        c = model.read_context(idx, at)
        modulations, w_d = model.path.condition(t, group)
        h_path = model.path(x_t, t, trunk.embed(c.token, c.pos), modulations, c)
        torch.testing.assert_close(h_path, c.h, atol=1e-5, rtol=1e-5)
        assert (w_d > 0).all()
        model = L2D(trunk, DiffusionPath(trunk, PathConfig(path_init="paper", **small), 3))
        assert torch.equal(model(x_t, t, c, group), trunk.head(c.h))


@pytest.mark.parametrize("mode, path_init", [*itertools.product(["full", "lora"], ["trunk", "paper"])])
@torch.no_grad()
def test_the_path_is_what_it_is_by_hand(mode, path_init):
    """One position at a time, with no code of llama.py but the trunk's pass. Keys come rotated."""
    model = wild(mode, LlamaConfig(**vars(TINY) | {"qkv_bias": True}), path_init=path_init)
    trunk, path, idx, at = model.trunk, model.path, tokens(2, 9, vocab=29), everywhere(2, 9)
    c = model.read_context(idx, at)
    g = generator(5)
    x_t, t, group = torch.randn(18, 8, generator=g), torch.rand(18, generator=g), torch.arange(18) % 4
    logits = model(x_t, t, c, group)

    def weights(layer):
        if mode == "full":
            return layer.weight, 0 if layer.bias is None else layer.bias
        bias = layer.linear.bias
        return layer.linear.weight + 32 / 4 * layer.lora_B @ layer.lora_A, 0 if bias is None else bias

    def rms(x):
        return x / (x.pow(2).mean() + 1e-5).sqrt()

    def linear(layer, x):
        w, b = weights(layer)
        return w @ x + b
    modulations, w_d = path.condition(t, group)
    for i in range(18):
        row, k = at[0][i], at[1][i].item()
        x = x_t[i] * t[i] / (t[i] ** 2 + (1 - t[i]) ** 2 * 4)
        h = path.x_in(x) + (trunk.wte.weight[idx[row, k]] if path_init == "trunk" else 0)
        for own, modulation, (keys, values) in zip(path.h, modulations, c.kv):
            scale_1, shift_1, gate_1, scale_2, shift_2, gate_2 = modulation[i].view(6, 24)
            q = linear(own.c_q, rms(h) * scale_1 + shift_1).view(6, 4)
            heads = []
            for n in range(6):
                z = torch.complex(q[n, :2], q[n, 2:])             # coordinates i and i + 2 are one point
                z = z * torch.polar(torch.ones(2), k * torch.tensor([1.0, 100.0 ** -0.5]))
                p = (keys[row, n // 3, :k + 1] @ torch.cat([z.real, z.imag]) / math.sqrt(4)).softmax(0)
                heads.append(p @ values[row, n // 3, :k + 1])
            h = h + gate_1 * linear(own.c_proj, torch.cat(heads))
            z = rms(h) * scale_2 + shift_2
            h = h + gate_2 * linear(own.mlp.c_proj, F.silu(linear(own.mlp.c_gate, z)) * linear(own.mlp.c_fc, z))
        expected = trunk.wte.weight @ (rms(c.h[i] + w_d[i] * h) * trunk.ln_f.weight)
        torch.testing.assert_close(logits[i], expected, atol=1e-4, rtol=1e-4)


# ----------------------------------------------------------------------------------------------- decoding
SAMPLERS = {"trunk": dict(steps=1), "euler": dict(steps=8), "midpoint": dict(steps=9, solver="midpoint"),
            "stop": dict(steps=8, stop=0.3), "adaptive": dict(steps=8, solver="adaptive", tol=0.3),
            "sampled": dict(steps=6, guess="sample", temperature=0.9, top_k=7), "guidance": dict(steps=6, guidance=2.5),
            "mean": dict(steps=6, solver="fixed_point", guess="mean")}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_every_way_of_decoding_writes_one_text(name, mode):
    """Algorithm 1 without a cache, the plain way, a batch of uneven prompts, and both kinds of speculation."""
    model = wild(mode, path_init="paper")                         # so that the trunk's drafts are sometimes right
    prompts = [tokens(n, seed=n, vocab=29).tolist() for n in (3, 1, 7, 5)]
    config = DecodingConfig(**dict(max_new_tokens=14, draft=0, ahead=0) | SAMPLERS[name])
    group = [1, 0, 2, 1]
    denoise = denoiser_class(config)
    plain = [generate_one(model, p, 4, config, group[i], i, denoise=denoise) for i, p in enumerate(prompts)]
    new, ended, _ = Naive(model, config, 1, 4).generate(prompts[0], 0)
    assert plain[0].tokens == new and plain[0].ended == ended
    batch = generate_batch(model, prompts, 4, config, group)
    assert [o.tokens for o in batch] == [o.tokens for o in plain]
    assert [o.nfe for o in batch] == [o.nfe for o in plain]
    if config.steps == 1:
        return
    rejected = kept = 0
    for draft, ahead in ((4, 0), (0, 1000), (5, 3)):
        fast = speculate.generate(model, prompts, 4, DecodingConfig(**vars(config) | dict(draft=draft, ahead=ahead)), group)
        assert [o.tokens for o in fast] == [o.tokens for o in plain]
        assert [o.nfe for o in fast] == [o.nfe for o in plain]
        rejected += sum(len(o.rejected) for o in fast)
        kept += sum(o.predicted - len(o.rejected) for o in fast)
    assert rejected > 0 and kept > 0                              # drafts are accepted and rejected


@torch.no_grad()
def test_packing_changes_no_text(monkeypatch):
    monkeypatch.setattr("plumbing.packed.LARGE", 1)
    for tied in (True, False):
        model = wild(config=LlamaConfig(**vars(TINY) | {"tied": tied}))
        idx = tokens(2, 9, vocab=29)
        before = model.trunk.head(model.trunk(idx)[0])
        packed = pack(model)
        torch.testing.assert_close(packed.trunk.head(packed.trunk(idx)[0]), before, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------ training
@pytest.mark.parametrize("trunk_mode, mode", [("frozen", "full"), ("frozen", "lora"), ("lora", None), ("full", None),
                                              ("lora", "lora"), ("full", "full")])
def test_steps_lower_the_loss_and_train_what_they_should(trunk_mode, mode):
    torch.manual_seed(0)
    trunk = Llama(TINY)
    small = dict(x_dim=8, t_dim=16, sigma=2.0, lora_rank=4)
    path = DiffusionPath(trunk, PathConfig(path_mode=mode, **small), 3) if mode else None
    model = L2D(trunk, path)
    if trunk_mode == "lora":
        trunk.add_lora(4, 8.0)
    if trunk_mode == "full":
        trunk.requires_grad_(True)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    idx, at = tokens(4, 9, vocab=29), everywhere(4, 9)
    y = idx.roll(-1, 1)[at]
    t, x_0 = draw(36, PathConfig(**small), generator())
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(params.values(), lr=1e-2)
    losses = []
    for _ in range(8):
        if mode:
            loss = nll(model, idx, at, y, torch.zeros(4, dtype=torch.long), t, x_0).mean()
        else:
            loss = trunk_nll(model, idx, at, y).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    changed = {name for name, p in model.state_dict().items() if not torch.equal(p, before[name])}
    assert changed == params.keys()
    assert all(("lora_" in name) or trunk_mode == "full" for name in changed if name.startswith("trunk."))


# -------------------------------------------------------------------------------------------- checkpoints
@pytest.mark.parametrize("mode", ["full", "lora"])
@torch.no_grad()
def test_a_checkpoint_builds_the_pair_again(tmp_path, mode):
    config = LlamaConfig(**vars(TINY) | {"rope_scaling": (8.0, 1.0, 4.0, 16.0), "tied": False})
    model = wild(mode, config)
    torch.save(describe(model, None, tmp_path), tmp_path / "best.pt")
    stored = torch.load(tmp_path / "best.pt", weights_only=True)
    assert stored["trunk_config"]["family"] == "llama"
    weights = torch.load(tmp_path / "trunk.pt", weights_only=True)
    assert not any("rotary" in name for name in weights)
    stored["model"] |= {f"trunk.{name}": p for name, p in weights.items()}
    again = pair_from(stored, "best.pt")
    assert again.trunk.config == config and type(again.trunk) is Llama
    idx, at = tokens(2, 9, vocab=29), everywhere(2, 9)
    inputs = torch.randn(18, 8), torch.rand(18), model.read_context(idx, at), torch.zeros(18, dtype=torch.long)
    assert torch.equal(again(*inputs), model(*inputs))
    says(error_of(pair_from, stored | {"trunk_config": stored["trunk_config"] | {"family": "mamba"}}, "x"), "mamba")
