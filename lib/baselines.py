"""What is trivial, to be beaten: n-gram models beside SFT, regression on words beside the reward model.

Both learn from what the stage itself was trained on, in a few seconds, and see the held-out part only to be
measured on it.
"""
import re
from array import array

import numpy as np

from data.examples import row_sizes

DISCOUNT = 0.75  # of a pair's count, given to what was never seen (Chen & Goodman 1999, section 2.7)
AT_ONCE = 2**22  # tokens that are counted at once
PENALTIES = (1.0, 3.0, 10.0, 30.0)
MOST = 20_000  # examples that the regression learns from, at most, so that it takes seconds


# ---- tokens ----

def ngram_losses(rows, val_rows, vocab_size):
    """Nats per completion token of val_rows, [(tokens, P)], under (unigram, bigram) models of `rows`.

    Unigrams count one more than seen; bigrams are discounted by DISCOUNT and interpolated with them.
    """
    seen, total, pair, count = (np.zeros(n, np.int64) for n in (vocab_size, vocab_size, 0, 0))
    step = max(1, AT_ONCE * len(rows) // sum(n for [n] in row_sizes(rows)))
    for start in range(0, len(rows), step):
        before, token = _pairs(rows[start : start + step])
        seen += np.bincount(token, minlength=vocab_size)
        total += np.bincount(before, minlength=vocab_size)
        more, n = np.unique(before * vocab_size + token, return_counts=True)
        pair, place = np.unique(np.concatenate([pair, more]), return_inverse=True)
        count = np.bincount(place, np.concatenate([count, n]))
    unigram = (seen + 1) / (seen.sum() + vocab_size)
    kinds = np.bincount(pair // vocab_size, minlength=vocab_size)  # of tokens that follow

    before, token = _pairs(val_rows)
    at = np.searchsorted(pair, before * vocab_size + token).clip(max=len(pair) - 1)
    found = np.where(pair[at] == before * vocab_size + token, count[at] - DISCOUNT, 0.0)
    known = total[before] > 0
    bigram = np.where(known, (found + DISCOUNT * kinds[before] * unigram[token]) / total[before].clip(min=1),
                      unigram[token])
    return -np.log(unigram[token]).mean().item(), -np.log(bigram).mean().item()


def _pairs(rows):
    """(the token before, the token) of every completion token."""
    return tuple(np.concatenate([row[P + shift : len(row) + shift] for row, P in rows]).astype(np.int64)
                 for shift in (-1, 0))


# ---- words ----

def words(text):
    """The different words and signs of a text, in lower case."""
    return set(re.findall(r"\w+|[^\w\s]", text.lower()))


def _targets(groups):
    """At most MOST different responses to their prompts, drawn at random, and the mean (N,) of what is known
    of each. Only the texts of these are held: all of them may take more memory than there is."""
    keys, group_of, part, targets = array("q"), array("q"), array("q"), array("d")
    rated = any(group.ratings for group in groups)
    for i, group in enumerate(groups):
        if rated and not group.ratings:
            continue
        (prompt, responses), n = group.texts, len(group.ranks) - 1
        targets.extend(group.ratings or [sum(x < other for other in group.ranks) / n for x in group.ranks])
        keys.extend(hash((prompt, text)) for text in responses)
        group_of.extend([i] * len(responses))
        part.extend(range(len(responses)))
    _, first, kind = np.unique(keys, return_index=True, return_inverse=True)
    first.sort()
    drawn = first[np.random.default_rng(0).permutation(len(first))[:MOST]].tolist()
    known = {k: [] for k in kind[drawn].tolist()}
    for k, y in zip(kind.tolist(), targets, strict=True):
        if k in known:
            known[k].append(y)
    return ([groups[group_of[i]].texts[1][part[i]] for i in drawn],
            np.array([sum(some) / len(some) for some in known.values()]))


class Linear:
    """Ridge regression on which words occur in a response: of its rating, or, where there are no ratings, of
    the share of the other responses to its prompt that it is better than.

    The penalty is the one with the smallest error on a fifth of the examples that it was not fitted to.
    """

    def __init__(self, groups):
        """groups: [Ranking] to learn from."""
        texts, target = _targets(groups)
        texts = [words(text) for text in texts]
        different = dict.fromkeys(word for some in texts for word in sorted(some))
        self.index = {word: i for i, word in enumerate(different)}
        target = target - target.mean()
        n, errors = len(texts) // 5, {}
        for penalty in PENALTIES:
            self.weight = self._fit(texts[n:], target[n:], penalty)
            made = [self._sum(some) for some in texts[:n]]
            errors[penalty] = ((np.array(made) - target[:n]) ** 2).sum()
        self.weight = self._fit(texts, target, min(errors, key=errors.get))

    def score(self, text):
        return self._sum(words(text))

    def _sum(self, some):
        return sum(self.weight[self.index[word]] for word in some if word in self.index)

    def _fit(self, texts, target, penalty, rounds=60):
        """Weights w that minimise |X w - target|^2 + penalty |w|^2, by conjugate gradients."""
        row = np.repeat(np.arange(len(texts)), [len(some) for some in texts])
        column = np.array([self.index[word] for some in texts for word in some], dtype=int)
        n, m = len(texts), len(self.index)
        w = np.zeros(m)
        residual = direction = np.bincount(column, target[row], m)
        size = residual @ residual
        for _ in range(rounds):
            if size < 1e-12:
                break
            image = np.bincount(column, np.bincount(row, direction[column], n)[row], m) + penalty * direction
            step = size / (direction @ image)
            w, residual = w + step * direction, residual - step * image
            size, old = residual @ residual, size
            direction = residual + size / old * direction
        return w
