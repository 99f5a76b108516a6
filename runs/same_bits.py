"""Do two checkouts train to the same bits? Runs the same short commands in both, on one thread, and compares
weights, optimizer-independent results, logs and samples: python runs/same_bits.py BEFORE AFTER [--only NAME]

Every stage, pool and source of scores is there, and a run that is killed and resumed. Exit status 1 when
anything differs. Takes about 5 minutes a checkout on 2 cores.
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

REWARD = ("def count(prompts, responses):\n"
          "    return [r.count('a') - 0.1 * len(p) for p, r in zip(prompts, responses)]\n")
SFT = "train_sft.py --epochs 0.15 --out"
RM = "train_rm.py --epochs 0.02 --out"
PPO = "ppo.py --updates 4 --batch 16 --max-new-tokens 40 --show 2 --out"
POOLS = ("last", "mean", "max", "token")
# name: commands; "a<b" copies the folder b to a first; "kill" kills the command once a state is saved, then
# resumes
PLAN = {
    "sft": [f"{SFT} sft"],
    "sft dropout": [f"{SFT} sft2 --dropout 0.1 --micro-batch 512 --seed 3 --n-layer 2 --block-size 96"],
    "sft init": [f"{SFT} sft3 --init sft/sft.pt --lr 1e-3 --epochs 0.05"],
    "sft own data": ["train_sft.py --data own --out own_out --tokenizer bytes --block-size 64 --epochs 4"],
    "sft bf16": [f"{SFT} sft4 --bf16 --epochs 0.05 --checkpoint-activations"],
    **{f"rm {pool}": [f"rm_{pool}<sft", f"{RM} rm_{pool} --pool {pool}"] for pool in POOLS},
    "rm dropout": ["rm2<sft", f"{RM} rm2 --dropout 0.1 --micro-batch 600 --wide-gap 0.3 --seed 5"],
    "rm own data": ["own_rm<own_out", "train_rm.py --data own --out own_rm --epochs 4"],
    **{f"ppo {pool}": [f"ppo_{pool}<rm_{pool}", f"{PPO} ppo_{pool}"] for pool in POOLS},
    "ppo ptx": ["ppo2<rm_last", f"{PPO} ppo2 --ptx-coef 0.5 --minibatches 3 --micro-batch 700"],
    "ppo kl-target": ["ppo3<rm_last", f"{PPO} ppo3 --kl-target 2 --kl-horizon 100 --temperature 0.9"],
    "ppo judge": ["ppo4<rm_last", f"{PPO} ppo4 --judge rm_mean/rm.pt --update-kl 0.0005 --lr 3e-3"],
    "ppo reward": ["ppo5<sft", f"{PPO} ppo5 --reward reward.py:count --kl-coef 0.1"],
    "ppo bf16": ["ppo6<rm_last", f"{PPO} ppo6 --bf16 --checkpoint-activations --updates 2"],
    "ppo own data": ["own_ppo<own_rm",
                     "ppo.py --data own --out own_ppo --updates 3 --batch 4 --max-new-tokens 20"],
    "sft resumed": [f"kill {SFT} sft_k --save-every 10"],
    "rm resumed": ["rm_k<sft", f"kill {RM} rm_k --save-every 8"],
    "ppo resumed": ["ppo_k<rm_last", f"kill {PPO} ppo_k --save-every 2 --ptx-coef 0.5 --kl-target 2"],
    "sample": ["sample.py --ckpt ppo_last/ppo.pt --reward rm_last/rm.pt --seed 2 Tell_a_story_about_a_fox",
               "sample.py --ckpt sft/sft.pt --temperature 0 --n 1 Tell_a_story",
               "sample.py --ckpt sft/sft.pt --reward rm_token/rm.pt --best-of 5 --top-k 9 --top-p 0.8 Hello"],
}


def write_own_data(folder):
    """A small data set of a user's: odd prompts, lists of messages, ties, texts that are too long."""
    folder.mkdir(parents=True)
    words = "red blue green fish bird tree house river stone cloud".split()

    def text(i, n):
        return " ".join(words[(i * 7 + j * j) % 10] for j in range(n))

    def chat(i):
        return [{"role": "user", "content": text(i, 3)}, {"role": "assistant", "content": text(i, 4)}]

    sft = [{"prompt": text(i, i % 12), "completion": " " + text(i, 1 + i % 5)} for i in range(40)]
    sft += [{"messages": chat(i)} for i in range(10)] + [{"text": text(i, 4)} for i in range(10)]
    pairs = [{"prompt": text(i, 1 + i % 9), "chosen": " " + text(i, 2), "rejected": " " + text(i + 1, 3)}
             for i in range(30)]
    pairs += [{"prompt": text(i, 2), "responses": [" a", " b", " c d"], "ranks": [0, 1, 1]}
              for i in range(10)]
    prompts = [{"prompt": text(i, i % 11)} for i in range(20)]
    for name, rows in (("sft", sft), ("preferences", pairs), ("prompts", prompts)):
        for end in ("", "_val"):
            (folder / f"{name}{end}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(checkout, command, work, kill=False):
    """The command's output; with `kill`, of the run that was resumed after a SIGKILL."""
    script, *args = command.split()
    argv = [sys.executable, str(checkout / script), *(arg.replace("_a_", " a ") for arg in args)]
    process = subprocess.Popen(argv, cwd=work, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"})
    if kill:
        while process.poll() is None and not list((work / args[args.index("--out") + 1]).glob("*.state.pt")):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return run(checkout, command + " --resume", work)
    out, _ = process.communicate()
    if process.returncode:
        sys.exit(f"{command} in {checkout} failed:\n{out}")
    return out


def run_all(checkout, work, plan):
    """Run every command of the plan in `work`; what sample.py printed goes into files beside the rest."""
    write_own_data(work / "own")
    (work / "reward.py").write_text(REWARD)
    for name, commands in plan.items():
        for i, command in enumerate(commands):
            target, copied, source = command.partition("<")
            if copied:
                subprocess.run(["cp", "-r", work / source, work / target], check=True)
                continue
            kill = command.startswith("kill ")
            out = run(checkout, command.removeprefix("kill "), work, kill)
            if command.startswith("sample.py"):
                (work / f"sample{i}.txt").write_text(out)
        print(f"  {name}", flush=True)


def differences(a, b, where=""):
    """What differs between two loaded checkpoints: dicts, tensors, plain values."""
    if type(a) is not type(b):
        yield f"{where}: {type(a).__name__} and {type(b).__name__}"
    elif isinstance(a, dict):
        # a state names its files by where they are, which differs
        a, b = ({os.path.basename(str(key)): x for key, x in side.items()} for side in (a, b))
        if a.keys() != b.keys():
            yield f"{where}: other keys, {sorted(a.keys() ^ b.keys())}"
        for key in a.keys() & b.keys():
            yield from differences(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, torch.Tensor):
        if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a, b):
            yield f"{where}: other numbers"
    elif a != b:
        yield f"{where}: {str(a)[:80]} and {str(b)[:80]}"


def compare(before, after):
    """Print each result of the two folders; returns how many differ."""
    files = sorted(p.relative_to(before) for pattern in ("*/*.pt", "*/*.jsonl", "*.txt")
                   for p in before.glob(pattern) if p.parent.name != "own")
    wrong = 0
    for file in files:
        if not (after / file).exists():
            found = ["is missing"]
        elif file.suffix == ".pt":
            sides = (torch.load(side / file, weights_only=True) for side in (before, after))
            found = list(differences(*sides))
        elif file.suffix == ".jsonl":  # the order of flags in the config is no result
            sides = [[json.loads(line) for line in (side / file).read_text().splitlines()]
                     for side in (before, after)]
            found = [f"line {i + 1}" for i, (a, b) in enumerate(zip(*sides, strict=False)) if a != b]
            found += ["another number of lines"] * (len(sides[0]) != len(sides[1]))
        else:
            found = ["other bytes"] * ((before / file).read_bytes() != (after / file).read_bytes())
        wrong += bool(found)
        print(f"{'DIFFERS' if found else 'same   '} {file} {'; '.join(found[:3])}")
    return wrong, len(files)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkouts", nargs=2, type=Path)
    parser.add_argument("--only", help="only the commands whose name begins so")
    parser.add_argument("--work", type=Path,
                        help="folder that keeps the results; a side that is there is not run again")
    args = parser.parse_args()
    plan = {name: commands for name, commands in PLAN.items() if name.startswith(args.only or "")}
    with tempfile.TemporaryDirectory() as temporary:
        sides = [(args.work or Path(temporary)) / side for side in ("before", "after")]
        for checkout, side in zip(args.checkouts, sides, strict=True):
            print(f"{checkout}:")
            if not side.exists():
                run_all(checkout.resolve(), side.resolve(), plan)
        wrong, count = compare(*sides)
    print(f"{wrong} of {count} files differ")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
