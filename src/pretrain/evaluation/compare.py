"""Runs and other models measured, side by side: loss and bits per byte, CORE; as a table, JSON or CSV.

RUN or hf:DIR → measure → Measured → tables, json_line, write_csv
"""

from __future__ import annotations

import csv
import functools
import json
import math
import operator
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.device import choose_device, choose_precision, keep_freed_memory
from pretrain.errors import DataError, UsageError
from pretrain.evaluation import CoreResult, GPTScorer, LossResult, Scorer, Task, evaluate_core, evaluate_loss
from pretrain.evaluation.huggingface import PREFIX, HFScorer, check_folder, read_as_ours
from pretrain.io import append_jsonl
from pretrain.runs import Run
from pretrain.runs.checkpoint import Checkpoint
from pretrain.runs.run import CORE_FILE, weights_id
from pretrain.text import read_documents
from pretrain.tokenizer import Tokenizer
from pretrain.tokens import DataOrder, Manifest, TrainingBatches, prepared_dataset, validation_batches
from pretrain.tokens.shards import write_shard

HF_CONTEXT = 2048
"""Tokens in a row where a Hugging Face model sets no limit, or a higher one."""


@dataclass(frozen=True)
class What:
    """What is measured."""

    split: str = "val"
    """Which of the run's own splits is passed over, whole."""
    data: Sequence[str] = ()
    """Text to pass over instead: files, folders, patterns."""
    batches: int = 0
    """Estimate on so many random batches of both splits instead. 0: no."""
    core: Sequence[Task] = ()
    """Tasks of CORE; none for no CORE."""
    max_per_task: int = 0
    """Questions of each task; 0 for all."""


@dataclass(frozen=True)
class Measured:
    """A model and its numbers."""

    model: str
    step: int | None
    """After which step; None for a model that is not a run."""
    numbers: dict[str, float]
    """Losses in nats per token, bits per byte, counts, by name."""
    core: CoreResult | None
    sources: dict[str, dict[str, float]] = field(default_factory=dict)
    """The same numbers of each data set, where the run has several."""


def check_places(places: Sequence[str], what: What) -> None:
    """A PretrainError if there is no run or model at one of ``places``, or nothing that it can be measured on."""
    for place in places:
        if not place.startswith(PREFIX):
            Run.open(place)
        elif what.batches or not (what.data or what.core):
            raise UsageError(f"{place} has no text of its own to measure on; give --data or --core, and no --batches")
        else:
            check_folder(place)


def measure(place: str, what: What, device_name: str = "auto", say: Callable[[str], None] = lambda _: None) -> Measured:
    """Measure a run directory, or a transformers model as ``hf:DIR``.

    Args:
        place: the run or model.
        what: to measure.
        device_name: as in ``train.device``.
        say: told of each task of CORE.

    Raises:
        PretrainError: the run or model cannot be used, the text cannot, or there is nothing to measure on.
    """
    device = choose_device(device_name)
    if device.type == "cpu":
        keep_freed_memory()
    check_places([place], what)
    if place.startswith(PREFIX):
        return _measure_hf(place, what, device, say)
    sources: dict[str, dict[str, float]] = {}
    run = Run.open(place)
    checkpoint = run.newest_checkpoint()
    gpt, tokenizer = run.load_model(device, checkpoint), run.tokenizer()
    precision = checkpoint.state["precision"] if device.type == "cpu" else "auto"
    gpt.activation_dtype = choose_precision(precision, device).dtype
    length, rows = run.config.model.context_length, run.config.batch_rows
    if what.data:
        numbers = _on_text(gpt, tokenizer, what.data, length, rows)
    elif what.batches:
        numbers = _estimates(gpt, tokenizer, run, what.batches)
    else:
        try:
            numbers, sources = _on_split(gpt, tokenizer, run, what.split)
        except (DataError, UsageError) as error:
            if not what.core:
                raise
            say(f"no loss: {error}")  # CORE needs no text of the run
            numbers = {}
    core = _core(lambda: GPTScorer(gpt, tokenizer), what, say)
    if core is not None:
        _store_core(run, checkpoint, core, what.max_per_task)
    return Measured(str(run.folder), checkpoint.step, numbers, core, sources)


