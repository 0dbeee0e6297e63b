r"""
Turns problems into training data: text -> tokens, target mask, groups, manifest.

    python prepare_data.py arithmetic                   # generated here, no network
    python prepare_data.py gsm8k                        # downloads 4.9 MB, and GPT-2's tokenizer, 1.5 MB
    python prepare_data.py gsm8k --tokenizer=SmolLM2-135M --out_dir=data/gsm8k_smollm2      # of another trunk
    python prepare_data.py jsonl --source=DIR           # your own: {"question": ..., "answer": ...} a line
    python prepare_data.py mix                          # GSM8K, MBPP and MMLU, each a group for guidance

Every task takes the same path. A problem becomes its prompt, its answer and an end of text, such as

    Question: {question}\nAnswer: {answer}<|endoftext|>
    `------- prompt ------------´`------ target ------´

This is what is written to data/<task>/, for each split (train, val, test, ...):
    <split>.npz     tokens   (N,) uint16   all examples one after the other (uint32 for large vocabularies)
                    mask     (N,) bool     True where the token counts as a target
                    offsets  (n+1,) int64  example i is tokens[offsets[i]:offsets[i+1]]
                    groups   (n,) uint8    group for guidance, an index into the manifest's group_names
    <split>.jsonl   the problems as text, and all that scoring them needs
    manifest.json   tokenizer, prompt format, hashes, counts; written last: if it is there, all the rest is
"""
import json
import os
import shutil
import sys
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from configurator import UserError, configure, require, run
from plumbing.files import lock, write_file
from plumbing.tokenizer import describe_tokenizer
from tasks import TASKS, TOKENIZERS, TRAINED_ON, check_gold
from tasks.problem import encode_problem, make_split
from tasks.sources import SEED

MAX_TOKENS = 1024                    # GPT-2's positions
TRAINING = (*TRAINED_ON, "val", "mix_val")           # training reads these: what is longer cannot stay


# ---------------------------------------------------------------------------------- problems to tokens
def choose_tokenizer(name, chat):
    """Return the Encoding of that name, and how many tokens a trunk with it can read."""
    require(not (chat and name in TOKENIZERS), f"--chat does nothing with tokenizer={name}, which has none")
    if name in TOKENIZERS:
        return TOKENIZERS[name](), MAX_TOKENS
    from plumbing.hub_tokenizer import count_positions, is_hub_tokenizer, load_hub_tokenizer
    from plumbing.hub_weights import HUB

    require(is_hub_tokenizer(name), f"tokenizer={name!r}, but it must be auto, {', '.join(TOKENIZERS)}, a "
            f"folder with a tokenizer.json, a .gguf file, or one of {', '.join(HUB)}")
    return load_hub_tokenizer(name, chat), count_positions(name)


def encode_split(encoding, split, problems, group_names, drop_long, most):
    """Return a Split, the lengths (n, 2) of its prompts and answers, and its problems: those kept.

    most: the tokens that a trunk can read.
    """
    examples = []
    kept = []
    long = []
    for problem in problems:
        check_gold(problem)
        prompt, answer = encode_problem(encoding, problem)
        if len(prompt) + len(answer) > most:
            long.append(f"{problem.place} ({len(prompt) + len(answer)} tokens)")
            if drop_long and split in TRAINING:
                continue
        examples.append((prompt, answer))
        kept.append(problem)
    if long:
        message = f"{len(long)} problems of {split} are longer than {most} tokens, first {long[0]}"
        require(drop_long or split not in TRAINING,
                f"{message}; shorten them, or leave them out with --drop_long")
        print(f"note: {message}; " + ("left out" if split in TRAINING else "kept; what does not fit is cut"))
    require(kept, f"no problem of {split} has at most {most} tokens")
    data = make_split(examples, [group_names.index(problem.group) for problem in kept], encoding.n_vocab)
    return data, np.array([(len(prompt), len(answer)) for prompt, answer in examples]), kept


def name_groups(task, splits):
    """Return the names of the task's groups, or of those that its problems have. UserError if they differ."""
    found = {problem.group: problem for problems in splits.values() for problem in problems}
    names = list(task.groups or sorted(found))
    require(len(names) <= 255, f"{len(names)} different groups; there may be 255")
    for group, problem in found.items():
        require(group in names, f"{problem.place} has the group {group!r}, but those of its task are: "
                f"{', '.join(names)}; give it one of them, or let the task take any, with groups=()")
    return names


def json_row(problem):
    """The dict for a line of <split>.jsonl. It leaves out what is empty, and the place."""
    return {k: v for k, v in problem._asdict().items() if v and k != "place"}


def write_split(folder, split, data, problems):
    """Write a Split to <split>.npz, and its problems, dicts in the same order, to <split>.jsonl."""
    lines = [json.dumps(problem, ensure_ascii=False) + "\n" for problem in problems]
    write_file(Path(folder) / f"{split}.npz", lambda file: np.savez(file, **data._asdict()))
    write_file(Path(folder) / f"{split}.jsonl", lambda file: file.write("".join(lines).encode()))


