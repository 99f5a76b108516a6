"""GPT-2's weights from Hugging Face in, checkpoints out; both without `transformers`.

    python hf.py import gpt2 out/gpt2.pt       # downloaded; or gpt2-medium, gpt2-large, gpt2-xl
    python hf.py import FOLDER out/sft.pt      # config.json + model.safetensors or pytorch_model.bin
    python hf.py export out/ppo.pt FOLDER      # for GPT2LMHeadModel.from_pretrained
    python hf.py export out/rm.pt FOLDER       # for GPT2ForSequenceClassification.from_pretrained

Their matrices are (in,out) and ours, as nn.Linear has them, (out,in); q, k and v lie side by side in both.
"""
import argparse
import json
import math
import os
import re
import shutil
import sys
import zipfile
from pathlib import Path

import checkpoint
import torch
import torch.nn.functional as F

from data.records import UserError
from data.tokenizer import get_tokenizer
from model import GPT, GPTConfig, RewardModel

KNOWN = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
URL = "https://huggingface.co/openai-community/{}/resolve/main/{}"
FILES = ("model.safetensors", "pytorch_model.bin")
LAYER = {"ln_1": "ln_1", "attn.c_attn": "attn.qkv", "attn.c_proj": "attn.proj",
         "ln_2": "ln_2", "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.proj"}
# what our network is; of the two names of tanh-GELU the second is the newer
SETTINGS = {"model_type": ["gpt2"], "activation_function": ["gelu_new", "gelu_pytorch_tanh"],
            "layer_norm_epsilon": [1e-5], "scale_attn_weights": [True], "add_cross_attention": [False],
            "scale_attn_by_inverse_layer_idx": [False], "tie_word_embeddings": [True]}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.uint8}
HEADER_MAX = 100_000_000  # bytes; the limit of the safetensors package
OLD_PICKLE = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch.save's files began before 1.6


# ---- files ----

