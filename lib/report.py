"""Numbers, tables and warnings of the reward model and of PPO: what is reported, never trained on."""
import itertools
import math
from statistics import fmean

import torch
import torch.nn.functional as F

from data.examples import pad
from data.files import UserError, json_object
from lib.baselines import Linear, ngram_losses
from lib.common import masked_mean
from lib.generate import generate
from lib.rewards import in_units, scale_of, score_rows, split_texts
from lib.state import check_plain


def print_sample(gpt, tokenizer, prompt):
    """Print one unedited continuation of a prompt (token ids)."""
    gpt.eval()
    tokens, lengths = pad([prompt], gpt.lm_head.weight.device)
    P = len(prompt)
    tokens, lengths = generate(gpt, tokens, lengths, gpt.config.block_size - P, eos=tokenizer.eos)
    print(f"      | {tokenizer.decode(prompt)} >>{tokenizer.decode(tokens[0, P:lengths[0]].tolist())}")
    gpt.train()


# ---- SFT ----

def report_ngrams(loss, gpt, rows, val_rows, curve):
    """Print and return the loss of n-gram models of the same tokens beside the network's, in nats."""
    unigram, bigram = ngram_losses(rows, val_rows, gpt.config.vocab_size)
    print(f"beside it: counts of single tokens have a loss of {unigram:.4f}, of pairs {bigram:.4f}: "
          + compare(bigram - loss, "nats", "pairs", curve))
    return {"unigram_loss": unigram, "bigram_loss": bigram}


def compare(lead, unit, other, curve, chance=0.0):
    """How far the network is ahead of what is trivial; if it is behind by more than chance, the likely cause
    and the flag."""
    if lead >= 0:
        return f"the network is {f'ahead of {other} by {lead:.3g} {unit}' if lead else f'level with {other}'}"
    if -lead <= chance:
        return f"the network is behind {other} by {-lead:.3g} {unit}, which may be chance"
    cause = ("it was still improving when it ended: raise --epochs" if curve.improving else
             "it knows the training texts better than others, by heart: raise --bpe-dropout or --dropout, "
             "lower --lr, or add data" if curve.by_heart else
             "it has learned little from the training texts, too: try another --lr, or more --epochs")
    return f"warning: the network is behind {other} by {-lead:.3g} {unit}; {cause}"


# ---- reward model ----

def accuracy(gap):
    """1 where the better one is ahead, 1/2 where they are equal: a constant model gets 1/2."""
    return (gap > 0) + 0.5 * (gap == 0)


def held_out_pairs(groups, scores, world):
    """For every pair of each Ranking, better - worse: gap of score, of length and of gold, and the best
    possible accuracy; each (N,), nan where unknown. scores (M,): of all responses, in order."""
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


def score_groups(rm, groups, cfg, device):
    """Scores (M,) of all responses of the groups, in order."""
    rows, was = [row for group in groups for row in group.rows], rm.training
    scores = score_rows(rm.eval(), rows, min(cfg.batch_tokens, cfg.micro_batch), device)
    rm.train(was)
    return scores


def count_texts(groups):
    """How many different responses to their prompts the groups rank."""
    return len({(group.texts[0], text) for group in groups for text in group.texts[1]})


def half_width(accuracy, pairs, texts):
    """Of its 95% interval (Wilson's, the longer side). Pairs of the same texts are not independent: no more
    are counted than texts."""
    low, high = wilson(accuracy, min(pairs, texts))
    return max(accuracy - low, high - accuracy)


FEW_PAIRS = 300


def measure_pairs(rm, groups, cfg, device):
    """Accuracy and loss on all pairs of the groups, while the reward model trains."""
    gap = held_out_pairs(groups, score_groups(rm, groups, cfg, device), None)[0]
    numbers = [("val_accuracy", accuracy(gap).mean().item()), ("val_loss", -F.logsigmoid(gap).mean().item())]
    # the first says which weights are the best; with few pairs one of them more or less would decide
    return dict(numbers if len(gap) >= FEW_PAIRS else numbers[::-1])


