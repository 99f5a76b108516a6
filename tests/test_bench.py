"""tools/bench.py at a tiny shape: it finishes, counts what it says, and the plan agrees with real models."""
import json
import math
import re
import sys

import pytest
import torch
from helpers import gpt_config

from data.files import UserError
from lib.fast import product
from lib.generate import generate
from model import GPT, RewardModel, Trunk
from tools import bench, bench_plan
from tools.bench import Config
from tools.bench_jobs import (
    SHAPES,
    Shape,
    config_of,
    generate_job,
    matrices,
    ppo_jobs,
    random_rows,
    rm_job,
    sft_job,
)
from tools.bench_plan import MODELS, count_bytes, largest, parameters, saved_floats

pytestmark = pytest.mark.slow

TINY = Shape(n_layer=2, n_head=2, d_model=16, vocab_size=40, prompt=6, response=5, batch=4)
CPU = torch.device("cpu")


def fake_stories(out, device):
    rows = [([1] * (5 + i % 7), 2) for i in range(20)]
    gpt = bench.ending_gpt(gpt_config(40, 128, 2, 2, 16), eos=39, mean=5)
    return rows, gpt, [[1, 2, 3], [4]], 39, "tiny"


@pytest.fixture
def tiny_world(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setattr(bench, "GROWTH", {"batch": (2, 4), "length": (8,), "d_model": (16,)})
    monkeypatch.setattr(bench, "stories", fake_stories)


def leaves(x):
    return [leaf for value in x.values() for leaf in leaves(value)] if isinstance(x, dict) else [x]


def test_it_finishes(tiny_world, tmp_path, capsys):
    bench.main(Config(shape="tiny", repeats=1, device="cpu", json=str(tmp_path / "b.json")))
    result = json.loads((tmp_path / "b.json").read_text())
    numbers = [x for name in ("parts", "growth", "ragged", "ends") for x in leaves(result[name])
               if isinstance(x, (int, float))]
    assert len(numbers) > 50 and all(math.isfinite(x) and x > 0 for x in numbers)
    assert set(result["parts"]) == {"matmul", "SFT step", "reward-model step", "generate", "PPO update",
                                    "rollout", "scoring", "policy", "critic"}
    assert set(result["growth"]) == {"batch 2", "batch 4", "length 8", "d_model 16"}
    assert result["machine"]["torch"] == torch.__version__ and result["machine"]["threads"] > 0
    assert result["machine"]["product"] == product()
    printed = capsys.readouterr().out
    assert "ragged SFT" in printed and "early stops" in printed and "nan" not in printed


# ---- what is counted ----

def test_prompts_are_as_ragged_as_the_peers():
    assert [P for _, P in random_rows(TINY)] == [6, 5, 4, 6]  # peer_generate.py masks i % (P // 2) of them
    assert [P for _, P in random_rows(TINY, ragged=False)] == [6, 6, 6, 6]
    assert all(len(row) == P + 5 for row, P in random_rows(TINY))


def test_padding_is_not_counted():
    assert sft_job(TINY, CPU)["SFT step"].tokens == 4 * 5
    assert rm_job(TINY, CPU)["reward-model step"].tokens == 6 + 5 + 4 + 6 + 4 * 5
    assert generate_job(TINY, CPU)["generate"].tokens == 4 * 5
    assert {job.tokens for job in ppo_jobs(TINY, CPU).values()} == {4 * 5}


def test_flops_are_2n_forward_and_6n_training():
    blocks, head = 2 * 12 * 16**2, 40 * 16
    assert matrices(config_of(TINY)) == (blocks, head)
    fed = 21 + 4 * 5 - 4  # all real tokens but the last of each row
    assert sft_job(TINY, CPU)["SFT step"].flops == 6 * (blocks * fed + head * 20)
    assert rm_job(TINY, CPU)["reward-model step"].flops == 6 * blocks * (fed + 4)
    assert generate_job(TINY, CPU)["generate"].flops == 2 * (blocks * fed + head * 20)
    jobs = ppo_jobs(TINY, CPU)
    assert jobs["  rollout"].flops == 2 * (blocks * fed + head * 20)
    # the reward model reads all tokens, the other three not the last of each row
    assert jobs["  scoring"].flops == 2 * (blocks * (3 * fed + fed + 4) + head * 40)
    assert jobs["  policy"].flops == 4 * 6 * (blocks * fed + head * 20)
    assert jobs["PPO update"].flops == sum(job.flops for name, job in jobs.items() if name != "PPO update")


def test_policy_and_critic_are_trained_apart():
    """The model that is timed learns; the stand-in for the other is no model."""
    kinds = dict(zip(parameters(config_of(TINY)), (GPT, RewardModel), strict=True))
    step, seen = torch.optim.AdamW.step, set()

    def spy(self, *args, **kwargs):
        seen.add(kinds.get(sum(p.numel() for p in self.param_groups[0]["params"])))
        return step(self, *args, **kwargs)

    for name, moved in (("  policy", {GPT}), ("  critic", {RewardModel}), ("PPO update", {GPT, RewardModel})):
        jobs = ppo_jobs(TINY, CPU)
        seen.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", spy)
            jobs[name].run()
        assert seen - {None} == moved


def test_every_part_multiplies_as_the_scripts_do(monkeypatch):
    """All models went through lib.fast.prepare: no plain nn.Linear is left but the heads of one number."""
    plain, forward = set(), torch.nn.Linear.forward

    def spy(self, x):
        if type(self) is torch.nn.Linear:
            plain.add(self.out_features)
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", spy)
    for jobs in (sft_job, rm_job, generate_job, ppo_jobs):
        for job in jobs(TINY, CPU).values():
            job.run()
    assert plain == {1}


def test_texts_end_at_lengths_that_vary():
    torch.manual_seed(0)
    gpt = bench.ending_gpt(gpt_config(500, 120, 2, 2, 32), eos=499, mean=20)
    tokens, P = torch.ones(64, 1, dtype=torch.long), torch.ones(64, dtype=torch.long)
    _, lengths = generate(gpt, tokens, P, 100, eos=499, generator=torch.Generator().manual_seed(0))
    assert 10 < lengths.float().mean() < 40 and lengths.float().std() > 8


# ---- the plan ----

@pytest.mark.parametrize("name, expected", [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168),
                                            ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)])
