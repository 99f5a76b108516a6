"""Columns that contradict one another, are misspelt or unused; texts that can't be encoded; names that could
control a terminal; one form of a conversation. data/columns.py, data/records.py, data/files.py."""
import itertools
import json
import re
import subprocess
import sys
import time

import pytest
from helpers import ROOT, jsonl

from data import stories, tokenizer
from data.convert import Dropped
from data.files import Progress, UserError, json_object, printable
from data.records import ANSWER, QUESTION, read_preferences, read_prompts, read_sft
from data.tokenizer import LONGEST_BLANK, from_spec, get_tokenizer, train_bpe

pytestmark = pytest.mark.slow

SFT, PREF, PROMPTS = read_sft, read_preferences, read_prompts
HI, YES, NO = ({"role": role, "content": text} for role, text in
               (("user", "hi"), ("assistant", "yes"), ("assistant", "no")))
ESCAPE = "\x1b]0;owned\x07\x1b[2J\x9b\u202e\u2028\r\n"


@pytest.fixture
def write(tmp_path):
    """write(row, ...) -> the path of a JSONL file of these rows."""
    def make(*rows):
        jsonl(tmp_path / "data.jsonl", rows)
        return tmp_path / "data.jsonl"
    return make


def pair(**more):
    return {"prompt": "Why?", "chosen": " So.", "rejected": " No."} | more


def ranking(**more):
    return {"prompt": "Why?", "responses": [" a", " b", " c"]} | more


def show(x):
    return x.__name__ if callable(x) else str(x)[:70]


# ---- contradictions ----

