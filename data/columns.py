"""Columns: what a line says beside what is read of it, so that nothing is lost silently.

A column that seems to stand for one that is not there ("rank" for "ranks", "question" for "prompt"), or that
says the opposite of what is read, is an error; what is merely unused is counted and named once per file.
"""
import math
import re
from difflib import SequenceMatcher
from functools import lru_cache
from itertools import pairwise

from data.files import UserError, printable

READ = {  # the columns of each file
    "sft": ("prompt", "completion", "text", "messages"),
    "preferences": ("prompt", "chosen", "rejected", "responses", "ranks", "ratings", "gold", "subset"),
    "prompts": ("prompt",)}
OTHER_NAMES = {column: set(names.split()) for column, names in {
    "prompt": "question query instruction input human text messages",
    "completion": "response output answer target reply assistant chosen",
    "messages": "conversation conversations dialogue dialog chat turns",
    "chosen": "chose accepted positive better",
    "rejected": "reject negative worse",
    "responses": "response answers completions candidates outputs generations",
    "ranks": "ranking rankings order ordering"}.items()}
PARTS = {"input", "instruction"}  # of a question: beside a "prompt", they must be within it
CHOICES = {"preference", "preferences", "preferred", "winner", "choice", "best", "label", "labels"}
SWAPPED = {"swapped", "swap", "flipped", "reversed", "inverted"}
SCORES = re.compile(r"[\w-]*(scores?|ratings?|rewards?|utility|utilities|(?<!down)votes?)")
INDEX = re.compile(r"(best|prefer\w*|winn\w+|choice|chosen)([_-]?response)?[_-]?(idx|index)")


# ---- unused columns ----

def ignored(row, kind):
    """The names of a line's unused columns, and of the unused parts of its messages, each once."""
    names = dict.fromkeys(name for name in row if name not in READ[kind])
    for column in READ[kind]:
        turns = row.get(column)
        for turn in turns if isinstance(turns, list) else ():
            if isinstance(turn, dict):
                names |= dict.fromkeys(f"{column}[].{name}" for name, value in turn.items()
                                       if name not in ("role", "content") and value is not None)
    return names.keys()


def report(path, counts):
    """Print the ignored columns of a file, {name: lines}, in one line."""
    names = [f"{printable(name)[:40]} ({n} line{'s' * (n > 1)})"
             for name, n in sorted(counts.items(), key=lambda item: -item[1])[:20]]
    if len(counts) > 20:
        names.append(f"and {len(counts) - 20} more")
    if names:
        print(f"{printable(path)}: ignored columns: {', '.join(names)}")


# ---- columns under another name ----

def _plain(name):
    return name.casefold().strip(" _-:\t\n\ufeff")


@lru_cache(10_000)
def meant(name, kind):
    """What an unused column may stand for: (column, whether it is spelled alike), or (None, False)."""
    plain = _plain(name)
    if name in READ[kind] or len(plain) > 40 or re.search(r"\d", plain):
        return None, False
    for column in READ[kind]:
        alike = (len(column) > 5 and abs(len(plain) - len(column)) < 3
                 and len({*plain} ^ {*column}) < 4  # much faster than what follows
                 and SequenceMatcher(None, plain, column).ratio() > 0.86)
        if alike or plain.rstrip("s") == column.rstrip("s"):
            return column, True
    return next((column for column in READ[kind] if plain in OTHER_NAMES.get(column, ())), None), False


def missing(row, column, kind):
    """The error for a missing column; it names the one that was probably meant."""
    found = [(other, name) for name in row if (other := meant(name, kind)[0]) and other not in row]
    found.sort(key=lambda pair: pair[0] != column)
    hint = "; rename {1} to {0}?".format(*map(_quoted, found[0])) if found else ""
    return UserError(f'column "{column}" is missing or null{hint}')


def check_names(row, kind, prompt, responses):
    """UserError: an unused column probably stands for one that is not there, or for more of the prompt.

    A "question" that occurs in what is read, as in Alpaca's "text", is not lost.
    """
    texts = [prompt + response for response in responses]
    for name, value in row.items():
        plain = _plain(name) if name not in READ[kind] else None
        if plain in READ[kind] and plain in row and value != row[plain]:
            raise UserError(f'columns {_quoted(name)} and "{plain}" differ; delete one of them')
        if plain in PARTS and "prompt" in row and isinstance(value, str) and value.strip() and not _occurs(
                value.strip(), prompt):
            raise UserError(f'column {_quoted(name)} is not read, and not in the "prompt"; put it there, or '
                            "delete it")
        column, alike = meant(name, kind)
        if column == "ranks":
            lost = (alike or isinstance(value, list)) and row.get("ranks") != value
        elif column is None or column in row or column == "ratings" and not isinstance(value, list):
            lost = False
        elif isinstance(value, str):
            lost = alike or value.strip() and not any(_occurs(value.strip(), text) for text in texts)
        else:
            lost = alike and (isinstance(value, list) or column == "gold")
        if lost:
            raise UserError(f'column {_quoted(name)} is not read; rename it to "{column}" or delete it')


