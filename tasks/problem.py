"""
What a problem is, and how problems become tokens.
"""
from typing import NamedTuple

import numpy as np

from plumbing.dataset import Split
from plumbing.tokenizer import encode_answer, encode_prompt

PROMPT = "Question: {}\nAnswer:"         # GSM8K's, and that of most tasks. The answer follows after a space.
GROUPS = ("math", "code", "knowledge")   # of the benchmarks


class Problem(NamedTuple):
    prompt: str                      # the whole text that the model sees
    answer: str                      # the text that it should write, with the space or newline that begins it
    task: str                        # a key of TASKS, which scores it
    group: str = ""                  # what guidance may steer by, one of the task's groups
    subject: str = ""                # results are also given by subject
    choices: tuple = ()              # texts whose likelihood can be compared: " A", " B", ...
    test: str = ""                   # code that raises unless the answer before it is right
    place: str = ""                  # file and line, for messages


def encode_problem(encoding, problem):
    """
    Return the token ids of prompt and answer, two lists. The answer ends with <|endoftext|>.

    They are encoded apart, so that a prompt has the same ids in training and in sampling.
    """
    prompt = encode_prompt(encoding, problem.prompt, problem.place)
    answer = encode_answer(encoding, problem.answer, problem.place)
    return prompt, [*answer, encoding.eot_token]


def make_split(examples, groups, n_vocab):
    """Return the Split of examples, pairs (prompt ids, answer ids), and of the number of each one's group."""
    tokens = [token for prompt, answer in examples for token in prompt + answer]
    mask = [target for prompt, answer in examples for target in [False] * len(prompt) + [True] * len(answer)]
    offsets = np.cumsum([0, *(len(prompt) + len(answer) for prompt, answer in examples)])
    return Split(np.array(tokens, np.uint16 if n_vocab <= 1 << 16 else np.uint32), np.array(mask, bool),
                 offsets.astype(np.int64), np.array(groups, np.uint8))
