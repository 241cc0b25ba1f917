"""Operators on flash-linear-attention's kernels: the same numbers, only where they are covered, and never silently others.

The package is :mod:`stub_fla`, and the CPU plays the GPU: what is proved is how arguments travel.  The kernels themselves are compared in
``tests/numerics/test_fla_parity.py``, where there is a GPU.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from families import tiny_model
from limbeck.config.parts.mixers import MIXERS
from limbeck.errors import RunError
from limbeck.models.structure import attention_view
from limbeck.ops import backends, fla_kernels
from limbeck.ops.delta_rule import gated_delta_rule
from limbeck.ops.gated_slots import gated_slot_attention
from limbeck.ops.kda import kimi_delta_rule
from limbeck.ops.linear_attention import linear_attention
from limbeck.ops.rwkv7 import generalised_delta_rule
from recurrences import assert_equal, results
from stub_fla import Stub, install

CASES: dict[str, tuple[Callable[..., Any], tuple[int, ...], str]] = {
    "gated delta": (gated_delta_rule, (16, 16, 24), "chunk_gated_delta_rule"),
    "kimi": (kimi_delta_rule, (16, 16, 24, 16), "chunk_kda"),
    "head decay": (linear_attention, (16, 16, 24), "chunk_simple_gla"),
    "channel decay": (linear_attention, (16, 16, 24, 16), "chunk_gla"),
    "slots": (gated_slot_attention, (16, 16, 24, 20), "chunk_gsa"),
    "generalised": (generalised_delta_rule, (16, 16, 24, 16, 16, 16), "chunk_dplr_delta_rule"),
}
every_kernel = pytest.mark.parametrize("case", CASES)
DOCUMENTS = torch.tensor([[-1] * 2 + [0] * 9 + [1] + [-1] * 3 + [2] * 15, [4] * 30, [-1] * 30])
"""Padding at both ends, between documents and as a whole row; a document of one token."""


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    """The package is there, and tensors count as being on a GPU."""
    made = install(monkeypatch)
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    monkeypatch.setattr(backends, "_on_gpu", lambda x: True)
    _forget()
    yield made
    _forget()


def _forget() -> None:
    backends.missing.cache_clear()
    backends._disagreement.cache_clear()


def _inputs(case: str, batch: int = 2, tokens: int = 30) -> tuple[Callable[..., Any], list[Tensor], dict[str, Any]]:
    """The operator, its inputs with the state last, and the name of the state."""
    operator, widths, _ = CASES[case]
    inputs = fla_kernels.example(operator.__name__, widths, seed=3, batch=batch, tokens=tokens)
    return operator, inputs, {"state": "initial_state" if case == "slots" else "initial_state_BHKV"}


@every_kernel
@pytest.mark.parametrize("options", [{}, {"documents_BT": DOCUMENTS}, {"scale": 0.7}], ids=["rows", "packed", "scaled"])
def test_outputs_states_and_gradients_are_those_of_the_torch_form(stub: Stub, case: str, options: dict[str, Any]) -> None:
    operator, inputs, word = _inputs(case, batch=3)
    with backends.use("torch"):
        expected = results(operator, inputs, torch.float64, **word, **options)
    assert not stub.calls
    with backends.use("fla"):
        found = results(operator, inputs, torch.float32, **word, **options)
    assert stub.functions[-1] == CASES[case][2]
    assert_equal(found, expected, 2e-5)


@every_kernel
def test_without_a_state_rows_start_from_nothing(stub: Stub, case: str) -> None:
    operator, inputs, _ = _inputs(case, batch=3)
    for options in ({}, {"documents_BT": DOCUMENTS}):
        with backends.use("torch"):
            expected = operator(*(x.double() for x in inputs[:-1]), **options)
        with backends.use("fla"):
            assert_equal(operator(*inputs[:-1], **options), expected, 1e-5)
    assert stub.functions[-1] == CASES[case][2]


@every_kernel
def test_bf16_rows_keep_their_gates_in_fp32(stub: Stub, case: str) -> None:
    operator, inputs, _ = _inputs(case)
    q, k, v, *gates, _ = inputs
    o, state = operator(q, k, v.bfloat16(), *gates)
    name, call = stub.calls[-1]
    assert name == CASES[case][2] and o.dtype == torch.bfloat16 and state.dtype == torch.float32
    dtypes = [x.dtype for x in call["inputs"]]
    assert dtypes[:3] == [torch.bfloat16] * 3
    # Decays, and the write strengths of the delta rules; what a kernel multiplies in tiles has the dtype of v.
    assert dtypes[3:].count(torch.float32) == (2 if case in ("gated delta", "kimi") else 1)


@pytest.mark.parametrize("defect", ["state", "scale", "boundaries", "backward"])
def test_a_kernel_that_is_wrong_here_is_not_taken(stub: Stub, defect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its state transposed, its scale off by a tenth, its documents run together, or an error that only the backward pass would raise."""
    stub.defect = defect
    inputs = fla_kernels.example("gated_delta_rule", (16, 16, 16), tokens=30)
    leaves = [x.requires_grad_() for x in (*inputs[:2], inputs[2].bfloat16(), *inputs[3:])]
    options = {"initial_state_BHKV": leaves[-1], "documents_BT": DOCUMENTS[:2]}
    words = {
        "backward": "RuntimeError: Triton >= 3.4.0",
        "scale": "output is 0.1",
        "state": "output is",
        "boundaries": "output is",
    }
    with pytest.warns(RuntimeWarning, match=words[defect]):
        o, _ = gated_delta_rule(*leaves[:-1], **options)
    with backends.use("torch"):
        assert torch.equal(o, gated_delta_rule(*leaves[:-1], **options)[0])
    tried = len(stub.calls)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gated_delta_rule(*leaves[:-1], **options)
    assert len(stub.calls) == tried, "the case is tried once"
    monkeypatch.setenv(backends.VARIABLE, "fla")
    with pytest.raises(RunError, match=r"gated_delta_rule \(widths 16, 16, 16, bfloat16\).*LIMBECK_BACKEND=auto"):
        gated_delta_rule(*leaves[:-1], **options)


