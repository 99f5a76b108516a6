"""BPE-dropout: in each step of training other tokens for the same text, so that a word is learned whole and
in pieces. With few texts most words are rare, and their pieces are not.

After Provilkov et al. 2020 (arXiv 1910.13267), who leave out merges while a text is encoded; here tokens are
split, which needs no text and hardly any time.
"""
import random

from data.examples import Ranking


def splitter(tokenizer, room, cfg):
    """split(examples, step) -> demonstrations or Rankings: each token is replaced, with probability
    cfg.bpe_dropout, by the two that it was merged from, and each of these again. An example with a row that
    then exceeds `room` stays as it is."""
    halves = tokenizer.halves() if cfg.bpe_dropout else {}

    def split(examples, step):
        rng = random.Random(f"{cfg.seed} {step}")  # the same after --resume
        return [_split(example, halves, cfg.bpe_dropout, room, rng) for example in examples]

    return split if halves else lambda examples, step: examples


def _split(example, halves, share, room, rng):
    """A demonstration or a Ranking, whose rows all keep one prompt."""
    ranking = isinstance(example, Ranking)
    rows, P = (example.rows, len(example.prompt)) if ranking else ([example[0]], example[1])
    prompt = split_tokens(rows[0][:P], halves, share, rng)
    longer = [prompt + split_tokens(row[P:], halves, share, rng) for row in rows]
    if max(map(len, longer)) > room:
        return example
    return example._replace(prompt=prompt, rows=longer) if ranking else (longer[0], len(prompt))


def split_tokens(row, halves, share, rng):
    """Token ids -> a list of them, each split with probability `share` into halves[id], and these again."""
    made, left = [], [*row[::-1]]
    while left:
        token = left.pop()
        if token in halves and rng.random() < share:
            left += halves[token][::-1]
        else:
            made.append(token)
    return made
