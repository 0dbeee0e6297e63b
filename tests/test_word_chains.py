"""experiments/word_chains.py: what is asked has the answer that the sentences give."""
import random
import re
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"
sys.path.insert(0, str(EXPERIMENTS))
import word_chains

from llama import Llama, LlamaConfig

TINY = LlamaConfig(block_size=256, vocab_size=64, n_layer=3, n_head=2, n_kv_head=1, n_embd=16, head_size=8, n_hidden=16)


class Words:
    """A tokenizer that gives each word a number, with the space before it."""
    n_vocab = TINY.vocab_size

    def __init__(self):
        self.numbers = {}

    def encode_ordinary(self, text):
        words = re.findall(r"\n| ?\w+|[.]", text)
        assert "".join(words) == text
        return [self.numbers.setdefault(word, len(self.numbers)) for word in words]

    def decode(self, ids):
        words = list(self.numbers)
        return "".join(words[i] for i in ids)


def follow(text, name):
    """The end of the chain that name is in, by the sentences of a text, and the links on the way."""
    trusts = dict(re.findall(r"(\w+) trusts (\w+)\.", text))
    links = 0
    while trusts[name] != name:
        name = trusts[name]
        links += 1
    return name, links


@pytest.mark.parametrize("most_links", [1, 3, 8])
def test_every_answer_is_the_end_of_the_chain_that_the_sentences_give(most_links):
    encoding = Words()
    idx, (rows, columns), y, links = word_chains.draw_batch(encoding, random.Random(1), 30, most_links)
    assert max(links) == most_links and len(y) == len(links) == len(rows)
    for row, column, answer, n_links in zip(rows, columns, y, links):
        text = encoding.decode(idx[row, :column + 1].tolist())
        story = text.split("\n")[0]
        name = re.fullmatch(r"In the end (\w+) trusts", text.split("\n")[-1])[1]
        end, followed = follow(story, name)
        assert encoding.decode([answer]) == f" {end}" and followed == n_links
        assert idx[row, column + 1] == answer
        assert len(re.findall(r"\w+ trusts \w+\.", story)) == word_chains.N_PEOPLE


def test_no_chain_is_asked_about_twice():
    """Otherwise the answer to one question would be in the text before another one."""
    rng = random.Random(2)
    for _ in range(200):
        sentences, questions = word_chains.draw_text(rng, word_chains.MOST_LINKS)
        ends = [follow("".join(sentences), name)[0] for name, _, _ in questions]
        assert len(set(ends)) == len(ends) <= word_chains.N_ASKED


def test_runs_from_end_to_end(tmp_path, monkeypatch, capsys):
    """The trunk, L2D and a control of few steps, and their table."""
    monkeypatch.setattr(word_chains, "HERE", tmp_path)
    monkeypatch.setattr(word_chains, "N_TEST", 30)
    monkeypatch.setattr(word_chains, "STEPS", (1, 2, 4, 8))
    few = {method: [(2, 3, 2), (2, 8, 2)] for method in ("trunk", "l2d", "full", "lora")}
    monkeypatch.setattr(word_chains, "PHASES", few)
    monkeypatch.setattr(word_chains, "load_hub_tokenizer", lambda name: Words())
    monkeypatch.setattr(word_chains, "load_llama", lambda name, n_vocab: Llama(TINY))
    assert "make it first, with --method=trunk" in error_of_run(tmp_path, "l2d")
    for method in ("trunk", "l2d", "full", "lora"):
        word_chains.main([f"--method={method}", f"--out_dir={tmp_path}"])
    word_chains.main([f"--out_dir={tmp_path}"])
    printed = capsys.readouterr().out
    assert "| L2D | 8 | 1 |" in printed and "L2D at T = 8 minus LoRA on the trunk" in printed
    assert '"minus_2"' in (tmp_path / "word_chains.json").read_text()


def error_of_run(folder, method):
    with pytest.raises(word_chains.UserError) as error:
        word_chains.main([f"--method={method}", f"--out_dir={folder}"])
    return str(error.value)
