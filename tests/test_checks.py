"""What a run says before it starts, and when it goes wrong: self-checks of model.py, NaN, PPO's warnings."""
import copy
import math
import os
import time
import types
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from helpers import CPU, PPO, SIZES, gpt_config, make_data

import lib.checkpoint
import lib.checks_rm
import lib.generate
import model
import ppo
import train_rm
import train_sft
from data.files import UserError
from lib import report
from lib.checks import check_model
from lib.checks_rm import check_scores, check_start
from lib.common import Log, finite
from lib.fast import prepare
from lib.report import warnings
from lib.rewards import Models
from model import GPT, RewardModel


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checks")
    make_data(folder / "data")
    where = {"data": str(folder / "data"), "out": str(folder / "out"), "device": "cpu"}
    train_sft.main(train_sft.Config(**where | SIZES, epochs=0.5))
    train_rm.main(train_rm.Config(**where, batch_tokens=512, epochs=0.5))
    return where


PHASES = ppo.rollout, ppo.assess, ppo.advantages, ppo.minibatch_backward


def hack(monkeypatch, owner, name, change):
    """Change a method; that a checkpoint was saved by another one, which loading notices, is left aside."""
    shipped = getattr(owner, name)
    monkeypatch.setattr(lib.checkpoint, "check_same", lambda *args: None)
    monkeypatch.setattr(owner, name, lambda self, *args, **kwargs: change(shipped, self, *args, **kwargs))


def looks_ahead(forward, self, x, *rest):
    return forward(self, x, *rest) + 0.1 * x.mean(1, keepdim=True)


def sees_the_batch(forward, self, x):
    return forward(self, x) + 0.1 * x.mean(0, keepdim=True)


def sees_the_batch_in_training(forward, self, x):
    return forward(self, x) + 0.1 * x.mean(0, keepdim=True) * self.training


def depends_on_the_length(forward, self, x, seen, look):
    return forward(self, x, seen, look) * (1.0 if look is not None else 1 + x.shape[1] / 1000)


def forgets_positions(advance, self, T):
    advance(self, T).positions *= 0
    return self


def one_off(advance, self, T):
    cache = advance(self, T)
    if not self.whole:
        self.positions = (self.positions - 1).clamp(min=0)
    return cache


def always_drops(forward, self, x):
    return torch.dropout(forward(self, x), 0.5, True)


def carries_over(forward, self, x):
    self.calls = getattr(self, "calls", 0) + 1
    return forward(self, x) * (1 + self.calls / 100)


def wears_out(forward, self, x):
    self.up.weight.data *= 1.01
    return forward(self, x)


def in_place(forward, self, tokens, *rest):
    if tokens.is_floating_point():
        tokens += 0.01
    return forward(self, tokens, *rest)


def rounds(forward, self, x):
    return forward(self, x.bfloat16().float())


def detaches(forward, self, x):
    return forward(self, x.detach())


def caps(forward, self, tokens):
    return 2 * torch.tanh(forward(self, tokens) / 2)


def not_finite(forward, self, x):
    return forward(self, x).masked_fill(x > 0.5, torch.nan)


def other_steps(forward, self, x, seen, look):
    return forward(self, x, seen, look) * (1 if seen.whole or x.shape[1] > 1 else 1.01)


def limits_its_weights(forward, self, x):
    with torch.no_grad():
        self.up.weight.renorm_(2, 0, 30.0)
    return forward(self, x)


def stays_in_eval_mode(forward, self, x):
    self.eval()
    return forward(self, x)


def counts_calls_in_training(forward, self, x):
    self.calls = getattr(self, "calls", 0) + self.training
    return forward(self, x) * (1 + self.calls / 100)


def more_with_gradients(forward, self, x):
    return forward(self, x) * (1.01 if torch.is_grad_enabled() else 1)


def looks_ahead_in_pairs(forward, self, x, *rest):
    return looks_ahead(forward, self, x, *rest) if x.shape[1] == 2 else forward(self, x, *rest)


def frozen_as_it_was(forward, self, x):
    self.first = getattr(self, "first", None) or [self.up.weight.detach().clone()]
    return F.linear(x, self.first[0]) @ self.proj.weight.T


def through_data(forward, self, x):
    return self.proj(F.gelu(F.linear(x, self.up.weight.data, self.up.bias)))


