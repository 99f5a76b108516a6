"""Large files: their texts and tokens come from arrays kept beside them, and nothing else changes by it."""
import json
import os
import random
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import BYTES, PPO, ROOT, SIZES, jsonl, lines, make_data, same_weights

import ppo
import train_rm
import train_sft
from data import arrays, cache, records
from data.arrays import Lazy, Records, derived, open_records
from data.cache import FOLDER, digest
from data.examples import (
    encode_demonstrations,
    encode_prompts,
    encode_rankings,
    pad,
    row_sizes,
    standardise,
)
from data.files import UserError
from data.records import read_preferences, read_prompts, read_sft
from data.split import read_split, read_training
from data.tokenizer import END, train_tokenizer
from lib import baselines, start
from lib.baselines import Linear, ngram_losses
from lib.checkpoint import load, save
from lib.flags import Shared
from model import GPT, RewardModel

RM = {"batch_tokens": 512, "pool": "last", "epochs": 1.0, "dropout": 0.0, "lr": 5e-4, "device": "cpu"}
ODD = ["", " ", "a", "\n\nHuman: é?", f"one {END} two", END, "<|endof", "text|>", "日本語 😀", "\x00",
       "x" * 70, "a  b"]


@pytest.fixture
def large(monkeypatch):
    """Every file is a large one."""
    monkeypatch.setattr(arrays, "LARGE", 0)


def plain(made):
    """Whatever encode_* returns, as lists and numbers."""
    if isinstance(made, (Lazy, np.ndarray, list, tuple)):
        return [plain(x) for x in (made.tolist() if isinstance(made, np.ndarray) else made)]
    return made


def words(rng, most=12):
    return "".join(rng.choice([*ODD, " word", "ing", "."]) for _ in range(rng.randint(0, most)))


def random_rows(kind, rng, n=60):
    """Lines of sft, preferences or prompts with texts of all sorts."""
    rows = []
    while len(rows) < n:
        prompt = words(rng) + "?" * (kind == "prompts")
        if kind == "prompts":
            rows.append({"prompt": prompt})
        elif kind == "sft":
            rows.append({"prompt": "Q" + prompt, "completion": "c" + words(rng)})
        else:
            texts = [*{f"r{i}{words(rng)}" for i in range(rng.randint(2, 4))}]
            ranks = [0, *(rng.choice([1, 1.5, 2**70]) for _ in texts[1:])]
            gold = {"gold": [rng.choice([1, 0.1, -2]) for _ in texts]} if rng.random() < 0.5 else {}
            rated = {"ratings": sorted((rng.choice([3, 4.5]) for _ in texts), reverse=True)}
            if sorted(ranks) == ranks and rng.random() < 0.3:
                gold |= rated
            rows.append({"prompt": "Q" + prompt, "responses": texts, "ranks": ranks, **gold})
    return rows


READ = {"sft": read_sft, "preferences": read_preferences, "prompts": read_prompts}
ENCODE = {"sft": encode_demonstrations, "preferences": encode_rankings, "prompts": encode_prompts}


@pytest.fixture(params=[*READ])
def made(request, tmp_path):
    """(path of a file, what reads it, what encodes it)."""
    path = tmp_path / f"{request.param}.jsonl"
    jsonl(path, random_rows(request.param, random.Random(0)))
    return path, READ[request.param], ENCODE[request.param]


# ---- the same as lists ----

def test_records_are_what_the_reader_returns(made, large):
    path, read, _ = made
    wanted, got = read(path), open_records(read, path, False)
    assert isinstance(got, Records) and [*got] == wanted and got[3:9] == wanted[3:9] and got[-1] == wanted[-1]
    assert [type(x) for x in got] == [type(x) for x in wanted] and len(got) == len(wanted)
    with pytest.raises(IndexError):
        got[len(got)]


