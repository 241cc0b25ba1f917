"""Make the pictures in ``docs/images``: a report by day and by night, the console, the documentation.

    make quickstart docs
    .venv/bin/python tools/screenshots.py                 # of runs/quickstart/hybrid
    .venv/bin/python tools/screenshots.py --run runs/NAME --only console report

Needs Chromium (``apt-get install chromium``); nothing is fetched.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import DIMMED_MONOKAI

from limbeck.engine.frame import frame
from limbeck.report.html import write_report
from limbeck.report.run import read_run

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
TERMINAL = """<!doctype html><meta charset="utf-8"><style>{stylesheet}
body {{ margin: 0; padding: 22px 26px; color: {foreground}; background: {background}; }}
pre {{ margin: 0; font: 17px/1.45 "DejaVu Sans Mono", Menlo, monospace; }}</style><pre>{code}</pre>"""
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@dataclass(frozen=True)
class Shot:
    """One picture: what makes its page, from a run and a scratch folder, and how much of it is shown."""

    page: Callable[[Path, Path], Path]
    width: int
    height: int
    dark: bool = False


def report_page(run: Path, scratch: Path) -> Path:
    """The run's report, made anew."""
    return write_report(run)


def site_page(name: str) -> Callable[[Path, Path], Path]:
    """A page of the built documentation."""

    def page(run: Path, scratch: Path) -> Path:
        found = ROOT / "build" / "docs" / name
        if not found.is_file():
            raise SystemExit(f"{found}: no such page: build the documentation first, `make docs`")
        return found

    return page


def console_page(run: Path, scratch: Path) -> Path:
    """What the live view showed in the middle of the run's last training stage."""
    found = read_run(run)
    trained = [stage for stage in found.stages if stage.metrics]
    stage, place = trained[-1], f"stage {found.stages.index(trained[-1]) + 1} of {len(found.stages)}"
    rows = [row for row in stage.metrics if "loss" in row]
    shown = rows[: 2 * len(rows) // 3]
    console = Console(record=True, width=88, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    elapsed = shown[-1]["time"] - shown[0]["time"]
    console.print(frame(shown, title=stage.name, num_steps=rows[-1]["step"], place=place, elapsed=elapsed, width=88))
    out = scratch / "console.html"
    out.write_text(console.export_html(theme=DIMMED_MONOKAI, code_format=TERMINAL), encoding="utf-8")
    return out


SHOTS = {
    "report": Shot(report_page, 1200, 1000),
    "report_dark": Shot(report_page, 1200, 1000, dark=True),
    "console": Shot(console_page, 960, 170),
    "docs": Shot(site_page("index.html"), 1400, 900),
    "docs_reference": Shot(site_page("reference/mixers.html"), 1400, 900),
}


def browser() -> str:
    """The first Chromium on the path."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        raise SystemExit(f"no browser found (looked for {', '.join(BROWSERS)}): install Chromium")
    return found


def photograph(program: str, page: Path, out: Path, shot: Shot) -> None:
    """The upper left of a page as a PNG."""
    words = [
        "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1",
        # Headless Chromium is light by default; 0 is dark.
        f"--blink-settings=preferredColorScheme={0 if shot.dark else 1}",
        f"--window-size={shot.width},{shot.height}", f"--screenshot={out}", page.resolve().as_uri(),
    ]  # fmt: skip
    done = subprocess.run([program, *words], capture_output=True, text=True, timeout=120)
    if done.returncode or not out.is_file():
        raise SystemExit(f"{program} made no picture of {page}:\n{done.stderr[-2000:]}")


def main() -> int:
    """Take the pictures that are asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "quickstart" / "hybrid", help="a finished run; by default the quickstart's")
    parser.add_argument("--only", nargs="+", choices=sorted(SHOTS), default=list(SHOTS), help="these pictures alone")
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder of the pictures")
    arguments = parser.parse_args()
    program = browser()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name in arguments.only:
            out = arguments.out / f"{name}.png"
            photograph(program, SHOTS[name].page(arguments.run, Path(scratch)), out, SHOTS[name])
            print(f"{out}: {out.stat().st_size / 1000:.0f} kB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
