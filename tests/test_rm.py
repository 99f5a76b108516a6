"""Reward model: the ranking loss, the texts it reads, its scale, and train_rm.py from end to end.

Ids (R10, ...): docs/method.md.
"""
import itertools
import math
import random
from types import SimpleNamespace

import pytest
import torch
from helpers import BYTES, gen, gpt_config, jsonl, lines, tiny_gpt

import train_rm
from data.examples import Ranking, encode_rankings, pad
from data.files import UserError
from lib.checkpoint import load, save
from lib.common import to_host
from lib.generate import generate
from lib.report import accuracy, calibration_error, count_texts, half_width, report_pairs, report_words
from lib.rewards import score_rows
from model import GPT, Block, RewardModel, Trunk
from train_rm import Config, ranking_loss


def encode(examples, room, name="x"):
    return encode_rankings(examples, BYTES, room, name)


def pairs_by_hand(scores, ranks):
    """The definition, pair by pair in Python floats: (losses, right) of one prompt."""
    losses, right = [], []
    for i, j in itertools.permutations(range(len(ranks)), 2):
        if ranks[i] < ranks[j]:
            gap = float(scores[i]) - float(scores[j])
            losses.append(math.log1p(math.exp(-gap)) if gap > -30 else -gap)
            right.append(1.0 if gap > 0 else 0.5 if gap == 0 else 0.0)
    return losses, right


def mean(x):
    return sum(x) / len(x)


# ---- ranking_loss ----

@pytest.mark.parametrize("scores, expected", [
    ((2, 1, 0, -1), .2070380727), ((1.5, .5, -1), .1978548999), ((0, 0, 0, 0), .6931471806),
    ((0, 0), .6931471806)])
def test_R10_R11_fixtures(scores, expected):
    loss, _ = ranking_loss(torch.tensor(scores, dtype=torch.float64), [list(range(len(scores)))])
    assert loss.item() == pytest.approx(expected, abs=1e-7)


def test_R10_random_head_starts_above_ln2():
    """Over both orders the mean loss is about ln 2 + Var(gap)/8, and never below ln 2."""
    gap = torch.randn(4000, generator=gen(0)) * 0.5
    scores = torch.stack([gap, torch.zeros_like(gap)], 1).flatten()
    both = [ranking_loss(scores, [ranks] * len(gap))[0].item() for ranks in ([0, 1], [1, 0])]
    assert mean(both) > math.log(2)
    assert mean(both) == pytest.approx(math.log(2) + 0.25 / 8, abs=3e-3)