def _measure_hf(place: str, what: What, device: torch.device, say: Callable[[str], None]) -> Measured:
    """A Hugging Face model: by our own code where that can be it, and else by transformers."""
    on_cpu = device.type == "cpu"
    if ours := read_as_ours(place):
        model, tokenizer = ours[0].to(device), ours[1]
        model.activation_dtype = choose_precision("fp32" if on_cpu else "auto", device).dtype
        length, scorer = model.config.context_length, lambda: GPTScorer(model, tokenizer)
    else:
        model = theirs = HFScorer(place, device, torch.float32 if on_cpu else torch.bfloat16)
        length, scorer = theirs.context_length or HF_CONTEXT, lambda: theirs
        tokenizer = theirs.tokenizer() if what.data else None
    numbers: dict[str, float] = {}
    if what.data and tokenizer:
        numbers = _on_text(model, tokenizer, what.data, min(length, HF_CONTEXT), rows=4)
    return Measured(place, None, numbers, _core(scorer, what, say))


def _core(scorer: Callable[[], Scorer], what: What, say: Callable[[str], None]) -> CoreResult | None:
    if not what.core:
        return None
    return evaluate_core(
        scorer(),
        what.core,
        what.max_per_task,
        lambda task: say(f"{task.label}: accuracy {task.accuracy:.4f} of {task.examples:,} in {task.seconds:.1f} s"),
    )


