"""Secrets struck out of what is shown, written beside a run or sent to a tracker: by their names, by their forms, and by the environment's values."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from typing import Any

STARS = "***"
LEAST = 8
"""Characters from which on a secret variable's value is looked for in texts: shorter ones are words of their own."""
_NAME = re.compile(
    r"(?:^|[_.-])(?:api[_-]?key|access[_-]?key|private[_-]?key|secret(?:[_-]?key)?|token|password|passwd|passphrase|credentials?|authorization)$",
    re.IGNORECASE,
)
_FORMS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(?<=://)[^/\s@:]*:[^/\s@]+(?=@)",
        r"(?<=bearer )\S+",
        r"\b(?:hf_|sk-|gh[pousr]_|xox[abprs]-|wandb_v\d_)[A-Za-z0-9_-]{10,}",
        r"\bAKIA[0-9A-Z]{16}\b",
    )
)
_QUERY = re.compile(r"([?&;][^=&;#\s]*(?:key|token|secret|passw|credential|signature)[^=&;#\s]*=)(?!\$\{)[^&;#\s\"']+", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Whether what goes by this name is a secret: ``api_key``, ``HF_TOKEN``; not ``tokens``, ``tokenizer`` or ``token_env``."""
    return _NAME.search(name) is not None


def redacted(value: Any, name: str = "") -> Any:
    """A value of JSON with its secrets struck out; ``${env:NAME}`` names one and stays."""
    if isinstance(value, dict):
        return {key: redacted(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item, name) for item in value]
    if not isinstance(value, str):
        return value
    if is_secret(name) and value and not value.startswith("${env:"):
        return STARS
    return redacted_text(value)


def redacted_text(text: str) -> str:
    """A text without what has a secret's form, or is the value of a variable with a secret's name."""
    for form in _FORMS:
        text = form.sub(STARS, text)
    text = _QUERY.sub(rf"\1{STARS}", text)
    for name, value in os.environ.items():
        if len(value) >= LEAST and is_secret(name):
            text = text.replace(value, STARS)
    return text


def redacted_command(words: Sequence[str]) -> str:
    """A command line for a shell, with stars in the place of secrets."""
    return shlex.join(redacted_words(words))


def redacted_words(words: Sequence[str]) -> list[str]:
    """The words of a command, with stars in the place of secrets (``--api-key X``, ``teacher.token=X``)."""
    shown: list[str] = []
    hide = False
    for word in words:
        key, equals, value = word.partition("=")
        if hide:
            word = STARS
        elif equals and value and is_secret(key) and not value.startswith("${env:"):
            word = f"{key}={STARS}"
        hide = not hide and not equals and word.startswith("--") and is_secret(word)
        shown.append(redacted_text(word))
    return shown
