"""Import GPT-2's weights from Hugging Face, export checkpoints and pairs, all without `transformers`.

    python -m tools.hf import gpt2 out/gpt2.pt     # downloaded; or gpt2-medium, gpt2-large, gpt2-xl
    python -m tools.hf import FOLDER out/sft.pt    # config.json + model.safetensors or pytorch_model.bin,
                                                   # or either in shards with their .index.json
    python -m tools.hf export out/ppo.pt FOLDER    # for AutoTokenizer, AutoModelForCausalLM
    python -m tools.hf export out/rm.pt FOLDER     # for AutoTokenizer, AutoModelForSequenceClassification
    python -m tools.hf pairs my_folder/preferences_val.jsonl pairs.jsonl    # for rewardbench --load_json

Their matrices are (in,out), ours are (out,in) as in nn.Linear; both hold q, k and v side by side.
"""
import argparse
import itertools
import json
import math
import os
import re
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F

from data.download import download
from data.files import UserError, atomic_folder, check_new, json_object, printable
from data.records import ANSWER, NAMES, QUESTION, read_responses
from data.tokenizer import SPLIT, get_tokenizer
from lib import checkpoint
from lib.flags import one_sentence
from lib.memory import exhausted
from lib.output import make_harmless
from model import GPT, GPTConfig, RewardModel

KNOWN = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
URL = "https://huggingface.co/openai-community/{}/resolve/main/{}"
FILES = ("model.safetensors", "pytorch_model.bin")
INDEX = ".index.json"  # of shards
EOS, PAD = "<|endoftext|>", "<|pad|>"
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # torch's
LAYER = {"ln_1": "ln_1", "attn.c_attn": "attn.qkv", "attn.c_proj": "attn.proj",
         "ln_2": "ln_2", "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.proj"}
# what our network computes; tanh-GELU has an old and a new name
SETTINGS = {"model_type": ["gpt2"], "activation_function": ["gelu_new", "gelu_pytorch_tanh"],
            "layer_norm_epsilon": [1e-5], "scale_attn_weights": [True], "add_cross_attention": [False],
            "scale_attn_by_inverse_layer_idx": [False], "tie_word_embeddings": [True]}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.uint8}
NAMED = checkpoint.NAMED | {f"torch {x}Storage" for x in ("Bool", "Char", "Short", "Int")} | {
    "torch._utils _rebuild_tensor", "torch._utils _rebuild_parameter"}  # in a pytorch_model.bin
HEADER_MAX = 100_000_000  # bytes; the limit of the safetensors package
OLD_PICKLE = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how files of torch.save began before torch 1.6


# ---- files ----

def parse_json(data, what):
    """JSON bytes -> dict. UserError, beginning with `what`: not JSON, not an object, a duplicate key."""
    try:
        return json_object(data)
    except UserError as error:
        raise UserError(f"{what}: {error}") from None


def read_safetensors(path):
    """{name: tensor} of a .safetensors file, memory-mapped. UserError: truncated or corrupt.

    The format: a length n in 8 bytes, n bytes of JSON (the header), then the data of each tensor in turn.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        n = int.from_bytes(file.read(8), "little")
        if size < 8 or n > min(size - 8, HEADER_MAX):
            raise UserError(f"{path} is not a safetensors file, or is truncated")
        header = parse_json(file.read(n), f"{path}: header")
    header.pop("__metadata__", None)
    entries = sorted((*_entry(entry, f"{path}: {name[:80]!r}"), name) for name, entry in header.items())
    end = 0
    for start, stop, *_, name in entries:
        if start != end:
            raise UserError(f"{path} is corrupt: the data of {name[:80]!r} starts at byte {start} instead of "
                            f"{end}, so there is a gap or an overlap")
        end = stop
    if end != size - 8 - n:
        raise UserError(f"{path} is truncated or corrupt: its header announces {end} bytes of data, the file "
                        f"has {size - 8 - n}")
    data = torch.from_file(str(path), size=size, dtype=torch.uint8)[8 + n :]
    return {name: _view(data[start:stop], dtype, shape) for start, stop, dtype, shape, name in entries}


def _entry(entry, what):
    """A tensor's entry in the header -> (start, stop, name of the dtype, shape), checked for consistency."""
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"{what}: unknown dtype {dtype!r:.40}")
    for key, value in (("shape", shape), ("data_offsets", offsets)):
        # type, not isinstance: True is an int; at most 8: long lists of large sizes take hours to multiply
        if not (isinstance(value, list) and len(value) <= 8
                and all(type(x) is int and 0 <= x < 2**63 for x in value)):
            raise UserError(f"{what}: {key} {value!r:.60} must be a list of sizes")
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != needed:
        raise UserError(f"{what}: data_offsets {offsets} do not fit {dtype} of shape {shape}: {needed} bytes")
    return *offsets, dtype, shape


