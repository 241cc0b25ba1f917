"""Every command of the README, the pages and ``--help`` is run here, or by a test that is named; what needs more than this machine is parsed."""

from __future__ import annotations

import argparse
import glob
import io
import json
import re
import runpy
import shlex
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import httpx2
import pytest
import torch
import typer
import yaml
from typer.testing import CliRunner

from documented import ROOT, Command, Rule, documented, treatment
from limbeck.cli.app import app
from limbeck.config.load import SHIPPED, load_recipe
from limbeck.config.parts.stages import EvaluateStageOptions
from limbeck.serve.process import Served

VERBS: click.Group = typer.main.get_command(app)  # type: ignore[assignment]
TEXT = "{kind: stdlib, limit: 12, filters: {max_characters: 3000}}"
LOOP = ("tokens=128", "batch_tokens=128", "stop_unless=null", "canary=false", "checkpoint_every=1")
RECALL = "{vocabulary: 512, tasks: [repeat], distances: [8], rows: 1}"
JUDGE = (
    "evaluate.rows=1",
    f"evaluate.recall={RECALL}",
    "evaluate.speed={contexts: [32], tokens: 1}",
    "evaluate.samples={tokens: 2}",
)
HYBRID = (
    *(f"{stage}.data.{words}" for stage in ("align", "extend") for words in (f"source=[{TEXT}]", "sequence=64", "held_out=0.2")),
    *(f"{stage}.loop.{words}" for stage in ("align", "distil", "extend") for words in LOOP), "evaluate.against=[teacher]", *JUDGE,
)  # fmt: skip
CAPTURED = (f"capture.data.source=[{TEXT}]", "capture.data.sequence=64", "capture.data.held_out=0.2")
ALONE = (f"distil.data.source=[{TEXT}]", "distil.data.sequence=64", "distil.data.held_out=0.2")
LOGIT = (*(f"distil.loop.{words}" for words in (*LOOP, "validate_every=null")), *JUDGE)
SMALL = {
    "hybrid": HYBRID,
    "quickstart": tuple(word for word in HYBRID if not word.startswith("extend.")),
    "hybrid_select": (*HYBRID, "select.rows=1", "select.method=restore_one", "select.compare=[]", f"select.recall={RECALL}"),
    "logit_kd": (*ALONE, *LOGIT),
    "logit_kd_served": (*ALONE, *LOGIT, "distil.teacher.url=http://127.0.0.1:8100"),
    "logit_kd_stored": (*CAPTURED, *LOGIT),
    "lora_generator": (
        "conditions.sources=[{name: stdlib, source: {kind: stdlib, limit: 60}, cut: 400, slices: {by: topic, count: 2}}]",
        "conditions.formats=[plain, upper]", "conditions.held_out={slices: 1}", "conditions.mixes=1", "conditions.examples=8", "conditions.min_examples=4",
        "conditions.test_examples=4", "conditions.sequence=32", "conditions.condition={form: prompt_answer, texts: 1, tokens: 8}",
        "pool.loop={steps: 1, rows: 1, together: 8}", "generate.loop={steps: 1, batch_tokens: 64}", "static.loop={steps: 1, batch_tokens: 64}",
        "generate.student.surgery.0.width=16", "evaluate.rows=1", "evaluate.probes={kind: generic}", "export.conditions=[\"stdlib/*/plain\"]",
    ),
}  # fmt: skip
"""What makes a shipped recipe one of seconds; a recipe of a page's own is taken to be a hybrid."""
TERNARY = (
    "--total-steps", "1", "--batch-size", "1", "--micro-batches", "1", "--seq-len", "64", "base.loop.tokens=64", "base.loop.batch_tokens=64",
    "base.loop.validate_every=null", "base.loop.stop_unless=null", "distil.loop.validate_every=null", "base.data.held_out=0.2", "distil.data.held_out=0.2",
    f"base.data.source=[{TEXT}]", f"distil.data.source=[{TEXT}]", "base.student.config.num_experts=4",
)  # fmt: skip
TASK = {"tasks/next_word.yaml": "yaml", "tasks/next_word.jsonl": "json"}
NAMES = {"runs/NAME/STAGE": "runs/ternary/distil", "http://HOST:": "http://127.0.0.1:", "distil@200": "distil@1"}
"""What stands for a name of the reader's."""


