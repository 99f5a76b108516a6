"""Records: JSONL files in, lists of examples out; an error names the file and the line.

    sft.jsonl           {"prompt": "...", "completion": "..."}
                        or  {"text": "..."}  or  {"messages": [...]}
    preferences.jsonl   {"prompt": "...", "chosen": "...", "rejected": "..."}
                        or  {"chosen": "...", "rejected": "..."}: the prompt is their common prefix
                        or  {"prompt": "...", "responses": [best, ..., worst], "ranks": [0, 1, 1, 2]}
    prompts.jsonl       {"prompt": "..."}

and NAME_val.jsonl beside each. "ranks" is optional: smaller is better, equal ranks are ties. So are
"ratings", one number a response, larger is better: the reward model learns them beside the order; and
"gold", each response's true score where it is known: it is only reported, never trained on (without it
the ratings are reported). "subset" names a group, for tools/score.py to report on. A "prompt", "completion",
"chosen" or "rejected" may also be a list of messages, {"role": "user", "content": "..."}; a response is then
a single assistant turn. Messages become the text of Anthropic's HH, wherever they stand:
"\\n\\nHuman: ...\\n\\nAssistant: ...", and a prompt ends with "\\n\\nAssistant:". The column names are TRL's,
so its files work here.

A null is no value. Columns that contradict one another are an error, and so is one that seems to be
misspelt; what is merely unused is counted and named (data/columns.py).
"""
import json
import os
from collections import Counter
from functools import partial
from pathlib import Path

from data import columns
from data.files import Progress, UserError, json_object, printable
from data.tokenizer import check_text

QUESTION, ANSWER = "\n\nHuman:", "\n\nAssistant:"  # how a turn begins in Anthropic's HH texts
BAD = {"bad", "negative", "false", "0"}  # labels of what must not be learned
NAMES = {"user": QUESTION, "human": QUESTION, "assistant": ANSWER, "system": "\n\nSystem:"}


def read_sft(path, skip_bad=False, most=None, into=list):
    """[(prompt, completion)], the first `most` (None: all); the prompt of {"text": ...} is empty."""
    return into(_read(path, "sft", _demonstration, skip_bad, most))


def read_preferences(path, skip_bad=False, most=None, into=list):
    """[(prompt, responses, ranks, gold, ratings)], the first `most` (None: all): at least two responses;
    smaller ranks are better; the last two are lists or None."""
    return into(_read(path, "preferences", _preference, skip_bad, most))


def read_prompts(path, skip_bad=False, into=list):
    """[prompt]"""
    return into(_read(path, "prompts", _only_prompt, skip_bad))


def read_responses(path, skip_bad=False, added=("score", "scores")):
    """[(line, prompt, responses, ranks)] of sft.jsonl, preferences.jsonl, or lines with a "response"; of a
    single response the ranks are None. Columns that were `added` to it may contradict the order."""
    return list(_read(path, None, partial(_responses, added), skip_bad))


def check_line(row, kind):
    """UserError: the scripts would refuse this line of sft, preferences or prompts (`kind`)."""
    {"sft": _demonstration, "preferences": _preference, "prompts": _only_prompt}[kind](row)


def _read(path, kind, parse, skip_bad, most=None):
    """Yields parse(object) of a JSONL file. UserError: no examples, or a bad line without skip_bad."""
    kept, bad, ignored = 0, 0, Counter()
    for number, line in _lines(Path(path)):
        if not line.strip():
            continue
        if kept == most:
            break
        try:
            row = {name: value for name, value in json_object(line).items() if value is not None}
            example = parse(row)
            ignored.update(columns.ignored(row, kind) if kind else ())
        except UserError as error:
            if not skip_bad:
                raise UserError(f"{path}:{number}: {error} (--skip-bad skips such lines)") from None
            bad += 1
        else:
            kept += 1
            yield example
    if bad:
        print(f"{printable(path)}: {bad} bad lines skipped, {kept} kept")
    columns.report(path, ignored)
    if not kept:
        raise UserError(f"{path}: no examples")


def _lines(path):
    """Yields (number, line). UserError: the file can't be read."""
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # reading a pipe may never end
            raise ValueError("not a regular file")
        with open(path, "rb") as file, Progress() as progress:
            size, done = os.fstat(file.fileno()).st_size, 0
            for number, line in enumerate(file, 1):
                done += len(line)
                if number % 1000 == 0:
                    progress.share(f"reading {path.name}", done, size)
                yield number, line.removesuffix(b"\n")
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{path} can't be read: {getattr(error, 'strerror', error)}") from None


