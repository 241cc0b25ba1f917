"""Byte-level BPE trained on the documents themselves, and facts about any tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.config.parts.stages import TrainTokenizer
from limbeck.errors import DataError

REPLACEMENT = "\ufffd"
CHUNK = 8192


def train_tokenizer(texts: Iterable[str], options: TrainTokenizer, folder: Path) -> None:
    """Write a transformers fast tokenizer of at most ``options.vocabulary`` tokens; ``decode(encode(x)) == x`` for every text.

    The first special token ends, begins and pads.  The same texts in the same order give the same file.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if not options.special:
        raise DataError("tokenizer.special: needs at least one token: the first one ends documents and pads")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if options.vocabulary < len(alphabet) + len(options.special):
        raise DataError(
            f"tokenizer.vocabulary: {options.vocabulary} cannot hold the 256 bytes and {len(options.special)} special tokens; "
            f"allowed: {len(alphabet) + len(options.special)} or more"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocabulary,
        special_tokens=list(options.special),
        initial_alphabet=alphabet,
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(iter(texts), trainer)
    end = options.special[0]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=end,
        eos_token=end,
        pad_token=end,
        additional_special_tokens=list(options.special[1:]),
        clean_up_tokenization_spaces=False,
    )
    folder.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(str(folder))


def ordinary_ids(tokenizer: Any) -> np.ndarray:
    """Ids of plain text, ascending: neither special nor added, and each decodes to text that encodes to this one id again.

    Pieces of a character (single bytes of a byte-level BPE) and pieces that a tokenizer would merge are left out.
    """
    added = set(tokenizer.get_added_vocab().values()) | set(tokenizer.all_special_ids)
    ids = np.array(sorted(set(tokenizer.get_vocab().values()) - added), dtype=np.int64)
    keep = np.zeros(len(ids), dtype=bool)
    for start in range(0, len(ids), CHUNK):
        chunk = ids[start : start + CHUNK].tolist()
        texts = tokenizer.batch_decode([[i] for i in chunk], clean_up_tokenization_spaces=False)
        again = encode(tokenizer, texts)
        keep[start : start + CHUNK] = [
            bool(text) and REPLACEMENT not in text and found == [i] for i, text, found in zip(chunk, texts, again, strict=True)
        ]
    return ids[keep]


def encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of texts, nothing added.  The name of a special token inside a text is text, never the token."""
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return encoded["input_ids"]


def prefix_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer itself puts before a text (Llama's and Gemma's begin-of-text token; nothing for most others)."""
    plain, full = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    return []


def end_id(tokenizer: Any, source: str) -> int:
    """The id that ends documents.

    Raises:
        DataError: the tokenizer names no end-of-text token, or one that it does not have.
    """
    found = tokenizer.eos_token_id
    if found is None or found not in set(tokenizer.get_vocab().values()):
        raise DataError(
            f"tokenizer {source}: it names no end-of-text token (eos_token) and `append_eos` needs one: set eos_token in its "
            "tokenizer_config.json, or `append_eos: false`"
        )
    return int(found)


def tokenizer_digest(source: str) -> str:
    """What a tokenizer's tokens depend on: a hash of its files, or its name on the hub."""
    from limbeck.models.loading import TOKENIZER_FILES

    folder = Path(source)
    if not folder.is_dir():
        return source
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            digest.update(f"{name}:{hashlib.sha256((folder / name).read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()
