"""Where a live view is drawn: over and over in the same lines of a terminal, or in one output of a notebook.

What is shown must never end what is done: a reader that is gone (``| head``), a terminal that was closed or a full disk behind ``>``
silences a console and nothing else.
"""

from __future__ import annotations

import io
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderableType, RenderHook, RenderResult
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType, Segment
from rich.text import Text

from limbeck.engine.frame import printable

EVERY = 0.5
"""Seconds between two frames on a terminal."""
NOTEBOOK_EVERY = 5.0
"""Seconds between two frames in a notebook, which may keep every one for a browser that is away."""
NOTEBOOK_WIDTH = 100

Draw = Callable[[int, int, bool], RenderableType]
"""Columns, lines and whether there is nothing but ASCII -> a frame of that size."""


@contextmanager
def regardless(console: Console) -> Iterator[None]:
    """What cannot be written is given up, with all that would come after it."""
    try:
        yield
    except (OSError, ValueError):  # ValueError: the file was closed
        console.quiet = True
    except SystemExit as error:
        # rich's answer to a pipe that nobody reads any more.
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        console.quiet = True


def unbroken(say: Callable[[Any], object]) -> Callable[[Any], None]:
    """``say`` (most often ``print``), given up in the same way."""
    lost = False

    def told(thing: Any) -> None:
        nonlocal lost
        try:
            if not lost:
                say(thing)
        except (OSError, ValueError):
            lost = True

    return told


def put(console: Console, text: str) -> None:
    """A line that stays; above the live view where there is one."""
    with regardless(console):
        console.print(Text(printable(text, console.encoding)), soft_wrap=True)


class View(Protocol):
    """Something that is drawn again and again between ``start`` and ``stop``."""

    stays: bool
    """Whether the last frame is still there afterwards."""

    def start(self) -> None:
        """Draw, and again from now on."""
        ...

    def stop(self) -> None:
        """Draw for the last time."""
        ...


def live_view(console: Console, draw: Draw) -> View | None:
    """The view for this console; None where only lines can be shown: files, pipes, dumb terminals, jobs in the background of a shell."""
    if console.is_jupyter:
        try:
            from IPython.display import display
        except ImportError:
            return None
        return NotebookView(draw, display)
    if console.is_interactive and _in_foreground(console):
        return TerminalView(console, draw)
    return None


class _Ticking(ABC):
    """Draws now and then, in a thread of its own: what is waited for may take long."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="console", daemon=True)

    def _run(self) -> None:
        while not self._done.wait(self._seconds):
            self._tick()

    @abstractmethod
    def _tick(self) -> None:
        """Draw once more."""

    def _end(self) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()


class TerminalView(_Ticking, RenderHook):
    """A few lines at the bottom of a terminal, erased when it is over.  What is printed meanwhile stands above them."""

    stays = False

    def __init__(self, console: Console, draw: Draw):
        super().__init__(EVERY)
        self._console, self._draw = console, draw
        self._cells: list[int] = []
        """Columns that each line of the last frame took."""
        self._live = Live(self, console=console, auto_refresh=False, transient=True)
        self._up = False

    def start(self) -> None:
        """Draw the first frame."""
        with regardless(self._console):
            self._live.start()
            self._console.push_render_hook(self)
            self._up = True
        if self._up:
            self._tick()
            self._thread.start()

    def stop(self) -> None:
        """Draw the last frame, erase it, and leave the terminal as it was."""
        self._end()
        if not self._up:
            return
        self._up = False
        with regardless(self._console):
            self._live.refresh()
        # Hooks are a stack, and rich takes its own off next.
        self._console.pop_render_hook()
        with regardless(self._console):
            self._live.stop()

    def _tick(self) -> None:
        if not self._console.quiet and _in_foreground(self._console):
            with regardless(self._console):
                self._live.refresh()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The frame of now, in the size of now."""
        width, height = _size(console)
        # A frame in the last line would leave none for messages; a line to the last column would be wrapped by the ^C that terminals show.
        drawn = self._draw(max(1, width - 3), max(1, height - 1), options.ascii_only)
        lines = console.render_lines(drawn, options.update(width=max(1, width)), pad=False)
        self._cells = [Segment.get_line_length(line) for line in lines]
        for line in lines:
            yield from line
            yield Segment.line()

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Before rich erases as many lines as it drew, erase those that a narrower terminal has made of them."""
        width = max(1, _size(self._console)[0])
        more = sum((cells - 1) // width for cells in self._cells if cells)
        if not more:
            return renderables
        up = ((ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1))
        return [Control(ControlType.CARRIAGE_RETURN, *(up * more)), *renderables]


class NotebookView(_Ticking):
    """One output of a notebook cell, replaced in place."""

    stays = True

    def __init__(self, draw: Draw, display: Any):
        super().__init__(NOTEBOOK_EVERY)
        self._draw, self._display = draw, display
        self._handle: Any = None

    def start(self) -> None:
        """Show the first frame."""
        self._handle = self._display(self, display_id=True)
        self._thread.start()

    def stop(self) -> None:
        """Show the last frame."""
        self._end()
        self._tick()

    def _tick(self) -> None:
        # Whatever a kernel says to this, training goes on.
        with suppress(Exception):
            self._handle.update(self)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        """The frame of now, for browsers and for what shows text alone."""
        page = Console(file=io.StringIO(), record=True, force_jupyter=False, force_terminal=True, width=NOTEBOOK_WIDTH, height=24)
        page.print(self._draw(NOTEBOOK_WIDTH, 24, False))
        style = "white-space:pre;overflow-x:auto;line-height:normal;font-family:Menlo,'DejaVu Sans Mono',consolas,monospace"
        html = page.export_html(inline_styles=True, code_format=f'<pre style="{style}">{{code}}</pre>', clear=False)
        return {"text/plain": page.export_text(), "text/html": html}


def _size(console: Console) -> tuple[int, int]:
    """Columns and lines that are there now, whatever ``COLUMNS`` says."""
    width, height = console.size
    with suppress(OSError, ValueError, AttributeError):
        columns, lines = os.get_terminal_size(console.file.fileno())
        width, height = min(width, columns or width), min(height, lines or height)
    return width, height


def _in_foreground(console: Console) -> bool:
    """Whether the terminal is ours: a job in the background of a shell must not draw over what is typed there."""
    try:
        return os.tcgetpgrp(console.file.fileno()) == os.getpgrp()
    except (OSError, ValueError, AttributeError):  # no terminal, not the one that controls us, or a system without jobs
        return True
