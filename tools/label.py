"""Label: which of two responses is better, by you, into preferences.jsonl; or which of two models.

    python -m tools.label --ckpt out/sft.pt --data my_folder                # in the terminal
    python -m tools.label --ckpt out/sft.pt --data my_folder --web          # in a browser, the same keys
    python -m tools.label --ckpt out/sft.pt --data my_folder --judge out/rm.pt    # a reward model decides
    python -m tools.label --ckpt out/sft.pt --ckpt out/ppo.pt --data my_folder --compare    # blind
    python -m tools.label --data my_folder --from-csv FILE                  # or --from-label-studio FILE.json

Asks about the prompts in prompts.jsonl that preferences.jsonl has not. Before the next pair is shown, an
answer is on the disk: with all that is known of it in labels.jsonl, and if one response is better in
preferences.jsonl, every tenth in preferences_val.jsonl. Every tenth pair comes again later, turned round, for
labels.jsonl only: how often you agree with yourself is reported, also by train_rm.py. --compare asks about
prompts_val.jsonl if there is one, for comparisons.jsonl only. The same command goes on after q or a kill.
"""
import argparse
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import torch

from data.choices import TRAIN, VAL, add_choices, read_choices, read_ranked
from data.convert import Dropped
from data.files import UserError, append, json_line, json_object, settle, take_back
from data.prepare import is_read
from data.records import read_prompts
from lib.checkpoint import load, load_tokenizer
from lib.fast import prepare
from lib.flags import one_sentence, pick_device
from lib.output import make_harmless, visible
from lib.report import report_agreement, report_wins
from lib.resume import checksum, lock
from lib.terminal import side_by_side, single_keys, wrapped
from lib.web import serve
from model import GPT, RewardModel
from sample import answers, takes_turns
from tools.score import score_all

KEYS = "1 or 2 is better, = equal, s skip, u undo, q quit"
PAGE = """<!doctype html><meta charset="utf-8"><title>Label</title><style nonce="NONCE">
  body { font: 1.1em/1.5 sans-serif; max-width: 75em; margin: 1em auto }
  pre { font: inherit; white-space: pre-wrap; overflow-wrap: anywhere; border: solid 1px; padding: 1ex }
  main { display: grid; grid-template-columns: 1fr 1fr; gap: 1em }
</style><p id="status"></p><pre id="prompt" dir="auto"></pre>
<main><pre id="left" dir="auto"></pre><pre id="right" dir="auto"></pre></main>
<p><button>1</button> <button>2</button> <button>=</button> <button>s</button> <button>u</button>
<button>q</button> KEYS</p><p id="note"></p><script nonce="NONCE">
  let turn = -1;
  async function send(key) {
    let state = {note: "No answer: this pair is not saved yet. Is tools.label still running?"};
    try {
      state = await (await fetch("", {method: "POST", body: JSON.stringify({turn, key})})).json();
      turn = state.turn;
    } catch {}
    for (const id in state) if (id != "turn") document.getElementById(id).textContent = state[id];
  }
  onkeydown = ({key, repeat, ctrlKey, metaKey, altKey}) => {
    if ([..."12=suq"].includes(key) && !repeat && !ctrlKey && !metaKey && !altKey) send(key);
  };
  onclick = ({target}) => { if (target.tagName == "BUTTON") { target.blur(); send(target.textContent); } };
  send("");
</script>""".replace("KEYS", KEYS)


# ---- pairs ----

class Pair(NamedTuple):
    """shown: which of the responses is on the left, and which on the right. again: it was asked before."""

    prompt: str
    responses: list
    shown: list
    again: bool = False


def sampler(path, args, device):
    """A function (prompt, n, rng) -> n responses of the checkpoint, those that end first."""
    gpt, tokenizer = prepare(load(GPT, path), device), load_tokenizer(path)
    how = argparse.Namespace(best_of=0, temperature=1.0, top_k=None, top_p=None, chat=None, ckpt=path,
                             max_new_tokens=args.max_new_tokens)

    def sample(prompt, n, rng):
        how.n, generator = n, torch.Generator(device).manual_seed(rng.getrandbits(63))
        found, _ = answers(prompt, gpt, None, tokenizer, how, generator, takes_turns(gpt, how))
        return [text for text, *_ in sorted(found, key=lambda response: not response[1])]
    return sample


def two_responses(samplers, prompt, rng):
    """One of each of two models; of a single one two that differ, and that train_rm.py takes, whichever is
    better. []: among four there were no such two."""
    if len(samplers) == 2:
        return [sample(prompt, 1, rng)[0] for sample in samplers]
    responses = list(dict.fromkeys(samplers[0](prompt, 4, rng)))[:2]
    rows = [{"prompt": prompt, "chosen": x, "rejected": y} for x in responses for y in responses if x != y]
    return responses if rows and all(is_read(row, "preferences", Dropped()) for row in rows) else []


