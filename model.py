"""The network: one transformer trunk, and the two heads that read its hidden states.

    tokens (B,T) -> Trunk -> h (B,T,C) -> lm_head      C x V -> logits (B,T,V)   GPT: what comes next?
                                       -> reward_head  C x 1 -> values (B,T)     RewardModel: how good is it?

    B batch  T time  C = d_model  H heads  D head size  V vocabulary  P prompt length  S tokens to look at

Batches are right-padded, with per-row lengths: padding stands behind every real token, and no token looks
at what stands behind it. The architecture is GPT-2's (Radford et al. 2019, section 2.3).
"""
import copy
import math
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass(kw_only=True)
class GPTConfig:
    """Sizes of the network; the defaults are GPT-2 small.

    Each is a flag of train_sft.py with its comment as help, is kept in checkpoints and brought by --init.
    One more is a line here: int, float, bool or str; a number within metadata["limits"], or else above 0.
    """

    # model
    vocab_size: int = 50257  # tokens
    block_size: int = field(default=1024, metadata={"limits": (2, 2**31)})  # longest text in tokens
    n_layer: int = 12  # transformer blocks
    n_head: int = 12  # attention heads
    d_model: int = 768  # width
    dropout: float = field(default=0.0, metadata={"limits": (0, 0.99)})  # rate; 0 is right for 1 or 2 epochs
    bias: bool = True  # in linear layers and norms


class WholeText:
    """What the tokens of a text look at when it is read at once: one another.

    lib.generate.Cache has the same names for a text that is read in parts, so a layer is written once:
    positions (1,T) or (B,T) of the tokens that are read now, key_positions (1,S) of all that may be looked
    at (a token's own, too), real (1,T) or (B,T): no padding; whole: these are the same tokens.
    """

    whole = True

    def __init__(self, T, device):
        self.positions = self.key_positions = torch.arange(T, device=device)[None]
        self.real = torch.ones_like(self.positions, dtype=torch.bool)

    def append(self, name, x):
        """x of the tokens that are read now, (B,H,T,D) -> of all that may be looked at, (B,H,S,D)."""
        return x

    def read(self, name):
        """A state of any shape (B,...), as `write` left it; None when nothing was read before."""
        return None

    def write(self, name, x):
        pass


def may_look(seen):
    """(B,1,T,S), True where a token may look: at itself and all before it. None: T = S and just that, which
    the fused kernel knows."""
    if seen.whole:
        return None
    return seen.key_positions[:, None, None, :] <= seen.positions[:, None, :, None]


def attend(q, k, v, look, dropout=0.0):
    """Attention of q (B,H,T,D) to keys k and values v (B,H,S,D), where `look` allows it -> (B,H,T,D)."""
    if look is None or q.shape[2] > 1:
        return F.scaled_dot_product_attention(q, k, v, look, dropout, is_causal=look is None)
    # one token a row: by hand this takes 2/3 of the fused function's time
    weights = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
    return torch.where(look, weights, -torch.inf).softmax(-1) @ v


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        if config.d_model % config.n_head:
            raise ValueError(f"d_model {config.d_model} must be divisible by n_head {config.n_head}")
        self.layer, self.n_head, self.dropout = layer, config.n_head, config.dropout
        self.split = [config.n_head] * 3  # heads of queries, keys, values
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=config.bias)
        self.proj = nn.Linear(config.d_model, config.d_model, bias=config.bias)

    def forward(self, x, seen, look):
        """x (B,T,C) -> (B,T,C); seen: WholeText or Cache, look: `may_look` of it."""
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, -1, C // self.n_head).transpose(1, 2)  # (B,3H,T,D)
        q, k, v = qkv.split(self.split, 1)  # 3 x (B,H,T,D)
        k, v = seen.append(f"k{self.layer}", k), seen.append(f"v{self.layer}", v)  # (B,H,S,D)
        y = attend(q, k, v, look, self.dropout if self.training else 0.0)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.d_model, 4 * config.d_model, bias=config.bias)
        self.proj = nn.Linear(4 * config.d_model, config.d_model, bias=config.bias)

    def forward(self, x):
        return self.proj(F.gelu(self.up(x), approximate="tanh"))  # GPT-2 was trained with this form


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.d_model, bias=config.bias)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.d_model, bias=config.bias)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, seen, look):
        x = x + self.drop(self.attn(self.ln_1(x), seen, look))
        return x + self.drop(self.mlp(self.ln_2(x)))


