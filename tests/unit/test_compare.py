"""Runs side by side: only what differs, only what can be compared, and a word on what cannot."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
from tests.unit.test_report import NASTY, Checker, evaluation
from typer.testing import CliRunner

from limbeck.cli.app import app
from limbeck.errors import CheckpointError, RunError
from limbeck.report.compare import Comparison, compare, tables
from limbeck.report.compare_page import colours_of, comparison_page, curves, write_comparison
from limbeck.report.entries import read_entries

TEXT = {"source": [{"kind": "text", "path": "a"}], "tokenizer": "t", "sequence": 64}


def train(**changes: object) -> dict:
    options = {
        "kind": "train", "grid": {}, "seed": 0, "data": TEXT, "student": {"base": "b"}, "teacher": {"kind": "local", "model": "m"},
        "objectives": [{"kind": "kl", "weight": 1.0, "temperature": 1.0}], "optim": {"groups": [{"lr": 1e-3}]}, "loop": {"steps": 8, "batch_tokens": 100},
    }  # fmt: skip
    return {**copy.deepcopy(options), **changes}


def lines(factor: float = 1.0, tokens: int = 100, **more: float) -> list[dict]:
    rows: list[dict] = [
        {"step": s, "tokens": tokens * s, "loss": factor / s, "kl": factor / s, "agreement": 0.5, "tokens_per_second": 10.0, "memory_bytes": 2**20, **more}
        for s in range(2, 10, 2)
    ]
    return [*rows, {"step": 5, "validation/loss": factor / 5, "validation/kl": factor / 5}]


def write_run(folder: Path, stages: dict[str, dict], *, metrics: dict[str, list[dict]] | None = None, files: dict | None = None) -> Path:
    out: dict[str, object] = {"recipe.json": {"name": folder.name, "stages": stages}, "environment.json": {"machine": "here", "versions": {"torch": "2"}}}
    for name, options in stages.items():
        out[f"{name}/stage.json"] = {"kind": options["kind"], "status": "finished", "seconds": 61.0, "options": options, "result": {"loss": 0.5}}
    for name, value in {**out, **(files or {})}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    for name, rows in (metrics or {}).items():
        (folder / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def evaluated(**changes: float) -> dict:
    results = evaluation()
    results["perplexity"]["distil"].update(changes)
    return results


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    judged = {"kind": "evaluate", "from": "distil", "seed": 0}
    other = train(optim={"groups": [{"lr": 3e-3}]}, seed=1)
    return [
        write_run(
            tmp_path / name, {"distil": options, "evaluate": judged}, metrics={"distil": lines(factor)},
            files={"evaluate/evaluation/evaluation.json": evaluated(ce=ce)},
        )
        for name, options, factor, ce in (("a", train(), 1.0, 3.05), ("b", other, 0.5, 3.15))
    ]  # fmt: skip


def side_by_side(*paths: Path) -> Comparison:
    return compare(read_entries(list(paths)))


def words(html: str) -> str:
    return re.sub(r"<[^>]+>", " ", html)


def line(comparison: Comparison, name: str) -> list[str | None]:
    (found,) = [one for one in comparison.lines if one.name == name]
    return [None if cell is None else f"{cell.cell} {found.change(i)}".strip() for i, cell in enumerate(found.cells)]


def test_only_settings_that_differ_are_shown(pair: list[Path]) -> None:
    assert side_by_side(*pair).differences == [("distil.seed", ("0", "1")), ("distil.optim.groups.0.lr", ("0.001", "0.003"))]
    assert side_by_side(pair[0] / "distil", pair[1] / "distil").differences == [("seed", ("0", "1")), ("optim.groups.0.lr", ("0.001", "0.003"))]


def test_parts_of_different_kinds_are_one_row_and_a_missing_field_that_says_nothing_is_none(tmp_path: Path) -> None:
    hybrid = [{"kind": "hybridize", "mixer": {"kind": "gdn", "rope": True}, "keep": []}]
    ternary = [{"kind": "ternarize", "plan": "auto"}, {"kind": "more"}]
    a = write_run(tmp_path / "a", {"s": train(student={"base": "b", "surgery": hybrid})})
    b = write_run(tmp_path / "b", {"s": train(student={"base": "b", "surgery": ternary, "revision": None, "skip": 0.5})})
    assert side_by_side(a, b).differences == [
        ("s.student.surgery.0", ("hybridize (mixer: gdn (rope: true))", "ternarize (plan: auto)")),
        ("s.student.surgery.1", ("–", "more")),
        ("s.student.skip", ("–", "0.5")),
    ]


def test_evaluations_stand_beside_each_other_with_their_differences(pair: list[Path]) -> None:
    found = side_by_side(*pair)
    assert line(found, "cross-entropy, nats/token") == ["3.0500", "3.1500 +0.1"]
    assert line(found, "KL from the teacher, nats/token") == ["0.0600", "0.0600 +0"]
    assert line(found, "top-1 agreement with the teacher") == ["90.0%", "90.0% +0.0 pt"]
    assert line(found, "at 4k tokens") == ["4 KiB", "4 KiB 1.00×"]
    assert line(found, "held out: kl") == ["0.2000", "0.1000 -0.1"]
    best = {one.name: one.best for one in found.lines}
    assert best["cross-entropy, nats/token"] == 0 and best["held out: kl"] == 1
    assert best["KL from the teacher, nats/token"] is None, "what prints alike is no contest"
    stages = side_by_side(pair[0] / "distil", pair[1] / "distil")
    assert line(stages, "cross-entropy, nats/token") == ["3.0500", "3.1500 +0.1"], "a stage has what its run's evaluation says of it"


def test_curves_share_an_axis_of_tokens_or_steps(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", {"s": train()}, metrics={"s": lines()})
    b = write_run(tmp_path / "b", {"s": train()}, metrics={"s": lines(tokens=1000, extra=1.0)})
    entries = read_entries([a, b])
    for axis, place in (("tokens", ("200", "2000", "500", "5000")), ("steps", ("2", "2", "5", "5"))):
        ((heading, figures),) = curves(entries, colours_of(entries), axis)
        charts = {title: chart for title, _, chart in figures}
        assert heading == "Training: s" and set(charts) == {"loss", "KL from the teacher", "top-1 agreement with the teacher"}
        for label, where, value in zip(("a", "b", "a, held out", "b, held out"), place, (0.5, 0.5, 0.2, 0.2), strict=True):
            assert f"<title>{label}: {value} at {axis} {where}</title>" in charts["loss"], (axis, label)


def test_what_only_one_has_and_what_means_something_else_is_said(tmp_path: Path, pair: list[Path]) -> None:
    changed = train(data={**TEXT, "tokenizer": "other"}, objectives=[{"kind": "ce", "weight": 1.0}], teacher={"kind": "local", "model": "n"})
    c = write_run(tmp_path / "c", {"distil": changed}, metrics={"distil": lines()})
    notes = " ".join(side_by_side(pair[0], c).notes)
    for said in ("Different tokenizers", "Different objectives", "Different teachers", "Only a has: held-out text (5 measures)", "recall (2 measures)"):
        assert said in notes, said
    assert "Different training text" not in notes
    results = evaluated()
    results["setting"]["rows"] = 16
    (pair[1] / "evaluate/evaluation/evaluation.json").write_text(json.dumps(results))
    (pair[1] / "environment.json").write_text('{"machine": "there"}')
    (pair[1] / "distil/stage.json").write_text(json.dumps({"kind": "train", "status": "failed", "options": train()}))
    notes = " ".join(side_by_side(*pair).notes)
    for said in ("different settings (rows 8 / 16)", "different machines", "b is not done: distil is failed"):
        assert said in notes, said


def test_runs_of_different_kinds_are_compared_in_what_they_share(tmp_path: Path, pair: list[Path]) -> None:
    generator = write_run(tmp_path / "g", {"generate": train(student={"base": "b", "surgery": [{"kind": "lora_generator"}]})}, metrics={"generate": lines()})
    found = side_by_side(pair[0], generator)
    assert [entry.stages[0].name for entry in found.entries] == ["distil", "generate"]
    assert "a is a whole run and is compared by its stage distil." in found.notes
    assert line(found, "KL from the teacher, last tenth") == ["0.1250", "0.1250 +0"]
    judged = side_by_side(pair[0] / "evaluate", generator)
    assert "stages of different kinds (a/evaluate is a evaluate stage" in " ".join(judged.notes) and not judged.lines
    assert "only their recipes are compared" in " ".join(judged.notes)


def grid(tmp_path: Path) -> Path:
    cells = {f"lr={rate},seed={seed}": train(seed=seed, optim={"groups": [{"lr": rate}]}) for rate in (0.01, 0.001) for seed in (1, 2)}
    swept = train(grid={"optim.groups.0.lr": [0.01, 0.001], "seed": [1, 2]})
    run = write_run(tmp_path / "r", {"distil": swept})
    for i, (name, options) in enumerate(cells.items()):
        write_run(run / "distil" / "grid", {name: options}, metrics={name: lines(1.0 + i)})
    return run


def test_a_stage_with_a_grid_is_all_of_its_cells_and_seeds_are_put_together(tmp_path: Path) -> None:
    run = grid(tmp_path)
    found = side_by_side(run / "distil")
    assert [entry.label for entry in found.entries] == ["lr=0.01,seed=1", "lr=0.01,seed=2", "lr=0.001,seed=1", "lr=0.001,seed=2"]
    assert [path for path, _ in found.differences] == ["seed", "optim.groups.0.lr"]
    assert [members for members, _ in found.seeds] == [["lr=0.001,seed=1", "lr=0.001,seed=2"], ["lr=0.01,seed=1", "lr=0.01,seed=2"]]
    rows = {name: (mean, deviation) for name, mean, deviation in found.seeds[1][1]}
    assert rows["training: KL from the teacher, last tenth"] == ("0.1875", "47.1%")
    one, other = (run / "distil" / "grid" / name for name in ("lr=0.01,seed=1", "lr=0.001,seed=1"))
    assert side_by_side(one, other).differences == [("optim.groups.0.lr", ("0.01", "0.001"))]


def test_the_page_is_well_formed_and_needs_nothing_from_outside(pair: list[Path]) -> None:
    stages = {"distil": train(student={"base": NASTY, NASTY: 1}), "evaluate": {"kind": "evaluate"}}
    (pair[1] / "recipe.json").write_text(json.dumps({"name": NASTY, "stages": stages}))
    found = side_by_side(*pair)
    text = comparison_page(found)
    checker = Checker()
    checker.feed(text)
    assert not checker.open and not checker.tags & {"script", "link", "img", "iframe", "object"}
    assert "http" not in text and "url(" not in text and "<script" not in text
    shown = words(text)
    for said in ("distil.student.base", "3.1500", "+0.1", "Training: distil", "Recall: repeat", "Decode rate", "Samples", "61"):
        assert said in shown, said


def test_a_page_is_written_over_a_page_and_over_nothing_else(pair: list[Path], tmp_path: Path) -> None:
    found = side_by_side(*pair)
    page = write_comparison(found, tmp_path / "compare.html")
    assert write_comparison(found, page) == page
    (tmp_path / "notes.txt").write_text("mine")
    for path, message in ((tmp_path / "notes.txt", "not written over"), (tmp_path, "is a folder"), (tmp_path / "no" / "x.html", "there is no folder")):
        with pytest.raises(RunError, match=message):
            write_comparison(found, path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_what_cannot_be_compared_at_all_is_refused_with_a_way_out(pair: list[Path], tmp_path: Path) -> None:
    for paths, kind, message in (
        ([pair[0]], RunError, "is one thing, and a comparison needs two"),
        ([pair[0], pair[0]], RunError, "is named twice"),
        ([pair[0], tmp_path / "aa"], CheckpointError, "is not there, did you mean 'a'"),
        ([pair[0], pair[0] / "distill"], CheckpointError, "did you mean 'distil'"),
        ([pair[0], tmp_path], CheckpointError, "neither a run"),
    ):
        with pytest.raises(kind, match=message):
            read_entries(paths)


def test_the_verb_prints_tables_and_writes_the_page(pair: list[Path], tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["compare", *map(str, pair), "--out", str(tmp_path / "c.html"), "--by", "steps"])
    assert result.exit_code == 0, result.output
    assert "distil.optim.groups.0.lr" in result.output and "+0.1" in result.output
    assert "steps</text>" in (tmp_path / "c.html").read_text()
    assert len(tables(side_by_side(*pair))) == 4, "settings, numbers, and an empty line after each"
    refused = CliRunner().invoke(app, ["compare", *map(str, pair), "--by", "step"])
    assert refused.exit_code == 2 and "did you mean 'steps'" in refused.output
