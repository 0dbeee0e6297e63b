"""machine.py and configurator.run: devices, ranks that fail, signals, and how a script ends."""
import os
import signal
import sys
import time

import pytest
import torch
from helpers import Process, argv, error_of, group, losses, same_tensors, says, script, slow

import machine
import train
from checkpoint import load_checkpoint
from configurator import UserError
from machine import Ranks, StopSignals, compiles, pick_device, pick_dtype, use_kernels_for_training

CPU = torch.device("cpu")


# --------------------------------------------------------------------------------------- devices and dtypes
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_without_cuda_auto_is_the_cpu_and_cuda_is_refused():
    assert pick_device("auto") == pick_device("cpu") == CPU
    says(error_of(pick_device, "cuda"), "--device=cuda", "no CUDA", "use --device=cpu")


def test_more_ranks_than_gpus_are_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda n: None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device("auto") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    says(error_of(pick_device, "auto"), "rank 2", "no GPU of its own, there are 2", "--nproc_per_node=2")


@pytest.mark.parametrize("capability, want", [((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16), ((7, 5), torch.float16)])
def test_auto_is_the_half_precision_that_the_gpu_has(monkeypatch, capability, want):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert pick_dtype("auto", torch.device("cuda", 0)) == want and pick_dtype("auto", CPU) == torch.float32
    assert pick_dtype("float32", torch.device("cuda", 0)) == torch.float32
    assert pick_dtype("bfloat16", CPU) == torch.bfloat16


def test_compile_that_cannot_work_is_a_warning(monkeypatch, capsys):
    gpu = torch.device("cuda", 0)
    def broken(function):
        raise RuntimeError("Failed to find C compiler\nand more")
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: 1)
    monkeypatch.setattr(torch, "compile", broken)
    assert not compiles(gpu) and "fails here (Failed to find C compiler): going on" in capsys.readouterr().err
    monkeypatch.setattr(torch, "compile", lambda function: function)
    assert compiles(gpu) and compiles(CPU) and capsys.readouterr().err == ""


@pytest.mark.parametrize("local, error, line", [
    (0, UserError("no file"), "error: no file\n"), (1, UserError("no file"), ""),
    (0, torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), "error: out of memory; buy (CUDA out of memory. Tried)\n"),
    (1, RuntimeError("CUBLAS_STATUS_ALLOC_FAILED in x"), ""),
    (0, torch.distributed.DistBackendError("NCCL error\nLast error: no P2P"), "rank 0: another rank has ended, see its line (Last error: no P2P)\n"),
])
def test_a_rank_with_a_gpu_says_its_line_and_ends_without_a_farewell(monkeypatch, capsys, local, error, line):
    """NCCL's destroy_process_group waits for the other ranks, which wait for this one."""
    class Two(Ranks):
        def __init__(self, device):
            self.device, self.rank, self.world = device, 0, 2
    def end(status):
        done.append(status)
        raise SystemExit(status)
    done = []
    monkeypatch.setenv("LOCAL_RANK", str(local))
    monkeypatch.setattr(machine, "Ranks", Two)
    monkeypatch.setattr(machine.os, "_exit", end)
    with pytest.raises(SystemExit), machine.ranks_of(torch.device("cuda", 0), "buy"):
        raise error
    assert done == [1] and capsys.readouterr().err == line


def test_half_precision_on_a_cpu_trains_without_the_fused_kernel():
    try:
        for dtype, wanted in ((torch.bfloat16, False), (torch.float32, True)):
            use_kernels_for_training(CPU, dtype)
            assert torch.backends.cuda.flash_sdp_enabled() == wanted
    finally:
        torch.backends.cuda.enable_flash_sdp(True)


# ---------------------------------------------------------------------------------------------------- ranks
@pytest.mark.parametrize("env", [dict(RANK="1"), dict(RANK="-1"), dict(WORLD_SIZE="2"), dict(RANK="2", WORLD_SIZE="2"),
                                 dict(RANK="0", WORLD_SIZE="2"), dict(WORLD_SIZE="two"), dict(WORLD_SIZE="0"),
                                 dict(RANK="", WORLD_SIZE="2")])
def test_a_stray_rank_in_the_environment_is_one_line(monkeypatch, env, options):
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    message = error_of(train.main, argv(**options))
    says(message, "do not go together", "torchrun", "unset", *[f"{k}={v}" for k, v in env.items()])
    assert not options["out_dir"].exists()


def test_an_address_that_cannot_be_is_one_line(monkeypatch, options):
    for key, value in dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="99999").items():
        monkeypatch.setenv(key, value)
    says(error_of(train.main, argv(**options)), "did not meet at 127.0.0.1:99999", "check that address")


def test_one_process_is_rank_0_of_1(capsys):
    ranks = Ranks(CPU)
    assert (ranks.rank, ranks.world, ranks.main) == (0, 1, True) and ranks.any(True) and not ranks.any(0)
    with ranks.main_first():
        ranks.say("here")
    assert torch.equal(ranks.sum(torch.tensor([1.0, 2.0])), torch.tensor([1.0, 2.0]))
    ranks.close()
    assert capsys.readouterr().out == "here\n"


def nan_on_rank_1():
    """In the process: the gradient of step 2 is nan on one rank only."""
    forward, count = train.Loss.forward, iter(range(10 ** 6))
    def spoilt(self, *batch):
        losses = forward(self, *batch)
        bad = torch.is_grad_enabled() and next(count) == 2 and os.environ["RANK"] == "1"
        return losses * torch.nan if bad else losses
    train.Loss.forward = spoilt


