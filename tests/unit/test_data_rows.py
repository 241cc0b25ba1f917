"""Rows of packed documents, and the order in which steps and ranks get them."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from limbeck.data.dataset import TokenRows, check_disjoint
from limbeck.data.loader import Loader
from limbeck.data.store import DataInfo, SplitInfo, write_info
from limbeck.errors import DataError
from limbeck.types import IGNORE

FIELDS = ("input_ids_BT", "labels_BT", "position_ids_BT", "documents_BT")


def write(
    folder: Path, documents: list[list[int]], sequence: int, masks: list[list[int]] | None = None, held_out: int = 0
) -> Path:
    """A folder of prepared text, by hand: the same documents on both sides, or the last ``held_out`` of them."""
    splits = {}
    for split, part in (("train", documents[: len(documents) - held_out]), ("held_out", documents[-held_out:])):
        side = folder / split
        side.mkdir(parents=True)
        tokens = np.concatenate(part).astype(np.uint16)
        tokens.tofile(side / "tokens.bin")
        if masks is not None:
            np.concatenate(masks).astype(np.uint8).tofile(side / "mask.bin")
        np.save(side / "pieces.npy", np.cumsum([0, *map(len, part)]))
        np.save(side / "hashes.npy", np.array([hash(tuple(document)) % 2**64 for document in part], dtype=np.uint64))
        (side / "names.jsonl").write_text("".join(json.dumps(f"document {d[0]}") + "\n" for d in part))
        splits[split] = SplitInfo(len(tokens), len(part), -(-len(tokens) // sequence))
    write_info(folder, DataInfo("key", sequence, "uint16", 1000, 0, 9, "digest", splits, []))
    return folder


def made(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(10, 1000, rng.integers(1, longest)).tolist() for _ in range(count)]


def naive(documents: list[list[int]], sequence: int, masks: list[list[int]]) -> dict[str, list[list[int]]]:
    """Packing one token at a time."""
    stream = [
        (t, m, d) for d, (ids, mask) in enumerate(zip(documents, masks, strict=True)) for t, m in zip(ids, mask, strict=True)
    ]
    rows = {name: [] for name in FIELDS}
    for start in range(0, len(stream), sequence):
        row = stream[start : start + sequence]
        ids, labels, positions, numbers = [], [], [], []
        for i, (token, _, document) in enumerate(row):
            same = i > 0 and row[i - 1][2] == document
            ids.append(token)
            positions.append(positions[-1] + 1 if same else 0)
            numbers.append(numbers[-1] + (not same) if i else 0)
            follows = i + 1 < len(row) and row[i + 1][2] == document and row[i + 1][1]
            labels.append(row[i + 1][0] if follows else IGNORE)
        padding = sequence - len(row)
        rows["input_ids_BT"].append(ids + [9] * padding)
        rows["labels_BT"].append(labels + [IGNORE] * padding)
        rows["position_ids_BT"].append(positions + list(range(padding)))
        rows["documents_BT"].append(numbers + [-1] * padding)
    return rows


@pytest.mark.parametrize("sequence", [8, 13, 64])
@pytest.mark.parametrize("masked", [False, True])
def test_rows_equal_a_packer_that_goes_token_by_token(tmp_path, sequence, masked):
    documents = made(60, 40)
    rng = np.random.default_rng(1)
    masks = [(rng.random(len(document)) < (0.5 if masked else 2)).astype(int).tolist() for document in documents]
    rows = TokenRows(write(tmp_path / "d", documents, sequence, masks if masked else None), "train")
    batch = rows.batch(range(len(rows)))
    expected = naive(documents, sequence, masks)
    for name in FIELDS:
        assert getattr(batch, name).dtype == torch.int64
        assert getattr(batch, name).tolist() == expected[name], name
    assert batch.num_tokens == rows.num_tokens == sum(map(len, documents))
    shuffled = rows.batch([len(rows) - 1, 0])
    assert shuffled.input_ids_BT.tolist() == [expected["input_ids_BT"][-1], expected["input_ids_BT"][0]]


def test_a_full_last_row_has_no_padding_and_no_rows_is_an_empty_batch(tmp_path):
    rows = TokenRows(write(tmp_path / "d", [[1, 2, 3, 4], [5, 6, 7, 8]], 4), "train")
    assert len(rows) == 2 and rows.batch([1]).token_mask_BT.all()
    assert rows.batch([]).input_ids_BT.shape == (0, 4)
    with pytest.raises(IndexError):
        rows.batch([2])


def test_damaged_files_are_errors_that_name_the_file(tmp_path):
    folder = write(tmp_path / "d", made(20, 20), 8)
    tokens = folder / "train" / "tokens.bin"
    good = tokens.read_bytes()
    TokenRows(folder, "train", verify=True)
    tokens.write_bytes(good[:-2])
    with pytest.raises(DataError, match=r"train/tokens.bin: has \d+ bytes instead of"):
        TokenRows(folder, "train")
    tokens.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    TokenRows(folder, "train")
    with pytest.raises(DataError, match=r"train/tokens.bin: its content is not what was written"):
        TokenRows(folder, "train", verify=True)
    tokens.unlink()
    with pytest.raises(DataError, match=r"train/tokens.bin: is missing"):
        TokenRows(folder, "held_out")
    (folder / "meta.json").write_text("{}")
    with pytest.raises(DataError, match="prepared by another version"):
        TokenRows(folder, "train")
    (folder / "meta.json").write_text('{"format": 1')
    with pytest.raises(DataError, match=r"meta.json: damaged"):
        TokenRows(folder, "train")
    with pytest.raises(DataError, match="no prepared text here"):
        TokenRows(tmp_path, "train")


def test_training_on_ones_own_validation_documents_is_refused(tmp_path):
    documents = made(20, 20)
    folder = write(tmp_path / "a", documents, 8, held_out=5)
    check_disjoint(folder, folder)
    leaking = write(tmp_path / "b", documents[8:], 8, held_out=3)
    with pytest.raises(
        DataError, match=r"5 of 5 held-out documents .*document \d+, document \d+, document \d+, ….*refuses to train"
    ):
        check_disjoint(write(tmp_path / "c", documents, 8), folder)
    with pytest.raises(DataError, match="2 of 5"):
        check_disjoint(leaking, folder)


class Numbers:
    """Rows that are their own numbers."""

    sequence = 4

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def batch(self, indices):
        return [int(i) for i in indices]


def steps(loader: Loader, count: int) -> list[list[int]]:
    return [loader.next_step() for _ in range(count)]


def test_every_epoch_is_every_row_once_in_an_order_of_its_own():
    found = steps(Loader(Numbers(10), 4, seed=0), 9)
    assert [len(step) for step in found] == [4, 4, 2] * 3
    epochs = [[*chain(*found[i : i + 3])] for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert found != steps(Loader(Numbers(10), 4, seed=1), 9) and found == steps(Loader(Numbers(10), 4, seed=0), 9)


@pytest.mark.parametrize("stop", range(8))
def test_a_restored_loader_goes_on_exactly(stop):
    whole = steps(Loader(Numbers(10), 4, seed=0), 12)
    first = Loader(Numbers(10), 4, seed=0)
    steps(first, stop)
    state = json.loads(json.dumps(first.state()))
    second = Loader(Numbers(10), 4, seed=0)
    steps(second, 5)
    second.restore(state)
    assert second.epoch == first.epoch and steps(second, 12 - stop) == whole[stop:]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_rows_of_the_same_global_step(world):
    whole = steps(Loader(Numbers(19), 8, seed=0), 9)
    ranks = [Loader(Numbers(19), 8, seed=0, rank=rank, world=world) for rank in range(world)]
    for step in whole:
        parts = [loader.next_step() for loader in ranks]
        assert [*chain(*parts)] == step
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    # Another number of ranks goes on where these stood.
    alone = Loader(Numbers(19), 8, seed=0)
    alone.restore(ranks[0].state())
    assert alone.next_step() == steps(Loader(Numbers(19), 8, seed=0), 10)[-1]


def test_steps_that_cannot_be_shared_out_and_other_data_are_errors():
    with pytest.raises(
        DataError, match=r"3 rows a step cannot be shared out evenly to 2 processes.*multiple of 2 x sequence = 8"
    ):
        Loader(Numbers(10), 3, seed=0, world=2)
    with pytest.raises(DataError, match="no training rows"):
        Loader(Numbers(0), 2, seed=0)
    loader = Loader(Numbers(10), 2, seed=0)
    with pytest.raises(DataError, match="data of 11 rows and these have 10"):
        loader.restore(Loader(Numbers(11), 2, seed=0).state())
