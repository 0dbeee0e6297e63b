"""prepare_data.py: what it writes is checked against independent computations on the texts themselves."""
import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_arithmetic import check_split, question_of

import prepare_data
import tasks
from configurator import UserError
from plumbing.dataset import load_manifest, load_split
from plumbing.tokenizer import load_gpt2_tokenizer
from prepare_data import main
from tasks import TASKS, benchmarks, load_problems
from tasks.arithmetic import make_tokenizer

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


def error(*argv):
    """The one line a bad command ends with."""
    with pytest.raises(UserError) as e:
        main(list(map(str, argv)))
    message = str(e.value.code)
    assert "\n" not in message and message.startswith("error: ")
    return message


# ---------------------------------------------------------------- GSM8K's path, on files of our own

needs_gpt2 = pytest.mark.skipif(not (SHARED / "tiktoken_cache").is_dir(),
                                reason="no ../shared/tiktoken_cache, and tests do not download")


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A small source folder, and a function that writes it with one line of train.jsonl replaced."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    folder = tmp_path / "source"
    folder.mkdir()
    def write(line=None, n=520):
        rows = [json.dumps({"question": f"What is {i} + 1?",
                            "answer": f"{i}+1 = <<{i}+1={i + 1}>>{i + 1}, {i}-0=$<<{i}-0={i}>>{i}\n"
                                      f"#### {i + 1}"})
                for i in range(n)]
        if line is not None:
            rows[16] = line
        (folder / "train.jsonl").write_text("\n".join(rows) + "\n")
        (folder / "test.jsonl").write_text("\n".join(rows[:3]) + "\n")
        return folder
    return write


@needs_gpt2
def test_what_is_held_out_of_gsm8k_is_not_trained_on(source, tmp_path, capsys):
    main(["gsm8k", f"--source={source()}", f"--out_dir={tmp_path}/out", "--strip_annotations"])
    check_split(tmp_path / "out", "train", load_gpt2_tokenizer(), strip=True)
    train = load_problems(tmp_path / "out", "train")
    for problem in train:
        i = int(question_of(problem).split()[2])
        assert problem.answer == f" {i}+1 = {i + 1}, {i}-0=${i}\n#### {i + 1}"
    assert "is not the original file" in capsys.readouterr().out
    held_out = {question_of(p) for p in load_problems(tmp_path / "out", "val")}
    assert len(train) == 20 and len(held_out) == 500 and held_out.isdisjoint(map(question_of, train))
    manifest = load_manifest(tmp_path / "out")
    assert manifest["strip_annotations"] is True and set(manifest["sources"]) == {"train.jsonl", "test.jsonl"}


@needs_gpt2
@pytest.mark.parametrize("line, why", [
    ('{"question": "Why?", "answer": "Because', "is not JSON"),
    ("Why?", "is not JSON"),
    ('["Why?", "#### 1"]', '"question"'),
    ('{"question": "Why?"}', '"answer"'),
    ('{"question": "", "answer": "#### 1"}', '"question"'),
    ('{"question": 3, "answer": "#### 1"}', '"question"'),
    ('{"question": "Why?", "answer": "It is 1."}', "####"),
    ('{"question": "Why?", "answer": "It is 1.\\n####  "}', "####"),
    ('{"question": "Why <|endoftext|>?", "answer": "#### 1"}', "special token"),
    ('{"question": "Why?", "answer": "<|endoftext|> #### 1"}', "special token"),
    (json.dumps({"question": "Why? " * 1100, "answer": "#### 1"}), "longer than 1024 tokens"),
])
def test_a_bad_line_is_named_and_nothing_is_written(source, tmp_path, line, why):
    message = error("gsm8k", f"--source={source(line)}", f"--out_dir={tmp_path}/out")
    assert why in message and "train.jsonl line 17" in message
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_bad_source_is_named(source, tmp_path):
    assert "501" in error("gsm8k", f"--source={source(n=500)}", f"--out_dir={tmp_path}/out")
    assert "cannot read" in error("gsm8k", f"--source={tmp_path}/nowhere", f"--out_dir={tmp_path}/out")
    (source() / "test.jsonl").write_bytes(b'{"question": "\xff"}\n')
    assert "UTF-8" in error("gsm8k", f"--source={tmp_path}/source", f"--out_dir={tmp_path}/out")
    (source() / "test.jsonl").write_text("\n")
    assert "holds no problems" in error("gsm8k", f"--source={tmp_path}/source", f"--out_dir={tmp_path}/out")


