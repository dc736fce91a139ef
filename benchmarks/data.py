"""Speed and memory of data beside rivals, in one run on one machine.

    python benchmarks/data.py                          all three tables
    python benchmarks/data.py batches                  tokens/s into batches of 32 rows, at T=256 and T=1024, one thread
    python benchmarks/data.py encode [--text FILE]     MB/s of text into GPT-2 tokens, in memory, on all cores
    python benchmarks/data.py prepare [--text FILE]    MB/s from a JSONL file to tokens on disk, whole processes

Rivals take part where they can be imported: litdata, torchdata, tiktoken, gigatoken. Without ``--text`` the text is
the embedded corpus, its lines shuffled anew until there are ``--megabytes``; real text has more different words, which
costs encoders with a cache of words the most. Contenders run in processes of their own, ``--rounds`` times; the best is
shown. Memory is the most that the process and its children held together (on Linux: proportional shares), in a run of
its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROWS = 32
LENGTHS = (256, 1024)
FILES = 8
"""Shards of the same tokens in the row of several shards."""
SECONDS = 1.0
"""How long batches are drawn in a round."""
LINES = 5
"""Lines of the embedded corpus in a document: about 4 kB."""

GPT2_WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
"""How GPT-2 splits text into words, in a form that is fast in tiktoken."""


def our_batches(folder: Path, length: int, files: int) -> Callable[[], object]:
    """Shuffled training batches of one or several shards."""
    from itertools import count

    from pretrain.tokens import DataOrder, TokenStream, TrainingBatches
    from pretrain.tokens.windows import TokenFile

    file = folder / "train.bin"
    tokens = file.stat().st_size // 2
    part = tokens // files
    stream = TokenStream([TokenFile(file, part, "uint16", 2 * number * part) for number in range(files)])
    batches = TrainingBatches(stream, DataOrder(len(stream), length, "shuffled", 0, seed=1), ROWS)
    steps = count()
    return lambda: batches.batch(next(steps))


def nanogpt_batches(folder: Path, length: int) -> Callable[[], object]:
    """What nanoGPT's get_batch does: open the file anew, draw starts, turn each slice into a tensor, stack them."""
    import numpy as np
    import torch

    def batch() -> object:
        tokens = np.memmap(folder / "train.bin", dtype=np.uint16, mode="r")
        starts = torch.randint(len(tokens) - length, (ROWS,)).tolist()

        def rows(shift: int) -> torch.Tensor:
            slices = [tokens[start + shift : start + shift + length].astype(np.int64) for start in starts]
            return torch.stack([torch.from_numpy(part) for part in slices])

        return rows(0), rows(1)

    return batch


