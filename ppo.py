"""Prompts -> out/ppo.pt: the SFT model moves uphill on the reward model's scores (Schulman et al. 2017).

Four models: the policy, which learns; the reference, a frozen copy of it that keeps it near the text it
knows; the reward model, frozen; the critic, a copy of the reward model that learns to foresee its score.
One update is: rollout -> assess -> advantages -> improve. Where the sources differ, this is what is done
(Ziegler et al. 2019, Stiennon et al. 2020, Huang et al. 2024, "The N+ implementation details"):
 1. sampling at temperature 1 with no top-k or top-p, so that the sampler is the policy that is scored;
 2. log-probs are computed again by the function that the update uses, so the first ratio is exactly 1;
 3. the penalty per token is k1 = logp - ref_logp, in the reward (k3 there is almost no anchor);
 4. the score is added at the end-of-text token; a response that has none gets a fixed penalty instead;
 5. gamma 1, lambda 0.95; advantages are whitened over the response tokens of the whole batch;
 6. critic and policy share nothing, so each has its own optimizer and no weighting of their losses.

Position t of every (B,T-1) tensor speaks of the choice of token t+1, and the value there is that of the
text before the choice. `mask` is true where the policy wrote that token, end-of-text included.

    python ppo.py                                  # after train_sft.py and train_rm.py
    python ppo.py --reward my_file.py:function     # function(prompts, responses) -> list of floats
"""
import copy
import importlib.util
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch

from common import (Log, UserError, batches, clip_and_step, finite, load, load_tokenizer, pad,
                    pick_device, ready, run, save)
from data.records import open_data, read_prompts, read_sft
from model import GPT, RewardModel
from resume import State
from train_sft import encode as encode_sft
from train_sft import sft_backward


@dataclass
class Config:
    data: str = "stories"  # folder with prompts.jsonl, or "stories"
    out: str = "out"  # folder with sft.pt and rm.pt, and for the results
    reward: str = ""  # FILE.py:FUNCTION instead of out/rm.pt; this runs the code in that file
    judge: str = ""  # checkpoint of another reward model, which is only reported on, never climbed
    updates: int = 60  # rollouts with an update each
    batch: int = 64  # prompts in a rollout
    max_new_tokens: int = 100  # longest response
    temperature: float = 1.0  # of sampling and of every log-prob
    epochs: int = 4  # passes over each rollout
    minibatches: int = 1  # optimizer steps in a pass
    micro_batch: int = 4096  # tokens in a forward pass, padding included; changes no result
    lr: float = 3e-4  # peak for the policy; warm-up over 5 updates, then linear to 0
    critic_lr: float = 3e-4  # the same for the critic
    kl_coef: float = 0.035  # price of a nat of KL to the reference, in standard deviations of score
    kl_target: float = 0.0  # if > 0, kl_coef is steered towards this KL (nats a response)
    kl_horizon: int = 1000  # responses over which kl_coef may change by about a fifth
    update_kl: float = 0.05  # inner passes end when KL(old, new) a token is above 1.5 x this
    no_eos_score: float = -1.0  # score of a response that does not end: one sd below the SFT model
    clip: float = 0.2  # of the ratio, and of the step of a value
    lam: float = 0.95  # lambda of GAE; gamma is 1: a response is one episode
    ptx_coef: float = 0.0  # weight of the SFT loss mixed in (PPO-ptx; Ouyang et al. 2022, eq. 2)
    show: int = 4  # held-out texts printed at the end, before and after
    save_every: int = 10  # updates after which the state is saved, to go on from; 0: never
    resume: bool = False  # go on from the last saved state
    seed: int = 1  # of order and samples
    device: str = "auto"  # "cuda", "mps", "cpu"
    bf16: bool = False  # the blocks' matrix products in bfloat16, but not in generation
    checkpoint_activations: bool = False  # less memory, a third more work: blocks are computed twice
    compile: bool = False  # torch.compile, in generation only on a GPU; needs a C++ compiler
    skip_bad: bool = False  # leave out lines that can't be used, and count them


# ---- the mathematics: pure functions on (B,T-1) ----

def masked_mean(x, mask):
    """Mean of x where mask is true; what stands elsewhere, NaN included, has no influence."""
    return torch.where(mask, x, 0.0).sum() / mask.sum()