def new_pairs(prompts, samplers):
    """A Pair for each prompt that has two responses. What is asked depends on the prompt alone."""
    for prompt in prompts:
        rng = random.Random(prompt)
        if responses := two_responses(samplers, prompt, rng):
            yield Pair(prompt, responses, rng.sample([0, 1], 2))


# ---- answers ----

def as_pair(entry):
    return Pair(*(entry[name] for name in Pair._fields))


def preference(entry):
    """The line of preferences.jsonl that an answer makes."""
    better, worse = (entry["responses"][i] for i in (entry["best"], 1 - entry["best"]))
    return json_line({"prompt": entry["prompt"], "chosen": better, "rejected": worse})


def read_journal(path):
    """The answers so far, [dict]; half a line at the end was none, and is removed. UserError: other lines."""
    *lines, tail = path.read_bytes().split(b"\n") if path.exists() else [b""]
    try:
        entries = [json_object(line) for line in lines]
        [(as_pair(entry), entry["key"], entry["best"]) for entry in entries]
    except (UserError, KeyError):
        raise UserError(f"{path} has lines that tools.label did not write; move it away") from None
    if tail:
        os.truncate(path, path.stat().st_size - len(tail))
    return entries


class Session:
    """What is asked, and what was answered. models: these two are compared, in a journal of its own."""

    def __init__(self, folder, prompts, samplers, models=None):
        self.folder, self.models, self.turn, self.waiting = folder, models, 0, []
        self.journal = folder / ("comparisons.jsonl" if models else "labels.jsonl")
        self.entries = [entry for entry in read_journal(self.journal) if entry.get("models") == models]
        done, last = {entry["prompt"] for entry in self.entries}, self.entries[-1:]
        for name in () if models else (TRAIN, VAL):
            settle(folder / name, *(preference(entry) for entry in last if entry.get("file") == name))
            done |= {prompt for prompt, *_ in read_ranked(folder / name)}
        self.left = [prompt for prompt in dict.fromkeys(prompts) if prompt not in done]
        self.lock, self.pool = threading.Lock(), ThreadPoolExecutor(1)
        self.fresh = new_pairs(self.left, samplers)
        self.ahead = self.pool.submit(next, self.fresh, None)
        self.pair = self.next_pair()

    def next_pair(self):
        """What an undo put off, else what is to be asked again, else a new pair; None: there is none."""
        if self.waiting:
            return self.waiting.pop()
        firsts = [entry for entry in self.entries if not entry["again"] and entry["key"] != "s"]
        due = 10 * sum(entry["again"] for entry in self.entries)
        if due + 10 < len(firsts) and not self.models:
            return as_pair(firsts[due])._replace(shown=firsts[due]["shown"][::-1], again=True)
        pair, self.ahead = self.ahead.result(), self.pool.submit(next, self.fresh, None)
        return pair

    def press(self, key, turn):
        """Do what `key` says, pressed at pair number `turn`; returns what is to be seen then."""
        with self.lock:
            if turn != self.turn:
                return self.view("That pair had been answered already; this is another." * (turn != -1))
            if self.pair and key in [*"12=s"]:
                self.answer(key)
            return self.view(self.undo() if key == "u" else "")

    def answer(self, key):
        """Save an answer and go on to the next pair. OSError: the disk is full, and nothing is saved."""
        best = self.pair.shown["12".index(key)] if key in "12" else None
        first = next((old for old in self.entries if old["prompt"] == self.pair.prompt), None)
        entry = self.pair._asdict() | {"key": key, "best": best, "time": f"{datetime.now():%Y-%m-%d %H:%M}"}
        if self.models:
            entry["models"] = self.models
        elif self.pair.again and "s" not in (key, first["key"]):
            entry["agrees"] = 1.0 if best == first["best"] else 0.5 if None in (best, first["best"]) else 0.0
        elif best is not None and not self.pair.again:
            entry["file"] = VAL if sum("file" in old for old in self.entries) % 10 == 9 else TRAIN
        append(self.journal, json_line(entry))
        try:
            if "file" in entry:
                append(self.folder / entry["file"], preference(entry))
        except OSError:
            take_back((self.journal, json_line(entry)))
            raise
        self.entries.append(entry)
        self.turn, self.pair = self.turn + 1, None
        self.pair = self.next_pair()

    def undo(self):
        """Remove the last answer, show its pair again, and return a sentence."""
        if not self.entries:
            return "There is nothing to undo."
        entry = self.entries[-1]
        lines = [(self.folder / entry["file"], preference(entry))] if "file" in entry else []
        try:  # the journal last: if a kill comes between the two, the answer stays
            take_back(*lines, (self.journal, json_line(entry)))
        except UserError as error:
            return f"Not undone: {error}"
        self.waiting += [self.pair] if self.pair else []
        self.turn, self.pair = self.turn + 1, as_pair(self.entries.pop())
        return "Undone."

    def view(self, note=""):
        """What is to be seen, by name, as texts that control no terminal; turn: the number of the pair."""
        left = len({*self.left} - {entry["prompt"] for entry in self.entries})
        over = "That was the last pair." + " Prompts left: without two different responses." * bool(left)
        prompt, responses, shown, _ = self.pair or Pair(over, ["", ""], [0, 1])
        texts = {"status": f"answered: {len(self.entries)}, prompts left: {left}", "prompt": prompt,
                 "left": responses[shown[0]], "right": responses[shown[1]], "note": note}
        return {"turn": self.turn} | {name: visible(text) for name, text in texts.items()}


