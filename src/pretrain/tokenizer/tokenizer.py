"""One class around a Hugging Face ``tokenizers.Tokenizer``, wholly defined by its tokenizer.json.

Two layouts are read, because in them every token stands for exactly known bytes: byte-level BPE (GPT-2 and its kin,
and what ``build`` trains) and single characters (``build``'s own, a WordLevel model). Decoding gives the encoded text
back unchanged; each tokenizer is tested for that when it is loaded, and what changes the text is remembered.
"""

import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tokenizers

from pretrain.errors import DataError, PretrainError
from pretrain.io import write_atomically
from pretrain.text.problems import Cuts
from pretrain.tokenizer.boundary import BOS_NAMES, find_boundary, mark_boundary, marked_boundary
from pretrain.tokenizer.fast import EncoderName, FastEncoder, make_encoder
from pretrain.tokenizer.patterns import byte_alphabet, bytes_of_token, pattern_of

Tag = TypeVar("Tag")

PIECE_CHARACTERS = 64 * 1024  # a longer document is encoded in pieces of about this, in parallel and in bounded memory
BATCH_CHARACTERS = 1024 * 1024  # encoded at once; meanwhile the library's records take about 100 bytes a token
BATCH_PIECES = 4096
FAST_AFTER = 50  # characters for each token of the vocabulary, from which a faster encoder repays making and testing it

# Where a text may be cut without changing its tokens: between a letter or digit and a space or line end. Every
# pre-tokenizer in use (GPT-2, GPT-4, Llama 3, Qwen) ends a word there and never looks back beyond it.
_SAFE_CUT = re.compile(r"(?<=[^\W_])(?=[ \n])")

# What normalizers and pre-tokenizers are known to change, shortest first: letters with marks apart or together,
# ligatures, wide and superscript forms, cases, blanks of all kinds, control characters, joined emoji, quotes.
# fmt: off
_HARD = [
    "ﬁ", "①", "x²", "e\u0301", "\xe9", "\u212b", "Word", "ＡＢ", "ﾊﾟ", "\ud55c", "\u1112\u1161\u11ab", "İ", "ß", "Σς",
    "“x”", "``x''", "½", "…", "a b", " a", "a ", "a  b", "\ta\n", "a\r\nb\n\n", "a\xa0b\u3000c", "a\u2028b\x85c",
    "\x00\x01\x7f", "\u200b\ufeff\xad", "▁a ▁", "Ġa", "a_b", "👩\u200d👩\u200d👧🏽🇩🇪", "𝔄𐍈ꙮ",
    "a\u0300\u0327\u1e9b\u0323", "<s></s>", "Hello,  World's\n\n\tfin \r\n ÀÿжѪ 漢字 नि ไทย العَرَبِيّة 0123 ",
]
# fmt: on
_LETTERS = "abcЖж漢字"  # that no normalizer changes but for their case; a tokenizer without them reads nothing right


