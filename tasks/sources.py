"""
Where problems come from: files with a problem on each line, downloaded or the user's own.
"""
import gzip
import hashlib
import json
import zlib
from dataclasses import dataclass
from pathlib import Path

from configurator import UserError, require
from plumbing.download import download, file_sha256

SEED = 1337                              # of what is held out for validation


# The options of prepare_data.py for a task. --help prints the comments.
@dataclass(frozen=True)
class Options:
    out_dir: str = ""                    # folder that the data is written to; empty: data/<task>
    tokenizer: str = "auto"              # auto: the task's; gpt2, arithmetic, or a trunk of Llama's type
    chat: bool = False                   # ask in the chat format of the Instruct model that --tokenizer is of
    drop_long: bool = False              # leave out training problems that are longer than the trunk can read


@dataclass(frozen=True)
class FileOptions(Options):
    source: str = ""                     # folder with the task's files, or its only file; empty: download


@dataclass(frozen=True)
class HeldOutOptions(FileOptions):
    val: int = 500                       # training problems held out for validation, unless a file has them
    strip_annotations: bool = False      # remove the calculator annotations <<...>> from the answers


def read_lines(path):
    """Yield (object, "FILE line N") for each line of a JSONL file, gzipped or not. Raises UserError."""
    try:
        data = Path(path).read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text: {e}") from None
    for number, line in enumerate(text.split("\n"), 1):      # not splitlines: U+2028 may be in a string
        if not line.strip():
            continue
        place = f"{path} line {number}"
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()     # a lone surrogate is no text
        except (ValueError, RecursionError, MemoryError) as e:
            raise UserError(f"{place} is not JSON that can be read: {e}") from None
        yield row, place


def get_texts(row, place, *keys):
    """Return the texts under the keys of a row. Raises UserError if one is not there."""
    for key in keys:
        if not isinstance(row, dict) or not isinstance(row.get(key), str) or not row[key].strip():
            expected = ", ".join(f'"{k}": "..."' for k in keys)
            raise UserError(f'{place} has no text "{key}"; expected {{{expected}}}')
    return [row[key].replace("\r\n", "\n") for key in keys]


def is_texts(value):
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def obtain(options, folder, sources, file, url="", size=None, sha256=None, lone=False):
    """
    Return the path of a source file, and put its sha256 into the dict sources.

    It is in --source, or is --source itself, which lone allows. Without --source it is downloaded to folder.
    """
    path = Path(options.source or folder)
    path = path if lone and path.is_file() else path / file
    if not options.source:
        if not url.startswith("https:"):
            raise UserError(f"this is not downloaded; give --source=DIR, a folder with {file}{url}")
        download(url, path, size, sha256)
    try:
        sources[file] = file_sha256(path)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}; --source needs {file} in it") from None
    if sha256 and sources[file] != sha256:
        print(f"note: {path} is not the original file (sha256 {sources[file]})")
    return path


def make_loader(make, files, optional=()):
    """
    Return a loader of files with a problem on each line.

    make(row, place, options) returns (split, Problem), with "" for the split of the file.
    files: {split: (name, url, size, sha256)}. Files of the optional splits may be absent from --source.
    If the options have val, that many training problems become the validation split, unless a file has it.
    """
    def load(options, folder):
        splits = {}
        sources = {}
        for split, (file, *known) in files.items():
            if split in optional and not (Path(options.source or folder) / file).exists():
                continue
            path = obtain(options, folder, sources, file, *known, lone=len(files) == 1 + len(optional))
            found = [make(row, place, options) for row, place in read_lines(path)]
            require(found, f"{path} holds no problems")
            for own, problem in found:
                splits.setdefault(own or split, []).append(problem)
        if hasattr(options, "val") and "train" in splits and "val" not in splits:
            splits = hold_out(splits, options.val)
        return splits, sources
    return load


def hold_out(splits, n):
    """Move n problems of train to val. The choice depends on the questions alone, on no generator."""
    def place_of(problem):
        question = problem.prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
        return hashlib.sha256(f"{SEED} {question}".encode()).digest()
    train = sorted(splits["train"], key=place_of)
    require(1 <= n < len(train), f"--val={n} problems cannot be held out from {len(train)}; at least {n + 1} "
            f"are needed, or --val=N with N from 1 to {len(train) - 1}")
    others = {split: problems for split, problems in splits.items() if split not in ("train", "val")}
    return {"train": train[n:], "val": train[:n], **others}
