"""Curves: what the logs of any number of runs hold, all stages in one picture.

    pip install matplotlib
    python -m tools.plot out                                 # -> curves.png
    python -m tools.plot out --live                          # drawn anew while the run goes on
    python -m tools.plot out/a out/b --to compared.svg       # over one another, a colour a run
    python -m tools.plot out/seeds/* --by kl_coef --only "against √KL"    # a colour a value of --kl-coef

A run is a folder with logs of one to three stages (sft, rm, ppo). Where a stage trains again or was killed,
its unfinished log is drawn. Faint lines are training batches, dots are held-out data; a panel of which no
log has a number is left out. --live ends when each run's PPO has ended, or by Ctrl-C.
"""
import argparse
import io
import itertools
import math
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from data.files import UserError, atomic_file, json_object, printable
from lib.flags import one_sentence
from lib.output import make_harmless

try:
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from PIL import Image, PngImagePlugin  # comes with matplotlib
except ImportError:
    Figure = None

STAGES = ("sft", "rm", "ppo")
ENDS = ("state.jsonl", "log.jsonl")  # of an unfinished log, which counts first, and of a finished one
MARK = "onetrunk tools.plot"  # in each picture: a file without it is not ours to replace
PAUSE = 5.0  # seconds between two pictures of --live, at least
COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2")


class Panel(NamedTuple):
    title: str
    stage: str
    train: str = ""  # name of the number in the lines of training steps
    held_out: str = ""  # in the reports on held-out data
    margins: str = ""  # in the parts of the last report's "by_margin"
    over: str = ""  # name of the number to the right; without, the step
    beside: tuple = ()  # names in the last report, of BESIDE: dotted lines, if it is the only run
    limits: tuple = (None, None)  # of the axis upwards


PANELS = (
    Panel("SFT: loss, nats a token", "sft", "loss", "val_loss", beside=("bigram_loss",)),
    Panel("reward model: loss, nats", "rm", "loss", "val_loss"),
    Panel("reward model: accuracy", "rm", "accuracy", "val_accuracy", beside=("ceiling", "longer_wins")),
    Panel("reward model: calibration", "rm", margins="accuracy", over="claimed"),
    Panel("PPO: score", "ppo", "score", "score", beside=("best_of_4_score",)),
    Panel("PPO: gold, the truth", "ppo", "gold", "gold", beside=("best_of_4_gold",)),
    Panel("PPO: judge", "ppo", "", "judge", beside=("best_of_4_judge",)),
    Panel("PPO: KL to SFT, nats a text", "ppo", "kl", "kl"),
    Panel("PPO: gold against √KL", "ppo", "", "gold", over="kl"),
    Panel("PPO: judge against √KL", "ppo", "", "judge", over="kl"),
    Panel("PPO: score against √KL", "ppo", "", "score", over="kl"),
    Panel("PPO: entropy, nats a token", "ppo", "entropy"),
    Panel("PPO: share of texts that end", "ppo", "eos", "eos", limits=(0, 1.05)),
    Panel("PPO: length, tokens", "ppo", "length", "length", limits=(0, None)),
    Panel("PPO: explained variance", "ppo", "explained", limits=(-1, 1.05)),
    Panel("PPO: share of tokens clipped", "ppo", "clipped", limits=(0, None)),
    Panel("PPO: distinct word pairs", "ppo", "", "distinct_2", limits=(0, None)))
BESIDE = {"bigram_loss": "counts of token pairs", "ceiling": "best possible",
          "longer_wins": "the longer one wins",
          **{f"best_of_4_{name}": "SFT, best of 4" for name in ("score", "gold", "judge")}}


class Log(NamedTuple):
    """What one stage has logged. Rows are {step: {name: number}}; of lines with one step the last counts."""
    config: dict
    train: dict
    held_out: dict
    end: dict  # the last report, and what only earlier ones say


def number(x):
    """A float that can be drawn; nan for null and all else."""
    return float(x) if type(x) in (int, float) and abs(x) < 1e30 else math.nan


def parse(lines):
    """Lines of a log (bytes) -> Log. What is none, as the last one after a kill, is passed over."""
    log = Log({}, {}, {}, {})
    for line in lines:
        try:
            row = json_object(line)
        except UserError:
            continue
        report = row.get("report")
        if type(row.get("config")) is dict:
            log.config.update(row["config"])
        elif type(report) is dict:
            log.end.update(report)
            log.held_out[number(report.get("step", report.get("update")))] = report
        else:
            log.train[number(row.get("step"))] = row
    return log


