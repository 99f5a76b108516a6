#!/usr/bin/env bash
# A reward model for each of the four pools, on the same trunk. Run runs/seeds.sh first: its SFT model and
# last-token reward model of seed 1 are used.
set -euo pipefail
cd "$(dirname "$0")/.."
export python=${PYTHON:-python} out=${OUT:-out/seeds}/1 OMP_NUM_THREADS=1

one_pool() {
    set -euo pipefail
    mkdir -p "$out-$1"
    $python train_rm.py --sft "$out/sft.pt" --out "$out-$1" --pool $1 > "$out-$1/log.txt"
}
export -f one_pool

printf '%s\n' mean max token | xargs -P 2 -I{} bash -c 'one_pool {}'
grep -H "held-out pairs" "$out/log.txt" "$out"-{mean,max,token}/log.txt
