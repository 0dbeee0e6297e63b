"""
Weights of Llama's type as the hub has them: fetch, read and check them, and put them under llama.py's names.

A folder holds config.json, model.safetensors or its shards with an index, and tokenizer.json. A GGUF file
holds all of that. What computes something else than llama.py is refused by the name of its setting.
"""
import json
import os
from pathlib import Path

import torch

from configurator import UserError, require
from llama import Llama, LlamaConfig
from plumbing.checkpoint import load_state
from plumbing.download import download, hash_of_the_hub
from plumbing.gpt2_weights import FILE, find_weights, read_safetensors, read_sharded

HUB = {                                                           # name of --trunk: its place on the hub
    "SmolLM2-135M": "HuggingFaceTB/SmolLM2-135M",
    "SmolLM2-135M-Instruct": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "SmolLM2-360M": "HuggingFaceTB/SmolLM2-360M",
    "SmolLM2-360M-Instruct": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "Llama-3.2-1B": "meta-llama/Llama-3.2-1B",
    "Llama-3.2-1B-Instruct": "meta-llama/Llama-3.2-1B-Instruct",
    "Qwen2.5-0.5B": "Qwen/Qwen2.5-0.5B",
    "Qwen2.5-0.5B-Instruct": "Qwen/Qwen2.5-0.5B-Instruct",
    "Qwen2.5-1.5B": "Qwen/Qwen2.5-1.5B",
    "Qwen2.5-1.5B-Instruct": "Qwen/Qwen2.5-1.5B-Instruct",
}
FAMILIES = ("llama", "qwen2")                                     # of model_type, that llama.py computes
# What a config may say that changes what is computed, and what it says of ours. None: nothing.
OURS = {"hidden_act": ("silu",), "mlp_bias": (False, None), "use_sliding_window": (False, None),
        "pretraining_tp": (1, None), "partial_rotary_factor": (1, 1.0, None), "quantization_config": (None,),
        "num_local_experts": (None,), "num_experts": (None,), "attention_bias": (False, None),
        "use_qk_norm": (None, False), "logit_scale": (None, 1.0)}
# llama.py's names within a block, and the hub's
NAMES = {"ln_1": "input_layernorm", "ln_2": "post_attention_layernorm", "attn.c_q": "self_attn.q_proj",
         "attn.c_k": "self_attn.k_proj", "attn.c_v": "self_attn.v_proj", "attn.c_proj": "self_attn.o_proj",
         "mlp.c_gate": "mlp.gate_proj", "mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj"}


def is_hub_trunk(name):
    """Whether load_llama reads the trunk of this name: a key of HUB, a .gguf file, or a folder of the hub."""
    if name in HUB or name.endswith(".gguf"):
        return True
    path = Path(os.path.expanduser(name))
    config = (path if path.is_dir() else path.parent) / "config.json"
    try:
        return path.exists() and config.exists() and read_json(config).get("model_type", "gpt2") != "gpt2"
    except UserError:                                             # load_gpt2 will say what is wrong
        return False


def load_llama(name, n_vocab):
    """
    Return the trunk of that name as a Llama, on the CPU in float32, for a tokenizer with n_vocab tokens.

    name: a key of HUB, a folder as the hub has it, or a .gguf file. A vocabulary that is larger than the
    tokenizer's is padding, which is left out. Raises UserError where the files cannot be had or do not fit.
    """
    if name.endswith(".gguf"):
        from plumbing.gguf_file import read_gguf  # here: it needs a package that others do not
        config, tensors = read_gguf(name)
    else:
        folder = find_folder(name, "config.json", FILE)
        config = read_config(read_json(folder / "config.json"), folder / "config.json")
        path = Path(os.path.expanduser(name))
        weights = path if path.is_file() else find_weights(folder, name)
        found = read_sharded(weights) if weights.suffix == ".json" else read_safetensors(weights)
        tensors = from_hub_names(found, config, weights)
    size = config.vocab_size
    require(size >= n_vocab, f"the trunk {name} has {size} tokens, but the data's tokenizer has {n_vocab}; "
            f"prepare the data with --tokenizer={name}")
    config = LlamaConfig(**vars(config) | {"vocab_size": n_vocab})
    for key in {"wte.weight", "output"} & tensors.keys():
        tensors[key] = tensors[key][:n_vocab]
    trunk = Llama(config)
    load_state(trunk, tensors, name)                              # into float32
    return trunk


