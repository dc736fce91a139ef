"""Runs and other models measured, side by side: loss and bits per byte, CORE, tasks; as a table, JSON or CSV.

RUN or hf:DIR → measure → EvalResult → tables, json_line, write_csv
"""

from __future__ import annotations

import csv
import functools
import operator
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import nn

from pretrain.config import DataConfig
from pretrain.device import choose_device, choose_precision, keep_freed_memory
from pretrain.errors import DataError, UsageError
from pretrain.evaluation import CoreResult, GPTScorer, LossResult, Task, TaskResult, evaluate_core, evaluate_loss
from pretrain.evaluation.huggingface import PREFIX, HFScorer, check_folder, read_as_ours
from pretrain.evaluation.scorer import evaluating
from pretrain.io import append_jsonl, table
from pretrain.model import GPT
from pretrain.model.loss import IGNORE
from pretrain.runs import Run
from pretrain.runs.checkpoint import AVERAGE, LAST, Checkpoint
from pretrain.runs.run import CORE_FILE, TASKS_FILE, weights_id
from pretrain.text import ReadStats, find_pieces, refuse_broken
from pretrain.text.pieces import join_ranges
from pretrain.text.split import NOTHING, VAL
from pretrain.tokenizer import Tokenizer
from pretrain.tokens import DataOrder, Manifest, TrainingBatches, prepared_dataset, validation_batches
from pretrain.tokens.shards import ShardWriter, utf8_bytes
from pretrain.tokens.source import read_parts

HF_CONTEXT = 2048
"""Tokens in a row where a Hugging Face model sets no limit, or a higher one."""

Numbers = dict[str, float]
"""Losses in nats per token, bits per byte, counts, by name."""


@dataclass(frozen=True)
class EvalRequest:
    """What to measure."""

    split: str = "val"
    """Which of the run's own splits to measure, whole."""
    data: Sequence[str] = ()
    """Text to measure on instead: files, folders, patterns."""
    field: str | None = None
    """Name of the text in its JSONL objects and Parquet columns. None: as the run was trained, or 'text'."""
    separator: str | None = None
    """Separator of the documents in its plain text files. None: as the run was trained, or none."""
    allow_broken: bool = False
    """Whether to measure what is left of text that is mostly broken; otherwise only as the run was trained."""
    batches: int = 0
    """Estimate on this many random batches of both splits instead. 0: no."""
    core: Sequence[Task] = ()
    """Tasks of CORE; none for no CORE."""
    tasks: Any = None
    """Tasks of lm-eval: a :class:`pretrain.evaluation.harness.Tasks`."""
    max_per_task: int = 0
    """Questions of each task; 0 for all."""
    step: int = 0
    """Of the checkpoint to measure; 0 for the model that the run leaves: :meth:`Run.model_checkpoint`."""


@dataclass(frozen=True)
class EvalResult:
    """A model and its numbers."""

    model: str
    step: int | None
    """The step of the checkpoint; None for a model that is not a run."""
    numbers: Numbers
    core: CoreResult | None
    sources: dict[str, Numbers] = field(default_factory=dict)
    """The same numbers for each data set, where the run has several."""
    caution: str = ""
    """What its numbers are of, if not of the text as it was given, or of windows that do not overlap."""
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What :meth:`pretrain.evaluation.harness.Tasks.measure` gives."""
    weights: str = LAST
    """AVERAGE if the numbers are those of the average of a run's weights (``optim.ema``)."""


def check_places(places: Sequence[str], request: EvalRequest) -> None:
    """A PretrainError if there is no run or model at one of ``places``, or nothing that it can be measured on."""
    for place in places:
        if not place.startswith(PREFIX):
            run = Run.open(place)
            if request.step:
                run.checkpoint(request.step)
        elif request.step:
            raise UsageError(f"{place} is no run, and has no checkpoints of several steps; leave out --step")
        elif request.batches or not (request.data or request.core or request.tasks):
            fix = "give --data, --core or --tasks, and no --batches"
            raise UsageError(f"{place} has no text of its own to measure on; {fix}")
        else:
            check_folder(place)


def measure(
    place: str, request: EvalRequest, device_name: str = "auto", say: Callable[[str], None] = lambda _: None
) -> EvalResult:
    """Measure a run directory, or a transformers model as ``hf:DIR``, that :func:`check_places` has no fault with.

    ``device_name`` is as in ``train.device``; ``say`` is told of each task of CORE, and of problems of the text. Raises
    a PretrainError when the model or the text cannot be used.
    """
    device = choose_device(device_name)
    if device.type == "cpu":
        keep_freed_memory()
    return (_measure_hf if place.startswith(PREFIX) else _measure_run)(place, request, device, say)


