"""Save and load checkpoints: writes are atomic; loading never executes code.

A checkpoint is {"kind", "config", "tokenizer", "weights", "pool", "probe", "chat"}: all that a later
script needs.
"""
import dataclasses
import filecmp
import json
import math
import os
import pickletools
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from data.files import UserError, atomic_file, check_archive
from data.tokenizer import from_spec
from lib.fast import plain
from lib.memory import exhausted
from model import GPT, GPTConfig, RewardModel, Trunk

# the only globals our pickles reference; torch's own allow-list includes some that can exhaust memory
NAMED = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch FloatStorage",
         "torch DoubleStorage", "torch HalfStorage", "torch BFloat16Storage", "torch ByteStorage",
         "torch LongStorage"}
# a pickle of ours holds names, a vocabulary, and a few numbers for each prompt; each operation can make an
# object of some 200 bytes
PICKLE_BYTES, PICKLE_OPERATIONS = 2**26, 10**6
PLAIN = ("BININT", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "LONG1", "NONE", "NEWTRUE",
         "NEWFALSE")  # operations that push a value which holds no other


def previous(path):
    return path.with_name(f"{path.stem}.prev{path.suffix}")


def keep_previous(path):
    """Move an earlier run's file to NAME.prev.EXT, one generation back, and say so."""
    if path.exists():
        try:
            os.replace(path, previous(path))
        except OSError as error:
            raise UserError(f"{path} can't be moved to {previous(path)} ({error.strerror})") from None
        print(f"{path} already exists; moved to {previous(path)}")


def write_lines(rows, file):
    """A JSON object a line."""
    file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def write(path, data, keep=None, save=None):
    """Atomic torch.save, or save(data, file). keep: an existing file is first moved to *.prev.*, "other" only
    if it differs or "any", None never. UserError: disk full."""
    try:
        with atomic_file(path) as file:
            (save or torch.save)(data, file)
            file.flush()
            if keep == "any" or keep and path.exists() and not filecmp.cmp(file.name, path, shallow=False):
                keep_previous(path)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError when the disk is full
        raise UserError(f"{path} could not be written ({getattr(error, 'strerror', 0) or 'disk full?'}); "
                        "earlier checkpoints are intact") from None


def save(path, model, tokenizer, keep=None):
    """Write a checkpoint that `load` and `load_tokenizer` read; keep: see `write`. UserError: weights are not
    finite, or `load` would not take the config."""
    check_finite(model, path)
    check_config(model.config)
    data = {"kind": type(model).__name__, "config": dataclasses.asdict(model.config),
            "tokenizer": tokenizer.spec(), "weights": model.state_dict(),
            "pool": model.pool if isinstance(model, RewardModel) else None, "probe": probe(model),
            "chat": getattr(model, "chat", None)}
    write(Path(path), data, keep)


def limits(field):
    """The smallest and the largest number that a field of a dataclass may be, see GPTConfig."""
    if field.type not in (int, float):
        return -math.inf, math.inf
    low = 1 if field.type is int else 1e-9
    if field.default is not None and field.default <= 0:
        low = -(2**31) if field.default < 0 else 0
    return field.metadata.get("limits", (low, 2**31))


def check_config(config):
    """UserError: a field has another type than it is declared with, or is outside its limits."""
    for field in dataclasses.fields(config):
        x, name = getattr(config, field.name), f"GPTConfig.{field.name}"
        if field.type not in (int, float, bool, str):
            raise UserError(f"{name} is declared as {field.type}; checkpoints hold int, float, bool and str")
        if type(x) is not field.type:
            raise UserError(f"{name} is {x!r:.40}, and declared as {field.type.__name__}")
        if field.type in (int, float) and not limits(field)[0] <= x <= limits(field)[1]:
            raise UserError(f"{name} is {x}, and must lie between {limits(field)[0]} and {limits(field)[1]}")


