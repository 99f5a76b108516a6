"""How much memory a PPO update takes, counted from the shapes alone: `python -m tools.bench --plan`.

Everything is float32. Weights and AdamW's states are always held; the peak adds the largest of three
moments: the rollout (cache and sampling), the backward pass of a micro-batch, an optimizer step. `check`
compares it with the peak of a real update on the CPU.
"""
import dataclasses
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from data.files import UserError
from lib import fast
from model import GPT, GPTConfig, RewardModel, Trunk

ROOT = Path(__file__).resolve().parents[1]
BENCH = [sys.executable, "-m", "tools.bench"]  # in ROOT
SIZES = {"demo": (1024, 128, 4, 4, 128), "30m": (50257, 128, 6, 6, 384), "gpt2": (50257, 1024, 12, 12, 768),
         "gpt2-medium": (50257, 1024, 24, 16, 1024), "gpt2-large": (50257, 1024, 36, 20, 1280),
         "gpt2-xl": (50257, 1024, 48, 25, 1600)}
MODELS = {name: GPTConfig(vocab_size=V, block_size=T, n_layer=L, n_head=H, d_model=C)
          for name, (V, T, L, H, C) in SIZES.items()}
FLOAT = 4  # bytes


def parameters(config):
    """Numbers of parameters of a GPT and of a reward model, built without allocating anything."""
    return _parameters(tuple(dataclasses.asdict(config).items()))


@functools.cache
def _parameters(sizes):
    config = GPTConfig(**dict(sizes))
    with torch.device("meta"):
        models = GPT(config), RewardModel(Trunk(config))
    return tuple(sum(p.numel() for p in model.parameters()) for model in models)


def saved_floats(config, checkpointed=False):
    """Floats per token that a trunk saves for its backward pass (a test counts them with autograd's hooks).

    In a block: the inputs of both norms (2C) with their mean and 1/sd (4), the input of qkv (C), q, k and v
    (3C), attention's output (C), which is the input of proj, with a log-sum per head (H), and the inputs of
    up (C), GELU (4C) and the second proj (4C): 16C + H + 4. After the blocks: the input of ln_f (C + 2) and
    that of the head (C). Checkpointed, only each block's input is kept, and one block at a time is computed
    again.
    """
    C = config.d_model
    block = 16 * C + config.n_head + 4
    return (config.n_layer * C + block if checkpointed else config.n_layer * block) + 2 * C + 2


def count_bytes(config, batch, prompt, response, rows, checkpointed=False):
    """Bytes of everything held, and the peak; `rows` of the `batch` texts are in a micro-batch."""
    if prompt + response > config.block_size:
        raise UserError(f"--prompt {prompt} + --response {response} > block_size {config.block_size}")
    gpt, rm = (n * FLOAT for n in parameters(config))
    kept = {"policy": gpt, "critic": rm, "reference": gpt, "reward model": rm, "AdamW states": 2 * (gpt + rm)}
    V, L, C = config.vocab_size, config.n_layer, config.d_model
    part = {
        "gradients": gpt + rm, "KV cache": 2 * L * batch * (prompt + response) * C * FLOAT,
        "logits chunk": min(rows * response * V, max(V, fast.LOGITS_AT_ONCE)) * FLOAT,
        "activations per token": saved_floats(config) * FLOAT,  # of the policy, then of the critic
        "activations per token, checkpointed": saved_floats(config, True) * FLOAT}
    # sampling: logits, softmax and its cumulative sum; prefill: q, k, v, MLP and residuals of one block.
    # Weights packed for generation are not counted: only a CPU has them
    rollout = part["KV cache"] + 3 * batch * V * FLOAT + 12 * C * batch * prompt * FLOAT
    backward = backward_bytes(config, rows * (prompt + response), part["logits chunk"], checkpointed)
    # on a GPU AdamW updates all parameters of a model at once, and takes one more copy of them
    peak = sum(kept.values()) + max(rollout, part["gradients"] + max(backward, gpt))
    return kept | part | {"peak": peak}


def backward_bytes(config, tokens, logits, checkpointed):
    """Peak of a micro-batch's backward passes, policy or critic, without the gradients in .grad."""
    V, C = config.vocab_size, config.d_model
    acts = tokens * saved_floats(config, checkpointed) * FLOAT
    # both: the gradients in the last MLP, C + 4C + 4C. Before that, the policy: log-probs and two gradients
    # of a chunk of logits, and two parts of the gradient of the tied V x C weight before they reach .grad
    return acts + max(9 * C * tokens * FLOAT, 3 * logits + 2 * V * C * FLOAT)


def largest(config, batch, prompt, response, memory, checkpointed=False):
    """The most texts in a micro-batch that fit into `memory` bytes; 0: not even one."""
    low, high = 0, batch
    while low < high:
        middle = (low + high + 1) // 2
        fits = count_bytes(config, batch, prompt, response, middle, checkpointed)["peak"] <= memory
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def show(config, name, batch, prompt, response, micro_batch, memory):
    """Print the plan, and return it."""
    T = prompt + response
    rows = max(1, min(batch, micro_batch // T))
    numbers = count_bytes(config, batch, prompt, response, rows)
    print(f"PPO with {name}, {batch} x ({prompt} + {response}) tokens, {rows * T} in a micro-batch, float32")
    for what, size in numbers.items():
        unit = f"{size / 1e6:12.3f} MB" if "per token" in what else f"{size / 1e9:12.3f} GB"
        print(f"  {what:<36}{unit}")
    for how, checkpointed in (("by default", False), ("with --checkpoint-activations", True)):
        most = largest(config, batch, prompt, response, memory * 1e9, checkpointed)
        print(f"  in {memory:g} GB, {how}: " + (f"--micro-batch {most * T} ({most} texts)" if most
              else f"not even one text of {T} tokens fits"))
        numbers[f"micro_batch {how}"] = most * T
    return numbers


def check(shapes, config_of, micro_batch):
    """Print and return planned and measured peak of an update at each shape, each in its own process."""
    # freed memory goes back to the system at once, so that the process's peak is what an update needs
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    results = {}
    for name, shape in shapes.items():
        command = [*BENCH, "--only", "memory", "--shape", name, "--device", "cpu",
                   "--micro-batch", str(micro_batch)]
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
        found = re.search(r"(\d+) bytes", done.stdout)
        if not found:
            raise UserError(f"{' '.join(command)} failed: {(done.stderr.splitlines() or ['no output'])[-1]}")
        rows = max(1, min(shape.batch, micro_batch // (shape.prompt + shape.response)))
        planned = count_bytes(config_of(shape), shape.batch, shape.prompt, shape.response, rows)["peak"]
        results[name] = {"planned": planned, "measured": int(found[1]), "ratio": planned / int(found[1])}
        print(f"{name:<6} planned {planned / 1e6:8.1f} MB  measured {int(found[1]) / 1e6:8.1f} MB  "
              f"ratio {planned / int(found[1]):.2f}", flush=True)
    return results
