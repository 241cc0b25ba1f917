"""Which type each tensor of a file has, and what that comes to in bytes: said before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from limbeck.errors import ModelError
from limbeck.export.gguf.architectures import Piece
from limbeck.export.gguf.packing import BF16, F16, F32, Q2_0, Q8_0, TERNARY, TQ2_0, TYPES, FileType, check_fits, fitting

ALIGNMENT = 32
"""Bytes to which GGUF aligns tensors."""


@dataclass(frozen=True)
class Planned:
    """A tensor of the file and its type."""

    piece: Piece
    type: FileType

    @property
    def nbytes(self) -> int:
        """Bytes of its data, without the padding behind it."""
        return self.type.nbytes(self.piece.shape)


@dataclass(frozen=True)
class Precisions:
    """What is asked of a file.

    ``ternary(source)`` is the number of inputs to a scale where a tensor of the model is ternary (its whole width for a scale a row),
    else None; ``kept(source)`` the plan's precision of the others: ``keep``, ``bf16``, ``fp8`` or ``q8``.
    """

    kind: str
    """A type's name, or `auto`."""
    ternary: Callable[[str, int], int | None]
    kept: Callable[[str], str] = lambda source: "keep"
    keep: FileType = BF16
    """Type of what is not ternary and of which the plan says `keep`."""
    group: int | None = None
    """Write a scale for each so many inputs."""


def planned(pieces: Sequence[Piece], wanted: Precisions) -> tuple[list[Planned], list[str]]:
    """Every tensor with its type, and sentences about what is not as one might think."""
    found: list[Planned] = []
    notes: list[str] = []
    for piece in pieces:
        kind = F32 if piece.full else _type(piece, wanted, notes)
        found.append(Planned(piece, kind))
    if any(one.type is Q2_0 for one in found):
        notes.append("q2_0 has no fast code for x86 in llama.cpp: it decodes slower than bf16 there")
    return found, list(dict.fromkeys(notes))


def _type(piece: Piece, wanted: Precisions, notes: list[str]) -> FileType:
    width = piece.shape[-1]
    if wanted.kind in ("f32", "bf16"):
        return TYPES[wanted.kind]
    group = wanted.ternary(piece.source, width)
    if group is None:
        return _kept(piece, wanted.kept(piece.source), wanted.keep, notes)
    if wanted.group is not None:
        if group % wanted.group:
            raise ModelError(
                f"--group-size {wanted.group}: {piece.source} was trained with a scale for each {group} inputs: leave it out, or give a divisor of that"
            )
        group = wanted.group
    if wanted.kind != "auto":
        check_fits(piece.source, width, group, TYPES[wanted.kind])
        return TYPES[wanted.kind]
    types = fitting(width, group)
    if not types:
        notes.append(f"no ternary type holds {width} inputs with a scale for each {group}: such tensors are {F16.name}, which is exact")
        return F16
    if types[0] is not TQ2_0:
        notes.append(f"a scale for each {group} of {width} inputs fits {types[0].name} alone")
    return types[0]


def _kept(piece: Piece, precision: str, keep: FileType, notes: list[str]) -> FileType:
    if precision == "fp8":
        notes.append("GGUF has no fp8: what the plan calls fp8 is q8_0 in the file")
    if precision in ("q8", "fp8"):
        if piece.shape[-1] % Q8_0.block == 0:
            return Q8_0
        notes.append(f"{piece.source}: {piece.shape[-1]} inputs are not a multiple of {Q8_0.block}: bf16 instead of q8_0")
        return BF16
    return keep if precision == "keep" else BF16


def predicted_bytes(plan: Sequence[Planned], header: int) -> int:
    """Size of the file: its header (keys and tokenizer), 48 bytes and a name for each tensor, and the padded data."""
    aligned = sum(-(-one.nbytes // ALIGNMENT) * ALIGNMENT for one in plan)
    return header + sum(48 + len(one.piece.name) for one in plan) + aligned


def size_report(plan: Sequence[Planned]) -> list[dict[str, Any]]:
    """Parameters, bytes and bits a weight by kind and type, largest first, and the total."""
    rows: dict[tuple[str, str], list[int]] = {}
    for one in plan:
        count = 1
        for side in one.piece.shape:
            count *= side
        row = rows.setdefault((one.piece.kind, one.type.name), [0, 0])
        row[0] += count
        row[1] += one.nbytes
    table = [_row(kind, name, *numbers) for (kind, name), numbers in rows.items()]
    table.sort(key=lambda row: -row["bytes"])
    return [*table, _row("total", "", sum(row["parameters"] for row in table), sum(row["bytes"] for row in table))]


def _row(kind: str, name: str, parameters: int, size: int) -> dict[str, Any]:
    return {"kind": kind, "type": name, "parameters": parameters, "bytes": size, "bits_per_weight": round(8 * size / parameters, 4)}


def size_lines(table: Sequence[dict[str, Any]]) -> list[str]:
    """The size report for people."""
    lines = [f"{'weights':<18} {'type':<6} {'parameters':>14} {'bytes':>15} {'bits/weight':>12}"]
    return lines + [
        f"{row['kind']:<18} {row['type']:<6} {row['parameters']:>14,} {row['bytes']:>15,} {row['bits_per_weight']:>12.3f}" for row in table
    ]


def main_type(plan: Sequence[Planned]) -> FileType:
    """The type by which the file is called: the ternary one if there is any, else that of most bytes."""
    ternary = [one.type for one in plan if one.type in TERNARY]
    if ternary:
        return max(set(ternary), key=ternary.count)
    sizes: dict[FileType, int] = {}
    for one in plan:
        sizes[one.type] = sizes.get(one.type, 0) + one.nbytes
    return max(sizes, key=lambda kind: sizes[kind])
