"""Reviews: people's ratings of sentences from film reviews, as the JSONL files of this project.

    python -m data.reviews                          # downloads the archive
    python -m data.reviews --from ARCHIVE --to DIR  # ARCHIVE: the .tar.gz or a folder of its files

Source: C.J. Hutto and E.E. Gilbert (2014), "VADER: A Parsimonious Rule-based Model for Sentiment
Analysis of Social Media Text", ICWSM-14, which asks to be cited (MIT licence). 10,605 sentences
from rottentomatoes.com, collected by Pang & Lee, each rated from -4 (extremely negative) to 4 by
15 to 29 people, 18.7 on average. One panel rates 30 sentences; in other sentences column k of the
ratings is another person, so two sentences drawn at random have two different panels.

sft: first words -> rest; prompts: first words; preferences: whole sentences, best first. Each has
a _val twin; no sentence is on both sides. Mistakes of the user are one sentence and exit code 1.
"""

import argparse
import gzip
import hashlib
import io
import json
import random
import re
import sys
import tarfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.convert import finish, write
from data.download import download
from data.records import UserError

SEED = 1
VAL_SHARE = 0.15
VAL_PAIRS = 3000
LISTS_EACH = 6  # training lists a sentence is put into, each time in other company; README has 3 and 12
PAIR_SHARE = 0.3  # of the training lists; the others hold 4 to 9 sentences, as in InstructGPT
WIDE_GAP = 2  # means further apart than this: the easy half of the pairs

TRUTH, RATINGS = "movieReviewSnippets_GroundTruth.txt", "movieReviewSnippets_anonDataRatings.txt"
ARCHIVE = "hutto_ICWSM_2014.tar.gz"
URL = f"https://github.com/cjhutto/vaderSentiment/raw/master/additional_resources/{ARCHIVE}"
TARGET = Path(__file__).resolve().parent / "files" / "reviews"


class Sentence(NamedTuple):
    text: str
    mean: float
    ratings: list


# ---- reading the source ----

def read_source(path):
    """name -> bytes of the two files, from the archive (nothing is unpacked) or from a folder that
    holds them or the archive's folder. UserError: missing, unreadable or not a whole archive."""
    try:
        if path.is_dir():
            found = {p.name: p.read_bytes() for name in (TRUTH, RATINGS)
                     for p in [*path.glob(f"*/{name}"), *path.glob(name)]}
        else:
            whole = gzip.decompress(path.read_bytes())  # to the end: this checks the checksum
            with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
                found = {Path(m.name).name: tar.extractfile(m).read() for m in tar.getmembers()
                         if m.isfile() and Path(m.name).name in (TRUTH, RATINGS)}
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a whole .tar.gz archive") from error
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror or error})") from error
    for name in (TRUTH, RATINGS):
        if name not in found:
            raise UserError(f"{path} holds no {name}")
    return found


def rows(name, raw, columns):
    """(file:line, fields) of each line that is not blank. UserError: other columns, not UTF-8."""
    for number, line in enumerate(raw.split(b"\n"), 1):
        try:
            fields = line.decode("utf-8-sig").rstrip("\r").split("\t")
        except UnicodeDecodeError as error:
            raise UserError(f"{name}:{number}: not UTF-8") from error
        if line.strip() and len(fields) != columns:
            raise UserError(f"{name}:{number}: {len(fields)} tab-separated fields, not {columns}")
        if line.strip():
            yield f"{name}:{number}", fields


def panel(place, text):
    """'[3, -1, 2]' -> [3, -1, 2]"""
    if not re.fullmatch(r"\[-?[0-4](, *-?[0-4])+\]", text.strip()):
        raise UserError(f"{place}: not a list of two or more ratings from -4 to 4: {text[:40]}")
    return json.loads(text)


def clean(text):
    """Single spaces, plain quotes. The source has spaces for hyphens: three or four were a dash."""
    text = re.sub(r"(?<=\S)\s{3,}(?=\S)", " -- ", text.replace("&amp;", "&"))
    return " ".join(text.replace("''", '"').replace("`", "'").split())


def key(text):
    """Two sentences with one key are one: case, spaces and punctuation do not count."""
    return re.sub(r"[\W_]+", "", text.casefold())


def parse(raw):
    """Sentences in an order of ours (the source has the good ones first); the panels of a sentence
    that occurs twice are put together. UserError: a line that is wrong, as file:line."""
    panels, merged = {}, {}
    for place, (number, _, _, ratings) in rows(RATINGS, raw[RATINGS], columns=4):
        if number in panels:
            raise UserError(f"{place}: a second panel for sentence {number}")
        panels[number] = panel(place, ratings)
    for place, (number, mean, text) in rows(TRUTH, raw[TRUTH], columns=3):
        if number not in panels:
            raise UserError(f"{place}: sentence {number} has no ratings, or occurs twice")
        ratings = panels.pop(number)
        if not re.fullmatch(r"-?\d+(\.\d+)?", mean) or (
                abs(float(mean) - np.mean(ratings)) > 0.01):
            raise UserError(f"{place}: {mean!r} is not the mean of the ratings of {number}")
        if not key(text):
            raise UserError(f"{place}: a sentence without a word")
        merged.setdefault(key(text), (clean(text), []))[1].extend(ratings)
    if panels:
        raise UserError(f"{TRUTH}: no sentence for the ratings of {next(iter(panels))}")
    # 4 digits keep different means different: with panels of up to 70 they are 1/4900 apart
    sentences = [Sentence(text, round(sum(r) / len(r), 4), r) for text, r in merged.values()]
    return sorted(sentences, key=lambda s: draw(s.text, "order"))


