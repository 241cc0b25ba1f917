"""The surgery that makes a hybrid: mixers in the place of softmax attention, in every layer that is not kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from transformers import PreTrainedModel

from limbeck.config.parts.mixers import MIXERS
from limbeck.config.parts.surgeries import HybridizeOptions
from limbeck.errors import ModelError
from limbeck.models.structure import attention_slot, attention_view, decoder_layers
from limbeck.students.mixers.base import Mixer, Report

MIXERS_ROLE, REST_ROLE = "mixers", "rest"


class Hybridize:
    """Replaces ``layer.self_attn`` (or what the family calls it) and nothing else."""

    def __init__(self, options: HybridizeOptions):
        self.options = options

    def resolve(self, model: PreTrainedModel) -> HybridizeOptions:
        """The options with ``keep`` as layer numbers from 0."""
        return self.options.model_copy(update={"keep": resolve_layers(self.options.keep, len(decoder_layers(model)))})

    def replaced(self, model: PreTrainedModel) -> list[int]:
        """Layers that hold a mixer."""
        count = len(decoder_layers(model))
        kept = resolve_layers(self.options.keep, count)
        return [index for index in range(count) if index not in kept]

    def apply(self, model: PreTrainedModel) -> None:
        """Put mixers in, with nothing copied yet; works on meta."""
        layers, config = decoder_layers(model), model.config.get_text_config(decoder=True)
        for index in self.replaced(model):
            slot = attention_slot(layers[index])
            if isinstance(getattr(layers[index], slot), Mixer):
                raise ModelError(f"surgery.hybridize: layer {index} holds a mixer already: name it in `keep` of this surgery")
            facts = attention_view(model, index).facts
            mixer = MIXERS.build(self.options.mixer, facts, config, index)
            setattr(layers[index], slot, mixer.train(layers[index].training))

    def initialise(self, model: PreTrainedModel, base: PreTrainedModel) -> list[Report]:
        """Fill the mixers from the base's attention."""
        layers, reports = decoder_layers(model), []
        for index in self.replaced(model):
            mixer, view = getattr(layers[index], attention_slot(layers[index])), attention_view(base, index)
            # Third parties' mixers need not know of the control.
            reports.append(mixer.init_from(view) if self.options.gqa == "heads" else mixer.init_from(view, gqa=self.options.gqa))
        return reports

    def roles(self, model: PreTrainedModel) -> dict[str, str]:
        """``mixers`` for every parameter of a mixer, ``rest`` for all others."""
        layers, replaced = decoder_layers(model), self.replaced(model)
        ours = {id(p) for index in replaced for p in getattr(layers[index], attention_slot(layers[index])).parameters()}
        return {name: MIXERS_ROLE if id(p) in ours else REST_ROLE for name, p in model.named_parameters()}

    def restore(self, model: PreTrainedModel, base: PreTrainedModel, layers: Sequence[int]) -> HybridizeOptions:
        """Give ``layers`` the base's attention back (the module itself is moved); returns the options that say so."""
        theirs, ours = decoder_layers(base), decoder_layers(model)
        for index in set(layers) & set(self.replaced(model)):
            slot = attention_slot(ours[index])
            attention: Any = getattr(theirs[index], attention_slot(theirs[index]))
            # Attention reads its implementation from the config it holds: the student's from here on.
            attention.config = model.config.get_text_config(decoder=True)
            setattr(ours[index], slot, attention)
        kept = set(resolve_layers(self.options.keep, len(ours))) | set(layers)
        return self.options.model_copy(update={"keep": tuple(sorted(kept))})


def resolve_layers(keep: Sequence[int] | Literal["all"], num_layers: int, field: str = "surgery.keep") -> tuple[int, ...]:
    """Layer numbers from 0, sorted, without doubles; negative ones count from the end."""
    if keep == "all":
        return tuple(range(num_layers))
    strange = [str(index) for index in keep if not -num_layers <= index < num_layers]
    if strange:
        raise ModelError(
            f"{field}: no layer {', '.join(strange)}: the model has {num_layers} layers, 0 to {num_layers - 1} (or -{num_layers} to -1 from the end)"
        )
    return tuple(sorted({index % num_layers for index in keep}))
