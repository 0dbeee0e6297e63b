"""
Turns word problems into training data: JSONL problems -> tokens, target mask, labels, manifest.

    python prepare_data.py arithmetic                   # generated here, no network
    python prepare_data.py gsm8k                        # downloads 4.9 MB (and GPT-2's tokenizer, 1.5 MB)
    python prepare_data.py gsm8k --source=DIR --subset=1000    # train.jsonl and test.jsonl from DIR

Every task takes the same path. A problem is a JSONL line {"question": ..., "answer": ...} and becomes

    Question: {question}\nAnswer:  {answer}<|endoftext|>
    `------- prompt ------------´ `------ target ------´

Prompt and answer are encoded separately, so a prompt has the same ids in training and in sampling.
What is written to data/<task>/, per split (train, val, test, ...):
    <split>.npz     tokens   (N,) uint16   all examples one after the other
                    mask     (N,) bool     True where the token counts as a target
                    offsets  (n+1,) int64  example i is tokens[offsets[i]:offsets[i+1]]
                    labels   (n,) uint8    label for guidance: the number of solution steps, less one
    <split>.jsonl   the problems as text, for generating and scoring
    manifest.json   tokenizer, format, hashes, counts; written last: if it is there, all the rest is
"""
import hashlib
import json
import os
import random
import re
import sys
import time
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import requests
import tiktoken
from tqdm import tqdm

from arithmetic import MAX_NUMBER, bucket, mix_problem, task_problem
from configurator import UserError, configure

PROMPT, ANSWER = "Question: {}\nAnswer:", " {}"
ENDOFTEXT = "<|endoftext|>"
MAX_TOKENS = 1024                    # GPT-2's positions

# -----------------------------------------------------------------------------
# Downloads

TIMEOUT = (10, 60)                   # seconds to connect, seconds without a byte
ATTEMPTS, BACKOFF = 5, 1.0           # attempts in a row without progress; seconds before the second, doubling

def file_sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()

def mismatch(path, size, sha256):
    """Why the file at path is not the expected one, or None if it is."""
    if size is not None and path.stat().st_size != size:
        return f"has {path.stat().st_size} bytes instead of {size}"
    if sha256 is not None and (found := file_sha256(path)) != sha256:
        return f"has sha256 {found} instead of {sha256}"
    return None

def download(url, path, size=None, sha256=None):
    """
    Puts the file at url to path, and returns path. A file that is there and has the expected size and
    sha256 is kept; else bytes go to path.part, which a later call continues, and which is renamed to
    path only once verified. Raises UserError, naming url and path, if that cannot be done.
    """
    path = Path(path)
    part, etag_file = Path(f"{path}.part"), Path(f"{path}.part.etag")
    fail = lambda why: UserError(f"error: cannot download {url} to {path}: {why}")
    try:
        if path.exists() and not mismatch(path, size, sha256):
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        failures, most = 0, 0        # most: bytes of the longest .part so far; getting further is progress
        while True:
            resumed = part.exists() and part.stat().st_size > 0
            problem, wait = fetch(url, part, etag_file, size, fail)
            if problem is None:      # everything the server has to give is in .part
                wrong = mismatch(part, size, sha256)
                if wrong is None:
                    os.replace(part, path)
                    etag_file.unlink(missing_ok=True)
                    return path
                part.unlink()
                if not resumed:      # a fresh copy that is wrong will be wrong again
                    raise fail(f"it {wrong}; the file at that address changed, or something on the way alters it")
                problem = f"the continued copy {wrong}, starting again"
            reached = part.stat().st_size if part.exists() else 0
            failures = 0 if reached > most else failures + 1
            most = max(most, reached)
            if failures >= ATTEMPTS:
                raise fail(f"{problem} ({ATTEMPTS} attempts); check the network or proxy and run the command "
                           "again: it continues where it stopped")
            wait = max(wait, BACKOFF * 2 ** max(failures - 1, 0))
            print(f"{url}: {problem}; trying again in {wait:.0f} s", flush=True)
            time.sleep(wait)
    except OSError as e:             # disk full, no permission, ... (network trouble is caught in fetch)
        raise fail(f"{e.strerror or e}; is there space, and may you write there?") from None

