"""Preferences -> out/rm.pt: replace the SFT model's vocabulary head with a scalar head and train it to rank.

Each prompt comes with two or more responses in order of preference. The loss is that of Bradley &
Terry (1952) on every pair of them, all C(K,2) pairs of one prompt together as one example (Ouyang et
al. 2022, eq. 1): shuffled as single pairs, each response would be trained on K-1 times and overfit.
Ratings, where there are any, add the squared error of the score: an order alone doesn't say how far
apart two texts are. Then the scores are shifted and scaled, once, so that the SFT model's own samples
have mean 0 and standard deviation 1: PPO's penalties and clips are in these units.

    python train_rm.py                      # after train_sft.py
    python train_rm.py --pool mean          # or max, or token: where the text is read
"""
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from data.bpe_dropout import splitter
from data.examples import encode_prompts, encode_rankings, open_data, pad, prompt_room, row_sizes, standardise
from data.records import read_prompts
from data.split import read_training
from lib.checks import check_model
from lib.checks_rm import check_scores
from lib.common import clip_and_step, count_steps, pieces, set_lr, shuffled
from lib.curve import SAMPLE, Curve, sample
from lib.fast import prepare
from lib.flags import Shared, bounded, cli, pick_device
from lib.generate import sample_texts
from lib.memory import check_training
from lib.report import accuracy, measure_pairs, report_agreement, report_pairs, report_words
from lib.resume import Run
from lib.rewards import score_rows
from lib.start import start_rm
from model import RewardModel


@dataclass
class Config(Shared):
    # run
    data: str = "stories"  # folder with preferences.jsonl, or "stories"
    out: str = "out"  # folder with sft.pt, and for the results
    sft: str = ""  # the SFT model to start from, instead of sft.pt in --out
    # reward model
    pool: str = "last"  # where the text is read: the "last" token, "mean", "max" or an appended "token"
    max_new_tokens: int = None  # longest of the samples that scores are normalised on; as for ppo.py
    wide_gap: float = 0.0  # if > 0, report also on pairs whose "gold" differs by more than this
    # training
    epochs: float = None  # of much data one, as more overfit (Ouyang et al. 2022, C.2)
    batch_tokens: int = None  # tokens in an optimizer step, padding included
    micro_batch: int = 16384  # tokens in a forward pass; without dropout it changes no result
    lr: float = bounded(None, 0)  # peak of the learning rate
    dropout: float = bounded(0.0, 0, 0.99)  # rate while the reward model is trained
    bpe_dropout: float = bounded(None, 0, 0.99)  # share of tokens that are split in two, others in each step
    keep: str = "best"  # which weights are saved: the "best" on held-out data, or the "last"


def ranking_loss(scores, groups):
    """Bradley-Terry loss over all pairs of each prompt, a prompt counting as one example.

    scores (N,): the responses of one prompt after another. groups: for each prompt the list of its
    responses' ranks, smaller = better; equal ranks make no pair. Returns (loss, accuracy): the mean
    over prompts of the mean over its pairs of -log sigmoid(score_better - score_worse) in nats, and
    of "better scores higher" (equal scores count half). Ouyang et al. 2022, eq. 1.
    """
    counts = [len(ranks) for ranks in groups]
    if sum(counts) != len(scores):
        raise ValueError(f"{len(scores)} scores for {sum(counts)} ranks")
    K = max(counts)
    s = torch.stack([F.pad(part, (0, K - len(part))) for part in scores.split(counts)])  # (G,K)
    levels = [sorted(set(ranks)) for ranks in groups]  # small whole numbers: a float32 holds them exactly
    padded = [[level.index(rank) for rank in ranks] + [math.nan] * (K - len(ranks))
              for level, ranks in zip(levels, groups, strict=True)]
    rank = torch.tensor(padded, device=s.device)
    pair = rank[:, :, None] < rank[:, None, :]  # (G,K,K): i better than j; nan is never less
    gap = s[:, :, None] - s[:, None, :]
    count = pair.sum((1, 2))
    weight = pair / count.clamp(min=1)[:, None, None] / (count > 0).sum().clamp(min=1)
    right = accuracy(gap)
    return -(F.logsigmoid(gap) * weight).sum(), (right * weight).sum()


def rating_loss(scores, groups):
    """Summed squared error of scores (N,), those of all responses of `groups`, where there are ratings."""
    ratings = torch.tensor([x for group in groups for x in group.ratings or [math.nan] * len(group.rows)],
                           device=scores.device)
    return (torch.where(ratings.isnan(), 0.0, scores - ratings) ** 2).sum()


def sizes(groups):
    """What `batches` asks for: the longest text of each prompt in tokens, and the number of its texts."""
    lengths = row_sizes(groups)
    return {"lengths": [*map(max, lengths)], "rows": [*map(len, lengths)]}