def keeps_the_last_token(forward, self, x, seen, look):
    before = torch.zeros_like(x[:, :1]) if seen.whole else self.last
    self.last = x.gather(1, (seen.real.sum(1) - 1).expand(len(x))[:, None, None].expand(-1, 1, x.shape[2]))
    return forward(self, x, seen, look) + torch.cat([before, x[:, :-1]], 1)


def takes_in_padding(forward, self, x, seen, look):
    before = torch.zeros_like(x[:, :1]) if seen.whole else seen.read(f"last{self.layer}")
    before = torch.cat([before, x[:, :-1]], 1)
    seen.write(f"last{self.layer}", x[:, -1:])
    return forward(self, x, seen, look) + before


def fails_with_a_cache(forward, self, x, seen, look):
    return forward(self, x, seen, look if seen.whole else look[..., 1:])


CHANGES = [
    (model.Attention, "forward", looks_ahead, "not causal"),
    (model.MLP, "forward", sees_the_batch, "rows of a batch see each other"),
    (model.MLP, "forward", sees_the_batch_in_training, "in training mode"),
    (model.Block, "forward", depends_on_the_length, "changes with the padding after it"),
    (lib.generate.Cache, "advance", forgets_positions, "KV cache"),
    (lib.generate.Cache, "advance", one_off, "read one by one, what the KV cache"),
    (model.Attention, "forward", other_steps, "read one by one, what the KV cache"),
    (model.MLP, "forward", always_drops, "the same text twice gives two results"),
    (model.MLP, "forward", carries_over, "the same text twice gives two results"),
    (model.MLP, "forward", wears_out, "a forward pass changes weights"),
    (model.MLP, "forward", limits_its_weights, "a forward pass changes weights"),
    (model.MLP, "forward", stays_in_eval_mode, "in training mode puts layers into eval mode"),
    (model.MLP, "forward", counts_calls_in_training, "in training mode the same text twice gives two"),
    (model.MLP, "forward", more_with_gradients, "others where gradients are needed"),
    (model.Attention, "forward", looks_ahead_in_pairs, "not causal"),
    (model.MLP, "forward", frozen_as_it_was, "what a call made of them is kept"),
    (model.MLP, "forward", through_data, "something is detached"),
    (model.Attention, "forward", keeps_the_last_token, "read in turn.*keeps in itself what belongs in"),
    (model.Attention, "forward", takes_in_padding, "only behind padding"),
    (model.Attention, "forward", fails_with_a_cache, "read one by one, model.py fails with the KV cache"),
    (GPT, "logits", lambda logits, self, h: logits(self, h).bfloat16().float(), "rounded to bfloat16"),
    (GPT, "logps", lambda logps, self, h, targets, temperature: logps(self, h, targets),
     "GPT.logps does not"),
    (model.RewardModel, "__init__", lambda make, self, trunk, pool="last": make(
        self, trunk.requires_grad_() and type(trunk)(trunk.config), pool), "from_gpt changes the trunk"),
    (model.Trunk, "forward", in_place, "the tensor that it is given in place"),
    (model.MLP, "forward", rounds, "rounded to bfloat16"),
    (model.MLP, "forward", detaches, "something is detached"),
    (model.MLP, "forward", not_finite, "not finite"),
    (GPT, "forward", caps, "only GPT.logits"),
    (GPT, "generate", lambda generate, self, tokens, *args, **how: generate(self, tokens * 0, *args, **how),
     "lib.generate draws other tokens")]


@pytest.mark.parametrize("owner, name, change, why", CHANGES, ids=[change[3] for change in CHANGES])
def test_each_mistake_has_its_sentence(tiny, monkeypatch, owner, name, change, why):
    hack(monkeypatch, owner, name, change)
    with pytest.raises(UserError, match=f"self-check: .*{why}"):
        check_model(tiny(block_size=96))