class Trunk(nn.Module):
    """Everything between the tokens and a head. Written once, used by every model and every stage."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.d_model)
        self.wpe = nn.Embedding(config.block_size, config.d_model)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.d_model, bias=config.bias)
        self.apply(self._init)

    def _init(self, module):
        # GPT-2's 0.02 at its width of 768, and wider for narrower nets: with 0.02 at d_model 128 the
        # stories were at loss 0.90 after 400 steps and no head copied from the prompt; with this, at 0.66
        std = 0.02 * math.sqrt(768 / self.config.d_model)
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, (Attention, MLP)):  # GPT-2, section 2.3: residual branches start small
            nn.init.normal_(module.proj.weight, std=std / math.sqrt(2 * self.config.n_layer))

    def forward(self, tokens, cache=None):
        """tokens (B,T), or their embeddings (B,T,C) -> h (B,T,C), after the final norm.

        With a cache (lib/generate.py) the tokens continue what it holds, each row at its own position.
        ValueError: more than block_size tokens, padding included.
        """
        x = tokens if tokens.is_floating_point() else self.wte(tokens)
        T = x.shape[1]
        if T + (0 if cache is None else cache.filled) > self.config.block_size:
            raise ValueError(f"{T} tokens do not fit into block_size {self.config.block_size}")
        seen = WholeText(T, x.device) if cache is None else cache.advance(T)
        x, look = self.drop(x + self.wpe(seen.positions)), may_look(seen)
        for block in self.blocks:
            x = block(x, seen, look)
        return self.ln_f(x)


class GPT(nn.Module):
    """Trunk plus an explicit vocabulary head, d_model x vocab_size, tied to the token embedding."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.trunk = Trunk(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.lm_head.weight = self.trunk.wte.weight  # tied: Press & Wolf 2017

    def forward(self, tokens):
        """tokens (B,T) -> logits (B,T,V), always of every position."""
        return self.logits(self.trunk(tokens))

    def logits(self, h):
        """Hidden states (...,C) -> logits (...,V); training, scoring and generation all take them here."""
        return self.lm_head(h)

    def logps(self, h, targets, temperature=1.0):
        """Log-probability of each target token: h (N,C), targets (N,) -> (N,) float32, in nats."""
        return -F.cross_entropy(self.logits(h).float() / temperature, targets, reduction="none")

    @torch.inference_mode()
    def generate(self, tokens, lengths, max_new_tokens, temperature=1.0, top_k=None, top_p=None,
                 eos=None, generator=None):
        """Continue each row after its own length: tokens (B,P), lengths (B,) -> (tokens, lengths).

        To be read, not run: it reads the whole text again for every token. lib.generate.generate draws the
        same tokens from the same random numbers, fast. The new lengths count `eos`, at whose first new one a
        row stops (None: never); beyond them tokens are 0. ValueError: P + max_new_tokens > block_size.
        """
        B, P = tokens.shape
        if P + max_new_tokens > self.config.block_size:
            raise ValueError(f"{P} + {max_new_tokens} tokens > block_size {self.config.block_size}")
        rows, going = torch.arange(B, device=tokens.device), torch.ones_like(lengths, dtype=torch.bool)
        uniform = torch.rand(B, max_new_tokens, generator=generator, device=tokens.device)
        prompt = torch.arange(P, device=tokens.device) < lengths[:, None]
        tokens, lengths = F.pad(tokens * prompt, (0, max_new_tokens)), lengths.clone()
        for u in uniform.T:
            logits = self(tokens)[rows, lengths - 1]  # (B,V), of each row's last token
            token = sample(logits, u, temperature, top_k, top_p)
            tokens[rows, lengths] = token * going
            lengths += going
            if eos is not None:
                going &= token != eos
        return tokens[:, : int(lengths.max())], lengths


