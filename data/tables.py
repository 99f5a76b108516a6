"""Tables: CSV, TSV, JSON, JSONL and plain text as rows of named cells; an error names file and line."""
import csv
import io
import re

from data.files import STRICT, UserError, json_object, printable

BOMS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
FORMS = {".csv", ".tsv", ".tab", ".json", ".jsonl", ".ndjson"}  # any other suffix is plain text
PACKED = {".gz", ".zip", ".bz2", ".xz", ".zst", ".tar", ".xlsx", ".xls", ".ods", ".parquet", ".arrow", ".pdf",
          ".doc", ".docx", ".rtf", ".html", ".htm", ".xml", ".pkl"}


def read_table(path, encoding=None, separator=None):
    """(names of the columns, [(place, {name: cell})]) of a file, in its order; its suffix says what it is.

    A cell of a CSV or TSV file is a string, one of JSON anything. A text file has one column, "text":
    what stands between blank lines, or between the `separator`. UserError: file, line and fault.
    """
    suffix = path.suffix.casefold()
    if suffix in PACKED:
        raise UserError(f"{path}: {suffix} can't be read; unpack it, or save it as text, CSV or JSONL")
    text = _read(path, encoding)
    if suffix in (".jsonl", ".ndjson"):
        rows = list(_json_lines(path, text))
    elif suffix == ".json":
        rows = list(_json(path, text))
    elif suffix in (".csv", ".tsv", ".tab"):
        return _csv(path, text, suffix)
    else:
        rows = list(_pieces(path, text, separator))
    if not rows:
        raise UserError(f"{path} is empty")
    return list(dict.fromkeys(name for _, row in rows for name in row)), rows


def _read(path, encoding):
    """The text of a file, its lines ended by newlines alone. UserError: missing, or another encoding."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    found = next((name for bom, name in BOMS.items() if raw.startswith(bom)), "utf-8")
    try:
        text = raw.decode(encoding or found)
    except LookupError:
        raise UserError(f"--encoding {encoding}: there is no such encoding") from None
    except UnicodeError as error:
        line = raw[: getattr(error, "start", 0)].count(b"\n") + 1
        hint = "" if encoding else "; if Excel on Windows saved it, give --encoding cp1252"
        raise UserError(f"{path}:{line}: not {encoding or found.upper()}{hint}") from None
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{path}:{line}: a NUL character; is it no text, or UTF-16 (--encoding utf-16)?")
    return text


def _pieces(path, text, separator):
    """Pieces of a text, with the line at which each begins."""
    start, breaks = 0, re.finditer(r"\n[ \t]*\n\s*" if separator is None else re.escape(separator), text)
    line, counted = 1, 0
    for end, following in [*((found.start(), found.end()) for found in breaks), (len(text), len(text))]:
        piece = text[start:end]
        begin = start + len(piece) - len(piece.lstrip())
        line, counted = line + text.count("\n", counted, begin), begin
        if piece.strip():
            yield f"{path}:{line}", {"text": piece.strip()}
        start = following


# ---- JSON ----

def _json_lines(path, text):
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}:{number}", json_object(line.encode())
            except UserError as error:
                raise UserError(f"{path}:{number}: {error}") from None


def _json(path, text):
    """A list of objects or of strings, or an object with one list. Several objects: one a line."""
    try:
        data = STRICT.decode(text)
    except RecursionError:
        raise UserError(f"{path}: not JSON: nested too deeply") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except ValueError as error:
        if getattr(error, "msg", "") == "Extra data":  # another object follows the first
            yield from _json_lines(path, text)
            return
        raise UserError(f"{path}:{getattr(error, 'lineno', 1)}: not JSON: {getattr(error, 'msg', error)}"
                        ) from None
    if isinstance(data, dict):
        lists = {name: x for name, x in data.items() if isinstance(x, list)}
        if len(lists) != 1:
            raise UserError(f"{path}: expected a list of objects, or an object with one list; it has "
                            f"{len(lists)} lists")
        data = next(iter(lists.values()))
    if not isinstance(data, list):
        raise UserError(f"{path}: expected a list of objects, or an object with one list")
    for number, row in enumerate(data, 1):
        place = f"{path}: item {number}"
        if not isinstance(row, (dict, str)):
            raise UserError(f"{place}: neither an object nor a text")
        yield place, {"text": row} if isinstance(row, str) else row


# ---- CSV ----

def _csv(path, text, suffix):
    """CSV by its header: commas, semicolons, tabs or bars. A TSV file's quotes may be plain characters: if
    its lines have as many cells as the header, none of them goes on in the next."""
    csv.field_size_limit(2**31 - 1)
    tabs, skipped = suffix != ".csv", 0
    if found := re.match(r"sep=(.)\n", text, re.I):  # Excel's
        text, skipped = text[found.end():], 1
    first = text.lstrip("\n").split("\n", 1)[0]
    delimiter = "\t" if tabs else found[1] if found else max(
        ",;\t|", key=lambda x: len(next(csv.reader([first], delimiter=x), [])))
    plain = [*_records(path, text, skipped, delimiter=delimiter, quoting=csv.QUOTE_NONE)] if tabs else []
    if plain and 1 < len(plain[0][1]) and all(_fits(cells, plain[0][1]) for _, cells in plain):
        records = [(place, [*map(_unquoted, cells)]) for place, cells in plain]
    else:
        try:
            records = [*_records(path, text, skipped, delimiter=delimiter, strict=True)]
        except UserError:
            if not tabs:
                raise
            records = plain
    if not records:
        raise UserError(f"{path} is empty")
    (_, header), *records = records
    names = [name.strip() or f"column {i}" for i, name in enumerate(header, 1)]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"{path}: two columns are named {printable(twice[0])!r}; rename one of them")
    rows = []
    for place, cells in records:
        if not _fits(cells, names):
            raise UserError(f"{place}: {len(cells)} cells, where the header has {len(names)}; cells that "
                            f"contain {'a tab' if delimiter == chr(9) else repr(delimiter)} need quotes")
        rows.append((place, dict(zip(names, cells, strict=False))))
    if not rows:
        raise UserError(f"{path} has a header, and no row below it")
    return names, rows


def _fits(cells, names):
    """Whether there is a cell for each name, and nothing beyond them."""
    return len(cells) >= len(names) and not any(cell.strip() for cell in cells[len(names):])


def _unquoted(cell):
    """The text of a cell that is quoted as a whole, or the cell."""
    whole = re.fullmatch(r'"((?:[^"]|"")*)"', cell)
    return whole[1].replace('""', '"') if whole else cell


def _records(path, text, line, **how):
    """(place, cells) of each record that is not blank; the place is the line at which it begins."""
    reader = csv.reader(io.StringIO(text, newline=""), **how)
    while True:
        begin = line + reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            why = "a quote that is never closed" if "unexpected end" in str(error) else str(error)
            raise UserError(f"{path}:{begin}: {why}; a quote within a quoted cell is written twice") from None
        if cells is None:
            return
        if any(cell.strip() for cell in cells):
            yield f"{path}:{begin}", cells