# ---- choices that depend on a sentence alone, not on its place ----

def draw(text, salt):
    """A number in [0, 1), the same for the same sentence and salt."""
    digest = hashlib.sha256(f"{SEED} {salt} {key(text)}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def is_val(text):
    return draw(text, "split") < VAL_SHARE


def half(text):
    """Which half of the training sentences this one is in: 0 or 1."""
    return int(2 * draw(text, "half"))


# ---- lines ----

def demonstrations(sentences):
    """The first 2 to 5 words and the rest; sentences of one or two words have no rest."""
    for text, words in [(s.text, s.text.split()) for s in sentences]:
        if len(words) > 2:
            n = 2 + int(draw(text, "prompt") * min(4, len(words) - 2))
            yield {"prompt": " ".join(words[:n]), "completion": " " + " ".join(words[n:])}


def rankings(sentences):
    """Pairs and longer lists, best first; equal means share a rank. A list with one mean only
    teaches nothing and is left out, as is what is left at the end if too short."""
    rng = random.Random(SEED)
    for _ in range(LISTS_EACH):
        pool = rng.sample(sentences, len(sentences))
        while pool:
            size = 2 if rng.random() < PAIR_SHARE else rng.randint(4, 9)
            some, pool = sorted(pool[:size], key=lambda s: -s.mean), pool[size:]
            gold = [s.mean for s in some]
            levels = sorted(set(gold), reverse=True)
            if len(levels) > 1 and len(some) != 3:
                tied = len(levels) < len(some)
                yield {"prompt": "", "responses": [s.text for s in some], "gold": gold} | (
                    {"ranks": [levels.index(g) for g in gold]} if tied else {})


def random_pairs(sentences, count=VAL_PAIRS):
    """Up to count different pairs (better, worse) drawn at random; equal means are no pair."""
    rng, pairs = random.Random(SEED), {}
    for _ in range(10 * count if len(sentences) > 1 else 0):
        b, a = sorted(rng.sample(sentences, 2), key=lambda s: s.mean)
        if a.mean > b.mean:
            pairs[a.text, b.text] = (a, b)
        if len(pairs) == count:
            break
    return list(pairs.values())


# ---- how well people agree ----

def rater_accuracy(pairs):
    """How often one rater of each sentence orders a pair as the panels' means do: the average over
    all choices of the two. Equal ratings count half. The raters are part of their panels: against
    the means of the others it is 1.0 point less."""
    return float(np.mean([0.5 + 0.5 * np.sign(np.subtract.outer(a.ratings, b.ratings)).mean()
                          for a, b in pairs]))


def half_panel_accuracy(pairs, cuts=10):
    """How often one half of each panel orders a pair as the other halves do, by their means: the
    average over random cuts. Equal means count half."""
    rng = np.random.default_rng(SEED)
    signs = []
    for a, b in pairs:
        for _ in range(cuts):
            halves = [np.array_split(rng.permutation(s.ratings), 2) for s in (a, b)]
            signs.append(np.prod([np.sign(x.mean() - y.mean()) for x, y in zip(*halves)]))
    return float(np.mean(signs)) / 2 + 0.5


# ---- files ----

def build(source, target, choice, only=None):
    """Archive or folder -> the six files; prints what was written and the human ceilings. `only`, 0 or
    1, keeps half of the sentences to train on: two reward models that have none in common."""
    sides, files = {".jsonl": [], "_val.jsonl": []}, {}
    for s in parse(read_source(source)):
        if is_val(s.text) or only in (None, half(s.text)):
            sides["_val.jsonl" if is_val(s.text) else ".jsonl"].append(s)
    train, val = sides.values()
    pairs = random_pairs(val)
    if not pairs or not random_pairs(train, count=1):
        raise UserError(f"{source} has too few sentences")
    for side, sentences in sides.items():
        files["sft" + side] = shown = list(demonstrations(sentences))
        files["prompts" + side] = [{"prompt": line["prompt"]} for line in shown]
    files["preferences.jsonl"] = rankings(train)
    files["preferences_val.jsonl"] = [{"prompt": "", "chosen": a.text, "rejected": b.text,
                                       "gold": [a.mean, b.mean]} for a, b in pairs]
    write(target, files, choice)
    print(f"{len(train)} sentences to train, {len(val)} held out; those of one or two words "
          f"are in preferences only")
    wide = [(a, b) for a, b in pairs if a.mean - b.mean > WIDE_GAP]
    for name, some in [("held-out pairs", pairs), (f"of these, gap > {WIDE_GAP}", wide)]:
        if some:
            print(f"{name}: n = {len(some)}, one rater against the panel's mean "
                  f"{rater_accuracy(some):.1%}, half-panel against half-panel "
                  f"{half_panel_accuracy(some):.1%}")


def main(argv=None):
    """The command line; returns the exit code: 0, or 1 after one sentence on stderr."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--from", dest="source", type=Path, help="archive or folder; else download")
    parser.add_argument("--to", type=Path, default=TARGET, help="default: %(default)s")
    parser.add_argument("--half", type=int, choices=(0, 1), help="train on one half of the sentences only")
    args = parser.parse_args(argv)

    def make(target, choice):
        build(args.source or download(URL, target.parent / ARCHIVE, read_source), target, choice, args.half)
    choice = "all sentences" if args.half is None else f"half {args.half} of the sentences"
    return finish(make, args.to, choice)


if __name__ == "__main__":
    sys.exit(main())
