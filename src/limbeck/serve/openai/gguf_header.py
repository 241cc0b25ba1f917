"""What a GGUF file says of itself, read without the model: numbers, strings and the lengths of its lists."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

from limbeck.errors import ModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""``struct`` formats of the plain types, by their number in the file."""


class _Reader:
    def __init__(self, data: mmap.mmap):
        self._data = data
        self.at = 0

    def plain(self, form: str) -> Any:
        (value,) = struct.unpack_from("<" + form, self._data, self.at)
        self.at += struct.calcsize(form)
        return value

    def string(self) -> bytes:
        size = self.plain("Q")
        if size > len(self._data) - self.at:
            raise ValueError(f"a string of {size} bytes")
        self.at += size
        return self._data[self.at - size : self.at]

    def value(self, kind: int) -> Any:
        """A value of a key; of a list its length."""
        if kind == STRING:
            return self.string().decode("utf-8", "replace")
        if kind != ARRAY:
            return self.plain(FORMATS[kind])
        inner, count = self.plain("I"), self.plain("Q")
        if inner in FORMATS:
            self.at += count * struct.calcsize(FORMATS[inner])
        else:
            for _ in range(count):
                _ = self.string() if inner == STRING else self.value(inner)
        return count


def read_header(path: Path) -> dict[str, Any]:
    """Keys and values of a file's header; a list is given as its length.

    Raises:
        ModelError: no file, or not the beginning of a GGUF file.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:4] != MAGIC:
                raise ModelError(f"{path}: is no GGUF file (it begins with {bytes(data[:4])!r}): export one with `limbeck export --to gguf`")
            reader = _Reader(data)
            reader.at = len(MAGIC)
            version = reader.plain("I")
            if version not in VERSIONS:
                raise ModelError(f"{path}: GGUF version {version}, and {' and '.join(map(str, VERSIONS))} can be read")
            _, keys = reader.plain("Q"), reader.plain("Q")
            return {reader.string().decode(): reader.value(reader.plain("I")) for _ in range(keys)}
    except ModelError:
        raise
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, struct.error, KeyError, RecursionError, OverflowError) as error:
        raise ModelError(f"{path}: is cut off or damaged ({error}): export or copy it again") from error
