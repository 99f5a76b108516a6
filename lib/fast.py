"""How this machine multiplies: `prepare` puts it on a model from outside, so model.py holds plain layers.

On a CPU: matrix products by oneDNN where PyTorch's own choice is slow, large weights packed for generation,
freed memory kept. On request: bfloat16, recomputed blocks, torch.compile.
"""
import ctypes
import functools
import os
import platform
import re
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from data.files import UserError
from model import WholeText


def prepare(model, device="cpu", cfg=None):
    """Move a GPT or RewardModel to `device` and have it compute as this machine and the flags of `cfg` say.

    Returns it; parameters, their names, tied weights and what is frozen stay as they are. --bf16: the
    blocks' matrix products in bfloat16; residuals, norms, heads and generation stay float32.
    --checkpoint-activations: only each block's input is kept for the backward pass, which computes the
    block again (Chen et al. 2016). --compile: by torch.compile; on a GPU also the steps of `generate`, each
    as one CUDA graph. UserError: see `product`.
    """
    product()
    model.to(device)
    for layer in model.modules():
        if type(layer) is nn.Linear and layer.out_features > 1:  # a head of one number is no work
            layer.__class__ = Linear
    bf16, recompute = (cfg.bf16, cfg.checkpoint_activations) if cfg else (False, False)
    for block in model.trunk.blocks:
        if (bf16 or recompute) and not isinstance(block, Tuned):
            block.__class__ = type("Tuned" + type(block).__name__, (Tuned, type(block)), {})
        if isinstance(block, Tuned):  # now, or as the copy of one
            block.bf16, block.recompute = bf16, recompute
    if cfg and cfg.compile:
        check_compile(next(model.parameters()).device)
        model.trunk.compile(dynamic=True)  # lengths differ from batch to batch
    return model


@functools.cache
def check_compile(device):
    """UserError: torch.compile does not work on this machine: it can't even compile two lines."""
    def two_lines(x):
        y = (x + 0.5).sin()
        return y.sum() + y.cos()

    try:
        torch.compile(two_lines)(torch.ones(64, device=device))
    except Exception as error:  # a compiler fails in many ways
        raise UserError(f"--compile: torch.compile does not work on this machine ({compiler_fault(error)}); "
                        "drop --compile, or mend that") from None


