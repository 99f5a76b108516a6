"""sample.py --tokens: the numbers are PPO's, what is missing is said, no text does anything to terminal or
page. And PPO's critic is a part of its generation."""
import functools
import html
import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from base64 import b64encode
from html.parser import HTMLParser

import pytest
import tiktoken
import torch
from helpers import BYTES, CPU, PPO, ROOT, SIZES, gen, jsonl, lines, make_data, same_weights, tiny_gpt
from test_sample import args_of

import ppo
import sample
import train_sft
from data.examples import encode_prompt
from data.files import UserError
from data.tokenizer import SPLIT, Tokenizer
from lib.checkpoint import load, save
from lib.generate import generate
from lib.output import Harmless
from lib.resume import Run
from lib.rewards import Models, model_score
from model import GPT, RewardModel
from tools import tokens
from tools.tokens import load_sources, pieces, prefix_scores, read_log, shades, trace

POOLS = RewardModel.POOLS
HOSTILE = ["<script>document.title='owned'</script>", "<img src=x onerror=\"document.title='owned'\">",
           "\x1b[31m\x1b]0;owned\x07", "\u202eright to left\u200f\u061c", "\x00\x08\x7f\x9b2J",
           "</span></table>&lt;", "\" style=\"x\" onload='y'", "a\nb\tc\r\n\u2028",
           "\N{ZERO WIDTH SPACE}\N{HEBREW LETTER ALEF}"]


def log(folder, *kl_coefs, **config):
    jsonl(folder / "ppo.log.jsonl", [{"config": {"kl_coef": 0.05, "lam": 0.9, "temperature": 0.7,
                                                 "no_eos_score": -2.0, **config}},
                                     *({"step": i, "kl_coef": x} for i, x in enumerate(kl_coefs, 1)),
                                     {"report": {"update": 0, "kl": 0.0}}])


def reward_model(pool, seed, gpt):
    torch.manual_seed(seed)
    rm = RewardModel.from_gpt(gpt, pool).eval()
    rm.normalise(torch.tensor([0.5, 2.0]))
    return rm


SIZE = {"vocab_size": BYTES.vocab_size, "block_size": 96}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """checkpoints(pool) -> a folder with sft.pt, ppo.pt, rm.pt, critic.pt of tiny models."""
    @functools.cache
    def make(pool):
        folder = tmp_path_factory.mktemp(pool)
        for i, name in enumerate(("sft", "ppo")):
            save(folder / f"{name}.pt", tiny_gpt(i, 0.1 + 0.02 * i, **SIZE), BYTES)
        for i, name in enumerate(("rm", "critic"), 5):
            save(folder / f"{name}.pt", reward_model(pool, i, tiny_gpt(i, 0.2, **SIZE)), BYTES)
        return folder
    return make


@pytest.fixture
def made(checkpoints, tmp_path):
    """made(pool, **config) -> a folder with all that --tokens reads of a finished run; config: of its log."""
    def make(pool="last", **config):
        shutil.copytree(checkpoints(pool), tmp_path, dirs_exist_ok=True)
        log(tmp_path, 0.05, 0.25, **config)
        return tmp_path
    return make


def sources_of(folder, rm=None, **args):
    policy = load(GPT, folder / "ppo.pt")
    return load_sources(policy, rm, BYTES, args_of(ckpt=str(folder / "ppo.pt"), **args), CPU)


def row_of(prompt="ab: ", response=" Héllo, wörld", end=True):
    prompt = encode_prompt(prompt, BYTES)
    return prompt + BYTES.encode(response) + [BYTES.eos] * end, len(prompt)


# ---- the numbers ----

