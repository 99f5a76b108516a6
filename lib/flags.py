"""The command line: flags from a dataclass, numbers checked, a mistake told in one sentence; device."""
import argparse
import collections
import dataclasses
import inspect
import re
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from data.files import UserError
from lib import ranks
from lib.checkpoint import limits
from lib.fast import compiler_fault, keep_memory
from lib.memory import check_sizes, exhausted
from lib.output import make_harmless
from lib.threads import warn_if_busy


def bounded(default, low, high=2**31):
    """A flag's default, and the numbers that it may be. Without, they are those above 0; also 0 and those
    below where the default is such a one. A default of None is left to data/rules.py."""
    return dataclasses.field(default=default, metadata={"limits": (low, high)})


@dataclasses.dataclass
class Shared:
    """Flags that all training scripts share: each has a Config that is derived from this."""

    # run
    save_every: int = bounded(200, 0)  # steps between saved states, to resume from; 0: at the end only
    resume: bool = False  # continue from the last saved state
    seed: int = bounded(1, 0, 2**63 - 1)  # of new weights, order and samples
    device: str = "auto"  # "cuda", "mps", "cpu"
    bf16: bool = False  # the blocks' matrix products in bfloat16, but not in generation
    checkpoint_activations: bool = False  # less memory, a third more work: blocks are computed twice
    compile: bool = False  # torch.compile, in generation only on a GPU; needs a C++ compiler
    skip_bad: bool = False  # skip malformed lines and report how many
    val_fraction: float = bounded(0.0, 0, 0.5)  # held out of a training file that has no *_val.jsonl

    given = frozenset()  # names of the flags on the command line; no field


def cli(main, Config, legend=None):
    """Parse flags into Config and run main; report a user's mistake as one sentence, exit 1. legend: what -h
    ends with."""
    make_harmless()
    try:
        args = [re.sub(r"^-(?=[\d.]+e[+-]?\d+$)", " -", arg) for arg in sys.argv[1:]]  # -1e9 is no flag
        cfg = Config(**vars(flags(main, Config, legend).parse_args(args)))
    except KeyboardInterrupt:
        sys.exit(130)
    cfg.given = {arg[2:].partition("=")[0].replace("-", "_") for arg in sys.argv[1:] if arg.startswith("--")}
    keep_memory()
    with one_sentence(Path(sys.argv[0]).name, "Try a smaller --micro-batch or --checkpoint-activations; "
                      "`python -m tools.bench --plan` estimates what PPO needs"):
        check_numbers(cfg)
        check_pairs(cfg)
        if cfg.device in ("auto", "cuda"):
            ranks.own_gpu()
        check_sizes(cfg, (device := pick_device(cfg.device)).type)
        ranks.start(device)
        print(f"{Path(sys.argv[0]).name}: on {device}, {f'{ranks.COUNT} processes, ' * (ranks.COUNT > 1)}"
              f"threads: {torch.get_num_threads()}", flush=True)
        warn_if_busy(device)
        main(cfg)


@contextmanager
def one_sentence(name, remedy):
    """Inside, what the user can mend ends the program `name` with one sentence and exit code 1: a mistake,
    a file, too little memory (`remedy` says what to lower), a compiler. Anything else keeps its traceback.
    Of several processes each names itself: it may be the only one."""
    try:
        yield
    except KeyboardInterrupt:  # before the first step, or pressed once more
        sys.exit(130)
    except Exception as error:
        name += f", process {ranks.RANK} of {ranks.COUNT}" * (ranks.COUNT > 1)
        if ranks.RANK and not isinstance(error, ranks.Gone):  # the first most likely says it, and ends all
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)
        if lack := exhausted(error):
            sys.exit(f"{name}: {lack} {remedy}")
        if isinstance(error, UserError) or isinstance(error, OSError) and not error.filename:
            sys.exit(f"{name}: {error}")
        if isinstance(error, OSError):
            sys.exit(f"{name}: {error.filename}: {error.strerror}")
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            sys.exit(f"{name}: --compile: torch.compile failed ({compiler_fault(error)}); drop --compile")
        raise


