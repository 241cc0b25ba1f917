"""How the command line speaks: help with examples that parse, completion without torch, plain words about mistakes, and its page."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from limbeck.cli.app import app
from limbeck.cli.manners import SECTIONS
from pages import ROOT, Page

runner = CliRunner()
ROOT_COMMAND: Any = typer.main.get_command(app)


def verbs(command: Any = ROOT_COMMAND, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every verb."""
    for name, inner in command.commands.items():
        yield from verbs(inner, (*path, name)) if hasattr(inner, "commands") else [(*path, name)]


def help_of(words: tuple[str, ...]) -> str:
    # The harness's own --help is lm_eval's.
    if words == ("lm_eval",):
        return ROOT_COMMAND.commands["lm_eval"].get_help(typer.Context(ROOT_COMMAND.commands["lm_eval"]))
    return runner.invoke(app, [*words, "--help"], prog_name="limbeck").output


def parse(words: list[str]) -> None:
    """Parse a command line down to its verb, which is not called."""
    command, context = ROOT_COMMAND, None
    rest = words
    while hasattr(command, "commands"):
        name, *rest = rest
        command = command.commands[name]
    with command.make_context(name, rest, parent=context):
        pass


@pytest.mark.parametrize("words", list(verbs()), ids=" ".join)
def test_every_verb_shows_an_example_that_parses(words: tuple[str, ...]) -> None:
    lines = help_of(words).replace("\\\n", " ").splitlines()
    examples = [
        line.strip()
        for line in lines
        if re.search(rf"(^|\s)limbeck {' '.join(words)}( |$)", line) and "Usage" not in line and "`" not in line
    ]
    assert examples
    for line in examples:
        known = shlex.split(line.partition(" > ")[0].partition(" & ")[0].removesuffix(" &").replace("*/", "x"))
        parse(known[known.index("limbeck") + 1 :])


def test_the_root_says_where_to_start_and_shows_every_verb_once_and_whole() -> None:
    text = runner.invoke(app, ["--help"], prog_name="limbeck").output
    start = [line for line in text.splitlines() if line.startswith("  limbeck ")]
    assert len(start) == 5 and "limbeck quickstart" in start[0] and "limbeck run" in start[-1]
    assert sorted(name for names in SECTIONS.values() for name in names) == sorted(ROOT_COMMAND.commands)
    assert "..." not in text.partition("COMMAND [ARGS]...")[2] and max(map(len, text.splitlines())) <= 82


@pytest.mark.parametrize("words", [w for w in verbs() if w != ("lm_eval",)], ids=" ".join)
def test_usage_and_options_are_in_the_usual_words(words: tuple[str, ...]) -> None:
    text = help_of(words)
    usage = text.partition("\n\n")[0]
    assert not re.search(r"[{}<>]", usage) and "......" not in usage
    assert not re.search(r"<(str|int|float|list|path|bool)", text)
    # The first sentence is what the root's help shows.
    assert len(text.splitlines()[2].strip()) <= 66


def test_the_usage_line_of_run() -> None:
    assert help_of(("run",)).startswith("Usage: limbeck run [OPTIONS] RECIPE [KEY=VALUE]...\n")


# -- completion --------------------------------------------------------------------------------------------------------------

COMPLETE = """
import contextlib, io, json, os, sys
from limbeck.cli.app import app
os.environ["_LIMBECK_COMPLETE"] = "complete_bash"
found = []
for words in json.loads(sys.argv[1]):
    os.environ["COMP_WORDS"], os.environ["COMP_CWORD"] = "\\n".join(["limbeck", *words]), str(len(words))
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        app(prog_name="limbeck")
    found.append(out.getvalue().split())
heavy = {"torch", "transformers", "tokenizers", "numpy", "datasets", "safetensors"} & set(sys.modules)
print(json.dumps([found, sorted(heavy), "limbeck.config.recipe" in sys.modules]))
"""


