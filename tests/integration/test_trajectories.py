"""Runs of agents as training windows, and a generator that learns from them: through files, stages and the command line."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from adapter_cases import run, write_recipe
from conversation_cases import CHATML, END, START, numbered_row, spoken, tokenizer_folder, write_runs
from integration.serving import serving
from limbeck.cli.app import app
from limbeck.config.load import load_recipe
from limbeck.config.parts.trajectories import PrepareTrajectoriesStageOptions, TrajectoryConditionOptions
from limbeck.data.conditions.store import ConditionSet
from limbeck.data.trajectories.build import build_trajectories
from limbeck.data.trajectories.formats import trajectory_of
from limbeck.engine.metrics import read_metrics
from limbeck.engine.step import TrainStep
from limbeck.errors import DataError, RecipeError, RunError
from limbeck.models.loading import build_model, load_tokenizer, save_model
from limbeck.report.card import model_card
from limbeck.report.html import page
from limbeck.report.run import read_run
from limbeck.serve.teacher import TeacherService
from limbeck.stages.run import stage_key
from limbeck.teachers.scoring import Scorer
from limbeck.types import IGNORE

REPOS = ("octo/cat", "octo/dog", "acme/owl", "acme/elk")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, a template, and runs on twelve issues of four repositories, two of one of them."""
    folder = tmp_path_factory.mktemp("agents")
    tokenizer_folder(folder / "tokenizer")
    (folder / "chat.jinja").write_text(CHATML)
    write_runs(folder / "runs.jsonl", sound())
    return folder


def sound() -> list[dict[str, Any]]:
    runs = [numbered_row(number, repo=REPOS[number % 4], steps=1 + number % 5, answer=5 + 9 * (number % 3)) for number in range(12)]
    return [*runs, numbered_row(3, repo=REPOS[3], steps=7)]


def options(**changes: Any) -> PrepareTrajectoriesStageOptions:
    given = {"tokenizer": "tokenizer", "path": "runs.jsonl", "template": "chat.jinja", "sequence": 320, "held_out": ["acme/owl"], **changes}
    return PrepareTrajectoriesStageOptions.model_validate(given)


def build(home: Path, out: Path, *, said: list[str] | None = None, **changes: Any) -> ConditionSet:
    say = None if said is None else said.append
    return build_trajectories(options(**changes), out, tokenizer=str(home / "tokenizer"), base_dir=home, progress=say)


