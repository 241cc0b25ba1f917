"""What Limbeck writes, damaged: whoever reads it says which file is wrong and what to do, or gives what it would have given.

Where no hash is recorded a good file of other content cannot be told from an edit, so such changes are left out there: a model folder
(its `config.json`, tokenizer and the numbers in its weights belong to transformers' users) and a PEFT folder that is in no pool.
Prepared text and conditions are opened with `verify`: by default the content of their large files is not read for its hash.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import adapter_cases
import condition_cases
from adapter_cases import base_folder, peft_folders, random_adapters, small_spec
from limbeck.adapters.delta_store import MeasuredDeltas, adapter_key, write_measured
from limbeck.adapters.peft_files import read_peft, read_provenance, write_peft
from limbeck.adapters.pool import Entry, Pool, read_pool, write_pool
from limbeck.config.load import load_recipe
from limbeck.config.parts.adapters import RepresentationOptions
from limbeck.config.parts.surgeries import LoraGeneratorOptions
from limbeck.data.conditions.store import ConditionSet
from limbeck.data.dataset import TokenRows
from limbeck.engine.checkpoint import Checkpoints, load_parameters
from limbeck.engine.determinism import rng_state
from limbeck.engine.parallel import World
from limbeck.errors import CheckpointError, LimbeckError, ModelError
from limbeck.models.loading import copy_tokenizer, load_model, load_tokenizer
from limbeck.records import sealed
from limbeck.report.run import read_run
from limbeck.stages.folder import write_json
from limbeck.stages.ledger import Ledger
from limbeck.stages.probing import padded
from limbeck.stages.run import open_stage, run_recipe
from limbeck.students.generator.student import GeneratorStudent, read_record, read_weights
from limbeck.students.student import ranked_layers
from limbeck.teachers.store.store import SignalStore
from mutations import mutate, mutate_values, told
from signal_cases import answers, document, identity

EACH = 24
"""Mutations of each artefact."""
WAY_OUT = re.compile(r"again|must be|train it|get the model|put |bring|move|remove|download|take |name |start|save|give|run ")
RECIPE = """
name: whole
stages:
  text: {kind: prepare, data: {source: {kind: text, path: corpus.txt, documents: paragraph}, tokenizer: "builtin:code-2m", sequence: 32, held_out: 0.2}}
  pretrain:
    data: {from: text}
    student:
      config: {model_type: qwen3, vocab_size: VOCABULARY, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2,
               num_key_value_heads: 1, head_dim: 8, tie_word_embeddings: true}
    optim: {groups: [{lr: 1e-3}]}
    loop: {steps: 1, batch_tokens: 64, precision: float32}
"""


@dataclass(frozen=True)
class Artefact:
    """A folder, who reads it, and what of it cannot be told from an edit."""

    folder: Path
    read: Callable[[Path], Any]
    unhashed: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    """Files that this reader does not read, or that another artefact here stands for."""
    older: tuple[str, ...] = field(default=())
    """Other right results: those of an older checkpoint, if it is said."""


class Line(nn.Module):
    """A student with one weight and one buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3, 4))
        self.register_buffer("ids", torch.zeros(5))


SAID: list[str] = []


def checkpointed(home: Path) -> Iterator[tuple[str, Artefact]]:
    def tensors(value: float) -> dict[str, torch.Tensor]:
        return {"model/w": torch.full((3, 4), value), "buffer/ids": torch.full((5,), value), "exp_avg/w": torch.full((3, 4), value).bfloat16()}

    def read(folder: Path) -> Any:
        store, filled = Checkpoints(folder, World(torch.device("cpu")), keep_last=3, say=SAID.append), tensors(0.0)
        loaded = store.load(filled)
        if loaded is None:
            return None
        store.load_rng(loaded, 0)
        return [loaded.step, loaded.state, loaded.objectives, filled, rng_state()]

    def read_one(folder: Path) -> Any:
        module = Line()
        load_parameters(folder / "step_2", module)
        return module.state_dict()

    with torch.random.fork_rng():
        older = []
        for step in (1, 2, 3):
            store = Checkpoints(home / "checkpoints", World(torch.device("cpu")), keep_last=3, say=SAID.append)
            store.save(step, tensors(float(step)), {"align/0": torch.tensor(2.0)}, {"step": step, "tokens": 7 * step}, final=step == 3)
            older.append(told(read(home / "checkpoints")))
    yield "checkpoints", Artefact(home / "checkpoints", read, older=tuple(older[:2]))
    yield "one checkpoint", Artefact(home / "checkpoints", read_one, whole=("step_1/*", "final/*"))


