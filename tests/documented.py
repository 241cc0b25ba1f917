"""Every command that the project documents, and how a test treats it: run as written, made small, only parsed, or run by another test.

Commands come from the pages of Markdown, from the heads of what lies in ``examples/``, and from the examples of ``--help``.  The first
of :data:`RULES` that fits a command says what happens to it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import click
import typer

from limbeck.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("limbeck", "make", "python", "torchrun", "curl", "pip", "sbatch", "bash", "lm_eval", "git")
_CALL = re.compile(rf"(?:[A-Z_]+=\S* )*(?:(?:{'|'.join(PROGRAMS)}) |\./\S+)")
_FENCE = re.compile(r"\s*```(?P<language>\S*)")
Treatment = Literal["as written", "made small", "parsed only", "covered"]


@dataclass(frozen=True)
class Command:
    """One command: where it stands, what it says, and the comment behind it."""

    page: str
    """A file by its path from the repository, or ``limbeck VERB --help``."""
    line: int
    text: str
    note: str = ""

    @property
    def place(self) -> str:
        """For messages."""
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Rule:
    """What happens to commands whose place and text fit."""

    text: str
    """A regular expression that is searched for in the command and its comment; ``named`` in it must stand in ``test``."""
    how: Treatment
    why: str = ""
    """Of what is not run here."""
    test: str = ""
    """The file that runs it, where another one does."""
    page: str = ""
    """Only in these: a regular expression."""

    def fits(self, command: Command) -> re.Match[str] | None:
        """What it finds in a command that it is about."""
        told = f"{command.text}  # {command.note}" if command.note else command.text
        return re.search(self.text, told) if re.search(self.page, command.page) else None

    def known(self, command: Command) -> bool:
        """Whether the test that it names is there and speaks of the command, or of its page."""
        found = self.fits(command)
        word = (found and found.groupdict().get("named")) or self.page.replace("\\", "").rstrip("/").rpartition("/")[2]
        path = ROOT / self.test
        return path.is_file() and any(
            form in path.read_text(encoding="utf-8") for form in (word, word.replace(".", "/"), word.replace("-", "_"))
        )


TESTS = "tests/integration"
RULES = [
    Rule("", "covered", "pages that are read from the first to the last", f"{TESTS}/test_behaviour_docs.py", page="docs/behaviour/"),
    Rule("^git clone", "parsed only", "needs the network"),
    Rule(r"^(cd|source|export|\.) ", "parsed only", "a word for the shell"),
    Rule("^make (test|setup|lint|unit|docs|clean)|^make$", "parsed only", "is what runs this test, or takes its tools"),
    Rule("", "covered", "a page that is one story", f"{TESTS}/test_transcript.py", page=r"docs/first-hour\.md"),
    Rule("^(make|limbeck) (?P<named>quickstart)", "covered", "", f"{TESTS}/test_quickstart.py"),
    Rule("^pip install|^python -m pip install", "parsed only", "needs an index of packages"),
    Rule("^(CUDA_VISIBLE_DEVICES= )?torchrun", "parsed only", "several ranks, which tests/integration/test_two_ranks_recipes.py starts"),
    Rule(r"^(sbatch|bash) (?P<named>job\.sbatch)", "covered", "", f"{TESTS}/test_slurm_script.py"),
    Rule(r"^(sbatch|bash) .*(?P<named>agentic\.slurm|agentic_teacher\.sh)", "covered", "", "tests/unit/test_agentic_recipe.py"),
    Rule(r"(?P<named>train_qwen3_distill\.sh|distill_qwen3\.py)", "covered", "", f"{TESTS}/test_distill_ternary.py"),
    Rule("-m pytest -p (?P<named>retention)", "covered", "", f"{TESTS}/test_pages.py"),
    Rule(r"^python (-m )?(?P<named>(experiments|benchmarks)[/.]\w+)\S* .*--quick", "covered", "", f"{TESTS}/test_evidence.py"),
    Rule(r"^python experiments/\S+/plot\.py", "as written"),
    Rule(r"^python (-m )?(experiments|benchmarks)[/.]", "parsed only", "takes minutes to hours; its quick form is run by test_evidence.py"),
    Rule("--(?P<named>from-distillkit)", "covered", "", "tests/unit/test_store_distillkit.py"),
    Rule("--(?P<named>from-seed)", "covered", "", "tests/unit/test_from_seed.py"),
    Rule("--protocol (?P<named>vllm)", "covered", "", f"{TESTS}/test_http_teacher.py"),
    Rule("limbeck run (?P<named>agentic_lora_tiny)", "covered", "", "tests/unit/test_agentic_recipe.py"),
    Rule("# needs ", "parsed only", "needs what the page says"),
    Rule("arc_easy|hellaswag|mmlu", "parsed only", "needs data of the hub"),
    Rule(r"limbeck (serve|teach|signals|evaluate|run|prepare|doctor) .*(Qwen|meta-llama|gpt2)", "parsed only", "needs weights of the hub"),
    Rule(r"limbeck (run|prepare|generate|export) \S*agentic[-_]lora", "parsed only", "needs 600 GB of GPU memory and the hub"),
    Rule(r"limbeck (run|prepare) \S*_(qwen|llama)", "parsed only", "needs weights of the hub"),
    Rule("^limbeck --(install|show)-completion", "parsed only", "asks which shell it is in, and changes its files"),
    Rule("limbeck lm_eval ls tasks", "parsed only", "the harness reads ten thousand files for it"),
    Rule("^curl ", "as written"),
    Rule("limbeck evaluate (?!.*--tasks)", "made small"),
    Rule(r"limbeck (run|prepare|distill-ternary|serve|teach)\b", "made small"),
    Rule(r"limbeck (init|check|plan|report|compare|evaluate|lm_eval|generate|export|signals|ls|explain|schema|doctor|adapters)\b", "as written"),
]  # fmt: skip


def treatment(command: Command) -> Rule | None:
    """The first rule that is about a command."""
    return next((rule for rule in RULES if rule.fits(command) is not None), None)


def documented() -> list[Command]:
    """All of them, page by page."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    for folder in ("docs", "experiments", "benchmarks", "examples"):
        pages += sorted((ROOT / folder).rglob("*.md"))
    found = [command for page in pages for command in of_markdown(str(page.relative_to(ROOT)), page.read_text(encoding="utf-8"))]
    for path in sorted((ROOT / "examples").iterdir()):
        found += of_example(path)
    return found + list(of_help())