@pytest.mark.parametrize("pool", POOLS)
def test_the_last_prefix_is_the_score_exactly_and_each_is_the_score_of_its_text(made, pool):
    rm, (row, P) = load(RewardModel, made(pool) / "rm.pt"), row_of()
    with torch.inference_mode():
        scores = prefix_scores(rm, row, P)
        assert len(scores) == len(row) - P + 1
        assert scores[-1].item() == rm.score(torch.tensor([row]), torch.tensor([len(row)])).item()
        for n, score in zip(range(P, len(row) + 1), scores, strict=True):
            assert score.item() == pytest.approx(
                rm.score(torch.tensor([row[:n]]), torch.tensor([n])).item(), abs=1e-5)
    assert scores.std() > 0.01


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("pool", POOLS)
def test_the_numbers_are_those_of_the_formulas(made, pool, end):
    """From scratch; with the lambda, temperature, coefficient and missing-end score of the run's log."""
    folder, (row, P) = made(pool), row_of(end=end)
    columns, whole = trace(sources_of(folder), row, P)
    policy, ref = (load(GPT, folder / f"{name}.pt") for name in ("ppo", "sft"))
    rm, critic = (load(RewardModel, folder / f"{name}.pt") for name in ("rm", "critic"))
    text, n = torch.tensor([row]), len(row) - P
    with torch.no_grad():
        logp, ref_logp = ((gpt(text)[0, P - 1 : -1] / 0.7).log_softmax(-1) for gpt in (policy, ref))
        value, score = critic(text)[0, P - 1 : -1], rm.score(text, torch.tensor([len(row)]))[0].item()
        prefixes = [rm.score(text[:, :t], torch.tensor([t])).item() for t in range(P + 1, len(row) + 1)]
    assert columns["score"][-1] == score
    score = score if end else -2.0
    at = torch.arange(n), text[0, P:]
    kl = logp[at] - ref_logp[at]
    reward = -0.25 * kl
    reward[-1] += score
    delta = reward + torch.cat([value[1:], torch.zeros(1)]) - value
    adv = [sum(0.9**k * delta[t + k].item() for k in range(n - t)) for t in range(n)]
    expected = {"score": prefixes, "value": value, "logp": logp[at], "ref": ref_logp[at], "kl": kl,
                "penalty": 0.25 * kl, "entropy": -(logp.exp() * logp).sum(-1), "reward": reward, "adv": adv}
    assert list(columns) == ["score", "value", "logp", "ref", "kl", "entropy", "penalty", "reward", "adv"]
    for name, x in expected.items():
        assert columns[name] == pytest.approx(torch.as_tensor(x).tolist(), abs=2e-5), name
    assert abs(sum(columns["kl"])) > 0.1 and whole["ended"] is end
    assert whole["score"] == pytest.approx(score, abs=1e-6)
    assert whole["kl"] == pytest.approx(kl.sum().item(), abs=1e-5)
    assert abs(whole["reward"] - (whole["score"] - 0.25 * whole["kl"])) < 1e-5
    assert whole["reward"] == sum(columns["reward"])


def test_the_numbers_are_those_of_a_rollout_of_ppo(made):
    """Of several rows together, as PPO assesses them; advantages as they are before they are whitened."""
    sources = sources_of(made())
    cfg = ppo.Config(max_new_tokens=12, temperature=0.7, lam=0.9, no_eos_score=-2.0, kl_coef=0.25)
    models = Models(sources.policy, sources.ref, sources.critic, model_score(sources.rm), None, BYTES)
    batch = ppo.rollout(sources.policy, [BYTES.encode(p) for p in ("a: ", "longer: ")], 260, cfg, gen(0))
    batch = ppo.advantages(ppo.assess(batch, models, cfg), cfg.kl_coef, cfg.lam)
    for i, mask in enumerate(batch["mask"]):
        row, P = batch["tokens"][i, : batch["lengths"][i]].tolist(), batch["P"][i].item()
        columns, whole = trace(sources, row, P)
        for ours, theirs in (("reward", batch["reward"]), ("adv", batch["ret"] - batch["value"]),
                             ("logp", batch["logp"]), ("value", batch["value"])):
            assert columns[ours] == pytest.approx(theirs[i][mask].tolist(), abs=2e-5), ours
        assert whole["score"] == pytest.approx(batch["score"][i].item(), abs=1e-5)


def test_a_response_of_one_token(made):
    columns, whole = trace(sources_of(made("token")), *row_of(response=""))
    assert {len(x) for x in columns.values()} == {1} and columns["adv"][0] == pytest.approx(
        whole["reward"] - columns["value"][0], abs=1e-5)


# ---- where they come from ----

def test_the_log_says_with_which_coefficient_the_run_ended(made, tmp_path):
    cfg, where = read_log(made() / "ppo.log.jsonl")
    assert (cfg.kl_coef, cfg.lam, cfg.temperature, cfg.no_eos_score) == (0.25, 0.9, 0.7, -2.0)
    assert where.endswith("ppo.log.jsonl")
    log(tmp_path)  # of no update
    assert read_log(tmp_path / "ppo.log.jsonl")[0].kl_coef == 0.05
    assert "kl_coef 0.25, of the last update in" in "\n".join(sources_of(made()).said)
    (tmp_path / "ppo.log.jsonl").unlink()
    cfg, where = read_log(tmp_path / "ppo.log.jsonl")
    assert (cfg.kl_coef, cfg.lam) == (0.035, 0.95) and "is not there" in where


