"""Options of the teachers: where the signal comes from."""

from __future__ import annotations

from typing import Literal

from limbeck.config.base import From, Part, Place
from limbeck.needs import AttentionStream, HeadHidden, Need
from limbeck.registry import Registry

TEACHERS = Registry("teacher")

ModelSource = Place | From


@TEACHERS.register("limbeck.teachers.local:LocalTeacher")
class LocalTeacherOptions(Part):
    """A frozen Hugging Face model in this process."""

    kind: Literal["local"] = "local"
    model: ModelSource
    """A folder, a hub name, `builtin:NAME`, or `{from: stage}`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Weights' dtype."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] | None = None
    """Attention implementation; by default the one saved with the model, else sdpa."""
    revision: str | None = None
    """Revision of a hub model."""

    def provides(self, need: Need) -> bool | str:
        if isinstance(need, HeadHidden):
            return True
        gives = "it gives HeadHidden (objective kl); for attention_alignment use teacher 'self'"
        return f"teacher 'local' does not provide {type(need).__name__}; {gives}"


@TEACHERS.register("limbeck.teachers.self_teacher:SelfTeacher")
class SelfTeacherOptions(Part):
    """The student's own base, with its softmax attention: it streams every attention layer's input and output."""

    kind: Literal["self"] = "self"

    def provides(self, need: Need) -> bool | str:
        if isinstance(need, AttentionStream):
            return True
        gives = "it streams attention (objective attention_alignment); for kl use teacher 'local'"
        return f"teacher 'self' does not provide {type(need).__name__}; {gives}"