def adapters(home: Path) -> Iterator[tuple[str, Artefact]]:
    base = base_folder(home / "base")
    model: Any = load_model(str(base)).requires_grad_(False)
    loras = random_adapters(small_spec(model), 3, dtype=torch.float32)
    names = ("red", "green", "blue")
    pool = home / "pool"
    peft_folders(pool, base, loras, names)
    write_pool(Pool(pool, tuple(Entry(name, name, name) for name in names), {"source": str(base), "fingerprint": {}}))

    def read_all(folder: Path) -> Any:
        found = read_pool(folder)
        return [found.base, found.of_conditions(), found.adapters().A, found.adapters().B, found.adapters().spec]

    yield "pool", Artefact(pool, read_all, whole=("*/limbeck.json",))

    write_peft(loras, 0, home / "peft", base=str(base), provenance={"condition": "red"})

    def read_one(folder: Path) -> Any:
        found = read_peft(folder, model)
        return [found.A, found.B, found.spec, read_provenance(folder)]

    yield "PEFT folder", Artefact(home / "peft", read_one, unhashed=("*.safetensors", "adapter_config.json"))

    keys = [adapter_key(loras, i, "measuring") for i in range(3)]
    write_measured(
        home / "deltas", {name: (keys[i], np.arange(6, dtype=np.float32) + i) for i, name in enumerate(names)},
        statistics={name: {"norm": 1.5} for name in names},
        probes=padded([[5, 6, 7], [8]]), represent=RepresentationOptions(tokens="last"), facts={"base": {}, "measuring": "measuring"},
        moments={"q_proj": torch.eye(4)[None]},
    )  # fmt: skip

    def read_deltas(folder: Path) -> Any:
        found = MeasuredDeltas(folder)
        return [found.stacked(names), found.probes, found.moments(), found.represent.model_dump(), found.record["base"], found.digest]

    yield "measured deltas", Artefact(home / "deltas", read_deltas)

    options = LoraGeneratorOptions.model_validate({"targets": "all", "rank": 2, "alpha": 4, "width": 8, "trunk": 1, "reader": {"blocks": 1, "latents": 2}})
    student = GeneratorStudent(model, options, text_shape=(2, 6), base={"source": str(base), "fingerprint": {}})
    student.save(home / "generator")

    def read_generator(folder: Path) -> Any:
        record = read_record(folder)
        read_weights(folder, student.generator)
        return [record["base"], record["options"], record["spec"], record["text_shape"], student.generator.state_dict()]

    yield "generator", Artefact(home / "generator", read_generator)

    model.save_pretrained(home / "sharded", max_shard_size="20KB")
    copy_tokenizer(str(base), home / "sharded")
    assert len(list((home / "sharded").glob("*.safetensors"))) > 1

    def read_model(folder: Path) -> Any:
        words = load_tokenizer(str(folder))
        with torch.no_grad():
            return [words("def f(x):").input_ids, load_model(str(folder)).eval()(torch.arange(12)[None]).logits]

    theirs = ("*.safetensors", "*config.json", "tokenizer.json", "*.jinja", "special_tokens_map.json")
    yield "model folder", Artefact(base, read_model, unhashed=theirs)
    yield "model folder of several files", Artefact(home / "sharded", read_model, unhashed=(*theirs, "*.index.json"))


def signals(home: Path) -> Iterator[tuple[str, Artefact]]:
    rng = np.random.default_rng(0)
    asks = [document(rng, length) for length in rng.integers(2, 40, 20)]
    store = SignalStore(home / "signals", identity(), shard_bytes=2000)
    for ask in asks:
        store.put(ask, answers(rng, len(ask.positions), identity().layout))
    store.finish()
    store.put(document(rng, 30), answers(rng, 29, identity().layout))
    store.close()

    def read(folder: Path) -> Any:
        return [SignalStore(folder).get(ask) for ask in asks]

    def go_on(folder: Path) -> Any:
        held = SignalStore(folder, identity(), shard_bytes=2000)
        try:
            return [held.has(ask) and held.get(ask) for ask in asks]
        finally:
            held.close()

    yield "signals", Artefact(home / "signals", read)
    yield "signals that are added to", Artefact(home / "signals", go_on)


