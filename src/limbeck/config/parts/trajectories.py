"""Options of the stage that makes training windows of agent trajectories."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from limbeck.config.base import Count, From, OneOrMany, Options, PartOf, Place
from limbeck.config.parts.stages import STAGES, StageOptions
from limbeck.config.parts.teachers import TEACHERS
from limbeck.needs import TopK


class TrajectoryHubOptions(Options):
    """A Hugging Face dataset of trajectories, from the hub or from a local folder that `datasets` can load."""

    path: Place
    """Name on the hub, or a folder."""
    name: str | None = None
    """Configuration of the dataset."""
    split: str = "train"
    """Split to read."""
    revision: str | None = None
    """Pinned revision."""


class TrajectoryFilters(Options):
    """Which trajectories are learnt from; every one left out is counted and named in `dropped.jsonl`."""

    resolved: bool = True
    """Only those whose patch passed the tests (SWE-agent's files: that were submitted; event streams without a verdict: none)."""
    exit_status: Annotated[tuple[str, ...], OneOrMany()] = ("submit",)
    """Only those that ended so; empty for any."""
    patch: bool = True
    """Only those with a patch that is not empty."""
    swe_bench: Literal["drop", "keep"] = "drop"
    """What to do with the twelve repositories of SWE-bench, which evaluations use."""
    leaked: tuple[Place, ...] = ()
    """Files of evaluation instances that must not be learnt from: ids, one a line, or JSON lines with `instance_id`, and where there are
    `base_commit` and `problem_statement`: the same commit, or an issue that is alike in 0.8 of its phrases, is left out too."""
    per_instance: int = Field(4, ge=1)
    """Trajectories of one instance: the shortest, then those whose actions are least like the ones kept."""


class TrajectoryConditionOptions(Options):
    """What a generator reads: the issue, which is the first user turn."""

    tokens: int = Field(512, ge=8)
    """Tokens of it, from its beginning."""
    skip: str | None = None
    """Regular expression; what it finds at the beginning of an issue is left out of what is read (words that all issues share)."""


@STAGES.register("limbeck.stages.prepare_trajectories:PrepareTrajectoriesStage")
class PrepareTrajectoriesStageOptions(StageOptions):
    """Make training windows of agent trajectories: what the assistant says is the target, the issue is the condition.  No model, no GPU."""

    kind: Literal["prepare_trajectories"] = "prepare_trajectories"
    tokenizer: Place | From
    """A folder, a hub name, `builtin:NAME` or `{from: stage}`: that of the base model."""
    path: Annotated[tuple[Place, ...], OneOrMany()] = ()
    """Files, folders or globs: rows as in nebius/SWE-rebench-openhands-trajectories (JSON lines, parquet), SWE-agent's `.traj`, OpenHands' event
    streams; told apart by their content."""
    hub: TrajectoryHubOptions | None = None
    """A dataset of such rows."""
    limit: Count | None = None
    """Read at most this many rows."""
    template: Place | None = None
    """Jinja file of the chat template, which must be the one that the teacher is served with; by default the tokenizer's own."""
    filters: TrajectoryFilters = TrajectoryFilters()
    """Which trajectories are learnt from."""
    held_out: Annotated[float, Field(ge=0, lt=1)] | tuple[str, ...] = 0.1
    """Share of the repositories that is never trained on, chosen by a hash of their names; or their names."""
    sequence: int = Field(8192, ge=64)
    """Tokens a window has room for."""
    policy: Literal["drop", "head", "head_tail", "windows"] = "windows"
    """Of a trajectory that is longer: leave it out, keep its first turns, its first and last ones, or make windows of all.  Turns are
    never cut, and system and issue stand at the beginning of every window."""
    overlap: float = Field(0.25, ge=0, lt=1)
    """With `windows`: share of a window's room for turns of the window before, which do not count again."""
    condition: TrajectoryConditionOptions = TrajectoryConditionOptions()
    """What a generator reads."""
    arrow: bool = False
    """Write the windows as an Arrow file too, for `datasets.Dataset.from_file`."""

    @model_validator(mode="after")
    def _fits(self) -> PrepareTrajectoriesStageOptions:
        if bool(self.path) == (self.hub is not None):
            raise ValueError("name files by `path` or a dataset by `hub`: " + ("both are given" if self.path else "neither is given"))
        return self


@STAGES.register("limbeck.stages.evaluate_agent:EvaluateAgentStage")
class EvaluateAgentStageOptions(StageOptions):
    """A generator beside the base, a static LoRA and shuffled issues: loss, KL to the teacher, and tool calls, on repositories never trained on."""

    kind: Literal["evaluate_agent"] = "evaluate_agent"
    from_: str = Field(alias="from")
    """The train stage whose generator is judged."""
    against: tuple[str, ...] = ()
    """Other generators, by their stages; a static one (`condition: none`) is the control that any generator must beat."""
    teacher: Annotated[Any, PartOf(TEACHERS)] | None = None
    """Whose distribution the KL is taken from: `stored`, `http` or `local`; none for losses alone."""
    top_k: int = Field(128, ge=1)
    """Likeliest ids of the teacher, beside the mass of the rest."""
    splits: tuple[Literal["seen", "held_out_source"], ...] = ("held_out_source", "seen")
    """Issues that are judged: of repositories that were held out, and of ones that were trained on."""
    issues: int = Field(32, ge=1)
    """Issues of a split, at most."""
    rows: int = Field(4, ge=1)
    """Windows of each issue, at most."""
    turns: int = Field(2, ge=0)
    """Tool calls of each issue that every model writes itself, after the true conversation; 0 for none."""
    new_tokens: int = Field(256, ge=1)
    """Tokens of such a call, at most."""
    bootstrap: int = Field(2000, ge=100)
    """Resamples of the issues for each interval."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype."""

    @model_validator(mode="after")
    def _answers(self) -> EvaluateAgentStageOptions:
        if self.teacher is not None and (answer := self.teacher.provides(TopK(self.top_k))) is not True:
            raise ValueError(f"teacher: {answer}")
        return self
