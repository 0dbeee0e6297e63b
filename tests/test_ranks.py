"""plumbing/ranks.py and configurator.run: ranks that fail, signals, and how a script ends."""
import os
import signal
import sys
import time

import numpy as np
import pytest
import torch
from helpers import Process, argv, error_of, losses, same_tensors, says, script, slow, start_ranks

import configurator
import plumbing.ranks as module
import train
from configurator import UserError
from plumbing.checkpoint import load_checkpoint
from plumbing.ranks import Ranks, StopSignals, ranks_of

CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------ errors of one rank
@pytest.mark.parametrize("rank, others, error, line", [
    (0, [], UserError("no file"), "error: no file\n"), (1, [], UserError("no file"), "error: no file\n"),
    (1, ["error: no file"], UserError("no file"), ""), (1, ["error: another file"], UserError("no file"), "error: no file\n"),
    (1, [], torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), "error: out of memory; buy (CUDA out of memory. Tried)\n"),
    (1, ["error: out of memory; buy"], RuntimeError("CUBLAS_STATUS_ALLOC_FAILED in x"), ""),
    (1, [], MemoryError(), "error: out of memory; buy (MemoryError)\n"),
    (0, [], torch.distributed.DistBackendError("NCCL error\nLast error: no P2P"), "rank 0: another rank has ended, see its line (Last error: no P2P)\n"),
])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_rank_says_its_line_unless_another_did_and_ends_without_a_farewell(monkeypatch, capsys, rank, others, error, line, device):
    """destroy_process_group would wait for the other ranks, which wait for this one."""
    class Store:
        def add(self, key, n):
            return 1 + any(key.endswith(f": {text}") for text in others)
    class Two(Ranks):
        def __init__(self, device):
            self.device, self.rank, self.world, self.store = device, rank, 2, Store()
    def end(status):
        done.append(status)
        raise KeyboardInterrupt
    done = []
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setattr(module, "Ranks", Two)
    monkeypatch.setattr(module.os, "_exit", end)
    with pytest.raises(KeyboardInterrupt), ranks_of(torch.device(device, 0), "buy"):
        raise error
    assert done == [1] and capsys.readouterr().err == line


def test_an_error_that_nobody_foresaw_keeps_its_traceback(monkeypatch, capsys):
    with pytest.raises(ZeroDivisionError), ranks_of(CPU, "buy"):
        1 / 0


def test_a_store_that_is_gone_does_not_hide_the_line():
    class Gone:
        def add(self, key, n):
            raise torch.distributed.DistNetworkError("Broken pipe")
    ranks = Ranks(CPU)
    ranks.store = Gone()
    assert ranks.first_to_say("error: x")


OUT_OF_MEMORY = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), MemoryError(), OSError(12, "Cannot allocate memory"),
                 RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"),
                 RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes"), RuntimeError("std::bad_alloc"),
                 RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"),
                 RuntimeError("Storage size calculation overflowed with sizes=[9223372036854775807, 4]")]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda e: str(e)[:20])
def test_memory_that_runs_out_is_one_line_with_the_remedy(error):
    def main():
        raise error
    def block():
        with ranks_of(CPU, "lower batch_size"):
            main()
    says(error_of(block), "out of memory; lower batch_size (")
    says(error_of(configurator.run, main, "lower num_samples"), "out of memory; lower num_samples (")