def test_micro_batches_change_no_gradient(monkeypatch):
    """Also with K of 2 to 4, with ties, and with a prompt that makes no pair at all and so counts nothing."""
    rng = random.Random(0)
    ranks = [[0, 1], [0, 0], [1, 0, 1], [0, 1, 2, 2], [1, 0], [0, 1, 1]]

    def text():
        return [rng.randrange(17) for _ in range(rng.randint(2, 9))]

    groups = [Ranking([], [text() for _ in r], r, (), None) for r in ranks]
    results = {}
    for size in (1, 30, 10**6):
        torch.manual_seed(0)
        rm = RewardModel(Trunk(gpt_config(17, 16, 1, 2, 16)))
        numbers = to_host(train_rm.ranking_backward(rm, groups, size, "cpu"))
        results[size] = numbers["loss"], numbers["accuracy"], [p.grad for p in rm.parameters()]
    fed = []
    monkeypatch.setattr(train_rm, "pad", lambda rows, device: fed.append(len(rows) * max(map(len, rows)))
                        or pad(rows, device))
    train_rm.ranking_backward(RewardModel(Trunk(gpt_config(17, 16, 1, 2, 16))), groups, 40, "cpu")
    assert max(fed) <= 40 and len(fed) > 2  # padding included
    monkeypatch.undo()
    whole = ranking_loss(rm.score(*pad([row for g in groups for row in g.rows])), ranks)
    assert results[10**6][:2] == pytest.approx([x.item() for x in whole], rel=1e-5)
    for size in (1, 30):
        assert results[size][:2] == pytest.approx(results[10**6][:2], rel=1e-5)
        for a, b in zip(results[size][2], results[10**6][2], strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_ratings_add_the_mean_squared_error_of_the_scores_that_have_one():
    """In any micro-batches: the mean is over all rated responses of the step."""
    rng = random.Random(1)
    ratings = [[0.5, -1.0], None, [2.0, 0.0, -0.5], None]
    groups = [Ranking([], [[rng.randrange(17) for _ in range(rng.randint(2, 9))] for _ in range(n)],
                      list(range(n)), (), None, some) for n, some in zip((2, 3, 3, 2), ratings, strict=True)]
    results = {}
    for size in (1, 40, 10**6):
        torch.manual_seed(0)
        rm = RewardModel(Trunk(gpt_config(17, 16, 1, 2, 16)))
        made = to_host(train_rm.ranking_backward(rm, groups, size, "cpu"))["loss"]
        results[size] = made, [p.grad for p in rm.parameters()]
    scores = rm.score(*pad([row for group in groups for row in group.rows]))
    error = (scores[[0, 1, 5, 6, 7]] - torch.tensor([0.5, -1.0, 2.0, 0.0, -0.5])) ** 2
    loss = ranking_loss(scores, [group.ranks for group in groups])[0] + error.mean()
    rm.zero_grad()
    loss.backward()
    for made, grads in results.values():
        assert made == pytest.approx(loss.item(), rel=1e-5)
        for a, p in zip(grads, rm.parameters(), strict=True):
            torch.testing.assert_close(a, p.grad, atol=1e-6, rtol=1e-4)


def test_the_unit_of_ratings_changes_nothing(tmp_path):
    """Stars from 1 to 5 or per cent: main brings them to mean 0 and standard deviation 1."""
    rng, results = random.Random(5), []
    rows = list(more_a_wins(24, rng, K=3))
    for i, (factor, shift) in enumerate(((1, 0), (25, 300))):
        rated = [row | {"ratings": [factor * x + shift for x in (2.5, 1.0, -1.5)]} for row in rows]
        folder = tmp_path / str(i)
        folder.mkdir()
        run = make_run(folder, rated, rated[:6])
        train_rm.main(Config(data=run, out=run, epochs=2.0, batch_tokens=160, dropout=0.0, device="cpu"))
        results.append([line for line in lines(folder / "rm.log.jsonl") if "step" in line])
    assert results[0][-1]["loss"] > 0.3
    for a, b in zip(*results, strict=True):
        assert a == pytest.approx(b, rel=1e-3)


def test_half_width_counts_no_more_pairs_than_texts():
    assert half_width(0.5, 400, 1000) == pytest.approx(1.96 * 0.5 / 20, rel=0.01)
    assert half_width(0.5, 40_000, 100) == pytest.approx(1.96 * 0.5 / 10, rel=0.03)
    assert half_width(1.0, 2, 4) == pytest.approx(0.658, abs=1e-3)  # by the formula for many it would be 0


def test_the_interval_beside_ridge_regression_counts_each_text_once(capsys):
    """Lists from ratings hold the same texts again and again."""
    texts = ("a good one", "a bad one", "good", "bad")
    pairs = [(good, bad) for good in texts[::2] for bad in texts[1::2]]
    groups = [Ranking([], [[1], [2]], [0, 1], ("", pair), None) for pair in pairs * 500]
    curve = SimpleNamespace(improving=True, by_heart=False)
    assert count_texts(groups) == 4
    assert report_words(0.8, groups, groups, curve) == {"ridge_accuracy": 1.0}
    assert "behind it by 20 points, which may be chance" in capsys.readouterr().out


def test_sizes_are_the_longest_text_of_a_prompt_and_their_number():
    groups = [Ranking([], [[1] * n for n in lengths], [], (), None) for lengths in ([2, 7, 3], [4, 1])]
    assert train_rm.sizes(groups) == {"lengths": [7, 4], "rows": [3, 2]}


def test_R11_R14_mixed_K_is_the_mean_over_prompts_of_the_mean_over_pairs():
    """K = 4, 9, 2, 3 with ties in one batch; a K=9 prompt counts as much as a K=4 prompt, not 36:6."""
    groups = [[0, 1, 2, 3], list(range(9)), [1, 0], [2, 0, 2]]
    scores = torch.randn(18, generator=gen(0))
    parts = [pairs_by_hand(s, ranks) for s, ranks in zip(scores.split([4, 9, 2, 3]), groups, strict=True)]
    loss, right = ranking_loss(scores, groups)
    assert loss.item() == pytest.approx(mean([mean(losses) for losses, _ in parts]), abs=1e-6)
    assert right.item() == pytest.approx(mean([mean(r) for _, r in parts]), abs=1e-6)
    pairwise = [ranking_loss(scores[[i, j]], [[0, 1]])[0].item()
                for i, j in itertools.combinations(range(4), 2)]
    assert ranking_loss(scores[:4], groups[:1])[0].item() == pytest.approx(mean(pairwise), abs=1e-6)


def test_R12_gradient_at_equal_scores():
    scores = torch.zeros(4, requires_grad=True)
    ranking_loss(scores, [[0, 1, 2, 3]])[0].backward()
    torch.testing.assert_close(scores.grad, torch.tensor([-.25, -1 / 12, 1 / 12, .25]))


def test_R13_shift_and_swap():
    scores = torch.randn(6, generator=gen(1))
    loss, right = ranking_loss(scores, [[0, 1, 2], [2, 0, 1]])
    shifted = scores + torch.tensor([5., 5, 5, -7, -7, -7])
    torch.testing.assert_close(ranking_loss(shifted, [[0, 1, 2], [2, 0, 1]])[0], loss, atol=1e-5, rtol=0)
    assert ranking_loss(scores, [[2, 1, 0], [0, 2, 1]])[1].item() == pytest.approx(1 - right.item())


def test_R16_ties_make_no_pair_and_a_tied_prompt_has_no_weight():
    scores = torch.tensor([1., 2, 3], requires_grad=True)
    loss, right = ranking_loss(scores, [[5, 5, 5]])
    loss.backward()
    assert loss.item() == 0 and right.item() == 0 and torch.equal(scores.grad, torch.zeros(3))
    both = ranking_loss(torch.tensor([1., 2, 3, 0, 1]), [[5, 5, 5], [0, 1]])
    one = ranking_loss(torch.tensor([0., 1]), [[0, 1]])
    assert both[0].item() == pytest.approx(one[0].item()) and both[1].item() == one[1].item()
    tie = ranking_loss(torch.tensor([1., 9, -3]), [[0, 1, 1]])[0].item()
    assert tie == pytest.approx(mean(pairs_by_hand([1, 9, -3], [0, 1, 1])[0]), abs=1e-6)


@pytest.mark.parametrize("gap, expected", [(100., 0.), (-100., 100.), (-1e4, 1e4)])
def test_R17_stable_at_large_gaps(gap, expected):
    scores = torch.tensor([gap, 0.], requires_grad=True)
    loss, _ = ranking_loss(scores, [[0, 1]])
    loss.backward()
    assert loss.item() == pytest.approx(expected, abs=1e-6) and torch.isfinite(scores.grad).all()
    assert scores.grad[0].item() == pytest.approx(0 if gap > 0 else -1, abs=1e-6)


def test_R18_bias_gets_no_gradient():
    rm = RewardModel.from_gpt(tiny_gpt())
    tokens, lengths = torch.randint(17, (5, 9), generator=gen(0)), torch.tensor([9, 4, 6, 7, 2])
    ranking_loss(rm.score(tokens, lengths), [[0, 1], [1, 0, 2]])[0].backward()
    assert rm.reward_head.bias.grad.abs().item() < 1e-6 < rm.reward_head.weight.grad.abs().max().item()


def test_R21_constant_scores_are_half_right():
    assert ranking_loss(torch.ones(5), [[0, 1, 2], [1, 0]])[1].item() == pytest.approx(0.5)
    assert accuracy(torch.tensor([1., -1, 0])).tolist() == [1, 0, .5]


def test_a_wrong_number_of_scores_is_refused():
    with pytest.raises(ValueError):
        ranking_loss(torch.zeros(3), [[0, 1]])


@pytest.mark.parametrize("pool", RewardModel.POOLS)
def test_R3_poison_at_pads_reaches_neither_loss_nor_gradients(pool):
    """Hidden states of padding are 1e9, its scores NaN, and nothing changes: a wrong read would explode."""
    rm = RewardModel.from_gpt(tiny_gpt(), pool).eval()
    tokens, lengths = pad([[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [5], [8, 9, 7, 9]])

    def run(poison):
        real = torch.arange(tokens.shape[1] + (pool == "token")) < (lengths + (pool == "token"))[:, None]
        hidden = rm.trunk.ln_f.register_forward_hook(
            lambda m, i, out: torch.where(real[:, :, None], out, 1e9))
        heads = rm.reward_head.register_forward_hook(
            lambda m, i, out: torch.where(real[:, :, None], out, math.nan) if out.dim() == 3 else out)
        if not poison:
            hidden.remove(), heads.remove()
        rm.zero_grad()
        loss = ranking_loss(rm.score(tokens, lengths), [[0, 1], [1, 0]])[0]
        loss.backward()
        hidden.remove(), heads.remove()
        return loss.item(), [p.grad.clone() for p in rm.parameters()]

    (clean, grads), (poisoned, poisoned_grads) = run(False), run(True)
    assert poisoned == pytest.approx(clean, abs=1e-6)
    for a, b in zip(grads, poisoned_grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("pool", RewardModel.POOLS)
def test_R1_R4_R8_a_text_scores_the_same_alone_and_in_any_batch(pool):
    rm = RewardModel.from_gpt(tiny_gpt(), pool).eval()
    rows = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [5], [8, 9, 7, 9]]
    alone = torch.cat([rm.score(*pad([row])) for row in rows])
    tokens, lengths = pad(rows)
    torch.testing.assert_close(rm.score(tokens, lengths), alone, atol=1e-5, rtol=0)
    beyond = torch.arange(12) >= lengths[:, None]
    noise = torch.where(beyond, torch.randint(17, (4, 12), generator=gen(0)),
                        torch.nn.functional.pad(tokens, (0, 5)))
    torch.testing.assert_close(rm.score(noise, lengths), alone, atol=1e-5, rtol=0)
    assert (alone - alone.mean()).abs().min() > 1e-3


# ---- data/examples.py ----

def test_encode_cuts_the_prompt_alike_for_all_responses_and_counts(capsys):
    examples = [("0123456789", ["ab", "cdef"], [0, 1], None),
                ("xy", ["far too long a text", "ok"], [0, 1], None),
                ("", ["p", "q", "r"], [1, 0, 0], [1, 2, 2])]
    first, empty = encode(examples, 10, "some.jsonl")
    assert first.prompt == [*b"56789"]  # room 10 = 5 of the prompt, 4 of the longest response, eos
    assert first.rows == [[*b"56789ab", BYTES.eos], [*b"56789cdef", BYTES.eos]]
    assert first.ranks == [0, 1] and first.gold is None and first.texts == ("0123456789", ["ab", "cdef"])
    eos = BYTES.eos  # as PPO's and sample.py's empty prompt
    assert empty.prompt == [eos] and empty.rows == [[eos, *b"p", eos], [eos, *b"q", eos], [eos, *b"r", eos]]
    assert empty.ranks == [1, 0, 0] and empty.gold == [1, 2, 2] and empty.texts == ("", ["p", "q", "r"])
    said = capsys.readouterr().out
    assert "some.jsonl: of 3 examples, 1 prompts truncated from the left and 1 dropped" in said
    assert "a response that does not fit into 10 tokens" in said


def test_encode_exact_fit_is_not_cut_and_nothing_left_is_an_error(capsys):
    whole, = encode([("abc", ["d", "e"], [0, 1], None)], 5)
    assert whole.rows == [[*b"abcd", BYTES.eos], [*b"abce", BYTES.eos]]
    assert capsys.readouterr().out == ""
    left, = encode([("abc", ["defg", "e"], [0, 1], None)], 6)  # one token of the prompt is left
    assert left.prompt == [*b"c"] and left.rows == [[*b"cdefg", BYTES.eos], [*b"ce", BYTES.eos]]
    for long in ("defgh", "defghi"):  # the first leaves no token
        with pytest.raises(UserError, match="x: no example fits into 6 tokens"):
            encode([("abc", [long, "e"], [0, 1], None)], 6)


# ---- scale ----

@pytest.mark.parametrize("pool", RewardModel.POOLS)
def test_R19_R20_normalise_once_keeps_the_order_and_survives_saving(pool, tmp_path):
    rm = RewardModel.from_gpt(tiny_gpt(vocab_size=257), pool).eval()
    tokens, lengths = torch.randint(257, (40, 12), generator=gen(0)), torch.arange(40) % 10 + 2
    with torch.inference_mode():
        raw = rm.score(tokens, lengths)
        rm.normalise(raw)
        scores = rm.score(tokens, lengths)
    assert scores.mean().abs() < 1e-4 and scores.std(unbiased=False).item() == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(scores, (raw - raw.mean()) / raw.std(unbiased=False), atol=1e-5, rtol=0)
    assert torch.equal(raw.argsort(), scores.argsort())
    groups = [[0, 1]] * 20
    assert ranking_loss(raw, groups)[1] == ranking_loss(scores, groups)[1]
    with pytest.raises(ValueError, match="already"):
        rm.normalise(scores)
    save(tmp_path / "rm.pt", rm, BYTES)
    again = load(RewardModel, tmp_path / "rm.pt")
    with torch.inference_mode():
        assert torch.equal(again.score(tokens, lengths), scores)
    with pytest.raises(ValueError, match="already"):
        again.normalise(scores)
    if pool != "token":  # the critic speaks in the same units: its value of the whole text is the score
        assert torch.equal(again(tokens)[torch.arange(40), lengths - 1].detach(), scores)


def test_R20_a_shift_alone_is_a_normalisation_and_carries_no_gradient():
    """Scores with standard deviation 1 are only shifted; of scores with a gradient none is kept."""
    rm = RewardModel.from_gpt(tiny_gpt())
    rm.normalise(torch.tensor([1.0, 3.0], requires_grad=True))
    assert rm.shift == 2 and rm.scale == 1 and not rm.shift.requires_grad and not rm.scale.requires_grad
    with pytest.raises(ValueError, match="already"):
        rm.normalise(torch.tensor([1.0, 4.0]))


def test_R20_equal_scores_are_refused():
    with pytest.raises(ValueError, match="equal"):
        RewardModel.from_gpt(tiny_gpt()).normalise(torch.ones(8))


# ---- report ----

def test_R26_calibration_error():
    g = gen(0)
    true = torch.randn(20000, generator=g) * 1.5
    gap = torch.where(torch.rand(20000, generator=g) < true.sigmoid(), true, -true)  # winner - loser
    assert calibration_error(gap) < 0.015
    assert calibration_error(3 * gap) > 0.1 and calibration_error(gap / 3) > 0.05


def test_R26_calibration_error_by_hand():
    """Ten equal bins of the margin, from 0.5 to 1; a margin of 1 is in the last, a tie is half right."""
    gap = [0.0, 0.0, 0.1, -0.15, 0.3, 0.66, -0.8, 2.0, -2.1, 2.05, 2.5, 3.5, -40.0, 1e4, 1e4]
    bins = {}
    for x in gap:
        p = 1 / (1 + math.exp(-abs(x)))
        bins.setdefault(min(9, int((p - 0.5) * 20)), []).append(((x > 0) + 0.5 * (x == 0)) - p)
    expected = sum(abs(sum(part)) for part in bins.values()) / len(gap)
    assert len(bins) == 6 and calibration_error(torch.tensor(gap)) == pytest.approx(expected, abs=1e-6)


def test_R24_report_prints_longer_wins_and_the_ceiling(capsys):
    rm = RewardModel.from_gpt(tiny_gpt(vocab_size=257))
    examples = [("p", ["longer", "short"], [0, 1], [3, 1]), ("p", ["s", "longest of these"], [0, 1], [1, 4]),
                ("p", ["ab", "cd"], [0, 1], None), ("p", ["a", "abc", "ab"], [2, 0, 1], [1, 2, 1.5]),
                ("p", ["aa", "ba", "abcd"], [0, 0, 1], [2, 2, 1.9])]  # R16: the two at the top make no pair
    groups = encode(examples, 32)

    class World:
        ceiling = staticmethod(lambda prompt, better, worse: 0.75)

    result = report_pairs(rm, groups, World, Config(batch_tokens=64, wide_gap=1.5), "cpu")
    out = capsys.readouterr().out
    assert result["longer_wins"] == pytest.approx((1 + 0 + .5 + 1 + 1 + 1 + 0 + 0) / 8)
    assert "longer wins 56.2%" in out
    assert result["pairs"] == 8 and result["ceiling"] == 0.75 and "ceiling 75.0%" in out
    scores = rm.score(*pad([row for group in groups for row in group.rows])).tolist()
    start, right = 0, []
    for group in groups:
        right += pairs_by_hand(scores[start:start + len(group.rows)], group.ranks)[1]
        start += len(group.rows)
    assert result["accuracy"] == pytest.approx(mean(right))
    assert result["accuracy_wide"] == pytest.approx(mean(right[:2]))  # the only gaps in gold above 1.5
    assert -1 <= result["length_correlation"] <= 1


# ---- train_rm.py ----

def more_a_wins(n, rng, shuffled=False, K=2):
    for _ in range(n):
        texts = []
        while len({text.count("a") for text in texts}) < K:
            texts = ["".join(rng.choice("ab") for _ in range(8)) for _ in range(K)]
        texts.sort(key=lambda text: rng.random() if shuffled else -text.count("a"))
        yield {"prompt": "x", "responses": texts}


def make_run(folder, train, val, **sizes):
    """A folder that is both --data and --out."""
    for name, rows in (("preferences", train), ("preferences_val", val)):
        jsonl(folder / f"{name}.jsonl", rows)
    sizes = {"vocab_size": 257, "block_size": 16, "n_layer": 1, **sizes}
    save(folder / "sft.pt", tiny_gpt(std=None, **sizes), BYTES)
    return str(folder)


def last_report(folder):
    return lines(folder / "rm.log.jsonl")[-1]["report"]


@pytest.mark.slow
def test_R22_learns_a_planted_preference(tmp_path):
    rng = random.Random(0)
    run = make_run(tmp_path, more_a_wins(600, rng), more_a_wins(200, rng))
    train_rm.main(Config(data=run, out=run, batch_tokens=320, epochs=2, lr=3e-3, device="cpu"))
    assert last_report(tmp_path)["accuracy"] >= 0.95
    rm = load(RewardModel, tmp_path / "rm.pt")
    with torch.inference_mode():
        a, b = rm.score(*pad([list(b"xaaaaaaaa") + [256], list(b"xbbbbbbbb") + [256]])).tolist()
    assert a > b + 1  # the sign, through the checkpoint, in standard deviations


@pytest.mark.slow
def test_R22_a_quarter_of_the_labels_turned_round(tmp_path):
    """Still right on clean pairs; on labels like those of training nobody is right more than 75% of times."""
    rng = random.Random(0)
    train = [{**row, "responses": row["responses"][:: rng.choice([-1, 1, 1, 1])]}
             for row in more_a_wins(600, rng)]
    run = make_run(tmp_path, train, more_a_wins(200, rng))
    train_rm.main(Config(data=run, out=run, batch_tokens=320, epochs=2, lr=3e-3, device="cpu"))
    assert last_report(tmp_path)["accuracy"] > 0.85


@pytest.mark.slow
def test_R23_shuffled_labels_stay_at_chance(tmp_path):
    rng = random.Random(1)
    run = make_run(tmp_path, more_a_wins(300, rng, shuffled=True), more_a_wins(300, rng, shuffled=True))
    train_rm.main(Config(data=run, out=run, batch_tokens=320, lr=3e-3, epochs=1.0, device="cpu"))
    assert abs(last_report(tmp_path)["accuracy"] - 0.5) < 3 * math.sqrt(0.25 / 300)


@pytest.mark.parametrize("pool", RewardModel.POOLS)
def test_every_pool_is_trained_by_main_with_one_forward_per_response(pool, tmp_path):
    """R15: K rows through the trunk for a prompt with K responses, not one for each pair."""
    rng = random.Random(0)
    run = make_run(tmp_path, more_a_wins(8, rng, K=4), more_a_wins(4, rng))
    rows, before = [], load(GPT, tmp_path / "sft.pt").trunk.state_dict()
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: rows.append(len(args[0])) if torch.is_grad_enabled() and module.training
        and type(module) is Block else None)
    try:
        train_rm.main(Config(data=run, out=run, pool=pool, batch_tokens=160, epochs=1, device="cpu"))
    finally:
        hook.remove()
    assert sum(rows) == 8 * 4  # through the one block
    rm = load(RewardModel, tmp_path / "rm.pt")
    assert rm.pool == pool and rm.scale != 1 and not rm.training
    changed = [name for name, w in rm.trunk.state_dict().items() if not torch.equal(w, before[name])]
    assert len(changed) == len(before)


def test_the_score_of_best_responses_is_standard_when_sft_never_ends(tmp_path, capsys):
    """R19 through main: with too few finished samples the best responses get mean 0 and sd 1."""
    rng = random.Random(2)
    examples = list(more_a_wins(80, rng))
    run = make_run(tmp_path, examples, examples[:4])
    train_rm.main(Config(data=run, out=run, epochs=0.3, device="cpu"))
    rm = load(RewardModel, tmp_path / "rm.pt")
    with torch.inference_mode():
        scores = rm.score(*pad([list(f"x{row['responses'][0]}".encode()) + [256] for row in examples]))
    assert "best responses" in capsys.readouterr().out
    assert scores.mean().abs() < 1e-4 and scores.std(unbiased=False).item() == pytest.approx(1, abs=1e-4)


def ending_gpt():
    """One whose every token ends the text with probability 1/5."""
    gpt = tiny_gpt(std=None, vocab_size=257, block_size=16)
    favour = math.log(64) * torch.nn.functional.one_hot(torch.tensor(256), 257)
    gpt.lm_head.register_forward_hook(lambda module, args, logits: 0 * logits + favour)
    return gpt


def test_sample_texts_goes_on_from_every_prompt_once():
    """In batches, in their order; a text that does not end, or has nothing new, is left out."""
    gpt, g = ending_gpt(), gen(1)
    prompts = [[i % 256, i // 256, 7][: 2 + (i % 3 == 0)] for i in range(300)]
    got = train_rm.sample_texts(gpt, prompts, 256, 9, gen(1), "cpu")
    expected = []
    for part in (prompts[:128], prompts[128:256], prompts[256:]):
        tokens, lengths = generate(gpt, *pad(part), 9, eos=256, generator=g)
        expected += [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True) if row[n - 1] == 256]
    assert got == expected and 100 < len(got) < 300
    assert train_rm.sample_texts(gpt, [[1, 256], [5, 6, 7]], 256, 0, g, "cpu") == []


@pytest.mark.parametrize("pool", ["last", "token"])
def test_R19_samples_of_the_sft_model_are_standard(monkeypatch, tmp_path, pool):
    """normalise: the finished samples of the SFT model, and only those, get mean 0 and sd 1; they leave room
    for a reward token."""
    gpt = ending_gpt()
    rm = RewardModel.from_gpt(tiny_gpt(vocab_size=257, block_size=16), pool).eval()
    seen, room = [], 16 - (pool == "token")
    monkeypatch.setattr(train_rm, "score_rows", lambda rm, rows, *rest: seen.extend(rows)
                        or score_rows(rm, rows, *rest))
    groups = encode([("x" * (1 + i % 5), ["a", "b"], [0, 1], None) for i in range(600)], 16)
    prompts, new = [group.prompt for group in groups[:512]], room - 5
    train_rm.normalise(rm, gpt, groups, prompts, BYTES, Config(max_new_tokens=new, batch_tokens=1792), "cpu")
    assert seen == train_rm.sample_texts(gpt, prompts, 256, new, gen(Config.seed), "cpu")
    assert 64 <= len(seen) < 512 and all(row[-1] == 256 and row[0] == ord("x") for row in seen)
    assert len({len(row) for row in seen}) > 3 and max(map(len, seen)) == room
    scores = score_rows(rm, seen, 256, "cpu")
    assert scores.mean().abs() < 1e-4 and scores.std(unbiased=False).item() == pytest.approx(1, abs=1e-4)
