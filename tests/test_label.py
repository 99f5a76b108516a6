"""tools.label: each answer is kept once and whole, whoever presses the keys; two models compared; imports."""
import errno
import http.client
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from argparse import Namespace
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from helpers import BYTES, ROOT, jsonl, lines, make_data, tiny_gpt

import train_rm
from data import files
from data.choices import add_choices, read_choices
from data.files import UserError
from data.records import read_preferences
from lib import report, terminal
from lib.checkpoint import save
from lib.output import visible
from model import RewardModel
from tools import label
from tools.label import TRAIN, VAL, Session

HOSTILE = "<script>document.title='hit'</script><img src=x onerror=\"document.title='hit'\"> " \
          "\x1b[2J\x1b]0;hit\x07 \u202egnirts\u202c \u200f\u061c\x00\x9b31m \r end"


def fake(prompt, n, rng):
    """A model that answers at once, and always anew."""
    return [f" answer {rng.randrange(10**9)} to {prompt}" for _ in range(n)]


def folder_of(tmp_path, n=40, name="mine"):
    folder = tmp_path / name
    folder.mkdir()
    jsonl(folder / "prompts.jsonl", [{"prompt": f"Question {i}?"} for i in range(n)])
    return folder


def session_of(folder, sample=fake, **more):
    prompts = [row["prompt"] for row in lines(folder / "prompts.jsonl")]
    return Session(folder, prompts, [sample], **more)


def press(session, keys):
    for key in keys:
        state = session.press(key, session.turn)
    return state


def kept(folder):
    """The lines of the three files; [] for one that is not there."""
    return [lines(folder / name) if (folder / name).exists() else [] for name in ("labels.jsonl", TRAIN, VAL)]


def raw(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != ".lock"}


def check(folder):
    """What must hold at any time: preferences are those of the journal, in its order, each once, in whole
    lines. Returns how many answers there are."""
    for data in raw(folder).values():
        assert data == b"" or data.endswith(b"\n")
    entries, train, val = kept(folder)
    for name, rows in ((TRAIN, train), (VAL, val)):
        made = [e for e in entries if e.get("file") == name]
        assert rows == [{"prompt": e["prompt"], "chosen": e["responses"][e["best"]],
                         "rejected": e["responses"][1 - e["best"]]} for e in made]
    asked = [e["prompt"] for e in entries if not e["again"]]
    assert len(asked) == len({*asked})
    return len(entries)


# ---- what is kept ----

def test_answers_become_preferences_that_train_rm_reads_unchanged(tmp_path, capsys):
    folder = folder_of(tmp_path)
    press(session_of(folder), "12=s" * 3)
    entries, train, val = kept(folder)
    assert [e["key"] for e in entries] == [*"12=s" * 3] and not any(e["again"] for e in entries)
    assert len(train) == 6 and not val  # 3 ties, 3 skipped
    for entry, row in zip((e for e in entries if e["key"] in "12"), train, strict=True):
        left, right = (entry["responses"][i] for i in entry["shown"])
        better, worse = (left, right) if entry["key"] == "1" else (right, left)
        assert row == {"prompt": entry["prompt"], "chosen": better, "rejected": worse}
    assert {tuple(e["shown"]) for e in entries} == {(0, 1), (1, 0)}  # the order is random
    read = read_preferences(folder / TRAIN)
    assert [(p, *r) for p, r, *_ in read] == [tuple(row.values()) for row in train]
    assert "ignored" not in capsys.readouterr().out
    check(folder)


def test_every_tenth_preference_is_held_out(tmp_path):
    folder = folder_of(tmp_path)
    press(session_of(folder), "1" * 9)
    assert len(kept(folder)[1]) == 9 and not (folder / VAL).exists()
    press(session_of(folder), "s=1" + "1" * 9)  # also in a new session; what makes no preference counts not
    entries, train, val = kept(folder)
    assert (len(train), len(val)) == (17, 1) and val[0]["prompt"] == entries[11]["prompt"]
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in val}
    check(folder)


def test_a_line_is_on_the_disk_before_the_next_pair_is_shown(tmp_path, monkeypatch):
    folder, synced, real = folder_of(tmp_path), [], os.fsync
    session = session_of(folder)

    def fsync(fd):
        real(fd)
        synced.append(Path(f"/proc/self/fd/{fd}").resolve().name.partition(".part")[0])
    monkeypatch.setattr(os, "fsync", fsync)
    following = session.next_pair
    counts = []

    def next_pair():
        counts.append((check(folder), *synced))
        return following()
    monkeypatch.setattr(session, "next_pair", next_pair)
    for n in (1, 2):
        synced.clear()
        press(session, "1")
        files = [name for name in counts[-1][1:] if name.endswith("jsonl")]
        assert counts[-1][0] == n and files == ["labels.jsonl", TRAIN]  # the journal first


def test_the_next_pair_is_sampled_while_one_is_read(tmp_path):
    asked = []

    def sample(prompt, n, rng):
        asked.append((prompt, threading.current_thread()))
        return fake(prompt, n, rng)
    session = session_of(folder_of(tmp_path), sample)
    end = time.monotonic() + 10
    while len(asked) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    assert session.pair.prompt == "Question 0?"
    assert [prompt for prompt, _ in asked] == ["Question 0?", "Question 1?"]
    assert asked[1][1] is not threading.main_thread()


def test_a_session_goes_on_where_the_last_one_ended(tmp_path):
    folder = folder_of(tmp_path)
    first = session_of(folder)
    press(first, "12s=")
    second = session_of(folder)
    assert second.pair == first.pair  # what was on the screen, not only another pair for the prompt
    press(second, "1" * 40)
    assert second.pair is None and "last pair" in second.view()["prompt"]
    asked = [e["prompt"] for e in kept(folder)[0] if not e["again"]]
    assert sorted(asked) == sorted(row["prompt"] for row in lines(folder / "prompts.jsonl"))
    check(folder)


