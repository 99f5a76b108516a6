"""TL;DR: small files in the source's format."""
import json
import re

import pytest

from data import tldr
from data.convert import FILES
from data.records import read_preferences, read_prompts, read_sft

pytestmark = pytest.mark.slow


def post(i, **more):
    return {"id": f"t3_{i}", "subreddit": "tifu", "title": f"title {i}",
            "post": f"It was  day {i}.\nSo.\n"} | more


def told(i, **more):
    return post(i) | {"summary": f" summary {i} \n"} | more


def compared(i, split="train", choice=1, **more):
    return {"info": post(i), "summaries": [{"text": f" short {i}", "policy": "ref"}, {"text": f"long {i}\n"}],
            "choice": choice, "split": split, "worker": "w", "batch": "batch3", "extra": {}} | more


def prompt(i):
    return f"SUBREDDIT: r/tifu\n\nTITLE: title {i}\n\nPOST: It was  day {i}.\nSo.\n\nTL;DR:"


@pytest.fixture
def folder(tmp_path):
    """folder(name=lines, ...) -> a folder of source files."""
    def make(**files):
        place = tmp_path / "in"
        for name, lines in files.items():
            path = place / ("comparisons" if "batch" in name
                            else "") / (name + (".json" if "batch" in name else ".jsonl"))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n"
                                      for x in lines))
        return place
    return make


def run(target, *sources):
    return tldr.main(["--from", *map(str, sources), "--to", str(target)])


def load(place):
    return {path.name: [json.loads(x) for x in path.read_text("utf-8").splitlines()]
            for path in place.glob("*.jsonl")}


def test_all_six_files(folder, tmp_path, capsys):
    source = folder(train=[told(1), told(2), told(2, summary="other")], valid=[told(3)], test=[told(9)],
                    batch3=[compared(1), compared(2, choice=0)],
                    batch4=[compared(4, "valid1"), compared(5, "valid2")])
    assert run(tmp_path / "out", source) == 0
    data, out = load(tmp_path / "out"), capsys.readouterr().out
    assert data["sft.jsonl"] == [{"prompt": prompt(i), "completion": c} for i, c in
                                 ((1, " summary 1"), (2, " summary 2"), (2, " other"))]
    assert data["sft_val.jsonl"] == [{"prompt": prompt(3), "completion": " summary 3"}]
    assert data["prompts.jsonl"] == [{"prompt": prompt(1)}, {"prompt": prompt(2)}]
    assert data["prompts_val.jsonl"] == [{"prompt": prompt(3)}]
    assert data["preferences.jsonl"] == [{"prompt": prompt(1), "chosen": " long 1", "rejected": " short 1"},
                                         {"prompt": prompt(2), "chosen": " short 2", "rejected": " long 2"}]
    assert [x["prompt"] for x in data["preferences_val.jsonl"]] == [prompt(4), prompt(5)]
    assert set(data) == set(FILES) and "dropped" not in out and "not made" not in out
    assert len(read_sft(tmp_path / "out/sft.jsonl")) == 3
    assert len(read_prompts(tmp_path / "out/prompts.jsonl")) == 2
    assert read_preferences(tmp_path / "out/preferences.jsonl")[0][1] == [" long 1", " short 1"]


def test_drops_are_counted_by_reason_with_their_place(folder, tmp_path, capsys):
    source = folder(
        train=[told(1), told(1), told(2, summary=" \n"), {"id": "x"}, told(2, title=None), told(2, post=" "),
               b"{"],
        batch3=[compared(1), compared(1), compared(1, choice=2), compared(1, choice=True),
                compared(1, choice=None),
                compared(1, split="test"), compared(1, summaries=[{"text": "a"}, {"text": " a "}]),
                compared(1, summaries=[{"text": "a"}]), compared(1, summaries=["a", "b"]),
                compared(1, info=None),
                compared(1, summaries=[{"text": "a"}, {"text": ""}]),
                compared(1, summaries=[{"text": "a"}, {}]),
                compared(1, info={"id": "n", "article": "News.", "title": "t", "site": "cnn"})])
    assert run(tmp_path / "out", source) == 0
    out = capsys.readouterr().out
    batch, train = source / "comparisons/batch3.json", source / "train.jsonl"
    for count, reason, place in [
            (3, '"choice" must be 0 or 1', f"{batch}:3"),
            (1, '"split" must be train, valid1 or valid2', f"{batch}:6"),
            (1, "the two summaries are identical", f"{batch}:7"),
            (2, '"summaries" must be a list of two objects', f"{batch}:8"),
            (1, '"info" must be an object', f"{batch}:10"), (2, "a summary is empty", f"{batch}:11"),
            (1, 'column "text" is missing', f"{batch}:12"), (1, "a news article, not a post", f"{batch}:13"),
            (2, "duplicate example", f"{batch}:2"), (1, 'column "subreddit" is missing', f"{train}:4"),
            (1, '"title" must be a string', f"{train}:5"), (1, "the post is empty", f"{train}:6"),
            (1, "not JSON", f"{train}:7")]:
        assert f"dropped {count}: {reason} (first: {place})" in out
    data = load(tmp_path / "out")
    assert set(data) == {"sft.jsonl", "prompts.jsonl",
                         "preferences.jsonl"} and all(len(x) == 1 for x in data.values())


