"""Does the suite notice bugs? One at a time is planted in a copy of the project, and the tests are run on it.

    python tests/mutate.py --sample 20 --seed 1         # 20 of all bugs; one that no test sees "survives"
    python tests/mutate.py --file ppo.py --jobs 4       # every bug of one file
    python tests/mutate.py --loops --fast               # only wrong arguments in the loops, only quick tests
    python tests/mutate.py --count                      # how many there are

The tests that use the file (FILES) run up to the first failure, quick ones first; a hang is a failure, too.
Before any bug, all of these tests must pass on a copy without one.
In the LOOPS arguments of calls are also swapped, dropped, or replaced by another of the same type (ALIKE).
Not touched: docstrings, defaults of the Configs, and what only prints (SKIP): no test could know better than
the text or the default. Survivors known to be harmless are in HARMLESS.
"""
import argparse
import ast
import copy
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORKS = multiprocessing.get_context("forkserver")  # it imports torch once, not once a bug
FORKS.set_forkserver_preload(["torch", "torch._dynamo", "pytest"])
FILES = {"ppo.py": "ppo checks pipeline rewards faults curve resume",
         "train_rm.py": "rm checks pipeline faults resume",
         "train_sft.py": "sft checks ppo pipeline faults resume",
         "model.py": "model rm gpt2 sft checks ppo pipeline",
         "lib/generate.py": "model rm checks ppo pipeline", "lib/fast.py": "model checks pipeline",
         "lib/report.py": "rm ppo checks pipeline rewards curve", "lib/rewards.py": "rewards rm ppo pipeline",
         "lib/checks.py": "checks", "lib/checks_rm.py": "checks", "tools/score.py": "score",
         "tools/plot.py": "plot", "tools/label.py": "label", "tools/tokens.py": "tokens",
         "tools/doctor.py": "doctor", "tools/doctor_files.py": "doctor",
         "tools/doctor_logs.py": "doctor", "tools/doctor_models.py": "doctor", "data/choices.py": "label",
         "data/split.py": "own_data", "data/lists.py": "prepare reviews", "data/rows.py": "prepare",
         "lib/common.py": "sft rm ppo checks pipeline resume",
         "lib/flags.py": "records pipeline rewards rough", "data/rules.py": "rules",
         "lib/start.py": "rules pipeline",
         "lib/curve.py": "curve", "lib/baselines.py": "baselines", "lib/threads.py": "rules",
         "data/examples.py": "sft rm ppo pipeline records faults"}
ONLY = {"lib/common.py": {"batches", "masked_mean", "micro_batches", "count_steps", "shuffled", "Cycle",
                          "set_lr", "clip_and_step", "finite"},  # the rest is the log
        "lib/flags.py": {"check_numbers", "check_pairs"}}
SKIP = {"Config", "GPTConfig", "report_pairs", "describe", "print_table", "print_sample",
        "warnings", "print"}
LOOPS = {"main", "improve", "evaluate"}
ALIKE = [group.split(", ") for group in (  # what has the same type in the LOOPS
    "rows, val_rows", "train, val", "prompts, val, demonstrations", "groups, val_groups", "before, after",
    "order, generator", "policy, critic", "models.policy, models.ref", "optimizers[0], optimizers[1]",
    "some, some_ptx", "loss, lr, norm, right", "step, steps, done", "update, cfg.updates",
    "cfg.lr, cfg.critic_lr", "cfg.batch_tokens, cfg.micro_batch", "cfg.batch, cfg.micro_batch",
    "cfg.epochs, cfg.minibatches", "now['kl_coef'], cfg.kl_coef", "cfg.kl_target, cfg.kl_coef",
    "stats['kl'], stats['update_kl']", "stats, step", "rollout, assess")]
HARMLESS = {  # "the line of the file: before -> after" of a bug that changes no behaviour: why
    "std = 0.02 * math.sqrt(768 / self.config.d_model): 768 -> 767": "random numbers 0.07% smaller",
    "std = 0.02 * math.sqrt(768 / self.config.d_model): 768 -> 769": "random numbers 0.07% larger",
    '{"update": cfg.updates, **means(after), **win_rates(after, before)}): cfg.updates -> update': "equal",
}
SWAPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
         ast.Pow: ast.Mult, ast.Mod: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
         ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
         ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
         ast.And: ast.Or, ast.Or: ast.And}
NAMES = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum", "cummax": "cummin",
         "expm1": "exp", "ones_like": "zeros_like", "zeros_like": "ones_like", "rsqrt": "sqrt",
         "softmax": "log_softmax", "logsigmoid": "sigmoid", "cumsum": "cumprod", "sum": "mean", "mean": "sum"}
LEFT_OUT = {"clone", "float", "clamp", "detach", "exp", "requires_grad_", "abs", "masked_fill",
            "masked_scatter"}
GRADIENT = {"no_grad", "inference_mode"}


