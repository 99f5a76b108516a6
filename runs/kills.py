"""SIGKILLs at random moments of the three stages. Each killed run is resumed until it finishes, and then
compared bit for bit with a run that was never killed: python runs/kills.py [--kills N] [--seed S]

It knows the scripts only by their command lines, what they print, and their files. Of the kills, 15% aim at
the start-up, 60% at the training, 25% at what follows the last step (evaluation, result, log, exit). Where
they hit is read off afterwards: in training if the process had saved a state by then, in a save if it left a
half-written file. Only kills that end a live process count. Exit status 1 when anything differs. 100 kills
took 27 minutes on a third of a core.
"""
import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
SHARED = "--data data --device cpu --save-every 3"
STAGES = {  # script, flags, and how the line begins that is printed just before the first step
    "sft": ("train_sft.py", f"{SHARED} --tokenizer bytes --n-layer 1 --n-head 2 --d-model 32 "
            "--block-size 320 --batch-tokens 1024 --epochs 16 --dropout 0.1", "^SFT: "),
    "rm": ("train_rm.py", f"{SHARED} --batch-tokens 1024 --epochs 8 --dropout 0.1 --max-new-tokens 40",
           "^reward model: "),
    "ppo": ("ppo.py", f"{SHARED} --updates 16 --batch 8 --max-new-tokens 24 --epochs 2 --minibatches 2 "
            "--lr 3e-3 --critic-lr 3e-3 --kl-target 0.5 --kl-horizon 60 --ptx-coef 0.5 --show 1", "^PPO: "),
}
LAST = r"^ *(\d+)/\1 |^resuming after step (\d+) of \2$"  # printed once no step is left


