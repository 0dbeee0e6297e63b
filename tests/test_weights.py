"""
plumbing/gpt2_weights.py and trunks.py: what they load is transformers' GPT-2; what they cannot load they refuse in one line.
"""
import hashlib
import json
import os
import re
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

import model
import plumbing.download
from configurator import UserError
from model import GPT, GPTConfig
from plumbing.gpt2_weights import GPT2_SIZES, load_gpt2, read_safetensors
from plumbing.trunks import load_trunk

TINY = GPTConfig(block_size=16, vocab_size=31, n_layer=3, n_head=3, n_embd=24)


def randomise(module, seed=0, std=0.2):
    """Every parameter random: zero biases would hide mistakes."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(std * torch.randn(p.shape, generator=g) + ("ln_" in name and name.endswith("weight")))
    return module


def tokens(*shape, seed=0, vocab=TINY.vocab_size):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def error_of(function, *args):
    """The message of the UserError that function(*args) raises: one line that begins with error:."""
    with pytest.raises(UserError) as e:
        function(*args)
    message = str(e.value)
    assert message.startswith("error: ") and "\n" not in message and len(message) < 2000
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
    """The format by hand, so that header can be edited: header(entries) may change the dict before."""
    codes = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8",
             torch.bool: "BOOL",
             torch.int64: "I64"}
    entries, blob = {"__metadata__": {"format": "pt"}}, b""
    for name, z in tensors.items():
        raw = bytes(z.contiguous().flatten().view(torch.uint8).tolist())
        offsets = [len(blob), len(blob) + len(raw)]
        entries[name] = {"dtype": codes[z.dtype], "shape": list(z.shape), "data_offsets": offsets}
        blob += raw
    if header:
        header(entries)
    text = json.dumps(entries).encode()
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + blob)


@pytest.mark.parametrize("length", [640, 19280 + 65536])
def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path, length):
    """The first two bytes of these lengths are those of a pickle and of a zip file."""
    write_safetensors(tmp_path / "x", {"wte": torch.ones(2, 3)})
    data = (tmp_path / "x").read_bytes()
    n = struct.unpack("<Q", data[:8])[0]
    (tmp_path / "x").write_bytes(struct.pack("<Q", length) + data[8:8 + n].ljust(length) + data[8 + n:])
    assert torch.equal(read_safetensors(tmp_path / "x")["wte"], torch.ones(2, 3))


@pytest.mark.parametrize("kind",
                         ["GPT2LMHeadModel", "GPT2Model"])          # with and without the prefix transformer.
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_transformers(tmp_path, kind, shape, monkeypatch):
    pytest.importorskip("safetensors")
    shape = SHAPES[shape]
    hf = hugging_face(kind, shape)
    hf.save_pretrained(tmp_path)
    trunk = load_gpt2(str(tmp_path))
    assert trunk.config == GPTConfig(shape["n_positions"], shape["vocab_size"], shape["n_layer"],
                                     shape["n_head"], shape["n_embd"])
    idx = tokens(3, shape["n_positions"], vocab=shape["vocab_size"])
    expected = hf_logits(hf, idx)
    assert expected.std() > 0.5
    torch.testing.assert_close(our_logits(trunk, idx), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(our_logits(trunk, idx[:, :1]), expected[:, :1], atol=1e-5, rtol=1e-5)

    gelu = F.gelu                                            # these weights tell the two GELUs apart
    monkeypatch.setattr(model.F, "gelu", lambda x, approximate: gelu(x))
    assert (our_logits(trunk, idx) - expected).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_files_of_another_precision_become_float32(tmp_path, dtype):
    save_file = pytest.importorskip("safetensors.torch").save_file
    hf = hugging_face("GPT2LMHeadModel", SHAPES["even"]).to(dtype)
    save_file({k: v.clone() for k, v in hf.state_dict().items()}, tmp_path / "model.safetensors",
              {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["even"]))
    trunk, idx = load_gpt2(str(tmp_path)), tokens(2, 20)
    assert {p.dtype for p in trunk.parameters()} == {torch.float32}
    torch.testing.assert_close(our_logits(trunk, idx), hf_logits(hf.float(), idx), atol=1e-5, rtol=1e-5)


def test_a_single_file_in_the_hubs_old_layout_loads(tmp_path):
    """The hub's gpt2: no prefix, causal masks stored as attn.bias; lm_head.weight where tied; no config."""
    hf = hugging_face("GPT2LMHeadModel", dict(n_layer=2, n_head=2, n_embd=128, vocab_size=33, n_positions=10))
    state = {k.removeprefix("transformer."): v for k, v in hf.state_dict().items()}
    for i in range(2):
        state[f"h.{i}.attn.bias"] = torch.ones(1, 1, 10, 10).tril()
        state[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    assert "lm_head.weight" in state
    idx, file = tokens(2, 10), tmp_path / "weights.safetensors"
    for prefix, mask in (("", torch.float32), ("transformer.", torch.uint8), ("", torch.bool)):
        named = {k if k == "lm_head.weight" else prefix + k: v for k, v in state.items()}
        write_safetensors(file, {k: v.to(mask) if k.endswith(".attn.bias") else v for k, v in named.items()})
        torch.testing.assert_close(our_logits(load_gpt2(str(file)), idx), hf_logits(hf, idx),
                                   atol=1e-5, rtol=1e-5)
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    write_safetensors(file, state)
    assert "tied" in error_of(load_gpt2, str(file))


def test_sizes_have_the_published_parameter_counts():
    expected = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080,
                "gpt2-xl": 1_557_611_200}
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in GPT(config).parameters()) for name,
                  config in GPT2_SIZES.items()}
    assert counts == expected


