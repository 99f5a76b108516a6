"""Demonstrations -> out/sft.pt: a GPT is trained from scratch to answer prompts as demonstrated.

The loss is the cross-entropy of the completion's tokens and of the end-of-text token after them,
never of the prompt (Ouyang et al. 2022, section 3.5, leave open whether theirs is). It is divided by
the number of those tokens in the whole optimizer step, so a short answer counts no more than a long one.

    python train_sft.py                                 # the built-in stories, from scratch
    python train_sft.py --data my_folder                # your own sft.jsonl and sft_val.jsonl
    python train_sft.py --init out/gpt2.pt --lr 5e-5    # from GPT-2's weights, see hf.py
"""
from dataclasses import dataclass
from pathlib import Path

import torch

from common import (Log, UserError, batches, clip_and_step, far, finite, load, load_tokenizer,
                    pad, pick_device, ready, run, save, set_lr, shuffled)
from data.records import open_data, read_sft
from data.tokenizer import get_tokenizer, train_tokenizer
from model import GPT, GPTConfig, KVCache
from resume import State


@dataclass
class Config:
    data: str = "stories"  # folder with sft.jsonl, or "stories", which is made at the first run
    out: str = "out"  # folder for the results
    init: str = ""  # checkpoint to start from instead of from scratch; it brings sizes and tokenizer
    tokenizer: str = ""  # "gpt2", "bytes" or a BPE file; default: a BPE trained on the demonstrations
    vocab_size: int = 1024  # of the BPE that is trained here
    n_layer: int = 4  # transformer blocks
    n_head: int = 4  # attention heads
    d_model: int = 128  # width
    block_size: int = 128  # longest text in tokens, prompt and completion
    dropout: float = 0.0  # rate; 0 is right for one or two passes over the data
    epochs: float = 3.0  # passes over the demonstrations
    batch_tokens: int = 2048  # tokens in an optimizer step, padding included
    micro_batch: int = 16384  # about the tokens in a forward pass; without dropout it changes no result
    lr: float = 4e-3  # peak of the learning rate
    weight_decay: float = 0.1  # on matrices only
    save_every: int = 200  # steps after which the state is saved, to go on from; 0: never
    resume: bool = False  # go on from the last saved state
    seed: int = 1  # of weights, order and samples
    device: str = "auto"  # "cuda", "mps", "cpu"
    bf16: bool = False  # the blocks' matrix products in bfloat16, but not in generation
    checkpoint_activations: bool = False  # less memory, a third more work: blocks are computed twice
    compile: bool = False  # torch.compile, in generation only on a GPU; needs a C++ compiler
    skip_bad: bool = False  # leave out lines that can't be used, and count them


def encode(examples, tokenizer, block_size, name):
    """[(prompt, completion)] -> [(tokens, P)]: prompt, completion, eos; P prompt tokens.

    The two are encoded apart, so no BPE merge crosses the border. A prompt that is too long loses its
    beginning; an example whose completion alone is too long is dropped. Both are counted and printed.
    An empty prompt becomes eos, as GPT-2's documents begin.
    """
    rows, cut, dropped = [], 0, 0
    for prompt, completion in examples:
        prompt = tokenizer.encode(prompt) or [tokenizer.eos]
        completion = tokenizer.encode(completion) + [tokenizer.eos]
        room = block_size - len(completion)
        if room < 1:
            dropped += 1
            continue
        cut += len(prompt) > room
        prompt = prompt[-room:]
        rows.append((prompt + completion, len(prompt)))
    if cut or dropped:
        print(f"{name}: of {len(examples)} examples {cut} prompts cut from the left, {dropped} "
              f"completions longer than block_size {block_size} dropped")
    if not rows:
        raise UserError(f"{name}: no example fits into block_size {block_size}")
    return rows


def sft_batch(rows, device):
    """[(tokens, P)] -> tokens (B,T), mask (B,T-1): position t is for token t+1, true in completions."""
    tokens, lengths = pad([row for row, _ in rows], device)
    P = torch.tensor([p for _, p in rows], device=device)
    t = torch.arange(1, tokens.shape[1], device=device)
    return tokens, (t >= P[:, None]) & (t < lengths[:, None])


def sft_loss(gpt, tokens, mask):
    """Summed negative log-probability of the tokens under `mask` in nats, and their number.

    The vocabulary head runs at those positions only.
    """
    h = gpt.trunk(tokens[:, :-1])[mask]  # (N,C)
    return -gpt.logps(h, tokens[:, 1:][mask]).sum(), int(mask.sum())


def sft_backward(gpt, rows, micro_batch, device, where, weight=1.0):
    """Gradients of weight x the loss of `rows`, [(tokens, P)], added to .grad in pieces of micro_batch
    tokens; returns the loss, nats per supervised token. UserError, beginning with `where`, when it is not
    finite."""
    count, total = sum(len(row) - P for row, P in rows), 0.0
    for piece in batches([len(row) for row, _ in rows], micro_batch):
        loss, _ = sft_loss(gpt, *sft_batch([rows[i] for i in piece], device))
        finite(where, loss=loss)
        (weight * loss / count).backward()
        total += loss.item()
    return total / count


@torch.no_grad()
def evaluate(gpt, rows, budget, device):
    """Loss per completion token in nats over all rows."""
    gpt.eval()
    loss = count = 0
    for index in batches([len(row) for row, _ in rows], budget):
        part, n = sft_loss(gpt, *sft_batch([rows[i] for i in index], device))
        loss, count = loss + part.item(), count + n
    gpt.train()
    return loss / count


