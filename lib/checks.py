"""Self-checks before the first step: model.py still keeps what every stage relies on. All raise UserError.

They know nothing of the architecture: each compares two ways to the same numbers. Their order matters: a
mistake shows in many of them, and the first one names it best.
"""
import zlib
from dataclasses import replace

import torch

from data.examples import pad
from data.files import UserError
from lib.fast import plain, prepare
from lib.generate import Cache, generate
from model import GPT

POSITIONS = 96  # a window of up to so many tokens, or a period, shows
ROUNDED = 2e-3  # of a directional derivative, median over rows: 3e-4 in float32, 4e-3 and more in float16
FARTHER = 4  # times as much influence from the first third of a text as from the last: 1 to 2.3, with an
# ALiBi of the wrong sign 6 to 7.6 (4 to 12 heads)


def far(a, b):
    """Whether a and b differ by more than rounding does; TF32 and bf16 round to 3 digits or fewer."""
    tolerance = 1e-4 if b.device.type == "cpu" and b.dtype == torch.float32 else 2e-2
    return not (a - b).abs().max() <= tolerance * b.abs().max()


def refuse(wrong, sentence):
    if wrong:
        raise UserError(f"self-check: {sentence}")


# ---- a GPT ----

def check_model(gpt):
    """The model as it is, then with noise on a copy of its weights, where what is neutral at the start shows.
    Its mode and the global random numbers stay as they were."""
    odd = [name for name, x in gpt.state_dict().items() if not x.is_floating_point()]
    refuse(odd, f"{odd[:1]} is not floating-point, and checkpoints hold nothing else; register it with "
                "persistent=False")
    with torch.random.fork_rng([]), plain(gpt):
        torch.manual_seed(0)
        twice(check_calls, gpt)
        twice(check_calls, another(gpt, dropout=0.5))  # which eval mode must turn off
        calm = gpt if gpt.config.dropout == 0 else another(gpt)
        twice(check_training, calm)
        noisy = another(gpt, noise=0.5)
        for model in (gpt, noisy):
            for check in (check_order, check_rows, check_cache, check_precision):
                twice(check, model)
        twice(check_training, noisy)
        twice(check_generation, noisy)
        twice(check_distance, another(gpt, n_layer=min(2, gpt.config.n_layer), vocab_size=64))


def twice(check, model):
    """Refuse what is wrong for two texts: once in a thousand, rounding alone decides which expert of a
    mixture takes a token."""
    for seed in (0, 1):
        V, T = model.config.vocab_size, min(POSITIONS, model.config.block_size)
        tokens = torch.randint(V, (3, T), generator=torch.Generator().manual_seed(seed))
        try:
            return check(model, tokens.to(model.lm_head.weight.device))
        except UserError:
            if seed:
                raise


def another(gpt, dropout=0.0, noise=0.0, **sizes):
    """A copy with another dropout rate and noise on its weights (times their deviation); with other sizes, a
    new model."""
    model = GPT(replace(gpt.config, dropout=dropout, **sizes))
    if not sizes:
        model.load_state_dict(gpt.state_dict())
    with torch.no_grad():
        for p in model.parameters():
            p += noise * (max(0.02, p.std().item()) if p.dim() > 1 else 0.2) * torch.randn_like(p)
    return prepare(model, gpt.lm_head.weight.device).eval()


def weights(model):
    """{name: a checksum}; not a copy, which may be too large."""
    return {name: zlib.crc32(x.detach().cpu().contiguous().view(torch.uint8).numpy())
            for name, x in model.state_dict().items()}


def changed(model, before):
    """The first weight that is not what it was."""
    return next((name for name, now in weights(model).items() if now != before[name]), None)


