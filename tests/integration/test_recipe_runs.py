"""A whole recipe on a tiny model: pretrain, align, distil, evaluate, export; and what happens when it is run again."""

from __future__ import annotations

import json
import shutil
import textwrap
from pathlib import Path

import pytest

from limbeck.config.load import load_recipe
from limbeck.config.recipe import Recipe
from limbeck.errors import DataError, RecipeError, RunError
from limbeck.stages.evaluate import _probing
from limbeck.stages.run import run_recipe

RECIPE = """
name: tiny
stages:
  pretrain:
    data: {source: [{kind: text, path: corpus, suffixes: [.py]}, {kind: recall, share: 0.2}], tokenizer: {vocabulary: 400}, sequence: 64, held_out: 0.2}
    student:
      config: {model_type: qwen3, vocab_size: 400, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 3, num_attention_heads: 4,
               num_key_value_heads: 2, head_dim: 16, max_position_embeddings: 256, tie_word_embeddings: true}
    optim: {groups: [{lr: 3e-3}]}
    loop: {steps: 6, batch_tokens: 512, checkpoint_every: 2, log_every: 2}
  align:
    data: {from: pretrain}
    student: {base: {from: pretrain}, surgery: [{kind: hybridize, mixer: gated_deltanet}], train: [mixers]}
    teacher: {kind: self}
    objectives: [{kind: attention_alignment}]
    optim: {groups: [{role: mixers, lr: 3e-3}]}
    loop: {steps: 4, batch_tokens: 512}
  distil:
    data: {from: pretrain}
    student: {from: align, keep: [1]}
    teacher: {kind: local, model: {from: pretrain}}
    objectives: [{kind: kl}]
    optim: {groups: [{role: mixers, lr: 1e-3}, {role: rest, lr: 1e-4}]}
    loop: {steps: 4, batch_tokens: 512}
  evaluate:
    kind: evaluate
    from: distil
    against: [teacher, copy_init, align]
    rows: 4
    recall: {tasks: [repeat], distances: [16], rows: 2}
    speed: {contexts: [64, 128], tokens: 2}
    samples: {tokens: 4}
  export: {kind: export, from: distil}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    """A recipe file, the run directory of its first run, and what was said."""
    home = tmp_path_factory.mktemp("recipe")
    (home / "corpus").mkdir()
    for source in sorted(Path(textwrap.__file__).parent.glob("[a-d]*.py"))[:40]:
        (home / "corpus" / source.name).write_bytes(source.read_bytes())
    (home / "tiny.yaml").write_text(RECIPE)
    said: list[str] = []
    run_dir = run_recipe(load_recipe(home / "tiny.yaml"), recipe_dir=home, run_dir=home / "run", say=said.append)
    return home, run_dir, said


def statuses(run_dir: Path) -> dict[str, str]:
    return {p.parent.name: json.loads(p.read_text())["status"] for p in run_dir.glob("*/stage.json")}


def test_every_stage_leaves_its_one_artefact(finished: tuple[Path, Path, list[str]]) -> None:
    _, run_dir, _ = finished
    assert statuses(run_dir) == dict.fromkeys(("pretrain", "align", "distil", "evaluate", "export"), "finished")
    for path in ("pretrain/model", "align/model", "distil/model", "evaluate/evaluation", "export/export/hf"):
        assert (run_dir / path).is_dir(), path
    found = json.loads((run_dir / "evaluate/evaluation/evaluation.json").read_text())
    assert set(found["perplexity"]) == {"teacher", "copy_init", "align", "distil"}
    assert found["teacher"] == "teacher" and found["student"] == "distil"


def test_a_finished_recipe_is_not_run_again(finished: tuple[Path, Path, list[str]]) -> None:
    home, run_dir, _ = finished
    before = {p: p.stat().st_mtime_ns for p in run_dir.rglob("*.safetensors")}
    said: list[str] = []
    run_recipe(load_recipe(home / "tiny.yaml"), recipe_dir=home, run_dir=run_dir, say=said.append)
    assert sum("done before, skipped" in line for line in said) == 5
    assert before == {p: p.stat().st_mtime_ns for p in run_dir.rglob("*.safetensors")}


def test_a_changed_stage_and_its_followers_are_stale_and_set_aside(finished: tuple[Path, Path, list[str]]) -> None:
    home, run_dir, _ = finished
    recipe = load_recipe(home / "tiny.yaml", ["evaluate.rows=2"])
    said: list[str] = []
    run_recipe(recipe, recipe_dir=home, run_dir=run_dir, say=said.append)
    assert any(line.startswith("evaluate: stale") and "rows: 4 -> 2" in line for line in said)
    assert (run_dir / "evaluate.stale-1" / "evaluation").is_dir()
    assert sum("skipped" in line for line in said) == 4
    with pytest.raises(RunError, match=r"align.*not finished"):
        run_recipe(
            load_recipe(home / "tiny.yaml", ["align.loop.steps=5"]),
            recipe_dir=home,
            run_dir=run_dir,
            stage="distil",
            say=said.append,
        )


def test_a_hybrid_generates_from_the_command_lines_function(finished: tuple[Path, Path, list[str]]) -> None:
    from limbeck.api import generate

    _, run_dir, _ = finished
    assert isinstance(generate(run_dir / "distil", "def main(", tokens=5), str)


def test_evaluate_and_export_take_a_model_folder_and_a_checkpoint(finished: tuple[Path, Path, list[str]], tmp_path: Path) -> None:
    from limbeck.models.loading import load_model
    from limbeck.stages.export import export_path

    _, run_dir, _ = finished
    out = export_path(f"{run_dir / 'distil'}@4", output=tmp_path / "out", dtype="float32")
    import torch

    a, b = load_model(str(out)), load_model(str(run_dir / "distil" / "model"))
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.equal(a(input_ids=ids).logits, b(input_ids=ids).logits)
    with pytest.raises(RunError, match="neither a model folder"):
        export_path(str(tmp_path))


def test_a_grid_runs_its_product_and_tabulates(finished: tuple[Path, Path, list[str]]) -> None:
    home, _, _ = finished
    stage = load_recipe(home / "tiny.yaml", ["pretrain.loop.steps=2"]).stages["pretrain"].model_dump(mode="json", by_alias=True)
    stage["grid"] = {"optim.groups.0.lr": [1e-3, 3e-3], "seed": [1, 2]}
    single = Recipe.model_validate({"name": "grid", "stages": {"pretrain": stage}})
    out = run_recipe(single, recipe_dir=home, run_dir=home / "grid", say=lambda text: None)
    rows = json.loads((out / "pretrain" / "grid.json").read_text())
    assert [(row["optim.groups.0.lr"], row["seed"]) for row in rows] == [(1e-3, 1), (1e-3, 2), (3e-3, 1), (3e-3, 2)]
    assert len({row["loss"] for row in rows}) == 4


def test_a_stage_that_needs_a_gridded_one_is_refused_with_words(finished: tuple[Path, Path, list[str]]) -> None:
    home, _, _ = finished
    with pytest.raises(RecipeError, match="grid"):
        load_recipe(home / "tiny.yaml", ['align.grid={"seed": [1, 2]}'])


def test_fresh_starts_anew_and_keeps_what_was_there(finished: tuple[Path, Path, list[str]]) -> None:
    home, run_dir, _ = finished
    said: list[str] = []
    run_recipe(load_recipe(home / "tiny.yaml"), recipe_dir=home, run_dir=run_dir, stage="export", fresh=True, say=said.append)
    assert (run_dir / "export.stale-1").is_dir() and (run_dir / "export" / "export" / "hf").is_dir()


def test_validation_text_that_an_earlier_stage_trained_on_is_refused(finished: tuple[Path, Path, list[str]], tmp_path: Path) -> None:
    home, run_dir, _ = finished
    copied = tmp_path / "run"
    shutil.copytree(run_dir, copied)
    recipe = load_recipe(
        home / "tiny.yaml",
        ["stages.distil.data={source: {kind: text, path: corpus, suffixes: [.py]}, tokenizer: {from: pretrain}, sequence: 64, held_out: 0.6}"],
    )
    with pytest.raises(DataError, match=r"held-out documents of .* are also in the training text of"):
        run_recipe(recipe, recipe_dir=home, run_dir=copied, say=lambda _: None)


def test_recall_is_probed_in_the_ids_of_the_recall_documents(finished: tuple[Path, Path, list[str]]) -> None:
    home, *_ = finished
    recipe = load_recipe(home / "tiny.yaml", ["stages.pretrain.data.source.1.vocabulary=64"])
    probed = _probing(recipe.stages["evaluate"], recipe.stages["pretrain"].data)
    assert probed.recall.vocabulary == 64
    named = load_recipe(home / "tiny.yaml", ["stages.evaluate.recall.vocabulary=96", "stages.pretrain.data.source.1.vocabulary=64"])
    assert _probing(named.stages["evaluate"], named.stages["pretrain"].data).recall.vocabulary == 96
