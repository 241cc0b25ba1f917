"""Packages that are not always installed.  Tiny, no torch; everything may use it."""

from __future__ import annotations

from importlib.util import find_spec

from limbeck.errors import LimbeckError


def need(who: str, extra: str, *packages: str) -> None:
    """Say what is not installed before anything heavy is imported.

    Raises:
        LimbeckError: which packages ``who`` (a verb as it is typed) lacks, and the extra of ours that brings them.
    """
    absent = [package for package in packages if find_spec(package) is None]
    if absent:
        raise LimbeckError(f"{who} needs {', '.join(absent)}: pip install 'limbeck[{extra}]'")