def _measure_run(place: str, request: EvalRequest, device: torch.device, say: Callable[[str], None]) -> EvalResult:
    run = Run.open(place)
    checkpoint = run.model_checkpoint(request.step)
    model, tokenizer = _load(run, checkpoint, device), run.tokenizer()
    numbers, sources = {}, {}
    try:
        if request.data:
            length, rows, stride = run.config.model.context_length, run.config.batch_rows, run.config.eval.stride
            numbers = _on_text(model, tokenizer, request, run.config.data, length, rows, stride, say)
        elif request.batches:
            numbers = _estimates(model, tokenizer, run, request.batches)
        else:
            numbers, sources = _on_split(model, tokenizer, run, request.split)
    except (DataError, UsageError) as error:
        if request.data or not (request.core or request.tasks):
            raise
        say(f"no loss: {error}")  # tasks need no text of the run
    core, tasks = None, {}
    record = {"step": checkpoint.step, "weights": weights_id(checkpoint), "max_per_task": request.max_per_task}
    if request.core:
        core = evaluate_core(GPTScorer(model, tokenizer), request.core, request.max_per_task, _teller(say))
        with suppress(OSError):  # a run that may only be read is measured all the same
            append_jsonl(run.folder / CORE_FILE, {**record, "name": core.name, **core.as_dict()})
    if request.tasks:
        tasks = request.tasks.measure(GPTScorer(model, tokenizer), request.max_per_task)
        with suppress(OSError):
            append_jsonl(run.folder / TASKS_FILE, {**record, "tasks": tasks})
    cautions = [tokenizer.change_in_words]
    if run.config.eval.stride and numbers and not request.batches:
        cautions.append(f"windows overlap (eval.stride {run.config.eval.stride}): compare with runs of the same stride")
    caution = "; ".join(filter(None, cautions))
    weights = run.weights(checkpoint.step)
    return EvalResult(str(run.folder), checkpoint.step, numbers, core, sources, caution, tasks, weights)


def _load(run: Run, checkpoint: Checkpoint, device: torch.device) -> GPT:
    """The model of a checkpoint, in the precision in which the run measures it."""
    model = run.load_model(device, checkpoint)
    precision = checkpoint.state["precision"] if device.type == "cpu" else "auto"
    model.activation_dtype = choose_precision(precision, device).dtype
    return model


