"""Malicious and corrupt checkpoints: one clear sentence within two seconds; no code run, no file made, little
memory used.

Foreign safetensors and pickles are read by tools/hf.py: tests/test_hf.py.
"""
import os
import pickle
import random
import re
import resource
import time
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch

from data.files import UserError
from data.tokenizer import get_tokenizer, train_tokenizer
from lib.checkpoint import load, load_tokenizer, save
from model import GPT, GPTConfig, RewardModel

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
CORRUPT = "is not an onetrunk checkpoint, or is corrupt"
FIT = "the weights do not fit this model.py"


@pytest.fixture(scope="module")
def data(tiny):
    """data(sizes, tensors, **changes) -> what is in a good checkpoint of a GPT, with changes."""
    weights = tiny(vocab_size=257).state_dict()
    config = {"vocab_size": 257, "block_size": 64, "n_layer": 2, "n_head": 4, "d_model": 32, "dropout": 0.0,
              "bias": True}
    with torch.device("meta"):  # its imports take a second, once
        GPT(GPTConfig(**config))

    def make(sizes=None, tensors=None, **changes):
        return {"kind": "GPT", "pool": None, "tokenizer": {"name": "bytes"}, "config": config | (sizes or {}),
                "weights": {**weights, **(tensors or {})}} | changes
    return make


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB


load_gpt = partial(load, GPT)


def refused(path, match, read=load_gpt):
    """A UserError of one line that names the file, soon, with no new file and little memory."""
    files, memory, start = sorted(os.listdir(path.parent)), peak(), time.process_time()
    with pytest.raises(UserError, match=match) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message and len(message) < 700
    assert time.process_time() - start < 2
    assert peak() - memory < 200_000
    assert sorted(os.listdir(path.parent)) == files


def test_the_good_one_loads(data, tmp_path):
    torch.save(data(), tmp_path / "x.pt")
    assert load(GPT, tmp_path / "x.pt").config.d_model == 32
    assert load_tokenizer(tmp_path / "x.pt").name == "bytes"
    half = data()
    half["weights"] = {name: x.bfloat16() for name, x in half["weights"].items()}
    torch.save(half, tmp_path / "x.pt")
    assert load(GPT, tmp_path / "x.pt").lm_head.weight.dtype == torch.float32


# ---- files ----

class Code:
    def __init__(self, function, *args):
        self.what = function, args

    def __reduce__(self):
        return self.what


def repack(path, change=lambda name, raw: raw, **how):
    with zipfile.ZipFile(path) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", **how) as file:
        for name, raw in entries.items():
            file.writestr(name, change(name, raw))