def whiten(x, mask, shift_mean=True):
    """x with mean 0 and variance 1 under the mask (population variance), 0 elsewhere.

    shift_mean=False leaves the mean where it is.
    """
    mean = masked_mean(x, mask)
    white = (x - mean) * torch.rsqrt(masked_mean((x - mean) ** 2, mask) + 1e-8)
    return torch.where(mask, white if shift_mean else white + mean, 0.0)


def gae(reward, value, mask, gamma, lam):
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16) -> (adv, ret), 0 outside the mask.

    After the last token of a response comes nothing, so its next value is 0. ret = adv + value is the
    critic's target: take it before adv is whitened.
    """
    reward, value = torch.where(mask, reward, 0.0), torch.where(mask, value, 0.0)
    adv = torch.zeros_like(reward)
    following, next_value = torch.zeros_like(reward[:, 0]), torch.zeros_like(reward[:, 0])
    for t in reversed(range(reward.shape[1])):
        following = reward[:, t] + gamma * next_value - value[:, t] + gamma * lam * following
        adv[:, t], next_value = following, value[:, t]
    adv = torch.where(mask, adv, 0.0)
    return adv, adv + value


def policy_loss(logp, old_logp, adv, mask, clip):
    """Clipped surrogate (Schulman et al. 2017, eq. 7) -> (loss, clip_fraction).

    clip_fraction is the share of tokens where the clip binds, so that no gradient flows.
    """
    ratio = torch.exp(torch.where(mask, logp - old_logp, 0.0))
    free, held = -adv * ratio, -adv * ratio.clamp(1 - clip, 1 + clip)
    return masked_mean(torch.maximum(free, held), mask), masked_mean((held > free).float(), mask)


def value_loss(value, old_value, ret, mask, clip):
    """One half of the larger of the squared errors of the value and of the value clipped to +-clip
    around the old one (Ziegler et al. 2019)."""
    value, old_value = torch.where(mask, value, 0.0), torch.where(mask, old_value, 0.0)
    held = old_value + (value - old_value).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.maximum((value - ret) ** 2, (held - ret) ** 2), mask)


def approx_kl(logp, old_logp, mask):
    """KL(old, new) a token in nats by k3 = (ratio - 1) - log ratio: unbiased, never negative
    (Schulman 2020)."""
    log_ratio = torch.where(mask, logp - old_logp, 0.0)
    return masked_mean(torch.expm1(log_ratio) - log_ratio, mask)


def explained_variance(value, ret, mask):
    """1 - mean squared error / variance of the returns; nan when the returns don't vary."""
    spread = masked_mean((ret - masked_mean(ret, mask)) ** 2, mask)
    return (1 - masked_mean((value - ret) ** 2, mask) / spread).item() if spread > 1e-12 else math.nan


def adapt_kl_coef(kl_coef, kl, target, n, horizon):
    """The coefficient follows the KL, by at most 20% of n/horizon a time (Ziegler et al. 2019, 2.2)."""
    return kl_coef * (1 + max(-0.2, min(0.2, kl / target - 1)) * n / horizon)


def token_logps(gpt, tokens, temperature, mask=None):
    """Log-probability of every token after the first: tokens (B,T) -> (B,T-1), in nats.

    The one function that scores tokens, for old, new and reference alike. With a mask (B,T-1) the
    vocabulary head runs only where it is true, and the rest is 0.
    """
    if mask is None:
        mask = torch.ones_like(tokens[:, 1:], dtype=torch.bool)
    h = gpt.trunk(tokens[:, :-1])
    logp = torch.zeros(mask.shape, device=tokens.device)
    return logp.masked_scatter(mask, gpt.logps(h[mask], tokens[:, 1:][mask], temperature))


def response_mask(lengths, P, T):
    """(B,T-1): true where token t+1 is of the response, given whole lengths and prompt lengths (B,)."""
    written = torch.arange(1, T, device=lengths.device)
    return (written >= P[:, None]) & (written < lengths[:, None])


# ---- the four phases of an update ----

