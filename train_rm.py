"""Preferences -> out/rm.pt: the vocabulary head of out/sft.pt is taken off, a head of one number put on.

Each prompt comes with two or more responses in order of preference. The loss is that of Bradley &
Terry (1952) on every pair of them, all C(K,2) pairs of one prompt together as one example (Ouyang et
al. 2022, eq. 1): shuffled as single pairs, each response would be trained on K-1 times and overfit.
One epoch, then the scores are shifted and scaled, once, so that the SFT model's own samples have
mean 0 and standard deviation 1: PPO's penalties and clips are in these units.

    python train_rm.py                      # after train_sft.py
    python train_rm.py --pool mean          # or max, or token: where the text is read
"""
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from common import (Log, UserError, batches, clip_and_step, far, finite, load, load_tokenizer,
                    pad, pick_device, ready, run, save, set_lr, shuffled)
from data.records import open_data, read_preferences, read_prompts
from model import GPT, RewardModel
from resume import State


@dataclass
class Config:
    data: str = "stories"  # folder with preferences.jsonl, or "stories"
    out: str = "out"  # folder with sft.pt, and for the results
    pool: str = "last"  # where the text is read: "last" token, "mean", "max" or an appended "token"
    epochs: float = 1.0  # more than one overfits (Ouyang et al. 2022, C.2)
    batch_tokens: int = 1792  # tokens in an optimizer step, padding included
    micro_batch: int = 16384  # tokens in a forward pass; without dropout it changes no result
    lr: float = 5e-4  # peak of the learning rate
    dropout: float = 0.0  # rate while the reward model is trained
    wide_gap: float = 0.0  # if > 0, report also on pairs whose "gold" differs by more than this
    save_every: int = 200  # steps after which the state is saved, to go on from; 0: never
    resume: bool = False  # go on from the last saved state
    seed: int = 1  # of the head, order and samples
    device: str = "auto"  # "cuda", "mps", "cpu"
    bf16: bool = False  # the blocks' matrix products in bfloat16, but not in generation
    checkpoint_activations: bool = False  # less memory, a third more work: blocks are computed twice
    compile: bool = False  # torch.compile, in generation only on a GPU; needs a C++ compiler
    skip_bad: bool = False  # leave out lines that can't be used, and count them


class Ranking(NamedTuple):
    """One prompt with its responses: `rows` are the token lists of prompt, response, eos."""

    prompt: list
    rows: list
    ranks: list
    texts: tuple  # (prompt, responses) as they were written
    gold: list  # true scores where they are known, or None


def encode(examples, tokenizer, room, name):
    """[(prompt, responses, ranks, gold)] -> [Ranking].

    Texts longer than `room` tokens lose the beginning of the prompt, the same for all responses of a
    prompt; an example with a response that alone is too long is dropped. Both are counted and printed.
    """
    groups, cut, dropped = [], 0, 0
    for *texts, ranks, gold in examples:
        prompt = tokenizer.encode(texts[0])  # may be empty: a text that is judged needs no first token
        responses = [tokenizer.encode(response) + [tokenizer.eos] for response in texts[1]]
        left = room - max(len(response) for response in responses)
        if left < 1:
            dropped += 1
            continue
        cut += len(prompt) > left
        prompt = prompt[-left:]
        groups.append(Ranking(prompt, [prompt + response for response in responses], ranks, texts, gold))
    if cut or dropped:
        print(f"{name}: of {len(examples)} prompts {cut} cut from the left, {dropped} with a response "
              f"too long for {room} tokens dropped")
    if not groups:
        raise UserError(f"{name}: no example fits into the model's {room} tokens")
    return groups


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
    padded = [list(ranks) + [math.nan] * (K - len(ranks)) for ranks in groups]
    rank = torch.tensor(padded, device=s.device)
    pair = rank[:, :, None] < rank[:, None, :]  # (G,K,K): i better than j; nan is never less
    gap = s[:, :, None] - s[:, None, :]
    count = pair.sum((1, 2))
    weight = pair / count.clamp(min=1)[:, None, None] / (count > 0).sum().clamp(min=1)
    right = accuracy(gap)
    return -(F.logsigmoid(gap) * weight).sum(), (right * weight).sum()


def sizes(groups):
    """What `batches` asks for: the longest text of each prompt in tokens, and the number of its texts."""
    return {"lengths": [max(map(len, group.rows)) for group in groups],
            "rows": [len(group.rows) for group in groups]}


def ranking_backward(rm, groups, micro_batch, device, step):
    """Gradients of the loss of `groups`, [Ranking], left in .grad, in pieces of micro_batch tokens;
    returns (loss, accuracy)."""
    ordered = lambda some: sum(len(set(group.ranks)) > 1 for group in some)  # prompts that make a pair
    loss = right = 0.0
    for piece in batches(**sizes(groups), budget=micro_batch):
        some = [groups[i] for i in piece]
        scores = rm.score(*pad([row for group in some for row in group.rows], device))
        numbers = ranking_loss(scores, [group.ranks for group in some])
        part, part_right = (x * (ordered(some) / max(1, ordered(groups))) for x in numbers)
        finite(f"step {step}", loss=part)
        part.backward()
        loss, right = loss + part.item(), right + part_right.item()
    return loss, right