def held_out_targets(run: Run) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What each target of a run's held-out text costs the model that the run leaves, in the order of the text.

    Gives of each (N) its nats, float64, its UTF-8 bytes, int64, both 0 for special tokens, and the number of its
    document, int64: all 0 where nothing tells documents apart.
    """
    device, tokenizer, config = choose_device("auto"), run.tokenizer(), run.config
    model, targets, nats = _load(run, run.model_checkpoint(), device), [], []
    length, rows, stride = config.model.context_length, config.batch_rows, config.eval.stride
    with evaluating(model):
        for dataset in run.corpus().datasets:
            for inputs, wanted in validation_batches(dataset.stream("val"), length, rows, stride=stride):
                losses = model(inputs.to(device), wanted.to(device), reduction="none").cpu().double()
                targets.append(wanted[wanted != IGNORE])
                nats.append(losses[wanted != IGNORE])
    ids = torch.cat(targets).numpy()
    sizes = tokenizer.token_bytes()[ids].astype(np.int64)
    documents = np.cumsum(ids == (-1 if tokenizer.bos_id is None else tokenizer.bos_id))
    return torch.cat(nats).numpy() * (sizes > 0), sizes, documents


def _measure_hf(place: str, request: EvalRequest, device: torch.device, say: Callable[[str], None]) -> EvalResult:
    """A Hugging Face model: by our own code where that can be it, and else by transformers."""
    folder, on_cpu = check_folder(place), device.type == "cpu"
    if ours := read_as_ours(folder):
        model, tokenizer = ours[0].to(device), ours[1]
        model.activation_dtype = choose_precision("fp32" if on_cpu else "auto", device).dtype
        length, scorer = model.config.context_length, GPTScorer(model, tokenizer)
    elif request.tasks:
        theirs = f"lm-eval run --model hf --model_args pretrained={folder}"
        raise UsageError(f"{place} is no architecture of ours; measure its tasks by lm-eval itself: {theirs}")
    else:
        model = scorer = HFScorer(folder, device, torch.float32 if on_cpu else torch.bfloat16)
        length = scorer.context_length or HF_CONTEXT
        tokenizer = Tokenizer.adopt(folder / "tokenizer.json") if request.data else None
    numbers = {}
    if request.data and tokenizer:
        numbers = _on_text(model, tokenizer, request, DataConfig(), min(length, HF_CONTEXT), 4, 0, say)
    core = evaluate_core(scorer, request.core, request.max_per_task, _teller(say)) if request.core else None
    tasks = request.tasks.measure(scorer, request.max_per_task) if request.tasks else {}
    caution = tokenizer.change_in_words if numbers and tokenizer else ""
    return EvalResult(place, None, numbers, core, caution=caution, tasks=tasks)


def _teller(say: Callable[[str], None]) -> Callable[[TaskResult], None]:
    return lambda task: say(f"{task.label}: accuracy {task.accuracy:.4f} of {task.examples:,} in {task.seconds:.1f} s")


def _on_split(model: nn.Module, tokenizer: Tokenizer, run: Run, split: str) -> tuple[Numbers, dict[str, Numbers]]:
    """A pass over a split of the run's own text: its numbers, and those of each data set where there are several."""
    datasets = [dataset for dataset in run.corpus().datasets if dataset.tokens(split) > 1]
    if not datasets:
        why = "was trained on a stream, which keeps no tokens" if split == "train" else "holds no text out"
        why += " for a test" if split == "test" else ""
        raise UsageError(f"{run.folder} {why}; measure on other text with --data")
    results, length, stride = {}, run.config.model.context_length, run.config.eval.stride
    for dataset in datasets:
        batches = validation_batches(dataset.stream(split), length, run.config.batch_rows, stride=stride)
        results[dataset.name] = evaluate_loss(model, batches, tokenizer.token_bytes())
    whole = functools.reduce(operator.add, results.values())
    sources = {name: _numbers(split, result) for name, result in results.items()} if len(results) > 1 else {}
    return _numbers(split, whole), sources


def _on_text(
    model: nn.Module,
    tokenizer: Tokenizer,
    request: EvalRequest,
    data: DataConfig,
    length: int,
    rows: int,
    stride: int,
    say: Callable[[str], None],
) -> Numbers:
    """A pass over other text, read as the held-out text of a run with ``data`` would be."""
    field = data.field if request.field is None else request.field
    separator = data.separator if request.separator is None else request.separator
    pieces = join_ranges(find_pieces(request.data, field, separator, say), tokenizer.cuts)
    read = ReadStats(cuts=tokenizer.cuts)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with ShardWriter(folder, "val-00000.bin", VAL, tokenizer) as writer:
            parts = read_parts(pieces, field, VAL, NOTHING, read)
            for part, ids in tokenizer.encode_documents((part, part.text) for part in parts):
                writer.write(ids, utf8_bytes(part.text), part.begins)
            shard = writer.close()
        for line in read.lines():
            say(line)
        refuse_broken(read, request.allow_broken or data.allow_broken)
        if shard.tokens < 2:
            raise DataError(f"{', '.join(request.data)}: too little text to measure on; give more than one token")
        Manifest.of(tokenizer, [shard]).save(folder)
        batches = validation_batches(prepared_dataset(folder).stream("val"), length, rows, stride=stride)
        return _numbers("data", evaluate_loss(model, batches, tokenizer.token_bytes()))


def _numbers(prefix: str, result: LossResult) -> Numbers:
    return {
        f"{prefix}_loss": result.loss,
        "perplexity": result.perplexity,
        f"{prefix}_bpb": result.bits_per_byte,
        "tokens": result.tokens,
        "bytes": result.text_bytes,
    }


def _estimates(model: nn.Module, tokenizer: Tokenizer, run: Run, batches: int) -> Numbers:
    """Mean losses over random batches of both splits, the same ones each time."""
    numbers, config = {}, run.config
    for split in ("train", "val"):
        stream = run.corpus().stream(split)
        if not len(stream):
            continue
        order = DataOrder(len(stream), config.model.context_length, "random", 0, config.train.seed)
        random_batches = map(TrainingBatches(stream, order, config.batch_rows).batch, range(batches))
        result = evaluate_loss(model, random_batches, tokenizer.token_bytes())
        numbers[f"{split}_loss_estimate"] = result.loss
        numbers[f"{split}_bpb_estimate"] = result.bits_per_byte
    return numbers


