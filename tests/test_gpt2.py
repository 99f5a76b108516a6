"""What is GPT-2's own in model.py: another architecture changes these three tests and no others."""
import copy
import math

import numpy as np
import pytest
import torch

from model import GPT, GPTConfig


def numpy_gpt(weights, n_layer, n_head, tokens):
    """GPT-2's forward pass from its definition: one row of tokens (T,) -> logits (T,V)."""
    w = {name: value.double().numpy() for name, value in weights.items()}

    def linear(x, name):
        return x @ w[name + ".weight"].T + w.get(name + ".bias", 0)

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * w[name + ".weight"] + w.get(name + ".bias", 0)

    T = len(tokens)
    x = w["trunk.wte.weight"][tokens] + w["trunk.wpe.weight"][:T]
    D = x.shape[1] // n_head
    for layer in range(n_layer):
        at = f"trunk.blocks.{layer}."
        q, k, v = np.split(linear(norm(x, at + "ln_1"), at + "attn.qkv"), 3, axis=1)
        heads = []
        for head in range(n_head):
            part = slice(head * D, (head + 1) * D)
            y = np.zeros((T, D))
            for t in range(T):
                e = np.exp(q[t, part] @ k[: t + 1, part].T / math.sqrt(D))
                y[t] = e / e.sum() @ v[: t + 1, part]
            heads.append(y)
        x = x + linear(np.concatenate(heads, 1), at + "attn.proj")
        u = linear(norm(x, at + "ln_2"), at + "mlp.up")
        u = 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        x = x + linear(u, at + "mlp.proj")
    return norm(x, "trunk.ln_f") @ w["lm_head.weight"].T


@pytest.mark.parametrize("bias", [True, False])
def test_forward_equals_numpy_gpt(tiny, rng, bias):
    gpt, tokens = tiny(bias=bias), torch.randint(17, (2, 32), generator=rng)
    for row, logits in zip(tokens, gpt(tokens).detach(), strict=True):
        want = numpy_gpt(gpt.state_dict(), 2, 2, row.numpy())
        np.testing.assert_allclose(logits.numpy(), want, atol=1e-4)


def test_M15_M16_head_and_embedding_are_tied(tiny):
    for gpt in (tiny(), copy.deepcopy(tiny())):
        assert gpt.lm_head.weight is gpt.trunk.wte.weight


def test_number_of_parameters():
    """GPT-2 small has 124,439,808."""
    with torch.device("meta"):
        gpt = GPT(GPTConfig())
    assert sum(p.numel() for p in gpt.parameters()) == 124_439_808
    assert gpt.trunk.wpe.weight.shape == (1024, 768)
