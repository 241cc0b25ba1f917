"""A ranking of a tiny model's layers: shared passes are exact, what is killed goes on to the same ranking, ledgers merge."""

from __future__ import annotations

import json
import shutil
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from limbeck.config.load import load_recipe
from limbeck.errors import ModelError, RecipeError, RunError
from limbeck.evaluation.ranking.scoring import Scoring, make_scoring
from limbeck.evaluation.ranking.swaps import continued, entering, residuals, swapped, sweep
from limbeck.models.loading import load_model
from limbeck.models.packed import forward_packed
from limbeck.models.structure import attention_slot, decoder_layers
from limbeck.stages.candidate import run_candidate
from limbeck.stages.ledger import Ledger
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
    loop: {steps: 12, batch_tokens: 512}
  align:
    data: {from: pretrain}
    student: {base: {from: pretrain}, surgery: [{kind: hybridize, mixer: gated_deltanet}], train: [mixers]}
    teacher: {kind: self}
    objectives: [{kind: attention_alignment}]
    optim: {groups: [{role: mixers, lr: 3e-3}]}
    loop: {steps: 3, batch_tokens: 512}
  select:
    kind: rank_layers
    from: align
    keep: 1
    method: ga_s2
    rows: 4
    recall: {tasks: [repeat], distances: [8, 16], rows: 2}
    oracle: true
    distil:
      optim: {groups: [{role: mixers, lr: 1e-3}, {role: rest, lr: 1e-4}], schedule: {kind: constant}}
      loop: {steps: 4, batch_tokens: 512}
      rungs: 2
      margin: 0.0
  distil:
    data: {from: pretrain}
    student: {from: align, keep: {from: select}}
    teacher: {kind: local, model: {from: pretrain}}
    objectives: [{kind: kl}]
    optim: {groups: [{role: mixers, lr: 1e-3}, {role: rest, lr: 1e-4}]}
    loop: {steps: 2, batch_tokens: 512}
"""


def quiet(text: Any) -> None:
    pass


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe file and the run directory of its first run."""
    home = tmp_path_factory.mktemp("ranking")
    (home / "corpus").mkdir()
    for source in sorted(Path(textwrap.__file__).parent.glob("[a-d]*.py"))[:40]:
        (home / "corpus" / source.name).write_bytes(source.read_bytes())
    (home / "tiny.yaml").write_text(RECIPE)
    return home, run_recipe(load_recipe(home / "tiny.yaml"), recipe_dir=home, run_dir=home / "run", say=quiet)


@pytest.fixture(scope="module")
def ranking(finished: tuple[Path, Path]) -> dict[str, Any]:
    return json.loads((finished[1] / "select/ranking/ranking.json").read_text())


def without_select(finished: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """The same run before its ranking."""
    home, run_dir = finished
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy, ignore=shutil.ignore_patterns("select", "distil"))
    return home, copy


def pieces(run_dir: Path, **changes: Any) -> tuple[Any, Any, Scoring]:
    """Student, base and scoring data of a run."""
    from limbeck.config.parts.stages import RecallOptions
    from limbeck.data.dataset import TokenRows
    from limbeck.data.tokenizer import ordinary_ids
    from limbeck.models.loading import load_tokenizer

    student, base = (load_model(str(run_dir / stage / "model"), dtype=torch.float64) for stage in ("align", "pretrain"))
    (data,) = (run_dir / "data").iterdir()
    recall = RecallOptions(tasks=("repeat",), distances=(8, 16), rows=2)
    ids = ordinary_ids(load_tokenizer(str(data / "tokenizer")))
    options = {"num_rows": 4, "recall": recall, "half": 0, "seed": 0, **changes}
    return student, base, make_scoring(base, TokenRows(data, "held_out"), ids, **options)


def attentions(model: Any) -> dict[int, Any]:
    return {index: getattr(layer, attention_slot(layer)) for index, layer in enumerate(decoder_layers(model))}


def test_every_method_control_and_the_oracle_are_reported(ranking: dict[str, Any]) -> None:
    assert set(ranking["methods"]) == {"ga_s2", "greedy", "restore_one", "replace_one", "halo", "residual"}
    for method in ranking["methods"].values():
        assert sorted(method["order"]) == [0, 1, 2] and method["keep"] == method["order"][:1] and method["tokens"]["all"] > 0
    names = [row["name"] for row in ranking["sets"]]
    assert "uniform" in names and sum(name.startswith("random") for name in names) == 3, "there are three sets of one in three"
    assert all({"kl", "recall_kl", "recall", "score"} <= set(row) for row in ranking["sets"])
    assert len(ranking["spearman"]) == 15 and all(-1 <= value <= 1 for value in ranking["spearman"].values())
    assert len(ranking["oracle"]["sets"]) == 3
    assert ranking["oracle"]["score"] == min(row["score"] for row in ranking["sets"])
    assert ranking["tokens"]["all"] > 0 and ranking["keep"] == ranking["methods"]["ga_s2"]["keep"]