def _view(data, dtype, shape):
    aligned = data.storage_offset() % DTYPES[dtype].itemsize == 0  # in old files headers have any length
    return (data if aligned else data.clone()).view(DTYPES[dtype]).view(shape)


def read_pickle(path):
    """{name: tensor} of a pytorch_model.bin; never executes code. UserError: corrupt, or contains code."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(len(OLD_PICKLE))
    zipped = start[:4] == b"PK\3\4"
    try:
        if zipped:
            checkpoint.check_pickles(path, NAMED)
        elif start != OLD_PICKLE:
            raise ValueError
        tensors = torch.load(path, map_location="cpu", mmap=zipped, weights_only=True)
        plain = all(type(name) is str and tensor.layout is torch.strided and tensor.device.type == "cpu"
                    for name, tensor in tensors.items())
        # twice the size: a head may share the embedding's data; strides of 0 could claim any size
        if not plain or sum(tensor.nbytes for tensor in tensors.values()) > 2 * size:
            raise ValueError
        if zipped:
            checkpoint.check_records(path, tensors.values())
    except Exception as error:  # a corrupt pickle can raise anything
        lack = ", or there is too little memory to read it" if exhausted(error) else ""
        raise UserError(f"{path} is corrupt, or holds more than tensors and their names (code in such a "
                        f"file is never executed){lack}") from None
    return tensors


def read_weights(path):
    """{name: tensor} of a file of weights, or of all the files that an index names. UserError: corrupt."""
    if path.name.endswith(INDEX):
        return read_shards(path)
    if found := re.fullmatch(r"(.+)-\d{5}-of-\d{5}(\.\w+)", path.name):
        raise UserError(f"{path} is only a part of the weights; give the folder that holds all of them and "
                        f"{found[1]}{found[2]}{INDEX}")
    return read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)


def read_shards(path):
    """{name: tensor} of the shards that the index `path` names, which must lie beside it. UserError: an index
    that does not say of every tensor, and of nothing else, where it is."""
    names_in, announced = shard_names(path)
    check_shards(path, names_in)
    tensors = {}
    for file, there in names_in.items():
        shard = (read_safetensors if file.endswith(".safetensors") else read_pickle)(path.with_name(file))
        for name in sorted(shard.keys() ^ there):
            what = ("missing, though {} lists it here" if name in there else
                    "present, though {} lists it elsewhere or not at all").format(path.name)
            raise UserError(f"{path.with_name(file)}: {name[:80]!r} is {what}")
        tensors |= shard
    shared = {(x.data_ptr(), x.nbytes) for x in tensors.values()}  # a tied head may count once
    found = [sum(x.nbytes for x in tensors.values()), sum(size for _, size in shared)]
    if type(announced) in (int, float) and announced not in found:
        raise UserError(f"{path}: total_size is {announced}, but the shards hold {found[0]} bytes of tensors")
    return tensors


def check_shards(path, listed):
    """UserError: a shard that is listed in the index `path` does not lie beside it, or another one does."""
    missing = [file for file in listed if not os.path.isfile(path.with_name(file))]
    if missing:
        raise UserError(f"{path.parent / missing[0][:80]} is missing, {len(missing)} of {len(listed)} "
                        f"shards in {path.name}")
    stem, ending = map(re.escape, os.path.splitext(path.name.removesuffix(INDEX)))
    more = [file.name for file in path.parent.iterdir() if file.name not in listed
            and re.fullmatch(rf"{stem}-\d{{5}}-of-\d{{5}}{ending}", file.name)]
    if more:
        raise UserError(f"{path.parent / min(more)} is a shard that {path.name} does not list; of two models "
                        "in one folder, move one away")


def shard_names(path):
    """{file: names of its tensors} and the total size, as an index has them. UserError: files elsewhere, or
    no such map."""
    if path.stat().st_size > HEADER_MAX:
        raise UserError(f"{path} is too large for an index")
    index, names_in = parse_json(path.read_bytes(), path), defaultdict(set)
    files, ending = index.get("weight_map"), Path(path.name.removesuffix(INDEX)).suffix
    if not isinstance(files, dict) or not files:
        raise UserError(f'{path}: "weight_map" must say which file each tensor is in')
    for name, file in files.items():
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\:\0]+", file) or not file.endswith(ending):
            raise UserError(f"{path}: {file!r:.80} must be the name of a {ending} file in the same folder")
        names_in[file].add(name)
    metadata = index.get("metadata")
    return dict(sorted(names_in.items())), metadata.get("total_size") if isinstance(metadata, dict) else None


def write_safetensors(path, tensors):
    """Write {name: float32 tensor} to `path`."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32, name
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.contiguous().numpy())
        file.flush()
        os.fsync(file.fileno())