@needs_gpt2
def test_a_bad_source_leaves_the_old_data(source, tmp_path):
    main(["gsm8k", f"--source={source()}", f"--out_dir={tmp_path}/out"])
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    error("gsm8k", f"--source={source('bad')}", f"--out_dir={tmp_path}/out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def own(tmp_path):
    """A command that prepares a few problems of one's own, and the folder where they go."""
    lines = [f'{{"question": "Is {i} even?", "answer": "{i % 2 == 0}"}}\n' for i in range(200)]
    (tmp_path / "train.jsonl").write_text("".join(lines))
    out_dir = tmp_path / "out"
    command = ["jsonl", f"--source={tmp_path}", "--val=9", "--tokenizer=arithmetic", f"--out_dir={out_dir}"]
    return command, out_dir


@pytest.mark.parametrize("stop_at", range(5))
def test_an_interrupted_preparation_leaves_what_was_there(own, monkeypatch, stop_at):
    """Ctrl-C while the new files are written, each of the five."""
    command, out_dir = own
    main(command)
    before, write, calls = contents(out_dir), prepare_data.write_file, []

    def interrupted(path, content):
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        calls.append(path)
        write(path, content)

    monkeypatch.setattr(prepare_data, "write_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main([*command, "--val=20"])
    assert contents(out_dir) == before and len(list(out_dir.iterdir())) == len(before) == 5


def test_a_kill_between_two_renames_never_passes_for_finished_data(own, monkeypatch):
    command, out_dir = own
    main(command)
    replace, calls = os.replace, []

    def killed(old, new):
        if Path(new).parent == out_dir:
            calls.append(new)
            if len(calls) == 3:
                raise KeyboardInterrupt
        replace(old, new)

    monkeypatch.setattr(prepare_data.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        main([*command, "--val=20"])
    with pytest.raises(UserError, match="no prepared data .*make it with: python prepare_data.py"):
        load_split(out_dir, "val")


def test_a_disk_that_fills_leaves_the_old_data_and_one_line(own):
    command, out_dir = own
    main(command)
    before = contents(out_dir)
    done = subprocess.run([sys.executable, "-c", f"""if True:
        import resource, prepare_data
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        prepare_data.main({[*command, "--val=20"]})"""], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: cannot write {out_dir}")
    assert contents(out_dir) == before and len(list(out_dir.iterdir())) == len(before)


def test_two_preparations_into_one_folder_are_one_too_many(own):
    """The second says whose the folder is, and spoils nothing; one that was killed leaves nothing behind."""
    command, out_dir = own
    main(command)
    before = contents(out_dir)
    code = "import prepare_data, time\n" \
           "prepare_data.make = lambda *words: (print('here', flush=True), time.sleep(60))\n" \
           f"prepare_data.main({command})"
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"here\n"
        (out_dir / ".new/half.npz").write_text("half")
        assert f"is in use by process {other.pid}" in error(*command)
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    main(command)
    assert contents(out_dir) == before


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_what_was_there(own, stop):
    """Ctrl-C: one line, status 130 and no leftover."""
    command, out_dir = own
    main(command)
    before = contents(out_dir)
    code = "import configurator, prepare_data, time\n" \
           "prepare_data.check_gold = lambda p: (print('here', flush=True), time.sleep(60))\n" \
           f"configurator.run(lambda: prepare_data.main({command}))"
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE)
    assert other.stdout.readline() == b"here\n"
    other.send_signal(stop)
    _, stderr = other.communicate(timeout=20)
    if stop == signal.SIGINT:
        assert other.returncode == 130 and stderr.count(b"\n") == 1 and contents(out_dir) == before
    main(command)
    assert contents(out_dir) == before


def test_a_closed_pipe_ends_quietly():
    done = subprocess.run(f"{sys.executable} prepare_data.py arithmetic --help | head -1", shell=True, cwd=ROOT,
                          capture_output=True, text=True)
    assert done.stdout.count("\n") == 1 and done.stderr == ""


def test_a_failure_leaves_no_new_folder(own):
    command, out_dir = own
    assert "--val=200" in error(*command, "--val=200") and not out_dir.exists()
    out_dir.mkdir()
    error(*command, "--val=200")
    assert not list(out_dir.iterdir())                       # one that was there stays


@needs_gpt2
def test_all_of_gsm8k_is_prepared_and_its_split_never_changes(tmp_path, monkeypatch, capsys):
    if not (SHARED / "gsm8k" / "train.jsonl").exists():
        pytest.skip("no ../shared/gsm8k")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    main(["gsm8k", f"--source={SHARED / 'gsm8k'}", f"--out_dir={tmp_path}"])
    assert "note:" not in capsys.readouterr().out    # the pinned files
    assert load_manifest(tmp_path)["counts"] == dict(train=6973, val=500, test=1319)
    encoding = load_gpt2_tokenizer()
    assert encoding.encode_ordinary("The dog") == [464, 3290]            # ids known from GPT-2 itself
    for split in ("train", "val", "test"):
        check_split(tmp_path, split, encoding)
    splits = {split: load_problems(tmp_path, split) for split in ("train", "val", "test")}

    def original(file):
        lines = (SHARED / "gsm8k" / f"{file}.jsonl").read_text(encoding="utf-8").strip().split("\n")
        return sorted((r["question"], r["answer"]) for r in map(json.loads, lines))

    def ours(*names):
        return sorted((question_of(p), p.answer[1:]) for name in names for p in splits[name])

    assert ours("train", "val") == original("train") and ours("test") == original("test")
    assert load_manifest(tmp_path)["max_tokens"] == 439
    # results are compared across machines and years: which problems are held out must never change
    held_out = hashlib.sha256("\n".join(question_of(p) for p in splits["val"]).encode()).hexdigest()
    assert held_out[:16] == "09ee493ae76a7879"


# ---------------------------------------------------------------- one's own data, and the other tasks

def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))


OWN = [{"question": f"Is {i} even?", "answer": str(i % 2 == 0)} for i in range(30)]


def test_own_data_is_one_command(tmp_path):
    """Question and answer on each line, a test file if there is one, or just one file."""
    write_lines(tmp_path / "in/train.jsonl", OWN)
    main(["jsonl", f"--source={tmp_path}/in", "--val=10", "--tokenizer=arithmetic",
          f"--out_dir={tmp_path}/a"])
    assert load_manifest(tmp_path / "a")["counts"] == dict(train=20, val=10)
    assert load_manifest(tmp_path / "a")["group_names"] == ["all"]
    write_lines(tmp_path / "in/test.jsonl", [{"question": "Is 77 even?", "answer": "False"}])
    main(["jsonl", f"--source={tmp_path}/in/", "--val=10", "--tokenizer=arithmetic",
          f"--out_dir={tmp_path}/b/"])
    assert load_manifest(tmp_path / "b")["counts"] == dict(train=20, val=10, test=1)
    main(["jsonl", f"--source={tmp_path}/in/train.jsonl", "--val=10", "--tokenizer=arithmetic",
          f"--out_dir={tmp_path}/c"])
    for split in ("train", "val"):
        a, b, c = (load_problems(tmp_path / name, split) for name in "abc")
        assert [p[:-1] for p in a] == [p[:-1] for p in b] == [p[:-1] for p in c]
    texts = [(question_of(p), p.answer[1:]) for split in ("train", "val") for p in load_problems(tmp_path / "a",
                                                                                              split)]
    assert sorted(texts) == sorted((row["question"], row["answer"]) for row in OWN)


def test_own_validation_problems_are_used_and_a_question_in_two_splits_is_named(tmp_path, capsys):
    for split, rows in dict(train=OWN[:20], val=OWN[18:24], test=OWN[24:]).items():
        write_lines(tmp_path / f"in/{split}.jsonl", rows)
    main(["jsonl", f"--source={tmp_path}/in", "--tokenizer=arithmetic", f"--out_dir={tmp_path}/out"])
    assert load_manifest(tmp_path / "out")["counts"] == dict(train=20, val=6, test=6)
    assert [question_of(p) for p in load_problems(tmp_path / "out", "val")] == [r["question"] for r in OWN[18:24]]
    printed = capsys.readouterr().out
    assert "note: 2 questions of val are in the training data" in printed and "of test are in" not in printed


def test_own_data_may_have_groups(tmp_path):
    write_lines(tmp_path / "train.jsonl", [row | {"group": "big" if i > 5 else "a"} for i,
                                           row in enumerate(OWN)])
    main(["jsonl", f"--source={tmp_path}", "--val=10", "--tokenizer=arithmetic", f"--out_dir={tmp_path}/out"])
    assert load_manifest(tmp_path / "out")["group_names"] == ["a", "big"]
    data = load_split(tmp_path / "out", "train")
    for group, p in zip(data.groups, load_problems(tmp_path / "out", "train"), strict=True):
        assert (group == 1) == (p.group == "big") == (int(question_of(p).split()[1]) > 5)


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_a_text(tmp_path):
    text = "".join(json.dumps(row) + "\r\n" for row in OWN)
    (tmp_path / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    main(["jsonl", f"--source={tmp_path}", "--val=10", "--tokenizer=arithmetic", f"--out_dir={tmp_path}/out"])
    assert len(load_problems(tmp_path / "out", "train")) == 20


def test_a_home_directory_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_lines(tmp_path / "in/train.jsonl", OWN)
    main(["jsonl", "--source=~/in", "--val=10", "--tokenizer=arithmetic", "--out_dir=~/out"])
    assert len(load_problems(tmp_path / "out", "val")) == 10


BAD_OWN = {
    "a lone surrogate in the answer": (r'{"question": "Why?", "answer": "\ud800"}',
                                       "is not JSON that can be read"),
    "a lone surrogate in the question": (r'{"question": "\udfff", "answer": "x"}',
                                         "is not JSON that can be read"),
    "a surrogate beside": (r'{"question": "Why?", "answer": "x", "note": "\ud800"}',
                           "is not JSON that can be read"),
    "nesting": ('{"question": ' + "[" * 100_000, "is not JSON that can be read"),
    "a nested text": ('{"question": {"text": "Why?"}, "answer": "x"}', 'no text "question"'),
    "a huge number": ('{"question": ' + "9" * 10_000 + ', "answer": "x"}', "is not JSON"),
    "NaN": ("NaN", 'no text "question"'), "half a line": ('{"question": "Why?", "ans', "is not JSON"),
    "NULs": ("\0" * 20, "is not JSON"), "two objects": ('{"question": "a"}{"answer": "b"}', "is not JSON"),
    "another key": ('{"question": "Why?", "response": "x"}', 'no text "answer"'),
    "an empty group": ('{"question": "Why?", "answer": "x", "group": ""}', 'no text "group"'),
    "a number as group": ('{"question": "Why?", "answer": "x", "group": 3}', 'no text "group"'),
    "an answer of signs": ('{"question": "Why?", "answer": "?!"}', "scoring cannot read"),
    "an unreadable number": ('{"question": "Why?", "answer": "#### $18"}', "scoring cannot read"),
    "end of text": ('{"question": "Why?", "answer": "x<|endoftext|>"}', "special token"),
    "too long": (json.dumps({"question": "Why? " * 1000, "answer": "x"}), "longer than 1024 tokens"),
}


@pytest.mark.parametrize("name", BAD_OWN)
def test_own_data_that_cannot_be_used_is_one_line_and_the_old_data_stays(name, tmp_path):
    line, why = BAD_OWN[name]
    write_lines(tmp_path / "in/train.jsonl", OWN)
    command = ["jsonl", f"--source={tmp_path}/in", "--val=10", "--tokenizer=arithmetic",
               f"--out_dir={tmp_path}/out"]
    main(command)
    before = contents(tmp_path)
    write_lines(tmp_path / "in/train.jsonl", [*OWN[:4], line + "\n", *OWN[4:]])
    message = error(*command)
    assert why in message and "train.jsonl line 5" in message and len(message) < 1000
    write_lines(tmp_path / "in/train.jsonl", OWN)
    assert contents(tmp_path) == before
    write_lines(tmp_path / "in/test.jsonl", [*OWN[:4], line + "\n"])
    if name == "too long":                                   # a test problem that does not fit stays
        main(command)
        assert load_manifest(tmp_path / "out")["counts"]["test"] == 5
    else:
        assert why in error(*command)


def test_long_problems_are_left_out_only_where_the_user_says_so(tmp_path, capsys):
    write_lines(tmp_path / "train.jsonl", [*OWN, {"question": "Why? " * 1000, "answer": "x"}])
    main(["jsonl", f"--source={tmp_path}", "--val=10", "--tokenizer=arithmetic", f"--out_dir={tmp_path}/out",
          "--drop_long"])
    assert sum(load_manifest(tmp_path / "out")["counts"].values()) == 30
    assert "note: 1 problems of" in capsys.readouterr().out


@pytest.mark.parametrize("val", [0, -1, 30, 31, 10 ** 9])
def test_what_is_held_out_leaves_something_to_train_on(val, tmp_path):
    write_lines(tmp_path / "train.jsonl", OWN)
    assert f"--val={val}" in error("jsonl", f"--source={tmp_path}", f"--val={val}",
                                   f"--out_dir={tmp_path}/out")


def test_data_that_is_nowhere_to_be_downloaded_says_what_to_do(tmp_path):
    assert "--source=DIR, a folder with train.jsonl" in error("jsonl", f"--out_dir={tmp_path}")
    assert "TIGER-Lab/MMLU-Pro" in error("mmlu_pro", f"--out_dir={tmp_path}")
    assert "expected MMLU's folders" in error("mmlu", f"--source={tmp_path}", f"--out_dir={tmp_path}/out")
    assert "train.jsonl in it" in error("jsonl", f"--source={tmp_path}/none", f"--out_dir={tmp_path}/out")


TEXT = st.text(max_size=30).filter(lambda text: "<|endoftext|>" not in text)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=2, max_size=5))
def test_whatever_is_accepted_comes_back_as_it_was(tmp_path_factory, rows):
    """Any texts: the tokens say them, the problems hold them, the groups name them; or one line says why."""
    folder = tmp_path_factory.mktemp("any")
    rows = [dict(zip(("question", "answer", "group"), row, strict=True)) for row in rows]
    write_lines(folder / "train.jsonl", rows)
    try:
        main(["jsonl", f"--source={folder}", "--val=1", "--tokenizer=arithmetic", f"--out_dir={folder}/out"])
    except UserError as e:
        assert str(e).startswith("error: ") and "\n" not in str(e)
        return
    manifest, encoding, found = load_manifest(folder / "out"), make_tokenizer(), []
    for split in ("train", "val"):
        data = load_split(folder / "out", split)
        for i, p in enumerate(load_problems(folder / "out", split)):
            tokens, mask = (z[data.offsets[i]:data.offsets[i + 1]] for z in (data.tokens, data.mask))
            assert encoding.decode(tokens) == p.prompt + p.answer + "<|endoftext|>"
            assert encoding.decode(tokens[mask]) == p.answer + "<|endoftext|>"
            assert manifest["group_names"][data.groups[i]] == p.group
            found.append((question_of(p), p.answer[1:], p.group))
    clean = [tuple(row[k].replace("\r\n", "\n").strip() for k in ("question", "answer",
                                                                  "group")) for row in rows]
    assert sorted(found) == sorted(clean)