def test_a_gradient_that_is_nan_on_one_rank_is_skipped_by_all(options, tmp_path):
    """DDP wraps what is spoilt; the ranks stay equal and the run ends well."""
    ranks = group(tmp_path, 2, argv(**options, steps=6), before=nan_on_rank_1)
    assert [r.wait() for r in ranks] == [0, 0], [r.err() for r in ranks]
    seen = losses(options["out_dir"])
    assert [x is None for x in seen] == [False, False, True, False, False, False]
    assert all(w.isfinite().all() for w in load_checkpoint(options["out_dir"] / "last.pt")["model"].values())


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_the_group_soon(options, tmp_path, killed):
    ranks = group(tmp_path, 2, argv(**options | dict(steps=4000)), before=slow)
    ranks[0].until(lambda p: "step 3/" in p.out())
    ranks[killed].signal(signal.SIGKILL)
    assert ranks[killed].wait() == -9 and ranks[1 - killed].wait(30) not in (0, None)
    assert load_checkpoint(options["out_dir"] / "last.pt")["step"] == 0


def fail_on_rank_1():
    """In the process: a user's error on one rank only, in the midst of training."""
    from configurator import UserError
    report, draw = train.report, train.draw_noise
    count = iter(range(10 ** 6))
    def failing(*args):
        if os.environ["RANK"] == "1" and next(count) == 5:
            os.environ["LOCAL_RANK"] = "0"                        # as on a second host, which speaks for itself
            raise UserError("the disk of this host is gone")
        return draw(*args)
    train.draw_noise, train.report = failing, report


def fail_in_main_first():
    """In the process: what the main rank does before the others fails."""
    from configurator import UserError
    def failing(*args):
        raise UserError("no such trunk")
    if os.environ["RANK"] == "0":
        train.make_model = failing


@pytest.mark.parametrize("fault, line", [(fail_on_rank_1, "error: the disk of this host is gone"),
                                         (fail_in_main_first, "error: no such trunk")])
def test_a_rank_that_fails_says_why_and_ends_the_group(options, tmp_path, fault, line):
    """The others end too, soon, and do not bury its line under a traceback of their own."""
    ranks = group(tmp_path, 2, argv(**options), before=fault)
    assert [r.wait(30) for r in ranks] == [1, 1]
    failed = ranks[1] if fault is fail_on_rank_1 else ranks[0]
    assert failed.err() == line + "\n"
    assert "Traceback" not in ranks[0].err() + ranks[1].err()


def test_all_ranks_stop_at_the_same_step(options, tmp_path):
    """A signal to one of them: they agree, save, and end with its status or that of SIGTERM."""
    words = argv(**options | dict(steps=4000))
    ranks = group(tmp_path, 2, words, before=slow)
    ranks[0].until(lambda p: "step 3/" in p.out())
    ranks[1].signal(signal.SIGINT)
    assert ranks[1].wait() == 130 and ranks[0].wait() in (130, 143)
    step = load_checkpoint(options["out_dir"] / "last.pt")["step"]
    assert ranks[0].out().endswith(f"stopped at step {step}; go on with --resume\n") and step >= 3
    assert "Traceback" not in ranks[0].err() + ranks[1].err()


# -------------------------------------------------------------------------------------------------- signals
def test_a_first_signal_is_noted_and_a_second_ends_the_process(monkeypatch):
    ended = []
    monkeypatch.setattr(machine.os, "_exit", ended.append)
    stop = StopSignals()
    assert stop.number == 0
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.number == signal.SIGTERM and ended == []
    os.kill(os.getpid(), signal.SIGINT)
    assert ended == [130]


def slow_start():
    """In the process: the data takes its time to load."""
    import time
    load = train.load_fitting
    def slowly(*args):
        print("loading", flush=True)
        time.sleep(60)
        return load(*args)
    train.load_fitting = slowly


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_first_step_ends_with_a_line(options, tmp_path, number):
    process = Process(tmp_path / "log", "train", argv(**options), before=slow_start)
    process.until(lambda p: "loading" in p.out()).signal(number)
    assert process.wait(20) == 128 + number
    assert process.err().count("\n") == 1 and "stopped" in process.err()


# --------------------------------------------------------------------------------------- pipes and terminals
def closed_pipe():
    """In the process: stdout is a pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    sys.stdout = os.fdopen(1, "w", closefd=False)                 # the old one was opened on a file


def test_training_goes_on_when_nobody_reads_what_it_prints(options, tmp_path):
    """python train.py ... | head"""
    status, _, err = script(tmp_path, "train", *argv(**options | dict(steps=5)), before=closed_pipe)
    assert err == "" and load_checkpoint(options["out_dir"] / "last.pt")["step"] == 5 and status == 0
    straight = options | dict(steps=5, out_dir=tmp_path / "straight")
    train.main(argv(**straight))
    assert same_tensors(*(load_checkpoint(out / "last.pt")["model"] for out in (options["out_dir"], tmp_path / "straight")))


def test_sampling_into_a_closed_pipe_is_quiet(tmp_path, wild):
    status, _, err = script(tmp_path, "sample", f"--out_dir={wild}", "--steps=2", "--max_new_tokens=2", before=closed_pipe)
    assert err == "" and status in (0, 1)


def test_a_rank_that_waits_for_others_in_vain_obeys_sigterm(options, tmp_path):
    env = dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="localhost", MASTER_PORT="29517")
    process = Process(tmp_path / "log", "train", argv(**options), **env)
    time.sleep(4)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(20) == -signal.SIGTERM
