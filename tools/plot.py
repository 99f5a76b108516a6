"""Plot gold and score against the square root of KL, from logs of ppo.py (Gao et al. 2022, figure 1).

    pip install -r requirements-dev.txt    # for matplotlib
    python -m tools.plot runs/overoptimisation.png out/seeds/?/ppo.log.jsonl out/seeds/?-no-kl/ppo.log.jsonl
"""
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt


def curve(path):
    """sqrt(KL), gold and score of the held-out reports in one log, and its kl_coef."""
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    reports = sorted((line["report"] for line in lines if "report" in line), key=lambda r: r["update"])
    return ([max(0.0, r["kl"]) ** 0.5 for r in reports], [r["gold"] for r in reports],
            [r["score"] for r in reports], lines[0]["config"]["kl_coef"])


def main(target, paths):
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharex=True)
    for path in paths:
        x, gold, score, kl_coef = curve(path)
        color = "tab:red" if kl_coef == 0 else "tab:blue"
        for axis, y in zip(axes, (gold, score), strict=True):
            axis.plot(x, y, ".-", color=color, alpha=0.7)
    titles = "gold (true score, 1 is best)", "score of the reward model (proxy)"
    for axis, name in zip(axes, titles, strict=True):
        axis.set(xlabel="√KL to the SFT model (√nats)", title=name)
    handles = [plt.Line2D([], [], color=color) for color in ("tab:blue", "tab:red")]
    axes[0].legend(handles, ["default --kl-coef", "--kl-coef 0"])
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    print(f"wrote {target}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python -m tools.plot FILE.png LOG...")
    main(sys.argv[1], sys.argv[2:])
