"""Faster encoders of byte-level BPE, whose ids are those of the library ``tokenizers`` or are not used at all.

    texts ──┬── plain ──> gigatoken, or else tiktoken ──> ids
            └── None: left to ``tokenizers``  (a text in which Unicode versions, added tokens or a normalizer matter,
                                               or on which the encoder gives up)

gigatoken (the extra 'fast') caches every word that it meets, tiktoken is fast without that. Each is made from the
vocabulary, merges and regex of the tokenizer.json itself. Before it is used, it must encode every token of the
vocabulary in two contexts, and the worst texts we know, as ``tokenizers`` does.
"""

import functools
import itertools
import json
import random
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, get_args

import numpy as np
import psutil
import tokenizers
from tokenizers import models

from pretrain.errors import UsageError
from pretrain.io import cores
from pretrain.tokenizer.patterns import byte_alphabet, byte_level, bytes_of_token, pattern_of

EncoderName = Literal["auto", "gigatoken", "tiktoken", "tokenizers"]

# gigatoken's cache of words only grows: by 20 MB on 45 MB of English, by five times the text on random letters. So it
# is made anew, in a tenth of a second, when the process has grown by so many bytes.
RECYCLE_RESIDENT = 128 * 1024 * 1024
RECYCLE_AT_LEAST = 16 * 1024 * 1024  # but not before so many characters, since the process may grow for other reasons

# What the regexes call a letter, a digit or white space differs only for characters newer than the Unicode version of a
# library. Letters and digits that came with Unicode 15 and later; those that this Python does not know yet and all
# outside the Basic Multilingual Plane join them, except the blocks of emoji and the old Chinese characters.
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


class Unsuitable(Exception):
    """An encoder cannot be used for a tokenizer.json; the text says why."""


def make_encoder(name: EncoderName, hf: tokenizers.Tokenizer, dtype: np.dtype) -> "FastEncoder | None":
    """The encoder of this name with the ids of ``hf``; None for ``hf`` itself.

    ``auto`` is the fastest that is installed and proven. Raises UsageError if the one asked for cannot be used.
    """
    if name not in get_args(EncoderName):
        raise UsageError(f"encoder {name!r} is unknown; give one of {', '.join(get_args(EncoderName))}")
    backends = {"gigatoken": Gigatoken, "tiktoken": Tiktoken}
    for each in backends if name == "auto" else backends.keys() & {name}:
        try:
            return FastEncoder(backends[each], hf, dtype)
        except (Unsuitable, ImportError) as error:
            if name != "auto":
                fix = "; pip install 'pretrain[fast]'" if isinstance(error, ImportError) else ""
                raise UsageError(f"the encoder {name} cannot be used for this tokenizer: {error}{fix}") from error
    return None


class FastEncoder:
    """A backend tested against ``tokenizers``, and only given texts whose ids depend on the vocabulary alone."""

    def __init__(self, backend: "type[Gigatoken | Tiktoken]", hf: tokenizers.Tokenizer, dtype: np.dtype) -> None:
        """Raise Unsuitable if the backend might give, or does give, other ids than ``hf`` does."""
        spec = json.loads(hf.to_str())  # not the file: older ones write merges in another way
        self._nfc = spec.get("normalizer") is not None
        if spec.get("normalizer") not in (None, {"type": "NFC"}):
            raise Unsuitable("it has a normalizer")
        # Special tokens are text like any other here; other added tokens are cut out of a text before anything else.
        self._added = [token["content"] for token in spec["added_tokens"] if not token["special"]]
        if len(self._added) > 64 or not all(content.isascii() for content in self._added):
            raise Unsuitable("its added tokens are too many or not ASCII")
        if (regex := pattern_of(spec.get("pre_tokenizer"))) is None:
            raise Unsuitable("the regex by which it cuts words is not known")
        model = spec["model"]
        options = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
        if any(model.get(option) for option in options):
            raise Unsuitable(f"its model has one of {', '.join(options)}")
        self.backend = backend(model, regex, dtype)

        # Sorted, as the library gives its vocabulary in another order each time.
        words = sorted((bytes_of_token(token) or b"").decode("utf-8", errors="ignore") for token in hf.get_vocab())
        random.Random(0).shuffle(words)
        texts = list(_WORST)
        for start in range(0, len(words), 200):
            texts += [joint.join(words[start : start + 200]) for joint in ("", "\n")]
        expected = hf.encode_batch_fast(texts, add_special_tokens=False)
        for text, ids, encoding in zip(texts, self.encode(texts, threads=0), expected, strict=True):
            if ids is not None and ids.tolist() != encoding.ids:
                raise Unsuitable(f"it gives other ids for {text[:40]!r}")

    def encode(self, texts: list[str], threads: int) -> list[np.ndarray | None]:
        """The ids of each text, None where ``tokenizers`` must be asked. ``threads`` 0: one for each core.

        Raises UnicodeEncodeError if half of a surrogate pair is in a text.
        """
        if self._is_plain("".join(texts)):  # all at once, as most batches hold nothing of the kind
            return self.backend.encode(texts, threads)
        plain = [self._is_plain(text) for text in texts]
        encoded = iter(self.backend.encode(list(itertools.compress(texts, plain)), threads))
        return [next(encoded) if is_plain else None for is_plain in plain]

    def _is_plain(self, text: str) -> bool:
        if not text.isascii():
            units = np.frombuffer(text.encode("utf-16-le"), dtype="<u2")
            if _unsettled().take(units).any() or (self._nfc and not unicodedata.is_normalized("NFC", text)):
                return False
        return not any(content in text for content in self._added)