def completed(*lines: list[str]) -> tuple[list[list[str]], list[str], bool]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COMP_")}
    done = subprocess.run(
        [sys.executable, "-c", COMPLETE, json.dumps(lines)], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found, heavy, schema = json.loads(done.stdout)
    return found, heavy, schema


def test_completion_of_words_loads_neither_torch_nor_the_schema() -> None:
    (verbs, options, recipes, nested), heavy, schema = completed(["re"], ["run", "--st"], ["run", "hybrid_s"], ["adapters", ""])
    assert (
        verbs == ["report"]
        and options == ["--stage"]
        and recipes == ["hybrid_select"]
        and nested == ["show", "merge", "retrieve"]
    )
    assert not heavy and not schema


def test_completion_of_a_recipes_words_loads_no_torch() -> None:
    found, heavy, _ = completed(
        ["run", "hybrid", "dis"], ["run", "hybrid", "distil.loop.bat"], ["run", "hybrid", "distil.loop.precision="],
        ["run", "hybrid", "distil.loop.precision", "=", "b"], ["run", "hybrid", "align.student.surgery.0.mixer.k"], ["run", "hybrid", "--stage", "d"],
        ["run", "nothing.yaml", "dis"], ["plan", "hybrid", "--device", "h1"], ["ls", "m"], ["explain", "teacher.h"], ["explain", "swa"],
    )  # fmt: skip
    stage, setting, values, behind, mixer, stages, broken, device, kind, part, name = found
    assert {"distil.loop.", "distil.kind=", "distil.student."} <= set(stage) and all(word.startswith("distil.") for word in stage)
    assert setting == ["distil.loop.batch_tokens=", "distil.loop.batch_tokens=8192"]
    assert "distil.loop.precision=bfloat16" in values and behind == ["bfloat16"]
    assert {"align.student.surgery.0.mixer.kind=", "align.student.surgery.0.mixer.keep_qk_norm="} <= set(mixer)
    assert stages == ["distil"] and broken == [] and device == ["h100"] and kind == ["mixers"]
    assert part == ["teacher.http"] and name == ["swa"]
    assert not heavy


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_a_line_about_each_word(shell: str) -> None:
    environment = {"_TYPER_COMPLETE_ARGS": "limbeck run hybrid distil.teacher.", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    done = runner.invoke(app, [], prog_name="limbeck", env={"_LIMBECK_COMPLETE": f"complete_{shell}", **environment})
    (line,) = [line for line in done.output.splitlines() if "distil.teacher.model=" in line]
    assert "hub name" in line and not set("'`[]") & set(line.partition("distil")[2].partition("\t")[2] or line.split('":"')[-1])


def test_bash_offers_what_completion_finds(tmp_path: Path) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    program = tmp_path / "limbeck"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c "from limbeck.cli.app import main; main()" "$@"\n')
    program.chmod(0o755)
    script = 'eval "$(_LIMBECK_COMPLETE=source_bash limbeck)"; COMP_WORDS=(limbeck ls re); COMP_CWORD=2; _limbeck_completion limbeck; echo "${COMPREPLY[@]}"'
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([bash, "--norc", "-c", script], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.split() == ["recipes"], done.stderr


# -- mistakes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rnu", "hybrid"], "Did you mean 'run'"),
        (["adapters", "shwo", "x"], "Did you mean 'show'"),
        (["run", "hybrid", "--stge", "x"], "Possible options: --stage"),
        (["run", "hybrid", "--candidate", "x"], "'--candidate': must be a whole number"),
        (["plan", "hybrid", "--gpus", "0"], "'--gpus': must be at least 1"),
        (["plan", "hybrid", "--usable", "2"], "'--usable': must be at most 1"),
        (["teach", "x", "--dtype", "fp8"], "'--dtype': 'fp8' is not one of"),
        (["run", "hybrd"], "hybrd: no such file, and no shipped recipe of that name, did you mean 'hybrid'?"),
        (["run", "folder"], "folder: is a folder: name a recipe's file in it: one.yaml"),
        (["check", "list.yaml"], "is a list: a recipe is a mapping with `name` and `stages`"),
        (["prepare", "quickstart", "--run-dir", "file"], "file: no run directory can be made there"),
        (["plan", "hybrid", "--config", "x"], "'x' is not NAME=FILE"),
        (["plan", "hybrid", "--config", "x=y"], "--config: y: no such file"),
        (["report", "file"], "file: not a run directory"),
        (
            ["export", "builtin:code-2m", "--output", "x.gguf", "--type", "tq9"],
            '--type: must be auto, tq2_0, tq1_0, q2_0, f32 or bf16; found "tq9"',
        ),
        (["doctor", "--teacher", "http://127.0.0.1:9", "--protocol", "grpc"], "protocol: must be limbeck, vllm, sglang or seed"),
    ],
)
def test_a_mistake_is_named_with_the_way_out(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "one.yaml").touch()
    (tmp_path / "file").touch()
    (tmp_path / "list.yaml").write_text("- a\n")
    result = runner.invoke(app, words)
    assert result.exit_code == 2 and message in result.stderr and isinstance(result.exception, SystemExit)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_what_the_system_refuses_is_no_bug_of_ours(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: str) -> str:
        raise OSError(number, os.strerror(number), "/somewhere/file")

    monkeypatch.setattr("limbeck.config.explain.explain", refuse)
    result = runner.invoke(app, ["explain", "swa"])
    assert result.exit_code == 2 and result.stderr.startswith(f"limbeck: /somewhere/file: {os.strerror(number)}: ")


def test_other_errors_of_the_system_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(_: str) -> str:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "ours")

    monkeypatch.setattr("limbeck.config.explain.explain", bug)
    assert isinstance(runner.invoke(app, ["explain", "swa"]).exception, FileNotFoundError)


# -- docs/cli.md -------------------------------------------------------------------------------------------------------------


def test_the_page_names_every_environment_variable() -> None:
    page = Page("cli.md").text
    table = page[page.index("## Environment variables") :]
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "src" / "limbeck").rglob("*.py"))
    ours = set(re.findall(r"\bLIMBECK_[A-Z_]+\b", source))
    flags = {
        name
        for command in ROOT_COMMAND.commands.values()
        for param in command.params
        for name in [param.envvar or ()]
        if isinstance(name, str)
    }
    named = set(re.findall(r"`([A-Z][A-Z_]+)`", table))
    assert ours and flags and ours | flags <= named
    assert {name for name in named if name.startswith("LIMBECK_")} == ours


def test_commands_of_the_page_parse() -> None:
    lines = [line for line in Page("cli.md").commands("bash") if not line[0].startswith("--")]
    assert lines
    for words in lines:
        parse(words)


def test_exit_codes_of_the_page_are_those_of_the_code() -> None:
    from limbeck.cli import manners, plan

    codes = [int(code) for code in re.findall(r"^\| (\d+) \|", Page("cli.md").text, re.MULTILINE)]
    assert codes == [0, plan.DOES_NOT_FIT, manners.USER_ERROR, manners.INTERRUPTED]