def test_what_is_neutral_at_the_start_shows_with_noise(tiny, monkeypatch):
    """A gain that is learned, and used where there is no cache."""
    make, forward = model.Attention.__init__, model.Attention.forward

    def init(self, config, layer):
        make(self, config, layer)
        self.gain = torch.nn.Parameter(torch.ones(1))

    monkeypatch.setattr(model.Attention, "__init__", init)
    hack(monkeypatch, model.Attention, "forward", lambda forward, self, x, seen, look: forward(
        self, x, seen, look) * (self.gain if type(seen) is model.WholeText else 1))
    with pytest.raises(UserError, match="self-check: when a prompt is read, what the KV cache gives"):
        check_model(GPT(model.GPTConfig(vocab_size=17, block_size=96, n_layer=2, n_head=2, d_model=32)))
    monkeypatch.setattr(model.Attention, "forward", forward)
    check_model(GPT(model.GPTConfig(vocab_size=17, block_size=96, n_layer=2, n_head=2, d_model=32)))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_bias_on_distances_has_the_right_sign(monkeypatch, sign):
    """ALiBi (Press et al. 2022); the other sign looks at the beginning of the text."""
    def attend(q, k, v, look, dropout=0.0):
        T, S, H = q.shape[2], k.shape[2], q.shape[1]
        slopes = 2 ** (-8 / H * torch.arange(1, H + 1))[:, None, None]
        weights = q @ k.transpose(2, 3) / math.sqrt(q.shape[3]) + sign * slopes * torch.arange(S)
        look = torch.ones(T, S, dtype=torch.bool).tril() if look is None else look
        return torch.where(look, weights, -torch.inf).softmax(-1) @ v

    monkeypatch.setattr(model, "attend", attend)
    gpt = GPT(model.GPTConfig(vocab_size=17, block_size=96, n_layer=2, n_head=4, d_model=32))
    with nullcontext() if sign > 0 else pytest.raises(UserError, match="wrong sign"):
        check_model(gpt)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dropout_that_eval_mode_leaves_on_shows_at_any_rate(monkeypatch, dropout):
    hack(monkeypatch, model.Block, "forward", lambda forward, self, *args: torch.dropout(
        forward(self, *args), self.drop.p, True))
    with pytest.raises(UserError, match="something random"):
        check_model(GPT(gpt_config(17, 96, 2, 2, 32, dropout)))


def only_a_part_without_use(init, self, config):
    init(self, config)
    self.requires_grad_(False).adapter = torch.nn.Parameter(torch.ones(3))


def test_what_is_trained_must_reach_the_logits(tiny, monkeypatch):
    check_model(tiny().requires_grad_(False))
    hack(monkeypatch, model.Trunk, "__init__", only_a_part_without_use)
    with pytest.raises(UserError, match="do not depend on any weight that is trained"):
        check_model(tiny())


def test_the_checks_leave_the_model_as_it_was(tiny):
    gpt = tiny(dropout=0.2).train()
    before, rng = copy.deepcopy(gpt.state_dict()), torch.get_rng_state()
    check_model(gpt)
    assert gpt.training and torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(before[name], x) for name, x in gpt.state_dict().items())
    assert all(p.grad is None for p in gpt.parameters())


@pytest.mark.parametrize("script, out", [(train_sft, "new"), (train_rm, ""), (ppo, "")])
def test_no_script_starts_with_a_broken_model(made, monkeypatch, tmp_path, script, out):
    hack(monkeypatch, model.Attention, "forward", looks_ahead)
    config = made | ({"out": str(tmp_path)} | SIZES if out else PPO if script is ppo else {})
    files = sorted(os.listdir(config["out"]))
    with pytest.raises(UserError, match="self-check: .*not causal"):
        script.main(script.Config(**config))
    assert sorted(os.listdir(config["out"])) == sorted({*files, ".lock"})


def test_sft_trains_in_train_mode_after_its_self_check(made, monkeypatch, tmp_path):
    modes = []
    monkeypatch.setattr(train_sft, "clip_and_step", lambda gpt, *rest: modes.append(gpt.training)
                        or {"loss": 0.0, "grad_norm": 0.0})
    train_sft.main(train_sft.Config(**made | SIZES | {"out": str(tmp_path)}, epochs=0.5))
    assert modes and all(modes)


@pytest.mark.parametrize("pool", RewardModel.POOLS)
@pytest.mark.parametrize("owner, name, change, why", [
    (model.MLP, "forward", sees_the_batch, "a text's score changes with its padding"),
    (RewardModel, "score", lambda score, self, tokens, n: score(self, tokens, n * 0 + tokens.shape[1] - 1),
     "a text's score changes with its padding"),
    (RewardModel, "forward",
     lambda forward, self, tokens: forward(self, tokens) + self.trunk.wte(tokens).sum(-1),
     "the reward head reads something else"),
    (RewardModel, "score", lambda score, self, tokens, n: score(self, tokens, (n - 1).clamp(min=1)),
     "does not depend on the text's last token"),
    (RewardModel, "_head", lambda head, self, h: head(self, h).roll(1, -1) if h.dim() > 2 else head(self, h),
     "does not depend on the text's last token|later token, or not on its own"),
    (RewardModel, "forward", lambda forward, self, tokens: forward(self.eval(), tokens), "into eval mode"),
    (model.MLP, "forward", always_drops, "another one when asked for again")],
    ids=["rows", "length", "embedding", "early", "shifted", "eval", "random"])
