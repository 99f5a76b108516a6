"""A pretend GPU: a device "gpu:0" on machines without one, that finds device mistakes and counts waits.

    with pretend_gpu() as seen:                   # in a test
        train_sft.main(Config(device="gpu:0"))
    seen["item", "clip_and_step"]                 # how often that function waited for a number
    python tests/pretend_gpu.py train_sft.py --device gpu:0      # a script by hand; -m tools.label: a module

Its tensors compute on the CPU, through PyTorch's place for foreign devices (PrivateUse1), so that autograd,
optimizers, modules and checkpoints treat them as a GPU's. Like CUDA it refuses to work together with tensors
and generators of the CPU, except for what CUDA takes, too: copies, an index, and numbers (tensors without
dimensions) in arithmetic. Nothing of the project knows of it.

It rounds as the CPU does, and says nothing of memory, of several devices, or of time.
"""
import runpy
import sys
from collections import Counter
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).resolve().parents[1]
DEVICE = "gpu:0"
COPIES = {"copy_", "_to_copy"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}  # take indices of the CPU
NUMBERS = INDEXED | {"masked_fill", "masked_fill_"}  # take numbers of the CPU, beside all arithmetic
WAITS = {"_local_scalar_dense": "item", "equal": "item", "nonzero": "nonzero", "masked_select": "nonzero",
         "_unique2": "nonzero"}  # the host must know a number, or the size of what comes out
SEEN = Counter()


class OnGPU(torch.Tensor):
    """A tensor of the pretend GPU; `held` has its numbers."""

    @staticmethod
    def __new__(cls, held):
        with torch.inference_mode(held.is_inference()):  # what is a view of an older tensor is not
            x = torch.Tensor._make_wrapper_subclass(
                cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(),
                dtype=held.dtype, device=torch.device(DEVICE))
        x.held = held
        return x

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return compute(op, *args, **(kwargs or {}))

    # what PyTorch does in C++ without asking the dispatcher

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, **_):
        raise TypeError(f"can't convert a {DEVICE} tensor to numpy: copy it to the CPU first")

    __array__ = numpy

    def data_ptr(self):
        return self.held.data_ptr()

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            memo[id(self)] = new = self.detach().clone().requires_grad_(self.requires_grad)
            new._is_param = isinstance(self, torch.nn.Parameter)
        return memo[id(self)]

    def __reduce_ex__(self, protocol):  # saved as what map_location="cpu" makes of a GPU's
        return self.detach().cpu().__reduce_ex__(protocol)

    def __format__(self, how):
        return format(self.item(), how) if self.dim() == 0 else repr(self)

    def __repr__(self, **_):
        return f"{self.held!r} on {DEVICE}"


def compute(op, *args, **kwargs):
    """What the dispatcher calls for an operation that reads or makes a tensor of this device."""
    if op._can_decompose():  # as to() and item(), of which autograd otherwise makes other operations
        return op.decompose(*args, **kwargs)
    name = op._schema.name.removeprefix("aten::")
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    to = kwargs.get("device")
    ends_on_cpu = to is not None and torch.device(to).type == "cpu"
    refuse_mixed(op, name, args, given)
    if what := wait(name, args, given, ends_on_cpu):
        SEEN[what, caller()] += 1
    ours = {id(x.held): x for x in given if isinstance(x, OnGPU)}
    args, kwargs = tree_map(lambda x: x.held if isinstance(x, OnGPU) else x, (args, kwargs))
    out = op(*args, **kwargs | ({} if to is None else {"device": "cpu"}))

    def wrap(x):
        """Written in place it is the tensor that it was."""
        if not isinstance(x, torch.Tensor) or ends_on_cpu or any(x is y for y in given):
            return x
        same = ours[id(x)] if id(x) in ours else OnGPU(x)
        assert same.shape == x.shape, f"{op} makes a tensor larger, which can't be pretended"
        return same

    return tree_map(wrap, out)


def refuse_mixed(op, name, args, given):
    """RuntimeError: a tensor of the CPU where CUDA takes none."""
    if name in COPIES or not any(isinstance(x, OnGPU) for x in given):
        return
    numbers = name in NUMBERS or torch.Tag.pointwise in op.tags
    written = [x for x, about in zip(args, op._schema.arguments, strict=False)
               if about.alias_info and about.alias_info.is_write]
    for x in [args[0], *args[2:3]] if name in INDEXED else given:
        alien = isinstance(x, torch.Tensor) and not isinstance(x, OnGPU)
        if alien and not (numbers and x.dim() == 0 and not any(x is y for y in written)):
            raise RuntimeError(f"{op}: expected all tensors to be on the same device, but found {DEVICE} and "
                               f"cpu, {tuple(x.shape)}")


