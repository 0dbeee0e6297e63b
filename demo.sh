#!/usr/bin/env bash
# The demo: a tiny language model, frozen, gets better at word problems with a diffusion path beside it, for 1 to 16 steps.
# Two CPU cores, no network but the package index. Safe to run twice: finished parts are kept.
set -euo pipefail
cd "$(dirname "$0")"
if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -x .venv/bin/python ] || python3 -m venv .venv
    source .venv/bin/activate
fi
python -m pip install --quiet -r requirements.txt

train() {  # train CONFIG OUT_DIR: unless it is done; go on where it was cut
    [ -e "$2/done" ] && return
    echo "== training $2"
    python train.py "$1" --out_dir="$2" $([ -e "$2/last.pt" ] && echo --resume)
    touch "$2/done"
}

[ -e data/arithmetic/manifest.json ] || python prepare_data.py arithmetic
train config/demo_trunk.py out/demo_trunk    # a small GPT on a broad mixture of exercises
train config/demo_l2d.py out/demo_l2d        # the diffusion path beside it; the trunk stays as it is

echo "== accuracy on unseen problems: steps=1 is the trunk alone; then one problem that the steps put right"
python evaluate.py --out_dir=out/demo_l2d --split=test --steps=1,2,4,16 --batch_size=250 --mistakes=0 --show_change