def sample(logits, uniform, temperature=1.0, top_k=None, top_p=None):
    """Draw one token a row: logits (B,V), uniform (B,) in [0,1) -> (B,).

    Inverts the cumulative distribution, so a row takes one random number, not V, and does not depend on
    the rows beside it. top_k keeps the k likeliest tokens, top_p the fewest whose probabilities add up to
    top_p (Holtzman et al. 2020). Temperature 0 is greedy.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None:
        ordered, index = logits.softmax(-1).sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # probability of all likelier tokens
        outside = torch.zeros_like(logits, dtype=torch.bool).scatter(
            -1, index, (before >= top_p) & (before > 0))  # the likeliest always stays
        logits = logits.masked_fill(outside, -torch.inf)
    cumulative = logits.softmax(-1).cumsum(-1)
    # (1 - uniform) lies in (0,1]: the first place that reaches it always has probability > 0
    threshold = (1 - uniform[:, None]) * cumulative[:, -1:]
    # clamp: with NaN there is no such place; what checks log-probs says so
    return torch.searchsorted(cumulative, threshold).squeeze(-1).clamp(max=logits.shape[-1] - 1)


class RewardModel(nn.Module):
    """Trunk plus a head of d_model x 1: the vocabulary head and its softmax are gone.

    `pool` says where the text is read: at the "last" real token, by "mean" or "max" over the real tokens,
    or at an appended reward "token", a learned embedding that is no vocabulary entry.
    The same class is the critic of PPO: `forward` gives a value for every prefix.
    """

    POOLS = ("last", "mean", "max", "token")

    def __init__(self, trunk, pool="last"):
        super().__init__()
        if pool not in self.POOLS:
            raise ValueError(f"unknown pool {pool!r}: expected {', '.join(self.POOLS)}")
        self.config, self.trunk, self.pool = trunk.config, trunk, pool
        self.reward_head = nn.Linear(self.config.d_model, 1)
        # Ziegler et al. 2019: h has norm ~ sqrt(d_model) after the final norm, so scores start ~ N(0,1)
        nn.init.normal_(self.reward_head.weight, std=1 / math.sqrt(self.config.d_model + 1))
        nn.init.zeros_(self.reward_head.bias)
        if pool == "token":
            self.reward_token = nn.Parameter(torch.empty(self.config.d_model))
            nn.init.normal_(self.reward_token, std=0.02)
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    @classmethod
    def from_gpt(cls, gpt, pool="last"):
        """The head swap: a copy of the trunk without the vocabulary head, under a new reward head."""
        return cls(copy.deepcopy(gpt.trunk), pool)

    @property
    def room(self):
        """Tokens of the longest text that `score` takes; an appended reward token needs a place, too."""
        return self.config.block_size - (self.pool == "token")

    def forward(self, tokens):
        """tokens (B,T) -> values (B,T): one score for every prefix, in standard deviations.

        "mean" and "max" pool over the prefix. With "token" this is the head on each hidden state,
        without the reward token: what a critic made from this model starts from.
        """
        h = self.trunk(tokens)
        if self.pool == "mean":
            h = h.cumsum(1) / torch.arange(1, h.shape[1] + 1, device=h.device)[:, None]
        elif self.pool == "max":
            h = h.cummax(1).values
        return self._head(h)

    def score(self, tokens, lengths):
        """Score of each whole text: tokens (B,T), lengths (B,) of real tokens -> (B,).

        What stands behind a row's end may be anything, and its hidden states NaN: neither the score nor a
        gradient may see them.
        """
        rows = torch.arange(len(tokens), device=tokens.device)
        if self.pool != "token":
            return self(tokens)[rows, lengths - 1]  # the value of the last real prefix
        x = F.pad(self.trunk.wte(tokens), (0, 0, 0, 1))  # (B,T+1,C)
        x[rows, lengths] = self.reward_token.to(x.dtype)
        return self._head(self.trunk(x)[rows, lengths])

    def _head(self, h):
        return (self.reward_head(h).squeeze(-1).float() - self.shift) / self.scale

    @torch.no_grad()
    def normalise(self, scores):
        """Store shift and scale so that `scores` (N,), made by this model, get mean 0 and sd 1.

        ValueError: the model is normalised already (it never is twice), or the scores are all equal.
        """
        if self.shift != 0 or self.scale != 1:
            raise ValueError("this reward model is normalised already")
        if len(scores) < 2 or not scores.std() > 0:
            raise ValueError("scores that are all equal can't be normalised")
        self.shift.copy_(scores.mean())
        self.scale.copy_(scores.std(unbiased=False))
