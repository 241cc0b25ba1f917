"""Text -> one folder of packed tokens: filter, split, tokenise, mix, shuffle, pack.

A document's side is decided by a hash of its text, so it is the same whatever else is read and in whatever order.  The folder is
named by the content of everything it is made from; it appears whole or not at all, and preparing again is free.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.config.parts.sources import SOURCES
from limbeck.config.parts.stages import DataOptions, TrainTokenizer
from limbeck.data.mixture import Entry, draw, pack, targets
from limbeck.data.recall import HELD_OUT, TRAIN, check_ids
from limbeck.data.sources import Document, MadeUpSource, Source, Tally
from limbeck.data.store import FORMAT, SPLITS, DataInfo, SourceInfo, SplitInfo, being_written, read_info, write_info
from limbeck.data.tokenizer import encode, end_id, ordinary_ids, prefix_ids, tokenizer_digest, train_tokenizer
from limbeck.errors import DataError
from limbeck.models.loading import copy_tokenizer, load_tokenizer

Say = Callable[[str], None]

CHUNK_DOCUMENTS, CHUNK_CHARACTERS = 1024, 2_000_000
"""Documents tokenised at a time."""
CHARACTERS_A_TOKEN = 8
"""Text read to train a tokenizer, for each token of ``max_tokens``."""
HASHED_WHOLE = 64 * 2**20
"""Larger input files count by their size, date, beginning and end."""
SHORTEST_ROW = 16
"""Recall documents do not fit into less."""


def prepare(
    options: DataOptions, folder: Path, *, tokenizer: str | None, base_dir: Path, progress: Say | None = None
) -> DataInfo:
    """Prepare ``options`` into ``folder``; one that is there already, whole and of the same content, is left as it is.

    ``tokenizer`` is a folder or hub name, None when one is to be trained on the training documents.  Relative paths start at
    ``base_dir``; ``progress`` takes lines of text.

    Raises:
        DataError: a source that is missing, empty or unreadable, shares that do not add up, or nothing held out.
    """
    say = progress or (lambda line: None)
    folder, base_dir = Path(folder), Path(base_dir).resolve()
    key = content_key(options, tokenizer=tokenizer, base_dir=base_dir)
    if (finished := _finished(folder, key)) is not None:
        return finished
    with being_written(folder) as out:
        info = _Preparation(options, out, tokenizer, base_dir, say).run(key)
    for line in info.words():
        say(f"  {line}")
    return info


def content_key(options: DataOptions, *, tokenizer: str | None, base_dir: Path) -> str:
    """16 hexadecimal digits that change when an option, an input file or the tokenizer does."""
    sources = _build_sources(options, Path(base_dir).resolve())
    record = {
        "format": FORMAT,
        "options": options.model_dump(mode="json", by_alias=True, exclude={"tokenizer"}),
        "tokenizer": options.model_dump(mode="json")["tokenizer"] if tokenizer is None else tokenizer_digest(tokenizer),
        "files": [[[source.name_of(path), _file_digest(path)] for path in source.files()] for source in sources],
    }
    return hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=8).hexdigest()


def input_files(options: DataOptions, base_dir: Path) -> list[Path]:
    """Every local file that the sources read."""
    return [path for source in _build_sources(options, Path(base_dir).resolve()) for path in source.files()]


def _build_sources(options: DataOptions, base_dir: Path) -> list[Source]:
    return [SOURCES.build(source, base_dir) for source in options.source]


def _finished(folder: Path, key: str) -> DataInfo | None:
    if not (folder / "meta.json").exists():
        return None
    try:
        info = read_info(folder)
    except DataError:
        # Damaged or of another version: made again, in its place.
        return None
    return info if info.key == key else None


def _file_digest(path: Path) -> str:
    try:
        stat = path.stat()
        return _digest_once(path, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


@lru_cache(maxsize=100_000)
def _digest_once(path: Path, size: int, modified_ns: int) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        if size <= HASHED_WHOLE:
            digest.update(file.read())
        else:
            digest.update(f"{size} {modified_ns}".encode() + file.read(2**20))
            file.seek(-(2**20), 2)
            digest.update(file.read())
    return digest.hexdigest()


def text_hash(text: str) -> int:
    """64 bits of blake2b."""
    return _hash(text.encode())


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def side_of(hashed: int, held_out: float) -> str:
    """``held_out`` for that share of all hashes, else ``train``."""
    return "held_out" if hashed < held_out * 2**64 else "train"


def kept_documents(source: Source, seen: set[int]) -> Iterator[tuple[Document, int]]:
    """The documents that pass the source's filters, with their hashes; what is left out goes into ``source.tally``."""
    filters, tally = source.options.filters, source.tally
    pattern = re.compile(filters.pattern) if filters.pattern is not None else None

    def passing() -> Iterator[tuple[Document, int]]:
        for document in source.documents():
            reason = None
            try:
                hashed = text_hash(document.text)
            except UnicodeEncodeError:
                tally.drop("undecodable", document.name)
                continue
            if not document.text.strip():
                reason = "empty"
            elif len(document.text) < filters.min_characters:
                reason = "too short"
            elif filters.max_characters is not None and len(document.text) > filters.max_characters:
                reason = "too long"
            elif pattern is not None and not pattern.search(document.text):
                reason = "without the pattern"
            elif filters.deduplicate and hashed in seen:
                reason = "duplicate"
            if reason is None:
                seen.add(hashed)
                yield document, hashed
            else:
                tally.drop(reason, document.name)

    return islice(passing(), source.options.limit)


