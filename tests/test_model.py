"""model.py, its generation and its products, against plain formulas. Ids (M1, R7, ...): docs/method.md.

After an edit of model.py, run this file: it says whether causality, cache, padding and heads still hold. It
knows of no architecture, and takes parameters without a gradient; what is GPT-2's own is in test_gpt2.py.
"""
import copy
import itertools
import math
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers import gen, padded

import lib.generate
import model
from data.examples import pad
from data.files import UserError
from lib import fast
from lib.checks import check_model
from lib.fast import prepare
from lib.generate import Cache, generate
from model import GPT, GPTConfig, RewardModel, sample
from train_sft import Config

PROMPTS = [[3], [5, 1, 4, 2, 9], [7, 7], [1, 2, 3, 4, 5, 6, 7], [16, 0, 8], [2, 12], [4, 4, 4, 4],
           [9, 10, 11, 12, 13, 14]]


APPENDED = ("token",)  # pools that read behind the text, so that a prefix has no score of its own
RUNNING_BEST = ("max",)  # pools whose value may stay as it is when the last token changes


def random_tokens(rng, *shape, vocab=17):
    return torch.randint(vocab, shape, generator=rng)


# ---- trunk ----

@torch.no_grad()
def test_M1_causality_of_logits_and_values(tiny, rng):
    gpt, tokens = tiny(), random_tokens(rng, 2, 12)
    nets = [gpt] + [RewardModel.from_gpt(gpt, pool) for pool in RewardModel.POOLS]
    for net in nets:
        before = net(tokens)
        for j in (1, 5, 11):
            other = tokens.clone()
            other[:, j] = (other[:, j] + 1) % 17
            after = net(other)
            assert torch.equal(before[:, :j], after[:, :j])
            if getattr(net, "pool", "") not in RUNNING_BEST:
                assert not torch.isclose(before[:, j], after[:, j]).all()


@torch.no_grad()
def test_M2_right_padding_changes_nothing(tiny, rng):
    gpt, tokens = tiny(), random_tokens(rng, 3, 9)
    for pads in (1, 7, 23):
        longer = torch.cat([tokens, random_tokens(rng, 3, pads)], 1)
        torch.testing.assert_close(gpt(longer)[:, :9], gpt(tokens), atol=1e-5, rtol=0)


def test_M12_every_position_and_its_own(tiny, rng):
    gpt, tokens = tiny(), random_tokens(rng, 2, 10)
    assert gpt.trunk(tokens).shape == (2, 10, 32) and gpt(tokens).shape == (2, 10, 17)
    values = RewardModel.from_gpt(gpt)(tokens)
    assert values.shape == (2, 10) and len(values[0].unique()) == 10


def test_M13_dropout_0_means_train_equals_eval(tiny, rng):
    tokens = random_tokens(rng, 2, 10)
    for net in (tiny(), RewardModel.from_gpt(tiny())):
        want = net(tokens)
        net.train()
        assert torch.equal(net(tokens), want) and torch.equal(net(tokens), want)
    noisy = tiny(dropout=0.2).train()
    assert not torch.allclose(noisy(tokens), noisy(tokens))


def test_M13_every_dropout_is_used(tiny, rng):
    """Attention, residual branches and embedding: with the others off, each alone makes noise."""
    tokens = random_tokens(rng, 1, 10)
    for keep in ("attention", "branch", "embedding"):
        gpt = tiny(dropout=0.5).train()
        if keep != "embedding":
            gpt.trunk.drop.p = 0.0
        for block in gpt.trunk.blocks:
            block.drop.p = 0.5 if keep == "branch" else 0.0
            block.attn.dropout = 0.5 if keep == "attention" else 0.0
        assert not torch.allclose(gpt(tokens), gpt(tokens)), keep
        gpt.eval()
        assert torch.equal(gpt(tokens), gpt(tokens)), keep


def test_too_long_is_an_error(tiny):
    gpt = tiny()
    with pytest.raises(ValueError, match="block_size 64"):
        gpt(torch.zeros(1, 65, dtype=torch.long))
    cache = Cache(1, 70, "cpu")
    gpt.trunk(torch.zeros(1, 62, dtype=torch.long), cache)
    with pytest.raises(ValueError, match="block_size 64"):
        gpt.trunk(torch.zeros(1, 3, dtype=torch.long), cache)
    with pytest.raises(ValueError, match="n_head"):
        GPT(GPTConfig(d_model=30, n_head=4))


# ---- heads ----

def test_M15_head_swap(tiny):
    gpt = tiny()
    before = copy.deepcopy(gpt.state_dict())
    for pool in RewardModel.POOLS:
        rm = RewardModel.from_gpt(gpt, pool)
        assert torch.equal(rm.trunk.wte.weight, gpt.trunk.wte.weight)
        assert not any("lm_head" in name for name in rm.state_dict())
        with torch.no_grad():
            for p in rm.parameters():
                p.add_(1.0)
    assert all(torch.equal(before[name], value) for name, value in gpt.state_dict().items())
    with pytest.raises(ValueError, match="'first'"):
        RewardModel.from_gpt(gpt, "first")


def test_M15_optimizer_sees_each_parameter_once(tiny):
    gpt = tiny()
    assert len({id(p) for p in gpt.parameters()}) == len(list(gpt.parameters()))


def test_M16_copies_share_nothing(tiny):
    gpt = tiny()
    nets = [gpt, copy.deepcopy(gpt), RewardModel.from_gpt(gpt), RewardModel.from_gpt(gpt)]
    places = [{p.data_ptr() for p in net.parameters()} for net in nets]
    assert len(set.union(*places)) == sum(map(len, places))


# ---- where the reward model reads ----

@pytest.fixture(params=RewardModel.POOLS)
def rm(request, tiny):
    torch.manual_seed(1)
    rm = RewardModel.from_gpt(tiny(), request.param).eval()
    with torch.no_grad():
        rm.reward_head.bias.fill_(0.7)
        rm.shift.fill_(0.4)
        rm.scale.fill_(2.5)
    return rm


