"""Text -> ids and back, byte-level, so that any text comes back exactly. The encoder is tiktoken;
here are the choice of vocabulary, its way into a checkpoint, and the training of a BPE on one's
own text (Sennrich et al. 2016, arXiv 1508.07909; on bytes as in GPT-2, section 2.2):

    python -m data.tokenizer train --vocab-size 4096 --out my.bpe FILE...   (text, .jsonl, .gz)
"""
import argparse
import base64
import gzip
import json
import os
import sys
import time
import zlib
from collections import Counter, defaultdict
from heapq import heapify, heappop, heappush

import regex  # for \p{L}; tiktoken itself depends on it
import tiktoken

from data.records import UserError

# GPT-2's split in tiktoken's spelling (openai_public.py, r50k_pat_str): no merge crosses a word's
# border. Written out, not imported, because a BPE in an old checkpoint means nothing without it.
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
LONGEST_BLANK = 300_000  # characters; tiktoken 0.14 encodes such a run and panics at 1,000,000


class Tokenizer:
    """A thin wrapper over tiktoken.Encoding. `vocab_size` counts everything, `eos` included."""

    def __init__(self, name, encoding, bpe=None):
        self.name, self.encoding, self.bpe = name, encoding, bpe
        self.vocab_size, self.eos = encoding.n_vocab, encoding.eot_token

    def encode(self, text):
        """Ids of the text, without eos; text that spells a special token is ordinary text.

        A lone surrogate (JSON can hold one) becomes U+FFFD. UserError: a blank run too long.
        """
        if len(text) > LONGEST_BLANK and regex.search(r"\s{%d}" % LONGEST_BLANK, text):
            raise UserError(f"the text has {LONGEST_BLANK} whitespace characters in a row")
        return self.encoding.encode_ordinary(text)

    def decode(self, ids):
        """Text of the ids without eos; bytes that are no UTF-8 become U+FFFD.

        UserError: an id outside the vocabulary, so another tokenizer's.
        """
        ids = [int(i) for i in ids if i != self.eos]
        if wrong := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise UserError(f"id {wrong[0]} is not in {self.name}, of {self.vocab_size} ids")
        return self.encoding.decode(ids)

    def spec(self):
        """Plain strings from which `from_spec` rebuilds this tokenizer; fit for a checkpoint."""
        return {"name": self.name} if self.bpe is None else {"name": self.name, "bpe": self.bpe}


def get_tokenizer(name):
    """The tokenizer "gpt2" or "bytes", or the one in the BPE file at this path.

    UserError: gpt2 can't be had, no such file, or no BPE file.
    """
    name = os.fspath(name)
    if name == "bytes":
        return _from_ranks(name, {bytes([i]): i for i in range(256)})
    try:
        if name == "gpt2":
            return Tokenizer(name, tiktoken.get_encoding(name))
        with open(name, "rb") as file:
            text = file.read().decode("latin-1")  # never fails; _parse judges every line
    except (OSError, ValueError, ImportError) as error:  # requests' errors are OSErrors
        why = f"can't read {name!r}, nor is it gpt2 or bytes: {_reason(error)}"
        raise UserError("can't load the tokenizer gpt2: no network and no TIKTOKEN_CACHE_DIR that holds it; "
                        "use bytes or a trained BPE instead" if name == "gpt2" else why) from None
    return from_spec({"name": name, "bpe": text})


def from_spec(spec):
    """The tokenizer whose `spec()` this is. UserError: as get_tokenizer, or it is no spec at all."""
    if not isinstance(spec, dict) or not all(isinstance(spec.get(key, ""), str) for key in ("name", "bpe")):
        raise UserError("not the description of a tokenizer")
    if "bpe" not in spec:
        if spec.get("name") not in ("gpt2", "bytes"):  # a checkpoint must not name a file to be read
            raise UserError("neither gpt2 nor bytes, and no BPE with it")
        return get_tokenizer(spec["name"])
    name = spec.get("name", "bpe")
    ranks = _parse(spec["bpe"], name)
    return _from_ranks(name, ranks, _dump(ranks))