def test_what_is_not_covered_stays_on_torch(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    def goes_there(widths: tuple[int, ...] = (16, 16, 16), dtype: torch.dtype = torch.bfloat16, asked: str = "auto") -> bool:
        *inputs, _ = fla_kernels.example("gated_delta_rule", widths, tokens=20)
        before = len(stub.calls)
        with backends.use(asked):
            gated_delta_rule(*inputs[:2], inputs[2].to(dtype), *inputs[3:])
        return len(stub.calls) > before

    assert goes_there() and goes_there(dtype=torch.float16)
    assert not goes_there(asked="torch")
    assert not goes_there((12, 12, 16)) and not goes_there((16, 16, 300), asked="fla")
    assert not goes_there(dtype=torch.float64, asked="fla")
    assert not goes_there(dtype=torch.float32), "the kernels round fp32 to TF32"
    assert goes_there(dtype=torch.float32, asked="fla")
    before, torch.backends.cuda.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision, "tf32"
    try:
        assert goes_there(dtype=torch.float32)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    torch.use_deterministic_algorithms(True)
    try:
        assert not goes_there() and goes_there(asked="fla")
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(backends, "_on_gpu", lambda x: x.is_cuda)
    assert not goes_there() and not goes_there(asked="fla")


def test_a_state_in_fp64_is_not_rounded(stub: Stub) -> None:
    *inputs, state = fla_kernels.example("gated_delta_rule", (16, 16, 16), tokens=20)
    with backends.use("fla"):
        final = gated_delta_rule(*inputs, initial_state_BHKV=state.double())[1]
    assert final.dtype == torch.float64 and not stub.calls


def test_a_package_that_is_absent_or_old_is_named(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    *inputs, _ = fla_kernels.example("gated_delta_rule", (16, 16, 16), tokens=20)
    call = (*inputs[:2], inputs[2].bfloat16(), *inputs[3:])
    for breaks, reason in (("fla", "fla is not installed"), ("triton", "triton is not installed")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, breaks, None)
            _forget()
            gated_delta_rule(*call)
            assert reason in (backends.missing() or "")
            with backends.use("fla"), pytest.raises(RunError, match=reason):
                gated_delta_rule(*call)
    install(monkeypatch, "0.4.1")
    _forget()
    gated_delta_rule(*call)
    assert not stub.calls
    with backends.use("fla"), pytest.raises(RunError, match=r"0\.4\.1 is too old: 0\.6 or later"):
        gated_delta_rule(*call)


def test_a_misspelt_choice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.VARIABLE, "triton")
    with pytest.raises(RunError, match=r"LIMBECK_BACKEND=triton: choose one of auto, torch, fla"):
        gated_delta_rule(*fla_kernels.example("gated_delta_rule", (16, 16, 16), tokens=4)[:-1])


def test_people_are_told_what_runs_here(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backends.describe() == "torch (no CUDA device)"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert backends.describe() == "flash-linear-attention on CUDA where it agrees with torch (LIMBECK_BACKEND=auto)"
    monkeypatch.setitem(sys.modules, "triton", None)
    _forget()
    assert backends.describe().startswith("torch (triton is not installed")
    with backends.use("fla"):
        assert backends.describe().startswith("an error at the first step: LIMBECK_BACKEND=fla, and triton is not installed")


def test_packing_is_worked_out_once_a_batch(stub: Stub) -> None:
    *inputs, _ = fla_kernels.example("gated_delta_rule", (16, 16, 16), tokens=30)
    documents, call = DOCUMENTS[:2].clone(), (*inputs[:2], inputs[2].bfloat16(), *inputs[3:])
    for _ in range(2):
        gated_delta_rule(*call, documents_BT=documents)
    first, second = (stub.calls[i][1]["cu_seqlens"] for i in (-2, -1))
    assert first is second and first.tolist() == [0, 11, 15, 30, 60]
    documents[1, 10:] = 7
    gated_delta_rule(*call, documents_BT=documents)
    assert stub.calls[-1][1]["cu_seqlens"].tolist() == [0, 11, 15, 30, 40, 60]


SOFTMAX = {"swa", "path"}
"""Mixers that are softmax attention, for which there is nothing to take."""


@pytest.mark.parametrize("kind", [kind for kind in MIXERS if kind not in SOFTMAX])
def test_every_recurrent_mixer_runs_on_a_kernel(stub: Stub, kind: str) -> None:
    base: Any = tiny_model("llama3", hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    view = attention_view(base, 0)
    mixer: Any = MIXERS.build(MIXERS.options(kind).model_validate({"kind": kind}), view.facts, base.config, 0)
    mixer.init_from(view)
    x = torch.randn(2, 30, 64, generator=torch.Generator().manual_seed(0))
    rope = base.model.rotary_emb(x, torch.arange(30).expand(2, 30))
    made = {}
    for asked in ("torch", "fla"):
        with backends.use(asked), torch.no_grad():
            made[asked] = mixer(x, position_embeddings=rope, documents_BT=DOCUMENTS[:2])[0]
    assert len([name for name, call in stub.calls if call["inputs"][0].shape[1] == 60]) == 1
    assert_equal([made["fla"]], [made["torch"]], 1e-4)


def test_the_gpu_benchmark_measures_both_backends_and_refuses_without_a_gpu(
    stub: Stub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own code, on the stand-in; two mixers are enough for that."""
    from benchmarks.gpu_fla import run

    monkeypatch.setattr(run, "MIXERS", {kind: None for kind in ("gated_deltanet", "path", "gla")})
    size = {**run.QUICK, "operator": {"batch": 1, "tokens": 20, "heads": 1, "width": 16}, "sequence": 24, "repeats": 1}
    rows = run.operator_rows(size["operator"], 1, "cpu")
    steps, parameters = run.step_rows(size, "cpu")
    criteria = {line["name"]: line for line in run.criteria_of(rows + steps, parameters)}
    assert {row["mixer"] for row in steps} == {"gated_deltanet", "gla"} and len(rows) == 4 * len(run.OPERATORS)
    assert criteria["worst distance of an output"]["holds"] and criteria["worst distance of a gradient"]["holds"]
    assert "chunk_gla" in stub.functions
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main([]) == [] and "no CUDA device: nothing is measured" in capsys.readouterr().out
