"""``limbeck adapters``: folders in, tables and folders out, messages for people."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_adapters_algebra import dense, regauged, some_adapters
from typer.testing import CliRunner

from limbeck.adapters.gauge import cosine
from limbeck.adapters.peft_files import read_base, read_peft_file, read_provenance, write_peft
from limbeck.adapters.spec import Adapters, cat
from limbeck.cli.app import app

runner = CliRunner()


def said(*words: str | Path, code: int = 0) -> str:
    result = runner.invoke(app, ["adapters", *map(str, words)], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


@pytest.fixture
def pool(tmp_path: Path) -> tuple[Adapters, list[Path]]:
    """Three adapters, and the first in another gauge, written for one base."""
    three = some_adapters(3)
    adapters = cat([three, regauged(three.pick([0]))])
    folders = [tmp_path / name for name in ("maths", "code", "prose", "twin")]
    for index, folder in enumerate(folders):
        write_peft(adapters, index, folder, base="tiny/base", provenance={"condition": folder.name})
    return adapters, folders


def test_help_imports_nothing_heavy() -> None:
    script = """
import contextlib, io, sys
from limbeck.cli.app import app
for line in ("--help", "adapters --help", "adapters show --help", "adapters merge --help", "adapters retrieve --help"):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        app(line.split(), prog_name="limbeck")
    assert "Usage: limbeck" in out.getvalue(), line
    assert not {"torch", "transformers", "numpy", "safetensors", "peft"} & set(sys.modules), line
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_show_says_what_an_adapter_changes_and_how_much(pool: tuple[Adapters, list[Path]]) -> None:
    adapters, folders = pool
    found = said("show", *folders[:2])
    for index, folder in enumerate(folders[:2]):
        assert f"{folder}: base tiny/base; |dW| {float(dense(adapters)[index].norm()):.4g}" in found
    assert "mlp.down_proj 36 -> 24 x 2 layers" in found and "rank 4, scale 1.5" in found and "condition: maths" in found


def test_show_names_adapters_that_do_nothing_or_are_broken(pool: tuple[Adapters, list[Path]], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    adapters, folders = pool
    adapters.B["self_attn.q_proj"][0, 1] = 0
    write_peft(adapters, 0, folders[0], base=None, provenance={})
    found = said("show", folders[0])
    assert "base not named; |dW|" in found and "│" not in found
    assert found.split("self_attn.q_proj")[-1].split("mlp.down_proj")[0].split()[-1] == "1"
    for factor in adapters.B.values():
        factor.zero_()
    write_peft(adapters, 0, folders[0], base=None, provenance={})
    assert "ZERO: it changes nothing" in said("show", folders[0])
    file = folders[1] / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.model.layers.3.self_attn.q_proj.lora_B.weight"][0, 0] = torch.nan
    save_file(tensors, file)
    assert "BROKEN: numbers that are not finite in B of self_attn.q_proj" in said("show", folders[1])
    assert f"{folders[1]}: the numbers are not finite" in said("retrieve", folders[2], folders[1], code=2)
    assert "not finite" in said("merge", folders[1], folders[2], "--out", tmp_path / "out", code=2)


def test_merge_writes_the_sum_with_its_story(pool: tuple[Adapters, list[Path]], tmp_path: Path) -> None:
    adapters, folders = pool
    found = said("merge", *folders[:2], "--out", tmp_path / "both", "--weights", "0.7,0.3")
    assert f"merged 2 adapters (weighted) at rank 8: {tmp_path / 'both'}" in found and "100.00%" in found
    both = read_peft_file(tmp_path / "both")
    for name in adapters.A:
        wanted = 0.7 * adapters.change(name)[0] + 0.3 * adapters.change(name)[1]
        assert (both.change(name)[0] - wanted).norm() / wanted.norm() <= 1e-6
    assert read_base(tmp_path / "both") == "tiny/base"
    assert read_provenance(tmp_path / "both") == {
        "merged": [str(folder) for folder in folders[:2]], "method": "weighted", "weights": [0.7, 0.3], "rank": 8,
    }  # fmt: skip
    low = said("merge", *folders[:3], "--out", tmp_path / "low", "--method", "dare_ties", "--density", "0.5", "--rank", "3", "--base", "other")
    assert "at rank 3" in low and "100.00%" not in low
    assert read_base(tmp_path / "low") == "other" and read_provenance(tmp_path / "low")["seed"] == 0


def test_merge_takes_adapters_of_several_ranks_and_targets(pool: tuple[Adapters, list[Path]], tmp_path: Path) -> None:
    adapters, folders = pool
    other = some_adapters(1, 2, seed=7, sites=adapters.spec.sites[:1])
    write_peft(other, 0, tmp_path / "other", base=None, provenance={})
    said("merge", folders[0], tmp_path / "other", "--out", tmp_path / "both", "--method", "task_arithmetic")
    both = read_peft_file(tmp_path / "both")
    torch.testing.assert_close(both.change("self_attn.q_proj"), adapters.change("self_attn.q_proj")[:1] + other.change("self_attn.q_proj"))
    torch.testing.assert_close(both.change("mlp.down_proj"), adapters.change("mlp.down_proj")[:1])


def test_retrieve_ranks_by_what_adapters_do(pool: tuple[Adapters, list[Path]]) -> None:
    adapters, folders = pool
    found = said("retrieve", folders[0], *folders[1:], "--temperature", "0.5")
    cosines = cosine(adapters.pick([0]), adapters.pick([1, 2, 3]))[0]
    best, *rest = sorted(zip(cosines.tolist(), folders[1:], strict=True), reverse=True)
    assert best[1].name == "twin" and best[0] == pytest.approx(1, abs=1e-5)
    ranked = [best, *rest]
    shares = (torch.tensor([value for value, _ in ranked]) / 0.5).softmax(0)
    positions = [found.index(f"{value:.4f} {share:.4f}") for (value, _), share in zip(ranked, shares, strict=True)]
    assert positions == sorted(positions)
    assert "twin" in said("retrieve", folders[0], *folders[1:], "-k", "1") and "code" not in said("retrieve", folders[0], *folders[1:], "-k", "1")


def test_errors_are_messages(pool: tuple[Adapters, list[Path]], tmp_path: Path) -> None:
    adapters, folders = pool
    assert "no such folder" in said("show", tmp_path / "nowhere", code=2)
    assert "did you mean 'ties'" in said("merge", *folders, "--out", tmp_path / "x", "--method", "tie", code=2)
    assert "there are 4 adapters" in said("merge", *folders, "--out", tmp_path / "x", "--weights", "1,2", code=2)
    assert "--weights is '1;2'" in said("merge", *folders, "--out", tmp_path / "x", "--weights", "1;2", code=2)
    assert "cross terms" in said("merge", *folders, "--out", tmp_path / "x", "--method", "factors", code=2)
    assert "--temperature is 0" in said("retrieve", *folders, "--temperature", "0", code=2)
    assert "1 to 3" in said("retrieve", *folders, "-k", "9", code=2)
    write_peft(adapters, 0, tmp_path / "far", base="other/base", provenance={})
    assert "other/base, tiny/base" in said("merge", folders[1], tmp_path / "far", "--out", tmp_path / "x", code=2)
    assert not (tmp_path / "x").exists()
