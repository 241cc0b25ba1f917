"""Another project's configs become one recipe that loads, and nothing in them is lost without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import limbeck.config.parts  # noqa: F401  fills the registries
from limbeck.cli.app import app
from limbeck.config.from_seed import MIXERS, from_seed, hub_name
from limbeck.config.load import load_recipe, load_text
from limbeck.config.parts.mixers import MIXERS as REGISTERED
from limbeck.errors import LimbeckError

STAGE_1 = """
data:
  cache_dir: data_cache/chunked_context512
teacher_model: {name: converted/Qwen2.5-1.5B-Instruct}
student_model:
  name: 'gdn_v4'
  keep_full_attention_layers: []
train:
  target_tokens: 50_000_000
  batch_size: 64
  micro_batch_size: 8
  train_seq_len: 512
  lr_scheduler_type: cosine
  lr: 0.001
  lr_attn: 0.002
  max_grad_norm: 1.0
  output_dir: checkpoints/qwen2_1_5b_gdn_v4_hybrid_0_25_uniform/stage1
  max_length: 512
  add_eos_token: False
  resume_from_checkpoint: None
stage: 1
"""
STAGE_2 = """
data:
  cache_dir: '/data/chunked_context4096'
teacher_model:
  name: converted/Qwen2.5-1.5B-Instruct
student_model:
  name: gdn_v4
  keep_full_attention_layers: [27, 14, 19, 20]
train:
  target_tokens: 600000000
  batch_size: 32
  micro_batch_size: 2
  train_seq_len: 4096
  lr_scheduler_type: constant
  lr: 7.0e-06
  lr_attn: 0.0001
  max_grad_norm: 0.5
  output_dir: /data/checkpoints/qwen2_1_5b_gdn_v4_hybrid_0_25_ga_s2/stage2
  student_init_ckpt: checkpoints/qwen2_1_5b_gdn_v4_hybrid_0_25_uniform/stage1/converted-hf
  max_length: 2048
  kd_teacher_offload: cpu
  gradient_checkpointing: true
stage: 2
"""


def written(folder: Path, text: str, name: str = "config.yaml", **changes: Any) -> Path:
    """A config file, with some values (by dotted key, double underscores for dots) changed; None takes a key out."""
    tree = yaml.safe_load(text)
    for key, value in changes.items():
        *sections, last = key.split("__")
        place = tree
        for section in sections:
            place = place[section]
        if value is None:
            del place[last]
        else:
            place[last] = value
    path = folder / name
    path.write_text(yaml.safe_dump(tree))
    return path


def test_a_stage_1_file_is_an_align_stage(tmp_path: Path) -> None:
    text, _ = from_seed([written(tmp_path, STAGE_1)])
    recipe: Any = load_text(text)
    assert recipe.name == "qwen2_1_5b_gdn_v4_hybrid_0_25_uniform" and list(recipe.stages) == ["align"]
    align = recipe.stages["align"]
    assert align.student.base == align.data.tokenizer == "Qwen/Qwen2.5-1.5B-Instruct"
    assert (align.student.surgery[0].mixer.preset, align.student.surgery[0].keep, align.student.train) == ("gdn_v4", (), ("mixers",))
    assert (align.teacher.kind, align.objectives[0].kind) == ("self", "attention_alignment")
    assert [(g.role, g.lr) for g in align.optim.groups] == [("mixers", 2e-3)]
    assert (align.optim.schedule.kind, align.optim.clip) == ("cosine", 1.0)
    assert (align.loop.tokens, align.loop.batch_tokens, align.loop.microbatch) == (50_000_000, 64 * 512, 8)
    assert (align.data.sequence, align.data.append_eos) == (512, False)


def test_a_stage_2_file_brings_the_stage_that_it_goes_on_from(tmp_path: Path) -> None:
    text, notes = from_seed([written(tmp_path, STAGE_2)])
    recipe: Any = load_text(text)
    assert list(recipe.stages) == ["align", "distil"]
    assert recipe.stages["align"].loop.tokens == 100_000_000 and recipe.stages["align"].optim.groups[0].lr == 1e-3
    distil = recipe.stages["distil"]
    assert (distil.student.from_, distil.student.keep, distil.student.train) == ("align", (14, 19, 20, 27), ("all",))
    assert (distil.teacher.model, distil.objectives[0].kind) == ("Qwen/Qwen2.5-1.5B-Instruct", "kl")
    assert [(g.role, g.lr) for g in distil.optim.groups] == [("mixers", 1e-4), ("rest", 7e-6)]
    assert (distil.loop.tokens, distil.loop.batch_tokens, distil.loop.activation_checkpointing) == (600_000_000, 32 * 4096, True)
    assert distil.optim.clip == 0.5
    assert any("student_init_ckpt" in note and "published settings" in note for note in notes)


def test_the_files_of_all_stages_make_one_recipe(tmp_path: Path) -> None:
    third = written(
        tmp_path, STAGE_2, "3.yaml", stage=3, train__lr_scheduler_type="cosine", train__lr=2e-6, train__target_tokens=None, train__max_steps=70
    )
    text, _ = from_seed([third, written(tmp_path, STAGE_1, "1.yaml"), written(tmp_path, STAGE_2, "2.yaml")])
    recipe: Any = load_text(text)
    assert list(recipe.stages) == ["align", "distil", "extend"]
    assert recipe.stages["align"].loop.tokens == 50_000_000 and recipe.stages["distil"].student.keep == (14, 19, 20, 27)
    extend = recipe.stages["extend"]
    assert (extend.student.from_, extend.student.keep, extend.objectives[0].kind, extend.teacher) == ("distil", None, "ce", None)
    assert (extend.loop.steps, extend.optim.schedule.kind) == (70, "cosine")


def test_a_stage_3_file_alone_keeps_its_layers(tmp_path: Path) -> None:
    recipe: Any = load_text(from_seed([written(tmp_path, STAGE_2, stage=3)])[0])
    assert recipe.stages["extend"].student.keep == (14, 19, 20, 27)


@pytest.mark.parametrize("name", MIXERS)
def test_every_student_of_the_seed_has_its_mixer(name: str, tmp_path: Path) -> None:
    assert MIXERS[name]["kind"] in REGISTERED
    recipe: Any = load_text(from_seed([written(tmp_path, STAGE_2, student_model__name=name)])[0])
    mixer = recipe.stages["align"].student.surgery[0].mixer
    assert mixer.kind == MIXERS[name]["kind"] and getattr(mixer, "preset", name) in (name, "default")


def test_every_key_of_a_file_has_a_counterpart_or_is_listed(tmp_path: Path) -> None:
    """Each value is changed in turn: the recipe's stages change, or a note names the key."""
    before = yaml.safe_load(from_seed([written(tmp_path, STAGE_2)])[0])
    tree = yaml.safe_load(STAGE_2)
    for section, values in tree.items():
        if not isinstance(values, dict):
            continue
        for key, value in values.items():
            other = {bool: False, int: 71, float: 0.25, list: [3], str: "gdn_v2" if key == "name" else "cosine"}[type(value)]
            text, notes = from_seed([written(tmp_path, STAGE_2, **{f"{section}__{key}": other})])
            assert yaml.safe_load(text) != before or any(note.startswith(f"{section}.{key}: ") for note in notes), key


