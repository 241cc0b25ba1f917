"""Doubly stochastic matrices and the mixing of residual streams against loops in fp64."""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from limbeck.config.parts.surgeries import HyperConnectionsOptions
from limbeck.ops.hyper_connections import mix, permutation_mixture, sinkhorn
from limbeck.students.hyper_connections import Connection, Streams

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp64"])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """One matrix at a time, by division."""
    found = logits.double().exp().reshape(-1, *logits.shape[-2:]).clone()
    for matrix in found:
        for _ in range(iterations):
            for column in range(matrix.shape[1]):
                matrix[:, column] /= sum(float(x) for x in matrix[:, column])
            for row in range(matrix.shape[0]):
                matrix[row] /= sum(float(x) for x in matrix[row])
    return found.view(logits.shape)


def naive_mixture(logits: Tensor, streams: int) -> Tensor:
    """One permutation at a time."""
    rows = []
    for row in logits.double().reshape(-1, logits.shape[-1]):
        powers = [math.exp(float(x)) for x in row]
        matrix = torch.zeros(streams, streams, dtype=torch.float64)
        for power, order in zip(powers, permutations(range(streams)), strict=True):
            for i, j in enumerate(order):
                matrix[i, j] += power / sum(powers)
        rows.append(matrix)
    return torch.stack(rows).view(*logits.shape[:-1], streams, streams)


@DTYPES
@pytest.mark.parametrize("streams", [2, 4])
@pytest.mark.parametrize("iterations", [1, 3, 20])
def test_sinkhorn_is_the_loop_of_divisions(streams: int, iterations: int, dtype: torch.dtype) -> None:
    logits = 2 * normal(3, 5, streams, streams)
    found = sinkhorn(logits.to(dtype), iterations)
    assert (found - naive_sinkhorn(logits, iterations)).abs().max() <= TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize("streams", [2, 4])
def test_a_mixture_of_permutations_is_the_loop_over_them(streams: int, dtype: torch.dtype) -> None:
    logits = 2 * normal(3, 5, math.factorial(streams))
    assert (permutation_mixture(logits.to(dtype), streams) - naive_mixture(logits, streams)).abs().max() <= TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize("streams", [2, 4])
@pytest.mark.parametrize("spread", [1.0, 100.0], ids=["mild", "far apart"])
def test_matrices_are_doubly_stochastic(streams: int, spread: float, dtype: torch.dtype) -> None:
    """A mixture of permutations always; Sinkhorn's rows always and its columns as far as the iterations go."""
    mixture = permutation_mixture(spread * normal(64, math.factorial(streams)).to(dtype), streams)
    balanced = sinkhorn(spread * normal(64, streams, streams).to(dtype), 20)
    for matrix in (mixture, balanced):
        assert bool(matrix.isfinite().all()) and bool((matrix >= 0).all())
        assert (matrix.sum(-1) - 1).abs().max() <= TOLERANCE[dtype]
    assert (mixture.sum(-2) - 1).abs().max() <= TOLERANCE[dtype]
    if spread == 1:
        assert (balanced.sum(-2) - 1).abs().max() <= 2e-3 and (balanced.sum(-2) - 1).abs().mean() <= 1e-4


def test_gradients_are_those_of_finite_differences() -> None:
    square, powers, x = normal(2, 3, 4, 4), normal(2, 3, 24, seed=1), normal(2, 3, 4, 5, seed=2)
    inputs = [t.requires_grad_() for t in (square, powers, x)]
    assert torch.autograd.gradcheck(lambda a, b, c: mix(sinkhorn(a, 20) + permutation_mixture(b, 4), c), inputs)


def test_mixing_is_a_matrix_product_that_autocast_does_not_round() -> None:
    weights, x = normal(2, 7, 3, 4).float(), normal(2, 7, 4, 9, seed=1).float()
    wanted = weights.double() @ x.double()
    assert (mix(weights, x) - wanted).abs().max() <= 2e-6
    with torch.autocast("cpu", torch.bfloat16):
        found = mix(weights, x)
    assert found.dtype == torch.float32 and (found - wanted).abs().max() <= 2e-6
    assert mix(weights, x.bfloat16()).dtype == torch.float32


def naive_sublayer(x_BTSD: Tensor, y_BTD: Tensor, connection: Connection) -> tuple[Tensor, Tensor]:
    """``h_pre X`` and ``H_res X + h_post (outer) y``, a token and a number at a time."""
    batch, length, streams, width = x_BTSD.shape
    read, written = torch.zeros(batch, length, width, dtype=torch.float64), torch.zeros_like(x_BTSD)
    for b in range(batch):
        for t in range(length):
            x, logits = x_BTSD[b, t], connection.bias.detach().clone()
            if connection.dynamic:
                mean = sum(x[s] for s in range(streams)) / streams
                mean = mean / math.sqrt(float((mean * mean).mean()) + 1e-6)
                made = connection.weight.detach() @ mean
                parts = [a * p for a, p in zip(connection.alpha.detach(), made.split(connection.sizes), strict=True)]
                logits = logits + torch.cat(parts)
            pre, post, res = logits.split(connection.sizes)
            matrix = naive_sinkhorn(res.view(streams, streams), 20) if connection.mixing == "sinkhorn" else naive_mixture(res, streams)
            for s in range(streams):
                read[b, t] += x[s] / (1 + math.exp(-float(pre[s])))
                written[b, t, s] = sum(matrix[s, j] * x[j] for j in range(streams)) + 2 / (1 + math.exp(-float(post[s]))) * y_BTD[b, t]
    return read, written


@pytest.mark.parametrize("streams", [2, 4])
@pytest.mark.parametrize("mixing", ["sinkhorn", "permutation"])
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_a_sublayer_reads_and_writes_streams_as_the_papers_have_it(streams: Any, mixing: Any, dynamic: bool) -> None:
    connection = Connection(HyperConnectionsOptions(streams=streams, mixing=mixing, dynamic=dynamic), 6, place=1).double()
    with torch.no_grad():
        for number, parameter in enumerate(connection.parameters()):
            parameter.add_(normal(*parameter.shape, seed=number + 5))
    x, y = normal(2, 3, streams, 6), normal(2, 3, 6, seed=1)
    read, written = naive_sublayer(x, y, connection)
    with torch.no_grad():
        streams_before = Streams(x)
        assert (streams_before.read(connection) - read).abs().max() <= 1e-13
        after = streams_before + y
    assert isinstance(after, Streams) and (after.x_BTSD - written).abs().max() <= 1e-13
