"""What several test files share: tiny models, token rows, JSONL files, smallest settings of each script."""
import json
import random
from pathlib import Path

import torch

from data.tokenizer import get_tokenizer
from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
BYTES = get_tokenizer("bytes")
TINY = {"vocab_size": 17, "block_size": 64, "n_layer": 2, "n_head": 4, "d_model": 32}  # a GPTConfig

# the smallest settings with which the scripts do all of their work in a second or less
SIZES = {"tokenizer": "bytes", "n_layer": 1, "n_head": 2, "d_model": 32, "block_size": 32,
         "batch_tokens": 512, "dropout": 0.0, "lr": 4e-3, "device": "cpu"}
PPO = {"updates": 3, "batch": 8, "max_new_tokens": 8, "epochs": 2, "minibatches": 2, "micro_batch": 256,
       "device": "cpu"}


# ---- files ----

def jsonl(path, rows):
    """Write `rows`, one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def lines(path):
    """The JSON objects in a file, one a line."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps(path):
    """The lines of a log that belong to a step: neither the config nor a report."""
    return [line for line in lines(path) if "step" in line]


def make_data(folder, letters="abc", n=64, seed=0):
    """Prompts "x:" with words of a few letters, in which more of the letter a is better."""
    rng = random.Random(seed)

    def word():
        return "".join(rng.choice(letters) for _ in range(rng.randint(3, 6)))

    def prompt():
        return "".join(rng.choice("xyz") for _ in range(rng.randint(1, 3))) + ":"

    folder.mkdir(parents=True, exist_ok=True)
    for name, size in (("", n), ("_val", 8)):
        jsonl(folder / f"sft{name}.jsonl", [{"prompt": prompt(), "completion": word()} for _ in range(size)])
        jsonl(folder / f"prompts{name}.jsonl", [{"prompt": prompt()} for _ in range(size)])
        rows = []
        while len(rows) < size:
            responses = sorted({word(), word(), word()}, key=lambda text: (-text.count("a"), text))
            if len(responses) > 1:
                rows.append({"prompt": prompt(), "responses": responses})
        jsonl(folder / f"preferences{name}.jsonl", rows)


# ---- models and tokens ----

def gen(seed):
    return torch.Generator().manual_seed(seed)


def gpt_config(V, T, L, H, C, dropout=0.0):
    """A GPTConfig in few letters."""
    return GPTConfig(vocab_size=V, block_size=T, n_layer=L, n_head=H, d_model=C, dropout=dropout)


def tiny_gpt(seed=0, std=0.3, **other):
    """A GPT of TINY sizes in eval mode, its matrices drawn with `std` (None: as they start)."""
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig(**TINY | other))
    for p in gpt.parameters():
        if std and p.dim() > 1:
            torch.nn.init.normal_(p, std=std)
    return gpt.eval()


def padded(rows, fill=0):
    """Token lists -> tokens (B,T), lengths (B,), as data.examples.pad, but with any padding."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.full((len(rows), int(lengths.max())), fill)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    return tokens, lengths


def same_weights(a, b):
    """Whether two models hold the same parameters, bit for bit."""
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
