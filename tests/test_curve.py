"""Held-out curves, the weights that are kept, runs that end early, and PPO's KL budget and best policy."""
import dataclasses
import math
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import BYTES, PPO, SIZES, jsonl, lines, make_data, same_weights, steps, tiny_gpt

import lib.resume
import ppo
import train_rm
import train_sft
from data import rules
from data.examples import Ranking, encode_rankings
from data.files import UserError
from data.records import read_preferences
from lib import curve, report
from lib.baselines import Linear
from lib.checkpoint import load
from lib.curve import Best, Curve
from lib.report import beside_best_of, compare
from lib.resume import Run
from model import GPT


class Log:
    def __init__(self):
        self.reports = []

    def report(self, **numbers):
        self.reports.append(numbers)


def follow(numbers, keep="best", steps=100):
    """A Curve that measures these, one after another; the model's weights say at which step they were."""
    model, values, log = torch.nn.Linear(1, 1), iter(numbers), Log()
    made = Curve(model, lambda: next(values), steps, keep)
    for step in range(1, steps + 1):
        if made.over:
            break
        with torch.no_grad():
            model.weight.fill_(step)
        made.look(step, log)
    return made, model, log


def losses(*values):
    return [{"val_loss": x} for x in values]


# ---- the curve ----

def test_numbers_are_averaged_since_the_last_line():
    made = Curve(torch.nn.Linear(1, 1), None, 10, "last")
    for x in (1.0, 2.0, 6.0):
        made.add(loss=x, accuracy=x / 2)
    assert made.means() == {"loss": 3.0, "accuracy": 1.5}
    made.add(loss=5.0, accuracy=0.0)
    assert made.means() == {"loss": 5.0, "accuracy": 0.0}


@pytest.mark.parametrize("many", [1, 7, 10, 25, 103, 1000])
def test_a_run_has_ten_looks_and_one_at_the_end(many):
    log = follow(losses(*range(many, 0, -1)), steps=many)[2]
    seen = [line["step"] for line in log.reports]
    assert seen[-1] == many and min(many, 10) <= len(seen) <= 13 and seen == sorted(set(seen))


@pytest.mark.parametrize("numbers, best", [
    (losses(5, 4, 3, 3.5, 2.9, 3, 2.8, 2.7, 3, 3), 80),
    (losses(5, 4, 3, 3, 3, 2.5, 2, 2, 4), 80),  # of equal ones the last
    ([{"val_accuracy": x, "val_loss": 2 - x} for x in (.1, .2, .9, .3, .4, .5)], 30),
    ([{"val_accuracy": a, "val_loss": b} for a, b in (
        (.5, 3), (.9, 2), (.9, 1), (.9, 1.2), (.8, 1.3), (.7, 2))], 30),
])
def test_the_best_weights_are_put_back(numbers, best, capsys):
    made, model, log = follow(numbers)
    assert [{k: v for k, v in line.items() if k != "step"} for line in log.reports] == numbers
    made.restore()
    assert model.weight.item() == best and f"after step {best}, the best" in capsys.readouterr().out
    made, model, _ = follow(numbers + numbers[-1:] * 10, keep="last")  # which never ends early
    made.restore()
    assert model.weight.item() == 100 and list(made.parts) == ["curve"]


@pytest.mark.parametrize("numbers, end", [
    (losses(9, 8, 7, 6, 5, 5.2, 5.6, 1), 70),  # two looks in a row, a fifth of the run
    (losses(9, 8, 7, 6, 5, 5.2, 5.4, 5.3, 5.4, 5.4), 100),  # hardly worse, as while the rate is high
    (losses(9, 8, 8.9, 8.9, 8.9, 8.9, 1), 60),  # not in the first half
    (losses(9, 8, 7, 6, 5, 5.6, 4.9, 5.5, 4.8, 5), 100),
    ([{"val_accuracy": a, "val_loss": b} for a, b in zip([.5] * 10, range(10, 0, -1), strict=True)], 100),
    ([{"val_accuracy": a, "val_loss": b} for a, b in zip([.5, .6, .7, .8, .9, .9, .9],
                                                         [1, 1, 1, 1, 1, 1.2, 1.3], strict=True)], 70),
    ([{"val_accuracy": x, "val_loss": x} for x in (.5, .6, .7, .8, .9, 1, 1.1, 1.2, 1.3, 1.4)], 100),
])
def test_a_run_ends_when_nothing_has_improved_for_a_fifth_of_it(numbers, end):
    assert follow(numbers)[2].reports[-1]["step"] == end


