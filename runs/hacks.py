"""What each patch of hacks/ does to the default pipeline: the table of hacks/README.md.

    python runs/hacks.py                        # all patches, full default pipeline, seed 1
    python runs/hacks.py --small                # SFT 0.5 epochs, reward model 0.15, PPO 10 updates
    python runs/hacks.py --small --until sft    # the first stage only
    python runs/hacks.py --small rope gqa       # these, beside the unpatched model.py
    python runs/hacks.py rope+gqa --sft "--n-layer 2"   # one after the other; flags of a stage

Each runs in a copy of the project, out/hacks/NAME; a stage that has finished is not run again. The last lines
are the table, also of patches that were run earlier. Seconds are of CPU time, which other work on the machine
changes little.
"""
import argparse
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SAME = "--epochs 3 --dropout 0 --lr 0.004"  # by rule for the unpatched network; a larger one would get more
SMALL = {"train_sft": "--epochs 0.5", "train_rm": "--epochs 0.15", "ppo": "--updates 10"}
FILES = {"train_sft": "sft", "train_rm": "rm", "ppo": "ppo"}
AFTER = {"llama_hf"}  # no other network than the patch it follows


def make_copy(folder, names):
    """The project with these patches, in `folder`."""
    folder.mkdir(parents=True)
    for name in ("data", "lib"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "files"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    patches = "".join((ROOT / "hacks" / f"{name}.patch").read_text() for name in names)
    if patches:
        subprocess.run(["git", "apply", f"--directory={folder.relative_to(ROOT)}"], cwd=ROOT, input=patches,
                       text=True, check=True)
    subprocess.run([sys.executable, "-m", "data.stories"], cwd=folder, check=True)


def cpu_seconds():
    """Of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_stages(folder, flags, last):
    """Run what has not finished, up to stage `last`; the seconds of each stage go to seconds.json."""
    path = folder / "seconds.json"
    seconds = json.loads(path.read_text()) if path.exists() else {}
    for script, file in FILES.items():
        if (folder / f"out/{file}.pt").exists():
            if file == last:
                break
            continue
        start, command = cpu_seconds(), [sys.executable, f"{script}.py", *flags[script]]
        with open(folder / f"{script}.txt", "w") as output:
            subprocess.run(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT, check=True)
        seconds[script] = cpu_seconds() - start
        path.write_text(json.dumps(seconds))
        if file == last:
            break


def reports(folder, file):
    """The reports in a stage's log; none if it was not run."""
    if not (folder / f"out/{file}.pt").exists():
        return [{}, {}]
    lines = map(json.loads, (folder / f"out/{file}.log.jsonl").read_text().splitlines())
    return [line["report"] for line in lines if "report" in line]


def numbers(folder):
    """What the columns of the table are made from."""
    text, seconds = (folder / "train_sft.txt").read_text(), json.loads((folder / "seconds.json").read_text())
    return {"parameters": int(text.split(" parameters")[0].split()[-1]), "sft": seconds["train_sft"],
            "loss": reports(folder, "sft")[-1]["val_loss"],
            "accuracy": reports(folder, "rm")[-1].get("accuracy"),
            "gold": [reports(folder, "ppo")[i].get("gold") for i in (-2, -1)]}


def print_table(work):
    made = {folder.name: numbers(folder) for folder in sorted(work.iterdir())
            if (folder / "out/sft.pt").exists()}
    print("| patch | parameters | SFT, seconds | SFT loss | reward model | gold of SFT | gold of PPO |\n"
          "|---|---|---|---|---|---|---|")
    plain = made.pop("none")
    for name, x in {"none": plain, **made}.items():
        size, time = (x[key] / plain[key] for key in ("parameters", "sft"))
        size, time = f"x {size:.2f}", f"x {time:.2f}"
        if x is plain:
            size, time = f"{x['parameters']:,}", f"{x['sft']:.0f}"
        rest = [f"{y:.3f}" if y is not None else "" for y in (x["accuracy"], *x["gold"])]
        print(f"| {name} | {size} | {time} | {x['loss']:.4f} | {' | '.join(rest)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="patches, or several joined by + (default: all)")
    parser.add_argument("--small", action="store_true", help="a few percent of the work")
    parser.add_argument("--until", choices=FILES.values(), default="ppo", help="the last stage to run")
    for script in FILES:
        parser.add_argument(f"--{FILES[script]}", default="", help=f"flags of {script}.py")
    args = parser.parse_args()
    work = ROOT / "out" / ("hacks_small" if args.small else "hacks")
    names = args.names or sorted({path.stem for path in (ROOT / "hacks").glob("*.patch")} - AFTER)
    for name in ["none", *names]:
        folder = work / name
        if not folder.exists():
            make_copy(folder, [] if name == "none" else name.split("+"))
        flags = {script: f"{SMALL[script] if args.small else ''} {getattr(args, FILES[script])}".split()
                 for script in FILES}
        if "lora" in name.split("+"):  # there is nothing to adapt otherwise
            flags["train_sft"] += ["--init", "../none/out/sft.pt"]
        else:
            flags["train_sft"] = SAME.split() + flags["train_sft"]
        print(f"{name}: {folder}", flush=True)
        run_stages(folder, flags, args.until)
    print_table(work)


if __name__ == "__main__":
    main()
