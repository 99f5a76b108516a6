"""Talk to a checkpoint: print continuations, and their scores when a reward model is given.

    python sample.py --ckpt out/ppo.pt --reward out/rm.pt "Tell a story about a fox and a lantern."
    python sample.py --ckpt out/sft.pt --reward out/rm.pt --best-of 16 "Tell a story about ..."
    python sample.py --ckpt out/ppo.pt            # no prompt: line by line
    python sample.py --ckpt out/ppo.pt --prompts my_folder/prompts_val.jsonl --to answers.jsonl
    python sample.py --ckpt out/ppo.pt --tokens "Tell a story about ..."   # what each token did

Without a prompt each line that is typed is one. Ctrl-C stops an answer; Ctrl-C at the prompt, Ctrl-D or an
empty line ends the loop. A model that was trained on messages takes each line as a turn of the user and
remembers the conversation (--chat); any other continues each line as it is (--no-chat).
"""
import argparse
import math
import os
import sys
from pathlib import Path

import torch

from data.examples import encode_prompt, pad, prompt_room
from data.files import Progress, UserError, check_new
from data.records import ANSWER, QUESTION, read_prompts, text_of
from lib.checkpoint import load, load_tokenizer, write, write_lines
from lib.fast import prepare
from lib.flags import one_sentence, pick_device
from lib.generate import generate
from lib.memory import exhausted
from lib.output import make_harmless
from lib.rewards import load_reward_model
from model import GPT
from tools.tokens import encode, load_sources, show

REMEDY = "Try a smaller --n, --best-of or --max-new-tokens"


def note(text):
    """Print what the model did not say; not on stdout, which may go into a file."""
    print(text, file=sys.stderr, flush=True)


# ---- prompts and responses ----

