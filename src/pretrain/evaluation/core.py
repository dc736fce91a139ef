"""CORE: accuracy on 22 tasks by what a base model finds likeliest (DCLM, arXiv 2406.11794), as nanochat measures it.

    Task → questions (texts, then tokens and which of them count) → scored in batches → Answer → accuracy → mean

A question is asked after a few solved ones. Multiple choice and schema are answered by the option whose counted tokens
have the lowest mean loss, language modeling by taking the likeliest token each time, which must give the continuation.

Fast because little is computed twice or for nothing: the prefix that the options of a question share is run once, and
each option continues its keys and values; options that differ only in their last token need no continuing at all;
questions of similar length run together; the last layer and the logits are computed only where a token counts.
docs/evaluation.md has the numbers.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from pretrain.evaluation.bundle import CORE_TASKS, Task
from pretrain.evaluation.scorer import Scorer, evaluating

T = TypeVar("T")

FEWSHOT_SEED = 1234
"""Question i is shown the examples that ``random.Random(1234 + i)`` draws."""

BLOCK = 512
"""Questions prepared at once: enough to find others of the same length, few enough to hold in memory."""

CPU_BATCH_TOKENS = 1024
"""Tokens in one forward pass: a CPU is fastest while they stay in its cache, ..."""

GPU_BATCH_TOKENS = 16384
"""... and every other device when it is filled."""

SPARE_BATCHES = 16
"""One more forward pass costs about as much as this fraction of a full one; padding may cost as much, and no more."""

CACHED_BATCHES = 4
"""How many batches of tokens may be in the KV cache at once while options continue their prefixes."""


@dataclass(frozen=True)
class Answer:
    """What the model said to one question."""

    correct: bool
    losses: tuple[float, ...]
    """Mean loss of each option's counted tokens, nats; NaN where none counts."""


@dataclass(frozen=True)
class TaskResult:
    """The result of one task."""

    label: str
    accuracy: float
    centered: float
    """Accuracy on the scale on which guessing is 0 and perfection 1."""
    examples: int
    seconds: float


@dataclass(frozen=True)
class CoreResult:
    """The results of all tasks of a bundle."""

    tasks: tuple[TaskResult, ...]

    @property
    def core(self) -> float:
        """Mean of the centered accuracies; only of all 22 tasks is it the CORE that others publish."""
        return sum(task.centered for task in self.tasks) / len(self.tasks)

    @property
    def missing(self) -> list[str]:
        """The tasks of CORE that the bundle lacks."""
        return sorted(set(CORE_TASKS) - {task.label for task in self.tasks})

    @property
    def name(self) -> str:
        """CORE, or how much of it."""
        return f"CORE ({len(CORE_TASKS) - len(self.missing)} of {len(CORE_TASKS)} tasks)" if self.missing else "CORE"

    def metrics(self) -> dict[str, float]:
        """The results by their names in metrics.jsonl."""
        by_task = {f"core/{task.label}": task.accuracy for task in self.tasks}
        by_task |= {f"core/{task.label}/centered": task.centered for task in self.tasks}
        return {"val/core": self.core, **by_task}

    def as_dict(self) -> dict[str, Any]:
        """The results as JSON has them."""
        tasks = {task.label: {k: v for k, v in asdict(task).items() if k != "label"} for task in self.tasks}
        return {"core": self.core, "missing": self.missing, "tasks": tasks}


