"""Byte-level tokenizers: text -> ids and back, lossless for any text. tiktoken encodes; this file chooses
the vocabulary, stores it in checkpoints, and trains a BPE on your own text (Sennrich et al. 2016,
arXiv 1508.07909; on bytes as in GPT-2, section 2.2):

    python -m data.tokenizer train --vocab-size 4096 --out my.bpe FILE...   (text, .jsonl, .gz)
"""
import argparse
import base64
import gzip
import os
import sys
import time
import zlib
from collections import Counter, defaultdict
from heapq import heapify, heappop, heappush
from itertools import islice, pairwise
from operator import itemgetter

import numpy as np
import regex  # for \p{L}; tiktoken itself depends on it
import tiktoken

from data.files import Progress, UserError, atomic_file, json_object, printable

# GPT-2's split in tiktoken's spelling (openai_public.py, r50k_pat_str): no merge crosses a word
# boundary. Copied, not imported, because a BPE in an old checkpoint is meaningless without it.
END = "<|endoftext|>"
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
LONGEST_BLANK = 300_000  # whitespace characters; tiktoken 0.14 handles this many and panics at 1,000,000
LONGEST_WORD = 20_000  # characters; 0.2 s, and tiktoken's time grows with the square
RUNS = [(regex.compile(f"{kind}*"), regex.compile(f"(?r){kind}*"))  # of what words are: after, and before
        for kind in (r"\p{L}", r"\p{N}", r"[^\s\p{L}\p{N}]")]


class Tokenizer:
    """A thin wrapper over tiktoken.Encoding. `vocab_size` includes `eos`; `name` is safe to print."""

    def __init__(self, name, encoding, bpe=None):
        self.name, self.encoding, self.bpe = printable(name), encoding, bpe
        self.vocab_size, self.eos = encoding.n_vocab, encoding.eot_token

    def encode(self, text):
        """Text -> ids, without eos; text that spells a special token is encoded as ordinary text.

        A lone surrogate (JSON can contain one) becomes U+FFFD. UserError: as check_text.
        """
        check_text(text)
        return self.encoding.encode_ordinary(text)

    def encode_all(self, texts):
        """Texts -> arrays of their ids and eos. One call for all, in which other threads can run."""
        for text in texts:
            check_text(text)
        joined = "".join(text + END for text in texts)
        if joined.count(END) == len(texts):
            ids = self.encoding.encode(joined, allowed_special="all")
        else:  # a text that spells eos
            ids = [i for text in texts for i in (*self.encode(text), self.eos)]
        ids = np.array(ids, np.uint16 if self.vocab_size <= 2**16 else np.int32)
        return np.split(ids, np.flatnonzero(ids == self.eos)[:-1] + 1)

    def decode(self, ids):
        """Ids -> text, ignoring eos; invalid UTF-8 becomes U+FFFD.

        UserError: an id outside the vocabulary, so from another tokenizer.
        """
        ids = [int(i) for i in ids if i != self.eos]
        if wrong := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise UserError(f"id {wrong[0]} is not in {self.name}, which has {self.vocab_size} ids")
        return self.encoding.decode(ids)

    def halves(self):
        """{id: the two ids that it was merged from}; a byte has none, nor has what no merge makes, nor,
        as that takes time, a token of more than 64 bytes."""
        ranks = _parse(self.bpe, self.name) if self.bpe else {}
        parts = ((id, _last_parts(token, ranks)) for token, id in ranks.items() if len(token) <= 64)
        return {id: tuple(ranks[part] for part in two) for id, two in parts if len(two) == 2}

    def spec(self):
        """A dict of strings for a checkpoint, from which `from_spec` rebuilds this tokenizer."""
        return {"name": self.name} if self.bpe is None else {"name": self.name, "bpe": self.bpe}


def check_text(text):
    """UserError: too much whitespace in a row, or a word too long, for any tokenizer."""
    # the lookbehind makes it linear: a run is tried from its start only
    if len(text) >= LONGEST_BLANK and regex.search(rf"(?<!\s)\s{{{LONGEST_BLANK}}}", text):
        raise UserError(f"the text has {LONGEST_BLANK} whitespace characters in a row")
    # a word that long is at one of these places, so that looking takes no time
    if any(after.match(text, i).end() - before.match(text, 0, i).start() > LONGEST_WORD
           for i in range(LONGEST_WORD, len(text), LONGEST_WORD) for after, before in RUNS):
        raise UserError(f"the text has a word of more than {LONGEST_WORD} characters")


def get_tokenizer(name):
    """The tokenizer "gpt2" or "bytes", or the one in the BPE file at this path.

    UserError: gpt2 is unavailable, no such file, or not a BPE file.
    """
    name = os.fspath(name)
    if name == "bytes":
        return _from_ranks(name, {bytes([i]): i for i in range(256)})
    try:
        if name == "gpt2":
            encoding = tiktoken.get_encoding(name)
            ranks = {encoding.decode_single_token_bytes(i): i for i in range(encoding.eot_token)}
            return _from_ranks(name, ranks, _dump(ranks))  # with its ranks, so checkpoints need no network
        with open(name, "rb") as file:
            text = file.read().decode("latin-1")  # never fails; _parse checks every line
    except (OSError, ValueError, ImportError) as error:  # requests' errors are OSErrors
        why = f"can't read {name!r}, and it is neither gpt2 nor bytes: {_reason(error)}"
        raise UserError("can't load the gpt2 tokenizer: no network and no TIKTOKEN_CACHE_DIR with its files; "
                        "use bytes or a trained BPE instead" if name == "gpt2" else why) from None
    return from_spec({"name": name, "bpe": text})