def ranking_backward(rm, groups, micro_batch, device):
    """Gradients of the loss of `groups`, [Ranking], left in .grad, in pieces of micro_batch tokens;
    returns {"loss": [of each piece], "accuracy": [of each]}."""
    ordered = [len(set(group.ranks)) > 1 for group in groups]  # prompts that make a pair
    rated = max(1, sum(len(group.rows) for group in groups if group.ratings))
    parts = {"loss": [], "accuracy": []}
    for piece in pieces(**sizes(groups), budget=micro_batch):
        some = [groups[i] for i in piece]
        scores = rm.score(*pad([row for group in some for row in group.rows], device))
        numbers = ranking_loss(scores, [group.ranks for group in some])
        part, part_right = (x * (sum(ordered[i] for i in piece) / max(1, sum(ordered))) for x in numbers)
        part = part + rating_loss(scores, some) / rated
        part.backward()
        for name, x in (("loss", part), ("accuracy", part_right)):
            parts[name].append(x.detach())
    return parts


def normalise(rm, gpt, groups, prompts, tokenizer, cfg, device):
    """Give the SFT model's samples on PPO's prompts mean 0 and sd 1 (Ziegler et al. 2019); if it hardly
    ever ends a text, the best responses of the training data instead."""
    generator = torch.Generator(device).manual_seed(cfg.seed)
    prompts = prompts * max(1, 128 // len(prompts))  # a few prompts are answered several times
    rows = sample_texts(gpt, prompts, tokenizer.eos, cfg.max_new_tokens, generator, device)
    name = "samples of the SFT model"
    if len(rows) < 64:
        rows, name = [g.rows[g.ranks.index(min(g.ranks))] for g in groups], "best responses"
    scores = score_rows(rm, rows, min(cfg.batch_tokens, cfg.micro_batch), device)
    try:
        rm.normalise(scores)
    except ValueError as error:  # no reason to lose the training
        print(f"not normalised: {error}")
        return
    print(f"normalised on {len(rows)} {name}: raw mean {scores.mean():.3f}, sd {scores.std():.3f} -> 0, 1")


def main(cfg):
    torch.manual_seed(cfg.seed)
    order = torch.Generator().manual_seed(cfg.seed)
    device = pick_device(cfg.device)
    folder, world = open_data(cfg.data)
    sft = Path(cfg.sft or Path(cfg.out) / "sft.pt")
    names = ("preferences.jsonl", "preferences_val.jsonl", "prompts.jsonl", "sft.jsonl")
    run = Run("rm", cfg, [sft, *(folder / name for name in names)], device)

    gpt, tokenizer, train, val, cfg = start_rm(cfg, sft, folder)
    rm = RewardModel.from_gpt(gpt, cfg.pool)  # the head swap
    check_model(prepare(gpt, device))
    check_scores(prepare(rm, device))
    gpt, rm = (prepare(model, device, cfg) for model in (gpt, rm))
    groups = standardise(encode_rankings(train, tokenizer, rm.room, "preferences.jsonl"))
    val_groups = encode_rankings(val, tokenizer, rm.room, "preferences_val.jsonl")
    file = folder / "prompts.jsonl"
    texts = read_training(read_prompts, file, cfg) if file.exists() else [x[0] for x in train[:512]]
    prompts = encode_prompts(texts[:512], tokenizer, prompt_room(rm.room, cfg.max_new_tokens), file.name)

    optimizer = torch.optim.AdamW(rm.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    split = splitter(tokenizer, rm.room, cfg)
    plan = {**sizes(groups), "budget": cfg.batch_tokens}
    steps = count_steps(cfg.epochs, cfg.seed, **plan)
    rows = [n for lengths in row_sizes(groups) for n in lengths]
    check_training(rm.config, min(cfg.micro_batch, cfg.batch_tokens, sum(rows)), cfg, device.type)
    print(f"reward model: {len(groups)} prompts with {len(rows)} ranked responses, "
          f"{sum(rows)} tokens, read at {cfg.pool}, on {device}")

    some = val_groups[: sample([range(sum(n)) for n in row_sizes(val_groups)], 4 * SAMPLE)]  # 1,000 pairs
    curve = Curve(rm, lambda: measure_pairs(rm, some, cfg, device), steps, cfg.keep)
    rm.train()
    done = run.begin(cfg, steps, rm=rm, optimizer=optimizer, **curve.parts)
    for step, index in shuffled(**plan, generator=order, done=done, steps=steps):
        if curve.over:
            break
        lr = set_lr(optimizer, cfg.lr, step - 1, steps, warmup=20, floor=0.1)
        parts = ranking_backward(rm, split([groups[i] for i in index], step), cfg.micro_batch, device)
        curve.add(**clip_and_step(rm, optimizer, 1.0, step, parts))
        curve.look(step, run.log)
        if step % 25 == 0 or step in (1, steps) or curve.over:
            run.log(step, **curve.means(), lr=lr)
        run.after(step, curve.over)

    curve.restore()
    rm.eval()
    result = report_pairs(rm, val_groups, world, cfg, device)
    result |= report_words(result["accuracy"], groups, val_groups, curve) | report_agreement(folder)
    normalise(rm, gpt, groups, prompts, tokenizer, cfg, device)
    run.finish(rm, tokenizer, result)
    print(f"reward model done: held-out accuracy {result['accuracy']:.1%}"
          + (f", ceiling {result['ceiling']:.1%}" if world else "") + f"; {run.result}\n")


if __name__ == "__main__":
    cli(main, Config)
