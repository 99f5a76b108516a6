"""tools.doctor: each illness has its cause, a healthy case none; the first one is the verdict."""
import math
import random
import re
import subprocess
import sys
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
from helpers import BYTES, CPU, PPO, ROOT, SIZES, jsonl, lines, make_data, tiny_gpt

import ppo
import train_rm
import train_sft
from data.examples import encode_demonstrations
from lib.baselines import ngram_losses
from tools import doctor, doctor_logs
from tools import doctor_files as files
from tools import doctor_models as models
from tools.doctor_files import Finding
from tools.doctor_logs import Log


def causes(findings):
    return [finding.cause for finding in findings if finding.ill]


# ---- data ----

THINGS = [f"thing{i}" for i in range(40)]


def pairs_of_texts(n, seed, wrong=False):
    rng = random.Random(seed)
    made = [(f"Tell me of {thing} now", f"The {thing} is {rng.random()}")
            for thing in (rng.choice(THINGS) for _ in range(n))]
    others = made[1:] + made[:1] if wrong else made
    return [(prompt, text) for (prompt, _), (_, text) in zip(others, made, strict=True)]


TRAIN, VAL = pairs_of_texts(200, 1), pairs_of_texts(100, 2)


@pytest.mark.parametrize("train, val, expected", [
    (TRAIN, VAL, []),
    (TRAIN[:99], VAL, ["too few demonstrations"]),
    (TRAIN[:99] * 50, VAL, ["too few demonstrations"]),
    (TRAIN + [("p", "\ufffd" * 9 + str(i)) for i in range(3)], VAL, ["broken characters"]),
    (TRAIN + [("p", f"\x1b[{i}m") for i in range(3)], VAL, ["broken characters"]),
    (TRAIN, VAL[:70] + TRAIN[:30], ["held-out texts in the training data"]),
    (pairs_of_texts(200, 1, wrong=True), VAL, ["responses beside the wrong prompts"]),
    (pairs_of_texts(200, 1, wrong=True), pairs_of_texts(100, 2, wrong=True), [])])  # so it is everywhere
def test_texts(train, val, expected):
    assert causes(files.text_findings("sft", train, val)) == expected


def test_few_texts_are_an_illness_of_demonstrations_only():
    assert causes(files.text_findings("preferences", TRAIN[:50], VAL)) == []


def ranking(better, worse):
    return "p", [better, worse], [0, 1], None, None


EVEN = [ranking("a" * (5 + i % 3), "b" * (4 + i % 5)) for i in range(30)]


@pytest.mark.parametrize("train, expected", [
    (EVEN, []),
    ([ranking("a" * (9 + i), "b" * i) for i in range(1, 30)],
     ["the preferences only say that longer is better"]),
    ([ranking("a" * i, "b" * (9 + i)) for i in range(1, 30)],
     ["the preferences only say that shorter is better"]),
    ([*EVEN, ranking("x", "y"), ranking("y", "x")], ["contradictory preferences"]),
    ([*EVEN, ("p", ["x", "y"], [3, 3], None, None)], [])])
def test_pairs(train, expected):
    assert causes(files.pair_findings(train)) == expected


def test_a_file_that_cannot_be_read_is_a_finding(tmp_path):
    make_data(tmp_path, n=200)
    assert causes(f for _, f in files.folder_findings(tmp_path)) == []
    (tmp_path / "preferences.jsonl").write_text('{"prompt": "x"}\n')
    found = [(stage, f) for stage, f in files.folder_findings(tmp_path) if f.ill]
    assert [(stage, f.cause) for stage, f in found] == [("rm", "a file can't be read")]
    assert "preferences.jsonl:1" in found[0][1].text


def test_too_few_to_hold_some_out_is_no_illness(tmp_path):
    jsonl(tmp_path / "prompts.jsonl", [{"prompt": "one"}, {"prompt": "two"}])
    [(stage, found)] = files.folder_findings(tmp_path)
    assert stage == "ppo" and not found.ill and found.text.startswith("not examined: ")