PRO = {"question_id": 70, "question": "Typical advertising regulatory bodies?", "answer": "I",
       "answer_index": 8,
       "options": [f"Option {i}" for i in range(10)], "category": "business", "src": "ori_mmlu",
       "cot_content": ""}


def test_mmlu_pro_in_the_form_of_its_rows(tmp_path):
    write_lines(tmp_path / "in/validation.jsonl", [PRO])
    write_lines(tmp_path / "in/test.jsonl", [PRO | {"options": ["yes", "no", "never"], "answer": "C",
                                                    "answer_index": 2}])
    command = ["mmlu_pro", f"--source={tmp_path}/in", "--tokenizer=arithmetic", f"--out_dir={tmp_path}/out"]
    main(command)
    (shot,), (p,) = (load_problems(tmp_path / "out", split) for split in ("val", "test"))
    assert shot.answer == " I" and len(shot.choices) == 10 and shot.prompt.count("\n") == 11
    assert shot.subject == "business"
    assert p.prompt == "Question: Typical advertising regulatory bodies?\nA. yes\nB. no\nC. never\nAnswer:"
    assert p.answer == " C" and p.choices == (" A", " B", " C") and p.group == "knowledge"
    manifest = load_manifest(tmp_path / "out")
    assert manifest["group_names"] == ["math", "code", "knowledge"] and manifest["shots"] == "val"
    for change, why in [({"answer": "K"}, "answer 'K'"), ({"answer": "AB"}, "answer 'AB'"),
                        ({"options": ["one"]}, "1 options"),
                        ({"options": "abc"}, "no list of texts options"),
                        ({"options": ["a", 3]}, "no list of texts"),
                        ({"options": ["x"] * 11}, "11 options"), ({"category": None}, 'no text "category"'),
                        ({"answer": "C", "options": ["a", "b"]}, "2 options and the answer 'C'"),
                        ({"answer": ""}, '"answer"')]:
        write_lines(tmp_path / "in/test.jsonl", [PRO, PRO | change])
        assert why in (message := error(*command)) and "test.jsonl line 2" in message


