"""``path.to.key=value`` words."""

from __future__ import annotations

from typing import Any

import pytest

from limbeck.config.load import load_recipe
from limbeck.errors import RecipeError


def stage(name: str, *words: str) -> Any:
    return load_recipe("hybrid", words).stages[name]


def test_overrides_reach_every_kind_of_place() -> None:
    words = [
        "stages.align.loop.tokens=1M",
        "align.optim.groups.0.lr=5e-4",
        "align.student.surgery.0.keep=[1, 2]",
        "align.teacher.kind=self",
        "align.loop.stop_unless.below=3",
        "align.data.source.1.share=0.3",
        "evaluate.grid.rows=[8, 16]",
        "align.student.train=[mixers, rest]",
        "align.student.surgery.0.mixer={kind: swa, window: 32}",
        "name=other",
    ]
    align = stage("align", *words)
    assert (align.loop.tokens, align.optim.groups[0].lr, align.student.surgery[0].keep) == (1_000_000, 5e-4, (1, 2))
    assert (align.loop.stop_unless.loss, align.loop.stop_unless.below) == ("decreases", 3)
    assert align.data.source[1].share == 0.3
    assert stage("evaluate", *words).grid == {"rows": (8, 16)}
    assert (align.student.train, align.student.surgery[0].mixer.window) == (("mixers", "rest"), 32)
    assert load_recipe("hybrid", words).name == "other"


def test_an_override_makes_the_mappings_on_its_way() -> None:
    assert stage("evaluate", "evaluate.recall.rows=3").recall.rows == 3
    assert (
        stage("distil", "distil.data.from=extend", "extend.student.from=align", "distil.student.from=extend").data.from_
        == "extend"
    )
    assert load_recipe("pretrain", ["pretrain.student.config.rope_parameters.rope_theta=5e5"]).stages["pretrain"].student.config[
        "rope_parameters"
    ] == {"rope_type": "default", "rope_theta": 5e5}


def test_later_overrides_win() -> None:
    assert stage("align", "align.loop.tokens=1M", "align.loop.tokens=2M").loop.tokens == 2_000_000


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("algn.loop.tokens=1", "algn: there is no such key, did you mean 'align'?"),
        ("stages.algn.loop.tokens=1", "stages.algn: there is no such stage, did you mean 'align'?"),
        ("align.loop.tokns=1", "stages.align.loop.tokns: there is no such key, did you mean 'tokens'?"),
        ("align.loop.tokens=fast", "stages.align.loop.tokens: must be a positive whole number"),
        ("align.loop.tokens.x=1", "'stages.align.loop.tokens' is a single value here"),
        ("align.optim.groups.7.lr=1", "'stages.align.optim.groups' is a list of 1: an item is named by its number, 0 to 0"),
        ("align.optim.groups.first.lr=1", "an item is named by its number"),
        ("align.teacher.model=x", "stages.align.teacher.model: there is no such key"),
        ("align.loop.tokens", "write it as path.to.key=value"),
        ("=3", "write it as path.to.key=value"),
        ("a..b=3", "write it as path.to.key=value"),
        ("align.student.surgery.0.keep=[1", "YAML: expected ',' or ']'"),
        ("extends=hybrid", "extends: there is no such key"),
        ("extend.teacher.dtype=float32", "which teacher is not said; write stages.extend.teacher.kind=… first"),
    ],
)
def test_an_override_that_does_not_fit_names_itself(word: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("hybrid", [word])
    assert any(f"override '{word}'" in str(problem) and message in str(problem) for problem in caught.value.problems), str(
        caught.value
    )
