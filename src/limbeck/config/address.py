"""URLs that may carry a secret: it comes from the environment alone, and is neither written down nor shown.

``https://${env:USER}:${env:PASSWORD}@host`` is used with its variables filled in; every dump of the options holds the text with
``${env:NAME}`` as it was written, and reads the variables again.
"""

from __future__ import annotations

import os
import re
from typing import Annotated, Any

from pydantic import PlainSerializer, WrapValidator

from limbeck.config.base import Hint

VARIABLE = re.compile(r"\$\{env:([^{}]+)\}")
_NAMED = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*://)?[^/?#]*@")
_TELLING = re.compile(r"[?&;]([^=&;#]*(?:key|token|secret|passw|credential|signature)[^=&;#]*)=[^&;#$]", re.IGNORECASE)


class Address(str):
    """The URL as it is used; ``written`` is what the recipe says."""

    written: str

    def __new__(cls, used: str, written: str | None = None) -> Address:
        """``written`` is ``used`` where nothing was filled in."""
        it = super().__new__(cls, used)
        it.written = used if written is None else written
        return it

    def __repr__(self) -> str:
        return repr(self.written)


def shown(url: str) -> str:
    """A URL for people: without a user's name and password, and without its query."""
    return re.split(r"[?#]", _NAMED.sub(lambda match: match[1] or "", url, count=1), maxsplit=1)[0]


def _read(value: Any, handler: Any) -> Address:
    if isinstance(value, Address):
        return value
    written = handler(value)
    if named := _NAMED.match(VARIABLE.sub("", written)):
        name, colon, password = named[0].removeprefix(named[1] or "").removesuffix("@").partition(":")
        # A name alone is how some servers take a token.
        if password or (name and not colon):
            raise ValueError(
                "a password is written in this URL, and recipes and run folders are for everybody to read: put it into an environment variable "
                "and write ${env:NAME} in its place (a bearer token: its variable's name in `token_env`)"
            )
    if telling := _TELLING.search(written):
        raise ValueError(f"the query's {telling[1]!r} looks like a secret: put it into an environment variable and write {telling[1]}=${{env:NAME}}")
    return Address(VARIABLE.sub(lambda match: os.environ.get(match[1], match[0]), written), written)


def missing(url: str) -> str | None:
    """The variable that a URL still wants.  A run that is only exported or read does without: it is the teacher who asks."""
    found = VARIABLE.search(url)
    return found[1] if found else None


def _written(url: str) -> str:
    return url.written if isinstance(url, Address) else url


Url = Annotated[str, Hint("text", environment=True, secret=True), WrapValidator(_read), PlainSerializer(_written, return_type=str)]
"""An :class:`Address`."""
