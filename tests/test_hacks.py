"""hacks/*.patch: each applies, keeps what the tests of the model and the self-checks ask for, and trains.

A patch is applied to a copy of the project, and everything runs there: in children of one process (this file,
run as a script) that has loaded torch but nothing of ours, for loading it takes longer than the tests.
"""
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PATCHES = {path.stem: path.read_text() for path in sorted((ROOT / "hacks").glob("*.patch"))}
# the worked examples of docs/hacking.md, and the settings that turn each on
EXAMPLES = {"attention_pool": {"rm": {"pool": "attention"}}, "entropy_bonus": {"ppo": {"entropy_coef": 0.1}},
            "score_sd": {}}
TEXTS = PATCHES | {path.stem: path.read_text() for path in (ROOT / "hacks/examples").glob("*.patch")}
MOST = {"llama": 45, "llama_hf": 80}  # lines added; others: 25
BASE = {"llama_hf": "llama"}  # applied first
OF_PPO = {"k3_loss", "shared_critic"}
ARCHITECTURES = sorted(PATCHES.keys() - OF_PPO - BASE.keys())

# pairs that git apply must refuse, for they change the same lines; all others apply on one another
REFUSED = {"alibi+rope", "alibi+window", "rope+window", "qknorm+rope", "lora+qknorm", "k3_loss+shared_critic",
           *(f"{name}+llama" for name in ("alibi", "gqa")),
           *(f"llama+{name}" for name in ("lora", "moe", "qknorm", "rmsnorm", "rope", "softcap",
                                          "swiglu", "window"))}
COMBINED = ["rope+gqa", "swiglu+moe", "rmsnorm+rope+swiglu+gqa", "alibi+gqa", "window+gqa+moe",
            "gqa+lora+mlp_head", "recurrent+rmsnorm+moe", "llama+untied+parallel"]

needs_git = pytest.mark.skipif(not shutil.which("git"), reason="git is not installed; it applies the patches")


def git_apply(folder, *names, check=False):
    """Apply patches in turn, or try; returns what git says, "" when they apply."""
    flags = ["--check"] if check else []
    alone = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}  # no repository around it counts
    done = subprocess.run(["git", "apply", *flags], cwd=folder, env=alone, text=True, capture_output=True,
                          input="".join(TEXTS[name] for name in names))
    return done.stderr if done.returncode else ""


def copy_project(folder):
    folder.mkdir()
    skip = shutil.ignore_patterns("__pycache__", "files")
    for name in ("data", "lib", "tools", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=skip)
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
        shutil.copy(path, folder)
    return folder


# ---- the patches as files ----

@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return copy_project(tmp_path_factory.mktemp("plain") / "copy")


def added(name):
    return sum(line.startswith("+") and not line.startswith("+++") for line in PATCHES[name].splitlines())


@needs_git
@pytest.mark.parametrize("name", PATCHES)
def test_a_patch_is_small_applies_and_has_its_line_in_the_readme(plain, name):
    assert added(name) <= MOST.get(name, 25)
    files = {"ppo.py" if name in OF_PPO else "model.py", *(["tools/hf.py"] if name in BASE else [])}
    assert set(re.findall(r"^\+\+\+ b/(.+)$", PATCHES[name], re.M)) == files
    assert git_apply(plain, *([BASE[name]] if name in BASE else []), name, check=True) == ""
    row = re.search(rf"^\| `{name}` \|.*$", (ROOT / "hacks/README.md").read_text(), re.M)
    assert row and f"| {added(name)} |" in row[0], "hacks/README.md has no such line, or another number"


@needs_git
def test_the_worked_examples_apply(plain):
    assert EXAMPLES.keys() == TEXTS.keys() - PATCHES.keys()
    text = (ROOT / "docs/hacking.md").read_text()
    for name in EXAMPLES:
        assert git_apply(plain, name, check=True) == "" and f"`{name}`" in text


