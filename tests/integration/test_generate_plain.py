"""`limbeck generate` from a model without an adapter: what a prompt may be, and what is said of one that may not."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from gguf_case import write_gguf
from limbeck.cli.app import app
from limbeck.errors import RunError
from limbeck.models.loading import load_model, load_tokenizer, resolve_source
from limbeck.stages.generate import Writer

runner = CliRunner()


def test_a_file_is_no_model_folder(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    done = runner.invoke(app, ["generate", str(file), "--prompt", "a"])
    assert done.exit_code == 2 and "tiny.gguf: is a file, and `limbeck generate` reads model folders" in done.stderr


def test_a_seed_beyond_64_bits_is_refused() -> None:
    done = runner.invoke(app, ["generate", "builtin:code-2m", "--prompt", "a", "--seed", str(2**70)])
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit)


def test_a_prompt_is_no_longer_than_the_model_and_of_its_own_tokens() -> None:
    model, tokenizer = load_model(resolve_source("builtin:code-2m")), load_tokenizer(resolve_source("builtin:code-2m"))
    writer = Writer(model, tokenizer)
    model.config.max_position_embeddings = 8
    assert writer.prompt_ids("a b c").shape[1] < 8
    with pytest.raises(RunError, match="the prompt has 9 tokens, and the model was made for 8 with what it writes: give a shorter --prompt"):
        writer.prompt_ids("a " * 8)
    model.resize_token_embeddings(60)
    with pytest.raises(RunError, match="and the model has embeddings for 60: the tokenizer is another model's"):
        writer.prompt_ids("def")
