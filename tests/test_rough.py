"""What a machine can lack: a compiler, memory, a writable --out, a running clock. One sentence each."""
import math
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import BYTES, PPO, ROOT, SIZES, gpt_config, lines, make_data, steps, tiny_gpt

import ppo
import train_sft
from data.files import UserError
from lib import common, fast, flags, memory
from lib.checkpoint import save
from lib.generate import generate
from model import GPT, GPTConfig

pytestmark = pytest.mark.slow

GB = 10**9


def script(name, *flags, env=None):
    """Run a script with its flags, as from the command line."""
    return subprocess.run([sys.executable, str(ROOT / name), "--device", "cpu", *map(str, flags)],
                          capture_output=True, text=True, env=env)


def one_sentence(done):
    """Whether a script ended with exit code 1 and one line on stderr."""
    return done.returncode == 1 and done.stderr.count("\n") == 1 and "[Errno" not in done.stderr


@pytest.fixture
def folder(tmp_path):
    make_data(tmp_path / "data", n=16)
    return tmp_path


# ---- --compile ----

@pytest.mark.parametrize("broken, says", [
    ({"PATH": "/nowhere"}, "No working C++ compiler found"),
    ({"CXX": "/nowhere/g++"}, "No working C++ compiler found"),
    ({"TORCHINDUCTOR_CACHE_DIR": "/proc/nowhere"}, "No such file or directory")])
def test_compile_without_what_it_needs_is_one_sentence(folder, broken, says):
    flags = ("--tokenizer", "bytes", "--n-layer", 1, "--d-model", 32, "--compile")
    where = ("--data", folder / "data", "--out", folder / "out")
    done = script("train_sft.py", *where, *flags, env=os.environ | broken)
    assert one_sentence(done), done.stderr
    assert done.stderr.startswith("train_sft.py: --compile: torch.compile does not work on this machine (")
    assert says in done.stderr and not list(folder.glob("out/sft*"))


def test_compile_is_checked_before_the_model_is_compiled(monkeypatch):
    """The fault is the last cause, and of a compiler's words the line with the error."""
    told = "C++ compile error\n\nCommand:\ng++ x\n\nOutput:\nx:1: fatal error: Python.h: No such file\n 1 |"

    def compile(*_, **__):
        try:
            raise RuntimeError(told)
        except RuntimeError as error:
            raise ValueError("87 lines") from error

    monkeypatch.setattr(torch, "compile", compile)
    fast.check_compile.cache_clear()
    cfg = SimpleNamespace(bf16=False, checkpoint_activations=False, compile=True)
    with pytest.raises(UserError) as caught:
        fast.prepare(model := tiny_gpt(), "cpu", cfg)
    assert str(caught.value) == ("--compile: torch.compile does not work on this machine (x:1: fatal "
                                 "error: Python.h: No such file); drop --compile, or mend that")
    assert model.trunk._compiled_call_impl is None


def test_a_compiler_that_fails_later_is_one_sentence():
    from torch._dynamo.exc import TorchDynamoException

    with pytest.raises(SystemExit, match="^x.py: --compile: torch.compile failed .no way.; drop --compile$"):
        with flags.one_sentence("x.py", ""):
            raise TorchDynamoException("no way\nmore")


