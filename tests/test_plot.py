"""tools.plot: what is read from logs of finished, killed and old runs, what is drawn, when --live ends."""
import json
import math
import os
import subprocess
import sys
import time
from argparse import Namespace

import pytest
import torch
from helpers import ROOT, SIZES, jsonl, make_data

from data.files import UserError
from lib.common import without_nan
from lib.report import accuracy, by_margin
from tools import plot

drawn = pytest.mark.skipif(plot.Figure is None, reason="needs matplotlib")
SFT = [{"config": {"lr": 0.1, "seed": 3}}, {"step": 1, "loss": 4.0, "lr": 0.1},
       {"report": {"step": 2, "val_loss": 3.5}}, {"step": 2, "loss": 3.0, "lr": 0.2},
       {"report": {"val_loss": 3.25, "unigram_loss": 5.0, "bigram_loss": 3.75}}]
RM = [{"config": {"lr": 0.2}}, {"step": 1, "loss": 0.7, "accuracy": 0.5},
      {"report": {"step": 1, "val_accuracy": 0.625, "val_loss": 0.6}},
      {"report": {"accuracy": 0.75, "ceiling": 0.9, "longer_wins": 0.4,
                  "by_margin": [{"margin": 1.0, "accuracy": 0.5, "claimed": 0.6},
                                {"margin": 2.0, "accuracy": 0.8, "claimed": 0.7}]}}]
PPO = [{"config": {"kl_coef": 0.035, "lr": 0.3}},
       {"step": 1, "score": 0.1, "gold": 0.4, "kl": 0.0, "entropy": 2.0, "eos": 1.0, "length": 9.0,
        "explained": -3.0, "clipped": 0.1},
       {"report": {"update": 10, "score": 1.0, "gold": 0.5, "kl": 9.0, "eos": 0.5, "length": 8.0,
                   "judge": 0.2}},
       {"step": 2, "score": 0.2, "gold": 0.5, "kl": 1.0, "entropy": 1.5, "eos": 0.9, "length": 8.0,
        "explained": None, "clipped": 0.2},
       {"report": {"update": 0, "score": -0.1, "gold": 0.3, "kl": -0.01, "eos": 1.0, "length": 9.0,
                   "judge": 0.1, "distinct_2": 0.5}},
       {"report": {"update": 20, "score": 2.0, "gold": 0.7, "kl": 4.0, "eos": 0.75, "length": 7.0,
                   "judge": 0.3, "distinct_2": 0.25, "best_of_4_score": 0.6}}]


