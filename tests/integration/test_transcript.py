"""docs/first-hour.md, gone through once more with the same commands made small: what the page shows is what is printed."""

from __future__ import annotations

import re
import socket
from importlib.util import find_spec
from pathlib import Path

import pytest
from tools.transcript import HOME, INTERRUPT, LEFT_OUT, PAGE, Shell, Step, align, normal, perform, steps_of, written

TEXT = "[{kind: stdlib, limit: 60}, {kind: recall, share: 0.2, vocabulary: 512}]"
SMALL = (
    *(f"{stage}.data.{words}" for stage in ("align", "extend") for words in (f"source='{TEXT}'", "sequence=128", "held_out=0.2")),
    *(f"{stage}.loop.batch_tokens=128" for stage in ("align", "distil", "extend")), "evaluate.rows=1",
    "evaluate.recall='{vocabulary: 512, tasks: [repeat, key_value, needle], distances: [32, 64, 128, 256], rows: 1}'",
    "evaluate.speed='{contexts: [32, 64, 96, 128], tokens: 1}'", "evaluate.samples='{tokens: 2}'",
)  # fmt: skip


def shorten(command: str, port: int) -> str:
    """The same command in seconds, at a port that is free."""
    if command == "limbeck quickstart":
        return f"{command} --quick"
    if command.startswith("limbeck run "):
        steps = {"align": "3k", "distil": "256", "extend": "256"}
        return (
            re.sub(r"(\w+)\.loop\.tokens=\w+", lambda found: f"{found[1]}.loop.tokens={steps[found[1]]}", command)
            + " "
            + " ".join(SMALL)
        )
    if command.startswith("limbeck serve "):
        return f"{command.removesuffix('&')} --port {port} &"
    return command.replace(":8000", f":{port}")


def test_the_page_shows_what_its_commands_print(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("openai", "xllamacpp", "starlette"):
        if find_spec(package) is None:
            pytest.skip(f"the page needs {package}: pip install 'limbeck[dev]'")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shell = Shell(tmp_path, lambda command: shorten(command, port))
    missing, done = [], 0
    try:
        # The client's file names the port, too.
        text = PAGE.read_text(encoding="utf-8").replace('base_url="http://127.0.0.1:8000', f'base_url="http://127.0.0.1:{port}')
        for _, steps in perform(text, shell):
            done += len(steps)
            missing += [
                f"$ {step.command}\n  shown:   {line}\n  printed: {step.printed[:40]}"
                for step in steps
                for line in step.missing()
            ]
    finally:
        shell.close()
    assert done > 20
    assert not missing, "python tools/transcript.py makes the page again\n" + "\n".join(missing)
    assert (tmp_path / "runs/hybrid/exit_reason").read_text() == "finished\n"


def test_the_page_is_trimmed_and_says_where() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert INTERRUPT in text.splitlines() and LEFT_OUT in text.splitlines() and HOME in text
    assert "/tmp/" not in text and text.count("\n") < 400


def test_lines_are_compared_without_numbers_times_and_paths() -> None:
    one = "align  step 1/15  loss 5.6348  eta 1m34s  1.22k tok/s  |g| 3.31  0.52 GB"
    two = "align  step 12/9  loss 0.2  eta 9s  733 tok/s  |g| 1  520 MB"
    assert normal(one) == normal(two) != normal(two.replace("loss", "kl"))
    assert normal("took 3 s") == normal("took   1.53 min") and normal("x -0.1 0123456789abcdef") == normal("x 2 3")
    assert align(["a 1", "…", "b"], ["a 2", "c", "b"]) == [("a 1", 0), ("b", 2)]
    assert [place is None for _, place in align(["b", "a"], ["a", "b"])].count(True) == 1, "in order"
    assert align(["step 1", "step 8"], ["step 1", "step 2", "step 8", "end"]) == [("step 1", 0), ("step 8", 2)], (
        "the nearest of those that are alike"
    )


def test_a_block_is_read_and_written_again() -> None:
    (step,) = steps_of("$ cat <<END\n> x\n> END\nx 1\nz\n", False)
    assert step.command == "cat <<END\nx\nEND" and step.shown == ["x 1", "z"]
    step.printed = ["x 2", "y", "z", "end"]
    assert written([step]) == "$ cat <<END\n> x\n> END\nx 2\n…\nz\n…\n" and step.missing() == []


def test_ctrl_c_reaches_a_command_and_what_it_says_then_is_kept(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    script = "trap 'echo saved; exit 3' INT; echo step 1; echo step 2; while true; do sleep 0.05; done"
    step = Step(script, ["step 7", "^C", "saved"])
    shell.run(step)
    assert (
        step.printed == ["step 1", "^C", "step 2", "saved"]
        or step.printed == ["step 1", "step 2", "^C", "saved"]
        or "saved" in step.printed
    )
    assert shell.failed and not step.missing()
    status = Step("echo $?", ["3"])
    shell.run(status)
    assert status.printed == ["3"]
