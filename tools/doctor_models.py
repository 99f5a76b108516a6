"""What the doctor finds in the SFT model and in the reward model: what they score, and what they write."""
from statistics import fmean
from typing import NamedTuple

import torch
import torch.nn.functional as F

from data import rules
from data.examples import encode_demonstrations, encode_prompts, encode_rankings, pad
from lib.baselines import ngram_losses
from lib.generate import generate
from lib.report import (
    accuracy,
    calibration_error,
    count_texts,
    distinct_2,
    half_width,
    held_out_pairs,
    wilson,
)
from lib.rewards import score_rows
from lib.start import ranked_tokens, sft_by_rule
from model import GPT, RewardModel
from tools import doctor_files as files
from tools.doctor_files import LIMITS, Finding, sample
from train_sft import evaluate

BUDGET = 16_384  # tokens in a forward pass
SOME, PAIRS = 400, 1000  # demonstrations and rankings of each file that a network reads, at most
PROMPTS, N = 64, 16  # held-out prompts that are answered, so many at once; half of them N times
RATES = ("the learning rate is too low", "raise --lr"), ("the learning rate is too high", "lower --lr")


class Case(NamedTuple):
    """What is examined."""

    gpt: GPT | None
    rm: RewardModel | None
    tokenizer: object
    data: dict  # of read_data
    world: object  # that knows the true scores, or None
    device: torch.device
    new: int  # tokens of the longest response

    def scores(self, rows):
        return score_rows(self.rm, rows, BUDGET, self.device)

    def gaps(self, groups):
        """better - worse (N,) of all pairs, and the scores (M,) of all responses."""
        scores = self.scores([row for group in groups for row in group.rows])
        return held_out_pairs(groups, scores, None)[0], scores

    @torch.inference_mode()
    def respond(self, n, each=1):
        """Responses of the SFT model to n held-out prompts, `each` to every one: prompts, responses, and
        the tokens of both."""
        name = next(name for name in ("prompts", "sft", "preferences") if name in self.data)
        asked = [x if name == "prompts" else x[0] for x in sample(self.data[name][1], n) for _ in range(each)]
        room, generator = self.gpt.config.block_size, torch.Generator(self.device).manual_seed(0)
        prompts, rows = encode_prompts(asked, self.tokenizer, max(1, room - self.new), "prompts"), []
        for start in range(0, len(prompts), PROMPTS):
            tokens, P = pad(prompts[start : start + PROMPTS], self.device)
            tokens, lengths = generate(self.gpt.eval(), tokens, P, min(self.new, room - tokens.shape[1]),
                                       eos=self.tokenizer.eos, generator=generator)
            rows += [row[:n] for row, n in zip(tokens.tolist(), lengths.tolist(), strict=True)]
        texts = [self.tokenizer.decode(row[len(prompt):]) for row, prompt in zip(rows, prompts, strict=True)]
        return asked, texts, rows


# ---- SFT ----

def sft_findings(case, log):
    """Of the SFT model; log: of its run, or None."""
    gpt, (train, val) = case.gpt, case.data["sft"]
    room = gpt.config.block_size
    rows, held = (encode_demonstrations(sample(some, SOME), case.tokenizer, room, name)
                  for some, name in ((train, "sft.jsonl"), (val, "sft_val.jsonl")))
    yield fitting(len(rows), len(sample(train, SOME)), "demonstrations", room)
    loss, own = (evaluate(gpt, some, BUDGET, case.device) for some in (held, rows))
    if log and log.config.lr:
        yield from learned(case, rows, held, log, loss)
    yield Finding(f"loss {loss:.3f} nats a token on held-out texts, {own:.3f} on training texts",
                  loss > LIMITS["overfit"] * own, "overfit", "more demonstrations, or fewer --epochs")
    others = [(b[:P] + a[p:], P) for (a, p), (b, P) in neighbours(held) if P + len(a) - p <= room]
    asked = len({tuple(row[:P]) for row, P in held})
    if others and asked > 1 and (2 * asked > len(held) or files.related(files.texts_of("sft", val))):
        costs = evaluate(gpt, others, BUDGET, case.device) - loss
        yield Finding(f"the prompt of another example costs {costs:.3f} nats a token",
                      costs < LIMITS["prompt"], "the prompt is ignored",
                      "check that each completion in sft.jsonl answers its prompt")
    _, texts, responses = case.respond(PROMPTS)
    ended = fmean(row[-1] == case.tokenizer.eos for row in responses)
    yield Finding(f"{ended:.0%} of the responses end", ended < LIMITS["ends"],
                  "responses do not end", "the loss must include end-of-text, texts fit into --block-size")
    varied, usual = distinct_2(texts), distinct_2([text for _, text in sample(train, len(texts))])
    yield Finding(f"distinct_2 of the responses {varied:.2f}, of as many demonstrations {usual:.2f}",
                  varied < LIMITS["alike"] * usual, "all responses are alike",
                  "more demonstrations, or another --lr")
    demonstrated = {text.strip() for _, text in train}
    copied = fmean(text.strip() in demonstrated for text in texts)
    yield Finding(f"{copied:.0%} of the responses are copies of demonstrations")


