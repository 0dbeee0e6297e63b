"""packed.py: the same outputs as the model it was made from, and nothing touched that must not be."""
import copy

import pytest
import torch

import packed
from diffusion import Sampler, generate, teacher_forced
from model import GPT, GPTConfig, PathConfig, build
from packed import PackedLinear, pack

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


def pair(mode="full", lora=None):
    """A pair whose path says something else than its trunk."""
    torch.manual_seed(1)
    model = build(GPT(GPTConfig(64, 97, 2, 2, 32)), PathConfig(mode=mode, x_dim=8, t_dim=16, sigma=4.0) if mode else None, lora)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model.requires_grad_(False)


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    monkeypatch.setattr(packed, "LARGE", 1)


@pytest.mark.parametrize("mode, lora", [("full", None), ("lora", None), ("full", (4, 4.0)), (None, (4, 4.0))])
def test_a_packed_model_writes_the_same_tokens(mode, lora):
    model = pair(mode, lora)
    fast, prompts, steps = pack(copy.deepcopy(model)), [[1, 2, 3], [5], [7, 8]], 4 if mode else 1
    assert any(isinstance(m, PackedLinear) for m in fast.modules()) == (lora is None or mode is not None)
    for sampler in (Sampler(steps=1), Sampler(steps=steps), Sampler(steps=steps, temperature=1.0), Sampler(steps=steps, stop=0.5 if mode else 0.0)):
        a, b = (generate(m, prompts, -1, 12, sampler) for m in (model, fast))
        assert [o.tokens for o in a] == [o.tokens for o in b] and [o.nfe for o in a] == [o.nfe for o in b]
    idx, targets = torch.randint(97, (3, 9)), torch.randint(97, (3, 9))
    a, b = (teacher_forced(m, idx, targets, Sampler(steps=steps), torch.Generator().manual_seed(0)) for m in (model, fast))
    torch.testing.assert_close(a[0], b[0], atol=1e-4, rtol=1e-4)


def test_packed_linear_is_the_linear():
    for n_in, n_out, bias in ((8, 24, True), (700, 900, True), (300, 1000, False)):
        linear = torch.nn.Linear(n_in, n_out, bias).requires_grad_(False)
        fast = PackedLinear(linear.weight, linear.bias)
        for rows in (1, 2, 8, 77):
            x = torch.randn(rows, n_in)
            torch.testing.assert_close(fast(x), linear(x), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(fast(x[:, None]), linear(x[:, None]), atol=1e-5, rtol=1e-5)


def test_small_matrices_other_dtypes_and_loras_stay(monkeypatch):
    lora = pack(pair(None, (4, 4.0)))
    assert isinstance(lora.trunk.h[0].attn.c_attn.linear, torch.nn.Linear)   # a LoRA needs its weight
    assert not any(isinstance(m, PackedLinear) for m in pack(pair().bfloat16()).modules())
    monkeypatch.setattr(packed, "LARGE", 1 << 18)
    model = pack(pair())
    assert not any(isinstance(m, PackedLinear) for m in model.modules()) and "lm_head" not in vars(model.trunk)
