"""Fail on what the style asks of code and no other tool looks for.

    python tools/check_code.py [ROOT]

* **Size**: a Python file has at most 600 lines.
* **Docstrings**: in ``src``, every public class and function and every public method of a public class has one.  Public is a name
  without a leading underscore, at module level or in a public class; properties and ``__call__`` count, other dunder methods
  and overloads do not (``__init__`` is described by its class).  A method inherits the docstring of the method that it
  overrides, and of the protocol whose methods its class has with the same arguments.
* **Shapes**: every tensor that such a function (or ``__init__``) takes, by itself or in a container, and every tensor field of a
  public class says its shape.  Either by the suffix of its name (``hidden_BTD``: each letter is in the legend of ``types.py``, or
  is explained as a word of its own in the docstring of the function, its class or its module), or where the docstring of the
  function, its class or an inherited one names it: followed by the shape (````mask`` ``[B, T]````, ````x [..., D]````), in
  an ``Args:`` entry that holds a shape, or in a sentence with the words "scalar" or "any shape".  ``...`` and ``*`` are dimensions
  too.  A docstring that is the same as another function's may refer to it: ``:func:`name``` or ``:meth:`name``` brings the
  shapes that it says of arguments of the same names.
* **Use**: what ``src`` defines is used by ``src``, ``tools``, ``benchmarks``, ``experiments``, ``examples``, a Python example of the
  documentation or an ``__all__``, and what the others define is used anywhere.  What only tests use is dead.  vulture takes a name
  for used wherever it stands (settings in ``pyproject.toml``); beyond that, what a module of ``src`` defines and does not use is
  imported somewhere, and a method is reached by a dot.  Names in strings count: ``"module:Class"`` of a registry, a dotted name that
  a message tells users.  Names that others' code calls are listed, with who does, in ``tools/vulture_names.py``; a name there that is
  not needed is a fault too.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import re
import runpy
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from vulture import Vulture

LINES = 600
FOLDERS = ("src", "tests", "tools", "benchmarks", "experiments", "examples")
NAMES = "tools/vulture_names.py"
Definition = ast.FunctionDef | ast.AsyncFunctionDef

SUFFIX = re.compile(r"_((?=[^_]*[A-Z])[A-Z0-9n]+|n)$")
SHAPE = r"\[(?:[\w*.+/! -]+(?:,\s*[\w*.+/! -]+)*)?\]"
"""``[B, T]``, ``[..., 2 rows, 2]``, ``[rows * length, W]``: what a docstring writes for a shape."""
REFERENCE = re.compile(r":(?:func|meth|class):`~?([\w.]+)`")
NAMED = re.compile(r"\b([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)([:.])([A-Za-z_]\w*)")
"""``package.module:Class`` of a registry, ``package.module.function`` of a message to users."""
DUNDER = re.compile(r"__\w+__")
EXAMPLE = re.compile(r"```python\n(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Fault:
    """One line of the report."""

    path: str
    line: int
    text: str


@dataclass
class Class:
    """A class of the package, as its text has it."""

    name: str
    module: str
    node: ast.ClassDef
    bases: list[str]
    methods: dict[str, Definition] = field(default_factory=dict)


class Package:
    """The parsed files of ``src`` and what they define, by name."""

    def __init__(self, root: Path, files: list[Path]):
        self.root = root
        self.modules = {path.relative_to(root).as_posix(): parsed(path.read_text(encoding="utf-8")) for path in files}
        self.classes: dict[str, list[Class]] = {}
        self.functions: dict[str, list[Definition]] = {}
        self.tensors = {"Tensor"}
        """Names of annotations that hold tensors: the type and the aliases of its containers."""
        for module, tree in self.modules.items():
            for node in members(tree):
                if isinstance(node, ast.ClassDef):
                    self._add(module, node)
                elif isinstance(node, Definition):
                    self.functions.setdefault(node.name, []).append(node)
                elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and self.holds_tensors(node.value):
                    self.tensors.add(node.targets[0].id)
        self.protocols = [one for named in self.classes.values() for one in named if "Protocol" in one.bases]
        legend = next((tree for module, tree in self.modules.items() if module.count("/") == 2 and module.endswith("/types.py")), None)
        self.legend = set(re.findall(r"\*\*(\w)\*\*", docstring(legend))) if legend else set()

    def _add(self, module: str, node: ast.ClassDef) -> None:
        bases = [ast.unparse(base.value if isinstance(base, ast.Subscript) else base).rpartition(".")[2] for base in node.bases]
        found = Class(node.name, module, node, bases)
        for child in members(node):
            if isinstance(child, ast.ClassDef):
                self._add(module, child)
            elif isinstance(child, Definition):
                found.methods[child.name] = child
        self.classes.setdefault(node.name, []).append(found)

    def holds_tensors(self, annotation: ast.expr | None) -> bool:
        """Whether an annotation is a tensor or a container of tensors; a function of tensors is neither."""
        if annotation is None:
            return False
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            return bool(self.tensors & set(re.findall(r"\w+", annotation.value)))
        if isinstance(annotation, ast.Name):
            return annotation.id in self.tensors
        if isinstance(annotation, ast.Attribute):
            return annotation.attr in self.tensors
        if isinstance(annotation, ast.Subscript):
            holder = ast.unparse(annotation.value).rpartition(".")[2]
            if holder in ("Callable", "type", "Literal"):
                return False
            if holder == "Annotated" and isinstance(annotation.slice, ast.Tuple):
                return self.holds_tensors(annotation.slice.elts[0])
        return any(self.holds_tensors(child) for child in ast.iter_child_nodes(annotation) if isinstance(child, ast.expr))

    def ancestors(self, of: Class, seen: frozenset[str] = frozenset()) -> Iterator[Class]:
        """The classes of the package that a class derives from, nearest first; of several of one name, that of the same file."""
        for base in of.bases:
            named = self.classes.get(base, [])
            if base not in seen:
                for one in [one for one in named if one.module == of.module and one is not of] or named:
                    yield one
                    yield from self.ancestors(one, seen | {base})

    def stand_ins(self, of: Class, method: str) -> list[Definition]:
        """The methods that a method overrides or that a protocol, whose methods its class has, says."""
        above = list(self.ancestors(of))
        has: dict[str, Definition] = {}
        for one in [*reversed(above), of]:
            has.update(one.methods)
        said = [one for one in self.protocols if one is not of and method in one.methods and one.methods.keys() <= has.keys()]
        said = [one for one in said if all(arguments(part) == arguments(has[name]) for name, part in one.methods.items())]
        return [one.methods[method] for one in [*above, *said] if method in one.methods]


@cache
def parsed(text: str) -> ast.Module:
    """The tree of a file's text."""
    return ast.parse(text)


