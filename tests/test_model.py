"""model.py against transformers' GPT-2, closed forms and invariances; and damaged files."""
import copy
import hashlib
import json
import math
import os
import pickle
import re
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import model as m
from configurator import UserError
from diffusion import draw, nll
from model import (GPT, GPT2_SIZES, GPTConfig, DiffusionPath, PathConfig, build, describe, load_checkpoint,
                   model_from_checkpoint, new_cache, first_keys, scale_input, time_features)

TINY = GPTConfig(block_size=16, vocab_size=31, n_layer=3, n_head=3, n_embd=24)
SMALL_PATH = dict(x_dim=16, t_dim=20, sigma=4.0, n_labels=3, rank=4, alpha=8.0)


def randomise(module, seed=0, std=0.2):
    """Every parameter random: zero biases, heads and gates would hide mistakes."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(std * torch.randn(p.shape, generator=g) + ("ln_" in name and name.endswith("weight")))
    return module


def pair(mode="full", lora=None, random_path=True, **path):
    """A tiny random trunk and, unless mode is None, a path with random weights."""
    torch.manual_seed(0)
    trunk = randomise(GPT(TINY))
    model = build(trunk, PathConfig(mode=mode, **(SMALL_PATH | path)) if mode else None, lora)
    if lora:
        randomise(torch.nn.ParameterDict({n.replace(".", "_"): p for n, p in trunk.named_parameters() if "lora_" in n}), 1)
    else:
        trunk.requires_grad_(False)
    if mode and random_path:
        randomise(model.path, seed=2)
    return model


def tokens(*shape, seed=0, vocab=TINY.vocab_size):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def everywhere(B, T):
    """at = (rows, cols) of every position."""
    return torch.arange(B).repeat_interleave(T), torch.arange(T).repeat(B)


def noisy(n, seed=0, D=SMALL_PATH["x_dim"]):
    """x_t and t for n positions, and labels."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=g), torch.rand(n, generator=g), torch.randint(4, (n,), generator=g)


def error_of(function, *args):
    """The message of the UserError that function(*args) raises: one line that begins with error:."""
    with pytest.raises(UserError) as e:
        function(*args)
    message = str(e.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


# ------------------------------------------------------------------------------------- fidelity to GPT-2
SHAPES = {"even": dict(n_layer=2, n_head=4, n_embd=32, vocab_size=64, n_positions=24),
          "odd": dict(n_layer=3, n_head=5, n_embd=35, vocab_size=101, n_positions=17),
          "one head": dict(n_layer=1, n_head=1, n_embd=7, vocab_size=13, n_positions=9)}


def hugging_face(kind, shape):
    """A transformers GPT-2 with large random weights, biases and norms included."""
    transformers = pytest.importorskip("transformers")
    hf = getattr(transformers, kind)(transformers.GPT2Config(**shape)).eval()
    randomise(hf, std=0.3)
    return hf


@torch.no_grad()
def hf_logits(hf, idx):
    out = hf(idx)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state @ hf.wte.weight.T


@torch.no_grad()
def our_logits(trunk, idx):
    return trunk.head(trunk(idx)[0])


def write_safetensors(path, tensors, header=None):
    """The format by hand, so that header can be edited: header(entries) may change the dict before it is written."""
    codes = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8", torch.bool: "BOOL",
             torch.int64: "I64"}
    entries, blob = {"__metadata__": {"format": "pt"}}, b""
    for name, z in tensors.items():
        raw = bytes(z.contiguous().flatten().view(torch.uint8).tolist())
        entries[name] = {"dtype": codes[z.dtype], "shape": list(z.shape), "data_offsets": [len(blob), len(blob) + len(raw)]}
        blob += raw
    if header:
        header(entries)
    text = json.dumps(entries).encode()
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + blob)


@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "GPT2Model"])          # with and without the prefix transformer.
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_transformers(tmp_path, kind, shape, monkeypatch):
    pytest.importorskip("safetensors")
    shape = SHAPES[shape]
    hf = hugging_face(kind, shape)
    hf.save_pretrained(tmp_path)
    trunk = GPT.from_pretrained(str(tmp_path))
    assert trunk.config == GPTConfig(shape["n_positions"], shape["vocab_size"], shape["n_layer"], shape["n_head"], shape["n_embd"])
    idx = tokens(3, shape["n_positions"], vocab=shape["vocab_size"])
    expected = hf_logits(hf, idx)
    assert expected.std() > 0.5
    torch.testing.assert_close(our_logits(trunk, idx), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(our_logits(trunk, idx[:, :1]), expected[:, :1], atol=1e-5, rtol=1e-5)

    gelu = F.gelu                                                            # these weights tell the two GELUs apart
    monkeypatch.setattr(m.F, "gelu", lambda x, approximate: gelu(x))
    assert (our_logits(trunk, idx) - expected).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files(tmp_path, dtype):
    save_file = pytest.importorskip("safetensors.torch").save_file
    hf = hugging_face("GPT2LMHeadModel", SHAPES["even"]).to(dtype)
    save_file({k: v.clone() for k, v in hf.state_dict().items()}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["even"]))
    trunk, idx = GPT.from_pretrained(str(tmp_path)), tokens(2, 20)
    assert {p.dtype for p in trunk.parameters()} == {torch.float32}
    torch.testing.assert_close(our_logits(trunk, idx), hf_logits(hf.float(), idx), atol=1e-5, rtol=1e-5)