class NoInit(TorchFunctionMode):
    """Inside, torch.nn.init leaves tensors as they are."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


@contextmanager
def sizes_only():
    """Inside, a new network has sizes and no numbers. Random ones on the "meta" device would import torch's
    compiler: 2 s at each start, and an error where that has no folder to write to."""
    with torch.device("meta"), NoInit():
        yield


def new_gpt(config):
    """UserError: this model.py can't make such a network, or no checkpoint can hold its config."""
    check_config(config)
    try:
        return GPT(config)
    except ValueError as error:
        raise UserError(str(error)) from None


def check_finite(model, what):
    """UserError: a weight of the model is NaN or infinite."""
    for name, x in model.state_dict().items():
        if not torch.isfinite(x).all():
            raise UserError(f"{what}: {name} holds non-finite numbers; earlier checkpoints are intact")


@torch.inference_mode()
def probe(model):
    """What a model makes of a fixed text: up to 16 positions, (.., 8) logits or (.., 1) values, on the CPU.

    Weights of the same names and shapes can mean something else to other code, or with another n_head: then
    these numbers differ.
    """
    V, device = model.config.vocab_size, next(model.parameters()).device
    tokens = [(7 * t * t + 3) % V for t in range(min(16, model.config.block_size))]
    with plain(model):
        out = model(torch.tensor([tokens], device=device))[0].float().cpu()
    return out[:, None] if out.dim() == 1 else out[:, :8].clone()


def load(model_class, path, dropout=0.0):
    """A GPT or RewardModel (`model_class`) from its checkpoint, on the CPU, in eval mode.

    Dropout is a choice of the run, not of the checkpoint: 0 unless asked for. UserError: missing, corrupt,
    of another class, or its weights are not those of this model.py.
    """
    data = _read(path)
    if data["kind"] != model_class.__name__:
        raise UserError(f"{path} holds a {data['kind']}; expected a {model_class.__name__}")
    try:
        config = GPTConfig(**data["config"] | {"dropout": float(dropout)})
        check_config(config)
        if config.n_layer > len(data["weights"]):
            raise ValueError("its config has more layers than weights")
        with sizes_only():  # names and sizes are compared before anything is allocated
            _build(model_class, config, data["pool"]).load_state_dict(data["weights"], assign=True)
        model = _build(model_class, config, data["pool"])
        model.load_state_dict(data["weights"])
    except (RuntimeError, TypeError, ValueError, ArithmeticError, UserError) as error:
        why = str(error).splitlines()[:2][-1].strip()
        raise UserError(f"{path}: the weights do not fit this model.py ({why:.300})") from None
    check_finite(model, path)
    check_same(model, data, path)
    model.chat = data.get("chat")  # the share of demonstrations that were messages; None: nobody says
    return model.eval()


def check_same(model, data, path):
    """UserError: the model that was loaded does not compute what the one that was saved did."""
    there = data["weights"]  # a load_state_dict hook may add what an older model.py did not have
    tied = [name for name, x in model.state_dict().items() if not torch.equal(x, there.get(name, x))]
    if tied:
        raise UserError(f"{path}: {tied[0]} shares its weights with another layer in this model.py, but not "
                        "in the checkpoint")
    if data.get("probe") is not None and not agrees(model, data["probe"]):  # older ones have none
        raise UserError(f"{path} was saved by another model.py, or its config was changed: the same "
                        "weights give other outputs here")


def agrees(model, was):
    """Whether the model's `probe` is what it was, to the rounding of other devices and of TF32."""
    now = probe(model)
    fits = type(was) is torch.Tensor and now.shape == was.shape
    return fits and bool((now - was).abs().max() <= 5e-3 * was.abs().max())


def _build(model_class, config, pool):
    return GPT(config) if model_class is GPT else RewardModel(Trunk(config), pool)


def kind(path):
    """What a checkpoint holds: "GPT" or "RewardModel"."""
    return _read(path)["kind"]


def load_tokenizer(path):
    """The tokenizer that a checkpoint was trained with."""
    data = _read(path)
    try:
        tokenizer = from_spec(data["tokenizer"])
        rows = data["config"].get("vocab_size")
        if type(rows) is not int or tokenizer.vocab_size != rows:
            raise UserError(f"it has {tokenizer.vocab_size} tokens, and the network "
                            f"{str(rows)[:20] if type(rows) is int else 'does not say how many'}")
    except UserError as error:
        raise UserError(f"{path}: its tokenizer: {' '.join(str(error).split())[-300:]}") from None
    return tokenizer


