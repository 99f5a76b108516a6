"""What the doctor finds in logs: of a stage that is still training, and of PPO."""
import json
import math
from collections import Counter
from statistics import fmean
from types import SimpleNamespace
from typing import NamedTuple

from data.files import UserError
from data.records import read_responses
from lib.report import gain_from_ends
from tools.doctor_files import LIMITS, Finding

DEFAULTS = {"no_eos_score": -1.0, "update_kl": 0.05, "skip_bad": False, "val_fraction": 0.0, "lr": None,
            "data": "stories", "epochs": None, "init": ""}  # of flags that an older log may lack


class Log(NamedTuple):
    config: SimpleNamespace
    steps: list  # lines of the log with a "step"
    reports: list
    running: bool  # or killed: what it makes is not there yet


def read_log(out, stage):
    """The Log of a stage, of the unfinished run if there is one. None: it took no step."""
    for path in (out / f"{stage}.state.jsonl", out / f"{stage}.log.jsonl"):
        if path.is_file():
            whole = path.read_text(errors="replace").split("\n")[:-1]  # the last line may be half written
            try:
                lines = [line for line in map(json.loads, whole) if type(line) is dict]
                config = SimpleNamespace(**DEFAULTS | lines[0]["config"])
            except (ValueError, TypeError, LookupError):
                raise UserError(f"{path} is no log of ours, or is damaged") from None
            steps = [line for line in lines if "step" in line]
            reports = [line["report"] for line in lines if type(line.get("report")) is dict]
            if steps:
                return Log(config, steps, reports, "state" in path.name)
    return None