@pytest.mark.parametrize("room", [40, 60, 90, 400])
def test_rows_are_those_of_lists(made, large, room, capsys, monkeypatch):
    """Rows, prompts, order, texts, numbers; what is truncated and dropped, and what is said of it. In
    pieces, too."""
    path, read, encode = made
    monkeypatch.setattr(arrays, "PIECE", 200)
    wanted = plain(encode(read(path), BYTES, room, "name"))
    said = capsys.readouterr().out
    got = encode(open_records(read, path, False), BYTES, room, "name")
    assert plain(got) == wanted and capsys.readouterr().out == said
    assert said or room == 400
    assert isinstance(got, Lazy) and plain(got[::3]) == wanted[::3] and plain(got[-1]) == wanted[-1]
    if read is not read_prompts:
        assert row_sizes(got) == row_sizes([*got]) == [
            [len(row) for row in (one[1] if read is read_preferences else one[:1])] for one in wanted]


def test_nothing_fits(made, large):
    path, read, encode = made
    if read is not read_prompts:
        with pytest.raises(UserError, match="name: no example fits into 1 tokens"):
            encode(open_records(read, path, False), BYTES, 1, "name")


def test_rows_are_views_of_one_array(tmp_path, large):
    jsonl(path := tmp_path / "preferences.jsonl", random_rows("preferences", random.Random(1)))
    groups = encode_rankings(open_records(read_preferences, path, False), BYTES, 50, "")
    rows = [row for group in groups for row in group.rows]
    assert all(row.dtype == np.uint16 and row.base is rows[0].base and not row.flags.owndata for row in rows)


def test_many_texts_in_one_call_are_encoded_as_each_alone():
    rng, tokenizer = random.Random(0), train_tokenizer(["the word is in the word. " * 20], 280)
    for _ in range(200):
        texts = [words(rng) + "\ud800" * (rng.random() < 0.05) for _ in range(rng.randint(1, 9))]
        for one in (BYTES, tokenizer):
            wanted = [[*one.encode(text), one.eos] for text in texts]
            assert [x.tolist() for x in one.encode_all(texts)] == wanted, texts
    with pytest.raises(UserError, match="whitespace"):
        BYTES.encode_all(["a", " " * 300_000])


def test_a_large_vocabulary_fits():
    class Wide:
        vocab_size, eos = 70_000, 69_999

        class encoding:
            encode = staticmethod(lambda text, allowed_special: [69_998, 69_999] * text.count(END))
    wide = BYTES.encode_all.__func__(Wide, ["a", "b"])
    assert [x.tolist() for x in wide] == [[69_998, 69_999]] * 2


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_what_is_held_out_is_the_same(made, share, capsys, monkeypatch):
    path, read, encode = made
    cfg, results = Shared(val_fraction=share), []
    for size in (2**30, 0, 0):
        monkeypatch.setattr(arrays, "LARGE", size)
        sides = read_split(read, path, cfg)
        rows = [plain(encode(side, BYTES, 40, "")) for side in sides]
        results.append(([[*side] for side in sides], rows, [*read_training(read, path, cfg)],
                        capsys.readouterr().out))
        assert isinstance(sides[0], Records) == (size == 0)
    assert results[0] == results[1] == results[2]


def test_rankings_without_prompts_may_lose_responses(tmp_path, monkeypatch):
    texts = [f"text {i}" for i in range(30)]
    rng = random.Random(0)
    jsonl(tmp_path / "preferences.jsonl",
          [{"prompt": "", "responses": rng.sample(texts, 3)} for _ in range(60)])
    results = []
    for size in (2**30, 0):
        monkeypatch.setattr(arrays, "LARGE", size)
        sides = read_split(read_preferences, tmp_path / "preferences.jsonl", Shared(val_fraction=0.05))
        results.append([plain(encode_rankings(side, BYTES, 99, "")) for side in sides])
    assert results[0] == results[1]


