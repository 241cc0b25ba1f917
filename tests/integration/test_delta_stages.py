"""The stage that measures deltas: the same bytes again, everything that a delta depends on, and adapters that are refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapter_cases import base_folder, corpus, generating, peft_folders, random_adapters, recipe_on, run, small_spec, write_recipe
from limbeck.adapters.delta_store import MeasuredDeltas
from limbeck.adapters.peft_files import write_peft
from limbeck.config.load import load_recipe
from limbeck.engine.console import Counter
from limbeck.engine.metrics import read_metrics
from limbeck.errors import AdapterError, RunError
from limbeck.models.loading import load_model
from limbeck.stages.adapting import base_record, start_adapter
from limbeck.stages.measure_deltas import MeasureDeltasStage
from limbeck.stages.run import stage_key


class Folders:
    """PEFT folders of a base, and stages that measure them."""

    def __init__(self, home: Path, count: int = 5, **shape: Any):
        self.home = home
        self.base = base_folder(home / "base")
        self.spec = small_spec(load_model(str(self.base)), **shape)
        self.adapters = random_adapters(self.spec, count, dtype=torch.float32)
        self.folders = peft_folders(home / "peft", self.base, self.adapters, [f"a{i}" for i in range(count)])

    def stage(self, **changes: Any) -> dict[str, Any]:
        probes = {"kind": "texts", "texts": ["def one(two):", "Three or four."]}
        return {"kind": "measure_deltas", "pool": self.folders, "base": "base", "probes": probes, "together": 2, **changes}

    def measure(self, to: str, **stages: Any) -> tuple[Path, list[str]]:
        return run(self.home, {"name": "measured", "stages": stages}, to=to)


def keys_of(out: Path, stage: str) -> dict[str, str]:
    return {name: entry["key"] for name, entry in MeasuredDeltas(out / stage / "deltas").record["adapters"].items()}


def bytes_of(out: Path, stage: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (out / stage / "deltas").glob("*.npy")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("folders"))


def test_measuring_again_gives_the_same_bytes_whatever_was_kept(folders: Folders) -> None:
    out, said = folders.measure("bytes", one=folders.stage())
    assert any("5 adapters, 0 of them measured before" in line for line in said)
    wanted, keys = bytes_of(out, "one"), keys_of(out, "one")
    assert len(wanted) == 5 == len(set(keys.values()))

    out, said = folders.measure("bytes", one=folders.stage(), again=folders.stage())
    assert any("5 adapters, 5 of them measured before" in line for line in said)
    assert bytes_of(out, "again") == wanted and keys_of(out, "again") == keys

    for name in ("a0", "a3"):
        (out / "delta_cache" / f"{keys[name]}.npy").unlink()
    out, said = folders.measure("bytes", one=folders.stage(), again=folders.stage(), partly=folders.stage())
    assert any("5 adapters, 3 of them measured before" in line for line in said)
    assert bytes_of(out, "partly") == wanted

    afresh, said = folders.measure("afresh", one=folders.stage())
    assert any("0 of them measured before" in line for line in said) and bytes_of(afresh, "one") == wanted


def test_whatever_a_delta_depends_on_is_measured_anew(folders: Folders) -> None:
    base_folder(folders.home / "other", seed=4)
    moved = replace(folders.adapters, A={name: A * (1 + 1e-6) for name, A in folders.adapters.A.items()})
    others = peft_folders(folders.home / "moved", folders.base, moved, list(folders.folders))
    # From elsewhere: nothing says which weights they were trained on.
    foreign = {name: str(folders.home / "foreign" / name) for name in folders.folders}
    for number, folder in enumerate(foreign.values()):
        write_peft(folders.adapters, number, Path(folder), base=None, provenance={})
    texts = {"kind": "texts", "texts": ["def one(two):", "Three or four!"]}
    stages = {
        "text": folders.stage(probes=texts),
        "layer": folders.stage(represent={"layers": [0]}),
        "precision": folders.stage(precision="bfloat16"),
        "adapter": folders.stage(pool=others),
        "base": folders.stage(pool=foreign, base="other"),
    }
    out, said = folders.measure("keys", plain=folders.stage(), **stages)
    assert sum("5 adapters, 0 of them measured before" in line for line in said) == 6
    found = {name: set(keys_of(out, name).values()) for name in ("plain", *stages)}
    assert len(set.union(*found.values())) == 5 * len(found)


def test_broken_adapters_are_refused_and_idle_ones_named(folders: Folders) -> None:
    broken = shutil.copytree(folders.folders["a1"], folders.home / "broken")
    path = broken / "adapter_model.safetensors"
    held = load_file(path)
    name = next(key for key in held if "lora_B" in key)
    save_file({**held, name: torch.full_like(held[name], torch.nan)}, path, metadata={"format": "pt"})
    with pytest.raises((RunError, AdapterError), match="broken") as refused:
        folders.measure("broken-run", one=folders.stage(pool={**folders.folders, "wrong": str(broken)}))
    assert "finite" in str(refused.value) and "a0" not in str(refused.value)

    idle = replace(folders.adapters, B={name: torch.zeros_like(B) for name, B in folders.adapters.B.items()})
    added = peft_folders(folders.home / "idle", folders.base, idle.pick([0]), ["idle"])
    out, said = folders.measure("idle-run", one=folders.stage(pool={**folders.folders, **added}))
    entries = MeasuredDeltas(out / "one/deltas").record["adapters"]
    assert "does nothing" in entries["idle"]["note"] and "note" not in entries["a0"]
    assert any("WARNING: idle: no larger than the noise" in line for line in said)


def test_memory_stays_flat_over_two_hundred_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs /proc")
    many = Folders(tmp_path, 200, targets="q_proj", rank=1)
    seen: list[int] = []

    def watched(*given: Any, **facts: Any) -> None:
        seen.append(next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("RssAnon")))

    statistics: Callable[..., Any] = MeasureDeltasStage._statistics

    def at_the_end(self: MeasureDeltasStage, found: Any) -> Any:
        kept = statistics(self, found)
        watched()
        return kept

    monkeypatch.setattr(Counter, "add", watched)
    monkeypatch.setattr(MeasureDeltasStage, "_statistics", at_the_end)
    # 16 probes x 64 tokens x 16 numbers: 200 such deltas held at once would be 13 MB in each copy.
    out, _ = many.measure("many", one=many.stage(probes={"length": 64}, together=8))
    assert len(seen) == 26 and max(seen[3:]) - seen[2] < 20 * 1024
    size = next((out / "one/deltas").glob("*.npy")).stat().st_size * 200 // 1024
    assert size > 8 * 1024 and seen[-1] - seen[-2] < size / 2, "every delta was read back into memory"


def test_adapters_of_other_weights_are_refused(folders: Folders) -> None:
    base_folder(folders.home / "another", seed=5)
    with pytest.raises(RunError, match=r"a0: was trained on .*base, whose files \(weights\) are not those of the base .*another here"):
        folders.measure("wrong-base", one=folders.stage(base="another"))
    with pytest.raises(AdapterError, match="pool: it names no adapter"):
        folders.measure("nobody", one=folders.stage(pool={}))
    context: Any = SimpleNamespace(recipe_dir=folders.home, name="test", locate=str)
    other = base_record(str(folders.home / "another"), "another")
    with pytest.raises(RunError, match="a0: was trained on"):
        start_adapter(context, folders.folders["a0"], other)
    assert start_adapter(context, folders.folders["a0"], base_record(str(folders.base), "base")).spec.rank == folders.spec.rank


def test_adapters_from_elsewhere_teach_by_the_names_of_their_conditions(folders: Folders) -> None:
    home = folders.home / "teaching"
    home.mkdir()
    base_folder(home / "base")
    prepare = recipe_on(home)["stages"]["conditions"]
    names = ["pump/all/plain", "pump/all/upper", "ledger/all/plain", "ledger/all/upper"]
    own = dict(zip(names, peft_folders(home / "peft", home / "base", folders.adapters, ["a", "b", "c", "d"]).values(), strict=True))
    deltas = {"kind": "measure_deltas", "pool": own, "base": "base", "probes": {"count": 2, "length": 8}}

    def taught(pool: dict[str, str]) -> dict[str, Any]:
        teacher = {"kind": "adapters", "pool": pool, "deltas": {"from": "deltas"}}
        generate = generating([{"kind": "weights", "loss": "mse"}, {"kind": "delta"}], teacher=teacher)
        return {"name": "taught", "stages": {"conditions": prepare, "deltas": deltas, "generate": generate}}

    out, _ = run(home, taught(own))
    logged = read_metrics(out / "generate" / "metrics.jsonl")
    assert logged[0]["delta/raw"] == pytest.approx(1) and logged[-1]["weights/raw"] < logged[0]["weights/raw"]
    with pytest.raises(RunError, match=r"there is no adapter of ledger/all/upper \(1 of 4 seen conditions have none\)"):
        run(home, taught({name: own[name] for name in names[:3]}))


def test_a_stage_is_done_anew_when_a_folder_of_adapters_that_it_reads_has_changed(folders: Folders) -> None:
    """Of the pool that is measured, the base that is trained on, the teachers and the LoRA that a generator starts from."""
    home = folders.home / "keys-of-stages"
    home.mkdir()
    base_folder(home / "base")
    own = peft_folders(home / "peft", home / "base", folders.adapters, ["a0", "a1"])
    surgery = {"kind": "lora_generator", "targets": "all", "rank": 2, "width": 16, "start": "peft/a1"}
    stages = {
        "conditions": {"kind": "prepare_conditions", "tokenizer": "base", "sources": corpus(home)},
        "pool": {"kind": "train_adapters", "base": "base", "conditions": {"from": "conditions"}, "loop": {"steps": 1}},
        "deltas": {"kind": "measure_deltas", "pool": own, "base": "base"},
        "taught": {**generating([{"kind": "weights"}], teacher={"kind": "adapters", "pool": {"a0": own["a0"]}})},
        "started": generating([{"kind": "ce"}], student={"base": "base", "surgery": [surgery], "train": ["generator"]}),
    }
    recipe = load_recipe(write_recipe(home, {"name": "keys", "stages": stages}))

    def keys() -> dict[str, str]:
        return {name: stage_key(recipe, name, home) for name in recipe.stages}

    def changed(before: dict[str, str]) -> set[str]:
        return {name for name, key in keys().items() if key != before[name]}

    before = keys()
    assert not changed(before)
    write_peft(folders.adapters, 4, home / "peft" / "a0", base="b", provenance={})
    assert changed(before) == {"deltas", "taught"}
    before = keys()
    write_peft(folders.adapters, 3, home / "peft" / "a1", base="b", provenance={})
    assert changed(before) == {"deltas", "started"}
    before = keys()
    base_folder(home / "base", seed=9)
    assert changed(before) == {"pool", "deltas", "taught", "started"}
