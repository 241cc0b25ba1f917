"""Which kernels an operator runs on: our torch form anywhere, flash-linear-attention where it can, and the same numbers from both.

An operator marked :func:`with_fla` goes to :mod:`limbeck.ops.fla_kernels` when all of this holds, and is what it was when it does not:

* the environment variable ``LIMBECK_BACKEND`` is not ``torch``;
* the inputs are on a GPU, none is fp64, and every width (of keys, values, slots) is 16 to 256;
* fp32 inputs: the process lets matrix products use TF32 (``torch.set_float32_matmul_precision("high")``), which the kernels do;
* deterministic algorithms are not asked for: kernels tuned by the clock need not be the same in a resumed run;
* flash-linear-attention 0.6 or later can be imported;
* on a small case of these widths, dtype and packing its outputs, state and (in training) gradients are those of the torch form.

The last is tried once a process and case.  Kernels have been wrong on some devices and compilers, and some refuse theirs only in the
backward pass: a run then falls back before its first step, with a warning that has the reason.

``LIMBECK_BACKEND=fla`` gives up the third and fourth conditions, and turns the last two into errors; what the kernels do not cover
(fp64, other widths, the CPU, PaTH, single decode steps) stays on torch.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from importlib import import_module
from typing import Any, NamedTuple, ParamSpec

import torch
from torch import Tensor

from limbeck.errors import RunError
from limbeck.ops import fla_kernels

VARIABLE = "LIMBECK_BACKEND"
CHOICES = ("auto", "torch", "fla")
OLDEST = (0, 6)
WIDTHS = range(16, 257)
"""Narrower tiles than 16 do not compile, wider keys than 256 are refused."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BOUNDS = {torch.bfloat16: (0.03, 0.1), torch.float16: (0.01, 0.05), torch.float32: (0.01, 0.05)}
"""Relative distance (Frobenius norm) allowed from the torch form in outputs and states, and in gradients: rounding is well below, a wrong
layout, scale or boundary far above."""

P = ParamSpec("P")
_log = logging.getLogger("limbeck.ops")
_override: str | None = None


def choice() -> str:
    """What the environment, or :func:`use`, asks for.

    Raises:
        RunError: it is none of the choices.
    """
    asked = _override or os.environ.get(VARIABLE) or "auto"
    if asked not in CHOICES:
        raise RunError(f"{VARIABLE}={asked}: choose one of {', '.join(CHOICES)}, or unset it")
    return asked


@contextmanager
def use(name: str) -> Iterator[None]:
    """A choice for all threads of the process while inside, whatever the environment says."""
    global _override
    before, _override = _override, name
    try:
        yield
    finally:
        _override = before


def with_fla(operator: Callable[P, fla_kernels.Made]) -> Callable[P, fla_kernels.Made]:
    """Let an operator run on flash-linear-attention's kernel of the same name, where that is the same thing."""
    name = getattr(operator, "__name__", "")
    theirs = fla_kernels.OPERATORS[name]

    @wraps(operator)
    def chosen(*args: P.args, **kwargs: P.kwargs) -> fla_kernels.Made:
        asked = choice()
        if asked != "torch" and _takes(name, operator, asked, args, kwargs):
            return theirs(*args, **kwargs)
        return operator(*args, **kwargs)

    return chosen


@cache
def missing() -> str | None:
    """Why flash-linear-attention cannot be used in this process, wherever the tensors are; None when it can.  Imports it."""
    try:
        import_module("triton")
        version = str(import_module("fla").__version__)
        for operation in (fla_kernels.GATED_DELTA, fla_kernels.KIMI):
            import_module(operation.module)
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed (pip install 'limbeck[fla]' on a machine with CUDA)"
    except Exception as error:
        # Whatever a compiler or driver of the wrong version raises while it is imported.
        return f"flash-linear-attention cannot be imported: {type(error).__name__}: {_first_line(error)}"
    found = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if found < OLDEST:
        return f"flash-linear-attention {version} is too old: {'.'.join(map(str, OLDEST))} or later is needed"
    return None


def describe() -> str:
    """One line for people: what runs on this machine, and why."""
    asked = choice()
    if asked == "fla" and (reason := missing()) is not None:
        return f"an error at the first step: {VARIABLE}=fla, and {reason}"
    if asked == "torch":
        return f"torch ({VARIABLE}=torch)"
    if not torch.cuda.is_available():
        return "torch (no CUDA device)"
    if (reason := missing()) is not None:
        return f"torch ({reason})"
    return f"flash-linear-attention on CUDA where it agrees with torch ({VARIABLE}={asked})"