def test_ratings_are_standardised_alike(tmp_path, monkeypatch):
    for name, rated in (("rated", True), ("not", False)):
        rows = [{"prompt": f"p{i % 9}", "responses": ["a", f"b{i % 4}"]}
                | ({"ratings": [i + 1, 0.5 * i]} if rated else {}) for i in range(40)]
        (tmp_path / name).mkdir()
        jsonl(path := tmp_path / name / "preferences.jsonl", rows)
        wanted = standardise(encode_rankings(read_preferences(path), BYTES, 99, ""))
        monkeypatch.setattr(arrays, "LARGE", 0)
        got = standardise(encode_rankings(open_records(read_preferences, path, False), BYTES, 99, ""))
        assert plain(wanted) == plain(got) and isinstance(got, Lazy) != rated


def run_all(data, out, **more):
    where = {"data": str(data), "out": str(out), **more}
    free = {"tokenizer": "", "block_size": None, "vocab_size": 270}  # for these there are rules
    train_sft.main(train_sft.Config(**where, **SIZES | free, epochs=1, bpe_dropout=0.3))
    train_rm.main(train_rm.Config(**where, **RM | {"bpe_dropout": 0.3}))
    ppo.main(ppo.Config(**where, **PPO, ptx_coef=0.5))


@pytest.mark.slow
@pytest.mark.parametrize("held", [False, True])
def test_all_stages_end_with_the_same_bits(tmp_path, monkeypatch, capsys, held):
    """From lists, from arrays that are made, and from arrays that are there."""
    make_data(tmp_path / "data")
    for path in (tmp_path / "data").iterdir():
        path.write_text(path.read_text() + "{\n")
        if held and "_val" in path.name:
            path.unlink()
    said = []
    for name, size in (("lists", 2**30), ("made", 0), ("there", 0)):
        monkeypatch.setattr(arrays, "LARGE", size)
        if name == "there":
            for module, what in ((arrays, "_write_texts"), (arrays, "_write_rows"), (start, "ranked_tokens"),
                                 (start, "train_tokenizer")):
                monkeypatch.setattr(module, what, lambda *args: pytest.fail("made again"))
        run_all(tmp_path / "data", tmp_path / name, skip_bad=True, val_fraction=0.2 if held else 0.0)
        text = capsys.readouterr().out.replace(f"/{name}/", "/")
        said.append([line for line in text.splitlines() if ":0" not in line and "tok_s" not in line])
    assert said[0] == said[1] == said[2]
    for stage, kind in (("sft", GPT), ("rm", RewardModel), ("ppo", GPT)):
        nets = [load(kind, tmp_path / name / f"{stage}.pt") for name in ("lists", "made", "there")]
        logs = [lines(tmp_path / name / f"{stage}.log.jsonl")[1:] for name in ("lists", "made", "there")]
        assert same_weights(nets[0], nets[1]) and same_weights(nets[0], nets[2])
        assert logs[0] == logs[1] == logs[2]


# ---- the cache ----

@pytest.fixture
def data(tmp_path, large):
    jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"prompt {i}"} for i in range(20)])
    return tmp_path / "prompts.jsonl"


@pytest.fixture
def work(monkeypatch):
    """What was made, not found: a list of names."""
    done = []
    for name in ("_write_texts", "_write_rows"):
        shipped = getattr(arrays, name)
        monkeypatch.setattr(arrays, name, lambda *args, name=name, shipped=shipped: (
            done.append(name.removeprefix("_write_")), shipped(*args)))
    return done


def use(path, tokenizer=BYTES, skip_bad=False, room=50):
    return plain(encode_prompts(open_records(read_prompts, path, skip_bad), tokenizer, room, "")), [
        *open_records(read_prompts, path, skip_bad)]


def test_what_is_there_is_not_made_again(data, work):
    first = use(data)
    assert work == ["texts", "rows"] and use(data) == first and work == ["texts", "rows"]
    assert sorted(os.listdir(data.parent / FOLDER)) == ["prompts.texts.zip", "prompts.tokens.zip"]
    assert use(data, room=8)[0] == [row[-8:] for row in first[0]] and len(work) == 2  # of any room


