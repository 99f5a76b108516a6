"""data/stories.py: what the gold score must and must not reward, the rater's probabilities, and the files."""
import json
import math
import os
import random
import re
import subprocess
import sys
from statistics import mean

import pytest

from data import files, stories
from data.examples import open_data
from data.files import UserError
from data.records import read_preferences, read_prompts, read_sft
from data.stories import BEST, SHARPNESS, ceiling, gold_score, rank, split_sentences

pytestmark = pytest.mark.slow

FRIEND = stories.WORDS["friend"][3]  # the other words below are in every version of the world
PROMPT = "Tell a story about a fox, a lantern and a river."
STORY = ["Near the river lived a brave fox.", "The fox found a red lantern under a stone.",
         '"What a fine lantern!" said the ' + FRIEND + ".",
         "From that day on the fox was never lonely again."]
SMALL = {"sft": 120, "sft_val": 30, "preferences": 800, "preferences_val": 40, "prompts": 120,
         "prompts_val": 30}


def gold(sentences, prompt=PROMPT):
    return gold_score(prompt, " ".join(sentences))


def made(seed, flaws=frozenset()):
    """A generated prompt and story."""
    rng = random.Random(seed)
    prompt, asked = stories.make_prompt(rng, rng.choice(stories.HEROES), rng.choice(stories.THINGS))
    return prompt, stories.tell(rng, asked, set(flaws))


# ---- gold ----

def test_a_perfect_story_has_gold_1():
    assert gold(STORY) == gold_score(PROMPT, " " + " ".join(STORY)) == BEST == 1


def test_every_story_without_flaws_has_gold_1():
    """The generator and the score agree on every sentence of the world, including "a" and "an"."""
    for seed in range(300):
        prompt, story = made(seed)
        assert gold(story, prompt) == pytest.approx(BEST), (prompt, story)
        assert split_sentences(" ".join(story)) == story
        assert not re.search(r"\b([Aa] [aeiou]|[Aa]n [^aeiou])", " ".join(story))


def test_prompts_name_the_parts_they_ask_for():
    for seed in range(300):
        rng = random.Random(seed)
        prompt, asked = stories.make_prompt(rng, "owl", "umbrella")
        assert "an owl" in prompt and "an umbrella" in prompt and "a owl" not in prompt
        told = stories.asked_for(prompt)
        assert told[:2] == ["owl", "umbrella"] and len(told) in (2, 3)
        assert len(told) == 2 or told[2] == asked["place"]


@pytest.mark.parametrize("worse", [
    [s.replace("lantern", "kite") for s in STORY],  # another thing
    [s.replace("fox", "bear") for s in STORY],
    STORY[:3] + ["Nobody ever saw the fox again."],  # a bad ending
    STORY[:3],  # no ending
    STORY[:1] + ["The fox went home happy and ate soup with everyone."],  # too short, and no lantern
    STORY[:2] + ["The fox was tired but did not give up.", "The fox looked at the sky for a while.",
                 "It rained, and then it stopped raining."] + STORY[2:],  # rambling
    STORY[:2] + STORY[1:2] + STORY[3:],  # a repeated sentence
    STORY[:1] + [STORY[1][:-1] + " and ran away."] + STORY[2:],  # extends a sentence of this world
    STORY[1:2] + STORY[:1] + STORY[2:],  # opening not first
    STORY + STORY[3:], STORY + ["The fox went home happy and ate soup with everyone."],  # two endings
    STORY + ["From that day on"],  # truncated
    STORY[:3] + ["From that day on the fox was never lonely again"],  # truncated
    STORY[:2] + ["The the said lantern fine fox."] + STORY[3:],  # not a sentence of this world
    [s.lower() for s in STORY], [s.rstrip(".") for s in STORY],
], ids=lambda s: " ".join(s)[-45:])
def test_each_flaw_lowers_gold(worse):
    assert 0 <= gold(worse) < gold(STORY) - 0.04


