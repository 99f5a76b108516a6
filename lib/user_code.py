"""Code of the user's: imported like any module, and kept from changing or ending the run."""
import contextlib
import importlib.util
import os
import re
import sys
import traceback
from pathlib import Path

import torch

from data.files import UserError
from lib import ranks
from lib.resume import Stopped


def folder():
    """The working folder; None: it has been deleted."""
    try:
        return os.getcwd()
    except OSError:
        return None


def go_to(path):
    try:
        os.chdir(path or ".")
    except OSError as error:
        if path:
            raise UserError(f"the working folder {path} is gone ({error.strerror})") from None


SETTINGS = [(torch.get_default_dtype, torch.set_default_dtype),
            (torch.get_default_device, lambda device: torch.set_default_device(None)),
            (torch.get_num_threads, torch.set_num_threads),
            (torch.is_grad_enabled, torch.set_grad_enabled),
            (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
            (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
            (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
            (lambda: (sys.stdout, sys.stderr), lambda both: vars(sys).update(stdout=both[0], stderr=both[1])),
            (folder, go_to),
            (lambda: ranks.COUNT, lambda count: setattr(ranks, "COUNT", count))]


def import_function(name, run=None):
    """The function in "FILE.py:FUNCTION". This runs the code in that file.

    Its folder joins sys.path, and the module gets the name that `import` would give it, or one with
    "reward_" before it where that is taken (model.py, torch.py), so that nothing of ours is shadowed.
    """
    path, _, function = name.rpartition(":")
    if not (Path(path).is_file() and path.endswith(".py")):
        why = f"and there is no such .py file {path!r}" if path else f"as in {name}:score"
        raise UserError(f"--reward {name}: expected FILE.py:FUNCTION, {why}")
    file = Path(path).resolve()
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    spec = importlib.util.spec_from_file_location(module_name(file), file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    with user_code(f"importing {path}", run):
        spec.loader.exec_module(module)
    if not callable(vars(module).get(function)):
        raise UserError(f"--reward {name}: {path} has no function {function!r}")
    return vars(module)[function]


def module_name(file):
    """The name by which `import` finds this file, or else a name that nothing has."""
    importlib.invalidate_caches()
    name = file.stem
    if name.isidentifier() and name not in sys.modules:
        spec = importlib.util.find_spec(name)
        if spec and spec.origin and Path(spec.origin).resolve() == file:
            return name
    return "reward_" + re.sub(r"\W", "_", name)


@contextlib.contextmanager
def user_code(what, run=None):
    """Around code of the user's: puts back what it changed for the whole process. When it fails or exits,
    its traceback is printed, the run saved, and a UserError says so (after Ctrl-C: exit with 130)."""
    kept = [(get, put, get()) for get, put in SETTINGS]
    ranks.COUNT = 1  # only the first process runs this, so what it calls of ours waits for no other
    try:
        yield
    except Stopped:  # by a signal that came meanwhile
        raise
    except BaseException as error:
        restore(kept)
        print_traceback(error)
        how = {SystemExit: "called sys.exit", KeyboardInterrupt: "was interrupted"}.get(
            type(error), f"raised {type(error).__name__}")
        sentence = f"{what} {how}{saved(run)}"
        if isinstance(error, KeyboardInterrupt):
            print(sentence, file=sys.stderr)
            sys.exit(130)
        raise UserError(sentence) from None
    finally:
        restore(kept)
        if run:
            run.take_signals()


def saved(run):
    """Save the run, if there is one; the rest of a sentence that says how to go on."""
    return f"; {run.save_now()}" if run else ""


def restore(kept):
    for get, put, value in kept:
        if get() != value:
            put(value)


def print_traceback(error):
    """Print an exception's traceback from the user's own code on."""
    at, ours = error.__traceback__, (str(Path(__file__).parent), "<frozen importlib")
    while at and at.tb_frame.f_code.co_filename.startswith(ours):
        at = at.tb_next
    traceback.print_exception(type(error), error, at)
