"""Thousands of damaged files, by seeded mutations: checkpoints, saved states with their log and mark, and a
pytorch_model.bin for `python -m tools.hf import`: python runs/damage.py [--files N] [--cli N] [--seed S]

Each must be refused in one sentence, or load with exactly the original weights, bit for bit. A traceback, a
changed weight, more than 10 s or 1 GB are faults: they are printed with a recipe, `--case TARGET KIND NUMBER`
repeats one, and the exit status is 1. There are two sorts. Damaged bytes leave the checksums wrong, and then
nothing at all may change. New files, whose checksums are right, hold a value of another type, size or shape,
or a hostile pickle; never other weights that are valid (half precision, too), since no program could tell.
One process, which has loaded torch, reads all files as the scripts do; --cli many go through the real command
lines as well. 4,000 files take 20 minutes on a busy core.
"""
import argparse
import copy
import gzip
import hashlib
import io
import json
import math
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter, defaultdict
from pathlib import Path

import torch

ROOT, SECONDS, MEMORY = Path(__file__).resolve().parents[1], 10, 10**9
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
RUN = "--data ../data --device cpu --out . --save-every 1"
STAGES = {"sft": f"train_sft.py {RUN} --tokenizer bytes --n-layer 1 --n-head 2 --d-model 16 --block-size 32 "
                 "--batch-tokens 128 --epochs 3",
          "rm": f"train_rm.py {RUN} --batch-tokens 128 --epochs 2",
          "ppo": f"ppo.py {RUN} --updates 4 --batch 4 --max-new-tokens 4 --epochs 1 --show 0 --ptx-coef 0.5"}
SAMPLE = "sample.py --device cpu --temperature 0 --n 1 --max-new-tokens 8 --ckpt"
TARGETS = {  # name of its folder: how often, its files, a command that reads them, the file that this writes
    "sft": (6, ["sft.pt"], f"{SAMPLE} sft.pt a", None),
    "rm": (6, ["rm.pt"], f"{SAMPLE} sft.pt --reward rm.pt a", None),
    "gpt2": (9, ["pytorch_model.bin"], "-m tools.hf import . got.pt --tokenizer bytes", "got.pt"),
    **{f"{name} state": (n, [f"{name}.{end}" for end in ("state.pt", "state.jsonl", "finished.pt")],
                         f"{STAGES[name]} --resume", f"{name}.pt")
       for name, n in (("sft", 4), ("rm", 2), ("ppo", 1))},
}


# ---- the process that reads ----

def load_all(target):
    """What the product makes of the files in this folder: tensors and plain values, nested in dicts."""
    import lib.resume
    from lib.checkpoint import kind, load, load_tokenizer
    from lib.flags import cli, one_sentence
    from model import GPT, RewardModel

    def checkpoint(path):
        with one_sentence("sample.py", ""):
            kind(path)
            tokenizer, model = load_tokenizer(path), load(RewardModel if path == "rm.pt" else GPT, path)
        return {"weights": model.state_dict(), "plain": [vars(model.config), tokenizer.spec(), model.chat,
                                                         getattr(model, "pool", None)]}
    if target == "gpt2":
        from tools.hf import main
        Path("got.pt").unlink(missing_ok=True)
        with one_sentence("hf.py", ""):
            main(TARGETS[target][2].split()[2:])
    if not target.endswith("state"):
        return checkpoint({"gpt2": "got.pt"}.get(target, f"{target}.pt"))

    class Loaded(BaseException):
        pass

    def begin(run, cfg, steps, **parts):  # the run ends as soon as the state is loaded
        step = shipped(run, cfg, steps, **parts)
        run._restore_handlers()
        raise Loaded(copy.deepcopy({x: lib.resume.get_state(part) for x, part in run.parts.items()}), step)
    shipped, sys.argv = lib.resume.Run.begin, TARGETS[target][2].split()
    lib.resume.Run.begin, script = begin, __import__(sys.argv[0].removesuffix(".py"))
    for name in ("check_model", "check_scores", "check_start"):  # self-checks of the network, not of files
        if hasattr(script, name):
            setattr(script, name, lambda *args, **more: None)
    try:
        cli(script.main, script.Config)
    except Loaded as found:
        return found.args
    finally:
        lib.resume.Run.begin = shipped


