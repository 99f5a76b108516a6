"""train_sft.py, demonstrations as token rows, batches and steps. Ids (S1, ...): docs/method.md."""
import math
import random

import pytest
import torch
from helpers import BYTES, TINY, gen, gpt_config

from data.examples import encode_demonstrations, encode_prompt, pad
from data.files import UserError
from lib import fast
from lib.common import batches, clip_and_step, count_steps, set_lr, shuffled, to_host
from lib.generate import generate
from model import GPT, GPTConfig
from train_sft import Config, evaluate, make_optimizer, sft_backward, sft_batch, sft_loss

ROWS = [([3, 5, 1, 7, 9, 16], 2), ([4, 4, 16], 1), ([2, 6, 11, 12, 13, 8, 0, 1, 16], 6), ([16, 10, 16], 1)]


def encode(texts, room, name="x"):
    return encode_demonstrations(texts, BYTES, room, name)


def by_hand(gpt, rows):
    """-sum log p(token) over the completions in float64, a row at a time, and their number."""
    loss = count = 0
    for row, P in rows:
        logits = gpt(torch.tensor([row]))[0].double()
        for t in range(P, len(row)):
            loss -= logits[t - 1].log_softmax(-1)[row[t]]
            count += 1
    return loss, count


# ---- loss ----

def test_S1_untrained_loss_is_ln_V(rng):
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**TINY))
    tokens = torch.randint(17, (64, 16), generator=rng)
    loss, count = sft_loss(gpt, tokens, torch.ones(64, 15, dtype=torch.bool))
    assert count == 64 * 15 and loss.item() / count == pytest.approx(math.log(17), abs=0.3)


def test_S2_gradient_only_where_a_completion_token_is_predicted(tiny, monkeypatch):
    """Zero at every position that predicts prompt or padding, not zero from P-1 on to the eos's."""
    gpt, states = tiny(), []

    def trunk(tokens, run=gpt.trunk.forward):
        states.append(run(tokens).detach().requires_grad_())  # so that later positions pass no gradient
        return states[-1]

    monkeypatch.setattr(gpt.trunk, "forward", trunk)
    tokens, mask = sft_batch(ROWS, "cpu")
    sft_loss(gpt, tokens, mask)[0].backward()
    got = states[0].grad.abs().sum(-1) > 0
    want = torch.zeros(4, 8, dtype=torch.bool)
    for i, (row, P) in enumerate(ROWS):
        want[i, P - 1 : len(row) - 1] = True
    assert torch.equal(got, want) and torch.equal(mask, want)


def test_S3_eos_is_always_supervised():
    """Also when the prompt is eos itself, and when padding is 0 and so is a token."""
    rows = encode([("", "a"), ("xyz", "\0\0"), ("q", "")], 32)
    tokens, mask = sft_batch(rows, "cpu")
    for (row, P), m, t in zip(rows, mask, tokens, strict=True):
        assert t[1:][m].tolist() == row[P:] and row[-1] == BYTES.eos
    assert rows[0] == ([BYTES.eos, 97, BYTES.eos], 1)


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], ROWS[1:3]])
def test_S4_loss_equals_the_sum_by_hand(tiny, rows):
    gpt = tiny()
    loss, count = sft_loss(gpt, *sft_batch(rows, "cpu"))
    want, n = by_hand(gpt, rows)
    assert count == n == sum(len(row) - P for row, P in rows)
    assert loss.item() == pytest.approx(want.item(), abs=1e-4)
    assert evaluate(gpt, rows, 9, "cpu") == pytest.approx(want.item() / n, abs=1e-5)


def test_evaluate_counts_tokens_not_batches_and_leaves_train_mode(tiny):
    gpt = tiny(dropout=0.5)
    want = by_hand(gpt, ROWS)[0].item() / by_hand(gpt, ROWS)[1]
    gpt.train()
    for budget in (1, 9, 18, 1000):  # one row at a time up to all at once
        assert evaluate(gpt, ROWS, budget, "cpu") == pytest.approx(want, abs=1e-5)
    assert gpt.training


def test_S5_loss_ignores_right_padding_and_order(tiny):
    gpt = tiny()
    tokens, mask = sft_batch(ROWS, "cpu")
    loss, count = sft_loss(gpt, tokens, mask)
    longer = torch.cat([tokens, torch.full((4, 5), 16)], 1)
    more = torch.cat([mask, torch.zeros(4, 5, dtype=torch.bool)], 1)
    for other in (sft_loss(gpt, longer, more), sft_loss(gpt, *sft_batch(ROWS[::-1], "cpu"))):
        assert other[1] == count and other[0].item() == pytest.approx(loss.item(), abs=1e-4)


