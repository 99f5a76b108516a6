"""data/tokenizer.py: exact round trips, equality with a naive BPE, and every fault of a file."""
import base64
import gzip
import json
import os
import pathlib
import random
import re
from collections import Counter
from itertools import pairwise

import pytest
import tiktoken
import torch

from data import tokenizer
from data.files import UserError
from data.records import read_sft
from data.tokenizer import from_spec, get_tokenizer, main, save_bpe, train_bpe

pytestmark = pytest.mark.slow

CACHE = pathlib.Path(__file__).resolve().parents[2] / "shared" / "tiktoken"
TEXT = "low lower lowest, slow slower slowest; naïve 漢字漢字 👩‍👩‍👧 low low\n\n" * 3
NASTY = ["", " ", "\0", "\n", "\n\n\n\n\n", " \n \t\r\n  x", "a\0b", "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽",
         "e\u0301 \u0301 n\u0303\u0323",
         "שלום עולם، مرحبا \u202eabc\u202c", "漢字かな交じり文。한국어", "".join(map(chr, range(256))),
         "\ufeffx\u2028y\u2029z\x85", "\U0010ffff\ud7ff", "it's we'll  I'VE 123 4½", "a" * 5000,
         "<|endoftext|>", " <|endoftext|><|im_start|>"]
BYTES = [f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(256)]


def naive_bpe(words, n_merges):
    """The definition: count every pair in every word, merge the most frequent, start over."""
    words = [([bytes([b]) for b in word.encode()], n) for word, n in words.items()]
    merges = []
    for _ in range(n_merges):
        counts = Counter()
        for word, n in words:
            for pair in pairwise(word):
                counts[pair] += n
        best = min(counts, key=lambda pair: (-counts[pair], pair), default=None)
        if best is None or counts[best] < 2:
            break
        merges.append(best)
        words = [(naive_merge(word, best), n) for word, n in words]
    return merges


def naive_merge(word, pair):
    i, out = 0, []
    while i < len(word):
        step = 2 if tuple(word[i:i + 2]) == pair else 1
        out.append(b"".join(word[i:i + step]))
        i += step
    return out


def say(capsys):
    """The one line on stderr."""
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "Traceback" not in err
    return err


@pytest.fixture
def bpe(tmp_path):
    save_bpe(train_bpe([TEXT], 280), tmp_path / "my.bpe")
    return get_tokenizer(tmp_path / "my.bpe")


@pytest.fixture
def gpt2(monkeypatch):
    if not CACHE.is_dir():
        pytest.skip(f"gpt2 needs its files in {CACHE}")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(CACHE))
    return get_tokenizer("gpt2")


# ---- the Tokenizer ----

@pytest.mark.parametrize("text", NASTY)
def test_round_trip(bpe, text):
    for tok in (get_tokenizer("bytes"), bpe):
        ids = tok.encode(text)
        assert tok.decode(ids) == text
        assert tok.eos not in ids and all(type(i) is int and 0 <= i < tok.eos for i in ids)
    assert get_tokenizer("bytes").encode(text) == list(text.encode())


def test_sizes(bpe):
    tok = get_tokenizer("bytes")
    assert (tok.name, tok.vocab_size, tok.eos) == ("bytes", 257, 256)
    assert bpe.vocab_size == 280 and bpe.eos == 279 and bpe.name.endswith("my.bpe")


def test_decode_drops_eos_and_repairs_bytes(bpe):
    for tok in (get_tokenizer("bytes"), bpe):
        b = tok.encode("low")
        assert tok.decode([tok.eos] + b + [tok.eos] + b + [tok.eos]) == "lowlow"
        assert tok.decode(torch.tensor(b)) == tok.decode(iter(b)) == "low"
    tok = get_tokenizer("bytes")
    assert tok.decode([0xc3, 0x61, 0xff]) == "\ufffda\ufffd"
    assert tok.decode([0xc3, tok.eos, 0xa9]) == "é"
    for wrong in (257, -1):
        with pytest.raises(UserError, match=f"id {wrong} is not in bytes, which has 257 ids"):
            tok.decode([97, wrong])


def test_lone_surrogate_and_blanks(bpe):
    assert bpe.decode(bpe.encode("a\ud800b")) == "a\ufffdb"
    assert len(get_tokenizer("bytes").encode(" \n" * 100_000 + "x")) == 200_001
    with pytest.raises(UserError, match="whitespace characters in a row"):
        bpe.encode("\n" * 1_000_000 + "x")  # tiktoken would panic without our check


