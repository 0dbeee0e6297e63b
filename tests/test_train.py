"""train.py: every mode trains what it should and nothing else; k micro-batches, two ranks and a resumed run are one run."""
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import prepare_data
import sample
import train
from configurator import UserError
from diffusion import sample_t
from model import L2D, GPT, GPTConfig, LoRALinear, describe, load_checkpoint, model_from_checkpoint
from prepare_data import load_manifest, load_split, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(n_layer=2, n_head=2, n_embd=32, block_size=128, x_dim=16, t_dim=32, sigma=4, lora_rank=4, batch_size=16, steps=40,
            warmup=2, learning_rate=1e-2, min_lr=1e-3, eval_every=1000, eval_examples=32, log_every=1)
MODES = [("frozen", "full"), ("frozen", "lora"), ("lora", "none"), ("lora", "full"), ("lora", "lora"),
         ("full", "none"), ("full", "full"), ("full", "lora")]


def argv(**options):
    return [f"--{key}={value}" for key, value in (TINY | options).items()]


def config(**options):
    return train.configure(train.Config, argv(**options))


def metrics(out_dir):
    """The records of metrics.jsonl, as strict JSON: NaN and Infinity are not."""
    def refuse(word):
        raise AssertionError(f"{word} in metrics.jsonl is not JSON")
    return [json.loads(line, parse_constant=refuse) for line in (Path(out_dir) / "metrics.jsonl").read_text().splitlines()]


def losses(out_dir):
    return [r["loss"] for r in metrics(out_dir) if "loss" in r]


def evaluations(out_dir):
    return [r for r in metrics(out_dir) if "val_loss" in r]