def test_prompts_that_have_preferences_already_are_not_asked_and_lines_stay(tmp_path):
    folder = folder_of(tmp_path, 3)
    mine = b'{"prompt": "Question 0?", "chosen": "a", "rejected": "b", "note": 1}'  # no newline at its end
    (folder / TRAIN).write_bytes(mine)
    jsonl(folder / VAL, [{"prompt": "Question 2?", "responses": ["x", "y"]}])
    session = session_of(folder)
    assert session.pair.prompt == "Question 1?"
    press(session, "1")
    assert session.pair is None
    assert (folder / TRAIN).read_bytes().startswith(mine + b"\n{") and len(lines(folder / TRAIN)) == 2
    press(session, "u")
    assert (folder / TRAIN).read_bytes() == mine + b"\n"


def test_what_train_rm_would_refuse_and_equal_responses_are_passed_over(tmp_path):
    def sample(prompt, n, rng):
        return {"Question 0?": [" same"] * n, "Question 1?": [f"{prompt} again {i}" for i in range(n)]}.get(
            prompt, ["", " other", " third", ""])
    session = session_of(folder_of(tmp_path, 3), sample)
    assert session.pair.prompt == "Question 2?" and session.pair.responses == ["", " other"]
    state = press(session, "1")
    assert session.pair is None and "prompts left: 2" in state["status"] and "without two" in state["prompt"]


# ---- undo ----

def test_undo_restores_every_byte_and_asks_the_same_again(tmp_path):
    folder = folder_of(tmp_path)
    session, before = session_of(folder), []
    for key in "12=s" * 6 + "1" * 8:  # ties, skips, a held-out one, and pairs that come again
        before.append((raw(folder), session.pair))
        press(session, key)
    assert any(e["again"] for e in session.entries) and (folder / VAL).exists()
    then = session.pair
    for files_then, pair in reversed(before):
        assert press(session, "u")["note"] == "Undone."
        assert session.pair == pair
        assert {k: v for k, v in raw(folder).items() if v} == {k: v for k, v in files_then.items() if v}
    assert "nothing to undo" in press(session, "u")["note"]
    press(session, "12=s" * 6 + "1" * 8)
    assert session.pair == then
    check(folder)


