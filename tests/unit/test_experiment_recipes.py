"""Experiments that run one recipe many times in one folder: each time under names of its own, and with every registered mixer."""

from __future__ import annotations

import pytest
from experiments.common import renamed
from experiments.long_context.run import part as part_of_long_context
from experiments.mixers.run import ARMS, LABELS, part
from experiments.tail_matters.run import STUDENTS, all_arms, arms

from limbeck.config.parts.mixers import MIXERS
from limbeck.config.recipe import references


def test_every_registered_mixer_takes_part() -> None:
    assert set(MIXERS) < set(LABELS)
    for label in LABELS:
        mixer = next(iter(part(label, 1.0, 1, [], []).stages.values())).student.surgery[0].mixer
        assert mixer.kind == label.split(":")[0]


def test_a_part_of_a_recipe_names_only_its_own_stages() -> None:
    recipes = [part("kda", 3.0, 2, list(ARMS), []), part_of_long_context(2, {"extend": 1e-3, "short": 2e-3, "softmax": 3e-3}, [], evaluated=True)[0]]
    for recipe in recipes:
        found = {stage for options in recipe.stages.values() for _, stage in references(options)}
        assert found and found <= set(recipe.stages)
        assert all(stage.seed == 2 for stage in recipe.stages.values())


def test_the_learning_rates_that_are_tuned_reach_their_stages() -> None:
    once, thrice = (part("kda", factor, 1, list(ARMS), []).stages for factor in (1.0, 3.0))
    for name, stage in once.items():
        if stage.kind == "train":
            other = thrice[name.replace("-x1-", "-x3-")]
            assert other.optim.groups[0].lr == pytest.approx(3 * stage.optim.groups[0].lr)
            assert [group.lr for group in other.optim.groups[1:]] == [group.lr for group in stage.optim.groups[1:]]


def test_words_that_are_no_stages_keep_their_names() -> None:
    names = {"a": "x-a", "mixers": "x-mixers"}
    assert renamed({"from": "a", "against": ["teacher", "a"], "train": ["mixers"]}, names) == {
        "from": "x-a", "against": ["teacher", "x-a"], "train": ["mixers"],
    }  # fmt: skip


@pytest.mark.parametrize("student", STUDENTS)
def test_every_tail_is_tried_with_every_student(student: str) -> None:
    file, kept, _ = STUDENTS[student]
    stages = all_arms(file, list(arms(kept)), 2, quick=False).stages
    objectives = [objective for stage in stages.values() if stage.kind == "train" for objective in stage.objectives]
    tried = {(o.tail, o.k, o.temperature) for o in objectives if o.kind == "topk_kl"}
    assert tried == {(tail, k, t) for tail in ("tail", "zero", "renorm_both") for k in kept for t in (1, 2)}
    assert {"ce", "kl"} < {o.kind for o in objectives}
    assert all(stage.seed == 2 for stage in stages.values() if stage.kind == "train")