@torch.inference_mode()
def rollout(policy, prompts, eos, cfg, generator):
    """Prompts (token lists) -> the policy's responses: tokens (B,T), lengths, P (B,), mask (B,T-1),
    ended (B,)."""
    tokens, P = pad(prompts, policy.lm_head.weight.device)
    tokens, lengths = policy.generate(tokens, P, cfg.max_new_tokens, cfg.temperature, eos=eos,
                                      generator=generator)
    last = tokens[torch.arange(len(tokens), device=tokens.device), lengths - 1]
    return {"tokens": tokens, "lengths": lengths, "P": P,
            "mask": response_mask(lengths, P, tokens.shape[1]), "ended": last == eos}


@torch.inference_mode()
def assess(batch, policy, ref, critic, reward, cfg, where="held out"):
    """Adds logp, ref_logp, value (B,T-1) and score (B,): under inference mode, so nothing is trained.

    A response without end-of-text gets cfg.no_eos_score, whatever the reward model makes of it.
    """
    B, T = batch["mask"].shape[0], batch["tokens"].shape[1]
    device = batch["tokens"].device
    new = {name: torch.zeros(B, T - 1, device=device) for name in ("logp", "ref_logp", "value")}
    new["score"] = torch.zeros(B, device=device)
    for index, b in micro_batches(batch, range(B), cfg.micro_batch):
        t = b["mask"].shape[1]
        new["logp"][index, :t] = token_logps(policy, b["tokens"], cfg.temperature, b["mask"])
        new["ref_logp"][index, :t] = token_logps(ref, b["tokens"], cfg.temperature, b["mask"])
        new["value"][index, :t] = critic(b["tokens"][:, :-1])
        new["score"][index] = reward(b["tokens"], b["lengths"], b["P"])
    finite(where, **new)
    new["score"] = torch.where(batch["ended"], new["score"], cfg.no_eos_score)
    return {**batch, **new}


@torch.inference_mode()
def advantages(batch, kl_coef, lam):
    """Adds reward, adv, ret (B,T-1): reward = -kl_coef (logp - ref_logp), and at the last token the
    score."""
    reward = torch.where(batch["mask"], -kl_coef * (batch["logp"] - batch["ref_logp"]), 0.0)
    rows = torch.arange(len(reward), device=reward.device)
    reward[rows, batch["lengths"] - 2] += batch["score"]
    adv, ret = gae(reward, batch["value"], batch["mask"], 1.0, lam)
    return {**batch, "reward": reward, "adv": whiten(adv, batch["mask"]), "ret": ret}


def improve(policy, critic, optimizers, batch, cfg, update, generator, ptx=None):
    """Epochs x minibatches of clipped steps on policy and critic; returns the numbers of the last one.

    A minibatch goes through in micro-batches of like length, each weighted by its tokens, so their size
    changes no result. When KL(old, new) is above 1.5 x cfg.update_kl the gradients are thrown away.
    """
    stats = {"grad_norm": 0.0}
    for _ in range(cfg.epochs):
        rows = torch.randperm(len(batch["tokens"]), generator=generator)
        for part in rows.tensor_split(min(cfg.minibatches, len(rows))):
            stats |= minibatch_backward(policy, critic, batch, part.tolist(), cfg)
            finite(f"update {update}", **stats)
            if stats["update_kl"] > 1.5 * cfg.update_kl:
                policy.zero_grad(set_to_none=True)
                critic.zero_grad(set_to_none=True)
                return stats
            if ptx:
                sft_backward(policy, ptx(), cfg.micro_batch, batch["tokens"].device, f"update {update}, ptx",
                             cfg.ptx_coef)
            stats["grad_norm"] = clip_and_step(policy, optimizers[0], 1.0, update)
            clip_and_step(critic, optimizers[1], 1.0, update)
    return stats