def from_spec(spec):
    """Rebuild a tokenizer from its `spec()`. UserError: not a spec, or as get_tokenizer."""
    if not isinstance(spec, dict) or not all(isinstance(spec.get(key, ""), str) for key in ("name", "bpe")):
        raise UserError("not a tokenizer spec")
    if "bpe" not in spec:
        if spec.get("name") not in ("gpt2", "bytes"):  # a checkpoint must not make us read a file
            raise UserError("the tokenizer is neither gpt2 nor bytes and comes with no BPE")
        return get_tokenizer(spec["name"])
    name = spec.get("name", "bpe")
    ranks = _parse(spec["bpe"], name)
    return _from_ranks(name, ranks, _dump(ranks))


def _from_ranks(name, ranks, bpe=None):
    return Tokenizer(name, tiktoken.Encoding(
        name, pat_str=SPLIT, mergeable_ranks=ranks,
        special_tokens={END: len(ranks)}), bpe)


def _reason(error):
    return getattr(error, "strerror", None) or error


# ---- the BPE file: tiktoken's format, one "base64(token) rank" per line ----

def _parse(text, source):
    """A BPE file's text -> {token: rank}. UserError: names the source, the line and the fault."""
    ranks, line_of = {}, {}
    for n, line in enumerate(text.rstrip().split("\n"), 1):
        if not (match := regex.fullmatch(r"(\S+) ([0-9]{1,9})\r?", line)):
            raise UserError(f"{source}:{n}: not a BPE file, whose lines are 'base64 rank'")
        try:
            token, rank = base64.b64decode(match[1], validate=True), int(match[2])
        except ValueError:
            raise UserError(f"{source}:{n}: bad base64 {match[1][:40]!r}") from None
        if not token or token in ranks:
            raise UserError(f"{source}:{n}: {'duplicate' if token else 'empty'} token")
        if rank in line_of:
            raise UserError(f"{source}:{n}: duplicate rank {rank}, as in line {line_of[rank]}")
        ranks[token], line_of[rank] = rank, n
    if (last := max(line_of)) >= len(ranks):
        gap = next(rank for rank in range(last) if rank not in line_of)
        raise UserError(f"{source}:{line_of[last]}: rank {last}, but rank {gap} is missing")
    for byte in range(256):
        if ranks.get(bytes([byte]), 256) >= 256:
            raise UserError(f"{source}: the single byte 0x{byte:02x} is not among ranks 0 to 255")
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def _dump(ranks):
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())


def check_new(path):
    """UserError if a BPE can't be saved to path: nothing is ever overwritten."""
    if os.path.lexists(path) or path in ("gpt2", "bytes"):
        raise UserError(f"{path} already exists; choose another name")
    if not os.path.isdir(folder := os.path.dirname(path) or "."):
        raise UserError(f"can't write {path}: no such folder: {folder}")


def save_bpe(ranks, path):
    """Write {token: rank} to a new file, atomically. UserError: it exists, or can't be written."""
    check_new(path := os.fspath(path))
    try:
        with atomic_file(path) as file:
            file.write(_dump(ranks).encode("ascii"))
    except OSError as error:
        raise UserError(f"can't write {path}: {_reason(error)}") from None


# ---- training ----

def train_bpe(texts, vocab_size):
    """{token: rank} of at most vocab_size - 1 tokens (the last id is eos): repeatedly merges the most
    frequent pair, ties going to the smallest pair, until no pair occurs twice.

    Says how far it is when it takes long. UserError: vocab_size below 257, or no text.
    """
    if vocab_size < 257:
        raise UserError(f"vocab size {vocab_size} is below 257 (256 bytes and eos)")
    with Progress() as progress:
        words = Counter()
        for text in texts:
            found = map(itemgetter(0), regex.finditer(SPLIT, _well_formed(text)))
            while some := list(islice(found, 65536)):
                words.update(some)
                progress("training the tokenizer: splitting the text")
        if not words:
            raise UserError("nothing to train on: the text is empty")
        return _merge_pairs(words, vocab_size, progress)


def _merge_pairs(words, vocab_size, progress):
    """{word: count} -> {token: rank}, as train_bpe."""
    line = _lay_out(words)
    counts, places = _count_pairs(line, progress)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapify(heap)
    ranks = {bytes([i]): i for i in range(256)}
    while heap and len(ranks) < vocab_size - 1:
        count, pair = heappop(heap)
        # Each pair is in the heap once, never with too low a count: only new pairs gain counts.
        if -count > counts[pair]:
            heappush(heap, (-counts[pair], pair))
        elif -count > 1:
            ranks[pair[0] + pair[1]] = len(ranks)
            where = _watch(places.pop(pair), progress, f"{len(ranks)} of {vocab_size} ids")
            for new in _merge(pair, where, line, counts, places):
                heappush(heap, (-counts[new], new))
    return ranks


