"""plumbing/tokenizer.py: a description is enough to make the same tokenizer again."""
import json

import pytest
import tiktoken
from helpers import error_of, says

from plumbing.tokenizer import ENDOFTEXT, describe_tokenizer, encode_text, load_tokenizer

BYTES = {bytes([i]): i for i in range(256)}
TINY = tiktoken.Encoding("tiny", pat_str=r"[a-z]+|(?s:.)", mergeable_ranks=BYTES | {b"ab": 256, "\u00e4".encode(): 257},
                         special_tokens={ENDOFTEXT: 258})


@pytest.mark.parametrize("text", ["", "ab abba", "Kärcher ∑ \0\n", "\U0001f600"])
def test_a_tokenizer_that_was_described_as_json_encodes_alike(text):
    copy = load_tokenizer(json.loads(json.dumps(describe_tokenizer(TINY))))
    assert copy.encode_ordinary(text) == TINY.encode_ordinary(text) and copy.decode(copy.encode_ordinary(text)) == text
    assert (copy.name, copy.n_vocab, copy.eot_token) == ("tiny", 259, 258)


@pytest.mark.parametrize("change", [dict(name=None), dict(pieces=None), dict(pieces=["a"]), dict(pattern="("), dict(pattern="x"),
                                    dict(special={}), dict(special=3), dict(fingerprint="0"), dict(pieces=["\u2211"])])
def test_a_damaged_description_is_one_line(change):
    damaged = {k: v for k, v in (describe_tokenizer(TINY) | change).items() if v is not None}
    says(error_of(load_tokenizer, damaged), "the tokenizer that came with the data or the checkpoint is damaged")


def test_a_special_token_in_a_text_is_refused():
    says(error_of(encode_text, TINY, f"a{ENDOFTEXT}", "line 3"), "line 3", "remove it")
