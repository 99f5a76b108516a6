"""One page of plumbing: command line, device, batches, learning rate, log; checkpoints by checkpoint.py."""
import argparse
import ctypes
import dataclasses
import inspect
import itertools
import json
import math
import os
import re
import sys
import time
from pathlib import Path

import torch

from checkpoint import keep_previous, load, load_tokenizer, save  # noqa: F401, for all scripts
from data.records import UserError

def run(main, Config):
    """Read the command line into Config, call main, print a user's mistake as one sentence, exit 1."""
    source = inspect.getsource(Config)
    notes = dict(re.findall(r"^    (\w+): .*?#\s*(.+)$", source, re.M))  # a field's comment is its help
    doc = sys.modules[main.__module__].__doc__
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Config):
        how = ({"action": "store_true"} if field.type is bool
               else {"type": field.type, "metavar": field.name.upper()})
        help = f"{notes.get(field.name, '')} (default {field.default!r})".replace("%", "%%")
        parser.add_argument("--" + field.name.replace("_", "-"), default=field.default, help=help, **how)
    cfg = Config(**vars(parser.parse_args()))
    keep_memory()
    try:
        check_numbers(cfg)
        main(cfg)
    except KeyboardInterrupt:  # before the first step, or pressed once more
        sys.exit(130)
    except torch.cuda.OutOfMemoryError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {str(error).splitlines()[0][:200]} Try a smaller "
                 "--micro-batch or --checkpoint-activations; `python bench.py --plan` counts what PPO takes")
    except (UserError, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


LIMITS = {"seed": (0, 2**63 - 1), "dropout": (0, 0.99), "lam": (0, 1), "block_size": (2, 2**31),
          "no_eos_score": (-1e9, 1e9), "clip": (0, math.inf), "update_kl": (0, math.inf)}
LIMITS |= dict.fromkeys(("lr", "critic_lr", "weight_decay", "save_every", "kl_coef", "kl_target", "ptx_coef",
                         "show", "wide_gap"), (0, 1e9))


def check_numbers(cfg):
    """UserError: a number of the command line is nan or outside of LIMITS; the others lie above 0."""
    for name, x in vars(cfg).items():
        low, high = LIMITS.get(name, (1 if type(x) is int else 1e-9, 2**31))
        if type(x) in (int, float) and not low <= x <= high:
            raise UserError(f"--{name.replace('_', '-')} {x} must lie between {low} and {high}")


def keep_memory():
    """Have glibc keep large blocks that were freed, unless MALLOC_... variables say what it is to do.

    By default they go back to the system, which clears them page by page when they are wanted again: a third
    of the time of a PPO update at bench.py's 30m shape.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt(-4, 0)  # M_MMAP_MAX: no block outside of the heap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: so much may lie free at its end


def pick_device(name):
    """"auto" is a GPU where there is one, then Apple's MPS, then the CPU. UserError: it is not there."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError):
        raise UserError(f"--device {name}: there is no such device here") from None
    if name.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # TF32; some CPUs would round as well
    return torch.device(name)


def ready(model, cfg, device):
    """The model on its device, computing as the flags say."""
    model.to(device).trunk.tune(cfg.bf16, cfg.checkpoint_activations, cfg.compile)
    return model


def pad(rows, device="cpu"):
    """Lists of token ids -> tokens (B,T) filled up with 0 on the right, lengths (B,)."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.as_tensor(row)
    return tokens.to(device), lengths.to(device)


def batches(lengths, budget, generator=None, rows=None):
    """Lists of indices that cover `lengths` once, each holding at most `budget` tokens with its padding.

    Sorted by length, so that little is padding. With a generator they are made from shuffled pools
    of about 16 batches and come in random order; without one, shortest first. rows: how many texts an
    index stands for, the longest of which is of that length (None: one each).
    """
    rows = rows or [1] * len(lengths)
    order = list(range(len(lengths)))
    pool = len(order)
    if generator is not None:
        order = torch.randperm(len(order), generator=generator).tolist()
        tokens = sum(n * length for n, length in zip(rows, lengths))
        pool = max(1, int(16 * budget * len(lengths) / max(1, tokens)))
    made = []
    for start in range(0, len(order), pool):
        batch, held = [], 0
        for i in sorted(order[start : start + pool], key=lengths.__getitem__):
            if batch and (held + rows[i]) * lengths[i] > budget:
                made.append(batch)
                batch, held = [], 0
            batch.append(i)
            held += rows[i]
        made.append(batch)
    if generator is not None:
        made = [made[i] for i in torch.randperm(len(made), generator=generator).tolist()]
    return made


def shuffled(lengths, budget, generator, done, steps, rows=None):
    """(step, batch) for the steps done+1 to `steps`, each epoch shuffled anew; those before are skipped."""
    epochs = (batches(lengths, budget, generator, rows) for _ in itertools.count())
    made = itertools.chain.from_iterable(epochs)
    return enumerate(itertools.islice(made, done, steps), done + 1)


def set_lr(optimizer, lr, step, steps, warmup, floor):
    """Linear warm-up over `warmup` steps, then half a cosine down to `floor` x lr; returns the rate."""
    rise = min(1.0, (step + 1) / max(1, warmup))
    fall = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in optimizer.param_groups:
        group["lr"] = lr * rise * fall
    return lr * rise * fall


def clip_and_step(model, optimizer, clip, step):
    """Clip the gradient's norm, take the step, clear the gradients; returns the norm (a float).

    Raises UserError when the gradient is not finite; then the weights stay as they were.
    """
    try:
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip, error_if_nonfinite=True)
    except RuntimeError:  # raised before the gradients are scaled, so the culprit can still be told
        worst = max((p.grad.abs().nan_to_num(nan=math.inf).max().item(), name)
                    for name, p in model.named_parameters() if p.grad is not None)
        raise UserError(f"step {step}: the gradient is not finite, largest in {worst[1]}; what was saved "
                        "before is kept; try a smaller --lr") from None
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.item()


def finite(where, **numbers):
    """Raise UserError when one of the numbers, floats or tensors, is NaN or infinite."""
    if bad := [name for name, x in numbers.items() if not torch.as_tensor(x).isfinite().all()]:
        raise UserError(f"{where}: {', '.join(bad)} not finite; what was saved before is kept; try a "
                        "smaller --lr")


def far(a, b):
    """Whether a and b differ by more than rounding does; TF32 and bf16 round to 3 digits or fewer."""
    tolerance = 1e-4 if b.device.type == "cpu" and b.dtype == torch.float32 else 2e-2
    return not (a - b).abs().max() <= tolerance * b.abs().max()


class Log:
    """One line a step on the terminal, the same numbers as a line of JSON in `path`, config first.

    Of a `saved` run (see resume.py) the lines up to its step stay, and what came after them is written anew.
    """

    def __init__(self, path, config, steps, saved=None):
        self.steps, self.start, self.lines, self.done = steps, time.time(), 0, 0
        path.parent.mkdir(parents=True, exist_ok=True)
        if saved:
            if not path.exists() or path.stat().st_size < saved["log"]:
                raise UserError(f"--resume: {path} is missing, or not the log of that run")
            os.truncate(path, saved["log"])
            self.file, self.done = open(path, "a"), saved["step"]
            return
        keep_previous(path)
        self.file = open(path, "w")
        self._write({"config": dataclasses.asdict(config)})

    def __call__(self, step, tok_s=None, **numbers):
        """`tok_s`, tokens a second, goes to the terminal only: the file is the same whenever it is made."""
        self._write({"step": step, **numbers})
        numbers |= {"tok_s": tok_s} if tok_s else {}
        if self.lines % 10 == 0:
            names = "".join(name.rjust(max(9, len(name) + 2)) for name in numbers)
            print(f"{'step':>9}{names}     left")
        self.lines += 1
        left = int((time.time() - self.start) / (step - self.done) * (self.steps - step))
        cells = "".join(f"{f'{x:.3g}' if isinstance(x, float) else x}".rjust(max(9, len(name) + 2))
                        for name, x in numbers.items())
        print(f"{step:4d}/{self.steps:<4d}{cells}  {left // 60:4d}:{left % 60:02d}", flush=True)

    def report(self, **numbers):
        """A result that belongs to no step; the caller prints it."""
        self._write({"report": numbers})

    def _write(self, line):
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
