"""Which parameters train, and at which learning rate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from limbeck.config.parts.stages import GroupOptions
from limbeck.errors import ModelError

ALL = "all"
SHOWN = 4


def select_trainable(student: Any, patterns: Iterable[str]) -> list[str]:
    """Let the named parameters train and freeze the others; returns their names in the model.

    A word is ``all``, a role, or a shell-style pattern of parameter names.  One that matches nothing raises :class:`ModelError`.
    """
    roles: dict[str, str] = student.roles
    chosen: set[str] = set()
    for pattern in patterns:
        found = [name for name in roles if _matches(pattern, name, roles)]
        if not found:
            raise ModelError(f"student.train: {_nothing(pattern, roles)}")
        chosen.update(found)
    for name, parameter in student.trained.named_parameters():
        parameter.requires_grad_(name in chosen)
    return [name for name in roles if name in chosen]


def parameter_groups(student: Any, groups: Sequence[GroupOptions]) -> list[tuple[GroupOptions, list[tuple[str, nn.Parameter]]]]:
    """Each trainable parameter under the first group that claims it; a group without role and pattern claims all.

    A group that gets none, and a parameter that no group claims, raise :class:`ModelError`.
    """
    roles: dict[str, str] = student.roles
    claimed: list[tuple[GroupOptions, list[tuple[str, nn.Parameter]]]] = [(group, []) for group in groups]
    left = []
    for name, parameter in student.trained.named_parameters():
        if not parameter.requires_grad:
            continue
        for group, members in claimed:
            if _claims(group, name, roles):
                members.append((name, parameter))
                break
        else:
            left.append(name)
    for index, (group, members) in enumerate(claimed):
        if not members:
            raise ModelError(f"optim.groups.{index}: {_why_empty(group, roles, [n for n, p in student.trained.named_parameters() if p.requires_grad])}")
    if left:
        more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
        raise ModelError(
            f"optim.groups: no group claims {', '.join(left[:SHOWN])}{more}, which train{'s' if len(left) == 1 else ''}: "
            "add a group with only a learning rate for the rest, or take them out of `student.train`"
        )
    return claimed


def _claims(group: GroupOptions, name: str, roles: Mapping[str, str]) -> bool:
    return group.role in (None, roles[name]) and (group.match is None or _matches(group.match, name, {}))


def _matches(pattern: str, name: str, roles: Mapping[str, str]) -> bool:
    return pattern == ALL or roles.get(name) == pattern or fnmatchcase(name, pattern)


def _why_empty(group: GroupOptions, roles: Mapping[str, str], trainable: Sequence[str]) -> str:
    if group.role is not None and group.role not in roles.values():
        return f"no parameter has the role '{group.role}'; roles of this student: {', '.join(sorted(set(roles.values())))}"
    if group.match is not None and not any(_matches(group.match, name, {}) for name in roles):
        return _nothing(group.match, roles)
    what = "the student" if group.role is group.match is None else f"role '{group.role}'" if group.role else f"match '{group.match}'"
    if any(_claims(group, name, roles) for name in trainable):
        return f"all parameters of {what} are claimed by earlier groups: put this group before them, or take it out"
    return f"no parameter of {what} trains (student.train)"


def _nothing(pattern: str, roles: Mapping[str, str]) -> str:
    words = sorted({ALL, *roles.values()})
    near = get_close_matches(pattern, [*words, *roles], n=3, cutoff=0.4)
    nearest = f"; nearest: {', '.join(near)}" if near else ""
    return f"'{pattern}' matches no parameter{nearest}; it is one of {', '.join(words)}, or a pattern of parameter names such as model.layers.*.mlp.*"
