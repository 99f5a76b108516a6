"""Records: JSONL files that a person can read in, lists of examples out, and errors that a person can act on.

    sft.jsonl           {"prompt": "...", "completion": "..."}  or  {"text": "..."}  or  {"messages": [...]}
    preferences.jsonl   {"prompt": "...", "chosen": "...", "rejected": "..."}
                        or  {"prompt": "...", "responses": [best, ..., worst], "ranks": [0, 1, 1, 2]}
    prompts.jsonl       {"prompt": "..."}

and NAME_val.jsonl beside each. "ranks" is optional, smaller is better, equal ranks are a tie.
These are the column names of TRL, so files made for it work.
"""
import json
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
    """[(prompt, responses, ranks)]: two or more responses, ranks smaller = better."""
    return _read(path, _preference, skip_bad)


def read_prompts(path, skip_bad=False):
    """[prompt]"""
    return _read(path, lambda row: _text(row, "prompt"), skip_bad)


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
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"not JSON: {getattr(error, 'msg', 'nested too deeply')}")
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


def _chat(messages):
    """Messages as plain text, a turn as "Human: ..." or "Assistant: ...", an empty line between."""
    names = {"user": "Human", "human": "Human", "assistant": "Assistant", "system": "System"}
    turns = []
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in names:
            raise UserError(f'a message needs a "role" ({", ".join(names)}) and a "content"')
        turns.append(f"{names[message['role']]}: {_text(message, 'content')}")
    return "\n\n".join(turns)


def _demonstration(row):
    if "messages" in row:
        messages = row["messages"]
        if not isinstance(messages, list) or len(messages) < 2:
            raise UserError('"messages" needs two turns or more, the last of them the completion')
        _chat(messages)  # the last turn is checked as well
        return _chat(messages[:-1]) + "\n\nAssistant:", " " + messages[-1]["content"]
    prompt, completion = ("", _text(row, "text")) if "text" in row else (_text(row, "prompt"), _text(row, "completion"))
    if not completion:
        raise UserError("the completion is empty")
    return prompt, completion


def _preference(row):
    prompt = _text(row, "prompt")
    if "responses" not in row:
        responses, ranks = [_text(row, "chosen"), _text(row, "rejected")], [0, 1]
    else:
        responses = row["responses"]
        if not isinstance(responses, list) or not all(isinstance(r, str) for r in responses):
            raise UserError('"responses" is no list of strings')
        ranks = row.get("ranks", list(range(len(responses))))
        if not isinstance(ranks, list) or not all(type(r) in (int, float) and r == r for r in ranks):
            raise UserError('"ranks" is no list of numbers')
        if len(ranks) != len(responses):
            raise UserError(f"{len(responses)} responses and {len(ranks)} ranks")
        responses = [_text({"responses": r}, "responses") for r in responses]
    if len(set(ranks)) < 2:
        raise UserError("no response is better than another")
    if len(set(responses)) < len(responses):
        raise UserError("two of the responses are the same")
    return prompt, responses, ranks
