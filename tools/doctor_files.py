"""What the doctor finds in the data, without a network; and the limits of everything that it looks at."""
from collections import Counter
from statistics import fmean
from types import SimpleNamespace
from typing import NamedTuple

from data.files import UserError
from data.records import read_preferences, read_prompts, read_sft
from data.split import read_split
from lib.baselines import words
from lib.output import CONTROL
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
    "fit": 0.8,  # share of demonstrations or rankings
    "behind": 0.1,  # nats between the network and counts of token pairs
    "rate": 5,  # times the learning rate by rule
    "overfit": 2.5,  # held-out loss over training loss of the SFT model; 2.1 with 539 demonstrations
    "prompt": 0.02,  # nats that the prompt of another example costs
    "ends": 0.5,  # share of responses
    "alike": 0.5,  # distinct_2 of responses over that of demonstrations
    "learned": 0.8,  # accuracy on training pairs, of a reward model whose settings are far from the rule:
    "few epochs": 10,  # times fewer than by rule, or a rate beyond "rate"
    "noisier": 0.04,  # accuracy that training pairs lack to held-out pairs, or 1.5 intervals of few pairs
    "by heart": 0.2,  # accuracy that held-out pairs lack to training pairs, as on half of the film ratings,
    "knows nothing": 0.69,  # and their loss is above this: ln 2, that of equal scores
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
    "against": -0.02,  # gold or judge that a unit of score brings in the best of 4 samples
    "worth": 0.5,  # gold or judge that a unit of score brings, over that in the best of 4 samples
    "negative": -0.5,  # nats a response
    "gain": (0.05, 0.2),  # sd of score in 20 updates or more; with a KL below "moved"
    "moved": 0.5,  # nats a response
    "short": 0.25,  # of the length at first
    "varied": 0.25,  # distinct_2 of held-out responses, of that at first; 0.42 to 0.79 in healthy runs
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
