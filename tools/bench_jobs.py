"""What bench.py measures: each part of training as a Job, made of the functions that the scripts run.

Weights and tokens are random, and no text ends early, so the work depends on the shape alone. FLOP are 2
(forward) or 6 (training) x entries of a matrix x real tokens: all input tokens for the matrices of the
blocks, the tokens that are scored or sampled for the vocabulary head. Attention scores and padding are not
counted.
"""
import copy
import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch

import ppo
import train_rm
import train_sft
from data.examples import Ranking, pad
from lib import ranks
from lib.common import clip_and_step
from lib.fast import prepare
from lib.generate import generate
from lib.rewards import Models, model_score
from model import GPT, GPTConfig, RewardModel, Trunk


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
    """A part to measure: how many tokens count in one run of it, and how many FLOP that takes."""

    run: Callable
    tokens: int
    flops: float


class Still(torch.nn.Module):
    """A stand-in that costs nothing: for the critic while the policy is timed, and vice versa."""

    config = SimpleNamespace(vocab_size=1)

    def __init__(self):
        super().__init__()
        self.x = torch.nn.Parameter(torch.zeros(()))

    def forward(self, tokens):
        return self.x.expand(tokens.shape)

    def trunk(self, tokens):
        return self.x.expand(*tokens.shape, 1)

    def logps(self, h, targets, temperature):
        return h[:, 0]


def config_of(shape, block_size=None):
    n_layer, n_head, d_model = shape[:3]
    return GPTConfig(vocab_size=shape.vocab_size, block_size=block_size or shape.prompt + shape.response,
                     n_layer=n_layer, n_head=n_head, d_model=d_model)


@torch.no_grad()
def ending_gpt(config, eos, mean=30):
    """Random weights, with eos about V/mean times as likely as other tokens: geometric lengths, roughly."""
    gpt = GPT(config).eval()
    u = gpt.lm_head.weight[eos]
    gpt.trunk.ln_f.bias += math.log(config.vocab_size / mean) * u / u.dot(u)
    return gpt


