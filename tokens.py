"""
Texts to token ids, by GPT-2's tokenizer or the embedded task's tiny one, and what must hold for a text.
"""
import hashlib
import os
import random
import re
from functools import cache
from pathlib import Path

import tiktoken

from configurator import UserError, require
from files import download
from tasks import arithmetic

ENDOFTEXT = "<|endoftext|>"
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_FILES = {"vocab.bpe": (456318, "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
              "encoder.json": (1042301, "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783")}


def load_tokenizer(name):
    """The tiktoken Encoding "gpt2" or "arithmetic"; its only special token is <|endoftext|>."""
    if name == "arithmetic":
        return arithmetic_tokenizer()
    require(name == "gpt2", f"unknown tokenizer {name!r}; there are gpt2 and arithmetic")
    # tiktoken looks in this folder for sha1(url). With verified files there it never fetches anything itself.
    cache = os.environ.get("TIKTOKEN_CACHE_DIR") or str(Path(__file__).resolve().parent / "data" / "tiktoken")
    os.environ["TIKTOKEN_CACHE_DIR"] = cache
    for file, (size, sha256) in GPT2_FILES.items():
        url = GPT2_URL + file
        download(url, Path(cache) / hashlib.sha1(url.encode()).hexdigest(), size, sha256)
    return tiktoken.get_encoding("gpt2")


@cache
def arithmetic_tokenizer():
    """
    A tiny Encoding for the arithmetic task: 256 bytes, the numbers 0 to 99 with and without a leading space,
    and every word and sign of the generator's texts. tiktoken makes one token of a piece that is in the ranks
    as a whole; any other text falls back to smaller pieces, at worst bytes, so everything round-trips.
    """
    pattern = r"Question:|\nAnswer:| = <<|<<|>>|\.\n|####| ?[A-Za-z]+| ?[0-9]{1,3}| ?[^\sA-Za-z0-9]|\s"
    rng = random.Random(0)           # not --seed: the vocabulary is the same whatever the data
    problems = [make(rng) for make in (arithmetic.task_problem, arithmetic.mix_problem) for _ in range(3000)]
    text = "".join(f"{arithmetic.PROMPT.format(question)} {answer}" for question, answer in problems)
    numbers = {f"{space}{n}" for space in ("", " ") for n in range(arithmetic.MAX_NUMBER + 1)}
    pieces = set(re.findall(pattern, text)) | numbers
    ranks = {bytes([i]): i for i in range(256)}
    for piece in sorted(p.encode() for p in pieces):
        ranks.setdefault(piece, len(ranks))
    return tiktoken.Encoding("arithmetic", pat_str=pattern, mergeable_ranks=ranks,
                             special_tokens={ENDOFTEXT: len(ranks)})


def fingerprint(encoding):
    """Identifies what an Encoding does: data and checkpoints of another one are refused."""
    parts = (sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1]), encoding._pat_str,
             sorted(encoding._special_tokens.items()))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def encode_text(encoding, text, where):
    """Token ids of a text. Raises UserError, naming where, if it holds a special token."""
    if ENDOFTEXT in text:            # encode_ordinary would silently spell it with several tokens
        raise UserError(f"{where} contains the special token {ENDOFTEXT}; remove it")
    return encoding.encode_ordinary(text)


def encode_question(encoding, prompt, question):
    """Token ids of a user's own question in the format of a task, a string with one {}."""
    require(question.strip(), "the prompt is empty; write a question")
    return encode_text(encoding, prompt.format(question.strip()), "the prompt")


def choice_tokens(encoding, choices):
    """(ids, [id of each choice]): the choices as single next tokens, after the ids that they all begin with.

    GPT-2 has " A", " B", ... as one token each, so ids is empty. Raises UserError where no one token tells.
    """
    *spelt, = map(encoding.encode_ordinary, choices)
    first = spelt[0][:-1]
    if any(ids[:-1] != first for ids in spelt) or len({ids[-1] for ids in spelt}) < len(choices):
        raise UserError(f"no single token of {encoding.name} tells the choices {choices} apart; "
                        "leave out the likelihood of letters")
    return first, [ids[-1] for ids in spelt]
