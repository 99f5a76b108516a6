"""Data of the user's: held out by --val-fraction; --sft and --rm; the responses that PPO writes."""
import json
import os
import random
import shutil

import pytest
from helpers import BYTES, PPO, SIZES, jsonl, lines, make_data

import ppo
import train_rm
import train_sft
from data import split
from data.files import UserError
from data.records import read_preferences, read_prompts, read_sft
from data.split import held_out, read_split, read_training
from lib import report
from lib.flags import Shared, check_pairs, flags

WORDS = "a the cat dog sees likes red big and film plot".split()


def some_texts(n, seed=0):
    rng = random.Random(seed)
    return [" ".join(rng.choice(WORDS) for _ in range(6)) + f" {i}" for i in range(n)]


# ---- the hash ----

def test_a_text_is_always_on_the_same_side():
    texts = some_texts(4000)
    out = [text for text in texts if held_out(text, 0.1)]
    assert 0.08 < len(out) / len(texts) < 0.12
    assert set(out) < {text for text in texts if held_out(text, 0.2)}  # a larger share only adds some
    assert all(held_out(f"  {text.upper()}\n".replace(" ", "  "), 0.1) for text in out)
    assert not any(held_out(text, 0) for text in texts) and all(held_out(text, 1) for text in texts)


def test_a_prompt_is_on_one_side_in_all_three_files(tmp_path):
    prompts = some_texts(60)
    jsonl(tmp_path / "sft.jsonl", [{"prompt": p, "completion": f" {i}"} for p in prompts for i in (1, 2)])
    jsonl(tmp_path / "preferences.jsonl", [{"prompt": p, "responses": ["x", "y", "z"]} for p in prompts])
    jsonl(tmp_path / "prompts.jsonl", [{"prompt": p} for p in reversed(prompts)])
    cfg = Shared(val_fraction=0.2)
    sides = []
    for name, read in (("sft", read_sft), ("preferences", read_preferences), ("prompts", read_prompts)):
        parts = read_split(read, tmp_path / f"{name}.jsonl", cfg)
        sides.append([{x if name == "prompts" else x[0] for x in part} for part in parts])
        assert sum(map(len, parts)) == (120 if name == "sft" else 60)
        assert read_training(read, tmp_path / f"{name}.jsonl", cfg) == parts[0]
    assert sides[0] == sides[1] == sides[2]
    train, val = sides[0]
    assert not train & val and train | val == set(prompts) and 4 < len(val) < 25


def test_rankings_without_a_prompt_share_no_response_across_the_sides():
    texts, rng = some_texts(80), random.Random(1)
    rankings = [("", rng.sample(texts, 4), [0, 1, 1, 2], [3, 2, 2, 1], None) for _ in range(150)]
    train, val, lost = split.split(rankings, 0.1)
    used = [{text for ranking in side for text in ranking[1]} for side in (train, val)]
    assert val and train and not used[0] & used[1]
    assert len(train) + len(val) + lost == 150 and lost == sum(
        len({r for t, r in zip(x[1], x[2], strict=True) if t not in used[1]}) < 2
        for x in rankings if x not in val)
    assert all(len(r) == len(ranks) == len(gold) > 1 for _, r, ranks, gold, _ in train)
    for _, _, ranks, gold, _ in train:  # what is left keeps its rank and its gold
        assert all((rank, g) in ((0, 3), (1, 2), (2, 1)) for rank, g in zip(ranks, gold, strict=True))
    pairs = [("", [f"{i} a", f"{i} b"], [0, 1], None, None) for i in range(200)]
    train, val, lost = split.split(pairs, 0.1)
    assert lost == 0 and len(train) + len(val) == 200 and 8 < len(val) < 35


def test_with_a_prompt_a_response_may_be_on_both_sides():
    rankings = [(f"prompt {i}", ["yes", "no"], [0, 1], None, None) for i in range(200)]
    train, val, lost = split.split(rankings, 0.1)
    assert lost == 0 and len(train) + len(val) == 200


