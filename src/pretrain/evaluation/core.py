"""CORE: accuracy on 22 tasks by what a base model finds likeliest (DCLM, arXiv 2406.11794), as nanochat measures it.

    Task → questions (texts, then tokens and which of them count) → scored in batches → Answer → accuracy → mean

A question is asked after a few solved ones. Multiple choice and schema are answered by the option whose counted tokens
have the lowest mean loss, language modeling by taking the likeliest token each time, which must give the continuation.

Fast because little is computed twice or for nothing: what the options of a question have in common is run once and
its keys and values continued by each option; options that differ only in their last token need no continuing at all;
questions of like length run together; logits exist only where a token counts. docs/evaluation.md has the numbers.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pretrain.evaluation.bundle import CORE_TASKS, Task
from pretrain.evaluation.scorer import Scorer, evaluating

FEWSHOT_SEED = 1234
"""Question i is shown the examples that ``random.Random(1234 + i)`` draws."""

BLOCK = 512
"""Questions prepared at once: enough to find others of the same length, few enough to hold."""

BATCH_TOKENS = {"cpu": 1024}
"""Tokens in one forward pass, by device: a CPU is fastest while they stay in its cache."""

GPU_BATCH_TOKENS = 16384
"""The same for every other device, which wants to be filled."""

SPARE_BATCHES = 16
"""One forward pass more costs about as much as this part of a full one; padding may cost as much, and no more."""

MEMORY_BATCHES = 4
"""How many batches of tokens may be remembered at once, in keys and values, while options are continued."""


def batch_tokens(scorer: Scorer) -> int:
    """Tokens in one forward pass on the scorer's device."""
    return BATCH_TOKENS.get(next(scorer.model.parameters()).device.type, GPU_BATCH_TOKENS)


@dataclass(frozen=True)
class Answer:
    """What the model said to one question."""

    correct: bool
    losses: tuple[float, ...]
    """Mean loss of each option's counted tokens, nats; NaN where none counts."""


@dataclass(frozen=True)
class TaskResult:
    """How a task went."""

    label: str
    accuracy: float
    centered: float
    """Accuracy on the scale on which guessing is 0 and perfection 1."""
    examples: int
    seconds: float


@dataclass(frozen=True)
class CoreResult:
    """How all tasks of a bundle went."""

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


def evaluate_core(
    scorer: Scorer, tasks: Iterable[Task], max_per_task: int = 0, done: Callable[[TaskResult], None] = lambda _: None
) -> CoreResult:
    """Measure a model on tasks; the global random state is not touched.

    Args:
        scorer: the model and its tokenizer.
        tasks: of :func:`pretrain.evaluation.read_tasks`.
        max_per_task: questions of each task; 0 for all. Fewer are the first of them, asked as among all.
        done: called after each task.
    """
    results = []
    for task in tasks:
        start = time.perf_counter()
        answers = answer_task(scorer, task, max_per_task)
        accuracy = sum(answer.correct for answer in answers) / len(answers)
        seconds = time.perf_counter() - start
        results.append(TaskResult(task.label, accuracy, task.centered(accuracy), len(answers), seconds))
        done(results[-1])
    return CoreResult(tuple(results))


def answer_task(scorer: Scorer, task: Task, max_per_task: int = 0) -> list[Answer]:
    """The model's answers to the questions of a task, in order."""
    count = min(max_per_task or len(task.examples), len(task.examples))
    answers = []
    with evaluating(scorer.model):
        for first in range(0, count, BLOCK):
            indices = range(first, min(first + BLOCK, count))
            questions = prepare_questions(scorer, task, indices)
            score_options(scorer, questions)
            for index, options in zip(indices, questions, strict=True):
                answers.append(_answer(task.kind, task.examples[index].gold, options))
    return answers


@dataclass
class Option:
    """One option of a question: tokens, of which those from ``start`` on count, and then how they were predicted."""

    tokens: list[int]
    start: int
    whole: bool
    """Whether all that should count is there: it is not where the context is shorter than the answer."""
    losses: list[float] = field(default_factory=list)
    hits: list[bool] = field(default_factory=list)


def prompts(task: Task, index: int) -> list[str]:
    """The text of each option of a question, with the solved examples before it.

    The examples are drawn from the whole task, the question itself left out.
    """
    example, shown = task.examples[index], ""
    if task.shots:
        others = [i for i in range(len(task.examples)) if i != index]
        for i in random.Random(FEWSHOT_SEED + index).sample(others, task.shots):
            shown += task.examples[i].options(task.delimiter)[task.examples[i].gold] + "\n\n"
    return [shown + option for option in example.options(task.delimiter)]


def prepare_questions(scorer: Scorer, task: Task, indices: Sequence[int]) -> list[list[Option]]:
    """The options of these questions as tokens that fit the context: what is too long loses its beginning."""
    texts = [prompts(task, index) for index in indices]
    if task.kind == "language_modeling":  # where the continuation begins shows in the tokens of all before it
        for index, options in zip(indices, texts, strict=True):
            before = options[0].removesuffix(task.examples[index].continuations[0])
            options.insert(0, before.strip())
    encoded = iter(scorer.encode([text for options in texts for text in options]))
    questions = []
    for options in texts:
        rows = [next(encoded) for _ in options]
        if task.kind == "schema":  # the contexts differ, and what follows them counts
            common = _common([row[::-1] for row in rows])
            starts = [len(row) - common for row in rows]
        else:  # what differs counts
            starts = [_common(rows)] * len(rows)
        if task.kind == "language_modeling":
            rows, starts = rows[1:], starts[1:]
        questions.append([_crop(row, start, scorer.context_length) for row, start in zip(rows, starts, strict=True)])
    return questions


