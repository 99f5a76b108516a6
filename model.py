"""The network: one transformer trunk and the two heads that read it.

    B batch   T time   C = d_model   H heads   D head size   V vocabulary   P prompt length

    tokens (B,T) -> Trunk -> h (B,T,C) -> lm_head      C x V -> logits (B,T,V)   GPT: what comes next?
                                       -> reward_head  C x 1 -> values (B,T)     RewardModel: how good is it?

Everything is right-padded and every row carries its own length. A pad is never looked at by a real
token, because attention only looks back; so there is no pad token, and a mask for pads only in the
cache, where new tokens are written behind them.
The architecture is GPT-2's (Radford et al. 2019, section 2.3), with its weight names spelled out.
"""
import copy
import math
import platform
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 2**23  # numbers of logits held in one piece: 32 MiB in float32


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of the network; the defaults are GPT-2 small (GPT-3 small has twice its block_size)."""

    vocab_size: int = 50257
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    d_model: int = 768
    dropout: float = 0.0
    bias: bool = True

    def __post_init__(self):
        if self.d_model % self.n_head:
            raise ValueError(f"d_model {self.d_model} is no multiple of n_head {self.n_head}")


class KVCache:
    """Keys and values of what was read so far: `k` and `v`, for each layer (B,H,S,D) with room for S.

    Rows of unequal length need no left padding. All rows write into the same places, those behind what
    is filled; a pad's place stays hidden for good, and each row counts its own positions.
    """

    def __init__(self, trunk, B, S):
        config, weight = trunk.config, trunk.wte.weight
        shape = (B, config.n_head, S, config.d_model // config.n_head)
        self.k, self.v = ([weight.new_empty(shape) for _ in range(config.n_layer)] for _ in "kv")
        self.hidden = torch.zeros(B, S, dtype=torch.bool, device=weight.device)
        self.length = torch.zeros(B, dtype=torch.long, device=weight.device)
        self.filled = 0

    def advance(self, T):
        """Make place for T more tokens a row; returns their positions (B,T)."""
        positions = self.length[:, None] + torch.arange(T, device=self.length.device)
        self.length, self.filled = self.length + T, self.filled + T
        places = torch.arange(self.filled, device=self.length.device)
        later = places > places[-T:, None]  # (T,filled)
        self.mask = self.hidden[:, None, None, : self.filled] | later  # (B,1,T,filled)
        return positions

    def write(self, layer, k, v):
        """Store k and v (B,H,T,D) of the newest T tokens; returns all of that layer so far."""
        new = slice(self.filled - k.shape[2], self.filled)
        self.k[layer][:, :, new], self.v[layer][:, :, new] = k, v
        return self.k[layer][:, :, : self.filled], self.v[layer][:, :, : self.filled]

    def trim(self, lengths):
        """What was just read ends after `lengths` tokens (B,): hide the pads behind them."""
        places = torch.arange(self.filled, device=lengths.device)
        self.hidden[:, : self.filled] |= places >= (self.filled - self.length + lengths)[:, None]
        self.length = lengths.clone()

    def keep(self, rows):
        """Forget all rows but `rows`, a boolean mask (B,)."""
        for layer in range(len(self.k)):  # one by one, so that never all is there twice
            self.k[layer], self.v[layer] = self.k[layer][rows], self.v[layer][rows]
        self.hidden, self.length = self.hidden[rows], self.length[rows]


class StaticCache(nn.Module):
    """What a `KVCache` holds after the prompts, with room for S, in one shape and at one address for all
    steps of one token that follow: they are the same work, which a CUDA graph can record once and repeat.

    torch.compile takes buffers to stay where they are and writes into them in place; one tensor of all
    layers' keys it would copy as a whole at each layer.
    """

    filled = 0  # no step adds places, and that they suffice is known beforehand

    def __init__(self, cache, S):
        super().__init__()
        (B, H, _, D), length = cache.k[0].shape, cache.length
        tensors = {f"{name}{i}": cache.k[0].new_empty(B, H, S, D) for name in "kv"
                   for i in range(len(cache.k))}
        tensors |= {"hidden": length.new_empty(B, S, dtype=torch.bool), "length": length.clone(),
                    "place": length.new_empty(1)}
        for name, x in tensors.items():
            self.register_buffer(name, x, persistent=False)

    def load(self, cache):
        """Go on where `cache` stands, which has as many rows as the first one."""
        filled = slice(0, cache.filled)
        for name in "kv":
            for i, x in enumerate(getattr(cache, name)):
                getattr(self, f"{name}{i}").zero_()[:, :, filled] = x  # zeros: NaN would pass a mask, 0 x NaN
        self.hidden.fill_(True)[:, filled] = cache.hidden
        self.length.copy_(cache.length)
        self.place.fill_(cache.filled - 1)

    def advance(self, T):
        """Go to the next place; returns the positions (B,1) of the one token a row."""
        self.place.add_(1), self.length.add_(1)
        self.hidden.index_fill_(1, self.place, False)
        return self.length[:, None] - 1

    @property
    def mask(self):
        return self.hidden[:, None, None]  # (B,1,1,S)

    def write(self, layer, k, v):
        """As KVCache.write, for k and v (B,H,1,D); returns all S places."""
        keys, values = getattr(self, f"k{layer}"), getattr(self, f"v{layer}")
        return keys.index_copy_(2, self.place, k), values.index_copy_(2, self.place, v)


def cpu_is_amd():
    """Whether this is an AMD CPU. PyTorch gives matrix products on a CPU to MKL, which is slow on those."""
    info = Path("/proc/cpuinfo")  # Linux; platform knows only on Windows
    return "AuthenticAMD" in (info.read_text() if info.exists() else platform.processor())


ON_AMD = cpu_is_amd()


def onednn(x, weight, bias=None):
    """x (...,C) @ weight (out,C) transposed + bias (out,) by oneDNN; no gradients."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class Product(torch.autograd.Function):
    """onednn(x, weight, bias) with gradients, x (N,C): three products of one kind."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return onednn(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        # the first factor is copied when it is turned round: let it be the narrower one
        dw = onednn(x.T, dy.T).T if x.shape[1] <= dy.shape[1] else onednn(dy.T, x.T)
        return onednn(dy, weight.T), dw, dy.sum(0) if ctx.needs_input_grad[2] else None


class Linear(nn.Linear):
    """nn.Linear, which on an AMD CPU takes oneDNN where PyTorch takes MKL.

    (1500 x 128) @ (128 x 512) with its gradients, 2 cores of an AMD Zen 5: 200 GFLOP/s by MKL, 420 by oneDNN;
    2 cores of an Intel Xeon: 260 by MKL, 220 by oneDNN.
    """

    packed = None  # see `packed`

    def forward(self, x):
        """x (...,C) -> (...,out)."""
        if torch.compiler.is_compiling():  # asked first: it can't look into the rest
            return super().forward(x)
        if self.packed is not None:
            return onednn(x, self.packed, self.bias)
        if not (ON_AMD and onednn_takes(x)) or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        rows = x.flatten(0, -2)  # (N,C)
        N = len(rows)
        if N % 128:  # oneDNN compiles and keeps code for each N, 1 GB with ragged batches: let there be few
            rows = F.pad(rows, (0, 0, 0, -N % 128))
        return Product.apply(rows, self.weight, self.bias)[:N].unflatten(0, x.shape[:-1])


def onednn_takes(x):
    """Whether `onednn` can multiply this tensor: float32 on a CPU, and neither empty nor a single vector."""
    matrix = x.dtype == torch.float32 and x.dim() > 1 and x.numel() > 0
    return matrix and x.device.type == "cpu" and torch.backends.mkldnn.is_available()


@contextmanager
def packed(model):
    """While it lasts, each `Linear` of the model reads a copy of its weights in the order oneDNN wants them.

    With few rows, as in generation, a product takes a third of the time or less on AMD, two thirds on Intel,
    where small ones gain nothing; (16 x 768) @ (768 x 50257): 17 ms by MKL and 4 ms so on AMD, 11.5 and 7.8
    on Intel. The copies cost as much memory again and are gone afterwards.
    """
    layers = [x for x in model.modules() if isinstance(x, Linear) and onednn_takes(x.weight)
              and (ON_AMD or x.weight.numel() > 2**17)]
    for layer in layers:
        layer.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight, 16)  # good for 1 to 1,000 rows
    try:
        yield
    finally:
        for layer in layers:
            layer.packed = None


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.n_head, self.dropout = layer, config.n_head, config.dropout
        self.qkv = Linear(config.d_model, 3 * config.d_model, bias=config.bias)
        self.proj = Linear(config.d_model, config.d_model, bias=config.bias)

    def forward(self, x, positions, cache=None):
        """x (B,T,C) at positions (T,), or (B,T) with a cache -> (B,T,C)."""
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x (B,H,T,D)
        if cache is not None:
            k, v = cache.write(self.layer, k, v)  # (B,H,S,D), S tokens so far
        if k.shape[2] == T:  # nothing came before: plain causal attention
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True,
                                               dropout_p=self.dropout if self.training else 0.0)
        else:  # by hand: for one token a row this takes 2/3 of the time of the fused function
            weights = q @ k.transpose(2, 3) / math.sqrt(C // self.n_head)
            y = weights.masked_fill(cache.mask, -torch.inf).softmax(-1) @ v  # (B,H,T,D)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = Linear(config.d_model, 4 * config.d_model, bias=config.bias)
        self.proj = Linear(4 * config.d_model, config.d_model, bias=config.bias)

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

    def forward(self, x, positions, cache=None):
        x = x + self.drop(self.attn(self.ln_1(x), positions, cache))
        return x + self.drop(self.mlp(self.ln_2(x)))


class Trunk(nn.Module):
    """Everything between the tokens and a head. Written once, used by every model and every stage."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.bf16 = self.recompute = self.static = False  # see `tune`
        self.wte = nn.Embedding(config.vocab_size, config.d_model)
        self.wpe = nn.Embedding(config.block_size, config.d_model)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.d_model, bias=config.bias)
        self.apply(self._init)

    def _init(self, module):
        # GPT-2's 0.02 at its width of 768, and wider for narrower nets: with 0.02 at d_model 128 the
        # stories were at loss 0.90 after 400 steps, and no head copied from the prompt; so, at 0.66
        std = 0.02 * math.sqrt(768 / self.config.d_model)
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, (Attention, MLP)):  # GPT-2, section 2.3: residual branches start small
            nn.init.normal_(module.proj.weight, std=std / math.sqrt(2 * self.config.n_layer))

    def tune(self, bf16, recompute, compile):
        """How `forward` computes where there is no cache. bf16: the blocks' matrix products in bfloat16;
        residuals, norms and heads stay float32. recompute: only each block's input is kept for the
        backward pass, which computes the block again (Chen et al. 2016). compile: by torch.compile; on a
        GPU also the steps of `generate`, each as one CUDA graph."""
        self.bf16, self.recompute = bf16, recompute
        self.static = compile and self.wte.weight.is_cuda
        if compile:
            self.compile(dynamic=True)  # lengths differ from batch to batch

    def forward(self, tokens, cache=None):
        """tokens (B,T), or their embeddings (B,T,C) -> h (B,T,C), after the final norm.

        With a `KVCache` the tokens continue what the cache holds, each row at its own position.
        Raises ValueError when they would take more than block_size places, pads included.
        """
        x = tokens if tokens.is_floating_point() else self.wte(tokens)
        T = x.shape[1]
        if T + (cache.filled if cache else 0) > self.config.block_size:
            raise ValueError(f"{T} tokens do not fit into block_size {self.config.block_size}")
        positions = cache.advance(T) if cache else torch.arange(T, device=x.device)
        x = self.drop(x + self.wpe(positions))
        bf16 = self.bf16 and cache is None
        recompute = self.recompute and cache is None and torch.is_grad_enabled()
        with torch.autocast(x.device.type, torch.bfloat16) if bf16 else nullcontext():
            for block in self.blocks:
                x = (checkpoint(block, x, positions, use_reentrant=False) if recompute
                     else block(x, positions, cache))
        return self.ln_f(x)