def test_what_val_fraction_says(tmp_path, capsys):
    path = tmp_path / "sft.jsonl"
    with pytest.raises(UserError, match=r"sft.jsonl is missing$"):
        read_split(read_sft, path, Shared())
    jsonl(path, [{"text": text} for text in some_texts(100)])
    with pytest.raises(UserError, match=r"sft_val.jsonl is missing; --val-fraction 0.05 would hold out that "
                                        r"share of sft.jsonl"):
        read_split(read_sft, path, Shared())
    train, val = read_split(read_sft, path, Shared(val_fraction=0.1))
    assert f"{path}: {len(val)} of 100 examples held out by their text" in capsys.readouterr().out
    jsonl(path, [{"text": "one"}, {"text": "two"}])
    with pytest.raises(UserError, match="--val-fraction 0.01 would hold out 0 of the 2 examples"):
        read_split(read_sft, path, Shared(val_fraction=0.01))
    jsonl(tmp_path / "sft_val.jsonl", [{"text": "three"}])
    assert read_split(read_sft, path, Shared()) == ([("", "one"), ("", "two")], [("", "three")])
    assert capsys.readouterr().out == ""
    assert read_split(read_sft, path, Shared(val_fraction=0.5))[1] == [("", "three")]
    assert "is held out; --val-fraction is not needed" in capsys.readouterr().out
    assert len(read_training(read_sft, path, Shared(val_fraction=0.5))) == 2


