"""Tables of human ratings from the logs of runs/reviews.sh: python runs/reviews_table.py FOLDER..."""
import json
import sys
from pathlib import Path


def reports(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line["report"] for line in lines if "report" in line]


def print_rows(names, rows):
    print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
    for row in rows:
        print("| " + " | ".join(f"{x:.3f}" if isinstance(x, float) else str(x) for x in row) + " |")
    print()


def main(folders):
    rm = {folder.name: reports(folder / "rm.jsonl")[-1] for folder in folders}
    print_rows(["seed", "all pairs", "far apart", "longer wins", "calibration error"],
               [[seed, r["accuracy"], r["accuracy_wide"], r["longer_wins"], r["calibration_error"]]
                for seed, r in rm.items()])
    columns = ["score", "judge", "kl", "length", "distinct_2", "eos"]
    for folder in folders:
        some = {r["update"]: r for r in reports(folder / "half0/ppo.jsonl")}
        print_rows([f"seed {folder.name}, update", *columns],
                   [[update] + [some[update][name] for name in columns] for update in sorted(some)])


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
