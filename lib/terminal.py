"""Terminal: keys as they are pressed, and two texts side by side."""
import os
import shutil
import sys
import textwrap
import unicodedata
from contextlib import contextmanager
from itertools import zip_longest

from data.files import UserError

try:
    import termios
    import tty
except ImportError:  # Windows: a key needs Enter there
    termios = None


@contextmanager
def single_keys():
    """ask(text) -> the key that is pressed once the text is shown, "" at the end of the input.

    On a terminal, what was typed before and the bytes of a special key (an arrow's hold digits) are no keys.
    Else the characters of the standard input that are no blanks are taken one by one.
    """
    if sys.stdin is None:
        raise UserError("there is no open standard input to read keys from")
    if not (termios and sys.stdin.isatty()):
        def ask(text):
            print(text, end="", flush=True)
            return next((key for key in iter(lambda: sys.stdin.read(1), "") if not key.isspace()), "")
        yield ask
        return
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)

    def ask(text):
        termios.tcflush(fd, termios.TCIFLUSH)
        print(text, end="", flush=True)
        pressed = os.read(fd, 100)
        return "?" if len(pressed) > 1 else pressed.replace(b"\x04", b"").decode(errors="replace")
    try:
        tty.setcbreak(fd)
        yield ask
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def wrapped(text, width=None):
    """Lines of at most `width` characters; None: of the terminal's."""
    width = width or shutil.get_terminal_size().columns - 1
    return [line for part in text.splitlines() for line in textwrap.wrap(part, width) or [""]]


def side_by_side(left, right):
    """Lines of the terminal with two texts in columns; one above the other where it is narrow, or letters are
    wide or run from right to left, so that columns could change places."""
    width = shutil.get_terminal_size().columns - 1
    beside = width >= 60 and all(unicodedata.bidirectional(c) not in ("R", "AL") and
                                 unicodedata.east_asian_width(c) not in "WF" for c in left + right)
    half = (width - 3) // 2 if beside else max(20, width)
    a, b = wrapped(left, half), wrapped(right, half)
    return [f"{x:{half}} | {y}" for x, y in zip_longest(a, b, fillvalue="")] if beside else [*a, "", *b]