@pytest.mark.parametrize("content", [
    b"", b"\xff\n", b"[1]\n", b'{"config": 3}\n', b'{"step": 1}\n', b'{"config": {"kl_coef": null}}\n',
    b'{"config": {"kl_coef": "many"}}\n', b'{"config": {"kl_coef": -1}}\n', b'{"config": {"lam": 7}}\n',
    b'{"config": {}}\n{"step": 1}\n', b'{"config": {}}\n{"step": 1, "kl_coef": [1]}\n',
    b'{"config": {}}\n{"step": 1, "kl_co'])
def test_another_file_is_no_log(content, tmp_path):
    (tmp_path / "ppo.log.jsonl").write_bytes(content)
    with pytest.raises(UserError, match="is not a log of ppo.py, or is corrupt"):
        read_log(tmp_path / "ppo.log.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("gone, lost", [
    ("critic.pt", "value, adv"), ("rm.pt", "score, reward, adv"), ("sft.pt", "ref, kl, penalty, reward, adv"),
    ("critic.pt rm.pt sft.pt", "score, value, ref, kl, penalty, reward, adv")])
def test_what_is_not_there_is_said_and_left_out(made, gone, lost):
    folder = made()
    whole, _ = trace(sources_of(folder), *row_of())
    for name in gone.split():
        (folder / name).unlink()
    sources = sources_of(folder)
    said = "\n".join(sources.said)
    assert f"left out, for what is not there: {lost}\n" in said + "\n"
    assert all(f"{folder / name} is not there" in said for name in gone.split())
    columns, _ = trace(sources, *row_of())
    assert set(whole) - set(columns) == set(lost.split(", "))
    assert all(columns[name] == whole[name] for name in columns)


@pytest.mark.slow
def test_of_a_run_on_a_function_no_reward_is_claimed(made):
    """Its scores are not the reward model's, be there one or not."""
    folder = made(reward="mine.py:score")
    sources = sources_of(folder)
    assert sources.rm is None and "mine.py:score, which is not called here" in "\n".join(sources.said)
    assert list(trace(sources, *row_of())[0]) == ["value", "logp", "ref", "kl", "entropy", "penalty"]
    sources = sources_of(folder, load(RewardModel, folder / "rm.pt"), reward="rm.pt")
    assert list(trace(sources, *row_of())[0]) == ["score", "value", "logp", "ref", "kl", "entropy", "penalty"]


@pytest.mark.slow
def test_files_that_the_run_read_elsewhere_are_found(made, tmp_path):
    folder = made(sft=str(tmp_path / "there.pt"), rm=str(tmp_path / "here.pt"))
    (folder / "sft.pt").rename(tmp_path / "there.pt")
    (folder / "rm.pt").rename(tmp_path / "here.pt")
    said = sources_of(folder).said
    assert f"reference: {tmp_path / 'there.pt'}" in said and f"reward model: {tmp_path / 'here.pt'}" in said


@pytest.mark.slow
def test_a_given_reward_model_takes_the_place_of_the_runs(made):
    folder = made()
    other = reward_model("mean", 9, tiny_gpt(9, 0.2, vocab_size=257, block_size=96))
    sources = sources_of(folder, other, reward="other.pt")
    assert sources.rm is other and "reward model: other.pt" in sources.said


@pytest.mark.slow
def test_what_a_prefix_score_means_is_said(made):
    assert "never trained on prefixes" in "\n".join(sources_of(made("last")).said)
    for pool in ("mean", "max", "token"):
        said = "\n".join(sources_of(made(pool)).said)
        assert f"--pool {pool}: " in said and "never trained on prefixes" not in said


@pytest.mark.slow
def test_another_policy_than_the_last_is_named(made):
    folder = made()
    assert "critic learned" not in "\n".join(sources_of(folder).said)
    shutil.copy(folder / "ppo.pt", folder / "ppo.best.pt")
    args = args_of(ckpt=str(folder / "ppo.best.pt"))
    said = load_sources(load(GPT, folder / "ppo.best.pt"), None, BYTES, args, CPU).said
    assert f"the critic learned from the policy in {folder / 'ppo.pt'}, not from this one" in said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "rm", "critic"])
