"""data/records.py: every kind of line and every fault of a file; also checkpoints and the command line."""
import dataclasses
import json
import os
import re
import sys
from dataclasses import dataclass
from functools import partial

import pytest
import torch

import ppo
import train_rm
import train_sft
from data.examples import open_data
from data.files import UserError
from data.records import read_preferences, read_prompts, read_sft
from data.tokenizer import train_tokenizer
from lib.checkpoint import load, load_tokenizer, save
from lib.common import Log
from lib.flags import cli, flags
from model import GPT, RewardModel


@pytest.fixture
def write(tmp_path):
    """write(line, ...) -> path of a JSONL file; dicts become JSON, bytes are written as they are."""
    def make(*lines):
        path = tmp_path / "data.jsonl"
        raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        path.write_bytes(b"\n".join(raw) + b"\n")
        return path
    return make


def turn(role, content):
    return {"role": role, "content": content}


# ---- good lines ----

def test_demonstrations(write):
    path = write({"prompt": "p", "completion": " c"}, {"text": "t"},
                 {"prompt": "", "completion": "漢字", "extra": 1},
                 {"messages": [turn("user", "hi"), turn("assistant", "yes?"), turn("user", "so"),
                               turn("assistant", "ok")]},
                 {"messages": [turn("system", "be"), turn("human", "hi"), turn("assistant", "ok")]})
    assert read_sft(path) == [
        ("p", " c"), ("", "t"), ("", "漢字"),
        ("\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: so\n\nAssistant:", " ok"),
        ("\n\nSystem: be\n\nHuman: hi\n\nAssistant:", " ok")]


def test_preferences(write):
    path = write({"prompt": "p", "chosen": "a", "rejected": "b"},
                 {"prompt": "p", "responses": ["a", "b", "c"]},
                 {"prompt": "p", "responses": ["a", "b", "c", "d"], "ranks": [2, 0, 0, 1.5]},
                 {"prompt": "p", "responses": ["a", "b"], "gold": [0.5, 1]})
    assert [row[:3] for row in read_preferences(path)] == [
        ("p", ["a", "b"], [0, 1]), ("p", ["a", "b", "c"], [0, 1, 2]),
        ("p", ["a", "b", "c", "d"], [2, 0, 0, 1.5]),
        ("p", ["a", "b"], [0, 1])]
    assert [row[3] for row in read_preferences(path)] == [None, None, None, [0.5, 1]]


def test_chat_lists_in_the_columns(write):
    """TRL's conversational format; the text names the roles."""
    path = write({"prompt": [turn("user", "hi")], "chosen": [turn("assistant", "yes")],
                  "rejected": [turn("assistant", "no")]})
    prompt, responses, ranks = read_preferences(path)[0][:3]
    assert prompt.startswith("\n\nHuman: hi") and ranks == [0, 1]
    assert "yes" in responses[0] and "no" in responses[1]
    assert read_prompts(write({"prompt": [turn("user", "hi")]}))[0].startswith("\n\nHuman: hi")


def test_chat_lists_read_like_messages(write):
    """Otherwise the three stages would show the model three forms of the same prompt."""
    user, yes, no = [turn("user", "hi")], [turn("assistant", "yes")], [turn("assistant", "no")]
    prompt, completion = read_sft(write({"messages": user + yes}))[0]
    assert read_sft(write({"prompt": user, "completion": yes})) == [(prompt, completion)]
    for row in ({"prompt": user, "chosen": yes, "rejected": no}, {"prompt": user, "responses": [yes, no]}):
        assert read_preferences(write(row))[0][:2] == (prompt, [" yes", " no"])
    assert read_prompts(write({"prompt": user})) == [prompt]


@pytest.mark.parametrize("shared, chosen, rejected, prompt", [
    ("Q: why?\nA:", " So.", " No.", "Q: why?\nA:"),
    ("Q: why?\n\nA", " s", "\n\tn", "Q: why?\n\nA"),
    ("one two ", "three", "thrice", "one two"), ("Q: why?\n \n", "So.", "No.", "Q: why?"),
    ("one two", "three", "fold", "one"),
    ("", "b c", "c b", ""),
    ("", "word", "words", ""), ("say", "", " more", ""), ("a say", "", " more", "a"), (" ", "a", "b", ""),
    ("x\n\nHuman: a\n\nAssistant:", " yes", " yesterday", "x\n\nHuman: a\n\nAssistant:"),
    ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", " one two", " one\n\nthree", None),
    ("\n\nHuman: a\n\nAssistant:", "b", " b", None)])
