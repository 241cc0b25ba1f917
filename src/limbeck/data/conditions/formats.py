"""Ways to write a text: pure functions of any text, each one a thing that an adapter can learn."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from typing import NamedTuple


class Format(NamedTuple):
    """A way to write and what it does, in words."""

    write: Callable[[str], str]
    words: str


_VOWELS = str.maketrans("", "", "aeiouAEIOU")
_DIGITS = str.maketrans("aeiostAEIOST", "431057431057")


def _lines(change: Callable[[str], str]) -> Callable[[str], str]:
    """Line by line: line breaks stay where they are."""
    return lambda text: "\n".join(change(line) for line in text.split("\n"))


def _doubled(text: str) -> str:
    return "".join(letter * 2 if letter.isalpha() else letter for letter in text)


FORMATS: dict[str, Format] = {
    "plain": Format(lambda text: text, "as it is"),
    "upper": Format(str.upper, "capital letters"),
    "lower": Format(str.lower, "small letters"),
    "title": Format(str.title, "every word begins with a capital"),
    "swapped_case": Format(str.swapcase, "small letters for capitals and capitals for small ones"),
    "snake": Format(lambda text: re.sub(r"[ \t]+", "_", text.lower()), "small letters, one underscore for the space between words"),
    "no_vowels": Format(lambda text: text.translate(_VOWELS), "without a, e, i, o and u"),
    "no_spaces": Format(lambda text: re.sub(r"[ \t]+", "", text), "without spaces; lines stay"),
    "reversed_words": Format(_lines(lambda line: " ".join(reversed(line.split(" ")))), "the words of each line from last to first"),
    "mirrored": Format(lambda text: re.sub(r"\w+", lambda word: word[0][::-1], text), "the letters of each word from last to first"),
    "rot13": Format(lambda text: codecs.encode(text, "rot13"), "each Latin letter 13 places further in the alphabet"),
    "doubled": Format(_doubled, "every letter twice"),
    "digits_for_letters": Format(lambda text: text.translate(_DIGITS), "4, 3, 1, 0, 5 and 7 for a, e, i, o, s and t"),
    "quoted": Format(_lines(lambda line: f"> {line}"), "every line begins with '> '"),
}
"""By the names that a recipe uses."""
