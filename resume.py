"""Exact resume: what a run saves so that it can go on as if it had never stopped.

A script makes a State before it reads anything, calls `begin` before its first step, `after` at the end of
each, `finish` at the end of all. On the same CPU with as many threads, a run that was killed and resumed
ends with the same bits as one that was not: weights, optimizer and log (tests/test_resume.py).
"""
import dataclasses
import os
import signal
import sys
import zlib
from pathlib import Path

import torch

from checkpoint import keep_previous, unpickle, write
from data.records import UserError


class State:
    """What a run needs to go on exactly where it stopped: saved every few steps, and when it is stopped.

    `files` are all that the run reads: with others, with other flags or on another device its rest would
    not fit its beginning, so that is refused. NAME.finished.pt takes the place of NAME.state.pt at the end.
    """

    def __init__(self, path, cfg, files, device):
        self.path, self.every, self.caught = path, cfg.save_every, 0
        self.finished = path.with_name(path.name.replace("state", "finished"))
        self.start = {"--" + name.replace("_", "-"): x for name, x in dataclasses.asdict(cfg).items()
                      if name not in ("out", "resume", "save_every", "show",
                                      "checkpoint_activations")}  # these change no result
        self.start["--device"] = f"{device} on a machine with {torch.cuda.device_count()} GPUs"
        self.start |= {os.path.relpath(file, path.parent): checksum(file) for file in files if file}
        self.saved = self._find() if cfg.resume else None

    def _find(self):
        path = self.finished if self.finished.exists() else self.path
        if not path.exists():
            raise UserError(f"--resume: there is no {path} to go on from; leave --resume out")
        saved = unpickle(path, {"start", "step"}, "saved state", mmap=False)
        was = [f"{name} was {saved['start'].get(name)}" for name, x in self.start.items()
               if saved["start"].get(name) != x]
        if was:
            raise UserError(f"--resume: the run in {path} was started otherwise: {', '.join(was)}")
        if path == self.finished:
            print(f"{path}: this run is finished; to begin a new one leave --resume out")
            sys.exit(0)
        return saved

    def begin(self, log, **parts):
        """Fill `parts` from the saved state, if there is one; returns the number of steps it has done.

        A part is a model, an optimizer, a generator, or a list or dict of plain numbers.
        """
        self.log, saved, self.saved = log, self.saved, None
        self.step = saved["step"] if saved else 0
        generators = (torch.default_generator, *torch.cuda.default_generators)
        self.parts = parts | {f"rng{i}": generator for i, generator in enumerate(generators)}
        self.handlers = {n: signal.signal(n, self._stop) for n in (signal.SIGINT, signal.SIGTERM)}
        if saved is None:
            self.finished.unlink(missing_ok=True)
            keep_previous(self.path)
            return 0
        try:
            for name, part in self.parts.items():
                set_state(part, saved["parts"][name])
        except (RuntimeError, ValueError, LookupError) as error:
            raise UserError(f"{self.path} does not fit this model.py ({str(error).splitlines()[-1].strip()})")
        print(f"going on after step {saved['step']} of {log.steps}")
        return saved["step"]

    def after(self, step):
        """To be called at the end of every step: saves when it is time, and stops when it was asked to."""
        stop, last = self.caught, step == self.log.steps  # read once: a signal may come at any moment
        if stop or self.every and (last or step % self.every == 0):
            os.fsync(self.log.file.fileno())
            parts = {name: get_state(part) for name, part in self.parts.items()}
            write(self.path, {"start": self.start, "step": step, "log": self.log.file.tell(), "parts": parts})
        if stop:
            print(f"stopped after step {step} of {self.log.steps}: the same command with --resume goes on")
            sys.exit(128 + stop)
        self.step = step

    def _stop(self, number, frame):
        self._restore_handlers()  # so once more stops at once
        if self.step == self.log.steps:  # no step is left to finish
            sys.exit(128 + number)
        self.caught = number
        os.write(2, b"\nfinishing this step\n")  # print may not be used in a signal handler

    def _restore_handlers(self):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def finish(self):
        """To be called when the result is written."""
        write(self.finished, {"start": self.start, "step": self.log.steps})
        self.path.unlink(missing_ok=True)
        self._restore_handlers()


def checksum(path):
    if not os.path.isfile(path):
        return None
    crc = 0
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            crc = zlib.crc32(piece, crc)
    return f"a file with CRC {crc:x}"


def get_state(part):
    if isinstance(part, (list, dict)):
        return part
    return part.get_state() if isinstance(part, torch.Generator) else part.state_dict()


def set_state(part, state):
    if isinstance(part, list):
        part[:] = state
    elif isinstance(part, dict):
        part.update(state)
    else:
        (part.set_state if isinstance(part, torch.Generator) else part.load_state_dict)(state)