def test_no_post_is_both_trained_on_and_held_out(folder, tmp_path, capsys):
    """1: held out in valid.jsonl. 2: in valid1. 3: in valid2, worded differently. 4: not held out."""
    other = compared(3, "valid2", info=post(3, title="another", post="it was day 3. SO."))
    source = folder(train=[told(i) for i in (1, 2, 3, 4)], valid=[told(1)],
                    batch3=[compared(i) for i in (1, 2, 3, 4)] + [compared(2, "valid1"), other])
    assert run(tmp_path / "out", source) == 0
    data = load(tmp_path / "out")
    held = f"dropped 6: to train, but the post is held out (first: {source / 'train.jsonl'}:1)"
    assert held in capsys.readouterr().out
    for name in ("sft.jsonl", "prompts.jsonl", "preferences.jsonl"):
        assert [x["prompt"] for x in data[name]] == [prompt(4)]
    assert len(data["preferences_val.jsonl"]) == 2 and len(data["sft_val.jsonl"]) == 1
    sides = [{" ".join(re.findall(r"POST: (.*?)\n\nTL", x["prompt"], re.S)[0].lower().split())
              for name in data if ("_val" in name) == val for x in data[name]} for val in (False, True)]
    assert not sides[0] & sides[1]


@pytest.mark.parametrize("some, made", [
    ({"train": [told(1)]}, ["prompts.jsonl", "sft.jsonl"]),
    ({"valid": [told(1)]}, ["prompts_val.jsonl", "sft_val.jsonl"]),
    ({"batch5": [compared(1), compared(2, "valid2")]}, ["preferences.jsonl", "preferences_val.jsonl"])])
def test_some_of_the_source_files_make_some_of_the_files(folder, tmp_path, capsys, some, made):
    source = folder(**some)
    assert run(tmp_path / "out", *[path for path in source.rglob("*") if path.is_file()]) == 0
    assert sorted(load(tmp_path / "out")) == made
    out = capsys.readouterr().out
    for name in FILES:
        assert (f"{tmp_path / 'out' / name}: not made" in out) == (name not in made)


def test_wrong_sources_are_one_sentence(folder, tmp_path, capsys):
    source = folder(train=[b"{"], batch3=[], valid=[told(1)], notes=[told(2)])
    for place, says in [(source / "train.jsonl", "no example in"),
                        (source / "comparisons/batch3.json", "is empty"),
                        (source / "notes.jsonl", "is not train.jsonl, valid.jsonl or batchN.json"),
                        (source / "nowhere.json", "No such file"), (tmp_path / "none", "is not train.jsonl")]:
        assert run(tmp_path / "out", place) == 1
        said = capsys.readouterr().err
        assert says in said and str(place) in said and said.count("\n") == 1
        assert not (tmp_path / "out").exists()
    (tmp_path / "none").mkdir()
    assert run(tmp_path / "out",
               tmp_path / "none") == 1 and "contains no train.jsonl" in capsys.readouterr().err


def test_an_existing_folder_is_left_alone(folder, tmp_path, capsys):
    source = folder(train=[told(1)])
    assert run(tmp_path / "out", source) == 0 and run(tmp_path / "out", source) == 1
    assert "exists and is not this data set, or is incomplete" in capsys.readouterr().err
    source = folder(train=[told(1)], valid=[told(2)], batch3=[compared(3), compared(4, "valid1")])
    assert run(tmp_path / "all", source) == 0 and run(tmp_path / "all", source) == 0
    assert "is already complete" in capsys.readouterr().out


def test_downloads_all_parts_once(tmp_path, monkeypatch):
    for i, name in enumerate(tldr.SOURCE):
        path = tmp_path / "web" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(told(i) if "tldr_3" in name
                                   else compared(i, "valid1" if i == 5 else "train")))
    monkeypatch.setattr(tldr, "URL", (tmp_path / "web").as_uri())
    assert tldr.main(["--to", str(tmp_path / "d/tldr")]) == 0
    assert [len(load(tmp_path / "d/tldr")[f"preferences{side}.jsonl"]) for side in ("", "_val")] == [7, 1]
    assert len(list((tmp_path / "d/tldr_raw").iterdir())) == len(tldr.SOURCE) == 10
    monkeypatch.setattr(tldr, "URL", "file:///nowhere")
    (tmp_path / "d/tldr").rename(tmp_path / "first")
    assert tldr.main(["--to", str(tmp_path / "d/tldr")]) == 0
    assert load(tmp_path / "d/tldr") == load(tmp_path / "first")


def test_no_network_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tldr, "URL", "http://127.0.0.1:1")
    assert tldr.main(["--to", str(tmp_path / "out")]) == 1
    says = capsys.readouterr().err
    assert "can't download http://127.0.0.1:1/datasets/tldr_3_filtered/train.jsonl" in says
    assert "--from" in says
    assert list(tmp_path.iterdir()) == []
