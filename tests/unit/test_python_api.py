"""``import limbeck``: light, whole, silent, and the same as the command line."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import socket
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from urllib.request import urlopen

import pytest
from typer.testing import CliRunner

import limbeck
from limbeck import api, diagnosis
from limbeck.cli.app import app
from limbeck.config.load import load_recipe
from limbeck.errors import LimbeckError, RecipeError
from limbeck.report.run import Run
from limbeck.teachers.http.faults import Fault
from limbeck.teachers.http.probe import unreachable

PACKAGE = Path(limbeck.__file__).parent
LIGHT = """
import sys
import limbeck
assert not {"limbeck.api", "pydantic", "rich", "typer", "yaml"} & set(sys.modules), "importing the package"
assert limbeck.api.load is limbeck.load
limbeck.load, limbeck.run, limbeck.serving, limbeck.explain, limbeck.template, limbeck.doctor, limbeck.write_report
recipe = limbeck.load("quickstart", "align.loop.tokens=1M")
assert recipe.stages["align"].loop.tokens == 10**6
limbeck.check(recipe), limbeck.plan(recipe), limbeck.ls(), limbeck.schema(), limbeck.template("hybrid"), limbeck.explain("swa")
limbeck.slurm_script("hybrid", limbeck.Job(nodes=2))
heavy = {"torch", "transformers", "tokenizers", "numpy", "datasets", "safetensors"} & set(sys.modules)
assert not heavy, heavy
"""


def test_importing_and_looking_things_up_is_light_and_silent() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_no_function_is_called_like_a_room_of_the_package() -> None:
    rooms = {path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert not rooms & set(api.NAMES)


def test_type_checkers_and_people_see_every_name() -> None:
    stub = (PACKAGE / "__init__.pyi").read_text()
    assert sorted(re.findall(r"^from limbeck\.api import (\w+) as \1$", stub, re.MULTILINE)) == sorted(api.NAMES)
    assert set(api.NAMES) <= set(dir(limbeck))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        limbeck.nothing  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("name", sorted({*api.NAMES} - {"Job", "DistillTernary"}))
def test_every_function_is_documented_with_an_example_and_typed(name: str) -> None:
    function = getattr(limbeck, name)
    text = inspect.getdoc(function) or ""
    assert f"limbeck.{name}(" in text
    signature = inspect.signature(function)
    assert signature.return_annotation is not signature.empty
    assert all(parameter.annotation is not parameter.empty for parameter in signature.parameters.values())


def test_a_loaded_recipe_knows_where_its_paths_start_and_can_be_changed_again(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("extends: quickstart\nname: mine\n")
    recipe = limbeck.load(file, "align.loop.tokens=1M")
    assert recipe.folder == tmp_path and limbeck.load(recipe) is recipe
    changed = limbeck.load(recipe, "distil.loop.tokens=2M")
    assert changed.folder == tmp_path and changed.stages["align"] == recipe.stages["align"]
    assert (recipe.stages["distil"].loop.tokens, changed.stages["distil"].loop.tokens) == (300_000, 2_000_000)
    # Where it lies is no part of what it says.
    assert limbeck.load("quickstart", "name=mine", "align.loop.tokens=1M") == recipe


def test_every_problem_is_in_the_error_and_nothing_ends_the_process() -> None:
    with pytest.raises(RecipeError) as caught:
        limbeck.run("quickstart", "distil.loop.tokns=1k", "align.optim.groups.0.lr=fast")
    assert len(caught.value.problems) == 2
    for call in (
        lambda: limbeck.ls("mixer"), lambda: limbeck.explain("nothing at all"), lambda: limbeck.plan("nothing"), lambda: limbeck.plan("hybrid", gpus=0),
        lambda: limbeck.template("hybrdi"), lambda: limbeck.read_run("/nowhere"), lambda: limbeck.compare("/nowhere", "/nowhere/else"),
        lambda: limbeck.compare("a", "b", by="hours"), lambda: limbeck.export_model("builtin:code-2m", type="tq9"),
        lambda: limbeck.serving("builtin:code-2m", api_key_env="NOT_SET"), lambda: limbeck.from_seed("/nowhere"),
    ):  # fmt: skip
        with pytest.raises(LimbeckError):
            call()


def test_the_verb_says_what_the_function_returns() -> None:
    summary, unchecked = limbeck.check("hybrid", "align.loop.tokens=1M")
    done = CliRunner().invoke(app, ["check", "hybrid", "align.loop.tokens=1M"])
    assert done.output == f"{summary}\n" and unchecked == []
    planned = CliRunner().invoke(app, ["plan", "hybrid", "--device", "h200", "--json"])
    assert json.loads(planned.output) == json.loads(json.dumps(limbeck.plan(load_recipe("hybrid"), device="h200").to_json()))


def test_an_interruption_reaches_the_caller_after_it_was_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("limbeck.stages.run._run_stages", interrupt)
    with pytest.raises(KeyboardInterrupt):
        limbeck.run("quickstart", run_dir=tmp_path)
    assert (tmp_path / "exit_reason").read_text() == "preempted\n"


def test_a_run_is_a_path_and_names_its_stages(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text('{"name": "mine", "stages": {"distil": {}}}')
    (tmp_path / "distil").mkdir()
    (tmp_path / "distil" / "stage.json").write_text('{"kind": "train", "status": "finished"}')
    run = limbeck.read_run(tmp_path)
    assert isinstance(run, Run) and Path(run) == tmp_path and run["distil"].kind == "train"
    assert limbeck.write_report(run) == tmp_path / "report.html"
    with pytest.raises(LimbeckError, match="no stage 'distill' was started in this run, did you mean 'distil'"):
        run["distill"]


def test_a_server_answers_inside_its_block_and_gives_the_port_back() -> None:
    with limbeck.serving("builtin:code-2m", threads=1) as server:
        assert json.load(urlopen(f"{server.url}/health", timeout=30))
        port = int(server.url.rsplit(":", 1)[1])
    with socket.create_server(("127.0.0.1", port)):
        pass


# -- doctor ------------------------------------------------------------------------------------------------------------------

Usage = namedtuple("Usage", "total used free")


def test_a_machine_is_data_and_the_verb_prints_it() -> None:
    found = limbeck.doctor()
    assert {fact.group for fact in found.facts} == {"machine", "packages", "optional", "compute", "places"}
    named = {fact.name for fact in found.facts}
    assert {
        "cores",
        "memory",
        "python",
        "torch",
        "peft",
        "openai",
        "linear attention",
        "this folder",
        "hub cache",
        "temporary",
        "hub",
    } <= named
    done = CliRunner().invoke(app, ["doctor", "--json"])
    printed = json.loads(done.output)
    assert printed["ready"] == found.ready == (done.exit_code == 0) and [fact["name"] for fact in printed["facts"]] == [
        f.name for f in found.facts
    ]


@pytest.mark.parametrize(
    ("versions", "disk", "said", "ready"),
    [
        ({"pydantic": None}, 10**12, "pydantic is not installed: pip install limbeck", False),
        ({"transformers": "4.57.0"}, 10**12, "transformers 4.57.0 does not fit: pip install 'transformers", False),
        ({"openai": "1.0"}, 10**12, "openai 1.0 does not fit: pip install 'openai>=2'", True),
        ({}, 2**30, "only 1.0 GiB are free", False),
    ],
)
def test_what_stands_in_the_way_is_told_with_the_way_out(
    versions: dict[str, str | None], disk: int, said: str, ready: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = diagnosis._version
    monkeypatch.setattr(diagnosis, "_version", lambda package: versions[package] if package in versions else real(package))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, disk))
    monkeypatch.setattr(diagnosis, "_compute", lambda: iter(()))
    found = limbeck.doctor()
    assert [line for line in (*found.problems, *found.advice) if said in line] and found.ready is ready


@pytest.mark.parametrize(
    ("fault", "way"),
    [
        ("All connection attempts failed", "start it (`limbeck teach MODEL"),
        ("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate", "SSL_CERT_FILE"),
        ("[SSL: WRONG_VERSION_NUMBER] wrong version number", "it speaks http, not https"),
        ("RemoteProtocolError: Server disconnected", "something else listens there"),
        ("/health answers with something that is not JSON", "something else answers there"),
    ],
)
def test_a_teacher_that_is_none_is_told_from_one_that_is_not_there(fault: str, way: str) -> None:
    pipeline = SimpleNamespace(protocol=SimpleNamespace(name="limbeck"), shown="http://127.0.0.1:9")
    message = unreachable(pipeline, Fault(fault))  # type: ignore[arg-type]
    assert fault in message and way in message and "`teacher.protocol` (now 'limbeck')" in message


def test_a_token_that_is_not_there_is_named() -> None:
    with pytest.raises(LimbeckError, match="token_env: the environment variable NOT_SET is not set"):
        limbeck.try_teacher("http://127.0.0.1:9", token_env="NOT_SET")


# -- words about places ------------------------------------------------------------------------------------------------------


def test_a_whole_run_or_a_stage_without_a_model_is_told_from_a_model(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text("{}")
    (tmp_path / "align").mkdir()
    (tmp_path / "align" / "stage.json").write_text("{}")
    with pytest.raises(LimbeckError, match="is a whole run: no stage of it has made a model yet"):
        limbeck.generate(tmp_path, "x")
    with pytest.raises(LimbeckError, match=r"align: this stage has made no model \(yet\)"):
        limbeck.evaluate(tmp_path / "align")
    (tmp_path / "distil" / "model").mkdir(parents=True)
    with pytest.raises(LimbeckError, match=f"is a whole run: name a stage of it, {tmp_path / 'distil'}"):
        limbeck.export_model(tmp_path, "hf")


def test_ranks_that_nobody_started_together_are_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(
        LimbeckError, match=r"WORLD_SIZE is 2, and the ranks cannot find each other .*MASTER_ADDR.*: start them by torchrun"
    ):
        limbeck.run("quickstart", run_dir=tmp_path)
