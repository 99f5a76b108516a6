"""sample.py: the loop survives what is typed, a conversation is what SFT on messages trained on."""
import os
import select
import signal
import subprocess
import sys
import time
from argparse import Namespace

import pytest
import torch
from helpers import BYTES, PPO, ROOT, SIZES, gen, jsonl, lines, make_data, tiny_gpt

import ppo
import sample
import train_sft
from data.examples import encode_demonstrations
from data.files import UserError
from data.records import ANSWER, QUESTION, read_sft
from lib.checkpoint import load, save
from lib.generate import generate
from model import GPT, RewardModel

pytestmark = pytest.mark.slow

LOOP = [sys.executable, str(ROOT / "sample.py"), "--device", "cpu", "--n", "1", "--ckpt"]
ARGS = {"prompt": None, "prompts": None, "to": None, "ckpt": "", "reward": None, "chat": None, "n": None,
        "best_of": 0, "temperature": 1.0, "top_k": None, "top_p": None, "max_new_tokens": 16, "seed": 1,
        "device": "cpu", "tokens": False, "given": None, "html": None}


def args_of(**changed):
    return Namespace(**ARGS | changed)


@pytest.fixture
def checkpoint(tmp_path):
    """checkpoint(chat=None, **sizes): the path of a tiny byte-level GPT."""
    def make(chat=None, **sizes):
        gpt = tiny_gpt(vocab_size=BYTES.vocab_size, **{"block_size": 256} | sizes)
        gpt.chat = chat
        save(tmp_path / "gpt.pt", gpt, BYTES)
        return str(tmp_path / "gpt.pt")
    return make


@pytest.fixture
def scripted(monkeypatch):
    """scripted(typed, replies) -> the prompts that the model gets, in a list; exceptions are raised."""
    def prepare(typed, replies):
        seen, typed, replies = [], iter(typed), iter(replies)

        def type_line(_):
            line = next(typed, EOFError())
            if not isinstance(line, str):
                raise line
            return line

        def reply(gpt, tokens, lengths, new, *how):
            seen.append(BYTES.decode(tokens[0].tolist()))
            assert tokens.shape[1] + new <= gpt.config.block_size and new >= 1
            if not isinstance(text := next(replies), str):
                raise text
            row = tokens[0].tolist() + BYTES.encode(text) + [BYTES.eos]
            return torch.tensor([row] * len(tokens)), torch.tensor([len(row)] * len(tokens))

        monkeypatch.setattr("builtins.input", type_line)
        monkeypatch.setattr(sample, "generate", reply)
        monkeypatch.setattr(sys, "stdin", open(os.devnull))
        return seen
    return prepare


def run(path, *flags, typed=b"", **how):
    return subprocess.run([*LOOP, path, *flags], input=typed, capture_output=True, **how)


# ---- a file of prompts ----

def test_a_file_of_prompts_is_answered_into_a_file(checkpoint, scripted, tmp_path, capsys):
    path, prompts = checkpoint(), [f"prompt {i}:" for i in range(5)]
    save(tmp_path / "rm.pt", RewardModel.from_gpt(load(GPT, path)), BYTES)
    jsonl(tmp_path / "p.jsonl", [{"prompt": prompt} for prompt in prompts])
    how = {"ckpt": path, "prompts": str(tmp_path / "p.jsonl")}
    for n, more, each in ((1, {}, 1), (2, {"n": 2, "reward": str(tmp_path / "rm.pt")}, 2),
                          (3, {"best_of": 4, "reward": str(tmp_path / "rm.pt")}, 1)):
        sample.main(args_of(**how, **more, to=str(tmp_path / f"{n}.jsonl")))
        rows = lines(tmp_path / f"{n}.jsonl")
        assert [row["prompt"] for row in rows] == [prompt for prompt in prompts for _ in range(each)]
        assert all(len(row["response"]) > 0 and row["eos"] in (0, 1) for row in rows)
        assert all(("score" in row) == ("reward" in more) for row in rows)
        assert f"{5 * each} responses to 5 prompts written" in capsys.readouterr().out
    two = lines(tmp_path / "2.jsonl")
    assert all(a["score"] >= b["score"] for a, b in zip(two[::2], two[1::2], strict=True))
    seen = scripted([], ["one", "two", "three", "four", "five"])
    sample.main(args_of(**how, reward=str(tmp_path / "rm.pt"), to=str(tmp_path / "4.jsonl")))
    assert seen == prompts
    for row, reply in zip(lines(tmp_path / "4.jsonl"), ["one", "two", "three", "four", "five"], strict=True):
        tokens = torch.tensor([[*BYTES.encode(row["prompt"] + reply), BYTES.eos]])
        with torch.no_grad():
            score = load(RewardModel, tmp_path / "rm.pt").score(tokens, torch.tensor([tokens.shape[1]]))
        assert (row["response"], row["eos"]) == (reply, 1) and row["score"] == pytest.approx(score.item())


