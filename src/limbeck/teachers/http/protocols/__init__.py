"""Four ways of asking for top-k rows.  Whatever is on the wire, row ``j`` of an answer is the distribution after ``positions[j]``."""

from __future__ import annotations

from limbeck.config.parts.teachers import HttpTeacherOptions
from limbeck.teachers.http.protocols.base import Protocol
from limbeck.teachers.http.protocols.limbeck import LimbeckProtocol
from limbeck.teachers.http.protocols.seed import SeedProtocol
from limbeck.teachers.http.protocols.sglang import SGLangProtocol
from limbeck.teachers.http.protocols.vllm import VLLMProtocol

__all__ = ["Protocol", "protocol_of"]

_BY_NAME: dict[str, type[Protocol]] = {
    protocol.name: protocol for protocol in (LimbeckProtocol, VLLMProtocol, SGLangProtocol, SeedProtocol)
}


def protocol_of(options: HttpTeacherOptions) -> Protocol:
    """The protocol that a recipe names."""
    return _BY_NAME[options.protocol](options.model, options.seed)