def child(code_or_module, *args, timeout=120, **env):
    """A Python of its own, one thread: as fast, and as exact, as this one."""
    return subprocess.run([sys.executable, *code_or_module, *args], cwd=ROOT, capture_output=True, text=True, timeout=timeout,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"} | env)


def same_tensors(a, b):
    """Whether two nests of dicts, lists and tensors are equal, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_tensors(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_tensors, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


# The three things that many tests start from, each made once a session; the other test files import them from here.
@pytest.fixture(scope="session")
def arithmetic(tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "arithmetic"
    if not folder.exists():
        prepare_data.main(["arithmetic", f"--out_dir={folder}", "--train=300", "--mix=300"])
    return folder


@pytest.fixture(scope="session")
def trunk(arithmetic, tmp_path_factory):
    """out_dir of a trunk trained from scratch on the mixture."""
    out_dir = tmp_path_factory.getbasetemp() / "trunk"
    if not out_dir.exists():
        train.main(argv(data_dir=arithmetic, train_split="mix", val_split="mix_val", out_dir=out_dir, trunk="scratch",
                        trunk_mode="full", path_mode="none", steps=60))
    return out_dir


@pytest.fixture(scope="session")
def l2d(arithmetic, trunk, tmp_path_factory):
    """out_dir of a path trained on that trunk, the trunk frozen."""
    out_dir = tmp_path_factory.getbasetemp() / "l2d"
    if not out_dir.exists():
        train.main(argv(data_dir=arithmetic, out_dir=out_dir, trunk=trunk / "last.pt", steps=60))
    return out_dir


@pytest.fixture(scope="session")
def wild(l2d, tmp_path_factory):
    """out_dir of a random pair, in the shape of l2d: a talkative trunk, and a path that changes its mind at every step."""
    out_dir = tmp_path_factory.getbasetemp() / "wild"
    if not out_dir.exists():
        checkpoint = load_checkpoint(l2d / "last.pt")
        generator, model = torch.Generator().manual_seed(0), {}
        for name, w in checkpoint["model"].items():
            std = {"trunk.wte.weight": 0.4, "path.w.2.weight": 0.02}.get(name, 0.3)
            model[name] = std * torch.randn(w.shape, generator=generator) if w.dim() == 2 else w
        out_dir.mkdir()
        torch.save(checkpoint | {"model": model}, out_dir / "best.pt")
    return out_dir


@pytest.fixture
def options(arithmetic, trunk, tmp_path):
    """Of a short run in a folder of its own."""
    return dict(data_dir=arithmetic, trunk=trunk / "last.pt", out_dir=tmp_path / "out")


@pytest.fixture(scope="session")
def encoding():
    return load_tokenizer("arithmetic")


# --------------------------------------------------------------------------------------------------- modes
def test_trunk_from_scratch(trunk):
    first, last = evaluations(trunk)
    assert first["step"] == 0 and last["step"] == 60
    assert abs(first["val_loss"] - math.log(665)) < 0.1           # an untrained model knows nothing of 665 tokens
    assert last["val_loss"] < first["val_loss"] - 1 and "val_loss_by_t" not in last
    assert load_checkpoint(trunk / "last.pt")["path_config"] is None


@pytest.mark.parametrize("trunk_mode, path_mode", MODES)
def test_mode(trunk_mode, path_mode, options, trunk, capsys):
    """The loss falls; what should train changed, every tensor of it; all else is as it was, bit for bit; and it samples."""
    run = train.Run(config(**options, trunk_mode=trunk_mode, path_mode=path_mode))
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    trains = {name for name in before if name.startswith("path.") or trunk_mode == "full" or "lora_" in name}
    parameters = dict(run.model.named_parameters())
    in_optimizer = [p for group in run.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in in_optimizer} == {id(parameters[name]) for name in trains} and len(in_optimizer) == len(trains)

    shutil.rmtree(options["out_dir"])
    train.main(argv(**options, trunk_mode=trunk_mode, path_mode=path_mode))
    first, last = evaluations(options["out_dir"])
    assert first["val_loss"] == pytest.approx(first["trunk_loss"], rel=1e-4)   # a fresh path keeps the direction of the trunk's states
    assert last["val_loss"] < first["val_loss"] - 0.1
    assert (last["trunk_loss"] == first["trunk_loss"]) == (trunk_mode == "frozen")

    after = load_checkpoint(options["out_dir"] / "last.pt")
    assert after["model"].keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after["model"][name])}
    assert changed == trains
    assert len(after["optimizer"]["state"]) == len(trains)
    assert not [name for name in before if name.startswith("path.") and ".linear." in name]   # borrowed, not saved twice

    original = load_checkpoint(trunk / "last.pt")["model"]
    if trunk_mode != "full":                                      # the frozen weights are those of the trunk's file
        frozen = {name.replace(".linear.", "."): t for name, t in after["model"].items() if name.startswith("trunk.") and "lora_" not in name}
        digest = lambda tensors: hashlib.sha256(b"".join(tensors[k].numpy().tobytes() for k in sorted(tensors))).hexdigest()
        assert digest(frozen) == digest(original)

    capsys.readouterr()
    sample.main([f"--out_dir={options['out_dir']}", f"--steps={1 if path_mode == 'none' else 3}", "--max_new_tokens=4"])
    assert f"NFE {0 if path_mode == 'none' else 2:.2f}" in capsys.readouterr().out


def test_every_option_of_the_diffusion(options):
    """The values that are not the defaults reach the path and train."""
    train.main(argv(**options, input_scale="unit", time_scale=1, gate_init=0.5, token_input=False, w_init=0.5, stratified=False, lora_alpha=8,
                    path_mode="lora"))
    path = load_checkpoint(options["out_dir"] / "best.pt")["path_config"]
    assert path == dict(mode="lora", x_dim=16, t_dim=32, sigma=4.0, input_scale="unit", time_scale=1.0, gate_init=0.5, token_input=False, w_init=0.5,
                        n_labels=4, rank=4, alpha=8.0)
    first, last = evaluations(options["out_dir"])
    assert last["val_loss"] < first["val_loss"] - 0.1


def test_training_through_the_sampler(options):
    train.main(argv(**options, unroll=3))
    first, last = evaluations(options["out_dir"])
    assert last["val_loss"] < first["val_loss"] - 0.1
    assert last["val_loss_by_t"][:7] == [None] * 7                           # every last evaluation is at t_end


def test_lora_trunk_is_merged_in(options, tmp_path, arithmetic):
    train.main(argv(**options, trunk_mode="lora", path_mode="none"))
    finetuned = model_from_checkpoint(load_checkpoint(tmp_path / "out/last.pt"), "last.pt").trunk
    base = model_from_checkpoint(load_checkpoint(options["trunk"]), "trunk").trunk
    merged = train.make_model(config(**options | dict(trunk=tmp_path / "out/last.pt")), load_manifest(arithmetic)).trunk
    assert not any(isinstance(m, LoRALinear) for m in merged.modules()) and not any(p.requires_grad for p in merged.parameters())
    idx = torch.arange(60).view(2, 30)
    with torch.no_grad():
        want, got, other = (model.head(model(idx)[0]) for model in (finetuned, merged, base))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert (want - other).abs().max() > 0.1                       # the LoRA had learned something to merge


def test_trunk_from_a_safetensors_file(options, tmp_path):
    """The branch for GPT-2's weights, from a local file that is Conv1D the wrong way round as GPT-2's are."""
    from safetensors.torch import save_file
    gpt = GPT(GPTConfig(128, 665, 1, 1, 64))
    weights = [f"{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    save_file({k: v.t().contiguous() if k.endswith(tuple(weights)) else v for k, v in gpt.state_dict().items()}, tmp_path / "model.safetensors")
    train.main(argv(**options | dict(trunk=tmp_path), steps=3))
    after = load_checkpoint(tmp_path / "out/last.pt")["model"]
    assert all(torch.equal(after["trunk." + k], v) for k, v in gpt.state_dict().items())


def test_overfit(options, arithmetic, tmp_path, monkeypatch):
    """One batch, seen again and again beside a frozen random trunk: the loss is near zero for every bin of t."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(128, 665, 2, 4, 64))
    with torch.no_grad():                                         # GPT's initial weights could not say anything clearly
        for p in gpt.parameters():
            p *= 20 if p is gpt.wte.weight or p is gpt.wpe.weight else 4 if p.dim() == 2 else 1
    manifest, seen, batch_of = load_manifest(arithmetic), set(), train.batch_of
    torch.save(describe(L2D(gpt)) | {"tokenizer": {"name": "arithmetic", "fingerprint": manifest["fingerprint"]}}, tmp_path / "random.pt")
    monkeypatch.setattr(train, "batch_of", lambda data, ids, device: (seen.add(tuple(ids)), batch_of(data, ids, device))[1])
    train.main(argv(**options | dict(trunk=tmp_path / "random.pt"), overfit=True, batch_size=4, steps=120, x_dim=64, sigma=64,
                    learning_rate=3e-3, warmup=20))
    first, last = evaluations(options["out_dir"])
    assert min(first["val_loss_by_t"]) > 5 and last["trunk_loss"] == first["trunk_loss"]
    assert max(last["val_loss_by_t"]) < 0.05, last["val_loss_by_t"]
    assert len(seen) == 1                                         # evaluated on what it trained on


# ---------------------------------------------------------------------------------------------------- data
def test_batch_of(arithmetic, encoding):
    data, ids = load_split(arithmetic, "train"), [7, 3, 250, 41, 3]
    idx, targets, label = train.batch_of(data, ids, "cpu")
    longest = 0
    for row, i in enumerate(ids):
        problem = data.problems[i]
        prompt = encoding.encode_ordinary(f"Question: {problem.question}\nAnswer:")
        answer = encoding.encode_ordinary(" " + problem.answer) + [encoding.eot_token]
        n, k = len(prompt), len(answer)
        longest = max(longest, n + k - 1)
        assert idx[row, :n + k - 1].tolist() == (prompt + answer)[:-1]
        assert targets[row].tolist() == [-1] * (n - 1) + answer + [-1] * (idx.size(1) - (n + k - 1))
        assert encoding.decode([y for y in targets[row].tolist() if y >= 0]) == f" {problem.answer}<|endoftext|>"
        assert label[row] == min(problem.answer.count("\n"), 4) - 1       # lines before ####, at most 4
    assert idx.shape == targets.shape == (5, longest) and idx.dtype == targets.dtype == label.dtype == torch.long


@pytest.mark.parametrize("n, batch_size, n_micro", [(300, 16, 1), (300, 16, 4), (300, 300, 2), (2000, 16, 2), (1601, 16, 16), (33, 32, 1)])
def test_batches_of_epoch(n, batch_size, n_micro):
    lengths = np.random.default_rng(0).integers(20, 120, n)
    epochs = [train.batches_of_epoch(lengths, batch_size, n_micro, [5, epoch]) for epoch in range(12)]
    for batches in epochs:
        assert batches.shape == (n // batch_size, n_micro, batch_size // n_micro)
        assert len(set(batches.ravel().tolist())) == batches.size         # at most once
        assert batches.min() >= 0 and batches.max() < n
    assert np.array_equal(epochs[3], train.batches_of_epoch(lengths, batch_size, n_micro, [5, 3]))
    assert not np.array_equal(epochs[0], train.batches_of_epoch(lengths, batch_size, n_micro, [6, 0]))
    assert len({batches.tobytes() for batches in epochs}) == 12
    assert set(np.concatenate([b.ravel() for b in epochs]).tolist()) == set(range(n))     # none is left out for good
    if n // batch_size > 2:                                       # short and long ones in no order
        means = lengths[epochs[0]].mean((1, 2))
        assert not (np.diff(means) >= 0).all() and not (np.diff(means) <= 0).all()


def test_little_padding(arithmetic):
    """Micro-batches hold similar lengths, whatever their number; a step of several sees more than one length."""
    lengths = np.diff(load_split(arithmetic, "train").offsets)
    padding = lambda batches: 1 - lengths[batches].sum() / (lengths[batches].max(-1) * batches.shape[-1]).sum()
    shuffled = np.random.default_rng(0).permutation(288).reshape(18, 1, 16)
    for n_micro in (1, 4):
        assert padding(train.batches_of_epoch(lengths, 16, n_micro, 0)) < 0.06 < 0.15 < padding(shuffled)
    spread = lambda n_micro: lengths[train.batches_of_epoch(lengths, 16, n_micro, 0)].reshape(18, 16).std(1).mean()
    assert spread(1) < 3 < 8 < spread(4)


def test_data_smaller_than_a_batch(options, tmp_path):
    batches = train.batches_of_epoch(np.array([5, 9, 7, 8, 6]), 16, 2, 0)
    assert batches.shape == (1, 2, 8) and all((batches == i).sum() in (3, 4) for i in range(5))
    prepare_data.main(["arithmetic", f"--out_dir={tmp_path / 'five'}", "--train=5", "--mix=5"])
    train.main(argv(**options | dict(data_dir=tmp_path / "five"), steps=3, warmup=0))
    assert len(losses(options["out_dir"])) == 3


# --------------------------------------------------------------------------------------------- random numbers
def test_generator_for():
    draws = {}
    for key in [(kind, seed, step, micro) for kind in (0, 1) for seed in (0, 1) for step in range(20) for micro in range(8)]:
        draws[key] = torch.rand(4, generator=train.generator_for("cpu", *key))
        assert torch.equal(draws[key], torch.rand(4, generator=train.generator_for("cpu", *key)))
    assert len({tuple(d.tolist()) for d in draws.values()}) == len(draws)


def test_noise_differs_everywhere(options, monkeypatch):
    """Over the micro-batches of three steps: no x_0 and no t twice, one t in each bin; and again the same with the same seed."""
    drawn, draw = [], train.draw_noise
    monkeypatch.setattr(train, "draw_noise", lambda *args: (drawn.append(draw(*args)), drawn[-1])[1])
    def three_steps(seed):
        shutil.rmtree(options["out_dir"], ignore_errors=True)
        drawn.clear()
        run = train.Run(config(**options, grad_accum=4, seed=seed))
        for _ in range(3):
            run.train_step()
        return [t.clone() for _, t, _, _ in drawn], torch.cat([x_0 for _, _, x_0, _ in drawn])
    ts, x_0 = three_steps(0)
    assert len(ts) == 12
    for t in ts:
        assert sorted((t * len(t)).long().tolist()) == list(range(len(t)))                # stratified over the micro-batch
        assert (t[1:] > t[:-1]).float().mean() < 0.7                                      # but in no order
    t = torch.cat(ts)
    assert len(t.unique()) > 0.999 * len(t) and len(x_0.unique(dim=0)) == len(x_0) == len(t)
    assert len(x_0.flatten().unique()) > 0.99 * x_0.numel()                               # independent within a position too
    assert abs(x_0.std() / 4 - 1) < 0.02 and abs(x_0.mean()) < 0.1                        # sigma = 4
    again, x_0_again = three_steps(0)
    other, x_0_other = three_steps(1)
    assert torch.equal(x_0, x_0_again) and same_tensors(ts, again)
    assert len(set(t.tolist()) & set(torch.cat(other).tolist())) < 0.01 * len(t)         # float32 has few values: some meet by chance


def test_draw(options):
    """Labels are dropped per example with the given probability; unroll draws from one to so many calls."""
    model = train.make_model(config(**options), load_manifest(options["data_dir"]))
    targets, label = torch.zeros(4000, 5, dtype=torch.long), torch.arange(4000) % 4
    targets[:, 2] = -1
    new, t, x_0, times = train.draw_noise(config(**options, label_dropout=0.2), model, targets, label, train.generator_for("cpu", 1))
    dropped = new == 4
    assert abs(dropped.float().mean() - 0.2) < 0.03 and torch.equal(new[~dropped], label[~dropped])
    assert len(t) == len(x_0) == 16000 and times is None
    drawn = [train.draw_noise(config(**options, unroll=3, label_dropout=0), model, targets, label, train.generator_for("cpu", i)) for i in range(60)]
    assert {len(times) for _, _, _, times in drawn} == {2, 3, 4} and torch.equal(drawn[0][0], label)
    assert all(times[0] == 0 and times[-1] == 0.9 and (t == 0.9).all() for _, t, _, times in drawn)


# ---------------------------------------------------------------------------------------- one batch, many ways
def noise_from_tokens(config, model, targets, label, generator):
    """Stands in for train.draw: what an example draws depends on its tokens alone, not on its batch."""
    t, x_0 = [], []
    for row in targets:
        y = row[row >= 0]
        generator = torch.Generator().manual_seed(int((y * torch.arange(1, len(y) + 1)).sum()))
        t.append(torch.rand(len(y), generator=generator))
        x_0.append(torch.randn(len(y), model.path.config.x_dim, generator=generator) * model.path.config.sigma)
    return label, torch.cat(t), torch.cat(x_0), None


def test_micro_batches_are_one_batch(options, tmp_path, monkeypatch):
    """The same examples in 1, 2 and 8 parts of unequal numbers of targets: no mean of means."""
    monkeypatch.setattr(train, "draw_noise", noise_from_tokens)
    batches_of_epoch = train.batches_of_epoch
    def halves_of_one_batch(lengths, batch_size, n_micro, seed):  # else n_micro decides which examples meet in a step
        batches = batches_of_epoch(lengths, batch_size, 1, seed)
        assert len(set(lengths[batches[0, 0]])) > 1
        return batches.reshape(-1, n_micro, batch_size // n_micro)
    monkeypatch.setattr(train, "batches_of_epoch", halves_of_one_batch)
    weights, records = {}, {}
    for k in (1, 2, 8):
        out_dir = tmp_path / f"k{k}"
        train.main(argv(**options | dict(out_dir=out_dir), trunk_mode="lora", grad_accum=k, steps=6, learning_rate=1e-3))
        weights[k] = load_checkpoint(out_dir / "last.pt")["model"]
        records[k] = [(r["loss"], r["grad_norm"]) for r in metrics(out_dir) if "loss" in r]
    for k in (2, 8):
        np.testing.assert_allclose(records[k], records[1], rtol=2e-5)
        torch.testing.assert_close(weights[k], weights[1], rtol=1e-4, atol=1e-5)


def test_two_ranks_are_two_micro_batches(options, tmp_path):
    """gloo, two processes: the weights, the losses and the evaluation of one process with two micro-batches."""
    shared = options | dict(steps=5, unroll=2, learning_rate=1e-3, eval_examples=70)
    train.main(argv(**shared, grad_accum=2))
    two = child(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"],
                *argv(**shared | dict(out_dir=tmp_path / "two"), device="cpu"))
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("step 5/5") == 1 and "2 x cpu" in two.stdout                  # only the main rank speaks
    a, b = (load_checkpoint(out / "last.pt") for out in (tmp_path / "out", tmp_path / "two"))
    torch.testing.assert_close(a["model"], b["model"], rtol=1e-4, atol=1e-5)
    assert evaluations(tmp_path / "two")[0]["val_loss"] != evaluations(tmp_path / "two")[-1]["val_loss"]      # it did train
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "out"), rtol=1e-5)
    for one, other in zip(evaluations(tmp_path / "out"), evaluations(tmp_path / "two"), strict=True):
        assert one["val_loss"] == pytest.approx(other["val_loss"], rel=1e-5)
        assert one["val_loss_by_t"] == pytest.approx(other["val_loss_by_t"], abs=2e-4)


# -------------------------------------------------------------------------------------------- kill and resume
KILL = """
import os, signal, sys, torch, train
at, argv = sys.argv[1], sys.argv[2:]
step, save = train.Run.train_step, torch.save
def killed_step(run):
    if run.step == 9: os.kill(os.getpid(), signal.SIGKILL)
    return step(run)
def killed_save(checkpoint, file):
    save(checkpoint, file)
    file.flush()
    if checkpoint["step"] == 6 and "last" in str(file.name):
        os.truncate(file.name, os.path.getsize(file.name) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
if at == "step": train.Run.train_step = killed_step
else: torch.save = killed_save
train.main(argv)
"""


@pytest.mark.parametrize("at, kept", [("step", 6), ("save", 0)])
def test_resume_after_a_kill(at, kept, options, tmp_path):
    """resumed at step 0, the evaluation of step 0 stands twice in metrics.jsonl.

    SIGKILL three steps after a checkpoint, or half-way through writing one; then resume: bit for bit the uninterrupted run."""
    shared = options | dict(steps=12, eval_every=6, batch_size=32, unroll=2, path_mode="lora")      # 9 steps an epoch
    train.main(argv(**shared | dict(out_dir=tmp_path / "straight")))
    killed = child(["-c", KILL, at], *argv(**shared))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert load_checkpoint(tmp_path / "out/last.pt")["step"] == kept
    if at == "step":
        assert losses(tmp_path / "out") == losses(tmp_path / "straight")[:9]              # three of them to be repeated
        with open(tmp_path / "out/metrics.jsonl", "a") as file:
            file.write('{"step": 10, "lo')                                                # as a full disk would leave it
    torch.manual_seed(99)                                                                 # global randomness must not matter
    train.main(argv(**shared) + ["--resume"])
    a, b = (load_checkpoint(tmp_path / name / "last.pt") for name in ("out", "straight"))
    assert a["step"] == b["step"] == 12 and a["best"] == b["best"]
    assert same_tensors(a["model"], b["model"]) and same_tensors(a["optimizer"], b["optimizer"])
    timeless = lambda out: [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")} for r in metrics(out)]
    assert timeless(tmp_path / "out") == timeless(tmp_path / "straight")
    assert same_tensors(*(load_checkpoint(tmp_path / name / "best.pt")["model"] for name in ("out", "straight")))


def test_resume_keeps_the_loss_scale(options, tmp_path):
    """float16: the scaler's state is part of the run."""
    shared = options | dict(dtype="float16", steps=4, eval_every=2, warmup=0)
    train.main(argv(**shared))
    run = train.Run(config(**shared, resume=True))
    scaler = load_checkpoint(tmp_path / "out/last.pt")["scaler"]
    assert run.scaler.state_dict() == scaler != torch.amp.GradScaler("cpu").state_dict()


def files(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def test_refusals_lose_nothing(options):
    train.main(argv(**options, steps=4, eval_every=2))
    before = files(options["out_dir"])
    assert set(before) == {"last.pt", "best.pt", "metrics.jsonl"}                         # no .part left behind
    with pytest.raises(UserError, match=r"last.pt exists; go on with --resume, or choose another --out_dir"):
        train.main(argv(**options, steps=4, eval_every=2))
    with pytest.raises(UserError, match=r"another configuration: sigma was 4.0, now 5.0; learning_rate was 0.01, now 0.02"):
        train.main(argv(**options, steps=4, eval_every=2, resume=True) + ["--sigma=5", "--learning_rate=0.02"])
    assert files(options["out_dir"]) == before
    train.main(argv(**options, steps=4, eval_every=2, resume=True))                       # a finished run: nothing to do
    assert files(options["out_dir"]) == before


# ------------------------------------------------------------------------------------------------ optimisation
def test_learning_rate():
    c = config(steps=50, warmup=10, learning_rate=3e-3, min_lr=1e-4)
    got = [train.learning_rate(step, c) for step in range(50)]
    want = [3e-3 * (s + 1) / 10 for s in range(10)] + np.interp(range(10, 50), [10, 49], [3e-3, 1e-4]).tolist()
    np.testing.assert_allclose(got, want, rtol=1e-12)
    c = config(steps=1, warmup=0, learning_rate=3e-3)
    assert train.learning_rate(0, c) == 3e-3                                              # and no division by 0


def one_step(options, **more):
    """Parameters before and after one step of a fresh run, by name; and the run."""
    shutil.rmtree(options["out_dir"], ignore_errors=True)
    run = train.Run(config(**options, **more))
    named = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in named.items()}
    loss, norm, n = run.train_step()
    return before, {name: p.detach().clone() for name, p in named.items()}, run, norm


def test_the_step_has_the_size_of_the_schedule(options):
    """AdamW's first update is lr * sign(gradient), wherever the gradient is not tiny and nothing decays."""
    before, after, run, _ = one_step(options, warmup=5, weight_decay=0)
    change = (after["path.w.2.weight"] - before["path.w.2.weight"]).abs()
    assert change.median().item() == pytest.approx(1e-2 / 5, rel=1e-2)
    run.train_step()
    assert [group["lr"] for group in run.optimizer.param_groups] == pytest.approx([2e-2 / 5] * 2)


def test_weight_decay_on_matrices_only(options):
    """The first gradient does not know of the decay, so a step with it differs from one without by -lr * decay * p."""
    both = dict(trunk_mode="full", path_mode="full", warmup=0)
    before, plain, _, _ = one_step(options, weight_decay=0, **both)
    _, decayed, _, _ = one_step(options, weight_decay=0.5, **both)
    assert {p.dim() for p in before.values()} == {1, 2}
    for name, p in before.items():
        want = plain[name] - (1e-2 * 0.5 * p if p.dim() == 2 else 0)
        torch.testing.assert_close(decayed[name], want, rtol=0, atol=2e-7 * max(1, p.abs().max().item()), msg=name)


def test_clipping(options):
    """Adam's first moment after one step is (1 - beta1) times the gradient it was given."""
    given = {}
    for clip in (0, 1e-3, 1e6):
        _, _, run, norm = one_step(options | dict(trunk_mode="lora"), grad_clip=clip, beta1=0.9)
        moments = [run.optimizer.state[p]["exp_avg"].flatten() for p in run.params]
        given[clip] = torch.cat(moments) / (1 - 0.9)
        assert given[clip].norm().item() == pytest.approx(min(norm, clip or math.inf), rel=1e-3)      # norm: before clipping
    assert given[0].norm() > 2e-3 and torch.equal(given[0], given[1e6])
    torch.testing.assert_close(given[1e-3] / given[1e-3].norm(), given[0] / given[0].norm(), rtol=1e-4, atol=1e-6)


def test_the_gradient_is_that_of_the_mean_over_tokens(options):
    """By hand, from the model's forward: sum of -log p over all targets, divided by their number."""
    shutil.rmtree(options["out_dir"], ignore_errors=True)
    run = train.Run(config(**options, grad_accum=2, grad_clip=0, weight_decay=0))
    total, count = 0, 0
    for micro, ids in enumerate(run.batch(0)):
        idx, targets, label = train.batch_of(run.train, ids, "cpu")
        label, t, x_0, _ = train.draw_noise(run.config, run.model, targets, label, train.generator_for("cpu", 0, 0, 0, micro))
        rows, cols = torch.where(targets != -1)
        x_1 = run.model.path.token_space(run.model.trunk.wte.weight[targets[rows, cols]])
        c = run.model.read(idx, (rows, cols))
        logits = run.model(t[:, None] * x_1 + (1 - t)[:, None] * x_0, t, c, label[rows])
        total = total - logits.log_softmax(-1)[range(len(rows)), targets[rows, cols]].sum()
        count += len(rows)
    want = torch.autograd.grad(total / count, run.params, allow_unused=True)
    loss, norm, n = run.train_step()
    assert n == count and loss == pytest.approx(total.item() / count, rel=1e-5)
    for p, grad in zip(run.params, want, strict=True):
        grad = torch.zeros_like(p) if grad is None else grad
        torch.testing.assert_close(run.optimizer.state[p]["exp_avg"] / (1 - 0.9), grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype, options, monkeypatch):
    """Matmuls of trunk and path run in it, weights stay float32, everything stays finite and near float32."""
    seen = set()
    make_model = train.make_model
    def hooked(*args):
        model = make_model(*args)
        for module in (model.trunk.h[0].mlp.c_fc, model.path.h[1].c_q):
            module.register_forward_hook(lambda m, x, y: seen.add(y.dtype))
        model.path.W.register_forward_hook(lambda m, x, y: seen.add(("x_1", y.dtype)))
        return model
    monkeypatch.setattr(train, "make_model", hooked)
    options |= dict(learning_rate=1e-3, warmup=0)                 # at a high rate the first steps amplify any rounding
    train.main(argv(**options, dtype=dtype))
    assert seen == {getattr(torch, dtype), ("x_1", torch.float32)}
    first, last = evaluations(options["out_dir"])
    assert last["val_loss"] < first["val_loss"] - 0.1 and all(map(math.isfinite, losses(options["out_dir"])))
    weights = load_checkpoint(options["out_dir"] / "last.pt")["model"]
    assert all(w.dtype == torch.float32 and w.isfinite().all() for w in weights.values())
    train.main(argv(**options | dict(out_dir=options["out_dir"].with_name("exact"))))
    np.testing.assert_allclose(losses(options["out_dir"])[:5], losses(options["out_dir"].with_name("exact"))[:5], rtol=5e-3)


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile on CPU needs a C++ compiler")
@pytest.mark.parametrize("backend, modes", [("aot_eager", dict(trunk_mode="full", path_mode="full")),     # traced, not compiled: quick
                                            ("inductor", dict(trunk_mode="full", path_mode="none"))])     # the real one, on one layer
def test_compile(backend, modes, options, tmp_path, monkeypatch):
    """The same losses, and checkpoints under the same names."""
    shared = options | modes | dict(trunk="scratch", n_layer=1, overfit=True, batch_size=2, steps=2, warmup=0, eval_examples=2)
    train.main(argv(**shared))
    compile_, compiled = torch.nn.Module.compile, []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: (compiled.append(type(module)), compile_(module, backend=backend)))
    torch._dynamo.reset()
    train.main(argv(**shared | dict(out_dir=tmp_path / "compiled"), compile="on"))
    assert compiled == [L2D, GPT]
    frames = torch._dynamo.utils.counters["frames"]
    assert frames["ok"] > 0
    np.testing.assert_allclose(losses(tmp_path / "compiled"), losses(tmp_path / "out"), rtol=1e-4)
    a, b = (load_checkpoint(tmp_path / name / "last.pt")["model"] for name in ("compiled", "out"))
    assert a.keys() == b.keys()
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------- evaluation
class OneOf:
    """Stands in for Ranks: rank r of w, with the other ranks' sums handed in."""
    def __init__(self, rank, world, others=()):
        self.rank, self.world, self.device, self.others, self.own = rank, world, torch.device("cpu"), others, None

    def sum(self, tensor):
        self.own = tensor.clone()
        for other in self.others:
            tensor += other
        return tensor


def test_evaluate(options, l2d):
    """Per-bin means computed one target at a time; the same at every call and for every number of ranks."""
    c = config(**options)
    model = model_from_checkpoint(load_checkpoint(l2d / "last.pt"), "l2d").requires_grad_(False)
    data, ids = load_split(options["data_dir"], "val"), range(70)                         # three batches, the last not full
    call = lambda ranks: train.evaluate(model, data, ids, c, ranks, train.nullcontext())
    alone = call(OneOf(0, 1))

    bins, trunk_losses = [[] for _ in range(8)], []
    for start in range(0, 70, 32):
        _, targets, label = train.batch_of(data, ids[start:start + 32], "cpu")
        label = torch.full_like(label, model.path.config.n_labels)            # validation is without labels
        _, t, x_0, _ = train.draw_noise(c, model, targets, label, train.generator_for("cpu", 1, 0, start))
        used = 0
        for i in ids[start:start + 32]:                           # one example at a time, without padding
            tokens = torch.from_numpy(data.tokens[data.offsets[i]:data.offsets[i + 1]].astype(np.int64))
            cols = torch.arange(len(tokens) - 1)[torch.from_numpy(data.mask[data.offsets[i] + 1:data.offsets[i + 1]])]
            y, mine = tokens[cols + 1], slice(used, used + len(cols))
            used += len(cols)
            context = model.read(tokens[None, :-1], (torch.zeros_like(cols), cols))
            x_t = t[mine, None] * model.embed(y) + (1 - t[mine, None]) * x_0[mine]
            logits = model(x_t, t[mine], context, torch.tensor([model.path.config.n_labels]).expand(len(cols)))
            for b, loss in zip((t[mine] * 8).floor().int().tolist(), F.cross_entropy(logits, y, reduction="none").tolist()):
                bins[b].append(loss)
            trunk_losses += F.cross_entropy(model.trunk.head(context.h), y, reduction="none").tolist()
        assert used == len(t)
    assert alone["trunk_loss"] == pytest.approx(np.mean(trunk_losses), rel=1e-5)
    assert alone["val_loss"] == pytest.approx(np.mean(sum(bins, [])), rel=1e-5)
    assert alone["val_loss_by_t"] == pytest.approx([np.mean(b) for b in bins], abs=1e-4)
    assert alone["val_loss"] < alone["trunk_loss"] - 0.1 and len(set(alone["val_loss_by_t"])) == 8

    torch.manual_seed(123)
    assert call(OneOf(0, 1)) == alone
    ranks = [OneOf(rank, 2) for rank in range(2)]
    for one in ranks:
        call(one)
    assert sum(int(one.own[1, -1]) for one in ranks) == len(trunk_losses) > ranks[0].own[1, -1] > 0
    both = call(OneOf(0, 2, [ranks[1].own]))
    assert both["val_loss"] == pytest.approx(alone["val_loss"], rel=1e-9) and both["trunk_loss"] == pytest.approx(alone["trunk_loss"], rel=1e-9)
    assert both["val_loss_by_t"] == alone["val_loss_by_t"]


def test_bins_without_a_target(options):
    """one example and no stratification can leave a bin empty; 0 / 0 is no JSON."""
    data = load_split(options["data_dir"], "val")
    n = int(data.mask[:data.offsets[1]].sum())
    empty = lambda seed: len(set((sample_t(n, train.generator_for("cpu", 1, seed, 0), False) * 8).int().tolist())) < 8
    seed = next(filter(empty, range(1000)))
    train.main(argv(**options, eval_examples=1, stratified=False, steps=3, seed=seed))
    assert len(evaluations(options["out_dir"])) == 2


# ------------------------------------------------------------------------------------------------------ trouble
def test_metrics(options):
    """A line per step and per evaluation, with the numbers that the terminal shows."""
    train.main(argv(**options, steps=20, eval_every=10, log_every=5))
    records = metrics(options["out_dir"])
    assert [(r["step"], "loss" in r) for r in records] == [(0, False), (5, True), (10, True), (10, False), (15, True), (20, True), (20, False)]
    for r in records:
        if "loss" in r:
            assert r["loss"] > 0 and r["lr"] == train.learning_rate(r["step"] - 1, config(**options, steps=20)) and r["tokens_per_second"] > 0
    best = load_checkpoint(options["out_dir"] / "best.pt")
    assert best["best"] == min(r["val_loss"] for r in records if "val_loss" in r) and "optimizer" not in best


def test_best_is_the_best(options, monkeypatch):
    """best.pt stays at the lowest validation loss while last.pt goes on."""
    fake = iter([3.0, 2.0, 2.5, 2.2])
    evaluate = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *args: evaluate(*args) | {"val_loss": next(fake)})
    train.main(argv(**options, steps=6, eval_every=2))
    best, last = (load_checkpoint(options["out_dir"] / f"{name}.pt") for name in ("best", "last"))
    assert (best["step"], best["best"], last["step"], last["best"]) == (2, 2.0, 6, 2.0)
    assert not torch.equal(best["model"]["path.W.weight"], last["model"]["path.W.weight"])


