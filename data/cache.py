"""Cache: arrays that were made from a JSONL file, kept beside it in FOLDER, and mapped from then on.

An entry is a zip file of plain arrays, each with a checksum: no pickle, nothing compressed. Its key says what
it was made from: the bytes of the JSONL file, how they are read, this code and its libraries, and whatever
else the caller adds. An entry with another key, or a damaged one, is made anew, in its place, by one process
at a time; the folder can be deleted at any time, also while it is used.
"""
import hashlib
import io
import json
import mmap
import os
import sys
import zipfile
import zlib
from contextlib import contextmanager, redirect_stdout, suppress
from importlib.metadata import version
from pathlib import Path

import numpy as np

from data.files import UserError, atomic_file, printable

try:
    import fcntl
except ImportError:  # Windows: two processes make an entry each
    fcntl = None

FOLDER = ".onetrunk-cache"
PATH = "\0"  # stands for the file's in what was printed, as a folder may be moved


class Entry(dict):
    """{name: array}, mapped from a file; `said` is what was printed when they were made."""

    def forget(self):
        """Give back the memory of what was read of the file; it is read again when it is needed."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.mapping.madvise(mmap.MADV_DONTNEED)


def digest(*parts):
    """SHA-256, in hex, of what the parts say; a Path stands for the bytes of its file."""
    whole = hashlib.sha256()
    for part in parts:
        one = hashlib.sha256()
        if isinstance(part, Path):
            with open(part, "rb") as file:
                while data := file.read(2**20):
                    one.update(data)
        else:
            one.update(part if isinstance(part, bytes) else repr(part).encode())
        whole.update(one.digest())
    return whole.hexdigest()


def code():
    """What else all arrays depend on: this code, Python and its libraries."""
    libraries = map(version, ("tiktoken", "regex"))
    return digest(*sorted(Path(__file__).parent.glob("*.py")), sys.version, *libraries)


def cached(path, what, key, make):
    """The Entry `what` of a JSONL file, as it is there with this key, or else by make(write), which calls
    write(name, pieces) for each; what it prints is printed each time. None: it can't be written."""
    file, name = path.parent / FOLDER / f"{path.stem}.{what}.zip", printable(path)
    try:
        found = _load(file, key)
        if not found:
            file.parent.mkdir(exist_ok=True)
            with _turn(file.parent):  # while it waited, another process may have made it
                found = _load(file, key) or _store(file, key, make, name)
    except OSError:
        return None  # what make has printed is lost: whoever does without the entry says it again
    print(found.said.replace(PATH, name), end="")
    return found


@contextmanager
def _turn(folder):
    """Inside, no other process makes an entry in this folder: it waits, where the file system has locks."""
    held = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        with suppress(OSError):
            fcntl and fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        fcntl and os.close(held)


def _store(file, key, make, name):
    """Make and write an entry; returns it, loaded. OSError: it can't be written, or read back."""
    said, places = io.StringIO(), {}
    try:
        with redirect_stdout(said), atomic_file(file) as out, zipfile.ZipFile(out, "w") as archive:
            def write(array, pieces):
                with archive.open(array, "w", force_zip64=True) as member:
                    start, n = out.tell(), 0
                    for x in pieces:
                        member.write(x.data)
                        n += len(x)
                places[array] = x.dtype.str, n, start

            make(write)
            about = {"key": key, "said": said.getvalue().replace(name, PATH), "places": places}
            archive.writestr("about", json.dumps(about))
    except UserError:  # a mistake in the file, for which this was said before
        print(said.getvalue(), end="")
        raise
    if found := _load(file, key):
        return found
    raise OSError(f"{file} can't be read back")


def _load(file, key):
    """An Entry; None: there is none, it has another key, or it is damaged."""
    try:
        with open(file, "rb") as raw, zipfile.ZipFile(raw) as archive:
            about = json.loads(archive.read("about"))
            first = min(member.header_offset for member in archive.infolist())  # else `places` are others
            if about["key"] != key or first or archive.testzip():
                return None
            mapping = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)
            entry = Entry((name, np.frombuffer(mapping, *place)) for name, place in about["places"].items())
            entry.mapping, entry.said = mapping, about["said"]
            return entry
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, zlib.error, EOFError,
            zipfile.BadZipFile):  # what a damaged file may lead to
        return None