def test_legacy_checkpoint_as_a_single_file(tmp_path):
    """The layout of the hub's gpt2: no prefix, causal masks stored as attn.bias; lm_head.weight where tied; no config."""
    hf = hugging_face("GPT2LMHeadModel", dict(n_layer=2, n_head=2, n_embd=128, vocab_size=33, n_positions=10))
    state = {k.removeprefix("transformer."): v for k, v in hf.state_dict().items()}
    for i in range(2):
        state[f"h.{i}.attn.bias"] = torch.ones(1, 1, 10, 10).tril()
        state[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    assert "lm_head.weight" in state
    idx, file = tokens(2, 10), tmp_path / "weights.safetensors"
    for prefix, mask in (("", torch.float32), ("transformer.", torch.uint8), ("", torch.bool)):
        write_safetensors(file, {(k if k == "lm_head.weight" else prefix + k): v.to(mask) if k.endswith(".attn.bias") else v
                                 for k, v in state.items()})
        torch.testing.assert_close(our_logits(GPT.from_pretrained(str(file)), idx), hf_logits(hf, idx), atol=1e-5, rtol=1e-5)
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    write_safetensors(file, state)
    assert "tied" in error_of(GPT.from_pretrained, str(file))


def test_sizes_have_the_published_parameter_counts():
    expected = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in GPT(config).parameters()) for name, config in GPT2_SIZES.items()}
    assert counts == expected


def test_real_gpt2_greedy():
    path = Path(os.environ.get("L2D_GPT2", Path(__file__).parent.parent / "data/weights/gpt2/model.safetensors"))
    if not path.exists():
        pytest.skip(f"the real weights are not at {path} (or where L2D_GPT2 says)")
    trunk, ids = GPT.from_pretrained(str(path)), [464, 3290]
    while len(ids) < 20:
        ids.append(our_logits(trunk, torch.tensor([ids]))[0, -1].argmax().item())
    assert ids == [464, 3290, 373, 1043, 287, 257, 2214, 1474, 262, 16246, 286, 2688, 290, 2688, 27262, 13, 198, 198, 464, 3290]


# ------------------------------------------------------------------------------------------ damaged files
@pytest.fixture
def good(tmp_path):
    """A directory with a loadable tiny GPT-2 (our own names and layout) and its tensors in checkpoint layout."""
    state = {k: v.t() if re.search(r"(c_attn|c_proj|c_fc)\.weight", k) else v for k, v in randomise(GPT(TINY)).state_dict().items()}
    write_safetensors(tmp_path / "model.safetensors", state)
    (tmp_path / "config.json").write_text('{"n_head": 3}')
    return tmp_path, state


def test_undamaged_file_loads(good):
    directory, state = good
    trunk = GPT.from_pretrained(str(directory))
    assert trunk.config == TINY and torch.equal(trunk.h[1].attn.c_attn.weight, state["h.1.attn.c_attn.weight"].t())


