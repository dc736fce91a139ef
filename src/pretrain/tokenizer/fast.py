"""Faster encoders of byte-level BPE, whose ids are those of the library ``tokenizers`` or are not used at all.

    texts ──┬── plain ──> gigatoken, or else tiktoken ──> ids
            └── None: left to ``tokenizers``  (a text in which Unicode versions, added tokens or a normalizer matter,
                                               or which the encoder gives up)

gigatoken (the extra 'fast') remembers every word that it meets, tiktoken is fast without that. Each is made from the
vocabulary, merges and regex of the tokenizer.json itself, and must encode every token of the vocabulary in two
contexts, and the worst texts we know, as ``tokenizers`` does, before it is used.
"""

import functools
import itertools
import json
import os
import random
import unicodedata
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, Protocol, get_args

import numpy as np
import tokenizers

from pretrain.errors import UsageError
from pretrain.tokenizer.patterns import GPT2, pattern_of

EncoderName = Literal["auto", "gigatoken", "tiktoken", "tokenizers"]

# gigatoken's memory of words only grows: by 20 MB on 45 MB of English, by five times the text on random letters. Made
# anew, it has forgotten them; that takes a tenth of a second.
RECYCLE_RESIDENT = 128 * 1024 * 1024  # bytes by which the process may grow
RECYCLE_AT_LEAST = 16 * 1024 * 1024  # characters between two times, since the process may grow for other reasons
RECYCLE_CHARACTERS = 64 * 1024 * 1024  # characters between two times where the system does not tell our memory

# What the regexes call a letter, a digit or blank differs only for characters newer than the Unicode version of a
# library. Ranges of letters and digits that came with Unicode 15 and later; those that this Python does not know yet
# and all outside the Basic Multilingual Plane join them, but for the blocks of emoji and the old Chinese characters.
_NEW_LETTERS = (
    *(0x0558, 0x088F, 0x0C5C, 0x0CDC, 0x1C89, 0x1C8A, 0x208F, 0x209D, 0x209E, 0x209F, 0xAB6C, 0xAB6D),
    *range(0xA7CB, 0xA7F2),
)
_SETTLED_HIGH_SURROGATES = (range(0xD83C, 0xD83F), range(0xD840, 0xD869))  # U+1F000-1FBFF, U+20000-2A3FF

_WORST = [
    "",
    " ",
    "\n\n",
    "\x00\x01\x7f \x85\u2028\u2029\xa0\u3000\ufeff\x1c\x1f\r\n\r \t\t\n\x0b\x0c  x   \n  y \n\n",
    "I'm don't WE'LL they'Ve it'S 'tis 'ſ 'sun' ''re \u2019s",
    "1 12 123 1234 12345678901 1,234.5 ½² ٣٤٥ 〇 Ⅷ",
    "naïve e\u0301 \u0301x \u200d \ufffd a\u0300\u0327 \u1e9b\u0323 ǆ ß ŉ K",
    "漢字かな交じり文。中文沒有空格한국어العربيةעבריתहिन्दीไทยქართული",
    "👩‍👩‍👧‍👦🏳️‍🌈🇩🇪👍🏽🙂 🙂a🙂1🙂!",
    "def f(x):\n    return x  # \t\n\n\n        y\n}}]);\n\n//====----____....!!!!????\r\n",
    "<|endoftext|> a<|endoftext|>b <|bos|><|begin_of_text|> <|endoftext",
    "ĠĊ Ġthe Âł ▁ " + "a" * 3000 + " " * 3000 + "x" + "\n" * 300 + "-" * 300 + "7" * 300,
]


class FastEncoder(Protocol):
    """Something that encodes like ``tokenizers``, only faster."""

    name: str

    def encode(self, texts: list[str], threads: int) -> list[np.ndarray | None]:
        """Give the ids of each text, None for one that it gives up. ``threads`` 0: one for each core."""
        ...


class Unsuitable(Exception):
    """An encoder cannot be used for a tokenizer.json; the text says why."""


def make_encoder(
    name: EncoderName, spec: dict[str, Any], hf: tokenizers.Tokenizer, dtype: np.dtype
) -> FastEncoder | None:
    """Make the encoder of this name, proven for the tokenizer.json ``spec``; None for ``tokenizers`` itself.

    It gives ids of ``dtype``. ``auto`` is the fastest that is installed and proven. Raises UsageError if the one asked
    for cannot be used.
    """
    if name not in get_args(EncoderName):
        raise UsageError(f"encoder {name!r} is unknown; give one of {', '.join(get_args(EncoderName))}")
    makers = {"gigatoken": Gigatoken, "tiktoken": Tiktoken}
    for each in makers if name == "auto" else [name]:
        if each == "tokenizers":
            break
        try:
            encoder = Guarded(makers[each](spec, dtype), spec)
            _prove(encoder, hf)
            return encoder
        except (Unsuitable, ImportError) as error:
            if name != "auto":
                mend = "; pip install 'pretrain[fast]'" if isinstance(error, ImportError) else ""
                raise UsageError(f"the encoder {name} cannot be used for this tokenizer: {error}{mend}") from error
    return None


