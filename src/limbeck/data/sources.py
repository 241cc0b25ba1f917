"""Where text comes from.  Every source yields ``Document(name, text)`` lazily, in an order that depends on nothing but its input."""

from __future__ import annotations

import gzip
import io
import json
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from limbeck.config.parts.sources import HubSourceOptions, SourceOptions, StdlibSourceOptions, TextSourceOptions
from limbeck.errors import DataError, did_you_mean

MAX_UNDECODABLE = 0.05
"""Share of a source's files that may fail to decode before it is taken for a wrong encoding."""
NAMES_KEPT = 5


class Document(NamedTuple):
    """A text and where it stood."""

    name: str
    text: str


@dataclass
class Tally:
    """What was left out, by reason, with the names of the first few."""

    counts: Counter[str] = field(default_factory=Counter)
    names: dict[str, list[str]] = field(default_factory=dict)

    def drop(self, reason: str, name: str) -> None:
        """Count one document, row or file."""
        self.counts[reason] += 1
        kept = self.names.setdefault(reason, [])
        if len(kept) < NAMES_KEPT:
            kept.append(name)

    def words(self) -> str:
        """``3 duplicate (a.txt, b.txt, …), 1 empty (c.txt)``."""
        parts = []
        for reason, count in sorted(self.counts.items()):
            names = ", ".join(self.names[reason]) + (", …" if count > len(self.names[reason]) else "")
            parts.append(f"{count} {reason} ({names})")
        return ", ".join(parts)


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


class MadeUpSource(Source):
    """A source that writes token ids itself, and as many documents as are asked for: defines ``document(index, …)``."""