def random_rows(shape, ragged=True):
    """[(tokens, P)]: random prompts with responses, the prompts as ragged as in peer_generate.py."""
    generator = torch.Generator().manual_seed(0)
    sizes = [shape.prompt - (i % max(1, shape.prompt // 2) if ragged else 0) for i in range(shape.batch)]
    return [(torch.randint(shape.vocab_size, (P + shape.response,), generator=generator).tolist(), P)
            for P in sizes]


def matrices(config):
    """Entries of the matrices a token is multiplied by: those of the blocks, and the vocabulary head."""
    with torch.device("meta"):
        trunk = Trunk(config)
    return sum(p.numel() for p in trunk.blocks.parameters() if p.dim() == 2), trunk.wte.weight.numel()


def sft_job(shape, device):
    """One optimizer step of train_sft.py."""
    cfg, gpt, rows = train_sft.Config(lr=4e-3), prepare(GPT(config_of(shape)), device), random_rows(shape)
    optimizer = train_sft.make_optimizer(gpt, cfg)
    blocks, head = matrices(gpt.config)

    def step():
        train_sft.sft_backward(gpt, rows, cfg.micro_batch, device)
        clip_and_step(gpt, optimizer, 1.0, 0)

    fed, count = sum(len(row) - 1 for row, _ in rows), sum(len(row) - P for row, P in rows)
    return {"SFT step": Job(step, count, 6 * (blocks * fed + head * count))}


def ranks_jobs(shape, device):
    """An optimizer step of train_sft.py, and the sum of its gradients over the processes alone; its "tokens"
    are bytes."""
    gpt = GPT(config_of(shape)).to(device)
    for p in gpt.parameters():
        p.grad = torch.ones_like(p)
    size = 4 * sum(p.numel() for p in gpt.parameters())
    return sft_job(shape, device)["SFT step"], Job(lambda: ranks.add_gradients(gpt), size, 0)


def rm_job(shape, device):
    """One optimizer step of train_rm.py on pairs."""
    rm = prepare(RewardModel(Trunk(config_of(shape))), device)
    rows = [row for row, _ in random_rows(shape)][: shape.batch // 2 * 2]
    pairs = [Ranking([], rows[i : i + 2], [0, 1], ("", ()), None) for i in range(0, len(rows), 2)]
    optimizer = torch.optim.AdamW(rm.parameters(), lr=1e-5, fused=True)

    def step():
        train_rm.ranking_backward(rm, pairs, train_rm.Config.micro_batch, device)
        clip_and_step(rm, optimizer, 1.0, 0)

    fed = sum(map(len, rows))
    return {"reward-model step": Job(step, fed, 6 * matrices(rm.config)[0] * fed)}


def generate_job(shape, device):
    gpt = prepare(GPT(config_of(shape)), device).eval()
    tokens, P = pad([row[:n] for row, n in random_rows(shape)], device)
    count = shape.batch * shape.response
    blocks, head = matrices(gpt.config)
    flops = 2 * (blocks * (int(P.sum()) + count - shape.batch) + head * count)  # the last is never read
    return {"generate": Job(partial(generate, gpt, tokens, P, shape.response), count, flops)}


def ppo_models(shape, device):
    """The Models of ppo.py; the score is that of a reward model."""
    config = config_of(shape)
    policy, critic, rm = GPT(config), RewardModel(Trunk(config)), RewardModel(Trunk(config))
    models = policy, copy.deepcopy(policy).requires_grad_(False), critic, rm.requires_grad_(False)
    policy, ref, critic, rm = (prepare(model, device).eval() for model in models)
    return Models(policy, ref, critic, model_score(rm), None, None)


def ppo_jobs(shape, device, ragged=True, micro_batch=ppo.Config.micro_batch):
    """One whole update, and each of its parts."""
    models, still = ppo_models(shape, device), Still().to(device)
    prompts = [row[:P] for row, P in random_rows(shape, ragged)]
    # update_kl: the epochs never end early, so the work is always the same
    cfg = ppo.Config(max_new_tokens=shape.response, update_kl=math.inf, micro_batch=micro_batch)
    adam = {model: torch.optim.AdamW(model.parameters(), lr=1e-5, eps=1e-5, weight_decay=0.0, fused=True)
            for model in (models.policy, models.critic, still)}
    order, eos = torch.Generator().manual_seed(0), shape.vocab_size  # an eos that no token is

    def roll():
        return ppo.rollout(models.policy, prompts, eos, cfg, None)

    def assess(batch):
        return ppo.assess(batch, models, cfg)

    def ready(batch):
        return ppo.advantages(assess(batch), cfg.kl_coef, cfg.lam)

    def learn(policy, critic, batch):
        ppo.improve(models._replace(policy=policy, critic=critic), (adam[policy], adam[critic]), batch, cfg,
                    0, order)

    first = roll()
    batch, count = ready(first), int(first["mask"].sum())
    fed = int(first["lengths"].sum()) - shape.batch
    cost = ppo_flops(models.policy.config, shape.batch, fed, count, cfg.epochs)
    runs = {"  rollout": roll, "  scoring": lambda: assess(first),
            "  policy": lambda: learn(models.policy, still, batch),
            "  critic": lambda: learn(still, models.critic, batch)}
    whole = Job(lambda: learn(models.policy, models.critic, ready(roll())), count, sum(cost.values()))
    return {"PPO update": whole} | {name: Job(f, count, cost[name.strip()]) for name, f in runs.items()}


def ppo_flops(config, B, fed, count, epochs):
    """FLOP of each part; `fed` leaves out the last token of each of the B rows: only the reward model reads
    it."""
    blocks, head = matrices(config)
    return {"rollout": 2 * (blocks * fed + head * count),
            "scoring": 2 * (blocks * (4 * fed + B) + 2 * head * count),
            "policy": 6 * epochs * (blocks * fed + head * count), "critic": 6 * epochs * blocks * fed}
