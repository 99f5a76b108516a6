"""What is trivial: n-gram models and regression on words, against sums by hand and closed forms."""
import math
import random

import numpy as np
import pytest

from data.examples import Ranking
from lib import baselines
from lib.baselines import DISCOUNT, Linear, _targets, ngram_losses, words


def test_ngrams_by_hand():
    """Completions 1 2 and 1 1 after a prompt 0; unseen pairs and unseen histories are measured, too."""
    rows = [([0, 1, 2], 1), ([0, 1, 1], 1)]
    uni = {0: 1 / 8, 1: 4 / 8, 2: 2 / 8, 3: 1 / 8}  # one more than seen, over 4 + 4
    after_1 = {1: (1 - DISCOUNT + 2 * DISCOUNT * uni[1]) / 2, 2: (1 - DISCOUNT + 2 * DISCOUNT * uni[2]) / 2,
               0: 2 * DISCOUNT * uni[0] / 2}
    after_0 = {1: (2 - DISCOUNT + DISCOUNT * uni[1]) / 2}
    got = ngram_losses(rows, [([0, 1, 2, 3, 1], 1), ([1, 1, 0], 1)], 4)
    seen = [1, 2, 3, 1, 1, 0]
    assert got[0] == pytest.approx(-sum(math.log(uni[t]) for t in seen) / 6)
    pairs = [after_0[1], after_1[2], uni[3], uni[1], after_1[1], after_1[0]]  # 2 and 3 were never followed
    assert got[1] == pytest.approx(-sum(map(math.log, pairs)) / 6)


def test_the_distributions_of_ngrams_add_up_to_one():
    rng, V = random.Random(1), 7
    rows = [([rng.randrange(5) for _ in range(9)], 2) for _ in range(20)]
    for before in range(V):
        p = [np.exp([-x for x in ngram_losses(rows, [([before, token], 1)], V)]) for token in range(V)]
        assert np.sum(p, 0) == pytest.approx([1, 1])


def test_words():
    assert words("It's GOOD, good!") == {"it", "'", "s", "good", ",", "!"}


def rated(texts, ratings, prompt=""):
    order = sorted(range(len(texts)), key=lambda i: -ratings[i])
    pick = [[some[i] for i in order] for some in (texts, ratings)]
    return Ranking([], [], list(range(len(texts))), (prompt, pick[0]), None, pick[1])


VALUE = {"good": 2.0, "fine": 1.0, "the": 0.0, "film": 0.0, "bad": -1.0, "awful": -2.0}


def made_up(n, seed):
    rng, groups = random.Random(seed), []
    for i in range(n):
        texts = list({" ".join([*rng.sample([*VALUE], 3), f"w{i}x{k}"]) for k in range(4)})
        groups.append(rated(texts, [sum(VALUE[w] for w in text.split()[:3]) for text in texts]))
    return groups


@pytest.mark.parametrize("known", ["ratings", "order"])
def test_regression_finds_what_each_word_is_worth(known):
    groups = made_up(300, 1)
    if known == "order":
        groups = [group._replace(ratings=None) for group in groups]
    linear = Linear(groups)
    order = sorted(VALUE, key=VALUE.get)
    found = [linear.score(word) for word in order]
    assert found[0] < found[1] < min(found[2:4]) <= max(found[2:4]) < found[4] < found[5]
    if known == "ratings":
        assert np.diff(found)[[0, 4]] == pytest.approx([1, 1], abs=0.15)
    assert linear.score("never seen") == 0


def test_the_fit_is_that_of_the_normal_equations():
    linear = Linear(made_up(30, 2))
    texts = [words(text) for group in made_up(30, 2) for text in group.texts[1]]
    target = np.random.default_rng(0).normal(size=len(texts))
    X = np.array([[word in some for word in linear.index] for some in texts], float)
    w = np.linalg.solve(X.T @ X + 3 * np.eye(X.shape[1]), X.T @ target)
    assert linear._fit(texts, target, 3.0) == pytest.approx(w, abs=1e-5)


def test_a_response_in_several_rankings_counts_once_with_its_mean():
    groups = [rated(["a", "b"], [3.0, 1.0]), rated(["a", "c"], [5.0, 1.0])]

    def targets(groups):
        texts, means = _targets(groups)
        return dict(zip(texts, means.tolist(), strict=True))

    assert targets(groups) == {"a": 4.0, "b": 1.0, "c": 1.0}
    order = [group._replace(ratings=None, ranks=[0, 0] if i else [0, 1]) for i, group in enumerate(groups)]
    assert targets(order) == {"a": 0.5, "b": 0.0, "c": 0.0}


def test_the_penalty_is_chosen_on_examples_that_were_not_fitted(monkeypatch):
    """On pure noise the largest one."""
    fitted, shipped = [], Linear._fit
    monkeypatch.setattr(Linear, "_fit", lambda self, texts, target, penalty: fitted.append(
        (len(texts), penalty)) or shipped(self, texts, target, penalty))
    rng = random.Random(3)
    groups = [rated([f"w{rng.randrange(40)} w{rng.randrange(40)} {i}", f"w{rng.randrange(40)} {i} z"],
                    [rng.random(), rng.random()]) for i in range(100)]
    Linear(groups)
    assert fitted[:4] == [(160, penalty) for penalty in baselines.PENALTIES]
    assert fitted[4:] == [(200, max(baselines.PENALTIES))]