BYTES = {"empty": lambda data: b"", "three bytes": lambda data: data[:3], "header cut": lambda data: data[:100],
         "tensors cut": lambda data: data[:-1], "half": lambda data: data[:len(data) // 2],
         "length huge": lambda data: struct.pack("<Q", 2 ** 63) + data[8:],
         "length beyond the file": lambda data: struct.pack("<Q", len(data)) + data[8:],
         "not JSON": lambda data: data[:8] + b"{x" + data[10:],
         "not UTF-8": lambda data: data[:8] + b"\xff\xfe" + data[10:],
         "a list": lambda data: struct.pack("<Q", 2) + b"[]" + data,
         "a page of HTML": lambda data: b"<html>Not Found</html>" * 100}


@pytest.mark.parametrize("damage", BYTES)
def test_damaged_bytes(good, damage):
    file = good[0] / "model.safetensors"
    file.write_bytes(BYTES[damage](file.read_bytes()))
    assert str(file) in error_of(GPT.from_pretrained, str(file))


NAME = "h.1.mlp.c_fc.bias"                                                   # 96 numbers, 384 bytes
ENTRIES = {"end beyond the file": {"data_offsets": [10 ** 9, 10 ** 9 + 384]}, "start negative": {"data_offsets": [-384, 0]},
           "start after end": {"data_offsets": [384, 0]}, "wrong size": {"data_offsets": [0, 380]},
           "dtype of another size": {"dtype": "F16"}, "dtype unknown": {"dtype": "F8_E4M3"}, "dtype a list": {"dtype": []},
           "shape wrong": {"shape": [95]}, "shape a string": {"shape": "96"}, "shape missing": {"shape": None},
           "shape negative": {"shape": [-2, -48]}, "shape of floats": {"shape": [96.0]},
           "offsets of floats": {"data_offsets": [0.0, 384.0]}, "three offsets": {"data_offsets": [0, 1, 2]}}


@pytest.mark.parametrize("damage", ENTRIES)
def test_damaged_entry(good, damage):
    directory, state = good
    write_safetensors(directory / "model.safetensors", state, lambda entries: entries[NAME].update(ENTRIES[damage]))
    message = error_of(GPT.from_pretrained, str(directory))
    assert NAME in message and "model.safetensors" in message


def test_every_difference_is_reported_at_once(good):
    directory, state = good
    del state["h.0.ln_1.weight"], state["ln_f.bias"]
    state |= {"h.0.attn.rotary": torch.ones(2), "h.2.mlp.c_fc.weight": torch.ones(24, 95), "h.1.ln_2.bias": torch.ones(23)}
    write_safetensors(directory / "model.safetensors", state)
    message = error_of(GPT.from_pretrained, str(directory))
    for part in ("missing h.0.ln_1.weight", "missing ln_f.bias", "unexpected h.0.attn.rotary",
                 "h.2.mlp.c_fc.weight is (95, 24), not (96, 24)", "h.1.ln_2.bias is (23,), not (24,)"):
        assert part in message
    assert message.count("missing") == 2 and message.count("unexpected") == 1 and message.count(" is (") == 2


def test_only_the_exact_suffixes_are_dropped(good):
    """.attn.bias and .attn.masked_bias are masks; c_attn.bias is a weight."""
    directory, state = good
    del state["h.1.attn.c_attn.bias"]
    state["h.1.attn.bias"] = torch.ones(1)
    write_safetensors(directory / "model.safetensors", state)
    message = error_of(GPT.from_pretrained, str(directory))
    assert message.count("missing") == 1 and "missing h.1.attn.c_attn.bias" in message


ODD = {"no wte": lambda s: s.pop("wte.weight"), "no wpe": lambda s: s.pop("wpe.weight"), "wte a vector": lambda s: s.update({"wte.weight": torch.ones(24)}),
       "weight of three dimensions": lambda s: s.update({"h.0.attn.c_attn.weight": torch.ones(1, 24, 72)}),
       "a layer left out": lambda s: [s.pop(k) for k in list(s) if k.startswith("h.1.")], "nothing": lambda s: s.clear()}


@pytest.mark.parametrize("change", ODD)
def test_odd_tensors(good, change):
    directory, state = good
    ODD[change](state)
    write_safetensors(directory / "model.safetensors", state)
    assert "model.safetensors" in error_of(GPT.from_pretrained, str(directory))


@pytest.mark.parametrize("text", ['{"n_head": 3, "activation_function": "gelu"}', '{"n_head": 5}', '{"n_head": 0}', '{"n_layer": 3}', '{"n_head":', '[]'])
def test_config_json_that_does_not_fit(good, text):
    (good[0] / "config.json").write_text(text)
    message = error_of(GPT.from_pretrained, str(good[0]))
    if "gelu" in text:
        assert "activation_function=gelu" in message


def test_names_that_are_none_of_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = error_of(GPT.from_pretrained, "gpt3")
    assert "gpt3" in message and all(size in message for size in GPT2_SIZES)
    error_of(GPT.from_pretrained, "no/such/file.safetensors")
    assert "model.safetensors" in error_of(GPT.from_pretrained, str(tmp_path))      # a directory without weights


# ---------------------------------------------------------------------------------------- download by name
class Hub(ThreadingHTTPServer):
    """A loopback hub: redirects like the real one, names the hash in X-Linked-Etag of the first answer."""
    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.content, self.etag, self.requests = b"", None, []


class HubHandler(BaseHTTPRequestHandler):
    def answer(self, body):
        hub = self.server
        hub.requests.append((self.command, self.path))
        if "resolve" in self.path:
            self.send_response(302)
            self.send_header("Location", f"http://127.0.0.1:{hub.server_address[1]}/blob")
            if hub.etag:
                self.send_header("X-Linked-Etag", f'"{hub.etag}"')
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(200)
        self.send_header("Content-Length", str(len(hub.content)))
        self.end_headers()
        if body:
            self.wfile.write(hub.content)

    def do_GET(self):
        self.answer(True)

    def do_HEAD(self):
        self.answer(False)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = Hub()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}/")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def file_of_the_hub(tmp_path):
    """The bytes of a loadable GPT-2, with heads of 64 as all of them have."""
    trunk = randomise(GPT(GPTConfig(8, 11, 1, 1, 64)))
    write_safetensors(tmp_path / "x", {k: v.t() if re.search(r"(c_attn|c_proj|c_fc)\.weight", k) else v for k, v in trunk.state_dict().items()})
    return (tmp_path / "x").read_bytes(), trunk


@pytest.mark.parametrize("name", ["gpt2-medium", "openai-community/gpt2-medium"])
def test_download_checks_the_hash_the_hub_names(hub, file_of_the_hub, name):
    hub.content, expected = file_of_the_hub
    hub.etag = hashlib.sha256(hub.content).hexdigest()
    trunk, idx = GPT.from_pretrained(name), tokens(1, 8, vocab=11)
    assert torch.equal(our_logits(trunk, idx), our_logits(expected, idx))
    assert ("GET", "/openai-community/gpt2-medium/resolve/main/model.safetensors") in hub.requests
    n = len(hub.requests)
    GPT.from_pretrained(name)                                                # and is kept
    assert len(hub.requests) == n


def test_download_with_a_wrong_hash_is_refused(hub, file_of_the_hub, tmp_path):
    hub.content, hub.etag = file_of_the_hub[0], "0" * 64
    error_of(GPT.from_pretrained, "gpt2-medium")
    assert not list(tmp_path.glob("data/weights/**/*.safetensors"))