def read_with_token(rm, row):
    return rm.trunk(torch.cat([rm.trunk.wte(torch.tensor(row)), rm.reward_token[None]])[None])[0, -1]


# what the head reads of one text without padding; another pool adds its own formula
READS = {"last": lambda rm, row: rm.trunk(torch.tensor([row]))[0, -1],
         "mean": lambda rm, row: rm.trunk(torch.tensor([row]))[0].sum(0) / len(row),
         "max": lambda rm, row: rm.trunk(torch.tensor([row]))[0].max(0).values,
         "token": read_with_token}


@torch.no_grad()
def test_R1_R7_R8_score_is_the_definition_in_any_batch(rm, rng):
    """Alone, in a batch, in another order, with any padding to the right; texts of length 1, too."""
    tokens, lengths = padded(PROMPTS)
    want = torch.stack([rm._head(READS[rm.pool](rm, row)) if rm.pool in READS else rm.score(*pad([row]))[0]
                        for row in PROMPTS])
    torch.testing.assert_close(rm.score(tokens, lengths), want, atol=1e-5, rtol=0)
    order = torch.randperm(len(PROMPTS), generator=rng)
    torch.testing.assert_close(rm.score(tokens[order], lengths[order]), want[order], atol=1e-5, rtol=0)
    for i, row in enumerate(PROMPTS):
        torch.testing.assert_close(rm.score(*pad([row])), want[i : i + 1], atol=1e-5, rtol=0)
    for fill in range(17):
        more = torch.cat([padded(PROMPTS, fill)[0], torch.full((len(PROMPTS), fill), fill)], 1)
        torch.testing.assert_close(rm.score(more, lengths), want, atol=1e-5, rtol=0)


@torch.no_grad()
def test_forward_is_the_score_of_every_prefix(rm, rng):
    """Running mean and maximum for "mean" and "max"; without the reward token for "token"."""
    tokens = random_tokens(rng, 2, 10)
    values = rm(tokens)
    if rm.pool in APPENDED:
        want = rm._head(rm.trunk(tokens))
    else:
        want = torch.stack([rm.score(tokens, torch.tensor([n, n])) for n in range(1, 11)], 1)
    torch.testing.assert_close(values, want, atol=1e-5, rtol=0)


def gradients(net):
    """Those of all parameters that have one: parts may be frozen."""
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def close_gradients(a, b, atol=1e-6, rtol=1e-5):
    assert a and a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=rtol,
                                   msg=lambda text, name=name: f"{name}: {text}")


def poisoned(rm, tokens, lengths, poison):
    """Scores and gradients when every hidden state beyond a row's end is `poison`."""
    def hook(h):
        outside = torch.arange(h.shape[1]) >= lengths[:, None] + (rm.pool in APPENDED)
        return torch.where(outside[:, :, None], poison, h)

    rm.zero_grad()
    end = rm.trunk.register_forward_hook(lambda module, args, h: hook(h))
    scores = rm.score(tokens, lengths)
    end.remove()
    (scores * torch.arange(1.0, len(scores) + 1)).sum().backward()
    return scores.detach(), gradients(rm)


def test_R3_poison_in_the_pads_reaches_neither_score_nor_gradient(rm):
    tokens, lengths = padded(PROMPTS)
    score, grads = poisoned(rm, tokens, lengths, 0.0)
    for poison in (1e6, -1e6):
        got, got_grads = poisoned(rm, tokens, lengths, poison)
        assert torch.equal(score, got)
        close_gradients(grads, got_grads)
    assert torch.equal(score, poisoned(rm, tokens, lengths, math.nan)[0])


def test_R7_any_pool_of_a_constant_is_that_constant(tiny, monkeypatch):
    gpt, (tokens, lengths) = tiny(), padded(PROMPTS)
    state = -torch.arange(1.0, 33)  # all negative, so padding of 0 would win the maximum
    for pool in set(RewardModel.POOLS) - set(APPENDED):
        rm = RewardModel.from_gpt(gpt, pool)
        monkeypatch.setattr(rm.trunk, "forward", lambda tokens: state.expand(*tokens.shape, 32))
        want = rm._head(state).expand(len(PROMPTS))
        torch.testing.assert_close(rm.score(tokens, lengths), want, atol=1e-5, rtol=0)


def test_R7_reward_token_is_no_vocabulary_entry(tiny, rng):
    gpt, tokens = tiny(), random_tokens(rng, 2, 63)
    before = gpt(tokens)
    rm = RewardModel.from_gpt(gpt, "token")
    assert rm.reward_token.shape == (32,) and rm.trunk.wte.weight.shape == (17, 32)
    assert gpt.state_dict().keys() == tiny().state_dict().keys() and rm.config.vocab_size == 17
    rm.score(tokens, torch.tensor([63, 4])).sum().backward()
    assert rm.reward_token.grad.abs().sum() > 0
    with torch.no_grad():
        rm.reward_token.add_(5.0)
    assert torch.equal(gpt(tokens), before)
    assert torch.equal(rm.trunk(tokens), gpt.trunk(tokens))
    with pytest.raises(ValueError, match="block_size"):
        rm.score(torch.zeros(1, 64, dtype=torch.long), torch.tensor([64]))


@torch.no_grad()
def test_room_is_the_longest_text_that_score_takes(rm):
    assert rm.room == 64 - (rm.pool in APPENDED)
    assert rm.score(*pad([[3] * rm.room])).isfinite().all()
    with pytest.raises(ValueError, match="block_size"):
        rm.score(*pad([[3] * (rm.room + 1)]))


# ---- logps ----

