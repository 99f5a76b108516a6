"""Reward functions: how they are called, what they may return, how they may fail; the scale of scores, the KL
controller, flags that can't work together, and what is warned of."""
import json
import math
import os
import signal
import subprocess
import sys
from collections import OrderedDict
from fractions import Fraction

import numpy
import pytest
import torch
from helpers import BYTES, PPO, ROOT, SIZES, gen, lines, make_data, same_weights, steps

import ppo
import train_rm
import train_sft
from data.examples import pad
from data.files import UserError
from lib.checkpoint import load
from lib.flags import check_numbers, check_pairs, cli
from lib.report import gain_from_ends, warnings
from lib.rewards import Scale, TextScore, in_units, model_score
from lib.user_code import import_function, user_code
from model import GPT, RewardModel
from ppo import adapt_kl_coef

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A data folder and an out folder with a trained sft.pt."""
    folder = tmp_path_factory.mktemp("made")
    make_data(folder / "data")
    train_sft.main(train_sft.Config(**SIZES, data=str(folder / "data"), out=str(folder / "out"), epochs=10))
    return folder


@pytest.fixture
def start(made, tmp_path, monkeypatch, capsys):
    """start(source, *flags, updates=3) -> (exit code, stdout, stderr) of ppo.py --reward mine.py:f, run in
    a folder of its own that holds out/sft.pt and mine.py with that source (None: as it is)."""
    signals = signal.SIGINT, signal.SIGTERM, signal.SIGHUP

    def run(source, *more, name="mine.py", out="out", alone=False, **flags):
        if source is not None:
            (tmp_path / name).write_text(source)
        if not (tmp_path / out).exists():
            (tmp_path / out).mkdir()
            (tmp_path / out / "sft.pt").write_bytes((made / "out/sft.pt").read_bytes())
        flags = {**PPO, "show": 0, "reward": f"{name}:f", "data": made / "data", "out": out, **flags}
        args = [x for key, value in flags.items() for x in ("--" + key.replace("_", "-"), str(value))]
        if alone:
            done = subprocess.run([sys.executable, str(ROOT / "ppo.py"), *args, *more], cwd=tmp_path,
                                  text=True, capture_output=True, timeout=300)
            return done.returncode, done.stdout, done.stderr
        with monkeypatch.context() as m:
            m.setattr(sys, "argv", ["ppo.py", *args, *more])
            m.setattr(sys, "stdout", sys.stdout)  # which cli wraps
            m.setattr(sys, "stderr", sys.stderr)
            m.setattr(sys, "path", list(sys.path))
            m.chdir(tmp_path)
            handlers, _, code = [signal.getsignal(n) for n in signals], capsys.readouterr(), 0
            try:
                cli(ppo.main, ppo.Config)
            except SystemExit as error:
                code = error.code
            finally:
                for number, handler in zip(signals, handlers, strict=True):
                    signal.signal(number, handler)
        out, err = capsys.readouterr()
        return (1, out, f"{err}{code}\n") if isinstance(code, str) else (code, out, err)
    run.folder = tmp_path
    return run


COUNT = "def f(prompts, responses):\n    return [r.count('a') for r in responses]\n"


def result(folder, out="out"):
    """The weights and the log of a finished run."""
    return load(GPT, folder / out / "ppo.pt"), (folder / out / "ppo.log.jsonl").read_text()


# ---- D: how the function is called ----

def test_one_call_a_rollout_in_the_order_of_the_prompts(start):
    """Not in pieces of --micro-batch, sorted by length: a function may compare all responses of a rollout."""
    source = ("import json\ndef f(prompts, responses):\n"
              "    print(json.dumps(prompts), file=open('calls', 'a'))\n"
              "    n = [len(r) for r in responses]\n    return [x - sum(n) / len(n) for x in n]\n")
    logs = []
    for i, micro_batch in enumerate((4096, 24)):
        (start.folder / "calls").unlink(missing_ok=True)
        assert start(source, out=f"out{i}", micro_batch=micro_batch)[0] == 0
        calls = [json.loads(line) for line in open(start.folder / "calls")]
        assert [len(call) for call in calls] == [8] * 8  # before, three updates, after, three samples of SFT
        assert len({tuple(call) for call in calls[1:4]}) == 3 and all(calls[0] == call for call in calls[4:])
        assert any(sorted(map(len, call)) != list(map(len, call)) for call in calls)
        logs.append([line["raw"] for line in steps(start.folder / f"out{i}/ppo.log.jsonl")])
    assert logs[0] == pytest.approx(logs[1], abs=1e-4)


def test_a_reward_model_scores_in_pieces_but_in_order(tiny):
    """Bit for bit what it scored when it was called for each micro-batch, whatever their size."""
    rm = RewardModel.from_gpt(tiny()).eval()
    tokens, lengths = pad([[1 + i] * (3 + 5 * (i % 4)) for i in range(9)])
    with torch.no_grad():
        whole, alone = model_score(rm)(tokens, lengths, None), model_score(rm, 1)(tokens, lengths, None)
        assert torch.equal(alone, torch.cat([rm.score(tokens[i : i + 1, :n], lengths[i : i + 1])
                                             for i, n in enumerate(lengths.tolist())]))
    assert torch.allclose(whole, alone, atol=1e-5)


def score_of(function, n=3):
    tokens, lengths = pad([[97] * (i + 2) + [BYTES.eos] for i in range(n)])
    return TextScore(function, "mine.py:f", BYTES)(tokens, lengths, torch.ones(n, dtype=torch.long))


@pytest.mark.parametrize("made_of", [
    list, tuple, numpy.array, torch.tensor, iter, lambda x: (y for y in x),
    lambda x: numpy.array(x, "float32"), lambda x: torch.tensor(x, dtype=torch.bfloat16),
    lambda x: torch.tensor(x, requires_grad=True), lambda x: [numpy.float64(y) for y in x],
    lambda x: [torch.tensor(y) for y in x], lambda x: [torch.tensor([y]) for y in x],
    lambda x: [numpy.array([y]) for y in x], lambda x: [numpy.array(y) for y in x],
    lambda x: [Fraction(y) for y in x], lambda x: dict(enumerate(x)).values()])
def test_what_a_reward_function_may_return(made_of):
    assert score_of(lambda p, r: made_of([1.0, -2.0, 3.0])).tolist() == [1, -2, 3]


def test_bools_and_integers_are_numbers():
    assert score_of(lambda p, r: [True, False, 7]).tolist() == [1, 0, 7]
    assert score_of(lambda p, r: numpy.array([True, False, True])).tolist() == [1, 0, 1]
    assert score_of(lambda p, r: range(3)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("returned, what", [
    ({1.0: "a", 2.0: "b", 3.0: "c"}, "a dict"), (OrderedDict.fromkeys([1.0, 2.0, 3.0]), "a OrderedDict"),
    ({1.0, 2.0, 3.0}, "a set"), ({1.0: 0, 2.0: 0, 3.0: 0}.keys(), "a dict_keys"), ("123", "a str: '123'"),
    (b"123", "a bytes"), (bytearray(3), "a bytearray"), (None, "a NoneType"), (True, "a bool: True"),
    (1.5, "a float"), (lambda: 0, "a function"), (numpy.ones((3, 1)), "a 2-dimensional ndarray"),
    (torch.ones(3, 2), "a 2-dimensional Tensor"), (torch.tensor(1.0), "a 0-dimensional Tensor"),
    ([1.0, 2.0], "2: "), ([1.0] * 4, "more: "), ([], "0: "), (iter([1.0]), "1: "),
    ((1.0 for _ in iter(int, 1)), "more: "), ([1.0, "2", 3.0], "'2' as number 2"),
    ([1.0, 2.0, None], "None as number 3"), ([1.0, math.nan, 1.0], "nan as number 2"),
    ([1, 2, math.inf], "inf as number 3"), ([1, 2, 10**400], "as number 3"),
    ([1, 2, 1e300], "1e+300 as number 3"), ([1, 2, 1j], "1j as number 3"),
    ([[1.0], [2.0], [3.0]], "[1.0] as number 1"), ([torch.ones(2)] * 3, "as number 1"),
    (["\x1b[31m", 1, 2], "as number 1")])
def test_what_a_reward_function_must_not_return(returned, what):
    with pytest.raises(UserError) as error:
        score_of(lambda p, r: returned)
    sentence, _, returned = str(error.value).partition("; it returned ")
    assert sentence == "--reward mine.py:f must return 3 finite numbers for 3 responses" and what in returned
    assert str(error.value).isprintable()


def test_a_value_that_cannot_be_printed_is_still_named():
    class Odd:
        def __repr__(self):
            raise RuntimeError
    with pytest.raises(UserError, match="something that can't be printed .Odd. as number 1"):
        score_of(lambda p, r: [Odd(), 1, 2])


ODD = """
import os, torch

