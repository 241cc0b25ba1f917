"""`vllm serve` for the length of a run."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from limbeck.config.parts.teachers import HttpTeacherOptions
from limbeck.errors import TeacherError
from limbeck.teachers.http.transport import address

_SHOWN = 2000
_STOP_SECONDS = 20.0


@dataclass
class Launched:
    """A server that was started here."""

    process: subprocess.Popen[bytes]
    log: Path

    def stop(self) -> None:
        """End it and all that it started; its log goes with it."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_STOP_SECONDS)
                break
        self.log.unlink(missing_ok=True)

    def words(self) -> str:
        """The end of what it printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-_SHOWN:].strip()


def command_line(options: HttpTeacherOptions) -> list[str]:
    """The words that start the server."""
    asked = options.launch
    assert asked is not None and options.model is not None
    host, port, _ = address(options.url)
    words = [
        asked.command, "serve", options.model, "--host", host, "--port", str(port or 8000),
        "--tensor-parallel-size", str(asked.tensor_parallel),
        "--gpu-memory-utilization", f"{asked.gpu_memory:g}",
        "--max-logprobs", str(asked.max_logprobs),
        # Other modes give logits, or change the answer with the sampling settings.
        "--logprobs-mode", "raw_logprobs",
        "--max-num-batched-tokens", str(asked.max_batch_tokens), "--enable-chunked-prefill",
    ]  # fmt: skip
    if asked.expert_parallel:
        words.append("--enable-expert-parallel")
    if asked.quantisation:
        words += ["--quantization", asked.quantisation]
    return words + list(asked.arguments)


def launch(options: HttpTeacherOptions, token: str | None) -> Launched:
    """Start it and wait for its health.  Raises :class:`~limbeck.errors.TeacherError` with the end of its log."""
    asked = options.launch
    assert asked is not None
    program = shutil.which(asked.command)
    if program is None:
        raise TeacherError(
            f"teacher.launch.command: no program '{asked.command}' is found: install vLLM in an environment of its own and give its "
            "path, or start the server by hand and leave `launch` out"
        )
    environment = dict(os.environ)
    if asked.devices:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, asked.devices))
    if token:
        # The command line is for everybody to read.
        environment["VLLM_API_KEY"] = token
    handle, name = tempfile.mkstemp(prefix="limbeck-teacher-", suffix=".log")
    with os.fdopen(handle, "wb") as log:
        process = subprocess.Popen(
            [program, *command_line(options)[1:]],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip
    server = Launched(process, Path(name))
    try:
        _await_health(server, options)
    except BaseException:
        server.stop()
        raise
    return server


def _await_health(server: Launched, options: HttpTeacherOptions) -> None:
    asked = options.launch
    assert asked is not None
    host, port, _ = address(options.url)
    health = f"http://{host}:{port or 8000}/health"
    end = time.monotonic() + asked.wait
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        if server.process.poll() is not None:
            raise TeacherError(f"`vllm serve {options.model}` ended with code {server.process.returncode}:\n{server.words()}")
        with contextlib.suppress(OSError), direct.open(health, timeout=2) as reply:
            if reply.status == 200:
                return
        if time.monotonic() > end:
            raise TeacherError(f"`vllm serve {options.model}` did not answer within {asked.wait:g} s:\n{server.words()}")
        time.sleep(min(1.0, asked.wait / 50))
