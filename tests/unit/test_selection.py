"""Which parameters train, and in which group."""

from __future__ import annotations

from typing import Any

import pytest

from families import tiny_model
from limbeck.config.parts.stages import GroupOptions
from limbeck.config.parts.surgeries import HybridizeOptions
from limbeck.errors import ModelError
from limbeck.models.limbeck_model import wrap_student
from limbeck.students.selection import parameter_groups, select_trainable
from limbeck.students.student import Student


@pytest.fixture
def student() -> Student:
    base = tiny_model("qwen3", tied=True, num_hidden_layers=2)
    return Student(wrap_student(base, [HybridizeOptions(keep=(1,))], {"source": "tiny", "fingerprint": {}}))


def _trainable(student: Any) -> set[str]:
    return {name for name, p in student.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("patterns", "belongs"),
    [
        (["all"], lambda name: True),
        (["mixers"], lambda name: name.startswith("model.layers.0.self_attn.")),
        (["rest"], lambda name: not name.startswith("model.layers.0.self_attn.")),
        (["mixers", "model.layers.*.mlp.*"], lambda name: name.startswith("model.layers.0.self_attn.") or ".mlp." in name),
        (["*.dt_bias"], lambda name: name.endswith(".dt_bias")),
    ],
)
def test_what_is_named_trains_and_the_rest_is_frozen(student: Student, patterns: list[str], belongs: Any) -> None:
    names = select_trainable(student, patterns)
    assert set(names) == _trainable(student) == {name for name in student.roles if belongs(name)}
    select_trainable(student, ["all"])
    assert _trainable(student) == set(student.roles)


@pytest.mark.parametrize(
    ("pattern", "nearest"), [("mixer", "mixers"), ("model.layers.*.mpl.*", "mlp"), ("model.layers.0.self_attn.A_logg", "A_log")]
)
def test_a_pattern_that_matches_nothing_is_an_error_with_the_nearest_names(student: Student, pattern: str, nearest: str) -> None:
    with pytest.raises(ModelError) as caught:
        select_trainable(student, ["all", pattern])
    assert f"'{pattern}' matches no parameter; nearest: " in str(caught.value)
    assert nearest in str(caught.value).split("nearest: ")[1].split(";")[0]


def test_the_first_group_that_claims_a_parameter_wins(student: Student) -> None:
    select_trainable(student, ["all"])
    groups = tuple(
        GroupOptions.model_validate(group)
        for group in ({"match": "*.A_log", "lr": 1}, {"role": "mixers", "lr": 2}, {"match": "*.mlp.*", "lr": 3}, {"lr": 4})
    )
    claimed = parameter_groups(student, groups)
    assert [group for group, _ in claimed] == list(groups)
    names = [[name for name, _ in members] for _, members in claimed]
    assert names[0] == ["model.layers.0.self_attn.A_log"]
    assert all(name.startswith("model.layers.0.self_attn.") and not name.endswith("A_log") for name in names[1])
    assert names[2] == [name for name in student.roles if ".mlp." in name]
    assert sorted(name for group in names for name in group) == sorted(student.roles)
    parameters = dict(student.model.named_parameters())
    assert all(p is parameters[name] for _, members in claimed for name, p in members)


def test_frozen_parameters_are_in_no_group(student: Student) -> None:
    select_trainable(student, ["mixers"])
    [(_, members)] = parameter_groups(student, (GroupOptions(lr=1),))
    assert {name for name, _ in members} == _trainable(student)


@pytest.mark.parametrize(
    ("train", "groups", "message"),
    [
        ("all", [{"role": "mixers", "lr": 1}], r"no group claims model\.embed_tokens\.weight.* and \d+ more, which train"),
        ("all", [{"lr": 1}, {"role": "mixers", "lr": 2}], r"optim\.groups\.1: all parameters of role 'mixers' are claimed by earlier groups"),
        ("rest", [{"lr": 1}, {"role": "mixers", "lr": 2}], r"optim\.groups\.1: no parameter of role 'mixers' trains"),
        ("all", [{"role": "mixer", "lr": 1}, {"lr": 1}], r"optim\.groups\.0: no parameter has the role 'mixer'; roles .*: mixers, rest"),
        ("all", [{"match": "*.mpl.*", "lr": 1}, {"lr": 1}], r"optim\.groups\.0: '\*\.mpl\.\*' matches no parameter"),
    ],
)
def test_a_group_without_parameters_and_a_parameter_without_group_are_errors(
    student: Student, train: str, groups: list[dict[str, Any]], message: str
) -> None:
    select_trainable(student, [train])
    with pytest.raises(ModelError, match=message):
        parameter_groups(student, tuple(GroupOptions.model_validate(g) for g in groups))