# ---- who answers ----

def at_terminal(session):
    """A person at the terminal."""
    def screen(state):
        return "\n".join([f"\n---- {state['status']} ----", *wrapped(state["prompt"]), "",
                          *side_by_side(f"1: {state['left']}", f"2: {state['right']}"), "",
                          *wrapped(state["note"]), f"{KEYS}: "])
    state = session.view()
    with single_keys() as ask:
        while (key := ask(screen(state))) not in ("q", ""):
            state = session.press(key, session.turn)


def on_page(session, port):
    """A person at the page."""
    def reply(asked):
        try:
            last = asked["key"] == "q"
            return session.view("Ended.") if last else session.press(asked["key"], asked["turn"]), last
        except (OSError, UserError) as error:
            return session.view(f"Not saved: {error}"), False
    serve(PAGE, reply, port)


def by_judge(session, path, device):
    """A reward model; what does not fit into it is skipped."""
    rm, tokenizer = prepare(load(RewardModel, path), device), load_tokenizer(path)
    while pair := session.pair:
        found = [(None, pair.prompt, [pair.responses[i] for i in pair.shown], None)]
        scores = score_all(rm, tokenizer, found, 16384, device)[0]
        session.press("s" if not scores else "=" if scores[0] == scores[1] else
                      "1" if scores[0] > scores[1] else "2", session.turn)


def main(args):
    if args.table:
        pairs, _held = read_choices(args.table), lock(args.data, "--data")
        return add_choices(pairs, args.data)
    ckpts, device = args.ckpt or ["out/sft.pt"], pick_device(args.device)
    if len(ckpts) != 1 + args.compare or args.judge and args.web is not None or args.max_new_tokens < 1:
        raise UserError("give one --ckpt, or two with --compare; --judge or --web; --max-new-tokens above 0")
    file = args.data / "prompts_val.jsonl"
    prompts = read_prompts(file if args.compare and file.exists() else args.data / "prompts.jsonl")
    _held = lock(args.data, "--data")
    models = [f"{path}: {checksum(path)}" for path in ckpts] if args.compare else None
    session = Session(args.data, prompts, [sampler(path, args, device) for path in ckpts], models)
    with suppress(KeyboardInterrupt):
        if args.judge:
            by_judge(session, args.judge, device)
        elif args.web is not None:
            on_page(session, args.web)
        else:
            at_terminal(session)
    if models:
        return report_wins(*ckpts, [entry["best"] for entry in session.entries if entry["key"] != "s"])
    files = [entry.get("file") for entry in session.entries]
    print(f"\n{len(files)} answers, of which {files.count(TRAIN)} in {TRAIN} and {files.count(VAL)} in {VAL}")
    report_agreement(args.data)


def read_args():
    parser = argparse.ArgumentParser(prog="python -m tools.label", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with prompts.jsonl")
    parser.add_argument("--ckpt", action="append", help="language model (default out/sft.pt)")
    parser.add_argument("--compare", action="store_true", help="one response of each of two --ckpt")
    parser.add_argument("--judge", metavar="RM.pt", help="a reward model presses the keys")
    parser.add_argument("--web", nargs="?", type=int, const=0, metavar="PORT", help="a page on 127.0.0.1")
    parser.add_argument("--from-csv", "--from-label-studio", dest="table", type=Path, metavar="FILE",
                        help="add the choices in this table: prompt, a, b, choice")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="default %(default)s")
    parser.add_argument("--device", default="auto", help='"cuda", "mps" or "cpu"')
    return parser.parse_args()


if __name__ == "__main__":
    make_harmless()
    arguments = read_args()
    with one_sentence("tools.label", "Try a smaller --max-new-tokens"):
        main(arguments)
