"""Bytes on disk and on the wire: checkpoints, model files, signals, answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from limbeck.planner.architecture import Architecture, Weight
from limbeck.planner.mixers import mixer_state
from limbeck.planner.students import Student

STATES = {"adamw": 2, "muon": 1, "lion": 1}
"""Numbers that each optimiser keeps for a parameter."""
BITS = {"tq2_0": 8 * 66 / 256, "tq1_0": 8 * 54 / 256, "q2_0": 8 * 18 / 64, "bf16": 16.0, "f32": 32.0}
"""Bits a weight in a file for llama.cpp: codes and an fp16 scale a block (66 bytes for 256 weights, 54, 18 for 64)."""
QUANTISED = ("experts", "attention", "linear_attention", "mlp", "shared_expert", "mixer")
"""What a quantised checkpoint quantises; embedding, head, router and norms stay bfloat16."""
BLOCK = 128
"""Side of a block that shares a scale in FP8 checkpoints, and inputs that share one in 4-bit ones."""
VLLM_BYTES, SGLANG_BYTES, SEED_BYTES = 82.0, 10.8, 9.5
"""Bytes of an id and its value in an answer: JSON objects, flat base64; and of one logit of a whole vocabulary as JSON."""


def wide(precision: str) -> int:
    """Bytes of a trained parameter."""
    return 8 if precision == "float64" else 4


# -- model files ----------------------------------------------------------------------------------------------------------


def weight_bytes(weights: Sequence[Weight], dtype: str) -> float:
    """Bytes of parameters as a checkpoint holds them: ``fp32``, ``bf16``, ``fp8`` (blocks of 128 x 128, fp32 scales), ``int4``
    (4.25 bits a weight: a scale of a byte for 32)."""
    return sum(w.count * bytes_each(w, dtype) for w in weights)


def bytes_each(weight: Weight, dtype: str) -> float:
    """Bytes of one number of a parameter."""
    if dtype in ("fp32", "float32"):
        return 4.0
    if dtype == "float64":
        return 8.0
    if dtype in ("bf16", "bfloat16") or weight.kind not in QUANTISED or len(weight.shape) < 2 or weight.shape[-2] == 1:
        return 2.0
    return 1.0 + 4 / BLOCK**2 if dtype == "fp8" else 0.5 + 1 / 32


def gguf_bytes(student: Student, kind: str, rest: str = "bf16") -> tuple[float, float]:
    """``(bytes of the ternary weights, bytes of the file)`` without its tokenizer: vectors, routers and convolutions are fp32 there."""
    ternary = student.ternary
    names = {w.name for w in ternary}
    inner = sum(w.count for w in ternary) * BITS[kind] / 8
    others = 0.0
    for w in student.architecture.weights:
        if w.name not in names:
            full = len(w.shape) < 2 or w.kind in ("norm", "router") or 1 in w.shape[-2:]
            others += w.count * (4.0 if full else BITS[rest] / 8)
    return inner, inner + others


# -- checkpoints ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoints:
    """What a train stage's checkpoints take."""

    one: float
    """Bytes of one: trained parameters and the optimiser's numbers."""
    model: float
    """Bytes of ``final/model``."""
    kept: int
    """`step_*` folders that are there at one time, the one being written included."""
    disk: float
    """All of it: those, ``final/``, and what ``keep_every`` keeps for good."""
    every: int
    """Steps between them."""


def checkpoint_bytes(trained: Sequence[tuple[Any, Sequence[Weight]]], precision: str) -> float:
    """Bytes of one checkpoint: trained parameters and the optimiser's numbers of each."""
    return sum(float(wide(precision)) * w.count * (1 + STATES[group.kind]) for group, members in trained for w in members)


def checkpoint_plan(trained: Sequence[tuple[Any, Sequence[Weight]]], model: float, loop: Any, steps: int | None) -> Checkpoints:
    """Checkpoints of groups ``(options, parameters)``; ``model`` is bytes of the model folder, which the stage's own shares files with."""
    one = checkpoint_bytes(trained, loop.precision)
    total = steps or 10_000
    every = loop.checkpoint_every or min(1000, max(1, total // 10))
    saves = ceil(total / every)
    keep_last, keep_every = loop.keep_last, getattr(loop, "keep_every", None)
    kept = min(saves, keep_last or saves) + 1
    rare = total // keep_every if keep_every and keep_last else 0
    return Checkpoints(one, model, kept, one * (kept + 1 + rare) + model, every)


# -- signals --------------------------------------------------------------------------------------------------------------


def signal_bytes(k: int, codec: str, vocabulary: int, temperatures: int = 1, samples: int = 0, documents_tokens: int = 4096) -> float:
    """Bytes that a stored position takes: ids, values, logZ, its own token, and what zstd finds in that (measured, ``benchmarks/signal_store``).

    ``exact`` and ``fp16``: ids in ``ceil(log2 V)`` bits; ``compact``: a byte a value and ids as Elias-Fano gaps
    (``limbeck.teachers.store.codecs``).
    """
    bits = max(1, (vocabulary - 1).bit_length())
    if codec == "compact":
        low = max(0, (vocabulary // max(k, 1)).bit_length() - 1)
        ids, values, squeezed = -(-(k + ((vocabulary - 1) >> low)) // 8) + k * low / 8, k + 6.0, 0.98
    else:
        ids, values, squeezed = k * bits / 8, k * (4.0 if codec == "exact" else 2.0), 0.94
    # logZ in fp32, drawn ids, and the document's own tokens at about half of their four bytes after zstd.
    return squeezed * (ids + values + 4.0 * temperatures + samples * bits / 8) + 2.0 + 320 / documents_tokens


def wire_bytes(protocol: str, k: int, vocabulary: int, temperatures: int = 1) -> float:
    """Bytes that a teacher's answer takes on the wire for a token, before compression (``benchmarks/teacher_latency``)."""
    if protocol == "vllm":
        return VLLM_BYTES * k
    if protocol == "sglang":
        return SGLANG_BYTES * k
    if protocol == "seed":
        return SEED_BYTES * vocabulary
    return 8.0 * k + 4.0 * temperatures


# -- caches ---------------------------------------------------------------------------------------------------------------


def cache_bytes(model: Architecture, context: int, width: float = 2.0) -> tuple[float, float]:
    """``(bytes that a token adds to a sequence's cache, bytes that a sequence has anyway)``, ``width`` bytes a cached number.

    A recurrent state is fp32, the tail of a short convolution is cached like keys.
    """
    token, fixed = 0.0, 0.0
    for layer in model.layers:
        a, net = layer.attention, layer.deltanet
        if net is not None:
            fixed += net.value_heads * net.key_dim * net.value_dim * 4 + net.channels * (net.kernel - 1) * width
        elif layer.mixer is not None and a is not None:
            grows, held = mixer_state(layer.mixer, a, context, int(width) or 1)
            token, fixed = token + grows, fixed + held
        elif a is not None and a.window:
            fixed += min(context, a.window) * 2 * a.kv_width * width
        elif a is not None:
            token += 2 * a.kv_width * width
    return token, fixed