def litdata_batches(folder: Path, length: int) -> Callable[[], object]:
    """Blocks of litdata's TokensLoader, shuffled, through its own loader without workers."""
    import numpy as np
    import torch
    from litdata import StreamingDataLoader, StreamingDataset  # type: ignore[import-not-found]
    from litdata.streaming.item_loader import TokensLoader  # type: ignore[import-not-found]
    from litdata.streaming.writer import BinaryWriter  # type: ignore[import-not-found]

    block, chunk = length + 1, 8000
    target = folder / f"litdata-{length}"
    if not target.exists():
        tokens = np.memmap(folder / "train.bin", dtype=np.uint16, mode="r")
        target.mkdir()
        writer = BinaryWriter(str(target), chunk_size=block * chunk, item_loader=TokensLoader(block))
        for number in range(len(tokens) // (block * chunk)):
            part = tokens[number * block * chunk : (number + 1) * block * chunk]
            writer[number] = torch.from_numpy(part.astype(np.int32))
        writer.done()
        writer.merge()
    data = StreamingDataset(str(target), item_loader=TokensLoader(block), shuffle=True, drop_last=True)
    return forever(StreamingDataLoader(data, batch_size=ROWS, num_workers=0))


def torchdata_batches(folder: Path, length: int) -> Callable[[], object]:
    """Windows one by one through torchdata's StatefulDataLoader without workers."""
    import numpy as np
    import torch
    from torchdata.stateful_dataloader import StatefulDataLoader  # type: ignore[import-not-found]

    tokens = np.memmap(folder / "train.bin", dtype=np.uint16, mode="r")

    class Windows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return (len(tokens) - 1) // length

        def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
            window = torch.from_numpy(tokens[number * length : (number + 1) * length + 1].astype(np.int64))
            return window[:-1], window[1:]

    return forever(StatefulDataLoader(Windows(), batch_size=ROWS, shuffle=True, num_workers=0))


def forever(loader: object) -> Callable[[], object]:
    """Draw from a loader again and again."""

    def draw() -> Iterator[object]:
        while True:
            yield from loader  # type: ignore[misc]

    return draw().__next__


BATCHES: dict[str, Callable[[Path, int], Callable[[], object]]] = {
    "pretrain, 1 shard": lambda folder, length: our_batches(folder, length, 1),
    f"pretrain, {FILES} shards": lambda folder, length: our_batches(folder, length, FILES),
    "nanoGPT get_batch": nanogpt_batches,
    "litdata TokensLoader": litdata_batches,
    "torchdata StatefulDataLoader": torchdata_batches,
}


def measure_batches(contender: str, folder: str, length: str) -> dict[str, float]:
    """Tokens a second, drawing batches one after another."""
    import torch

    torch.set_num_threads(1)
    batch = BATCHES[contender](Path(folder), int(length))
    for _ in range(20):
        batch()
    done, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < SECONDS:
        for _ in range(100):
            batch()
        done += 100
    return {"rate": done * ROWS * int(length) / (time.perf_counter() - begin)}


def compare_batches(folder: Path, rounds: int, tokens: int) -> None:
    """The table of batches."""
    import numpy as np

    draw = np.random.default_rng(0)
    with open(folder / "train.bin", "wb") as out:  # as just written, it is in the page cache
        for _ in range(0, tokens, 10**7):
            out.write(draw.integers(0, 50257, 10**7, dtype=np.uint16).tobytes())
    print(f"\nbatches of {ROWS} rows from {tokens / 1e6:.0f} million tokens, one thread, best of {rounds}, Mtokens/s")
    print(f"{'':<30}" + "".join(f"{f'T={length}':>9}" for length in LENGTHS))
    for name in BATCHES:
        package = name.split()[0].rstrip(",")
        if package in ("litdata", "torchdata") and not importlib.util.find_spec(package):
            print(f"{name:<30}  (not installed)")
            continue
        rates = [
            max(worker("batches", name, str(folder), str(length))["rate"] for _ in range(rounds)) for length in LENGTHS
        ]
        print(f"{name:<30}" + "".join(f"{rate / 1e6:9.0f}" for rate in rates), flush=True)


def documents(text: str, megabytes: int) -> Iterator[str]:
    """The text of a file as documents of about 4 kB; or those of the embedded corpus, shuffled anew each time round."""
    if text:
        lines = Path(text).read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        yield from ("".join(lines[i : i + LINES]) for i in range(0, len(lines), LINES))
        return
    from pretrain.text import embedded_documents

    lines = [line for document in embedded_documents() for line in document.text.splitlines(keepends=True)]
    draw, left = random.Random(0), megabytes * 10**6
    while left > 0:
        draw.shuffle(lines)
        for i in range(0, len(lines), LINES):
            yield (document := "".join(lines[i : i + LINES]))
            left -= len(document)
            if left <= 0:
                return


def tiktoken_encoding() -> Any:
    """GPT-2's vocabulary as a tiktoken.Encoding, without its download."""
    import tiktoken  # type: ignore[import-not-found]

    from pretrain.tokenizer import build_tokenizer

    ours = build_tokenizer("gpt2", 0, [])
    ranks = {ours.decode_bytes([id]): id for id in range(ours.vocab_size) if id not in ours.special_ids}
    return tiktoken.Encoding("gpt2", pat_str=GPT2_WORDS, mergeable_ranks=ranks, special_tokens={})


def encoder(contender: str) -> Callable[[list[str]], int]:
    """A function that encodes texts and gives the number of tokens."""
    kind, _, which = contender.partition(", ")
    if kind == "pretrain":
        from pretrain.tokenizer import Tokenizer

        ours = Tokenizer(gpt2_json(), encoder=which)  # type: ignore[call-arg]
        return lambda texts: sum(len(ids) for _, ids in ours.encode_documents(enumerate(texts)))
    if kind == "tiktoken":
        encoding = tiktoken_encoding()
        threads = os.cpu_count() or 1
        return lambda texts: sum(map(len, encoding.encode_ordinary_batch(texts, num_threads=threads)))
    import tokenizers

    hf = tokenizers.Tokenizer.from_str(gpt2_json())
    return lambda texts: sum(len(part.ids) for part in hf.encode_batch_fast(texts, add_special_tokens=False))


def gpt2_json() -> str:
    """GPT-2's tokenizer.json."""
    from pretrain.tokenizer import build_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "tokenizer.json")
        build_tokenizer("gpt2", 0, []).save(file)
        return file.read_text(encoding="utf-8")