def text(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def make_run(folder, **logs):
    """A run folder; sft=rows writes sft.log.jsonl, ppo_state=rows ppo.state.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in logs.items():
        jsonl(folder / f"{name.replace('_state', '.state') if '_' in name else name + '.log'}.jsonl", rows)
    return folder


def options(*runs, **more):
    plain = {"runs": list(runs), "live": False, "by": "", "only": "", "to": runs[0] / "c.png"}
    return Namespace(**plain | more)


def parsed(rows):
    return plot.parse(text(rows).encode().splitlines())


def panel(title):
    return next(panel for panel in plot.PANELS if title in panel.title)


def lines_of(title, **run):
    return plot.curves(panel(title), {stage: parsed(rows) for stage, rows in run.items()})


def panels_of(figure):
    return {axis.get_title(): axis for axis in figure.axes if axis.get_title()}


# ---- reading ----

def test_training_lines_and_looks_become_two_curves():
    assert lines_of("SFT: loss", sft=SFT) == [(False, [1, 2], [4.0, 3.0]), (True, [2], [3.5])]
    assert lines_of("model: accuracy", rm=RM) == [(False, [1], [0.5]), (True, [1], [0.625])]
    assert lines_of("model: loss", rm=RM) == [(False, [1], [0.7]), (True, [1], [0.6])]
    assert lines_of("calibration", rm=RM) == [(True, [0.6, 0.7], [0.5, 0.8])]
    assert lines_of("PPO: score", ppo=PPO) == [(False, [1, 2], [0.1, 0.2]),
                                               (True, [0, 10, 20], [-0.1, 1.0, 2.0])]
    assert lines_of("PPO: judge", ppo=PPO) == [(True, [0, 10, 20], [0.1, 0.2, 0.3])]
    assert lines_of("PPO: KL", ppo=PPO) == [(False, [1, 2], [0.0, 1.0]),
                                            (True, [0, 10, 20], [-0.01, 9.0, 4.0])]
    assert lines_of("entropy", ppo=PPO) == [(False, [1, 2], [2.0, 1.5])]
    assert lines_of("distinct", ppo=PPO) == [(True, [0, 20], [0.5, 0.25])]


def test_gold_against_the_root_of_kl_in_the_order_of_the_updates():
    """A KL below 0, which an estimate can be, is drawn at 0. Update 0, logged last, comes first."""
    for name, values in (("gold", [0.3, 0.5, 0.7]), ("score", [-0.1, 1.0, 2.0]), ("judge", [0.1, 0.2, 0.3])):
        assert lines_of(f"{name} against", ppo=PPO) == [(True, [0.0, 3.0, 2.0], values)]
    assert lines_of("gold against", ppo=[{"report": {"update": 1, "gold": 0.5, "kl": None}}]) == []


def test_null_is_a_gap_and_a_column_without_numbers_is_no_curve():
    [(held_out, x, y)] = lines_of("explained", ppo=PPO)
    assert (held_out, x) == (False, [1, 2]) and y[0] == -3 and math.isnan(y[1])
    nothing = [{"step": 1, "score": None, "kl": "much", "eos": True},
               {"report": {"update": 1, "score": None}}]
    assert all(plot.curves(panel, {"ppo": parsed(nothing)}) == [] for panel in plot.PANELS)
    assert lines_of("PPO: score", sft=SFT) == []


def test_logs_of_earlier_versions_lack_columns():
    old = [{"step": 1, "score": 0.5, "kl": 1.0}, {"report": {"update": 5, "score": 1.0, "kl": 4.0}}]
    assert lines_of("score against", ppo=old) == [(True, [2.0], [1.0])]
    assert lines_of("gold", ppo=old) == lines_of("judge", ppo=old) == lines_of("clipped", ppo=old) == []
    assert lines_of("calibration", rm=[{"report": {"accuracy": 0.8, "calibration_error": 0.1}}]) == []


@pytest.mark.parametrize("line", [b'{"step": 3, "loss": 2.', b"", b"\x00\x00", b"\xff", b"[1]", b"nonsense",
                                  b'{"report": 5}', b'{"config": []}', b'{"step": [], "loss": 1.0}',
                                  b'{"report": {"by_margin": 7}}', b'{"report": {"by_margin": [7]}}',
                                  b'{"step": 1e999, "loss": NaN}'])
def test_lines_that_are_none_of_a_log_are_passed_over(line):
    """A kill, or a full disk, can leave half a line; the curves are those of the others."""
    found = text(SFT).encode().splitlines()
    for damaged in ([*found, line], [line, *found], [*found[:2], line, *found[2:]]):
        log = plot.parse(damaged)
        assert plot.curves(panel("SFT: loss"), {"sft": log}) == lines_of("SFT: loss", sft=SFT)
        assert plot.curves(panel("calibration"), {"rm": log}) == [] and log.config["lr"] == 0.1


@pytest.mark.parametrize("x", [10**400, 1e31, math.inf, "1", None, [1], True])
def test_numbers_that_cannot_be_drawn(x):
    assert math.isnan(plot.number(x))


def test_of_lines_with_one_step_the_last_counts():
    again = [*SFT[:2], {"step": 2, "loss": 9.0}, {"step": 3, "loss": 8.0}, {"step": 2, "loss": 3.0}]
    assert lines_of("SFT: loss", sft=again) == [(False, [1, 2, 3], [4.0, 3.0, 8.0])]


def test_the_unfinished_log_counts_if_it_has_a_number(tmp_path):
    run = make_run(tmp_path, sft=SFT, ppo=PPO, ppo_state=PPO[:2], rm_state=RM[:2])
    found = plot.read_run(run)
    assert list(found) == ["sft", "rm", "ppo"] and list(found["ppo"].train) == [1] and found["ppo"].end == {}
    make_run(tmp_path, ppo_state=PPO[:1], rm_state=RM[:1])
    found = plot.read_run(run)
    assert list(found) == ["sft", "ppo"] and list(found["ppo"].train) == [1, 2]
    assert plot.read_run(tmp_path / "nowhere") == plot.read_run(run / "sft.log.jsonl") == {}


def test_a_log_that_is_renamed_while_it_is_read(tmp_path, monkeypatch):
    run, parse = make_run(tmp_path, sft_state=SFT[:2]), plot.Path.read_bytes

    def read(path):
        if path.name == "sft.state.jsonl":
            jsonl(run / "sft.log.jsonl", SFT)
            path.unlink()
        return parse(path)

    monkeypatch.setattr(plot.Path, "read_bytes", read)
    assert list(plot.read_run(run)["sft"].train) == [1, 2]


# ---- drawing ----

@drawn
def test_a_panel_for_each_thing_that_was_logged_and_no_other():
    all_ = [{"sft": parsed(SFT), "rm": parsed(RM), "ppo": parsed(PPO)}]
    assert list(panels_of(plot.draw(all_, ["a"], ""))) == [panel.title for panel in plot.PANELS]
    assert list(panels_of(plot.draw([{"sft": parsed(SFT)}], ["a"], ""))) == ["SFT: loss, nats a token"]
    assert list(panels_of(plot.draw(all_, ["a"], "against"))) == [
        f"PPO: {name} against √KL" for name in ("gold", "judge", "score")]
    assert list(panels_of(plot.draw(all_, ["a"], "sft: LOSS"))) == ["SFT: loss, nats a token"]
    with pytest.raises(UserError, match="no panel with 'gold'.*PPO: gold"):
        plot.draw([{"sft": parsed(SFT)}], ["a"], "gold")


@drawn
def test_runs_are_laid_over_one_another_a_colour_a_label():
    runs = [{"sft": parsed(SFT), "ppo": parsed(PPO)}, {"ppo": parsed(PPO[:2])}, {"sft": parsed(SFT[:2])}]
    for labels in (["a", "b", "c"], ["a", "b", "a"]):
        figure = plot.draw(runs, labels, "")
        axis, loss = panels_of(figure)["PPO: score"], panels_of(figure)["SFT: loss, nats a token"]
        legend = figure.axes[len(panels_of(figure))].get_legend()
        key = {label.get_text(): line.get_color() for label, line in
               zip(legend.get_texts(), legend.get_lines(), strict=True)}
        names = list(dict.fromkeys(labels))
        assert list(key) == [*names, "training batches", "held-out data"]
        assert len({key[name] for name in names}) == len(names)
        assert [line.get_color() for line in axis.lines] == [key["a"], key["a"], key["b"]]
        assert [line.get_color() for line in loss.lines] == [key["a"], key["a"], key[labels[2]]]
        assert [line.get_marker() for line in axis.lines] == ["", ".", "_"]
        assert list(axis.lines[1].get_xdata()) == [0, 10, 20]
        assert list(axis.lines[1].get_ydata()) == [-0.1, 1.0, 2.0]


@drawn
def test_twenty_runs_have_twenty_colours():
    runs = [{"sft": parsed(SFT)}] * 20
    figure = plot.draw(runs, [f"run {i}" for i in range(20)], "")
    colors = [tuple(line.get_color()) for line in figure.axes[1].get_legend().get_lines()]
    assert len(colors) == 22 and len(set(colors[:20])) == 20


@drawn
def test_dotted_lines_are_for_a_single_run():
    one = {"sft": parsed(SFT), "rm": parsed(RM), "ppo": parsed(PPO)}

    def heights(figure, title):
        return [line.get_ydata()[0] for line in panels_of(figure)[title].lines if line.get_linestyle() == ":"]

    figure = plot.draw([one], ["a"], "")
    assert heights(figure, "SFT: loss, nats a token") == [3.75]
    assert heights(figure, "reward model: accuracy") == [0.9, 0.4] and heights(figure, "PPO: score") == [0.6]
    assert heights(plot.draw([one, one], ["a", "b"], ""), "PPO: score") == []


@drawn
def test_the_first_steps_of_a_loss_do_not_hide_the_rest_and_limits_hold():
    rows = [{"step": 1, "loss": 400.0}, {"step": 2, "loss": 3.0}, {"report": {"step": 2, "val_loss": 4.0}}]
    figure = plot.draw([{"sft": parsed(rows), "ppo": parsed(PPO)}], ["a"], "")
    axes = panels_of(figure)
    assert axes["SFT: loss, nats a token"].get_ylim()[1] == 6
    assert axes["PPO: explained variance"].get_ylim()[0] == -1
    [axis] = panels_of(plot.draw([{"sft": parsed(rows[:2])}], ["a"], "")).values()
    assert axis.get_ylim()[1] > 400
    rows[0]["loss"] = 4.0
    [axis] = panels_of(plot.draw([{"sft": parsed(rows)}], ["a"], "")).values()
    assert 4 < axis.get_ylim()[1] < 4.5


@drawn
def test_a_single_step_can_be_seen():
    [axis] = panels_of(plot.draw([{"sft": parsed(SFT[:2])}], ["a"], "")).values()
    assert axis.lines[0].get_marker() == "_"


# ---- the command ----

@drawn
@pytest.mark.parametrize("ending,magic", [("png", b"\x89PNG\r\n"), ("svg", b"<?xml"), ("SVG", b"<?xml")])
def test_pictures_are_drawn_anew_but_nothing_else_is_replaced(tmp_path, capsys, ending, magic):
    run, to = make_run(tmp_path / "$\\bad$\x1b[1m", sft=SFT), tmp_path / f"c.{ending}"
    for _ in range(2):
        plot.main(options(run, to=to))
        assert to.read_bytes().startswith(magic) and capsys.readouterr().out == f"wrote {to}\n"
    to.write_bytes(magic + b"a photo")
    with pytest.raises(UserError, match="was not drawn by tools.plot"):
        plot.main(options(run, to=to))
    assert to.read_bytes() == magic + b"a photo"


@drawn
def test_a_fault_while_writing_leaves_the_old_picture(tmp_path, monkeypatch):
    args = options(make_run(tmp_path, sft=SFT))
    plot.main(args)
    before = args.to.read_bytes()
    make_run(tmp_path, rm=RM)
    monkeypatch.setattr(plot.Image.Image, "save", lambda self, file, *_, **__: file.write(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        plot.main(args)
    assert args.to.read_bytes() == before and sorted(os.listdir(tmp_path)) == [
        "c.png", "rm.log.jsonl", "sft.log.jsonl"]


@drawn
@pytest.mark.slow
def test_the_size_of_a_whole_picture(tmp_path):
    args = options(make_run(tmp_path, sft=SFT, rm=RM, ppo=PPO))
    plot.main(args)
    assert 20_000 < args.to.stat().st_size < 100_000


def seen(monkeypatch):
    """What `draw` is called with; the picture is empty."""
    calls = []
    monkeypatch.setattr(plot, "draw", lambda *args: calls.append(args))
    monkeypatch.setattr(plot, "save", lambda figure, path: path.touch())
    return calls


@drawn
def test_runs_are_named_as_they_were_given_or_by_a_flag(tmp_path, monkeypatch):
    calls = seen(monkeypatch)
    a = make_run(tmp_path / "a", sft=SFT, ppo=PPO)
    b = make_run(tmp_path / "b", ppo=[{"config": {"kl_coef": 0.0}}, *PPO[1:]])
    c = make_run(tmp_path / "c", rm=RM)
    to = tmp_path / "c.png"
    for by, labels in (("", list(map(str, (a, b, c)))), ("seed", ["seed 3", "seed unknown", "seed unknown"]),
                       ("--kl-coef", ["kl_coef 0.035", "kl_coef 0.0", "kl_coef unknown"]),
                       ("lr", ["lr 0.3", "lr unknown", "lr 0.2"])):
        plot.main(options(a, b, c, by=by, to=to))
        to.unlink()
        assert calls[-1][1] == labels
    plot.main(options(a, a, to=tmp_path / "c.png"))
    assert calls[-1][1] == [str(a)]


@drawn
@pytest.mark.parametrize("more,message", [
    ({"to": "c.jpg"}, "must end in .png or .svg"), ({"to": "no/c.png"}, "there is no folder"),
    ({"to": "folder.png"}, "already exists"), ({"by": "nonsense"}, "no log has such a setting"),
    ({"only": "nonsense"}, "no panel with 'nonsense'"),
    ({"runs": ["run", "empty"]}, "empty: no stage has logged"),
    ({"runs": ["run", "nowhere"]}, "nowhere: no stage has logged")])
def test_mistakes_are_told_before_anything_is_written(tmp_path, more, message):
    make_run(tmp_path / "run", sft=SFT)
    make_run(tmp_path / "empty", sft=SFT[:1])
    (tmp_path / "folder.png").mkdir()
    before = sorted(os.listdir(tmp_path))
    args = {"to": "c.png", "runs": ["run"], **more}
    args |= {"to": tmp_path / args["to"], "runs": [tmp_path / run for run in args["runs"]]}
    with pytest.raises(UserError, match=message):
        plot.main(options(*args.pop("runs"), **args))
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.slow
def test_without_matplotlib_a_sentence_says_what_to_install(tmp_path):
    code = ("import sys, runpy; sys.modules['matplotlib'] = None; sys.argv = ['plot', sys.argv[1]]; "
            "runpy.run_module('tools.plot', run_name='__main__')")
    run = subprocess.run([sys.executable, "-c", code, make_run(tmp_path / "r", sft=SFT)], cwd=tmp_path,
                         capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert run.returncode == 1 and run.stdout == "" and os.listdir(tmp_path) == ["r"]
    assert run.stderr == "tools.plot: a picture needs matplotlib: pip install matplotlib\n"


# ---- --live ----

def test_a_run_is_over_when_ppo_has_ended_last(tmp_path):
    def times(**seconds):
        for name, t in seconds.items():
            os.utime(tmp_path / f"{name}.log.jsonl", (t, t))
        return plot.is_over(tmp_path)

    assert not plot.is_over(tmp_path) and not plot.is_over(tmp_path / "nowhere")
    make_run(tmp_path, sft=SFT)
    assert not times(sft=1)
    make_run(tmp_path, rm=RM, ppo=PPO)
    jsonl(tmp_path / "ppo.samples.jsonl", [])
    assert times(sft=1, rm=2, ppo=3) and times(ppo=2) and not times(sft=4)
    make_run(tmp_path, rm_state=RM)
    assert not times(sft=1)


@drawn
def test_live_waits_draws_what_there_is_and_ends_with_all_of_it(tmp_path, monkeypatch, capsys):
    """Each pause is a step of the run: nothing yet, the settings, SFT at work, ended, PPO, ended."""
    calls, run, pauses = seen(monkeypatch), tmp_path / "run", []
    work = [lambda: make_run(run, sft_state=SFT[:1]), lambda: make_run(run, sft_state=SFT[:2]),
            lambda: (make_run(run, sft=SFT), (run / "sft.state.jsonl").unlink()),
            lambda: make_run(run, ppo_state=PPO[:3]),
            lambda: (make_run(run, ppo=PPO), (run / "ppo.state.jsonl").unlink())]

    def sleep(seconds):
        pauses.append(seconds)
        work.pop(0)()

    monkeypatch.setattr(plot.time, "sleep", sleep)
    plot.main(options(run, live=True, to=tmp_path / "c.png"))
    drawings = [{stage: len(log.train) for stage, log in runs[0].items()} for runs, *_ in calls]
    assert drawings == [{"sft": 1}, {"sft": 2}, {"sft": 2, "ppo": 1}, {"sft": 2, "ppo": 2}]
    assert work == [] and min(pauses) >= plot.PAUSE and (tmp_path / "c.png").exists()
    to = tmp_path / "c.png"
    assert capsys.readouterr().out.splitlines() == [
        f"waiting: {run}: no stage has logged anything there",
        f"{to} is drawn anew until PPO has ended; Ctrl-C ends this", f"wrote {to}"]


@drawn
def test_live_waits_for_every_run_and_draws_those_that_have_begun(tmp_path, monkeypatch):
    calls = seen(monkeypatch)
    a, b = make_run(tmp_path / "a", ppo=PPO), tmp_path / "b"
    work = [lambda: make_run(b, ppo_state=PPO[:2]),
            lambda: (make_run(b, ppo=PPO), (b / "ppo.state.jsonl").unlink())]
    monkeypatch.setattr(plot.time, "sleep", lambda seconds: work.pop(0)())
    plot.main(options(a, b, live=True, to=tmp_path / "c.png"))
    assert [len(runs) for runs, *_ in calls] == [1, 2, 2] and work == []


@drawn
def test_live_takes_a_tenth_of_a_processor_at_most(tmp_path, monkeypatch):
    clock, pauses = [0.0], []

    def sleep(seconds):
        pauses.append(seconds)
        make_run(tmp_path, ppo=PPO)

    monkeypatch.setattr(plot, "draw_now", lambda args: clock.append(clock[-1] + 3))
    monkeypatch.setattr(plot.time, "monotonic", lambda: clock[-1])
    monkeypatch.setattr(plot.time, "sleep", sleep)
    plot.main(options(make_run(tmp_path, sft=SFT), live=True))
    assert pauses == [30]


# ---- what the logs hold for it ----

def test_accuracy_by_margin_by_hand():
    gap = torch.tensor([3.0, -0.5, 0.0, -2.0, 1.0, 4.0])
    claimed = [1 / (1 + math.exp(-x)) for x in (0, 0.5, 1, 2, 3, 4)]
    assert by_margin(gap.abs(), accuracy(gap), 3) == [
        {"margin": 0.5, "accuracy": 0.25, "claimed": pytest.approx((claimed[0] + claimed[1]) / 2)},
        {"margin": 2.0, "accuracy": 0.5, "claimed": pytest.approx((claimed[2] + claimed[3]) / 2)},
        {"margin": 4.0, "accuracy": 1.0, "claimed": pytest.approx((claimed[4] + claimed[5]) / 2)}]


def test_a_log_has_no_nan_in_lists_either():
    x = {"a": [{"b": math.nan, "c": 1.5}, math.inf, "x"]}
    assert without_nan(x) == {"a": [{"b": None, "c": 1.5}, None, "x"]}


@drawn
@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed(tmp_path):
    """Real runs: SFT killed in the middle is drawn; then resumed and ended, the reward model after it."""
    def command(name, *more):
        flags = {name: x for name, x in SIZES.items() if name in ("batch_tokens", "lr", "device")}
        flags |= {"data": tmp_path / "data", "out": tmp_path / "out", "save_every": 5, "epochs": 20}
        flags |= {k: x for k, x in SIZES.items() if name == "train_sft.py"} if name == "train_sft.py" else {}
        return [sys.executable, str(ROOT / name), *more,
                *(x for k, v in flags.items() for x in (f"--{k.replace('_', '-')}", str(v)))]

    make_data(tmp_path / "data", n=256)
    args, state = options(tmp_path / "out", to=tmp_path / "c.png"), tmp_path / "out/sft.state.jsonl"
    process = subprocess.Popen(command("train_sft.py"), cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "out/sft.state.pt").exists() or state.read_text().count('\n{"step"') < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    with open(state, "ab") as file:
        file.write(b'{"step": 100000, "lo')
    plot.main(args)
    killed = plot.read_run(tmp_path / "out")["sft"]
    assert len(killed.train) >= 2 and not plot.is_over(tmp_path / "out")
    with open(state, "rb+") as file:
        file.truncate(file.seek(0, 2) - 20)
    for one in (command("train_sft.py", "--resume"), command("train_rm.py")):
        subprocess.run(one, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    plot.main(args)
    run = plot.read_run(tmp_path / "out")
    assert list(run) == ["sft", "rm"] and len(run["sft"].train) > len(killed.train)
    assert all(run["sft"].train[step] == row for step, row in killed.train.items())
    [(_, claimed, _)] = plot.curves(panel("calibration"), run)
    assert claimed == sorted(claimed)
    assert len(run["rm"].end["by_margin"]) >= 8
