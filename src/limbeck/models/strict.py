"""Loading that is strict in both directions."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from transformers import PreTrainedModel

from limbeck.errors import ModelError

SHOWN = 6


def check_loading(model: PreTrainedModel, info: dict[str, Any], source: str) -> None:
    """Raise :class:`ModelError` unless every tensor of the model came from the files and every tensor of the files was used.

    ``info`` is transformers' ``output_loading_info``; tensors tied to a loaded one and those a family's own rules leave out are
    not in it.
    """
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    mismatched = sorted(info["mismatched_keys"])
    errors = [str(error) for error in info.get("error_msgs", ())]
    errors += [str(error) for error in dict(info.get("conversion_errors", {})).values()]
    if not (missing or unexpected or mismatched or errors):
        return
    lines = [f"{source}: the weights do not fit {type(model).__name__}"]
    if missing:
        lines.append("  not in the files: " + _shown(missing, unexpected))
    if unexpected:
        lines.append("  in the files and not in the model: " + _shown(unexpected, missing))
    if mismatched:
        lines.append(
            "  other shapes: "
            + "; ".join(
                f"{name} is {tuple(found)} in the files, {tuple(wanted)} in the model"
                for name, found, wanted in mismatched[:SHOWN]
            )
            + _more(mismatched)
        )
    lines += [f"  {error}" for error in errors[:SHOWN]]
    lines.append(
        "  The folder is damaged, belongs to another config.json, or was saved by another version: save or download it again."
    )
    raise ModelError("\n".join(lines))


def _shown(names: list[str], others: Iterable[str]) -> str:
    words = []
    for name in names[:SHOWN]:
        near = get_close_matches(name, list(others), n=1, cutoff=0.6)
        words.append(f"{name} (nearest: {near[0]})" if near else name)
    return ", ".join(words) + _more(names)


def _more(names: list[Any]) -> str:
    return f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