@pytest.mark.parametrize("pieces", [2**24, 17 * 6, 1], ids=["whole", "six", "single"])
def test_logps_in_pieces_equal_the_plain_formula_with_gradients(tiny, rng, monkeypatch, pieces):
    monkeypatch.setattr(fast, "LOGITS_AT_ONCE", pieces)
    gpt, plain = tiny(), tiny()
    tokens, weight = random_tokens(rng, 2, 10), torch.randn(20, generator=rng)
    targets = random_tokens(rng, 20)
    logps = partial(gpt.logps, temperature=0.7)
    got = fast.in_pieces(logps, gpt, gpt.trunk(tokens).reshape(20, 32), targets)
    want = (plain(tokens).reshape(20, 17) / 0.7).log_softmax(-1)[range(20), targets]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    (got @ weight).backward()
    (want @ weight).backward()
    close_gradients(gradients(gpt), gradients(plain), atol=1e-5, rtol=1e-4)


def test_logps_never_holds_all_logits(tiny, rng, monkeypatch):
    monkeypatch.setattr(fast, "LOGITS_AT_ONCE", 17 * 6)
    gpt, seen = tiny(), []
    gpt.lm_head.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    fast.in_pieces(gpt.logps, gpt, torch.randn(20, 32, generator=rng), random_tokens(rng, 20))
    assert seen == [6, 6, 6, 2]


def test_M14_log_softmax_in_float32(tiny, rng):
    gpt = tiny().bfloat16()
    h, targets = torch.randn(20, 32, generator=rng).bfloat16(), random_tokens(rng, 20)
    got, logits = gpt.logps(h, targets), gpt.logits(h)
    assert got.dtype == torch.float32 and logits.dtype == torch.bfloat16
    torch.testing.assert_close(got, logits.float().log_softmax(-1)[range(20), targets], atol=1e-6, rtol=0)
    assert RewardModel.from_gpt(gpt).bfloat16()(targets[None]).dtype == torch.float32


# ---- sample ----

def grid_counts(logits, n=100_000, **how):
    """Share of each token over an even grid of uniforms in [0,1)."""
    uniform = (torch.arange(n) + 0.5) / n
    return sample(logits.expand(n, -1), uniform, **how).bincount(minlength=len(logits)) / n


@pytest.mark.parametrize("T", [0.5, 0.7, 1.0])
def test_M9_frequencies_match_softmax(rng, T):
    logits, n = torch.randn(9, generator=rng), 20_000
    p = (logits.double() / T).softmax(-1)
    torch.testing.assert_close(grid_counts(logits, temperature=T).double(), p, atol=3e-5, rtol=0)
    got = sample(logits.expand(n, -1), torch.rand(n, generator=rng), T).bincount(minlength=9)
    assert ((got - n * p) ** 2 / (n * p)).sum() < 26.12  # chi-square, 8 degrees of freedom, p = 1e-3


def test_temperature_0_takes_the_likeliest(rng):
    logits = torch.randn(50, 17, generator=rng)
    assert torch.equal(sample(logits, torch.rand(50, generator=rng), temperature=0), logits.argmax(-1))


def test_top_p_0_keeps_the_likeliest(rng):
    logits = torch.randn(8, 17, generator=rng)
    assert torch.equal(sample(logits, torch.rand(8, generator=rng), top_p=0.0), logits.argmax(-1))


P = torch.tensor([0.05, 0.3, 0.0, 0.5, 0.15])  # likeliest first: 3, 1, 4, 0; never 2


@pytest.mark.parametrize("how, left", [
    ({"top_k": 1}, [3]), ({"top_k": 2}, [1, 3]), ({"top_k": 4}, [0, 1, 3, 4]), ({"top_k": 99}, [0, 1, 3, 4]),
    ({"top_p": 0.4}, [3]), ({"top_p": 0.6}, [1, 3]), ({"top_p": 0.9}, [1, 3, 4]),
    ({"top_p": 0.96}, [0, 1, 3, 4]), ({"top_p": 1.0}, [0, 1, 3, 4]), ({"top_k": 2, "top_p": 0.6}, [3]),
    ({"top_k": 3, "top_p": 0.7}, [1, 3])], ids=str)
def test_top_k_and_top_p_keep_the_smallest_set(how, left):
    """top_p keeps the fewest, of those top_k leaves, whose probabilities reach it; they are renormalised."""
    want = torch.zeros(5)
    want[left] = P[left] / P[left].sum()
    torch.testing.assert_close(grid_counts(P.log(), **how), want, atol=3e-5, rtol=0)


def test_top_p_looks_at_the_probabilities_after_the_temperature():
    """At T=.5 the two likeliest have .685 and .247, so .9 needs two; at T=1 it needs three."""
    assert grid_counts(P.log(), temperature=0.5, top_p=0.9).nonzero().flatten().tolist() == [1, 3]


@pytest.mark.parametrize("zeros", [[0], [16], [0, 1, 2, 15, 16], [*range(16)], [*range(1, 17)]], ids=str)
def test_no_token_of_probability_0(rng, zeros):
    """Not for the smallest and the largest number that torch.rand gives, wherever the zeros stand."""
    logits = torch.randn(300, 17, generator=rng) * 3
    logits[:, zeros] = -torch.inf
    for uniform in (0.0, 2**-24, 0.5, 1 - 2**-24):
        token = sample(logits, torch.full((300,), uniform))
        assert not torch.isin(token, torch.tensor(zeros)).any() and token.max() < 17
    tiny_tail = torch.tensor([[0.0, -200.0, -torch.inf]])  # exp(-200) is 0 in float32
    assert [int(sample(tiny_tail, torch.tensor([u]))) for u in (0.0, 1 - 2**-24)] == [0, 0]


# ---- generate: the naive one of model.py and the fast one of lib/generate.py ----

@pytest.fixture
def ready(tiny):
    """ready(seed=0, **sizes) -> a tiny GPT that computes as the scripts have it on this CPU."""
    return lambda seed=0, **sizes: prepare(tiny(seed, **sizes))


@pytest.fixture
def kept(monkeypatch):
    """Numbers of rows that the fast one goes on with after dropping some."""
    sizes, keep = [], Cache.keep
    monkeypatch.setattr(Cache, "keep", lambda self, rows: (sizes.append(int(rows.sum())), keep(self, rows)))
    return sizes