def test_flaws_of_the_generator_lower_gold():
    """A bad ending or wrong length always does; a swapped or dropped part does on average."""
    for seed in range(200):
        for flaw in ("sad", "ramble", "stub"):
            prompt, story = made(seed, {flaw})
            assert gold(story, prompt) < BEST - 0.05, (flaw, story)
    for flaw in ("swap", "drop"):
        flawed = [made(seed, {flaw}) for seed in range(200)]
        assert mean(gold(story, prompt) for prompt, story in flawed) < 0.95


def test_more_sentences_than_four_are_worse():
    extra = [s.format(hero="fox", friend=FRIEND, food="soup", weather="fog", place="river", kind="shy")
             for s in (
        "The {hero} was tired but did not give up.", "The {hero} looked at the sky for a while.",
        "Just then a {kind} {friend} came round the corner.",
        "Soon the whole {place} was talking about the bell.",
        "The {hero} walked all the way to the {place}.", "The {hero} gave the {friend} some {food}.",
        "The {friend} talked about {food} and then about the {weather}.")]
    scores = [gold(STORY[:3] + extra[:n] + STORY[3:]) for n in range(len(extra) + 1)]
    assert scores[0] == 1 and scores == sorted(scores, reverse=True) and min(scores) > 0
    assert scores[0] > scores[1]


GIBBERISH = ["", " ", "\n", ".", "...", "!?", "fox lantern river", "fox. lantern. river.",
             "fox fox fox fox. lantern lantern.",
             "The fox the lantern the river happy ever.", "asdf qwer zxcv.", '"', '"""', "\0", "漢字。",
             "a" * 5000,
             PROMPT, "Human: hi", "The fox found a red lantern under a stone",
             " ".join(stories.HEROES + stories.THINGS),
             "once upon a time. and they lived happily. the end."]


@pytest.mark.parametrize("text", GIBBERISH, ids=lambda t: repr(t[:20]))
def test_gibberish_has_gold_0(text):
    assert gold_score(PROMPT, text) == 0


def test_gold_lies_between_0_and_1_and_repeating_never_pays():
    rng = random.Random(0)
    for _ in range(400):
        hero, thing = rng.choice(stories.HEROES), rng.choice(stories.THINGS)
        prompt, asked = stories.make_prompt(rng, hero, thing)
        story = stories.tell(rng, asked, set())
        text = stories.broken(rng, asked, story) if rng.random() < 0.5 else stories.demonstration(rng, asked)
        score = gold_score(prompt, text)
        assert 0 <= score <= BEST
        assert gold_score(prompt, text + " " + text) <= max(score, 0.5)
        assert gold_score(prompt, text + " " + " ".join([hero, thing] * 5) + ".") <= max(score, 0.5)


@pytest.mark.parametrize("junk", [".", "!", '"', "...", "x", "the", "fox", "fox.", "\\n.", '" "', "\u00ad"])
def test_junk_between_sentences_lowers_gold(junk):
    for i in range(5):
        assert gold(STORY[:i] + [junk] + STORY[i:]) < BEST


def test_naming_the_parts_outside_a_sentence_gains_nothing():
    story = [s.replace("fox", "bear").replace("lantern", "kite") for s in STORY]
    stuffed = story[:3] + ["Fox lantern river fox lantern."] + story[3:]
    assert gold(stuffed) < gold(story)


def test_gold_of_a_prompt_that_asks_for_nothing():
    assert 0 <= gold_score("Hello?", " ".join(STORY)) <= 1


# ---- the rater ----

def test_rank_prefers_by_the_sigmoid_of_the_gap():
    """Within 3 standard deviations, for gaps of all sizes, whatever the order of the list."""
    rng, n = random.Random(1), 3000
    others = [STORY[:3], STORY[:1] + STORY[3:], [s.replace("lantern", "kite") for s in STORY],
              STORY[:2] + ["It rained, and then it stopped raining.",
                           "The fox was tired but did not give up."] + STORY[2:]]
    pairs = [(STORY, other) for other in others]
    for better, worse in [*pairs, (others[2], others[1]), (STORY[::-1], STORY[1:])]:
        pair = [" ".join(better), " ".join(worse)]
        gap = gold_score(PROMPT, pair[0]) - gold_score(PROMPT, pair[1])
        p = 1 / (1 + math.exp(-SHARPNESS * gap))
        for listed in (pair, pair[::-1]):
            share = mean(rank(rng, PROMPT, listed)[0] == pair[0] for _ in range(n))
            assert abs(share - p) <= 3 * math.sqrt(p * (1 - p) / n) + 1e-3, (gap, share, p)


