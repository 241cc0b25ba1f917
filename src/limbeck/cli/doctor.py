"""``limbeck doctor``: can this machine, or a teacher elsewhere, do the work?"""

from __future__ import annotations

import os
import platform
import shutil
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from limbeck.errors import TeacherError

_NEEDED = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pydantic", "PyYAML", "typer", "rich")
_OPTIONAL = {
    "datasets": "text from the Hugging Face hub",
    "pyarrow": "parquet files",
    "flash-linear-attention": "linear-attention kernels for CUDA",
    "triton": "needed by flash-linear-attention",
    "httpx2": "teachers over HTTP",
}
_LOW_DISK = 5 * 2**30


def doctor(
    teacher: Annotated[
        str | None, typer.Option(metavar="URL", help="Try a served teacher instead: is it there, what can it do?", show_default=False)
    ] = None,
    protocol: Annotated[str, typer.Option(help="What it speaks: limbeck, vllm, sglang or seed.")] = "limbeck",
    model: Annotated[str | None, typer.Option(help="Its name of the model (vLLM).", show_default=False)] = None,
    token_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Environment variable that holds its token.", show_default=False)
    ] = None,
) -> None:
    """Look at this machine, its packages and backends, or at a served teacher.

    limbeck doctor --teacher http://127.0.0.1:8000 --protocol vllm
    """
    if teacher is not None:
        _try_teacher({"url": teacher, "protocol": protocol, "model": model, "token_env": token_env})
        return
    problems: list[str] = []
    _line("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in _NEEDED:
        found = _version(package)
        _line(package, found or "MISSING")
        if found is None:
            problems.append(f"{package} is not installed: pip install limbeck")
    for package, use in _OPTIONAL.items():
        _line(package, _version(package) or f"not installed (optional: {use})")
    free = shutil.disk_usage(Path.cwd()).free
    _line("disk", f"{free / 2**30:.1f} GiB free here")
    if free < _LOW_DISK:
        problems.append(f"only {free / 2**30:.1f} GiB free: checkpoints of larger models will not fit")
    if not os.access(Path.cwd(), os.W_OK):
        problems.append("this folder cannot be written to: runs go to ./runs")
    if find_spec("torch") is not None:
        problems += _torch_lines()
    typer.echo("")
    if problems:
        typer.echo("verdict: " + "; ".join(problems))
        raise typer.Exit(2)
    typer.echo("verdict: ready (`limbeck quickstart` is a real distillation on this machine)")


def _try_teacher(settings: dict[str, Any]) -> None:
    """Connect, probe, print what was found; an error ends with its message and code 2."""
    from pydantic import ValidationError

    from limbeck.config.messages import findings
    from limbeck.config.parts.teachers import HttpTeacherOptions

    try:
        options = HttpTeacherOptions.model_validate(settings)
    except ValidationError as error:
        found = findings(HttpTeacherOptions, settings, error.errors())
        raise TeacherError("\n".join(f"{'.'.join(map(str, f.path))}: {f.message}" for f in found)) from None
    from limbeck.teachers.http.teacher import HttpTeacher

    served = HttpTeacher(options)
    try:
        served.load()
        for line in served.summary:
            typer.echo(line)
    finally:
        served.close()
    typer.echo("\nverdict: ready")


def _torch_lines() -> list[str]:
    import torch

    from limbeck.ops.backends import describe

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    asked = os.environ.get("OMP_NUM_THREADS", "not set")
    _line("threads", f"{torch.get_num_threads()} of {cores} cores (OMP_NUM_THREADS={asked})")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(i)
            _line(f"cuda:{i}", f"{card.name}, {card.total_memory / 2**30:.0f} GiB, capability {card.major}.{card.minor}")
    else:
        _line("cuda", "none: everything runs on the CPU")
    _line("linear attention", describe())
    rates = {dtype: _matmul_rate(torch, dtype) for dtype in (torch.float32, torch.bfloat16)}
    ratio = rates[torch.bfloat16] / rates[torch.float32]
    hint = "keep loop.precision: bfloat16" if ratio >= 1 else "set loop.precision: float32, bfloat16 is slower here"
    _line("matmul", f"float32 {rates[torch.float32]:.0f}, bfloat16 {rates[torch.bfloat16]:.0f} GFLOP/s on the CPU: {hint}")
    if torch.cuda.is_available() and find_spec("triton") is None:
        return ["CUDA without triton: torch's own kernels are used, and flash-linear-attention cannot be"]
    return []


def _matmul_rate(torch: object, dtype: object, size: int = 768, repeats: int = 3) -> float:
    """GFLOP/s of a square product, the best of a few."""
    a = torch.ones(size, size, dtype=dtype)  # type: ignore[attr-defined]
    a @ a
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _line(name: str, text: str) -> None:
    typer.echo(f"{name:<24}{text}")
