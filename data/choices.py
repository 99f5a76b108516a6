"""Choices: pairs in a table, or in Label Studio's JSON export, added to a folder's preferences."""
from data.convert import Dropped, objects
from data.files import UserError, atomic_file, json_line
from data.prepare import is_read
from data.records import read_preferences, read_prompts
from data.rows import Found
from data.tables import read_table

TRAIN, VAL, PROMPTS = "preferences.jsonl", "preferences_val.jsonl", "prompts.jsonl"


def read_ranked(path):
    """[(prompt, best, worst)] of a file of preferences; [] if there is no file, or nothing in it."""
    some = read_preferences(path) if path.exists() and path.read_bytes().strip() else []
    return [(prompt, responses[ranks.index(min(ranks))], responses[ranks.index(max(ranks))])
            for prompt, responses, ranks, *_ in some]


def read_choices(path):
    """A table with prompt, a, b and choice -> {(prompt, better, worse): places}. UserError: it is another."""
    found, (names, rows) = Found(), read_table(path)
    if "annotations" in names:
        names, rows = ["prompt", "a", "b", "choice"], [*studio_rows(rows)]
    found.take(path, names, rows, {})
    found.settle()
    if not found.pairs or not all(prompt for prompt, *_ in found.pairs):
        raise UserError(f"{path}: expected the columns prompt, a, b and choice, and a prompt in each row; "
                        "`python -m data.prepare` reads other tables")
    return found.pairs


def studio_rows(tasks):
    """Tasks of Label Studio whose tag Pairwise chose between two of their texts, an annotation a row."""
    for place, task in tasks:
        try:
            for annotation in task["annotations"]:
                for result in annotation["result"] if not annotation.get("was_cancelled") else ():
                    if result["type"] == "pairwise":
                        yield place, studio_choice(task["data"], result)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError(f'{place}: expected "annotations" with the result of a Pairwise tag, and in '
                            '"data" a "prompt" and two texts, named as in the tag\'s toName, or alike but '
                            "for a last 1 and 2") from None


def studio_choice(data, result):
    """One row. The two texts are named in toName, or but for a last 1 and 2 (a and b) they are named alike.
    ValueError: it is not clear which they are."""
    texts = [name for name, text in data.items() if name != "prompt" and isinstance(text, str)]
    a, b = [name for name in result.get("to_name", "").split(",") if name in texts] or sorted(texts)
    if a not in result.get("to_name", "").split(",") and a[:-1] != b[:-1]:
        raise ValueError
    return {"prompt": data["prompt"], "a": data[a], "b": data[b], "choice": result["value"]["selected"]}


def add_choices(pairs, folder):
    """Add pairs to the preferences in a folder, those of every tenth new prompt to the held-out ones. A
    prompt that is there, but for blanks around it, keeps them and its side, and a pair that is there is not
    added again."""
    there, dropped = {name: read_ranked(folder / name) for name in (TRAIN, VAL)}, Dropped()
    asked = read_prompts(folder / PROMPTS) if (folder / PROMPTS).exists() else []
    asked += [prompt for some in there.values() for prompt, *_ in some]
    spelled = {prompt.strip(): prompt for prompt in asked} | {prompt: prompt for prompt in asked}
    pairs = [(spelled.get(prompt) or spelled.get(prompt.strip(), prompt), *texts) for prompt, *texts in pairs]
    side = {prompt: name for name, some in there.items() for prompt, *_ in some}
    fresh = dict.fromkeys(prompt for prompt, *_ in pairs if prompt not in side)
    side |= {prompt: VAL if i % 10 == 9 else TRAIN for i, prompt in enumerate(fresh)}
    for name, known in there.items():
        known = set(known)
        rows = objects("preferences", [x for x in pairs if side[x[0]] == name and x not in known])
        rows = [row for row in rows if is_read(row, "preferences", dropped)]
        if rows:
            path = (folder / name).resolve()
            old = path.read_bytes() if path.exists() else b""
            with atomic_file(path) as file:
                file.write(old + b"\n" * (old[-1:] not in (b"", b"\n")) + b"".join(map(json_line, rows)))
        print(f"{folder / name}: {len(rows)} lines added to {len(known)}")
    dropped.report()
