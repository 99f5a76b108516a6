"""What the training scripts share: batches, learning rate, steps, log, checkpoints."""
import dataclasses
import itertools
import json
import math
import os
import time
from pathlib import Path

import torch

from data.files import UserError
from lib import ranks
from lib.checkpoint import load, load_tokenizer, save  # noqa: F401, for callers


def batches(lengths, budget, generator=None, rows=None):
    """Lists of indices that cover `lengths` once, each of at most `budget` tokens, padding included.

    Sorted by length, so that little is padding. With a generator they are made from shuffled pools
    of about 16 batches and come in random order; without one, shortest first. rows: how many texts an
    index stands for, the longest of which is of that length (None: one each).
    """
    rows = rows or [1] * len(lengths)
    order = list(range(len(lengths)))
    pool = max(1, len(order))
    if generator is not None:
        order = torch.randperm(len(order), generator=generator).tolist()
        tokens = sum(n * length for n, length in zip(rows, lengths, strict=True))
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


def pieces(lengths, budget, rows=None):
    """`batches` of this process's share of the indices: all of them where there is but one process."""
    mine = ranks.share([n * length for n, length in zip(rows or [1] * len(lengths), lengths, strict=True)])
    rows = rows and [rows[i] for i in mine]
    return [[mine[i] for i in batch] for batch in batches([lengths[i] for i in mine], budget, rows=rows)]


def masked_mean(x, mask):
    """Mean of x where mask is True; values outside the mask, NaN included, are ignored."""
    return torch.where(mask, x, 0.0).sum() / mask.sum()


def places(mask, device):
    """Where a mask (B,T) is True: places (N,) in the flattened (B*T), on `device`. x[mask] would wait for a
    GPU to tell their number, which a mask on the CPU knows."""
    return mask.flatten().nonzero()[:, 0].to(device)


def to_host(parts):
    """{name: [tensors without dimensions]} of a step's pieces -> {name: sum of those of all processes},
    floats, by one transfer: at each the host waits for a GPU."""
    sums, names = dict.fromkeys(parts, 0.0), [name for name, some in parts.items() for _ in some]
    numbers = [x.detach() for some in parts.values() for x in some]
    for name, x in zip(names, torch.stack(numbers).tolist() if numbers else (), strict=True):
        sums[name] += x
    whole = ranks.total(torch.tensor([*sums.values()], dtype=torch.float64)).tolist()
    return dict(zip(sums, whole, strict=True))


def micro_batches(batch, rows, budget):
    """(rows, batch of those rows) of this process's share, in pieces of at most `budget` tokens, like lengths
    together, truncated to the longest."""
    rows, lengths = list(rows), batch["lengths"].tolist()
    for piece in pieces([lengths[i] for i in rows], budget):
        index = [rows[i] for i in piece]
        T = max(lengths[i] for i in index)
        b = {name: x[index] for name, x in batch.items()}
        yield index, {name: x[:, : T if name == "tokens" else T - 1] if x.dim() == 2 else x
                      for name, x in b.items()}


def count_steps(epochs, seed, **plan):
    """Optimizer steps in so many epochs of `shuffled(**plan)`, as the batches of the first epoch tell."""
    return max(1, round(epochs * len(batches(**plan, generator=torch.Generator().manual_seed(seed)))))


def shuffled(lengths, budget, generator, done, steps, rows=None):
    """(step, batch) for the steps done+1 to `steps`, each epoch shuffled anew; earlier ones are skipped."""
    epochs = (batches(lengths, budget, generator, rows) for _ in itertools.count())
    made = itertools.chain.from_iterable(epochs)
    return enumerate(itertools.islice(made, done, steps), done + 1)


class Cycle:
    """Lists of `size` of the rows, each epoch in a fresh order drawn from `generator`, without end."""

    def __init__(self, rows, size, generator):
        self.rows, self.size, self.generator, self.left = rows, size, generator, []

    def __next__(self):
        while len(self.left) < self.size:
            self.left += torch.randperm(len(self.rows), generator=self.generator).tolist()
        index, self.left = self.left[: self.size], self.left[self.size :]
        return [self.rows[i] for i in index]

    def state_dict(self):
        return {"left": self.left}

    def check_state(self, state):
        """ValueError: no rows that are still to come."""
        left = state.get("left") if type(state) is dict else None
        if type(left) is not list or not all(type(i) is int and 0 <= i < len(self.rows) for i in left):
            raise ValueError("the rows still to come are none of this data set")

    def load_state_dict(self, state):
        self.left = list(state["left"])