class _ShortEvaluation:
    """What ``limbeck evaluate`` measures by default, on as little as there can be: no word of the verb says that."""

    @staticmethod
    def model_validate(words: dict[str, Any]) -> EvaluateStageOptions:
        recall = {**words["recall"], "tasks": ["repeat"], "distances": [8], "rows": 1}
        return EvaluateStageOptions.model_validate(
            {**words, "rows": 1, "recall": recall, "speed": {"contexts": [32], "tokens": 1}, "samples": {"tokens": 2}}
        )


class _Understood(Exception):
    """A script has parsed its words."""


class Sandbox:
    """One folder with small runs under the names that the pages use, in which every command is run by this process."""

    def __init__(self, home: Path):
        self.home = home
        self.servers: dict[str, Served] = {}
        """By the port at which the pages expect them."""
        self.port = "8100"
        """Where the next one is expected."""

    def prepare(self) -> None:
        """The runs that commands of several pages take."""
        shutil.copytree(ROOT / "experiments", self.home / "experiments", ignore=shutil.ignore_patterns("*.svg", "__pycache__"))
        (self.home / "config.json").write_text((ROOT / "src/limbeck/builtin/code-2m/config.json").read_text())
        self.task_files()
        self.limbeck("teach builtin:code-2m --port 0")
        for recipe in ("hybrid", "hybrid_select", "lora_generator"):
            self.limbeck(f"run {recipe}", *SMALL[recipe])
        self.limbeck("distill-ternary --teacher-endpoint http://127.0.0.1:8100", *TERNARY)
        runs = self.home / "runs"
        for name in ("a", "b", "NAME", "faster"):
            shutil.copytree(runs / "hybrid", runs / name)
        (runs / "ternary").symlink_to(self.home / "checkpoints" / "qwen3-hybrid")
        recipe = yaml.safe_load((SHIPPED / "logit_kd.yaml").read_text())
        del recipe["stages"]["evaluate"]
        (self.home / "alone.yaml").write_text(json.dumps(recipe))
        changes = [word for word in SMALL["logit_kd"] if word.startswith("distil.")]
        self.limbeck("run alone.yaml --run-dir runs/A", *changes, "distil.grid={optim.groups.0.lr: [0.001, 0.003]}")
        self.limbeck("run alone.yaml --run-dir runs/B", *changes)
        adapters = sorted((runs / "lora_generator/export/export/peft").glob("*/"))
        for number, name in enumerate(("A", "B", "C", "maths", "code", "prose", "new")):
            shutil.copytree(adapters[number % len(adapters)], self.home / name)

    def task_files(self) -> None:
        """The task of docs/evaluate.md, and the same as somebody's own."""
        page = (ROOT / "docs" / "evaluate.md").read_text(encoding="utf-8")
        (self.home / "tasks").mkdir()
        (self.home / "mytasks").mkdir()
        for name, language in TASK.items():
            (block,) = re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)
            (self.home / name).write_text(block)
        (self.home / "mytasks/foo.yaml").write_text((self.home / "tasks/next_word.yaml").read_text())

    def begin(self) -> None:
        """What a reader of any page has: the recipe of ``limbeck init hybrid``."""
        (self.home / "my.yaml").write_text(CliRunner().invoke(app, ["init", "hybrid"]).output)

    def serve(self, served: Served) -> None:
        """Take connections in a thread, until another is served at the same port."""
        if self.port in self.servers:
            self.servers.pop(self.port).__exit__()
        self.servers[self.port] = served.__enter__()

    def end(self) -> None:
        """Serve no more."""
        for served in self.servers.values():
            served.__exit__()

    # -- the treatments --------------------------------------------------------------------------------------------------------

    def perform(self, command: Command, rule: Rule) -> None:
        """Do with a command what its rule says; anything but success is an error."""
        words = shlex.split(self.local(command.text).removesuffix("&"))
        while re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
        if words[0] == "python" and words[1:3] == ["-m", "limbeck"]:
            words = words[2:]
        if rule.how == "parsed only":
            self.parse(words)
        elif words[0] == "curl":
            self.curl(words[1:])
        elif words[0] == "python":
            self.python(words[1:])
        else:
            assert words[0] == "limbeck", "only limbeck, python and curl are run here"
            self.port = "another" if "--port 0" in command.text else "8000" if words[1] == "serve" else "8100"
            self.limbeck(shlex.join(words[1:]), *(self.smaller(words[1:]) if rule.how == "made small" else ()))
            if words[1] == "serve":
                self.curl([f"{self.servers[self.port].url}/v1/completions", "-d", '{"prompt": "def f(", "max_tokens": 2}'])

    def smaller(self, words: list[str]) -> tuple[str, ...]:
        """Words behind a command's own that make it one of seconds."""
        if words[0] in ("serve", "teach"):
            # A base model has no template of its own, and examples chat with whatever is served.
            plain = words[0] == "serve" and "--chat-template" not in words
            return "--port", "0", *(("--chat-template", "plain") if plain else ())
        if words[0] == "distill-ternary":
            return TERNARY
        if words[0] in ("run", "prepare"):
            # With changes of its own it is another run; the one that other commands take stays as it is.
            changed = any("=" in word for word in words[2:]) and "--run-dir" not in words
            return *SMALL.get(words[1], HYBRID), *(("--run-dir", "runs/changed") if changed else ())
        return ()

    def limbeck(self, line: str, *more: str) -> str:
        """``limbeck LINE`` in this process; returns what it printed.  ``> FILE`` and patterns are the shell's."""
        words = [*shlex.split(self.local(line)), *(self.local(word) for word in more)]
        words = [found for word in words for found in (sorted(glob.glob(word)) if re.search(r"/\*/?$", word) else [word])]
        file = words.pop() if ">" in words and words[-2] == ">" else None
        if file is not None:
            words.remove(">")
        done = CliRunner().invoke(app, words, prog_name="limbeck")
        # A plan that does not fit has been made.
        if done.exit_code not in ((0, 1) if words[0] == "plan" else (0,)):
            raise AssertionError(f"exit code {done.exit_code}: {done.output[-1500:]}{_where(done.exception)}")
        if file is not None:
            Path(file).write_text(done.stdout)
        return done.output

    def python(self, words: list[str]) -> None:
        """A script, in this process."""
        with _called(words), redirect_stdout(io.StringIO()):
            runpy.run_path(words[0], run_name="__main__")

    def curl(self, words: list[str]) -> None:
        """The request that curl would send."""
        headers, data, url = {}, None, ""
        rest = iter(words)
        for word in rest:
            if word == "-H":
                name, _, value = next(rest).partition(": ")
                headers[name] = value
            elif word == "-d":
                data = next(rest)
            else:
                assert not word.startswith("-") or word == "-s", f"curl {word}: teach this test what it does"
                url = url if word == "-s" else word
        with httpx2.Client(trust_env=False, timeout=120) as client:
            reply = client.post(url, content=data.encode(), headers=headers) if data else client.get(url, headers=headers)
        assert reply.status_code == 200 and reply.json(), (reply.status_code, reply.text)

    def parse(self, words: list[str]) -> None:
        """Whether a program would understand its words."""
        if words[0] == "torchrun":
            from torch.distributed.run import get_args_parser

            found = get_args_parser().parse_args(words[1:])
            assert found.module and found.training_script == "limbeck", words
            words = ["limbeck", *found.training_script_args]
        if words[0] == "limbeck" and not words[1].startswith("--"):
            verb = VERBS.commands[words[1]]
            context = verb.make_context(words[1], list(words[2:]))
            assert words[1] == "lm_eval" or not context.args, context.args
            if words[1] in ("run", "prepare"):
                recipe = load_recipe(context.params["recipe"], context.params["overrides"] or ())
                assert context.params.get("stage") in (None, *recipe.stages)
                self.limbeck(shlex.join(["plan", words[2], "--brief", *(context.params["overrides"] or ())]))
            elif named := re.match(r"runs/(agentic-lora)/(\w+)", words[2] if len(words) > 2 else ""):
                assert named[2] in load_recipe("agentic_lora").stages
        elif words[0] == "python":
            with _called(words[2:] if words[1] == "-m" else words[1:]), _only_parsing(), suppress(_Understood):
                if words[1] == "-m":
                    runpy.run_module(words[2], run_name="__main__")
                else:
                    runpy.run_path(words[1], run_name="__main__")
                raise AssertionError("takes no words")
        elif words[0] == "make":
            targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert set(words[1:]) <= set(targets), targets
        elif words[0] == "pip":
            extras = re.findall(r"^([a-z-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
            named_extras = [
                extra for word in words for group in re.findall(r"(?:limbeck|\.)\[([^]]*)\]", word) for extra in group.split(",")
            ]
            assert set(named_extras) <= set(extras), extras

    def local(self, text: str) -> str:
        """With names of the sandbox's own in place of the reader's, and the addresses at which this process serves."""
        for name, here in NAMES.items():
            text = text.replace(name, here)
        for port, served in self.servers.items():
            text = re.sub(rf"http://(localhost|127\.0\.0\.1):{port}\b", served.url, text)
        return text


def _where(error: BaseException | None) -> str:
    """The end of the traceback of an error that is no message for people."""
    return "" if error is None or isinstance(error, SystemExit) else "".join(traceback.format_exception(error)[-4:])


@contextmanager
def _called(words: list[str]) -> Iterator[None]:
    """``sys.argv`` and the import path as a script finds them."""
    before = sys.argv, list(sys.path)
    sys.argv = list(words)
    try:
        yield
    finally:
        sys.argv, sys.path[:] = before


@contextmanager
def _only_parsing() -> Iterator[None]:
    """Scripts stop when they have understood their words."""
    parse = argparse.ArgumentParser.parse_args

    def parse_only(self: argparse.ArgumentParser, *args: object, **options: object) -> None:
        parse(self, *args, **options)  # type: ignore[call-overload]
        raise _Understood

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
        yield


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    monkeypatch.chdir(tmp_path)
    made = Sandbox(tmp_path)

    def forever(served: Served, announce: object = None) -> bool:
        """Serve in a thread, and let the next commands ask."""
        made.serve(served)
        return True

    monkeypatch.setattr(Served, "forever", forever)
    monkeypatch.setattr("limbeck.stages.evaluate.EvaluateStageOptions", _ShortEvaluation)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    if find_spec("datasets") is not None:
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    yield made
    made.end()


def test_every_command_is_treated_and_a_test_that_is_named_knows_it() -> None:
    for command in documented():
        rule = treatment(command)
        assert rule is not None, (
            f"{command.place}: `{command.text}` is documented, and no rule of tests/documented.py is about it. Let it be run (`as written`, or `made "
            "small` with words in test_documented_commands.py); where that cannot be, write a comment `# needs …` behind it, or name the test that runs it."
        )
        assert (rule.how == "covered") == bool(rule.test), rule
        assert not rule.test or rule.known(command), (
            f"{command.place}: {rule.test} does not speak of `{command.text}`, and is said to run it"
        )


def test_commands_are_found_in_every_form_of_a_page() -> None:
    from documented import of_markdown

    page = (
        "```bash\nlimbeck run a.yaml \\\n  --fresh   # anew\n# no command\n```\n\n    python x.py --say 'a # b'\n\n"
        "```console\n$ make\nprinted\n```\n```python\nmake\n```\n"
    )
    found = [(c.line, c.text, c.note) for c in of_markdown("page.md", page)]
    assert found == [(2, "limbeck run a.yaml --fresh", "anew"), (7, "python x.py --say 'a # b'", ""), (10, "make", "")]


def test_a_command_without_a_rule_is_told() -> None:
    assert treatment(Command("README.md", 1, "limbeck conjure gold")) is None
    assert treatment(Command("README.md", 1, "rm -r runs")) is None


def test_every_documented_command_runs(sandbox: Sandbox) -> None:
    threads = torch.get_num_threads()
    sandbox.prepare()
    failures, page, counts = [], "", Counter[str]()
    for command in documented():
        rule = treatment(command)
        if rule is None or rule.how == "covered":
            counts["covered"] += 1
            continue
        if command.page != page:
            page = command.page
            sandbox.begin()
        if "--tasks" in command.text and find_spec("lm_eval") is None:
            rule = Rule("", "parsed only", "needs lm-evaluation-harness")
        counts[rule.how] += 1
        try:
            sandbox.perform(command, rule)
        except (Exception, SystemExit) as error:
            failures.append(f"{command.place}: {command.text}\n    {rule.how}: {type(error).__name__}: {error}")
    torch.set_num_threads(threads)
    assert not failures, "\n".join(failures)
    assert counts["as written"] + counts["made small"] > 2 * counts["parsed only"], counts
