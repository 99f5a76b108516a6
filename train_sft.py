"""Demonstrations -> out/sft.pt: train a GPT from scratch to answer prompts as demonstrated.

The loss is the cross-entropy of the completion's tokens and of the end-of-text token after them,
never of the prompt (Ouyang et al. 2022, section 3.5, leave open whether theirs is). It is divided by
their number in the whole optimizer step, so tokens of short and long answers count alike.

    python train_sft.py                                 # the built-in stories, from scratch
    python train_sft.py --data my_folder                # your own sft.jsonl and sft_val.jsonl
    python train_sft.py --init out/gpt2.pt --lr 5e-5    # from GPT-2's weights, see tools/hf.py
"""
from dataclasses import dataclass

import torch

from data.bpe_dropout import splitter
from data.examples import encode_demonstrations, open_data, pad, response_mask, row_sizes
from data.records import read_sft
from data.split import read_split
from lib import ranks
from lib.checks import check_model
from lib.common import clip_and_step, count_steps, finite, pieces, places, set_lr, shuffled
from lib.curve import Curve, sample
from lib.fast import in_pieces, prepare
from lib.flags import Shared, bounded, cli, pick_device
from lib.memory import check_training
from lib.report import print_sample, report_ngrams
from lib.resume import Run
from lib.start import start_sft
from model import GPTConfig


@dataclass
class Config(Shared, GPTConfig):
    # run
    data: str = "stories"  # folder with sft.jsonl, or "stories", which is generated at the first run
    out: str = "out"  # folder for the results
    init: str = ""  # checkpoint to start from instead of from scratch; it fixes the sizes and tokenizer
    # model
    tokenizer: str = ""  # "gpt2", "bytes" or a BPE file; default: a BPE trained on the demonstrations
    vocab_size: int = None  # of the BPE that is trained here
    n_layer: int = 4
    n_head: int = 4
    d_model: int = 128
    block_size: int = bounded(None, 2)
    dropout: float = bounded(None, 0, 0.99)
    # training
    epochs: float = None  # passes over the demonstrations
    bpe_dropout: float = bounded(None, 0, 0.99)  # share of tokens that are split in two, others in each step
    batch_tokens: int = None  # tokens in an optimizer step, padding included
    micro_batch: int = 16384  # tokens in a forward pass; without dropout it changes no result
    lr: float = bounded(None, 0)  # peak of the learning rate
    weight_decay: float = bounded(0.1, 0)  # on matrices only
    keep: str = "best"  # which weights are saved: the "best" on held-out data, or the "last"


def sft_batch(rows, device):
    """[(tokens, P)] -> tokens (B,T), mask (B,T-1) on the CPU, True at t if token t+1 is a completion's."""
    tokens, lengths = pad([row for row, _ in rows])
    P = torch.tensor([p for _, p in rows])
    return tokens.to(device), response_mask(lengths, P, tokens.shape[1])


def sft_loss(gpt, tokens, mask):
    """Summed negative log-probability of the tokens under `mask` in nats, and their number.

    The vocabulary head runs at those positions only.
    """
    at = places(mask, tokens.device)
    h = gpt.trunk(tokens[:, :-1]).flatten(0, 1)[at]  # (N,C)
    return -in_pieces(gpt.logps, gpt, h, tokens[:, 1:].flatten()[at]).sum(), len(at)


def sft_backward(gpt, rows, micro_batch, device, weight=1.0):
    """Add the gradients of weight x the loss of `rows`, [(tokens, P)], to .grad, in pieces of micro_batch
    tokens; returns {"loss": [nats of each piece]} and the number of supervised tokens in all."""
    count, losses = sum(len(row) - P for row, P in rows), []
    for piece in pieces([len(row) for row, _ in rows], micro_batch):
        loss, _ = sft_loss(gpt, *sft_batch([rows[i] for i in piece], device))
        (weight * loss / count).backward()
        losses.append(loss.detach())
    return {"loss": losses}, count