def changed(node, **fields):
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def operators(node):
    if isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in SWAPS:
        yield changed(node, op=SWAPS[type(node.op)]())
    if (isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub))
            and not isinstance(node.left, ast.Constant)):
        yield node.left  # one side is left out
    if isinstance(node, ast.AugAssign) and type(node.op) in SWAPS:
        yield changed(node, op=SWAPS[type(node.op)]())
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        yield changed(node, ops=[SWAPS[type(node.ops[0])]()])
        if isinstance(node.ops[0], (ast.Lt, ast.Gt, ast.LtE, ast.GtE)):  # the other way round
            yield changed(node, left=node.comparators[0], comparators=[node.left])
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not, ast.Invert)):
        yield node.operand


def numbers(node):
    if isinstance(node, ast.Constant) and type(node.value) in (bool, int, float):
        x = node.value
        for value in ([not x] if type(x) is bool else [x + 1, x - 1] if type(x) is int
                      else [x * 1.1 or 0.1, x * 0.9 or -0.1]):
            yield ast.Constant(value)
    for side in ("lower", "upper") if isinstance(node, ast.Slice) else ():  # off by one, and left out
        if getattr(node, side) is not None:
            yield changed(node, **{side: ast.BinOp(getattr(node, side), ast.Add(), ast.Constant(1))})
            yield changed(node, **{side: None})


def calls(node):
    if isinstance(node, ast.Attribute) and node.attr in NAMES:
        yield changed(node, attr=NAMES[node.attr])
    if not isinstance(node, ast.Call):
        return
    method = isinstance(node.func, ast.Attribute)
    name = node.func.attr if method else getattr(node.func, "id", "")
    if isinstance(node.func, ast.Name) and name in NAMES:
        yield changed(node, func=ast.Name(NAMES[name], ast.Load()))
    if name == "where":  # the mask is dropped
        yield node.args[1]
    if name == "reversed" or name == "deepcopy" and method:
        yield node.args[0]
    elif method and name in LEFT_OUT:
        yield node.func.value
    for i, argument in enumerate(node.args):  # a mask of ones
        if isinstance(argument, ast.Name) and argument.id == "mask" and name != "where":
            ones = ast.parse("torch.ones_like(mask)", mode="eval").body
            yield changed(node, args=[*node.args[:i], ones, *node.args[i + 1 :]])


def statements(node):
    if isinstance(node, ast.IfExp):
        yield node.body
        yield node.orelse
    if isinstance(node, ast.FunctionDef):
        for i, decorator in enumerate(node.decorator_list):
            if any(name in ast.unparse(decorator) for name in GRADIENT):
                yield changed(node, decorator_list=node.decorator_list[:i] + node.decorator_list[i + 1 :])
    if isinstance(node, ast.With) and any(name in ast.unparse(node.items[0]) for name in GRADIENT):
        yield ast.If(ast.Constant(True), node.body, [])
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):  # a statement is left out
        yield ast.Pass()
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], (ast.Subscript, ast.Attribute)):
        yield ast.Pass()


def arguments(node, known):
    """Swapped, dropped, or replaced by another of the `known` expressions, those of the same function."""
    if isinstance(node, ast.Call):
        for i in range(len(node.args) - 1):
            yield changed(node, args=[*node.args[:i], node.args[i + 1], node.args[i], *node.args[i + 2 :]])
        if node.args:
            yield changed(node, args=node.args[:-1])
        for i in range(len(node.keywords)):
            yield changed(node, keywords=node.keywords[:i] + node.keywords[i + 1 :])
    elif isinstance(node, (ast.BinOp, ast.Constant)) or isinstance(getattr(node, "ctx", None), ast.Load):
        if isinstance(node, ast.BinOp) and isinstance(node.right, ast.Constant):
            yield node.left  # step - 1
        for other in {other for group in ALIKE if ast.unparse(node) in group for other in group} & known:
            if other != ast.unparse(node):
                yield ast.parse(other, mode="eval").body


def mutants_of(node, known, loops):
    """The changed node for every bug that can be planted at this very node."""
    for rule in () if loops else (operators, numbers, calls, statements):
        yield from rule(node)
    if known:
        yield from arguments(node, known)


def visit(node):
    """Every place at which a bug can be planted: (parent, field, index or None, node)."""
    for field, value in ast.iter_fields(node):
        for i, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            called = getattr(getattr(child, "value", child), "func", child)  # of a call or its statement
            name = getattr(child, "name", "") or getattr(called, "id", "")
            texts = (ast.JoinedStr, ast.Raise, ast.Import, ast.ImportFrom)
            if not isinstance(child, ast.AST) or name in SKIP or isinstance(child, texts):
                continue
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                continue  # a docstring
            if isinstance(child, ast.If) and all(
                    isinstance(x, ast.Expr) and "print(" in ast.unparse(x) for x in child.body):
                continue
            yield node, field, i, child
            yield from visit(child)


