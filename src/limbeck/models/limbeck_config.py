"""The one public config of students: ``model_type: limbeck``, which remembers the base and what was done to it.

Light: it imports transformers' config module and nothing that needs torch, since it is registered while transformers itself is
being imported.  Model classes are generated when a config is read (:mod:`limbeck.models.limbeck_model`).
"""

from __future__ import annotations

from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from limbeck.errors import ModelError

MODEL_TYPE = "limbeck"


class LimbeckConfig(PreTrainedConfig):
    """A student's config: its base family's fields and a ``limbeck`` section.

    ``limbeck = {"surgery": [options with their kind, ...], "base": {"source", "model_type", "fingerprint"}}``.  Reading one
    gives an instance of a class generated for the base's family, which is a subclass of that family's config and of this one.
    """

    model_type = MODEL_TYPE
    limbeck: dict[str, Any] | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config of a student from its ``config.json``."""
        if "base_config_class" in cls.__dict__:
            return super().from_dict(config_dict, **kwargs)
        from limbeck.models.limbeck_model import student_classes

        section = config_dict.get("limbeck")
        if not isinstance(section, dict) or not isinstance(section.get("base"), dict) or "surgery" not in section:
            raise ModelError(
                "config.json has model_type 'limbeck' and no `limbeck` section with `base` and `surgery`: it was not "
                "saved by Limbeck; name a folder that was"
            )
        config_class, _ = student_classes(section["base"].get("model_type"))
        return config_class.from_dict(config_dict, **kwargs)