# ---- columns ----

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
        whole = 'put it into "messages"' if column == "completion" else 'drop the "prompt" column'
        hint = f"; if it is the whole conversation, {whole}" * ("prompt" in row)
        raise UserError(f'"{column}" must have exactly one turn after the prompt{hint}')
    return _last(row[column])


def _chat(messages):
    """Messages as HH text: "\\n\\nHuman: ..." and "\\n\\nAssistant: ..." turns."""
    turns = []
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in list(NAMES):
            raise UserError(f'a message needs a "role" ({", ".join(NAMES)}) and "content"')
        if isinstance(message.get("content"), list):
            raise UserError('"content" must be a string')
        turns.append(f"{NAMES[message['role']]} {text_of(message, 'content')}")
    return "".join(turns)


def _last(messages):
    """The last turn: the text after "Assistant:". UserError: not the assistant's, or empty."""
    if messages[-1]["role"] != "assistant":
        raise UserError("the last message is not the assistant's")
    if not messages[-1]["content"]:
        raise UserError("the last message is empty")
    return " " + messages[-1]["content"]


def _need(row, kind, *names):
    """UserError: one of these columns is missing."""
    for name in names:
        if name not in row:
            raise columns.missing(row, name, kind)


def _check(row, kind, prompt, responses, repeated, n=0):
    """UserError: a text can't be encoded, the responses repeat the prompt, or an unused column was meant.

    repeated: who does, and what to do; n: the number of responses whose order matters.
    """
    for text in (prompt, *responses):
        check_text(text)
    if "prompt" in row:
        columns.check_repeated(prompt, responses, repeated)
        if kind == "preferences" and "responses" not in row:
            columns.check_repeated(prompt, responses[:1], '"chosen", but not of "rejected"; remove it there')
    columns.check_order(row, n)
    if row.keys() - columns.READ[kind]:
        columns.check_names(row, kind, prompt, responses)


# ---- prompts and demonstrations ----

def _only_prompt(row):
    _need(row, "prompts", "prompt")
    check_text(prompt := _prompt(row))
    columns.check_names(row, "prompts", prompt, [""])
    return prompt


def _demonstration(row):
    label = row.get("label")
    if (label.casefold().strip() in BAD) if isinstance(label, str) else label in (False, 0.0):
        raise UserError(f'"label": {json.dumps(label)} marks a completion that must not be learned; delete '
                        "the line")
    if "messages" in row:
        prompt, completion = _conversation(row)
    elif "text" in row:
        prompt, completion = _text(row)
    else:
        _need(row, "sft", "prompt", "completion")
        prompt, completion = _prompt(row), _response(row, "completion")
    if not completion:
        raise UserError("the completion is empty")
    _check(row, "sft", prompt, [completion],
           'the completion; remove it there, or give the whole as "text" without a prompt')
    return prompt, completion


def _responses(added, row):
    """(line, prompt, responses, ranks) of `read_responses`."""
    if "response" in row:
        if twice := {"chosen", "responses", "completion"} & row.keys():
            raise UserError(f'give "response" or "{min(twice)}", not both')
        prompt, response = _prompt({"prompt": ""} | row), _response(row, "response")
        check_text(prompt + response)
        return row, prompt, [response], None
    ranked = bool({"chosen", "responses"} & row.keys())
    passed = {*added} if ranked else {*added, "label"}  # one that must not be learned has a score, too
    known = {name: value for name, value in row.items() if name not in passed}
    prompt, responses, *more = (_preference if ranked else _demonstration)(known)
    return (row, prompt, responses, more[0]) if more else (row, prompt, [responses], None)


def _text(row):
    """UserError: beside a completion, or a prompt that is not empty."""
    if not isinstance(row["text"], str):
        raise UserError('"text" must be a string')
    if "completion" in row:
        raise UserError('give "text" or "completion", not both')
    if _given(row, "prompt"):
        raise UserError('give "text" or "prompt", not both: a "text" has no prompt; for the answer to one, '
                        'rename "text" to "completion"')
    return "", text_of(row, "text")