def flags(main, Config, legend=None):
    """The parser: a flag for each field of Config, its comment as help; a comment line is a heading. Where
    Config only changes a default, heading and help are those of the class it is derived from."""
    parser = argparse.ArgumentParser(description=sys.modules[main.__module__].__doc__, allow_abbrev=False,
                                     epilog=legend, formatter_class=argparse.RawDescriptionHelpFormatter)
    fields, group, groups = {field.name: field for field in dataclasses.fields(Config)}, parser, {"": parser}
    source = "\n    # \n".join(inspect.getsource(c) for c in Config.__mro__ if dataclasses.is_dataclass(c))
    found = re.findall(r"^    (?:# (.*)|(\w+): .*?(?:# *(.*))?)$", source, re.M)
    for heading, name, note in [*found, *(("", name, "no comment") for name in fields)]:
        if not name:
            group = groups[heading] = groups.get(heading) or parser.add_argument_group(heading)
        elif note and (field := fields.pop(name, None)):
            how = {"type": field.type}
            if field.type is bool:
                how = {"action": argparse.BooleanOptionalAction if field.default else "store_true"}
            default = "by the data" if field.default is None else repr(field.default)
            help = f"{note} (default {default})".replace("%", "%%")
            group.add_argument("--" + name.replace("_", "-"), default=field.default, help=help, **how)
    return parser


def check_numbers(cfg):
    """UserError: a number of the command line is nan or outside the limits of its field."""
    for field in dataclasses.fields(cfg):
        x, (low, high) = getattr(cfg, field.name), limits(field)
        if type(x) in (int, float) and not low <= x <= high:
            raise UserError(f"--{field.name.replace('_', '-')} {x} must lie between {low} and {high}")


def check_pairs(cfg):
    """UserError: flags that are valid alone but can't work together, or would silently do nothing."""
    x = {field.name: field.default for field in dataclasses.fields(cfg)}
    changed = {name for name, default in x.items() if getattr(cfg, name) != default} | cfg.given
    x = collections.defaultdict(float, vars(cfg))
    wrong = {
        "--kl-coef must be at least 1e-9 with --kl-target, which changes it by a factor":
            x["kl_target"] and x["kl_coef"] < 1e-9,
        "--kl-budget does nothing with --kl-target, which takes its place":
            "kl_budget" in changed and x["kl_target"] and x["kl_budget"],
        "--kl-budget does nothing with --kl-coef 0, which it raises by a factor":
            "kl_budget" in cfg.given and x["kl_budget"] and not x["kl_coef"],
        "--kl-horizon does nothing without --kl-target": "kl_horizon" in changed and not x["kl_target"],
        "--reward-scale does nothing without --reward": "reward_scale" in changed and not x["reward"],
        f"--reward-scale {x['reward_scale']}: expected first or none":
            x["reward"] and x["reward_scale"] not in ("first", "none"),
        f"--keep {x['keep']}: expected best or last": x["keep"] not in (0.0, "best", "last"),
        "--rm does nothing with --reward": x["rm"] and x["reward"],
        "--minibatches must not exceed --batch": x["minibatches"] > x["batch"],
        "--d-model must be a multiple of --n-head":
            x["n_head"] and not x["init"] and x["d_model"] % x["n_head"],
        "--lr times --weight-decay must stay below 1: each step takes that share off every matrix":
            (x["lr"] or 0) * x["weight_decay"] >= 1,
        "--vocab-size is for the BPE that is trained here; remove it, or --tokenizer":
            "vocab_size" in changed and x["tokenizer"],
    }
    for sentence, so in wrong.items():
        if so:
            raise UserError(sentence)


def pick_device(name):
    """"auto" is a GPU where there is one, then Apple's MPS, then the CPU. UserError: not available."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError):
        raise UserError(f"--device {name}: not available on this machine") from None
    if name.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # TF32; some CPUs would round as well
    return torch.device(name)
