"""`limbeck teach`: logits of the top k, and the partition sum of every temperature, in one binary frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from limbeck.errors import TeacherError
from limbeck.needs import TopK
from limbeck.teachers.documents import Ask, TopKRows
from limbeck.teachers.http.faults import BadReply
from limbeck.teachers.http.frames import FrameError, decode
from limbeck.teachers.http.protocols.base import Protocol
from limbeck.teachers.http.transport import Reply


class LimbeckProtocol(Protocol):
    """Rows come for the positions asked about, in order: nothing to align."""

    name = "limbeck"
    health_path = "/health"
    any_temperature = True
    tokens_at_k = "--max-top-k"

    def __init__(self, model: str | None, seed: int):
        super().__init__(model, seed)
        self.expect: str | None = None
        """Digest of the fingerprint that the server gave at the start: it refuses to answer as anything else."""

    def request(self, asks: Sequence[Ask], need: TopK) -> tuple[str, dict[str, Any]]:
        body: dict[str, Any] = {
            "sequences": [ask.ids.tolist() for ask in asks],
            "positions": [ask.positions.tolist() for ask in asks],
            "top_k": need.k,
            "temperatures": list(need.temperatures),
            "samples": need.samples,
            "seed": self.seed,
            "encoding": "frame",
            "values": "float32",
        }
        if self.expect is not None:
            body["expect"] = self.expect
        return "/v1/topk", body

    def parse(self, reply: Reply, asks: Sequence[Ask], need: TopK) -> list[TopKRows]:
        try:
            header, answers = decode(reply.body)
        except FrameError as error:
            raise BadReply(str(error)) from error
        if self.expect is not None and header["fingerprint"] != self.expect:
            raise TeacherError(
                f"the teacher's fingerprint was {self.expect} at the start and is {header['fingerprint']} now: another model or "
                "another setting is served; serve the first one again, or begin a new run"
            )
        if tuple(header["temperatures"]) != need.temperatures:
            raise BadReply(f"an answer at the temperatures {header['temperatures']} where {list(need.temperatures)} were asked for")
        return answers