GOOD = {read_sft: {"prompt": "p", "completion": "c"}, read_preferences: pair(), read_prompts: {"prompt": "p"}}
CONTRADICTIONS = [
    # the issue's
    (SFT, {"prompt": "Q", "text": " A"}, 'give "text" or "prompt", not both'),
    (SFT, {"prompt": "Q", "completion": " A", "messages": [HI, YES]}, '"prompt" and "messages" contradict'),
    (PREF, pair(responses=[" No.", " So."]), '"chosen" and "rejected" contradict the "responses"'),
    (PREF, ranking(rank=[3, 2, 1]), 'column "rank" is not read; rename it to "ranks" or delete it'),
    (PREF, {"prompt": "Q", "chosen": "Q A", "rejected": "Q B"},
     "the prompt is repeated at the beginning of the responses"),
    # of sft.jsonl
    (SFT, {"prompt": "hi", "messages": [HI, YES], "completion": "no"}, '"completion" and "messages"'),
    (SFT, {"prompt": [HI, YES, HI], "messages": [HI, YES]}, '"prompt" and "messages" contradict'),
    (SFT, {"completion": [NO], "messages": [HI, YES]}, '"completion" and "messages" contradict'),
    (SFT, {"text": "hi yes", "messages": [HI, YES]}, 'give "messages" or "text", not both'),
    (SFT, {"text": "a", "prompt": "b", "completion": "c"}, 'give "text" or "completion", not both'),
    (SFT, {"text": "a", "prompt": [HI]}, 'give "text" or "prompt", not both'),
    (SFT, {"prompt": "p", "completion": "c", "label": False}, '"label": false marks a completion'),
    (SFT, {"prompt": "What is red?", "completion": " What is red? Blood."},
     "the prompt is repeated at the beginning of the completion"),
    (SFT, {"prompt": [HI], "completion": [HI, YES]}, 'put it into "messages"'),
    # of preferences.jsonl
    (PREF, pair(ranks=[1, 0]), '"ranks" does not put "chosen" above "rejected"'),
    (PREF, pair(ranks=[0, 0]), '"ranks" does not put "chosen" above "rejected"'),
    (PREF, pair(ranks=[0, 1, 2]), '"ranks" has 3 numbers for 2 responses'),
    (PREF, pair(responses=[" So.", " Yes."]), '"rejected" is not among the "responses"'),
    (PREF, pair(responses=[" So.", " No."], ranks=[1, 0]), "contradict"),
    (PREF, pair(responses=[" So.", " No.", " X."], ranks=[1, 1, 0]), "contradict"),
    (PREF, ranking(chosen=" b"), "contradict"),
    (PREF, ranking(rejected=" a"), "contradict"),
    (PREF, {"chosen": "x a", "rejected": "x b", "responses": ["x a", "x b"]}, '"prompt" is missing'),
    (PREF, pair(score_chosen=1.5, score_rejected=2), '"score_chosen" orders the responses in another'),
    (PREF, pair(rejected_rating=5, chosen_rating=4), '"chosen_rating" orders'),
    (PREF, pair(margin=-0.5), '"margin" orders the responses in another way'),
    (PREF, ranking(scores=[1, 2, 3]), '"scores" orders the responses in another way'),
    (PREF, ranking(ratings=[3, 1.5, 2]), '"ratings" orders'),
    (PREF, ranking(preference=1), '"preference" looks like an order; give "ranks"'),
    (PREF, ranking(label=[0, 1, 0]), '"label" looks like an order'),
    (PREF, ranking(ranks=[0, 1, 2], ranking=[3, 2, 1]), 'column "ranking" is not read'),
    (PREF, {"prompt": "Q?", "responses": ["Q? a", " Q? b", "Q?c"]}, "the prompt is repeated"),
    (PREF, {"prompt": [HI], "chosen": "\n\nHuman: hi\n\nAssistant: a",
                        "rejected": "\n\nHuman: hi\n\nAssistant: b"}, "the prompt is repeated"),
    (PREF, {"prompt": "hi", "chosen": [HI, YES], "rejected": [HI, NO]}, 'drop the "prompt" column'),
    # a tester's: scores and choices that order the other way
    (PREF, pair(scores={"chosen": 1, "rejected": 4}), '"scores" orders the responses in another way'),
    *((PREF, pair(**{name: value}), f'"{name}" contradicts "chosen" and "rejected"') for name, value in (
        ("preferred", "rejected"), ("winner", "B"), ("winner", "b"), ("winner", "rejected"),
        ("choice", " No."),
        ("preference", 1), ("best_idx", 1), ("label", "rejected"), ("swapped", True))),
    (PREF, pair(score_chosen="1", score_rejected="2"), '"score_chosen" orders'),
    *((PREF, pair(chosen=None, rejected=None, responses=["a", "b"], **more), says) for more, says in (
        ({"reward": ["1", "2"]}, '"reward" orders'), ({"utility": [1, 9]}, '"utility" orders'),
        ({"votes": [1, 9]}, '"votes" orders'), ({"best_idx": 1}, '"best_idx" is not the index'),
        ({"ranks": [2, 1], "scores": [5, 1]}, '"scores" orders the responses in another way'),
        ({"ranks": [2, 1], "best_idx": 0}, '"best_idx" is not the index'))),
    (PREF, ranking(ranks=[1, 0, 1], scores=[2, 3, 4]), '"scores" orders'),
    *((SFT, GOOD[SFT] | {"label": label}, f'"label": {json.dumps(label)} marks a completion')
      for label in (0, "bad", "negative", "Negative ")),
    *((SFT, GOOD[SFT] | {name: "d"}, f'columns "{name}" and "completion" differ')
      for name in ("completion ", "Completion")),
    (SFT, {"prompt": "Translate:", "input": "the cat", "completion": "x"}, '"input" is not read, and not in'),
    (SFT, {"prompt": "the cat", "instruction": "Translate:", "completion": "x"}, '"instruction" is not read'),
    (PROMPTS, {"prompt": "Translate:", "input": "the cat"}, '"input" is not read, and not in the "prompt"'),
    (PROMPTS, {"prompt": "a", "Prompt": "b"}, 'columns "Prompt" and "prompt" differ'),
    (PREF, {"prompt": "What is up today my man", "chosen": "What is up today my man A", "rejected": " B"},
     'the prompt is repeated at the beginning of "chosen", but not of "rejected"'),
    # columns that are misspelt
    (SFT, {"prompt": "p", "response": "x"}, '"completion" is missing or null; rename "response" to "comp'),
    (SFT, {"Prompt": "p", "completion": "x"}, '"prompt" is missing or null; rename "Prompt" to "prompt"?'),
    (SFT, {"instruction": "p", "output": "x"}, '"prompt" is missing or null; rename "instruction" to'),
    (SFT, {"conversations": [HI, YES]}, 'rename "conversations" to "messages"?'),
    (SFT, {"question": "Q", "text": " A"}, 'column "question" is not read; rename it to "prompt"'),
    (SFT, {"Prompt": "A", "text": " A"}, 'column "Prompt" is not read; rename it to "prompt"'),
    (SFT, {"text": "Q", "answer": "A"}, 'column "answer" is not read; rename it to "completion"'),
    (PREF, {"question": "Q", "chosen": "a", "rejected": "b"}, 'rename it to "prompt" or delete it'),
    (PREF, {"promt": "Q", "chosen": "a", "rejected": "b"}, 'column "promt" is not read'),
    (PREF, {"prompt": "Q", "response": ["a", "b"]}, 'rename "response" to "responses"?'),
    (PREF, {"prompt": "Q", "choosen": "a", "rejected": "b"}, 'rename "choosen" to "chosen"?'),
    (PREF, {"prompt": "Q", "chosen": "a", "reject": "b"}, 'rename "reject" to "rejected"?'),
    (PREF, pair(response=["x", "y"]), 'column "response" is not read; rename it to "responses"'),
    (PREF, pair(rank=[1, 2]), 'column "rank" is not read; rename it to "ranks"'),
    (PREF, pair(Ranks=[0, 1]), 'column "Ranks" is not read'),
    (PREF, ranking(order=[2, 1, 0]), 'column "order" is not read; rename it to "ranks"'),
    (PREF, ranking(Gold=[2, 1, 0]), 'column "Gold" is not read; rename it to "gold"'),
    (PROMPTS, {"question": "Q"}, 'rename "question" to "prompt"?'),
    (PROMPTS, {"messages": [HI]}, 'rename "messages" to "prompt"?'),
    (PROMPTS, {"prompt": None, "text": "Q"}, '"prompt" is missing or null; rename "text" to "prompt"?'),
]