def _from_ranks(name, ranks, bpe=None):
    return Tokenizer(name, tiktoken.Encoding(
        name, pat_str=SPLIT, mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": len(ranks)}), bpe)


def _reason(error):
    return getattr(error, "strerror", None) or error


# ---- the BPE file: tiktoken's own form, a "base64(token) rank" per line ----

def _parse(text, source):
    """{token: rank} of a BPE file's text. UserError: names the source, the line and the fault."""
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
    """UserError if no BPE can be saved there: nothing is ever overwritten."""
    if os.path.lexists(path) or path in ("gpt2", "bytes"):
        raise UserError(f"{path} exists already and is not overwritten; choose another name")
    if not os.path.isdir(folder := os.path.dirname(path) or "."):
        raise UserError(f"can't write {path}: there is no folder {folder}")


def save_bpe(ranks, path):
    """Write {token: rank} to a new file, whole or not at all. UserError: exists, unwritable."""
    check_new(path := os.fspath(path))
    beside = f"{path}.{os.getpid()}.tmp"
    try:
        with open(beside, "w", encoding="ascii") as file:
            file.write(_dump(ranks))
        os.replace(beside, path)
    except OSError as error:
        if os.path.exists(beside):
            os.unlink(beside)
        raise UserError(f"can't write {path}: {_reason(error)}") from None


# ---- training ----

def train_bpe(texts, vocab_size):
    """{token: rank}, at most vocab_size - 1 of them (the last id is eos): the commonest pair is
    merged again and again, of equals the smallest, until no pair occurs twice.

    UserError: vocab_size below 257, or no text at all.
    """
    if vocab_size < 257:
        raise UserError(f"vocab size {vocab_size} is below 257, which is 256 bytes and the eos")
    words = Counter(word for text in texts for word in regex.findall(SPLIT, _well_formed(text)))
    if not words:
        raise UserError("nothing to train on: the text is empty")
    line = _lay_out(words)
    counts, places = _count_pairs(line)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapify(heap)
    ranks = {bytes([i]): i for i in range(256)}
    while heap and len(ranks) < vocab_size - 1:
        count, pair = heappop(heap)
        # Each pair is in the heap once, never with too low a count: only new pairs gain.
        if -count > counts[pair]:
            heappush(heap, (-counts[pair], pair))
        elif -count > 1:
            ranks[pair[0] + pair[1]] = len(ranks)
            for new in _merge(pair, line, counts, places):
                heappush(heap, (-counts[new], new))
    return ranks


def train_tokenizer(texts, vocab_size):
    """The tokenizer of a BPE trained on an iterable of strings. UserError: as train_bpe."""
    return from_spec({"name": "bpe", "bpe": _dump(train_bpe(texts, vocab_size))})


def _well_formed(text):
    """Lone surrogates -> U+FFFD, the way tiktoken encodes them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _lay_out(words):
    """The distinct words in one linked line, b"" between them: token, weight, left, right."""
    token, weight = [b""], [0]
    for word, count in words.items():
        data = word.encode()
        token += [bytes([byte]) for byte in data] + [b""]
        weight += [count] * len(data) + [0]
    return token, weight, list(range(-1, len(token) - 1)), list(range(1, len(token) + 1))


def _count_pairs(line):
    token, weight, _, _ = line
    counts, places = Counter(), defaultdict(list)
    for i, pair in enumerate(zip(token, token[1:])):
        if all(pair):
            counts[pair] += weight[i]
            places[pair].append(i)
    return counts, places


def _merge(pair, line, counts, places):
    """Join the pair wherever it stands, left to right; return the pairs that came to be."""
    (token, weight, left, right), (a, b), new_pairs = line, pair, set()
    for i in places.pop(pair):  # in ascending order where order matters, that is if a == b
        j = right[i]
        if (token[i], token[j]) != pair:
            continue  # another merge has taken this place
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


# ---- command line ----

def read_texts(path):
    """A file's text, or all strings in its JSON objects. UserError: names the place and fault."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            text = file.read().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: no UTF-8 at byte offset {error.start}") from None
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"can't read {path}: {_reason(error)}") from None
    if not path.removesuffix(".gz").endswith(".jsonl"):
        return [text]
    texts = []
    for n, line in enumerate(text.split("\n"), 1):
        try:
            value = json.loads(line) if line.strip() else {}
            texts += _strings(value)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{n}: bad JSON: {error}") from None
        if not isinstance(value, dict):
            raise UserError(f"{path}:{n}: not a JSON object")
    return texts


def _strings(value):
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [string for item in inner for string in _strings(item)]


def train(files, vocab_size, out):
    """Train on the files, save, and print how it went. UserError: a fault in what was given."""
    start = time.time()
    check_new(out)
    texts = [text for path in files for text in read_texts(path)]
    ranks = train_bpe(texts, vocab_size)
    seconds, tokenizer = time.time() - start, _from_ranks(out, ranks)
    n_bytes = sum(len(_well_formed(text).encode()) for text in texts)
    n_tokens = sum(len(tokenizer.encode(text)) for text in texts)
    save_bpe(ranks, out)
    print(f"vocabulary {tokenizer.vocab_size}  bytes per token {n_bytes / n_tokens:.2f}  "
          f"text {n_bytes / 1e6:.2f} MB  seconds {seconds:.1f}\nsaved {out}")


def main(argv=None):
    """The command line; returns the exit code: 0, or 1 after one sentence on stderr."""
    parser = argparse.ArgumentParser(prog="python -m data.tokenizer")
    sub = parser.add_subparsers(dest="command", required=True).add_parser("train")
    sub.add_argument("files", nargs="+", metavar="FILE", help="text or .jsonl, either also .gz")
    sub.add_argument("--vocab-size", type=int, default=4096, help="everything, eos included")
    sub.add_argument("--out", required=True, metavar="PATH", help="the BPE file; must be new")
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
