"""Records: JSONL files in, lists of examples out; an error names the file and the line.

    sft.jsonl           {"prompt": "...", "completion": "..."}
                        or  {"text": "..."}  or  {"messages": [...]}
    preferences.jsonl   {"prompt": "...", "chosen": "...", "rejected": "..."}
                        or  {"chosen": "...", "rejected": "..."}: the prompt is their common prefix
                        or  {"prompt": "...", "responses": [best, ..., worst], "ranks": [0, 1, 1, 2]}
    prompts.jsonl       {"prompt": "..."}

and NAME_val.jsonl beside each. "ranks" is optional: smaller is better, equal ranks are ties. "gold",
also optional, holds each response's true score where it is known; it is only reported, never trained
on. A "prompt", "completion", "chosen" or "rejected" may also be a list of messages,
{"role": "user", "content": "..."}; a response is then a single assistant turn.
The column names are TRL's, so its files work here.
"""
from pathlib import Path

from data.files import UserError, json_object

QUESTION, ANSWER = "\n\nHuman:", "\n\nAssistant:"  # how a turn begins in Anthropic's HH texts


def read_sft(path, skip_bad=False):
    """[(prompt, completion)]; the prompt of {"text": ...} is empty."""
    return _read(path, _demonstration, skip_bad)


def read_preferences(path, skip_bad=False):
    """[(prompt, responses, ranks, gold)]: at least two responses; smaller ranks are better; gold is a list
    or None."""
    return _read(path, _preference, skip_bad)


def read_prompts(path, skip_bad=False):
    """[prompt]"""
    return _read(path, _prompt, skip_bad)


def _read(path, parse, skip_bad):
    """[parse(object)] of a JSONL file. UserError: unreadable, no examples, or a bad line without skip_bad."""
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    examples, bad = [], 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            examples.append(parse(json_object(line)))
        except UserError as error:
            if not skip_bad:
                raise UserError(f"{path}:{number}: {error} (--skip-bad skips such lines)") from None
            bad += 1
    if bad:
        print(f"{path}: {bad} bad lines skipped, {len(examples)} kept")
    if not examples:
        raise UserError(f"{path}: no examples")
    return examples


def text_of(row, column):
    """A column's text; a list of messages is rendered as text. UserError: missing, or not a string."""
    if column not in row:
        raise UserError(f'column "{column}" is missing')
    if isinstance(row[column], list):
        return _chat(row[column])
    if not isinstance(row[column], str):
        raise UserError(f'"{column}" must be a string')
    try:
        row[column].encode()
    except UnicodeEncodeError:
        raise UserError(f'"{column}" contains a lone surrogate') from None
    return row[column]


def _prompt(row):
    """A non-empty list of messages is a conversation, so it ends with the cue for the assistant."""
    return text_of(row, "prompt") + ANSWER * (isinstance(row["prompt"], list) and row["prompt"] != [])


def _response(row, column):
    """A response; as a list it is one turn, of which the text after "Assistant:" is returned."""
    text = text_of(row, column)
    if not isinstance(row[column], list):
        return text
    if len(row[column]) != 1:
        raise UserError(f'"{column}" must have exactly one turn after the prompt')
    return _last(row[column])


def _chat(messages):
    """Messages as plain text: "Human: ..." or "Assistant: ..." turns with an empty line between."""
    names = {"user": "Human", "human": "Human", "assistant": "Assistant", "system": "System"}
    turns = []
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in list(names):
            raise UserError(f'a message needs a "role" ({", ".join(names)}) and "content"')
        if isinstance(message.get("content"), list):
            raise UserError('"content" must be a string')
        turns.append(f"{names[message['role']]}: {text_of(message, 'content')}")
    return "\n\n".join(turns)


def _last(messages):
    """The last turn: the text after "Assistant:". UserError: not the assistant's, or empty."""
    if messages[-1]["role"] != "assistant":
        raise UserError("the last message is not the assistant's")
    if not messages[-1]["content"]:
        raise UserError("the last message is empty")
    return " " + messages[-1]["content"]


