"""Sources -> conditions: read, slice, decide sides, write in every format, tokenise, store.

The folder appears whole or not at all, and the same inputs give the same bytes.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from limbeck.config.parts.conditions import PrepareConditionsStageOptions
from limbeck.data.conditions.choice import Task, mixed_pairs, split_of
from limbeck.data.conditions.examples import SEPARATOR, Example, Examples, joined
from limbeck.data.conditions.formats import FORMATS
from limbeck.data.conditions.slicing import slice_examples
from limbeck.data.conditions.store import Condition, ConditionSet, Manifest, write_manifest
from limbeck.data.conditions.texts import SIDES
from limbeck.data.documents import CHUNK_DOCUMENTS, content_hash, side_of
from limbeck.data.store import being_written
from limbeck.data.tokenizer import encode, end_id, prefix_ids, tokenizer_digest
from limbeck.errors import DataError
from limbeck.models.loading import copy_tokenizer, load_tokenizer


class _Slice(NamedTuple):
    """A slice with its examples by side."""

    source: str
    name: str
    sides: dict[str, list[Example]]


def build_conditions(
    options: PrepareConditionsStageOptions,
    folder: Path,
    *,
    tokenizer: str,
    base_dir: Path,
    progress: Callable[[str], None] | None = None,
) -> ConditionSet:
    """Write ``folder`` anew and open it.  ``tokenizer`` is a folder or hub name; relative paths start at ``base_dir``.

    Raises:
        DataError: a source that is missing, empty or unreadable, slices that are all too small, what cannot be held out or mixed as
            asked, or conditions that read the same.
    """
    with being_written(Path(folder)) as out:
        _Build(options, out, tokenizer, Path(base_dir).resolve(), progress or (lambda line: None)).run()
        ConditionSet(out).check_diverse()
    return ConditionSet(folder)


def input_files(options: PrepareConditionsStageOptions, base_dir: Path) -> list[Path]:
    """Every local file that the sources read."""
    return [path for source in options.sources for path in Examples(source, Path(base_dir).resolve()).files()]


class _Build:
    """One run into an empty folder."""

    def __init__(self, options: PrepareConditionsStageOptions, out: Path, tokenizer: str, base_dir: Path, say: Callable[[str], None]):
        self.options, self.out, self.base_dir, self._say = options, out, base_dir, say
        self.notes: list[str] = []
        (out / "tokenizer").mkdir()
        copy_tokenizer(tokenizer, out / "tokenizer")
        self.tokenizer = load_tokenizer(str(out / "tokenizer"))
        self.eos = end_id(self.tokenizer, tokenizer) if options.append_eos else None
        self.vocabulary = max(self.tokenizer.get_vocab().values()) + 1
        self.dtype = np.dtype(np.uint16 if self.vocabulary <= 2**16 else np.uint32)

    def note(self, line: str) -> None:
        """Say what was left out, and keep it."""
        self.notes.append(line)
        self._say(f"  {line}")

    def run(self) -> None:
        """All steps."""
        slices = self._chosen([part for source in self._read() for part in source])
        tasks = [Task(part.source, part.name, written) for part in slices for written in self.options.formats]
        splits = split_of(tasks, self.options.held_out, self.options.seed)
        pairs = mixed_pairs(tasks, splits, self.options.mixes, self.options.mixes_in_one_format, self.options.seed)
        lines, hashes = self._write(slices)
        conditions = []
        for i, (task, split) in enumerate(zip(tasks, splits, strict=True)):
            conditions.append(self._condition(i, task.name, *task, split, (), lines[i], hashes[i]))
        for a, b in pairs:
            mixed = [_mix(lines[a][at], lines[b][at], limit // 2) for at, limit in enumerate(self._limits)]
            lines.append([part for part, _ in mixed])
            hashes.append([np.concatenate([hashes[a][at], hashes[b][at]])[order] for at, (_, order) in enumerate(mixed)])
            formats = "+".join(dict.fromkeys((tasks[a].format, tasks[b].format)))
            words = ("mix", f"{tasks[a].name}+{tasks[b].name}", formats)
            conditions.append(self._condition(len(conditions), "/".join(words[:2]), *words, "mix", (a, b), lines[-1], hashes[-1]))
        self._finish(conditions, lines, hashes)

    @property
    def _limits(self) -> tuple[int, int]:
        """Examples of a condition, by side."""
        return self.options.examples, max(2, self.options.test_examples)

    def _read(self) -> Iterator[list[_Slice]]:
        """The slices of every source, each with all its examples on their sides, in the order of their hashes."""
        share = self.options.test_examples / (self.options.examples + self.options.test_examples)
        seen: set[int] = set()
        for options in self.options.sources:
            reader = Examples(options, self.base_dir)
            examples = reader.read(seen)
            if reader.tally.counts:
                self.note(f"{options.name}: left out {reader.tally.words()}")
            groups = slice_examples(examples, options.slices, self.options.seed)
            if len(groups) < options.slices.count:
                self.note(f"{options.name}: {options.slices.count} slices by {options.slices.by} asked, {len(groups)} found")
            if outside := len(examples) - sum(map(len, groups.values())):
                self.note(f"{options.name}: {outside} of {len(examples)} examples are in none of the {len(groups)} largest slices")
            parts = []
            for name, group in groups.items():
                ordered = sorted((examples[i] for i in group), key=lambda example: example.hash)
                sides: dict[str, list[Example]] = {side: [] for side in SIDES}
                for example in ordered:
                    sides["train" if side_of(example.hash, share) == "train" else "test"].append(example)
                parts.append(_Slice(options.name, name, sides))
            yield parts

    def _chosen(self, slices: list[_Slice]) -> list[_Slice]:
        """At most so many examples of each side, no two of which are the same text in any formats.

        Test examples come first: a training example that would show the text of one, perhaps in other letters, is left out.
        """
        taken: set[int] = set()
        dropped: Counter[str] = Counter()
        kept: list[dict[str, list[Example]]] = [{} for _ in slices]
        for side, limit in (("test", self.options.test_examples), ("train", self.options.examples)):
            for part, own in zip(slices, kept, strict=True):
                own[side] = []
                for example in part.sides[side]:
                    if len(own[side]) == limit:
                        break
                    reason = self._claim(example, taken)
                    if reason is None:
                        own[side].append(example)
                    else:
                        dropped[f"{part.source}: {reason}"] += 1
        for reason, count in sorted(dropped.items()):
            self.note(f"{reason}: {count} left out")
        return self._large_enough([part._replace(sides=own) for part, own in zip(slices, kept, strict=True)])

    def _claim(self, example: Example, taken: set[int]) -> str | None:
        """Why an example cannot be used; None takes its texts in all formats."""
        written = [self._written(example, name) for name in self.options.formats]
        if any(not answer.strip() or (example.prompt and not prompt.strip()) for prompt, answer in written):
            return "examples that are empty in one of the formats"
        hashes = {content_hash(joined(*parts).encode()) for parts in written}
        if taken & hashes:
            return "examples that are the text of another in one of the formats"
        taken |= hashes
        return None

    def _written(self, example: Example, name: str) -> tuple[str, str]:
        write = FORMATS[name].write
        return write(example.prompt), write(example.answer)

    def _large_enough(self, slices: list[_Slice]) -> list[_Slice]:
        small, wanted = [], self.options.min_examples
        for part in slices:
            train, test = len(part.sides["train"]), len(part.sides["test"])
            if train < wanted or not test:
                small.append(f"slice {part.source}/{part.name} dropped: {train} training and {test} test examples, at least {wanted} and 1 are needed")
        if len(small) == len(slices):
            raise DataError(f"min_examples: no slice has enough examples: {'; '.join(small)}: lower it, cut the text shorter (`cut`), or give more text")
        for line in small:
            self.note(line)
        return [part for part in slices if len(part.sides["train"]) >= wanted and part.sides["test"]]

    def _write(self, slices: list[_Slice]) -> tuple[list[list[np.ndarray]], list[list[np.ndarray]]]:
        """Tokenise every example in every format into ``tokens.bin``.

        Returns ``start, prompt_end, end`` (int64 ``[E, 3]``) and the two hashes (uint64 ``[E, 2]``) by condition and side.
        """
        lines: list[list[np.ndarray]] = []
        hashes: list[list[np.ndarray]] = []
        position = 0
        with open(self.out / "tokens.bin", "wb") as file:
            for part in slices:
                for name in self.options.formats:
                    lines.append([])
                    hashes.append([])
                    for side in SIDES:
                        written = [self._written(example, name) for example in part.sides[side]]
                        tokens, bounds = self._tokenise(written, f"{part.source}/{part.name}/{name}")
                        file.write(tokens.tobytes())
                        lines[-1].append(bounds + position)
                        pairs = zip(part.sides[side], written, strict=True)
                        both = [(example.hash, content_hash(joined(*parts).encode())) for example, parts in pairs]
                        hashes[-1].append(np.array(both, dtype=np.uint64))
                        position += len(tokens)
        return lines, hashes

    def _tokenise(self, written: list[tuple[str, str]], name: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of examples one after the other, and where each begins, its prompt ends and it ends, int64 ``[E, 3]``."""
        texts = [text for prompt, answer in written for text in (prompt + SEPARATOR if prompt else "", answer)]
        encoded: list[list[int]] = []
        for start in range(0, len(texts), CHUNK_DOCUMENTS):
            encoded += encode(self.tokenizer, texts[start : start + CHUNK_DOCUMENTS])
        prefix, suffix = prefix_ids(self.tokenizer), [] if self.eos is None else [self.eos]
        stream, bounds = array("q"), array("q")
        for prompt, answer in zip(encoded[::2], encoded[1::2], strict=True):
            if not answer:
                raise DataError(f"{name}: the tokenizer gives no token for one of its answers or texts: choose another tokenizer or format")
            # What a tokenizer puts before a text is part of the prompt, where there is one.
            bounds.append(len(stream))
            stream.extend([*prefix, *prompt])
            bounds.append(len(stream) if prompt else bounds[-1])
            stream.extend([*answer, *suffix])
            bounds.append(len(stream))
        return np.frombuffer(stream, dtype=np.int64).astype(self.dtype), np.frombuffer(bounds, dtype=np.int64).reshape(-1, 3)

    def _condition(
        self, i: int, name: str, source: str, part: str, written: str, split: str, parts: tuple[int, ...], lines: list[np.ndarray], hashes: list[np.ndarray]
    ) -> Condition:
        digest = hashlib.blake2b(b"|".join(side[:, 1].tobytes() for side in hashes), digest_size=8).hexdigest()
        examples = {side: len(found) for side, found in zip(SIDES, lines, strict=True)}
        tokens = {side: int((found[:, 2] - found[:, 0]).sum()) for side, found in zip(SIDES, lines, strict=True)}
        return Condition(i, name, source, part, written, split, parts, examples, tokens, digest)

    def _finish(self, conditions: list[Condition], lines: list[list[np.ndarray]], hashes: list[list[np.ndarray]]) -> None:
        """The table of examples and ``conditions.json``."""
        table = [np.pad(found, ((0, 0), (0, 2)), constant_values=(0, 0)) for sides in lines for found in sides]
        for number, found in enumerate(table):
            found[:, 3], found[:, 4] = divmod(number, len(SIDES))
        np.save(self.out / "examples.npy", np.concatenate(table))
        np.save(self.out / "hashes.npy", np.concatenate([found for sides in hashes for found in sides]))
        pad = self.tokenizer.pad_token_id
        options = self.options
        manifest = Manifest(
            sequence=options.sequence,
            loss=options.loss,
            form=options.condition.form,
            texts=options.condition.texts,
            tokens=options.condition.tokens,
            seed=options.seed,
            dtype=self.dtype.name,
            vocabulary=self.vocabulary,
            eos=self.eos,
            pad=int(pad if pad is not None else self.eos or 0),
            tokenizer=tokenizer_digest(str(self.out / "tokenizer")),
            conditions=tuple(conditions),
            notes=self.notes,
        )
        write_manifest(self.out, manifest)
        counts = Counter(condition.split for condition in conditions)
        words = ", ".join(f"{count} {split.replace('_', ' ')}" for split, count in counts.items())
        examples = sum(sum(condition.examples.values()) for condition in conditions)
        tokens = sum(sum(condition.tokens.values()) for condition in conditions)
        self._say(f"  {len(conditions)} conditions ({words}): {examples:,} examples, {tokens:,} tokens")


def _mix(a: np.ndarray, b: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Equally many lines of two conditions by turns, at most ``limit`` of each; and their places in ``a`` followed by ``b``."""
    each = min(len(a), len(b), limit)
    order = (np.arange(each)[:, None] + np.array([0, len(a)])).reshape(-1)
    return np.concatenate([a, b])[order], order
