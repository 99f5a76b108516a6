"""TL;DR: Reddit posts, their writers' summaries and people's choices between two, as JSONL files.

    python -m data.tldr                                # downloads the source
    python -m data.tldr --from FILE [FILE ...] --to DIR   # files that are here, or a folder of them

Source: N. Stiennon et al. (2020), "Learning to summarize from human feedback", arXiv 2009.01325; posts
from M. Völske et al. (2017), "TL;DR: Mining Reddit to Learn Automatic Summarization".

    train.jsonl, valid.jsonl   {"subreddit", "title", "post", "summary"}
    batch3.json to 10          {"info": {"subreddit", "title", "post"}, "summaries": [{"text"}, {"text"}],
                               "choice": 0 or 1, "split": "train", "valid1" or "valid2"}, one a line

sft: prompt -> the writer's summary; prompts: each once; preferences: the two summaries. The _val twins
are of valid.jsonl and of valid1 and valid2. A post that is in any of these is dropped from training,
so that what is held out stays as its makers drew it. Comparisons of news articles are left out. What
the given files are not enough for is not made.
"""
import argparse
import re
import sys
from pathlib import Path

from data.convert import FILES, LeftOut, check_lines, examples, finish, write
from data.download import download
from data.records import UserError, text_of

URL = "https://openaipublic.blob.core.windows.net/summarize-from-feedback"
SOURCE = [f"datasets/tldr_3_filtered/{side}.jsonl" for side in ("train", "valid")] + [
    f"dataset/comparisons/batch{n}.json" for n in range(3, 11)]
TARGET = Path(__file__).resolve().parent / "files" / "tldr"
SIDES = {"train": ".jsonl", "valid": "_val.jsonl", "valid1": "_val.jsonl", "valid2": "_val.jsonl"}


def prompt_of(row):
    """The question to a post, in the form of the paper. UserError: something is missing."""
    subreddit, title, post = (text_of(row, column).strip() for column in ("subreddit", "title", "post"))
    if not post:
        raise UserError("the post is empty")
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"


def post_of(prompt):
    """Two posts with the same text below the title are one; case and spaces do not count."""
    return " ".join(prompt.split("\n\nPOST: ", 1)[1].casefold().split())


def summary_of(row, column):
    summary = text_of(row, column).strip()
    if not summary:
        raise UserError("a summary is empty")
    return " " + summary


def demonstration(row):
    """(prompt, completion)"""
    return prompt_of(row), summary_of(row, "summary")


def comparison(row):
    """(split, prompt, chosen, rejected). UserError: it is none of two summaries of a post."""
    info, summaries, choice = row.get("info"), row.get("summaries"), row.get("choice")
    if not isinstance(info, dict):
        raise UserError('"info" is no object')
    if "article" in info and "post" not in info:
        raise UserError("a news article, another kind of source")
    if not isinstance(summaries, list) or [type(summary) for summary in summaries] != [dict, dict]:
        raise UserError('"summaries" is no list of two objects')
    if type(choice) is not int or choice not in (0, 1):
        raise UserError('"choice" is not 0 or 1')
    if row.get("split") not in ("train", "valid1", "valid2"):
        raise UserError('"split" is not train, valid1 or valid2')
    texts = [summary_of(summary, "text") for summary in summaries]
    if texts[0] == texts[1]:
        raise UserError("the two summaries are the same")
    return row["split"], prompt_of(info), texts[choice], texts[1 - choice]


def read(paths, left_out):
    """{"sft.jsonl": {(prompt, completion): its place}, "preferences_val.jsonl": ..., ...}"""
    found = {name: {} for name in FILES if not name.startswith("prompts")}
    for path in paths:
        sft = path.suffix == ".jsonl"
        for place, example in examples(path, demonstration if sft else comparison, left_out):
            side, example = (path.stem, example) if sft else (example[0], example[1:])
            if found[("sft" if sft else "preferences") + SIDES[side]].setdefault(example, place) != place:
                left_out.add("an example that occurs twice", place)
    return found


def apart(found, left_out):
    """The examples without those to train on whose post is in a _val file."""
    held_out = {post_of(prompt) for name in found if "_val" in name for prompt, *_ in found[name]}
    kept = {}
    for name, some in found.items():
        kept[name] = []
        for example, place in some.items():
            if "_val" in name or post_of(example[0]) not in held_out:
                kept[name].append(example)
            else:
                left_out.add("to train, but the post is held out", place)
    return kept


def build(paths, target, choice):
    """Source files -> JSONL files; prints what was written, left out and not made."""
    left_out, files = LeftOut(), {}
    for name, some in apart(read(paths, left_out), left_out).items():
        columns = ("prompt", "completion") if "sft" in name else ("prompt", "chosen", "rejected")
        files[name] = [dict(zip(columns, example)) for example in some]
        if "sft" in name:
            prompts = dict.fromkeys(prompt for prompt, _ in some)
            files[name.replace("sft", "prompts")] = [{"prompt": prompt} for prompt in prompts]
    left_out.report()
    made = {name: files[name] for name in FILES if files[name]}
    if not made:
        raise UserError(f"no example in {', '.join(map(str, paths))}")
    write(target, made, choice)
    for name in [name for name in FILES if name not in made]:
        print(f"{target / name}: not made, there is nothing for it in the source")


def given(sources):
    """The files meant by --from. UserError: a file or folder of another kind."""
    paths = []
    for source in sources:
        inside = [source] if not source.is_dir() else sorted(source.rglob("*.json*"))
        found = [path for path in inside if re.fullmatch(r"(train|valid)\.jsonl|.*\.json", path.name)]
        if not found:
            kind = "holds" if source.is_dir() else "is"
            raise UserError(f"{source} {kind} no train.jsonl, valid.jsonl or batchN.json")
        paths += found
    return paths


def main(argv=None):
    """The command line; returns the exit code: 0, or 1 after one sentence on stderr."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--from", dest="source", type=Path, nargs="+", action="extend",
                        help="files or a folder; else download")
    parser.add_argument("--to", type=Path, default=TARGET, help="default: %(default)s")
    args = parser.parse_args(argv)

    def make(target, choice):
        raw, check = target.with_name(target.name + "_raw"), check_lines(packed=False)
        build(given(args.source) if args.source else
              [download(f"{URL}/{name}", raw / Path(name).name, check) for name in SOURCE], target, choice)
    return finish(make, args.to, "TL;DR")


if __name__ == "__main__":
    sys.exit(main())
