"""
Tokenizers: GPT-2's, which is fetched, and others, which data and checkpoints carry whole.

hub_tokenizer.py reads those of models on the hub.
"""
import hashlib
import os
from pathlib import Path

import tiktoken

from configurator import UserError, require

ROOT = Path(__file__).resolve().parent.parent
ENDOFTEXT = "<|endoftext|>"
GPT2 = {"name": "gpt2", "fingerprint": "0864d949365dfbe6"}
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_FILES = {"vocab.bpe": (456318, "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
              "encoder.json": (1042301, "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783")}


def describe_tokenizer(encoding):
    """Return what load_tokenizer needs to make this tiktoken Encoding again, a dict.

    name, fingerprint; unless it is GPT-2's, also pattern, pieces (the bytes of token 0, 1, ... as latin-1,
    None for a special one), special ({text: token}), and for a HubEncoding more, further arguments of it.
    """
    description = {"name": encoding.name, "fingerprint": fingerprint(encoding)}
    if encoding.name != GPT2["name"]:
        pieces = [None] * (1 + max(encoding._mergeable_ranks.values()))
        for piece, token in encoding._mergeable_ranks.items():
            pieces[token] = piece.decode("latin-1")
        description["pattern"] = encoding._pat_str
        description["pieces"] = pieces
        description["special"] = encoding._special_tokens
    if hasattr(encoding, "more"):
        description["more"] = encoding.more
    return description


def load_tokenizer(description):
    """Return the tiktoken Encoding that was described. Raises UserError where it cannot be made."""
    try:
        name = description["name"]
        if name == GPT2["name"]:
            encoding = load_gpt2_tokenizer()
        else:
            ranks = {piece.encode("latin-1"): token for token, piece in enumerate(description["pieces"])
                     if piece is not None}
            make = tiktoken.Encoding
            if "more" in description:
                from plumbing.hub_encoding import HubEncoding as make
            encoding = make(name, pat_str=description["pattern"], mergeable_ranks=ranks,
                            special_tokens=description["special"], **description.get("more", {}))
        if fingerprint(encoding) != description["fingerprint"]:
            raise ValueError("its fingerprint is another one")
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise UserError("the tokenizer that came with the data or the checkpoint is damaged "
                        f"({type(e).__name__}: {e}); make them again") from None
    return encoding


def load_gpt2_tokenizer():
    from plumbing.download import download  # here: other tokenizers are not fetched

    # tiktoken looks in this folder for sha1(url). With verified files there it fetches nothing itself.
    folder = Path(os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(ROOT / "data" / "tiktoken")))
    for file, (size, sha256) in GPT2_FILES.items():
        url = GPT2_URL + file
        download(url, folder / hashlib.sha1(url.encode()).hexdigest(), size, sha256)
    return tiktoken.get_encoding("gpt2")


def fingerprint(encoding):
    """Return 16 hexadecimal digits that differ where two Encodings encode a text differently."""
    parts = (sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1]), encoding._pat_str,
             sorted(encoding._special_tokens.items()))
    if hasattr(encoding, "more"):
        parts += (sorted((k, v) for k, v in encoding.more.items() if k != "chat"),)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def encode_text(encoding, text, place):
    """Return the token ids of a text. Raises UserError, naming place, if it holds what cannot be encoded."""
    for special in encoding._special_tokens:  # encode_ordinary would silently spell it with several tokens
        require(special not in text, f"{place} contains the special token {special}; remove it")
    unknown = [c for c in set(text) if not all(bytes([b]) in encoding._mergeable_ranks for b in c.encode())]
    require(not unknown, f"{place} contains {unknown}, for which {encoding.name} has no token; remove it")
    return encoding.encode_ordinary(text)


def encode_prompt(encoding, text, place):
    """Return the token ids of a text that the model is to continue. Raises UserError as encode_text does."""
    ids = encode_text(encoding, text, place)
    return [*encoding.before, *ids, *encoding.after] if hasattr(encoding, "more") else ids


def encode_answer(encoding, text, place):
    """Return the token ids of what follows a prompt, without the end of text. Raises UserError, too."""
    if hasattr(encoding, "more") and encoding.more["chat"]:
        text = text.lstrip()                                      # a turn begins without a space
    return encode_text(encoding, text, place)


def encode_question(encoding, prompt, question):
    """Return the token ids of a user's own question in the format of a task, a string with one {}."""
    require(question.strip(), "the prompt is empty; write a question")
    return encode_prompt(encoding, prompt.format(question.strip()), "the prompt")


def choice_tokens(encoding, choices):
    """Return (ids, [token of each choice]): the choices as single tokens, after the ids that all begin with.

    GPT-2 has " A", " B", ... as one token each, so ids is empty. Raises UserError where no single token tells
    the choices apart.
    """
    spelt = [encoding.encode_ordinary(choice) for choice in choices]
    first = spelt[0][:-1]
    if any(ids[:-1] != first for ids in spelt) or len({ids[-1] for ids in spelt}) < len(choices):
        raise UserError(f"no single token of {encoding.name} tells the choices {choices} apart; "
                        "leave out the likelihood of letters")
    return first, [ids[-1] for ids in spelt]