def test_the_distilled_student_keeps_what_was_ranked_first(finished: tuple[Path, Path], ranking: dict[str, Any]) -> None:
    config = json.loads((finished[1] / "distil/model/config.json").read_text())
    assert config["limbeck"]["surgery"][0]["keep"] == ranking["keep"]


def test_continuing_from_a_layer_is_the_whole_pass(finished: tuple[Path, Path]) -> None:
    student, base, scoring = pieces(finished[1])
    batch = scoring.pieces[0].batch
    with torch.no_grad():
        states, final_BTD = entering(student, batch)
        for layer in range(3):
            assert torch.equal(continued(student, batch, layer, states[layer]), final_BTD)
            with swapped(student, {layer: attentions(base)[layer]}):
                assert torch.equal(continued(student, batch, layer, states[layer]), forward_packed(student, batch))
        assert torch.equal(forward_packed(student, batch), final_BTD), "everything is back in its place"


def test_a_sweep_scores_what_whole_models_score(finished: tuple[Path, Path]) -> None:
    from limbeck.students.student import restore_attention

    student, base, scoring = pieces(finished[1])
    candidates = {layers: {index: attentions(base)[index] for index in layers} for layers in [(0,), (1,), (2,), (0, 2)]}
    found = sweep(student, candidates, scoring)
    assert found.shared and found.baseline == scoring.score(student)
    restored = load_model(str(finished[1] / "align/model"), dtype=torch.float64)
    restore_attention(restored, (0, 2), stage="align")
    assert found.scores[0, 2] == scoring.score(restored)
    with swapped(student, {0: attentions(base)[0]}):
        assert sweep(student, {(2,): {2: attentions(base)[2]}}, scoring).scores[(2,)] == found.scores[0, 2]
    layers = scoring.num_tokens / 3
    assert found.tokens == round(layers * (3 + 3 + 2 + 1 + 3)), "a pass that begins higher costs less"


def test_the_teacher_is_no_distance_from_itself(finished: tuple[Path, Path]) -> None:
    _, base, scoring = pieces(finished[1])
    score = scoring.score(base)
    assert abs(score.text) < 1e-9 and abs(score.recall) < 1e-9 and score.agreement == 1.0


def test_residuals_are_those_of_the_mixers_on_the_teachers_inputs(finished: tuple[Path, Path]) -> None:
    student, base, scoring = pieces(finished[1])
    same = attentions(load_model(str(finished[1] / "pretrain/model"), dtype=torch.float64))
    assert all(abs(value) < 1e-12 for part in residuals(base, same, scoring).values() for value in part.values())
    found = residuals(base, student.mixers(), scoring)
    assert all(0 < value < 10 for part in found.values() for value in part.values()) and set(found) == {0, 1, 2}


def test_ranking_and_comparing_meet_different_data(finished: tuple[Path, Path]) -> None:
    rank, compare = (pieces(finished[1], half=half)[2] for half in (0, 1))
    rows = [{row.numpy().tobytes() for piece in side for row in piece.batch.input_ids_BT} for side in (rank, compare)]
    assert rows[0] and rows[1] and not rows[0] & rows[1]


@pytest.mark.parametrize("survives", [0, 2, 5, 7])
def test_a_killed_ranking_goes_on_to_the_identical_one(
    finished: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survives: int
) -> None:
    home, run_dir = without_select(finished, tmp_path)
    recipe = load_recipe(home / "tiny.yaml")
    add, lines = Ledger.add, [0]

    def dies(self: Ledger, candidate: str, result: Any) -> None:
        lines[0] += 1
        if lines[0] > survives:
            raise KeyboardInterrupt
        add(self, candidate, result)

    monkeypatch.setattr(Ledger, "add", dies)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, recipe_dir=home, run_dir=run_dir, stage="select", say=quiet)
    monkeypatch.undo()
    before = (run_dir / "select/ranking/ledger.jsonl").read_text() if survives else ""
    run_recipe(recipe, recipe_dir=home, run_dir=run_dir, stage="select", say=quiet)
    ledger = (run_dir / "select/ranking/ledger.jsonl").read_text()
    assert ledger.startswith(before) and len(before.splitlines()) == survives, "what was finished is not done again"
    assert (run_dir / "select/ranking/ranking.json").read_bytes() == (finished[1] / "select/ranking/ranking.json").read_bytes()


def test_a_candidate_killed_between_its_parts_goes_on_where_it_was(
    finished: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from limbeck.stages.short_distil import ShortDistil

    home, run_dir = without_select(finished, tmp_path)
    recipe, calls, train = load_recipe(home / "tiny.yaml", ["select.distil.margin=null"]), [0], ShortDistil._train
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for copy in (whole, parts):
        shutil.copytree(run_dir, copy)

    def dies(self: ShortDistil, *args: Any) -> int:
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return train(self, *args)

    run_recipe(recipe, recipe_dir=home, run_dir=whole, stage="select", say=quiet)
    monkeypatch.setattr(ShortDistil, "_train", dies)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, recipe_dir=home, run_dir=parts, stage="select", say=quiet)
    run_recipe(recipe, recipe_dir=home, run_dir=parts, stage="select", say=quiet)
    assert calls[0] == 7, "three candidates of two parts, and one that was interrupted"
    assert (parts / "select/ranking/ranking.json").read_bytes() == (whole / "select/ranking/ranking.json").read_bytes()
    assert not [path for path in (parts / "select/candidates").iterdir() if (path / "checkpoints").exists()]


