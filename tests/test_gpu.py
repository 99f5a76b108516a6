"""On a pretend GPU (pretend_gpu.py) every stage and tool runs, device mistakes are caught, and the host waits
for the device no more often than it must."""
import copy
import importlib
import inspect
import math
import runpy
import sys
import textwrap
from functools import partial

import pytest
import torch
from helpers import PPO, ROOT, SIZES, gen, jsonl, lines, make_data, same_weights, tiny_gpt
from pretend_gpu import DEVICE, pretend_gpu, register
from torch.utils._pytree import tree_map

import lib.checks
import lib.common
import lib.generate
import lib.rewards
import lib.state
import model
import ppo
import train_rm
import train_sft
from data.examples import Ranking, pad
from data.files import UserError
from lib import checks_rm
from lib.checkpoint import load
from lib.common import clip_and_step, to_host
from lib.generate import Cache, generate
from lib.resume import Run
from lib.rewards import Models, model_score
from lib.state import get_state
from model import GPT, RewardModel

pytest.importorskip("torch._C._acc", reason="devices in Python came with torch 2.10")
register()  # now, as autograd counts the devices at the first backward pass of the process
RM = {"batch_tokens": 512, "epochs": 1.0, "lr": 4e-3, "max_new_tokens": 8}


@pytest.fixture(autouse=True)
def gpu():
    """Inside, gpu:0 is there; the Counter of waits."""
    with pretend_gpu() as seen:
        yield seen


# ---- the pretend GPU itself ----

def on(*shape, dtype=torch.float):
    return torch.ones(shape, dtype=dtype, device=DEVICE)


def cpu(*shape, dtype=torch.float):
    return torch.ones(shape, dtype=dtype)


TAKEN = {  # what CUDA takes, too
    "a number in arithmetic": lambda: cpu() * on(3),
    "a number in where": lambda: torch.where(on(3) > 0, on(3), cpu()),
    "one as a fill": lambda: on(3).masked_fill(on(3) > 0, cpu()), "a Python number": lambda: 2 + on(3),
    "an index": lambda: on(3)[torch.tensor([0, 2])], "a list as an index": lambda: on(3)[[0, 2]],
    "a mask of the CPU as an index": lambda: on(3)[cpu(3) > 0],
    "a write by an index": lambda: on(3).__setitem__(torch.tensor([0]), on(1)),
    "a copy down": lambda: cpu(3).copy_(on(3)), "a copy up": lambda: on(3).copy_(cpu(3)),
    "its own generator": lambda: torch.rand(3, device=DEVICE, generator=torch.Generator(DEVICE)),
    "saving": lambda: torch.save({"x": on(3)}, "/dev/null")}
REFUSED = {
    "arithmetic": lambda: on(3) + cpu(3), "in place on the CPU": lambda: cpu(3).add_(on(3)),
    "a number of the CPU in place": lambda: cpu().add_(on()),
    "where": lambda: torch.where(on(3) > 0, on(3), cpu(3)),
    "a mask of the CPU in where": lambda: torch.where(cpu(3) > 0, on(3), 0.0),
    "a product": lambda: on(3, 3) @ cpu(3, 3), "a loss": lambda: torch.nn.functional.mse_loss(on(3), cpu(3)),
    "an embedding": lambda: torch.nn.functional.embedding(torch.tensor([0]), on(3, 2)),
    "an index of it on the CPU": lambda: cpu(3)[on(1, dtype=torch.long)],
    "a value of another": lambda: on(3).__setitem__(torch.tensor([0, 1]), cpu(2)),
    "index_copy_": lambda: on(3).index_copy_(0, torch.tensor([0]), on(1)),
    "cat": lambda: torch.cat([on(3), cpu(3)]), "stack": lambda: torch.stack([on(), cpu()]),
    "numpy": lambda: on(3).numpy(), "a generator of the CPU":
        lambda: torch.rand(3, device=DEVICE, generator=torch.Generator()),
    "its generator on the CPU": lambda: torch.randperm(3, generator=torch.Generator(DEVICE))}


@pytest.mark.parametrize("name", TAKEN)
def test_it_takes_what_cuda_takes(name):
    TAKEN[name]()