def test_plan_knows_the_published_sizes(name, expected):
    assert parameters(MODELS[name])[0] == expected


@pytest.mark.parametrize("name", MODELS)
def test_plan_counts_the_real_models(name):
    """Exact for weights, gradients and AdamW's two states, from the formula of the architecture."""
    config = MODELS[name]
    C, L = config.d_model, config.n_layer
    trunk = (config.vocab_size + config.block_size) * C + L * (12 * C**2 + 13 * C) + 2 * C
    size = count_bytes(config, 8, 16, 16, 4)
    assert parameters(config) == (trunk, trunk + C + 1)
    assert size["policy"] == size["reference"] == 4 * trunk
    assert size["critic"] == size["reward model"] == 4 * (trunk + C + 1)
    assert size["gradients"] == size["policy"] + size["critic"]
    assert size["AdamW states"] == 2 * size["gradients"]
    assert size["KV cache"] == 2 * L * 8 * 32 * C * 4


def test_plan_is_exact_for_what_training_holds():
    config = config_of(TINY)
    models = GPT(config), RewardModel(Trunk(config))
    held = 0
    for model in models:
        optimizer = torch.optim.AdamW(model.parameters())
        sum(p.sum() for p in model.parameters()).backward()
        optimizer.step()
        states = [x for state in optimizer.state.values() for x in state.values()]
        held += sum(x.nbytes for x in states if x.dim())  # without the step counts
    size = count_bytes(config, 4, 6, 5, 4)
    assert size["AdamW states"] == held
    assert size["gradients"] == sum(p.grad.nbytes for model in models for p in model.parameters())


def test_saved_floats_are_what_autograd_saves():
    torch.manual_seed(0)
    rm, B, T = RewardModel(Trunk(gpt_config(17, 32, 3, 4, 64))), 4, 32
    weights, saved = {p.data_ptr() for p in rm.parameters()}, {}

    def pack(x):
        if x.is_floating_point() and x.data_ptr() not in weights:
            saved[x.untyped_storage().data_ptr()] = x  # held, so that no address is used twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        rm(torch.randint(17, (B, T)))
    floats = sum(x.untyped_storage().nbytes() for x in saved.values()) / 4
    assert floats == pytest.approx(B * T * saved_floats(rm.config), rel=0.01)


def test_plan_grows_with_everything():
    base = dict(config=gpt_config(1024, 256, 4, 4, 128), batch=64, prompt=64, response=64, rows=16)
    peak = count_bytes(**base)["peak"]
    bigger = [("batch", 4096), ("prompt", 128), ("response", 128), ("rows", 32),
              ("config", gpt_config(1024, 256, 8, 4, 128)), ("config", gpt_config(1024, 256, 4, 4, 256)),
              ("config", gpt_config(2048, 256, 4, 4, 128))]
    assert all(count_bytes(**base | {name: value})["peak"] > peak for name, value in bigger)
    assert count_bytes(**base, checkpointed=True)["peak"] < peak


