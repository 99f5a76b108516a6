#!/usr/bin/env bash
# The default pipeline with SEEDS (1 to 5), PPO again without the KL penalty, then the tables of
# docs/results.md. Two seeds at a time, one thread each.
set -euo pipefail
cd "$(dirname "$0")/.."
export python=${PYTHON:-python} out=${OUT:-out/seeds} OMP_NUM_THREADS=1

one_seed() {
    set -euo pipefail
    local dir=$out/$1 free=$out/$1-no-kl
    mkdir -p "$dir" "$free"
    $python train_sft.py --seed $1 --out "$dir" > "$dir/log.txt"
    $python train_rm.py --seed $1 --out "$dir" >> "$dir/log.txt"
    $python ppo.py --seed $1 --out "$dir" >> "$dir/log.txt"
    $python ppo.py --seed $1 --sft "$dir/sft.pt" --rm "$dir/rm.pt" --out "$free" --kl-coef 0 > "$free/log.txt"
}
export -f one_seed

$python -m data.stories
printf '%s\n' ${SEEDS:-1 2 3 4 5} | xargs -P 2 -I{} bash -c 'one_seed {}'
$python runs/table.py "$out"/?
echo
$python runs/table.py "$out"/?-no-kl
