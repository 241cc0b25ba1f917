"""Trackers mirror ``metrics.jsonl``: every line once, also over restarts, and none of them can end a run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from engine_parts import Rows, make_trainer
from limbeck.cli.app import app
from limbeck.config.load import load_recipe
from limbeck.config.parts.stages import LoopOptions, ShortDistilOptions
from limbeck.config.trackers import check_trackers
from limbeck.engine.metrics import read_metrics
from limbeck.engine.trackers import Tracked, Trackers
from limbeck.errors import RecipeError
from limbeck.stages.run import stage_key


class Service:
    """A tracker's package: what `init` was given, and what its runs were told."""

    def __init__(self) -> None:
        self.starts: list[dict[str, Any]] = []
        self.told: list[tuple[int, dict[str, float]]] = []
        self.finished = 0
        self.breaks: Callable[[int], bool] = lambda step: False

    def init(self, **given: Any) -> Any:
        self.starts.append(given)
        return SimpleNamespace(log=self.log, finish=self.finish)

    def log(self, values: dict[str, float], step: int) -> None:
        if self.breaks(step):
            raise ConnectionError("the line is dead\nand more")
        self.told.append((step, values))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch) -> dict[str, Service]:
    found = {"wandb": Service(), "trackio": Service()}
    for name, service in found.items():
        module = ModuleType(name)
        module.init, module.Settings = service.init, dict  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    return found


def trainer(folder: Path, chosen: list[Any], **loop: Any) -> Any:
    options = LoopOptions.model_validate({"steps": 1, "trackers": chosen}).trackers
    made = make_trainer(folder, **{"steps": 8, "checkpoint_every": 4, "log_every": 1, "precision": "float32", "validate_every": 4, **loop})
    made.validation_rows = Rows()
    made.trackers = Trackers(options, Tracked(folder, "run/stage", folder, {"seed": 0}))
    made.said = []
    say = made.voice.say
    made.voice.say = lambda text: (made.said.append(text), say(text))[1]
    return made


def dies_at(made: Any, step: int) -> None:
    """End it in the middle of a step, as an error elsewhere would."""
    apply = made._apply

    def falls(loss: Any) -> None:
        if made.at.step + 1 == step:
            raise OSError("the machine is gone")
        apply(loss)

    made._apply = falls