def test_the_real_gpt2_continues_as_it_must():
    path = Path(os.environ.get("L2D_GPT2",
                               Path(__file__).parent.parent / "data/weights/gpt2/model.safetensors"))
    if not path.exists():
        pytest.skip(f"the real weights are not at {path} (or where L2D_GPT2 says)")
    trunk, ids = load_gpt2(str(path)), [464, 3290]
    while len(ids) < 20:
        ids.append(our_logits(trunk, torch.tensor([ids]))[0, -1].argmax().item())
    assert ids == [464, 3290, 373, 1043, 287, 257, 2214, 1474, 262, 16246, 286, 2688, 290, 2688, 27262, 13,
                   198, 198, 464, 3290]


# ------------------------------------------------------------------------------------------ damaged files
def file_layout(trunk):
    """The tensors of a trunk as checkpoints have them, Conv1D: (in, out)."""
    return {k: v.t() if re.search(r"(c_attn|c_proj|c_fc)\.weight", k) else v for k,
            v in trunk.state_dict().items()}


@pytest.fixture
def good(tmp_path):
    """A directory with a loadable tiny GPT-2 and its tensors in checkpoint layout."""
    state = file_layout(randomise(GPT(TINY)))
    write_safetensors(tmp_path / "model.safetensors", state)
    (tmp_path / "config.json").write_text('{"n_head": 3}')
    return tmp_path, state


def test_an_undamaged_file_loads(good):
    directory, state = good
    trunk = load_gpt2(str(directory))
    assert trunk.config == TINY and torch.equal(trunk.h[1].attn.c_attn.weight,
                                                state["h.1.attn.c_attn.weight"].t())


