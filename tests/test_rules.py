"""What a flag is when nobody gives it: the rules, and that all scripts go through them."""
import itertools
import math
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import BYTES, SIZES, jsonl, make_data

import train_rm
import train_sft
from data import prepare, rules, stories
from data.examples import Ranking, standardise
from data.files import UserError
from data.records import read_sft
from data.tokenizer import train_tokenizer
from lib import threads
from lib.checkpoint import load
from lib.flags import check_pairs, flags
from lib.rewards import score_rows
from lib.start import fill, fit_responses, only_own_tokens, sft_by_rule, start_rm, start_sft, trained


def test_the_stories_get_what_their_results_were_made_with():
    """Another rule would ask for other tables in docs/results.md."""
    lines = dict(itertools.islice(stories._data_set(random.Random(0)), 1))["sft"]
    density = rules.density((line["prompt"], line["completion"]) for line in itertools.islice(lines, 2000))
    assert rules.sft(385_356, 929_024, 128, density, "") == {
        "epochs": 3.0, "dropout": 0.0, "bpe_dropout": 0.0, "batch_tokens": 2048, "lr": 4e-3}
    assert rules.rm(4_816_186, 4_814_206, 128) == {
        "epochs": 1.0, "bpe_dropout": 0.0, "batch_tokens": 1792, "lr": 5e-4}
    assert (train_rm.Config().pool, train_rm.Config().dropout) == ("last", 0)
    for lengths in ([], [54] * 1980 + [79] * 20):
        assert rules.max_new_tokens(128, lengths) == 100
    assert rules.block_size([65] * 990 + [90] * 10) == 128


def test_less_data_is_read_more_often_in_other_tokens():
    much, few = (rules.sft(tokens, 2_000_000, 128, 0.4, "") for tokens in (2_000_000, 200_000))
    assert (much["epochs"], much["dropout"], much["bpe_dropout"], much["lr"]) == (3, 0, 0, 4e-3)
    assert (few["epochs"], few["dropout"], few["bpe_dropout"], few["lr"]) == (16, 0.3, 0.05, 2e-3)
    least = rules.sft(50_000, 2_000_000, 128, 0.4, "")
    assert least == few | {"bpe_dropout": 0.2, "batch_tokens": least["batch_tokens"]}
    assert rules.sft(244_884, 1_854_208, 128, 0.41, "")["bpe_dropout"] == 0  # film reviews
    alike, between = (rules.sft(2_000, 2_000_000, 128, density, "") for density in (0.12, 0.3))
    assert (alike["bpe_dropout"], between["bpe_dropout"]) == (0, 0.1)
    for epochs, density in ((30.0, 0.4), (1.0, 0.9)):  # neither of them matters
        assert rules.sft(50_000, 2_000_000, 128, density, "", epochs)["bpe_dropout"] == 0.2
    assert rules.sft(200_000, 2_000_000, 128, 0.9, "")["bpe_dropout"] == 0.05
    much, few = rules.rm(10**7, 10**7, 128), rules.rm(200_000, 200_000, 128)
    assert (much["bpe_dropout"], few["bpe_dropout"], much["lr"], few["lr"]) == (0, 0.2, 5e-4, 5e-4)
    assert few["epochs"] == 8 and rules.rm(1_500_000, 250_000, 128)["epochs"] == 1  # a text is seen 6 times
    assert rules.rm(3_000, 3_000, 128)["epochs"] == 24


