"""Which Linears a LoRA changes: resolved from the loaded model, never from a table of families."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from difflib import get_close_matches

from torch import nn

from limbeck.adapters.spec import AdapterSpec, Site
from limbeck.errors import AdapterError

GROUPS = {
    "attention": ("self_attn", "attention", "self_attention", "attn", "linear_attn"),
    "mlp": ("mlp", "feed_forward", "ffn", "block_sparse_moe", "shared_expert", "shared_experts"),
}
"""Words for the Linears below children of these names; ``all`` is every Linear of a layer with more than one output."""
FUSED = {
    "linear_q": "in_proj_qkvz", "linear_k": "in_proj_qkvz", "linear_v": "in_proj_qkvz", "linear_z": "in_proj_qkvz",
    "linear_b": "in_proj_ba", "linear_a": "in_proj_ba", "linear_o": "out_proj",
}  # fmt: skip
"""Names met in the wild for projections that a family keeps in one Linear."""
_LAYER = re.compile(r"(?P<prefix>.+?)\.(?P<layer>\d+)\.(?P<module>.+)")


def linears_of(model: nn.Module) -> list[Site]:
    """Every kind of Linear in the model's repeated layers, in the order of the first layer that has it."""
    found: dict[tuple[str, str, int, int], list[int]] = defaultdict(list)
    for path, module in model.named_modules():
        match = _LAYER.fullmatch(path)
        if match and isinstance(module, nn.Linear):
            found[match["prefix"], match["module"], module.in_features, module.out_features].append(int(match["layer"]))
    shapes: dict[tuple[str, str], int] = defaultdict(int)
    for prefix, module_name, _, _ in found:
        shapes[prefix, module_name] += 1
    sites = []
    for (prefix, module_name, size_in, size_out), layers in found.items():
        name = module_name if shapes[prefix, module_name] == 1 else f"{module_name}@{size_out}x{size_in}"
        sites.append(Site(name, module_name, size_in, size_out, prefix, tuple(sorted(layers))))
    # Two towers with layers of their own would give one name twice.
    if len({site.prefix for site in sites}) > 1:
        sites = [Site(f"{s.prefix}.{s.name}", s.module, s.in_features, s.out_features, s.prefix, s.layers) for s in sites]
    return sites


def resolve_targets(model: nn.Module, targets: str | Sequence[str]) -> tuple[Site, ...]:
    """The sites that ``attention``, ``mlp``, ``all`` or names such as ``q_proj`` and ``shared_expert.up_proj`` mean here.

    A name that matches no Linear raises :class:`AdapterError` with the nearest real ones.
    """
    sites = linears_of(model)
    if not sites:
        raise AdapterError(f"{type(model).__name__} has no Linear in a list of layers: there is nothing that a LoRA could change")
    wanted = [targets] if isinstance(targets, str) else list(targets)
    chosen: dict[str, Site] = {}
    problems = []
    for word in wanted:
        matches = [site for site in sites if _means(word, site)]
        if not matches:
            problems.append(_nothing(word, sites))
        chosen.update({site.name: site for site in matches})
    if problems or not chosen:
        raise AdapterError("targets: " + ("; ".join(problems) or "none named") + f"; Linears of this model: {_known(sites)}")
    return tuple(site for site in sites if site.name in chosen)


def resolve_spec(model: nn.Module, targets: str | Sequence[str], *, rank: int, alpha: float, rslora: bool = False) -> AdapterSpec:
    """The spec of LoRAs on these targets of a model.  A rank above a Linear's smaller side is an error."""
    sites = resolve_targets(model, targets)
    small = [site for site in sites if rank > min(site.in_features, site.out_features)]
    if small:
        smallest = min(min(site.in_features, site.out_features) for site in small)
        raise AdapterError(
            f"rank {rank} is more than {small[0].name} ({small[0].out_features} x {small[0].in_features}) can have: "
            f"at most {smallest}, or leave that target out"
        )
    return AdapterSpec(sites, rank, alpha, rslora)


def modules_of(model: nn.Module, spec: AdapterSpec) -> dict[str, list[nn.Linear]]:
    """The Linears of every site, one a layer; a spec that does not fit the model raises :class:`AdapterError`."""
    modules = dict(model.named_modules())
    found: dict[str, list[nn.Linear]] = {}
    for site in spec.sites:
        found[site.name] = []
        for path in site.paths():
            module = modules.get(path)
            if not isinstance(module, nn.Linear):
                near = get_close_matches(path, [p for p, m in modules.items() if isinstance(m, nn.Linear)], n=2)
                hint = f"; nearest: {', '.join(near)}" if near else ""
                raise AdapterError(f"the adapter changes {path}, which is no Linear of {type(model).__name__}{hint}: it was made for another model")
            if (module.in_features, module.out_features) != (site.in_features, site.out_features):
                raise AdapterError(
                    f"the adapter changes {path} as {site.in_features} -> {site.out_features}, and it is "
                    f"{module.in_features} -> {module.out_features} here: it was made for another model"
                )
            found[site.name].append(module)
    if not any(found.values()):
        raise AdapterError("the adapter changes no Linear of this model: it was made for another one")
    return found


def _means(word: str, site: Site) -> bool:
    if word == "all":
        return site.out_features > 1
    if word in GROUPS:
        return any(part in GROUPS[word] for part in site.module.split(".")) and site.out_features > 1
    return site.name == word or site.module == word or site.module.endswith(f".{word}")


def _nothing(word: str, sites: Sequence[Site]) -> str:
    names = [site.module.rsplit(".", 1)[-1] for site in sites]
    if FUSED.get(word) in names:
        return f"no Linear is called '{word}': this family keeps it in the fused `{FUSED[word]}`"
    near = get_close_matches(word, [*names, *(site.name for site in sites), *GROUPS, "all"], n=2, cutoff=0.5)
    return f"no Linear is called '{word}'" + (f" (nearest: {', '.join(dict.fromkeys(near))})" if near else "")


def _known(sites: Sequence[Site]) -> str:
    return ", ".join(f"{site.name} ({site.out_features} x {site.in_features})" for site in sites)
