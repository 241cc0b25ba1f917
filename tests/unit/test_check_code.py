"""tools/check_code.py finds each kind of fault on a small tree, and has nothing to say of a sound one."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vulture", reason="needs vulture: pip install 'limbeck[dev]'")
SCRIPT = runpy.run_path(str(Path(__file__).resolve().parents[2] / "tools" / "check_code.py"))
SOUND = {
    "pyproject.toml": '[tool.vulture]\nmin_confidence = 60\nignore_decorators = ["@*.register"]\n',
    "src/pack/__init__.py": "",
    "src/pack/types.py": '"""Legend: **B** batch, **T** tokens, **D** width."""\n',
    "src/pack/ops.py": '''"""Maths.  K kept ids."""

from torch import Tensor

Pair = tuple[Tensor, Tensor]


def suffixed(x_BTD: Tensor, ids_BTK: Tensor, *, mask_BT: Tensor | None = None) -> Tensor:
    """By the suffixes of the names, with letters of the legend and of the module."""
    return x_BTD + ids_BTK + mask_BT


def said(x: Tensor, y: list[Tensor], pair: Pair, odd: Tensor, size: Tensor) -> Tensor:
    """Of ``x [B, T, D]`` and ``y`` of shape ``[..., D]``.

    ``size`` is a scalar.

    Args:
        pair: two of
            ``[B, D]``.
        odd: of any shape.
    """
    return x + y + pair + odd + size


def the_same(x: Tensor) -> Tensor:
    """:func:`pack.ops.said`, faster."""
    return x
''',
    "src/pack/parts.py": '''"""Parts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pack.ops import said, suffixed, the_same


class Layer(Protocol):
    """What a layer does."""

    def run(self, x: Tensor, times: int) -> Tensor:
        """``x [B, D]`` to the same, ``times`` over."""
        ...


@dataclass
class Held:
    """What is held."""

    sum: Tensor
    """A scalar."""
    rows_BD: Tensor


class Base:
    """The first of them."""

    def __init__(self, start: Tensor):
        """``start [D]``."""
        self.held = Held(said(start), start)

    def step(self, x: Tensor) -> Tensor:
        """``x [B, D]`` to the same."""
        return suffixed(the_same(x), self.held.rows_BD, self.held.sum)


class Second(Base):
    """Overrides, and is a layer by what it has."""

    def step(self, x: Tensor) -> Tensor:
        return super().step(x)

    def run(self, x: Tensor, times: int) -> Tensor:
        return self.step(x) * times

    def _own(self, x: Tensor, call: Callable[[Tensor], Tensor]) -> None:
        self._own(call(x), call)