def test_mmlu_from_its_folders_and_from_its_archive_is_the_same(tmp_path):
    """The archive's other folders, auxiliary_train, are left alone; a cell may hold a line end."""
    table = '"Which, of\nthese?",1,"a, b",3,4,B\nQ2?,1,2,3,4,D\n'
    for split in ("dev", "val", "test", "auxiliary_train"):
        for subject in ("high_school_physics", "law"):
            path = tmp_path / f"data/{split}/{subject}_{split}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(table)
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        tar.add(tmp_path / "data", "data")
    command = ["mmlu", "--tokenizer=arithmetic"]
    main([*command, f"--source={tmp_path}/data", f"--out_dir={tmp_path}/a"])
    main([*command, f"--source={tmp_path}/data.tar", f"--out_dir={tmp_path}/b"])
    main([*command, f"--source={tmp_path}", f"--out_dir={tmp_path}/c"])
    for split in ("dev", "val", "test"):
        a, b, c = (load_problems(tmp_path / name, split) for name in "abc")
        assert [p[:-1] for p in a] == [p[:-1] for p in b] == [p[:-1] for p in c] and len(a) == 4
    assert [p.subject for p in a] == ["high school physics"] * 2 + ["law"] * 2
    assert a[0].prompt == "Question: Which, of\nthese?\nA. 1\nB. a, b\nC. 3\nD. 4\nAnswer:"
    assert a[0].answer == " B"
    for text, why in [("Q?,1,2,3,4,E\n", "the answer 'E'"), ("Q?\n", "not a table"), ('"Q', "not a table"),
                      ("Q?,1,2,3,4,5,6,7,8,9,10,11,A\n", "11 options"), ("\xff", "not a table")]:
        (tmp_path / "data/test/law_test.csv").write_bytes(("Q1?,1,2,3,4,A\n" + text).encode("latin-1"))
        message = error(*command, f"--source={tmp_path}/data", f"--out_dir={tmp_path}/a")
        assert why in message and "law_test.csv" in message
    (tmp_path / "data.tar").write_bytes(b"junk")
    assert "not a tar archive" in error(*command, f"--source={tmp_path}/data.tar", f"--out_dir={tmp_path}/a")


