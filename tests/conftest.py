"""What many tests start from, each made once a session: data, a trunk, a path trained on it, a random pair."""
import os

# Tests run on the CPU, whatever is there. tests/test_gpu.py gives the GPUs back to the processes that it starts.
os.environ.setdefault("GPUS_OF_TESTS", os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""                           # before torch, and for all processes of tests

import signal
import sys
from pathlib import Path

import pytest
import torch

FOLDERS = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
sys.path[:0] = FOLDERS
os.environ["PYTHONPATH"] = os.pathsep.join(FOLDERS)               # of the processes that tests start
torch.set_num_threads(1)                                          # two of them may run beside a training

from helpers import FROM_SCRATCH, argv

import prepare_data
import train
from plumbing.checkpoint import load_checkpoint
from plumbing.dataset import load_manifest
from plumbing.tokenizer import load_tokenizer


@pytest.fixture(autouse=True)
def as_before():
    """train.main takes Ctrl-C and SIGTERM for itself, and may switch off fused attention.

    Pytest wants the signals back. Without that kernel, what runs afterwards would round differently. Fixtures of a
    wider scope train before this one begins.
    """
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    torch.backends.cuda.enable_flash_sdp(True)
    yield
    for s, handler in before.items():
        signal.signal(s, handler)
    torch.backends.cuda.enable_flash_sdp(True)


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
        train.main(argv(data_dir=arithmetic, train_split="mix", val_split="mix_val", out_dir=out_dir,
                        path_mode="none", max_iters=60, **FROM_SCRATCH))
    return out_dir


@pytest.fixture(scope="session")
def l2d(arithmetic, trunk, tmp_path_factory):
    """out_dir of a path trained on that trunk, the trunk frozen."""
    out_dir = tmp_path_factory.getbasetemp() / "l2d"
    if not out_dir.exists():
        train.main(argv(data_dir=arithmetic, out_dir=out_dir, trunk=trunk / "last.pt", max_iters=60))
    return out_dir


@pytest.fixture(scope="session")
def wild(l2d, tmp_path_factory):
    """out_dir of a random pair, shaped like l2d: a talkative trunk, and a path that often changes its mind."""
    out_dir = tmp_path_factory.getbasetemp() / "wild"
    if not out_dir.exists():
        checkpoint = load_checkpoint(l2d / "last.pt")
        generator, model = torch.Generator().manual_seed(0), {}
        for name, w in checkpoint["model"].items():
            std = {"trunk.wte.weight": 0.4, "path.w.2.weight": 0.02}.get(name, 0.3)
            model[name] = std * torch.randn(w.shape, generator=generator) if w.dim() == 2 else w
        out_dir.mkdir()
        torch.save(checkpoint | {"model": model, "trunk_sha256": None}, out_dir / "best.pt")
    return out_dir


@pytest.fixture
def options(arithmetic, trunk, tmp_path):
    """Of a short run in a folder of its own."""
    return dict(data_dir=arithmetic, trunk=trunk / "last.pt", out_dir=tmp_path / "out")


@pytest.fixture(scope="session")
def encoding(arithmetic):
    """The tokenizer of the embedded task."""
    return load_tokenizer(load_manifest(arithmetic)["tokenizer"])
