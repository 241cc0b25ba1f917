"""Who runs where on one node of eight GPUs of 141 GB."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from limbeck.agentic.settings import validated
from limbeck.config.parts.teachers import HttpTeacherOptions, LaunchOptions
from limbeck.errors import TeacherError, did_you_mean

TEACHER_CONFIG: dict[str, Any] = {
    "model": "Qwen/Qwen3-Coder-480B-A35B-Instruct-FP8",
    "quantization": "fp8",
    "tensor_parallel_size": 8,
    "enable_expert_parallel": True,
    "gpu_memory_utilization": 0.90,
    "max_logprobs": 128,
    "max_model_len": 40960,
    "devices": [0, 1, 2, 3, 4, 5, 6, 7],
}
"""The teacher while its answers are captured.

Its FP8 weights are 482 GB (480.15B parameters), not the plan's 280: four GPUs at 0.9 would have 26 GB left.  Eight have 533 GB left.  An
expert's width of 2560 in eight parts is 320, no multiple of the quantisation's block of 128, so experts are spread whole: 20 to a GPU.
On four GPUs 640 would be one, and a 4-bit checkpoint (255 to 270 GB) would fit."""

STUDENT_CONFIG: dict[str, Any] = {
    "model": "Qwen/Qwen3-Coder-Next",
    "dtype": "bfloat16",
    "devices": [0, 1, 2, 3, 4, 5, 6, 7],
    "fsdp": True,
}
"""The student while it trains: after the captures, on every GPU.  Its weights are 159 GB in bfloat16, which no single GPU holds."""

_WORDS = {
    "tensor_parallel_size": "tensor_parallel",
    "enable_expert_parallel": "expert_parallel",
    "quantization": "quantisation",
    "gpu_memory_utilization": "gpu_memory",
    "max_logprobs": "max_logprobs",
    "devices": "devices",
}
"""Keys of a configuration -> fields of the launch options."""
_OTHERS = ("model", "max_model_len")


def teacher_options(config: Mapping[str, Any] = TEACHER_CONFIG, url: str = "http://127.0.0.1:8100") -> HttpTeacherOptions:
    """The ``teacher`` of a stage that starts this server for its own run; ``limbeck.teachers.http.launch.command_line`` has its words.

    Raises:
        TeacherError: a key that is none, or no model.
        RecipeError: a value that a recipe would refuse.
    """
    known = (*_OTHERS, *_WORDS)
    for key in config:
        if key not in known:
            raise TeacherError(f"TEACHER_CONFIG.{key}: there is no such key{did_you_mean(key, known) or ';'} allowed: {', '.join(known)}")
    if "model" not in config:
        raise TeacherError("TEACHER_CONFIG.model: there is none: name the folder or hub name of what is served")
    words = ("--max-model-len", str(config["max_model_len"])) if "max_model_len" in config else ()
    values = {_WORDS[key]: value for key, value in config.items() if key in _WORDS} | {"arguments": words}
    launch = validated(LaunchOptions, values, "TEACHER_CONFIG")
    return validated(HttpTeacherOptions, {"url": url, "protocol": "vllm", "model": config["model"], "launch": launch}, "TEACHER_CONFIG")