class StdlibSource(Source):
    """The ``*.py`` files of the running Python's standard library."""

    options: StdlibSourceOptions

    @property
    def root(self) -> Path:
        """The standard library's folder."""
        return Path(sysconfig.get_paths()["stdlib"])

    def name_of(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def files(self) -> list[Path]:
        excluded = set(self.options.exclude)
        found = [p for p in self.root.rglob("*.py") if not excluded & set(p.relative_to(self.root).parts[:-1])]
        if not found:
            raise DataError(f"source 'stdlib': no *.py files under {self.root}: this Python comes without its library's source")
        return sorted(found, key=self.name_of)

    def documents(self) -> Iterator[Document]:
        yield from _read_files(self, self.files(), "utf-8")


class TextSource(Source):
    """Files, folders and globs."""

    options: TextSourceOptions

    @property
    def _paths(self) -> tuple[str, ...]:
        return (self.options.path,) if isinstance(self.options.path, str) else self.options.path

    @property
    def title(self) -> str:
        return f"text {', '.join(self._paths)}"

    def files(self) -> list[Path]:
        found: dict[Path, None] = {}
        for pattern in self._paths:
            found.update(dict.fromkeys(self._matches(pattern)))
        return list(found)

    def _matches(self, pattern: str) -> list[Path]:
        path = self.base_dir / Path(pattern).expanduser()
        if path.is_file():
            return [path]
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path)))
            wanted = [p for p in inside if p.name.lower().removesuffix(".gz").endswith(self.options.suffixes)]
            if not wanted:
                seen = ", ".join(sorted({p.suffix or p.name for p in inside})[:8]) or "nothing"
                raise DataError(
                    f"source.path: {pattern}: no file with a suffix among {', '.join(self.options.suffixes)} in this folder "
                    f"(it holds {seen}); set `suffixes`"
                )
            return wanted
        if re.search(r"[*?\[]", pattern):
            anchor = Path(path.anchor)
            wanted = sorted(p for p in anchor.glob(str(path.relative_to(anchor))) if p.is_file())
            if not wanted:
                raise DataError(f"source.path: {pattern}: no file matches (looked from {self.base_dir})")
            return wanted
        near = did_you_mean(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
        place = f"in {path.parent}" if path.parent.is_dir() else f"({path.parent} is not there either)"
        raise DataError(f"source.path: {pattern}: no such file or folder {place}{near}")

    def documents(self) -> Iterator[Document]:
        if self.options.documents == "row":
            yield from _read_rows(self, self.files())
        else:
            yield from _read_files(self, self.files(), self.options.encoding, self.options.documents)


class HubSource(Source):
    """A dataset of the Hugging Face hub, or a local folder that ``datasets`` can load."""

    options: HubSourceOptions

    @property
    def title(self) -> str:
        return f"hub {self.options.path}"

    @property
    def _folder(self) -> Path | None:
        path = self.base_dir / Path(self.options.path).expanduser()
        return path if path.is_dir() else None

    def files(self) -> list[Path]:
        if self._folder is None:
            return []
        return sorted(p for p in self._folder.rglob("*") if p.is_file() and not _hidden(p.relative_to(self._folder)))

    def documents(self) -> Iterator[Document]:
        pick = _Field(self, self.options.field)
        try:
            for i, row in enumerate(self._open()):
                text = pick(row, f"{self.options.path}[{self.options.split}]:{i}")
                if text is not None:
                    yield Document(f"{self.options.path}[{self.options.split}]:{i}", text)
        except (OSError, ValueError, RuntimeError) as error:
            if isinstance(error, DataError):
                raise
            # A stream opens its files while it is read: a lost network shows here.
            raise self._unreadable(error) from error
        pick.check()

    def _open(self) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise DataError("source kind 'hub' needs the packages of limbeck[data]: pip install 'limbeck[data]'") from error
        options, folder = self.options, self._folder
        try:
            if folder is not None and ((folder / "state.json").exists() or (folder / "dataset_dict.json").exists()):
                saved = datasets.load_from_disk(str(folder))
                if isinstance(saved, datasets.DatasetDict):
                    if options.split not in saved:
                        raise DataError(f"source.split: {options.path} has no split {options.split!r}; splits: {', '.join(saved)}")
                    saved = saved[options.split]
                return saved
            return datasets.load_dataset(
                str(folder or options.path),
                options.name,
                split=options.split,
                revision=options.revision,
                streaming=options.streaming,
            )
        except DataError:
            raise
        except Exception as error:
            # datasets, fsspec and huggingface_hub raise some twenty unrelated types for a bad name and for no network.
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> DataError:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:300]
        way = "" if self._folder else (
            ". It is no folder here, so it was looked for on the hub: check path, name, split and revision; without a network, download "
            "it first and name its folder"
        )
        return DataError(f"source.path: {self.options.path}: cannot be read ({type(error).__name__}: {first}){way}")


class _Field:
    """Takes the text out of a row: ``a+b`` joins two columns with a line break."""

    def __init__(self, source: Source, names: str):
        self.source = source
        self.names = names.split("+")
        self.found = 0
        self.columns: list[str] = []

    def __call__(self, row: Any, name: str) -> str | None:
        if isinstance(row, str):
            self.found += 1
            return row
        if not isinstance(row, dict):
            self.source.tally.drop("not a row", name)
            return None
        values = [row.get(column) for column in self.names]
        if any(value is None for value in values):
            self.columns = self.columns or [str(column) for column in row]
            self.source.tally.drop("without the field", name)
            return None
        self.found += 1
        if not all(isinstance(value, str) for value in values):
            self.source.tally.drop("not text", name)
            return None
        return "\n".join(values)

    def check(self) -> None:
        """Not one row with the field is a wrong name, not bad data."""
        if self.columns and not self.found:
            wanted = "+".join(self.names)
            hint = did_you_mean(self.names[0], self.columns) or ";"
            raise DataError(f"source.field: no row of {self.source.title} has {wanted!r}{hint} columns: {', '.join(self.columns)}")


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _open_text(path: Path, encoding: str) -> io.TextIOBase:
    """Undecodable bytes become lone surrogates, so that a line or file is judged by itself; line ends stay as they are."""
    try:
        "".encode(encoding)
    except LookupError as error:
        raise DataError(f"source.encoding: unknown encoding {encoding!r}; for example utf-8, latin-1, utf-16") from error
    if encoding.lower().replace("_", "-") in ("utf-8", "utf8"):
        encoding = "utf-8-sig"
    try:
        raw: Any = gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    return io.TextIOWrapper(raw, encoding=encoding, errors="surrogateescape", newline="")


