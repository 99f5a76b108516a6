"""Several processes, one run: `torchrun --nproc-per-node N SCRIPT.py ...`, each with a GPU or some cores.

All hold all data and models, take the same steps and draw random numbers for all rows; each computes its
share of a batch, and sums make it whole: N give the numbers of one, to rounding. The first prints and saves.
"""
import os
import sys
from contextlib import contextmanager

import torch
from torch import distributed as dist

from data.files import UserError

COUNT, RANK = 1, 0  # how many processes, and which of them this is


class Gone(UserError):
    """Another process of this run has ended."""


def own_gpu():
    """Of several GPUs this process's own becomes "cuda", before anything is put on another."""
    if 0 < int(os.environ.get("LOCAL_RANK", 0)) < torch.cuda.device_count():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def start(device):
    """Join the others, if torchrun started any; all but the first fall silent. UserError: a wrong device."""
    global COUNT, RANK
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["WORLD_SIZE"] == "1":
        return
    COUNT, RANK = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    own = str(device) == "cuda" and int(os.environ["LOCAL_RANK"]) < torch.cuda.device_count()
    if device.type != "cpu" and not own:
        raise UserError(f"--device {device}: each process needs --device cpu, or cuda and a GPU of its own")
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    sys.stdout = open(os.devnull, "w") if RANK else sys.stdout


def total(x, op="SUM"):
    """The sum over the processes, or the "MAX", of a number or tensor. Gone: one of them has ended."""
    if COUNT == 1:
        return x
    made = x.clone() if torch.is_tensor(x) else torch.tensor(x, dtype=torch.float64)
    try:
        dist.all_reduce(made, getattr(dist.ReduceOp, op))
    except RuntimeError as error:
        raise Gone(f"another process of this run has ended ({str(error).splitlines()[0]:.80})") from None
    return made if torch.is_tensor(x) else made.item()


def share(tokens):
    """Indices of this process's rows, given the tokens in each: long and short ones are dealt out alike."""
    order = sorted(range(len(tokens)), key=tokens.__getitem__, reverse=True)
    return sorted(order[RANK :: 2 * COUNT] + order[2 * COUNT - 1 - RANK :: 2 * COUNT])


def together(function, tokens):
    """function(rows) -> tensors with a row for each; returned for all rows, which have `tokens` (B,) each.
    Where there are fewer rows than processes, each computes all."""
    if not 1 < COUNT <= len(tokens):
        return function(slice(None))
    rows = torch.tensor(share(tokens.tolist()), device=tokens.device)
    return [total(x.new_zeros(tokens.shape + x.shape[1:]).index_copy_(0, rows, x)) for x in function(rows)]


def add_gradients(model):
    """Sum the gradients over the processes in one message. A parameter without any anywhere keeps none."""
    if COUNT == 1:
        return
    params = [p for p in model.parameters() if p.requires_grad]
    parts = [torch.tensor([float(p.grad is not None) for p in params], device=params[0].device),
             *(torch.zeros_like(p) if p.grad is None else p.grad for p in params)]
    there, *grads = total(torch.cat([x.flatten() for x in parts])).split([x.numel() for x in parts])
    for p, grad, n in zip(params, grads, there.tolist(), strict=True):
        p.grad = grad.view_as(p) if n else None


@contextmanager
def first_goes_ahead():
    """When all are here the first process does what is inside, and then the others do."""
    total(0)
    if RANK:
        total(0)
    yield
    if not RANK:
        total(0)
