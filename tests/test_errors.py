"""Bad input to train.py, sample.py and evaluate.py: one line that names the value, what was expected and the way out."""
import json
import os
import pickle
import re
import shutil
import socket
from pathlib import Path

import pytest
import torch

import evaluate
import sample
import train
from model import GPT, GPTConfig, load_checkpoint
from test_train import TINY, arithmetic, child, files, l2d, trunk  # noqa: F401  (fixtures)


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
    """The message with which a script ends, given its options beside those that are fine."""
    fine = {train: TINY | dict(data_dir=arithmetic, trunk=trunk / "last.pt", out_dir=tmp_path / "out"),
            sample: dict(out_dir=l2d, steps=2, max_new_tokens=4),
            evaluate: dict(out_dir=l2d, steps="1,2", limit=2, max_new_tokens=4)}
    def call(script, *words, **options):
        with pytest.raises(SystemExit) as e:
            script.main([f"--{k}={v}" for k, v in (fine[script] | options).items()] + list(words))
        message = e.value.code
        assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message and len(message) < 2000, message
        return message
    return call


def says(message, *parts):
    missing = [part for part in parts if str(part) not in message]
    assert not missing, f"{missing} not in {message!r}"


# ------------------------------------------------------------------------------------------ the command line
@pytest.mark.parametrize("script, words, parts", [
    (train, ["--learning-rat=1e-3"], ["unknown option --learning_rat", "did you mean --learning_rate?"]),
    (train, ["--batchsize=8"], ["--batchsize", "did you mean --batch_size?"]),
    (sample, ["--stepz=8"], ["--stepz", "did you mean --steps?"]),
    (evaluate, ["--splt=val"], ["--splt", "did you mean --split?"]),
    (evaluate, ["val"], ["'val'", "--key=value"]),
    (train, ["--steps=many"], ["--steps is 'many'", "an integer such as 3000"]),
    (train, ["--steps=1e3"], ["--steps is '1e3'", "an integer"]),
    (train, ["--learning_rate=nan"], ["--learning_rate", "a finite number"]),
    (train, ["--resume=maybe"], ["--resume is 'maybe'", "True or False"]),
    (train, ["--trunk_mode=frosen"], ["--trunk_mode is 'frosen'", "one of frozen, lora, full", "did you mean frozen?"]),
    (train, ["--path_mode=ful"], ["--path_mode is 'ful'", "did you mean full?"]),
    (train, ["--dtype=int8"], ["--dtype is 'int8'", "one of auto, float32, bfloat16, float16"]),
    (train, ["--steps"], ["--steps needs =VALUE"]),
    (train, ["config/l2d_gms8k.py"], ["cannot read config/l2d_gms8k.py", "did you mean config/l2d_gsm8k.py?"]),
    (sample, ["--solver=eular"], ["--solver is 'eular'", "one of euler, midpoint, heun, adaptive", "did you mean euler?"]),
    (sample, ["--steps=four"], ["--steps is 'four'", "an integer"]),
    (sample, ["--guess=best"], ["--guess is 'best'", "argmax, sample, mean"]),
    (sample, ["--checkpoint=step100"], ["--checkpoint is 'step100'", "one of best, last"]),
    (evaluate, ["--solver=rk4"], ["--solver is 'rk4'", "midpoint"]),
    (evaluate, ["--limit=ten"], ["--limit is 'ten'", "an integer"]),
])
def test_command_line(script, words, parts, error):
    says(error(script, *words), *parts)


def test_config_file(error, tmp_path):
    """A typo in a file is as wrong as on the command line, and says where."""
    path = tmp_path / "x.py"
    path.write_text("steps = 10\nlearning_rat = 1e-3\n")
    says(error(train, str(path)), f"{path}:2", "learning_rat", "did you mean learning_rate?")
    path.write_text("steps = 'ten'\n")
    says(error(train, str(path)), f"{path}:1", "steps is 'ten'", "an integer")


