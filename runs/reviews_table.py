"""Tables of human ratings from results of runs/reviews.sh: python runs/reviews_table.py DATA FOLDER..."""
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.examples import encode_rankings
from data.records import read_preferences
from lib.checkpoint import load, load_tokenizer
from lib.report import accuracy, held_out_pairs
from lib.rewards import score_rows
from model import RewardModel

BATCH_TOKENS = 4096


def reports(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line["report"] for line in lines if "report" in line]


def print_rows(names, rows):
    print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
    for row in rows:
        print("| " + " | ".join(f"{x:.3f}" if isinstance(x, float) else str(x) for x in row) + " |")
    print()


def together(data, folders, wide=2):
    """Accuracy of the reward models' mean score on all held-out pairs, and on those far apart."""
    scores = []
    for folder in folders:
        rm, tokenizer = load(RewardModel, folder / "rm.pt"), load_tokenizer(folder / "rm.pt")
        val = read_preferences(Path(data) / "preferences_val.jsonl")
        groups = encode_rankings(val, tokenizer, rm.room, "preferences_val.jsonl")
        scores.append(score_rows(rm, [row for g in groups for row in g.rows], BATCH_TOKENS, "cpu"))
    gap, _, gold, _ = held_out_pairs(groups, torch.stack(scores).mean(0), None)
    return [accuracy(gap).mean().item(), accuracy(gap[gold.abs() > wide]).mean().item()]


def main(data, folders):
    rm = {folder.name: reports(folder / "rm.log.jsonl")[-1] for folder in folders}
    print_rows(["seed", "all pairs", "far apart", "ridge on words", "longer wins", "calibration error"],
               [[seed, r["accuracy"], r["accuracy_wide"], r["ridge_accuracy"], r["longer_wins"],
                 r["calibration_error"]] for seed, r in rm.items()]
               + [["their mean score", *together(data, folders), "", "", ""]])
    columns = ["score", "judge", "kl", "length", "distinct_2", "eos"]
    for folder in folders:
        some = {r["update"]: r for r in reports(folder / "half0/ppo.log.jsonl")}
        print_rows([f"seed {folder.name}, update", *columns],
                   [[update] + [some[update][name] for name in columns] for update in sorted(some)])
        last = some[max(some)]
        print(f"after PPO the judge prefers {last['judge_win_rate']:.1%}, "
              f"the reward model {last['win_rate']:.1%}\n")


if __name__ == "__main__":
    main(sys.argv[1], [Path(name) for name in sys.argv[2:]])