class Guarded:
    """A fast encoder that is only given texts on which nothing but the vocabulary decides."""

    def __init__(self, encoder: FastEncoder, spec: dict[str, Any]) -> None:
        self._encoder = encoder
        self.name = encoder.name
        self._nfc = spec.get("normalizer") is not None
        if spec.get("normalizer") not in (None, {"type": "NFC"}):
            raise Unsuitable("it has a normalizer")
        # Special tokens are text like any other here; others are cut out of a text before anything else happens.
        self._added = [token["content"] for token in spec.get("added_tokens") or [] if not token["special"]]
        if len(self._added) > 64 or not all(content.isascii() for content in self._added):
            raise Unsuitable("its added tokens are too many or not ASCII")

    def encode(self, texts: list[str], threads: int) -> list[np.ndarray | None]:
        """Give the ids of each text, None where they must be asked of ``tokenizers``.

        Raises UnicodeEncodeError if half of a surrogate pair is in a text.
        """
        # All at once, as most batches hold nothing of the kind.
        if self._is_plain("".join(texts)):
            return self._encoder.encode(texts, threads)
        plain = [number for number, text in enumerate(texts) if self._is_plain(text)]
        encoded: list[np.ndarray | None] = [None] * len(texts)
        for number, ids in zip(plain, self._encoder.encode([texts[i] for i in plain], threads), strict=True):
            encoded[number] = ids
        return encoded

    def _is_plain(self, text: str) -> bool:
        if not text.isascii():
            units = np.frombuffer(text.encode("utf-16-le"), dtype="<u2")
            if _unsettled().take(units).any() or (self._nfc and not unicodedata.is_normalized("NFC", text)):
                return False
        return not any(content in text for content in self._added)


class Gigatoken:
    """The package gigatoken, made anew when it remembers too much."""

    name = "gigatoken"

    def __init__(self, spec: dict[str, Any], dtype: np.dtype) -> None:
        from gigatoken import Tokenizer as Backend

        self._dtype = dtype
        model, pattern = _byte_level_bpe(spec)
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        words = (
            {**byte_level, "use_regex": True}
            if pattern == GPT2
            else {"type": "Sequence", "pretokenizers": [split, byte_level]}
        )
        nothing = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
        bare = json.dumps(
            {
                "version": "1.0",
                **nothing,
                "added_tokens": [],
                "pre_tokenizer": words,
                "decoder": byte_level,
                "model": model,
            }
        )
        self._make: Callable[[], Any] = functools.partial(Backend.from_json, bare)
        try:
            self._renew()
        except (RuntimeError, ValueError) as error:  # a regex or model that it does not know
            raise Unsuitable(str(error).partition("\n")[0][:200]) from error

    def encode(self, texts: list[str], threads: int) -> list[np.ndarray | None]:
        """Encode texts. On more than one thread it takes all cores."""
        self._renew_if_grown()
        self._characters += sum(map(len, texts))
        try:
            # Left to itself it takes all cores, but one in a worker process, where its threads would not run.
            array = self._backend.encode_batch(texts, parallel=False if threads == 1 else None)
        except BaseException as error:
            return _gave_up(error, texts)
        ids = np.asarray(array.layout.content.data).astype(self._dtype)  # at once: it costs more than to cut them
        ends = array.layout.offsets.data.tolist()
        return [ids[start:end] for start, end in itertools.pairwise(ends)]

    def _renew(self) -> None:
        self._backend: Any = None  # first let go of the old one
        self._backend = self._make()
        self._characters = 0
        self._resident = _resident()

    def _renew_if_grown(self) -> None:
        if self._characters < RECYCLE_AT_LEAST:
            return
        if self._resident:
            grown = _resident() - self._resident > RECYCLE_RESIDENT
        else:
            grown = self._characters > RECYCLE_CHARACTERS
        if grown:
            self._renew()


