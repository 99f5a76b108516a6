"""TL;DR: Reddit posts, their authors' summaries and human choices between two summaries, as JSONL files.

    python -m data.tldr                                   # downloads the source
    python -m data.tldr --from FILE [FILE ...] --to DIR   # local files, or a folder of them

Source: N. Stiennon et al. (2020), "Learning to summarize from human feedback", arXiv 2009.01325; posts
from M. Völske et al. (2017), "TL;DR: Mining Reddit to Learn Automatic Summarization".

    train.jsonl, valid.jsonl   {"subreddit", "title", "post", "summary"}
    batch3.json to 10          {"info": {"subreddit", "title", "post"}, "summaries": [{"text"}, {"text"}],
                               "choice": 0 or 1, "split": "train", "valid1" or "valid2"}, one a line

sft: prompt -> the author's summary; prompts: each once; preferences: the two summaries. The _val files
come from valid.jsonl and from valid1 and valid2. Posts in any of these are dropped from training, so the
held-out sets stay as published. Comparisons of news articles are dropped. Files for which the source has
no examples are not made.
"""
import re
import sys
from pathlib import Path

from data.convert import (
    FILES,
    Dropped,
    check_lines,
    drop_held_out,
    examples,
    finish,
    flags,
    objects,
    prompt_objects,
    write,
)
from data.download import download
from data.files import UserError, printable
from data.records import text_of

URL = "https://openaipublic.blob.core.windows.net/summarize-from-feedback"
SOURCE = [f"datasets/tldr_3_filtered/{side}.jsonl" for side in ("train", "valid")] + [
    f"dataset/comparisons/batch{n}.json" for n in range(3, 11)]
TARGET = Path(__file__).resolve().parent / "files" / "tldr"
SIDES = {"train": ".jsonl", "valid": "_val.jsonl", "valid1": "_val.jsonl", "valid2": "_val.jsonl"}


def prompt_of(row):
    """A post as a prompt, in the paper's format. UserError: a column is missing, or the post is empty."""
    subreddit, title, post = (text_of(row, column).strip() for column in ("subreddit", "title", "post"))
    if not post:
        raise UserError("the post is empty")
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"


def post_of(prompt):
    """A post's key: the text below the title, ignoring case and spacing."""
    return " ".join(prompt.split("\n\nPOST: ", 1)[1].casefold().split())


def summary_of(row, column):
    """A summary as a completion. UserError: missing or empty."""
    summary = text_of(row, column).strip()
    if not summary:
        raise UserError("a summary is empty")
    return " " + summary


def demonstration(row):
    """An object of train.jsonl or valid.jsonl -> (prompt, completion)."""
    return prompt_of(row), summary_of(row, "summary")


def comparison(row):
    """An object of a batch -> (split, prompt, chosen, rejected). UserError: not a comparison."""
    info, summaries, choice = row.get("info"), row.get("summaries"), row.get("choice")
    if not isinstance(info, dict):
        raise UserError('"info" must be an object')
    if "article" in info and "post" not in info:
        raise UserError("a news article, not a post")
    if not isinstance(summaries, list) or [type(summary) for summary in summaries] != [dict, dict]:
        raise UserError('"summaries" must be a list of two objects')
    if type(choice) is not int or choice not in (0, 1):
        raise UserError('"choice" must be 0 or 1')
    if row.get("split") not in ("train", "valid1", "valid2"):
        raise UserError('"split" must be train, valid1 or valid2')
    texts = [summary_of(summary, "text") for summary in summaries]
    if texts[0] == texts[1]:
        raise UserError("the two summaries are identical")
    return row["split"], prompt_of(info), texts[choice], texts[1 - choice]


def read(paths, dropped):
    """{"sft.jsonl": {(prompt, completion): place}, "preferences_val.jsonl": ..., ...}"""
    found = {name: {} for name in FILES if not name.startswith("prompts")}
    for path in paths:
        sft = path.suffix == ".jsonl"
        for place, example in examples(path, demonstration if sft else comparison, dropped):
            side, example = (path.stem, example) if sft else (example[0], example[1:])
            if found[("sft" if sft else "preferences") + SIDES[side]].setdefault(example, place) != place:
                dropped.add("duplicate example", place)
    return found


def apart(found, dropped):
    """{name: examples}, without training examples whose post is in a _val file."""
    keys = {post_of(prompt) for name in found if "_val" in name for prompt, *_ in found[name]}
    return {name: list(some) if "_val" in name else
            drop_held_out(some, lambda prompt: post_of(prompt) in keys,
                          "to train, but the post is held out", dropped)
            for name, some in found.items()}


def build(paths, target, choice):
    """Source files -> JSONL files; prints what was written, dropped and not made. UserError: no example."""
    dropped, files = Dropped(), {}
    for name, some in apart(read(paths, dropped), dropped).items():
        files[name] = objects("sft" if "sft" in name else "preferences", some)
        if "sft" in name:
            files[name.replace("sft", "prompts")] = prompt_objects(some)
    dropped.report()
    made = {name: files[name] for name in FILES if files[name]}
    if not made:
        raise UserError(f"no example in {', '.join(map(str, paths))}")
    write(target, made, choice)
    for name in FILES:
        if name not in made:
            print(f"{printable(target / name)}: not made, the source has nothing for it")


def given(sources):
    """The files that --from names, or its folders contain. UserError: one is not of the source."""
    paths = []
    for source in sources:
        inside = [source] if not source.is_dir() else sorted(source.rglob("*.json*"))
        found = [path for path in inside if re.fullmatch(r"(train|valid)\.jsonl|.*\.json", path.name)]
        if not found:
            kind = "contains no" if source.is_dir() else "is not"
            raise UserError(f"{source} {kind} train.jsonl, valid.jsonl or batchN.json")
        paths += found
    return paths


def main(argv=None):
    """The command line. Returns the exit code: 0, or 1 after one sentence on stderr."""
    args = flags(__doc__, TARGET, nargs="+", action="extend",
                 help="files or a folder (default: download)").parse_args(argv)

    def make(target, choice):
        raw, check = target.with_name(target.name + "_raw"), check_lines(packed=False)
        build(given(args.source) if args.source else
              [download(f"{URL}/{name}", raw / Path(name).name, check) for name in SOURCE], target, choice)
    return finish(make, args.to, "TL;DR")


if __name__ == "__main__":
    sys.exit(main())