def flat(x, at=""):
    """(place, value) of all that nested dicts, lists and tuples hold."""
    for key, y in x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, (list, tuple)) else ():
        yield from flat(y, f"{at}.{key}")
    if not isinstance(x, (dict, list, tuple)):
        yield at, x


def digest(found):
    """Two hashes: of all tensors, and of all tensors and plain values."""
    tensors, everything = hashlib.sha256(), hashlib.sha256()
    for at, x in sorted(flat(found), key=lambda pair: pair[0]):
        said = f"{at} {x!r}".encode()
        if isinstance(x, torch.Tensor):
            bits = x.reshape(-1).view(torch.uint8).numpy().tobytes()
            tensors.update(said := f"{at} {x.dtype} {tuple(x.shape)}".encode() + bits)
        everything.update(said)
    return [tensors.hexdigest(), everything.hexdigest()]


def serve():
    """For each line of stdin, [folder, target]: read the target's files there, and answer with a line."""
    answers = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)
    for line in sys.stdin:
        folder, target = json.loads(line)
        os.chdir(folder)
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        try:
            answer = {"loaded": digest(load_all(target))}
        except SystemExit as end:
            answer = {"refused": str(end.code)}
        except BaseException:
            answer = {"traceback": traceback.format_exc()}
        answer["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        os.write(answers, (json.dumps(answer) + "\n").encode())


class Reader:
    """The process that serves, watched; a new one is started when it was killed, died, or has grown."""

    def __init__(self, work):
        self.work, self.process, self.good = work, None, {}

    def ask(self, target, folder="bad"):
        """The process's answer; {"fault": ...} if it took too long or too much, or died."""
        if not self.process:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, text=True, env=ENVIRONMENT)
            self.base = math.inf
            for name in TARGETS:  # loads all modules; and what the damaged files are held against
                self.good[name] = self.ask(name, "good")
            self.base = self.good[name]["peak"]
        print(json.dumps([str(self.work / folder / target), target]), file=self.process.stdin, flush=True)
        begun, statm = time.monotonic(), Path(f"/proc/{self.process.pid}/statm")
        while not select.select([self.process.stdout], [], [], 0.02)[0]:
            if int(statm.read_text().split()[1]) * resource.getpagesize() > self.base + MEMORY:
                return self.end(f"more than {MEMORY} bytes")
            if time.monotonic() - begun > (60 if self.base == math.inf else SECONDS):
                return self.end(f"more than {SECONDS} s")
        if not (line := self.process.stdout.readline()):
            return self.end(f"the process died ({self.process.wait()})")
        answer = json.loads(line)
        more = answer["peak"] - self.base
        return self.end(f"{more} bytes of memory") if more > MEMORY else answer

    def end(self, why):
        self.process.kill()
        self.process.communicate()
        self.process = None
        return {"fault": why}


def command(folder, target):
    """The target's command line, run in the folder; an answer as the Reader's."""
    _, _, arguments, written = TARGETS[target]
    arguments = arguments if arguments.startswith("-m") else f"{ROOT}/{arguments}"
    done = subprocess.run([sys.executable, *arguments.split()], cwd=folder, env=ENVIRONMENT, text=True,
                          timeout=300, capture_output=True, errors="replace")
    if done.returncode == 0 and not done.stderr:
        result = (folder / written).read_bytes() if written else done.stdout.encode()
        return {"loaded": [hashlib.sha256(result).hexdigest()]}
    if done.returncode == 1:
        return {"refused": done.stderr.removesuffix("\n")}
    return {"traceback": f"exit status {done.returncode}\n{done.stderr}"}


def judge(answer, good, whole):
    """"refused", "loaded", or what is wrong. `whole`: plain values must be the original ones, too."""
    if "loaded" in answer:
        pairs = list(zip(answer["loaded"], good["loaded"], strict=True))[:None if whole else 1]
        return "loaded" if all(a == b for a, b in pairs) else "loaded with other weights or values"
    if "refused" in answer:
        text = answer["refused"]
        fine = text.isprintable() and ".py: " in text[:20] and len(text) < 1000 and "Traceback" not in text
        return "refused" if fine else f"not a sentence: {text[:300]!r}"
    return answer.get("fault") or answer["traceback"]


