"""Names in a recipe -> options classes -> implementations.

A part (mixer, teacher, objective, surgery, source, stage ...) is an options class, light enough for ``check`` and ``ls``,
and an implementation that may import torch.  Built-in options name theirs as ``"module:Class"``, imported when it is built; a
plug-in may hand over the class itself.

    @MIXERS.register("my_package.mixers:MyMixer")      # built-in style: resolved late
    class MyMixerOptions(Part):
        kind: Literal["my_mixer"] = "my_mixer"

    MIXERS.add(MyMixerOptions, MyMixer)                # plug-in style: options and class in one file
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Any, get_args

from limbeck.errors import LimbeckError, did_you_mean

if TYPE_CHECKING:
    from pydantic import BaseModel

REGISTRIES: dict[str, Registry] = {}
"""Every registry by the word that ``limbeck ls`` takes."""


class Registry:
    """The known parts of one kind, by the name a recipe uses for them."""

    def __init__(self, kind: str):
        self.kind = kind
        self._options: dict[str, type[BaseModel]] = {}
        self._implementations: dict[str, str | type] = {}
        REGISTRIES[kind] = self

    def add(self, options: type[BaseModel], implementation: str | type) -> None:
        """Make ``options.kind`` a known name.  A name taken by a *different* class is an error, not an overwrite."""
        field = options.model_fields.get("kind")
        names = get_args(field.annotation) if field else ()
        if not names:
            raise LimbeckError(f"{options.__name__}: an options class needs a field `kind: Literal['name'] = 'name'`")
        for name in names:
            held = self._options.get(name)
            if held is not None and (held.__module__, held.__qualname__) != (options.__module__, options.__qualname__):
                raise LimbeckError(
                    f"{self.kind} '{name}' is already registered by {held.__module__}.{held.__qualname__}; "
                    f"{options.__module__}.{options.__qualname__} needs another `kind`"
                )
            self._options[name] = options
            self._implementations[name] = implementation

    def register(self, implementation: str) -> Callable[[type], type]:
        """Decorator form of :meth:`add` for options classes that name their implementation."""

        def decorate(options: type) -> type:
            self.add(options, implementation)
            return options

        return decorate

    def options(self, name: str) -> type[BaseModel]:
        """The options class of a name; unknown names raise with the nearest known ones."""
        if name not in self._options:
            known = ", ".join(self)
            raise LimbeckError(f"unknown {self.kind} '{name}'{did_you_mean(name, self) or ';'} known: {known}")
        return self._options[name]

    def implementation(self, name: str) -> type:
        """Import and return what a name stands for."""
        self.options(name)
        target = self._implementations[name]
        if isinstance(target, str):
            module, _, attribute = target.partition(":")
            target = getattr(import_module(module), attribute)
        return target

    def build(self, options: Any, *args: Any, **kwargs: Any) -> Any:
        """``implementation(options, *args, **kwargs)`` for a validated options object."""
        return self.implementation(options.kind)(options, *args, **kwargs)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._options))

    def __contains__(self, name: object) -> bool:
        return name in self._options