def change():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device('meta')
    torch.set_num_threads(2)
    torch.set_grad_enabled(False)
    torch.use_deterministic_algorithms(True)
    os.chdir('/')

def f(prompts, responses):
    made = [r.count('a') for r in responses]
    change()
    print('hello')
    responses.clear()
    prompts[:] = ['']
    return made

change()
"""


def test_a_function_that_changes_its_lists_changes_nothing(start):
    """Nor does one that seeds torch, sets its dtype, device, threads, grad mode, or the working folder."""
    assert start(COUNT, out="plain")[0] == 0
    code, out, err = start(ODD, out="odd")
    assert code == 0, err
    (plain, log), (other, odd_log) = result(start.folder, "plain"), result(start.folder, "odd")
    assert same_weights(plain, other) and log.splitlines()[1:] == odd_log.splitlines()[1:]


# ---- D: how it may fail ----

FAILS = """
import os
def f(prompts, responses):
    n = int(open('n').read()) if os.path.exists('n') else 0
    open('n', 'w').write(str(n + 1))
    if n == int(os.environ.get('AT', 3)) and not os.path.exists('mended'):
        HERE
    return [r.count('a') for r in responses]
"""


@pytest.mark.parametrize("here, code, said", [
    ("raise ZeroDivisionError('mine')", 1, "raised ZeroDivisionError"),
    ("import sys; sys.exit()", 1, "called sys.exit"), ("import sys; sys.exit(0)", 1, "called sys.exit"),
    ("raise KeyboardInterrupt", 130, "was interrupted"), ("return [1.0]", 1, "it returned 1: [1.0]"),
    ("raise GeneratorExit", 1, "raised GeneratorExit")])
def test_a_function_that_fails_loses_nothing(start, here, code, said):
    """Its own traceback, a saved state despite --save-every 0, a resumed run that ends with the same bits."""
    assert start(COUNT, out="whole")[0] == 0
    got, out, err = start(FAILS.replace("HERE", here), save_every=0)
    last = err.strip().splitlines()[-1]
    assert got == code and said in last, err
    assert "step 2 of 3 is saved; rerun with --resume to continue" in last
    if "return" not in here:
        assert "mine.py" in err and here.rpartition("; ")[2] in err and "lib/rewards.py" not in err
    (start.folder / "mended").touch()
    got, out, err = start(None, "--resume", save_every=0)
    assert got == 0 and "resuming after step 2 of 3" in out, out + err
    (whole, log), (resumed, other) = result(start.folder, "whole"), result(start.folder)
    assert same_weights(whole, resumed) and log.splitlines()[1:] == other.splitlines()[1:]


ODD_NUMBER = """class Odd:
        def __repr__(self):
            REPR
        def METHOD(self, *name):
            HERE
    return [Odd() for r in responses]"""


@pytest.mark.parametrize("method, here, in_repr, said", [
    ("__float__", "1 / 0", "return ''", "raised ZeroDivisionError"),
    ("__float__", "raise SystemExit(0)", "return ''", "called sys.exit"),
    ("__str__", "return ''", "raise SystemExit(0)", "called sys.exit"),
    ("item", "raise KeyError", "return ''", "raised KeyError"),
    ("__getattr__", "raise RuntimeError", "return ''", "it returned  as number 1"),
    ("__getattr__", "raise KeyError", "return ''", "raised KeyError")])
def test_numbers_of_the_users_that_fail_lose_nothing(start, method, here, in_repr, said):
    source = ODD_NUMBER.replace("METHOD", method).replace("HERE", here).replace("REPR", in_repr)
    source = source.replace("\n    ", "\n        ")
    code, out, err = start(FAILS.replace("HERE", source), save_every=0)
    last = err.strip().splitlines()[-1]
    assert code == 1 and said in last and "step 2 of 3 is saved; rerun with --resume" in last, err
    assert "lib/rewards.py" not in err and "mine.py" in err


def test_values_that_are_too_large_lose_nothing(start):
    assert start(COUNT, out="whole", reward_scale="none")[0] == 0
    source = FAILS.replace("HERE", "return [3e38 * (-1) ** i for i in range(len(responses))]")
    code, out, err = start(source, save_every=0, reward_scale="none")
    assert code == 1 and "returned values that are too large, such as 3e+38" in err, err
    assert "step 2 of 3 is saved; rerun with --resume" in err and "--lr" not in err
    (start.folder / "mended").touch()
    assert start(None, "--resume", save_every=0, reward_scale="none")[0] == 0
    (whole, log), (resumed, other) = result(start.folder, "whole"), result(start.folder)
    assert same_weights(whole, resumed) and log.splitlines()[1:] == other.splitlines()[1:]


@pytest.mark.parametrize("scale", [Scale(64, 0.0, 64.0), Scale(64, 0.0, 1e-9), Scale()])
def test_values_that_are_too_large_once_scaled_leave_the_scale_as_it_was(scale):
    was = dict(vars(scale))
    score = TextScore(lambda p, r: [3e38, -3e38, 0], "mine.py:f", BYTES, scale)
    tokens, lengths = pad([[97, 97, BYTES.eos if scale.n else 97]] * 3)
    with pytest.raises(UserError, match="values that are too large, such as 3e.38: scaled, they must"):
        score(tokens, lengths, torch.ones(3, dtype=torch.long))
    assert vars(scale) == was


def test_a_function_that_deletes_its_working_folder_changes_nothing(start):
    source = ("import os, tempfile\ndef f(prompts, responses):\n    os.chdir(tempfile.mkdtemp())\n"
              "    os.rmdir(os.getcwd())\n    return [0 for r in responses]\n")
    code, out, err = start(source)
    assert code == 0 and (start.folder / "out/ppo.pt").exists(), err
    before = os.getcwd()
    (start.folder / "gone").mkdir()
    try:
        os.chdir(start.folder / "gone")
        with pytest.raises(UserError, match="the working folder .* is gone"), user_code("x"):
            os.chdir("/")
            os.rmdir(start.folder / "gone")
        (start.folder / "gone").mkdir()
        os.chdir(start.folder / "gone")
        os.rmdir(start.folder / "gone")
        with user_code("x"):
            pass
    finally:
        os.chdir(before)


@pytest.mark.parametrize("at, updates, step", [(1, 3, 0), (4, 3, 3), (11, 12, 10), (12, 12, 10)])
def test_a_function_that_fails_at_any_call_loses_nothing(start, at, updates, step):
    """In the first update, the evaluation at the end, that after update 10, and the update after it."""
    assert start(COUNT, out="whole", updates=updates)[0] == 0
    source = FAILS.replace("HERE", "raise ValueError").replace("'AT', 3", f"'AT', {at}")
    code, out, err = start(source, save_every=0, updates=updates)
    assert code == 1 and f"step {step} of {updates} is saved; rerun with --resume" in err, err
    (start.folder / "mended").touch()
    assert start(None, "--resume", save_every=0, updates=updates)[0] == 0
    (whole, log), (resumed, other) = result(start.folder, "whole"), result(start.folder)
    assert same_weights(whole, resumed) and log.splitlines()[1:] == other.splitlines()[1:]


@pytest.mark.parametrize("at, step", [(2, 2), (4, 3)])
def test_a_signal_within_the_function_is_not_its_fault(start, at, step):
    """In an update that ends first; in the evaluation after the last one, which is left at once."""
    here = "import signal; os.kill(os.getpid(), signal.SIGTERM)"
    code, out, err = start(FAILS.replace("HERE", here).replace("'AT', 3", f"'AT', {at}"), save_every=0)
    assert code == 143 and "mine.py" not in err, err
    assert torch.load(start.folder / "out/ppo.state.pt", weights_only=True)["step"] == step
    (start.folder / "mended").touch()
    assert start(None, "--resume", save_every=0)[0] == 0


def test_a_function_that_takes_the_signals_does_not_keep_them(start):
    takes = """import os, signal
        n = 0
        def f(prompts, responses):
            global n
            n += 1
            if n == 2:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            if n == 3:
                os.kill(os.getpid(), signal.SIGINT)
            return [float(len(x)) for x in responses]
        """.replace("\n        ", "\n")
    code, out, err = start(takes, save_every=0)
    assert code == 130 and "stopped after step 2 of 3; rerun with --resume" in out, out + err


def test_a_mended_function_goes_on(start):
    """The file may change between the parts of a run, or no fault in it could be mended; that is said."""
    code, _, err = start(FAILS.replace("HERE", "raise ValueError"), save_every=0)
    assert code == 1 and "rerun with --resume" in err
    code, out, err = start(COUNT, "--resume", save_every=0)
    assert code == 0 and "mine.py:f has changed since the run began" in out, err


@pytest.mark.parametrize("source, said", [
    ("import sys\nsys.exit(0)\n", "importing mine.py called sys.exit"),
    ("def f(:\n", "importing mine.py raised SyntaxError"), ("raise OSError('mine')\n", "raised OSError"),
    ("import no_such_module\n", "raised ModuleNotFoundError")])
def test_a_file_that_fails_at_import(start, source, said):
    code, out, err = start(source)
    assert code == 1 and said in err.splitlines()[-1] and "no step had been taken yet" in err.splitlines()[-1]
    assert 'mine.py", line' in err and "importlib" not in err and "user_code" not in err
    assert not (start.folder / "out/ppo.pt").exists()


def test_a_failure_before_the_first_step_of_a_resumed_run_keeps_the_state(start):
    assert start(FAILS.replace("HERE", "raise ValueError"), save_every=0)[0] == 1
    state = (start.folder / "out/ppo.state.pt").read_bytes()
    code, _, err = start("1 / 0\n", "--resume", save_every=0)
    assert code == 1 and "nothing is lost, --resume continues" in err
    assert (start.folder / "out/ppo.state.pt").read_bytes() == state


# ---- D: the file is a module like any other ----

LIKE_ANY = """
from __future__ import annotations
import dataclasses, multiprocessing, pickle
import helper

