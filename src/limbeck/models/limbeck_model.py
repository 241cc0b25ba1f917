"""Students as transformers models: a class made per base family, its cache, and its config.

The module graph, names and forward pass stay those of the base family; surgeries replace modules.  Saving writes a ``limbeck``
config; loading builds the family's model, replays the surgery (on meta) and loads strictly.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from limbeck.config.base import Part
from limbeck.config.parts.surgeries import SURGERIES
from limbeck.config.plugins import load_entry_points
from limbeck.errors import ModelError, did_you_mean
from limbeck.models.across import carry_across
from limbeck.models.experts import pin_experts
from limbeck.models.head import backbone
from limbeck.models.limbeck_config import LimbeckConfig
from limbeck.models.packed import FLAG
from limbeck.models.strict import check_loading
from limbeck.models.structure import attention_slot, decoder_layers

__all__ = ["HybridMixin", "LimbeckConfig", "make_student_class", "student_classes", "surgeries_of", "wrap_student"]

DYNAMIC = (None, "dynamic", "dynamic_full")

if TYPE_CHECKING:
    # What the mixin takes for granted below it.
    from transformers import PreTrainedModel as _Model
else:
    _Model = object


class HybridMixin(_Model):
    """First base of every generated student class: replays the surgery, makes the cache, loads strictly."""

    config: Any

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any):
        pin_attention(config)
        pin_experts(config)
        super().__init__(config, *args, **kwargs)
        for surgery in surgeries_of(config):
            surgery.apply(self)
        self.finish_surgery()

    @classmethod
    def from_pretrained(cls, source: Any, *args: Any, **kwargs: Any) -> Any:
        """Strict in both directions: a missing, unexpected or mismatched tensor is an error that names it.

        transformers leaves a missing tensor as uninitialised memory and drops an unexpected one.
        """
        with_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(source, *args, output_loading_info=True, **kwargs)
        check_loading(model, info, str(source))
        return (model, info) if with_info else model

    def finish_surgery(self) -> None:
        """Check that the mixers survive save and load, and give a carrier to those that read what earlier layers made."""
        mixers = self.mixers()
        check_reloadable(mixers)
        if any(getattr(mixer, "carries_across_layers", False) for mixer in mixers.values()):
            carry_across(backbone(self))

    def replaced(self) -> list[int]:
        """Indices of the layers that hold a mixer."""
        return sorted({layer for surgery in surgeries_of(self.config) for layer in surgery.replaced(self)})

    def mixers(self) -> dict[int, nn.Module]:
        """The mixers by layer index."""
        replaced = self.replaced()
        # A family that is linear already can be operated on as long as nothing replaces its attention.
        layers = decoder_layers(self) if replaced else []
        return {index: getattr(layers[index], attention_slot(layers[index])) for index in replaced}

    def new_cache(self) -> DynamicCache:
        """An empty cache: keys and values for the softmax layers, each mixer's own state for the others."""
        cache = DynamicCache(config=self.config)
        for index, mixer in self.mixers().items():
            cache.layers[index] = mixer.cache_layer()
        return cache

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            if generation_config.cache_implementation not in DYNAMIC:
                raise ModelError(
                    f"cache_implementation={generation_config.cache_implementation!r} has no place for a mixer's state: "
                    "leave it out, a hybrid makes its own dynamic cache"
                )
            model_kwargs["past_key_values"] = self.new_cache()
            return None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)


def _student_forward(base: type[PreTrainedModel]) -> Any:
    """The family's forward (and its signature, which ``generate`` inspects) with our cache and the mixers' padding mask."""
    signature = inspect.signature(base.forward)

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(list(signature.parameters)[1:], args, strict=False))
        kwargs = {**given, **kwargs}
        tokens = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        mask = kwargs.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.ndim == 2 and tokens is not None and not bool(mask.all()):
            # The mask covers past and present tokens; a mixer's state already holds the past.
            kwargs["padding_mask"] = mask[:, -tokens.shape[1] :].bool()
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            use_cache = bool(getattr(self.config, "use_cache", True)) and not self.training
            kwargs["use_cache"] = use_cache
        if use_cache and kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = self.new_cache()
        return base.forward(self, **kwargs)

    return forward


def surgeries_of(config: Any) -> list[Any]:
    """The surgeries a student's config remembers, built in order; installed plug-ins are known to it."""
    load_entry_points()
    section = getattr(config, "limbeck", None)
    if not isinstance(section, dict):
        raise ModelError(f"{type(config).__name__} has no `limbeck` section, so there is no surgery to replay: name a student's folder")
    built = []
    for options in section["surgery"]:
        kind = options.get("kind")
        if kind not in SURGERIES:
            raise ModelError(
                f"the model was made by surgery {kind!r}, which is not registered here"
                f"{did_you_mean(str(kind), SURGERIES) or ';'} "
                f"known: {', '.join(SURGERIES)}; import the plug-in that registers it first"
            )
        try:
            built.append(SURGERIES.build(SURGERIES.options(kind).model_validate(options)))
        except ValidationError as error:
            found = error.errors()[0]
            raise ModelError(
                f"the model was made by surgery {kind!r} with options that mean nothing here ({'.'.join(map(str, found['loc']))}: {found['msg']}); "
                "import the plug-in that registers them first"
            ) from error
    return built