def compiler_fault(error):
    """The line that tells most of what torch.compile raised."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    told = [line for line in lines if re.search(r"\berror: |No working C", line)]
    return (told or lines)[0][:200]


class Tuned:
    """A block whose forward pass, where there is no cache, is in bfloat16, or recomputed, or both."""

    def forward(self, x, seen, look):
        if not isinstance(seen, WholeText):
            return super().forward(x, seen, look)
        block = super().forward
        with torch.autocast(x.device.type, torch.bfloat16) if self.bf16 else nullcontext():
            if self.recompute and torch.is_grad_enabled():
                return checkpoint(block, x, seen, look, use_reentrant=False)
            return block(x, seen, look)


@contextmanager
def plain(model):
    """Inside this context the model computes as model.py says: in eval mode, no bfloat16, not compiled."""
    blocks = [block for block in model.trunk.blocks if isinstance(block, Tuned)]
    was, training = [block.bf16 for block in blocks], model.training
    compiled, model.trunk._compiled_call_impl = model.trunk._compiled_call_impl, None
    for block in blocks:
        block.bf16 = False
    try:
        yield model.eval()
    finally:
        for block, bf16 in zip(blocks, was, strict=True):
            block.bf16 = bf16
        model.trunk._compiled_call_impl = compiled
        model.train(training)


LOGITS_AT_ONCE = 2**23  # held in one piece by `in_pieces`: 32 MiB in float32


def in_pieces(function, gpt, h, *rest):
    """function(h, *rest) of N hidden states h (N,C) and as many rows of each of `rest` -> (N,...).

    It is called on pieces of them, and computed again in the backward pass, so that what it makes of
    `gpt`'s logits, say gpt.logps, never holds N x V of them. To rounding, the plain result.
    """
    n = max(1, LOGITS_AT_ONCE // gpt.config.vocab_size)
    if len(h) <= n:
        return function(h, *rest)
    pieces = zip(*(x.split(n) for x in (h, *rest)), strict=True)
    return torch.cat([checkpoint(function, *some, use_reentrant=False, preserve_rng_state=False)
                      for some in pieces])


def fixed_steps(gpt):
    """Whether `generate` takes steps of one shape at fixed addresses: compiled, on a GPU."""
    return gpt.trunk._compiled_call_impl is not None and gpt.lm_head.weight.is_cuda


# ---- matrix products on a CPU ----

# private operators, those that torch.compile itself emits: nn.Linear stays where they do not exist
ONEDNN = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight"))


def amd_family():
    """The family of an AMD CPU: 25 is Zen 3 and 4, 26 is Zen 5. 0: another CPU, or it does not say."""
    try:
        about = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:  # there is none but on Linux
        about = platform.processor()  # says it on Windows
    family = re.search(r"family\s*:?\s*(\d+)", about, re.IGNORECASE)
    return int(family[1]) if family and "AuthenticAMD" in about else 0


@functools.cache
def product():
    """What multiplies matrices on this CPU: "onednn" where MKL is half as fast, else "mkl", PyTorch's choice.

    The environment variable ONETRUNK_PRODUCT forces one. UserError: it is neither, or this PyTorch lacks it.
    """
    asked = os.environ.get("ONETRUNK_PRODUCT") or ("onednn" if ONEDNN and amd_family() >= 26 else "mkl")
    if asked not in ("mkl", "onednn"):
        raise UserError(f"ONETRUNK_PRODUCT={asked:.100}: expected mkl or onednn")
    if asked == "onednn" and not ONEDNN:
        raise UserError("ONETRUNK_PRODUCT=onednn: this PyTorch has no oneDNN that can be called; take mkl")
    return asked


def onednn(x, weight, bias=None):
    """x (...,C) @ weight (out,C) transposed + bias (out,) by oneDNN; no gradients."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class Product(torch.autograd.Function):
    """onednn(x, weight, bias) with gradients, x (N,C): three products of one kind."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return onednn(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        # oneDNN copies a transposed first operand: make it the narrower one
        dw = onednn(x.T, dy.T).T if x.shape[1] <= dy.shape[1] else onednn(dy.T, x.T)
        return onednn(dy, weight.T), dw, dy.sum(0) if ctx.needs_input_grad[2] else None


class Linear(nn.Linear):
    """nn.Linear, which multiplies with oneDNN where `product` says so.

    (1500 x 128) @ (128 x 512) with its gradients, GFLOP/s of 2 cores: 200 by MKL and 420 by oneDNN on Zen 5;
    260 and 220 on an Intel Xeon; oneDNN is 1.0 to 1.09 times as fast as MKL on Zen 4, 0.94 times on Zen 3.
    """

    packed = None  # see `packed`

    def forward(self, x):
        """x (...,C) -> (...,out)."""
        if torch.compiler.is_compiling():  # asked first: it can't look into the rest
            return super().forward(x)
        if self.packed is not None:
            return onednn(x, self.packed, self.bias)
        if product() == "mkl" or not onednn_takes(x) or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        rows = x.flatten(0, -2)  # (N,C)
        N = len(rows)
        if N % 128:  # oneDNN caches a kernel per N (1 GB with ragged batches), so round N up to 128
            rows = F.pad(rows, (0, 0, 0, -N % 128))
        return Product.apply(rows, self.weight, self.bias)[:N].unflatten(0, x.shape[:-1])


def onednn_takes(x):
    """Whether `onednn` can multiply this tensor: float32 on a CPU, and neither empty nor a single vector."""
    matrix = x.dtype == torch.float32 and x.dim() > 1 and x.numel() > 0
    return ONEDNN and matrix and x.device.type == "cpu"


@contextmanager
def packed(model, rows):
    """Inside this context each `Linear` that gains by it at `rows` rows uses weights prepacked for oneDNN.

    The copies cost as much memory again and are dropped afterwards. With `product` oneDNN, which pads few
    rows to 128, all gain: (16 x 768) @ (768 x 50257) takes 17 ms by MKL and 4 ms so on Zen 5. Else large ones
    do: up to 2^17 numbers nothing is gained on Intel, Zen 3 and Zen 4; above, a product takes two thirds of
    the time on Intel, that or less on Zen 4, and half to 9/10 on Zen 3 from 2^20 numbers on. A single row
    needs 2^22 numbers. docs/speed.md has a table.
    """
    def gains(n):
        return product() == "onednn" or n > 2**17 and rows * n >= 2**22

    layers = [x for x in model.modules() if isinstance(x, Linear) and onednn_takes(x.weight)
              and gains(x.weight.numel())]
    for layer in layers:
        layer.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight, 16)  # good for 1 to 1,000 rows
    try:
        yield
    finally:
        for layer in layers:
            layer.packed = None


def keep_memory():
    """Make glibc reuse freed blocks instead of returning them to the system, unless MALLOC_* is set.

    The system clears returned blocks page by page when they are wanted again: a third of the time of a PPO
    update at the 30m shape of tools/bench.py.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt(-4, 0)  # M_MMAP_MAX: no block outside of the heap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: so much may lie free at its end
