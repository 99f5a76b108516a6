"""Self-checks before the first step: model.py still keeps what every stage relies on. All raise UserError."""
from dataclasses import replace

import torch

from data.examples import pad
from data.files import UserError
from lib.generate import Cache


def far(a, b):
    """Whether a and b differ by more than rounding does; TF32 and bf16 round to 3 digits or fewer."""
    tolerance = 1e-4 if b.device.type == "cpu" and b.dtype == torch.float32 else 2e-2
    return not (a - b).abs().max() <= tolerance * b.abs().max()


@torch.inference_mode()
def check_model(gpt):
    """A GPT is causal, and its cache changes nothing. Leaves it in eval mode."""
    if odd := [name for name, x in gpt.state_dict().items() if not x.is_floating_point()]:
        raise UserError(f"self-check: {odd[0]} is not floating-point, and checkpoints hold nothing else; "
                        "register it with persistent=False")
    device = gpt.lm_head.weight.device
    V, T = gpt.config.vocab_size, min(16, gpt.config.block_size)
    tokens = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(0)).to(device)
    logits, half, rows = gpt.eval()(tokens), T // 2, torch.arange(2, device=device)
    later = torch.cat([tokens[:, :half], (tokens[:, half:] + 1) % V], 1)
    if far(gpt(later)[:, :half], logits[:, :half]):
        raise UserError("self-check: the logits of a token change with the tokens after it: model.py is "
                        "not causal, so the model would learn to copy the answer")
    cache = Cache(2, T, device)
    cache.expect(torch.tensor([half, half - 1], device=device))  # rows of unequal length, as in generate
    gpt.trunk.forward(tokens[:, :half], cache)
    for at in [cache.length + i for i in range(T - half)]:
        if far(gpt.logits(gpt.trunk.forward(tokens[rows, at][:, None], cache)[:, 0]), logits[rows, at]):
            raise UserError("self-check: with the KV cache the logits are not those of the whole text, so "
                            "lib/generate.py would sample from another model than is trained")


@torch.inference_mode()
def check_scores(rm):
    """A score depends neither on padding nor on the other texts of the batch."""
    device, V = rm.reward_head.weight.device, rm.config.vocab_size
    rows = [[(5 * n + 3 * t) % V for t in range(min(n, rm.room))] for n in (3, 7, 12)]
    alone = torch.cat([rm.score(*pad([row], device)) for row in rows])
    if far(rm.score(*pad(rows, device)), alone):
        raise UserError("self-check: a text's score changes with its padding or with the texts beside it: "
                        "model.py lets a real token see padding or another row, or reads a wrong position")


def check_start(phases, models, prompts, cfg, device):
    """Before any step the KL to the reference is 0 and the ratio 1. phases: rollout, assess, advantages and
    minibatch_backward of ppo.py; nothing is scored, and no gradient stays."""
    rollout, assess, advantages, minibatch_backward = phases
    short = replace(cfg, max_new_tokens=min(16, cfg.max_new_tokens))
    batch = rollout(models.policy, prompts[:8], models.tokenizer.eos, short,
                    torch.Generator(device).manual_seed(0))
    unscored = models._replace(score=lambda tokens, lengths, P: torch.zeros(len(tokens), device=device))
    batch = advantages(assess(batch, unscored, cfg), 0.0, cfg.lam)
    if not torch.equal(batch["logp"], batch["ref_logp"]):
        raise UserError("self-check: the KL to the reference is not 0 before the first step: identical "
                        "weights gave different log-probs; is dropout still on?")
    stats = minibatch_backward(models, batch, range(len(batch["mask"])), cfg)
    models.policy.zero_grad(set_to_none=True)
    models.critic.zero_grad(set_to_none=True)
    exact = device.type == "cpu" and not (cfg.bf16 or cfg.compile)
    limit = 1e-5 if exact else 1e-2  # there, other kernels may be taken where gradients are needed
    if abs(stats["ratio"] - 1) > limit or stats["update_kl"] > limit**2:
        raise UserError("self-check: the ratio is not 1 before the first step: the update computes other "
                        "log-probs than the rollout; does model.py depend on gradients being needed?")