def longest_prompt(gpt, rm, args):
    """Tokens of the longest prompt: as many as in PPO, or half of the model's where PPO would refuse."""
    room, new = min(gpt.config.block_size, rm.room if rm else math.inf), args.max_new_tokens
    return prompt_room(room, new if new < room else room // 2)


@torch.inference_mode()
def respond(gpt, tokenizer, prompt, args, generator, rm=None, chat=False):
    """args.n responses to one prompt: tokens (n,T), lengths (n,), prompt length P; chat: one turn each."""
    row, room = encode_prompt(prompt, tokenizer), longest_prompt(gpt, rm, args)
    if len(row) > room:
        note(f"the prompt has {len(row)} tokens: truncated from the left to {room}")
        row = row[-room:]
    tokens, lengths = pad([row] * (args.best_of or args.n), gpt.lm_head.weight.device)
    new = min(gpt.config.block_size - len(row), args.max_new_tokens)
    tokens, lengths = generate(gpt, tokens, lengths, new, args.temperature, args.top_k, args.top_p,
                               tokenizer.eos, generator)
    return *(one_turn(tokens, lengths, len(row), tokenizer) if chat else (tokens, lengths)), len(row)


def score(rm, tokens, lengths):
    """(n,) scores; a response that leaves no room for the reward token is truncated by one token."""
    with torch.inference_mode():
        return rm.score(tokens[:, : rm.room], lengths.clamp(max=rm.room))


def answers(prompt, gpt, rm, tokenizer, args, generator, chat=False):
    """The responses to one prompt, [(text, whether it ended, score)], best score first, and all scores; with
    --best-of only the best. chat: the prompt is a conversation, and a response is one turn of it."""
    tokens, lengths, P = respond(gpt, tokenizer, prompt, args, generator, rm, chat)
    scores = score(rm, tokens, lengths) if rm else torch.zeros(len(tokens))
    order = scores.argsort(descending=True).tolist() if rm else list(range(len(tokens)))
    return [(tokenizer.decode(tokens[i, P : lengths[i]].tolist()),
             bool(tokens[i, lengths[i] - 1] == tokenizer.eos), scores[i].item())
            for i in order[: 1 if args.best_of else None]], scores


def answer(prompt, gpt, rm, tokenizer, args, generator, chat=False):
    """Print the responses to one prompt; returns the first one's text."""
    found, scores = answers(prompt, gpt, rm, tokenizer, args, generator, chat)
    if args.best_of:
        print(f"[best of {args.best_of}; scores {scores.min():.2f} to {scores.max():.2f}, "
              f"mean {scores.mean():.2f}]")
    for text, ended, score in found:
        mark = f"[{score:+.2f}]" if rm else ">>"
        print(f"{mark}{text}{'' if ended else ' [...]'}\n", flush=True)
    return found[0][0]


def as_turn(prompt, chat):
    """In a chat the prompt as a user's turn, unless it is a conversation in our form already."""
    said = not chat or prompt.endswith(ANSWER)
    return prompt if said else as_prompt([{"role": "user", "content": prompt}])


def answer_file(gpt, rm, tokenizer, args, generator, chat):
    """Write the responses to all --prompts as JSONL, which tools.score reads."""
    prompts, rows = read_prompts(args.prompts), []
    with Progress() as progress:
        for i, prompt in enumerate(prompts):
            progress(f"{i} of {len(prompts)} prompts answered")
            found, _ = answers(as_turn(prompt, chat), gpt, rm, tokenizer, args, generator, chat)
            rows += [{"prompt": prompt, "response": text, "eos": float(ended)} | ({"score": x} if rm else {})
                     for text, ended, x in found]
    write(Path(args.to), rows, save=write_lines)
    print(f"{len(rows)} responses to {len(prompts)} prompts written to {args.to}")


def show_tokens(prompt, sources, args, generator, chat):
    """Print what each token did: of the responses that are given, or of one that is sampled."""
    if args.given:
        rows, P = encode(sources, prompt, args.given)
    else:
        made, lengths, P = respond(sources.policy, sources.tokenizer, prompt, args, generator, sources.rm,
                                   chat)
        rows = [made[0, : lengths[0]].tolist()]
    show(sources, rows, P, args.html)


# ---- conversations ----

def takes_turns(gpt, args):
    """Whether to talk in turns: as most of the demonstrations were, or as --chat or --no-chat says.

    A checkpoint that doesn't tell is taken at --chat's word. UserError: --chat, and none of them were.
    """
    if args.chat and gpt.chat == 0:
        raise UserError(f'--chat: {args.ckpt} was never trained on messages; drop --chat, or train it with '
                        'train_sft.py on {"messages": ...}')
    return (gpt.chat or 0) > 0.5 if args.chat is None else args.chat


def as_prompt(turns):
    """Messages as the prompt that train_sft.py makes of them."""
    return text_of({"turns": turns}, "turns") + ANSWER


def latest(turns, tokenizer, room):
    """The latest turns that fit into `room` tokens, from a user's turn on; the last one stays in any case."""
    while len(turns) > 1 and len(encode_prompt(as_prompt(turns), tokenizer)) > room:
        turns = turns[2:]
    return turns


def one_turn(tokens, lengths, P, tokenizer):
    """A response that goes on with somebody's next turn ends before it, as if with eos: (tokens, lengths)."""
    rows = [row[:n] for row, n in zip(tokens.tolist(), lengths.tolist(), strict=True)]
    texts = [tokenizer.decode(row[P:]) for row in rows]
    ends = [min((text.find(turn) for turn in (QUESTION, ANSWER) if turn in text), default=None)
            for text in texts]
    return pad([row if end is None else row[:P] + tokenizer.encode(text[:end]) + [tokenizer.eos]
                for row, text, end in zip(rows, texts, ends, strict=True)], tokens.device)


def lines():
    """What is typed, line by line, until an empty line, Ctrl-D or Ctrl-C."""
    if sys.stdin is None:
        raise UserError("there is neither a prompt nor an open standard input to read one from")
    sys.stdin.reconfigure(errors="replace")
    try:
        while line := input("> ").strip():
            yield line
    except (EOFError, KeyboardInterrupt):
        print()


def talk(gpt, rm, tokenizer, args, generator, chat):
    """Answer line by line; neither a bad line, nor Ctrl-C during an answer, nor a lack of memory ends it."""
    turns = []
    for line in lines():
        asked = [*turns, {"role": "user", "content": line}]
        try:
            if chat:
                asked = latest(asked, tokenizer, longest_prompt(gpt, rm, args))
                if dropped := len(turns) + 1 - len(asked):
                    note(f"the {dropped} oldest turns no longer fit and are forgotten")
            text = answer(as_prompt(asked) if chat else line, gpt, rm, tokenizer, args, generator, chat)
            turns = [*asked, {"role": "assistant", "content": text.strip()}] if chat else []
        except KeyboardInterrupt:
            note("\nstopped; Ctrl-C once more to end")
        except UserError as error:
            note(f"sample.py: {error}")
        except (RuntimeError, MemoryError) as error:
            if not (lack := exhausted(error)):
                raise
            note(f"sample.py: {lack} {REMEDY}")


# ---- command line ----

def read_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", help="text to continue; without it, what is typed")
    parser.add_argument("--prompts", metavar="FILE", help="answer the prompts of this JSONL file instead")
    parser.add_argument("--to", metavar="FILE", help="where to write those answers; must not exist")
    parser.add_argument("--ckpt", default="out/ppo.pt", help="language model (default %(default)s)")
    parser.add_argument("--reward", help="reward model that scores each response, e.g. out/rm.pt")
    parser.add_argument("--chat", action=argparse.BooleanOptionalAction,
                        help="take each prompt as a user's turn in a conversation (default: if the model was "
                             "trained on messages)")
    parser.add_argument("--n", type=int, help="responses (default 3; in a conversation and with --prompts 1)")
    parser.add_argument("--best-of", type=int, default=0,
                        help="sample this many, print the one with the best score")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 = greedy (default 1)")
    parser.add_argument("--top-k", type=int, help="sample from the k likeliest tokens only")
    parser.add_argument("--top-p", type=float,
                        help="sample from the likeliest tokens that make up this probability")
    parser.add_argument("--max-new-tokens", type=int, default=200,
                        help="longest response (default %(default)s)")
    parser.add_argument("--tokens", action="store_true", help="show what each token of one response did")
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--response", nargs=1, dest="given", metavar="TEXT",
                       help="--tokens of this response; most begin with a space")
    given.add_argument("--twins", nargs=2, dest="given", metavar=("A", "B"),
                       help="--tokens of these two, and where they part")
    parser.add_argument("--html", metavar="FILE", help="write --tokens as a page, too; must not exist")
    parser.add_argument("--seed", type=int, default=1, help="of the samples (default %(default)s)")
    parser.add_argument("--device", default="auto", help='"cuda", "mps" or "cpu"')
    return parser.parse_args()


