"""Files: errors a user can act on, strict JSON, atomic writes, and archives that hold what they claim to."""
import json
import os
import re
import shutil
import sys
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """A mistake in what the user gave us. Scripts print it as one printable sentence and exit with 1."""

    def __str__(self):
        return printable(super().__str__())


def printable(text):
    """A name for a message: what would control the terminal, or can't be printed, is escaped ("\\x1b")."""
    text = str(text)
    return text if text.isprintable() else "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Progress:
    """How far something is, on stderr: one updating line on a terminal, else a line every 10 seconds."""

    def __init__(self):
        self.live, self.said = sys.stderr is not None and sys.stderr.isatty(), time.monotonic()
        self.unended, self.start = False, self.said

    def share(self, what, done, total):
        """Print how much is done and how long the rest will take, unless it is too soon."""
        left = (time.monotonic() - self.start) * (total - done) / max(1, done)
        self(f"{what}: {done / total:.0%}, {left:.0f} s left ")

    def __call__(self, text):
        """Print the text, unless it is too soon."""
        if time.monotonic() > self.said + (0.2 if self.live else 10):
            self.say(text)

    def say(self, text):
        self.said, self.unended = time.monotonic(), self.live
        if sys.stderr is not None:
            print("\r" * self.live + printable(text), end="" if self.live else "\n", file=sys.stderr,
                  flush=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.unended:
            print(file=sys.stderr, flush=True)


def json_line(row):
    """dict -> the bytes of a line."""
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()


def json_object(line):
    """JSON bytes -> dict. UserError: not UTF-8, not JSON, not an object, a duplicate key."""
    try:
        row = STRICT.decode(line.decode("utf-8-sig"))
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise UserError("not JSON: nested too deeply") from None
    except ValueError as error:  # also for a number of more than 4300 digits
        raise UserError(f"not JSON: {getattr(error, 'msg', 'a number is too long')}") from None
    if not isinstance(row, dict):
        raise UserError("not a JSON object {...}")
    return row


def _unique_keys(pairs):
    """An object of the JSON; with a duplicate key, one of its values would be lost silently."""
    row = {}
    for key, value in pairs:
        if key in row:
            raise UserError(f"duplicate key {key!r:.40}")
        row[key] = value
    return row


STRICT = json.JSONDecoder(object_pairs_hook=_unique_keys)  # json.loads would make one for every line


@contextmanager
def atomic_file(path):
    """A binary file to write; it takes the place of `path` when the block ends without an error.

    Until then, and after a crash, what stood at `path` is untouched. OSError: it can't be written.
    """
    beside = _beside(path)
    try:
        with open(beside, "xb") as file:  # x: never through somebody's link
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path):
    """A new folder to fill, as a Path; it takes the place of `path`, which must be absent or empty."""
    beside = _beside(path)
    try:
        beside.mkdir(parents=True)
        yield beside
        replace(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def append(path, lines):
    """Add whole lines, on the disk when this returns. OSError: the disk is full, and nothing is added."""
    if not path.exists():
        with atomic_file(path) as file:
            file.write(lines)
        return
    with open(path, "r+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            if file.write(lines) < len(lines):
                raise OSError(f"{path}: the disk is full")
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise


def check_new(path):
    """UserError: it is there already, or its folder is not: to be known before any work is done."""
    if os.path.lexists(path):
        raise UserError(f"{path} already exists; choose another name")
    if not Path(path).absolute().parent.is_dir():
        raise UserError(f"{path}: there is no such folder")


def take_back(*last):
    """Remove from each (path, line) this last line. UserError: one is not the last, and none is removed."""
    for path, line in last:
        if not (path.exists() and path.read_bytes().endswith(line)):
            raise UserError(f"{path} was changed by something else: its last line is not the last answer")
    for path, line in last:
        with open(path, "r+b") as file:
            file.truncate(file.seek(-len(line), os.SEEK_END))
            os.fsync(file.fileno())


def settle(path, line=b""):
    """After a kill: whole lines only, and among them the `line` that was the last to be added."""
    data = path.read_bytes() if path.exists() else b""
    tail = data[data.rfind(b"\n") + 1 :]
    if tail and line.startswith(tail):
        os.truncate(path, len(data) - len(tail))
    elif tail:  # somebody else's, who did not end it
        append(path, b"\n")
    if line.strip() not in (b"", *map(bytes.strip, data.splitlines())):  # also if line ends were changed
        append(path, line)


def replace(source, target):
    """os.replace that lasts: the folder is flushed to the disk, too."""
    os.replace(source, target)
    if os.name == "posix":  # elsewhere a folder can't be opened
        folder = os.open(Path(target).parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        except OSError:
            pass  # some network file systems can't
        finally:
            os.close(folder)


def _beside(path):
    """NAME.partPID, free to be made; what dead processes left there of the same NAME is deleted."""
    path = Path(path)
    for old in path.parent.glob(f"{_escape(path.name)}.part*") if path.parent.is_dir() else ():
        found = re.fullmatch(r"\.part(\d+)", old.name[len(path.name):])
        if found and (int(found[1]) == os.getpid() or not _alive(int(found[1]))):
            if old.is_dir() and not old.is_symlink():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.unlink(missing_ok=True)  # another process may be deleting it, too
    return path.with_name(f"{path.name}.part{os.getpid()}")


def _escape(name):
    return re.sub(r"([*?[])", r"[\1]", name)


def _alive(pid):
    if os.name != "posix":  # there, signal 0 would end it
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass  # somebody else's, or no way to know
    return True


def check_archive(path):
    """Read a file of torch.save once. ValueError or zipfile.BadZipFile: compressed, a checksum is wrong, or
    bytes stand before the archive.

    torch.save never compresses, so a compressed file could unpack to any size; and torch.load never looks
    at the checksums, so that a flipped bit would be another weight. Of two archives in one file zipfile
    reads the last, torch.load the first. Takes 0.6 s per GB.
    """
    with zipfile.ZipFile(path) as file:
        if min((entry.header_offset for entry in file.infolist()), default=0):
            raise ValueError("bytes before the archive")
        if sum(entry.file_size for entry in file.infolist()) > os.path.getsize(path):
            raise ValueError("compressed")
        if len(set(file.namelist())) < len(file.namelist()) or file.testzip():
            raise ValueError("a wrong checksum, or a name twice")