def _valid(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_files(source: Source, files: list[Path], encoding: str, documents: str = "file") -> Iterator[Document]:
    bad: list[str] = []
    for path in files:
        name = source.name_of(path)
        if path.suffix == ".parquet":
            raise DataError(f"{name}: a parquet file holds rows: set `documents: row`, or leave .parquet out of `suffixes`")
        whole = True
        try:
            with _open_text(path, encoding) as file:
                for document in _cut(file, name, documents):
                    if _valid(document.text):
                        yield document
                    else:
                        whole = False
                        source.tally.drop("undecodable", document.name)
        except (EOFError, UnicodeError, gzip.BadGzipFile) as error:
            whole = False
            source.tally.drop("undecodable", f"{name} ({type(error).__name__})")
        if not whole:
            bad.append(name)
    if len(bad) > max(1, MAX_UNDECODABLE * len(files)) or (bad and len(bad) == len(files)):
        raise DataError(
            f"{source.title}: {len(bad)} of {len(files)} files do not decode as {encoding} ({', '.join(bad[:NAMES_KEPT])}): set `encoding`, "
            "or leave them out with `suffixes`"
        )


def _cut(file: io.TextIOBase, name: str, documents: str) -> Iterator[Document]:
    if documents == "file":
        yield Document(name, file.read())
    elif documents == "line":
        for number, line in enumerate(file, 1):
            yield Document(f"{name}:{number}", line.rstrip("\r\n"))
    else:
        lines: list[str] = []
        start = 1
        for number, line in enumerate(file, 1):
            if line.strip():
                start = start if lines else number
                lines.append(line)
            elif lines:
                yield Document(f"{name}:{start}", "".join(lines).rstrip("\r\n"))
                lines = []
        if lines:
            yield Document(f"{name}:{start}", "".join(lines).rstrip("\r\n"))


def _read_rows(source: TextSource, files: list[Path]) -> Iterator[Document]:
    pick = _Field(source, source.options.field)
    for path in files:
        name = source.name_of(path)
        kind = path.name.lower().removesuffix(".gz").rsplit(".", 1)[-1]
        if kind == "parquet":
            rows = _parquet_rows(source, path, name)
        elif kind in ("json", "jsonl", "ndjson"):
            rows = _json_rows(source, path, name, lines=kind != "json")
        else:
            raise DataError(f"{name}: `documents: row` reads .json, .jsonl and .parquet (also .gz); leave others out with `suffixes`")
        for row_name, row in rows:
            text = pick(row, row_name)
            if text is not None:
                yield Document(row_name, text)
    pick.check()


def _json_rows(source: TextSource, path: Path, name: str, *, lines: bool) -> Iterator[tuple[str, Any]]:
    try:
        with _open_text(path, source.options.encoding) as file:
            if not lines:
                text = file.read()
                try:
                    value = json.loads(text)
                except ValueError:
                    # JSON lines are often called .json.
                    file = io.StringIO(text)
                else:
                    for i, row in enumerate(value if isinstance(value, list) else [value]):
                        yield f"{name}[{i}]", row
                    return
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError:
                    source.tally.drop("corrupt", f"{name}:{number}")
                    continue
                yield f"{name}:{number}", row
    except (EOFError, UnicodeError, gzip.BadGzipFile) as error:
        source.tally.drop("undecodable", f"{name} ({type(error).__name__})")


def _parquet_rows(source: TextSource, path: Path, name: str) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{name}: parquet needs the packages of limbeck[data]: pip install 'limbeck[data]'") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            known = file.schema_arrow.names
            columns = [column for column in source.options.field.split("+") if column in known]
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=columns or None):
                for row in batch.to_pylist():
                    yield f"{name}[{number}]", row
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        source.tally.drop("corrupt", f"{name} ({type(error).__name__})")
