"""Training on deltas warns when the probes are matched better and text is predicted worse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine_parts import Rows, make_step, make_trainer
from limbeck.config.parts.objectives import OBJECTIVES
from limbeck.objectives.delta import WORSE


def warned(*courses: tuple[float, float]) -> str | None:
    """What the objective says after validations of (held-out cross-entropy, delta cosine)."""
    objective: Any = OBJECTIVES.build(OBJECTIVES.options("delta").model_validate({"kind": "delta"}))
    return objective.warning([{"loss": 1.0, "ce": ce, "delta_cosine": cosine} for ce, cosine in courses])


def test_a_cosine_that_rises_while_text_gets_worse_is_flagged_with_the_way_out() -> None:
    said = warned((2.0, 0.1), (2.0 + 2 * WORSE, 0.2))
    assert said is not None
    assert all(word in said for word in ("delta cosine rises", "tether", "norm_penalty", "diverse probes"))


def test_the_best_earlier_validation_counts_and_not_the_one_before() -> None:
    # Slowly worse: no step of it is large.
    assert warned((2.0, 0.1), *((2.0 + 0.6 * WORSE * k, 0.1 + 0.1 * k) for k in (1, 2, 3)))


@pytest.mark.parametrize(
    "courses",
    [
        pytest.param([(2.0, 0.1)], id="one validation"),
        pytest.param([(2.0, 0.1), (1.9, 0.3)], id="both better"),
        pytest.param([(2.0, 0.3), (2.5, 0.2)], id="both worse: it diverges, and the loss shows it"),
        pytest.param([(2.0, 0.1), (2.0 + WORSE / 2, 0.3)], id="within the noise"),
        pytest.param([(2.0, 0.1), (3.0, 0.2), (1.9, 0.4)], id="recovered"),
    ],
)
def test_other_courses_are_not_flagged(courses: list[tuple[float, float]]) -> None:
    assert warned(*courses) is None


def test_without_text_to_watch_nothing_is_said() -> None:
    objective: Any = OBJECTIVES.build(OBJECTIVES.options("delta").model_validate({"kind": "delta"}))
    assert objective.warning([{"loss": 1.0, "delta_cosine": 0.1}, {"loss": 0.5, "delta_cosine": 0.9}]) is None


def test_a_run_says_it_aloud_at_the_validation_that_shows_it_and_once(tmp_path: Path) -> None:
    step = make_step()
    delta: Any = OBJECTIVES.build(OBJECTIVES.options("delta").model_validate({"kind": "delta"}))
    courses = [(2.0, 0.1), (2.5, 0.2), (2.6, 0.3)]
    # What the validations find is made up; the objective's judgement of them is not.
    step.objectives[0].warning = lambda history: delta.warning([{"ce": c, "delta_cosine": d} for c, d in courses[: len(history)]])
    trainer = make_trainer(tmp_path, step, steps=6, validate_every=2, validate_rows=4, validation_rows=Rows(4))
    said: list[str] = []
    trainer.voice.say = said.append  # type: ignore[method-assign]
    trainer.run()
    found = [line for line in said if "WARNING" in line]
    assert len(found) == 1 and found[0].startswith("WARNING: step 4: the delta cosine rises while held-out text gets worse")