@dataclasses.dataclass
class Words:
    text: str
    n: int | None = None

def count(text):
    return helper.count(Words(text).text)

def f(prompts, responses):
    assert pickle.loads(pickle.dumps(count)) is count and pickle.loads(pickle.dumps(Words('a'))) == Words('a')
    with multiprocessing.get_context('fork').Pool(2) as pool:
        return pool.map(count, responses)
"""


@pytest.mark.parametrize("name", ["mine.py", "model.py", "torch.py", "ppo.py", "data.py", "random.py",
                                  "my-file.py", "lib.py"])
def test_a_reward_file_is_a_module_like_any_other(start, name):
    """Dataclasses, `import helper`, pickle and multiprocessing work, and its name may be one of ours."""
    folder = start.folder / "mine"
    folder.mkdir()
    (folder / "helper.py").write_text("def count(text):\n    return text.count('a')\n")
    code, out, err = start(LIKE_ANY, name=f"mine/{name}", updates=1, alone=True)
    assert code == 0, err


def test_import_function(tmp_path):
    file = tmp_path / "counts.py"
    file.write_text("number = 3\ndef count(prompts, responses):\n    return [len(r) for r in responses]\n")
    assert import_function(f"{file}:count")([], ["abc"]) == [3]
    assert sys.modules["counts"].number == 3
    file.write_text("def count(prompts, responses):\n    return [0]\n")
    assert import_function(f"{file}:count")([], ["abc"]) == [0]
    for name, why in ((f"{tmp_path}/no.py:count", "no such .py file"),
                      ("a.py", "expected FILE.py:FUNCTION, as in a.py:score"),
                      (f"{file}:nothing", "no function 'nothing'"),
                      (f"{file}:number", "no function 'number'"),
                      (str(file), "expected FILE.py:FUNCTION")):
        with pytest.raises(UserError, match=why):
            import_function(name)


def test_user_code_puts_back_what_it_changed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="mine raised ValueError$"):
        with user_code("mine"):
            torch.set_default_dtype(torch.float16)
            torch.set_grad_enabled(False)
            torch.set_float32_matmul_precision("medium")
            torch.autograd.set_detect_anomaly(True)
            sys.stdout = open(os.devnull, "w")
            os.chdir("/")
            raise ValueError("no")
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
    assert os.getcwd() == str(tmp_path) and sys.stdout.name != os.devnull
    assert torch.get_float32_matmul_precision() == "highest" and not torch.is_anomaly_enabled()


# ---- E: the scale of rewards ----

def draw(n=100, seed=0):
    return torch.randn(n, generator=gen(seed), dtype=torch.float64)


@pytest.mark.parametrize("factor, offset", [(1, 0), (100, 0), (1, -50), (1e-9, 0), (1, 1e9), (1e30, -1e30)])
def test_a_scale_undoes_factor_and_offset(factor, offset):
    scale, x = Scale(), draw()
    scale.learn(x * factor + offset)
    made = scale(x * factor + offset)
    assert torch.allclose(made, (x - x.mean()) / x.std(correction=0), atol=1e-5)


def test_a_scale_is_of_the_first_rewards_only_and_of_enough_of_them():
    scale, x = Scale(), draw(80)
    for part in x.split(8):
        scale.learn(part)
    assert scale.n == 64 and scale.mean == pytest.approx(x[:64].mean().item())
    assert scale.sd == pytest.approx(x[:64].std(correction=0).item())


@pytest.mark.parametrize("constant", [0.0, 0.1, -1e6])
def test_equal_rewards_are_shifted_only_and_the_first_that_differ_make_the_scale(constant):
    scale = Scale()
    for _ in range(8):
        scale.learn(torch.full((32,), constant, dtype=torch.float64))
    assert not scale.varied and scale.sd == 1 and scale.mean == pytest.approx(constant)
    x = draw(64) * (abs(constant) or 1)
    scale.learn(x)
    assert scale.n == 64 and scale.sd == pytest.approx(x.std(correction=0).item())


def test_a_scale_of_single_responses_and_of_none():
    scale, x = Scale(), draw(64)
    scale.learn(x[:0])
    assert scale.n == 0 and scale(x).equal(x)
    for one in x.split(1):
        scale.learn(one)
    assert scale.n == 64 and scale.sd == pytest.approx(x.std(correction=0).item())


def test_the_run_is_the_same_whatever_the_scale_of_the_rewards(start):
    """Reward x 128 and 50 lower: the same weights to rounding, the same scores; the log says the units."""
    weights, scores = [], []
    for i, term in enumerate(("r.count('a')", "128 * r.count('a')", "r.count('a') - 50")):
        source = f"def f(prompts, responses):\n    return [{term} for r in responses]\n"
        code, out, err = start(source, out=f"out{i}", updates=5)
        assert code == 0 and "mean and standard deviation of the first" in out, err
        weights.append(result(start.folder, f"out{i}")[0])
        log = lines(start.folder / f"out{i}/ppo.log.jsonl")
        scores.append([line["score"] for line in log if "step" in line])
        scores[-1] += [line["report"]["score"] for line in log[-2:]]
        assert log[-2]["report"]["reward_sd"] > 0 and "raw" in log[-1]["report"]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4) and scores[0] == pytest.approx(scores[2], abs=1e-4)
    for other in weights[1:]:
        for a, b in zip(weights[0].parameters(), other.parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-4)


def test_before_and_after_are_in_the_same_units(start):
    """A reward that never changes with the policy: the held-out texts score the same before and after."""
    source = "def f(prompts, responses):\n    return [1000.0 * len(p) for p in prompts]\n"
    code, out, err = start(source, no_eos_score=0, updates=12, batch=5)
    reports = [line["report"] for line in lines(start.folder / "out/ppo.log.jsonl") if "report" in line]
    assert [report["update"] for report in reports] == [10, 0, 12]
    assert reports[0]["raw"] == reports[1]["raw"] == reports[2]["raw"]
    scaled = [(r["raw"] - reports[1]["reward_mean"]) / reports[1]["reward_sd"] for r in reports]
    for report, score in zip(reports, scaled, strict=True):
        if report["eos"] == 1:
            assert report["score"] == pytest.approx(score, abs=1e-5)


def test_reward_scale_none_leaves_the_scores_as_they_are(start):
    code, out, err = start(COUNT, reward_scale="none")
    assert code == 0 and "score: what mine.py:f returns, not scaled" in out
    assert "raw" not in steps(start.folder / "out/ppo.log.jsonl")[0]


def test_constant_rewards_are_said(start):
    code, out, err = start("def f(prompts, responses):\n    return [7] * len(prompts)\n")
    assert code == 0 and "all of those were equal: nothing to learn from yet" in out, err


DRIFT = """
import os
def f(prompts, responses):
    n = int(open('n').read()) + 1
    if n == 4 and not os.path.exists('mended'):
        raise ValueError
    open('n', 'w').write(str(n))
    return [n * r.count('a') for r in responses]