def test_what_has_no_counterpart_is_listed_in_the_recipe_and_on_stderr(tmp_path: Path) -> None:
    path = written(tmp_path, STAGE_2, student_model__target_sparsity=0.5)
    done = CliRunner().invoke(app, ["init", "--from-seed", str(path)])
    assert done.exit_code == 0
    comments = [line for line in done.stdout.splitlines() if line.startswith("#")]
    for key in ("train.max_length: 2048", "train.kd_teacher_offload: cpu", "student_model.target_sparsity: 0.5", "data.cache_dir: /data/"):
        assert key in done.stderr and any(key in line for line in comments), key
    (tmp_path / "recipe.yaml").write_text(done.stdout)
    assert load_recipe(tmp_path / "recipe.yaml").stages["distil"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"stage": 4}, "`stage: 4`"), ({"stage": None}, "no `stage`"), ({"student_model__name": "gdn_v9"}, "did you mean 'gdn_v"),
     ({"student_model__name": "fox_v1"}, "no mixer here"), ({"train__lr": "fast"}, "not a number"), ({"teacher_model__name": None}, "must be given"),
     ({"student_model__keep_full_attention_layers": "all"}, "not a list of layer numbers")],
)  # fmt: skip
def test_a_file_that_is_no_config_of_the_seed_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(LimbeckError, match=message):
        from_seed([written(tmp_path, STAGE_2, **changes)])


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    one, two = written(tmp_path, STAGE_1, "1.yaml"), written(tmp_path, STAGE_2, "2.yaml", teacher_model__name="Qwen/Qwen3-8B")
    with pytest.raises(LimbeckError, match=r"teacher_model\.name must be given and the same"):
        from_seed([one, two])
    with pytest.raises(LimbeckError, match="same stage"):
        from_seed([one, one])
    with pytest.raises(LimbeckError, match="cannot be read"):
        from_seed([tmp_path / "absent.yaml"])


def test_init_takes_one_of_both(tmp_path: Path) -> None:
    path = str(written(tmp_path, STAGE_1))
    for words in (["init"], ["init", "hybrid", "--from-seed", path]):
        refused = CliRunner().invoke(app, words)
        assert refused.exit_code == 2 and "--from-seed FILE" in refused.stderr


def test_converted_teachers_are_named_by_where_they_came_from() -> None:
    assert hub_name("converted/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert hub_name("fla-hub/Llama-3.2-3B-Instruct") == "meta-llama/Llama-3.2-3B-Instruct"
    assert hub_name("my/model") == "my/model" and hub_name("/models/converted/other") == "/models/converted/other"
