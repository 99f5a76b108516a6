"""Examples: records as token rows. Truncates, drops, counts, pads and masks, the same way for every stage.

    demonstration   (prompt, completion)  -> (tokens, P): prompt, completion, eos; P prompt tokens
    ranking         (prompt, responses)   -> Ranking: a row of prompt, response, eos for each response
    prompt          prompt                -> tokens

Prompt and response are encoded apart, so no BPE merge crosses the border. Rows are padded on the right
with zeros, which stand for nothing: every row carries its own length.
"""
from pathlib import Path
from typing import NamedTuple

import torch

from data import stories
from data.arrays import Lazy, Records, fitted
from data.files import UserError
from data.records import read_prompts
from data.split import read_split


def open_data(name):
    """A folder of JSONL files, and the module that knows their true scores, if there is one.

    "stories" is the built-in data set, generated at the first run. Returns (Path, data.stories) for it and
    (Path, None) for a folder of the user's. UserError: no such folder.
    """
    if name == "stories":
        return stories.make(), stories
    if not Path(name).is_dir():
        raise UserError(f"--data {name}: no such folder")
    return Path(name), None


class Ranking(NamedTuple):
    """One prompt with its responses: `rows` are the token lists of prompt, response, eos."""

    prompt: list
    rows: list
    ranks: list  # smaller is better
    texts: tuple  # (prompt, responses) as they were written
    gold: list | None  # true scores where they are known
    ratings: list | None = None  # to be learned


def encode_demonstrations(examples, tokenizer, room, name):
    """[(prompt, completion)] -> [(tokens, P)] of at most `room` tokens. UserError: nothing fits."""
    return _encode(examples, lambda example: (example[0], [example[1]]), tokenizer, room, name,
                   lambda i, P, rows: (rows[0], P))


def encode_rankings(examples, tokenizer, room, name):
    """[(prompt, responses, ranks, gold, ratings)] -> [Ranking], rows of at most `room` tokens. UserError:
    none fits."""
    parted = getattr(examples, "parted", lambda i: (tuple(examples[i][:2]), examples[i][2:]))

    def ranking(i, P, rows):
        texts, (ranks, *others) = parted(i)
        return Ranking(rows[0][:P], rows, ranks, texts, *others)

    return _encode(examples, lambda example: example[:2], tokenizer, room, name, ranking)


def row_sizes(made):
    """[[tokens of each row]] of Rankings or demonstrations, without making those that are not made yet."""
    return made.lengths() if isinstance(made, Lazy) else [
        [*map(len, one.rows if isinstance(one, Ranking) else one[:1])] for one in made]


def standardise(groups):
    """The groups with ratings of mean 0 and standard deviation 1, each different response counting once;
    without any if all are equal."""
    if isinstance(groups, Lazy) and not groups.rated:
        return groups
    known = {(group.texts[0], text): x for group in groups if group.ratings
             for text, x in zip(group.texts[1], group.ratings, strict=True)}
    known = torch.tensor([*known.values()], dtype=torch.float64)
    if not len(known) or known.max() == known.min():
        return [group._replace(ratings=None) for group in groups]
    mean, sd = known.mean().item(), known.std(correction=0).item()
    return [group._replace(ratings=group.ratings and [(x - mean) / sd for x in group.ratings])
            for group in groups]


def encode_prompts(prompts, tokenizer, room, name):
    """[prompt] -> token lists of at most `room` tokens."""
    return _encode(prompts, lambda prompt: (prompt, []), tokenizer, room, name, lambda i, P, rows: rows[0])


def open_prompts(folder, tokenizer, room, cfg):
    """Token lists of prompts.jsonl and the first cfg.eval_prompts of prompts_val.jsonl, each of at most
    `room` tokens."""
    train, val = read_split(read_prompts, folder / "prompts.jsonl", cfg)
    return (encode_prompts(train, tokenizer, room, "prompts.jsonl"),
            encode_prompts(val[: cfg.eval_prompts], tokenizer, room, "prompts_val.jsonl"))


def encode_prompt(prompt, tokenizer):
    """A prompt's tokens; an empty one becomes eos, as GPT-2's documents begin."""
    return tokenizer.encode(prompt) or [tokenizer.eos]


def fit(prompt, responses, tokenizer, room):
    """Prompt tokens, responses' tokens with eos, and how many tokens the prompt lost.

    A prompt that is too long is truncated from the left, alike for all its responses. None: a response alone
    leaves no room for a prompt.
    """
    prompt = encode_prompt(prompt, tokenizer)
    responses = [tokenizer.encode(response) + [tokenizer.eos] for response in responses]
    left = room - max(map(len, responses), default=0)
    return (prompt[-left:], responses, max(0, len(prompt) - left)) if left >= 1 else None


def prompt_room(room, max_new_tokens):
    """Tokens of the longest prompt that `max_new_tokens` can follow within `room`. UserError: none can."""
    if room <= max_new_tokens:
        raise UserError(f"--max-new-tokens {max_new_tokens} leaves no room for a prompt in the model's "
                        f"{room} tokens")
    return room - max_new_tokens


def _encode(examples, parts, tokenizer, room, name, made_of):
    """made_of(index, P, rows) of each example that fits; parts(example) is its (prompt, responses). What is
    dropped and truncated is counted and printed. Of Records the rows are arrays, made when asked for."""
    found = fitted(examples, tokenizer, room) if isinstance(examples, Records) else None
    made, truncated = found or _fit_all(map(parts, examples), tokenizer, room)
    if truncated or len(made) < len(examples):
        print(f"{name}: of {len(examples)} examples, {truncated} prompts truncated from the left and "
              f"{len(examples) - len(made)} dropped for a response that does not fit into {room} tokens")
    if not made:
        raise UserError(f"{name}: no example fits into {room} tokens")
    return made.map(made_of) if found else [made_of(*one) for one in made]


def _fit_all(examples, tokenizer, room):
    """(prompt, responses) -> [(index, P, rows)] of those that fit, and how many prompts were truncated."""
    made, truncated = [], 0
    for i, example in enumerate(examples):
        if fitted := fit(*example, tokenizer, room):
            prompt, responses, lost = fitted
            made.append((i, len(prompt), [prompt + response for response in responses] or [prompt]))
            truncated += lost > 0
    return made, truncated


def pad(rows, device="cpu"):
    """Lists or arrays of token ids -> tokens (B,T) padded with 0 on the right, lengths (B,)."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for row, to in zip(rows, tokens.numpy(), strict=True):
        to[: len(row)] = row
    return tokens.to(device), lengths.to(device)


def response_mask(lengths, P, T):
    """Whole lengths and prompt lengths (B,) -> (B,T-1): True where token t+1 belongs to the response."""
    position = torch.arange(1, T, device=lengths.device)
    return (position >= P[:, None]) & (position < lengths[:, None])
