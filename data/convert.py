"""Convert: what reviews, hh and tldr share: lines of a source in, a folder of JSONL files out.

Nothing is lost silently: every example that is dropped is counted by reason.
"""
import argparse
import gzip
import json
import os
import re
import sys
import zlib
from pathlib import Path

from data.files import UserError, atomic_folder, json_object, printable

CHOICE = "made_from.txt"
FILES = [name + side for name in ("sft", "preferences", "prompts") for side in (".jsonl", "_val.jsonl")]
COLUMNS = {"sft": ("prompt", "completion"), "preferences": ("prompt", "chosen", "rejected")}


class Dropped:
    """Counts dropped examples by reason, with the place of the first."""

    def __init__(self):
        self.reasons = {}

    def add(self, reason, place):
        count, first = self.reasons.get(reason, (0, place))
        self.reasons[reason] = count + 1, first

    def report(self):
        for reason, (count, first) in sorted(self.reasons.items(), key=lambda item: -item[1][0]):
            print(printable(f"dropped {count}: {reason} (first: {first})"))


def lines(path, packed=None):
    """(file:line, bytes) of each non-blank line; packed: is it gzip? (default: by its name).

    UserError: missing, empty, corrupt, truncated.
    """
    number = 0
    try:
        with (gzip.open if packed or packed is None and path.suffix == ".gz" else open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", line
    except EOFError as error:
        raise UserError(f"{path} is a truncated .gz file") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is not a .gz file, or is corrupt ({error})") from error
    except OSError as error:
        raise UserError(f"can't read {path} ({error.strerror or error})") from error
    if not number:
        raise UserError(f"{path} is empty")


def examples(path, parse, dropped, packed=None):
    """(file:line, parse(object)) of each line; a line that raises UserError is dropped."""
    for place, line in lines(path, packed):
        try:
            example = parse(json_object(line))
        except UserError as error:
            dropped.add(re.sub(r" at byte.*|:.*", "", str(error)), place)
        else:
            yield place, example


def check_lines(packed):
    """The `check` of a download that must be intact and hold JSON objects."""
    def check(path):
        if not any([True for _ in examples(path, dict, Dropped(), packed)]):  # a list: reads to the end
            raise UserError(f"{path} contains no JSON objects")
    return check


def drop_held_out(found, held_out, reason, dropped):
    """{example: place} -> the examples for which held_out(prompt) is false; the others are counted."""
    kept = []
    for example, place in found.items():
        if held_out(example[0]):
            dropped.add(reason, place)
        else:
            kept.append(example)
    return kept


def objects(kind, tuples):
    """Tuples -> the JSON objects of a file of this kind, "sft" or "preferences"."""
    return [dict(zip(COLUMNS[kind], example, strict=True)) for example in tuples]


def prompt_objects(tuples):
    """The prompts of the tuples, each once, as JSON objects."""
    return [{"prompt": prompt} for prompt in dict.fromkeys(prompt for prompt, *_ in tuples)]


def is_complete(target, choice):
    """Whether the data set exists. UserError: something else does, or it was made with another choice."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    if not all((target / name).is_file() for name in FILES):
        raise UserError(f"{target} exists and is not this data set, or is incomplete; move it or give "
                        "another --to")
    made = (target / CHOICE).read_text("utf-8", "replace") if (target / CHOICE).exists() else choice
    if made != choice:
        raise UserError(f"{target} was made from {made}, not from {choice}; move it or give another --to")
    return True


def write(target, files, choice):
    """Write {name: objects} and the `choice` they were made with as a new folder, atomically."""
    with atomic_folder(target) as part:
        for name, rows in files.items():
            texts = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            (part / name).write_text("".join(texts), encoding="utf-8", newline="\n")
            print(f"{printable(target / name)}: {len(texts)} lines")
        (part / CHOICE).write_text(choice, encoding="utf-8")


def flags(doc, target, **source):
    """A parser with --from, as `source` says, and --to; its description is the first line of `doc`."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--from", dest="source", type=Path, **source)
    parser.add_argument("--to", type=Path, default=target, help="default: %(default)s")
    return parser


def finish(make, target, choice):
    """make(target, choice) unless target is complete. Returns the exit code; user errors are one sentence."""
    try:
        target = Path(os.path.realpath(target))
        if is_complete(target, choice):
            print(f"{printable(target)} is already complete: nothing to do")
        else:
            make(target, choice)
        return 0
    except KeyboardInterrupt:
        print("stopped; rerun the same command to resume the download", file=sys.stderr)
        return 130
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: can't write {printable(target)} ({error.strerror or error})", file=sys.stderr)
    return 1
