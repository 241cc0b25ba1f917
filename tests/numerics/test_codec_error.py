"""What rounding a stored signal costs, in nats and in bytes."""

from __future__ import annotations

import numpy as np
import pytest

from limbeck.teachers.store.blocks import write_block
from limbeck.teachers.store.codecs import CODECS, Layout, log_sum
from signal_cases import QWEN, answers, document, kept_kl

ROWS = 12
KINDS = {"flat": (0.0, 0.8), "text": (0.0, 1.3), "steep": (0.0, 4.0), "sure": (25.0, 1.3)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [64, 128])
def test_rounding_costs_less_than_the_bound_at_every_stored_temperature(k: int, kind: str) -> None:
    layout = Layout(k, (1.0, 0.5, 2.0), 0, QWEN)
    peak, slope = KINDS[kind]
    true = answers(np.random.default_rng(k), ROWS, layout, peak=peak, slope=slope)
    for name in ("fp16", "compact"):
        coder = CODECS[name]
        stored = coder.decode(np.frombuffer(coder.encode(true, layout), np.uint8), ROWS, layout)
        for column, temperature in enumerate(layout.temperatures):
            kl, gained = kept_kl(true, stored, column, temperature)
            # 5e-4 is allowed on average: here no row may pass it.
            assert kl.max() <= 5e-4 and kl.mean() <= 1e-4 and kl.min() >= -1e-6, (name, temperature, kl.max())
            assert np.abs(gained).max() <= 5e-6, "the mass of the kept ids has moved"
            assert np.exp(log_sum(stored.logits_mK, temperature) - stored.log_z_mZ[:, column]).max() <= 1 + 5e-6


@pytest.mark.parametrize(("k", "bound"), [(64, 200), (128, 340)])
def test_a_token_takes_no_more_bytes_than_the_bound(k: int, bound: int) -> None:
    rng = np.random.default_rng(0)
    layout = Layout(k, (1.0,), 0, QWEN)
    ask = document(rng, 257, QWEN)
    # Ids of equal likelihood all over the vocabulary are the worst case for gaps: text has many small ids.
    taken = len(write_block(ask, answers(rng, 256, layout), CODECS["compact"], layout)) / 256
    assert taken <= bound, taken