def test_gpt2_itself_is_pinned(hub, file_of_the_hub, tmp_path):
    """Whatever hash the endpoint names, gpt2 is the one revision with the one hash."""
    hub.content = file_of_the_hub[0]
    hub.etag = hashlib.sha256(hub.content).hexdigest()
    error_of(GPT.from_pretrained, "gpt2")
    assert any("607a30d783dfa663caf39e06633721c8d4cfcd7e" in path for _, path in hub.requests)
    assert not list(tmp_path.glob("data/weights/**/*.safetensors"))


def test_no_hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert "http://127.0.0.1:9/openai-community/gpt2-large" in error_of(GPT.from_pretrained, "gpt2-large")


# ---------------------------------------------------------------------------------------------- the trunk
def test_cached_decoding_is_the_full_forward():
    """Ragged prompts in one right-padded cache, decoded token by token, against each row alone without a cache."""
    trunk, full = pair(None).trunk, tokens(3, 16)
    lengths = torch.tensor([5, 2, 9])
    padded = full[:, :9].masked_fill(torch.arange(9) >= lengths[:, None], 0)
    with torch.no_grad():
        h, kv = trunk(padded)
        cache, pos = new_cache(kv, 16), lengths - 1
        assert cache[0][0].shape == (3, 3, 16, 8)
        seen = [h[torch.arange(3), pos]]
        for n in range(1, 8):
            pos, S = pos + 1, 9 + n
            mask = (torch.arange(S) <= pos[:, None])[:, None, None]
            h, _ = trunk(full[torch.arange(3), pos][:, None], pos[:, None], first_keys(cache, mask.size(-1)), mask)
            seen.append(h[:, 0])
        for row, length in enumerate(lengths.tolist()):
            expected = trunk(full[row:row + 1])[0][0, length - 1:length + 7]
            torch.testing.assert_close(torch.stack(seen, 1)[row], expected, atol=1e-5, rtol=1e-5)


def test_cached_decoding_in_chunks_and_without_mask():
    """Several new tokens at once with a mask; one at a time without any, where it sees the whole cache."""
    trunk, idx = pair(None).trunk, tokens(2, 8)
    with torch.no_grad():
        expected, kv = trunk(idx)
        cache = new_cache(trunk(idx[:, :3])[1], 8)
        pos = torch.arange(3, 7).expand(2, 4)
        mask = (torch.arange(7) <= pos[:, :, None])[:, None]
        torch.testing.assert_close(trunk(idx[:, 3:7], pos, first_keys(cache, mask.size(-1)), mask)[0], expected[:, 3:7], atol=1e-5, rtol=1e-5)
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


def test_trunk_lora():
    plain, model = pair(None).trunk, pair(None, lora=(4, 8.0))
    trunk, idx = model.trunk, tokens(2, 9)
    assert all(p.requires_grad == ("lora_" in n) for n, p in trunk.named_parameters())
    before = our_logits(trunk, idx)
    assert (before - our_logits(plain, idx)).abs().max() > 1e-2              # pair() made B random
    layer = trunk.h[0].attn.c_attn
    W = layer.linear.weight + 8.0 / 4 * layer.lora_B @ layer.lora_A
    x = torch.randn(5, 24)
    torch.testing.assert_close(layer(x), x @ W.T + layer.linear.bias, atol=1e-5, rtol=1e-5)
    trunk.merge_lora()
    torch.testing.assert_close(our_logits(trunk, idx), before, atol=1e-5, rtol=1e-5)
    assert trunk.state_dict().keys() == plain.state_dict().keys()


def test_lora_starts_as_the_trunk():
    plain, lora = pair(None).trunk, GPT(TINY)
    lora.load_state_dict(plain.state_dict())
    lora.add_lora(4, 8.0)
    assert torch.equal(our_logits(lora, tokens(2, 9)), our_logits(plain, tokens(2, 9)))


# ----------------------------------------------------------------------------------------------- the pair
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("scale", ["unit", "wiener"])
@torch.no_grad()
def test_logits_at_t_0_are_the_trunks_bit_for_bit(mode, dtype, scale):
    model = pair(mode, input_scale=scale).to(dtype)
    for B, T in ((1, 1), (1, 7), (13, 16)):
        idx, at = tokens(B, T), everywhere(B, T)
        c = model.read(idx, at)
        h = c.h
        x_t, t, label = noisy(B * T)
        assert torch.equal(model(4 * x_t, 0 * t, c, label), model.trunk.head(h))
        mixed = torch.where(torch.arange(B * T) % 2 == 0, 0.0, 0.5 + t / 2)  # some at 0, others not
        logits, trunk = model(x_t, mixed, c, label), model.trunk.head(h)
        assert torch.equal(logits[mixed == 0], trunk[mixed == 0])
        assert ((logits - trunk)[mixed > 0].abs().amax(-1) > 1e-3).all()
        mask = (torch.arange(T) <= T - 1)[None, None, None].expand(B, 1, 1, T)      # and as in sampling
        last = at[1] == T - 1
        logits = model(x_t[last], 0 * t[last], c._replace(h=h[last], token=c.token[last], pos=c.pos[last], at=None, mask=mask), label[last])
        assert torch.equal(logits, model.trunk.head(h[last]))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(x_t, 0 * t, c, label), model.trunk.head(h))


