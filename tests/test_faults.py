"""Faults found in use, each once: tokens that differ by stage, work lost at the end of a run, two runs in one
folder, damaged files. The letters are those under which docs/method.md lists them."""
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import BYTES, CPU, PPO, ROOT, SIZES, jsonl, lines, make_data, tiny_gpt

import ppo
import sample
import train_rm
import train_sft
from data import files
from data.examples import encode_demonstrations, encode_prompts, encode_rankings, prompt_room
from data.files import UserError, atomic_file
from lib import report, resume, start
from lib.checkpoint import load, load_tokenizer, save
from lib.common import Log, set_lr
from lib.resume import Run
from lib.state import check_plain, check_state
from model import GPT, RewardModel
from tools import hf

pytestmark = pytest.mark.slow

ODD = ["", " ", "\n", "é漢🙂", "x" * 100, "a:", "\n\nHuman: hi\n\nAssistant:"]
RM = {"batch_tokens": 512, "epochs": 1.0, "device": "cpu", "max_new_tokens": 8}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with data and an SFT model of one step, as working directory."""
    monkeypatch.chdir(tmp_path)
    make_data(Path("data"), n=16)
    sft(epochs=0.1)
    return tmp_path


def sft(**flags):
    train_sft.main(train_sft.Config(data="data", **SIZES | flags))


def rm(**flags):
    train_rm.main(train_rm.Config(data="data", **RM | {"epochs": 0.5} | flags))


def ppo_main(**flags):
    ppo.main(ppo.Config(data="data", **PPO | {"show": 0} | flags))


def tree(path):
    return {file.name: file.read_bytes() for file in Path(path).iterdir() if file.name != ".lock"}


# ---- A: one text, one tokenisation ----

def test_A_odd_prompts_are_the_same_tokens_in_every_stage(folder, monkeypatch, capsys):
    jsonl(Path("data/prompts.jsonl"), [{"prompt": text} for text in ODD])
    jsonl(Path("data/prompts_val.jsonl"), [{"prompt": text} for text in ODD])
    expected = [(BYTES.encode(text) or [BYTES.eos])[-24:] for text in ODD]
    seen = {}
    monkeypatch.setattr(train_rm, "sample_texts", lambda gpt, prompts, *rest: seen.update(rm=prompts) or [])
    rm()
    monkeypatch.setattr(ppo, "check_start", lambda phases, models, prompts, *rest: seen.update(
        ppo=prompts))
    monkeypatch.setattr(report, "evaluate", lambda phases, prompts, *rest: seen.update(
        val=prompts) or exit(0))
    with pytest.raises(SystemExit):
        ppo_main()
    times = 128 // len(expected)  # the SFT model answers a few prompts several times
    assert seen == {"rm": expected * times, "ppo": expected, "val": expected}
    monkeypatch.setattr(sample, "generate", lambda gpt, tokens, lengths, *rest: (tokens, lengths))
    gpt = load(GPT, "out/sft.pt")
    for text, tokens in zip(ODD, expected, strict=True):
        args = sample_args("--max-new-tokens", "8", "--n", "1")
        assert sample.respond(gpt, BYTES, text, args, None)[0].tolist() == [tokens]


def sample_args(*argv):
    sys.argv = ["sample.py", *argv]
    return sample.read_args()


def test_A_prompt_tokens_are_alike_beside_a_response():
    for text in ODD:
        prompt = (BYTES.encode(text) or [BYTES.eos])[-(24 - 3):]
        [(row, P)] = encode_demonstrations([(text, "ab")], BYTES, 24, "")
        [ranking] = encode_rankings([(text, ["ab", "c"], [0, 1], None)], BYTES, 24, "")
        assert row[:P] == prompt == ranking.prompt == ranking.rows[1][:P] and P == len(prompt)
        assert encode_prompts([text], BYTES, prompt_room(24, 3), "") == [prompt]


def test_A_a_reward_token_leaves_sample_the_room_that_ppo_has(folder):
    gpt, args = load(GPT, "out/sft.pt"), sample_args("--max-new-tokens", "8")
    rm_ = RewardModel.from_gpt(gpt, "token")
    assert sample.longest_prompt(gpt, rm_, args) == prompt_room(rm_.room, 8) == 23


@pytest.mark.parametrize("ranks", [[0.1, 0.10000000001], [1700000001, 1700000002], [-1e30, -1e30 + 1e15]])
def test_C_ranks_order_as_they_are_written_beside_whatever_else(ranks):
    scores = torch.tensor([0.0, 1, 0, 1, 2])
    loss, _ = train_rm.ranking_loss(scores, [ranks, [1, 1, 2]])
    alone = [train_rm.ranking_loss(*some)[0] for some in ((scores[:2], [ranks]), (scores[2:], [[1, 1, 2]]))]
    assert alone[0].item() == pytest.approx(1.3133, abs=1e-3)
    assert loss.item() == pytest.approx(sum(alone).item() / 2)


# ---- F, G, Q: numbers ----

def test_F_a_result_that_is_not_finite_is_not_saved(folder, monkeypatch):
    before = tree("out")
    monkeypatch.setattr(train_sft, "evaluate", lambda *args: math.nan)
    with pytest.raises(UserError, match="non-finite"):
        sft(epochs=0.1)
    assert {name: data for name, data in tree("out").items() if name in before} == before
    gpt = tiny_gpt()
    with torch.no_grad():
        gpt.trunk.wpe.weight[3, 3] = math.inf
    with pytest.raises(UserError, match="wpe.weight holds non-finite"):
        save("x.pt", gpt, BYTES)
    assert not Path("x.pt").exists()


def test_F_scores_that_are_not_finite_end_the_reward_model(folder, monkeypatch):
    monkeypatch.setattr(RewardModel, "score", lambda rm, tokens, lengths: rm(tokens)[:, 0] * math.nan)
    monkeypatch.setattr(train_rm, "check_scores", lambda rm: None)
    monkeypatch.setattr(train_rm, "ranking_backward", lambda *args: [])
    monkeypatch.setattr(train_rm, "clip_and_step", lambda *args: dict.fromkeys(("loss", "accuracy"), 0.5))
    with pytest.raises(UserError, match="non-finite"):
        rm()
    assert not Path("out/rm.pt").exists()


def test_F_weights_that_became_nan_end_ppo_in_a_sentence(folder):
    rm()
    for flags, flag in (({"lr": 1e9}, "--lr"), ({"critic_lr": 1e9}, "--critic-lr")):
        with pytest.raises(UserError, match=f"non-finite.*try a smaller {flag}$"):
            ppo_main(**flags, updates=8, update_kl=1e9)


@pytest.mark.parametrize("steps", [1, 3, 10, 40, 1000])
def test_G_warm_up_is_at_most_a_tenth_of_the_steps(steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    rates = [set_lr(optimizer, 1.0, step, steps, warmup=20, floor=0.1) for step in range(steps)]
    peak = rates.index(max(rates))
    assert peak <= max(0, min(20, steps // 10)) and max(rates) > 0.9
    if steps == 1000:
        assert rates[9] == pytest.approx(0.5, rel=0.01)  # half way up


def test_Q_the_log_is_json_whatever_the_numbers_are(tmp_path):
    log = Log(tmp_path / "log", ppo.Config(clip=math.inf), 5)
    log(1, explained=math.nan, kl=-math.inf, n=3, first={"x": math.nan})
    log.report(length_correlation=math.nan, name="x")

    def refuse(constant):
        raise AssertionError(constant)
    rows = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "log").read_text().splitlines()]
    assert rows[0]["config"]["clip"] is None
    assert rows[1] == {"step": 1, "explained": None, "kl": None, "n": 3, "first": {"x": None}}


# ---- H: nothing is lost at the end of a run ----

@pytest.mark.parametrize("name", ["prompts.jsonl", "preferences_val.jsonl"])
def test_H_everything_is_read_before_the_first_step(folder, monkeypatch, name):
    with open(f"data/{name}", "a") as file:
        file.write("{broken\n")
    monkeypatch.setattr(train_rm, "ranking_backward", lambda *args: pytest.fail("a step was taken"))
    with pytest.raises(UserError, match=rf"{name}:\d+: not JSON"):
        rm()


@pytest.mark.parametrize("stage, evaluation", [
    (sft, (train_sft, "evaluate")), (rm, (train_rm, "report_pairs")), (ppo_main, (report, "evaluate"))])
def test_H_a_stop_in_the_last_evaluation_loses_nothing(folder, monkeypatch, stage, evaluation):
    if stage is ppo_main:
        rm()
    shipped, calls = getattr(*evaluation), []

    def interrupted(*args, **seed):
        calls.append(1)
        if len(calls) == 2 if stage is ppo_main else saved():  # PPO's first is before training
            raise KeyboardInterrupt
        return shipped(*args, **seed)

    def saved():  # at the last step only; SFT has looked at held-out data before
        return Path("out/sft.state.pt" if stage is sft else "out/rm.state.pt").exists()
    stage(out="whole") if stage is sft else None
    monkeypatch.setattr(*evaluation, interrupted)
    with pytest.raises(KeyboardInterrupt):
        stage(save_every=0)
    monkeypatch.setattr(*evaluation, shipped)
    name = {sft: "sft", rm: "rm", ppo_main: "ppo"}[stage]
    assert Path(f"out/{name}.state.pt").exists()
    stage(save_every=0, resume=True)
    assert Path(f"out/{name}.pt").exists() and not Path(f"out/{name}.state.pt").exists()
    if stage is sft:
        same = [load(GPT, f"{out}/sft.pt").state_dict() for out in ("out", "whole")]
        assert all(torch.equal(x, same[1][key]) for key, x in same[0].items())


def test_H_the_result_is_saved_before_the_table_is_printed(folder, monkeypatch):
    rm()

    def broken(*args):
        assert Path("out/ppo.pt").exists()
        raise UnicodeEncodeError("ascii", "é", 0, 1, "ordinal not in range")
    monkeypatch.setattr(report, "print_table", broken)
    with pytest.raises(UnicodeEncodeError):
        ppo_main()
    assert Path("out/ppo.finished.pt").exists()


def test_H_a_signal_when_the_last_state_did_not_fit_lets_the_result_be_written(folder, monkeypatch, capfd):
    def full(run, step):  # the one before may have fitted
        if step == run.log.steps:
            raise UserError("out/sft.state.pt could not be written (disk full)")
        saved(run, step)

    shipped, saved = Run.finish, Run.save_state
    monkeypatch.setattr(Run, "save_state", full)
    monkeypatch.setattr(Run, "finish", lambda *args: os.kill(os.getpid(), signal.SIGTERM) or shipped(*args))
    sft(out="new", save_every=1, batch_tokens=64)
    assert load(GPT, "new/sft.pt") and "writing the result" in capfd.readouterr().err


# ---- I: output ----

SCRIPT = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch
torch.set_num_threads(1)
import train_sft
from lib.flags import cli
sys.argv = ["train_sft.py", "--data", "data", "--tokenizer", "bytes", "--n-layer", "1", "--n-head", "2",
            "--d-model", "16", "--block-size", "32", "--device", "cpu", *{flags!r}]
cli(train_sft.main, train_sft.Config)
"""


