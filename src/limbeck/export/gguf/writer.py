"""A GGUF file, written tensor by tensor: whole under its name or not there at all, with a manifest beside it."""

from __future__ import annotations

import errno
import importlib
import io
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from limbeck import __version__
from limbeck.engine.console import Counter
from limbeck.errors import ModelError, RunError
from limbeck.export.gguf.architectures import architecture, keys, pieces
from limbeck.export.gguf.packing import pack
from limbeck.export.gguf.plan import ALIGNMENT, Planned, Precisions, main_type, planned, predicted_bytes, size_report
from limbeck.export.gguf.tokenizer import tokenizer_keys
from limbeck.export.gguf.weights import Weights
from limbeck.files import fsync, sha256, write_atomically

QUANTISATION_VERSION = 2
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Written:
    """A file that was written."""

    path: Path
    plan: list[Planned]
    notes: list[str]
    """What is not as one might think, in sentences."""
    manifest: dict[str, Any] = field(default_factory=dict)


def write_gguf(
    weights: Weights, path: Path, tokenizer: Any, wanted: Precisions, *, name: str, about: Mapping[str, Any] | None = None, source: str = "tokenizer",
    say: Callable[[str], object] = lambda line: None,
) -> Written:  # fmt: skip
    """Write ``path`` and ``path.json``; ``about`` goes into both (the manifest as it is, the file under ``limbeck.*``).  ``say`` hears how far
    it is, now and then.

    One tensor is in memory at a time.  Raises :class:`ModelError` for a model or type that a file cannot hold and :class:`RunError`
    for a place that cannot be written and a disk without room, all before anything has the final name.
    """
    gguf_package()
    config, about = weights.config, dict(about or {})
    arch = architecture(config)
    plan, notes = planned(pieces(config, weights.shapes), wanted)
    fields = _general(name, arch, plan, about)
    fields |= {f"{arch}.{key}": value for key, value in keys(config).items()} | tokenizer_keys(tokenizer, config.vocab_size, source)
    header = _header(fields, plan)
    predicted = predicted_bytes(plan, _header_bytes(fields))
    beside = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _check_room(path, predicted)
        with open(beside, "wb") as file:
            file.write(header)
            with Counter(say, None, path.name, unit="tensors", total=len(plan)) as counter:
                for one in plan:
                    _write_tensor(file, one, weights)
                    counter.add()
            file.flush()
            os.fsync(file.fileno())
        manifest = _manifest(path, beside, plan, notes, arch, about, predicted)
        os.replace(beside, path)
        fsync(path.parent)
        write_manifest(path, manifest)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"{path}: the disk is full: {predicted:,} bytes were needed. Nothing was left behind; free some room or give another --output"
        else:
            message = f"{path}: cannot be written ({error.strerror or error}): give another --output"
        raise RunError(message) from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
    return Written(path, plan, notes, manifest)


def gguf_package() -> Any:
    """The ``gguf`` package; without it a :class:`ModelError` that says how to get it."""
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ModelError("GGUF export needs the `gguf` package: pip install 'limbeck[gguf]'") from error


def manifest_path(path: Path) -> Path:
    """Where a file's manifest is."""
    return path.with_name(f"{path.name}.json")


def write_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest beside a file."""
    write_atomically(manifest_path(path), json.dumps(manifest, indent=2) + "\n")


def _general(name: str, arch: str, plan: Sequence[Planned], about: Mapping[str, Any]) -> dict[str, Any]:
    fields = {
        "general.architecture": arch,
        "general.type": "model",
        "general.name": name,
        "general.file_type": main_type(plan).file_type,
        "general.quantization_version": QUANTISATION_VERSION,
        "limbeck.version": __version__,
    }
    return fields | {f"limbeck.{key}": value for key, value in about.items() if isinstance(value, (str, int, float, bool))}


def _writer(fields: Mapping[str, Any]) -> Any:
    import gguf

    writer = gguf.GGUFWriter(None, fields["general.architecture"])
    for key, value in fields.items():
        if key == "general.architecture":
            continue
        if isinstance(value, (list, tuple)):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_string(key, value)
    return writer


def _header(fields: Mapping[str, Any], plan: Sequence[Planned]) -> bytes:
    """Magic, keys and the table of tensors as the ``gguf`` package writes them, padded to the data."""
    import gguf

    writer = _writer(fields)
    for one in plan:
        # Called with a dtype that is not uint8 the shape is taken as it is; type numbers newer than the package go through too.
        writer.add_tensor_info(one.piece.name, one.piece.shape, np.dtype(np.float32), one.nbytes, raw_dtype=one.type.number)
    buffer = io.BytesIO()
    writer.fout, writer.state = [buffer], gguf.gguf_writer.WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return _padded(buffer.getvalue(), writer.data_alignment)


def _header_bytes(fields: Mapping[str, Any]) -> int:
    """Bytes of magic and keys: of strings and numbers that are known beforehand."""
    total = 24
    for key, value in fields.items():
        total += 12 + len(key)
        items = value if isinstance(value, (list, tuple)) else [value]
        total += 12 if items is value else 0
        total += sum(8 + len(item.encode()) if isinstance(item, str) else 1 if isinstance(item, bool) else 4 for item in items)
    return total


def _padded(data: bytes, alignment: int) -> bytes:
    return data + bytes(-len(data) % alignment)


def _write_tensor(file: Any, one: Planned, weights: Weights) -> None:
    piece = one.piece
    made = piece.make(weights.read(piece.source) if piece.source else torch.empty(0))
    data = np.ascontiguousarray(pack(made, one.type, piece.source)).reshape(-1).view(np.uint8)
    if len(data) != one.nbytes:
        raise AssertionError(f"{piece.name}: {len(data)} bytes instead of {one.nbytes}")
    for start in range(0, len(data), _CHUNK):
        file.write(data[start : start + _CHUNK].data)
    file.write(bytes(-len(data) % ALIGNMENT))


def _check_room(path: Path, size: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise RunError(f"{path}: the file will have {size:,} bytes and {free:,} are free on its disk: free some room or give another --output")


def _manifest(
    path: Path, file: Path, plan: Sequence[Planned], notes: Sequence[str], arch: str, about: Mapping[str, Any], predicted: int
) -> dict[str, Any]:
    size = file.stat().st_size
    return {
        "file": path.name,
        "sha256": sha256(file),
        "bytes": size,
        "predicted_bytes": predicted,
        "architecture": arch,
        "type": main_type(plan).name,
        **about,
        "sizes": size_report(plan),
        "notes": list(notes),
        "tensors": {one.piece.name: {"type": one.type.name, "shape": list(one.piece.shape), "from": one.piece.source} for one in plan},
        "versions": {"limbeck": __version__, **{name: version(name) for name in ("gguf", "torch", "transformers")}},
        "verification": None,
    }
