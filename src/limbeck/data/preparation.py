"""The steps from text to packed tokens: filter, split, tokenise, make up, mix, shuffle, pack.

A document's side is decided by a hash of its text, so it is the same whatever else is read and in whatever order.
"""

from __future__ import annotations

import math
import shutil
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.config.parts.sources import SOURCES
from limbeck.config.parts.stages import DataOptions, TrainTokenizer
from limbeck.data.documents import chunks, content_hash, kept_documents, side_of
from limbeck.data.mixture import Entry, draw, pack, targets
from limbeck.data.reading import Tally
from limbeck.data.recall import HELD_OUT, TRAIN, check_ids
from limbeck.data.scratch import Scratch
from limbeck.data.sources import MadeUpSource, Source
from limbeck.data.store import SPLITS, DataInfo, SourceInfo, SplitInfo, write_info
from limbeck.data.tokenizer import encode, end_id, ordinary_ids, prefix_ids, tokenizer_digest, train_tokenizer
from limbeck.errors import DataError
from limbeck.models.loading import copy_tokenizer, load_tokenizer

CHARACTERS_A_TOKEN = 8
"""Text that is read to train a tokenizer, for each token of ``max_tokens``."""
SHORTEST_MADE_UP = 16
"""Recall documents do not fit into less."""
SECONDS_BETWEEN_LINES = 10


def build_sources(options: DataOptions, base_dir: Path) -> list[Source]:
    """The sources of a mixture."""
    return [SOURCES.build(source, base_dir) for source in options.source]


