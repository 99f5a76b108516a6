"""PPO: formulas against definitions and worked numbers, the four phases, worlds with a known optimum.

Ids (P1, K5, T4, B2, ...): docs/method.md.
"""
import copy
import hashlib
import itertools
import math
import types

import numpy
import pytest
import torch
import torch.nn as nn
from helpers import BYTES, CPU, PPO, gen, jsonl, tiny_gpt

import lib.generate
import ppo
from data.examples import encode_prompts, pad, response_mask
from data.files import UserError
from lib import report
from lib.checkpoint import load, save
from lib.common import Cycle, micro_batches
from lib.report import evaluate, explained_variance, means, win_rate
from lib.rewards import Models, TextScore, load_models, model_score
from model import GPT, RewardModel
from ppo import (
    Config,
    adapt_kl_coef,
    advantages,
    approx_kl,
    assess,
    gae,
    improve,
    masked_mean,
    minibatch_backward,
    policy_loss,
    rollout,
    token_logps,
    value_loss,
    whiten,
)
from train_sft import sft_batch, sft_loss

EOS = 16
PHASES = rollout, assess
POISON = [math.nan, 1e9]
ONE = torch.ones(1, 1, dtype=torch.bool)  # the mask of a single token


NUMBERS = types.SimpleNamespace(eos=EOS, decode=lambda ids: " ".join(map(str, ids)))  # a tokenizer


def make_batch(B=12, seed=0, new=8, kl_coef=0.1, score=None, std=0.3, **settings):
    """An assessed rollout with advantages: (models, cfg, batch). The reference is another GPT than the
    policy; the reward model, frozen, is also the judge, and the critic starts as its copy."""
    cfg = Config(max_new_tokens=new, **settings)
    policy, ref = tiny_gpt(seed, std), tiny_gpt(seed + 100, std).requires_grad_(False)
    rm = RewardModel.from_gpt(tiny_gpt(seed + 200)).eval()
    critic = copy.deepcopy(rm)
    models = Models(policy, ref, critic, score or model_score(rm), rm.requires_grad_(False), NUMBERS)
    prompts = [torch.randint(16, (1 + i % 4,), generator=gen(i)).tolist() for i in range(B)]
    batch = assess(rollout(policy, prompts, EOS, cfg, gen(seed)), models, cfg)
    return models, cfg, plain(advantages(batch, kl_coef, cfg.lam))


def toy(policy, ref, critic, score):
    """Models without a judge; only toys do without a tokenizer."""
    return Models(policy, ref, critic, score, None, None)


def plain(batch):
    """Copies that autograd accepts: what a phase returns was made under inference mode."""
    return {name: torch.as_tensor(x).clone() for name, x in batch.items()}


def adam(models, lr=1e-3):
    """The two optimizers of `improve`."""
    return [torch.optim.AdamW(model.parameters(), lr=lr, eps=1e-5, weight_decay=0.0)
            for model in (models.policy, models.critic)]


def grads(*models):
    return [p.grad.clone() for model in models for p in model.parameters() if p.grad is not None]


def cleared_grads(models):
    """The gradients of policy and critic, which then have none."""
    result = grads(models.policy, models.critic)
    models.policy.zero_grad(), models.critic.zero_grad()
    return result


def weights(model):
    return {name: p.clone() for name, p in model.state_dict().items()}


def unchanged(model, before):
    return all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def close(a, b, tol=1e-6):
    torch.testing.assert_close(a, b, atol=tol, rtol=0)


def ragged(B=6, T=9, seed=0):
    """A mask as responses have it: some prompt, some response, some padding; the last row is full."""
    g = gen(seed)
    start, length = torch.randint(0, 3, (B, 1), generator=g), torch.randint(1, 5, (B, 1), generator=g)
    t = torch.arange(T)
    mask = (t >= start) & (t < start + length)
    mask[-1] = True
    return mask


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=gen(seed), dtype=dtype)


def poisoned(x, mask, poison):
    return torch.where(mask, x, poison)


# ---- formulas ----

@pytest.mark.parametrize("lam, adv", [(.95, (.325516, .658438, .956250, .375, .5)),
                                      (1., (.45, .75, 1, .4, .5)), (0., (-.3, -.25, .6, -.1, .5))])
def test_P1_gae_fixture(lam, adv):
    r, v = torch.tensor([[-.1, .05, 0, -.2, 1]]), torch.tensor([[.3, .1, -.2, .4, .5]])
    a, ret = gae(r, v, torch.ones(1, 5, dtype=torch.bool), 1.0, lam)
    close(a, torch.tensor([adv]), 2e-6)
    close(ret, torch.tensor([adv]) + v, 2e-6)


def test_P5_score_at_eos_fixture():
    r, v = torch.tensor([[-.1, .05, 0, -.2 + 1]]), torch.tensor([[.3, .1, -.2, .4]])
    adv, _ = gae(r, v, torch.ones(1, 4, dtype=torch.bool), 1.0, .95)
    close(adv, torch.tensor([[.34695, .681, .98, .4]]), 2e-6)


@pytest.mark.parametrize("gamma, lam", [(1., .95), (.9, .7), (1., 1.), (.8, 0.)])
def test_P1_P2_P4_gae_is_the_double_sum_of_each_row_alone(gamma, lam):
    """From the definition, row by row without padding; NaN and 1e9 in the padding change nothing."""
    mask = ragged()
    r, v = normal(*mask.shape, seed=1, dtype=torch.float64), normal(*mask.shape, seed=2, dtype=torch.float64)
    expected = torch.zeros_like(r)
    for i in range(len(mask)):
        steps = mask[i].nonzero().flatten().tolist()
        value = v[i].tolist() + [0.0]
        after = {t: value[t + 1] if t + 1 in steps else 0.0 for t in steps}
        delta = {t: r[i, t].item() + gamma * after[t] - value[t] for t in steps}
        for t in steps:
            expected[i, t] = sum((gamma * lam) ** (k - t) * delta[k] for k in steps if k >= t)
    for poison in POISON:
        adv, ret = gae(poisoned(r, mask, poison), poisoned(v, mask, poison), mask, gamma, lam)
        close(adv, expected, 1e-12)
        close(ret, torch.where(mask, expected + v, 0.0), 1e-12)
    if gamma == lam == 1:  # reward-to-go
        to_go = torch.where(mask, r, 0.0).flip(1).cumsum(1).flip(1)
        close(gae(r, torch.zeros_like(v), mask, 1.0, 1.0)[1][mask], to_go[mask], 1e-12)


def test_P7_whiten_fixture_is_the_population_variance():
    x = torch.tensor([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]])
    white = whiten(x, torch.ones_like(x, dtype=torch.bool), shift_mean=False)
    close(white[0], torch.tensor([.050807, .438105, .825403]), 1e-5)
    assert white.mean().item() == pytest.approx(1.6, abs=1e-6)


