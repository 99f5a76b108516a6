"""Continue prompts fast: a KV cache written in place, the prompts read once, then one token a step.

`generate` gives the tokens of GPT.generate in model.py for the same random numbers; the tests compare them.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from data.examples import pad
from lib import ranks
from lib.fast import fixed_steps, packed
from lib.memory import check_generation
from model import sample


class Cache(nn.Module):
    """What the layers keep of B texts that are read in parts, with room for S tokens each.

    model.WholeText says what a layer asks for. A token's place is its position in its own row: padding
    after a short prompt stands behind the row's end, where no token looks, and the row's next tokens
    overwrite it. All tensors are buffers, (B,...), shaped by what a layer first stores.

    fixed: places and addresses never change, so that one CUDA graph can replay every step. (torch.compile
    wants buffers for that, and one for each layer: a single one would be copied whole at each layer.)
    """

    def __init__(self, B, S, device, fixed=False):
        super().__init__()
        self.S, self.fixed = S, fixed
        self.register_buffer("length", torch.zeros(B, dtype=torch.long, device=device), persistent=False)
        self.clear()

    def clear(self):
        """Forget what was read."""
        for x in self.buffers():
            x.zero_()
        self.empty, self.filled, self.expected = True, 0, None  # filled: places in use, of the longest row

    def expect(self, lengths):
        """Of the tokens read next, the first `lengths` (B,) of each row are real, the rest is padding."""
        self.expected = lengths

    def advance(self, T):
        """T more tokens a row are read now; returns this cache."""
        device = self.length.device
        new, self.expected = self.expected, None
        self.positions = self.length[:, None] + torch.arange(T, device=device)  # (B,T)
        self.length += T if new is None else new  # in place, for the CUDA graph
        self.whole, self.empty = self.empty, False
        if not self.fixed:  # else nobody looks at it; that S suffices is known beforehand
            self.filled += T
        S = T if self.whole else self.S if self.fixed else self.filled
        self.key_positions = torch.arange(S, device=device)[None]
        self.places = {}  # for each number of heads
        return self

    @property
    def real(self):
        """(B,T), True where a token that is read now is no padding."""
        return self.positions < self.length[:, None]

    def append(self, name, x):
        """x (B,H,T,D) of the tokens that are read now -> of all up to them, (B,H,S,D)."""
        B, H, T, D = x.shape
        if name not in self._buffers:
            # zeros: 0 x NaN would pass a mask
            self.register_buffer(name, x.new_zeros(B, H, self.S, D), persistent=False)
        kept = getattr(self, name)
        if self.whole:
            kept[:, :, :T] = x
            return x
        if H not in self.places:
            rows = torch.arange(B * H, device=x.device).view(B, H, 1) * self.S
            self.places[H] = (rows + self.positions[:, None]).flatten()  # in (B*H*S,D)
        kept.view(-1, D).index_copy_(0, self.places[H], x.reshape(-1, D))
        return kept[:, :, : self.key_positions.shape[1]]

    def read(self, name):
        """A state (B,...), as `write` left it; None when nothing was read before."""
        return None if self.whole else getattr(self, name)

    def write(self, name, x):
        if name not in self._buffers:
            self.register_buffer(name, torch.empty_like(x), persistent=False)
        getattr(self, name).copy_(x)

    def keep(self, rows):
        """Drop all rows but `rows`: a boolean mask (B,), or indices."""
        for name, x in self._buffers.items():  # one by one, so that the whole cache is never held twice
            setattr(self, name, x[rows])


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

    def some(rows):
        return _generate(gpt, tokens[rows], lengths[rows], uniform[rows], eos, temperature, top_k, top_p)

    with packed(gpt, B):
        made, ends = ranks.together(some, lengths)
    return made[:, : int(ends.max())], ends


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
    """The loop of `generate`: a token a column of uniform (B,max_new_tokens), drawn by sample(…, *how).

    Which rows go on is asked at every step on a CPU, where it costs nothing, and at every 8th elsewhere: for
    the answer of a GPU the host has to wait, and meanwhile starts no next step. What finished rows draw until
    then is thrown away.
    """
    (B, P), max_new_tokens = tokens.shape, uniform.shape[1]
    rows = torch.arange(B, device=tokens.device)  # which row of the batch each live row is
    h, cache, read = _read_prompts(gpt, tokens, lengths, P + max_new_tokens)
    real = torch.arange(P, device=tokens.device) < lengths[:, None]
    tokens = F.pad(tokens * real, (0, max_new_tokens))
    lengths = lengths.clone()
    done = torch.zeros(B, dtype=torch.bool, device=tokens.device)
    every = 1 if tokens.device.type == "cpu" else 8
    for step in range(max_new_tokens):
        token = sample(gpt.logits(h), uniform[rows, step], *how)
        tokens[rows, lengths[rows]] = token.masked_fill(done, 0)
        lengths[rows] += ~done
        if eos is not None:
            done |= token == eos
        if eos is not None and (step + 1) % every == 0:
            going = (~done).nonzero()[:, 0]
            if not len(going):
                break
            # dropping rows copies the cache: wait until a quarter of them are done
            if len(going) * 4 <= len(rows) * 3 and not cache.fixed:
                cache.keep(going)
                rows, token, done = rows[going], token[going], done[going]
        if step + 1 < max_new_tokens:
            h = read(token[:, None], cache)[:, 0]
    return tokens, lengths


def _read_prompts(gpt, tokens, lengths, S):
    """h of each row's last token (B,C), the cache with room for S, and the function that reads on."""
    B, fixed = len(tokens), fixed_steps(gpt)
    if fixed:  # kept between calls: another address or shape would be another CUDA graph
        last = getattr(gpt, "cache", None)
        S = max(S + -S % 128, last.S if last else 0)
        if last is None or (len(last.length), last.S) != (B, S):
            gpt.cache = Cache(B, S, tokens.device, fixed=True)
        gpt.cache.clear()
    cache = gpt.cache if fixed else Cache(B, S, tokens.device)
    cache.expect(lengths)
    h = gpt.trunk.forward(tokens, cache)[torch.arange(B, device=tokens.device), lengths - 1]
    if not fixed:
        return h, cache, gpt.trunk.forward  # not the compiled one: shapes change at every step
    return h, cache, torch.compile(gpt.trunk.forward, mode="reduce-overhead", dynamic=False)
