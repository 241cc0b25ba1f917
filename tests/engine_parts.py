"""Small parts that the engine's tests train: a student of torch layers alone, dense objectives, rows in memory."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.config.parts.stages import GroupOptions, LoopOptions, OptimOptions
from limbeck.engine.loop import Trainer
from limbeck.engine.parallel import World
from limbeck.engine.step import StreamingTrainStep, TrainStep
from limbeck.needs import HeadHidden, Need
from limbeck.types import IGNORE, Batch, Head, LossTerm, Output, Signal, Visit

VOCAB = 61

# DCP logs two debug records a tensor, which pytest would print below every failure.
logging.disable(logging.DEBUG)


class Mixer(nn.Module):
    """A stand-in for attention: ``forward(hidden) -> (out, None)``."""

    def __init__(self, width: int):
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        return self.outer(torch.tanh(self.inner(x_BTD))), None


class Block(nn.Module):
    """Residual MLP over a causal running mean and a mixer, so that positions and nested units matter."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.mixer = Mixer(width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTD: Tensor, *, positions_BT: Tensor) -> Tensor:
        mean_BTD = x_BTD.cumsum(1) / torch.arange(1, x_BTD.shape[1] + 1, device=x_BTD.device)[:, None]
        mean_BTD = mean_BTD + self.mixer(x_BTD, positions_BT=positions_BT)[0]
        # Not a constant over the width, which the norm would take out again.
        first_BTD = (positions_BT[..., None] == 0) * torch.linspace(-1, 1, x_BTD.shape[-1], dtype=x_BTD.dtype)
        h = self.norm(x_BTD + mean_BTD + first_BTD)
        return x_BTD + self.dropout(self.down(F.gelu(self.up(h))))


class Student(nn.Module):
    """Embedding, blocks, final norm, tied head."""

    def __init__(
        self, width: int = 16, num_blocks: int = 2, dropout: float = 0.0, seed: int = 0, dtype: torch.dtype = torch.float32
    ):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(VOCAB, width)
            self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(num_blocks))
            self.norm = nn.LayerNorm(width)
        self.to(dtype)

    def forward(self, batch: Batch) -> Output:
        x_BTD = self.embedding(batch.input_ids_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD, positions_BT=batch.position_ids_BT)
        return Output(self.norm(x_BTD), Head(self.embedding.weight))

    def units(self) -> list[nn.Module]:
        return [*self.mixers().values(), *self.blocks]

    def mixers(self) -> dict[int, nn.Module]:
        return {i: block.mixer for i, block in enumerate(self.blocks)}


def dense_logits(output: Output) -> Tensor:
    return output.hidden_BTD @ output.head.weight_VD.T.to(output.hidden_BTD.dtype)


class DenseCE:
    """Next-token cross-entropy with the logits in full."""

    name = "ce"

    def __init__(self, weight: float = 1.0):
        self.weight = weight

    def count(self, batch: Batch) -> Tensor:
        return batch.label_mask_BT.sum()

    def __call__(self, output: Output, signal: Signal, batch: Batch) -> LossTerm:
        logits = dense_logits(output)
        wide = logits.double() if logits.dtype == torch.float64 else logits.float()
        total = F.cross_entropy(wide.flatten(0, 1), batch.labels_BT.flatten(), ignore_index=IGNORE, reduction="sum")
        hits = ((wide.argmax(-1) == batch.labels_BT) & batch.label_mask_BT).sum()
        return LossTerm(total, {"ce": (total.detach(), self.count(batch)), "accuracy": (hits, self.count(batch))})


class DenseKL(DenseCE):
    """Forward KL to a teacher's hidden states and head."""

    name = "kl"

    def __call__(self, output: Output, signal: Signal, batch: Batch) -> LossTerm:
        mine = dense_logits(output)[batch.label_mask_BT].log_softmax(-1)
        theirs = dense_logits(signal[HeadHidden])[batch.label_mask_BT].log_softmax(-1)
        total = (theirs.exp() * (theirs - mine)).sum()
        return LossTerm(total, {"kl": (total.detach(), self.count(batch))})


class Teacher:
    """A frozen student: answers hidden states, and streams its blocks as if they were attention."""

    def __init__(self, **options: Any):
        self.module = Student(**options)

    def signal(self, batch: Batch, needs: Mapping[type[Need], Need]) -> Signal:
        return Signal({HeadHidden: self.module(batch)})

    def stream(self, batch: Batch, visit: Visit) -> None:
        handles = [
            block.register_forward_hook(lambda m, args, kwargs, out, layer=i: visit(layer, args[0], out, {}), with_kwargs=True)
            for i, block in enumerate(self.module.blocks)
        ]
        try:
            self.module(batch)
        finally:
            for handle in handles:
                handle.remove()


