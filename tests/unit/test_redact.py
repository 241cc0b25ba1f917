"""Secrets are struck out by name, by form and by the environment's values; what only looks like one stays."""

from __future__ import annotations

import pytest

from limbeck.config.redact import is_secret, redacted, redacted_command, redacted_text


def test_names_of_secrets_are_told_from_names_that_only_sound_like_them() -> None:
    for name in ("api_key", "HF_TOKEN", "token", "WANDB_API_KEY", "aws_secret", "--password", "teacher.token", "credentials"):
        assert is_secret(name), name
    for name in ("tokens", "tokenizer", "token_env", "max_tokens", "batch_tokens", "key", "keep", "secretary"):
        assert not is_secret(name), name


def test_a_recipe_loses_its_secrets_and_nothing_else() -> None:
    recipe = {
        "tokenizer": "t", "token_env": "TEACHER_KEY", "tokens": 5, "a": [{"api_key": "abc", "token": "${env:X}"}],
        "url": "https://me:word@host/x?api_key=1234&n=2", "plain": "https://host/x?k=v", "note": "Bearer abcdef",
    }  # fmt: skip
    assert redacted(recipe) == {
        **recipe, "a": [{"api_key": "***", "token": "${env:X}"}], "url": "https://***@host/x?api_key=***&n=2", "note": "Bearer ***",
    }  # fmt: skip


def test_known_forms_and_the_values_of_secret_variables_are_struck_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "correct-horse")
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    assert redacted_text("x correct-horse y abc hf_ABCDEFGHIJKLMNOP z") == "x *** y abc *** z"


def test_a_command_can_be_given_to_a_shell_again_without_its_secrets() -> None:
    words = ["limbeck", "run", "my recipe.yaml", "align.teacher.token=abc", "--api-key", "abc", "--token=abc", "data.tokenizer=t", "x=${env:KEY}"]
    assert redacted_command(words) == (
        "limbeck run 'my recipe.yaml' 'align.teacher.token=***' --api-key '***' '--token=***' data.tokenizer=t 'x=${env:KEY}'"
    )
