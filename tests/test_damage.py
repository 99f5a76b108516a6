"""data/records.py against over 200 kinds of corruption: each an error that names file and line, or harmless.

Harmless is what changes no text: BOM, CRLF, blank lines, unread columns, a very long text. With skip_bad each
bad line is counted, so kept + skipped is the number of non-blank lines.
"""
import bisect
import gzip
import json
import os
import random
import re

import pytest

from data.files import UserError
from data.records import read_preferences, read_prompts, read_sft

pytestmark = pytest.mark.slow

USER, SAYS = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
GOOD = {  # the reader, a line in each form, and the columns that are read
    "prompt": (read_prompts, {"prompt": "Say it."}, ["prompt"]),
    "prompt of turns": (read_prompts, {"prompt": [USER]}, ["prompt"]),
    "demonstration": (read_sft, {"prompt": "a", "completion": " b"}, ["prompt", "completion"]),
    "text": (read_sft, {"text": "a b"}, ["text"]),
    "messages": (read_sft, {"messages": [USER, SAYS]}, ["messages"]),
    "pair": (read_preferences, {"prompt": "a", "chosen": " b", "rejected": " c"},
             ["prompt", "chosen", "rejected"]),
    "pair without prompt": (read_preferences, {"chosen": "a b", "rejected": "a c"}, ["chosen", "rejected"]),
    "ranking": (read_preferences,
                {"prompt": "a", "responses": [" b", " c", " d"], "ranks": [0, 1, 1], "gold": [3, 2.5, 2]},
                ["prompt", "responses", "ranks", "gold"]),
}
WRONG = {  # wrong values for a column, as JSON
    "null": "null", "true": "true", "zero": "0", "float": "1.5", "NaN": "NaN", "Infinity": "Infinity",
    "-Infinity": "-Infinity",
    "1e999": "1e999", "an int of 400 digits": "9" * 400, "an int of 5000 digits": "9" * 5000,
    "an object": '{"a": 1}',
    "list of null": "[null]", "list of lists": "[[], []]", "list of NaN": "[NaN, NaN, NaN]",
    "list of huge": "[1e39, 0, 1]",
    "a high surrogate": '"a\\ud83d"', "a low surrogate": '"\\ude00a"',
    "unknown role": '[{"role": "tool", "content": "a"}]',
    "role a number": '[{"role": 1, "content": "a"}]', "no role": '[{"content": "a"}]',
    "no content": '[{"role": "user"}]',
    "content null": '[{"role": "user", "content": null}]',
    "content in parts": '[{"role": "user", "content": [{"text": "a"}]}]',
    "a lone surrogate as content": '[{"role": "assistant", "content": "\\udfff"}]',
    "nested": "[" * 50 + "]" * 50,
    "nested very deeply": "[" * 10**5 + "]" * 10**5,
}