@pytest.mark.parametrize("mode", ["full", "lora"])
@torch.no_grad()
def test_a_fresh_path_computes_the_trunks_own_states(mode):
    """What the initialisation is for: before any training h_path is h_trunk, whatever x_t and t are, and w_d 1 or 0: no change."""
    model, idx, at = pair(mode, random_path=False), tokens(2, 9), everywhere(2, 9)
    c, (x_t, t, label) = model.read(idx, at), noisy(18)
    modulations, w_d = model.path.condition(t, label)
    h_path = model.path(x_t, t, model.trunk.wpe(at[1]) + model.trunk.wte(idx[at]), modulations, c)
    torch.testing.assert_close(h_path, c.h, atol=1e-5, rtol=1e-5)
    assert (w_d > 0).all()
    torch.testing.assert_close(model(x_t, t, c, label), model.trunk.head(c.h), atol=1e-4, rtol=1e-4)
    model = pair(mode, random_path=False, w_init=0.0)
    assert not model.path.condition(t, label)[1].any() and torch.equal(model(x_t, t, model.read(idx, at), label), model.trunk.head(c.h))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("t_dim, time_scale", [(64, 1000.0), (256, 1000.0), (256, 1.0)])
@torch.no_grad()
def test_w_d_starts_near_w_init(t_dim, time_scale, seed):
    torch.manual_seed(seed)
    path = DiffusionPath(GPT(TINY), PathConfig(t_dim=t_dim, time_scale=time_scale, w_init=2.0))
    t = torch.rand(2000).sort().values
    w_d = path.condition(t, torch.zeros(2000, dtype=torch.long))[1]
    late = w_d[t > (0.02 if time_scale > 1 else 0.2)]                         # raw t: it cannot rise that fast
    assert torch.equal(w_d, w_d[:, :1].expand(2000, 24)) and (late > 0.5).all()               # of one sign: what matters
    assert late.mean() == pytest.approx(2, abs=0.2) and late.std() < 0.5
    assert not path.condition(torch.zeros(5), torch.zeros(5, dtype=torch.long))[1].any()


