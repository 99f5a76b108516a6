"""Self-checks before the first step: model.py still keeps what every stage relies on. All raise UserError.

They know nothing of the architecture: each compares two ways to the same numbers. Their order matters: a
mistake shows in many of them, and the first one names it best.
"""
import copy
import traceback
import zlib
from dataclasses import replace

import torch

from data.files import UserError
from lib.fast import plain, prepare
from lib.generate import Cache, generate
from lib.memory import exhausted
from model import GPT, RewardModel

POSITIONS, FAR = 96, 512  # of most texts; of those in which a window, or a period, of up to so many shows
ROUNDED = 2e-3  # of a derivative: 5e-4 and less in float32, 4e-3 and more in float16
BENT = 1e-2  # the same of the gradient by the weights: 2e-4 and less at the start, 2e-3 with large weights
FARTHER = 4  # times as much influence from the first third of a text as from the last: 1 to 2.3, with an
# ALiBi of the wrong sign 6 to 7.6 (4 to 12 heads)


def far(a, b):
    """Whether a and b differ by more than rounding does; TF32 and bf16 round to 3 digits or fewer."""
    tolerance = 1e-4 if b.device.type == "cpu" and b.dtype == torch.float32 else 2e-2
    return not (a - b).abs().max() <= tolerance * b.abs().max()


def refuse(wrong, sentence):
    if wrong:
        raise UserError(f"self-check: {sentence}")


def check_model(gpt):
    """The model as it is and with noise on a copy of its weights, where what is neutral at the start shows.
    Its mode and the global random numbers stay as they were."""
    with torch.random.fork_rng([]), plain(gpt):
        torch.manual_seed(0)
        noisy, loud = another(gpt, noise=0.5), another(gpt, noise=20)  # loud: beyond what a layer may limit
        small = {"n_layer": min(2, gpt.config.n_layer), "vocab_size": 64}
        check_what_stays(loud, training=False)
        twice(check_calls, another(gpt, dropout=0.5))  # which eval mode must turn off
        for check in (check_precision, check_rows):
            for model in (gpt, noisy):
                twice(check, model)
        twice(check_training, noisy)
        check_what_stays(loud, training=True)
        odd = [name for name, x in gpt.state_dict().items() if not x.is_floating_point()]
        refuse(odd, f"{odd[:1]} is not floating-point, and checkpoints hold nothing else; register it with "
                    "persistent=False")
        twice(check_order, gpt)
        twice(check_order, noisy)
        twice(check_cache, gpt)
        twice(check_cache, another(gpt, noise=0.5, **small), FAR)
        twice(check_distance, another(gpt, **small))
        twice(check_generation, noisy)
        twice(check_weights, noisy)


def twice(check, model, positions=POSITIONS):
    """Refuse what is wrong for two texts: once in a thousand, rounding alone decides which expert of a
    mixture takes a token."""
    for seed in (0, 1):
        try:
            return check(model, texts(model, positions, seed))
        except UserError:
            if seed:
                raise


def texts(model, positions=POSITIONS, seed=0):
    V, T = model.config.vocab_size, min(positions, model.config.block_size)
    tokens = torch.randint(V, (3, T), generator=torch.Generator().manual_seed(seed))
    return tokens.to(model.lm_head.weight.device)


def another(gpt, dropout=0.0, noise=0.0, **sizes):
    """A copy with another dropout rate and noise on its weights; with other sizes, a new model."""
    model = GPT(replace(gpt.config, dropout=dropout, **sizes))
    if not sizes:
        model.load_state_dict(gpt.state_dict())
    return prepare(shaken(model, noise), gpt.lm_head.weight.device).eval()


@torch.no_grad()
def shaken(model, noise):
    """Add noise to its weights, times their deviation."""
    for p in model.parameters():
        p.data += noise * (max(0.02, p.std().item()) if p.dim() > 1 else 0.2) * torch.randn_like(p)
    return model


def weights(model):
    """{name: a checksum}; not a copy, which may be too large."""
    return {name: zlib.crc32(x.detach().cpu().reshape(-1).view(torch.uint8).numpy())
            for name, x in model.state_dict().items()}


def changed(model, before):
    """The first weight that is not what it was."""
    return next((name for name, now in weights(model).items() if now != before[name]), None)


def modes(model):
    return [module.training for module in model.modules()]