@pytest.mark.parametrize("poison", POISON)
def test_P7_P8_whiten_ignores_pads(poison):
    mask = ragged()
    x = 3 + 2 * normal(*mask.shape)
    white = whiten(poisoned(x, mask, poison), mask)
    inside = white[mask]
    assert inside.mean().abs() < 1e-6 and inside.var(unbiased=False).item() == pytest.approx(1, abs=1e-3)
    assert (white[~mask] == 0).all()
    kept = whiten(poisoned(x, mask, poison), mask, shift_mean=False)
    assert kept[mask].mean().item() == pytest.approx(x[mask].mean().item(), abs=1e-5)
    assert (kept[~mask] == 0).all()
    assert torch.isfinite(whiten(torch.ones_like(x), mask)).all()


@pytest.mark.parametrize("poison", POISON)
def test_P15_masked_mean_and_its_gradient(poison):
    mask = ragged()
    x = poisoned(normal(*mask.shape), mask, poison).requires_grad_()
    m = masked_mean(x, mask)
    m.backward()
    assert m.item() == pytest.approx(x[mask].mean().item(), abs=1e-6)
    close(x.grad, mask / mask.sum())


# .81 and 1.19: on the edge of the clip the maximum has two gradients, and rounding chooses
@pytest.mark.parametrize("ratio, adv, loss, grad, clipped", [
    (.5, 1, -.5, True, 0), (.81, 1, -.81, True, 0), (1., 1, -1, True, 0), (1.5, 1, -1.2, False, 1),
    (.5, -1, .8, False, 1), (1., -1, 1, True, 0), (1.19, -1, 1.19, True, 0), (1.5, -1, 1.5, True, 0)])
def test_P11_P13_clip_quadrants(ratio, adv, loss, grad, clipped):
    logp = torch.full((1, 1), math.log(ratio)).requires_grad_()
    value, fraction = policy_loss(logp, torch.zeros(1, 1), torch.full((1, 1), float(adv)), ONE, .2)
    value.backward()
    assert value.item() == pytest.approx(loss, abs=1e-6) and fraction.item() == clipped
    assert logp.grad.item() == pytest.approx(-adv * ratio if grad else 0, abs=1e-6)


@pytest.mark.parametrize("old, value, ret, loss, grad", [
    (0, .5, 1, .32, 0), (0, .5, .4, .02, 0), (0, .1, 1, .405, -.9), (0, -.5, 1, 1.125, -1.5)])
def test_P12_value_clip(old, value, ret, loss, grad):
    v = torch.full((1, 1), float(value)).requires_grad_()
    out = value_loss(v, torch.full((1, 1), float(old)), torch.full((1, 1), float(ret)), ONE, .2)
    out.backward()
    assert out.item() == pytest.approx(loss, abs=1e-6) and v.grad.item() == pytest.approx(grad, abs=1e-6)


@pytest.mark.parametrize("poison", POISON)
def test_P15_P16_pads_reach_no_loss_and_no_gradient(poison):
    """NaN or 1e9 in every input at masked places, more padding, another order of the rows: all the same."""
    mask = ragged()
    logp, old, adv, ret = (normal(*mask.shape, seed=s) * 0.3 for s in range(4))

    def run(mask, logp, old, adv, ret):
        results = []
        for function in (lambda x: policy_loss(x, old, adv, mask, .2)[0],
                         lambda x: policy_loss(x, old, adv, mask, .2)[1],
                         lambda x: value_loss(x, old, ret, mask, .2), lambda x: approx_kl(x, old, mask)):
            x = logp.clone().requires_grad_()
            y = function(x)
            if y.requires_grad:
                y.backward()
                results.append(x.grad)
            results.append(y.detach())
        return results

    clean = run(mask, logp, old, adv, ret)
    assert all(torch.isfinite(x).all() for x in clean) and len(clean) == 7
    bad = run(mask, *(poisoned(x, mask, poison) for x in (logp, old, adv, ret)))
    wide = run(*(torch.nn.functional.pad(x, (0, 5), value=v) for x, v in zip(
        (mask, logp, old, adv, ret), (False, poison, poison, poison, poison), strict=True)))
    perm = torch.randperm(len(mask), generator=gen(0))
    moved = run(*(x[perm] for x in (mask, logp, old, adv, ret)))
    for a, b, c, d in zip(clean, bad, wide, moved, strict=True):
        close(b, a)
        close(c[:, : a.shape[1]] if a.dim() == 2 else c, a)
        close(d, a[perm] if a.dim() == 2 else a)


def test_K6_approx_kl_is_k3_of_old_and_new():
    """Ten tokens in the frequencies of pi: the mean is the exact KL(pi, ref), in this direction."""
    pi, ref = torch.tensor([.5, .3, .2]), torch.tensor([.4, .4, .2])
    tokens = torch.tensor([[0] * 5 + [1] * 3 + [2] * 2])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    assert approx_kl(ref.log()[tokens], pi.log()[tokens], mask).item() == pytest.approx(.0252671539, abs=1e-7)
    for token, k3 in ((0, .023144), (1, .045651), (2, 0)):
        one = torch.tensor([[token]])
        assert approx_kl(ref.log()[one], pi.log()[one], mask[:, :1]).item() == pytest.approx(k3, abs=1e-6)
    assert approx_kl(normal(4, 9) - 2, normal(4, 9, seed=1), ragged(4)) > 0


def test_K10_adaptive_coefficient():
    for kl, factor in ((6, 1), (12, 1.01024), (1e9, 1.01024), (0, .98976), (-50, .98976), (6.3, 1.00256)):
        assert adapt_kl_coef(.15, kl, 6, 512, 10000) == pytest.approx(.15 * factor, rel=1e-5)


def test_P31_explained_variance():
    mask = ragged()
    ret = normal(*mask.shape)
    for poison in POISON:
        bad = poisoned(ret, mask, poison)
        assert explained_variance(bad, bad, mask) == pytest.approx(1)
        mean = poisoned(ret[mask].mean().expand_as(ret), mask, poison)
        assert explained_variance(mean, bad, mask) == pytest.approx(0, abs=1e-6)
    off_by_one = 1 - 1 / ret[mask].var(unbiased=False).item()
    assert explained_variance(ret + 1, ret, mask) == pytest.approx(off_by_one, abs=1e-5)
    assert math.isnan(explained_variance(ret, torch.ones_like(ret), mask))


# ---- log-probs and masks ----

