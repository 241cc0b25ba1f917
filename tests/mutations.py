"""Damage to files: one seeded mutation of a folder at a time, and what a reader made of it."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch

Slot = tuple[Any, Any]
"""A container and the key or index of one value in it."""
HEADER = 64
WRONG = [None, True, -1, 10**400, 2**40, 1e308, float("nan"), "", "Ünïcödé 🜂\ud800", "../../etc/passwd", "9" * 5000, [], {}, [[[[]]]], {"kind": "nothing"}]
DEEP = b'{"a":' * 100_000


def slots(tree: Any) -> Iterable[Slot]:
    """Every place of a tree that holds a value."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items):
        yield tree, key
        yield from slots(value)


# -- the bytes of a file ---------------------------------------------------------------------------------------------------


def flip_bit(rng: random.Random, data: bytes) -> bytes:
    return _flipped(data, rng.randrange(len(data)), 1 << rng.randrange(8))


def flip_header(rng: random.Random, data: bytes) -> bytes:
    return _flipped(data, rng.randrange(min(HEADER, len(data))), 1 + rng.randrange(255))


def _flipped(data: bytes, at: int, bits: int) -> bytes:
    return data[:at] + bytes([data[at] ^ bits]) + data[at + 1 :]


def truncate(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def empty(rng: random.Random, data: bytes) -> bytes:
    return b""


def append(rng: random.Random, data: bytes) -> bytes:
    return data + rng.choice([b"\0" * 8, b"{", b"\xff\xfe garbage", b"\n[]\n"])


# -- the values of a JSON file (of one line of JSON lines) -----------------------------------------------------------------


def wrong_value(rng: random.Random, tree: Any) -> None:
    holder, key = rng.choice(list(slots(tree)))
    holder[key] = rng.choice(WRONG)


def rename_key(rng: random.Random, tree: Any) -> None:
    holder, key = rng.choice([slot for slot in slots(tree) if isinstance(slot[0], dict)])
    holder[key + "_"] = holder.pop(key)


def delete_key(rng: random.Random, tree: Any) -> None:
    holder, key = rng.choice(list(slots(tree)))
    del holder[key]


def other_root(rng: random.Random, tree: Any) -> Any:
    return rng.choice([None, [], {}, [tree], 3, "text"])


# -- the file in its folder ------------------------------------------------------------------------------------------------


def delete(rng: random.Random, path: Path, outside: Path) -> None:
    path.unlink()


def duplicate(rng: random.Random, path: Path, outside: Path) -> None:
    shutil.copy(path, path.with_name(f"{path.stem} (copy){path.suffix}"))


def folder_instead(rng: random.Random, path: Path, outside: Path) -> None:
    path.unlink()
    path.mkdir()


def dangling_link(rng: random.Random, path: Path, outside: Path) -> None:
    path.unlink()
    path.symlink_to("/nowhere/at/all")


def link_out(rng: random.Random, path: Path, outside: Path) -> None:
    """To a file of another owner: the same content, or something else."""
    shutil.copy(path, outside / path.name)
    if rng.random() < 0.5:
        (outside / path.name).write_bytes(rng.choice([b"root:x:0:0", b"{}", b""]))
    path.unlink()
    path.symlink_to(outside / path.name)


def stranger(rng: random.Random, path: Path, outside: Path) -> None:
    name = rng.choice([f"foreign{path.suffix}", ".DS_Store", "ä b.txt", "core"])
    path.with_name(name).write_bytes(rng.choice([b"", b"{}", b"\x00\x01\x02", b"not what it says"]))


def unreadable(rng: random.Random, path: Path, outside: Path) -> None:
    path.chmod(0)


IN_BYTES: list[Callable[[random.Random, bytes], bytes]] = [flip_bit, flip_header, truncate, empty, append]
IN_JSON: list[Callable[[random.Random, Any], Any]] = [wrong_value, rename_key, delete_key, other_root]
IN_FOLDER: list[Callable[[random.Random, Path, Path], None]] = [
    delete, duplicate, folder_instead, dangling_link, link_out, stranger, *([unreadable] if os.geteuid() else []),
]  # fmt: skip
SEEN_BY_A_HASH_ALONE = {"flip_bit", "flip_header", "swap", "wrong_value", "rename_key", "delete_key", "append", "link_out"}
"""Mutations that may leave a good file of other content: where no hash is recorded they cannot be told from an edit."""


def mutate(rng: random.Random, home: Path, outside: Path, *, unhashed: Iterable[str] = (), whole: Iterable[str] = ()) -> tuple[str, Path]:
    """Damage one file below ``home``; what was done, and to which file.

    ``unhashed`` are patterns of files of which no hash is recorded, ``whole`` of files that are left as they are.
    """
    files = [p for p in sorted(home.rglob("*")) if p.is_file() and p.stat().st_size and not _matches(home, p, whole)]
    while True:
        # Small files are as likely as large ones, JSON files more so: that is where code trusts most.
        path = rng.choices(files, [3 if p.suffix in (".json", ".jsonl") else 1 for p in files])[0]
        kinds = [*IN_BYTES, *IN_FOLDER, "swap", *(["deep", *IN_JSON, *IN_JSON] if path.suffix in (".json", ".jsonl") else [])]
        kind: Any = rng.choice(kinds)
        name = kind if isinstance(kind, str) else kind.__name__
        if name in SEEN_BY_A_HASH_ALONE and _matches(home, path, unhashed):
            continue
        if _done(rng, kind, path, files, outside):
            return name, path


def _matches(home: Path, path: Path, patterns: Iterable[str]) -> bool:
    return any(fnmatch(path.relative_to(home).as_posix(), pattern) for pattern in patterns)


def _done(rng: random.Random, kind: Any, path: Path, files: list[Path], outside: Path) -> bool:
    if kind == "swap":
        like = [other for other in files if other != path and other.suffix == path.suffix]
        if not like:
            return False
        other = rng.choice(like)
        data = path.read_bytes()
        path.write_bytes(other.read_bytes())
        other.write_bytes(data)
    elif kind == "deep":
        path.write_bytes(DEEP)
    elif kind in IN_BYTES:
        path.write_bytes(kind(rng, path.read_bytes()))
    elif kind in IN_FOLDER:
        kind(rng, path, outside)
    else:
        return _changed(rng, kind, path)
    return True


def mutate_values(rng: random.Random, path: Path) -> str:
    """Change one value or key of a JSON file; what was done."""
    before = json.loads(path.read_text(encoding="utf-8"))
    kind = rng.choice([wrong_value, wrong_value, rename_key, delete_key])
    assert _changed(rng, kind, path)
    after = json.loads(path.read_text(encoding="utf-8"))
    differing = [f"{key}: {before.get(key)!r:.60} -> {after.get(key)!r:.60}" for key in {*before, *after} if repr(before.get(key)) != repr(after.get(key))]
    return f"{kind.__name__} ({', '.join(differing)})"


def _changed(rng: random.Random, kind: Callable[[random.Random, Any], Any], path: Path) -> bool:
    lines = path.read_text(encoding="utf-8").splitlines() if path.suffix == ".jsonl" else [path.read_text(encoding="utf-8")]
    at = rng.randrange(len(lines))
    tree = json.loads(lines[at])
    if not any(isinstance(holder, dict) for holder, _ in slots(tree)):
        return False
    changed = kind(rng, tree)
    lines[at] = json.dumps(tree if changed is None and kind is not other_root else changed)
    path.write_text("\n".join(lines), encoding="utf-8")
    return True


def told(value: Any) -> str:
    """A value as text that is equal for equal values: tensors and arrays by their bytes."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return f"{value.dtype}{tuple(value.shape)}{hashlib.sha256(value.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()}"
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{value.shape}{hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()}"
    if is_dataclass(value) and not isinstance(value, type):
        return told({field.name: getattr(value, field.name) for field in fields(value)})
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {told(value[key])}" for key in sorted(value, key=repr)) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(told, value)) + "]"
    return repr(value)
