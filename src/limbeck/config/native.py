"""What can be written as transformers' own Qwen3.5, and why the rest cannot.

Qwen3.5 (``qwen3_5_text``) is softmax layers with an output gate beside Gated DeltaNet layers.  A hybrid fits if its softmax layers are
built like Qwen3's, which are a special case of Qwen3.5's, and its mixers are Qwen3.5's own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from limbeck.config.base import From
from limbeck.config.parts.mixers import GATED_DELTANET_PRESETS
from limbeck.errors import Problem

if TYPE_CHECKING:
    from limbeck.config.recipe import Recipe

FAMILY = "qwen3"
ROPE_TYPES = ("default", "linear", "yarn", "llama3")
"""Rotary scalings that Qwen3 and Qwen3.5 compute alike."""
NO_QK_NORMS = "its attention has no q/k norms, and Qwen3.5's always normalises q and k"
OTHERS = {
    "qwen2": "its attention (Qwen2 and Qwen2.5) has biases on q, k and v and no q/k norms, and Qwen3.5's has no bias and always normalises",
    "llama": NO_QK_NORMS,
    "mistral": NO_QK_NORMS,
    "ministral": NO_QK_NORMS,
    "phi3": NO_QK_NORMS,
    "smollm3": NO_QK_NORMS,
    "olmo2": "its norms stand behind attention and MLP and its q/k norms span all heads; Qwen3.5's stand before and span one head",
    "gemma2": "its attention scores are soft-capped, it has no q/k norms, and further norms stand behind attention and MLP",
    "gemma3_text": "further norms stand behind its attention and MLP, and its embeddings are scaled",
    "gemma3": "further norms stand behind its attention and MLP, and its embeddings are scaled",
}
"""Why a family does not fit, in words that name what is in the way."""
ALL_LINEAR = "no layer keeps softmax attention, and transformers' cache counts its tokens in one: keep at least one layer"


def teacher_obstacles(config: Mapping[str, Any], kept: Collection[int] = ()) -> list[str]:
    """Why softmax layers of a model with this config (fields of its ``config.json``) are no special case of Qwen3.5's; empty if they are.

    ``kept`` are the layers that stay softmax: one of them may not slide.
    """
    family = config.get("model_type")
    if family != FAMILY:
        return [f"a '{family}' model: {OTHERS.get(str(family), 'it is not built like Qwen3, the one family whose softmax layers Qwen3.5 contains')}"]
    obstacles = []
    if config.get("attention_bias"):
        obstacles.append("its attention has biases (`attention_bias`), and Qwen3.5's linear layers have none")
    if config.get("hidden_act", "silu") != "silu":
        obstacles.append(f"its activation is {config['hidden_act']!r}; Qwen3.5 uses one activation for MLPs and convolutions, and the mixers' is silu")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        obstacles.append(f"rotary scaling {kind!r}: Qwen3.5 computes {', '.join(ROPE_TYPES)} as Qwen3 does")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        obstacles.append(f"partial_rotary_factor {rope['partial_rotary_factor']}: Qwen3 and Qwen3.5 read it differently")
    types = config.get("layer_types") or ()
    sliding = [index for index in sorted(kept) if index < len(types) and types[index] == "sliding_attention"]
    if sliding:
        obstacles.append(f"kept layers {', '.join(map(str, sliding))} attend to a sliding window, which Qwen3.5 does not have")
    return obstacles


def mixer_obstacles(options: Any) -> list[str]:
    """Why a mixer with these options is not Qwen3.5's Gated DeltaNet; empty if it is."""
    if options.kind != "gated_deltanet":
        return [f"mixer '{options.kind}': Qwen3.5's linear layer is a Gated DeltaNet: `mixer: {{kind: gated_deltanet, preset: native}}`"]
    native = type(options)(preset="native")
    # Where the decay starts and how long chunks are does not change the function.
    free = {"preset", "decay_init", "chunk", "short_conv"}
    differing = [
        f"`{name}: {_word(getattr(options, name))}` (native: {_word(getattr(native, name))})"
        for name in type(options).model_fields
        if name not in free and getattr(options, name) != getattr(native, name)
    ]
    if options.short_conv < 2:
        differing.append(f"`short_conv: {options.short_conv}` (native: {GATED_DELTANET_PRESETS['native']['short_conv']}, at least 2)")
    if not differing:
        return []
    return [f"mixer 'gated_deltanet' with {', '.join(differing)}: Qwen3.5's own layer is `preset: native`"]


def native_exports(recipe: Recipe) -> list[str]:
    """Names of the export stages that write the native architecture."""
    return [name for name, stage in recipe.stages.items() if stage.kind == "export" and "native" in stage.to]


def origin(recipe: Recipe, stage: str) -> Any:
    """Options of the student that a train stage's student goes back to: a new one, on a base or from scratch."""
    seen: set[str] = set()
    options = getattr(recipe.stages[stage], "student", None)
    while options is not None and options.from_ is not None and stage not in seen:
        seen.add(stage)
        stage = options.from_
        options = getattr(recipe.stages.get(stage), "student", None)
    return options


def keeps_softmax(recipe: Recipe, stage: str) -> bool:
    """Whether a layer of a train stage's student is softmax, as far as the recipe says."""
    kept, seen = False, set()
    student = getattr(recipe.stages[stage], "student", None)
    while student is not None and stage not in seen:
        seen.add(stage)
        kept = kept or bool(student.keep) or any(getattr(surgery, "keep", True) for surgery in student.surgery)
        stage = student.from_ or stage
        student = getattr(recipe.stages.get(stage), "student", None)
    return kept


def base_of(recipe: Recipe, stage: str) -> str | dict[str, Any] | None:
    """What a train stage's softmax layers come from: a model's name, a config from scratch, or None where it cannot be told."""
    student = origin(recipe, stage)
    seen: set[str] = set()
    while student is not None and isinstance(student.base, From) and student.base.from_ not in seen:
        seen.add(student.base.from_)
        student = origin(recipe, student.base.from_)
    if student is None or isinstance(student.base, From):
        return None
    return student.base if student.base is not None else student.config


def native_problems(recipe: Recipe) -> list[Problem]:
    """Export stages that ask for the native architecture of a student whose mixers it does not have."""
    problems = []
    for name in native_exports(recipe):
        source = recipe.stages[name].from_
        student = origin(recipe, source) if source in recipe.stages else None
        if student is None:
            continue
        obstacles = [o for surgery in student.surgery if hasattr(surgery, "mixer") for o in mixer_obstacles(surgery.mixer)]
        obstacles += [f"surgery '{surgery.kind}' leaves another architecture" for surgery in student.surgery if surgery.kind != "hybridize"]
        if student.surgery and not keeps_softmax(recipe, source):
            obstacles.append(ALL_LINEAR)
        if not student.surgery:
            obstacles.append(f"the student of stage '{source}' is not a hybrid, so `to: [hf]` writes a model that stock transformers loads")
        problems += [Problem("", f"stages.{name}.to", f"native: {obstacle}") for obstacle in obstacles]
    return problems


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
