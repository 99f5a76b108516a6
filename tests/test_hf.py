"""tools/hf.py: round trips lose nothing, transformers agrees, and no bad file gets in."""
import json
import math
import os
import pathlib
import pickle
import random
import shutil
import subprocess
import sys
import unicodedata
import zipfile

import numpy as np
import pytest
import torch
from helpers import jsonl, lines

import data.tokenizer
from data.examples import pad
from data.files import UserError
from data.records import read_preferences
from data.tokenizer import from_spec, get_tokenizer, train_tokenizer
from lib import checkpoint
from model import GPT, RewardModel
from tools import hf

pytestmark = pytest.mark.slow

os.environ["HF_HUB_OFFLINE"] = "1"  # transformers would otherwise ask for a chat template
ROOT = pathlib.Path(__file__).resolve().parents[1]
CACHE = ROOT.parent / "shared" / "tiktoken"
BYTES = {"vocab_size": 257}  # that of the bytes tokenizer
SMALL = BYTES | {"block_size": 8, "d_model": 8, "n_head": 2, "n_layer": 1}


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed (requirements-dev.txt)")


@pytest.fixture
def gpt2(monkeypatch):
    if not CACHE.is_dir():
        pytest.skip(f"no GPT-2 vocabulary in {CACHE}")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(CACHE))
    return get_tokenizer("gpt2")


def exported(model, tmp_path, tokenizer="bytes", name="theirs"):
    tokenizer = get_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    checkpoint.save(tmp_path / f"{name}.pt", model, tokenizer)
    hf.main(["export", str(tmp_path / f"{name}.pt"), str(tmp_path / name)])
    return tmp_path / name


def imported(source, tmp_path, tokenizer="bytes"):
    hf.main(["import", str(source), str(tmp_path / "in.pt"), "--tokenizer", tokenizer])
    return checkpoint.load(GPT, tmp_path / "in.pt")


# ---- out and back ----

@pytest.mark.parametrize("bias", [True, False])
def test_round_trip_is_exact(tiny, tmp_path, bias):
    gpt = tiny(**BYTES, bias=bias)
    back = imported(exported(gpt, tmp_path), tmp_path)
    tokens, theirs = torch.randint(257, (2, 20)), back.state_dict()
    assert torch.equal(gpt(tokens), back(tokens)) and back.lm_head.weight is back.trunk.wte.weight
    for name, weight in gpt.state_dict().items():
        assert torch.equal(weight, theirs[name]) and theirs[name].is_contiguous()
    assert bias or not any(theirs[name].any() for name in theirs.keys() - gpt.state_dict().keys())
    assert checkpoint.load_tokenizer(tmp_path / "in.pt").name == "bytes"


def test_matrices_are_in_out(tiny, tmp_path):
    """x @ W + b on the exported numbers is what our Linear does, for q, k, v apart too."""
    gpt = tiny(**BYTES)
    theirs, x = hf.read_safetensors(exported(gpt, tmp_path) / "model.safetensors"), torch.randn(3, 32)
    block = gpt.trunk.blocks[1]
    for name, ours in (("attn.c_attn", block.attn.qkv), ("mlp.c_fc", block.mlp.up),
                       ("attn.c_proj", block.attn.proj)):
        W, b = (theirs[f"transformer.h.1.{name}.{kind}"] for kind in ("weight", "bias"))
        np.testing.assert_allclose(x.numpy() @ W.numpy() + b.numpy(), ours(x).detach().numpy(), atol=1e-5)
    assert theirs["transformer.h.0.attn.c_attn.weight"].shape == (32, 96)
    assert theirs["transformer.h.0.mlp.c_proj.weight"].shape == (128, 32)


def raw(tiny, tmp_path, **sizes):
    """(tensors without prefix, config, gpt): the tensors as in the files of 2019."""
    gpt = tiny(**SMALL | sizes)
    folder = exported(gpt, tmp_path)
    tensors = hf.read_safetensors(folder / "model.safetensors")
    tensors = {name.removeprefix("transformer."): tensor.clone() for name, tensor in tensors.items()}
    return tensors, json.loads((folder / "config.json").read_text()), gpt


