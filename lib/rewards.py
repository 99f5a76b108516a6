"""PPO's models, and where scores come from: a reward model, or a Python function of the user's."""
import contextlib
import copy
import itertools
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Set
from pathlib import Path
from typing import NamedTuple

import torch

from data.examples import pad
from data.files import UserError
from data.tokenizer import Tokenizer
from lib import ranks
from lib.common import finite, load, load_tokenizer, micro_batches, pieces
from lib.fast import prepare
from lib.resume import crc
from lib.state import check_plain
from lib.user_code import import_function, saved, user_code
from model import GPT, RewardModel


class Models(NamedTuple):
    """What an update needs; only policy and critic learn."""

    policy: GPT
    ref: GPT
    critic: RewardModel
    score: Callable  # (tokens, lengths, P) -> (B,)
    judge: RewardModel | None
    tokenizer: Tokenizer


def model_files(cfg):
    """The checkpoints that PPO reads: SFT model, reward model, judge; "" for one that it has not."""
    out = Path(cfg.out)
    return [cfg.sft or out / "sft.pt", "" if cfg.reward else cfg.rm or out / "rm.pt", cfg.judge]


def load_models(cfg, device, run=None):
    """The Models of `model_files`, or of --reward."""
    sft, rm_file, judge_file = model_files(cfg)

    def ready(model):
        return prepare(model, device, cfg)

    policy, tokenizer = ready(load(GPT, sft)), load_tokenizer(sft)
    ref = ready(copy.deepcopy(policy)).requires_grad_(False)
    if cfg.reward:
        scale = Scale() if cfg.reward_scale == "first" else None
        function = None if ranks.RANK else import_function(cfg.reward, run)  # the first process asks it
        score = TextScore(function, cfg.reward, tokenizer, scale, run)
        critic = ready(RewardModel.from_gpt(policy))
        torch.nn.init.zeros_(critic.reward_head.weight)  # nothing is known of these scores: start at 0
    else:
        rm = ready(load_reward_model(rm_file, policy, tokenizer))
        critic = ready(copy.deepcopy(rm))  # (6)
        score = model_score(rm.requires_grad_(False), cfg.micro_batch)
    judge = ready(load_reward_model(judge_file, policy, tokenizer)) if judge_file else None
    return Models(policy, ref, critic, score, judge, tokenizer)


def load_reward_model(path, gpt, tokenizer):
    """The reward model in a checkpoint. UserError: it can't read everything that `gpt` writes."""
    rm = load(RewardModel, path)
    if load_tokenizer(path).spec() != tokenizer.spec():
        raise UserError(f"{path} was trained with another tokenizer than the language model; train it again")
    if rm.config.block_size < gpt.config.block_size:
        raise UserError(f"{path} was trained for shorter texts than the language model; train it again")
    return rm


def score_rows(rm, rows, budget, device):
    """Scores of token lists, in their order: -> (N,) on the CPU."""
    scores = torch.zeros(len(rows))
    with torch.inference_mode():
        for index in pieces([len(row) for row in rows], budget):
            scores[index] = rm.score(*pad([rows[i] for i in index], device)).cpu()
    scores = ranks.total(scores)
    finite("scoring", score=scores)
    return scores


def model_score(rm, micro_batch=math.inf):
    """The reward model as a function of (tokens, lengths, P) -> (B,) on the CPU, in pieces of micro_batch
    tokens."""
    def score(tokens, lengths, P):
        scores, device = torch.zeros(len(tokens)), rm.reward_head.weight.device
        batch = {"tokens": tokens, "lengths": lengths}
        for index, b in micro_batches(batch, range(len(tokens)), micro_batch):
            scores[index] = rm.score(b["tokens"].to(device), b["lengths"].to(device)).cpu()
        return ranks.total(scores)
    return score


# ---- a function of the user's ----

LARGEST = 1e18  # of a score: float32 can still hold sums of its squares


class NotNumbers(Exception):
    """What a function returned instead of n numbers, to follow "returned"."""


class TextScore:
    """A user's function(prompts, responses) -> numbers as a function of (tokens, lengths, P) -> (B,).

    The function is called once for all rows, in their order. With a Scale, scores are in its units, and
    `raw` keeps what the function returned last, in float64 on the CPU. It is a part of the `run`, which is
    saved when the function fails: its state is the scale, and from which file the function came.
    """

    raw = None

    def __init__(self, function, name, tokenizer, scale=None, run=None):
        self.function, self.name, self.tokenizer, self.scale, self.run = function, name, tokenizer, scale, run
        path = name.rpartition(":")[0]
        self.file = crc(path, None) if os.path.isfile(path) else 0

    def ask(self, prompts, responses):
        """What the function makes of them, as floats. UserError: it fails, or that is nothing like it."""
        n = len(prompts)
        with user_code(f"--reward {self.name}", self.run):
            values, wrong = listed(self.function(prompts, responses), n), None
            try:  # here, as float() and repr() may run code of the user's, too
                values = numbers(values, n)
            except NotNumbers as error:
                wrong = str(error)
        if wrong is not None:
            raise UserError(f"--reward {self.name} must return {n} finite numbers for {n} responses; it "
                            f"returned {wrong}{saved(self.run)}")
        return values

    def __call__(self, tokens, lengths, P):
        n = len(tokens)
        values = [0.0] * n if ranks.RANK else self.ask(*split_texts(tokens, lengths, P, self.tokenizer))
        asked = raw = ranks.total(torch.tensor(values, dtype=torch.float64))
        before = dict(vars(self.scale)) if self.scale else {}
        if self.scale:
            last = tokens[torch.arange(n, device=tokens.device), lengths - 1].cpu()
            self.scale.learn(raw[last == self.tokenizer.eos])
            self.raw, raw = raw, self.scale(raw)
        if not (raw.abs() <= LARGEST).all():
            if self.scale:
                self.scale.__init__(**before)
            worst = asked[int(raw.abs().argmax())].item()
            raise UserError(f"--reward {self.name} returned values that are too large, such as {worst:.4g}: "
                            f"{'scaled, ' * bool(self.scale)}they must stay below {LARGEST:.0e}"
                            f"{saved(self.run)}")
        return raw.float().to(tokens.device)

    def state_dict(self):
        return {"file": self.file, **vars(self.scale or Scale())}

    def check_state(self, state):
        """ValueError: not what state_dict can be."""
        check_plain(self.state_dict(), state, "the scale of the rewards")
        if not (state["n"] >= 0 and state["m2"] >= 0):
            raise ValueError("the scale of the rewards is negative")

    def load_state_dict(self, state):
        if state["file"] != self.file:
            print(f"{self.name} has changed since the run began: it goes on with the new one")
        if self.scale:
            self.scale.__init__(state["n"], state["mean"], state["m2"])


