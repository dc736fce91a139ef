"""From text to token shards: read, split, tokenize, write, all checked before the work begins.

text.read_documents → text.split_documents → tokenizer.build_tokenizer → shards.write_shard → manifest
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pretrain.config import Config
from pretrain.errors import DataError
from pretrain.text import embedded_name, read_documents, split_documents
from pretrain.tokenizer import Tokenizer, build_tokenizer
from pretrain.tokens.shards import Manifest, write_shard


@dataclass(frozen=True)
class Prepared:
    """A corpus ready to train on."""

    folder: Path
    manifest: Manifest
    tokenizer: Tokenizer


def prepare(config: Config, folder: Path, say: Callable[[str], None] = lambda _: None) -> Prepared:
    """Read the text that ``config.data`` names, build the tokenizer and write token shards into ``folder``.

    The folder appears whole or not at all: work is done beside it and renamed. It also holds ``tokenizer.json``.

    Raises:
        DataError: the text is missing, unreadable or too short for one context; the vocabulary does not fit it.
    """
    documents = list(read_documents(config.data.paths))
    train, val = split_documents(documents, config.data.val_fraction)
    needed = config.model.context_length + 1
    for name, part in (("training", train), ("validation", val)):
        # A token stands for at least one byte in every tokenizer, so fewer bytes can never make a window.
        size = sum(len(document.text.encode()) for document in part) + len(part)
        if size < needed and (part or name == "training"):
            raise DataError(too_short(name, size, "bytes", config))
    # Characters of all the text are known, as in nanoGPT; a trained vocabulary must not see what is held out.
    learn_from = documents if config.tokenizer.kind == "char" else train
    tokenizer = build_tokenizer(
        config.tokenizer.kind, config.tokenizer.vocab_size, [document.text for document in learn_from]
    )
    size = sum(len(document.text.encode()) for document in documents)
    name = embedded_name() if not config.data.paths else ", ".join(config.data.paths)
    say(f"text      {name}: {size / 1e6:.1f} MB in {len(documents):,} {'document' + 's' * (len(documents) != 1)}")
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    made_parent = not folder.parent.exists()
    temporary.mkdir(parents=True)
    try:
        shards = tuple(
            write_shard(temporary, split, 0, [document.text for document in part], tokenizer)
            for split, part in (("train", train), ("val", val))
        )
        for shard in shards:
            if shard.tokens < needed and (shard.documents or shard.split == "train"):
                name = "training" if shard.split == "train" else "validation"
                raise DataError(too_short(name, shard.tokens, "tokens", config))
        manifest = Manifest(tokenizer.dtype.name, tokenizer.vocab_size, tokenizer.fingerprint, shards)
        tokenizer.save(temporary / "tokenizer.json")
        manifest.save(temporary)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if made_parent:
            folder.parent.rmdir()
        raise
    return Prepared(folder, manifest, tokenizer)


def open_prepared(folder: Path) -> Prepared:
    """A folder that :func:`prepare` finished earlier."""
    return Prepared(folder, Manifest.load(folder), Tokenizer.load(folder / "tokenizer.json"))


def too_short(name: str, size: int, unit: str, config: Config) -> str:
    """The message for a split that does not fill one context."""
    length = config.model.context_length
    mend = f"give more text, or --model.context_length {max(1, size // 2)}"
    if name == "validation":
        mend += ", or a larger --data.val_fraction (0 trains on everything)"
    return f"the {name} text has {size} {unit}, shorter than one context of {length} tokens and its target; {mend}"