@torch.no_grad()
def check_what_stays(gpt, training):
    """A call changes neither weights nor modes; not `twice`, for then a norm may be what it should be."""
    before, were = weights(gpt.train(training)), modes(gpt)
    gpt(texts(gpt))
    how = "a forward pass" + " in training mode" * training
    refuse(name := changed(gpt, before), f"{how} changes weights ({name})")
    refuse(modes(gpt) != were, f"{how} puts layers into eval mode or out of it")


@torch.no_grad()
def check_calls(gpt, tokens):
    """A call leaves its input, the next one gives the same, and the logits are those of each hidden state."""
    x = gpt.trunk.wte(tokens)
    kept, ids, logits, h = x.clone(), tokens.clone(), gpt(tokens), gpt.trunk(x)
    refuse(not (torch.equal(x, kept) and torch.equal(tokens, ids)),
           "the trunk changes the tensor that it is given in place, and that belongs to the caller")
    refuse(not logits.isfinite().all(), "the logits of a new text are not finite")
    refuse(far(gpt(tokens), logits), "the same text twice gives two results: something random that eval mode "
                                     "does not turn off, or something carried from call to call")
    refuse(far(gpt.trunk(tokens), h), "the trunk does not treat tokens and their embeddings alike")
    refuse(any(far(gpt.logits(h[:, i]), logits[:, i]) for i in (0, -1)), "GPT.forward does not give what "
           "GPT.logits makes of each hidden state, and generation uses only GPT.logits")
    logps = (logits[0] / 0.7).log_softmax(-1).gather(1, tokens[0, :, None])[:, 0]
    refuse(far(gpt.logps(h[0], tokens[0], temperature=0.7), logps), "GPT.logps does not give the "
           "log-probs of GPT.logits at a temperature, so PPO would train another model than it samples from")
    with torch.enable_grad():
        refuse(far(gpt.trunk(tokens), h), "the hidden states are others where gradients are needed")


@torch.no_grad()
def check_training(gpt, tokens):
    """At dropout 0 the modes differ in nothing."""
    h = gpt.trunk(tokens)
    gpt.train()
    first, second, alone = gpt.trunk(tokens), gpt.trunk(tokens), gpt.trunk(tokens[1:2])
    gpt.eval()
    refuse(far(first, second), "in training mode the same text twice gives two results, though dropout is 0: "
                               "something random, or something carried from call to call")
    refuse(far(alone, second[1:2]), "in training mode what a text gives changes with the texts beside it: "
                                    "rows of a batch see each other")
    refuse(far(first, h), "in training mode the hidden states are others than in eval mode, though dropout "
                          "is 0")


@torch.no_grad()
def check_rows(gpt, tokens):
    """Rows do not see each other."""
    refuse(far(gpt.trunk(tokens[1:2])[0], gpt.trunk(tokens)[1]), "what a text gives changes "
           "with the texts beside it: rows of a batch see each other")


