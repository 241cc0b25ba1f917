"""``limbeck lm_eval``: lm-evaluation-harness's own command line, to which our model type is known."""

from __future__ import annotations

import typer

from limbeck import api


def lm_eval(context: typer.Context) -> None:
    """lm-evaluation-harness's own command line, for our models.

    \b
    limbeck lm_eval --model hf --model_args pretrained=runs/hybrid/distil/model --tasks arc_easy

    Its `--model hf` opens students.
    """
    api.lm_eval(*context.args)