MBPP = {"text": "Add two.", "code": "def add(a, b):\r\n  return a + b", "task_id": 700, "test_setup_code": "",
        "test_list": ["assert add(1, 2) == 3"], "challenge_test_list": []}
HUMANEVAL = {"task_id": "HumanEval/0", "prompt": "def add(a, b):\n    \"\"\" Add. \"\"\"\n",
             "entry_point": "add",
             "canonical_solution": "    return a + b\n", "test": "def check(f):\n    assert f(1, 2) == 3\n"}
MATH = {"problem": "1/2+1/2?", "solution": "It is $\\boxed{1}$.", "level": "Level 1", "type": "Algebra"}


@pytest.mark.parametrize("name, file, row, changes", [
    ("mbpp", "mbpp.jsonl", MBPP, [({"test_list": "assert"}, "test_list"), ({"test_list": [1]}, "test_list"),
                                  ({"code": ""}, '"code"'),
                                  ({"task_id": "7"}, "task_id"), ({"text": None}, '"text"')]),
    ("humaneval", "HumanEval.jsonl.gz", HUMANEVAL, [({"prompt": 3}, '"prompt"'), ({"test": " "}, '"test"'),
                                                    ({"entry_point": None}, '"entry_point"')]),
    ("math", "test.jsonl", MATH, [({"solution": "It is 1."}, "scoring cannot read"),
                                  ({"solution": r"\boxed{1"}, "scoring cannot read"),
                                  ({"solution": r"\boxed{}"}, "scoring cannot read"),
                                  ({"answer": "2"}, "does not box its answer"),
                                  ({"problem": ""}, '"problem"')]),
])
def test_a_bad_row_of_a_benchmark_is_named(name, file, row, changes, tmp_path, capsys):
    command = [name, f"--source={tmp_path}", "--tokenizer=arithmetic", f"--out_dir={tmp_path}/out"]
    write_lines(tmp_path / file, [row, row])
    main(command)
    assert "note: " in capsys.readouterr().out or name == "mbpp"         # not the file that everybody knows
    for change, why in changes:
        write_lines(tmp_path / file, [row, row | change])
        message = error(*command)
        assert why in message and f"{file} line 2" in message


