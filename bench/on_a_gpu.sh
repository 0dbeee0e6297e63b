#!/usr/bin/env bash
# What only a GPU can show: bash bench/on_a_gpu.sh
# Six minutes at the most, the most important first. The table at the end also comes after Ctrl-C.
# To see on a CPU that it works:  DEVICE=cpu MODEL=tiny bash bench/on_a_gpu.sh
set -uo pipefail
cd "$(dirname "$0")/.."
DEVICE=${DEVICE:-cuda}
MODEL=${MODEL:-gpt2}
LIMIT=${LIMIT:-350}             # seconds in all
OUT=${OUT:-out/on_a_gpu}
PYTHON=${PYTHON:-python}
mkdir -p "$OUT"
rm -f "$OUT"/*.log "$OUT/report.json"
rm -rf "$OUT/train"
trap '"$PYTHON" -m bench.targets "$OUT"' EXIT
trap 'exit 130' INT TERM

part() {  # part NAME SECONDS COMMAND: run it; each line of $OUT/NAME.log begins with the seconds since its start
    local name=$1 left=$((LIMIT - SECONDS)) start=$SECONDS
    local most=$(($2 < left ? $2 : left))
    shift 2
    if [ "$most" -lt 5 ]; then
        echo "== $name: not reached"
        return
    fi
    echo "== $name, at most $most s"
    timeout --kill-after=5 "$most" "$@" 2>&1 | while IFS= read -r line; do
        echo "$((SECONDS - start)) $line" | tee -a "$OUT/$name.log"
    done
    echo "== $name: status ${PIPESTATUS[0]} after $((SECONDS - start)) s"
}

SIZES="--n_layer=12 --n_head=12 --n_embd=768"
[ "$MODEL" = tiny ] && SIZES="--n_layer=2 --n_head=2 --n_embd=64"
COMPILE=auto
[ "$DEVICE" = cpu ] && COMPILE=on
BASELINE=$("$PYTHON" -c "import transformers" > /dev/null 2>&1 && echo --baseline)

part report 170 "$PYTHON" -m bench --gpu_report $BASELINE --model="$MODEL" --device="$DEVICE" --train_batch=32 \
    --repeats=2 --new_tokens=32 --time_limit=160 --out="$OUT/report.json" \
    --only=logits,compiled,graphs,training,decoding,batch,drafts
part data 30 "$PYTHON" prepare_data.py arithmetic --train=300 --mix=300 --out_dir="$OUT/data"
part train 75 "$PYTHON" train.py --trunk=scratch --trunk_mode=full $SIZES --data_dir="$OUT/data" --batch_size=32 \
    --out_dir="$OUT/train" --max_iters=30 --warmup_iters=5 --eval_examples=64 --compile=$COMPILE --device="$DEVICE"
part evaluate 45 "$PYTHON" evaluate.py --out_dir=demo --data_dir="$OUT/data" --steps=1,16 --limit=256 \
    --mistakes=0 --device="$DEVICE"
part tests 100 env DEVICE_OF_GPU_TESTS="$DEVICE" "$PYTHON" -m pytest -q tests/test_gpu.py
part rest 90 "$PYTHON" -m bench --gpu_report --model="$MODEL" --device="$DEVICE" --repeats=2 \
    --out="$OUT/rest.json" --only=attention,ranks,controls