def shell(command, *flags, env=None):
    """Run train_sft.py by a shell; in `command`, RUN is the call."""
    call = Path("call.py")
    call.write_text(SCRIPT.format(root=str(ROOT), tests=str(ROOT / "tests"), flags=list(flags)))
    command = command.replace("RUN", f"{sys.executable} call.py")
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120,
                          env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}))


@pytest.mark.parametrize("command", [
    "RUN > /dev/full", "RUN >&-", "RUN 2>&-", "RUN <&- >&- 2>&-", "RUN | head -1", "RUN 2>&1 | head -c 1",
    "PYTHONIOENCODING=ascii RUN"])
def test_I_printing_never_decides_about_saving(folder, command):
    jsonl(Path("data/sft_val.jsonl"), [{"prompt": "é🙂:", "completion": "漢\x1b"}] * 2)
    result = shell(f"set -o pipefail; {command}", "--epochs", "4", "--out", "new", "--batch-tokens", "64")
    assert result.returncode == 0, result.stderr
    assert Path("new/sft.pt").exists() and Path("new/sft.log.jsonl").exists()
    lines(Path("new/sft.log.jsonl"))
    assert "Traceback" not in result.stderr and "Exception" not in result.stderr


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("streams", ["> /dev/null", "2>&-", "2>&1 | true"])
def test_I_a_signal_saves_whatever_became_of_the_output(folder, number, streams):
    command = f"(echo $BASHPID > pid; exec {sys.executable} call.py) {streams}"
    Path("call.py").write_text(SCRIPT.format(root=str(ROOT), tests=str(ROOT / "tests"), flags=[
        "--epochs", "5000", "--out", "new", "--batch-tokens", "64", "--save-every", "0"]))
    process = subprocess.Popen(  # though what is started in the background, or by nohup, ignores some
        ["bash", "-c", command], stderr=subprocess.DEVNULL, start_new_session=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))
    deadline = time.monotonic() + 300  # other work on the machine may slow the start
    try:
        while not (Path("new/sft.state.jsonl").exists() and len(lines(Path("new/sft.state.jsonl"))) > 1):
            assert time.monotonic() < deadline and process.poll() in (None, 0)
            time.sleep(0.05)
        pid = int(Path("pid").read_text())
        os.kill(pid, number)
        while Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert Path("new/sft.state.pt").exists()
    assert all(set(row) & {"config", "step"} for row in lines(Path("new/sft.state.jsonl")))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_I_a_child_that_is_forked_dies_of_a_signal(folder, number):
    """multiprocessing.Pool ends its workers so; one that lived on would be waited for without end."""
    run = Run("sft", train_sft.Config(out="new"), [], CPU)
    old = signal.signal(number, signal.SIG_DFL)
    run.begin(run.cfg, 10, now={"x": 1.0})
    ready, tell = os.pipe()
    try:
        if not (pid := os.fork()):
            os.write(tell, b"x")
            time.sleep(20)
            os._exit(0)
        os.read(ready, 1)
        os.kill(pid, number)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -number
        assert run.caught == 0
        os.kill(os.getpid(), number)
        assert run.caught == number
    finally:
        run._restore_handlers()
        signal.signal(number, old)


