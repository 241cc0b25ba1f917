"""The pages of docs/ that begin with a problem: what they name exists, what they cite was measured, what they show runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import torch
import typer
import yaml
from typer.testing import CliRunner

from limbeck.api import generate
from limbeck.cli.app import app
from limbeck.config.fields import fields_of
from limbeck.config.load import load_recipe, load_text, shipped_recipes
from limbeck.config.parts.mixers import MIXERS
from limbeck.config.parts.objectives import OBJECTIVES
from limbeck.config.parts.sources import SOURCES
from limbeck.config.parts.stages import STAGES, DataOptions, LoopOptions, OptimOptions, StudentOptions
from limbeck.config.parts.teachers import TEACHERS
from limbeck.needs import HeadHidden
from limbeck.stages import folder
from limbeck.stages.run import COSMETIC, run_recipe
from limbeck.types import IGNORE, Batch, Head, Output, Signal
from pages import DOCS, ROOT, Page

NAMES = ("index.md", "concepts.md", "hybrid.md", "ternary.md", "lora.md", "extend.md")
MEASURED = ("index.md", "hybrid.md", "ternary.md", "lora.md")
VERBS: click.Group = typer.main.get_command(app)  # type: ignore[assignment]
NUMBER = re.compile(r"(?<![\w.-])-?(?:\d+\.\d+%?|\d+%)(?![\w%]|\.\d)")


@pytest.mark.parametrize("name", sorted(path.name for path in DOCS.glob("*.md")))
def test_links_of_a_page_lead_somewhere(name: str) -> None:
    assert [link for link in Page(name).links() if not (DOCS / link).exists()] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_page_is_short(name: str) -> None:
    assert Page(name).text.count("\n") <= 200


@pytest.mark.parametrize("name", MEASURED)
def test_numbers_are_those_that_were_measured(name: str) -> None:
    page = Page(name)
    cited = list(page.cited())
    assert cited and [(found, found.value) for found in cited if not found.agrees] == []
    prose = page.prose
    assert [found for found in cited if not re.search(rf"(?<![\d.-]){re.escape(found.shown)}(?![\d%])", prose)] == []


@pytest.mark.parametrize("name", MEASURED)
def test_no_number_stands_without_where_it_comes_from(name: str) -> None:
    page = Page(name)
    known = {found.shown for found in page.cited()} | {text.split()[0] for _, lines in page.planned() for text in lines}
    # Rows that begin with code are plans, which the next test makes again, and flags, whose defaults test_ternary_docs.py knows.
    lines = [line for line in page.prose.splitlines() if not line.startswith(("|  |", "| ,"))]
    assert [number for number in NUMBER.findall("\n".join(lines)) if number not in known] == []


def test_planned_numbers_are_what_the_planner_prints() -> None:
    verdicts = re.findall(r"^\| `(hybrid_\S+ [^`]+)` \| (fits; [^|]+) \|$", Page("hybrid.md").text, re.MULTILINE)
    assert len(verdicts) == 5
    claims = [(words.split(), [text.strip()]) for words, text in verdicts]
    claims += [claim for name in MEASURED for claim in Page(name).planned()]
    for words, texts in claims:
        printed = CliRunner().invoke(app, ["plan", *words]).output
        assert [text for text in texts if text not in printed] == [], words


@pytest.mark.parametrize(("name", "line"), [(name, line) for name in NAMES for line in Page(name).commands()])
def test_commands_are_understood(name: str, line: list[str]) -> None:
    words = line[: line.index(">")] if ">" in line else line
    group, verb, *rest = [VERBS, *words] if words[0] != "adapters" else [VERBS.commands["adapters"], *words[1:]]
    group.commands[verb].make_context(verb, [str(word) for word in rest])  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["hybrid.md", "lora.md"])
def test_recipes_of_a_page_are_taken(name: str) -> None:
    blocks = Page(name).blocks("yaml")
    assert blocks
    for block in blocks:
        load_text(block.code, label=name)


@pytest.mark.parametrize("name", NAMES)
def test_recipes_settings_and_parts_that_a_page_names_exist(name: str) -> None:
    text = Page(name).text
    spans = set(re.findall(r"`([a-z_0-9.]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)))
    recipes = {span for span in spans if re.match(r"(hybrid|lora|agentic|ternary|logit)_[a-z]*[\d.]*_?\w*$", span)}
    parts = {part for registry in (OBJECTIVES, TEACHERS, STAGES) for part in registry} | {"lora_generator"}
    assert recipes - parts <= set(shipped_recipes())
    for span in spans:
        if re.match(r"(student|optim|loop|data)\.[a-z_]+$", span):
            first, field = span.split(".")
            assert field in fields_of(
                {"student": StudentOptions, "optim": OptimOptions, "loop": LoopOptions, "data": DataOptions}[first]
            ), span


def test_the_tables_of_concepts_are_whole() -> None:
    text = Page("concepts.md").text
    rows = re.findall(r"^\| (`[^|]+`) \| `(\w+)/` \|", text, re.MULTILINE)
    assert {kind for kinds, _ in rows for kind in re.findall(r"\w+", kinds)} == set(STAGES)
    (artefacts,) = re.findall(r"<stage>/\{(\S+)\}/", folder.__doc__ or "")
    assert {name for _, name in rows} == set(artefacts.split(","))
    teachers = text[text.index("| teacher | for |") :].split("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", teachers, re.MULTILINE)) == set(TEACHERS)
    assert {"zero_stage", "deterministic", "trackers"} <= COSMETIC


def test_the_mixers_of_the_table_are_there() -> None:
    table = Page("hybrid.md").text
    assert set(re.findall(r"^\| `(\w+)`[^|]*\|(?: [\d.]+%? \|){5}$", table, re.MULTILINE)) < set(MIXERS)


def test_the_picture_tells_what_it_shows_without_eyes() -> None:
    picture = (DOCS / "images" / "concepts.svg").read_text(encoding="utf-8")
    assert all(word in picture for word in ("<title", "<desc", "prefers-color-scheme: dark"))


# -- docs/extend.md ----------------------------------------------------------------------------------------------------------

SMALL = [
    f"{stage}.loop.{setting}"
    for stage in ("align", "distil")
    for setting in ("tokens=512", "batch_tokens=256", "log_every=1", "canary=false")
]
SMALL += ["align.data.source={kind: text, path: ., suffixes: [.py]}", "align.data.sequence=64", "align.data.held_out=0"]


@pytest.fixture
def registries_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a page registers is gone after its test."""
    for registry in (MIXERS, OBJECTIVES, SOURCES, TEACHERS):
        for name in ("_options", "_implementations"):
            monkeypatch.setattr(registry, name, dict(getattr(registry, name)))
    yield


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registries_as_before: None) -> Path:
    """A folder with the files that the page shows."""
    for block in Page("extend.md").blocks("yaml", "python"):
        first, _, _ = block.code.partition("\n")
        (tmp_path / first.removeprefix("# file: ")).write_text(block.code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_recipe_with_the_plugins_of_the_page_runs_and_its_student_writes(plugins: Path) -> None:
    recipe = load_recipe("parts.yaml", SMALL)
    said: list[str] = []
    for stage in ("align", "distil"):
        run_dir = run_recipe(recipe, recipe_dir=plugins, stage=stage, say=lambda line: said.append(str(line)))
    assert (run_dir / "distil" / "metrics.jsonl").read_text().count('"hidden_match"') == 2
    # As a verb in a process of its own begins: without what the recipe registered.
    del MIXERS._options["retention"], MIXERS._implementations["retention"]
    for name in [name for name in sys.modules if name.startswith("limbeck_plugin_")]:
        del sys.modules[name]
    assert isinstance(generate(run_dir / "distil", "def f(", tokens=4), str)


def test_a_sum_of_the_page_is_the_sum_of_its_parts(plugins: Path) -> None:
    objective = OBJECTIVES.build(load_recipe("parts.yaml").stages["distil"].objectives[1])
    ids, places = torch.randint(0, 50, (4, 9)), torch.arange(9).expand(4, 9)
    batch = Batch(ids, ids.roll(-1, 1).masked_fill(places > 7, IGNORE), places, torch.zeros_like(ids))
    ours, theirs, head = torch.randn(4, 9, 6).double(), torch.randn(4, 9, 6).double(), Head(torch.randn(50, 6))

    def loss(rows: slice, part: Batch) -> torch.Tensor:
        return objective(Output(ours[rows], head), Signal({HeadHidden: Output(theirs[rows], head)}), part).sum

    parts = [loss(slice(row, row + 1), part) for row, part in enumerate(batch.split(1))]
    torch.testing.assert_close(torch.stack(parts).sum(), loss(slice(0, 4), batch), rtol=1e-12, atol=0)
    assert int(objective.count(batch)) == 32 and objective.weight == 0.1


def test_the_mixer_of_the_page_keeps_every_promise_by_the_command_of_the_page(plugins: Path) -> None:
    (line,) = Page("extend.md").commands("text", program="pytest")
    words = [sys.executable, "-m", "pytest", *line, "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(plugins), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and re.search(r"1\d passed", done.stdout), done.stdout[-3000:]


OTHERS = """
from typing import Literal
import torch
from limbeck.config.base import Part
from limbeck.config.parts.sources import SOURCES, SourceOptions
from limbeck.config.parts.teachers import TEACHERS
from limbeck.data.reading import Document
from limbeck.data.sources import Source
from limbeck.needs import HeadHidden
from limbeck.types import Head, Output, Signal


class CountingOptions(SourceOptions):
    kind: Literal["counting"] = "counting"


class Counting(Source):
    def documents(self):
        return (Document(f"{i}", " ".join(str(i + n) for n in range(60))) for i in range(30))


class UniformOptions(Part):
    kind: Literal["uniform"] = "uniform"

    def provides(self, need):
        return True if isinstance(need, HeadHidden) else "it knows nothing"


class Uniform:
    module = None

    def __init__(self, options, source):
        assert source is None

    def load(self, device):
        self.head = Head(torch.zeros(4096, 8))

    def fingerprint(self):
        return {"weights": "none"}

    def signal(self, batch, needs):
        return Signal({HeadHidden: Output(torch.zeros(*batch.input_ids_BT.shape, 8), self.head)})


SOURCES.add(CountingOptions, Counting)
TEACHERS.add(UniformOptions, Uniform)
"""
RECIPE = {
    "name": "others",
    "plugins": ["others.py"],
    "stages": {
        "train": {
            "data": {"source": "counting", "tokenizer": "builtin:code-2m", "sequence": 32, "held_out": 0},
            "student": {
                "config": {
                    "model_type": "qwen3", "vocab_size": 4096, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                    "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16,
                }
            },
            "teacher": "uniform",
            "objectives": ["kl"],
            "optim": {"groups": [{"lr": 0.01}]},
            "loop": {"steps": 2, "batch_tokens": 128},
        }
    },
}  # fmt: skip


def test_a_source_and_a_teacher_with_what_the_table_says_are_enough(tmp_path: Path, registries_as_before: None) -> None:
    (tmp_path / "others.py").write_text(OTHERS)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    run_dir = run_recipe(
        load_recipe(tmp_path / "recipe.yaml"), recipe_dir=tmp_path, run_dir=tmp_path / "run", say=lambda line: None
    )
    assert (run_dir / "train" / "model" / "model.safetensors").is_file()
