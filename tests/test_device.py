"""plumbing/device.py: which device and which dtype. plumbing/kernels.py: which kernels."""
import os

import pytest
import torch
from helpers import child, error_of, says

from plumbing.device import pick_device, pick_dtype, read_environment
from plumbing.kernels import compiles, use_kernels_for_training

CPU = torch.device("cpu")


def test_tests_and_their_processes_see_no_gpu():
    """Whatever is there: conftest.py hides it, and only tests/test_gpu.py gives it back."""
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()
    found = child(["-c", "import os, torch; print([os.environ['CUDA_VISIBLE_DEVICES'], torch.cuda.device_count()])"])
    assert found.stdout.strip() == "['', 0]"


def test_without_cuda_auto_is_the_cpu_and_cuda_is_refused():
    assert pick_device("auto") == pick_device("cpu") == CPU
    says(error_of(pick_device, "cuda"), "--device=cuda", "no CUDA", "use --device=cpu")


def test_more_ranks_than_gpus_are_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda n: None)
    for key, value in dict(RANK="1", LOCAL_RANK="1", WORLD_SIZE="3", MASTER_ADDR="here", MASTER_PORT="1").items():
        monkeypatch.setenv(key, value)
    assert pick_device("auto") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    says(error_of(pick_device, "auto"), "rank 2", "no GPU of its own, there are 2", "--nproc_per_node=2")


@pytest.mark.parametrize("left", ["1", "abc", "-1", ""])
def test_one_process_does_not_care_for_a_local_rank(monkeypatch, left):
    """A shell may have kept it from another program. The process is the first of its host, and takes its first GPU."""
    monkeypatch.setenv("LOCAL_RANK", left)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda n: None)
    assert read_environment() == (0, 1, 0) and pick_device("auto") == torch.device("cuda", 0)


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


def test_half_precision_on_a_cpu_trains_without_the_fused_kernel():
    try:
        for dtype, wanted in ((torch.bfloat16, False), (torch.float32, True)):
            use_kernels_for_training(CPU, dtype)
            assert torch.backends.cuda.flash_sdp_enabled() == wanted
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