slow = pytest.mark.slow
both = pytest.mark.parametrize("generate", [GPT.generate, generate], ids=["naive", "fast"])
HOW = [{}, {"temperature": 0}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8},
       {"eos": 4, "temperature": 3.0}, {"eos": 0, "temperature": 3.0},
       {"eos": 3, "temperature": 4.0, "top_k": 12, "top_p": 0.95}]


def slow_but(cases, *quick):
    """The cases as parameters, all marked slow but the `quick` ones."""
    return [pytest.param(case, marks=() if case in quick else slow) for case in cases]


def equal(*results):
    """Whether two results of generate, (tokens, lengths), are the same."""
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("how", slow_but(HOW, *HOW[:2], *HOW[-2:]), ids=str)
def test_naive_generation_is_its_definition(tiny, how):
    """A row at a time, the text alone without any padding, from the same row of random numbers."""
    gpt, new, eos, how = tiny(3), 9, how.get("eos"), {k: x for k, x in how.items() if k != "eos"}
    tokens, lengths = gpt.generate(*padded(PROMPTS, 7), new, eos=eos, generator=gen(5), **how)
    uniform = torch.rand(len(PROMPTS), new, generator=gen(5))
    for prompt, got, n, us in zip(PROMPTS, tokens.tolist(), lengths.tolist(), uniform, strict=True):
        text = list(prompt)
        for u in us:
            text.append(int(sample(gpt(torch.tensor([text]))[:, -1], u[None], **how)))
            if text[-1] == eos:
                break
        assert got == text + [0] * (len(got) - len(text)) and n == len(text)


@pytest.mark.parametrize("how", slow_but(HOW, *HOW[:2], *HOW[-3:]), ids=str)
def test_fast_generation_draws_the_tokens_of_the_naive_one(tiny, kept, how):
    """Ragged prompts and a single row, with any padding, rows that end early, and 0, 1 or many new tokens;
    the generators are left in the same state. The naive one runs on plain layers."""
    plain = tiny(3)
    gpt = prepare(copy.deepcopy(plain))
    for prompts, new, fill in ((PROMPTS * 2, 24, 7), (PROMPTS, 1, 7), (PROMPTS, 0, 7), (PROMPTS[1:2], 24, 0),
                               (PROMPTS[:1], 1, 0), (PROMPTS[1:2], 0, 0)):
        one, other, batch = gen(new), gen(new), padded(prompts, fill)
        naive = plain.generate(*batch, new, generator=one, **how)
        assert equal(naive, generate(gpt, *batch, new, generator=other, **how))
        assert torch.equal(one.get_state(), other.get_state())
        assert naive[0].shape[1] == int(naive[1].max()) and (naive[1] <= batch[1] + new).all()
    assert "eos" in how or not kept


