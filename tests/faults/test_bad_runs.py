"""What only shows when a run starts: each ends with exit code 2 and a message that names the way out, never a traceback."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from typer.testing import CliRunner

from limbeck.cli.app import app
from limbeck.config.load import load_recipe
from limbeck.stages.run import run_recipe
from limbeck.teachers.local import LocalTeacher

TEACH = """
name: teach
stages:
  pretrain:
    data: {source: {kind: text, path: corpus}, tokenizer: {vocabulary: 400}, sequence: 64, held_out: 0.2}
    student:
      config: {model_type: qwen3, vocab_size: 400, hidden_size: 32, intermediate_size: 32, num_hidden_layers: 2, num_attention_heads: 2,
               num_key_value_heads: 1, head_dim: 16, tie_word_embeddings: true}
    optim: {groups: [{lr: 1e-3}]}
    loop: {steps: 1, batch_tokens: 256}
"""
DISTIL = """
name: distil
stages:
  distil:
    data: {source: {kind: text, path: corpus}, tokenizer: TOKENIZER, sequence: 64, held_out: 0.2}
    student: {base: MODEL, surgery: [{kind: hybridize, keep: [0]}]}
    teacher: {kind: local, model: MODEL}
    objectives: [{kind: kl}]
    optim: {groups: [{lr: 1e-3}]}
    loop: {steps: 1, batch_tokens: 256}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    (folder / "corpus").mkdir()
    for source in sorted(Path(textwrap.__file__).parent.glob("[a-b]*.py"))[:25]:
        (folder / "corpus" / source.name).write_bytes(source.read_bytes())
    (folder / "teach.yaml").write_text(TEACH)
    run_recipe(load_recipe(folder / "teach.yaml"), recipe_dir=folder, run_dir=folder / "teach", say=lambda text: None)
    model = folder / "teach" / "pretrain" / "model"
    (folder / "distil.yaml").write_text(DISTIL.replace("MODEL", str(model)).replace("TOKENIZER", str(model)))
    other = folder / "other"
    other.mkdir()
    (other / "config.json").write_text((model / "config.json").read_text())
    return folder


BAD = {
    "wrong vocabulary": (["distil.data.tokenizer={vocabulary: 350, special: [<end>]}"], "different vocabularies"),
    "zero matches": (["distil.student.train=[model.layer.*]"], "model.layer.*"),
    "a group without parameters": (["distil.optim.groups=[{role: mixer, lr: 1e-3}]"], "mixers"),
    "a layer that does not exist": (["distil.student.surgery.0.keep=[7]"], "7"),
    "weights that are missing": (["distil.student.base=other"], "other"),
    "text that is missing": (["distil.data.source.path=corpse"], "corpus"),
    "objectives that sample differently": (
        ["distil.objectives=[{kind: topk_kl, k: 2, samples: 3}, {kind: topk_kl, k: 4, samples: 3}]"], "must agree on k",
    ),
    "a budget of nothing": (["distil.loop.steps=0"], "steps"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_run_that_cannot_start_says_why(home: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words, named = BAD[fault]
    result = CliRunner().invoke(app, ["run", str(home / "distil.yaml"), *words, "--run-dir", str(home / "out")])
    assert result.exit_code == 2, (result.output, result.exception)
    assert "Traceback" not in result.output and named in result.output, result.output
    assert not (home / "out" / "distil" / "model").exists()


def test_the_same_recipe_without_a_fault_runs(home: Path) -> None:
    result = CliRunner().invoke(app, ["run", str(home / "distil.yaml"), "--run-dir", str(home / "good")])
    assert result.exit_code == 0, result.output
    assert (home / "good" / "distil" / "model" / "config.json").exists()


def test_a_teacher_that_is_refused_is_closed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    closed: list[LocalTeacher] = []
    monkeypatch.setattr(LocalTeacher, "close", lambda self: closed.append(self), raising=False)
    words, named = BAD["wrong vocabulary"]
    result = CliRunner().invoke(app, ["run", str(home / "distil.yaml"), *words, "--run-dir", str(home / "closed")])
    assert result.exit_code == 2 and named in result.output
    assert len(closed) == 1