# Showing ---------------------------------------------------------------------------------------------------------


def json_line(result: EvalResult) -> str:
    """One JSON object; NaN, which JSON has not, is null."""
    tree: dict[str, Any] = {"model": result.model, "step": result.step, **result.numbers}
    if result.sources:
        tree["sources"] = result.sources
    if result.caution:
        tree["caution"] = result.caution
    if result.weights == AVERAGE:
        tree["weights"] = result.weights
    if result.core:
        tree["core"] = result.core.as_dict()
    if result.tasks:
        tree["tasks"] = result.tasks
    return msgspec.json.encode(tree).decode()


CORE_COLUMNS = ("accuracy", "centered", "examples", "seconds")


def _core_rows(core: CoreResult) -> list[list[Any]]:
    """A row for each task, its label and ``CORE_COLUMNS``, and one for all of them."""
    rows = [[task.label, task.accuracy, task.centered, task.examples, round(task.seconds, 3)] for task in core.tasks]
    return [*rows, [core.name, "", core.core, "", round(sum(task.seconds for task in core.tasks), 3)]]


def tables(results: Sequence[EvalResult]) -> str:
    """All numbers as text tables, a line for each model; then CORE, a line for each task."""
    parts = []
    if names := list(dict.fromkeys(name for result in results for name in result.numbers)):
        rows = [[result.model, result.step, *map(result.numbers.get, names)] for result in results]
        parts.append(_table(["", "step", *names], rows))
    for result in results:
        if result.sources:
            rows = [[source, *numbers.values()] for source, numbers in result.sources.items()]
            parts.append(f"{result.model}\n{_table(['data set', *result.numbers], rows)}")
        if result.core:
            parts.append(f"{result.model}\n{_table(['task', *CORE_COLUMNS], _core_rows(result.core))}")
    if tasks := list(_task_rows(results)):
        parts.append(_table(["task", "metric", "examples", *(result.model for result in results)], tasks))
    cores = {result.model: result.core for result in results if result.core}
    if len(cores) > 1:
        by_task = zip(*map(_core_rows, cores.values()), strict=True)
        rows = [[same[0][0], *(centered for _, _, centered, _, _ in same)] for same in by_task]
        parts.append(_table(["centered", *cores], rows))
    if missing := next((core.missing for core in cores.values()), []):
        parts.append(
            f"This is not CORE but a part of it, and compares only with the same part: the bundle lacks"
            f" {', '.join(missing)}."
        )
    parts += [f"{result.model}: the average of the weights." for result in results if result.weights == AVERAGE]
    parts += [f"{result.model}: {result.caution}." for result in results if result.caution]
    return "\n\n".join(parts)


def _task_rows(results: Sequence[EvalResult]) -> Iterator[list[Any]]:
    """A row for each metric of each task: its name, how many questions, and each model's with its standard error."""
    for name, scores in results[0].tasks.items():
        for metric in scores["metrics"]:
            found = [result.tasks[name]["metrics"][metric] for result in results]
            errors = ["" if each["stderr"] is None else f" ± {_shown(each['stderr'])}" for each in found]
            shown = [_shown(each["value"]) + error for each, error in zip(found, errors, strict=True)]
            yield [name, metric, scores["examples"], *shown]


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    return table([header, *([_shown(value) for value in row] for row in rows)])


def _shown(value: str | float | None) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}" if value >= 100 else f"{value:.4f}"


def write_csv(file: Path, results: Sequence[EvalResult]) -> None:
    """One line for each number: model, step, measure, value; for tasks of CORE also centered, examples, seconds.

    The measure of a single data set is named as ``val_loss/DATA``.
    """
    with open(file, "w", encoding="utf-8", errors="surrogateescape", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["model", "step", "measure", "value", *CORE_COLUMNS[1:]])
        for result in results:
            rows = [[name, value, "", "", ""] for name, value in result.numbers.items()]
            for source, numbers in result.sources.items():
                rows += [[f"{name}/{source}", value, "", "", ""] for name, value in numbers.items()]
            rows += _core_rows(result.core) if result.core else []
            for name, scores in result.tasks.items():
                found = scores["metrics"].items()
                rows += [[f"{name}/{metric}", each["value"], "", scores["examples"], ""] for metric, each in found]
            writer.writerows([result.model, result.step, *row] for row in rows)
