#!/usr/bin/env bash
# Human ratings, from scratch: 8,979 film-review sentences, no pretrained weights, 2 CPU cores.
#   bash runs/reviews.sh                   # downloads the archive
#   bash runs/reviews.sh --from ARCHIVE    # has it already
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python} data=data/files/reviews out=${OUT:-out/reviews} seed=${SEED:-1}

$python -m data.reviews "$@"
mkdir -p "$out"
[ -e "$out/reviews.bpe" ] ||
    $python -m data.tokenizer train --vocab-size 4096 --out "$out/reviews.bpe" $data/sft.jsonl
$python train_sft.py --data $data --out "$out" --seed $seed --tokenizer "$out/reviews.bpe" \
    --block-size 96 --epochs 8 --dropout 0.2 --lr 2e-3
$python train_rm.py --data $data --out "$out" --seed $seed --dropout 0.2 --lr 5e-4 --wide-gap 2
$python ppo.py --data $data --out "$out" --seed $seed --max-new-tokens 48
