"""Lists: from ratings to rankings; data.prepare and data.reviews share this. An item has text and mean."""
import random
import re


def ranking(items, prompt=""):
    """The items as a line of preferences.jsonl, best first; equal means share a rank. None: all are equal,
    which teaches nothing."""
    items = sorted(items, key=lambda item: -item.mean)
    ratings = [item.mean for item in items]
    levels = sorted(set(ratings), reverse=True)
    if len(levels) < 2:
        return None
    line = {"prompt": prompt, "responses": [item.text for item in items], "ratings": ratings}
    return line | ({"ranks": [levels.index(x) for x in ratings]} if len(levels) < len(items) else {})


def rankings(items, each, size, rng, prompt=""):
    """Lists of the items, each in `each` of them with different others; size(rng) draws the length of one.

    Dropped: lists that rank nothing, and a remainder of one or three items.
    """
    for _ in range(each):
        pool = rng.sample(items, len(items))
        while pool:
            n = size(rng)
            some, pool = pool[:n], pool[n:]
            if len(some) not in (1, 3) and (line := ranking(some, prompt)):
                yield line


def random_pairs(items, count, seed):
    """Up to `count` distinct random pairs (better, worse) of items whose means differ."""
    rng, pairs = random.Random(seed), {}
    for _ in range(10 * count if len(items) > 1 else 0):
        b, a = sorted(rng.sample(items, 2), key=lambda item: item.mean)
        if a.mean > b.mean:
            pairs[a.text, b.text] = (a, b)
        if len(pairs) == count:
            break
    return list(pairs.values())


def first_words(text, x):
    """A text without a prompt as a demonstration: its first 2 to 5 words, as x in [0, 1) says, and the rest.
    None: it has fewer than three words."""
    ends = [word.end() for word in re.finditer(r"\S+", text)]
    if len(ends) < 3:
        return None
    end = ends[1 + int(x * min(4, len(ends) - 2))]
    return text[:end], text[end:]