def check(args):
    """Numbers that make no sense are the user's mistake, not a traceback."""
    if bool(args.prompts) != bool(args.to) or args.prompts and args.prompt is not None:
        raise UserError("--prompts FILE and --to FILE belong together, and take the place of a prompt")
    for path in filter(None, (args.to, args.html)):
        check_new(path)
    if ((args.prompt is None or args.n or args.best_of) if args.tokens else (args.given or args.html)):
        raise UserError("--response, --twins and --html belong to --tokens, which takes one prompt on the "
                        "command line, and neither --n nor --best-of")
    if args.best_of and not args.reward:
        raise UserError("--best-of needs a reward model: --reward out/rm.pt")
    if not (1 <= (args.n or 1) <= 10**6 and args.n != 0 and args.max_new_tokens >= 1
            and 0 <= args.best_of <= 10**6 and 0 <= args.seed < 2**63):
        raise UserError("--n and --max-new-tokens start at 1, --best-of and --seed at 0; --n and --best-of "
                        "end at 1000000")
    if args.temperature and not 1e-3 <= args.temperature <= 1e3:  # not: for nan
        raise UserError("--temperature must be 0, or between 0.001 and 1000")
    k, p = args.top_k, args.top_p
    if (k is not None and k < 1) or (p is not None and not 0 < p <= 1):
        raise UserError("--top-k starts at 1, and --top-p must be above 0 and at most 1")


def main(args):
    check(args)
    device = pick_device(args.device)
    gpt, tokenizer, rm = load(GPT, args.ckpt), load_tokenizer(args.ckpt), None
    chat = takes_turns(gpt, args)
    args.n = args.n or (1 if chat or args.prompts or args.tokens else 3)
    if args.reward:
        rm = prepare(load_reward_model(args.reward, gpt, tokenizer), device)
    prepare(gpt, device)
    generator = torch.Generator(device).manual_seed(args.seed)
    if args.prompts:
        answer_file(gpt, rm, tokenizer, args, generator, chat)
        return
    if args.prompt is None:
        talk(gpt, rm, tokenizer, args, generator, chat)
        return
    prompt = as_turn(os.fsencode(args.prompt).decode(errors="replace"), chat)  # bytes that were no text
    if args.tokens:
        show_tokens(prompt, load_sources(gpt, rm, tokenizer, args, device), args, generator, chat)
        return
    answer(prompt, gpt, rm, tokenizer, args, generator, chat)


if __name__ == "__main__":
    make_harmless()
    arguments = read_args()
    with one_sentence("sample.py", REMEDY):
        main(arguments)
