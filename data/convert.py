"""Convert: what reviews, hh and tldr share. Lines of a source in, a folder of JSONL files out.

Nothing is lost silently: what a source holds and a data set does not is counted by reason.
"""
import gzip
import json
import os
import re
import sys
import tempfile
import zlib
from pathlib import Path

from data.records import UserError, json_object

CHOICE = "made_from.txt"
FILES = [name + side for name in ("sft", "preferences", "prompts") for side in (".jsonl", "_val.jsonl")]


class LeftOut:
    """Counts what is left out by reason, and keeps the place of the first."""

    def __init__(self):
        self.reasons = {}

    def add(self, reason, place):
        count, first = self.reasons.get(reason, (0, place))
        self.reasons[reason] = count + 1, first

    def report(self):
        for reason, (count, first) in sorted(self.reasons.items(), key=lambda item: -item[1][0]):
            print(f"left out: {count}, {reason} (the first: {first})")


def lines(path, packed=None):
    """(file:line, bytes) of a .gz or plain file (packed: which; default: by its name). UserError: not
    there, empty, damaged, cut off."""
    number = 0
    try:
        with (gzip.open if packed or packed is None and path.suffix == ".gz" else open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", line
    except EOFError as error:
        raise UserError(f"{path} ends too early: it is not a whole .gz file") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is not a .gz file, or is damaged ({error})") from error
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror or error})") from error
    if not number:
        raise UserError(f"{path} is empty")


def examples(path, parse, left_out, packed=None):
    """(file:line, parse(object)) of each line; where UserError is raised the line is left out."""
    for place, line in lines(path, packed):
        try:
            example = parse(json_object(line))
        except UserError as error:
            left_out.add(re.sub(r" at byte.*|:.*", "", str(error)), place)
        else:
            yield place, example


def check_lines(packed):
    """For `download`: a function of what has come, which must be whole and hold JSON objects."""
    def check(path):
        if not any([True for _ in examples(path, dict, LeftOut(), packed)]):  # a list: read to the end
            raise UserError(f"{path} holds no JSON object")
    return check


def is_complete(target, choice):
    """Is the data set there already? UserError: something else is, or it was made by another choice."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    if not all((target / name).is_file() for name in FILES):
        raise UserError(f"{target} exists and is not this data set, or not all of it; move it or give "
                        "another --to")
    made = (target / CHOICE).read_text(encoding="utf-8") if (target / CHOICE).exists() else choice
    if made != choice:
        raise UserError(f"{target} was made from {made}, and not from {choice}; move it or give another --to")
    return True


def write(target, files, choice):
    """Write name -> objects in a folder beside target that takes its place when whole; it holds, too, by
    what `choice` it was made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as beside:
        folder = type(target)(beside) / target.name
        folder.mkdir()
        for name, objects in files.items():
            lines = [json.dumps(o, ensure_ascii=False) + "\n" for o in objects]
            (folder / name).write_text("".join(lines), encoding="utf-8", newline="\n")
            print(f"{target / name}: {len(lines)} lines")
        (folder / CHOICE).write_text(choice, encoding="utf-8")
        folder.replace(target)


def finish(make, target, choice):
    """make(target, choice) unless that is complete. The exit code; a mistake is one sentence on stderr."""
    try:
        target = Path(os.path.realpath(target))
        if is_complete(target, choice):
            print(f"{target} is complete already: nothing to do")
        else:
            make(target, choice)
        return 0
    except KeyboardInterrupt:
        print("stopped; the same command goes on with what was downloaded", file=sys.stderr)
        return 130
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: cannot write {target} ({error.strerror or error})", file=sys.stderr)
    return 1
