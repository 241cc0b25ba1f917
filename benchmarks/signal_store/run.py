"""Bytes, KL error and speed of the signal store's codecs beside DistillKit's polynomial format, in one run.

python -m benchmarks.signal_store.run [--quick] [--out FOLDER]

DistillKit's format is our own implementation of it (limbeck.teachers.store.distillkit), which the tests hold against bytes that
DistillKit wrote.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from benchmarks.evidence import criterion, write_results

from limbeck.models.loading import load_tokenizer, resolve_source
from limbeck.needs import TopK
from limbeck.teachers.documents import Ask, TopKRows
from limbeck.teachers.scoring import Scorer
from limbeck.teachers.store.blocks import read_block, whole, write_block
from limbeck.teachers.store.codecs import CODECS, Layout, log_sum
from limbeck.teachers.store.distillkit import Bin, Compression
from limbeck.teachers.store.manifest import Identity
from limbeck.teachers.store.store import SignalStore

SEED = 0
QWEN = 151_936
TEMPERATURES = (1.0, 2.0)
BYTES = {64: 200, 128: 340}
KL = 5e-4
READ = 100_000
MODEL = "builtin:code-2m"


@dataclass(frozen=True)
class Text:
    """Documents with a teacher's rows."""

    name: str
    vocabulary: int
    asks: list[Ask]
    rows: list[TopKRows]

    @property
    def tokens(self) -> int:
        return sum(len(rows) for rows in self.rows)


def made_up(k: int, documents: int, length: int) -> Text:
    """Rows over a vocabulary of 151,936: a power law with noise, of slopes from flat to steep, a tenth of them sure of one id."""
    rng = np.random.default_rng([SEED, k])
    law = rng.permutation(-np.log(np.arange(1, QWEN + 1))).astype(np.float32)
    asks, answers = [], []
    for _ in range(documents):
        kept = []
        for _ in range(length):
            z = rng.uniform(1.0, 2.5) * np.roll(law, rng.integers(QWEN)) + rng.standard_normal(QWEN, np.float32) + 12
            z = z.astype(np.float32)
            z[rng.integers(QWEN)] += 20 * (rng.random() < 0.1)
            ids = np.argpartition(-z, k)[:k]
            ids = ids[np.argsort(-z[ids], kind="stable")]
            kept.append((ids, z[ids], [log_sum(z[None], t)[0] for t in TEMPERATURES]))
        ids, logits, log_z = zip(*kept, strict=True)
        answers.append(TopKRows(np.array(ids, np.int32), np.array(logits, np.float32), np.array(log_z, np.float32)))
        asks.append(Ask(rng.integers(0, QWEN, length + 1).astype(np.int32), np.arange(length, dtype=np.int32)))
    return Text("power law, V = 151,936", QWEN, asks, answers)


def real(k: int, documents: int, length: int) -> Text:
    """What the shipped teacher says about Python's standard library."""
    source = resolve_source(MODEL)
    tokenizer = load_tokenizer(source)
    text = "".join(path.read_text("utf-8") for path in sorted(Path(argparse.__file__).parent.glob("[a-d]*.py")))[: documents * length * 8]
    ids = np.array(tokenizer(text)["input_ids"], np.int32)
    asks = [Ask(ids[i * (length + 1) : (i + 1) * (length + 1)], np.arange(length, dtype=np.int32)) for i in range(documents)]
    asks = [ask for ask in asks if len(ask.ids) == length + 1]
    scorer = Scorer(source)
    scorer.load("cpu")
    return Text("code-2m on code, V = 4,096", 4096, asks, [scorer.score([ask], TopK(k, TEMPERATURES))[0] for ask in asks])


def kl(true: TopKRows, stored: TopKRows, column: int, temperature: float) -> np.ndarray:
    """KL over the kept ids and the rest, nats, ``[m]``."""
    logs = []
    for rows in (true, stored):
        order = np.argsort(rows.ids_mK, axis=1, kind="stable")
        scaled = np.take_along_axis(rows.logits_mK.astype(np.float64), order, 1) / temperature
        logs.append(scaled - rows.log_z_mZ[:, [column]])
    p, rests = np.exp(logs[0]), [np.clip(1 - np.exp(log).sum(1), 1e-9, None) for log in logs]
    return (p * (logs[0] - logs[1])).sum(1) + rests[0] * np.log(rests[0] / rests[1])


def speed(work: Callable[[], Any], tokens: int, repeats: int) -> int:
    """Tokens a second of this thread's CPU time, the median."""
    taken = []
    for _ in range(repeats):
        start = time.thread_time()
        work()
        taken.append(time.thread_time() - start)
    return int(tokens / max(median(taken), 1e-9))