def parse_json(data, what):
    """The object in JSON bytes. UserError: `what` is no JSON, no object, or has a name twice."""
    def once(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name stands twice")
        return dict(pairs)

    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is not JSON: {error}"[:300]) from None
    if not isinstance(value, dict):
        raise UserError(f"{what} is not a JSON object")
    return value


def read_safetensors(path):
    """{name: tensor} of a .safetensors file, not copied but mapped. UserError: damaged.

    The format: a length n in 8 bytes, n bytes of JSON, and the numbers, tensor after tensor.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        n = int.from_bytes(file.read(8), "little")
        if size < 8 or n > min(size - 8, HEADER_MAX):
            raise UserError(f"{path} is no safetensors file, or is cut off")
        header = parse_json(file.read(n), f"{path}: the header")
    header.pop("__metadata__", None)
    entries = sorted((*_entry(entry, f"{path}: {name[:80]!r}"), name) for name, entry in header.items())
    end = 0
    for start, stop, *_, name in entries:
        if start != end:
            raise UserError(f"{path}: the numbers of {name[:80]!r} begin at byte {start} instead of {end}: "
                            "a gap or an overlap")
        end = stop
    if end != size - 8 - n:
        raise UserError(f"{path} is cut off or damaged: its header tells of {end} bytes of numbers, and "
                        f"there are {size - 8 - n}")
    numbers = torch.from_file(str(path), size=size, dtype=torch.uint8)[8 + n :]
    return {name: _view(numbers[start:stop], dtype, shape) for start, stop, dtype, shape, name in entries}


def _entry(entry, what):
    """One tensor of the header -> (start, stop, dtype's name, shape), sizes that fit together."""
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"{what} has the unknown dtype {dtype!r:.40}")
    for key, value in (("shape", shape), ("data_offsets", offsets)):
        # type, not isinstance: True is an int too; 8: a long list of large numbers takes hours to multiply
        if not (isinstance(value, list) and len(value) <= 8
                and all(type(x) is int and 0 <= x < 2**63 for x in value)):
            raise UserError(f"{what}: {key} {value!r:.60} is no list of sizes")
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != needed:
        raise UserError(f"{what} lies at bytes {offsets}, and {dtype} of shape {shape} takes {needed}")
    return *offsets, dtype, shape


def _view(data, dtype, shape):
    aligned = data.storage_offset() % DTYPES[dtype].itemsize == 0  # old files have headers of any length
    return (data if aligned else data.clone()).view(DTYPES[dtype]).view(shape)


def read_pickle(path):
    """{name: tensor} of a pytorch_model.bin; code in it is never run. UserError: damaged, or has code."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(len(OLD_PICKLE))
    zipped = start[:4] == b"PK\3\4"
    try:
        # torch never packs; a packed file could unpack to any size
        unpacked = sum(entry.file_size for entry in zipfile.ZipFile(path).infolist()) if zipped else 0
        if unpacked > size or not zipped and start != OLD_PICKLE:
            raise ValueError
        tensors = torch.load(path, map_location="cpu", mmap=zipped, weights_only=True)
        plain = all(type(name) is str and tensor.layout is torch.strided and tensor.device.type == "cpu"
                    for name, tensor in tensors.items())
        # twice, for a head may share the embedding's numbers; strides of 0 could feign any size
        if not plain or sum(tensor.nbytes for tensor in tensors.values()) > 2 * size:
            raise ValueError
    except Exception:  # a damaged pickle can raise anything
        raise UserError(f"{path} is damaged, or holds more than tensors and their names (code in such "
                        "a file is never run)") from None
    return tensors


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
    """{their name: ours} of every weight of a GPT-2 but the head, which is tied to wte."""
    pairs = {f"{name}.weight": f"trunk.{name}.weight" for name in ("wte", "wpe", "ln_f")}
    pairs["ln_f.bias"] = "trunk.ln_f.bias"
    for i in range(n_layer):
        for theirs, ours in LAYER.items():
            for kind in ("weight", "bias"):
                pairs[f"h.{i}.{theirs}.{kind}"] = f"trunk.blocks.{i}.{ours}.{kind}"
    return pairs


def check_ours(weights, pairs):
    """UserError: someone has changed model.py, so that its trunk has weights which no GPT-2 has."""
    odd = {name for name in weights if name.startswith("trunk.")} ^ set(pairs.values())
    odd = sorted(name for name in odd if name in weights or not name.endswith(".bias"))
    if odd:
        raise UserError(f"the network in model.py is no GPT-2: {odd[0]} is in one of them only")


def turned(name, tensor):
    """A tensor under their name, from their layout to ours or back: (in,out) <-> (out,in)."""
    return tensor.T if ".c_" in name and name.endswith(".weight") else tensor


def plain_names(tensors, source):
    """Their tensors without the prefix, the causal masks and the head. UserError: a head of its own."""
    plain = {}
    for name, tensor in tensors.items():
        if not re.fullmatch(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)", name):
            if name.removeprefix("transformer.") in plain:
                raise UserError(f"{source}: {name[:80]!r} is there with and without the prefix")
            plain[name.removeprefix("transformer.")] = tensor
    head, wte = plain.pop("lm_head.weight", None), plain.get("wte.weight")
    if head is not None and wte is not None and not (head.dtype == wte.dtype and torch.equal(head, wte)):
        raise UserError(f"{source}: lm_head.weight differs from wte.weight; here the head is tied to the "
                        "embedding, so this model doesn't fit")
    return plain


def sizes(tensors, source):
    """What the tensors say of config.json's sizes. UserError: no embeddings, so no GPT-2."""
    for name in ("wte.weight", "wpe.weight"):
        if name not in tensors or tensors[name].dim() != 2 or not tensors[name].numel():
            raise UserError(f"{source}: {name} is missing or no matrix, so this is no GPT-2")
    (V, C), (T, _) = tensors["wte.weight"].shape, tensors["wpe.weight"].shape
    layers = {name.split(".")[1] for name in tensors if name.startswith("h.")}
    return {"vocab_size": V, "n_positions": T, "n_embd": C, "n_layer": max(1, len(layers))}


def configure(tensors, source):
    """The GPTConfig, from the config.json beside the file `source` or, without one, from the shapes.

    UserError: what the config asks for is not GPT-2's, or its sizes are not the tensors'.
    """
    found = sizes(tensors, source)
    C, path = found["n_embd"], source.with_name("config.json")
    if path.exists():
        asked = parse_json(path.read_bytes(), path)
        check_config(asked, found, path)
        n_head = asked["n_head"]
    else:
        n_head = C // 64
        print(f"no {path}: n_head is taken as {C}/64, as in every GPT-2, the other sizes from the shapes")
    if not n_head or C % n_head:
        raise UserError(f"{source}: {n_head} heads can't share a width of {C}")
    return GPTConfig(found["vocab_size"], found["n_positions"], found["n_layer"], n_head, C)


def check_config(asked, found, path):
    """UserError: names every entry of a config.json that our network, of sizes `found`, can't honour."""
    for key in (*found, "n_head"):
        if type(asked.get(key)) is not int or asked[key] < 1:
            raise UserError(f"{path}: {key} is {asked.get(key)!r:.40}, and must be a whole number above 0")
    wrong = [f"{key} is {asked[key]}, and the tensors say {n}" for key, n in found.items() if asked[key] != n]
    allowed = SETTINGS | {"n_inner": [4 * found["n_embd"], None]}
    wrong += [f"{key} is {asked[key]!r:.40}, and only {fine[0]!r} is built here"
              for key, fine in allowed.items() if asked.get(key, fine[0]) not in fine]
    if wrong:
        raise UserError(f"{path}: {'; '.join(wrong)}")


def build(tensors, config, source):
    """Their tensors -> a GPT. UserError: names the tensors that are missing, unknown or misshapen."""
    with torch.device("meta"):  # no memory before every shape is known to be right
        gpt = GPT(config)
    pairs, meta = names(config.n_layer), gpt.state_dict()
    check_ours(meta, pairs)
    wrong = [f"{name} is missing" for name in pairs if name not in tensors]
    wrong += [f"{name[:80]!r} is unknown" for name in tensors if name not in pairs]
    for name in pairs.keys() & tensors.keys():
        tensor, shape = tensors[name], tuple(turned(name, meta[pairs[name]]).shape)
        if tuple(tensor.shape) != shape:
            wrong.append(f"{name} is {tuple(tensor.shape)} instead of {shape}")
        elif tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            wrong.append(f"{name} is {tensor.dtype}")
        elif not torch.isfinite(tensor).all():
            wrong.append(f"{name} holds numbers that are not finite")
    if wrong:
        raise UserError(f"{source} doesn't fit a GPT-2: {'; '.join(sorted(wrong))}")
    # copied: a view of the mapped file would be saved with the whole file
    state = {ours: turned(name, tensors[name]).to(torch.float32, copy=True)
             for name, ours in pairs.items()}
    gpt.load_state_dict(state | {"lm_head.weight": state["trunk.wte.weight"]}, assign=True)
    gpt.lm_head.weight = gpt.trunk.wte.weight  # assign has made two parameters of them
    return gpt.eval()


# ---- import ----

def locate(source):
    """A known name, a folder or a file -> the Path of the weights. UserError: none of these."""
    if source in KNOWN:
        return fetch(source)
    path = Path(source)
    if path.is_dir():
        there = [path / name for name in FILES if (path / name).is_file()]
        if not there:
            raise UserError(f"{source} has neither {' nor '.join(FILES)} in it")
        return there[0]
    if not path.is_file():
        raise UserError(f"{source} is no file or folder here, and no known name: {', '.join(KNOWN)}")
    if path.suffix not in (".safetensors", ".bin"):
        raise UserError(f"{source} is neither a .safetensors nor a .bin file")
    return path


def fetch(name):
    """Download what is not there yet; returns the Path of the weights. UserError: no network."""
    from data.download import download

    folder = Path(torch.hub.get_dir()) / "onetrunk" / name
    folder.mkdir(parents=True, exist_ok=True)
    otherwise = (f"give a folder that holds config.json and {FILES[0]} instead of the name: "
                 f"python hf.py import FOLDER out/{name}.pt")
    for file, check in (("config.json", lambda path: parse_json(path.read_bytes(), path)),
                        (FILES[0], read_safetensors)):
        download(URL.format(name, file), folder / file, check, otherwise)
    return folder / FILES[0]


def import_gpt2(source, out, spec="gpt2"):
    """Write the checkpoint `out` from a known name, folder or file. UserError: anything wrong with it."""
    tokenizer, out = get_tokenizer(spec), Path(out)
    if out.is_dir():
        raise UserError(f"{out} is a folder; give the checkpoint's name, as out/gpt2.pt")
    path = locate(source)
    tensors = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    tensors = plain_names(tensors, path)
    config = configure(tensors, path)
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(f"{path} has {config.vocab_size} tokens and the tokenizer {spec} "
                        f"{tokenizer.vocab_size}; choose another with --tokenizer")
    gpt = build(tensors, config, path)
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(out, gpt, tokenizer)
    print(f"{sum(p.numel() for p in gpt.parameters()) / 1e6:.1f} million weights saved in {out}")


# ---- export ----

def their_config(config, tokenizer, **more):
    """The config.json of a GPTConfig, as a dict."""
    return {"model_type": "gpt2", "vocab_size": config.vocab_size, "n_positions": config.block_size,
            "n_embd": config.d_model, "n_layer": config.n_layer, "n_head": config.n_head, "n_inner": None,
            "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "torch_dtype": "float32",
            "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": tokenizer.eos,
            "eos_token_id": tokenizer.eos, **more}


def their_weights(model):
    """{their name: tensor} of the trunk; a bias that we have not is there, and 0."""
    weights, pairs = model.state_dict(), names(model.config.n_layer)
    check_ours(weights, pairs)
    for ours in set(pairs.values()) - set(weights):
        weights[ours] = torch.zeros(len(weights[ours.removesuffix("bias") + "weight"]))
    return {"transformer." + name: turned(name, weights[ours]) for name, ours in pairs.items()}


def their_reward_model(rm, tokenizer, path):
    """(config, weights) for GPT2ForSequenceClassification; says what has no place there.

    The score is read at the rightmost token that is not the pad id. Our texts end in eos, which must
    be read, and every other id may stand in a text. So the pad is a new id, V, with an embedding of
    zeros: it is never looked at, for it only ever stands on the right of the text.
    """
    if rm.pool != "last":
        raise UserError(f'{path} reads a text by pool "{rm.pool}", and transformers has "last" only')
    V, weights = rm.config.vocab_size, their_weights(rm)
    weights["transformer.wte.weight"] = F.pad(weights["transformer.wte.weight"], (0, 0, 0, 1))
    weights["score.weight"] = rm.reward_head.weight.detach() / rm.scale
    constant = ((rm.reward_head.bias - rm.shift) / rm.scale).item()
    print(f"our score = transformers' score + {constant:.6f} (score_constant in config.json): its head has "
          f"no bias.\nPad on the right, with id {V}, which was added.")
    return their_config(rm.config, tokenizer, architectures=["GPT2ForSequenceClassification"],
                        id2label={"0": "score"}, label2id={"score": 0}, pad_token_id=V,
                        score_constant=constant) | {"vocab_size": V + 1}, weights


def their_tokenizer(tokenizer, pad_id):
    """{file name: text} for AutoTokenizer, of the gpt2 tokenizer; pad_id None: without a pad."""
    ranks = tokenizer.encoding._mergeable_ranks
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]  # in GPT-2 these spell themselves
    others = [byte for byte in range(256) if byte not in printed]
    letter = {byte: chr(byte) for byte in printed} | {byte: chr(256 + i) for i, byte in enumerate(others)}

    def spell(token):
        return "".join(letter[byte] for byte in token)

    special = {"<|endoftext|>": tokenizer.eos} | ({"<|pad|>": pad_id} if pad_id else {})
    merges = [" ".join(map(spell, halves(token, ranks))) for token in ranks if len(token) > 1]
    options = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "padding_side": "right",
               "clean_up_tokenization_spaces": False, "bos_token": "<|endoftext|>",
               "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "added_tokens_decoder":
               {str(i): {"content": text, "special": True} for text, i in special.items()}}
    options |= {"pad_token": "<|pad|>"} if pad_id else {}
    vocab = {spell(token): rank for token, rank in ranks.items()} | special
    return {"vocab.json": json.dumps(vocab), "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
            "tokenizer_config.json": json.dumps(options, indent=2)}


