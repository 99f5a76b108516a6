#!/usr/bin/env bash
# Human ratings, from scratch: 8,979 film-review sentences, no pretrained weights, 2 CPU cores.
#   bash runs/reviews.sh                   # downloads the archive
#   bash runs/reviews.sh --from ARCHIVE    # uses your copy; give an absolute path
# One reward model learns from all sentences and is compared with the raters. Two more learn from one half
# each: PPO optimises the first, and the second, which saw none of its ratings, is the judge. All start
# from one SFT model.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python} data=data/files/reviews out=${OUT:-out/reviews} seeds=${SEEDS:-1}

$python -m data.reviews "$@"
for half in 0 1; do $python -m data.reviews "$@" --half $half --to ${data}_half$half; done
for seed in $seeds; do
    dir=$out/$seed
    $python train_sft.py --data $data --out "$dir" --seed $seed
    $python train_rm.py --data $data --out "$dir" --seed $seed --wide-gap 2
    for half in 0 1; do
        $python train_rm.py --data ${data}_half$half --sft "$dir/sft.pt" --out "$dir/half$half" --seed $seed \
            --wide-gap 2
    done
    $python ppo.py --data $data --sft "$dir/sft.pt" --out "$dir/half0" --judge "$dir/half1/rm.pt" --seed $seed \
        --show 10
done
folders=()
for seed in $seeds; do folders+=("$out/$seed"); done
$python runs/reviews_table.py $data "${folders[@]}"