"""


def test_the_scale_is_part_of_the_state(start):
    """A resumed run goes on in the units in which it began, though its function would now give others."""
    (start.folder / "n").write_text("0")
    assert start(DRIFT, save_every=0)[0] == 1
    (start.folder / "mended").touch()
    was = torch.load(start.folder / "out/ppo.state.pt", weights_only=True)["parts"]["reward"]
    assert start(None, "--resume", save_every=0)[0] == 0
    report = lines(start.folder / "out/ppo.log.jsonl")[-2]["report"]
    assert was["n"] >= 8 and report["reward_mean"] != 0
    again = TextScore(None, "f.py:f", BYTES, Scale())
    again.check_state(was | {"file": 0})
    again.load_state_dict(was)
    assert (again.scale.n, again.scale.mean, again.scale.m2) == (was["n"], was["mean"], was["m2"])
    for bad in ({}, None, was | {"n": -1}, was | {"m2": -1.0}, was | {"mean": math.nan}, was | {"n": "3"},
                was | {"sd": 1.0}):
        with pytest.raises(ValueError):
            again.check_state(bad)


def test_in_units_keeps_the_score_of_a_missing_end():
    score = TextScore(None, "f.py:f", BYTES, Scale(2, 10.0, 8.0))
    result = {"raw": [10.0, 14.0, 99.0], "eos": [1.0, 1.0, 0.0], "score": [0.0, 0.0, 0.0]}
    assert in_units(result, score, -1.0)["score"] == [0.0, 2.0, -1.0]
    assert in_units({"raw": [], "score": [3.0]}, score, -1.0)["score"] == [3.0]


# ---- warnings ----

GOOD = {"kl": 1.0, "entropy": 1.0, "eos": 1.0}


def test_a_useless_critic_and_an_update_without_a_step_are_warned_of():
    assert warnings(GOOD, GOOD) == []
    assert "explained variance" in warnings(GOOD, GOOD, 1000)[0]
    assert "took no step" in warnings(GOOD | {"grad_norm": 0.0, "update_kl": 0.1}, GOOD)[0]
    assert warnings(GOOD | {"grad_norm": 0.0, "update_kl": 0.0}, GOOD) == []


def evaluated(scores, eos):
    return {"score": scores, "eos": eos}


@pytest.mark.parametrize("before, after, warned", [
    (([-42.6] * 4, [1.0] * 4), ([-1.0] * 4, [0.0] * 4), True),  # the example of the issue
    (([1.0, -1.0, -1.0, -1.0], [1.0, 0, 0, 0]), ([1.1] * 4, [1.0] * 4), True),
    (([0.0] * 4, [1.0] * 4), ([2.0] * 4, [1.0] * 4), False),
    (([0.0] * 4, [1.0] * 4), ([0.0] * 4, [1.0] * 4), False),
    (([0.0, 0.0, 0.0, -1.0], [1.0, 1, 1, 0]), ([3.0] * 4, [1.0] * 4), False),
    (([2.0] * 4, [1.0] * 4), ([-1.0] * 4, [0.0] * 4), False)])
def test_a_gain_that_is_only_the_missing_end_is_warned_of(before, after, warned):
    assert bool(gain_from_ends(evaluated(*before), evaluated(*after))) == warned


def test_a_reward_far_from_any_unit_is_warned_of(start):
    """x 100 without the scale: the critic stays useless, and a warning says so, once."""
    source = "def f(prompts, responses):\n    return [100.0 * len(r) + 5000 for r in responses]\n"
    code, out, err = start(source, reward_scale="none", updates=20)
    assert code == 0 and out.count("the explained variance has been below") == 1, out + err


# ---- B: adaptive KL ----

@pytest.mark.parametrize("kl", [-5.0, 0.0, 1e-9, 6.0, 7.0, 1e9])
@pytest.mark.parametrize("n, horizon", [(64, 10), (64, 1), (10**6, 1), (64, 1000), (64, 64)])
def test_K10_an_update_changes_the_coefficient_by_a_fifth_at_most(kl, n, horizon):
    coef = 0.035
    for _ in range(2000):
        last, coef = coef, adapt_kl_coef(coef, kl, 6.0, n, horizon)
        assert 0 < coef < math.inf and 0.8 - 1e-9 <= coef / last <= 1.2 + 1e-9
    assert adapt_kl_coef(0.035, 12.0, 6.0, 64, 1000) == pytest.approx(0.035 * (1 + 0.2 * 0.064))
    assert adapt_kl_coef(coef, 1e9, 6.0, 64, 64) > coef or coef == 1e9  # it never stays where it is for ever


def test_kl_target_with_a_short_horizon(start):
    code, out, err = start(COUNT, kl_target=6, kl_horizon=1, updates=8)
    coefs = [0.035, *(line["kl_coef"] for line in steps(start.folder / "out/ppo.log.jsonl"))]
    assert code == 0
    assert all(0.8 - 1e-9 <= b / a <= 1.2 + 1e-9 for a, b in zip(coefs, coefs[1:], strict=False))


# ---- B: flags that are valid alone and wrong together ----

@pytest.mark.parametrize("flags, said", [
    ({"kl_coef": 0.0, "kl_target": 6.0}, "--kl-coef must be at least"),
    ({"kl_horizon": 10}, "--kl-horizon does nothing"),
    ({"reward_scale": "none"}, "--reward-scale does nothing"),
    ({"kl_budget": 2.0, "kl_target": 6.0}, "--kl-budget does nothing with --kl-target"),
    ({"reward": "f.py:f", "reward_scale": "last"}, "expected first or none"),
    ({"minibatches": 9, "batch": 8}, "--minibatches must not exceed --batch")])
def test_pairs_of_ppo_flags_that_cannot_work_are_refused(flags, said):
    with pytest.raises(UserError, match=said):
        check_pairs(ppo.Config(**flags))


@pytest.mark.parametrize("flags", [
    {}, {"kl_coef": 0.0}, {"kl_target": 6.0}, {"kl_target": 6.0, "kl_horizon": 10}, {"minibatches": 64},
    {"reward": "f.py:f"}, {"reward": "f.py:f", "reward_scale": "none"},
    {"judge": "rm.pt", "reward": "f.py:f"}])
def test_pairs_of_ppo_flags_that_work_are_not_refused(flags):
    check_pairs(ppo.Config(**flags))


def test_pairs_of_the_other_scripts():
    with pytest.raises(UserError, match="--lr times --weight-decay must stay below 1"):
        check_pairs(train_sft.Config(lr=10.0, weight_decay=0.1))
    with pytest.raises(UserError, match="--vocab-size is for the BPE"):
        check_pairs(train_sft.Config(tokenizer="bytes", vocab_size=300))
    for Config in (train_sft.Config, train_rm.Config):
        check_pairs(Config())
        check_numbers(Config())


@pytest.mark.parametrize("name, x", [("clip", 0.0), ("temperature", 1e-9), ("temperature", 1e6)])
def test_numbers_with_which_nothing_is_learned_are_refused(name, x):
    with pytest.raises(UserError, match=f"--{name} .* must lie between"):
        check_numbers(ppo.Config(**{name: x}))


@pytest.mark.parametrize("more, said", [
    (("--kl-coef", "0", "--kl-target", "3"), "--kl-coef must be at least 1e-9"),
    (("--minibatches", "9"), "--minibatches must not exceed"),
    (("--kl-horizon", "1000"), "--kl-horizon does nothing"),  # the default, but given
    (("--ptx-coef", "0.5"), "sft.jsonl"), (("--max-new-tokens", "32"), "--max-new-tokens")])
def test_what_cannot_work_is_refused_before_anything_is_trained(start, made, more, said):
    data = start.folder / "data"
    data.mkdir()
    for name in ("prompts.jsonl", "prompts_val.jsonl"):
        (data / name).write_bytes((made / "data" / name).read_bytes())
    code, out, err = start(COUNT, *more, data=data)
    assert code == 1 and said in err and err.count("\n") == 1 and "/3 " not in out, out + err


def test_init_refuses_a_size_that_is_the_default_but_not_its_own(made, tmp_path):
    args = [str(ROOT / "train_sft.py"), "--init", str(made / "out/sft.pt"), "--data", str(made / "data"),
            "--out", str(tmp_path), "--n-layer", "4"]
    done = subprocess.run([sys.executable, *args], text=True, capture_output=True, cwd=tmp_path)
    assert done.returncode == 1 and "--init fixes the sizes and tokenizer; remove --n-layer" in done.stderr


def test_wide_gap_needs_gold(made, tmp_path):
    (tmp_path / "sft.pt").write_bytes((made / "out/sft.pt").read_bytes())
    cfg = train_rm.Config(data=str(made / "data"), out=str(tmp_path), wide_gap=0.3, epochs=1.0, device="cpu")
    with pytest.raises(UserError, match="--wide-gap: no ranking"):
        train_rm.main(cfg)
    assert not list(tmp_path.glob("rm.*"))
