"""Tokenizers as GGUF keys: the ones that llama.cpp computes alike, and a refusal of the others by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from limbeck.config.parts.stages import TrainTokenizer
from limbeck.data.tokenizer import train_tokenizer
from limbeck.errors import DataError
from limbeck.export.gguf.tokenizer import _LLAMA3, _QWEN2, _QWEN35, CONTROL, NORMAL, UNUSED, USER_DEFINED, tokenizer_keys
from limbeck.models.loading import load_tokenizer

ALPHABET = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def byte_level(regex: str | None, *, skips: bool = False, prefix: bool = False, normalizer: Any = None, added: Any = ()) -> Any:
    tokenizer = Tokenizer(models.BPE(vocab=dict(ALPHABET), merges=[], ignore_merges=skips))
    last = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex is None)
    split = [] if regex is None else [pre_tokenizers.Split(Regex(regex), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, last]) if split else last
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", additional_special_tokens=list(added))


@pytest.mark.parametrize(
    "regex, skips, name",
    [(None, False, "gpt-2"), (_QWEN2, False, "qwen2"), (_QWEN35, False, "qwen35"), (_LLAMA3, True, "llama-bpe"), (_LLAMA3, False, "dbrx")],
)
def test_the_expression_of_a_tokenizer_decides_its_name(regex: str | None, skips: bool, name: str) -> None:
    assert tokenizer_keys(byte_level(regex, skips=skips), 300)["tokenizer.ggml.pre"] == name


def test_an_unknown_expression_is_an_error_that_names_it() -> None:
    with pytest.raises(DataError, match=r"mine: splits words by the expression .*w\+', which no pre-tokenizer.*known: .*qwen2"):
        tokenizer_keys(byte_level(r"\w+"), 300, "mine")
    # A known expression whose merges are applied otherwise gives other ids too.
    with pytest.raises(DataError, match="skips merges of whole words"):
        tokenizer_keys(byte_level(_QWEN2, skips=True), 300)


@pytest.mark.parametrize("changes, what", [({"prefix": True}, "add_prefix_space"), ({"normalizer": normalizers.Lowercase()}, "Lowercase")])
def test_what_llama_cpp_would_not_do_is_refused(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(DataError, match=what):
        tokenizer_keys(byte_level(None, **changes), 300)


@pytest.mark.parametrize(
    "options, what",
    [
        ({"end_of_word_suffix": "</w>"}, "marks parts of words .end_of_word_suffix."),
        ({"continuing_subword_prefix": "##"}, "marks parts of words .continuing_subword_prefix."),
        ({"dropout": 0.5}, "leaves out merges at random .dropout 0.5."),
        ({"unk_token": "a", "vocab": {"a": 0, "b": 1}}, "writes 'a' for bytes that it has no token for"),
    ],
)
def test_merges_that_llama_cpp_does_not_know_are_refused(options: dict[str, Any], what: str) -> None:
    tokenizer = Tokenizer(models.BPE(**{"vocab": dict(ALPHABET), "merges": [], **options}))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    with pytest.raises(DataError, match=what):
        tokenizer_keys(PreTrainedTokenizerFast(tokenizer_object=tokenizer), 300)


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
@pytest.mark.parametrize("special", [True, False])
def test_added_tokens_that_look_around_themselves_are_refused(flag: str, special: bool) -> None:
    tokenizer = byte_level(None)
    tokenizer.add_tokens([AddedToken("<tool>", special=special, **{flag: True})])
    with pytest.raises(DataError, match=f"its token '<tool>' has {flag}, which llama.cpp does not know"):
        tokenizer_keys(tokenizer, 300)


def test_types_padding_and_special_ids() -> None:
    tokenizer = byte_level(None, added=["<|im|>"])
    tokenizer.add_tokens(["<tool>"])
    found = tokenizer_keys(tokenizer, 262)
    words, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    by_word = dict(zip(words, kinds, strict=True))
    assert len(words) == 262 and by_word["<|end|>"] == by_word["<|im|>"] == CONTROL and by_word["<tool>"] == USER_DEFINED
    assert by_word["a"] == NORMAL and words[259:] == ["[PAD259]", "[PAD260]", "[PAD261]"] and kinds[259:] == [UNUSED] * 3
    assert found["tokenizer.ggml.eos_token_id"] == words.index("<|end|>") and found["tokenizer.ggml.add_bos_token"] is False
    with pytest.raises(DataError, match=r"id 258 and the model's embeddings have 258 rows"):
        tokenizer_keys(tokenizer, 258)


def test_our_own_tokenizers_and_their_chat_template_are_written(tmp_path: Path) -> None:
    train_tokenizer(["def main():\n    return 1\n"] * 3, TrainTokenizer(vocabulary=300), tmp_path)
    tokenizer: Any = load_tokenizer(str(tmp_path))
    tokenizer.chat_template = "{{ messages[0].content }}"
    found = tokenizer_keys(tokenizer, len(tokenizer))
    assert found["tokenizer.ggml.model"] == "gpt2" and found["tokenizer.ggml.pre"] == "gpt-2"
    assert found["tokenizer.chat_template"] == "{{ messages[0].content }}" and all(" " in merge for merge in found["tokenizer.ggml.merges"])


def sentencepiece(merges: list[tuple[str, str]], extra: list[str]) -> Any:
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *extra]
    model = models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_scores_of_sentencepiece_follow_its_merges() -> None:
    letters = ["\u2581", "a", "b", "ab", "\u2581a", "\u2581ab"]
    merges = [("a", "b"), ("\u2581", "a"), ("\u2581", "ab"), ("\u2581a", "b")]
    found = tokenizer_keys(sentencepiece(merges, letters), 265)
    scores = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"], strict=True))
    assert found["tokenizer.ggml.model"] == "llama" and found["tokenizer.ggml.add_space_prefix"] is True
    assert scores["ab"] > scores["\u2581a"] > scores["\u2581ab"] > scores["a"]
    # llama.cpp would join the neighbours that no merge joins.
    with pytest.raises(DataError, match="no merge says so"):
        tokenizer_keys(sentencepiece(merges[:-1], letters), 265)
    with pytest.raises(DataError, match="two places of their order"):
        tokenizer_keys(sentencepiece([merges[2], merges[0], merges[1], merges[3]], letters), 265)


def test_a_text_that_ends_with_a_special_token_is_refused() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_level(None)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <|end|>", special_tokens=[("<|end|>", 256)])
    with pytest.raises(DataError, match="appends tokens"):
        tokenizer_keys(tokenizer, 300)
    assert json.loads(tokenizer.backend_tokenizer.to_str())["post_processor"] is not None