def minibatch_backward(policy, critic, batch, part, cfg):
    """Gradients of a minibatch, rows `part`, left in .grad of policy and critic; returns its numbers."""
    total = batch["mask"][part].sum()
    stats = {"ratio": 0.0, "clipped": 0.0, "update_kl": 0.0, "value_loss": 0.0}
    for _, b in micro_batches(batch, part, cfg.micro_batch):
        share, mask = b["mask"].sum() / total, b["mask"]
        logp = token_logps(policy, b["tokens"], cfg.temperature, mask)
        loss, clipped = policy_loss(logp, b["logp"], b["adv"], mask, cfg.clip)
        (share * loss).backward()  # now, so that the critic's activations take the place of the policy's
        v_loss = value_loss(critic(b["tokens"][:, :-1]), b["value"], b["ret"], mask, cfg.clip)
        (share * v_loss).backward()
        with torch.no_grad():
            numbers = {"ratio": masked_mean((logp - b["logp"]).exp(), mask), "clipped": clipped,
                       "update_kl": approx_kl(logp, b["logp"], mask), "value_loss": v_loss}
        for name, x in numbers.items():
            stats[name] += (share * x).item()
    return stats


def micro_batches(batch, rows, budget):
    """(rows, batch of those rows) in pieces of at most `budget` tokens, like lengths together, cut to
    the longest."""
    rows, lengths = list(rows), batch["lengths"].tolist()
    for piece in batches([lengths[i] for i in rows], budget):
        index = [rows[i] for i in piece]
        T = max(lengths[i] for i in index)
        b = {name: x[index] for name, x in batch.items()}
        yield index, {name: x[:, : T if name == "tokens" else T - 1] if x.dim() == 2 else x
                      for name, x in b.items()}


# ---- where scores come from ----

def model_reward(rm):
    """The reward model as a function of (tokens, lengths, P)."""
    return lambda tokens, lengths, P: rm.score(tokens, lengths)


def text_reward(function, name, tokenizer):
    """A user's function(prompts, responses) -> list of floats as a function of (tokens, lengths, P)."""
    def reward(tokens, lengths, P):
        prompts, responses = split_texts(tokens, lengths, P, tokenizer)
        result = function(prompts, responses)
        try:
            scores = torch.tensor([s + 0.0 for s in result], dtype=torch.float32)  # numpy's numbers, too
        except (TypeError, ValueError, OverflowError, RuntimeError):
            scores = torch.empty(0)
        if scores.shape != (len(prompts),) or not torch.isfinite(scores).all():
            raise UserError(f"--reward {name} must return {len(prompts)} finite numbers for "
                            f"{len(prompts)} responses, it returned {str(result)[:80]}")
        return scores.to(tokens.device)
    return reward


def split_texts(tokens, lengths, P, tokenizer):
    """tokens (B,T) -> prompts, responses as texts."""
    rows = [row[:n] for row, n in zip(tokens.tolist(), lengths.tolist())]
    return ([tokenizer.decode(row[:p]) for row, p in zip(rows, P.tolist())],
            [tokenizer.decode(row[p:]) for row, p in zip(rows, P.tolist())])


