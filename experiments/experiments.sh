#!/usr/bin/env bash
# The runs behind rows 1 to 11 of docs/RESULTS.md, in order; about 5 hours on one CPU core. Finished runs are
# kept, and interrupted ones go on. Run it after bash demo.sh, in its virtual environment, and after:
#     pip install -r requirements-dev.txt; python prepare_data.py gsm8k
#     bash experiments/experiments.sh
#     bash experiments/experiments.sh --list    # only print the commands, to run them by hand or side by side
# docs/results says which rows were made with options that no longer exist; they are not here.
set -euo pipefail
cd "$(dirname "$0")/.."
list=${1:-}

run() {
    local line; line=$(printf ' %s' "${@@Q}" | sed -E "s/'([A-Za-z0-9_.,:=/+-]*)'/\\1/g")   # few quotes
    if [ -n "$list" ]; then echo "${line# }"; else echo "==$line"; "$@"; fi
}
train() {   # train OUT CONFIG OPTIONS...: go on with the run if it exists
    [ -z "$list" ] && [ -e "out/$1/last.pt" ] && set -- "$@" --resume
    run python train.py "$2" --out_dir="out/$1" "${@:3}"
}
on() {      # on SPLIT OUT OPTIONS...: evaluate the run OUT
    run python evaluate.py --split="$1" --out_dir="out/$2" --mistakes=0 --batch_size=250 "${@:3}"
}

# ------------------------------------- the embedded task: one trunk, and on it three seeds of everything
for s in "" _s1 _s2; do
    n=${s#_s}; seed=--seed=${n:-0}
    train demo_l2d$s config/demo_l2d.py $seed
    train demo_lora$s config/demo_lora.py $seed
    train demo_finetune$s config/demo_finetune.py $seed
    train demo_l2d_lora$s config/demo_l2d.py $seed --path_mode=lora
    train demo_l2d_on_lora$s config/demo_l2d.py $seed --trunk=out/demo_lora$s/best.pt

    on test demo_l2d$s --steps=1,2,4,8,16,32
    on test demo_l2d$s --steps=1,3,15 --solver=midpoint
    on test demo_l2d$s --steps=1,3,15 --solver=heun
    on test demo_l2d$s --steps=1,8,32 --solver=adaptive
    on test demo_l2d$s --steps=1,16 --stop=0.1
    on test demo_l2d$s --steps=1,2,4,16 --temperature=1
    on test demo_l2d$s --steps=1,3,15 --temperature=1 --solver=midpoint --t_end=1       # the paper's protocol
    on test demo_l2d$s --steps=3,15 --temperature=1 --t_end=1                       # the same times by Euler
    on test demo_l2d_lora$s --steps=1,2,4,16
    on test demo_l2d_on_lora$s --steps=1,2,4,16
    for control in demo_lora$s demo_finetune$s; do
        on test $control --steps=1
        on test $control --steps=1 --temperature=1
        on mix_test $control --steps=1
    done
    on mix_test demo_l2d$s --steps=1,2,16
done

# the trunk with a majority vote, in about the time of 16 steps
on test demo_trunk --steps=1 --temperature=0.7 --votes=10

# ------------------------------------------------------------------ the same, on validation problems
for s in "" _s1 _s2; do
    # guidance: towards the right group, and towards one that is wrong for about half of the problems
    for guidance in 1 2 4; do
        on val demo_l2d$s --steps=4 --guidance=$guidance --use_group
        on val demo_l2d$s --steps=4 --guidance=$guidance --group="3 steps"
    done
    # choices at inference
    for option in "" --guess=mean --guess=sample --solver=fixed_point --t_end=1; do
        on val demo_l2d$s --steps=4,16 $option
    done
done
# choices in training, in fewer iterations: the last line of out/short_*/metrics.jsonl has the validation loss
short() {   # short NAME OPTIONS...
    train short_$1$s config/demo_l2d.py --seed=${s#_s} --max_iters=1500 --eval_interval=1500 "${@:2}"
}
for s in _s0 _s1 _s2; do
    short base
    short paper --path_init=paper --input_scale=unit --time_scale=1
    short path_init_paper --path_init=paper
    short input_unit --input_scale=unit
    short time_scale_1 --time_scale=1
    short sigma_8 --sigma=8
    short no_groups --group_dropout=1
    # does it help or hurt to read x_t? sigma 8 beside the default, and guidance where x_t is read
    on val short_base$s --steps=1,2,4,16
    on val short_sigma_8$s --steps=1,2,4,16
    for guidance in 1 4; do
        on val short_sigma_8$s --steps=4 --guidance=$guidance --use_group
        on val short_sigma_8$s --steps=4 --guidance=$guidance --group="3 steps"
    done
done

# ------------------------------------------------------------------------------- GSM8K's own text
gsm() {     # gsm OUT OPTIONS...
    train $1 config/l2d_gsm8k.py --batch_size=16 --dtype=bfloat16 --log_interval=25 --eval_examples=200 "${@:2}"
}
gsm gsm_trunk --trunk=scratch --trunk_mode=full --path_mode=none --n_layer=3 --n_head=4 --n_embd=128 \
    --max_iters=500 --warmup_iters=50 --learning_rate=2e-3 --min_lr=2e-4 --eval_interval=100
for s in "" _s1 _s2; do
    n=${s#_s}
    common="--trunk=out/gsm_trunk/best.pt --seed=${n:-0} --max_iters=80 --warmup_iters=20 --min_lr=1e-4
        --eval_interval=80"
    gsm gsm_l2d$s $common --learning_rate=1e-3 --x_dim=64 --t_dim=64
    gsm gsm_lora$s $common --learning_rate=1e-3 --trunk_mode=lora --path_mode=none --lora_rank=112 \
        --lora_alpha=112
    gsm gsm_finetune$s $common --learning_rate=5e-4 --trunk_mode=full --path_mode=none
    on test gsm_l2d$s --limit=500 --exact_match=False --steps=1,2,16
    for control in gsm_lora$s gsm_finetune$s; do
        on test $control --limit=500 --exact_match=False --steps=1
    done
done

run python experiments/results.py
run python experiments/results.py --split=val
run python experiments/results.py --split=mix_test
run python experiments/results.py --draw=experiments/results_test.json --lines=demo_lora,demo_finetune \
    --show=demo_l2d,demo_l2d:temperature=1.0,demo_l2d_on_lora \
    --names="L2D,L2D sampled at temperature 1,L2D on the trunk with LoRA,LoRA on the trunk,full finetuning"