def measure_encode(contender: str, file: str) -> dict[str, float]:
    """Seconds to encode all documents, and the tokens they make."""
    texts = [json.loads(line)["text"] for line in Path(file).read_text(encoding="utf-8").splitlines()]
    encode = encoder(contender)
    encode(texts[:10])
    begin = time.perf_counter()
    tokens = encode(texts)
    return {"seconds": time.perf_counter() - begin, "tokens": tokens}


def encoders(only: str) -> list[str]:
    """The contenders that are installed; ``only`` those that have this in their names."""
    fast = [name for name in ("gigatoken", "tiktoken") if importlib.util.find_spec(name)]
    names = [f"pretrain, {name}" for name in (*fast, "tokenizers")] + [*fast[1:], "tokenizers"]
    return [name for name in names if only in name]


def compare_encode(file: Path, rounds: int, only: str) -> None:
    """The table of encoding."""
    size = sum(len(json.loads(line)["text"].encode()) for line in file.open(encoding="utf-8"))
    print(f"\nencoding {size / 1e6:.0f} MB with GPT-2's vocabulary, {os.cpu_count()} cores, best of {rounds}")
    for name in encoders(only):
        memory = worker("encode", name, str(file), watched=True)["peak"]
        results = [worker("encode", name, str(file)) for _ in range(rounds)]
        best = min(result["seconds"] for result in results)
        print(
            f"{name:<30}{size / best / 1e6:7.1f} MB/s   {int(results[0]['tokens']):,} tokens   {memory / 1e6:6.0f} MB",
            flush=True,
        )


def prepare_alone(contender: str, file: str, target: str) -> dict[str, float]:
    """What a script does with a tokenizer and no more: read, encode in batches, write uint16."""
    import numpy as np

    if contender == "tiktoken":
        encoding, threads = tiktoken_encoding(), os.cpu_count() or 1

        def encode(texts: list[str]) -> list[list[int]]:
            return encoding.encode_ordinary_batch(texts, num_threads=threads)
    else:
        import tokenizers

        hf = tokenizers.Tokenizer.from_str(gpt2_json())

        def encode(texts: list[str]) -> list[list[int]]:
            return [part.ids for part in hf.encode_batch_fast(texts, add_special_tokens=False)]

    boundary, tokens = 50256, 0
    with open(file, encoding="utf-8") as lines, open(target, "wb") as out:
        texts: list[str] = []
        for line in lines:
            texts.append(json.loads(line)["text"])
            if len(texts) == 1024:
                tokens += sum(out.write(np.array([boundary, *ids], dtype=np.uint16).data) for ids in encode(texts))
                texts = []
        tokens += sum(out.write(np.array([boundary, *ids], dtype=np.uint16).data) for ids in encode(texts))
    return {"tokens": tokens / 2}