# ---- names and sizes ----

def names(n_layer):
    """{their name: ours} of all weights of a GPT-2 but the head, which is tied to wte."""
    pairs = {f"{name}.weight": f"trunk.{name}.weight" for name in ("wte", "wpe", "ln_f")}
    pairs["ln_f.bias"] = "trunk.ln_f.bias"
    for i in range(n_layer):
        for theirs, ours in LAYER.items():
            for kind in ("weight", "bias"):
                pairs[f"h.{i}.{theirs}.{kind}"] = f"trunk.blocks.{i}.{ours}.{kind}"
    return pairs


def check_ours(weights, pairs):
    """UserError: model.py was changed, and its trunk has other weights than a GPT-2."""
    odd = {name for name in weights if name.startswith("trunk.")} ^ set(pairs.values())
    odd = sorted(name for name in odd if name in weights or not name.endswith(".bias"))
    if odd:
        raise UserError(f"the network in model.py is not a GPT-2: only one of the two has {odd[0]}")


def turned(name, tensor):
    """The tensor of this name (theirs), converted between their layout and ours: (in,out) <-> (out,in)."""
    return tensor.T if ".c_" in name and name.endswith(".weight") else tensor


@torch.no_grad()
def check_outputs(model):
    """UserError: model.py was changed, and computes with the same weights something else than a GPT-2."""
    config, weights = model.config, their_weights(model)
    tokens = torch.arange(min(24, config.block_size)) * 7 % config.vocab_size
    h = gpt2_hidden({name.removeprefix("transformer."): x for name, x in weights.items()}, config, tokens)
    ours = model.eval().trunk(tokens[None])[0]
    if isinstance(model, GPT):
        ours, h = model(tokens[None])[0], h @ model.lm_head.weight.T
    if not (ours - h).abs().max() <= 1e-3 * h.abs().max():
        raise UserError("the network in model.py is not a GPT-2: the same weights give other outputs")


