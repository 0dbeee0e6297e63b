r"""
Turns problems into training data: text -> tokens, target mask, labels, manifest.

    python prepare_data.py arithmetic                   # generated here, no network
    python prepare_data.py gsm8k                        # downloads 4.9 MB (and GPT-2's tokenizer, 1.5 MB)
    python prepare_data.py jsonl --source=DIR           # your own {"question": ..., "answer": ...} a line
    python prepare_data.py mix                          # GSM8K, MBPP and MMLU, with their group as label

Every task takes the same path. A problem becomes its prompt, its answer and an end of text, such as

    Question: {question}\nAnswer: {answer}<|endoftext|>
    `------- prompt ------------´`------ target ------´

Prompt and answer are encoded separately, so a prompt has the same ids in training and in sampling.
What is written to data/<task>/, per split (train, val, test, ...):
    <split>.npz     tokens   (N,) uint16   all examples one after the other
                    mask     (N,) bool     True where the token counts as a target
                    offsets  (n+1,) int64  example i is tokens[offsets[i]:offsets[i+1]]
                    labels   (n,) uint8    label for guidance, an index into the manifest's label_names
    <split>.jsonl   the problems as text and all that scoring them needs
    manifest.json   tokenizer, prompt format, hashes, counts; written last: if it is there, all the rest is
"""
import json
import os
import shutil
import sys
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import numpy as np

from configurator import UserError, configure, require, run
from files import lock, write_file
from tasks import SEED, TASKS, TRAINED_ON, Problem, check_gold, rows
from tokens import ENDOFTEXT, encode_text, fingerprint, load_tokenizer

MAX_TOKENS = 1024                    # GPT-2's positions
TRAINING = (*TRAINED_ON, "val", "mix_val")           # training reads these: what is longer cannot stay


# ---------------------------------------------------------------------------------- writing
def encode_split(encoding, split, problems, label_names, drop_long):
    """The arrays of one split, the prompts' and answers' lengths (n, 2), and the problems that are kept."""
    tokens, mask, lengths, kept, long = [], [], [], [], []
    for p in problems:
        check_gold(p)
        prompt = encode_text(encoding, p.prompt, p.where)
        answer = encode_text(encoding, p.answer, p.where) + [encoding.eot_token]
        if len(prompt) + len(answer) > MAX_TOKENS:
            long.append(f"{p.where} ({len(prompt) + len(answer)} tokens)")
            if drop_long and split in TRAINING:
                continue
        tokens += prompt + answer
        mask += [False] * len(prompt) + [True] * len(answer)
        lengths.append((len(prompt), len(answer)))
        kept.append(p)
    if long:
        message = f"{len(long)} problems of {split} are longer than {MAX_TOKENS} tokens, first {long[0]}"
        if split in TRAINING and not drop_long:
            raise UserError(f"{message}; shorten them, or leave them out with --drop_long")
        print(f"note: {message}; " + ("left out" if split in TRAINING else "kept; what does not fit is cut"))
    require(kept, f"no problem of {split} has at most {MAX_TOKENS} tokens")
    lengths = np.array(lengths)
    arrays = dict(tokens=np.array(tokens, dtype=np.uint16), mask=np.array(mask, dtype=bool),
                  offsets=np.concatenate([[0], lengths.sum(1).cumsum()]).astype(np.int64),
                  labels=np.array([label_names.index(p.label) for p in kept], dtype=np.uint8))
    return arrays, lengths, kept


def json_row(problem):
    """A line of <split>.jsonl: what is empty is left out, and where it came from."""
    row = {k: v for k, v in problem._asdict().items() if v and k != "where"}
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()


def make(name, options, folder):
    """Writes the data of a task to a folder, and returns what to say about it, a string."""
    task = TASKS[name]
    splits, sources = task.load(options, folder.parent / "source")
    for split, n in task.counts.items():
        if len(splits.get(split, [])) != n:
            print(f"note: {split} has {len(splits.get(split, []))} problems, the original {n}")
    seen = {p.prompt for split in TRAINED_ON for p in splits.get(split, ())}
    for split, problems in splits.items():                   # in their order, not a set's
        if split not in TRAINED_ON and (n := sum(p.prompt in seen for p in problems)):
            print(f"note: {n} questions of {split} are in the training data, too: what is measured there is "
                  "in part what was learned by heart")
    label_names = list(task.labels or sorted({p.label for problems in splits.values() for p in problems}))
    require(len(label_names) <= 255, f"{len(label_names)} different labels; there may be 255")
    encoding = load_tokenizer(task.tokenizer if options.tokenizer == "auto" else options.tokenizer)
    report, counts, longest = [f"{name}: tokenizer {encoding.name} with {encoding.n_vocab} tokens"], {}, 0
    for split, problems in splits.items():
        arrays, lengths, kept = encode_split(encoding, split, problems, label_names, options.drop_long)
        write_file(folder / f"{split}.npz", lambda f: np.savez(f, **arrays))
        write_file(folder / f"{split}.jsonl", lambda f: f.writelines(map(json_row, kept)))
        (prompt, answer), (prompt_max, answer_max) = lengths.mean(0), lengths.max(0)
        report.append(f"  {split:8} {len(kept):6,} problems; tokens of prompt: mean {prompt:.1f}, max "
                      f"{prompt_max}; of answer: mean {answer:.1f}, max {answer_max}")
        counts[split] = len(kept)
        longest = max(longest, *(n for n in lengths.sum(1).tolist() if n <= MAX_TOKENS), 0)
    manifest = dict(task=name, tokenizer=encoding.name, fingerprint=fingerprint(encoding),
                    n_vocab=encoding.n_vocab, eot=encoding.eot_token, prompt=task.prompt, shots=task.shots,
                    strip_annotations=getattr(options, "strip_annotations", False), sources=sources,
                    seed=getattr(options, "seed", SEED), counts=counts, max_tokens=longest,
                    n_labels=len(label_names), label_names=label_names)
    write_file(folder / "manifest.json", lambda f: f.write((json.dumps(manifest, indent=2) + "\n").encode()))
    example = next(iter(splits.values()))[0]
    text = "\n" + example.prompt + example.answer + ENDOFTEXT
    return "\n".join([*report, "for example:"]) + text.replace("\n", "\n    ")


