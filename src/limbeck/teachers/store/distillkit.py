"""DistillKit's files of teacher log-probabilities, read into a store and written from one.

A folder holds ``*.parquet`` with a row a document, ``input_ids: list<u64>``, ``compressed_logprobs: list<list<u8>>`` and
``bytepacked_indices: list<list<u8>>``, and ``compression_config.yaml``, which says how the bytes are to be read.  Entry ``j`` of a
document is the distribution over the token after position ``j``, so a document of n tokens has n - 1 of them.  A token's bytes are

    the first ``exact_k`` log-probabilities, likeliest first, in ``exact_dtype``
    coefficients in ``term_dtype`` of a least-squares fit over the ranks of the rest; terms are powers, ``sqrt`` and ``exp``
    for each bin of residuals: a scale in ``scale_dtype``, and ``element_bits`` bits an element

and its ids are ``ceil(log2 d)`` bits each, highest bit first.  (Format: arcee-ai/DistillKit, ``distillkit/compression``.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from limbeck.config.yaml_nodes import decode, parse
from limbeck.errors import Problem, TeacherError
from limbeck.teachers.documents import Ask, TopKRows
from limbeck.teachers.store.bits import bits_for
from limbeck.teachers.store.codecs import log_sum
from limbeck.teachers.store.manifest import Identity
from limbeck.teachers.store.store import SignalStore

CONFIG = "compression_config.yaml"
COLUMNS = ("input_ids", "compressed_logprobs", "bytepacked_indices")
WIDTHS = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Bin:
    """Residuals that share a scale."""

    scale_dtype: str
    element_bits: int
    num_elements: int

    @property
    def size(self) -> int:
        """Bytes of a token."""
        return WIDTHS[self.scale_dtype] + -(-self.element_bits * self.num_elements // 8)


@dataclass(frozen=True)
class Compression:
    """DistillKit's ``DistributionQuantizationConfig``; the defaults are what its README recommends."""

    d: int
    """Vocabulary."""
    k: int = 128
    exact_k: int = 16
    exact_dtype: str = "bfloat16"
    polynomial_terms: tuple[int | str, ...] = (0, 1, 2, 3, 4, "sqrt")
    term_dtype: str = "float32"
    residual_bins: tuple[Bin, ...] = ()
    delta_encoding: bool = False
    error_diffusion: bool = False
    normalize_t: bool = False

    @property
    def bytes_per_token(self) -> int:
        """Of the log-probabilities and the ids."""
        values = self.exact_k * WIDTHS[self.exact_dtype] + len(self.polynomial_terms) * WIDTHS[self.term_dtype]
        return values + sum(b.size for b in self.residual_bins) + -(-self.k * bits_for(self.d) // 8)

    @classmethod
    def read(cls, path: Path) -> Compression:
        """From ``compression_config.yaml``.  TeacherError for one that cannot be read."""
        try:
            record = _record(path)
            bins = tuple(Bin(**b) for b in record.pop("residual_bins", None) or ())
            terms = tuple(record.pop("polynomial_terms", None) or ())
            found = cls(**record, residual_bins=bins, polynomial_terms=terms)
            dtypes = {found.exact_dtype, found.term_dtype, *(b.scale_dtype for b in bins)}
        except FileNotFoundError as error:
            raise TeacherError(f"{path}: not there; DistillKit writes it beside its parquet files, or give the compression by hand") from error
        except (ValueError, TypeError, AttributeError, OSError) as error:
            raise TeacherError(f"{path}: not a DistillKit compression config ({error})") from error
        if unknown := dtypes - set(WIDTHS):
            raise TeacherError(f"{path}: unknown dtype {', '.join(sorted(unknown))}; known: {', '.join(WIDTHS)}")
        return found

    def terms(self) -> np.ndarray:
        """The fitted terms at each rank after the exact ones, fp64 ``[k - exact_k, terms]``."""
        count = self.k - self.exact_k
        ranks = np.linspace(0, 1, count) if self.normalize_t else np.arange(count, dtype=np.float64)
        columns = [ranks**term if isinstance(term, int) else {"sqrt": np.sqrt, "exp": np.exp}[term](ranks) for term in self.polynomial_terms]
        return np.stack(columns, 1) if columns else np.zeros((count, 0))

    def compress(self, rows: TopKRows) -> tuple[np.ndarray, np.ndarray]:
        """Bytes of the log-probabilities and of the ids of each row, uint8 ``[m, *]``; rows have log-probabilities as logits."""
        values_mK = rows.logits_mK.astype(np.float64)
        if self.delta_encoding:
            values_mK = np.diff(values_mK, axis=1, prepend=0)
        parts = [_to_bytes(values_mK[:, : self.exact_k], self.exact_dtype)]
        rest_mR = values_mK[:, self.exact_k :]
        if self.polynomial_terms:
            terms = self.terms()
            coefficients = rest_mR @ np.linalg.pinv(terms).T
            parts.append(_to_bytes(coefficients, self.term_dtype))
            rest_mR = rest_mR - self._fit(parts[-1], terms)
        start = 0
        for b in self.residual_bins:
            part = rest_mR[:, start : start + b.num_elements]
            start += b.num_elements
            low, steps = _range(b.element_bits)
            scale = np.abs(part).max(1, keepdims=True) / steps
            scale[scale == 0] = 1
            parts.append(_to_bytes(scale, b.scale_dtype))
            codes = np.rint(part / _from_bytes(parts[-1], b.scale_dtype)) - low
            parts.append(_pack_high_first(np.clip(codes, 0, 2**b.element_bits - 1).astype(np.int64), b.element_bits))
        return np.concatenate(parts, 1), _pack_high_first(rows.ids_mK.astype(np.int64), bits_for(self.d))

    def expand(self, values: np.ndarray, ids: np.ndarray) -> TopKRows:
        """Rows from the bytes of :meth:`compress`: log-probabilities as logits and logZ = 0 at T = 1.

        A fit may leave ids in another order, or more mass than one: rows are sorted again, and logZ takes the surplus.
        """
        cut = _column_cutter(values)
        whole = [_from_bytes(cut(self.exact_k * WIDTHS[self.exact_dtype]), self.exact_dtype)]
        rest_mR = np.zeros((len(values), self.k - self.exact_k))
        if self.polynomial_terms:
            rest_mR += self._fit(cut(len(self.polynomial_terms) * WIDTHS[self.term_dtype]), self.terms())
        start = 0
        for b in self.residual_bins:
            scale = _from_bytes(cut(WIDTHS[b.scale_dtype]), b.scale_dtype)
            codes = _unpack_high_first(cut(b.size - WIDTHS[b.scale_dtype]), b.element_bits, b.num_elements)
            low, _ = _range(b.element_bits)
            rest_mR[:, start : start + b.num_elements] += (codes * 2 - 1 if b.element_bits == 1 else codes + low) * scale
            start += b.num_elements
        logits_mK = np.concatenate([*whole, rest_mR], 1)
        if self.delta_encoding:
            logits_mK = np.cumsum(logits_mK, axis=1)
        ids_mK = _unpack_high_first(ids, bits_for(self.d), self.k)
        # Ranks that the server did not fill hold minus infinity and whatever id was in memory.
        gone = ~np.isfinite(logits_mK)
        logits_mK = np.where(gone, -np.inf, logits_mK).astype(np.float32)
        ids_mK = np.where(gone, 0, ids_mK).astype(np.int32)
        order = np.argsort(-logits_mK, axis=1, kind="stable")
        logits_mK = np.take_along_axis(logits_mK, order, 1)
        surplus_m = log_sum(logits_mK, 1.0)
        return TopKRows(np.take_along_axis(ids_mK, order, 1), logits_mK, np.maximum(surplus_m, 0).astype(np.float32)[:, None])

    def _fit(self, coefficients: np.ndarray, terms: np.ndarray) -> np.ndarray:
        return _from_bytes(coefficients, self.term_dtype) @ terms.T


def import_parquet(
    source: Path, folder: Path, *, teacher: dict[str, Any], compression: Compression | None = None, codec: str = "fp16"
) -> SignalStore:
    """Read DistillKit's files of ``source`` into a new store in ``folder``, and return it, finished.

    ``teacher`` is put down as the fingerprint: what is known of the model, since the files do not say.

    Raises:
        TeacherError: no such files, other columns, or bytes of another compression.
    """
    compression = compression or Compression.read(source / CONFIG)
    identity = Identity({"imported": "distillkit", **teacher}, compression.d, compression.k, (1.0,), codec=codec)
    store = SignalStore(folder, identity)
    for ask, rows in read_parquet(source, compression):
        if not store.has(ask):
            store.put(ask, rows)
    store.complete()
    return store


def read_parquet(source: Path, compression: Compression) -> Iterator[tuple[Ask, TopKRows]]:
    """Documents and rows of DistillKit's files, in order."""
    import pyarrow.parquet as parquet

    paths = sorted(source.glob("*.parquet"), key=lambda path: (len(path.name), path.name))
    if not paths:
        raise TeacherError(f"{source}: no *.parquet here: name the folder that DistillKit wrote")
    for path in paths:
        file = parquet.ParquetFile(path)
        if lacking := set(COLUMNS) - set(file.schema_arrow.names):
            raise TeacherError(f"{path}: no column {', '.join(sorted(lacking))}; DistillKit's new format has {', '.join(COLUMNS)}")
        for batch in file.iter_batches(batch_size=64, columns=list(COLUMNS)):
            for row in range(batch.num_rows):
                ids = batch.column(0)[row].values.to_numpy().astype(np.int32)
                values, indices = (_matrix(batch.column(i)[row].values) for i in (1, 2))
                yield _document(path, ids, values, indices, compression)


def export_parquet(store: SignalStore, target: Path, *, compression: Compression | None = None, documents_per_file: int = 256) -> int:
    """Write a store's documents for DistillKit; returns how many.

    Log-probabilities at T = 1 are written, so the store must hold that temperature.  The format has no positions: documents
    of which only some positions are stored cannot be written.

    Raises:
        TeacherError: no T = 1, fewer ids stored than the compression writes, or a document that is stored in part.
    """
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    identity = store.identity
    if 1.0 not in identity.temperatures:
        raise TeacherError(
            f"{store.folder}: DistillKit's files hold T = 1, and the store has {list(identity.temperatures)}: capture with 1 among "
            "`temperatures`"
        )
    compression = compression or Compression(identity.vocabulary, identity.k, min(16, identity.k))
    if compression.k > identity.k:
        raise TeacherError(
            f"{store.folder}: {identity.k} ids are stored, and the compression writes {compression.k}: capture with `k: "
            f"{compression.k}`, or give a compression of fewer"
        )
    column = identity.temperatures.index(1.0)
    target.mkdir(parents=True, exist_ok=True)
    byte_lists = arrow.list_(arrow.list_(arrow.uint8()))
    schema = arrow.schema([(COLUMNS[0], arrow.list_(arrow.uint64())), *((name, byte_lists) for name in COLUMNS[1:])])
    written = 0
    rows: list[tuple[Any, ...]] = []

    def flush() -> None:
        columns = [arrow.array(list(part), type=field.type) for part, field in zip(zip(*rows, strict=True), schema, strict=True)]
        parquet.write_table(arrow.Table.from_arrays(columns, schema=schema), target / f"data_{written // documents_per_file}.parquet")
        rows.clear()

    for document in store.documents():
        if len(document.positions) != _entries(document.ids):
            key = Ask(document.ids, document.positions).key.hex()
            raise TeacherError(
                f"{store.folder}: {len(document.positions)} of {len(document.ids)} positions of document {key} are stored, and DistillKit's format "
                "has no positions: capture without masked text"
            )
        log_probs_mK = (document.rows.logits_mK - document.rows.log_z_mZ[:, [column]])[:, : compression.k]
        parts = compression.compress(TopKRows(document.rows.ids_mK[:, : compression.k], log_probs_mK, document.rows.log_z_mZ))
        rows.append((document.ids.astype(np.uint64), *(_lists(part) for part in parts)))
        if len(rows) == documents_per_file:
            flush()
        written += 1
    if rows:
        flush()
    record = asdict(compression)
    record["polynomial_terms"] = list(compression.polynomial_terms)
    record["residual_bins"] = [asdict(b) for b in compression.residual_bins]
    (target / CONFIG).write_text(yaml.safe_dump(record), encoding="utf-8")
    return written


def _document(path: Path, ids: np.ndarray, values: np.ndarray, indices: np.ndarray, compression: Compression) -> tuple[Ask, TopKRows]:
    index_bytes = -(-compression.k * bits_for(compression.d) // 8)
    value_bytes = compression.bytes_per_token - index_bytes
    # A last entry, about the token after the document, is no answer to anything that training asks.
    expected = _entries(ids)
    values, indices = values[:expected], indices[:expected]
    if not len(values) == len(indices) == expected:
        raise TeacherError(f"{path}: a document of {len(ids)} tokens has {len(values)} entries; {expected} are expected")
    if len(values) and (values.shape[1], indices.shape[1]) != (value_bytes, index_bytes):
        raise TeacherError(
            f"{path}: {values.shape[1]} bytes of values and {indices.shape[1]} of ids a token, and this compression has {value_bytes} and "
            f"{index_bytes}: it is not the one that the files were written with"
        )
    rows = compression.expand(values.reshape(-1, value_bytes), indices.reshape(-1, index_bytes))
    return Ask(ids, np.arange(expected, dtype=np.int32)), rows


def _entries(ids: np.ndarray) -> int:
    """Tokens of a document that have another after them."""
    return max(len(ids) - 1, 0)


def _matrix(lists: Any) -> np.ndarray:
    """A list of equally long lists of bytes as uint8 ``[rows, bytes]``, through arrow's buffers."""
    flat = lists.flatten().to_numpy(zero_copy_only=False).astype(np.uint8, copy=False)
    return flat.reshape(len(lists), -1) if len(lists) else np.zeros((0, 0), np.uint8)


def _lists(part: np.ndarray) -> Any:
    import pyarrow as arrow

    offsets = np.arange(len(part) + 1, dtype=np.int32) * part.shape[1]
    return arrow.ListArray.from_arrays(offsets, arrow.array(part.reshape(-1)))


def _range(bits: int) -> tuple[int, int]:
    """Lowest code's value and steps on each side."""
    return (0, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1))


def _to_bytes(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        whole = np.ascontiguousarray(values, "<f4").view("<u4")
        # To the nearest, ties to even, as hardware does.
        found = ((whole + 0x7FFF + ((whole >> 16) & 1)) >> 16).astype("<u2")
        found = np.where(np.isfinite(values), found, whole >> 16).astype("<u2")
    else:
        found = np.ascontiguousarray(values, np.dtype(dtype).newbyteorder("<"))
    return found.view(np.uint8).reshape(len(values), values.shape[1] * WIDTHS[dtype])


def _from_bytes(data: np.ndarray, dtype: str) -> np.ndarray:
    data = np.ascontiguousarray(data)
    if dtype == "bfloat16":
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return data.view(np.dtype(dtype).newbyteorder("<")).astype(np.float64)


def _pack_high_first(values: np.ndarray, bits: int) -> np.ndarray:
    """uint8 ``[m, ceil(n * bits / 8)]`` of ``[m, n]``."""
    marks = (values[:, :, None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(marks.astype(np.uint8).reshape(len(values), values.shape[1] * bits), axis=1)


def _unpack_high_first(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    marks = np.unpackbits(np.ascontiguousarray(data), axis=1, count=count * bits).reshape(len(data), count, bits)
    return marks.astype(np.int64) @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64))


def _record(path: Path) -> dict[str, Any]:
    """A mapping of YAML, bounded as recipes are: a few lines of aliases can mean more than memory holds."""
    problems: list[Problem] = []
    text = decode(path.read_bytes(), str(path), problems)
    root = None if text is None else parse(text, str(path), problems)
    if problems or root is None or not isinstance(root.value, dict):
        raise ValueError("; ".join(map(str, problems[:3])) or "it is no mapping")
    found = root.plain()
    assert isinstance(found, dict)
    return found


def _column_cutter(data: np.ndarray) -> Any:
    start = 0

    def cut(size: int) -> np.ndarray:
        nonlocal start
        start += size
        return data[:, start - size : start]

    return cut