def test_the_whole_of_a_sorted_file_is_looked_at():
    for n in (1, 5, 399, 400, 401, 799, 6000):
        some = files.sample(list(range(n)), 400)
        assert len(some) <= 400 and some[0] == 0 and some[-1] >= n - 1 - -(-n // 400)


# ---- reward model ----

@pytest.mark.parametrize("own, gap, expected", [
    ([1.0] * 90 + [-0.1] * 10, [2.0] * 85 + [-0.1] * 15, []),
    ([1.0] * 90 + [-1.0] * 10, [-1.0] * 90 + [1.0] * 10, "the labels are reversed"),
    ([1.0] * 60 + [-1.0] * 40, [2.0] * 850 + [-0.1] * 150, "noisy labels"),
    ([1.0] * 80 + [-1.0] * 20, [2.0] * 29 + [-0.1] * 3, []),  # of 32 pairs nothing can be said
    ([1.0] * 55 + [-1.0] * 45, [-1.0] * 2, []),
    ([1.0] * 99 + [-1.0], [2.0] * 70 + [-3.0] * 30, "overfit"),
    ([1.0] * 99 + [-1.0], [2.0] * 70 + [-0.1] * 30, []),  # but what it says is worth something
    ([1.0] * 68 + [-1.0] * 32, [1.0, 1.0, -1.0] * 100, "noisy labels"),
    ([1.0] * 50 + [-1.0] * 50, [1.0, -1.0] * 150, "it has learned nothing")])
def test_accuracies(own, gap, expected):
    found = causes(models.accuracies(torch.tensor(own), torch.tensor(gap), 1000))
    assert found[:1] == ([expected] if expected else [])


def test_the_loss_is_that_of_the_scores_that_were_learned():
    gap = torch.tensor([0.5, -0.1])
    *_, loss, _ = models.accuracies(gap, gap, 2, scale=8.0)
    assert loss.text.startswith(f"loss {(math.log1p(math.exp(-4)) + math.log1p(math.exp(0.8))) / 2:.3f} nats")


@pytest.mark.parametrize("lr, epochs, known, expected", [
    (5e-4, 0.05, 0.7, ["too few steps"]), (5e-3, 0.05, 0.7, ["the learning rate is too high"]),
    (5e-5, 1.0, 0.7, ["the learning rate is too low"]), (5e-5, 0.05, 0.9, []), (2e-3, 0.2, 0.7, [])])
def test_settings_far_from_the_rule_matter_where_training_pairs_are_not_learned(lr, epochs, known, expected):
    cfg = SimpleNamespace(lr=lr, epochs=epochs)
    assert causes([models.settings(cfg, {"lr": 5e-4, "epochs": 1.0}, known)]) == expected


def test_responses_that_do_not_fit():
    assert causes([models.fitting(80, 100, "rankings", 48)]) == []
    assert causes([models.fitting(79, 100, "rankings", 48)]) == ["responses do not fit"]


class Reader:
    """A case whose reward model is a function of the text."""

    def __init__(self, score, prompts=("p:",), rank=None, world=None):
        self.score, self.tokenizer, self.world = score, BYTES, world
        self.rm = SimpleNamespace(room=64, scale=torch.tensor(1.0))
        self.gpt = tiny_gpt(vocab_size=BYTES.vocab_size)
        rng = random.Random(0)
        rank = rank or (lambda prompt, text: -score(prompt + text))

        def example():
            prompt = rng.choice(prompts)
            texts = ["".join(rng.choice("abcd") for _ in range(rng.randint(1, 9))) + end
                     for end in ("", prompt[:-1])]
            return prompt, texts, [rank(prompt, text) for text in texts], None, None

        self.data = {"preferences": ([example() for _ in range(200)], [example() for _ in range(100)])}
        self.device, self.new = CPU, 20

    def scores(self, rows):
        return torch.tensor([float(self.score(BYTES.decode(row))) for row in rows])

    gaps, respond = models.Case.gaps, models.Case.respond


def test_a_reward_model_that_reads_text_is_healthy():
    def share(text):
        return (text.count("a") - text.count("b")) / len(text)

    assert causes(models.rm_findings(Reader(share))) == []


def test_scores_that_were_divided_after_the_training_have_the_same_loss():
    plain, scaled = Reader(len), Reader(lambda text: len(text) / 8)
    scaled.rm.scale = torch.tensor(8.0)
    one, other = ([f.text for f in models.rm_findings(case) if f.text.startswith("loss")]
                  for case in (plain, scaled))
    assert one == other and len(one) == 1


def test_one_that_reads_the_length_only():
    assert "it reads the length only" in causes(models.rm_findings(Reader(len)))


def test_one_that_likes_repetition_or_nothing():
    found = causes(models.rm_findings(Reader(lambda text: 3.0 * text.count("a"))))
    assert "repeated texts score higher" in found
    found = causes(models.rm_findings(Reader(lambda text: -3.0 * len(text))))
    assert any("texts score higher" in cause for cause in found)


def test_one_that_does_not_read_the_prompt():
    """The better response has the prompt's word; the score sees it only beside its own prompt, or always."""
    prompts = [f"{a}{b}:" for a in "mnopqr" for b in "mnopqr"]

    def asked(prompt, text):
        return -(prompt[:-1] in text)

    def reads(text):
        prompt, _, response = text.partition(":")
        return (prompt in response) + 0.01 * response.count("a")

    def blind(text):
        return any(c in text.partition(":")[2] for c in "mnopqr")

    def case(score):
        made = Reader(score, prompts, asked)
        for some in made.data["preferences"]:  # words, so that `closer` sees them
            some[:] = [(p.replace(":", " :"), [t[:-2] + " " + t[-2:] for t in texts], ranks, *more)
                       for p, texts, ranks, *more in some if len(set(ranks)) > 1]
        return made

    cause = "the prompt is not read"
    assert cause in causes(models.rm_findings(case(blind)))
    assert cause not in causes(models.rm_findings(case(lambda text: reads(text.replace(" ", "")))))


def test_gold_shows_labels_that_are_reversed_everywhere():
    def count(text):
        return text.count("a")

    for sign, expected in ((1, []), (-1, ["the labels are reversed"])):
        world = SimpleNamespace(gold_score=lambda prompt, text, sign=sign: float(sign * count(prompt + text)))
        case = Reader(count, world=world)
        assert causes(models.best_of(case)) == expected


# ---- SFT ----

def sft_case(tmp_path, **flags):
    make_data(tmp_path / "data", n=200)
    train_sft.main(config(train_sft, tmp_path, **SIZES | {"epochs": 3.0} | flags))
    logs = {"sft": doctor_logs.read_log(tmp_path / "out", "sft")}
    return list(doctor.examine(tmp_path / "out", None, logs, CPU))


def config(script, tmp_path, **flags):
    cfg = script.Config(**{"data": str(tmp_path / "data"), "out": str(tmp_path / "out")} | flags)
    cfg.given = set(flags)
    return cfg


@pytest.mark.slow
@pytest.mark.parametrize("flags, expected", [
    ({"epochs": 0.1}, "too few steps"), ({"epochs": 0.1, "lr": 0.5}, "the learning rate is too high")])
def test_sft_that_has_learned_too_little(tmp_path, flags, expected):
    found = [f for stage, f in sft_case(tmp_path, **flags) if stage == "sft"]
    assert causes(found)[0] == expected


def test_an_older_log_without_the_loss_of_counts(tmp_path):
    """Counts of training texts must not be measured on these: their loss is then far too small."""
    make_data(tmp_path, n=200)
    gpt, (data, _) = tiny_gpt(vocab_size=BYTES.vocab_size), files.read_data(tmp_path)
    case = models.Case(gpt, None, BYTES, data, None, CPU, 32)
    rows, held = (encode_demonstrations(some, BYTES, 64, "") for some in data["sft"])
    log = Log(SimpleNamespace(**doctor_logs.DEFAULTS | {"lr": 1e-3}), [{"step": 9}], [], False)
    expected = ngram_losses(rows, held, 257)[1]
    assert causes(models.learned(case, rows[:9], held, log, expected + 0.09)) == []
    assert causes(models.learned(case, rows[:9], held, log, expected + 0.11)) == ["too few steps"]
    log.config.lr = 1e-6
    assert causes(models.learned(case, rows[:9], held, log, 5.0))[0] == "the learning rate is too low"


def test_what_another_prompt_costs(tmp_path, monkeypatch):
    """By a network whose loss is 1 where a completion does not begin as its prompt does; by a blind one."""
    for expected, loss, form in ((False, lambda row, P: row[0] != row[P], "{} {}"),
                                 (True, lambda row, P: 0.0, "{} {}"),
                                 (False, lambda row, P: 0.0, "{1}")):  # few prompts, none asks for anything
        both = [{"prompt": letter + " ", "completion": form.format(letter, i)} for i in range(200)
                for letter in "xyz"]
        for name in ("sft.jsonl", "sft_val.jsonl"):
            jsonl(tmp_path / name, both)
        data, _ = files.read_data(tmp_path)
        case = models.Case(tiny_gpt(vocab_size=BYTES.vocab_size), None, BYTES, data, None, CPU, 32)
        monkeypatch.setattr(models, "evaluate", lambda gpt, rows, *_, loss=loss: fmean(
            loss(*x) for x in rows))
        assert ("the prompt is ignored" in causes(models.sft_findings(case, None))) == expected


@pytest.mark.parametrize("losses, expected", [([5.0, 4.0] * 5, []), ([4.0] + [5.0] * 9, ["the loss rises"])])
def test_a_stage_that_is_training_is_judged_by_its_log(tmp_path, losses, expected):
    """An older checkpoint beside it is another run's."""
    (tmp_path / "sft.pt").write_bytes(b"not to be read")
    steps = [{"step": i, "loss": x} for i, x in enumerate(losses)]
    log = Log(SimpleNamespace(**doctor_logs.DEFAULTS), steps, [], True)
    [finding] = doctor.networks("sft", tmp_path, {"sft": ()}, None, {"sft": log}, CPU, 9)
    assert finding.text.startswith("not finished: 9 steps") and causes([finding]) == expected


def test_the_prompt_that_is_ignored_and_responses_that_do_not_end(tmp_path):
    """An untrained network ends and reads nothing; one that copies its prompt does both."""
    gpt = tiny_gpt(vocab_size=BYTES.vocab_size)
    make_data(tmp_path, n=200)
    data, _ = files.read_data(tmp_path)
    found = causes(models.sft_findings(models.Case(gpt, None, BYTES, data, None, CPU, 32), None))
    assert "responses do not end" in found


@pytest.mark.parametrize("given, expected", [(0, 12), (20, 20), (99, 31)])
def test_responses_may_be_as_long_as_in_the_run(tmp_path, monkeypatch, given, expected):
    """0: no stage after SFT has said how long; then by rule, as train_rm.py and ppo.py would choose."""
    make_data(tmp_path / "data", n=200)
    train_sft.main(config(train_sft, tmp_path, **SIZES | {"epochs": 0.05}))
    data, _ = files.read_data(tmp_path / "data")
    logs = {"sft": doctor_logs.read_log(tmp_path / "out", "sft")}
    monkeypatch.setattr(doctor, "sft_findings", lambda case, log: [case.new])
    [new] = doctor.networks("sft", tmp_path / "out", data, None, logs, CPU, given)
    assert new == expected


# ---- PPO ----

def ppo_log(updates=30, config=(), held=(), **columns):
    """A healthy log; a column is (at first, at last)."""
    healthy = {"score": (0.0, 1.5), "kl": (0.0, 6.0), "entropy": (0.7, 0.4), "eos": (1.0, 1.0),
               "explained": (-1.0, 0.8), "value_loss": (0.5, 0.04), "update_kl": (0.001, 0.01),
               "clipped": (0.01, 0.01)} | columns
    steps = [{"step": i + 1} | {name: a if i == 0 else b for name, (a, b) in healthy.items()}
             for i in range(updates)]
    cfg = SimpleNamespace(**{"no_eos_score": -1.0, "update_kl": 0.05} | dict(config))
    return Log(cfg, steps, [{"update": 10 * i, "gold": x} for i, x in enumerate(held)], False)


@pytest.mark.parametrize("log, expected", [
    (ppo_log(), []),
    (ppo_log(value_loss=(900.0, 50.0)), "scores are far from a standard deviation of 1"),
    (ppo_log(eos=(1.0, 0.1), score=(0.0, 4.9), config={"no_eos_score": 5.0}), "a missing end pays"),
    (ppo_log(config={"no_eos_score": 5.0}), "a missing end pays"),  # nothing has happened yet
    (ppo_log(config={"no_eos_score": 0.1}), []),  # and nothing will: the responses are worth more
    (ppo_log(eos=(1.0, 0.1)), "responses no longer end"),
    (ppo_log(length=(50.0, 3.0)), "responses shrink to almost nothing"),
    (ppo_log(score=(0.0, None)), "numbers are not finite"),
    (ppo_log(update_kl=(0.001, 0.1)), "the learning rate is too high"),
    (ppo_log(explained=(-1.0, -0.5), value_loss=(0.5, 0.6)), "the critic does not learn"),
    (ppo_log(explained=(-1.0, -0.5)), []),  # the returns are all alike
    (ppo_log(value_loss=(900.0, 50.0), config={"no_eos_score": -100.0}), "a missing end costs too much"),
    (ppo_log(config={"update_kl": None}), []),  # infinite
    (ppo_log(explained=(None, None)), []),  # all returns were equal
    (ppo_log(held=(0.4, 0.8, 0.6), kl=(0.0, 0.1)), []),  # that few nats are chance
    (ppo_log(explained=(-1.0, -0.3), updates=10), []),
    (ppo_log(kl=(0.0, 30.0)), "over-optimisation"),
    (ppo_log(held=(0.4, 0.8, 0.6)), "over-optimisation"),
    (ppo_log(held=(0.4, 0.8, 0.6, 0.79)), []),
    (ppo_log(kl=(0.0, -2.0)), "the KL is negative"),
    (ppo_log(score=(0.0, 0.15), kl=(0.0, 0.2)), "the policy hardly moves"),
    (ppo_log(score=(0.0, 0.15), kl=(0.0, 0.6)), []),
    (ppo_log(score=(0.0, -0.5)), "the score does not rise"),
    (ppo_log(entropy=(0.7, 0.01)), "the policy repeats itself"),
    (ppo_log(held=(0.4, 0.8), distinct_2=(0.5, 0.1)), "the policy repeats itself"),
    (ppo_log(held=(0.4, 0.8), distinct_2=(0.5, 0.2)), [])])
def test_ppo(log, expected, tmp_path):
    found = causes(doctor_logs.ppo_findings(log, tmp_path))
    assert [cause.split(":")[0] for cause in found[:1]] == ([expected] if expected else [])


@pytest.mark.parametrize("score, gold, expected", [
    (2.0, 0.6, ["over-optimisation"]), (2.0, 0.8, []), (1.2, 0.64, []), (2.0, 0.3, ["over-optimisation"])])
def test_what_a_unit_of_score_is_worth(score, gold, expected, tmp_path):
    """Beside the 0.3 of the best of 4 samples. Healthy runs pass them in score first, then in gold."""
    log = ppo_log(held=(0.4, 0.6))
    log.reports[0].update(score=0.0)
    log.reports[-1].update(score=score, gold=gold, best_of_4_score=1.0, best_of_4_gold=0.7)
    assert causes(doctor_logs.ppo_findings(log, tmp_path)) == expected


def test_a_score_against_the_truth(tmp_path):
    log = ppo_log(held=(0.4, 0.2))
    log.reports[0].update(score=0.0)
    log.reports[-1].update(score=2.0, best_of_4_score=1.0, best_of_4_gold=0.3)
    assert causes(doctor_logs.ppo_findings(log, tmp_path)) == ["the score is against gold"]


def test_samples_of_an_earlier_run_are_not_looked_at(tmp_path):
    lines = [sample(model, 0.0, 1.0, "the same words") for model in ["PPO"] * 99 + ["SFT"]]
    jsonl(tmp_path / "ppo.samples.jsonl", lines + [sample("SFT", 0.0, 1.0, f"{i}") for i in range(99)])
    assert causes(doctor_logs.ppo_findings(ppo_log(), tmp_path)) == ["all responses begin alike"]
    assert causes(doctor_logs.ppo_findings(ppo_log()._replace(running=True), tmp_path)) == []


def sample(model, score, eos, response="One fox ran home."):
    return {"model": model, "score": score, "eos": eos, "response": response}


def test_what_the_gain_is_made_of():
    better = [sample("SFT", 0.0, 1.0), sample("PPO", 1.0, 1.0, "Two."), sample("SFT", 0.2, 1.0, "A b c d"),
              sample("PPO", 1.2, 1.0, "Two.")]
    *_, begins = found = list(doctor_logs.sample_findings(better))
    assert not causes(found) and begins.text.endswith("50% of SFT's responses, 100% of PPO's")
    ends = [sample("SFT", -1.0, 0.0), *[sample(model, 0.0, 1.0) for model in ("SFT", "PPO", "PPO")]]
    assert causes(doctor_logs.sample_findings(ends)) == ["better only by --no-eos-score"]
    assert not list(doctor_logs.sample_findings(ends[:2]))  # no PPO in it


@pytest.mark.parametrize("same, expected", [(90, []), (98, ["all responses begin alike"])])
def test_responses_that_begin_alike(same, expected):
    """In 90 of 100 a healthy run of the stories does, too."""
    lines = [sample("SFT", 0.0, 1.0, f"{i} different beginnings") for i in range(100)]
    lines += [sample("PPO", 1.0, 1.0, f"There was once {i}" if i < same else f"{i} fox") for i in range(100)]
    assert causes(doctor_logs.sample_findings(lines)) == expected


# ---- the program ----

def run(*args):
    return subprocess.run([sys.executable, "-m", "tools.doctor", "--device", "cpu", *map(str, args)],
                          cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_a_whole_run_and_a_part_of_one(tmp_path):
    make_data(tmp_path / "data", n=120)
    train_sft.main(config(train_sft, tmp_path, **SIZES, epochs=2.0))
    out = tmp_path / "out"
    done = run("--out", out)
    assert done.returncode == 0 and "SFT" in done.stdout and "PPO" not in done.stdout, done.stderr
    train_rm.main(config(train_rm, tmp_path, epochs=1.0, max_new_tokens=8, device="cpu"))
    ppo.main(config(ppo, tmp_path, **PPO))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    done = run("--out", out)
    assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith("verdict: "), done.stderr
    titles = [*doctor.TITLES.values()]
    assert [line for line in done.stdout.splitlines() if line in titles] == titles
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    for name in ("sft.pt", "rm.pt"):
        (out / name).rename(tmp_path / name)
        done = run("--out", out)
        assert f"not examined: {name} not found" in done.stdout or name == "rm.pt", done.stdout
        assert done.stdout.endswith(" is ill\n") or "verdict: " in done.stdout
    assert "not examined: sft.pt and rm.pt not found" in done.stdout
    for name in ("sft.pt", "rm.pt"):
        (tmp_path / name).rename(out / name)
    make_data(tmp_path / "other", n=80, seed=1)
    train_sft.main(config(train_sft, tmp_path, **SIZES | {
        "data": str(tmp_path / "other"), "tokenizer": "", "vocab_size": 300}))
    done = run("--out", out)  # of each stage the data that it was trained on
    ranked = sum(len(row["responses"]) for row in lines(tmp_path / "data/preferences.jsonl"))
    assert re.findall(r"(\w+)\.jsonl: .* texts of (\d+),", done.stdout) == [
        ("sft", "80"), ("preferences", str(ranked))]
    assert "rm.pt was trained with another tokenizer" in done.stdout and "Traceback" not in done.stderr
    (out / "rm.pt").write_bytes(b"junk")
    (out / "ppo.samples.jsonl").write_text('{"prompt": "x", "resp')
    done = run("--out", out)
    assert done.returncode == 0 and done.stdout.count("not examined: ") == 2 and "verdict: " in done.stdout
    log = out / "ppo.log.jsonl"
    (out / "ppo.state.jsonl").write_text(log.read_text()[:-20])  # of a run that goes on
    assert run("--out", out).returncode == 0
    (out / "ppo.state.jsonl").write_text("[1, 2]\n{}\n")
    done = run("--out", out)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "ppo.state.jsonl" in done.stderr


@pytest.mark.parametrize("args, says", [
    (["--out", "nowhere"], "nowhere: neither sft.log.jsonl"),
    (["--data", "nowhere"], "nowhere: no such folder")])
def test_what_is_not_there_is_one_sentence(args, says):
    done = run(*args)
    assert done.returncode == 1 and says in done.stderr and done.stderr.count("\n") == 1


def test_the_first_illness_is_the_verdict(capsys):
    found = [("sft", Finding("a")), ("rm", Finding("b", True, "first", "x")),
             ("ppo", Finding("c", True, "second", "y"))]
    assert doctor.show(found) == ("rm", found[1][1])
    assert capsys.readouterr().out == "SFT\n  ok   a\nreward model\n  ILL  b: first\nPPO\n  ILL  c: second\n"
    assert not doctor.show(found[:1])


def test_the_newest_log_counts(tmp_path):
    for name, step in (("sft.log.jsonl", 9), ("sft.state.jsonl", 3)):
        jsonl(tmp_path / name, [{"config": {"lr": 1.0}}, {"step": step}, {"report": {"x": 1}}])
    assert doctor_logs.read_log(tmp_path, "sft").steps == [{"step": 3}]
    jsonl(tmp_path / "sft.state.jsonl", [{"config": {"lr": 1.0}}])  # has taken no step
    assert doctor_logs.read_log(tmp_path, "sft").steps == [{"step": 9}]
    assert doctor_logs.read_log(tmp_path, "rm") is None
    assert doctor_logs.read_log(tmp_path, "sft").reports == [{"x": 1}]
