"""`limbeck serve` as a process that is asked and watched: time, CPU time and memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx2

TICK = os.sysconf("SC_CLK_TCK")
MIB = 2**20


@dataclass(frozen=True)
class Taken:
    """Tokens, and the seconds they took on the clock and of the server's CPU time, which the kernel tells in hundredths."""

    tokens: int
    wall: float
    cpu: float


class Served:
    """One file behind ``limbeck serve`` with one thread, from its start to its end."""

    def __init__(self, file: Path, context: int):
        words = ["serve", str(file), "--port", "0", "--threads", "1", "--parallel", "1", "--context", str(context)]
        # Whatever a library would start threads for is none of this measurement.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._log = file.with_suffix(".log")
        with open(self._log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "limbeck", *words], stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            )
        self._client: httpx2.Client | None = None

    def __enter__(self) -> Served:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._client is not None:
            self._client.close()
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(15)
        self.process.kill()
        self.process.communicate()

    @property
    def client(self) -> httpx2.Client:
        """Connected when the server says that it listens."""
        if self._client is None:
            assert self.process.stdout is not None
            line = self.process.stdout.readline()
            if "http://" not in line:
                raise SystemExit(f"limbeck serve did not start: {self._log.read_text()[-2000:]}")
            # Nothing is to be packed: it would be the server's time.
            headers = {"accept-encoding": "identity"}
            self._client = httpx2.Client(base_url=line.split()[-1], trust_env=False, timeout=300, headers=headers)
        return self._client

    def read(self, prompt: list[int]) -> Taken:
        """A prompt, from the request to the one token that is asked for: the numbers are those of the prompt."""
        body = {"prompt": prompt, "max_tokens": 1, "temperature": 0}
        client, cpu, start = self.client, self.cpu(), time.perf_counter()
        answer = _ok(client.post("/v1/completions", json=body)).json()
        wall, cpu = time.perf_counter() - start, self.cpu() - cpu
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        if cached:
            raise SystemExit(f"{cached} tokens of the prompt were there already, and its time is of no use")
        return Taken(len(prompt), wall, max(cpu, 1 / TICK))

    def write(self, prompt: list[int], tokens: int) -> Taken:
        """``tokens`` tokens after a first one, from the event of the first to that of the last."""
        body = {
            "prompt": prompt, "max_tokens": tokens + 1, "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        events = 0
        with self.client.stream("POST", "/v1/completions", json=body) as reply:
            for line in _ok(reply).iter_lines():
                chunk = json.loads(line.removeprefix("data: ")) if line.startswith("data: {") else {}
                if "error" in chunk:
                    raise SystemExit(f"limbeck serve: {chunk['error']['message']}")
                if chunk.get("choices") and chunk["choices"][0]["text"]:
                    events += 1
                    wall, cpu = time.perf_counter(), self.cpu()
                    if events == 1:
                        first = wall, cpu
        if events != tokens + 1:
            raise SystemExit(f"{events} events for {tokens + 1} tokens: the first event is not the first token")
        return Taken(tokens, wall - first[0], max(cpu - first[1], 1 / TICK))

    def cpu(self) -> float:
        """Seconds of CPU time, in user mode and for it in the kernel, of all its threads."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICK

    def memory(self) -> dict[str, float]:
        """MiB that are resident now, of files (the model is mapped) and of its own, and the most that ever were."""
        rollup = _kilobytes(f"/proc/{self.process.pid}/smaps_rollup")
        status = _kilobytes(f"/proc/{self.process.pid}/status")
        resident, own = rollup["Rss"] / 1024, rollup["Anonymous"] / 1024
        return {"resident": resident, "own": own, "of_files": resident - own, "peak": status["VmHWM"] / 1024}


def _ok(reply: Any) -> Any:
    if reply.status_code != 200:
        reply.read()
        raise SystemExit(f"limbeck serve answers {reply.status_code}: {reply.text[:500]}")
    return reply


def _kilobytes(path: str) -> dict[str, int]:
    return {name: int(size) for name, size in re.findall(r"^(\w+):\s+(\d+) kB$", Path(path).read_text(), re.MULTILINE)}