class Gigatoken:
    """The package gigatoken, made anew when its cache has grown too large.

    Takes the ``model`` of a tokenizer.json and the regex that cuts words, as Tiktoken does.
    """

    def __init__(self, model: dict[str, Any], regex: str, dtype: np.dtype) -> None:
        import gigatoken

        bare = json.loads(byte_level(models.BPE(), regex).to_str()) | {"model": model}
        self._make = functools.partial(gigatoken.Tokenizer.from_json, json.dumps(bare))
        self._dtype = dtype
        try:
            self._renew()
        except (RuntimeError, ValueError) as error:  # a regex or model that it does not know
            raise Unsuitable(str(error).partition("\n")[0][:200]) from error

    def encode(self, texts: list[str], threads: int) -> list[np.ndarray | None]:
        """The ids of each text, None where it gave up. More than one thread means all cores."""
        if self._characters >= RECYCLE_AT_LEAST and _resident() - self._resident > RECYCLE_RESIDENT:
            self._renew()
        self._characters += sum(map(len, texts))
        try:
            # By default it takes all cores, but one in a worker process, where its threads would not run.
            array = self._tokenizer.encode_batch(texts, parallel=False if threads == 1 else None)
        except BaseException as error:
            _check_gave_up(error)
            return [None] * len(texts)
        ids = np.asarray(array.layout.content.data).astype(self._dtype)  # all at once: slower than slicing
        return [ids[start:end] for start, end in itertools.pairwise(array.layout.offsets.data.tolist())]

    def _renew(self) -> None:
        self._tokenizer: Any = None  # frees the old one first
        self._tokenizer = self._make()
        self._characters = 0
        self._resident = _resident()


class Tiktoken:
    """The package tiktoken with the merges of a tokenizer.json.

    It merges the two neighbours that together make the token of the lowest rank; ``tokenizers`` the two that come
    first in the list of merges. These are the same where every token is made of one merge, or of several that stand
    together, and a token that its own text does not give cannot come about within a longer word either.
    """

    def __init__(self, model: dict[str, Any], regex: str, dtype: np.dtype) -> None:
        import tiktoken

        tokens = _rank(model)
        ranks = {bytes_of_token(token) or b"": rank for rank, token in enumerate(tokens)}
        self._id_of_rank = np.array([model["vocab"][token] for token in tokens], dtype=dtype)
        # It looks for special tokens, none of which is allowed; without any it would stop at every character.
        none = {"<no token has this name>": len(ranks)}
        try:
            self._encoding = tiktoken.Encoding("-", pat_str=regex, mergeable_ranks=ranks, special_tokens=none)
        except ValueError as error:
            raise Unsuitable(str(error)[:200]) from error

    def encode(self, texts: list[str], threads: int) -> list[np.ndarray | None]:
        """The ids of each text, None for those it gave up on."""
        if (threads := min(threads or cores(), len(texts))) <= 1:
            return [self._encode(text) for text in texts]
        with ThreadPoolExecutor(threads) as pool:
            part = -(-len(texts) // (4 * threads))
            parts = [texts[start : start + part] for start in range(0, len(texts), part)]
            return [ids for encoded in pool.map(lambda part: [*map(self._encode, part)], parts) for ids in encoded]

    def _encode(self, text: str) -> np.ndarray | None:
        try:
            return self._id_of_rank[self._encoding.encode_to_numpy(text, disallowed_special=())]
        except BaseException as error:  # its regex engine gives up on runs of about a million spaces
            _check_gave_up(error)
            return None


def _rank(model: dict[str, Any]) -> list[str]:
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
    longer = [token for token in model["vocab"] if len(token) > 1 and bytes_of_token(token) is not None]
    counts = {
        token: len(encoding.ids)
        for token, encoding in zip(longer, plain.encode_batch_fast(longer, add_special_tokens=False), strict=True)
    }
    ranked = [*byte_alphabet(), *(token for _, token in made if counts.get(token) == 1)]
    if not model.get("ignore_merges"):
        return ranked
    looked_up = [token for token in longer if counts[token] > 1]
    if any(counts[token] == 2 for token in looked_up):
        raise Unsuitable("a token of two neighbours without a merge")
    return ranked + looked_up


@functools.cache
def _unsettled() -> np.ndarray:
    """bool[65536]: the UTF-16 units of characters that libraries of different Unicode versions may take apart."""
    unsettled = np.array([unicodedata.category(chr(code)) == "Cn" for code in range(2**16)])
    unsettled[list(_NEW_LETTERS)] = True
    unsettled[0xD800:0xDC00] = True  # the first halves of pairs; the second ones tell nothing
    for settled in _SETTLED_HIGH_SURROGATES:
        unsettled[list(settled)] = False
    return unsettled


def _resident() -> int:
    """Bytes of memory that this process holds now."""
    return psutil.Process().memory_info().rss


def _check_gave_up(error: BaseException) -> None:
    """Raise the error again unless it says that the library failed, rather than the user or the machine."""
    if not isinstance(error, (ValueError, RuntimeError)) and type(error).__name__ != "PanicException":
        raise error
