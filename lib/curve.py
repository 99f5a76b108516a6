"""The curve of a run: smoothed training numbers, held-out numbers ten times, and the best weights so far."""
import copy
import math

import torch

from lib.common import finite
from lib.state import check_plain

LOOKS = 10  # in a run
WORSE = 1.1  # times the smallest loss: looks differ by 5% while the rate is high, and nothing is wrong then
SAMPLE = 16_384  # held-out tokens that a look reads, at most


class Best:
    """A copy of the model's weights when its number on held-out data was the largest. `parts` are its parts
    of a run (lib/resume.py): the copy, and of which step it is (0: of none yet)."""

    def __init__(self, model, name="best"):
        self.model, self.copy = model, copy.deepcopy(model)
        self.now = {"step": 0, "number": 0.0, "second": 0.0}
        self.parts = {name: self.now, f"{name}_model": self.copy}

    def offer(self, step, number, second=0.0):
        """Keep the weights if this number is the largest so far, or as large, and then `second`; returns
        whether it is."""
        if self.now["step"] and (number, second) < (self.now["number"], self.now["second"]):
            return False
        self.now.update(step=step, number=number, second=second)
        self.copy.load_state_dict(self.model.state_dict())
        return True


class Curve:
    """What is seen of a run while it trains; `parts` are its parts (lib/resume.py).

    measure() -> {name: number} on a fixed held-out sample; the first says which weights are the best. Of a
    loss the smaller is better, of the others the larger. keep: "best", or "last": then nothing ends early.

        curve.add(loss=loss)              # each step
        run.log(step, **curve.means())    # what it was on average since the last line
        curve.look(step, run.log)         # when due: measures, prints, keeps the weights if they are the best
        curve.over                        # past the middle, nothing has improved for a fifth of the run, and
                                          # the loss is WORSE than it was
        curve.restore()                   # at the end: the best weights instead of the last
    """

    def __init__(self, model, measure, steps, keep):
        self.model, self.measure, self.steps, self.every = model, measure, steps, max(1, steps // LOOKS)
        self.sums, self.best, self.looked, self.idle = {}, {}, 0, 0
        self.trained, self.measured = {}, {}
        self.kept = Best(model) if keep == "best" else None
        self.parts = {"curve": self} | (self.kept.parts if self.kept else {})

    def add(self, **numbers):
        """The numbers of a step, as floats."""
        for name, x in ({"steps": 1} | numbers).items():
            self.sums[name] = self.sums.get(name, 0) + x

    def means(self):
        """{name: mean since the last call}."""
        steps = self.sums.pop("steps")
        self.trained, self.sums = {name: x / steps for name, x in self.sums.items()}, {}
        return self.trained

    def look(self, step, log):
        """Measure after this step, if it is due; the numbers go to the screen and into the log."""
        if step % self.every and step < self.steps:
            return
        numbers = self.measure()
        finite(f"step {step}", **numbers)
        sign = {name: -1 if name.endswith("loss") else 1 for name in numbers}
        better = [name for name, x in numbers.items()
                  if name not in self.best or sign[name] * (x - self.best[name]) > 0]
        self.best |= {name: numbers[name] for name in better}
        self.looked, self.idle = step, 0 if better else self.idle + 1
        best = not self.kept or self.kept.offer(step, *(sign[name] * x for name, x in numbers.items()))
        self.measured = numbers
        log.report(step=step, **numbers)
        shown = "  ".join(f"{name.removeprefix('val_')} {x:.4f}" for name, x in numbers.items())
        praise = ", the best so far" * bool(self.kept and best)
        print(f"      held out after {step}: {shown}{praise}", flush=True)

    @property
    def over(self):
        """Whether the run is to end here."""
        worse = any(x > WORSE * self.best[name] for name, x in self.measured.items() if name.endswith("loss"))
        long = self.idle >= 2 and self.idle * self.every >= self.steps // 5
        return bool(self.kept) and self.looked > self.steps // 2 and long and worse

    @property
    def improving(self):
        """Whether it was getting better to the end; the look after the last step may be close to another."""
        return self.idle <= (self.looked % self.every > 0)

    @property
    def by_heart(self):
        """Whether the first number was better in training, at last, than on held-out data."""
        name, x = next(iter(self.measured.items()))
        was = self.trained.get(name.removeprefix("val_"), x)
        return was < x if name.endswith("loss") else was > x

    def restore(self):
        if self.kept and self.kept.now["step"]:
            self.model.load_state_dict(self.kept.copy.state_dict())
            print(f"kept: the weights after step {self.kept.now['step']}, the best on held-out data")

    def state_dict(self):
        return {"sums": self.sums, "best": self.best, "looked": self.looked, "idle": self.idle,
                "trained": self.trained, "measured": self.measured}

    def check_state(self, state):
        """ValueError: not what state_dict can be."""
        check_plain(self.state_dict(), state, "the held-out curve")
        for some in (state[name] for name in ("sums", "best", "trained", "measured")):
            if type(some) is not dict or not all(
                    type(name) is str and type(x) in (int, float) and math.isfinite(x)
                    for name, x in some.items()):
                raise ValueError("the held-out curve holds no numbers")

    def load_state_dict(self, state):
        vars(self).update(copy.deepcopy(state))


def sample(rows, most=SAMPLE):
    """How many of the first token rows have at most `most` tokens together; at least one."""
    total = torch.tensor([len(row) for row in rows]).cumsum(0)
    return max(1, int((total <= most).sum()))