@torch.no_grad()
def evaluate(gpt, rows, budget, device):
    """Loss per completion token in nats over all rows."""
    gpt.eval()
    loss = 0.0
    for index in pieces([len(row) for row, _ in rows], budget):
        loss += sft_loss(gpt, *sft_batch([rows[i] for i in index], device))[0].item()
    gpt.train()
    return ranks.total(loss) / sum(len(row) - P for row, P in rows)


def make_optimizer(gpt, cfg):
    """AdamW, decay on matrices only (not on biases and norms), betas of GPT-3 (Brown et al. 2020, B)."""
    matrices = [p for p in gpt.parameters() if p.dim() >= 2]
    others = [p for p in gpt.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": cfg.weight_decay},
              {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), fused=True)


def main(cfg):
    torch.manual_seed(cfg.seed)
    order = torch.Generator().manual_seed(cfg.seed)
    device = pick_device(cfg.device)
    folder, _ = open_data(cfg.data)
    files = [folder / name for name in ("sft.jsonl", "sft_val.jsonl", "preferences.jsonl")]
    run = Run("sft", cfg, [*files, cfg.init, cfg.tokenizer], device)

    train, val = read_split(read_sft, folder / "sft.jsonl", cfg)
    gpt, tokenizer, cfg = start_sft(cfg, train, val, folder)
    check_model(prepare(gpt, device))
    prepare(gpt, device, cfg)
    rows = encode_demonstrations(train, tokenizer, gpt.config.block_size, "sft.jsonl")
    val_rows = encode_demonstrations(val, tokenizer, gpt.config.block_size, "sft_val.jsonl")
    split = splitter(tokenizer, gpt.config.block_size, cfg)
    optimizer = make_optimizer(gpt, cfg)
    plan = {"lengths": [n for [n] in row_sizes(rows)], "budget": cfg.batch_tokens}
    at_once = min(cfg.micro_batch, cfg.batch_tokens, sum(plan["lengths"]))
    check_training(gpt.config, at_once, cfg, device.type)
    steps = count_steps(cfg.epochs, cfg.seed, **plan)
    size = sum(p.numel() for p in gpt.parameters())
    print(f"SFT: {len(rows)} demonstrations, {sum(plan['lengths'])} tokens, {size} parameters, "
          f"vocabulary {tokenizer.vocab_size}, on {device}")

    some, budget = val_rows[: sample([row for row, _ in val_rows])], min(cfg.batch_tokens, cfg.micro_batch)
    curve = Curve(gpt, lambda: {"val_loss": evaluate(gpt, some, budget, device)}, steps, cfg.keep)
    gpt.train()
    done = run.begin(cfg, steps, gpt=gpt, optimizer=optimizer, **curve.parts)
    for step, index in shuffled(**plan, generator=order, done=done, steps=steps):
        if curve.over:
            break
        lr = set_lr(optimizer, cfg.lr, step - 1, steps, warmup=20, floor=0.1)
        parts, count = sft_backward(gpt, split([rows[i] for i in index], step), cfg.micro_batch, device)
        numbers = clip_and_step(gpt, optimizer, 1.0, step, parts)
        curve.add(**numbers | {"loss": numbers["loss"] / count})
        curve.look(step, run.log)
        if step % 25 == 0 or step in (1, steps) or curve.over:
            run.log(step, **curve.means(), lr=lr)
        if step % 100 == 0:
            row, P = val_rows[0]
            print_sample(gpt, tokenizer, row[:P])
        run.after(step, curve.over)

    curve.restore()
    val_loss = evaluate(gpt, val_rows, budget, device)
    finite("held-out loss", loss=val_loss)
    run.finish(gpt, tokenizer, {"val_loss": val_loss, **report_ngrams(val_loss, gpt, rows, val_rows, curve)})
    print(f"SFT done: held-out loss {val_loss:.4f} nats per completion token on {len(val_rows)} "
          f"demonstrations; {run.result}\n")


if __name__ == "__main__":
    cli(main, Config)
