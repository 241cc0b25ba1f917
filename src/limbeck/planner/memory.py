"""What one rank's memory holds while a stage trains, item by item, and when it holds most.

A peak is one of four moments: the end of a forward pass (everything it keeps is there), the end of a backward pass (all gradients are), the
optimiser's step (its temporaries), and the writing of a checkpoint (where tensors are copied in the same memory: on a CPU).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from limbeck.planner.activations import Pass, backward_bytes, kept_bytes, mixing_bytes, working_bytes
from limbeck.planner.architecture import MATMUL, Architecture, Weight, layer_of
from limbeck.planner.devices import Device
from limbeck.planner.storage import STATES, wide
from limbeck.planner.students import Student

FUSED = {"kl": 3.0, "reverse_kl": 3.0, "jsd": 4.0, "ce": 1.5, "topk_kl": 1.5, "tether": 3.0}
"""Buffers ``[chunk, V]`` in float32 that a fused loss holds at one time (``limbeck.ops.fused``)."""
DENSE = {"kl": 9, "reverse_kl": 9, "jsd": 17, "ce": 3, "topk_kl": 4, "tether": 9}
"""Copies ``[tokens, V]`` in float32 that the usual implementation holds (measured of TRL's: 9 for KL, 17 for JSD)."""
SAVING = 2
"""Copies of its tensors that a checkpoint's writer holds in host memory: the tensors of a file side by side, and the file's bytes."""
PROCESS = 10e6
"""Bytes of a run's own objects on a CPU, beside what importing everything takes: rows, tokenizer, modules (measured)."""
MOMENTS = ("forward", "backward", "step", "save")


@dataclass(frozen=True)
class Item:
    """Bytes of one rank's memory at each of the moments."""

    name: str
    forward: float = 0.0
    backward: float = 0.0
    step: float = 0.0
    save: float = 0.0
    note: str = ""

    @property
    def most(self) -> float:
        """Bytes when it is largest."""
        return max(self.forward, self.backward, self.step, self.save)


def always(name: str, size: float, note: str = "") -> Item:
    """What is there all the time."""
    return Item(name, size, size, size, size, note)


@dataclass(frozen=True)
class Setting:
    """How a stage runs, as far as memory is concerned."""

    device: Device
    ranks: int
    precision: str
    recompute: bool
    zero_stage: int
    run: Pass
    """The pass over one micro-batch of one rank."""
    passes: int
    """Micro-batches of a step."""

    @property
    def on_cpu(self) -> bool:
        """Whether host and device memory are one."""
        return self.device.name == "cpu"

    @property
    def compute(self) -> int:
        """Bytes of a number in the compute dtype."""
        return 2 if self.precision == "bfloat16" else wide(self.precision)


def chunk_of(objective: Any, device: Device) -> int:
    """Tokens whose logits exist at one time."""
    return objective.chunk or (128 if device.name == "cpu" else 1024)


def weights_items(student: Student, trained: Sequence[Weight], how: Setting) -> list[Item]:
    """Parameters of student and network, and their copies in the compute dtype."""
    model, each = student.architecture, wide(how.precision)
    frozen_each = 2 if student.network is not None and student.frozen_dtype == "bfloat16" else each
    network = student.network.total if student.network is not None else 0
    ours = sum(w.count for w in trained)
    held = model.total * (frozen_each if student.network is not None else each)
    master = ours * each
    items = [always("trained weights", master / how.ranks, f"{'float64' if each == 8 else 'float32'} master weights")]
    if (rest := held + network * each - master) > 0:
        items.append(always("frozen weights", rest / how.ranks, "bfloat16" if frozen_each == 2 and student.network is not None else "float32"))
    copies = copies_bytes(student, frozen_each, how)
    if copies:
        note = "gathered blocks" if how.ranks > 1 else "matrices in bfloat16, kept by autocast" if how.precision == "bfloat16" else "rounded weights"
        items.append(Item("compute copies", copies, copies, 0.0, 0.0, note))
    return items


def copies_bytes(student: Student, frozen_each: int, how: Setting) -> float:
    """Weights a second time: gathered from shards, or cast for products.

    One rank: autocast keeps a bfloat16 copy of every float32 matrix that trains, whether or not layers are recomputed; ternary weights in
    float32 are computed with as copies.  Several ranks: the root (embedding, head, last norm) stays gathered, and of the layers two at a time with
    ZeRO 3 (one in use, one on its way), all with ZeRO 1 and 2; their gradients are whole until they are reduced.
    """
    model = student.architecture
    if how.ranks == 1:
        if how.precision == "bfloat16":
            cast = sum(w.count for w in model.weights if w.kind in MATMUL and w.kind != "head" and layer_of(w.name) >= 0)
            if student.network is not None:
                # Frozen ones are cast anew for each use, and are kept for the way back unless the layer is computed again.
                cast = 0 if frozen_each == 2 else cast // (len(model.layers) if how.recompute else 1)
            return 2.0 * cast
        ternary = sum(w.count for w in student.ternary)
        return float(wide(how.precision)) * ternary / (len(model.layers) if how.recompute else 1)
    # Ternary weights and several residual streams must not be gathered rounded: other codes would train than are exported.
    precise = bool(student.ternary) or student.streams > 1
    width = frozen_each if student.network is not None else wide(how.precision) if precise else how.compute
    layers = [sum(w.count for w in model.weights if layer_of(w.name) == layer.index) for layer in model.layers]
    root = sum(w.count for w in model.weights if layer_of(w.name) < 0)
    gathered = sum(layers) if how.zero_stage < 3 else 2 * max(layers)
    network = student.network.total * wide(how.precision) if student.network is not None else 0
    gradients = max(layers) * (how.compute + 4) if student.network is None else 0
    rounded = how.compute * sum(w.count for w in student.ternary) / (len(model.layers) if how.recompute else 1)
    return width * (root + gathered) + network + gradients + rounded


def optimiser_items(groups: Sequence[tuple[Any, Sequence[Weight]]], how: Setting) -> list[Item]:
    """Gradients, the optimiser's numbers, and what its step holds for a moment."""
    each = float(wide(how.precision))
    trained = sum(w.count for _, members in groups for w in members) * each
    states = sum(STATES[g.kind] * w.count for g, members in groups for w in members) * each
    kinds = " + ".join(dict.fromkeys(g.kind for g, members in groups if members))
    gradients = trained / how.ranks
    whole = how.passes > 1
    return [
        # With one micro-batch, gradients take the place of what the forward pass kept.
        Item(
            "gradients", gradients if whole else 0.0, gradients, gradients, 0.0, "summed over micro-batches" if whole else "made in the backward pass"
        ),
        always("optimiser", states / how.ranks, kinds),
        Item("optimiser's step", 0.0, 0.0, step_bytes(groups, how) / how.ranks, 0.0, "updates of Muon and Lion"),
    ]


def step_bytes(groups: Sequence[tuple[Any, Sequence[Weight]]], how: Setting) -> float:
    """Temporaries of a step over all ranks: Muon's and Lion's updates are as large as their parameters; Muon's orthogonal ones come in
    stacks of one shape.  AdamW is fused."""
    each, total = float(wide(how.precision)), 0.0
    for group, members in groups:
        count = sum(w.count for w in members)
        if group.kind == "lion":
            total += each * count
        elif group.kind == "muon":
            shapes: dict[tuple[int, ...], int] = {}
            for w in members:
                shapes[w.shape[-2:]] = shapes.get(w.shape[-2:], 0) + w.count
            total += each * (count + max(shapes.values(), default=0))
    return total


def loss_items(model: Architecture, objectives: Iterable[Any], trains_head: bool, how: Setting) -> list[Item]:
    """Workspace of the fused losses: chunks of logits, the head in the compute dtype, the head's and the hidden states' gradients."""
    largest, note = 0.0, ""
    each = wide(how.precision)
    for objective in objectives:
        if objective.kind not in FUSED or getattr(objective, "weight", 1) == 0:
            continue
        chunk = min(chunk_of(objective, how.device), how.run.tokens)
        buffers = chunk * model.vocabulary * (each * FUSED[objective.kind] + (how.compute if how.compute < each else 0))
        if buffers > largest:
            largest, note = buffers, f"{chunk:,} tokens' logits at a time ({objective.kind})"
    if not largest:
        return []
    heads = 2.0 * model.head if how.compute < each else 0.0
    kept = how.run.tokens * model.hidden * each + (model.head * float(each) if trains_head else 0.0)
    return [
        Item("logits workspace", largest + heads, 0.0, 0.0, 0.0, note),
        Item("gradients of head and hidden states", kept, kept, 0.0, 0.0, "kept by the fused loss"),
    ]


def dense_logits(model: Architecture, kind: str, tokens: int) -> float:
    """Bytes of a loss that holds ``[tokens, V]``: what the fused ones save."""
    return float(DENSE.get(kind, 3)) * tokens * model.vocabulary * 4


def pass_items(student: Student, how: Setting) -> list[Item]:
    """What a forward pass of the student keeps, and what one layer's way back holds beside it."""
    model, run = student.architecture, how.run
    kept = kept_bytes(model, run, how.recompute) * run.tokens
    note = "layer inputs, one layer whole" if how.recompute else "all layers"
    left = kept if how.recompute else kept / max(1, len(model.layers))
    passing = backward_bytes(model, run) * run.tokens
    return [
        Item("activations", kept, left, 0.0, 0.0, note),
        Item("a layer's passing tensors", passing, passing, 0.0, 0.0, "gradients of activations"),
    ]


def of_a_process(items: Iterable[Item], how: Setting) -> list[Item]:
    """The items of one rank, on a CPU with the run itself."""
    return [always("the run itself", PROCESS, "rows, tokenizer, modules"), *items] if how.on_cpu else list(items)


def stream_items(student: Student, how: Setting) -> list[Item]:
    """An alignment stage: the teacher runs without gradients, and one mixer's graph exists at a time."""
    model, run = student.architecture, how.run
    mixing = max((mixing_bytes(layer, run) for layer in model.layers if layer.mixer is not None), default=0.0) * run.wide
    kept = (mixing + 16.0 * model.hidden) * run.tokens
    teacher = working_bytes(model, run) * run.tokens
    return [
        Item("activations", kept, kept, 0.0, 0.0, "one mixer's graph at a time"),
        Item("teacher's pass", teacher, teacher, 0.0, 0.0, "no gradients"),
    ]


def network_items(student: Student, how: Setting, text: tuple[int, int]) -> list[Item]:
    """A generator's own activations, and the LoRAs that it writes for the rows of a micro-batch."""
    network = student.network
    if network is None:
        return []
    each = wide(how.precision)
    rows = how.run.rows
    # Queries go through residual blocks with an MLP four times as wide; condition states are read once.
    queries = rows * network.queries * network.width * network.blocks * 14 * each
    states = rows * text[0] * text[1] * (student.architecture.hidden + 8 * network.width) * each
    loras = rows * network.lora * 3 * each
    return [Item("generator", queries + states + loras, queries + states + loras, 0.0, 0.0, "queries, condition states, LoRAs of a micro-batch")]


def teacher_items(model: Architecture, dtype: str, how: Setting, same: bool = False) -> list[Item]:
    """A frozen teacher in the same process: weights, gathered blocks on several ranks, its pass, and its hidden states."""
    width = 2 if dtype == "bfloat16" else wide(how.precision)
    layers = [sum(w.count for w in model.weights if layer_of(w.name) == layer.index) for layer in model.layers]
    root = sum(w.count for w in model.weights if layer_of(w.name) < 0)
    gathered = width * (root + 2 * max(layers)) if how.ranks > 1 else 0
    items = [always("teacher", model.total * width / how.ranks, dtype)]
    if same:
        return items
    out = how.run.tokens * model.hidden * (2 if dtype == "bfloat16" else 4)
    cast = 2.0 * model.head if how.precision == "bfloat16" and dtype != "bfloat16" else 0.0
    return [*items, Item("teacher's pass", gathered + out + cast, gathered, 0.0, 0.0, "gathered blocks, hidden states")]


def save_item(checkpoint: float, how: Setting) -> Item:
    """Writing a checkpoint where tensors live in host memory."""
    return Item("checkpoint being written", 0.0, 0.0, 0.0, SAVING * checkpoint / how.ranks if how.on_cpu else 0.0, "two copies in host memory")


def peak(items: Sequence[Item]) -> tuple[float, str]:
    """``(bytes, moment)`` of the largest sum."""
    sums = {moment: sum(getattr(item, moment) for item in items) for moment in MOMENTS}
    moment = max(sums, key=lambda name: sums[name])
    return sums[moment], moment