def test_a_model_that_does_not_fit_the_policy_is_refused(made, name):
    folder = made()
    small = tiny_gpt(vocab_size=257, block_size=32)
    save(folder / f"{name}.pt", small if name == "sft" else RewardModel.from_gpt(small), BYTES)
    with pytest.raises(UserError, match=rf"{name}\.pt .* shorter texts"):
        sources_of(folder)
    gpt = tiny_gpt(vocab_size=(other := hostile_tokenizer()).vocab_size, block_size=96)
    other.bpe = "".join(f"{b64encode(bytes([i])).decode()} {i}\n" for i in range(256)) + "".join(
        f"{b64encode(text.encode()).decode()} {256 + i}\n" for i, text in enumerate(HOSTILE))
    save(folder / f"{name}.pt", gpt if name == "sft" else RewardModel.from_gpt(gpt), other)
    with pytest.raises(UserError, match=rf"{name}\.pt .*another tokenizer"):
        sources_of(folder)


# ---- tokens as texts ----

@pytest.mark.parametrize("text, own, joined", [
    ("ab", ["a", "b"], "ab"), ("a\\n", ["a", r"\\", "n"], "a\\n"), ("a\nb", ["a", r"\n", "b"], "a\nb"),
    ("é", [r"\xc3", r"\xa9 = é"], "é"), ("日", [r"\xe6", r"\x97", r"\xa5 = 日"], "日"),
    ("\x00\x1b", [r"\x00", r"\x1b"], r"\x00\x1b"),
    ("\u200f", [r"\xe2", r"\x80", r"\x8f = \u200f"], r"\u200f")])
def test_bytes_that_are_no_character_alone_are_written_out(text, own, joined):
    found = pieces(BYTES, BYTES.encode(text) + [BYTES.eos])
    assert [token for token, _ in found] == [*own, "<|endoftext|>"]
    assert "".join(text for _, text in found) == joined + "<|endoftext|>"


def test_bytes_that_never_become_a_character_are_written_out():
    for ids, own, joined in (([0xFF, 97], [r"\xff", "a"], r"\xffa"),
                             ([0xC3, 97], [r"\xc3", "a"], r"\xc3a"), ([97, 0xE6], ["a", r"\xe6"], r"a\xe6"),
                             ([0xE6, BYTES.eos], [r"\xe6", "<|endoftext|>"], r"\xe6<|endoftext|>")):
        assert [token for token, _ in pieces(BYTES, ids)] == own
        assert "".join(text for _, text in pieces(BYTES, ids)) == joined


def test_shades_go_by_the_advantage():
    assert shades({"logp": [0, 0, 0], "kl": [9, 9, 9], "adv": [-4.0, 0.2, 2.0]}) == [0, 2, 3]
    assert shades({"logp": [0, 0], "kl": [1.0, -1.0]}) == [4, 0]
    assert shades({"logp": [-0.1, -2.0]}) == [2, 0] and shades({"logp": [0, 0], "adv": [0.0, 0.0]}) == [2, 2]


# ---- what is printed ----

def test_a_number_next_to_0_is_0():
    told = tokens.Told("", [("a", "a")] * 3, {"kl": [-1e-5, 1e-5, -0.0006]}, [2] * 3, "")
    assert [tokens.cells(told, i) for i in range(3)] == [["0.000"], ["0.000"], ["-0.001"]]
    assert tokens.table(told, None, lambda text, _: text)[1] == "   1    0.000  a"



def run(folder, **how):
    sample.main(args_of(**{"ckpt": str(folder / "ppo.pt"), "tokens": True, "prompt": "ab: "} | how))


def rows_of(text):
    """The lines of the tables."""
    return re.findall(r"^ *\d+((?: +-?\d+\.\d{3})+)  (.*)$", text, re.M)


def test_a_line_a_token_with_the_numbers(made, capsys):
    folder, (row, P) = made(), row_of()
    run(folder, given=[" Héllo, wörld"])
    text = capsys.readouterr().out
    columns, whole = trace(sources_of(folder), row, P)
    shown = rows_of(text)
    assert len(shown) == len(row) - P
    for i, (numbers, token) in enumerate(shown):
        assert [float(x) for x in numbers.split()] == pytest.approx(
            [x[i] for x in columns.values()], abs=6e-4)
        assert token == pieces(BYTES, row[P:])[i][0]
    assert "-0.000" not in text and "\x1b" not in text and f"\n   #{'score':>9}" in text
    assert f"the rewards add up to {whole['reward']:+.4f} = score - 0.25 x KL" in text
    assert "ab: \n Héllo, wörld<|endoftext|>\n" in text and "kl_coef x kl" in text
    assert f"score {whole['score']:+.4f}, of the prompt alone {whole['prompt']:+.4f}" in text