def gradient(gpt, parts, rows):
    gpt.zero_grad()
    count = sum(len(row) - P for row, P in rows)
    for part in parts:
        (sft_loss(gpt, *sft_batch(part, "cpu"))[0] / count).backward()
    return torch.cat([p.grad.flatten() for p in gpt.parameters()])


@pytest.mark.parametrize("pieces", [2**24, 17 * 3])
def test_S6_micro_batches_sum_to_the_gradient_of_the_whole(tiny, monkeypatch, pieces):
    """A sum and a count are returned, so ragged micro-batches over the step's count are exact."""
    monkeypatch.setattr(fast, "LOGITS_AT_ONCE", pieces)
    gpt = tiny()
    whole = gradient(gpt, [ROWS], ROWS)
    for parts in ([[row] for row in ROWS], [ROWS[:1], ROWS[1:]]):
        torch.testing.assert_close(gradient(gpt, parts, ROWS), whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("micro_batch", [1, 20, 10**6])
def test_S6_sft_backward_is_the_loss_a_token_and_its_gradient(tiny, micro_batch):
    """In pieces of any size; the weight scales the gradient, which is added to what is there."""
    gpt = tiny()
    whole, (loss, count) = gradient(gpt, [ROWS], ROWS), sft_loss(gpt, *sft_batch(ROWS, "cpu"))
    for weight, times in (((), 2), ((0.5,), 2.5)):  # on top of the 1 of `whole`
        parts, number = sft_backward(gpt, ROWS, micro_batch, "cpu", *weight)
        assert to_host(parts) == {"loss": pytest.approx(loss.item(), rel=1e-5)} and number == count
        now = torch.cat([p.grad.flatten() for p in gpt.parameters()])
        torch.testing.assert_close(now, times * whole, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_S8_overfits_four_sequences_and_says_them_with_eos():
    torch.manual_seed(0)
    texts = [("the ", "fox"), ("a ", "lantern"), ("one ", "ox"), ("", "end")]
    gpt = GPT(gpt_config(BYTES.vocab_size, 16, 2, 2, 32)).train()
    rows = encode(texts, 16)
    optimizer = make_optimizer(gpt, Config(lr=1e-2))
    batch = sft_batch(rows, "cpu")
    for step in range(150):
        loss, count = sft_loss(gpt, *batch)
        (loss / count).backward()
        clip_and_step(gpt, optimizer, 1.0, step)
    assert loss.item() / count < 0.05
    tokens, lengths = pad([row[:P] for row, P in rows])
    tokens, lengths = generate(gpt.eval(), tokens, lengths, 10, temperature=0, eos=BYTES.eos)
    assert [t[:n].tolist() for t, n in zip(tokens, lengths, strict=True)] == [row for row, _ in rows]


# ---- data/examples.py ----

def test_S10_supervised_tokens_decode_to_completion_and_eos():
    texts = [("Tell: ", "a naïve 漢字 story"), ("", " x"), ("p" * 9, "<|endoftext|>")]
    rows = encode(texts, 64)
    tokens, mask = sft_batch(rows, "cpu")
    for (prompt, completion), (row, P), t, m in zip(texts, rows, tokens, mask, strict=True):
        target = t[1:][m].tolist()
        assert BYTES.decode(target[:-1]) == completion and target[-1] == BYTES.eos
        assert BYTES.eos not in target[:-1]
        assert BYTES.decode(row[:P]) == prompt and len(row) == P + len(target)


def test_long_prompts_lose_their_beginning_and_long_completions_are_dropped(capsys):
    texts = [("abcdef", "xy"), ("ab", "x"), ("ab", "toolongforit"), ("abc", "1234567"), ("a", "12345678")]
    rows = encode(texts, 8, "sft.jsonl")
    assert rows == [([*b"bcdefxy", BYTES.eos], 5), ([*b"abx", BYTES.eos], 2)]
    said = capsys.readouterr().out
    assert "sft.jsonl: of 5 examples, 1 prompts truncated from the left" in said
    assert "3 dropped for a response that does not fit into 8 tokens" in said
    assert encode(texts[1:2], 8) == rows[1:]
    assert capsys.readouterr().out == ""
    assert encode(texts[3:4], 9) == [([*b"c1234567", BYTES.eos], 1)]  # room for one token of the prompt
    with pytest.raises(UserError, match="sft.jsonl: no example fits into 8 tokens"):
        encode(texts[2:3], 8, "sft.jsonl")


def test_a_text_that_fits_to_the_token_stays_whole(capsys):
    assert encode([("abc", "defg")], 8) == [([*b"abcdefg", BYTES.eos], 3)] and capsys.readouterr().out == ""
    assert encode([("abc", "defg")], 7) == [([*b"bcdefg", BYTES.eos], 2)]
    assert "of 1 examples, 1 prompts truncated from the left and 0 dropped" in capsys.readouterr().out


def test_empty_prompt_becomes_eos():
    assert encode([("", "ab")], 8) == [([BYTES.eos, 97, 98, BYTES.eos], 1)]
    assert encode_prompt("", BYTES) == [BYTES.eos] and encode_prompt("ab", BYTES) == [97, 98]


def test_pad():
    tokens, lengths = pad([[5, 6, 7], [8], [9, 1]])
    assert tokens.tolist() == [[5, 6, 7], [8, 0, 0], [9, 1, 0]] and lengths.tolist() == [3, 1, 2]
    assert tokens.dtype == lengths.dtype == torch.long


# ---- lib/common.py: batches, rate, step ----

@pytest.mark.parametrize("seed", [None, 0, 1])
def test_batches_cover_each_once_within_the_budget_with_little_padding(seed):
    random.seed(1)
    lengths = [random.randint(1, 100) for _ in range(2000)]
    generator = seed if seed is None else gen(seed)
    made = batches(lengths, 1000, generator)
    assert sorted(i for batch in made for i in batch) == list(range(2000))
    size = [len(batch) * max(lengths[i] for i in batch) for batch in made]
    assert max(size) <= 1000 and sum(size) < 1.1 * sum(lengths)
    assert len(made) < 1.3 * sum(lengths) / 1000
    longest = [max(lengths[i] for i in batch) for batch in made]
    assert (longest == sorted(longest)) == (seed is None)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("n", [200, 2000])
def test_batches_come_in_random_order(n, seed):
    """In one pool (n = 200) and in many: unshuffled, 15 of 16 batches would be longer than the one before,
    and the examples of the first pool would come before those of the second."""
    random.seed(seed)
    lengths = [random.randint(1, 100) for _ in range(n)]
    made = batches(lengths, 700, gen(seed))
    longest = [max(lengths[i] for i in batch) for batch in made]
    rises = [a < b for a, b in zip(longest, longest[1:], strict=False)]
    assert len(made) > 14 and 0.25 < sum(rises) / len(rises) < 0.75
    place = torch.randperm(n, generator=gen(seed)).argsort() / n  # pools are made in this order
    early, late = ([place[i] for batch in part for i in batch]
                   for part in (made[: len(made) // 2], made[len(made) // 2 :]))
    assert abs(sum(early) / len(early) - sum(late) / len(late)) < 0.2


def test_batches_are_made_of_shuffled_examples():
    """Texts of one length meet others in every epoch, not always their neighbours in the file."""
    generator = gen(0)
    epochs = [batches([10] * 1000, 100, generator) for _ in range(2)]
    for made in epochs:
        assert sum(abs(a - b) == 1 for batch in made for a, b in zip(batch, batch[1:], strict=False)) < 50
    assert not {frozenset(batch) for batch in epochs[0]} & {frozenset(batch) for batch in epochs[1]}


def test_shuffled_goes_on_where_it_stopped_and_counts_from_1():
    plan = {"lengths": [3, 9, 4, 4, 7, 8] * 20, "budget": 60}
    steps = count_steps(2.5, 3, **plan)
    whole = list(shuffled(**plan, generator=gen(3), done=0, steps=steps))
    epoch = len(batches(**plan, generator=gen(3)))
    assert steps == round(2.5 * epoch) and [step for step, _ in whole] == list(range(1, steps + 1))
    assert sorted(i for _, batch in whole[:epoch] for i in batch) == list(range(120))
    assert whole[:epoch] != whole[epoch : 2 * epoch]
    for done in (1, epoch, steps - 1, steps):
        assert list(shuffled(**plan, generator=gen(3), done=done, steps=steps)) == whole[done:]


def test_batches_of_several_texts_each_count_their_padding():
    random.seed(1)
    lengths, rows = ([random.randint(*ends) for _ in range(2000)] for ends in ((1, 100), (2, 9)))
    tokens = sum(n * length for n, length in zip(rows, lengths, strict=True))
    for generator in (None, gen(0)):
        made = batches(lengths, 2000, generator, rows)
        assert sorted(i for batch in made for i in batch) == list(range(2000))
        size = [sum(rows[i] for i in batch) * max(lengths[i] for i in batch) for batch in made]
        assert max(size) <= 2000 and sum(size) < 1.1 * tokens
        assert len(made) < 1.3 * tokens / 2000
    assert batches([5, 5, 5], 20, rows=[2, 2, 3]) == [[0, 1], [2]]


def test_batches_order_comes_from_the_generator():
    lengths = [5, 9, 2, 7, 7, 3] * 50
    one, same, other = (batches(lengths, 40, gen(seed)) for seed in (1, 1, 2))
    assert one == same != other
    generator = gen(1)
    assert batches(lengths, 40, generator) == one != batches(lengths, 40, generator)  # epochs differ


def test_batches_of_odd_lists():
    assert batches([50, 3], 10) == [[1], [0]]  # longer than the budget: alone, never dropped
    assert batches([4, 4], 8) == [[0, 1]]  # exactly full


def test_S9_learning_rate_of_every_group(tiny):
    optimizer = make_optimizer(tiny(), Config(lr=4e-3))
    rates = []
    for step in range(200):
        rates.append(set_lr(optimizer, 4e-3, step, 200, warmup=20, floor=0.1))
        assert [group["lr"] for group in optimizer.param_groups] == [rates[-1]] * 2
    assert rates[0] == pytest.approx(4e-3 / 20, rel=1e-3)
    assert rates[19] == max(rates) == pytest.approx(4e-3, rel=0.03)
    assert rates[-1] == pytest.approx(4e-4, rel=0.01) and min(rates[19:]) == rates[-1]
    assert rates[100] == pytest.approx(4e-3 * (0.1 + 0.9 / 2))
    assert rates[:20] == sorted(rates[:20]) and rates[19:] == sorted(rates[19:], reverse=True)


def test_optimizer_has_each_parameter_once_and_decays_matrices_only(tiny):
    gpt = tiny()
    optimizer = make_optimizer(gpt, Config(lr=1e-3, weight_decay=0.1))
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in gpt.parameters())
    for group in optimizer.param_groups:
        assert all((p.dim() >= 2) == (group["weight_decay"] == 0.1) for p in group["params"])
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1, 0.0}


@pytest.mark.parametrize("grad, length", [(2.0, 1.0), (1e-4, None)])
def test_clip_and_step_clips_the_whole_norm_and_clears(tiny, grad, length):
    """A norm below 1 stays as it is."""
    gpt = tiny()
    before = torch.cat([p.detach().flatten().clone() for p in gpt.parameters()])
    optimizer = torch.optim.SGD(gpt.parameters(), lr=1.0)
    for p in gpt.parameters():
        p.grad = torch.full_like(p, grad)
    norm = grad * math.sqrt(len(before))
    made = clip_and_step(gpt, optimizer, 1.0, 0, {"loss": [torch.tensor(2.0), torch.tensor(3.0)]})
    assert made == {"loss": 5.0, "grad_norm": pytest.approx(norm, rel=1e-4)}  # that before clipping
    moved = before - torch.cat([p.detach().flatten() for p in gpt.parameters()])
    assert moved.norm().item() == pytest.approx(length or norm, rel=1e-3)
    assert all(p.grad is None for p in gpt.parameters())


@pytest.mark.parametrize("bad, name", [
    (math.inf, "trunk.blocks.1.attn.qkv.bias"), (math.inf, "trunk.wte.weight"),
    (math.nan, "trunk.blocks.1.attn.qkv.bias")])
def test_a_gradient_that_is_not_finite_stops_the_run(tiny, bad, name):
    """The error names step and parameter; the weights stay as they were."""
    gpt = tiny()
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1.0)
    before = {n: p.detach().clone() for n, p in gpt.named_parameters()}
    for p in gpt.parameters():
        p.grad = torch.ones_like(p)
    dict(gpt.named_parameters())[name].grad.view(-1)[3] = bad
    with pytest.raises(UserError, match=f"step 7: non-finite gradient, largest in {name}"):
        clip_and_step(gpt, optimizer, 1.0, 7)
    assert all(torch.equal(before[n], p) for n, p in gpt.named_parameters())