def write_data(folder):
    """Prompts and answers of made-up words, a few hundred bytes a line; more "a" is better."""
    rng = random.Random(0)

    def text(n):
        return " ".join("".join(rng.choice("abcde") for _ in range(rng.randint(2, 7))) for _ in range(n))

    folder.mkdir(parents=True)
    for end, n in (("", 48), ("_val", 6)):
        pairs = [sorted((text(20), text(20)), key=lambda answer: -answer.count("a")) for _ in range(n)]
        rows = {"sft": [{"prompt": text(12), "completion": text(24)} for _ in range(n)],
                "preferences": [{"prompt": text(12), "chosen": a, "rejected": b} for a, b in pairs],
                "prompts": [{"prompt": text(24)} for _ in range(n)]}
        for name, lines in rows.items():
            (folder / f"{name}{end}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def start(folder, stage, *more):
    """A process of the stage's script; what it prints goes to the file `said`, at once."""
    script, flags, _ = STAGES[stage]
    with open(folder / "said", "w") as said:
        return subprocess.Popen([sys.executable, ROOT / script, *flags.split(), *more], cwd=folder,
                                stdout=said, stderr=said, env=os.environ | ENVIRONMENT)


def seen_after(folder, process, pattern, begun):
    """Seconds after `begun` at which the pattern is printed; None: the process ends without it."""
    while not re.search(pattern, (folder / "said").read_text(errors="replace"), re.M):
        if process.poll() is not None:
            return None
        time.sleep(0.003)
    return time.monotonic() - begun


def run_clean(folder, stage):
    """An uninterrupted run; returns the seconds of start-up, training and end."""
    begun, process = time.monotonic(), start(folder, stage)
    times = [seen_after(folder, process, pattern, begun) for pattern in (STAGES[stage][2], LAST)]
    if process.wait():
        sys.exit(f"{stage} failed:\n{(folder / 'said').read_text()}")
    return {"start": times[0], "train": times[1] - times[0], "end": time.monotonic() - begun - times[1]}


def kill(folder, stage, process, aim, seconds, rng):
    """Send SIGKILL at a random moment of the phase `aim`, unless the process ends before."""
    pattern = {"start": "", "train": STAGES[stage][2], "end": LAST}[aim]
    begun = time.monotonic()
    if seen_after(folder, process, pattern, begun) is not None:
        until = time.monotonic() + rng.uniform(0, 0.4 if aim == "train" else 1) * seconds[aim]
        while time.monotonic() < until and process.poll() is None:
            time.sleep(0.001)
        process.kill()


def stamp(path):
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else None


def phase(folder, stage, was, steps):
    """Where the last kill hit. `was`: the stamp of the saved state when the process began."""
    state, out = folder / f"out/{stage}.state.pt", folder / "out"
    begun = re.search(STAGES[stage][2], (folder / "said").read_text(errors="replace"), re.M)
    step = torch.load(state, weights_only=True)["step"] if state.exists() else -1  # the file is whole
    if begun and (step == steps or (out / f"{stage}.finished.pt").exists()):
        return "end"
    return "training" if begun and stamp(state) != was else "before"


def differences(folder, clean, stage):
    """What differs between two finished runs: weights, log, the rest of the checkpoint, names of files."""
    a, b = (torch.load(x / f"out/{stage}.pt", weights_only=True)["weights"] for x in (folder, clean))
    if a.keys() != b.keys():
        yield "names of the weights"
    for name in a.keys() & b.keys():
        bits = [x.reshape(-1).view(torch.uint8) for x in (a[name], b[name])]
        if a[name].dtype != b[name].dtype or not torch.equal(*bits):
            yield f"weights {name}"
    logs = [(x / f"out/{stage}.log.jsonl").read_text().splitlines() for x in (folder, clean)]
    yield from (f"log line {i + 1}" for i, pair in enumerate(zip(*logs, strict=False)) if pair[0] != pair[1])
    if len(logs[0]) != len(logs[1]):  # a log holds no clock and no speed, so whole lines are compared
        yield "number of log lines"
    if (folder / f"out/{stage}.pt").read_bytes() != (clean / f"out/{stage}.pt").read_bytes():
        yield "bytes of the checkpoint"
    names = [{path.name for path in (x / "out").glob(f"{stage}*")} for x in (folder, clean)]
    yield from (f"file {name}" for name in sorted(names[0] ^ names[1]))


def run_killed(folder, clean, stage, counts, wanted, seconds, rng):
    """One run, killed and resumed until it finishes. `counts` gets its kills, and where they hit."""
    log = [json.loads(line) for line in (clean / f"out/{stage}.log.jsonl").read_text().splitlines()]
    steps, state, flags = max(line.get("step", 0) for line in log), folder / f"out/{stage}.state.pt", []
    while True:
        was, process = stamp(state), start(folder, stage, *flags)
        if counts["kills"] < wanted:
            aim, = rng.choices(["start", "train", "end"], [15, 60, 25])
            kill(folder, stage, process, aim, seconds, rng)
        code, said = process.wait(), (folder / "said").read_text(errors="replace")
        counts["resumed"] += "resuming after step" in said
        if code == -signal.SIGKILL:
            counts["kills"] += 1
            counts[phase(folder, stage, was, steps)] += 1
            counts["saving"] += any((folder / "out").glob(f"*.part{process.pid}"))
            flags = ["--resume"]
        elif code == 1 and said.endswith("; drop --resume\n"):  # nothing was saved yet
            flags = []
        elif code:
            sys.exit(f"{stage} ended with {code}:\n{said}")
        else:
            return


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args, begun, wrong, total = parser.parse_args(), time.monotonic(), 0, 0
    wanted = -(-args.kills // len(STAGES))
    with tempfile.TemporaryDirectory() as work:
        clean, folder = Path(work, "clean"), Path(work, "killed")
        write_data(clean / "data")
        for stage in STAGES:
            seconds, rng, n = run_clean(clean, stage), random.Random(f"{args.seed} {stage}"), Counter()
            print(f"{stage} took", *(f"{name} {x:.1f} s" for name, x in seconds.items()), flush=True)
            while n["kills"] < wanted:
                shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(clean / "data", folder / "data")
                (folder / "out").mkdir()
                for before in list(STAGES)[: list(STAGES).index(stage)]:
                    shutil.copy(clean / f"out/{before}.pt", folder / "out")
                run_killed(folder, clean, stage, n, wanted, seconds, rng)
                found = list(differences(folder, clean, stage))
                n["runs"], n["differences"] = n["runs"] + 1, n["differences"] + len(found)
                for what in found:
                    print(f"{stage}, run {n['runs']}: {what} differs", flush=True)
            print(f"{stage}: {n['kills']} kills in {n['runs']} runs: {n['before']} before a step was saved, "
                  f"{n['training']} in training, {n['end']} in the end phase; {n['saving']} in a save; "
                  f"{n['resumed']} resumes; {n['differences']} differences", flush=True)
            wrong, total = wrong + n["differences"], total + n["kills"]
    print(f"{total} kills, {wrong} differences, {time.monotonic() - begun:.0f} s")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