@pytest.mark.slow
def test_without_a_response_one_is_sampled_as_ever(made, capsys):
    folder = made()
    run(folder, seed=7, max_new_tokens=9)
    text = capsys.readouterr().out
    ids = torch.tensor([BYTES.encode("ab: ")])
    made_tokens, lengths = generate(load(GPT, folder / "ppo.pt"), ids, torch.tensor([4]), 9, eos=BYTES.eos,
                                    generator=gen(7))
    found = pieces(BYTES, made_tokens[0, 4 : lengths[0]].tolist())
    assert [token for _, token in rows_of(text)] == [token for token, _ in found]
    assert "it does not end, so PPO gives it -2 for a score" in text


def test_twins_part_where_they_differ(made, capsys, tmp_path):
    run(made(), given=[" one two", " one three"], html=str(tmp_path / "x.html"))
    text = capsys.readouterr().out
    assert "\nA:  one t>>>wo<|endoftext|>\nB:  one t>>>hree<|endoftext|>\n" in text
    lines = text.splitlines()
    for at in [i for i, line in enumerate(lines) if line == "---- here they part ----"]:
        assert lines[at - 1].endswith("  t") and lines[at + 1][-3:] in ("  w", "  h")
    assert text.count("---- here they part ----") == 2 and text.count("\nA: ") == 2
    shown = rows_of(text)
    assert [row[1] for row in shown] == [
        '" "', *"one", '" "', *"two", "<|endoftext|>", '" "', *"one", '" "', *"three", "<|endoftext|>"]
    page = (tmp_path / "x.html").read_text()
    assert page.count("<tr class=part><td>7</td>") == 2 and page.count("<b>&gt;&gt;&gt;</b>") == 2


@pytest.mark.slow
@pytest.mark.parametrize("a, b, last", [("same", "same", None), ("same", "same and more", "<|endoftext|>")])
def test_twins_of_which_one_is_the_others_beginning(made, capsys, a, b, last):
    run(made(), given=[a, b])
    text = capsys.readouterr().out
    assert text.count("here they part") == (2 if last else 0)
    assert f"same>>>{last}" in text if last else ">>>" not in text


@pytest.mark.slow
def test_a_conversation_is_shown_as_a_turn(made, capsys):
    run(made(), chat=True, prompt="hi", given=[" yes"])
    assert "\n\nHuman: hi\n\nAssistant:\n yes<|endoftext|>\n" in capsys.readouterr().out


@pytest.mark.slow
def test_a_long_prompt_is_truncated_and_a_long_response_refused(made, capsys):
    run(made(), prompt="x" * 90, given=[" 23456789"])
    text = capsys.readouterr().out
    assert "truncated from the left to 86 tokens" in text and "\n" + "x" * 86 + "\n" in text
    run(made("token"), prompt="x" * 90, given=[" 23456789"])
    assert "truncated from the left to 85 tokens" in capsys.readouterr().out
    with pytest.raises(UserError, match="leaves no room for a prompt in 96 tokens"):
        run(made(), given=["y" * 95])


@pytest.mark.slow
def test_a_long_prompt_of_a_sample_is_truncated_as_in_ppo(made, capsys):
    run(made("token"), prompt="x" * 200, max_new_tokens=20)
    assert "\n" + "x" * 75 + "\n" in capsys.readouterr().out


@pytest.mark.slow
def test_a_sample_that_fills_the_model_leaves_room_for_the_reward_token(made, capsys):
    run(made("token"), prompt="x" * 40, max_new_tokens=10**4)
    assert len(rows_of(capsys.readouterr().out)) <= 95 - 40


# ---- flags ----

@pytest.mark.parametrize("wrong", [
    {"tokens": False, "given": ["x"]}, {"tokens": False, "html": "x.html"}, {"n": 2},
    {"best_of": 2, "reward": "rm"}, {"prompt": None}, {"prompts": "p", "to": "t", "prompt": None}])
def test_flags_that_do_nothing_together_are_refused(wrong, tmp_path):
    with pytest.raises(UserError, match="belong to --tokens, which takes one prompt"):
        run(tmp_path, **wrong)  # where no checkpoint is