def score_rows(rm, rows, budget, device):
    """Scores of token lists, in their order: -> (N,) on the CPU."""
    scores = torch.empty(len(rows))
    with torch.inference_mode():
        for index in batches([len(row) for row in rows], budget):
            scores[index] = rm.score(*pad([rows[i] for i in index], device)).cpu()
    return scores


def sample_texts(gpt, prompts, eos, room, generator, device):
    """One response of the SFT model to each prompt (token lists): -> prompts with responses; those
    that do not end within the model's length are left out."""
    rows = []
    for start in range(0, len(prompts), 64):
        tokens, lengths = pad(prompts[start : start + 64], device)
        tokens, lengths = gpt.generate(tokens, lengths, room - tokens.shape[1], eos=eos,
                                       generator=generator)
        texts = [row[:n].tolist() for row, n in zip(tokens, lengths)]
        rows += [text for text, prompt in zip(texts, prompts[start:])
                 if text[-1] == eos and len(text) > len(prompt)]
    return rows


def normalise(rm, gpt, groups, folder, tokenizer, cfg, device):
    """Give the SFT model's samples mean 0 and sd 1 (Ziegler et al. 2019), on PPO's prompts if they are
    there; where it hardly ever ends a text, the best responses of the training data instead."""
    room = rm.config.block_size - (rm.pool == "token")
    prompts = [group.prompt for group in groups]
    if (folder / "prompts.jsonl").exists():
        texts = read_prompts(folder / "prompts.jsonl", cfg.skip_bad)
        prompts = [tokenizer.encode(text) or [tokenizer.eos] for text in texts]  # as PPO has them
    prompts = [prompt for prompt in prompts if 0 < len(prompt) < room][:512]
    generator = torch.Generator(device).manual_seed(cfg.seed)
    rows = sample_texts(gpt, prompts, tokenizer.eos, room, generator, device)
    name = "samples of the SFT model"
    if len(rows) < 64:
        rows, name = [g.rows[g.ranks.index(min(g.ranks))] for g in groups], "best responses"
    scores = score_rows(rm, rows, min(cfg.batch_tokens, cfg.micro_batch), device)
    try:
        rm.normalise(scores)
    except ValueError as error:  # the training is not lost for it
        print(f"not normalised: {error}")
        return
    print(f"normalised on {len(rows)} {name}: raw mean {scores.mean():.3f}, "
          f"sd {scores.std():.3f} -> 0, 1")


# ---- report ----

def held_out_pairs(groups, scores, world):
    """For every pair of a ranking, better - worse: gap of score, of length and of gold, and the best
    possible accuracy; each (N,), nan where unknown."""
    gap, longer, gold, best, start = [], [], [], [], 0
    for group in groups:
        score, n = scores[start : start + len(group.rows)].tolist(), [len(row) for row in group.rows]
        start += len(group.rows)
        for i, j in itertools.permutations(range(len(n)), 2):
            if group.ranks[i] < group.ranks[j]:
                gap.append(score[i] - score[j])
                longer.append(float(n[i] - n[j]))
                gold.append(group.gold[i] - group.gold[j] if group.gold else math.nan)
                prompt, responses = group.texts
                best.append(world.ceiling(prompt, responses[i], responses[j]) if world else math.nan)
    return torch.tensor(gap), torch.tensor(longer), torch.tensor(gold), torch.tensor(best)


def accuracy(gap):
    """1 where the better one is ahead, 1/2 where they are equal: a constant model gets 1/2."""
    return (gap > 0) + 0.5 * (gap == 0)


def report(rm, groups, world, cfg, device):
    """Print and return how well `rm` orders held-out pairs, beside what else could explain it."""
    rows = [row for group in groups for row in group.rows]
    scores = score_rows(rm, rows, min(cfg.batch_tokens, cfg.micro_batch), device)
    gap, longer, gold, best = held_out_pairs(groups, scores, world)
    right = accuracy(gap)
    result = {"accuracy": right.mean().item(), "pairs": len(gap),
              "longer_wins": accuracy(longer).mean().item(),
              "ceiling": best.mean().item() if world else None,
              "calibration_error": calibration_error(gap)}
    half = 1.96 * math.sqrt(result["accuracy"] * (1 - result["accuracy"]) / len(gap))
    print(f"held-out pairs: accuracy {result['accuracy']:.1%} +- {half:.1%} on {len(gap)}"
          + (f", ceiling {result['ceiling']:.1%}" if world else "")
          + f", longer wins {result['longer_wins']:.1%}")
    wide = gold.abs() > cfg.wide_gap
    if cfg.wide_gap and wide.any():
        result["accuracy_wide"] = right[wide].mean().item()
        print(f"where the true scores differ by more than {cfg.wide_gap}: "
              f"{result['accuracy_wide']:.1%} on {wide.sum()}")
    print("accuracy by margin of the two scores: " + by_margin(gap.abs(), right))
    lengths = torch.tensor([float(len(row)) for row in rows])
    result["length_correlation"] = torch.corrcoef(torch.stack([scores, lengths]))[0, 1].item()
    print(f"expected calibration error {result['calibration_error']:.3f}; "
          f"correlation of score and length {result['length_correlation']:+.2f}")
    return result