BYTES = {"empty": lambda data: b"", "three bytes": lambda data: data[:3],
         "header cut": lambda data: data[:100],
         "tensors cut": lambda data: data[:-1], "half": lambda data: data[:len(data) // 2],
         "length huge": lambda data: struct.pack("<Q", 2 ** 63) + data[8:],
         "length beyond the file": lambda data: struct.pack("<Q", len(data)) + data[8:],
         "not JSON": lambda data: data[:8] + b"{x" + data[10:],
         "not UTF-8": lambda data: data[:8] + b"\xff\xfe" + data[10:],
         "a list": lambda data: struct.pack("<Q", 2) + b"[]" + data,
         "a page of HTML": lambda data: b"<html>Not Found</html>" * 100}


@pytest.mark.parametrize("damage", BYTES)
def test_damaged_bytes_are_refused(good, damage):
    file = good[0] / "model.safetensors"
    file.write_bytes(BYTES[damage](file.read_bytes()))
    assert str(file) in error_of(load_gpt2, str(file))


NAME = "h.1.mlp.c_fc.bias"                                                   # 96 numbers, 384 bytes
ENTRIES = {"end beyond the file": {"data_offsets": [10 ** 9, 10 ** 9 + 384]},
           "start negative": {"data_offsets": [-384, 0]},
           "start after end": {"data_offsets": [384, 0]}, "wrong size": {"data_offsets": [0, 380]},
           "dtype of another size": {"dtype": "F16"}, "dtype unknown": {"dtype": "F8_E4M3"},
           "dtype a list": {"dtype": []},
           "shape wrong": {"shape": [95]}, "shape a string": {"shape": "96"},
           "shape missing": {"shape": None},
           "shape negative": {"shape": [-2, -48]}, "shape of floats": {"shape": [96.0]},
           "offsets of floats": {"data_offsets": [0.0, 384.0]}, "three offsets": {"data_offsets": [0, 1, 2]}}


@pytest.mark.parametrize("damage", ENTRIES)
def test_a_damaged_entry_is_named(good, damage):
    directory, state = good
    write_safetensors(directory / "model.safetensors", state,
                      lambda entries: entries[NAME].update(ENTRIES[damage]))
    message = error_of(load_gpt2, str(directory))
    assert NAME in message and "model.safetensors" in message


def test_every_difference_is_reported_at_once(good):
    directory, state = good
    del state["h.0.ln_1.weight"], state["ln_f.bias"]
    state |= {"h.0.attn.rotary": torch.ones(2), "h.2.mlp.c_fc.weight": torch.ones(24, 95),
              "h.1.ln_2.bias": torch.ones(23)}
    write_safetensors(directory / "model.safetensors", state)
    message = error_of(load_gpt2, str(directory))
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
    message = error_of(load_gpt2, str(directory))
    assert message.count("missing") == 1 and "missing h.1.attn.c_attn.bias" in message


ODD = {"no wte": lambda s: s.pop("wte.weight"), "no wpe": lambda s: s.pop("wpe.weight"),
       "wte a vector": lambda s: s.update({"wte.weight": torch.ones(24)}),
       "weight of three dimensions": lambda s: s.update({"h.0.attn.c_attn.weight": torch.ones(1, 24, 72)}),
       "a layer left out": lambda s: [s.pop(k) for k in list(s) if k.startswith("h.1.")],
       "nothing": lambda s: s.clear()}


@pytest.mark.parametrize("change", ODD)
def test_tensors_that_are_no_gpt2_are_refused(good, change):
    directory, state = good
    ODD[change](state)
    write_safetensors(directory / "model.safetensors", state)
    assert "model.safetensors" in error_of(load_gpt2, str(directory))


CONFIGS = {
    "activation_function": "gelu", "scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True,
    "layer_norm_epsilon": 1e-6, "add_cross_attention": True, "n_inner": 48, "tie_word_embeddings": False,
    "model_type": "gptj",
    "pruned_heads": {"0": [1]}, "vocab_size": 32, "n_embd": 48, "n_positions": 17, "n_layer": 4}


@pytest.mark.parametrize("key", CONFIGS)
def test_a_config_that_changes_the_function_is_refused(good, key):
    """Each setting that would give other logits: named, with its value and ours."""
    (good[0] / "config.json").write_text(json.dumps({"n_head": 3, key: CONFIGS[key]}))
    assert f"config.json has {key}={CONFIGS[key]}, but GPT-2" in error_of(load_gpt2, str(good[0]))


def test_such_a_config_does_change_the_logits_of_transformers():
    """So refusing it is no pedantry: scale_attn_weights was loaded 0.41 off."""
    transformers = pytest.importorskip("transformers")
    idx, logits = tokens(2, 20, vocab=64), {}
    for change in ({}, {"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True},
                   {"layer_norm_epsilon": 1e-2},
                   {"activation_function": "gelu"}):
        hf = randomise(transformers.GPT2LMHeadModel(transformers.GPT2Config(**SHAPES["even"],
                                                                            **change)).eval(), std=0.3)
        logits[str(change)] = hf_logits(hf, idx)
    first, *others = logits.values()
    assert all((other - first).abs().max() > 1e-4 for other in others)


@pytest.mark.parametrize("text", ['{"n_head": 5}', '{"n_head": 0}', '{"n_head": -3}', '{"n_head": "3"}',
                                  '{"n_head": 3.0}',
                                  '{"n_head": true}', '{"n_layer": 3}', '{"n_head":', "[]", "3", "null", "",
                                  "\0", "[" * 100_000])
def test_a_config_without_a_number_of_heads_is_refused(good, text):
    (good[0] / "config.json").write_text(text)
    error_of(load_gpt2, str(good[0]))


def test_everything_that_transformers_writes_of_ours_is_accepted(good):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_positions=16, vocab_size=31, n_layer=3, n_head=3, n_embd=24,
                                     attn_pdrop=0.3)
    (good[0] / "config.json").write_text(config.to_json_string(use_diff=False))
    assert load_gpt2(str(good[0])).config == TINY


def test_what_was_assumed_of_a_lone_file_is_said(tmp_path, capsys):
    state = file_layout(randomise(GPT(GPTConfig(8, 11, 1, 2, 128))))
    write_safetensors(tmp_path / "x.safetensors", state)
    assert load_gpt2(str(tmp_path / "x.safetensors")).config.n_head == 2
    assert "assumed 2 heads of 64" in capsys.readouterr().out
    write_safetensors(tmp_path / "x.safetensors", file_layout(randomise(GPT(TINY))))
    assert "put its config.json beside it" in error_of(load_gpt2, str(tmp_path / "x.safetensors"))


def test_shards_with_an_index_are_read(good):
    directory, state = good
    whole, names = load_gpt2(str(directory)).state_dict(), sorted(state)
    (directory / "model.safetensors").unlink()
    places = {name: f"model-0000{1 + (i > 9)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        write_safetensors(directory / file, {name: state[name] for name in names if places[name] == file})
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    for path in (directory, index):
        trunk = load_gpt2(str(path))
        tensors = trunk.state_dict()
        assert trunk.config == TINY and all(torch.equal(tensors[k], whole[k]) for k in whole)
    for bad in ("", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"wte.weight": 3}}',
                json.dumps({"weight_map": places | {"extra": places["wpe.weight"]}})):
        index.write_text(bad)
        assert "index.json does not fit the files beside it" in error_of(load_gpt2, str(directory))
    index.write_text(json.dumps({"weight_map": places | {"extra": "model-00003-of-00002.safetensors"}}))
    assert "model-00003-of-00002.safetensors" in error_of(load_gpt2, str(directory))


