"""Prompts -> out/ppo.pt: fine-tune the SFT model with PPO (Schulman et al. 2017) to raise its score.

Four models: the policy, which learns; the reference, a frozen copy of it that the KL penalty holds it
to; the reward model, frozen; the critic, a copy of the reward model that learns to predict its score.
One update is: rollout -> assess -> advantages -> improve. Where the sources differ, this is what is done
(Ziegler et al. 2019, Stiennon et al. 2020, Huang et al. 2024, "The N+ implementation details"):
 (1) sampling at temperature 1 with no top-k or top-p, so that the sampler is the policy that is scored;
 (2) log-probs are recomputed by the function that the update uses, so the first ratio is exactly 1;
 (3) the KL penalty per token is k1 = logp - ref_logp, in the reward (k3 there is almost no anchor);
 (4) the score is added at the end-of-text token; a response without one gets a fixed score instead;
 (5) gamma 1, lambda 0.95; advantages are whitened over the response tokens of the whole batch;
 (6) critic and policy share nothing, so each has its own optimizer and no weighting of their losses.

Position t of every (B,T-1) tensor speaks of the choice of token t+1, and the value there is that of the
text before the choice. `mask` is True where the policy wrote that token, end-of-text included.

    python ppo.py                                  # after train_sft.py and train_rm.py
    python ppo.py --reward my_file.py:function     # function(prompts, responses) -> list of floats
"""
import math
import time
from dataclasses import dataclass
from functools import partial

import torch

from data.examples import encode_demonstrations, open_data, open_prompts, pad, prompt_room, response_mask
from data.records import read_sft
from data.split import read_training
from lib import ranks, report
from lib.checks_rm import check_start
from lib.common import Cycle, clip_and_step, finite, masked_mean, micro_batches, places, to_host
from lib.curve import Best
from lib.fast import in_pieces
from lib.flags import Shared, bounded, cli, pick_device
from lib.generate import generate
from lib.resume import Run
from lib.rewards import in_units, load_models, model_files, units
from lib.start import fit_responses
from train_sft import sft_backward


@dataclass
class Config(Shared):
    # run
    data: str = "stories"  # folder with prompts.jsonl, or "stories"
    out: str = "out"  # folder with sft.pt and rm.pt, and for the results
    sft: str = ""  # the SFT model, instead of sft.pt in --out
    rm: str = ""  # the reward model, instead of rm.pt in --out
    reward: str = ""  # FILE.py:FUNCTION instead of a reward model; this runs the code in that file
    reward_scale: str = "first"  # scores of --reward: in sd of the "first" ones, or "none": as they are
    judge: str = ""  # checkpoint of a second reward model: reported, never optimised
    updates: int = 60  # rollouts with an update each
    show: int = bounded(4, 0)  # held-out texts printed at the end, before and after
    eval_prompts: int = 256  # held-out prompts that are answered, at most
    save_every: int = bounded(10, 0)  # updates between saved states, to resume from; 0: at the end only
    save_critic: bool = True  # the critic as out/critic.pt; sample.py --tokens shows its values
    # rollout
    batch: int = 64  # prompts in a rollout
    max_new_tokens: int = None  # longest response
    temperature: float = bounded(1.0, 0.01, 100)  # of sampling and of every log-prob
    no_eos_score: float = -1.0  # score of a response that does not end: one sd below the SFT model
    # update
    epochs: int = 4  # passes over each rollout
    minibatches: int = 1  # optimizer steps in a pass
    micro_batch: int = 4096  # tokens in a forward pass, padding included; changes no result
    lr: float = bounded(3e-4, 0)  # peak for the policy; up over 5 updates (at most a tenth), then linear to 0
    critic_lr: float = bounded(3e-4, 0)  # the same for the critic
    clip: float = bounded(0.2, 1e-9, math.inf)  # of the ratio, and of the step of a value
    lam: float = bounded(0.95, 0, 1)  # lambda of GAE; gamma is 1: a response is one episode
    ptx_coef: float = 0.0  # weight of the SFT loss mixed in (PPO-ptx; Ouyang et al. 2022, eq. 2)
    # KL
    kl_coef: float = bounded(0.035, 0)  # KL penalty per nat, in standard deviations of score
    kl_budget: float = bounded(16.0, 0)  # nats a response; near it kl_coef rises
    kl_target: float = 0.0  # if > 0, kl_coef is steered towards this KL instead, up and down
    kl_horizon: int = None  # responses over which --kl-target may change kl_coef by about a fifth
    update_kl: float = bounded(0.05, 0, math.inf)  # end the update once KL(old, new) a token is above 1.5x


