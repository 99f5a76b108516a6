"""Two and three processes give the numbers of one, bit-equal replicas, exact resume; planted bugs are caught.

Importing torch takes seconds, so one process (this file, run as a script) has done it and forks the processes
of each run; only one test starts them with torchrun.
"""
import contextlib
import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if not sys.platform.startswith("linux"):
    pytest.skip("forks processes that have loaded torch", allow_module_level=True)

from helpers import ROOT, lines, make_data
from pretend_gpu import DEVICE, pretend_gpu

import lib.common
import ppo
import train_rm
import train_sft
from lib import ranks, report
from lib.flags import cli
from lib.resume import Run, get_state

pytestmark = pytest.mark.slow
SCRIPTS = {"sft": train_sft, "rm": train_rm, "ppo": ppo}
# without biases: the gradient of those of keys is 0, and Adam makes steps of its rounding
FLAGS = {"sft": "--vocab-size 270 --bpe-dropout 0.3 --n-layer 1 --n-head 2 --d-model 32 --block-size 32 "
                "--no-bias --dropout 0 --batch-tokens 200 --micro-batch 100 --epochs 5 --lr 1e-3",
         "rm": "--batch-tokens 500 --micro-batch 200 --epochs 5 --bpe-dropout 0.3 --lr 1e-3 --pool last",
         "ppo": "--updates 5 --batch 9 --max-new-tokens 8 --epochs 2 --minibatches 2 --micro-batch 100 "
                "--lr 1e-3 --critic-lr 1e-3 --ptx-coef 0.3 --kl-target 1 --show 1 --save-every 2"}


# ---- the process that forks ----

