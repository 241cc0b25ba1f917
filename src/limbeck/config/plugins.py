"""Third parties' parts: entry points of the group ``limbeck.plugins``, and the modules or files that a recipe names."""

from __future__ import annotations

import hashlib
import sys
import traceback
from functools import cache
from importlib import import_module, util
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from limbeck.errors import LimbeckError

GROUP = "limbeck.plugins"


@cache
def load_entry_points() -> tuple[str, ...]:
    """Import every installed plug-in once; returns their names.  One that fails is an error that names its distribution."""
    names = []
    for point in entry_points(group=GROUP):
        origin = f"plug-in {point.name!r} of the installed package {point.dist.name if point.dist else point.value!r}"
        _guarded(origin, None, point.load)
        names.append(point.name)
    return tuple(names)


def load_plugin(name: str, base_dir: Path) -> None:
    """Import a module by its name, or a ``.py`` file beside the recipe; what it registers is known afterwards."""
    if name.endswith(".py"):
        path = (base_dir / name).expanduser().resolve()
        if not path.is_file():
            raise LimbeckError(f"plug-in file {name!r} does not exist: looked for {path}; name it as it lies beside the recipe")
        _guarded(f"plug-in file {name!r}", path, lambda: _import_file(path))
    else:
        _guarded(f"plug-in module {name!r}", None, lambda: import_module(name))


def _import_file(path: Path) -> ModuleType:
    """Import a file under a module name made from its path; a file that changed is imported anew."""
    source = path.read_bytes()
    name = f"limbeck_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    digest = hashlib.sha256(source).hexdigest()
    held = sys.modules.get(name)
    if held is not None and getattr(held, "__limbeck_digest__", None) == digest:
        return held
    spec = util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        # Compiled here, not by the loader: its cache goes by the time stamp and misses two edits within one second.
        exec(compile(source, str(path), "exec"), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    module.__dict__["__limbeck_digest__"] = digest
    return module


def _guarded(what: str, path: Path | None, load: object) -> None:
    """Run an import; whatever a stranger's module throws becomes one line that says what, where and why."""
    try:
        load()  # type: ignore[operator]
    except LimbeckError as error:
        raise LimbeckError(f"{what}: {error}") from error
    except (Exception, SystemExit) as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if path is not None and f.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else frames[-1].lineno if frames else None
        place = f" (line {line})" if line else ""
        raise LimbeckError(f"{what} cannot be imported: {type(error).__name__}: {error}{place}") from error
