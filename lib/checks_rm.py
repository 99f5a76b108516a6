"""Self-checks before the first step, of a reward model and of PPO; those of a GPT stand in lib/checks.py."""
import copy
from dataclasses import replace

import torch

from data.examples import pad
from lib.checks import check_model, far, modes, refuse, shaken
from lib.fast import plain


@torch.inference_mode()
def check_scores(rm):
    """A score is that of its own text to the end, and reads nothing but the trunk's hidden states; each value
    is that of a prefix. With a little noise, for a head may start at 0. The global random numbers stay as
    they were."""
    device = next(rm.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        with plain(rm):
            rm = shaken(copy.deepcopy(rm), 0.1)
        _check_scores(rm, device, rm.config.vocab_size, rm.room)


def _check_scores(rm, device, V, room):
    rows = [[(5 * n + 3 * t) % V for t in range(min(n, room))] for n in (3, 7, 12)]
    tokens, lengths = pad(rows, device)
    alone, were = torch.cat([rm.score(*pad([row], device)) for row in rows]), modes(rm.train())
    rm(tokens), rm.score(tokens, lengths)
    refuse(modes(rm) != were, "a reward model puts itself into eval mode, so dropout would stay off")
    rm.eval()
    refuse(far(rm.score(tokens, lengths), rm.score(tokens, lengths)), "a score is another one when asked for "
           "again")
    padding = torch.arange(tokens.shape[1], device=device) >= lengths[:, None]
    for fill in (0, V - 1):
        refuse(far(rm.score(tokens.masked_fill(padding, fill), lengths), alone), "a text's score changes "
               "with its padding or with the texts beside it: model.py lets a real token see padding or "
               "another row, or reads a position behind the text's end")
    ends = [[*rows[0][:-1], (rows[0][-1] + i) % V] for i in range(1, 5)]
    refuse(not far(rm.score(*pad(ends, device)), alone[:1]), "a score does not depend on the text's last "
           "token: is it read one position too early?")
    fixed = torch.randn(2, tokens.shape[1] + 1, rm.config.d_model, device=device,
                        generator=torch.Generator(device).manual_seed(0))
    n, given, h = tokens.shape[1] // 2, [], rm.trunk(tokens)
    fixed[1, :n], fixed[1, n] = fixed[0, :n], 10 * fixed[1, n]

    def instead(trunk, args, h):
        given.append(h)
        return fixed[len(given) % 2, None, : h.shape[1]].expand_as(h)

    hook = rm.trunk.register_forward_hook(instead)
    values, others = rm(tokens), rm(tokens)
    hook.remove()
    refuse(far(values, values[:1].expand_as(values)) or far(given[0], h), "the reward head reads something "
           "else than what the trunk returns, the final norm included")
    refuse(n and far(others[:, :n], values[:, :n]) or not far(others[:, n], values[:, n]), "a value depends "
           "on a later token, or not on its own: is RewardModel.forward one position off?")


def check_start(phases, models, prompts, cfg, device):
    """Before any step the KL to the reference is 0 and the ratio 1. phases: rollout, assess, advantages and
    minibatch_backward of ppo.py; nothing is scored, and no gradient stays."""
    check_model(models.policy)
    check_scores(models.critic)
    rollout, assess, advantages, minibatch_backward = phases
    short = replace(cfg, max_new_tokens=min(16, cfg.max_new_tokens))
    batch = rollout(models.policy, prompts[:8], models.tokenizer.eos, short,
                    torch.Generator(device).manual_seed(0))
    unscored = models._replace(score=lambda tokens, lengths, P: torch.zeros(len(tokens)))
    batch = advantages(assess(batch, unscored, cfg), 0.0, cfg.lam)
    refuse(not torch.equal(batch["logp"], batch["ref_logp"]), "the KL to the reference is not 0 before the "
           "first step: identical weights gave different log-probs; is dropout still on?")
    stats = minibatch_backward(models, batch, range(len(batch["mask"])), cfg)
    models.policy.zero_grad(set_to_none=True)
    models.critic.zero_grad(set_to_none=True)
    exact = device.type == "cpu" and not (cfg.bf16 or cfg.compile)
    limit = 1e-5 if exact else 1e-2  # there, other kernels may be taken where gradients are needed
    refuse(abs(stats["ratio"] - 1) > limit or stats["update_kl"] > limit**2, "the ratio is not 1 before the "
           "first step: the update computes other log-probs than the rollout; does model.py depend on "
           "gradients being needed?")
