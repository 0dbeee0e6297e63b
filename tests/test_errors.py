"""Bad input to train.py and sample.py: one line with the value, what was expected and the way out; nothing changed.

evaluate.py's are in tests/test_evaluate.py, prepare_data.py's in tests/test_data.py.
"""
import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ENV, FROM_SCRATCH, ROOT, TINY, argv, child, error_of, files, says, script

import sample
import train
from model import GPT, GPTConfig
from plumbing.checkpoint import load_checkpoint


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("bad input must not reach for the network")
    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.fixture
def out_dir(l2d, tmp_path):
    """A copy of a trained L2D that may be spoilt."""
    return Path(shutil.copytree(l2d, tmp_path / "l2d", ignore=shutil.ignore_patterns("eval")))


@pytest.fixture
def error(arithmetic, trunk, l2d, tmp_path):
    """The line with which a script ends, given its options beside those that are fine."""
    fine = {train: TINY | dict(data_dir=arithmetic, trunk=trunk / "last.pt", out_dir=tmp_path / "out"),
            sample: dict(out_dir=l2d, steps=2, max_new_tokens=4)}
    def call(script, *words, **options):
        return error_of(script.main, [f"--{k}={v}" for k, v in (fine[script] | options).items()] + list(words))
    return call


# ------------------------------------------------------------------------------------------ the command line
@pytest.mark.parametrize("script, words, parts", [
    (train, ["--learning-rat=1e-3"], ["unknown option --learning_rat", "did you mean --learning_rate?"]),
    (train, ["--batchsize=8"], ["--batchsize", "did you mean --batch_size?"]),
    (train, ["--max_iters=many"], ["--max_iters is 'many'", "an integer such as 3000"]),
    (train, ["--max_iters=1e3"], ["--max_iters is '1e3'", "an integer"]),
    (train, ["--max_iters="], ["--max_iters is ''", "an integer"]),
    (train, ["--steps=8"], ["unknown option --steps: ", "--max_iters"]),
    (train, ["--solver=heun"], ["unknown option --solver: "]),
    (sample, ["--sigma=8"], ["unknown option --sigma: ", "training"]),
    (train, ["--learning_rate=nan"], ["--learning_rate", "a finite number"]),
    (train, ["--learning_rate=inf"], ["--learning_rate", "a finite number"]),
    (train, ["--resume=maybe"], ["--resume is 'maybe'", "True or False"]),
    (train, ["--trunk_mode=frosen"], ["--trunk_mode is 'frosen'", "one of frozen, lora, full", "mean frozen?"]),
    (train, ["--path_mode=ful"], ["--path_mode is 'ful'", "did you mean full?"]),
    (train, ["--dtype=int8"], ["--dtype is 'int8'", "one of auto, float32, bfloat16, float16"]),
    (train, ["--device=mps"], ["--device is 'mps'", "one of auto, cpu, cuda"]),
    (train, ["--compile=True"], ["--compile is 'True'", "one of auto, on, off"]),
    (train, ["--max_iters"], ["--max_iters needs =VALUE"]),
    (train, ["steps=3"], ["'steps=3'", "--key=value"]),
    (train, ["config/l2d_gms8k.py"], ["cannot read config/l2d_gms8k.py", "did you mean config/l2d_gsm8k.py?"]),
    (sample, ["--stepz=8"], ["--stepz", "did you mean --steps?"]),
    (sample, ["--solver=eular"], ["--solver is 'eular'", "one of euler, midpoint, heun", "did you mean euler?"]),
    (sample, ["--steps=four"], ["--steps is 'four'", "an integer"]),
    (sample, ["--guess=best"], ["--guess is 'best'", "argmax, sample, mean"]),
    (sample, ["--checkpoint=step100"], ["--checkpoint is 'step100'", "one of best, last"]),
    (sample, ["--shortlist=50"], ["unknown option --shortlist"])])
def test_a_word_that_means_nothing(script, words, parts, error):
    says(error(script, *words), *parts)