@torch.no_grad()
def check_calls(gpt, tokens):
    """A call changes nothing, the next one gives the same, and the logits are those of each hidden state."""
    before, x = weights(gpt), gpt.trunk.wte(tokens)
    kept, ids, logits, h = x.clone(), tokens.clone(), gpt(tokens), gpt.trunk(x)
    refuse(name := changed(gpt, before), f"a forward pass changes weights ({name})")
    refuse(not (torch.equal(x, kept) and torch.equal(tokens, ids)),
           "the trunk changes the tensor that it is given in place, and that belongs to the caller")
    refuse(not logits.isfinite().all(), "the logits of a new text are not finite")
    refuse(far(gpt(tokens), logits), "the same text twice gives two results: something random that eval mode "
                                     "does not turn off, or something carried from call to call")
    refuse(far(gpt.trunk(tokens), h), "the trunk does not treat tokens and their embeddings alike")
    refuse(any(far(gpt.logits(h[:, i]), logits[:, i]) for i in (0, -1)), "GPT.forward does not give what "
           "GPT.logits makes of each hidden state, and training and generation use only GPT.logits")


@torch.no_grad()
def check_training(gpt, tokens):
    """At dropout 0 the modes differ in nothing."""
    h, before = gpt.trunk(tokens), weights(gpt)
    gpt.train()
    trained = gpt.trunk(tokens), gpt.trunk(tokens)
    gpt.eval()
    refuse(name := changed(gpt, before), f"a forward pass in training mode changes weights ({name})")
    refuse(any(far(x, h) for x in trained), "in training mode the hidden states are others than in eval "
                                            "mode, though dropout is 0")