def test_prompt_is_the_common_prefix_of_two_texts(write, shared, chosen, rejected, prompt):
    """TRL's implicit prompts; no word is split, and the space before the response belongs to the response."""
    texts = [shared + chosen, shared + rejected]
    got, responses, ranks, gold, _ = read_preferences(write({"chosen": texts[0], "rejected": texts[1]}))[0]
    assert got == (shared if prompt is None else prompt) and [got + r for r in responses] == texts
    assert ranks == [0, 1] and gold is None


def test_prompt_is_the_common_messages_of_two_chats(write):
    first = [turn("system", "be"), turn("user", "hi"), turn("assistant", "yes?"), turn("user", "so")]
    yes, no = [turn("assistant", "so it is")], [turn("assistant", "so not")]
    explicit, implicit, none, empty = read_preferences(write(
        {"prompt": first, "chosen": yes, "rejected": no},
        {"chosen": first + yes, "rejected": first + no, "gold": [1, 0]},
        {"chosen": yes, "rejected": no}, {"prompt": "", "chosen": yes, "rejected": no}))
    assert implicit[:2] == explicit[:2] == (explicit[0], [" so it is", " so not"]) and implicit[3] == [1, 0]
    assert none == empty and none[0] == ""


def test_prompts(write):
    assert read_prompts(write({"prompt": "a"}, {"prompt": "", "completion": 3})) == ["a", ""]


def test_bom_crlf_and_blank_lines(write):
    path = write(b'\xef\xbb\xbf{"prompt": "a"}\r', b"", b"  \r", b'\t{"prompt": "b"}  \r')
    assert read_prompts(path) == ["a", "b"]
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "b"}')  # no newline at the end
    assert read_prompts(path) == ["a", "b"]
    path.write_text('{"prompt": "a\u2028b\x85c"}\n', "utf-8")  # these are not line ends
    assert read_prompts(path) == ["a\u2028b\x85c"]


# ---- bad lines ----

OK = {read_sft: {"prompt": "p", "completion": "c"}, read_prompts: {"prompt": "p"},
      read_preferences: {"prompt": "p", "chosen": "a", "rejected": "b"}}
NO_JSON = [(b"{", "not JSON"), (b"hello", "not JSON"), (b'{"prompt": "a"} {}', "not JSON: Extra data"),
           (b'["prompt"]', "not a JSON object"), (b"null", "not a JSON object"),
           (b'{"prompt": "\xff"}', "not UTF-8 at byte 12"),
           ('{"prompt": "a"}'.encode("utf-16"), "not"), (b"[" * 100_000, "nested too deeply"),
           (b'{"a":' * 100_000, "nested too deeply")]