def report_pairs(rm, groups, world, cfg, device):
    """Print and return how well `rm` orders held-out pairs, beside what else could explain it."""
    scores = score_groups(rm, groups, cfg, device)
    gap, longer, gold, best = held_out_pairs(groups, scores, world)
    right = accuracy(gap)
    result = {"accuracy": right.mean().item(), "pairs": len(gap),
              "longer_wins": accuracy(longer).mean().item(),
              "ceiling": best.mean().item() if world else None,
              "calibration_error": calibration_error(gap)}
    texts = count_texts(groups)
    half = half_width(result["accuracy"], len(gap), texts)
    print(f"held-out pairs: accuracy {result['accuracy']:.1%} +- {half:.1%} (95%) on {len(gap)} of {texts} "
          "texts" + (f", ceiling {result['ceiling']:.1%}" if world else "")
          + f", longer wins {result['longer_wins']:.1%}" + "; so few pairs say little" * (len(gap) < 30))
    wide = gold.abs() > cfg.wide_gap
    if cfg.wide_gap and not wide.any():
        print(f"no two of the true scores differ by more than {cfg.wide_gap}")
    elif cfg.wide_gap:
        result["accuracy_wide"] = right[wide].mean().item()
        print(f"where the true scores differ by more than {cfg.wide_gap}: "
              f"{result['accuracy_wide']:.1%} on {wide.sum()}")
    result["by_margin"] = by_margin(gap.abs(), right, 10)
    print("accuracy by margin of the two scores: " + "  ".join(
        f"<{part['margin']:.2f}: {part['accuracy']:.0%} (claims {part['claimed']:.0%})"
        for part in by_margin(gap.abs(), right, 4)))
    lengths = torch.tensor([float(len(row)) for group in groups for row in group.rows])
    result["length_correlation"] = torch.corrcoef(torch.stack([scores, lengths]))[0, 1].item()
    print(f"expected calibration error {result['calibration_error']:.3f}; correlation of score and length "
          + ("unknown: one of them does not vary" if math.isnan(result["length_correlation"]) else
             f"{result['length_correlation']:+.2f}"))
    return result


def report_words(right, groups, val_groups, curve):
    """Print and return how well linear regression on words orders the held-out pairs, beside `right`, the
    reward model's accuracy."""
    linear = Linear(groups)
    scores = torch.tensor([linear.score(text) for group in val_groups for text in group.texts[1]])
    gap = held_out_pairs(val_groups, scores, None)[0]
    other, chance = accuracy(gap).mean().item(), half_width(right, len(gap), count_texts(val_groups))
    print(f"beside it: ridge regression on which words occur in a response has {other:.1%}: "
          + compare(100 * (right - other), "points", "it", curve, 100 * chance))
    return {"ridge_accuracy": other}


def report_agreement(folder):
    """Print and return how often the labeller gave the same answer to what tools/label.py asked twice, a tie
    on one side counting half; {} where nothing was asked twice.

    Where q is the probability of an answer, two answers agree with E[q^2 + (1-q)^2], and the best guess is
    right with E[max(q, 1-q)], which by Jensen's inequality is at most `label_ceiling`.
    """
    try:
        lines = (folder / "labels.jsonl").read_bytes().split(b"\n")[:-1]  # what a kill cut off is no line
        agrees = [x for line in lines if (x := json_object(line).get("agrees")) in (0, 0.5, 1)]
    except (OSError, UserError):
        return {}
    if not agrees:
        return {}
    share, n = fmean(agrees), len(agrees)
    low, high = wilson(share, n)
    ceiling, at_most = ((1 + math.sqrt(max(0, 2 * x - 1))) / 2 for x in (share, high))
    print(f"the labeller agreed with an earlier answer in {share:.1%} of {n} pairs asked twice (95%: "
          f"{low:.0%} to {high:.0%}): " + (
              f"no reward model can be expected to pass {ceiling:.0%} (or {at_most:.0%}, at the end of that "
              "interval)" if ceiling < 1 else "that sets a reward model no ceiling"))
    return {"self_agreement": share, "asked_twice": n, "label_ceiling": ceiling}


