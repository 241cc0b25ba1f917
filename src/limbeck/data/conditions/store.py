"""The folder of conditions: what is in it, and how it is opened.

```
conditions.json               Manifest: written last
tokenizer/                    the tokenizer that made the ids
tokens.bin                    uint16 or uint32: every example of every slice in every format, once
examples.npy                  int64 [E, 5]: start, prompt_end, end (in tokens.bin), condition, side (0 train, 1 test);
                              sorted by condition, then side
hashes.npy                    uint64 [E, 2]: blake2b of the text as it was read, and as it is written
mask.bin                      uint8, 1 where a token is a target; only where `loss` is `mask`
reads.npy                     int32 [N, S, C]: what a generator reads, padded with -1; only where it is not drawn from examples
```

An example of a mix is a line of ``examples.npy`` that points at its part's tokens.  ``prompt_end == start``: plain text.
Examples stand one after the other in rows, or (`whole`) each is a row of its own: a window of a trajectory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from limbeck.data.conditions.rows import ConditionRows
from limbeck.data.conditions.texts import SIDES, ConditionTexts
from limbeck.errors import DataError, did_you_mean
from limbeck.files import damage, listing, sha256
from limbeck.records import sealed, unsealed

FORMAT = 1
"""Raised when the same options would give other files."""
SPLITS = ("seen", "held_out_slice", "held_out_source", "mix")
START, PROMPT_END, END, CONDITION, SIDE = range(5)
"""Columns of ``examples.npy``."""
DIVERSE = 0.9
"""Share of conditions that must be told apart by what a generator reads."""
ALIKE = 0.1
"""How often two texts of two different conditions may be the same."""


@dataclass(frozen=True)
class Condition:
    """One task: a slice of a source in a format, or a mix of two."""

    id: int
    """Its place in :attr:`ConditionSet.conditions`."""
    name: str
    """``source/slice/format``, or ``mix/`` and the names of the parts."""
    source: str
    slice: str
    format: str
    split: str
    """One of :data:`SPLITS`."""
    parts: tuple[int, ...]
    """Ids of the two parts of a mix."""
    examples: dict[str, int]
    """By side."""
    tokens: dict[str, int]
    """By side."""
    digest: str
    """Hash of its text."""


@dataclass(frozen=True)
class Manifest:
    """What ``conditions.json`` says."""

    sequence: int
    loss: str
    """`text`, `answer` or `mask`."""
    form: str
    """`prompts`, `prompt_answer` or `issue`."""
    texts: int
    tokens: int
    seed: int
    dtype: str
    vocabulary: int
    """Highest id of the tokenizer plus one."""
    eos: int | None
    pad: int
    tokenizer: str
    """Fingerprint of the tokenizer's files."""
    conditions: tuple[Condition, ...]
    notes: list[str] = field(default_factory=list)
    """What was left out, and why."""
    whole: bool = False
    """Whether every example is a row of its own."""
    template: str | None = None
    """Fingerprint of the chat template."""
    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Size and SHA-256 by file."""
    format: int = FORMAT


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``conditions.json`` with the size and SHA-256 of everything else in the folder."""
    text = json.dumps(sealed({**asdict(manifest), "files": listing(folder)}), indent=1, sort_keys=True, ensure_ascii=False)
    (folder / "conditions.json").write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path, *, verify: bool = False) -> Manifest:
    """The folder's ``conditions.json``, after checking the size (and with ``verify`` the SHA-256) of every file it lists.

    Raises:
        DataError: no such folder, another format, or a damaged file, by name.
    """
    path = folder / "conditions.json"
    again = f"remove {folder} and prepare the conditions again"
    try:
        record = unsealed(path.read_bytes())
        if record["format"] != FORMAT:
            raise DataError(f"{folder}: written by another version (format {record['format']!r:.80}, this one reads {FORMAT}): {again}")
        conditions = tuple(Condition(**{**item, "parts": tuple(item["parts"])}) for item in record["conditions"])
        files = {name: (int(size), str(sha)) for name, (size, sha) in record["files"].items()}
        manifest = Manifest(**{**record, "conditions": conditions, "files": files})
    except FileNotFoundError as error:
        raise DataError(f"{folder}: no conditions here (no conditions.json): run its prepare_conditions stage") from error
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, OSError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: damaged ({type(error).__name__}: {error}): {again}") from error
    if problem := damage(folder, manifest.files, verify=verify):
        raise DataError(f"{problem}: {again}")
    return manifest


