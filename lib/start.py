"""How a stage starts: its network and tokenizer, and the flags that nobody gave."""
import dataclasses
import json
from array import array
from statistics import fmean

import numpy as np

from data import rules
from data.arrays import derived
from data.files import UserError
from data.records import ANSWER, read_preferences, read_sft
from data.split import read_split
from data.tokenizer import from_spec, get_tokenizer, train_tokenizer
from lib.checkpoint import load, load_tokenizer, new_gpt, sizes_only
from lib.flags import check_pairs
from model import GPT, GPTConfig, RewardModel

SOME = 2000  # examples whose lengths stand for all


def spread(examples):
    """About SOME of them, from beginning to end: a file may be sorted by length."""
    return examples[:: max(1, len(examples) // SOME)]


def fill(cfg, why, **values):
    """A copy of cfg in which each flag that is None has its value; prints which, and why."""
    made = {name: x for name, x in values.items() if getattr(cfg, name) is None}
    if made:
        flags = " ".join(f"--{name.replace('_', '-')} {x}" for name, x in made.items())
        print(f"by the data: {flags} ({why})")
    given, cfg = cfg.given, dataclasses.replace(cfg, **made)
    cfg.given = given
    return cfg


def start_sft(cfg, train, val, folder):
    """Config of train_sft.py and demonstrations -> (GPT, tokenizer, Config with every flag filled in).
    UserError: --init beside flags that it fixes."""
    names = [field.name for field in dataclasses.fields(GPTConfig)]
    if cfg.init:
        for name in sorted({"tokenizer", *names} - {"dropout"}):
            if getattr(cfg, name) != getattr(type(cfg), name) or name in cfg.given:
                raise UserError(f"--init fixes the sizes and tokenizer; remove --{name.replace('_', '-')}")
        gpt, tokenizer = load(GPT, cfg.init, cfg.dropout or 0.0), load_tokenizer(cfg.init)
    elif cfg.tokenizer:
        tokenizer = get_tokenizer(cfg.tokenizer)
    else:
        tokenizer = trained(train, cfg.vocab_size)

    lengths = [whole(tokenizer, *example) for example in spread(train)]
    later = ranked_texts(folder, cfg.skip_bad) if cfg.block_size is None else []  # the reward model's
    others = ([whole(tokenizer, *example) for example in some] for some in (spread(val), later))
    block_size = cfg.block_size or rules.block_size(lengths, *others)
    tokens = sum(min(n, block_size) for n in lengths) * len(train) // len(lengths)
    sizes = {"vocab_size": tokenizer.vocab_size, "block_size": block_size}
    if not cfg.init:
        sizes = {name: getattr(cfg, name) for name in names} | sizes
        with sizes_only():
            gpt = new_gpt(GPTConfig(**sizes | {"dropout": 0.0}))
    made, why = sft_by_rule(train, tokens, gpt, cfg)
    made = only_own_tokens(made, cfg, tokenizer)
    if not cfg.init:
        made = {"block_size": sizes["block_size"]} | made
        if not cfg.tokenizer:
            made = {"vocab_size": tokenizer.vocab_size} | made
    cfg = fill(cfg, why, **made)
    check_pairs(cfg)
    if not cfg.init:
        gpt = new_gpt(GPTConfig(**sizes | {"dropout": cfg.dropout}))
    chat = derived(train, "chat", lambda: np.array([fmean(prompt.endswith(ANSWER) for prompt, _ in train)]))
    gpt.chat = chat.item()  # sample.py asks
    return gpt, tokenizer, cfg


def sft_by_rule(train, tokens, gpt, cfg):
    """({flag: value}, why): rules.sft for this network and these demonstrations, of so many tokens."""
    parameters, width = sum(p.numel() for p in gpt.parameters()), gpt.config.d_model
    density = rules.density(spread(train))
    return (rules.sft(tokens, parameters, width, density, cfg.init, cfg.epochs),
            f"{tokens} tokens, compressed to {density:.0%}, for {parameters} parameters of width {width}")


def only_own_tokens(made, cfg, tokenizer):
    """The flags `made` by rule, without splits of tokens that were not merged from texts like these: bytes
    can't be split, and of GPT-2's nothing was measured. UserError: --bpe-dropout is given for bytes."""
    if cfg.bpe_dropout and not tokenizer.bpe:
        raise UserError("--bpe-dropout does nothing with bytes, of which no token was merged; remove it")
    return made if tokenizer.bpe and tokenizer.name != "gpt2" else made | {"bpe_dropout": 0.0}


def trained(train, vocab_size):
    """A BPE trained on the demonstrations; vocab_size None: by the rule."""
    def texts():
        return (text for example in train for text in example)

    def spec():
        made = train_tokenizer(texts(), vocab_size or rules.VOCABULARY).spec()
        return np.frombuffer(json.dumps(made).encode(), np.uint8)

    return from_spec(json.loads(derived(train, "bpe", spec, vocab_size).tobytes()))


def whole(tokenizer, prompt, response):
    """Tokens of both, and eos."""
    return len(tokenizer.encode(prompt)) + len(tokenizer.encode(response)) + 1


def ranked_texts(folder, skip_bad):
    """(prompt, response) of the first rankings in preferences.jsonl, if that can be read."""
    try:
        some = read_preferences(folder / "preferences.jsonl", skip_bad, SOME)
    except UserError:  # train_rm.py will say what is wrong
        return []
    return [(prompt, response) for prompt, answers, *_ in some for response in answers]


def fit_responses(cfg, folder, tokenizer, room):
    """A Config of train_rm.py or ppo.py whose --max-new-tokens fits the demonstrations in sft.jsonl, if there
    are any that can be read; of ppo.py with a --kl-horizon, if there is a target."""
    try:
        some = read_sft(folder / "sft.jsonl", cfg.skip_bad, SOME) if cfg.max_new_tokens is None else []
    except UserError:
        some = []
    lengths = [len(tokenizer.encode(completion)) + 1 for _, completion in some]
    made = {"max_new_tokens": rules.max_new_tokens(room, lengths)}
    if getattr(cfg, "kl_target", 0):
        made["kl_horizon"] = rules.kl_horizon(cfg.updates * cfg.batch)
    return fill(cfg, f"{len(lengths)} demonstrations", **made)


def ranked_tokens(train, tokenizer):
    """About how many tokens the ranked texts have, and those of them that differ, as an array of two."""
    hashes, group = array("q"), array("q")  # so that none of the texts is held
    for i, (prompt, responses, *_) in enumerate(train):
        hashes.extend(hash(prompt + response) for response in responses)
        group.extend([i] * len(responses))
    first, lengths = np.sort(np.unique(hashes, return_index=True)[1]), []
    for k in spread(first).tolist():
        prompt, responses, *_ = train[group[k]]
        text = prompt + responses[k - np.searchsorted(group, group[k])]
        lengths.append(len(tokenizer.encode(text)) + 1)
    return np.array([round(fmean(lengths) * len(hashes)), round(fmean(lengths) * len(first))])


def start_rm(cfg, sft, folder):
    """Config of train_rm.py, the path of the SFT model and the folder of the data -> (GPT, its tokenizer,
    training rankings, held-out ones, Config with every flag filled in). UserError: an unknown --pool, or
    --wide-gap without gold."""
    if cfg.pool not in RewardModel.POOLS:
        raise UserError(f"--pool {cfg.pool}: expected one of {', '.join(RewardModel.POOLS)}")
    gpt, tokenizer = load(GPT, sft), load_tokenizer(sft)
    train, val = read_split(read_preferences, folder / "preferences.jsonl", cfg)
    if cfg.wide_gap and not any(gold for *_, gold, _ in val):
        raise UserError('--wide-gap: no ranking in preferences_val.jsonl has "gold"')
    size = derived(train, "size", lambda: ranked_tokens(train, tokenizer), tokenizer.spec())
    tokens, different = size.tolist()
    room = gpt.config.block_size - (cfg.pool == "token")
    made = rules.rm(tokens, different, gpt.config.d_model, cfg.epochs)
    cfg = fill(cfg, f"{tokens} tokens of ranked responses, width {gpt.config.d_model}",
               **only_own_tokens(made, cfg, tokenizer))
    cfg = fit_responses(cfg, folder, tokenizer, room)
    return load(GPT, sft, cfg.dropout) if cfg.dropout else gpt, tokenizer, train, val, cfg