def wilson(rate, n):
    """The 95% interval of a share, observed `rate` in n cases (Wilson 1927)."""
    z2 = 1.96**2
    middle, half = rate + z2 / (2 * n), 1.96 * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n))
    return (middle - half) / (1 + z2 / n), (middle + half) / (1 + z2 / n)


def report_wins(first, second, best):
    """Print how often the model named `second` was better; best: of each prompt 0, 1, or None for a tie."""
    if not best:
        print("nothing was compared")
        return
    n, ties = len(best), best.count(None)
    rate = (best.count(1) + ties / 2) / n
    low, high = wilson(rate, n)
    needed = next(m for m in itertools.count(1) if wilson(rate, m)[1] - wilson(rate, m)[0] <= 0.1)
    print(f"{second} wins {rate:.1%} against {first}, 95% interval {low:.1%} to {high:.1%} (Wilson): "
          f"{best.count(1)} won, {best.count(0)} lost, {ties} ties, which count half; "
          + (f"about {needed - n} more prompts would make it +-5%" if needed > n else "+-5% or better"))


def by_margin(margin, right, parts):
    """So many equal parts of the pairs, close to far apart: the largest margin in each, its accuracy, and
    what the margins claim that to be."""
    order = margin.argsort()
    parts = zip(margin[order].chunk(parts), right[order].chunk(parts), strict=True)
    return [{"margin": m.max().item(), "accuracy": r.mean().item(), "claimed": m.sigmoid().mean().item()}
            for m, r in parts]


