"""How fast each part runs on this machine, how close to its limit, and how much memory it takes.

    python -m tools.bench                                  # SFT, reward model, generate, PPO
    python -m tools.bench --shape gpt2 --json gpt2.json    # another shape; all numbers to a file as well
    python -m tools.bench --peers FOLDER --peer-python venv/bin/python    # against other people's code
    python -m tools.bench --plan --model gpt2-xl --batch 64 --prompt 512 --response 128 --gpu-memory 80
    python -m tools.bench --data                           # how a start grows with the data
    python -m tools.bench --plan --check                   # planned and measured peak, side by side

Tokens per second count supervised tokens (SFT), real tokens (reward model) or new tokens (generate, PPO),
never padding. FLOP/s, counted as in bench_jobs.py, are also given as a share of what one matrix product of
that size reaches in the same run. Peak memory is that of the process, or of the tensors on a GPU.
"""
import ctypes
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import ppo
import train_sft
from data.examples import encode_demonstrations, encode_prompts, open_data, pad
from data.files import UserError
from data.records import read_prompts, read_sft
from data.tokenizer import train_tokenizer
from lib import ranks
from lib.checkpoint import load, load_tokenizer
from lib.common import batches, clip_and_step
from lib.fast import Linear, prepare, product
from lib.flags import cli, pick_device
from lib.generate import generate
from model import GPT
from tools import bench_plan
from tools.bench_data import bench_data
from tools.bench_jobs import (
    SHAPES,
    Shape,
    config_of,
    ending_gpt,
    generate_job,
    ppo_jobs,
    ranks_jobs,
    rm_job,
    sft_job,
)
from train_sft import make_optimizer, sft_batch, sft_loss


@dataclass
class Config:
    # parts
    shape: str = ""  # demo, 30m or gpt2; default: demo, and all of them with --peers and --check
    json: str = ""  # file for all numbers
    repeats: int = 5  # timed runs of each part, after one that is not timed; the median is reported
    out: str = "out"  # folder with sft.pt, if any: then texts end where that model ends them
    device: str = "auto"  # "cuda", "mps", "cpu"
    data: bool = False  # how long a start takes, and how much memory, from 10,000 to 1,600,000 pairs
    only: str = ""  # one line of "generate" or "ppo" (--peers), "memory" (--check), "ranks" (under torchrun)
    # other people's code
    peers: str = ""  # folder with peer_generate.py and peer_ppo.py
    peer_python: str = "python"  # Python of an environment that has what they import
    # plan
    plan: bool = False  # print how much memory PPO takes, without taking it
    check: bool = False  # with --plan: also measure the peak, on the CPU
    model: str = "gpt2"  # gpt2, gpt2-medium, gpt2-large, gpt2-xl, 30m, demo
    batch: int = 64  # prompts in a rollout
    prompt: int = 64  # tokens of a prompt
    response: int = 64  # tokens of a response
    micro_batch: int = ppo.Config.micro_batch  # --micro-batch of ppo.py; also for --check
    gpu_memory: float = 80.0  # in 10^9 bytes


GROWTH = {"batch": (8, 32, 128), "length": (64, 128, 256, 512), "d_model": (128, 256, 512, 768)}
# (part, shape): targets for the ratio of speed, and of memory
RATIOS = {("generate", "demo"): (2.5, ""), ("generate", "30m"): (2.5, ""), ("generate", "gpt2"): (2.0, ""),
          ("ppo", "demo"): (2.0, ""), ("ppo", "30m"): (2.0, 2.0)}
VERSIONS = ("import importlib.metadata as m; print('versions:', *(n + ' ' + m.version(n) for n in "
            "('torch', 'transformers', 'trl')))")
LINE = {"generate": r"([\d.]+) tokens/s", "ppo": r"([\d.]+) s per update"}


def one_of(names, name, what):
    if name not in names:
        raise UserError(f"--{what} {name}: expected one of {', '.join(names)}")
    return name


# ---- clock, memory, machine ----

def timed(function, device):
    """Seconds of one call, until a GPU has finished, too."""
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    wait()
    start = time.perf_counter()
    function()
    wait()
    return max(1e-9, time.perf_counter() - start)