def fitting(kept, n, what, room):
    """Of n examples, of which `kept` fit into the network."""
    return Finding(f"{kept / n:.0%} of the {what} fit into {room} tokens", kept < LIMITS["fit"] * n,
                   "responses do not fit", "raise train_sft.py's --block-size, or shorten them")


def neighbours(items):
    """(item, next item), the first one following the last."""
    return zip(items, items[1:] + items[:1], strict=True)


def learned(case, rows, held, log, loss):
    """The loss beside that of counts; if it is behind, the likelier of two causes. rows, held: some of the
    demonstrations, and of the held-out ones."""
    gpt, train = case.gpt, case.data["sft"][0]
    bigram = next((report["bigram_loss"] for report in log.reports if "bigram_loss" in report), None)
    if bigram is None:  # an older log
        known = encode_demonstrations(train, case.tokenizer, gpt.config.block_size, "sft.jsonl")
        bigram = ngram_losses(known, held, gpt.config.vocab_size)[1]
    cfg, tokens = log.config, sum(len(row) for row, _ in rows) * len(train) // len(rows)
    rate = sft_by_rule(train, tokens, gpt, cfg)[0]["lr"]
    behind, off = loss > bigram + LIMITS["behind"], cfg.lr / rate
    yield Finding(f"counts of token pairs have a loss of {bigram:.3f}; --lr {cfg.lr:.2g}, by rule {rate:.2g}",
                  behind and max(off, 1 / off) > LIMITS["rate"], *RATES[off > 1])
    yield Finding(f"{log.steps[-1]['step']} steps", behind, "too few steps", "raise --epochs")


# ---- reward model ----

def rm_findings(case, log=None):
    """Of the reward model, and of what the SFT model writes for it; log: of its run, or None."""
    train, val = case.data["preferences"]
    groups, held = (encode_rankings(sample(some, PAIRS), case.tokenizer, case.rm.room, name)
                    for some, name in ((train, "preferences.jsonl"), (val, "preferences_val.jsonl")))
    yield fitting(len(groups), len(sample(train, PAIRS)), "rankings", case.rm.room)
    (own, _), (gap, scores) = case.gaps(groups), case.gaps(held)
    if log and log.config.lr and log.config.epochs:
        yield settings(log.config, rules.rm(*ranked_tokens(train, case.tokenizer), case.rm.config.d_model),
                       accuracy(own).mean().item())
    yield from accuracies(own, gap, count_texts(held), float(case.rm.scale))
    lengths = torch.tensor([float(len(row)) for group in held for row in group.rows])
    along = torch.corrcoef(torch.stack([scores, lengths]))[0, 1].nan_to_num().item()
    yield Finding(f"correlation of score and length {along:+.2f}", abs(along) > LIMITS["length"],
                  "it reads the length only", "collect pairs of like length")
    others = [a._replace(rows=[b.prompt + row[len(a.prompt) :] for row in a.rows])
              for a, b in neighbours(held)]
    others = [group for group in others if max(map(len, group.rows)) <= case.rm.room]
    if len(gap) >= LIMITS["few pairs"] and others and files.related(files.texts_of("preferences", val)):
        right, swapped = (accuracy(gaps).mean().item() for gaps in (gap, case.gaps(others)[0]))
        yield Finding(f"accuracy {swapped:.1%} with the prompts of other examples",
                      right - swapped < LIMITS["reads"] * (right - 0.5), "the prompt is not read",
                      "check that each line of preferences.jsonl has its own prompt")
    yield spoilt(case, held)
    yield from best_of(case)


