"""Exact resume: a run that was killed and resumed ends as if it had never stopped.

On the same CPU with as many threads it ends with the same bits: weights, optimizer and log
(tests/test_resume.py).
"""
import copy
import dataclasses
import math
import os
import signal
import sys
import weakref
import zlib
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from data.files import UserError, json_object, replace
from lib import ranks
from lib.checkpoint import (
    agrees,
    check_finite,
    keep_previous,
    previous,
    probe,
    save,
    unpickle,
    write,
    write_lines,
)
from lib.common import Log
from lib.fast import product
from lib.state import check_state, get_state, set_state

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder are not noticed there
    fcntl = None


class Stopped(SystemExit):
    """A signal ends the run: what code of the user's must not be blamed for."""


class Run:
    """One run of a script, its log, saved state and result, in the order in which things must happen:

        run = Run("sft", cfg, files, device)       # first of all: refuses a --resume that does not fit
        done = run.begin(cfg, steps, gpt=gpt, ...) # opens the log, fills the parts from the saved state
        run.log(step, loss=loss); run.after(step)  # at each step
        run.finish(gpt, tokenizer, {"loss": ...})  # writes out/sft.pt and the report, marks the run finished

    `files` are all that the run reads: resuming with different data, flags or device is refused, for the
    rest of the run would not fit its beginning. Until a run is finished, its log and state are
    NAME.state.jsonl and NAME.state.pt; then they become the generation NAME.pt, NAME.log.jsonl,
    NAME.finished.pt, and the one before it moves to NAME.prev.pt, and so on.
    """

    def __init__(self, name, cfg, files, device):
        if not cfg.out:
            raise UserError("--out is empty: name a folder")
        out = Path(cfg.out)
        self.cfg, self.caught, self.step, self.handlers = cfg, 0, None, {}
        self.idle = False
        self.result, self.log_path, self.finished = (
            out / f"{name}{end}" for end in (".pt", ".log.jsonl", ".finished.pt"))
        self.path, self.running_log = out / f"{name}.state.pt", out / f"{name}.state.jsonl"
        self.samples, self.best, self.diverged = (
            out / f"{name}.{end}" for end in ("samples.jsonl", "best.pt", "diverged.pt"))
        self.critic = out / "critic.pt"  # PPO's
        self._refuse_own_files(files)
        self.lock = None if ranks.RANK else lock(out)
        free = ("out", "resume", "save_every", "show", "save_critic", "checkpoint_activations",  # no result
                "sft", "rm")  # files, which have a checksum below
        self.start = {"--" + name.replace("_", "-"): x for name, x in dataclasses.asdict(cfg).items()
                      if name not in free}
        self.start["--device"] = f"{device} on a machine with {torch.cuda.device_count()} GPUs"
        real = partial(os.path.relpath, start=os.path.realpath(out))  # a path, however it is spelled
        self.start |= {name: real(os.path.realpath(x)) for name, x in self.start.items()
                       if name in ("--data", "--init", "--judge", "--tokenizer") and os.path.exists(x)}
        self.start |= {real(os.path.realpath(file)): checksum(file) for file in files if file}
        self.saved = self._find() if cfg.resume else None

    def _refuse_own_files(self, files):
        """UserError: the run would read what it writes or moves."""
        ours = [self.result, self.log_path, self.finished, self.path, self.running_log, self.samples,
                self.best, self.diverged, self.critic]
        ours = {os.path.realpath(path): path for path in [*ours, *map(previous, ours)]}
        for file in filter(None, files):
            if path := ours.get(os.path.realpath(file)):
                raise UserError(f"{file} is read by this run, and {path} is written by it: "
                                "choose another --out")

    def _find(self):
        """The saved state; exits if the run has finished. UserError: there is none, or another run's."""
        if not self.path.exists() and not self.finished.exists():
            raise UserError(f"--resume: there is no {self.path} to resume from; drop --resume")
        path = self.path if self.path.exists() else self.finished
        saved = unpickle(path, {"start", "step"}, "saved state", mmap=False)
        if not says_plainly(saved):
            raise UserError(f"{path} is not an onetrunk saved state, or is corrupt")
        new = {"--" + field.name.replace("_", "-"): field.default for field in dataclasses.fields(self.cfg)}
        start = new | saved["start"]  # of a flag that there was not yet, a state knows nothing
        was = [f"{name} was {start.get(name, 'not read')!s:.200}" for name, x in self.start.items()
               if start.get(name) != x]
        if was:
            raise UserError(f"--resume: the run in {path} was started with different settings: "
                            f"{', '.join(was)}")
        if self.finished.exists() and (path == self.finished or self._was_finished(saved)):
            if ranks.COUNT == 1:  # else another process may be about to read it
                self.path.unlink(missing_ok=True)
            print(f"{self.finished}: this run has finished; drop --resume to start a new one")
            sys.exit(0)
        return saved

    def _was_finished(self, saved):
        """Whether a state is what a kill at the very end of `finish` left behind."""
        last = unpickle(self.finished, {"start", "step"}, "saved state", mmap=False)
        return says_plainly(last) and (last["start"], last["step"]) == (saved["start"], saved["step"])

    def begin(self, cfg, steps, **parts):
        """Open the log and fill `parts` from the saved state, if any; returns the number of steps done.

        cfg goes into the log: the run's, with the flags that nobody gave filled in.

        A part is a model, an optimizer, a generator, a dict of plain numbers, or has state_dict and
        load_state_dict, which raises ValueError for what it can't continue from.
        """
        saved, self.saved, self.dropout = self.saved, None, getattr(cfg, "dropout", 0)
        generators = (torch.default_generator, *torch.cuda.default_generators)
        self.parts = parts | {f"rng{i}": generator for i, generator in enumerate(generators)}
        with ranks.first_goes_ahead():
            if saved:
                self._restore(saved, steps, cfg)
            elif self.path.exists() and not ranks.RANK:  # else the log of an unfinished run is worth nothing
                keep_previous(self.running_log)
                keep_previous(self.path)
            self.log = Log(self.running_log, cfg, saved["steps"] if saved else steps, saved)
        self.step = self.saved_step = saved["step"] if saved else 0
        self.handlers = {n: signal.getsignal(n) for n in stop_signals()}
        self.take_signals()
        if hasattr(os, "register_at_fork"):
            # what code of the user's forks must end at a signal: multiprocessing's pools wait for that, and a
            # child that waits for a lock may not come to a handler of Python's
            back = weakref.WeakMethod(self._restore_handlers)
            os.register_at_fork(after_in_child=lambda: back() and back()())
        if saved:
            print(f"resuming after step {self.step} of {steps}")
            for name, count in counts().items():
                if type(were := saved.get(name)) is type(count) and were != count:
                    of = "number of " * (type(count) is int)
                    print(f"with another {of}{name} than before ({were!s:.20}) it rounds in another way, so "
                          "it will not end with the same bits")
        self._remember()
        self._seed_dropout()
        return self.step

    def _restore(self, saved, steps, cfg):
        """Check the whole saved state, then load it. UserError: it is not a state of this run."""
        if self.dropout and (were := saved.get("processes", 1)) != ranks.COUNT:
            raise UserError("--resume: what dropout drops depends on the number of processes; the run in "
                            f"{self.path} was started with {were!s:.9}, and this is {ranks.COUNT}")
        log, step = saved.get("log") or {}, saved.get("logged")
        if not (ranks.RANK or self.running_log.exists()) and fingerprint(self.log_path, log) == log:
            replace(self.log_path, self.running_log)  # killed within `finish`
        if fingerprint(self.running_log, log) != log:
            raise UserError(f"--resume: {self.running_log} is missing, or is not the log of that run")
        self._check_rules(cfg)
        try:
            ends = saved.setdefault("steps", steps)
            if (step != saved["step"] or type(ends) is not int or not step <= ends <= steps
                    or saved["parts"].keys() != self.parts.keys()):
                raise ValueError(f"step {saved['step']} of {steps}, parts {', '.join(saved['parts'])}")
            for name, part in self.parts.items():
                check_state(part, saved["parts"][name], name)
            probes = saved.get("probes", {})
            for name, part in self.parts.items():
                set_state(part, saved["parts"][name])
                if name in probes and not agrees(part, probes[name]):
                    raise ValueError(f"it was saved by another model.py: the same weights of {name} give "
                                     "other outputs here")
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            why = (str(error).splitlines() or [type(error).__name__])[-1].strip()
            raise UserError(f"{self.path} does not fit this run ({why:.300})") from None

    def _check_rules(self, cfg):
        """UserError: a flag that nobody gave has another value than the run began with, as data/rules.py has
        changed since. What the log's first line does not name was not there yet, and so off."""
        with open(self.running_log, "rb") as file:
            line = json_object(file.readline())
        was = line.get("config") if isinstance(line.get("config"), dict) else {}
        changed = [f"--{field.name.replace('_', '-')} was {was.get(field.name)!s:.50}, is {value}"
                   for field in dataclasses.fields(cfg) if field.default is None
                   if (value := getattr(cfg, field.name) or 0) != (was.get(field.name) or 0)]
        if changed:
            raise UserError(f"--resume: the rules for flags have changed since the run in {self.path} began: "
                            f"{', '.join(changed)}; go on with that version, or drop --resume")

    def after(self, step, last=False):
        """Call after every step: saves when due and at the last one, exits if a signal asked for it, here or
        in another process. last: the run ends earlier than was planned."""
        if last and step < self.log.steps:
            print(f"it ends here, {self.log.steps - step} steps early: on held-out data it was getting worse")
            self.log.steps = step
        stop, every, steps = int(ranks.total(self.caught, "MAX")), self.cfg.save_every, self.log.steps  # once
        try:
            if stop or step == steps or every and step % every == 0:
                self._check_alike(step)
                self.save_state(step)
        except UserError as error:
            if stop or step < steps:
                raise
            print(f"warning: {error}; the run goes on to its result, which takes less")
        if stop:
            print(f"stopped after step {step} of {steps}; rerun with --resume to continue")
            sys.exit(128 + stop)
        self.step = step
        self._remember()
        self._seed_dropout()

    def _check_alike(self, step):
        """UserError: of several processes, not all have the same weights to the bit."""
        if ranks.COUNT == 1:
            return
        models = [part for part in self.parts.values() if isinstance(part, torch.nn.Module)]
        sums = torch.stack([p.double().sum() for model in models for p in model.parameters()])
        if not torch.equal(ranks.total(sums, "MAX"), -ranks.total(-sums, "MAX")):
            raise UserError(f"step {step}: the processes' weights are no longer the same: does model.py or "
                            "the loss draw random numbers of its own?")

    def _seed_dropout(self):
        """With several processes: other rows, so other random numbers, known from the step alone."""
        if ranks.COUNT > 1 and self.dropout:
            torch.manual_seed((self.cfg.seed + self.step * ranks.COUNT + ranks.RANK) % 2**63)

    def _remember(self):
        """What `save_now` can't read off later: the small parts as they are between two steps."""
        self.between = {name: copy.deepcopy(get_state(part)) for name, part in self.parts.items()
                        if not isinstance(part, (torch.nn.Module, torch.optim.Optimizer))}
        self.logged = self.log.file.tell()

    def save_now(self):
        """Save the last whole step, from within the next one but before that changes a weight; returns
        the end of a sentence about it."""
        if self.step is None:
            return "nothing is lost, --resume continues" if self.cfg.resume else "no step had been taken yet"
        self.save_state(self.step, self.logged, self.between)
        return f"step {self.step} of {self.log.steps} is saved; rerun with --resume to continue"

    def save_state(self, step, logged=None, between=()):
        """Write the state from which --resume continues. UserError: the weights are not finite."""
        for part in self.parts.values():
            if isinstance(part, torch.nn.Module):
                check_finite(part, f"step {step}")
        if ranks.RANK:
            self.saved_step = step
            return
        os.fsync(self.log.file.fileno())
        write(self.path, {"start": self.start, **counts(),
                          "step": step, "steps": self.log.steps, "logged": step,
                          "log": fingerprint(self.running_log, {"size": logged or self.log.file.tell()}),
                          "probes": {name: probe(part) for name, part in self.parts.items()
                                     if isinstance(part, torch.nn.Module)},
                          "parts": {name: between[name] if name in between else get_state(part)
                                    for name, part in self.parts.items()}})
        self.saved_step = step

    @contextmanager
    def between_steps(self):
        """Inside, nothing is learned: a signal ends the run at once, with the last step saved."""
        self.idle = True
        try:
            yield
        except (Stopped, UserError) as error:
            if isinstance(error, (Stopped, ranks.Gone)) and self.step < self.log.steps:
                print(f"stopped: {self.save_now()}")
            raise
        finally:
            self.idle = False

    def _stop(self, number, frame):
        self._restore_handlers()  # a second signal stops at once
        if self.step == self.log.steps:  # no step is left to finish
            if self.saved_step != self.step:  # nor is the last one saved, on a full disk: write the result
                return tell("\nwriting the result; once more to stop\n")
            tell(f"\nthe training is done and saved in {self.path}; rerun with --resume to finish\n")
            raise Stopped(128 + number)
        if self.idle:
            raise Stopped(128 + number)
        self.caught = number
        tell("\nfinishing this step\n")

    def take_signals(self):
        """Also anew, after code that may have taken them; but not what was given back."""
        for number in self.handlers:
            signal.signal(number, self._stop)

    def _restore_handlers(self):
        handlers, self.handlers = self.handlers, {}
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def save_diverged(self, best, tokenizer):
        """Write the weights that lib.curve.Best holds, if any, where no result is; the end of a sentence."""
        if ranks.RANK or not best.now["step"]:
            return ""
        save(self.diverged, best.copy, tokenizer, "other")
        return f"; {self.diverged} is the policy after update {best.now['step']}, the best before that"

    def finish(self, model, tokenizer, *reports, samples=(), best=None, critic=None):
        """Write the reports (dicts of numbers) into the log, then put result, samples (dicts, if any), best
        (a lib.curve.Best, if any), critic (if any; PPO has both, or best alone), log and mark in place of the
        earlier generation. A kill at any moment leaves a whole generation or a state to resume from."""
        if ranks.RANK:
            return
        for numbers in reports:
            self.log.report(**numbers)
        os.fsync(self.log.file.fileno())
        # a mark that belongs to the result says that this is another generation, be it equal; else a result
        # that is equal is our own, of a `finish` that was killed
        keep = "any" if self._marked() else "other"
        save(self.result, model, tokenizer, keep)
        if samples:
            write(self.samples, samples, keep, write_lines)
        if best and best.now["step"]:
            save(self.best, best.copy, tokenizer, keep)
            print(f"{self.best}: the policy after update {best.now['step']}, the best by held-out score "
                  "within the KL budget")
        elif best:
            keep_previous(self.best)
        if critic:
            save(self.critic, critic, tokenizer, keep)
        elif best:  # of an earlier run, and no other run's beside this policy
            keep_previous(self.critic)
        keep_previous(self.finished)
        keep_previous(self.log_path)
        replace(self.running_log, self.log_path)
        write(self.finished, {"start": self.start, "step": self.log.steps, "result": checksum(self.result)})
        self._restore_handlers()
        self.path.unlink(missing_ok=True)

    def _marked(self):
        """Whether the mark of a finished run is there, and is that of the result that is there."""
        if not (self.finished.exists() and self.result.exists()):
            return False
        try:
            mark = unpickle(self.finished, {"start"}, "saved state", mmap=False)
        except UserError:  # corrupt, which must not keep the new result from being written
            return False
        return mark.get("result") == checksum(self.result)


