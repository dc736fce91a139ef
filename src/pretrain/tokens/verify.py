"""Read every byte of a folder of token shards again and compare it with the manifest.

manifest.json, tokenizer.json  →  each shard: there, size, ids, SHA-256  →  faults, a line each
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from pretrain.errors import DataError
from pretrain.io import cores
from pretrain.tokenizer import Tokenizer
from pretrain.tokens.progress import Progress
from pretrain.tokens.shards import MANIFEST, Manifest, Shard
from pretrain.tokens.windows import TokenFile

CHUNK = 8 * 2**20


def verify(folder: Path, tokenizer: Tokenizer | None = None, progress: Progress | None = None) -> list[str]:
    """What is wrong with a folder that 'pretrain data prepare' made; nothing if all is as it was written.

    ``tokenizer`` is one that the shards should have been made with; the folder's own is checked in any case. Raises
    DataError if there is no manifest that can be read.
    """
    progress = progress or Progress()
    manifest = Manifest.load(folder)
    faults = _tokenizer_faults(folder, manifest, tokenizer)
    listed = {shard.file for shard in manifest.shards}
    faults += [f"{file} is not in {MANIFEST}" for file in sorted(folder.glob("*.bin")) if file.name not in listed]
    total = sum(shard.tokens for shard in manifest.shards) * np.dtype(manifest.dtype).itemsize
    with progress.stage("verifying", total), ThreadPoolExecutor(cores()) as pool:
        for found in pool.map(lambda shard: _shard_faults(folder, manifest, shard, progress), manifest.shards):
            faults += found
    return faults


def _tokenizer_faults(folder: Path, manifest: Manifest, tokenizer: Tokenizer | None) -> list[str]:
    faults = []
    if tokenizer is not None and tokenizer.fingerprint != manifest.tokenizer:
        faults.append(f"{folder / MANIFEST} was made with another tokenizer than the one given")
    try:
        own = Tokenizer.load(folder / "tokenizer.json")
    except DataError as error:
        return [*faults, str(error)]
    if own.fingerprint != manifest.tokenizer:
        faults.append(f"{folder / MANIFEST} was made with another tokenizer than {folder / 'tokenizer.json'}")
    elif (own.vocab_size, own.dtype.name) != (manifest.vocab_size, manifest.dtype) or (
        manifest.boundary not in (own.bos_id, None)
    ):
        faults.append(f"{folder / MANIFEST} has another vocabulary size, dtype or BOS token than its tokenizer")
    return faults


def _shard_faults(folder: Path, manifest: Manifest, shard: Shard, progress: Progress) -> list[str]:
    file, dtype = folder / shard.file, np.dtype(manifest.dtype).newbyteorder("<")
    digest, largest = hashlib.sha256(), -1
    try:
        TokenFile(file, shard.tokens, manifest.dtype).check()
        with open(file, "rb") as data:
            while chunk := data.read(CHUNK):
                digest.update(chunk)
                largest = max(largest, int(np.frombuffer(chunk, dtype).max()))
                progress.add(len(chunk))
    except DataError as error:
        return [str(error)]
    except OSError as error:
        return [f"{file} cannot be read ({error.strerror})"]
    faults = []
    if digest.hexdigest() != shard.sha256:
        faults.append(f"{file} is not what was written (its SHA-256 is {digest.hexdigest()[:12]}…)")
    if largest >= manifest.vocab_size:
        faults.append(f"{file} has the token {largest:,}, beyond the vocabulary of {manifest.vocab_size:,}")
    return faults