def evaluate_core(
    scorer: Scorer,
    tasks: Iterable[Task],
    max_per_task: int = 0,
    done: Callable[[TaskResult], None] = lambda _: None,
    *,
    rank: int = 0,
    world: int = 1,
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> CoreResult:
    """Measure a model on tasks; the global random state is not touched.

    Args:
        scorer: the model and its tokenizer.
        tasks: of :func:`pretrain.evaluation.read_tasks`.
        max_per_task: questions of each task; 0 for all. Fewer are the first of them, with the same solved examples.
        done: called after each task.
        rank: of this process, among those that share the questions of each task.
        world: how many these are.
        reduce: adds up a float64 tensor on the CPU over them.
    """
    results = []
    for task in tasks:
        start = time.perf_counter()
        answers = answer_task(scorer, task, max_per_task, rank, world)
        sums = [sum(answer.correct for answer in answers), len(answers)]
        correct, questions = reduce(torch.tensor(sums, dtype=torch.float64)).tolist()
        accuracy = correct / questions
        centered = (accuracy - task.baseline) / (1 - task.baseline)
        results.append(TaskResult(task.label, accuracy, centered, int(questions), time.perf_counter() - start))
        done(results[-1])
    return CoreResult(tuple(results))


def answer_task(scorer: Scorer, task: Task, max_per_task: int = 0, rank: int = 0, world: int = 1) -> list[Answer]:
    """The model's answers to the questions of a task, in order; of ``world`` processes to those of this ``rank``."""
    indices = range(len(task.examples))[: max_per_task or None][rank::world]
    answers = []
    with evaluating(scorer.model):
        for start in range(0, len(indices), BLOCK):
            block = indices[start : start + BLOCK]
            questions = prepare_questions(scorer, task, block)
            score_options(scorer, questions)
            answers += [_answer(task, i, options) for i, options in zip(block, questions, strict=True)]
    return answers


@dataclass
class Option:
    """One option of a question: tokens, of which those from ``start`` on count, and then how they were predicted."""

    tokens: list[int]
    start: int
    whole: bool
    """False where the context is shorter than the answer, so that not all of it counts."""
    losses: list[float] = field(default_factory=list)
    hits: list[bool] = field(default_factory=list)


def prompts(task: Task, index: int) -> list[str]:
    """The text of each option of a question, after the solved examples; these are any of the task but itself."""
    shown = ""
    for i in random.Random(FEWSHOT_SEED + index).sample(range(len(task.examples) - 1), task.shots):
        solved = task.examples[i + (i >= index)]
        shown += solved.options(task.delimiter)[solved.gold] + "\n\n"
    return [shown + option for option in task.examples[index].options(task.delimiter)]


def prepare_questions(scorer: Scorer, task: Task, indices: Sequence[int]) -> list[list[Option]]:
    """The options of these questions as tokens that fit the context: what is too long loses its beginning."""
    texts = [prompts(task, index) for index in indices]
    if task.kind == "language_modeling":  # the tokens of the text before it show where the continuation begins
        for index, options in zip(indices, texts, strict=True):
            before = options[0].removesuffix(task.examples[index].continuations[0])
            options.insert(0, before.strip())
    encoded = iter(scorer.encode([text for options in texts for text in options]))
    questions = []
    for options in texts:
        rows = [next(encoded) for _ in options]
        if task.kind == "schema":  # the contexts differ, and what follows them counts
            common = _common_length([row[::-1] for row in rows])
            starts = [len(row) - common for row in rows]
        else:  # what differs counts
            starts = [_common_length(rows)] * len(rows)
        if task.kind == "language_modeling":
            rows, starts = rows[1:], starts[1:]
        questions.append([_crop(row, start, scorer.context_length) for row, start in zip(rows, starts, strict=True)])
    return questions


def _common_length(rows: list[list[int]]) -> int:
    """Length of the longest common prefix."""
    first, last = min(rows), max(rows)  # in lexicographic order: what these share, all between them share
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))


def _crop(tokens: list[int], start: int, limit: int | None) -> Option:
    cut = max(0, len(tokens) - limit) if limit else 0
    # The first token has nothing before it that could predict it.
    return Option(tokens[cut:], max(1, start - cut), whole=cut == 0 or start > cut)


def _answer(task: Task, index: int, options: list[Option]) -> Answer:
    losses = tuple(sum(o.losses) / len(o.losses) if o.losses else math.nan for o in options)
    if task.kind == "language_modeling":
        return Answer(options[0].whole and bool(options[0].hits) and all(options[0].hits), losses)
    # Where an option is a prefix of all others, its loss is NaN: index(min()) then answers as nanochat does.
    return Answer(losses.index(min(losses)) == task.examples[index].gold, losses)


# Scoring ---------------------------------------------------------------------------------------------------------


