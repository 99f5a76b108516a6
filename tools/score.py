"""Score: a reward model's scores of pairs, lists, or prompts with responses.

    python -m tools.score --rm out/rm.pt FILE.jsonl --out scores.jsonl    # without --out: the summary only

A line is one of preferences.jsonl or of sft.jsonl, or has "prompt" and "response", as those of
out/ppo.samples.jsonl. It is written as it was, with "scores" in the order of its responses (of "chosen" and
"rejected", or of "responses"), or with "score" if there is one. Each response is read with an end-of-text
token after it; where it does not fit into the model, the score is null. If responses are ranked, the accuracy
is printed: the share of pairs whose better response scores higher, equal scores counting half; where lines
have a "subset", a name, also for each of these.
"""
import argparse
import itertools
from collections import defaultdict
from pathlib import Path

import torch

from data.examples import fit
from data.files import check_new, printable
from data.records import read_responses
from lib.checkpoint import load, load_tokenizer, write, write_lines
from lib.fast import prepare
from lib.flags import one_sentence, pick_device
from lib.output import make_harmless
from lib.report import accuracy, half_width
from lib.rewards import score_rows
from model import RewardModel

REMEDY = "Try a smaller --batch-tokens"


def score_all(rm, tokenizer, found, budget, device):
    """For each (line, prompt, responses, ranks) the list of its scores, None where they do not fit."""
    fitted = [fit(prompt, responses, tokenizer, rm.room) for _, prompt, responses, _ in found]
    rows = [[some[0] + response for response in some[1]] if some else [] for some in fitted]
    flat = list(itertools.chain.from_iterable(rows))
    scores = iter(score_rows(rm, flat, budget, device).tolist() if flat else [])
    return [list(itertools.islice(scores, len(some))) or None for some in rows]


def pair_gaps(scores, ranks):
    """better - worse for each pair that the ranks order."""
    pairs = itertools.permutations(range(len(ranks)), 2)
    return [scores[i] - scores[j] for i, j in pairs if ranks[i] < ranks[j]]


def describe(ranked):
    """The accuracy on all pairs of [(line, prompt, responses, ranks, scores)], and its interval, in words."""
    gaps = [gap for *_, ranks, scores in ranked for gap in pair_gaps(scores, ranks)]
    texts = {(prompt, text) for _, prompt, responses, *_ in ranked for text in responses}
    right = accuracy(torch.tensor(gaps)).mean().item()
    half = half_width(right, len(gaps), len(texts))
    return f"{right:.1%} +- {half:.1%} (95%) on {len(gaps)} pairs of {len(texts)} texts"


def main(args):
    if args.out:
        check_new(args.out)
    device = pick_device(args.device)
    rm, tokenizer = prepare(load(RewardModel, args.rm), device), load_tokenizer(args.rm)
    found = read_responses(args.file, args.skip_bad)
    scored = score_all(rm, tokenizer, found, args.batch_tokens, device)
    if args.out:
        write(args.out, [line | ({"score": scores and scores[0]} if ranks is None else {"scores": scores})
                         for (line, *_, ranks), scores in zip(found, scored, strict=True)], save=write_lines)
        print(f"{printable(args.out)}: {len(found)} lines")
    known = torch.tensor([x for scores in scored for x in scores or ()])
    if len(known):
        print(f"{len(known)} responses scored: mean {known.mean():.3f}, sd {known.std(correction=0):.3f}, "
              f"{known.min():.2f} to {known.max():.2f}")
    if lost := scored.count(None):
        print(f"{lost} lines do not fit into the reward model's {rm.room} tokens: no score")
    ranked = [(*some, scores) for some, scores in zip(found, scored, strict=True) if some[3] and scores]
    if ranked:
        print(f"accuracy {describe(ranked)}")
    subsets = defaultdict(list)
    for some in ranked:
        subsets[some[0].get("subset")].append(some)
    for name in sorted(subsets, key=lambda name: name or "") if subsets.keys() - {None} else ():
        print(f"  {'no subset' if name is None else printable(name)}: {describe(subsets[name])}")


def read_args():
    parser = argparse.ArgumentParser(prog="python -m tools.score", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE", help="the lines to score")
    parser.add_argument("--rm", type=Path, default=Path("out/rm.pt"), help="default %(default)s")
    parser.add_argument("--out", type=Path, help="file of the scored lines; must not exist")
    parser.add_argument("--batch-tokens", type=int, default=16384,
                        help="in a forward pass (default %(default)s)")
    parser.add_argument("--device", default="auto", help='"cuda", "mps" or "cpu"')
    parser.add_argument("--skip-bad", action="store_true", help="skip malformed lines and report how many")
    return parser.parse_args()


if __name__ == "__main__":
    make_harmless()
    arguments = read_args()
    with one_sentence("tools.score", REMEDY):
        main(arguments)
