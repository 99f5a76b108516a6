"""Continue prompts fast: a KV cache written in place, the prompts read once, then one token a step.

`generate` gives the tokens of GPT.generate in model.py for the same random numbers; the tests compare them.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from data.examples import pad
from lib.fast import packed, static_steps
from lib.memory import check_generation
from model import sample


class KVCache:
    """Keys and values of what was read so far: `k` and `v`, for each layer (B,H,S,D) with room for S places.

    Rows may differ in length: all write to the same next places, padding stays masked for good, and each
    row counts its own positions. The shapes are those of the first keys and values that a layer writes.
    """

    def __init__(self, B, S, device):
        self.k, self.v = {}, {}
        self.hidden = torch.zeros(B, S, dtype=torch.bool, device=device)  # True: padding
        self.length = torch.zeros(B, dtype=torch.long, device=device)
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
        if layer not in self.k:
            S = self.hidden.shape[1]
            self.k[layer], self.v[layer] = (x.new_empty(*x.shape[:2], S, x.shape[3]) for x in (k, v))
        new = slice(self.filled - k.shape[2], self.filled)
        self.k[layer][:, :, new], self.v[layer][:, :, new] = k, v
        return self.k[layer][:, :, : self.filled], self.v[layer][:, :, : self.filled]

    def trim(self, lengths):
        """What was just read ends after `lengths` tokens (B,): mask the padding behind them."""
        places = torch.arange(self.filled, device=lengths.device)
        self.hidden[:, : self.filled] |= places >= (self.filled - self.length + lengths)[:, None]
        self.length = lengths.clone()

    def keep(self, rows):
        """Drop all rows but `rows`, a boolean mask (B,)."""
        for layer in self.k:  # one by one, so that the whole cache is never held twice
            self.k[layer], self.v[layer] = self.k[layer][rows], self.v[layer][rows]
        self.hidden, self.length = self.hidden[rows], self.length[rows]


class StaticCache(nn.Module):
    """A KVCache of fixed shape and address, so that one CUDA graph can replay every decoding step.

    Made from a KVCache that holds the prompts, with room for S places. torch.compile expects buffers to stay
    where they are and writes into them in place; a single tensor of all layers' keys would be copied whole
    at each layer.
    """

    filled = 0  # no step adds places: that they suffice is known beforehand

    def __init__(self, cache, S):
        super().__init__()
        B, length = len(cache.length), cache.length
        tensors = {f"{name}{i}": x.new_empty(*x.shape[:2], S, x.shape[3])
                   for name in "kv" for i, x in getattr(cache, name).items()}
        tensors |= {"hidden": length.new_empty(B, S, dtype=torch.bool), "length": length.clone(),
                    "place": length.new_empty(1)}
        for name, x in tensors.items():
            self.register_buffer(name, x, persistent=False)

    def load(self, cache):
        """Continue where `cache` stands, which has as many rows as the one this was made from."""
        filled = slice(0, cache.filled)
        for name in "kv":
            for i, x in getattr(cache, name).items():
                getattr(self, f"{name}{i}").zero_()[:, :, filled] = x  # zeros: 0 x NaN would pass a mask
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


@torch.inference_mode()
def generate(gpt, tokens, lengths, max_new_tokens, temperature=1.0, top_k=None, top_p=None,
             eos=None, generator=None):
    """Continue each row after its own length: tokens (B,P), lengths (B,) -> (tokens, lengths).

    The new lengths count prompt and response, `eos` included; beyond them the tokens are 0.
    A row stops at its first new `eos` (None: never); temperature 0 is greedy.
    Each row uses its own row of random numbers, so it does not depend on the rows beside it.
    ValueError: P + max_new_tokens > block_size; the prompt is never truncated. UserError: too little memory.
    """
    (B, P), block_size = tokens.shape, gpt.config.block_size
    if P + max_new_tokens > block_size:
        raise ValueError(f"{P} + {max_new_tokens} tokens > block_size {block_size}")
    check_generation(gpt.config, B, P, P + max_new_tokens, tokens.device.type)
    uniform = torch.rand(B, max_new_tokens, generator=generator, device=tokens.device)
    with packed(gpt):
        return _generate(gpt, tokens, lengths, uniform, eos, temperature, top_k, top_p)


def sample_texts(gpt, prompts, eos, max_new_tokens, generator, device):
    """One response to each prompt (token lists): -> prompts with responses; those that do not end are
    dropped."""
    rows = []
    for start in range(0, len(prompts), 64):
        some = prompts[start : start + 64]
        tokens, lengths = pad(some, device)
        tokens, lengths = generate(gpt, tokens, lengths, max_new_tokens, eos=eos, generator=generator)
        texts = [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]
        rows += [text for text, prompt in zip(texts, some, strict=True)
                 if text[-1] == eos and len(text) > len(prompt)]
    return rows


def _generate(gpt, tokens, lengths, uniform, eos, *how):
    """The loop of `generate`: a token a column of uniform (B,max_new_tokens), drawn by sample(…, *how)."""
    (B, P), max_new_tokens = tokens.shape, uniform.shape[1]
    rows = torch.arange(B, device=tokens.device)  # which row of the batch each live row is
    h, cache, read = _read_prompts(gpt, tokens, lengths, P + max_new_tokens)
    real = torch.arange(P, device=tokens.device) < lengths[:, None]
    tokens = F.pad(tokens * real, (0, max_new_tokens))
    lengths = lengths.clone()
    done = torch.zeros(B, dtype=torch.bool, device=tokens.device)
    for step in range(max_new_tokens):
        token = sample(gpt.lm_head(h), uniform[rows, step], *how)
        tokens[rows, lengths[rows]] = token.masked_fill(done, 0)
        lengths[rows] += ~done
        if eos is not None:
            done |= token == eos
            finished = int(done.sum())
            if finished == len(rows):
                break
            if finished * 4 >= len(rows) and not isinstance(cache, StaticCache):
                going = ~done  # dropping rows copies the cache: wait until a quarter of them are done
                cache.keep(going)
                rows, token, done = rows[going], token[going], done[going]
        if step + 1 < max_new_tokens:
            h = read(token[:, None], cache)[:, 0]
    return tokens[:, : int(lengths.max())], lengths


def _read_prompts(gpt, tokens, lengths, S):
    """h of each row's last token (B,C), the cache with room for S, and the function that reads on."""
    (B, P), static = tokens.shape, static_steps(gpt)
    cache = KVCache(B, P if static else S, tokens.device)
    h = gpt.trunk.forward(tokens, cache)[torch.arange(B, device=tokens.device), lengths - 1]
    cache.trim(lengths)
    if not static:
        return h, cache, gpt.trunk.forward  # not the compiled one: shapes change at every step
    # kept between calls: another address or shape would be another CUDA graph, so round S up, never shrink
    last = getattr(gpt, "static_cache", None)
    S = max(S + -S % 128, last.hidden.shape[1] if last else 0)
    if last is None or last.hidden.shape != (B, S):
        gpt.static_cache = StaticCache(cache, S)
    gpt.static_cache.load(cache)
    return h, gpt.static_cache, torch.compile(gpt.trunk.forward, mode="reduce-overhead", dynamic=False)