@pytest.mark.parametrize("name", REFUSED)
def test_it_refuses_what_cuda_refuses(name):
    with pytest.raises((RuntimeError, TypeError), match="device|generator|numpy"):
        REFUSED[name]()


WAITS = {"item": lambda x: x.sum().item(), "int": lambda x: int(x.sum()), "bool": lambda x: bool(x.any()),
         "if": lambda x: 1 if x.any() else 0, "nonzero": torch.nonzero, "mask": lambda x: x[x > 0],
         "write by a mask": lambda x: x.__setitem__(x > 0, 2 * x), "select": lambda x: x.masked_select(x > 0),
         "tolist": lambda x: x.tolist(), "cpu": lambda x: x.cpu(), "copy": lambda x: cpu(3).copy_(x),
         "equal": lambda x: torch.equal(x, x), "up": lambda x: cpu(3).to(DEVICE),
         "list": lambda x: x[[0, 1]], "tensor": lambda x: torch.tensor([1], device=DEVICE),
         "boolean mask down": lambda x: x[cpu(3) > 0]}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", WAITS)
def test_it_counts_what_waits(gpu, name, inference):
    with torch.inference_mode(inference):
        x = on(3)
        WAITS[name](x)
        assert sum(gpu.values()) == 1
        x[torch.arange(2, device=DEVICE)], x.where(x > 0, 0.0), x.masked_fill(x > 0, 0.0), x.topk(2), x.sum()
        assert sum(gpu.values()) == 1  # and these do not


def test_a_network_learns_there_as_on_the_cpu():
    """Tied weights stay tied, in a copy, too; the step is that of the CPU to rounding."""
    made = []
    for device in ("cpu", DEVICE):
        gpt = tiny_gpt().to(device)
        assert gpt.lm_head.weight is gpt.trunk.wte.weight
        twin = copy.deepcopy(gpt)
        assert twin.lm_head.weight is twin.trunk.wte.weight is not gpt.lm_head.weight
        optimizer = torch.optim.SGD(gpt.parameters(), lr=1e-2)
        parts, _ = train_sft.sft_backward(gpt, [([1, 2, 3, 4], 2)], 100, device)
        made.append((clip_and_step(gpt, optimizer, 1.0, 1, parts), [*gpt.parameters()]))
        assert not same_weights(gpt, twin)
    (numbers, weights), (there, others) = made
    assert there == pytest.approx(numbers, rel=1e-5)
    for a, b in zip(weights, others, strict=True):
        torch.testing.assert_close(a, b.detach().cpu(), atol=1e-5, rtol=1e-4)


# ---- every stage and tool ----

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with data/ and out/, in which all three stages ran on the pretend GPU."""
    folder = tmp_path_factory.mktemp("gpu")
    make_data(folder / "data")
    with pretend_gpu(), pytest.MonkeyPatch.context() as patch:
        for module in (train_sft, train_rm, checks_rm):  # conftest.py leaves this check out
            patch.setattr(module, "check_model", lib.checks.check_model)
        for module, settings in ((train_sft, SIZES), (train_rm, RM), (ppo, PPO)):
            run(module, folder, **settings)
    return folder


def run(module, folder, **settings):
    """A stage on the pretend GPU; --out is another folder than the inputs' where one is named."""
    settings = {"data": str(folder / "data"), "out": str(folder / "out")} | settings | {"device": DEVICE}
    module.main(module.Config(**settings))