def test_between_few_and_much():
    """An epoch more is a thirteenth of the way for SFT, and a fifth for the reward model; --epochs that are
    given change neither."""
    for given in (None, 1.0):
        sft = rules.sft(500_000, 2_000_000, 128, 0.4, "", given)
        assert (sft["epochs"], sft["dropout"], sft["lr"]) == (given or 10, 0.16, 2.9e-3)
        assert sft["bpe_dropout"] == 0
        rm = rules.rm(500_000, 500_000, 128, given)
        assert (rm["epochs"], rm["bpe_dropout"]) == (given or 3, 0.08)
    assert rules.sft(500_000, 2_000_000, 128, 0.2, "")["epochs"] == 8
    for times in (6, 20):
        often = rules.rm(1_500_000 // times, 1_500_000 // times, 128)
        assert (often["epochs"], often["bpe_dropout"]) == (times, 0.2)
    shared = rules.rm(12_000_000, 2_000_000, 128)  # each response is in six rankings
    assert (shared["epochs"], shared["bpe_dropout"]) == (1, 0.2)
    once = rules.rm(1_100_000, 1_100_000, 128)
    assert (once["epochs"], once["bpe_dropout"]) == (1, 0)


def test_a_few_more_texts_change_little():
    """A run that is shorter the more data there is would be worse the more data there is."""
    many = [int(10**5 * 1.05**k) for k in range(100)]  # to 12 million
    for rule, most in ((lambda n: rules.sft(n, 1_870_000, 128, 0.4, ""), 1.35),
                       (lambda n: rules.rm(n, n, 128), 2)):
        runs = [rule(n) for n in many]
        read = [n * run["epochs"] for n, run in zip(many, runs, strict=True)]
        for (was, before), (now, after) in itertools.pairwise(zip(read, runs, strict=True)):
            assert was < most * now and abs(before["bpe_dropout"] - after["bpe_dropout"]) <= 0.041
            assert abs(before.get("dropout", 0) - after.get("dropout", 0)) <= 0.031
            assert 0.85 < before["lr"] / after["lr"] <= 1.2


def test_texts_that_are_alike_are_read_less_often():
    rng = random.Random(0)
    alike = [f"the {x} dog sat down by the old red barn and ate" for x in range(4000)]
    varied, others = (["".join(rng.choices("abcdefgh ", k=60)) for _ in range(4000)] for _ in range(2))
    gpt = SimpleNamespace(config=SimpleNamespace(d_model=128), parameters=lambda: [torch.zeros(10**6)])

    def epochs(prompts, completions, init=""):
        train = [*zip(prompts, completions, strict=True)]  # every second is looked at
        made, why = sft_by_rule(train, 400_000, gpt, train_sft.Config(init=init))
        assert f"compressed to {rules.density(train[::2]):.0%}, for 1000000" in why
        return made["epochs"]

    same = ["be kind. " * 50 + x for x in others]  # but for their ends
    assert epochs(alike, alike) == 3 and epochs(others, varied) == 6
    assert min(epochs(same, varied), epochs(alike, varied), epochs(others, ["yes"] * 4000)) > 3
    assert epochs(others, varied, "out/gpt2.pt") == 1


def test_density_is_of_the_texts_and_not_of_their_order():
    rng = random.Random(0)
    some = [("", " ".join(rng.choices(["ox", "sea", "tin", "owl"], k=20))) for _ in range(500)] * 4
    was = rules.density(some)
    rng.shuffle(some)
    assert rules.density(some) == was < 0.2
    assert rules.density([]) > 0 and rules.density([("", "x" * 10**6)]) < 0.1  # of beginnings
    assert rules.density([("x" * 10**6 + "end", "")]) < 0.2


def test_rates_fall_with_the_width():
    rates = [rules.sft(10**7, 10**6, width, 0.4, "")["lr"] for width in (128, 256, 768)]
    assert rates == pytest.approx([4e-3, 2e-3, 4e-3 / 6], rel=0.02)
    trained = rules.sft(10**7, 124 * 10**6, 768, 0.4, "gpt2.pt")
    assert 0.9e-4 < trained["lr"] < 1.3e-4 and trained["epochs"] == 1
    assert trained["dropout"] == trained["bpe_dropout"] == 0
    assert 1e-5 < rules.rm(10**8, 10**8, 768)["lr"] < 2e-5


def test_batches_grow_with_the_data():
    for rule in (lambda n: rules.sft(n, 10**6, 128, 0.4, ""), lambda n: rules.rm(n, n, 128)):
        sizes = [rule(n)["batch_tokens"] for n in (10**3, 10**4, 10**6, 10**7, 10**9)]
        assert sizes == sorted(sizes) and sizes[0] == 256 and sizes[2] <= 5000 and sizes[-1] == 16_384
        few = rule(10**4)
        assert 10**4 * few["epochs"] / few["batch_tokens"] >= 300


def test_only_tokens_of_its_own_are_split_by_rule(tmp_path):
    made, free = {"bpe_dropout": 0.2, "lr": 1.0}, train_rm.Config()
    own = train_tokenizer(["abab"], 300)
    assert only_own_tokens(made, free, own) == made
    for other in (BYTES, SimpleNamespace(bpe="some", name="gpt2")):
        assert only_own_tokens(made, free, other) == made | {"bpe_dropout": 0}
    make_data(tmp_path)
    given = train_sft.Config(**SIZES, bpe_dropout=0.1)
    with pytest.raises(UserError, match="--bpe-dropout does nothing with bytes"):
        start_sft(given, [("p", "ab")] * 9, [("p", "ab")], tmp_path)
    train_sft.main(train_sft.Config(**SIZES, data=str(tmp_path), out=str(tmp_path), epochs=0.1))
    with pytest.raises(UserError, match="--bpe-dropout does nothing with bytes"):
        start_rm(train_rm.Config(bpe_dropout=0.1), tmp_path / "sft.pt", tmp_path)


def test_the_vocabulary_is_as_large_as_the_text_gives(monkeypatch):
    assert rules.VOCABULARY == 8192
    train = [("", " ".join(f"{a}{b}ing" for b in "klmn")) for a in "abcdefgh"] * 2
    most = trained(train, None).vocab_size
    assert 300 < most < 8192
    monkeypatch.setattr(rules, "VOCABULARY", 290)
    assert trained(train, None).vocab_size == 290 and trained(train, 280).vocab_size == 280


@pytest.mark.parametrize("longest, wanted", [(1, 64), (60, 96), (100, 128), (5000, 1024)])
def test_block_size(longest, wanted):
    assert rules.block_size([longest]) == wanted
    assert rules.block_size([1] * 999 + [longest]) == 64  # one in a thousand is truncated
    assert rules.block_size([1, longest]) == wanted


def test_what_is_given_stays_and_what_is_not_is_printed_with_its_reason(capsys):
    cfg = train_sft.Config(lr=1e-3)
    cfg.given = {"lr"}
    made = fill(cfg, "because", lr=2e-3, epochs=3.0, batch_tokens=99)
    assert (made.lr, made.epochs, made.batch_tokens, made.given) == (1e-3, 3.0, 99, {"lr"})
    assert cfg.epochs is None  # a copy
    assert capsys.readouterr().out == "by the data: --epochs 3.0 --batch-tokens 99 (because)\n"
    assert fill(made, "because", lr=2e-3) == made and capsys.readouterr().out == ""


def test_start_fills_in_every_flag(tmp_path, capsys):
    make_data(tmp_path / "data")
    examples = [("p", f"some {i * i} words {i ^ 77} to {i * 99} learn") for i in range(9, 49)]
    sizes = {"n_layer": 1, "n_head": 2, "d_model": 16}
    gpt, tokenizer, cfg = start_sft(train_sft.Config(**sizes), examples, examples, tmp_path)
    assert None not in vars(cfg).values()
    assert gpt.config.vocab_size == tokenizer.vocab_size == cfg.vocab_size and cfg.block_size == 64
    assert gpt.config.dropout == cfg.dropout == 0.3
    said = capsys.readouterr().out
    assert said.startswith("by the data: --vocab-size ") and "--dropout 0.3" in said and "width 16" in said
    given = train_sft.Config(**SIZES | {"dropout": 0.1})
    gpt, tokenizer, cfg = start_sft(given, examples, examples, tmp_path)
    assert tokenizer.name == BYTES.name and cfg.dropout == gpt.config.dropout == 0.1
    assert cfg.vocab_size is None and "--vocab-size" not in capsys.readouterr().out


def test_the_reward_model_counts_a_response_once(tmp_path, capsys):
    make_data(tmp_path / "data")
    train_sft.main(train_sft.Config(**SIZES, data=str(tmp_path / "data"), out=str(tmp_path), epochs=0.1))
    for name in ("preferences", "preferences_val"):
        jsonl(tmp_path / f"{name}.jsonl", [{"prompt": "", "responses": [f"text {i}", f"text {i + k}"]}
                                           for i in range(50) for k in range(1, 4)])
    gpt, *_, cfg = start_rm(train_rm.Config(), tmp_path / "sft.pt", tmp_path)
    assert None not in vars(cfg).values() and cfg.pool == "last" and gpt.config.dropout == 0
    assert cfg.bpe_dropout == 0  # of bytes
    assert cfg.epochs == round(24 * 53 / 300) == 4
    assert cfg.max_new_tokens == 32 * 4 // 5
    given = train_rm.Config(pool="token", dropout=0.1)
    gpt, *_, cfg = start_rm(given, tmp_path / "sft.pt", tmp_path / "data")
    assert cfg.pool == "token" and gpt.config.dropout == cfg.dropout == 0.1
    longest = max(len(completion) + 1 for _, completion in read_sft(tmp_path / "data/sft.jsonl"))
    assert cfg.max_new_tokens == min(31 * 4 // 5, 4 * math.ceil(1.25 * longest / 4))


def test_help_says_that_it_is_by_the_data():
    text = " ".join(flags(train_rm.main, train_rm.Config).format_help().split())
    assert text.count("(default by the data)") == 5 and "None" not in text


def test_lengths_are_told_by_texts_of_so_many_characters_together():
    long, rows = ("a", "b" * 99), [("", "ab"), ("c", "d"), ("e", "f")]
    assert prepare.within(4, [long, *rows]) == rows[:2]
    assert prepare.within(4, [long, long]) == [long] and prepare.within(4, []) == []


def test_keep_is_best_or_last():
    for keep in ("best", "last"):
        check_pairs(train_rm.Config(keep=keep))
    with pytest.raises(UserError, match="--keep first: expected best or last"):
        check_pairs(train_rm.Config(keep="first"))


# ---- ratings ----

def test_ratings_are_learned_beside_the_order(tmp_path):
    """Two texts far apart and two that are close: the order alone can't tell which; ratings can."""
    rows = [{"prompt": "", "responses": [f"aa {i}", f"ab {i}", f"zz {i}"], "ratings": [1.0, 0.9, -4.0]}
            for i in range(200)]
    gaps = {}
    for name, some in (("rated", rows), ("ranked", [{k: row[k] for k in ("prompt", "responses")}
                                                    for row in rows])):
        data = tmp_path / name
        data.mkdir()
        jsonl(data / "preferences.jsonl", some)
        jsonl(data / "preferences_val.jsonl", some[:20])
        jsonl(data / "sft.jsonl", [{"prompt": "", "completion": row["responses"][0]} for row in rows])
        jsonl(data / "sft_val.jsonl", [{"prompt": "", "completion": "aa 1"}])
        train_sft.main(train_sft.Config(**SIZES, data=str(data), out=str(data), epochs=0.2))
        train_rm.main(train_rm.Config(data=str(data), out=str(data), device="cpu", epochs=6, lr=3e-3,
                                      batch_tokens=512, dropout=0.0, pool="last", keep="last"))
        rm = load(train_rm.RewardModel, data / "rm.pt")
        scores = score_rows(rm, [BYTES.encode(text) for text in rows[0]["responses"]], 99, "cpu") * rm.scale
        gaps[name] = (scores[0] - scores[1]).item() / (scores[1] - scores[2]).item()
    assert gaps["rated"] < 0.15 < gaps["ranked"]


# ---- other processes ----

def test_a_busy_machine_is_named(monkeypatch, capsys):
    monkeypatch.setattr(threads.torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    cpu = SimpleNamespace(type="cpu")
    for used, said in ((0.2, False), (0.9, True), (2.0, True)):
        monkeypatch.setattr(threads, "used_by_others", lambda used=used: used)
        threads.warn_if_busy(cpu)
        assert ("OMP_NUM_THREADS=1" in capsys.readouterr().out) == said
    threads.warn_if_busy(SimpleNamespace(type="cuda"))
    monkeypatch.setattr(threads.torch, "get_num_threads", lambda: 1)
    threads.warn_if_busy(cpu)
    assert capsys.readouterr().out == ""


def test_the_time_of_the_cores_is_read(monkeypatch, tmp_path):
    """user, nice, system, irq, softirq, steal are work; idle and iowait are not; other cores don't count."""
    stat = tmp_path / "stat"
    shots = iter(["cpu 9 9 9 9 9 9 9 9\ncpu0 100 0 0 500 50 0 0 0 0 0\ncpu1 7 0 0 1 1 0 0 0\n",
                  "cpu 9 9 9 9 9 9 9 9\ncpu0 106 1 2 900 90 3 4 5 0 0\ncpu1 99 0 0 1 1 0 0 0\n"])
    monkeypatch.setattr(threads, "open", lambda path: stat.write_text(next(shots)) and stat.open(),
                        raising=False)
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: {0}, raising=False)
    monkeypatch.setattr(threads.time, "sleep", lambda seconds: None)
    assert threads.used_by_others(0.25) == pytest.approx(21 / 25)


# ---- what a reviewer broke ----

@pytest.mark.parametrize("value", [0.1, 0.7, 3.3, -1e-7, 1e30])
def test_ratings_that_are_all_equal_teach_nothing(value):
    """Though the mean of an even number of 0.1 is not 0.1 in float64."""
    groups = [Ranking([], [[1], [2]], [0, 1], ("", (f"a{i}", f"b{i}")), None, [value, value])
              for i in range(3)]
    assert all(group.ratings is None for group in standardise(groups))


def test_standardised_ratings_count_each_response_once():
    ratings = [[4.0, 1.0], [4.0, 2.5], None]
    groups = [Ranking([], [[1], [2]], [0, 1], ("", ("a", f"b{i}")), None, some)
              for i, some in enumerate(ratings)]
    made = standardise(groups)
    known = [made[0].ratings[0], made[0].ratings[1], made[1].ratings[1]]
    assert made[2].ratings is None and made[0].ratings[0] == made[1].ratings[0]
    assert sum(known) == pytest.approx(0) and sum(x * x for x in known) / 3 == pytest.approx(1)


def test_the_block_size_fits_held_out_texts_and_the_texts_of_the_reward_model(tmp_path):
    short, sizes = [("p", "ab")] * 300, {"tokenizer": "bytes", "n_layer": 1, "n_head": 2, "d_model": 16}
    for val, ranked, wanted in ((short, None, 64), ([("p", "x" * 90)], None, 128), (short, "y" * 150, 192)):
        if ranked:
            jsonl(tmp_path / "preferences.jsonl", [{"prompt": "p", "chosen": "ab", "rejected": ranked}] * 9)
        cfg = start_sft(train_sft.Config(**sizes), short, val, tmp_path)[2]
        assert cfg.block_size == wanted
    (tmp_path / "preferences.jsonl").write_text("{broken\n")  # train_rm.py will say so
    assert start_sft(train_sft.Config(**sizes), short, short, tmp_path)[2].block_size == 64


@pytest.mark.parametrize("text", ['{"prompt": 3\n', ""])
@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_broken_file_of_demonstrations_stops_no_later_stage(tmp_path, text, skip_bad):
    (tmp_path / "sft.jsonl").write_text(text)
    cfg = fit_responses(train_rm.Config(skip_bad=skip_bad), tmp_path, BYTES, 200)
    assert cfg.max_new_tokens == 100
    assert fit_responses(train_rm.Config(max_new_tokens=7), tmp_path, BYTES, 200).max_new_tokens == 7


def test_epochs_that_are_given_reach_the_rules(tmp_path, monkeypatch):
    seen = []
    for name in ("sft", "rm"):
        shipped = getattr(rules, name)
        monkeypatch.setattr(rules, name, lambda *args, rule=shipped: seen.append(args[-1]) or rule(*args))
    make_data(tmp_path)
    start_sft(train_sft.Config(**SIZES, epochs=0.5), [("p", "ab")] * 9, [("p", "ab")], tmp_path)
    train_sft.main(train_sft.Config(**SIZES, data=str(tmp_path), out=str(tmp_path), epochs=0.1))
    start_rm(train_rm.Config(epochs=7.0), tmp_path / "sft.pt", tmp_path)
    assert seen == [0.5, 0.1, 7.0]


def test_epochs_that_are_given_set_the_size_of_a_batch():
    assert rules.sft(100_000, 10**6, 128, 0.4, "", 1.0)["batch_tokens"] == 100_000 // 300
    assert rules.rm(100_000, 100_000, 128, 3.0)["batch_tokens"] == 300_000 // 300


def test_narrow_networks_get_no_faster_rates():
    narrow, usual = ((rules.sft(10**7, 10**6, w, 0.4, ""), rules.rm(10**7, 10**7, w)) for w in (8, 128))
    assert narrow == usual


def test_prepare_names_the_sizes_that_train_sft_then_takes(tmp_path, monkeypatch, capsys):
    """Long rejected texts beside short chosen ones, too."""
    monkeypatch.chdir(tmp_path)
    rows = [(f"why {i}?", f"since {i}", f"as {i} " * 40) for i in range(80)]
    rows.insert(0, ("prompt", "chosen", "rejected"))
    Path("t.csv").write_text("".join(",".join(row) + "\n" for row in rows))
    assert prepare.main(["t.csv", "--to", "my", "--val", "0.2"]) == 0
    said = int(re.search(r"--block-size (\d+)", capsys.readouterr().out)[1])
    train, val = (read_sft(Path("my") / name) for name in ("sft.jsonl", "sft_val.jsonl"))
    cfg = start_sft(train_sft.Config(n_layer=1, n_head=2, d_model=16), train, val, Path("my"))[2]
    assert cfg.block_size == said >= 128
