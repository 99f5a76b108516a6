"""Memory: what a run needs at least, counted before anything is allocated, and what this machine has.

All counts are of float32 and leave out what is small or freed at once, so what they refuse can't work; only
`ulimit -v` gets a margin.
"""
import functools
import math
import os
from pathlib import Path

import torch

from data.files import UserError

FLOAT = 4  # bytes
LIBRARIES = 2**27  # under ulimit -v: some, oneDNN among them, crash where an allocation of theirs fails
WORDS = ("bad_alloc", "Cannot allocate memory", "not enough memory")  # how C++ and the system say it
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # a container's


@functools.cache
def machine_memory(kind):
    """Bytes that this process can have at most on a device of this kind (infinite where nobody says), and
    how to say so."""
    if kind == "cuda":
        return torch.cuda.get_device_properties("cuda").total_memory, "this GPU has"
    if not hasattr(os, "sysconf"):  # Windows
        return math.inf, ""
    container = [(int(text), "this container has") for path in LIMITS if (text := _read(path)).isdigit()]
    return min((os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "this machine has"),
               (address_space(), "beside the libraries `ulimit -v` leaves"), *container)


def address_space():
    """Bytes that `ulimit -v` leaves this process, less what the libraries take; infinite without a limit."""
    try:
        import resource
    except ImportError:  # Windows
        return math.inf
    limit, pages = resource.getrlimit(resource.RLIMIT_AS)[0], _read("/proc/self/statm").split() or ["0"]
    if limit == resource.RLIM_INFINITY:
        return math.inf
    return max(0, limit - int(pages[0]) * resource.getpagesize() - LIBRARIES)


def _read(path):
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def check_fits(what, needed, kind, lower):
    """UserError: `what` takes more bytes than the machine has; `lower` says which flags to lower."""
    there, says = machine_memory(kind)
    if needed > there:
        raise UserError(f"{what} would take {size(needed)}, and {says} {size(there)}; lower {lower}")


def size(n):
    """Bytes for people."""
    return f"{n / 1e6:.3g} MB" if n < 1e9 else f"{n / 1e9:.3g} GB"


def parameters(V, T, L, C):
    """How many a GPT has, by part, under the flag that decides most: vocabulary V, block size T, L layers
    of width C."""
    return {"--vocab-size or --d-model": V * C, "--block-size or --d-model": T * C,
            "--n-layer or --d-model": L * (12 * C * C + 13 * C) + 2 * C}


def check_sizes(cfg, kind):
    """UserError: the flags ask for a network or a rollout that this machine can't hold, whatever the data."""
    x = vars(cfg)
    if {"vocab_size", "block_size", "n_layer", "d_model"} <= x.keys() and not x.get("init"):
        parts = parameters(x["vocab_size"] or 0, x["block_size"] or 0, x["n_layer"], x["d_model"])
        n = sum(parts.values())
        lower, what = max(parts, key=parts.get), f"a network of {n:.3g} parameters"
        check_fits(what, n * FLOAT, "cpu", lower)  # where it is made
        check_fits(f"training {what}", 4 * n * FLOAT, kind, lower)  # with gradients and AdamW's two moments
    if {"batch", "max_new_tokens"} <= x.keys():  # a token, its mask and seven numbers
        tokens = x["batch"] * (x["max_new_tokens"] or 1)
        check_fits(f"a rollout of {tokens:.3g} tokens", tokens * (9 + 7 * FLOAT), kind,
                   "--batch or --max-new-tokens")


def check_generation(config, B, P, S, kind):
    """UserError: B prompts of P tokens, continued up to S, exceed the memory: the keys and values of all, and
    the larger of what one block makes of the prompts and of the sampler's logits."""
    C = config.d_model
    numbers = 2 * config.n_layer * B * S * C + max(12 * C * B * P, 3 * B * config.vocab_size)
    check_fits(f"generating {B} texts of {S} tokens at once", numbers * FLOAT, kind,
               "their number (--batch, --n, --best-of) or --max-new-tokens")


def check_training(config, tokens, cfg, kind):
    """UserError: training on so many tokens at a time exceeds the memory: weights, gradients and AdamW's two
    moments, and what a block keeps for its backward pass.

    That is 16C numbers a token (tools/bench_plan.py counts them), or C with --checkpoint-activations. Tokens
    that are split (data/bpe_dropout.py) may be twice as many, though never above --micro-batch.
    """
    if getattr(cfg, "bpe_dropout", 0):
        tokens = min(2 * tokens, cfg.micro_batch)
    n = sum(parameters(config.vocab_size, config.block_size, config.n_layer, config.d_model).values())
    kept = config.n_layer * (1 if cfg.checkpoint_activations else 16) * config.d_model
    needed = 4 * n * FLOAT + tokens * kept * (2 if cfg.bf16 else FLOAT)
    check_fits(f"training on {tokens} tokens at a time", needed, kind, "--micro-batch")


def exhausted(error):
    """What an error says of memory that was not there, in one line; None for any other error."""
    text = " ".join(str(error).split())
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return str(error).splitlines()[0][:200]
    if "DefaultCPUAllocator" in text:
        wanted = [int(word) for word in text.split() if word.isdigit()]
        return "out of memory" + (f", at a tensor of {size(max(wanted))}." if wanted else ".")
    if isinstance(error, MemoryError) or any(words in text for words in WORDS):
        return "out of memory."
    if isinstance(error, SystemError) or "could not create a primitive" in text:  # C code, without a reason
        return "out of memory." if address_space() < math.inf else None
    return None
