#!/usr/bin/env bash
# The default pipeline with seeds 1 to 5, and its PPO again without a KL penalty; then README's table.
# Two seeds at a time with one thread each.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python} out=${OUT:-out/seeds}
export OMP_NUM_THREADS=1

one_seed() {
    local dir=$out/$1 free=$out/$1-no-kl
    mkdir -p "$dir" "$free"
    $python train_sft.py --seed $1 --out "$dir" > "$dir/log.txt"
    $python train_rm.py --seed $1 --out "$dir" >> "$dir/log.txt"
    $python ppo.py --seed $1 --out "$dir" >> "$dir/log.txt"
    cp "$dir/sft.pt" "$dir/rm.pt" "$free"
    $python ppo.py --seed $1 --out "$free" --kl-coef 0 > "$free/log.txt"
}

$python -m data.stories
(one_seed 1; one_seed 3; one_seed 5) & first=$!
(one_seed 2; one_seed 4) & second=$!
wait $first
wait $second
$python runs/table.py "$out"/?
echo
$python runs/table.py "$out"/?-no-kl
