"""Made-up documents and teacher answers for the tests of the signal store."""

from __future__ import annotations

import numpy as np

from limbeck.teachers.documents import Ask, TopKRows
from limbeck.teachers.store.codecs import Layout, log_sum
from limbeck.teachers.store.manifest import Identity

QWEN = 151_936
"""Vocabulary of the bounds in bytes."""


def identity(**changes: object) -> Identity:
    """A small store's."""
    held: dict[str, object] = {
        "teacher": {"model.safetensors": "ab12", "dtype": "float32"},
        "vocabulary": 500,
        "k": 8,
        "temperatures": (1.0, 2.0),
        "codec": "compact",
    }
    return Identity(**{**held, **changes})  # type: ignore[arg-type]


def document(rng: np.random.Generator, length: int, vocabulary: int = 500, *, share: float = 1.0, domain: int = 0) -> Ask:
    """Random ids; ``share`` of all positions but the last are asked about."""
    positions = np.flatnonzero(rng.random(max(length - 1, 0)) < share)
    return Ask(rng.integers(0, vocabulary, length).astype(np.int32), positions.astype(np.int32), domain)


def answers(rng: np.random.Generator, rows: int, layout: Layout, *, peak: float = 0.0, slope: float = 1.3) -> TopKRows:
    """Rows as language models give them: a power law over ranks with noise, on shuffled ids; ``peak`` lifts one id of each."""
    ids, logits, log_z, samples = [], [], [], []
    law = rng.permutation(12 - slope * np.log(np.arange(1, layout.vocabulary + 1))).astype(np.float32)
    for _ in range(rows):
        z = np.roll(law, rng.integers(layout.vocabulary)) + rng.standard_normal(layout.vocabulary, np.float32)
        z[rng.integers(layout.vocabulary)] += peak
        kept = np.argpartition(-z, min(layout.k, layout.vocabulary - 1))[: layout.k]
        kept = kept[np.argsort(-z[kept], kind="stable")]
        ids.append(kept)
        logits.append(z[kept])
        log_z.append([log_sum(z[None], t)[0] for t in layout.temperatures])
        samples.append(rng.integers(0, layout.vocabulary, layout.samples))
    shape = (rows, layout.k)
    return TopKRows(
        np.array(ids, np.int32).reshape(shape),
        np.array(logits, np.float32).reshape(shape),
        np.array(log_z, np.float32).reshape(rows, len(layout.temperatures)),
        np.array(samples, np.int32).reshape(rows, layout.samples) if layout.samples else None,
    )


def by_id(rows: TopKRows) -> tuple[np.ndarray, np.ndarray]:
    """Ids in rising order, and their logits: rows of the same level may come in another order."""
    order = np.argsort(rows.ids_mK, axis=1, kind="stable")
    return np.take_along_axis(rows.ids_mK, order, 1), np.take_along_axis(rows.logits_mK, order, 1)


def kept_kl(true: TopKRows, stored: TopKRows, column: int, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """KL in nats of what is stored from the truth over the kept ids and the rest, and the difference of the kept masses, ``[m]``."""
    masses, logs = [], []
    for rows in (true, stored):
        ids, logits = by_id(rows)
        logs.append(logits.astype(np.float64) / temperature - rows.log_z_mZ[:, [column]])
        masses.append(np.exp(logs[-1]).sum(1))
        assert (ids == by_id(true)[0]).all()
    p = np.exp(logs[0])
    rest = [np.clip(1 - mass, 1e-12, None) for mass in masses]
    kl = (p * (logs[0] - logs[1])).sum(1) + rest[0] * np.log(rest[0] / rest[1])
    return kl, masses[1] - masses[0]
