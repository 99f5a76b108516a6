"""Checkpoints: written whole or not at all, read without running any code in them.

A checkpoint is {"kind", "config", "tokenizer", "weights", "pool"}: all that a later script needs.
"""
import dataclasses
import filecmp
import os
import pickletools
import zipfile
from pathlib import Path

import torch

from data.records import UserError
from data.tokenizer import from_spec
from model import GPT, GPTConfig, RewardModel, Trunk

# every class and function that our files name; torch's own list of safe ones has some that eat memory
NAMED = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch FloatStorage",
         "torch DoubleStorage", "torch HalfStorage", "torch BFloat16Storage", "torch ByteStorage",
         "torch LongStorage"}


def previous(path):
    return path.with_name(f"{path.stem}.prev{path.suffix}")


def keep_previous(path):
    """Move an earlier run's file to NAME.prev.EXT, one generation back, and say so."""
    if path.exists():
        os.replace(path, previous(path))
        print(f"{path} is there already: kept as {previous(path)}")


def write(path, data, keep=False):
    """torch.save, but `path` is there whole or not at all; `keep` an earlier file as *.prev.*"""
    beside = path.with_name(path.name + ".part")
    try:
        with open(beside, "wb") as file:
            torch.save(data, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch says RuntimeError when the disk is full
        beside.unlink(missing_ok=True)
        raise UserError(f"{path} could not be written ({getattr(error, 'strerror', 0) or 'disk full?'}); "
                        "what was saved before is kept") from None
    if keep and not (previous(path).exists() and path.exists() and filecmp.cmp(beside, path, shallow=False)):
        keep_previous(path)  # not the same result once more, as after a kill between save and finish
    os.replace(beside, path)


def save(path, model, tokenizer):
    """Write a checkpoint that `load` and `load_tokenizer` read."""
    data = {"kind": type(model).__name__, "config": dataclasses.asdict(model.config),
            "tokenizer": tokenizer.spec(), "weights": model.state_dict(),
            "pool": model.pool if isinstance(model, RewardModel) else None}
    write(Path(path), data, keep=True)


def load(model_class, path, dropout=0.0):
    """A GPT or RewardModel (`model_class`) from its checkpoint, on the CPU, in eval mode.

    Dropout is a choice of the run, not of the checkpoint: 0 unless asked for.
    """
    data = _read(path)
    if data["kind"] != model_class.__name__:
        raise UserError(f"{path} holds a {data['kind']}, and a {model_class.__name__} is needed here")
    try:
        fields, types = {**data["config"], "dropout": float(dropout)}, GPTConfig.__annotations__
        if not all(type(x) is types.get(name) and 0 <= x < 2**31 for name, x in fields.items()
                   ) or fields.get("n_layer", 1) > len(data["weights"]):
            raise ValueError("its config is unknown here, or impossible")
        config = GPTConfig(**fields)
        build = lambda: GPT(config) if model_class is GPT else RewardModel(Trunk(config), data["pool"])
        with torch.device("meta"):  # names and sizes are compared before anything is allocated
            build().load_state_dict(data["weights"], assign=True)
        model = build()
        model.load_state_dict(data["weights"])
    except (RuntimeError, TypeError, ValueError, ArithmeticError) as error:
        why = str(error).splitlines()[:2][-1].strip()
        raise UserError(f"{path}: the weights do not fit this model.py ({why:.300})") from None
    for name, x in model.state_dict().items():
        if not torch.isfinite(x).all():
            raise UserError(f"{path}: {name} holds numbers that are not finite")
    return model.eval()


def kind(path):
    """What a checkpoint holds: "GPT" or "RewardModel"."""
    return _read(path)["kind"]


def load_tokenizer(path):
    """The tokenizer that a checkpoint was trained with."""
    spec = _read(path)["tokenizer"]
    try:
        return from_spec(spec)
    except UserError as error:
        raise UserError(f"{path}: its tokenizer: {' '.join(str(error).split())[-300:]}") from None


def _read(path):
    maker = {"sft.pt": "train_sft.py", "rm.pt": "train_rm.py", "ppo.pt": "ppo.py"}.get(Path(path).name)
    if not Path(path).exists():
        raise UserError(f"{path} is missing" + (f": `python {maker}` makes it" if maker else ""))
    data = unpickle(path, {"kind", "config", "tokenizer", "pool", "weights"}, "checkpoint")
    try:
        weights, size = dict(data["weights"]), os.path.getsize(path)
        fine = data["kind"] in ("GPT", "RewardModel") and data["pool"] in (None, *RewardModel.POOLS) and all(
            type(name) is str and x.is_floating_point() for name, x in weights.items())
        # twice, for the head shares the embedding's numbers; strides of 0 could feign any size
        fine = fine and sum(x.nbytes for x in weights.values()) <= 2 * size
    except Exception:  # what stands there can be anything
        fine = False
    if not fine:
        raise UserError(f"{path} is no checkpoint of onetrunk, or is damaged")
    return data | {"weights": weights}


def unpickle(path, names, what, mmap=True):
    """The dict in a file of torch.save; it must have these names. No code in it is run. UserError: other
    content, damaged, packed, or naming what `write` never wrote."""
    try:
        with zipfile.ZipFile(path) as file:
            entries = file.infolist()
            # torch.save never packs: what unpacks to more than the file is there to fill the memory
            fine = sum(entry.file_size for entry in entries) <= os.path.getsize(path) and NAMED >= {
                arg for entry in entries if entry.filename.endswith(".pkl")
                for op, arg, _ in pickletools.genops(file.read(entry)) if op.name == "GLOBAL"}
        data = fine and torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
        if not names <= data.keys():
            raise ValueError
        return data
    except (PermissionError, IsADirectoryError) as error:
        raise UserError(f"{path} can't be read: {error.strerror}")
    except Exception:  # a damaged pickle can raise anything
        raise UserError(f"{path} is no {what} of onetrunk, or is damaged") from None