def import_function(name):
    """The function in "FILE.py:FUNCTION". This runs the code in that file."""
    path, _, function = name.rpartition(":")
    if not (Path(path).is_file() and path.endswith(".py")):
        raise UserError(f"--reward {name}: there is no file {path!r} that ends in .py; it takes "
                        "FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(vars(module).get(function)):
        raise UserError(f"--reward {name}: {path} has no function {function!r}")
    return vars(module)[function]


def load_models(cfg, device):
    """policy, reference, critic, reward function, tokenizer from out/sft.pt, out/rm.pt or --reward."""
    out = Path(cfg.out)
    policy, tokenizer = ready(load(GPT, out / "sft.pt"), cfg, device), load_tokenizer(out / "sft.pt")
    ref = ready(copy.deepcopy(policy), cfg, device).requires_grad_(False)
    if cfg.reward:
        reward = text_reward(import_function(cfg.reward), cfg.reward, tokenizer)
        critic = ready(RewardModel.from_gpt(policy), cfg, device)
        torch.nn.init.zeros_(critic.reward_head.weight)  # nothing is known of these scores: start at 0
        return policy, ref, critic, reward, tokenizer
    rm = load_reward_model(out / "rm.pt", policy, tokenizer, cfg, device)
    critic = ready(copy.deepcopy(rm), cfg, device).requires_grad_(True)
    return policy, ref, critic, model_reward(rm), tokenizer


def load_reward_model(path, policy, tokenizer, cfg, device):
    """A frozen reward model that can read what the policy writes."""
    rm = ready(load(RewardModel, path), cfg, device).requires_grad_(False)
    shorter = rm.config.block_size < policy.config.block_size
    if load_tokenizer(path).spec() != tokenizer.spec() or shorter:
        raise UserError(f"{path} was trained with another tokenizer, or for shorter texts, than the "
                        "policy: train it again")
    return rm


def encode_prompts(prompts, tokenizer, room, name):
    """Prompts as token lists; one longer than `room` loses its beginning: that is counted, printed."""
    if room < 1:
        raise UserError("--max-new-tokens leaves no room for a prompt in the model's block_size")
    rows = [tokenizer.encode(prompt) or [tokenizer.eos] for prompt in prompts]
    if long := sum(len(row) > room for row in rows):
        print(f"{name}: {long} of {len(rows)} prompts cut from the left to {room} tokens")
    return [row[-room:] for row in rows]


def cycle(n, size, generator, left):
    """Index lists of `size`, each epoch a fresh permutation of range(n); goes on for ever.

    `left` is the list of those still to come, kept by the caller so that it can be saved.
    """
    while True:
        while len(left) < size:
            left += torch.randperm(n, generator=generator).tolist()
        index, left[:] = left[:size], left[size:]
        yield index


# ---- report ----

def evaluate(policy, ref, critic, reward, judge, prompts, tokenizer, world, cfg, device):
    """One response to each held-out prompt, always with the same random numbers: lists with an entry a
    prompt; gold and judge only where there is such a thing."""
    generator = torch.Generator(device).manual_seed(0)
    result = {"score": [], "judge": [], "kl": [], "gold": [], "eos": [], "length": [], "texts": []}
    for start in range(0, len(prompts), cfg.batch):
        batch = rollout(policy, prompts[start : start + cfg.batch], tokenizer.eos, cfg, generator)
        batch = assess(batch, policy, ref, critic, reward, cfg)
        result["score"] += batch["score"].tolist()
        kl = torch.where(batch["mask"], batch["logp"] - batch["ref_logp"], 0.0).sum(1)
        result["kl"] += kl.tolist()
        result["eos"] += batch["ended"].float().tolist()
        result["length"] += batch["mask"].sum(1).float().tolist()
        texts = split_texts(batch["tokens"], batch["lengths"], batch["P"], tokenizer)
        result["texts"] += list(zip(*texts))
        result["gold"] += [world.gold_score(*text) for text in zip(*texts)] if world else []
        with torch.inference_mode():
            result["judge"] += judge.score(batch["tokens"], batch["lengths"]).tolist() if judge else []
    return result


def means(result):
    """The mean of every list of numbers in a result of `evaluate`, and how varied its texts are."""
    numbers = {name: fmean(x) for name, x in result.items() if name != "texts" and x}
    return numbers | {"distinct_2": distinct_2([response for _, response in result["texts"]])}


def distinct_2(texts):
    """Different pairs of neighbouring words over all pairs, of all texts together (Li et al. 2016): it
    falls when a policy says the same thing to everybody."""
    words = [text.split() for text in texts]
    pairs = [pair for text in words for pair in zip(text, text[1:])]
    return len(set(pairs)) / max(1, len(pairs))


def win_rate(after, before):
    """Share of prompts whose number is larger after than before; ties count half."""
    return fmean([(a > b) + 0.5 * (a == b) for a, b in zip(after, before)])


def print_table(before, after, world, show):
    """The same held-out prompts under the SFT model and under PPO, then the first texts, unedited."""
    names = "".join(f"{name:>11}" for name in means(before))
    print(f"\n{len(before['texts'])} held-out prompts   {names}")
    for name, result in (("SFT", before), ("PPO", after)):
        print(f"{name:<21}   " + "".join(f"{x:11.3f}" for x in means(result).values()))
    print(f"PPO scores higher than SFT in {win_rate(after['score'], before['score']):.1%}", end="")
    if world:
        closed = (fmean(after["gold"]) - fmean(before["gold"])) / (world.BEST - fmean(before["gold"]))
        print(f", has more gold in {win_rate(after['gold'], before['gold']):.1%}; of the gold between "
              f"the SFT model and the best possible it gained {closed:.1%}", end="")
    if before["judge"]:
        print(f", with the judge in {win_rate(after['judge'], before['judge']):.1%}", end="")
    print(" (ties half)")
    for i in range(min(show, len(before["texts"]))):
        print(f"\n{before['texts'][i][0]}")
        for name, result in (("SFT", before), ("PPO", after)):
            gold = f", gold {result['gold'][i]:.2f}" if world else ""
            print(f"  {name} (score {result['score'][i]:+.2f}{gold}):{result['texts'][i][1]}")
    print()


def rollout_stats(batch, tokenizer, world):
    """Means over a rollout: of responses, or of response tokens under the mask."""
    mask = batch["mask"]
    stats = {"score": batch["score"].mean().item()}
    if world:
        texts = split_texts(batch["tokens"], batch["lengths"], batch["P"], tokenizer)
        stats["gold"] = fmean([world.gold_score(*text) for text in zip(*texts)])
    stats["kl"] = torch.where(mask, batch["logp"] - batch["ref_logp"], 0.0).sum(1).mean().item()
    stats["entropy"] = -masked_mean(batch["logp"], mask).item()  # an unbiased estimate, in nats a token
    stats["eos"] = batch["ended"].float().mean().item()
    stats["length"] = mask.sum(1).float().mean().item()
    stats["explained"] = explained_variance(batch["value"], batch["ret"], mask)
    return stats


def warnings(stats, first):
    """What goes wrong in an update, with the likely cause and the flag to change; `first` are the
    numbers of the first update. The limits are far outside of what a good run shows."""
    wrong = {
        "the KL is above 50 nats a response: the policy has left the text that the reward model knows, "
        "its scores mean little there. Raise --kl-coef or lower --lr": stats["kl"] > 50,
        "the entropy is below a tenth of the first update's: the policy says the same thing again and "
        "again. Raise --kl-coef or lower --lr": stats["entropy"] < 0.1 * first["entropy"],
        "less than half as many responses end as in the first update: long ones are scored higher, or a "
        "missing end costs too little. Lower --no-eos-score": stats["eos"] < 0.5 * first["eos"],
    }
    return [sentence for sentence, so in wrong.items() if so]


def check_start(policy, ref, critic, prompts, eos, cfg, device):
    """Raise UserError unless, before any step, the KL to the reference is 0 and the ratio 1."""
    short = replace(cfg, max_new_tokens=min(16, cfg.max_new_tokens))
    batch = rollout(policy, prompts[:8], eos, short, torch.Generator(device).manual_seed(0))
    no_score = lambda tokens, lengths, P: torch.zeros(len(tokens), device=device)
    batch = advantages(assess(batch, policy, ref, critic, no_score, cfg), 0.0, cfg.lam)
    if not torch.equal(batch["logp"], batch["ref_logp"]):
        raise UserError("self-check: the KL to the reference is not 0 before the first step: the same "
                        "weights give other log-probs the second time; is dropout or other noise left on?")
    stats = minibatch_backward(policy, critic, batch, range(len(batch["mask"])), cfg)
    policy.zero_grad(set_to_none=True)
    critic.zero_grad(set_to_none=True)
    exact = device.type == "cpu" and not (cfg.bf16 or cfg.compile)
    limit = 1e-5 if exact else 1e-2  # there, other kernels may be taken where gradients are needed
    if abs(stats["ratio"] - 1) > limit or stats["update_kl"] > limit**2:
        raise UserError("self-check: the ratio is not 1 before the first step: the update computes other "
                        "log-probs than the rollout; does model.py depend on gradients being needed?")


def main(cfg):
    torch.manual_seed(cfg.seed)
    device = pick_device(cfg.device)
    order = torch.Generator().manual_seed(cfg.seed)
    generator = torch.Generator(device).manual_seed(cfg.seed)
    out = Path(cfg.out)
    folder, world = open_data(cfg.data)
    files = [folder / name for name in ("prompts.jsonl", "prompts_val.jsonl", "sft.jsonl")]
    files += [out / "sft.pt", out / "rm.pt", cfg.judge, cfg.reward.rpartition(":")[0]]
    state = State(out / "ppo.state.pt", cfg, files, device)

    policy, ref, critic, reward, tokenizer = load_models(cfg, device)
    judge = load_reward_model(Path(cfg.judge), policy, tokenizer, cfg, device) if cfg.judge else None
    reward_token = any(rm.pool == "token" for rm in (critic, judge) if rm)  # it needs a place
    room = policy.config.block_size - cfg.max_new_tokens - reward_token
    prompts = read_prompts(folder / "prompts.jsonl", cfg.skip_bad)
    prompts = encode_prompts(prompts, tokenizer, room, "prompts.jsonl")
    val = read_prompts(folder / "prompts_val.jsonl", cfg.skip_bad)
    val = encode_prompts(val, tokenizer, room, "prompts_val.jsonl")
    ptx, left, ptx_left = None, [], []
    if cfg.ptx_coef:
        rows = read_sft(folder / "sft.jsonl", cfg.skip_bad)
        rows = encode_sft(rows, tokenizer, policy.config.block_size, "sft.jsonl")
        ptx_index = cycle(len(rows), cfg.batch, order, ptx_left)
        ptx = lambda: [rows[i] for i in next(ptx_index)]

    optimizers = [torch.optim.AdamW(model.parameters(), lr=lr, eps=1e-5, weight_decay=0.0, fused=True)
                  for model, lr in ((policy, cfg.lr), (critic, cfg.critic_lr))]
    factor = lambda u: min(1, (u + 1) / 5) * (1 - u / cfg.updates)
    check_start(policy, ref, critic, prompts, tokenizer.eos, cfg, device)
    held_out = (ref, critic, reward, judge, val, tokenizer, world, cfg, device)
    before = evaluate(policy, *held_out)
    print(f"PPO: {len(prompts)} prompts, {cfg.batch} a rollout, held out: {describe(means(before))}")

    log = Log(out / "ppo.jsonl", cfg, cfg.updates, state.saved)
    index, warned = cycle(len(prompts), cfg.batch, order, left), set()
    now = {"kl_coef": cfg.kl_coef, "first": None}  # first: the numbers of the first update
    done = state.begin(log, policy=policy, critic=critic, policy_optimizer=optimizers[0],
                       critic_optimizer=optimizers[1], order=order, generator=generator, left=left,
                       ptx_left=ptx_left, now=now)
    for update in range(done + 1, cfg.updates + 1):
        start = time.time()
        for optimizer, lr in zip(optimizers, (cfg.lr, cfg.critic_lr)):
            optimizer.param_groups[0]["lr"] = lr * factor(update - 1)
        batch = rollout(policy, [prompts[i] for i in next(index)], tokenizer.eos, cfg, generator)
        batch = advantages(assess(batch, policy, ref, critic, reward, cfg, f"update {update}"),
                           now["kl_coef"], cfg.lam)
        stats = rollout_stats(batch, tokenizer, world)
        stats |= improve(policy, critic, optimizers, batch, cfg, update, order, ptx)
        if cfg.kl_target:
            now["kl_coef"] = adapt_kl_coef(now["kl_coef"], stats["kl"], cfg.kl_target, cfg.batch,
                                           cfg.kl_horizon)
            stats["kl_coef"] = now["kl_coef"]
        now["first"] = now["first"] or stats
        log(update, **stats, tok_s=round(batch["mask"].sum().item() / (time.time() - start)))
        if update % 10 == 0 and update < cfg.updates:
            seen = means(evaluate(policy, *held_out))
            log.report(update=update, **seen)
            print(f"      held out: {describe(seen)}")
        for sentence in set(warnings(stats, now["first"])) - warned:  # each of them once
            print(f"warning: {sentence}")
            warned.add(sentence)
        state.after(update)

    after = evaluate(policy, *held_out)
    print_table(before, after, world, cfg.show)
    save(out / "ppo.pt", policy, tokenizer)
    log.report(update=0, **means(before))
    wins = {f"{name}_win_rate": win_rate(after[name], before[name]) for name in ("gold", "judge")
            if before[name]}
    log.report(update=cfg.updates, **means(after), **wins,
               win_rate=win_rate(after["score"], before["score"]))
    state.finish()
    print(f"PPO done: {describe(means(after))}; {out / 'ppo.pt'}")


def describe(numbers):
    return "  ".join(f"{name} {x:.3f}" for name, x in numbers.items())


if __name__ == "__main__":
    run(main, Config)
