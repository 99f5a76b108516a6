"""A tiny model for all tests: 2 layers, width 32, 2 heads, 17 tokens, 32 positions, weights large enough to matter."""
import pytest
import torch

from model import GPT, GPTConfig

torch.set_num_threads(1)
SIZES = {"vocab_size": 17, "block_size": 32, "n_layer": 2, "n_head": 2, "d_model": 32}


@pytest.fixture(scope="session")
def tiny():
    """tiny(seed=0, **sizes) -> GPT in eval mode; norms and biases are random too, so that none is forgotten."""
    def make(seed=0, **sizes):
        torch.manual_seed(seed)
        gpt = GPT(GPTConfig(**SIZES | sizes)).eval()
        with torch.no_grad():
            for p in gpt.parameters():
                p.copy_(0.3 * torch.randn_like(p) + (p if p.dim() < 2 else 0))
        return gpt
    return make


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)