def test_weights_as_a_pickle_name_the_way_to_convert_them(good):
    directory, state = good
    (directory / "model.safetensors").unlink()
    torch.save(state, directory / "pytorch_model.bin")
    message = error_of(load_gpt2, str(directory))
    assert all(part in message for part in ("pytorch_model.bin", "convert it: python -c", "save_pretrained"))
    for zipped in (True, False):
        torch.save(state, directory / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        assert "a pickle of PyTorch" in error_of(load_gpt2, str(directory / "pytorch_model.bin"))


def test_a_folder_that_hides_a_hub_name_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2/merges.txt").write_text("")
    message = error_of(load_gpt2, "gpt2")
    assert "it has: merges.txt" in message and "--trunk=openai-community/gpt2" in message
    (tmp_path / "other").mkdir()
    assert "it has: nothing" in error_of(load_gpt2,
                                         "other") and "fetch model.safetensors into it" in error_of(load_gpt2,
                                                                                                    "other")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool])
def test_quantized_weights_are_refused(good, dtype):
    directory, state = good
    state["h.0.mlp.c_fc.weight"] = state["h.0.mlp.c_fc.weight"].to(dtype)
    write_safetensors(directory / "model.safetensors", state)
    assert "without quantization" in error_of(load_gpt2, str(directory))


