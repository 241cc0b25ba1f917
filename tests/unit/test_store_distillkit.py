"""DistillKit's files in and out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from limbeck.errors import TeacherError
from limbeck.teachers.documents import Ask, TopKRows
from limbeck.teachers.store.codecs import log_sum
from limbeck.teachers.store.distillkit import Bin, Compression, export_parquet, import_parquet, read_parquet
from limbeck.teachers.store.store import SignalStore
from signal_cases import answers, document, identity

pytest.importorskip("pyarrow")

SMALL = Compression(
    1000, 8, 3, polynomial_terms=(0, 1, "sqrt"), residual_bins=(Bin("float16", 4, 5),)
)  # fmt: skip
THEIR_VALUES = "00bfc0bf10c0ebaf7dc058958bbfd81cce3e642b7b90d000c006c00dc0343313c0b8ccccbd000000b40000f0f000"
THEIR_IDS = "01fe70020008464400030040200c040140601c08"
THEIR_READING = [
    [-0.5, -1.5, -2.25, -4.021479606628418, -4.478941917419434, -5.5179243087768555, -6.999024391174316, -7.231652736663818],
    [-2.0, -2.09375, -2.203125, -2.3000001907348633, -2.4000000953674316, -2.500000238418579, -2.5999999046325684, -2.6999998092651367],
]
"""What DistillKit (commit a61c2e7) wrote for two tokens, and what it reads from that."""


def their_bytes(text: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(text), np.uint8).reshape(2, -1)


def test_bytes_that_distillkit_wrote_are_read_as_it_reads_them() -> None:
    rows = SMALL.expand(their_bytes(THEIR_VALUES), their_bytes(THEIR_IDS))
    assert rows.ids_mK.tolist() == [[7, 999, 0, 512, 33, 100, 256, 3], [1, 2, 3, 4, 5, 6, 7, 8]]
    # It rounds residuals to the dtype of the exact values, here bfloat16, and we do not.
    np.testing.assert_allclose(rows.logits_mK, THEIR_READING, atol=2e-3)
    assert SMALL.bytes_per_token == (len(THEIR_VALUES) + len(THEIR_IDS)) // 4


def test_what_we_write_is_read_as_what_distillkit_wrote() -> None:
    true = np.array([[-0.5, -1.5, -2.25, -4.0, -4.5, -5.5, -7.0, -7.25]], np.float32)
    ids = np.array([[7, 999, 0, 512, 33, 100, 256, 3]], np.int32)
    values, packed = SMALL.compress(TopKRows(ids, true, np.zeros((1, 1), np.float32)))
    assert packed.tobytes() == their_bytes(THEIR_IDS)[0].tobytes()
    # The exact values are theirs to the bit, the fit to what two solvers differ by.
    assert values[0, :6].tobytes() == their_bytes(THEIR_VALUES)[0, :6].tobytes()
    np.testing.assert_allclose(SMALL.expand(values, packed).logits_mK, THEIR_READING[:1], atol=5e-3)


@pytest.mark.parametrize(
    "compression",
    [
        Compression(500, 16, 16, "float32", ()),
        Compression(500, 16, 4, "float32", (0, 1, 2, "sqrt"), residual_bins=(Bin("float32", 8, 12),)),
        Compression(500, 16, 4, "float16", (), residual_bins=(Bin("float16", 9, 12),), delta_encoding=True),
    ],
    ids=["exact", "fitted", "deltas"],
)
def test_a_store_goes_out_and_comes_back(tmp_path: Path, compression: Compression) -> None:
    rng = np.random.default_rng(0)
    held = identity(k=16, temperatures=(2.0, 1.0), codec="exact")
    store = SignalStore(tmp_path / "ours", held)
    cases = [(ask, answers(rng, len(ask.positions), held.layout)) for ask in (document(rng, n) for n in (5, 40, 1, 17))]
    for ask, rows in cases:
        store.put(ask, rows)
    assert export_parquet(store, tmp_path / "theirs", compression=compression, documents_per_file=3) == 4
    assert sorted(path.name for path in (tmp_path / "theirs").glob("*.parquet")) == ["data_0.parquet", "data_1.parquet"]
    assert Compression.read(tmp_path / "theirs" / "compression_config.yaml") == compression
    back = import_parquet(tmp_path / "theirs", tmp_path / "back", teacher={"model": "Qwen/Qwen3-8B"}, codec="exact")
    assert back.verify() == [] and back.identity.temperatures == (1.0,)
    for ask, rows in cases:
        found = back.get(ask)
        assert found is not None
        np.testing.assert_allclose(found.logits_mK, rows.logits_mK - rows.log_z_mZ[:, [1]], atol=0.05)
        np.testing.assert_allclose(found.log_z_mZ, 0, atol=0.05)
        if compression.exact_k == 16:
            np.testing.assert_array_equal(found.ids_mK, rows.ids_mK)
            np.testing.assert_allclose(found.logits_mK, rows.logits_mK - rows.log_z_mZ[:, [1]], atol=1e-6)


def test_entries_stand_for_the_token_after_their_position(tmp_path: Path) -> None:
    held = identity(temperatures=(1.0,), codec="exact", k=1)
    ask = Ask(np.arange(10, 20, dtype=np.int32), np.arange(9, dtype=np.int32))
    # Row i is sure of the id 100 + i.
    rows = TopKRows(np.arange(100, 109, dtype=np.int32)[:, None], np.zeros((9, 1), np.float32), np.zeros((9, 1), np.float32))
    store = SignalStore(tmp_path / "ours", held)
    store.put(ask, rows)
    export_parquet(store, tmp_path / "theirs")
    import pyarrow.parquet as parquet

    table = parquet.read_table(tmp_path / "theirs" / "data_0.parquet").to_pydict()
    assert table["input_ids"] == [list(range(10, 20))] and len(table["bytepacked_indices"][0]) == 9
    assert [(a << 8 | b) >> 7 for a, b in table["bytepacked_indices"][0]] == list(range(100, 109))
    (found, answer), = read_parquet(tmp_path / "theirs", Compression.read(tmp_path / "theirs" / "compression_config.yaml"))
    assert found.key == ask.key and answer.ids_mK[:, 0].tolist() == list(range(100, 109))


def test_a_fit_with_too_much_mass_is_no_more_than_a_distribution() -> None:
    compression = Compression(500, 8, 1, polynomial_terms=(0,))
    steep = np.array([[-0.01, -5, -6, -7, -8, -9, -10, -11]], np.float32)
    rows = TopKRows(np.arange(8, dtype=np.int32)[None], steep - steep + np.float32(-0.7), np.zeros((1, 1), np.float32))
    found = compression.expand(*compression.compress(rows))
    assert found.log_z_mZ[0, 0] > 0
    assert np.exp(log_sum(found.logits_mK, 1.0) - found.log_z_mZ[:, 0]).max() <= 1 + 1e-6


def test_what_cannot_be_read_or_written_is_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    held = identity(codec="exact")
    store = SignalStore(tmp_path / "ours", held)
    ask = document(rng, 30, share=0.5)
    store.put(ask, answers(rng, len(ask.positions), held.layout))
    with pytest.raises(TeacherError, match=f"{ask.key.hex()} are stored.*no positions"):
        export_parquet(store, tmp_path / "theirs")
    with pytest.raises(TeacherError, match=r"compression_config\.yaml: not there"):
        import_parquet(tmp_path, tmp_path / "x", teacher={})
    with pytest.raises(TeacherError, match=r"no \*\.parquet"):
        import_parquet(tmp_path, tmp_path / "x", teacher={}, compression=SMALL)
    whole = SignalStore(tmp_path / "whole", held)
    ask = document(rng, 30)
    whole.put(ask, answers(rng, 29, held.layout))
    export_parquet(whole, tmp_path / "theirs")
    with pytest.raises(TeacherError, match="not the one that the files were written with"):
        import_parquet(tmp_path / "theirs", tmp_path / "y", teacher={}, compression=Compression(500, 8, 2))


def test_the_command_line_verifies_and_converts(tmp_path: Path) -> None:
    from limbeck.cli.app import app

    rng = np.random.default_rng(3)
    held = identity(codec="exact", temperatures=(1.0,))
    with_rows = SignalStore(tmp_path / "ours", held)
    ask = document(rng, 30)
    with_rows.put(ask, answers(rng, 29, held.layout))
    with_rows.complete()
    with_rows.close()
    runner = CliRunner()
    out = runner.invoke(app, ["signals", str(tmp_path / "ours"), "--verify", "--to-distillkit", str(tmp_path / "theirs")])
    assert out.exit_code == 0 and "29 positions" in out.output and "every byte" in out.output and "1 documents written" in out.output
    words = ["signals", str(tmp_path / "back"), "--from-distillkit", str(tmp_path / "theirs"), "--teacher", "Qwen/Qwen3-8B"]
    out = runner.invoke(app, words)
    assert out.exit_code == 0 and "Qwen/Qwen3-8B" in out.output
    path = tmp_path / "ours" / "00" / "00000.shard"
    path.write_bytes(path.read_bytes()[:60] + b"?" + path.read_bytes()[61:])
    out = runner.invoke(app, ["signals", str(tmp_path / "ours"), "--verify"])
    assert out.exit_code == 2 and f"00000.shard: block 0 (document {ask.key.hex()})" in out.output.replace("\n", "")
