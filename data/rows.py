"""Rows: which columns of a table are prompt, response, rating, ..., and what its rows say together.

A cell that can't be used is dropped and counted (Drop); one that would make all others doubtful, such as a
rating that is a word, is an error that names file, line and column.
"""
import math
import re
from collections import defaultdict

from data.columns import SCORES, check_order, check_repeated
from data.convert import Dropped
from data.files import UserError, printable
from data.records import ANSWER, split
from data.tables import read_table
from data.tokenizer import check_text

SIDED = "response answer completion output text summary reply option".split()
NAMES = {role: names.split() for role, names in {
    "prompt": "prompt question query instruction input",
    "response": "response answer output completion reply",
    "rating": "rating ratings score stars label grade mean_rating rating_mean",
    "a": "a " + " ".join(f"{name}_a {name}_1" for name in SIDED),
    "b": "b " + " ".join(f"{name}_b {name}_2" for name in SIDED),
    "choice": "choice winner preferred preference label",
    "chosen": "chosen", "rejected": "rejected",
    "text": "text content sentence review comment body"}.items()}
KINDS = [("chosen", "rejected"), ("a", "b", "choice"), ("response", "rating"), ("text", "rating"),
         ("prompt", "response"), ("text",), ("prompt",)]
RATED = re.compile(rf"{SCORES.pattern}|rank|correct|quality|likes", re.IGNORECASE)
NOTHING = {"", "nan", "na", "n/a", "none", "null", "-", "?"}


class Drop(Exception):
    """Why a row is left out."""


def listed(names):
    """Names of columns, for a message."""
    names = list(names)
    return ", ".join(f'"{printable(name)[:40]}"' for name in names[:15]) + ", ..." * (len(names) > 15)


# ---- columns ----

def find_columns(names, given, path):
    """{role: columns} by the names, or as `given` by flags. UserError: none fit, or several could."""
    for role, some in given.items():
        if lost := [name for name in some if name not in names]:
            raise UserError(f"--{role}-column: {path} has no column {listed(lost)}, but {listed(names)}")
    taken = {name for some in given.values() for name in some}
    plain = {name: re.sub(r"[\W_]+", "_", name.casefold()).strip("_") for name in names}
    found = {role: [name for name in names if plain[name] in known and name not in taken]
             for role, known in NAMES.items()} | given
    kind = next((kind for kind in KINDS if all(found[role] for role in kind)
                 and given.keys() <= {"prompt", *kind}), None)
    if found["a"] and found["b"] and kind not in KINDS[:2] and given.keys() <= {"prompt"}:
        raise UserError(f"{path} has {listed(found['a'] + found['b'])}, and no column that says which is "
                        "better: name it with --choice-column; one to learn from, with --response-column")
    if not kind:
        raise UserError(f"{path} has the columns {listed(names)}; say which to read: --text-column, "
                        "--response-column, --rating-column, ... (-h lists them); the first line of a table "
                        "must hold their names")
    wanted = dict.fromkeys([*kind, *["prompt"] * (kind != ("text",))])
    roles = {role: found[role] for role in wanted if found[role]}
    for role, some in roles.items():
        if len(some) > 1 and role not in given:
            raise UserError(f"{path}: {listed(some)} may each be the {role}; name one with --{role}-column"
                            + ", or several, to be joined by an empty line" * (role == "prompt"))
    return roles


# ---- cells ----

def text_of(row, names, where):
    """The text of a cell, or of several, without blanks around it. UserError: no text. Drop: unusable."""
    cells = [row.get(name) for name in names]
    for name, x in zip(names, cells, strict=True):
        if x is not None and x == x and not isinstance(x, str):
            raise UserError(f"{where}: {listed([name])} is not a text")
    text = "\n\n".join(x.strip() for x in cells if isinstance(x, str) and x.strip())
    if re.match(r"\[\s*\{.*['\"]role['\"]\s*:", text, re.S):
        raise UserError(f"{where}: {listed(names)} holds a list of messages as text; save it as JSONL with a "
                        '"messages" column')
    if text.startswith("Human:") and text.endswith(ANSWER):  # a conversation, as data/records.py writes it
        text = "\n\n" + text
    try:
        text.encode()
        check_text(text)
    except UnicodeEncodeError:
        raise Drop("half a surrogate pair") from None
    except UserError as error:
        raise Drop(str(error)) from None
    if not text:
        raise Drop("an empty text")
    return text


def number(row, names, where):
    """A rating; 4,5 is 4.5, true is 1. UserError: not a finite number. Drop: there is none."""
    text = _word(row.get(names[0]))
    if text in NOTHING:
        raise Drop("no rating")
    if re.fullmatch(r"[-+]?\d+,\d{3}", text):
        raise UserError(f"{where}: {text} in {listed(names)}: write that comma as a point, or delete it")
    text = re.sub(r"^([-+]?\d+),(\d+)$", r"\1.\2", text)
    try:
        x = math.inf if "_" in text else float({"true": 1, "false": 0}.get(text, text))  # 1_2 would be 12
    except ValueError:
        x = math.inf
    if not abs(x) < 1e18:
        raise UserError(f"{where}: {printable(text)[:40]!r} in {listed(names)} is not a number; write words "
                        "as numbers, larger for better (good 1, bad 0)")
    return x