def test_a_home_directory_is_found(good, monkeypatch):
    monkeypatch.setenv("HOME", str(good[0].parent))
    assert load_gpt2(f"~/{good[0].name}/").config.n_head == 3


# ---------------------------------------------------------------------------------- what was found, and what helps
@pytest.mark.parametrize("begin, kind", [(b"PK\3\4", "pickle"), (b"\x80\4", "pickle"), (b"GGUF\3", "GGUF"), (b"\x89HDF\r\n", "HDF5"),
                                         (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
                                         (b"<!doctype html><html>", "web page"), (b"weights", "something else")])
def test_a_file_of_another_kind_is_refused_by_its_name(tmp_path, begin, kind):
    file = tmp_path / "model.safetensors"
    file.write_bytes(begin + bytes(99))
    message = error_of(load_gpt2, str(file))
    assert kind in message and str(file) in message and "give a .safetensors file" in message


@pytest.mark.parametrize("kind", ["F8_E4M3", "I32", "U16", "F4", "C64"])
def test_a_type_that_is_not_read_is_refused_by_its_name(good, kind):
    directory, state = good
    write_safetensors(directory / "model.safetensors", state, lambda entries: entries[NAME].update(dtype=kind))
    message = error_of(load_gpt2, str(directory))
    assert f"{NAME} has type {kind}" in message and "convert it to one of F64, F32, F16, BF16" in message


def test_a_name_that_occurs_twice_is_refused(good):
    """With two prefixes, or twice in the header; which of the two is meant, nobody knows."""
    directory, state = good
    file = directory / "model.safetensors"
    write_safetensors(file, state | {"transformer.wte.weight": state["wte.weight"] + 1})
    assert "wte.weight twice, with and without transformer. before it" in error_of(load_gpt2, str(directory))
    write_safetensors(file, state)
    data = file.read_bytes()
    n = struct.unpack("<Q", data[:8])[0]
    text = data[8:8 + n].replace(b"{", b'{"wpe.weight": 3, ', 1)
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + n:])
    assert "wpe.weight occurs twice" in error_of(load_gpt2, str(directory))


def test_a_folder_with_several_files_of_weights_asks_for_one(good):
    directory, state = good
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    message = error_of(load_gpt2, str(directory))
    assert "several files of weights" in message and f"--trunk={directory}/model.safetensors" in message
    for name in ("model.safetensors", "model.safetensors.index.json"):
        (directory / name).unlink()
    write_safetensors(directory / "a.safetensors", state)
    assert load_gpt2(str(directory)).config == TINY                           # the only one, whatever its name
    write_safetensors(directory / "b.safetensors", state)
    assert f"--trunk={directory}/a.safetensors" in error_of(load_gpt2, str(directory))


@pytest.mark.parametrize("names, found", [(["last.pt", "best.pt", "lock"], "best.pt"), (["last.pt"], "last.pt")])
def test_a_folder_of_a_run_names_its_checkpoint(tmp_path, names, found):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    message = error_of(load_gpt2, str(tmp_path))
    assert f"it is a run of train.py, so write --trunk={tmp_path}/{found}" in message and "fetch" not in message


