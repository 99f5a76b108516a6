"""BPE-dropout: the same text in other tokens, in training only, and the same again after a resume."""
import random
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import BYTES, SIZES, jsonl, make_data

import train_rm
import train_sft
from data import tokenizer as tokenizers
from data.bpe_dropout import split_tokens, splitter
from data.examples import Ranking, encode_demonstrations, encode_rankings
from data.tokenizer import train_tokenizer

TEXTS = [f"the {a}er {b}ing of a {a} is {b}ed, {c}"
         for a in ("sing", "swim", "bake") for b in ("bark", "rain")
         for c in ("unhappily", "happily", "unwell", "well", "naïve")]


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer(TEXTS, 400)


def rows_of(bpe, room=99):
    examples = [("the singer", " " + text) for text in TEXTS]
    rankings = [("the singer", [" " + text, " " + text[::-1]], [0, 1], None, None) for text in TEXTS]
    return (encode_demonstrations(examples, bpe, room, "x"), encode_rankings(rankings, bpe, room, "x"))


def test_halves_are_what_a_token_was_merged_from(bpe):
    """Without itself and the tokens after it a token is encoded as its halves."""
    ranks, halves = tokenizers._parse(bpe.bpe, ""), bpe.halves()
    assert set(halves) == set(range(256, bpe.eos))
    for token, id in ranks.items():
        if id in halves and token.isascii():
            before = tokenizers._from_ranks("", {t: i for t, i in ranks.items() if i < id})
            assert before.encode(token.decode()) == [*halves[id]]


def test_halves_make_up_the_token_and_bytes_have_none(bpe):
    token = bpe.encoding.decode_single_token_bytes
    assert all(token(a) + token(b) == token(id) for id, (a, b) in bpe.halves().items())
    assert BYTES.halves() == {}


def test_a_token_that_no_merge_makes_stays_whole():
    """A BPE file may hold such. Of two merges the one that was learned first is done first."""
    ranks = {bytes([i]): i for i in range(256)} | {b"xyz": 256, b"ab": 257, b"abc": 258, b"bc": 259}
    ranks |= {b"aa": 260, b"aaa": 261}  # of two places the first
    made = tokenizers._from_ranks("", ranks, tokenizers._dump(ranks))
    assert made.halves() == {257: (97, 98), 258: (257, 99), 259: (98, 99), 260: (97, 97), 261: (260, 97)}


def test_tokens_of_long_words_take_no_time():
    made = train_tokenizer(["".join(random.Random(0).choices("ACGT", k=1500))] * 2, 8192)
    assert max(len(made.encoding.decode_single_token_bytes(id)) for id in made.halves()) <= 64


def test_split_tokens_spell_the_same_text(bpe):
    halves = bpe.halves()
    for text in TEXTS:
        row = bpe.encode(text)
        for share in (0.0, 0.3, 0.99):
            made = split_tokens(row, halves, share, random.Random(0))
            assert bpe.decode(made) == text and (made == row) == (share == 0)
            assert made == split_tokens(np.array(row, np.uint16), halves, share, random.Random(0))
        assert split_tokens(row, halves, 1.0, random.Random(0)) == [*text.encode()]


def test_the_share_is_that_of_tokens_which_have_halves(bpe):
    halves, rng, id = bpe.halves(), random.Random(0), 256  # of two bytes
    assert all(half < 256 for half in halves[id])
    made = split_tokens([id] * 10_000, halves, 0.2, rng)
    assert abs(made.count(id) / 10_000 - 0.8) < 0.02 and len(made) == 20_000 - made.count(id)
    [(row, P)] = splitter(bpe, 99_999, SimpleNamespace(bpe_dropout=0.2, seed=1))([([id] * 10_000, 5_000)], 1)
    assert abs(row.count(id) / 10_000 - 0.8) < 0.02 and abs(P - 6_000) < 100


def test_each_step_splits_in_another_way_and_gives_it_again(bpe):
    for examples in rows_of(bpe):
        split = splitter(bpe, 99, SimpleNamespace(bpe_dropout=0.3, seed=1))
        other = splitter(bpe, 99, SimpleNamespace(bpe_dropout=0.3, seed=2))
        one = split(examples, 7)
        assert one == split(examples, 7) != split(examples, 8) and one != other(examples, 7) != [*examples]
        assert splitter(bpe, 99, SimpleNamespace(bpe_dropout=0.0, seed=1))(examples, 7) is examples
        assert splitter(BYTES, 99, SimpleNamespace(bpe_dropout=0.3, seed=1))(examples, 7) is examples