class _Case(NamedTuple):
    """What an agreement is known for."""

    name: str
    widths: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    packed: bool
    trained: bool


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def _takes(name: str, operator: Callable[..., Any], asked: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call goes to flash-linear-attention; ``args`` are the operator's token inputs, v the third."""
    forced = asked == "fla"
    if forced and (reason := missing()) is not None:
        raise RunError(f"{VARIABLE}=fla: {reason}; or set {VARIABLE}=auto, which then uses torch")
    v: Tensor = args[2]
    if not _on_gpu(v):
        return False
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    widths = tuple(x.shape[-1] for x in args if x.ndim == 4)
    if v.dtype not in DTYPES or any(x.dtype == torch.float64 for x in tensors) or any(width not in WIDTHS for width in widths):
        return False
    if not forced:
        rounded = v.dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision == "tf32"
        if not rounded or torch.are_deterministic_algorithms_enabled() or missing() is not None:
            return False
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    case = _Case(name, widths, v.dtype, v.device, kwargs.get("documents_BT") is not None, trained)
    reason = _disagreement(case, operator)
    if reason is not None and forced:
        raise RunError(f"{VARIABLE}=fla: {reason}; set {VARIABLE}=auto, which then uses torch")
    return reason is None


@cache
def _disagreement(case: _Case, operator: Callable[..., Any]) -> str | None:
    """Why the kernel is not taken for this case, from a small one computed both ways; None when they agree."""
    try:
        theirs = _computed(case, fla_kernels.OPERATORS[case.name])
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason: str | None = f"flash-linear-attention cannot do it here: {type(error).__name__}: {_first_line(error)}"
    else:
        with use("torch"):
            reason = _apart(case, theirs, _computed(case, operator))
    what = f"{case.name} (widths {', '.join(map(str, case.widths))}, {str(case.dtype).removeprefix('torch.')})"
    if reason is not None:
        warnings.warn(f"{what}: runs on torch: {reason}", RuntimeWarning, stacklevel=2)
        return f"{what}: {reason}"
    _log.info("%s: runs on flash-linear-attention", what)
    return None


def _computed(case: _Case, operator: Callable[..., fla_kernels.Made]) -> list[Tensor]:
    """Output, state and (when trained) gradients of the inputs and the initial state, of a small case."""
    with torch.inference_mode(False), torch.set_grad_enabled(case.trained), torch.autocast(case.device.type, enabled=False):
        made = fla_kernels.example(case.name, case.widths)
        # q, k and v arrive in the model's dtype, gates and states in fp32.
        *inputs, state = [x.to(case.device, case.dtype if i < 3 else torch.float32) for i, x in enumerate(made)]
        leaves = [x.requires_grad_(case.trained) for x in (*inputs, state)]
        documents_BT = None
        if case.packed:
            documents_BT = torch.tensor([[0] * 70 + [1] * 90, [-1] * 5 + [0] * 30 + [1] * 120 + [-1] * 5], device=case.device)
        word = "initial_state" if case.name == "gated_slot_attention" else "initial_state_BHKV"
        o, final = operator(*leaves[:-1], documents_BT=documents_BT, **{word: leaves[-1]})
        if not case.trained:
            return [o, final]
        directions = [torch.randn(x.shape, generator=torch.Generator().manual_seed(i)).to(x) for i, x in enumerate((o, final))]
        return [o, final, *torch.autograd.grad([o, final], leaves, directions)]


def _apart(case: _Case, theirs: Sequence[Tensor], ours: Sequence[Tensor]) -> str | None:
    """What differs by more than rounding."""
    names = ["output", "state", *(f"gradient {i}" for i in range(len(ours) - 2))]
    for i, (name, a, b) in enumerate(zip(names, theirs, ours, strict=True)):
        bound = BOUNDS[case.dtype][i > 1]
        found, expected = a.detach().double(), b.detach().double()
        error = float((found - expected).norm() / expected.norm().clamp_min(1e-30))
        if not error <= bound:
            return f"flash-linear-attention's {name} is {error:.2g} from the torch form's, more than {bound}"
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