def child(job, rank):
    """Process `rank` of a run; the parts of its end go to out/STAGE.RANK.pt."""
    os.environ |= {} if job["count"] == 1 else {"TORCHELASTIC_RUN_ID": "none"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job["port"]), "RANK": str(rank),
                   "WORLD_SIZE": str(job["count"]), "LOCAL_RANK": str(rank)}
    os.chdir(job["folder"])
    output = os.open(f"output.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1), os.dup2(output, 2)
    module, shipped, after = SCRIPTS[job["stage"]], Run.finish, Run.after
    sys.argv = [module.__name__ + ".py", *job["flags"]]

    def finish(run, *results, **more):
        torch.save({name: get_state(part) for name, part in run.parts.items()},
                   Path(job["folder"], f"{job['stage']}.{rank}.pt"))
        shipped(run, *results, **more)

    def hit(run, step, *last):
        if rank == 1 and step == job["hit_at"]:
            os.kill(os.getpid(), job["signal"])
        after(run, step, *last)
    looks = itertools.count(1)

    def look(*args, **more):
        if rank == 1 and next(looks) == job["look_at"]:
            os.kill(os.getpid(), job["signal"])
        return evaluate(*args, **more)
    Run.finish = finish
    if "hit_at" in job:
        Run.after = hit
    if "look_at" in job:
        evaluate, report.evaluate = report.evaluate, look
    if "bug" in job:
        BUGS[job["bug"]]()
    there = contextlib.nullcontext()
    if "gpu" in job:  # gloo adds up its tensors, too
        start, ranks.start = ranks.start, lambda device: start(torch.device("cpu"))
        there = pretend_gpu()
    try:
        with there:
            cli(module.main, module.Config)
    except SystemExit as end:
        if not isinstance(end.code, (int, type(None))):
            print(end.code, file=sys.stderr, flush=True)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def fork_all(job):
    """The exit codes of the processes of a run; one that is there 30 s after the first has ended is killed,
    and its code is -9."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        job["port"] = free.getsockname()[1]
    pids = []
    for rank in range(job["count"]):
        pids.append(os.fork())
        if not pids[-1]:
            code = 99
            try:
                code = child(job, rank)
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
    codes, end = {}, math.inf
    while len(codes) < len(pids):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[pid] = os.waitstatus_to_exitcode(status)
            end = min(end, time.monotonic() + 30)
        elif time.monotonic() > end:
            end = math.inf
            for pid in set(pids) - set(codes):
                os.kill(pid, signal.SIGKILL)
        else:
            time.sleep(0.02)
    return [codes[pid] for pid in pids]


def inside(function, owner, name):
    """Put in place of owner.name what it is while `function` takes the place of ranks.total."""
    was, total = getattr(owner, name), ranks.total

    def wrapped(*args, **more):
        ranks.total = function
        try:
            return was(*args, **more)
        finally:
            ranks.total = total
    setattr(owner, name, wrapped)


def alone(x, op="SUM"):
    return x


def whiten_own_rows():
    def whiten(x, mask, shift_mean=True):
        mine, made = ranks.share(mask.sum(1).tolist()), torch.zeros_like(x)
        made[mine] = was(x[mine], mask[mine], shift_mean)
        return ranks.total(made)
    was, ppo.whiten = ppo.whiten, whiten


def seed_by_rank():
    cli_seed = sys.argv.index("--seed") + 1
    sys.argv[cli_seed] = str(int(sys.argv[cli_seed]) + int(os.environ["RANK"]))


def stop_alone():
    """The KL stop of each process by its own rows."""
    sys.argv += ["--update-kl", "1e-7"]
    inside(alone, ppo, "minibatch_backward")


BUGS = {"gradients are not added up": lambda: setattr(ranks, "add_gradients", alone),
        "whitening of a process's own rows": whiten_own_rows,
        "the KL stop and an update's numbers by own rows": lambda: inside(alone, ppo, "minibatch_backward"),
        "the same rows everywhere": lambda: setattr(ranks, "share", lambda tokens: list(range(len(tokens)))),
        "held-out loss of the first process's rows": lambda: inside(alone, train_sft, "evaluate"),
        "a seed for each process": seed_by_rank,
        "log-probs of own rows": lambda: inside(alone, ppo, "assess"),
        "scores of own rows": lambda: inside(alone, train_rm, "measure_pairs"),
        "loss of own rows": lambda: inside(alone, lib.common, "to_host")}


# ---- the tests ----

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data, and what one process makes of it in `one`."""
    folder = tmp_path_factory.mktemp("ranks")
    make_data(folder / "data", n=48)
    (folder / "reward.py").write_text("def a(prompts, responses):\n    print(len(prompts))\n"
                                      "    return [r.count('a') for r in responses]\n")
    assert run(folder, "start", "sft", 1, "--lr 8e-3 --epochs 8") == [0]  # where texts end, for the others
    for stage in SCRIPTS:
        assert run(folder, "one", stage, 1) == [0]
    return folder


def run(folder, out, stage, count, flags="", **job):
    """The exit codes of a run of `count` processes from `folder` into `out`."""
    (folder / out).mkdir(exist_ok=True)
    where = f"--data {folder}/data --out {folder}/{out} --seed 3 --device {job.get('gpu', 'cpu')}"
    if stage != "sft":
        where += f" --sft {folder}/start/sft.pt"
    if stage == "ppo" and "--reward" not in flags:
        where += f" --rm {folder}/one/rm.pt"
    job |= {"stage": stage, "count": count, "folder": str(folder / out),
            "flags": f"{FLAGS[stage]} {where} {flags}".split()}
    print(json.dumps(job), file=forker().stdin, flush=True)
    return json.loads(forker().stdout.readline())


@cache
def forker():
    """The process that forks; it ends with this one, whose end of the pipe is closed then."""
    return subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def differences(folder, one, many, stage, count):
    """What differs by more than 5e-6 (weights: a two-hundredth of a step of Adam; a Zen 4 rounds to 2e-6) or
    1e-4 of it (numbers of the log) between a run of one process and one of several, and to the bit between
    these."""
    weights = ended(folder, one, stage)
    others = [ended(folder, many, stage, rank) for rank in range(count)]
    found = [name for name, x in others[0].items() for other in others if not torch.equal(other[name], x)]
    for name, x in weights.items():
        # the head's bias drops out of every difference of scores: its gradient is rounding
        if name not in ("reward_head.bias", "shift") and (others[0][name] - x).abs().max() > 5e-6:
            found.append(f"{name}: {(others[0][name] - x).abs().max():.2g}")
    logs = [lines(folder / out / f"{stage}.log.jsonl")[1:] for out in (one, many)]
    pairs = [(x, y) for a, b in zip(*logs, strict=True) for x, y in zip(numbers(a), numbers(b), strict=True)]
    return found + [f"{x} is {y}" for x, y in pairs if x != pytest.approx(y, rel=1e-4, abs=1e-5)]


def ended(folder, out, stage, rank=0):
    """The weights at the end of a run, as one of its processes had them."""
    model = {"sft": "gpt", "rm": "rm", "ppo": "policy"}[stage]
    return torch.load(folder / out / f"{stage}.{rank}.pt", weights_only=True)[model]


def numbers(x):
    """All numbers in a line of a log, but for win rates: rounding turns a tie into a win."""
    if isinstance(x, dict):
        x = [part for name, part in x.items() if not name.endswith("win_rate")]
    if isinstance(x, list):
        return [y for part in x for y in numbers(part)]
    return [x] if isinstance(x, (int, float)) else []


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("stage", SCRIPTS)
def test_several_give_the_numbers_of_one(folder, stage, count):
    out = f"{count}"
    assert run(folder, out, stage, count) == [0] * count
    assert differences(folder, "one", out, stage, count) == []
    said = [(folder / out / f"output.{rank}").read_text() for rank in range(count)]
    table = (folder / "one/output.0").read_text().splitlines() if stage == "ppo" else []
    assert f"on cpu, {count} processes, threads: 1" in said[0] and said[1:] == [""] * (count - 1)
    assert all(line in said[0] for line in table if line.startswith(("SFT  ", "PPO  ")))  # to the last digit


@pytest.mark.skipif(not hasattr(torch._C, "_acc"), reason="devices in Python came with torch 2.10")
@pytest.mark.parametrize("stage", SCRIPTS)
def test_on_the_pretend_gpu(folder, stage):
    """Nothing that is summed was left on the other side."""
    assert run(folder, "gpu1", stage, 1, gpu=DEVICE) + run(folder, "gpu2", stage, 2, gpu=DEVICE) == [0] * 3
    assert differences(folder, "gpu1", "gpu2", stage, 2) == []


def test_a_reward_function_is_asked_by_the_first(folder):
    flags = f"--reward {folder}/reward.py:a"
    assert run(folder, "r1", "ppo", 1, flags) + run(folder, "r2", "ppo", 2, flags) == [0] * 3
    assert differences(folder, "r1", "r2", "ppo", 2) == []
    asked = [(folder / out / "output.0").read_text().count("\n9\n") for out in ("r1", "r2")]
    assert asked[0] == asked[1] > 4 and not (folder / "r2/output.1").read_text()


def test_a_reward_function_may_use_code_of_ours(folder):
    """Which would wait for the others, and they do not run it."""
    (folder / "ours.py").write_text(
        "from lib.rewards import score_rows\nfrom lib.checkpoint import load\nfrom model import RewardModel\n"
        f"rm = load(RewardModel, '{folder}/one/rm.pt')\n"
        "def score(prompts, responses):\n"
        "    return score_rows(rm, [[*r.encode()] or [0] for r in responses], 99, 'cpu').tolist()\n")
    flags = f"--reward {folder}/ours.py:score"
    assert run(folder, "own1", "ppo", 1, flags) + run(folder, "own2", "ppo", 2, flags) == [0] * 3
    assert differences(folder, "own1", "own2", "ppo", 2) == []


def test_a_signal_to_one_between_steps_loses_nothing(folder):
    """Process 1 ends at once; the first has no state yet, and saves it."""
    flags = "--updates 12 --save-every 0"
    assert run(folder, "look", "ppo", 2, flags, look_at=2, signal=signal.SIGTERM) == [1, 143]
    assert "step 10 of 12 is saved" in (folder / "look/output.0").read_text()
    assert run(folder, "look", "ppo", 2, flags + " --resume") == [0, 0]


def test_more_processes_than_rows(folder):
    flags = "--batch 2 --minibatches 2 --eval-prompts 2"
    assert run(folder, "few1", "ppo", 1, flags) + run(folder, "few3", "ppo", 3, flags) == [0] * 4
    assert differences(folder, "few1", "few3", "ppo", 3) == []


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(folder, bug):
    stage = {"gradients": "rm", "held-out": "sft", "loss of": "sft", "scores of": "rm"}
    stage = next((x for start, x in stage.items() if bug.startswith(start)), "ppo")
    out = "bug" + str([*BUGS].index(bug))
    codes = run(folder, out, stage, 2, bug=bug)
    assert codes != [0, 0] or differences(folder, "one", out, stage, 2)


@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_process_that_is_killed_ends_all_and_resume_is_exact(folder, stage):
    out = f"killed_{stage}"
    assert run(folder, f"whole_{stage}", stage, 2, "--save-every 2") == [0, 0]
    assert run(folder, out, stage, 2, "--save-every 2", hit_at=3, signal=signal.SIGKILL) == [1, -9]
    assert "another process of this run has ended" in (folder / out / "output.0").read_text()
    assert run(folder, out, stage, 2, "--save-every 2 --resume") == [0, 0]
    assert "resuming after step 2 of" in (folder / out / "output.0").read_text()
    assert_same_bits(folder, out, f"whole_{stage}", stage)


def test_a_signal_to_one_stops_all_after_the_step(folder):
    assert run(folder, "whole", "sft", 2, "--dropout 0.1") == [0, 0]
    assert run(folder, "hit", "sft", 2, "--dropout 0.1", hit_at=4, signal=signal.SIGTERM) == [143, 143]
    assert "stopped after step 4" in (folder / "hit/output.0").read_text()
    assert run(folder, "hit", "sft", 1, "--dropout 0.1 --resume") == [1]
    assert "started with 2, and this is 1" in (folder / "hit/output.0").read_text()
    assert run(folder, "hit", "sft", 2, "--dropout 0.1 --resume") == [0, 0]
    assert_same_bits(folder, "hit", "whole", "sft")


def test_resume_with_another_number_says_that_it_rounds(folder):
    assert run(folder, "more", "sft", 2, hit_at=4, signal=signal.SIGTERM) == [143, 143]
    assert run(folder, "more", "sft", 3, "--resume") == [0, 0, 0]
    assert "with another number of processes than before (2)" in (folder / "more/output.0").read_text()
    assert differences(folder, "one", "more", "sft", 3) == []


def test_dropout_differs_between_processes(folder):
    """Else half of the rows would be trained with the other half's masks."""
    assert run(folder, "drop", "sft", 2, "--dropout 0.5 --epochs 1") == [0, 0]
    states = [torch.load(folder / f"drop/sft.{rank}.pt", weights_only=True) for rank in range(2)]
    assert not torch.equal(states[0]["rng0"], states[1]["rng0"])
    assert all(torch.equal(states[0]["gpt"][name], x) for name, x in states[1]["gpt"].items())


def assert_same_bits(folder, a, b, stage):
    assert lines(folder / a / f"{stage}.log.jsonl")[1:] == lines(folder / b / f"{stage}.log.jsonl")[1:]
    ends = [ended(folder, out, stage) for out in (a, b)]
    assert all(torch.equal(ends[0][name], x) for name, x in ends[1].items())


def test_torchrun_and_a_mistake(folder):
    """The output is that of one process, and a mistake is told by the first."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, ROOT / "train_sft.py", *FLAGS["sft"].split(), "--device", "cpu", "--epochs", "1"]
    env = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run([*command, "--data", folder / "data", "--out", folder / "run"], **env)
    assert done.returncode == 0 and done.stdout.count("train_sft.py: on cpu, 2 processes") == 1
    assert done.stdout.count("SFT done") == 1 and (folder / "run/sft.pt").exists()
    done = subprocess.run([*command, "--data", folder / "nothing", "--out", folder / "run"], **env)
    assert done.returncode == 1 and "train_sft.py, process 0 of 2: --data" in done.stderr


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_rows_are_dealt_out_once_and_evenly(monkeypatch, count):
    tokens = [(7 * i) % 90 + 1 for i in range(64)]
    monkeypatch.setattr(ranks, "COUNT", count)
    shares = []
    for rank in range(count):
        monkeypatch.setattr(ranks, "RANK", rank)
        shares.append(ranks.share(tokens))
    assert sorted(sum(shares, [])) == list(range(64))
    loads = [sum(tokens[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(tokens)


@pytest.mark.parametrize("local, gpus, chosen", [
    (None, 8, []), ("0", 8, []), ("3", 8, [3]), ("3", 2, []), ("3", 0, [])])
def test_each_process_takes_its_own_gpu_first(monkeypatch, local, gpus, chosen):
    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local:
        monkeypatch.setenv("LOCAL_RANK", local)
    ranks.own_gpu()
    assert taken == chosen


def test_a_parameter_without_a_gradient_anywhere_keeps_none(monkeypatch):
    """AdamW would otherwise let the weight decay shrink what no text has used."""
    monkeypatch.setattr(ranks, "COUNT", 2)
    others = torch.tensor([0.0, 0.0, 1.0, 5.0, 5.0, 0.0, 0.0, 1.0, 1.0])  # who has a gradient; gradients
    monkeypatch.setattr(ranks, "total", lambda x: x + others)
    model = torch.nn.ParameterList(torch.zeros(2) for _ in range(3))
    model[0].grad = torch.ones(2)
    ranks.add_gradients(model)
    assert [p.grad is None for p in model] == [False, True, False]
    assert model[0].grad.tolist() == [6, 6] and model[2].grad.tolist() == [1, 1]


if __name__ == "__main__":
    for job in sys.stdin:
        print(json.dumps(fork_all(json.loads(job))), flush=True)
