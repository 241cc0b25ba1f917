"""What a generator reads of a trajectory: its issue, the first user turn."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from limbeck.config.parts.trajectories import TrajectoryConditionOptions
from limbeck.data.conditions.texts import PAD
from limbeck.data.tokenizer import encode


class IssueReader:
    """Cuts issues to what is read of them."""

    def __init__(self, options: TrajectoryConditionOptions):
        self.options = options
        self.skip = re.compile(options.skip) if options.skip is not None else None

    def text(self, issue: str) -> str:
        """An issue without what all of them begin with."""
        found = self.skip.match(issue) if self.skip is not None else None
        return issue[found.end() :] if found else issue

    def tokens(self, tokenizer: Any, issues: list[str]) -> np.ndarray:
        """Token ids, int32 ``[N, 1, C]``, padded with -1."""
        longest = self.options.tokens
        found = np.full((len(issues), 1, longest), PAD, dtype=np.int32)
        for row, ids in zip(found, encode(tokenizer, [self.text(issue) for issue in issues]), strict=True):
            row[0, : min(len(ids), longest)] = ids[:longest]
        return found
