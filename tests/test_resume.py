"""A run that is killed at any moment and resumed ends with the same bits; stopping, full disks, other flags.

Each run here is a process of its own that receives a real signal. Starting Python and torch takes two
seconds, so one process (this file, run as a script) has loaded them and forks a child for each run: 20 ms.
"When" is measured in the child's own CPU time, so a busy machine changes nothing.
"""
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if not sys.platform.startswith("linux"):
    pytest.skip("reads a child's CPU clock, which is Linux's", allow_module_level=True)

from helpers import make_data

import lib.checks_rm
import ppo
import train_rm
import train_sft
from lib.common import Log
from lib.flags import cli
from lib.resume import Run, get_state

SCRIPTS = {"sft": train_sft, "rm": train_rm, "ppo": ppo}
pytestmark = pytest.mark.slow
SMALL = ["--data", "data", "--device", "cpu"]
FLAGS = {
    "sft": [*SMALL, *"--vocab-size 270 --n-layer 1 --n-head 2 --d-model 16 --block-size 32 "
            "--batch-tokens 64 --epochs 5 --dropout 0.1 --bpe-dropout 0.3 --save-every 3".split()],
    "rm": [*SMALL, *"--batch-tokens 128 --epochs 4 --dropout 0.1 --bpe-dropout 0.3 --save-every 3".split()],
    "ppo": [*SMALL, *"--updates 12 --batch 6 --max-new-tokens 8 --epochs 2 --minibatches 2 --micro-batch 64 "
            "--lr 3e-3 --critic-lr 3e-3 --kl-target 0.5 --kl-horizon 60 --ptx-coef 0.5 --show 0 "
            "--save-every 1".split()],
}


# ---- the process that forks ----

def child(job):
    """One run of a script from its command line; its state at the end goes to out/STAGE.last.pt."""
    os.chdir(job["folder"])
    module, shipped = SCRIPTS[job["stage"]], Run.finish
    output = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1), os.dup2(output, 2)
    sys.argv = [module.__name__ + ".py", *job["flags"]]

    def finish(run, *results, **samples):
        with suppress(RuntimeError):  # the disk is full
            torch.save({name: get_state(part) for name, part in run.parts.items()},
                       run.path.with_name(f"{job['stage']}.last.pt"))
        shipped(run, *results, **samples)
    Run.finish = finish
    if "stop_at" in job:
        stop_at(job["stop_at"], job["signal"])
    if "die_at" in job:
        die_at(job["die_at"], job["before"])
    if "disk" in job:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["disk"], job["disk"]))
    try:
        cli(module.main, module.Config)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) or end.code is None else print(end.code) or 1
    except BaseException:
        import traceback
        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    os._exit(code or 0)


def die_at(n, before):
    """SIGKILL before or after the n-th call that moves, deletes or syncs a file or writes to the log."""
    calls = iter(range(10**6))

    def deadly(shipped):
        def call(*args, **kwargs):
            now = next(calls) == n
            if now and before:
                os.kill(os.getpid(), signal.SIGKILL)
            result = shipped(*args, **kwargs)
            if now:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return call
    for owner, name in ((os, "replace"), (os, "fsync"), (os, "truncate"), (Path, "unlink"), (Log, "_write")):
        setattr(owner, name, deadly(getattr(owner, name)))


def stop_at(step, number):
    """The signal comes at the end of this step."""
    shipped = Run.after

    def after(run, now, *last):
        if now == step:
            os.kill(os.getpid(), number)
        shipped(run, now, *last)
    Run.after = after


def serve():
    import torch._dynamo  # an optimizer imports it at its first step, which takes a second
    for module in (train_sft, train_rm, lib.checks_rm):  # kills are to fall into the training
        module.check_model = lambda gpt: None
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background starts without
    for line in sys.stdin:
        job = json.loads(line)
        pid, used = os.fork(), 0.0
        if pid == 0:
            child(job)
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            try:
                used = time.clock_gettime(~pid << 3 | 2)  # clock_getcpuclockid(3): what the child has used
            except OSError:
                continue
            if used > job.get("after", 60):
                os.kill(pid, signal.SIGKILL)
                job["after"] = 60
            time.sleep(0.001)
        print(json.dumps([os.waitstatus_to_exitcode(ended[1]), used]), flush=True)


# ---- the tests ----

@pytest.fixture(scope="module")
def start():
    """start(folder, stage, *flags, after=None, ...) -> (exit code, what it printed, CPU seconds)"""
    with subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as server:
        def go(folder, stage, *flags, **job):
            job = {"folder": str(folder), "stage": stage, "flags": [*FLAGS[stage], *flags], **job}
            print(json.dumps(job), file=server.stdin, flush=True)
            code, seconds = json.loads(server.stdout.readline())
            return code, (folder / "output").read_text(), seconds
        yield go
        server.stdin.close()


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """A folder in which every stage ran uninterrupted, and how long each took."""
    folder = tmp_path_factory.mktemp("whole")
    make_data(folder / "data")
    seconds = {}
    for stage in SCRIPTS:
        code, text, seconds[stage] = start(folder, stage)
        assert code == 0, text
    return folder, seconds