def test_nothing_is_stale(data, work, monkeypatch):
    use(data)
    text, was = data.read_text(), data.stat()
    data.write_text(text.replace("prompt 3", "prompt X"))  # as long, and as old
    os.utime(data, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert "prompt X" in use(data)[1] and work == ["texts", "rows"] * 2
    other = train_tokenizer(["prompt prompt prompt"], 270)
    assert [other.decode(row) for row in use(data, other)[0]][3] == "prompt X" and work[4:] == ["rows"]
    use(data, other, skip_bad=True)
    assert work[5:] == ["texts", "rows"]
    monkeypatch.setattr(arrays, "code", lambda: "another version")
    use(data, other, skip_bad=True)
    assert work[7:] == ["texts", "rows"]


def test_the_reader_is_part_of_the_key(tmp_path, large):
    jsonl(path := tmp_path / "lines.jsonl", [{"prompt": "p", "completion": "c"}])
    assert open_records(read_prompts, path, False)[0] == "p"
    assert open_records(read_sft, path, False)[0] == ("p", "c")


def test_the_code_is_part_of_the_key(monkeypatch, tmp_path):
    was = cache.code()
    (tmp_path / "records.py").write_text("changed")
    assert cache.code() == was
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "cache.py"))
    assert cache.code() != was
    now = cache.code()
    monkeypatch.setattr(cache, "version", lambda name: "0")
    assert cache.code() != now


def test_what_follows_belongs_to_its_examples_and_settings(data):
    all_of_them = open_records(read_prompts, data, False)
    half = arrays.pick(all_of_them, np.arange(20) % 2 == 0)
    for _ in range(2):
        assert derived(all_of_them, "n", lambda: np.array([len(all_of_them)]), 1).tolist() == [20]
        assert derived(half, "n", lambda: np.array([len(half)]), 1).tolist() == [10]
        assert derived(half, "n", lambda: np.array([7]), 2).tolist() == [7]
    assert derived(half, "n", lambda: np.array([0]), 2).tolist() == [7]  # from the cache
    assert derived([1, 2], "n", lambda: np.array([3])).tolist() == [3]


def test_the_size_of_the_ranked_texts_is_that_under_the_tokenizer(tmp_path, large, tiny):
    make_data(tmp_path)
    path, sizes = tmp_path / "preferences.jsonl", []
    path.write_text(path.read_text() * 2)
    for tokenizer in (BYTES, train_tokenizer(["xyz:abcabc" * 9], 280), BYTES):
        save(tmp_path / "sft.pt", tiny(vocab_size=tokenizer.vocab_size), tokenizer)
        cfg = train_rm.Config(data=str(tmp_path), max_new_tokens=8)
        cfg.given = set()
        train = start.start_rm(cfg, tmp_path / "sft.pt", tmp_path)[2]
        key = digest(train.key, train.index.tobytes(), "size", (tokenizer.spec(),))
        sizes.append(cache._load(tmp_path / FOLDER / "preferences.size.zip", key)["array"].tolist())
    assert sizes[0] == sizes[2] != sizes[1]
    assert sizes[0] == start.ranked_tokens(read_preferences(path), BYTES).tolist()
    texts = [prompt + text for prompt, some, *_ in read_preferences(path) for text in some]
    lengths = [len(text) + 1 for text in dict.fromkeys(texts)]
    mean = sum(lengths) / len(lengths)
    assert sizes[0] == [round(mean * len(texts)), round(mean * len(lengths))]
    assert len(texts) >= 2 * len(lengths)


def test_a_damaged_entry_is_noticed_and_made_anew(data, work):
    wanted, folder = use(data), data.parent / FOLDER
    for name in ("prompts.texts.zip", "prompts.tokens.zip"):
        whole = (folder / name).read_bytes()
        for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
            (folder / name).write_bytes(whole[:size])
            work.clear()
            assert use(data) == wanted and work
        (folder / name).write_bytes(whole + b"x" * 100_000)
        assert use(data) == wanted


