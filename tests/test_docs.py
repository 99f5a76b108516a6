"""What README and docs/ name is there: tests, files, headings, flags."""
import re
import subprocess
import sys
from functools import cache

import pytest
from helpers import ROOT

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("[a-z]*/*.md"))]
PROGRAMS = ["train_sft.py", "train_rm.py", "ppo.py", "sample.py", "tests/mutate.py", "runs/damage.py",
            "runs/hacks.py", "runs/kills.py", "data.hh", "data.prepare", "data.reviews", "tools.bench",
            "tools.doctor", "tools.hf", "tools.label", "tools.plot", "tools.score"]
FOREIGN = {"--max-restarts", "--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint",
           "--shutdown-timeout", "--standalone",  # torchrun's
           "--rope-base", "--dataset"}  # of a patch, and of rewardbench


SAMPLE = re.compile(r"^  (SFT|PPO) \(score .*$", re.MULTILINE)  # what a model wrote


def mentioned(pattern, pages=PAGES):
    return [(path, match) for path in pages
            for match in re.findall(pattern, SAMPLE.sub("", path.read_text()))]


@cache
def headings(path):
    """As the addresses of GitHub's pages have them."""
    found = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in found}


def test_tests_that_are_named():
    named = mentioned(r"tests/(test_\w+\.py)::(\w+)")
    assert len(named) > 100
    source = {file: (ROOT / "tests" / file).read_text() for _, (file, _) in named}
    assert not [(file, name) for _, (file, name) in named if f"\ndef {name}(" not in source[file]]


def test_links():
    links = mentioned(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
    assert len(links) > 30
    for page, (file, heading) in links:
        to = page.parent / file if file else page
        assert to.exists(), f"{page}: {file}"
        assert not heading or heading in headings(to), f"{page}: {file}#{heading}"


@pytest.mark.slow
def test_flags():
    known = set(FOREIGN)
    for name in PROGRAMS:
        command = [name] if name.endswith(".py") else ["-m", name]
        done = subprocess.run([sys.executable, *command, "-h"], cwd=ROOT, capture_output=True, text=True)
        known |= set(re.findall(r"--[a-z][a-z0-9-]*", done.stdout))
    pages = [path for path in PAGES if path.parent.name != "hacks"]  # patches have flags of their own
    assert not {x for x in mentioned(r"(?<![\w-])(--[a-z][a-z0-9-]+)", pages) if x[1] not in known}