# ---- runs ----

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with data, and in out/ an SFT model and a reward model that were made elsewhere."""
    folder = tmp_path_factory.mktemp("own")
    make_data(folder / "data")
    where = {"data": str(folder / "data"), "out": str(folder / "a")}
    train_sft.main(train_sft.Config(**where, **SIZES, epochs=0.5))
    (folder / "b").mkdir()
    train_rm.main(train_rm.Config(data=where["data"], out=str(folder / "b"), sft=str(folder / "a/sft.pt"),
                                  epochs=0.5, batch_tokens=512, max_new_tokens=8, device="cpu"))
    return folder


def run_ppo(folder, out, **more):
    ppo.main(ppo.Config(**{"data": str(folder / "data"), "out": str(out), "sft": str(folder / "a/sft.pt"),
                           "rm": str(folder / "b/rm.pt"), **PPO, "show": 0} | more))


@pytest.mark.slow
def test_val_fraction_in_all_three_scripts(tmp_path, capsys, monkeypatch):
    shipped, asked = train_rm.sample_texts, []
    monkeypatch.setattr(train_rm, "sample_texts",
                        lambda gpt, prompts, *rest: asked.extend(prompts) or shipped(gpt, prompts, *rest))
    make_data(tmp_path / "data", n=120)
    for path in (tmp_path / "data").glob("*_val.jsonl"):
        path.unlink()
    where = {"data": str(tmp_path / "data"), "out": str(tmp_path / "out")}
    with pytest.raises(UserError, match="sft_val.jsonl is missing; --val-fraction"):
        train_sft.main(train_sft.Config(**where, **SIZES))
    where["val_fraction"] = 0.2
    train_sft.main(train_sft.Config(**where, **SIZES, epochs=0.5))
    train_rm.main(train_rm.Config(**where, epochs=0.5, batch_tokens=512, max_new_tokens=8, device="cpu"))
    ppo.main(ppo.Config(**where, **PPO, show=0, ptx_coef=0.1))
    said = capsys.readouterr().out
    for name in ("sft", "preferences", "prompts"):
        assert f"{name}.jsonl: " in said
    assert asked and not any(held_out(BYTES.decode(prompt), 0.2) for prompt in asked)  # scores are normalised
    held = {row["prompt"] for row in lines(tmp_path / "out/ppo.samples.jsonl")}
    assert held and all(held_out(prompt, 0.2) for prompt in held)


@pytest.mark.slow
def test_sft_and_rm_are_read_where_they_are(made, tmp_path):
    assert not (made / "b/sft.pt").exists()
    run_ppo(made, tmp_path / "c")
    assert not (tmp_path / "c/sft.pt").exists() and not (tmp_path / "c/rm.pt").exists()
    copied = tmp_path / "d"
    copied.mkdir()
    shutil.copy(made / "a/sft.pt", copied)
    shutil.copy(made / "b/rm.pt", copied)
    run_ppo(made, copied, sft="", rm="")
    for name in ("ppo.samples.jsonl", "ppo.pt"):
        assert (tmp_path / "c" / name).read_bytes() == (copied / name).read_bytes()
    with pytest.raises(UserError, match="nowhere/sft.pt is missing"):
        run_ppo(made, tmp_path / "e", sft="nowhere/sft.pt")
    with pytest.raises(UserError, match="holds a GPT; expected a RewardModel"):
        run_ppo(made, tmp_path / "f", rm=str(made / "a/sft.pt"))


@pytest.mark.slow
def test_sft_and_rm_are_inputs_of_the_run(made, tmp_path, monkeypatch):
    stop = type("Stop", (Exception,), {})

    def stopped(*args):
        raise stop
    monkeypatch.setattr(report.Warnings, "look", stopped)
    shutil.copy(made / "a/sft.pt", tmp_path / "sft.pt")
    shutil.copy(made / "b/rm.pt", tmp_path / "rm.pt")
    files = {"sft": str(tmp_path / "sft.pt"), "rm": str(tmp_path / "rm.pt")}
    with pytest.raises(stop):
        run_ppo(made, tmp_path / "out", **files, save_every=1)
    monkeypatch.setattr(ppo.Run, "after", lambda run, step, *last: run.save_state(step) or stopped())
    monkeypatch.setattr(report.Warnings, "look", lambda *args: None)
    with pytest.raises(stop):
        run_ppo(made, tmp_path / "out", **files)
    monkeypatch.undo()
    for name in ("sft", "rm"):
        other = train_rm.Config(data=str(made / "data"), out=str(tmp_path / "other"), seed=2, epochs=0.1,
                                sft=str(made / "a/sft.pt"), max_new_tokens=8, device="cpu")
        if name == "sft":
            with pytest.raises(UserError, match=r"sft.pt was not read|a/sft.pt was not read"):
                run_ppo(made, tmp_path / "out", **files | {"sft": str(made / "a/sft.pt")}, resume=True)
            continue
        train_rm.main(other)
        os.replace(tmp_path / "other/rm.pt", tmp_path / "rm.pt")
        with pytest.raises(UserError, match=r"rm.pt was a file with CRC"):
            run_ppo(made, tmp_path / "out", **files, resume=True)
        shutil.copy(made / "b/rm.pt", tmp_path / "rm.pt")
    run_ppo(made, tmp_path / "out", **files, resume=True)
    run_ppo(made, tmp_path / "whole", **files)
    for name in ("ppo.pt", "ppo.samples.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(UserError, match="choose another --out"):
        run_ppo(made, tmp_path / "out", sft=str(tmp_path / "out/ppo.pt"))


def test_rm_beside_reward_is_refused():
    with pytest.raises(UserError, match="--rm does nothing with --reward"):
        check_pairs(ppo.Config(reward="x.py:f", rm="rm.pt"))
    check_pairs(ppo.Config(rm="rm.pt"))


@pytest.mark.slow
def test_samples_hold_every_held_out_response_before_and_after(made, tmp_path):
    run_ppo(made, tmp_path, judge=str(made / "b/rm.pt"))
    rows = lines(tmp_path / "ppo.samples.jsonl")
    prompts = [row["prompt"] for row in lines(made / "data/prompts_val.jsonl")]
    assert [row["model"] for row in rows] == ["SFT", "PPO"] * len(prompts)
    assert [row["prompt"] for row in rows[::2]] == [row["prompt"] for row in rows[1::2]] == prompts
    assert all({"prompt", "response", "model", "score", "judge", "kl", "eos", "length"} == row.keys()
               for row in rows)
    reports = [line["report"] for line in lines(tmp_path / "ppo.log.jsonl") if "report" in line]
    for some, last in ((rows[::2], reports[0]), (rows[1::2], reports[-1])):
        for name in ("score", "judge", "kl", "eos", "length"):
            mean = sum(row[name] for row in some) / len(some)
            assert mean == pytest.approx(last[name], abs=1e-6)
    assert any(a["response"] != b["response"] for a, b in zip(rows[::2], rows[1::2], strict=True))
    assert all(row["kl"] == pytest.approx(0, abs=1e-5) for row in rows[::2])


def test_samples_with_gold_and_raw_and_of_fewer_prompts(made, tmp_path, monkeypatch):
    world = type("World", (), {"BEST": 1.0, "gold_score": staticmethod(lambda p, r: float(len(r)))})
    monkeypatch.setattr(ppo, "open_data", lambda name: (made / "data", world))
    (tmp_path / "r.py").write_text("def f(prompts, responses):\n    return [len(r) / 9 for r in responses]\n")
    run_ppo(made, tmp_path, reward=f"{tmp_path / 'r.py'}:f", rm="", eval_prompts=3, updates=1)
    rows = lines(tmp_path / "ppo.samples.jsonl")
    assert len(rows) == 6
    for row in rows:
        assert row["gold"] == len(row["response"]) and row["raw"] == pytest.approx(len(row["response"]) / 9)


@pytest.mark.slow
def test_samples_move_with_their_generation(made, tmp_path):
    for seed in (1, 2):
        run_ppo(made, tmp_path, seed=seed, updates=1)
        if seed == 1:
            first = (tmp_path / "ppo.samples.jsonl").read_bytes()
    assert (tmp_path / "ppo.samples.prev.jsonl").read_bytes() == first
    assert (tmp_path / "ppo.samples.jsonl").read_bytes() != first
    json.loads(first.splitlines()[0])


@pytest.mark.slow
def test_killed_while_it_finishes_samples_and_those_before_them_are_whole(made, tmp_path, monkeypatch):
    """At each call that moves a file: the run ends as it would have, and the generation before is kept."""
    flags, shipped = {"updates": 1, "save_every": 1}, os.replace
    for seed in (1, 2):
        run_ppo(made, tmp_path / str(seed), seed=seed, **flags)
    first, second = ((tmp_path / f"{seed}/ppo.samples.jsonl").read_bytes() for seed in (1, 2))
    for n in range(2, 40):
        out = tmp_path / f"killed{n}"
        shutil.copytree(tmp_path / "1", out)
        left = iter(range(n))

        def deadly(*paths, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            shipped(*paths)
        monkeypatch.setattr(os, "replace", deadly)
        try:
            run_ppo(made, out, seed=2, **flags)
            break
        except KeyboardInterrupt:
            monkeypatch.setattr(os, "replace", shipped)
        run_ppo(made, out, seed=2, **flags, resume=True)
        assert (out / "ppo.samples.jsonl").read_bytes() == second
        assert (out / "ppo.samples.prev.jsonl").read_bytes() == first
    assert n > 6


def test_the_legend_of_ppo_names_every_column_of_its_log(made, tmp_path):
    run_ppo(made, tmp_path, updates=1, judge=str(made / "b/rm.pt"), kl_target=1.0)
    names = {name for line in lines(tmp_path / "ppo.log.jsonl") for name in line.get("report", line)}
    text = flags(ppo.main, ppo.Config, report.LEGEND).format_help()
    legend = text[text.index("columns, while it trains"):]
    for name in names - {"config", "step", "update"}:
        name = name.removesuffix("_win_rate").removeprefix("best_of_4_")
        assert name in legend or name == "win_rate", name
    assert "columns, while" not in flags(train_sft.main, train_sft.Config).format_help()
