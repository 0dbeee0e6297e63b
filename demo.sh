#!/usr/bin/env bash
# The demo: a tiny frozen language model gets better at word problems with a diffusion path beside it.
# Two CPU cores, no network but the package index. Safe to run twice: finished parts are kept.
set -euo pipefail
cd "$(dirname "$0")"
if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -x .venv/bin/python ] || python3 -m venv .venv
    source .venv/bin/activate
fi

echo "== The demo takes about eight minutes on two quiet CPU cores, in five parts:"
echo "   1. an answer of the trained model in demo/, token by token (seconds, after installing the packages)"
echo "   2. word problems, generated here (seconds)"
echo "   3. training a small GPT from nothing (three minutes)"
echo "   4. training the diffusion path beside it (four minutes)"
echo "   5. both on 1,000 problems that neither has seen (one minute)"
python -m pip install --quiet -r requirements.txt

train() {  # train CONFIG OUT_DIR: unless it is done; go on where it was cut
    [ -e "$2/done" ] && return
    python train.py "$1" --out_dir="$2" $([ -e "$2/last.pt" ] && echo --resume)
    touch "$2/done"
}

echo "== 1 of 5: the model in demo/ answers with T = 16 evaluations per token"
python sample.py --out_dir=demo --steps=16 --trace
echo "== 2 of 5: word problems"
[ -e data/arithmetic/manifest.json ] || python prepare_data.py arithmetic
echo "== 3 of 5: training a GPT with 0.7M parameters on a broad mixture of exercises, 5,000 iterations"
train config/demo_trunk.py out/demo_trunk
echo "== 4 of 5: training the path, 4,000 iterations; the trunk stays as it is"
train config/demo_l2d.py out/demo_l2d
echo "== 5 of 5: accuracy. steps=1 is the trunk alone. Then a problem that the path has put right"
python evaluate.py --out_dir=out/demo_l2d --split=test --steps=1,2,4,16 --batch_size=250 --mistakes=0 --show_change