class Tokenizer:
    """Encode text to token ids, decode ids to text or bytes.

    Attributes:
        vocab_size: the number of tokens, special ones included; the ids are 0 .. vocab_size - 1.
        bos_id: the id of the BOS token, put before each document; None if there is none (:meth:`with_bos`).
        change: a short text and what comes back of it, if the tokenizer does not give back every text; else None.
        special_ids: the ids of the tokens that stand for no text.
        dtype: the smallest of uint16 and uint32 that holds every id.
        fingerprint: the SHA-256 of the tokenizer.json in canonical form; equal fingerprints mean equal ids.
    """

    def __init__(self, text: str, name: str = "this tokenizer.json", encoder: EncoderName = "auto") -> None:
        """Take the text of a tokenizer.json.

        The ids are the same whatever the ``encoder``: gigatoken (the extra 'fast'), tiktoken, or the library
        tokenizers; ``auto`` takes the fastest that is installed and proves right, once there is much to encode.

        Raises DataError, beginning with ``name``, if it cannot be used, UsageError if the encoder cannot.
        """
        try:
            spec = json.loads(text)
            self.hf = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exceptions
            why = " ".join(str(error).split())[:200]
            raise DataError(f"{name}: not a tokenizer.json that can be read ({why})") from error
        # A file may ask for truncation, padding or special tokens around each text: none of it is for pretraining.
        self.hf.no_truncation()
        self.hf.no_padding()
        self.hf.encode_special_tokens = True  # '<|endoftext|>' in a document is text like any other

        self._text = text
        self.fingerprint = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()
        self.vocab_size = self.hf.get_vocab_size()
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)
        tokens = {id: token for token, id in self.hf.get_vocab().items()}
        if sorted(tokens) != list(range(self.vocab_size)):
            raise DataError(f"{name}: its ids are not 0 to {self.vocab_size - 1} without gaps; use another tokenizer")
        added = self.hf.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        usual = (id for id in map(self.hf.token_to_id, BOS_NAMES) if id in self.special_ids)
        marked = marked_boundary(spec)
        self.bos_id = next(usual, None) if marked is None else marked

        is_char = _is_char(spec, name)
        # _bytes[id]: what a token stands for; a special token's are its name, and left out unless asked for.
        self._bytes = [
            tokens[id].encode()
            if is_char or id in added
            else bytes_of_token(tokens[id]) or tokens[id].encode()  # as in the library's own decoder
            for id in range(self.vocab_size)
        ]
        self.change = self._find_change(spec, is_char, name)
        # Where ids can be looked up in a table, that is far faster than the library.
        self._look_up: Callable[[str], np.ndarray] | None = None
        if is_char:
            self._look_up = _character_table(self._bytes, self.special_ids)
        elif (
            b"".join(self._bytes[:256]) == bytes(range(256))
            and self.special_ids == {*range(256, self.vocab_size)}
            and not self.change
        ):
            self._look_up = lambda text: np.frombuffer(_utf8(text), dtype=np.uint8)
        # A text may be cut where ``split_text`` does if all parts of the tokenizer are known to leave its tokens alone.
        # Added tokens that are not special come before all else, and may have blanks in them; a normalizer may put
        # signs in place of a letter.
        pre_tokenizer = json.loads(self.hf.pre_tokenizer.__getstate__()) if self.hf.pre_tokenizer else None
        known = pattern_of(pre_tokenizer) is not None and not added.keys() - self.special_ids
        self._can_cut = known and spec.get("normalizer") in (None, {"type": "NFC"})
        self._nfc = spec.get("normalizer") is not None
        self._encoder_name: EncoderName = encoder
        self._characters = 0  # encoded so far, or expected
        if encoder != "auto":
            _ = self._fast_encoder  # a wrong name is an error now, not when there is much to encode

    def __reduce__(self) -> tuple[Any, ...]:  # encoders cannot be pickled
        return Tokenizer, (self._text, "this tokenizer.json", self._encoder_name), {"bos_id": self.bos_id}

    def with_bos(self, bos: bool) -> "Tokenizer":
        """Itself; without ``bos`` (``data.bos``) one of the same ids whose ``bos_id`` is None."""
        if bos or self.bos_id is None:
            return self
        other = object.__new__(Tokenizer)
        other.__dict__.update(self.__dict__, bos_id=None)
        return other

    def encode(self, text: str) -> list[int]:
        """Encode one text, without BOS. The name of a special token in it is encoded as plain text.

        Raises DataError for a character that is not in the vocabulary (kind char) or is half of a surrogate pair.
        """
        return next(self.encode_documents([(None, text)]))[1].tolist()

    def encode_documents(
        self, documents: Iterable[tuple[Tag, str]], threads: int = 0, expected: int = 0
    ) -> Iterator[tuple[Tag, np.ndarray]]:
        """Encode (tag, text) pairs in batches; yields (tag, ids) in their order, ids of ``dtype`` and without BOS.

        The tag is whatever the caller needs to know of a text when its ids come: up to about a megabyte of text is
        read ahead of them. ``threads`` 0 is one for each core. ``expected`` says about how many characters will come,
        so that a faster encoder is made at once if it pays. Raises DataError as ``encode`` does.
        """
        if self._look_up is not None:
            for tag, text in documents:
                yield tag, self._look_up(text).astype(self.dtype)
            return
        self._characters = max(self._characters, expected)
        parts: list[np.ndarray] = []  # of the document that is not complete yet
        for batch in self._batches(documents):
            encoded = self._encode_batch([piece for _, piece, _ in batch], threads)
            for ids, (tag, _, ends_document) in zip(encoded, batch, strict=True):
                parts.append(ids)
                if ends_document:
                    yield tag, np.concatenate(parts) if len(parts) > 1 else ids
                    parts = []

    def decode(self, ids: Iterable[int], show_special: bool = False) -> str:
        """Decode ids to text. Bytes that are not UTF-8 become U+FFFD; special tokens are left out, or shown by name.

        Raises DataError for an id that is not in the vocabulary.
        """
        return self.decode_bytes(ids, show_special).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int], show_special: bool = False) -> bytes:
        """Decode ids to exactly the bytes they stand for, which may end inside a character."""
        found = []
        for id in ids:
            if not 0 <= id < self.vocab_size:
                last = self.vocab_size - 1
                raise DataError(f"token id {id} is not in the vocabulary (0 to {last}): another tokenizer's?")
            if show_special or id not in self.special_ids:
                found.append(self._bytes[id])
        return b"".join(found)

    def token_bytes(self) -> np.ndarray:
        """int32[V]: the UTF-8 bytes that each token stands for, 0 for special ones (bits per byte)."""
        lengths = np.array([len(token) for token in self._bytes], dtype=np.int32)
        lengths[list(self.special_ids)] = 0
        return lengths

    @property
    def cuts(self) -> Cuts:
        """At which cuts of a document its tokens may differ from those of the whole document."""
        return "none" if self._look_up else "inside words" if self._can_cut else "all"

    @property
    def bos(self) -> str:
        """The name of the BOS token; empty if there is none."""
        return "" if self.bos_id is None else self.decode([self.bos_id], show_special=True)

    @property
    def change_in_words(self) -> str:
        """How it changes text, and what that makes of bits per byte; empty if it gives back every text."""
        if not self.change:
            return ""
        alike = len({unicodedata.normalize("NFC", text) for text in self.change}) == 1  # they look the same
        before, after = ((ascii if alike else repr)(text[:40]) for text in self.change)
        return (
            f"the tokenizer changes text ({before} comes back as {after}), so bits per byte are of the text that comes "
            f"back, and do not compare with those of other tokenizers"
        )

    def cautions(self, bos: bool = True) -> list[str]:
        """What a user should know before text is read with it, a line each; ``bos``: documents should have BOS."""
        none = (
            "the tokenizer has no token that begins a document, so documents run into one another; name one of its "
            "tokens with --tokenizer.bos"
        )
        return [*([none] if bos and self.bos_id is None else []), *([self.change_in_words] if self.change else [])]

    def to_json(self) -> str:
        """The text of the tokenizer.json."""
        return self._text

    def save(self, path: str | Path) -> None:
        """Write the tokenizer.json, as ``load`` here and in tokenizers and transformers reads it."""
        try:
            write_atomically(Path(path), self._text)
        except OSError as error:
            raise PretrainError(f"{path}: cannot be written ({error.strerror}); choose another place") from error

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a tokenizer.json. Raises DataError if it is missing, broken or of a layout not read here."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not text"
            raise DataError(f"{path}: no tokenizer can be read there ({why}); give a tokenizer.json") from error
        return cls(text, str(path))

    @classmethod
    def adopt(cls, path: str | Path, bos: str = "") -> "Tokenizer":
        """Read a tokenizer.json made by others: as ``load``, with the token that begins a document found or named.

        Raises DataError also if ``bos`` is not in the vocabulary, or text makes it.
        """
        found = cls.load(path)
        spec = json.loads(found.to_json())
        if marked_boundary(spec) is not None and not bos:
            return found
        token = bos or find_boundary(spec, Path(path).parent)
        id = found.hf.token_to_id(token) if token else None
        if bos and id is None:
            special = ", ".join(found.decode([id], show_special=True) for id in sorted(found.special_ids)) or "none"
            raise DataError(f"{path} has no token {bos!r} for tokenizer.bos; its special tokens are: {special}")
        if id is None or id == found.bos_id:
            return found
        # As it stands in a vocabulary, it may be a word that merges make, and special only by name.
        of_text = id not in found.hf.get_added_tokens_decoder() and id in found.hf.encode(token).ids
        chosen = found if of_text else cls(json.dumps(mark_boundary(spec, token, id), ensure_ascii=False), str(path))
        if of_text or id in chosen.hf.encode(token, add_special_tokens=False).ids:
            raise DataError(f"{path}: the token {token!r} stands for text and cannot begin documents; name another")
        return chosen

    def _find_change(self, spec: dict[str, Any], is_char: bool, name: str) -> tuple[str, str] | None:
        """A text of the hard ones that does not come back as it was, and what does. DataError if letters are lost."""

        def given_back(text: str) -> str:
            try:
                return self.decode(self.hf.encode(text, add_special_tokens=False).ids)
            except DataError:
                raise
            except Exception:  # a bare one of the library's, for a word that it does not know
                return ""

        letters = self.decode(range(self.vocab_size)) if is_char else _LETTERS
        back = given_back(letters)
        if back != letters and (is_char or letters.lower() not in back.lower()):
            raise DataError(
                f"{name}: this tokenizer does not give back the text it reads (it drops characters); "
                f"use a byte-level one, or --tokenizer.kind bpe"
            )
        if is_char:
            return None
        own = [token["content"] for token in spec.get("added_tokens") or [] if not token["special"]]
        own += _strings(spec.get("normalizer")) + _strings(spec.get("pre_tokenizer"))
        for text in [*_HARD, *(f"a{blanks}{each}{blanks}b" for each in own for blanks in ("  ", " "))]:
            if (back := given_back(text)) != text:
                return text, back
        return None

    def _batches(self, documents: Iterable[tuple[Tag, str]]) -> Iterator[list[tuple[Tag, str, bool]]]:
        """Group (tag, piece, whether it ends its text); long texts are cut where their tokens do not change."""
        batch: list[tuple[Tag, str, bool]] = []
        characters = 0
        for tag, text in documents:
            end = 0
            can_cut = self._can_cut and not (self._nfc and not unicodedata.is_normalized("NFC", text))
            for piece in split_text(text) if can_cut else [text]:
                end += len(piece)
                batch.append((tag, piece, end == len(text)))
                characters += len(piece)
                if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_PIECES:
                    yield batch
                    batch, characters = [], 0
        if batch:
            yield batch

    @functools.cached_property
    def _fast_encoder(self) -> FastEncoder | None:
        return make_encoder(self._encoder_name, self.hf, self.dtype)

    def _encode_batch(self, texts: list[str], threads: int) -> list[np.ndarray]:
        self._characters += sum(map(len, texts))
        much = self._encoder_name != "auto" or self._characters > FAST_AFTER * self.vocab_size
        fast = self._fast_encoder if much else None
        try:
            encoded = fast.encode(texts, threads) if fast else [None] * len(texts)
            rest = [text for text, ids in zip(texts, encoded, strict=True) if ids is None]
            if threads == 1 or len(rest) == 1:
                encodings = [self.hf.encode(text, add_special_tokens=False) for text in rest]
            else:
                encodings = self.hf.encode_batch_fast(rest, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):  # how the libraries refuse surrogates
            for text in texts:
                _utf8(text)
            raise
        left = (np.array(encoding.ids, dtype=self.dtype) for encoding in encodings)
        return [next(left) if ids is None else ids for ids in encoded]


