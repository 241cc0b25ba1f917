"""Options of the objectives."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from limbeck.config.base import Part
from limbeck.needs import AttentionStream, HeadHidden, Need
from limbeck.registry import Registry

OBJECTIVES = Registry("objective")


class ObjectiveOptions(Part):
    """Fields that every objective has."""

    weight: float = Field(1.0, ge=0)
    """Factor of this loss in the sum."""


@OBJECTIVES.register("limbeck.objectives.ce:CrossEntropy")
class CrossEntropyOptions(ObjectiveOptions):
    """Next-token cross-entropy on the labels."""

    kind: Literal["ce"] = "ce"
    chunk: int = Field(1024, ge=1)
    """Tokens whose logits exist at one time."""


@OBJECTIVES.register("limbeck.objectives.kl:ForwardKL")
class ForwardKLOptions(ObjectiveOptions):
    """Forward KL(teacher || student) over the whole vocabulary, fused with both heads and chunked over valid tokens."""

    kind: Literal["kl"] = "kl"
    temperature: float = Field(1.0, gt=0)
    """Both distributions are tempered; value and gradient carry the factor T squared."""
    chunk: int = Field(1024, ge=1)
    """Tokens whose logits exist at one time."""

    def needs(self) -> tuple[Need, ...]:
        return (HeadHidden(),)


@OBJECTIVES.register("limbeck.objectives.attention_alignment:AttentionAlignment")
class AttentionAlignmentOptions(ObjectiveOptions):
    """Each mixer reproduces the attention output of its layer from the teacher's own input; layers are independent."""

    kind: Literal["attention_alignment"] = "attention_alignment"
    loss: Literal["relative_mse", "mse", "rms"] = "relative_mse"
    """`relative_mse`: squared error over the layer's teacher power, measured once on calibration batches; `mse`: mean squared
    error; `rms`: the reference repository's un-squared root mean square a token."""
    calibration_batches: int = Field(4, ge=1)
    """Micro-batches on which each layer's teacher power is measured."""

    def needs(self) -> tuple[Need, ...]:
        return (AttentionStream(),)
