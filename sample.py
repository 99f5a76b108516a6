"""Talk to a checkpoint: print continuations, and their scores when a reward model is given.

    python sample.py --ckpt out/ppo.pt --reward out/rm.pt "Tell a story about a fox and a lantern."
    python sample.py --ckpt out/sft.pt --reward out/rm.pt --best-of 16 "Tell a story about ..."
    python sample.py --ckpt out/ppo.pt            # no prompt: a small chat loop; an empty line ends it
"""
import argparse
import sys

import torch

from data.examples import encode_prompt, pad
from data.files import UserError
from lib.common import load, load_tokenizer, pick_device
from lib.fast import prepare
from lib.generate import generate
from lib.rewards import load_reward_model
from model import GPT


@torch.inference_mode()
def respond(gpt, tokenizer, prompt, args, generator):
    """args.n responses to one prompt: tokens (n,T), lengths (n,), prompt length P."""
    row = encode_prompt(prompt, tokenizer)
    room = gpt.config.block_size - len(row)
    if room < 1:
        raise UserError(f"the prompt has {len(row)} tokens, and the model takes "
                        f"{gpt.config.block_size} with the response")
    tokens, lengths = pad([row] * (args.best_of or args.n), gpt.lm_head.weight.device)
    tokens, lengths = generate(gpt, tokens, lengths, min(room, args.max_new_tokens), args.temperature,
                               args.top_k, args.top_p, tokenizer.eos, generator)
    return tokens, lengths, len(row)


def score(rm, tokens, lengths):
    """(n,) scores; a response that leaves no room for the reward token is truncated by one token."""
    with torch.inference_mode():
        return rm.score(tokens[:, : rm.room], lengths.clamp(max=rm.room))


def answer(prompt, gpt, rm, tokenizer, args, generator):
    """Print the responses to one prompt, best score first; with --best-of only the best."""
    tokens, lengths, P = respond(gpt, tokenizer, prompt, args, generator)
    scores = score(rm, tokens, lengths) if rm else torch.zeros(len(tokens))
    order = scores.argsort(descending=True).tolist() if rm else range(len(tokens))
    if args.best_of:
        print(f"[best of {args.best_of}; scores {scores.min():.2f} to {scores.max():.2f}, "
              f"mean {scores.mean():.2f}]")
        order = order[:1]
    for i in order:
        ended = "" if tokens[i, lengths[i] - 1] == tokenizer.eos else " [...]"
        mark = f"[{scores[i]:+.2f}]" if rm else ">>"
        print(f"{mark}{tokenizer.decode(tokens[i, P : lengths[i]].tolist())}{ended}\n")


def read_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", help="text to continue; without it a chat loop")
    parser.add_argument("--ckpt", default="out/ppo.pt", help="language model (default %(default)s)")
    parser.add_argument("--reward", help="reward model that scores each response, e.g. out/rm.pt")
    parser.add_argument("--n", type=int, default=3, help="responses to print (default %(default)s)")
    parser.add_argument("--best-of", type=int, default=0,
                        help="sample this many, print the one with the best score")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 = greedy (default 1)")
    parser.add_argument("--top-k", type=int, help="sample from the k likeliest tokens only")
    parser.add_argument("--top-p", type=float,
                        help="sample from the likeliest tokens that make up this probability")
    parser.add_argument("--max-new-tokens", type=int, default=200,
                        help="longest response (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the samples (default %(default)s)")
    parser.add_argument("--device", default="auto", help='"cuda", "mps" or "cpu"')
    return parser.parse_args()


def check(args):
    """Numbers that make no sense are the user's mistake, not a traceback."""
    if args.best_of and not args.reward:
        raise UserError("--best-of needs a reward model: --reward out/rm.pt")
    if not (1 <= args.n <= 10**6 and args.max_new_tokens >= 1 and 0 <= args.best_of <= 10**6
            and 0 <= args.seed < 2**63):
        raise UserError("--n and --max-new-tokens start at 1, --best-of and --seed at 0; --n and --best-of "
                        "end at 1000000")
    if args.temperature and not 1e-3 <= args.temperature <= 1e3:  # not: for nan
        raise UserError("--temperature must be 0, or between 0.001 and 1000")
    k, p = args.top_k, args.top_p
    if (k is not None and k < 1) or (p is not None and not 0 < p <= 1):
        raise UserError("--top-k starts at 1, and --top-p must be above 0 and at most 1")


def prompts(args):
    """The prompt of the command line, or what is typed, line by line."""
    if args.prompt is not None:
        yield args.prompt
        return
    while line := input("> ").strip():
        yield line


def main(args):
    check(args)
    device = pick_device(args.device)
    gpt, tokenizer, rm = load(GPT, args.ckpt), load_tokenizer(args.ckpt), None
    if args.reward:
        rm = prepare(load_reward_model(args.reward, gpt, tokenizer), device)
    prepare(gpt, device)
    generator = torch.Generator(device).manual_seed(args.seed)
    for prompt in prompts(args):
        answer(prompt, gpt, rm, tokenizer, args, generator)


if __name__ == "__main__":
    try:
        main(read_args())
    except (UserError, OSError) as error:
        sys.exit(f"sample.py: {error}")
    except (EOFError, KeyboardInterrupt):
        print()
