"""The three scripts one after another on a tiny folder of JSONL, and what they say to a user's mistakes.

B10, P25, P30 and the like are ids of docs/method.md.
"""
import math
import os
import shutil
import subprocess
import sys
from statistics import fmean

import pytest
import torch
from helpers import (
    BYTES,
    CPU,
    PPO,
    ROOT,
    SIZES,
    gen,
    gpt_config,
    jsonl,
    lines,
    make_data,
    same_weights,
    steps,
)

import lib.rewards
import lib.start
import model
import ppo
import sample
import train_rm
import train_sft
from data.examples import encode_demonstrations, encode_prompts, encode_rankings, pad
from data.files import UserError
from data.records import read_preferences, read_prompts, read_sft
from data.tokenizer import train_tokenizer
from lib import report
from lib.baselines import ngram_losses
from lib.checkpoint import load, load_tokenizer, save
from lib.fast import prepare
from lib.flags import check_numbers, cli
from lib.generate import generate
from lib.report import distinct_2, explained_variance, means
from lib.rewards import load_models, load_reward_model
from model import GPT, RewardModel

RM = {"batch_tokens": 512, "pool": "last", "epochs": 1.0, "dropout": 0.0, "lr": 5e-4, "device": "cpu"}


def train(data, out, **settings):
    """SFT, reward model and PPO, one after the other."""
    where = {"data": str(data), "out": str(out), **settings}
    train_sft.main(train_sft.Config(**where, **SIZES, epochs=1))
    train_rm.main(train_rm.Config(**where, **RM))
    ppo.main(ppo.Config(**where, **PPO))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with data and the results of all three stages; each file had a bad line, which was skipped."""
    folder = tmp_path_factory.mktemp("made")
    make_data(folder / "data")
    make_data(folder / "bad")
    for path in (folder / "bad").iterdir():
        path.write_text(path.read_text() + "{\n")
    train(folder / "bad", folder / "out", skip_bad=True)
    return folder


@pytest.fixture
def run(made, tmp_path):
    """run(ppo_setting=...) does PPO in a copy of `made` and returns its out folder."""
    def go(name="out", **settings):
        out = tmp_path / name
        out.mkdir(exist_ok=True)
        for file in ("sft.pt", "rm.pt"):
            shutil.copy(made / "out" / file, out)
        ppo.main(ppo.Config(**{"data": str(made / "data"), "out": str(out), **PPO, **settings}))
        return out
    return go


@pytest.fixture
def spy(monkeypatch):
    """spy(owner, name) -> list of (arguments, result) of each call from now on."""
    def watch(owner, name):
        shipped, calls = getattr(owner, name), []

        def call(*args, **kwargs):
            result = shipped(*args, **kwargs)
            calls.append(((*args, *kwargs.values()), result))
            return result
        monkeypatch.setattr(owner, name, call)
        return calls
    return watch


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def test_every_stage_writes_its_files(made):
    assert names(made / "out") == sorted([*(f"{stage}{end}" for stage in ("sft", "rm", "ppo")
                                            for end in (".pt", ".log.jsonl", ".finished.pt")),
                                          "ppo.samples.jsonl", "ppo.best.pt", "critic.pt"])
    for name, kind in (("sft", GPT), ("rm", RewardModel), ("ppo", GPT), ("critic", RewardModel)):
        net = load(kind, made / "out" / f"{name}.pt")
        assert not net.training and load_tokenizer(made / "out" / f"{name}.pt").name == "bytes"
    sft, after = load(GPT, made / "out/sft.pt"), load(GPT, made / "out/ppo.pt")
    assert not torch.equal(sft.lm_head.weight, after.lm_head.weight)


def files_read(finished):
    start = torch.load(finished, weights_only=True)["start"]
    return {name: x for name, x in start.items() if str(x).startswith("a file with CRC ")}


@pytest.mark.parametrize("stage, files", [
    ("sft", "bad/sft.jsonl bad/sft_val.jsonl bad/preferences.jsonl"),
    ("rm", "out/sft.pt bad/preferences.jsonl bad/preferences_val.jsonl bad/prompts.jsonl bad/sft.jsonl"),
    ("ppo", "out/sft.pt out/rm.pt bad/prompts.jsonl bad/prompts_val.jsonl bad/sft.jsonl")])
def test_a_run_remembers_every_file_it_reads(made, stage, files):
    """With a checksum, so that --resume with another is refused (tests/test_resume.py)."""
    read = files_read(made / f"out/{stage}.finished.pt")
    assert set(read) == {os.path.relpath(made / file, made / "out") for file in files.split()}
    assert len(set(read.values())) == len(read)


def test_the_log_of_ppo(made):
    log = lines(made / "out/ppo.log.jsonl")
    assert log[0]["config"]["updates"] == 3 and log[0]["config"]["kl_coef"] == ppo.Config.kl_coef
    updates = [line for line in log if "step" in line]
    assert [line["step"] for line in updates] == [1, 2, 3]
    for line in updates:
        assert {"score", "kl", "entropy", "eos", "length", "explained", "ratio", "clipped", "update_kl",
                "value_loss", "grad_norm"} <= set(line)
        assert "tok_s" not in line  # which is never twice the same
        assert all(math.isfinite(x) for x in line.values())
        assert 0 <= line["eos"] <= 1 and 1 <= line["length"] <= 8
        assert 0 < line["entropy"] < math.log(257) and line["update_kl"] >= 0
    assert updates[0]["kl"] == 0  # the policy is still the reference
    assert updates[2]["kl"] != 0
    before, after = (line["report"] for line in log[-2:])
    assert before["update"] == 0 and before["kl"] == 0 and after["update"] == 3
    assert after["best_of_4_score"] > before["score"]
    assert 0 <= after["win_rate"] <= 1


def test_the_results_of_sft_and_rm_are_those_on_held_out_data(made):
    """Computed here from the checkpoints and the files *_val.jsonl."""
    gpt, rm = load(GPT, made / "out/sft.pt"), load(RewardModel, made / "out/rm.pt")
    rows = encode_demonstrations(read_sft(made / "data/sft_val.jsonl"), BYTES, 32, "")
    loss, count = train_sft.sft_loss(gpt, *train_sft.sft_batch(rows, CPU))
    report = lines(made / "out/sft.log.jsonl")[-1]["report"]
    assert report.pop("val_loss") == pytest.approx(loss.item() / count, rel=1e-4)
    train = encode_demonstrations(read_sft(made / "data/sft.jsonl"), BYTES, 32, "")
    assert (report["unigram_loss"], report["bigram_loss"]) == ngram_losses(train, rows, 257)
    groups, pairs, right, longer = read_preferences(made / "data/preferences_val.jsonl"), 0, 0, 0
    for group in encode_rankings(groups, BYTES, 32, ""):
        scores, n = rm.score(*pad(group.rows)).tolist(), [len(row) for row in group.rows]
        for i in range(len(n)):
            for j in range(i + 1, len(n)):  # responses stand in order of preference
                pairs, right = pairs + 1, right + (scores[i] > scores[j])
                longer += (n[i] > n[j]) + 0.5 * (n[i] == n[j])
    report = lines(made / "out/rm.log.jsonl")[-1]["report"]
    assert {"pairs": pairs, "accuracy": pytest.approx(right / pairs), "ceiling": None,
            "longer_wins": pytest.approx(longer / pairs)}.items() <= report.items()
    # the SFT model hardly ever ends a text, so the best responses of the training data have mean 0 and sd 1
    groups = encode_rankings(read_preferences(made / "data/preferences.jsonl"), BYTES, 32, "")
    scores = rm.score(*pad([group.rows[0] for group in groups]))
    assert abs(scores.mean()) < 1e-4 and abs(scores.std(unbiased=False) - 1) < 1e-4


@pytest.mark.slow
def test_B10_same_seed_same_run(made, run, tmp_path):
    """Of all stages; the files of the run before are kept beside."""
    for _ in range(2):
        train(made / "data", tmp_path)
    assert names(tmp_path) == sorted([*(f"{stage}{end}" for stage in ("sft", "rm", "ppo") for end in (
        ".pt", ".prev.pt", ".log.jsonl", ".log.prev.jsonl", ".finished.pt", ".finished.prev.pt")),
        "ppo.samples.jsonl", "ppo.samples.prev.jsonl", "ppo.best.pt", "ppo.best.prev.pt", "critic.pt",
        "critic.prev.pt"])
    for stage, kind in (("sft", GPT), ("rm", RewardModel), ("ppo", GPT)):
        for end in ("", ".prev"):
            assert steps(tmp_path / f"{stage}.log{end}.jsonl") == steps(made / f"out/{stage}.log.jsonl")
            a, b = load(kind, tmp_path / f"{stage}{end}.pt"), load(kind, made / f"out/{stage}.pt")
            assert same_weights(a, b)
    assert steps(run(seed=2) / "ppo.log.jsonl") != steps(made / "out/ppo.log.jsonl")


@pytest.mark.slow
def test_the_size_of_micro_batches_changes_no_result(made, run):
    small = steps(run(micro_batch=40) / "ppo.log.jsonl")
    for a, b in zip(small, steps(made / "out/ppo.log.jsonl"), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"micro_batch": 40}, {"checkpoint_activations": True}])
def test_what_saves_memory_changes_no_result(made, tmp_path, how):
    """In SFT and reward model: the same log to rounding, and the same weights."""
    where = {"data": str(made / "data"), "out": str(tmp_path)}
    train_sft.main(train_sft.Config(**where, **SIZES, epochs=1, **how))
    shutil.copy(made / "out/sft.pt", tmp_path)
    train_rm.main(train_rm.Config(**where, **RM, **how))
    for name in ("sft", "rm"):
        logs = (steps(folder / f"{name}.log.jsonl") for folder in (tmp_path, made / "out"))
        for a, b in zip(*logs, strict=True):
            assert a == pytest.approx(b, rel=1e-3, abs=1e-4)
    a, b = (load(RewardModel, folder / "rm.pt").state_dict() for folder in (tmp_path, made / "out"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_bf16_runs_all_stages_and_learns_the_same(made, tmp_path, spy):
    prepared = [spy(script, "prepare") for script in (train_sft, train_rm, lib.rewards)]
    train(made / "data", tmp_path, bf16=True)
    flagged = [[args[2].bf16 for args, _ in calls if len(args) == 3] for calls in prepared]
    assert flagged == [[True], [True] * 2, [True] * 4]  # the models of each stage; others are self-checked
    a, b = (lines(folder / "sft.log.jsonl")[-1]["report"]["val_loss"] for folder in (tmp_path, made / "out"))
    assert a != b and a == pytest.approx(b, rel=0.02)
    assert steps(tmp_path / "ppo.log.jsonl")[0]["kl"] == 0
    assert all(x.dtype == torch.float32 for x in load(GPT, tmp_path / "ppo.pt").parameters())


@pytest.mark.slow
def test_compile_gives_the_same_gradients_and_changes_no_name(monkeypatch):
    """Traced by torch.compile in one piece, but without its C++ compiler, which takes a minute."""
    torch._dynamo.reset()
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compile(
        self, backend="aot_eager", fullgraph=True, **how))
    gpt = GPT(gpt_config(17, 32, 2, 2, 16)).eval()
    fast, tokens = GPT(gpt.config).eval(), torch.randint(17, (3, 9))
    fast.load_state_dict(gpt.state_dict())
    prepare(fast, cfg=ppo.Config(compile=True))
    assert fast.trunk._compiled_call_impl and list(fast.state_dict()) == list(gpt.state_dict())
    for net in (gpt, fast):
        net(tokens).logsumexp(-1).sum().backward()
    for (name, a), b in zip(gpt.named_parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4, msg=name)
    count = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    fast(torch.randint(17, (2, 6))).sum().backward()
    assert count and torch._dynamo.utils.counters["stats"]["unique_graphs"] == count  # one for all lengths
    a, b = (generate(net, tokens, torch.tensor([9, 4, 2]), 5, temperature=0)[0] for net in (gpt, fast))
    assert torch.equal(a, b)


@pytest.mark.parametrize("with_function", [False, True])
def test_R28_K2_policy_reference_critic_and_reward_share_nothing(made, tmp_path, with_function):
    """Ruining the policy and the critic changes neither the reference nor the scores."""
    (tmp_path / "mine.py").write_text("def f(prompts, responses):\n    return [0.0] * len(prompts)\n")
    reward = f"{tmp_path / 'mine.py'}:f" if with_function else ""
    models = load_models(ppo.Config(out=str(made / "out"), reward=reward), CPU)
    tokens, lengths = torch.randint(97, 120, (4, 9)), torch.tensor([9, 7, 5, 3])

    def look():
        return models.ref(tokens).detach(), models.score(tokens, lengths, lengths - 2).detach()

    before = look()
    assert torch.equal(before[0], models.policy(tokens).detach())
    value = models.critic(tokens).detach()
    assert torch.equal(value, torch.zeros(4, 9)) if with_function else torch.equal(
        value[torch.arange(4), lengths - 1], before[1])
    for net in (models.policy, models.critic):
        assert all(p.requires_grad for p in net.parameters())
        for p in net.parameters():
            p.data += torch.randn_like(p)
        assert all(torch.equal(a, b) for a, b in zip(look(), before, strict=True))
    assert not any(p.requires_grad for p in models.ref.parameters())


def test_what_model_py_freezes_stays_frozen(made, run, monkeypatch):
    shipped = model.Trunk.__init__

    def frozen(self, config):
        shipped(self, config)
        self.wpe.requires_grad_(False)
    monkeypatch.setattr(model.Trunk, "__init__", frozen)
    a, b = load(GPT, made / "out/sft.pt").trunk, load(GPT, run(updates=1) / "ppo.pt").trunk
    assert torch.equal(a.wpe.weight, b.wpe.weight) and not torch.equal(a.wte.weight, b.wte.weight)


# ---- what the loops do with the formulas ----

def test_B12_every_update_starts_from_its_own_log_probs(run, spy):
    """The first pass of each update has ratio 1, the later ones have not: no rollout is used twice."""
    calls = spy(ppo, "minibatch_backward")
    run(updates=3, minibatches=1, epochs=2, update_kl=1e9, lr=1e-3)
    seen = [stats for _, stats in calls[1:]]  # the first is the self-check's
    assert len(seen) == 6
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        assert first["ratio"] == pytest.approx(1, abs=1e-6) and first["update_kl"] < 1e-10
        assert first["clipped"] == 0 and second["update_kl"] > 1e-9


def test_P25_P24_learning_rates_and_adam(run, monkeypatch):
    seen, shipped = [], ppo.clip_and_step

    def step(model, optimizer, clip, update):
        seen.append([(g["lr"], g["eps"], g["weight_decay"]) for g in optimizer.param_groups])
        assert clip == 1.0 and update == (len(seen) + 1) // 2
        assert set(map(id, optimizer.param_groups[0]["params"])) == set(map(id, model.parameters()))
        return shipped(model, optimizer, clip, update)
    monkeypatch.setattr(ppo, "clip_and_step", step)
    run(updates=20, epochs=1, minibatches=1, max_new_tokens=2, lr=1e-4, critic_lr=2e-4, update_kl=1e9)
    assert len(seen) == 40
    for i, groups in enumerate(seen):
        u, peak = i // 2, (1e-4, 2e-4)[i % 2]
        assert [(pytest.approx(peak * min(1, (u + 1) / 2) * (1 - u / 20)), 1e-5, 0.0)] == groups


@pytest.mark.parametrize("script", [train_sft, train_rm], ids=["sft", "rm"])
def test_learning_rates_and_log_of_sft_and_rm(made, tmp_path, monkeypatch, spy, script):
    """Step s of S, counted from 1, has peak x min(1, s/(S/10)) x a cosine that is 1 at the first."""
    seen, results, shipped = [], [], script.clip_and_step
    calls = spy(script, "sft_backward" if script is train_sft else "ranking_backward")

    def step(model, optimizer, clip, number, parts):
        seen.append({g["lr"] for g in optimizer.param_groups})
        assert clip == 1.0 and number == len(seen)
        results.append(shipped(model, optimizer, clip, number, parts))
        return results[-1]
    monkeypatch.setattr(script, "clip_and_step", step)
    shutil.copy(made / "out/sft.pt", tmp_path)
    settings = {"data": str(made / "data"), "out": str(tmp_path), "lr": 1e-3, "save_every": 0, "keep": "last"}
    sizes = {**SIZES, "batch_tokens": 16} if script is train_sft else {**RM, "batch_tokens": 80}
    script.main(script.Config(**sizes | settings | {"epochs": 1}))
    S = len(seen)
    assert 25 < S < 200  # past the warm-up, which is a tenth of them
    for s, rates in enumerate(seen, 1):
        fall = 0.1 + 0.9 * (1 + math.cos(math.pi * (s - 1) / S)) / 2
        assert [*rates] == [pytest.approx(1e-3 * min(1, s / (S // 10)) * fall)]
    last = 0
    for line in steps(tmp_path / ("sft.log.jsonl" if script is train_sft else "rm.log.jsonl")):
        s = line["step"]
        numbers = results[last:s]  # since the last line
        if script is train_sft:  # nats a token
            numbers = [x | {"loss": x["loss"] / count}
                       for x, (_, (_, count)) in zip(numbers, calls[last:s], strict=True)]
        means = {name: fmean(x[name] for x in numbers) for name in numbers[0]}
        assert line == pytest.approx({"step": s, **means, "lr": seen[s - 1].pop()})
        last = s
    assert [bool(rates) for rates in seen] == [s % 25 != 0 and s not in (1, S) for s in range(1, S + 1)]


def test_the_bpe_is_trained_on_the_training_demonstrations(made, tmp_path, monkeypatch):
    texts = []
    monkeypatch.setattr(lib.start, "train_tokenizer", lambda some, size: texts.extend(some) or BYTES)
    train_sft.main(train_sft.Config(**SIZES | {"tokenizer": "", "data": str(made / "data"),
                                               "out": str(tmp_path), "epochs": 0.1}))
    assert texts == [text for pair in read_sft(made / "data/sft.jsonl") for text in pair]


def test_the_sampler_goes_on_and_evaluation_is_held_out_and_has_its_own_random_numbers(made, run, monkeypatch,
                                                                                      spy):
    """11 updates, so that one evaluation comes between two of them."""
    rollouts, held_out, whose, tables = [], [], [], spy(report, "print_table")
    rollout, evaluate, where = ppo.rollout, report.evaluate, [rollouts]

    def watched_rollout(policy, prompts, eos, cfg, generator):
        before = generator.get_state()
        batch = rollout(policy, prompts, eos, cfg, generator)
        where[-1].append((before, generator.get_state(), prompts))
        return batch

    def watched_evaluate(*args, **seed):
        where.append(inside := [])
        models = args[-1]
        whose.append("ref" if models.policy is models.ref else "policy")
        held_out.append((evaluate(*args, **seed), inside))
        where.pop()
        return held_out[-1][0]
    monkeypatch.setattr(ppo, "rollout", watched_rollout)
    monkeypatch.setattr(report, "evaluate", watched_evaluate)
    out = run(updates=11, epochs=1, minibatches=1, max_new_tokens=4, seed=3)

    rollouts = rollouts[1:]  # the first is the self-check's
    assert len(rollouts) == 11 and torch.equal(rollouts[0][0], gen(3).get_state())
    for before, after in zip(rollouts, rollouts[1:], strict=False):
        assert torch.equal(before[1], after[0]) and not torch.equal(before[0], after[0])
    prompts = encode_prompts(read_prompts(made / "data/prompts.jsonl"), BYTES, 28, "")
    assert sorted(p for *_, some in rollouts[:8] for p in some) == sorted(prompts)  # an epoch: each once

    val, results = read_prompts(made / "data/prompts_val.jsonl"), [result for result, _ in held_out]
    assert whose == ["policy"] * 3 + ["ref"] * 3  # and three more samples a prompt of the SFT model
    for seed, (result, inside) in zip((0, 0, 0, 1, 2, 3), held_out, strict=True):
        assert [prompt for prompt, _ in result["texts"]] == val
        assert torch.equal(inside[0][0], gen(seed).get_state())
    (before, chosen, after, *_), _ = tables[0]
    assert before is results[0] and after is results[2]
    four = [results[0], *results[3:]]
    assert chosen["score"] == [max(some) for some in zip(*(r["score"] for r in four), strict=True)]
    assert all(chosen["texts"][i] in [r["texts"][i] for r in four if r["score"][i] == chosen["score"][i]]
               for i in range(8))
    reports = [line["report"] for line in lines(out / "ppo.log.jsonl") if "report" in line]
    assert [report["update"] for report in reports] == [10, 0, 11]  # the order of the log
    assert reports[2]["best_of_4_score"] == pytest.approx(fmean(chosen["score"]))
    for report_, result in zip(reports, (results[1], results[0], results[2]), strict=True):
        assert means(result).items() <= report_.items()
    wins = [(a > b) + 0.5 * (a == b) for a, b in zip(results[2]["score"], results[0]["score"], strict=True)]
    assert reports[2]["win_rate"] == sum(wins) / 8


def test_the_kl_of_each_rollout_steers_the_coefficient_of_the_next(run, spy):
    made, adapted = spy(ppo, "advantages"), spy(ppo, "adapt_kl_coef")
    out = run(updates=4, kl_target=0.1, kl_horizon=40, lr=3e-3, critic_lr=1e-3, lam=0.9)
    updates, made = steps(out / "ppo.log.jsonl"), made[1:]  # the first is the self-check's
    assert len(made) == len(adapted) == len(updates) == 4
    coef = ppo.Config.kl_coef
    together = zip(made, adapted, updates, strict=True)
    for ((batch, kl_coef, lam), whole), ((old, kl, *rest), new), line in together:
        explained = explained_variance(whole["value"], whole["ret"], whole["mask"])
        assert line["explained"] == explained and whole["mask"].any()
        gap = torch.where(batch["mask"], batch["logp"] - batch["ref_logp"], 0.0)
        assert kl == line["kl"] == pytest.approx(gap.sum(1).mean().item(), abs=1e-6)
        assert kl_coef == old == coef == line["kl_coef"] and lam == 0.9 and rest == [0.1, 8, 40]
        coef = new
        assert new != old
    assert len({line["kl"] for line in updates}) == 4


def test_ptx_goes_through_the_demonstrations_one_batch_a_step(made, run, spy):
    calls = spy(ppo, "sft_backward")
    run(updates=2, ptx_coef=0.5, update_kl=1e9)
    assert len(calls) == 8  # updates x epochs x minibatches
    for (_, rows, micro_batch, device, weight), _ in calls:
        assert len(rows) == 8 and micro_batch == 256 and device == CPU and weight == 0.5
    demonstrations = encode_demonstrations(read_sft(made / "data/sft.jsonl"), BYTES, 32, "")
    assert sorted(row for (_, rows, *_), _ in calls for row in rows) == sorted(demonstrations)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"kl_target": 1.0, "kl_horizon": 40}, {"ptx_coef": 0.5},
                                      {"temperature": 0.7}])
def test_variants_run(run, made, settings):
    updates = steps(run(**settings) / "ppo.log.jsonl")
    assert len(updates) == 3 and all(math.isfinite(x) for line in updates for x in line.values())
    if "kl_target" in settings:  # no KL yet, so the first step is the largest one down
        assert updates[1]["kl_coef"] == pytest.approx(ppo.Config.kl_coef * (1 - 0.2 * 8 / 40))
    else:
        assert updates != steps(made / "out/ppo.log.jsonl")


@pytest.mark.slow
def test_one_epoch_is_every_example_once(made, tmp_path, spy):
    """Shuffled batches are more than sorted ones; steps counted by these left some examples out."""
    make_data(tmp_path / "data", n=500)
    where = {"data": str(tmp_path / "data"), "out": str(tmp_path), "save_every": 0, "keep": "last"}
    for script, name, settings in ((train_sft, "sft_backward", SIZES | {"batch_tokens": 40, "epochs": 1}),
                                   (train_rm, "ranking_backward", RM | {"batch_tokens": 90})):
        calls = spy(script, name)
        script.main(script.Config(**where, **settings))
        assert sum(len(some) for (_, some, *_), _ in calls) == 500
    file = tmp_path / "data/preferences.jsonl"
    wanted = encode_rankings(read_preferences(file), BYTES, 32, "")
    assert sorted(map(str, wanted)) == sorted(str(group) for (_, some, *_), _ in calls for group in some)


def test_init_starts_from_a_checkpoint_with_its_sizes_and_tokenizer(made, tmp_path):
    where = {"data": str(made / "data"), "init": str(made / "out/sft.pt"), "device": "cpu"}
    train_sft.main(train_sft.Config(**where, out=str(tmp_path), lr=0.0, epochs=0.5))
    old, new = (load(GPT, path / "sft.pt") for path in (made / "out", tmp_path))
    assert new.config == old.config and load_tokenizer(tmp_path / "sft.pt").name == "bytes"
    assert same_weights(new, old)
    with pytest.raises(UserError, match="--init fixes the sizes and tokenizer; remove --n-layer"):
        train_sft.main(train_sft.Config(**where, out=str(tmp_path), n_layer=3))


@pytest.mark.slow
def test_a_judge_is_reported_on_and_changes_nothing(made, run):
    """The judge is the reward model itself, so it agrees with the score wherever a text ends by itself."""
    alone, judged = run("alone"), run("judged", judge=str(made / "out/rm.pt"))
    assert steps(judged / "ppo.log.jsonl") == steps(alone / "ppo.log.jsonl")
    assert os.path.relpath(made / "out/rm.pt", judged) in files_read(judged / "ppo.finished.pt")
    reports = [line["report"] for line in lines(judged / "ppo.log.jsonl") if "report" in line]
    assert all("judge" in report for report in reports)
    assert "judge" not in lines(alone / "ppo.log.jsonl")[-1]["report"]
    longer = run("longer", judge=str(made / "out/rm.pt"), no_eos_score=0.0, max_new_tokens=24)
    report = lines(longer / "ppo.log.jsonl")[-1]["report"]
    assert report["eos"] < 1 and report["score"] != report["judge"]  # the judge reads every text


def test_distinct_2():
    assert distinct_2([" a b a b", " a b"]) == 2 / 4  # ab ba ab | ab
    assert distinct_2([" a"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("pool", RewardModel.POOLS)
def test_ppo_takes_a_reward_model_of_every_pool(made, tmp_path, pool):
    shutil.copy(made / "out/sft.pt", tmp_path)
    where = {"data": str(made / "data"), "out": str(tmp_path)}
    train_rm.main(train_rm.Config(**where, pool=pool, epochs=0.5, device="cpu"))
    assert load(RewardModel, tmp_path / "rm.pt").pool == pool
    ppo.main(ppo.Config(**where, **PPO | {"updates": 1, "max_new_tokens": 29}))  # prompts get 2 or 3 tokens
    assert len(steps(tmp_path / "ppo.log.jsonl")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("sign, target", [("", "up"), ("-", "down")])
def test_P30_a_reward_function_moves_the_letter_a(tmp_path, sign, target):
    """ppo.main on FILE.py:FUNCTION: the share of a at least doubles; with the sign turned it halves."""
    make_data(tmp_path, letters="abcdef", n=200)
    where = {"data": str(tmp_path), "out": str(tmp_path)}
    train_sft.main(train_sft.Config(**where, **SIZES | {"batch_tokens": 256}, epochs=25))
    (tmp_path / "mine.py").write_text(
        f"def more_a(prompts, responses):\n"
        f"    return [{sign}5 * r.count('a') / max(1, len(r)) for r in responses]\n")
    settings = {"updates": 40, "batch": 32, "minibatches": 1, "epochs": 4, "lr": 2e-3, "critic_lr": 2e-3,
                "micro_batch": 1024, "update_kl": 0.1, "reward": f"{tmp_path / 'mine.py'}:more_a"}
    ppo.main(ppo.Config(**where, **PPO | settings))
    assert "mine.py" not in files_read(tmp_path / "ppo.finished.pt")  # a bug in it may be mended on resume
    tokens, lengths, share = torch.tensor([list(b"x:")] * 200), torch.full((200,), 2), {}
    for name in ("sft", "ppo"):
        gpt = load(GPT, tmp_path / f"{name}.pt")
        out, n = generate(gpt, tokens, lengths, 8, eos=256, generator=gen(0))
        text = "".join(BYTES.decode(row[2:k].tolist()) for row, k in zip(out, n, strict=True))
        share[name] = text.count("a") / len(text)
    assert 0.08 < share["sft"] < 0.3
    assert share["ppo"] > 2 * share["sft"] if target == "up" else share["ppo"] < share["sft"] / 2


# ---- mistakes ----

def test_missing_checkpoints_name_the_command_that_makes_them(made, tmp_path):
    where = {"data": str(made / "data"), "out": str(tmp_path)}
    with pytest.raises(UserError, match=r"sft.pt is missing: `python train_sft.py` makes it"):
        train_rm.main(train_rm.Config(**where, epochs=1.0, device="cpu"))
    with pytest.raises(UserError, match=r"sft.pt is missing"):
        ppo.main(ppo.Config(**where, **PPO))
    shutil.copy(made / "out/sft.pt", tmp_path)
    with pytest.raises(UserError, match=r"rm.pt is missing: `python train_rm.py` makes it"):
        ppo.main(ppo.Config(**where, **PPO))


def test_a_reward_model_of_another_tokenizer_is_refused(made, tmp_path):
    shutil.copy(made / "out/sft.pt", tmp_path)
    tokenizer = train_tokenizer(["an apple and an ant"] * 20, 260)
    other = RewardModel.from_gpt(GPT(gpt_config(tokenizer.vocab_size, 32, 1, 2, 32)))
    save(tmp_path / "rm.pt", other, tokenizer)
    with pytest.raises(UserError, match="another tokenizer"):
        ppo.main(ppo.Config(data=str(made / "data"), out=str(tmp_path), **PPO))


@pytest.mark.parametrize("length", [16, 48])
def test_a_reward_model_for_shorter_texts_is_refused_and_one_for_longer_taken(made, tmp_path, length):
    policy, path = load(GPT, made / "out/sft.pt"), tmp_path / "rm.pt"
    config = gpt_config(257, length, 1, 2, 32)
    save(path, RewardModel.from_gpt(GPT(config)), BYTES)
    if length == 48:
        assert load_reward_model(path, policy, BYTES).config == config
    else:
        with pytest.raises(UserError, match="rm.pt was trained for shorter texts"):
            load_reward_model(path, policy, BYTES)


def test_checkpoints_of_the_wrong_kind_or_corrupt_are_refused(made, tmp_path):
    where = {"data": str(made / "data"), "out": str(tmp_path)}
    shutil.copy(made / "out/rm.pt", tmp_path / "sft.pt")
    with pytest.raises(UserError, match="holds a RewardModel; expected a GPT"):
        train_rm.main(train_rm.Config(**where, epochs=1.0, device="cpu"))
    shutil.copy(made / "out/sft.pt", tmp_path / "sft.pt")
    shutil.copy(made / "out/sft.pt", tmp_path / "rm.pt")
    with pytest.raises(UserError, match="holds a GPT; expected a RewardModel"):
        ppo.main(ppo.Config(**where, **PPO))
    for content in (b"", b"not a checkpoint", (made / "out/sft.pt").read_bytes()[:-100]):
        (tmp_path / "sft.pt").write_bytes(content)
        with pytest.raises(UserError, match="not an onetrunk checkpoint, or is corrupt"):
            train_rm.main(train_rm.Config(**where, epochs=1.0, device="cpu"))


@pytest.mark.parametrize("part", [0.1, 0.5])
def test_a_truncated_checkpoint_is_refused(made, tmp_path, part):
    whole = (made / "out/sft.pt").read_bytes()
    (tmp_path / "sft.pt").write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(UserError, match="corrupt"):
        load(GPT, tmp_path / "sft.pt")


@pytest.mark.parametrize("file, content, why", [
    ("prompts.jsonl", "", "no examples"), ("prompts_val.jsonl", None, "missing"),
    ("prompts.jsonl", '{"text": "a"}\n', r'prompts.jsonl:1: column "prompt"')])
def test_bad_prompts_are_named(made, tmp_path, file, content, why):
    shutil.copytree(made / "data", tmp_path / "data")
    (tmp_path / "data" / file).unlink()
    if content is not None:
        (tmp_path / "data" / file).write_text(content)
    with pytest.raises(UserError, match=why):
        ppo.main(ppo.Config(data=str(tmp_path / "data"), out=str(made / "out"), **PPO))


@pytest.mark.slow
def test_prompts_longer_than_the_model_are_truncated_and_counted(made, run, tmp_path, capsys):
    shutil.copytree(made / "data", tmp_path / "data")
    jsonl(tmp_path / "data/prompts.jsonl", [{"prompt": "y" * 50}, {"prompt": "x:"}] * 8)
    out = run(data=str(tmp_path / "data"), epochs=1, minibatches=1)
    assert "prompts.jsonl: of 16 examples, 8 prompts truncated from the left" in capsys.readouterr().out
    assert len(steps(out / "ppo.log.jsonl")) == 3
    with pytest.raises(UserError, match="no room"):
        run(max_new_tokens=32)


@pytest.mark.slow
def test_mistakes_are_one_sentence_on_the_command_line(tmp_path):
    for script in ("train_rm.py", "ppo.py"):
        command = [sys.executable, str(ROOT / script), "--out", str(tmp_path), "--data", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert "sft.pt is missing: `python train_sft.py` makes it" in done.stderr


@pytest.mark.slow
def test_a_sample_of_a_prompt_that_is_too_long(made, tmp_path, capsys):
    """It is shown as it is held out: truncated from the left."""
    shutil.copytree(made / "data", tmp_path / "data")
    jsonl(tmp_path / "data/sft_val.jsonl", [{"prompt": "y" * 50, "completion": "abc"}])
    where = {"data": str(tmp_path / "data"), "out": str(tmp_path)}
    # 100 steps and more
    train_sft.main(train_sft.Config(**where, **SIZES | {"batch_tokens": 32, "d_model": 8}, epochs=5,
                                    keep="last"))
    assert "      | " + "y" * 28 + " >>" in capsys.readouterr().out


@pytest.mark.slow
def test_a_judge_that_reads_a_reward_token_has_room_for_it(made, run, tmp_path):
    shutil.copytree(made / "data", tmp_path / "data")
    jsonl(tmp_path / "data/prompts_val.jsonl", [{"prompt": "y" * 50}])
    save(tmp_path / "judge.pt", RewardModel.from_gpt(load(GPT, made / "out/sft.pt"), "token"), BYTES)
    run(data=str(tmp_path / "data"), judge=str(tmp_path / "judge.pt"), no_eos_score=0.0)


@pytest.mark.parametrize("script, flags, says", [
    ("train_sft.py", ["--device", "nowhere"], "--device nowhere: not available on this machine"),
    ("train_sft.py", ["--n-head", "3"], "--d-model must be a multiple of --n-head"),
    ("train_sft.py", ["--epochs", "nan"], "--epochs nan must lie between"),
    ("train_sft.py", ["--block-size", "1"], "--block-size 1 must lie between 2 and"),
    ("train_rm.py", ["--dropout", "-0.1"], "--dropout -0.1 must lie between 0 and 0.99"),
    ("ppo.py", ["--minibatches", "0"], "--minibatches 0 must lie between 1 and"),
    ("ppo.py", ["--temperature", "0"], "--temperature 0.0 must lie between 0.01 and"),
    ("ppo.py", ["--seed", "9" * 30], "--seed 9+ must lie between 0 and"),
])
def test_flags_that_make_no_sense_are_named_and_nothing_is_touched(tmp_path, monkeypatch, script, flags,
                                                                   says):
    module = {"train_sft.py": train_sft, "train_rm.py": train_rm, "ppo.py": ppo}[script]
    make_data(tmp_path / "data", n=8)
    where = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [script, *where, *flags])
    with pytest.raises(SystemExit, match=f"^{script}: {says}"):
        cli(module.main, module.Config)
    assert not (tmp_path / "out").exists()


def test_flags_may_be_0_where_that_means_something():
    ok = {"weight_decay": 0.0, "save_every": 0, "kl_coef": 0.0, "no_eos_score": -3.0, "update_kl": math.inf,
          "clip": math.inf}
    for module in (train_sft, train_rm, ppo):
        names = module.Config.__dataclass_fields__
        check_numbers(module.Config(**{name: x for name, x in ok.items() if name in names}))


def test_an_unknown_pool_is_named(made):
    with pytest.raises(UserError, match="--pool middle: expected one of last, mean, max, token"):
        train_rm.main(train_rm.Config(data=str(made / "data"), out=str(made / "out"), pool="middle",
                                      device="cpu"))


def test_out_of_gpu_memory_is_one_sentence(monkeypatch):
    def main(cfg):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nmore")
    main.__module__ = "ppo"
    monkeypatch.setattr(sys, "argv", ["ppo.py"])
    with pytest.raises(SystemExit, match="^ppo.py: CUDA out of memory. Try a smaller --micro-batch"):
        cli(main, ppo.Config)


# ---- sample.py ----

def run_sample(*args):
    return subprocess.run([sys.executable, str(ROOT / "sample.py"), *map(str, args), "--device", "cpu", "x:"],
                          capture_output=True, text=True)


@pytest.mark.slow
def test_a_reward_model_for_shorter_texts_scores_no_samples(made, tmp_path):
    save(tmp_path / "rm.pt", RewardModel.from_gpt(GPT(gpt_config(257, 16, 1, 2, 32))), BYTES)
    done = run_sample("--ckpt", made / "out/ppo.pt", "--reward", tmp_path / "rm.pt")
    assert done.returncode == 1 and "was trained for shorter texts than" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_sample_prints_what_the_checkpoint_says(made):
    done = run_sample("--ckpt", made / "out/ppo.pt", "--reward", made / "out/rm.pt", "--n", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("[+") + done.stdout.count("[-") >= 2


def test_best_of_prints_the_best_score(made, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sample.py", "--ckpt", str(made / "out/ppo.pt"), "--reward",
                                      str(made / "out/rm.pt"), "--best-of", "8", "--device", "cpu", "x:"])
    sample.main(sample.read_args())
    head, best = capsys.readouterr().out.split("\n")[:2]
    assert head.startswith("[best of 8; scores ") and f" to {float(best[1:6]):.2f}, " in head
