"""tools.score: the scores are the reward model's own, in the order of the lines; the accuracy."""
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from helpers import BYTES, CPU, ROOT, jsonl, lines, tiny_gpt

from data.examples import pad
from data.files import UserError
from lib.checkpoint import load, save
from model import RewardModel
from tools import score

PAIRS = [{"prompt": "p:", "chosen": "good", "rejected": "bad"},
         {"prompt": "", "chosen": "yes", "rejected": "n"},
         {"prompt": "q", "responses": ["a", "bb", "ccc"], "ranks": [1, 0, 0], "id": 7}]


@pytest.fixture(scope="module")
def rm(tmp_path_factory):
    path = tmp_path_factory.mktemp("rm") / "rm.pt"
    save(path, RewardModel.from_gpt(tiny_gpt(vocab_size=BYTES.vocab_size)), BYTES)
    return path


def run(rm, tmp_path, rows, **more):
    jsonl(tmp_path / "in.jsonl", rows)
    score.main(Namespace(**{"file": tmp_path / "in.jsonl", "rm": rm, "out": tmp_path / "out.jsonl",
                            "batch_tokens": 99, "device": "cpu", "skip_bad": False} | more))
    return lines(tmp_path / "out.jsonl")


def by_hand(rm, prompt, response):
    row = (list(prompt.encode()) or [BYTES.eos]) + list(response.encode()) + [BYTES.eos]
    with torch.no_grad():
        return load(RewardModel, rm).score(*pad([row])).item()


def test_scores_of_pairs_and_lists_and_their_accuracy(rm, tmp_path, capsys):
    made = run(rm, tmp_path, PAIRS)
    right = []
    for row, line in zip(PAIRS, made, strict=True):
        texts = row.get("responses") or [row["chosen"], row["rejected"]]
        expected = [by_hand(rm, row["prompt"], text) for text in texts]
        assert line == row | {"scores": pytest.approx(expected, abs=1e-5)}
        a, b, *c = expected
        right += [b > a, c[0] > a] if c else [a > b]
    out = capsys.readouterr().out
    assert f"accuracy {sum(right) / 4:.1%} +- " in out and "on 4 pairs" in out and "7 responses scored" in out


def test_scores_of_prompts_with_responses(rm, tmp_path, capsys):
    rows = [{"prompt": "p", "response": "r", "model": "PPO", "score": 9.0}, {"prompt": "p", "response": ""},
            {"response": "alone"}, {"prompt": "p", "completion": "c"}, {"text": "t"}]
    made = run(rm, tmp_path, rows)
    for row, line in zip(rows, made, strict=True):
        response = next(row[name] for name in ("response", "completion", "text") if name in row)
        expected = by_hand(rm, row.get("prompt", ""), response)
        assert line == row | {"score": pytest.approx(expected, abs=1e-5)}
    assert "accuracy" not in capsys.readouterr().out


def test_the_prompt_is_truncated_and_a_response_that_is_too_long_has_no_score(rm, tmp_path, capsys):
    made = run(rm, tmp_path, [{"prompt": "x" * 80, "chosen": "good", "rejected": "bad"},
                              {"prompt": "x", "chosen": "g" * 64, "rejected": "bad"}])
    expected = [by_hand(rm, "x" * 59, text) for text in ("good", "bad")]
    assert made[0]["scores"] == pytest.approx(expected, abs=1e-5)
    assert made[1]["scores"] is None
    out = capsys.readouterr().out
    assert "1 lines do not fit into the reward model's 64 tokens" in out and "on 1 pairs" in out


def test_batches_change_nothing_and_without_out_nothing_is_written(rm, tmp_path, capsys):
    a, b = (run(rm, tmp_path, PAIRS, out=tmp_path / "out.jsonl", batch_tokens=n)
            for n in (1, 999) if not (tmp_path / "out.jsonl").unlink(missing_ok=True))
    assert [x["scores"] for x in a] == [pytest.approx(x["scores"], abs=1e-5) for x in b]
    (tmp_path / "out.jsonl").rename(tmp_path / "kept.jsonl")
    with pytest.raises(FileNotFoundError):
        run(rm, tmp_path, PAIRS, out=None)
    assert "on 4 pairs" in capsys.readouterr().out


def summary(rm, tmp_path, rows, capsys):
    """The printed lines from the accuracy on."""
    run(rm, tmp_path, rows)
    (tmp_path / "out.jsonl").unlink()
    found = capsys.readouterr().out.splitlines()
    return found[[line.startswith("accuracy ") for line in found].index(True) :]


def test_accuracy_of_each_subset(rm, tmp_path, capsys):
    """Each is that of its lines alone, also those without one; it may be any text, and is printed safely."""
    names = ["easy", "hard", "easy", None, "a\x1b[2J"]
    rows = [*PAIRS, {"prompt": "", "chosen": "n", "rejected": "yes"},
            {"prompt": "q", "chosen": "x", "rejected": "yy"}]
    alone = {}
    for name in dict.fromkeys(names):
        some = [row for row, its in zip(rows, names, strict=True) if its == name]
        (line,) = summary(rm, tmp_path, some, capsys)
        alone[name] = line.removeprefix("accuracy ")
    assert len(set(alone.values())) > 2 and "on 3 pairs of 5 texts" in alone["easy"]
    both = [row | {"subset": name} for row, name in zip(rows, names, strict=True)]
    assert summary(rm, tmp_path, both, capsys) == [
        *summary(rm, tmp_path, rows, capsys), f"  no subset: {alone[None]}",
        f"  a\\x1b[2J: {alone[names[-1]]}", f"  easy: {alone['easy']}", f"  hard: {alone['hard']}"]


def test_what_does_not_fit_is_in_no_subset(rm, tmp_path, capsys):
    found = summary(rm, tmp_path, [PAIRS[0] | {"subset": "fits"}, {
        "prompt": "x", "chosen": "g" * 64, "rejected": "bad", "subset": "long"}], capsys)
    assert [line.split(":")[0] for line in found[1:]] == ["  fits"] and "1 pairs of 2 texts" in found[0]


def test_mistakes_are_one_sentence(rm, tmp_path):
    run(rm, tmp_path, PAIRS)
    with pytest.raises(UserError, match="out.jsonl already exists"):
        run(rm, tmp_path, PAIRS)
    with pytest.raises(UserError, match=r'in.jsonl:1: "subset" must be a string'):
        run(rm, tmp_path, [PAIRS[0] | {"subset": 3}], out=None)
    for row in ({"prompt": "p", "responses": ["a", "b"], "rank": [2, 1]},
                {"prompt": "p", "chosen": "a", "rejected": "b", "preferred": "rejected"},
                {"prompt": "p", "chosen": "a", "rejected": "b", "response": "a"}):
        with pytest.raises(UserError, match=r"in.jsonl:1: "):
            run(rm, tmp_path, [row], out=None)
    bad = [*PAIRS, {"prompt": "p"}]
    with pytest.raises(UserError, match=r"in.jsonl:4: column \"completion\" is missing"):
        run(rm, tmp_path, bad, out=None)
    made = run(rm, tmp_path, bad, out=tmp_path / "out2.jsonl", skip_bad=True)
    assert made == lines(tmp_path / "out.jsonl") and len(lines(tmp_path / "out2.jsonl")) == 3
    done = subprocess.run([sys.executable, "-m", "tools.score", "--rm", str(rm), str(tmp_path / "no.jsonl"),
                           "--device", str(CPU)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == f"tools.score: {tmp_path / 'no.jsonl'} is missing\n"
