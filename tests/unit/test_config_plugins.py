"""A third party's part in one file: validated, listed, built."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from limbeck.config.explain import known
from limbeck.config.load import load_recipe
from limbeck.config.parts.objectives import OBJECTIVES
from limbeck.errors import RecipeError

PLUGIN = '''
from typing import Literal

from limbeck.config.parts.objectives import OBJECTIVES, ObjectiveOptions


class ZLossOptions(ObjectiveOptions):
    """Keeps the log of the normaliser near zero."""

    kind: Literal["plugin_z_loss"] = "plugin_z_loss"
    strength: float = 1e-4
    """Factor of the square."""


class ZLoss:
    def __init__(self, options):
        self.name, self.weight, self.strength = options.kind, options.weight, options.strength


OBJECTIVES.add(ZLossOptions, ZLoss)
'''
RECIPE = """
extends: pretrain
name: with-plugin
plugins: [{plugin}]
stages:
  pretrain:
    objectives: [ce, {{kind: plugin_z_loss, strength: 0.5}}]
"""


@pytest.fixture(autouse=True)
def registry_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is gone after it."""
    for name in ("_options", "_implementations"):
        monkeypatch.setattr(OBJECTIVES, name, dict(getattr(OBJECTIVES, name)))
    yield


def write(folder: Path, plugin: str, text: str = PLUGIN) -> Path:
    if plugin.endswith(".py"):
        (folder / plugin).write_text(text)
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(plugin=plugin))
    return recipe


def test_a_plugin_of_one_file_is_validated_listed_and_built(tmp_path: Path) -> None:
    objective = load_recipe(write(tmp_path, "z_loss.py")).stages["pretrain"].objectives[1]
    built = OBJECTIVES.build(objective)
    assert (built.name, built.weight, built.strength) == ("plugin_z_loss", 1.0, 0.5)
    assert ("plugin_z_loss", "Keeps the log of the normaliser near zero") in known("objectives")
    with pytest.raises(RecipeError, match=r"objectives\.1\.strenght: unknown key, did you mean 'strength'"):
        (tmp_path / "recipe.yaml").write_text(RECIPE.format(plugin="z_loss.py").replace("strength", "strenght"))
        load_recipe(tmp_path / "recipe.yaml")


def test_a_plugin_that_changed_is_read_again(tmp_path: Path) -> None:
    load_recipe(write(tmp_path, "z_loss.py"))
    recipe = load_recipe(write(tmp_path, "z_loss.py", PLUGIN.replace("options.strength", "2 * options.strength")))
    assert OBJECTIVES.build(recipe.stages["pretrain"].objectives[1]).strength == 1.0


def test_a_plugin_module_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "limbeck_test_plugin.py").write_text(PLUGIN.replace("plugin_z_loss", "module_z_loss"))
    monkeypatch.syspath_prepend(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(plugin="limbeck_test_plugin").replace("plugin_z_loss", "module_z_loss"))
    assert load_recipe(recipe).stages["pretrain"].objectives[1].kind == "module_z_loss"


@pytest.mark.parametrize(
    ("plugin", "text", "message"),
    [
        ("gone.py.py", None, "plug-in file 'gone.py.py' does not exist: looked for"),
        ("no_such_module", None, "plug-in module 'no_such_module' cannot be imported: ModuleNotFoundError"),
        ("syntax.py", "def f(:\n", "plug-in file 'syntax.py' cannot be imported: SyntaxError: invalid syntax"),
        ("raises.py", "x = 1\ny = x / 0\n", "cannot be imported: ZeroDivisionError: division by zero (line 2)"),
        ("exits.py", "import sys\nsys.exit(3)\n", "cannot be imported: SystemExit: 3"),
        ("clash.py", PLUGIN.replace("plugin_z_loss", "kl"), "objective 'kl' is already registered"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_told_at_its_line(
    tmp_path: Path, plugin: str, text: str | None, message: str
) -> None:
    recipe = write(tmp_path, plugin, text or "")
    if text is None and plugin.endswith(".py"):
        (tmp_path / plugin).unlink()
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    assert any("recipe.yaml:4:11 plugins.0: " in str(p) and message in str(p) for p in caught.value.problems), str(caught.value)
