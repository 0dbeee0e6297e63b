"""
Tokenizers of models on the hub: byte-level BPE, from tokenizer.json or a GGUF file, as a tiktoken Encoding.

A pattern cuts the text into words. In each word tiktoken merges the pair whose token has the lowest id, again
and again. The hub has a list of merges instead; we check that ids ascend along it, which makes both the same.
"""
import os
from pathlib import Path

from configurator import UserError, require
from plumbing.hub_encoding import HubEncoding
from plumbing.hub_weights import HUB, find_folder, read_config, read_json

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# each digit on its own, and then GPT-2's pattern on what lies between them, as one pattern
DIGITS_PATTERN = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                  r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
OTHERS = ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix")  # not computed here
OF_GGUF = {"gpt-2": (GPT2_PATTERN, ""), "smollm": (DIGITS_PATTERN, ""), "llama-bpe": (LLAMA3_PATTERN, ""),
           "qwen2": (QWEN2_PATTERN, "NFC")}                       # tokenizer.ggml.pre: pattern, normal form

# A question in the chat format of Instruct models, by a special token that only these models have
CHATML = "<|im_start|>system\n%s<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
CHATS = {
    "<|start_header_id|>":                                        # Llama 3
        "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "<|object_ref_start|>": CHATML % "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "<reponame>": CHATML % "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
}


def find_chat(name, special, end):
    """The chat format of a model with these special tokens. Raises UserError where none is known."""
    found = [chat for token, chat in CHATS.items() if token in special]
    require(found, f"--chat, but no chat format is known for {name}; leave it out, or add one to CHATS")
    require(end in found[0], f"--chat, but {name} ends a text with {end}, as a base model does, not with a "
            "turn; choose its Instruct model, or leave --chat out")
    return found[0]


def load_hub_tokenizer(name, chat=False):
    """
    Return the HubEncoding of the trunk with that name, or None where its folder has none.

    name: a key of HUB, a folder as the hub has it, or a .gguf file. chat: whether each prompt is put into the
    model's chat format. A text ends with the end of text that the model's config names. Of several it is the
    last, which ends a turn of Llama 3's Instruct models.
    """
    if name.endswith(".gguf"):
        from plumbing.gguf_file import read_gguf_tokenizer  # here: it needs a package that others do not
        parts = read_gguf_tokenizer(name)
        pattern_name = parts.pop("pattern_name")
        require(pattern_name in OF_GGUF, f"{name} has a tokenizer.ggml.pre={pattern_name!r}; read here are: "
                f"{', '.join(OF_GGUF)}")
        pattern, normal_form = OF_GGUF[pattern_name]
        return make_tokenizer(name, **parts, pattern=pattern, normal_form=normal_form, chat=chat)
    folder = find_folder(name, "config.json", "tokenizer.json")
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    config = read_json(folder / "config.json")
    end = config.get("eos_token_id")
    if isinstance(end, list):
        end = (end or [None])[-1]
    return make_tokenizer(name, **read_tokenizer_json(read_json(path), path), end=end, chat=chat)


def count_positions(name):
    """The most tokens that the trunk of that name can read."""
    if name.endswith(".gguf"):
        from plumbing.gguf_file import read_gguf_config
        return read_gguf_config(name).block_size
    path = find_folder(name, "config.json") / "config.json"
    config = read_json(path)
    return config.get("n_positions") or read_config(config, path).block_size        # the first is GPT-2's


def is_hub_tokenizer(name):
    """Whether load_hub_tokenizer makes a tokenizer for this name."""
    path = Path(os.path.expanduser(name)) / "tokenizer.json"
    return name in HUB or name.endswith(".gguf") or path.exists()