def members(node: ast.Module | ast.ClassDef | ast.stmt) -> Iterator[ast.stmt]:
    """The statements of a body, with those under its conditions."""
    for child in getattr(node, "body", []):
        if isinstance(child, ast.If | ast.Try):
            yield from members(child)
        else:
            yield child


def docstring(node: ast.Module | ast.ClassDef | Definition) -> str:
    """The docstring, cleaned, or nothing."""
    return ast.get_docstring(node) or ""


def arguments(function: Definition) -> list[str]:
    """The names of the positional arguments."""
    return [one.arg for one in (*function.args.posonlyargs, *function.args.args)]


def parameters(function: Definition) -> list[ast.arg]:
    """All arguments."""
    args = function.args
    return [one for one in (*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg) if one is not None]


def is_overload(function: Definition) -> bool:
    """Whether a definition only says a type."""
    return any(ast.unparse(one).rpartition(".")[2] == "overload" for one in function.decorator_list)


def unreadable(root: Path, files: list[Path]) -> Iterator[Fault]:
    """Files that are no Python: nothing can be said of the others before they are."""
    for path in files:
        try:
            parsed(path.read_text(encoding="utf-8"))
        except SyntaxError as error:
            yield Fault(path.relative_to(root).as_posix(), error.lineno or 1, f"{error.msg}: Python cannot read it")


# Sizes


def sizes(root: Path, files: list[Path]) -> Iterator[Fault]:
    """Files that do not fit in the head."""
    for path in files:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > LINES:
            yield Fault(path.relative_to(root).as_posix(), lines, f"{lines} lines, at most {LINES} are allowed: split it by idea")


# Docstrings and shapes