@pytest.mark.parametrize("read, row, says", CONTRADICTIONS, ids=show)
def test_contradictions_name_file_line_and_what_to_do(write, capsys, read, row, says):
    path = write(GOOD[read], row, GOOD[read])
    with pytest.raises(UserError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:2: ") and says in str(error.value)
    assert str(error.value).isprintable() and len(str(error.value)) < 300
    assert len(read(path, skip_bad=True)) == 2
    assert capsys.readouterr().out == f"{path}: 1 bad lines skipped, 2 kept\n"


# ---- what is no contradiction ----

@pytest.mark.parametrize("read, row, same", [
    (SFT, {"messages": [HI, YES], "prompt": [HI], "completion": [YES]}, {"messages": [HI, YES]}),
    (SFT, {"messages": [HI, YES], "prompt": "hi", "completion": " yes"}, {"messages": [HI, YES]}),
    (SFT, {"messages": [HI, YES], "prompt": "", "text": None}, {"messages": [HI, YES]}),
    (SFT, {"text": "A", "prompt": "", "completion": None}, {"text": "A"}),
    (SFT, {"text": None, "messages": None, "prompt": "p", "completion": "c"}, GOOD[SFT]),
    (PREF, pair(responses=[" So.", " No."]), pair()),
    (PREF, pair(responses=[" No.", " X.", " So."], ranks=[2, 1, 0]),
     pair(chosen=None, rejected=None, responses=[" No.", " X.", " So."], ranks=[2, 1, 0])),
    (PREF, ranking(chosen=" a"), ranking()), (PREF, ranking(rejected=" b"), ranking()),
    (PREF, pair(ranks=[0, 1], responses=None), pair()), (PREF, pair(ranks=None), pair()),
    (PREF, {"prompt": None, "chosen": "x a", "rejected": "x b"}, {"chosen": "x a", "rejected": "x b"}),
    (PREF, ranking(ranks=[0, 1, 2], rank=[0, 1, 2], id=None), ranking()),
    (PREF, {"prompt": "", "chosen": "a", "rejected": "b"}, {"prompt": "", "responses": ["a", "b"]})],
    ids=show)
def test_columns_that_agree_or_are_null_may_stand_together(write, capsys, read, row, same):
    assert read(write(row)) == read(write(same))
    said = capsys.readouterr().out
    assert said in ("", f"{write()}: ignored columns: rank (1 line)\n")


@pytest.mark.parametrize("read, row", [
    (PREF, {"prompt": "a", "chosen": "apple", "rejected": "and"}),  # a longer word
    (PREF, {"prompt": "a", "chosen": "a b", "rejected": "c"}),
    (PREF, {"prompt": " ", "chosen": " a", "rejected": " b"}),
    (PREF, {"chosen": "a. a.b", "rejected": "a. a.c"}),  # here the prompt is what they share
    (PREF, {"prompt": "Hello", "chosen": "Hello! How are you?", "rejected": " B"}),
    (PREF, {"prompt": "What is up today my man", "chosen": " B", "rejected": "What is up today my man A"}),
    (SFT, {"prompt": "Hello", "completion": "Hello! How are you?"})], ids=show)
def test_a_beginning_by_chance_is_no_repeated_prompt(write, read, row):
    assert len(read(write(row))) == 1


@pytest.mark.parametrize("read, good, more", [
    *((PREF, pair(), {name: value}) for name, value in (
        ("scores", {"chosen": 4, "rejected": 1}), ("scores", {"chosen": "a"}), ("preferred", "chosen"),
        ("winner", "A"), ("winner", " So."), ("preference", 0), ("preference", 0.8), ("swapped", False),
        ("label", 1), ("label", "b"), ("best_idx", 0), ("chosen_idx", 1))),
    *((PREF, ranking(), {name: value}) for name, value in (
        ("reward", ["10", "9", "-1"]), ("reward", ["x", "y", "z"]), ("votes", [9, 1, 1]), ("best_idx", 0),
        ("downvotes", [1, 2, 3]), ("utility", 1))),
    (PREF, ranking(ranks=[1, 0, 1]), {"scores": [2, 9, 5]}),
    (PREF, ranking(ranks=[1, 0, 1]), {"best_idx": 1}),
    *((SFT, GOOD[SFT], {"label": label}) for label in (1, True, "good", [0])),
    (SFT, GOOD[SFT], {"Completion": "c"}), (SFT, GOOD[SFT], {"input": ""}),
    (SFT, GOOD[SFT], {"input": "p "})],
    ids=show)
def test_columns_that_agree_are_only_counted(write, capsys, read, good, more):
    path = write(good | more)
    assert read(path) == read(write(good))
    assert capsys.readouterr().out == f"{path}: ignored columns: {next(iter(more))} (1 line)\n"


# ---- unused columns ----

def test_unused_columns_are_counted_and_named_once_per_file(write, capsys):
    path = write(*[pair(id=i) for i in range(3)], pair(prompt="Q", source="web", id=7),
                 pair(margin=0.5, score_chosen=2, score_rejected=1, id="x", n=None))
    assert len(read_preferences(path)) == 5
    assert capsys.readouterr().out == (
        f"{path}: ignored columns: id (5 lines), source (1 line), margin (1 line), score_chosen (1 line), "
        "score_rejected (1 line)\n")
    path = write(ranking(scores=[3, 2, 2]), ranking(scores=[3, 2, 1], label="math"))
    read_preferences(path)
    assert capsys.readouterr().out == f"{path}: ignored columns: scores (2 lines), label (1 line)\n"
    assert read_preferences(write(pair(subset="easy"), ranking(subset=None))) == read_preferences(
        write(pair(), ranking())) and not capsys.readouterr().out
    path = write({"prompt": "p", "completion": "c", "text": None})
    read_prompts(path)
    assert capsys.readouterr().out == f"{path}: ignored columns: completion (1 line)\n"
    read_sft(path)
    assert capsys.readouterr().out == ""


def test_bad_lines_do_not_count_and_parts_of_messages_do(write, capsys):
    path = write({"messages": [HI | {"name": "Ann", "tool_calls": None}, YES | {"weight": 0, "name": "Bo"}]},
                 {"prompt": "p", "completion": "", "id": 1})
    assert len(read_sft(path, skip_bad=True)) == 1
    assert capsys.readouterr().out == (f"{path}: 1 bad lines skipped, 1 kept\n{path}: ignored columns: "
                                       "messages[].name (1 line), messages[].weight (1 line)\n")


def test_columns_without_end(write, capsys):
    """A million names, or one of a megabyte, make one short line."""
    path = write({"prompt": "p", "x" * 10**6: 1, "": 2, **{f"column {i}": i for i in range(500)}})
    read_prompts(path)
    said = capsys.readouterr().out
    assert said.endswith(", and 482 more\n") and said.count("\n") == 1 and len(said) < 1500


VALUES = {"messages": [HI, YES], "responses": [" r", " s"], "ranks": [1, 0], "rank": [2, 1], "gold": [5, 4],
          "scores": [1, 2], "margin": -1, "label": False, "rating": 3, "score_chosen": 1} | {
    name: f" {name}" for name in ("prompt", "completion", "text", "chosen", "rejected", "preference")}


@pytest.mark.parametrize("first, second", list(itertools.permutations(VALUES, 2)))
def test_no_pair_of_columns_is_read_in_silence(write, capsys, first, second):
    """Any two columns, beside a good line of each file or alone: an error, read, or named."""
    for good in ({}, *GOOD.values(), ranking()):
        for read in GOOD:
            row = good | {name: VALUES[name] for name in (first, second)}
            try:
                got = json.dumps(read(write(row)))
            except UserError:
                continue
            said = capsys.readouterr().out
            for name, value in row.items():
                text = {"messages": "yes", "responses": row.get("responses", [""])[0]}.get(name, value)
                assert f" {name} (1 line)" in said or name in ("ranks", "gold") or (
                    isinstance(text, str) and text in got), (read, row)


# ---- our own data sets are read without a word ----

def test_stories_are_read_in_silence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stories, "SIZES", {name: 60 for name in stories.SIZES})
    folder = stories.make(tmp_path / "stories")
    capsys.readouterr()
    for name in stories.SIZES:
        read = {"sft": read_sft, "pre": read_preferences, "pro": read_prompts}[name[:3]]
        assert len(read(folder / f"{name}.jsonl")) == 60
    assert capsys.readouterr().out == ""


