"""Make a tokenizer of each kind; the result is always a standard tokenizer.json."""

import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from pretrain.errors import DataError, UsageError, did_you_mean
from pretrain.tokenizer.boundary import BOS
from pretrain.tokenizer.gpt2 import gpt2_tokenizer
from pretrain.tokenizer.patterns import PATTERNS, byte_alphabet, byte_level
from pretrain.tokenizer.tokenizer import Tokenizer, split_text

KINDS = ("bpe", "char", "byte", "gpt2")

LONG_RUN, LONG_PIECE = 1000, 256 * 1024
_LONG_RUN = re.compile(rf"(?<!\S)\S{{{LONG_RUN},}}|(?<!\s)\s{{{LONG_RUN},}}")

# The library takes about 120 bytes of memory for each byte of the different words that it learns from. So these are all
# that it learns from: some two million words of English, or as much of a text without blanks.
DIFFERENT_BYTES = 12_000_000
TOO_MANY_WORDS = "its words repeat so seldom that learning from more would take too much memory"
CHUNKS = 500_000  # stretches between blanks that are remembered, so that each is searched for words only once
# About the words that the patterns cut, found many times faster; signs in front of a word belong to it in all but gpt2.
_GPT2_WORD = re.compile(r"[^\W\d_]+|\d+|(?:[^\w\s]|_)+")
_WORD = re.compile(r"[^\w\s]?[^\W\d_]+|\d{1,3}|(?:[^\w\s]|_)+")
_BLANKS = re.compile(r"\s{2,}")

MIN_FREQUENCY = 2  # a pair seen once teaches nothing: merging it would only learn the text by heart
MAX_TOKEN_CHARACTERS = 128  # bytes really, as each is one character here; GPT-2's longest token has as many


def build_tokenizer(
    kind: str, vocab_size: int, documents: Iterable[str], pattern: str = "gpt2", bos: str = "", fewer: bool = False
) -> Tokenizer:
    """Make the tokenizer of this kind; the same texts give the same tokenizer on any machine.

    Args:
        kind: ``bpe`` (byte-level BPE trained on the documents), ``char`` (their distinct characters, sorted),
            ``byte`` (the 256 bytes), ``gpt2`` (the published vocabulary), or the path of a tokenizer.json.
        vocab_size: the number of tokens of a ``bpe``, BOS included; the other kinds have their own.
        documents: the texts to build ``bpe`` (training text) or ``char`` (all text) from; read once, and only by these.
        pattern: how a ``bpe`` cuts words: the name of a regex in ``patterns.PATTERNS``.
        bos: the token of a tokenizer.json that begins a document; empty: found in its files.
        fewer: whether a ``bpe`` has fewer tokens where the documents do not support so many.

    BOS has the last id; ``char`` has one only if there is more than one document, so that a single text gives exactly
    nanoGPT's vocabulary.

    Raises UsageError for an unknown kind or a vocabulary below 257; DataError if the documents do not support so large
    a vocabulary (it names the largest they do), hold no text, or a file cannot be found or used.
    """
    match kind:
        case "bpe":
            return _train_bpe(vocab_size, documents, pattern, fewer)
        case "char":
            return _char_tokenizer(documents)
        case "byte":  # each byte its own id, so no merges
            vocab = {character: byte for byte, character in enumerate(byte_alphabet())}
            return _finish(byte_level(models.BPE(vocab=vocab, merges=[]), regex=""))
        case "gpt2":
            return gpt2_tokenizer()
    if Path(kind).is_file():
        return Tokenizer.adopt(kind, bos)
    raise UsageError(
        f"tokenizer.kind {kind!r} is no such kind or file; give {', '.join(KINDS)} or the path of a tokenizer.json"
        f"{did_you_mean(kind.lower(), KINDS, or_list=False)}"
    )


def _train_bpe(vocab_size: int, documents: Iterable[str], pattern: str, fewer: bool) -> Tokenizer:
    """256 bytes, the merges learned from words as ``pattern`` cuts them, and BOS last."""
    if vocab_size < 257:
        raise UsageError(f"tokenizer.vocab_size is {vocab_size}: a bpe has at least 257 (256 bytes + 1 special)")
    hf = byte_level(models.BPE(), PATTERNS[pattern])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=MIN_FREQUENCY,
        max_token_length=MAX_TOKEN_CHARACTERS,
        initial_alphabet=byte_alphabet(),
        show_progress=False,
    )
    word = _GPT2_WORD if pattern == "gpt2" else _WORD
    hf.train_from_iterator(_training_pieces(documents, word), trainer)
    largest = hf.get_vocab_size() + 1
    if largest < vocab_size and not fewer:
        raise DataError(
            f"the text is too small for tokenizer.vocab_size {vocab_size}: no pair of tokens occurs twice beyond "
            f"{largest} entries; use --tokenizer.vocab_size {largest} or less, or give more text"
        )
    return _finish(hf)


def _training_pieces(documents: Iterable[str], word: re.Pattern[str]) -> Iterator[str]:
    """Cut texts for the trainer: its memory grows with the longest text, its time with the square of the longest word.

    Texts are cut between words, so that it learns from the words it will meet; only runs of LONG_RUN characters or more
    without (or of nothing but) white space, and what has no good place in LONG_PIECE characters, are cut anywhere. They
    end early when the different words in them, as ``word`` finds them, have DIFFERENT_BYTES: memory grows with these.
    """
    chunks, words, size = set[str](), set[str](), 0
    for piece in chain.from_iterable(map(learning_pieces, documents)):
        start = 0
        for run in _LONG_RUN.finditer(piece):
            for end in range(run.start() + LONG_RUN, run.end(), LONG_RUN):
                yield piece[start:end]
                start = end
        yield piece[start:]

        if len(chunks) > CHUNKS:
            chunks.clear()
        new = set(piece.split()) - chunks
        chunks |= new
        new_words = {*word.findall("\n".join(new)), *_BLANKS.findall(piece)} - words
        words |= new_words
        size += sum(len(each.encode(errors="replace")) + 1 for each in new_words)  # with the blank in front
        if size >= DIFFERENT_BYTES:
            return


def learning_pieces(text: str) -> Iterator[str]:
    """Cut a text as a bpe learns from it: between words, or after LONG_PIECE characters without a good place."""
    for piece in split_text(text):
        for begin in range(0, len(piece), LONG_PIECE):
            yield piece[begin : begin + LONG_PIECE]


def _char_tokenizer(documents: Iterable[str]) -> Tokenizer:
    """The distinct characters of the documents, ids in their sorted order (as nanoGPT)."""
    characters: set[str] = set()
    count = 0
    for count, text in enumerate(documents, start=1):  # noqa: B007 - the number of documents is used below
        characters.update(text)
    if not characters:
        raise DataError("there is no text to take the characters of a char tokenizer from; give some with --data.paths")
    # WordLevel with every character a word of its own; the unknown token is deliberately absent from the vocabulary, so
    # that a character which is not in it is an error and never silently something else.
    vocab = {character: id for id, character in enumerate(sorted(characters))}
    hf = HFTokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    hf.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    hf.decoder = decoders.Fuse()
    return _finish(hf, with_bos=count > 1)


def _finish(hf: HFTokenizer, with_bos: bool = True) -> Tokenizer:
    if with_bos:
        hf.add_special_tokens([BOS])
    return Tokenizer(hf.to_str())