# ---- the mathematics: pure functions on (B,T-1) ----

def whiten(x, mask, shift_mean=True):
    """x with variance 1 (population variance) and mean 0 under the mask, or its own mean; 0 elsewhere."""
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


def adapt_kl_coef(kl_coef, kl, target, n, horizon):
    """The coefficient follows the KL, by at most 20% of n/horizon and never more than 20% a time (Ziegler
    et al. 2019, 2.2)."""
    factor = 1 + max(-0.2, min(0.2, kl / target - 1)) * min(1, n / horizon)
    return min(max(kl_coef * factor, 1e-9), 1e9)


def next_kl_coef(kl_coef, kl, cfg):
    """The coefficient after an update with so much KL. Above 3/4 of --kl-budget it rises, by half at most;
    below it falls slowly, so that the KL does not swing, back to --kl-coef. A penalty of 0 stays 0."""
    if cfg.kl_target:
        return adapt_kl_coef(kl_coef, kl, cfg.kl_target, cfg.batch, cfg.kl_horizon)
    factor = max(0.98, min(1.5, kl / (0.75 * cfg.kl_budget))) if cfg.kl_budget else 1
    return min(max(kl_coef * factor, cfg.kl_coef), 1e9)


def token_logps(gpt, tokens, temperature, mask=None):
    """Log-probability of every token after the first: tokens (B,T) -> (B,T-1), in nats.

    (2) The one function that scores tokens, for old, new and reference alike. With a mask (B,T-1), on the
    CPU, the vocabulary head runs only where it is True, and the rest is 0.
    """
    if mask is None:
        mask = torch.ones(tokens[:, 1:].shape, dtype=torch.bool)
    at = places(mask, tokens.device)
    h = gpt.trunk(tokens[:, :-1]).flatten(0, 1)[at]
    logp = in_pieces(partial(gpt.logps, temperature=temperature), gpt, h, tokens[:, 1:].flatten()[at])
    return torch.zeros(mask.numel(), device=tokens.device).index_put((at,), logp).view(mask.shape)


# ---- the four phases of an update ----

@torch.inference_mode()
def rollout(policy, prompts, eos, cfg, generator):
    """Prompts (token lists) -> the policy's responses: tokens (B,T), lengths, P (B,), mask (B,T-1),
    ended (B,), on the CPU. (1) Neither top-k nor top-p."""
    tokens, P = pad(prompts, policy.lm_head.weight.device)
    tokens, lengths = generate(policy, tokens, P, cfg.max_new_tokens, cfg.temperature, eos=eos,
                               generator=generator)
    tokens, lengths, P = tokens.cpu(), lengths.cpu(), P.cpu()
    last = tokens[torch.arange(len(tokens)), lengths - 1]
    return {"tokens": tokens, "lengths": lengths, "P": P,
            "mask": response_mask(lengths, P, tokens.shape[1]), "ended": last == eos}


@torch.inference_mode()
def assess(batch, models, cfg, where="held out"):
    """Adds logp, ref_logp, value (B,T-1) and score (B,): under inference mode, so nothing is trained.

    (4) A response without end-of-text gets cfg.no_eos_score, whatever the reward model makes of it.
    """
    device = next(models.policy.parameters()).device
    new = {name: torch.zeros_like(batch["mask"], dtype=torch.float) for name in ("logp", "ref_logp", "value")}
    for index, b in micro_batches(batch, range(len(batch["mask"])), cfg.micro_batch):
        tokens, t = b["tokens"].to(device), b["mask"].shape[1]
        new["logp"][index, :t] = token_logps(models.policy, tokens, cfg.temperature, b["mask"]).cpu()
        new["ref_logp"][index, :t] = token_logps(models.ref, tokens, cfg.temperature, b["mask"]).cpu()
        new["value"][index, :t] = models.critic(tokens[:, :-1]).cpu()
    score = models.score(batch["tokens"], batch["lengths"], batch["P"])  # once, in the order of the prompts
    new = {name: ranks.total(x) for name, x in new.items()}
    finite(where, score=score, **new)
    new["score"] = torch.where(batch["ended"], score, cfg.no_eos_score)
    raw = getattr(models.score, "raw", None)  # what a function returned, before it was scaled
    return {**batch, **new} if raw is None else {**batch, **new, "raw": raw}