def bomb(path, data):
    torch.save(data(tokenizer={"name": "a" * 3 * 10**7}), path)
    repack(path, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10**6


def two_pickles(path, data):
    """A second pickle under another folder: whichever is read, none may name a function."""
    torch.save(data(), path)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("y/data.pkl", pickle.dumps(Code(os.mkdir, "ran"), 2))


def make_dir(path):
    """Code that would make a folder."""
    return Code(os.mkdir, str(path.parent / "ran"))


def save_eval(path, data):
    torch.save(Code(eval, f"open({str(path.parent / 'ran')!r}, 'w')"), path)


FILES = {
    "code": lambda path, data: torch.save(data(tensors={"a": make_dir(path)}), path),
    "code, a plain pickle": lambda path, data: path.write_bytes(pickle.dumps(make_dir(path))),
    "code, old format": lambda path, data: torch.save(data(pool=make_dir(path)), path,
                                                      _use_new_zipfile_serialization=False),
    "code as the key": lambda path, data: torch.save({make_dir(path): 1}, path),
    "eval": save_eval, "two pickles": two_pickles, "zip bomb": bomb,
    "memory by bytearray": lambda path, data: torch.save(data(pool=Code(bytearray, 10**11)), path),
    "memory by a storage": lambda path, data: torch.save(data(pool=Code(torch.UntypedStorage, 10**12)), path),
    "a tensor of 4 EB on 4 bytes": lambda path, data: torch.save(
        data(tensors={"a": torch.zeros(1).expand(2**30, 2**30)}), path),
    "sparse": lambda path, data: torch.save(
        data(tensors={"trunk.ln_f.bias": torch.eye(32).to_sparse()}), path),
    "on no device": lambda path, data: torch.save(
        data(tensors={"a": torch.zeros(2**50, device="meta")}), path),
    "a list": lambda path, data: torch.save([data()], path),
    "a tensor": lambda path, data: torch.save(torch.ones(3), path),
    "a whole model": lambda path, data: torch.save(torch.nn.Linear(2, 2), path),
    "an empty zip": lambda path, data: zipfile.ZipFile(path, "w").close(),
    "a zip of something else": lambda path, data: zipfile.ZipFile(path, "w").writestr("x/data.txt", "hello"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.filterwarnings("ignore:Duplicate name", "ignore:Sparse", "ignore:Using a non-tuple")
def test_files(data, tmp_path, name):
    FILES[name](tmp_path / "x.pt", data)
    for read in (load_gpt, partial(load, RewardModel), load_tokenizer):
        refused(tmp_path / "x.pt", CORRUPT, read)


def test_truncated_anywhere_and_random_bytes_in_it(data, tmp_path):
    """Every truncation is refused; changed bytes are refused, or harmless where only a weight changes."""
    path, rng = tmp_path / "x.pt", random.Random(0)
    torch.save(data(), path)
    raw = path.read_bytes()
    for cut in [0, 1, 3, 4, 30, 100, *(rng.randrange(len(raw)) for _ in range(10)), len(raw) - 1]:
        path.write_bytes(raw[:cut])
        refused(path, CORRUPT)
    path.write_bytes(rng.randbytes(100_000))
    refused(path, CORRUPT)
    start, stop = raw.index(b"data.pkl") + 8, raw.index(b"byteorder")  # of the pickle
    for i in range(60):
        bad = bytearray(raw)  # in the pickle, or in the zip's directory at the end
        place = rng.randrange(start, stop) if i % 2 else rng.randrange(len(raw) - 2000, len(raw))
        bad[place : place + rng.randrange(1, 9)] = rng.randbytes(rng.randrange(9))
        path.write_bytes(bad)
        try:
            load(GPT, path)
        except UserError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)


# ---- what is in it ----

CONFIGS = [
    {"d_model": 10**9}, {"n_layer": 10**7}, {"n_layer": 10**18}, {"block_size": 10**9},
    {"vocab_size": 2**30, "d_model": 2**30}, {"vocab_size": 10**400}, {"d_model": -32}, {"d_model": 0},
    {"n_head": 0}, {"n_head": -2}, {"n_head": 3}, {"n_layer": 0}, {"n_layer": -1}, {"d_model": 32.0},
    {"n_layer": True}, {"d_model": "32"}, {"d_model": "%9999999999d"}, {"d_model": None}, {"d_model": [32]},
    {"bias": 1}, {"bias": "yes"}, {"rope": True}, {"n_layer": 1}, {"vocab_size": 258}, {"bias": False}]


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("change", CONFIGS, ids=lambda change: str(change)[:30])
def test_sizes_are_checked_before_anything_is_allocated(data, tmp_path, change, monkeypatch):
    """No network is built in real memory, for a reward model neither."""
    allocated = []
    monkeypatch.setattr(torch.nn.Embedding, "reset_parameters",
                        lambda self: allocated.append(self) if self.weight.device.type == "cpu" else None)
    for kind, name in ((GPT, "GPT"), (RewardModel, "RewardModel")):
        torch.save(data(change, kind=name, pool="last" if name == "RewardModel" else None), tmp_path / "x.pt")
        refused(tmp_path / "x.pt", FIT, partial(load, kind))
    assert not allocated


def test_hollow_tensors_of_the_absurd_sizes_are_refused_too(data, tmp_path):
    """Names, sizes and config agree, but behind 40 GB of weights are 4 bytes."""
    hollow = torch.zeros(1).expand(10**7, 1024)
    tensors = {"trunk.wte.weight": hollow, "lm_head.weight": hollow}
    torch.save(data({"vocab_size": 10**7, "d_model": 1024}, tensors), tmp_path / "x.pt")
    refused(tmp_path / "x.pt", CORRUPT)


WEIGHTS = {
    "missing": (lambda w: w.pop("trunk.ln_f.bias"), FIT + ".*trunk.ln_f.bias"),
    "extra": (lambda w: w.update(more=torch.zeros(1)), FIT + ".*more"),
    "many extra": (lambda w: w.update({f"more{i}": torch.zeros(1) for i in range(500)}), FIT),
    "transposed": (lambda w: w.update({"trunk.wpe.weight": torch.zeros(31, 32)}), FIT + ".*trunk.wpe.weight"),
    "a scalar": (lambda w: w.update({"trunk.ln_f.bias": torch.zeros(())}), FIT + ".*trunk.ln_f.bias"),
    "ints": (lambda w: w.update({"trunk.ln_f.bias": torch.zeros(32, dtype=torch.long)}), CORRUPT),
    "bools": (lambda w: w.update({"trunk.ln_f.bias": torch.zeros(32, dtype=torch.bool)}), CORRUPT),
    "complex": (lambda w: w.update({"trunk.ln_f.bias": torch.zeros(32, dtype=torch.complex64)}), CORRUPT),
    "a list": (lambda w: w.update({"trunk.ln_f.bias": [0.0] * 32}), CORRUPT),
    "a number for a name": (lambda w: w.update({1: torch.zeros(1)}), CORRUPT),
    "a name of 1 MB": (lambda w: w.update({"x\n" * 500_000: torch.zeros(1)}), FIT),
    "NaN": (lambda w: w["trunk.blocks.1.mlp.up.weight"].view(-1)[5:6].fill_(torch.nan),
            "trunk.blocks.1.mlp.up.weight holds non-finite numbers"),
    "infinity": (lambda w: w["trunk.ln_f.bias"][0:1].fill_(-torch.inf),
                 "trunk.ln_f.bias holds non-finite numbers"),
    "too large for float32": (
        lambda w: w.update({"trunk.ln_f.bias": torch.full((32,), 1e300, dtype=torch.float64)}),
        "trunk.ln_f.bias holds non-finite numbers"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(data, tmp_path, name):
    change, match = WEIGHTS[name]
    content = data()
    content["weights"] = {key: x.clone() for key, x in content["weights"].items()}
    change(content["weights"])
    torch.save(content, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", match)


@pytest.mark.parametrize("change", [
    {"kind": 3}, {"kind": "x" * 10**6}, {"kind": None}, {"pool": "first"}, {"pool": 3}, {"pool": ["last"]},
    {"pool": torch.ones(3)}, {"weights": None}, {"weights": []}, {"weights": {}}, {"weights": 3},
    {"config": None}, {"config": [1]}, {"config": {}}, {"config": {1: 2}},
    {"tokenizer": None, "weights": None}], ids=lambda change: str(change)[:40])
def test_the_rest(data, tmp_path, change):
    torch.save(data(**change), tmp_path / "x.pt")
    refused(tmp_path / "x.pt", f"{CORRUPT}|{FIT}|expected a GPT")


def test_a_reward_model_without_its_pool(data, tmp_path, tiny):
    save(tmp_path / "rm.pt", RewardModel.from_gpt(tiny(), "token"), get_tokenizer("bytes"))
    for pool in (None, "last"):
        torch.save({**torch.load(tmp_path / "rm.pt", weights_only=True), "pool": pool}, tmp_path / "x.pt")
        refused(tmp_path / "x.pt", FIT, partial(load, RewardModel))


@pytest.mark.parametrize("spec", [
    None, [], "bytes", {}, {"name": None}, {"name": ["bytes"]}, {"name": "/etc/passwd"},
    {"name": "../../secret.bpe"}, {"name": "/dev/zero"}, {"name": "fifo"}, {"name": "gpt3"},
    {"name": "x", "bpe": None}, {"name": "x", "bpe": b"IQ== 0"}, {"name": "x", "bpe": ""},
    {"name": "x", "bpe": "IQ== 0\n"}, {"name": "x", "bpe": "IQ== 999999999\n"},
    {"name": "x", "bpe": "root:x:0:0\n"}, {"name": "y" * 10**6, "bpe": "IQ== 0\n"},
    {"name": "a\nb", "bpe": "IQ== 0\n"}, {"name": "x", "bpe": "I" * 10**6}], ids=lambda spec: str(spec)[:40])
def test_tokenizers(data, tmp_path, spec, monkeypatch):
    """A spec never names a file: it could make us read anything, or wait forever."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    torch.save(data(tokenizer=spec), tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "tokenizer", load_tokenizer)


def test_a_bpe_from_a_file_travels_in_the_checkpoint(tiny, tmp_path):
    """So refusing file names costs nothing."""
    save(tmp_path / "x.pt", tiny(vocab_size=260), train_tokenizer(["low lower lowest"] * 3, 260))
    assert load_tokenizer(tmp_path / "x.pt").vocab_size == 260


def test_torch_load_takes_weights_only_everywhere():
    folders = (".", "lib", "data", "tools", "runs", "tests")  # not all below ROOT: a venv may be there
    ours = [path for folder in folders for path in (ROOT / folder).glob("*.py")]
    assert len(ours) > 45
    for path in ours:
        text = path.read_text()
        for call in re.findall(r"torch\.load\((.*)", text):
            assert "weights_only=True" in call or path.name == Path(__file__).name, path
        if path.parent.name not in ("runs", "tests"):
            assert not re.search(r"pickle\.loads?\(|[^.\w](eval|exec)\(|allow_pickle=True|weights_only=False",
                                 text), path
