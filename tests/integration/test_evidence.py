"""Benchmarks and experiments run in their quick form, and what is committed of them says where it comes from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
QUICK = {
    "benchmarks/delta_rule": [],
    "benchmarks/fused_loss": [],
    "benchmarks/loop_overhead": [],
    "benchmarks/signal_store": [],
    "benchmarks/teacher_latency": [],
    "experiments/calibration": ["--out", "{tmp}"],
    "experiments/hybrid_recovers": ["--out", "{tmp}"],
    "experiments/layer_selection": ["--out", "{tmp}"],
    "experiments/long_context": ["--out", "{tmp}"],
    "experiments/mixers": ["--out", "{tmp}"],
    "experiments/native_cost": ["--out", "{tmp}"],
    "experiments/tail_matters": ["--out", "{tmp}"],
}


@pytest.mark.parametrize("folder", QUICK)
def test_the_quick_form_runs(folder: str, tmp_path: Path) -> None:
    words = [word.format(tmp=tmp_path) for word in QUICK[folder]]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, str(ROOT / folder / "run.py"), "--quick", *words],
        cwd=tmp_path, capture_output=True, text=True, timeout=600, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize("path", sorted(p.relative_to(ROOT) for top in ("benchmarks", "experiments") for p in (ROOT / top).rglob("results.json")), ids=str)
def test_committed_results_are_complete(path: Path) -> None:
    found = json.loads((ROOT / path).read_text())
    assert {"claim", "command", "commit", "machine", "seeds", "rows", "criteria"} <= set(found)
    assert found["rows"] and all({"setting", "metric", "value"} <= set(row) for row in found["rows"])
    assert all({"name", "bound", "measured", "holds"} <= set(criterion) for criterion in found["criteria"])
    assert (ROOT / path).with_name("README.md").exists()