def documentation(package: Package) -> Iterator[Fault]:
    """What is public and says nothing, and tensors whose shape is not said."""
    for module, tree in package.modules.items():
        for node in members(tree):
            if isinstance(node, Definition):
                yield from _function(package, module, node, None, docstring(tree))
            elif isinstance(node, ast.ClassDef):
                owner = next(one for one in package.classes[node.name] if one.node is node)
                yield from _class(package, module, owner, docstring(tree))


def _class(package: Package, module: str, owner: Class, above: str) -> Iterator[Fault]:
    if owner.name.startswith("_"):
        return
    if not docstring(owner.node):
        yield Fault(module, owner.node.lineno, f"class {owner.name} has no docstring: say what it is and what its fields hold")
    texts = [docstring(owner.node), *(docstring(one.node) for one in package.ancestors(owner))]
    body = list(members(owner.node))
    for node, behind in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, Definition):
            yield from _function(package, module, node, owner, above)
        elif isinstance(node, ast.ClassDef):
            inner = next(one for one in package.classes[node.name] if one.node is node)
            yield from _class(package, module, inner, above)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and package.holds_tensors(node.annotation):
            # The string under a field describes it, and it alone.
            under = ""
            if isinstance(behind, ast.Expr) and isinstance(behind.value, ast.Constant) and isinstance(behind.value.value, str):
                under = behind.value.value
            if not node.target.id.startswith("_"):
                yield from _tensor(package, module, node.target.id, node.lineno, owner.name, texts, [*texts, above], under)


def _function(package: Package, module: str, node: Definition, owner: Class | None, above: str) -> Iterator[Fault]:
    if is_overload(node) or (node.name.startswith("_") and node.name not in ("__call__", "__init__")):
        return
    name = f"{owner.name}.{node.name}" if owner else node.name
    inherited = [text for one in package.stand_ins(owner, node.name) if (text := docstring(one))] if owner else []
    own = docstring(node)
    if not own and not inherited and node.name != "__init__":
        yield Fault(module, node.lineno, f"{name} has no docstring: say what it gives, in what shape and unit, and what it raises")
    texts = [own, *inherited, *([docstring(owner.node)] if owner else [])]
    for reference in REFERENCE.findall(own):
        texts += _referred(package, reference)
    for one in parameters(node):
        if one.annotation is None and one.arg not in ("self", "cls", "ctx"):
            yield Fault(module, one.lineno, f"{name}: {one.arg} has no type: nothing tells whether it is a tensor")
        if package.holds_tensors(one.annotation):
            yield from _tensor(package, module, one.arg, one.lineno, name, texts, [*texts, above], "")


def _referred(package: Package, reference: str) -> list[str]:
    *before, last = reference.split(".")
    found: list[ast.ClassDef | Definition] = []
    for one in package.classes.get(before[-1], []) if before else []:
        found += [method for name, method in one.methods.items() if name == last]
    found = found or [*package.functions.get(last, []), *(one.node for one in package.classes.get(last, []))]
    return [text for one in found for text in (docstring(one), *(suffixed(one) if isinstance(one, Definition) else ()))]


def suffixed(function: Definition) -> list[str]:
    """What the names of a function's arguments say of their shapes, as a docstring would: ``q_BTHK`` is ``q [B, T, H, K]``."""
    return [f"{one.arg[: found.start()]} [{', '.join(found[1])}]" for one in parameters(function) if (found := SUFFIX.search(one.arg))]


def _tensor(
    package: Package, module: str, name: str, line: int, where: str, texts: list[str], legends: list[str], under: str
) -> Iterator[Fault]:
    suffix = SUFFIX.search(name)
    if suffix:
        letters = sorted({letter for letter in suffix[1] if not letter.isdigit()} - package.legend)
        # A letter in a shape is not its own explanation.
        words_of = re.sub(SHAPE, "", " ".join([*legends, under]))
        unknown = [letter for letter in letters if not re.search(rf"(?<![A-Za-z]){letter}(?![A-Za-z])", words_of)]
        if unknown:
            listed = " and ".join(unknown)
            yield Fault(module, line, f"{where}: {name}: no legend says what {listed} is: explain it in the docstring")
    elif not re.search(rf"{SHAPE}|scalar|any shape", under) and not any(says_shape(text, name) for text in texts):
        yield Fault(module, line, f"{where}: the shape of {name} is not said: end its name in it (x_BTD), or write ``{name} [B, T, D]``")


