"""Records: JSONL files that a person can read in, lists of examples out, and errors one can act on.

    sft.jsonl           {"prompt": "...", "completion": "..."}
                        or  {"text": "..."}  or  {"messages": [...]}
    preferences.jsonl   {"prompt": "...", "chosen": "...", "rejected": "..."}
                        or  {"chosen": "...", "rejected": "..."}: the prompt is what both begin with
                        or  {"prompt": "...", "responses": [best, ..., worst], "ranks": [0, 1, 1, 2]}
    prompts.jsonl       {"prompt": "..."}

and NAME_val.jsonl beside each. "ranks" is optional, smaller is better, equal ranks are a tie. "gold",
also optional, holds the true score of each response where it is known; it is only reported on, never
trained on. A list of messages, {"role": "user", "content": "..."}, may stand for a "prompt",
"completion", "chosen" or "rejected"; an answer is one turn of the assistant's.
These are the column names of TRL, so files made for it work.
"""
import json
from pathlib import Path


QUESTION, ANSWER = "\n\nHuman:", "\n\nAssistant:"  # what a turn begins with in Anthropic's HH texts


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
            examples.append(parse(json_object(line)))
        except UserError as error:
            if not skip_bad:
                raise UserError(f"{path}:{number}: {error} (--skip-bad leaves such lines out)") from None
            bad += 1
    if bad:
        print(f"{path}: {bad} bad lines skipped, {len(examples)} kept")
    if not examples:
        raise UserError(f"{path}: no examples in it")
    return examples


def json_object(line):
    """A line's bytes -> dict. Raises UserError: not UTF-8, not JSON, not an object, a name stands twice."""
    try:
        row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_once)
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 at byte {error.start}")
    except RecursionError:
        raise UserError("not JSON: nested too deeply")
    except ValueError as error:  # also for a number of more than 4300 digits
        raise UserError(f"not JSON: {getattr(error, 'msg', 'a number too long')}")
    if not isinstance(row, dict):
        raise UserError("not a JSON object {...}")
    return row


def _once(pairs):
    """An object of the JSON; of a name that stands twice one value would be lost silently."""
    row = {}
    for name, value in pairs:
        if name in row:
            raise UserError(f"{name!r:.40} stands twice in one object")
        row[name] = value
    return row


def text_of(row, column):
    """A column's text; a list of messages becomes text. Raises UserError: missing, not a text."""
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
    return text_of(row, "prompt") + ANSWER * (isinstance(row["prompt"], list) and row["prompt"] != [])


def _answer(row, column):
    """A response; as a list it is one turn, and what follows "Assistant:" in the text."""
    text = text_of(row, column)
    if not isinstance(row[column], list):
        return text
    if len(row[column]) != 1:
        raise UserError(f'"{column}" needs one turn after the prompt')
    return _last(row[column])


def _chat(messages):
    """Messages as plain text, a turn as "Human: ..." or "Assistant: ...", an empty line between."""
    names = {"user": "Human", "human": "Human", "assistant": "Assistant", "system": "System"}
    turns = []
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in list(names):
            raise UserError(f'a message needs a "role" ({", ".join(names)}) and a "content"')
        if isinstance(message.get("content"), list):
            raise UserError('"content" is no string')
        turns.append(f"{names[message['role']]}: {text_of(message, 'content')}")
    return "\n\n".join(turns)


def _last(messages):
    """The last turn, as what follows "Assistant:" in the text."""
    if messages[-1]["role"] != "assistant":
        raise UserError("the last message is not the assistant's")
    if not messages[-1]["content"]:
        raise UserError("the last message is empty")
    return " " + messages[-1]["content"]


def _demonstration(row):
    if "messages" in row:
        messages = row["messages"]
        if not isinstance(messages, list) or len(messages) < 2:
            raise UserError('"messages" needs two turns or more, the last of them the completion')
        _chat(messages)  # the last turn is checked as well
        return _chat(messages[:-1]) + ANSWER, _last(messages)
    if "text" in row:
        if "completion" in row:
            raise UserError('"text" and "completion" are both there: which is meant?')
        prompt, completion = "", text_of(row, "text")
    else:
        prompt, completion = _prompt(row), _answer(row, "completion")
    if not completion:
        raise UserError("the completion is empty")
    return prompt, completion


def split(chosen, rejected):
    """(prompt, chosen, rejected) of two texts, or two lists of messages, that begin with one prompt.

    Messages: the prompt is the turns that both share. Texts with "\\n\\nAssistant:" (Anthropic's HH): it
    ends with the last of these, which both must share. Other texts: it ends before a space or newline,
    so that no word is cut; that belongs to the answers, as GPT-2's BPE wants " word". It may be empty.
    Raises UserError: the same, an answer is empty or more than one turn, no shared prompt.
    """
    if type(chosen) is not type(rejected):
        raise UserError('one of "chosen" and "rejected" is a text, the other a list')
    if chosen == rejected:
        raise UserError("two of the responses are the same")
    shorter = min(len(chosen), len(rejected))
    n = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)
    if isinstance(chosen, str):
        turns = ANSWER in chosen or ANSWER in rejected
        n = (_end_of_turns if turns else _end_of_words)(chosen, rejected, n)
        if not chosen[n:].strip() or not rejected[n:].strip():
            raise UserError("one of the answers is empty")
    return chosen[:n], chosen[n:], rejected[n:]


def _end_of_turns(chosen, rejected, n):
    """Where the last answers begin in two HH texts, of which n characters are the same."""
    for text in (chosen, rejected):
        if text.rfind(QUESTION) > text.rfind(ANSWER):
            raise UserError("the last turn is not the assistant's")
    end = chosen.rfind(ANSWER, 0, n) + len(ANSWER)
    if not chosen.rfind(ANSWER) == rejected.rfind(ANSWER) == end - len(ANSWER):
        raise UserError("chosen and rejected do not share their prompt")
    return end


def _end_of_words(chosen, rejected, n):
    """Where the prompt ends in two texts of which n characters are the same."""
    if not (chosen[n : n + 1].isspace() and rejected[n : n + 1].isspace()):
        n = max((i for i in range(n) if chosen[i].isspace()), default=0)
    return len(chosen[:n].rstrip())


def _preference(row):
    if "prompt" not in row and "chosen" in row:
        text_of(row, "chosen"), text_of(row, "rejected")  # what is wrong with them is said first
        row = row | dict(zip(("prompt", "chosen", "rejected"), split(row["chosen"], row["rejected"])))
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
