"""
A training that is killed at random moments, saving included, ends as one that was not, bit for bit.

    python tests/soak.py --kills=20 --seed=0

It trains a tiny pair on the CPU twice: once to its end; once with SIGKILLs, each followed by --resume. It saves
at every second step, so that many of the kills fall into a save. tests/test_checkpoint.py runs a short version.
"""
import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from helpers import FROM_SCRATCH, Process, argv, same_tensors, timeless

from plumbing.checkpoint import load_checkpoint
from plumbing.files import read_records


def run(folder, name, words, kill_after=None):
    """Train; SIGKILL kill_after seconds after its first step, or let it end. Returns whether it was killed, and
    the seconds since its first step."""
    process = Process(folder / f"{name}.log", "train", words)
    while process.process.is_alive() and "\niter" not in process.out():
        time.sleep(0.002)
    start = time.monotonic()
    if kill_after is not None:
        time.sleep(kill_after)
        process.process.kill()
    status = process.wait()
    assert status in (0, -9), (status, process.err())
    return status == -9, time.monotonic() - start


def soak(kills, folder, data_dir, trunk, seed=0, max_iters=60, say=lambda text: None):
    """Returns {"kills": n, "steps": where they fell, "same": whether the two runs are equal}."""
    shared = dict(data_dir=data_dir, trunk=trunk, max_iters=max_iters, eval_interval=2, eval_examples=4, path_mode="lora")
    _, seconds = run(folder, "straight", argv(out_dir=folder / "straight", **shared))
    rng, killed, resumed_at, words = random.Random(seed), 0, [], argv(out_dir=folder / "killed", **shared)
    while killed < kills:
        last, previous = (folder / "killed" / name for name in ("last.pt", "previous.pt"))
        resume = ["--resume"] if last.exists() or previous.exists() else []
        if not run(folder, "killed", words + resume, rng.uniform(0, seconds / kills))[0]:
            say("it ended before its kill")
            break
        killed += 1
        records = read_records(folder / "killed/metrics.jsonl")
        resumed_at.append(max((r.get("iter_num", 0) for r in records), default=0))
        say(f"kill {killed}: at step {resumed_at[-1]}, files {sorted(p.name for p in (folder / 'killed').iterdir())}")
    resume = ["--resume"] if (folder / "killed/last.pt").exists() or (folder / "killed/previous.pt").exists() else []
    run(folder, "killed", words + resume)
    a, b = (load_checkpoint(folder / name / "last.pt") for name in ("killed", "straight"))
    same = all(same_tensors(a[k], b[k]) for k in ("model", "optimizer", "iter_num", "best_val_loss"))
    same = same and timeless(folder / "killed") == timeless(folder / "straight")
    return {"kills": killed, "steps": resumed_at, "same": same}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        import prepare_data
        prepare_data.main(["arithmetic", f"--out_dir={folder / 'data'}", "--train=300", "--mix=300"])
        run(folder, "trunk", argv(data_dir=folder / "data", train_split="mix", val_split="mix_val", path_mode="none",
                                  out_dir=folder / "trunk", max_iters=10, **FROM_SCRATCH))
        report = soak(options.kills, folder, folder / "data", folder / "trunk/last.pt", options.seed, 200,
                      lambda text: print(text, flush=True))
    print(f"{report['kills']} kills; the end {'equals' if report['same'] else 'DIFFERS FROM'} the uninterrupted run's")
    raise SystemExit(not report["same"])


if __name__ == "__main__":
    main()
