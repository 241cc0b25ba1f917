"""Training a tokenizer, and what is asked of any other."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from limbeck.config.parts.stages import TrainTokenizer
from limbeck.data.tokenizer import encode, end_id, ordinary_ids, prefix_ids, tokenizer_digest, train_tokenizer
from limbeck.errors import DataError
from limbeck.models.loading import load_tokenizer

TEXTS = [Path(json.__file__).read_text(), Path(np.__file__).read_text()]
HARD = ["", " ", "\n\n  \t x", "naïve 🦙 café 你好", "a<|endoftext|>b", "\x00\x7f\u200b", " lead", "trail ", "\r\n", "don't 'S"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, TrainTokenizer(vocabulary=600, special=("<|endoftext|>", "<|x|>")), folder)
    return folder, load_tokenizer(str(folder))


def test_decoding_gives_back_every_text_exactly(trained):
    _, tokenizer = trained
    for text, ids in zip(HARD + TEXTS, encode(tokenizer, HARD + TEXTS), strict=True):
        assert tokenizer.decode(ids) == text


def test_the_first_special_token_ends_begins_and_pads(trained):
    _, tokenizer = trained
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) == (end, end, end)
    assert end_id(tokenizer, "here") == end and prefix_ids(tokenizer) == []
    assert len(tokenizer) == 600


def test_the_name_of_a_special_token_in_a_text_is_text(trained):
    _, tokenizer = trained
    assert tokenizer.eos_token_id not in encode(tokenizer, ["a<|endoftext|>b"])[0]
    assert tokenizer.eos_token_id in tokenizer("a<|endoftext|>b")["input_ids"]


def test_training_twice_gives_the_same_file(trained, tmp_path):
    folder, _ = trained
    train_tokenizer(iter(TEXTS), TrainTokenizer(vocabulary=600, special=("<|endoftext|>", "<|x|>")), tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert tokenizer_digest(str(tmp_path / "again")) == tokenizer_digest(str(folder))
    train_tokenizer(TEXTS[:1], TrainTokenizer(vocabulary=600), tmp_path / "other")
    assert tokenizer_digest(str(tmp_path / "other")) != tokenizer_digest(str(folder))


def test_ordinary_ids_decode_to_text_that_encodes_to_them_again(trained):
    _, tokenizer = trained
    ids = ordinary_ids(tokenizer)
    assert 300 < len(ids) < 600 and (np.diff(ids) > 0).all()
    assert not set(ids.tolist()) & set(tokenizer.all_special_ids)
    texts = [tokenizer.decode([i]) for i in ids.tolist()]
    assert encode(tokenizer, texts) == [[i] for i in ids.tolist()] and "�" not in "".join(texts)


def test_a_vocabulary_too_small_for_the_bytes_says_what_is_allowed(tmp_path):
    options = TrainTokenizer(vocabulary=300, special=tuple(f"<{i}>" for i in range(50)))
    with pytest.raises(DataError, match="allowed: 306 or more"):
        train_tokenizer(TEXTS, options, tmp_path)


def test_a_tokenizer_without_an_end_of_text_token_is_refused():
    without = SimpleNamespace(eos_token_id=None, get_vocab=lambda: {"a": 0})
    with pytest.raises(DataError, match=r"tokenizer somewhere: it names no end-of-text token .*append_eos: false"):
        end_id(without, "somewhere")


def test_a_sentencepiece_style_tokenizer_works_too(stories260k):
    tokenizer = load_tokenizer(str(stories260k))
    ids = ordinary_ids(tokenizer)
    assert len(ids) >= 32 and prefix_ids(tokenizer) == [tokenizer.bos_token_id]
    assert encode(tokenizer, [tokenizer.decode([i]) for i in ids.tolist()]) == [[i] for i in ids.tolist()]


def test_qwen_tokenizer_gives_the_ids_that_llama_cpp_expects(shared_data):
    tokenizer = load_tokenizer(str(shared_data / "tokenizers" / "qwen2.5"))
    vectors = shared_data / "tokenizers" / "llama.cpp-vectors"
    texts = (vectors / "ggml-vocab-qwen2.gguf.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    expected = [[int(i) for i in line.split()] for line in (vectors / "ggml-vocab-qwen2.gguf.out").read_text().splitlines()]
    assert len(texts) >= len(expected) > 40
    assert encode(tokenizer, texts[: len(expected)]) == expected
    assert prefix_ids(tokenizer) == []
    ids = ordinary_ids(tokenizer)
    assert 100_000 < len(ids) < 151_643