LONG_WORDS = ["ab" * 10_001, " " + "7" * 20_001, "!" * 20_001, "x " * 5_000 + "\u6f22" * 20_001 + " x",
              "a" * 20_001, "." * 20_000 + "a" * 20_001, "x, " * 6_666 + "a" * 20_001 + ".",
              "1" + "a" * 20_001, "\n-" + "a" * 20_001, "ab" * 300_000]


@pytest.mark.parametrize("text", LONG_WORDS, ids=lambda text: f"{text[:3]!r}, {len(text)}")
def test_a_long_word_is_refused(bpe, tmp_path, capsys, text):
    """tiktoken's time for a word grows with the square of its length: minutes for 600,000 characters."""
    says = "the text has a word of more than 20000 characters"
    with pytest.raises(UserError, match=f"^{says}$"):
        bpe.encode(text)
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "p", "completion": c}) for c in ("good", text)))
    with pytest.raises(UserError, match=f"{path}:2: {says}"):
        read_sft(path)
    assert read_sft(path, skip_bad=True) == [("p", "good")]
    capsys.readouterr()
    assert main(["train", "--out", str(tmp_path / "o"), str(path)]) == 1
    assert f"{path}:2: {says}" in say(capsys)


def test_texts_without_long_words_are_encoded_as_before(bpe):
    longest = "ab" * 10_000
    for text in (longest, f" {longest} {longest}\n{longest}", "a1!" * 20_000, "low " * 20_000, f"7{longest}!",
                 "it's" * 20_000):
        assert bpe.encode(text) == bpe.encoding.encode_ordinary(text)
        assert bpe.decode(bpe.encode(text)) == text


def test_prompt_and_completion_apart(bpe):
    apart = bpe.encode("lo") + bpe.encode("w lowest")
    assert apart != bpe.encode("low lowest")  # no merge crosses the boundary
    assert bpe.decode(apart) == "low lowest"


def test_spec_travels_in_a_checkpoint(bpe, tmp_path):
    for tok in (bpe, get_tokenizer("bytes")):
        torch.save({"tokenizer": tok.spec()}, tmp_path / "c.pt")
        (tmp_path / "my.bpe").unlink(missing_ok=True)  # the checkpoint alone must be enough
        spec = torch.load(tmp_path / "c.pt", weights_only=True)["tokenizer"]
        again = from_spec(spec)
        assert spec == tok.spec() == again.spec()
        assert all(type(x) in (str, int) for item in spec.items() for x in item)
        assert (again.name, again.vocab_size, again.eos) == (tok.name, tok.vocab_size, tok.eos)
        for text in NASTY + [TEXT]:
            assert again.encode(text) == tok.encode(text)


def test_gpt2(gpt2):
    assert (gpt2.name, gpt2.vocab_size, gpt2.eos) == ("gpt2", 50257, 50256)
    assert gpt2.encode("hello world") == [31373, 995]
    assert gpt2.decode([31373, 50256, 995]) == "hello world"
    old = from_spec({"name": "gpt2"})  # a checkpoint from before the ranks were in it
    assert old.spec() == gpt2.spec() and old.encode(" a") == from_spec(gpt2.spec()).encode(" a") == [257]
    for text in NASTY:
        assert gpt2.decode(gpt2.encode(text)) == text and gpt2.eos not in gpt2.encode(text)


def test_split_is_gpt2s(gpt2):
    theirs = tiktoken.get_encoding("gpt2")
    assert tokenizer.SPLIT == theirs._pat_str
    assert all(gpt2.encode(text) == theirs.encode_ordinary(text) for text in [*NASTY, TEXT])


def test_a_checkpoint_with_gpt2_needs_no_network(gpt2, monkeypatch):
    spec = gpt2.spec()

    def offline(name):
        raise OSError("no network")
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR"):
        get_tokenizer("gpt2")
    again = from_spec(spec)
    assert (again.name, again.vocab_size, again.eos, again.spec()) == ("gpt2", 50257, 50256, spec)
    assert again.encode(TEXT) == gpt2.encode(TEXT)