def test_scores_are_checked(tiny, monkeypatch, pool, owner, name, change, why):
    rm = RewardModel.from_gpt(tiny(), pool).eval()
    check_scores(rm)
    hack(monkeypatch, owner, name, change)
    with pytest.raises(UserError, match=f"self-check: .*{why}"):
        check_scores(rm)


def noisy(logps, self, h, targets, temperature):
    return logps(self, h, targets, temperature) + torch.randn(len(h)) / 100 * (temperature == 1)


def other_with_gradients(logps, self, h, targets, **how):
    return logps(self, h, targets, **how) * (1.1 if torch.is_grad_enabled() else 1.0)


@pytest.mark.parametrize("change, why", [(noisy, "the KL to the reference is not 0"),
                                         (other_with_gradients, "the ratio is not 1")])
def test_ppo_does_not_start_with_a_broken_model(made, monkeypatch, change, why):
    hack(monkeypatch, GPT, "logps", change)
    with pytest.raises(UserError, match=f"self-check: {why}"):
        ppo.main(ppo.Config(**made | PPO))


def toy_models(gpt, critic):
    """For check_start, which scores nothing: the reference is the policy itself."""
    return Models(gpt, gpt, critic, None, None, types.SimpleNamespace(eos=0))


@pytest.mark.parametrize("how, limit", [({}, 1e-5), ({"bf16": True}, 1e-2), ({"compile": True}, 1e-2)])
def test_how_near_to_1_the_ratio_must_be_before_ppo_starts(monkeypatch, how, limit):
    """To the limit, in both directions; where the mean ratio is 1 the KL, a sixth of the offset's square,
    must be below that of the limit."""
    def shifted(logps, self, h, targets, **how):
        offset = limit * (by.mean + by.spread * torch.linspace(-1, 1, len(targets)))
        return logps(self, h, targets, **how) + (offset if torch.is_grad_enabled() else 0)

    hack(monkeypatch, GPT, "logps", shifted)
    monkeypatch.setattr(lib.checks_rm, "check_model", lambda gpt: None)
    gpt = GPT(gpt_config(11, 16, 1, 2, 16)).eval()
    cfg, models = ppo.Config(max_new_tokens=8, **how), toy_models(gpt, RewardModel.from_gpt(gpt))
    by = types.SimpleNamespace()
    for by.mean, by.spread, sound in ((.95, 0, True), (-.95, 0, True), (1.05, 0, False), (-1.05, 0, False),
                                      (0, 2.2, True), (0, 2.7, False)):
        with nullcontext() if sound else pytest.raises(UserError, match="the ratio is not 1"):
            check_start(PHASES, models, [[1, 2]] * 8, cfg, CPU)
    assert all(p.grad is None for p in gpt.parameters())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("block_size", [2, *(pytest.param(T, marks=pytest.mark.slow) for T in (3, 5, 40))])
def test_sound_models_pass_whatever_their_size(dropout, block_size):
    """Plain layers, or those of this CPU."""
    gpt = GPT(gpt_config(11, block_size, 2, 2, 16, dropout))
    for _ in range(2):
        check_model(gpt)
        prepare(gpt)
    for pool in RewardModel.POOLS:
        check_scores(RewardModel.from_gpt(gpt, pool).eval())


def test_the_checks_take_under_two_seconds_at_the_size_of_the_stories():
    gpt, seconds = GPT(gpt_config(1024, 128, 4, 4, 128)).train(), []
    rm = RewardModel.from_gpt(gpt).eval()
    ref = GPT(gpt.config)
    ref.load_state_dict(gpt.state_dict())
    models = toy_models(gpt.eval(), rm)._replace(ref=ref.eval())
    for _ in range(4):  # of which other work on the machine slows some
        start = time.process_time()
        check_start(PHASES, models, [[1, 2, 3]] * 20, ppo.Config(max_new_tokens=100), CPU)
        seconds.append(time.process_time() - start)
        if seconds[-1] < 2:
            break
    assert min(seconds) < 2
    assert all(p.grad is None for p in [*gpt.parameters(), *rm.parameters()])


