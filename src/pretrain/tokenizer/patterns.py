"""Byte-level BPE before any merge: text is cut into words by a regex, and their bytes are written as characters.

A token never reaches beyond a word. The ``gpt2`` regex is that of OpenAI's GPT-2 (encoder.py), ``gpt4`` that of GPT-4
(cl100k_base; Llama 3 has it too): any case of 's and 'll, one space or sign in front of a word, digits in threes, line
ends with the signs before them. ``nanochat`` takes digits in twos, which leaves more of a small vocabulary to words;
Qwen takes them singly.
"""

from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The same words: its possessive quantifiers only spare the engine attempts that fail, and \s* takes line ends anyway.
_GPT4_POSSESSIVE = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)

PATTERNS = {
    "gpt2": GPT2,
    "gpt4": _GPT4.replace("DIGITS", r"\p{N}{1,3}"),
    "nanochat": _GPT4.replace("DIGITS", r"\p{N}{1,2}"),
}

# Every spelling in use -> the one that all of our encoders are given.
_SPELLINGS = {GPT2: GPT2} | {
    spelling.replace("DIGITS", digits): _GPT4.replace("DIGITS", digits)
    for spelling in (_GPT4, _GPT4_POSSESSIVE)
    for digits in (r"\p{N}", r"\p{N}{1,2}", r"\p{N}{1,3}")
}


def pattern_of(pre_tokenizer: Any) -> str | None:
    """The regex by which this ``pre_tokenizer`` of a tokenizer.json cuts words, None if it is not a known one."""
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return GPT2
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return _SPELLINGS.get(regex)
    return None


def byte_level(model: models.BPE, regex: str = GPT2) -> tokenizers.Tokenizer:
    """Put a byte-level pre-tokenizer and decoder around a BPE. No regex: a text is one word."""
    hf = tokenizers.Tokenizer(model)
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex == GPT2)
    if regex not in ("", GPT2):
        split = pre_tokenizers.Split(tokenizers.Regex(regex), "isolated")
        hf.pre_tokenizer = pre_tokenizers.Sequence([split, hf.pre_tokenizer])
    hf.decoder = decoders.ByteLevel()
    return hf


def byte_alphabet() -> list[str]:
    """The printable character that byte-level vocabularies write for each of the 256 bytes.

    Bytes that print are themselves, the others follow from U+0100 on (``bytes_to_unicode`` of GPT-2's encoder.py).
    """
    printing = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printing else next(others)) for byte in range(256)]


# For str.translate: each character of the alphabet to that of its byte, and others of one byte out of the way.
_TO_BYTES = dict.fromkeys(range(256), 0xFFFD) | {ord(character): byte for byte, character in enumerate(byte_alphabet())}


def bytes_of_token(token: str) -> bytes | None:
    """The bytes that a token of a byte-level vocabulary stands for; None if it is not written in that alphabet."""
    try:
        return token.translate(_TO_BYTES).encode("latin-1")
    except UnicodeEncodeError:
        return None