def course(lines, name):
    """What a column was at first, and its mean over the last quarter of the run; None: nowhere a number."""
    x = [x for line in lines if type(x := line.get(name)) in (int, float) and math.isfinite(x)]
    return (x[0], fmean(x[-max(1, len(x) // 4) :])) if x else None


def unfinished_finding(log):
    """Of an SFT model or a reward model that is still being trained."""
    was, now = course(log.steps, "loss") or (0.0, 0.0)
    return Finding(f"not finished: {log.steps[-1]['step']} steps, loss {was:.3f} at first, {now:.3f} at last",
                   len(log.steps) > 5 and now > was, "the loss rises", "lower --lr")


def ppo_findings(log, out):
    """Of the log in the folder `out`, and of ppo.samples.jsonl beside it."""
    held = sorted((x for x in log.reports if x.get("update") is not None), key=lambda x: x["update"])
    lost = fmean(line.get("score") is None or line.get("kl") is None for line in log.steps)
    yield Finding(f"{lost:.0%} of the updates have no score or no KL", lost > 0, "numbers are not finite",
                  "lower --lr")
    limit = math.inf if log.config.update_kl is None else 1.5 * log.config.update_kl  # JSON has no infinity
    stops = fmean((line.get("update_kl") or 0.0) > limit for line in log.steps)
    yield Finding(f"{stops:.0%} of the updates were cut short by --update-kl", stops > LIMITS["stopped"],
                  "the learning rate is too high", "lower --lr")
    for name, ill, cause, change in signs(log):
        if seen := course(log.steps, name) or course(held, name):
            text = f"{name} {seen[0]:.3g} at first, {seen[1]:.3g} at last"
            yield Finding(text, ill(*seen), cause, change) if ill else kl_finding(held, text, seen[1])
    if not log.running and (path := out / "ppo.samples.jsonl").exists():  # else it is of an earlier run
        yield from sample_findings([line for line, *_ in read_responses(path)])


def signs(log):
    """For each column: its name, whether what it was at first and at last is an illness, the cause, and what
    to change; of "kl" kl_finding says more."""
    cfg, n = log.config, len(log.steps)
    score, kl, error = (course(log.steps, name) or (0.0, 0.0) for name in ("score", "kl", "value_loss"))
    still = abs(kl[1]) < LIMITS["moved"]
    eos = course(log.steps, "eos") or (1.0, 1.0)
    pays = cfg.no_eos_score > score[0] and (eos[1] < eos[0] - 0.1 or cfg.no_eos_score > score[1])
    return (
        ("eos", lambda a, b: pays or b < LIMITS["ends"] * a,
         f"a missing end pays: it scores {cfg.no_eos_score:g}" if pays else "responses no longer end",
         "lower --no-eos-score"),
        ("value_loss", lambda a, b: b > LIMITS["value loss"],
         *((f"a missing end costs too much: it scores {cfg.no_eos_score:g}", "raise --no-eos-score")
           if -cfg.no_eos_score > LIMITS["costs"] else
           ("scores are far from a standard deviation of 1", "give --reward-scale first"))),
        ("explained", lambda a, b: n >= 15 and b < LIMITS["explained"] and error[1] > LIMITS["error"],
         "the critic does not learn", "raise --critic-lr"),
        ("kl", None, "", ""),
        ("score", lambda a, b: n >= 20 and b - a < LIMITS["gain"][still],
         *(("the policy hardly moves", "raise --lr or lower --kl-coef") if still else
           ("the score does not rise", "lower --lr"))),
        ("entropy", lambda a, b: b < LIMITS["entropy"] * a, "the policy repeats itself",
         "raise --kl-coef or lower --lr"),
        ("length", lambda a, b: b < LIMITS["short"] * a, "responses shrink to almost nothing",
         "raise --kl-coef; look whether the reward prefers short texts"),
        ("distinct_2", lambda a, b: b < LIMITS["varied"] * a, "the policy repeats itself",
         "raise --kl-coef or lower --lr"),
        ("clipped", lambda a, b: False, "", ""))


def sample_findings(lines):
    """Of ppo.samples.jsonl: what the gain is made of, and how alike the responses begin."""
    both = [[line for line in lines if line.get("model") == model] for model in ("SFT", "PPO")]
    if not all(both) or not all(type(line.get(name)) is float for line in lines for name in ("score", "eos")):
        return
    ends = gain_from_ends(*({name: [line[name] for line in some] for name in ("score", "eos")}
                            for some in both))
    yield Finding("the gain in score is " + ("mostly" if ends else "not") + " that more or fewer texts end",
                  bool(ends), "better only by --no-eos-score", "change --no-eos-score or --max-new-tokens")
    begins = [Counter(tuple(line["response"].split()[:3]) for line in some) for some in both]
    was, now = (max(some.values()) / sum(some.values()) for some in begins)
    yield Finding(f"the commonest three words begin {was:.0%} of SFT's responses, {now:.0%} of PPO's",
                  now > LIMITS["same"] and was < LIMITS["same"] / 2, "all responses begin alike",
                  "raise --kl-coef or lower --lr; more different prompts")


def kl_finding(held, text, kl):
    """The KL, and where the truth is known, from which held-out report on it falls, and how much of it a rise
    of the score brings."""
    truth = next((name for name in ("gold", "judge") if held and all(name in x for x in held)), None)
    fallen = [report["update"] for i, report in enumerate(held) if truth and
              report[truth] < max(past[truth] for past in held[: i + 1]) - LIMITS["fallen"]]
    text += f"; {truth} has fallen at update {fallen[0]}" if fallen else ""
    own, best = worth(held, truth) if truth else (0.0, 0.0)
    text += f"; a unit of score brings {own:.2f} {truth}, in the best of 4 samples {best:.2f}" if best else ""
    if kl < LIMITS["negative"]:
        return Finding(text, True, "the KL is negative", "sample as the policy is scored: no top-k, no top-p")
    if best < LIMITS["against"]:
        return Finding(text, True, f"the score is against {truth}", "turn the sign of the score round")
    over = kl > LIMITS["KL"] or kl > 1 and (own < LIMITS["worth"] * best or
                                            bool(fallen) and fallen[-1] == held[-1]["update"])
    return Finding(text, over, "over-optimisation", "raise --kl-coef, or take an earlier policy: ppo.best.pt")


def worth(held, truth):
    """How much of the truth a unit of score has brought since the first held-out report, by PPO and by the
    best of 4 samples; (0, 0) where that is unknown."""
    rises = [(held[-1].get(prefix + name), held[0].get(name))
             for prefix in ("", "best_of_4_") for name in (truth, "score")]
    if any(None in rise for rise in rises):
        return 0.0, 0.0
    more, score, more4, score4 = (last - first for last, first in rises)
    return (more / score, more4 / score4) if min(score, score4) > 0 else (0.0, 0.0)
