"""Recall probes: made-up rows whose answer can only be found by looking back, by task and distance.

Plain perplexity hardly moves when a hybrid loses its retrieval layer; these do.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from limbeck.config.parts.stages import RecallOptions
from limbeck.data.recall import probe
from limbeck.engine.parallel import World
from limbeck.evaluation.perplexity import CrossEntropyTally
from limbeck.models.head import head_of
from limbeck.models.packed import forward_packed
from limbeck.types import IGNORE, Batch

TOKENS_A_FORWARD = 8192


def probe_batch(task: str, distance: int, rows: int, ids: np.ndarray, *, seed: int) -> Batch:
    """One probe as a batch of single-document rows; labels stand at the answers only.

    The seed of a probe depends on its task and distance and on nothing else of the run, so a model meets the same rows
    whatever is evaluated beside it.
    """
    input_ids, answers = probe(task, distance, rows, ids=ids, seed=zlib.crc32(f"{task}/{distance}/{seed}".encode()))
    input_ids_BT = torch.as_tensor(input_ids, dtype=torch.long)
    answers_BT = torch.as_tensor(answers, dtype=torch.bool)
    labels_BT = torch.where(answers_BT, input_ids_BT.roll(-1, 1), IGNORE)
    labels_BT[:, -1] = IGNORE
    positions_BT = torch.arange(input_ids_BT.shape[1]).expand_as(input_ids_BT)
    return Batch(input_ids_BT, labels_BT, positions_BT.contiguous(), torch.zeros_like(input_ids_BT))


@torch.no_grad()
def recall(
    model: PreTrainedModel,
    options: RecallOptions,
    ids: np.ndarray,
    *,
    seed: int = 0,
    world: World | None = None,
    done: Callable[[int], object] = lambda rows: None,
) -> list[dict[str, Any]]:
    """Greedy accuracy and cross-entropy at the asked tokens, one row a task and distance; of several ranks each runs its share of the rows.

    ``ids`` are the tokenizer's ordinary ones.  The head meets the answer positions only.  ``count`` is the number of asked
    tokens, ``length`` the tokens of a probe row.  ``done`` hears of rows as they are measured, over all ranks.
    """
    ids, results = ids[: options.vocabulary], []
    world = world or World(model.device)
    for task in options.tasks:
        for distance in options.distances:
            batch, tally = probe_batch(task, distance, options.rows, ids, seed=seed), CrossEntropyTally()
            length = batch.input_ids_BT.shape[1]
            parts = batch.split(max(1, min(TOKENS_A_FORWARD // length, -(-options.rows // world.size))))
            for part in parts[world.rank :: world.size]:
                part = part.to(model.device)
                tally.add(forward_packed(model, part), head_of(model), part.labels_BT)
                done(len(part.input_ids_BT) * world.size)
            found = tally.over(world).result()
            results.append(
                {
                    "task": task,
                    "distance": distance,
                    "accuracy": found["accuracy"],
                    "ce": found["ce"],
                    "count": found["tokens"],
                    "length": length,
                }
            )
    return results