class GPT(nn.Module):
    """Trunk plus an explicit vocabulary head, d_model x vocab_size, tied to the token embedding."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.trunk = Trunk(config)
        self.lm_head = Linear(config.d_model, config.vocab_size, bias=False)
        self.lm_head.weight = self.trunk.wte.weight  # tied: Press & Wolf 2017
        self.static_cache = None  # of the last `generate`: another address would be another CUDA graph

    def forward(self, tokens):
        """tokens (B,T) -> logits (B,T,V), always of every position."""
        return self.lm_head(self.trunk(tokens))

    def logps(self, h, targets, temperature=1.0):
        """Log-probability of each target token: h (N,C), targets (N,) -> (N,) float32, in nats.

        The head runs only on the N positions given, and in pieces that are computed again in the
        backward pass, so that (B,T,V) logits are never held. Equals log_softmax(logits/temperature)
        gathered at the target, to rounding.
        """
        piece = max(1, LOGITS_AT_ONCE // self.config.vocab_size)
        if len(h) <= piece:
            return self._logps(h, targets, temperature)
        pieces = zip(h.split(piece), targets.split(piece))
        return torch.cat([checkpoint(self._logps, a, b, temperature, use_reentrant=False,
                                     preserve_rng_state=False) for a, b in pieces])

    def _logps(self, h, targets, temperature):
        logits = self.lm_head(h).float() / temperature
        return -F.cross_entropy(logits, targets, reduction="none")

    @torch.inference_mode()
    def generate(self, tokens, lengths, max_new_tokens, temperature=1.0, top_k=None, top_p=None,
                 eos=None, generator=None):
        """Continue each row after its own length: tokens (B,P), lengths (B,) -> (tokens, lengths).

        The new lengths count prompt and response, `eos` included; beyond them the tokens are 0.
        A row stops at its first new `eos` (None: never); temperature 0 takes the likeliest token.
        Each row uses its own row of random numbers, so it does not depend on the rows beside it.
        Raises ValueError when P + max_new_tokens > block_size: the prompt is never cropped.
        """
        B, P = tokens.shape
        if P + max_new_tokens > self.config.block_size:
            raise ValueError(f"prompt {P} + {max_new_tokens} new tokens > block_size "
                             f"{self.config.block_size}")
        uniform = torch.rand(B, max_new_tokens, generator=generator, device=tokens.device)
        draw = lambda logits, u: sample(logits, u, temperature, top_k, top_p)
        with packed(self):
            return self._generate(tokens, lengths, uniform, draw, eos)

    def _generate(self, tokens, lengths, uniform, draw, eos):
        """The loop of `generate`: a token a column of uniform (B,max_new_tokens), by draw(logits, u)."""
        (B, P), max_new_tokens = tokens.shape, uniform.shape[1]
        rows = torch.arange(B, device=tokens.device)  # which row of the batch each live row is
        h, cache, read = self._read_prompts(tokens, lengths, P + max_new_tokens)
        real = torch.arange(P, device=tokens.device) < lengths[:, None]
        tokens = F.pad(tokens * real, (0, max_new_tokens))
        lengths = lengths.clone()
        done = torch.zeros(B, dtype=torch.bool, device=tokens.device)
        for step in range(max_new_tokens):
            token = draw(self.lm_head(h), uniform[rows, step])
            tokens[rows, lengths[rows]] = token.masked_fill(done, 0)
            lengths[rows] += ~done
            if eos is not None:
                done |= token == eos
                finished = int(done.sum())
                if finished == len(rows):
                    break
                if finished * 4 >= len(rows) and not self.trunk.static:
                    going = ~done  # dropping copies the cache: it was put off until it pays
                    cache.keep(going)
                    rows, token, done = rows[going], token[going], done[going]
            if step + 1 < max_new_tokens:
                h = read(token[:, None], cache)[:, 0]
        return tokens[:, : int(lengths.max())], lengths

    def _read_prompts(self, tokens, lengths, S):
        """h of each row's last token (B,C), the cache with room for S, and what reads the tokens to come."""
        (B, P), static = tokens.shape, self.trunk.static
        cache = KVCache(self.trunk, B, P if static else S)
        h = self.trunk.forward(tokens, cache)[torch.arange(B, device=tokens.device), lengths - 1]
        cache.trim(lengths)
        if not static:
            return h, cache, self.trunk.forward  # not the compiled one: shapes change at every step
        # few shapes, for each is compiled: S grows only
        S = max(S + -S % 128, self.static_cache.hidden.shape[1] if self.static_cache else 0)
        if self.static_cache is None or self.static_cache.hidden.shape != (B, S):
            self.static_cache = StaticCache(cache, S)
        self.static_cache.load(cache)
        return h, self.static_cache, torch.compile(self.trunk.forward, mode="reduce-overhead", dynamic=False)


