# For SMOKE=1: smoke_data NAME makes a small data set and a tiny network to start from, and sets $data, $init
# and flags that limit every stage to a few steps. It uses real texts where this machine has them.
smoke_data() {
    data=$out/smoke/data init=$out/smoke/sft.pt
    few_sft="--epochs 0.2" few_rm="--epochs 0.2" few_ppo="--updates 2 --batch 8 --max-new-tokens 16"
    if [ ! -e "$data" ]; then
        local source=$out/smoke/source
        if [ "$1" = hh ] && [ -e ../shared/data/hh ]; then source=../shared/data/hh; else
            $python - "$1" "$source" <<'END'
import json, random, sys
from pathlib import Path

kind, folder = sys.argv[1], Path(sys.argv[2])
folder.mkdir(parents=True, exist_ok=True)
rng = random.Random(1)
words = lambda n: " ".join(rng.choice("a the cat dog sees likes red big and".split()) for _ in range(n))
post = lambda: {"subreddit": "pets", "title": words(5), "post": words(30)}
if kind == "hh":
    talk = lambda start, n: f"{start}\n\nAssistant: {words(n)}"
    pairs = [(talk(start, 5), talk(start, 9)) for start in (f"\n\nHuman: {words(12)}" for _ in range(200))]
    rows = {"helpful-base.jsonl": [{"chosen": a, "rejected": b} for a, b in pairs]}
else:
    rows = {f"{side}.jsonl": [post() | {"summary": words(6)} for _ in range(n)]
            for side, n in (("train", 200), ("valid", 20))}
    rows["batch3.json"] = [{"info": post(), "summaries": [{"text": words(6)}, {"text": words(9)}],
                            "choice": i % 2, "split": "valid1" if i < 20 else "train"} for i in range(200)]
for name, some in rows.items():
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in some))
END
        fi
        $python -m "data.$1" --from "$source" --to "$data"
    fi
    $python train_sft.py --data "$data" --out "$out/smoke" --tokenizer bytes --n-layer 1 --n-head 2 \
        --d-model 32 --block-size 1024 --epochs 0.01
}