class GroupedAttention(model.Attention):
    """Grouped-query attention (Ainslie et al. 2023), as one would write it: two heads read each key."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.qkv = torch.nn.Linear(config.d_model, 2 * config.d_model, bias=config.bias)

    def forward(self, x, seen, look):
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 2 * self.n_head, C // self.n_head).transpose(1, 2)
        q, k, v = qkv.split([self.n_head, self.n_head // 2, self.n_head // 2], 1)
        k, v = seen.append(f"k{self.layer}", k), seen.append(f"v{self.layer}", v)
        y = model.attend(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), look)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class RunningMean(model.Attention):
    """The mean of all tokens so far: a state of one vector a row, however long the text."""

    def forward(self, x, seen, look):
        total, means = seen.read(f"mean{self.layer}"), []
        if total is None:
            total = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            total = total + x[:, t] * seen.real[:, t, None]
            means.append(total / (seen.positions[:, t, None] + 1))
        seen.write(f"mean{self.layer}", total)
        return self.proj(torch.stack(means, 1))


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("layer, shapes", [(GroupedAttention, [(2, 2, 9, 8), (2, 2, 9, 8)]),
                                           (RunningMean, [(2, 32)])])
def test_the_cache_takes_what_a_layer_gives_it(tiny, kept, monkeypatch, fixed, layer, shapes):
    """Fewer heads of keys, or a state: an edit of model.py alone."""
    monkeypatch.setattr(model, "Attention", layer)
    gpt = tiny(3, n_head=4)
    if all(p.requires_grad for p in gpt.parameters()):  # what LoRA trains, this layer does not use
        check_model(gpt)
    kept.clear()
    cache = Cache(2, 9, "cpu")
    gpt.trunk(torch.ones(2, 5, dtype=torch.long), cache)
    assert [x.shape for x in cache.buffers()][-len(shapes) :] == shapes  # of the last layer
    monkeypatch.setattr(lib.generate, "fixed_steps", lambda gpt: fixed)
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    naive, quick = (generate(gpt, *padded(PROMPTS), 20, eos=3, temperature=3.0, generator=gen(1))
                    for generate in (GPT.generate, lib.generate.generate))
    assert equal(naive, quick)
    assert len(set(naive[1].tolist())) > 3 and bool(kept) != fixed


def check_one_by_one(gpt, prompts, new, **how):
    """Batched generation = each prompt alone, drawing from one generator in turn; returns the rows."""
    tokens, lengths = padded(prompts)
    before = tokens.clone()
    out, n = generate(gpt, tokens, lengths, new, generator=gen(5), **how)
    assert torch.equal(tokens, before) and lengths.tolist() == [len(p) for p in prompts]  # inputs stay
    generator, rows = gen(5), []
    for i, prompt in enumerate(prompts):
        alone, m = generate(gpt, *padded([prompt]), new, generator=generator, **how)
        row = out[i, : n[i]].tolist()
        assert row == alone[0].tolist() and n[i] == m[0] == len(row)
        assert row[: len(prompt)] == prompt and (out[i, n[i] :] == 0).all()  # M11, and zeros beyond
        eos = how.get("eos")
        response = row[len(prompt) :]
        assert eos not in response[:-1]
        assert len(response) == new or response[-1] == eos
        rows.append(row)
    assert out.shape[1] == int(n.max())
    return rows


@slow
@torch.no_grad()
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_M6_greedy_batch_equals_one_by_one(ready, kept, seed):
    gpt = ready(seed)
    rows = check_one_by_one(gpt, PROMPTS, 20, temperature=0)
    for row, prompt in zip(rows, PROMPTS, strict=True):  # and equals the definition, without a cache
        logits = gpt(torch.tensor([row[:-1]]))[0, len(prompt) - 1 :]  # of the text before each new token
        assert row[len(prompt) :] == logits.argmax(-1).tolist()
    assert not kept
    responses = [row[len(prompt) :] for row, prompt in zip(rows, PROMPTS, strict=True)]
    ends = [len({r.index(v) for r in responses if v in r}) for v in range(17)]
    eos = ends.index(max(ends))  # the token that ends rows at the most places
    check_one_by_one(gpt, PROMPTS, 20, temperature=0, eos=eos)


@pytest.mark.parametrize("how", slow_but([{}, *HOW[2:]], HOW[-1]), ids=str)
def test_M7_sampled_batch_equals_one_by_one(ready, kept, how):
    rows = check_one_by_one(ready(3), PROMPTS * 2, 24, **how)
    if "eos" in how:  # rows were dropped while others went on
        assert kept and len({len(row) for row in rows}) > 1


@slow
@both
def test_by_default_the_model_itself_is_sampled(tiny, rng, generate):
    """generate, sample and logps at temperature 1 with no filter and no eos, to the last digit."""
    gpt, logits, uniform = tiny(), torch.randn(2000, 17, generator=rng), torch.rand(2000, generator=rng)
    batch = padded(PROMPTS * 20)
    default, plain = (generate(gpt, *batch, 20, generator=gen(1), **how)
                      for how in ({}, {"temperature": 1.0, "top_k": None, "top_p": None, "eos": None}))
    assert torch.equal(default[0], plain[0]) and (default[1] == batch[1] + 20).all()
    assert torch.equal(sample(logits, uniform), sample(logits, uniform, 1.0, None, None))
    h, targets = torch.randn(9, 32, generator=rng), random_tokens(rng, 9)
    assert torch.equal(gpt.logps(h, targets), gpt.logps(h, targets, 1.0))


def test_generate_stops_at_the_first_new_eos_only(tiny, monkeypatch):
    """An eos in the prompt ends nothing; the new one is counted, and what follows it is 0."""
    gpt = tiny()
    monkeypatch.setattr(gpt.lm_head, "forward",
                        lambda h: torch.nn.functional.one_hot(script.pop(0), 17) * 50.0)
    script = [torch.tensor([5, 6, 5]), torch.tensor([6, 5]), torch.tensor([2])]  # finished rows are dropped
    tokens, lengths = generate(gpt, *padded([[6, 6], [6], [1, 2]]), 3, eos=6)
    assert lengths.tolist() == [4, 2, 5]
    assert tokens.tolist() == [[6, 6, 5, 6, 0], [6, 6, 0, 0, 0], [1, 2, 5, 5, 2]]
    assert not script


def test_generate_stops_altogether_when_all_rows_have(tiny, monkeypatch):
    gpt = tiny()
    steps = []
    monkeypatch.setattr(gpt.lm_head, "forward", lambda h: steps.append(1) or torch.nn.functional.one_hot(
        torch.full((len(h),), 6), 17) * 50.0)
    tokens, lengths = generate(gpt, *padded([[1, 2], [3]]), 20, eos=6)
    assert len(steps) == 1 and tokens.tolist() == [[1, 2, 6], [3, 6, 0]] and lengths.tolist() == [3, 2]


@both
def test_M11_prompt_is_never_cropped(tiny, generate):
    gpt = tiny()
    with pytest.raises(ValueError, match="block_size 64"):
        generate(gpt, torch.zeros(1, 50, dtype=torch.long), torch.tensor([50]), 15)
    tokens, lengths = generate(gpt, torch.ones(2, 50, dtype=torch.long), torch.tensor([50, 3]), 14)
    assert tokens.shape == (2, 64) and lengths.tolist() == [64, 17]
    tokens, lengths = generate(gpt, *padded([[1, 2], [3]]), 0)
    assert tokens.tolist() == [[1, 2], [3, 0]] and lengths.tolist() == [2, 1]


@both
def test_generate_ignores_what_stands_in_the_pads(ready, generate):
    gpt = ready()
    for new in (1, 10):  # with 1 some of the padding is not written over
        zeros, sevens = (generate(gpt, *padded(PROMPTS, fill), new, temperature=0) for fill in (0, 7))
        assert equal(zeros, sevens)


@torch.no_grad()
def test_generate_reads_weights_as_they_are_now(ready, monkeypatch):
    monkeypatch.setattr(fast, "product", lambda: "onednn")  # where all weights are packed
    gpt, (tokens, lengths) = ready(), padded(PROMPTS)
    before = generate(gpt, tokens, lengths, 8, temperature=0)[0]
    gpt.trunk.blocks[0].attn.proj.weight.mul_(-3)
    after = generate(gpt, tokens, lengths, 8, temperature=0)[0]
    assert not torch.equal(before, after)
    check_one_by_one(gpt, PROMPTS, 8, temperature=0)
    assert all(getattr(layer, "packed", None) is None for layer in gpt.modules())


@pytest.mark.parametrize("how", [{}, {"temperature": 0}, {"eos": 4, "temperature": 3.0}], ids=str)
def test_fixed_steps_change_nothing_whatever_the_memory_held(ready, kept, monkeypatch, how):
    """As --compile takes them on a GPU; no row is dropped then. A call meets what the last one left."""
    gpt = ready(3)

    def draw():
        return generate(gpt, *padded(PROMPTS), 20, generator=gen(5), **how)

    want = draw()
    kept.clear()
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    monkeypatch.setattr(lib.generate, "fixed_steps", lambda gpt: True)
    for _ in range(2):
        assert equal(draw(), want)
        with torch.inference_mode():
            for x in gpt.cache.buffers():
                x.fill_(math.nan if x.is_floating_point() else 1)
    assert not kept


@slow
def test_fixed_steps_are_one_graph_at_one_address(tiny, monkeypatch):
    """What a CUDA graph needs: one trace for all steps, of prompts of any length, and buffers that stay."""
    torch._dynamo.reset()
    gpt, graphs, compile, places = tiny(), [], torch.compile, []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    def counted(function, mode, dynamic):
        assert (mode, dynamic) == ("reduce-overhead", False)
        return compile(function, backend=keep, dynamic=dynamic, fullgraph=True)

    monkeypatch.setattr(torch, "compile", counted)
    monkeypatch.setattr(lib.generate, "fixed_steps", lambda gpt: True)
    for prompts, new, count in ((PROMPTS, 20, 1), (PROMPTS[::-1], 9, 1), ([[1]] * 8, 25, 1),
                                ([[1, 2]] * 3, 5, 2)):
        generate(gpt, *padded(prompts), new)
        assert len(graphs) == count
        places.append([x.data_ptr() for x in gpt.cache.buffers()])
    assert places[0] == places[1] == places[2] and (len(gpt.cache.length), gpt.cache.S) == (3, 128)
    long = tiny(block_size=200)
    for P, S in ((140, 256), (3, 256), (120, 256)):  # it only grows: each size is compiled
        generate(long, *padded([[1] * P]), 5)
        assert long.cache.S == S
    assert list(gpt.state_dict()) == list(tiny().state_dict())  # nothing of it gets into a checkpoint


def test_fixed_steps_are_for_compile_on_a_gpu(tiny, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    for compile, is_cuda in itertools.product((False, True), repeat=2):
        gpt = prepare(tiny(), cfg=Config(compile=compile))
        del gpt.lm_head
        gpt.lm_head = SimpleNamespace(weight=SimpleNamespace(is_cuda=is_cuda))
        assert fast.fixed_steps(gpt) == (compile and is_cuda)


# ---- cache ----

@torch.no_grad()
@pytest.mark.parametrize("chunks", [[1] * 10, [4, 1, 5], [2, 3, 1, 1, 3]])
def test_M8_cache_equals_full_forward_at_every_position(tiny, rng, chunks):
    """Ragged rows, continued token by token or several at once on a cache that is not empty."""
    gpt = tiny()
    tokens, lengths = padded(PROMPTS, fill=15)
    P, B = tokens.shape[1], len(PROMPTS)
    more = random_tokens(rng, B, sum(chunks))
    want = [gpt.trunk(torch.cat([tokens[i, :n], more[i]])[None])[0, n:] for i, n in enumerate(lengths)]
    cache = Cache(B, P + sum(chunks), "cpu")
    cache.expect(lengths)
    real = torch.arange(P) < lengths[:, None]
    torch.testing.assert_close(gpt.trunk(tokens, cache)[real], gpt.trunk(tokens)[real], atol=1e-4, rtol=0)
    got = torch.cat([gpt.trunk(part, cache) for part in more.split(chunks, 1)], 1)
    torch.testing.assert_close(got, torch.stack(want), atol=1e-4, rtol=0)
    assert cache.length.tolist() == [n + sum(chunks) for n in lengths]


@torch.no_grad()
def test_cache_keep_forgets_only_the_other_rows(tiny, rng):
    gpt, tokens, more = tiny(), random_tokens(rng, 4, 6), random_tokens(rng, 4, 3)
    cache = Cache(4, 9, "cpu")
    gpt.trunk(tokens, cache)
    rows = torch.tensor([False, True, False, True])
    cache.keep(rows)
    want = gpt.trunk(torch.cat([tokens, more], 1)[rows])[:, 6:]
    torch.testing.assert_close(gpt.trunk(more[rows], cache), want, atol=1e-4, rtol=0)


# ---- lib/fast.py: prepare ----

ALL = Config(bf16=True, checkpoint_activations=True)


@pytest.mark.parametrize("cfg", [None, Config(), ALL])
def test_prepare_keeps_parameters_names_ties_optimizer_and_frozen_parts(tiny, cfg):
    gpt = tiny().train()
    gpt.trunk.blocks[0].requires_grad_(False)
    optimizer = torch.optim.SGD(gpt.parameters(), lr=1.0)

    def look():
        return [(name, id(p), p.requires_grad) for name, p in gpt.named_parameters(remove_duplicate=False)]

    before, names = look(), list(gpt.state_dict())
    assert prepare(gpt, "cpu", cfg) is gpt
    assert look() == before and list(gpt.state_dict()) == names and gpt.training
    assert {type(layer) for layer in gpt.modules() if isinstance(layer, torch.nn.Linear)} == {fast.Linear}
    old = copy.deepcopy(gpt.state_dict())
    gpt(torch.tensor([[1, 2, 3]])).logsumexp(-1).sum().backward()
    optimizer.step()
    same = {name: torch.equal(old[name], x) for name, x in gpt.state_dict().items()}
    frozen, other = ([x for name, x in same.items() if f".blocks.{i}." in name] for i in (0, 1))
    assert all(frozen) and not any(p.grad is not None for p in gpt.trunk.blocks[0].parameters())
    assert not all(other)


def test_prepare_leaves_the_reward_head_and_layers_of_the_users(tiny, rng):
    class Mine(torch.nn.Linear):
        pass

    rm, tokens = RewardModel.from_gpt(tiny()), random_tokens(rng, 2, 9)
    rm.trunk.blocks[1].attn.proj.__class__ = Mine
    want = rm(tokens)
    prepare(rm, "cpu", Config())
    assert type(rm.reward_head) is torch.nn.Linear and type(rm.trunk.blocks[1].attn.proj) is Mine
    assert type(rm.trunk.blocks[0].attn.proj) is fast.Linear
    torch.testing.assert_close(rm(tokens), want, atol=1e-5, rtol=0)


def test_prepare_moves_the_model(tiny):
    gpt = prepare(tiny(), torch.device("meta"), Config())
    assert all(p.device.type == "meta" for p in gpt.parameters())


def test_preparing_a_prepared_model_or_its_copy_wraps_no_block_twice(tiny, rng):
    gpt, tokens = prepare(tiny(), cfg=ALL), random_tokens(rng, 2, 9)
    for again in (prepare(copy.deepcopy(gpt), cfg=ALL), prepare(gpt, cfg=ALL), copy.deepcopy(gpt),
                  prepare(RewardModel.from_gpt(gpt), cfg=ALL)):
        for block in again.trunk.blocks:
            assert isinstance(block, model.Block) and type(block).__mro__.count(fast.Tuned) == 1
            assert type(block).__name__ == "TunedBlock" and block.bf16 and block.recompute
        assert torch.equal(again.trunk(tokens), gpt.trunk(tokens))


def test_recompute_gives_the_same_gradients_and_keeps_less(tiny):
    tokens, kept = torch.randint(17, (3, 9)), {}
    grads = {}
    for recompute in (False, True):
        gpt, numbers = prepare(tiny(), cfg=Config(checkpoint_activations=recompute)), []

        def count(x, numbers=numbers):
            numbers.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            loss = gpt(tokens).logsumexp(-1).sum()
        loss.backward()
        kept[recompute], grads[recompute] = sum(numbers), gradients(gpt)
    assert kept[True] < kept[False] / 2
    close_gradients(grads[True], grads[False])


def test_recompute_draws_the_same_dropout_again(tiny):
    """Gradients with dropout are those of the run that keeps all activations, for the same random numbers."""
    tokens, grads = torch.randint(17, (3, 9)), []
    for recompute in (False, True):
        gpt = prepare(tiny(dropout=0.3).train(), cfg=Config(checkpoint_activations=recompute))
        torch.manual_seed(1)
        gpt(tokens).logsumexp(-1).sum().backward()
        grads.append(gradients(gpt))
    close_gradients(*grads)


def test_bf16_is_in_the_blocks_only(tiny):
    gpt, tokens = tiny(), torch.randint(17, (3, 9))
    plain = gpt.trunk(tokens)
    prepare(gpt, cfg=Config(bf16=True))
    h = gpt.trunk(tokens)
    assert h.dtype == gpt(tokens).dtype == torch.float32
    assert not torch.equal(h, plain)
    torch.testing.assert_close(h, plain, atol=0.1, rtol=0.05)


def test_generation_is_in_float32_and_keeps_nothing_whatever_the_flags(ready, tiny):
    want = generate(ready(3), *padded(PROMPTS), 20, generator=gen(1))
    gpt = prepare(tiny(3), cfg=ALL)
    assert equal(want, generate(gpt, *padded(PROMPTS), 20, generator=gen(1)))
    cached = [net.trunk(padded(PROMPTS)[0], Cache(len(PROMPTS), 7, "cpu")) for net in (ready(3), gpt)]
    assert torch.equal(*cached)


# ---- lib/fast.py: matrix products ----

needs_onednn = pytest.mark.skipif(not fast.ONEDNN, reason="this PyTorch has no oneDNN")
both_products = pytest.mark.parametrize("product", ["mkl", "onednn"])


def with_gradients(layer, x, dy):
    """The layer's output, and the gradients of x, weight and bias."""
    x = x.clone().requires_grad_()
    y = layer(x)
    return y, *torch.autograd.grad(y, [x, *layer.parameters()], dy)


