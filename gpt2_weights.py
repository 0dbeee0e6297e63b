"""
GPT-2's released weights: fetch, read and check them, and put them under the names of class GPT in model.py.
"""
import json
import math
import os
import re
import struct
from pathlib import Path

import requests
import torch

from configurator import UserError
from files import download

NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


def load_gpt2(name):
    """GPT-2's weights from a hub name, a .safetensors file or a directory that has one: (tensors, n_head, path).

    tensors: {name: float32 tensor} under the names of class GPT. Raises UserError where the file cannot be had, is
    damaged, or is not GPT-2.
    """
    path = Path(name) if os.path.exists(name) else download_weights(name)
    path = path / "model.safetensors" if path.is_dir() else path
    tensors = clean_names(read_safetensors(path), path)
    n_head = heads_from_config(path.parent / "config.json") or tensors["wte.weight"].shape[1] // 64   # as every released GPT-2
    return {k: v.float() for k, v in tensors.items()}, n_head, path


def download_weights(name):
    """The path of the weights with that hub name, fetched to data/weights if they are not there yet."""
    size = name.removeprefix("openai-community/")
    if size not in NAMES:
        raise UserError(f"error: no such trunk: {name!r} is neither a file, a directory nor one of {', '.join(NAMES)}")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    path, sha256, n_bytes = Path("data/weights") / size / "model.safetensors", None, None
    if path.exists():
        return path
    revision = "main"
    if size == "gpt2":
        revision, n_bytes = "607a30d783dfa663caf39e06633721c8d4cfcd7e", 548105171
        sha256 = "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"
    url = f"{endpoint}/openai-community/{size}/resolve/{revision}/model.safetensors"
    if sha256 is None:                          # the hub names the hash of a large file in the answer's header
        try:
            reply = requests.head(url, timeout=(10, 60))
            reply.raise_for_status()
        except requests.RequestException as e:
            raise UserError(f"error: cannot reach {url} ({e}); fetch model.safetensors by hand and pass its path")
        sha256 = reply.headers.get("X-Linked-Etag", "").strip('"')
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            raise UserError(f"error: {url} comes without a sha256 (X-Linked-Etag) to check it against; fetch it by hand and pass its path")
    download(url, path, n_bytes, sha256)
    return path


def heads_from_config(path):
    """n_head from the config.json beside the weights, checked to be GPT-2's kind of model; None without that file."""
    if not path.exists():
        return None
    try:
        config = json.loads(path.read_text())
        n_head = int(config["n_head"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"error: {path} is not the config of a GPT-2: it must be a JSON object with n_head")
    expected = {"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "layer_norm_epsilon": (1e-5,),
                "scale_attn_by_inverse_layer_idx": (False,)}
    for key, values in expected.items():
        if config.get(key, values[0]) not in values:
            raise UserError(f"error: {path} has {key}={config[key]}, but GPT-2 has {values[0]}; these weights would give other logits here")
    return n_head


def read_safetensors(path):
    """{name: tensor} of a .safetensors file: 8-byte little-endian header length, JSON header, raw tensors."""
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8, "BOOL": torch.bool}
    def bad(what):
        return UserError(f"error: {path} is not a valid .safetensors file ({what}); fetch it again")
    try:
        data = bytearray(Path(path).read_bytes())
    except OSError as e:
        raise UserError(f"error: cannot read the weights at {path}: {e.strerror}")
    if len(data) < 8 or (n := struct.unpack("<Q", data[:8])[0]) > 100_000_000 or n + 8 > len(data):
        raise bad("its header is cut short")
    try:
        header = json.loads(data[8:8 + n])
        assert isinstance(header, dict)
    except (ValueError, AssertionError):
        raise bad("its header is not JSON")
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        try:
            dtype, shape, (start, end) = dtypes[entry["dtype"]], entry["shape"], entry["data_offsets"]
            count = math.prod(shape)
            fits = all(type(z) is int and z >= 0 for z in (*shape, start, end)) \
                and end <= len(data) - n - 8 and end - start == count * dtype.itemsize
        except (KeyError, TypeError, ValueError):
            raise bad(f"the entry of {name} cannot be read")
        if not fits:
            raise bad(f"the tensor {name} does not lie inside the file; it may be cut short")
        tensors[name] = torch.frombuffer(data, dtype=dtype, count=count, offset=8 + n + start).view(shape) \
            if count else torch.empty(shape, dtype=dtype)
    return tensors


def clean_names(tensors, path):
    """The tensors under the names of class GPT, its linear weights the right way round."""
    transposed = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    out = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")) or name == "lm_head.weight":
            continue                            # the causal mask of old checkpoints; the tied head
        conv1d = name.endswith(transposed) and tensor.dim() == 2              # checkpoints have Conv1D: (in, out)
        out[name] = tensor.t() if conv1d else tensor
    if "lm_head.weight" in tensors and not torch.equal(tensors["lm_head.weight"], out.get("wte.weight", torch.empty(0))):
        raise UserError(f"error: {path}: lm_head.weight differs from wte.weight; GPT-2's head is tied")
    if any(name not in out or out[name].dim() != 2 for name in ("wte.weight", "wpe.weight")):
        raise UserError(f"error: {path} has no matrices wte.weight and wpe.weight; it is not GPT-2")
    return out