def reset_peak(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        # glibc keeps freed memory, and the parts measured before would be counted
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
        Path("/proc/self/clear_refs").write_text("5")  # 5 resets the peak (man 5 proc)


def memory(device, name="VmHWM"):
    """Bytes, at the peak since reset_peak (VmHWM) or now (VmRSS), of the process or of a GPU's tensors;
    None where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() if name == "VmHWM" else torch.cuda.memory_allocated()
    if sys.platform == "linux":
        return int(re.search(name + r":\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def machine(device):
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return {"cpu": found[1] if found else platform.processor(), "cores": os.cpu_count(),
            "threads": torch.get_num_threads(), "product": product(), "torch": torch.__version__,
            "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
            "python": platform.python_version(), "system": platform.system()}


def matmul_flops(n, d_model, device):
    """FLOP/s of (n x d_model) @ (d_model x 4 d_model), the best of 20: the 100% of the other parts."""
    x, layer = torch.randn(n, d_model, device=device), Linear(d_model, 4 * d_model).to(device)
    times = max(1, min(100, 10**8 // (n * 4 * d_model**2)))
    many = torch.no_grad()(lambda: [layer(x) for _ in range(times)])
    return 2 * n * 4 * d_model**2 * times / min(timed(many, device) for _ in range(20))


# ---- the parts, and how their time grows ----

def measure(job, repeats, device, matmul=math.nan):
    job.run()
    reset_peak(device)
    seconds = statistics.median(timed(job.run, device) for _ in range(repeats))
    return {"seconds": seconds, "tokens_s": job.tokens / seconds, "flops_s": job.flops / seconds,
            "share": job.flops / seconds / matmul, "peak": memory(device)}


def bench_parts(shape, repeats, device):
    """Print and return seconds, tokens/s, FLOP/s and peak bytes of each part at one shape."""
    n = shape.batch * (shape.prompt + shape.response)
    matmul = matmul_flops(n, shape.d_model, device)
    print(f"matmul ({n} x {shape.d_model}) @ ({shape.d_model} x {4 * shape.d_model}): "
          f"{matmul / 1e9:.0f} GFLOP/s, 100% below\n\n{'':<18}{'seconds':>10}{'tokens/s':>11}"
          f"{'GFLOP/s':>9}{'share':>8}{'peak MB':>9}")
    results = {"matmul": {"flops_s": matmul}}
    for jobs in (sft_job, rm_job, generate_job, ppo_jobs):
        for name, job in jobs(shape, device).items():
            r = results[name.strip()] = measure(job, repeats, device, matmul)
            peak = "-" if r["peak"] is None else f"{r['peak'] / 1e6:.0f}"
            print(f"{name:<18}{r['seconds']:10.4f}{r['tokens_s']:11.0f}{r['flops_s'] / 1e9:9.1f}"
                  f"{r['share']:8.1%}{peak:>9}", flush=True)
    return results


def bench_growth(repeats, device):
    """Time of the SFT step and of generate at 4 layers as batch, length or d_model grows, one at a time."""
    results = {}
    for what, sizes in GROWTH.items():
        print(f"\n{what:<10}" + "".join(f"{name:>18}" for name in ("SFT step", "generate")))
        for size in sizes:
            at = {"batch": 8, "length": 64, "d_model": 128, what: size}
            shape = Shape(4, 4, at["d_model"], 1024, at["length"] // 4, at["length"] * 3 // 4, at["batch"])
            jobs = sft_job(shape, device) | generate_job(shape, device)
            row = {name: measure(job, repeats, device)["seconds"] for name, job in jobs.items()}
            results[f"{what} {size}"] = row
            first = results[f"{what} {sizes[0]}"]
            print(f"{size:<10}" + "".join(f"{s * 1e3:9.1f} ms{s / first[name]:5.1f}x"
                                          for name, s in row.items()), flush=True)
    return results


# ---- what length-sorted batches and early stops gain ----

def alternate(ours, plain, repeats, device):
    """Median seconds of both, run in turn (A B A B), and how many times faster ours is."""
    ours(), plain()
    pairs = [(timed(ours, device), timed(plain, device)) for _ in range(repeats)]
    a, b = (statistics.median(side) for side in zip(*pairs, strict=True))
    return {"seconds": a, "plain_seconds": b, "ratio": b / a}


def bench_ragged(rows, config, repeats, device):
    """The ratio in supervised tokens/s of length-sorted batches with the head only where it is needed to
    random batches, padded to their longest, with all logits, on the same examples [(tokens, P)]."""
    gpt = prepare(GPT(config), device)
    optimizer = make_optimizer(gpt, train_sft.Config(lr=1e-5))
    generator = torch.Generator().manual_seed(0)
    sorted_ = batches([len(row) for row, _ in rows], 2048, generator)
    random_ = torch.randperm(len(rows), generator=generator).chunk(len(sorted_))

    def fed(plan):  # tokens, padding included
        return sum(len(index) * max(len(rows[i][0]) for i in index) for index in plan)

    def plain_loss(tokens, mask):
        targets = tokens[:, 1:].masked_fill(~mask.to(device), -100)
        logits = gpt(tokens[:, :-1]).flatten(0, 1)
        return F.cross_entropy(logits, targets.flatten(), reduction="sum"), mask.sum()

    def train(plan, loss_of):
        for index in plan:
            loss, count = loss_of(*sft_batch([rows[i] for i in index], device))
            (loss / count).backward()
            clip_and_step(gpt, optimizer, 1.0, 0)

    tokens = sum(len(row) - P for row, P in rows)
    ours, plain = partial(train, sorted_, partial(sft_loss, gpt)), partial(train, random_, plain_loss)
    r = alternate(ours, plain, repeats, device)
    print(f"\nragged SFT: {tokens / r['seconds']:.0f} supervised tokens/s; random batches with all "
          f"logits: {tokens / r['plain_seconds']:.0f}; ratio {r['ratio']:.2f} (target 1.5); random "
          f"batches have {fed(random_) / fed(sorted_):.2f} times the tokens, padding included")
    return r | {"tokens": tokens}


def bench_ends(gpt, prompts, eos, new, repeats, device, name):
    """generate with and without stopping at eos: up to there the texts are the same, and only those tokens
    count."""
    tokens, P = pad(prompts, device)

    def continue_prompts(stop):
        generator = torch.Generator(device).manual_seed(0)
        return generate(gpt, tokens, P, new, eos=stop, generator=generator)

    lengths = (continue_prompts(eos)[1] - P).float()
    r = alternate(partial(continue_prompts, eos), partial(continue_prompts, None), repeats, device)
    print(f"early stops ({name}; {lengths.mean():.0f} +- {lengths.std():.0f} of {new} tokens): "
          f"{lengths.sum() / r['seconds']:.0f} tokens/s; without stopping: "
          f"{lengths.sum() / r['plain_seconds']:.0f}; ratio {r['ratio']:.2f} (target 1.3)")
    return r | {"model": name, "mean_length": lengths.mean().item()}


def stories(out, device):
    """SFT rows, a GPT whose texts end, prompts, eos, and where that GPT is from."""
    folder, _ = open_data("stories")
    examples, path = read_sft(folder / "sft.jsonl")[:1000], Path(out) / "sft.pt"
    if path.exists():
        tokenizer, gpt, name = load_tokenizer(path), load(GPT, path), str(path)
    else:
        tokenizer = train_tokenizer((text for example in examples for text in example), 1024)
        config = config_of(SHAPES["demo"]._replace(vocab_size=tokenizer.vocab_size), 128)
        gpt = ending_gpt(config, tokenizer.eos)
        name = f"random weights, since {path} is missing"
    rows = encode_demonstrations(examples, tokenizer, 128, "sft.jsonl")
    prompts = read_prompts(folder / "prompts_val.jsonl")[:64]
    prompts = encode_prompts(prompts, tokenizer, gpt.config.block_size // 2, "prompts_val.jsonl")
    return rows, prepare(gpt, device), prompts, tokenizer.eos, name


# ---- against other people's code ----

def ask(command, pattern, cwd=None):
    """What `pattern` finds in the output of a command, and the peak memory of its process in bytes.

    The command runs in `cwd`, or in an empty folder.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryDirectory() as empty:
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=cwd or empty)
        _, child.returncode, usage = os.wait4(child.pid, 0)  # of this child only
        out.seek(0)
        text = out.read()
    found = re.search(pattern, text)
    if child.returncode or not found:
        raise UserError(f"{' '.join(command)} failed: {(text.strip().splitlines() or ['no output'])[-1]}")
    return found[1], usage.ru_maxrss * (1024 if sys.platform == "linux" else 1)


