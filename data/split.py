"""Split: which texts are held out. A hash of the text decides, so a text is always on the same side.

It stays there when the file grows, is sorted in another way, or is split again; and all examples of one
prompt are on one side, in sft.jsonl, preferences.jsonl and prompts.jsonl alike. (The first words of a text
without a prompt are no prompt here, though a demonstration has them as one.)
"""
import hashlib

import numpy as np

from data.arrays import derived, open_records, pick
from data.files import UserError, printable


def place(text):
    """A number in [0, 1) that the text alone determines; case and spacing are ignored."""
    key = " ".join(text.casefold().split())
    return int(hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()[:12], 16) / 16**12


def held_out(text, share):
    """Whether the text belongs to the share (0 to 1) that is held out."""
    return place(text) < share


def read_split(read, path, cfg):
    """(training, held-out) examples that read(path, skip_bad) finds in NAME.jsonl and NAME_val.jsonl.

    If the latter is missing, cfg.val_fraction of the former are held out. UserError: that is 0, or one
    side would be empty.
    """
    examples, val = open_records(read, path, cfg.skip_bad), path.with_name(f"{path.stem}_val{path.suffix}")
    if val.exists():
        if cfg.val_fraction:
            print(f"{printable(val)} is held out; --val-fraction is not needed")
        return examples, open_records(read, val, cfg.skip_bad)
    if not cfg.val_fraction:
        raise UserError(f"{val} is missing; --val-fraction 0.05 would hold out that share of {path.name}")
    train, val, lost = split(examples, cfg.val_fraction)
    if not train or not val:
        raise UserError(f"--val-fraction {cfg.val_fraction} would hold out {len(val)} of the {len(examples)} "
                        f"examples in {path}: prompts are held out whole, by a hash; try another share")
    print(f"{printable(path)}: {len(val)} of {len(examples)} examples held out by their text"
          + f", and {lost} rankings lost that share a response with one of them" * (lost > 0))
    return train, val


def read_training(read, path, cfg):
    """The training examples only, which need no file of held-out ones."""
    if cfg.val_fraction and not path.with_name(f"{path.stem}_val{path.suffix}").exists():
        return read_split(read, path, cfg)[0]
    return open_records(read, path, cfg.skip_bad)


def split(examples, share):
    """Examples of data/records.py -> (training, held out, how many rankings were lost).

    Without a prompt, the completion decides, or the first response in alphabetical order. Rankings without a
    prompt may share responses: those of a held-out one are taken out of the others.
    """
    places = derived(examples, "places", lambda: np.array([place(_key(example)) for example in examples]))
    train, val = (pick(examples, side) for side in (places >= share, places < share))
    gone = {text for example in val if _is_free_ranking(example) for text in example[1]}
    if not gone:
        return train, val, 0
    kept = [_without(example, gone) if _is_free_ranking(example) else example for example in train]
    return [example for example in kept if example], val, kept.count(None)


def _key(example):
    prompt, *rest = (example,) if isinstance(example, str) else example
    if prompt.strip() or not rest:
        return prompt
    return rest[0] if isinstance(rest[0], str) else min(rest[0])


def _is_free_ranking(example):
    """Whether it is a ranking without a prompt."""
    return not isinstance(example, str) and len(example) == 5 and not example[0].strip()


def _without(ranking, gone):
    """The ranking without those responses; None if it then ranks nothing."""
    prompt, *lists = ranking
    responses, ranks, *_ = lists
    left = [i for i, text in enumerate(responses) if text not in gone]
    if len({ranks[i] for i in left}) < 2:
        return None
    return prompt, *(some and [some[i] for i in left] for some in lists)
