"""Files that are there whole or not at all, and their hashes.  Tiny; everything may use it."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Force a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old text or the new, never half."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    fsync(path.parent)


def put_in_place(beside: Path, folder: Path) -> None:
    """Give a finished folder the name of another, which it replaces; a reader sees the old one, none for a moment, or the new one."""
    for path in (*sorted(beside.rglob("*")), beside):
        fsync(path)
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.is_symlink():
        # What it points to is somebody's own.
        folder.unlink()
    if folder.exists():
        folder.rename(old)
    beside.rename(folder)
    fsync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def same_files(origin: Path, folder: Path) -> None:
    """A folder with the files of another, complete or not there.

    Tensors (`.safetensors`), which nothing changes in place, are one file with two names where the file system has that; the rest is
    copied, so that an edited config does not damage what it came from.
    """
    beside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(origin, beside, copy_function=_link)
    put_in_place(beside, folder)


def _link(source: str, target: str) -> str:
    if source.endswith(".safetensors"):
        try:
            os.link(source, target)
            return target
        except OSError:
            pass  # another disk, or a file system without such names
    return str(shutil.copy2(source, target))


def inside(folder: Path, name: object) -> Path | None:
    """The file that a name from a file or a request means below a folder; None for one that is no name, or leads out of it."""
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
        return None
    parts = PurePosixPath(name).parts
    return None if not parts or ".." in parts or parts[0].startswith("/") else folder / name


def listing(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of every file below a folder, by its path in it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): (path.stat().st_size, sha256(path)) for path in paths}


def damage(folder: Path, files: Mapping[str, tuple[int, str]], *, verify: bool) -> str | None:
    """What is wrong with the listed files of a folder, or None; contents are read with ``verify``."""
    for name, (size, digest) in files.items():
        file = inside(folder, name)
        if file is None:
            return f"{folder}: its list of files names {name!r:.80}, which is not in this folder"
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            return f"{file}: is missing" if found is None else f"{file}: has {found} bytes instead of {size}"
        if verify and sha256(file) != digest:
            return f"{file}: its content is not what was written (SHA-256 differs)"
    return None