def test_weights_laid_out_like_nanogpts_say_so(good):
    directory, state = good
    write_safetensors(directory / "model.safetensors", randomise(GPT(TINY)).state_dict())
    assert "as nanoGPT does" in error_of(load_gpt2, str(directory)) and "transposed" in error_of(load_gpt2, str(directory))


@pytest.mark.parametrize("n_trunk, name, n_data, remedy", [
    (50304, "gpt2", 50257, "the last 47 are padding, as nanoGPT adds it: save wte.weight without them"),
    (50257, "arithmetic", 666, "prepare the data with --tokenizer=gpt2"),
    (32000, "gpt2", 50257, "choose a trunk with 50257 tokens"), (128256, "gpt2", 50257, "choose a trunk with 50257 tokens")])
def test_a_trunk_of_another_vocabulary_is_told_what_helps(tmp_path, n_trunk, name, n_data, remedy):
    path = tmp_path / "model.safetensors"
    config = GPTConfig(block_size=4, vocab_size=n_trunk, n_layer=1, n_head=1, n_embd=2)
    pytest.importorskip("safetensors.torch").save_file({k: v.contiguous() for k, v in file_layout(GPT(config)).items()}, path)
    (tmp_path / "config.json").write_text('{"n_head": 1}')
    manifest = {"n_vocab": n_data, "tokenizer": {"name": name, "fingerprint": "f"}}
    message = error_of(load_trunk, str(tmp_path), manifest)
    assert f"has {n_trunk} tokens" in message and f"has {n_data};" in message and remedy in message


HEADERS = st.recursive(st.none() | st.booleans() | st.integers(-2 ** 70,
                                                               2 ** 70) | st.floats() | st.text(max_size=5),
                       lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner,
                                                                                   max_size=3))
ENTRY = st.fixed_dictionaries({}, optional={
    "dtype": st.sampled_from(["F32", "F16", "BF16", "U8", "BOOL", "I64"]) | HEADERS,
    "shape": st.lists(st.integers(-1, 4) | st.integers(2 ** 31, 2 ** 64), max_size=3) | HEADERS,
    "data_offsets": st.lists(st.integers(-4, 40) | st.integers(2 ** 31, 2 ** 64), min_size=2,
                             max_size=2) | HEADERS})


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.text(max_size=3), ENTRY | HEADERS, max_size=3) | HEADERS, st.binary(max_size=40),
       st.booleans())
@example({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(8), False)
@example({"x": {"dtype": "F32", "shape": [2 ** 63, []], "data_offsets": [0, 0]}}, b"", False)
@example({"x": {"dtype": "F32", "shape": [0, 2 ** 62, 2 ** 62], "data_offsets": [0, 0]}}, b"", False)
def test_any_header_is_read_as_it_says_or_refused_in_one_line(tmp_path_factory, header, blob, cut):
    """Against struct: a tensor that is read holds the bytes that its entry names."""
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    text = json.dumps(header).encode()
    path.write_bytes((struct.pack("<Q", len(text)) + text + blob)[:-1 if cut else None])
    blob = blob[:-1] if cut else blob
    try:
        tensors = read_safetensors(path)
    except UserError as e:
        assert str(e).startswith("error: ") and "\n" not in str(e) and str(path) in str(e)
        return
    assert tensors.keys() == header.keys() - {"__metadata__"}
    for name, tensor in tensors.items():
        start, end = header[name]["data_offsets"]
        assert list(tensor.shape) == header[name]["shape"]
        assert bytes(tensor.flatten().view(torch.uint8).tolist()) == blob[start:end]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 2 ** 64 - 1))
def test_any_bytes_are_refused_in_one_line(tmp_path_factory, junk, length):
    path = tmp_path_factory.getbasetemp() / "junk.safetensors"
    for data in (junk, struct.pack("<Q", length) + junk):
        path.write_bytes(data)
        try:
            assert isinstance(read_safetensors(path), dict)
        except UserError as e:
            assert str(e).startswith("error: ") and "\n" not in str(e)