@pytest.mark.parametrize("token_input", [True, False])
@pytest.mark.parametrize("mode", ["full", "lora"])
@torch.no_grad()
def test_the_path_by_hand(mode, token_input):
    """One position at a time, written out from DESIGN section 2, with no code of model.py but the trunk's pass."""
    model = pair(mode, time_scale=30.0, token_input=token_input)
    trunk, path, idx, at = model.trunk, model.path, tokens(2, 9), everywhere(2, 9)
    c = model.read(idx, at)
    h_trunk, kv = c.h, c.kv
    x_t, t, label = noisy(18)
    logits = model(x_t, t, c, label)
    mlp = lambda net, x: net[2].weight @ F.silu(net[0].weight @ x + net[0].bias) + (0 if net[2].bias is None else net[2].bias)
    ln = lambda x: (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()

    def weights(owner, name, rows=None):
        layer = getattr(owner, name)
        if mode == "full":
            return layer.weight, layer.bias
        source = layer.linear
        return source.weight[:rows] + 8.0 / 4 * layer.lora_B @ layer.lora_A, source.bias[:rows]

    for i in range(18):
        row, k, C, d = at[0][i], at[1][i], 24, 8
        def embed(time):
            angles = torch.tensor([30.0 * float(time) / 10000 ** (j / 10) for j in range(10)])
            return mlp(path.t_in, torch.cat([angles.cos(), angles.sin()])) + path.label.weight[label[i]]
        emb = embed(t[i])
        x = x_t[i] * t[i] / (t[i] ** 2 + (1 - t[i]) ** 2 * 4.0 ** 2)
        h = mlp(path.x_in, x) + trunk.wpe.weight[k] + (trunk.wte.weight[idx[row, k]] if token_input else 0)
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
        merged = h_trunk[i] + (mlp(path.w, emb) - mlp(path.w, embed(0.0))) * h
        expected = trunk.wte.weight @ (ln(merged) * trunk.ln_f.weight + trunk.ln_f.bias)
        torch.testing.assert_close(logits[i], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_flat_queries_equal_masked_queries():
    """at = (rows, cols), as in training, and at = None with a mask, as in sampling, are the same function."""
    model = pair()
    lengths, idx = torch.tensor([4, 9, 1]), tokens(3, 9)
    at = torch.arange(3), lengths - 1
    c = model.read(idx, at)
    x_t, t, label = noisy(3)
    mask = (torch.arange(9) <= at[1][:, None])[:, None, None]
    torch.testing.assert_close(model(x_t, t, c, label), model(x_t, t, c._replace(at=None, mask=mask), label), atol=1e-5, rtol=1e-5)
    condition = model.path.condition(t, label)
    assert torch.equal(model(x_t, t, c, label), model(x_t, t, c, None, condition))


@pytest.mark.parametrize("mode", ["full", "lora"])
@torch.no_grad()
def test_what_can_change_what(mode):
    """Noise, time and label at one position change that position only; a token changes only what comes after it."""
    model, B, T = pair(mode), 2, 11
    idx, at = tokens(B, T), everywhere(B, T)
    x_t, t, label = noisy(B * T)
    t = 0.3 + 0.7 * t

    def logits(idx=idx, x_t=x_t, t=t, label=label):
        return model(x_t, t, model.read(idx, at), label)
    base = logits()
    i, others = 5, torch.arange(B * T) != 5
    for name, value in dict(x_t=x_t[i] + 1, t=t[i] / 2, label=(label[i] + 1) % 4).items():
        new = dict(x_t=x_t, t=t, label=label)[name].clone()
        new[i] = value
        change = (logits(**{name: new}) - base).abs().amax(-1)
        assert change[i] > 1e-3 and change[others].max() < 1e-5
    for j in (0, 6, 10):
        new = idx.clone()
        new[0, j] = (new[0, j] + 1) % TINY.vocab_size
        change = (logits(new) - base).abs().amax(-1).view(B, T)
        assert change[0, :j].numel() == 0 or change[0, :j].max() < 1e-5
        assert change[0, j:].min() > 1e-3 and change[1].max() < 1e-5


def without_merge(model, idx, x_t, t, label):
    """The path's own output, before w_d weighs it."""
    at = everywhere(*idx.shape)
    return model.path(x_t, t, model.trunk.wpe(at[1]), model.path.condition(t, label)[0], model.read(idx, at))


@torch.no_grad()
def test_the_path_reads_the_context():
    """Through the trunk's keys and values, not only through h_trunk: at the last position every token matters."""
    model, idx = pair(), tokens(1, 8)
    x_t, t, label = noisy(8)
    base = without_merge(model, idx, x_t, t, label)[-1]
    for j in range(8):
        other = idx.clone()
        other[0, j] = (other[0, j] + 1) % TINY.vocab_size
        assert (without_merge(model, other, x_t, t, label)[-1] - base).abs().max() > 1e-4


@pytest.mark.parametrize("mode", ["full", "lora"])
@torch.no_grad()
def test_a_fresh_block_with_open_gates_is_the_trunks_block(mode):
    """At initialisation, gates at 1: fed the trunk's input of a block, the path's block gives the trunk's output."""
    model = pair(mode, random_path=False, gate_init=1.0)
    idx, at = tokens(2, 7), everywhere(2, 7)
    x = model.trunk.wte(idx) + model.trunk.wpe(torch.arange(7))
    for block, own in zip(model.trunk.h, model.path.h):
        y, kv = block(x)
        modulation = own.modulation(torch.randn(14, 20))
        assert modulation.view(14, 6, 24)[:, [2, 5]].eq(1).all() and modulation.sum() == 14 * 2 * 24
        torch.testing.assert_close(own(x[at], modulation, *kv, at, None), y[at], atol=1e-5, rtol=1e-5)
        x = y


@torch.no_grad()
def test_lora_path_starts_as_the_full_path():
    full, lora = pair("full"), pair("lora", random_path=False)
    fresh = DiffusionPath(full.trunk, full.path.config)                      # undo the randomised copies
    copies = {k: v for k, v in fresh.state_dict().items() if re.match(r"h\.\d+\.(c_q|ln_1|c_proj|ln_2|mlp)\.", k)}
    full.path.load_state_dict(copies, strict=False)
    shared = {k: v for k, v in full.path.state_dict().items() if k not in copies}
    assert not lora.path.load_state_dict(shared, strict=False).unexpected_keys
    idx, (x_t, t, label) = tokens(2, 7), noisy(14)
    torch.testing.assert_close(without_merge(lora, idx, x_t, t, label), without_merge(full, idx, x_t, t, label), atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------- ownership, counting
def test_full_path_copies_do_not_share():
    model = pair(random_path=False)
    for block, own in zip(model.trunk.h, model.path.h):
        assert torch.equal(own.c_q.weight, block.attn.c_attn.weight[:24]) and torch.equal(own.c_q.bias, block.attn.c_attn.bias[:24])
        for ours, theirs in ((own.ln_1, block.ln_1), (own.ln_2, block.ln_2), (own.c_proj, block.attn.c_proj), (own.mlp, block.mlp)):
            for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
                assert torch.equal(p, q) and p.requires_grad
    storages = {p.untyped_storage().data_ptr() for p in model.trunk.parameters()}
    assert not storages & {p.untyped_storage().data_ptr() for p in model.path.parameters()}


@pytest.mark.parametrize("mode, lora", [("full", None), ("lora", None), ("lora", (4, 8.0)), (None, (4, 8.0))])
def test_nothing_is_saved_or_counted_twice(mode, lora):
    model = pair(mode, lora=lora)
    ours = [(n, p.untyped_storage().data_ptr()) for n, p in model.named_parameters(remove_duplicate=False)]
    assert len({s for _, s in ours}) == len(ours) == len(model.state_dict())
    assert {n for n, _ in ours} == set(model.state_dict())
    C, L, r, E, D = 24, 3, 4, 20, 16
    full = L * ((C * C + C) * 2 + (8 * C * C + 5 * C) + 4 * C)               # c_q, c_proj; the MLP; two norms
    path = D * C + (D * D + D + D * C + C) + 2 * (E * E + E) + (E * E + E + E * C) + 4 * E + L * (E * E + E + 6 * C * (E + 1))
    path += {"full": full, "lora": L * r * (2 * 2 * C + 2 * 5 * C)}.get(mode, 0)
    if mode:
        assert sum(p.numel() for p in model.path.parameters()) == path
    trunk = sum(p.numel() for p in GPT(TINY).parameters()) + (L * r * (4 * C + 2 * C + 2 * 5 * C) if lora else 0)
    assert sum(p.numel() for p in model.trunk.parameters()) == trunk


def test_published_size_of_the_path():
    with torch.device("meta"):
        path = DiffusionPath(GPT(GPT2_SIZES["gpt2"]), PathConfig(mode="lora", n_labels=5))
    count = lambda word: sum(p.numel() for n, p in path.named_parameters() if word in n)
    lora, heads, label = count("lora_"), count("modulation"), count("label")
    assert (lora, heads, label) == (4_128_768, 15_000_576, 6 * 256)
    assert count("") - label == 19_983_872 - 768                              # the official w has a bias, which cancels in w_d


def test_borrowed_weights_follow_the_trunk():
    """Converted, loaded or copied, the path's LoRA looks at its own trunk, in its dtype."""
    model = pair("lora", lora=(4, 8.0))
    for one in (model, copy.deepcopy(model), model.double().to(torch.bfloat16)):
        for block, own in zip(one.trunk.h, one.path.h):
            assert own.c_q.linear is block.attn.c_attn.linear and own.ln_1 is block.ln_1 and own.mlp.c_fc.linear is block.mlp.c_fc.linear
    at = everywhere(1, 4)
    x_t, t, label = noisy(4)
    assert model(x_t, t, model.read(tokens(1, 4), at), label).dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def step_losses(model, parameters, steps, lr=0.01):
    """Train on one batch; the names of the parameters that had a gradient at each step."""
    idx = tokens(4, 12)
    targets = idx.roll(-1, 1).masked_fill(torch.rand(4, 12, generator=torch.Generator().manual_seed(1)) < 0.2, -1)
    label, g = torch.tensor([0, 1, 2, 3]), torch.Generator().manual_seed(2)
    optimizer = torch.optim.Adam(parameters, lr=lr)
    for _ in range(steps):
        t, x_0 = draw(int((targets >= 0).sum()), model.path.config, g) if model.path else (None, None)
        nll(model, idx, targets, label, t, x_0).mean().backward()
        yield {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("w_init", [0.0, 1.0])
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_every_path_parameter_wakes_up_and_the_trunk_never_moves(mode, w_init):
    model = pair(mode, random_path=False, w_init=w_init)
    before = copy.deepcopy(model.trunk.state_dict())
    start = copy.deepcopy(model.path.state_dict())
    seen = list(step_losses(model, model.path.parameters(), 8))
    first = {"path.w.2.weight"}
    if w_init == 0:                                                          # DESIGN section 2: only the head of w_d
        assert seen[0] == first
    else:
        assert first < seen[0] and any("modulation" in n for n in seen[0]) and any("mlp" in n for n in seen[0])
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
    kept, (h, *_, kv, _, _) = saved_by(lambda: model.read(tokens(2, 9), at))
    assert not kept and not h.requires_grad and not any(k.requires_grad or v.requires_grad for k, v in kv)
    model.trunk.requires_grad_(True)
    kept, (h, *_, kv, _, _) = saved_by(lambda: model.read(tokens(2, 9), at))
    assert kept and h.requires_grad and kv[0][0].requires_grad
    with torch.no_grad():
        assert not model.read(tokens(2, 9), at).kv[0][0].requires_grad       # nor where the caller wants none


@pytest.mark.parametrize("mode", [None, "full", "lora"])
@pytest.mark.parametrize("lora", [None, (4, 8.0)])
def test_a_trainable_trunk_gets_gradients(mode, lora):
    model = pair(mode, lora=lora)
    if not lora:
        model.trunk.requires_grad_(True)
    (seen,) = step_losses(model, [p for p in model.parameters() if p.requires_grad], 1)
    wanted = {n for n, p in model.named_parameters() if p.requires_grad}
    assert not wanted - seen
    assert all(("lora_" in n) == (n in seen) for n, _ in model.named_parameters() if lora and n.startswith("trunk"))


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_gradients_are_the_slopes_of_the_loss(mode):
    """Against finite differences along a random direction, in float64: a detach in the wrong place shows."""
    model = pair(mode).double()
    idx = tokens(2, 6)
    t, x_0 = draw(12, model.path.config, torch.Generator().manual_seed(0))
    loss = lambda: nll_double(model, idx, t, x_0)
    loss().backward()
    g = torch.Generator().manual_seed(3)
    for name, p in model.path.named_parameters():
        direction = torch.randn(p.shape, generator=g, dtype=p.dtype)
        slope = (p.grad * direction).sum()
        with torch.no_grad():
            values = []
            for eps in (1e-5, -1e-5):
                p.add_(eps * direction)
                values.append(loss())
                p.sub_(eps * direction)
        # token_space and nll end in float32, so that differences are only good to a few parts in a thousand
        torch.testing.assert_close((values[0] - values[1]) / 2e-5, slope, atol=2e-4, rtol=1e-3, msg=lambda s: f"{name}: {s}")


def nll_double(model, idx, t, x_0):
    """Eq. 3 in float64 throughout, from the pair's own pieces."""
    at = everywhere(*idx.shape)
    y, path = idx.roll(-1, 1)[at], model.path
    e = path.W(model.trunk.wte.weight[y])
    x_t = t[:, None] * 4 * e / e.norm(dim=1, keepdim=True) + (1 - t[:, None]) * x_0    # sqrt(D) = 4
    return F.cross_entropy(model(x_t, t.double(), model.read(idx, at), y % 4), y)


# ---------------------------------------------------------------------------------------------- checkpoints
@pytest.mark.parametrize("mode", [None, "full", "lora"])
@pytest.mark.parametrize("lora", [None, (4, 8.0)])
def test_checkpoint_round_trip(tmp_path, mode, lora):
    model, file = pair(mode, lora=lora), tmp_path / "last.pt"
    torch.save(describe(model, lora), file)
    copy_ = model_from_checkpoint(load_checkpoint(file), file)
    assert copy_.trunk.config == TINY and (copy_.path.config if mode else None) == (model.path.config if mode else None)
    assert [k for k in model.state_dict()] == [k for k in copy_.state_dict()]
    at, (x_t, t, label) = everywhere(2, 9), noisy(18)
    with torch.no_grad():
        for one, other in zip(model.read(tokens(2, 9), at), copy_.read(tokens(2, 9), at)):
            torch.testing.assert_close(one, other, atol=0, rtol=0)
        if mode:
            logits = [x(x_t, t, x.read(tokens(2, 9), at), label) for x in (model, copy_)]
            assert torch.equal(*logits)


class Garbage:
    pass


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "truncated", "pickle", "object", "list", "other keys", "directory"])
def test_checkpoints_that_cannot_be_read(tmp_path, damage):
    file = tmp_path / "last.pt"
    torch.save(describe(pair()), file)
    good = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "directory":
        file.unlink()
        file.mkdir()
    elif damage in ("empty", "text", "truncated"):
        file.write_bytes({"empty": b"", "text": b"weights\n" * 99, "truncated": good[:len(good) // 2]}[damage])
    elif damage == "pickle":
        file.write_bytes(pickle.dumps({"model": Garbage()}, protocol=2))
    else:
        torch.save({"object": {"trunk_config": {}, "model": Garbage()}, "list": [1], "other keys": {"state_dict": {}}}[damage], file)
    assert str(file) in error_of(load_checkpoint, file)


def test_a_checkpoint_of_another_architecture_prints_the_difference():
    checkpoint = describe(pair())
    checkpoint["trunk_config"] |= {"n_layer": 4, "vocab_size": 32}
    message = error_of(model_from_checkpoint, checkpoint, "out/last.pt")
    assert "out/last.pt" in message and "trunk.wte.weight is (31, 24), not (32, 24)" in message and "missing trunk.h.3.ln_1.weight" in message
    checkpoint = describe(pair("full"))
    checkpoint["path_config"] |= {"mode": "lora"}
    message = error_of(model_from_checkpoint, checkpoint, "out/last.pt")
    assert "missing path.h.0.c_q.lora_A" in message and "unexpected path.h.0.c_q.weight" in message


def test_trunk_sizes_that_do_not_fit():
    assert "n_embd=10" in error_of(lambda: GPTConfig(n_embd=10, n_head=3))
    error_of(lambda: GPTConfig(n_layer=0))


# ----------------------------------------------------------------------- token space, time, scaling of x_t
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_space(dtype):
    model = pair().to(dtype)
    ids = torch.tensor([[3, 7], [30, 0]])
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        V = model.embed(ids)
    assert V.shape == (2, 2, 16) and V.dtype == torch.float32
    torch.testing.assert_close(V.norm(dim=-1), torch.full((2, 2), 4.0))      # sqrt(D)
    e = model.trunk.wte.weight[ids].float() @ model.path.W.weight.float().T
    tol = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(V / 4, e / e.norm(dim=-1, keepdim=True), atol=tol, rtol=tol)


def test_token_space_trains_w_and_leaves_the_embedding():
    model = pair()
    model.trunk.requires_grad_(True)
    (model.embed(torch.tensor([1, 2])) * torch.randn(2, 16)).sum().backward()
    assert model.path.W.weight.grad.abs().max() > 0 and model.trunk.wte.weight.grad is None


def test_time_features():
    t = torch.tensor([0.0, 0.25, 1.0])
    features = time_features(t, 8, 100.0)
    for i, time in enumerate(t.tolist()):
        angles = [100 * time * 10000 ** (-k / 4) for k in range(4)]
        torch.testing.assert_close(features[i], torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles]), atol=1e-4, rtol=1e-4)


def test_input_scaling():
    """unit: unit variance at every t. wiener: the least-squares coefficient of x_1 on x_t, by Monte Carlo."""
    g, n, sigma = torch.Generator().manual_seed(0), 400_000, 3.0
    x_1, x_0 = torch.randn(n, generator=g), sigma * torch.randn(n, generator=g)
    for time in (0.0, 0.2, 0.5, 0.8, 0.99, 1.0):
        x_t = time * x_1 + (1 - time) * x_0
        t = torch.full((n,), time)
        assert abs(scale_input(x_t[:, None], t, sigma, "unit").std() - 1) < 0.01
        coefficient = (x_1 * x_t).mean() / (x_t * x_t).mean()
        estimate = scale_input(x_t[:, None], t, sigma, "wiener")[:, 0]
        assert (estimate - coefficient * x_t).std() < 0.01