def test_a_page_never_takes_the_place_of_a_file(made, tmp_path, capsys):
    (tmp_path / "mine.html").write_text("mine")
    (tmp_path / "link.html").symlink_to("nowhere")
    for name in ("mine.html", "link.html"):
        with pytest.raises(UserError, match="already exists; choose another name"):
            run(tmp_path / "nothing", html=str(tmp_path / name))
    assert (tmp_path / "mine.html").read_text() == "mine" and not (tmp_path / "nowhere").exists()
    with pytest.raises(UserError, match="there is no such folder"):
        run(made(), given=["x"], html=str(tmp_path / "no/folder.html"))


@pytest.mark.slow
def test_the_command_line(made):
    def call(*flags):
        return subprocess.run([sys.executable, str(ROOT / "sample.py"), "--device", "cpu", "--ckpt",
                               str(made() / "ppo.pt"), *flags], capture_output=True, text=True)
    done = call("--tokens", "--twins", " ax", " ay", "prompt")
    assert done.returncode == 0 and "\nA:  a>>>x<|endoftext|>\nB:  a>>>y" in done.stdout
    done = call("--tokens", "--response", b" \xff", "prompt")
    assert done.returncode == 0 and " \ufffd<|endoftext|>" in done.stdout
    done = call("--tokens", "--response", "x", "--twins", "a", "b", "prompt")
    assert done.returncode == 2 and "not allowed with argument" in done.stderr
    done = call("--response", "x", "prompt")
    assert done.returncode == 1 and done.stderr.startswith("sample.py: --response, --twins and --html belong")


# ---- hostile texts ----

def hostile_tokenizer():
    """The bytes, and each hostile text as one token."""
    ranks = {bytes([i]): i for i in range(256)} | {text.encode(): 256 + i for i, text in enumerate(HOSTILE)}
    return Tokenizer("bytes", tiktoken.Encoding("hostile", pat_str=SPLIT, mergeable_ranks=ranks,
                                                special_tokens={"<|endoftext|>": len(ranks)}))


@pytest.fixture
def hostile(tmp_path):
    """hostile(file) shows a hostile prompt, hostile lines about the models, and two hostile responses: each
    text whole in one token, and spread over many."""
    def show(file=None):
        tokenizer = hostile_tokenizer()
        size = {"vocab_size": tokenizer.vocab_size, "block_size": 900}
        models = [tiny_gpt(i, 0.1, **size) for i in range(2)]
        rms = [reward_model("last", i, models[0]) for i in (5, 6)]
        names = [f"policy: {HOSTILE[0]}", *HOSTILE]
        there = {"ref", "rm", "critic", "units"}
        sources = tokens.Sources(*models, *rms, tokenizer, ppo.Config(), there, names)
        whole, spread = range(256, 256 + len(HOSTILE)), list("".join(HOSTILE).encode())
        prompt = [*whole, *spread]
        tokens.show(sources, [prompt + [97, *whole, 256], prompt + [97, *spread, 98]], len(prompt), file)
    return show


class Screen(io.StringIO):
    def isatty(self):
        return True


CODES = re.compile(r"\x1b\[(?:30;48;5;(?:203|224|194|114)|0)m")


