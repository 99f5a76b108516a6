"""data.prepare: every form of table, what is held out, what becomes of ratings and choices, and bad input."""
import csv
import json
import random
import re

import pytest
from helpers import lines

from data import prepare
from data.records import read_preferences, read_prompts, read_sft
from data.split import held_out
from data.tables import read_table

READ = {"sft": read_sft, "preferences": read_preferences, "prompts": read_prompts}
FOUND = [kind + side for kind in READ for side in (".jsonl", "_val.jsonl")]
WORDS = "a the cat dog sees likes red big and film plot was good dull".split()


def text(i, n=6):
    rng = random.Random(i)
    return " ".join(rng.choice(WORDS) for _ in range(n)) + f" {i}"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def table(path, names, rows, **how):
    """Write a CSV file."""
    with open(path, "w", newline="", encoding=how.pop("encoding", "utf-8")) as file:
        writer = csv.writer(file, **how)
        writer.writerows([names, *rows])


def run(*args, to="out"):
    """Prepare; returns {name of a file: its lines}, each read by the scripts' own readers, too."""
    assert prepare.main([str(x) for x in (*args, "--to", to)]) == 0
    made = {}
    for kind, read in READ.items():
        for side in (".jsonl", "_val.jsonl"):
            path = prepare.Path(to) / (kind + side)
            if path.exists():
                made[kind + side] = lines(path)
                assert len(read(path)) == len(made[kind + side]) > 0
    return made