def test_a_typo_in_a_config_file_is_as_wrong_and_says_where(error, tmp_path):
    path = tmp_path / "x.py"
    for text, parts in (("max_iters = 10\nlearning_rat = 1e-3\n", (":2", "learning_rat", "did you mean learning_rate?")),
                        ("max_iters = 'ten'\n", (":1", "max_iters is 'ten'", "an integer")),
                        ("import os\n", (":1", "expected name = value"))):
        path.write_text(text)
        says(error(train, str(path)), path, *parts)


# ---------------------------------------------------------------------------------- combinations and ranges
@pytest.mark.parametrize("options, parts", [
    (FROM_SCRATCH | dict(n_embd=30, n_head=4), ["n_embd=30", "does not divide", "n_head=4"]),
    (FROM_SCRATCH | dict(n_layer=0), ["at least 1", "n_layer=0"]),
    (dict(block_size=129), ["block_size=129", "beyond the trunk's 128 positions"]),
    (dict(block_size=64), ["longest example", "block_size=64", "raise it"]),
    (dict(block_size=1), ["block_size=1", "at least 2"]),
    (dict(batch_size=10, gradient_accumulation_steps=4), ["batch_size=10", "gradient_accumulation_steps=4"]),
    (dict(warmup_iters=40), ["warmup_iters=40", "max_iters=40"]),
    (dict(min_lr=0.02), ["min_lr=0.02", "learning_rate=0.01", "a rise"]),
    (dict(path_mode="none"), ["trunk_mode=frozen", "path_mode=none", "trains nothing", "choose"]),
    *[(dict(trunk="scratch", trunk_mode=mode), ["trunk=scratch", f"trunk_mode={mode}", "use trunk_mode=full"])
      for mode in ("lora", "frozen")],
    (dict(path_mode="none", trunk_mode="full", unroll=4), ["unroll=4", "without a path", "leave it out"]),
    (dict(n_layer=3), ["n_layer=3", "without trunk=scratch", "leave it out"]),
    (dict(out_dir=""), ["out_dir is empty"]), (dict(val_split="train"), ["val_split=train", "trained on"]),
    (dict(lora_alpha=0), ["lora_alpha=0", "above 0"]),
    (dict(train_split="trian"), ["no split 'trian'", "train, val, test"]),
    (dict(val_split="valid"), ["no split 'valid'", "train, val, test"]),
    (dict(trunk="gpt3"), ["'gpt3'", "gpt2-medium"]),
    (dict(resume=True), ["nothing to resume", "last.pt", "start without --resume"]),
    (dict(t_dim=33), ["t_dim=33", "even"]),
    (dict(group_dropout=1.5), ["group_dropout=1.5", "at most 1"]),
    (dict(beta1=1.0), ["beta1=1.0", "below 1"]),
    *[({name: 0}, [f"{name}=0", "at least 1"]) for name in
      ("max_iters", "batch_size", "gradient_accumulation_steps", "eval_interval", "eval_examples", "log_interval", "lora_rank", "x_dim")],
    *[({name: 0}, [f"{name}=0", "above 0"]) for name in ("sigma", "learning_rate")],
    *[({name: -1}, [f"{name}=-1", "at least 0"]) for name in
      ("seed", "warmup_iters", "weight_decay", "grad_clip", "unroll", "min_lr", "beta1", "beta2", "group_dropout")]])
def test_a_setting_of_train_that_cannot_work(options, parts, error, tmp_path):
    says(error(train, **options), *parts)
    assert not (tmp_path / "out/last.pt").exists()


