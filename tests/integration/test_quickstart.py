"""The first five minutes: `limbeck quickstart`, in its seconds-long form."""

from __future__ import annotations

from pathlib import Path

from limbeck.stages.quickstart import quickstart


def test_quickstart_compares_three_models_and_writes_one_page(tmp_path: Path) -> None:
    said: list[object] = []
    run_dir = quickstart(directory=tmp_path, quick=True, say=said.append)
    page = (run_dir / "report.html").read_text()
    assert "<svg" in page and "http://" not in page.replace("http://www.w3.org", "") and "<script src" not in page
    for name in ("teacher", "copy_init", "distil"):
        assert name in page
    assert (run_dir / "distil" / "model" / "config.json").exists()
    assert any(str(line).startswith("report ") for line in said)
