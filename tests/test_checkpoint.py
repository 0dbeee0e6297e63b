"""plumbing/checkpoint.py and run_folder.py: what is saved is whole, loads as it was, and a run that was stopped or killed is the same run."""
import hashlib
import json
import math
import os
import pickle
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers import (
    Process,
    argv,
    error_of,
    everywhere,
    files,
    losses,
    metrics,
    same_tensors,
    says,
    script,
    slow,
    timeless,
    tokens,
)
from soak import soak
from test_model import TINY, noisy, pair

import plumbing.checkpoint as c
import plumbing.ranks as ranks_module
import train
from configurator import UserError
from plumbing.checkpoint import load_checkpoint, pair_from
from plumbing.files import lock
from plumbing.ranks import Ranks
from plumbing.run_folder import describe
from plumbing.trained import load

# trunk_mode, path_mode
MODES = [("frozen", "full"), ("frozen", "lora"), ("lora", "none"), ("lora", "full"), ("lora", "lora"), ("full", "none"),
         ("full", "full"), ("full", "lora")]


def describe_to(folder, model, lora=None):
    """A saved checkpoint of the model, its path."""
    rest = dict.fromkeys(c.PARTS) | describe(model, lora, folder)
    torch.save(rest, folder / "last.pt")
    return folder / "last.pt"


# ---------------------------------------------------------------------------------------------- round trip
@pytest.mark.parametrize("mode", [None, "full", "lora"])
@pytest.mark.parametrize("lora", [None, (4, 8.0)])
def test_a_loaded_pair_is_the_saved_one(tmp_path, mode, lora):
    model = pair(mode, lora=lora)
    file = describe_to(tmp_path, model, list(lora) if lora else None)
    copy_ = pair_from(load_checkpoint(file), file)
    assert copy_.trunk.config == TINY
    assert (copy_.path.config if mode else None) == (model.path.config if mode else None)
    assert model.state_dict().keys() == copy_.state_dict().keys()
    assert not any(p.requires_grad for n, p in copy_.trunk.named_parameters() if "lora_" not in n)
    at, (x_t, t, group) = everywhere(2, 9), noisy(18)
    with torch.no_grad():
        for one, other in zip(model.read_context(tokens(2, 9), at), copy_.read_context(tokens(2, 9), at)):
            torch.testing.assert_close(one, other, atol=0, rtol=0)
        if mode:
            logits = [x(x_t, t, x.read_context(tokens(2, 9), at), group) for x in (model, copy_)]
            assert torch.equal(*logits)


def test_a_frozen_trunk_is_stored_once_and_checked_by_its_hash(options, trunk):
    """best.pt, last.pt and previous.pt hold the path alone; trunk.pt never changes, and another is refused."""
    train.main(argv(**options, max_iters=6, eval_interval=2))
    out = options["out_dir"]
    saved = {name: torch.load(out / f"{name}.pt", weights_only=True) for name in ("best", "last", "previous")}
    for one in saved.values():
        assert all(k.startswith("path.") for k in one["model"])
        assert one["trunk_sha256"] == hashlib.sha256((out / "trunk.pt").read_bytes()).hexdigest()
    original = load_checkpoint(trunk / "last.pt")["model"]
    loaded = load_checkpoint(out / "best.pt")
    assert all(torch.equal(loaded["model"][k], v) for k, v in original.items())
    assert loaded["sha256"] == hashlib.sha256((out / "best.pt").read_bytes()).hexdigest()
    whole = (out / "trunk.pt").read_bytes()
    torch.save({k: v + 1 for k, v in torch.load(out / "trunk.pt", weights_only=True).items()}, out / "trunk.pt")
    says(error_of(load_checkpoint, out / "best.pt"), "trunk.pt is not the trunk that", "best.pt")
    (out / "trunk.pt").write_bytes(whole[:100])
    says(error_of(load_checkpoint, out / "best.pt"), "trunk.pt", "damaged")
    (out / "trunk.pt").unlink()
    says(error_of(load_checkpoint, out / "best.pt"), "trunk.pt, is not there; keep both files in one folder")


def test_the_hash_is_of_the_bytes_that_were_read(tmp_path, monkeypatch):
    """Whatever training does to the file in between."""
    file = describe_to(tmp_path, pair(None))
    before, load = file.read_bytes(), torch.load
    def replaced(buffer, **kwargs):
        file.write_bytes(b"another")
        return load(buffer, **kwargs)
    monkeypatch.setattr(c.torch, "load", replaced)
    assert c.read(file)[1] == hashlib.sha256(before).hexdigest()


