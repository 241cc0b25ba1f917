"""``limbeck signals``: what is in a folder of signals, whether it is whole, and other toolkits' files in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from limbeck import api
from limbeck.errors import TeacherError


def signals(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder of signals, such as RUN/STAGE/signals.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte; name what is damaged by file, block and document.")] = False,
    from_distillkit: Annotated[
        Path | None, typer.Option(help="Make FOLDER from DistillKit's parquet files in this folder.", show_default=False)
    ] = None,
    teacher: Annotated[str, typer.Option(help="With --from-distillkit: the model that they came from.")] = "unknown",
    to_distillkit: Annotated[
        Path | None, typer.Option(help="Write FOLDER's documents as DistillKit's parquet files.", show_default=False)
    ] = None,
) -> None:
    """Show, verify, import or export stored signals.

    \b
    limbeck signals runs/logit_kd_stored/capture/signals --verify
    limbeck signals here --from-distillkit there --teacher Qwen/Qwen3-8B
    """
    from limbeck.cli.console import say

    if from_distillkit is not None:
        from limbeck.teachers.store.distillkit import import_parquet

        import_parquet(from_distillkit, folder, teacher={"model": teacher}).close()
    store = api.signals(folder)
    held = store.identity
    say(f"{store.num_documents:,} documents, {store.num_rows:,} positions, {store.num_bytes / 1e6:.1f} MB")
    say(f"k {held.k}, temperatures {', '.join(f'{t:g}' for t in held.temperatures)}, samples {held.samples}, codec {held.codec}")
    say(f"vocabulary {held.vocabulary:,}; teacher {', '.join(f'{name} {value}' for name, value in held.teacher.items())}")
    if verify:
        damaged = store.verify()
        if damaged:
            raise TeacherError("\n".join(damaged))
        say("every byte is as it was written")
    if to_distillkit is not None:
        from limbeck.teachers.store.distillkit import export_parquet

        say(f"{export_parquet(store, to_distillkit):,} documents written to {to_distillkit}")