def says_shape(text: str, name: str) -> bool:
    """Whether a docstring says the shape of an argument."""
    if name not in text:
        return False
    entry = re.search(rf"^[ \t]*\*{{0,2}}{name}: (.*(?:\n(?:[ \t]{{5,}}.*)?)*)", text, re.MULTILINE)
    if entry and re.search(rf"``[^`]*{SHAPE}|scalar|any shape", entry[1]):
        return True
    flat = " ".join(text.split())
    word = rf"(?<![\w.]){name}(?![\w(=])"
    # The name, at most a subscript of its own, and then the shape.
    if re.search(rf"{word}(?:\[[\w.]+\])?(?:``)?(?: |, | is | are | of shape )(?:``)?(?:\{{\w+: )?{SHAPE}", flat):
        return True
    entries = re.split(r"\n(?=[ \t]+\*{0,2}\w+: )", text)
    sentences = [one for entry in entries for one in re.split(r"(?<=[.!?:;])\s+(?=[A-Z`*])", " ".join(entry.split()))]
    return any(re.search(word, one) and re.search(r"\bscalars?\b|\bany shapes?\b", one) for one in sentences)


# Use


@dataclass(frozen=True, order=True)
class Unused:
    """A definition that nothing names."""

    path: Path
    line: int
    name: str
    kind: str


class Names:
    """What files define and use: by vulture, to which a name is used wherever it stands, and by imports, which are exact."""

    def __init__(self, package: Package, settings: dict[str, Any]):
        self.confidence = settings["min_confidence"]
        self.vulture = Vulture(ignore_decorators=settings["ignore_decorators"])
        self.imported: set[tuple[str, str]] = set()
        """``(module, name)`` of imports, of modules' attributes and of names in strings."""
        self.modules = {dotted(module) for module in package.modules}
        self.handed_on = {
            (dotted(module), name): Unused(package.root / module, line, name, kind)
            for module, tree in package.modules.items()
            for line, name, kind in unused_beside(tree, settings["ignore_decorators"])
        }
        """What stands in a module and is not used there: others must import it."""
        self.methods = [
            Unused(package.root / one.module, method.lineno, name, "method")
            for named in package.classes.values()
            for one in named
            for name, method in one.methods.items()
            if not is_handed_on(method, settings["ignore_decorators"])
        ]
        self.reached: set[str] = set()
        """Attributes, and strings that may name one."""

    def read(self, text: str, path: Path) -> None:
        """Take in a file, or an example of the documentation."""
        self.vulture.scan(text, filename=path)
        used, tree = self.vulture.used_names, parsed(text)
        nodes = list(ast.walk(tree))
        prose = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        self.reached |= attributes
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.module:
                self.imported |= {(node.module, one.name) for one in node.names}
                # Where the name is a module, what is taken out of it.
                modules = {f"{node.module}.{one.name}" for one in node.names} & self.modules
                self.imported |= {(module, attribute) for module in modules for attribute in attributes}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
                named = {(module, name) for module, sign, name in NAMED.findall(node.value) if sign == ":" or module in self.modules}
                self.imported |= named
                used.update(name for _, name in named)
                self.reached.add(node.value)
                if node.value in self.modules:
                    self.imported |= {(node.value, attribute) for attribute in attributes}
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "usefixtures":
                used.update(one.value for one in node.args if isinstance(one, ast.Constant))
            elif isinstance(node, ast.FunctionDef) and (node.decorator_list or node.name.startswith("test")):
                # What a test or a fixture takes is a fixture; one may run by itself.
                decorators = " ".join(map(ast.unparse, node.decorator_list))
                if "fixture" in decorators or node.name.startswith("test"):
                    used.update(arguments(node))
                if "autouse=True" in decorators:
                    used.add(node.name)

    def unused(self) -> set[Unused]:
        """What no file so far names; and what none imports or reaches by a dot, however often others have the same name."""
        found = self.vulture.get_unused_code(min_confidence=self.confidence)
        never = [one for place, one in self.handed_on.items() if place not in self.imported]
        never += [one for one in self.methods if one.name not in self.reached]
        return {*never, *(Unused(Path(one.filename), one.first_lineno, one.name, one.typ) for one in found)}


