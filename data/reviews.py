"""Reviews: human ratings of sentences from film reviews, as the JSONL files of this project.

    python -m data.reviews                          # downloads the archive
    python -m data.reviews --from ARCHIVE --to DIR  # ARCHIVE: the .tar.gz or a folder of its files

Source: C.J. Hutto and E.E. Gilbert (2014), "VADER: A Parsimonious Rule-based Model for Sentiment
Analysis of Social Media Text", ICWSM-14, which asks to be cited (MIT licence). 10,605 sentences
from rottentomatoes.com, collected by Pang & Lee, each rated from -4 (extremely negative) to 4 by
15 to 29 people, 18.7 on average. A panel rates 30 sentences; column k of the ratings is another person
in another panel, so two sentences drawn at random have different panels.

sft: first words -> rest; prompts: first words; preferences: whole sentences, best first. Each has
a _val file, whose sentences are held out. User errors are one sentence and exit code 1.
"""
import gzip
import hashlib
import io
import random
import re
import sys
import tarfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import lists
from data.convert import finish, flags, write
from data.download import download
from data.files import UserError

SEED = 1
VAL_SHARE = 0.15
VAL_PAIRS = 3000
LISTS_EACH = 6  # training lists per sentence, each with different others; the README also tries 3 and 12
PAIR_SHARE = 0.3  # of the training lists are pairs; the others have 4 to 9 sentences, as in InstructGPT
WIDE_GAP = 2  # means further apart than this make the easy half of the pairs

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
    """{name: bytes} of the two files, from the archive (never unpacked to disk) or from a folder that
    contains them or the archive's folder. UserError: missing, unreadable, or a corrupt archive."""
    try:
        if path.is_dir():
            found = {p.name: p.read_bytes() for name in (TRUTH, RATINGS)
                     for p in [*path.glob(f"*/{name}"), *path.glob(name)]}
        else:
            whole = gzip.decompress(path.read_bytes())  # all of it, which verifies the checksum
            with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
                found = {Path(m.name).name: tar.extractfile(m).read() for m in tar.getmembers()
                         if m.isfile() and Path(m.name).name in (TRUTH, RATINGS)}
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a .tar.gz archive, or is corrupt") from error
    except OSError as error:
        raise UserError(f"can't read {path} ({error.strerror or error})") from error
    for name in (TRUTH, RATINGS):
        if name not in found:
            raise UserError(f"{path} contains no {name}")
    return found


def rows(name, raw, columns):
    """(file:line, fields) of each non-blank line. UserError: wrong number of columns, not UTF-8."""
    for number, line in enumerate(raw.split(b"\n"), 1):
        try:
            fields = line.decode("utf-8-sig").rstrip("\r").split("\t")
        except UnicodeDecodeError as error:
            raise UserError(f"{name}:{number}: not UTF-8") from error
        if line.strip() and len(fields) != columns:
            raise UserError(f"{name}:{number}: {len(fields)} tab-separated fields; expected {columns}")
        if line.strip():
            yield f"{name}:{number}", fields


def panel(place, text):
    """'[3, -1, 2]' -> [3, -1, 2]. UserError: not a list of ratings."""
    if not re.fullmatch(r"\[-?[0-4](, *-?[0-4])+\]", text.strip()):
        raise UserError(f"{place}: not a list of two or more ratings from -4 to 4: {text[:40]}")
    return [int(rating) for rating in re.findall(r"-?\d", text)]


def clean(text):
    """Single spaces, plain quotes. The source replaced hyphens by spaces: three or four were a dash."""
    text = re.sub(r"(?<=\S)\s{3,}(?=\S)", " -- ", text.replace("&amp;", "&"))
    return " ".join(text.replace("''", '"').replace("`", "'").split())


def key(text):
    """A sentence's key, equal for duplicates: case, spacing and punctuation are ignored."""
    return re.sub(r"[\W_]+", "", text.casefold())