def mutants(file, loops):
    """[(place, what, file, source)] of all bugs in a file, or of the wrong arguments in its LOOPS."""
    lines, found = (ROOT / file).read_text().split("\n"), []
    tree = ast.parse("\n".join(lines))
    tops = [node for node in tree.body if file not in ONLY or getattr(node, "name", "") in ONLY[file]]
    code = ast.Module([node for node in tops if "__name__" not in ast.unparse(node)], [])
    known = {}  # of each node in the LOOPS: the texts of all expressions of its function
    for top in tops:
        if getattr(top, "name", "") in LOOPS:
            texts = {ast.unparse(x) for x in ast.walk(top) if isinstance(x, ast.expr)}
            known |= dict.fromkeys(ast.walk(top), texts)
    for parent, field, i, node in visit(code):
        holder, key = (vars(parent), field) if i is None else (getattr(parent, field), i)
        if isinstance(parent, ast.Module):
            holder, key = tree.body, tree.body.index(node)
        for new in list(mutants_of(node, known.get(node), loops)):
            before = ast.unparse(node).split("\n")[0]
            holder[key] = ast.fix_missing_locations(ast.copy_location(new, node))
            text = ast.unparse(tree)
            holder[key] = node
            after = "" if isinstance(node, ast.FunctionDef) else ast.unparse(new).split("\n")[0]
            if text != ast.unparse(tree):
                number = getattr(node, "lineno", getattr(parent, "lineno", 0))
                what = f"{lines[number - 1].strip()}: {before} -> {after}"
                found.append((f"{file}:{number}", what, file, text))
    return found


def test(folder, tests, log):
    """In a process of its own, forked from one that has imported torch: pytest, up to the first failure."""
    os.setsid()
    os.chdir(folder)
    sys.path.insert(0, folder)
    with open(log, "w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os._exit(int(pytest.main(["-x", "-q", "--tb=no", "-p", "no:cacheprovider", *tests])))


def run(sources, limit, fast):
    """"caught by ..." or "survived": the tests on a copy of the project with these {file: source}."""
    with tempfile.TemporaryDirectory() as folder:
        copy_to, log = Path(folder) / "project", Path(folder) / "log"
        others = ".git", "out", "__pycache__", "runs", ".pytest_cache", Path(sys.prefix).name
        shutil.copytree(ROOT, copy_to, ignore=shutil.ignore_patterns(*others))
        for file, source in sources.items():
            (copy_to / file).write_text(source)
        names = dict.fromkeys(" ".join(FILES[file] for file in sources).split())
        tests = [f"tests/test_{name}.py" for name in names]
        for which in ("not slow",) if fast else ("not slow", "slow"):
            process = FORKS.Process(target=test, args=(str(copy_to), [*tests, "-m", which], str(log)))
            process.start()
            process.join(limit)
            if process.is_alive():
                os.killpg(process.pid, signal.SIGKILL)
                process.join()
                return f"caught: no end after {limit} s"
            if process.exitcode not in (0, 5):  # 5: no such tests
                named = [x for x in log.read_text().splitlines() if x.startswith(("FAILED", "ERROR"))]
                return "caught by " + re.sub("^FAILED |^ERROR | - .*", "", [*named, "the import"][0])
    return "survived"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", choices=FILES, nargs="+", default=list(FILES), help="only these")
    parser.add_argument("--sample", type=int, default=0, help="so many at random instead of all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--jobs", type=int, default=1, help="so many at a time")
    parser.add_argument("--limit", type=int, default=600, help="seconds for the tests of one bug, twice")
    parser.add_argument("--fast", action="store_true", help="only the tests that are not marked slow")
    parser.add_argument("--loops", action="store_true", help="only wrong arguments in the loops")
    parser.add_argument("--count", action="store_true", help="only tell how many there are")
    args = parser.parse_args()
    every = [m for file in args.file for m in mutants(file, args.loops)]
    planted = [m for m in every if m[1] not in HARMLESS]
    for file in args.file:
        print(f"{file}: {sum(m[2] == file for m in every)} bugs", flush=True)
    if args.count:
        return
    if args.sample:
        planted = random.Random(args.seed).sample(planted, min(args.sample, len(planted)))
    files = sorted({file for _, _, file, _ in planted})
    same = {file: ast.unparse(ast.parse((ROOT / file).read_text())) for file in files}
    clean = run(same, args.limit, args.fast)
    if clean != "survived":
        raise SystemExit(f"without any bug: {clean}")
    start, alive = time.time(), []
    with ThreadPoolExecutor(args.jobs) as pool:
        ends = pool.map(lambda m: run({m[2]: m[3]}, args.limit, args.fast), planted)
        for mutant, end in zip(planted, ends, strict=True):
            print(f"{mutant[0]}  {mutant[1]}  {end}", flush=True)
            alive += [mutant] if end == "survived" else []
    print(f"\n{len(planted) - len(alive)} of {len(planted)} caught in {time.time() - start:.0f} s")
    for mutant in alive:
        print(f"survived  {mutant[0]}  {mutant[1]}")


if __name__ == "__main__":
    main()
