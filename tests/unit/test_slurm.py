"""What `limbeck init --slurm` prints."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from limbeck.cli.app import app
from limbeck.config.load import load_recipe
from limbeck.config.slurm import Job, slurm_script

ODD = "it's a \"recipe\" }$(touch oops)`touch oops`.yaml"
SHELL = """
set -u
eval "$(sed -n "/^recipe=/,/^python=/p" "$1")"
printf "%s\\n" "$recipe" "$run_dir" "$verb" "${stages[*]-}" "$gpus" "$processes" "$max_requeues"
"""


def printed(*words: str) -> str:
    result = CliRunner().invoke(app, ["init", "--slurm", *words])
    assert result.exit_code == 0, result.output
    return result.output


def settings(text: str, folder: Path) -> list[str]:
    """The variables at the top of a script as bash reads them."""
    script = folder / "job.sbatch"
    script.write_text(text)
    subprocess.run(["bash", "-n", str(script)], check=True)
    done = subprocess.run(["bash", "-c", SHELL, "bash", str(script)], cwd=folder, capture_output=True, text=True, check=True)
    assert not (folder / "oops").exists()
    return done.stdout.splitlines()


def test_a_job_asks_for_what_was_said_and_for_a_warning_in_time(tmp_path: Path) -> None:
    text = printed("hybrid", "--nodes", "2", "--gpus", "4", "--time", "1-12:00:00")
    head = text[: text.index("set -uo pipefail")].splitlines()
    assert head[0] == "#!/usr/bin/env bash"
    assert [line.removeprefix("#SBATCH ") for line in head if line.startswith("#SBATCH ")] == [
        "--job-name=hybrid", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=4", "--cpus-per-task=32", "--time=1-12:00:00",
        "--requeue", "--open-mode=append", "--signal=B:USR1@300", "--output=%x-%j.log",
    ]  # fmt: skip
    assert all(line.startswith("#") for line in head if line), "Slurm reads #SBATCH lines up to the first command"
    assert settings(text, tmp_path) == ["hybrid", "runs/hybrid", "run", "", "4", "4", "50"]
    assert "@@" not in text and "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1,SIGHUP" in text and "--max-restarts=0" in text
    grace = int(text.split("TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-")[1].split("}")[0])
    assert 30 < grace < 300


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["agentic_lora", "--verb", "prepare"], ["agentic_lora", "runs/agentic-lora", "prepare", "", "0", "1", "50"]),
        (["agentic_lora", "--verb", "capture"], ["agentic_lora", "runs/agentic-lora", "capture", "capture_8k capture_32k", "0", "8", "50"]),
        (["agentic_lora", "--verb", "report"], ["agentic_lora", "runs/agentic-lora", "report", "", "0", "1", "50"]),
        (["hybrid", "--cpu", "--cpus", "4", "--stage", "align"], ["hybrid", "runs/hybrid", "run", "align", "0", "1", "50"]),
    ],
)
def test_what_needs_no_gpu_asks_for_none(words: list[str], expected: list[str], tmp_path: Path) -> None:
    text = printed(*words)
    assert "gpus-per-node" not in text and settings(text, tmp_path) == expected


def test_any_name_of_a_recipe_is_a_word_for_bash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(ODD).write_text(f"extends: hybrid\nname: '{ODD.replace(chr(39), chr(39) * 2)}'\n")
    text = slurm_script(ODD, Job())
    assert settings(text, tmp_path)[:2] == [ODD, f"runs/{ODD}"]
    assert "#SBATCH --job-name=it-s-a-recipe-touch-oops-touch-oops-.yaml\n" in text


def test_secrets_are_never_written_into_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "HF_HOME"):
        monkeypatch.setenv(name, "hush-hush")
    assert "hush-hush" not in printed("hybrid")


def test_printing_it_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom limbeck.cli.app import app\n"
        "try:\n    app(['init', '--slurm', 'hybrid'])\nexcept SystemExit:\n    pass\n"
        "sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "#SBATCH" in done.stdout, shlex.join(done.stderr.splitlines())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["init", "--slurm"], "init --slurm takes a recipe's file"),
        (["init", "--slurm", "nowhere.yaml"], "no such file"),
        (["init", "hybrid", "--gpus", "4"], "--gpus is about a job: add --slurm"),
        (["init", "hybrid", "--cpu"], "--cpu is about a job: add --slurm"),
        (["init", "--slurm", "hybrid", "--verb", "prepar"], "did you mean 'prepare'"),
        (["init", "--slurm", "hybrid", "--verb", "capture"], "has no capture stage; its stages: "),
        (["init", "--slurm", "hybrid", "--verb", "report", "--stage", "align"], "report takes no stage"),
        (["init", "--slurm", "hybrid", "--verb", "prepare", "--gpus", "1"], "prepare needs none"),
        (["init", "--slurm", "hybrid", "--verb", "prepare", "--nodes", "2"], "one process on one node"),
        (["init", "--slurm", "hybrid", "--stage", "alig"], "did you mean 'align'"),
        (["init", "--slurm", "hybrid", "--nodes", "0"], "--nodes 0: must be 1 or more"),
        (["init", "--slurm", "hybrid", "--cpu", "--gpus", "2"], "one of them"),
        (["init", "--slurm", "hybrid", "--time", "1:00\n#SBATCH --x"], "is HH:MM:SS"),
    ],
)
def test_what_does_not_go_together_is_refused(words: list[str], message: str) -> None:
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2 and message in result.output, result.output


def test_the_pages_commands_settings_and_links_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/scale.md."""
    page = Path(__file__).parents[2] / "docs" / "scale.md"
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert (page.parent / link).exists(), link
    fields = {name for stage in load_recipe("hybrid").stages.values() if stage.kind == "train" for name in type(stage.loop).model_fields}
    assert (named := set(re.findall(r"`loop\.(\w+)", text))) and named <= fields, named - fields
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text("extends: hybrid\nname: my-run\n")
    commands = re.findall(r"limbeck (init --slurm [^`#>|\n]+)", text)
    assert len(commands) == 7
    for command in commands:
        result = CliRunner().invoke(app, shlex.split(command))
        assert result.exit_code == 0 and settings(result.output, tmp_path), command
    torchrun = next(line for line in text.splitlines() if line.startswith("torchrun"))
    assert "--signals-to-handle SIGTERM,SIGINT,SIGUSR1,SIGHUP -m limbeck run my.yaml" in torchrun
