"""Is each wrong edit of model.py noticed, how soon, and in what words? The table of hacks/wrong/README.md:

    python runs/wrong_hacks.py > hacks/wrong/README.md
    python runs/wrong_hacks.py PATCH...          # other edits, from patches of the root folder

Each patch is applied to a copy of the project, where the self-check runs as the scripts run it, on new
models of train_sft.py's default size, then tests/test_model.py up to its first failure.
"""
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FORKS = multiprocessing.get_context("forkserver")  # it imports torch once, not once a patch
FORKS.set_forkserver_preload(["torch", "torch._dynamo", "pytest"])
TEXT = """# Wrong edits of model.py

Made by `python runs/wrong_hacks.py > hacks/wrong/README.md`. Apply one: `git apply hacks/wrong/NAME.patch`.
The self-check refuses each before the first step, and nothing is trained. Below: its sentence, the scripts
that say it, the seconds until then; the first test of `pytest tests/test_model.py -x` to fail, its seconds.
"""


def self_check(report):
    """What the scripts do before their first step."""
    import torch

    from data.files import UserError
    from lib.checks import check_model
    from lib.checks_rm import check_scores
    from lib.fast import prepare
    from model import GPT, GPTConfig, RewardModel

    torch.set_num_threads(1), torch.manual_seed(1)
    start, where, said = time.monotonic(), "all three scripts", "nothing"
    try:
        gpt = GPT(GPTConfig(vocab_size=1024, block_size=128, n_layer=4, n_head=4, d_model=128))
        check_model(prepare(gpt))
        where = "train_rm.py and ppo.py"
        for pool in RewardModel.POOLS:
            check_scores(prepare(RewardModel.from_gpt(gpt, pool)))
    except UserError as error:
        said = f"{error} ({where})".removeprefix("self-check: ")
    except Exception as error:
        said = f"{type(error).__name__}: {error} ({where})"
    report.write_text(json.dumps([said, time.monotonic() - start]))


def test_model(report):
    import pytest

    start = time.monotonic()
    pytest.main(["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-m", "not slow", "tests/test_model.py"])
    sys.stdout.flush()
    failed = re.findall(r"^(?:FAILED|ERROR) \S+?::(\w+)", Path("log").read_text(), re.M)
    report.write_text(json.dumps([*failed, "nothing"][:1] + [time.monotonic() - start]))


def work(folder, job, report):
    """In a process of its own, forked from one that has imported torch and nothing of the project."""
    os.chdir(folder)
    sys.path[:0] = [folder, folder + "/tests"]
    with open("log", "w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    job(report)
    os._exit(0)


def tried(patch, *jobs):
    """[[said, seconds], ...] of self_check and test_model, whichever are asked for."""
    with tempfile.TemporaryDirectory() as folder:
        copy, report, found = Path(folder) / "project", Path(folder) / "report", []
        others = ".git", "out", "__pycache__", "files", Path(sys.prefix).name  # an environment in the clone
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*others))
        subprocess.run(["git", "apply", Path(patch).resolve()], cwd=copy, check=True)
        for job in jobs:
            process = FORKS.Process(target=work, args=(str(copy), job, report))
            process.start()
            process.join()
            found.append(json.loads(report.read_text()))
        return found


def main(patches):
    print(TEXT + "\n| wrong edit | self-check | s | test_model.py | s |\n|---|---|---|---|---|")
    for patch in patches or sorted((ROOT / "hacks/wrong").glob("*.patch")):
        what = f"**{Path(patch).stem}**: {Path(patch).read_text().partition('--- ')[0].strip()}"
        (said, seconds), (test, longer) = tried(patch, self_check, test_model)
        print(f"| {what} | {said} | {seconds:.1f} | {test} | {longer:.0f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
