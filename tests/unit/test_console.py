"""The live view and what stands in its place: sizes, terminals that change, readers that go away, notebooks, jobs that log every step."""

from __future__ import annotations

import builtins
import fcntl
import io
import json
import os
import pty
import re
import subprocess
import sys
import termios
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from limbeck.cli.console import say, terminal
from limbeck.engine import console as voices
from limbeck.engine import screen
from limbeck.engine.console import Counter, Progress, describe, frame
from limbeck.engine.frame import count_frame, curve, printable
from terminals import PATIENCE, ROOT, TERMINAL, Terminal, child


def row(step: int, **changes: Any) -> dict[str, Any]:
    """A training line of a metrics file, with a teacher that is waited for."""
    return {
        "step": step, "tokens": 4096 * step, "loss": 9.0 / (1 + 0.1 * step), "losses": [1.0], "kl": 0.0831, "agreement": 0.912, "ce/raw": 1.98,
        "ce/weighted": 0.99, "topk_kl/raw": 0.0831, "topk_kl/weighted": 0.04155, "grad_norm": 0.42, "lr/0": 1e-4, "tokens_per_second": 12345.0,
        "memory_bytes": 3e9, "teacher_seconds": 3.0, "teacher_share": 0.34, "eta_seconds": 10.0 * (1000 - step), "time": 1.8e9, **changes,
    }  # fmt: skip


ROWS = [row(step) for step in range(1, 400, 10)]
SITUATIONS: dict[str, dict[str, Any]] = {
    "full": {"place": "stage 3 of 5", "saved": (300, 720.0), "elapsed": 4000.0, "doing": "waiting for the teacher", "doing_seconds": 14.0},
    "before the first row": {"rows": [], "doing_seconds": 70.0},
    "a long name in wide characters, with a newline": {"title": "蒸留\n" * 60, "place": "cell 3 of 12 " * 9},
    "from a file": {"rows": [json.loads(json.dumps(row(5, loss=None, grad_norm=None, kl=None))), {"step": 5, "validation/loss": 1.0}]},
}


def drawn(thing: Any, width: int, height: int, **options: Any) -> list[str]:
    """The lines of a frame on a console of this size."""
    file = io.StringIO()
    console = Console(width=width, height=height, file=file, force_terminal=True, color_system=None, legacy_windows=False, **options)
    console.print(thing)
    return [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line) for line in file.getvalue().splitlines()]


# -- frames --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_frame_has_the_size_that_there_is(situation: str) -> None:
    options = {"rows": ROWS, "title": "distil", "num_steps": 1000, **SITUATIONS[situation]}
    rows = options.pop("rows")
    for ascii_only in (False, True):
        for width in (1, 2, 7, *range(20, 131, 11), 300):
            for height in (1, 2, 3, 5, 8, 100):
                lines = drawn(frame(rows, **options, width=width, height=height, ascii_only=ascii_only), 400, 200)
                assert 1 <= len(lines) <= height
                # Cells, not characters: wide ones take two.
                assert all(cell_len(line) <= width for line in lines), (width, lines)
                assert not ascii_only or "".join(lines).isascii()
                assert lines == drawn(frame(rows, **options, width=width, height=height, ascii_only=ascii_only), width, height)


def at_night() -> list[str]:
    """A frame of a run that is teacher-bound, at eight in the morning."""
    zone = os.environ.get("TZ")
    os.environ["TZ"] = "UTC"
    time.tzset()
    try:
        return drawn(frame(ROWS, title="distil", num_steps=1000, now=1.8e9, step=395, width=100, **SITUATIONS["full"]), 100, 24)
    finally:
        del os.environ["TZ"]
        if zone is not None:
            os.environ["TZ"] = zone
        time.tzset()