def _conversation(row):
    """UserError: not a conversation, or it contradicts a prompt, completion or text in the same line."""
    messages = row["messages"]
    if not isinstance(messages, list) or len(messages) < 2:
        raise UserError('"messages" needs at least two turns; the last is the completion')
    _chat(messages)  # checks the last turn, too
    prompt, completion = _chat(messages[:-1]) + ANSWER, _last(messages)
    said = [message["content"].strip() for message in messages]
    if _given(row, "text"):
        raise UserError('give "messages" or "text", not both')
    if _given(row, "prompt") and not (_prompt(row) == prompt or _plain(row["prompt"]) in said[:-1]):
        raise UserError('"prompt" and "messages" contradict each other; delete one of them')
    if _given(row, "completion") and not (_response(row, "completion") == completion
                                         or _plain(row["completion"]) == said[-1]):
        raise UserError('"completion" and "messages" contradict each other; delete one of them')
    return prompt, completion


def _given(row, column):
    return row.get(column, "") not in ("", [])


def _plain(text):
    return text.strip() if isinstance(text, str) else None


# ---- preferences ----

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
    if "responses" in row:
        prompt, responses = _ranked(row)
    else:
        prompt, *responses = _pair(row)
    ranks = _numbers(row, "ranks", len(responses)) if "ranks" in row else list(range(len(responses)))
    ratings = _numbers(row, "ratings", len(responses)) if "ratings" in row else None
    gold = _numbers(row, "gold", len(responses)) if "gold" in row else ratings
    if "responses" not in row and ranks[0] >= ranks[1]:
        raise UserError('"ranks" does not put "chosen" above "rejected"; delete it, or swap the two')
    if len(set(ranks)) < 2:
        raise UserError("no response is ranked above another")
    if isinstance(row.get("subset"), list):  # which text_of takes for messages
        raise UserError('"subset" must be a string')
    text_of({"subset": ""} | row, "subset")
    if len(set(responses)) < len(responses):
        raise UserError("two responses are identical")
    if "responses" in row:
        _check_agreement(row, dict(zip(responses, ranks, strict=True)))
    repeated = "the responses; remove it there" + ', or drop the "prompt" column' * ("responses" not in row)
    _check(row, "preferences", prompt, responses, repeated, len(responses))
    return prompt, responses, ranks, gold, ratings


def _pair(row):
    """(prompt, chosen, rejected) of a line with "chosen" and "rejected"."""
    if "prompt" in row or "chosen" not in row:
        _need(row, "preferences", "prompt", "chosen", "rejected")
        return _prompt(row), _response(row, "chosen"), _response(row, "rejected")
    _need(row, "preferences", "rejected")
    text_of(row, "chosen"), text_of(row, "rejected")  # report faults in the columns themselves first
    prompt, chosen, rejected = split(row["chosen"], row["rejected"])
    return (_prompt({"prompt": prompt}), _response({"chosen": chosen}, "chosen"),
            _response({"rejected": rejected}, "rejected"))


def _ranked(row):
    """(prompt, responses) of a line with "responses"."""
    _need(row, "preferences", "prompt")
    if not isinstance(row["responses"], list):
        raise UserError('"responses" must be a list')
    return _prompt(row), [_response({"responses": response}, "responses") for response in row["responses"]]


def _check_agreement(row, rank):
    """UserError: "chosen" or "rejected" contradicts the "responses", whose {text: rank} this is."""
    best = min(rank.values())
    chosen, rejected = (_response(row, name) if name in row else None for name in ("chosen", "rejected"))
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if text is not None and text not in rank:
            raise UserError(f'"{name}" is not among the "responses"; delete one of the two columns')
    top = best if chosen is None else rank[chosen]
    if top > best if rejected is None else top >= rank[rejected]:
        raise UserError('"chosen" and "rejected" contradict the "responses" (best first, or by "ranks"); '
                        "delete what is wrong")


def _numbers(row, column, n):
    """The column's list of n numbers, each finite in float32. UserError: it is not that."""
    numbers = row[column]
    if not (isinstance(numbers, list) and all(type(x) in (int, float) and abs(x) < 1e38 for x in numbers)):
        raise UserError(f'"{column}" must be a list of finite numbers')
    if len(numbers) != n:
        raise UserError(f'"{column}" has {len(numbers)} numbers for {n} responses')
    return numbers
