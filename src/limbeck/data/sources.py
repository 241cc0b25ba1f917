"""Where text comes from.

Every source yields ``Document(name, text)`` lazily, in an order that depends on nothing but its input.
"""

from __future__ import annotations

import glob
import os
import re
import sysconfig
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from limbeck.config.parts.sources import HubSourceOptions, SourceOptions, StdlibSourceOptions, TextSourceOptions
from limbeck.data.reading import Document, FieldReader, Tally, read_files, read_rows
from limbeck.errors import DataError, did_you_mean


class Source:
    """A source of text.  ``documents`` may be called again and starts over; what it leaves out goes into ``tally``."""

    def __init__(self, options: SourceOptions, base_dir: Path):
        self.options = options
        self.base_dir = Path(base_dir)
        self.tally = Tally()

    @property
    def title(self) -> str:
        """How messages and the report call this source."""
        return self.options.kind

    def files(self) -> list[Path]:
        """The local files it reads, in order; a change in any of them changes what is prepared."""
        return []

    def name_of(self, path: Path) -> str:
        """A file's name in messages: relative to the recipe's folder where it lies below it."""
        return path.relative_to(self.base_dir).as_posix() if path.is_relative_to(self.base_dir) else path.as_posix()

    def documents(self) -> Iterator[Document]:
        """All documents, unfiltered."""
        raise DataError(f"source '{self.options.kind}' yields no text: its class must define documents()")

    def _named_files(self) -> list[tuple[Path, str]]:
        return [(path, self.name_of(path)) for path in self.files()]


class MadeUpSource(Source):
    """A source that writes token ids itself, as many documents as are asked for.

    It defines ``document(index, *, stream, ids, longest, seed, text)``, a pure function that gives a
    :class:`~limbeck.data.recall.MadeUp`.
    """


class StdlibSource(Source):
    """The ``*.py`` files of the running Python's standard library."""

    options: StdlibSourceOptions

    @cached_property
    def root(self) -> Path:
        """The standard library's folder."""
        return Path(sysconfig.get_paths()["stdlib"])

    def name_of(self, path: Path) -> str:
        """Relative to the library, so that every machine of one Python version names it alike."""
        return path.relative_to(self.root).as_posix()

    def files(self) -> list[Path]:
        """All modules but those in the excluded folders."""
        found: list[Path] = []
        for folder, subfolders, names in os.walk(self.root):
            # Not entered: installed packages may lie there by the ten thousand.
            subfolders[:] = [name for name in subfolders if name not in self.options.exclude]
            found += [Path(folder) / name for name in names if name.endswith(".py")]
        if not found:
            raise DataError(f"source 'stdlib': no *.py files under {self.root}: this Python comes without its library's source: name a source of kind text")
        return sorted(found, key=self.name_of)

    def documents(self) -> Iterator[Document]:
        """One document a module."""
        return read_files(self._named_files(), self.tally, title=self.title, encoding="utf-8")


class TextSource(Source):
    """Files, folders and globs."""

    options: TextSourceOptions

    @property
    def _paths(self) -> tuple[str, ...]:
        return (self.options.path,) if isinstance(self.options.path, str) else self.options.path

    @property
    def title(self) -> str:
        """The paths of the recipe."""
        return f"text {', '.join(self._paths)}"

    def files(self) -> list[Path]:
        """Files in the order of the paths, sorted within a folder or glob; each once."""
        return list(dict.fromkeys(path for pattern in self._paths for path in self._matches(pattern)))

    def _matches(self, pattern: str) -> list[Path]:
        path = self.base_dir / Path(pattern).expanduser()
        if path.is_file():
            return [path]
        if path.is_dir():
            return self._inside(path, pattern)
        if re.search(r"[*?\[]", pattern):
            found = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
            if not found:
                raise DataError(f"source.path: {pattern}: no file matches (looked from {self.base_dir})")
            return found
        near = did_you_mean(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
        place = f"in {path.parent}" if path.parent.is_dir() else f"({path.parent} is not there either)"
        raise DataError(f"source.path: {pattern}: no such file or folder {place}{near}")

    def _inside(self, folder: Path, pattern: str) -> list[Path]:
        suffixes = tuple(suffix.lower() for suffix in self.options.suffixes)
        inside = _visible_files(folder)
        wanted = [p for p in inside if p.name.lower().removesuffix(".gz").endswith(suffixes)]
        if not wanted:
            seen = ", ".join(sorted({p.suffix or p.name for p in inside})[:8]) or "nothing"
            raise DataError(
                f"source.path: {pattern}: no file with a suffix among {', '.join(suffixes)} in this folder (it holds {seen}); "
                "set `suffixes`, or name the files"
            )
        return wanted

    def documents(self) -> Iterator[Document]:
        """Files, lines, paragraphs or rows."""
        options, files = self.options, self._named_files()
        if options.documents == "row":
            return read_rows(files, self.tally, title=self.title, encoding=options.encoding, column=options.field)
        return read_files(files, self.tally, title=self.title, encoding=options.encoding, documents=options.documents)


class HubSource(Source):
    """A dataset of the Hugging Face hub, or a local folder that ``datasets`` can load."""

    options: HubSourceOptions

    @property
    def title(self) -> str:
        """The dataset's name."""
        return f"hub {self.options.path}"

    @property
    def _folder(self) -> Path | None:
        path = self.base_dir / Path(self.options.path).expanduser()
        return path if path.is_dir() else None

    def files(self) -> list[Path]:
        """The files of a local folder; none for a name on the hub, whose content is pinned by ``revision``."""
        return [] if self._folder is None else _visible_files(self._folder)

    def documents(self) -> Iterator[Document]:
        """One document a row."""
        options, reader = self.options, FieldReader(self.title, self.options.field, self.tally)
        try:
            for i, row in enumerate(self.rows()):
                document = reader.document(row, f"{options.path}/{options.split}[{i}]")
                if document is not None:
                    yield document
        except DataError:
            raise
        except Exception as error:
            # datasets, fsspec and huggingface_hub raise some twenty unrelated types for a bad name and for no network, and a
            # stream opens its files while it is read.
            raise self.unreadable(error) from error
        reader.check()

    def rows(self) -> Any:
        """Rows as they are read."""
        try:
            import datasets
        except ImportError as error:
            raise DataError("source kind 'hub' needs the packages of limbeck[data]: pip install 'limbeck[data]'") from error
        options, folder = self.options, self._folder
        if folder is not None and ((folder / "state.json").exists() or (folder / "dataset_dict.json").exists()):
            saved = datasets.load_from_disk(str(folder))
            if isinstance(saved, datasets.DatasetDict):
                if options.split not in saved:
                    known = ", ".join(saved)
                    raise DataError(f"source.split: {options.path} has no split {options.split!r}; splits: {known}")
                saved = saved[options.split]
            return saved
        return datasets.load_dataset(
            str(folder or options.path),
            options.name,
            split=options.split,
            revision=options.revision,
            streaming=options.streaming,
        )

    def unreadable(self, error: Exception) -> DataError:
        """What to say of an error that ``datasets`` raised."""
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:300]
        way = (
            "check name, split and field"
            if self._folder
            else "it is no folder here, so it was looked for on the hub: check path, name, split and revision; without a "
            "network, download it first and name its folder"
        )
        return DataError(f"source.path: {self.options.path}: cannot be read ({type(error).__name__}: {first}); {way}")


def _visible_files(folder: Path) -> list[Path]:
    """All files below a folder but hidden ones, sorted."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))