@needs_git
def test_which_patches_apply_on_one_another(plain):
    for pair in itertools.combinations(sorted(PATCHES.keys() - BASE.keys()), 2):
        for order in (pair, pair[::-1]):
            assert bool(git_apply(plain, *order, check=True)) == ("+".join(pair) in REFUSED), order
    assert all("+".join(sorted(pair.split("+"))) == pair for pair in REFUSED)
    for names in COMBINED:
        assert git_apply(plain, *names.split("+"), check=True) == "", names


# ---- what runs in a copy, in the process that forks ----

def neutral_tests():
    """Those that know no architecture, but for those that bring their own layer or need no model."""
    which = "not the_cache_takes and not linear and not frequencies and not keep_the_smallest"
    return pytest.main(["tests/test_model.py", "-m", "not slow", "-k", which, "-x", "-p", "no:cacheprovider"])


def self_check():
    """What train_sft.py and train_rm.py begin with."""
    from helpers import TINY

    from lib.checks import check_model
    from lib.checks_rm import check_scores
    from lib.fast import prepare
    from model import GPT, GPTConfig, RewardModel

    gpt = prepare(GPT(GPTConfig(**TINY)))
    check_model(gpt)
    check_scores(prepare(RewardModel.from_gpt(gpt)))


def pipeline(init, more):
    """All stages without a stop, and each of them stopped after a step and resumed: the same bits. `init`:
    SFT starts from a checkpoint of the unpatched model.py, of which nothing may change but new weights. more:
    settings of stages."""
    import helpers

    import ppo
    import train_rm
    import train_sft
    from lib.checkpoint import load
    from model import GPT, RewardModel

    helpers.make_data(Path("data_tiny"), n=24)
    sizes = {"init": "plain.pt", "batch_tokens": 256} if init else (
        helpers.SIZES | {"n_layer": 2, "n_head": 4, "batch_tokens": 256})
    stages = {"sft": (train_sft, GPT, sizes | {"epochs": 2}),
              "rm": (train_rm, RewardModel, {"batch_tokens": 256, "epochs": 1.0}),
              "ppo": (ppo, GPT, helpers.PPO | {"show": 0})}
    made = {}
    for name, (module, kind, settings) in stages.items():
        settings = {"data": "data_tiny", "device": "cpu", "save_every": 1} | settings | more.get(name, {})
        module.main(module.Config(**settings, out="whole"))
        for check in {"check_model", "check_scores", "check_start"} & set(vars(module)):
            setattr(module, check, lambda *_: None)  # once is enough
        try:
            with stopped_after(2):
                module.main(module.Config(**settings, out="parts"))
        except SystemExit as end:
            assert end.code == 128 + signal.SIGTERM
        module.main(module.Config(**settings, out="parts", resume=True))
        made[name], again = (load(kind, f"{out}/{name}.pt").state_dict() for out in ("whole", "parts"))
        assert all(torch.equal(x, again[weight]) for weight, x in made[name].items()), f"{name} after a stop"
        logs = [helpers.steps(Path(f"{out}/{name}.log.jsonl")) for out in ("whole", "parts")]
        assert logs[0] == logs[1] and all(math.isfinite(x) for line in logs[0] for x in line.values() if x)
    if init:
        was = load_weights("plain.pt")
        for weights in made.values():
            assert all(torch.equal(x, weights[name]) for name, x in was.items() if name in weights)
        assert made["sft"].keys() > was.keys()
    assert any(not torch.equal(x, made["ppo"][name]) for name, x in made["sft"].items())


def load_weights(path):
    return torch.load(path, weights_only=True)["weights"]


class stopped_after:
    """Within it a SIGTERM arrives at the end of this step."""

    def __init__(self, step):
        self.step = step

    def __enter__(self):
        from lib.resume import Run
        self.run, self.shipped, shipped = Run, Run.after, Run.after

        def after(run, now, *last):
            if now == self.step:
                os.kill(os.getpid(), signal.SIGTERM)
            shipped(run, now, *last)
        Run.after = after

    def __exit__(self, *_):
        self.run.after = self.shipped


def plain_checkpoint():
    """plain.pt, of the sizes of `pipeline`, by the unpatched model.py."""
    import helpers

    from lib.checkpoint import save
    sizes = {"vocab_size": 257, "block_size": 32, "n_layer": 2, "n_head": 4}
    save("plain.pt", helpers.tiny_gpt(std=None, **sizes), helpers.BYTES)