def test_gpt2_without_network(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens here
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    with pytest.raises(UserError, match="no network and no TIKTOKEN_CACHE_DIR.*bytes or a trained"):
        get_tokenizer("gpt2")


# ---- training ----

def test_merges_equal_naive_bpe(tmp_path):
    rng = random.Random(0)
    for trial in range(20):
        words = ["".join(rng.choices("aab", k=rng.randint(1, 9))) for _ in range(60)] + ["é漢"] * 3
        text = " ".join(words)
        counted = Counter(re.findall(r" ?\S+", text))
        merges = naive_bpe(counted, 43)
        ranks = train_bpe([text], 300)
        assert list(ranks)[256:] == [a + b for a, b in merges]
        assert list(ranks.values()) == list(range(len(ranks)))
        save_bpe(ranks, tmp_path / f"{trial}.bpe")
        tok, names = get_tokenizer(tmp_path / f"{trial}.bpe"), list(ranks)
        for word in counted:  # tiktoken applies the merges as training did
            pieces = [bytes([b]) for b in word.encode()]
            for pair in merges:
                pieces = naive_merge(pieces, pair)
            assert [names[i] for i in tok.encode(word)] == pieces


def test_training_is_deterministic_and_stops():
    ranks = train_bpe([TEXT], 280)
    assert list(ranks.items()) == list(train_bpe(iter([TEXT]), 280).items())
    assert list(ranks)[:256] == [bytes([i]) for i in range(256)] and len(ranks) == 279
    assert list(train_bpe([TEXT], 270)) == list(ranks)[:269]  # a smaller one is a prefix
    assert len(train_bpe(["abcd"], 300)) == 256  # no pair occurs twice
    assert list(train_bpe(["ab", "ab cd"], 300))[256:] == [b"ab"]
    assert len(train_bpe(["x\ud800"], 257)) == 256


def test_training_refuses():
    with pytest.raises(UserError, match="256 is below 257"):
        train_bpe([TEXT], 256)
    for texts in ([], [""]):
        with pytest.raises(UserError, match="nothing to train on"):
            train_bpe(texts, 300)


# ---- the BPE file ----

def test_file_form(bpe, tmp_path):
    lines = (tmp_path / "my.bpe").read_text().splitlines()
    assert len(lines) == 279 and lines[0] == "AA== 0"
    assert [int(line.split()[1]) for line in lines] == list(range(279))
    (tmp_path / "crlf.bpe").write_bytes("\r\n".join(reversed(lines)).encode())  # any order
    assert get_tokenizer(str(tmp_path / "crlf.bpe")).encode(TEXT) == bpe.encode(TEXT)
    assert sorted(os.listdir(tmp_path)) == ["crlf.bpe", "my.bpe"]  # no partial file left


@pytest.mark.parametrize("lines, fault", [
    ([], ":1: not a BPE file"),
    (["{"], ":1: not a BPE file"),
    (BYTES + ["", "YWI= 256"], ":257: not a BPE file"),
    (BYTES + ["YWI= 256 x"], ":257: not a BPE file"),
    (BYTES + ["YWI= -1"], ":257: not a BPE file"),
    (BYTES + ["YW= 256"], ":257: bad base64 'YW='"),
    (BYTES + ["YW*I= 256"], ":257: bad base64"),
    (BYTES + ["é 256"], ":257: bad base64"),
    (BYTES + ["YQ== 256"], ":257: duplicate token"),
    (BYTES + ["YWI= 7"], ":257: duplicate rank 7, as in line 8"),
    (BYTES + ["YWI= 258", "YWM= 256"], ":257: rank 258, but rank 257 is missing"),
    (BYTES[1:], ":255: rank 255, but rank 0 is missing"),
    (BYTES[:255], ": the single byte 0xff is not among ranks 0 to 255"),
    (["YWI= 0"] + [f"{line.split()[0]} {i + 1}" for i, line in enumerate(BYTES)],
     ": the single byte 0xff is not among"),
])
def test_bad_file(tmp_path, lines, fault):
    path = tmp_path / "bad.bpe"
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(f"{path}{fault}")):
        get_tokenizer(str(path))


def test_unreadable_file(tmp_path):
    (tmp_path / "binary").write_bytes(os.urandom(4) + b"\xff\0\n" * 9)
    for name, fault in [("no.bpe", "No such file"), ("", "Is a directory"), ("a\0b", "null byte"),
                        ("binary", ":1: not a BPE file")]:
        with pytest.raises(UserError, match=fault):
            get_tokenizer(str(tmp_path / name))


def test_save_refuses(bpe, tmp_path, monkeypatch):
    before = (tmp_path / "my.bpe").read_bytes()
    monkeypatch.chdir(tmp_path)
    for name, fault in [("my.bpe", "already exists"), (".", "already exists"),
                        ("gpt2", "already exists"), ("no/x.bpe", "no such folder: no$"),
                        ("x" * 300, "File name too long")]:
        with pytest.raises(UserError, match=fault):
            save_bpe(train_bpe([TEXT], 280), name)
    assert (tmp_path / "my.bpe").read_bytes() == before and os.listdir(tmp_path) == ["my.bpe"]


# ---- the command line ----