def test_sampling_needs_no_compiler(folder):
    save(folder / "sft.pt", tiny_gpt(vocab_size=BYTES.vocab_size), BYTES)
    done = script("sample.py", "--ckpt", folder / "sft.pt", "--max-new-tokens", 4, "A", env=os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": "/proc/nowhere"})
    assert done.returncode == 0, done.stderr


def test_an_unknown_product_is_one_sentence_before_training(folder):
    save(folder / "sft.pt", tiny_gpt(vocab_size=BYTES.vocab_size), BYTES)
    env = os.environ | {"ONETRUNK_PRODUCT": "openblas"}
    runs = {"train_sft.py": ("--data", folder / "data", "--out", folder / "out", "--tokenizer", "bytes"),
            "sample.py": ("--ckpt", folder / "sft.pt", "A")}
    for name, args in runs.items():
        done = script(name, *args, env=env)
        assert one_sentence(done), done.stderr
        assert done.stderr == f"{name}: ONETRUNK_PRODUCT=openblas: expected mkl or onednn\n"
    assert not list(folder.glob("out/sft*.pt"))


# ---- memory ----

@pytest.fixture
def machine(monkeypatch):
    """machine(cpu, cuda=0): so many bytes are there."""
    def make(cpu, cuda=0):
        there = {"cpu": (cpu, "this machine has"), "cuda": (cuda, "this GPU has")}
        monkeypatch.setattr(memory, "machine_memory", there.get)
    return make


@pytest.mark.parametrize("flags, lower", [
    ({"block_size": 2**31}, "--block-size"), ({"d_model": 10**8}, "--n-layer"),
    ({"n_layer": 10**9}, "--n-layer"), ({"vocab_size": 2**31}, "--vocab-size"),
    ({"d_model": 2**31, "n_layer": 2**31, "block_size": 2**31}, "--n-layer")])
def test_absurd_sizes_are_refused_before_anything_is_made(machine, flags, lower):
    machine(64 * GB)
    start = time.perf_counter()
    with pytest.raises(UserError, match=f"parameters would take .*, and this machine has 64 GB; .*{lower}"):
        memory.check_sizes(train_sft.Config(**flags), "cpu")
    memory.check_sizes(train_sft.Config(init="x.pt", **flags), "cpu")  # which fixes the sizes
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("flags", [{"batch": 2**31}, {"max_new_tokens": 2**31}])
def test_an_absurd_rollout_is_refused(machine, flags):
    machine(64 * GB)
    with pytest.raises(UserError, match="a rollout of .* tokens would take .* lower --batch or --max"):
        memory.check_sizes(ppo.Config(**flags), "cpu")


def test_what_fits_is_not_refused(machine):
    """GPT-2 XL on a GPU of 80 GB; the demo on a very small machine."""
    machine(GB // 4)
    memory.check_sizes(train_sft.Config(), "cpu")
    memory.check_sizes(ppo.Config(), "cpu")
    xl = train_sft.Config(vocab_size=50257, block_size=1024, n_layer=48, d_model=1600)
    machine(16 * GB, 80 * GB)
    memory.check_sizes(xl, "cuda")
    with pytest.raises(UserError, match="training a network of 1.56e\\+09 parameters would take 24.9 GB,"):
        memory.check_sizes(xl, "cpu")


@pytest.mark.parametrize("sizes", [{}, {"n_layer": 3, "n_head": 4, "d_model": 64, "vocab_size": 300}])
def test_parameters_are_counted_as_the_model_has_them(sizes):
    config = GPTConfig(**sizes)
    with torch.device("meta"):
        made = sum(p.numel() for p in GPT(config).parameters())
    assert made == sum(memory.parameters(config.vocab_size, config.block_size, config.n_layer,
                                         config.d_model).values())


def test_generation_that_cannot_fit_is_refused_before_it_allocates(machine):
    machine(GB)
    gpt = tiny_gpt(block_size=10_000)
    tokens = torch.zeros(1, 1, dtype=torch.long)
    with pytest.raises(UserError, match="generating 1000 texts of 9001 tokens at once would take 4.61 GB"):
        generate(gpt, tokens.expand(1000, 1), torch.ones(1000, dtype=torch.long), 9000)
    assert generate(gpt, tokens, torch.ones(1, dtype=torch.long), 4)[0].shape == (1, 5)


def test_a_batch_that_cannot_fit_is_refused(machine, folder):
    machine(GB)
    config, cfg = gpt_config(1024, 128, 4, 4, 128), train_sft.Config()
    memory.check_training(config, cfg.micro_batch, cfg, "cpu")
    with pytest.raises(UserError, match="training on 1000000 tokens at a time would take 32.8 GB.*-batch"):
        memory.check_training(config, 10**6, cfg, "cpu")
    for most, tokens in ((10**5, 12_000), (9_000, 9_000)):  # tokens that are split may be twice as many
        split = train_sft.Config(bpe_dropout=0.2, micro_batch=most)
        machine(600_000)
        with pytest.raises(UserError, match=f"training on {tokens} tokens at a time"):
            memory.check_training(config, 6_000, split, "cpu")
    machine(500_000)
    where = {"data": str(folder / "data"), "out": str(folder / "out")}
    flags = SIZES | {"batch_tokens": 2**31, "micro_batch": 2**31}
    with pytest.raises(UserError, match="training on [0-9]+ tokens at a time would take .* --micro-batch"):
        train_sft.main(train_sft.Config(**where, **flags))


def test_the_limits_of_a_container_and_of_ulimit_count(tmp_path, monkeypatch):
    memory.machine_memory.cache_clear()
    real, says = memory.machine_memory("cpu")
    (tmp_path / "memory.max").write_text("123456\n")
    (tmp_path / "other").write_text("max\n")
    for files, limit, expected in (
            (["memory.max", "other"], math.inf, (123456, "this container has")),
            (["other", "none"], 99, (99, "beside the libraries `ulimit -v` leaves"))):
        monkeypatch.setattr(memory, "LIMITS", [tmp_path / name for name in files])
        monkeypatch.setattr(memory, "address_space", lambda limit=limit: limit)
        memory.machine_memory.cache_clear()
        assert memory.machine_memory("cpu") == expected
    memory.machine_memory.cache_clear()
    assert real > 123456 and says


def allocate():
    return torch.empty(2**55, dtype=torch.uint8)


@pytest.mark.parametrize("fault, says", [
    (allocate, "out of memory, at a tensor of 3.6e+07 GB. Lower it"),
    (lambda: [0] * 2**60, "out of memory. Lower it"),
    (RuntimeError("std::bad_alloc"), "out of memory. Lower it"),
    (OSError(12, "Cannot allocate memory"), "out of memory. Lower it"),
    (torch.cuda.OutOfMemoryError("CUDA out of memory.\nmore"), "CUDA out of memory. Lower it"),
    (FileExistsError(17, "File exists", "out"), "out: File exists"),
    (OSError(5, "Input/output error"), "[Errno 5] Input/output error"),
    (UserError("no such flag"), "no such flag")])
def test_what_a_user_can_mend_is_one_sentence(fault, says):
    with pytest.raises(SystemExit) as caught:
        with flags.one_sentence("x.py", "Lower it"):
            if isinstance(fault, Exception):
                raise fault
            fault()
    assert caught.value.code == f"x.py: {says}"


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("no"), SystemError("lost")])
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        with flags.one_sentence("x.py", ""):
            raise error


