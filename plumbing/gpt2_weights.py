"""
GPT-2's released weights: fetch, read and check them, and put them under the names of class GPT in model.py.
"""
import json
import math
import os
from pathlib import Path

import torch

from configurator import UserError, out_of_memory, require
from model import GPT, GPTConfig
from plumbing.checkpoint import load_state
from plumbing.download import download, hash_of_the_hub

GPT2_SIZES = {
    "gpt2":        GPTConfig(),                                   # 124M parameters
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),  # 355M
    "gpt2-large":  GPTConfig(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl":     GPTConfig(n_layer=48, n_head=25, n_embd=1600),  # 1558M
}
PINNED = {"gpt2": ("607a30d783dfa663caf39e06633721c8d4cfcd7e", 548105171,
                   "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707")}
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
# how other files begin that somebody may take for .safetensors
PICKLE = "a pickle of PyTorch, which may run code"
OTHERS = {b"PK": PICKLE, b"\x80": PICKLE, b"GGUF": "GGUF", b"\x89HDF": "HDF5, as TensorFlow writes it",
          b"version https://git-lfs": "a pointer of Git LFS, for which git lfs pull fetches the file",
          b"<": "a web page"}
# What a GPT-2 config may say that changes what the network computes, and what it says of ours.
OURS = {"model_type": ("gpt2",), "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (1e-5,), "scale_attn_weights": (True,), "pruned_heads": ({}, None),
        "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
        "tie_word_embeddings": (True,)}


def load_gpt2(name):
    """
    Return GPT-2 as a GPT, on the CPU in float32.

    name: a size, a .safetensors file or a folder that has one. Raises UserError where the file cannot be had,
    is damaged, or is not GPT-2.
    """
    path = Path(os.path.expanduser(name))
    path = find_weights(path, name) if path.exists() else download_weights(name)
    tensors = clean_names(read_sharded(path) if path.name == INDEX else read_safetensors(path), path)
    vocab_size, n_embd = tensors["wte.weight"].shape
    block_size = len(tensors["wpe.weight"])
    n_layer = len({key.split(".")[1] for key in tensors if key.startswith("h.")})
    config = path.parent / "config.json"
    n_head = n_embd // 64
    if config.exists():
        n_head = check_config(config, tensors)
    elif n_embd % 64:
        raise UserError(f"{path} does not tell the number of heads; put its config.json beside it")
    elif path.parent.parent != Path("data/weights"):            # those are the hub's, whose heads are known
        print(f"note: there is no {config}; assumed {n_head} heads of 64, as every released GPT-2 has")
    trunk = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd))
    load_state(trunk, {k: v.float() for k, v in tensors.items()}, path)
    return trunk


def find_weights(path, name):
    """Return the file with the weights at path, a file or a folder. Raises UserError unless there is one."""
    if not path.is_dir():
        return path
    names = sorted(file.name for file in path.iterdir())
    found = [file for file in (FILE, INDEX) if file in names]
    found = found or [file for file in names if file.endswith(".safetensors")]
    if len(found) == 1:
        return path / found[0]
    runs = [file for file in ("best.pt", "last.pt") if file in names]
    if found:
        remedy = f"name the file to read, such as --trunk={path / found[0]}"
    elif runs:
        remedy = f"it is a run of train.py, so write --trunk={path / runs[0]}"
    elif any(file.startswith("pytorch_model") for file in names):   # a pickle, which may run code
        remedy = f"convert it: python -c \"from transformers import GPT2LMHeadModel as M; " \
                 f"M.from_pretrained('{path}').save_pretrained('{path}')\""
    elif name in GPT2_SIZES:
        remedy = f"it hides the hub's name, so for those weights write --trunk=openai-community/{name}"
    else:
        remedy = f"fetch {FILE} into it"
    raise UserError(f"the folder {path} has {'several files of weights' if found else f'no {FILE}'} "
                    f"(it has: {', '.join(names[:8]) or 'nothing'}); {remedy}")


def download_weights(name):
    """The path of the weights with that hub name, fetched to data/weights if they are not there yet."""
    size = name.removeprefix("openai-community/")
    require(size in GPT2_SIZES, f"no such trunk: {name!r} is neither a file, a directory nor one of "
            f"{', '.join(GPT2_SIZES)}")
    path = Path("data/weights") / size / FILE
    if path.exists():
        return path
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    revision, n_bytes, sha256 = PINNED.get(size, ("main", None, None))
    url = f"{endpoint}/openai-community/{size}/resolve/{revision}/{FILE}"
    return download(url, path, n_bytes, sha256 or hash_of_the_hub(url))


