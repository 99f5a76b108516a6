"""What is GPT-2's own in model.py, and the form of the reward head. Another architecture changes these tests
and no others."""
import copy
import math

import numpy as np
import pytest
import torch

import model
from model import GPT, GPTConfig, RewardModel


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
        want = numpy_gpt(gpt.state_dict(), 2, 4, row.numpy())
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


def test_number_of_matrices(tiny):
    """Four in each of two blocks, and the head: what lib/fast.py packs."""
    assert sum(isinstance(layer, torch.nn.Linear) for layer in tiny().modules()) == 9


# ---- how it starts ----

def test_how_weights_start():
    """0.02 at GPT-2's width, wider for narrower nets, residual branches smaller; biases 0, norms 1."""
    torch.manual_seed(0)
    for C, L, std in ((768, 1, 0.02), (192, 2, 0.04)):
        trunk = model.Trunk(GPTConfig(vocab_size=500, block_size=300, n_layer=L, n_head=2, d_model=C))
        for name, p in trunk.named_parameters():
            if p.dim() > 1:
                want = std / math.sqrt(2 * L) if ".proj." in name else std
                assert p.std().item() == pytest.approx(want, rel=0.03), name
                assert abs(p.mean().item()) < std / 50, name
            else:
                norm = ".ln_" in f".{name}" and name.endswith("weight")
                assert (p == (1.0 if norm else 0.0)).all(), name


def test_R9_head_init():
    rm = RewardModel(model.Trunk(GPTConfig(vocab_size=1, block_size=1, n_layer=0, n_head=1, d_model=4096)))
    assert rm.reward_head.weight.std().item() == pytest.approx(1 / math.sqrt(4097), rel=0.05)
    assert rm.reward_head.bias.item() == 0
    assert RewardModel(rm.trunk, "token").reward_token.std().item() == pytest.approx(0.02, rel=0.05)


# ---- the reward head ----

def n_params(net):
    return sum(p.numel() for p in net.parameters())


def test_M15_the_reward_head_is_one_row(tiny):
    """A score is (h w + b - shift) / scale; the swap adds w, b and nothing else."""
    gpt, h = tiny(), torch.randn(3, 32)
    for pool in ("last", "mean", "max", "token"):
        rm = RewardModel.from_gpt(gpt, pool)
        assert rm.reward_head.weight.shape == (1, 32)
        assert n_params(rm) == n_params(gpt.trunk) + 32 + 1 + 32 * (pool == "token")
        rm.shift.fill_(0.4), rm.scale.fill_(2.5)
        torch.nn.init.constant_(rm.reward_head.bias, 0.7)
        want = (h @ rm.reward_head.weight[0] + 0.7 - 0.4) / 2.5
        torch.testing.assert_close(rm._head(h), want, atol=1e-6, rtol=1e-6)


@pytest.mark.slow
def test_real_sizes():
    """GPT-2 small, without its memory: the vocabulary head is 768 x 50257, the reward head 768 x 1."""
    with torch.device("meta"):
        gpt = GPT(GPTConfig())
        rm = RewardModel.from_gpt(gpt)
        tokens = torch.zeros(1, 5, dtype=torch.long)
        assert gpt.lm_head.weight.shape == (50257, 768) and len(gpt.trunk.blocks) == 12
        assert rm.reward_head.weight.shape == (1, 768)
        assert gpt.trunk(tokens).shape == rm.trunk(tokens).shape == (1, 5, 768)
        assert gpt(tokens).shape == (1, 5, 50257) and rm(tokens).shape == (1, 5)
    assert n_params(rm) == n_params(rm.trunk) + 769