def set_lr(optimizer, lr, step, steps, warmup, floor):
    """Linear warm-up over `warmup` steps, or a tenth of all if that is less, then half a cosine down to
    `floor` x lr; returns the rate."""
    rise = min(1.0, (step + 1) / max(1, min(warmup, steps // 10)))
    fall = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in optimizer.param_groups:
        group["lr"] = lr * rise * fall
    return lr * rise * fall


def clip_and_step(model, optimizer, clip, step, parts=None):
    """Add up the gradients of all processes, clip their norm, take the step, clear them; returns what
    `to_host` makes of `parts`, and the norm as "grad_norm", by the one transfer of the step.

    UserError: one of these numbers is not finite; then the weights stay as they were.
    """
    ranks.add_gradients(model)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    # as torch.nn.utils.clip_grad_norm_ does it, which would ask the device whether the norm is finite
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm([*grads.values()])))
    numbers = to_host((parts or {}) | {"grad_norm": [norm / ranks.COUNT]})  # each process has the same
    finite(f"step {step}", **numbers | {"grad_norm": 0.0})
    if not math.isfinite(numbers["grad_norm"]):  # said by name
        worst = max((g.abs().nan_to_num(nan=math.inf).max().item(), name) for name, g in grads.items())
        raise UserError(f"step {step}: non-finite gradient, largest in {worst[1]}; earlier checkpoints are "
                        "intact; try a smaller --lr")
    torch._foreach_mul_([*grads.values()], (clip / (norm + 1e-6)).clamp(max=1.0))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return numbers


def finite(where, **numbers):
    """UserError, beginning with `where`: one of the numbers, floats or tensors, is NaN or infinite."""
    if bad := [name for name, x in numbers.items() if not torch.as_tensor(x).isfinite().all()]:
        flag = "--critic-lr" if bad[0].startswith("value") else "--lr"
        raise UserError(f"{where}: non-finite {', '.join(bad)}; earlier checkpoints are intact; try a "
                        f"smaller {flag}")


class Log:
    """One line a step on the terminal, the same numbers as a line of JSON in `path`, config first.

    Of a `saved` run (lib/resume.py) the lines up to its step stay, and later ones are written anew.
    """

    def __init__(self, path, config, steps, saved=None):
        if ranks.RANK:  # only the first process keeps a log
            path, saved = Path(os.devnull), None
        self.steps, self.start, self.lines, self.done = steps, time.monotonic(), 0, 0
        path.parent.mkdir(parents=True, exist_ok=True)
        if saved:
            os.truncate(path, saved["log"]["size"])
            self.file, self.done = open(path, "a"), saved["step"]
            return
        if path.is_symlink():
            raise UserError(f"{path} is a link, and a log is never written through one; delete it")
        self.file = open(path, "w")
        self._write({"config": dataclasses.asdict(config)})

    def __call__(self, step, tok_s=None, **numbers):
        """`tok_s`, tokens per second, is printed only: the file is the same whenever it is made."""
        self._write({"step": step, **numbers})
        numbers |= {"tok_s": tok_s} if tok_s else {}
        if self.lines % 10 == 0:
            names = "".join(name.rjust(max(9, len(name) + 2)) for name in numbers)
            print(f"{'step':>9}{names}     left")
        self.lines += 1
        left = max(0, int((time.monotonic() - self.start) / (step - self.done) * (self.steps - step)))
        cells = "".join(" " + f"{f'{x:.3g}' if isinstance(x, float) else x}".rjust(max(8, len(name) + 1))
                        for name, x in numbers.items())
        print(f"{step:4d}/{self.steps:<4d}{cells}  {left // 60:4d}:{left % 60:02d}", flush=True)

    def report(self, **numbers):
        """A result that belongs to no step; the caller prints it."""
        self._write({"report": numbers})

    def _write(self, line):
        try:
            self.file.write(json.dumps(without_nan(line), allow_nan=False) + "\n")
            self.file.flush()
        except OSError as error:
            raise UserError(f"{self.file.name} can't be written ({error.strerror})") from None


def without_nan(x):
    """x with None for every number that JSON lacks: NaN and the infinities."""
    if isinstance(x, dict):
        return {name: without_nan(y) for name, y in x.items()}
    if isinstance(x, (list, tuple)):
        return [without_nan(y) for y in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x