def prepare(name, options):
    """Makes the data of a task and prints what it made. What was there stays until the new data is whole."""
    out_dir = Path(os.path.expanduser(options.out_dir or f"data/{name}"))
    new, made = out_dir / ".new", not out_dir.exists()
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


# ---------------------------------------------------------------------------------- reading
class Split(NamedTuple):
    tokens: np.ndarray               # (N,) uint16
    mask: np.ndarray                 # (N,) bool, True where the token is a target
    offsets: np.ndarray              # (n+1,) int64
    labels: np.ndarray               # (n,) uint8
    problems: list                   # n Problems


def remedy(data_dir):
    """The command that makes the data of data_dir."""
    data_dir = Path(data_dir)
    task = data_dir.name if data_dir.name in TASKS else "|".join(TASKS)
    where = "" if str(data_dir) == f"data/{task}" else f" --out_dir={data_dir}"
    return f"python prepare_data.py {task}{where}"


def load_manifest(data_dir):
    """The manifest of prepared data, a dict. Raises UserError if there is none or it is damaged."""
    path = Path(os.path.expanduser(data_dir)) / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(manifest["counts"], dict) or manifest["n_labels"] != len(manifest["label_names"]):
            raise ValueError("counts or labels are wrong")
        for key in ("task", "tokenizer", "fingerprint", "n_vocab", "eot", "prompt", "shots", "max_tokens"):
            manifest[key]
    except OSError as e:
        raise UserError(f"no prepared data in {data_dir} ({path.name}: {e.strerror}); "
                        f"make it with: {remedy(data_dir)}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(f"{path} is damaged ({type(e).__name__}: {e}); make it again with: "
                        f"{remedy(data_dir)}") from None
    return manifest


def load_split(data_dir, split):
    """One split of prepared data, a Split. Raises UserError if it is missing or damaged."""
    manifest = load_manifest(data_dir)
    if split not in manifest["counts"]:
        raise UserError(f"{data_dir} has no split {split!r}; it has {', '.join(manifest['counts'])}")
    n, path = manifest["counts"][split], Path(os.path.expanduser(data_dir)) / f"{split}.npz"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            tokens, mask, offsets, labels = (arrays[key] for key in ("tokens", "mask", "offsets", "labels"))
        problems = [Problem(**{**row, "choices": tuple(row.get("choices", ()))}, where=where)
                    for row, where in rows(path.with_suffix(".jsonl"))]
        ends = offsets[1:] - 1
        checks = {"dtypes": [x.dtype for x in (tokens, mask, offsets, labels)] ==
                            [np.uint16, np.bool_, np.int64, np.uint8],
                  "counts": n == len(problems) == len(labels) == len(ends) and len(tokens) == len(mask),
                  "offsets": offsets[0] == 0 and offsets[-1] == len(tokens) and (np.diff(offsets) > 1).all(),
                  "tasks": all(p.task in TASKS for p in problems)}
        # short-circuit: what follows indexes with the offsets
        checks["tokens"] = all(checks.values()) and tokens.max() < manifest["n_vocab"] and \
            (tokens[ends] == manifest["eot"]).all() and mask[ends].all() and not mask[offsets[:-1]].any()
        checks["labels"] = [manifest["label_names"][i] for i in labels] == [p.label for p in problems]
        wrong = [name for name, fine in checks.items() if not fine]
        if wrong:
            raise ValueError(f"inconsistent {', '.join(wrong)}")
    except (Exception, UserError) as e:      # zipfile and numpy raise anything on a damaged file
        raise UserError(f"{path.with_suffix('')}.npz and .jsonl are missing or damaged ({e}); "
                        f"make them again with: {remedy(data_dir)}") from None
    return Split(tokens, mask, offsets, labels, problems)


# ---------------------------------------------------------------------------------- the command line
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
