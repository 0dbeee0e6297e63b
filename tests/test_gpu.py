"""What needs a GPU. Without one all of it is skipped.

conftest.py hides the GPUs from the tests; the processes that are started here see them. To see on a CPU that the
tests themselves work:

    DEVICE_OF_GPU_TESTS=cpu python -m pytest tests/test_gpu.py
"""
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from helpers import ENV, FROM_SCRATCH, ROOT, argv, child, losses, timeless

DEVICE = os.environ.get("DEVICE_OF_GPU_TESTS", "cuda")
GPUS = {"CUDA_VISIBLE_DEVICES": os.environ["GPUS_OF_TESTS"]} if DEVICE == "cuda" else {}


@pytest.fixture(scope="module", autouse=True)
def card():
    if DEVICE != "cuda":
        return
    if torch.version.cuda is None:
        pytest.skip("no GPU: this torch is built without CUDA")
    found = child(["-c", "import torch; print(torch.cuda.device_count())"], **GPUS)
    if found.stdout.strip() in ("", "0"):
        pytest.skip(f"no GPU: {found.stderr.strip()[-200:] or 'torch finds none'}")


def words(folder, data, **options):
    """The words of a short run of train.py on the GPU."""
    options = dict(data_dir=data, out_dir=folder, device=DEVICE, train_split="mix", val_split="mix_val",
                   path_mode="full", compile="off") | FROM_SCRATCH | options
    return ["train.py", *argv(**options)]


def run(words):
    done = child(words, timeout=300, **GPUS)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_the_checks_of_the_report_and_a_capture(tmp_path):
    """Logits, T = 1, the compiled loss, drafts, CUDA graphs and kernels, all with a small model."""
    out = tmp_path / "report.json"
    names = "logits,compiled,drafts,graphs,attention"
    run(["-m", "bench", "--gpu_report", f"--only={names}", "--model=tiny", f"--device={DEVICE}", "--time_limit=250",
         f"--out={out}"])
    report = json.loads(out.read_text())
    assert report["not_reached"] == [] and all(passed for passed, _ in report["checks"].values())
    assert {"compiled", "drafts", "attention, training"} <= report["checks"].keys()


@pytest.mark.parametrize("dtype, compile_", [("bfloat16", "on"), ("float16", "off")])
def test_training_in_half_precision_learns(arithmetic, tmp_path, dtype, compile_):
    """Compiled by block, too. The mean loss of the last five iterations is far below that of the first five."""
    out = tmp_path / "out"
    printed = run(words(out, arithmetic, dtype=dtype, compile=compile_))
    assert ("compiled; the first step ended after" in printed) == (compile_ == "on")
    assert f"1 x {DEVICE}, torch.{dtype}" in printed
    found = losses(out)
    assert len(found) == 40 and sum(found[-5:]) < 0.7 * sum(found[:5])


def test_one_rank_by_nccl_has_the_gradients_of_one_process(tmp_path):
    code = f"""
import torch
from bench.gpu_report import compute_gradient, save_gradient
alone = compute_gradient(0, 1, torch.device("{DEVICE}"))
save_gradient(0, 1, "{DEVICE}", "{tmp_path}/gradient.pt")
ranked = torch.load("{tmp_path}/gradient.pt")
print(float((alone - ranked).norm() / alone.norm()))
"""
    assert float(run(["-c", code]).strip()) < 1e-5


def test_sigterm_saves_and_resume_ends_the_same_run(arithmetic, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    options = dict(max_iters=300, dtype="float32", log_interval=10, eval_interval=100)
    run(words(whole, arithmetic, **options))
    command = [sys.executable, *map(str, words(stopped, arithmetic, **options))]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | ENV | GPUS) as process:
        for line in process.stdout:
            if line.startswith("iter 20/"):
                process.send_signal(signal.SIGTERM)
                break
        rest = process.stdout.read()
    assert process.returncode == 143 and "go on with --resume" in rest
    run([*words(stopped, arithmetic, **options), "--resume"])
    a, b = timeless(stopped), timeless(whole)
    assert [r["iter_num"] for r in a] == [r["iter_num"] for r in b]
    # a GPU adds up some gradients in no fixed order
    assert losses(stopped) == pytest.approx(losses(whole), rel=0.05)
