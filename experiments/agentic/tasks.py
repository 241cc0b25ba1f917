"""Real code tasks as agents' trajectories, in the columns of SWE-rebench-openhands.

An *instance* is one task: a function of Python's standard library to be written from its docstring, a problem of HumanEval, or an
instruction of CodeAlpaca.  Its *repository* is the library's package, a tenth of HumanEval, or what CodeAlpaca's instruction asks
for first (``create``, ``write a sql query`` ...), so that held-out repositories are other kinds of tasks.  The code is real; that an
agent looked, wrote and ran something is told around it.
"""

from __future__ import annotations

import ast
import gzip
import json
import sysconfig
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

CHARACTERS = (60, 700)
"""Shortest and longest code that is asked for."""
SYSTEM = "You are an agent that works in a repository with tools. Look first, then write, then finish."


def _tool(name: str, words: str, *parameters: str) -> dict[str, Any]:
    properties = {parameter: {"type": "string"} for parameter in parameters}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": words, "parameters": schema}}


TOOLS = [_tool("view", "Show a file.", "path"), _tool("write", "Write code into a file.", "path", "code"), _tool("finish", "End the work.")]


class Task(NamedTuple):
    """One instance."""

    repo: str
    number: int
    issue: str
    path: str
    seen: str
    """What is in the file."""
    code: str
    """What is to be written."""


def stdlib_tasks() -> Iterator[Task]:
    """Functions with a docstring, by package."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for package in sorted(path for path in root.iterdir() if path.is_dir() and (path / "__init__.py").exists()):
        if package.name in ("test", "tests", "site-packages", "idlelib", "lib2to3", "turtledemo", "ensurepip", "__pycache__"):
            continue
        number = 0
        for file in sorted(package.glob("*.py")):
            try:
                source = file.read_text(encoding="utf-8")
                tree = ast.parse(source)
            except (UnicodeError, SyntaxError):
                continue
            for node in ast.walk(tree):
                docstring = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
                if docstring is None or len(node.body) < 2:
                    continue
                lines = source.splitlines()
                code = textwrap.dedent("\n".join(lines[node.body[1].lineno - 1 : node.end_lineno]))
                head = f"def {node.name}({ast.unparse(node.args)}):"
                path = f"{package.name}/{file.name}"
                issue = f"`{node.name}` in {path} has no body.\n\n{docstring}"
                yield Task(f"stdlib/{package.name}", number, issue, path, head, code)
                number += 1


def humaneval_tasks(path: Path) -> Iterator[Task]:
    """Problems of HumanEval, sixteen a repository."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file):
            row = json.loads(line)
            prompt = row["prompt"]
            head = next(word for word in prompt.splitlines() if word.startswith(f"def {row['entry_point']}"))
            words = ast.get_docstring(ast.parse(prompt + "    pass\n").body[-1]) or prompt  # type: ignore[arg-type]
            name, code = row["entry_point"], textwrap.dedent(row["canonical_solution"]).strip("\n")
            yield Task(f"humaneval/part{number // 16}", number, f"`{name}` is missing.\n\n{words}", f"problems/{name}.py", head, code)


def alpaca_tasks(path: Path) -> Iterator[Task]:
    """Instructions of CodeAlpaca, by their first two words."""
    numbers: Counter[str] = Counter()
    for row in json.loads(path.read_text(encoding="utf-8")):
        first = "-".join(word.strip(".,:`'\"").lower() for word in row["prompt"].split()[:2])
        if first.replace("-", "").isalpha():
            yield Task(f"alpaca/{first}", numbers[first], row["prompt"], "answer.txt", "", row["response"])
            numbers[first] += 1


def trajectory(task: Task) -> dict[str, Any]:
    """The row of a task."""
    calls = iter(range(100))

    def call(name: str, words: str = "", **arguments: str) -> dict[str, Any]:
        function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
        return {"role": "assistant", "content": words, "tool_calls": [{"id": f"call_{next(calls)}", "type": "function", "function": function}]}

    def answer(turn: dict[str, Any], words: str) -> dict[str, Any]:
        own = turn["tool_calls"][0]
        return {"role": "tool", "content": words, "name": own["function"]["name"], "tool_call_id": own["id"]}

    look, write = call("view", path=task.path), call("write", path=task.path, code=task.code)
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": task.issue},
        look,
        answer(look, task.seen or "(empty)"),
        write,
        answer(write, f"{len(task.code.splitlines())} lines written."),
        call("finish"),
    ]
    owner, _, name = task.repo.partition("/")
    instance = f"{owner}__{name}-{task.number}"
    patch = "".join(f"+{line}\n" for line in task.code.splitlines())
    row = {"instance_id": instance, "repo": task.repo, "trajectory_id": f"{instance}-0", "tools": TOOLS, "model_patch": patch}
    return {**row, "trajectory": messages, "exit_status": "submit", "resolved": 1}


def write_tasks(path: Path, shared: Path | None, repositories: int, each: int, seed: int = 0) -> dict[str, int]:
    """Rows of ``repositories`` repositories (the largest of each kind by turns), ``each`` tasks of each, drawn by the seed.

    Without the shared data only the standard library's.  Returns how many tasks each has.
    """
    kinds = [stdlib_tasks()]
    if shared is not None:
        kinds += [humaneval_tasks(shared / "tasks" / "HumanEval.jsonl.gz"), alpaca_tasks(shared / "tasks" / "CodeAlpaca-20K.json")]
    groups: list[dict[str, list[Task]]] = []
    for tasks in kinds:
        found: dict[str, list[Task]] = defaultdict(list)
        for task in tasks:
            if CHARACTERS[0] <= len(task.code) <= CHARACTERS[1] and len(task.issue) <= 2 * CHARACTERS[1]:
                found[task.repo].append(task)
        groups.append({repo: own for repo, own in sorted(found.items(), key=lambda item: (-len(item[1]), item[0])) if len(own) >= 4})
    queues = [iter(group.items()) for group in groups]
    chosen: dict[str, list[Task]] = {}
    while len(chosen) < repositories and queues:
        for queue in list(queues):
            item = next(queue, None)
            if item is None:
                queues.remove(queue)
            elif len(chosen) < repositories:
                chosen[item[0]] = item[1]
    generator = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for own in chosen.values():
            for place in sorted(generator.choice(len(own), min(each, len(own)), replace=False).tolist()):
                file.write(json.dumps(trajectory(own[place]), ensure_ascii=False) + "\n")
    return {repo: min(each, len(own)) for repo, own in chosen.items()}