def fetch(url, part, etag_file, size, fail):
    """One request, continuing .part if it can. Returns (None, 0) at the end of the file, else (problem, wait)."""
    have = part.stat().st_size if part.exists() else 0
    if size is not None and have == size:
        return None, 0
    headers = {"Accept-Encoding": "identity"}   # byte ranges and sizes of the file itself, not of a gzip of it
    if have and etag_file.exists() and (size is None or have < size):
        # If-Range: the rest if the file is still the same, all of it (status 200) if it changed
        headers |= {"Range": f"bytes={have}-", "If-Range": etag_file.read_text()}
    else:
        have = 0
    try:
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as r:
            if r.status_code == 429 or r.status_code >= 500:
                after = r.headers.get("Retry-After", "")
                return f"status {r.status_code}", min(int(after), 60) if after.isdigit() else 0
            if r.status_code == 416:            # nothing after what we have: complete, or not the same file
                if r.headers.get("Content-Range") == f"bytes */{have}":
                    return None, 0
                part.unlink()
                return "status 416, starting again", 0
            if r.status_code not in (200, 206):
                raise fail(f"status {r.status_code} {r.reason}; is the address right?")
            if r.status_code == 200:
                have = 0
            elif not r.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                part.unlink()
                return "the server sent another range than asked for, starting again", 0
            if have == 0:
                etag = r.headers.get("ETag", "")
                part.unlink(missing_ok=True)    # never a new ETag beside old bytes
                # without a strong ETag we could not tell that the file changed: then there is no resuming
                etag_file.write_text(etag) if etag.startswith('"') else etag_file.unlink(missing_ok=True)
            length = r.headers.get("Content-Length", "")
            total = have + int(length) if length.isdigit() else size
            receive(r, part, have, total, url)
    except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema,
            requests.exceptions.MissingSchema) as e:
        raise fail(e) from None
    except requests.RequestException as e:
        return f"connection failed ({type(e).__name__})", 0
    if total is not None and part.stat().st_size < total:
        return "connection closed early", 0
    return None, 0

def receive(response, part, have, total, url):
    """Appends the response's body to .part: a bar on a terminal, else a line now and then."""
    terminal = sys.stderr.isatty()
    mb = f"{total / 1e6:.1f} MB" if total is not None else "size unknown"
    if not terminal:
        print(f"downloading {url} ({mb}" + (f", continuing at {have / 1e6:.1f} MB)" if have else ")"), flush=True)
    said = time.monotonic()
    with open(part, "ab" if have else "wb") as f, \
         tqdm(desc=part.name, initial=have, total=total, unit="B", unit_scale=True, disable=not terminal) as bar:
        for chunk in response.iter_content(1 << 14):           # a cut loses the chunk it falls in
            f.write(chunk)
            bar.update(len(chunk))
            if not terminal and time.monotonic() - said > 10:
                said = time.monotonic()
                print(f"  {f.tell() / 1e6:.1f} of {mb}", flush=True)

# -----------------------------------------------------------------------------
# Tokenizers

GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_FILES = {"vocab.bpe": (456318, "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
              "encoder.json": (1042301, "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783")}

def load_tokenizer(name):
    """The tiktoken Encoding "gpt2" or "arithmetic"; its only special token is <|endoftext|>."""
    if name == "arithmetic":
        return arithmetic_tokenizer()
    if name != "gpt2":
        raise UserError(f"error: unknown tokenizer {name!r}; there are gpt2 and arithmetic")
    # tiktoken looks in this folder for sha1(url). With verified files there it never fetches anything itself.
    cache = os.environ.get("TIKTOKEN_CACHE_DIR") or str(Path(__file__).resolve().parent / "data" / "tiktoken")
    os.environ["TIKTOKEN_CACHE_DIR"] = cache
    for file, (size, sha256) in GPT2_FILES.items():
        url = GPT2_URL + file
        download(url, Path(cache) / hashlib.sha1(url.encode()).hexdigest(), size, sha256)
    return tiktoken.get_encoding("gpt2")

def arithmetic_tokenizer():
    """
    A tiny Encoding for the arithmetic task: 256 bytes, the numbers 0 to 99 with and without a leading space,
    and every word and sign of the generator's texts. tiktoken makes one token of a piece that is in the ranks
    as a whole; any other text falls back to smaller pieces, at worst bytes, so everything round-trips.
    """
    pattern = r"Question:|\nAnswer:| = <<|<<|>>|\.\n|####| ?[A-Za-z]+| ?[0-9]{1,3}| ?[^\sA-Za-z0-9]|\s"
    rng = random.Random(0)           # not --seed: the vocabulary is the same whatever the data
    problems = [make(rng) for make in (task_problem, mix_problem) for _ in range(3000)]
    text = "".join(PROMPT.format(question) + ANSWER.format(answer) for question, answer in problems)
    pieces = set(re.findall(pattern, text)) | {f"{space}{n}" for space in ("", " ") for n in range(MAX_NUMBER + 1)}
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
    # encode_ordinary would silently spell <|endoftext|> with several tokens; encode would obey it
    for special in encoding.special_tokens_set:
        if special in text:
            raise UserError(f"error: {where} contains the special token {special}; remove it")
    return encoding.encode_ordinary(text)

def encode_prompt(encoding, question, prompt=PROMPT, where="the prompt"):
    """Token ids of a question as the model saw it in training, up to and including "Answer:"."""
    if not question.strip():
        raise UserError(f"error: {where} is empty; write a question")
    return encode_text(encoding, prompt.format(question.strip()), where)

# -----------------------------------------------------------------------------
# A task is one thing

class Problem(NamedTuple):
    question: str
    answer: str
    where: str = ""                  # file and line, or whatever else tells a reader of an error which one it is

@dataclass(frozen=True)
class Options:
    out_dir: str = ""                # where the data goes; default: data/<task>
    strip_annotations: bool = False  # remove the calculator annotations <<...>> from the answers

@dataclass(frozen=True)
class GSM8KOptions(Options):
    source: str = ""                 # folder with train.jsonl and test.jsonl; default: download the pinned files
    subset: int = 0                  # keep this many training problems; 0 keeps all

@dataclass(frozen=True)
class ArithmeticOptions(Options):
    train: int = 20000               # problems of the task, to train L2D on
    mix: int = 30000                 # problems of the broader mixture, to pre-train the trunk on
    seed: int = 1337                 # of the generator

class Task(NamedTuple):
    name: str
    tokenizer: str
    options: type                    # dataclass of its command-line options
    problems: Callable               # (options, out_dir) -> {split: [Problem]}, {source file: sha256}, seed
    label_names: list                # meaning of the guidance labels; the model itself adds "no label" as last
    label: Callable                  # Problem -> label
    prompt: str = PROMPT
    answer: str = ANSWER

def step_names(n):
    return ["1 step"] + [f"{i} steps" for i in range(2, n)] + [f"{n} or more steps"]

def step_label(n):
    """Label = number of solution steps, the lines before "####": 0 is one step, n - 1 is n or more."""
    def label(problem):
        lines = problem.answer.split("####")[0].splitlines()
        return min(max(sum(bool(line.strip()) for line in lines), 1), n) - 1
    return label

# -----------------------------------------------------------------------------
# GSM8K

GSM8K_URL = ("https://raw.githubusercontent.com/openai/grade-school-math/"
             "3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/")
GSM8K_FILES = {"train.jsonl": (4166206, "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"),
               "test.jsonl": (749738, "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14")}
GSM8K_VAL, GSM8K_SEED = 500, 1337    # problems of train held out for validation, and the seed that chose them

def read_problems(path):
    """The problems of a JSONL file. Raises UserError with file and line at the first bad line."""
    problems = []
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")   # not splitlines: U+2028 may be in a string
    except OSError as e:
        raise UserError(f"error: cannot read {path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"error: {path} is not UTF-8 text: {e}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except ValueError as e:
            raise UserError(f"error: {where} is not JSON: {e}") from None
        for key in ("question", "answer"):
            if not isinstance(row, dict) or not isinstance(row.get(key), str) or not row[key].strip():
                raise UserError(f'error: {where} has no text "{key}"; '
                                'expected {"question": "...", "answer": "..."}')
        problems.append(Problem(row["question"].strip(), row["answer"].strip(), where))
    return problems

def gsm8k_problems(options, out_dir):
    """GSM8K with a fixed part of train held out; the choice depends on the texts only, not on a library's RNG."""
    folder = Path(options.source) if options.source else out_dir / "source"
    sources, read = {}, {}
    for file, (size, sha256) in GSM8K_FILES.items():
        if not options.source:
            download(GSM8K_URL + file, folder / file, size, sha256)
        read[file] = read_problems(folder / file)
        for p in read[file]:
            if not re.search(r"####[ \t]*\S", p.answer):
                raise UserError(f'error: {p.where}: the answer has no "####" followed by the final number')
        sources[file] = file_sha256(folder / file)
        if sources[file] != sha256:
            print(f"note: {folder / file} is not GSM8K's original file (sha256 {sources[file]})")
    if not read["test.jsonl"]:
        raise UserError(f"error: {folder / 'test.jsonl'} holds no problems")
    train = sorted(read["train.jsonl"],
                   key=lambda p: hashlib.sha256(f"{GSM8K_SEED} {p.question}".encode()).digest())
    val, train = train[:GSM8K_VAL], train[GSM8K_VAL:]
    if not train:
        raise UserError(f"error: {folder / 'train.jsonl'} holds {len(val)} problems, but {GSM8K_VAL} are held out "
                        f"for validation: at least {GSM8K_VAL + 1} are needed")
    if not 0 <= options.subset <= len(train):
        raise UserError(f"error: --subset={options.subset} is out of range: 1 to {len(train)}, or 0 for all")
    return dict(train=train[:options.subset or None], val=val, test=read["test.jsonl"]), sources, GSM8K_SEED

# -----------------------------------------------------------------------------
# Arithmetic

def arithmetic_problems(options, out_dir):
    """The task (train, val, test) and the broader mixture on which the tiny trunk is pre-trained (mix*)."""
    counts = dict(train=options.train, val=500, test=1000, mix=options.mix, mix_val=500, mix_test=1000)
    splits = {}
    for split, count in counts.items():
        if not 1 <= count <= 1_000_000:
            raise UserError(f"error: --{split}={count} is out of range: 1 to 1000000")
        rng, found = random.Random(f"{options.seed} {split}"), {}   # a stream of its own: sizes do not interact
        while len(found) < count:
            question, answer = mix_problem(rng) if split.startswith("mix") else task_problem(rng)
            if bucket(question) == split:
                found.setdefault(question, Problem(question, answer, f"{split} problem {len(found) + 1}"))
        splits[split] = list(found.values())
    return splits, {}, options.seed

TASKS = {task.name: task for task in (
    Task("arithmetic", "arithmetic", ArithmeticOptions, arithmetic_problems, step_names(4), step_label(4)),
    Task("gsm8k", "gpt2", GSM8KOptions, gsm8k_problems, step_names(8), step_label(8)),
)}

# -----------------------------------------------------------------------------
# Writing

def write_file(path, write):
    """Calls write(file), file binary, on a temporary file and renames it, so that path is never half written."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as f:
        write(f)
    os.replace(temporary, path)

def encode_split(encoding, task, problems):
    """The arrays of one split, and the prompts' and answers' lengths (n, 2)."""
    tokens, mask, lengths, too_long = [], [], [], []
    for p in problems:
        prompt = encode_prompt(encoding, p.question, task.prompt, p.where)
        answer = encode_text(encoding, task.answer.format(p.answer), p.where) + [encoding.eot_token]
        tokens += prompt + answer
        mask += [False] * len(prompt) + [True] * len(answer)
        lengths.append((len(prompt), len(answer)))
        if sum(lengths[-1]) > MAX_TOKENS:
            too_long.append(f"{p.where} ({sum(lengths[-1])} tokens)")
    if too_long:                     # dropping it would change the benchmark, cutting it would spoil the answer
        raise UserError(f"error: {len(too_long)} problems are longer than {MAX_TOKENS} tokens, first "
                        f"{too_long[0]}; shorten or remove them")
    lengths = np.array(lengths)
    return dict(tokens=np.array(tokens, dtype=np.uint16), mask=np.array(mask, dtype=bool),
                offsets=np.concatenate([[0], lengths.sum(1).cumsum()]).astype(np.int64),
                labels=np.array([task.label(p) for p in problems], dtype=np.uint8)), lengths

def prepare(task, options):
    """Makes the data of a task and prints what it made."""
    out_dir = Path(options.out_dir or f"data/{task.name}")
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        splits, sources, seed = task.problems(options, out_dir)
        encoding = load_tokenizer(task.tokenizer)
        if options.strip_annotations:
            splits = {split: [p._replace(answer=re.sub("<<.*?>>", "", p.answer)) for p in problems]
                      for split, problems in splits.items()}
        encoded = {split: encode_split(encoding, task, problems) for split, problems in splits.items()}
        (out_dir / "manifest.json").unlink(missing_ok=True)      # not before the new data is known to be good
        print(f"{task.name}: tokenizer {encoding.name} with {encoding.n_vocab} tokens")
        for split, (arrays, lengths) in encoded.items():
            rows = [json.dumps({"question": p.question, "answer": p.answer}, ensure_ascii=False)
                    for p in splits[split]]
            write_file(out_dir / f"{split}.npz", lambda f: np.savez(f, **arrays))
            write_file(out_dir / f"{split}.jsonl", lambda f: f.write(("\n".join(rows) + "\n").encode()))
            (prompt, answer), (prompt_max, answer_max) = lengths.mean(0), lengths.max(0)
            print(f"  {split:8} {len(rows):6,} problems; tokens of prompt: mean {prompt:.1f}, max {prompt_max}; "
                  f"of answer: mean {answer:.1f}, max {answer_max}")
        manifest = dict(task=task.name, tokenizer=encoding.name, fingerprint=fingerprint(encoding),
                        n_vocab=encoding.n_vocab, eot=encoding.eot_token, prompt=task.prompt, answer=task.answer,
                        strip_annotations=options.strip_annotations, sources=sources, seed=seed,
                        counts={split: len(problems) for split, problems in splits.items()},
                        max_tokens=max(int(lengths.sum(1).max()) for _, lengths in encoded.values()),
                        n_labels=len(task.label_names), label_names=task.label_names)
        write_file(out_dir / "manifest.json", lambda f: f.write((json.dumps(manifest, indent=2) + "\n").encode()))
    except OSError as e:
        raise UserError(f"error: cannot write {e.filename or out_dir}: {e.strerror}") from None
    example = splits["train"][0]
    text = task.prompt.format(example.question) + task.answer.format(example.answer) + ENDOFTEXT
    print("for example:\n    " + text.replace("\n", "\n    ") + f"\nwritten to {out_dir}")

# -----------------------------------------------------------------------------
# Reading

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
    return f"python prepare_data.py {task}" + (f" --out_dir={data_dir}" if str(data_dir) != f"data/{task}" else "")

def load_manifest(data_dir):
    """The manifest of prepared data, a dict. Raises UserError if there is none or it is damaged."""
    path = Path(data_dir) / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(manifest["counts"], dict) or manifest["n_labels"] != len(manifest["label_names"]):
            raise ValueError("counts or labels are wrong")
        for key in ("task", "tokenizer", "fingerprint", "n_vocab", "eot", "prompt", "answer", "max_tokens"):
            manifest[key]
    except OSError as e:
        raise UserError(f"error: no prepared data in {data_dir} ({path.name}: {e.strerror}); "
                        f"make it with: {remedy(data_dir)}") from None
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"error: {path} is damaged ({type(e).__name__}: {e}); make it again with: "
                        f"{remedy(data_dir)}") from None
    return manifest

def load_split(data_dir, split):
    """One split of prepared data, a Split. Raises UserError if it is missing or damaged."""
    manifest = load_manifest(data_dir)
    if split not in manifest["counts"]:
        raise UserError(f"error: {data_dir} has no split {split!r}; it has {', '.join(manifest['counts'])}")
    n, path = manifest["counts"][split], Path(data_dir) / f"{split}.npz"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            tokens, mask, offsets, labels = (arrays[key] for key in ("tokens", "mask", "offsets", "labels"))
        problems = read_problems(path.with_suffix(".jsonl"))
        ends = offsets[1:] - 1
        checks = {"dtypes": [x.dtype for x in (tokens, mask, offsets, labels)] ==
                            [np.uint16, np.bool_, np.int64, np.uint8],
                  "counts": n == len(problems) == len(labels) == len(ends) and len(tokens) == len(mask),
                  "offsets": offsets[0] == 0 and offsets[-1] == len(tokens) and (np.diff(offsets) > 1).all()}
        # short-circuit: what follows indexes with the offsets
        checks["tokens"] = all(checks.values()) and tokens.max() < manifest["n_vocab"] and \
            (tokens[ends] == manifest["eot"]).all() and mask[ends].all() and not mask[offsets[:-1]].any()
        checks["labels"] = labels.max() < manifest["n_labels"]
        wrong = [name for name, fine in checks.items() if not fine]
        if wrong:
            raise ValueError(f"inconsistent {', '.join(wrong)}")
    except (Exception, UserError) as e:      # zipfile and numpy raise anything on a damaged file
        raise UserError(f"error: {path.with_suffix('')}.npz and .jsonl are missing or damaged ({e}); "
                        f"make them again with: {remedy(data_dir)}") from None
    return Split(tokens, mask, offsets, labels, problems)

# -----------------------------------------------------------------------------

USAGE = "python prepare_data.py {" + "|".join(TASKS) + "} [--option=value ...]"

def main(argv):
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {USAGE}\noptions of a task: python prepare_data.py <task> --help")
        return
    if argv[0] not in TASKS:
        guess = get_close_matches(argv[0], TASKS, 1)
        raise UserError(f"error: unknown task {argv[0]!r}" + (f"; did you mean {guess[0]}?" if guess else "") +
                        f" Usage: {USAGE}")
    task = TASKS[argv[0]]
    for word in argv[1:]:
        if not word.startswith("-"):  # configure would take it for a config file
            raise UserError(f"error: unexpected word {word!r}; options are written --option=value")
    prepare(task, configure(task.options, argv[1:], f"python prepare_data.py {task.name} [--option=value ...]"))

if __name__ == "__main__":
    main(sys.argv[1:])