def test_cli_text_jsonl_gz(tmp_path, capsys):
    record = {"prompt": "low lower", "n": 3, "deep": [{"x": ["slowest é", None, 1.5]}, "low"]}
    words = "low lower\nslowest é\nlow"
    jsonl = (json.dumps(record) + "\n\n").encode() * 2
    files = {"a.txt": words.encode(), "b.txt.gz": gzip.compress(words.encode()),
             "c.jsonl": jsonl, "d.jsonl.gz": gzip.compress(jsonl)}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        out = tmp_path / f"{name}.bpe"
        assert main(["train", "--vocab-size", "264", "--out", str(out), str(tmp_path / name)]) == 0
        printed = capsys.readouterr().out
        texts = [words] if name[0] in "ab" else words.split("\n") * 2
        tok = get_tokenizer(str(out))
        assert tok.spec()["bpe"] == out.read_text()
        assert list(tokenizer._parse(out.read_text(), "")) == list(train_bpe(texts, 264))
        ratio = sum(len(t.encode()) for t in texts) / sum(len(tok.encode(t)) for t in texts)
        assert f"vocabulary {tok.vocab_size} " in printed and str(out) in printed
        assert f"bytes per token {ratio:.2f} " in printed


def test_cli_reads_all_files(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name * 3 + "\u2028")
    assert main(["train", "--out", str(tmp_path / "o"), *(str(tmp_path / n) for n in "ab")]) == 0
    ranks = tokenizer._parse((tmp_path / "o").read_text(), "o")
    assert b"aa" in ranks and b"bb" in ranks


def test_cli_ignores_a_byte_order_mark(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"a": "xyxy"}')
    assert main(["train", "--out", str(tmp_path / "o"), str(tmp_path / "a.jsonl")]) == 0
    assert b"xy" in tokenizer._parse((tmp_path / "o").read_text(), "o")


@pytest.mark.parametrize("name, data, fault", [
    ("a.txt", b"ok \xff", "a.txt: not UTF-8 at byte 3"),
    ("a.txt.gz", gzip.compress(b"ok\xc3"), "a.txt.gz: not UTF-8 at byte 2"),
    ("a.txt.gz", b"plain", "can't read .*a.txt.gz: Not a gzipped file"),
    ("a.txt.gz", gzip.compress(b"abc" * 99)[:-9], "can't read .*a.txt.gz: Compressed file ended"),
    ("a.txt.gz", gzip.compress(b"", mtime=0)[:10] + b"\xff" * 9, "can't read .*a.txt.gz: Error -3"),
    ("a.jsonl", b'{"a": "x"}\n{"a": \n', "a.jsonl:2: not JSON: "),
    ("a.jsonl", b'{"a": ' + b"[" * 100_000, "a.jsonl:1: not JSON: nested too deeply"),
    ("a.jsonl", b'\n["x"]', "a.jsonl:2: not a JSON object"),
    ("a.jsonl", b'{"a": "x", "a": "y"}', "a.jsonl:1: duplicate key 'a'"),
    ("a.jsonl", b'{"a": "x"}\n{"a": "\xff"}', "a.jsonl:2: not UTF-8 at byte 7"),
    ("a.jsonl", b'{"a": 1}', "nothing to train on"),
    ("a.txt", b"", "nothing to train on"),
    ("a.txt", b"\n" * 300_001 + b"x", "whitespace characters in a row"),
    ("a.txt", None, "can't read .*a.txt: No such file"),
])
def test_cli_bad_input(tmp_path, capsys, name, data, fault):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    assert main(["train", "--out", str(tmp_path / "o"), str(tmp_path / name)]) == 1
    assert re.search(fault, say(capsys)) and not (tmp_path / "o").exists()


def test_cli_bad_out_and_size(tmp_path, capsys):
    text = tmp_path / "a.txt"
    text.write_text(TEXT)
    for out, size, fault in [(text, "300", "already exists"), (tmp_path / "o", "256", "below 257"),
                             (tmp_path / "no" / "o", "300", "no such folder: "),
                             (tmp_path / ("x" * 300), "300", "File name too long")]:
        assert main(["train", "--vocab-size", size, "--out", str(out), str(text)]) == 1
        assert fault in say(capsys)
    assert main(["train", "--out", str(tmp_path / "o"), str(tmp_path)]) == 1
    assert "Is a directory" in say(capsys)
    assert os.listdir(tmp_path) == ["a.txt"] and text.read_text() == TEXT


def test_cli_unknown_flag_is_argparses(capsys):
    for argv in (["train", "--vocab", "x", "--out", "o", "f"], ["train", "--nope"], []):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2 and "usage: python -m data.tokenizer" in capsys.readouterr().err
