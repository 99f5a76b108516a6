"""Twenty-one illnesses and what the doctor says of each: the tables of docs/results.md.

    bash runs/seeds.sh                                 # first: the healthy runs
    python runs/doctor.py                              # makes what is missing in out/doctor, then the table
    python runs/doctor.py few_steps noisy              # only these

Each is one stage, trained on spoilt data, with bad flags, or by spoilt code, after healthy ones (seed 1).
Reward models read a fifth of the rankings once; PPO takes 30 updates, but for no_kl 200.
"""
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STORIES, OUT = ROOT / "data/files/stories", Path(os.environ.get("OUT", "out/doctor"))
HEALTHY = Path(os.environ.get("HEALTHY", "out/seeds/1"))
EOS_LEFT_OUT = ("import train_sft\nfrom lib.flags import cli\nmask = train_sft.response_mask\n"
                "train_sft.response_mask = lambda lengths, P, T: mask(lengths - 1, P, T)\n"
                "cli(train_sft.main, train_sft.Config)\n")
REWARD = ("from data.stories import gold_score\ndef score(prompts, responses):\n"
          "    return [{} * gold_score(*x) for x in zip(prompts, responses)]\n")
TIMES = {"times_100": 100, "against": -1}


# ---- spoilt data: training and held-out lines of one file -> both ----

def rotated(train, val):
    """Each prompt stands before the next example's responses."""
    prompts = [line["prompt"] for line in train]
    return [line | {"prompt": p} for line, p in zip(train, prompts[1:] + prompts[:1], strict=True)], val


def reversed_(line):
    return line | {"ranks": [-rank for rank in line.get("ranks", range(len(line["responses"])))]}


def flipped(share):
    def spoil(train, val):
        return [reversed_(line) if random.random() < share else line for line in train], val
    return spoil


def by_length(train, val):
    def ranked(line):
        return line | {"ranks": [-len(text) for text in line["responses"]]}
    return tuple([line for line in map(ranked, some) if len(set(line["ranks"])) > 1] for some in (train, val))


def pairs(n):
    def spoil(train, val):
        return [line for line in train if len(line["responses"]) == 2][:n], val
    return spoil


# name: (stage, the words that its verdict must have, spoilt data, flags)
ILL = {
    "few_steps": ("sft", "too few steps", None, ["--epochs", 0.03]),
    "high_rate": ("sft", "learning rate is too high", None, ["--lr", 0.12]),
    "no_eos": ("sft", "responses do not end", None, []),
    "shuffled": ("sft", "wrong prompts|prompt is ignored", rotated, []),
    "thirty": ("sft", "too few demonstrations|overfit", lambda train, val: (train[:30], val),
               ["--epochs", 50]),
    "cut": ("sft", "do not fit", None, ["--block-size", 48, "--epochs", 0.5]),
    "noisy": ("rm", "noisy labels", flipped(0.3), ["--epochs", 1]),
    "flipped": ("rm", "labels are reversed", flipped(1.0), ["--epochs", 1]),
    "blind": ("rm", "wrong prompts|prompt is not read", rotated, ["--epochs", 1]),
    "few_pairs": ("rm", "overfit", pairs(200), ["--epochs", 8]),
    "longer": ("rm", "longer is better|length only", by_length, ["--epochs", 1]),
    "leaked": ("rm", "held-out texts in the training data", lambda train, val: (train + val, val),
               ["--epochs", 1]),
    "few_rm": ("rm", "too few steps", None, ["--epochs", 0.08]),
    "high_rate_rm": ("rm", "learning rate is too high", None, ["--lr", 0.015, "--epochs", 0.3]),
    "low_rate_rm": ("rm", "learning rate is too low", None, ["--lr", 5e-6, "--epochs", 0.3]),
    "no_kl": ("ppo", "over-optimisation", None, ["--kl-coef", 0, "--updates", 200]),
    "high_rate_ppo": ("ppo", "learning rate is too high", None, ["--lr", 6e-3]),
    "no_critic": ("ppo", "critic does not learn", None, ["--critic-lr", 0]),
    "ends": ("ppo", "a missing end pays", None, ["--no-eos-score", 5]),
    "against": ("ppo", "against gold", None, ["--updates", 16]),
    "times_100": ("ppo", "standard deviation of 1", None, ["--reward-scale", "none"]),
}
FILES = {"sft": "sft", "rm": "preferences"}
TITLES = {"sft": "SFT", "rm": "reward model", "ppo": "PPO"}


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def spoilt_data(folder, stage, spoil):
    """A folder with the stories, its file for this stage changed."""
    folder.mkdir(parents=True)
    for path in STORIES.glob("*.jsonl"):
        (folder / path.name).write_bytes(path.read_bytes())
    name = FILES[stage]
    files = [folder / f"{name}{end}.jsonl" for end in ("", "_val")]
    train, val = map(read, files)
    random.seed(0)
    for path, lines in zip(files, spoil(train[:7200] if stage == "rm" else train, val), strict=True):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def make(name):
    """Train the ill stage into OUT/NAME; a run that is refused or diverges is ill enough."""
    stage, _, spoil, flags = ILL[name]
    out = OUT / name
    out.mkdir(parents=True)
    if stage != "ppo" and (spoil or stage == "rm"):
        flags = [*flags, "--data", spoilt_data(out / "data", stage, spoil or (lambda *both: both))]
    if stage != "sft":
        flags = [*flags, "--sft", HEALTHY / "sft.pt"]
    if stage == "ppo":
        flags = ["--updates", 30, *flags]
        (out / "reward.py").write_text(REWARD.format(TIMES.get(name)))
        flags += ["--reward", f"{out}/reward.py:score"] if name in TIMES else ["--rm", HEALTHY / "rm.pt"]
    (out / "spoilt.py").write_text(EOS_LEFT_OUT)
    script = {"sft": "train_sft.py", "rm": "train_rm.py", "ppo": "ppo.py"}[stage]
    command = [sys.executable, out / "spoilt.py" if name == "no_eos" else ROOT / script, "--out", out, *flags]
    with open(out / "log.txt", "w") as log:
        subprocess.run(list(map(str, command)), stdout=log, stderr=log,
                       env=os.environ | {"PYTHONPATH": str(ROOT)})


def verdict(out):
    done = subprocess.run([sys.executable, "-m", "tools.doctor", "--out", str(out)], cwd=ROOT, text=True,
                          capture_output=True)
    (out / "doctor.txt").write_text(done.stdout + done.stderr)
    return (done.stdout + done.stderr).strip().splitlines()[-1]


def main(names):
    stages = causes = 0
    print("| illness | stage | cause | what the doctor says |\n|---|---|---|---|")
    for name in names:
        if not (OUT / name).exists():
            make(name)
        said, (stage, cause, *_) = verdict((OUT / name).resolve()), ILL[name]
        right = said.startswith(f"verdict: {TITLES[stage]} is ill"), bool(re.search(cause, said))
        stages, causes = stages + right[0], causes + all(right)
        marks = " | ".join("right" if x else "wrong" for x in right)
        print(f"| {name} | {marks} | {said.removeprefix('verdict: ')} |", flush=True)
    print(f"\nstage right in {stages} of {len(names)}, cause in {causes}")


if __name__ == "__main__":
    main(sys.argv[1:] or list(ILL))
