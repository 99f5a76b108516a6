"""Reviews: a small archive in the real one's format, and the real one where available."""
import gzip
import io
import itertools
import json
import tarfile
from pathlib import Path

import pytest

from data import reviews
from data.convert import FILES
from data.files import UserError
from data.reviews import Sentence

pytestmark = pytest.mark.slow

REAL = Path(__file__).resolve().parents[2] / "shared/data/vader/hutto_ICWSM_2014.tar.gz"
FOLDER = "hutto_ICWSM_2014"
PEOPLE = "Actors Writers Dancers Critics Children Robots Sailors Bakers Pilots Ghosts".split()
ENDINGS = ["in  a ''brilliant'' and moving film", "are dull", "sing badly for hours &amp; hours",
           "lift this little `drama'    somehow    above it", "fail", "made me caf\u00e9 sick"]
TEXTS = [f"{who} {what}." for who, what in itertools.product(PEOPLE, ENDINGS)]


def plain(text):
    """Independent of reviews.key: letters and digits only."""
    return "".join(c for c in text.lower() if c.isalnum())


def source(texts=TEXTS):
    """(truth, ratings) as in the archive. Few distinct means, so there are ties."""
    truth, ratings = [], []
    for i, text in enumerate(texts):
        panel = [(i * 7 + k * k) % 5 - 2 for k in range(3 + i % 4)]
        mean = sum(panel) / len(panel)
        truth.append(f"{i + 1}\t{mean:.11f}\t{text}\r\n")
        ratings.append(f"{i + 1}\t{mean:.9f}\t0.5\t{panel}\r\n")
    return "".join(truth), "".join(ratings)


def pack(path, truth, ratings, folder=FOLDER):
    """The .tar.gz, with an extra member as in the real one; None omits a member."""
    with tarfile.open(path, "w:gz") as tar:
        for name, text in [("_README_.txt", "cite us"), (reviews.TRUTH, truth),
                           (reviews.RATINGS, ratings)]:
            if text is not None:
                raw = text if isinstance(text, bytes) else text.encode()
                info = tarfile.TarInfo(f"{folder}/{name}")
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))
    return path


def run(source_path, target):
    return reviews.main(["--from", str(source_path), "--to", str(target)])


def load(folder):
    return {name: [json.loads(line) for line in (folder / name).read_text("utf-8").splitlines()]
            for name in FILES}


def sides(data):
    """Keys of all sentences: (training, validation)."""
    found = []
    for side in (".jsonl", "_val.jsonl"):
        texts = [line["prompt"] + line["completion"] for line in data["sft" + side]]
        for line in data["preferences" + side]:
            texts += line.get("responses") or [line["chosen"], line["rejected"]]
        found.append({plain(text) for text in texts})
    return found