@pytest.fixture(scope="module")
def windows(home: Path) -> ConditionSet:
    return build(home, home / "windows", arrow=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def report(made: ConditionSet) -> dict[str, Any]:
    return json.loads((made.folder / "report.json").read_text())


def dropped(made: ConditionSet) -> list[dict[str, str]]:
    return [json.loads(line) for line in (made.folder / "dropped.jsonl").read_text().splitlines()]


def all_rows(made: ConditionSet) -> list[tuple[int, Any]]:
    """Every window as a batch of its own, with its condition."""
    found = []
    for condition in made.conditions:
        rows = made.rows([condition.id], "train" if condition.split == "seen" else "test")
        found += [(condition.id, rows.batch([i])) for i in range(len(rows))]
    return found


def said_in(tokenizer: Any, labels: np.ndarray) -> list[str]:
    """The words of each unbroken run of targets."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], labels != IGNORE, [False]])))
    return [tokenizer.decode(labels[a:b]) for a, b in edges.reshape(-1, 2)]


# -- the folder ------------------------------------------------------------------------------------------------------------


def test_conditions_are_issues_and_no_repository_is_on_both_sides(windows):
    assert sorted(c.name for c in windows.conditions) == sorted(f"{REPOS[n % 4]}/{REPOS[n % 4].replace('/', '__')}-{n}" for n in range(12))
    sides = {split: {windows.conditions[i].source for i in windows.split(split)} for split in ("seen", "held_out_source")}
    assert sides == {"seen": set(REPOS) - {"acme/owl"}, "held_out_source": {"acme/owl"}}
    for condition in windows.conditions:
        own, other = ("train", "test") if condition.split == "seen" else ("test", "train")
        assert condition.examples[own] > 0 and condition.examples[other] == condition.tokens[other] == 0


@pytest.mark.parametrize("seed", range(3))
def test_a_share_of_repositories_is_held_out_whole(home, tmp_path, seed):
    made = build(home, tmp_path / "c", held_out=0.5, seed=seed)
    sides = [{made.conditions[i].source for i in made.split(split)} for split in ("seen", "held_out_source")]
    assert all(sides) and not sides[0] & sides[1] and sides[0] | sides[1] == set(REPOS)


def test_what_the_agent_says_is_the_target_once_and_nothing_else_is(windows):
    tokenizer = load_tokenizer(str(windows.tokenizer))
    wanted: dict[str, Counter[str]] = {}
    for record in sound():
        wanted.setdefault(record["instance_id"], Counter()).update(spoken("chatml", trajectory_of(record, "").messages))
    found = {condition.slice: Counter[str]() for condition in windows.conditions}
    for condition, batch in all_rows(windows):
        ids, labels = batch.input_ids_BT[0].numpy(), batch.labels_BT[0].numpy()
        targets = labels[:-1] != IGNORE
        assert labels[-1] == IGNORE and (labels[:-1][targets] == ids[1:][targets]).all(), "a label is not the next token"
        found[windows.conditions[condition].slice].update(said_in(tokenizer, labels))
    assert found == wanted
    assert max(condition.examples["train"] for condition in windows.conditions) > 2, "no conversation was cut"


def test_every_window_begins_with_the_task_and_has_a_row_of_its_own(windows):
    tokenizer = load_tokenizer(str(windows.tokenizer))
    rows = all_rows(windows)
    assert len(rows) == sum(sum(c.examples.values()) for c in windows.conditions) == len(windows.examples_E5) == report(windows)["windows"]
    for condition, batch in rows:
        assert batch.documents_BT.max() == 0 and int(batch.token_mask_BT.sum()) <= 320
        text = tokenizer.decode(batch.input_ids_BT[0][batch.token_mask_BT[0]])
        own = windows.conditions[condition]
        number = int(own.slice.rsplit("-", 1)[1])
        # Of a conversation: the tools, the system, the task, and then the agent.
        task = f"<|im_start|>user\nCat {number} of {own.source} does not purr, it says {number * 37}.{END}\n{START}assistant\n"
        assert text.startswith(f"{START}system\nTools: ") and text.split(task)[0].count(START) == 2 and text.count(task) == 1


def test_a_batch_is_as_long_as_its_longest_window_needs(windows, monkeypatch):
    rows = windows.rows(windows.split("seen"))
    order = np.random.default_rng(0).permutation(len(rows))
    lengths = set()
    for some in (order[:1], order[1:3], order[3:8], order):
        batch = rows.batch(some)
        length = batch.input_ids_BT.shape[1]
        longest = int(batch.token_mask_BT.sum(1).max())
        assert length % 64 == 0 and longest <= length < longest + 64
        with monkeypatch.context() as patch:
            patch.setattr(rows, "_length", lambda lengths: 320)
            whole = rows.batch(some)
        for name in ("input_ids_BT", "labels_BT", "documents_BT", "position_ids_BT"):
            assert (getattr(whole, name)[:, :length] == getattr(batch, name)).all(), name
        assert (whole.labels_BT[:, length:] == IGNORE).all() and (whole.documents_BT[:, length:] == -1).all()
        assert whole.num_tokens == batch.num_tokens and (whole.condition_BSC == batch.condition_BSC).all() and (whole.adapters_B == batch.adapters_B).all()
        lengths.add(length)
    assert len(lengths) > 1
    assert rows.num_tokens == rows.batch(range(len(rows))).num_tokens


def test_the_issue_is_what_a_generator_reads(home, windows, tmp_path):
    assert TrajectoryConditionOptions().tokens == 512
    short = build(home, tmp_path / "c", condition={"tokens": 9})
    for made, longest in ((windows, 512), (short, 9)):
        tokenizer = load_tokenizer(str(made.tokenizer))
        rows = made.rows(made.split("seen"))
        for row, condition in zip(rows.batch(range(len(rows))).condition_BSC, rows.batch(range(len(rows))).adapters_B.tolist(), strict=True):
            own = made.conditions[condition]
            number = int(own.slice.rsplit("-", 1)[1])
            wanted = tokenizer(f"Cat {number} of {own.source} does not purr, it says {number * 37}.", add_special_tokens=False)["input_ids"][:longest]
            assert row.shape == (1, longest) and row[0].tolist() == wanted + [-1] * (longest - len(wanted))


def test_the_same_files_give_the_same_bytes(home, windows, tmp_path):
    build(home, tmp_path / "again", arrow=True)
    assert contents(tmp_path / "again") == contents(windows.folder)


def test_the_arrow_file_holds_the_same_windows(windows):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_file(str(windows.folder / "windows.arrow"))
    rows = all_rows(windows)
    assert len(table) == len(rows)
    for found, (condition, batch) in zip(table, rows, strict=True):
        own, real = windows.conditions[condition], batch.token_mask_BT[0]
        assert found["input_ids"] == batch.input_ids_BT[0][real].tolist()
        assert found["labels"][1:] == batch.labels_BT[0][real][:-1].tolist() and found["labels"][0] == IGNORE
        assert found["condition_ids"] == [i for i in batch.condition_BSC[0, 0].tolist() if i >= 0]
        assert (found["instance_id"], found["repo"], found["split"]) == (own.slice, own.source, own.split)


def test_an_altered_mask_is_noticed(home, tmp_path):
    made = build(home, tmp_path / "c")
    path = made.folder / "mask.bin"
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"mask\.bin"):
        ConditionSet(made.folder, verify=True)


def test_a_template_that_changes_makes_the_windows_anew(home, windows, tmp_path):
    assert windows.manifest.template == hashlib.sha256(CHATML.encode()).hexdigest()[:16]
    (tmp_path / "chat.jinja").write_text(CHATML)
    (tmp_path / "leaked.txt").write_text("octo__cat-99\n")
    stage = options(template=str(tmp_path / "chat.jinja"), filters={"leaked": [str(tmp_path / "leaked.txt")]})
    written = {**stage.model_dump(mode="json", exclude_defaults=True), "kind": "prepare_trajectories"}
    recipe = load_recipe(write_recipe(home, {"name": "agents", "stages": {"windows": written}}, "keyed"))
    keys = [stage_key(recipe, "windows", home)] * 2
    for name in ("chat.jinja", "leaked.txt"):
        with open(tmp_path / name, "a") as file:
            file.write("\n")
        keys.append(stage_key(recipe, "windows", home))
    assert len(set(keys)) == 3


# -- what is left out ------------------------------------------------------------------------------------------------------


BROKEN = {
    "truncated JSON": '{"trajectory": [',
    "unknown role": numbered_row(50, trajectory=[{"role": "user", "content": "x"}, {"role": "robot", "content": "x"}]),
    "not resolved": numbered_row(51, resolved=0),
    "exit status": numbered_row(52, exit_status="gave up"),
    "empty patch": numbered_row(53, model_patch=" "),
    "SWE-bench repository": numbered_row(54, repo="django/django"),
    "listed instance": numbered_row(55, repo="acme/elk"),
    "special token in text": numbered_row(56, issue=f"It says {END}"),
    "longer than a window": numbered_row(57, issue="purr " * 400),
}


def test_every_row_is_learnt_from_or_named_with_its_reason(home, tmp_path):
    runs = sound() + [numbered_row(3, repo=REPOS[3], steps=2 + more) for more in range(4)]
    lines = [json.dumps(record) for record in runs]
    lines += [record if isinstance(record, str) else json.dumps(record) for record in BROKEN.values()]
    path = tmp_path / "runs.jsonl"
    path.write_text("\n".join(lines) + "\n")
    (tmp_path / "leaked.txt").write_text("acme__elk-55\n")
    said: list[str] = []
    made = build(home, tmp_path / "c", said=said, path=str(path), filters={"leaked": [str(tmp_path / "leaked.txt")], "per_instance": 4})
    told, gone = report(made), dropped(made)
    assert Counter(line["reason"] for line in gone) == told["dropped"] == {**dict.fromkeys(BROKEN, 1), "more than per_instance of an instance": 2}
    assert told["rows"] == len(lines) == told["trajectories"] + len(gone) == told["trajectories"] + sum(told["dropped"].values())
    assert len({line["row"] for line in gone}) == len(gone) and all(line["detail"] for line in gone)
    for line in gone:
        number = int(line["row"].rsplit(":", 1)[1])
        if line["reason"] in BROKEN:
            assert number == len(runs) + 1 + list(BROKEN).index(line["reason"])
    assert any("left out" in line and "dropped.jsonl" in line for line in said)
    # The counts of what is there.
    assert told["conditions"] == len(made) and told["tokens"] == len(made.tokens) and told["targets"] == int(made.mask.sum())
    assert list(told["tokens_of_a_trajectory"]) == ["p50", "p90", "p99", "max"]


def test_runs_that_the_template_refuses_are_counted_though_all_of_a_lot_are(home, tmp_path):
    write_runs(tmp_path / "bad.jsonl", [numbered_row(n, issue=f"{START} {n}") for n in range(40)])
    said: list[str] = []
    with pytest.raises(DataError, match="no trajectory is left to train on: 40 special token in text"):
        build(home, tmp_path / "c", said=said, path=str(tmp_path / "bad.jsonl"), held_out=[])
    assert not (tmp_path / "c").exists()


def test_turns_without_a_window_are_counted(home, tmp_path):
    for policy in ("drop", "head", "head_tail", "windows"):
        made = build(home, tmp_path / policy, policy=policy, sequence=400)
        tokenizer = load_tokenizer(str(made.tokenizer))
        turns = sum(len(said_in(tokenizer, batch.labels_BT[0].numpy())) for _, batch in all_rows(made))
        total = sum(message["role"] == "assistant" for record in sound() for message in record["trajectory"])
        assert turns + report(made)["turns_without_a_window"] == total, policy
        assert (turns == total) == (policy == "windows"), policy


# -- the gate --------------------------------------------------------------------------------------------------------------


def alike(path: Path, count: int, same: int) -> str:
    """Runs on ``count`` issues, the last ``same`` of which have the words of the first."""
    rows = [numbered_row(n, repo=REPOS[n % 4], issue=f"Cat {0 if n >= count - same else n} does not purr.") for n in range(count)]
    return str(write_runs(path, rows))


def test_issues_that_are_all_the_same_are_refused_with_the_reason(home, tmp_path):
    with pytest.raises(DataError, match=r"^conditions: 8% of 12 conditions have texts of their own.* read the same.*is the prompt constant.*`condition\.skip`"):
        build(home, tmp_path / "c", path=alike(tmp_path / "runs.jsonl", 12, 12), held_out=[])
    assert not (tmp_path / "c").exists(), "a refused folder was left behind"


@pytest.mark.parametrize(("count", "same", "sound"), [(20, 1, True), (21, 2, True), (20, 2, False), (10, 1, False)])
def test_more_than_nine_of_ten_issues_must_differ(home, tmp_path, count, same, sound):
    path = alike(tmp_path / "runs.jsonl", count, same)
    if sound:
        assert len(build(home, tmp_path / "c", path=path, held_out=[])) == count
        return
    with pytest.raises(DataError, match="conditions: 90% of"):
        build(home, tmp_path / "c", path=path, held_out=[])


def test_words_that_all_issues_begin_with_can_be_left_out(home, tmp_path):
    opening = "I have uploaded a repository. Solve this:\n"
    path = str(write_runs(tmp_path / "runs.jsonl", [numbered_row(n, issue=f"{opening}cat {n}") for n in range(6)]))
    with pytest.raises(DataError, match=r"`condition\.skip`"):
        build(home, tmp_path / "a", path=path, held_out=[], condition={"tokens": 8})
    made = build(home, tmp_path / "b", path=path, held_out=[], condition={"tokens": 8, "skip": r"I have .*?:\n"})
    texts = made.texts.of(np.arange(6))
    assert load_tokenizer(str(made.tokenizer)).decode([i for i in texts[2, 0] if i >= 0]) == "cat 2"


# -- the command line ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"template": "chit.jinja"}, "chit.jinja"),
        ({"tokenizer": "./tokeniser"}, "tokeniser"),
        ({"filters": {"leaked": ["bench.txt"]}}, "bench.txt"),
        ({"path": "walks.jsonl"}, "walks.jsonl"),
        ({"template": "runs.jsonl"}, "template"),
        ({"held_out": ["acme/owls"]}, "acme/owls"),
    ],
    ids=["template", "tokenizer", "leaked", "path", "no template", "held out"],
)
def test_a_file_that_is_not_there_ends_the_run_with_its_name(home, tmp_path, changes, word):
    stage = {"kind": "prepare_trajectories", **options().model_dump(mode="json", include={"tokenizer", "path", "template", "sequence"}), **changes}
    path = home / "missing.yaml"
    path.write_text(yaml.safe_dump({"name": "missing", "stages": {"windows": stage}}))
    result = CliRunner().invoke(app, ["run", str(path)], env={"LIMBECK_RUNS": str(tmp_path)})
    assert result.exit_code == 2, result.output
    assert word in result.output.replace("\n", "") and "Traceback" not in result.output


# -- through the engine ----------------------------------------------------------------------------------------------------


def model(home: Path, name: str, width: int, seed: int) -> None:
    tokenizer = load_tokenizer(str(home / "tokenizer"))
    config = {
        "model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 512, "initializer_range": 0.3, "tie_word_embeddings": True,
    }  # fmt: skip
    save_model(build_model(config, seed=seed), home / name, tokenizer_source=str(home / "tokenizer"))


def learning(teacher: dict[str, Any], **surgery: Any) -> dict[str, Any]:
    shape = {"kind": "lora_generator", "targets": "all", "rank": 2, "alpha": 4, "width": 16, "trunk": 1, "reader": {"blocks": 1, "latents": 4}, **surgery}
    return {
        "data": {"from": "windows"}, "student": {"base": "base", "surgery": [shape], "train": ["generator"]}, "teacher": teacher,
        "objectives": [{"kind": "topk_kl", "k": 16}], "optim": {"groups": [{"lr": 3e-3}]},
        "loop": {"steps": 4, "batch_tokens": 640, "microbatch": 1, "precision": "float32", "log_every": 1, "validate_every": 2},
    }  # fmt: skip


STORED = {"kind": "stored", "signals": {"from": "signals"}}


class Finished:
    """The recipe that ran from end to end, and the conditions that it trained on."""

    def __init__(self, home: Path):
        self.home = home
        model(home, "base", 16, 0)
        model(home, "teacher", 24, 1)
        local = {"kind": "local", "model": "teacher"}
        prepare = options(sequence=256).model_dump(mode="json", exclude_defaults=True)
        self.stages: dict[str, Any] = {
            "windows": {**prepare, "kind": "prepare_trajectories"},
            "signals": {"kind": "capture", "data": {"from": "windows"}, "teacher": local, "k": 16, "codec": "exact"},
            "generate": learning(STORED),
            "online": learning(local),
            "static": learning(STORED, condition="none"),
            "evaluate": {
                "kind": "evaluate_agent", "from": "generate", "against": ["static"], "teacher": STORED, "top_k": 16, "turns": 1, "new_tokens": 4,
                "rows": 2, "bootstrap": 100,
            },
        }  # fmt: skip
        self.recipe = {"name": "agents", "stages": self.stages}
        self.trained: set[int] = set()
        step = TrainStep.run

        def watched(this: Any, batch: Any, *given: Any, **more: Any) -> Any:
            if torch.is_grad_enabled():
                self.trained |= set(batch.adapters_B.tolist()) - {-1}
            return step(this, batch, *given, **more)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TrainStep, "run", watched)
            self.run, self.said = run(home, self.recipe)

    @property
    def conditions(self) -> ConditionSet:
        return ConditionSet(self.run / "windows/conditions")

    def losses(self, stage: str) -> list[Any]:
        kept = ("step", "loss", "topk_kl/raw", "validation/loss")
        return [{name: row[name] for name in kept if name in row} for row in read_metrics(self.run / stage / "metrics.jsonl")]


@pytest.fixture(scope="module")
def finished(home: Path) -> Finished:
    return Finished(home)


def test_a_generator_learns_from_what_a_teacher_said_of_the_agents_words(finished):
    statuses = {p.parent.name: json.loads(p.read_text())["status"] for p in finished.run.glob("*/stage.json")}
    assert statuses == dict.fromkeys(finished.stages, "finished")
    stored = json.loads((finished.run / "signals/stage.json").read_text())["result"]["rows"]
    # Only what the agent says is asked about, and windows that are the same once.
    made = finished.conditions
    windows = {made.tokens[a:b].tobytes(): int(made.mask[a:b].sum()) for a, _, b in made.examples_E5[:, :3].tolist()}
    assert len(windows) < len(made.examples_E5) and stored == sum(windows.values())
    assert [row["step"] for row in finished.losses("generate") if "loss" in row] == [1, 2, 3, 4]
    assert any("validation/loss" in row for row in finished.losses("generate"))


def test_stored_signals_teach_as_the_teacher_itself_does(finished):
    stored, online, static = (finished.losses(stage) for stage in ("generate", "online", "static"))
    assert [row.keys() for row in stored] == [row.keys() for row in online]
    for one, other in zip(stored, online, strict=True):
        assert one == pytest.approx(other, rel=1e-6)
    assert stored[3]["loss"] != pytest.approx(static[3]["loss"], rel=1e-6)


def test_a_served_teacher_teaches_and_judges_as_the_stored_one_does(finished):
    scorer = Scorer(str(finished.home / "teacher"))
    scorer.load("cpu")
    service = TeacherService(scorer, "teacher")
    with serving(service.app, stopping=service.worker.close) as url:
        http = {"kind": "http", "url": url}
        judge = {**finished.stages["evaluate"], "from": "served", "against": [], "teacher": http, "turns": 0}
        stages = {"windows": finished.stages["windows"], "served": learning(http), "evaluate": judge}
        out, _ = run(finished.home, {"name": "agents", "stages": stages}, to="served")
    assert service.worker.join(10)
    found = [row["loss"] for row in read_metrics(out / "served/metrics.jsonl") if "loss" in row]
    assert found == pytest.approx([row["loss"] for row in finished.losses("generate") if "loss" in row], rel=1e-4) and len(found) == 4
    by_http, stored = (json.loads((where / "evaluate/evaluation/agent.json").read_text())["splits"] for where in (out, finished.run))
    for split, table in by_http.items():
        for column, own in (("base", "base"), ("served", "generate"), ("served, shuffled", "generate, shuffled")):
            assert table["kl"][column] == pytest.approx(stored[split]["kl"][own], rel=1e-3), (split, column)


def test_held_out_repositories_are_never_trained_on(finished):
    assert finished.trained and finished.trained <= set(finished.conditions.split("seen"))


def test_page_and_card_show_the_table(finished):
    found = json.loads((finished.run / "evaluate/evaluation/agent.json").read_text())["splits"]["held_out_source"]
    run = read_run(finished.run)
    for text in (page(run), model_card(run, peft=True)):
        assert "On trajectories: evaluate" in text and f"Held-out repositories: {found['conditions']} issue" in text
        assert "No evaluate_adapters stage has judged" not in text
        for name, kl in found["kl"].items():
            row = next(line for line in text.replace("<tr>", "\n<tr>").splitlines() if line.startswith((f"<tr><td>{name}<", f"| {name} |")))
            assert f"{kl:.4f}" in row


def test_every_control_is_in_the_table(finished):
    found = json.loads((finished.run / "evaluate/evaluation/agent.json").read_text())
    assert set(found["splits"]) == {"seen", "held_out_source"}
    columns = {"base", "generate", "generate, shuffled", "static"}
    for split, table in found["splits"].items():
        assert table["conditions"] == len(finished.conditions.split(split))
        for measure in ("nll", "kl", "agreement", "calls_forced", "calls_written"):
            assert set(table[measure]) == columns, measure
        assert set(table["lead"]) == columns - {"generate"}
        assert np.isfinite([table[m][c] for m in ("nll", "kl", "agreement") for c in columns]).all()
    assert {row["repo"] for row in found["issues"] if row["split"] == "held_out_source"} == {"acme/owl"}


def test_the_recipe_passes_a_check(finished):
    result = CliRunner().invoke(app, ["check", str(write_recipe(finished.home, finished.recipe, "checked"))])
    assert result.exit_code == 0, result.output


def test_what_is_no_generator_on_runs_of_agents_is_not_judged_as_one(finished):
    plain = {**finished.stages, "plain": {**learning(STORED), "student": {"base": "base"}}}
    with pytest.raises((RunError, RecipeError), match="'plain' trained no LoRA generator"):
        run(finished.home, {"name": "agents", "stages": {**plain, "evaluate": {**finished.stages["evaluate"], "from": "plain"}}})


def test_a_generator_of_other_data_is_not_judged_on_agents_runs(finished):
    text = finished.home / "corpus.txt"
    text.write_text("\n\n".join(f"paragraph {n} of the corpus has {n * 7} words" for n in range(60)))
    source = {"name": "text", "source": {"kind": "text", "path": "corpus.txt", "documents": "paragraph"}}
    other = {
        "kind": "prepare_conditions", "tokenizer": "base", "sources": [source], "formats": ["plain", "upper"], "examples": 20, "test_examples": 6,
        "min_examples": 8, "sequence": 64, "condition": {"form": "prompt_answer", "texts": 2, "tokens": 12},
    }  # fmt: skip
    train = {**learning(STORED), "data": {"from": "other"}, "teacher": None, "objectives": [{"kind": "ce"}]}
    stages = {"other": other, "elsewhere": train, "evaluate": {"kind": "evaluate_agent", "from": "elsewhere"}}
    with pytest.raises((RunError, RecipeError), match="'elsewhere' was not trained on the data of a prepare_trajectories stage"):
        run(finished.home, {"name": "other", "stages": stages}, to="other")


def test_the_shipped_runs_become_windows(shared_data, tmp_path):
    places = [shared_data / name for name in ("trajectories", "tokenizers/qwen2.5", "chat_templates/Qwen3-Coder.jinja")]
    if missing := [str(place) for place in places if not place.exists()]:
        pytest.skip(f"needs {', '.join(missing)}, which is not there")
    given = options(
        path=str(places[0] / "openhands_messages_3rows.jsonl"), tokenizer=str(places[1]), template=str(places[2]), sequence=6000,
        filters={"resolved": False, "exit_status": [], "patch": False}, held_out=["Project-MONAI/MONAI"],
    )  # fmt: skip
    made = build_trajectories(given, tmp_path / "c", tokenizer=str(places[1]), base_dir=tmp_path)
    tokenizer = load_tokenizer(str(made.tokenizer))
    told = report(made)
    assert (told["rows"], told["trajectories"], told["turns_without_a_window"]) == (3, 3, 0)
    assert told["repositories"] == {"seen": ["python/mypy"], "held_out_source": ["Project-MONAI/MONAI"]}
    turns = [words for _, batch in all_rows(made) for words in said_in(tokenizer, batch.labels_BT[0].numpy())]
    assert len(turns) == 40 and all(words.endswith(END) and words.count(END) == 1 for words in turns)