def _read(path):
    maker = {"sft.pt": "train_sft.py", "rm.pt": "train_rm.py", "ppo.pt": "ppo.py"}.get(Path(path).name)
    if not Path(path).exists():
        began = maker and Path(path).with_suffix(".state.pt").exists()
        raise UserError(f"{path} is missing" + (f": `python {maker}` makes it, with the same --data and --out"
                                                + ", and --resume, as it had begun" * began if maker else ""))
    data = unpickle(path, {"kind", "config", "tokenizer", "pool", "weights"}, "checkpoint")
    try:
        if not isinstance(data["weights"], dict):  # dict() of a tensor would make one of each row
            raise ValueError
        weights, size = dict(data["weights"]), os.path.getsize(path)
        fine = data["kind"] in ("GPT", "RewardModel") and data["pool"] in (None, *RewardModel.POOLS) and all(
            type(name) is str and x.is_floating_point() for name, x in weights.items())
        # twice, for the head shares the embedding's numbers; strides of 0 could feign any size
        fine = fine and sum(x.nbytes for x in weights.values()) <= 2 * size and type(data["config"]) is dict
        was = data.get("probe")
        check_records(path, [*weights.values(), *([] if was is None else [was])])
        chat = data.get("chat")
        fine = fine and (chat is None or type(chat) is float and 0 <= chat <= 1)
        fine = fine and (was is None or was.is_floating_point() and was.dim() == 2 and was.nbytes <= size)
    except Exception:  # a foreign file can hold anything here
        fine = False
    if not fine:
        raise UserError(f"{path} is not an onetrunk checkpoint, or is corrupt")
    return data | {"weights": weights}


def check_records(path, tensors):
    """ValueError: a record of the archive is not as long as the tensor in it, which torch, when it maps the
    file, does not notice: it reads on into the next record."""
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    with zipfile.ZipFile(path) as file:
        there = [entry.file_size for entry in file.infolist() if "/data/" in entry.filename]
    if sorted(filter(None, held.values())) != sorted(filter(None, there)):
        raise ValueError("a record of another length")


def check_pickles(path, named=NAMED):
    """`check_archive`; then ValueError: the pickles in it would take too much memory or time, or reference
    other globals than `named`."""
    check_archive(path)
    with zipfile.ZipFile(path) as file:
        pickles = [entry for entry in file.infolist() if entry.filename.endswith(".pkl")]
        if not sum(entry.file_size for entry in pickles) <= PICKLE_BYTES:
            raise ValueError
        for entry in pickles:
            _check_pickle(file.read(entry), named)


def _check_pickle(data, named):
    """ValueError: other globals, too many operations, or a tuple that is used again and holds more than plain
    values: of tuples that hold the one before twice, 40 take for ever to hash."""
    values, before, nested, again = 0, None, False, set()
    for n, (operation, arg, _) in enumerate(pickletools.genops(data)):
        name = operation.name
        if n > PICKLE_OPERATIONS or name == "GLOBAL" and arg not in named or "GET" in name and arg in again:
            raise ValueError
        if "PUT" in name:  # what was just made gets the number `arg`
            again |= {arg} if nested else set()
            continue
        inside = {"TUPLE": before == "MARK", "TUPLE1": values > 0, "TUPLE2": values > 1, "TUPLE3": values > 2}
        nested = not inside.get(name, True)
        values, before = (values + 1, before) if name.startswith(PLAIN) else (0, name)


def unpickle(path, names, what, mmap=True):
    """The dict in a file of torch.save; it must have these names. No code in it is run.

    UserError: other content, corrupt, compressed, or referencing globals that `write` never wrote.
    """
    try:
        check_pickles(path)
        data = torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
        if not names <= data.keys():
            raise ValueError
        return data
    except (PermissionError, IsADirectoryError) as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    except Exception as error:  # a corrupt pickle can raise anything
        lack = ", or there is too little memory to read it" if exhausted(error) else ""
        raise UserError(f"{path} is not an onetrunk {what}, or is corrupt{lack}") from None