def split_text(text: str) -> Iterator[str]:
    """Cut a long text into pieces of about PIECE_CHARACTERS, where no word ends differently for it.

    A text without such places (a megabyte of spaces) stays in one piece. Joined, the pieces are the text.
    """
    start = 0
    while cut := _SAFE_CUT.search(text, start + PIECE_CHARACTERS):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:] if start else text


def _is_char(spec: dict[str, Any], name: str) -> bool:
    """Whether a tokenizer.json has the layout of kind char; else it is byte-level. DataError if it is neither."""
    model, decoder = spec["model"], (spec.get("decoder") or {}).get("type")
    kind, vocab = model.get("type"), model.get("vocab") or {}
    if kind == "BPE" and decoder == "ByteLevel" and not model.get("dropout"):
        if missing := sum(character not in vocab for character in byte_alphabet()):
            raise DataError(f"{name}: {missing} of the 256 bytes have no token, so text would be lost; use another")
        return False
    is_char = (kind, decoder, spec.get("normalizer")) == ("WordLevel", "Fuse", None)
    if is_char and model.get("unk_token") not in vocab and all(len(token) == 1 for token in vocab):
        return True
    raise DataError(
        f"{name}: its tokens cannot be mapped to bytes exactly (model {kind}, decoder {decoder}); give a "
        f"byte-level BPE such as GPT-2's, or train one with --tokenizer.kind bpe"
    )


