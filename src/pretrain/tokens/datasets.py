"""Data sets: what ``data.paths`` names when it is token shards, and the order of training over them.

    paths ──is_tokens──> open_corpus ──> Corpus(Dataset, ..., tokenizer) ──stream(split)──> TokenStream
                                            └── training_order(corpus, config) ──> DataOrder or MixedOrder

A path is a folder that 'pretrain data prepare' made, or a folder, file or pattern of files of another tool
(``foreign``).
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pretrain.config import Config, DataConfig
from pretrain.errors import DataError, UsageError
from pretrain.io import expand
from pretrain.text.split import SIDES, TEST, VAL
from pretrain.tokenizer import Tokenizer, build_tokenizer
from pretrain.tokens.foreign import SUFFIXES, open_foreign, split_of, token_files
from pretrain.tokens.order import DATASETS, DataOrder, MixedOrder, key, mixture, mixture_shares
from pretrain.tokens.shards import MANIFEST, PLAN, Manifest
from pretrain.tokens.windows import TokenFile, TokenStream


@dataclass(frozen=True)
class Dataset:
    """Token files that belong together: one of ``data.paths``."""

    name: str  # the path as it was given
    files: Mapping[str, Sequence[TokenFile]]  # of each split, in order
    tokenizer: str  # its fingerprint; empty if unknown, as in files of other tools
    bytes_per_token: float  # UTF-8 bytes of text to a training token, on average; 0 if unknown
    fingerprint: str  # a hash of all contents for our own shards, of sizes and samples for foreign ones
    boundary: int | None = None  # the BOS token with which each document begins; None: they do not, or it is unknown

    def tokens(self, split: str) -> int:
        """Tokens of a split."""
        return sum(file.tokens for file in self.files[split])

    def stream(self, split: str) -> TokenStream:
        """The tokens of a split, in order."""
        return TokenStream(self.files[split])


@dataclass(frozen=True)
class Corpus:
    """All data sets of a run, which share a vocabulary."""

    datasets: tuple[Dataset, ...]
    tokenizer: Tokenizer

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the contents and their order; that of the data set itself if there is only one."""
        prints = [dataset.fingerprint for dataset in self.datasets]
        return prints[0] if len(prints) == 1 else hashlib.sha256(" ".join(prints).encode()).hexdigest()

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text that a training token stands for, on average; 0 if unknown of any data set."""
        known = all(dataset.bytes_per_token for dataset in self.datasets)
        total = sum(dataset.bytes_per_token * dataset.tokens("train") for dataset in self.datasets)
        return total / max(1, self.tokens("train")) if known else 0.0

    def tokens(self, split: str) -> int:
        """Tokens of a split, over all data sets."""
        return sum(dataset.tokens(split) for dataset in self.datasets)

    def stream(self, split: str) -> TokenStream:
        """The tokens of a split of all data sets, one after another."""
        return TokenStream([file for dataset in self.datasets for file in dataset.files[split]])


def is_tokens(paths: Sequence[str]) -> bool:
    """Whether these paths name token shards rather than text, by their names only.

    Raises UsageError if some do and some do not.
    """

    def names_tokens(path: str) -> bool:
        place = expand(path)
        if place.is_dir():
            return _is_ours(path) or bool(token_files(place))
        return "://" not in path and place.suffix in SUFFIXES

    tokens = list(filter(names_tokens, paths))
    text = [path for path in paths if path not in tokens]
    if tokens and text:
        raise UsageError(
            f"data.paths mixes token shards ({tokens[0]}) with text ({text[0]}); make shards of the text first:"
            f" pretrain data prepare {text[0]}"
        )
    return bool(tokens)


def _is_ours(path: str) -> bool:
    place = expand(path)
    return (place / MANIFEST).is_file() or (place / PLAN).is_file()


def open_corpus(
    paths: Sequence[str],
    tokenizer: str | Tokenizer = "",
    bos: bool | None = None,
    *,
    boundary: str = "",
    dtype: str = "auto",
) -> Corpus:
    """Open token shards.

    Args:
        paths: folders of our own shards; folders, files or patterns of other tools'.
        tokenizer: as ``tokenizer.kind``: gpt2, byte or the path of a tokenizer.json, for files of other tools, which
            come without one. The kinds that are made from a text count as none.
        bos: as ``data.bos``, which must be true of our shards; None: whatever they are.
        boundary: as ``tokenizer.bos``.
        dtype: as ``data.dtype``.

    Raises:
        DataError: something is missing, cut short or of another vocabulary than the rest.
        UsageError: the vocabulary is needed and not given, or it or ``bos`` is not that of our shards.
    """
    if isinstance(tokenizer, Tokenizer):
        given, tokenizer = tokenizer, "as before"
    else:
        given = build_tokenizer(tokenizer, 0, [], bos=boundary) if tokenizer not in ("", "bpe", "char") else None
    ours = {path: prepared_dataset(expand(path)) for path in paths if _is_ours(path)}
    first = next(iter(ours), None)
    if first is not None:
        found = Tokenizer.load(expand(first) / "tokenizer.json")
        if given is not None and given.fingerprint != found.fingerprint:
            fix = f"leave that out, or make it with: pretrain data prepare --tokenizer {tokenizer}"
            raise UsageError(f"{first} was not made with --tokenizer.kind {tokenizer}; {fix}")
    elif given is None:
        raise UsageError(
            f"{paths[0]} holds tokens without their vocabulary; name the one that they were made with:"
            f" --tokenizer.kind gpt2, or the path of its tokenizer.json"
        )
    else:
        found = given
    for path, dataset in ours.items():
        if dataset.tokenizer != found.fingerprint:
            raise DataError(f"{path} was made with another tokenizer than that in {first}; prepare it again")
        marked = dataset.boundary is not None
        bos = marked if bos is None else bos
        if marked != bos and found.bos_id is not None:
            has, use = ("a", "--data.bos") if marked else ("no", "--data.no-bos")
            raise UsageError(f"{path} has {has} BOS token before each document; use {use}, or prepare it again")
    found = found.with_bos(bos is not False)
    return Corpus(tuple(ours.get(path) or foreign_dataset(path, found, dtype) for path in paths), found)


def prepared_dataset(folder: Path) -> Dataset:
    """A folder that 'pretrain data prepare' finished. Raises DataError if a file is missing or of the wrong size."""
    if not (folder / MANIFEST).is_file() and (folder / PLAN).is_file():
        raise DataError(f"{folder} is not finished; go on with the 'pretrain data prepare' that began it")
    manifest = Manifest.load(folder)
    files: dict[str, list[TokenFile]] = {side: [] for side in SIDES}
    for shard in manifest.shards:
        file = TokenFile(folder / shard.file, shard.tokens, manifest.dtype)
        file.check()
        files[shard.split].append(file)
    return Dataset(
        str(folder), files, manifest.tokenizer, manifest.bytes_per_token, manifest.fingerprint, manifest.boundary
    )


def foreign_dataset(path: str, tokenizer: Tokenizer, dtype: str = "auto") -> Dataset:
    """Files of another tool: all of a folder, those of a pattern, or one. Their names tell the split.

    Raises DataError if there are none, or one of them is cut short, has ids that the tokenizer lacks, or is
    no token file by its looks.
    """
    found = [expand(path)]
    if found[0].is_dir():
        found = token_files(found[0])
    elif glob.has_magic(path) and not found[0].exists():
        found = [Path(match) for match in sorted(glob.glob(str(found[0]), recursive=True))]
    if not found:
        raise DataError(f"{path}: there are no such files; name token shards ({', '.join(SUFFIXES)}) or their folder")
    files: dict[str, list[TokenFile]] = {side: [] for side in SIDES}
    digest = hashlib.sha256()
    for each in found:
        split = split_of(each)
        file, hashed = open_foreign(each, tokenizer.vocab_size, dtype)
        files[split].append(file)
        digest.update(f"{split} {hashed} ".encode())
    return Dataset(path, files, "", 0.0, digest.hexdigest())


def check_undivided(data: DataConfig) -> None:
    """A UsageError if ``data`` names token shards, but a test that would have to be split off their text."""
    if data.test_fraction:
        raise UsageError(
            f"data.test_fraction is of text, and {data.paths[0]} holds tokens; hold a test out when they are made:"
            f" pretrain data prepare --test-fraction {data.test_fraction:g}"
        )


def check_marked(corpus: Corpus) -> None:
    """A UsageError if the token that begins documents is in no training file of a data set of another tool.

    For runs with ``model.document_mask``, which would mask nothing. Files are read up to the first such token.
    """
    for dataset in corpus.datasets:
        files = [] if dataset.tokenizer else dataset.files["train"]
        if files and not any(file.holds(corpus.tokenizer.bos_id) for file in files):
            raise UsageError(
                f"model.document_mask finds documents by the token that begins them, and {dataset.name} never has"
                f" {corpus.tokenizer.bos}; name the one it has with --tokenizer.bos, or leave out model.document_mask"
            )


def training_order(corpus: Corpus, config: Config) -> DataOrder | MixedOrder:
    """The order of the training windows of ``corpus.stream("train")``, by ``config.data`` and the seed.

    Without ``data.weights`` all data sets are one stream, so that each window of each comes once an epoch. With them
    each has its share of the rows, by stages with ``data.stages``, and epochs of its own.

    Raises:
        DataError: a split is shorter than one context.
        UsageError: a weight is too small, or there is not one for each data set.
    """
    length, data = config.model.context_length, config.data
    names = [dataset.name for dataset in corpus.datasets]
    if data.weights and len(data.weights) != len(names):
        raise UsageError("data.weights are of token shards, not text; make shards of each path: pretrain data prepare")
    sizes = [dataset.tokens("train") for dataset in corpus.datasets]
    order = mixed_order(names, sizes, config) if data.weights else None
    check_length(", ".join(names), "training", corpus.tokens("train"), length)
    for side, part in ((VAL, "validation"), (TEST, "test")):
        if corpus.tokens(side):
            check_length(", ".join(names), part, corpus.tokens(side), length)
    return order or DataOrder(sum(sizes), length, data.order, data.stride, config.train.seed)


def mixed_order(names: Sequence[str], sizes: Sequence[int], config: Config) -> MixedOrder:
    """The order with ``data.weights`` and ``data.stages`` of data sets with so many training tokens.

    While the number of steps is not known (0) it has the first stage alone. Raises as :func:`training_order` does.
    """
    length, data, seed = config.model.context_length, config.data, config.train.seed
    for name, tokens in zip(names, sizes, strict=True):
        check_length(name, "training", tokens, length)
    begins = [batch for batch, _ in config.mixtures]
    if (steps := config.train.steps) and len({*begins, steps}) <= len(begins):
        raise UsageError(f"train.steps {steps} are too few for data.stages: one of them has no step; give more")
    fields = ["data.weights", *["data.stages"] * len(data.stages)]
    stages = [
        (batch * config.batch_rows, mixture_shares(weights, names, field))
        for field, (batch, weights) in zip(fields, config.mixtures, strict=True)
    ]
    orders = tuple(
        DataOrder(tokens, length, data.order, data.stride, int(key(seed, number, DATASETS)[0]))
        for number, tokens in enumerate(sizes)
    )
    return mixture(orders, stages if steps else stages[:1], seed)


def check_length(name: str, part: str, tokens: int, length: int, more: str = "") -> None:
    """A DataError if the tokens do not fill one context; ``more`` is another fix."""
    if tokens <= length:
        fix = f"add more, or --model.context_length {tokens // 2}" if tokens > 1 else "add more"
        few = f"{tokens:,} {part} tokens are fewer than one context of {length} and its target"
        raise DataError(f"{name}: {few}; {fix}{more}")
