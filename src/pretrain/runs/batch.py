"""The exact text that a step trained on, and where each row of it came from. Nothing is stored for that.

step ──batch_of──> batch ──read_batch──> Row, Row, ...
                           of token shards: a function of the batch
                           of a stream: read again from the nearest checkpoint before it
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import numpy as np

from pretrain.errors import DataError, UsageError
from pretrain.io import read_jsonl, sha256_of
from pretrain.runs.checkpoint import STATE, checkpoints
from pretrain.runs.environment import STARTS, read_environment
from pretrain.runs.run import Run
from pretrain.text import ReadStats
from pretrain.text.split import TRAIN
from pretrain.tokenizer import Tokenizer
from pretrain.tokens import LiveBatches, Origin, find_text, training_order
from pretrain.tokens.packing import OTHER_TEXT, Cursor
from pretrain.tokens.prepare import find_records
from pretrain.tokens.shards import utf8_bytes
from pretrain.tokens.stream import Readers
from pretrain.tokens.windows import TokenFile

CHUNK = 2**20  # tokens of a shard searched at once

Part = dict[str, Any]
"""A stretch of a row that is of one document and one file: ``begin``, its first token in the row, and where it is from,
as far as that is known exactly. ``shard`` and ``token``: its first token in a file of tokens. ``document``: the number
of its document there, from 1 on. ``file``: that of the text. ``record``: the line of JSON, row of Parquet or text
between separators, from 1 on, counted ``after`` a byte (of Parquet a row group). ``byte``: bytes of the text before it
in the document, or ``after`` that place where the document began before it."""


@dataclass(frozen=True)
class Row:
    """A row of a batch."""

    row: int
    rank: int | None  # the process that computed it; None: not known
    tokens: list[int]  # T + 1: inputs, and targets one token later
    parts: list[Part]


def batch_of(run: Run, step: int) -> int:
    """The number of the batch whose update made the weights of a step. Raises UsageError if that is not known."""
    if run.fork and step <= run.fork["step"]:
        there = f"pretrain data at {shlex.quote(run.fork['parent'])} --step {step}"
        raise UsageError(f"step {step} of {run.folder} was trained before the fork: {there}")
    records = {record["step"]: record for record in read_jsonl(run.metrics) if "train/loss" in record}
    if step not in records:
        raise UsageError(f"{run.folder} has done {max(records, default=0)} steps; give --step one of them")
    back = [each for each in read_jsonl(run.events) if each.get("event") == "roll_back" and each["step"] < step]
    if "batch" not in records[step] and any("batch" not in each for each in back):  # of an older version
        raise UsageError(f"{run.folder} did not note which batches it skipped before step {step}; give --batch N")
    return records[step].get("batch", step - 1)


def last_batch(run: Run) -> float:
    """The last batch that a run can have read: -1 for none; infinite where an older version skipped some unnoted."""
    read = [each.get("batch", each["step"] - 1) for each in read_jsonl(run.metrics) if "train/loss" in each]
    back = [each for each in read_jsonl(run.events) if each.get("event") in ("roll_back", "skipped")]
    return max([*read, *(each.get("batch", math.inf) for each in back)], default=-1)


def world_of(run: Run, step: int) -> int | None:
    """How many processes computed a step; None if that is not known, as for 0."""
    starts = read_environment(run.folder)
    before = [start.get("processes") for start in starts if start.get("step", 0) < step]
    some_lost = len(before) == 1 and len(starts) == STARTS  # after the first
    return None if some_lost or not before else before[-1]


def read_batch(run: Run, batch: int, rows: Sequence[int], world: int | None, closely: bool) -> Iterator[Row]:
    """Rows of a batch of a run. ``closely``: also find the documents in their shards, and their records in the text.

    Raises DataError if the shards or the text are not there, or not as they were.
    """
    read = _of_stream if run.config.data.stream else _of_shards
    for row, (tokens, parts) in zip(rows, read(run, batch, rows, closely), strict=True):
        yield Row(row, None if world is None else row % world, tokens.tolist(), parts)


def _of_shards(run: Run, batch: int, rows: Sequence[int], closely: bool) -> Iterator[tuple[np.ndarray, list[Part]]]:
    corpus, size, length = run.corpus(), run.config.batch_rows, run.config.model.context_length + 1
    starts = training_order(corpus, run.config).starts(batch * size, size)[list(rows)]
    files = [file for dataset in corpus.datasets for file in dataset.files[TRAIN] if file.tokens]
    begins = np.cumsum([0, *(file.tokens for file in files)])
    bos = -1 if corpus.tokenizer.bos_id is None else corpus.tokenizer.bos_id
    for start, ids in zip(starts.tolist(), corpus.stream(TRAIN).windows(starts, length), strict=True):
        within = begins[(begins > start) & (begins < start + length)] - start
        cuts = sorted({0, *within.tolist(), *np.flatnonzero(ids == bos).tolist()})
        parts: list[Part] = []
        for number, here in groupby(cuts, key=lambda cut: int(begins.searchsorted(start + cut, "right")) - 1):
            first, shard = start - int(begins[number]), str(files[number].path)
            found: list[Part] = [{"begin": cut, "shard": shard, "token": first + cut} for cut in here]
            if closely:
                _find_documents(files[number], found, bos, corpus.tokenizer)
            parts += found
        yield ids, parts


def _find_documents(file: TokenFile, parts: list[Part], bos: int, tokenizer: Tokenizer) -> None:
    """Add the documents of parts of a shard that follow one another, and where their text is, if that is found."""
    ids = np.memmap(file.path, np.dtype(file.dtype).newbyteorder("<"), "r", file.offset, (file.tokens,))
    count, begin, end = 0, 0, parts[0]["token"] + 1
    for chunk in range(0, end, CHUNK):
        places = np.flatnonzero(ids[chunk : min(chunk + CHUNK, end)] == bos)
        count += len(places)
        begin = chunk + int(places[-1]) if len(places) else begin
    records = find_records(file.path, range(count, count + len(parts)))
    for number, part in enumerate(parts, count):
        part |= {"document": number} if count else {}
        part |= records.get(number, {})
    if count or ("file" in parts[0] and "record" not in parts[0]):  # else it began in another shard
        parts[0]["byte"] = int(tokenizer.token_bytes()[ids[begin : end - 1]].sum())


def _of_stream(run: Run, batch: int, rows: Sequence[int], closely: bool) -> Iterator[tuple[np.ndarray, list[Part]]]:
    config, origin, text = run.config, Origin.load(run.folder), find_text(run.config.data)
    if origin.stream and text.fingerprint != origin.stream:
        raise DataError(f"{run.folder}: {OTHER_TEXT}")
    sizes = {"rows": config.batch_rows, "length": config.model.context_length, "seed": config.train.seed}
    live = LiveBatches(text, run.tokenizer(), config.data, whole=origin.whole, **sizes)
    states: list[dict[str, Any]] = [{"step": 0}]
    for saved in checkpoints(run.checkpoints):
        with suppress(OSError, ValueError):  # a damaged one
            if sha256_of(saved.folder / STATE) == saved.hashes().get(STATE) and saved.state["batches"]:
                states.append(saved.state["batches"])
    state = max((each for each in states if each["step"] <= batch), key=lambda each: each["step"])
    live.restore(state if state["step"] else {})
    for earlier in range(state["step"], batch):
        live.batch(earlier)
    cursors = live.state(batch)["readers"]
    inputs, targets = live.batch(batch)
    live.close()
    readers, traced = live.new_readers(), {}
    for row in rows:
        turn, reader = divmod(row, live.readers)
        if reader not in traced:
            start, count = Cursor(*cursors[str(reader)]), config.batch_rows // live.readers
            traced[reader] = list(_traced(readers, reader, start, count, closely))
        yield np.append(inputs[row].numpy(), targets[row, -1].numpy()), traced[reader][turn]


def _traced(readers: Readers, reader: int, start: Cursor, count: int, closely: bool) -> Iterator[list[Part]]:
    """The parts of the next rows of a reader.

    What is packed are the places of the tokens instead of the tokens: packing looks at nothing but lengths.
    """
    documents: list[Any] = [None]
    bytes_of, bos = readers.tokenizer.token_bytes(), None if readers.tokenizer.bos_id is None else -1

    def numbered() -> Iterator[Any]:
        for place, ids in readers.documents(reader, start.place):
            documents.append((place, ids))
            yield place, (len(documents) - 1 << 40) + np.arange(len(ids))

    for row, _ in islice(readers.pack(numbered(), reader, start, bos), count):
        parts: list[Part] = []
        for begin in [0, *(np.flatnonzero(np.diff(row) != 1) + 1).tolist()]:
            after_bos = row[begin] == -1  # which is of the document after it
            if (begin and row[begin - 1] == -1) or (after_bos and begin + 1 == len(row)):
                continue
            number, at = divmod(int(row[begin + after_bos]), 1 << 40)
            (epoch, turn, document), ids = documents[number]
            piece = readers.text.train[readers.assignment.pieces(epoch, reader)[turn]]
            part: Part = {"begin": begin, "file": piece.file}
            if closely:
                stats, before, byte = ReadStats(cuts=readers.read.cuts, whole=readers.read.whole), 0, 0
                for text in islice(readers.text.parts(piece, TRAIN, stats), document + 1):
                    before = 0 if text.begins else byte  # of a large document, which is in several parts
                    byte = before + utf8_bytes(text.text)
                part |= {"record": stats.records, "after": piece.begin, "byte": before + int(bytes_of[ids[:at]].sum())}
            parts.append(part)
        yield parts