def test_flags_of_a_file_of_prompts(checkpoint, tmp_path):
    jsonl(tmp_path / "p.jsonl", [{"prompt": "p"}])
    path, prompts, to = checkpoint(), str(tmp_path / "p.jsonl"), str(tmp_path / "p.jsonl")
    for flags in ({"prompts": prompts}, {"to": "x"}, {"prompts": prompts, "to": "x", "prompt": "p"}):
        with pytest.raises(UserError, match="belong together"):
            sample.main(args_of(ckpt=path, **flags))
    with pytest.raises(UserError, match="already exists; choose another name"):
        sample.main(args_of(ckpt=path, prompts=prompts, to=to))
    with pytest.raises(UserError, match="there is no such folder"):
        sample.main(args_of(ckpt=path, prompts=prompts, to=str(tmp_path / "no" / "x.jsonl")))


# ---- a loop that survives ----

def test_a_line_that_is_too_long_is_one_sentence_and_the_loop_goes_on(checkpoint):
    done = run(checkpoint(), "--max-new-tokens", "8", typed=b"x" * 5000 + b"\nhello\n")
    assert done.returncode == 0 and done.stdout.count(b">>") == 2
    assert done.stderr.decode() == "the prompt has 5000 tokens: truncated from the left to 248\n"


def test_a_line_that_cannot_be_encoded_is_one_sentence_and_the_loop_goes_on(checkpoint, scripted, capsys):
    seen = scripted(["a" + " " * 300_001 + "b", "hello"], ["yes"] * 2)
    sample.main(args_of(ckpt=checkpoint()))
    assert seen == ["hello"] and "whitespace characters in a row" in capsys.readouterr().err


def test_bytes_that_are_no_text_are_replaced(checkpoint):
    path = checkpoint()
    done = run(path, "--max-new-tokens", "4", typed=b"\xff\xfe\x80\n\x00\x01\n")
    assert done.returncode == 0 and done.stdout.count(b">>") == 2 and not done.stderr
    done = run(path, b"\xff\xfe")  # on the command line
    assert done.returncode == 0 and done.stdout.startswith(b">>") and not done.stderr


@pytest.mark.parametrize("chat", [False, True])
def test_ctrl_c_stops_the_answer_and_only_at_the_prompt_the_loop(checkpoint, scripted, capsys, chat):
    seen = scripted(["a", "b", KeyboardInterrupt()], [KeyboardInterrupt(), "yes"])
    sample.main(args_of(ckpt=checkpoint(), chat=chat, n=1))
    assert len(seen) == 2 and "a" not in seen[1].removesuffix(ANSWER).removeprefix(QUESTION)
    out, err = capsys.readouterr()
    assert out == ">>yes\n\n\n" and err == "\nstopped; Ctrl-C once more to end\n"


def test_ctrl_c_as_a_signal(checkpoint):
    path = checkpoint(block_size=50_000)
    child = subprocess.Popen([*LOOP, path, "--max-new-tokens", "25000", "--temperature", "0"],  # never ends
                             stdin=-1, stdout=-1, stderr=-1)
    child.stdin.write(b"hello\n")
    child.stdin.flush()
    assert child.stdout.read(2) == b"> "
    time.sleep(1)
    child.send_signal(signal.SIGINT)
    while not select.select([child.stdout], [], [], 5)[0]:  # Python drops one that meets a call back from C
        child.send_signal(signal.SIGINT)
    assert child.stdout.read(2) == b"> "  # again
    child.send_signal(signal.SIGINT)
    out, err = child.communicate()
    assert child.returncode == 0 and out == b"\n" and err.endswith(b"\nstopped; Ctrl-C once more to end\n")


