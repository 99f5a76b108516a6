"""Exact resume: a run that was killed and resumed ends as if it had never stopped.

On the same CPU with as many threads it ends with the same bits: weights, optimizer and log
(tests/test_resume.py).
"""
import dataclasses
import os
import signal
import sys
import zlib
from pathlib import Path

import torch

from data.files import UserError
from lib.checkpoint import keep_previous, save, unpickle, write
from lib.common import Log


class Run:
    """One run of a script, its log, saved state and result, in the order in which things must happen:

        run = Run("sft", cfg, files, device)       # first of all: refuses a --resume that does not fit
        done = run.begin(steps, gpt=gpt, ...)      # opens the log, fills the parts from the saved state
        run.log(step, loss=loss); run.after(step)  # at each step
        run.finish(gpt, tokenizer, {"loss": ...})  # writes out/sft.pt and the report, marks the run finished

    `files` are all that the run reads: resuming with different data, flags or device is refused, for the
    rest of the run would not fit its beginning. At the end NAME.finished.pt replaces NAME.state.pt.
    """

    def __init__(self, name, cfg, files, device):
        out = Path(cfg.out)
        self.cfg, self.caught = cfg, 0
        self.result, self.log_path = out / f"{name}.pt", out / f"{name}.jsonl"
        self.path, self.finished = out / f"{name}.state.pt", out / f"{name}.finished.pt"
        self.start = {"--" + name.replace("_", "-"): x for name, x in dataclasses.asdict(cfg).items()
                      if name not in ("out", "resume", "save_every", "show",
                                      "checkpoint_activations")}  # these change no result
        self.start["--device"] = f"{device} on a machine with {torch.cuda.device_count()} GPUs"
        self.start |= {os.path.relpath(file, out): checksum(file) for file in files if file}
        self.saved = self._find() if cfg.resume else None

    def _find(self):
        path = self.finished if self.finished.exists() else self.path
        if not path.exists():
            raise UserError(f"--resume: there is no {path} to resume from; drop --resume")
        saved = unpickle(path, {"start", "step"}, "saved state", mmap=False)
        was = [f"{name} was {saved['start'].get(name)}" for name, x in self.start.items()
               if saved["start"].get(name) != x]
        if was:
            raise UserError(f"--resume: the run in {path} was started with different settings: "
                            f"{', '.join(was)}")
        if path == self.finished:
            print(f"{path}: this run has finished; drop --resume to start a new one")
            sys.exit(0)
        return saved

    def begin(self, steps, **parts):
        """Open the log and fill `parts` from the saved state, if any; returns the number of steps done.

        A part is a model, an optimizer, a generator, or a list or dict of plain numbers.
        """
        saved, self.saved = self.saved, None
        self.log = Log(self.log_path, self.cfg, steps, saved)
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
            why = str(error).splitlines()[-1].strip()
            raise UserError(f"{self.path} does not fit this model.py ({why})") from None
        print(f"resuming after step {saved['step']} of {steps}")
        return saved["step"]

    def after(self, step):
        """Call after every step: saves when due, exits if a signal asked for it."""
        stop, every, steps = self.caught, self.cfg.save_every, self.log.steps  # once: a signal may come
        if stop or every and (step == steps or step % every == 0):
            os.fsync(self.log.file.fileno())
            parts = {name: get_state(part) for name, part in self.parts.items()}
            write(self.path, {"start": self.start, "step": step, "log": self.log.file.tell(), "parts": parts})
        if stop:
            print(f"stopped after step {step} of {steps}; rerun with --resume to continue")
            sys.exit(128 + stop)
        self.step = step

    def _stop(self, number, frame):
        self._restore_handlers()  # a second signal stops at once
        if self.step == self.log.steps:  # no step is left to finish
            sys.exit(128 + number)
        self.caught = number
        os.write(2, b"\nfinishing this step\n")  # print is not safe in a signal handler

    def _restore_handlers(self):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def finish(self, model, tokenizer, *reports):
        """Write the result, then each report (a dict of numbers) into the log, then mark the run finished."""
        save(self.result, model, tokenizer)
        for numbers in reports:
            self.log.report(**numbers)
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