def check_config(path, tensors):
    """n_head from the config.json beside the weights. Raises UserError if it is another model's than ours."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        n_head = config["n_head"]
        if type(n_head) is not int or n_head < 1:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path} is not the config of a GPT-2: it must be a JSON object with "
                        "n_head, a whole number above 0") from None
    (vocab_size, n_embd), n_positions = tensors["wte.weight"].shape, tensors["wpe.weight"].shape[0]
    n_layer = len({name.split(".")[1] for name in tensors if name.startswith("h.")})
    ours = OURS | {"n_inner": (None, 4 * n_embd), "vocab_size": (vocab_size,), "n_embd": (n_embd,),
                   "n_positions": (n_positions,), "n_layer": (n_layer,)}
    for key, values in ours.items():
        require(config.get(key, values[0]) in values, f"{path} has {key}={config.get(key)}, but GPT-2 with "
                f"these weights has {values[0]}; they would give other logits here")
    return n_head


def read_sharded(path):
    """Return {name: tensor} of the shards that an index names: {"weight_map": {tensor: file}}."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=without_repetition)
        places = index["weight_map"]
        files = {file: read_safetensors(path.parent / file) for file in sorted(set(places.values()))}
        return {name: files[file][name] for name, file in places.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{path} does not fit the files beside it ({type(e).__name__}: {e}); fetch "
                        "all of them again") from None


def without_repetition(pairs):
    """Return the dict of a JSON object. Raises ValueError where a key occurs twice."""
    found = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key} occurs twice")
        found[key] = value
    return found


def read_safetensors(path):
    """Return {name: tensor} of a .safetensors file.

    It holds 8 bytes with the length of the header, little-endian, the header as JSON, and the tensors' bytes.
    """
    try:
        data = bytearray(os.path.getsize(path))
        with open(path, "rb") as file:
            del data[file.readinto(data):]
    except OSError as e:
        raise UserError(f"cannot read the weights at {path}: {e.strerror}") from None
    if data[8:9] != b"{":
        kinds = [kind for begin, kind in OTHERS.items() if data.startswith(begin)]
        raise UserError(f"{path} is not a .safetensors file, but {(kinds or ['something else'])[0]}; give a "
                        ".safetensors file")
    begin = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    name = "header"
    try:
        text = data[8:begin] if begin < 100_000_000 else b""
        header = json.loads(text, object_pairs_hook=without_repetition)
        header.pop("__metadata__", None)
        for name, entry in header.items():
            kind, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            require(type(kind) is not str or kind in DTYPES, f"{path}: {name} has type {kind}, which is not "
                    f"read here; convert it to one of {', '.join(DTYPES)}")
            dtype = DTYPES[kind]
            sound = all(type(z) is int and 0 <= z < 2 ** 63 for z in (*shape, start, end))
            count = math.prod(shape) if sound else -1
            if end > len(data) - begin or end - start != count * dtype.itemsize:
                raise ValueError("it does not lie inside the file")
            flat = torch.empty(0, dtype=dtype)
            if count:
                flat = torch.frombuffer(data, dtype=dtype, count=count, offset=begin + start)
            tensors[name] = flat.view(shape)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, RecursionError) as e:
        if out_of_memory(e):
            raise
        raise UserError(f"{path} is not a whole .safetensors file: its {name} cannot be read "
                        f"({type(e).__name__}: {e!s:.200}); replace it") from None
    return tensors


def clean_names(tensors, path):
    """Return the tensors under the names of class GPT, its linear weights the right way round."""
    transposed = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    found = {}
    for full_name, tensor in tensors.items():
        name = full_name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")) or name == "lm_head.weight":
            continue                                            # the causal mask of old files; the tied head
        require(name not in found, f"{path} holds {name} twice, with and without transformer. before it; "
                "keep one of them")
        require(tensor.is_floating_point(), f"{path}: {name} holds {tensor.dtype}, not floating-point "
                "numbers; fetch the weights without quantization")
        conv1d = name.endswith(transposed) and tensor.dim() == 2        # GPT-2's files store (in, out)
        found[name] = tensor.t() if conv1d else tensor
    if any(name not in found or found[name].dim() != 2 for name in ("wte.weight", "wpe.weight")):
        raise UserError(f"{path} has no matrices wte.weight and wpe.weight; it is not GPT-2")
    head = tensors.get("lm_head.weight", found["wte.weight"])
    require(torch.equal(head, found["wte.weight"]),
            f"{path}: lm_head.weight differs from wte.weight; GPT-2's head is tied")
    first = found.get("h.0.attn.c_attn.weight", head)
    require(first is head or len(first) != first.size(1) // 3,
            f"{path} stores its linear weights as (out, in), as nanoGPT does, but GPT-2's files store "
            "(in, out): save c_attn, c_proj and c_fc transposed")
    return found
