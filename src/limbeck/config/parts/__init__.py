"""Options of the built-in parts, one file a kind.  Importing this package fills the registries, without torch."""

from limbeck.config.parts import mixers, objectives, sources, stages, surgeries, teachers

__all__ = ["mixers", "objectives", "sources", "stages", "surgeries", "teachers"]