def read_run(folder):
    """{stage: Log} of the stages that have logged more than their settings."""
    run = {}
    for stage, end in itertools.product(STAGES, ENDS):
        path = folder / f"{stage}.{end}"
        if stage not in run and path.exists():
            with suppress(FileNotFoundError):  # a run that has just ended has renamed it to the next
                log = parse(path.read_bytes().splitlines())
                run |= {stage: log} if log.train or log.end else {}
    return run


def curves(panel, run):
    """[(held out or not, x, y)] of one run in one panel, x and y lists of floats, not all of them nan."""
    log, made = run.get(panel.stage, Log({}, {}, {}, {})), []
    parts = log.end.get("by_margin")
    parts = {i: part for i, part in enumerate(parts if type(parts) is list else ()) if type(part) is dict}
    for rows, name in ((log.train, panel.train), (log.held_out, panel.held_out), (parts, panel.margins)):
        steps = sorted(step for step in rows if not math.isnan(step) and name in rows[step])
        x = [number(rows[step].get(panel.over)) if panel.over else step for step in steps]
        if panel.over == "kl":
            x = [max(kl, 0.0) ** 0.5 for kl in x]
        y = [number(rows[step][name]) for step in steps]
        if not all(math.isnan(a + b) for a, b in zip(x, y, strict=True)):
            made.append((rows is not log.train, x, y))
    return made


