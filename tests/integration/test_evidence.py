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
    "benchmarks/delta_cache": [],
    "benchmarks/delta_rule": [],
    "benchmarks/fused_loss": [],
    "benchmarks/injection": [],
    "benchmarks/kill_campaign": ["--out", "{tmp}"],
    "benchmarks/loop_overhead": [],
    "benchmarks/plan_memory": [],
    "benchmarks/signal_store": [],
    "benchmarks/teacher_latency": [],
    "benchmarks/ternary_decode": ["--out", "{tmp}"],
    "experiments/ablations": ["--out", "{tmp}"],
    "experiments/additivity": ["--out", "{tmp}"],
    "experiments/agentic": ["--out", "{tmp}"],
    "experiments/behaviour_beats_weights": ["--out", "{tmp}"],
    "experiments/calibration": ["--out", "{tmp}"],
    "experiments/delta_only": ["--out", "{tmp}"],
    "experiments/dnd_baseline": ["--out", "{tmp}"],
    "experiments/gauge": ["--out", "{tmp}"],
    "experiments/held_out_conditions": ["--out", "{tmp}"],
    "experiments/hybrid_recovers": ["--out", "{tmp}"],
    "experiments/layer_selection": ["--out", "{tmp}"],
    "experiments/long_context": ["--out", "{tmp}"],
    "experiments/mixers": ["--out", "{tmp}"],
    "experiments/native_cost": ["--out", "{tmp}"],
    "experiments/tail_matters": ["--out", "{tmp}"],
    "experiments/ternary_kd": ["--out", "{tmp}"],
}
DRAWN = {
    f"experiments/{name}"
    for name in ("ablations", "additivity", "behaviour_beats_weights", "delta_only", "dnd_baseline", "gauge", "held_out_conditions", "ternary_kd")
}
"""Experiments whose `plot.py` takes the folder of a quick form."""


def run_script(script: Path, words: list[str], where: Path) -> str:
    """What it prints; it has to succeed."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, str(script), *words], cwd=where, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("folder", QUICK)
def test_the_quick_form_runs(folder: str, tmp_path: Path) -> None:
    run_script(ROOT / folder / "run.py", ["--quick", *(word.format(tmp=tmp_path) for word in QUICK[folder])], tmp_path)
    if folder in DRAWN:
        assert_drawn(folder, tmp_path / "quick")


def assert_drawn(folder: str, quick: Path) -> None:
    """Its `plot.py` draws these results, and its tables leave no setting and no criterion out."""
    tables = run_script(ROOT / folder / "plot.py", [str(quick)], quick)
    results = json.loads((quick / "results.json").read_text())
    names = {row["setting"].removeprefix("learning rate of ").split(": ", 1)[-1] for row in results["rows"]}
    wanted = {part for name in names for part in name.split(" x ")} | {criterion["name"] for criterion in results["criteria"]}
    assert not [words for words in wanted if words not in tables]
    assert next(quick.glob("*.svg")).stat().st_size > 1000


@pytest.mark.parametrize("path", sorted(p.relative_to(ROOT) for top in ("benchmarks", "experiments") for p in (ROOT / top).rglob("results.json")), ids=str)
def test_committed_results_are_complete(path: Path) -> None:
    found = json.loads((ROOT / path).read_text())
    assert {"claim", "command", "commit", "machine", "seeds", "rows", "criteria"} <= set(found)
    assert found["rows"] and all({"setting", "metric", "value"} <= set(row) for row in found["rows"])
    assert all({"name", "bound", "measured", "holds"} <= set(criterion) for criterion in found["criteria"])
    assert (ROOT / path).with_name("README.md").exists()
