"""What bench.py measures: each part of the training as a Job, made of the project's own functions.

Weights and tokens are random, and no text ends early, so that the work depends on the shape alone.
FLOP are 2 (forward) or 6 (training) x matrix entries x real tokens: the matrices of the blocks for every
token that is fed, the vocabulary head for every token that counts. Neither attention scores nor work on
pads are in it.
"""
import copy
import math
from typing import Callable, NamedTuple

import torch
from common import clip_and_step, pad

import ppo
import train_sft
from model import GPT, GPTConfig, RewardModel, Trunk
from train_rm import ranking_loss
from train_sft import make_optimizer, sft_batch, sft_loss


class Shape(NamedTuple):
    n_layer: int
    n_head: int
    d_model: int
    vocab_size: int
    prompt: int
    response: int
    batch: int


SHAPES = {"demo": Shape(4, 4, 128, 1024, 16, 48, 64), "30m": Shape(6, 6, 384, 50257, 64, 64, 16),
          "gpt2": Shape(12, 12, 768, 50257, 64, 32, 16)}


class Job(NamedTuple):
    """Something to measure: one run of it has so many tokens that count and costs so many FLOP."""

    run: Callable
    tokens: int
    flops: float


class Still(torch.nn.Module):
    """Costs nothing: stands in for the critic while the policy is timed, and the other way round."""

    def __init__(self):
        super().__init__()
        self.x = torch.nn.Parameter(torch.zeros(()))

    def forward(self, tokens):
        return self.x.expand(tokens.shape)

    def trunk(self, tokens):
        return self.x.expand(*tokens.shape, 1)

    def logps(self, h, targets, temperature):
        return h[:, 0]


def config_of(shape):
    return GPTConfig(shape.vocab_size, shape.prompt + shape.response, *shape[:3])


@torch.no_grad()
def ending_gpt(config, eos, mean=30):
    """Random weights, and eos about V/mean times as likely as others: lengths are about geometric."""
    gpt = GPT(config).eval()
    u = gpt.lm_head.weight[eos]
    gpt.trunk.ln_f.bias += math.log(config.vocab_size / mean) * u / u.dot(u)
    return gpt


def random_rows(shape, ragged=True):
    """[(tokens, P)]: random prompts with responses; prompts are as ragged as in peer_generate.py."""
    generator = torch.Generator().manual_seed(0)
    sizes = [shape.prompt - (i % max(1, shape.prompt // 2) if ragged else 0) for i in range(shape.batch)]
    return [(torch.randint(shape.vocab_size, (P + shape.response,), generator=generator).tolist(), P)
            for P in sizes]


def matrices(config):
    """Entries of the matrices that a token meets: in the blocks, and in the vocabulary head."""
    with torch.device("meta"):
        trunk = Trunk(config)
    return sum(p.numel() for p in trunk.blocks.parameters() if p.dim() == 2), trunk.wte.weight.numel()


def sft_job(shape, device):
    """One optimizer step of train_sft.py."""
    gpt, rows = GPT(config_of(shape)).to(device), random_rows(shape)
    optimizer = make_optimizer(gpt, train_sft.Config())
    _, mask = sft_batch(rows, device)
    blocks, head = matrices(gpt.config)

    def step():
        loss, count = sft_loss(gpt, *sft_batch(rows, device))
        (loss / count).backward()
        clip_and_step(gpt, optimizer, 1.0, 0)

    fed, count = sum(len(row) - 1 for row, _ in rows), int(mask.sum())
    return {"SFT step": Job(step, count, 6 * (blocks * fed + head * count))}


def rm_job(shape, device):
    """One optimizer step of train_rm.py on pairs."""
    rm = RewardModel(Trunk(config_of(shape))).to(device)
    rows = [row for row, _ in random_rows(shape)][: shape.batch // 2 * 2]
    optimizer = torch.optim.AdamW(rm.parameters(), lr=1e-5, fused=True)

    def step():
        loss, _ = ranking_loss(rm.score(*pad(rows, device)), [[0, 1]] * (len(rows) // 2))
        loss.backward()
        clip_and_step(rm, optimizer, 1.0, 0)

    fed = sum(map(len, rows))
    return {"reward-model step": Job(step, fed, 6 * matrices(rm.config)[0] * fed)}


def generate_job(shape, device):
    gpt = GPT(config_of(shape)).to(device).eval()
    tokens, P = pad([row[:n] for row, n in random_rows(shape)], device)
    count = shape.batch * shape.response
    blocks, head = matrices(gpt.config)
    flops = 2 * (blocks * (int(P.sum()) + count - shape.batch) + head * count)  # the last is never read
    return {"generate": Job(lambda: gpt.generate(tokens, P, shape.response), count, flops)}


def ppo_models(shape, device):
    """policy, reference, critic, reward model, as ppo.py has them."""
    config = config_of(shape)
    policy, critic, rm = GPT(config), RewardModel(Trunk(config)), RewardModel(Trunk(config))
    models = policy, copy.deepcopy(policy).requires_grad_(False), critic, rm.requires_grad_(False)
    return [model.to(device).eval() for model in models]


def ppo_jobs(shape, device, ragged=True, micro_batch=ppo.Config.micro_batch):
    """One whole update, and its parts on their own."""
    policy, ref, critic, rm = ppo_models(shape, device)
    prompts, still = [row[:P] for row, P in random_rows(shape, ragged)], Still().to(device)
    # update_kl: no early end of the epochs, so the work is always the same
    cfg = ppo.Config(max_new_tokens=shape.response, update_kl=math.inf, micro_batch=micro_batch)
    adam = {model: torch.optim.AdamW(model.parameters(), lr=1e-5, eps=1e-5, weight_decay=0.0, fused=True)
            for model in (policy, critic, still)}
    order, eos = torch.Generator().manual_seed(0), shape.vocab_size  # an eos that no token is
    roll = lambda: ppo.rollout(policy, prompts, eos, cfg, None)
    assess = lambda batch: ppo.assess(batch, policy, ref, critic, ppo.model_reward(rm), cfg)
    ready = lambda batch: ppo.advantages(assess(batch), cfg.kl_coef, cfg.lam)
    learn = lambda a, b, batch: ppo.improve(a, b, (adam[a], adam[b]), batch, cfg, 0, order)
    first = roll()
    batch, count = ready(first), int(first["mask"].sum())
    cost = ppo_flops(policy.config, shape.batch, int(first["lengths"].sum()) - shape.batch, count, cfg.epochs)
    runs = {"  rollout": roll, "  scoring": lambda: assess(first),
            "  policy": lambda: learn(policy, still, batch), "  critic": lambda: learn(still, critic, batch)}
    whole = Job(lambda: learn(policy, critic, ready(roll())), count, sum(cost.values()))
    return {"PPO update": whole} | {name: Job(f, count, cost[name.strip()]) for name, f in runs.items()}


def ppo_flops(config, B, fed, count, epochs):
    """Of each part: `fed` tokens without the last of each of B rows, which the reward model alone reads."""
    blocks, head = matrices(config)
    return {"rollout": 2 * (blocks * fed + head * count),
            "scoring": 2 * (blocks * (4 * fed + B) + 2 * head * count),
            "policy": 6 * epochs * (blocks * fed + head * count), "critic": 6 * epochs * blocks * fed}
