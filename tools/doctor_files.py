"""What the doctor finds in files, without a network: the limits, the data, the log of PPO."""
import json
import math
from collections import Counter
from statistics import fmean
from types import SimpleNamespace
from typing import NamedTuple

from data.files import UserError
from data.records import read_preferences, read_prompts, read_responses, read_sft
from data.split import read_split
from lib.baselines import words
from lib.output import CONTROL
from lib.report import gain_from_ends
from lib.start import spread

# Beyond these a number is an illness. They lie between what healthy runs and those of runs/doctor.py show
# (docs/results.md has both), but for the ones that say where they come from.
LIMITS = {
    "demonstrations": 100,  # different ones
    "broken": 0.01,  # share of texts with control or replacement characters
    "leaked": 0.2,  # share of held-out texts that are training texts, too
    "both ways": 0.05,  # share of different pairs that are there in both orders
    "beside": (0.6, 0.55),  # share of responses closer to their own prompt: held out, training; by chance 0.5
    "few pairs": 100,  # with fewer, some findings would be chance
    "longer": 0.95,  # share of pairs whose better response is the longer one
    "behind": 0.1,  # nats between the network and counts of token pairs
    "rate": 5,  # times the learning rate by rule
    "overfit": 2.5,  # held-out loss over training loss of the SFT model; 2.1 with 539 demonstrations
    "prompt": 0.02,  # nats that the prompt of another example costs
    "ends": 0.5,  # share of responses
    "alike": 0.5,  # distinct_2 of responses over that of demonstrations
    "noisier": 0.04,  # accuracy that training pairs lack to held-out pairs, or 1.5 intervals of few pairs
    "by heart": 0.2,  # accuracy that held-out pairs lack to training pairs
    "sure": 0.8,  # accuracy on the quarter of the pairs with the largest margins
    "length": 0.9,  # correlation of score and length
    "reads": 0.1,  # share of the accuracy above 1/2 that is lost with other prompts
    "spoilt": 1.5,  # sd of score; 1.0 with 567 pairs, whose reward model liked empty texts
    "value loss": 5.0,  # of scores with sd 1 it is 1/2 for a critic that knows nothing
    "costs": 5.0,  # a missing end, in sd of score
    "stopped": 0.5,  # share of updates
    "explained": 0.1,  # variance, while the value loss is above "error"
    "error": 0.1,  # 0.02 to 0.04 in healthy runs; below it the returns are all alike
    "KL": 20.0,  # nats a response: --kl-budget and a quarter
    "fallen": 0.1,  # gold or judge (in sd) below its best so far
    "worth": 0.5,  # gold or judge that a unit of score brings, over that in the best of 4 samples
    "negative": -0.5,  # nats a response
    "gain": 0.05,  # sd of score in 20 updates or more
    "short": 0.25,  # of the length at first
    "same": 0.97,  # share of responses that begin with the same three words; half as many before PPO
    "entropy": 0.1,  # of that at first; lib/report.py warns at the same
}


NAMES = {"sft": "sft", "rm": "preferences", "ppo": "prompts"}  # the file of each stage


class Finding(NamedTuple):
    """A line to print; if it is an illness, its cause and what to change."""

    text: str
    ill: bool = False
    cause: str = ""
    change: str = ""


def read_data(folder, skip_bad=False, val_fraction=0.0):
    """{"sft": (training, held out), ...} of the files that are there; {name: Finding} of the unreadable."""
    found, trouble = {}, {}
    for name, read in (("sft", read_sft), ("preferences", read_preferences), ("prompts", read_prompts)):
        path = folder / f"{name}.jsonl"
        share = 0 if path.with_name(f"{name}_val.jsonl").exists() else val_fraction or 0.05
        try:
            if path.exists():
                found[name] = read_split(read, path, SimpleNamespace(skip_bad=skip_bad, val_fraction=share))
        except UserError as error:  # too few examples to hold some out are no illness
            ill = share == 0 or not readable(read, path, skip_bad)
            trouble[name] = Finding(f"not examined: {error}", ill, "a file can't be read", "repair it")
    return found, trouble


def readable(read, path, skip_bad):
    try:
        return bool(read(path, skip_bad))
    except UserError:
        return False