def gpt2_hidden(weights, config, tokens):
    """GPT-2 as a formula (Radford et al. 2019, 2.3): their weights, tokens (T,) -> h after the final norm
    (T,C)."""
    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], weights[name + ".weight"], weights[name + ".bias"])

    def product(x, name):
        return x @ weights[name + ".weight"] + weights[name + ".bias"]

    T, C = len(tokens), config.d_model
    x = weights["wte.weight"][tokens] + weights["wpe.weight"][:T]
    for i in range(config.n_layer):
        qkv = product(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn")
        q, k, v = qkv.view(T, 3, config.n_head, C // config.n_head).permute(1, 2, 0, 3)  # (H,T,D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).reshape(T, C)
        x = x + product(y, f"h.{i}.attn.c_proj")
        up = F.gelu(product(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"), approximate="tanh")
        x = x + product(up, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f")


def plain_names(tensors, source):
    """Their tensors without causal masks, and without prefixes: transformer's and those of torch.compile, DDP
    and FSDP. UserError: a name twice."""
    plain = {}
    for name, tensor in tensors.items():
        short = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        short = short.removeprefix("transformer.")
        if not re.fullmatch(r"h\.\d+\.attn\.(bias|masked_bias)", short):
            if short in plain:
                raise UserError(f"{source}: {name[:80]!r} is present with and without the prefix")
            plain[short] = tensor
    return plain


def fit_vocabulary(tensors, tokenizer, source):
    """Their tensors with a row for each of the tokenizer's ids: rows that pad the vocabulary are dropped, and
    printed. UserError: no embeddings, or another tokenizer's."""
    rows, V = sizes(tensors, source)["vocab_size"], tokenizer.vocab_size
    # GPT-2's 50257 become 50304, or up to 51200 in parts for several GPUs
    padding = rows % 8 == 0 and 0 < rows - V < max(128, V // 32)
    if rows != V and not padding:
        raise UserError(f"{source} has {rows} tokens, the tokenizer {tokenizer.name} has {V}"
                        + f" (the other {rows - V} can't be padding)" * (rows > V)
                        + "; choose another with --tokenizer")
    if padding:
        print(f"{source} has {rows} tokens, the tokenizer {tokenizer.name} has {V}; the last {rows - V} are "
              "padding and are dropped")
    return {name: x[:V] if name in ("wte.weight", "lm_head.weight") and x.dim() == 2 else x
            for name, x in tensors.items()}


def without_head(tensors, source):
    """Their tensors without the head. UserError: it is not tied."""
    head, wte = tensors.get("lm_head.weight"), tensors["wte.weight"]
    if head is not None and not (head.dtype == wte.dtype and torch.equal(head, wte)):
        raise UserError(f"{source}: lm_head.weight differs from wte.weight, but model.py ties the head to "
                        "the embedding; this model can't be imported")
    return {name: x for name, x in tensors.items() if name != "lm_head.weight"}


def sizes(tensors, source):
    """The sizes of config.json, as the tensors have them. UserError: no embeddings, so not a GPT-2."""
    for name in ("wte.weight", "wpe.weight"):
        if name not in tensors or tensors[name].dim() != 2 or not tensors[name].numel():
            raise UserError(f"{source}: {name} is missing or not a matrix, so this is not a GPT-2")
    (V, C), (T, _) = tensors["wte.weight"].shape, tensors["wpe.weight"].shape
    layers = {name.split(".")[1] for name in tensors if name.startswith("h.")}
    return {"vocab_size": V, "n_positions": T, "n_embd": C, "n_layer": max(1, len(layers))}


def configure(tensors, rows, source):
    """The GPTConfig, from config.json beside the file `source` or, without it, from the shapes; `rows` tokens
    were there before padding was dropped.

    UserError: the config is not that of a GPT-2, or its sizes differ from those of the tensors.
    """
    found = sizes(tensors, source)
    C, path = found["n_embd"], source.with_name("config.json")
    if path.exists():
        asked = parse_json(path.read_bytes(), path)
        check_config(asked, found, rows, path)
        n_head = asked["n_head"]
    else:
        if C % 64:
            raise UserError(f"{path} is missing, and n_head can't be guessed: n_embd {C} is not a multiple "
                            "of 64, as in every GPT-2")
        n_head = C // 64
        print(f"no {path}: n_head is set to {C}/64, as in every GPT-2; other sizes are read from the shapes")
    if not n_head or C % n_head:
        raise UserError(f"{source}: n_embd {C} must be divisible by n_head {n_head}")
    return GPTConfig(vocab_size=found["vocab_size"], block_size=found["n_positions"],
                     n_layer=found["n_layer"], n_head=n_head, d_model=C)


def check_config(asked, found, rows, path):
    """UserError, naming every entry of config.json that does not fit model.py or the sizes `found`."""
    V = found["vocab_size"]
    for key in (*found, "n_head"):
        if type(asked.get(key)) is not int or asked[key] < 1:
            raise UserError(f"{path}: {key} is {asked.get(key)!r:.40}; it must be a positive integer")
    wrong = [f"{key} is {asked[key]}, but the tensors have {n}"
             for key, n in found.items() if asked[key] != n and (key, asked[key]) != ("vocab_size", rows)]
    wrong += [f"{key} is {asked[key]}, one of the tokens dropped as padding"
              for key in ("bos_token_id", "eos_token_id") if asked.get(key) in range(V, rows)]
    allowed = SETTINGS | {"n_inner": [4 * found["n_embd"], None]}
    wrong += [f"{key} is {asked[key]!r:.40}, but only {fine[0]!r} is supported"
              for key, fine in allowed.items() if asked.get(key, fine[0]) not in fine]
    if wrong:
        raise UserError(f"{path}: {'; '.join(wrong)}")


def build(tensors, config, source):
    """Their tensors -> a GPT. UserError, naming all that are missing, unknown or of a wrong shape."""
    with torch.device("meta"):  # allocates nothing before all shapes are checked
        gpt = GPT(config)
    pairs, meta = names(config.n_layer), gpt.state_dict()
    check_ours(meta, pairs)
    wrong = [f"{name} is missing" for name in pairs if name not in tensors]
    wrong += [f"{name[:80]!r} is unknown" for name in tensors if name not in pairs]
    for name in pairs.keys() & tensors.keys():
        tensor, shape = tensors[name], tuple(turned(name, meta[pairs[name]]).shape)
        if tuple(tensor.shape) != shape:
            wrong.append(f"{name} has shape {tuple(tensor.shape)} instead of {shape}")
        elif tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            wrong.append(f"{name} has dtype {tensor.dtype}")
        elif not torch.isfinite(tensor).all():
            wrong.append(f"{name} holds non-finite numbers")
    if wrong:
        raise UserError(f"{source} does not fit a GPT-2: {'; '.join(sorted(wrong))}")
    # copy: a view of the mapped file would be saved with the whole file
    state = {ours: turned(name, tensors[name]).to(torch.float32, copy=True) for name, ours in pairs.items()}
    gpt.load_state_dict(state | {"lm_head.weight": state["trunk.wte.weight"]}, assign=True)
    gpt.lm_head.weight = gpt.trunk.wte.weight  # assign made two parameters of it
    return gpt.eval()


# ---- import ----

def locate(source):
    """A known name, a folder or a file -> Path of the weights. UserError: none of these."""
    if source in KNOWN:
        return fetch(source)
    path = Path(source)
    if path.is_dir():
        files = [path / (name + end) for name in FILES for end in ("", INDEX)]
        there = [file for file in files if file.is_file()]
        if not there:
            shards = sorted(x.name for x in path.glob("*-of-*") if x.suffix in (".safetensors", ".bin"))
            lost = f", and {shards[0]} without its {INDEX}" if shards else ""
            raise UserError(f"{source} contains neither {' nor '.join(FILES)}{lost}")
        return there[0]
    if not path.is_file():
        raise UserError(f"{source} is neither a file nor a folder, nor one of {', '.join(KNOWN)}")
    if not path.name.endswith((".safetensors", ".bin", *(name + INDEX for name in FILES))):
        raise UserError(f"{source} is neither a .safetensors nor a .bin file")
    return path


def fetch(name):
    """Download a known name's files unless they are cached; returns the Path of the weights. UserError: no
    network."""
    folder = Path(torch.hub.get_dir()) / "onetrunk" / name
    folder.mkdir(parents=True, exist_ok=True)
    otherwise = (f"give a folder with config.json and {FILES[0]} instead of the name: "
                 f"python -m tools.hf import FOLDER out/{name}.pt")
    for file, check in (("config.json", lambda path: parse_json(path.read_bytes(), path)),
                        (FILES[0], read_safetensors)):
        download(URL.format(name, file), folder / file, check, otherwise)
    return folder / FILES[0]


def import_gpt2(source, out, spec="gpt2"):
    """Write the checkpoint `out` from a known name, a folder or a file. UserError: it does not fit."""
    tokenizer, out = get_tokenizer(spec), Path(out)
    if out.is_dir():
        raise UserError(f"{out} is a folder; give the name of the new checkpoint, such as out/gpt2.pt")
    path = locate(source)
    theirs = plain_names(read_weights(path), path)
    tensors = without_head(fit_vocabulary(theirs, tokenizer, path), path)
    config = configure(tensors, len(theirs["wte.weight"]), path)
    gpt = build(tensors, config, path)
    check_outputs(gpt)
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(out, gpt, tokenizer, keep="other")
    print(f"{sum(p.numel() for p in gpt.parameters()) / 1e6:.1f} million weights saved to {out}")


# ---- export ----

def their_config(config, tokenizer, **more):
    """The config.json of a GPTConfig, as a dict."""
    return {"model_type": "gpt2", "vocab_size": config.vocab_size, "n_positions": config.block_size,
            "n_embd": config.d_model, "n_layer": config.n_layer, "n_head": config.n_head, "n_inner": None,
            "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "torch_dtype": "float32",
            "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": tokenizer.eos,
            "eos_token_id": tokenizer.eos, **more}


def their_weights(model):
    """{their name: tensor} of the trunk; a bias that our network lacks is 0."""
    weights, pairs = model.state_dict(), names(model.config.n_layer)
    check_ours(weights, pairs)
    for ours in set(pairs.values()) - set(weights):
        weights[ours] = torch.zeros(len(weights[ours.removesuffix("bias") + "weight"]))
    return {"transformer." + name: turned(name, weights[ours]) for name, ours in pairs.items()}


def their_reward_model(rm, tokenizer, path):
    """(config, weights) for GPT2ForSequenceClassification, whose scores are ours.

    It reads the score at the rightmost token that is not the pad id. Our texts end in eos, which must be
    read, and every other id may occur in a text. So the pad is a new id, V, whose embedding of zeros is
    never looked at: it only ever stands to the right of the text. Its head W has no bias, so our constant c
    goes into the bias of ln_f before it, as c W / |W|^2: the head is all that reads ln_f.
    """
    if rm.pool != "last":
        raise UserError(f'{path} has pool "{rm.pool}", but transformers supports only "last"')
    V, weights = rm.config.vocab_size, their_weights(rm)
    weights["transformer.wte.weight"] = F.pad(weights["transformer.wte.weight"], (0, 0, 0, 1))
    W, bias, shift, scale = (x.detach().double() for x in (
        rm.reward_head.weight, rm.reward_head.bias, rm.shift, rm.scale))
    moved = weights["transformer.ln_f.bias"] + (bias - shift) * W[0] / W.square().sum()
    if not torch.isfinite(moved.float()).all():
        raise UserError(f"{path} gives every text the same score: the weights of its head are 0")
    weights["score.weight"], weights["transformer.ln_f.bias"] = (W / scale).float(), moved.float()
    print(f"scores are ours in rows that end in eos, {tokenizer.eos}; pad on the right with {V}, a new id")
    return their_config(rm.config, tokenizer, architectures=["GPT2ForSequenceClassification"],
                        id2label={"0": "score"}, label2id={"score": 0},
                        pad_token_id=V) | {"vocab_size": V + 1}, weights


def their_tokenizer(tokenizer, block_size, pad_id):
    """{file name: text} of a tokenizer for AutoTokenizer; pad_id None: no pad token. UserError: an ordinary
    token is spelled like a special one."""
    model, special = their_bpe(tokenizer.encoding._mergeable_ranks), {EOS: tokenizer.eos}
    options = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size,
               "clean_up_tokenization_spaces": False, "padding_side": "right", "truncation_side": "left",
               "bos_token": EOS, "eos_token": EOS,
               "split_special_tokens": True}  # what spells one is ordinary text
    if pad_id:
        special[PAD], options["pad_token"] = pad_id, PAD
    if same := special.keys() & model["vocab"]:
        raise UserError(f"the tokenizer {tokenizer.name} has an ordinary token {min(same)}, which "
                        "transformers can't tell from the special one")
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": i, "content": text, "special": True} | plain for text, i in special.items()]
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    bytewise = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    parts = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytewise]}, "decoder": bytewise}
    return {"tokenizer.json": json.dumps({"version": "1.0", "added_tokens": added, "model": model} | parts),
            "tokenizer_config.json": json.dumps(options, indent=2)}


def their_bpe(ranks):
    """{token: rank} -> the "model" of a tokenizer.json."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2 spells these as themselves
    others = [byte for byte in range(256) if byte not in printed]
    letter = {byte: chr(byte) for byte in printed} | {byte: chr(256 + i) for i, byte in enumerate(others)}

    def spell(token):
        return "".join(letter[byte] for byte in token)

    merges = [" ".join(map(spell, pair)) for token in ranks
              if len(token) > 1 and (pair := halves(token, ranks))]
    return {"type": "BPE", "vocab": {spell(token): rank for token, rank in ranks.items()}, "merges": merges,
            "ignore_merges": True}  # a word that is a token is that token, as in tiktoken


def halves(token, ranks):
    """The two tokens that BPE merges last to make `token`; None if it makes several others of it."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        joined = [ranks.get(a + b, math.inf) for a, b in itertools.pairwise(parts)]
        if (least := min(joined)) == math.inf:
            return None
        i = joined.index(least)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def export(path, folder):
    """Write a checkpoint as a folder for transformers, atomically. UserError: the folder is not empty."""
    folder = Path(os.path.abspath(folder))
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} already exists and is not empty; nothing is overwritten")
    kind, tokenizer = checkpoint.kind(path), checkpoint.load_tokenizer(path)
    if kind == "GPT":
        model = checkpoint.load(GPT, path)
        config = their_config(model.config, tokenizer, architectures=["GPT2LMHeadModel"])
        weights = their_weights(model)
    else:
        model = checkpoint.load(RewardModel, path)
        config, weights = their_reward_model(model, tokenizer, path)
    check_outputs(model)
    texts = {"config.json": json.dumps(config, indent=2)}
    texts |= their_tokenizer(tokenizer, model.config.block_size, config.get("pad_token_id"))
    write_folder(folder, texts, weights)
    print(f"{', '.join(sorted([*texts, FILES[0]]))} written to {folder}")


def write_folder(folder, texts, weights):
    """Write {file name: text} and {name: tensor} as a new folder, atomically. UserError: can't write."""
    try:
        with atomic_folder(folder) as part:
            for name, text in texts.items():
                (part / name).write_text(text, encoding="utf-8")
            write_safetensors(part / FILES[0], weights)
    except OSError as error:
        raise UserError(f"can't write {folder}: {error.strerror}") from None


# ---- pairs ----

def turns(prompt):
    """A prompt's messages: those of an HH text, with a system's text in the first of them; any other prompt
    is a single one of the user's."""
    system, *parts = re.split(f"({QUESTION}|{ANSWER})", prompt)
    said = [{"role": "user" if name == QUESTION else "assistant", "content": text.removeprefix(" ")}
            for name, text in zip(parts[::2], parts[1::2], strict=True)]
    start, roles = NAMES["system"] + " ", [turn["role"] for turn in said]
    if system and not system.startswith(start) or parts[-2:] != [ANSWER, ""] or (
            roles != ["user", "assistant"] * (len(said) // 2)):
        return [{"role": "user", "content": prompt}]
    if system:
        said[0]["content"] = f"{system.removeprefix(start)}\n\n{said[0]['content']}"
    return said[:-1]


def pairs_of(line, prompt, responses, ranks):
    """[row]: for each pair that the ranks order the two whole conversations, and the line's subset."""
    whole = [[*turns(prompt), {"role": "assistant", "content": text.removeprefix(" ")}] for text in responses]
    return [{"chosen": whole[i], "rejected": whole[j], "subset": line.get("subset", "")}
            for i, j in itertools.permutations(range(len(ranks)), 2) if ranks[i] < ranks[j]]


def write_pairs(path, out, skip_bad=False):
    """Write the pairs of a preferences.jsonl to a new file, one a line. UserError: a line ranks nothing."""
    check_new(out)
    found = read_responses(path, skip_bad, added=())
    if any(ranks is None for *_, ranks in found):
        raise UserError(f'{path}: a line has neither "chosen" and "rejected" nor "responses", so no pair')
    rows = [row for ranking in found for row in pairs_of(*ranking)]
    checkpoint.write(Path(out), rows, save=checkpoint.write_lines)
    print(f"{len(rows)} pairs of {len(found)} rankings written to {printable(out)}")


# ---- command line ----

def main(argv=None):
    """Parse the command line and run the command. UserError, OSError: the user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("import", help="GPT-2 weights -> a checkpoint", allow_abbrev=False)
    sub.add_argument("source", help=f"{', '.join(KNOWN)}, or a folder, a .safetensors or a .bin file")
    sub.add_argument("out", help="new checkpoint, e.g. out/gpt2.pt")
    sub.add_argument("--tokenizer", default="gpt2", help='"gpt2", "bytes" or a BPE file (default: gpt2)')
    sub = commands.add_parser("export", help="a checkpoint -> a folder for transformers", allow_abbrev=False)
    sub.add_argument("checkpoint", help="e.g. out/ppo.pt or out/rm.pt")
    sub.add_argument("folder", help="new folder")
    sub = commands.add_parser("pairs", help="preferences.jsonl -> a file for rewardbench --load_json",
                              allow_abbrev=False)
    sub.add_argument("file", help="e.g. my_folder/preferences_val.jsonl")
    sub.add_argument("out", help="new file")
    sub.add_argument("--skip-bad", action="store_true", help="skip malformed lines and report how many")
    args = parser.parse_args(argv)
    if args.command == "import":
        import_gpt2(args.source, args.out, args.tokenizer)
    elif args.command == "pairs":
        write_pairs(args.file, args.out, args.skip_bad)
    else:
        export(args.checkpoint, args.folder)


if __name__ == "__main__":
    make_harmless()
    with one_sentence("hf.py", "A model needs twice the size of its files."):
        main()