def test_checking_scores_leaves_mode_and_random_numbers_as_they_were():
    """Though dropout draws some in it."""
    rm, rng = RewardModel.from_gpt(GPT(gpt_config(64, 32, 2, 2, 16, dropout=0.3))), torch.get_rng_state()
    check_scores(rm)
    assert torch.equal(torch.get_rng_state(), rng)


# ---- NaN ----

def test_finite_names_all_that_is_not():
    finite("step 3", loss=1.0, kl=torch.ones(2))
    with pytest.raises(UserError, match="step 3: non-finite kl, score; earlier checkpoints are intact"):
        finite("step 3", loss=1.0, kl=torch.tensor([0.0, math.nan]), score=math.inf)


@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_a_loss_that_is_not_finite_stops_at_its_step_and_the_state_before_is_kept(made, monkeypatch,
                                                                                  tmp_path, stage):
    script, name = (train_sft, "sft_loss") if stage == "sft" else (train_rm, "ranking_loss")
    shipped, calls = getattr(script, name), []

    def loss(*args):
        calls.append(1)
        x, second = shipped(*args)
        return x * (math.nan if len(calls) == 6 else 1), second
    monkeypatch.setattr(script, name, loss)
    (tmp_path / "sft.pt").write_bytes(open(made["out"] + "/sft.pt", "rb").read())
    config = made | {"out": str(tmp_path), "batch_tokens": 64, "save_every": 5}
    with pytest.raises(UserError, match="step 6: non-finite loss"):
        script.main(script.Config(**(SIZES if stage == "sft" else {}) | config))
    assert torch.load(tmp_path / f"{stage}.state.pt", weights_only=True)["step"] == 5
    assert not (tmp_path / "rm.pt").exists()


@pytest.mark.parametrize("name, where", [("value_loss", "update 2: non-finite value_loss"),
                                         ("policy_loss", "step 2: non-finite gradient"),
                                         ("token_logps", "update 2: non-finite logp, ref_logp"),
                                         ("sft_loss", "update 2, ptx: non-finite loss")])
def test_ppo_names_what_is_not_finite(made, monkeypatch, name, where):
    owner = train_sft if name == "sft_loss" else ppo
    shipped, logged = getattr(owner, name), []
    hack(monkeypatch, Log, "__call__",
         lambda log, self, *args, **kwargs: logged.append(1) or log(self, *args, **kwargs))

    def spoil(*args):
        x = shipped(*args)
        factor = math.nan if logged else 1.0
        return (x[0] * factor, *x[1:]) if isinstance(x, tuple) else x * factor
    monkeypatch.setattr(owner, name, spoil)
    with pytest.raises(UserError, match=where):
        ppo.main(ppo.Config(**made | PPO, ptx_coef=0.1))


# ---- warnings ----

FIRST = {"kl": 0.0, "entropy": 2.0, "eos": 0.8}


@pytest.mark.parametrize("change, said", [
    ({}, ""), ({"kl": 49.0}, ""), ({"kl": 51.0}, "--kl-coef"), ({"entropy": 0.21}, ""),
    ({"entropy": 0.19}, "entropy"), ({"eos": 0.41}, ""), ({"eos": 0.39}, "--no-eos-score")])
def test_warnings(change, said):
    sentences = warnings(FIRST | change, FIRST)
    assert len(sentences) == bool(said) and all(said in sentence for sentence in sentences)


def test_a_warning_comes_once(made, monkeypatch, capsys):
    shipped = report.rollout_stats
    monkeypatch.setattr(report, "rollout_stats", lambda *args: shipped(*args) | {"kl": 60.0})
    ppo.main(ppo.Config(**made | PPO))
    assert capsys.readouterr().out.count("warning: the KL is above 50 nats a response") == 1


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="it reads the memory as Linux has it")
def test_memory_does_not_grow_over_300_updates(made, monkeypatch):
    """Resident memory after update 300 within 5% of that after update 50."""
    sizes = {}

    def call(log, self, step, **numbers):
        with open("/proc/self/statm") as file:
            sizes[step] = int(file.read().split()[1])
        log(self, step, **numbers)
    hack(monkeypatch, Log, "__call__", call)
    ppo.main(ppo.Config(**made | PPO | {"updates": 300, "batch": 4, "epochs": 1, "minibatches": 1,
                                        "save_every": 50, "max_new_tokens": 4}))
    assert sizes[300] < 1.05 * sizes[50]