def bytes_kinds(rng, line):
    """(name, bytes, bad): what can happen to any line on disk."""
    place = rng.randrange(1, len(line) - 1)
    for part in range(1, 8):
        yield f"truncated after {part}/8", line[: len(line) * part // 8], True
    yield "without its beginning", line[place:], True
    yield "two on a line", line + line, True
    yield "two on a line with a comma", line + b", " + line, True
    yield "two with a carriage return between", line + b"\r" + line, True
    yield "comma after it", line + b",", True
    yield "comma before the brace", line[:-1] + b",}", True
    yield "extra brace", line + b"}", True
    yield "in a list", b"[" + line + b"]", True
    yield "in a string", json.dumps(line.decode()).encode(), True
    yield "single quotes", line.replace(b'"', b"'"), True
    yield "name without quotes", b"{prompt" + line[line.index(b":") :], True
    yield "a number for a name", b"{1: 2, " + line[1:], True
    yield "comment", b"# " + line, True
    yield "not JSON", b"hello", True
    yield "null", b"null", True
    yield "a number", b"17", True
    yield "an empty object", b"{}", True
    yield "an empty list", b"[]", True
    yield "NULs", b"\0" * 40, True
    yield "NUL in it", line[:place] + b"\0" + line[place:], True
    yield "invalid UTF-8", line[:place] + b"\xff" + line[place:], True
    yield "UTF-8 truncated within a character", line[:-2] + "漢".encode()[:2] + line[-2:], True
    yield "Latin-1", line[:-1] + ', "x": "é"}'.encode("latin-1"), True
    yield "UTF-16", line.decode().encode("utf-16-le"), True
    yield "UTF-8 of a surrogate", line[:-1] + b', "x": "\xed\xa0\x80"}', True
    tab = line.replace(b"a", b"\t") if b'"a' in line else line[:-1] + b', "x": "\t"}'
    yield "a tab in a string", tab, True
    yield "two BOMs", b"\xef\xbb\xbf" * 2 + line, True
    yield "unknown escape", line[:-1] + b', "x": "\\q"}', True
    yield "nested very deeply", b'{"x":' * 10**5, True
    yield "duplicate key in another column", line[:-1] + b', "x": 1, "x": 2}', True
    yield "duplicate nested key", line[:-1] + b', "x": {"y": 1, "\\u0079": 1}}', True
    yield "duplicate key of a lone surrogate", line[:-1] + b', "\\ud800": 1, "\\ud800": 2}', True
    yield "BOM", b"\xef\xbb\xbf" + line, False
    yield "CRLF", line + b"\r", False
    yield "blanks around", b" \t" + line + b" \t\r", False
    yield "another column", line[:-1] + b', "x": [null, NaN, {"y": 1e999}]}', False
    yield "another column of a lone surrogate", line[:-1] + b', "\\ud800": "\\udfff"}', False
    yield "another column of 1 MB", line[:-1] + b', "x": "' + b"y" * 10**6 + b'"}', False
    yield "another column of NUL", line[:-1] + b', "x": "\\u0000"}', False
    yield "another column nested 500 times", line[:-1] + b', "x": ' + b"[" * 500 + b"]" * 500 + b"}", False


def column_kinds(row, columns):
    """(name, bytes, bad): a column's value replaced, or the column missing, misspelt, duplicated."""
    for column in columns:
        rest = {name: value for name, value in row.items() if name != column}
        whole, optional = json.dumps(row), column in ("ranks", "gold")  # or null
        for name, value in WRONG.items():
            text = json.dumps({**rest, column: "HERE"}).replace('"HERE"', value)
            yield f"{column}: {name}", text.encode(), not (optional and name == "null")
        yield f"{column}: missing", json.dumps(rest).encode(), not optional
        yield f"{column}: misspelt", json.dumps({**rest, column.title(): row[column]}).encode(), True
        yield f"{column}: twice", (whole[:-1] + f', "{column}": {json.dumps(row[column])}}}').encode(), True
        yield f"{column}: empty object", json.dumps({**rest, column: {}}).encode(), True
        if isinstance(row[column], str):
            long = {**rest, column: row[column] + " long" * 200_000}
            yield f"{column}: 1 MB", json.dumps(long).encode(), False
            yield f"{column}: NUL said", json.dumps({**rest, column: row[column] + "\0"}).encode(), False
            ends = json.dumps({**rest, column: row[column] + "\u2028\x85"}, ensure_ascii=False)
            yield f"{column}: Unicode line ends", ends.encode(), False


def kinds():
    rng, found = random.Random(0), {}
    for form, (read, row, columns) in GOOD.items():
        for name, line, bad in (*bytes_kinds(rng, json.dumps(row).encode()), *column_kinds(row, columns)):
            found[f"{form}, {name}"] = (read, json.dumps(row).encode(), line, bad)
    return found


KINDS = kinds()
# without this column the line is valid in another form
HARMLESS = {"pair, prompt: missing", "pair, prompt: null"}


def count_skipped(said):
    """The number of bad lines in what was printed; ignored columns may be named there, too."""
    return int(match[1]) if (match := re.search(r": (\d+) bad lines skipped, (\d+) kept", said)) else 0


def test_there_are_200_kinds():
    assert len(KINDS) > 200 and len({(good, line) for _, good, line, _ in KINDS.values()}) > 200


@pytest.mark.parametrize("form", GOOD)
def test_corruption_is_named_with_its_line_or_counted(tmp_path, capsys, form):
    rng, path = random.Random(form), tmp_path / "data.jsonl"
    for name, (read, good, line, bad) in KINDS.items():
        if not name.startswith(form + ", "):
            continue
        bad = bad and name not in HARMLESS
        lines = [good] * 4 + [b"", b" \r"]
        rng.shuffle(lines)
        number = rng.randrange(len(lines) + 1)
        lines.insert(number, line)
        path.write_bytes(b"\n".join(lines) + b"\n" * rng.randrange(2))
        try:
            read(path)
            error = None
        except UserError as caught:
            error = str(caught)
        assert bool(error) == bad, (name, error)
        if error:
            assert error.startswith(f"{path}:{number + 1}: "), (name, error)
            assert "\n" not in error and len(error) < 300, (name, error)
            error.encode()  # can be printed
        kept = read(path, skip_bad=True)
        said = capsys.readouterr().out
        skipped = count_skipped(said)
        assert (len(kept), skipped) == ((4, 1) if bad else (5, 0)), (name, said)
        path.write_bytes(good)
        assert sum(row == read(path)[0] for row in kept) >= 4, name  # the other lines are unchanged


WHOLE = {  # files in which no line is bad, or all are -> the message
    "empty": (b"", ": no examples"), "blank lines": (b"\n\r\n \t\n\x0b\x0c\n", ": no examples"),
    "only a BOM": (b"\xef\xbb\xbf", ":1: not JSON"), "NULs": (b"\0" * 4096, ":1: not JSON"),
    "gzip": (gzip.compress(b'{"prompt": "a"}\n' * 20), ":1: not UTF-8"),
    "zip": (b"PK\3\4\x14\0\0\0\x08\0" + bytes(range(256)), ":1: not"),
    "UTF-16": ('{"prompt": "a"}\n'.encode("utf-16"), ":1: not UTF-8"),
    "UTF-32": ('{"prompt": "a"}\n'.encode("utf-32"), ":1: not"),
    "one list": (b'[\n{"prompt": "a"},\n{"prompt": "b"}\n]\n', ":1: not JSON"),
    "printed over lines": (b'{\n  "prompt": "a"\n}\n', ":1: not JSON"),
    "Mac line ends": (b'{"prompt": "a"}\r{"prompt": "b"}\r', ":1: not JSON: Extra data"),
    "CSV": (b"prompt\na\n", ":1: not JSON"),
    "random": (random.Random(1).randbytes(5000), ":1: not UTF-8"),
    "parquet": (b"PAR1\x15\x04\x15\x10PAR1", ":1: not JSON"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_corrupt_files(tmp_path, name):
    raw, says = WHOLE[name]
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(raw)
    with pytest.raises(UserError, match=re.escape(f"{path}:") + ".*") as caught:
        read_prompts(path)
    assert says in str(caught.value)


def test_unreadable_files(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("{}")
    for name, says in (("no", "is missing"), ("loop", "can't be read"), ("file/x", "can't be read"),
                       ("", "can't be read"), ("x" * 300, "can't be read")):
        with pytest.raises(UserError, match=says):
            read_prompts(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX")
def test_what_is_no_regular_file_is_never_opened(tmp_path):
    """A pipe that nobody writes to would be read for ever."""
    (tmp_path / "null").symlink_to(os.devnull)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("null", "pipe", "link"):
        with pytest.raises(UserError, match=f"{name} can't be read: not a regular file"):
            read_prompts(tmp_path / name, skip_bad=True)
    (tmp_path / "file").write_text('{"prompt": "p"}')
    (tmp_path / "good").symlink_to("file")
    assert read_prompts(tmp_path / "good") == ["p"]


def test_mixed_line_ends_lose_nothing(tmp_path):
    """A BOM, CRLF and LF mixed, blank lines, no newline at the end: all lines are read, in order."""
    rng, path = random.Random(0), tmp_path / "prompts.jsonl"
    ends = [b"\n", b"\r\n", b"\n\n", b" \r\n\r\n"]
    lines = [json.dumps({"prompt": f"number {i}"}).encode() + rng.choice(ends) for i in range(300)]
    path.write_bytes(b"\xef\xbb\xbf" + b"".join(lines).rstrip())
    assert read_prompts(path) == [f"number {i}" for i in range(300)]


def too_deep(depth):
    try:
        json.loads("[" * depth + "]" * depth)
    except RecursionError:
        return True
    return False


def test_nesting_at_the_limit_of_the_parser(tmp_path):
    """Chats nested so deeply that they can only just be parsed: an error or a row, whatever the depth."""
    path, ends = tmp_path / "data.jsonl", set()
    limit = bisect.bisect(range(10**6), False, key=too_deep)  # 1,000 in Python 3.11, more in later ones
    for depth in range(limit - 130, limit + 20):
        turn = json.dumps(SAYS)[:-1] + ', "x": ' + "[" * depth + "]" * depth + "}"
        yes, no = json.dumps(SAYS), json.dumps({**SAYS, "content": "no"})
        path.write_text(f'{{"chosen": [{turn}, {yes}], "rejected": [{turn}, {no}]}}')
        try:
            ends.add(len(read_preferences(path)))
        except UserError as error:
            ends.add(str(error))
    assert len(ends) == 2 and 1 in ends, ends  # read, or nested too deeply


@pytest.mark.parametrize("seed", range(3))
def test_random_corruption_never_raises_anything_else(tmp_path, capsys, seed):
    """Bytes overwritten, lost, duplicated in 12 lines: kept + skipped is the number of non-blank lines."""
    rng, path = random.Random(seed), tmp_path / "data.jsonl"
    for _ in range(60):
        form = rng.choice(list(GOOD))
        read, row, _ = GOOD[form]
        raw = bytearray(json.dumps(row).encode() + b"\n") * 12
        for _ in range(rng.randrange(1, 8)):
            i = rng.randrange(len(raw))
            raw[i : i + rng.randrange(3)] = rng.choice([b"", b"\n", b'"', b"\\", b"{", b"]", rng.randbytes(2),
                                                        raw[i : i + 20]])
        path.write_bytes(raw)
        try:
            kept = len(read(path, skip_bad=True))
        finally:
            said = capsys.readouterr().out
        skipped = count_skipped(said)
        assert kept + skipped == sum(bool(line.strip()) for line in bytes(raw).split(b"\n"))