def _occurs(part, text):
    """Whether the part occurs in the text; if it is short, not within a word."""
    if len(part) > 20:
        return part in text
    start, end = (r"\b" * bool(re.match(r"\w", character)) for character in (part[0], part[-1]))
    return re.search(start + re.escape(part) + end, text) is not None


def _quoted(name):
    return f'"{printable(name)[:40]}"'


# ---- columns that say the opposite ----

def check_order(row, n):
    """UserError: an unused column orders the n responses in another way than "ranks" or their places do.

    With "ranks" the order is explicit, and a choice whose meaning is unclear needs no error.
    """
    listed, ranks = "responses" in row, row.get("ranks", range(n))
    for name, value in row.items() if n else ():
        if name in READ["preferences"] and name != "ratings":
            continue  # it is read, and none of the names below
        plain = _plain(name)
        index = _number(value) if INDEX.fullmatch(plain) else None
        if listed and "ranks" not in row and plain in CHOICES and not (
                isinstance(value, str) and plain.startswith("label")):
            raise UserError(f'column {_quoted(name)} looks like an order; give "ranks" (smaller is better), '
                            "or delete it")
        if listed and index is not None and not (index in range(n) and ranks[int(index)] == min(ranks)):
            raise UserError(f'column {_quoted(name)} is not the index of the best response, from 0; correct '
                            "or delete it")
        if not listed and _prefers_rejected(plain, value, row):
            raise UserError(f'column {_quoted(name)} contradicts "chosen" and "rejected", which already say '
                            "which is better; correct or delete it")
        if not listed and "chosen" in name:
            value = [value, row.get(name.replace("chosen", "rejected"))]
            plain = re.sub("[_-]?chosen[_-]?", "", plain)
        elif not listed and plain == "margin":
            value, plain = [value, 0], "score"
        elif not listed and isinstance(value, dict):
            value = [value.get("chosen"), value.get("rejected")]
        if SCORES.fullmatch(plain) and _contradict(value, ranks, n):
            raise UserError(f'column {_quoted(name)} orders the responses in another way; correct their '
                            'order, or delete it, or give true scores, only to be reported, as "gold"')


def _prefers_rejected(plain, value, row):
    """Whether a column beside "chosen" and "rejected" says that the second is better, or they are swapped.

    A "label" may be of anything, so that only the word counts there.
    """
    word = value.casefold().strip() if isinstance(value, str) else value
    if plain in SWAPPED:
        return word in (True, "true", "yes", "1")
    if plain not in CHOICES and not (INDEX.fullmatch(plain) and "chosen" not in plain):
        return False
    if word == "rejected" or plain.startswith("label"):
        return word == "rejected"
    return word in ("b", "1", "2") or type(value) is int and value > 0 or (
        isinstance(value, str) and value == row["rejected"])


def _number(x):
    """An int or float, or one written as a string; None: neither, or not finite."""
    if isinstance(x, str) and len(x) < 40:
        try:
            x = float(x)
        except ValueError:
            return None
    return x if type(x) is int or type(x) is float and math.isfinite(x) else None


def _contradict(scores, ranks, n):
    """Whether these are n scores, of which one is larger, that is better, than that of a better rank."""
    if not (isinstance(scores, list) and len(scores) == n):
        return False
    scores = [_number(x) for x in scores]
    if None in scores:
        return False
    falling = sorted(zip(ranks, (-x for x in scores), strict=True))
    return any(a[1] > b[1] for a, b in pairwise(falling))


def check_repeated(prompt, responses, what):
    """UserError: each response repeats the prompt, so the model would read it twice.

    A prompt of one or two words may begin an answer by chance: a single answer, or with a longer word.
    what: of which column, and what to do.
    """
    prompt, texts = prompt.strip(), [response.lstrip() for response in responses]
    short = len(prompt) < 20 and len(prompt.split()) < 3
    word = short and prompt[-1:].isalnum()
    if prompt and (len(texts) > 1 or not short) and all(text.startswith(prompt) and not (
            word and text[len(prompt) : len(prompt) + 1].isalnum()) for text in texts):
        raise UserError(f"the prompt is repeated at the beginning of {what}")
