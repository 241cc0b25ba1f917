"""Training on deltas warns when the probes are matched better and text is predicted worse."""

from __future__ import annotations

from typing import Any

import pytest

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
