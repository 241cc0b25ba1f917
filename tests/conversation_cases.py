"""Made-up agents' conversations, three chat templates, and what each writes for an assistant's turn, said without Jinja."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from limbeck.config.parts.stages import TrainTokenizer
from limbeck.data.tokenizer import train_tokenizer
from trajectory_cases import call

START, END = "<|im_start|>", "<|im_end|>"
SPECIAL = ("<|endoftext|>", START, END)

CHATML = (
    "{% if tools %}{{ '<|im_start|>system\\nTools: ' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '\\n<tool_call>\\n' + (c.function | tojson) + '\\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""Every turn alike."""
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + ('user' if m.role == 'tool' else m.role) + '\\n' }}"
    "{% if m.role == 'assistant' and (loop.last or m.reasoning_content) %}{{ '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ '<call>' + (c.function | tojson) }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)
"""The last turn thinks aloud though it has nothing to say; a fresh answer is begun for the model."""
TRIMMED = (
    "{{ '<|endoftext|>' }}{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_end|>\\n\\n' + (m.content | trim) }}"
    "{% for c in m.tool_calls or [] %}{{ '[' + c.function.name + (c.function.arguments | tojson) + ']' }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_end|>\\n\\n' }}{% endif %}"
)
"""No white space between turns, and none around what they say."""


def _json(tree: Any) -> str:
    return json.dumps(tree, ensure_ascii=False)


def _chatml(turn: dict[str, Any], last: bool) -> str:
    return turn["content"] + "".join(f"\n<tool_call>\n{_json(c['function'])}\n</tool_call>" for c in turn.get("tool_calls", ())) + END


def _thinking(turn: dict[str, Any], last: bool) -> str:
    thought = turn.get("reasoning_content", "")
    opening = f"<think>\n{thought}\n</think>\n\n" if last or thought else ""
    return opening + turn["content"] + "".join(f"<call>{_json(c['function'])}" for c in turn.get("tool_calls", ())) + END


def _trimmed(turn: dict[str, Any], last: bool) -> str:
    calls = (c["function"] for c in turn.get("tool_calls", ()))
    return turn["content"].strip() + "".join(f"[{c['name']}{_json(c['arguments'])}]" for c in calls) + END


TEMPLATES: dict[str, tuple[str, Callable[[dict[str, Any], bool], str]]] = {
    "chatml": (CHATML, _chatml),
    "thinking": (THINKING, _thinking),
    "trimmed": (TRIMMED, _trimmed),
}
"""By name: the template, and what it writes for an assistant's turn behind its header."""

WORDS = (
    "", "Look.", " Look", "Look.\n", "\n\nLook", "  \n\t", "done\r\nline\r\n", "😀👩‍💻 é", "e\u0301", "a\u2028b", "<tool_call>", "</think>", "assistant\n",
    "user\nNo.",
    "```python\ndef purr():\n    return 1\n```", "\u00a0x\u00a0", "..." * 9,
)  # fmt: skip


def spoken(name: str, messages: list[dict[str, Any]]) -> list[str]:
    """What the assistant says in a template, turn by turn."""
    said = TEMPLATES[name][1]
    return [said(turn, number == len(messages) - 1) for number, turn in enumerate(messages) if turn["role"] == "assistant"]


def turn(content: str, *calls: dict[str, Any], **more: Any) -> dict[str, Any]:
    """An assistant's turn."""
    return {"role": "assistant", "content": content, **({"tool_calls": list(calls)} if calls else {}), **more}


def tool_call(name: str = "view", **arguments: Any) -> dict[str, Any]:
    """A call as a checked conversation has it."""
    return call(name, None, arguments)


def conversation(seed: int) -> list[dict[str, Any]]:
    """A random one: any words in any role, answers quoted, turns that follow each other, thoughts, several calls."""
    rng = random.Random(seed)
    messages = [{"role": "system", "content": rng.choice(WORDS)}] * rng.randint(0, 1)
    messages.append({"role": "user", "content": f"Issue {seed}. {rng.choice(WORDS)}"})
    for _ in range(rng.randint(1, 7)):
        quoted = rng.choice(messages)["content"]
        calls = [tool_call(rng.choice(("view", "run")), text=rng.choice(WORDS), count=rng.randint(0, 9)) for _ in range(rng.choice((0, 0, 1, 2)))]
        thought = {"reasoning_content": rng.choice(WORDS[1:4])} if rng.random() < 0.3 else {}
        messages.append(turn(rng.choice((*WORDS, quoted, f"{quoted}\n{quoted}")), *calls, **thought))
        messages += [{"role": "tool", "content": rng.choice((*WORDS, messages[-1]["content"]))} for _ in calls]
        if rng.random() < 0.3:
            messages.append({"role": "user", "content": rng.choice(WORDS)})
    return messages


def tokenizer_folder(folder: Path, vocabulary: int = 500) -> Path:
    """A byte-level tokenizer with the special tokens of the templates, trained on such conversations."""
    texts = [message["content"] for seed in range(40) for message in conversation(seed)]
    train_tokenizer(texts, TrainTokenizer(vocabulary=vocabulary, special=SPECIAL), folder)
    return folder


def numbered_row(number: int, *, repo: str = "octo/cat", steps: int = 2, issue: str | None = None, answer: int = 12, **changes: Any) -> dict[str, Any]:
    """A sound record of a run with ``steps`` calls, each answered in ``answer`` words."""
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "You are an agent."},
        {"role": "user", "content": issue if issue is not None else f"Cat {number} of {repo} does not purr, it says {number * 37}."},
    ]
    for step in range(steps):
        messages.append(turn(f"Step {step}.", call("view", f"c{step}", json.dumps({"path": f"cat_{number}_{step}.py", "line": step}))))
        messages.append({"role": "tool", "content": f"line {step} " + "purr " * answer, "name": "view", "tool_call_id": f"c{step}"})
    messages.append(turn("Done.", call("finish", "end", "{}")))
    return {
        "instance_id": f"{repo.replace('/', '__')}-{number}", "repo": repo, "trajectory": messages,
        "tools": [{"type": "function", "function": {"name": "view"}}], "resolved": 1, "exit_status": "submit", "model_patch": "diff",
    } | changes  # fmt: skip


def write_runs(path: Path, records: list[dict[str, Any]]) -> Path:
    """Records as JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
