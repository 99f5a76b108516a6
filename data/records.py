"""Records: JSONL files that a person can read in, lists of examples out, and errors one can act on.

    sft.jsonl           {"prompt": "...", "completion": "..."}
                        or  {"text": "..."}  or  {"messages": [...]}
    preferences.jsonl   {"prompt": "...", "chosen": "...", "rejected": "..."}
                        or  {"prompt": "...", "responses": [best, ..., worst], "ranks": [0, 1, 1, 2]}
    prompts.jsonl       {"prompt": "..."}

and NAME_val.jsonl beside each. "ranks" is optional, smaller is better, equal ranks are a tie. "gold",
also optional, holds the true score of each response where it is known; it is only reported on, never
trained on.
These are the column names of TRL, so files made for it work.
"""
import json
import math
from pathlib import Path


class UserError(ValueError):
    """A mistake in what the user gave us. Scripts print it as one sentence and exit with 1."""


def open_data(name):
    """A folder of JSONL files, and the module that knows the truth about them, if there is one.

    "stories" is the built-in data set, made at the first run. Returns (Path, data.stories) for it and
    (Path, None) for a folder of the user's. Raises UserError when there is no such folder.
    """
    if name == "stories":
        from data import stories

        return stories.make(), stories
    if not Path(name).is_dir():
        raise UserError(f"--data {name}: there is no such folder")
    return Path(name), None


def read_sft(path, skip_bad=False):
    """[(prompt, completion)]; the prompt of {"text": ...} is empty."""
    return _read(path, _demonstration, skip_bad)


def read_preferences(path, skip_bad=False):
    """[(prompt, responses, ranks, gold)]: two or more responses, ranks smaller = better, gold a list
    or None."""
    return _read(path, _preference, skip_bad)


def read_prompts(path, skip_bad=False):
    """[prompt]"""
    return _read(path, _prompt, skip_bad)


def _read(path, parse, skip_bad):
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise UserError(f"{path} is missing")
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}")
    examples, bad = [], 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            examples.append(parse(_json(line)))
        except UserError as error:
            if not skip_bad:
                raise UserError(f"{path}:{number}: {error} (--skip-bad leaves such lines out)") from None
            bad += 1
    if bad:
        print(f"{path}: {bad} bad lines skipped, {len(examples)} kept")
    if not examples:
        raise UserError(f"{path}: no examples in it")
    return examples


def _json(line):
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 at byte {error.start}")
    except RecursionError:
        raise UserError("not JSON: nested too deeply")
    except ValueError as error:  # also for a number of more than 4300 digits
        raise UserError(f"not JSON: {getattr(error, 'msg', 'a number too long')}")
    if not isinstance(row, dict):
        raise UserError("not a JSON object {...}")
    return row


def _text(row, column):
    if column not in row:
        raise UserError(f'column "{column}" is missing')
    if isinstance(row[column], list):
        return _chat(row[column])
    if not isinstance(row[column], str):
        raise UserError(f'"{column}" is no string')
    try:
        row[column].encode()
    except UnicodeEncodeError:
        raise UserError(f'"{column}" holds half a character (a lone surrogate)')
    return row[column]


def _prompt(row):
    return _text(row, "prompt") + "\n\nAssistant:" * isinstance(row["prompt"], list)


def _answer(row, column):
    """A response; as a list it is one turn, and what follows "Assistant:" in the text."""
    text = _text(row, column)
    if not isinstance(row[column], list):
        return text
    if len(row[column]) != 1:
        raise UserError(f'"{column}" needs one turn')
    return " " + row[column][0]["content"]


def _chat(messages):
    """Messages as plain text, a turn as "Human: ..." or "Assistant: ...", an empty line between."""
    names = {"user": "Human", "human": "Human", "assistant": "Assistant", "system": "System"}
    turns = []
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in list(names):
            raise UserError(f'a message needs a "role" ({", ".join(names)}) and a "content"')
        if isinstance(message.get("content"), list):
            raise UserError('"content" is no string')
        turns.append(f"{names[message['role']]}: {_text(message, 'content')}")
    return "\n\n".join(turns)


def _demonstration(row):
    if "messages" in row:
        messages = row["messages"]
        if not isinstance(messages, list) or len(messages) < 2:
            raise UserError('"messages" needs two turns or more, the last of them the completion')
        _chat(messages)  # the last turn is checked as well
        return _chat(messages[:-1]) + "\n\nAssistant:", " " + messages[-1]["content"]
    if "text" in row:
        prompt, completion = "", _text(row, "text")
    else:
        prompt, completion = _prompt(row), _answer(row, "completion")
    if not completion:
        raise UserError("the completion is empty")
    return prompt, completion


def _preference(row):
    prompt = _prompt(row)
    if "responses" not in row:
        responses = [_answer(row, "chosen"), _answer(row, "rejected")]
    elif isinstance(row["responses"], list):
        responses = [_answer({"responses": response}, "responses") for response in row["responses"]]
    else:
        raise UserError('"responses" is no list')
    ranks = _numbers(row, "ranks", len(responses)) if "ranks" in row else list(range(len(responses)))
    gold = _numbers(row, "gold", len(responses)) if "gold" in row else None
    if len(set(ranks)) < 2:
        raise UserError("no response is better than another")
    if len(set(responses)) < len(responses):
        raise UserError("two of the responses are the same")
    return prompt, responses, ranks, gold


def _numbers(row, column, n):
    numbers = row[column]
    fine = isinstance(numbers, list) and all(type(x) in (int, float) and abs(x) < 1e38 for x in numbers)
    if not fine:
        raise UserError(f'"{column}" is no list of numbers')
    if len(numbers) != n:
        raise UserError(f'{n} responses and {len(numbers)} numbers in "{column}"')
    return numbers
