"""The state of one part of a run (a model, an optimizer, a generator, plain numbers): read, checked, loaded.

A saved state is a file like any other: before anything of it is loaded, its types, ranges and shapes are
held against those of the run that is to continue.
"""
import itertools
import math

import torch


def get_state(part):
    if isinstance(part, dict):
        return part
    return part.get_state() if isinstance(part, torch.Generator) else part.state_dict()


def set_state(part, state):
    if isinstance(part, dict):
        part.update(state)
    else:
        (part.set_state if isinstance(part, torch.Generator) else part.load_state_dict)(state)


def check_state(part, state, name):
    """ValueError: `state` is not what get_state(part) can be."""
    if hasattr(part, "check_state"):
        part.check_state(state)
    elif isinstance(part, torch.optim.Optimizer):
        check_adam(part, state, name)
    elif isinstance(part, dict):
        check_plain(part, state, name)
    elif isinstance(part, (torch.nn.Module, torch.Generator)):
        check_like(get_state(part), state, name)


def check_like(ours, theirs, where):
    """ValueError unless both are alike: types, keys, lengths, shapes and dtypes; floats are finite."""
    kind = torch.Tensor if isinstance(ours, torch.Tensor) else type(ours)
    if type(theirs) is not kind:
        raise ValueError(f"{where} is a {type(theirs).__name__}, expected a {kind.__name__}")
    if isinstance(ours, dict):
        if ours.keys() != theirs.keys():
            raise ValueError(f"{where} has other keys")
        for key in ours:
            check_like(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, (list, tuple)):
        if len(ours) != len(theirs):
            raise ValueError(f"{where} has {len(theirs)} entries, expected {len(ours)}")
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            check_like(*pair, f"{where}[{i}]")
    elif isinstance(ours, torch.Tensor):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype or theirs.layout != torch.strided:
            raise ValueError(f"{where} is {theirs.dtype} {tuple(theirs.shape)}, expected {ours.dtype} "
                             f"{tuple(ours.shape)}")
        if theirs.is_floating_point() and not theirs.isfinite().all():
            raise ValueError(f"{where} holds non-finite numbers")
    elif isinstance(ours, float) and not math.isfinite(theirs):
        raise ValueError(f"{where} is {theirs}")


def check_adam(optimizer, state, name):
    """ValueError unless `state` is one of this AdamW, after some steps or none."""
    ours = optimizer.state_dict()
    if type(state) is not dict or state.keys() != ours.keys():
        raise ValueError(f"{name} is no optimizer state")
    check_like([group | {"lr": 0.0, "initial_lr": 0.0} for group in ours["param_groups"]],
               [group | {"lr": 0.0, "initial_lr": 0.0} for group in state["param_groups"]], name)
    if any(group["params"] != our["params"] or type(group["lr"]) is not float
           or not 0 <= group["lr"] < math.inf
           for group, our in zip(state["param_groups"], ours["param_groups"], strict=True)):
        raise ValueError(f"{name} has other parameters, or an impossible rate")
    shapes = [p for group in optimizer.param_groups for p in group["params"]]
    for i, moments in state["state"].items():
        if type(i) is not int or not 0 <= i < len(shapes):
            raise ValueError(f"{name} has a state for parameter {i!r:.20}")
        check_like({"step": torch.tensor(0.0), "exp_avg": shapes[i].detach().cpu(),
                    "exp_avg_sq": shapes[i].detach().cpu()}, moments, f"{name}.{i}")
        # steps may differ: a part that gets no gradient in a step, as an expert without tokens, takes none
        if moments["step"] < 1 or (moments["exp_avg_sq"] < 0).any():
            raise ValueError(f"{name}.{i} has taken no step, or has a negative variance")


def check_plain(ours, theirs, where):
    """ValueError unless `theirs` has the keys of a dict of numbers, None, and such dicts; all finite."""
    if type(theirs) is not dict or theirs.keys() != ours.keys():
        raise ValueError(f"{where} has other keys")
    for key, x in theirs.items():
        inner = list(itertools.chain(x, x.values())) if type(x) is dict else [x]
        for y in inner:
            if not (y is None or type(y) in (str, bool, int) or type(y) is float):
                raise ValueError(f"{where}.{key} is a {type(y).__name__}")  # which could print for ever
        if type(ours[key]) in (int, float) and not (type(x) in (int, float) and abs(x) < 1e300):
            raise ValueError(f"{where}.{key} is {x!r:.40}")
