"""Options of the trackers: where the lines of ``metrics.jsonl`` are shown too."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from typing import ClassVar, Literal

from pydantic import Field

from limbeck.config.base import Part, Place
from limbeck.registry import Registry

TRACKERS = Registry("tracker")


class TrackerOptions(Part):
    """Fields that every tracker has."""

    package: ClassVar[str]
    """What has to be installed."""
    extra: ClassVar[str] = ""
    """The extra of ours that does; empty for parts from elsewhere."""

    def lacking(self) -> str | None:
        """What this machine lacks for it, with the way out; None if it can be used."""
        if self.package in sys.modules or find_spec(self.package) is not None:
            return None
        way = f"'limbeck[{self.extra}]'" if self.extra else self.package
        return f"tracker '{self.kind}' needs the package {self.package}, which is not installed: pip install {way}, or leave the tracker out"


@TRACKERS.register("limbeck.engine.trackers:Tensorboard")
class TensorboardOptions(TrackerOptions):
    """Event files for `tensorboard --logdir`; no account, no network."""

    package = "tensorboard"
    extra = "tensorboard"
    kind: Literal["tensorboard"] = "tensorboard"
    folder: Place | None = None
    """Folder of many runs' events: RUN/STAGE below it.  By default `tensorboard/` in the stage's own."""


@TRACKERS.register("limbeck.engine.trackers:Wandb")
class WandbOptions(TrackerOptions):
    """Weights & Biases; offline unless asked, `wandb sync` sends it later.  Its key comes from WANDB_API_KEY alone."""

    package = "wandb"
    extra = "wandb"
    kind: Literal["wandb"] = "wandb"
    project: str = Field("limbeck", min_length=1)
    """Its project."""
    entity: str | None = None
    """User or team; the account's own by default."""
    mode: Literal["offline", "online"] = "offline"
    """`offline` writes `wandb/` into the stage's folder; `online` sends each line as it is written."""
    tags: tuple[str, ...] = ()
    """Tags of the run."""

    def lacking(self) -> str | None:
        if self.mode == "online" and not os.environ.get("WANDB_API_KEY"):
            return "mode 'online' needs an account, and WANDB_API_KEY is not set: set it (`wandb login` shows the key), or use mode: offline and `wandb sync`"
        return super().lacking()


@TRACKERS.register("limbeck.engine.trackers:Trackio")
class TrackioOptions(TrackerOptions):
    """trackio: a local database (its folder is TRACKIO_DIR), shown by `trackio show`; no account."""

    package = "trackio"
    extra = "trackio"
    kind: Literal["trackio"] = "trackio"
    project: str = Field("limbeck", min_length=1)
    """Its project."""
    space: str | None = None
    """A Hugging Face Space that shows it, USER/NAME; its token comes from HF_TOKEN alone."""

    def lacking(self) -> str | None:
        if self.space is not None and not os.environ.get("HF_TOKEN"):
            return f"space {self.space!r} needs an account, and HF_TOKEN is not set: set it, or leave `space` out"
        return super().lacking()