@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_P21_token_logps_is_teacher_forcing(temperature):
    gpt = tiny_gpt()
    tokens = torch.randint(17, (3, 8), generator=gen(0))
    logp = token_logps(gpt, tokens, temperature)
    assert logp.shape == (3, 7)
    for i, t in itertools.product(range(3), range(1, 8)):
        alone = (gpt(tokens[i : i + 1, :t])[0, -1] / temperature).log_softmax(-1)[tokens[i, t]]
        assert logp[i, t - 1].item() == pytest.approx(alone.item(), abs=1e-5)
    mask = ragged(3, 7)
    close(token_logps(gpt, tokens, temperature, mask), torch.where(mask, logp, 0.0), 1e-5)


def test_T3_response_mask_counts_the_eos():
    mask = response_mask(torch.tensor([6, 4, 5]), torch.tensor([2, 3, 1]), 7)
    assert mask.int().tolist() == [[0, 1, 1, 1, 1, 0], [0, 0, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]]


def test_P22_logps_are_those_of_the_distribution_that_was_sampled(monkeypatch):
    """At T=0.7, recorded inside the sampler; recomputing at T=1 gives something else."""
    gpt, seen, shipped = tiny_gpt(), [], lib.generate.sample

    def record(logits, uniform, temperature, top_k, top_p):
        assert top_k is None and top_p is None  # K8: no filter between the sampler and the log-probs
        token = shipped(logits, uniform, temperature, top_k, top_p)
        seen.append((logits.float() / temperature).log_softmax(-1).gather(1, token[:, None])[:, 0])
        return token

    monkeypatch.setattr(lib.generate, "sample", record)
    cfg = Config(max_new_tokens=9, temperature=0.7)
    batch = plain(rollout(gpt, [[1, 2, 3], [4], [5, 6]], None, cfg, gen(0)))
    sampled = torch.stack(seen, 1)  # (B, 9): no eos, so no row ends
    at = {T: token_logps(gpt, batch["tokens"], T, batch["mask"])[batch["mask"]].view(3, 9)
          for T in (0.7, 1.0)}
    close(at[0.7], sampled, 1e-4)
    assert (at[1.0] - sampled).abs().max() > 0.1


@pytest.mark.parametrize("eos", [EOS, 0])
def test_T3_T5_rollout_masks(eos):
    """Lengths come from eos, not from the 0 of padding; an eos or a 0 inside the prompt means nothing."""
    gpt = tiny_gpt(std=0.1)
    prompts = [[1, eos, 2], [3], [eos], [5, 0]] * 16
    batch = rollout(gpt, prompts, eos, Config(max_new_tokens=12), gen(1))
    tokens, lengths = batch["tokens"], batch["lengths"]
    assert batch["P"].tolist() == [len(p) for p in prompts] and tokens.shape[1] == lengths.max()
    zeros = 0
    for row, n, prompt, mask, ended in zip(tokens.tolist(), lengths.tolist(), prompts, batch["mask"],
                                           batch["ended"], strict=True):
        response = row[len(prompt) : n]
        assert row[: len(prompt)] == prompt and eos not in response[:-1]
        assert bool(ended) == (response[-1] == eos) and (ended or len(response) == 12)
        assert mask.nonzero().flatten().tolist() == list(range(len(prompt) - 1, n - 1))
        zeros += 0 in response[:-1]
    assert 0 < batch["ended"].sum() < 64 and (zeros > 0 or eos == 0)


def test_T4_T6_assess():
    """Only rows without eos get no_eos_score, and nothing but that; the reward model sees the text up to the
    eos; the tokens stay as they were; nothing needs a gradient (P18)."""
    seen = []
    cfg = Config(max_new_tokens=10, no_eos_score=-7.5, micro_batch=40)
    policy = tiny_gpt(std=.1)
    batch = plain(rollout(policy, [[1, EOS, 2], [3], [4, 5]] * 8, EOS, cfg, gen(1)))
    digest = hashlib.sha256(batch["tokens"].numpy().tobytes()).hexdigest()

    def score(tokens, lengths, P):
        for row, n, p in zip(tokens.tolist(), lengths.tolist(), P.tolist(), strict=True):
            seen.append((row[:n], p))
            assert not any(row[n:])
        return (tokens * torch.arange(1, tokens.shape[1] + 1)).sum(1).float()

    models = toy(policy, tiny_gpt(5), RewardModel.from_gpt(tiny_gpt(6)), score)
    judged = plain(assess(batch, models, cfg))
    assert hashlib.sha256(judged["tokens"].numpy().tobytes()).hexdigest() == digest
    assert sorted(seen) == sorted((row[:n], p) for row, n, p in zip(
        *(batch[name].tolist() for name in ("tokens", "lengths", "P")), strict=True))
    free = score(batch["tokens"], batch["lengths"], batch["P"])
    assert 0 < judged["ended"].sum() < 24
    assert torch.equal(judged["score"][judged["ended"]], free[judged["ended"]])
    assert (judged["score"][~judged["ended"]] == -7.5).all()
    mask = judged["mask"]
    for name, model in (("logp", policy), ("ref_logp", models.ref)):
        close(judged[name][mask], token_logps(model, batch["tokens"], 1.0)[mask], 1e-5)
    close(judged["value"][mask], models.critic(batch["tokens"])[:, :-1][mask], 1e-5)
    assert not any(x.requires_grad for x in assess(batch, models, cfg).values())


def test_a_score_that_is_not_finite_is_an_error():
    with pytest.raises(UserError, match="held out: non-finite score"):
        make_batch(score=lambda tokens, lengths, P: torch.full((len(tokens),), math.nan))


@pytest.mark.parametrize("pool", ["last", "mean", "max"])
def test_P20_critic_starts_as_the_reward_model(pool):
    rm = RewardModel.from_gpt(tiny_gpt(), pool)
    rm.normalise(torch.tensor([3., 8]))
    critic = copy.deepcopy(rm)
    tokens, lengths = pad([[1, 2, 3, EOS], [4, EOS], [5, 6, 7, 8, 9, EOS]])
    close(critic(tokens)[torch.arange(3), lengths - 1], rm.score(tokens, lengths), 1e-5)


def test_P20_critic_of_a_reward_function_starts_at_zero():
    nn.init.zeros_((critic := RewardModel.from_gpt(tiny_gpt())).reward_head.weight)
    assert (critic(torch.randint(17, (3, 9), generator=gen(0))) == 0).all()
    assert explained_variance(torch.zeros(3, 9), normal(3, 9), ragged(3)) <= 0


# ---- reward and advantages ----