def test_a_short_run_with_a_look_at_each_step_has_the_same_fifth():
    """19 steps: not before the middle, and not after fewer than three looks in vain."""
    ends = [follow(losses(*range(40, 40 - i, -1), 1, *[2] * 30), steps=19)[2].reports[-1]["step"]
            for i in (1, 8, 17)]
    assert ends == [10, 12, 19]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6])
def test_the_shortest_runs_do_not_end_while_they_improve(steps):
    assert follow(losses(*range(9, 0, -1)), steps=steps)[2].reports[-1]["step"] == steps


def test_a_number_that_is_not_finite_ends_the_run():
    with pytest.raises(UserError, match="step 20: non-finite val_loss"):
        follow(losses(1.0, math.nan))


def test_the_state_of_a_curve_is_checked():
    made = follow(losses(3, 2, 1), steps=3)[0]
    made.check_state(made.state_dict())
    good = made.state_dict()
    for bad in (None, {}, good | {"best": 3}, good | {"best": {"val_loss": "x"}}, good | {"idle": "2"},
                good | {"sums": {1: 2.0}}, good | {"best": {"val_loss": math.inf}}, good | {"looked": None}):
        with pytest.raises(ValueError, match="held-out curve"):
            made.check_state(bad)


def test_a_sample_has_so_many_tokens():
    assert curve.sample([[1] * 5] * 10, 12) == 2 and curve.sample([[1] * 50], 12) == 1


