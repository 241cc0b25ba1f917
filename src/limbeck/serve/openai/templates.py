"""Chat templates that a server is given beside its model: for base models, which have none."""

from __future__ import annotations

from pathlib import Path

from jinja2 import TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from limbeck.errors import LimbeckError

PLAIN = "{% for message in messages %}{{ '' if loop.first else '\\n\\n' }}{{ message['content'] }}{% endfor %}"
"""What was said, one paragraph a turn: the model goes on with the text."""


def read_template(wanted: str) -> str:
    """``plain``, or the text of a Jinja file; :class:`LimbeckError` for one that cannot be read or is no template."""
    if wanted == "plain":
        return PLAIN
    path = Path(wanted)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise LimbeckError(f"--chat-template {wanted}: cannot be read ({reason}): name a .jinja file, or `plain`") from error
    try:
        # Loop controls, and blocks that mark what the assistant says, are transformers' own additions.
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except TemplateSyntaxError as error:
        if "unknown tag 'generation'" not in str(error.message):
            raise LimbeckError(f"--chat-template {wanted}:{error.lineno}: {error.message}") from error
    if not text.strip():
        raise LimbeckError(f"--chat-template {wanted}: is empty: name a .jinja file that writes `messages`, or `plain`")
    return text
