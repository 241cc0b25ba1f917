"""How much of a served teacher's latency a training step sees, and what each protocol's answers cost on the wire and to read.

python -m benchmarks.teacher_latency.run [--quick] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import math
import socket
import threading
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import uvicorn
from benchmarks.evidence import criterion, write_results

from limbeck.config.parts.teachers import HttpTeacherOptions
from limbeck.engine.ahead import StepQueue
from limbeck.needs import TopK
from limbeck.teachers.documents import Ask, TopKRows
from limbeck.teachers.http.frames import MEDIA_TYPE, encode
from limbeck.teachers.http.protocols import protocol_of
from limbeck.teachers.http.teacher import HttpTeacher
from limbeck.teachers.http.transport import Reply
from limbeck.types import IGNORE, Batch

LATENCY, STUDENT, MICROBATCHES = 1.0, 0.5, 8
"""Seconds a request, seconds a micro-batch of the student, micro-batches a step: the seed's own setting."""
BOUND = 4.4
WAIT_SHARE = 0.05
READ_SECONDS = 0.1
K, VOCABULARY, POSITIONS = 128, 151_936, 8192
SETTINGS = (("one after another", 1, 0, 3), ("1 in flight", 1, 1, 4), ("4 in flight", 4, 1, 5), ("8 in flight", 8, 1, 7))
"""Name, places, steps ahead, steps measured (the first is not counted)."""
MEMORY = 600_000
"""Bytes for answers that wait: a step's worth, and not two."""
SEED = 0


def answer(rows: int, k: int, temperatures: list[float]) -> TopKRows:
    """Some distribution, the same everywhere."""
    logits = -0.05 * np.arange(k, dtype=np.float32)
    log_z = [math.log(np.exp(logits / t).sum() + 1) for t in temperatures]
    ids = np.tile(np.arange(k, dtype=np.int32), (rows, 1))
    return TopKRows(ids, np.tile(logits, (rows, 1)), np.tile(np.float32(log_z), (rows, 1)))


