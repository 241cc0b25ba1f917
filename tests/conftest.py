"""Fixtures that every folder of tests shares."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real test data beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("needs the shared test data: ../shared/data is not beside the repository")
    return SHARED


@pytest.fixture(scope="session")
def stories260k(shared_data: Path) -> Path:
    """A really trained tiny Llama with its tokenizer."""
    folder = shared_data / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip("needs the model ../shared/data/models/stories260K, which is not there")
    return folder


@pytest.fixture
def double() -> Iterator[None]:
    """Tests that compare in fp64."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
