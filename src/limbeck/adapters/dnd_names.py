"""Names and order of Drag-and-Drop LLMs (DnD, arXiv 2506.16406), whose tokens are a list of the pieces of a LoRA in one fixed order.

A tensor is called what PEFT calls it without ``base_model.model.`` in front.  Modules stand in the order of their layers, within a layer
in the order of :data:`ORDER` (``up_proj`` before ``gate_proj``), and A stands before B.
"""

from __future__ import annotations

from limbeck.adapters.spec import AdapterSpec, Site
from limbeck.errors import AdapterError

__all__ = ["ORDER", "dnd_blocks", "dnd_key", "dnd_keys", "from_dnd_key"]

ORDER = {
    "self_attn.q_proj": 2,
    "self_attn.k_proj": 3,
    "self_attn.v_proj": 4,
    "self_attn.o_proj": 5,
    "mlp.up_proj": 7,
    "mlp.gate_proj": 8,
    "mlp.down_proj": 9,
}
"""Place of a module within its layer: the tenths of DnD's sort key ``layer + tenths``."""
PEFT_PREFIX = "base_model.model."


def dnd_key(path: str, factor: str) -> str:
    """DnD's name of factor ``A`` or ``B`` of the Linear at ``path``: ``model.layers.0.self_attn.q_proj.lora_A.weight``."""
    return f"{path}.lora_{factor}.weight"


def from_dnd_key(key: str) -> tuple[str, str]:
    """Path of the Linear and ``A`` or ``B``, of DnD's name or of PEFT's with ``base_model.model.`` in front.

    Raises:
        AdapterError: the name is not one of a LoRA factor.
    """
    for factor in ("A", "B"):
        ending = dnd_key("", factor)
        if key.endswith(ending):
            return key.removeprefix(PEFT_PREFIX).removesuffix(ending), factor
    raise AdapterError(f"'{key}' is no tensor of a LoRA: DnD's names end in .lora_A.weight or .lora_B.weight")


def dnd_blocks(spec: AdapterSpec) -> list[tuple[Site, int]]:
    """Every changed Linear as (site, row of its layer in the site's tensors), in DnD's order.

    Raises:
        AdapterError: a target that DnD has no place for, or layers of more than one list.
    """
    homeless = [site.name for site in spec.sites if site.module not in ORDER]
    if homeless:
        raise AdapterError(f"DnD's tokens have no place for {', '.join(homeless)}: it knows {', '.join(ORDER)}; leave the other targets out")
    prefixes = sorted({site.prefix for site in spec.sites})
    if len(prefixes) > 1:
        raise AdapterError(f"DnD's tokens are ordered by layer, and this adapter has several lists of layers ({', '.join(prefixes)}): use the targets of one")
    blocks = [(layer, ORDER[site.module], site, row) for site in spec.sites for row, layer in enumerate(site.layers)]
    return [(site, row) for _, _, site, row in sorted(blocks, key=lambda block: block[:2])]


def dnd_keys(spec: AdapterSpec) -> list[str]:
    """DnD's names of all tensors of an adapter, in its order."""
    return [dnd_key(site.paths()[row], factor) for site, row in dnd_blocks(spec) for factor in ("A", "B")]
