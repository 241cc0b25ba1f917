"""Options of the stage that cuts real text into conditions: the tasks for which adapters are wanted."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from limbeck.config.base import Count, From, OneOrMany, Options, PartOf, Place
from limbeck.config.parts.sources import SOURCES
from limbeck.config.parts.stages import STAGES, StageOptions
from limbeck.errors import did_you_mean

FormatName = Literal[
    "plain", "upper", "lower", "title", "swapped_case", "snake", "no_vowels", "no_spaces", "reversed_words", "mirrored", "rot13",
    "doubled", "digits_for_letters", "quoted",
]  # fmt: skip


class SliceOptions(Options):
    """How a source is cut into slices."""

    by: Literal["none", "field", "length", "folder", "topic"] = "none"
    """`field`: values of a column; `length`: equally many from short to long; `folder`: first folder below what all documents
    share; `topic`: clusters of similar words."""
    count: int = Field(1, ge=1)
    """Slices: of `field` and `folder` those with the most examples."""
    field: str | None = None
    """Column whose values tell the slices apart, for `by: field`; it holds text."""

    @model_validator(mode="after")
    def _fits(self) -> SliceOptions:
        if self.by == "none" and self.count != 1:
            raise ValueError(f"count: {self.count} slices need a `by`: field, length, folder or topic")
        if (self.by == "field") != (self.field is not None):
            raise ValueError("`by: field` and `field: COLUMN` go together")
        return self


class ConditionSourceOptions(Options):
    """A source of tasks: rows of a prompt and an answer, or plain text."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """First part of the names of its conditions."""
    source: Annotated[Any, PartOf(SOURCES, "text")]
    """Where the text comes from."""
    prompt: str | None = None
    """Column of a row that holds what is asked; `a+b` joins two with a line break.  Without it a document is all text."""
    answer: str | None = None
    """Column of a row that holds what is to be said."""
    slices: SliceOptions = SliceOptions()
    """How it is cut."""
    cut: Count | None = None
    """Texts are cut at line ends into examples of at most so many characters (a longer line is cut where it must be)."""

    @model_validator(mode="after")
    def _readable(self) -> ConditionSourceOptions:
        kind, share = self.source.kind, self.source.share
        if kind == "recall":
            raise ValueError("source kind 'recall' makes its text up: conditions are cut from real text")
        if share is not None:
            raise ValueError(f"source.share: {share:g} has no meaning here: every source is read whole (set `limit` to read less of it)")
        if (self.prompt is None) != (self.answer is None):
            raise ValueError("`prompt` and `answer` go together: leave both out for plain text")
        if self.prompt is not None and self.cut is not None:
            raise ValueError("`cut` is for plain text: a prompt with its answer is one example")
        rows = "field" in type(self.source).model_fields and getattr(self.source, "documents", "row") == "row"
        if not rows and (self.prompt is not None or self.slices.by == "field"):
            what = "`prompt` and `answer`" if self.prompt is not None else "`slices: {by: field}`"
            way = "set `documents: row`" if kind == "text" else "only sources of rows have them"
            raise ValueError(f"{what} name columns, and this source of kind {kind!r} has no rows: {way}")
        return self


class HeldOutOptions(Options):
    """Which conditions no generator is trained on."""

    sources: tuple[str, ...] = ()
    """Whole sources, by name."""
    slices: Annotated[int, Field(ge=0)] | tuple[str, ...] = 0
    """So many conditions of the other sources, drawn by the seed; the source and the format of each stay among the seen ones.
    Or names: `source/slice/format`, or `source/slice` for all its formats."""


class ConditionTextOptions(Options):
    """What a generator reads to know which adapter is wanted."""

    form: Literal["prompts", "prompt_answer"] = "prompts"
    """Prompts alone, or with their answers; of plain text the whole."""
    texts: int = Field(4, ge=1)
    """Texts of the condition's training side, drawn anew for every row."""
    tokens: int = Field(48, ge=2)
    """Tokens of each; a longer one is cut, a prompt with its answer so that both are seen."""


@STAGES.register("limbeck.stages.prepare_conditions:PrepareConditionsStage")
class PrepareConditionsStageOptions(StageOptions):
    """Cut text into conditions, each with prompts to read, text to train on and text to test on.  No model, no GPU."""

    kind: Literal["prepare_conditions"] = "prepare_conditions"
    tokenizer: Place | From
    """A folder, a hub name, `builtin:NAME` or `{from: stage}`: that of the base model."""
    sources: tuple[ConditionSourceOptions, ...] = Field(min_length=1)
    """Where the tasks come from."""
    formats: Annotated[tuple[FormatName, ...], Field(min_length=1), OneOrMany()] = ("plain",)
    """How texts are written; every slice in every format is a condition."""
    examples: int = Field(200, ge=1)
    """Training examples of a condition, at most."""
    test_examples: int = Field(40, ge=1)
    """Test examples of a condition, at most.  A hash of its text puts an example on one side in all formats."""
    min_examples: int = Field(20, ge=1)
    """A slice with fewer training examples is dropped."""
    held_out: HeldOutOptions = HeldOutOptions()
    """Which conditions no generator is trained on."""
    mixes: int = Field(0, ge=0)
    """Conditions made of two seen ones of different sources (of different slices where there is one source), half the examples from
    each; the pairs are drawn by the seed."""
    mixes_in_one_format: int = Field(0, ge=0)
    """More of them, of two seen conditions in the same format."""
    loss: Literal["text", "answer"] = "text"
    """Which tokens are targets: all, or only answers (of plain text all)."""
    sequence: int = Field(128, ge=8)
    """Tokens a row."""
    append_eos: bool = True
    """End every example with the tokenizer's end-of-text token."""
    condition: ConditionTextOptions = ConditionTextOptions()
    """What a generator reads."""

    @model_validator(mode="after")
    def _fits(self) -> PrepareConditionsStageOptions:
        names = [source.name for source in self.sources]
        for what, words in (("sources: name", names), ("formats:", list(self.formats))):
            if twice := [word for word, count in Counter(words).items() if count > 1]:
                raise ValueError(f"{what} {twice[0]!r} stands twice")
        if reserved := [name for name in names if name == "mix"]:
            raise ValueError(f"sources: name {reserved[0]!r} is kept for mixes: choose another")
        for name in self.held_out.sources:
            if name not in names:
                raise ValueError(f"held_out.sources: no source named {name!r}{did_you_mean(name, names) or ';'} sources: {', '.join(names)}")
        if set(names) <= set(self.held_out.sources):
            raise ValueError(f"held_out.sources: all {len(names)} sources are held out: leave one to train on")
        if self.min_examples < self.condition.texts:
            raise ValueError(
                f"min_examples: {self.min_examples} training examples are fewer than the condition.texts: {self.condition.texts} that are read: "
                "raise the one or lower the other"
            )
        if self.examples < self.min_examples:
            raise ValueError(f"examples: {self.examples} are fewer than min_examples: {self.min_examples}, so every slice would be dropped")
        if (self.mixes or self.mixes_in_one_format) and self.examples < 2 * self.condition.texts:
            raise ValueError(f"mixes: half of examples: {self.examples} is too few: allowed with {2 * self.condition.texts} or more")
        return self
