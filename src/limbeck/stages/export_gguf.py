"""``to: gguf``: a model folder as a file that llama.cpp runs, checked there, with its manifest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from limbeck.config.parts.stages import GgufOptions
from limbeck.data.dataset import TokenRows
from limbeck.data.tokenizer import encode
from limbeck.errors import RunError
from limbeck.evaluation.evaluate import held_out_batches
from limbeck.evaluation.perplexity import perplexity
from limbeck.export.gguf import llama
from limbeck.export.gguf.architectures import pieces
from limbeck.export.gguf.origin import Origin, forced, opened
from limbeck.export.gguf.packing import BF16, F32, TERNARY
from limbeck.export.gguf.plan import Precisions, planned, size_lines
from limbeck.export.gguf.reference import reference_model
from limbeck.export.gguf.verify import check_verified, record, verify
from limbeck.export.gguf.writer import Written, gguf_package, manifest_path, write_gguf, write_manifest
from limbeck.export.places import check_file
from limbeck.models.loading import load_tokenizer
from limbeck.stages.context import Say

TERNARY_NAMES = tuple(kind.name for kind in TERNARY)
SUFFIX = ".gguf"
_ROWS, _LENGTH = 16, 48
_DAMAGE_ROWS = 16
_TEXTS = (
    "Hello, world! I'll be 1234 years old.\n\n\tTabs,   spaces  and\r\nline ends",
    "def main():\n    return {'\u00e9': 3.14}  # \u4f60\u597d \U0001f600",
)


def export_gguf(
    folder: Path, out: Path, options: GgufOptions, *, dtype: str = "bfloat16", held_out: Callable[[], Path | None] = lambda: None, say: Say = print
) -> Path:
    """Write ``out`` (a ``.gguf``) from a model folder, with ``out.json`` beside it.

    ``held_out`` gives the prepared text of the run, if it has any: on it the damage of ``force`` is measured, and from it positions
    for ``verify`` are taken.  Raises :class:`RunError` for a model that was not trained ternary and a ternary type without ``force``,
    for a scale other than the trained one, for scales where nothing is ternary, and for a file that is not the model.
    """
    gguf_package()
    check_file(out)
    check_file(manifest_path(out))
    if options.verify:
        llama.check_installed()
    origin = opened(folder)
    asked = options.type in TERNARY_NAMES or (options.type == "auto" and options.force)
    if asked or origin.about["trained_ternary"]:
        origin = _ternary_origin(origin, options, folder)
    elif options.scale is not None or options.group_size is not None:
        raise RunError(
            f"{'--scale' if options.scale is not None else '--group-size'}: is of ternary weights, and {folder} has none and gets none: leave it out, or "
            "add --force to round them"
        )
    wanted = Precisions(options.type, origin.group, origin.kept, F32 if dtype == "float32" else BF16, _written_group(origin, options))
    tokenizer = load_tokenizer(str(folder))
    about = {**origin.about, "asked": options.model_dump(mode="json"), "source": folder.name}
    if origin.about.get("forced"):
        about |= _damage(folder, origin, wanted, held_out(), say)
    name = folder.parent.name if folder.name == "model" else folder.name
    written = write_gguf(origin.weights, out, tokenizer, wanted, name=name, about=about, source=str(folder), say=say)
    for line in (*size_lines(written.manifest["sizes"]), *(f"note: {note}" for note in written.notes)):
        say(f"  {line}")
    if options.verify:
        _verify(written, origin, tokenizer, held_out(), say)
    return out


def _ternary_origin(origin: Origin, options: GgufOptions, folder: Path) -> Origin:
    if origin.about["trained_ternary"]:
        trained = origin.about["scale"]
        if options.scale is not None and options.scale != trained:
            raise RunError(f"--scale {options.scale}: {folder} was trained with `scale: {trained}`, and a file holds what was trained: leave --scale out")
        return origin
    if not options.force:
        raise RunError(
            f"{folder}: was not trained ternary, and rounding its weights now ruins it: train it with `surgery: [{{kind: ternarize}}]`, export it as "
            "bf16, or add --force to write it all the same"
        )
    scale = options.scale or ("group" if options.group_size else "row")
    return forced(origin, scale, options.group_size if scale == "group" else None)


def _written_group(origin: Origin, options: GgufOptions) -> int | None:
    """Groups that the file is asked to have, where the trained scales are coarser."""
    return None if origin.about.get("group") == options.group_size else options.group_size


def _damage(folder: Path, origin: Origin, wanted: Precisions, data: Path | None, say: Say) -> dict[str, Any]:
    """Perplexity of held-out text before and after the rounding, said and recorded."""
    if data is None:
        say("  --force: no held-out text is known here (name RUN/STAGE), so the damage was not measured")
        return {"damage": None}
    rows = TokenRows(data, "held_out")
    plain = opened(folder)
    found = {}
    for name, weights, precisions in (("before", plain.weights, Precisions("f32", plain.group)), ("after", origin.weights, wanted)):
        plan, _ = planned(pieces(weights.config, weights.shapes), precisions)
        model = reference_model(weights, plan, emulate=False)
        found[name] = perplexity(model, held_out_batches(rows, min(_DAMAGE_ROWS, len(rows))))["perplexity"]
    say(f"  --force: perplexity of held-out text {found['before']:.4g} -> {found['after']:.4g} by rounding a model that was not trained for it")
    return {"damage": {f"perplexity_{name}": value for name, value in found.items()}}


def _verify(written: Written, origin: Origin, tokenizer: Any, data: Path | None, say: Say) -> None:
    found = verify(written.path, origin.weights, written.plan, tokenizer, _prompts(tokenizer, data), _TEXTS)
    write_manifest(written.path, {**written.manifest, "verification": record(found)})
    say(f"  {found.line()}")
    check_verified(written.path, found)


def _prompts(tokenizer: Any, data: Path | None) -> Sequence[Sequence[int]]:
    """Rows of held-out text where there is any, else of the test texts and of ids drawn from the vocabulary."""
    if data is not None:
        rows = TokenRows(data, "held_out")
        if len(rows):
            ids = rows.batch(range(min(_ROWS, len(rows)))).input_ids_BT[:, :_LENGTH]
            return [row.tolist() for row in ids]
    drawn = torch.randint(0, len(tokenizer), (_ROWS, _LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    return [*filter(None, encode(tokenizer, list(_TEXTS))), *drawn[: _ROWS - len(_TEXTS)]]