def texts(home: Path) -> Iterator[tuple[str, Artefact]]:
    condition_cases.build(home, [condition_cases.rows(home, word) for word in ("pump", "lamp")], formats=["plain", "upper"])

    def read_conditions(folder: Path) -> Any:
        made = ConditionSet(folder, verify=True)
        words = load_tokenizer(str(made.tokenizer))
        return [made.conditions, made.rows(made.split("seen")).batch([0, 1]), made.texts.of(np.array([0])), words("It is a pump").input_ids]

    yield "conditions", Artefact(home / "conditions", read_conditions)

    (home / "corpus.txt").write_text("\n\n".join(f"Text {i} says that {i} and {i + 1} make {2 * i + 1}." for i in range(60)))
    (home / "recipe.yaml").write_text(RECIPE.replace("VOCABULARY", str(adapter_cases.VOCABULARY)))
    recipe = load_recipe(home / "recipe.yaml")
    run = run_recipe(recipe, recipe_dir=home, run_dir=home / "run", say=lambda text: None)

    def read_data(folder: Path) -> Any:
        words = load_tokenizer(str(folder / "tokenizer"))
        return [[TokenRows(folder, split, verify=True).batch([0]) for split in ("train", "held_out")], words("Text 3 says").input_ids]

    yield "prepared text", Artefact(run / "text" / "data", read_data)

    def read_stage(folder: Path) -> Any:
        context = open_stage(folder / "pretrain")
        read_run(folder)
        return [context.recipe.model_dump(mode="json"), context.name, context.recipe_dir]

    said_about = ("*/stage.json", "environment.json")
    yield "opened run", Artefact(run, read_stage, unhashed=said_about, whole=("text/*", "pretrain/*/*", "LOCK", "exit_reason", "*.html", "*.log"))

    def run_again(folder: Path) -> Any:
        # The long part is another test's: a stage that is stale or unfinished is done anew, from its last checkpoint.
        done = run_recipe(recipe, recipe_dir=home, run_dir=folder, say=lambda text: None)
        made = (done / "text/data/train/tokens.bin").read_bytes(), load_file(done / "pretrain/model/model.safetensors")
        return [*made, open_stage(done / "pretrain").recipe.model_dump(mode="json")]

    yield "finished run", Artefact(run, run_again, whole=("text/data/*", "pretrain/*/*", "*.jsonl", "LOCK", "exit_reason", "*.html", "*.log"))


def rankings(home: Path) -> Iterator[tuple[str, Artefact]]:
    folder = home / "ranking"
    ledger = Ledger(folder, "mine")
    for layer in range(6):
        ledger.add(f"without {layer}", {"text": 2.5 + layer, "recall": 0.25})
    Ledger(folder, "mine", own="3").add("alone", {"text": 1.0, "recall": 0.5})
    write_json(folder / "ranking.json", sealed({"method": "swap", "keep": [1, 3], "scores": {"1": 2.5, "3": 2.25}}))

    def read(folder: Path) -> Any:
        held = Ledger(folder, "mine", say=SAID.append)
        # What is not known is measured again, and the same comes out.
        found = [held.get(f"without {layer}", lambda layer=layer: {"text": 2.5 + layer, "recall": 0.25}) for layer in range(6)]
        return [ranked_layers(str(folder / "ranking.json")), found, held.get("alone", lambda: {"text": 1.0, "recall": 0.5})]

    yield "ranking", Artefact(folder, read)


NAMES = (
    "checkpoints", "one checkpoint", "pool", "PEFT folder", "measured deltas", "generator", "model folder", "model folder of several files",
    "signals", "signals that are added to", "conditions", "prepared text", "opened run", "finished run", "ranking",
)  # fmt: skip


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artefact]:
    made: dict[str, Artefact] = {}
    for build in (checkpointed, adapters, signals, texts, rankings):
        made |= dict(build(tmp_path_factory.mktemp(build.__name__)))
    return made


