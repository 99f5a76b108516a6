"""Prepare: tables of prompts, responses, ratings or choices, or plain texts, as this project's JSONL files.

    python -m data.prepare ratings.csv --to my_folder           # .csv .tsv .json .jsonl; others: plain text
    python -m data.prepare *.txt --to my_folder --split "***"   # texts between *** (else between blank lines)

Columns are found by their names, or given: chosen, rejected; a, b, choice; response, rating; text, rating;
prompt, response; text; prompt. The first four may have a prompt beside them. A hash of the prompt, or of the
text where there is none, says what is held out, so nothing is on both sides. Ratings of one text are averaged
and make rankings with the means as "ratings". A text without a prompt is a demonstration in two parts: its
first 2 to 5 words, the prompt, and the rest. Nothing that exists is overwritten.
"""
import argparse
import random
import shlex
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

from data import lists, rules
from data.convert import Dropped, objects, write
from data.files import UserError, printable
from data.records import check_line
from data.rows import NAMES, Found
from data.split import held_out, place
from data.tables import FORMS
from data.tokenizer import train_tokenizer

FEW = 20  # with fewer prompts than this the responses say what is held out
LARGEST = 9  # more rated responses to a prompt are ranked as texts without a prompt are: in lists of K
K, EACH = 4, 6  # each text is in EACH lists of K
PAIRS = 3000  # held out, at most
SEED = 1
PLAIN = "; in a plain text blank lines stand between texts, or give --split (lines: --split $'\\n')"
SOME = 10**6  # characters that a tokenizer is trained on to tell lengths, which takes two seconds
KINDS = {"sft": "demonstrations", "preferences": "rankings", "prompts": "prompts"}


class Rated(NamedTuple):
    text: str
    mean: float


# ---- held out and trained on ----

class Side:
    """The examples of one side: rated [(prompt, Rated)], pairs, demonstrations and prompts as in Found."""

    def __init__(self, found, mine):
        """mine(prompt, *texts) -> whether an example belongs here."""
        means = {key: round(fmean(ratings), 6) for key, ratings in found.rated.items()}
        self.rated = [(key[0], Rated(key[1], mean)) for key, mean in means.items() if mine(*key)]
        self.pairs = [key for key in found.pairs if mine(*key)]
        self.demonstrations = [key for key in found.demonstrations if mine(*key)]
        self.prompts = [key for key in found.prompts if mine(*key)]

    def size(self):
        return sum(map(len, vars(self).values()))

    def texts(self):
        """{(prompt, text)} of all that is here."""
        return {*self.demonstrations, *((prompt, item.text) for prompt, item in self.rated),
                *((prompt, text) for prompt, *texts in self.pairs for text in texts)}


def split(found, share):
    """Found -> (training Side, held-out Side)."""
    prompts = {key[0] for some in vars(found).values() if isinstance(some, dict) for key in some} - {""}
    whole = len(prompts) >= FEW  # prompts are held out whole
    if prompts and not whole:
        print(f"fewer than {FEW} different prompts ({len(prompts)}): they are on both sides, responses are"
              " held out")

    def is_val(prompt, *texts):
        return held_out(prompt if prompt and whole else min(texts) or prompt, share)

    val = Side(found, is_val)
    there = val.texts()

    def is_train(prompt, *texts):  # a response of a held-out pair may also be one of a pair that is not
        return not is_val(prompt, *texts) and not any((prompt, text) in there for text in texts)
    train = Side(found, is_train)
    if lost := Side(found, lambda *key: True).size() - train.size() - val.size():
        print(f"{lost} rows share a text with one that is held out, and are left out")
    return train, val


def to_files(side, train, better, dropped):
    """Side -> {"sft", "preferences", "prompts": lines}. better: rated at least so are demonstrations, or,
    where a prompt has few responses, the best; None: all."""
    groups, preferences = defaultdict(list), []
    for prompt, item in side.rated:
        groups[prompt].append(item)
    for prompt, items in groups.items():
        if prompt and len(items) <= LARGEST:
            preferences += filter(None, [lists.ranking(items, prompt)])
        elif train:
            preferences += lists.rankings(items, EACH, lambda rng: K, random.Random(SEED), prompt)
        else:
            preferences += [{"prompt": prompt, "chosen": a.text, "rejected": b.text,
                             "ratings": [a.mean, b.mean]}
                            for a, b in lists.random_pairs(items, PAIRS, SEED)]
    preferences += objects("preferences", side.pairs)
    best = {prompt: max(item.mean for item in items) for prompt, items in groups.items()
            if prompt and 1 < len(items) <= LARGEST}
    shown = [*side.demonstrations, *(pair[:2] for pair in side.pairs),
             *((prompt, item.text) for prompt, item in side.rated
               if better is None or item.mean >= best.get(prompt, better))]
    shown = [in_two(*pair) for pair in dict.fromkeys(shown)]
    asked = [in_two(*pair)[0] for pair in dict.fromkeys([*side.texts(), *side.prompts])]
    lines = {"sft": objects("sft", [pair for pair in shown if pair[1]]), "preferences": preferences,
             "prompts": [{"prompt": prompt} for prompt in dict.fromkeys(asked) if prompt]}
    return {kind: sorted((line for line in some if is_read(line, kind, dropped)),
                         key=lambda line: place(str(line))) for kind, some in lines.items()}


def is_read(line, kind, dropped):
    """Whether the scripts will read this line; else it is counted in `dropped`."""
    try:
        check_line(line, kind)
    except UserError as error:
        dropped.add(f"{KINDS[kind]}: {error}", next(text for text in line.values() if text)[:40])
        return False
    return True


