"""The pictures of the documentation: each is there as the script takes it, each is shown somewhere, and the console's page is made of real rows."""

from __future__ import annotations

import json
import re
import struct
import sys
from html import unescape
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import screenshots  # noqa: E402


def size(picture: Path) -> tuple[int, int]:
    """Width and height that a PNG's head says."""
    head = picture.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


@pytest.mark.parametrize("name", screenshots.SHOTS)
def test_every_picture_is_there_as_the_script_takes_it_and_is_shown(name: str) -> None:
    shot, picture = screenshots.SHOTS[name], screenshots.IMAGES / f"{name}.png"
    assert size(picture) == (shot.width, shot.height) and picture.stat().st_size < 300_000
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    assert any(f"images/{name}.png" in page.read_text(encoding="utf-8") for page in pages)


def test_no_picture_is_there_that_nobody_takes() -> None:
    assert {path.stem for path in screenshots.IMAGES.glob("*.png")} == set(screenshots.SHOTS)


def test_the_consoles_page_shows_the_rows_of_a_run(tmp_path: Path) -> None:
    rows = [
        {"step": s, "tokens": 100 * s, "time": 1.7e9 + s, "loss": 2 / s, "kl": 2 / s, "agreement": 0.5, "grad_norm": 1.0,
         "eta_seconds": 9.0, "tokens_per_second": 100.0, "memory_bytes": 5e8} for s in range(1, 10)
    ]  # fmt: skip
    (tmp_path / "run" / "distil").mkdir(parents=True)
    (tmp_path / "run" / "recipe.json").write_text(json.dumps({"name": "x", "stages": {"distil": {"kind": "train"}}}))
    (tmp_path / "run" / "distil" / "stage.json").write_text(json.dumps({"kind": "train", "status": "finished", "seconds": 9.0}))
    (tmp_path / "run" / "distil" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = screenshots.console_page(tmp_path / "run", tmp_path).read_text(encoding="utf-8")
    words = unescape(re.sub(r"<style>.*?</style>|<[^>]+>", "", page, flags=re.DOTALL))
    assert "distil" in words and "stage 1 of 1" in words and "6/9" in words and "0.3333 nats/token" in words and "http" not in page


def test_a_page_that_was_not_built_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(screenshots, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="make docs"):
        screenshots.site_page("index.html")(tmp_path, tmp_path)