@dataclass
class _Line:
    """Tokens that the model reads, and the options whose counted tokens it is to predict from them."""

    tokens: list[int]
    options: list[Option] = field(default_factory=list)
    row: int = 0
    """Of the KV cache with its prefix."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def first(self) -> int:
        """The first position after which a token counts."""
        return min(option.start for option in self.options) - 1


def score_options(scorer: Scorer, questions: Iterable[list[Option]]) -> None:
    """Give every option its losses and hits, with as little computed as that takes."""
    prepared: list[tuple[int, list[_Line]]] = []  # length of the prefix that its lines share, and they, by question
    for options in questions:
        by_tokens: dict[tuple[int, ...], _Line] = {}
        for option in options:
            if option.start < len(option.tokens):
                read = option.tokens[:-1]
                by_tokens.setdefault(tuple(read), _Line(read)).options.append(option)
        prepared += _sharing(by_tokens.values())

    on_cpu = next(scorer.model.parameters()).device.type == "cpu"
    tokens = CPU_BATCH_TOKENS if on_cpu else GPU_BATCH_TOKENS
    spare = tokens // SPARE_BATCHES
    # What a prefix is longer than the shortest of its batch is run again by each option but one.
    again = max((len(lines) - 1 for common, lines in prepared if common), default=1)
    for group in _batches(prepared, lambda question: question[0], tokens, spare // again, longest_first=True):
        cut, cache, limit = group[-1][0], None, tokens
        for row, (_, lines) in enumerate(group):
            for line in lines:
                line.row = row
        if cut:
            prefixes = torch.tensor([lines[0].tokens[:cut] for _, lines in group])
            cache = scorer.prefill(prefixes, limit=max(len(line) for _, lines in group for line in lines))
            limit = CACHED_BATCHES * tokens  # its tokens in the cache count too
        lines = sorted((line for _, lines in group for line in lines), key=lambda line: line.first)
        for batch in _batches(lines, len, limit, spare):
            _score(scorer, batch, cut, cache)


def _sharing(lines: Iterable[_Line]) -> list[tuple[int, list[_Line]]]:
    """Lines that share a prefix to be run once, and its length; with less than half of a line there is no gain.

    Those of one question may fall apart: cropped to the context, options of different length begin at different tokens.
    """
    groups: list[tuple[int, list[_Line]]] = []
    for line in sorted(lines, key=lambda line: line.tokens):  # what neighbours share, all between them share
        if groups:
            common, group = groups[-1]
            common = min(common, line.first, _common_length([group[-1].tokens, line.tokens]))
            if 2 * common >= len(line):
                group.append(line)
                groups[-1] = common, group
                continue
        groups.append((line.first, [line]))
    return [(common if len(group) > 1 else 0, group) for common, group in groups]


def _batches(
    items: Iterable[T], length: Callable[[T], int], tokens: int, spare: int, longest_first: bool = False
) -> Iterator[list[T]]:
    """Batches of items of similar length: at most about ``tokens`` in each, and ``spare`` by which lengths differ."""
    batch: list[T] = []
    different = 0
    for item in sorted(items, key=length, reverse=longest_first):
        size = length(item)
        different += abs(size - length(batch[-1])) * len(batch) if batch else 0
        if batch and (different > spare or (len(batch) + 1) * size > tokens):
            yield batch
            batch, different = [], 0
        batch.append(item)
    if batch:
        yield batch


def _score(scorer: Scorer, lines: list[_Line], cut: int, cache: Any) -> None:
    """Score the options of lines whose first ``cut`` tokens are in the cache."""
    tokens = torch.zeros(len(lines), max(map(len, lines)) - cut, dtype=torch.long)
    wanted = []
    for row, line in enumerate(lines):  # padded on the right, where no token before it can see it
        tokens[row, : len(line) - cut] = torch.tensor(line.tokens[cut:])
        for option in line.options:
            wanted += [(row, at - 1 - cut, option.tokens[at]) for at in range(option.start, len(option.tokens))]
    scores = scorer.score(tokens, torch.tensor(wanted), cache, [line.row for line in lines])
    losses, hits = (iter(values.tolist()) for values in scores)
    for option in (option for line in lines for option in line.options):
        count = len(option.tokens) - option.start
        option.losses = [next(losses) for _ in range(count)]
        option.hits = [next(hits) for _ in range(count)]