def sample(logits, uniform, temperature=1.0, top_k=None, top_p=None):
    """Draw one token a row: logits (B,V), uniform (B,) in [0,1) -> (B,).

    Inverse of the cumulative distribution, with one random number a row instead of V of them.
    top_k keeps the k likeliest tokens, top_p the fewest whose probabilities add up to top_p
    (Holtzman et al. 2020). Temperature 0 takes the likeliest token.
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
    return torch.searchsorted(cumulative, threshold).squeeze(-1)


class RewardModel(nn.Module):
    """Trunk plus a head of d_model x 1: the vocabulary head and its softmax are gone.

    `pool` says where the text is read: "last" real token, "mean" or "max" over the real tokens, or
    an appended reward "token", a learned embedding that is no vocabulary entry.
    The same class is the critic of PPO: `forward` gives a value for every prefix.
    """

    POOLS = ("last", "mean", "max", "token")

    def __init__(self, trunk, pool="last"):
        super().__init__()
        if pool not in self.POOLS:
            raise ValueError(f"pool {pool!r} is none of {', '.join(self.POOLS)}")
        self.config, self.trunk, self.pool = trunk.config, trunk, pool
        self.reward_head = nn.Linear(self.config.d_model, 1)
        # Ziegler et al. 2019: h has norm ~ sqrt(d_model) after the final norm, so scores start ~ N(0,1)
        nn.init.normal_(self.reward_head.weight, std=1 / math.sqrt(self.config.d_model + 1))
        nn.init.zeros_(self.reward_head.bias)
        if pool == "token":
            self.reward_token = nn.Parameter(0.02 * torch.randn(self.config.d_model))
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    @classmethod
    def from_gpt(cls, gpt, pool="last"):
        """The head swap: a copy of the trunk without the vocabulary head, under a new reward head."""
        return cls(copy.deepcopy(gpt.trunk), pool)

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
        """Score of each whole text: tokens (B,T), lengths (B,) of real tokens -> (B,)."""
        rows = torch.arange(len(tokens), device=tokens.device)
        if self.pool != "token":
            return self(tokens)[rows, lengths - 1]  # the score is the value of the whole text
        x = F.pad(self.trunk.wte(tokens), (0, 0, 0, 1))  # (B,T+1,C)
        x[rows, lengths] = self.reward_token.to(x.dtype)
        return self._head(self.trunk(x)[rows, lengths])

    def _head(self, h):
        return (self.reward_head(h).squeeze(-1).float() - self.shift) / self.scale

    @torch.no_grad()
    def normalise(self, scores):
        """Store shift and scale so that `scores` (N,), made by this model, get mean 0 and sd 1.

        Raises ValueError when the model carries a normalisation already: it is never applied twice.
        """
        if self.shift != 0 or self.scale != 1:
            raise ValueError("this reward model is normalised already")
        if len(scores) < 2 or not scores.std() > 0:
            raise ValueError("scores that are all equal can't be normalised")
        self.shift.copy_(scores.mean())
        self.scale.copy_(scores.std(unbiased=False))