def test_too_little_memory_is_one_sentence_and_the_loop_goes_on(checkpoint, scripted, capsys):
    told = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 5000000000 bytes."
    scripted(["a", "b", "c"], [MemoryError(), RuntimeError(told), "yes"])
    sample.main(args_of(ckpt=checkpoint(), n=1))
    out, err = capsys.readouterr()
    assert out == ">>yes\n\n\n"
    assert err == (f"sample.py: out of memory. {sample.REMEDY}\n"
                   f"sample.py: out of memory, at a tensor of 5 GB. {sample.REMEDY}\n")


def test_a_fault_of_ours_keeps_its_traceback(checkpoint, scripted):
    scripted(["a"], [RuntimeError("a bug")])
    with pytest.raises(RuntimeError, match="a bug"):
        sample.main(args_of(ckpt=checkpoint()))


@pytest.mark.parametrize("typed", [[], [""], ["  "], [KeyboardInterrupt()]])
def test_the_loop_ends_without_a_word(checkpoint, scripted, capsys, typed):
    assert scripted(["a", *typed, "b"] if typed else ["a"], ["yes"] * 2) is not None
    sample.main(args_of(ckpt=checkpoint(), n=1))
    out, err = capsys.readouterr()
    assert out.strip() == ">>yes" and not err