def sample(examples, n):
    """At most n of them, from beginning to end: a file may be sorted."""
    return examples[:: max(1, -(-len(examples) // n))]


def folder_findings(folder):
    """Yields (stage, Finding) of a folder of data alone."""
    data, trouble = read_data(folder)
    if not data and not trouble:
        raise UserError(f"{folder}: neither sft.jsonl nor preferences.jsonl nor prompts.jsonl is there")
    for stage, name in NAMES.items():
        yield from ((stage, finding) for finding in data_findings(data, trouble, name))


def data_findings(data, trouble, name):
    """Of sft.jsonl, preferences.jsonl or prompts.jsonl, whatever is there."""
    if name in trouble:
        yield trouble[name]
    if name in data and name != "prompts":
        train, val = data[name]
        yield from text_findings(name, texts_of(name, train), texts_of(name, val))
        if name == "preferences":
            yield from pair_findings(train)


def texts_of(name, examples):
    """[(prompt, response)]"""
    return ([tuple(example) for example in examples] if name == "sft" else
            [(prompt, text) for prompt, texts, *_ in examples for text in texts])


def word_pairs(text):
    """Its pairs of neighbouring words."""
    return zip(text.split(), text.split()[1:], strict=False)


def closer(texts):
    """Of (prompt, response)s the share that have rarer words in common with their own prompt than with the
    next one's, ties counting half: 1/2 if the two have nothing to do with one another."""
    texts = [(words(prompt), words(response)) for prompt, response in spread(texts)]
    often = Counter(word for prompt, _ in texts for word in prompt)
    gaps = [sum(((word in prompt) - (word in other)) / often[word] for word in response & (prompt | other))
            for (prompt, response), (other, _) in zip(texts, texts[1:] + texts[:1], strict=True)]
    return fmean((gap > 1e-9) + 0.5 * (abs(gap) <= 1e-9) for gap in gaps)


def related(texts):
    """Whether prompts and responses have to do with one another, as far as shared words tell."""
    return closer(texts) > LIMITS["beside"][0]


def text_findings(name, train, val):
    """train, val: [(prompt, response)] of NAME.jsonl and NAME_val.jsonl."""
    different, lengths = set(train), sorted(len(prompt + response) for prompt, response in train)
    yield Finding(f"{name}.jsonl: {len(different)} different texts of {len(train)}, {len(val)} held out; "
                  f"99.5% have at most {lengths[int(0.995 * (len(lengths) - 1))]} characters",
                  name == "sft" and len(different) < LIMITS["demonstrations"],
                  "too few demonstrations", "write more of them")
    broken = fmean(bool(CONTROL.search(text) or "\ufffd" in text) for text in map("".join, different))
    yield Finding(f"{broken:.1%} of the texts have control or replacement characters",
                  broken > LIMITS["broken"], "broken characters", "write the file as UTF-8 again")
    leaked = fmean(text in different for text in val)
    yield Finding(f"{leaked:.1%} of the held-out texts are training texts, too", leaked > LIMITS["leaked"],
                  "held-out texts in the training data", f"take them out of {name}.jsonl")
    share = closer(train)
    yield Finding(f"{share:.0%} of the responses are closer to their own prompt than to another",
                  share < LIMITS["beside"][1] and related(val), "responses beside the wrong prompts",
                  f"pair prompts and responses in {name}.jsonl again: held-out ones belong together")


def pair_findings(train):
    """Of the rankings in preferences.jsonl."""
    pairs = Counter((prompt, a, b) for prompt, texts, ranks, *_ in train
                    for a, i in zip(texts, ranks, strict=True) for b, j in zip(texts, ranks, strict=True)
                    if i < j)
    twice = fmean((prompt, b, a) in pairs for prompt, a, b in pairs)
    yield Finding(f"{sum(pairs.values())} pairs, {len(pairs)} different ones, {twice:.1%} in both orders",
                  twice > LIMITS["both ways"], "contradictory preferences",
                  "drop the pairs that are there in both orders, as data.prepare does")
    longer = fmean((len(a) > len(b)) + 0.5 * (len(a) == len(b)) for _, a, b in pairs)
    yield Finding(f"the better response is the longer one in {longer:.1%} of the pairs",
                  not 1 - LIMITS["longer"] < longer < LIMITS["longer"],
                  f"the preferences only say that {'longer' if longer > 0.5 else 'shorter'} is better",
                  "collect pairs of like length")


# ---- logs ----

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


def course(log, name):
    """What a column was at first, and its mean over the last quarter of the run; None: nowhere a number."""
    x = [x for line in log.steps if type(x := line.get(name)) in (int, float) and math.isfinite(x)]
    return (x[0], fmean(x[-max(1, len(x) // 4) :])) if x else None


def unfinished_finding(log):
    """Of an SFT model or a reward model that is still being trained."""
    was, now = course(log, "loss") or (0.0, 0.0)
    return Finding(f"not finished: {log.steps[-1]['step']} steps, loss {was:.3f} at first, {now:.3f} at last",
                   len(log.steps) > 5 and now > was, "the loss rises", "lower --lr")


def ppo_findings(log, out):
    """Of the log in the folder `out`, and of ppo.samples.jsonl beside it."""
    cfg, n = log.config, len(log.steps)
    score, kl, error = (course(log, name) or (0.0, 0.0) for name in ("score", "kl", "value_loss"))
    lost = fmean(line.get("score") is None or line.get("kl") is None for line in log.steps)
    yield Finding(f"{lost:.0%} of the updates have no score or no KL", lost > 0, "numbers are not finite",
                  "lower --lr")
    limit = math.inf if cfg.update_kl is None else 1.5 * cfg.update_kl  # JSON has no infinity
    stops = fmean((line.get("update_kl") or 0.0) > limit for line in log.steps)
    yield Finding(f"{stops:.0%} of the updates were cut short by --update-kl", stops > LIMITS["stopped"],
                  "the learning rate is too high", "lower --lr")
    eos = course(log, "eos") or (1.0, 1.0)
    pays = cfg.no_eos_score > score[0] and (eos[1] < eos[0] - 0.1 or cfg.no_eos_score > score[1])
    for name, ill, cause, change in (
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
            ("score", lambda a, b: n >= 20 and b - a < LIMITS["gain"],
             *(("the policy hardly moves", "raise --lr or lower --kl-coef") if abs(kl[1]) < 0.5 else
               ("the score does not rise", "lower --lr"))),
            ("entropy", lambda a, b: b < LIMITS["entropy"] * a, "the policy repeats itself",
             "raise --kl-coef or lower --lr"),
            ("length", lambda a, b: b < LIMITS["short"] * a, "responses shrink to almost nothing",
             "raise --kl-coef; look whether the reward prefers short texts"),
            ("clipped", lambda a, b: False, "", "")):
        if seen := course(log, name):
            text = f"{name} {seen[0]:.3g} at first, {seen[1]:.3g} at last"
            yield Finding(text, ill(*seen), cause, change) if ill else kl_finding(log, text, seen[1])
    if not log.running and (path := out / "ppo.samples.jsonl").exists():  # else it is of an earlier run
        yield from sample_findings([line for line, *_ in read_responses(path)])


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


def kl_finding(log, text, kl):
    """The KL, and where the truth is known, from which held-out report on it falls, and how much of it a rise
    of the score brings."""
    held = sorted((x for x in log.reports if x.get("update") is not None), key=lambda x: x["update"])
    truth = next((name for name in ("gold", "judge") if held and all(name in x for x in held)), None)
    fallen = [report["update"] for i, report in enumerate(held) if truth and
              report[truth] < max(past[truth] for past in held[: i + 1]) - LIMITS["fallen"]]
    text += f"; {truth} has fallen at update {fallen[0]}" if fallen else ""
    own, best = worth(held, truth) if truth else (0.0, 0.0)
    text += f"; a unit of score brings {own:.2f} {truth}, in the best of 4 samples {best:.2f}" if best else ""
    if kl < LIMITS["negative"]:
        return Finding(text, True, "the KL is negative", "sample as the policy is scored: no top-k, no top-p")
    over = kl > LIMITS["KL"] or kl > 1 and (own < LIMITS["worth"] * best or
                                            bool(fallen) and fallen[-1] == held[-1]["update"])
    return Finding(text, over, "over-optimisation", "raise --kl-coef, or take an earlier policy: ppo.best.pt")


def worth(held, truth):
    """How much of the truth a unit of score has brought since the first held-out report, by PPO and by the
    best of 4 samples; (0, 0) where that is unknown, or the best of 4 have not more of both."""
    rises = [(held[-1].get(prefix + name), held[0].get(name))
             for prefix in ("", "best_of_4_") for name in (truth, "score")]
    if any(None in rise for rise in rises):
        return 0.0, 0.0
    more, score, more4, score4 = (last - first for last, first in rises)
    return (more / score, more4 / score4) if min(score, more4, score4) > 0 else (0.0, 0.0)