def test_prompts_and_responses_stay_what_they_are(bpe):
    demonstrations, rankings = rows_of(bpe)
    split = splitter(bpe, 99, SimpleNamespace(bpe_dropout=0.4, seed=1))
    for (row, P), text in zip(split(demonstrations, 1), TEXTS, strict=True):
        assert bpe.decode(row[:P]) == "the singer" and bpe.decode(row[P:]) == " " + text
        assert row[-1] == bpe.eos
    for made, was in zip(split(rankings, 1), rankings, strict=True):
        P = len(made.prompt)
        assert all(row[:P] == made.prompt and row[-1] == bpe.eos for row in made.rows)
        assert bpe.decode(made.prompt) == "the singer"
        assert [bpe.decode(row[P:]) for row in made.rows] == [bpe.decode(row[len(was.prompt):])
                                                              for row in was.rows]
        assert made._replace(prompt=was.prompt, rows=was.rows) == was


def test_what_would_not_fit_stays_whole(bpe):
    for examples in rows_of(bpe):
        room = max(map(len, examples[0].rows if isinstance(examples[0], Ranking) else examples[0][:1])) + 5
        examples = [one for one in examples
                    if max(map(len, one.rows if isinstance(one, Ranking) else one[:1])) <= room]
        made = splitter(bpe, room, SimpleNamespace(bpe_dropout=0.4, seed=1))(examples, 1)
        rows = [row for one in made for row in (one.rows if isinstance(one, Ranking) else one[:1])]
        assert max(map(len, rows)) <= room
        assert any(a == b for a, b in zip(made, examples, strict=True)) and made != [*examples]


def test_what_just_fits_is_split(bpe):
    cfg = SimpleNamespace(bpe_dropout=0.4, seed=1)
    one = rows_of(bpe)[0][:1]
    longest = splitter(bpe, 99, cfg)(one, 1)
    room = len(longest[0][0])
    assert splitter(bpe, room, cfg)(one, 1) == longest != one == splitter(bpe, room - 1, cfg)(one, 1)


def test_the_scripts_split_anew_in_each_step(tmp_path, monkeypatch):
    make_data(tmp_path)
    for module, more, fits in ((train_sft, SIZES | {"block_size": 33}, 33),
                               (train_rm, {"batch_tokens": 512, "pool": "token"}, 32)):
        seen, rooms = [], []

        def splitter(tokenizer, room, cfg, seen=seen, rooms=rooms):
            rooms.append(room)
            return lambda examples, step: seen.append(step) or examples

        monkeypatch.setattr(module, "splitter", splitter)
        module.main(module.Config(**more | {"data": str(tmp_path), "out": str(tmp_path), "epochs": 4.0}))
        assert seen == [*range(1, len(seen) + 1)] and len(seen) > 3
        assert rooms == [fits]


def test_the_scripts_train_on_split_tokens_and_measure_on_whole_ones(tmp_path, monkeypatch, bpe):
    jsonl(tmp_path / "sft.jsonl", [{"prompt": "the singer", "completion": " " + text} for text in TEXTS])
    jsonl(tmp_path / "preferences.jsonl", [{"prompt": "the singer", "responses": [" " + text, " no"]}
                                           for text in TEXTS])
    for name in ("sft", "preferences"):
        (tmp_path / f"{name}_val.jsonl").write_text((tmp_path / f"{name}.jsonl").read_text())
    tokenizers.save_bpe(tokenizers._parse(bpe.bpe, ""), tmp_path / "my.bpe")
    seen = {"train": [], "val": []}

    def note(module, name, kind):
        shipped = getattr(module, name)

        def noted(model, examples, *rest, **more):
            for one in examples:
                rows, P = (one.rows, len(one.prompt)) if isinstance(one, Ranking) else ([one[0]], one[1])
                seen[kind] += [([*row[:P]], [*row[P:]]) for row in rows]
            return shipped(model, examples, *rest, **more)

        monkeypatch.setattr(module, name, noted)

    note(train_sft, "sft_backward", "train")
    note(train_sft, "evaluate", "val")
    note(train_rm, "ranking_backward", "train")
    note(train_rm, "measure_pairs", "val")
    common = {"data": str(tmp_path), "out": str(tmp_path), "epochs": 3.0, "bpe_dropout": 0.3, "device": "cpu"}
    for module, more in ((train_sft, SIZES | {"tokenizer": str(tmp_path / "my.bpe"), "block_size": 96}),
                         (train_rm, {"batch_tokens": 512})):
        for rows in seen.values():
            rows.clear()
        module.main(module.Config(**more | common))
        assert all(bpe.decode(P) == "the singer" for rows in seen.values() for P, _ in rows)
        texts = {" " + text for text in TEXTS} | {" no"}
        assert all(bpe.decode(row) in texts for rows in seen.values() for _, row in rows)
        different = {kind: len({tuple(row) for _, row in rows}) for kind, rows in seen.items()}
        assert different["val"] <= len(TEXTS) + 1 and different["train"] > 1.5 * different["val"]
        whole = bpe.encode(" " + TEXTS[0])
        assert any(row[:-1] == whole for _, row in seen["val"])