@torch.inference_mode()
def advantages(batch, kl_coef, lam):
    """Adds reward, adv, ret (B,T-1): (3) reward = -kl_coef (logp - ref_logp), (4) and at the last token
    the score; (5) adv whitened."""
    reward = torch.where(batch["mask"], -kl_coef * (batch["logp"] - batch["ref_logp"]), 0.0)
    rows = torch.arange(len(reward), device=reward.device)
    reward[rows, batch["lengths"] - 2] += batch["score"]
    adv, ret = gae(reward, batch["value"], batch["mask"], 1.0, lam)
    return {**batch, "reward": reward, "adv": whiten(adv, batch["mask"]), "ret": ret}


def improve(models, optimizers, batch, cfg, update, generator, ptx=None):
    """Epochs x minibatches of clipped steps on policy and critic; returns the numbers of the last one.

    A minibatch goes through in micro-batches of like length, each weighted by its tokens, so their size
    changes no result. When KL(old, new) exceeds 1.5 x cfg.update_kl the gradients are thrown away.
    """
    policy, critic, device = models.policy, models.critic, next(models.policy.parameters()).device
    stats = {"grad_norm": 0.0}
    for _ in range(cfg.epochs):
        rows = torch.randperm(len(batch["tokens"]), generator=generator)
        for part in rows.tensor_split(min(cfg.minibatches, len(rows))):
            stats |= minibatch_backward(models, batch, part.tolist(), cfg)
            finite(f"update {update}", **stats)
            if stats["update_kl"] > 1.5 * cfg.update_kl:
                policy.zero_grad(set_to_none=True)
                critic.zero_grad(set_to_none=True)
                return stats
            if ptx:
                parts, _ = sft_backward(policy, ptx(), cfg.micro_batch, device, cfg.ptx_coef)
                finite(f"update {update}, ptx", **to_host(parts))
            stats |= clip_and_step(policy, optimizers[0], 1.0, update)
            clip_and_step(critic, optimizers[1], 1.0, update)
    return stats


def minibatch_backward(models, batch, part, cfg):
    """Gradients of a minibatch, rows `part`, left in .grad of policy and critic; returns its numbers."""
    total, device = batch["mask"][part].sum(), next(models.policy.parameters()).device
    parts = {"ratio": [], "clipped": [], "update_kl": [], "value_loss": []}
    for _, held in micro_batches(batch, part, cfg.micro_batch):
        share, b = held["mask"].sum() / total, {name: x.to(device) for name, x in held.items()}
        mask = b["mask"]
        logp = token_logps(models.policy, b["tokens"], cfg.temperature, held["mask"])
        loss, clipped = policy_loss(logp, b["logp"], b["adv"], mask, cfg.clip)
        (share * loss).backward()  # now, so that the critic's activations take the place of the policy's
        v_loss = value_loss(models.critic(b["tokens"][:, :-1]), b["value"], b["ret"], mask, cfg.clip)
        (share * v_loss).backward()
        with torch.no_grad():
            numbers = {"ratio": masked_mean((logp - b["logp"]).exp(), mask), "clipped": clipped,
                       "update_kl": approx_kl(logp, b["logp"], mask), "value_loss": v_loss}
            for name, x in numbers.items():
                parts[name].append(share * x)
    return to_host(parts)


# ---- the run ----