def _on_split(
    model: nn.Module, tokenizer: Tokenizer, run: Run, split: str
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """A pass over a split of the run's own text: its numbers, and those of each data set where there are several."""
    datasets = [dataset for dataset in run.corpus().datasets if dataset.tokens(split) > 1]
    if not datasets:
        why = "holds no text out" if split == "val" else "was trained on a stream, which keeps no tokens"
        raise UsageError(f"{run.folder} {why}; measure on other text with --data")
    results = {}
    for dataset in datasets:
        batches = validation_batches(dataset.stream(split), run.config.model.context_length, run.config.batch_rows)
        results[dataset.name] = evaluate_loss(model, batches, tokenizer.token_bytes())
    whole = functools.reduce(operator.add, results.values())
    sources = {name: _numbers(split, result) for name, result in results.items()} if len(results) > 1 else {}
    return _numbers(split, whole), sources


def _on_text(model: nn.Module, tokenizer: Tokenizer, paths: Sequence[str], length: int, rows: int) -> dict[str, float]:
    """A pass over other text, as it would be held out: each document begins with the boundary token."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shard = write_shard(folder, "val", 0, (document.text for document in read_documents(paths)), tokenizer)
        if shard.tokens < 2:
            raise DataError(f"{', '.join(paths)}: too little text to measure on; give more than one token")
        Manifest.of(tokenizer, [shard]).save(folder)
        batches = validation_batches(prepared_dataset(folder).stream("val"), length, rows)
        return _numbers("data", evaluate_loss(model, batches, tokenizer.token_bytes()))


def _numbers(prefix: str, result: LossResult) -> dict[str, float]:
    return {
        f"{prefix}_loss": result.loss,
        "perplexity": result.perplexity,
        f"{prefix}_bpb": result.bits_per_byte,
        "tokens": result.tokens,
        "bytes": result.text_bytes,
    }


def _estimates(model: nn.Module, tokenizer: Tokenizer, run: Run, batches: int) -> dict[str, float]:
    """Mean losses over random batches of both splits, the same ones each time."""
    numbers, config = {}, run.config
    for split in ("train", "val"):
        stream = run.corpus().stream(split)
        if not len(stream):
            continue
        order = DataOrder(len(stream), config.model.context_length, "random", 0, config.train.seed)
        random = TrainingBatches(stream, order, config.batch_rows)

        def some(random: TrainingBatches = random) -> Iterator[tuple[Tensor, Tensor]]:
            return (random.batch(step) for step in range(batches))

        result = evaluate_loss(model, some(), tokenizer.token_bytes())
        numbers[f"{split}_loss_estimate"] = result.loss
        numbers[f"{split}_bpb_estimate"] = result.bits_per_byte
    return numbers


# Keeping CORE with the run, for its model card -----------------------------------------------------------------------


def _store_core(run: Run, checkpoint: Checkpoint, core: CoreResult, max_per_task: int) -> None:
    record = {"step": checkpoint.step, "weights": weights_id(checkpoint), "max_per_task": max_per_task}
    with suppress(OSError):  # a run that may only be read is measured all the same
        append_jsonl(run.folder / CORE_FILE, {**record, "name": core.name, **_core_tree(core)})


# Showing ---------------------------------------------------------------------------------------------------------


def json_line(measured: Measured) -> str:
    """One JSON object; NaN, which JSON has not, is null."""
    tree: dict[str, Any] = {"model": measured.model, "step": measured.step, **_without_nan(measured.numbers)}
    if measured.sources:
        tree["sources"] = {source: _without_nan(numbers) for source, numbers in measured.sources.items()}
    if measured.core is not None:
        tree["core"] = _core_tree(measured.core)
    return json.dumps(tree)


def _core_tree(core: CoreResult) -> dict[str, Any]:
    tasks = {task.label: {k: v for k, v in asdict(task).items() if k != "label"} for task in core.tasks}
    return {"core": core.core, "missing": core.missing, "tasks": tasks}


def _without_nan(numbers: dict[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in numbers.items()}


def tables(every: Sequence[Measured]) -> str:
    """All numbers as text tables, a line for each model; then CORE, a line for each task."""
    parts = []
    names = list(dict.fromkeys(name for measured in every for name in measured.numbers))
    if names:
        rows = [["", "step", *(name.replace("_", " ").replace(" estimate", " (est.)") for name in names)]]
        for measured in every:
            step = "" if measured.step is None else f"{measured.step:,}"
            rows.append([measured.model, step, *(_shown(measured.numbers.get(name)) for name in names)])
        parts.append(_aligned(rows))
    for measured in every:
        if measured.sources:
            names = list(next(iter(measured.sources.values())))
            rows = [["data set", *(name.replace("_", " ") for name in names)]]
            for source, numbers in measured.sources.items():
                rows.append([source, *(_shown(numbers[name]) for name in names)])
            parts.append(f"{measured.model}\n{_aligned(rows)}")
        if measured.core is not None:
            rows = [["task", "accuracy", "centered", "examples", "seconds"]]
            for task in measured.core.tasks:
                numbers = (f"{task.accuracy:.4f}", f"{task.centered:.4f}", f"{task.examples:,}", f"{task.seconds:.1f}")
                rows.append([task.label, *numbers])
            seconds = sum(task.seconds for task in measured.core.tasks)
            rows.append([measured.core.name, "", f"{measured.core.core:.4f}", "", f"{seconds:.1f}"])
            parts.append(f"{measured.model}\n{_aligned(rows)}")
    with_core = [(measured.model, measured.core) for measured in every if measured.core is not None]
    if len(with_core) > 1:
        rows = [["centered", *(model for model, _ in with_core)]]
        for i, task in enumerate(with_core[0][1].tasks):
            rows.append([task.label, *(f"{core.tasks[i].centered:.4f}" for _, core in with_core)])
        rows.append([with_core[0][1].name, *(f"{core.core:.4f}" for _, core in with_core)])
        parts.append(_aligned(rows))
    if with_core and (missing := with_core[0][1].missing):
        parts.append(
            f"This is not CORE but a part of it, and compares only with the same part: the bundle lacks"
            f" {', '.join(missing)}."
        )
    return "\n\n".join(parts)


def _shown(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}" if value >= 100 else f"{value:.4f}"


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = (f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True))
        lines.append("  ".join((f"{first:<{widths[0]}}", *cells)).rstrip())
    return "\n".join(lines)


def write_csv(file: Path, every: Sequence[Measured]) -> None:
    """One line for each number: model, step, measure, value; for tasks of CORE also centered, examples, seconds.

    The measure of a single data set is named as ``val_loss/DATA``.
    """
    with open(file, "w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["model", "step", "measure", "value", "centered", "examples", "seconds"])
        for measured in every:
            first = [measured.model, "" if measured.step is None else measured.step]
            for name, value in measured.numbers.items():
                writer.writerow([*first, name, value, "", "", ""])
            for source, numbers in measured.sources.items():
                for name, value in numbers.items():
                    writer.writerow([*first, f"{name}/{source}", value, "", "", ""])
            if measured.core is not None:
                for task in measured.core.tasks:
                    numbers = [task.accuracy, task.centered, task.examples, round(task.seconds, 3)]
                    writer.writerow([*first, task.label, *numbers])
                writer.writerow([*first, measured.core.name, "", measured.core.core, "", ""])
