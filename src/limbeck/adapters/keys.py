"""One name for every changed Linear, its full module path, and what other programs call its factors."""

from __future__ import annotations

from limbeck.errors import AdapterError

__all__ = ["peft_key", "split_peft_key", "vllm_key"]

_PREFIX = "base_model.model."
_PACKED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}
"""Linears that vLLM runs as one, with the parts in the order of its rows (its ``packed_modules_mapping``)."""
_FOREIGN = {
    "lora_embedding": "a LoRA on an embedding; train it without the embedding among its targets",
    "lora_magnitude_vector": "DoRA's magnitudes; merge the adapter into its base with peft (merge_and_unload) and use that as a model",
    "lora_B.bias": "a LoRA with a bias; train it with lora_bias off",
}
"""What else stands in adapter files."""


def peft_key(path: str, factor: str) -> str:
    """The tensor of a PEFT file that holds factor ``A`` or ``B`` of the Linear at ``path``."""
    return f"{_PREFIX}{path}.lora_{factor}.weight"


def split_peft_key(key: str) -> tuple[str, str]:
    """Path and factor of a tensor in a PEFT file; anything but a factor of a LoRA is an :class:`AdapterError` that names it."""
    for factor in ("A", "B"):
        ending = f".lora_{factor}.weight"
        if key.startswith(_PREFIX) and key.endswith(ending):
            return key.removeprefix(_PREFIX).removesuffix(ending), factor
    if "lora_" not in key:
        raise AdapterError(
            f"{key} is a whole weight: peft puts those beside a LoRA if the vocabulary was resized, or if an embedding or the output head "
            "is a target; train the adapter without that"
        )
    known = next((what for sign, what in _FOREIGN.items() if sign in key), None)
    raise AdapterError(f"{key} is " + (known or f"no factor of a LoRA: expected are names such as {peft_key('model.layers.0.mlp.up_proj', 'A')}"))


def vllm_key(path: str) -> tuple[str, int]:
    """Where vLLM puts the LoRA of the Linear at ``path``: the path of its own Linear, and which part of that Linear's rows.

    vLLM reads PEFT files as they are and does this by itself; it shows what an adapter will act on there.  It takes one rank and
    one alpha for a whole adapter (it does not look at ``rank_pattern`` and ``alpha_pattern``), which is how Limbeck writes files.
    """
    parent, _, name = path.rpartition(".")
    for packed, parts in _PACKED.items():
        if name in parts:
            return f"{parent}.{packed}", parts.index(name)
    return path, 0