def calibration_error(gap, bins=10):
    """Expected calibration error of sigmoid(gap) as the probability that "better" wins, gap (N,) in the
    units of the loss; over both orders of each pair (Guo et al. 2017)."""
    p, right = gap.abs().sigmoid(), accuracy(gap)
    bin = ((p - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    return sum((bin == b).float().mean().item() * abs((right - p)[bin == b].mean().item())
               for b in bin.unique())


# ---- PPO ----

LEGEND = """columns, while it trains and in out/ppo.log.jsonl:
  score, judge     mean reward, in sd of the SFT model's samples; judge: of a second model, never optimised
  raw              mean of what --reward returned, before it was scaled
  gold             mean true score, where it is known; nothing sees it
  best_of_4_...    the same of the best by score of 4 samples of the SFT model a prompt
  kl               nats a response between the policy and the SFT model
  entropy          nats a token; near 0: the policy says the same thing again and again
  eos, length      share of responses that end; their tokens
  explained        share of the returns' variance that the critic predicts; 1 is perfect, below 0 useless
  ratio, clipped   of new to old probability in the last minibatch; share of tokens where the clip binds
  update_kl        nats a token between the policy before and after the update; see --update-kl
  value_loss, grad_norm, kl_coef   the critic's loss; the policy's gradient before clipping; the KL penalty
  distinct_2       different pairs of neighbouring words over all; falls when all answers are alike"""


def measure(batch, tokenizer, world):
    """What is known of each response of an assessed rollout: score, kl (nats), eos, length, each (B,); raw,
    if the score is a scaled one; gold, where a `world` knows it; and the texts, [(prompt, response)]."""
    mask = batch["mask"]
    texts = list(zip(*split_texts(batch["tokens"], batch["lengths"], batch["P"], tokenizer), strict=True))
    return {"score": batch["score"], "raw": batch.get("raw", []),
            "gold": [world.gold_score(*text) for text in texts] if world else [],
            "kl": torch.where(mask, batch["logp"] - batch["ref_logp"], 0.0).sum(1),
            "eos": batch["ended"].float(), "length": mask.sum(1).float(), "texts": texts}


def evaluate(phases, prompts, world, cfg, device, models, seed=0):
    """One response to each held-out prompt, always with the same random numbers: lists with an entry a
    prompt; gold and judge are empty where there is no such thing. phases: rollout and assess of ppo.py."""
    rollout, assess = phases
    generator = torch.Generator(device).manual_seed(seed)
    result = {name: [] for name in ("score", "raw", "judge", "kl", "gold", "eos", "length", "texts")}
    for start in range(0, len(prompts), cfg.batch):
        some = prompts[start : start + cfg.batch]
        batch = rollout(models.policy, some, models.tokenizer.eos, cfg, generator)
        batch = assess(batch, models, cfg)
        with torch.inference_mode():
            whole = batch["tokens"].to(device), batch["lengths"].to(device)
            judged = models.judge.score(*whole) if models.judge else []
        for name, x in {**measure(batch, models.tokenizer, world), "judge": judged}.items():
            result[name] += x.tolist() if torch.is_tensor(x) else x
    return in_units(result, models.score, cfg.no_eos_score)


def best_of(results):
    """Of n results of `evaluate` for the SFT model the best by score at each prompt: what that gets from the
    same reward without any training."""
    n, prompts = len(results), range(len(results[0]["score"]))
    best = [max(range(n), key=[result["score"][i] for result in results].__getitem__) for i in prompts]
    chosen = {name: [results[k][name][i] for i, k in enumerate(best)] if x else []
              for name, x in results[0].items()}
    kl = math.log(n) - (n - 1) / n  # at most (Beirami et al. 2024, theorem 1)
    return chosen | {"kl": [kl] * len(best)}


def look(run, update, before, seen, best, warn, tokenizer, cfg):
    """Log and print a result of `evaluate`; keep the policy if it is the best within the KL budget, or near
    the target. UserError: it has diverged, and the best so far is saved."""
    limit = 1.25 * cfg.kl_target or cfg.kl_budget
    was, now = means(before), means(seen)
    if update < run.log.steps:  # else the table comes
        run.log.report(update=update, **now)
        print(f"      held out: {describe(now)}" + ", above --kl-budget" * (0 < cfg.kl_budget < now["kl"]))
        warn.compare(before, seen)
    if now["kl"] > max(50, 2 * limit) or now["eos"] == 0 and was["eos"] > 0.25:
        kept = run.save_diverged(best, tokenizer)
        raise UserError(f"after update {update} the policy has diverged: its KL is {now['kl']:.1f} nats a "
                        f"response and {now['eos']:.0%} of its responses end. {run.result} is not replaced"
                        f"{kept}. Raise --kl-coef or lower --lr")
    if not limit or now["kl"] <= limit:
        best.offer(update, now["score"])


def explained_variance(value, ret, mask):
    """1 - mean squared error / variance of the returns; nan when the returns don't vary."""
    spread = masked_mean((ret - masked_mean(ret, mask)) ** 2, mask)
    return (1 - masked_mean((value - ret) ** 2, mask) / spread).item() if spread > 1e-12 else math.nan


def rollout_stats(batch, tokenizer, world):
    """Means over a rollout: of responses, or of response tokens under the mask."""
    seen, mask = measure(batch, tokenizer, world), batch["mask"]
    raw = {"raw": seen["raw"].mean().item()} if len(seen["raw"]) else {}
    return {"score": seen["score"].mean().item(), **raw, **({"gold": fmean(seen["gold"])} if world else {}),
            "kl": seen["kl"].mean().item(),
            "entropy": -masked_mean(batch["logp"], mask).item(),  # an unbiased estimate, in nats per token
            "eos": seen["eos"].mean().item(), "length": seen["length"].mean().item(),
            "explained": explained_variance(batch["value"], batch["ret"], mask)}


def means(result):
    """The mean of every list of numbers in a result of `evaluate`, and how varied its texts are."""
    numbers = {name: fmean(x) for name, x in result.items() if name != "texts" and x}
    return numbers | {"distinct_2": distinct_2([response for _, response in result["texts"]])}


def distinct_2(texts):
    """Distinct pairs of neighbouring words over all pairs, of all texts together (Li et al. 2016): drops
    when the policy gives every prompt the same answer."""
    words = [text.split() for text in texts]
    pairs = [pair for text in words for pair in zip(text, text[1:], strict=False)]
    return len(set(pairs)) / max(1, len(pairs))


def win_rate(after, before):
    """Share of prompts whose number is larger after than before; ties count half."""
    return fmean([(a > b) + 0.5 * (a == b) for a, b in zip(after, before, strict=True)])


def last_reports(before, chosen, after, updates, score):
    """The reports that the log ends with."""
    best = {f"best_of_4_{name}": x for name, x in means(chosen).items() if name in ("score", "gold", "judge")}
    return ({"update": 0, **means(before), **scale_of(score)},
            {"update": updates, **means(after), **win_rates(after, before), **best})


def win_rates(after, before):
    """The win rates that the log keeps; gold and judge only where there is such a thing."""
    wins = {f"{name}_win_rate": win_rate(after[name], before[name])
            for name in ("gold", "judge") if before[name]}
    return wins | {"win_rate": win_rate(after["score"], before["score"])}


def samples(before, after):
    """Two results of `evaluate` as rows for out/ppo.samples.jsonl: of each prompt the response of the SFT
    model and PPO's, with all that is known of them."""
    rows = []
    for i, texts in enumerate(before["texts"]):
        for name, result in (("SFT", before), ("PPO", after)):
            prompt, response = texts if result is before else result["texts"][i]
            rows.append({"prompt": prompt, "response": response, "model": name} | {
                name: x[i] for name, x in result.items() if name != "texts" and x})
    return rows


def print_table(before, chosen, after, world, show):
    """The same held-out prompts under the SFT model, the best of its samples, and PPO, then the first texts,
    unedited."""
    names = "".join(f"{name:>11}" for name in means(before))
    print(f"\n{len(before['texts'])} held-out prompts   {names}")
    few = len(before["texts"]) < 30
    for name, result in (("SFT", before), ("SFT, best of 4", chosen), ("PPO", after)):
        print(f"{name:<21}   " + "".join(f"{x:11.3f}" for x in means(result).values()))
    print(f"PPO scores higher than SFT in {win_rate(after['score'], before['score']):.1%}", end="")
    if world:
        closed = (fmean(after["gold"]) - fmean(before["gold"])) / (world.BEST - fmean(before["gold"]))
        print(f", has more gold in {win_rate(after['gold'], before['gold']):.1%}; of the gold between "
              f"the SFT model and the best possible it gained {closed:.1%}", end="")
    if before["judge"]:
        print(f", with the judge in {win_rate(after['judge'], before['judge']):.1%}", end="")
    print(" (ties half)" + "; so few prompts say little" * few)
    print(beside_best_of(means(chosen), means(after)))
    for sentence in gain_from_ends(before, after):
        print(f"warning: {sentence}")
    for i in range(min(show, len(before["texts"]))):
        print(f"\n{before['texts'][i][0]}")
        for name, result in (("SFT", before), ("PPO", after)):
            gold = f", gold {result['gold'][i]:.2f}" if world else ""
            print(f"  {name} (score {result['score'][i]:+.2f}{gold}):{result['texts'][i][1] or ' (nothing)'}")
    print()


FEW_END = 0.05  # share of responses
NONE_ENDS = ("hardly any response ends, so nearly all of them get --no-eos-score. Raise --max-new-tokens, or "
             "train the SFT model longer")


def beside_best_of(chosen, after):
    """A sentence: PPO beside the best of 4, by score, and by gold where it is known."""
    lead = {name: after[name] - chosen[name] for name in ("score", "gold") if name in after}
    other = "the best of 4 samples of the SFT model"
    by = ", ".join(f"{name} {x:+.3f}" for name, x in lead.items())
    if lead["score"] <= 0:
        why = (NONE_ENDS if after["eos"] < FEW_END else "all scores are alike" if lead["score"] == 0 else
               "raise --updates, or --kl-budget if the KL has come near it")
        return f"warning: PPO is not ahead of {other} ({by}): {why}"
    if lead.get("gold", 1) <= 0:
        return (f"warning: PPO is ahead of {other} by score, but not in truth ({by}): raise --kl-coef, or "
                "improve the reward model")
    return f"PPO is ahead of {other}: {by}"


class Warnings:
    """Prints each warning of a run once. A part of the run: `first`, the numbers of the first update, and
    `useless`, how many updates in a row had an explained variance below 0."""

    def __init__(self):
        self.first, self.useless, self.said = None, 0, set()

    def look(self, stats):
        """To be called with the numbers of each update."""
        self.first = self.first or stats
        self.useless = self.useless + 1 if stats["explained"] < 0 else 0
        self.say(warnings(stats, self.first, self.useless))

    def compare(self, before, after):
        """To be called with two results of `evaluate`."""
        self.say(gain_from_ends(before, after))

    def say(self, sentences):
        for sentence in sentences:
            if sentence not in self.said:
                print(f"warning: {sentence}")
        self.said |= set(sentences)

    def state_dict(self):
        return {"first": self.first, "useless": self.useless}

    def check_state(self, state):
        """ValueError: not what state_dict can be."""
        check_plain(self.state_dict(), state, "the warnings")

    def load_state_dict(self, state):
        self.first, self.useless = state["first"], state["useless"]


def warnings(stats, first, useless=0):
    """What goes wrong in an update, with the likely cause and the flag to change; `first` are the
    numbers of the first update, `useless` counts the updates in a row with explained variance below 0. The
    limits are far outside what a good run shows."""
    wrong = {
        NONE_ENDS: stats["eos"] < FEW_END,
        "the KL is above 50 nats a response: the policy has left the text that the reward model knows, "
        "so its scores mean little. Raise --kl-coef or lower --lr": stats["kl"] > 50,
        "the entropy is below a tenth of the first update's: the policy repeats itself. "
        "Raise --kl-coef or lower --lr": stats["entropy"] < 0.1 * first["entropy"],
        "fewer than half as many responses end as in the first update: long ones score higher, or a "
        "missing end costs too little. Lower --no-eos-score": stats["eos"] < 0.5 * first["eos"],
        f"the explained variance has been below 0 for {PATIENCE} updates: the critic predicts worse than one "
        "number for all would. It moves by --clip an update, so scores need a mean near 0 and a standard "
        "deviation near 1 (--reward-scale first); else raise --critic-lr": useless >= PATIENCE,
        "an update took no step: KL(old, new) exceeded 1.5 x --update-kl before the first one. Raise it":
            stats.get("grad_norm") == 0 and stats["update_kl"] > 0,
    }
    return [sentence for sentence, so in wrong.items() if so]


PATIENCE = 15  # a critic that starts from nothing needs about 10


def gain_from_ends(before, after):
    """A warning, [sentence] or [], about two results of `evaluate`: more than half of a gain in score is
    that --no-eos-score is given more or less often, not that the responses that end are better."""
    def mean_of_ended(result):
        ended = [score for score, eos in zip(result["score"], result["eos"], strict=True) if eos]
        return fmean(ended) if ended else None

    was, now = mean_of_ended(before), mean_of_ended(after)
    gain = fmean(after["score"]) - fmean(before["score"])
    often = (fmean(before["eos"]) + fmean(after["eos"])) / 2
    better = 0.0 if None in (was, now) else often * (now - was)
    if not (gain > 0.05 and better < gain / 2):
        return []
    return ["more than half of the gain in score is --no-eos-score, given more or less often than before: "
            "not better responses, but fewer or more that end. Compare eos, and change --no-eos-score or "
            "--max-new-tokens"]


def describe(numbers):
    return "  ".join(f"{name} {x:.3f}" for name, x in numbers.items())