@pytest.mark.parametrize("error", [SystemError("lost"), RuntimeError("could not create a primitive")])
def test_under_ulimit_c_code_that_gives_no_reason_lacked_memory(monkeypatch, error):
    monkeypatch.setattr(memory, "address_space", lambda: GB)
    with pytest.raises(SystemExit, match="^x.py: out of memory. Lower it$"):
        with flags.one_sentence("x.py", "Lower it"):
            raise error


LIMITED = """
import importlib, re, resource, sys
sys.path.insert(0, {root!r})
module = importlib.import_module({name!r})
from lib import memory
from lib.flags import cli
memory.LIBRARIES = {reserve}
size = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + {more} * 2**20,) * 2)
sys.argv[0] = {name!r} + ".py"
cli(module.main, module.Config)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs ulimit -v")
@pytest.mark.parametrize("reserve, more, says", [
    (2**27, 60, "a network of .* would take .* and beside the libraries `ulimit -v` leaves 0 MB; lower"),
    (-2**31, 20, "out of memory.* Try a smaller --micro-batch"),
    (-2**31, 60, "out of memory.* Try a smaller --micro-batch")])
def test_too_little_memory_is_one_sentence(folder, reserve, more, says):
    code = LIMITED.format(root=str(ROOT), name="train_sft", more=more, reserve=reserve)
    flags = ["--tokenizer", "bytes", "--d-model", "256", "--batch-tokens", "8192", "--device", "cpu"]
    where = ["--data", folder / "data", "--out", folder / "out"]
    done = subprocess.run([sys.executable, "-c", code, *where, *flags], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})  # a thread's stack may not fit, either
    assert one_sentence(done), done.stderr[-1000:]
    assert re.match(f"train_sft.py: {says}", done.stderr)


def test_absurd_sizes_on_the_command_line(folder):
    done = script("train_sft.py", "--out", folder / "out", "--block-size", 2147483648)
    assert one_sentence(done) and "lower --block-size" in done.stderr and not (folder / "out").exists()


# ---- --out ----

@pytest.mark.parametrize("name", ["file", "file/below", "file/below/it"])
@pytest.mark.parametrize("module, config", [(train_sft, SIZES), (ppo, PPO)])
def test_out_that_is_a_file(folder, monkeypatch, capsys, name, module, config):
    (folder / "file").write_text("mine")
    given = [f"--{key.replace('_', '-')}={value}" for key, value in config.items()]
    where = ["--data", str(folder / "data"), "--out", str(folder / name)]
    monkeypatch.setattr(sys, "argv", ["x.py", *where, *given])
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, getattr(sys, stream))
    with pytest.raises(SystemExit, match="^x.py: .*file") as caught:
        flags.cli(module.main, module.Config)
    assert "[Errno" not in caught.value.code and (folder / "file").read_text() == "mine"


@pytest.mark.parametrize("where", ["/proc/nowhere", "/dev/null/x", "x" * 300])
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_out_that_cannot_be_written(folder, monkeypatch, capsys, where):
    monkeypatch.chdir(folder)
    given = [f"--{key.replace('_', '-')}={value}" for key, value in SIZES.items()]
    monkeypatch.setattr(sys, "argv", ["x.py", "--data", "data", "--out", where, *given])
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, getattr(sys, stream))
    with pytest.raises(SystemExit) as caught:
        flags.cli(train_sft.main, train_sft.Config)
    assert where[:20] in caught.value.code and "[Errno" not in caught.value.code
    assert "step" not in capsys.readouterr().out


# ---- the clock ----

@pytest.mark.parametrize("speed", [0, -1])
def test_a_clock_that_stands_or_runs_backwards(folder, monkeypatch, capsys, speed):
    now = [1e9]

    def clock():
        now[0] += speed
        return now[0]

    for name in ("time", "monotonic", "perf_counter"):
        monkeypatch.setattr(time, name, clock)
    where = {"data": str(folder / "data"), "out": str(folder)}
    train_sft.main(train_sft.Config(**where, **SIZES, epochs=1))
    (folder / "score.py").write_text("def score(prompts, responses): return [len(r) for r in responses]")
    ppo.main(ppo.Config(**where, **PPO, reward=f"{folder}/score.py:score"))
    assert len(steps(next(folder.glob("ppo*log.jsonl")))) == PPO["updates"]
    assert "   0:00\n" in capsys.readouterr().out


@pytest.mark.parametrize("clock", [0.0, -1.0])
def test_the_benchmark_never_divides_by_zero_seconds(monkeypatch, clock):
    bench = pytest.importorskip("tools.bench")
    times = iter([0.0, clock])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    assert bench.timed(lambda: None, torch.device("cpu")) > 0


# ---- the log's columns ----

def test_columns_stay_apart_whatever_the_numbers_are(tmp_path, capsys):
    numbers = {"a": -1.234e-05, "b": -1.234e-101, "c": None, "d": 10**12, "e": math.nan, "f": -math.inf,
               "a_rather_long_name": -1.234e-300, "h": True}
    log = common.Log(tmp_path / "x.jsonl", flags.Shared(), 10**7)
    log(10**7 - 1, tok_s=10**11, **numbers)
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["step", *numbers, "tok_s", "left"]
    assert row.split() == ["9999999/10000000", "-1.23e-05", "-1.23e-101", "None", str(10**12), "nan", "-inf",
                           "-1.23e-300", "True", str(10**11), "0:00"]
    assert len(lines(tmp_path / "x.jsonl")) == 2