@torch.inference_mode()
def show_sample(gpt, tokenizer, prompt, device):
    """Print one unedited continuation of a prompt (token ids)."""
    gpt.eval()
    tokens, lengths = pad([prompt], device)
    P = len(prompt)
    tokens, lengths = gpt.generate(tokens, lengths, gpt.config.block_size - P, eos=tokenizer.eos)
    print(f"      | {tokenizer.decode(prompt)} >>{tokenizer.decode(tokens[0, P:lengths[0]].tolist())}")
    gpt.train()


def make_optimizer(gpt, cfg):
    """AdamW, decay on matrices only (not on biases and norms), betas of GPT-3 (Brown et al. 2020, B)."""
    matrices = [p for p in gpt.parameters() if p.dim() >= 2]
    others = [p for p in gpt.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": cfg.weight_decay},
              {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), fused=True)


def start(cfg, train):
    """A new GPT and its tokenizer, or those of the checkpoint --init."""
    if not cfg.init:
        if cfg.d_model % cfg.n_head:
            raise UserError("--d-model must be a multiple of --n-head")
        tokenizer = get_tokenizer(cfg.tokenizer) if cfg.tokenizer else train_tokenizer(
            (text for example in train for text in example), cfg.vocab_size)
        return GPT(GPTConfig(tokenizer.vocab_size, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.d_model,
                             cfg.dropout)), tokenizer
    for name in ("tokenizer", "vocab_size", "n_layer", "n_head", "d_model", "block_size"):
        if getattr(cfg, name) != getattr(Config, name):
            raise UserError(f"--init brings its own sizes and tokenizer: leave out "
                            f"--{name.replace('_', '-')}")
    return load(GPT, cfg.init, cfg.dropout), load_tokenizer(cfg.init)


@torch.inference_mode()
def check_model(gpt, device):
    """Raise UserError when model.py has lost what all stages rely on: causality, and a cache that changes
    nothing. Leaves gpt in train mode."""
    if odd := [name for name, x in gpt.state_dict().items() if not x.is_floating_point()]:
        raise UserError(f"self-check: {odd[0]} is no float, and a checkpoint holds nothing else: register it "
                        "with persistent=False")
    V, T = gpt.config.vocab_size, min(16, gpt.config.block_size)
    tokens = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(0)).to(device)
    logits, half, rows = gpt.eval()(tokens), T // 2, torch.arange(2, device=device)
    later = torch.cat([tokens[:, :half], (tokens[:, half:] + 1) % V], 1)
    if far(gpt(later)[:, :half], logits[:, :half]):
        raise UserError("self-check: the logits of a token change with the tokens after it: model.py is "
                        "not causal, so the model would learn to copy the answer")
    cache = KVCache(gpt.trunk, 2, T)
    gpt.trunk.forward(tokens[:, :half], cache)
    cache.trim(torch.tensor([half, half - 1], device=device))  # rows of unequal length, as in generate
    for at in [cache.length + i for i in range(T - half)]:
        if far(gpt.lm_head(gpt.trunk.forward(tokens[rows, at][:, None], cache)[:, 0]), logits[rows, at]):
            raise UserError("self-check: with the KV cache the logits are not those of the whole text, so "
                            "generate in model.py would sample from another model than is trained")
    gpt.train()


def main(cfg):
    torch.manual_seed(cfg.seed)
    order = torch.Generator().manual_seed(cfg.seed)
    device = pick_device(cfg.device)
    out = Path(cfg.out)
    folder, _ = open_data(cfg.data)
    files = [folder / "sft.jsonl", folder / "sft_val.jsonl", cfg.init, cfg.tokenizer]
    state = State(out / "sft.state.pt", cfg, files, device)

    train = read_sft(folder / "sft.jsonl", cfg.skip_bad)
    val = read_sft(folder / "sft_val.jsonl", cfg.skip_bad)
    gpt, tokenizer = start(cfg, train)
    check_model(gpt.to(device), device)
    gpt, block_size = ready(gpt, cfg, device), gpt.config.block_size
    rows = encode(train, tokenizer, block_size, "sft.jsonl")
    val_rows = encode(val, tokenizer, block_size, "sft_val.jsonl")
    lengths = [len(row) for row, _ in rows]
    optimizer = make_optimizer(gpt, cfg)
    first_epoch = batches(lengths, cfg.batch_tokens, torch.Generator().manual_seed(cfg.seed))
    steps = max(1, round(cfg.epochs * len(first_epoch)))
    log = Log(out / "sft.jsonl", cfg, steps, state.saved)
    size = sum(p.numel() for p in gpt.parameters())
    print(f"SFT: {len(rows)} demonstrations, {sum(lengths)} tokens, {size} parameters, "
          f"vocabulary {tokenizer.vocab_size}, on {device}")

    done = state.begin(log, gpt=gpt, optimizer=optimizer)
    for step, index in shuffled(lengths, cfg.batch_tokens, order, done, steps):
        lr = set_lr(optimizer, cfg.lr, step - 1, steps, warmup=20, floor=0.1)
        loss = sft_backward(gpt, [rows[i] for i in index], cfg.micro_batch, device, f"step {step}")
        norm = clip_and_step(gpt, optimizer, 1.0, step)
        if step % 25 == 0 or step == steps:
            log(step, loss=loss, lr=lr, grad_norm=norm)
        if step % 100 == 0:
            row, P = val_rows[0]
            show_sample(gpt, tokenizer, row[:P], device)
        state.after(step)

    val_loss = evaluate(gpt, val_rows, min(cfg.batch_tokens, cfg.micro_batch), device)
    save(out / "sft.pt", gpt, tokenizer)
    log.report(val_loss=val_loss)
    state.finish()
    print(f"SFT done: held-out loss {val_loss:.4f} nats per completion token on {len(val_rows)} "
          f"demonstrations; {out / 'sft.pt'}\n")


if __name__ == "__main__":
    run(main, Config)