def test_a_closed_standard_input_is_one_sentence(checkpoint):
    done = subprocess.run(["sh", "-c", '"$@" <&-', "sh", *LOOP, checkpoint()], capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr == "sample.py: there is neither a prompt nor an open standard input to read one from\n"


# ---- without turns: as ever ----

def test_a_prompt_is_continued_with_the_random_numbers_of_the_seed(checkpoint, capsys):
    """For each row what lib.generate gives; a prompt that fits is not truncated."""
    path = checkpoint()
    sample.main(args_of(ckpt=path, prompt="hello", seed=7))
    row = BYTES.encode("hello")
    tokens, lengths = generate(load(GPT, path), torch.tensor([row] * 3), torch.tensor([5] * 3), 16,
                               eos=BYTES.eos, generator=gen(7))
    texts = [BYTES.decode(tokens[i, 5 : lengths[i]].tolist()) for i in range(3)]
    ends = ["" if tokens[i, lengths[i] - 1] == BYTES.eos else " [...]" for i in range(3)]
    shown = [f">>{text}{end}\n\n" for text, end in zip(texts, ends, strict=True)]
    assert capsys.readouterr().out == "".join(shown)


def test_a_long_prompt_is_that_of_ppo(checkpoint, scripted):
    """The room is prompt_room's; where --max-new-tokens would take all of it, half of the model's."""
    for new, room in ((16, 240), (200, 56), (255, 1), (256, 128), (10**6, 128)):
        seen = scripted([], ["yes"])
        sample.main(args_of(ckpt=checkpoint(), prompt="abc" * 100, max_new_tokens=new))
        assert seen == [("abc" * 100)[-room:]]


def test_an_empty_prompt_is_eos(checkpoint, scripted, monkeypatch):
    scripted([], ["yes"])
    prompts, was = [], sample.generate
    monkeypatch.setattr(sample, "generate", lambda gpt, tokens, *rest: prompts.append(tokens.tolist())
                        or was(gpt, tokens, *rest))
    sample.main(args_of(ckpt=checkpoint(), prompt=""))
    assert prompts == [[[BYTES.eos]] * 3]


# ---- conversations ----

def test_a_conversation_gives_the_prompts_that_sft_trains_on(checkpoint, scripted, tmp_path, capsys):
    """Token for token what data/records.py and data/examples.py make of the same messages."""
    seen = scripted(["How are you, Ångström?", "And the fox?"], [" Fine, thanks.", " Sleeping."])
    sample.main(args_of(ckpt=checkpoint(chat=1.0)))
    said = [("user", "How are you, Ångström?"), ("assistant", "Fine, thanks."), ("user", "And the fox?"),
            ("assistant", "Sleeping.")]
    jsonl(tmp_path / "sft.jsonl", [{"messages": [{"role": role, "content": text} for role, text in said[:n]]}
                                   for n in (2, 4)])
    rows = encode_demonstrations(read_sft(tmp_path / "sft.jsonl"), BYTES, 256, "sft.jsonl")
    assert seen == [BYTES.decode(row[:P]) for row, P in rows]
    assert capsys.readouterr().out == ">> Fine, thanks.\n\n>> Sleeping.\n\n\n"  # one response a turn


def test_history_is_truncated_from_the_left_in_whole_turns(checkpoint, scripted, capsys):
    lines = [f"line {i} " + "x" * 30 for i in range(6)]
    seen = scripted(lines, ["yes"] * 6)
    sample.main(args_of(ckpt=checkpoint(chat=1.0)))
    for i, prompt in enumerate(seen):
        assert prompt.startswith(QUESTION) and prompt.endswith(f"{lines[i]}{ANSWER}") and len(prompt) <= 240
        assert i < 2 or lines[i - 1] in prompt
    assert lines[0] not in seen[-1] and "the 2 oldest turns no longer fit" in capsys.readouterr().err


def test_a_turn_that_is_too_long_is_truncated_and_answered(checkpoint, scripted, capsys):
    seen = scripted(["a", "x" * 1000, "b"], ["yes"] * 3)
    sample.main(args_of(ckpt=checkpoint(chat=1.0)))
    assert seen[1] == "x" * (240 - len(ANSWER)) + ANSWER and seen[2].endswith("b" + ANSWER)
    assert "truncated from the left to 240" in capsys.readouterr().err


@pytest.mark.parametrize("text, kept", [
    (" Yes.\n\nHuman: And?\n\nAssistant: No.", " Yes."), ("\n\nHuman: And?", ""),
    (" A.\n\nAssistant: B.", " A."), (" Human: no turn", " Human: no turn")])
def test_the_next_turn_of_the_human_ends_the_assistants(checkpoint, scripted, capsys, text, kept):
    seen = scripted(["a", "b"], [text, " ok"])
    sample.main(args_of(ckpt=checkpoint(chat=1.0)))
    assert capsys.readouterr().out == f">>{kept}\n\n>> ok\n\n\n"
    assert seen[1] == f"{QUESTION} a{ANSWER} {kept.strip()}{QUESTION} b{ANSWER}"


def test_a_turn_is_scored_without_what_follows_it(checkpoint, scripted, tmp_path, monkeypatch):
    path, scored = checkpoint(chat=1.0), []
    save(tmp_path / "rm.pt", RewardModel.from_gpt(load(GPT, path)), BYTES)
    scripted(["a"], [" Yes.\n\nHuman: And?"])
    was = sample.score
    monkeypatch.setattr(sample, "score", lambda rm, tokens, lengths: scored.append((tokens, lengths))
                        or was(rm, tokens, lengths))
    sample.main(args_of(ckpt=path, reward=str(tmp_path / "rm.pt")))
    row = BYTES.encode(f"{QUESTION} a{ANSWER} Yes.") + [BYTES.eos]
    assert scored[0][0].tolist() == [row] and scored[0][1].tolist() == [len(row)]


def test_a_prompt_of_the_command_line_is_a_turn_too(checkpoint, scripted):
    seen = scripted([], ["yes"] * 3)
    path = checkpoint(chat=1.0)
    for prompt, chat in (("Hi", None), (f"{QUESTION} Hi{ANSWER}", None), ("Hi", False)):
        sample.main(args_of(ckpt=path, prompt=prompt, chat=chat))
    assert seen == [f"{QUESTION} Hi{ANSWER}"] * 2 + ["Hi"]


def test_prompts_of_a_file_are_turns_too(checkpoint, scripted, tmp_path):
    jsonl(tmp_path / "p.jsonl", [{"prompt": "Hi"}, {"prompt": f"{QUESTION} Ho{ANSWER}"}])
    seen = scripted([], ["yes"] * 2)
    sample.main(args_of(ckpt=checkpoint(chat=1.0), prompts=str(tmp_path / "p.jsonl"),
                        to=str(tmp_path / "a.jsonl")))
    assert seen == [f"{QUESTION} Hi{ANSWER}", f"{QUESTION} Ho{ANSWER}"]
    assert [line["prompt"] for line in lines(tmp_path / "a.jsonl")] == ["Hi", f"{QUESTION} Ho{ANSWER}"]


# ---- the checkpoint knows ----

@pytest.mark.parametrize("share, flag, chat", [
    (1.0, None, True), (0.6, None, True), (0.3, None, False), (0.0, None, False), (None, None, False),
    (None, True, True), (0.3, True, True), (1.0, False, False), (0.0, False, False)])
def test_when_a_model_is_talked_to_in_turns(checkpoint, share, flag, chat):
    assert sample.takes_turns(load(GPT, checkpoint(chat=share)), args_of(chat=flag)) is chat


def test_chat_with_a_model_that_saw_no_messages_is_refused(checkpoint):
    done = run(checkpoint(chat=0.0), "--chat", "Hi")
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith(b"sample.py: --chat: ") and b"was never trained on messages" in done.stderr


def test_a_checkpoint_from_before_this_was_noted_loads(checkpoint):
    data = torch.load(path := checkpoint(chat=1.0), weights_only=True)
    del data["chat"]
    torch.save(data, path)
    assert load(GPT, path).chat is None


@pytest.mark.parametrize("wrong", [True, 1, "yes", float("nan"), -0.1, 1.1, [1.0], torch.ones(1)])
def test_a_damaged_note_is_a_damaged_checkpoint(checkpoint, wrong):
    data = torch.load(path := checkpoint(chat=1.0), weights_only=True)
    torch.save(data | {"chat": wrong}, path)
    with pytest.raises(UserError, match="is not an onetrunk checkpoint"):
        load(GPT, path)


def test_sft_notes_how_many_demonstrations_were_messages_and_ppo_keeps_it(tmp_path):
    make_data(tmp_path / "data", n=16)
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "a"}]
    where = {"data": str(tmp_path / "data"), "out": str(tmp_path)}
    plain = [{"prompt": "x", "completion": "a"}, {"text": "b"}]
    turns = [{"prompt": prompt, "completion": " a"} for prompt in (chat[:1], f"{QUESTION} x{ANSWER}")]
    for rows, share in ((plain, 0.0), ([{"messages": chat}] * 6 + plain, 0.75), (turns, 1.0)):
        jsonl(tmp_path / "data/sft.jsonl", rows)
        train_sft.main(train_sft.Config(**where, **SIZES, epochs=1))
        assert load(GPT, tmp_path / "sft.pt").chat == share
    (tmp_path / "score.py").write_text("def score(prompts, responses): return [len(r) for r in responses]")
    ppo.main(ppo.Config(**where, **PPO | {"updates": 1}, reward=f"{tmp_path}/score.py:score"))
    assert load(GPT, tmp_path / "ppo.pt").chat == 1.0