def test_undo_reaches_back_into_the_last_session_but_not_over_lines_of_others(tmp_path):
    folder = folder_of(tmp_path)
    press(session_of(folder), "11")
    session = session_of(folder)
    press(session, "u2")
    assert [e["key"] for e in kept(folder)[0]] == ["1", "2"]
    with open(folder / TRAIN, "a") as file:
        file.write('{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    before = raw(folder)
    assert "Not undone" in press(session, "u")["note"] and raw(folder) == before
    press(session, "1")  # and it goes on


def test_undo_is_flushed(tmp_path, monkeypatch):
    folder = folder_of(tmp_path)
    session, synced, real = session_of(folder), [], os.fsync
    press(session, "11")
    monkeypatch.setattr(os, "fsync", lambda fd: (real(fd), synced.append(os.fstat(fd).st_size)))
    press(session, "u")
    assert synced == [(folder / TRAIN).stat().st_size, (folder / "labels.jsonl").stat().st_size]


# ---- again ----

def test_every_tenth_pair_comes_again_turned_round_and_only_the_journal_holds_it(tmp_path, capsys):
    folder = folder_of(tmp_path)
    session = session_of(folder)
    first = session.pair
    press(session, "1" * 11)
    assert session.pair == first._replace(shown=first.shown[::-1], again=True)
    press(session, "2")  # the same response, now on the right
    assert not session.pair.again
    press(session, "=" + "1" * 9)
    assert session.pair.again and session.pair.prompt == session.entries[10]["prompt"]
    press(session, "1")  # now the other one
    press(session, "1" * 9)
    assert not session.pair.again
    press(session, "1")
    assert session.pair.again
    press(session, "=")
    entries = kept(folder)[0]
    assert [e["agrees"] for e in entries if e["again"]] == [1.0, 0.0, 0.5]
    assert check(folder) == len(entries) and all("file" not in e for e in entries if e["again"])
    made = report.report_agreement(folder)
    assert made == {"self_agreement": 0.5, "asked_twice": 3, "label_ceiling": 0.5}
    assert "in 50.0% of 3 pairs asked twice" in capsys.readouterr().out


def test_what_is_skipped_when_it_comes_again_says_nothing_of_agreement(tmp_path):
    folder = folder_of(tmp_path)
    session = session_of(folder)
    press(session, "1" * 11 + "s")
    assert session.entries[-1]["again"] and "agrees" not in session.entries[-1] and not session.pair.again
    assert report.report_agreement(folder) == {}


def test_a_pair_that_is_skipped_after_an_undo_makes_no_preference_when_it_comes_again(tmp_path):
    folder = folder_of(tmp_path)
    session = session_of(folder)
    press(session, "1" * 11)
    assert session.pair.again
    press(session, "u" * 11 + "s" + "1" * 10)
    assert session.pair.again  # as it was put off by the undo
    press(session, "1")
    last = session.entries[-1]
    assert last["again"] and not {"file", "agrees"} & last.keys() and check(folder) == 12


def test_the_ceiling_of_agreement_and_foreign_files(tmp_path):
    assert report.report_agreement(tmp_path) == {}
    rows = [{"agrees": 1.0}] * 82 + [{"agrees": 0.0}] * 18 + [{"key": "1"}, {"agrees": "yes"}, {"agrees": 7}]
    jsonl(tmp_path / "labels.jsonl", rows)
    with open(tmp_path / "labels.jsonl", "a") as file:
        file.write('{"agrees": 0.0')  # what a kill has cut off
    made = report.report_agreement(tmp_path)
    assert made == {"self_agreement": 0.82, "asked_twice": 100, "label_ceiling": pytest.approx(0.9)}
    (tmp_path / "labels.jsonl").write_bytes(b"\xff not ours\n")
    assert report.report_agreement(tmp_path) == {}


# ---- kills, full disks, two at once ----

class Kill(BaseException):
    pass


@pytest.mark.parametrize("part", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("at", [2, 5, 9, 10])
def test_a_kill_within_a_write_loses_no_answer_and_leaves_no_half_line(tmp_path, monkeypatch, at, part):
    """The `at`-th answer is cut off within the journal's line, then another within the preference's."""
    for which in (1, 2):
        folder, real, count = folder_of(tmp_path, name=f"mine{which}"), files.append, [0]
        session = session_of(folder)

        def append(path, line, real=real, count=count, which=which):
            count[0] += 1
            if count[0] < 2 * (at - 1) + which:
                return real(path, line)
            with open(path, "ab") as file:
                file.write(line[: round(part * len(line))])
            raise Kill
        monkeypatch.setattr(label, "append", append)
        with pytest.raises(Kill):
            press(session, "1" * 20)
        monkeypatch.setattr(label, "append", real)
        session = session_of(folder)
        saved = at if which == 2 or part == 1 else at - 1
        assert check(folder) == saved == len(session.entries)
        press(session, "1" * 3)
        assert check(folder) == saved + 3


@pytest.mark.parametrize("done", [0, 1])
def test_a_kill_within_an_undo_keeps_or_removes_the_answer_whole(tmp_path, monkeypatch, done):
    folder = folder_of(tmp_path)
    session, real, count = session_of(folder), os.fsync, [0]
    press(session, "12")

    def fsync(fd):
        real(fd)
        count[0] += 1
        if count[0] > done:
            raise Kill
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(Kill):
        press(session, "u")
    monkeypatch.setattr(os, "fsync", real)
    assert len(session_of(folder).entries) == check(folder) == 2 - done


@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize("short", [False, True])
def test_a_full_disk_adds_nothing_and_later_the_session_goes_on(tmp_path, monkeypatch, which, short):
    folder = folder_of(tmp_path)
    session, real, count = session_of(folder), os.fsync, [0]
    press(session, "11")
    before, pair = raw(folder), session.pair

    def fsync(fd):
        count[0] += 1
        if count[0] == which:
            if short:
                os.truncate(fd, os.fstat(fd).st_size - 3)
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space"):
        press(session, "1")
    assert raw(folder) == before and session.pair == pair and len(session.entries) == 2
    press(session, "1")
    assert check(folder) == 3


def test_a_write_that_is_cut_short_by_the_system_is_taken_back(tmp_path):
    limited = ("import resource, signal, sys; from pathlib import Path; from data.files import append\n"
               "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); path = Path(sys.argv[1])\n"
               "resource.setrlimit(resource.RLIMIT_FSIZE, (30, 30))\n"
               "append(path, b'x' * 19 + b'\\n')\n"
               "try: append(path, b'y' * 19 + b'\\n')\n"
               "except OSError as error: print(error)")
    done = subprocess.run([sys.executable, "-c", limited, str(tmp_path / "f")], cwd=ROOT, capture_output=True,
                          text=True, check=True)
    assert (tmp_path / "f").read_bytes() == b"x" * 19 + b"\n" and "full" in done.stdout


@pytest.mark.slow
def test_one_labeller_a_folder(tmp_path):
    folder = folder_of(tmp_path)
    code = (f"import sys, time; sys.path[:0] = [{str(ROOT)!r}]; from pathlib import Path; "
            f"from lib.resume import lock; held = lock(Path({str(folder)!r}), '--data'); "
            "print('held', flush=True); time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        before = raw(folder)
        (tmp_path / "t.csv").write_text("prompt,a,b,choice\np,x,y,a\n")
        for more in ({"table": None}, {"table": tmp_path / "t.csv"}):
            with pytest.raises(UserError, match=f"--data .*mine is in use by process {other.pid}; wait for "
                                                "it, or choose another --data"):
                label.main(arguments(folder, "no.pt", **more))
        assert raw(folder) == before
        other.kill()


def test_a_journal_of_somebody_else_is_refused_and_left_alone(tmp_path):
    for text in ('{"label": 1}\n', "no json\n", '{"prompt": "p"}\n{'):
        folder = folder_of(tmp_path, name=f"mine{len(text)}")
        (folder / "labels.jsonl").write_text(text)
        with pytest.raises(UserError, match="labels.jsonl has lines that tools.label did not write"):
            session_of(folder)
        assert (folder / "labels.jsonl").read_text() == text


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from test_label import check, session_of
folder, rng, known = Path(sys.argv[1]), random.Random(int(sys.argv[2])), []
for kill in range(50):
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        session, rng = session_of(folder), random.Random(kill)
        os.write(writes, b"\\n")
        while session.pair:
            key, prompt = rng.choice("1122=su") if session.entries else "1", session.pair.prompt
            session.press(key, session.turn)
            os.write(writes, f"{{key}} {{prompt}}\\n".encode())  # the next pair is shown
        os._exit(3)
    os.close(writes)
    said = os.fdopen(reads)
    if kill % 5:
        said.readline()  # else it may still be starting
    time.sleep(rng.uniform(0, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    shown = [line.strip() for line in said if line.strip()]
    for line in shown:
        known = known[:-1] if line[0] == "u" else [*known, line]
    for path in folder.glob("*.jsonl"):  # before anything is mended
        assert path.read_bytes().endswith(b"\\n") or not path.read_bytes(), path
    session = session_of(folder)
    found = [f"{{e['key']}} {{e['prompt']}}" for e in session.entries]
    assert check(folder) == len(found)
    assert known in (found, found[:-1]) or known[:-1] == found, (known, found)  # what was pressed at the kill
    known = found
    print(kill, len(shown), len(found), flush=True)
"""


@pytest.mark.slow
def test_50_kills_at_random_moments_lose_no_answer(tmp_path):
    folder = folder_of(tmp_path, 3000)
    code = KILLED.format(root=str(ROOT), tests=str(ROOT / "tests"))
    done = subprocess.run([sys.executable, "-c", code, str(folder), "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = [list(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(counts) == 50 and sum(seen > 0 for _, seen, _ in counts) > 25  # most kills fell into work


# ---- the terminal ----

def test_hostile_texts_control_no_terminal(tmp_path, monkeypatch, capsys):
    folder = folder_of(tmp_path, 0)
    jsonl(folder / "prompts.jsonl", [{"prompt": HOSTILE}])
    session = session_of(folder, lambda prompt, n, rng: ["a " + HOSTILE, "b " + HOSTILE])
    monkeypatch.setattr("sys.stdin", open(os.devnull))
    label.at_terminal(session)
    out = capsys.readouterr().out
    assert "<script>" in out and "\\x1b[2J" in out and "\\u202e" in out and "\\x00" in out
    assert re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]", out) is None
    press(session, "1")
    row = lines(folder / TRAIN)[0]
    assert row["prompt"] == HOSTILE and HOSTILE in row["chosen"]  # the file holds what the model wrote


def test_texts_are_wrapped_to_the_terminal(monkeypatch):
    left, right = "left " * 30, "right\n\nother " + "x" * 100
    monkeypatch.setenv("COLUMNS", "81")
    some = terminal.side_by_side(left, right)
    assert {row.index("|") for row in some} == {39} and max(map(len, some)) <= 80
    assert "left" in some[0] and "right" in some[0] and some[1].endswith("| ")
    assert "".join(row[40:].strip() for row in some) == "rightother " + "x" * 100
    for columns, text in (("50", right), ("81", "\u05d0\u05d1"), ("81", "\u6f22\u5b57")):
        monkeypatch.setenv("COLUMNS", columns)
        some = terminal.side_by_side(left, text)
        assert not any("|" in row for row in some) and max(map(len, some)) < int(columns)
        assert some.index("") == len(terminal.wrapped(left, int(columns) - 1))


def test_keys_that_are_piped(monkeypatch, tmp_path, capsys):
    folder = folder_of(tmp_path)
    (tmp_path / "keys").write_text("1\n2 x\n=q1111")
    monkeypatch.setattr("sys.stdin", open(tmp_path / "keys"))
    label.at_terminal(session_of(folder))
    assert [e["key"] for e in kept(folder)[0]] == ["1", "2", "="]
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UserError, match="no open standard input"):
        label.at_terminal(session_of(folder))


PTY = f"""
import os, sys, threading, time
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]
from lib.terminal import single_keys
with single_keys() as ask:
    print("ready", flush=True); time.sleep(0.5)
    while (key := ask("> ")):
        print(f"<{{key}}>", flush=True)
print("end")
"""


def test_single_keys_on_a_terminal_need_no_enter_and_arrows_are_none(tmp_path):
    import pty
    import select
    import termios
    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    process = subprocess.Popen([sys.executable, "-c", PTY], stdin=slave, stdout=slave, stderr=slave)
    out = b""

    def until(text):
        nonlocal out
        while text not in out:
            assert process.poll() is None and select.select([master], [], [], 20)[0], out
            out += os.read(master, 1000)
        before_it, _, out = out.partition(text)
        return before_it
    try:
        until(b"ready")
        os.write(master, b"1")  # typed before anything is shown
        until(b"> ")
        for typed, got in ((b"2", b"<2>"), (b"\x1b[1;2A", b"<?>"), (b"11", b"<?>"), (b"u", b"<u>"),
                           (b"\n", b"<")):
            os.write(master, typed)
            assert b"<" not in until(got)
            until(b"> ")
        os.write(master, b"\x04")
        assert process.wait(30) == 0
    finally:
        process.kill()
    assert termios.tcgetattr(slave) == before
    os.close(master), os.close(slave)


def test_mistakes_are_told_before_anything_is_written(tmp_path):
    folder = folder_of(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    for said, made in (("prompts.jsonl is missing", arguments(empty, "a")),
                       ("prompts.jsonl is missing", arguments(tmp_path / "no", "a")),
                       ("two with --compare", arguments(folder, "a", "b")),
                       ("two with --compare", arguments(folder, "a", compare=True)),
                       ("--judge or --web", arguments(folder, "a", judge="rm.pt", web=0)),
                       ("max-new-tokens above 0", arguments(folder, "a", max_new_tokens=0)),
                       ("no.csv can't be read", arguments(empty, table=Path("no.csv")))):
        with pytest.raises(UserError, match=said):
            label.main(made)
    assert [*raw(folder)] == ["prompts.jsonl"] and not raw(empty) and not (tmp_path / "no").exists()


@pytest.mark.slow
def test_a_mistake_is_one_sentence(tmp_path):
    folder = folder_of(tmp_path)
    done = subprocess.run([sys.executable, "-m", "tools.label", "--data", str(folder), "--ckpt", "no.pt"],
                          cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 1 and done.stderr == "tools.label: no.pt is missing\n"


# ---- the page ----

@contextmanager
def served(session):
    """(port, token) of the page of a session."""
    said, real = [], print
    thread = threading.Thread(target=label.on_page, args=(session, 0), daemon=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *args, **how: (said.append(args[0]), real(*args)))
        thread.start()
        while not said:
            time.sleep(0.01)
    port, token = re.fullmatch(r"open http://127\.0\.0\.1:(\d+)/(.{20,})", said[0]).groups()
    try:
        yield int(port), token
    finally:
        if thread.is_alive():
            ask(int(port), token, body={"key": "q", "turn": -1})
        thread.join(10)
        assert not thread.is_alive()


def ask(port, path, body=None, **headers):
    """(status, body, headers) of a GET, or of a POST of `body`; Host and Origin as of the page itself."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    sent = {"Host": f"127.0.0.1:{port}"} | ({"Origin": f"http://127.0.0.1:{port}"} if body else {}) | headers
    data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    connection.putrequest("POST" if body else "GET", f"/{path}", skip_host=True, skip_accept_encoding=True)
    for name, value in (({"Content-Length": len(data)} if data else {}) | sent).items():
        if value is not None:
            connection.putheader(name, str(value))
    connection.endheaders(data)
    reply = connection.getresponse()
    return reply.status, reply.read(), reply.headers


def test_the_page_answers_only_itself(tmp_path):
    folder = folder_of(tmp_path)
    session = session_of(folder)
    with served(session) as (port, token):
        status, page, headers = ask(port, token)
        assert status == 200 and b"<script nonce" in page and b"NONCE" not in page
        nonce = re.search(rb'script nonce="([^"]+)"', page)[1].decode()
        policy = headers["Content-Security-Policy"]
        for part in ("default-src 'none'", "frame-ancestors 'none'", f"script-src 'nonce-{nonce}'"):
            assert part in policy
        assert not [name for name in headers if name.lower().startswith("access-control")]
        one = {"key": "1", "turn": 0}
        refused = [dict(path="x" + token[1:]), dict(path=""), dict(path=token + "/x"), dict(path=token[:-1]),
                   dict(Origin="http://evil.example"), dict(Origin="null"),
                   dict(Origin=f"https://127.0.0.1:{port}"), dict(Origin=f"http://127.0.0.1:{port}0"),
                   dict(Host="evil.example"), dict(Host=f"evil.example:{port}"), dict(Host="127.0.0.1"),
                   dict(Host=f"evil.example:{port}", Origin=f"http://evil.example:{port}"), dict(Host=None)]
        for case in refused:
            assert ask(port, **{"path": token, "body": one} | case)[0] in (400, 403), case
            assert ask(port, **{"path": token} | case)[0] in (400, 403), case
        assert ask(port, token, one, Origin=None)[0] == 403  # a form or a script elsewhere
        long = b'{"key": "1", "turn": 0' + b" " * 2000 + b"}"
        for body in (b"no json", b"[]", b"{}", b'{"key": "1"}', long):
            assert ask(port, token, body)[0] == 400
        assert ask(port, token, one, **{"Content-Length": "x"})[0] == 400
        assert check(folder) == 0 and session.turn == 0
        status, state, _ = ask(port, token, one, Host=f"localhost:{port}", Origin=f"http://localhost:{port}")
        assert status == 200 and json.loads(state)["turn"] == 1 and check(folder) == 1


def test_of_two_tabs_the_later_answer_to_a_pair_is_refused(tmp_path):
    folder = folder_of(tmp_path)
    session = session_of(folder)
    with served(session) as (port, token):
        a, b = (json.loads(ask(port, token, {"key": "", "turn": -1})[1]) for _ in "ab")
        assert a == b and a["note"] == ""
        after = json.loads(ask(port, token, {"key": "1", "turn": a["turn"]})[1])
        late = json.loads(ask(port, token, {"key": "2", "turn": b["turn"]})[1])
        assert check(folder) == 1 and kept(folder)[0][0]["key"] == "1"
        assert "already" in late["note"] and late == after | {"note": late["note"]}
        undone = json.loads(ask(port, token, {"key": "u", "turn": after["turn"]})[1])
        stale = json.loads(ask(port, token, {"key": "u", "turn": after["turn"]})[1])
        assert undone["note"] == "Undone." and "already" in stale["note"] and undone["prompt"] == a["prompt"]
        assert undone["turn"] not in (a["turn"], after["turn"])  # a tab from before knows nothing of the undo

        def hammer():
            turn = -1
            for _ in range(15):
                turn = json.loads(ask(port, token, {"key": "1", "turn": turn})[1])["turn"]
        threads = [threading.Thread(target=hammer) for _ in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert check(folder) == session.turn - 2


def test_a_full_disk_is_told_on_the_page(tmp_path, monkeypatch):
    session = session_of(folder_of(tmp_path))
    with served(session) as (port, token):
        def full(path, line):
            raise OSError(errno.ENOSPC, "No space left on device")
        monkeypatch.setattr(label, "append", full)
        state = json.loads(ask(port, token, {"key": "1", "turn": 0})[1])
        assert "Not saved" in state["note"] and "No space" in state["note"] and state["turn"] == 0


def test_a_port_that_is_taken(tmp_path):
    with served(session_of(folder_of(tmp_path))) as (port, _):
        for wrong in (port, 70000, -1):
            with pytest.raises(UserError, match=f"port {wrong}: "):
                label.on_page(session_of(folder_of(tmp_path, name=f"x{wrong}")), wrong)


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium (apt-get install chromium)")
def test_the_page_in_a_browser(tmp_path):
    """Twenty labels, undo, two tabs, a wrong token, a foreign Origin, hostile texts; then it is ended."""
    folder = folder_of(tmp_path)
    jsonl(folder / "prompts.jsonl", [{"prompt": f"{i} {HOSTILE}"} for i in range(40)])
    session = session_of(folder, lambda prompt, n, rng: [f" {HOSTILE} {rng.random()}" for _ in range(n)])

    def shows(tab, turn):
        tab.wait(f"turn == {turn}")
        view = session.view()
        names = ["prompt", "left", "right", "status"]
        texts = tab.run(f"{names}.map(id => document.getElementById(id).textContent)")
        assert texts == [view[name] for name in names]
        assert tab.run("document.title") == "Label"
        assert tab.run("document.querySelectorAll('img, iframe, pre *').length") == 0

    with served(session) as (port, token), Browser(tmp_path / "profile") as browser:
        tab = browser.open(f"http://127.0.0.1:{port}/{token}")
        shows(tab, 0)
        keys = "12=s" * 5
        for n, key in enumerate(keys, 1):
            if n % 2:
                tab.press(key)
            else:
                tab.run("[...document.querySelectorAll('button')]"
                        f".find(button => button.textContent == '{key}').click()")
            shows(tab, n)
            assert check(folder) == n == session.turn
        assert [e["key"] for e in kept(folder)[0]] == [*keys]
        tab.press("1", modifiers=2), tab.press("x"), tab.press("1", autoRepeat=True)
        tab.press("u")
        shows(tab, 21)
        assert check(folder) == 19
        assert tab.run("document.getElementById('note').textContent") == "Undone."
        tab.press("2")
        shows(tab, 22)

        other = browser.open(f"http://localhost:{port}/{token}")
        shows(other, 22)
        other.press("1")
        shows(other, 23)
        tab.press("2")  # the first tab still shows the pair that the other has answered
        tab.wait("document.getElementById('note').textContent.includes('already')")
        shows(tab, 23)
        assert check(folder) == 21 and kept(folder)[0][-1]["key"] == "1"

        wrong = browser.open(f"http://127.0.0.1:{port}/{token[:-1]}")
        assert "403" in wrong.run("document.body.textContent") and not wrong.run("document.scripts.length")
        body = json.dumps(json.dumps({"key": "1", "turn": session.turn}))
        (tmp_path / "evil.html").write_text("<title>evil</title>")
        pages = partial(SimpleHTTPRequestHandler, directory=tmp_path)
        with ThreadingHTTPServer(("127.0.0.1", 0), pages) as evil:
            threading.Thread(target=evil.serve_forever, daemon=True).start()
            for place in (f"http://127.0.0.1:{evil.server_port}/evil.html",
                          "data:text/html,<title>evil</title>"):
                elsewhere = browser.open(place)
                for mode in ("no-cors", "cors"):
                    how = f"{{method: 'POST', mode: '{mode}', body: {body}}}"
                    elsewhere.run(f"fetch('http://127.0.0.1:{port}/{token}', {how}).then(() => 0, () => 0)")
                assert check(folder) == 21 and elsewhere.run("document.title") == "evil"
            evil.shutdown()
        assert not [m for m in browser.seen if m.get("method") == "Runtime.exceptionThrown"]
        tab.press("q")
        tab.wait("document.getElementById('note').textContent == 'Ended.'")
        time.sleep(1)
        tab.press("1")
        tab.wait("document.getElementById('note').textContent.includes('not saved')")
        assert check(folder) == 21


# ---- two models ----

def compared(folder, keys, models=("a: 1", "b: 2")):
    """keys: the better model, "a" or "b", or a key."""
    prompts = [row["prompt"] for row in lines(folder / "prompts.jsonl")]
    session = Session(folder, prompts, [lambda *_: [" of a"], lambda *_: [" of b"]], [*models])
    for key in keys:
        left = session.view()["left"]
        press(session, key if key not in "ab" else "1" if left == f" of {key}" else "2")
    return session


def test_a_blind_comparison_counts_for_the_right_model(tmp_path, capsys):
    folder = folder_of(tmp_path)
    before = raw(folder)
    session = compared(folder, "bbbbbbba=sbu")
    assert {tuple(e["shown"]) for e in session.entries} == {(0, 1), (1, 0)}
    assert raw(folder).keys() - before.keys() == {"comparisons.jsonl"}
    session = compared(folder, "b" * 10)  # goes on, and asks nothing twice
    assert len(session.entries) == 20 and not any(e["again"] for e in session.entries)
    assert session.view()["left"].startswith(" of ")  # and no side is named
    capsys.readouterr()
    report.report_wins("A.pt", "B.pt", [e["best"] for e in session.entries if e["key"] != "s"])
    out = capsys.readouterr().out
    assert "B.pt wins 92.1% against A.pt, 95% interval 71.9% to 98.2% (Wilson): 17 won, 1 lost, 1 ties" in out
    other = compared(folder, "a", ("a: 1", "b: 3"))  # another checkpoint: another comparison
    assert len(other.entries) == 1 and len(compared(folder, "").entries) == 20
    assert "Not undone" in press(compared(folder, ""), "u")["note"]


def test_wilson_and_how_many_more_are_needed(capsys):
    assert report.wilson(0.5, 100) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))
    assert report.wilson(0.0, 10) == (pytest.approx(0, abs=1e-9), pytest.approx(0.2775, abs=1e-4))
    report.report_wins("A", "B", [1, 0] * 50)
    assert "about 281 more prompts" in capsys.readouterr().out  # 381 at 50%
    report.report_wins("A", "B", [1, 0] * 191)
    assert "+-5% or better" in capsys.readouterr().out
    report.report_wins("A", "B", [])
    assert "nothing" in capsys.readouterr().out


# ---- with real checkpoints ----

def arguments(folder, *ckpt, **more):
    return Namespace(**{"data": folder, "ckpt": list(map(str, ckpt)), "compare": False, "judge": None,
                        "web": None, "table": None, "max_new_tokens": 12, "device": "cpu"} | more)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        gpt = tiny_gpt(seed, vocab_size=BYTES.vocab_size)
        save(folder / f"sft{seed}.pt", gpt, BYTES)
    save(folder / "rm.pt", RewardModel.from_gpt(gpt), BYTES)
    return folder


@pytest.mark.slow
def test_a_judge_labels_and_train_rm_trains_on_it_unchanged(tmp_path, models, capsys):
    folder = tmp_path / "mine"
    make_data(folder, n=8)
    for name in (TRAIN, VAL):
        (folder / name).unlink()
    jsonl(folder / "prompts.jsonl", [{"prompt": f"{i}:"} for i in range(60)])
    label.main(arguments(folder, models / "sft0.pt", judge=models / "rm.pt"))
    out = capsys.readouterr().out
    assert "agreed with an earlier answer in 100.0% of 5 pairs" in out and "65 answers" in out
    assert check(folder) == 65 and (len(kept(folder)[1]), len(kept(folder)[2])) == (54, 6)
    scores = [row for row in lines(folder / TRAIN)]
    from tools import score
    score.main(Namespace(file=folder / TRAIN, rm=models / "rm.pt", out=None, batch_tokens=999, device="cpu",
                         skip_bad=False))
    assert f"accuracy 100.0% +- 6.6% (95%) on {len(scores)} pairs" in capsys.readouterr().out
    train_rm.main(train_rm.Config(data=str(folder), out=str(tmp_path / "out"), sft=str(models / "sft0.pt"),
                                  epochs=1.0, device="cpu"))
    out = capsys.readouterr().out
    assert "ignored" not in out and "bad lines" not in out
    assert "agreed with an earlier answer in 100.0% of 5 pairs" in out
    last = lines(tmp_path / "out/rm.log.jsonl")[-1]["report"]
    assert last["self_agreement"] == 1.0 and last["asked_twice"] == 5


def test_a_judge_skips_what_does_not_fit_and_equal_scores_are_a_tie(tmp_path, models, monkeypatch):
    folder = folder_of(tmp_path, 3)
    scores = iter([[[1.0, 1.0]], [None], [[1.0, 2.0]]])
    monkeypatch.setattr(label, "score_all", lambda *_: next(scores))
    session = session_of(folder)
    label.by_judge(session, models / "rm.pt", "cpu")
    assert [e["key"] for e in session.entries] == ["=", "s", "2"]


def test_a_comparison_of_checkpoints_on_held_out_prompts(tmp_path, models, capsys, monkeypatch):
    folder = folder_of(tmp_path, 3)
    jsonl(folder / "prompts_val.jsonl", [{"prompt": f"held {i}:"} for i in range(4)])
    both = (models / "sft0.pt", models / "sft1.pt")
    scores = iter([[[1.0, 2.0]], [None], [[1.0, 1.0]], [[2.0, 1.0]]])  # of one nothing is known
    monkeypatch.setattr(label, "score_all", lambda *_: next(scores))
    label.main(arguments(folder, *both, compare=True, judge=models / "rm.pt"))
    out = capsys.readouterr().out
    won, lost, ties = map(int, re.search(r"(\d) won, (\d) lost, (\d) ties", out).groups())
    assert f"{both[1]} wins " in out and (won + lost, ties) == (2, 1)
    entries = lines(folder / "comparisons.jsonl")
    assert [e["prompt"] for e in entries] == [f"held {i}:" for i in range(4)]
    assert len({tuple(e["models"]) for e in entries}) == 1 and str(both[0]) in entries[0]["models"][0]
    assert {*raw(folder)} == {"prompts.jsonl", "prompts_val.jsonl", "comparisons.jsonl"}
    label.main(arguments(folder, *both, compare=True, judge=models / "rm.pt"))
    assert capsys.readouterr().out.endswith(out[-60:]) and len(lines(folder / "comparisons.jsonl")) == 4


def test_two_samplers_draw_apart(models, tmp_path):
    """Of twice the same checkpoint, two responses that differ: else a comparison would be of equal texts."""
    sample = label.sampler(models / "sft0.pt", Namespace(max_new_tokens=12), "cpu")
    pair = next(label.new_pairs(["p:"], [sample, sample]))
    again = next(label.new_pairs(["p:"], [sample, sample]))
    assert pair.responses[0] != pair.responses[1] and pair == again


def test_responses_that_end_come_first(models, monkeypatch):
    found = [("cut", False, 0), ("a", True, 0), ("b", True, 0)]
    monkeypatch.setattr(label, "answers", lambda *_: (found, None))
    sample = label.sampler(models / "sft0.pt", Namespace(max_new_tokens=12), "cpu")
    assert sample("p", 3, random.Random(1)) == ["a", "b", "cut"]


# ---- imports ----

TASKS = [
    {"id": 1, "data": {"prompt": "p0", "answer1": "x", "answer2": "y"},
     "annotations": [{"result": [
         {"type": "pairwise", "to_name": "answer1,answer2", "value": {"selected": "left"}}]}]},
    {"id": 2, "data": {"prompt": "p1", "answer1": "x", "answer2": "y", "source": 3},
     "annotations": [{"was_cancelled": True, "result": [{"type": "pairwise", "value": {"selected": "left"}}]},
                     {"result": [
                         {"type": "choices", "value": {"choices": ["fine"]}},
                         {"type": "pairwise", "to_name": "left,right", "value": {"selected": "right"}}]}]},
    {"id": 3, "data": {"prompt": "p2", "b": "y", "a": "x", "about": "z"},
     "annotations": [{"result": [{"type": "pairwise", "to_name": "a,b", "value": {"selected": "left"}}]}]},
    {"id": 4, "data": {"prompt": "p3", "answer1": "x", "answer2": "y"}, "annotations": []}]


def test_label_studio_json(tmp_path):
    (tmp_path / "ls.json").write_text(json.dumps(TASKS))
    folder = tmp_path / "new"
    label.main(arguments(folder, table=tmp_path / "ls.json"))
    assert lines(folder / TRAIN) == [{"prompt": "p0", "chosen": " x", "rejected": " y"},
                                     {"prompt": "p1", "chosen": " y", "rejected": " x"},
                                     {"prompt": "p2", "chosen": " x", "rejected": " y"}]
    def result(task):
        return task["annotations"][0]["result"][0]
    for spoil in (lambda task: task["data"].pop("prompt"), lambda task: task["data"].pop("answer1"),
                  lambda task: task.update(data=[]), lambda task: task.update(annotations=3),
                  lambda task: result(task).pop("value"),
                  lambda task: task["data"].update(answer3="z") or result(task).pop("to_name")):
        tasks = json.loads(json.dumps(TASKS))
        spoil(tasks[0])
        (tmp_path / "bad.json").write_text(json.dumps(tasks))
        with pytest.raises(UserError, match=r"bad.json: item 1: expected \"annotations\""):
            read_choices(tmp_path / "bad.json")


@pytest.mark.parametrize("there", ["Write:\n", "\n\nHuman: Hi\n\nAssistant:", "Human: Hi\n\nAssistant:",
                                   "Write:"])
def test_an_import_keeps_the_blanks_of_a_prompt_that_is_there(tmp_path, there):
    folder = tmp_path / "mine"
    folder.mkdir()
    jsonl(folder / VAL, [{"prompt": there, "chosen": " x", "rejected": " y"}])
    (tmp_path / "t.json").write_text(json.dumps([
        {"prompt": there.strip(), "a": a, "b": b, "choice": "a"} for a, b in (("x", "y"), ("u", "v"))]))
    label.main(arguments(folder, table=tmp_path / "t.json"))
    assert not (folder / TRAIN).exists()
    assert [(row["prompt"], row["chosen"]) for row in lines(folder / VAL)] == [(there, " x"), (there, " u")]


def test_line_ends_that_were_changed_add_no_label_again(tmp_path):
    folder = folder_of(tmp_path, 3)
    press(session_of(folder), "1")
    (folder / TRAIN).write_bytes(before := (folder / TRAIN).read_bytes().replace(b"\n", b"\r\n"))
    session_of(folder)
    assert (folder / TRAIN).read_bytes() == before


def test_a_label_studio_tag_that_names_neither_text(tmp_path):
    for names, fine in ((("answer2", "answer1"), True), (("alt", "main"), False)):
        result = {"type": "pairwise", "to_name": "left,right", "value": {"selected": "left"}}
        task = {"data": {"prompt": "p", names[0]: "second", names[1]: "first"},
                "annotations": [{"result": [result]}]}
        (tmp_path / "ls.json").write_text(json.dumps([task]))
        if fine:
            assert [*read_choices(tmp_path / "ls.json")] == [("p", " first", " second")]
        else:
            with pytest.raises(UserError, match="alike but for a last 1 and 2"):
                read_choices(tmp_path / "ls.json")


def test_a_csv_is_added_once_and_each_prompt_stays_on_its_side(tmp_path, capsys):
    folder = folder_of(tmp_path, 3)
    press(session_of(folder), "1")
    jsonl(folder / VAL, [{"prompt": "mine", "chosen": " x", "rejected": " y"}])
    labelled = (folder / TRAIN).read_bytes()[:-1]
    (folder / TRAIN).write_bytes(labelled)  # without its newline
    rows = ["prompt,a,b,choice", "mine,u,v,a", "Question 0?,u,v,b", "mine,x,y,a", "tied,x,y,tie"]
    rows += [f"new {i},x,y,{'ab'[i % 2]}" for i in range(25)] + ["new 9,x,z,a"]
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n")
    label.main(arguments(folder, table=tmp_path / "t.csv"))
    train, val = lines(folder / TRAIN), lines(folder / VAL)
    assert (folder / TRAIN).read_bytes().startswith(labelled + b"\n")
    assert {row["prompt"] for row in val} == {"mine", "new 9", "new 19"} and len(val) == 5
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in val}
    assert {"prompt": "Question 0?", "chosen": " v", "rejected": " u"} in train and len(train) == 25
    assert "a tie" in capsys.readouterr().out
    before = raw(folder)
    label.main(arguments(folder, table=tmp_path / "t.csv"))
    assert raw(folder) == before and "0 lines added" in capsys.readouterr().out
    assert session_of(folder).pair.prompt == "Question 1?"


def test_a_kill_within_an_import_leaves_whole_files(tmp_path, monkeypatch):
    folder = folder_of(tmp_path, 3)
    jsonl(folder / TRAIN, [{"prompt": "mine", "chosen": " x", "rejected": " y"}])
    before = raw(folder)

    def fsync(fd):
        raise Kill
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(Kill):
        add_choices({("p", " a", " b"): []}, folder)
    assert raw(folder) == before


@pytest.mark.parametrize("text", [
    "prompt,response\np,x\n", "a,b,choice\nx,y,a\n", "prompt,a,b,choice\n,x,y,a\n",
    "prompt,a,b,choice\np,x,y,neither\n", "prompt,a,b,choice\np,x,y,what\n"])
def test_other_tables_are_refused_before_anything_is_written(tmp_path, text):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError):
        label.main(arguments(tmp_path / "new", table=tmp_path / "t.csv"))
    assert not (tmp_path / "new").exists()


def test_visible_marks_of_direction():
    assert visible("a\u200fb\u061cc\u200e\u202e") == "a\\u200fb\\u061cc\\u200e\\u202e"
