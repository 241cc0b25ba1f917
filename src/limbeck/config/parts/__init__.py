"""Options of the built-in parts, one file a kind.  Importing this package fills the registries, without torch."""

from limbeck.config.parts import adapters, conditions, mixers, objectives, sources, stages, surgeries, teachers, trajectories

__all__ = ["adapters", "conditions", "mixers", "objectives", "sources", "stages", "surgeries", "teachers", "trajectories"]