def compare_prepare(file: Path, folder: Path, rounds: int, only: str) -> None:
    """The table of whole preparation, from the start of the command to its end."""
    size = sum(len(json.loads(line)["text"].encode()) for line in file.open(encoding="utf-8"))
    vocabulary = folder / "gpt2.json"
    vocabulary.write_text(gpt2_json(), encoding="utf-8")
    cores = os.cpu_count() or 1
    print(f"\npreparing {size / 1e6:.0f} MB of JSONL with GPT-2's vocabulary, {cores} cores, best of {rounds}")
    for name in encoders(only):
        kind, _, which = name.partition(", ")
        best, memory = float("inf"), 0.0
        for number in range(rounds + 1):
            out = folder / "out"
            shutil.rmtree(out, ignore_errors=True)
            if kind == "pretrain":
                command = [sys.executable, "-m", "pretrain", "data", "prepare", str(file), "--out", str(out)]
                command += ["--tokenizer", str(vocabulary), "--workers", str(cores), "--val-fraction", "0"]
                hidden = {"gigatoken": [], "tiktoken": ["gigatoken"], "tokenizers": ["gigatoken", "tiktoken"]}[which]
            else:
                out.mkdir()
                command = [sys.executable, __file__, "worker", "prepare", name, str(file), str(out / "train.bin")]
                hidden = []
            _, seconds, peak = run(command, without(folder / "hidden", hidden), watched=number == 0)
            best, memory = min(best, seconds), max(memory, peak)
        tokens = sum(each.stat().st_size for each in (folder / "out").glob("*.bin")) // 2
        print(f"{name:<30}{size / best / 1e6:7.1f} MB/s   {tokens:,} tokens   {memory / 1e6:6.0f} MB", flush=True)


def without(folder: Path, packages: list[str]) -> dict[str, str]:
    """An environment in which these packages cannot be imported."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for package in packages:
        (folder / f"{package}.py").write_text("raise ImportError('hidden by the benchmark')\n")
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def run(
    command: list[str], environment: dict[str, str] | None = None, watched: bool = False
) -> tuple[str, float, float]:
    """Run a command: what it printed, its seconds, and, ``watched``, the most bytes that it and its children held.

    Watching slows it: the system counts the pages of a process while that waits.
    """
    begin = time.perf_counter()
    with tempfile.TemporaryFile("w+") as complaint:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=complaint, text=True, env=environment, start_new_session=True
        )
        peak, over = 0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while watched and not over.wait(0.05):
                peak = max(peak, session_memory(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        printed, _ = process.communicate()
        seconds = time.perf_counter() - begin
        over.set()
        watcher.join()
        complaint.seek(0)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{complaint.read()}")
    return printed, seconds, float(peak)


def session_memory(leader: int) -> int:
    """Bytes that the processes of a session hold, shared pages divided among them; 0 where there is no /proc."""
    total = 0
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            after_name = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(after_name[3]) == leader:
                lines = (entry / "smaps_rollup").read_text().splitlines()
                total += next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
        except (OSError, StopIteration):  # it has ended
            continue
    return total


def worker(*args: str, watched: bool = False) -> dict[str, float]:
    """Run one measurement in a process of its own; also its ``peak`` of memory, if ``watched``."""
    printed, _, peak = run([sys.executable, __file__, "worker", *args], watched=watched)
    return {**json.loads(printed.splitlines()[-1]), "peak": peak}


def main() -> None:
    """Read the command line."""
    if sys.argv[1:2] == ["worker"]:
        kind, *args = sys.argv[2:]
        measure: dict[str, Callable[..., dict[str, float]]] = {
            "batches": measure_batches,
            "encode": measure_encode,
            "prepare": prepare_alone,
        }
        print(json.dumps(measure[kind](*args)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", nargs="?", default="all", choices=["all", "batches", "encode", "prepare"])
    parser.add_argument("--text", default="", help="a text file to encode and prepare")
    parser.add_argument("--megabytes", type=int, default=40, help="of the embedded corpus, without --text")
    parser.add_argument("--tokens", type=int, default=100_000_000, help="to draw batches from")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="encode and prepare with those that have this in their names")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if args.work in ("all", "batches"):
            compare_batches(folder, args.rounds, args.tokens)
        file = folder / "text.jsonl"
        if args.work != "batches":
            with open(file, "w", encoding="utf-8") as out:
                out.writelines(
                    json.dumps({"text": document}, ensure_ascii=False) + "\n"
                    for document in documents(args.text, args.megabytes)
                )
        if args.work in ("all", "encode"):
            compare_encode(file, args.rounds, args.only)
        if args.work in ("all", "prepare"):
            compare_prepare(file, folder, args.rounds, args.only)


if __name__ == "__main__":
    main()
