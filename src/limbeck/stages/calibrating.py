"""Calibration of a fresh student in its train stage: measured once, kept beside the checkpoints, set by every rank and every start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from limbeck.data.dataset import TokenRows
from limbeck.engine.precision import autocast
from limbeck.models.structure import attention_view
from limbeck.needs import AttentionStream
from limbeck.stages.context import StageContext
from limbeck.stages.folder import read_json, write_json
from limbeck.students.calibration import apply, from_json, measure, summary, to_json
from limbeck.students.mixers.base import Mixer
from limbeck.students.student import Student

FILE = "calibration.json"
ROWS_A_PASS = 4


def calibrate(context: StageContext, student: Any, teacher: Any, rows: Any) -> None:
    """Fit the mixers that this stage has just made to the attention of their base, which is the loaded ``teacher``.

    The first rank measures; all ranks set what is in the file.  A stage that goes on from a checkpoint reads it again: the student
    is made anew at every start, and what does not train is in no checkpoint.
    """
    wanted = calibrated_layers(student) if isinstance(student, Student) and context.options.student.surgery else {}
    if not wanted or context.options.teacher.provides(AttentionStream()) is not True:
        return
    num_rows = max(wanted.values())
    mixers = {layer: mixer for layer, mixer in student.mixers().items() if layer in wanted and isinstance(mixer, Mixer)}
    path = context.folder / FILE
    context.once(lambda: None if path.exists() else _measure(context, mixers, teacher, rows, num_rows, path))
    records = from_json(read_json(path))
    apply(mixers, records)
    if records:
        context.say(f"  {summary(records, min(num_rows, len(rows)))}")


def calibrated_layers(student: Student) -> dict[int, int]:
    """Layers whose surgery asks for calibration, and the rows it wants."""
    asked = [(surgery, getattr(surgery.options, "calibration_rows", 0)) for surgery in student.surgeries]
    return {layer: rows for surgery, rows in asked if rows for layer in surgery.replaced(student.model)}


def _measure(context: StageContext, mixers: dict[int, Mixer], teacher: Any, rows: TokenRows, num_rows: int, path: Path) -> None:
    indices = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), num_rows)).astype(np.int64))
    device = context.world.device
    batches = [rows.batch(indices[i : i + ROWS_A_PASS]).to(device) for i in range(0, len(indices), ROWS_A_PASS)]
    views = {layer: attention_view(teacher.model, layer) for layer in mixers}
    with autocast(device, context.options.loop.precision):
        records = measure(mixers, views, teacher.stream, batches)
    write_json(path, to_json(records))