# ---- damaged bytes ----

def spots(raw, what):
    """Ranges of a zip's bytes: the pickle, the directory, or the headers of its records."""
    with zipfile.ZipFile(io.BytesIO(raw)) as file:
        entries, directory = file.infolist(), file.start_dir
    heads = []
    for entry in entries:
        at = entry.header_offset
        heads.append((at, at + 30 + sum(int.from_bytes(raw[at + i:at + i + 2], "little") for i in (26, 28))))
    pickles = [(end, end + entry.file_size) for entry, (_, end) in zip(entries, heads, strict=True)
               if entry.filename.endswith("data.pkl")]
    return {"pickle": pickles, "directory": [(directory, len(raw))], "headers": heads}[what]


def flip(rng, raw, start, end):
    place, bit = rng.randrange(start, end), rng.randrange(8)
    return f"bit {bit} of byte {place}", raw[:place] + bytes([raw[place] ^ 1 << bit]) + raw[place + 1:]


def damage_bytes(rng, raw, kind, others):
    """(recipe, bytes)"""
    start = rng.randrange(len(raw))
    end = min(len(raw), start + rng.choice([1, 8, 64, 512, 4096, rng.randrange(1, len(raw))]))
    if kind == "bit anywhere":
        return flip(rng, raw, 0, len(raw))
    if kind.startswith("bit in "):
        return flip(rng, raw, *rng.choice(spots(raw, kind.removeprefix("bit in "))))
    if kind == "truncated":
        n = rng.choice([start, max(0, len(raw) - rng.randrange(1, 200)), rng.randrange(1, 100)])
        return f"to {n} bytes", raw[:n]
    if kind == "zeros":
        return f"{start} to {end}", raw[:start] + bytes(end - start) + raw[end:]
    if kind == "swapped":
        n = rng.randrange(1, min(5000, len(raw) // 3))
        a, b = sorted(x * n for x in rng.sample(range(len(raw) // n), 2))
        return f"{n} bytes at {a} and {b}", raw[:a] + raw[b:b + n] + raw[a + n:b] + raw[a:a + n] + raw[b + n:]
    if kind == "lost or inserted":
        new = rng.choice([b"", rng.randbytes(rng.randrange(1, 50)), raw[start:end] * 2])
        return f"{start} to {end} became {len(new)} bytes", raw[:start] + new + raw[end:]
    if kind == "doubled":
        how, (recipe, bad) = rng.randrange(6), flip(rng, raw, 0, len(raw))
        name, new = [("whole", raw + raw), ("damaged one first", bad + raw), ("damaged one last", raw + bad),
                     ("beginning", raw[:start] + raw), ("beginning after", raw + raw[:start]),
                     ("end", raw + raw[start:])][how]
        return f"{name}: {recipe}, {start}", new
    texts = [b"", b"hello\n", b"<!DOCTYPE html><html>Not found</html>", b'{"a": 1}\n' * 100, bytes(5000),
             rng.randbytes(5000), gzip.compress(raw), b"PK\3\4" + rng.randbytes(500), b"PK\5\6" + bytes(18),
             "ÿé\n".encode("utf-16"), b"\x80\x02}q\x00.", b"\x80\x04K\x01.", b"version https://git-lfs\n",
             *others]
    n = rng.randrange(len(texts))
    return f"text {n}", texts[n]


# ---- new files, with right checksums ----

VALUES = [None, "3", "", "x" * 10**6, -1, 10**9, 2**63, 10**30, 10**400, 0.5, math.nan, math.inf, True,
          b"x", [], {}, (), [0] * 10**5, {"a": 1}, {1: {}}, ("x", [None]), torch.ones(3), torch.zeros(0),
          torch.tensor(7),
          torch.zeros(1).expand(10**6, 10**6), torch.ones(2, 2, dtype=torch.int8),
          torch.ones(3, device="meta"), torch.eye(3).to_sparse()]
TENSORS = [torch.Tensor.double, torch.Tensor.long, torch.Tensor.bool, lambda x: x.to(torch.complex64),
           lambda x: x[None], lambda x: x.reshape(-1)[:0], lambda x: x.reshape(-1)[1:], torch.Tensor.flatten,
           lambda x: torch.cat([x, x]) if x.dim() else x.repeat(2), torch.Tensor.tolist,
           torch.Tensor.to_sparse, lambda x: x.to("meta"), lambda x: x.to(torch.int8),
           lambda x: torch.nn.Parameter(x, False),
           lambda x: torch.full_like(x, math.nan if x.is_floating_point() else 127),
           lambda x: x.reshape(-1)[:1].expand(10**5, 10**6)]


def saved(x):
    file = io.BytesIO()
    torch.save(x, file)
    return file.getvalue()


def rezipped(raw, change, compression=zipfile.ZIP_STORED):
    """A new zip of the records of `raw`, [(name, bytes)], as `change` makes them."""
    new = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(new, "w", compression) as file:
        for name, data in change([(entry.filename, old.read(entry)) for entry in old.infolist()]):
            file.writestr(name, data)
    return new.getvalue()


def places(x, at=()):
    """(place, value) of all that lies in nested dicts, lists and tuples, and of these."""
    for key, y in x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, (list, tuple)) else ():
        yield (*at, key), y
        yield from places(y, (*at, key))


def put(x, place, value):
    """A copy with `value` at the place; a function is called with what is there."""
    if not place:
        return value(x) if callable(value) else value
    new = dict(x) if isinstance(x, dict) else list(x)
    new[place[0]] = put(x[place[0]], place[1:], value)
    return tuple(new) if isinstance(x, tuple) else new


def damage_value(rng, raw, kind):
    """(recipe, bytes): a value, a tensor, or the names in a dict are others."""
    x = torch.load(io.BytesIO(raw), weights_only=True)
    # an optimizer may lack the state of what took no step: an expert without tokens, an update too large
    place, _ = rng.choice([(at, y) for at, y in places(x) if kind != "tensor" or isinstance(y, torch.Tensor)
                           if kind == "tensor" or at[2:] != ("state",)
                           if kind != "names" or at[2:3] != ("state",) or len(at) != 4])
    if kind != "names":
        new = VALUES if kind == "value" else TENSORS
        n = rng.randrange(len(new))
        return f"{place} = {kind} {n}", saved(put(x, place, new[n]))
    how, key = rng.randrange(5), place[-1]

    def renamed(inside):
        if not isinstance(inside, dict):
            return list(inside)[:-1]
        rest = {name: y for name, y in inside.items() if name != key}
        return [rest, rest | {f"{key}x": inside[key]}, inside | {"extra": torch.ones(2)},
                rest | {None: inside[key]}, list(inside.items())][how]
    return f"{place}, names {how}", saved(put(x, place[:-1], renamed))


def damage_record(rng, raw, kind):
    """(recipe, bytes): a record of the zip is longer, shorter, not there, or there twice."""
    share, how = rng.random(), rng.choice(["cut", "longer", "empty", "lost", "twice"])

    def change(records):
        i = int(share * len(records))
        name, data = records[i]
        new = {"cut": [(name, data[:int(share * len(data))])], "longer": [(name, data + data)], "lost": [],
               "empty": [(name, b"")], "twice": [(name, data), (name + " 2", data)]}[how]
        return [*records[:i], *new, *records[i + 1:]]
    return f"{how} {share:.3f}", rezipped(raw, change)


def doubled(n, mark, build):
    """Pickled: n containers, each of which holds the one before twice."""
    number = [(10**6 + i).to_bytes(4, "little") for i in range(n + 1)]
    return mark * n + b")r" + number[0] + b"".join(
        b"j" + old + build + b"r" + new for old, new in zip(number, number[1:], strict=False))


def called(name, *arguments):
    return b"c" + name + b"(" + b"".join(arguments) + b"tR"


HUGE, ARRAY = (n.to_bytes(5, "little") for n in (10**10, 2 * 10**9))
ARRAY, HUGE = called(b"builtins\nbytearray\n", b"\x8a\x05" + ARRAY), b"\x8a\x05" + HUGE
BOMBS = [*(code for n in (900, 5000, 10**5, 2 * 10**6) for code in (
            b"]" * n + b"a" * (n - 1), b")" + b"\x85" * n, b"}K\x01" * n + b"N" + b"s" * n)),
         *(doubled(n, b"(", b"t") for n in (24, 40, 10**4)), b"]r\0\0\1\0j\0\0\1\0a", b"X\xff\xff\xff\xffabc",
         b"]" * (70 * 10**6), b"(" * 10**6, ARRAY, called(b"collections\nCounter\n", ARRAY),
         called(b"collections\nOrderedDict\n", ARRAY), called(b"builtins\nset\n", ARRAY),
         called(b"torch\nTensor\n", HUGE), called(b"torch\nSize\n", b"(" + HUGE * 9 + b"t"),
         called(b"os\nsystem\n", b"X\x02\0\0\0ls"), b"\x8a\xff" + b"\x7f" * 255, b"N" * 10**6 + b"\x85"]


def damage_bomb(rng, raw, kind):
    """(recipe, bytes): a hostile pickle for a value or a key, or a record that unpacks to 1.5 GB."""
    n, mark = rng.randrange(len(BOMBS) + 1), b"X\x04\0\0\0BOMB"
    if n == len(BOMBS):
        name = rng.choice(["data.pkl", "data/0"])
        return f"{name} unpacks to 1.5 GB", rezipped(raw, lambda records: [
            (x, bytes(3 * 2**29) if x.endswith(name) else data) for x, data in records], zipfile.ZIP_DEFLATED)
    x = torch.load(io.BytesIO(raw), weights_only=True)
    place, as_key = rng.choice([at for at, _ in places(x) if len(at) < 4]), rng.random() < 0.3
    as_key = as_key and isinstance(get(x, place[:-1]), dict)
    x = put(x, place[:-1], lambda y: {**y, "BOMB": 1}) if as_key else put(x, place, "BOMB")
    return f"bomb {n} at {place}{', a key' * as_key}", rezipped(saved(x), lambda records: [
        (name, data.replace(mark, BOMBS[n]) if name.endswith(".pkl") else data) for name, data in records])


NEW = {"value": damage_value, "tensor": damage_value, "names": damage_value, "record resized": damage_record,
       "bomb": damage_bomb}
KINDS = {"bit anywhere": 10, "bit in pickle": 5, "bit in directory": 5, "bit in headers": 4, "truncated": 4,
         "zeros": 4, "swapped": 4, "lost or inserted": 4, "doubled": 4, "another file": 3, "value": 8,
         "tensor": 5, "names": 3, "record resized": 3, "bomb": 2}  # and how often


def get(x, place):
    return get(x[place[0]], place[1:]) if place else x


def damage(good, seed, target, kind, number):
    """(recipe, name of the file, its bytes) of a case. In a log, which is text, only bytes can be damaged."""
    rng = random.Random(f"{seed} {target} {kind} {number}")
    names = TARGETS[target][1]
    odds = [6, 2 * (kind not in NEW and " in " not in kind), kind != "tensor"][:len(names)]
    name, = rng.choices(names, odds)
    raw = (good / target / name).read_bytes()
    others = [(good / other / x[1][0]).read_bytes() for other, x in TARGETS.items() if other != target]
    recipe, raw = NEW[kind](rng, raw, kind) if kind in NEW else damage_bytes(rng, raw, kind, others)
    return f"{name}: {recipe}", name, raw


# ---- the good files, and the whole ----

def make_good(good):
    """Data; checkpoints; a state of each stage in mid-run, beside the mark of an earlier one; a GPT-2."""
    rng = random.Random(0)

    def word():
        return "".join(rng.choice("abc") for _ in range(rng.randint(3, 6)))

    (good / "data").mkdir(parents=True)
    for name, keys in (("sft", ("prompt", "completion")), ("preferences", ("prompt", "chosen", "rejected")),
                       ("prompts", ("prompt",))):
        for end, n in (("", 24), ("_val", 4)):
            rows = [{key: f"{word()} {i}" for key in keys} for i in range(n)]
            (good / f"data/{name}{end}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for target in (*TARGETS, "all"):
        (good / target).mkdir()
    for name, (script, *flags) in ((name, line.split()) for name, line in STAGES.items()):
        begin = [sys.executable, ROOT / script, *flags]
        how = {"env": ENVIRONMENT, "stdout": subprocess.DEVNULL}
        subprocess.run(begin, cwd=good / "all", check=True, **how)
        for target in set(TARGETS) - {"gpt2", f"{name} state"} if name != "ppo" else ():
            shutil.copy(good / f"all/{name}.pt", good / target)
        folder = good / f"{name} state"
        shutil.copy(good / f"all/{name}.finished.pt", folder)
        with subprocess.Popen(begin, cwd=folder, stderr=subprocess.DEVNULL, **how) as run:
            while not (folder / f"{name}.state.pt").exists():
                time.sleep(0.001)
            run.send_signal(signal.SIGTERM)  # it finishes the step and saves it
    V, T, C = 257, 32, 16
    shapes = {"wte.weight": (V, C), "wpe.weight": (T, C), "ln_f.weight": (C,), "ln_f.bias": (C,)}
    for layer, shape in (("ln_1", (C,)), ("attn.c_attn", (C, 3 * C)), ("attn.c_proj", (C, C)), ("ln_2", (C,)),
                         ("mlp.c_fc", (C, 4 * C)), ("mlp.c_proj", (4 * C, C))):
        shapes |= {f"h.0.{layer}.weight": shape, f"h.0.{layer}.bias": shape[-1:]}
    torch.manual_seed(0)
    torch.save({f"transformer.{name}": torch.randn(shape) for name, shape in shapes.items()},
               good / "gpt2/pytorch_model.bin")
    (good / "gpt2/config.json").write_text(json.dumps({
        "model_type": "gpt2", "vocab_size": V, "n_positions": T, "n_embd": C, "n_layer": 1, "n_head": 2}))


def renew(work, target, changed=()):
    """The target's folder below "bad" as it was, but for the (name, bytes) in `changed`; returns it."""
    shutil.rmtree(work / "bad" / target, ignore_errors=True)
    shutil.copytree(work / "good" / target, work / "bad" / target)
    for name, data in changed:
        (work / "bad" / target / name).write_bytes(data)
    return work / "bad" / target


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=4000)
    parser.add_argument("--cli", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", nargs=3, help="repeat one: a target, a kind, a number")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args, begun = parser.parse_args(), time.monotonic()
    if args.serve:
        return serve()
    rng, table, faults, expected = random.Random(args.seed), defaultdict(Counter), 0, {}
    cases = [(rng.choices(list(TARGETS), [often for often, *_ in TARGETS.values()])[0],
              rng.choices(list(KINDS), list(KINDS.values()))[0], i) for i in range(args.files)]
    cases = [tuple(args.case)] if args.case else cases
    every = len(cases) // args.cli or 1 if args.cli else math.inf  # that many go through the command line
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        make_good(work / "good")
        shutil.copytree(work / "good/data", work / "bad/data")
        reader = Reader(work)
        for i, (target, kind, number) in enumerate(cases):
            if i and i % 500 == 0:
                print(f"{i} files, {faults} faults, {time.monotonic() - begun:.0f} s", flush=True)
            recipe, *changed = damage(work / "good", args.seed, target, kind, number)
            renew(work, target, [changed])
            answers = {kind: (reader.ask(target), reader.good.get(target))}
            if i % every == 0:
                if target not in expected:
                    expected[target] = command(renew(work, target), target)
                answers["(command line)"] = command(renew(work, target, [changed]), target), expected[target]
            for row, (answer, good) in answers.items():
                end = judge(answer, good, kind not in NEW)
                known = end in ("refused", "loaded")
                table[row].update(["files", end if known else "FAULTS"])
                faults += not known
                if not known or args.case:
                    print(f"{'FAULT ' * (not known)}--seed {args.seed} --case '{target}' '{kind}' {number}, "
                          f"{row}: {recipe}: {end} {answer.get('refused', '')}", flush=True)
    names = ("files", "refused", "loaded", "FAULTS")
    print("kind".ljust(16), *(name.rjust(8) for name in names))
    for kind in (*KINDS, "(command line)"):
        print(kind.ljust(16), *(str(table[kind][name]).rjust(8) for name in names))
    print(f"{len(cases)} files, {faults} faults, {time.monotonic() - begun:.0f} s")
    sys.exit(faults > 0)


if __name__ == "__main__":
    main()