def of_markdown(page: str, text: str) -> Iterator[Command]:
    """What stands in blocks: every line of bash and sh, lines with a prompt, and elsewhere lines that begin with a known program."""
    language: str | None = None
    for first, line in _joined(text):
        if fence := _FENCE.match(line):
            language = fence["language"] if language is None else None
            continue
        indented = language is None and line.startswith("    ")
        if language is None and not indented:
            continue
        bare = line.strip()
        prompted = bare.startswith("$ ")
        bare = bare.removeprefix("$ ")
        shell = language in ("bash", "sh", "shell") and bool(bare) and not bare.startswith("#")
        known = language in ("", "text", None) and _CALL.match(bare) is not None
        if shell or known or (prompted and language in ("console", "", "text")):
            yield _command(page, first, bare)


def of_example(path: Path) -> Iterator[Command]:
    """What the head of a script says about calling it: its docstring, or its first comments."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        head = ast.get_docstring(ast.parse(text), clean=False) or ""
    elif path.suffix == ".sh":
        lines = text.splitlines()
        end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
        head = "\n".join(line.removeprefix("#!").removeprefix("#") for line in lines[:end])
    else:
        return
    for number, line in _joined(head):
        if _CALL.match(line.strip()):
            yield _command(str(path.relative_to(ROOT)), number, line.strip())


def of_help() -> Iterator[Command]:
    """Examples in what ``--help`` prints."""
    root = typer.main.get_command(app)

    def walk(command: click.Command, name: str) -> Iterator[Command]:
        for number, line in _joined(command.help or ""):
            if _CALL.match(line.strip()):
                # An overview explains behind the command, as a comment would.
                yield _command(f"{name} --help", number, re.sub(r"(?<=\S) {3,}(?=\w)", "  # ", line.strip()))
        for verb, below in getattr(command, "commands", {}).items():
            yield from walk(below, f"{name} {verb}")

    yield from walk(root, "limbeck")


def _joined(text: str) -> Iterator[tuple[int, str]]:
    """Lines with their numbers; one that ends in a backslash goes on in the next."""
    begun: tuple[int, str] | None = None
    for number, line in enumerate(text.splitlines(), 1):
        first, whole = (begun[0], f"{begun[1]} {line.strip()}") if begun else (number, line)
        begun = None
        if whole.endswith("\\"):
            begun = first, whole.removesuffix("\\").rstrip()
        else:
            yield first, whole


def _command(page: str, line: int, text: str) -> Command:
    """A line cut at the first `` #`` that stands in no quotes."""
    quote = ""
    for at, sign in enumerate(text):
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        elif sign == "#" and text[at - 1 : at].isspace():
            return Command(page, line, text[:at].strip(), text[at + 1 :].strip())
    return Command(page, line, text.strip())
