"""The three scripts one after another on a tiny folder of JSONL, and what they say to a user's mistakes.

B10 and P25, P30 are checks of the project's recipe, section 5.
"""
import json
import math
import random
import shutil
import subprocess
import sys
from pathlib import Path

import common
import pytest
import torch
from common import load, load_tokenizer, save

import ppo
import train_rm
import train_sft
from data.records import UserError
from data.tokenizer import get_tokenizer, train_tokenizer
from model import GPT, GPTConfig, RewardModel

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"tokenizer": "bytes", "n_layer": 1, "n_head": 2, "d_model": 32, "block_size": 32, "batch_tokens": 512, "device": "cpu"}
PPO = {"updates": 3, "batch": 8, "max_new_tokens": 8, "epochs": 2, "minibatches": 2, "micro_batch": 256, "device": "cpu"}


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_data(folder, letters="abc", n=64, seed=0):
    """Prompts "x:" with words of a few letters, in which more of the letter a is better."""
    rng, word = random.Random(seed), lambda: "".join(rng.choice(letters) for _ in range(rng.randint(3, 6)))
    prompt = lambda: "".join(rng.choice("xyz") for _ in range(rng.randint(1, 3))) + ":"
    folder.mkdir(parents=True, exist_ok=True)
    for name, n in (("", n), ("_val", 8)):
        jsonl(folder / f"sft{name}.jsonl", [{"prompt": prompt(), "completion": word()} for _ in range(n)])
        jsonl(folder / f"prompts{name}.jsonl", [{"prompt": prompt()} for _ in range(n)])
        rows = []
        while len(rows) < n:
            responses = sorted({word(), word(), word()}, key=lambda text: -text.count("a"))
            if len(responses) > 1:
                rows.append({"prompt": prompt(), "responses": responses})
        jsonl(folder / f"preferences{name}.jsonl", rows)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps(path):
    return [line for line in lines(path) if "step" in line]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with data and the results of all three stages, each run twice."""
    folder = tmp_path_factory.mktemp("made")
    make_data(folder / "data")
    where = {"data": str(folder / "data"), "out": str(folder / "out")}
    for _ in range(2):
        train_sft.main(train_sft.Config(**where, **SIZES, epochs=1))
        train_rm.main(train_rm.Config(**where, batch_tokens=512, device="cpu"))
        ppo.main(ppo.Config(**where, **PPO))
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


def test_every_stage_writes_its_files_and_keeps_the_previous_ones(made):
    names = {path.name for path in (made / "out").iterdir()}
    assert names == {f"{stage}{end}" for stage in ("sft", "rm", "ppo")
                     for end in (".pt", ".prev.pt", ".jsonl", ".prev.jsonl", ".finished.pt")}
    for name, kind in (("sft", GPT), ("rm", RewardModel), ("ppo", GPT)):
        model = load(kind, made / "out" / f"{name}.pt")
        assert not model.training and load_tokenizer(made / "out" / f"{name}.pt").name == "bytes"
    sft, after = load(GPT, made / "out/sft.pt"), load(GPT, made / "out/ppo.pt")
    assert not torch.equal(sft.lm_head.weight, after.lm_head.weight)


def test_the_log_of_ppo(made):
    log = lines(made / "out/ppo.jsonl")
    assert log[0]["config"]["updates"] == 3 and log[0]["config"]["kl_coef"] == ppo.Config.kl_coef
    updates = [line for line in log if "step" in line]
    assert [line["step"] for line in updates] == [1, 2, 3]
    for line in updates:
        assert {"score", "kl", "entropy", "eos", "length", "explained", "ratio", "clipped", "update_kl", "value_loss",
                "grad_norm"} <= set(line) and "tok_s" not in line  # which is never twice the same
        assert all(math.isfinite(x) for x in line.values())
        assert 0 <= line["eos"] <= 1 and 1 <= line["length"] <= 8 and 0 < line["entropy"] < math.log(257) and line["update_kl"] >= 0
    assert updates[0]["kl"] == 0  # the policy is still the reference
    assert updates[2]["kl"] != 0
    before, after = (line["report"] for line in log[-2:])
    assert before["update"] == 0 and before["kl"] == 0 and after["update"] == 3 and 0 <= after["win_rate"] <= 1


def test_the_logs_of_sft_and_rm(made):
    assert lines(made / "out/sft.jsonl")[-1]["report"]["val_loss"] > 0
    assert {"accuracy", "longer_wins", "ceiling", "pairs"} <= set(lines(made / "out/rm.jsonl")[-1]["report"])


def test_B10_same_seed_same_run(made, run):
    first = steps(made / "out/ppo.jsonl")
    assert steps(made / "out/ppo.prev.jsonl") == first
    again, other = run("again"), run("other", seed=2)
    assert steps(again / "ppo.jsonl") == first and steps(other / "ppo.jsonl") != first
    a, b = load(GPT, again / "ppo.pt"), load(GPT, made / "out/ppo.pt")
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))


def test_the_size_of_micro_batches_changes_no_result(made, run):
    small = steps(run(micro_batch=40) / "ppo.jsonl")
    for a, b in zip(small, steps(made / "out/ppo.jsonl")):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("how", [{"micro_batch": 40}, {"checkpoint_activations": True}])
def test_what_saves_memory_changes_no_result(made, tmp_path, how):
    """micro_batch and checkpoint_activations in SFT and reward model: the same log to rounding, weights too."""
    where = {"data": str(made / "data"), "out": str(tmp_path)}
    train_sft.main(train_sft.Config(**where, **SIZES, epochs=1, **how))
    shutil.copy(made / "out/sft.pt", tmp_path)
    train_rm.main(train_rm.Config(**where, batch_tokens=512, device="cpu", **how))
    for name in ("sft", "rm"):
        for a, b in zip(steps(tmp_path / f"{name}.jsonl"), steps(made / f"out/{name}.jsonl"), strict=True):
            assert a == pytest.approx(b, rel=1e-3, abs=1e-4)
    a, b = (load(RewardModel, folder / "rm.pt").state_dict() for folder in (tmp_path, made / "out"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-3, rtol=1e-3)


def test_bf16_runs_all_stages_and_learns_the_same(made, tmp_path):
    where = {"data": str(made / "data"), "out": str(tmp_path), "bf16": True}
    train_sft.main(train_sft.Config(**where, **SIZES, epochs=1))
    train_rm.main(train_rm.Config(**where, batch_tokens=512, device="cpu"))
    ppo.main(ppo.Config(**where, **PPO))
    a, b = (lines(folder / "sft.jsonl")[-1]["report"]["val_loss"] for folder in (tmp_path, made / "out"))
    assert a != b and a == pytest.approx(b, rel=0.02)
    assert steps(tmp_path / "ppo.jsonl")[0]["kl"] == 0
    assert all(x.dtype == torch.float32 for x in load(GPT, tmp_path / "ppo.pt").parameters())


def test_compile_gives_the_same_gradients_and_changes_no_name(monkeypatch):
    """With the tracing of torch.compile, in one piece, and without its C++ compiler, which takes a minute."""
    torch._dynamo.reset()
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compile(
        self, backend="aot_eager", fullgraph=True, **how))
    gpt = GPT(GPTConfig(17, 32, 2, 2, 16)).eval()
    fast, tokens = GPT(gpt.config).eval(), torch.randint(17, (3, 9))
    fast.load_state_dict(gpt.state_dict())
    fast.trunk.tune(False, False, True)
    assert fast.trunk._compiled_call_impl and list(fast.state_dict()) == list(gpt.state_dict())
    for model in (gpt, fast):
        model(tokens).logsumexp(-1).sum().backward()
    for (name, a), b in zip(gpt.named_parameters(), fast.parameters()):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4, msg=name)
    graphs = lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    count = graphs()
    fast(torch.randint(17, (2, 6))).sum().backward()
    assert count and graphs() == count  # one for all lengths
    assert torch.equal(*(m.generate(tokens, torch.tensor([9, 4, 2]), 5, temperature=0)[0] for m in (gpt, fast)))


@pytest.mark.parametrize("with_function", [False, True])
def test_R28_K2_policy_reference_critic_and_reward_share_nothing(made, tmp_path, with_function):
    """Ruining the policy and the critic changes neither the reference nor the scores."""
    (tmp_path / "mine.py").write_text("def f(prompts, responses):\n    return [0.0] * len(prompts)\n")
    cfg = ppo.Config(out=str(made / "out"), reward=f"{tmp_path / 'mine.py'}:f" if with_function else "")
    policy, ref, critic, reward, _ = ppo.load_models(cfg, torch.device("cpu"))
    tokens, lengths = torch.randint(97, 120, (4, 9)), torch.tensor([9, 7, 5, 3])
    look = lambda: (ref(tokens).detach(), reward(tokens, lengths, lengths - 2).detach())
    before = look()
    assert torch.equal(before[0], policy(tokens).detach())
    critic_value = critic(tokens).detach()
    assert torch.equal(critic_value, torch.zeros(4, 9)) if with_function else torch.equal(
        critic_value[torch.arange(4), lengths - 1], before[1])
    for model in (policy, critic):
        assert all(p.requires_grad for p in model.parameters())
        for p in model.parameters():
            p.data += torch.randn_like(p)
        assert all(torch.equal(a, b) for a, b in zip(look(), before))
    assert not any(p.requires_grad for p in ref.parameters())


def test_B12_every_update_starts_from_its_own_log_probs(run, monkeypatch):
    """In main the first pass of each update has ratio 1, the later ones have not: no rollout is used twice."""
    seen, shipped = [], ppo.minibatch_backward
    monkeypatch.setattr(ppo, "minibatch_backward", lambda *args: seen.append(shipped(*args)) or seen[-1])
    run(updates=3, minibatches=1, epochs=2, update_kl=1e9, lr=1e-3)
    seen = seen[-6:]  # without that of the self-check
    for first, second in zip(seen[::2], seen[1::2]):
        assert first["ratio"] == pytest.approx(1, abs=1e-6) and first["update_kl"] < 1e-10 and first["clipped"] == 0
        assert second["update_kl"] > 1e-9


def test_P25_P24_learning_rates_and_adam(run, monkeypatch):
    seen, shipped = [], ppo.clip_and_step
    monkeypatch.setattr(ppo, "clip_and_step", lambda model, optimizer, *rest: seen.append(
        [(g["lr"], g["eps"], g["weight_decay"]) for g in optimizer.param_groups]) or shipped(model, optimizer, *rest))
    run(updates=8, epochs=1, minibatches=1, lr=1e-4, critic_lr=2e-4, update_kl=1e9)
    assert len(seen) == 16
    for i, groups in enumerate(seen):
        u, peak = i // 2, (1e-4, 2e-4)[i % 2]
        assert [(pytest.approx(peak * min(1, (u + 1) / 5) * (1 - u / 8)), 1e-5, 0.0)] == groups


@pytest.mark.parametrize("settings", [{"kl_target": 1.0, "kl_horizon": 40}, {"ptx_coef": 0.5}, {"temperature": 0.7}])
def test_variants_run(run, made, settings):
    updates = steps(run(**settings) / "ppo.jsonl")
    assert len(updates) == 3 and all(math.isfinite(x) for line in updates for x in line.values())
    if "kl_target" in settings:  # no KL yet, so the first step is the largest one down
        assert updates[0]["kl_coef"] == pytest.approx(ppo.Config.kl_coef * (1 - 0.2 * 8 / 40))
    else:
        assert updates != steps(made / "out/ppo.jsonl")


def test_init_starts_from_a_checkpoint_with_its_sizes_and_tokenizer(made, tmp_path):
    where = {"data": str(made / "data"), "init": str(made / "out/sft.pt"), "device": "cpu"}
    train_sft.main(train_sft.Config(**where, out=str(tmp_path), lr=0.0, epochs=0.5))
    old, new = (load(GPT, path / "sft.pt") for path in (made / "out", tmp_path))
    assert new.config == old.config and load_tokenizer(tmp_path / "sft.pt").name == "bytes"
    assert all(torch.equal(a, b) for a, b in zip(new.parameters(), old.parameters()))
    with pytest.raises(UserError, match="--init brings its own sizes and tokenizer: leave out --n-layer"):
        train_sft.main(train_sft.Config(**where, out=str(tmp_path), n_layer=3))


def test_a_judge_is_reported_on_and_changes_nothing(made, run):
    """The judge here is the reward model itself, so its score is the proxy wherever a text ends by itself."""
    alone, judged = run("alone"), run("judged", judge=str(made / "out/rm.pt"))
    assert steps(judged / "ppo.jsonl") == steps(alone / "ppo.jsonl")
    reports = [line["report"] for line in lines(judged / "ppo.jsonl") if "report" in line]
    assert all("judge" in report for report in reports)
    assert "judge" not in lines(alone / "ppo.jsonl")[-1]["report"]
    longer = run("longer", judge=str(made / "out/rm.pt"), no_eos_score=0.0, max_new_tokens=24)
    report = lines(longer / "ppo.jsonl")[-1]["report"]
    assert report["eos"] < 1 and report["score"] != report["judge"]  # the judge reads every text


def test_distinct_2():
    assert ppo.distinct_2([" a b a b", " a b"]) == 2 / 4  # ab ba ab | ab
    assert ppo.distinct_2([" a"]) == 0


@pytest.mark.parametrize("pool", RewardModel.POOLS)
def test_ppo_takes_a_reward_model_of_every_pool(made, tmp_path, pool):
    shutil.copy(made / "out/sft.pt", tmp_path)
    where = {"data": str(made / "data"), "out": str(tmp_path)}
    train_rm.main(train_rm.Config(**where, pool=pool, epochs=0.5, device="cpu"))
    ppo.main(ppo.Config(**where, **{**PPO, "updates": 1, "max_new_tokens": 29}))  # room for two prompt tokens or three
    assert len(steps(tmp_path / "ppo.jsonl")) == 1


@pytest.mark.parametrize("sign, target", [("", "up"), ("-", "down")])
def test_P30_a_reward_function_moves_the_letter_a(tmp_path, sign, target):
    """The real ppo.main on FILE.py:FUNCTION: the share of a at least doubles; with the sign turned it at least halves."""
    make_data(tmp_path, letters="abcdef", n=200)
    where = {"data": str(tmp_path), "out": str(tmp_path)}
    train_sft.main(train_sft.Config(**where, **{**SIZES, "batch_tokens": 256}, epochs=25))
    (tmp_path / "mine.py").write_text(f"def more_a(prompts, responses):\n"
                                      f"    return [{sign}5 * r.count('a') / max(1, len(r)) for r in responses]\n")
    ppo.main(ppo.Config(**where, **{**PPO, "updates": 40, "batch": 32, "minibatches": 1, "epochs": 4, "lr": 2e-3,
                                    "critic_lr": 2e-3, "micro_batch": 1024, "update_kl": 0.1},
                        reward=f"{tmp_path / 'mine.py'}:more_a"))
    tokenizer, share = get_tokenizer("bytes"), {}
    tokens, lengths = torch.tensor([list(b"x:")] * 200), torch.full((200,), 2)
    for name in ("sft", "ppo"):
        out, n = load(GPT, tmp_path / f"{name}.pt").generate(tokens, lengths, 8, eos=256, generator=torch.Generator().manual_seed(0))
        text = "".join(tokenizer.decode(row[2:k].tolist()) for row, k in zip(out, n))
        share[name] = text.count("a") / len(text)
    assert 0.08 < share["sft"] < 0.3
    assert share["ppo"] > 2 * share["sft"] if target == "up" else share["ppo"] < share["sft"] / 2


# ---- mistakes ----

def test_missing_checkpoints_name_the_command_that_makes_them(made, tmp_path):
    where = {"data": str(made / "data"), "out": str(tmp_path)}
    with pytest.raises(UserError, match=r"sft.pt is missing: `python train_sft.py` makes it"):
        train_rm.main(train_rm.Config(**where, device="cpu"))
    with pytest.raises(UserError, match=r"sft.pt is missing"):
        ppo.main(ppo.Config(**where, **PPO))
    shutil.copy(made / "out/sft.pt", tmp_path)
    with pytest.raises(UserError, match=r"rm.pt is missing: `python train_rm.py` makes it"):
        ppo.main(ppo.Config(**where, **PPO))


def test_a_reward_model_of_another_tokenizer_is_refused(made, tmp_path):
    shutil.copy(made / "out/sft.pt", tmp_path)
    tokenizer = train_tokenizer(["an apple and an ant"] * 20, 260)
    save(tmp_path / "rm.pt", RewardModel.from_gpt(GPT(GPTConfig(tokenizer.vocab_size, 32, 1, 2, 32))), tokenizer)
    with pytest.raises(UserError, match="another tokenizer"):
        ppo.main(ppo.Config(data=str(made / "data"), out=str(tmp_path), **PPO))


@pytest.mark.parametrize("length", [16, 48])
def test_a_reward_model_for_shorter_texts_is_refused_and_one_for_longer_taken(made, tmp_path, length):
    policy, tokenizer, path = load(GPT, made / "out/sft.pt"), load_tokenizer(made / "out/sft.pt"), tmp_path / "rm.pt"
    config = GPTConfig(tokenizer.vocab_size, length, 1, 2, 32)
    save(path, RewardModel.from_gpt(GPT(config)), tokenizer)
    take = lambda: ppo.load_reward_model(path, policy, tokenizer, ppo.Config(**PPO), torch.device("cpu"))
    if length == 48:
        assert take().config == config
    else:
        with pytest.raises(UserError, match="shorter texts"):
            take()


def test_checkpoints_of_the_wrong_kind_or_damaged_are_refused(made, tmp_path):
    where = {"data": str(made / "data"), "out": str(tmp_path)}
    shutil.copy(made / "out/rm.pt", tmp_path / "sft.pt")
    with pytest.raises(UserError, match="holds a RewardModel, and a GPT is needed"):
        train_rm.main(train_rm.Config(**where, device="cpu"))
    shutil.copy(made / "out/sft.pt", tmp_path / "sft.pt")
    shutil.copy(made / "out/sft.pt", tmp_path / "rm.pt")
    with pytest.raises(UserError, match="holds a GPT, and a RewardModel is needed"):
        ppo.main(ppo.Config(**where, **PPO))
    for content in (b"", b"not a checkpoint", (made / "out/sft.pt").read_bytes()[:-100]):
        (tmp_path / "sft.pt").write_bytes(content)
        with pytest.raises(UserError, match="no checkpoint of onetrunk, or is damaged"):
            train_rm.main(train_rm.Config(**where, device="cpu"))


@pytest.mark.parametrize("part", [0.1, 0.5])
def test_a_checkpoint_cut_short_is_refused(made, tmp_path, part):
    whole = (made / "out/sft.pt").read_bytes()
    (tmp_path / "sft.pt").write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(UserError, match="damaged"):
        load(GPT, tmp_path / "sft.pt")


@pytest.mark.parametrize("file, content, why", [("prompts.jsonl", "", "no examples"), ("prompts_val.jsonl", None, "missing"),
                                               ("prompts.jsonl", '{"text": "a"}\n', r'prompts.jsonl:1: column "prompt"')])
def test_bad_prompts_are_named(made, tmp_path, file, content, why):
    shutil.copytree(made / "data", tmp_path / "data")
    (tmp_path / "data" / file).unlink()
    if content is not None:
        (tmp_path / "data" / file).write_text(content)
    with pytest.raises(UserError, match=why):
        ppo.main(ppo.Config(data=str(tmp_path / "data"), out=str(made / "out"), **PPO))


def test_prompts_longer_than_the_model_are_cut_and_counted(made, run, tmp_path, capsys):
    shutil.copytree(made / "data", tmp_path / "data")
    jsonl(tmp_path / "data/prompts.jsonl", [{"prompt": "y" * 50}, {"prompt": "x:"}] * 8)
    out = run(data=str(tmp_path / "data"))
    assert "prompts.jsonl: 8 of 16 prompts cut from the left to 24 tokens" in capsys.readouterr().out
    assert len(steps(out / "ppo.jsonl")) == 3
    with pytest.raises(UserError, match="no room"):
        run(max_new_tokens=32)


def test_mistakes_are_one_sentence_on_the_command_line(tmp_path):
    for script in ("train_rm.py", "ppo.py"):
        done = subprocess.run([sys.executable, str(ROOT / script), "--out", str(tmp_path), "--data", str(tmp_path)],
                              capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert "sft.pt is missing: `python train_sft.py` makes it" in done.stderr


def test_one_epoch_is_every_example_once(made, tmp_path, monkeypatch):
    """Shuffled batches are more than sorted ones; steps counted by these left some examples out."""
    seen = []
    sft_backward, ranking_backward = train_sft.sft_backward, train_rm.ranking_backward
    monkeypatch.setattr(train_sft, "sft_backward", lambda gpt, rows, *rest: seen.extend(map(str, rows)) or
                        sft_backward(gpt, rows, *rest))
    monkeypatch.setattr(train_rm, "ranking_backward", lambda rm, groups, *rest: seen.extend(map(str, groups)) or
                        ranking_backward(rm, groups, *rest))
    make_data(tmp_path / "data", n=500)
    where = {"data": str(tmp_path / "data"), "out": str(tmp_path), "save_every": 0}
    train_sft.main(train_sft.Config(**where, **SIZES | {"batch_tokens": 40}, epochs=1))
    assert len(seen) == 500
    seen.clear()
    train_rm.main(train_rm.Config(**where, batch_tokens=90, device="cpu"))
    assert len(seen) == 500


def test_a_sample_of_a_prompt_that_is_too_long(made, tmp_path):
    """It is shown as it is held out: cut from the left."""
    shutil.copytree(made / "data", tmp_path / "data")
    jsonl(tmp_path / "data/sft_val.jsonl", [{"prompt": "y" * 50, "completion": "abc"}])
    where = {"data": str(tmp_path / "data"), "out": str(tmp_path)}
    train_sft.main(train_sft.Config(**where, **SIZES | {"batch_tokens": 32}, epochs=5))  # 100 steps and more


def test_a_judge_that_reads_a_reward_token_has_room_for_it(made, run, tmp_path):
    shutil.copytree(made / "data", tmp_path / "data")
    jsonl(tmp_path / "data/prompts_val.jsonl", [{"prompt": "y" * 50}])
    save(tmp_path / "judge.pt", RewardModel.from_gpt(load(GPT, made / "out/sft.pt"), "token"), load_tokenizer(made / "out/sft.pt"))
    run(data=str(tmp_path / "data"), judge=str(tmp_path / "judge.pt"), no_eos_score=0.0)


@pytest.mark.parametrize("script, flags, says", [
    ("train_sft.py", ["--device", "nowhere"], "--device nowhere: there is no such device here"),
    ("train_sft.py", ["--n-head", "3"], "--d-model must be a multiple of --n-head"),
    ("train_sft.py", ["--epochs", "nan"], "--epochs nan must lie between"),
    ("train_sft.py", ["--block-size", "1"], "--block-size 1 must lie between 2 and"),
    ("train_rm.py", ["--dropout", "-0.1"], "--dropout -0.1 must lie between 0 and 0.99"),
    ("ppo.py", ["--minibatches", "0"], "--minibatches 0 must lie between 1 and"),
    ("ppo.py", ["--temperature", "0"], "--temperature 0.0 must lie between 1e-09 and"),
    ("ppo.py", ["--seed", "9" * 30], "--seed 9+ must lie between 0 and"),
])
def test_flags_that_make_no_sense_are_named_and_nothing_is_touched(tmp_path, monkeypatch, script, flags, says):
    module = {"train_sft.py": train_sft, "train_rm.py": train_rm, "ppo.py": ppo}[script]
    make_data(tmp_path / "data", n=8)
    monkeypatch.setattr(sys, "argv", [script, "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), *flags])
    with pytest.raises(SystemExit, match=f"^{script}: {says}"):
        common.run(module.main, module.Config)
    assert not (tmp_path / "out").exists()


def test_flags_may_be_0_where_that_means_something():
    ok = {"weight_decay": 0.0, "save_every": 0, "kl_coef": 0.0, "no_eos_score": -3.0, "update_kl": math.inf, "clip": math.inf}
    for module in (train_sft, train_rm, ppo):
        names = module.Config.__dataclass_fields__
        common.check_numbers(module.Config(**{name: x for name, x in ok.items() if name in names}))


def test_an_unknown_pool_is_named(made):
    with pytest.raises(UserError, match="--pool middle is none of last, mean, max, token"):
        train_rm.main(train_rm.Config(data=str(made / "data"), out=str(made / "out"), pool="middle", device="cpu"))


def test_out_of_gpu_memory_is_one_sentence(monkeypatch):
    def main(cfg):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nmore")
    main.__module__ = "ppo"
    monkeypatch.setattr(sys, "argv", ["ppo.py"])
    with pytest.raises(SystemExit, match="^ppo.py: CUDA out of memory. Try a smaller --micro-batch"):
        common.run(main, ppo.Config)


def test_a_reward_model_for_shorter_texts_scores_no_samples(made, tmp_path):
    tokenizer, path = load_tokenizer(made / "out/sft.pt"), tmp_path / "rm.pt"
    save(path, RewardModel.from_gpt(GPT(GPTConfig(tokenizer.vocab_size, 16, 1, 2, 32))), tokenizer)
    done = subprocess.run([sys.executable, str(ROOT / "sample.py"), "--ckpt", str(made / "out/ppo.pt"), "--reward",
                           str(path), "--device", "cpu", "x:"], capture_output=True, text=True)
    assert done.returncode == 1 and "was trained for shorter texts than" in done.stderr and "Traceback" not in done.stderr


def test_sample_prints_what_the_checkpoint_says(made):
    if not (ROOT / "sample.py").exists():
        pytest.skip("no sample.py yet")
    done = subprocess.run([sys.executable, str(ROOT / "sample.py"), "--ckpt", str(made / "out/ppo.pt"), "--reward",
                           str(made / "out/rm.pt"), "--device", "cpu", "--n", "2", "x:"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("[+") + done.stdout.count("[-") >= 2