def make_tokenizer(name, vocab, merges, special, pattern, normal_form, begin, end, chat):
    """
    Return a HubEncoding. Raises UserError where tiktoken would encode differently.

    vocab: {text: token}, each byte of the text written as GPT-2 writes it. merges: pairs of texts, in order.
    special: {text: token}. begin: a text or "". end: a token. chat: whether prompts are turns of a chat.
    """
    letters = {letter: byte for byte, letter in bytes_as_letters().items()}
    names = {token: text for text, token in special.items()}
    try:
        ids = [vocab[a + b] for a, b in merges]
        ranks = {bytes(letters[letter] for letter in text): token
                 for text, token in vocab.items() if token not in names}
    except (KeyError, ValueError, TypeError) as e:
        raise UserError(f"the tokenizer of {name} is not a byte-level BPE ({type(e).__name__}: {e}); use "
                        "another model") from None
    require(ids == sorted(ids), f"the tokenizer of {name} merges in another order than that of its ids, "
            "which is not computed here; use another model")
    require(end in names, f"the config of {name} has eos_token_id={end!r}, which is not a special token of "
            "its tokenizer; name one there")
    chat = find_chat(name, special, names[end]) if chat else ""
    try:
        return HubEncoding(name, names[end], begin, normal_form, chat, pat_str=pattern, mergeable_ranks=ranks,
                           special_tokens=special)
    except (ValueError, KeyError) as e:
        raise UserError(f"tiktoken cannot make the tokenizer of {name} ({type(e).__name__}: {e}); use "
                        "another model") from None


def bytes_as_letters():
    """{byte: letter}, as GPT-2's files write bytes: printable ones as they are, others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def read_tokenizer_json(found, path):
    """Return arguments of make_tokenizer from the dict in a tokenizer.json. Raises UserError."""
    try:
        model = found["model"]
        strange = [f"{key}={model[key]!r}" for key in OTHERS if model.get(key)]
        if model.get("type", "BPE") != "BPE":
            strange.append(f"type={model['type']!r}")
        normal_form = (found.get("normalizer") or {"type": ""})["type"]
        if normal_form not in ("", "NFC"):
            strange.append(f"normalizer {normal_form}")
        pattern = read_pattern(found["pre_tokenizer"])
        if pattern is None:
            strange.append(f"pre_tokenizer {found['pre_tokenizer']}")
        merges = [tuple(merge.split(" ")) if isinstance(merge, str) else merge for merge in model["merges"]]
        special = {token["content"]: token["id"] for token in found["added_tokens"]}
        made = {a + b for a, b in merges} | set(special)
        whole = [text for text in model["vocab"] if len(text) > 1 and text not in made]
        if whole and not model.get("ignore_merges"):              # tiktoken would find these in a text
            strange.append(f"tokens that no merge makes ({', '.join(whole[:3])})")
        require(not strange, f"{path} has {', '.join(strange)}, which is not computed here; use another")
        return dict(vocab=model["vocab"], merges=merges, special=special, pattern=pattern,
                    normal_form=normal_form, begin=read_begin(found.get("post_processor")))
    except (KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path} is not the tokenizer.json of a byte-level BPE ({type(e).__name__}: {e}); "
                        "fetch it from the hub again") from None


def read_pattern(pre):
    """The pattern of a pre_tokenizer of tokenizer.json, or None where it is another one than those known."""
    parts = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    kinds = [part["type"] for part in parts]
    last = parts[-1]
    if kinds[-1] != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if kinds == ["ByteLevel"] and last.get("use_regex", True):
        return GPT2_PATTERN
    if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"] and last.get("use_regex", True):
        return DIGITS_PATTERN
    if kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
        if parts[0]["behavior"] == "Isolated" and not parts[0].get("invert"):
            return parts[0]["pattern"]["Regex"]
    return None


def read_begin(post):
    """The special token that a post_processor of tokenizer.json puts before each text, or ""."""
    parts = (post or {}).get("processors", [post or {}])
    for part in parts:
        if part.get("type") == "TemplateProcessing" and "SpecialToken" in part["single"][0]:
            return part["single"][0]["SpecialToken"]["id"]
    return ""
