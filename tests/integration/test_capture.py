"""A teacher's signals captured, cached and read back through whole recipes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from limbeck.config.load import load_recipe
from limbeck.errors import RecipeError, TeacherError
from limbeck.stages.run import run_recipe
from limbeck.teachers.documents import Ask
from limbeck.teachers.store.store import SignalStore

MODEL = (
    "{model_type: qwen3, vocab_size: 400, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4, "
    "num_key_value_heads: 2, head_dim: 16, max_position_embeddings: 256, tie_word_embeddings: true}"
)
RECIPE = f"""
name: tiny
stages:
  pretrain:
    data: {{source: {{kind: text, path: corpus, suffixes: [.py]}}, tokenizer: {{vocabulary: 400}}, sequence: 64, held_out: 0.2}}
    student: {{config: {MODEL}}}
    optim: {{groups: [{{lr: 3e-3}}]}}
    loop: {{steps: 4, batch_tokens: 512, precision: float32}}
  capture:
    kind: capture
    data: {{from: pretrain}}
    teacher: {{kind: local, model: {{from: pretrain}}}}
    k: 16
    temperatures: [1.0, 2.0]
  distil:
    data: {{from: capture}}
    student: {{config: {MODEL.replace("hidden_size: 32", "hidden_size: 16")}}}
    teacher: {{kind: stored, signals: {{from: capture}}}}
    objectives: [{{kind: topk_kl, k: 8, temperature: 2}}]
    optim: {{groups: [{{lr: 3e-3}}]}}
    loop: {{steps: 6, batch_tokens: 512, precision: float32, log_every: 1, validate_every: 3, validate_rows: 4}}
"""
CACHED = ["distil.teacher.teacher={kind: local, model: {from: pretrain}}", "distil.data.from=pretrain"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipe and its text."""
    folder = tmp_path_factory.mktemp("capture")
    (folder / "corpus").mkdir()
    for source in sorted(Path(textwrap.__file__).parent.glob("[a-b]*.py"))[:8]:
        (folder / "corpus" / source.name).write_bytes(source.read_bytes()[:6000])
    (folder / "tiny.yaml").write_text(RECIPE)
    return folder


def run(home: Path, name: str, overrides: list[str] | None = None, *, base: str | None = None, **options: Any) -> tuple[Path, list[str]]:
    """Run the recipe under another name, going on from the finished stages of ``base``."""
    said: list[str] = []
    if base is not None and not (home / name).exists():
        shutil.copytree(home / base, home / name)
    run_recipe(load_recipe(home / "tiny.yaml", overrides or []), recipe_dir=home, run_dir=home / name, say=said.append, **options)
    return home / name, said


