"""HH: small files in the source's format, and the real test file where available."""
import gzip
import json
import os
from pathlib import Path

import pytest

from data import hh
from data.convert import FILES
from data.records import read_preferences, read_prompts, read_sft

pytestmark = pytest.mark.slow

REAL = Path(__file__).resolve().parents[2] / "shared/data/hh/harmless-base-test.jsonl.gz"


def talk(*turns):
    """Alternating turns of human and assistant in the source's format."""
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))


def line(*turns, chosen="yes", rejected="no"):
    return {"chosen": talk(*turns, chosen), "rejected": talk(*turns, rejected)}


def many(n, start=0):
    return [line(f"question {i}") for i in range(start, start + n)]


def pack(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def run(target, *sources):
    return hh.main(["--from", *map(str, sources), "--to", str(target)])


def load(folder):
    return {name: [json.loads(x) for x in (folder / name).read_text("utf-8").splitlines()] for name in FILES}


def error(capsys, target, *sources):
    """The one-sentence error of a command that fails and writes nothing."""
    assert run(target, *sources) == 1
    says = capsys.readouterr().err
    assert says.startswith("error: ") and says.count("\n") == 1 and not target.exists()
    return says


def test_train_and_test_files(tmp_path, capsys):
    train = [line("hi", "hello", "so?"), line("hi", "hello", "so?", rejected="never"), line("why")]
    files = pack(tmp_path / "train.jsonl", train), pack(tmp_path / "test.jsonl.gz", [line("who")])
    assert run(tmp_path / "out", *files) == 0
    prompts = ["\n\nHuman: hi\n\nAssistant: hello\n\nHuman: so?\n\nAssistant:",
               "\n\nHuman: why\n\nAssistant:"]
    pairs = [(prompts[0], " yes", " no"), (prompts[0], " yes", " never"), (prompts[1], " yes", " no")]
    data = load(tmp_path / "out")
    assert [tuple(x.values()) for x in data["preferences.jsonl"]] == pairs
    assert data["sft.jsonl"] == [{"prompt": p, "completion": " yes"} for p in prompts]
    assert data["prompts.jsonl"] == [{"prompt": p} for p in prompts]
    assert data["prompts_val.jsonl"] == [{"prompt": "\n\nHuman: who\n\nAssistant:"}]
    assert read_preferences(tmp_path / "out/preferences.jsonl")[0][:2] == (pairs[0][0], [" yes", " no"])
    assert read_sft(tmp_path / "out/sft_val.jsonl")
    assert read_prompts(tmp_path / "out/prompts.jsonl") == prompts
    converted = read_preferences(tmp_path / "out/preferences.jsonl")
    assert read_preferences(files[0]) == converted  # the source is readable without conversion
    assert "dropped" not in capsys.readouterr().out


def test_drops_are_counted_by_reason_with_their_place(tmp_path, capsys):
    same = line("q 1", chosen="a", rejected="a")
    bad = [line("q"), b"{", b"[]", same, line("q 2", rejected=" "), {"chosen": talk("q 3", "a")},
           line("q 4", "a", chosen="b"),
           {"chosen": talk("x", "a"), "rejected": talk("y", "a")}, {"chosen": "a b", "rejected": "a c"},
           {"chosen": talk("x", "a", "b", "c"), "rejected": talk("x", "a", "d", "c")}, line("q"), same,
           {"chosen": talk("x", "a"), "rejected": 3}, b'{"chosen": "\xff"}', b"  "]
    file = pack(tmp_path / "train.jsonl", bad)
    assert run(tmp_path / "out", file, pack(tmp_path / "test.jsonl", many(3))) == 0
    out = capsys.readouterr().out
    for count, reason, first in [(1, "not JSON", 2), (1, "not a JSON object {...}", 3), (1, "not UTF-8", 14),
                                 (2, "two responses are identical", 4), (1, "a response is empty", 5),
                                 (1, 'column "rejected" is missing', 6),
                                 (2, "the last turn is not the assistant's", 7),
                                 (2, '"chosen" and "rejected" do not share a prompt', 8),
                                 (1, "duplicate pair", 11), (1, '"rejected" must be a string', 13)]:
        assert f"dropped {count}: {reason} (first: {file}:{first})" in out
    assert len(load(tmp_path / "out")["preferences.jsonl"]) == 1


def test_one_file_is_split_by_conversation(tmp_path, capsys):
    lines = many(400) + [line(f"Question  {i}", "a", "more") for i in range(400)]
    assert run(tmp_path / "out", pack(tmp_path / "train.jsonl.gz", lines)) == 0
    assert "5% of the conversations are held out" in capsys.readouterr().out
    assert run(tmp_path / "turned", pack(tmp_path / "test.jsonl.gz", lines[::-1])) == 0
    first = load(tmp_path / "out")
    for side in (".jsonl", "_val.jsonl"):
        turned = load(tmp_path / "turned")["prompts" + side]
        assert sorted(map(str, turned)) == sorted(map(str, first["prompts" + side]))
    numbers = [{x["prompt"].split("\n\n")[1].split()[-1] for x in first["preferences" + side]} for side in
               (".jsonl", "_val.jsonl")]
    assert not numbers[0] & numbers[1] and len(numbers[0]) + len(numbers[1]) == 400
    assert 8 < len(numbers[1]) < 40
    assert len(first["preferences_val.jsonl"]) == 2 * len(numbers[1])


def test_no_conversation_of_the_test_file_is_trained_on(tmp_path, capsys):
    train = pack(tmp_path / "train.jsonl", many(5) + [line("Shared  one", "a", "b"), line("who")])
    test = pack(tmp_path / "test.jsonl", [line("shared one"), line("who")])
    assert run(tmp_path / "out", train, test) == 0
    out, data = capsys.readouterr().out, load(tmp_path / "out")
    assert f"dropped 1: to train, but the conversation is held out (first: {train}:6)" in out
    assert f"dropped 1: duplicate pair (first: {train}:7)" in out
    assert [len(data[name]) for name in ("preferences.jsonl", "preferences_val.jsonl")] == [5, 2]


def test_folder_gives_the_files_of_the_subsets(tmp_path, capsys):
    for subset in ("helpful-base", "helpful-online", "red-team-attempts"):
        pack(tmp_path / "hh" / subset / "train.jsonl.gz", [line(f"train {subset}")])
        pack(tmp_path / "hh" / subset / "test.jsonl.gz", [line(f"test {subset}")])
    assert run(tmp_path / "out", tmp_path / "hh") == 0
    prompts = [x["prompt"] for x in load(tmp_path / "out")["prompts.jsonl"]]
    assert prompts == ["\n\nHuman: train helpful-base\n\nAssistant:"]
    args = ["--from", str(tmp_path / "hh"), "--to", str(tmp_path / "two"), "--subset", "helpful-online",
            "helpful-base"]
    assert hh.main(args) == 0 and len(load(tmp_path / "two")["preferences.jsonl"]) == 2
    (tmp_path / "empty").mkdir()
    assert "contains no .jsonl" in error(capsys, tmp_path / "none", tmp_path / "empty")


def test_bad_source_files(tmp_path, capsys):
    whole = pack(tmp_path / "a.jsonl.gz", many(500)).read_bytes()
    bad = tmp_path / "bad.jsonl.gz"
    for raw, says in [(whole[:-9], "is a truncated .gz file"),
                      (whole[: len(whole) // 2], "is a truncated .gz file"),
                      (b"hello " * 9, "is not a .gz"), (b"", "is empty"), (gzip.compress(b""), "is empty"),
                      (whole[:200] + b"\xff" * 50 + whole[250:], "is not a .gz file, or is corrupt")]:
        bad.write_bytes(raw)
        said = error(capsys, tmp_path / "out", bad)
        assert says in said and str(bad) in said
    assert "No such file" in error(capsys, tmp_path / "out", tmp_path / "nowhere.jsonl.gz")
    assert "too few pairs in" in error(capsys, tmp_path / "out", pack(tmp_path / "a.jsonl", [b"{"]))


def test_an_existing_folder_is_left_alone(tmp_path, capsys):
    file = pack(tmp_path / "a.jsonl", many(200))
    assert run(tmp_path / "out", file) == 0 and run(tmp_path / "out", tmp_path / "nowhere") == 0
    assert "is already complete" in capsys.readouterr().out
    (tmp_path / "out/sft.jsonl").unlink()
    assert run(tmp_path / "out", file) == 1 and "exists and is not" in capsys.readouterr().err
    assert not (tmp_path / "out/sft.jsonl").exists()


def test_no_partial_folder_is_left(tmp_path, monkeypatch):
    file = pack(tmp_path / "in" / "a.jsonl", many(200))
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(tmp_path / "there" / "out", file) == 130
    assert list((tmp_path / "there").iterdir()) == []


def test_a_data_set_of_other_subsets_is_refused(tmp_path, capsys):
    file = pack(tmp_path / "in" / "a.jsonl", many(200))
    assert run(tmp_path / "out", file) == 0
    assert hh.main(["--subset", "helpful-online", "--to", str(tmp_path / "out")]) == 1
    assert "was made from files, not from helpful-online" in capsys.readouterr().err
    folder = pack(tmp_path / "helpful-base" / "train.jsonl", many(200)).parent
    for subsets in ([], ["--subset", "harmless-base", "helpful-base"]):  # their order does not matter
        assert hh.main(["--from", str(folder), "--to", str(tmp_path / "two"), *subsets]) == 0
    assert hh.main(["--from", str(folder), "--to", str(tmp_path / "two"), "--subset", "helpful-base"]) == 1
    assert "was made from harmless-base helpful-base, not from helpful-base;" in capsys.readouterr().err


@pytest.mark.parametrize("place, source", [
    ("helpful-base/train.jsonl", "helpful-base"), ("any/helpful-base.jsonl", "any"),
    ("any/helpful-base/train.jsonl", "any"), ("helpful-base/train.jsonl", ".")])
def test_where_a_subset_may_be_named(tmp_path, monkeypatch, place, source):
    pack(tmp_path / place, many(200))
    monkeypatch.chdir(tmp_path / "helpful-base" if source == "." else tmp_path)
    assert run(tmp_path / "out", source) == 0


@pytest.mark.parametrize("body", [gzip.compress(bytes(5000))[:-9], b"<html>log in</html>",
                                  gzip.compress(b"<html>log in</html>")])
def test_a_download_that_is_not_the_file_is_not_kept(tmp_path, monkeypatch, capsys, body):
    (tmp_path / "web/helpful-base").mkdir(parents=True)
    (tmp_path / "web/helpful-base/train.jsonl.gz").write_bytes(body)
    monkeypatch.setattr(hh, "URL", (tmp_path / "web").as_uri())
    assert hh.main(["--to", str(tmp_path / "d" / "hh")]) == 1
    assert "train.jsonl.gz is not the expected file and was deleted" in capsys.readouterr().err
    assert not [path for path in (tmp_path / "d").rglob("*") if path.is_file()]


def test_a_folder_with_a_similar_name_is_not_a_subset(tmp_path, capsys):
    pack(tmp_path / "helpful-base-stuff" / "helpful-online" / "train.jsonl", many(200))
    assert run(tmp_path / "out", tmp_path / "helpful-base-stuff") == 1
    assert "contains no .jsonl or .jsonl.gz file of helpful-base or harmless-base" in capsys.readouterr().err


def test_downloads_both_sides_of_the_subsets_once(tmp_path, monkeypatch):
    for subset in ("helpful-base", "harmless-base"):
        for side in ("train", "test"):
            pack(tmp_path / "web" / subset / f"{side}.jsonl.gz", [line(f"{side} {subset}")])
    monkeypatch.setattr(hh, "URL", (tmp_path / "web").as_uri())
    assert hh.main(["--to", str(tmp_path / "d" / "hh")]) == 0
    assert [len(load(tmp_path / "d/hh")[name]) for name in ("sft.jsonl", "sft_val.jsonl")] == [2, 2]
    assert (tmp_path / "d/hh_raw/harmless-base/test.jsonl.gz").exists()
    monkeypatch.setattr(hh, "URL", "file:///nowhere")
    (tmp_path / "d/hh").rename(tmp_path / "first")
    assert hh.main(["--to", str(tmp_path / "d" / "hh")]) == 0
    assert load(tmp_path / "d/hh") == load(tmp_path / "first")


def test_no_network_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hh, "URL", "http://127.0.0.1:1")
    assert hh.main(["--to", str(tmp_path / "out")]) == 1
    says = capsys.readouterr().err
    assert "can't download http://127.0.0.1:1/helpful-base/train.jsonl.gz" in says and "--from" in says
    assert list(tmp_path.iterdir()) == []


def test_real_file(tmp_path, capsys):
    if not REAL.exists():
        pytest.skip(f"no {REAL}")
    assert run(tmp_path / "out", REAL) == 0
    out, data = capsys.readouterr().out, load(tmp_path / "out")
    assert f"dropped 4: a response is empty (first: {REAL}:87)" in out
    assert f'dropped 5: "chosen" and "rejected" do not share a prompt (first: {REAL}:1255)' in out
    train, val = (data["preferences" + side] for side in (".jsonl", "_val.jsonl"))
    assert len(train) + len(val) == 2312 - 9 and 80 < len(val) < 160
    source = {(r["chosen"], r["rejected"]) for r in map(json.loads, gzip.open(REAL))}
    for x in train + val:
        assert (x["prompt"] + x["chosen"], x["prompt"] + x["rejected"]) in source
        assert x["prompt"].endswith("\n\nAssistant:") and x["chosen"].strip() and x["rejected"].strip()
    opening = [{x["prompt"].split("\n\nAssistant:")[0] for x in side} for side in (train, val)]
    assert not opening[0] & opening[1]