@pytest.fixture
def fresh(whole, tmp_path):
    """fresh(stage) -> a folder with the data and the results of the stages before."""
    def make(stage, name="run"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        shutil.copytree(whole[0] / "data", tmp_path / name / "data")
        (tmp_path / name / "out").mkdir()
        for before in list(SCRIPTS)[: list(SCRIPTS).index(stage)]:
            shutil.copy(whole[0] / "out" / f"{before}.pt", tmp_path / name / "out")
        return tmp_path / name
    return make


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same(folder, whole, stage):
    ours = (f"{stage}.", "critic.") if stage == "ppo" else f"{stage}."
    made = [path.name for path in (whole / "out").iterdir() if path.name.startswith(ours)]
    assert {f"{stage}.pt", f"{stage}.log.jsonl", f"{stage}.finished.pt", f"{stage}.last.pt"} <= set(made)
    for name in set(made) - {f"{stage}.last.pt"}:  # also what a change of the script adds
        assert (folder / "out" / name).read_bytes() == (whole / "out" / name).read_bytes(), name
    a, b = (torch.load(x / "out" / f"{stage}.last.pt", weights_only=True) for x in (folder, whole))
    assert a.keys() == b.keys()
    assert not [name for name in a if not same(a[name], b[name])]
    assert not list((folder / "out").glob("*.part*")) and (folder / "out" / f"{stage}.finished.pt").exists()


@pytest.mark.parametrize("stage", SCRIPTS)
def test_B11_killed_twenty_times_and_resumed_is_the_same_to_the_bit(stage, start, whole, fresh):
    """SIGKILL at random moments until the run gets through, then a new run, until there were 20 kills."""
    rng, kills, resumed = random.Random(stage), 0, 0
    while kills < 20:
        folder, resume, code = fresh(stage), [], -9
        while code == -9:
            code, text, _ = start(folder, stage, *resume, after=rng.uniform(0.2, 1.0) * whole[1][stage])
            kills += code == -9
            resumed += "resuming after step" in text
            resume = ["--resume"] * (folder / "out" / f"{stage}.state.pt").exists()
        assert code == 0, text
        assert_same(folder, whole[0], stage)
    assert resumed >= 5


@pytest.mark.parametrize("before", [True, False])
def test_killed_at_every_write_nothing_is_lost(before, start, whole, fresh):
    """At any such call the result of the run before is still there, and --resume ends with the same bits."""
    short = ["--epochs", "0.4", "--save-every", "1"]
    expected = fresh("sft", "expected")
    assert start(expected, "sft", *short)[0] == 0
    for n in range(1000):
        folder = fresh("sft")
        shutil.copy(whole[0] / "out/sft.pt", folder / "out")
        code, text, _ = start(folder, "sft", *short, die_at=n, before=before)
        if code == 0:
            break
        assert code == -9, text
        assert any((folder / "out" / name).exists() for name in ("sft.pt", "sft.prev.pt"))
        for path in (folder / "out").glob("sft*.pt"):
            torch.load(path, weights_only=True)  # whole
        state = folder / "out/sft.state.pt", folder / "out/sft.finished.pt"
        code, text, _ = start(folder, "sft", *short, *["--resume"] * any(path.exists() for path in state))
        assert code == 0, text
        assert_same(folder, expected, "sft")
        assert (folder / "out/sft.prev.pt").read_bytes() == (whole[0] / "out/sft.pt").read_bytes()
    assert n > 20


@pytest.mark.parametrize("stage, number, code", [
    ("sft", signal.SIGINT, 130), ("rm", signal.SIGTERM, 143), ("ppo", signal.SIGINT, 130),
    ("ppo", signal.SIGTERM, 143)])
def test_stopped_by_hand(stage, number, code, start, whole, fresh):
    """It finishes the step and says how to continue; with --save-every 0 this is the only saved state."""
    folder = fresh(stage)
    got, text, _ = start(folder, stage, "--save-every", "0", stop_at=4, signal=number)
    assert got == code and "finishing this step" in text and "Traceback" not in text
    assert re.search(r"^stopped after step 4 of \d+; rerun with --resume to continue$", text, re.M)
    got, text, _ = start(folder, stage, "--save-every", "0", "--resume")
    assert got == 0, text
    # the log's first line holds save_every
    wanted, log = ((x / "out" / f"{stage}.log.jsonl").read_text() for x in (whole[0], folder))
    assert log.splitlines()[1:] == wanted.splitlines()[1:]
    (folder / "out" / f"{stage}.log.jsonl").write_text(wanted)
    assert_same(folder, whole[0], stage)


def test_a_full_disk_keeps_what_was_saved(start, whole, fresh):
    """No file may grow beyond a limit: first the state does not fit, then the result."""
    folder = fresh("sft")
    assert start(folder, "sft", stop_at=7, signal=signal.SIGTERM)[0] == 143
    state = folder / "out/sft.state.pt"
    good = state.read_bytes()
    code, text, _ = start(folder, "sft", "--resume", disk=len(good) // 2)
    last = text.splitlines()[-1]
    assert code == 1 and last.startswith("train_sft.py: out/sft.state.pt could not be written (")
    assert last.endswith("); earlier checkpoints are intact") and "Traceback" not in text
    assert state.read_bytes() == good and not list((folder / "out").glob("*.part*"))
    (folder / "out/sft.pt").write_bytes(earlier := (whole[0] / "out/sft.pt").read_bytes())
    code, text, _ = start(folder, "sft", "--resume", "--save-every", "0", disk=len(earlier) // 2)
    assert code == 1 and "out/sft.pt could not be written" in text
    assert (folder / "out/sft.pt").read_bytes() == earlier and not list((folder / "out").glob("*.part*"))
    assert start(folder, "sft", "--resume")[0] == 0
    assert_same(folder, whole[0], "sft")


@pytest.fixture
def stopped(start, whole, fresh):
    """A PPO run stopped after a few updates."""
    folder = fresh("ppo")
    assert start(folder, "ppo", stop_at=7, signal=signal.SIGTERM)[0] == 143
    return folder


def test_what_does_not_fit_is_refused_and_what_changes_nothing_is_not(stopped, start, whole):
    out = stopped / "out"
    code, text, _ = start(stopped, "ppo", "--resume", "--lr", "0.5", "--ptx-coef", "0.1")
    assert code == 1 and "different settings: --lr was 0.003, --ptx-coef was 0.5" in text
    was = torch.load(out / "ppo.state.pt", weights_only=True)
    elsewhere = was | {"start": was["start"] | {"--device": "cuda on a machine with 2 GPUs"}}
    torch.save(elsewhere, out / "ppo.state.pt")
    code, text, _ = start(stopped, "ppo", "--resume")
    assert code == 1 and "--device was cuda on a machine with 2 GPUs" in text
    torch.save(was, out / "ppo.state.pt")
    for name in ("data/prompts.jsonl", "out/rm.pt"):
        content = (stopped / name).read_bytes()
        (stopped / name).write_bytes(content + b"\n")
        code, text, _ = start(stopped, "ppo", "--resume")
        assert code == 1 and "different settings" in text
        assert f"{Path(name).name} was a file with CRC" in text
        (stopped / name).write_bytes(content)
    log = (out / "ppo.state.jsonl").read_bytes()
    for wrong in (log[:100], log[:-3] + b"xyz"):
        (out / "ppo.state.jsonl").write_bytes(wrong)
        code, text, _ = start(stopped, "ppo", "--resume")
        assert code == 1 and "out/ppo.state.jsonl is missing, or is not the log of that run" in text
    (out / "ppo.state.jsonl").write_bytes(log)
    state = (out / "ppo.state.pt").read_bytes()
    for content in (b"", b"nothing", state[: len(state) // 2], (out / "sft.pt").read_bytes()):
        (out / "ppo.state.pt").write_bytes(content)
        code, text, _ = start(stopped, "ppo", "--resume")
        assert code == 1 and "out/ppo.state.pt is not an onetrunk saved state, or is corrupt" in text
    (out / "ppo.state.pt").write_bytes(state)
    out.rename(stopped / "moved")
    code, text, _ = start(stopped, "ppo", "--resume", "--out", "moved", "--save-every", "5", "--show", "1")
    assert code == 0 and "resuming after step" in text, text
    (stopped / "out").mkdir(exist_ok=True)
    for name in ("ppo.pt", "ppo.log.jsonl"):
        assert (stopped / "moved" / name).read_bytes() == (whole[0] / "out" / name).read_bytes()


def test_nothing_to_resume_started_anew_and_finished(stopped, start, whole, fresh):
    empty = fresh("ppo", "empty")
    code, text, _ = start(empty, "ppo", "--resume")
    assert code == 1
    assert text.endswith("\nppo.py: --resume: there is no out/ppo.state.pt to resume from; drop --resume\n")
    out, unfinished = stopped / "out", (stopped / "out/ppo.state.pt").read_bytes()
    code, text, _ = start(stopped, "ppo")  # anew, over one that was stopped
    assert code == 0 and all(f"moved to out/ppo.state.prev.{end}" in text for end in ("pt", "jsonl"))
    assert (out / "ppo.state.prev.pt").read_bytes() == unfinished
    assert_same(stopped, whole[0], "ppo")
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".lock"}
    code, text, _ = start(stopped, "ppo", "--resume")
    assert code == 0 and "this run has finished; drop --resume to start a new one" in text
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".lock"} == before
    assert "--updates was 12" in start(stopped, "ppo", "--resume", "--updates", "20")[1]


if __name__ == "__main__":
    serve()