def against_transformers():
    """Llama folders with shared keys or not, tied or not: logits are the same in both directions."""
    import transformers

    from lib import checkpoint
    from model import GPT
    from tools import hf

    for heads, kv, tied, theta, width in ((4, 2, True, 1e5, 96), (6, 3, False, 1e4, 100),
                                          (4, 4, False, 1e4, 64), (4, 1, True, 1e4, 80)):
        torch.manual_seed(heads)
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=257, hidden_size=48, intermediate_size=width, num_hidden_layers=2, rope_theta=theta,
            num_attention_heads=heads, num_key_value_heads=kv, max_position_embeddings=64, rms_norm_eps=1e-5,
            tie_word_embeddings=tied, initializer_range=0.3, bos_token_id=256, eos_token_id=256)).eval()
        for p in theirs.parameters():
            if p.dim() == 1:  # norms are 1 otherwise
                torch.nn.init.normal_(p, mean=1, std=0.3)
        name, tokens = f"{heads}-{kv}-{tied}", torch.randint(257, (2, 50))
        theirs.save_pretrained(name)
        hf.main(["import", name, f"{name}.pt", "--tokenizer", "bytes"])
        ours, want = checkpoint.load(GPT, f"{name}.pt"), theirs(tokens).logits
        torch.testing.assert_close(ours(tokens), want, atol=1e-4, rtol=1e-4)
        hf.main(["export", f"{name}.pt", f"{name}-back"])
        back, info = transformers.LlamaForCausalLM.from_pretrained(f"{name}-back", output_loading_info=True)
        assert not any(info.values()), info
        torch.testing.assert_close(back.eval()(tokens).logits, want, atol=1e-4, rtol=1e-4)


JOBS = {f.__name__: f for f in (neutral_tests, self_check, pipeline, plain_checkpoint, against_transformers)}


def serve():
    import torch._dynamo  # noqa: F401, an optimizer and a checkpointed function import it
    sys.path.remove(str(ROOT / "tests"))
    torch.set_num_threads(1)
    for line in sys.stdin:
        folder, name, args = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                os.chdir(folder)
                output = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(output, 1), os.dup2(output, 2)
                sys.path[:0] = [folder, f"{folder}/tests"]
                code = int(JOBS[name](*args) or 0)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


# ---- the tests that run there ----

@pytest.fixture(scope="module")
def server():
    if not hasattr(os, "fork"):
        pytest.skip("forks a process for each patch")
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               text=True, env=env)
    yield process
    process.stdin.close()
    process.wait()


@pytest.fixture
def run(server, tmp_path):
    """run(names, job, *args): what the job prints in a copy with these patches; it must end well."""
    def go(names, job, *args, before=None):
        folder = copy_project(tmp_path / "copy")
        if before:
            call(folder, before)
        assert git_apply(folder, *names) == ""
        call(folder, job, *args)

    def call(folder, job, *args):
        server.stdin.write(json.dumps([str(folder), job, args]) + "\n")
        server.stdin.flush()
        code = server.stdout.readline().strip()
        assert code == "0", (folder / "output").read_text()[-6000:]
    return go


slow = pytest.mark.slow


@slow
@needs_git
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_tests_of_the_model_pass(run, name):
    run([name], "neutral_tests")


@slow
@needs_git
@pytest.mark.parametrize("name", [*ARCHITECTURES, *sorted(OF_PPO), *EXAMPLES])
def test_all_stages_run_and_resume(run, name):
    lora = name == "lora"
    run([name], "pipeline", lora, EXAMPLES.get(name, {}), before="plain_checkpoint" if lora else None)


@slow
@needs_git
@pytest.mark.parametrize("names", COMBINED)
def test_combined_patches_pass_the_self_check(run, names):
    run(names.split("+"), "self_check")


@slow
@needs_git
def test_llama_folders_of_transformers_both_ways(run):
    pytest.importorskip("transformers", reason="transformers is not installed (requirements-dev.txt)")
    run(["llama", "llama_hf"], "against_transformers")


if __name__ == "__main__":
    serve()