def test_loss_is_nan(options):
    """One line; the last evaluated state is still there."""
    with pytest.raises(UserError) as e:
        train.main(argv(**options, trunk_mode="full", path_mode="none", steps=40, learning_rate=1e9, grad_clip=0))
    message = str(e.value)
    assert "\n" not in message and message.startswith("error: the loss is nan at step ") and "lower learning_rate" in message
    assert "last.pt" in message
    checkpoint = load_checkpoint(options["out_dir"] / "last.pt")
    assert checkpoint["step"] == 0 and all(w.isfinite().all() for w in checkpoint["model"].values())
    assert len(metrics(options["out_dir"])) > 0


def test_nan_is_not_saved(options):
    """weights that went to NaN in the step before an evaluation replace the good last.pt."""
    with pytest.raises(UserError, match="the loss is nan|validation loss"):
        train.main(argv(**options, trunk_mode="full", path_mode="none", steps=40, learning_rate=1e9, grad_clip=0, eval_every=1))
    checkpoint = load_checkpoint(options["out_dir"] / "last.pt")
    assert all(w.isfinite().all() for w in checkpoint["model"].values())
    assert math.isfinite(checkpoint["best"]) and metrics(options["out_dir"])


def test_float16_overflow(options, monkeypatch):
    """a step that the scaler skips has an infinite norm, which is no JSON. The weights stay."""
    GradScaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: GradScaler(device, init_scale=2.0 ** 60, enabled=enabled))
    train.main(argv(**options, dtype="float16", steps=4, trunk_mode="full", path_mode="none"))
    after = load_checkpoint(options["out_dir"] / "last.pt")["model"]
    assert same_tensors(after, load_checkpoint(options["trunk"])["model"])
    assert len(losses(options["out_dir"])) == 4