def test_largest_is_the_largest():
    config, sizes = gpt_config(1024, 128, 4, 4, 128), (64, 32, 32)

    def peak(rows):
        return count_bytes(config, *sizes, rows)["peak"]

    for rows in (20, 40, 63):  # fewer, and another moment than the backward pass is the peak
        assert largest(config, *sizes, peak(rows)) == rows
        assert largest(config, *sizes, peak(rows) - 1) == rows - 1
    assert largest(config, *sizes, 10**15) == 64 and largest(config, *sizes, 10**6) == 0


def test_plan_prints_and_allocates_nothing(capsys):
    """Allocating 8 x 6 GB would not go unnoticed."""
    bench.reset_peak(CPU)
    before = bench.memory(CPU) or 0
    bench.main(Config(plan=True, model="gpt2-xl", batch=64, prompt=512, response=128, gpu_memory=80.0))
    assert (bench.memory(CPU) or 0) - before < 100e6
    printed = capsys.readouterr().out
    assert re.search(r"policy +6\.230 GB", printed) and re.search(r"activations: --micro-batch \d+", printed)


# ---- mistakes ----

@pytest.mark.parametrize("mistake, sentence", [
    ({"shape": "huge"}, "--shape huge: expected one of demo, 30m, gpt2"),
    ({"plan": True, "model": "gpt5"}, "--model gpt5: expected one of"),
    ({"plan": True, "prompt": 2000}, r"--prompt 2000 \+ --response 64 > block_size 1024"),
    ({"peers": "nowhere"}, "--peers nowhere: no peer_generate.py in this folder"),
    ({"only": "all"}, "--only all: expected one of generate, ppo, memory"),
])
def test_mistakes_are_one_sentence(mistake, sentence):
    with pytest.raises(UserError, match=sentence):
        bench.main(Config(**mistake))


def test_a_missing_peer_python_is_one_sentence(tmp_path):
    for name in ("peer_generate.py", "peer_ppo.py"):
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match="--peer-python nobody: no such program"):
        bench.main(Config(peers=str(tmp_path), peer_python="nobody"))


def test_ask_reads_a_command_and_names_its_failure():
    found, peak = bench.ask([sys.executable, "-c", "print('x: 12.5 tokens/s')"], bench.LINE["generate"])
    assert found == "12.5" and peak > 1e6
    with pytest.raises(UserError, match="failed: ZeroDivisionError"):
        bench.ask([sys.executable, "-c", "1 / 0"], bench.LINE["generate"])


def test_one_line_for_the_peers(tiny_world, capsys):
    for what in ("generate", "ppo"):
        bench.main(Config(only=what, shape="tiny", repeats=1, device="cpu"))
        assert float(re.search(bench.LINE[what], capsys.readouterr().out)[1]) > 0


# ---- in processes of their own ----

def test_peers_from_any_folder(tmp_path, monkeypatch, capsys):
    """Ours runs in the project root wherever bench was started, theirs in an empty folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "peer_ppo.py").touch()
    (tmp_path / "peer_generate.py").write_text("import os, sys\nassert not os.listdir()\n"
                                               "print(' '.join(sys.argv[1:]), 'x: 100.0 tokens/s')\n")
    monkeypatch.setattr(bench, "VERSIONS", "print('versions: none')")
    monkeypatch.setattr(bench, "RATIOS", {("generate", "demo"): (2.5, "")})
    results = bench.bench_peers(Config(peers=".", peer_python=sys.executable, repeats=1), SHAPES, rounds=1)
    assert results["versions"] == "none" and results["generate demo"]["theirs"][0] == 100
    assert results["generate demo"]["ratio"] > 1 and results["generate demo"]["memory_ratio"] > 0
    assert "tokens/s" in capsys.readouterr().out


def test_the_plan_is_compared_with_what_a_process_measures(monkeypatch, capsys):
    shapes, config = {"demo": SHAPES["demo"]}, config_of(SHAPES["demo"])
    monkeypatch.setattr(bench_plan, "BENCH", [sys.executable, "-c", "print('1000000 bytes')"])
    result = bench_plan.check(shapes, config_of, 640)["demo"]
    assert result["planned"] == count_bytes(config, 64, 16, 48, 10)["peak"] and result["measured"] == 10**6
    assert "measured      1.0 MB" in capsys.readouterr().out
    monkeypatch.setattr(bench_plan, "BENCH", [sys.executable, "-c", "1 / 0"])
    with pytest.raises(UserError, match="--only memory .* failed: ZeroDivisionError"):
        bench_plan.check(shapes, config_of, 640)