class Preparation:
    """One run into an empty folder."""

    def __init__(self, options: DataOptions, out: Path, tokenizer: str | None, base_dir: Path, say: Callable[[str], None]):
        self.options, self.out, self.say = options, out, say
        self.sources = build_sources(options, base_dir)
        self.shares = [source.options.share for source in self.sources]
        self.domains = list(dict.fromkeys(source.options.domain for source in self.sources))
        self.made_up = [i for i, source in enumerate(self.sources) if isinstance(source, MadeUpSource)]
        self.text = [i for i in range(len(self.sources)) if i not in self.made_up]
        self.splits = SPLITS if options.held_out else SPLITS[:1]
        self.scratch = out / "scratch"

        folder = out / "tokenizer"
        if tokenizer is None:
            self._train_tokenizer(folder)
        else:
            folder.mkdir()
            copy_tokenizer(tokenizer, folder)
        self.tokenizer = load_tokenizer(str(folder))
        self.eos = end_id(self.tokenizer, tokenizer or "of the recipe") if options.append_eos else None
        self.prefix = prefix_ids(self.tokenizer)
        self.suffix = [] if self.eos is None else [self.eos]
        self.vocabulary = max(self.tokenizer.get_vocab().values()) + 1
        self.dtype = np.dtype(np.uint16 if self.vocabulary <= 2**16 else np.uint32)
        self.sides = {split: [self._side(split, i) for i in range(len(self.sources))] for split in self.splits}

    def _side(self, split: str, i: int) -> Scratch:
        return Scratch(self.scratch / split / str(i), self.dtype, made_up=i in self.made_up)

    def run(self, key: str) -> DataInfo:
        """All steps; returns what ``meta.json`` says."""
        self._tokenise()
        wanted = {split: self._targets(split) for split in self.splits}
        self._make_up(wanted)
        sizes, used = {}, {}
        for split in self.splits:
            sizes[split], used[split] = self._mix(split, wanted[split])
        pad = self.tokenizer.pad_token_id
        info = DataInfo(
            key=key,
            sequence=self.options.sequence,
            dtype=self.dtype.name,
            vocabulary=self.vocabulary,
            eos=self.eos,
            pad=int(pad if pad is not None else self.eos or 0),
            tokenizer=tokenizer_digest(str(self.out / "tokenizer")),
            splits=sizes,
            domains=self.domains,
            sources=[self._source_info(i, used) for i in range(len(self.sources))],
        )
        self.sides.clear()
        shutil.rmtree(self.scratch)
        return write_info(self.out, info)

    def _budget(self, i: int) -> int | None:
        """Training tokens beyond which source ``i`` need not be read."""
        if self.options.max_tokens is None:
            return None
        share = self.shares[i]
        rest = max(0.0, 1 - sum(s for s in self.shares if s is not None))
        return math.ceil(self.options.max_tokens * (rest if share is None else share))

    def _train_tokenizer(self, folder: Path) -> None:
        options = self.options.tokenizer
        assert isinstance(options, TrainTokenizer)
        if not self.text:
            raise DataError("tokenizer: there is only made-up text to train it on: name a tokenizer, or add a source of text")

        def texts() -> Iterator[str]:
            seen: set[int] = set()
            for i in self.text:
                budget, read = self._budget(i), 0
                for document, hashed in kept_documents(self.sources[i], seen):
                    if side_of(hashed, self.options.held_out) == "train":
                        read += len(document.text)
                        yield document.text
                    if budget is not None and read > budget * CHARACTERS_A_TOKEN:
                        break
                # Read once more for the tokens: what is left out is counted there.
                self.sources[i].tally = Tally()

        self.say(f"  training a tokenizer of {options.vocabulary} tokens")
        train_tokenizer(texts(), options, folder)

    def _tokenise(self) -> None:
        """Read, filter, split and tokenise every source of text."""
        seen: set[int] = set()
        for i in self.text:
            source, budget, told = self.sources[i], self._budget(i), time.monotonic()
            sides = {split: self.sides[split][i] for split in self.splits}
            for chunk in chunks(kept_documents(source, seen)):
                encoded = encode(self.tokenizer, [document.text for document, _ in chunk])
                for (document, hashed), ids in zip(chunk, encoded, strict=True):
                    if ids:
                        side = sides[side_of(hashed, self.options.held_out)]
                        side.add([*self.prefix, *ids, *self.suffix], hashed, document.name)
                    else:
                        source.tally.drop("without tokens", document.name)
                if time.monotonic() - told > SECONDS_BETWEEN_LINES:
                    told = time.monotonic()
                    self.say(f"  {source.title}: {sides['train'].num_tokens / 1e6:.1f}M tokens")
                if budget is not None and sides["train"].num_tokens >= budget:
                    break
            for side in sides.values():
                side.close()
            self._check_sides(source, {split: len(side.hashes) for split, side in sides.items()})

    def _check_sides(self, source: Source, documents: dict[str, int]) -> None:
        left_out = f"; left out: {source.tally.words()}" if source.tally.counts else ""
        if not sum(documents.values()):
            raise DataError(f"{source.title}: no documents{left_out}: give it text, or loosen what leaves documents out")
        if not documents["train"]:
            raise DataError(f"{source.title}: all {documents['held_out']} documents are held out: lower `held_out`{left_out}")

    def _targets(self, split: str) -> list[int]:
        """Tokens to take from each source on one side."""
        options = self.options
        available = [None if side.made_up else side.num_tokens for side in self.sides[split]]
        if split == "train":
            return targets(available, self.shares, options.max_tokens)
        # Sources that are taken whole set the size; where there is none, those with a share do.
        sized_by = [i for i in self.text if self.shares[i] is None] or self.text
        if sized_by and not any(available[i] for i in sized_by):
            documents = sum(len(self.sides["train"][i].hashes) for i in sized_by)
            raise DataError(
                f"held_out: a share of {options.held_out:g} holds out none of the {documents} documents: raise it, cut the text "
                "into more documents (`documents: paragraph`), or set `held_out: 0` for no validation"
            )
        limit = None
        if options.max_tokens is not None and any(self.shares[i] is None or not self.text for i in self.made_up):
            limit = math.ceil(options.max_tokens * options.held_out / (1 - options.held_out))
        # Validation text is never repeated.
        wanted = targets(available, self.shares, limit)
        return [n if count is None else min(n, count) for n, count in zip(wanted, available, strict=True)]

    def _make_up(self, wanted: dict[str, list[int]]) -> None:
        """Write the made-up documents of every side, as many as the mixture asks for."""
        if not self.made_up:
            return
        longest = self.options.sequence - len(self.prefix) - len(self.suffix)
        if longest < SHORTEST_MADE_UP:
            allowed = self.options.sequence + SHORTEST_MADE_UP - longest
            raise DataError(f"sequence: {self.options.sequence} is too short for recall documents; allowed: {allowed} or more")
        ids = ordinary_ids(self.tokenizer)
        check_ids(ids)
        seen: set[int] = set()
        for split, stream in zip(self.splits, (TRAIN, HELD_OUT), strict=False):
            text = self.sides[split][self.text[0]].tokens if self.text else None
            for i in self.made_up:
                given = {"stream": stream, "ids": ids, "longest": longest, "seed": (self.options.seed, i), "text": text}
                self._fill(i, split, wanted[split][i], given, seen)
                self.sides[split][i].close()

    def _fill(self, i: int, split: str, target: int, given: dict[str, Any], seen: set[int]) -> None:
        """Made-up documents until there are ``target`` tokens; no two alike, on whatever side."""
        source: Any = self.sources[i]
        side, index, misses = self.sides[split][i], 0, 0
        while side.num_tokens < target:
            document = source.document(index, **given)
            hashed = content_hash(document.ids.tobytes())
            if hashed in seen:
                misses += 1
                if misses > 1000 + index // 2:
                    way = "raise `vocabulary` or `min_length`, or lower `share`"
                    raise DataError(f"{source.title}: cannot make enough different documents: {way}")
            else:
                seen.add(hashed)
                ids = np.concatenate([self.prefix, document.ids, self.suffix]).astype(np.int64)
                counted = np.pad(document.counted, (len(self.prefix), len(self.suffix)))
                side.add(ids, hashed, f"{source.title}/{split}/{index}", counted)
            index += 1

    def _mix(self, split: str, wanted: list[int]) -> tuple[SplitInfo, list[int]]:
        """Draw from every source, shuffle, pack and write one side; also returns the tokens used of each source."""
        sides, at = self.sides[split], SPLITS.index(split)
        drawn = []
        for i, (side, target) in enumerate(zip(sides, wanted, strict=True)):
            documents, lengths = np.arange(len(side.lengths)), side.lengths
            if not side.made_up:
                documents, lengths = draw(lengths, target, np.random.default_rng((self.options.seed, 1, at, i)))
            drawn.append(np.stack([np.full(len(documents), i), documents, lengths], axis=1))
        entries_N3 = np.concatenate(drawn)
        if not len(entries_N3):
            raise DataError(f"max_tokens: {self.options.max_tokens} tokens are too few for this mixture ({split} has none): raise it")
        entries_N3 = np.random.default_rng((self.options.seed, 2, at)).permutation(entries_N3)
        used, starts = self._write(split, (Entry(s, d, n, sides[s].made_up) for s, d, n in entries_N3.tolist()))
        documents_used = len(np.unique(entries_N3[:, :2], axis=0))
        return SplitInfo(starts[-1], documents_used, -(-starts[-1] // self.options.sequence)), used

    def _write(self, split: str, entries: Iterator[Entry]) -> tuple[list[int], array]:
        sides, folder = self.sides[split], self.out / split
        folder.mkdir()
        masked = any(side.made_up and side.num_tokens for side in sides)
        used, starts, domains = [0] * len(sides), array("q", [0]), bytearray()
        with open(folder / "tokens.bin", "wb") as tokens, open(folder / "mask.bin", "wb") as mask:
            for entry, start, stop in pack(entries, self.options.sequence):
                side = sides[entry.source]
                at = slice(int(side.ends[entry.document]) + start, int(side.ends[entry.document]) + stop)
                tokens.write(side.tokens[at].tobytes())
                if masked:
                    mask.write(b"\1" * (stop - start) if side.mask is None else side.mask[at].tobytes())
                used[entry.source] += stop - start
                starts.append(starts[-1] + stop - start)
                domains.append(self.domains.index(self.sources[entry.source].options.domain))
        if not masked:
            (folder / "mask.bin").unlink()
        np.save(folder / "pieces.npy", np.frombuffer(starts, dtype=np.int64))
        if len(self.domains) > 1:
            np.save(folder / "domains.npy", np.frombuffer(domains, dtype=np.uint8))
        np.save(folder / "hashes.npy", np.concatenate([np.frombuffer(side.hashes, dtype=np.uint64) for side in sides]))
        with open(folder / "names.jsonl", "wb") as names:
            for side in sides:
                with open(side.names_path, "rb") as part:
                    shutil.copyfileobj(part, names)
        return used, starts

    def _source_info(self, i: int, used: dict[str, list[int]]) -> SourceInfo:
        source = self.sources[i]
        return SourceInfo(
            title=source.title,
            share=self.shares[i],
            achieved=used["train"][i] / sum(used["train"]),
            documents={split: len(self.sides[split][i].hashes) for split in self.splits},
            tokens={split: used[split][i] for split in self.splits},
            passes=used["train"][i] / max(1, self.sides["train"][i].num_tokens),
            dropped=dict(sorted(source.tally.counts.items())),
            dropped_names=dict(sorted(source.tally.names.items())),
        )