def folder_of(tensors, config, tmp_path, name="model.safetensors", **kwargs):
    folder = tmp_path / "given"
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if name.endswith(".bin"):
        torch.save(tensors, folder / name, **kwargs)
    else:
        hf.write_safetensors(folder / name, tensors)
    return folder


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_masks_and_a_tied_head(tiny, tmp_path, zipped):
    tensors, config, gpt = raw(tiny, tmp_path)
    gpt_again = hf.build(tensors, gpt.config, "here")
    assert gpt_again.lm_head.weight is gpt_again.trunk.wte.weight
    tensors["lm_head.weight"] = tensors["wte.weight"]
    tensors["h.0.attn.bias"], tensors["h.0.attn.masked_bias"] = torch.ones(1, 1, 8, 8), torch.tensor(-1e4)
    folder = folder_of(tensors, config, tmp_path, "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    tokens = torch.randint(257, (2, 8))
    assert torch.equal(imported(folder, tmp_path)(tokens), gpt(tokens))
    assert torch.equal(imported(folder / "pytorch_model.bin", tmp_path)(tokens), gpt(tokens))


def test_without_config_heads_are_64_wide(tiny, tmp_path, capsys):
    tensors, _, gpt = raw(tiny, tmp_path, d_model=128, n_head=2)
    folder = folder_of(tensors, None, tmp_path)
    assert imported(folder / "model.safetensors", tmp_path).config == gpt.config
    assert "n_head is set to 128/64" in capsys.readouterr().out


@pytest.mark.parametrize("width", [16, 96])
def test_without_config_other_widths_tell_of_it(tiny, tmp_path, width):
    tensors, _, _ = raw(tiny, tmp_path, d_model=width, n_head=2)
    refused(folder_of(tensors, None, tmp_path), tmp_path,
            f"config.json is missing, and n_head can't be guessed: n_embd {width} is not a multiple of 64")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32(tiny, tmp_path, dtype):
    tensors, config, _ = raw(tiny, tmp_path)
    half = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    folder = folder_of(half, config, tmp_path, "pytorch_model.bin")
    weights = imported(folder, tmp_path).state_dict()
    assert torch.equal(weights["trunk.wte.weight"], half["wte.weight"].float())
    assert torch.equal(weights["trunk.blocks.0.mlp.up.weight"], half["h.0.mlp.c_fc.weight"].float().T)
    assert all(weight.dtype == torch.float32 and weight.is_contiguous() for weight in weights.values())


def test_a_checkpoint_is_no_larger_than_its_weights(tiny, tmp_path):
    imported(exported(tiny(**BYTES), tmp_path), tmp_path)
    theirs = tmp_path / "theirs" / "model.safetensors"
    assert (tmp_path / "in.pt").stat().st_size < 1.3 * theirs.stat().st_size


# ---- names and the download ----

def test_a_known_name_is_downloaded_once(tiny, tmp_path, monkeypatch):
    folder, theirs, asked = exported(tiny(**SMALL), tmp_path), tmp_path / "theirs.pt", []
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def download(url, path, check, otherwise):
        if not path.exists():
            asked.append(url)
            path.write_bytes((folder / path.name).read_bytes())
            check(path)
            with pytest.raises(UserError):
                check(theirs)
    monkeypatch.setattr(hf, "download", download)
    for _ in range(2):
        imported("gpt2-medium", tmp_path)
    start = "https://huggingface.co/openai-community/gpt2-medium/resolve/main/"
    assert asked == [start + "config.json", start + "model.safetensors"]


def test_no_network_tells_of_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(hf, "URL", "http://127.0.0.1:1/{}/{}")  # where nobody listens
    with pytest.raises(UserError, match="can't download .*config.json .*; give a folder .*"
                                        "python -m tools.hf import FOLDER out/gpt2.pt"):
        imported("gpt2", tmp_path)


# ---- what must not get in ----

def blob(header, numbers=b"", n=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(header) if n is None else n).to_bytes(8, "little") + header + numbers


def entry(shape=(2, 2), offsets=(0, 16), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


BAD_FILES = {
    "empty": (b"", "x.safetensors is not a safetensors file, or is truncated"),
    "short": (b"\3\0\0", "x.safetensors is not a safetensors file, or is truncated"),
    "random": (bytes(range(7, 250)), "x.safetensors is not a safetensors file, or is truncated"),
    "header too long": (blob({}, n=2**63), "x.safetensors is not a safetensors file, or is truncated"),
    "no JSON": (blob(b"{not json"), "x.safetensors: header: not JSON: Expecting property name"),
    "no UTF-8": (blob(b"\xff\xfe{}"), "header: not UTF-8 at byte 0"),
    "deep": (blob(b"[" * 200_000), "header: not JSON: nested too deeply"),
    "no object": (blob([1]), "header: not a JSON object"),
    "twice": (blob(b'{"a": 1, "a": 2}'), "x.safetensors: header: duplicate key 'a'"),
    "long number": (blob(b'{"a": ' + b"9" * 5000 + b"}"), "header: not JSON: a number is too long"),
    "truncated": (blob({"a": entry()}, bytes(9)), "truncated or corrupt.* 16 bytes .* has 9"),
    "past the end": (blob({"a": entry(), "b": entry(offsets=(16, 32))}, bytes(16)),
                     "32 bytes of data, the file has 16"),
    "too much": (blob({"a": entry()}, bytes(20)), "16 bytes of data, the file has 20"),
    "overlap": (blob({"a": entry(), "b": entry(offsets=(8, 24))}, bytes(24)),
                "'b' starts at byte 8 instead of 16"),
    "same place": (blob({"a": entry(), "b": entry()}, bytes(16)), "gap or an overlap"),
    "gap": (blob({"a": entry(offsets=(4, 20))}, bytes(20)), "starts at byte 4 instead of 0"),
    "negative": (blob({"a": entry(offsets=(-16, 0))}, bytes(16)), "data_offsets .* must be a list of sizes"),
    "negative shape": (blob({"a": entry((-2, -2))}, bytes(16)), "shape .* must be a list of sizes"),
    "bools": (blob({"a": entry((True, 4))}, bytes(16)), "shape .* must be a list of sizes"),
    "float": (blob({"a": entry((2.0, 2))}, bytes(16)), "shape .* must be a list of sizes"),
    "huge": (blob({"a": entry((2**62, 2**62))}, bytes(16)), ": 85070591[0-9]+ bytes"),
    "many dimensions": (blob({"a": entry((2**62,) * 10**5)}, bytes(16)), "must be a list of sizes"),
    "three offsets": (blob({"a": entry(offsets=(0, 8, 16))}, bytes(16)),
                      r"data_offsets \[0, 8, 16\] do not fit F32"),
    "wrong length": (blob({"a": entry((2, 3))}, bytes(16)), r"do not fit F32 of shape \[2, 3\]: 24 bytes"),
    "dtype": (blob({"a": entry(dtype="F31")}, bytes(16)), "unknown dtype 'F31'"),
    "dtype a list": (blob({"a": entry(dtype=["F32"])}, bytes(16)), "unknown dtype"),
    "no entry": (blob({"a": 3}, bytes(16)), "unknown dtype None"),
    "another model": (blob({"a": entry()}, bytes(16)), "wte.weight is missing"),
}


def refused(source, tmp_path, match):
    """The import must end in a UserError of one line, and leave nothing behind."""
    with pytest.raises(UserError, match=match) as caught:
        hf.main(["import", str(source), str(tmp_path / "out" / "x.pt"), "--tokenizer", "bytes"])
    said = str(caught.value)
    assert not (tmp_path / "out").exists() and len(said) < 700 and "\n" not in said


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_safetensors(tmp_path, case):
    (tmp_path / "x.safetensors").write_bytes(BAD_FILES[case][0])
    refused(tmp_path / "x.safetensors", tmp_path, BAD_FILES[case][1])


class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def zip_bomb(path):
    """A file of torch.save whose pickle, with a name of 10 MB in it, is compressed."""
    torch.save({"a" * 10**7: torch.zeros(1)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data, zipfile.ZIP_DEFLATED if name.endswith(".pkl") else None)


def hollow(path, zipped):
    """A tensor of 4 EB on a storage of 4 bytes."""
    huge = torch.zeros(1).expand(2**30, 2**30)
    torch.save({"wte.weight": huge}, path, _use_new_zipfile_serialization=zipped)


def huge_storage(path):
    """The old format, in which the pickle alone says how large a storage is."""
    torch.save({"a": torch.zeros(77777)}, path, _use_new_zipfile_serialization=False)
    small, large = (b"J" + n.to_bytes(4, "little") for n in (77777, 2**31 - 1))
    path.write_bytes(path.read_bytes().replace(small, large)[:900])


def truncated(path):
    torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])


def short_record(path):
    """What lacks would be read from the record that follows."""
    torch.save({"a": torch.zeros(1000), "b": torch.zeros(1000)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data[:-4] if name.endswith("data/0") else data)


BAD_PICKLES = {
    "empty": lambda path: path.write_bytes(b""),
    "random": lambda path: path.write_bytes(bytes(range(7, 250))),
    "a list": lambda path: torch.save([torch.zeros(1)], path),
    "no tensors": lambda path: torch.save({"a": 1}, path),
    "code": lambda path: path.write_bytes(pickle.dumps({"a": Code()})),
    "code in a zip": lambda path: torch.save({"a": Code()}, path),
    "code in the old format": lambda path: torch.save({"a": Code()}, path,
                                                      _use_new_zipfile_serialization=False),
    "sparse": lambda path: torch.save({"a": torch.eye(3).to_sparse()}, path),
    "meta": lambda path: torch.save({"a": torch.zeros(3, device="meta")}, path),
    "zip bomb": zip_bomb, "huge storage": huge_storage, "truncated": truncated,
    "short record": short_record,
    "hollow": lambda path: hollow(path, True), "hollow and old": lambda path: hollow(path, False),
}


@pytest.mark.parametrize("case", BAD_PICKLES)
def test_bad_pickles(tmp_path, case, monkeypatch):
    monkeypatch.chdir(tmp_path)
    BAD_PICKLES[case](tmp_path / "x.bin")
    refused(tmp_path / "x.bin", tmp_path, "x.bin is corrupt, or holds more than tensors")
    assert not (tmp_path / "ran").exists()


BAD_CONFIGS = {
    "model_type": ("gpt_neo", "model_type is 'gpt_neo', but only 'gpt2' is supported"),
    "activation_function": ("gelu", "activation_function is 'gelu', but only 'gelu_new'"),
    "layer_norm_epsilon": (1e-6, "layer_norm_epsilon is 1e-06"),
    "n_inner": (31, "n_inner is 31, but only 32"),
    "scale_attn_by_inverse_layer_idx": (True, "scale_attn_by_inverse"),
    "scale_attn_weights": (False, "scale_attn_weights is False"),
    "add_cross_attention": (True, "add_cross_attention is True"),
    "n_layer": (2, "n_layer is 2, but the tensors have 1"),
    "n_embd": (16, "n_embd is 16, but the tensors have 8"),
    "vocab_size": (10**15, "vocab_size is 10{15}, but the tensors have 257"),
    "n_positions": (True, "n_positions is True; it must be a positive integer"),
    "n_head": (3, "n_embd 8 must be divisible by n_head 3"),
    "n_head ": (-2, "n_head is None"),  # misspelt, so it is missing
}


@pytest.mark.parametrize("key", BAD_CONFIGS)
def test_bad_configs(tiny, tmp_path, key):
    tensors, config, _ = raw(tiny, tmp_path)
    if key == "n_head ":
        del config["n_head"]
    folder = folder_of(tensors, config | {key: BAD_CONFIGS[key][0]}, tmp_path)
    refused(folder, tmp_path, BAD_CONFIGS[key][1])


def test_wrong_tensors_are_all_named(tiny, tmp_path):
    tensors, config, _ = raw(tiny, tmp_path)
    del tensors["ln_f.bias"]
    tensors["h.0.mlp.c_fc.weight"] = tensors["h.0.mlp.c_fc.weight"].T
    tensors["extra"], tensors["wpe.weight"] = torch.zeros(1), tensors["wpe.weight"].double()
    folder = folder_of(tensors, config, tmp_path, "pytorch_model.bin")
    refused(folder, tmp_path, r"'extra' is unknown; h.0.mlp.c_fc.weight has shape \(32, 8\) instead of "
                              r"\(8, 32\); ln_f.bias is missing; wpe.weight has dtype torch.float64")


def test_a_long_list_is_whole(tiny, tmp_path):
    tensors, config, _ = raw(tiny, tmp_path)
    few = {name: tensors[name] for name in ("wte.weight", "wpe.weight", "h.0.ln_1.bias")}
    refused(folder_of(few, config, tmp_path), tmp_path,
            "h.0.ln_2.weight is missing; .*; ln_f.weight is missing$")


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_tensor_under_both_of_its_names(tiny, tmp_path, file):
    tensors, config, _ = raw(tiny, tmp_path)
    folder = folder_of(tensors | {"transformer.wte.weight": torch.zeros(257, 8)}, config, tmp_path, file)
    refused(folder, tmp_path, "'(transformer.)?wte.weight' is present with and without the prefix")


def test_non_finite_numbers(tiny, tmp_path):
    tensors, config, _ = raw(tiny, tmp_path)
    tensors["ln_f.bias"][3] = math.nan
    refused(folder_of(tensors, config, tmp_path), tmp_path, "ln_f.bias holds non-finite numbers")


@pytest.mark.parametrize("head", [torch.zeros(257, 8), torch.zeros(3, 3), torch.zeros(257, 8).half()])
def test_an_untied_head(tiny, tmp_path, head):
    tensors, config, _ = raw(tiny, tmp_path)
    folder = folder_of(tensors | {"lm_head.weight": head}, config, tmp_path, "pytorch_model.bin")
    refused(folder, tmp_path, "lm_head.weight differs from wte.weight, but model.py ties")


@pytest.mark.parametrize("name, match", [
    ("gpt3", "gpt3 is neither a file nor a folder, nor one of gpt2, gpt2-medium, gpt2-large, gpt2-xl"),
    ("empty", "empty contains neither model.safetensors nor pytorch_model.bin"),
    ("x.txt", "neither a .safetensors nor a .bin")])
def test_bad_sources(tmp_path, monkeypatch, name, match):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.txt").touch()
    refused(name, tmp_path, match)


def test_the_tokenizer_must_fit(tiny, tmp_path):
    tensors, config = padded(*raw(tiny, tmp_path)[:2], 300)
    refused(folder_of(tensors, config, tmp_path), tmp_path,
            "has 300 tokens, the tokenizer bytes has 257 .the other 43 can't be padding.; choose another")


# ---- a padded vocabulary ----

def padded(tensors, config, rows):
    """As if the embedding had been padded to so many rows, with numbers that could be anything."""
    extra = torch.full((rows - 257, 8), math.nan)
    wte = torch.cat([tensors["wte.weight"], extra])
    return tensors | {"wte.weight": wte}, config | {"vocab_size": rows}


@pytest.mark.parametrize("rows, head, asked", [
    (264, None, 264), (304, 304, 304), (304, 257, 257), (384, 384, 257)])
def test_padding_of_the_vocabulary_is_dropped_and_printed(tiny, tmp_path, capsys, rows, head, asked):
    tensors, config, gpt = raw(tiny, tmp_path)
    given, config = padded(tensors, config | {"pad_token_id": rows - 1}, rows)
    if head:
        given["lm_head.weight"] = given["wte.weight"][:head]
    folder = folder_of(given, config | {"vocab_size": asked}, tmp_path, "pytorch_model.bin")
    back, tokens = imported(folder, tmp_path), torch.randint(257, (2, 8))
    assert torch.equal(back(tokens), gpt(tokens)) and back.lm_head.weight is back.trunk.wte.weight
    assert (f"pytorch_model.bin has {rows} tokens, the tokenizer bytes has 257; the last {rows - 257} are "
            "padding and are dropped\n") in capsys.readouterr().out


def test_gpt2_padded_to_50304(tiny, tmp_path, gpt2):
    tensors, config, gpt = raw(tiny, tmp_path)
    wte = torch.randn(50304, 8)
    folder = folder_of(tensors | {"wte.weight": wte}, config | {"vocab_size": 50304, "bos_token_id": 50256,
                                                                 "eos_token_id": 50256}, tmp_path)
    back = imported(folder, tmp_path, "gpt2")
    assert torch.equal(back.lm_head.weight, wte[:50257])


@pytest.mark.parametrize("rows", [256, 258, 300, 400, 1024, 50304])
def test_what_is_no_padding_is_another_tokenizers(tiny, tmp_path, rows):
    """One token too few; one added token; no multiple of 8; much more than padding."""
    tensors, config, _ = raw(tiny, tmp_path)
    wte = torch.zeros(rows, 8)
    folder = folder_of(tensors | {"wte.weight": wte}, config | {"vocab_size": rows}, tmp_path)
    refused(folder, tmp_path, f"has {rows} tokens, the tokenizer bytes has 257.*; choose another with --tok")


def test_a_special_token_among_the_padding_is_refused(tiny, tmp_path):
    tensors, config = padded(*raw(tiny, tmp_path)[:2], 264)
    refused(folder_of(tensors, config | {"eos_token_id": 260}, tmp_path), tmp_path,
            "eos_token_id is 260, one of the tokens dropped as padding")


def test_an_untied_head_under_padding(tiny, tmp_path):
    tensors, config = padded(*raw(tiny, tmp_path)[:2], 264)
    for head in (torch.zeros(264, 8), torch.zeros(250, 8)):
        refused(folder_of(tensors | {"lm_head.weight": head}, config, tmp_path), tmp_path,
                "lm_head.weight differs from wte.weight")
        shutil.rmtree(tmp_path / "given")


# ---- prefixes ----

@pytest.mark.parametrize("prefix", [
    "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.transformer.",
    "_fsdp_wrapped_module.transformer."])
def test_prefixes_of_wrapped_models(tiny, tmp_path, prefix):
    tensors, config, gpt = raw(tiny, tmp_path)
    tensors |= {"h.0.attn.bias": torch.ones(1, 1, 8, 8), "lm_head.weight": tensors["wte.weight"].clone()}
    given = {prefix + name.replace("h.0.attn", "h.0._orig_mod.attn"): x for name, x in tensors.items()}
    tokens = torch.randint(257, (2, 8))
    assert torch.equal(imported(folder_of(given, config, tmp_path), tmp_path)(tokens), gpt(tokens))


def test_a_tensor_with_and_without_a_wrapper(tiny, tmp_path):
    tensors, config, _ = raw(tiny, tmp_path)
    folder = folder_of(tensors | {"module.ln_f.bias": torch.zeros(8)}, config, tmp_path)
    refused(folder, tmp_path, "'(module.)?ln_f.bias' is present with and without the prefix")


# ---- shards ----

def sharded(tensors, config, tmp_path, name="model.safetensors", n=3):
    """(folder, index) as save_pretrained writes them with a small max_shard_size."""
    folder, stem, end = tmp_path / "given", *os.path.splitext(name)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    index = {"metadata": {"total_size": sum(x.nbytes for x in tensors.values())}, "weight_map": {}}
    for i in range(n):
        file, some = f"{stem}-{i + 1:05}-of-{n:05}{end}", dict(list(tensors.items())[i::n])
        torch.save(some, folder / file) if end == ".bin" else hf.write_safetensors(folder / file, some)
        index["weight_map"] |= dict.fromkeys(some, file)
    write_index(folder, index, name)
    return folder, index


def write_index(folder, index, name="model.safetensors"):
    (folder / f"{name}.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_shards_are_one_model(tiny, tmp_path, name):
    tensors, config, gpt = raw(tiny, tmp_path)
    folder, _ = sharded({"transformer." + name: x for name, x in tensors.items()}, config, tmp_path, name)
    tokens = torch.randint(257, (2, 8))
    for source in (folder, folder / f"{name}.index.json"):
        assert torch.equal(imported(source, tmp_path)(tokens), gpt(tokens))


def test_shards_of_transformers(tmp_path, transformers):
    config = transformers.GPT2Config(vocab_size=257, n_positions=8, n_embd=8, n_layer=2, n_head=2,
                                     bos_token_id=256, eos_token_id=256)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path / "given", max_shard_size="5KB")
    assert (tmp_path / "given/model.safetensors.index.json").exists()
    tokens = torch.randint(257, (2, 8))
    torch.testing.assert_close(imported(tmp_path / "given", tmp_path)(tokens), theirs(tokens).logits)


def test_a_whole_file_comes_before_shards(tiny, tmp_path):
    tensors, config, gpt = raw(tiny, tmp_path)
    folder, _ = sharded({name: torch.zeros_like(x) for name, x in tensors.items()}, config, tmp_path)
    hf.write_safetensors(folder / "model.safetensors", tensors)
    assert torch.equal(imported(folder, tmp_path).trunk.wte.weight, gpt.trunk.wte.weight)


A, B = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"


@pytest.mark.parametrize("change, match", [
    ({"metadata": {"total_size": 12}}, "total_size is 12, but the shards hold [0-9]+ bytes of tensors"),
    ({"weight_map": {}}, '"weight_map" must say which file each tensor is in'),
    ({"weight_map": [A]}, '"weight_map" must say which file each tensor is in'),
    ({"weight_map": None}, '"weight_map" must say which file each tensor is in'),
    *(({"wte.weight": file}, "must be the name of a .safetensors file in the same folder") for file in (
        f"../given/{A}", f"/etc/{A}", "..", "", f"x\\{A}", f"C:{A}", f"./{A}", "x\0.safetensors", "a.bin",
        7, None, [A])),
    ({"wte.weight": "gone.safetensors"}, "gone.safetensors is missing, 1 of 4 shards"),
    ({"wte.weight": "x" * 5000 + ".safetensors"}, "is missing, 1 of 4 shards"),
    ({"wte.weight": B}, f"{A}: 'wte.weight' is present, though model.safetensors.index.json lists"),
    ({"wte.bias": A}, f"{A}: 'wte.bias' is missing, though model.safetensors.index.json lists it here")])
def test_a_hostile_index_is_one_sentence(tiny, tmp_path, change, match):
    tensors, config, _ = raw(tiny, tmp_path)
    folder, index = sharded({"wte.weight": tensors.pop("wte.weight"), **tensors}, config, tmp_path)
    assert index["weight_map"]["wte.weight"] == A
    if not change.keys() <= index.keys():
        change = {"weight_map": index["weight_map"] | change}
    refused(write_index(folder, index | change), tmp_path, match)


def test_a_tensor_in_two_shards_or_in_none_of_the_index(tiny, tmp_path):
    tensors, config, _ = raw(tiny, tmp_path)
    folder, index = sharded(tensors, config, tmp_path)
    there = {name: tensors[name] for name, file in index["weight_map"].items() if file == B}
    for name in ("added.weight", next(name for name, file in index["weight_map"].items() if file == A)):
        hf.write_safetensors(folder / B, there | {name: torch.zeros(257, 8)})
        refused(folder, tmp_path, f"{B}: '{name}' is present, though .* lists it elsewhere or not at all")


def test_a_shard_that_is_damaged_gone_or_alone(tiny, tmp_path):
    tensors, config, _ = raw(tiny, tmp_path)
    folder, _ = sharded(tensors, config, tmp_path)
    refused(folder / A, tmp_path, f"{A} is only a part of the weights; give the folder .*safetensors.index")
    data = (folder / B).read_bytes()
    (folder / B).write_bytes(data[:-4])
    refused(folder, tmp_path, f"{B} is truncated or corrupt")
    (folder / B).unlink()
    refused(folder, tmp_path, f"{B} is missing, 1 of 3 shards in model.safetensors.index.json")
    (folder / "model.safetensors.index.json").unlink()
    refused(folder, tmp_path, f"neither model.safetensors nor pytorch_model.bin, and {A} without its .index")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_shard_that_the_index_does_not_list(tiny, tmp_path, name):
    """Of another save into the same folder; shards of the other format may lie there, too."""
    tensors, config, gpt = raw(tiny, tmp_path)
    folder, _ = sharded(tensors, config, tmp_path, name)
    stem, end = os.path.splitext(name)
    for other in ("adapter-00001-of-00009" + end, f"{stem}-1-of-3{end}", f"{stem}-00001-of-00009.txt",
                  f"{stem}.fp16-00001-of-00003{end}"):
        (folder / other).touch()
    assert torch.equal(imported(folder, tmp_path).trunk.wte.weight, gpt.trunk.wte.weight)
    (tmp_path / "in.pt").unlink()
    for extra in (f"{stem}-00004-of-00003{end}", f"{stem}-00001-of-00002{end}"):
        (folder / extra).touch()
        refused(folder, tmp_path, f"{extra} is a shard that {name}.index.json does not list; of two models")


def test_shards_of_a_wrapped_model_with_a_padded_vocabulary(tiny, tmp_path):
    tensors, config, gpt = raw(tiny, tmp_path)
    given, config = padded(tensors, config, 264)
    given = {f"_orig_mod.module.transformer.{name}": x for name, x in given.items()}
    folder, _ = sharded(given, config, tmp_path)
    assert torch.equal(imported(folder, tmp_path).trunk.wte.weight, gpt.trunk.wte.weight)
    given["module.ln_f.bias"] = torch.zeros(8)
    folder, _ = sharded(given, config, tmp_path)
    with pytest.raises(UserError, match="ln_f.bias' is present with and without the prefix"):
        imported(folder, tmp_path)


def test_an_index_that_is_no_json_or_huge(tiny, tmp_path, monkeypatch):
    tensors, config, _ = raw(tiny, tmp_path)
    folder, index = sharded(tensors, config, tmp_path)
    monkeypatch.setattr(hf, "HEADER_MAX", 50)
    refused(folder, tmp_path, "index.json is too large for an index")
    monkeypatch.undo()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ' + "[" * 100_000)
    refused(folder, tmp_path, "index.json: not JSON")


def test_the_command_line_says_one_sentence(tmp_path):
    (tmp_path / "x.bin").write_bytes(pickle.dumps(Code()))
    command = [sys.executable, "-m", "tools.hf", "import", "x.bin", "x.pt", "--tokenizer", "bytes"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("hf.py: x.bin is corrupt")
    assert done.stderr.count("\n") == 1 and os.listdir(tmp_path) == ["x.bin"]


# ---- export ----

def test_nothing_is_overwritten(tiny, tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    exported(tiny(**BYTES), tmp_path)  # an empty folder may exist
    with pytest.raises(UserError, match="not empty; nothing is overwritten"):
        exported(tiny(**BYTES), tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


def test_a_failed_export_leaves_nothing(tiny, tmp_path, monkeypatch):
    def full(path, tensors):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(hf, "write_safetensors", full)
    with pytest.raises(UserError, match="can't write .*theirs: No space"):
        exported(tiny(**BYTES), tmp_path)
    assert os.listdir(tmp_path) == ["theirs.pt"]


@pytest.mark.parametrize("pool", ["mean", "max", "token"])
def test_other_pools_have_no_place_there(tiny, tmp_path, pool):
    with pytest.raises(UserError, match=f'pool "{pool}", but transformers supports only "last"'):
        exported(RewardModel.from_gpt(tiny(**BYTES), pool), tmp_path)
    assert os.listdir(tmp_path) == ["theirs.pt"]


def test_another_architecture_is_told(tiny, tmp_path):
    gpt = tiny(**BYTES)
    gpt.trunk.blocks[0].extra = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="not a GPT-2: only one of the two has trunk.blocks.0.extra.bias"):
        hf.their_weights(gpt)


def normalised(gpt):
    """A reward model whose bias, shift and scale all matter."""
    rm = RewardModel.from_gpt(gpt).eval()
    torch.nn.init.constant_(rm.reward_head.bias, 0.3)
    rm.normalise(torch.tensor([1.0, 2.0, 7.0]))
    return rm


@pytest.mark.parametrize("bias", [True, False])
def test_scores_of_the_export_are_ours_without_arithmetic(tiny, tmp_path, capsys, bias):
    """Scale is in the head; what is added, in the bias of the norm before it, also where ours has none."""
    rm = normalised(tiny(**BYTES, bias=bias))
    folder = exported(rm, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    weights = hf.read_safetensors(folder / "model.safetensors")
    tokens = torch.randint(257, (2, 9))
    moved, ours = (x.get("transformer.ln_f.bias") for x in (weights, hf.their_weights(rm)))
    h = rm.trunk(tokens)[:, -1] - ours + moved
    torch.testing.assert_close((h @ weights["score.weight"].T)[:, 0], rm.score(tokens, torch.tensor([9, 9])),
                               atol=1e-5, rtol=1e-5)
    assert config["pad_token_id"] == 257 and config["vocab_size"] == 258 and "score_constant" not in config
    wte = weights["transformer.wte.weight"]
    assert wte.shape == (258, 32) and not wte[257].any()
    assert ("scores are ours in rows that end in eos, 256; pad on the right with 257, a new id\n"
            in capsys.readouterr().out)


@pytest.mark.parametrize("weight", [0.0, 1e-42])
def test_a_head_of_zeros_is_told(tiny, tmp_path, weight):
    rm = normalised(tiny(**BYTES))
    torch.nn.init.constant_(rm.reward_head.weight, weight)
    with pytest.raises(UserError, match="theirs.pt gives every text the same score: the weights of its head"):
        exported(rm, tmp_path)
    assert os.listdir(tmp_path) == ["theirs.pt"]


# ---- against the packages themselves ----

def test_safetensors_package_agrees(tiny, tmp_path):
    package = pytest.importorskip("safetensors.torch",
                                  reason="safetensors is not installed (requirements-dev.txt)")
    path = exported(tiny(**BYTES), tmp_path) / "model.safetensors"
    ours, theirs = hf.read_safetensors(path), package.load_file(path)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    dtypes = {name: (torch.arange(6) % 2).to(dtype).view(2, 3) for name, dtype in hf.DTYPES.items()}
    odd = {"none": torch.zeros(0, 3), "one": torch.tensor(3.0)}
    package.save_file(dtypes | odd, tmp_path / "x.safetensors")
    back = hf.read_safetensors(tmp_path / "x.safetensors")
    assert all(torch.equal(back[name], tensor) for name, tensor in dtypes.items())
    assert back["none"].shape == (0, 3) and back["one"] == 3


@pytest.mark.parametrize("sizes", [{}, {"n_layer": 3, "n_head": 4, "d_model": 64, "block_size": 40}])
def test_transformers_opens_what_we_export(transformers, tiny, tmp_path, sizes):
    gpt = tiny(**BYTES | sizes)
    theirs, info = transformers.GPT2LMHeadModel.from_pretrained(exported(gpt, tmp_path),
                                                                output_loading_info=True)
    assert not any(info.values()), info
    tokens = torch.randint(257, (2, 20))
    torch.testing.assert_close(theirs.eval()(tokens).logits, gpt(tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sizes", [{"n_layer": 2, "n_head": 2, "n_embd": 32},
                                   {"n_layer": 3, "n_head": 4, "n_embd": 48}])
def test_we_open_what_transformers_saves(transformers, tmp_path, sizes):
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=257, n_positions=32, bos_token_id=256, eos_token_id=256, initializer_range=0.3,
        **sizes)).eval()
    for p in theirs.parameters():
        if p.dim() == 1:  # biases are 0 and norms 1 otherwise
            torch.nn.init.normal_(p, std=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    tokens = torch.randint(257, (2, 20))
    ours = imported(tmp_path / "theirs", tmp_path)
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sizes", [{}, {"n_layer": 3, "n_head": 4, "d_model": 64}])
def test_transformers_scores_a_padded_batch_alike(transformers, tiny, tmp_path, sizes):
    rm = normalised(tiny(**BYTES | sizes))
    theirs, info = transformers.GPT2ForSequenceClassification.from_pretrained(
        exported(rm, tmp_path), output_loading_info=True)
    assert not any(info.values()) and theirs.num_labels == 1
    rows = [torch.randint(256, (n,)).tolist() + [256] for n in (3, 19, 1, 8)] + [[5, 0, 7, 0]]  # 256: eos
    tokens, lengths = pad(rows)
    pads = torch.arange(tokens.shape[1]) >= lengths[:, None]
    scores = theirs.eval()(tokens.masked_fill(pads, theirs.config.pad_token_id)).logits[:, 0]
    assert abs((rm.reward_head.bias - rm.shift) / rm.scale) > 1  # what they would be off by
    torch.testing.assert_close(scores, rm.score(tokens, lengths), atol=1e-5, rtol=1e-5)


# ---- their tokenizer ----

WORDS = ("It's the naïve café: we'll see 12 or 345 ½ foxes, don't  we?\n\n\tΑθήνα и Москва; 漢字かな한국어 "
         "नमस्ते مرحبا 👩‍👩‍👧‍👦 \u0301e\u0301 <|endoftext|> x_y==z!!! \x00\x07\xff\xa0\u2028")
MADE_OF = [  # strings of single characters, and lists of longer parts
    "abcdeststhe    ", "aAéß", " ", "\n", " \t\n\r\v\f\x1c\x85\xa0\u1680\u2003\u2028\u202f\u3000\ufeff",
    [*map(chr, range(32))], [*map(chr, range(127, 160))], [*map(chr, range(256))],
    [*map(chr, range(0x300, 0x370))], "😀👩🏽‍👧️🇬🇷", "漢字かなカナ한국어", "מרחבاहिनमस्ते",
    "0123456789½²٣Ⅷ", ".,;:!?-_=(){}[]<>|", WORDS.split(" "), [" " + word for word in WORDS.split()],
    ["<|endoftext|>", "<|pad|>", "<|", "|>", "</s>", "[PAD]", "<0x0A>", "Ġ", "Ċ", "▁", "##"],
    ["'s", "'ll", "'LL", "'d", "'", "''ve", "'re"]]
EDGES = [
    "", " ", "  ", "\n", "\n\n\n x  \t\r\n", " a", "a ", "a  ", "a\n", "a \n", "a\n\n", "\xff", "\x00",
    "\x7f", "\ufffd", "\U0010ffff", "<|endoftext|>", " <|endoftext|> ", "<|pad|>", "a" * 3000, " " * 3000,
    "\n" * 999 + "x", "ab" * 2000, "!" * 2000, "7" * 2000, "é" * 1000, "e" + "\u0301" * 500, "👩‍" * 300,
    "it's we'll  I'VE 123 4½", "a .  , ! ? n't 'm", WORDS, WORDS * 9, "".join(map(chr, range(3000))),
    bytes(range(256)).decode("latin-1"), bytes(range(256)).decode("utf-8", "replace")]


# what is assigned by now: packages disagree on letters that are newer than the Unicode they know
CHARACTERS = [x for x in map(chr, range(0x110000)) if unicodedata.category(x) not in ("Cn", "Cs")]


def hostile(n, seed):
    """n texts: the edges, then pieces of all kinds one after another, any characters, broken UTF-8, runs."""
    rng = random.Random(seed)

    def piece():
        size, kind = rng.choice([1, 1, 2, 3, 9, 40]), rng.random()
        if kind < 0.1:
            return "".join(rng.choices(CHARACTERS, k=size))
        if kind < 0.2:
            return rng.randbytes(size).decode("utf-8", "replace")
        made_of = rng.choice(MADE_OF)
        return (rng.choice(made_of) * rng.choice([size, 9 * size]) if kind < 0.35 else
                "".join(rng.choices(made_of, k=size)))
    return EDGES + ["".join(piece() for _ in range(rng.randint(1, 7))) for _ in range(n - len(EDGES))]


def trained(vocab_size=700):
    """A BPE of ours, with words of all scripts in it, cut between and within characters."""
    return train_tokenizer([WORDS * 2, *hostile(1500, 7)], vocab_size)


def invented(seed, letters=b"ab \xc3\xa9"):
    """A BPE that nobody trained: tokens with several pairs of halves, or none, in any order."""
    rng, ranks = random.Random(seed), {bytes([i]): i for i in range(256)}
    while len(ranks) < 320:
        token = bytes(rng.choices(letters, k=rng.randint(2, 6)))
        ranks.setdefault(token, len(ranks))
    return from_spec({"name": "invented", "bpe": data.tokenizer._dump(ranks)})


def against_ours(theirs, ours, texts, seed=0):
    """Both encode and decode all texts alike, and decode any ids alike."""
    made = theirs(texts)["input_ids"]
    for text, ids in zip(texts, made, strict=True):
        assert ids == ours.encode(text), ascii(text[:200])
        assert theirs.decode(ids) == ours.decode(ids) == text, ascii(text[:200])
    rng = random.Random(seed)
    for _ in range(len(texts) // 10):
        ids = rng.choices(range(ours.vocab_size), k=rng.randint(0, 20))
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids), ids


@pytest.mark.parametrize("kind", ["bytes", "trained", "gpt2"])
def test_10000_texts_in_auto_tokenizer(transformers, tiny, tmp_path, gpt2, kind):
    ours = trained() if kind == "trained" else get_tokenizer(kind)
    folder = exported(tiny(vocab_size=ours.vocab_size), tmp_path, ours)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    against_ours(theirs, ours, hostile(10_000, 1))
    assert (theirs.eos_token, theirs.eos_token_id) == ("<|endoftext|>", ours.eos)
    assert len(theirs) == ours.vocab_size and theirs.pad_token is None and theirs.model_max_length == 64


@pytest.mark.parametrize("seed", range(12))
def test_any_ranks_give_the_same_tokens(transformers, tiny, tmp_path, seed):
    """Nobody need have trained them: a user's file may hold tokens that no merge leads to."""
    ours, rng = invented(seed), random.Random(seed)
    folder = exported(tiny(vocab_size=ours.vocab_size), tmp_path, ours)
    texts = ["".join(rng.choices("aab éÉ", k=rng.randint(1, 60))) for _ in range(500)]
    against_ours(transformers.AutoTokenizer.from_pretrained(folder), ours, texts)


def test_characters_are_of_the_same_kind():
    """Whether a character is a letter, a number, a sign or a blank decides what it is in one word with: a
    token each of it after a letter, a digit, a sign and a space shows it."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed (with transformers)")
    chars = [x.encode() for x in CHARACTERS[:9000] + random.Random(0).sample(CHARACTERS[9000:], 4000)]
    tokens = [char[:i] for char in chars for i in range(1, len(char) + 1)]
    tokens += [start + char for char in chars for start in (b"a", b"1", b"!", b" ")]
    ranks = {token: rank for rank, token in enumerate(dict.fromkeys([*map(bytes, zip(range(256))), *tokens]))}
    ours = from_spec({"name": "kinds", "bpe": data.tokenizer._dump(ranks)})
    theirs = tokenizers.Tokenizer.from_str(hf.their_tokenizer(ours, 64, None)["tokenizer.json"])
    texts = [start + char.decode() for char in chars for start in "a1! "]
    for text, made in zip(texts, theirs.encode_batch(texts), strict=True):
        assert made.ids == ours.encode(text), ascii(text)


@pytest.mark.parametrize("kind", ["bytes", "trained"])
def test_a_folder_opens_alone(transformers, tiny, tmp_path, kind):
    """As docs/gpt2.md has it, without the network and without this project: text in, our score out."""
    ours = trained() if kind == "trained" else get_tokenizer(kind)
    gpt = tiny(vocab_size=ours.vocab_size)
    rm = normalised(gpt)
    texts = [("Tell a story.", " Once, there was a fox."), ("<|endoftext|>", " é"), ("?", ""), ("", "x")]
    rows = [(ours.encode(a) or [ours.eos]) + ours.encode(b) + [ours.eos] for a, b in texts]
    folder = exported(rm, tmp_path, ours)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    eos = [tokenizer.eos_token_id]
    made = [(tokenizer(a)["input_ids"] or eos) + tokenizer(b)["input_ids"] + eos for a, b in texts]
    assert made == rows and len(tokenizer) == ours.vocab_size + 1 == tokenizer.pad_token_id + 1
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    scores = model(**tokenizer.pad({"input_ids": made}, return_tensors="pt")).logits[:, 0]
    torch.testing.assert_close(scores, rm.score(*pad(rows)), atol=1e-5, rtol=1e-5)

    model = transformers.AutoModelForCausalLM.from_pretrained(exported(gpt, tmp_path, ours, "lm")).eval()
    tokens = tokenizer(WORDS, truncation=True, max_length=64, return_tensors="pt")["input_ids"]
    torch.testing.assert_close(model(tokens).logits, gpt(tokens), atol=1e-4, rtol=1e-4)
    assert model.generation_config.eos_token_id == ours.eos
    assert tokens[0].tolist() == ours.encode(WORDS)[-64:]  # as we truncate: from the left


def test_merges_lead_to_every_token(gpt2):
    """50000 merges after the 256 bytes, in the order of their ranks, each of two tokens known before."""
    made, ranks = hf.their_tokenizer(gpt2, 64, 50257), gpt2.encoding._mergeable_ranks
    made = json.loads(made["tokenizer.json"])
    vocab, merges = made["model"]["vocab"], made["model"]["merges"]
    assert [(token["id"], token["content"]) for token in made["added_tokens"] if token["special"]] == [
        (50256, "<|endoftext|>"), (50257, "<|pad|>")]
    assert len(vocab) == 50256 and len(merges) == 50000 and merges[:2] == ["Ġ t", "Ġ a"]
    for rank, merge in enumerate(merges, 256):
        a, b = merge.split(" ")
        assert vocab[a + b] == rank > max(vocab[a], vocab[b])
    assert hf.halves(b" the", ranks) == [b" t", b"he"]


def test_halves_are_those_of_the_merges_before():
    ranks = {bytes([i]): i for i in range(256)} | {b"bc": 256, b"ab": 257, b"abc": 258, b"xyz": 259}
    assert hf.halves(b"abc", ranks) == [b"a", b"bc"] and hf.halves(b"ab", ranks) == [b"a", b"b"]
    assert hf.halves(b"xyz", ranks) is None


@pytest.mark.parametrize("name", ["<|endoftext|>", "<|pad|>"])
def test_an_ordinary_token_that_is_spelled_like_a_special_one(tiny, tmp_path, name):
    ranks = {bytes([i]): i for i in range(256)} | {name.encode(): 256}
    ours = from_spec({"name": "odd", "bpe": data.tokenizer._dump(ranks)})
    with pytest.raises(UserError, match="the tokenizer odd has an ordinary token <.*can't tell from the"):
        exported(RewardModel.from_gpt(tiny(vocab_size=258)), tmp_path, ours)


# ---- pairs for rewardbench ----

def pairs(tmp_path, rows, *flags):
    jsonl(tmp_path / "preferences.jsonl", rows)
    hf.main(["pairs", str(tmp_path / "preferences.jsonl"), str(tmp_path / "pairs.jsonl"), *flags])
    return lines(tmp_path / "pairs.jsonl")


def said(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def test_rankings_become_pairs_without_their_ties(tmp_path, capsys):
    made = pairs(tmp_path, [
        {"prompt": "Tell.", "chosen": " yes", "rejected": "no", "subset": "easy"},
        {"prompt": "", "responses": ["a", "b", "c", "d"], "ranks": [1, 0, 1, 2]}])
    assert made[0] == {"chosen": said("Tell.", "yes"), "rejected": said("Tell.", "no"), "subset": "easy"}
    assert [(row["chosen"][1]["content"], row["rejected"][1]["content"]) for row in made[1:]] == [
        ("a", "d"), ("b", "a"), ("b", "c"), ("b", "d"), ("c", "d")]
    assert all(row["chosen"][:1] == said("") and row["subset"] == "" for row in made[1:])
    assert "6 pairs of 2 rankings written to" in capsys.readouterr().out


def test_conversations_become_messages_and_come_back(tmp_path):
    """Turns begin with the user and alternate, as rewardbench takes them; ours are read from them again."""
    hh = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: A\n\nB?\n\nAssistant:"
    rows = [{"prompt": hh, "chosen": " good", "rejected": " bad"},
            {"prompt": said("Q"), "chosen": said("", "x")[1:], "rejected": said("", " y")[1:]}]
    made = pairs(tmp_path, rows)
    assert made[0]["chosen"] == said("Hi", "Hello", "A\n\nB?", "good")
    assert made[1]["rejected"] == said("Q", " y")
    assert read_preferences(tmp_path / "pairs.jsonl") == read_preferences(tmp_path / "preferences.jsonl")


@pytest.mark.parametrize("prompt, first", [
    ("\n\nSystem: Be kind.\n\nHuman: Hi\n\nAssistant:", "Be kind.\n\nHi"),
    ("\n\nHuman: Hi", None), ("\n\nHuman: a\n\nHuman: b\n\nAssistant:", None), ("\n\nAssistant:", None),
    ("Chat.\n\nHuman: Hi\n\nAssistant:", None), ("\n\nHuman: Hi\n\nAssistant: so", None),
    ("\n\nHuman: Hi\n\nAssistant:\n\nAssistant:", None), ("Human: Hi", None), ("", None)])
def test_what_is_no_conversation_is_one_turn(prompt, first):
    assert hf.turns(prompt) == [{"role": "user", "content": first or prompt}]


def test_pairs_lose_and_overwrite_nothing(tmp_path):
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    pairs(tmp_path, [row])
    before = (tmp_path / "pairs.jsonl").read_bytes()
    with pytest.raises(UserError, match="pairs.jsonl already exists; choose another name"):
        pairs(tmp_path, [row])
    assert (tmp_path / "pairs.jsonl").read_bytes() == before
    (tmp_path / "pairs.jsonl").unlink()
    for bad, match in (({"prompt": "p", "completion": "c"}, 'a line has neither "chosen" and "rejected" nor'),
                       ({"prompt": "p", "response": "c"}, "a line has neither"),
                       (row | {"scores": [0.1, 0.9]}, 'jsonl:2: column "scores" orders the responses'),
                       (row | {"winner": "b"}, 'jsonl:2: column "winner" contradicts'),
                       (row | {"subset": 3}, 'jsonl:2: "subset" must be a string'),
                       (row | {"subset": []}, 'jsonl:2: "subset" must be a string'),
                       (row | {"subset": "\ud800"}, 'jsonl:2: "subset" contains a lone surrogate')):
        with pytest.raises(UserError, match=match):
            pairs(tmp_path, [row, bad])
    assert not (tmp_path / "pairs.jsonl").exists()
    assert len(pairs(tmp_path, [row, {"prompt": "p"}, row], "--skip-bad")) == 2
