"""Output that never decides about a run: what can't be printed is dropped, and the run goes on."""
import os
import re
import sys

# control characters but for newline and tab, and those that turn the direction of text around
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def visible(text):
    """A model's text for a terminal, which would obey control characters: they are written out ("\\x1b")."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class Harmless:
    """A text stream whose writes never fail: on a closed pipe or a full disk the rest is dropped.

    tame: it is a terminal for models' texts, so they pass `visible`; a file gets what the model wrote.
    """

    def __init__(self, stream, tame=False):
        self.stream, self.tame = stream, tame

    def write(self, text):
        self._try(self.stream.write, visible(text) if self.tame else text)
        return len(text)

    def flush(self):
        self._try(self.stream.flush)

    def _try(self, function, *args):
        try:
            function(*args)
        except (OSError, ValueError):  # ValueError: closed
            try:  # what is still in the buffer, and all that comes, goes nowhere
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            except (OSError, ValueError):
                pass

    def __getattr__(self, name):
        return getattr(self.stream, name)


def make_harmless():
    """Call first: guard stdout and stderr, print "?" for what an encoding lacks, and open /dev/null where
    descriptors 0 to 2 are closed, so that no file of ours gets one of them."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest that is free: this one
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
        setattr(sys, name, Harmless(stream, tame=name == "stdout" and stream.isatty()))