@pytest.mark.parametrize("shape, out", [((3, 7, 24), 40), ((3, 7, 40), 24), ((200, 128), 512), ((1, 16), 8),
                                        ((0, 16), 8), ((2, 0, 16), 8), ((16,), 8)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("turned", [True, False])
@both_products
def test_linear_is_nn_linear_with_its_gradients(rng, monkeypatch, shape, out, bias, turned, product):
    monkeypatch.setattr(fast, "product", lambda: product)
    layer, plain = fast.Linear(shape[-1], out, bias=bias), torch.nn.Linear(shape[-1], out, bias=bias)
    plain.load_state_dict(layer.state_dict())
    x, dy = torch.randn(shape, generator=rng), torch.randn(*shape[:-1], out, generator=rng)
    if turned and x.dim() > 1:  # not contiguous in memory
        x, dy = x.mT.contiguous().mT, dy.mT.contiguous().mT
    for ours, theirs in zip(with_gradients(layer, x, dy), with_gradients(plain, x, dy), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


CPUINFO = "processor\t: 0\nvendor_id\t: {}\ncpu family\t: {}\nmodel\t\t: 26\nmodel name\t: caf\xe9\n"


@pytest.fixture
def cpu(monkeypatch, tmp_path):
    """A function by which this CPU gets another /proc/cpuinfo (None: there is none) or platform.processor."""
    def become(cpuinfo, processor="", asked=None):
        if cpuinfo is not None:
            (tmp_path / "cpuinfo").write_bytes(cpuinfo.encode("latin-1"))
        monkeypatch.setattr(fast, "Path", lambda path: tmp_path / path.removeprefix("/proc/"))
        monkeypatch.setattr(fast.platform, "processor", lambda: processor)
        monkeypatch.setattr(fast, "ONEDNN", True)
        monkeypatch.delenv("ONETRUNK_PRODUCT", raising=False)
        if asked is not None:
            monkeypatch.setenv("ONETRUNK_PRODUCT", asked)
        fast.product.cache_clear()

    yield become
    fast.product.cache_clear()


@pytest.mark.parametrize("cpuinfo, processor, family", [
    (CPUINFO.format("AuthenticAMD", 25), "", 25), (CPUINFO.format("AuthenticAMD", 26), "", 26),
    (CPUINFO.format("AuthenticAMD", 127), "", 127), (CPUINFO.format("GenuineIntel", 26), "", 0),
    ("vendor_id\t: AuthenticAMD\n", "", 0), ("vendor_id : AuthenticAMD\ncpu family : unknown\n", "", 0),
    ("", "AMD64 Family 26 Model 2 Stepping 1, AuthenticAMD", 0), ("CPU implementer\t: 0x41\n", "arm", 0),
    (None, "AMD64 Family 26 Model 2 Stepping 1, AuthenticAMD", 26), (None, "arm", 0), (None, "", 0),
    (None, "Intel64 Family 26 Model 85 Stepping 7, GenuineIntel", 0)])
def test_which_amd_cpu_this_is(cpu, cpuinfo, processor, family):
    cpu(cpuinfo, processor)
    assert fast.amd_family() == family
    assert fast.product() == ("onednn" if family >= 26 else "mkl")


@pytest.mark.parametrize("family", [25, 26])
@pytest.mark.parametrize("asked", ["mkl", "onednn", ""])
def test_one_variable_forces_the_product(cpu, family, asked):
    cpu(CPUINFO.format("AuthenticAMD", family), asked=asked)
    assert fast.product() == (asked or {25: "mkl", 26: "onednn"}[family])


@pytest.mark.parametrize("asked", ["MKL", "onednn ", "1"])
def test_an_unknown_product_is_one_sentence_before_anything_is_prepared(cpu, tiny, asked):
    cpu(None, asked=asked)
    with pytest.raises(UserError, match=f"^ONETRUNK_PRODUCT={asked}: expected mkl or onednn$"):
        prepare(tiny())


def test_without_onednn_it_is_not_chosen_and_can_not_be_forced(cpu, monkeypatch, tiny):
    cpu(CPUINFO.format("AuthenticAMD", 26))
    monkeypatch.setattr(fast, "ONEDNN", False)
    assert fast.product() == "mkl"
    cpu(CPUINFO.format("AuthenticAMD", 26), asked="onednn")
    monkeypatch.setattr(fast, "ONEDNN", False)
    with pytest.raises(UserError, match="^ONETRUNK_PRODUCT=onednn: this PyTorch has no oneDNN"):
        prepare(tiny())


@needs_onednn
def test_linear_takes_onednn_where_it_can_and_pytorch_elsewhere(monkeypatch):
    layer, x, sizes, real = fast.Linear(8, 4), torch.randn(3, 8), [], fast.onednn
    monkeypatch.setattr(fast, "onednn", lambda x, *more: sizes.append(len(x)) or real(x, *more))
    monkeypatch.setattr(fast, "product", lambda: "mkl")
    assert layer(x).shape == (3, 4) and not sizes
    monkeypatch.setattr(fast, "product", lambda: "onednn")
    for N in (1, 3, 127, 128, 129):
        assert layer(torch.randn(N, 8)).shape == (N, 4)
    assert sizes == [128, 128, 128, 128, 256]  # few sizes: a kernel is cached for each of them
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert copy.deepcopy(layer).double()(x.double()).dtype == torch.float64
    monkeypatch.setattr(fast, "ONEDNN", False)
    with fast.packed(layer, 3):
        assert layer.packed is None and layer(x).shape == (3, 4)
    assert len(sizes) == 5


@torch.no_grad()
@both_products
def test_without_onednn_a_prepared_model_is_one_of_nn_linear(tiny, monkeypatch, product):
    """Where torch lacks the private operators: the same bits, trained or generated."""
    monkeypatch.setattr(fast, "ONEDNN", False)
    monkeypatch.setattr(fast, "product", lambda: product)
    monkeypatch.setattr(fast, "onednn", None)
    plain = tiny(vocab_size=4097)
    gpt = prepare(copy.deepcopy(plain), "cpu", Config())
    (tokens, lengths), new = padded(PROMPTS), 9
    assert torch.equal(gpt(tokens), plain(tokens))
    assert equal(*(generate(net, tokens, lengths, new, generator=gen(1)) for net in (plain, gpt)))


def test_generate_packs_for_its_number_of_rows(ready, monkeypatch):
    asked = []
    monkeypatch.setattr(lib.generate, "packed", lambda gpt, rows: asked.append(rows) or nullcontext())
    generate(ready(), *padded(PROMPTS), 2)
    assert asked == [len(PROMPTS)]


@needs_onednn
@torch.no_grad()
@pytest.mark.parametrize("product, rows, V, packs", [
    ("onednn", 1, 4097, "all"), ("mkl", 32, 4097, "head"), ("mkl", 31, 4097, "none"),
    ("mkl", 32, 4096, "none")])
def test_packed_changes_nothing_and_ends(ready, rng, monkeypatch, product, rows, V, packs):
    """With mkl, matrices of more than 2^17 numbers, and of 2^22 in all rows: here the head has 32 x V."""
    monkeypatch.setattr(fast, "product", lambda: product)
    gpt, tokens = ready(vocab_size=V), random_tokens(rng, 5, 12)
    expected = gpt(tokens)
    with pytest.raises(KeyboardInterrupt), fast.packed(gpt, rows):
        layers = [layer for layer in gpt.modules() if isinstance(layer, fast.Linear)]
        assert len(layers) > 4 and gpt.lm_head in layers
        assert all((layer.packed is not None) == (packs == "all" or packs == "head" and layer is gpt.lm_head)
                   for layer in layers)
        torch.testing.assert_close(gpt(tokens), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(gpt(tokens[:1, :1]), expected[:1, :1], atol=1e-5, rtol=0)
        raise KeyboardInterrupt
    gpt.lm_head.weight.mul_(2)  # the copies are gone: the weights themselves are read again
    assert not torch.isclose(gpt(tokens), expected).all()