def check_reloadable(mixers: dict[int, nn.Module]) -> None:
    """Refuse mixers that a saved student could not bring back.

    Models are built on meta and filled from files: a non-persistent buffer comes back as zeros, and a plain tensor attribute
    stays on meta.
    """
    for index, mixer in mixers.items():
        for path, module in mixer.named_modules():
            lost = [f"buffer {name!r} (not persistent)" for name in module._non_persistent_buffers_set]
            lost += [f"tensor attribute {name!r}" for name, value in vars(module).items() if isinstance(value, torch.Tensor)]
            if lost:
                where = f"{type(mixer).__name__}{'.' + path if path else ''}"
                raise ModelError(
                    f"layer {index}: {where} has {', '.join(lost)}, which would not survive save and load: "
                    "make it a parameter or a persistent buffer, or compute it in forward"
                )


def pin_attention(config: Any) -> None:
    """Take the attention implementation that was saved with the config, unless the caller chose one."""
    saved = getattr(config, "limbeck_attention", None)
    if saved is not None and config._attn_implementation is None:
        config._attn_implementation = saved


@functools.cache
def student_classes(model_type: str) -> tuple[type[LimbeckConfig], type[PreTrainedModel]]:
    """The generated config and model class of a base family, registered with transformers' Auto classes."""
    if model_type not in CONFIG_MAPPING:
        raise ModelError(
            f"base model type {model_type!r} is not known to this "
            f"transformers{did_you_mean(str(model_type), CONFIG_MAPPING.keys()) or '; a later release may know it'}"
        )
    base_config = CONFIG_MAPPING[model_type]
    if base_config not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"base model type {model_type!r} has no causal language model in transformers: choose another base")
    base_model = MODEL_FOR_CAUSAL_LM_MAPPING[base_config]
    return _generate(base_config, base_model)


def make_student_class(base_config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The student class of a base model's config."""
    return student_classes(base_config.model_type)[1]


def _generate(
    base_config: type[PreTrainedConfig], base_model: type[PreTrainedModel]
) -> tuple[type[LimbeckConfig], type[PreTrainedModel]]:
    family = base_model.__name__.removesuffix("ForCausalLM")
    config_class = type(
        f"Limbeck{base_config.__name__}",
        (base_config, LimbeckConfig),
        {
            "__module__": __name__,
            "model_type": LimbeckConfig.model_type,
            "base_config_class": base_config,
            "__doc__": f"Config of students of {family}.",
        },
    )
    model_class = type(
        f"Limbeck{family}ForCausalLM",
        (HybridMixin, base_model),
        {
            "__module__": __name__,
            "__doc__": f"A student of {family}.",
            "config_class": config_class,
            "forward": _student_forward(base_model),
        },
    )
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    return config_class, model_class


def wrap_student(base_model: PreTrainedModel, surgery: Sequence[Part], base_info: dict[str, Any]) -> PreTrainedModel:
    """A student of ``base_model``: the generated class, with the surgery applied and its modules initialised from the base.

    The student *shares* the base's tensors (no second copy of a large model): use the base afterwards only to read, and not once
    the student trains.  ``base_info`` has ``source`` and ``fingerprint``.  The reports of the initialisation are kept as
    ``student.surgery_reports``.
    """
    if isinstance(base_model, HybridMixin):
        raise ModelError(
            "the base of a student is a plain model; this one has been operated on already: go on with it by `from:`"
        )
    model_type = base_model.config.model_type
    config_class, model_class = student_classes(model_type)
    resolved = [SURGERIES.build(options).resolve(base_model) for options in surgery]
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*base_model.parameters(), *base_model.buffers())}
    student: Any = copy.deepcopy(base_model, shared)
    attention = base_model.config._attn_implementation
    student.config.__class__ = config_class
    student.config.limbeck = {
        "surgery": [options.model_dump(mode="json", by_alias=True) for options in resolved],
        "base": {**base_info, "model_type": model_type},
    }
    student.config.limbeck_attention = attention
    student.__class__ = model_class
    # What was found out about packing is true of the base only.
    vars(student).pop(FLAG, None)
    reports: list[Any] = []
    with _like(base_model):
        for built in surgeries_of(student.config):
            built.apply(student)
            reports.extend(built.initialise(student, base_model))
    student.finish_surgery()
    for built in surgeries_of(student.config):
        # What a surgery can find out only by running what all of them made.
        getattr(built, "check", lambda model: None)(student)
    student.surgery_reports = reports
    return student


@contextmanager
def _like(model: PreTrainedModel) -> Iterator[None]:
    """New modules come out in the model's dtype and on its device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(model.dtype)
    try:
        with model.device:
            yield
    finally:
        torch.set_default_dtype(before)