def find_folder(name, *files):
    """The folder of that name; for a key of HUB data/weights/NAME, to which the files are fetched.

    Weights are checked by the hub's hash. The hub has none for a small file, which must be whole JSON.
    """
    path = Path(os.path.expanduser(name))
    if name not in HUB or path.exists():
        return path if path.is_dir() else path.parent
    folder = Path("data/weights") / name
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    for file in files:
        url = f"{endpoint}/{HUB[name]}/resolve/main/{file}"
        if not (folder / file).exists():
            download(url, folder / file, sha256=hash_of_the_hub(url) if file == FILE else None)
    return folder


def read_json(path):
    """The dict in a JSON file. Raises UserError."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}")
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path} cannot be read ({e}); fetch the whole folder from the hub again") from None
    return found


# --------------------------------------------------------------------------------------------- config.json
def read_config(config, path):
    """Return the LlamaConfig of a config.json, a dict. Raises UserError where it is another network's."""
    kind = config.get("model_type")
    require(kind in FAMILIES, f"{path} has model_type={kind!r}; read here are: gpt2, {', '.join(FAMILIES)}")
    for key, values in OURS.items():
        require(config.get(key, values[-1]) in values, f"{path} has {key}={config.get(key)!r}, which is not "
                f"computed here; expected {values[0]!r}")
    layers = set(config.get("layer_types") or ()) - {"full_attention"}
    require(not layers, f"{path} has layers of type {', '.join(sorted(layers))}, which are not computed here")
    try:
        C = config["hidden_size"]
        n_head = config["num_attention_heads"]
        theta, scaling = read_rope(config, path)
        sizes = dict(
            block_size=config["max_position_embeddings"], vocab_size=config["vocab_size"],
            n_layer=config["num_hidden_layers"], n_head=n_head, n_embd=C,
            n_kv_head=config.get("num_key_value_heads") or n_head,
            head_size=config.get("head_dim") or C // n_head, n_hidden=config["intermediate_size"])
        if not all(type(size) is int for size in sizes.values()):
            raise ValueError("a size is not a whole number")
        return LlamaConfig(**sizes, norm_eps=float(config["rms_norm_eps"]), rope_theta=theta,
                           rope_scaling=scaling, qkv_bias=kind == "qwen2",
                           tied=bool(config.get("tie_word_embeddings", False)))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as e:
        raise UserError(f"{path} is not the config of a model of Llama's type ({type(e).__name__}: {e}); "
                        "fetch it from the hub again") from None


def read_rope(config, path):
    """(theta, scaling) as LlamaConfig has them. Older configs have two entries, newer ones a dict."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    require(kind in ("default", "llama3"),
            f"{path} has rope_type={kind!r}, which is not computed here; expected 'default' or 'llama3'")
    require(rope.get("partial_rotary_factor", 1) == 1, f"{path} has partial_rotary_factor="
            f"{rope.get('partial_rotary_factor')}, which is not computed here; expected 1")
    if kind == "default":
        return theta, ()
    return theta, (float(rope["factor"]), float(rope["low_freq_factor"]), float(rope["high_freq_factor"]),
                   int(rope["original_max_position_embeddings"]))


# ------------------------------------------------------------------------------------------------- tensors
def from_hub_names(tensors, config, path):
    """Return the tensors under llama.py's names. Raises UserError where a name or a number is strange."""
    names = {"model.embed_tokens.weight": "wte.weight", "model.norm.weight": "ln_f.weight",
             "lm_head.weight": "output"}
    for i in range(config.n_layer):
        for ours, theirs in NAMES.items():
            for end in ("weight", "bias"):
                names[f"model.layers.{i}.{theirs}.{end}"] = f"h.{i}.{ours}.{end}"
    found = {}
    for name, tensor in tensors.items():
        if name.endswith("rotary_emb.inv_freq"):                  # of old files; it follows from the config
            continue
        require(name in names, f"{path} holds {name}, which llama.py does not know; use a model of its type")
        require(tensor.is_floating_point(), f"{path}: {name} holds {tensor.dtype}, not floating-point "
                "numbers; fetch the weights without quantization")
        found[names[name]] = tensor
    if config.tied and "output" in found:
        head = found.pop("output")
        require(torch.equal(head, found.get("wte.weight", head)), f"{path}: lm_head.weight differs from the "
                "embedding, but its config has tie_word_embeddings")
    return found