# ---- J: generations ----

def test_J_failing_starts_leave_the_last_generation_alone(folder, monkeypatch):
    before = tree("out")
    assert set(before) == {"sft.pt", "sft.log.jsonl", "sft.finished.pt"}
    shipped = train_sft.sft_backward
    for fail in (RuntimeError, UserError, KeyboardInterrupt):
        monkeypatch.setattr(train_sft, "sft_backward", lambda *args, fail=fail: (_ for _ in ()).throw(fail()))
        with pytest.raises(fail):
            sft(seed=2)
    assert {name: data for name, data in tree("out").items() if name in before} == before
    monkeypatch.setattr(train_sft, "sft_backward", shipped)
    sft(seed=2, epochs=0.1)
    after = tree("out")
    assert {name: after[name.replace("sft.", "sft.prev.", 1) if name == "sft.pt" else
                         name.replace(".log", ".log.prev").replace(".finished", ".finished.prev")] == data
            for name, data in before.items()} == dict.fromkeys(before, True)
    assert after["sft.pt"] != before["sft.pt"]


def test_J_failing_starts_keep_the_log_of_an_unfinished_run(folder, monkeypatch):
    shipped, calls = train_sft.sft_backward, []

    def fails_later(*args):
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return shipped(*args)
    monkeypatch.setattr(train_sft, "sft_backward", fails_later)
    with pytest.raises(KeyboardInterrupt):
        sft(out="new", batch_tokens=64, save_every=1)
    state, log = (Path(f"new/sft.state.{end}").read_bytes() for end in ("pt", "jsonl"))
    for _ in range(2):  # calls stay above 3: no step is made
        with pytest.raises(KeyboardInterrupt):
            sft(out="new", batch_tokens=64, save_every=1)
    assert Path("new/sft.state.prev.pt").read_bytes() == state
    assert Path("new/sft.state.prev.jsonl").read_bytes() == log