# ---- one form of a conversation ----

def test_a_conversation_is_the_same_text_in_every_place(write):
    prompt = "\n\nHuman: hi\n\nAssistant: yes\n\nHuman: hi\n\nAssistant:"
    turns = [HI, YES, HI]
    for row in ({"messages": [*turns, NO]}, {"prompt": turns, "completion": [NO]},
                {"prompt": prompt, "completion": " no"}):
        assert read_sft(write(row)) == [(prompt, " no")]
    for row in ({"prompt": turns, "chosen": [YES], "rejected": [NO]},
                {"prompt": turns, "responses": [[YES], [NO]]},
                {"chosen": [*turns, YES], "rejected": [*turns, NO]},
                {"chosen": prompt + " yes", "rejected": prompt + " no"}):
        assert read_preferences(write(row)) == [(prompt, [" yes", " no"], [0, 1], None, None)]
    for row in ({"prompt": turns}, {"prompt": prompt}):
        assert read_prompts(write(row)) == [prompt]
    assert prompt.startswith(QUESTION) and prompt.endswith(ANSWER)
    system = {"role": "system", "content": "be"}
    assert read_prompts(write({"prompt": [system, HI]})) == ["\n\nSystem: be\n\nHuman: hi\n\nAssistant:"]


# ---- texts that can't be encoded ----