def write_manifest(folder, manifest):
    text = json.dumps(manifest, indent=2) + "\n"
    write_file(Path(folder) / "manifest.json", lambda file: file.write(text.encode()))


def make(name, options, folder):
    """Write the data of a task to a folder, and return what to say about it, a string."""
    task = TASKS[name]
    splits, sources = task.load(options, folder.parent / "source")
    warn(task, splits)
    group_names = name_groups(task, splits)
    name_of_tokenizer = task.tokenizer if options.tokenizer == "auto" else options.tokenizer
    encoding, most = choose_tokenizer(name_of_tokenizer, options.chat)
    report = [f"{name}: tokenizer {encoding.name} with {encoding.n_vocab} tokens"]
    counts = {}
    longest = 0
    for split, problems in splits.items():
        data, lengths, kept = encode_split(encoding, split, problems, group_names, options.drop_long, most)
        write_split(folder, split, data, map(json_row, kept))
        (prompt, answer), (prompt_max, answer_max) = lengths.mean(0), lengths.max(0)
        report.append(f"  {split:8} {len(kept):6,} problems; tokens of prompt: mean {prompt:.1f}, max "
                      f"{prompt_max}; of answer: mean {answer:.1f}, max {answer_max}")
        counts[split] = len(kept)
        longest = max(longest, *(n for n in lengths.sum(1).tolist() if n <= most), 0)
    write_manifest(folder, dict(
        task=name, tokenizer=describe_tokenizer(encoding), n_vocab=encoding.n_vocab, eot=encoding.eot_token,
        prompt=task.prompt, shots=task.shots, counts=counts, max_tokens=longest, group_names=group_names,
        sources=sources, seed=getattr(options, "seed", SEED),
        strip_annotations=getattr(options, "strip_annotations", False),
        **({"chat": True} if options.chat else {})))
    prompt, answer = encode_problem(encoding, next(iter(splits.values()))[0])
    text = "\n" + encoding.decode([*prompt, *answer])
    return "\n".join([*report, "for example:"]) + text.replace("\n", "\n    ")


def warn(task, splits):
    """Print how the problems differ from the original's, and which of them are in the training data, too."""
    for split, n in task.counts.items():
        if len(splits.get(split, [])) != n:
            print(f"note: {split} has {len(splits.get(split, []))} problems, the original {n}")
    seen = {problem.prompt for split in TRAINED_ON for problem in splits.get(split, ())}
    for split, problems in splits.items():
        n = sum(problem.prompt in seen for problem in problems)
        if split not in TRAINED_ON and n:
            print(f"note: {n} questions of {split} are in the training data, too: part of what is measured "
                  "there was learned by heart")


# ---------------------------------------------------------------------------------- folder and command line
def prepare(name, options):
    """Make the data of a task and print what was made. What was there stays until the new data is whole."""
    out_dir = Path(options.out_dir or f"data/{name}")
    new = out_dir / ".new"
    made = not out_dir.exists()
    for path in out_dir.glob("*.jsonl"):                     # ours has its .npz beside it
        require(path.with_suffix(".npz").exists(), f"{path} was not written by prepare_data.py and would be "
                f"lost; choose another --out_dir than {out_dir}")
    held = lock(new)                                         # one at a time; and we may write here
    try:
        for path in new.iterdir():                           # of a run that was killed
            if path.name != "lock":
                path.unlink()
        report = make(name, options, new)
        (out_dir / "manifest.json").unlink(missing_ok=True)  # from here on it is the new data or none
        for path in sorted(new.iterdir(), key=lambda path: (path.suffix == ".json", path.suffix == ".jsonl")):
            if path.name != "lock":
                os.replace(path, out_dir / path.name)
    except BrokenPipeError:
        raise
    except OSError as e:
        raise UserError(f"cannot write {e.filename or out_dir}: {e.strerror}") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
        held.close()
        if made:
            with suppress(OSError):
                out_dir.rmdir()                              # if nothing has come into it
    print(f"{report}\nwritten to {out_dir}")


USAGE = "python prepare_data.py {" + "|".join(TASKS) + "} [--option=value ...]"


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {USAGE}\noptions of a task: python prepare_data.py <task> --help")
        return
    if argv[0] not in TASKS:
        guess = "".join(f"; did you mean {near}?" for near in get_close_matches(argv[0], TASKS, 1))
        raise UserError(f"unknown task {argv[0]!r}{guess} Usage: {USAGE}")
    for word in argv[1:]:
        if not word.startswith("-"):  # configure would take it for a config file
            raise UserError(f"unexpected word {word!r}; options are written --option=value")
    usage = f"python prepare_data.py {argv[0]} [--option=value ...]"
    prepare(argv[0], configure(TASKS[argv[0]].options, argv[1:], usage))


if __name__ == "__main__":
    run(main)