def in_two(prompt, text):
    """A text without a prompt in two parts; ("", "") if it has fewer than three words."""
    return (prompt, text) if prompt else lists.first_words(text, place("first words: " + text)) or ("", "")


# ---- what to do with it ----

def why_none(kind, found):
    """Why a file is not made."""
    if kind != "preferences" or not found.rated:
        return f"there are no {KINDS[kind]} in this"
    same = len({fmean(ratings) for ratings in found.rated.values()}) == 1
    return "all ratings are equal" if same else "no prompt has two responses with different ratings"


def within(most, rows):
    """Those of the rows, from the first on, that have `most` characters together; if none fits, the first."""
    some = []
    for row in rows:
        if (n := sum(map(len, row))) <= most:
            some.append(row)
            most -= n
    return some or rows[:1]


def advise(folder, files):
    """Print lengths, the sizes that train_sft.py will choose, and the next commands."""
    texts = [(line["prompt"], line["completion"]) for line in files["sft.jsonl"]]
    rows = texts + [(line["prompt"], text) for line in files["preferences.jsonl"]
                    for text in line.get("responses") or [line["chosen"], line["rejected"]]]
    if any(map("".join, rows)):
        tokenizer = train_tokenizer((part for row in within(SOME, texts or rows) for part in row),
                                    rules.VOCABULARY)
        lengths = sorted(sum(len(tokenizer.encode(part)) for part in row) + 1
                         for row in rows[:: max(1, len(rows) // 5000)])
        print(f"lengths in tokens: half up to {lengths[len(lengths) // 2]}, 99% up to "
              f"{lengths[len(lengths) * 99 // 100]}, longest {lengths[-1]}; this asks for about --vocab-size "
              f"{tokenizer.vocab_size} --block-size {rules.block_size(lengths)}, which train_sft.py finds "
              "itself")
    print("\nnext:")
    where = shlex.join(["--data", str(folder), "--out", f"out/{folder.resolve().name}"])
    if texts:
        print(f"  python train_sft.py {where}")
    if files["preferences.jsonl"]:
        print(f"  python train_rm.py {where}")
    if files["prompts.jsonl"]:
        print(f"  python ppo.py {where}" + " --reward FILE.py:FUNCTION" * (not files["preferences.jsonl"])
              + " --sft SFT.pt" * (not texts))


def build(args):
    """Files -> folder. UserError: the folder exists, a file is bad, or there is too little in them."""
    folder = args.to
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists; nothing is overwritten: name another folder with --to")
    found = Found()
    for path in args.files:
        found.read(path, args)
    found.settle()
    sides = split(found, args.val)
    files, better, dropped = {}, None, Dropped()
    if sides[0].rated and args.demonstrations == "better":
        means = sorted(item.mean for _, item in sides[0].rated)
        better, word = median(means), "the median"
        if better == means[0] < means[-1]:  # of many bad ones none is a demonstration
            better, word = next(x for x in means if x > better), "above the lowest"
        print(f"demonstrations: what is rated {better:g}, {word}, or better"
              + f"; where a prompt has 2 to {LARGEST} responses, the best" * any(p for p, _ in sides[0].rated)
              + " (--demonstrations all: everything)")
    for side, name in zip(sides, (".jsonl", "_val.jsonl"), strict=True):
        made = to_files(side, side is sides[0], better, dropped)
        files |= {kind + name: lines for kind, lines in made.items()}
    dropped.report()
    for kind in KINDS:
        train, val = len(files[f"{kind}.jsonl"]), len(files[f"{kind}_val.jsonl"])
        if bool(train) != bool(val):
            raise UserError(f"--val {args.val:g} leaves {train} lines for {kind}.jsonl and {val} for "
                            f"{kind}_val.jsonl, and both need some: try {'more' if train else 'less'}"
                            + PLAIN * any(path.suffix.casefold() not in FORMS for path in args.files))
        if not train:
            print(f"not made: {kind}.jsonl, as {why_none(kind, found)}")
    if not any(files.values()):
        raise UserError("nothing is left of " + ", ".join(map(str, args.files)))
    n, held = (len(side.texts()) + len(side.prompts) for side in sides)
    print(f"{n} texts to train on, {held} held out ({args.val:.0%} by --val)"
          + "; so few say little: try --val 0.2" * (held < 50 and args.val < 0.2))
    write(folder, {name: lines for name, lines in files.items() if lines}, ", ".join(map(str, args.files)))
    advise(folder, files)


def main(argv=None):
    """The command line. Returns the exit code: 0, or 1 after one sentence on stderr."""
    parser = argparse.ArgumentParser(prog="python -m data.prepare", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="to make")
    parser.add_argument("--val", type=float, default=0.05, help="share to hold out (default %(default)s)")
    parser.add_argument("--split", metavar="STRING", help="what stands between texts, if not blank lines")
    parser.add_argument("--encoding", help="of the files, if not UTF-8: cp1252, latin-1, utf-16, ...")
    parser.add_argument("--demonstrations", choices=("better", "all"), default="better",
                        help="which rated texts are also demonstrations (default: the better half)")
    for role in NAMES:
        parser.add_argument(f"--{role}-column", metavar="NAME", nargs="+" if role == "prompt" else 1,
                            help="several are joined by an empty line" if role == "prompt" else None)
    args = parser.parse_args(argv)
    args.columns = {role: some for role in NAMES if (some := getattr(args, f"{role}_column"))}
    try:
        if not 0 < args.val <= 0.5:
            raise UserError(f"--val {args.val} must be above 0 and at most 0.5")
        build(args)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: can't write {printable(args.to)} ({error.strerror or error})", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 1


if __name__ == "__main__":
    sys.exit(main())
