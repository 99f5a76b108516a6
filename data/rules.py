"""Rules: what a flag is when nobody gives it, as the data and the network ask for. All of them are here, as
functions of numbers; lib/start.py fills them in, docs/data.md says where each comes from.

Rates are those that were best at width 128, and fall beyond it with the width d: as 1/d for a network from
scratch, as 1/d^2 for one that is trained already, which at GPT-2's 768 gives 1e-4 and 1.4e-5, as is usual.
"""
import math
import zlib

WIDTH = 128  # of the network that the rates were found with
STEPS = 300  # in a run, at least
VOCABULARY = 8192  # of a BPE that is trained here; fewer where no pair of tokens occurs twice
MUCH = 1_500_000  # tokens of ranked texts; with fewer the reward model reads a response more than once


def density(examples):
    """Compressed size of [(prompt, completion)] over their size: 0.4 for English, 0.13 for the stories, which
    are made of a few sentences. Only the end of a prompt counts, as many prompts begin alike; sorted, so that
    the order of the file does not matter."""
    some = "\n".join(sorted(prompt[-200:] + completion[:800] for prompt, completion in examples)).encode()
    return len(zlib.compress(some)) / max(1, len(some))


def block_size(*files):
    """A quarter more than 99.5% of the texts of each file have, whose lengths these are, in steps of 32, from
    64 to 1024."""
    return min(1024, max(64, 32 * math.ceil(1.25 * max(_long(lengths) for lengths in files if lengths) / 32)))


def sft(tokens, parameters, width, density, init, epochs=None):
    """Of train_sft.py; density: `density` of the examples; epochs: as given.

    Up to 4 times a repetition is as good as new text (Muennighoff et al. 2023). Little text is read more
    often, with dropout and a lower rate: 2.5 tokens a parameter in all, fewer where the texts are much alike.
    Varied text that would need over 20 passes for that is read in other tokens each time. A trained network
    (init) knows what text is like.
    """
    wanted = 1 if init else min(2.5, 10 * density) * parameters / tokens
    passes = 1 if init else min(16, max(3, round(wanted)))
    few = max(0, passes - 3) / 13  # from 0 to 1
    epochs = epochs or passes
    varied = min(1, max(0, 5 * density - 1))  # 0 for the stories, 1 for English
    bpe_dropout = round(varied * min(0.2, max(0, wanted - 20) / 100), 2)
    rate = 4e-3 * min(1, WIDTH / width) ** (2 if init else 1)
    return {"epochs": float(epochs), "dropout": round(0.3 * few, 2), "bpe_dropout": bpe_dropout,
            "batch_tokens": _batch(2048, tokens, 200, epochs), "lr": _round(rate * (1 - few / 2))}


def rm(tokens, different, width, epochs=None):
    """Of train_rm.py: `tokens` of ranked texts, of which `different` are those of different texts; epochs: as
    given."""
    passes = min(24, max(MUCH, tokens) / different)  # of a response, that may be in several rankings
    few = min(1, (round(passes) - 1) / 5)  # from 0 to 1
    epochs = epochs or max(1, round(passes * different / tokens))
    return {"epochs": float(epochs), "bpe_dropout": round(0.2 * few, 2),
            "batch_tokens": _batch(1792, tokens, 2800, epochs),
            "lr": _round(5e-4 * min(1, WIDTH / width) ** 2)}


def max_new_tokens(room, lengths):
    """Of responses: a quarter more than 99.5% of the demonstrations have, whose lengths these are (without
    any: 100), in steps of 4; four fifths of the model's `room` at most."""
    return min(4 * math.ceil(1.25 * _long(lengths or [80]) / 4), room * 4 // 5)


def kl_horizon(responses):
    """Of a run with so many responses: kl_coef can then change fifty-fold in it, whatever its length."""
    return max(1, responses // 20)


def _long(lengths):
    """What 99.5% of the lengths do not exceed."""
    return sorted(lengths)[math.ceil(0.995 * len(lengths)) - 1]


def _batch(usual, tokens, steps, epochs):
    """Tokens in a step: the usual number; more where an epoch would have more than so many steps, and fewer
    where the run would have less than STEPS."""
    return min(16_384, max(usual, tokens // steps), max(256, int(tokens * epochs) // STEPS))


def _round(x):
    return float(f"{x:.2g}")