# -------------------------------------------------------------------------------- combinations and ranges: train
@pytest.mark.parametrize("options, parts", [
    (dict(trunk="scratch", trunk_mode="full", n_embd=30, n_head=4), ["n_embd=30", "not divisible", "n_head=4"]),
    (dict(trunk="scratch", trunk_mode="full", n_layer=0), ["at least 1", "n_layer=0"]),
    (dict(block_size=129), ["block_size=129", "beyond the trunk's 128 positions"]),
    (dict(block_size=64), ["longest example", "block_size=64", "raise it"]),
    (dict(batch_size=10, grad_accum=4), ["batch_size=10", "grad_accum=4"]),
    (dict(warmup=40), ["warmup=40", "steps=40"]),
    (dict(warmup=-1), ["warmup=-1", "at least 0"]),
    (dict(steps=0), ["steps=0", "at least 1"]),
    (dict(batch_size=0), ["batch_size=0", "at least 1"]),
    (dict(grad_accum=0), ["grad_accum=0", "at least 1"]),
    (dict(eval_every=0), ["eval_every=0", "at least 1"]),
    (dict(lora_rank=0, path_mode="lora"), ["lora_rank=0", "at least 1"]),
    (dict(t_dim=33), ["t_dim=33", "even"]),
    (dict(sigma=0), ["sigma=0", "above 0"]),
    (dict(learning_rate=0), ["learning_rate=0", "above 0"]),
    (dict(path_mode="none"), ["trunk_mode=frozen", "path_mode=none", "trains nothing", "choose"]),
    (dict(trunk="scratch", trunk_mode="lora"), ["trunk=scratch", "trunk_mode=lora", "use trunk_mode=full"]),
    (dict(train_split="trian"), ["no split 'trian'", "train, val, test"]),
    (dict(trunk="gpt3"), ["'gpt3'", "gpt2-medium"]),
    (dict(resume=True), ["nothing to resume", "last.pt", "start without --resume"]),
])
def test_train(options, parts, error, tmp_path):
    says(error(train, **options), *parts)
    assert not (tmp_path / "out/last.pt").exists()


@pytest.mark.parametrize("options, parts", [
    (dict(seed=-1), ["seed=-1", "at least 0"]),
    (dict(beta1=1.0), ["beta1=1.0", "below 1"]),
    (dict(beta2=-0.5), ["beta2=-0.5"]),
    (dict(label_dropout=1.5), ["label_dropout=1.5", "at most 1"]),
    (dict(label_dropout=2), ["label_dropout=2", "at most 1"]),
    (dict(unroll=-1), ["unroll=-1", "at least 0"]),
    (dict(unroll_t_end=1.5), ["unroll_t_end=1.5", "(0, 1]"]),
    (dict(min_lr=-1), ["min_lr=-1", "at least 0"]),
])
def test_train_ranges(options, parts, error):
    """these values are not checked; the first three end in a traceback, the others train nonsense."""
    says(error(train, **options), *parts)


