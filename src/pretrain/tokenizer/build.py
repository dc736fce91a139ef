"""Make a tokenizer of each kind; the result is always a standard tokenizer.json."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from pretrain.errors import DataError, UsageError, did_you_mean
from pretrain.tokenizer.gpt2 import gpt2_tokenizer
from pretrain.tokenizer.patterns import PATTERNS, byte_alphabet, byte_level
from pretrain.tokenizer.tokenizer import BOS, Tokenizer, split_text

KINDS = ("bpe", "char", "byte", "gpt2")

LONG_RUN = 1000
_LONG_RUN = re.compile(rf"(?<!\S)\S{{{LONG_RUN},}}|(?<!\s)\s{{{LONG_RUN},}}")

MIN_FREQUENCY = 2  # a pair seen once teaches nothing: merging it would only learn the text by heart
MAX_TOKEN_CHARACTERS = 128  # bytes really, as each is one character here; GPT-2's longest token has as many


def build_tokenizer(kind: str, vocab_size: int, documents: Iterable[str], pattern: str = "gpt2") -> Tokenizer:
    """Make the tokenizer of this kind; the same texts give the same tokenizer on any machine.

    Args:
        kind: ``bpe`` (byte-level BPE trained on the documents), ``char`` (their distinct characters, sorted),
            ``byte`` (the 256 bytes), ``gpt2`` (the published vocabulary), or the path of a tokenizer.json.
        vocab_size: the number of tokens of a ``bpe``, BOS included; the other kinds have their own.
        documents: the texts to build ``bpe`` (training text) or ``char`` (all text) from; read once, and only by these.
        pattern: how a ``bpe`` cuts words: the name of a regex in ``patterns.PATTERNS``.

    BOS has the last id; ``char`` has one only if there is more than one document, so that a single text gives exactly
    nanoGPT's vocabulary.

    Raises UsageError for an unknown kind or a vocabulary below 257; DataError if the documents do not support so large
    a vocabulary (it names the largest they do), hold no text, or a file cannot be found or used.
    """
    match kind:
        case "bpe":
            return _train_bpe(vocab_size, documents, pattern)
        case "char":
            return _char_tokenizer(documents)
        case "byte":  # each byte its own id, so no merges
            vocab = {character: byte for byte, character in enumerate(byte_alphabet())}
            return _finish(byte_level(models.BPE(vocab=vocab, merges=[]), regex=""))
        case "gpt2":
            return gpt2_tokenizer()
    if Path(kind).is_file():
        return Tokenizer.load(kind)
    raise UsageError(
        f"tokenizer.kind {kind!r} is no such kind or file; give {', '.join(KINDS)} or the path of a tokenizer.json"
        f"{did_you_mean(kind.lower(), KINDS, or_list=False)}"
    )


def _train_bpe(vocab_size: int, documents: Iterable[str], pattern: str) -> Tokenizer:
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
    hf.train_from_iterator(_training_pieces(documents), trainer)
    largest = hf.get_vocab_size() + 1
    if largest < vocab_size:
        raise DataError(
            f"the text is too small for tokenizer.vocab_size {vocab_size}: no pair of tokens occurs twice beyond "
            f"{largest} entries; use --tokenizer.vocab_size {largest} or less, or give more text"
        )
    return _finish(hf)


def _training_pieces(documents: Iterable[str]) -> Iterator[str]:
    """Cut texts for the trainer: its memory grows with the longest text, its time with the square of the longest word.

    Texts are cut between words, so that it learns from the words it will meet; only runs of LONG_RUN characters or more
    without (or of nothing but) white space are cut anywhere.
    """
    for text in documents:
        for piece in split_text(text):
            start = 0
            for run in _LONG_RUN.finditer(piece):
                for end in range(run.start() + LONG_RUN, run.end(), LONG_RUN):
                    yield piece[start:end]
                    start = end
            yield piece[start:]


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