def test_a_name_that_is_nowhere_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = error_of(load_gpt2, "gpt3")
    assert "gpt3" in message and all(size in message for size in GPT2_SIZES)
    error_of(load_gpt2, "no/such/file.safetensors")
    assert "model.safetensors" in error_of(load_gpt2, str(tmp_path))      # a directory without weights


# ---------------------------------------------------------------------------------------- download by name
class Hub(ThreadingHTTPServer):
    """A loopback hub: redirects like the real one, names the hash in X-Linked-Etag of the first answer."""
    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.content, self.etag, self.requests, self.mirror = b"", None, [], False


class HubHandler(BaseHTTPRequestHandler):
    def answer(self, body):
        hub = self.server
        hub.requests.append((self.command, self.path))
        if hub.mirror and "resolve" in self.path:            # a mirror's own: relative, without a hash
            self.send_response(308)
            self.send_header("Location", self.path.replace("resolve", "mirrored"))
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if "resolve" in self.path or "mirrored" in self.path:
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
    monkeypatch.setattr(plumbing.download, "BACKOFF", 0.01)
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
    write_safetensors(tmp_path / "x", file_layout(trunk))
    return (tmp_path / "x").read_bytes(), trunk


@pytest.mark.parametrize("name", ["gpt2-medium", "openai-community/gpt2-medium"])
def test_a_download_is_checked_by_the_hash_that_the_hub_names(hub, file_of_the_hub, name):
    hub.content, expected = file_of_the_hub
    hub.etag = hashlib.sha256(hub.content).hexdigest()
    trunk, idx = load_gpt2(name), tokens(1, 8, vocab=11)
    assert torch.equal(our_logits(trunk, idx), our_logits(expected, idx))
    assert ("GET", "/openai-community/gpt2-medium/resolve/main/model.safetensors") in hub.requests
    n = len(hub.requests)
    load_gpt2(name)                                                # and is kept
    assert len(hub.requests) == n


def test_a_mirror_that_redirects_on_its_own_host_is_followed_to_the_hash(hub, file_of_the_hub):
    hub.content, expected = file_of_the_hub
    hub.etag, hub.mirror = hashlib.sha256(hub.content).hexdigest(), True
    assert load_gpt2("gpt2-medium").config.n_head == 1
    assert ("HEAD", "/openai-community/gpt2-medium/mirrored/main/model.safetensors") in hub.requests


def test_a_download_without_a_hash_is_refused(hub, file_of_the_hub):
    hub.content = file_of_the_hub[0]
    assert "X-Linked-Etag" in error_of(load_gpt2, "gpt2-medium")
    assert not any(command == "GET" for command, _ in hub.requests)


def test_a_download_with_a_wrong_hash_is_refused(hub, file_of_the_hub, tmp_path):
    hub.content, hub.etag = file_of_the_hub[0], "0" * 64
    error_of(load_gpt2, "gpt2-medium")
    assert not list(tmp_path.glob("data/weights/**/*.safetensors"))


def test_gpt2_itself_is_pinned(hub, file_of_the_hub, tmp_path):
    """Whatever hash the endpoint names, gpt2 is the one revision with the one hash."""
    hub.content = file_of_the_hub[0]
    hub.etag = hashlib.sha256(hub.content).hexdigest()
    error_of(load_gpt2, "gpt2")
    assert any("607a30d783dfa663caf39e06633721c8d4cfcd7e" in path for _, path in hub.requests)
    assert not list(tmp_path.glob("data/weights/**/*.safetensors"))


def test_a_hub_that_cannot_be_reached_is_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert "http://127.0.0.1:9/openai-community/gpt2-large" in error_of(load_gpt2, "gpt2-large")
