"""The folder of signals: found again, or named as missing, damaged or somebody else's; the same bytes after any kill."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from limbeck.errors import TeacherError
from limbeck.teachers.documents import Ask, TopKRows
from limbeck.teachers.store.manifest import Identity
from limbeck.teachers.store.store import SignalStore
from signal_cases import answers, document, identity

SHARD = 3000
"""Bytes: small, so that a few documents fill several files."""


def cases(number: int = 30) -> list[tuple[Ask, TopKRows]]:
    rng = np.random.default_rng(0)
    asks = [document(rng, length, share=share) for length, share in zip(rng.integers(0, 40, number), rng.random(number), strict=True)]
    return [(ask, answers(rng, len(ask.positions), identity().layout)) for ask in asks]


CASES = cases()


def fill(folder: Path, held: Identity | None = None) -> None:
    """What a capture does."""
    store = SignalStore(folder, held or identity(), shard_bytes=SHARD)
    for ask, rows in CASES:
        if not store.has(ask):
            store.put(ask, rows)
    store.complete()
    store.close()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store") / "signals"
    fill(folder)
    assert len(list(folder.glob("00/*.shard"))) >= 3
    return folder


def same(a: TopKRows | None, b: TopKRows | None) -> bool:
    assert a is not None and b is not None
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("ids_mK", "logits_mK", "log_z_mZ"))


def test_what_is_put_in_is_what_comes_out_then_and_later(tmp_path: Path) -> None:
    store = SignalStore(tmp_path / "s", identity(), shard_bytes=SHARD)
    given = [store.put(ask, rows) for ask, rows in CASES]
    assert all(same(store.get(ask), rows) for (ask, _), rows in zip(CASES, given, strict=True))
    store.complete()
    assert all(same(store.get(ask), rows) for (ask, _), rows in zip(CASES, given, strict=True))
    store.close()
    again = SignalStore(tmp_path / "s")
    assert all(same(again.get(ask), rows) for (ask, _), rows in zip(CASES, given, strict=True))
    assert again.num_documents == len({ask.key + ask.positions.tobytes() for ask, _ in CASES})
    assert again.verify() == []
    np.testing.assert_array_equal([d.ids[0] for d in again.documents() if len(d.ids)], [a.ids[0] for a, _ in CASES if len(a.ids)])


def test_positions_that_are_not_stored_are_a_miss_and_some_of_them_a_hit(filled: Path) -> None:
    store = SignalStore(filled)
    ask, _ = next((ask, rows) for ask, rows in CASES if 3 < len(ask.positions) < len(ask.ids) - 1)
    rows = store.get(ask)
    assert rows is not None
    some = Ask(ask.ids, ask.positions[1::2])
    assert same(store.get(some), TopKRows(rows.ids_mK[1::2], rows.logits_mK[1::2], rows.log_z_mZ[1::2]))
    assert store.get(some, same_question=True) is None
    other = sorted(set(range(len(ask.ids))) - set(ask.positions.tolist()))[0]
    assert store.get(Ask(ask.ids, np.array([other], np.int32))) is None
    assert store.get(Ask(ask.ids, np.append(ask.positions, 10**6).astype(np.int32))) is None
    assert store.get(Ask(ask.ids[:-1], ask.positions[:1])) is None
    assert not store.has(some)


def test_another_identity_is_refused_with_every_differing_field(filled: Path) -> None:
    other = identity(teacher={"model.safetensors": "cd34", "dtype": "float32"}, k=16, temperatures=(1.0,))
    with pytest.raises(TeacherError) as caught:
        SignalStore(filled, other)
    for words in ('teacher.model.safetensors: "ab12" -> "cd34"', "k: 8 -> 16", "temperatures: [1.0, 2.0] -> [1.0]", "set this one aside"):
        assert words in str(caught.value)
    assert "dtype" not in str(caught.value)


def test_a_second_writer_is_refused_and_readers_are_not(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    store = SignalStore(folder, identity(), shard_bytes=SHARD)
    reader = SignalStore(folder)
    with pytest.raises(TeacherError, match="being written by another process"):
        SignalStore(folder, identity())
    for number, (ask, rows) in enumerate(CASES):
        given = store.put(ask, rows)
        if number % 7 == 0:
            reader.refresh()
            assert same(reader.get(ask), given)
            assert same(SignalStore(folder).get(ask), given)
    assert reader.num_documents <= store.num_documents
    store.close()
    SignalStore(folder, identity()).close()


def test_writers_of_their_own_folders_fill_one_store(tmp_path: Path) -> None:
    stores = [SignalStore(tmp_path / "s", identity(), writer=rank, shard_bytes=SHARD) for rank in range(2)]
    for number, (ask, rows) in enumerate(CASES):
        stores[number % 2].put(ask, rows)
    for store in stores:
        store.finish()
    stores[0].complete()
    for store in stores:
        store.close()
    whole = SignalStore(tmp_path / "s")
    assert all(whole.has(ask) for ask, _ in CASES) and whole.verify() == []


def test_any_flipped_byte_is_found_and_named(filled: Path, tmp_path: Path) -> None:
    files = [path for path in sorted(filled.rglob("*")) if path.is_file() and path.stat().st_size]
    rng = random.Random(0)
    sizes = [path.stat().st_size for path in files]
    for trial in range(200):
        # Every file, and of each its first and last bytes too.
        path = files[trial % len(files)] if trial < 20 else rng.choices(files, sizes)[0]
        at = rng.choice([0, path.stat().st_size - 1]) if trial % 20 == 0 else rng.randrange(path.stat().st_size)
        copy = tmp_path / "copy"
        shutil.copytree(filled, copy)
        data = bytearray((copy / path.relative_to(filled)).read_bytes())
        data[at] ^= 1 << rng.randrange(8)
        (copy / path.relative_to(filled)).write_bytes(data)
        try:
            found = SignalStore(copy).verify()
        except TeacherError as error:
            found = [str(error)]
        assert len(found) == 1 and path.name in found[0], (path, at, found)
        if path.suffix == ".shard" and 40 <= at < path.stat().st_size - 400:
            assert "block" in found[0] or "index" in found[0], (at, found)
        shutil.rmtree(copy)


def test_a_damaged_block_is_not_read_and_names_its_document(filled: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(filled, copy)
    path = copy / "00/00000.shard"
    data = bytearray(path.read_bytes())
    data[100] ^= 4
    path.write_bytes(data)
    store = SignalStore(copy)
    messages = []
    for ask, _ in CASES:
        try:
            store.get(ask)
        except TeacherError as error:
            messages.append((ask.key.hex(), str(error)))
    assert len(messages) == 1
    key, message = messages[0]
    assert f"document {key}" in message and "00/00000.shard" in message and "byte 32" in message
    assert key in store.verify()[0] and "block 0" in store.verify()[0]


@pytest.mark.parametrize("what", ["missing", "short"])
def test_a_file_that_is_missing_or_short_is_named_at_once(filled: Path, tmp_path: Path, what: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(filled, copy)
    path = copy / "00/00001.shard"
    if what == "missing":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(TeacherError, match=r"00001\.shard: (is missing|has \d+ bytes instead of)"):
        SignalStore(copy)


def test_an_empty_folder_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"no signals here.*capture"):
        SignalStore(tmp_path)


def test_a_capture_of_nothing_is_a_store(tmp_path: Path) -> None:
    store = SignalStore(tmp_path / "s", identity())
    store.complete()
    assert store.verify() == [] and store.num_documents == 0
    assert store.get(CASES[3][0]) is None


class Killed:
    """Kills the process at the ``n``-th thing it does to the disk, in the middle of it where it has one."""

    def __init__(self, at: int, rng: random.Random):
        self.at, self.rng, self.done = at, rng, 0
        self.write, self.replace, self.rename, self.fsync, self.truncate = os.write, os.replace, os.rename, os.fsync, os.ftruncate

    def _now(self) -> bool:
        self.done += 1
        return self.done - 1 == self.at

    def __enter__(self) -> Killed:
        def write(descriptor: int, data: Any) -> int:
            if self._now():
                self.write(descriptor, bytes(data)[: self.rng.randrange(len(data) + 1)])
                os.kill(os.getpid(), signal.SIGKILL)
            return self.write(descriptor, data)

        def or_before(function: Any) -> Any:
            def call(*arguments: Any) -> Any:
                now = self._now()
                if now and self.rng.random() < 0.5:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = function(*arguments)
                if now:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return call

        os.write = write
        os.replace, os.rename, os.fsync, os.ftruncate = map(or_before, (self.replace, self.rename, self.fsync, self.truncate))
        return self

    def __exit__(self, *exc: object) -> None:
        os.write, os.replace, os.rename, os.fsync, os.ftruncate = self.write, self.replace, self.rename, self.fsync, self.truncate


def die_at(at: int, folder: Path, seed: int) -> int:
    """Fill the store in a process that is killed at a point; returns the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            with Killed(at, random.Random(seed)):
                fill(folder)
        finally:
            os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with Killed(-1, random.Random()) as counter:
        fill(tmp_path_factory.mktemp("count") / "signals")
    yield counter.done


def test_a_capture_killed_anywhere_leaves_the_same_bytes_when_it_goes_on(filled: Path, points: int, tmp_path: Path) -> None:
    whole = contents(filled)
    rng = random.Random(1)
    killed = 0
    for trial in range(60):
        folder = tmp_path / f"{trial}" / "signals"
        # Killed once, twice and three times on its way.
        for _ in range(1 + trial % 3):
            killed += die_at(rng.randrange(points), folder, rng.randrange(1000)) == signal.SIGKILL
        fill(folder)
        found = contents(folder)
        assert found == whole, (trial, sorted(set(found) ^ set(whole)))
    assert killed > 60


def test_damage_inside_an_unfinished_file_is_found_and_scored_again(filled: Path, points: int, tmp_path: Path) -> None:
    for at in range(points // 2, points):
        folder = tmp_path / f"{at}" / "signals"
        die_at(at, folder, 0)
        path = next(folder.glob("00/*.open"), folder)
        if path.is_file() and path.stat().st_size > 1000:
            break
    data = bytearray(path.read_bytes())
    data[60] ^= 1
    path.write_bytes(data)
    assert any(path.name in line for line in SignalStore(folder).verify())
    fill(folder)
    assert contents(folder) == contents(filled)
