"""How long a start takes, and how much memory, as the data grows: what train_rm.py does with the pairs before
its first step, each time in a process of its own. Called by `python -m tools.bench --data`.
"""
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from data import arrays
from data.examples import encode_rankings, standardise
from data.files import UserError
from data.records import read_preferences
from data.split import read_split
from data.tokenizer import get_tokenizer
from lib.common import count_steps
from lib.flags import Shared
from lib.start import ranked_tokens
from train_rm import row_sizes, sizes

ROOT = Path(__file__).resolve().parents[1]
PAIRS = (10_000, 160_000, 1_600_000)
WAYS = {"lists": 160_000, "first": PAIRS[-1], "again": PAIRS[-1]}  # and up to how many pairs


def write_pairs(path, n):
    """n pairs of about 350 tokens, as in Anthropic's HH, of the words in our documents."""
    rng = random.Random(0)
    words = " ".join(file.read_text() for file in sorted(ROOT.glob("docs/*.md"))).split()

    def text(n):
        return " " + " ".join(rng.choices(words, k=n))

    with open(path, "w", encoding="utf-8") as file:
        for i in range(n):
            row = {"prompt": f"\n\nHuman: {i}{text(rng.randint(20, 80))}\n\nAssistant:",
                   "chosen": text(rng.randint(5, 50)), "rejected": text(rng.randint(5, 50)) + " no"}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def start(folder, way):
    """What train_rm.py does before its first step; prints seconds, CPU seconds, peak bytes and tokens."""
    arrays.LARGE = 2**62 if way == "lists" else 0
    try:
        tokenizer = get_tokenizer("gpt2")
    except UserError:
        tokenizer = get_tokenizer("bytes")
    clock = time.perf_counter(), time.process_time()
    train, val = read_split(read_preferences, Path(folder) / "preferences.jsonl", Shared())
    arrays.derived(train, "size", lambda: ranked_tokens(train, tokenizer), tokenizer.spec())
    groups = standardise(encode_rankings(train, tokenizer, 1024, "preferences.jsonl"))
    encode_rankings(val, tokenizer, 1024, "preferences_val.jsonl")
    count_steps(1, 1, **sizes(groups), budget=16_384)
    tokens = sum(map(sum, row_sizes(groups)))
    took = time.perf_counter() - clock[0], time.process_time() - clock[1]
    status = Path("/proc/self/status")
    peak = re.search(r"VmHWM:\s+(\d+)", status.read_text()) if status.exists() else None
    print(json.dumps([*took, int(peak[1]) * 1024 if peak else None, tokens]))


def ask(folder, way):
    command = [sys.executable, "-c", f"from tools.bench_data import start; start({str(folder)!r}, {way!r})"]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if child.returncode:
        raise UserError(f"--data: {(child.stderr.strip().splitlines() or ['no output'])[-1]}")
    return json.loads(child.stdout.splitlines()[-1])


def bench_data():
    """Print and return the table. lists: without arrays; first: they are made; again: they are there."""
    results = {}
    print(f"\n{'pairs':>9}{'way':>7}{'seconds':>10}{'CPU s':>8}{'peak MB':>9}{'tokens':>13}")
    for n in PAIRS:
        with tempfile.TemporaryDirectory() as folder:
            write_pairs(Path(folder) / "preferences.jsonl", n)
            write_pairs(Path(folder) / "preferences_val.jsonl", 1000)
            for way in (way for way, most in WAYS.items() if n <= most):
                seconds, cpu, peak, tokens = results[f"{way} {n}"] = ask(folder, way)
                print(f"{n:9}{way:>7}{seconds:10.2f}{cpu:8.2f}{(peak or 0) / 1e6:9.0f}{tokens:13}",
                      flush=True)
    return results
