"""Fail on Python files over 600 lines: a file must fit in the head."""

from __future__ import annotations

import sys
from pathlib import Path

LIMIT = 600


def main() -> int:
    """Print the files over the limit; the exit code is 1 if there are any."""
    root = Path(__file__).resolve().parent.parent
    folders = ("src", "tests", "benchmarks", "experiments", "tools")
    files = [path for folder in folders for path in sorted((root / folder).rglob("*.py"))]
    long = {path: lines for path in files if (lines := len(path.read_text(encoding="utf-8").splitlines())) > LIMIT}
    for path, lines in long.items():
        print(f"{path.relative_to(root)}: {lines} lines, at most {LIMIT} are allowed: split it by idea")
    print(f"{len(files)} files, {len(long)} over {LIMIT} lines")
    return 1 if long else 0


if __name__ == "__main__":
    sys.exit(main())
