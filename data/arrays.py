"""Arrays: the examples of a large file, read into arrays instead of lists (data/cache.py), and their tokens.

The same examples and token rows as those of a small file, made from the arrays when they are asked for. Where
no cache can be written, a large file is read into lists, too.
"""
import copy
import json
import os
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import compress, islice

import numpy as np

from data.cache import cached, code, digest
from data.files import Progress

LARGE = 2**23  # bytes of a file; a smaller one is read in a second or two
PIECE = 2**18  # bytes of text that are encoded, or read, at once


class Lazy(Sequence):
    """Like the list [make(i) for i in range(n)], but each item is made when it is asked for. A slice is a
    list."""

    def __init__(self, n, make):
        self.n, self.make = n, make

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        at = range(self.n)[i]
        return [*map(self.make, at)] if isinstance(i, slice) else self.make(at)

    def __iter__(self):
        return map(self.make, range(self.n))

    def map(self, function):
        """The same with function(*item) for each item."""
        other = copy.copy(self)
        other.make = lambda i: function(*self.make(i))
        return other


# ---- texts ----

class Records(Lazy):
    """The examples of a large JSONL file, as data/records.py returns them, or those of an `index`."""

    def __init__(self, path, key, entry, index):
        super().__init__(len(index), lambda i: self.example(index[i]))
        self.path, self.key, self.entry, self.index = path, key, entry, index
        self.others = json.loads(entry["others"].tobytes())

    def texts(self, i):
        """[prompt, *responses] of the i-th example of the file."""
        first, at = self.entry["first"], self.entry["at"]
        ends = at[first[i] : first[i + 1] + 1].tolist()
        data = self.entry["text"][ends[0] : ends[-1]].tobytes()
        return [data[a - ends[0] : b - ends[0]].decode() for a, b in zip(ends, ends[1:], strict=False)]

    def example(self, i):
        texts, other = self.texts(i), self.others[self.entry["other"][i]]
        if other:
            return texts[0], texts[1:], *other
        return tuple(texts) if len(texts) > 1 else texts[0]

    def parted(self, i):
        """The i-th example's (prompt, responses), made when they are asked for, and what else it has."""
        return Lazy(2, lambda part: self[i][part]), self.others[self.entry["other"][self.index[i]]]

    def pieces(self, index=None):
        """[i of the file] with about PIECE bytes of text each; their memory is given back afterwards."""
        index = self.index if index is None else index
        at = self.entry["at"][self.entry["first"]]
        size = (at[index + 1] - at[index]).cumsum()
        for some in np.split(index, np.flatnonzero(np.diff(size // PIECE)) + 1):
            yield some.tolist()
            self.entry.forget()

    def __iter__(self):
        return (self.example(i) for some in self.pieces() for i in some)


def pick(examples, mask):
    """The examples, a list or Records, where the mask is True."""
    if isinstance(examples, Records):
        return Records(examples.path, examples.key, examples.entry, examples.index[mask])
    return [*compress(examples, mask)]


def derived(examples, what, make, *settings):
    """The array that make() returns, and that follows from examples and settings; of Records it is kept."""
    if isinstance(examples, Records):
        key = digest(examples.key, examples.index.tobytes(), what, settings)
        if entry := cached(examples.path, what, key, lambda write: write("array", [make()])):
            return entry["array"]
    return make()


def open_records(read, path, skip_bad):
    """read(path, skip_bad) of data/records.py: the list, or the Records of a large file."""
    try:
        large = path.is_file() and path.stat().st_size >= LARGE
        key = digest(path, read.__name__, skip_bad, code()) if large else None
    except OSError:  # read will say so
        large = False

    def make(write):
        read(path, skip_bad, into=partial(_write_texts, write))
        if digest(path, read.__name__, skip_bad, code()) != key:
            raise OSError("the file has changed meanwhile")

    entry = cached(path, "texts", key, make) if large else None
    if entry is None:
        return read(path, skip_bad)
    return Records(path, key, entry, np.arange(len(entry["other"])))


def _write_texts(write, examples):
    """All texts in UTF-8, `at` where each begins, and of each example the `first` text, and the `other`-th of
    `others`: ranks, gold and ratings."""
    at, first, other, others = array("q", [0]), array("q", [0]), array("q"), {}

    def texts():  # in pieces; they fill the other arrays
        data = bytearray()
        for example in examples:
            prompt, *more = (example,) if isinstance(example, str) else example
            for text in [prompt, *more] if len(more) < 2 else [prompt, *more.pop(0)]:
                data += (one := text.encode())
                at.append(at[-1] + len(one))
            first.append(len(at) - 1)
            more = more if len(more) > 1 else None
            other.append(others.setdefault(repr(more), (len(others), more))[0])
            if len(data) > PIECE:
                yield np.frombuffer(data, np.uint8)
                data = bytearray()
        yield np.frombuffer(data, np.uint8)

    write("text", texts())
    for name, numbers in (("at", at), ("first", first), ("other", other)):
        write(name, [np.frombuffer(numbers, np.int64)])
    write("others", [np.frombuffer(json.dumps([more for _, more in others.values()]).encode(), np.uint8)])


# ---- tokens ----

def fitted(records, tokenizer, room):
    """(i, prompt tokens, rows) of each example that fits into `room` tokens, and of how many the prompt was
    truncated; rows are views: prompt, response, eos for each response, or the prompt alone. The same as
    data.examples.fit makes. None: the tokens can't be written."""
    key = digest(records.key, tokenizer.spec())
    if not (entry := cached(records.path, "tokens", key, partial(_write_rows, records, tokenizer))):
        return None
    ids, at, P = entry["ids"], entry["at"].copy(), entry["P"]
    count = np.maximum(1, np.diff(records.entry["first"]) - 1)  # rows of each example
    first = count.cumsum() - count
    left = room - np.maximum.reduceat(np.diff(at) - P.repeat(count), first)  # by its longest response
    kept = np.flatnonzero(left[records.index] > 0)
    index = records.index[kept]
    lost = np.maximum(0, P - left)[index]
    first, count = first[index], count[index]
    ends = count.cumsum()

    def lengths():  # of the tokens of each row, example by example
        rows = np.arange(ends[-1]) + (first - ends + count).repeat(count)
        flat = (np.diff(at)[rows] - lost.repeat(count)).tolist()
        return [flat[a:b] for a, b in zip((ends - count).tolist(), ends.tolist(), strict=True)]

    def make(i, kept=kept.data, P=(P[index] - lost).data, lost=lost.data, at=at.data, first=first.data,
             last=(first + count).data):  # these give ints, not numpy's
        return kept[i], P[i], [ids[at[k] + lost[i] : at[k + 1]] for k in range(first[i], last[i])]

    made = Lazy(len(index), make)
    made.lengths, made.rated = lengths, any(other and other[-1] for other in records.others)
    return made, int((lost > 0).sum())


def _write_rows(records, tokenizer, write):
    """`ids` of the rows of all examples in the file, whole, `at` where each begins, `P` of each prompt."""
    at, P, n, threads = array("q", [0]), array("q"), len(records.entry["other"]), os.cpu_count()
    pieces = records.pieces(np.arange(n))

    def ids():  # in pieces, encoded side by side; they fill at and P
        with ThreadPoolExecutor(threads) as pool, Progress() as progress:
            while some := [*islice(pieces, 4 * threads)]:
                for rows, prompts in pool.map(partial(encode, records, tokenizer), some):
                    for row in rows:
                        at.append(at[-1] + sum(map(len, row)))
                    P.extend(prompts)
                    yield np.concatenate([part for row in rows for part in row])
                progress.share(f"encoding {records.path.name}", len(P), n)

    write("ids", ids())
    write("at", [np.frombuffer(at, np.int64)])
    write("P", [np.frombuffer(P, np.int64)])


def encode(records, tokenizer, piece):
    """Examples of the file -> rows in parts, (prompt, response with eos) for each response, or (prompt,); and
    the number of tokens of each prompt."""
    examples, rows, P = [*map(records.texts, piece)], [], []
    parts = iter(tokenizer.encode_all([text for texts in examples for text in texts]))
    for texts in examples:
        prompt, *responses = islice(parts, len(texts))
        prompt = prompt[:-1] if len(prompt) > 1 else prompt  # an empty one becomes eos
        rows += [(prompt, response) for response in responses] or [(prompt,)]
        P.append(len(prompt))
    return rows, P