def ours(name: str, text: Text, k: int, repeats: int) -> dict[str, Any]:
    codec, layout = CODECS[name], Layout(k, TEMPERATURES, 0, text.vocabulary)
    pairs = list(zip(text.asks, text.rows, strict=True))
    blocks = [write_block(ask, rows, codec, layout) for ask, rows in pairs]
    stored = [read_block(block, codec, layout).rows for block in blocks]
    # The bound is for one temperature: each more is 4 bytes of logZ.
    single = Layout(k, (1.0,), 0, text.vocabulary)
    once = [TopKRows(r.ids_mK, r.logits_mK, r.log_z_mZ[:, :1]) for r in text.rows]
    size = sum(len(write_block(ask, rows, codec, single)) for ask, rows in zip(text.asks, once, strict=True))

    def read() -> None:
        for block in blocks:
            assert whole(block)
            read_block(block, codec, layout)

    def write() -> None:
        for ask, rows in pairs:
            write_block(ask, rows, codec, layout)

    with tempfile.TemporaryDirectory() as folder:
        identity = Identity({}, text.vocabulary, k, TEMPERATURES, codec=name)
        store = SignalStore(Path(folder) / "s", identity)
        for ask, rows in pairs:
            store.put(ask, rows)
        store.complete()
        store.close()
        opened = SignalStore(Path(folder) / "s")
        fetch = speed(lambda: [opened.get(ask) for ask in text.asks], text.tokens, repeats)
        opened.close()
    row = {"bytes": size / text.tokens, "encode": speed(write, text.tokens, repeats), "decode": speed(read, text.tokens, repeats), "read": fetch}
    for column, temperature in enumerate(TEMPERATURES):
        found = np.concatenate([kl(a, b, column, temperature) for a, b in zip(text.rows, stored, strict=True)])
        row[f"kl_t{temperature:g}"], row[f"kl_t{temperature:g}_worst"] = found.mean(), found.max()
    return row


def theirs(compression: Compression, text: Text, repeats: int) -> dict[str, Any]:
    logs = [TopKRows(r.ids_mK, r.logits_mK - r.log_z_mZ[:, :1], np.zeros((len(r), 1), np.float32)) for r in text.rows]
    packed = [compression.compress(rows) for rows in logs]
    found = np.concatenate([kl(a, compression.expand(*b), 0, 1.0) for a, b in zip(logs, packed, strict=True)])
    return {
        "bytes": float(compression.bytes_per_token),
        "encode": speed(lambda: [compression.compress(rows) for rows in logs], text.tokens, repeats),
        "decode": speed(lambda: [compression.expand(*part) for part in packed], text.tokens, repeats),
        "kl_t1": found.mean(),
        "kl_t1_worst": found.max(),
    }


def peers(k: int, vocabulary: int) -> dict[str, Compression]:
    """What DistillKit's README recommends, and the nearest it has to a byte a value."""
    bins = (Bin("float16", 8, k - 16),)
    return {
        "DistillKit, recommended": Compression(vocabulary, k),
        "DistillKit, 8-bit residuals": Compression(vocabulary, k, residual_bins=bins),
    }


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few documents; writes only with --out")
    parser.add_argument("--out", type=Path, help="folder of results.json; by default this benchmark's own")
    options = parser.parse_args(arguments)
    documents, length, repeats = (2, 64, 3) if options.quick else (8, 256, 15)
    torch.set_num_threads(1)
    rows, criteria = [], []
    for k, make in ((k, make) for make in (made_up, real) for k in BYTES):
        text = make(k, documents, length)
        found = {name: ours(name, text, k, repeats) for name in CODECS}
        found |= {name: theirs(compression, text, repeats) for name, compression in peers(k, text.vocabulary).items()}
        for name, values in found.items():
            numbers = {key: float(f"{value:.4g}") for key, value in values.items()}
            rows.append({"setting": f"{text.name}, k = {k}, {name}", "metric": "bytes a token", "value": round(values["bytes"], 1), **numbers})
            print("{setting}: ".format(**rows[-1]) + ", ".join(f"{key} {value:,g}" for key, value in numbers.items()))
        compact = found["compact"]
        worst = max(compact["kl_t1"], compact["kl_t2"])
        criteria += [
            criterion(f"{text.name}, k = {k}: compact, bytes a token", f"<= {BYTES[k]}", compact["bytes"], compact["bytes"] <= BYTES[k]),
            criterion(f"{text.name}, k = {k}: compact, KL error at T = 1 and 2, nat", f"<= {KL}", worst, worst <= KL),
        ]
        if k == 64:
            criteria.append(criterion(f"{text.name}, k = {k}: compact, tokens read a second and core", f">= {READ}", compact["read"], compact["read"] >= READ))
    folder = options.out or (None if options.quick else Path(__file__).parent)
    if folder:
        command = "python -m benchmarks.signal_store.run" + (" --quick" if options.quick else "")
        claim = (
            "The compact codec keeps a token's top 64 logits in 200 bytes and its top 128 in 340, at a KL error of 5e-4 nat, "
            "and is read at 100,000 tokens a second and core"
        )
        write_results(folder, claim, command, [SEED], rows, criteria)
    return criteria


if __name__ == "__main__":
    main()