def test_math_has_a_training_split_where_the_user_has_it(tmp_path):
    write_lines(tmp_path / "test.jsonl", [MATH])
    write_lines(tmp_path / "train.jsonl", [MATH | {"problem": f"{i}?"} for i in range(9)])
    main(["math", f"--source={tmp_path}", "--val=3", "--tokenizer=arithmetic", f"--out_dir={tmp_path}/out"])
    assert load_manifest(tmp_path / "out")["counts"] == dict(train=6, val=3, test=1)
    assert load_problems(tmp_path / "out", "test")[0].subject == "Algebra"


def test_the_mix_gives_each_problem_its_group_and_keeps_its_task(tmp_path, capsys):
    """Validation has some of each that training has not; MATH only where the user gives it."""
    folder = tmp_path / "in"
    write_lines(folder / "g/train.jsonl",
                [{"question": f"{i}+1?", "answer": f"#### {i + 1}"} for i in range(540)])
    write_lines(folder / "g/test.jsonl", [{"question": "test?", "answer": "#### 1"}])
    write_lines(folder / "b/mbpp.jsonl", [MBPP | {"task_id": i} for i in (5, 100, 550, 700, 701)])
    for split in ("dev", "val", "test"):
        write_lines(folder / f"m/{split}/law_{split}.csv", [f"{split} {i}?,1,2,3,4,B\n" for i in range(20)])
    write_lines(folder / "x/test.jsonl", [MATH])
    write_lines(folder / "x/train.jsonl", [MATH | {"problem": f"{i}?"} for i in range(505)])
    command = ["mix", f"--gsm8k={folder}/g", f"--mbpp={folder}/b", f"--mmlu={folder}/m",
               "--tokenizer=arithmetic",
               f"--out_dir={tmp_path}/out"]
    main(command)
    assert "the mix is without MATH" in capsys.readouterr().out
    manifest = load_manifest(tmp_path / "out")
    assert manifest["group_names"] == ["math", "code", "knowledge"] and set(manifest["counts"]) == {"train",
                                                                                                    "val"}
    assert "gsm8k/train.jsonl" in manifest["sources"] and "mbpp/mbpp.jsonl" in manifest["sources"]
    def count(split):
        return Counter((p.task, p.group) for p in load_problems(tmp_path / "out", split))
    assert count("train") == {("gsm8k", "math"): 40, ("mbpp", "code"): 2, ("mmlu", "knowledge"): 36}
    assert count("val") == {("gsm8k", "math"): 500, ("mbpp", "code"): 1, ("mmlu", "knowledge"): 4}
    prompts = [{p.prompt for p in load_problems(tmp_path / "out",
                                             split) if p.task != "mbpp"} for split in ("train",
                                                                                                "val")]
    assert prompts[0].isdisjoint(prompts[1]) and not any("test" in prompt for prompt in set.union(*prompts))
    main([*command, f"--math={folder}/x"])
    assert Counter(p.task for p in load_problems(tmp_path / "out", "val"))["math"] == 500
    (folder / "g/test.jsonl").unlink()
    assert "g/test.jsonl" in error(*command)