BLANKS = " \n" * (LONGEST_BLANK // 2) + " "


@pytest.mark.parametrize("read, row", [
    (SFT, {"prompt": BLANKS + "x", "completion": "c"}), (SFT, {"prompt": "p", "completion": BLANKS}),
    (SFT, {"text": "a" + BLANKS + "b"}), (SFT, {"messages": [HI, YES | {"content": BLANKS[2:]}]}),
    (PREF, pair(prompt=BLANKS + "x")), (PREF, ranking(responses=["a", BLANKS])),
    (PREF, {"chosen": f"a{BLANKS}b", "rejected": f"a{BLANKS}c"}),
    (PROMPTS, {"prompt": "x" + BLANKS}), (PROMPTS, {"prompt": [HI | {"content": "x" + BLANKS[3:]}]})],
    ids=lambda x: x.__name__ if callable(x) else "+".join(x))
def test_300_001_blanks_name_file_and_line_and_can_be_skipped(write, capsys, read, row):
    path = write(GOOD[read], row)
    with pytest.raises(UserError, match=re.escape(f"{path}:2: ") + ".*whitespace characters in a row .--s"):
        read(path)
    assert len(read(path, skip_bad=True)) == 1
    assert capsys.readouterr().out == f"{path}: 1 bad lines skipped, 1 kept\n"


def test_nearly_as_many_blanks_are_checked_in_linear_time(write):
    """Many runs that are just allowed: a check that tries each place of each run would take hours."""
    text = (" " * (LONGEST_BLANK - 1) + "x") * 4
    start = time.process_time()
    assert read_prompts(write({"prompt": text})) == [text]
    assert len(get_tokenizer("bytes").encode(text)) == len(text)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("name, raw, place", [
    ("a.txt", b"\n" * 300_001 + b"x", "a.txt: "),
    ("a.jsonl", b'{"a": "b"}\n{"a": "' + b" " * 300_001 + b'"}\n', "a.jsonl:2: ")])
def test_the_tokenizer_refuses_blanks_before_it_trains(tmp_path, capsys, monkeypatch, name, raw, place):
    monkeypatch.setattr(tokenizer, "train_bpe", lambda *_: pytest.fail("trained"))
    (tmp_path / name).write_bytes(raw)
    assert tokenizer.main(["train", "--out", str(tmp_path / "o"), str(tmp_path / name)]) == 1
    assert f"{place}the text has 300000 whitespace characters in a row" in capsys.readouterr().err


# ---- long training says how far it is ----

@pytest.mark.parametrize("terminal", [False, True])
def test_training_on_a_long_word_says_how_far_it_is(capsys, monkeypatch, terminal):
    """One word of 80 kB, by a clock that runs on by 11 s whenever it is looked at."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    monkeypatch.setattr("time.monotonic", itertools.count(0, 11).__next__)
    text = "abcd" * 20_000
    ranks = train_bpe([text], 262)
    monkeypatch.undo()
    said = capsys.readouterr()
    assert "counting pairs" in said.err and "257 of 262 ids" in said.err and said.out == ""
    assert (said.err.count("\n") == 1 and said.err.endswith("\n")) if terminal else "\r" not in said.err
    assert ranks == train_bpe([text], 262) and capsys.readouterr().err == ""  # quick: not a word


def test_progress_without_stderr(monkeypatch):
    monkeypatch.setattr("sys.stderr", None)  # as Python starts with 2>&-
    with Progress() as progress:
        progress.say("x")


# ---- names that could control the terminal ----

def test_printable():
    for text in ("", "plain", "naïve 漢字 👍 \\x1b a/b.jsonl"):
        assert printable(text) == text
    bad = printable(ESCAPE + "\ud800\0\t")
    assert bad.isprintable() and printable(bad) == bad and bad.encode()
    assert bad.startswith("\\x1b]0;owned\\x07")
    assert str(UserError(f"a{ESCAPE}")).isprintable() and f"{UserError(ESCAPE)}".isprintable()


def safe(text):
    """Nothing but lines of printable characters."""
    assert all(line.isprintable() for line in text.split("\n")), text
    return text


def test_names_of_files_and_columns_are_printed_safely(tmp_path, capsys):
    name = ESCAPE.replace("/", "") + "\udcff.jsonl"  # \udcff: a byte that is no UTF-8
    path = tmp_path / name
    jsonl(path, [{"prompt": "p", ESCAPE: 1}, {"prompt": 3, ESCAPE: 1}])
    with pytest.raises(UserError) as error:
        read_prompts(path)
    assert "\\x1b]0;owned" in safe(str(error.value)).replace("\n", "!")
    assert len(read_prompts(path, skip_bad=True)) == 1
    said = safe(capsys.readouterr().out)
    assert said.count("\n") == 2 and "ignored columns: \\x1b]0;owned" in said
    for line in (json.dumps({"a": 1})[:-1] + f', {json.dumps(ESCAPE)}: 1, {json.dumps(ESCAPE)}: 2}}',):
        with pytest.raises(UserError, match="duplicate key") as error:
            json_object(line.encode())
        safe(str(error.value))
    dropped = Dropped()
    dropped.add("why", f"{path}:1")
    dropped.report()
    assert "\\x1b" in safe(capsys.readouterr().out)


def test_a_tokenizers_name_is_printed_safely(tmp_path, capsys):
    bpe = tokenizer._dump(train_bpe(["low lower lowest"], 260))
    tok = from_spec({"name": ESCAPE, "bpe": bpe})
    assert tok.name.isprintable() and from_spec(tok.spec()).spec() == tok.spec()
    for act in (lambda: tok.decode([10**6]), lambda: from_spec({"name": ESCAPE, "bpe": "?"}),
                lambda: get_tokenizer(tmp_path / ESCAPE),
                lambda: tokenizer.save_bpe({}, tmp_path / ESCAPE / "x")):
        with pytest.raises(UserError) as error:
            act()
        assert "\\x1b" in safe(str(error.value))
    (tmp_path / "a.txt").write_text("low lower lowest")
    out = tmp_path / ("a" + ESCAPE)
    for code in (0, 1):  # the second time it exists
        assert tokenizer.main(["train", "--out", str(out), str(tmp_path / "a.txt")]) == code
    assert "\\x1b" in safe("".join(capsys.readouterr()))
    assert get_tokenizer(out).name == printable(out)


@pytest.mark.parametrize("module, name", [("hh", "x.jsonl"), ("tldr", "train.jsonl"), ("reviews", "x")])
def test_the_data_sets_print_names_safely(tmp_path, module, name):
    folder = tmp_path / ("in" + ESCAPE)
    folder.mkdir()
    (folder / name).write_text('{"a": 1}\n')
    for source in (folder / name, folder, tmp_path / ESCAPE):
        command = [sys.executable, "-m", f"data.{module}", "--from", source, "--to", tmp_path / f"to{ESCAPE}"]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 1 and "Traceback" not in run.stderr
        assert "\\x1b" in safe(run.stdout + run.stderr)
