"""Where scores come from: a reward model, or a Python function of the user's."""
import importlib.util
from pathlib import Path

import torch

from data.examples import pad
from data.files import UserError
from lib.common import batches, load, load_tokenizer
from model import RewardModel


def load_reward_model(path, gpt, tokenizer):
    """The reward model in a checkpoint. UserError: it can't read everything that `gpt` writes."""
    rm = load(RewardModel, path)
    if load_tokenizer(path).spec() != tokenizer.spec():
        raise UserError(f"{path} was trained with another tokenizer than the language model; train it again")
    if rm.config.block_size < gpt.config.block_size:
        raise UserError(f"{path} was trained for shorter texts than the language model; train it again")
    return rm


def score_rows(rm, rows, budget, device):
    """Scores of token lists, in their order: -> (N,) on the CPU."""
    scores = torch.empty(len(rows))
    with torch.inference_mode():
        for index in batches([len(row) for row in rows], budget):
            scores[index] = rm.score(*pad([rows[i] for i in index], device)).cpu()
    return scores


def model_score(rm):
    """The reward model as a function of (tokens, lengths, P) -> (B,)."""
    return lambda tokens, lengths, P: rm.score(tokens, lengths)


def text_score(function, name, tokenizer):
    """A user's function(prompts, responses) -> list of floats as a function of (tokens, lengths, P)."""
    def score(tokens, lengths, P):
        prompts, responses = split_texts(tokens, lengths, P, tokenizer)
        result = function(prompts, responses)
        try:
            scores = torch.tensor([s + 0.0 for s in result], dtype=torch.float32)  # numpy's numbers, too
        except (TypeError, ValueError, OverflowError, RuntimeError):
            scores = torch.empty(0)
        if scores.shape != (len(prompts),) or not torch.isfinite(scores).all():
            raise UserError(f"--reward {name} must return {len(prompts)} finite numbers for "
                            f"{len(prompts)} responses; it returned {str(result)[:80]}")
        return scores.to(tokens.device)
    return score


def split_texts(tokens, lengths, P, tokenizer):
    """tokens (B,T) -> prompts, responses as texts."""
    rows = [row[:n] for row, n in zip(tokens.tolist(), lengths.tolist(), strict=True)]
    P = P.tolist()
    return ([tokenizer.decode(row[:p]) for row, p in zip(rows, P, strict=True)],
            [tokenizer.decode(row[p:]) for row, p in zip(rows, P, strict=True)])


def import_function(name):
    """The function in "FILE.py:FUNCTION". This runs the code in that file."""
    path, _, function = name.rpartition(":")
    if not (Path(path).is_file() and path.endswith(".py")):
        raise UserError(f"--reward {name}: expected FILE.py:FUNCTION, and there is no such .py file {path!r}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(vars(module).get(function)):
        raise UserError(f"--reward {name}: {path} has no function {function!r}")
    return vars(module)[function]