@pytest.mark.parametrize("options, parts", [
    (dict(temperature=-0.5), ["temperature=-0.5", "at least 0"]), (dict(temperature=1e-40), ["temperature=1e-40", "0.0001"]),
    (dict(guidance=1e38), ["guidance=1e+38", "1000"]), (dict(top_k=-1), ["top_k=-1", "at least 0"]), (dict(top_k=5), ["top_k=5", "without a temperature"]),
    (dict(t_end=1.5), ["t_end=1.5", "at most 1"]), (dict(t_hold=0.4), ["t_hold=0.4", "solver=fixed_point", "leave it out"]),
    (dict(t_hold=0.95, solver="fixed_point"), ["t_hold=0.95", "t_end", "0.9"]), (dict(relaxation=0.3), ["relaxation=0.3", "fixed_point"]),
    (dict(tol=0), ["tol=0", "above 0"]), (dict(tol=0.2, solver="heun"), ["tol=0.2", "solver=adaptive", "leave it out"]), (dict(stop=-1), ["stop=-1", "at least 0"]),
    (dict(relaxation=0), ["relaxation=0", "above 0"]), (dict(steps=0), ["steps=0", "at least 1"]),
    (dict(draft=-1), ["draft=-1", "at least 0"]), (dict(seed=-1), ["seed=-1", "at least 0"]),
    (dict(max_new_tokens=0), ["max_new_tokens=0", "at least 1"]), (dict(num_samples=0), ["num_samples=0", "at least 1"]),
    (dict(guidance=2), ["guidance=2", "needs a --group", "1 step"]), (dict(group=4), ["group='4'", "1 step, 2 steps"]),
    (dict(group="2 steps", steps=1), ["group='2 steps'", "steps=1", "trunk"]),
    (dict(group="2 step"), ["group='2 step'", "2 steps"]),
    (dict(guidance=2, group="1 step"), ["guidance=2.0", "--steps=3", "not 2"]),
    (dict(prompt=""), ["empty"]), (dict(prompt="  \t"), ["empty"]),
    (dict(prompt="What is <|endoftext|> 3?"), ["<|endoftext|>", "remove it"]),
    (dict(prompt="How many apples? " * 60), ["prompt has", "128 positions", "shorten it"])])
def test_a_setting_of_sample_that_cannot_work(options, parts, error):
    says(error(sample, **options), *parts)


# ------------------------------------------------------------------------------------------------------- data
def test_no_data_says_how_to_make_it(error, tmp_path):
    says(error(train, data_dir=tmp_path / "nothing"), f"no prepared data in {tmp_path / 'nothing'}",
         "python prepare_data.py", f"--out_dir={tmp_path / 'nothing'}")
    says(error(train, data_dir="data/nothing"), "make it with: python prepare_data.py nothing")


def test_data_of_another_tokenizer(error, arithmetic, tmp_path):
    folder = Path(shutil.copytree(arithmetic, tmp_path / "other"))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"tokenizer": {"name": "klingon", "fingerprint": "0" * 16}}))
    says(error(train, data_dir=folder), "tokenizer klingon", "arithmetic", "prepare the data with --tokenizer=arithmetic")
    assert not (tmp_path / "out/last.pt").exists()