class Tiktoken:
    """The package tiktoken with the merges of a tokenizer.json.

    It merges the two neighbours that together make the token of the lowest rank; ``tokenizers`` the two that come
    first in the list of merges. These are the same where every token is made of one merge, or of several that stand
    together, and a token that its own text does not give cannot come about within a longer word either.
    """

    name = "tiktoken"

    def __init__(self, spec: dict[str, Any], dtype: np.dtype) -> None:
        import tiktoken

        from pretrain.tokenizer.tokenizer import byte_alphabet

        model, pattern = _byte_level_bpe(spec)
        alphabet = {character: byte for byte, character in enumerate(byte_alphabet())}
        tokens = _rank(model, alphabet)
        ranks = {bytes(alphabet[character] for character in token): rank for rank, token in enumerate(tokens)}
        self._id_of_rank = np.array([model["vocab"][token] for token in tokens], dtype=dtype)
        # It looks for special tokens, none of which is allowed; without any it would stop at every character.
        none = {"<no token has this name>": len(ranks)}
        try:
            self._encoding = tiktoken.Encoding("-", pat_str=pattern, mergeable_ranks=ranks, special_tokens=none)
        except ValueError as error:
            raise Unsuitable(str(error)[:200]) from error

    def encode(self, texts: list[str], threads: int) -> list[np.ndarray | None]:
        """Encode texts in so many threads."""
        threads = min(threads or available_cores(), len(texts))
        if threads <= 1:
            return self._encode(texts)
        share = -(-len(texts) // (4 * threads))
        parts = [texts[start : start + share] for start in range(0, len(texts), share)]
        with ThreadPoolExecutor(threads) as pool:
            return [ids for part in pool.map(self._encode, parts) for ids in part]

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray | None]:
        encoded: list[np.ndarray | None] = []
        for text in texts:
            try:
                encoded.append(self._id_of_rank[self._encoding.encode_to_numpy(text, disallowed_special=())])
            except BaseException as error:  # its regex engine gives up runs of about a million blanks
                encoded += _gave_up(error, [text])
        return encoded


def available_cores() -> int:
    """Give the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _byte_level_bpe(spec: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Give the model, its merges as pairs, and the regex for words. Raises Unsuitable if it is not a plain one."""
    model, pattern = spec["model"], pattern_of(spec.get("pre_tokenizer"))
    if pattern is None:
        raise Unsuitable("it cuts words in a way that is not known")
    for option in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(option):
            raise Unsuitable(f"its model has {option}")
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    return {**model, "merges": merges}, pattern


def _rank(model: dict[str, Any], alphabet: dict[str, int]) -> list[str]:
    """Order tokens as tiktoken must: bytes, then what merges make in their order, then those that are only looked up.

    Raises Unsuitable if merging by that order might differ from merging by the list.
    """
    places: dict[str, list[int]] = {}
    for place, (left, right) in enumerate(model["merges"]):
        places.setdefault(left + right, []).append(place)
    made = sorted((found[0], token) for token, found in places.items() if len(token) > 1)
    if any(found[-1] - found[0] >= len(found) for found in places.values()):
        raise Unsuitable("merges of one token do not stand together")

    # What each token's own text gives as one word, without the look into the vocabulary that ignore_merges asks for.
    plain = tokenizers.Tokenizer.from_str(
        json.dumps({"version": "1.0", "added_tokens": [], "model": {**model, "ignore_merges": False}})
    )
    longer = [token for token in model["vocab"] if len(token) > 1 and all(character in alphabet for character in token)]
    counts = {
        token: len(encoding.ids)
        for token, encoding in zip(longer, plain.encode_batch_fast(longer, add_special_tokens=False), strict=True)
    }
    ranked = [*alphabet, *(token for _, token in made if counts.get(token) == 1)]
    if not model.get("ignore_merges"):
        return ranked
    looked_up = [token for token in longer if counts[token] > 1]
    if any(counts[token] == 2 for token in looked_up):
        raise Unsuitable("a token of two neighbours without a merge")
    return ranked + looked_up


def _prove(encoder: FastEncoder, hf: tokenizers.Tokenizer) -> None:
    """Raise Unsuitable unless the encoder gives the ids of ``tokenizers`` for all tokens and the worst texts."""
    from pretrain.tokenizer.tokenizer import bytes_of_token

    # Sorted, as the library gives its vocabulary in another order each time.
    words = sorted((bytes_of_token(token) or b"").decode("utf-8", errors="ignore") for token in hf.get_vocab())
    random.Random(0).shuffle(words)
    texts = list(_WORST)
    for start in range(0, len(words), 200):
        texts += [joint.join(words[start : start + 200]) for joint in ("", "\n")]
    expected = hf.encode_batch_fast(texts, add_special_tokens=False)
    for text, ids, right in zip(texts, encoder.encode(texts, threads=0), expected, strict=True):
        if ids is not None and ids.tolist() != right.ids:
            raise Unsuitable(f"it gives other ids for {text[:40]!r}")


@functools.cache
def _unsettled() -> np.ndarray:
    """Give bool[65536]: the UTF-16 units of characters that libraries of different Unicode versions may take apart."""
    unsettled = np.zeros(2**16, dtype=bool)
    unsettled[[code for code in range(2**16) if unicodedata.category(chr(code)) == "Cn"]] = True
    unsettled[list(_NEW_LETTERS)] = True
    unsettled[0xD800:0xDC00] = True  # the first halves of pairs; the second ones tell nothing
    for settled in _SETTLED_HIGH_SURROGATES:
        unsettled[list(settled)] = False
    return unsettled


def _resident() -> int:
    """Give the bytes of memory that this process holds now, 0 where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _gave_up(error: BaseException, texts: list[str]) -> list[np.ndarray | None]:
    """Give None for each text if the error means that a library, not the user or the machine, has stopped."""
    if isinstance(error, (ValueError, RuntimeError)) or type(error).__name__ == "PanicException":
        return [None] * len(texts)
    raise error
