"""Make the transcript in ``docs/first-hour.md`` again: run every command of the page, and put what it prints now in place of what is there.

    python tools/transcript.py            # ten minutes or so; needs what `make setup` installs

The page is its own scenario.  In blocks of ``console`` a line with ``$`` is a command, and ``>`` goes on with it; what stands below is what it
printed, with ``…`` where lines are left out and ``^C`` where Ctrl-C is pressed.  A command that ends in ``&`` runs beside the next ones until
``kill %1``.  Blocks that begin with ``# file: NAME`` are files.  After ``<!-- varies -->`` the next block's output is a model's own words: it is
replaced, and not compared.

Lines of the page are found in the new output by :func:`normal`, which forgets numbers, sizes, times and paths; so what is left out by hand stays
out.  A line that nothing printed any more is an error.  ``tests/integration/test_transcript.py`` runs the same commands, made small.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "first-hour.md"
HOME = "/home/you/first"
"""What the page shows in place of the folder in which the commands ran."""
LEFT_OUT, INTERRUPT = "…", "^C"
LONGEST = 1800.0
"""Seconds after which a command is ended: something hangs."""
_BLOCK = re.compile(r"(?P<mark><!-- varies -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# file: (?P<name>\S+)\n")


@dataclass
class Step:
    """A command, the lines that the page shows below it, and what it printed."""

    command: str
    shown: list[str] = field(default_factory=list)
    varies: bool = False
    """The lines are a model's own words."""
    printed: list[str] = field(default_factory=list)

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C is pressed while it runs."""
        return INTERRUPT in self.shown

    def missing(self) -> list[str]:
        """Lines of the page that were not printed in this order."""
        if self.varies:
            return [] if self.printed else ["(any output)"]
        return [line for line, place in align(self.shown, self.printed) if place is None]

    def renewed(self) -> list[str]:
        """The lines of the page with what was printed now, and with ``…`` wherever lines are left out."""
        if self.varies or not self.shown:
            return self.printed
        places = [place for _, place in align(self.shown, self.printed) if place is not None]
        new, at = [], 0
        for place in places:
            new += [LEFT_OUT] * (place > at) + [self.printed[place]]
            at = place + 1
        return new + [LEFT_OUT] * (at < len(self.printed))


@cache
def normal(line: str) -> str:
    """A line without what differs from run to run: numbers, sizes, times, hashes, widths of columns."""
    line = re.sub(r"\b[0-9a-f]{12,}\b", "#", line)
    line = re.sub(r"-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?(?:[kMB]\b)?", "#", line)
    line = re.sub(
        r"(?:# ?(?:h|min|m|s)\b)+", "# s", re.sub(r"# ?(?:[kMGT]i?B|B)\b", "# B", re.sub(r"#([hms])(?=#)", r"# \1", line))
    )
    line = re.sub(r"(?:# s ?)+", "# s ", line)
    return " ".join(re.sub(r"([─━-])\1+", r"\1", line).split())


def align(shown: list[str], printed: list[str]) -> list[tuple[str, int | None]]:
    """Each shown line and its place in what was printed, in order; ``None`` for one that is not there.  Lines left out are no lines.

    As many lines as can be are found, and of lines that :func:`normal` makes alike those that share most words.
    """
    shown = [line for line in shown if line.strip() != LEFT_OUT]
    ours, theirs = [normal(line) for line in shown], [normal(line) for line in printed]
    # The longest common subsequence, from the end: best[i][j] is what shown[i:] and printed[j:] have in common.
    best = [[0.0] * (len(printed) + 1) for _ in range(len(shown) + 1)]
    for i in reversed(range(len(shown))):
        for j in reversed(range(len(printed))):
            best[i][j] = max(best[i + 1][j], best[i][j + 1])
            if ours[i] == theirs[j]:
                best[i][j] = max(best[i][j], best[i + 1][j + 1] + 1 + _alike(shown[i], printed[j]))
    found, j = [], 0
    for i, line in enumerate(shown):
        place = None
        if best[i][j] > best[i + 1][j]:
            place = next(k for k in range(j, len(printed)) if best[i][k] > best[i][k + 1] and best[i][k] == best[i][j])
            j = place + 1
        found.append((line, place))
    return found


def _alike(one: str, other: str) -> float:
    """Less than 1 in all the lines of a command together, so that no line is given up for it."""
    words, others = one.split(), other.split()
    return sum(a == b for a, b in zip(words, others, strict=False)) / max(len(words), 1) / 1000


def steps_of(block: str, varies: bool) -> list[Step]:
    """The commands of a block of ``console``."""
    steps: list[Step] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            steps.append(Step(line.removeprefix("$ "), varies=varies))
        elif steps and line.startswith("> ") and not steps[-1].shown:
            steps[-1].command += "\n" + line.removeprefix("> ")
        else:
            steps[-1].shown.append(line)
    return steps


def written(steps: list[Step]) -> str:
    """A block of ``console`` of what was printed now."""
    lines = []
    for step in steps:
        lines += ["$ " + step.command.replace("\n", "\n> "), *step.renewed()]
    return "\n".join(lines) + "\n"


class Shell:
    """Runs the commands of a page, one after the other, in one folder."""

    def __init__(self, folder: Path, shorten: Callable[[str], str] = lambda command: command):
        """``shorten`` changes what is run, not what is shown."""
        self._folder, self._shorten, self._code = folder, shorten, 0
        self._beside: list[tuple[Step, subprocess.Popen[str]]] = []
        tools = Path(sys.executable).parent
        self._environment = {
            **os.environ,
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
        }

    def write(self, name: str, text: str) -> None:
        """A file that the page shows."""
        (self._folder / name).write_text(text, encoding="utf-8")

    def run(self, step: Step) -> None:
        """Run a command to its end, or one beside the next until it has said what the page shows."""
        if step.command == "kill %1":
            _, process = self._beside.pop(0)
            process.terminate()
            self._code = process.wait(LONGEST)
            return
        process = self._start(self._shorten(step.command))
        enough = threading.Event()
        reader = threading.Thread(target=self._read, args=(step, process, enough), daemon=True)
        reader.start()
        if step.command.endswith("&"):
            self._beside.append((step, process))
            enough.wait(LONGEST)
            return
        reader.join(LONGEST)
        self._code = process.wait(5) if not reader.is_alive() else self._end(process)

    @property
    def failed(self) -> bool:
        """Whether the last command ended with an error."""
        return self._code != 0

    def close(self) -> None:
        """End what still runs."""
        for _, process in self._beside:
            self._end(process)

    def _start(self, command: str) -> subprocess.Popen[str]:
        script = command.removesuffix("&")
        if "$?" in script:
            script = f"(exit {self._code % 256})\n{script}"
        # A session of its own, so that Ctrl-C reaches the whole of it and nothing else; what runs in the background of a shell has SIGINT ignored.
        return subprocess.Popen(
            ["bash", "-c", script], cwd=self._folder, env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    def _read(self, step: Step, process: subprocess.Popen[str], enough: threading.Event) -> None:
        before = step.shown[: step.shown.index(INTERRUPT)] if step.interrupted else []
        pressed = False
        assert process.stdout is not None
        for line in process.stdout:
            step.printed.append(line.rstrip().replace(str(self._folder), HOME))
            if step.interrupted and not pressed and all(place is not None for _, place in align(before, step.printed)):
                os.killpg(process.pid, signal.SIGINT)
                step.printed.append(INTERRUPT)
                pressed = True
            if not step.missing():
                enough.set()
        enough.set()

    def _end(self, process: subprocess.Popen[str]) -> int:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def perform(text: str, shell: Shell) -> Iterator[tuple[re.Match[str], list[Step]]]:
    """Do what a page says; yields each block of commands, with the steps that were run."""
    for block in _BLOCK.finditer(text):
        if named := _FILE.match(block["code"]):
            shell.write(named["name"], block["code"])
        if block["language"] != "console":
            continue
        steps = steps_of(block["code"], block["mark"] is not None)
        for step, following in zip(steps, [*steps[1:], None], strict=True):
            shell.run(step)
            told = step.interrupted or (following is not None and "$?" in following.command)
            if shell.failed and not told:
                raise SystemExit(
                    f"$ {step.command}\n"
                    + "\n".join([*step.printed[-20:], "ended with an error, of which the page says nothing"])
                )
        yield block, steps


def main() -> None:
    """Run the page in a new folder and write it again."""
    text = PAGE.read_text(encoding="utf-8")
    parts, end, missing = [], 0, []
    with tempfile.TemporaryDirectory() as folder:
        shell = Shell(Path(folder).resolve())
        try:
            for block, steps in perform(text, shell):
                for step in steps:
                    print(f"$ {step.command}", *step.printed, sep="\n", flush=True)
                    missing += [f"$ {step.command}\n    {line}" for line in step.missing()]
                parts += [text[end : block.start("code")], written(steps)]
                end = block.end("code")
        finally:
            shell.close()
    if missing:
        raise SystemExit("no longer printed; mend the page, and run this again:\n" + "\n".join(missing))
    PAGE.write_text("".join(parts) + text[end:], encoding="utf-8")


if __name__ == "__main__":
    main()
