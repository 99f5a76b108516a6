r"""HH: people's choices between two answers of an assistant, as the JSONL files of this project.

    python -m data.hh                                       # downloads helpful-base and harmless-base
    python -m data.hh --subset helpful-online               # another part, or several
    python -m data.hh --from FILE [FILE ...] --to DIR       # files that are here, or a folder of them

Source: Y. Bai et al. (2022), "Training a Helpful and Harmless Assistant with Reinforcement Learning
from Human Feedback", arXiv 2204.05862 (MIT licence). A line is {"chosen": T, "rejected": T}, T a whole
conversation, "\n\nHuman: ...\n\nAssistant: ...", and the last answers differ. Much of it is offensive.

sft: prompt -> the better answer; preferences: both; prompts: each once. The _val twins are the test
files; of files of one side only, 5% of the conversations. What begins with the same words of the
human's is one conversation, and on one side only.
"""
import argparse
import hashlib
import re
import sys
from pathlib import Path

from data.convert import LeftOut, check_lines, examples, finish, write
from data.download import download
from data.records import ANSWER, UserError, split, text_of

URL = "https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main"
SUBSETS = ["helpful-base", "harmless-base", "helpful-online", "helpful-rejection-sampled"]
TARGET = Path(__file__).resolve().parent / "files" / "hh"
VAL_SHARE = 0.05


def pair(row):
    """(prompt, chosen, rejected) of a line. UserError: it is no such pair."""
    prompt, chosen, rejected = split(text_of(row, "chosen"), text_of(row, "rejected"))
    if not prompt.endswith(ANSWER):
        raise UserError("the last turn is not the assistant's")
    return prompt, chosen, rejected


def conversation(prompt):
    """What the human says first, its name; case and spaces do not count."""
    return " ".join(prompt.split(ANSWER)[0].casefold().split())


def is_val(name):
    return int(hashlib.sha256(name.encode()).hexdigest()[:12], 16) / 16**12 < VAL_SHARE


def is_test(path):
    return re.search(r"(?<![a-z])test(?![a-z])", path.name) is not None


def read(paths, left_out):
    """{pair: its place} to train on, and the same held out."""
    train, val = {}, {}
    one_side = len({is_test(path) for path in paths}) == 1
    for path in sorted(paths, key=is_test, reverse=True):  # a pair on both sides is a test pair
        for place, found in examples(path, pair, left_out):
            held_out = is_val(conversation(found[0])) if one_side else is_test(path)
            if found in train or found in val:
                left_out.add("a pair that occurs twice", place)
            else:
                (val if held_out else train)[found] = place
    if one_side:
        print(f"files of one side only: {VAL_SHARE:.0%} of the conversations are held out")
    return train, val


def apart(train, val, left_out):
    """The pairs of train whose conversation is not in val."""
    names, kept = {conversation(prompt) for prompt, _, _ in val}, []
    for found, place in train.items():
        if conversation(found[0]) in names:
            left_out.add("to train, but the conversation is held out", place)
        else:
            kept.append(found)
    return kept


def build(paths, target, choice):
    """Source files -> the six files; prints what was written and left out."""
    left_out = LeftOut()
    train, val = read(paths, left_out)
    sides = {".jsonl": apart(train, val, left_out), "_val.jsonl": list(val)}
    left_out.report()
    files = {}
    for side, pairs in sides.items():
        if not pairs:
            raise UserError(f"too few pairs in {', '.join(map(str, paths))}")
        files["sft" + side] = [{"prompt": prompt, "completion": chosen}
                               for prompt, chosen in dict.fromkeys(pair[:2] for pair in pairs)]
        files["preferences" + side] = [dict(zip(("prompt", "chosen", "rejected"), pair)) for pair in pairs]
        files["prompts" + side] = [{"prompt": prompt} for prompt in dict.fromkeys(p for p, _, _ in pairs)]
    write(target, files, choice)


def fetched(subsets, folder):
    """The files of the subsets, downloaded into folder unless they are there."""
    names = [f"{subset}/{side}.jsonl.gz" for subset in subsets for side in ("train", "test")]
    return [download(f"{URL}/{name}", folder / name, check_lines(packed=True)) for name in names]


def given(sources, subsets):
    """The files meant by --from: files as they are, of a folder those of the subsets."""
    paths = []
    for source in sources:
        inside = sorted(p for p in source.rglob("*.jsonl*") if p.suffix in (".gz", ".jsonl"))
        within = Path(source.resolve().name)  # a folder may be named after its subset, too
        found = [p for p in inside if any(subset in (within / p.relative_to(source)).parts[:-1]
                                          or p.name.startswith(subset) for subset in subsets)]
        if source.is_dir() and not found:
            raise UserError(f"{source} holds no .jsonl or .jsonl.gz file of {' or '.join(subsets)}")
        paths += found or [source]
    return paths


def main(argv=None):
    """The command line; returns the exit code: 0, or 1 after one sentence on stderr."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--from", dest="source", type=Path, nargs="+", action="extend",
                        help="files or a folder; else download")
    parser.add_argument("--to", type=Path, default=TARGET, help="default: %(default)s")
    parser.add_argument("--subset", nargs="+", choices=SUBSETS, default=SUBSETS[:2], metavar="SUBSET",
                        help=f"of {', '.join(SUBSETS)} (default: the first two)")
    args = parser.parse_args(argv)

    def make(target, choice):
        raw = target.with_name(target.name + "_raw")
        build(given(args.source, args.subset) if args.source else fetched(args.subset, raw), target, choice)
    given_files = args.source and not any(source.is_dir() for source in args.source)
    return finish(make, args.to, "files" if given_files else " ".join(sorted(set(args.subset))))


if __name__ == "__main__":
    sys.exit(main())