def test_weights_of_another_vocabulary(error, tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    turned = r"(c_attn|c_proj|c_fc)\.weight"
    tensors = {k: v.t().contiguous() if re.search(turned, k) else v
               for k, v in GPT(GPTConfig(128, 300, 1, 1, 64)).state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    says(error(train, trunk=tmp_path), "300 tokens", "665", "choose a trunk with 665 tokens")


# ------------------------------------------------------------------------------------------------- checkpoints
def test_no_checkpoint_says_how_to_make_one(error, tmp_path):
    says(error(sample, out_dir=tmp_path / "none"), f"no checkpoint at {tmp_path / 'none'}/best.pt",
         "python train.py config/")
    says(error(sample, out_dir="out/l2d_gsm8k/"), "no checkpoint at out/l2d_gsm8k/best.pt", "config/l2d_gsm8k.py")


def test_no_trunk(error, tmp_path):
    says(error(train, trunk=tmp_path / "none.pt"), f"no checkpoint at {tmp_path / 'none.pt'}", "python train.py")
    says(error(train, trunk=tmp_path / "none.safetensors"), "none.safetensors", "neither a file, a directory")
    (tmp_path / "bad.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    says(error(train, trunk=tmp_path / "bad.safetensors"), "bad.safetensors")
    (tmp_path / "bad.pt").write_bytes(b"x")
    says(error(train, trunk=tmp_path / "bad.pt"), "bad.pt", "damaged")


@pytest.mark.parametrize("change, parts", [
    (lambda c: c.update(tokenizer={"name": "arithmetic", "fingerprint": "f" * 16}), ["tokenizer", "KeyError"]),
    (lambda c: c["tokenizer"].update(fingerprint="f" * 16), ["tokenizer", "fingerprint is another one"]),
    (lambda c: c["trunk_config"].update(rotary=True), ["rotary"]),
    (lambda c: c["path_config"].update(kind="full"), ["kind"]),
    (lambda c: c["trunk_config"].update(n_layer=5), ["missing trunk.h.4"]),
    (lambda c: c["model"].pop("path.W.weight"), ["missing path.W.weight"]),
    (lambda c: c["model"].update(extra=torch.ones(1)), ["unexpected extra"]),
    (lambda c: c.pop("n_groups"), ["n_groups"]), (lambda c: c.pop("tokenizer"), ["tokenizer"]),
    (lambda c: c.pop("data"), ["data"]), (lambda c: c.pop("config"), ["config"])])
def test_a_checkpoint_of_another_version(change, parts, error, out_dir):
    checkpoint = load_checkpoint(out_dir / "best.pt")
    change(checkpoint)
    torch.save(checkpoint | {"trunk_sha256": None}, out_dir / "best.pt")
    says(error(sample, out_dir=out_dir), *parts)


# ----------------------------------------------------------------------------------------------- from a shell
BAD = [("train", ["--data_dir=nowhere"], "python prepare_data.py"), ("train", ["--stepz=3"], "--stepz"),
       ("train", ["--min_lr=1", "--learning_rate=.1"], "a rise"),
       ("train", ["--warmup_iters=-1"], "at least 0"), ("sample", ["--out_dir={tmp}"], "python train.py config/"),
       ("sample", ["--out_dir={l2d}", "--steps=0"], "at least 1"),
       ("sample", ["--out_dir={l2d}", "--guidance=2", "--group=1 step", "--steps=2"], "--steps=3"),
       ("sample", ["--out_dir={trunk}", "--steps=1", "--group=1 step"], "without a path")]


@pytest.mark.parametrize("name, words, part", BAD)
def test_a_mistake_ends_with_status_1_and_one_line(name, words, part, tmp_path, l2d, trunk):
    """In a process of its own: nothing on stdout, no traceback, no file that was there changed."""
    before = files(l2d), files(trunk)
    words = [word.format(tmp=tmp_path / "none", l2d=l2d, trunk=trunk) for word in words]
    status, out, err = script(tmp_path, name, *words)
    assert (status, out) == (1, "") and err.startswith("error: ") and err.count("\n") == 1 and part in err, err
    assert (files(l2d), files(trunk)) == before and not (tmp_path / "none").exists()


def test_python_o_removes_no_check(tmp_path):
    """The real interpreter, without asserts: the same line."""
    done = child(["-O", "train.py"], "--batch_size=10", "--gradient_accumulation_steps=4", "--warmup_iters=4000", f"--out_dir={tmp_path / 'x'}")
    assert done.returncode == 1 and done.stdout == "" and "warmup_iters=4000" in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["train", "sample"])
def test_help_into_a_closed_pipe_is_quiet(name):
    """python NAME.py --help | head -1, where head is the quicker one."""
    reader = subprocess.Popen([sys.executable, f"{name}.py", "--help"], cwd=ROOT, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, env={**__import__("os").environ, **ENV})
    reader.stdout.close()
    assert reader.stderr.read() == b""
    reader.stderr.close()
    reader.wait(60)


def test_a_home_folder_is_expanded(options, tmp_path, monkeypatch):
    """--out_dir=~/x: no shell does it behind an equals sign."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    train.main(argv(**options | dict(out_dir="~/mine", max_iters=1, warmup_iters=0)))
    assert (tmp_path / "mine/last.pt").exists() and not (tmp_path / "~").exists()
    sample.main(["--out_dir=~/mine/", "--steps=2", "--max_new_tokens=2"])
