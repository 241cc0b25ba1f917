"""``limbeck lm_eval``: lm-evaluation-harness's own command line, to which our model type is known."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import typer

from limbeck.errors import LimbeckError


def need_harness(who: str) -> None:
    """Say what is not installed before anything heavy is imported."""
    absent = [package for package in ("lm_eval", "accelerate", "datasets") if find_spec(package) is None]
    if absent:
        raise LimbeckError(f"{who} needs {', '.join(absent)}: pip install 'limbeck[lm-eval]'")


def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness's own command line; its `--model hf` opens students.

    limbeck lm_eval --model hf --model_args pretrained=runs/hybrid/distil/model --tasks arc_easy
    """
    need_harness("`limbeck lm_eval`")
    before, sys.argv = sys.argv, ["lm_eval", *context.args]
    try:
        # `import limbeck` has registered the model type.
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except ModuleNotFoundError as error:
        raise LimbeckError(f"`limbeck lm_eval`: the harness needs {error.name} for this, which is not installed: pip install {error.name}") from error
    finally:
        sys.argv = before