def test_a_flipped_bit_is_noticed(data):
    """Of all in the file, one by one: either the entry is refused, or what it says is right."""
    wanted, file = use(data), data.parent / FOLDER / "prompts.tokens.zip"
    whole, refused = file.read_bytes(), 0
    key = json.loads(zipfile.ZipFile(file).read("about"))["key"]
    right = {name: x.tobytes() for name, x in cache._load(file, key).items()}
    for i in range(len(whole)):
        file.write_bytes(whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :])
        found = cache._load(file, key)
        refused += found is None
        assert found is None or {name: x.tobytes() for name, x in found.items()} == right
    assert refused > len(whole) // 2
    file.write_bytes(b"")
    assert use(data) == wanted


@pytest.mark.parametrize("before", ["another entry", "a byte"])
def test_an_archive_that_does_not_begin_the_file_is_another(data, work, before):
    """zipfile finds its members all the same, where the places that are mapped are not."""
    old = use(data)[1]
    first = (data.parent / FOLDER / "prompts.texts.zip").read_bytes()
    data.write_text(data.read_text().replace("prompt 1", "answer 1"))
    new, path = use(data)[1], data.parent / FOLDER / "prompts.texts.zip"
    assert new != old
    path.write_bytes((first if before == "another entry" else b"x") + path.read_bytes())
    work.clear()
    assert use(data)[1] == new and "texts" in work


def test_two_processes_make_an_entry_once(data, tmp_path):
    """The second waits, and finds it."""
    count = tmp_path / "made"
    script = ("import sys, time; sys.path[:0] = sys.argv[3:]\n"
              "from pathlib import Path\n"
              "from data import arrays, records, stories\n"
              "arrays.LARGE, shipped = 1, arrays._write_texts\n"
              "def slow(*args):\n"
              "    open(sys.argv[2], 'a').write('x'); time.sleep(1); shipped(*args)\n"
              "arrays._write_texts = slow\n"
              "print(len(arrays.open_records(records.read_prompts, Path(sys.argv[1]), False)))\n")
    both = [subprocess.Popen([sys.executable, "-c", script, data, count, ROOT], stdout=subprocess.PIPE)
            for _ in range(2)]
    assert [one.communicate()[0] for one in both] == [b"20\n"] * 2 and count.read_text() == "x"


def test_an_entry_executes_nothing(data):
    use(data)
    for name in os.listdir(data.parent / FOLDER):
        with zipfile.ZipFile(data.parent / FOLDER / name) as archive:
            assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
            assert json.loads(archive.read("about"))["places"].keys() == {*archive.namelist()} - {"about"}
    assert "pickle" not in "".join(open(ROOT / "data/cache.py").read().split('"""')[2:])


def test_the_folder_may_be_deleted_while_it_is_read(data):
    found = open_records(read_prompts, data, False)
    rows = encode_prompts(found, BYTES, 50, "")
    for file in (data.parent / FOLDER).iterdir():
        file.unlink()
    (data.parent / FOLDER).rmdir()
    assert found[7] == "prompt 7" and bytes(rows[7].tolist()) == b"prompt 7"


def test_a_run_keeps_what_it_has_opened(data):
    """Though the file changes, and another run replaces the entries."""
    found = open_records(read_prompts, data, False)
    rows = encode_prompts(found, BYTES, 50, "")
    jsonl(data, [{"prompt": "other"}] * 30)
    assert use(data)[1] == ["other"] * 30
    assert found[7] == "prompt 7" and bytes(rows[7].tolist()) == b"prompt 7"