class Scale:
    """Raw rewards -> mean 0, sd 1 over the first of them: ENOUGH or more, not all equal.

    What meets a score is in these units: the KL penalty, the score of a missing end, the critic's clip.
    Once known they stay, so that the scores of all updates can be compared.
    """

    ENOUGH = 64

    def __init__(self, n=0, mean=0.0, m2=0.0):
        self.n, self.mean, self.m2 = n, mean, m2  # m2: sum of the squared deviations

    def learn(self, raw):
        """Take raw (N,), float64, into mean and deviation, unless enough is known."""
        if not len(raw) or self.n >= self.ENOUGH and self.varied:
            return
        if self.n >= self.ENOUGH:  # all equal, which says nothing of how far apart rewards are
            self.__init__()
        gap, n = raw.mean().item() - self.mean, self.n + len(raw)
        self.m2 += ((raw - raw.mean()) ** 2).sum().item() + gap**2 * self.n * len(raw) / n
        self.mean += gap * len(raw) / n
        self.n = n

    @property
    def varied(self):
        return self.n > 0 and math.sqrt(self.m2 / self.n) > 1e-12 * abs(self.mean)

    @property
    def sd(self):
        return math.sqrt(self.m2 / self.n) if self.varied else 1.0

    def __call__(self, raw):
        return (raw - self.mean) / self.sd


def scale_of(score):
    """The Scale of a TextScore, as numbers for the log; {} where there is none."""
    scale = getattr(score, "scale", None)
    return {"reward_mean": scale.mean, "reward_sd": scale.sd} if scale else {}


def units(score):
    """In which units the scores of a user's function are: a line to print, empty for a reward model."""
    if not isinstance(score, TextScore):
        return ""
    scale = score.scale
    if not scale:
        return f"score: what {score.name} returns, not scaled\n"
    return (f"score: (raw - {scale.mean:.4g}) / {scale.sd:.4g}, mean and standard deviation of the first "
            f"{scale.n} responses that ended; raw: what {score.name} returns\n"
            + ("" if scale.varied else "all of those were equal: nothing to learn from yet\n"))


def in_units(result, score, no_eos_score):
    """A result of report.evaluate, its scores in the units that the TextScore `score` has now; of a reward
    model they never change."""
    if not result.get("raw"):
        return result
    scaled = score.scale(torch.tensor(result["raw"], dtype=torch.float64)).float().tolist()
    return result | {"score": [x if ended else no_eos_score
                               for x, ended in zip(scaled, result["eos"], strict=True)]}


def listed(result, n):
    """What the user's function returned, as a list of at most n + 1; as it is when it is no sequence of
    numbers. This runs code of the user's if it is a generator."""
    if isinstance(result, (Mapping, Set, str, bytes, bytearray)) or not isinstance(result, Iterable):
        return result
    if hasattr(result, "tolist"):  # NumPy's and torch's arrays: on the CPU at once
        return result.tolist() if getattr(result, "ndim", 1) == 1 else result
    return list(itertools.islice(result, n + 1))


def numbers(values, n):
    """A list of n floats, finite in float32. NotNumbers: it is none. This may run code of the user's."""
    if not isinstance(values, list):
        kind = f"{values.ndim}-dimensional " if hasattr(values, "ndim") else ""
        raise NotNumbers(f"a {kind}{type(values).__name__}: {shown(values)}")
    if len(values) != n:
        raise NotNumbers(f"{'more' if len(values) > n else len(values)}: {shown(values)}")
    made = []
    for i, value in enumerate(values):
        number = math.nan
        with contextlib.suppress(TypeError, ValueError, OverflowError, RuntimeError):
            if not isinstance(value, (str, bytes)):
                number = float(value.item() if hasattr(value, "item") else value)
        if not abs(number) <= torch.finfo(torch.float32).max:
            raise NotNumbers(f"{shown(value)} as number {i + 1}")
        made.append(number)
    return made


def shown(value):
    """The beginning of a value's repr, without control characters."""
    try:
        return re.sub(r"[^ -~]", " ", repr(value)[:200])[:80]
    except Exception:
        return f"something that can't be printed ({type(value).__name__})"


def split_texts(tokens, lengths, P, tokenizer):
    """tokens (B,T) -> prompts, responses as texts."""
    rows = [row[:n] for row, n in zip(tokens.tolist(), lengths.tolist(), strict=True)]
    P = P.tolist()
    return ([tokenizer.decode(row[:p]) for row, p in zip(rows, P, strict=True)],
            [tokenizer.decode(row[p:]) for row, p in zip(rows, P, strict=True)])
