#!/usr/bin/env bash
# GPT-2 (124M) on Anthropic's HH, on one GPU: weights, data, SFT, reward model, PPO.
#   bash runs/gpt2_hh.sh             # not measured here; tools.bench --plan: PPO takes 15 GB of GPU memory
#                                    # with prompts of 512 tokens, 18 GB with the longest that fit, 896
#   SMOKE=1 bash runs/gpt2_hh.sh     # the same commands on a CPU: tiny network, few texts, few steps
# Learning rates: Ziegler et al. 2019 (124M) and Stiennon et al. 2020; other settings: defaults of ppo.py.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python} out=${OUT:-out/gpt2_hh${SMOKE:+_smoke}}
source runs/smoke.sh

if [ -n "${SMOKE:-}" ]; then
    smoke_data hh
else
    data=data/files/hh init=out/gpt2.pt few_sft= few_rm= few_ppo=
    $python -m data.hh
    [ -e $init ] || $python -m tools.hf import gpt2 $init
fi
$python train_sft.py --data $data --out $out --init $init --epochs 1 --batch-tokens 16384 --lr 1e-4 $few_sft
$python train_rm.py --data $data --out $out --batch-tokens 16384 --lr 1.5e-5 $few_rm
$python ppo.py --data $data --out $out --updates 200 --batch 128 --max-new-tokens 128 \
    --micro-batch 16384 --lr 1e-5 --critic-lr 1e-5 $few_ppo