def find_peers(cfg):
    """Absolute paths of --peer-python and of the folder --peers."""
    python, folder = shutil.which(cfg.peer_python), Path(cfg.peers).absolute()
    for name in ("peer_generate.py", "peer_ppo.py"):
        if not (folder / name).exists():
            raise UserError(f"--peers {cfg.peers}: no {name} in this folder")
    if not python:
        raise UserError(f"--peer-python {cfg.peer_python}: no such program")
    return os.path.abspath(python), folder


def bench_peers(cfg, shapes, rounds=2):
    """Ours and theirs in turn (A B A B), each in its own process; above a ratio of 1, ours is better."""
    python, folder = find_peers(cfg)
    results = {"versions": ask([python, "-c", VERSIONS], "versions: (.+)")[0]}
    print(f"theirs: {results['versions']}\n{'':<24}{'ours':>10}{'theirs':>10}{'ratio':>8}  target")
    for (what, name), targets in RATIOS.items():
        if name not in shapes:
            continue
        ours = [*bench_plan.BENCH, "--only", what, "--shape", name, "--repeats", str(cfg.repeats),
                "--device", "cpu"]  # where the peers run
        size = [*map(str, shapes[name])] + (["4", "1", str(cfg.repeats + 1)] if what == "ppo" else [])
        theirs = [python, str(folder / f"peer_{what}.py"), *size]
        sides = (ours, bench_plan.ROOT), (theirs, None)
        runs = [ask(command, LINE[what], cwd) for _ in range(rounds) for command, cwd in sides]
        a, b = ([statistics.median(map(float, x)) for x in zip(*runs[i::2], strict=True)] for i in (0, 1))
        ratios = b[0] / a[0] if what == "ppo" else a[0] / b[0], b[1] / a[1]
        results[f"{what} {name}"] = {"ours": a, "theirs": b, "ratio": ratios[0], "memory_ratio": ratios[1]}
        for i, unit in enumerate(("s" if what == "ppo" else "tokens/s", "peak bytes")):
            print(f"{what:<9}{name:<5}{unit:<10}{a[i]:10.4g}{b[i]:10.4g}{ratios[i]:8.2f}  {targets[i]}",
                  flush=True)
    return results


def print_one(what, shape, cfg, device):
    """Measure one part in this process and print the line that --peers or --check reads."""
    if what == "generate":
        r = measure(generate_job(shape, device)["generate"], cfg.repeats, device)
        print(f"onetrunk generate: {r['tokens_s']:.1f} tokens/s")
    elif what == "ppo":  # peer_ppo.py has prompts of equal length
        r = measure(ppo_jobs(shape, device, ragged=False)["PPO update"], cfg.repeats, device)
        print(f"onetrunk PPO: {r['seconds']:.4f} s per update")
    elif what == "ranks":
        r, message = (measure(job, cfg.repeats, device) for job in ranks_jobs(shape, device))
        whole, alone = (1000 * x["seconds"] for x in (r, message))
        print(f"SFT step, {ranks.COUNT} processes: {r['tokens_s']:.0f} tokens/s; {whole:.1f} ms, {alone:.1f} "
              f"of them to sum {message['tokens_s'] * message['seconds'] / 1e6:.1f} MB of gradients")
    else:
        ppo_jobs(Shape(2, 2, 32, 64, 8, 8, 4), device)["PPO update"].run()  # what torch loads lazily
        reset_peak(device)
        before = memory(device, "VmRSS")
        update = ppo_jobs(shape, device, False, cfg.micro_batch)["PPO update"]
        update.run(), update.run()  # AdamW has its states from the second on
        print(f"{memory(device) - before} bytes")


def bench_all(shape, cfg, device):
    results = {"parts": bench_parts(shape, cfg.repeats, device), "growth": bench_growth(cfg.repeats, device)}
    rows, gpt, prompts, eos, name = stories(cfg.out, device)
    few = rows if shape == SHAPES["demo"] else rows[:100]  # seconds instead of minutes
    config = config_of(shape._replace(vocab_size=max(shape.vocab_size, gpt.config.vocab_size)), 128)
    results["ragged"] = bench_ragged(few, config, cfg.repeats, device)
    new = gpt.config.block_size - max(map(len, prompts))
    results["ends"] = bench_ends(gpt, prompts, eos, new, cfg.repeats, device, name)
    return results


def main(cfg):
    torch.manual_seed(0)
    device = pick_device(cfg.device)
    shapes = {one_of(SHAPES, cfg.shape, "shape"): SHAPES[cfg.shape]} if cfg.shape else SHAPES
    shape = SHAPES[cfg.shape or "demo"]
    if cfg.only:
        return print_one(one_of(("generate", "ppo", "memory", "ranks"), cfg.only, "only"), shape, cfg, device)
    about = machine(device)
    print(", ".join(f"{name} {x}" for name, x in about.items() if x))
    if cfg.data:
        results = bench_data()
    elif cfg.plan and cfg.check:
        results = bench_plan.check(shapes, config_of, cfg.micro_batch)
    elif cfg.plan:
        config = bench_plan.MODELS[one_of(bench_plan.MODELS, cfg.model, "model")]
        results = bench_plan.show(config, cfg.model, cfg.batch, cfg.prompt, cfg.response, cfg.micro_batch,
                                  cfg.gpu_memory)
    else:
        results = bench_peers(cfg, shapes) if cfg.peers else bench_all(shape, cfg, device)
    if cfg.json:
        Path(cfg.json).write_text(json.dumps({"machine": about, "config": asdict(cfg)} | results, indent=1))


if __name__ == "__main__":
    cli(main, Config)