def expected(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """The file's lines as a tracker should have been told them."""
    rows = read_metrics(folder / "metrics.jsonl")
    left_out = ("step", "time", "losses")
    return [(row["step"], {key: value for key, value in row.items() if key not in left_out and value is not None}) for row in rows]


def training(service: Service) -> list[int]:
    """Steps of training lines that it was told."""
    return [step for step, values in service.told if "loss" in values]


def held_out(service: Service) -> list[int]:
    """Steps of validation lines."""
    return [step for step, values in service.told if "validation/loss" in values]


def test_every_line_of_the_file_is_mirrored_as_it_is_written(tmp_path: Path, services: dict[str, Service]) -> None:
    made = trainer(tmp_path, ["wandb", "trackio"])
    made.run()
    assert expected(tmp_path)[0][1]["loss"] > 0
    for service in services.values():
        assert service.told == expected(tmp_path) and service.finished == 1
        assert training(service) == list(range(1, 9)) and held_out(service) == [4, 8]
    assert services["wandb"].starts[0]["name"] == "run/stage" and services["wandb"].starts[0]["mode"] == "offline"
    assert services["wandb"].starts[0]["config"] == {"seed": 0}


def test_a_run_that_goes_on_does_so_in_the_same_place_without_a_step_twice(tmp_path: Path, services: dict[str, Service]) -> None:
    first = trainer(tmp_path, ["wandb", "trackio"])
    dies_at(first, 7)
    with pytest.raises(OSError, match="gone"):
        first.run()
    assert training(services["wandb"]) == [1, 2, 3, 4, 5, 6], "two steps after the checkpoint"
    trainer(tmp_path, ["wandb", "trackio"]).run()
    for service in services.values():
        assert training(service) == list(range(1, 9)) and held_out(service) == [4, 8]
    assert len({start["id"] for start in services["wandb"].starts}) == 1
    assert len({start["name"] for start in services["trackio"].starts}) == 1 and services["trackio"].starts[1]["resume"] == "allow"


def test_a_run_that_begins_anew_is_another_one(tmp_path: Path, services: dict[str, Service]) -> None:
    first = trainer(tmp_path, ["wandb"])
    dies_at(first, 3)
    with pytest.raises(OSError, match="gone"):
        first.run()
    trainer(tmp_path, ["wandb"]).run()
    assert training(services["wandb"]) == [1, 2, *range(1, 9)]
    assert len({start["id"] for start in services["wandb"].starts}) == 2, "nothing was saved, so these are two runs"


def test_a_tracker_that_fails_is_said_once_ends_nothing_and_catches_up(tmp_path: Path, services: dict[str, Service]) -> None:
    services["wandb"].breaks = lambda step: step == 3
    first = trainer(tmp_path, ["wandb", "trackio"])
    dies_at(first, 7)
    with pytest.raises(OSError, match="gone"):
        first.run()
    warnings = [line for line in first.said if "tracker" in line]
    assert warnings == ["WARNING: tracker 'wandb' failed (the line is dead) and is left off until the next start; the run and metrics.jsonl go on"]
    assert training(services["wandb"]) == [1, 2] and training(services["trackio"]) == list(range(1, 7))
    services["wandb"].breaks = lambda step: False
    trainer(tmp_path, ["wandb", "trackio"]).run()
    assert training(services["wandb"]) == list(range(1, 9)), "what it missed is told from the file"


def test_a_tracker_that_cannot_start_ends_nothing(tmp_path: Path, services: dict[str, Service], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(**_: Any) -> None:
        raise PermissionError("no such project")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuses)
    made = trainer(tmp_path, ["wandb"])
    made.run()
    assert [line for line in made.said if "no such project" in line] and len(expected(tmp_path)) == 10


def test_a_tracker_added_later_is_told_what_was_before(tmp_path: Path, services: dict[str, Service]) -> None:
    first = trainer(tmp_path, [])
    dies_at(first, 7)
    with pytest.raises(OSError, match="gone"):
        first.run()
    trainer(tmp_path, ["trackio"]).run()
    assert training(services["trackio"]) == list(range(1, 9))


def test_a_tracker_that_hangs_at_the_end_is_left_behind(tmp_path: Path, services: dict[str, Service], monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setattr("limbeck.engine.trackers.PATIENCE", 0.1)
    monkeypatch.setattr(services["trackio"], "finish", lambda: time.sleep(30))
    made = trainer(tmp_path, ["trackio"])
    began = time.monotonic()
    made.run()
    assert time.monotonic() - began < 20 and "did not finish" in " ".join(made.said)


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed: its event files are not read back here")
def test_event_files_hold_every_step_once_also_after_a_death(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = trainer(tmp_path, ["tensorboard"])
    dies_at(first, 7)
    with pytest.raises(OSError, match="gone"):
        first.run()
    trainer(tmp_path, ["tensorboard"], steps=9).run()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "loss" in row]
    assert [event.step for event in events.Scalars("validation/loss")] == [4, 8, 9]
    assert [step for step, _ in found] == [row["step"] for row in rows] == list(range(1, 10))
    assert [value for _, value in found] == pytest.approx([row["loss"] for row in rows])


def test_a_missing_package_is_told_before_anything_starts_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("limbeck.config.parts.trackers.find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["check", "hybrid", "align.loop.trackers=[wandb]"])
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert "stages.align.loop.trackers.0: tracker 'wandb' needs the package wandb" in result.stderr and "pip install 'limbeck[wandb]'" in result.stderr
    monkeypatch.setattr("limbeck.stages.run._run_stages", lambda *_: pytest.fail("it started"))
    ran = CliRunner().invoke(app, ["run", "hybrid", "align.loop.trackers=trackio", "--run-dir", "nowhere"])
    assert ran.exit_code == 2 and "limbeck[trackio]" in ran.stderr and not Path("nowhere").exists()
    # What was recorded elsewhere can be read where the package is not.
    assert LoopOptions.model_validate({"steps": 1, "trackers": [{"kind": "wandb"}]}).trackers[0].project == "limbeck"


def test_accounts_come_from_the_environment_alone(services: dict[str, Service], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    recipe = load_recipe("hybrid", ["align.loop.trackers=[{kind: wandb, mode: online}, {kind: trackio, space: me/runs}]"])
    with pytest.raises(RecipeError) as caught:
        check_trackers(recipe)
    assert "WANDB_API_KEY is not set" in str(caught.value) and "HF_TOKEN is not set" in str(caught.value)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("HF_TOKEN", "h" * 20)
    check_trackers(recipe)
    with pytest.raises(RecipeError, match="api_key"):
        load_recipe("hybrid", ["align.loop.trackers=[{kind: wandb, api_key: abc}]"])


def test_one_of_a_kind_is_enough_and_candidates_have_none() -> None:
    with pytest.raises(ValidationError, match="names 'wandb' 2 times"):
        LoopOptions.model_validate({"steps": 1, "trackers": ["wandb", {"kind": "wandb", "project": "other"}]})
    short = {"optim": {"groups": [{"lr": 1e-3}], "schedule": {"kind": "constant"}}, "loop": {"steps": 1, "trackers": ["tensorboard"]}}
    with pytest.raises(ValidationError, match="give trackers to train stages"):
        ShortDistilOptions.model_validate(short)
    with pytest.raises(RecipeError, match="did you mean 'tensorboard'"):
        load_recipe("hybrid", ["align.loop.trackers=[tensorbord]"])


def test_trackers_do_not_make_a_stage_stale(tmp_path: Path) -> None:
    plain, tracked = (load_recipe("hybrid", words) for words in ([], ["align.loop.trackers=[tensorboard, {kind: wandb, project: mine}]"]))
    assert plain != tracked and stage_key(plain, "align", tmp_path) == stage_key(tracked, "align", tmp_path)


def test_a_damaged_note_of_how_far_they_are_is_no_obstacle(tmp_path: Path, services: dict[str, Service]) -> None:
    first = trainer(tmp_path, ["trackio"])
    dies_at(first, 7)
    with pytest.raises(OSError, match="gone"):
        first.run()
    assert json.loads((tmp_path / "trackers.json").read_text())["trackio"]["training"] == 6
    (tmp_path / "trackers.json").write_text('{"trackio": [')
    trainer(tmp_path, ["trackio"]).run()
    assert len({start["name"] for start in services["trackio"].starts}) == 2 and training(services["trackio"])[6:] == list(range(1, 9))