def errors(capsys, *args):
    """The one line on stderr when the command fails."""
    assert reviews.main([str(a) for a in args]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
    return err


@pytest.fixture
def archive(tmp_path):
    return pack(tmp_path / "small.tar.gz", *source())


@pytest.fixture
def data(archive, tmp_path):
    assert run(archive, tmp_path / "out") == 0
    return load(tmp_path / "out")


# ---- contents of the files ----

def test_no_sentence_on_both_sides(data):
    train, val = sides(data)
    assert not train & val and len(train) > 40 and len(val) > 4
    assert train | val <= {plain(reviews.clean(text)) for text in TEXTS}


def test_prompt_and_completion_make_the_sentence(data):
    whole = {reviews.clean(text) for text in TEXTS}
    lines = data["sft.jsonl"] + data["sft_val.jsonl"]
    assert len(lines) == sum(len(text.split()) > 2 for text in whole)
    for line in lines:
        assert set(line) == {"prompt", "completion"}
        assert line["prompt"] + line["completion"] in whole
        assert 2 <= len(line["prompt"].split()) <= 5
        assert line["completion"][0] == " " and line["completion"].strip()
    assert {len(line["prompt"].split()) for line in lines} == {2, 3, 4, 5}
    for side in (".jsonl", "_val.jsonl"):
        shown = [{"prompt": line["prompt"]} for line in data["sft" + side]]
        assert data["prompts" + side] == shown


def test_rankings_follow_the_gold_ratings_and_mark_ties(data):
    lines, seen = data["preferences.jsonl"], []
    for line in lines:
        gold, texts = line["ratings"], line["responses"]
        assert line["prompt"] == "" and len(texts) == len(gold) == len(set(texts))
        assert len(gold) == 2 or 4 <= len(gold) <= 9
        assert gold == sorted(gold, reverse=True) and gold[0] > gold[-1]
        assert ("ranks" in line) == (len(set(gold)) < len(gold))
        ranks = line.get("ranks", list(range(len(gold))))
        for (g, r), (h, s) in itertools.pairwise(zip(gold, ranks, strict=True)):
            assert s - r == (g > h)
        assert ranks[0] == 0
        seen += texts
    assert {len(line["ratings"]) for line in lines} > {2, 4}
    assert any("ranks" in line for line in lines)
    assert max(map(seen.count, seen)) == reviews.LISTS_EACH
    assert min(map(seen.count, seen)) >= reviews.LISTS_EACH - 2


def test_lists_that_teach_nothing_are_dropped():
    assert list(reviews.rankings([Sentence(f"s{i}", 1.0, [1, 1]) for i in range(40)])) == []
    for n in range(2, 30):  # whatever the remainder
        few = [Sentence(f"s{i}", i % 3, [0, 0]) for i in range(n)]
        for line in reviews.rankings(few):
            assert len(line["ratings"]) in (2, 4, 5, 6, 7, 8, 9) and len(set(line["ratings"])) > 1


def test_gold_is_the_mean_of_the_ratings(data):
    truth, _ = source()
    mean = {reviews.clean(text): float(m) for _, m, text in
            (line.split("\t") for line in truth.splitlines())}
    for line in data["preferences.jsonl"]:
        assert line["ratings"] == pytest.approx([mean[t] for t in line["responses"]], abs=1e-4)
    for line in data["preferences_val.jsonl"]:
        assert line["ratings"] == pytest.approx([mean[line["chosen"]], mean[line["rejected"]]],
                                             abs=1e-4)


def test_validation_is_distinct_pairs_of_different_means(data):
    lines = data["preferences_val.jsonl"]
    assert all(set(line) == {"prompt", "chosen", "rejected", "ratings"} for line in lines)
    assert all(line["prompt"] == "" and line["ratings"][0] > line["ratings"][1] for line in lines)
    assert len({(line["chosen"], line["rejected"]) for line in lines}) == len(lines) > 5
    train = [Sentence(f"s{i}", i % 9, [0, 0]) for i in range(50)]
    assert len(reviews.random_pairs(train, count=100)) == 100


def test_files_can_be_read_by_a_person(data, tmp_path):
    raw = (tmp_path / "out" / "sft.jsonl").read_bytes()
    assert "caf\u00e9".encode() in raw and b"\r" not in raw and raw.endswith(b"}\n")


def test_source_text_is_cleaned():
    assert reviews.clean("A ''big''  one    or `two' &amp; three\u00e9   ") == (
        "A \"big\" one -- or 'two' & three\u00e9")
    assert all(reviews.clean(reviews.clean(t)) == reviews.clean(t) for t in TEXTS)


def test_duplicate_sentences_are_merged(tmp_path):
    texts = TEXTS + ["actors  ARE dull!", "Actors -- are dull"]
    truth, ratings = (text.encode() for text in source(texts))
    merged = reviews.parse({reviews.TRUTH: truth, reviews.RATINGS: ratings})
    same = [s for s in merged if plain(s.text) == "actorsaredull"]
    assert len(merged) == len(TEXTS) and len(same) == 1
    rows = [line.split(b"\t") for line in ratings.splitlines()]
    panels = [json.loads(rows[i][3]) for i in (1, 60, 61)]
    assert same[0].text == "Actors are dull." and same[0].ratings == sum(panels, [])
    assert same[0].mean == pytest.approx(sum(sum(panels, [])) / len(sum(panels, [])), abs=1e-4)


def test_same_bytes_again_and_from_a_folder_and_in_another_order(archive, tmp_path):
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    back = ["".join(reversed(text.splitlines(keepends=True))) for text in source()]
    turned = pack(tmp_path / "turned.tar.gz", *back, folder="./other")
    places = [archive, archive, tmp_path / "unpacked", tmp_path / "unpacked" / FOLDER, turned]
    for i, place in enumerate(places):
        assert run(place, tmp_path / f"out{i}") == 0
    first, *others = [[(tmp_path / f"out{i}" / name).read_bytes() for name in FILES]
                      for i in range(len(places))]
    assert all(other == first for other in others)


def test_halves_are_even_and_depend_on_the_sentence_alone():
    halves = [reviews.half(f"sentence {i}") for i in range(400)]
    assert set(halves) == {0, 1} and 150 < sum(halves) < 250
    assert reviews.half("The Film!") == reviews.half("the  film")
    train = [t for t in map("number {}".format, range(2000)) if not reviews.is_val(t)]
    assert 0.45 < sum(map(reviews.half, train)) / len(train) < 0.55


def test_half_trains_on_half_of_the_sentences_and_holds_out_the_same(archive, tmp_path):
    whole, *halves = [tmp_path / name for name in ("all", "0", "1")]
    assert run(archive, whole) == 0
    for number, folder in enumerate(halves):
        assert reviews.main(["--from", str(archive), "--to", str(folder), "--half", str(number)]) == 0
    first, second, both = ({text for line in load(folder)["preferences.jsonl"] for text in line["responses"]}
                           for folder in (*halves, whole))
    assert first and second and not first & second and first | second <= both
    for name in FILES:
        if name.endswith("_val.jsonl"):
            assert load(halves[0])[name] == load(halves[1])[name] == load(whole)[name]


# ---- ceilings ----

def sentence(*ratings):
    return Sentence("", sum(ratings) / len(ratings), list(ratings))


def test_rater_accuracy_by_hand():
    # (1, 3) against (2, 0): 1 > 0 and 3 > 2, 0 agree, 1 > 2 does not: 3 of 4
    assert reviews.rater_accuracy([(sentence(1, 3), sentence(2, 0))]) == 0.75
    # 2 against 2 counts half: (2 + 0.5 + 0.5 + 1) / 4 with 3 > 2 twice
    assert reviews.rater_accuracy([(sentence(3, 2), sentence(2, 2))]) == 0.75
    both = [(sentence(1, 3), sentence(2, 0)), (sentence(4, 4, 4), sentence(1, 2))]
    assert reviews.rater_accuracy(both) == 0.875


def test_half_panel_accuracy_by_hand():
    assert reviews.half_panel_accuracy([(sentence(3, 3), sentence(1, 1))]) == 1.0
    assert reviews.half_panel_accuracy([(sentence(3, 0), sentence(1, 1))]) == 0.0
    assert reviews.half_panel_accuracy([(sentence(2, 1), sentence(1, 1))]) == 0.5
    # 3, 3 | 0, 0 in one of three splits, else 3, 0 | 3, 0
    blocks = [(sentence(3, 3, 0, 0), sentence(1, 1, 1, 1))]
    assert reviews.half_panel_accuracy(blocks, splits=500) == pytest.approx(2 / 3, abs=0.07)
    both = [(sentence(3, 3, 3), sentence(1, 1)), (sentence(3, 0), sentence(1, 1))]
    assert reviews.half_panel_accuracy(both) == 0.5


def test_ceilings_are_printed(archive, tmp_path, capsys):
    assert run(archive, tmp_path / "out") == 0
    out = capsys.readouterr().out
    n = len(load(tmp_path / "out")["preferences_val.jsonl"])
    assert f"held-out pairs: n = {n}, one rater against the panel's mean" in out
    assert "half-panel against half-panel" in out


# ---- atomic writes ----

@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_no_partial_folder_is_left(archive, tmp_path, monkeypatch, capsys, error):
    target, beside = tmp_path / "there" / "out", []

    def fails(sentences):
        beside.extend(target.parent.iterdir())
        yield {"prompt": ""}
        raise error
    monkeypatch.setattr(reviews, "rankings", fails)
    if isinstance(error, OSError):
        assert "No space left" in errors(capsys, "--from", archive, "--to", target)
    else:
        assert run(archive, target) == 130
    assert len(beside) == 1 and beside[0] != target and list(target.parent.iterdir()) == []


def test_a_complete_data_set_is_left_alone(archive, tmp_path, capsys):
    target = tmp_path / "out"
    assert run(archive, target) == 0
    (target / "sft.jsonl").write_text("mine")
    capsys.readouterr()
    assert run(tmp_path / "missing", target) == 0
    assert "is already complete" in capsys.readouterr().out
    assert (target / "sft.jsonl").read_text() == "mine"


def test_a_data_set_of_another_half_is_refused(archive, tmp_path, capsys):
    target = tmp_path / "out"
    assert run(archive, target) == 0
    said = errors(capsys, "--from", archive, "--to", target, "--half", 1)
    assert "was made from all sentences, not from half 1" in said
    (target / "made_from.txt").unlink()  # as an older version wrote it: unknown
    assert run(archive, target) == 0


def test_other_peoples_folders_are_left_alone(archive, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "sft.jsonl").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("mine", "file"):
        target = tmp_path / name
        assert "exists and is not" in errors(capsys, "--from", archive, "--to", target)
    assert [p.read_text() for p in (tmp_path / "mine").iterdir()] == ["mine"]
    assert "can't write" in errors(capsys, "--from", archive, "--to", tmp_path / "file" / "out")
    (tmp_path / "empty").mkdir()
    assert run(archive, tmp_path / "empty") == 0 and load(tmp_path / "empty")


def test_nothing_is_unpacked_to_disk(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    assert run(pack(tmp_path / "in/a.tar.gz", *source(), folder="../up"), tmp_path / "d/out") == 0
    names = {p.name for p in tmp_path.rglob("*")}
    assert names == {"in", "a.tar.gz", "d", "out", "made_from.txt", *FILES}


# ---- download ----

def test_the_download_is_kept_and_reused(archive, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reviews, "URL", archive.as_uri())
    target = tmp_path / "files" / "reviews"
    assert reviews.main(["--to", str(target)]) == 0
    assert "kB" in capsys.readouterr().err
    assert {p.name for p in target.parent.iterdir()} == {"reviews", reviews.ARCHIVE}
    monkeypatch.setattr(reviews, "URL", "file:///nowhere")
    assert reviews.main(["--to", str(target.with_name("again"))]) == 0
    assert load(target) == load(target.with_name("again"))


def test_no_network_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reviews, "URL", "http://127.0.0.1:1/nobody")
    err = errors(capsys, "--to", tmp_path / "out")
    assert "can't download" in err and "--from" in err and list(tmp_path.iterdir()) == []


# ---- bad archives ----

def test_bad_archives(archive, tmp_path, capsys):
    whole = archive.read_bytes()
    bad = tmp_path / "bad.tar.gz"
    cases = [whole[:n] for n in (5, 200, len(whole) // 2, len(whole) - 4)]
    cases += [b"", b"hello, I am no tar " * 60, gzip.compress(b"neither am I " * 60)]
    cases += [whole[:300] + b"\xff" * 200 + whole[500:]]
    for raw in cases:
        bad.write_bytes(raw)
        said = errors(capsys, "--from", bad, "--to", tmp_path / "out")
        assert "is not a .tar.gz archive, or is corrupt" in said
    for place in range(30, len(whole), 61):
        bad.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1:])
        errors(capsys, "--from", bad, "--to", tmp_path / "out")
    assert "No such file" in errors(capsys, "--from", tmp_path / "none", "--to", tmp_path / "out")
    truth, ratings = source()
    for members, name in [((truth, None), reviews.RATINGS), ((None, ratings), reviews.TRUTH)]:
        pack(bad, *members)
        assert f"contains no {name}" in errors(capsys, "--from", bad, "--to", tmp_path / "out")
    (tmp_path / "nothing").mkdir()
    assert "contains no" in errors(capsys, "--from", tmp_path / "nothing", "--to", tmp_path / "out")
    assert not (tmp_path / "out").exists()


MEAN2 = source()[0].splitlines()[1].split("\t")[1]


@pytest.mark.parametrize("which, line, place, message", [
    (0, f"2\t{MEAN2}", f"{reviews.TRUTH}:2", "2 tab-separated fields; expected 3"),
    (0, f"2\t{MEAN2}\ta film\tx", f"{reviews.TRUTH}:2", "4 tab-separated fields; expected 3"),
    (0, "2\tgood\ta film", f"{reviews.TRUTH}:2", "'good' is not the mean"),
    (0, "2\tnan\ta film", f"{reviews.TRUTH}:2", "'nan' is not the mean"),
    (0, "2\t3.9\ta film", f"{reviews.TRUTH}:2", "'3.9' is not the mean"),
    (0, f"1\t{MEAN2}\ta film", f"{reviews.TRUTH}:2", "no ratings, or is a duplicate"),
    (0, f"99\t{MEAN2}\ta film", f"{reviews.TRUTH}:2", "sentence 99 has no ratings"),
    (0, f"2\t{MEAN2}\t ...!", f"{reviews.TRUTH}:2", "the sentence has no words"),
    (0, b"2\t0\t\xff\xfe", f"{reviews.TRUTH}:2", "not UTF-8"),
    (0, "", reviews.TRUTH, "no sentence for the ratings of 2"),
    (1, "2\t0\t1", f"{reviews.RATINGS}:2", "3 tab-separated fields; expected 4"),
    (1, "2\t0\t1\t[1, 2", f"{reviews.RATINGS}:2", "not a list"),
    (1, "2\t0\t1\t[1]", f"{reviews.RATINGS}:2", "two or more"),
    (1, "2\t0\t1\t[1, 5]", f"{reviews.RATINGS}:2", "from -4 to 4"),
    (1, "2\t0\t1\t[1, 0.5]", f"{reviews.RATINGS}:2", "not a list"),
    (1, "1\t0\t1\t[1, 2]", f"{reviews.RATINGS}:2", "a second panel for sentence 1"),
])
def test_bad_lines_are_named(tmp_path, capsys, which, line, place, message):
    texts = [text.encode() for text in source()]
    lines = texts[which].split(b"\r\n")
    lines[1] = line if isinstance(line, bytes) else line.encode()
    texts[which] = b"\r\n".join(lines)
    bad = pack(tmp_path / "bad.tar.gz", *texts)
    err = errors(capsys, "--from", bad, "--to", tmp_path / "out")
    assert f"{place}: " in err and message in err and not (tmp_path / "out").exists()
    with pytest.raises(UserError):
        reviews.parse(reviews.read_source(bad))


def test_too_few_sentences(tmp_path, capsys):
    for texts in (TEXTS[:1], []):
        few = pack(tmp_path / "few.tar.gz", *source(texts))
        assert "too few" in errors(capsys, "--from", few, "--to", tmp_path / "out")


# ---- the real archive ----

@pytest.fixture(scope="module")
def real(tmp_path_factory):
    if not REAL.exists():
        pytest.skip(f"no {REAL}")
    target = tmp_path_factory.mktemp("real") / "out"
    assert run(REAL, target) == 0
    return load(target), reviews.parse(reviews.read_source(REAL))


def test_real_split(real):
    data, sentences = real
    train, val = sides(data)
    assert not train & val and len(train) == 8979
    assert len(sentences) == 10603 and 0.14 < len(val) / len(sentences) < 0.16
    lines = data["sft.jsonl"] + data["sft_val.jsonl"]
    whole = {s.text for s in sentences}
    assert all(line["prompt"] + line["completion"] in whole for line in lines)
    assert len(lines) == sum(len(text.split()) > 2 for text in whole)
    assert not any("''" in t or "&amp;" in t or "  " in t or "\ufffd" in t for t in whole)


def test_real_preferences(real):
    data, sentences = real
    mean = {s.text: s.mean for s in sentences}
    assert len(data["preferences_val.jsonl"]) == 3000
    for line in data["preferences.jsonl"]:
        assert line["ratings"] == [mean[t] for t in line["responses"]]
        assert line["ratings"] == sorted(line["ratings"], reverse=True)
    sizes = [len(line["ratings"]) for line in data["preferences.jsonl"]]
    assert 0.25 < sizes.count(2) / len(sizes) < 0.35 and set(sizes) == {2, 4, 5, 6, 7, 8, 9}
    # the first 100 are a fair sample: the source has all the good sentences first
    assert -1 < sum(s.mean for s in sentences[:100]) / 100 < 1


def test_real_people(real):
    _, sentences = real
    sizes = [len(s.ratings) for s in sentences]
    assert min(sizes) == 15 and sorted(sizes)[-3] == 29 and sum(sizes) == 198810
    pairs = reviews.random_pairs([s for s in sentences if reviews.is_val(s.text)])
    assert reviews.rater_accuracy(pairs) == pytest.approx(0.839, abs=0.015)
    assert reviews.half_panel_accuracy(pairs, splits=3) == pytest.approx(0.910, abs=0.015)