def choices(rows, roles):
    """choose(row, a, b, where) -> whether a is better. Numbers count from 0, or from 1 if there is a 2."""
    words = {_word(row.get(roles["choice"][0])) for _, row in rows}
    if "1" in words and not words & {"0", "2"}:
        raise UserError(f"{rows[0][0]}: {listed(roles['choice'])} is never 0 or 2, so 1 may be the first or "
                        "the second; write a or b")
    better = {"a": True, "model_a": True, "first": True, "left": True, _word(roles["a"][0]): True,
              "b": False, "model_b": False, "second": False, "right": False, _word(roles["b"][0]): False}
    better |= {"1": True, "2": False} if "2" in words else {"0": True, "1": False}

    def choose(row, a, b, where):
        word = _word(row.get(roles["choice"][0]))
        if word in NOTHING or re.match(r"(tie|both|equal|same|neither|draw)\b", word):
            raise Drop("a tie, or no choice")
        known = {_word(a): True, _word(b): False} | better
        if word not in known:
            raise UserError(f"{where}: {printable(word)[:40]!r} in {listed(roles['choice'])} is neither side")
        return known[word]
    return choose


def _word(cell):
    return "" if cell is None else re.sub(r"^(-?\d+)\.0+$", r"\1", " ".join(str(cell).casefold().split()))


# ---- all rows ----

class Found:
    """What the files hold: rated {(prompt, text): ratings}, pairs {(prompt, better, worse): places},
    demonstrations {(prompt, response): place}, prompts {(prompt, ""): place}. An empty prompt is none."""

    def __init__(self):
        self.rated, self.pairs = defaultdict(list), defaultdict(list)
        self.demonstrations, self.prompts, self.dropped, self.repeated = {}, {}, Dropped(), 0

    def read(self, path, args):
        self.take(path, *read_table(path, args.encoding, args.split), args.columns)

    def take(self, path, names, rows, given):
        """The rows of a table, as `read_table` returns it; given: as for `find_columns`."""
        roles = find_columns(names, given, path)
        rest = [name for name in names if not any(name in some for some in roles.values())]
        if made := [name for name in rest if name in ("messages", "responses", "ranks")]:
            raise UserError(f"{path}: lines with {listed(made)} need no preparing: see docs/data.md, and the "
                            "scripts' --val-fraction")
        print(printable(f"{path}: {len(rows)} rows; " + ", ".join(
            f"{role}: {listed(some)}" for role, some in roles.items()))
            + (f"; not read: {listed(rest)}" if rest else ""))
        if not {"rating", "choice", "chosen"} & roles.keys() and (some := [*filter(RATED.fullmatch, rest)]):
            print(f"{listed(some)} may be a rating: to use it, give --rating-column")
        choose = choices(rows, roles) if "choice" in roles else None
        for where, row in rows:
            try:
                self.add({role: (number if role == "rating" else text_of)(row, some, where)
                          for role, some in roles.items() if role != "choice"}, row, where, choose)
            except Drop as why:
                self.dropped.add(str(why), where)

    def add(self, cells, row, where, choose):
        """One row, its cells by role."""
        prompt, rating, said = cells.pop("prompt", ""), cells.pop("rating", None), list(cells.values())
        texts = [self.response(prompt, text) for text in said]
        if not prompt and len(texts) == 2 and all(ANSWER in text for text in texts):  # Anthropic's HH
            try:
                prompt, *texts = split(*("\n\n" + text for text in texts))
            except UserError as error:
                raise Drop(str(error)) from None
        if "chosen" in cells:
            try:
                check_order(row | {"chosen": said[0], "rejected": said[1]}, 2)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
        if rating is not None:
            self.rated[prompt, texts[0]].append(rating)
        elif len(texts) == 2:
            if texts[0] == texts[1]:
                raise Drop("two responses that are the same")
            if choose and not choose(row, *said, where):
                texts.reverse()
            self.pairs[(prompt, *texts)].append(where)
        else:
            kept, key = self.demonstrations if texts else self.prompts, (prompt, *(texts or [""]))
            if key in kept:
                raise Drop("a duplicate")
            kept[key] = where

    def response(self, prompt, text):
        """The response as it follows the prompt: after a space, and without the prompt at its beginning."""
        try:
            check_repeated(prompt, [text], "")
        except UserError:
            self.repeated += 1
            text = text.removeprefix(prompt).strip()
        if not text:
            raise Drop("an empty text")
        return " " + text if prompt else text

    def settle(self):
        """Of a pair in both orders the more frequent one stays, of equally frequent ones none; say so."""
        pairs, self.pairs = self.pairs, {}
        for (prompt, a, b), places in pairs.items():
            stays = len(places) > len(pairs.get((prompt, b, a), ()))
            for where in places[stays:]:
                self.dropped.add("a duplicate" if stays else "a pair that another row contradicts", where)
            if stays:
                self.pairs[prompt, a, b] = places
        if again := sum(len(ratings) - 1 for ratings in self.rated.values()):
            print(f"{again} rows rate a text again: its ratings are averaged")
        if self.repeated:
            print(f"{self.repeated} responses began with their prompt: it was taken off")
        self.dropped.report()