def test_real_memory_that_runs_out_is_one_line():
    """On the CPU: by torch, by numpy, by Python."""
    for allocate in (lambda: torch.empty(1 << 60), lambda: torch.empty(1 << 40).expand(2, -1).contiguous(),
                     lambda: torch.zeros((1 << 62, 1 << 62)), lambda: np.zeros(1 << 50), lambda: bytearray(1 << 55)):
        says(error_of(configurator.run, allocate), "out of memory; use a smaller model")


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
    ranks.end()
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
    ranks = start_ranks(tmp_path, 2, argv(**options, max_iters=6), before=nan_on_rank_1)
    assert [r.wait() for r in ranks] == [0, 0], [r.err() for r in ranks]
    seen = losses(options["out_dir"])
    assert [x is None for x in seen] == [False, False, True, False, False, False]
    assert all(w.isfinite().all() for w in load_checkpoint(options["out_dir"] / "last.pt")["model"].values())


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_the_group_soon(options, tmp_path, killed):
    ranks = start_ranks(tmp_path, 2, argv(**options | dict(max_iters=4000)), before=slow)
    ranks[0].until(lambda p: "iter 3/" in p.out())
    ranks[killed].signal(signal.SIGKILL)
    assert ranks[killed].wait() == -9 and ranks[1 - killed].wait(30) not in (0, None)
    assert load_checkpoint(options["out_dir"] / "last.pt")["iter_num"] == 0


def fail_on_rank_1():
    """In the process: a user's error on one rank only, in the midst of training."""
    from configurator import UserError
    draw, count = train.draw_inputs, iter(range(10 ** 6))
    def failing(*args):
        if os.environ["RANK"] == "1" and next(count) == 5:
            raise UserError("the disk of this host is gone")
        return draw(*args)
    train.draw_inputs = failing


def out_of_memory_on_rank_1():
    """In the process: the loss does not fit the memory of one rank."""
    nll, count = train.diffusion.nll, iter(range(10 ** 6))
    def failing(*args):
        if os.environ["RANK"] == "1" and next(count) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has ...")
        return nll(*args)
    train.diffusion.nll = failing


def fail_in_main_first():
    """In the process: what the main rank does before the others fails."""
    from configurator import UserError
    def failing(*args):
        raise UserError("no such trunk")
    if os.environ["RANK"] == "0":
        train.make_model = failing


@pytest.mark.parametrize("fault, line", [
    (fail_on_rank_1, "error: the disk of this host is gone"), (fail_in_main_first, "error: no such trunk"),
    (out_of_memory_on_rank_1, "error: out of memory; raise gradient_accumulation_steps, or lower batch_size "
                              "(CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has ...)")])
def test_a_rank_that_fails_says_why_and_ends_the_group(options, tmp_path, fault, line):
    """The others end too, soon, and do not bury its line under a traceback of their own."""
    ranks = start_ranks(tmp_path, 2, argv(**options), before=fault)
    assert [r.wait(30) for r in ranks] == [1, 1]
    failed = ranks[0 if fault is fail_in_main_first else 1]
    assert failed.err() == line + "\n"
    assert "Traceback" not in ranks[0].err() + ranks[1].err()


def test_all_ranks_stop_at_the_same_step(options, tmp_path):
    """A signal to one of them: they agree, save, and end with its status or that of SIGTERM."""
    words = argv(**options | dict(max_iters=4000))
    ranks = start_ranks(tmp_path, 2, words, before=slow)
    ranks[0].until(lambda p: "iter 3/" in p.out())
    ranks[1].signal(signal.SIGINT)
    assert ranks[1].wait() == 130 and ranks[0].wait() in (130, 143)
    step = load_checkpoint(options["out_dir"] / "last.pt")["iter_num"]
    assert ranks[0].out().endswith(f"stopped at iteration {step}; go on with --resume\n") and step >= 3
    assert "Traceback" not in ranks[0].err() + ranks[1].err()


# -------------------------------------------------------------------------------------------------- signals
def test_a_first_signal_is_noted_and_a_second_ends_the_process(monkeypatch):
    ended = []
    monkeypatch.setattr(module.os, "_exit", ended.append)
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
    status, _, err = script(tmp_path, "train", *argv(**options | dict(max_iters=5)), before=closed_pipe)
    assert err == "" and load_checkpoint(options["out_dir"] / "last.pt")["iter_num"] == 5 and status == 0
    straight = options | dict(max_iters=5, out_dir=tmp_path / "straight")
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