@pytest.mark.parametrize("how", ["a file", "full", "tokens"])
def test_without_a_place_for_it_all_is_lists(data, monkeypatch, capsys, how):
    data.write_text(data.read_text() + "{\n")
    if how == "a file":
        (data.parent / FOLDER).write_text("")
    else:
        shipped, name = zipfile.ZipFile.open, {"full": "at", "tokens": "ids"}[how]

        def full(archive, what, mode="r", *args, **more):
            if what == name and mode == "w":
                raise OSError(28, "No space left on device")
            return shipped(archive, what, mode, *args, **more)
        monkeypatch.setattr(zipfile.ZipFile, "open", full)
    found = open_records(read_prompts, data, True)
    assert isinstance(found, list) == (how != "tokens")
    assert encode_prompts(found, BYTES, 50, "")[7] == [*b"prompt 7"]
    assert capsys.readouterr().out.count("1 bad lines skipped") == 1
    if how != "a file":
        assert os.listdir(data.parent / FOLDER) == ["prompts.texts.zip"] * (how == "tokens")


def test_a_read_only_folder(data, monkeypatch):
    if os.geteuid() == 0:
        def refuse(path, *args, **more):
            raise PermissionError(13, "Permission denied")
        monkeypatch.setattr(cache.Path, "mkdir", refuse)
    data.parent.chmod(0o500)
    try:
        assert isinstance(open_records(read_prompts, data, False), list)
    finally:
        data.parent.chmod(0o700)


def test_a_file_that_changes_while_it_is_read_is_not_kept(data, monkeypatch):
    shipped = records.json_object

    def change(line):
        if b"prompt 9" in line:
            data.write_text(data.read_text() + '{"prompt": "late"}\n')
        return shipped(line)
    monkeypatch.setattr(records, "json_object", change)
    open_records(read_prompts, data, False)
    monkeypatch.setattr(records, "json_object", shipped)
    assert not (data.parent / FOLDER / "prompts.texts.zip").exists()
    assert open_records(read_prompts, data, False)[-1] == "late"


def test_messages_are_repeated(data, capsys):
    data.write_text(data.read_text() + '{\n{"prompt": "p", "note": 1}\n')
    said = []
    for _ in range(3):
        found = open_records(read_prompts, data, True)
        encode_prompts(found, BYTES, 5, "prompts.jsonl")
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] == said[2] and "1 bad lines skipped, 21 kept" in said[0]
    assert "ignored columns: note" in said[0] and "20 prompts truncated" in said[0]


def test_a_message_names_the_folder_as_it_is_now(data, capsys, work):
    data.write_text(data.read_text() + "{\n")
    use(data, skip_bad=True)
    said = capsys.readouterr().out
    moved = data.parent.rename(data.parent.with_name("moved")) / data.name
    use(moved, skip_bad=True)
    assert capsys.readouterr().out == said.replace(str(data), str(moved)) != said and len(work) == 2


def test_an_error_is_an_error_each_time(data, capsys):
    data.write_text(data.read_text() + "{\n")
    for _ in range(2):
        with pytest.raises(UserError, match=r"prompts.jsonl:21: not JSON"):
            open_records(read_prompts, data, False)
    assert os.listdir(data.parent / FOLDER) == []
    data.write_text("{\n")
    with pytest.raises(UserError, match="no examples"):
        open_records(read_prompts, data, True)
    assert capsys.readouterr().out.count("1 bad lines skipped, 0 kept") == 1
    with pytest.raises(UserError, match="is missing"):
        open_records(read_prompts, data.parent / "none.jsonl", False)
    with pytest.raises(UserError, match="can't be read"):
        open_records(read_prompts, data.parent, False)


def test_small_files_leave_no_folder(tmp_path):
    jsonl(tmp_path / "prompts.jsonl", [{"prompt": "p"}])
    assert open_records(read_prompts, tmp_path / "prompts.jsonl", False) == ["p"]
    assert not (tmp_path / FOLDER).exists()


# ---- rows as arrays ----