def main(cfg):
    torch.manual_seed(cfg.seed)
    device = pick_device(cfg.device)
    order = torch.Generator().manual_seed(cfg.seed)
    generator = torch.Generator(device).manual_seed(cfg.seed)
    folder, world = open_data(cfg.data)
    files = [folder / name for name in ("prompts.jsonl", "prompts_val.jsonl", "sft.jsonl")]
    run = Run("ppo", cfg, [*files, *model_files(cfg)], device)

    models = load_models(cfg, device, run)
    policy, critic, tokenizer = models.policy, models.critic, models.tokenizer
    block_size = policy.config.block_size
    room = min([block_size, *(rm.room for rm in (critic, models.judge) if rm)])
    cfg = fit_responses(cfg, folder, tokenizer, room)
    prompts, val = open_prompts(folder, tokenizer, prompt_room(room, cfg.max_new_tokens), cfg)
    demonstrations = encode_demonstrations(read_training(read_sft, folder / "sft.jsonl", cfg), tokenizer,
                                           block_size, "sft.jsonl") if cfg.ptx_coef else []
    some, some_ptx = Cycle(prompts, cfg.batch, order), Cycle(demonstrations, cfg.batch, order)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=lr, eps=1e-5, weight_decay=0.0, fused=True)
                  for model, lr in ((policy, cfg.lr), (critic, cfg.critic_lr))]
    check_start((rollout, assess, advantages, minibatch_backward), models, prompts, cfg, device)
    held_out = partial(report.evaluate, (rollout, assess), val, world, cfg, device)
    before = held_out(models)
    print(f"PPO: {len(prompts)} prompts, {cfg.batch} a rollout, held out ({len(val)}): "
          f"{report.describe(report.means(before))}\n{units(models.score)}", end="")

    now, warn, best = {"kl_coef": cfg.kl_coef}, report.Warnings(), Best(policy)
    done = run.begin(cfg, cfg.updates, policy=policy, critic=critic, policy_optimizer=optimizers[0],
                     critic_optimizer=optimizers[1], order=order, generator=generator,
                     prompts=some, demonstrations=some_ptx, now=now, warn=warn, **best.parts,
                     **({"reward": models.score} if cfg.reward else {}))
    warmup = max(1, min(5, cfg.updates // 10))
    for update in range(done + 1, cfg.updates + 1):
        if update % 10 == 1 and update > 1:  # here, where a reward function that fails loses nothing
            with run.between_steps():
                seen = held_out(models)
            report.look(run, update - 1, before, seen, best, warn, tokenizer, cfg)
        start = time.monotonic()
        factor = min(1, update / warmup) * (1 - (update - 1) / cfg.updates)
        for optimizer, lr in zip(optimizers, (cfg.lr, cfg.critic_lr), strict=True):
            optimizer.param_groups[0]["lr"] = lr * factor
        batch = rollout(policy, next(some), tokenizer.eos, cfg, generator)
        batch = advantages(assess(batch, models, cfg, f"update {update}"), now["kl_coef"], cfg.lam)
        stats = report.rollout_stats(batch, tokenizer, world)
        step = improve(models, optimizers, batch, cfg, update, order,
                       partial(next, some_ptx) if cfg.ptx_coef else None)
        stats["kl_coef"], now["kl_coef"] = now["kl_coef"], next_kl_coef(now["kl_coef"], stats["kl"], cfg)
        seconds = max(1e-3, time.monotonic() - start)
        run.log(update, **stats, **step, tok_s=round(int(batch["mask"].sum()) / seconds))
        warn.look(stats | step)
        run.after(update)

    after = held_out(models)
    report.look(run, cfg.updates, before, after, best, warn, tokenizer, cfg)
    sft = models._replace(policy=models.ref)
    results = [before, after, *(held_out(sft, seed=seed) for seed in (1, 2, 3))]
    before, after, *more = (in_units(result, models.score, cfg.no_eos_score) for result in results)
    chosen = report.best_of([before, *more])
    run.finish(policy, tokenizer, *report.last_reports(before, chosen, after, cfg.updates, models.score),
               samples=report.samples(before, after), best=best, critic=critic if cfg.save_critic else None)
    report.print_table(before, chosen, after, world, cfg.show)
    print(f"{units(models.score)}PPO done: {report.describe(report.means(after))}; {run.result}")


if __name__ == "__main__":
    cli(main, Config, report.LEGEND)