def by_margin(margin, right):
    """Accuracy in four equal parts of the pairs, close to far apart, beside what the margin claims."""
    parts = zip(margin.sort().values.chunk(4), right[margin.argsort()].chunk(4))
    return "  ".join(f"<{m.max():.2f}: {r.mean():.0%} (claims {m.sigmoid().mean():.0%})"
                     for m, r in parts)


def calibration_error(gap, bins=10):
    """Expected calibration error of sigmoid(gap) as the probability that "better" wins, gap (N,) in the
    units of the loss; over both orders of each pair (Guo et al. 2017)."""
    p, right = gap.abs().sigmoid(), accuracy(gap)
    bin = ((p - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    return sum((bin == b).float().mean().item() * abs((right - p)[bin == b].mean().item())
               for b in bin.unique())


@torch.inference_mode()
def check_scores(rm, device):
    """Raise UserError when a score depends on the padding, or on the texts beside it."""
    room = rm.config.block_size - (rm.pool == "token")
    rows = [[(5 * n + 3 * t) % rm.config.vocab_size for t in range(min(n, room))] for n in (3, 7, 12)]
    alone = torch.cat([rm.score(*pad([row], device)) for row in rows])
    if far(rm.score(*pad(rows, device)), alone):
        raise UserError("self-check: a text's score changes with its padding or with the texts beside it: "
                        "model.py lets a real token see a pad or another row, or reads a wrong position")


def main(cfg):
    torch.manual_seed(cfg.seed)
    order = torch.Generator().manual_seed(cfg.seed)
    device = pick_device(cfg.device)
    out = Path(cfg.out)
    folder, world = open_data(cfg.data)
    names = ("preferences.jsonl", "preferences_val.jsonl", "prompts.jsonl")
    state = State(out / "rm.state.pt", cfg, [out / "sft.pt", *(folder / name for name in names)], device)
    if cfg.pool not in RewardModel.POOLS:
        raise UserError(f"--pool {cfg.pool} is none of {', '.join(RewardModel.POOLS)}")

    gpt = load(GPT, out / "sft.pt", cfg.dropout).to(device)
    tokenizer = load_tokenizer(out / "sft.pt")
    train = read_preferences(folder / "preferences.jsonl", cfg.skip_bad)
    val = read_preferences(folder / "preferences_val.jsonl", cfg.skip_bad)
    rm = RewardModel.from_gpt(gpt, cfg.pool).to(device)  # the head swap
    check_scores(rm, device)
    gpt, rm = ready(gpt, cfg, device), ready(rm, cfg, device)
    room = rm.config.block_size - (cfg.pool == "token")
    groups = encode(train, tokenizer, room, "preferences.jsonl")

    optimizer = torch.optim.AdamW(rm.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0,
                                  fused=True)
    plan = {**sizes(groups), "budget": cfg.batch_tokens}
    first_epoch = batches(**plan, generator=torch.Generator().manual_seed(cfg.seed))
    steps = max(1, round(cfg.epochs * len(first_epoch)))
    log = Log(out / "rm.jsonl", cfg, steps, state.saved)
    rows = [len(row) for group in groups for row in group.rows]
    print(f"reward model: {len(groups)} prompts with {len(rows)} ranked responses, "
          f"{sum(rows)} tokens, read at {cfg.pool}, on {device}")

    rm.train()
    done = state.begin(log, rm=rm, optimizer=optimizer)
    for step, index in shuffled(**plan, generator=order, done=done, steps=steps):
        lr = set_lr(optimizer, cfg.lr, step - 1, steps, warmup=20, floor=0.1)
        loss, right = ranking_backward(rm, [groups[i] for i in index], cfg.micro_batch, device, step)
        norm = clip_and_step(rm, optimizer, 1.0, step)
        if step % 25 == 0 or step == steps:
            log(step, loss=loss, accuracy=right, lr=lr, grad_norm=norm)
        state.after(step)

    rm.eval()
    val_groups = encode(val, tokenizer, room, "preferences_val.jsonl")
    result = report(rm, val_groups, world, cfg, device)
    normalise(rm, gpt, groups, folder, tokenizer, cfg, device)
    save(out / "rm.pt", rm, tokenizer)
    log.report(**result)
    state.finish()
    print(f"reward model done: held-out accuracy {result['accuracy']:.1%}"
          + (f", ceiling {result['ceiling']:.1%}" if world else "") + f"; {out / 'rm.pt'}\n")


if __name__ == "__main__":
    run(main, Config)