@torch.no_grad()
def check_order(gpt, tokens):
    """No token looks ahead, however long the text is."""
    row, T = tokens[0], tokens.shape[1]
    for length in sorted({2, min(3, T), T}):
        batch, starts = row[:length].repeat(4, 1), (1, max(1, length // 2), length - 1)
        for later, n in zip(batch[1:], starts, strict=True):
            later[n:] = (later[n:] + 1) % gpt.config.vocab_size
        h, *others = gpt.trunk(batch)
        refuse(any(far(other[:n], h[:n]) for other, n in zip(others, starts, strict=True)), "what a token "
               "gives changes with the tokens after it: model.py is not causal, so the model would learn to "
               "copy the answer")
    for n in {1, 2, min(3, T), T // 2}:
        refuse(far(gpt.trunk(row[None, :n])[0], h[:n]), "what a token gives changes with the padding after "
                                                        "it, or with the length of the batch")


@torch.no_grad()
def check_cache(gpt, tokens):
    """Read in parts a text gives what it gives as a whole: prompts of unequal length, one by one, also
    another text in turn, several tokens at once, and after a row was dropped."""
    (B, T), device = tokens.shape, tokens.device
    h, cache, rows = gpt.trunk(tokens), Cache(B, T, device), torch.arange(B, device=device)
    P = max(1, T // 3)
    lengths = torch.tensor([P, max(1, P - 5), max(1, P // 2)], device=device)

    def read(n, how, cache):
        at = cache.length[:, None] + torch.arange(n, device=device)
        try:
            return gpt.trunk.forward(tokens[rows[:, None], at], cache), h[rows[:, None], at]
        except Exception as error:
            if exhausted(error):
                raise
            traceback.print_exc()
            raise UserError(f"self-check: {how}, model.py fails with the KV cache: {error}") from None

    def same(n, how, real=slice(None)):
        if not (n := min(n, T - int(cache.length.max()))):
            return  # the text is at its end
        twin, (got, want) = copy.deepcopy(cache), read(n, how, cache)
        why = "so lib/generate.py would sample from another model than is trained"
        if P > 1 and not far(got[0], want[0]):
            why = ("but only behind padding: does a state take in the padding of shorter prompts, or is a "
                   "position that in the batch?")
        refuse(far(got[real], want[real]), f"{how}, what the KV cache gives is not what the whole text "
               f"gives, {why}")
        refuse(n == 1 and far(read(n, how, twin)[0], got), "of two texts that are read in turn, each with a "
               "KV cache, one changes the other: a layer keeps in itself what belongs in `seen`")

    cache.expect(lengths)
    same(P, "when a prompt is read", torch.arange(P, device=device) < lengths[:, None])
    for _ in range(2):
        same(1, "when tokens are read one by one")
    for _ in range(2):
        same(T // 4, "when several tokens are read at once")
    going = torch.tensor([True, False, True], device=device)
    cache.keep(going)
    rows = rows[going]
    for _ in range(3):
        same(1, "when tokens are read one by one after a row was dropped")


@torch.no_grad()
def check_precision(gpt, tokens):
    """Of two small steps into one direction, the longer one moves the logits of most texts twice as far."""
    if tokens.device.type != "cpu":
        return  # TF32 rounds, too
    T = min(4, tokens.shape[1])
    tokens = tokens[:, : min(4, tokens.shape[1] // T) * T].reshape(-1, T)  # (12,4)
    x = gpt.trunk.wte(tokens)
    step, weight = 1.5e-3 * x.std() * torch.randn_like(x), torch.randn(T, gpt.config.vocab_size)
    high, low, higher, lower = ((gpt.logits(gpt.trunk(x + a * step)).double() * weight).sum((1, 2))
                                for a in (1, -1, 2, -2))
    whole, half = higher - lower, high - low
    uneven = (whole - 2 * half).abs().median() / whole.square().mean().sqrt()
    refuse(uneven > ROUNDED, "the logits change by jumps: a number is rounded to bfloat16 or float16 on the "
                             "way, in all modes (--bf16 is the flag for that)")


def check_weights(gpt, tokens):
    """The derivative by the weights in a random direction, as autograd has it and by two small steps; then
    whether a copy is one, and of the same."""
    moved, gaps = [p for p in gpt.parameters() if p.requires_grad], [0.0]
    steps = [2e-3 * p.detach().square().mean().sqrt() * torch.randn_like(p) for p in moved]
    weight = torch.randn(4, gpt.config.vocab_size, device=tokens.device)

    def f(text):
        return (gpt(text[None])[0].double() * weight[: len(text)]).sum()

    for text in tokens[:, :4] if moved and tokens.device.type == "cpu" else ():
        y = f(text)
        refuse(not y.requires_grad, "the logits do not depend on any weight that is trained: what is not "
               "frozen is never used, or is detached")
        grads = torch.autograd.grad(y, moved, allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            slopes, at = torch.stack([(g * s).sum() for g, s in zip(grads, steps, strict=True)]), []
            for times in (1, -2, 1):
                torch._foreach_add_([p.data for p in moved], steps, alpha=times)
                at.append(f(text).item())
            gaps.append(abs((at[0] - at[1]) / 2 - slopes.sum().item()) / slopes.norm().item())
    refuse(sorted(gaps)[len(gaps) // 2] > BENT, "the gradient is not that of the logits: something is "
           "detached (.detach, .data), or computed without gradients")
    with torch.no_grad():
        h, rm = shaken(gpt, 0.5).trunk(tokens[:1]), RewardModel.from_gpt(gpt)
        refuse(far(another(gpt).trunk(tokens[:1]), h), "a new model with the same weights gives something "
               "else: what a call made of them is kept, or not all of them are in the state dict")
        refuse(far(rm.trunk(tokens[:1]), h), "RewardModel.from_gpt changes the trunk")
        refuse({p.data_ptr() for p in gpt.parameters()} & {p.data_ptr() for p in rm.parameters()},
               "RewardModel.from_gpt copies no weights: training the reward model would change the GPT")


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