def draw(runs, labels, only):
    """A Figure of the runs, [{stage: Log}]; those with the same label have the same colour. UserError: no
    panel has a number."""
    panels = [(panel, [curves(panel, run) for run in runs]) for panel in PANELS
              if only.lower() in panel.title.lower()]
    panels = [(panel, made) for panel, made in panels if any(made)]
    if not panels:
        raise UserError(f"no panel with {only!r} in its title has a number; "
                        f"there are {', '.join(panel.title for panel in PANELS)}")
    names = list(dict.fromkeys(labels))
    colors = COLORS if len(names) <= len(COLORS) else colormaps["turbo"].resampled(len(names)).colors
    colors = dict(zip(names, colors, strict=False))
    columns = min(4, len(panels) + 1)
    rows = math.ceil((len(panels) + 1) / columns)
    figure = Figure(figsize=(2.9 * columns, 2.15 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[len(panels):]:
        axis.set_axis_off()
    draw_key(axes[len(panels)], colors)
    for axis, (panel, made) in zip(axes, panels, strict=False):
        for label, lines in zip(labels, made, strict=True):
            for held_out, x, y in lines:
                look = {"alpha": 0.4 if len(lines) > 1 else 0.8, "lw": 1, "marker": "" if len(x) > 1 else "_"}
                look = {"marker": "."} if held_out else look
                axis.plot(x, y, color=colors[label], **look)
        decorate(axis, panel, runs[0][panel.stage].end if len(runs) == 1 else {})
    return figure


def decorate(axis, panel, end):
    """Title, axes, and dotted lines: what the numbers are to be compared with."""
    dotted = {"color": "0.4", "linewidth": 1, "linestyle": ":"}
    for name in panel.beside:
        if not math.isnan(y := number(end.get(name))):
            axis.axhline(y, **dotted)
            axis.annotate(BESIDE[name], (0.98, y), xycoords=("axes fraction", "data"), fontsize=7.5,
                          color="0.3", ha="right", va="bottom")
    if panel.margins:
        axis.axline((0.5, 0.5), slope=1, **dotted)
    axis.set_ylim(*panel.limits)
    if panel.train == "loss" and (held_out := [y for line in axis.lines if line.get_marker() == "."
                                               for y in line.get_ydata() if y == y]):
        axis.set_ylim(top=min(axis.get_ylim()[1], 1.5 * max(held_out)))  # else the first steps hide the rest
    axis.set_title(panel.title, fontsize=9.5)
    axis.set_xlabel({"kl": "√KL", "claimed": "what the margin claims"}.get(
        panel.over, "update" if panel.stage == "ppo" else "step"), fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def draw_key(axis, colors):
    """In an empty cell: what the colours and the two kinds of lines are."""
    lines = {label: Line2D([], [], color=color, linewidth=3) for label, color in colors.items()}
    lines |= {"training batches": Line2D([], [], color="0.6", linewidth=1),
              "held-out data": Line2D([], [], color="0.3", marker=".")}
    key = axis.legend(lines.values(), "?" * len(lines), loc="center", frameon=False,
                      fontsize=9 if len(lines) < 12 else 6, ncols=1 + len(lines) // 20)
    for text, label in zip(key.get_texts(), lines, strict=True):
        text.set(text=printable(label)[-32:], parse_math=False)  # a name may have "$" or begin with "_"


def check_target(path):
    """UserError: the name is none of a picture, or stands for something that was not drawn here."""
    if path.suffix.lower() not in (".png", ".svg"):
        raise UserError(f"--to {path}: must end in .png or .svg")
    if not path.parent.is_dir():
        raise UserError(f"--to {path}: there is no folder {path.parent}")
    if path.is_dir() or path.is_file() and MARK.encode() not in path.read_bytes()[:4096]:
        raise UserError(f"{path} already exists, and was not drawn by tools.plot; choose another name")


def save(figure, path):
    """Write the picture, all of it or nothing; a PNG with 256 colours, which makes it a third as large."""
    with atomic_file(path) as file:
        if path.suffix.lower() == ".svg":
            return figure.savefig(file, format="svg", metadata={"Creator": MARK})
        figure.savefig(raw := io.BytesIO(), dpi=100)
        mark = PngImagePlugin.PngInfo()
        mark.add_text("Software", MARK)
        Image.open(raw).convert("RGB").quantize().save(file, "png", pnginfo=mark, optimize=True)


def draw_now(args):
    """Read, draw, write. UserError: there is nothing to draw."""
    runs = {str(folder): run for folder in args.runs if (run := read_run(folder))}
    for folder in args.runs:
        if str(folder) not in runs and not (args.live and runs):
            raise UserError(f"{folder}: no stage has logged anything there")
    labels, name = list(runs), args.by.strip("-").replace("-", "_")
    if name:
        values = [[log.config[name] for log in run.values() if name in log.config] for run in runs.values()]
        if not any(values):
            raise UserError(f"--by {args.by}: no log has such a setting")
        labels = [f"{name} {some[-1] if some else 'unknown'}" for some in values]
    save(draw(list(runs.values()), labels, args.only), args.to)


def is_over(folder):
    """Whether the log of a finished PPO is the newest."""
    logs = [folder / f"{stage}.{end}" for stage, end in itertools.product(STAGES, ENDS)]
    try:
        return max(filter(os.path.exists, reversed(logs)), key=os.path.getmtime) == logs[-1]
    except (ValueError, OSError):  # there is none; or it is being renamed
        return False


def draw_until_over(args):
    """Draw anew every few seconds; while there is nothing to draw, say why, and wait."""
    over, said = False, ""
    while not over:
        start, over = time.monotonic(), all(map(is_over, args.runs))  # asked first: the last picture is whole
        try:
            draw_now(args)
            sentence = f"{args.to} is drawn anew until PPO has ended; Ctrl-C ends this"
        except UserError as error:
            sentence = f"waiting: {error}"
        if sentence != said:
            print(printable(sentence), flush=True)
        said = sentence
        if not over:
            time.sleep(max(PAUSE, 10 * (time.monotonic() - start)))  # the run needs the processor, too


def main(args):
    check_target(args.to)
    if Figure is None:
        raise UserError("a picture needs matplotlib: pip install matplotlib")
    (draw_until_over if args.live else draw_now)(args)
    print(f"wrote {printable(args.to)}")


def read_args():
    parser = argparse.ArgumentParser(prog="python -m tools.plot", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a folder with logs")
    parser.add_argument("--to", type=Path, default=Path("curves.png"),
                        help="the picture, .png or .svg (default %(default)s)")
    parser.add_argument("--live", action="store_true", help="draw anew until the runs are over")
    parser.add_argument("--by", default="", metavar="FLAG", help="a colour a value of this flag of the runs")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the panels with this in their title")
    return parser.parse_args()


if __name__ == "__main__":
    make_harmless()
    arguments = read_args()
    with one_sentence("tools.plot", ""):
        main(arguments)