# ---------------------------------------------------------------- the command line

def test_a_bad_command_is_one_line(tmp_path, capsys):
    assert "did you mean gsm8k" in error("gsm8")
    assert "unknown task" in error("--source=x")
    assert "'train'" in error("arithmetic", "train")
    assert "config" in error("gsm8k", "config/x.py")
    assert "sed" in error("arithmetic", "--sed=3")
    assert "source" in error("arithmetic", "--source=x")         # an option of the other tasks
    assert "train" in error("arithmetic", "--train=many")
    for n in (0, -1, 10**9):
        assert "out of range" in error("arithmetic", f"--train={n}", f"--out_dir={tmp_path}/x")
    (tmp_path / "plain").write_text("")
    assert "plain" in error("arithmetic", f"--out_dir={tmp_path}/plain/x")
    main([])
    assert "arithmetic|styles|gsm8k" in capsys.readouterr().out
    result = subprocess.run([sys.executable, ROOT / "prepare_data.py", "nonsense"], capture_output=True,
                            text=True)
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and not result.stdout


def test_a_users_own_file_is_never_written_over(tmp_path):
    """As where --source is the folder that the data would go to."""
    lines = "".join(json.dumps({"question": f"{i}?", "answer": f"#### {i}"}) + "\n" for i in range(8))
    (tmp_path / "train.jsonl").write_text(lines)
    message = error("jsonl", f"--source={tmp_path}", "--val=2", f"--out_dir={tmp_path}")
    assert "train.jsonl was not written by prepare_data.py" in message and "--out_dir" in message
    assert (tmp_path / "train.jsonl").read_text() == lines and sorted(os.listdir(tmp_path)) == ["train.jsonl"]