def train_tokenizer(texts, vocab_size):
    """Train a BPE on an iterable of strings; returns its Tokenizer. UserError: as train_bpe."""
    return from_spec({"name": "bpe", "bpe": _dump(train_bpe(texts, vocab_size))})


def _well_formed(text):
    """Lone surrogates -> U+FFFD, as tiktoken encodes them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _watch(items, progress, text):
    """The items, one by one; now and then it says the text."""
    for n, item in enumerate(items):
        if n % 65536 == 0:
            progress(f"training the tokenizer: {text}")
        yield item


def _lay_out(words):
    """{word: count} -> one linked list of tokens, b"" between words: (token, weight, left, right)."""
    token, weight, single = [b""], [0], [bytes([byte]) for byte in range(256)]
    for word, count in words.items():
        data = word.encode()
        token += [single[byte] for byte in data] + [b""]
        weight += [count] * len(data) + [0]
    return token, weight, list(range(-1, len(token) - 1)), list(range(1, len(token) + 1))


def _count_pairs(line, progress):
    """Counts of all pairs of neighbouring tokens, and where each occurs: ({pair: n}, {pair: [i]})."""
    token, weight, _, _ = line
    counts, places = Counter(), defaultdict(list)
    for i, pair in enumerate(_watch(pairwise(token), progress, "counting pairs")):
        if all(pair):
            counts[pair] += weight[i]
            places[pair].append(i)
    return counts, places


def _merge(pair, where, line, counts, places):
    """Merge every occurrence of the pair, left to right; returns the new pairs this makes."""
    (token, weight, left, right), (a, b), new_pairs = line, pair, set()
    for i in where:  # ascending where order matters, i.e. if a == b
        j = right[i]
        if (token[i], token[j]) != pair:
            continue  # already merged
        h, k = left[i], right[j]
        token[i], token[j], right[i], left[k] = a + b, b"", k, i
        for old, new, place in (((token[h], a), (token[h], a + b), h),
                                ((b, token[k]), (a + b, token[k]), i)):
            if all(new):
                counts[old] -= weight[i]
                counts[new] += weight[i]
                places[new].append(place)
                new_pairs.add(new)
    del counts[pair]
    return new_pairs


def _last_parts(token, ranks):
    """The parts that a token has when all merges but the last are done."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [a + b for a, b in pairwise(parts)]
        first = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if first not in ranks:
            break
        i = pairs.index(first)
        parts[i : i + 2] = [first]
    return parts


# ---- command line ----

def read_texts(path):
    """A file's text, or all strings in its JSON objects, as a list, each fit to be encoded.

    UserError: names the place and the fault.
    """
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            raw = file.read()
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"can't read {path}: {_reason(error)}") from None
    if path.removesuffix(".gz").endswith(".jsonl"):
        return [text for n, line in enumerate(raw.split(b"\n"), 1) if line.strip()
                for text in _strings_of_line(line, f"{path}:{n}")]
    try:
        check_text(text := raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return [text]


def _strings_of_line(line, place):
    try:
        for text in (texts := _strings(json_object(line))):
            check_text(text)
        return texts
    except (UserError, RecursionError) as error:  # _strings may recurse deeper than the JSON reader
        why = error if isinstance(error, UserError) else "not JSON: nested too deeply"
        raise UserError(f"{place}: {why}") from None


def _strings(value):
    """All strings in a JSON value, in order; an object's keys are not text."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [string for item in inner for string in _strings(item)]


def train(files, vocab_size, out):
    """Train on the files, save, and print statistics. UserError: a bad file, size or output path."""
    start = time.time()
    check_new(out)
    texts = [text for path in files for text in read_texts(path)]
    ranks = train_bpe(texts, vocab_size)
    seconds, tokenizer = time.time() - start, _from_ranks(out, ranks)
    n_bytes = sum(len(_well_formed(text).encode()) for text in texts)
    n_tokens = sum(len(tokenizer.encode(text)) for text in texts)
    save_bpe(ranks, out)
    print(f"vocabulary {tokenizer.vocab_size}  bytes per token {n_bytes / n_tokens:.2f}  "
          f"text {n_bytes / 1e6:.2f} MB  seconds {seconds:.1f}\nsaved {printable(out)}")


def main(argv=None):
    """The command line. Returns the exit code: 0, or 1 after one sentence on stderr."""
    parser = argparse.ArgumentParser(prog="python -m data.tokenizer")
    sub = parser.add_subparsers(dest="command", required=True).add_parser("train")
    sub.add_argument("files", nargs="+", metavar="FILE", help="text or .jsonl, optionally .gz")
    sub.add_argument("--vocab-size", type=int, default=4096, help="number of ids, eos included")
    sub.add_argument("--out", required=True, metavar="PATH", help="the BPE file to write; must not exist")
    args = parser.parse_args(argv)
    try:
        train(args.files, args.vocab_size, args.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