def settings(cfg, rule, known):
    """Those of a reward model beside the ones by rule, where its accuracy on training pairs is low."""
    off, few = cfg.lr / rule["lr"], LIMITS["few epochs"] * cfg.epochs < rule["epochs"]
    far = max(off, 1 / off) > LIMITS["rate"]
    text = f"--lr {cfg.lr:.2g}, by rule {rule['lr']:.2g}; --epochs {cfg.epochs:g}, by rule {rule['epochs']:g}"
    return Finding(text, known < LIMITS["learned"] and (far or few),
                   *(RATES[off > 1] if far else ("too few steps", "raise --epochs")))


def accuracies(own, gap, texts, scale=1.0):
    """own (M,), gap (N,): better - worse of training and of held-out pairs; the latter are of so many texts.
    scale: by it the scores were divided after the training."""
    right, known = accuracy(gap).mean().item(), accuracy(own).mean().item()
    half, most = half_width(right, len(gap), texts), wilson(right, min(len(gap), texts))[1]
    noise = max(LIMITS["noisier"], 1.5 * half)
    yield Finding(f"accuracy {right:.1%} +- {half:.1%} on held-out pairs", most < 0.5,
                  "the labels are reversed", "exchange chosen and rejected in preferences.jsonl")
    yield Finding(f"accuracy {known:.1%} on training pairs", known < right - noise,
                  "noisy labels", "many labels of preferences.jsonl are wrong: clean them")
    loss, error = -F.logsigmoid(gap * scale).mean(), calibration_error(gap * scale)
    yield Finding(f"loss {loss:.3f} nats on held-out pairs; calibration error {error:.3f}",
                  known > max(right + LIMITS["by heart"], most) and loss > LIMITS["knows nothing"], "overfit",
                  "more pairs, fewer --epochs, or more --bpe-dropout or --dropout")
    surest = accuracy(gap[gap.abs().argsort()[-(len(gap) // 4 or 1) :]])
    sure = surest.mean().item()
    yield Finding(f"{sure:.1%} of the quarter with the largest margins are right",
                  len(surest) > 3 and wilson(sure, len(surest))[1] < LIMITS["sure"],
                  *(("noisy labels", "many labels say the opposite: clean them") if right - half > 0.5 else
                    ("it has learned nothing", "more pairs, more --epochs, or another --lr")))


def spoilt(case, held):
    """What the best responses score when they are spoilt."""
    generator, means = torch.Generator().manual_seed(0), {}
    best = [(group.prompt, group.rows[group.ranks.index(min(group.ranks))]) for group in held[:SOME]
            if len(group.prompt) + 2 * max(map(len, group.rows)) <= case.rm.room]  # also repeated
    for name, change in (("as they are", lambda x: x), ("repeated", lambda x: x + x), ("empty", lambda x: []),
                         ("cut off", lambda x: x[: len(x) // 2]),
                         ("shuffled", lambda x: [x[i] for i in torch.randperm(len(x), generator=generator)])):
        rows = [prompt + change(row[len(prompt) : -1]) + [case.tokenizer.eos] for prompt, row in best]
        means |= {name: case.scores(rows).mean().item()} if rows else {}
    top = max(means, key=means.get, default="")
    shown = ", ".join(f"{name} {x:+.2f}" for name, x in means.items())
    return Finding(f"mean score of the best responses: {shown}",
                   bool(top) and means[top] > means["as they are"] + LIMITS["spoilt"],
                   f"{top} texts score higher", "add such texts as rejected ones")


def best_of(case):
    """How far the best of N samples is ahead of their mean; how much of them was never in training."""
    asked, texts, rows = case.respond(PROMPTS // 2, N)
    score, gain = case.scores([row[: case.rm.room] for row in rows]).view(-1, N), 0.0
    lift = f"the best of {N} samples has {(score.max(1).values - score.mean(1)).mean():+.2f} score"
    if case.world:
        gold = torch.tensor([*map(case.world.gold_score, asked, texts)]).view(-1, N)
        gain = (gold.gather(1, score.argmax(1, True))[:, 0] - gold.mean(1)).mean().item()
        lift += f" and {gain:+.2f} gold"
    yield Finding(lift + " against their mean", gain < -0.02, "the labels are reversed",
                  "exchange chosen and rejected: what it likes best is worse than most")
    known = files.texts_of("preferences", case.data["preferences"][0])
    seen = {pair for _, text in known for pair in files.word_pairs(text)}
    new = [pair not in seen for text in texts for pair in files.word_pairs(text)]
    yield Finding(f"{fmean(new or [0]):.0%} of the word pairs in those samples were never in its training")