def counts():
    """What rounding depends on."""
    return {"threads": torch.get_num_threads(), "processes": ranks.COUNT, "product": product()}


def says_plainly(saved):
    """Whether a state or mark has settings and a step, which can be compared and printed."""
    start, step = saved["start"], saved["step"]
    return type(start) is dict and type(step) is int and step >= 0 and all(
        type(x) in (str, int, float, bool, type(None)) for x in start.values())


def lock(out, flag="--out"):
    """An open file that holds the folder `out` for this process; the kernel releases it when that ends.

    A record lock, which forked children do not inherit. UserError: another process holds it; flag: which
    named the folder.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        file = open(out / ".lock", "r+", opener=lambda path, _: os.open(path, flags, 0o666))
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{flag} {out}: there is a file of that name, or one above it is no folder") from None
    except OSError as error:
        raise UserError(f"{flag} {out}: can't be written ({error.strerror})") from None
    if fcntl:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise UserError(f"{flag} {out} is in use by process {file.read(20).strip() or '?'}; wait for it, "
                            f"or choose another {flag}") from None
        except OSError:
            return file  # a file system without locks
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
    return file


def stop_signals():
    """The signals that end a run after the step, but for those that it was started to ignore (nohup, &)."""
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    return [n for n in numbers if signal.getsignal(n) is not signal.SIG_IGN]


def tell(text):
    """Write to stderr from within a signal handler, where print is not safe; never into a file of ours."""
    if ranks.RANK:
        return
    try:
        os.write(sys.__stderr__.fileno(), text.encode())
    except (AttributeError, OSError, ValueError):
        pass  # closed


def checksum(path):
    if not os.path.isfile(path):
        return None
    return f"a file with CRC {crc(path, None):x}"


def fingerprint(path, saved):
    """{"size", "crc"} of the first saved["size"] bytes of a log; None: it is missing, or shorter."""
    size = saved.get("size") if type(saved) is dict else None
    if type(size) is not int or not os.path.isfile(path) or not 0 <= size <= os.path.getsize(path):
        return None
    return {"size": size, "crc": crc(path, size)}


def crc(path, size):
    """CRC-32 of a file's first `size` bytes; None: of all."""
    found, left = 0, math.inf if size is None else size
    with open(path, "rb") as file:
        while piece := file.read(int(min(2**20, left))):
            found, left = zlib.crc32(piece, found), left - len(piece)
    return found