READERS = [read_sft, read_preferences, read_prompts]
BAD = [(read, *case) for read in READERS for case in NO_JSON] + [
    (read_prompts, {"Prompt": "a"}, '"prompt" is missing'),
    (read_prompts, {"prompt": 3}, '"prompt" must be a string'),
    (read_prompts, {"prompt": None}, '"prompt" is missing or null'),
    (read_prompts, b'{"prompt": "a\\ud800"}', '"prompt" contains a lone surrogate'),
    (read_prompts, {"prompt": [turn("robot", "x")]}, '"role"'), (read_prompts, {"prompt": ["x"]}, '"role"'),
    (read_sft, {"prompt": "a"}, '"completion" is missing'),
    (read_sft, {"completion": "a"}, '"prompt" is missing'),
    (read_sft, {"prompt": "a", "completion": ""}, "completion is empty"),
    (read_sft, {"text": ""}, "completion is empty"),
    (read_sft, {"text": "a", "completion": "b"}, 'give "text" or "completion", not both'),
    (read_sft, {"messages": [turn("user", "a"), turn("assistant", "")]}, "the last message is empty"),
    (read_sft, {"text": 1}, '"text" must be a string'),
    (read_sft, b'{"text": "\\udc00x"}', "contains a lone surrogate"),
    (read_sft, {"messages": "x"}, '"messages" needs at least two turns'),
    (read_sft, {"messages": [turn("user", "a")]}, "at least two turns"),
    (read_sft, {"messages": [turn("user", "a"), turn("tool", "b")]}, '"role"'),
    (read_sft, {"messages": [turn("user", "a"), {"role": "assistant"}]}, '"content" is missing'),
    (read_sft, {"messages": [turn("user", "a"), turn("assistant", 5)]}, '"content" must be a string'),
    (read_sft, {"messages": [turn("user", "a"), turn("assistant", "\ud800")]},  # in the file: "\\ud800"
     '"content" contains a lone surrogate'),
    (read_preferences, {"prompt": "a", "chosen": "b"}, '"rejected" is missing'),
    (read_preferences, {"prompt": "a", "rejected": "b"}, '"chosen" is missing'),
    (read_preferences, {"responses": ["a", "b"]}, '"prompt" is missing'),
    (read_preferences, {"chosen": "a"}, '"rejected" is missing'),
    (read_preferences, {"rejected": "a"}, '"prompt" is missing'),
    (read_preferences, {"chosen": "a b", "rejected": 3}, '"rejected" must be a string'),
    (read_preferences, {"chosen": "a b", "rejected": "a b"}, "two responses are identical"),
    (read_preferences, {"chosen": "", "rejected": "a"}, "a response is empty"),
    (read_preferences, {"chosen": "a b ", "rejected": "a b c"}, "a response is empty"),
    (read_preferences, {"chosen": "a", "rejected": [turn("user", "a")]},
     "must both be strings or both be lists"),
    (read_preferences, {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: "},
     "a response is empty"),
    (read_preferences, {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
     "do not share a prompt"),
    (read_preferences, {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a"},
     "last turn is not the assistant's"),
    (read_preferences, {"chosen": "Q\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
                        "rejected": "Q\n\nAssistant: d"}, "do not share a prompt"),
    (read_preferences, {"chosen": [turn("user", "a"), turn("assistant", "b")],
                        "rejected": [turn("user", "a")]}, "must have exactly one turn"),
    (read_preferences, {"chosen": [turn("user", "a"), turn("user", "b")],
                        "rejected": [turn("user", "a"), turn("assistant", "b")]},
     "last message is not the assistant's"),
    (read_preferences, {"chosen": [turn("user", "a"), turn("assistant", "b")],
                        "rejected": [turn("user", "c"), turn("assistant", "b")]},
     '"chosen" must have exactly one turn after the prompt'),
    (read_preferences, {"chosen": [turn("robot", "a")], "rejected": [turn("user", "a")]}, '"role"'),
    (read_preferences, {"chosen": [turn("assistant", "a")], "rejected": [turn("assistant", "a")]},
     "two responses are identical"),
    (read_sft, {"prompt": [turn("user", "a")], "completion": [turn("user", "b")]},
     "last message is not the assistant's"),
    (read_sft, {"prompt": [turn("user", "a")], "completion": []}, '"completion" must have exactly one turn'),
    (read_sft, {"messages": [turn("assistant", "a"), turn("user", "b")]},
     "the last message is not the assistant's"),
    (read_preferences, {"prompt": "a", "chosen": "b", "rejected": "b"}, "two responses are identical"),
    (read_preferences, {"prompt": "a", "responses": "bc"}, '"responses" must be a list'),
    (read_preferences, {"prompt": "a", "responses": ["b", 1]}, '"responses" must be a string'),
    (read_preferences, {"prompt": "a", "responses": ["b"]}, "no response is ranked above another"),
    (read_preferences, {"prompt": "a", "responses": []}, "no response is ranked above another"),
    (read_preferences, {"prompt": "a", "responses": ["b", "c", "b"]}, "two responses are identical"),
    (read_preferences, {"prompt": "a", "responses": ["b", "c"], "ranks": [1, 1]},
     "no response is ranked above another"),
    (read_preferences, {"prompt": "a", "responses": ["b", "c"], "ranks": [1]},
     '"ranks" has 1 numbers for 2 responses'),
    (read_preferences, {"prompt": "a", "responses": ["b", "c"], "ranks": 1},
     '"ranks" must be a list of finite numbers'),
    (read_preferences, {"prompt": "a", "responses": ["b", "c"], "ranks": ["0", "1"]},
     '"ranks" must be a list of finite numbers'),
    (read_preferences, {"prompt": "a", "responses": ["b", "c"], "ranks": [True, False]},
     '"ranks" must be a list of finite numbers'),
    (read_preferences, b'{"prompt": "a", "responses": ["b", "c"], "ranks": [NaN, 1]}',
     '"ranks" must be a list of finite numbers'),
    (read_preferences, b'{"prompt": "a", "responses": ["b", "c\\ud800"]}',
     '"responses" contains a lone surrogate'),
    (read_preferences, {"prompt": "a", "chosen": "b", "rejected": "c", "subset": 3},
     '"subset" must be a string'),
    (read_preferences, {"prompt": "a", "chosen": "b", "rejected": "c", "subset": []},
     '"subset" must be a string'),
    (read_preferences, {"prompt": "a", "responses": ["b", "c"], "subsets": "easy"}, 'rename it to "subset"'),
]


@pytest.mark.parametrize("read, line, says", BAD, ids=lambda x: getattr(x, "__name__", str(x)[:50]))
def test_bad_line_is_named_or_skipped_and_counted(write, capsys, read, line, says):
    path = write(OK[read], b"", line, OK[read], line)
    with pytest.raises(UserError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:3: ") and says in str(error.value)
    assert str(error.value).endswith(" (--skip-bad skips such lines)")
    assert "\n" not in str(error.value) and len(str(error.value)) < 250
    assert len(read(path, skip_bad=True)) == 2
    assert capsys.readouterr().out == f"{path}: 2 bad lines skipped, 2 kept\n"


@pytest.mark.parametrize("read, line", [
    (read_prompts, b'{"prompt": "a", "n": ' + b"1" * 5000 + b"}"),
    (read_sft, {"messages": [turn("user", "a"), turn("assistant", [])]}),
    (read_sft, {"messages": [turn("user", "a"), turn("assistant", [turn("user", "b")])]}),
    (read_prompts, {"prompt": [turn(["user"], "a")]}),
    (read_preferences, b'{"prompt": "a", "responses": ["b", "c"], "ranks": [1, 1' + b"0" * 400 + b"]}")],
    ids=["number of 5000 digits", "content is []", "content is a chat", "role is a list", "rank 10**400"])
def test_strange_lines_are_user_errors_too(write, read, line):
    try:
        read(write(line))
    except UserError:
        return
    raise AssertionError("accepted")


def test_skip_bad_prints_nothing_when_no_line_is_bad(write, capsys):
    assert len(read_prompts(write(OK[read_prompts], OK[read_prompts]), skip_bad=True)) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("read", [read_sft, read_preferences, read_prompts])
def test_bad_files(tmp_path, read):
    empty = tmp_path / "empty.jsonl"
    for raw in (b"", b"\n\n \r\n"):
        empty.write_bytes(raw)
        with pytest.raises(UserError, match="empty.jsonl: no examples$"):
            read(empty)
    with pytest.raises(UserError, match="no.jsonl is missing"):
        read(tmp_path / "no.jsonl")
    with pytest.raises(UserError, match="can't be read"):
        read(tmp_path)
    empty.write_bytes(b"{\n")
    with pytest.raises(UserError, match="no examples"):
        read(empty, skip_bad=True)


def test_open_data(tmp_path):
    assert open_data(str(tmp_path)) == (tmp_path, None)
    with pytest.raises(UserError, match="--data .*nowhere: no such folder$"):
        open_data(str(tmp_path / "nowhere"))


# ---- checkpoints ----

@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["low lower lowest slow slower slowest " * 3], 270)


@pytest.mark.parametrize("pool", [None, *RewardModel.POOLS])
def test_save_and_load(tiny, tokenizer, tmp_path, pool):
    gpt = tiny(vocab_size=tokenizer.vocab_size, bias=pool != "mean", dropout=0.3).train()
    net = gpt if pool is None else RewardModel.from_gpt(gpt, pool)
    if pool:
        net.normalise(torch.tensor([1.0, 4.0]))
    save(tmp_path / "x.pt", net, tokenizer)
    back = load(type(net), tmp_path / "x.pt")
    assert not back.training and back.config.dropout == 0 and back.config.bias == net.config.bias
    assert load(type(net), tmp_path / "x.pt", dropout=0.2).config.dropout == 0.2
    tokens = torch.arange(12).view(2, 6)
    assert torch.equal(back(tokens), net.eval()(tokens))
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in net.state_dict().items())
    if pool is None:
        assert back.lm_head.weight is back.trunk.wte.weight
    else:
        assert back.pool == pool and (back.shift, back.scale) == (2.5, 1.5)
    again = load_tokenizer(tmp_path / "x.pt")
    assert again.encode("lower slow x") == tokenizer.encode("lower slow x")
    assert again.vocab_size == tokenizer.vocab_size
    assert os.listdir(tmp_path) == ["x.pt"]  # no temporary file is left


def test_earlier_file_is_kept_one_generation_back(tiny, tokenizer, tmp_path, capsys):
    path = tmp_path / "sft.pt"
    for seed in range(3):
        save(path, tiny(seed), tokenizer, keep="other")
    assert sorted(os.listdir(tmp_path)) == ["sft.prev.pt", "sft.pt"]
    for name, seed in (("sft.pt", 2), ("sft.prev.pt", 1)):
        assert torch.equal(load(GPT, tmp_path / name).trunk.wte.weight, tiny(seed).trunk.wte.weight)
    assert f"{path} already exists; moved to {tmp_path / 'sft.prev.pt'}" in capsys.readouterr().out


def test_write_that_fails_leaves_the_earlier_file(tiny, tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "sft.pt"
    save(path, tiny(0), tokenizer)

    def broken(data, file):
        file.write(b"half")
        raise OSError("disk full")
    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(UserError, match="sft.pt could not be written .*earlier checkpoints are intact"):
        save(path, tiny(1), tokenizer)
    assert os.listdir(tmp_path) == ["sft.pt"]  # no temporary file is left
    assert torch.equal(load(GPT, path).trunk.wte.weight, tiny(0).trunk.wte.weight)


def test_load_of_the_wrong_kind_or_a_missing_file(tiny, tokenizer, tmp_path):
    save(tmp_path / "sft.pt", tiny(), tokenizer)
    save(tmp_path / "rm2.pt", RewardModel.from_gpt(tiny()), tokenizer)
    with pytest.raises(UserError, match="sft.pt holds a GPT; expected a RewardModel"):
        load(RewardModel, tmp_path / "sft.pt")
    with pytest.raises(UserError, match="rm2.pt holds a RewardModel; expected a GPT"):
        load(GPT, tmp_path / "rm2.pt")
    for name, maker in (("sft.pt", "train_sft.py"), ("rm.pt", "train_rm.py"), ("ppo.pt", "ppo.py")):
        for read in (partial(load, GPT), load_tokenizer):
            with pytest.raises(UserError, match=f"{name} is missing: `python {maker}` makes it"):
                read(tmp_path / "no" / name)
    with pytest.raises(UserError, match="mine.pt is missing$"):
        load(GPT, tmp_path / "mine.pt")


@pytest.mark.parametrize("raw", [b"", b"\x00", b"{}", bytes(range(256)) * 40, b"PK\x03\x04" + b"\0" * 200,
                                 b"\x80\x04}."],
                         ids=["empty", "nul", "text", "random", "zip", "pickle"])
def test_load_of_something_else(tmp_path, raw):
    (tmp_path / "x.pt").write_bytes(raw)
    for read in (partial(load, GPT), load_tokenizer):
        with pytest.raises(UserError, match="x.pt is not an onetrunk checkpoint, or is corrupt"):
            read(tmp_path / "x.pt")
    with pytest.raises(UserError, match="can't be read: Is a directory"):
        load(GPT, tmp_path)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_load_never_runs_code(tmp_path):
    torch.save({"kind": "GPT", "config": {}, "tokenizer": {}, "pool": None,
                "weights": Evil(tmp_path / "ran")}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="is not an onetrunk checkpoint"):
        load(GPT, tmp_path / "x.pt")
    assert os.listdir(tmp_path) == ["x.pt"]


def changed(tiny, tokenizer, path, change):
    save(path, tiny(vocab_size=tokenizer.vocab_size), tokenizer)
    data = torch.load(path, weights_only=True)
    change(data)
    torch.save(data, path)


@pytest.mark.parametrize("change", [
    lambda data: data["config"].update(d_model=16), lambda data: data["config"].update(n_layer=3),
    lambda data: data["config"].update(vocab_size=5), lambda data: data["weights"].pop("trunk.ln_f.bias"),
    lambda data: data["weights"].update(more=torch.zeros(1))])
def test_weights_that_do_not_fit(tiny, tokenizer, tmp_path, change):
    changed(tiny, tokenizer, tmp_path / "x.pt", change)
    with pytest.raises(UserError, match="x.pt: the weights do not fit this model.py") as error:
        load(GPT, tmp_path / "x.pt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [
    lambda data: data["config"].update(rope=True), lambda data: data["config"].update(n_head=3),
    lambda data: data.update(weights=None), lambda data: data.update(config=None)],
    ids=["field of another model.py", "heads", "no weights", "no config"])
def test_config_that_does_not_fit(tiny, tokenizer, tmp_path, change):
    changed(tiny, tokenizer, tmp_path / "x.pt", change)
    try:
        load(GPT, tmp_path / "x.pt")
    except UserError:
        return
    raise AssertionError("accepted")


def test_file_cut_off(tiny, tokenizer, tmp_path):
    save(tmp_path / "x.pt", tiny(), tokenizer)
    raw = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(UserError, match="x.pt is not an onetrunk checkpoint, or is corrupt"):
        load(GPT, tmp_path / "x.pt")


# ---- command line ----

@dataclass
class Config:
    steps: int = 3  # how many, at most 100%
    lr: float = 1e-3  # the rate
    data_dir: str = "here"  # a "folder"
    fast: bool = False  # no waiting
    device: str = "cpu"  # where


@pytest.fixture
def command(monkeypatch, capsys):
    """command(main, *args) -> (SystemExit's code, stdout, stderr); code None when it came to its end."""
    def call(main, *args):
        monkeypatch.setattr(sys, "argv", ["/some/where/tool.py", *args])
        code = None
        try:
            cli(main, Config)
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()
    return call


def test_flags_fill_the_config(command):
    got = []
    assert command(lambda cfg: got.append(cfg))[0] is None
    command(lambda cfg: got.append(cfg), "--steps", "7", "--lr=2e-2", "--data-dir", "x y", "--fast")
    assert got == [Config(), Config(7, 0.02, "x y", True)]


@pytest.mark.parametrize("args, says", [
    (["--stepz", "3"], "--stepz"), (["--steps", "many"], "--steps: invalid int value: 'many'"),
    (["--lr"], "expected one"),
    (["--step", "3"], "--step"), (["extra"], "extra"), (["--fast", "no"], "no")])
def test_unknown_flag_exits_2(command, args, says):
    code, out, err = command(lambda cfg: pytest.fail("main ran"), *args)
    assert code == 2 and says in err and "usage: tool.py" in err and "Traceback" not in err and not out


def test_user_error_is_one_sentence(command):
    def wrong(cfg):
        raise UserError("x.jsonl is missing")

    # a string: Python prints it on stderr and exits with 1
    assert command(wrong)[0] == "tool.py: x.jsonl is missing"
    code, *_ = command(lambda cfg: open("/nowhere/at/all"))
    assert code == "tool.py: /nowhere/at/all: No such file or directory"
    with pytest.raises(ZeroDivisionError):  # a bug of ours stays visible
        command(lambda cfg: 1 / 0)


def test_help_shows_each_fields_comment_and_default(command):
    code, out, err = command(lambda cfg: None, "-h")
    out = " ".join(out.split())
    assert code == 0 and not err and __doc__.split(":")[0] in out
    for flag, note in (("--steps STEPS", "how many, at most 100% (default 3)"),
                       ("--lr LR", "the rate (default 0.001)"),
                       ("--data-dir DATA_DIR", "a \"folder\" (default 'here')"),
                       ("--fast", "no waiting (default False)")):
        assert f"{flag} {note}" in out


HEADINGS = {train_sft: ["run", "model", "training"], train_rm: ["run", "reward model", "training"],
            ppo: ["run", "rollout", "update", "KL"]}


@pytest.mark.parametrize("script", HEADINGS, ids=lambda script: script.__name__)
def test_every_flag_of_every_script_stands_once_under_a_heading_with_a_note(script):
    groups = flags(script.main, script.Config)._action_groups[2:]  # after argparse's own two
    assert [group.title for group in groups] == HEADINGS[script]
    shown = [(action.dest, action.help) for group in groups for action in group._group_actions]
    assert sorted(name for name, _ in shown) == sorted(f.name for f in dataclasses.fields(script.Config))
    assert all(re.match(r"[^(].* \(default ", note) for _, note in shown)
    # a script's own note takes the place of the shared one
    assert dict(shown)["save_every"].startswith("updates" if script is ppo else "steps between")


def test_log(tmp_path, capsys):
    for run in range(2):
        log = Log(tmp_path / "out" / "sft.log.jsonl", Config(), 10)
        log(5, loss=0.123456, n=run)
        log.report(val_loss=1.5)
    lines = [json.loads(line) for line in (tmp_path / "out" / "sft.log.jsonl").read_text().splitlines()]
    assert lines[0]["config"] == {"steps": 3, "lr": 1e-3, "data_dir": "here", "fast": False,
                                  "device": "cpu"}
    assert lines[1] == {"step": 5, "loss": 0.123456, "n": 1} and lines[2] == {"report": {"val_loss": 1.5}}
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2].split() == ["step", "loss", "n", "left"]
    assert printed[-1].split() == ["5/10", "0.123", "1", "0:00"]