@pytest.mark.parametrize("no_color", [None, "", "1"])
def test_hostile_texts_do_nothing_on_a_terminal(hostile, monkeypatch, no_color):
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", Harmless(screen, tame=True))
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    hostile()
    shown, codes = screen.getvalue(), CODES.findall(screen.getvalue())
    assert bool(codes) == (not no_color) and codes[1::2] == ["\x1b[0m"] * (len(codes) // 2)
    left = CODES.sub("", shown)
    assert all(c == "\n" or c.isprintable() for c in left)
    assert "<script>" in left and r"\x1b[31m\x1b]0;owned\x07" in left and r"\x00\x08\x7f" in left
    for line in shown.splitlines():  # a colour never runs on into another line
        assert not CODES.findall(line) or CODES.findall(line)[-1] == "\x1b[0m"
    numbers = [line for line in left.splitlines() if re.match(r" *\d+ ", line)]
    assert len(numbers) == 1 + len(HOSTILE) + 1 + 1 + len("".join(HOSTILE).encode()) + 1
    assert all(re.match(r" *\d+(?: +-?\d+\.\d{3}){9}  \S", line) for line in numbers)


def test_a_file_or_pipe_gets_no_colours(hostile, capsys):
    hostile()
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and all(c == "\n" or c.isprintable() for c in shown)


@pytest.mark.slow
def test_on_a_real_terminal_there_are_colours_and_nothing_else(made):
    master, slave = pty.openpty()
    environment = {name: x for name, x in os.environ.items() if name != "NO_COLOR"}
    prompt = "\x1b]0;owned\x07\u202e<script>: "
    with subprocess.Popen([sys.executable, str(ROOT / "sample.py"), "--device", "cpu", "--ckpt",
                           str(made() / "ppo.pt"), "--tokens", "--response", " \x1b[2J\u200f\x9b2J", prompt],
                          stdout=slave, stderr=subprocess.STDOUT, env=environment) as process:
        os.close(slave)
        shown = b""
        try:
            while piece := os.read(master, 65536):
                shown += piece
        except OSError:  # the other side is closed
            pass
    os.close(master)
    shown = shown.decode().replace("\r\n", "\n")
    assert process.returncode == 0 and CODES.search(shown)
    assert all(c == "\n" or c.isprintable() for c in CODES.sub("", shown))
    assert r"\x1b]0;owned\x07\u202e<script>" in shown and r"\x8f = \u200f" in CODES.sub("", shown)


class Page(HTMLParser):
    """All tags, attributes and texts of a page."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.attributes, self.text = [], set(), ""
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes |= {(tag, name) for name, _ in attributes}

    def handle_data(self, data):
        self.text += data


KNOWN = set("html head meta title style body h1 p span b table tbody tr th td bdi".split())
ATTRIBUTES = {("html", "lang"), ("meta", "charset"), ("meta", "http-equiv"), ("meta", "content"),
              ("p", "class"), ("p", "dir"), ("span", "class"), ("tr", "class")}


def assert_tame(source):
    page = Page(source)
    assert set(page.tags) <= KNOWN
    assert page.attributes <= ATTRIBUTES
    assert all(c == "\n" or c.isprintable() for c in source)
    for text in HOSTILE[:2]:
        assert page.text.count(text) >= 5  # a line about it, the prompt (twice), both responses
    return page


def test_hostile_texts_do_nothing_in_the_page(hostile, tmp_path, capsys):
    hostile(str(tmp_path / "x.html"))
    source = (tmp_path / "x.html").read_text(encoding="utf-8")
    page = assert_tame(source)
    assert "default-src 'none'" in source and not re.search(r"https?:|url\(|@import|<script", source)
    assert page.tags.count("tr") == 2 + 1 + len(HOSTILE) + 1 + 1 + len("".join(HOSTILE).encode()) + 1


@pytest.mark.slow
def test_the_page_has_the_same_numbers(made, capsys, tmp_path):
    run(made(), given=[" Héllo"], html=str(tmp_path / "x.html"))
    text = capsys.readouterr().out
    source = (tmp_path / "x.html").read_text(encoding="utf-8")
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in source.split("<tr")[2:]]
    assert [row[1:-1] for row in cells] == [numbers.split() for numbers, _ in rows_of(text)]
    shown = [html.unescape(re.sub("<[^>]*>", "", row[-1])) for row in cells]
    assert shown == [token for _, token in rows_of(text)]
    for line in [*text.split("\n\n")[0].splitlines(), "colours: adv, red below 0, green above"]:
        assert f"<p>{html.escape(line)}</p>" in source
    assert "colours" not in text
    assert text.endswith("x.html written\n")


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def browse(path):
    """The page as the browser has it after its scripts ran."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--dump-dom"]
    return subprocess.run([CHROMIUM, *flags, f"--user-data-dir={path.parent / 'profile'}", path.as_uri()],
                          capture_output=True, timeout=120, check=True).stdout.decode()


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="there is no chromium here: apt-get install chromium")
def test_hostile_texts_do_nothing_in_a_real_browser(hostile, tmp_path, capsys):
    hostile(str(tmp_path / "x.html"))
    dom = browse(tmp_path / "x.html")
    page = assert_tame(dom)
    assert "<title>What each token did</title>" in dom
    assert page.tags.count("tr") == 2 + 1 + len(HOSTILE) + 1 + 1 + len("".join(HOSTILE).encode()) + 1
    # the browser does run such texts where they are not escaped and not forbidden
    (tmp_path / "control.html").write_text(f"<title>x</title>{HOSTILE[0]}")
    assert "<title>owned</title>" in browse(tmp_path / "control.html")
    # and would not run one even if one came through
    source = (tmp_path / "x.html").read_text(encoding="utf-8")
    (tmp_path / "through.html").write_text(source.replace("<h1>", HOSTILE[0] + HOSTILE[1] + "<h1>"))
    assert "<title>What each token did</title>" in browse(tmp_path / "through.html")


