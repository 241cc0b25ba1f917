"""Trajectories -> windows: read, filter, cap, render, tokenise, cut, store.

Rows are read twice, first to choose and then to write, so that no more than a few stand in memory.  The folder appears whole or
not at all, and the same inputs give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from limbeck.config.parts.sources import HubSourceOptions
from limbeck.config.parts.trajectories import PrepareTrajectoriesStageOptions
from limbeck.data.conditions.store import Condition, ConditionSet, Manifest, write_manifest
from limbeck.data.conditions.texts import PAD, SIDES
from limbeck.data.sources import HubSource
from limbeck.data.store import being_written
from limbeck.data.tokenizer import tokenizer_digest
from limbeck.data.trajectories.filters import Leakage, Outline, capped, split_by_repo, why_not
from limbeck.data.trajectories.formats import trajectory_of
from limbeck.data.trajectories.issues import IssueReader
from limbeck.data.trajectories.reading import local_files, raw_rows
from limbeck.data.trajectories.render import ChatTemplate
from limbeck.data.trajectories.tokens import Tokens, tokenise
from limbeck.data.trajectories.trajectory import Trajectory, Unusable
from limbeck.data.trajectories.windows import cut
from limbeck.errors import DataError
from limbeck.models.loading import copy_tokenizer, load_tokenizer

TOGETHER = 32
"""Trajectories tokenised at a time."""
SECONDS_BETWEEN_LINES = 10


class _Candidate(NamedTuple):
    """A trajectory that passed the filters."""

    name: str
    repo: str
    outline: Outline


@dataclass
class _Own:
    """What became of the trajectories of one condition."""

    number: int
    name: str
    repo: str
    instance: str
    split: str
    issue: str
    lines: list[tuple[int, int]] = field(default_factory=list)
    """Where its windows stand in ``tokens.bin``."""

    @property
    def side(self) -> str:
        """Windows of a repository that is held out are for judging alone."""
        return "train" if self.split == "seen" else "test"


def build_trajectories(
    options: PrepareTrajectoriesStageOptions,
    folder: Path,
    *,
    tokenizer: str,
    base_dir: Path,
    progress: Callable[[str], None] | None = None,
) -> ConditionSet:
    """Write ``folder`` anew and open it.  ``tokenizer`` is a folder or hub name; relative paths start at ``base_dir``.

    Beside the files of any conditions it holds ``report.json``, ``dropped.jsonl`` (a line for every row left out, with the reason) and,
    if asked for, ``windows.arrow``.

    Raises:
        DataError: files that are missing, a template that cannot be used, nothing that is left, or issues that read the same.
    """
    with being_written(Path(folder)) as out:
        _Build(options, out, tokenizer, Path(base_dir).resolve(), progress or (lambda line: None)).run()
        ConditionSet(out).check_diverse()
    return ConditionSet(folder)


class _Build:
    """One run into an empty folder."""

    def __init__(self, options: PrepareTrajectoriesStageOptions, out: Path, tokenizer: str, base_dir: Path, say: Callable[[str], None]):
        self.options, self.out, self.base_dir, self._say = options, out, base_dir, say
        self.notes: list[str] = []
        self.counts: Counter[str] = Counter()
        self.kept = 0
        """Trajectories of which there is a window."""
        (out / "tokenizer").mkdir()
        copy_tokenizer(tokenizer, out / "tokenizer")
        self.tokenizer = load_tokenizer(str(out / "tokenizer"))
        self.template = ChatTemplate(self.tokenizer, self._template_text())
        self.vocabulary = max(self.tokenizer.get_vocab().values()) + 1
        self.dtype = np.dtype(np.uint16 if self.vocabulary <= 2**16 else np.uint32)
        self._spoken_at = time.monotonic()

    def run(self) -> None:
        """All steps."""
        with open(self.out / "dropped.jsonl", "w", encoding="utf-8") as self._dropped:
            chosen = self._choose()
            owns, lengths, left_out = self._write(chosen)
        self._finish(owns, lengths, left_out)

    def note(self, line: str) -> None:
        """Say something, and keep it."""
        self.notes.append(line)
        self._say(f"  {line}")

    def _template_text(self) -> str | None:
        if self.options.template is None:
            return None
        path = self.base_dir / Path(self.options.template).expanduser()
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise DataError(f"template: {self.options.template}: cannot be read as a Jinja file ({error})") from error

    # -- choosing ----------------------------------------------------------------------------------------------------------

    def _rows(self) -> Iterator[tuple[int, str, Trajectory | Unusable]]:
        """Every row that is read, by number and name, as a trajectory or as what is wrong with it."""
        options = self.options
        rows = raw_rows(options.path, options.hub, self.base_dir)
        for number, (name, record) in enumerate(islice(rows, options.limit)):
            self._progress(f"{number:,} rows read")
            try:
                yield number, name, record if isinstance(record, Unusable) else trajectory_of(record, name)
            except Unusable as why:
                yield number, name, why

    def _drop(self, name: str, reason: str, detail: str = "") -> None:
        self.counts[reason] += 1
        self._dropped.write(json.dumps({"row": name, "reason": reason, "detail": detail}, ensure_ascii=False) + "\n")

    def _choose(self) -> dict[int, str]:
        """Numbers of the rows that are kept, and the split of each."""
        filters, number = self.options.filters, -1
        leakage = Leakage([self.base_dir / Path(path).expanduser() for path in filters.leaked], swe_bench=filters.swe_bench == "drop")
        candidates: list[_Candidate] = []
        for number, name, found in self._rows():
            if isinstance(found, Unusable):
                self._drop(name, found.reason, found.detail)
                continue
            reason = why_not(found, resolved=filters.resolved, exit_status=filters.exit_status, patch=filters.patch) or leakage.why_not(found)
            if reason is not None:
                self._drop(name, reason, f"instance {found.instance_id}, exit_status {found.exit_status!r}, resolved {found.resolved}")
                continue
            candidates.append(_Candidate(name, found.repo, Outline.of(number, found)))
        self.rows_read = number + 1
        kept = {outline.number for outline in capped([candidate.outline for candidate in candidates], filters.per_instance)}
        for candidate in candidates:
            if candidate.outline.number not in kept:
                self._drop(candidate.name, "more than per_instance of an instance", f"instance {candidate.outline.instance_id}")
        chosen = [candidate for candidate in candidates if candidate.outline.number in kept]
        if not chosen:
            raise DataError(f"no trajectory is left of {self.rows_read} rows: {self._reasons() or 'there were none'}: check `path`, or loosen `filters`")
        split = split_by_repo([candidate.repo for candidate in chosen], self.options.held_out, self.options.seed)
        return {candidate.outline.number: split[candidate.repo] for candidate in chosen}

    def _reasons(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in self.counts.most_common())

    # -- writing -----------------------------------------------------------------------------------------------------------

    def _write(self, chosen: dict[int, str]) -> tuple[list[_Own], list[int], int]:
        """Windows of all chosen trajectories into ``tokens.bin`` and ``mask.bin``; returns their conditions, the lengths of the
        whole trajectories in tokens, and how many assistant turns no window holds."""
        owns: dict[tuple[str, str, str], _Own] = {}
        lengths: list[int] = []
        position = left_out = 0
        with open(self.out / "tokens.bin", "wb") as ids_file, open(self.out / "mask.bin", "wb") as mask_file:
            for trajectory, split, tokens in self._tokenised(chosen):
                lengths.append(len(tokens))
                windows, missing = cut(tokens, self.options.sequence, self.options.policy, self.options.overlap)
                windows = [window for window in windows if window.targets(tokens).any()]
                left_out += missing
                if not windows:
                    detail = f"{len(tokens)} tokens, of which {tokens.turns_N3[0, 0]} before the first turn, and sequence is {self.options.sequence}"
                    self._drop(trajectory.name, "longer than a window", detail)
                    continue
                self.kept += 1
                own = self._own(owns, trajectory, split)
                for window in windows:
                    ids = window.ids(tokens)
                    ids_file.write(ids.astype(self.dtype).tobytes())
                    mask_file.write(window.targets(tokens).astype(np.uint8).tobytes())
                    own.lines.append((position, position + len(ids)))
                    position += len(ids)
        found = sorted(owns.values(), key=lambda own: own.number)
        if not any(own.split == "seen" for own in found):
            raise DataError(f"no trajectory is left to train on: {self._reasons()}: raise `sequence`, choose another `policy`, or hold out less")
        for number, own in enumerate(found):
            own.number = number
        return found, lengths, left_out

    def _own(self, owns: dict[tuple[str, str, str], _Own], trajectory: Trajectory, split: str) -> _Own:
        """The condition of a trajectory: one for each instance and issue text."""
        key = (trajectory.repo, trajectory.instance_id, trajectory.issue)
        if key not in owns:
            same = sum(1 for repo, instance, _ in owns if (repo, instance) == key[:2])
            name = f"{trajectory.repo}/{trajectory.instance_id}" + (f"#{same + 1}" if same else "")
            owns[key] = _Own(len(owns), name, trajectory.repo, trajectory.instance_id, split, trajectory.issue)
        return owns[key]

    def _tokenised(self, chosen: dict[int, str]) -> Iterator[tuple[Trajectory, str, Tokens]]:
        rows = ((name, found, chosen[number]) for number, name, found in self._rows() if number in chosen and isinstance(found, Trajectory))
        while lot := list(islice(rows, TOGETHER)):
            rendered = []
            for name, trajectory, split in lot:
                try:
                    rendered.append((trajectory, split, self.template.render(trajectory.messages, trajectory.tools)))
                except Unusable as why:
                    self._drop(name, why.reason, why.detail)
            tokens = tokenise(self.tokenizer, [text for _, _, text in rendered])
            yield from ((trajectory, split, own) for (trajectory, split, _), own in zip(rendered, tokens, strict=True))

    # -- the end -----------------------------------------------------------------------------------------------------------

    def _finish(self, owns: list[_Own], lengths: list[int], left_out: int) -> None:
        """Tables, manifest and report."""
        table = np.array([[a, a, b, own.number, SIDES.index(own.side)] for own in owns for a, b in own.lines], dtype=np.int64)
        np.save(self.out / "examples.npy", table)
        tokens = np.memmap(self.out / "tokens.bin", dtype=self.dtype, mode="r")
        mask = np.memmap(self.out / "mask.bin", dtype=np.uint8, mode="r")
        hashes = np.array([_hash(tokens[a:b]) for a, _, b in table[:, :3]], dtype=np.uint64)
        np.save(self.out / "hashes.npy", np.stack([hashes, hashes], axis=1))
        reads = IssueReader(self.options.condition).tokens(self.tokenizer, [own.issue for own in owns])
        np.save(self.out / "reads.npy", reads)
        if self.options.arrow:
            write_arrow(self.out / "windows.arrow", owns, tokens, mask, reads)
        self._report(owns, lengths, left_out, int(mask.sum()), len(tokens))
        pad = self.tokenizer.pad_token_id
        eos = self.tokenizer.eos_token_id
        manifest = Manifest(
            sequence=self.options.sequence,
            loss="mask",
            form="issue",
            texts=1,
            tokens=self.options.condition.tokens,
            seed=self.options.seed,
            dtype=self.dtype.name,
            vocabulary=self.vocabulary,
            eos=eos,
            pad=int(pad if pad is not None else eos or 0),
            tokenizer=tokenizer_digest(str(self.out / "tokenizer")),
            conditions=tuple(_condition(own, tokens) for own in owns),
            notes=self.notes,
            whole=True,
            template=self.template.digest,
        )
        write_manifest(self.out, manifest)

    def _report(self, owns: list[_Own], lengths: list[int], left_out: int, targets: int, tokens: int) -> None:
        percentiles = {f"p{q}": int(np.percentile(lengths, q)) for q in (50, 90, 99)} | {"max": max(lengths)}
        windows = sum(len(own.lines) for own in owns)
        repos = {split: sorted({own.repo for own in owns if own.split == split}) for split in ("seen", "held_out_source")}
        record = {
            "rows": self.rows_read,
            "dropped": dict(self.counts.most_common()),
            "trajectories": self.kept,
            "conditions": len(owns),
            "windows": windows,
            "tokens": tokens,
            "targets": targets,
            "turns_without_a_window": left_out,
            "tokens_of_a_trajectory": percentiles,
            "repositories": repos,
            "template": self.template.digest,
        }
        (self.out / "report.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        held = sum(own.split != "seen" for own in owns)
        away = len(repos["held_out_source"])
        self.note(f"{self.rows_read:,} rows: {self.kept:,} trajectories of {len(owns):,} issues ({held} in {away} held-out repositories)")
        if self.counts:
            self.note(f"left out {self._reasons()} (each with its reason in dropped.jsonl)")
        words = ", ".join(f"{name} {value:,}" for name, value in percentiles.items())
        self.note(f"tokens of a trajectory: {words}")
        self.note(f"{windows:,} windows of at most {self.options.sequence:,} tokens, of which {targets / tokens:.1%} are targets")
        if left_out:
            way = "" if self.options.policy == "windows" else ", or set `policy: windows`"
            self.note(f"{left_out} assistant turns are in no window: raise `sequence`{way}")

    def _progress(self, words: str) -> None:
        if time.monotonic() - self._spoken_at > SECONDS_BETWEEN_LINES:
            self._spoken_at = time.monotonic()
            self._say(f"  {words}")

    _dropped: TextIO
    rows_read: int


def _condition(own: _Own, tokens: np.ndarray) -> Condition:
    sizes = {side: sum(b - a for a, b in own.lines) if side == own.side else 0 for side in SIDES}
    counts = {side: len(own.lines) if side == own.side else 0 for side in SIDES}
    text = hashlib.blake2b(digest_size=8)
    for a, b in own.lines:
        text.update(tokens[a:b].tobytes())
    return Condition(own.number, own.name, own.repo, own.instance, "trajectory", own.split, (), counts, sizes, text.hexdigest())


def _hash(tokens: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(tokens.tobytes(), digest_size=8).digest(), "little")


def write_arrow(path: Path, owns: list[Any], tokens: np.ndarray, mask: np.ndarray, reads: np.ndarray) -> None:
    """One row a window: ``input_ids``, ``labels`` (-100 where the token is no target), ``condition_ids``, ``instance_id``, ``repo``, ``split``."""
    import pyarrow as pa

    from limbeck.types import IGNORE

    ids = pa.list_(pa.int32())
    schema = pa.schema(
        [("input_ids", ids), ("labels", ids), ("condition_ids", ids), ("instance_id", pa.string()), ("repo", pa.string()), ("split", pa.string())]
    )
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for own in owns:
            read = reads[own.number][reads[own.number] != PAD]
            for a, b in own.lines:
                window = tokens[a:b].astype(np.int32)
                labels = np.where(mask[a:b] != 0, window, IGNORE).astype(np.int32)
                columns = [[window], [labels], [read.astype(np.int32)], [own.instance], [own.repo], [own.split]]
                writer.write_batch(pa.record_batch([pa.array(column, type=kind) for column, kind in zip(columns, schema.types, strict=True)], schema=schema))


def input_files(options: PrepareTrajectoriesStageOptions, base_dir: Path) -> list[Path]:
    """Every local file that is read."""
    named = [*options.filters.leaked, *([options.template] if options.template else [])]
    local = [base_dir / Path(path).expanduser() for path in named]
    hub = [] if options.hub is None else HubSource(HubSourceOptions(**options.hub.model_dump()), Path(base_dir)).files()
    return [*hub, *local_files(options.path, Path(base_dir)), *(path for path in local if path.is_file())]
