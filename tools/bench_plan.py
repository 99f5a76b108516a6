"""How much memory a PPO update takes, counted from the shapes alone: `python bench.py --plan`.

Everything is float32. The peak is the largest of three moments, each beside the weights and the states
of AdamW: the rollout (cache and sampling), the backward pass of a micro-batch, the step of an optimizer.
`check` compares it with what a real update takes on the CPU.
"""
import functools
import os
import re
import subprocess
import sys

import torch
from common import UserError

from model import GPT, LOGITS_AT_ONCE, GPTConfig, RewardModel, Trunk

MODELS = {"demo": GPTConfig(1024, 128, 4, 4, 128), "30m": GPTConfig(50257, 128, 6, 6, 384),
          "gpt2": GPTConfig(), "gpt2-medium": GPTConfig(n_layer=24, n_head=16, d_model=1024),
          "gpt2-large": GPTConfig(n_layer=36, n_head=20, d_model=1280),
          "gpt2-xl": GPTConfig(n_layer=48, n_head=25, d_model=1600)}
FLOAT = 4  # bytes


@functools.cache
def parameters(config):
    """How many a GPT has, and a reward model: the real ones, built where nothing is allocated."""
    with torch.device("meta"):
        models = GPT(config), RewardModel(Trunk(config))
    return tuple(sum(p.numel() for p in model.parameters()) for model in models)


def saved_floats(config, checkpointed=False):
    """Numbers a token that a trunk keeps for its backward pass (a test counts them with autograd's hooks).

    In a block: the residual before either norm (2C) with its mean and 1/sd (4 numbers), what goes into
    qkv (C), q k v (3C), what attention gives, which goes into proj (C) with a log-sum a head (H), what
    goes into up (C), into GELU (4C) and out of it into proj (4C): 16C + H + 4. After the blocks: the
    residual before ln_f (C + 2), and what goes into the head (C).
    Checkpointed, only each block's input is kept, and one block at a time is computed again.
    """
    C = config.d_model
    block = 16 * C + config.n_head + 4
    return (config.n_layer * C + block if checkpointed else config.n_layer * block) + 2 * C + 2


def count_bytes(config, batch, prompt, response, rows, checkpointed=False):
    """Bytes of everything, when `rows` of the `batch` texts go through the update at a time."""
    if prompt + response > config.block_size:
        raise UserError(f"prompt {prompt} + response {response} > block_size {config.block_size}")
    gpt, rm = (n * FLOAT for n in parameters(config))
    kept = {"policy": gpt, "critic": rm, "reference": gpt, "reward model": rm, "AdamW states": 2 * (gpt + rm)}
    V, L, C = config.vocab_size, config.n_layer, config.d_model
    part = {
        "gradients": gpt + rm, "KV cache": 2 * L * batch * (prompt + response) * C * FLOAT,
        "logits chunk": min(rows * response * V, max(V, LOGITS_AT_ONCE)) * FLOAT,
        "activations a token": saved_floats(config) * FLOAT,  # of the policy, then of the critic
        "activations a token, checkpointed": saved_floats(config, True) * FLOAT}
    # sampling: logits, their softmax, its sum; prefill: one block's q k v, MLP and residuals. The packed copy
    # of the weights is there on a CPU alone
    rollout = part["KV cache"] + 3 * batch * V * FLOAT + 12 * C * batch * prompt * FLOAT
    backward = backward_bytes(config, rows * (prompt + response), part["logits chunk"], checkpointed)
    # AdamW on a GPU works on all parameters of a model at once, with one more copy of them
    peak = sum(kept.values()) + max(rollout, part["gradients"] + max(backward, gpt))
    return kept | part | {"peak": peak}


def backward_bytes(config, tokens, logits, checkpointed):
    """Peak of the backward passes of a micro-batch, policy or critic, beside the gradients in .grad."""
    V, C = config.vocab_size, config.d_model
    acts = tokens * saved_floats(config, checkpointed) * FLOAT
    # both: the gradients in the last MLP, C + 4C + 4C. Before, the policy: log-probs and two gradients of a
    # chunk of logits, and two pieces of the gradient of the tied V x C before they are added to .grad
    return acts + max(9 * C * tokens * FLOAT, 3 * logits + 2 * V * C * FLOAT)


def largest(config, batch, prompt, response, memory, checkpointed=False):
    """The most texts that go through the update at a time within so many bytes; 0: not even one."""
    fits = lambda rows: count_bytes(config, batch, prompt, response, rows, checkpointed)["peak"] <= memory
    low, high = 0, batch
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def show(config, name, batch, prompt, response, micro_batch, memory):
    """Print the plan, and return it."""
    T = prompt + response
    rows = max(1, min(batch, micro_batch // T))
    numbers = count_bytes(config, batch, prompt, response, rows)
    print(f"PPO with {name}, {batch} x ({prompt} + {response}) tokens, {rows * T} of them at a time, float32")
    for what, size in numbers.items():
        unit = f"{size / 1e6:12.3f} MB" if "a token" in what else f"{size / 1e9:12.3f} GB"
        print(f"  {what:<36}{unit}")
    for how, checkpointed in (("as it is", False), ("with --checkpoint-activations", True)):
        most = largest(config, batch, prompt, response, memory * 1e9, checkpointed)
        print(f"  in {memory:g} GB, {how}: " + (f"--micro-batch {most * T} ({most} texts)" if most
              else f"not even one text of {T} tokens fits"))
        numbers[f"micro_batch {how}"] = most * T
    return numbers


def check(shapes, config_of, micro_batch):
    """Planned and measured peak of an update at each shape, in a process of its own."""
    # so that memory goes back when it is freed, as the plan counts: the process's peak is what is needed
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    bench, results = os.path.join(os.path.dirname(os.path.abspath(__file__)), "bench.py"), {}
    for name, shape in shapes.items():
        command = [sys.executable, bench, "--only", "memory", "--shape", name, "--device", "cpu",
                   "--micro-batch", str(micro_batch)]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        found = re.search(r"(\d+) bytes", done.stdout)
        if not found:
            raise UserError(f"{' '.join(command)} failed: {(done.stderr.splitlines() or ['no word'])[-1]}")
        rows = max(1, min(shape.batch, micro_batch // (shape.prompt + shape.response)))
        planned = count_bytes(config_of(shape), shape.batch, shape.prompt, shape.response, rows)["peak"]
        results[name] = {"planned": planned, "measured": int(found[1]), "ratio": planned / int(found[1])}
        print(f"{name:<6} planned {planned / 1e6:8.1f} MB  measured {int(found[1]) / 1e6:8.1f} MB  "
              f"ratio {planned / int(found[1]):.2f}", flush=True)
    return results