# ---------------------------------------------------------------- what is told of a task that does not fit

def test_a_group_that_the_task_does_not_have_is_named(tmp_path, monkeypatch):
    """The recipe in tasks/__init__.py, with a group forgotten."""
    def svamp(row, place, options):
        return "", tasks.Problem("Question: ?\nAnswer:", " #### 1", "svamp", place=place)

    files = {"train": ("train.jsonl",)}
    task = tasks.Task(tasks.make_loader(svamp, files), tasks.scoring.read_number, tokenizer="arithmetic")
    monkeypatch.setitem(TASKS, "svamp", task)
    write_lines(tmp_path / "train.jsonl", [{}])
    command = ["svamp", f"--source={tmp_path}", f"--out_dir={tmp_path}/out"]
    assert "train.jsonl line 1 has the group ''" in error(*command)
    monkeypatch.setitem(TASKS, "svamp", task._replace(groups=()))
    main(command)
    assert load_manifest(tmp_path / "out")["group_names"] == [""]


def test_a_large_vocabulary_takes_wider_tokens():
    """Token 70,000 does not fit 16 bits."""
    split = tasks.problem.make_split([([1, 70_000], [2])], [0], 70_001)
    assert split.tokens.dtype == np.uint32 and split.tokens.tolist() == [1, 70_000, 2]
    assert split.mask.tolist() == [False, False, True] and split.offsets.tolist() == [0, 3]


@pytest.mark.parametrize("name", ["gsm8k", "math", "mmlu", "humaneval", "mbpp"])
def test_whatever_is_downloaded_is_pinned_by_size_and_hash(name, tmp_path, monkeypatch):
    """A sign-in page in place of a file is then refused by plumbing/download.py."""
    asked = []

    def download(url, path, size=None, sha256=None):
        asked.append((url, size, sha256))
        raise UserError("no network")

    monkeypatch.setattr(tasks.sources, "download", download)
    with pytest.raises(UserError):
        TASKS[name].load(TASKS[name].options(), tmp_path)
    files = getattr(benchmarks, f"{name.upper()}_FILES", {"all": ("data.tar", *benchmarks.MMLU_TAR)})
    asked += [known for _, *known in files.values() if known]
    for url, size, sha256 in asked:
        assert url.startswith("https:") and size > 10_000 and len(sha256) == 64
        assert not any(branch in url for branch in ("/master/", "/main/"))


@pytest.mark.skipif(not (SHARED / "benchmarks").is_dir(), reason="no ../shared/benchmarks")
@pytest.mark.parametrize("files", [benchmarks.MBPP_FILES, benchmarks.HUMANEVAL_FILES])
def test_the_pinned_hashes_are_those_of_the_files(files):
    (name, _, size, sha256), = files.values()
    data = (SHARED / "benchmarks" / name).read_bytes()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (size, sha256)


def test_white_space_around_an_option_tells_nothing():
    """In the published MMLU-Pro some options have it that are right, and others have not."""
    row = {"question": "2 + 2?", "options": ["3", " 4", "5\u00a0", "6\n"], "answer": "B", "category": "math"}
    assert tasks.mmlu_pro(row, "here", None)[1].prompt == "Question: 2 + 2?\nA. 3\nB. 4\nC. 5\nD. 6\nAnswer:"


def test_the_training_file_of_math_has_boxes_without_braces(tmp_path):
    """A row of it, in full: TeX takes the next sign."""
    row = {"problem": "What is the larger root of $2x^2 - 5x + 2$?", "level": "Level 3", "type": "Algebra",
           "solution": "The roots are $1/2$ and $2$; the larger one is $\\boxed 2$."}
    write_lines(tmp_path / "train.jsonl", [row | {"problem": f"{i}?"} for i in range(3)])
    write_lines(tmp_path / "test.jsonl", [MATH])
    main(["math", f"--source={tmp_path}", "--val=1", "--tokenizer=arithmetic", f"--out_dir={tmp_path}/out"])
    p = load_problems(tmp_path / "out", "train")[0]
    assert tasks.score(p, r" \boxed{2}") == (True, True, True) and not tasks.score(p, r" \boxed{1/2}").right