OTHERWISE = "another result, and nothing was said"


def outcome(artefact: Artefact, folder: Path, whole: str, path: Path) -> str | None:
    """What is wrong with how a damaged folder was read; None if nothing is."""
    SAID.clear()
    try:
        found = told(artefact.read(folder))
    except LimbeckError as error:
        text = str(error)
        if not (path.name in text or str(path.parent) in text or str(folder) in text):
            return f"the message names neither file nor folder: {text}"
        return None if WAY_OUT.search(text) else f"the message has no way out: {text}"
    except BaseException as error:  # also what libraries raise past every handler
        return f"{type(error).__name__} escaped: {str(error)[:300]}"
    if found == whole or (found in artefact.older and any("is damaged" in line for line in SAID)):
        return None
    return OTHERWISE


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_artefact_is_refused_by_name_or_read_as_if_it_were_whole(
    name: str, artefacts: dict[str, Artefact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    artefact = artefacts[name]
    whole = told(artefact.read(shutil.copytree(artefact.folder, tmp_path / "whole" / artefact.folder.name)))
    problems = []
    for seed in range(EACH):
        outside = tmp_path / f"{seed}" / "outside"
        outside.mkdir(parents=True)
        folder = shutil.copytree(artefact.folder, tmp_path / f"{seed}" / artefact.folder.name)
        kind, path = mutate(random.Random(f"{name} {seed}"), folder, outside, unhashed=artefact.unhashed, whole=artefact.whole)
        if wrong := outcome(artefact, folder, whole, path):
            problems.append(f"{seed}: {kind} of {path.relative_to(folder)}: {wrong}")
        shutil.rmtree(tmp_path / f"{seed}", ignore_errors=True)
    assert not problems, "\n".join(problems)


EDITED = {
    "PEFT folder": "adapter_config.json", "model folder": "config.json", "model folder of several files": "model.safetensors.index.json",
    "opened run": "pretrain/stage.json", "finished run": "environment.json",
}  # fmt: skip
"""Files that people edit, or of which no hash is recorded: other values may mean something else, but never end in a traceback."""


@pytest.mark.parametrize("name", EDITED)
def test_an_edited_file_is_refused_or_means_something_else(
    name: str, artefacts: dict[str, Artefact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    problems = []
    for seed in range(EACH):
        folder = shutil.copytree(artefacts[name].folder, tmp_path / f"{seed}" / artefacts[name].folder.name)
        kind = mutate_values(random.Random(f"{name} {seed}"), folder / EDITED[name])
        wrong = outcome(artefacts[name], folder, "", folder / EDITED[name])
        if wrong and wrong != OTHERWISE:
            problems.append(f"{seed}: {kind}: {wrong}")
        shutil.rmtree(tmp_path / f"{seed}", ignore_errors=True)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("number", [2**40, 10**400])
def test_a_number_of_layers_that_nobody_has_is_refused_before_they_are_built(number: int, artefacts: dict[str, Artefact], tmp_path: Path) -> None:
    folder = shutil.copytree(artefacts["model folder"].folder, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": number}))
    with pytest.raises(ModelError, match=r"config\.json says 1\d+ layers"):
        load_model(str(folder))


def test_a_damaged_record_of_a_stage_does_not_stop_a_fresh_start(artefacts: dict[str, Artefact], tmp_path: Path) -> None:
    home = artefacts["finished run"].folder.parent
    folder = shutil.copytree(home / "run", tmp_path / "run")
    (folder / "text" / "stage.json").write_text("[]")
    recipe, said = load_recipe(home / "recipe.yaml"), []
    with pytest.raises(CheckpointError, match=r"text/stage\.json: is damaged .* --fresh"):
        run_recipe(recipe, recipe_dir=home, run_dir=folder, say=said.append)
    run_recipe(recipe, recipe_dir=home, run_dir=folder, stage="text", fresh=True, say=said.append)
    assert (folder / "text.stale-1").is_dir() and (folder / "text" / "data" / "meta.json").is_file()