class _Store:
    """Documents of one source and side as they are tokenised, before they are mixed."""

    def __init__(self, folder: Path, dtype: np.dtype, made_up: bool):
        folder.mkdir(parents=True)
        self.made_up = made_up
        self.num_tokens = 0
        self.hashes = array("Q")
        self._dtype = dtype
        self._ends = array("q", [0])
        self._path = folder / "tokens.bin"
        self._file = open(self._path, "wb")
        self._mask = open(folder / "mask.bin", "wb") if made_up else None
        self.names_path = folder / "names.jsonl"
        self._names = open(self.names_path, "w", encoding="utf-8")

    def add(self, ids: Any, hashed: int, name: str, counted: np.ndarray | None = None) -> None:
        """Append one document."""
        self._file.write(np.asarray(ids, dtype=self._dtype).tobytes())
        if self._mask is not None and counted is not None:
            self._mask.write(counted.astype(np.uint8).tobytes())
        self.num_tokens += len(ids)
        self._ends.append(self.num_tokens)
        self.hashes.append(hashed)
        self._names.write(json.dumps(name) + "\n")

    def close(self) -> None:
        """No more documents: tokens and masks can be read."""
        for file in (self._file, self._mask, self._names):
            if file is not None:
                file.close()
        self.ends = np.frombuffer(self._ends, dtype=np.int64)
        self.lengths = np.diff(self.ends)
        self.tokens = _mapped(self._path, self._dtype)
        self.mask = _mapped(self._path.with_name("mask.bin"), np.dtype(np.uint8)) if self._mask is not None else None


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)


@dataclass
class _Frame:
    """What is put around every document."""

    prefix: list[int]
    suffix: list[int]

    def __call__(self, ids: Any) -> np.ndarray:
        return np.concatenate([self.prefix, ids, self.suffix]).astype(np.int64)

    @property
    def length(self) -> int:
        return len(self.prefix) + len(self.suffix)