def test_K1_K4_K9_K11_reward_of_a_copy_is_the_score_at_the_last_token_only():
    """At T=0.7 too: KL to an exact copy is 0, whatever kl_coef is."""
    models, cfg, batch = make_batch(temperature=0.7)
    copied = models._replace(ref=copy.deepcopy(models.policy))
    batch = assess({k: batch[k] for k in ("tokens", "lengths", "P", "mask", "ended")}, copied, cfg)
    expected = torch.zeros_like(batch["logp"])
    expected[torch.arange(12), batch["lengths"] - 2] = batch["score"]
    assert torch.equal(batch["logp"], batch["ref_logp"])
    assert batch["mask"][torch.arange(12), batch["lengths"] - 2].all()
    for kl_coef in (0.0, 100.0):
        assert torch.equal(advantages(batch, kl_coef, .95)["reward"], expected)
    other = assess(batch, models._replace(ref=tiny_gpt(9)), cfg)
    assert torch.equal(advantages(other, 0.0, .95)["reward"], expected)
    assert not torch.equal(advantages(other, 0.1, .95)["reward"], expected)


def test_K3_P3_P6_reward_and_advantages():
    _, _, batch = make_batch(kl_coef=0.3)
    mask = batch["mask"]
    k1 = torch.where(mask, batch["logp"] - batch["ref_logp"], 0.0)
    close(batch["reward"].sum(1), batch["score"] - 0.3 * k1.sum(1), 1e-5)
    assert (batch["reward"][~mask] == 0).all()
    raw, ret = gae(batch["reward"], batch["value"], mask, 1.0, .95)
    close(batch["ret"], torch.where(mask, raw + batch["value"], 0.0))  # P3: raw, not whitened
    close(batch["adv"], whiten(raw, mask))
    moved = advantages({**batch, "score": batch["score"] + 5, "value": batch["value"] + 5}, 0.3, .95)
    close(moved["ret"] - moved["value"], torch.where(mask, raw, -moved["value"]), 1e-5)
    scaled = advantages({**batch, "score": batch["score"] * 3, "value": batch["value"] * 3}, 0.9, .95)
    close(scaled["adv"], batch["adv"], 1e-4)
    for poison in POISON:
        bad = {k: poisoned(batch[k], mask, poison) for k in ("logp", "ref_logp", "value")}
        bad = advantages({**batch, **bad}, .3, .95)
        assert torch.equal(bad["adv"], batch["adv"]) and torch.equal(bad["ret"], batch["ret"])


class Table(nn.Module):
    """A GPT whose "hidden states" are the logits it stores for each prefix of a response. Prompts are one
    token long."""

    logps = GPT.logps

    def __init__(self, logits, prefixes=((),)):
        super().__init__()
        self.config = types.SimpleNamespace(vocab_size=logits.shape[1])
        self.table, self.prefixes = nn.Parameter(logits), list(prefixes)
        self.lm_head = nn.Identity()

    def logits(self, h):
        return h

    def trunk(self, tokens):
        index = [[self.prefixes.index(tuple(row[1 : t + 1])) if tuple(row[1 : t + 1]) in self.prefixes else 0
                  for t in range(len(row))] for row in tokens.tolist()]
        return self.table[torch.tensor(index)]


class Constant(nn.Module):
    """A critic that foresees the same for every text."""

    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.zeros(()))

    def forward(self, tokens):
        return self.value.expand(tokens.shape)


def test_K5_sum_of_k1_is_the_sequence_kl_with_the_eos_counted():
    """All 15 sequences of 3 tokens, 3 steps, absorbing eos 2, by the shipped log-probs, mask and reward."""
    every = [s for n in range(4) for s in itertools.product(range(3), repeat=n) if 2 not in s[:-1]]
    prefixes = sorted(s for s in every if len(s) < 3 and 2 not in s)  # depth first, as the numbers were made
    sequences = [s for s in every if s not in prefixes]
    assert len(sequences) == 15 and len(prefixes) == 7
    logits = [numpy.random.default_rng(seed).standard_normal((7, 3)) for seed in (1, 2)]
    policy, ref = (Table(torch.tensor(x, dtype=torch.float32), prefixes) for x in logits)
    tokens, lengths = pad([[0, *sequence] for sequence in sequences])
    P = torch.ones_like(lengths)
    batch = {"tokens": tokens, "lengths": lengths, "P": P, "mask": response_mask(lengths, P, 4),
             "ended": torch.ones(15, dtype=torch.bool)}
    batch = assess(batch, toy(policy, ref, Constant(), lambda *_: torch.zeros(15)), Config())
    probability = batch["logp"].sum(1).exp()
    assert probability.sum().item() == pytest.approx(1, abs=1e-6)
    kl = -(probability * advantages(batch, 1.0, .95)["reward"].sum(1)).sum().item()
    assert kl == pytest.approx(.3599219173, abs=1e-6)
    no_eos = batch["mask"] & (tokens[:, 1:] != 2)
    kl = (probability * torch.where(no_eos, batch["logp"] - batch["ref_logp"], 0.0).sum(1)).sum().item()
    assert kl == pytest.approx(.3959272328, abs=1e-6)


def test_B2_K7_expected_gradient_is_that_of_the_objective():
    """The 15 sequences again, each weighted by its probability: the surrogate has the gradient of
    E[score] - kl_coef KL. So k1 in the reward is the gradient of KL(policy, reference), and a score moves
    the choices before it."""
    every = [s for n in range(4) for s in itertools.product(range(3), repeat=n) if 2 not in s[:-1]]
    prefixes = sorted(s for s in every if len(s) < 3 and 2 not in s)
    policy, ref = (Table(normal(7, 3, seed=s), prefixes) for s in (1, 2))
    tokens, lengths = pad([[0, *s] for s in every if s not in prefixes])
    P, score, kl_coef = torch.ones_like(lengths), normal(15, seed=3), 0.7
    batch = {"tokens": tokens, "lengths": lengths, "P": P, "mask": response_mask(lengths, P, 4),
             "ended": torch.ones(15, dtype=torch.bool)}
    batch = plain(assess(batch, toy(policy, ref, Constant(), lambda *_: score), Config(micro_batch=10**6)))
    reward = plain(advantages(batch, kl_coef, 1.0))["reward"]
    adv, _ = gae(reward, torch.zeros_like(reward), batch["mask"], 1.0, 1.0)
    logp = token_logps(policy, tokens, 1.0, batch["mask"])
    weight = batch["logp"].sum(1).exp()[:, None] * batch["mask"].sum()
    policy_loss(logp, batch["logp"], adv * weight, batch["mask"], .2)[0].backward()
    shipped, policy.table.grad = policy.table.grad, None
    p = policy.table.log_softmax(-1), ref.table.detach().log_softmax(-1)
    log_p, log_ref = (torch.stack([sum(table[prefixes.index(s[:t]), s[t]] for t in range(len(s)))
                                   for s in every if s not in prefixes]) for table in p)
    (log_p.exp() * (score - kl_coef * (log_p - log_ref))).sum().backward()
    close(-shipped, policy.table.grad, 1e-6)
    assert shipped.abs().max() > 0.01


# ---- improve ----

def test_P9_first_pass_has_ratio_exactly_one(monkeypatch):
    """Log-probs of the update are bit for bit those of assess, in every micro-batch of the first pass."""
    models, cfg, batch = make_batch(B=32, epochs=1, temperature=0.7, micro_batch=4096)
    seen, losses, shipped = [], [], ppo.policy_loss

    def spy(logp, old, adv, mask, clip):
        seen.append((logp.detach() - old)[mask].abs().max().item())
        losses.append(shipped(logp, old, adv, mask, clip)[0].item())
        return shipped(logp, old, adv, mask, clip)

    monkeypatch.setattr(ppo, "policy_loss", spy)
    stats = improve(models, adam(models), batch, cfg, 1, gen(0))
    assert seen == [0.0]
    assert stats["ratio"] == 1 and stats["update_kl"] == 0 and stats["clipped"] == 0
    assert abs(losses[0]) < 1e-6  # -mean of whitened advantages


def test_P9_first_pass_in_other_micro_batches_is_one_to_rounding():
    models, cfg, batch = make_batch(B=32, micro_batch=64, minibatches=4)
    for part in torch.randperm(32, generator=gen(1)).chunk(4):
        stats = minibatch_backward(models, batch, part.tolist(), cfg)
        assert stats["ratio"] == pytest.approx(1, abs=1e-5)
        assert stats["update_kl"] < 1e-9 and stats["clipped"] == 0


def test_P10_first_gradient_is_the_policy_gradient():
    models, cfg, batch = make_batch()
    stats = minibatch_backward(models, batch, list(range(12)), cfg)
    squares = (batch["value"] - batch["ret"])[batch["mask"]] ** 2  # P20: the critic reads where assess read
    assert stats["value_loss"] == pytest.approx(0.5 * squares.mean().item(), rel=1e-4)
    shipped = grads(models.policy)
    models.policy.zero_grad()
    logp = token_logps(models.policy, batch["tokens"], 1.0)
    (-(batch["adv"] * logp)[batch["mask"]].sum() / batch["mask"].sum()).backward()
    for a, b in zip(shipped, grads(models.policy), strict=True):
        close(a, b, 1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_P14_K12_an_update_follows_the_sign_of_the_advantage(sign):
    """A higher (lower) score of one response raises (lowers) its log-prob, and most of all responses'."""
    models, cfg, batch = make_batch(epochs=1, std=.1, new=4)
    score = sign * (torch.arange(12) == 3) * 5.0
    batch = plain(advantages({**batch, "score": score, "value": torch.zeros_like(batch["value"])}, 0.0, 1.0))
    improve(models, adam(models), batch, cfg, 1, gen(0))
    rise = token_logps(models.policy, batch["tokens"], 1.0, batch["mask"]) - batch["logp"]
    rise = rise.sum(1).detach() * sign
    assert rise[3] > 0 and rise.argmax() == 3


def test_P17_micro_batches_change_no_gradient():
    models, cfg, batch = make_batch(B=24)
    models.policy.load_state_dict(tiny_gpt(1).state_dict())  # so that ratios differ from 1
    whole = minibatch_backward(models, batch, list(range(24)), cfg)
    expected = cleared_grads(models)
    parts = len(list(micro_batches(batch, range(24), 30)))
    split = minibatch_backward(models, batch, list(range(24)), Config(micro_batch=30))
    assert parts > 3 and len({int(n) for n in batch["lengths"]}) > 3
    for a, b in zip(cleared_grads(models), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    assert split == pytest.approx(whole, rel=1e-4, abs=1e-6)


def test_micro_batches_hold_each_row_once_within_the_budget():
    *_, batch = make_batch(B=24)
    rows = []
    for index, b in micro_batches(batch, range(3, 24), 40):
        T = int(b["lengths"].max())
        assert b["tokens"].shape == (len(index), T)
        assert b["mask"].shape == b["adv"].shape == (len(index), T - 1)
        assert b["score"].shape == (len(index),) and (len(index) == 1 or len(index) * T <= 40)
        for row, i in enumerate(index):
            n = int(batch["lengths"][i])
            assert torch.equal(b["tokens"][row, :n], batch["tokens"][i, :n])
            assert b["mask"][row].sum() == batch["mask"][i].sum()
        rows += index
    assert sorted(rows) == list(range(3, 24))


def test_P15_T6_the_update_does_not_see_pads():
    """Random ids beyond a row's length, NaN in every number there: the same gradients, no token changed."""
    models, cfg, batch = make_batch(B=10)
    models.policy.load_state_dict(tiny_gpt(1).state_dict())
    minibatch_backward(models, batch, list(range(10)), cfg)
    expected = cleared_grads(models)
    beyond = torch.arange(batch["tokens"].shape[1]) >= batch["lengths"][:, None]
    noise = torch.randint(17, beyond.shape, generator=gen(3))
    bad = {**batch, "tokens": torch.where(beyond, noise, batch["tokens"])}
    for name in ("logp", "ref_logp", "value", "adv", "ret", "reward"):
        bad[name] = poisoned(batch[name], batch["mask"], math.nan)
    before = bad["tokens"].clone()
    stats = minibatch_backward(models, bad, list(range(10)), cfg)
    for a, b in zip(cleared_grads(models), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    assert all(math.isfinite(x) for x in stats.values()) and torch.equal(bad["tokens"], before)


def test_P19_policy_and_critic_share_no_gradient():
    models, cfg, batch = make_batch()
    learning = models.policy, models.critic
    minibatch_backward(models, batch, range(12), cfg)
    both = [grads(model) for model in learning]
    places = [{p.data_ptr() for p in model.parameters()} for model in learning]
    assert not places[0] & places[1]
    for change, same in (({"ret": batch["ret"] + 3}, 0), ({"adv": -batch["adv"]}, 1)):
        cleared_grads(models)
        minibatch_backward(models, {**batch, **change}, range(12), cfg)
        now = [grads(model) for model in learning]
        assert all(torch.equal(a, b) for a, b in zip(now[same], both[same], strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(now[1 - same], both[1 - same], strict=True))


def test_P18_R28_K2_an_update_moves_policy_and_critic_only():
    models, cfg, batch = make_batch()
    rm = models.judge
    models = models._replace(ref=copy.deepcopy(models.policy).requires_grad_(False))
    policy, ref, critic = models.policy, models.ref, models.critic
    saved, tokens = [weights(m) for m in (policy, ref, critic, rm)], batch["tokens"].clone()
    improve(models, adam(models), batch, cfg, 1, gen(0))
    assert not unchanged(policy, saved[0]) and unchanged(ref, saved[1])
    assert not unchanged(critic, saved[2]) and unchanged(rm, saved[3])
    assert all(p.grad is None for m in (ref, rm, policy, critic) for p in m.parameters())
    assert torch.equal(batch["tokens"], tokens)
    logp, ref_logp = (token_logps(m, tokens, 1.0, batch["mask"]) for m in (policy, ref))
    assert approx_kl(ref_logp, logp, batch["mask"]) > 0
    assert (critic.shift, critic.scale) == (rm.shift, rm.scale)


@pytest.fixture
def seen(monkeypatch):
    """What `improve` does: .parts, the rows of each minibatch, and .steps, the models that took a step."""
    calls, step = types.SimpleNamespace(parts=[], steps=[]), ppo.clip_and_step
    monkeypatch.setattr(ppo, "minibatch_backward", lambda models, batch, part, cfg: calls.parts.append(part)
                        or minibatch_backward(models, batch, part, cfg))
    monkeypatch.setattr(ppo, "clip_and_step", lambda model, *rest: calls.steps.append(model)
                        or step(model, *rest))
    return calls


def test_P23_P24_passes_are_permutations_and_every_minibatch_a_step(seen):
    models, cfg, batch = make_batch(B=10, epochs=3, minibatches=4, update_kl=1e9)
    assert improve(models, adam(models), batch, cfg, 1, gen(0))["grad_norm"] > 0  # it is logged
    assert len(seen.parts) == 12 and seen.steps == [models.policy, models.critic] * 12
    epochs = [sum(seen.parts[i : i + 4], []) for i in (0, 4, 8)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("B, minibatches, sizes", [(9, 4, [3, 2, 2, 2]), (10, 7, [2, 2, 2, 1, 1, 1, 1]),
                                                   (3, 8, [1, 1, 1])])
def test_minibatches_are_as_many_as_asked_for_and_of_like_size(seen, B, minibatches, sizes):
    models, cfg, batch = make_batch(B=B, epochs=1, minibatches=minibatches, update_kl=1e9)
    improve(models, adam(models), batch, cfg, 1, gen(0))
    assert [len(part) for part in seen.parts] == sizes


@pytest.mark.parametrize("shift", [0.6, -0.6])
def test_P28_a_large_kl_throws_the_gradients_away(shift):
    """On k3, so in either direction; a small one does not stop."""
    models, cfg, batch = make_batch()
    saved = weights(models.policy), weights(models.critic)
    far = {**batch, "logp": batch["logp"] + shift}
    stats = improve(models, adam(models), far, cfg, 1, gen(0))
    assert stats["update_kl"] == pytest.approx(math.expm1(-shift) + shift, abs=1e-4)
    assert unchanged(models.policy, saved[0]) and unchanged(models.critic, saved[1])
    assert not grads(models.policy, models.critic)
    assert stats["grad_norm"] == 0  # no step was taken
    near = {**batch, "logp": batch["logp"] + shift / 2}  # k3 about .045 < 1.5 x .05
    improve(models, adam(models), near, Config(epochs=1), 1, gen(0))
    assert not unchanged(models.policy, saved[0])


def test_P28_the_guard_ends_the_passes_after_some_steps(seen):
    models, cfg, batch = make_batch(epochs=50, update_kl=0.02)
    stats = improve(models, adam(models, lr=3e-3), batch, cfg, 1, gen(0))
    assert 2 <= len(seen.steps) < 100 and len(seen.steps) % 2 == 0 and stats["update_kl"] > 0.03


@pytest.mark.parametrize("at", [1, 2, 4, 7])
def test_P28_the_guard_ends_the_whole_update(seen, monkeypatch, at):
    """Not the pass alone: whichever of 3 x 4 minibatches trips it, none after it is looked at."""
    models, cfg, batch = make_batch(B=8, epochs=3, minibatches=4)
    spied = ppo.minibatch_backward
    monkeypatch.setattr(ppo, "minibatch_backward", lambda *args: spied(*args) | {
        "update_kl": 1.0 if len(seen.parts) == at else 0.0})
    stats = improve(models, adam(models), batch, cfg, 1, gen(0))
    assert len(seen.parts) == at and seen.steps == [models.policy, models.critic] * (at - 1)
    assert stats["update_kl"] == 1 and not grads(models.policy, models.critic)


def test_P32_ptx_adds_its_gradient(monkeypatch):
    rows = [([1, 2, 3, EOS], 2), ([4, 5, 6, 7, 8, EOS], 1)]

    def run(ptx_coef, ptx):
        models, cfg, batch = make_batch(epochs=1, ptx_coef=ptx_coef)
        policy, critic = models.policy, models.critic
        kept = {}
        monkeypatch.setattr(ppo, "clip_and_step", lambda model, *rest: kept.setdefault(model, grads(model))
                            and {})
        improve(models, adam(models), batch, cfg, 1, gen(0), ptx)
        policy.zero_grad()
        loss, count = sft_loss(policy, *sft_batch(rows, "cpu"))
        (loss / count).backward()
        return kept[policy], grads(policy), kept[critic]

    plain, sft, critic = run(0.0, None)
    mixed, _, critic_too = run(0.7, lambda: rows)
    for a, b, c in zip(mixed, plain, sft, strict=True):
        close(a, b + 0.7 * c, 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(critic, critic_too, strict=True))


def test_P32_every_minibatch_asks_for_ptx_rows_of_its_own(monkeypatch):
    models, cfg, batch = make_batch(B=8, epochs=2, minibatches=3, update_kl=1e9, ptx_coef=0.5)
    asked, used = iter(range(100)), []
    monkeypatch.setattr(ppo, "sft_backward", lambda gpt, rows, *rest: used.append(rows)
                        or ({"loss": [torch.zeros(())]}, 0))
    improve(models, adam(models), batch, cfg, 1, gen(0), lambda: next(asked))
    assert used == list(range(6))


def test_P29_entropy_is_that_of_the_policy():
    """The estimate agrees with the exact entropy at the same places within 3 standard errors, whatever stands
    in the padding."""
    models, cfg, batch = make_batch(B=128, new=16, temperature=0.7, std=.15)
    mask, logits = batch["mask"], models.policy(batch["tokens"])[:, :-1] / 0.7
    exact = torch.distributions.Categorical(logits=logits).entropy()[mask].detach()
    noise = (-batch["logp"][mask] - exact).std() / mask.sum() ** 0.5
    stats = report.rollout_stats(batch, NUMBERS, None)
    assert abs(stats["entropy"] - exact.mean().item()) < 3 * noise and noise < 0.05
    for poison in POISON:
        bad = {k: poisoned(batch[k], mask, poison) for k in ("logp", "ref_logp", "value", "ret")}
        assert report.rollout_stats({**batch, **bad}, NUMBERS, None) == pytest.approx(stats, nan_ok=True)


def test_rollout_stats_by_hand():
    *_, batch = make_batch()
    stats, mask = report.rollout_stats(batch, NUMBERS, None), batch["mask"]
    k1 = [(a - b)[m].sum().item() for a, b, m in zip(batch["logp"], batch["ref_logp"], mask, strict=True)]
    assert stats["kl"] == pytest.approx(sum(k1) / 12, abs=1e-5)
    lengths = (batch["lengths"] - batch["P"]).float()
    assert stats["length"] == pytest.approx(lengths.mean().item())
    assert stats["eos"] == batch["ended"].float().mean().item()
    assert stats["score"] == pytest.approx(batch["score"].mean().item())
    assert "gold" not in stats
    world = types.SimpleNamespace(gold_score=lambda prompt, response: len(prompt) + 100 * len(response))
    stats = report.rollout_stats(batch, types.SimpleNamespace(decode=lambda ids: ids), world)
    assert stats["gold"] == pytest.approx((batch["P"] + 100 * lengths).mean().item())


def test_K8_mean_kl_is_not_negative():
    *_, batch = make_batch(B=512, new=6, std=.1, temperature=0.7)
    k1 = torch.where(batch["mask"], batch["logp"] - batch["ref_logp"], 0.0).sum(1)
    assert k1.mean() > -3 * k1.std() / 512 ** 0.5
    assert k1.mean() > 0.05  # these two do differ


# ---- worlds with a known optimum ----

@pytest.mark.slow
@pytest.mark.parametrize("kl_coef, optimum, best", [(1.0, (.1790, .2919, .5291), 1.0272),
                                                    (0.5, (.0367, .1626, .8008), 1.3064)])
def test_B1_bandit_reaches_the_optimum(kl_coef, optimum, best):
    """One step, rewards 0, 1, 2: the policy must become rho exp(r / kl_coef), J = kl_coef log Z."""
    rho, r = torch.tensor([.5, .3, .2]), torch.tensor([0., 1, 2])
    policy = Table(rho.log()[None])
    models = toy(policy, Table(rho.log()[None]), Constant(), lambda tokens, lengths, P: r[tokens[:, 1]])
    optimizers, cfg, g = adam(models, lr=0.03), Config(update_kl=1e9, epochs=2), gen(0)
    updates, B = 150, 1024
    for update in range(updates):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.03 * (1 - update / updates)
        p = policy.table[0].softmax(-1).detach()
        token = torch.multinomial(p.expand(B, 3), 1, generator=g)
        batch = {"tokens": torch.cat([torch.zeros_like(token), token], 1), "lengths": torch.full((B,), 2),
                 "P": torch.ones(B, dtype=torch.long), "mask": torch.ones(B, 1, dtype=torch.bool),
                 "ended": torch.ones(B, dtype=torch.bool)}
        batch = advantages(assess(batch, models, cfg), kl_coef, .95)
        improve(models, optimizers, batch, cfg, update, g)
    p = policy.table[0].softmax(-1).detach()
    close(p, torch.tensor(optimum), 0.02)
    J = (p * r).sum() - kl_coef * (p * (p / rho).log()).sum()
    assert J.item() == pytest.approx(best, abs=3e-3)


def play(score, updates, cfg, vocab=8, eos=0, B=64, lr=3e-3, kl_coef=0.0):
    """PPO on a random GPT with the shipped phases; returns the first and the last rollout. eos is 0, as the
    padding is."""
    policy = tiny_gpt(std=None, vocab_size=vocab, block_size=16, n_layer=1)
    models = toy(policy, copy.deepcopy(policy), RewardModel.from_gpt(policy), score)
    nn.init.zeros_(models.critic.reward_head.weight)
    optimizers, g, first = adam(models, lr=lr), gen(0), None
    for update in range(updates):
        batch = rollout(policy, [[1 + i % 3] for i in range(B)], eos, cfg, g)
        first = first or batch
        improve(models, optimizers, advantages(assess(batch, models, cfg), kl_coef, cfg.lam), cfg, update, g)
    return first, batch


@pytest.mark.slow
def test_B3_length_world():
    """Reward -|length - 5|: the policy learns to end at 5; without the eos in the mask it could not."""
    first, last = play(lambda tokens, lengths, P: -(lengths - P - 5).abs().float(), 60,
                       Config(max_new_tokens=10, no_eos_score=-6.0, update_kl=0.2))
    length = (last["lengths"] - last["P"]).float()
    assert last["ended"].float().mean() > 0.95 and (length == 5).float().mean() > 0.8
    assert (first["lengths"] - first["P"] == 5).float().mean() < 0.3


@pytest.mark.slow
def test_B4_the_penalty_for_a_missing_eos_raises_the_eos_rate():
    """From about 20% to more than 95%; without the penalty it stays where it was."""
    rate = {}
    for penalty in (-1.0, 0.0):
        first, last = play(lambda tokens, lengths, P: torch.zeros(len(tokens)), 50,
                           Config(max_new_tokens=2, no_eos_score=penalty, update_kl=0.2))
        rate[penalty] = first["ended"].float().mean().item(), last["ended"].float().mean().item()
    assert rate[-1.0][0] < 0.4 and rate[-1.0][1] > 0.95 and rate[0.0][1] < 0.6


# ---- the edges: models, prompts, scores of the user's, the order of prompts ----

def freeze(monkeypatch, kind, *names):
    """An edit of model.py: these parts of a `kind` need no gradient."""
    init = kind.__init__

    def edited(self, *args, **kwargs):
        init(self, *args, **kwargs)
        for name in names:
            self.get_submodule(name).requires_grad_(False)
    monkeypatch.setattr(kind, "__init__", edited)


def frozen(model):
    return {name for name, p in model.named_parameters() if not p.requires_grad}


@pytest.fixture
def out(tmp_path):
    """A folder with sft.pt, rm.pt, data and a reward function."""
    gpt = tiny_gpt(vocab_size=257)
    save(tmp_path / "sft.pt", gpt, BYTES)
    save(tmp_path / "rm.pt", RewardModel.from_gpt(gpt), BYTES)
    for name in ("prompts", "prompts_val"):
        jsonl(tmp_path / f"{name}.jsonl", [{"prompt": letter} for letter in "abcdefgh"])
    (tmp_path / "mine.py").write_text("def f(prompts, responses):\n    return [0.0] * len(prompts)\n")
    return tmp_path


@pytest.mark.parametrize("reward", ["", "mine.py:f"])
def test_what_model_py_freezes_stays_frozen(monkeypatch, out, reward):
    """In policy and critic, in the critic of a reward function too; all of the reference is frozen."""
    reward = reward and f"{out}/{reward}"
    models = load_models(Config(out=str(out), reward=reward), CPU)
    assert not frozen(models.policy) and not frozen(models.critic)
    freeze(monkeypatch, GPT, "trunk.blocks.0", "trunk.wpe")
    freeze(monkeypatch, RewardModel, "trunk.ln_f")
    models = load_models(Config(out=str(out), reward=reward), CPU)
    block = {name for name, _ in models.policy.named_parameters() if ".blocks.0." in name}
    gpt, rm = block | {"trunk.wpe.weight"}, {"trunk.ln_f.weight", "trunk.ln_f.bias"}
    assert len(block) == 12 and frozen(models.policy) == gpt
    assert frozen(models.critic) == (gpt | rm if reward else rm)  # the trunk of one, or of the other
    assert frozen(models.ref) == {name for name, _ in models.ref.named_parameters()}
    tokens, lengths = pad([[1, 2, 3], [4]])
    assert not models.score(tokens, lengths, lengths - 1).requires_grad


def test_what_model_py_freezes_is_not_trained(monkeypatch, out):
    freeze(monkeypatch, GPT, "trunk.blocks.0", "trunk.wpe")
    ppo.main(Config(**PPO | {"updates": 1}, data=str(out), out=str(out), show=0))
    before, after = (dict(load(GPT, out / f"{name}.pt").named_parameters()) for name in ("sft", "ppo"))
    for name, x in before.items():
        assert torch.equal(x, after[name]) == (".blocks.0." in name or ".wpe." in name), name


def test_text_reward_gets_prompts_and_responses_as_text():
    calls = []
    score = TextScore(lambda *texts: calls.append(texts) or [1, 2.5], "f.py:f", BYTES)
    tokens, lengths = pad([[*b"ab cd", 256], [*b"x y"]])
    scores = score(tokens, lengths, torch.tensor([2, 1]))
    assert calls == [(["ab", "x"], [" cd", " y"])]
    assert scores.dtype == torch.float32 and scores.tolist() == [1, 2.5]


@pytest.mark.parametrize("result", [[1.0], [1.0, 2.0, 3.0], [1.0, math.nan], [1.0, math.inf], [1.0, "2"],
                                    [None, 1.0]])
def test_a_reward_function_that_returns_something_else_is_named(result):
    score = TextScore(lambda prompts, responses: result, "mine.py:f", BYTES)
    with pytest.raises(UserError, match="mine.py:f must return 2 finite numbers"):
        score(*pad([[65, 66], [67, 68]]), torch.tensor([1, 1]))


@pytest.mark.parametrize("result", [None, 3.0, [10**400, 1.0]])
def test_a_reward_function_that_returns_no_list_is_named(result):
    test_a_reward_function_that_returns_something_else_is_named(result)
    score = TextScore(lambda prompts, responses: result, "mine.py:f", BYTES)
    with pytest.raises(UserError, match="mine.py:f must return 1 finite numbers"):
        score(*pad([[65, 66]]), torch.tensor([1]))


def test_encode_prompts_cuts_from_the_left_and_counts(capsys):
    assert encode_prompts(["abcdef", "xyz", ""], BYTES, 4, "p.jsonl") == [[*b"cdef"], [*b"xyz"], [256]]
    assert "p.jsonl: of 3 examples, 1 prompts truncated from the left" in capsys.readouterr().out
    assert encode_prompts(["abcd"], BYTES, 4, "p") == [[*b"abcd"]] and capsys.readouterr().out == ""
    assert encode_prompts(["abcd", ""], BYTES, 1, "p") == [[*b"d"], [256]]
    with pytest.raises(UserError, match="p: no example fits into 0 tokens"):
        encode_prompts(["a"], BYTES, 0, "p")


@pytest.mark.parametrize("size", [3, 10, 25])
def test_P23_cycle_gives_a_fresh_permutation_each_epoch(size):
    rows = Cycle([f"row {i}" for i in range(10)], size, gen(0))
    parts = [[int(row[4:]) for row in next(rows)] for _ in range(20)]
    assert all(len(part) == size for part in parts)
    seen = sum(parts, [])[: size * 20 // 10 * 10]
    epochs = [seen[i : i + 10] for i in range(0, len(seen), 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > len(epochs) // 2


def test_B9_win_rate_counts_ties_half():
    assert win_rate([1, 2, 3, 4], [1, 1, 5, 0]) == (.5 + 1 + 0 + 1) / 4
    assert win_rate([1, 2], [1, 2]) == .5


def test_means_of_a_report():
    result = {"score": [1.0, 2.0, 6.0], "gold": [], "texts": [("p", " a b c"), ("q", " a b")]}
    assert means(result) == pytest.approx({"score": 3.0, "distinct_2": 2 / 3})


def test_evaluate_has_a_number_for_each_prompt():
    """In more than one batch, by hand from each text alone; always with the same random numbers."""
    models, cfg, _ = make_batch(B=2, std=.15)
    world = types.SimpleNamespace(gold_score=lambda prompt, response: 100 * len(prompt) + len(response))
    prompts, rows, g = [[i % 16, 3, 5][: 1 + i % 3] for i in range(130)], [], gen(0)
    result = evaluate(PHASES, prompts, world, cfg, CPU, models)
    for some in (prompts[:128], prompts[128:]):
        batch = rollout(models.policy, some, EOS, cfg, g)
        columns = (batch[name].tolist() for name in ("tokens", "lengths", "P", "ended"))
        for row, n, p, ended in zip(*columns, strict=True):
            text, texts = torch.tensor([row[:n]]), (NUMBERS.decode(row[:p]), NUMBERS.decode(row[p:n]))
            judge = models.judge(text)[0, -1].item()
            kl = token_logps(models.policy, text, 1.0) - token_logps(models.ref, text, 1.0)
            rows.append({"score": judge if ended else cfg.no_eos_score, "judge": judge,
                         "kl": kl[0, p - 1 :].sum().item(), "gold": world.gold_score(*texts),
                         "eos": float(ended), "length": n - p, "texts": texts})
    assert result.pop("texts") == [row["texts"] for row in rows]
    assert 0 < sum(row["eos"] for row in rows) < 130
    assert result.pop("raw") == []  # a reward model's scores have no other units
    for name, numbers in result.items():
        assert numbers == pytest.approx([row[name] for row in rows], abs=1e-4), name
    again = evaluate(PHASES, prompts, None, cfg, CPU, models._replace(judge=None))
    assert again["score"] == result["score"] and again["judge"] == again["gold"] == []