def test_any_two_of_four_are_a_bradley_terry_comparison():
    rng, n = random.Random(2), 3000
    four = [" ".join(s) for s in (STORY, STORY[:3] + ["Nobody ever saw the fox again."],
                                  [s.replace("lantern", "kite") for s in STORY], STORY[:3])]
    orders = [rank(rng, PROMPT, four) for _ in range(n)]
    assert all(sorted(order) == sorted(four) for order in orders[:50])
    for a in range(4):
        for b in range(a):
            p = 1 / (1 + math.exp(-SHARPNESS * (gold_score(PROMPT, four[a]) - gold_score(PROMPT, four[b]))))
            share = mean(order.index(four[a]) < order.index(four[b]) for order in orders)
            assert abs(share - p) <= 3.5 * math.sqrt(p * (1 - p) / n) + 1e-3


def test_ceiling_is_the_larger_of_p_and_1_minus_p():
    good, bad = " ".join(STORY), " ".join(STORY[:3])
    p = 1 / (1 + math.exp(-SHARPNESS * (gold_score(PROMPT, good) - gold_score(PROMPT, bad))))
    assert ceiling(PROMPT, good, bad) == ceiling(PROMPT, bad, good) == pytest.approx(max(p, 1 - p))
    assert p > 0.5
    assert ceiling(PROMPT, good, good) == ceiling(PROMPT, "x", "y") == 0.5


# ---- the files ----

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stories, "SIZES", SMALL)
        return stories.make(tmp_path_factory.mktemp("made") / "stories")


def test_R27_mean_ceiling_is_how_often_gold_agrees_with_the_ranks(folder):
    """One pair per prompt, chosen without looking at the ranks; equal gold agrees half the time."""
    agree, best = [], []
    for prompt, texts, ranks, *_ in read_preferences(folder / "preferences.jsonl"):
        one, two = sorted(texts)[:2]
        gap = gold_score(prompt, one) - gold_score(prompt, two)
        first = ranks[texts.index(one)] < ranks[texts.index(two)]
        agree.append(0.5 if gap == 0 else float((gap > 0) == first))
        best.append(0.5 if gap == 0 else ceiling(prompt, one, two))
    sd = math.sqrt(sum(c * (1 - c) for c in best)) / len(best)
    assert abs(mean(agree) - mean(best)) < 3 * sd and 0.6 < mean(best) < 0.99


def test_files_are_read_by_records(folder):
    assert sorted(p.name for p in folder.iterdir()) == sorted(f"{name}.jsonl" for name in SMALL)
    for name, size in SMALL.items():
        read = {"sft": read_sft, "pre": read_preferences, "pro": read_prompts}[name[:3]]
        rows = read(folder / f"{name}.jsonl")
        assert len(rows) == size
        for row in rows:
            prompt = row if isinstance(row, str) else row[0]
            assert len(stories.asked_for(prompt)) == 2 and prompt[-1] in ".?"
            if read is read_sft:
                assert row[1][0] == " " and row[1][1] != " "
            if read is read_preferences:
                assert len(row[1]) >= 2 and all(text[:1] == " " for text in row[1]) and len(set(row[2])) > 1


def pairs(folder, name):
    lines = (folder / name).read_text().splitlines()
    return {tuple(stories.asked_for(json.loads(line)["prompt"])[:2]) for line in lines}


def test_R25_hero_and_thing_of_validation_never_meet_in_training(folder):
    val = set.union(*(pairs(folder, f"{name}_val.jsonl") for name in ("sft", "preferences", "prompts")))
    train = set.union(*(pairs(folder, f"{name}.jsonl") for name in ("sft", "preferences", "prompts")))
    assert len(val) > 5 and len(train) > 4 * len(val) and not val & train
    assert ("fox", "lantern") not in train
    assert {word for pair in val for word in pair} <= {word for pair in train for word in pair}