# ---- the critic of a run ----

@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """A folder with data, an SFT model and a reward model, and train(**settings), which runs PPO there."""
    folder = tmp_path_factory.mktemp("stages")
    make_data(folder / "data")
    train_sft.main(train_sft.Config(data=str(folder / "data"), out=str(folder), **SIZES, epochs=12.0))
    save(folder / "rm.pt", reward_model("last", 0, load(GPT, folder / "sft.pt")), BYTES)
    return folder


@pytest.fixture
def train(stages, tmp_path):
    def go(**settings):
        for name in ("sft.pt", "rm.pt"):
            if not (tmp_path / name).exists():
                shutil.copy(stages / name, tmp_path)
        settings = {"data": str(stages / "data"), "out": str(tmp_path), **PPO, "show": 0} | settings
        ppo.main(ppo.Config(**settings))
        return tmp_path
    return go


@pytest.mark.slow
def test_ppo_keeps_its_critic_and_one_generation_back(train, monkeypatch, capsys):
    seen, shipped = [], Run.finish

    def finish(run, *args, **more):
        seen.append({name: x.clone() for name, x in run.parts["critic"].state_dict().items()})
        shipped(run, *args, **more)
    monkeypatch.setattr(Run, "finish", finish)
    out = train()
    first = (out / "critic.pt").read_bytes()
    critic = load(RewardModel, out / "critic.pt")
    assert all(torch.equal(x, seen[0][name]) for name, x in critic.state_dict().items())
    assert not same_weights(critic, load(RewardModel, out / "rm.pt"))
    train(seed=2)
    assert (out / "critic.prev.pt").read_bytes() == first != (out / "critic.pt").read_bytes()
    assert f"{out / 'critic.pt'} already exists; moved to {out / 'critic.prev.pt'}" in capsys.readouterr().out
    train(save_critic=False)  # then no other run's critic stands beside the policy
    assert not (out / "critic.pt").exists() and (out / "critic.prev.pt").exists()
    sources = sources_of(out)
    assert sources.critic is None and f"critic: {out / 'critic.pt'} is not there" in sources.said


@pytest.mark.slow
def test_the_critic_changes_nothing_else(train):
    files = ("ppo.pt", "ppo.samples.jsonl", "ppo.best.pt")
    whole = {name: (train() / name).read_bytes() for name in files}
    out = train(save_critic=False)
    assert {name: (out / name).read_bytes() for name in files} == whole
    config = json.loads((out / "ppo.log.jsonl").read_text().splitlines()[0])["config"]
    assert config["save_critic"] is False and "--save-critic" not in (
        torch.load(out / "ppo.finished.pt", weights_only=True)["start"])


@pytest.mark.slow
def test_a_run_does_not_read_the_critic_that_it_writes(train):
    out = train()
    for flags in ({"rm": str(out / "critic.pt")}, {"judge": str(out / "critic.prev.pt")}):
        shutil.copy(out / "critic.pt", out / "critic.prev.pt")
        with pytest.raises(UserError, match=r"critic.*is read by this run, and .* is written by it"):
            train(**flags)


@pytest.mark.slow
def test_other_stages_leave_the_critic_alone(train, stages, capsys):
    out = train()
    critic = (out / "critic.pt").read_bytes()
    train_sft.main(train_sft.Config(data=str(stages / "data"), out=str(out), **SIZES, epochs=0.5))
    assert (out / "critic.pt").read_bytes() == critic and not (out / "critic.prev.pt").exists()


@pytest.mark.slow
def test_what_the_run_reported_is_what_the_tokens_say(train):
    """Score and KL of its held-out responses that ended."""
    out = train(lr=3e-3, no_eos_score=-4.0)
    sources, some = sources_of(out), lines(out / "ppo.samples.jsonl")
    some = [(row, *row_of(row["prompt"], row["response"], end=bool(row["eos"]))) for row in some
            if row["model"] == "PPO" and "\ufffd" not in row["response"]]  # bytes that are no text are lost
    assert some
    for row, ids, P in some:
        columns, whole = trace(sources, ids, P)
        assert whole["score"] == pytest.approx(row["score"], abs=1e-4)
        assert whole["kl"] == pytest.approx(row["kl"], abs=1e-4)