def test_batch_over_ranks(error, monkeypatch):
    """Before any process group is made."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    says(error(train), "batch_size=16", "3 ranks")


# -------------------------------------------------------------------------- combinations and ranges: the others
SAMPLER = [
    (dict(temperature=-0.5), ["temperature=-0.5", "at least 0"]), (dict(top_k=-1), ["top_k=-1", "at least 0"]),
    (dict(t_end=1.5), ["t_end=1.5", "in [0, 1]"]), (dict(shift=0), ["shift=0", "above 0"]),
    (dict(tol=0), ["tol=0", "above 0"]), (dict(stop=1), ["stop=1", "in [0, 1)"]), (dict(steps=0), ["steps=0", "at least 1"]),
    (dict(max_new_tokens=0), ["max_new_tokens=0", "at least 1"]), (dict(guidance=2), ["guidance=2", "needs a --label", "0 to 3"]),
    (dict(label=4), ["label=4", "0: 1 step", "3: 4 or more steps", "-1: none"]), (dict(label=-2), ["label=-2", "-1: none"])]


@pytest.mark.parametrize("script", [sample, evaluate])
@pytest.mark.parametrize("options, parts", SAMPLER)
def test_sampler(script, options, parts, error):
    says(error(script, **options), *parts)


@pytest.mark.parametrize("options, parts", [
    (dict(num_samples=0), ["num_samples=0", "at least 1"]), (dict(steps=-3), ["steps=-3", "at least 1"]),
    (dict(prompt=""), ["prompt is empty", "write a question"]), (dict(prompt="  \t"), ["prompt is empty"]),
    (dict(prompt="What is <|endoftext|> 3?"), ["<|endoftext|>", "remove it"]),
    (dict(prompt="How many apples? " * 60), ["prompt has", "128 positions", "shorten it"])])
def test_sample(options, parts, error):
    says(error(sample, **options), *parts)


@pytest.mark.parametrize("steps", ["", "1,,2", "1;2", "1-4", "two", "1,2,x", "1.5", "-2"])
def test_steps_of_evaluate(steps, error):
    says(error(evaluate, steps=steps), f"steps={steps!r}", "separated by commas", "1,2,4,8,16")


def test_steps_of_evaluate_in_other_digits(error):
    """a superscript is a digit to str.isdigit and none to int."""
    says(error(evaluate, steps="1,2\u00b2"), "steps=", "separated by commas")


@pytest.mark.parametrize("options, parts", [
    (dict(limit=-1), ["limit=-1", "at least 0"]), (dict(batch_size=0), ["batch_size=0", "at least 1"]),
    (dict(split="dev"), ["no split 'dev'", "train, val, test"]), (dict(steps="1,0"), ["steps=0", "at least 1"])])
def test_evaluate(options, parts, error):
    says(error(evaluate, **options), *parts)


@pytest.mark.parametrize("script", [sample, evaluate])
def test_steps_without_a_path(script, error, trunk):
    says(error(script, out_dir=trunk), "trunk without a path", "--steps=1", "not 2", f"--trunk={trunk}/best.pt")


@pytest.mark.parametrize("script, limit", [(sample, "--max_new_tokens=2"), (evaluate, "--limit=2")])
def test_a_huge_seed(script, limit, out_dir):
    """the seed times 1,000,003 leaves 64 bits, a traceback."""
    script.main([f"--out_dir={out_dir}", "--steps=2", "--max_new_tokens=2", limit, f"--seed={10 ** 15}"])


# ------------------------------------------------------------------------------------------------------- data
def test_no_data(error, tmp_path):
    says(error(train, data_dir=tmp_path / "nothing"), f"no prepared data in {tmp_path / 'nothing'}", "python prepare_data.py", f"--out_dir={tmp_path / 'nothing'}")
    says(error(train, data_dir=tmp_path / "gsm8k"), "python prepare_data.py gsm8k")
    says(error(evaluate, data_dir=tmp_path / "nothing"), "python prepare_data.py")
    assert not (tmp_path / "out/last.pt").exists()


@pytest.fixture
def other_data(arithmetic, tmp_path):
    """The data with a manifest that names another tokenizer."""
    folder = Path(shutil.copytree(arithmetic, tmp_path / "other"))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"tokenizer": "klingon", "fingerprint": "0" * 16}))
    return folder


def test_data_of_another_tokenizer(error, other_data, tmp_path):
    says(error(train, data_dir=other_data), str(other_data), "tokenizer klingon", "arithmetic", "prepare the data for this trunk")
    says(error(evaluate, data_dir=other_data), str(other_data), "tokenizer klingon", "arithmetic", "choose the data it was trained on")
    assert not (tmp_path / "out/last.pt").exists()


def test_checkpoint_of_another_tokenizer(error, out_dir):
    checkpoint = load_checkpoint(out_dir / "best.pt")
    torch.save(checkpoint | {"tokenizer": {"name": "arithmetic", "fingerprint": "f" * 16}}, out_dir / "best.pt")
    for script in (sample, evaluate):
        says(error(script, out_dir=out_dir), "best.pt", "another version of the tokenizer arithmetic", "train it again")
    torch.save(checkpoint | {"tokenizer": {"name": "klingon", "fingerprint": "f" * 16}}, out_dir / "best.pt")
    says(error(sample, out_dir=out_dir), "unknown tokenizer 'klingon'")


def test_weights_of_another_vocabulary(error, tmp_path):
    from safetensors.torch import save_file
    tensors = GPT(GPTConfig(128, 300, 1, 1, 64)).state_dict()
    tensors = {k: v.t().contiguous() if re.search(r"(c_attn|c_proj|c_fc)\.weight", k) else v for k, v in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    says(error(train, trunk=tmp_path), "300 tokens", "prepare the data for this trunk")


# ------------------------------------------------------------------------------------------------- checkpoints
@pytest.mark.parametrize("script", [sample, evaluate])
def test_no_checkpoint(script, error, tmp_path):
    says(error(script, out_dir=tmp_path / "none"), f"no checkpoint at {tmp_path / 'none'}/best.pt", "python train.py config/")


def test_no_trunk(error, tmp_path):
    says(error(train, trunk=tmp_path / "none.pt"), f"no checkpoint at {tmp_path / 'none.pt'}", "python train.py config/")
    says(error(train, trunk=tmp_path / "none.safetensors"), "none.safetensors", "neither a file, a directory")
    (tmp_path / "bad.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    says(error(train, trunk=tmp_path / "bad.safetensors"), "bad.safetensors", "not a valid .safetensors")


class NotATensor:
    def __reduce__(self):
        return os.mkdir, (str(Path(os.environ["PYTEST_TMP_TARGET"])),)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "a list", "code", "a directory"])
def test_damaged_checkpoint(damage, error, out_dir, tmp_path, monkeypatch):
    """In every way one line; and what a pickle would run is not run."""
    monkeypatch.setenv("PYTEST_TMP_TARGET", str(tmp_path / "executed"))
    for name in ("best.pt", "last.pt"):
        path = out_dir / name
        whole = path.read_bytes()
        if damage == "a directory":
            path.unlink()
            path.mkdir()
        elif damage == "a list":
            torch.save([1, 2], path)
        else:
            path.write_bytes({"truncated": whole[:len(whole) // 2], "empty": b"", "text": b"hello", "code": pickle.dumps(NotATensor(), protocol=2)}.get(damage))
    for script, options in [(sample, dict(out_dir=out_dir)), (evaluate, dict(out_dir=out_dir)), (train, dict(trunk=out_dir / "best.pt"))]:
        says(error(script, **options), str(out_dir / "best.pt"), "not a checkpoint of train.py, or is damaged")
    says(error(train, out_dir=out_dir, resume=True), str(out_dir / "last.pt"), "damaged")
    assert not (tmp_path / "executed").exists()


def test_checkpoint_of_another_architecture(error, out_dir):
    """All names that differ, in one line."""
    checkpoint = load_checkpoint(out_dir / "best.pt")
    model = dict(checkpoint["model"])
    model["path.new.weight"] = model.pop("path.W.weight")
    model["trunk.ln_f.bias"] = torch.zeros(31)
    torch.save(checkpoint | {"model": model}, out_dir / "best.pt")
    for script, options in [(sample, dict(out_dir=out_dir)), (evaluate, dict(out_dir=out_dir)), (train, dict(trunk=out_dir / "best.pt"))]:
        says(error(script, **options), "best.pt", "missing path.W.weight", "unexpected path.new.weight", "trunk.ln_f.bias is (31,), not (32,)")


def test_resume_with_another_configuration(error, l2d, out_dir, trunk):
    """Names each difference, old and new; nothing is lost."""
    before = files(out_dir)
    same = dict(out_dir=out_dir, resume=True, steps=60)
    says(error(train, **same, sigma=8), "last.pt", "sigma was 4.0, now 8.0")
    says(error(train, **same, path_mode="lora", x_dim=8), "path_mode was 'full', now 'lora'", "x_dim was 16, now 8")
    says(error(train, out_dir=out_dir, steps=60), "last.pt exists", "--resume", "another --out_dir")
    assert files(out_dir) == before


def test_resume_on_other_data(error, out_dir, arithmetic, tmp_path):
    """A folder that may have moved, but was prepared anew with another seed."""
    shutil.copytree(arithmetic, tmp_path / "data")
    manifest = json.loads((tmp_path / "data/manifest.json").read_text())
    (tmp_path / "data/manifest.json").write_text(json.dumps(manifest | {"seed": 7}))
    says(error(train, out_dir=out_dir, resume=True, steps=60, data_dir=tmp_path / "data"), "another configuration",
         f"seed of the data was {manifest['seed']}, now 7")


def test_resume_on_another_trunk(error, out_dir, tmp_path, arithmetic):
    """trunk may move, but a trunk of another shape does not fit: the names that differ."""
    train.main([f"--{k}={v}" for k, v in (TINY | dict(data_dir=arithmetic, out_dir=tmp_path / "one", trunk="scratch", trunk_mode="full",
                                                       path_mode="none", n_layer=1, steps=1, warmup=0)).items()])
    says(error(train, out_dir=out_dir, resume=True, steps=60, trunk=tmp_path / "one/last.pt"), "does not fit this model", "trunk.h.1.ln_1.bias")


@pytest.mark.parametrize("change, parts", [
    (lambda c: c["trunk_config"].update(rotary=True), ["rotary"]),
    (lambda c: c["path_config"].pop("mode") and c["path_config"].update(kind="full"), ["kind"]),
    (lambda c: c.pop("tokenizer"), ["tokenizer"]),
    (lambda c: c.pop("data"), ["data"]),
])
def test_checkpoint_of_another_version(change, parts, error, out_dir):
    """unknown or missing entries end in a TypeError or KeyError."""
    checkpoint = load_checkpoint(out_dir / "best.pt")
    change(checkpoint)
    torch.save(checkpoint, out_dir / "best.pt")
    says(error(sample, out_dir=out_dir), "best.pt", *parts)


def test_resume_from_best(error, out_dir):
    """best.pt in the place of last.pt has no optimizer and ends in a KeyError."""
    shutil.copy(out_dir / "best.pt", out_dir / "last.pt")
    says(error(train, out_dir=out_dir, resume=True, steps=60), "last.pt", "optimizer")


# --------------------------------------------------------------------------------------------- machine and disk
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
@pytest.mark.parametrize("script", [train, sample, evaluate])
def test_no_cuda(script, error):
    says(error(script, device="cuda"), "--device=cuda", "no CUDA", "use --device=cpu")


def test_out_dir_cannot_be_written(error, tmp_path, out_dir):
    """A file in the way (root ignores permission bits), found before the data is read or the model is made."""
    (tmp_path / "file").write_text("here")
    for path in (tmp_path / "file", tmp_path / "file/below"):
        says(error(train, out_dir=path, data_dir=tmp_path / "nothing"), f"out_dir={path}", "cannot write", "choose another --out_dir")
    (tmp_path / "taken/metrics.jsonl").mkdir(parents=True)
    says(error(train, out_dir=tmp_path / "taken"), f"out_dir={tmp_path / 'taken'}", "cannot write")
    (out_dir / "eval").write_text("here")
    says(error(evaluate, out_dir=out_dir), str(out_dir / "eval"), "cannot write")
    assert (tmp_path / "file").read_text() == "here"


def test_control_without_evaluation(error, out_dir, tmp_path):
    pytest.importorskip("matplotlib")
    says(error(evaluate, "--plot", f"--controls={tmp_path / 'lora'}", out_dir=out_dir, steps=1), f"no evaluation in {tmp_path / 'lora'}",
         f"python evaluate.py --out_dir={tmp_path / 'lora'}")


# ------------------------------------------------------------------------------------------------- exit status
@pytest.mark.parametrize("script, words, part", [
    ("train.py", ["--data_dir=nowhere", "--out_dir={tmp}"], "python prepare_data.py"),
    ("sample.py", ["--out_dir={tmp}", "--prompt=x"], "python train.py config/"),
    ("evaluate.py", ["--out_dir={tmp}", "--steps=1,zwei"], "steps='1,zwei'")])
def test_exit_status(script, words, part, tmp_path):
    """From a shell: status 1, nothing on stdout, one line on stderr, no traceback."""
    done = child([script], *[word.format(tmp=tmp_path) for word in words])
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ") and part in done.stderr
