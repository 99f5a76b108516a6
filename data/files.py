"""Files: errors a user can act on, strict JSON, atomic writes, no archives that unpack to fill the memory."""
import json
import os
import re
import shutil
import zipfile
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """A mistake in what the user gave us. Scripts print it as one sentence and exit with 1."""


def json_object(line):
    """JSON bytes -> dict. UserError: not UTF-8, not JSON, not an object, a duplicate key."""
    try:
        row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_unique_keys)
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
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path):
    """A new folder to fill, as a Path; it takes the place of `path`, which must be absent or empty."""
    beside = _beside(path)
    try:
        beside.mkdir(parents=True)
        yield beside
        os.replace(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _beside(path):
    """NAME.partPID, free to be made; what dead processes left there of the same NAME is deleted."""
    path = Path(path)
    for old in path.parent.glob(f"{_escape(path.name)}.part*") if path.parent.is_dir() else ():
        found = re.fullmatch(r"\.part(\d+)", old.name[len(path.name):])
        if found and (int(found[1]) == os.getpid() or not _alive(int(found[1]))):
            shutil.rmtree(old, ignore_errors=True) if old.is_dir() and not old.is_symlink() else old.unlink()
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


def check_stored(path):
    """ValueError: the zip file holds more than its own size, so it is compressed.

    torch.save never compresses; a compressed file could unpack to any size and fill the memory.
    """
    with zipfile.ZipFile(path) as file:
        if sum(entry.file_size for entry in file.infolist()) > os.path.getsize(path):
            raise ValueError("compressed")
