"""plumbing/packed.py: the same outputs in every layout, and nothing touched that must not be."""
import copy
import itertools

import pytest
import torch

from decode import DecodingConfig
from model import GPT, L2D, DiffusionPath, GPTConfig, PathConfig
from plumbing import packed
from plumbing.packed import LAYOUTS, PackedLinear, fastest, pack
from speculate import generate

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN")


def pair(mode="full", lora=None):
    """A pair whose path says something else than its trunk."""
    torch.manual_seed(1)
    trunk, config = GPT(GPTConfig(64, 97, 2, 2, 32)), PathConfig(path_mode=mode, x_dim=8, t_dim=16, sigma=4.0)
    model = L2D(trunk, DiffusionPath(trunk, config, 1) if mode != "none" else None)
    if lora:
        trunk.add_lora(*lora)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model.requires_grad_(False)


def n_packed(model):
    return sum(isinstance(m, PackedLinear) for m in [*model.modules(), *vars(model.trunk).values()])


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    monkeypatch.setattr(packed, "LARGE", 1)


@pytest.mark.parametrize("layouts", list(itertools.permutations(LAYOUTS, 2))[::2])
@pytest.mark.parametrize("mode, lora", [("full", None), ("lora", None), ("full", (4, 4)), ("none", (4, 4))])
def test_a_packed_model_writes_the_same_tokens(mode, lora, layouts, monkeypatch):
    monkeypatch.setattr(packed, "fastest", lambda matrices, n_rows: layouts[n_rows > 1])
    model, prompts, steps = pair(mode, lora), [[1, 2, 3], [5], [7, 8]], 4 if mode != "none" else 1
    fast = pack(copy.deepcopy(model))
    assert n_packed(fast) >= 1 and n_packed(model) == 0
    for settings, n in ((dict(), 3), (dict(temperature=1.0), 1), (dict(draft=0), 1)):
        some = prompts[:n]
        config = DecodingConfig(steps=steps, max_new_tokens=9, **settings)
        a, b = (generate(m, some, -1, config) for m in (model, fast))
        assert [(o.tokens, o.nfe) for o in a] == [(o.tokens, o.nfe) for o in b]
    idx, at = torch.randint(97, (3, 9)), (torch.tensor([0, 1, 2, 2]), torch.tensor([8, 3, 0, 5]))
    x_t, t, group = torch.randn(4, 8), torch.rand(4), torch.zeros(4, dtype=torch.long)
    a, b = (m.trunk.head(m.read_context(idx, at).h) if m.path is None else m(x_t, t, m.read_context(idx, at), group)
            for m in (model, fast))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_packed_linear_is_the_linear_in_every_layout():
    for n_in, n_out, bias in ((8, 24, True), (700, 900, True), (300, 1000, False)):
        linear = torch.nn.Linear(n_in, n_out, bias).requires_grad_(False)
        for one_row, several in itertools.product(LAYOUTS, repeat=2):
            fast = PackedLinear(linear.weight, linear.bias, one_row, several)
            for rows in (1, 2, 8, 77):
                x = torch.randn(rows, n_in)
                torch.testing.assert_close(fast(x), linear(x), atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(fast(x[:, None]), linear(x[:, None]), atol=1e-5, rtol=1e-5)


def test_the_layout_is_chosen_by_time_for_one_row_and_for_several(monkeypatch):
    """By a clock on which columns is the fastest at one row, and packed at eight."""
    clock, cost = [0.0], {(1, "columns"): 1.0, (8, "packed"): 1.0}

    def slow_product(x, W, bias):
        layout = "packed" if W.is_mkldnn else "rows" if W.is_contiguous() else "columns"
        clock[0] += cost.get((len(x), layout), 2.0)
    monkeypatch.setattr(packed, "product", slow_product)
    monkeypatch.setattr(packed.time, "perf_counter", lambda: clock[0])
    matrices = [torch.randn(6, 5), torch.randn(9, 6)]
    assert fastest(matrices, 1) == "columns" and fastest(matrices, 8) == "packed"
    model = pack(pair())
    one = model.trunk.h[0].attn.c_attn
    assert not one.weight.is_mkldnn and not one.weight.is_contiguous() and one.several.is_mkldnn
    assert model.trunk.lm_head.several.is_mkldnn


def test_a_layout_that_wins_both_is_kept_once():
    W = torch.randn(6, 5)
    one, two = PackedLinear(W, None, "rows", "rows"), PackedLinear(W, None, "rows", "packed")
    assert one.several is one.weight and one.weight.data_ptr() == W.data_ptr()
    assert two.several is not two.weight


def test_small_matrices_other_dtypes_and_loras_stay(monkeypatch):
    lora = pack(pair("none", (4, 4.0)))
    assert isinstance(lora.trunk.h[0].attn.c_attn.linear, torch.nn.Linear)   # a LoRA needs its weight
    assert n_packed(pack(pair().bfloat16())) == 0
    monkeypatch.setattr(packed, "LARGE", 1 << 18)
    assert n_packed(pack(pair())) == 0