# ---- in the scripts ----

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Held-out demonstrations that the training data contradict after a while."""
    data = tmp_path_factory.mktemp("data")
    make_data(data)
    jsonl(data / "sft.jsonl", [{"prompt": "x:", "completion": "ab" * 6} for _ in range(64)])
    jsonl(data / "sft_val.jsonl", [{"prompt": "x:", "completion": word} for word in ("ba" * 6, "a")])
    return data


SFT = SIZES | {"epochs": 20.0, "batch_tokens": 128, "lr": 1e-2, "save_every": 0}


def train(folder, out, **settings):
    train_sft.main(train_sft.Config(**SFT | {"data": str(folder), "out": str(out)} | settings))
    log = lines(out / "sft.log.jsonl")
    looks = {line["report"]["step"]: line["report"]["val_loss"] for line in log
             if "step" in line.get("report", ())}
    return looks, log[-1]["report"]["val_loss"], steps(out / "sft.log.jsonl")[-1]["step"]


def test_sft_keeps_its_best_weights_and_ends_early(folder, tmp_path, capsys):
    looks, result, ran = train(folder, tmp_path / "best")
    planned = len(looks) and max(looks)
    best = min(looks, key=looks.get)
    assert best < ran == planned and result == pytest.approx(looks[best], rel=1e-5)
    assert f"after step {best}, the best" in capsys.readouterr().out
    _, last, _ = train(folder, tmp_path / "last", keep="last")
    assert last > 1.1 * result
    assert not same_weights(load(GPT, tmp_path / "best/sft.pt"), load(GPT, tmp_path / "last/sft.pt"))


def stop_after(monkeypatch, number):
    """As if a signal came during that step."""
    shipped = Run.after

    def after(run, step, last=False):
        run.caught = signal.SIGTERM if step == number else 0
        shipped(run, step, last)
    monkeypatch.setattr(Run, "after", after)


@pytest.mark.parametrize("where", ["middle", "end"])
def test_a_run_that_ends_early_resumes_to_the_same_bits(folder, tmp_path, monkeypatch, where):
    looks, result, ran = train(folder, tmp_path / "a")
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        stop_after(patched, ran if where == "end" else ran - 2)
        train(folder, tmp_path / "b")
    assert not (tmp_path / "b/sft.pt").exists()
    assert train(folder, tmp_path / "b", resume=True) == (looks, result, ran)
    assert (tmp_path / "a/sft.pt").read_bytes() == (tmp_path / "b/sft.pt").read_bytes()
    assert lines(tmp_path / "a/sft.log.jsonl")[1:] == lines(tmp_path / "b/sft.log.jsonl")[1:]
    with pytest.raises(SystemExit) as end:
        train(folder, tmp_path / "b", resume=True)
    assert not end.value.code


def contradicted(folder, tmp_path):
    """A reward model learns that more of the letter a is better; on held-out data it is worse."""
    out = tmp_path / "rm"
    out.mkdir()
    make_data(out)
    rows = lines(out / "preferences_val.jsonl")
    jsonl(out / "preferences_val.jsonl", [row | {"responses": row["responses"][::-1]} for row in rows])
    train_sft.main(train_sft.Config(**SIZES, data=str(out), out=str(out), epochs=0.5))
    return train_rm.Config(data=str(out), out=str(out), epochs=20.0, batch_tokens=256, lr=5e-3, dropout=0.0,
                           pool="mean", save_every=0, device="cpu")


def test_a_reward_model_keeps_its_best_weights(folder, tmp_path):
    train_rm.main(contradicted(folder, tmp_path))
    reports = [line["report"] for line in lines(tmp_path / "rm/rm.log.jsonl") if "report" in line]
    *looks, result = reports
    best = min(looks, key=lambda look: look["val_loss"])  # there are few pairs
    assert best["val_loss"] < looks[-1]["val_loss"] / 1.1
    assert best["val_accuracy"] != looks[-1]["val_accuracy"]
    assert result["accuracy"] == pytest.approx(best["val_accuracy"], abs=1e-6)


@pytest.mark.parametrize("script", [train_sft, train_rm], ids=["sft", "rm"])
def test_a_stop_after_an_early_end_loses_nothing(folder, tmp_path, monkeypatch, script):
    """The state of the last step is there before the report is made, though another end was planned."""
    cfg = contradicted(folder, tmp_path) if script is train_rm else train_sft.Config(
        **SFT, data=str(folder), out=str(tmp_path / "sft"))
    name = "report_ngrams" if script is train_sft else "report_pairs"

    def stop(*args):
        raise KeyboardInterrupt
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(script, name, stop)
        script.main(cfg)
    state = Path(cfg.out) / f"{'sft' if script is train_sft else 'rm'}.state.pt"
    saved = torch.load(state, weights_only=True)
    assert saved["step"] == saved["steps"]  # the run is over
    ran = saved["step"]
    monkeypatch.setattr(script, "clip_and_step", lambda *args: pytest.fail("a step was taken"))
    script.main(dataclasses.replace(cfg, resume=True))
    log = lines(state.with_name(state.name.replace(".state.pt", ".log.jsonl")))
    assert [line["step"] for line in log if "step" in line][-1] == ran
    assert not state.exists()


def test_another_number_of_threads_is_said(folder, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        stop_after(patched, 3)
        train(folder, tmp_path)
    now = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: now + 1)
    train(folder, tmp_path, resume=True)
    assert f"another number of threads than before ({now})" in capsys.readouterr().out


@pytest.mark.parametrize("was, now", [("mkl", "onednn"), ("onednn", "mkl"), ("mkl", "mkl")])
def test_another_product_is_said(folder, tmp_path, monkeypatch, capsys, was, now):
    monkeypatch.setattr(lib.resume, "product", lambda: was)
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        stop_after(patched, 3)
        train(folder, tmp_path)
    monkeypatch.setattr(lib.resume, "product", lambda: now)
    capsys.readouterr()
    train(folder, tmp_path, resume=True)
    assert (f"another product than before ({was}) it rounds" in capsys.readouterr().out) == (was != now)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_data(folder)
    out = {"data": str(folder), "out": str(folder)}
    train_sft.main(train_sft.Config(**SIZES | out, epochs=8))
    train_rm.main(train_rm.Config(**out, epochs=2.0, batch_tokens=512, lr=5e-3, device="cpu", keep="last"))
    return folder


def test_the_curve_of_a_reward_model_is_that_of_its_report(models):
    log = [line["report"] for line in lines(models / "rm.log.jsonl") if "report" in line]
    assert log[-1]["accuracy"] == pytest.approx(log[-2]["val_accuracy"], abs=1e-6)
    groups, val = (encode_rankings(read_preferences(models / name), BYTES, 32, "") for name in (
        "preferences.jsonl", "preferences_val.jsonl"))
    linear = Linear(groups)
    scores = [[linear.score(text) for text in group.texts[1]] for group in val]
    right = [(a > b) + 0.5 * (a == b) for some in scores for i, a in enumerate(some) for b in some[i + 1 :]]
    assert log[-1]["ridge_accuracy"] == pytest.approx(sum(right) / len(right))  # best first


# ---- what is said beside what is trivial ----

@pytest.mark.parametrize("lead, idle, said", [
    (0.5, 0, "the network is ahead of pairs by 0.5 nats"), (0.0, 0, "level with pairs"),
    (-0.25, 0, "behind pairs by 0.25 nats; it was still improving when it ended: raise --epochs"),
    (-0.25, 1, "it knows the training texts better than others, by heart: raise --bpe-dropout or --dropout"),
    (-0.25, 2, "it has learned little from the training texts, too: try another --lr, or more --epochs")])
def test_sentences_beside_a_baseline(lead, idle, said):
    made = follow(losses(3, 2, 1), steps=3)[0]
    made.idle, made.trained = idle, {"loss": 0.9 if idle == 1 else 1.1}
    sentence = compare(lead, "nats", "pairs", made)
    assert said in sentence and ("warning" in sentence) == (lead < 0)


def test_a_look_just_after_another_does_not_end_the_improvement():
    """Of 25 steps the last looks are after 22, 24 and 25, of 24 after 22 and 24."""
    down = [*range(30, 19, -1)]  # until after 22
    for n, last, improving in ((25, (19, 19.1), True), (25, (20.2, 19), True), (25, (20.2, 20.1), False),
                               (24, (19,), True), (24, (20.1,), False)):
        curve = follow(losses(*down, *last), steps=n)[0]
        assert curve.looked == n and curve.improving == improving


def test_behind_by_less_than_the_interval_has_no_cause():
    made = SimpleNamespace(improving=True, by_heart=False)
    assert compare(-3.0, "points", "it", made, 5.0).endswith("is behind it by 3 points, which may be chance")
    assert "warning" in compare(-6.0, "points", "it", made, 5.0)


@pytest.mark.parametrize("after, said", [
    ({"score": 2.0}, "PPO is ahead of the best of 4 samples of the SFT model: score +1.000"),
    ({"score": 2.0, "gold": 0.9}, "gold +0.400"), ({"score": 0.5}, "warning: PPO is not ahead"),
    ({"score": 2.0, "gold": 0.4}, "by score, but not in truth"), ({"score": 1.0}, ": all scores are alike"),
    ({"score": 0.9, "eos": 0.01}, ": hardly any response ends"),
    ({"score": 2.0, "eos": 0.01}, "PPO is ahead of the best")])
def test_sentences_beside_the_best_of_four(after, said):
    assert said in beside_best_of({"score": 1.0, "gold": 0.5}, {"eos": 1.0} | after)


# ---- PPO ----

def run_ppo(models, out, **settings):
    out.mkdir(exist_ok=True)
    for name in ("sft.pt", "rm.pt"):
        shutil.copy(models / name, out)
    ppo.main(ppo.Config(**PPO | {"data": str(models), "out": str(out), "show": 0} | settings))


def settings(**other):
    return SimpleNamespace(**{"kl_target": 0.0, "kl_budget": 10.0, "kl_coef": 0.05, "batch": 64} | other)


def test_the_budget_raises_the_penalty_and_never_lowers_it_below_what_was_given():
    cfg = settings()
    assert ppo.next_kl_coef(0.05, 7.4, cfg) == 0.05
    assert ppo.next_kl_coef(0.05, 7.5 * 1.1, cfg) == pytest.approx(0.055)
    assert ppo.next_kl_coef(0.05, 99.0, cfg) == pytest.approx(0.075)
    assert ppo.next_kl_coef(0.0501, 0.0, cfg) == 0.05
    assert ppo.next_kl_coef(0.09, 7.0, cfg) == pytest.approx(0.0882)
    cfg.kl_budget = 0.0
    assert ppo.next_kl_coef(0.05, 99.0, cfg) == 0.05
    cfg.kl_budget, cfg.kl_coef = 10.0, 0.0
    assert ppo.next_kl_coef(0.0, 99.0, cfg) == 0.0


@pytest.mark.parametrize("updates, batch", [(60, 64), (600, 64), (60, 512)])
def test_a_target_can_change_the_penalty_fifty_fold_within_a_run_of_any_length(updates, batch):
    cfg, coef = settings(kl_target=6.0, batch=batch, kl_horizon=rules.kl_horizon(batch * updates)), 0.05
    for _ in range(updates):
        coef = ppo.next_kl_coef(coef, 99.0, cfg)
    assert 40 < coef / 0.05 < 60


def test_the_log_has_the_penalty_of_its_own_update(models, tmp_path, monkeypatch):
    used, shipped = [], ppo.advantages
    monkeypatch.setattr(ppo, "advantages", lambda batch, kl_coef, lam: used.append(kl_coef)
                        or shipped(batch, kl_coef, lam))
    run_ppo(models, tmp_path, updates=6, kl_budget=1e-4)
    logged = [line["kl_coef"] for line in steps(tmp_path / "ppo.log.jsonl")]
    assert logged == used[1:]  # the first is the self-check's
    assert logged[0] == ppo.Config.kl_coef < logged[-1]


def test_the_best_policy_within_the_budget_is_kept_beside_the_last(models, tmp_path, monkeypatch):
    """Held-out scores after 10, 20, 30 updates; the best of them has too much KL."""
    numbers, seen, shipped = iter([(1, 5), (9, 99), (0, 5)]), [], report.look

    def look(run, update, before, now, *rest):
        score, kl = next(numbers)
        n = len(now["score"])
        seen.append([p.clone() for p in rest[0].model.parameters()])
        now |= {"score": [score] * n, "kl": [min(kl, 40)] * n}
        return shipped(run, update, before, now, *rest)
    monkeypatch.setattr(report, "look", look)
    run_ppo(models, tmp_path, updates=30, epochs=1, minibatches=1, max_new_tokens=3)
    best, last = load(GPT, tmp_path / "ppo.best.pt"), load(GPT, tmp_path / "ppo.pt")
    assert all(torch.equal(a, b) for a, b in zip(best.parameters(), seen[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(last.parameters(), seen[2], strict=True))


def test_no_policy_within_the_budget_leaves_none_behind(models, tmp_path, monkeypatch):
    run_ppo(models, tmp_path)
    assert (tmp_path / "ppo.best.pt").exists()
    shipped = report.look
    monkeypatch.setattr(report, "look", lambda run, update, before, now, *rest: shipped(
        run, update, before, now | {"kl": [40.0] * len(now["kl"])}, *rest))
    run_ppo(models, tmp_path)
    assert not (tmp_path / "ppo.best.pt").exists() and (tmp_path / "ppo.best.prev.pt").exists()


@pytest.mark.parametrize("how", ["kl", "eos"])
def test_a_run_that_diverged_does_not_replace_the_result(models, tmp_path, monkeypatch, how):
    run_ppo(models, tmp_path, seed=2)
    before, best = ((tmp_path / name).read_bytes() for name in ("ppo.pt", "ppo.best.pt"))
    shipped = report.evaluate

    def evaluate(phases, prompts, world, cfg, device, models, **seed):
        result = shipped(phases, prompts, world, cfg, device, models, **seed)
        if models.policy.moved:
            result[how] = [51.0 if how == "kl" else 0.0] * len(result["kl"])
        elif how == "eos":
            result["eos"] = [1.0] * len(result["kl"])
        return result
    monkeypatch.setattr(GPT, "moved", property(lambda gpt: not torch.equal(
        gpt.lm_head.weight, load(GPT, tmp_path / "sft.pt").lm_head.weight)), raising=False)
    monkeypatch.setattr(report, "evaluate", evaluate)
    with pytest.raises(UserError, match=r"after update 3 the policy has diverged: .*ppo\.pt is not replaced"):
        run_ppo(models, tmp_path)
    assert (tmp_path / "ppo.pt").read_bytes() == before and (tmp_path / "ppo.best.pt").read_bytes() == best
    assert (tmp_path / "ppo.state.pt").exists() and not (tmp_path / "ppo.diverged.pt").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_held_out_report_ends_the_run_at_once(models, tmp_path, monkeypatch, number,
                                                                  capsys):
    """After update 10, which is saved then; no update is made after it, and the rest is as ever."""
    settings = {"updates": 12, "epochs": 1, "minibatches": 1, "max_new_tokens": 4, "save_every": 4}
    run_ppo(models, tmp_path / "a", **settings)
    shipped, calls = report.evaluate, []

    def evaluate(*args, **seed):
        calls.append(len(calls))
        if calls[-1] == 1:  # the first is the report before any update
            os.kill(os.getpid(), number)
        return shipped(*args, **seed)
    old = signal.signal(signal.SIGINT, signal.default_int_handler)  # not ignored, as in the background
    try:
        with monkeypatch.context() as patched, pytest.raises(SystemExit) as end:
            patched.setattr(report, "evaluate", evaluate)
            run_ppo(models, tmp_path / "b", **settings)
    finally:
        signal.signal(signal.SIGINT, old)
    assert end.value.code == 128 + number and calls == [0, 1]
    assert "step 10 of 12 is saved; rerun with --resume" in capsys.readouterr().out
    saved = torch.load(tmp_path / "b/ppo.state.pt", weights_only=True)
    assert saved["step"] == 10 and saved["parts"]["best"]["step"] == 0
    run_ppo(models, tmp_path / "b", **settings, resume=True)
    for name in ("ppo.pt", "ppo.best.pt"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_best_is_offered_a_number_at_a_time():
    gpt = tiny_gpt()
    best = Best(gpt)
    assert best.now["step"] == 0 and set(best.parts) == {"best", "best_model"}
    assert best.offer(10, -3.0) and not best.offer(20, -4.0)
    assert best.now == {"step": 10, "number": -3.0, "second": 0.0} and not best.offer(20, -3.0, -1.0)
    with torch.no_grad():
        gpt.lm_head.weight.add_(1)
    assert not same_weights(best.copy, gpt) and best.offer(30, -1.0) and same_weights(best.copy, gpt)


def test_a_diverged_run_leaves_the_best_of_a_good_one_alone(models, tmp_path, monkeypatch):
    """What it had before goes to ppo.diverged.pt: the policy after update 10, not the one that diverged."""
    run_ppo(models, tmp_path, seed=2)
    was = {name: (tmp_path / name).read_bytes() for name in ("ppo.pt", "ppo.best.pt")}
    shipped, seen = report.look, []

    def look(run, update, before, now, best, *rest):
        seen.append([p.clone() for p in best.model.parameters()])
        now |= {"kl": [99.0 if update > 10 else 1.0] * len(now["kl"])}
        return shipped(run, update, before, now, best, *rest)
    monkeypatch.setattr(report, "look", look)
    with pytest.raises(UserError, match=r"after update 12 .*diverged\.pt is the policy after update 10"):
        run_ppo(models, tmp_path, updates=12, epochs=1, minibatches=1, max_new_tokens=3)
    assert {name: (tmp_path / name).read_bytes() for name in was} == was
    kept = load(GPT, tmp_path / "ppo.diverged.pt")
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), seen[0], strict=True))


def test_all_scores_of_the_report_are_in_the_same_units(models, tmp_path):
    """Also when the scale of a function's rewards is still learned while the best of 4 is looked for."""
    (tmp_path / "length_reward.py").write_text(
        "def score(prompts, responses):\n    return [float(len(r)) for r in responses]\n")
    run_ppo(models, tmp_path, updates=1, batch=4, reward=f"{tmp_path}/length_reward.py:score", eval_prompts=4)
    before, after = (line["report"] for line in lines(tmp_path / "ppo.log.jsonl")[-2:])
    rows = lines(tmp_path / "ppo.samples.jsonl")
    for name, result in (("SFT", before), ("PPO", after)):
        scores = [(row["raw"] - before["reward_mean"]) / before["reward_sd"] if row["eos"] else -1.0
                  for row in rows if row["model"] == name]
        assert result["score"] == pytest.approx(sum(scores) / len(scores), abs=1e-5)
    assert after["best_of_4_score"] >= before["score"] - 1e-6


@pytest.mark.parametrize("n, first", [(299, "val_loss"), (300, "val_accuracy")])
def test_with_few_pairs_the_loss_decides_which_weights_are_the_best(n, first, monkeypatch):
    """One pair more or less would decide by accuracy."""
    groups = [Ranking([], [[1], [2]], [0, 1], ("", ("a", "b")), None)] * n
    monkeypatch.setattr(report, "score_groups", lambda *args: torch.tensor([2.0, 0.0]).repeat(n))
    numbers = report.measure_pairs(None, groups, None, None)
    assert next(iter(numbers)) == first
    assert numbers == {"val_accuracy": 1.0, "val_loss": pytest.approx(math.log(1 + math.exp(-2)))}