class Align:
    """Squared error of each mixer's output over the layer's teacher power."""

    name = "align"
    calibration_batches = 2

    def __init__(self) -> None:
        self.weight = 1.0
        self.power: dict[str, Tensor] = {}

    def count(self, batch: Batch) -> Tensor:
        return batch.token_mask_BT.sum()

    def calibrate(self, stream: Any, batches: list[Batch]) -> None:
        def visit(layer: int, x: Tensor, y: Tensor, kwargs: dict[str, Any]) -> None:
            self.power[str(layer)] = self.power.get(str(layer), torch.zeros((), dtype=y.dtype)) + y.square().sum() / 100

        for batch in batches:
            stream(batch, visit)

    def state(self) -> dict[str, Tensor]:
        return dict(self.power)

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.power = dict(state)

    def piece(self, mixer: nn.Module, layer: int, x: Tensor, y: Tensor, kwargs: dict[str, Any], batch: Batch) -> LossTerm:
        mask_BT1 = batch.token_mask_BT[..., None]
        error = ((mixer(x, **kwargs)[0] - y).square() * mask_BT1).sum()
        return LossTerm(error / self.power[str(layer)], {f"residual/{layer}": (error.detach(), y.square().sum())})


class Rows:
    """Random packed rows with ragged documents, padding and masked labels; a few are almost empty."""

    def __init__(self, number: int = 64, sequence: int = 24, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.sequence = sequence
        ids = rng.integers(0, VOCAB, (number, sequence))
        # A learnable rule: every second token repeats the one before it.
        ids[:, 1::2] = ids[:, : sequence - sequence % 2 : 2]
        labels = np.full_like(ids, IGNORE)
        labels[:, :-1] = ids[:, 1:]
        documents = np.zeros_like(ids)
        positions = np.tile(np.arange(sequence), (number, 1))
        for row in range(number):
            cut, end = sorted(rng.integers(2, sequence, 2)) if row % 5 else (2, 3)
            documents[row, cut:] = 1
            positions[row, cut:] = np.arange(sequence - cut)
            documents[row, end:] = -1
            positions[row, end:] = np.arange(sequence - end)
            labels[row, [cut - 1, end - 1]] = IGNORE
            labels[row, end:] = IGNORE
        self.ids, self.labels, self.positions, self.documents = (
            torch.from_numpy(a.astype(np.int64)) for a in (ids, labels, positions, documents)
        )

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, indices: Any) -> Batch:
        index = torch.as_tensor(np.asarray(indices, dtype=np.int64))
        return Batch(self.ids[index], self.labels[index], self.positions[index], self.documents[index])


class Loader:
    """Rows in a shuffled order by (epoch, step, rank) arithmetic; the last step of an epoch may be short."""

    def __init__(self, rows: Rows, rows_per_step: int, seed: int = 0, rank: int = 0, world: int = 1):
        self.rows, self.rows_per_step, self.seed, self.rank, self.world = rows, rows_per_step, seed, rank, world
        self.step = 0

    def next_step(self) -> Batch:
        per_epoch = -(-len(self.rows) // self.rows_per_step)
        epoch, step = divmod(self.step, per_epoch)
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.rows))
        mine = order[step * self.rows_per_step : (step + 1) * self.rows_per_step][self.rank :: self.world]
        self.step += 1
        return self.rows.batch(mine)

    def state(self) -> dict[str, int]:
        return {"step": self.step}

    def restore(self, state: dict[str, int]) -> None:
        self.step = state["step"]


def make_step(kind: str = "ce", *, dropout: float = 0.0, dtype: torch.dtype = torch.float32, **options: Any) -> TrainStep:
    """A step of each kind: ``ce``, ``kl`` (ce and kl together), ``stream``."""
    student = Student(dropout=dropout, dtype=dtype, **options)
    if kind == "ce":
        return TrainStep(student, [DenseCE()])
    teacher = Teacher(seed=1, dtype=dtype)
    if kind == "kl":
        return TrainStep(student, [DenseCE(0.5), DenseKL()], teacher, {HeadHidden: HeadHidden()})
    student.requires_grad_(False)
    for mixer in student.mixers().values():
        mixer.requires_grad_(True)
    return StreamingTrainStep(student, Align(), teacher)


def make_trainer(
    folder: Path,
    step: TrainStep | None = None,
    *,
    rows: Rows | None = None,
    rows_per_step: int = 10,
    seed: int = 0,
    world: World | None = None,
    optim: dict[str, Any] | None = None,
    lr: float = 1e-2,
    **loop: Any,
) -> Trainer:
    """A trainer of everything that requires a gradient; ``loop`` are LoopOptions."""
    step = step or make_step()
    world = world or World(torch.device("cpu"))
    rows = rows or Rows()
    trained = [(n, p) for n, p in step.student.named_parameters() if p.requires_grad]
    group = GroupOptions(lr=lr, weight_decay=0.1)
    budget = {} if {"tokens", "samples", "epochs"} & loop.keys() else {"steps": 20}
    validation = loop.pop("validation_rows", None)
    extra = {k: loop.pop(k) for k in ("identity", "console") if k in loop}
    return Trainer(
        step,
        Loader(rows, rows_per_step, seed=seed, rank=world.rank, world=world.size),
        groups=[(group, trained)],
        optim_options=OptimOptions(groups=(group,), **(optim or {})),
        loop=LoopOptions(**{"precision": "float32", **budget, **loop}),
        folder=folder,
        seed=seed,
        world=world,
        validation_rows=validation,
        **extra,
    )