def parse(raw):
    """{name: bytes} -> [Sentence], shuffled (the source has the good ones first); duplicate sentences
    are merged, and so are their panels. UserError: a bad line, as file:line."""
    panels, merged = {}, {}
    for place, (number, _, _, ratings) in rows(RATINGS, raw[RATINGS], columns=4):
        if number in panels:
            raise UserError(f"{place}: a second panel for sentence {number}")
        panels[number] = panel(place, ratings)
    for place, (number, mean, text) in rows(TRUTH, raw[TRUTH], columns=3):
        if number not in panels:
            raise UserError(f"{place}: sentence {number} has no ratings, or is a duplicate")
        ratings = panels.pop(number)
        if not re.fullmatch(r"-?\d+(\.\d+)?", mean) or (
                abs(float(mean) - np.mean(ratings)) > 0.01):
            raise UserError(f"{place}: {mean!r} is not the mean of the ratings of {number}")
        if not key(text):
            raise UserError(f"{place}: the sentence has no words")
        merged.setdefault(key(text), (clean(text), []))[1].extend(ratings)
    if panels:
        raise UserError(f"{TRUTH}: no sentence for the ratings of {next(iter(panels))}")
    # 4 digits keep different means apart: with panels of up to 70 they differ by at least 1/4900
    sentences = [Sentence(text, round(sum(r) / len(r), 4), r) for text, r in merged.values()]
    return sorted(sentences, key=lambda s: draw(s.text, "order"))


# ---- random choices that depend on the sentence alone, not on its position ----

def draw(text, salt):
    """A random number in [0, 1), determined by the sentence and the salt."""
    digest = hashlib.sha256(f"{SEED} {salt} {key(text)}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def is_val(text):
    return draw(text, "split") < VAL_SHARE


def half(text):
    """Which half of the training sentences this one belongs to: 0 or 1."""
    return int(2 * draw(text, "half"))


# ---- lines ----

def demonstrations(sentences):
    """The first 2 to 5 words -> the rest; sentences of one or two words are dropped."""
    for s in sentences:
        if parts := lists.first_words(s.text, draw(s.text, "prompt")):
            yield dict(zip(("prompt", "completion"), parts, strict=True))


def rankings(sentences):
    """Pairs and longer lists, best first; see data/lists.py."""
    def size(rng):
        return 2 if rng.random() < PAIR_SHARE else rng.randint(4, 9)
    return lists.rankings(sentences, LISTS_EACH, size, random.Random(SEED))


def random_pairs(sentences, count=VAL_PAIRS):
    """Up to count distinct random pairs (better, worse) of sentences whose means differ."""
    return lists.random_pairs(sentences, count, SEED)


# ---- how well people agree ----

def rater_accuracy(pairs):
    """How often a rater of each sentence orders a pair as the panel means do, averaged over all choices
    of the two raters. Equal ratings count half. The raters belong to their panels: against the means
    of the other raters it is 1.0 point less."""
    return float(np.mean([0.5 + 0.5 * np.sign(np.subtract.outer(a.ratings, b.ratings)).mean()
                          for a, b in pairs]))


def half_panel_accuracy(pairs, splits=10):
    """How often the means of one half of each panel order a pair as those of the other halves do, averaged
    over random splits into halves. Equal means count half."""
    rng = np.random.default_rng(SEED)
    signs = []
    for a, b in pairs:
        for _ in range(splits):
            halves = [np.array_split(rng.permutation(s.ratings), 2) for s in (a, b)]
            signs.append(np.prod([np.sign(x.mean() - y.mean()) for x, y in zip(*halves, strict=True)]))
    return float(np.mean(signs)) / 2 + 0.5


# ---- files ----

def build(source, target, choice, only=None):
    """Archive or folder -> the six files; prints what was written and how well people agree. `only`, 0 or
    1, keeps that half of the training sentences, for two reward models with no sentence in common.
    UserError: a bad archive, or too few sentences."""
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
                                       "ratings": [a.mean, b.mean]} for a, b in pairs]
    write(target, files, choice)
    print(f"{len(train)} sentences to train on, {len(val)} held out; those of one or two words "
          f"are in preferences only")
    wide = [(a, b) for a, b in pairs if a.mean - b.mean > WIDE_GAP]
    for name, some in [("held-out pairs", pairs), (f"of these, gap > {WIDE_GAP}", wide)]:
        if some:
            print(f"{name}: n = {len(some)}, one rater against the panel's mean "
                  f"{rater_accuracy(some):.1%}, half-panel against half-panel "
                  f"{half_panel_accuracy(some):.1%}")


def main(argv=None):
    """The command line. Returns the exit code: 0, or 1 after one sentence on stderr."""
    parser = flags(__doc__, TARGET, help="archive or folder (default: download)")
    parser.add_argument("--half", type=int, choices=(0, 1), help="train on only this half of the sentences")
    args = parser.parse_args(argv)

    def make(target, choice):
        build(args.source or download(URL, target.parent / ARCHIVE, read_source), target, choice, args.half)
    choice = "all sentences" if args.half is None else f"half {args.half} of the sentences"
    return finish(make, args.to, choice)


if __name__ == "__main__":
    sys.exit(main())