class SlowTeacher:
    """An ASGI application that answers as `limbeck teach` does, after a while."""

    def __init__(self) -> None:
        self.latency = 0.0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        if scope["method"] == "GET":
            content = json.dumps(
                {"status": "ok", "model": "slow", "fingerprint": {"weights": "none"}, "digest": "slow", "vocabulary": VOCABULARY}
            ).encode()
        else:
            asked = json.loads(body)
            await asyncio.sleep(self.latency)
            answers = [answer(len(positions), asked["top_k"], asked["temperatures"]) for positions in asked["positions"]]
            meta = {"model": "slow", "fingerprint": "slow", "vocabulary": VOCABULARY, "temperatures": asked["temperatures"]}
            content = encode(answers, meta)
        headers = [(b"content-type", MEDIA_TYPE.encode()), (b"content-length", str(len(content)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})


class Rows:
    """A step's rows, over and over: one document of 64 tokens a micro-batch."""

    def state(self) -> dict[str, int]:
        return {}

    def next_step(self) -> Batch:
        shape = (MICROBATCHES, 64)
        ids = torch.randint(1, 1000, shape, generator=torch.Generator().manual_seed(SEED))
        labels = torch.cat([ids[:, 1:], torch.full((MICROBATCHES, 1), IGNORE)], 1)
        return Batch(ids, labels, torch.arange(64).expand(shape).clone(), torch.zeros(shape, dtype=torch.int64))


def pipeline_rows(scale: float, quick: bool) -> list[dict[str, Any]]:
    """Seconds a step, and of those the seconds that it waited, for each setting; times are given at full scale."""
    app = SlowTeacher()
    # With the protocol named, asyncio switches off the delay that small packets are held back by.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    found = []
    try:
        for name, places, ahead, steps in SETTINGS[:: len(SETTINGS) - 1] if quick else SETTINGS:
            app.latency = 0.0
            teacher = HttpTeacher(
                HttpTeacherOptions(url=url, in_flight=places, lookahead=ahead, max_bytes=MEMORY, canary_every=0)
            )
            teacher.load("cpu")
            app.latency = LATENCY * scale
            seconds, waits = train(teacher, steps, STUDENT * scale)
            metric = f"seconds a step of {MICROBATCHES} micro-batches, median after the first"
            found.append({
                "setting": name, "metric": metric, "value": round(median(seconds[1:]) / scale, 3),
                "waiting": round(median(waits[1:]) / scale, 3), "steps": steps - 1,
                "bytes_waiting": teacher.pipeline.admission.most_bytes,
            })  # fmt: skip
            teacher.close()
    finally:
        server.should_exit = True
        thread.join(10)
    return found


def train(teacher: HttpTeacher, steps: int, student: float) -> tuple[list[float], list[float]]:
    """Steps as the engine does them: wait for the step's answers, ask for the next step's, compute."""
    step: Any = SimpleNamespace(teacher=teacher, submit=lambda part: teacher.submit(part, {TopK: TopK(K)}))
    queue = StepQueue(Rows(), step, microbatch=1, num_steps=steps)  # type: ignore[arg-type]
    seconds, waits = [], []
    for _ in range(steps):
        start = time.perf_counter()
        upcoming = queue.first()
        upcoming.answers(lambda: False)
        waits.append(time.perf_counter() - start)
        queue.advance()
        for _ in range(MICROBATCHES):
            time.sleep(student)
        seconds.append(time.perf_counter() - start)
    return seconds, waits


def canned(positions: int) -> tuple[Ask, dict[tuple[str, str], bytes]]:
    """A document with realistic log-probabilities, and the answer about it as each server writes it."""
    rng = np.random.default_rng(SEED)
    ids = rng.integers(0, VOCABULARY, positions + 1).astype(np.int32)
    ask = Ask(ids, np.arange(positions, dtype=np.int32))
    scores = -1.3 * np.log(np.arange(1, K + 1)) + rng.normal(0, 0.1, (positions, K))
    logprobs = -np.sort(-scores, axis=1) - 3.0
    # Never the prompt's own token: all of them are unlikely ones, and every entry of vLLM's has one id more.
    start = (ids[1:, None] + K + rng.integers(0, VOCABULARY // 2, (positions, 1))) % (VOCABULARY - K)
    kept = start + rng.permuted(np.tile(np.arange(K), (positions, 1)), axis=1)
    values32, kept32 = logprobs.astype(np.float32), kept.astype(np.int32)
    entries: list[Any] = [None]
    for p in range(positions):
        entry = {str(int(ids[p + 1])): {"logprob": -14.5, "rank": 40_000, "decoded_token": " token"}}
        row = zip(kept[p].tolist(), values32[p].tolist(), strict=True)
        entry |= {str(t): {"logprob": v, "rank": rank, "decoded_token": " token"} for rank, (t, v) in enumerate(row, 1)}
        entries.append(entry)
    own = [[None, int(ids[0]), None], *([-14.5, int(t), None] for t in ids[1:])]
    nested = [None, *([[v, t, None] for v, t in zip(*row, strict=True)] for row in zip(values32.tolist(), kept.tolist(), strict=True))]
    flat: dict[str, Any] = {"input_top_logprobs_shape": [positions, K], "input_top_logprobs_null_prefix": 1}
    for name, part in (("val", values32), ("idx", kept32)):
        flat[f"input_top_logprobs_{name}_flat_b64"] = base64.b64encode(part.tobytes()).decode()
        flat[f"input_top_logprobs_{name}_flat_b64_dtype"] = part.dtype.name
    meta = {"model": "m", "fingerprint": "f", "vocabulary": VOCABULARY, "temperatures": [1.0]}
    rows = TopKRows(kept32, values32, np.zeros((positions, 1), np.float32))
    sglang = [{"text": "", "meta_info": {"prompt_tokens": len(ids), "input_token_logprobs": own}}]
    return ask, {
        ("vllm", "JSON"): json.dumps({"choices": [{"index": 0, "prompt_logprobs": entries}]}).encode(),
        ("sglang", "nested JSON"): json.dumps([{**sglang[0], "meta_info": {**sglang[0]["meta_info"], "input_top_logprobs": nested}}]).encode(),
        ("sglang", "flat base64"): json.dumps([{**sglang[0], "meta_info": {**sglang[0]["meta_info"], **flat}}]).encode(),
        ("limbeck", "binary frame"): encode([rows], meta),
    }


def wire_rows(positions: int) -> list[dict[str, Any]]:
    """Bytes a token, and CPU seconds to read and check an answer, each protocol; per 8,192 positions."""
    ask, bodies = canned(positions)
    found, first = [], None
    for (name, form), body in bodies.items():
        protocol = protocol_of(HttpTeacherOptions(url="http://localhost", protocol=name))
        times = []
        for _ in range(3):
            start = time.process_time()
            rows = protocol.read(Reply(200, {}, body, len(body)), [ask], TopK(K))[0]
            times.append(time.process_time() - start)
        first = first or rows
        if not (np.array_equal(rows.ids_mK, first.ids_mK) and np.array_equal(rows.logits_mK, first.logits_mK)):
            raise SystemExit(f"{name} ({form}) gives another tensor")
        scale = POSITIONS / positions
        found.append({
            "setting": f"{name}, {form}, k = {K}", "metric": "CPU seconds to read and check 8,192 positions",
            "value": round(min(times) * scale, 4), "bytes_per_token": round(len(body) / positions, 1),
        })  # fmt: skip
    return found


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the times, few settings; writes only with --out")
    parser.add_argument("--out", type=Path, help="folder of results.json; by default this benchmark's own")
    options = parser.parse_args(arguments)
    scale = 0.1 if options.quick else 1.0
    steps, wire = pipeline_rows(scale, options.quick), wire_rows(256 if options.quick else POSITIONS)
    for row in steps:
        print(f"{row['setting']}: {row['value']:.2f} s a step, {row['waiting']:.2f} s of it waiting")
    for row in wire:
        print(f"{row['setting']}: {row['bytes_per_token']:,.0f} bytes a token, {row['value']:.3f} CPU s to read 8,192")
    last = steps[-1]
    share = last["waiting"] / last["value"]
    criteria = [
        criterion("step at 8 in flight, seconds", f"<= {BOUND}", last["value"], last["value"] <= BOUND),
        criterion("share of the step spent waiting, 8 in flight", f"<= {WAIT_SHARE}", round(share, 4), share <= WAIT_SHARE),
        criterion("bytes of waiting answers", f"<= {MEMORY}", last["bytes_waiting"], last["bytes_waiting"] <= MEMORY),
    ]
    for row in wire:
        if "base64" in row["setting"] or "frame" in row["setting"]:
            name = f"CPU seconds to read 8,192 x {K}: {row['setting']}"
            criteria.append(criterion(name, f"<= {READ_SECONDS}", row["value"], row["value"] <= READ_SECONDS))
    folder = options.out or (None if options.quick else Path(__file__).parent)
    if folder:
        command = "python -m benchmarks.teacher_latency.run" + (" --quick" if options.quick else "")
        claim = "A served teacher of 1 s latency is hidden behind a student that needs 0.5 s a micro-batch; compact answers cost no time to read"
        write_results(folder, claim, command, [SEED], [*steps, *wire], criteria)
    return criteria


if __name__ == "__main__":
    for line in main():
        print(f"{'holds' if line['holds'] else 'FAILS'}: {line['name']}: {line['measured']} {line['bound']}")