def wait(name, args, given, ends_on_cpu):
    """What the host waits for: "item", "nonzero", a copy "down" or "up"; None: nothing."""
    if name in COPIES:  # copy_(to, from)
        down = ends_on_cpu if name == "_to_copy" else not isinstance(args[0], OnGPU)
        if isinstance(given[-1], OnGPU):
            return "down" if down else None
        return None if down else "up"
    if name in INDEXED:  # what an index of the CPU is copied for, and a mask counted for
        index = [x for x in args[1] if x is not None]
        return ("up" if not all(isinstance(x, OnGPU) for x in index) else
                "nonzero" if any(x.dtype == torch.bool for x in index) else None)
    return WAITS.get(name)


def caller():
    """The function of the project that this is for; "" where there is none, as in autograd's own thread."""
    frame, others = sys._getframe(2), (str(ROOT / "tests"), sys.prefix)  # an environment may lie in ROOT
    while frame:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if file.startswith(str(ROOT)) and not file.startswith(others) and not name.startswith("<"):
            return name
        frame = frame.f_back
    return ""


class AnyGenerator(type(torch.Generator)):
    def __instancecheck__(cls, x):
        return type.__instancecheck__(torch._C.Generator, x)


class Generator(torch._C.Generator, metaclass=AnyGenerator):
    """torch.Generator that may belong to the pretend GPU."""

    def __new__(cls, device="cpu"):
        generator = super().__new__(cls)
        generator.where = torch.device(device)
        return generator

    @property
    def device(self):
        return self.where


class OwnGenerators(TorchFunctionMode):
    """Inside, random numbers of a device are drawn from a generator of that device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if generator := kwargs.get("generator"):
            first = args[0].device if args and isinstance(args[0], torch.Tensor) else "cpu"
            wanted = torch.device(kwargs.get("device") or first).type
            if generator.device.type != wanted:
                raise RuntimeError(f"{function.__name__}: expected a generator of {wanted}, but found one of "
                                   f"{generator.device}")
        return function(*args, **kwargs)


def torch_gpu():
    """What PyTorch looks for in torch.gpu; random numbers without a generator are the CPU's."""
    return {"is_available": lambda: True, "is_initialized": lambda: True, "device_count": lambda: 1,
            "current_device": lambda: 0, "_is_in_bad_fork": lambda: False, "manual_seed_all": lambda _: None,
            "get_amp_supported_dtype": lambda: [torch.bfloat16], "device": lambda device: nullcontext(),
            "get_rng_state": lambda device=None: torch.get_rng_state(),
            "set_rng_state": lambda state, device=None: torch.set_rng_state(state)}


@cache
def register():
    """Tell PyTorch of the device, once a process."""
    from torch.utils import backend_registration  # its place for Python came with torch 2.10

    module = SimpleNamespace(**torch_gpu())
    backend_registration._setup_privateuseone_for_python_backend("gpu", module)
    everything, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    everything.fallback(compute, "PrivateUse1")
    at, arange = torch.ops.aten, torch.ops.aten.arange
    # torch.tensor asks for the first two by name; arange would make an empty tensor larger
    for op in (at._to_copy.default, at.copy_.default, arange.default, arange.start, arange.start_step):
        aten.impl(op, lambda *args, op=op, **kwargs: compute(op, *args, **kwargs), "PrivateUse1")
    return everything, aten  # they hold as long as these live


@contextmanager
def pretend_gpu():
    """Inside, "gpu:0" is a device. Gives the Counter of waits: (what, in which function of ours): times."""
    register()
    SEEN.clear()
    swap = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # so that tied weights stay tied in .to()
    with mock.patch.object(torch, "Generator", Generator), OwnGenerators():
        try:
            yield SEEN
        finally:
            torch.__future__.set_swap_module_params_on_conversion(swap)


if __name__ == "__main__":
    del sys.argv[0]
    sys.path[0] = str(ROOT)
    with pretend_gpu():
        if sys.argv[0] == "-m":
            del sys.argv[0]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
