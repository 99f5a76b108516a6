"""Fixtures of all test files: a tiny model and a generator of random numbers."""
import pytest
import torch
from helpers import TINY, gen

import train_rm
import train_sft
from lib import checks_rm
from model import GPT, GPTConfig

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny():
    """tiny(seed=0, **sizes) -> GPT in eval mode; its norms and biases are random, too."""
    def make(seed=0, **sizes):
        torch.manual_seed(seed)
        gpt = GPT(GPTConfig(**TINY | sizes)).eval()
        with torch.no_grad():
            for p in gpt.parameters():
                p.copy_(0.3 * torch.randn_like(p) + (p if p.dim() < 2 else 0))
        return gpt
    return make


@pytest.fixture(scope="module", autouse=True)
def quick_start(request):
    """The self-check of the network takes half a second: its own tests run it, and the real pipeline."""
    with pytest.MonkeyPatch.context() as patch:
        for module in () if request.module.__name__ == "test_checks" else (train_sft, train_rm, checks_rm):
            patch.setattr(module, "check_model", lambda gpt: None)
        yield


@pytest.fixture
def rng():
    return gen(0)