def losses(run_dir: Path) -> list[Any]:
    rows = [json.loads(line) for line in (run_dir / "distil" / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "topk_kl/raw", "grad_norm", "validation/loss")
    return [{name: row[name] for name in kept if name in row} for row in rows]


@pytest.fixture(scope="module")
def finished(home: Path) -> tuple[Path, list[str]]:
    return run(home, "whole")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_recipe_captures_and_learns_from_what_is_stored(finished: tuple[Path, list[str]]) -> None:
    run_dir, said = finished
    record = json.loads((run_dir / "capture" / "stage.json").read_text())
    assert record["status"] == "finished" and record["result"]["rows"] > 1000
    store = SignalStore(run_dir / "capture" / "signals")
    assert store.verify() == []
    assert (store.identity.k, store.identity.temperatures, store.identity.vocabulary) == (16, (1.0, 2.0), 400)
    assert len(losses(run_dir)) >= 6
    assert any("bytes a position" in line for line in said)


def test_a_capture_killed_by_the_system_goes_on_to_the_same_bytes(home: Path, finished: tuple[Path, list[str]]) -> None:
    run_dir, _ = finished
    killed = home / "runs" / "tiny"
    for part in ("pretrain", "data"):
        shutil.copytree(run_dir / part, killed / part)
    words = [sys.executable, "-m", "limbeck", "run", str(home / "tiny.yaml"), "--stage", "capture"]
    signals = killed / "capture" / "signals" / "00"
    with subprocess.Popen(words, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        while process.poll() is None and not any(path.stat().st_size > 20_000 for path in signals.glob("*.open")):
            time.sleep(0.001)
        process.kill()
    assert process.returncode == -signal.SIGKILL and list(signals.glob("*.open"))
    done = subprocess.run(words, cwd=home, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert contents(killed / "capture" / "signals") == contents(run_dir / "capture" / "signals")


def test_a_capture_that_is_cut_short_ends_in_the_same_bytes(home: Path, finished: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, _ = finished
    put, number = SignalStore.put, 0

    def dies(self: SignalStore, *arguments: Any) -> Any:
        nonlocal number
        number += 1
        if number % 9 == 0:
            raise KeyboardInterrupt
        return put(self, *arguments)

    again = home / "again"
    shutil.copytree(run_dir / "pretrain", again / "pretrain")
    shutil.copytree(run_dir / "data", again / "data")
    monkeypatch.setattr(SignalStore, "put", dies)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run(home, "again", stage="capture")
    monkeypatch.undo()
    run(home, "again", stage="capture")
    assert contents(again / "capture" / "signals") == contents(run_dir / "capture" / "signals")


@pytest.mark.parametrize("codec", ["compact", "exact"])
def test_a_cached_run_is_the_online_run_bit_for_bit(home: Path, finished: tuple[Path, list[str]], codec: str) -> None:
    overrides = [f"distil.teacher.signals=cache-{codec}", f"distil.teacher.codec={codec}", *CACHED]
    cold, _ = run(home, f"cold-{codec}", overrides, base="whole")
    stored = contents(home / f"cache-{codec}")
    warm, _ = run(home, f"warm-{codec}", overrides, base="whole")
    assert losses(cold) == losses(warm)
    assert contents(home / f"cache-{codec}") == stored, "a full cache was added to"
    if codec != "exact":
        return
    # A cache that holds every second document, as exact as the teacher gave it.
    half = home / f"half-{codec}"
    with_cache = SignalStore(home / f"cache-{codec}")
    part = SignalStore(half, with_cache.identity)
    for number, found in enumerate(with_cache.documents()):
        if number % 2:
            part.put(Ask(found.ids, found.positions), found.rows)
    part.close()
    mixed, _ = run(home, f"mixed-{codec}", [f"distil.teacher.signals={half.name}", *overrides[1:]], base="whole")
    assert losses(mixed) == losses(cold)


def test_a_captured_store_is_a_cache_and_gives_the_same_run(home: Path, finished: tuple[Path, list[str]]) -> None:
    run_dir, _ = finished
    shutil.copytree(run_dir / "capture" / "signals", home / "kept")
    before = contents(home / "kept")
    cached, _ = run(home, "cached", ["distil.teacher.signals=kept", *CACHED], base="whole")
    assert losses(cached) == losses(run_dir)
    assert contents(home / "kept") == before


def test_a_document_that_is_not_stored_is_named(home: Path, finished: tuple[Path, list[str]]) -> None:
    with pytest.raises(TeacherError, match=r"no answer to document [0-9a-f]{32} \(.*such in this batch\): capture the same data"):
        run(home, "other", ["capture.splits=[held_out]"])


def test_a_store_of_another_teacher_or_grouping_is_refused(home: Path, finished: tuple[Path, list[str]]) -> None:
    run_dir, _ = finished
    shutil.copytree(run_dir / "capture" / "signals", home / "foreign", dirs_exist_ok=True)
    wanted = ["distil.teacher.signals=foreign", *CACHED]
    with pytest.raises(TeacherError, match=r"something else.*codec: \"compact\" -> \"fp16\""):
        run(home, "codec", ["distil.teacher.codec=fp16", *wanted], base="whole")
    with pytest.raises(TeacherError, match=r'teacher.dtype: "float32" -> "bfloat16"'):
        run(home, "dtype", ["distil.teacher.teacher={kind: local, model: {from: pretrain}, dtype: bfloat16}", *wanted[::2]], base="whole")
    grouped, _ = run(home, "grouped", ["capture.batch_tokens=500"], base="whole", stage="capture")
    shutil.copytree(grouped / "capture" / "signals", home / "together")
    with pytest.raises(TeacherError, match="captured in groups of 500 tokens"):
        run(home, "together-run", ["distil.teacher.signals=together", *CACHED], base="whole")


def test_gaps_between_objectives_and_captured_signals_are_found_before_anything_runs(home: Path) -> None:
    for override, message in (
        ("distil.objectives.0.k=32", "k = 32, and k = 16 are captured"),
        ("distil.objectives.0.temperature=3", r"temperatures \[3.0\], and \[1.0, 2.0\] are captured"),
        ("capture.temperatures=[1.0, 1.0]", "name one twice"),
        ("capture.teacher={kind: self}", "cannot be captured"),
        ("distil.teacher.signals.from=pretrain", "makes no signals"),
        ("distil.student={base: {from: capture}}", "makes no model"),
        ("distil.teacher.teacher={kind: local, model: {from: pretrain}}", "finished and not added to"),
        ("distil.objectives=[kl]", "does not provide HeadHidden"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe(home / "tiny.yaml", [override])


def test_several_documents_scored_together_go_on_in_the_same_groups(home: Path, finished: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    grouped, _ = run(home, "grouped", ["capture.batch_tokens=500"], base="whole", stage="capture")
    put, number = SignalStore.put, 0

    def dies(self: SignalStore, *arguments: Any) -> Any:
        nonlocal number
        number += 1
        if number == 40:
            raise KeyboardInterrupt
        return put(self, *arguments)

    monkeypatch.setattr(SignalStore, "put", dies)
    with pytest.raises(KeyboardInterrupt):
        run(home, "groups", ["capture.batch_tokens=500"], base="whole", stage="capture")
    monkeypatch.undo()
    groups, _ = run(home, "groups", ["capture.batch_tokens=500"], stage="capture")
    assert contents(groups / "capture" / "signals") == contents(grouped / "capture" / "signals")
    np.testing.assert_equal(SignalStore(groups / "capture" / "signals").identity.batch_tokens, 500)


@pytest.fixture(scope="module")
def served(finished: tuple[Path, list[str]]) -> Iterator[str]:
    """Address of `limbeck teach` with the pretrained model."""
    words = [sys.executable, "-m", "limbeck", "teach", str(finished[0] / "pretrain" / "model"), "--port", "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            line = next(line for line in process.stdout if line.startswith("limbeck teach: "))
            yield line.split()[-1]
        finally:
            process.terminate()


def test_a_served_teacher_is_captured_and_cached_like_one_in_this_process(
    home: Path, finished: tuple[Path, list[str]], served: str
) -> None:
    run_dir, _ = finished
    teacher = f"teacher={{kind: http, url: '{served}'}}"
    captured, _ = run(home, "served", [f"capture.{teacher}"], base="whole", stage="capture")
    ours, theirs = (SignalStore(folder / "capture" / "signals") for folder in (run_dir, captured))
    assert theirs.verify() == [] and theirs.num_documents == ours.num_documents
    for a, b in zip(ours.documents(), theirs.documents(), strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_allclose(a.rows.log_z_mZ, b.rows.log_z_mZ, atol=1e-3)
    overrides = ["distil.teacher.signals=far", f"distil.teacher.{teacher}", "distil.data.from=pretrain"]
    cold, _ = run(home, "far-cold", overrides, base="whole")
    before = contents(home / "far")
    warm, _ = run(home, "far-warm", overrides, base="whole")
    assert losses(cold) == losses(warm) and contents(home / "far") == before