# --------------------------------------------------------------------------------------------------- damage
class Garbage:
    pass


class Code:
    def __reduce__(self):
        return os.mkdir, (os.environ["CODE_TARGET"],)


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "truncated", "a flipped byte", "pickle", "code", "object",
                                    "list", "other keys", "directory"])
def test_a_checkpoint_that_cannot_be_read_is_one_line_and_runs_nothing(tmp_path, damage, monkeypatch):
    monkeypatch.setenv("CODE_TARGET", str(tmp_path / "executed"))
    file = describe_to(tmp_path, pair())
    good = file.read_bytes()
    spoilt = {"empty": b"", "text": b"weights\n" * 99, "truncated": good[:len(good) // 2],
              "a flipped byte": good[:999] + bytes([good[999] ^ 64]) + good[1000:],
              "pickle": pickle.dumps({"model": Garbage()}, protocol=2), "code": pickle.dumps(Code(), protocol=2)}
    stored = {"object": {"trunk_config": {}, "model": Garbage()}, "list": [1], "other keys": {"state_dict": {}}}
    file.unlink()
    if damage == "directory":
        file.mkdir()
    elif damage in spoilt:
        file.write_bytes(spoilt[damage])
    elif damage in stored:
        torch.save(stored[damage], file)
    says(error_of(load_checkpoint, file), file)
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_of_another_architecture_prints_every_difference(tmp_path):
    checkpoint = load_checkpoint(describe_to(tmp_path, pair()))
    checkpoint["trunk_config"] |= {"n_layer": 4, "vocab_size": 32}
    says(error_of(pair_from, checkpoint, "out/last.pt"), "out/last.pt", "missing trunk.h.3.ln_1.weight",
         "trunk.wte.weight is (31, 24), not (32, 24)")
    checkpoint = load_checkpoint(describe_to(tmp_path, pair("full")))
    checkpoint["path_config"] |= {"path_mode": "lora"}
    says(error_of(pair_from, checkpoint, "out/last.pt"), "missing path.h.0.c_q.lora_A",
         "unexpected path.h.0.c_q.weight")
    checkpoint["path_config"] |= {"rotary": True}
    says(error_of(pair_from, checkpoint, "out/last.pt"), "another version", "rotary")


@pytest.mark.parametrize("change", [dict(path_config={"sigma": 0.0}), dict(path_config={"sigma": math.nan}),
                                    dict(path_config={"x_dim": [3]}), dict(path_config={"t_dim": 7}), dict(n_groups="two"),
                                    dict(trunk_config={"n_head": 0}), dict(trunk_lora=[1]), dict(trunk_lora=["a", "b"]),
                                    dict(model=[1, 2]), dict(trunk_config={"n_embd": "wide"})])
def test_a_checkpoint_that_holds_what_it_cannot_is_one_line(tmp_path, change):
    checkpoint = load_checkpoint(describe_to(tmp_path, pair("full")))
    (key, value), = change.items()
    checkpoint[key] = checkpoint[key] | value if isinstance(value, dict) else value
    assert error_of(pair_from, checkpoint, "out/last.pt")


# --------------------------------------------------------------------------------- stop, kill and resume
SHARED = dict(max_iters=24, eval_interval=6, batch_size=32, unroll=2, path_mode="lora", eval_examples=16)  # 9 steps an epoch


def equals_uninterrupted(out, straight):
    """Bit for bit: weights, optimizer, best, and every number in the log."""
    a, b = (load_checkpoint(folder / "last.pt") for folder in (out, straight))
    assert a["iter_num"] == b["iter_num"] and a["best_val_loss"] == b["best_val_loss"]
    assert same_tensors(a["model"], b["model"]) and same_tensors(a["optimizer"], b["optimizer"])
    assert timeless(out) == timeless(straight)
    assert same_tensors(*(load_checkpoint(folder / "best.pt")["model"] for folder in (out, straight)))


def test_a_run_that_was_stopped_and_killed_goes_on_as_if_nothing_had_happened(options, tmp_path):
    """SIGTERM, then Ctrl-C, then SIGKILL, each in mid-epoch; without the trunk's file, which resume does not need."""
    moved = tmp_path / "trunk"
    shutil.copytree(options["trunk"].parent, moved)
    shared = options | SHARED | dict(trunk=moved / "last.pt")
    train.main(argv(**shared | dict(out_dir=tmp_path / "straight")))
    words, at = argv(**shared), 0
    for number, status, after in ((signal.SIGTERM, 143, 3), (signal.SIGINT, 130, 11), (signal.SIGKILL, -9, 16)):
        process = Process(tmp_path / "log", "train", words, before=slow)
        process.until(lambda p: f"iter {after}/24" in p.out()).signal(number)
        assert process.wait() == status, process.err()
        step = load_checkpoint(tmp_path / "out/last.pt")["iter_num"]
        if number != signal.SIGKILL:
            assert step >= after and process.out().endswith(f"stopped at iteration {step}; go on with --resume\n")
            assert process.err() == ""
            assert losses(tmp_path / "out") == losses(tmp_path / "straight")[:step]
        else:
            assert step == 12
            with open(tmp_path / "out/metrics.jsonl", "a") as file:
                file.write('{"iter_num": 17, "lo')                    # as a power cut would leave it
        assert step > at
        at = step
        if "--resume" not in words:
            words.append("--resume")
            shutil.rmtree(moved)
    status, out, err = script(tmp_path, "train", *words)
    assert (status, err) == (0, "")
    equals_uninterrupted(tmp_path / "out", tmp_path / "straight")


@pytest.mark.parametrize("trunk_mode, path_mode", MODES)
def test_a_run_of_any_mode_goes_on_as_if_it_had_not_been_stopped(trunk_mode, path_mode, options, tmp_path, monkeypatch):
    """What trains goes on training: a LoRA on the trunk and an unfrozen trunk, too."""
    shared = options | dict(max_iters=6, eval_interval=4, eval_examples=16, trunk_mode=trunk_mode, path_mode=path_mode)
    train.main(argv(**shared | dict(out_dir=tmp_path / "straight")))
    with monkeypatch.context() as patch:
        report = train.report

        def stop_at_3(run, *args):
            report(run, *args)
            if run.iter_num == 3:
                os.kill(os.getpid(), signal.SIGTERM)
        patch.setattr(train, "report", stop_at_3)
        try:                                                      # pytest.raises would keep the frame, and its lock
            train.main(argv(**shared))
        except SystemExit as e:
            assert e.code == 143
    assert load_checkpoint(options["out_dir"] / "last.pt")["iter_num"] == 3
    train.main(argv(**shared, resume=True))
    equals_uninterrupted(options["out_dir"], tmp_path / "straight")


def test_a_second_signal_ends_at_once_with_the_last_checkpoint_intact(options, tmp_path):
    def twice(process):
        return "iter 3/4000" in process.out()
    process = Process(tmp_path / "log", "train", argv(**options | dict(max_iters=4000)), before=deaf)
    process.until(twice).signal(signal.SIGINT).until(lambda p: "heard" in p.out()).signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert load_checkpoint(tmp_path / "out/last.pt")["iter_num"] == 0


def deaf():
    """In the process: a step that takes for ever once a signal has come."""
    import time
    note, report = ranks_module.StopSignals.note, train.report
    heard = []
    def noted(self, number, frame):
        note(self, number, frame)
        heard.append(number)
        print("heard", flush=True)
    def stuck(*args):
        report(*args)
        while heard:
            time.sleep(0.01)
        time.sleep(0.02)
    ranks_module.StopSignals.note, train.report = noted, stuck


def kill_while_saving():
    """In the process: SIGKILL when last.pt of step 6 is half written."""
    save = torch.save
    def killed(checkpoint, file):
        save(checkpoint, file)
        if isinstance(checkpoint, dict) and checkpoint.get("iter_num") == 6 and "optimizer" in checkpoint:
            file.flush()
            os.truncate(file.name, os.path.getsize(file.name) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    torch.save = killed


def kill_between_renames():
    """In the process: SIGKILL when last.pt has become previous.pt, and the new one has no name yet."""
    replace = os.replace
    def killed(a, b):
        replace(a, b)
        if str(b).endswith("previous.pt") and torch.load(b, weights_only=True)["iter_num"] == 6:
            os.kill(os.getpid(), signal.SIGKILL)
    os.replace = killed


@pytest.mark.parametrize("fault, kept", [(kill_while_saving, 0), (kill_between_renames, 6)])
def test_a_kill_while_saving_costs_no_checkpoint(fault, kept, options, tmp_path):
    shared = options | SHARED | dict(max_iters=14)
    train.main(argv(**shared | dict(out_dir=tmp_path / "straight")))
    status, _, _ = script(tmp_path, "train", *argv(**shared), before=fault)
    assert status == -9
    good = tmp_path / "out" / ("last.pt" if fault is kill_while_saving else "previous.pt")
    assert load_checkpoint(good)["iter_num"] == kept
    says(error_of(train.main, argv(**shared)), "exists; go on with --resume")     # nothing is overwritten
    train.main(argv(**shared, resume=True))
    equals_uninterrupted(tmp_path / "out", tmp_path / "straight")
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.endswith((".tmp", ".new"))]     # nor litter left


def test_a_soak_of_kills_at_random_moments_ends_as_an_uninterrupted_run(options, tmp_path):
    """The short version of tests/soak.py."""
    report = soak(3, tmp_path, options["data_dir"], options["trunk"], max_iters=40)
    assert report["kills"] >= 2 and report["same"], report        # a loaded machine may let a run end first


# ----------------------------------------------------------------------------------- what resume goes on from
@pytest.fixture
def stopped(options):
    """Options of a run that ended at step 4, with a previous.pt of step 2."""
    shared = options | dict(max_iters=4, eval_interval=2)
    train.main(argv(**shared))
    return shared


@pytest.mark.parametrize("damage", ["truncated", "empty", "zeros", "removed"])
def test_a_damaged_last_is_reported_and_the_one_before_used(stopped, damage, capsys):
    last = stopped["out_dir"] / "last.pt"
    straight = load_checkpoint(last)
    whole = last.read_bytes()
    if damage == "removed":
        last.unlink()
    else:
        last.write_bytes({"truncated": whole[:len(whole) // 2], "empty": b"", "zeros": bytes(len(whole))}[damage])
    capsys.readouterr()
    train.main(argv(**stopped, resume=True))
    says(capsys.readouterr().out, f"error: {'no checkpoint at ' if damage == 'removed' else ''}{last}",
         f"going on from {stopped['out_dir']}/previous.pt")
    assert (last.parent / "last.pt.damaged").exists() == (damage != "removed")
    again = load_checkpoint(last)
    assert again["iter_num"] == 4 and same_tensors(again["model"], straight["model"])
    assert [r["iter_num"] for r in metrics(stopped["out_dir"]) if "loss" in r] == [1, 2, 3, 4]


def kill_in_the_first_save():
    """In the process: SIGKILL after the first renaming of a checkpoint."""
    replace = os.replace
    def killed(a, b):
        replace(a, b)
        if str(b).endswith(("previous.pt", "last.pt")):
            os.kill(os.getpid(), signal.SIGKILL)
    os.replace = killed


def test_the_good_previous_outlives_a_damaged_last(stopped, tmp_path):
    """The first save of the resumed run must not rename the damaged file over the only one that can be read."""
    last, previous = (stopped["out_dir"] / name for name in ("last.pt", "previous.pt"))
    straight = load_checkpoint(last)
    last.write_bytes(last.read_bytes()[:5000])
    status, _, err = script(tmp_path, "train", *argv(**stopped), "--resume", before=kill_in_the_first_save)
    assert status == -9, err
    readable = []
    for path in (last, previous):
        try:
            readable.append(load_checkpoint(path)["iter_num"])
        except UserError:
            pass
    assert readable and readable[-1] == 2
    train.main(argv(**stopped, resume=True))
    assert same_tensors(load_checkpoint(last)["model"], straight["model"])


def test_a_resumed_run_leaves_the_trunks_file_as_it_is(stopped, monkeypatch):
    """Another version of torch may write other bytes for the same trunk: best.pt and previous.pt would lose it."""
    before = (stopped["out_dir"] / "trunk.pt").read_bytes()
    save = torch.save
    def other_bytes(what, file, **kwargs):
        return save(what | {"other": torch.ones(1)} if "wte.weight" in what else what, file, **kwargs)
    monkeypatch.setattr(torch, "save", other_bytes)
    train.main(argv(**stopped | dict(max_iters=6), resume=True))
    assert (stopped["out_dir"] / "trunk.pt").read_bytes() == before
    assert [load_checkpoint(stopped["out_dir"] / f"{name}.pt")["iter_num"] for name in ("last", "previous")] == [6, 4]


def test_memory_that_runs_out_is_no_damage(stopped, monkeypatch):
    """A good last.pt stays where it is."""
    def no_memory(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    before = files(stopped["out_dir"])
    monkeypatch.setattr(c.torch, "load", no_memory)
    says(error_of(train.main, argv(**stopped, resume=True)), "out of memory")
    assert files(stopped["out_dir"]).keys() == before.keys()


def test_both_damaged_is_an_error(stopped):
    for name in ("last", "previous"):
        (stopped["out_dir"] / f"{name}.pt").write_bytes(b"x")
    says(error_of(train.main, argv(**stopped, resume=True)), "previous.pt", "damaged")


def test_refusals_lose_nothing(stopped, l2d):
    before = files(stopped["out_dir"])
    assert set(before) == {"last.pt", "previous.pt", "best.pt", "trunk.pt", "metrics.jsonl", "lock"}
    says(error_of(train.main, argv(**stopped)), "last.pt exists; go on with --resume, or choose another --out_dir")
    message = error_of(train.main, argv(**stopped | dict(sigma=5, learning_rate=0.02), resume=True))
    says(message, "another configuration", "sigma was 4.0, now 5.0", "learning_rate was 0.01, now 0.02")
    says(error_of(train.main, argv(**stopped | dict(max_iters=3), resume=True)), "max_iters was 4, now 3")
    says(error_of(train.main, argv(**stopped | dict(trunk="gpt2"), resume=True)), "trunk was ", "now 'gpt2'")
    after = files(stopped["out_dir"])
    assert {k: v for k, v in after.items() if k != "lock"} == {k: v for k, v in before.items() if k != "lock"}
    train.main(argv(**stopped, resume=True))                      # a finished run: nothing to do
    after = files(stopped["out_dir"])
    assert all(after[k] == before[k] for k in ("last.pt", "best.pt", "trunk.pt", "metrics.jsonl"))


def test_a_run_may_be_lengthened(stopped, capsys):
    """Says what that means for the schedule, and goes on."""
    capsys.readouterr()
    train.main(argv(**stopped | dict(max_iters=6), resume=True))
    says(capsys.readouterr().out, "max_iters was 4, now 6", "learning rate")
    assert load_checkpoint(stopped["out_dir"] / "last.pt")["iter_num"] == 6
    assert [r["iter_num"] for r in metrics(stopped["out_dir"]) if "loss" in r] == [1, 2, 3, 4, 5, 6]


def test_a_new_run_starts_its_metrics_afresh(options):
    """Where another left a log and no checkpoint."""
    options["out_dir"].mkdir()
    (options["out_dir"] / "metrics.jsonl").write_text('{"iter_num": 77, "loss": 1.0}\nhalf a li')
    train.main(argv(**options, max_iters=3))
    assert [r["iter_num"] for r in metrics(options["out_dir"]) if "loss" in r] == [1, 2, 3]


@pytest.mark.parametrize("kind", ["groups", "seed", "fingerprint"])
def test_resume_on_other_data_is_refused(stopped, tmp_path, kind):
    """A folder that may have moved, but was prepared anew otherwise."""
    shutil.copytree(stopped["data_dir"], tmp_path / "data")
    train.main(argv(**stopped | dict(data_dir=tmp_path / "data"), resume=True))   # moved: fine
    manifest = json.loads((tmp_path / "data/manifest.json").read_text())
    other = {"groups": dict(group_names=[*"abcd"]), "seed": dict(seed=7), "fingerprint": dict(tokenizer={"name": "arithmetic", "fingerprint": "0" * 16})}
    (tmp_path / "data/manifest.json").write_text(json.dumps(manifest | other[kind]))
    message = error_of(train.main, argv(**stopped | dict(data_dir=tmp_path / "data"), resume=True))
    assert "of the data was" in message or "damaged" in message or "inconsistent" in message


def test_best_in_the_place_of_last_has_no_optimizer(stopped):
    shutil.copy(stopped["out_dir"] / "best.pt", stopped["out_dir"] / "last.pt")
    says(error_of(train.main, argv(**stopped, resume=True)), "last.pt", "no optimizer state")


def test_resume_keeps_the_loss_scale_of_float16(options):
    shared = options | dict(dtype="float16", max_iters=4, eval_interval=2, warmup_iters=0)
    train.main(argv(**shared))
    scaler = load_checkpoint(options["out_dir"] / "last.pt")["scaler"]
    run = train.set_up(train.configure(train.Config, argv(**shared, resume=True)), Ranks(torch.device("cpu")))
    assert run.scaler.state_dict() == scaler != torch.amp.GradScaler("cpu").state_dict()


# ---------------------------------------------------------------------------------------- writers and disks
def test_a_second_writer_is_told_the_first_ones_process(options, tmp_path):
    """Also one that would resume; when the first is gone, killed or not, the folder is free."""
    process = Process(tmp_path / "log", "train", argv(**options | dict(max_iters=4000)), before=slow)
    process.until(lambda p: "iter 2/" in p.out())
    for more in ([], ["--resume"]):
        status, out, err = script(tmp_path, "train", *argv(**options | dict(max_iters=4000)), *more)
        assert status == 1 and err.startswith("error: ") and err.count("\n") == 1
        says(err, f"in use by process {process.pid}", str(options["out_dir"]))
    process.signal(signal.SIGKILL).wait()
    lock(options["out_dir"]).close()


def disk_full():
    """In the process: no file may grow beyond 150,000 bytes, from the first step on."""
    report = train.report
    def full(*args):
        report(*args)
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, resource.RLIM_INFINITY))
    train.report = full


def log_full():
    """In the process: the log cannot grow, and nothing else is written."""
    report = train.report
    ranks_module.Ranks.say = lambda self, text: None
    def full(*args):
        report(*args)
        size = os.path.getsize(args[0].log.path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, resource.RLIM_INFINITY))
    train.report = full


@pytest.mark.parametrize("fault, named", [(disk_full, "best.pt"), (log_full, "metrics.jsonl")])
def test_a_full_disk_is_a_line_that_names_the_file_and_spoils_nothing(fault, named, options, tmp_path):
    shared = options | dict(max_iters=4, eval_interval=2, trunk_mode="full")
    status, out, err = script(tmp_path, "train", *argv(**shared), before=fault)
    assert status == 1 and err.count("\n") == 1 and err.startswith("error: "), err
    says(err, "cannot write", str(options["out_dir"] / named))
    assert ("last.pt holds iteration 0" in err) == (fault is disk_full)
    assert load_checkpoint(options["out_dir"] / "last.pt")["iter_num"] == 0
    assert not [p for p in options["out_dir"].iterdir() if p.name.endswith((".tmp", ".new"))]
    train.main(argv(**shared, resume=True))                       # when there is space again
    assert load_checkpoint(options["out_dir"] / "last.pt")["iter_num"] == 4
    assert [r["iter_num"] for r in metrics(options["out_dir"]) if "loss" in r] == [1, 2, 3, 4]


def test_an_out_dir_that_cannot_be_made_is_one_line(options, tmp_path):
    """A file in the way: root ignores permission bits."""
    (tmp_path / "file").write_text("here")
    for path in (tmp_path / "file", tmp_path / "file/below"):
        says(error_of(train.main, argv(**options | dict(out_dir=path))), str(path), "cannot write")
    (tmp_path / "taken/metrics.jsonl").mkdir(parents=True)
    status, _, err = script(tmp_path, "train", *argv(**options | dict(out_dir=tmp_path / "taken")))
    assert status == 1 and err.count("\n") == 1 and "metrics.jsonl: Is a directory" in err
    assert (tmp_path / "file").read_text() == "here"


@pytest.mark.parametrize("wrong", [dict(data_dir="nowhere"), dict(train_split="trian"), dict(batch_size=10, gradient_accumulation_steps=4)])
def test_out_dir_is_untouched_where_the_run_cannot_begin(options, wrong):
    error_of(train.main, argv(**options | wrong))
    assert not Path(options["out_dir"]).exists()


@pytest.mark.parametrize("name", ["best.pt", "trunk.pt"])
def test_a_new_run_writes_over_no_checkpoint_whatever_is_missing_beside_it(options, name):
    options["out_dir"].mkdir(parents=True)
    (options["out_dir"] / name).write_bytes(b"somebody's")
    says(error_of(train.main, argv(**options)), name, "exists", "--out_dir")
    assert (options["out_dir"] / name).read_bytes() == b"somebody's"


def test_weights_that_are_not_finite_are_refused(options):
    train.main(argv(**options))
    best = options["out_dir"] / "best.pt"
    checkpoint = torch.load(best, weights_only=True)
    checkpoint["model"]["path.W.weight"][0, 0] = torch.nan
    torch.save(checkpoint, best)
    says(error_of(load, str(options["out_dir"])), "best.pt", "not finite", "path.W.weight")


def test_a_resumed_run_that_lost_its_best_writes_it_again(options):
    train.main(argv(**options | dict(max_iters=6)))
    for max_iters in (8, 8):                                          # goes on, and has nothing left to do
        (options["out_dir"] / "best.pt").unlink()
        train.main(argv(**options | dict(max_iters=max_iters, resume=True)))
        assert (options["out_dir"] / "best.pt").exists()