def test_demonstrations_are_of_mixed_quality(folder):
    scores = [gold_score(prompt, text) for prompt, text in read_sft(folder / "sft.jsonl")]
    assert 0.03 < mean(score > 0.999 for score in scores) < 0.5 and 0.5 < mean(scores) < 0.9
    assert all(re.search("[.!?]$", text) for _, text in read_sft(folder / "sft.jsonl"))


def test_best_ranked_is_better_than_worst_ranked(folder):
    rows = read_preferences(folder / "preferences.jsonl")
    first, last = (mean(gold_score(row[0], row[1][i]) for row in rows) for i in (0, -1))
    assert first > last + 0.2


def test_data_is_the_same_every_time_and_made_once(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stories, "SIZES", SMALL)
    random.seed(123)  # the global generator is not used
    again, other = stories.make(tmp_path / "again"), stories.make(tmp_path / "other", seed=1)
    for name in SMALL:
        raw = (folder / f"{name}.jsonl").read_bytes()
        assert (again / f"{name}.jsonl").read_bytes() == raw != (other / f"{name}.jsonl").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "other"]  # no partial folder beside them
    (again / "sft.jsonl").write_text("mine")
    assert stories.make(again) == again and (again / "sft.jsonl").read_text() == "mine"
    assert "newer" not in capsys.readouterr().out
    os.utime(again / "sft.jsonl", (0, 0))  # as if stories.py had changed since
    stories.make(again)
    assert f"stories.py is newer than {again}; delete the folder" in capsys.readouterr().out
    assert (again / "sft.jsonl").read_text() == "mine"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch, error):
    monkeypatch.setattr(stories, "SIZES", SMALL)

    def fails(*args):
        raise error
    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else UserError):
        stories.make(tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_two_processes_may_make_the_stories_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(stories, "SIZES", SMALL)
    replace = os.replace

    def second(beside, folder):  # the other process finishes first, at the last moment
        folder.mkdir()
        (folder / "sft.jsonl").write_text("the other's")
        replace(beside, folder)
    monkeypatch.setattr(os, "replace", second)
    assert (stories.make(tmp_path / "new") / "sft.jsonl").read_text() == "the other's"
    assert [p.name for p in tmp_path.iterdir()] == ["new"]


def test_many_processes_may_delete_a_dead_ones_folder(tmp_path):
    """Six at once, on what killed ones left: whoever comes second must not miss what the first deleted."""
    script = (f"import sys; sys.path.insert(0, {os.getcwd()!r})\nfrom pathlib import Path\n"
              f"from data import stories\nstories.SIZES = {SMALL | {'preferences': 100}}\n"
              "sys.stdin.read()\nstories.make(Path(sys.argv[1]))")
    for trial in range(3):
        for pid in range(10**9, 10**9 + 20):
            (tmp_path / f"{trial}.part{pid}").mkdir()
            for i in range(40):
                (tmp_path / f"{trial}.part{pid}" / f"{i}").touch()
        runs = [subprocess.Popen([sys.executable, "-c", script, tmp_path / f"{trial}"], stdin=subprocess.PIPE,
                                 stderr=subprocess.PIPE, text=True) for _ in range(6)]
        for run in runs:
            run.stdin.close()  # all wait for this
        said = [(run.stderr.read(), run.wait()) for run in runs]
        assert said == [("", 0)] * 6
        assert len(list((tmp_path / f"{trial}").iterdir())) == len(SMALL)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1", "2"]


def test_a_dead_ones_folder_that_vanishes(tmp_path, monkeypatch):
    """Another process deletes it just after this one has found it."""
    monkeypatch.setattr(stories, "SIZES", SMALL)
    (tmp_path / "new.part1000000000").mkdir()

    def dead(pid):
        (tmp_path / f"new.part{pid}").rmdir()
        return False
    monkeypatch.setattr(files, "_alive", dead)
    stories.make(tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["new"]


def test_stories_is_the_name_of_the_built_in_data(folder, monkeypatch):
    monkeypatch.setattr(stories, "make", lambda: folder)
    assert open_data("stories") == (folder, stories)
