"""Can this machine, or a teacher elsewhere, do the work?  What `limbeck doctor` finds, as data.  Nothing here asks the network but the teacher."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from limbeck.errors import TeacherError

NEEDED = (
    "torch", "transformers", "tokenizers", "safetensors", "numpy", "pydantic", "PyYAML", "typer", "rich", "httpx2", "zstandard",
)  # fmt: skip
OPTIONAL = {
    "datasets": "text from the Hugging Face hub: limbeck[data]",
    "pyarrow": "parquet files: limbeck[data]",
    "starlette": "limbeck serve and limbeck teach: limbeck[serve]",
    "uvicorn": "limbeck serve and limbeck teach: limbeck[serve]",
    "flash-linear-attention": "linear-attention kernels for CUDA: limbeck[fla]",
    "triton": "needed by flash-linear-attention; comes with torch for CUDA",
    "gguf": "writes files for llama.cpp: limbeck[gguf]",
    "xllamacpp": "llama.cpp itself, serves and checks such files: limbeck[verify]",
    "lm_eval": "limbeck evaluate --tasks and limbeck lm_eval: limbeck[lm-eval]",
    "tensorboard": "a tracker: limbeck[tensorboard]",
    "wandb": "a tracker: limbeck[wandb]",
    "trackio": "a tracker: limbeck[trackio]",
    "peft": "opens exported adapters; limbeck writes and reads its files without it",
    "openai": "a client for limbeck serve",
}
"""Package -> what it is for."""
LOW_DISK, LOW_MEMORY = 5 * 2**30, 2 * 2**30
_GIB = 2**30


@dataclass(frozen=True)
class Fact:
    """One line."""

    group: str
    """`machine`, `packages`, `optional`, `compute` or `places`."""
    name: str
    text: str
    problem: str | None = None
    """What stands in the way of any run, with the way out."""
    advice: str | None = None
    """What stands in the way of some runs, or costs time."""


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was found; ``ready`` when nothing stands in the way."""

    facts: tuple[Fact, ...]

    @property
    def problems(self) -> list[str]:
        """What must be mended before any run."""
        return [fact.problem for fact in self.facts if fact.problem]

    @property
    def advice(self) -> list[str]:
        """What is worth mending."""
        return [fact.advice for fact in self.facts if fact.advice]

    @property
    def ready(self) -> bool:
        """Whether a run can start here."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """For ``limbeck doctor --json``."""
        return {
            "ready": self.ready,
            "problems": self.problems,
            "advice": self.advice,
            "facts": [asdict(fact) for fact in self.facts],
        }


def doctor() -> Diagnosis:
    """Look at this machine, its packages and its places.  Imports torch, so it takes some seconds; asks no network.

    ``limbeck.doctor().ready`` says whether a run can start, ``.problems`` and ``.advice`` what to mend.
    """
    return Diagnosis((*_machine(), *_packages(), *_optional(), *_compute(), *_places()))


@dataclass(frozen=True)
class Teacher:
    """What a served teacher can do."""

    url: str
    model: str
    protocol: str
    vocabulary: int | None
    k_limit: int | None
    token_limit: int | None
    latency: tuple[float, float]
    """Seconds of a request: median, and 95%."""
    bytes_per_token: float
    lines: tuple[str, ...]
    """The same and more, for people."""

    def to_json(self) -> dict[str, Any]:
        """For ``limbeck doctor --teacher URL --json``."""
        return asdict(self)


def try_teacher(url: str, *, protocol: str = "limbeck", model: str | None = None, token_env: str | None = None) -> Teacher:
    """Connect to a served teacher, ask it a few questions, and say what it can do; a run would do the same at its start.

    ``token_env`` is the name of the environment variable that holds its token.

    ``limbeck.try_teacher("http://127.0.0.1:8100").vocabulary``

    Raises:
        TeacherError: nobody there, another protocol, a token that is missing or refused, or answers that cannot be trusted.
    """
    from pydantic import ValidationError

    from limbeck.config.address import shown
    from limbeck.config.messages import complaints
    from limbeck.config.parts.teachers import HttpTeacherOptions

    settings = {"url": url, "protocol": protocol, "model": model, "token_env": token_env}
    try:
        options = HttpTeacherOptions.model_validate(settings)
    except ValidationError as error:
        raise TeacherError("\n".join(complaints(error, HttpTeacherOptions, settings))) from None
    from limbeck.teachers.http.teacher import HttpTeacher

    served = HttpTeacher(options)
    try:
        served.load()
        told = served.findings
        return Teacher(
            shown(options.url), told.model, protocol, told.vocabulary, told.k_limit, told.token_limit, told.latency, told.bytes_per_token,
            tuple(served.summary),
        )  # fmt: skip
    finally:
        served.close()


def _machine() -> Iterator[Fact]:
    from limbeck.planner.devices import machine_memory

    yield Fact("machine", "system", f"{platform.system()} {platform.machine()}")
    cores, quota = _cores(), _cpu_quota()
    asked = os.environ.get("OMP_NUM_THREADS")
    words = f"{cores} of {os.cpu_count()}" + (f", of which the control group gives {quota:g}" if quota else "")
    too_many = asked is not None and asked.isdecimal() and int(asked) > cores
    advice = (
        f"OMP_NUM_THREADS={asked}, and there are {cores} cores: threads that wait for each other are slow; unset it"
        if too_many
        else None
    )
    yield Fact("machine", "cores", f"{words}; OMP_NUM_THREADS is {asked or 'not set'}", advice=advice)
    total, limit, free = machine_memory(), _memory_limit(), _memory_free()
    usable = min(x for x in (total, limit, free) if x is not None)
    words = f"{total / _GIB:.1f} GiB" + (f", {free / _GIB:.1f} free" if free is not None else "")
    words += f"; the control group allows {limit / _GIB:.1f} GiB" if limit is not None and limit < total else ""
    low = (
        f"{usable / _GIB:.1f} GiB of memory are usable: the quickstart takes about 1.5, larger models more"
        if usable < LOW_MEMORY
        else None
    )
    yield Fact("machine", "memory", words, advice=low)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read_number(path: str) -> float | None:
    try:
        return float(Path(path).read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None


def _cpu_quota() -> float | None:
    """Cores that the control group (v2, else v1) lets this process use; None without a limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else float(quota) / float(period)
    except (OSError, ValueError):
        used, period_v1 = (_read_number(f"/sys/fs/cgroup/cpu/cpu.cfs_{name}_us") for name in ("quota", "period"))
        return used / period_v1 if used is not None and period_v1 and used > 0 else None