class ConditionSet:
    """Conditions on disk, memory-mapped."""

    def __init__(self, folder: Path, *, verify: bool = False):
        """Open ``folder``; sizes are always checked, contents with ``verify``.

        Raises:
            DataError: no conditions, or a missing, truncated or (``verify``) altered file.
        """
        self.folder = folder = Path(folder)
        self.manifest = manifest = read_manifest(folder, verify=verify)
        self.conditions = manifest.conditions
        self.tokens = np.memmap(folder / "tokens.bin", dtype=manifest.dtype, mode="r")
        self.examples_E5 = np.load(folder / "examples.npy", mmap_mode="r")
        self.hashes_E2 = np.load(folder / "hashes.npy", mmap_mode="r")
        self.mask = np.memmap(folder / "mask.bin", dtype=np.uint8, mode="r") if manifest.loss == "mask" else None
        counts = [condition.examples[side] for condition in self.conditions for side in SIDES]
        self.first_N3 = np.concatenate([[0], np.cumsum(counts)])[np.arange(len(self.conditions))[:, None] * 2 + np.arange(3)]
        """First line of ``examples.npy`` of each condition's training and test side, and the line behind both."""
        if len(self.examples_E5) != sum(counts) or len(self.hashes_E2) != sum(counts) or int(self.examples_E5[:, END].max()) > len(self.tokens):
            raise DataError(f"{folder}: conditions.json, examples.npy and tokens.bin disagree: remove {folder} and prepare the conditions again")

    def __len__(self) -> int:
        """Number of conditions."""
        return len(self.conditions)

    @property
    def tokenizer(self) -> Path:
        """The folder of the tokenizer."""
        return self.folder / "tokenizer"

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that change when anything in the folder does."""
        return sha256(self.folder / "conditions.json")[:16]

    def split(self, *names: str) -> list[int]:
        """Ids of the conditions of a split, or of several.

        Raises:
            DataError: no such split.
        """
        for name in names:
            if name not in SPLITS:
                raise DataError(f"no split {name!r} of conditions{did_you_mean(name, SPLITS) or ';'} splits: {', '.join(SPLITS)}")
        return [condition.id for condition in self.conditions if condition.split in names]

    def named(self, name: str) -> Condition:
        """A condition by its name.

        Raises:
            DataError: there is none, with the nearest names.
        """
        known = {condition.name: condition for condition in self.conditions}
        if name not in known:
            raise DataError(
                f"{self.folder}: no condition "
                f"{name!r}{did_you_mean(name, known) or f'; there are {len(known)}, such as {next(iter(known), None)}'}"
            )
        return known[name]

    def judged(self) -> list[int]:
        """Ids of the conditions that a validation in training reads: seen ones, or where these have no test side all others that have one."""
        tested = [condition for condition in self.conditions if condition.examples["test"]]
        return [c.id for c in tested if c.split == "seen"] or [c.id for c in tested if c.split != "mix"]

    def rows(
        self,
        ids: Sequence[int],
        side: str = "train",
        *,
        seed: int | None = None,
        draw: int = 0,
        condition_of: Mapping[int, int] | None = None,
    ) -> ConditionRows:
        """Rows of one side of some conditions, in the order of ``ids``.

        ``draw`` gives other condition texts for the same rows; ``condition_of`` maps conditions to the one whose texts are read
        instead of their own; ``seed`` of the texts is by default that of the stage.
        """
        return ConditionRows(self, ids, side, seed=seed, draw=draw, condition_of=condition_of)

    @cached_property
    def texts(self) -> ConditionTexts:
        """What a generator reads."""
        return ConditionTexts(self)

    def check_diverse(self) -> None:
        """Refuse conditions that a generator could not tell apart: their texts, as they are read, are the same.

        Raises:
            DataError: fewer than 0.9 different sets of texts a condition, or two texts of two conditions are the same in more
                than 0.1 of all pairs.
        """
        names = [condition.name for condition in self.conditions if condition.split != "mix"]
        if len(names) < 2:
            return
        share, alike, first = self.texts.diversity()
        more = "leave out what all begin with (`condition.skip`)" if self.manifest.form == "issue" else "read answers too (`condition.form: prompt_answer`)"
        way = f"; or read more of each text (`condition.tokens`), {more}, or leave such conditions out"
        if share <= DIVERSE:
            raise DataError(
                f"conditions: {share:.0%} of {len(names)} conditions have texts of their own to be read, more than {DIVERSE:.0%} must: "
                f"{names[first[0]]} and {names[first[1]]} read the same, so that no generator can tell them apart: is the prompt constant{way}"
            )
        if alike > ALIKE:
            raise DataError(
                f"conditions: two texts of two different conditions are the same in {alike:.0%} of all pairs, at most {ALIKE:.0%} may be: "
                f"most prompts are the same words{way}"
            )