def fails(capsys, *args, to="out"):
    """The one sentence on stderr, and nothing is written."""
    capsys.readouterr()
    assert prepare.main([str(x) for x in (*args, "--to", to)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and "Traceback" not in said
    assert not (prepare.Path(to) / "sft.jsonl").exists()
    return said


def all_texts(made, side):
    """All whole texts of one side."""
    found = {line["prompt"] + line["completion"] for line in made.get("sft" + side, [])}
    for line in made.get("preferences" + side, []):
        found |= {line["prompt"] + r for r in line.get("responses") or [line["chosen"], line["rejected"]]}
    return found


# ---- ratings ----

def test_rated_texts_make_lists_of_four_with_their_ratings(folder, capsys):
    rows = [(text(i), i % 5 + 1) for i in range(300)]
    table("r.csv", ("Review", "Stars"), rows)
    made, rating = run("r.csv", "--val", 0.1), dict(rows)
    assert made.keys() == set(FOUND)
    assert {len(line["responses"]) for line in made["preferences.jsonl"]} == {4}
    for line in made["preferences.jsonl"]:
        assert line["prompt"] == "" and line["ratings"] == [rating[t] for t in line["responses"]]
        ranks = line.get("ranks", [0, 1, 2, 3])
        assert line["ratings"] == sorted(line["ratings"], reverse=True)
        assert ranks == [sorted(set(line["ratings"]), reverse=True).index(g) for g in line["ratings"]]
    for line in made["preferences_val.jsonl"]:
        assert line["ratings"] == [rating[line["chosen"]], rating[line["rejected"]]]
        assert line["ratings"][0] > line["ratings"][1]
    train, val = (all_texts(made, side) for side in (".jsonl", "_val.jsonl"))
    assert train | val == set(rating) and not train & val and 10 < len(val) < 60
    assert val == {t for t in rating if held_out(t, 0.1)}
    for side in (".jsonl", "_val.jsonl"):  # the better half
        shown = {line["prompt"] + line["completion"] for line in made["sft" + side]}
        assert shown == {t for t in (train if side == ".jsonl" else val) if rating[t] >= 3}
        assert all(2 <= len(line["prompt"].split()) <= 5 for line in made["sft" + side])
    out = capsys.readouterr().out
    assert 'r.csv: 300 rows; text: "Review", rating: "Stars"' in out
    assert "demonstrations: what is rated 3, the median, or better" in out
    assert f"{len(train)} texts to train on, {len(val)} held out (10% by --val)" in out
    assert {line["prompt"] for line in made["prompts.jsonl"]} > {line["prompt"] for line in made["sft.jsonl"]}
    everything = run("r.csv", "--val", 0.1, "--demonstrations", "all", to="all")
    assert len(everything["sft.jsonl"]) == len(train) and everything["preferences.jsonl"] == (
        made["preferences.jsonl"])


def test_it_is_the_same_again_and_stable_when_the_file_grows_or_is_sorted(folder):
    rows = [(text(i), i % 5) for i in range(300)]
    table("a.csv", ("text", "score"), rows[:200])
    table("b.csv", ("text", "score"), sorted(rows))
    first, again, grown = run("a.csv", to="1"), run("a.csv", to="2"), run("b.csv", to="3")
    assert first == again
    for side in (".jsonl", "_val.jsonl"):
        assert all_texts(first, side) < all_texts(grown, side)


def test_texts_that_are_rated_again_are_averaged(folder, capsys):
    table("r.csv", ("text", "rating", "rater"), [(text(i), r, r) for i in range(100) for r in (i % 3, 2)])
    made = run("r.csv", "--val", 0.2)
    gold = {g for line in made["preferences.jsonl"] for g in line["ratings"]}
    assert gold == {1.0, 1.5, 2.0}
    assert '100 rows rate a text again: its ratings are averaged' in capsys.readouterr().out


def test_rated_responses_to_a_prompt_are_one_ranking_with_ties(folder, capsys):
    rows = [(f"Question {i}?", f"Answer {i} {k}", (1, 5, 5, 3)[k]) for i in range(60) for k in range(4)]
    table("r.tsv", ("question", "answer", "score"), rows, delimiter="\t")
    made = run("r.tsv", "--val", 0.1)
    for line in made["preferences.jsonl"] + made["preferences_val.jsonl"]:
        i = line["prompt"][9:-1]
        assert line["responses"] == [f" Answer {i} {k}" for k in (1, 2, 3, 0)]
        assert line["ratings"] == [5, 5, 3, 1] and line["ranks"] == [0, 0, 1, 2]
    assert {line["completion"][-1] for line in made["sft.jsonl"]} == {"1", "2"}  # the best of each prompt
    sides = [{line["prompt"] for line in made["prompts" + side]} for side in (".jsonl", "_val.jsonl")]
    assert not sides[0] & sides[1] and sum(map(len, sides)) == 60
    for kind in ("sft", "preferences"):
        for side, prompts in zip((".jsonl", "_val.jsonl"), sides, strict=True):
            assert {line["prompt"] for line in made[kind + side]} == prompts


def test_one_rated_response_a_prompt_ranks_nothing_and_it_is_said(folder, capsys):
    table("r.csv", ("prompt", "response", "rating"), [(f"Q {i} is?", f"A {i}", i) for i in range(60)])
    made = run("r.csv", "--val", 0.1)
    assert not any(name.startswith("preferences") for name in made)
    out = capsys.readouterr().out
    assert "not made: preferences.jsonl, as no prompt has two responses with different ratings" in out
    assert "ppo.py --data out --out out/out" in out
    assert "--reward FILE.py:FUNCTION" in out and "train_rm.py" not in out
    better = [int(line["completion"][3:]) for line in made["sft.jsonl"]]
    assert len(better) == pytest.approx(len(made["prompts.jsonl"]) / 2, abs=1)


def test_one_prompt_for_all_is_no_reason_to_hold_out_nothing(folder, capsys):
    table("r.csv", ("prompt", "response", "rating"), [("Say:", text(i), i % 4) for i in range(200)])
    made = run("r.csv", "--val", 0.1)
    train, val = (all_texts(made, side) for side in (".jsonl", "_val.jsonl"))
    assert train and val and not train & val
    assert {len(line["responses"]) for line in made["preferences.jsonl"]} <= {2, 4}  # 2: a remainder
    assert made["prompts.jsonl"] == made["prompts_val.jsonl"] == [{"prompt": "Say:"}]
    assert "fewer than 20 different prompts (1): they are on both sides" in capsys.readouterr().out


@pytest.mark.parametrize("cell, value", [("4,5", 4.5), ("-1.25", -1.25), (" 3 ", 3), ("1e1", 10), ("true", 1),
                                         ("FALSE", 0)])
def test_ratings_as_people_write_them(folder, cell, value):
    table("r.csv", ("text", "rating"), [(text(i), cell if i % 2 else 77) for i in range(100)])
    made = run("r.csv", "--val", 0.2)
    assert {g for line in made["preferences.jsonl"] for g in line["ratings"]} == {value, 77}


@pytest.mark.parametrize("cell, says", [
    ("good", r"r.csv:4: 'good' in \"rating\" is not a number; write words as numbers"),
    ("1,234", r"r.csv:4: 1,234 in \"rating\": write that comma as a point, or delete it"),
    ("inf", "is not a number"), ("4/5", "is not a number"), ("1e99", "is not a number")])
def test_ratings_that_are_no_numbers_are_refused(folder, capsys, cell, says):
    table("r.csv", ("text", "rating"), [(text(i), cell if i == 2 else i) for i in range(50)])
    assert re.search(says, fails(capsys, "r.csv"))


@pytest.mark.parametrize("cell", ["", "NaN", "n/a", "None", "-"])
def test_no_rating_is_dropped_and_counted(folder, capsys, cell):
    table("r.csv", ("text", "rating"), [(text(i), cell if i in (2, 5) else i % 3) for i in range(60)])
    made = run("r.csv", "--val", 0.2)
    assert "dropped 2: no rating (first: r.csv:4)" in capsys.readouterr().out
    assert not {text(2), text(5)} & (all_texts(made, ".jsonl") | all_texts(made, "_val.jsonl"))


# ---- choices, pairs, demonstrations, prompts ----

@pytest.mark.parametrize("first, second", [("a", "b"), ("A", "B"), (0, 1), (1, 2), ("1.0", "2.0"),
                                           ("response_a", "response_b"), ("model_a", "model_b"),
                                           ("left", "right"), (None, None)])
def test_choices(folder, first, second):
    """None: the text itself."""
    rows = [(f"Say {i} again?", f"yes {i}", f"no {i}", first if i % 2 else second) for i in range(80)]
    rows = [row if first is not None else (*row[:3], row[1 if i % 2 else 2]) for i, row in enumerate(rows)]
    table("c.csv", ("prompt", "response_a", "response_b", "winner"), rows)
    made = run("c.csv", "--val", 0.1)
    for line in made["preferences.jsonl"] + made["preferences_val.jsonl"]:
        i = int(line["prompt"].split()[1])
        assert (line["chosen"], line["rejected"]) == ((f" yes {i}", f" no {i}") if i % 2 else
                                                      (f" no {i}", f" yes {i}"))
    assert all(line["completion"].startswith(" yes" if int(line["prompt"].split()[1]) % 2 else " no")
               for line in made["sft.jsonl"])


def test_ties_contradictions_and_duplicates_are_counted(folder, capsys):
    rows = [(f"Say {i} again?", f"yes {i}", f"no {i}", "a") for i in range(80)]
    rows += [rows[0], rows[0], (*rows[0][:3], "b"), (*rows[1][:3], "b"), (*rows[2][:3], "tie"),
             (*rows[3][:3], ""), ("Say so?", "same", "same", "a"), ("", "x", "y", "a")]
    table("c.csv", ("prompt", "a", "b", "choice"), rows)
    made = run("c.csv", "--val", 0.1)
    pairs = {line["prompt"]: line for side in (".jsonl", "_val.jsonl") for line in made["preferences" + side]}
    assert len(pairs) == 79 and "Say 1 again?" not in pairs and pairs["Say 0 again?"]["chosen"] == " yes 0"
    out = capsys.readouterr().out
    for sentence in ("2: a duplicate (first: c.csv:82)", "2: a tie, or no choice", "1: an empty text",
                     "3: a pair that another row contradicts (first: c.csv:",
                     "1: two responses that are the same (first: c.csv:88)"):
        assert f"dropped {sentence}" in out


def test_a_choice_that_is_unclear_is_refused(folder, capsys):
    table("c.csv", ("a", "b", "choice"), [(f"yes {i}", f"no {i}", 1) for i in range(80)])
    assert '"choice" is never 0 or 2, so 1 may be the first or the second' in fails(capsys, "c.csv")
    table("c.csv", ("a", "b", "choice"), [(f"yes {i}", f"no {i}", "c" if i == 7 else "a") for i in range(80)])
    assert 'c.csv:9: \'c\' in "choice" is neither side' in fails(capsys, "c.csv")


def test_pairs_without_a_prompt_share_no_text_across_the_sides(folder, capsys):
    rng = random.Random(0)
    rows = [sorted(rng.sample(range(150), 2)) for _ in range(200)]
    table("p.csv", ("chosen", "rejected"), [(text(b), text(a)) for a, b in rows])
    made = run("p.csv", "--val", 0.1)
    train, val = (all_texts(made, side) for side in (".jsonl", "_val.jsonl"))
    assert train and val and not train & val
    assert all(line["prompt"] == "" for line in made["preferences.jsonl"])
    out = capsys.readouterr().out
    assert re.search(r"\d+ rows share a text with one that is held out, and are left out", out)


def test_conversations_of_hh_keep_their_prompt(folder):
    start = "\n\nHuman: q {}\n\nAssistant:".format
    rows = [{"chosen": f"{start(i)} yes {i}", "rejected": f"{start(i)} no"} for i in range(60)]
    (folder / "h.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for line in run("h.jsonl", "--val", 0.2)["preferences.jsonl"]:
        i = line["prompt"].split()[2]
        assert line["prompt"] == f"\n\nHuman: q {i}\n\nAssistant:" and line["chosen"] == f" yes {i}"


@pytest.mark.parametrize("names", [("prompt", "response"), ("prompt", "chosen", "rejected")])
def test_a_conversation_in_the_prompt_column_keeps_its_blank_lines(folder, names):
    """As sample.py and tools/label.py would write the same prompt."""
    rows = [(f"\n\nHuman: q {i}\n\nAssistant:", f" yes {i}", " no")[: len(names)] for i in range(60)]
    (folder / "h.jsonl").write_text("\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in rows))
    made = run("h.jsonl", "--val", 0.2)
    assert {line["prompt"] for name in made for line in made[name]} == {row[0] for row in rows}


def test_of_many_bad_texts_none_is_a_demonstration(folder, capsys):
    table("r.csv", ("text", "label"), rows := [(text(i), int(i % 3 == 0)) for i in range(90)])
    made, label = run("r.csv", "--val", 0.2), dict(rows)
    assert "what is rated 1, above the lowest, or better" in capsys.readouterr().out
    assert all(label[line["prompt"] + line["completion"]] for line in made["sft.jsonl"])


def test_two_responses_need_a_choice_also_where_the_prompt_is_named(folder, capsys):
    (folder / "r.csv").write_text("asked,response_a,response_b\np,a,b\n")
    assert "no column that says which is better" in fails(capsys, "r.csv", "--prompt-column", "asked")


def test_what_may_be_a_rating_is_named(folder, capsys):
    table("r.csv", ("prompt", "response", "upvotes"), [(f"q {i}", f"a {i}", i) for i in range(60)])
    run("r.csv", "--val", 0.2)
    assert '"upvotes" may be a rating: to use it, give --rating-column' in capsys.readouterr().out


def test_demonstrations_alone(folder, capsys):
    rows = [{"instruction": f"Add {i} and 1.", "input": "", "output": f"{i + 1}", "id": i} for i in range(60)]
    rows += [rows[0], rows[1] | {"output": "Add 1 and 1. 2"}]
    (folder / "a.json").write_text(json.dumps({"version": 1, "data": rows}))
    said = fails(capsys, "a.json")
    assert '"instruction", "input" may each be the prompt; name one with --prompt-column, or several' in said
    made = run("a.json", "--prompt-column", "instruction", "input", "--val", 0.1)
    assert {line["prompt"]: line["completion"] for line in made["sft.jsonl"]}.items() <= {
        f"Add {i} and 1.": f" {i + 1}" for i in range(60)}.items()
    out = capsys.readouterr().out
    assert "not made: preferences.jsonl" in out and "1 responses began with their prompt" in out
    assert "dropped 2: a duplicate (first: a.json: item 61)" in out and 'not read: "id"' in out


def test_prompts_alone(folder, capsys):
    (folder / "p.csv").write_text("question\n" + "".join(f"What is {i}?\n" for i in range(50)))
    made = run("p.csv", "--val", 0.2)
    assert made.keys() == {"prompts.jsonl", "prompts_val.jsonl"}
    assert "not made: sft.jsonl" in capsys.readouterr().out


def test_plain_text(folder, capsys):
    poems = [f"{text(i, 4)}\n{text(i + 500, 4)}" for i in range(60)]
    (folder / "poems.txt").write_bytes("\r\n \r\n\r\n".join(poems).replace("\n", "\r\n").encode())
    made = run("poems.txt", "--val", 0.2)
    assert all_texts(made, ".jsonl") | all_texts(made, "_val.jsonl") == set(poems)
    assert made.keys() == {"sft.jsonl", "sft_val.jsonl", "prompts.jsonl", "prompts_val.jsonl"}
    (folder / "poems.txt").write_text("***".join(poems))
    assert run("poems.txt", "--val", 0.2, "--split", "***", to="2") == made
    assert "poems.txt: 60 rows" in capsys.readouterr().out


def test_one_text_a_line_and_ratings_that_are_equal_are_named(folder, capsys):
    (folder / "lines.txt").write_text("\n".join(text(i) for i in range(60)))
    assert "or give --split (lines: --split $'\\n')" in fails(capsys, "lines.txt")
    assert len(run("lines.txt", "--split", "\n", "--val", 0.2)["sft.jsonl"]) > 30
    table("r.csv", ("text", "rating"), [(text(i), 3) for i in range(60)])
    run("r.csv", "--val", 0.2, to="2")
    assert "not made: preferences.jsonl, as all ratings are equal" in capsys.readouterr().out


def test_several_files_of_several_kinds_are_one_data_set(folder):
    table("d.csv", ("prompt", "response"), [(f"Say {i} again?", f"{i} it is") for i in range(80)])
    (folder / "p.jsonl").write_text("\n".join(json.dumps(
        {"prompt": f"Say {i} again?", "chosen": f"{i}!", "rejected": "no"}) for i in range(80)))
    made = run("d.csv", "p.jsonl", "--val", 0.2)
    assert made.keys() == set(FOUND)
    sides = [{line["prompt"] for name in made for line in made[name] if name.endswith("_val.jsonl") == val}
             for val in (False, True)]
    assert not sides[0] & sides[1] and sum(map(len, sides)) == 80


# ---- files as people have them ----

def rated(n=60):
    return [(text(i) + (' "so",\nhe said; é' if i % 7 == 0 else ""), i % 4) for i in range(n)]


@pytest.mark.parametrize("change", [
    {"encoding": "utf-8-sig"}, {"encoding": "utf-16"}, {"lineterminator": "\n"}, {"delimiter": ";"},
    {"delimiter": "\t"}, {"delimiter": "|"}, {"quoting": csv.QUOTE_ALL}])
def test_forms_of_csv(folder, change):
    table("plain.csv", ("text", "rating"), rated())
    table("other.csv", ("text", "rating"), rated(), **change)
    assert run("plain.csv", "--val", 0.2, to="1") == run("other.csv", "--val", 0.2, to="2")


def test_a_comma_inside_quotes_newlines_and_excels_first_line(folder, capsys):
    table("plain.csv", ("text", "rating"), rated(), delimiter=";")
    raw = (folder / "plain.csv").read_text()
    (folder / "x.csv").write_text("sep=;\n" + raw)
    assert run("plain.csv", "--val", 0.2, to="1") == run("x.csv", "--val", 0.2, to="2")
    (folder / "x.csv").write_text("sep=;\n" + raw + "so;so\n")
    n = ("sep=;\n" + raw).count("\n") + 1  # quoted newlines are lines of the file
    assert f"x.csv:{n}: 'so'" in fails(capsys, "x.csv")


def test_cp1252_is_refused_with_the_flag_that_reads_it(folder, capsys):
    table("w.csv", ("text", "rating"), rated(), encoding="cp1252")
    table("u.csv", ("text", "rating"), rated())
    said = fails(capsys, "w.csv")
    assert re.search(r"w.csv:3: not UTF-8; if Excel on Windows saved it, give --encoding cp1252", said)
    assert run("w.csv", "--val", 0.2, "--encoding", "cp1252", to="1") == run("u.csv", "--val", 0.2, to="2")
    assert "--encoding klingon: there is no such encoding" in fails(capsys, "u.csv", "--encoding", "klingon")


def test_a_tsv_with_quotes_that_are_characters(folder):
    rows = [(f'"{text(i)}" he said', i % 3) for i in range(60)]
    (folder / "t.tsv").write_text("text\trating\n" + "".join(f"{t}\t{r}\n" for t, r in rows))
    made = run("t.tsv", "--val", 0.2)
    assert all_texts(made, ".jsonl") <= {t for t, _ in rows}


def test_quotes_of_a_tsv_that_span_its_lines_do_not_join_them(folder, capsys):
    rows = [(f'{"" if i % 3 else chr(34)}{text(i)}{chr(34) if i % 3 == 2 else ""}', i % 4) for i in range(60)]
    (folder / "t.tsv").write_text("text\trating\n" + "".join(f"{t}\t{r}\n" for t, r in rows))
    made = run("t.tsv", "--val", 0.2)
    assert "60 rows" in capsys.readouterr().out and all_texts(made, ".jsonl") <= {t for t, _ in rows}


@pytest.mark.parametrize("cell, read", [('"a ""b"" c d"', 'a "b" c d'), ('"a b\nc d"', "a b\nc d"),
                                        ('"a" b "c"', '"a" b "c"')])
def test_quoted_cells_of_a_tsv(folder, cell, read):
    (folder / "t.tsv").write_text(f"text\trating\n{cell}\t1\nx y z\t2\n")
    names, rows = read_table(folder / "t.tsv")
    assert names == ["text", "rating"] and [row["text"] for _, row in rows] == [read, "x y z"]


def test_a_huge_cell(folder, capsys):
    rows = [*rated(), ("word " * 100_000, 2), ("w" * 30_000, 3)]
    table("h.csv", ("text", "rating"), rows)
    made = run("h.csv", "--val", 0.2)
    assert max(map(len, all_texts(made, ".jsonl"))) > 400_000
    assert "dropped 1: the text has a word of more than 20000 characters" in capsys.readouterr().out


@pytest.mark.parametrize("name, raw, says", [
    ("r.csv", b"text,rating\na b c,1\nd e f,2,3\n", r"r.csv:3: 3 cells, where the header has 2"),
    ("r.csv", b"text,rating\na b c\n", r"r.csv:2: 1 cells, where the header has 2"),
    ("r.csv", b"text,text\na,b\n", r"two columns are named 'text'"),
    ("r.csv", b'text,rating\na b,1\n"never closed,1\nx,2\n', r"r.csv:3: a quote that is never closed"),
    ("r.csv", b'text,rating\n"a "b" c",1\n', r"r.csv:2: "),
    ("r.csv", b"", "r.csv is empty"), ("r.csv", b"text,rating\n\n", "has a header, and no row below it"),
    ("r.csv", b"so what,1\nthis,2\n", r'has the columns "so what", "1"; say which to read: --text-column'),
    ("r.csv", b"text,rating\na\0b,1\n", "r.csv:2: a NUL character"),
    ("r.csv", b"text,review,rating\na,b,1\n", '"text", "review" may each be the text; name one with --'),
    ("r.jsonl", b'{"text": "a"}\n{"text": \n', "r.jsonl:2: not JSON"),
    ("r.jsonl", b'{"text": "a", "text": "b"}\n', "r.jsonl:1: duplicate key"),
    ("r.jsonl", b'{"text": 3, "rating": 3}\n', 'r.jsonl:1: "text" is not a text'),
    ("r.jsonl", b'{"prompt": [{"role": "user"}], "response": "x"}\n', 'jsonl:1: "prompt" is not a text'),
    ("r.jsonl", b'{"prompt": "p", "responses": ["a", "b"]}\n', '"responses" need no preparing: see docs'),
    ("r.json", b'{"a": 1}', "expected a list of objects, or an object with one list"),
    ("r.json", b'{"a": [], "b": []}', "it has 2 lists"),
    ("r.json", b"[1]", "item 1: neither an object nor a text"),
    ("r.json", b'[{"text": "a"},\n]', "r.json:2: not JSON"), ("r.json", b"[" * 100_000, "nested too deeply"),
    ("r.json", b'[{"text": "a", "text": "b"}]', "r.json: duplicate key"),
    ("r.csv", b"text,rating\na b c,1_2\n", "r.csv:2: '1_2' in \"rating\" is not a number"),
    ("r.csv", b"prompt,response_a,response_b\np,a,b\n", "no column that says which is better: name it with"),
    ("r.csv", b"prompt,chosen,rejected,winner\np,a,b,rejected\n", 'r.csv:2: column "winner" contradicts'),
    ("r.csv", b"prompt,chosen,rejected,chosen_score,rejected_score\np,a,b,1,5\n", "r.csv:2: column"),
    ("r.csv", b"""prompt,response\n"[{'role': 'user', 'content': 'x'}]",b\n""", "holds a list of messages"),
    ("r.html", b"<p>a</p>", r"\.html can't be read"),
    ("r.xlsx", b"PK", r"\.xlsx can't be read; unpack it, or save it as text, CSV"),
    ("r.txt", b"\n \n", "r.txt is empty")])
def test_bad_files_are_named_with_their_line(folder, capsys, name, raw, says):
    (folder / name).write_bytes(raw)
    assert re.search(says, fails(capsys, name))


def test_other_mistakes(folder, capsys):
    table("r.csv", ("my words", "mark"), [(text(i), i % 4) for i in range(60)])
    assert "nowhere.csv can't be read: No such file" in fails(capsys, "nowhere.csv")
    assert 'say which to read' in fails(capsys, "r.csv")
    assert 'has no column "words", but "my words", "mark"' in fails(capsys, "r.csv", "--text-column", "words")
    made = run("r.csv", "--text-column", "my words", "--rating-column", "mark", "--val", 0.2)
    assert made.keys() == set(FOUND)
    for value in ("0", "0.7", "nan"):
        assert "must be above 0 and at most 0.5" in fails(capsys, "r.csv", "--val", value, to="2")
    table("few.csv", ("text", "rating"), [(text(i), i) for i in range(8)])
    assert re.search("--val 0.01 leaves .* for sft_val.jsonl, and both need some: try more",
                     fails(capsys, "few.csv", "--val", 0.01, to="2"))


def test_a_folder_that_exists_is_left_alone(folder, capsys):
    table("r.csv", ("text", "rating"), rated())
    (folder / "mine").mkdir()
    (folder / "mine/notes.txt").write_text("mine")
    assert "mine exists; nothing is overwritten" in fails(capsys, "r.csv", to="mine")
    assert [path.name for path in (folder / "mine").iterdir()] == ["notes.txt"]
    (folder / "empty").mkdir()
    run("r.csv", "--val", 0.2, to="empty")
    assert "empty exists" in (prepare.main(["r.csv", "--to", "empty"]), capsys.readouterr().err)[1]
    assert not list(folder.glob("*.part*"))


def test_what_the_scripts_would_refuse_is_dropped_and_counted(folder, capsys):
    rows = [(f"Why {i}", f"{f'Why {i}' * (i == 7)} {k}", k) for i in range(80) for k in range(3)]
    table("r.csv", ("prompt", "response", "rating"), rows)
    made = run("r.csv", "--val", 0.2)
    assert not any(line["prompt"] == "Why 7" for name in made if "preferences" in name for line in made[name])
    assert "dropped 1: rankings: the prompt is repeated at the beginning of" in capsys.readouterr().out


# ---- what it advises ----

def test_the_flags_that_are_printed_fit_the_data(folder, capsys):
    from data.examples import encode_demonstrations, encode_rankings, prompt_room
    from data.rules import max_new_tokens
    from data.tokenizer import train_tokenizer
    table("r.csv", ("text", "rating"), [(text(i, 5 + i % 40), i % 5) for i in range(600)])
    run("r.csv", to="my data")
    out = capsys.readouterr().out
    assert "python train_sft.py --data 'my data' --out 'out/my data'\n" in out
    vocab, block = map(int, re.search(r"--vocab-size (\d+) --block-size (\d+)", out).groups())
    demonstrations = read_sft("my data/sft.jsonl")
    tokenizer = train_tokenizer((part for pair in demonstrations for part in pair), vocab)
    lengths = [len(tokenizer.encode(completion)) + 1 for _, completion in demonstrations]
    assert prompt_room(block, max_new_tokens(block, lengths)) >= block // 5
    capsys.readouterr()
    kept = encode_demonstrations(demonstrations, tokenizer, block, "")
    rankings = encode_rankings(read_preferences("my data/preferences.jsonl"), tokenizer, block, "")
    longest = max(len(row) for ranking in rankings for row in ranking.rows)
    assert len(kept) > 0.97 * len(demonstrations) and len(rankings) > 0 and longest > block / 3
