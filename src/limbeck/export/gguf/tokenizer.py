"""A tokenizer as GGUF keys: two kinds whose ids llama.cpp makes exactly, and a clear refusal of the others.

Byte-level BPE is split into words by a regular expression, and llama.cpp knows a number of them by name: the name is found by the
tokenizer's own expression, and an unknown one is refused, since another would give other ids without a word.  A SentencePiece BPE
(Llama 2, stories260K) is rebuilt from scores: the rank of the merge that makes a token.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

from limbeck.data.tokenizer import prefix_ids
from limbeck.errors import DataError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""llama.cpp's token types."""
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN35 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE = {
    (GPT2, False): "gpt-2",
    (_QWEN2, False): "qwen2",
    (_QWEN35, False): "qwen35",
    (_LLAMA3, True): "llama-bpe",
    (_LLAMA3, False): "dbrx",
}
"""llama.cpp's name by the expression that splits words and by whether a word that is a token skips the merges."""
SPACE = "\u2581"
NO_MERGE = "\u0120 \u0120\u0120"
"""Stands where there are no merges, since llama.cpp wants some: nothing ever makes its right half."""


def tokenizer_keys(tokenizer: Any, size: int, source: str = "tokenizer") -> dict[str, Any]:
    """Every ``tokenizer.*`` key for a model with ``size`` rows of embeddings; ids without a token become unused ``[PADi]``.

    Raises:
        DataError: llama.cpp would make other ids: an unknown word expression or normaliser, merges that no scores express, something
            appended to every text; or more tokens than rows.
    """
    content = _content(tokenizer, source)
    model = content["model"]
    if model.get("type") != "BPE":
        raise DataError(f"{source}: is a {model.get('type')} tokenizer; GGUF files are written for byte-level BPE and SentencePiece BPE")
    if not set(model["vocab"]) - {token["content"] for token in content["added_tokens"]}:
        raise DataError(f"{source}: the tokenizer has no words, as where tokenizer.json is missing: put the tokenizer's files into the folder")
    if model.get("dropout"):
        raise DataError(f"{source}: leaves out merges at random (dropout {model['dropout']}), which llama.cpp does not: its ids would differ")
    _check_added(content["added_tokens"], source)
    byte_level = "ByteLevel" in json.dumps(content["pre_tokenizer"])
    found = _byte_level(content, source) if byte_level else _sentencepiece(content, source)
    words, kinds = _tokens(content, size, source, byte_level)
    found |= {"tokenizer.ggml.tokens": words, "tokenizer.ggml.token_type": kinds}
    if not byte_level:
        ranks = _ranks(content["model"], source)
        found["tokenizer.ggml.scores"] = [-float(ranks.get(word, len(ranks))) if kind == NORMAL else 0.0 for word, kind in zip(words, kinds, strict=True)]
    found |= _special(tokenizer, source)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        found["tokenizer.chat_template"] = template
    return found


def _content(tokenizer: Any, source: str) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise DataError(f"{source}: {type(tokenizer).__name__} is not a fast tokenizer: save it once with `tokenizer.json`")
    return json.loads(backend.to_str())