def test_J_a_corrupt_mark_does_not_keep_the_new_result_from_being_written(folder):
    Path("out/sft.finished.pt").write_bytes(b"not a mark")
    sft(epochs=0.1, seed=2)
    assert Path("out/sft.finished.prev.pt").read_bytes() == b"not a mark" and Path("out/sft.prev.pt").exists()


def test_J_a_generation_stays_together_when_a_run_is_repeated(folder):
    for seed in (1, 2, 2):
        sft(out="new", epochs=0.1, seed=seed)
    names = ("new/sft.pt", "new/sft.log.jsonl", "new/sft.finished.pt")
    before = ("new/sft.prev.pt", "new/sft.log.prev.jsonl", "new/sft.finished.prev.pt")
    for a, b in zip(names, before, strict=True):
        assert Path(a).read_bytes() == Path(b).read_bytes(), a


# ---- K, L: one run a folder, and no file that is read is written ----

def test_K_a_second_run_says_who_holds_the_folder(folder):
    code = (f"import sys, time; sys.path[:0] = [{str(ROOT)!r}]; "
            "from pathlib import Path; from lib.resume import lock; "
            "held = lock(Path('out')); print('held', flush=True); time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        before = tree("out")
        for flags in ({}, {"resume": True}):
            with pytest.raises(UserError, match=f"--out out is in use by process {other.pid}"):
                sft(**flags)
        with pytest.raises(UserError, match="in use"):
            rm()
        assert tree("out") == before
        load(GPT, "out/sft.pt")  # readers need no lock
        other.kill()
    sft(epochs=0.1)  # released by the kernel


def test_K_a_forked_child_does_not_hold_the_folder(folder):
    held = resume.lock(Path("new"))
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    held.close()
    try:
        code = (f"import sys; sys.path[:0] = [{str(ROOT)!r}]; "
                "from pathlib import Path; from lib.resume import lock; lock(Path('new'))")
        subprocess.run([sys.executable, "-c", code], check=True)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_L_a_run_does_not_read_what_it_writes(folder):
    before = tree("out")
    for flags in ({"init": "out/sft.pt"}, {"init": "out/../out/sft.pt"}, {"tokenizer": "out/sft.log.jsonl"}):
        with pytest.raises(UserError, match="is read by this run, and .* is written by it"):
            train_sft.main(train_sft.Config(data="data", device="cpu", **flags))
    os.symlink("out/sft.pt", "link.pt")
    with pytest.raises(UserError, match="link.pt is read by this run"):
        train_sft.main(train_sft.Config(data="data", device="cpu", init="link.pt"))
    assert tree("out") == before


def test_L_a_folder_may_be_spelled_in_other_ways_on_resume(folder, monkeypatch):
    monkeypatch.setattr(Run, "finish", lambda *args, **more: exit(3))
    with pytest.raises(SystemExit):
        sft(out="a/new")
    os.symlink("a/new", "link")
    for data, out in (("data/", "a/new/"), (str(folder / "data"), str(folder / "a/new")), ("./data", "link")):
        with pytest.raises(SystemExit) as end:
            train_sft.main(train_sft.Config(data=data, out=out, resume=True, **SIZES))
        assert end.value.code == 3
    with pytest.raises(UserError, match="--out is empty"):
        sft(out="")


def test_L_data_and_results_may_share_a_folder(folder):
    before = tree("data")
    sft(out="data", epochs=0.1)
    rm(out="data")
    ppo_main(out="data", updates=1)
    after = tree("data")
    assert all(after[name] == data for name, data in before.items())


# ---- M, N, O: damaged files ----

def test_M_no_flipped_bit_changes_a_weight_in_silence(tmp_path):
    path, gpt, rng = tmp_path / "x.pt", tiny_gpt(n_layer=1), random.Random(0)
    rm_ = RewardModel.from_gpt(gpt)
    for model, kind in ((tiny_gpt(n_layer=1, vocab_size=257), GPT), (rm_, RewardModel)):
        save(path, model, BYTES) if kind is GPT else save(path, RewardModel.from_gpt(
            tiny_gpt(n_layer=1, vocab_size=257)), BYTES)
        whole, weights = path.read_bytes(), load(kind, path).state_dict()
        for _ in range(60):
            data = bytearray(whole)
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
            try:
                found = load(kind, path).state_dict()
            except UserError:
                continue
            assert all(torch.equal(found[name], x) for name, x in weights.items())
        path.write_bytes(whole)
        path.unlink()


def test_M_of_a_file_written_twice_no_half_goes_unchecked(tmp_path):
    """zipfile reads the last of two archives in a file, torch.load the first."""
    path = tmp_path / "x.pt"
    save(path, tiny_gpt(n_layer=1, vocab_size=257), BYTES)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 64
    for data in (bytes(flipped) + whole, whole + whole, whole[:500] + whole):
        path.write_bytes(data)
        with pytest.raises(UserError, match="is corrupt"):
            load(GPT, path)


def test_M_no_weight_is_read_from_beyond_its_record(tmp_path):
    path, gpt = tmp_path / "x.pt", tiny_gpt(n_layer=1, vocab_size=257)
    save(path, gpt, BYTES)
    with zipfile.ZipFile(path) as file:
        records = {name: file.read(name) for name in file.namelist()}
    bias = next(name for name, data in records.items() if "/data/" in name and not any(data))
    with zipfile.ZipFile(path, "w") as file:
        for name, data in records.items():
            file.writestr(name, data[:-2] if name == bias else data)
    with pytest.raises(UserError, match="is corrupt"):
        load(GPT, path)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A folder with a saved state of each stage, stopped after a step."""
    where = tmp_path_factory.mktemp("stopped")
    old = os.getcwd()
    os.chdir(where)
    make_data(Path("data"), n=16)
    patch = pytest.MonkeyPatch()
    for name, stage in (("sft", sft), ("rm", rm), ("ppo", ppo_main)):
        with patch.context() as m:
            m.setattr(Run, "finish", lambda *args, **more: exit(3))
            with pytest.raises(SystemExit):
                stage(epochs=1 if name == "ppo" else 0.1, save_every=1, out=f"{name}_out")
        stage(epochs=1 if name == "ppo" else 0.1, out=f"{name}_whole")
        for later in ("rm", "ppo"):
            for end in ("_out", "_whole"):
                Path(later + end).mkdir(exist_ok=True)
                Path(f"{later}{end}/{name}.pt").write_bytes(Path(f"{name}_whole/{name}.pt").read_bytes())
    os.chdir(old)
    return where


def changes(state):
    """[(what, changed state)]: one wrong thing at a time."""
    def put(where, value):
        import copy
        new = copy.deepcopy(state)
        at = new
        for key in where[:-1]:
            at = at[key]
        at[where[-1]] = value
        return f"{'.'.join(map(str, where))} = {str(value)[:20]}", new

    for x in (-1, "3", None, 10**9, 2.0, True, [], torch.tensor(1)):
        yield put(["step"], x)
    for x in (-1, "3", None, 10**9, 2.0, [], torch.tensor(1), state["step"] - 1):
        yield put(["steps"], x)
    for x in (None, [], {}, "x", 3, {"x": 1}):
        yield put(["parts"], x)
    for x in (None, -1, "x", {}, {"size": -1, "crc": 0}, {"size": "1", "crc": 0}, {"size": 10**9, "crc": 0}):
        yield put(["log"], x)
    yield put(["start"], None)
    yield put(["start", "--seed"], torch.zeros(3))
    for x in (0, state["step"] - 1, state["step"] + 1):
        yield put(["step"], x)
    for name, part in state["parts"].items():
        for x in (None, 3, [], {}, "x", torch.zeros(3), {"left": None}, {"left": [10**9]}, {"left": [-1]}):
            yield put(["parts", name], x)
        if "optimizer" in name:
            first = next(iter(part["state"]))
            for x in (torch.zeros(3), None, torch.zeros(2, 2, dtype=torch.long), 0.5):
                yield put(["parts", name, "state", first, "exp_avg"], x)
            yield put(["parts", name, "state", first, "exp_avg_sq"],
                      torch.full_like(part["state"][first]["exp_avg_sq"], -1.0))
            yield put(["parts", name, "state", 999], part["state"][first])
            yield put(["parts", name, "state", first, "step"], torch.tensor(0.0))
            yield put(["parts", name, "param_groups"], [])
            for key, x in (("betas", None), ("eps", "x"), ("lr", math.nan), ("lr", torch.tensor(7.0)),
                           ("params", [5]), ("fused", None)):
                yield put(["parts", name, "param_groups", 0, key], x)
    for name, x in state["probes"].items():
        for wrong in (None, "x", x[:1], x * 1.1, x * math.nan):
            yield put(["probes", name], wrong)
    yield put(["probes"], None)
    if "now" in state["parts"]:
        for x in (None, "x", math.nan, [1]):
            yield put(["parts", "now", "kl_coef"], x)


@pytest.mark.parametrize("name, stage", [("sft", sft), ("rm", rm), ("ppo", ppo_main)])
def test_N_a_state_is_checked_before_anything_is_loaded(stopped, monkeypatch, name, stage):
    monkeypatch.chdir(stopped)
    path = Path(f"{name}_out/{name}.state.pt")
    whole = path.read_bytes()
    flags = {"epochs": 1 if name == "ppo" else 0.1, "out": f"{name}_out", "resume": True}
    for module in (train_sft, train_rm):
        monkeypatch.setattr(module, "shuffled", lambda **plan: pytest.fail("the run went on"))
    monkeypatch.setattr(ppo, "improve", lambda *args: pytest.fail("the run went on"))
    monkeypatch.setattr(report, "evaluate", lambda *args: {"texts": [], "score": [0.0]})
    monkeypatch.setattr(ppo, "check_start", lambda *args: None)
    monkeypatch.setattr(Run, "finish", lambda *args, **more: pytest.fail("the run went on"))
    for what, state in changes(torch.load(path, weights_only=True)):
        torch.save(state, path)
        with pytest.raises(UserError) as error:
            stage(**flags)
        assert "state.pt" in str(error.value) or "--resume" in str(error.value), what
    path.write_bytes(whole)
    log = Path(f"{name}_out/{name}.state.jsonl")
    text = log.read_bytes()
    log.write_bytes(b"x" * len(text))
    with pytest.raises(UserError, match="is not the log of that run"):
        stage(**flags)
    log.write_bytes(text)


def test_a_state_from_before_a_flag_existed_is_resumed_at_its_default(stopped, monkeypatch):
    monkeypatch.chdir(stopped)
    path = Path("sft_out/sft.state.pt")
    state = torch.load(path, weights_only=True)
    assert state["start"].pop("--bias") is True
    torch.save(state, path)
    with pytest.raises(UserError, match="different settings: --bias was True"):
        sft(epochs=0.1, out="sft_out", resume=True, bias=False)
    monkeypatch.setattr(train_sft, "shuffled", lambda **plan: pytest.exit("it goes on"))
    with pytest.raises(pytest.exit.Exception, match="it goes on"):
        sft(epochs=0.1, out="sft_out", resume=True)


@pytest.mark.parametrize("known", [True, False])
def test_a_run_does_not_go_on_by_other_rules(stopped, monkeypatch, known):
    """Whether its version had the flag, or not: then it was off."""
    monkeypatch.chdir(stopped)
    path, log = Path("sft_out/sft.state.pt"), Path("sft_out/sft.state.jsonl")
    if not known:
        first, rest = log.read_bytes().split(b"\n", 1)
        line = json.loads(first)
        assert line["config"].pop("bpe_dropout") == 0
        log.write_bytes(json.dumps(line).encode() + b"\n" + rest)
        print_of = resume.fingerprint(log, {"size": log.stat().st_size})
        torch.save(torch.load(path, weights_only=True) | {"log": print_of}, path)
    shipped = start.only_own_tokens
    monkeypatch.setattr(start, "only_own_tokens", lambda *args: shipped(*args) | {"bpe_dropout": 0.2})
    was = "0.0" if known else "None"
    with pytest.raises(UserError, match=f"rules for flags have changed .*--bpe-dropout was {was}, is 0.2;"):
        sft(epochs=0.1, out="sft_out", resume=True)
    monkeypatch.setattr(start, "only_own_tokens", shipped)
    monkeypatch.setattr(train_sft, "shuffled", lambda **plan: pytest.exit("it goes on"))
    with pytest.raises(pytest.exit.Exception, match="it goes on"):
        sft(epochs=0.1, out="sft_out", resume=True)


def doubled(n):
    """A list that holds another twice, and so on: 2**n places to print."""
    x = []
    for _ in range(n):
        x = [x, x]
    return x


def test_N_a_mark_that_prints_for_ever_is_no_mark(stopped, monkeypatch):
    class Begun(Exception):
        pass

    def begin(*args, **parts):
        raise Begun

    monkeypatch.chdir(stopped)
    monkeypatch.setattr(Run, "begin", begin)
    mark = Path("sft_out/sft.finished.pt")
    state = torch.load("sft_out/sft.state.pt", weights_only=True)
    torch.save({"start": state["start"], "step": doubled(60)}, mark)
    with pytest.raises(Begun):
        sft(epochs=0.1, out="sft_out", resume=True)
    mark.unlink()


@pytest.mark.parametrize("x", [doubled(60), 10**400, math.inf],
                         ids=["nested", "huge", "infinite"])
def test_N_a_number_that_is_none_is_refused(x):
    with pytest.raises(ValueError, match="numbers.kl"):
        check_plain({"kl": 1.0}, {"kl": x}, "numbers")


def test_N_settings_are_shown_in_brief(stopped, monkeypatch):
    monkeypatch.chdir(stopped)
    path = Path("sft_out/sft.state.pt")
    whole = path.read_bytes()
    state = torch.load(path, weights_only=True)
    torch.save(state | {"start": state["start"] | {"--seed": "1" * 10**6}}, path)
    with pytest.raises(UserError, match="--seed was 1111") as error:
        sft(epochs=0.1, out="sft_out", resume=True)
    assert len(str(error.value)) < 1000
    path.write_bytes(whole)


def test_N_a_part_without_gradient_in_some_steps_may_be_resumed():
    """As an expert that got no token: AdamW counts its steps apart."""
    used, idle = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = torch.optim.AdamW([used, idle], lr=0.1)
    for step in range(3):
        (used.sum() + (idle.sum() if step == 1 else 0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = optimizer.state_dict()
    assert [moments["step"] for moments in state["state"].values()] == [3, 1]
    check_state(torch.optim.AdamW([used, idle], lr=0.1), state, "optimizer")


def rewritten(path, **changed):
    data = torch.load(path, weights_only=True)
    torch.save(data | changed, path)


def test_O_a_checkpoint_that_does_not_fit_itself_is_refused(folder):
    path = Path("out/sft.pt")
    data, whole = torch.load(path, weights_only=True), path.read_bytes()
    rewritten(path, config=data["config"] | {"n_head": 4})
    with pytest.raises(UserError, match="other outputs"):
        load(GPT, path)
    path.write_bytes(whole)
    untied = dict(data["weights"]) | {"lm_head.weight": data["weights"]["lm_head.weight"] + 1}
    rewritten(path, weights=untied)
    with pytest.raises(UserError, match="shares its weights"):
        load(GPT, path)
    path.write_bytes(whole)
    for n in (250, 300):
        small = tiny_gpt(vocab_size=n)
        save(path, small, BYTES)
        with pytest.raises(UserError, match=f"its tokenizer: it has 257 tokens, and the network {n}"):
            load_tokenizer(path)


@pytest.mark.parametrize("rows", [None, "257", torch.ones(2), doubled(60)],
                         ids=["none", "text", "tensor", "nested"])
def test_O_a_network_that_does_not_say_its_size_is_refused(tmp_path, rows):
    """tools.hf reads the tokenizer first."""
    path = tmp_path / "x.pt"
    save(path, tiny_gpt(vocab_size=257), BYTES)
    config = torch.load(path, weights_only=True)["config"]
    del config["vocab_size"]
    rewritten(path, config=config if rows is None else config | {"vocab_size": rows})
    with pytest.raises(UserError, match="257 tokens, and the network does not say|is corrupt"):
        load_tokenizer(path)


def test_O_weights_that_are_a_huge_tensor_are_not_taken_apart(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    save(path, tiny_gpt(vocab_size=257), BYTES)
    rewritten(path, weights=torch.zeros(1).expand(10**4, 10**6))
    monkeypatch.setattr(torch.Tensor, "__iter__", lambda x: pytest.fail("it was taken apart"))
    with pytest.raises(UserError, match="is corrupt"):
        load(GPT, path)


@pytest.mark.parametrize("junk", [b"]", b"\x8f", b"}", b"(", b"K\x01", b"N"])
def test_O_a_pickle_that_eats_memory_is_refused_at_once(tmp_path, junk):
    path = tmp_path / "x.pt"
    for size in (2 * 10**6, 70 * 10**6):
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("archive/data.pkl", b"\x80\x02" + junk * (size // len(junk)) + b".")
            file.writestr("archive/version", "3\n")
        start = time.process_time()
        with pytest.raises(UserError, match="is not an onetrunk checkpoint"):
            load(GPT, path)
        assert time.process_time() - start < 10


# ---- P: writing beside ----

def doublings(n):
    """A pickled tuple that holds another twice, and so on: n + 1 objects, 2**n places."""
    number = [(10**6 + i).to_bytes(4, "little") for i in range(n + 1)]
    return b"(" * n + b")r" + number[0] + b"".join(
        b"j" + number[i] + b"tr" + number[i + 1] for i in range(n))


@pytest.mark.parametrize("name, read, says", [
    ("x.pt", lambda path: load(GPT, path), "is not an onetrunk checkpoint"),
    ("x.bin", hf.read_pickle, "holds more than tensors")])
@pytest.mark.parametrize("key", [doublings(60), b"cbuiltins\nbytearray\n(\x8a\x05\0\x9457\0tR"])
def test_O_a_pickle_that_takes_for_ever_is_refused_at_once(tmp_path, name, read, says, key):
    with zipfile.ZipFile(tmp_path / name, "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02}" + key + b"Ns.")
        file.writestr("archive/version", "3\n")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=says):
        read(tmp_path / name)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 10**6  # kB


def test_P_what_is_written_beside_follows_no_link_and_leaves_nothing(tmp_path):
    precious, path = tmp_path / "precious", tmp_path / "x.pt"
    precious.write_text("mine")
    beside = tmp_path / f"x.pt.part{os.getpid()}"
    os.symlink(precious, beside)
    with atomic_file(path) as file:
        file.write(b"new")
    assert precious.read_text() == "mine" and path.read_bytes() == b"new" and not path.is_symlink()
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / f"x.pt.part{dead.pid}").write_text("left by a killed process")
    (tmp_path / f"x.pt.part{os.getppid()}").write_text("of a living one")
    (tmp_path / "x.pt.party").write_text("no part")
    with atomic_file(path) as file:
        file.write(b"newer")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["precious", "x.pt", "x.pt.party", f"x.pt.part{os.getppid()}"])


@pytest.mark.parametrize("name", [".lock", "sft.state.jsonl"])
def test_P_neither_lock_nor_log_are_written_through_a_link(folder, name):
    Path("precious").write_text("mine")
    Path("new").mkdir()
    os.symlink(folder / "precious", f"new/{name}")
    with pytest.raises(UserError, match="link"):
        sft(out="new")
    assert Path("precious").read_text() == "mine"


def test_P_the_folder_is_flushed_after_a_rename(tmp_path, monkeypatch):
    synced, shipped = [], os.fsync
    monkeypatch.setattr(files.os, "fsync", lambda fd: synced.append(
        os.path.realpath(f"/proc/self/fd/{fd}")) or shipped(fd))
    with atomic_file(tmp_path / "x") as file:
        file.write(b"1")
    assert synced == [str(tmp_path / f"x.part{os.getpid()}"), str(tmp_path)]
