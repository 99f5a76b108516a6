"""The table of docs/results.md from the logs of finished runs: python runs/table.py FOLDER..."""
import json
import statistics
import sys
from pathlib import Path

COLUMNS = ("RM accuracy", "ceiling", "ridge", "longer wins", "gold SFT", "gold best of 4", "gold PPO",
           "of the gap", "gold win rate", "EOS", "of its peak", "score", "KL")


def row(folder):
    """The numbers of one run, from its ppo.log.jsonl and rm.log.jsonl; that of "1-no-kl" may be in "1"."""
    source = folder if (folder / "rm.log.jsonl").exists() else folder.with_name(folder.name.split("-")[0])
    rm = json.loads((source / "rm.log.jsonl").read_text().splitlines()[-1])["report"]
    lines = [json.loads(line) for line in (folder / "ppo.log.jsonl").read_text().splitlines()]
    reports = [line["report"] for line in lines if "report" in line]
    last = max(r["update"] for r in reports)
    before, after = (next(r for r in reports if r["update"] == u) for u in (0, last))
    closed = (after["gold"] - before["gold"]) / (1 - before["gold"])
    peak = max(r["gold"] for r in reports)
    return (rm["accuracy"], rm["ceiling"], rm["ridge_accuracy"], rm["longer_wins"], before["gold"],
            after["best_of_4_gold"], after["gold"], closed, after["gold_win_rate"], after["eos"],
            after["gold"] / peak, after["score"], after["kl"])


def main(folders):
    rows = {folder.name: row(folder) for folder in folders}
    print("| seed | " + " | ".join(COLUMNS) + " |\n|" + "---|" * (len(COLUMNS) + 1))
    for name, numbers in rows.items():
        print(f"| {name} | " + " | ".join(f"{x:.3f}" for x in numbers) + " |")
    if len(rows) > 1:
        columns = zip(*rows.values(), strict=True)
        spread = [f"{statistics.mean(x):.3f} ± {statistics.stdev(x):.3f}" for x in columns]
        print("| mean ± sd | " + " | ".join(spread) + " |")


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