def test_candidates_that_ran_alone_merge_into_the_same_ranking(finished: tuple[Path, Path], tmp_path: Path) -> None:
    home, run_dir = without_select(finished, tmp_path)
    recipe = load_recipe(home / "tiny.yaml")
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(run_dir, elsewhere)
    run_candidate(recipe, 2, recipe_dir=home, run_dir=run_dir, say=quiet)
    run_candidate(recipe, 0, recipe_dir=home, run_dir=elsewhere, stage="select", say=quiet)
    shutil.copy(elsewhere / "select/ranking/ledger-0.jsonl", run_dir / "select/ranking")
    run_recipe(recipe, recipe_dir=home, run_dir=run_dir, stage="select", say=quiet)
    common = (run_dir / "select/ranking/ledger.jsonl").read_text()
    assert "ga_s2/1" in common and "ga_s2/0" not in common and "ga_s2/2" not in common
    assert (run_dir / "select/ranking/ranking.json").read_bytes() == (finished[1] / "select/ranking/ranking.json").read_bytes()


def test_a_candidate_that_cannot_run_is_refused_with_words(finished: tuple[Path, Path], tmp_path: Path) -> None:
    home, run_dir = without_select(finished, tmp_path)
    recipe = load_recipe(home / "tiny.yaml")
    with pytest.raises(RunError, match="layers 0 to 2"):
        run_candidate(recipe, 3, recipe_dir=home, run_dir=run_dir, say=quiet)
    with pytest.raises(RunError, match="not a rank_layers stage"):
        run_candidate(recipe, 0, recipe_dir=home, run_dir=run_dir, stage="align", say=quiet)
    with pytest.raises(RunError, match="not finished"):
        run_candidate(load_recipe(home / "tiny.yaml", ["align.loop.steps=5"]), 0, recipe_dir=home, run_dir=run_dir, say=quiet)


def test_fewer_candidates_and_sets_distilled(finished: tuple[Path, Path], tmp_path: Path) -> None:
    home, run_dir = without_select(finished, tmp_path)
    words = ["select.candidates=1", "select.sets=distil", "select.oracle=false", "select.compare=[]"]
    run_recipe(load_recipe(home / "tiny.yaml", words), recipe_dir=home, run_dir=run_dir, stage="select", say=quiet)
    found = json.loads((run_dir / "select/ranking/ranking.json").read_text())
    free = found["methods"]["restore_one"]["order"]
    assert found["methods"]["ga_s2"]["candidates"] == free[:1] and found["methods"]["ga_s2"]["order"] == free
    assert found["sets_measured"] == "distil" and found["methods"]["ga_s2"]["full_tokens"]["trained"] == 3 * found["methods"]["ga_s2"]["tokens"]["trained"]
    assert not (run_dir / "select/candidates/layer-0").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["select.keep=3"], "3 of 3 layers leaves nothing to replace"),
        (["select.method=restore_on"], "did you mean 'restore_one'"),
        (["select.compare=[gredy]"], "did you mean 'greedy'"),
        (["distil.student.keep={from: align}"], "'align' is of kind train: it ranks no layers"),
        (["select.from=pretrain"], "no mixers to rank"),
        (["select.from=distil"], "circle"),
        (["stages.align.student.surgery.0.keep=[1]"], "keeps softmax layers already"),
        (["select.distil=null"], "give `distil"),
        (["select.distil.optim.schedule.kind=cosine"], "schedule: {kind: constant}"),
        (["distil.student.base={from: select}", "distil.student.from=null", "distil.student.keep=null"], "it makes no model"),
        (["select.random_sets=4"], "greater than or equal to 5|at least 5|>= 5"),
    ],
)
def test_mistakes_are_found_before_anything_is_loaded(finished: tuple[Path, Path], words: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(finished[0] / "tiny.yaml", words)


def test_a_damaged_ranking_is_named(tmp_path: Path) -> None:
    from limbeck.students.student import ranked_layers

    (tmp_path / "ranking.json").write_text("{}")
    with pytest.raises(ModelError, match=r"cannot be read as a ranking"):
        ranked_layers(str(tmp_path / "ranking.json"))


def test_a_candidate_runs_from_the_command_line(finished: tuple[Path, Path], tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from limbeck.cli.app import app

    home, run_dir = without_select(finished, tmp_path)
    words = ["run", str(home / "tiny.yaml"), "--run-dir", str(run_dir), "--candidate"]
    done = CliRunner().invoke(app, [*words, "1"])
    assert done.exit_code == 0, done.output
    (line,) = (run_dir / "select/ranking/ledger-1.jsonl").read_text().splitlines()
    assert json.loads(line)["candidate"] == "ga_s2/1" and not (run_dir / "select/stage.json").exists()
    refused = CliRunner().invoke(app, [*words, "7"])
    assert refused.exit_code == 2 and "layers 0 to 2" in refused.output