# ---- control characters ----

@pytest.mark.skipif(os.name != "posix", reason="no pty")
def test_what_would_control_a_terminal_is_written_out_there_and_kept_in_a_file():
    import pty

    code = ("from lib.output import make_harmless; make_harmless()\n"
            "print('\\x1b]0;x\\x07 \\x9b2J é\\tß\\r \\u202e \\x7f')")
    own, other = pty.openpty()
    subprocess.run([sys.executable, "-c", code], stdout=other, cwd=ROOT, check=True)
    os.close(other)
    shown = b""
    try:
        while piece := os.read(own, 1000):
            shown += piece
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(own)
    assert shown.decode() == "\\x1b]0;x\\x07 \\x9b2J é\tß\\r \\u202e \\x7f\r\n"
    done = subprocess.run([sys.executable, "-c", code], stdout=-1, cwd=ROOT, check=True)
    assert done.stdout.decode() == "\x1b]0;x\x07 \x9b2J é\tß\r \u202e \x7f\n"


def test_the_loop_on_a_terminal(checkpoint):
    """A prompt that is read with the terminal's own line editor; its bytes may be no text."""
    pty = pytest.importorskip("pty")
    own, other = pty.openpty()
    child = subprocess.Popen([*LOOP, checkpoint(), "--max-new-tokens", "4"], stdin=other, stdout=other,
                             stderr=other)
    os.close(other)
    shown = b""
    for typed in (b"hello \xff\n", b"\x04"):
        while not shown.endswith(b"> "):
            shown += os.read(own, 1000)
        os.write(own, typed)
        shown += b"|"
    try:
        while piece := os.read(own, 1000):
            shown += piece
    except OSError:
        pass
    os.close(own)
    assert child.wait() == 0 and shown.count(b">>") == 1 and b"Traceback" not in shown