def script(monkeypatch, capsys, *args):
    """What a script (FILE.py) or tool (tools.NAME) prints on the pretend GPU; it may not fail."""
    name, *flags = map(str, args)
    monkeypatch.setattr(sys, "argv", [name, "--device", DEVICE, *flags])
    capsys.readouterr()
    path = ROOT / name if name.endswith(".py") else inspect.getfile(importlib.import_module(name))
    runpy.run_path(str(path), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.slow
def test_the_stages_run_and_end_as_on_the_cpu(made, tmp_path):
    """Without dropout, and with the same random numbers, the losses are those of the CPU to rounding."""
    for module, name, settings in ((train_sft, "sft", SIZES), (train_rm, "rm", RM)):
        given = {"data": str(made / "data"), "out": str(tmp_path), "device": "cpu"}
        module.main(module.Config(**given | settings))
        here, there = (lines(folder / f"{name}.log.jsonl")[1:] for folder in (tmp_path, made / "out"))
        for a, b in zip(here, there, strict=True):
            numbers = ({k: x for k, x in line.get("report", line).items() if "loss" in k} for line in (a, b))
            assert next(numbers) == pytest.approx(next(numbers), rel=0.02)
    report = lines(made / "out/ppo.log.jsonl")[-1]["report"]
    assert report["length"] > 1 and report["update"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["mean", "max", "token"])
def test_every_pool(made, tmp_path, pool):
    run(train_rm, made, out=str(tmp_path), sft=str(made / "out/sft.pt"), pool=pool, **RM)
    run(ppo, made, out=str(tmp_path), sft=str(made / "out/sft.pt"), rm=str(tmp_path / "rm.pt"), **PPO)


@pytest.mark.slow
def test_the_other_ways_of_ppo(made, tmp_path):
    """A second reward model, a function, demonstrations mixed in, a KL target, recomputed blocks, dropout."""
    given = {"sft": str(made / "out/sft.pt"), "out": str(tmp_path), **PPO}
    run(ppo, made, rm=str(made / "out/rm.pt"), judge=str(made / "out/rm.pt"), ptx_coef=0.5, kl_target=2.0,
        micro_batch=60, checkpoint_activations=True, **{k: x for k, x in given.items() if k != "micro_batch"})
    (tmp_path / "reward.py").write_text("def count(prompts, responses):\n"
                                        "    return [float(text.count('a')) for text in responses]\n")
    run(ppo, made, reward=f"{tmp_path / 'reward.py'}:count", **given)
    run(train_sft, made, **SIZES | {"out": str(tmp_path), "dropout": 0.1, "epochs": 1.0})


class Killed(BaseException):
    pass


def killed_at(monkeypatch, step):
    """The process is gone after so many steps, at most the last saved state is left."""
    shipped = Run.after

    def after(run, now, *last):
        shipped(run, now, *last)
        if now == step:
            raise Killed
    monkeypatch.setattr(Run, "after", after)


@pytest.mark.slow
@pytest.mark.parametrize("module, settings", [
    (train_sft, SIZES | {"epochs": 2.0}), (train_rm, RM | {"batch_tokens": 200}),
    (ppo, PPO | {"ptx_coef": 0.5})], ids=["sft", "rm", "ppo"])
def test_a_resumed_run_ends_with_the_same_bits(made, tmp_path, monkeypatch, module, settings):
    """Weights, moments of the optimizers, generators of the device: all go back to where they were."""
    name = {train_sft: "sft", train_rm: "rm", ppo: "ppo"}[module]
    results = []
    for out in ("straight", "killed"):
        files = {} if module is train_sft else {"sft": str(made / "out/sft.pt")}
        files |= {"rm": str(made / "out/rm.pt")} if module is ppo else {}
        given = settings | files | {"out": str(tmp_path / out), "save_every": 1}
        if out == "killed":
            with monkeypatch.context() as patch, pytest.raises(Killed):
                killed_at(patch, 2)
                run(module, made, **given)
            given["resume"] = True
        run(module, made, **given)
        results.append((tmp_path / out / f"{name}.log.jsonl").read_text().splitlines()[1:])
    assert results[0] == results[1]
    model = RewardModel if module is train_rm else GPT
    assert same_weights(*(load(model, tmp_path / out / f"{name}.pt") for out in ("straight", "killed")))


@pytest.mark.slow
def test_the_tools(made, tmp_path, monkeypatch, capsys):
    do = partial(script, monkeypatch, capsys)
    out, data = made / "out", made / "data"
    ckpt = ("--ckpt", out / "ppo.pt", "--max-new-tokens", "8")
    assert do("sample.py", *ckpt, "--n", "3", "--top-k", "5", "--top-p", "0.9", "x:").count("\n") >= 3
    assert "score" in do("sample.py", *ckpt, "--reward", out / "rm.pt", "--best-of", "4", "x:")
    table = do("sample.py", *ckpt, "--tokens", "--html", tmp_path / "page.html", "xy:")
    assert all(name in table for name in ("logp", "value", "adv", "entropy", "left out") [:4])
    assert "accuracy" in do("tools.score", data / "preferences_val.jsonl", "--rm", out / "rm.pt")
    assert "verdict" in do("tools.doctor", "--out", out)
    mine = tmp_path / "mine"
    mine.mkdir()
    jsonl(mine / "prompts.jsonl", [{"prompt": f"{i}:"} for i in range(20)])
    assert "answers" in do("tools.label", "--data", mine, "--ckpt", out / "sft.pt", "--judge", out / "rm.pt",
                           "--max-new-tokens", "8")
    assert lines(mine / "labels.jsonl")


# ---- planted device mistakes ----

ROWS = [([1, 2, 3, 4, 5], 2), ([3, 4, 7], 1)]
GROUPS = [Ranking([1], [[1, 2], [1, 3, 5], [1, 4]], [0, 1, 2], (), None, [1.0, 0.0, -1.0]),
          Ranking([2], [[2, 2, 6], [2, 3]], [1, 0], (), None)]


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def decode(new=9, first=lambda: None, **how):
    gpt, (tokens, lengths) = tiny_gpt(n_layer=1).to(DEVICE), pad([[1, 2, 3], [4, 5], [6], [7, 8]], DEVICE)
    first()
    return generate(gpt, tokens, lengths, new, generator=torch.Generator(DEVICE), **how)


def sft_step(micro_batch=100):
    gpt = tiny_gpt().to(DEVICE)
    optimizer = adam(gpt)
    parts, count = train_sft.sft_backward(gpt, ROWS, micro_batch, DEVICE)
    return clip_and_step(gpt, optimizer, 1.0, 1, parts)["loss"] / count


def rm_step(micro_batch=100, pool="last"):
    rm = RewardModel.from_gpt(tiny_gpt(), pool).to(DEVICE)
    optimizer = adam(rm)
    return clip_and_step(rm, optimizer, 1.0, 1, train_rm.ranking_backward(rm, GROUPS, micro_batch, DEVICE))


def rollout(cfg):
    """The models and a rollout that is ready for `improve`."""
    gpt = tiny_gpt(n_layer=1)
    policy, ref = copy.deepcopy(gpt).to(DEVICE), copy.deepcopy(gpt).to(DEVICE)
    rm, critic = (RewardModel.from_gpt(gpt).eval().to(DEVICE) for _ in range(2))
    models = Models(policy, ref, critic, model_score(rm), None, None)
    batch = ppo.rollout(policy, [[1, 2, 3], [4, 5], [6], [7, 8]], 9, cfg, torch.Generator(DEVICE))
    return models, ppo.advantages(ppo.assess(batch, models, cfg), 0.1, 0.95)


def ppo_update(**flags):
    cfg = ppo.Config(**{"max_new_tokens": 6, "epochs": 1, "micro_batch": 1000} | flags)
    models, batch = rollout(cfg)
    return ppo.improve(models, [adam(models.policy), adam(models.critic)], batch, cfg, 1, gen(0))


def resumed_step():
    """A step after the optimizer's state was read from a file."""
    gpt = tiny_gpt().to(DEVICE)
    optimizer = adam(gpt)
    for saved in (None, True):
        if saved:
            lib.state.set_state(optimizer, tree_map(lambda x: x.cpu() if torch.is_tensor(x) else x,
                                                    get_state(optimizer)))
        clip_and_step(gpt, optimizer, 1.0, 1, train_sft.sft_backward(gpt, ROWS, 100, DEVICE)[0])


MISTAKES = [  # what runs, whose function, what it says, what it would say instead
    (sft_step, model.WholeText.__init__, "torch.arange(T, device=device)", "torch.arange(T)"),
    (decode, model.sample, "torch.zeros_like(logits, dtype=torch.bool)",
     "torch.zeros(logits.shape, dtype=torch.bool)"),
    (decode, Cache.__init__, "dtype=torch.long, device=device)", "dtype=torch.long)"),
    (decode, Cache.append, "x.new_zeros(B, H, self.S, D)", "torch.zeros(B, H, self.S, D)"),
    (decode, Cache.append, "torch.arange(B * H, device=x.device)", "torch.arange(B * H)"),
    (decode, Cache.append, "self.places[H], x.", "self.places[H].cpu(), x."),
    (decode, lib.generate._generate, "torch.arange(P, device=tokens.device)", "torch.arange(P)"),
    (decode, lib.generate._generate, "< lengths[:, None]", "< lengths[:, None].cpu()"),
    (decode, lib.generate._generate, "dtype=torch.bool, device=tokens.device)", "dtype=torch.bool)"),
    (decode, generate, "generator=generator", "generator=torch.Generator()"),
    (sft_step, train_sft.sft_batch, "tokens.to(device)", "tokens"),
    (sft_step, lib.common.to_host, "numbers).tolist()", "numbers).numpy().tolist()"),
    (rm_step, train_rm.ranking_loss, "device=s.device", "device=None"),
    (rm_step, train_rm.rating_loss, "device=scores.device", "device=None"),
    (partial(rm_step, pool="mean"), RewardModel.forward, "device=h.device", "device=None"),
    (partial(rm_step, pool="token"), RewardModel.__init__,
     "self.reward_token = nn.Parameter(torch.empty(self.config.d_model))",
     "self.reward_token = torch.empty(self.config.d_model)"),
    (ppo_update, ppo.rollout, "lengths.cpu()", "lengths"),
    (ppo_update, ppo.token_logps, "(mask.numel(), device=tokens.device)", "(mask.numel())"),
    (ppo_update, ppo.assess, "(tokens[:, :-1]).cpu()", "(tokens[:, :-1])"),
    (ppo_update, ppo.minibatch_backward, 'mask = b["mask"]', 'mask = held["mask"]'),
    (ppo_update, ppo.improve, "generator=generator", f'generator=torch.Generator("{DEVICE}")'),
    (ppo_update, lib.rewards.model_score, ".cpu()", ""),
    (resumed_step, lib.state.set_state, ".load_state_dict)(state)", """.load_state_dict)(state)
        for moments in part.state.values():
            moments["exp_avg"] = moments["exp_avg"].cpu()"""),
]


def plant(patch, function, old, new):
    """Say `new` where the function says `old`."""
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1
    source, module = source.replace(old, new), sys.modules[function.__module__]
    owner = module
    for name in function.__qualname__.split(".")[:-1]:
        owner = getattr(owner, name)
    made = {}
    if owner is not module:  # a method, whose super() needs its class
        source = f"def around(__class__):\n{textwrap.indent(source, '    ')}    return {function.__name__}"
    exec(compile(source, function.__module__, "exec"), vars(module), made)
    made = made["around"](owner) if owner is not module else made[function.__name__]
    for place in list(sys.modules.values()):  # wherever it was imported
        if getattr(place, function.__name__, None) is function and owner is module:
            patch.setattr(place, function.__name__, made)
    patch.setattr(owner, function.__name__, made)


@pytest.mark.parametrize("job, function, old, new", MISTAKES,
                         ids=[f"{function.__qualname__}: {old}" for _, function, old, _ in MISTAKES])
def test_a_device_mistake_is_caught(monkeypatch, job, function, old, new):
    plant(monkeypatch, function, old, new)
    with pytest.raises((RuntimeError, TypeError), match="same device|a generator of|numpy"):
        job(**({"top_p": 0.9} if job is decode else {}))


@pytest.mark.parametrize("job", [partial(decode, top_p=0.9), sft_step, rm_step, partial(rm_step, pool="mean"),
                                 partial(rm_step, pool="token"), ppo_update, resumed_step])
def test_without_a_mistake_there_is_no_alarm(job):
    job()


# ---- what the host waits for ----

def downs(seen):
    """Waits for something of the device, whatever for."""
    return sum(n for (what, _), n in seen.items() if what != "up")


def test_a_decode_step_waits_for_nothing_but_whether_all_are_done(gpu):
    """Which it asks at every 8th, and not at all where nothing can end; once in all for the longest text."""
    seen = {}
    for new in (7, 8, 17):
        for eos in (None, 99):
            decode(new, gpu.clear, eos=eos)
            seen[new, eos] = dict(gpu)
    assert all(x.pop(("item", "generate")) == 1 for x in seen.values())
    assert {k: x for k, x in seen.items() if x} == {
        (new, 99): {("nonzero", "_generate"): new // 8} for new in (8, 17)}


@pytest.mark.parametrize("seed", range(2))
def test_rows_that_end_are_dropped_there_and_the_tokens_are_those_of_the_cpu(gpu, monkeypatch, seed):
    """To the bit, though rows that ended draw on until the question is asked."""
    kept, shipped, made = {"cpu": [], DEVICE: []}, Cache.keep, []
    monkeypatch.setattr(Cache, "keep", lambda cache, rows: kept[str(rows.device)].append(len(rows))
                        or shipped(cache, rows))
    for device in kept:
        tokens, lengths = pad([[1, 2, 3], [4, 5], [6]] * 8, device)
        made.append(generate(tiny_gpt(seed, n_layer=1).to(device), tokens, lengths, 25, 3.0, eos=7,
                             generator=torch.Generator(device).manual_seed(seed)))
    (tokens, lengths), there = made
    assert torch.equal(there[0].cpu(), tokens) and torch.equal(there[1].cpu(), lengths)
    assert kept["cpu"] and kept[DEVICE] and set(kept[DEVICE]) <= set(range(1, 19))
    assert gpu["nonzero", "_generate"] == 3 and gpu["nonzero", "keep"] == 0


@pytest.mark.parametrize("micro_batch, pieces", [(100, 1), (5, 2)])
def test_an_sft_step_waits_once(gpu, micro_batch, pieces):
    """In so many micro-batches; each of them brings up its tokens, and where the completions are."""
    sft_step(micro_batch)
    assert downs(gpu) == gpu["down", "to_host"] == 1
    assert gpu["up", "places"] == gpu["up", "sft_batch"] == pieces


@pytest.mark.parametrize("micro_batch, pieces", [(100, 1), (9, 2)])
def test_a_reward_model_step_waits_once(gpu, micro_batch, pieces):
    rm_step(micro_batch)
    assert downs(gpu) == gpu["down", "to_host"] == 1
    assert gpu["up", "ranking_loss"] == gpu["up", "rating_loss"] == pieces and gpu["up", "pad"] == 2 * pieces


@pytest.mark.parametrize("micro_batch", [1000, 12])
@pytest.mark.parametrize("ptx", [0, 1])
def test_a_minibatch_of_ppo_waits_once_for_its_numbers_and_once_in_each_optimizer_step(gpu, micro_batch, ptx):
    """Once more for the loss of --ptx-coef; an update that the KL ends takes no step."""
    cfg = ppo.Config(max_new_tokens=6, epochs=1, minibatches=2, micro_batch=micro_batch, ptx_coef=0.5,
                     update_kl=9)
    models, batch = rollout(cfg)
    optimizers, ptx_rows = [adam(models.policy), adam(models.critic)], (lambda: ROWS) if ptx else None
    gpu.clear()
    ppo.improve(models, optimizers, batch, cfg, 1, gen(0), ptx_rows)
    assert downs(gpu) == gpu["down", "to_host"] == 2 * (3 + ptx)
    gpu.clear()
    far = {**batch, "logp": batch["logp"] - 9}
    ppo.improve(models, optimizers, far, cfg, 1, gen(0), ptx_rows)
    assert downs(gpu) == gpu["down", "to_host"] == 1


def test_a_rollout_lies_on_the_cpu(gpu):
    """So that what is reported of it, its texts and the order of micro-batches ask the device for nothing."""
    models, batch = rollout(ppo.Config(max_new_tokens=6, micro_batch=1000))
    assert all(x.device.type == "cpu" for x in batch.values())
    down = {name: n for (what, name), n in gpu.items() if what != "up" and name}
    # tokens, lengths, P and the longest of them; logp, ref_logp, value and score
    assert down == {"rollout": 3, "generate": 1, "assess": 3, "score": 1}


def test_numbers_of_a_step_are_summed_as_before(gpu):
    """In float64, part by part; NaN is one of them."""
    some = [torch.tensor(x) for x in (0.1, 0.2, 0.3)]
    one, two, three = (x.item() for x in some)
    made = to_host({"a": some, "b": [2 * x for x in some], "none": []})
    assert made == {"a": one + two + three, "b": 2 * one + 2 * two + 2 * three, "none": 0.0}
    with pytest.raises(UserError, match="step 3: non-finite loss; earlier"):
        gpt = tiny_gpt().to(DEVICE)
        gpt(torch.tensor([[1, 2]], device=DEVICE)).sum().backward()
        clip_and_step(gpt, None, 1.0, 3, {"loss": [on() * math.nan]})