class _Preparation:
    """One run of :func:`prepare` into an empty folder."""

    def __init__(self, options: DataOptions, out: Path, tokenizer: str | None, base_dir: Path, say: Say):
        self.options, self.out, self.say = options, out, say
        self.sources = _build_sources(options, base_dir)
        self.shares = [source.options.share for source in self.sources]
        self.splits = SPLITS if options.held_out else SPLITS[:1]
        self.tokenizer_source = tokenizer
        self.scratch = out / "scratch"

    def run(self, key: str) -> DataInfo:
        """All steps; returns what ``meta.json`` says."""
        folder = self.out / "tokenizer"
        if self.tokenizer_source is None:
            self._train_tokenizer(folder)
        else:
            folder.mkdir()
            copy_tokenizer(self.tokenizer_source, folder)
        self.tokenizer = load_tokenizer(str(folder))
        named = self.tokenizer_source or "trained on the documents"
        eos = end_id(self.tokenizer, named) if self.options.append_eos else None
        self.frame = _Frame(prefix_ids(self.tokenizer), [] if eos is None else [eos])
        self.vocabulary = max(self.tokenizer.get_vocab().values()) + 1
        self.dtype = np.dtype(np.uint16 if self.vocabulary <= 2**16 else np.uint32)
        self.stores = {
            split: [_Store(self.scratch / split / str(i), self.dtype, isinstance(s, MadeUpSource)) for i, s in enumerate(self.sources)]
            for split in self.splits
        }
        self._tokenise()
        wanted = {split: self._targets(split) for split in self.splits}
        self._make_up(wanted)
        for stores in self.stores.values():
            for store in stores:
                store.close()
        sizes, used = {}, {}
        for split in self.splits:
            sizes[split], used[split] = self._mix(split, wanted[split])
        pad = self.tokenizer.pad_token_id
        info = DataInfo(
            key=key,
            sequence=self.options.sequence,
            dtype=self.dtype.name,
            vocabulary=self.vocabulary,
            eos=eos,
            pad=int(pad if pad is not None else eos or 0),
            tokenizer=tokenizer_digest(str(folder)),
            splits=sizes,
            sources=[self._source_info(i, used) for i in range(len(self.sources))],
        )
        self._drop_scratch()
        return write_info(self.out, info)

    def _text_sources(self) -> list[int]:
        return [i for i, source in enumerate(self.sources) if not isinstance(source, MadeUpSource)]

    def _budget(self, i: int) -> int | None:
        """Training tokens beyond which source ``i`` need not be read."""
        if self.options.max_tokens is None:
            return None
        share = self.shares[i]
        rest = max(0.0, 1 - sum(s for s in self.shares if s is not None))
        return int(np.ceil(self.options.max_tokens * (rest if share is None else share)))

    def _train_tokenizer(self, folder: Path) -> None:
        options = self.options.tokenizer
        assert isinstance(options, TrainTokenizer)

        def texts() -> Iterator[str]:
            seen: set[int] = set()
            for i in self._text_sources():
                budget, read = self._budget(i), 0
                for document, hashed in kept_documents(self.sources[i], seen):
                    if side_of(hashed, self.options.held_out) == "train":
                        read += len(document.text)
                        yield document.text
                    if budget is not None and read > budget * CHARACTERS_A_TOKEN:
                        break
                self.sources[i].tally = Tally()

        if not self._text_sources():
            raise DataError("tokenizer: there is no text to train it on, only made-up documents: name a tokenizer or add a text source")
        self.say(f"training a tokenizer of {options.vocabulary} tokens")
        train_tokenizer(texts(), options, folder)

    def _tokenise(self) -> None:
        """Read, filter, split and tokenise every text source."""
        seen: set[int] = set()
        for i in self._text_sources():
            source, budget = self.sources[i], self._budget(i)
            sides = {split: self.stores[split][i] for split in self.splits}
            told = time.monotonic()
            for chunk in _chunks(kept_documents(source, seen)):
                for (document, hashed), ids in zip(chunk, encode(self.tokenizer, [d.text for d, _ in chunk]), strict=True):
                    if ids:
                        sides[side_of(hashed, self.options.held_out)].add(self.frame(ids), hashed, document.name)
                    else:
                        source.tally.drop("without tokens", document.name)
                if time.monotonic() - told > 10:
                    told = time.monotonic()
                    self.say(f"  {source.title}: {sides['train'].num_tokens / 1e6:.1f}M tokens")
                if budget is not None and sides["train"].num_tokens >= budget:
                    break
            self._check_sides(source, {split: len(store.hashes) for split, store in sides.items()})

    def _check_sides(self, source: Source, documents: dict[str, int]) -> None:
        left_out = f"; left out: {source.tally.words()}" if source.tally.counts else ""
        if not sum(documents.values()):
            raise DataError(f"{source.title}: no documents{left_out}")
        if not documents["train"]:
            raise DataError(f"{source.title}: all {documents['held_out']} documents are held out: lower `held_out`{left_out}")

    def _targets(self, split: str) -> list[int]:
        stores, options = self.stores[split], self.options
        available = [None if store.made_up else store.num_tokens for store in stores]
        text = self._text_sources()
        if split == "held_out":
            if text and not any(available[i] for i in text):
                documents = sum(len(self.stores["train"][i].hashes) for i in text)
                raise DataError(
                    f"held_out: a share of {options.held_out:g} holds out none of the {documents} documents: raise it, cut the text into more "
                    "documents (`documents: paragraph`), or set `held_out: 0` for no validation"
                )
            endless = any(share is None and isinstance(s, MadeUpSource) for s, share in zip(self.sources, self.shares, strict=True))
            if (endless or not text) and options.max_tokens is not None:
                return targets(available, self.shares, int(np.ceil(options.max_tokens * options.held_out / (1 - options.held_out))))
            return targets(available, self.shares, None)
        return targets(available, self.shares, options.max_tokens)

    def _make_up(self, wanted: dict[str, list[int]]) -> None:
        made_up = [i for i, source in enumerate(self.sources) if isinstance(source, MadeUpSource)]
        if not made_up:
            return
        if self.options.sequence < SHORTEST_ROW + self.frame.length:
            raise DataError(f"sequence: {self.options.sequence} is too short for recall documents; allowed: {SHORTEST_ROW + self.frame.length} or more")
        ids = ordinary_ids(self.tokenizer)
        check_ids(ids)
        seen: set[int] = set()
        for split, stream in zip(self.splits, (TRAIN, HELD_OUT), strict=False):
            for i in self._text_sources():
                self.stores[split][i].close()
            hay = next((self.stores[split][i].tokens for i in self._text_sources()), None)
            for i in made_up:
                self._fill(i, split, stream, wanted[split][i], ids, hay, seen)

    def _fill(self, i: int, split: str, stream: int, target: int, ids: np.ndarray, hay: np.ndarray | None, seen: set[int]) -> None:
        """Made-up documents until there are ``target`` tokens; no two alike, on whatever side."""
        source: Any = self.sources[i]
        store, index, misses = self.stores[split][i], 0, 0
        longest = self.options.sequence - self.frame.length
        while store.num_tokens < target:
            document = source.document(index, stream=stream, ids=ids, longest=longest, seed=(self.options.seed, i), text=hay)
            index += 1
            hashed = _hash(document.ids.tobytes())
            if hashed in seen:
                misses += 1
                if misses > 1000 + index // 2:
                    raise DataError(f"{source.title}: cannot make enough different documents: raise `vocabulary` or lower `share`")
                continue
            seen.add(hashed)
            before, after = len(self.frame.prefix), len(self.frame.suffix)
            counted = np.pad(document.counted, (before, after))
            store.add(self.frame(document.ids), hashed, f"{source.title}/{split}/{index - 1}", counted)

    def _mix(self, split: str, wanted: list[int]) -> tuple[SplitInfo, list[int]]:
        """Draw from every store, shuffle, pack and write one side; also the tokens used of each source."""
        stores = self.stores[split]
        drawn = []
        for i, (store, target) in enumerate(zip(stores, wanted, strict=True)):
            rng = np.random.default_rng((self.options.seed, 1, i, SPLITS.index(split)))
            if store.made_up:
                documents, lengths = np.arange(len(store.lengths)), store.lengths
            elif split == "held_out":
                documents, lengths = draw(store.lengths, min(target, store.num_tokens), rng)
            else:
                documents, lengths = draw(store.lengths, target, rng)
            drawn.append(np.stack([np.full(len(documents), i), documents, lengths], axis=1))
        entries_N3 = np.concatenate(drawn)
        if not len(entries_N3):
            raise DataError(f"{split}: nothing to train on: `max_tokens` is too small for this mixture")
        entries_N3 = entries_N3[np.random.default_rng((self.options.seed, 2, SPLITS.index(split))).permutation(len(entries_N3))]
        side = self.out / split
        side.mkdir()
        masked = any(store.made_up and len(store.lengths) for store in stores)
        used = [0] * len(stores)
        starts = array("q", [0])
        with open(side / "tokens.bin", "wb") as tokens, open(side / "mask.bin", "wb") as mask:
            entries = (Entry(s, d, n, stores[s].made_up) for s, d, n in entries_N3.tolist())
            for entry, start, stop in pack(entries, self.options.sequence):
                store = stores[entry.store]
                at = slice(store.ends[entry.document] + start, store.ends[entry.document] + stop)
                tokens.write(store.tokens[at].tobytes())
                if masked:
                    mask.write(b"\1" * (stop - start) if store.mask is None else store.mask[at].tobytes())
                used[entry.store] += stop - start
                starts.append(starts[-1] + stop - start)
        if not masked:
            (side / "mask.bin").unlink()
        np.save(side / "pieces.npy", np.frombuffer(starts, dtype=np.int64))
        np.save(side / "hashes.npy", np.concatenate([np.frombuffer(store.hashes, dtype=np.uint64) for store in stores]))
        with open(side / "names.jsonl", "wb") as names:
            for store in stores:
                names.write(store.names_path.read_bytes())
        documents = len(np.unique(entries_N3[:, :2], axis=0))
        return SplitInfo(starts[-1], documents, -(-starts[-1] // self.options.sequence)), used

    def _source_info(self, i: int, used: dict[str, list[int]]) -> SourceInfo:
        source, stores = self.sources[i], {split: self.stores[split][i] for split in self.splits}
        return SourceInfo(
            title=source.title,
            share=self.shares[i],
            achieved=used["train"][i] / sum(used["train"]),
            documents={split: len(store.hashes) for split, store in stores.items()},
            tokens={split: used[split][i] for split in self.splits},
            passes=used["train"][i] / max(1, stores["train"].num_tokens),
            dropped=dict(sorted(source.tally.counts.items())),
            dropped_names=dict(sorted(source.tally.names.items())),
        )

    def _drop_scratch(self) -> None:
        import shutil

        self.stores.clear()
        shutil.rmtree(self.scratch)


def _chunks(documents: Iterator[tuple[Document, int]]) -> Iterator[list[tuple[Document, int]]]:
    chunk: list[tuple[Document, int]] = []
    characters = 0
    for document in documents:
        chunk.append(document)
        characters += len(document[0].text)
        if len(chunk) == CHUNK_DOCUMENTS or characters > CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk
