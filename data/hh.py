r"""HH: human choices between two responses of an assistant, as the JSONL files of this project.

    python -m data.hh                                       # downloads helpful-base and harmless-base
    python -m data.hh --subset helpful-online               # another subset, or several
    python -m data.hh --from FILE [FILE ...] --to DIR       # local files, or a folder of them

Source: Y. Bai et al. (2022), "Training a Helpful and Harmless Assistant with Reinforcement Learning
from Human Feedback", arXiv 2204.05862 (MIT licence). A line is {"chosen": T, "rejected": T}, each T a
whole conversation, "\n\nHuman: ...\n\nAssistant: ...", that differ in the last response. Much of it is
offensive.

sft: prompt -> the chosen response; preferences: both; prompts: each once. The _val files come from the
test files or, if only train files or only test files are given, from 5% of the conversations. Examples
whose first human turn is the same are one conversation, which is either trained on or held out.
"""
import re
import sys
from pathlib import Path

from data.convert import (
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
from data.files import UserError
from data.records import ANSWER, split, text_of
from data.split import held_out

URL = "https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main"
SUBSETS = ["helpful-base", "harmless-base", "helpful-online", "helpful-rejection-sampled"]
TARGET = Path(__file__).resolve().parent / "files" / "hh"
VAL_SHARE = 0.05


def pair(row):
    """A line's object -> (prompt, chosen, rejected). UserError: it is not such a pair."""
    prompt, chosen, rejected = split(text_of(row, "chosen"), text_of(row, "rejected"))
    if not prompt.endswith(ANSWER):
        raise UserError("the last turn is not the assistant's")
    return prompt, chosen, rejected


def conversation(prompt):
    """A conversation's key: its first human turn, ignoring case and spacing."""
    return " ".join(prompt.split(ANSWER)[0].casefold().split())


def is_val(key):
    return held_out(key, VAL_SHARE)


def is_test(path):
    return re.search(r"(?<![a-z])test(?![a-z])", path.name) is not None


def read(paths, dropped):
    """{pair: place} to train on, and the same held out."""
    train, val = {}, {}
    one_side = len({is_test(path) for path in paths}) == 1
    for path in sorted(paths, key=is_test, reverse=True):  # a pair in both kinds of file is held out
        for place, found in examples(path, pair, dropped):
            held_out = is_val(conversation(found[0])) if one_side else is_test(path)
            if found in train or found in val:
                dropped.add("duplicate pair", place)
            else:
                (val if held_out else train)[found] = place
    if one_side:
        print(f"no separate train and test files: {VAL_SHARE:.0%} of the conversations are held out")
    return train, val


def build(paths, target, choice):
    """Source files -> the six files; prints what was written and dropped. UserError: a side is empty."""
    dropped, files = Dropped(), {}
    train, val = read(paths, dropped)
    keys = {conversation(prompt) for prompt, _, _ in val}
    kept = drop_held_out(train, lambda prompt: conversation(prompt) in keys,
                         "to train, but the conversation is held out", dropped)
    dropped.report()
    for side, pairs in {".jsonl": kept, "_val.jsonl": list(val)}.items():
        if not pairs:
            raise UserError(f"too few pairs in {', '.join(map(str, paths))}")
        files["sft" + side] = objects("sft", dict.fromkeys(pair[:2] for pair in pairs))
        files["preferences" + side] = objects("preferences", pairs)
        files["prompts" + side] = prompt_objects(pairs)
    write(target, files, choice)


def fetched(subsets, folder):
    """The files of the subsets, downloaded into folder where missing."""
    names = [f"{subset}/{side}.jsonl.gz" for subset in subsets for side in ("train", "test")]
    return [download(f"{URL}/{name}", folder / name, check_lines(packed=True)) for name in names]


def given(sources, subsets):
    """The files that --from names: files, and the subsets' files in folders. UserError: a folder has none."""
    paths = []
    for source in sources:
        inside = sorted(p for p in source.rglob("*.jsonl*") if p.suffix in (".gz", ".jsonl"))
        within = Path(source.resolve().name)  # the folder itself may be a subset's, too
        found = [p for p in inside if any(subset in (within / p.relative_to(source)).parts[:-1]
                                          or p.name.startswith(subset) for subset in subsets)]
        if source.is_dir() and not found:
            raise UserError(f"{source} contains no .jsonl or .jsonl.gz file of {' or '.join(subsets)}")
        paths += found or [source]
    return paths


def main(argv=None):
    """The command line. Returns the exit code: 0, or 1 after one sentence on stderr."""
    parser = flags(__doc__, TARGET, nargs="+", action="extend", help="files or a folder (default: download)")
    parser.add_argument("--subset", nargs="+", choices=SUBSETS, default=SUBSETS[:2], metavar="SUBSET",
                        help=f"any of {', '.join(SUBSETS)} (default: the first two)")
    args = parser.parse_args(argv)

    def make(target, choice):
        raw = target.with_name(target.name + "_raw")
        build(given(args.source, args.subset) if args.source else fetched(args.subset, raw), target, choice)
    files_only = args.source and not any(source.is_dir() for source in args.source)
    return finish(make, args.to, "files" if files_only else " ".join(sorted(set(args.subset))))


if __name__ == "__main__":
    sys.exit(main())
