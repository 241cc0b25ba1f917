"""The base of every options class, and the field types that recipes use.

``extra=forbid``, frozen, and a field's docstring is its help text: it is what ``limbeck init`` writes as a comment,
``limbeck explain`` prints and the JSON schema carries.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError, core_schema

from limbeck.errors import did_you_mean
from limbeck.needs import Need
from limbeck.registry import Registry


class Options(BaseModel):
    """A frozen mapping of a recipe: unknown keys are errors, attribute docstrings are the help."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        populate_by_name=True,
        protected_namespaces=(),
        validate_default=True,
    )


class Part(Options):
    """Options of something that is chosen by its ``kind`` from a registry."""

    kind: str
    """Which one."""

    def needs(self) -> tuple[Need, ...]:
        """What this part needs from the teacher (objectives)."""
        return ()

    def provides(self, need: Need) -> bool | str:
        """Whether this part answers a need, or the reason why it does not (teachers)."""
        return f"{self.kind!r} does not provide {type(need).__name__}"


class PartOf:
    """Annotation: a mapping whose ``kind`` picks its options class from a registry, when it is validated.

    ``mixer: Annotated[Any, PartOf(MIXERS)]``; ``default`` is the kind when a mapping names none.
    """

    def __init__(self, registry: Registry, default: str | None = None):
        self.registry = registry
        self.default = default

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        def validate(value: Any) -> Any:
            if isinstance(value, Part):
                return value
            if isinstance(value, str):
                value = {"kind": value}
            if not isinstance(value, dict):
                raise PydanticCustomError(
                    "part_type", "must be a mapping with a `kind` (or just its name): {known}", {"known": self._known()}
                )
            kind = value.get("kind", self.default)
            if kind is None:
                raise PydanticCustomError("part_kind_missing", "needs a `kind`: one of {known}", {"known": self._known()})
            if not isinstance(kind, str) or kind not in self.registry:
                raise PydanticCustomError(
                    "part_kind",
                    "unknown {what} {kind}{hint} allowed: {known}",
                    {
                        "what": self.registry.kind,
                        "kind": _short(repr(kind)),
                        "hint": did_you_mean(str(kind), self.registry) or ";",
                        "known": self._known(),
                    },
                )
            return self.registry.options(kind).model_validate({**value, "kind": kind})

        def dump(part: Part) -> dict[str, Any]:
            return part.model_dump(mode="json", by_alias=True)

        return core_schema.no_info_plain_validator_function(
            validate, serialization=core_schema.plain_serializer_function_ser_schema(dump)
        )

    def __get_pydantic_json_schema__(self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """One ``$ref`` for each registered part, told apart by ``kind``; a bare name stands for a part with its defaults."""
        references = {}
        for name in self.registry:
            cls = self.registry.options(name)
            schema = _named(cls)
            if cls in _under_way:
                # A part that holds parts of its own registry (a teacher in a teacher): its definition is being made above.
                references[name] = handler(core_schema.definition_reference_schema(schema["schema"].get("ref") or schema["schema"]["schema_ref"]))
                continue
            _under_way.add(cls)
            try:
                reference = handler(schema)
            finally:
                _under_way.discard(cls)
            definition = handler.resolve_ref_schema(reference)
            if name != self.default and "kind" not in definition.setdefault("required", []):
                definition["required"].insert(0, "kind")
            references[name] = reference
        parts = {
            "oneOf": list(references.values()),
            "discriminator": {"propertyName": "kind", "mapping": {name: ref["$ref"] for name, ref in references.items()}},
        }
        return {"anyOf": [parts, {"enum": list(references)}]}

    def _known(self) -> str:
        return ", ".join(self.registry)


_under_way: set[type[BaseModel]] = set()
"""Classes whose JSON schema is being made."""


def _short(text: str) -> str:
    """What someone wrote, as far as a message should repeat it."""
    return text if len(text) <= 60 else text[:50] + "…"


def _named(cls: type[BaseModel]) -> Any:
    """The class's core schema under a reference of its own, so that the JSON schema holds it once, in ``$defs``."""
    schema: Any = cls.__pydantic_core_schema__
    definitions = schema["definitions"] if schema["type"] == "definitions" else []
    inner = schema["schema"] if schema["type"] == "definitions" else schema
    if inner["type"] != "definition-ref":
        inner = {"ref": f"{cls.__module__}.{cls.__qualname__}:{id(cls)}", **inner}
    # The handler works on the field's own schema; only inside a `definitions` schema does it file references in `$defs`.
    return core_schema.definitions_schema(inner, definitions)


_SUFFIX = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def _quantity(value: Any) -> Any:
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*([kKmMbBtT]?)\s*", value)
        if not match:
            raise PydanticCustomError("quantity", "must be a number such as 4096, 64k, 100M or 1.5B")
        exact = Decimal(match[1].replace("_", "")) * _SUFFIX[match[2].lower()]
        value = int(exact) if exact == int(exact) else float(exact)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value


@dataclass(frozen=True)
class Hint:
    """Annotation: what a field takes, in words, and whether it may hold ``${env:NAME}``.

    A ``secret`` one fills its variables in itself, so that they are never written down.
    """

    words: str
    environment: bool = False
    secret: bool = False


class OneOrMany:
    """Annotation of a list field: one item may be written without the brackets."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        def enclose(value: Any) -> Any:
            return value if isinstance(value, list | tuple) else [value]

        return core_schema.no_info_before_validator_function(enclose, handler(source))

    def __get_pydantic_json_schema__(self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        many = handler(schema)
        return {"anyOf": [many.get("items", {}), many]}


Count = Annotated[
    int,
    Field(gt=0, le=10**18),
    BeforeValidator(_quantity),
    Hint("a positive whole number such as 4096, 64k or 100M"),
    WithJsonSchema({"anyOf": [{"type": "number", "minimum": 1}, {"type": "string", "pattern": "^[0-9][0-9_.]*[kKmMbBtT]?$"}]}),
]
"""A positive whole number, with the suffixes k, M, B, T."""

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""Seed of a random generator."""

Place = Annotated[str, Hint("text", environment=True)]
"""A path or a hub name: may hold ``${env:NAME}``."""


class From(Options):
    """A reference to the artefact of another stage: `{from: align}`."""

    from_: str = Field(alias="from")
    """Name of the stage."""
