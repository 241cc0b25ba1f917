"""lm-evaluation-harness on a LoRA generator: the base with the LoRA that is generated, once, acting in every request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from adapter_cases import changed_model
from harness_cases import task_files
from integration.test_generate_adapted import ASKED, OTHER, TOKENIZER, TOKENS, Made
from limbeck.cli.app import app
from limbeck.data.tokenizer import encode, prefix_ids
from limbeck.models.loading import load_tokenizer, save_model
from limbeck.stages.adapting import static_adapter
from limbeck.students.generator.student import GeneratorStudent

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'limbeck[lm-eval]'")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    home = tmp_path_factory.mktemp("generator")
    task_files(home)
    return Made(home, "llama")


def measured(made: Made, path: Path, out: Path, *words: str) -> dict[str, float]:
    """Bits per byte and the accuracies of a path."""
    tasks = ",".join(str(made.home / "tasks" / f"{name}.yaml") for name in ("text", "choice"))
    done = CliRunner().invoke(app, ["evaluate", str(path), "--tasks", tasks, "--max-length", "64", "--out", str(out), *words])
    assert done.exit_code == 0, done.output
    results = json.loads((out / "lm_eval.json").read_text())
    return {name: row["values"]["model"] for task in results["tasks"].values() for name, row in task["metrics"].items()}


def with_change(made: Made, stage: str, text: str | None) -> Path:
    """The base with the generated dW added to its weights."""
    student = made.student(made.run / stage)
    texts, tokens = student.text_shape
    with torch.no_grad():
        if text is None:
            adapters = static_adapter(student)
        else:
            tokenizer = load_tokenizer(TOKENIZER)
            ids = torch.full((1, texts, tokens), -1)
            found = [*prefix_ids(tokenizer), *encode(tokenizer, [text])[0]][:tokens]
            ids[0, 0, : len(found)] = torch.tensor(found)
            adapters = student.generate(ids).detach()
    student.injector.remove()
    save_model(changed_model(student.model, adapters, 0), made.home / "changed", tokenizer_source=TOKENIZER)
    return made.home / "changed"


@pytest.mark.parametrize(("stage", "text"), [("reads", ASKED), ("reads", OTHER), ("static", None)])
def test_the_numbers_are_those_of_the_base_with_the_change_added(made: Made, stage: str, text: str | None, tmp_path: Path) -> None:
    words = [] if text is None else ["--condition", text]
    found = measured(made, made.run / stage, tmp_path / "found", *words)
    assert found == pytest.approx(measured(made, with_change(made, stage, text), tmp_path / "changed"), rel=1e-5)
    assert found["bits_per_byte,none"] != pytest.approx(measured(made, made.base, tmp_path / "base")["bits_per_byte,none"], rel=1e-3)


def test_one_lora_is_generated_and_acts_where_it_is_written_too(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generated: list[Any] = []
    generate = GeneratorStudent.generate
    monkeypatch.setattr(GeneratorStudent, "generate", lambda self, ids: generated.append(ids) or generate(self, ids))
    (tmp_path / "asked.txt").write_text(ASKED + "\n")
    prompt = "def f(x):\n    return"
    task = tmp_path / "go.yaml"
    (tmp_path / "go.jsonl").write_text(json.dumps({"q": prompt, "a": made.text("reads", prompt, texts=[ASKED])}))
    fields = yaml.safe_load((made.home / "tasks" / "write.yaml").read_text())
    fields["dataset_kwargs"]["data_files"]["test"] = str(tmp_path / "go.jsonl")
    task.write_text(yaml.safe_dump({**fields, "generation_kwargs": {"until": ["<|never|>"], "max_gen_toks": TOKENS}}))
    generated.clear()
    words = ["--tasks", str(task), "--condition-file", str(tmp_path / "asked.txt"), "--json", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, ["evaluate", str(made.run / "reads"), *words])
    assert done.exit_code == 0, done.output
    results = json.loads(done.stdout)
    assert results["tasks"]["write"]["metrics"]["exact_match,none"]["values"]["model"] == 1
    assert results["settings"]["condition"] == [ASKED] and len(generated) == 1
    assert made.text("reads", prompt, texts=[OTHER]) != made.text("reads", prompt, texts=[ASKED])


def test_results_of_a_stage_lie_in_its_folder_and_it_stays_what_it_was(made: Made) -> None:
    before = sorted(path.relative_to(made.run) for path in made.run.rglob("*"))
    task = str(made.home / "tasks" / "choice.yaml")
    done = CliRunner().invoke(app, ["evaluate", str(made.run / "static"), "--tasks", task, "--limit", "2"])
    assert done.exit_code == 0, done.output
    added = {str(path.relative_to(made.run)) for path in made.run.rglob("*")} - {str(path) for path in before}
    assert added == {"static/evaluation", "static/evaluation/lm_eval.json"}


@pytest.mark.parametrize(
    ("stage", "words", "message"),
    [
        ("reads", [], "needs something to read: give --condition TEXT, --condition-file FILE, or --named NAME\n"),
        ("static", ["--condition", "a"], "which reads nothing: leave out --condition and --named"),
        ("reads", ["--condition", "a", "--named", "b"], "--named and --condition both say what is read: give one of them"),
    ],
)
def test_what_it_reads_is_asked_for(made: Made, stage: str, words: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["evaluate", str(made.run / stage), "--tasks", str(made.home / "tasks" / "choice.yaml"), *words])
    assert done.exit_code == 2 and message in done.stderr, done.stderr