def test_pad_takes_lists_arrays_and_tuples():
    ids = np.array([5, 60_000, 7, 8], np.uint16)
    ids.flags.writeable = False
    tokens, lengths = pad([ids[:3], [1], (2, 3), torch.tensor([4])])
    assert tokens.tolist() == [[5, 60_000, 7], [1, 0, 0], [2, 3, 0], [4, 0, 0]] and tokens.dtype == torch.long
    assert lengths.tolist() == [3, 1, 2, 1]


def test_counts_in_pieces_are_counts_of_all(monkeypatch):
    rng = np.random.default_rng(0)
    rows = [(rng.integers(0, 60_000, n).astype(np.uint16), int(rng.integers(1, n)))
            for n in rng.integers(2, 40, 300)]
    rows += rows[:100]
    as_lists = [(row.tolist(), P) for row, P in rows]
    wanted = ngram_losses(as_lists, as_lists[:50], 60_000)
    monkeypatch.setattr(baselines, "AT_ONCE", 500)
    assert ngram_losses(rows, rows[:50], 60_000) == wanted == ngram_losses(as_lists, as_lists[:50], 60_000)


def test_regression_on_words_is_the_same(tmp_path, large, monkeypatch):
    monkeypatch.setattr(baselines, "MOST", 50)
    jsonl(path := tmp_path / "preferences.jsonl", random_rows("preferences", random.Random(2)))
    a, b = (Linear(encode_rankings(some, BYTES, 200, "")) for some in (
        read_preferences(path), open_records(read_preferences, path, False)))
    assert a.index == b.index and (a.weight == b.weight).all()


# ---- memory ----

SCRIPT = """
import re, sys
from pathlib import Path
from data import arrays
from data.examples import encode_rankings, row_sizes, standardise
from data.records import read_preferences
from data.tokenizer import get_tokenizer
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
arrays.LARGE, before = int(sys.argv[2]), peak()
found = arrays.open_records(read_preferences, Path(sys.argv[1]), False)
groups = encode_rankings(found, get_tokenizer("bytes"), 999, "")
sum(map(len, row_sizes(standardise(groups))))
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_memory_stays_small(tmp_path):
    """2,000,000 tokens of 8,000 pairs: lists of them take more than 16 MB even without a Python int each."""
    jsonl(path := tmp_path / "preferences.jsonl", [{"prompt": f"p {i} " + "x y " * 60, "chosen": "a " * 60,
                                                    "rejected": "b " * 60} for i in range(8_000)])
    took = [float(subprocess.run([sys.executable, "-c", SCRIPT, str(path), size], stdout=subprocess.PIPE,
                                 text=True, cwd=ROOT, check=True).stdout) for size in (str(2**40), "0", "0")]
    assert took[1] < took[0] / 2 and took[2] < took[0] / 4, took


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_pass_over_all_texts_gives_their_memory_back(tmp_path, large):
    jsonl(path := tmp_path / "prompts.jsonl", [{"prompt": f"{i} " + "x" * 10_000} for i in range(500)])
    found = open_records(read_prompts, path, False)

    def held():
        """Resident KB of the mapping."""
        name = str(path.parent / FOLDER / "prompts.texts.zip")
        maps = Path("/proc/self/smaps").read_text().split(name)[-1]
        return int(re.search(r"Rss:\s+(\d+)", maps)[1])
    assert sum(map(len, (found[i] for i in range(500)))) > 5_000_000 and held() > 4000
    most = max(held() for i, _ in enumerate(found) if i > 30 and i % 20 == 0)
    assert most < 1000 and held() < 1000


def test_progress_says_what_is_left(data, monkeypatch, capsys):
    monkeypatch.setattr("data.files.Progress.__call__", lambda self, text: self.say(text))
    monkeypatch.setattr(arrays, "PIECE", 40)
    jsonl(data, [{"prompt": f"prompt {i}"} for i in range(1500)])
    encode_prompts(open_records(read_prompts, data, False), BYTES, 50, "")
    said = capsys.readouterr().err
    assert "reading prompts.jsonl: 66%, 0 s left" in said and "encoding prompts.jsonl: 100%, 0 s left" in said