def _character_table(token_bytes: list[bytes], special_ids: frozenset[int]) -> Callable[[str], np.ndarray]:
    """The ids of the characters of a text, each looked up by its code point."""
    codes = {ord(token.decode()): id for id, token in enumerate(token_bytes) if id not in special_ids}
    table = np.full(max(codes) + 2, -1, dtype=np.int32)  # -1: no token; the last entry is for all code points beyond
    table[list(codes)] = list(codes.values())

    def look_up(text: str) -> np.ndarray:
        characters = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")
        ids = table[np.minimum(characters, len(table) - 1)]
        if (unknown := ids < 0).any():
            character = chr(characters[unknown.argmax()])
            raise DataError(
                f"the character {character!r} (U+{ord(character):04X}) is not in this char tokenizer's vocabulary; "
                f"leave it out, or train with text that holds it or with --tokenizer.kind bpe"
            )
        return ids

    return look_up


def _strings(tree: Any) -> list[str]:
    """The texts that a normalizer or pre-tokenizer looks for, at any depth."""
    if isinstance(tree, dict):
        found = [tree["String"]] if isinstance(tree.get("String"), str) else []
        return found + [text for each in tree.values() for text in _strings(each)]
    return [text for each in tree for text in _strings(each)] if isinstance(tree, list) else []


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        half = f"half of a surrogate pair (U+{ord(text[error.start]):04X})"
        raise DataError(f"character {error.start} of the text is {half}; is the input UTF-8?") from error
