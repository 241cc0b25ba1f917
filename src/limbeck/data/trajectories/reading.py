"""Files, folders, globs and the hub -> raw records, one broken line or file at a time left out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from limbeck.config.parts.sources import HubSourceOptions, TextSourceOptions
from limbeck.config.parts.trajectories import TrajectoryHubOptions
from limbeck.data.reading import BROKEN, Tally, open_text, parquet_rows
from limbeck.data.sources import HubSource, TextSource
from limbeck.data.trajectories.trajectory import Unusable
from limbeck.errors import DataError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".traj", ".parquet")
"""Files that are read; all but parquet also with ``.gz`` behind."""

PARQUET_ROWS = 16
"""Rows of a parquet file in memory at one time: a trajectory may have a megabyte."""

Row = tuple[str, Any]
"""Where it stood (``runs.jsonl:3``), and the record, or the :class:`Unusable` that stands for it."""


def raw_rows(paths: Sequence[str], hub: TrajectoryHubOptions | None, base_dir: Path, encoding: str = "utf-8") -> Iterator[Row]:
    """Records of files in the order of the paths, then those of the hub, as they are read.

    A line that is no JSON, or a ``.json`` or ``.traj`` file that is none, is one :class:`Unusable`; a file that breaks off gives one
    after the records before the break.

    Raises:
        DataError: a path that is not there (with the nearest names), a file of another kind, or a hub dataset that cannot be read.
    """
    for path, name in _named_files(paths, base_dir):
        yield from _file_rows(path, name, encoding)
    if hub is not None:
        yield from _hub_rows(hub, base_dir)


def local_files(paths: Sequence[str], base_dir: Path) -> list[Path]:
    """The files behind paths, folders and globs, each once: in the order of the paths, sorted within a folder or glob.

    Raises:
        DataError: a path that is not there, or a folder without such files.
    """
    return [path for path, _ in _named_files(paths, base_dir)]


def _named_files(paths: Sequence[str], base_dir: Path) -> list[tuple[Path, str]]:
    source = TextSource(TextSourceOptions(path=tuple(paths), suffixes=SUFFIXES, documents="row"), base_dir)
    try:
        return [(path, source.name_of(path)) for path in source.files()]
    except DataError as error:
        # The field of a text source is called so; here it is the stage's own.
        raise DataError(str(error).removeprefix("source.").replace("set `suffixes`, or name", "name")) from error


def _file_rows(path: Path, name: str, encoding: str) -> Iterator[Row]:
    kind = path.name.lower().removesuffix(".gz").rsplit(".", 1)[-1]
    if f".{kind}" not in SUFFIXES or path.name.lower().endswith(".parquet.gz"):
        raise DataError(
            f"{name}: trajectories are read from {', '.join(SUFFIXES)} files (all but .parquet also with .gz): "
            "convert it, or name the files one by one"
        )
    if kind == "parquet":
        tally = Tally()
        yield from parquet_rows(path, name, [], tally, together=PARQUET_ROWS)
        if tally.counts:
            yield name, Unusable("damaged file", f"{name}: no parquet file, or one that breaks off")
        return
    try:
        with open_text(path, encoding) as file:
            if kind in ("jsonl", "ndjson"):
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield f"{name}:{number}", _parsed(line, f"{name}:{number}")
            else:
                yield from _text_rows(file.read(), name)
    except BROKEN as error:
        yield name, Unusable("damaged file", f"{name}: {error}")


def _text_rows(text: str, name: str) -> Iterator[Row]:
    """A record, a list of records, or lines of them: JSON lines are often called ``.json``."""
    value = _parsed(text, name)
    if isinstance(value, list):
        yield from ((f"{name}[{i}]", record) for i, record in enumerate(value))
        return
    first = text.strip().partition("\n")[0]
    if isinstance(value, Unusable) and isinstance(_parsed(first, name), dict):
        # Not splitlines, which would also cut at a U+2028 inside of a text.
        lines = [(f"{name}:{number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        yield from ((place, _parsed(line, place)) for place, line in lines)
        return
    yield name, value


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        return Unusable("nested too deep", f"{place}: lists and objects inside each other by the hundred")
    except ValueError as error:
        return Unusable("truncated JSON", f"{place}: {error}")


def _hub_rows(options: TrajectoryHubOptions, base_dir: Path) -> Iterator[Row]:
    source = HubSource(HubSourceOptions(**options.model_dump()), base_dir)
    try:
        for i, row in enumerate(source.rows()):
            yield f"{options.path}/{options.split}[{i}]", row
    except Exception as error:
        # As HubSource does: datasets, fsspec and huggingface_hub raise some twenty unrelated types.
        known = error if isinstance(error, DataError) else source.unreadable(error)
        raise DataError(str(known).replace("source.", "hub.", 1)) from error