def _common(rows: list[list[int]] | list[tuple[int, ...]]) -> int:
    """Length of the longest common beginning."""
    first, last = min(rows), max(rows)  # in the order of a dictionary: what these share, all between them share
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))


def _crop(tokens: list[int], start: int, limit: int | None) -> Option:
    cut = max(0, len(tokens) - limit) if limit else 0
    # The first token has nothing before it that could predict it.
    return Option(tokens[cut:], max(1, start - cut), whole=cut == 0 or start > cut)


def _answer(kind: str, gold: int, options: list[Option]) -> Answer:
    losses = tuple(sum(o.losses) / len(o.losses) if o.losses else math.nan for o in options)
    if kind == "language_modeling":
        return Answer(options[0].whole and bool(options[0].hits) and all(options[0].hits), losses)
    # Where an option is the beginning of all others, its loss is NaN: index(min()) then answers as nanochat does.
    return Answer(losses.index(min(losses)) == gold, losses)


# Scoring ---------------------------------------------------------------------------------------------------------


@dataclass
class _Line:
    """Tokens that the model reads, and the options whose counted tokens it is to predict from them."""

    tokens: tuple[int, ...]
    options: list[Option]

    def wanted(self, row: int, skipped: int) -> Iterator[tuple[int, int, int]]:
        for option in self.options:
            for position in range(option.start - 1, len(option.tokens) - 1):
                yield row, position - skipped, option.tokens[position + 1]


def score_options(scorer: Scorer, questions: Iterable[list[Option]]) -> None:
    """Give every option its losses and hits, with as little computed as that takes."""
    alone: list[_Line] = []
    shared: list[tuple[int, list[_Line]]] = []  # length of the shared beginning, and the lines of a question
    for options in questions:
        lines: dict[tuple[int, ...], _Line] = {}
        for option in options:
            if option.start < len(option.tokens):
                read = tuple(option.tokens[:-1])
                lines.setdefault(read, _Line(read, [])).options.append(option)
        first = min((option.start for option in options), default=1) - 1
        common = min(first, _common(list(lines))) if len(lines) > 1 else 0
        if common:
            shared.append((common, list(lines.values())))
        else:
            alone += lines.values()
    tokens = batch_tokens(scorer)
    for batch in _batches(alone, tokens, tokens // SPARE_BATCHES):
        _score(scorer, batch)
    for cut, groups in _alike(shared, tokens, tokens // SPARE_BATCHES):
        _score_shared(scorer, cut, groups, tokens)


def _alike(shared: list[tuple[int, list[_Line]]], tokens: int, spare: int) -> Iterator[tuple[int, list[list[_Line]]]]:
    """Put questions with beginnings of about one length together: how much of them is run once, and their lines.

    What a beginning is longer than the shortest of its group is run by each option, ``spare`` tokens at most in all;
    those that are run once are about ``tokens`` at most.
    """
    cut, again, groups = 0, 0, []
    for common, lines in sorted(shared, key=lambda each: each[0]):
        again += (common - cut) * (len(lines) - 1)
        if groups and (again > spare or (len(groups) + 1) * cut > tokens):
            yield cut, groups
            groups = []
        if not groups:
            cut, again = common, 0
        groups.append(lines)
    if groups:
        yield cut, groups


def _score_shared(scorer: Scorer, cut: int, groups: list[list[_Line]], tokens: int) -> None:
    """Score questions, each a list of lines that have their first ``cut`` tokens in common."""
    beginnings = torch.tensor([lines[0].tokens[:cut] for lines in groups])
    room = max(len(line.tokens) for lines in groups for line in lines) - cut
    memory = scorer.remember(beginnings, room)
    owner = {id(line): row for row, lines in enumerate(groups) for line in lines}
    every = [line for lines in groups for line in lines]
    for batch in _batches(every, MEMORY_BATCHES * tokens, tokens // SPARE_BATCHES):  # remembered tokens count in it
        _score(scorer, batch, cut, memory, [owner[id(line)] for line in batch])


def _batches(lines: list[_Line], tokens: int, spare: int) -> Iterator[list[_Line]]:
    """Put lines of about one length together: at most about ``tokens`` in a batch, and ``spare`` of padding."""
    batch: list[_Line] = []
    padding = 0
    for line in sorted(lines, key=lambda line: len(line.tokens)):
        longer = len(line.tokens) - len(batch[-1].tokens) if batch else 0
        padding += longer * len(batch)
        if batch and (padding > spare or (len(batch) + 1) * len(line.tokens) > tokens):
            yield batch
            batch, padding = [], 0
        batch.append(line)
    if batch:
        yield batch


def _score(
    scorer: Scorer, batch: list[_Line], cut: int = 0, memory: object = None, rows: list[int] | None = None
) -> None:
    tokens: Tensor = torch.zeros(len(batch), max(len(line.tokens) for line in batch) - cut, dtype=torch.long)
    for row, line in zip(tokens, batch, strict=True):  # padding stands behind, where no token before it can see it
        row[: len(line.tokens) - cut] = torch.tensor(line.tokens[cut:])
    wanted = torch.tensor([want for row, line in enumerate(batch) for want in line.wanted(row, cut)])
    losses, hits = (iter(values.tolist()) for values in scorer.score(tokens, wanted, memory, rows))
    for option in (option for line in batch for option in line.options):
        count = len(option.tokens) - option.start
        option.losses = [next(losses) for _ in range(count)]
        option.hits = [next(hits) for _ in range(count)]