''',
    "src/pack/registry.py": '"""Names."""\n\nPARTS = {"layer": "pack.parts:Layer", "second": "pack.parts:Second"}\nRUN = "step run"\n',
    "examples/use.py": "from pack.parts import Base\nfrom pack.registry import PARTS, RUN\n\nprint(PARTS, RUN, Base(1).step(2), Base(3).run(4))\n",
    "tests/test_it.py": "from examples import use\n\n\ndef test_it(tmp_path):\n    assert use\n",
}
Change = Callable[[str], str]


def faults(root: Path, changes: dict[str, str | Change]) -> list[str]:
    """What the script says of the sound tree with some files changed or added: a whole text, or what to do to the one that is there."""
    for name, text in {**SOUND, **changes}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text if isinstance(text, str) else text(SOUND[name]), encoding="utf-8")
    found, _ = SCRIPT["check"](root)
    return [f"{one.path}:{one.line}: {one.text}" for one in found]


def instead(old: str, new: str) -> Change:
    """A change of one place."""

    def change(text: str) -> str:
        assert text.count(old) == 1, old
        return text.replace(old, new)

    return change


def test_a_sound_tree_has_no_faults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert faults(tmp_path, {}) == []
    assert SCRIPT["main"]([str(tmp_path)]) == 0
    assert capsys.readouterr().out == "7 files, no faults\n"


OPS, PARTS, USE = "src/pack/ops.py", "src/pack/parts.py", "examples/use.py"
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "a long file": ({"tests/long.py": "pass\n" * 601}, "tests/long.py:601: 601 lines, at most 600"),
    "no Python": ({"tests/broken.py": "def f(:\n"}, "tests/broken.py:1: invalid syntax"),
    "a function without a docstring": ({OPS: instead('    """:func:`pack.ops.said`, faster."""\n', "")}, "the_same has no docstring"),
    "a class without a docstring": ({PARTS: instead('    """What is held."""\n', "")}, "class Held has no docstring"),
    "a method without a docstring": (
        {PARTS: instead('        """``x [B, D]`` to the same."""\n', "")},
        "parts.py:36: Base.step has no docstring",
    ),
    "no protocol where the arguments differ": (
        {PARTS: instead("def run(self, x: Tensor, times: int) -> Tensor:\n        return", "def run(self, x: Tensor, often: int) -> Tensor:\n        return")},
        "Second.run has no docstring",
    ),
    "an argument without a type": ({OPS: instead("def the_same(x: Tensor)", "def the_same(x)")}, "the_same: x has no type"),
    "a tensor whose shape is not said": ({OPS: instead("``x [B, T, D]`` and", "x and")}, "said: the shape of x is not said"),
    "a shape that is another's": ({OPS: instead("``x [B, T, D]``", "x of the batch ``[B, T, D]``")}, "said: the shape of x is not said"),
    "a subscript is no shape": ({OPS: instead("``x [B, T, D]``", "``x[i]``")}, "said: the shape of x is not said"),
    "an entry without a shape": ({OPS: instead("odd: of any shape.", "odd: the rest.")}, "said: the shape of odd is not said"),
    "a container of tensors": ({OPS: instead("``[B, D]``.", "something.")}, "said: the shape of pair is not said"),
    "a list of tensors": ({OPS: instead(" and ``y`` of shape ``[..., D]``", "")}, "said: the shape of y is not said"),
    "a reference to nothing": ({OPS: instead(":func:`pack.ops.said`", "``said``")}, "the_same: the shape of x is not said"),
    "the arguments of __init__": ({PARTS: instead('        """``start [D]``."""\n', "")}, "Base.__init__: the shape of start is not said"),
    "a field of a class": ({PARTS: instead('    """A scalar."""\n', "")}, "Held: the shape of sum is not said"),
    "a letter that no legend has": ({OPS: instead("  K kept ids.", "")}, "ops.py:8: suffixed: ids_BTK: no legend says what K is"),
    "a shape does not explain its letters": ({OPS: instead("  K kept ids.", "  As ``[B, T, K]``.")}, "no legend says what K is"),
    "a function that nothing uses": (
        {OPS: lambda text: text + '\n\ndef idle() -> None:\n    """Nothing."""\n'},
        "unused function idle: delete it",
    ),
    "a function that only tests use": (
        {OPS: lambda text: text + '\n\ndef idle() -> None:\n    """Nothing."""\n', "tests/test_it.py": "from pack.ops import idle\n\nidle()\n"},
        "unused function idle: only tests use it",
    ),
    "a function of a name that others have": (
        {OPS: lambda text: text + '\n\ndef print() -> None:\n    """Another."""\n'},
        "unused function print: delete it",
    ),
    "a function that calls itself": (
        {OPS: lambda text: text + '\n\ndef idle() -> None:\n    """Itself."""\n    idle()\n'},
        "unused function idle: delete it",
    ),
    "a method that nothing uses": ({USE: instead(", Base(3).run(4)", ""), "src/pack/registry.py": instead(" run", "")}, "unused method run"),
    "a method of a name that variables have": (
        {PARTS: lambda text: text + '\n    def RUN(self) -> None:\n        """Nothing."""\n'},
        "unused method RUN: delete it",
    ),
    "an implementation that no registry names": ({"src/pack/registry.py": instead(', "second": "pack.parts:Second"', "")}, "unused class Second"),
    "a helper of the tests": ({"tests/test_it.py": "def helper():\n    pass\n"}, "tests/test_it.py:1: unused function helper: delete it"),
    "a name on the list that is used": ({"tools/vulture_names.py": 'NAMES = {"others": "said"}\n'}, "tools/vulture_names.py:1: said is used"),
}


@pytest.mark.parametrize("title", CASES)
def test_each_fault_is_found_with_its_place(title: str, tmp_path: Path) -> None:
    changes, words = CASES[title]
    found = faults(tmp_path, changes)
    assert any(words in line for line in found), found


NO_FAULT: dict[str, dict[str, Any]] = {
    "a name on the list": {OPS: lambda text: text + '\n\ndef idle() -> None:\n    """Nothing."""\n', "tools/vulture_names.py": 'NAMES = {"others": "idle"}\n'},
    "an example of the documentation": {
        OPS: lambda text: text + '\n\ndef shown() -> None:\n    """For users."""\n',
        "docs/page.md": "Do:\n\n```python\nfrom pack.ops import shown\n\nshown()\n```\n",
    },
    "what a module says it offers": {OPS: lambda text: text + '\n\n__all__ = ["said", "shown"]\n\n\ndef shown() -> None:\n    """For users."""\n'},
    "what a message tells users to name": {
        OPS: lambda text: text + '\n\ndef shown() -> None:\n    """For users."""\n',
        USE: lambda text: text + 'print("set context to pack.ops.shown")\n',
    },
    "what a decorator registers": {OPS: lambda text: text + '\n\n@suffixed.register("x")\ndef shown() -> None:\n    """By its decorator."""\n'},
    "fixtures, taken, named and by themselves": {
        "tests/test_more.py": (
            "import pytest\n\n\n@pytest.fixture\ndef one():\n    return 1\n\n\n@pytest.fixture\ndef two():\n    return 2\n\n\n"
            "@pytest.fixture(autouse=True)\ndef three():\n    return 3\n\n\n@pytest.mark.usefixtures('two')\ndef test_more(one):\n    assert True\n"
        )
    },
}


@pytest.mark.parametrize("title", NO_FAULT)
def test_what_looks_like_a_fault_and_is_none(title: str, tmp_path: Path) -> None:
    assert faults(tmp_path, NO_FAULT[title]) == []


def test_faults_are_lines_with_their_place_and_the_way_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faults(tmp_path, CASES["a field of a class"][0])
    assert SCRIPT["main"]([str(tmp_path)]) == 1
    line, summary = capsys.readouterr().out.splitlines()
    assert line == f"{PARTS}:24: Held: the shape of sum is not said: end its name in it (x_BTD), or write ``sum [B, T, D]``"
    assert summary == "7 files, 1 fault"
