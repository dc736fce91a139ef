"""How text is cut into words before their bytes are merged: the regexes of the published vocabularies.

A token never reaches beyond a word. The ``gpt2`` regex is that of OpenAI's GPT-2 (encoder.py), ``gpt4`` that of GPT-4
(cl100k_base; Llama 3 has it too): any case of 's and 'll, one blank or sign at the front of a word, digits in threes,
line ends with the signs before them. ``nanochat`` takes digits in twos, which leaves more of a small vocabulary to
words; Qwen takes them singly.
"""

from typing import Any

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
    """Give the regex by which this ``pre_tokenizer`` of a tokenizer.json cuts words, None if it is not a known one."""
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
