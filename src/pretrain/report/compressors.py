"""What general compressors reach on held-out text, given the training text: a baseline that learns as it reads.

bytes of (training text + held-out text) compressed - bytes of the training text compressed, over the held-out bytes

It goes on learning inside the held-out text, which a GPT does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from importlib.util import find_spec

from pretrain.io import cores

TRAIN_BYTES, HELD_OUT_BYTES = 2**22, 2**19
"""The last bytes of the training text and the first of the held-out text that are compressed, at most: together they
take about 20 s of one core, most of it for xz."""
AT_ONCE_BYTES = 2**17
"""Up to so much text takes half a second and is compressed whenever a page is made."""
ORDERS = (4, 6, 8, 12)
"""Symbols before each that PPMd looks at, at most; the best one counts."""
THREADS = 4


def xz(text: bytes) -> int:
    """Bytes of a text as ``xz -9e`` packs it; its memory fits the text, without a change of the result."""
    import lzma

    dictionary = 1 << max(16, len(text).bit_length())
    packing = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dictionary}
    return len(lzma.compress(text, filters=[packing]))


def ppmd(text: bytes, order: int) -> int:
    """Bytes of a text as PPMd packs it (Shkarin 2002, variant I)."""
    import pyppmd  # pyright: ignore[reportMissingImports]

    return len(pyppmd.compress(text, max_order=order, mem_size=min(2**29, max(2**24, 64 * len(text)))))


def compressors() -> dict[str, dict[str, Callable[[bytes], int]]]:
    """The compressors that are installed: of each, under what the page calls them, its settings to choose from."""
    found: dict[str, dict[str, Callable[[bytes], int]]] = {}
    if find_spec("lzma") and find_spec("_lzma"):
        found["xz"] = {"xz -9e": xz}
    if find_spec("pyppmd"):
        found["PPMd"] = {f"PPMd, order {order}": partial(ppmd, order=order) for order in ORDERS}
    return found


def bits_per_byte(
    chosen: Mapping[str, Mapping[str, Callable[[bytes], int]]], train: bytes, held_out: bytes
) -> dict[str, tuple[str, float]]:
    """The best setting of each compressor, and the bits that a byte of the held-out text takes with it."""
    best: dict[str, tuple[str, float]] = {}
    with ThreadPoolExecutor(min(THREADS, cores())) as pool:  # they all work without Python's lock
        packed = {
            (name, setting): [pool.submit(pack, text) for text in (train + held_out, train)]
            for name, settings in chosen.items()
            for setting, pack in settings.items()
        }
        for (name, setting), (both, alone) in packed.items():
            with suppress(MemoryError):
                bits = 8 * (both.result() - alone.result()) / len(held_out)
                if name not in best or bits < best[name][1]:
                    best[name] = setting, bits
    return best