@torch.no_grad()
def check_order(gpt, tokens):
    """No token looks ahead, however long the text is."""
    h, T = gpt.trunk(tokens), tokens.shape[1]
    for n in {1, T // 2, T - 1}:
        later = torch.cat([tokens[:, :n], (tokens[:, n:] + 1) % gpt.config.vocab_size], 1)
        refuse(far(gpt.trunk(later)[:, :n], h[:, :n]), "what a token gives changes with the tokens after it: "
               "model.py is not causal, so the model would learn to copy the answer")
    for n in {1, T // 2}:
        refuse(far(gpt.trunk(tokens[:, :n]), h[:, :n]), "what a token gives changes with the padding after "
                                                        "it, or with the length of the batch")


@torch.no_grad()
def check_rows(gpt, tokens):
    """Rows do not see each other."""
    alone = torch.cat([gpt.trunk(row[None]) for row in tokens])
    refuse(far(gpt.trunk(tokens), alone), "what a text gives changes with the texts beside it: rows of a "
                                          "batch see each other")


@torch.no_grad()
def check_cache(gpt, tokens):
    """Read in parts a text gives what it gives as a whole: prompts of unequal length, several tokens at once,
    after a row was dropped, then one by one."""
    (B, T), device = tokens.shape, tokens.device
    h, cache, rows = gpt.trunk(tokens), Cache(B, T, device), torch.arange(B, device=device)
    P = max(1, T // 3)
    lengths = torch.tensor([P, max(1, P - 5), max(1, P // 2)], device=device)

    def same(n, how, real=slice(None)):
        at = cache.length[:, None] + torch.arange(n, device=device)
        got, want = gpt.trunk.forward(tokens[rows[:, None], at], cache), h[rows[:, None], at]
        refuse(far(got[real], want[real]), f"{how}, what the KV cache gives is not what the whole text "
               "gives, so lib/generate.py would sample from another model than is trained")

    cache.expect(lengths)
    same(P, "when a prompt is read", torch.arange(P, device=device) < lengths[:, None])
    for n in (T // 4, T // 4):
        if 0 < n < T - int(cache.length.max()):
            same(n, "when several tokens are read at once")
    going = torch.tensor([True, False, True], device=device)
    cache.keep(going)
    rows = rows[going]
    for _ in range(min(8, T - int(cache.length.max()))):
        same(1, "when tokens are read one by one")


def check_precision(gpt, tokens):
    """The derivative of the hidden states by their input, in a random direction: as autograd has it, and by
    two small steps, which rounding makes uneven."""
    if tokens.device.type != "cpu":
        return  # TF32 rounds, too
    T = min(4, tokens.shape[1])
    tokens = tokens[:, : min(4, tokens.shape[1] // T) * T].reshape(-1, T)  # (12,4)
    x = gpt.trunk.wte(tokens).detach().requires_grad_()
    weight, step = torch.randn(x.shape, device=x.device), 3e-3 * x.std() * torch.randn_like(x)

    def f(x):
        return (gpt.trunk(x).double() * weight).sum((1, 2))

    dx, = torch.autograd.grad(f(x).sum(), x)
    with torch.no_grad():
        slope, scale = (dx * step).sum((1, 2)), (dx * step).norm(dim=(1, 2))
        whole, half = ((f(x + s) - f(x - s)) / 2 / scale for s in (step, step / 2))
        uneven, gap = (whole - 2 * half).abs().median(), (whole - slope / scale).abs().median()
    refuse(uneven > ROUNDED, "the hidden states change by jumps: a number is rounded to bfloat16 or float16 "
                             "on the way, in all modes (--bf16 is the flag for that)")
    refuse(gap > ROUNDED, "the gradient is not that of the hidden states: something is detached, or computed "
                          "without gradients")


@torch.no_grad()
def check_generation(gpt, tokens):
    """lib.generate and GPT.generate draw the same tokens, and leave the weights alone."""
    P, before = max(1, tokens.shape[1] // 3), weights(gpt)
    prompts = tokens[:, :P], torch.tensor([P, max(1, P - 2), max(1, P // 2)], device=tokens.device)
    new = min(6, gpt.config.block_size - P)
    made = [function(gpt, *prompts, new, generator=torch.Generator(tokens.device).manual_seed(0))
            for function in (GPT.generate, generate)]
    refuse(name := changed(gpt, before), f"generation changes weights ({name})")
    refuse(not all(map(torch.equal, *made)), "lib.generate draws other tokens than GPT.generate")


def check_distance(gpt, tokens):
    """How much each token of a text moves the last hidden state of a new model of two layers."""
    x, third = gpt.trunk.wte(tokens).detach().requires_grad_(), tokens.shape[1] // 3
    h = gpt.trunk(x)[:, -1]
    dx, = torch.autograd.grad((h * torch.randn_like(h)).sum(), x)
    moved = dx.norm(dim=-1).mean(0)
    refuse(third > 10 and moved[:third].sum() > FARTHER * moved[-third - 1 : -1].sum(),
           "the farther away a token is, the more it counts: has a bias on distances the wrong sign?")


# ---- a reward model ----

@torch.inference_mode()
def check_scores(rm):
    """A score depends neither on padding nor on the other texts of the batch, but on the trunk's hidden
    states alone."""
    device, V = rm.reward_head.weight.device, rm.config.vocab_size
    rows = [[(5 * n + 3 * t) % V for t in range(min(n, rm.room))] for n in (3, 7, 12)]
    tokens, lengths = pad(rows, device)
    with plain(rm):
        alone = torch.cat([rm.score(*pad([row], device)) for row in rows])
        refuse(far(rm.score(tokens, lengths), rm.score(tokens, lengths)), "a score is another one when asked "
               "for again")
        padding = torch.arange(tokens.shape[1], device=device) >= lengths[:, None]
        for fill in (0, V - 1):
            refuse(far(rm.score(tokens.masked_fill(padding, fill), lengths), alone), "a text's score changes "
                   "with its padding or with the texts beside it: model.py lets a real token see padding or "
                   "another row, or reads a wrong position")
        fixed = torch.randn(1, tokens.shape[1] + 1, rm.config.d_model, device=device,
                            generator=torch.Generator(device).manual_seed(0))
        hook = rm.trunk.register_forward_hook(lambda trunk, args, h: fixed[:, : h.shape[1]].expand_as(h))
        try:
            values = rm(tokens)
        finally:
            hook.remove()
        refuse(far(values, values[:1].expand_as(values)), "the reward head reads something else than what "
                                                          "the trunk returns, the final norm included")


def check_start(phases, models, prompts, cfg, device):
    """Before any step the KL to the reference is 0 and the ratio 1. phases: rollout, assess, advantages and
    minibatch_backward of ppo.py; nothing is scored, and no gradient stays."""
    check_model(models.policy)
    check_scores(models.critic)
    rollout, assess, advantages, minibatch_backward = phases
    short = replace(cfg, max_new_tokens=min(16, cfg.max_new_tokens))
    batch = rollout(models.policy, prompts[:8], models.tokenizer.eos, short,
                    torch.Generator(device).manual_seed(0))
    unscored = models._replace(score=lambda tokens, lengths, P: torch.zeros(len(tokens), device=device))
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