def _demonstration(row):
    if "messages" in row:
        messages = row["messages"]
        if not isinstance(messages, list) or len(messages) < 2:
            raise UserError('"messages" needs at least two turns; the last is the completion')
        _chat(messages)  # checks the last turn, too
        return _chat(messages[:-1]) + ANSWER, _last(messages)
    if "text" in row:
        if "completion" in row:
            raise UserError('give "text" or "completion", not both')
        prompt, completion = "", text_of(row, "text")
    else:
        prompt, completion = _prompt(row), _response(row, "completion")
    if not completion:
        raise UserError("the completion is empty")
    return prompt, completion


def split(chosen, rejected):
    """Two texts, or two lists of messages, with a common prompt -> (prompt, chosen, rejected).

    Messages: the prompt is the turns they share. Texts with "\\n\\nAssistant:" (Anthropic's HH): the prompt
    ends with the last of these, which they must share. Other texts: it ends before whitespace, so no word
    is split; the whitespace belongs to the responses, as GPT-2's BPE expects " word". It may be empty.
    UserError: identical responses, an empty response, or no common prompt.
    """
    if type(chosen) is not type(rejected):
        raise UserError('"chosen" and "rejected" must both be strings or both be lists')
    if chosen == rejected:
        raise UserError("two responses are identical")
    shorter = min(len(chosen), len(rejected))
    n = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)
    if isinstance(chosen, str):
        turns = ANSWER in chosen or ANSWER in rejected
        n = (_end_of_turns if turns else _end_of_words)(chosen, rejected, n)
        if not chosen[n:].strip() or not rejected[n:].strip():
            raise UserError("a response is empty")
    return chosen[:n], chosen[n:], rejected[n:]


def _end_of_turns(chosen, rejected, n):
    """Where the last responses begin in two HH texts whose first n characters are the same."""
    for text in (chosen, rejected):
        if text.rfind(QUESTION) > text.rfind(ANSWER):
            raise UserError("the last turn is not the assistant's")
    end = chosen.rfind(ANSWER, 0, n) + len(ANSWER)
    if not chosen.rfind(ANSWER) == rejected.rfind(ANSWER) == end - len(ANSWER):
        raise UserError('"chosen" and "rejected" do not share a prompt')
    return end


def _end_of_words(chosen, rejected, n):
    """Where the prompt ends in two texts whose first n characters are the same."""
    if not (chosen[n : n + 1].isspace() and rejected[n : n + 1].isspace()):
        n = max((i for i in range(n) if chosen[i].isspace()), default=0)
    return len(chosen[:n].rstrip())


def _preference(row):
    if "prompt" not in row and "chosen" in row:
        text_of(row, "chosen"), text_of(row, "rejected")  # report faults in the columns themselves first
        prompt, chosen, rejected = split(row["chosen"], row["rejected"])
        row = row | {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    prompt = _prompt(row)
    if "responses" not in row:
        responses = [_response(row, "chosen"), _response(row, "rejected")]
    elif isinstance(row["responses"], list):
        responses = [_response({"responses": response}, "responses") for response in row["responses"]]
    else:
        raise UserError('"responses" must be a list')
    ranks = _numbers(row, "ranks", len(responses)) if "ranks" in row else list(range(len(responses)))
    gold = _numbers(row, "gold", len(responses)) if "gold" in row else None
    if len(set(ranks)) < 2:
        raise UserError("no response is ranked above another")
    if len(set(responses)) < len(responses):
        raise UserError("two responses are identical")
    return prompt, responses, ranks, gold


def _numbers(row, column, n):
    """The column's list of n numbers, each finite in float32. UserError: it is not that."""
    numbers = row[column]
    if not (isinstance(numbers, list) and all(type(x) in (int, float) and abs(x) < 1e38 for x in numbers)):
        raise UserError(f'"{column}" must be a list of finite numbers')
    if len(numbers) != n:
        raise UserError(f'"{column}" has {len(numbers)} numbers for {n} responses')
    return numbers