def test_the_documentation_shows_the_view_as_it_is() -> None:
    block = re.search(r"## What you see while it runs.*?```text\n(.*?)```", (ROOT / "docs" / "runs.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None and block[1].splitlines() == at_night()


def test_a_frame_tells_what_a_person_asks_at_night() -> None:
    lines = at_night()
    assert lines[0].startswith("distil   stage 3 of 5") and lines[0].endswith(" 1h06m")
    assert lines[1].startswith("━━━━━") and lines[1].endswith("395/1,000   40%   1.62M tokens")
    assert lines[2].startswith("loss 0.2244   KL 0.0831 nats/token   agreement 91.2%   gradient 0.42   ")
    assert "█" in lines[2] and "▁" in lines[2]
    assert lines[3] == "objectives   ce 1.98 → 0.99   topk_kl 0.0831 → 0.04155"
    assert lines[4] == "12.3k tok/s   3.00 GB   waiting for the teacher 34%   teacher-bound"
    # Ten seconds a step for the 605 that are left; the last row knew of 609.
    assert lines[5] == "left 1h40m, until 09:40   waiting for the teacher for 14s   saved step 300, 12m00s ago"
    assert len(lines) == 6
    # The least important lines go first, and the one that is left has the numbers.
    assert [line[:4] for line in drawn(frame(ROWS, title="distil", num_steps=1000, width=100, height=3), 100, 3)] == ["━━━━", "loss", "left"]
    assert drawn(frame(ROWS, title="distil", num_steps=1000, width=60, height=1), 60, 1)[0].startswith("distil   391/1,000   loss 0.2244   left 1h41m")


def test_what_a_run_does_not_have_is_not_shown() -> None:
    alone = row(5, teacher_share=0.0)
    for name in ("kl", "agreement", "topk_kl/raw", "topk_kl/weighted"):
        del alone[name]
    lines = drawn(frame([alone | {"ce/weighted": 1.98, "ce": 1.98}], title="pretrain", num_steps=10), 80, 24)
    assert not any(word in "\n".join(lines) for word in ("teacher", "KL", "agreement", "objectives", "saved", "stage"))
    assert "CE 1.9800 nats/token" in lines[2]
    quick = drawn(frame([row(5, teacher_share=0.03)], title="distil", num_steps=10), 80, 24)
    assert "waiting for the teacher 3%" in quick[4] and "bound" not in quick[4]
    broken = drawn(frame([row(5, loss=float("nan"), grad_norm=float("inf"))], title="distil", num_steps=10), 80, 24)
    assert "loss not finite" in broken[2] and "gradient not finite" in broken[2]
    assert "left" not in "\n".join(drawn(frame([row(10)], title="distil", num_steps=10), 80, 24))


def test_the_curve_shows_where_the_loss_goes_and_not_its_first_steps_alone() -> None:
    assert curve(ROWS[:2], 10) == ""
    falling = curve([row(step, loss=100.0 if step == 1 else 2 - step / 100) for step in range(1, 101)], 10)
    assert len(falling) == 10 and falling[0] == "█" and falling[-1] == "▁" and len(set(falling)) > 5
    assert sorted(falling, reverse=True) == list(falling)


def test_words_that_would_move_the_cursor_or_cannot_be_shown_become_harmless() -> None:
    assert printable("a\x1b[2Jb\rc\nd", "utf-8") == "a [2Jb c\nd"
    assert printable("naïve → 蒸", "ascii") == "na?ve ? ?" and printable("é", "latin-1") == "é"


def test_counted_work_has_a_frame_of_any_size_too() -> None:
    for width in (1, 20, 80, 300):
        for share, height in ((None, 1), (0.4, 2), (3.0, 24)):
            lines = drawn(count_frame(title="capture", words=["40%", "1.2M/3M tokens", "", "x" * 90], share=share, width=width, height=height), width, height)
            assert len(lines) <= min(2, height) and all(len(line) <= width for line in lines)


# -- a terminal that is one ----------------------------------------------------------------------------------------------


@pytest.fixture
def tty(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(screen, "EVERY", 0.02)
    terminal = Terminal(70, 12)
    yield terminal
    terminal.close()


def opened(tty: Terminal, **environment: str) -> Console:
    return Console(file=os.fdopen(tty.inner, "w", encoding="utf-8"), soft_wrap=True, highlight=False, _environ=TERMINAL | environment)


def test_a_view_follows_its_terminal_and_messages_stand_above_it(tty: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    # A frame that is under way while the terminal is resized has no right size: here none is.
    monkeypatch.setattr(screen, "EVERY", 1000.0)
    # COLUMNS is exported by some shells, and stays what it was.
    voice = Progress(opened(tty, COLUMNS="200", LINES="90"), "distil", 1000, place="stage 3 of 5")
    voice.start()
    tty.wait(lambda emulator: not emulator.cursor)
    for step in range(1, 60):
        voice.update(row(step))
    view: Any = voice._view
    view._tick()
    tty.shows("59/1,000")
    voice.say("first message")
    print("a library's word on stdout")
    tty.shows("a library's word on stdout")
    sizes = ((40, 20), (24, 20), (33, 12), (69, 30), (300, 100))
    for number, (width, height) in enumerate(sizes, 1):
        tty.size(width, height)
        voice.say(f"message at {width} columns")
        tty.shows(f"message at {width} columns")
        voice.doing("", 60 + number)
        view._tick()
        tty.shows(f"{60 + number}/1,000")
        with tty.lock:
            shown = [line for line in tty.emulator.text() if line]
            lines = shown[2 + number :]
            assert [line for line in shown if line.startswith(("distil", "loss"))] == [lines[0], lines[2]] and 5 <= len(lines) <= 6, shown
            assert all(len(line) < min(width, 101) for line in lines), shown
    voice.close()
    tty.wait(lambda emulator: emulator.cursor)
    last = f"distil  {describe(row(59), 1000)}"
    tty.shows(last)
    with tty.lock:
        said = [f"message at {width} columns" for width, _ in sizes]
        # Nothing of the view is left, nothing of what was said is lost, and the shell's prompt has a line of its own.
        assert [line for line in tty.emulator.text() if line] == ["first message", "a library's word on stdout", *said, last]
        assert tty.emulator.at[1] == 0


def test_a_view_lives_in_three_rows_of_twenty_columns(tty: Terminal) -> None:
    tty.size(20, 3)
    voice = Progress(opened(tty), "distil", 1000)
    voice.start()
    voice.update(row(59))
    for number in range(9):
        voice.say(f"message {number}")
    tty.wait(lambda emulator: emulator.lines[-3::2] == ["message 8", "loss 1.3043"])
    assert tty.emulator.lines[-2].endswith("59/1,000   6%") and len(tty.emulator.lines) == 11
    voice.close()
    tty.shows(describe(row(59), 1000))


def test_a_view_is_alive_while_a_step_takes_long(tty: Terminal) -> None:
    voice = Progress(opened(tty), "distil", 1000)
    voice.start()
    voice.update(row(5))
    voice.doing("waiting for the teacher", 5)
    voice._since -= 40
    tty.shows("waiting for the teacher for 40s")
    voice._since -= 100
    tty.wait(lambda emulator: re.search(r"waiting for the teacher for 2m2\ds", "\n".join(emulator.text())) is not None)
    voice.doing("", 6)
    voice.saved(6, time.time() - 3)
    tty.shows("saved step 6, 3s ago")
    voice.close()


def test_a_run_that_goes_on_is_shown_from_its_beginning_in_bounded_memory(tty: Terminal, tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    lines = [row(step) for step in range(1, 60)] + [{"step": 59, "validation/loss": 2.0}]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    voice = Progress(opened(tty), "distil", 100_000)
    voice.start()
    voice.recall(metrics)
    tty.shows("59/100,000")
    tty.wait(lambda emulator: any("█" in line for line in emulator.text()))
    for step in range(60, 5000):
        voice.update(row(step))
    assert len(voice._rows) <= voices.REMEMBERED + 1 and voice._rows[0]["step"] == 1 and voice._rows[-1]["step"] == 4999
    voice.close()


def test_counted_work_is_a_bar_on_a_terminal(tty: Terminal) -> None:
    with Counter(lambda line: pytest.fail(line), opened(tty), "capture", unit="tokens", total=3_000_000, place="stage 1 of 2") as counter:
        counter.add(600_000, before=True)
        counter.add(600_000, facts="3.2 MB")
        tty.shows("40%   1.2M/3M tokens")
        tty.shows("capture   stage 1 of 2")
    tty.wait(lambda emulator: emulator.cursor and not any(emulator.text()))


def test_a_terminal_that_goes_away_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "EVERY", 0.01)
    outer, inner = pty.openpty()
    console = Console(file=os.fdopen(inner, "w"), _environ=TERMINAL)
    voice = Progress(console, "distil", 1000, log=tmp_path / "training.log")
    voice.start()
    os.close(outer)
    for step in range(1, 30):
        voice.update(row(step))
        voice.say(f"word {step}")
        time.sleep(0.002)
    voice.close()
    assert console.quiet and len((tmp_path / "training.log").read_text().splitlines()) == 58
    assert not isinstance(sys.stdout, type(None)) and type(sys.stdout).__name__ != "FileProxy"


def test_a_job_in_the_background_of_a_shell_draws_nothing(tty: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "_in_foreground", lambda console: False)
    voice = Progress(opened(tty), "distil", 1000)
    voice.start()
    voice.update(row(1))
    tty.shows("distil  step 1/1000")
    voice.close()
    assert "\x1b" not in tty.seen


# -- a process of its own ------------------------------------------------------------------------------------------------


def test_ctrl_c_in_a_real_run_saves_and_leaves_the_terminal_clean(tmp_path: Path) -> None:
    tty = Terminal(90, 20)
    process = child(
        """
        import os
        from pathlib import Path
        from engine_parts import Rows, make_step, make_trainer
        from limbeck.cli.console import terminal

        os.tcsetpgrp(1, os.getpgrp())
        trainer = make_trainer(Path(sys.argv[1]), make_step("kl"), steps=100_000, log_every=5, checkpoint_every=50, console=terminal())
        print(trainer.run().exit_reason)
        """,
        str(tmp_path), stdin=tty.inner, stdout=tty.inner, stderr=tty.inner, preexec_fn=lambda: (os.setsid(), fcntl.ioctl(0, termios.TIOCSCTTY, 0)),
    )  # fmt: skip
    try:
        tty.wait(lambda emulator: any("saved step" in line for line in emulator.text()) and not emulator.cursor)
        tty.size(60, 10)
        tty.wait(lambda emulator: any(line.startswith("train") and len(line) < 60 for line in emulator.text()))
        os.write(tty.outer, b"\x03")
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
    tty.shows("preempted")
    said = [line for line in tty.emulator.text() if line]
    tty.close()
    os.close(tty.inner)
    assert tty.emulator.cursor and said[-1] == "preempted" and said[-2].startswith("stopped by SIGINT after step"), said
    assert re.fullmatch(r"train  step \d+/100000  loss .*", said[-3]), said
    # Above that: what the run has announced, and what torch has warned of.
    assert not any("saved step" in line or "tokens   " in line for line in said), said


def test_a_second_ctrl_c_shows_the_cursor_again() -> None:
    tty = Terminal(90, 20)
    process = child(
        """
        import time
        from rich.console import Console
        from limbeck.engine.console import Progress
        from limbeck.engine.signals import StopFlag

        with StopFlag() as stop:
            voice = Progress(Console(), "distil", 1000)
            voice.start(lambda: stop.reason)
            time.sleep(100)
        """,
        stdin=tty.inner, stdout=tty.inner, stderr=subprocess.PIPE, preexec_fn=lambda: (os.setsid(), fcntl.ioctl(0, termios.TIOCSCTTY, 0)),
    )  # fmt: skip
    try:
        tty.shows("0/1,000")
        os.write(tty.outer, b"\x03")
        tty.wait(lambda emulator: not emulator.cursor and "SIGINT: stops after this step and saves it" in "".join(emulator.text()))
        os.write(tty.outer, b"\x03")
        assert process.wait(PATIENCE) == 130
    finally:
        process.kill()
    tty.wait(lambda emulator: emulator.cursor and emulator.at[1] == 0)
    tty.close()
    os.close(tty.inner)


PIPED = """
    from pathlib import Path
    from limbeck.cli.console import say, terminal
    from limbeck.engine.console import Progress

    row = {"step": 0, "loss": 1.0, "grad_norm": 0.1, "tokens_per_second": 9.0, "memory_bytes": 3e9, "eta_seconds": 9.0}
    voice = Progress(terminal(), "distil", 90, log=Path(sys.argv[1]) / "training.log")
    voice.start()
    for step in range(90):
        voice.update(row | {"step": step})
        say("[a word] na\\u00efve \\u2192 \\u84b8" + "." * 9000)
    voice.close()
    (Path(sys.argv[1]) / "done").touch()
"""


@pytest.mark.parametrize("how", ["head", "closed", "full", "ascii"])
def test_readers_that_go_away_closed_outputs_and_old_terminals_end_nothing(how: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if how == "closed":
        options = {"stderr": subprocess.PIPE, "preexec_fn": lambda: os.close(1)}
    if how == "full":
        if not Path("/dev/full").exists():
            pytest.skip("needs /dev/full, a disk without room")
        options["stdout"] = open("/dev/full", "w")  # noqa: SIM115
    if how == "ascii":
        options["env"] = {"PYTHONIOENCODING": "ascii", "FORCE_COLOR": "1"}
    process = child(PIPED, str(tmp_path), **options)
    said = ""
    if how == "head":
        assert process.stdout is not None and process.stdout.readline().startswith("distil  step 0/90  loss 1.0000")
        process.stdout.close()
    if how == "ascii":
        said = process.communicate(timeout=PATIENCE)[0]
    assert process.wait(PATIENCE) == 0
    assert process.stderr is None or process.stderr.closed or process.stderr.read() == ""
    assert (tmp_path / "done").exists() and len((tmp_path / "training.log").read_text().splitlines()) == 90
    # FORCE_COLOR makes no terminal of a pipe.
    assert "\x1b" not in said and (how != "ascii" or "[a word] na?ve ? ?..." in said)


def test_a_closed_output_is_not_the_number_of_the_next_file() -> None:
    script = """
        from limbeck.cli import app

        app.app = lambda **given: sys.exit(open("/dev/null").fileno() < 3 or print("nowhere"))
        app.main()
    """
    process = child(script, stderr=subprocess.PIPE, preexec_fn=lambda: (os.close(0), os.close(1)))
    assert process.communicate(timeout=PATIENCE)[1] == "" and process.returncode == 0


# -- no terminal ---------------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 1000.0
        monkeypatch.setattr(voices, "time", types.SimpleNamespace(monotonic=lambda: self.now, time=lambda: self.now))


def test_a_log_gets_lines_at_a_rate_that_a_person_can_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, pipe, steps = Clock(monkeypatch), io.StringIO(), 20_000
    voice = Progress(Console(file=pipe), "distil", steps, log=tmp_path / "training.log")
    voice.start()
    for step in range(1, steps + 1):
        clock.now += 1.0
        voice.update(row(step))
    voice.close()
    lines = pipe.getvalue().splitlines()
    # A hundred at once, then one in ten seconds, and always the last.
    assert [int(line.split()[2].split("/")[0]) for line in lines[:100]] == list(range(1, 101))
    assert 2000 <= len(lines) <= 2150 and lines[-1].startswith(f"distil  step {steps}/{steps}")
    assert sum(line.startswith("(a line in 10 s from here on; metrics.jsonl has every logged step)") for line in lines) == 1
    assert "\x1b" not in pipe.getvalue() and "\r" not in pipe.getvalue()
    assert len((tmp_path / "training.log").read_text().splitlines()) == steps
    # A run that logs every minute is never cut short.
    pipe.truncate(0)
    voice = Progress(Console(file=pipe), "distil", steps)
    for step in range(1, 1000):
        clock.now += 60.0
        voice.update(row(step))
    assert pipe.getvalue().count("step ") == 999


def test_one_of_many_short_runs_shows_how_far_it_is_and_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, pipe = Clock(monkeypatch), io.StringIO()
    voice = Progress(Console(file=pipe), "layer-3", 1000, quiet=True, log=tmp_path / "training.log")
    voice.start()
    voice.say("1000 steps of 4 rows")
    for step in range(1, 36):
        clock.now += 1.0
        voice.update(row(step))
    voice.close()
    assert [line.split("  ")[:2] for line in pipe.getvalue().splitlines()] == [["layer-3", f"step {step}/1000"] for step in (10, 20, 30)]
    assert len((tmp_path / "training.log").read_text().splitlines()) == 36


def test_lines_are_there_as_soon_as_they_are_said(tmp_path: Path) -> None:
    with (tmp_path / "out.log").open("w") as file:
        voice = Progress(Console(file=file), "distil", 10)
        voice.start()
        voice.update(row(1))
        assert (tmp_path / "out.log").read_text() == f"distil  {describe(row(1), 10)}\n"
        voice.say("a word")
        assert (tmp_path / "out.log").read_text().endswith("\na word\n")


def test_a_dumb_terminal_is_a_pipe() -> None:
    screen_ = io.StringIO()
    voice = Progress(Console(file=screen_, force_terminal=True, _environ={"TERM": "dumb"}), "distil", 10)
    voice.start()
    voice.update(row(1))
    voice.close()
    assert screen_.getvalue() == f"distil  {describe(row(1), 10)}\n"


def test_a_terminal_without_unicode_or_colours_has_a_view_in_plain_characters() -> None:
    for environment, encoding in ((TERMINAL, "ascii"), (TERMINAL | {"NO_COLOR": "1"}, "latin-1")):
        shown = io.BytesIO()
        console = Console(file=io.TextIOWrapper(shown, encoding=encoding), force_terminal=True, width=80, _environ=environment)
        voice = Progress(console, "distil", 1000, place="naïve 蒸")
        voice.start()
        for step in range(1, 9):
            voice.update(row(step))
        voice.say("Señor → 蒸")
        voice.close()
        text = shown.getvalue().decode(encoding)
        assert "Se?or ? ?" in text or "Señor ? ?" in text
        assert "----" in text and "objectives" in text and not console.quiet
        # NO_COLOR leaves bold and dim.
        assert "\x1b[1m" in text and ("\x1b[33m" in text) == ("NO_COLOR" not in environment)


def test_counted_work_says_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, said = Clock(monkeypatch), list[str]()
    with Counter(said.append, Console(file=io.StringIO()), "capture", unit="tokens", total=3_000_000) as counter:
        for _ in range(30):
            clock.now += 4.0
            counter.add(100_000, facts="3.2 MB")
        assert counter.rate == pytest.approx(25_000)
    assert len(said) == 7
    assert re.fullmatch(r"  13%  400k/3M tokens  left 1m44s, until \S+  25k tokens/s  3\.2 MB", said[0])
    with Counter(said.append, None, "prepare", unit="documents") as counter:
        clock.now += 20.0
        counter.add(7)
    assert said[7] == "  7 documents  0.35 documents/s"


# -- notebooks -----------------------------------------------------------------------------------------------------------


class ZMQInteractiveShell:
    """By this name rich knows a notebook."""


@pytest.fixture
def outputs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What a notebook was told to show: ``display`` and ``update``."""
    told: list[tuple[str, Any]] = []

    class Handle:
        def update(self, thing: Any) -> None:
            told.append(("update", thing._repr_mimebundle_()))

    def display(thing: Any, display_id: bool = False) -> Handle:
        told.append(("view" if display_id else "text", thing._repr_mimebundle_(include=(), exclude=())))
        return Handle()

    monkeypatch.setattr(builtins, "get_ipython", ZMQInteractiveShell, raising=False)
    for name, members in (("IPython", {}), ("IPython.display", {"display": display})):
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    return told


def test_a_notebook_has_one_output_that_is_replaced(outputs: list[tuple[str, Any]]) -> None:
    voice = Progress(Console(), "distil", 3000, place="stage 3 of 5")
    voice.start()
    for step in range(1, 3001):
        voice.update(row(step, eta_seconds=0.0))
    voice.say("one message")
    voice.close()
    kinds = [kind for kind, _ in outputs]
    assert kinds[0] == "view" and kinds.count("view") == kinds.count("text") == 1 and len(kinds) < 20
    last = outputs[max(i for i, kind in enumerate(kinds) if kind == "update")][1]
    assert "3,000/3,000" in last["text/plain"] and last["text/html"].startswith("<pre") and "stage 3 of 5" in last["text/html"]
    assert "\x1b" not in last["text/plain"]


def test_a_notebook_without_a_display_gets_lines_at_a_bounded_rate(outputs: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    assert screen.live_view(Console(), lambda *size: "") is not None
    monkeypatch.setitem(sys.modules, "IPython.display", None)
    assert screen.live_view(Console(), lambda *size: "") is None


# -- the command line ----------------------------------------------------------------------------------------------------


def test_words_of_verbs_are_no_markup_and_a_forced_colour_is_no_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    terminal.cache_clear()
    try:
        say("a [bold] word")
        assert capsys.readouterr().out == "a [bold] word\n"
        assert not terminal().is_interactive
    finally:
        terminal.cache_clear()


def test_a_callers_print_that_fails_is_given_up() -> None:
    told = []

    def fails(text: str) -> None:
        told.append(text)
        raise BrokenPipeError

    speak = screen.unbroken(fails)
    speak("one")
    speak("two")
    assert told == ["one"]