def halves(token, ranks):
    """The two tokens that BPE joins last on its way to `token`."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        joined = [ranks.get(a + b, math.inf) for a, b in zip(parts, parts[1:])]
        i = joined.index(min(joined))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def export(path, folder):
    """Write a checkpoint as a folder for transformers, whole or not at all. UserError: there already."""
    folder = Path(os.path.abspath(folder))
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} is there already and not empty; nothing is overwritten")
    kind, tokenizer = checkpoint.kind(path), checkpoint.load_tokenizer(path)
    if kind == "GPT":
        gpt = checkpoint.load(GPT, path)
        config = their_config(gpt.config, tokenizer, architectures=["GPT2LMHeadModel"])
        weights = their_weights(gpt)
    else:
        config, weights = their_reward_model(checkpoint.load(RewardModel, path), tokenizer, path)
    texts = {"config.json": json.dumps(config, indent=2)}
    if tokenizer.name == "gpt2":
        texts |= their_tokenizer(tokenizer, config.get("pad_token_id"))
    write_folder(folder, texts, weights)
    print(f"{', '.join(sorted([*texts, FILES[0]]))} written to {folder}")
    if tokenizer.name != "gpt2":
        print(f"No tokenizer files: texts must be encoded with this project's data/tokenizer.py, by the "
              f"tokenizer {tokenizer.name} of {path}.")


def write_folder(folder, texts, weights):
    """{file name: text} and {name: tensor} into a folder that is there whole or not at all."""
    beside = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    try:
        beside.mkdir(parents=True)
        for name, text in texts.items():
            (beside / name).write_text(text, encoding="utf-8")
        write_safetensors(beside / FILES[0], weights)
        if folder.exists():
            folder.rmdir()
        os.replace(beside, folder)
    except OSError as error:
        raise UserError(f"{folder} can't be written: {error.strerror}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


# ---- command line ----

def main(argv=None):
    """Read the command line and do it. UserError, OSError: the user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("import", help="their weights -> a checkpoint", allow_abbrev=False)
    sub.add_argument("source", help=f"{', '.join(KNOWN)}, or a folder, a .safetensors or a .bin file")
    sub.add_argument("out", help="the checkpoint, e.g. out/gpt2.pt")
    sub.add_argument("--tokenizer", default="gpt2", help='"gpt2", "bytes" or a BPE file (default gpt2)')
    sub = commands.add_parser("export", help="a checkpoint -> their folder", allow_abbrev=False)
    sub.add_argument("checkpoint", help="e.g. out/ppo.pt or out/rm.pt")
    sub.add_argument("folder", help="a new folder")
    args = parser.parse_args(argv)
    if args.command == "import":
        import_gpt2(args.source, args.out, args.tokenizer)
    else:
        export(args.checkpoint, args.folder)


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"hf.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
