"""How long it takes: operations a token, against what a device computes and reads in a second."""

from __future__ import annotations

from dataclasses import dataclass

from limbeck.planner.architecture import MATMUL, Architecture, layer_of
from limbeck.planner.devices import Device
from limbeck.planner.mixers import mixer_flops
from limbeck.planner.storage import wide
from limbeck.planner.students import Student

MFU = 0.4
"""Share of a device's peak that training reaches, where nobody says another."""
LAUNCH = 1e-3
"""Seconds that a decoder layer takes at least for a pass forward and back, however small it is: kernels must be started (an estimate)."""
FORWARD, INPUTS_ALONE = 1.0, 1.0
"""Operations of a pass over those of a forward pass: gradients of inputs cost one, those of weights one more."""


def forward_flops(model: Architecture, context: float) -> float:
    """Operations of one token's forward pass in a row of ``context`` tokens (a multiply-add is two): two for each active matrix entry, and
    attention over half the row on average."""
    shares = {layer.index: layer.experts.chosen / layer.experts.number for layer in model.layers if layer.experts}
    matrices = sum(w.count * (shares[layer_of(w.name)] if w.kind == "experts" else 1.0) for w in model.weights if w.kind in MATMUL)
    total = 2.0 * (matrices + (model.head if model.tied else 0))
    for layer in model.layers:
        a, net = layer.attention, layer.deltanet
        if net is not None:
            total += 7.0 * net.value_heads * net.key_dim * net.value_dim
        elif layer.mixer is not None and a is not None:
            total += mixer_flops(layer.mixer, a, context / 2)
        elif a is not None:
            total += 4.0 * a.width * min(context / 2, a.window or context)
    return total


def training_flops(student: Student, context: float, recompute: bool, trained_share: float = 1.0) -> float:
    """Operations of a token that trains: forward, backward, and the forward once more where layers are recomputed.

    Gradients of frozen weights are not made, and under a generator the whole base is frozen.
    """
    forward = forward_flops(student.architecture, context)
    weights = 0.0 if student.network is not None else trained_share
    return forward * (FORWARD + INPUTS_ALONE + weights + (1.0 if recompute else 0.0))


@dataclass(frozen=True)
class Rate:
    """Time of a step."""

    compute: float
    """Seconds of operations at peak x MFU."""
    memory: float
    """Seconds of reading weights and writing optimiser state at the memory's bandwidth."""
    seconds: float
    tokens: float
    """A second, over all ranks."""

    @property
    def bound(self) -> str:
        """What takes the time."""
        if self.seconds > max(self.compute, self.memory):
            return "launch"
        return "compute" if self.compute >= self.memory else "memory"


def step_rate(
    tokens: float, flops: float, weights: float, trained: float, passes: int, layers: int, ranks: int, device: Device, precision: str, mfu: float
) -> Rate:
    """A step of ``tokens`` over all ranks, each token ``flops`` operations.

    Weights (bytes of a rank's share gathered for a pass) are read once forward and twice backward by each of ``passes``, the optimiser reads
    and writes weight, gradient and state of the ``trained`` numbers of a rank.
    """
    compute = tokens * flops / (ranks * device.peak(precision) * mfu)
    traffic = passes * 3 * weights + trained * wide(precision) * 6
    memory = traffic / device.bandwidth
    seconds = max(compute, memory, passes * layers * LAUNCH)
    return Rate(compute, memory, seconds, tokens / seconds)


def scoring_rate(model: Architecture, context: float, device: Device, gpus: int, dtype: str, mfu: float) -> float:
    """Tokens a second that a served or local teacher scores (prefill): operations alone, since thousands of tokens share one reading."""
    precision = {"fp8": "fp8", "fp32": "float32", "float32": "float32"}.get(dtype, "bfloat16")
    return gpus * device.peak(precision) * mfu / forward_flops(model, context)
