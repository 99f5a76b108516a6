"""Tokens: what each token of a response did, in the numbers that PPO trains on; sample.py --tokens shows it.

    python sample.py --ckpt out/ppo.pt --tokens "Tell a story about a fox and a lantern."

Reference, reward model, critic and log of the run are looked for beside the checkpoint; what can't be known
without one of them is left out, and a line says so. The numbers are made by ppo.py's own functions. All that
is shown has passed `printable`: no text can steer a terminal or, being escaped too, a page.
"""
import codecs
import os
import sys
from functools import partial
from html import escape
from pathlib import Path
from typing import NamedTuple

import torch

import ppo
from data.examples import fit, pad, response_mask
from data.files import UserError, json_object, printable
from lib.checkpoint import load, load_tokenizer, write
from lib.common import places
from lib.fast import in_pieces, prepare
from lib.flags import check_numbers
from lib.output import Harmless
from lib.rewards import Models, load_reward_model, model_score, score_rows
from model import GPT, RewardModel

COLUMNS = {  # what each says of a token, and what it needs
    "score": ("the reward model's, of the text up to this token", {"rm"}),
    "value": ("the critic's, of the text before this token: the rewards that it expects from here on",
              {"critic"}),
    "logp": ("log-probability of this token under the policy, in nats", set()),
    "ref": ("the same under the reference", {"ref"}),
    "kl": ("logp - ref", {"ref"}),
    "entropy": ("of the policy's choice here, in nats", set()),
    "penalty": ("kl_coef x kl, paid here", {"ref"}),
    "reward": ("-penalty, and at the last token the score", {"ref", "rm", "units"}),
    "adv": ("advantage (GAE), before PPO whitens it over a rollout", {"ref", "rm", "critic", "units"}),
}
PREFIXES = {  # what the score of a prefix is, by the reward model's pool
    "last": "it reads the last token and was never trained on prefixes; only the last line's score is of a "
            "kind that it learned to give",
    "token": "each prefix is read with the reward token after it, which in training stood after whole texts",
}
POOLED = "it pools over the tokens so far; it was trained on whole texts only"
SHADES = ("\x1b[30;48;5;203m", "\x1b[30;48;5;224m", "", "\x1b[30;48;5;194m", "\x1b[30;48;5;114m")
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>What each token did</title>
<style>
body { font: 14px sans-serif; margin: 2em }
p { margin: .4em 0 }
.text { font-size: 16px; white-space: pre-wrap }
td, th { font: 13px monospace; padding: 0 .6em; text-align: right }
td:last-child, th:last-child { text-align: left; white-space: pre-wrap }
.part td { border-top: 2px solid }
.s0 { background: #f99 } .s1 { background: #fdd } .s3 { background: #dfd } .s4 { background: #9e9 }
</style></head><body>
<h1>What each token did</h1>
"""


# ---- the models of a run ----

class Sources(NamedTuple):
    """Models (None: not there) and settings of a run; `there`: which needs of COLUMNS are met; `said`: lines
    about all this."""

    policy: GPT
    ref: GPT | None
    rm: RewardModel | None
    critic: RewardModel | None
    tokenizer: object
    cfg: ppo.Config
    there: set
    said: list

    @property
    def room(self):
        """Tokens of the longest text that all of them take."""
        return min([self.policy.config.block_size, *(rm.room for rm in (self.rm, self.critic) if rm)])


def read_log(path):
    """ppo.Config of the run with this log, with the kl_coef of its last update, and where that is from.
    UserError: it is no such log."""
    names = ("kl_coef", "lam", "temperature", "no_eos_score", "sft", "rm", "reward")
    cfg, kinds = ppo.Config(), {name: type(getattr(ppo.Config, name)) for name in names}
    if not path.exists():
        return cfg, f"the defaults, as {path} is not there"
    try:
        first, *lines = map(json_object, path.read_bytes().splitlines())
        config = first["config"]
        cfg = ppo.Config(**{name: kind(config[name]) for name, kind in kinds.items() if name in config})
        steps = [line["kl_coef"] for line in lines if "step" in line]
        cfg.kl_coef = float(steps[-1]) if steps else cfg.kl_coef
        check_numbers(cfg)
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{path} is not a log of ppo.py, or is corrupt") from None
    return cfg, f"of the last update in {path}"


def load_reference(path, policy, tokenizer):
    """UserError: it can't read everything that the policy writes."""
    ref = load(GPT, path)
    if load_tokenizer(path).spec() != tokenizer.spec() or ref.config.block_size < policy.config.block_size:
        raise UserError(f"{path} has another tokenizer than the policy, or takes shorter texts")
    return ref


def load_sources(policy, rm, tokenizer, args, device):
    """The Sources beside args.ckpt; rm: the reward model of args.reward, if that was given."""
    folder = Path(args.ckpt).parent
    cfg, where = read_log(folder / "ppo.log.jsonl")
    found, said = {"rm": rm} if rm else {}, [f"policy: {args.ckpt}"]
    for name, what, path in (("ref", "reference", Path(cfg.sft or folder / "sft.pt")),
                             ("rm", "reward model", Path(cfg.rm or folder / "rm.pt")),
                             ("critic", "critic", folder / "critic.pt")):
        if name == "rm" and (rm or cfg.reward):
            said += [f"reward model: {args.reward}"] if rm else []
        elif path.exists():
            read = load_reference if name == "ref" else load_reward_model
            found[name] = prepare(read(path, policy, tokenizer), device)
            said.append(f"{what}: {path}")
        else:
            said.append(f"{what}: {path} is not there")
    said.append(f"kl_coef {cfg.kl_coef:.4g}, {where}; lambda {cfg.lam:g}, temperature {cfg.temperature:g}")
    there = found.keys() | (set() if cfg.reward else {"units"})
    if cfg.reward:
        said.append(f"the run's rewards came from {cfg.reward}, which is not called here")
    if "critic" in found and Path(args.ckpt).name != "ppo.pt":
        said.append(f"the critic learned from the policy in {folder / 'ppo.pt'}, not from this one")
    if "rm" in found:
        said.append(f"the reward model has --pool {found['rm'].pool}: "
                    f"{PREFIXES.get(found['rm'].pool, POOLED)}")
    if lost := [name for name, (_, needs) in COLUMNS.items() if not needs <= there]:
        said.append(f"left out, for what is not there: {', '.join(lost)}")
    return Sources(policy, *map(found.get, ("ref", "rm", "critic")), tokenizer, cfg, there, said)


def encode(sources, prompt, responses):
    """Rows of a prompt and given responses, each with end-of-text, and P. UserError: they do not fit."""
    responses = [os.fsencode(text).decode(errors="replace") for text in responses]  # bytes that were no text
    if not (fitted := fit(prompt, responses, sources.tokenizer, sources.room)):
        raise UserError(f"such a response leaves no room for a prompt in {sources.room} tokens")
    prompt, responses, lost = fitted
    if lost:
        sources.said.append(f"the prompt is truncated from the left to {len(prompt)} tokens")
    return [prompt + response for response in responses], len(prompt)


# ---- the numbers ----

def prefix_scores(rm, row, P):
    """Scores of a row's prefixes from the prompt (P tokens) to the whole text: (len(row)-P+1,). The last one
    is rm.score of the row, to the bit."""
    device = rm.reward_head.weight.device
    tokens, lengths = pad([row], device)
    some = (score_rows(rm, [row[:n] for n in range(P, len(row))], 16384, device) if rm.pool == "token"
            else rm(tokens)[0, P - 1 : -1].cpu())  # without its token, forward is not the score
    return torch.cat([some, rm.score(tokens, lengths).cpu()])


def entropy(gpt, h, temperature):
    """Of the next token after each hidden state: h (N,C) -> (N,), in nats."""
    logp = (gpt.logits(h).float() / temperature).log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


@torch.inference_mode()
def trace(sources, row, P):
    """What each response token of a row did: {column: a float for each}, and of the whole response: prompt
    (its score alone), score (as PPO has it), kl, reward (the sum), ended."""
    policy, ref, rm, critic, tokenizer, cfg, there, _ = sources
    (tokens, lengths), device = pad([row]), policy.lm_head.weight.device
    start = torch.full_like(lengths, P)
    batch = {"tokens": tokens, "lengths": lengths, "P": start, "ended": tokens[:, -1] == tokenizer.eos,
             "mask": response_mask(lengths, start, len(row))}
    none = torch.zeros(tokens.shape)
    models = Models(policy, ref or policy, critic or (lambda text: none[:, : text.shape[1]]),
                    model_score(rm) if rm else lambda *_: none[:, 0], None, tokenizer)
    batch = ppo.advantages(ppo.assess(batch, models, cfg, "tokens"), cfg.kl_coef, cfg.lam)
    mask, kl = batch["mask"], batch["logp"] - batch["ref_logp"]
    adv, _ = ppo.gae(batch["reward"], batch["value"], mask, 1.0, cfg.lam)
    scores = prefix_scores(rm, row, P).tolist() if rm else [0.0]
    spread = in_pieces(partial(entropy, policy, temperature=cfg.temperature), policy,
                       policy.trunk(tokens[:, :-1].to(device)).flatten(0, 1)[places(mask, device)])
    columns = {"value": batch["value"], "logp": batch["logp"], "ref": batch["ref_logp"], "kl": kl,
               "penalty": cfg.kl_coef * kl, "reward": batch["reward"], "adv": adv}
    columns = {name: x[mask].tolist() for name, x in columns.items()}
    columns |= {"score": scores[1:], "entropy": spread.tolist()}
    whole = {"prompt": scores[0], "score": batch["score"].item(), "kl": sum(columns["kl"]),
             "reward": sum(columns["reward"]), "ended": bool(batch["ended"])}
    return {name: columns[name] for name, (_, needs) in COLUMNS.items() if needs <= there}, whole


def summary(sources, whole, n):
    """A line about a whole response of n tokens."""
    there, cfg = sources.there, sources.cfg
    text = f"{n} tokens" + f"; score {whole['score']:+.4f}, of the prompt alone {whole['prompt']:+.4f}" * (
        "rm" in there) + f"; KL {whole['kl']:.4f} nats" * ("ref" in there)
    if {"rm", "ref", "units"} <= there:
        text += f"; the rewards add up to {whole['reward']:+.4f} = score - {cfg.kl_coef:.4g} x KL"
    if not whole["ended"]:
        text += "; it does not end" + f", so PPO gives it {cfg.no_eos_score:g} for a score" * ("rm" in there)
    return text


# ---- what is shown ----

class Told(NamedTuple):
    """A response as it is shown; an entry a token in pieces (see there) and shades (0 to 4: of SHADES)."""

    name: str
    pieces: list
    columns: dict
    shades: list
    summary: str


def tell(sources, name, row, P):
    columns, whole = trace(sources, row, P)
    return Told(name, pieces(sources.tokenizer, row[P:]), columns, shades(columns),
                name + summary(sources, whole, len(row) - P))


def printable_text(text):
    """As `printable`, but lines stay lines."""
    return "\n".join(map(printable, text.split("\n")))


def pieces(tokenizer, ids):
    """[(token, text)]: a token as it is, backslashes doubled, bytes that are no character written out, blanks
    in quotes; and what it adds to the text: a character of several tokens comes whole, with the last one."""
    decoder, made = codecs.getincrementaldecoder("utf-8")("backslashreplace"), []
    for i, token in enumerate(ids, 1):
        raw, begun = tokenizer.encoding.decode_single_token_bytes(token), decoder.getstate()[0]
        own = printable(raw.replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace"))
        text = decoder.decode(raw, final=i == len(ids) or ids[i] == tokenizer.eos)
        if begun and text and "\\x" not in text:
            own += f" = {printable(text)}"
        made.append((own if own.strip() else f'"{own}"', printable_text(text)))
    return made


def shaded(columns):
    """The column that the colours show."""
    return next(name for name in ("adv", "kl", "logp") if name in columns)


def shades(columns):
    """A shade for each token, red below 0 and green above."""
    x = columns[shaded(columns)]
    most = max(map(abs, x)) or 1.0
    return [round(2 + 2 * y / most) for y in x]


def parting(a, b):
    """The first place where two lists differ; None: nowhere."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)


def in_colour(text, shade):
    return "\n".join(f"{SHADES[shade]}{line}\x1b[0m" if SHADES[shade] else line for line in text.split("\n"))


def strip(told, part, paint, mark=">>>"):
    """The response as a text, each token painted; `mark` where it parts from its twin."""
    return told.name + "".join(mark * (i == part) + paint(text, told.shades[i])
                               for i, (_, text) in enumerate(told.pieces))


def cells(told, i):
    return [f"{round(x[i], 3) + 0.0:.3f}" for x in told.columns.values()]  # + 0.0: no -0


def table(told, part, paint):
    """A line a token. The token stands last: there neither wide letters nor those that are read from right to
    left can move the numbers."""
    lines = ["   #" + "".join(name.rjust(9) for name in told.columns) + "  token"]
    for i, (token, _) in enumerate(told.pieces):
        lines += ["---- here they part ----"] * (i == part)
        numbers = "".join(x.rjust(9) for x in cells(told, i))
        lines.append(f"{i + 1:4d}{numbers}  {paint(token, told.shades[i])}")
    return lines


def page(said, prompt, all_told, part):
    """An HTML page that needs nothing else, and may neither load nor run anything."""
    def paint(text, shade):
        return f'<span class="s{shade}">{escape(text)}</span>'

    texts = [escape(prompt), *(strip(told, part, paint, "<b>&gt;&gt;&gt;</b>") for told in all_told)]
    body = [f"<p>{escape(line)}</p>" for line in said]
    body += [f'<p class="text" dir="auto">{text}</p>' for text in texts]
    for told in all_told:
        names = "".join(f"<th>{name}</th>" for name in ("#", *told.columns, "token"))
        body.append(f"<p>{escape(told.summary)}</p><table><tr>{names}</tr>")
        for i, (token, _) in enumerate(told.pieces):
            numbers = "".join(f"<td>{x}</td>" for x in (i + 1, *cells(told, i)))
            body.append(f'<tr{" class=part" * (i == part)}>{numbers}'
                        f"<td><bdi>{paint(token, told.shades[i])}</bdi></td></tr>")
        body.append("</table>")
    return HEAD + "\n".join(body) + "\n</body></html>\n"


def show(sources, rows, P, file=None):
    """Print what each token of one response, or of two, did; write it as a page to `file`, if any."""
    rows = [row[: sources.room] for row in rows]
    part = parting(*(row[P:] for row in rows)) if len(rows) == 2 else None
    names = ("A: ", "B: ") if len(rows) == 2 else ("",)
    all_told = [tell(sources, name, row, P) for name, row in zip(names, rows, strict=True)]
    said = [*map(printable, sources.said), *(f"{name}: {COLUMNS[name][0]}" for name in all_told[0].columns)]
    colours = [f"colours: {shaded(all_told[0].columns)}, red below 0, green above"]
    prompt = printable_text(sources.tokenizer.decode(rows[0][:P]))
    if file:
        text = page(said + colours, prompt, all_told, part)
        write(Path(file), text, save=lambda text, file: file.write(text.encode()))
    paint, out = (lambda text, shade: text), sys.stdout
    if out.isatty() and not os.environ.get("NO_COLOR"):  # past the guard of `out`, which writes codes out
        paint, out, said = in_colour, Harmless(getattr(out, "stream", out)), said + colours
    texts = [prompt, *(strip(told, part, paint) for told in all_told)]
    tables = [line for told in all_told for line in ("", told.summary, *table(told, part, paint))]
    print("\n".join([*said, "", *texts, *tables]), file=out, flush=True)
    if file:
        print(f"{printable(file)} written")