def _memory_limit() -> float | None:
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        limit = _read_number(path)
        # Without a limit the first says "max", the second a number that no machine has.
        if limit is not None and limit < 2**60:
            return limit
    return None


def _memory_free() -> float | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * float(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _asked() -> dict[str, str]:
    """Package -> the versions that our own metadata ask for."""
    from packaging.requirements import Requirement

    try:
        parsed = [Requirement(line) for line in requires("limbeck") or ()]
    except PackageNotFoundError:
        return {}
    return {one.name.lower().replace("_", "-"): str(one.specifier) for one in parsed if str(one.specifier)}


def _unfit(package: str, found: str, asked: dict[str, str]) -> str | None:
    """The versions asked for, where the one found is none of them."""
    from packaging.specifiers import SpecifierSet

    wanted = asked.get(package.lower().replace("_", "-"))
    return None if wanted is None or SpecifierSet(wanted).contains(found, prereleases=True) else wanted


def _packages() -> Iterator[Fact]:
    yield Fact("packages", "python", platform.python_version())
    asked = _asked()
    for package in NEEDED:
        found = _version(package)
        if found is None:
            yield Fact("packages", package, "MISSING", problem=f"{package} is not installed: pip install limbeck")
        elif wanted := _unfit(package, found, asked):
            yield Fact(
                "packages",
                package,
                f"{found}, asked for: {wanted}",
                problem=f"{package} {found} does not fit: pip install '{package}{wanted}'",
            )
        else:
            yield Fact("packages", package, found)


def _optional() -> Iterator[Fact]:
    asked = _asked()
    for package, use in OPTIONAL.items():
        found = _version(package)
        if found is None:
            yield Fact("optional", package, f"not installed ({use})")
        elif wanted := _unfit(package, found, asked):
            advice = f"{package} {found} does not fit: pip install '{package}{wanted}'"
            yield Fact("optional", package, f"{found}, asked for: {wanted}", advice=advice)
        else:
            yield Fact("optional", package, found)


def _compute() -> Iterator[Fact]:
    if find_spec("torch") is None:
        return
    import torch

    from limbeck.ops.backends import describe

    yield Fact("compute", "threads", f"torch uses {torch.get_num_threads()}")
    if torch.cuda.is_available():
        triton = find_spec("triton") is not None
        for i in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(i)
            free, _ = torch.cuda.mem_get_info(i)
            bf16 = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bfloat16"
            words = f"{card.name}, {card.total_memory / _GIB:.0f} GiB, {free / _GIB:.0f} free, capability {card.major}.{card.minor}, {bf16}"
            slow = None if bf16 == "bfloat16" else f"cuda:{i} has no bfloat16 units: set loop.precision: float32"
            yield Fact("compute", f"cuda:{i}", words, advice=slow)
        if not triton:
            yield Fact(
                "compute",
                "triton",
                "none",
                advice="CUDA without triton: torch's own kernels are used, and flash-linear-attention cannot be",
            )
    else:
        yield Fact("compute", "cuda", "none: everything runs on the CPU", advice=_unseen_gpu(torch))
    yield Fact("compute", "linear attention", describe())
    rates = {dtype: _matmul_rate(torch, dtype) for dtype in (torch.float32, torch.bfloat16)}
    slower = rates[torch.bfloat16] < rates[torch.float32]
    hint = "set loop.precision: float32, bfloat16 is slower here" if slower else "keep loop.precision: bfloat16"
    yield Fact(
        "compute",
        "matmul",
        f"float32 {rates[torch.float32]:.0f}, bfloat16 {rates[torch.bfloat16]:.0f} GFLOP/s on the CPU: {hint}",
    )


def _unseen_gpu(torch: Any) -> str | None:
    """A GPU that seems to be there and that torch does not use."""
    if torch.version.cuda is not None:
        return f"torch is built for CUDA {torch.version.cuda} and sees no device: does `nvidia-smi` list one, and is CUDA_VISIBLE_DEVICES empty?"
    if shutil.which("nvidia-smi"):
        return f"nvidia-smi is here, and torch {torch.__version__} is a build for CPUs: install torch for CUDA (https://pytorch.org/get-started)"
    return None


def _matmul_rate(torch: Any, dtype: Any, size: int = 768, repeats: int = 3) -> float:
    """GFLOP/s of a square product, the best of a few."""
    a = torch.ones(size, size, dtype=dtype)
    a @ a
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def _places() -> Iterator[Fact]:
    from limbeck.planner.sources import hub_cache

    runs = _place("runs go here", Path.cwd())
    free = shutil.disk_usage(Path.cwd()).free
    problem = None
    if not os.access(Path.cwd(), os.W_OK):
        problem = f"{Path.cwd()} cannot be written to, and runs go to ./runs: go to another folder, or name one with --run-dir"
    elif free < LOW_DISK:
        problem = f"only {free / _GIB:.1f} GiB are free in {Path.cwd()}: checkpoints of larger models will not fit; free some, or name another --run-dir"
    yield Fact("places", "this folder", runs, problem=problem)
    cache = hub_cache()
    closed = (
        None
        if os.access(_nearest(cache), os.W_OK)
        else f"{cache} cannot be written to, so nothing can be downloaded: set HF_HUB_CACHE to another folder"
    )
    yield Fact("places", "hub cache", _place("models and text of the hub", cache), advice=closed)
    try:
        temporary = Path(tempfile.gettempdir())
        yield Fact("places", "temporary", _place("TMPDIR", temporary))
    except FileNotFoundError:
        yield Fact(
            "places", "temporary", "none", problem="no folder for temporary files can be written to: set TMPDIR to one that can"
        )
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    asked = (
        "offline (HF_HUB_OFFLINE): only what is in the cache is found"
        if offline
        else "asked when a recipe names a model or data of it"
    )
    yield Fact("places", "hub", asked)


def _nearest(path: Path) -> Path:
    """The path, or the first folder above it that is there."""
    return next(place for place in (path, *path.parents) if place.exists())


def _place(what: str, path: Path) -> str:
    return f"{shutil.disk_usage(_nearest(path)).free / _GIB:.1f} GiB free in {path} ({what})"