def dotted(module: str) -> str:
    """The name by which a file of ``src`` is imported."""
    return module.removeprefix("src/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def unused_beside(tree: ast.Module, ignored: list[str]) -> Iterator[tuple[int, str, str]]:
    """Line, name and kind of a module's functions, classes and variables that nothing else in it uses, and no decorator hands on."""
    used = Counter(words(tree))
    for node in members(tree):
        names: list[tuple[str, str]] = []
        if isinstance(node, Definition | ast.ClassDef):
            if not is_handed_on(node, ignored):
                names = [(node.name, "class" if isinstance(node, ast.ClassDef) else "function")]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [(one.id, "variable") for target in targets for one in ast.walk(target) if isinstance(one, ast.Name)]
        own = Counter(words(node))
        yield from ((node.lineno, name, kind) for name, kind in names if used[name] == own[name])


def is_handed_on(node: Definition | ast.ClassDef, ignored: list[str]) -> bool:
    """Whether a decorator gives a definition to what calls it."""
    decorators = ["@" + ast.unparse(one.func if isinstance(one, ast.Call) else one) for one in node.decorator_list]
    return any(fnmatchcase(one, pattern) for one in decorators for pattern in ignored)


def words(node: ast.AST) -> Iterator[str]:
    """Names, and strings that may be names, as those of an ``__all__``."""
    for one in ast.walk(node):
        if isinstance(one, ast.Name):
            yield one.id
        elif isinstance(one, ast.Constant) and isinstance(one.value, str):
            yield one.value


def unused(root: Path, package: Package, files: list[Path]) -> Iterator[Fault]:
    """What is defined and not used."""
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["vulture"]
    listed = root / NAMES
    groups: dict[str, str] = runpy.run_path(str(listed))["NAMES"] if listed.exists() else {}
    kept = {name for group in groups.values() for name in group.split()}
    names = Names(package, settings)
    for page in (root / "README.md", *sorted((root / "docs").rglob("*.md"))):
        for example in EXAMPLE.findall(page.read_text(encoding="utf-8")) if page.exists() else []:
            # One that is no whole program shows no use.
            with contextlib.suppress(SyntaxError):
                parsed(example)
                names.read(example, page)

    def after(some: Iterable[Path]) -> set[Unused]:
        for path in some:
            names.read(path.read_text(encoding="utf-8"), path)
        return {one for one in names.unused() if one.path in known and not DUNDER.fullmatch(one.name)}

    known, tests = set(files) - {listed}, root / "tests"
    without_tests = after(path for path in files if not path.is_relative_to(tests))
    nowhere = after(path for path in files if path.is_relative_to(tests))
    by_tests = {one for one in without_tests - nowhere if one.path.is_relative_to(root / "src")}
    seen: set[tuple[Path, str]] = set()
    for one in sorted(nowhere | by_tests):
        if one.name in kept or (one.path, one.name) in seen:
            continue
        seen.add((one.path, one.name))
        way = "delete it" if one in nowhere else "only tests use it: delete it with them, or show its use in docs/"
        yield Fault(one.path.relative_to(root).as_posix(), one.line, f"unused {one.kind} {one.name}: {way}")
    for name in sorted(kept - {one.name for one in nowhere | by_tests}):
        yield Fault(NAMES, 1, f"{name} is used, or nothing has that name: take it off the list")


def check(root: Path) -> tuple[list[Fault], int]:
    """All faults of a tree, and the number of its files."""
    files = [path for folder in FOLDERS for path in sorted((root / folder).rglob("*.py"))]
    broken = list(unreadable(root, files))
    if broken:
        return broken, len(files)
    package = Package(root, [path for path in files if path.is_relative_to(root / "src")])
    return [*sizes(root, files), *documentation(package), *unused(root, package, files)], len(files)


def main(argv: list[Any]) -> int:
    """Print the faults, one a line; the exit code is 1 if there are any."""
    root = Path(argv[0]).resolve() if argv else Path(__file__).resolve().parent.parent
    faults, files = check(root)
    for one in faults:
        print(f"{one.path}:{one.line}: {one.text}")
    print(f"{files} files, {len(faults) or 'no'} fault{'s' * (len(faults) != 1)}")
    return 1 if faults else 0


if __name__ == "__main__":
    # The trees of all files live to the end: looking again and again for what could be freed among them takes half the time.
    gc.disable()
    sys.exit(main(sys.argv[1:]))