def _listed(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """A pipeline as a list of its steps."""
    if part is None:
        return []
    return list(part[inner]) if part["type"] == "Sequence" else [part]


def _check_added(tokens: list[dict[str, Any]], source: str) -> None:
    """Added tokens are found wherever they stand in a text, and nothing around them is lost."""
    for token in tokens:
        odd = [name for name in ("lstrip", "rstrip", "single_word") if token[name]]
        if odd:
            raise DataError(f"{source}: its token {token['content']!r} has {' and '.join(odd)}, which llama.cpp does not know: its ids would differ")


def _check_pieces(model: dict[str, Any], source: str) -> None:
    """Byte-level words are made of the letters of their bytes alone, without marks, and each byte has its letter."""
    marks = [name for name in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
    if marks:
        raise DataError(f"{source}: marks parts of words ({', '.join(marks)}), which llama.cpp's BPE does not: its ids would differ")
    if model.get("unk_token") is not None and not set(ByteLevel.alphabet()) <= set(model["vocab"]):
        raise DataError(f"{source}: writes {model['unk_token']!r} for bytes that it has no token for, and llama.cpp leaves them out: its ids would differ")


def _byte_level(content: dict[str, Any], source: str) -> dict[str, Any]:
    _check_pieces(content["model"], source)
    for step in _listed(content["normalizer"], "normalizers"):
        # llama.cpp does not normalise; text is nearly always in this form already.
        if step["type"] != "NFC":
            raise DataError(f"{source}: normalises text by {step['type']}, which llama.cpp does not: its ids would differ")
    steps = _listed(content["pre_tokenizer"], "pretokenizers")
    last = steps[-1]
    splits = steps[:-1]
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        raise DataError(f"{source}: puts a space before every text (add_prefix_space), which llama.cpp's BPE does not")
    if not splits and last.get("use_regex", True):
        regex = GPT2
    elif len(splits) == 1 and splits[0]["type"] == "Split" and not last.get("use_regex", True):
        regex = _pattern(splits[0], source)
    else:
        raise DataError(f"{source}: splits words by {', '.join(step['type'] for step in steps)}, which no pre-tokenizer of llama.cpp is known to equal")
    skips = bool(content["model"].get("ignore_merges"))
    if (regex, skips) not in PRE:
        known = ", ".join(sorted(set(PRE.values())))
        raise DataError(
            f"{source}: splits words by the expression {regex!r}{' and skips merges of whole words' if skips else ''}, which no pre-tokenizer "
            f"of llama.cpp is known to equal; known: {known}. Another one would give other ids, so nothing is written"
        )
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": PRE[regex, skips],
        "tokenizer.ggml.merges": [" ".join(_pair(merge)) for merge in content["model"]["merges"]] or [NO_MERGE],
    }


def _pattern(step: dict[str, Any], source: str) -> str:
    if step.get("behavior") not in ("Isolated", "isolated") or step.get("invert") or "Regex" not in step["pattern"]:
        raise DataError(f"{source}: splits words by {step}, which no pre-tokenizer of llama.cpp is known to equal")
    return step["pattern"]["Regex"]


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge if not isinstance(merge, str) else merge.split(" ")
    return left, right


def _sentencepiece(content: dict[str, Any], source: str) -> dict[str, Any]:
    steps = _listed(content["normalizer"], "normalizers")
    prefix = [step for step in steps if step["type"] == "Prepend"]
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    known = [step for step in steps if step in (spaces, {"type": "Prepend", "prepend": SPACE})]
    if content["pre_tokenizer"] is not None or len(known) != len(steps) or spaces not in steps or not content["model"].get("byte_fallback"):
        raise DataError(
            f"{source}: is neither byte-level BPE nor SentencePiece BPE with byte fallback (spaces as '{SPACE}'): llama.cpp's ids would differ"
        )
    return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.add_space_prefix": bool(prefix)}


def _ranks(model: dict[str, Any], source: str) -> dict[str, int]:
    """Rank of each token among those that merges make.

    llama.cpp joins any two neighbours that make a token, the best-scored token first: that equals the merges if every way to make a
    token is a merge, and the ways of one token follow each other.
    """
    vocabulary = model["vocab"]
    made: dict[str, set[tuple[str, str]]] = {}
    order: dict[str, int] = {}
    previous = None
    for merge in model["merges"]:
        left, right = _pair(merge)
        token = left + right
        if token != previous and token in order:
            raise DataError(f"{source}: merges make {token!r} at two places of their order, which SentencePiece's scores cannot express")
        order.setdefault(token, len(order))
        made.setdefault(token, set()).add((left, right))
        previous = token
    for token, ways in made.items():
        every = {(token[:cut], token[cut:]) for cut in range(1, len(token)) if token[:cut] in vocabulary and token[cut:] in vocabulary}
        lost = sorted(every - ways)
        if lost and lost[0]:
            raise DataError(f"{source}: {token!r} could be made of {lost[0]} and no merge says so: llama.cpp would make other ids")
    return order


def _tokens(content: dict[str, Any], size: int, source: str, byte_level: bool) -> tuple[list[str], list[int]]:
    """Token texts and types by id, padded to ``size``."""
    vocabulary: dict[str, int] = dict(content["model"]["vocab"])
    added = {token["id"]: token for token in content["added_tokens"]}
    by_id = {number: word for word, number in vocabulary.items()} | {number: token["content"] for number, token in added.items()}
    if max(by_id) >= size:
        raise DataError(f"{source}: has a token with id {max(by_id)} and the model's embeddings have {size} rows: it is not this model's tokenizer")
    unknown = content["model"].get("unk_token")
    words, kinds = [], []
    for number in range(size):
        word = by_id.get(number)
        if word is None:
            words.append(f"[PAD{number}]")
            kinds.append(UNUSED)
            continue
        words.append(word)
        kinds.append(_kind(word, added.get(number), unknown, byte_level))
    if len(set(words)) != len(words):
        raise DataError(f"{source}: two ids have the same token, which llama.cpp refuses")
    return words, kinds


def _kind(word: str, added: dict[str, Any] | None, unknown: str | None, byte_level: bool) -> int:
    if word == unknown and not byte_level:
        return UNKNOWN
    if added is not None:
        return CONTROL if added["special"] else USER_DEFINED
    if not byte_level and len(word) == 6 and word.startswith("<0x"):
        return BYTE
    return NORMAL


def _special(tokenizer: Any, source: str) -> dict[str, Any]:
    """Ids of the special tokens, and whether a text begins with one."""
    found: dict[str, Any] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        number = getattr(tokenizer, f"{name}_token_id", None)
        if number is not None:
            found[f"tokenizer.ggml.{key}_token_id"] = int(number)
    prefix = prefix_ids(tokenizer)
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    if tokenizer("a")["input_ids"] != prefix + plain:
        raise DataError(f"{source}: appends tokens to every text, which a GGUF file of a language model does not say")
    if prefix and prefix != [tokenizer.bos_token_id]:
        raise DataError(f"{source}: puts the ids {prefix} before every text and its bos token is {tokenizer.bos_token_id}")
    return found | {"tokenizer.ggml.add_bos_token": bool(prefix), "tokenizer.ggml.add_eos_token": False}
