"""What a run measures of its model on the way: held-out loss, CORE, samples."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.config import Config
from pretrain.evaluation import CoreResult, GPTScorer, LossResult, Task, evaluate_core, evaluate_loss
from pretrain.generation import sample_text
from pretrain.model import GPT
from pretrain.model.loss import IGNORE
from pretrain.runs.checkpoint import AVERAGE, LAST
from pretrain.sizing import validation_rows
from pretrain.tokenizer import Tokenizer
from pretrain.tokens import DataOrder, MixedOrder, TokenStream, validation_batches, window_batches
from pretrain.tokens.order import HELD_OUT, key
from pretrain.training.average import EVERY, WeightAverage, at_temperature
from pretrain.training.parallel import Parameters
from pretrain.training.world import World

T = TypeVar("T")

TEMPERATURE_STEP = 1.1
"""From one temperature to the next. Between two the loss differs by thousandths."""


@dataclass
class Evaluator:
    """Measures a model; ``check`` in its methods is called before each piece of work, and may raise to cut it short."""

    config: Config
    world: World
    model: GPT
    compiled: bool
    together: bool
    """All processes do the same in :meth:`core` and :meth:`sample`: one alone has no others, and those that a model is
    sharded over must compute together. There they may all be stopped together, too."""
    tokenizer: Tokenizer
    val_streams: dict[str, TokenStream]
    """The held-out tokens of each data set that has some."""
    test_streams: dict[str, TokenStream]
    """Those held out besides, for the end."""
    training: tuple[TokenStream, DataOrder | MixedOrder] | None
    """The training tokens and the order of their windows; None of a live stream."""
    core_tasks: list[Task]
    parameters: Parameters
    average: WeightAverage | None = None
    """That of the weights, with ``optim.ema``."""
    weights: str = LAST
    """Which weights the newest validation found better, LAST or AVERAGE: CORE and samples are of these."""
    temperature: float = 1.0
    """By which the head divides its logits, with ``eval.calibrate``: as the newest validation found it best."""

    def __post_init__(self):
        self.token_bytes = self.tokenizer.token_bytes()

    def validate(self, step: int, micro_rows: int, check: Callable[[], None]) -> dict[str, Any]:
        """What is measured after ``step`` steps, by its names in metrics.jsonl; nothing where there is no text for it.

        Held-out loss and bits per byte, of each data set too where there are several: over ``eval.tokens``; after the
        last step over all, and as ``val/part_...`` over ``eval.tokens`` as before. And the loss on training text.

        Where there is an average of the weights, both are measured, and the numbers are those of the better one, which
        ``val/weights`` names; nothing held out, it is the average. With ``eval.calibrate`` they are those of the best
        temperature, ``val/temperature``.
        """
        length, settings, last = self.config.model.context_length, self.config.eval, step == self.config.train.steps
        rows, tokens = self.rows(micro_rows), 0 if last else settings.tokens
        measured, numbers = {}, {}
        for weights in (LAST, AVERAGE) if self.average and step >= EVERY else (LAST,):
            self.weights = weights
            with self.better_weights():
                measured[self.weights] = self.held_out(step, tokens, rows, check)
        if self.val_streams:
            losses = {weights: total(results).loss for weights, results in measured.items()}
            self.weights = min(
                losses, key=lambda weights: losses[weights] if math.isfinite(losses[weights]) else math.inf
            )
            results = measured[self.weights]
            if settings.calibrate:
                results = self.calibrated(results, lambda: self.held_out(step, tokens, rows, check))
                numbers["val/temperature"] = self.temperature
            whole = total(results)
            numbers |= {"val/loss": whole.loss, "val/bpb": whole.bits_per_byte}
            if len(results) > 1:
                numbers |= {f"val/loss/{name}": result.loss for name, result in results.items()}
                numbers |= {f"val/bpb/{name}": result.bits_per_byte for name, result in results.items()}
            if len(losses) > 1:
                numbers |= {"val/last_loss": losses[LAST], "val/average_loss": losses[AVERAGE]}
        if len(measured) > 1:
            numbers["val/weights"] = self.weights
        with self.better_weights():
            if self.val_streams and last and self.takes_a_part():
                part = total(self.held_out(step, settings.tokens, rows, check))
                numbers |= {"val/part_loss": part.loss, "val/part_bpb": part.bits_per_byte}
            if settings.train_tokens and self.training:
                stream, order = self.training
                row = step * self.config.batch_rows - 1
                starts = order.estimate(step, max(0, row)).starts(0, max(1, settings.train_tokens // length))
                batches = window_batches(stream, starts, length, rows, self.world.rank, self.world.size)
                numbers["train/eval_loss"] = self.measured(batches, rows, check).loss
        return numbers

    def calibrated(
        self, results: Mapping[str, LossResult], measure: Callable[[], Mapping[str, LossResult]]
    ) -> Mapping[str, LossResult]:
        """Set the temperature to the best one near what it is, in steps of a tenth, and return its results."""
        for factor in (TEMPERATURE_STEP, 1 / TEMPERATURE_STEP):
            begun = self.temperature
            while True:
                before, self.temperature = self.temperature, self.temperature * factor
                with self.better_weights():
                    there = measure()
                if not total(there).loss < total(results).loss:
                    self.temperature = before
                    break
                results = there
            if self.temperature != begun:
                break
        return results

    def held_out(self, step: int, tokens: int, rows: int, check: Callable[[], None]) -> dict[str, LossResult]:
        """The loss of the model as it is on ``tokens`` of the held-out tokens, 0 for all, by data set."""
        batches = {name: self.held_out_batches(name, step, tokens, rows) for name in self.val_streams}
        return {name: self.measured(each, rows, check) for name, each in batches.items()}

    def test(self, micro_rows: int, check: Callable[[], None]) -> dict[str, float]:
        """Loss and bits per byte of all test text, by their names in metrics.jsonl; nothing where there is none."""
        rows = self.rows(micro_rows)
        with self.better_weights():
            results = [
                self.measured(self.in_order(stream, 0, rows), rows, check) for stream in self.test_streams.values()
            ]
        if not results:
            return {}
        whole = functools.reduce(operator.add, results)
        return {"test/loss": whole.loss, "test/bpb": whole.bits_per_byte}

    def rows(self, micro_rows: int) -> int:
        """Rows of a validation batch."""
        return validation_rows(micro_rows, self.config.model.context_length)

    def measured(self, batches: Iterable[tuple[Tensor, Tensor]], rows: int, check: Callable[[], None]) -> LossResult:
        """The loss over batches of up to ``rows`` that all processes share."""
        if self.compiled:  # another number of rows would be compiled anew
            batches = filled(batches, rows)
        return evaluate_loss(self.model, checked(batches, check), self.token_bytes, self.world.sum)

    @contextmanager
    def better_weights(self) -> Iterator[None]:
        """While entered, the model has the weights and the temperature that the newest validation found better."""
        average = self.average.in_place() if self.average and self.weights == AVERAGE else nullcontext()
        with average, at_temperature(self.parameters, self.temperature):
            yield

    def held_out_batches(self, name: str, step: int, tokens: int, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches for this process of a data set's share of ``tokens`` held-out tokens; 0: of all."""
        stream, length, windows = self.val_streams[name], self.config.model.context_length, self.windows_of(tokens)
        if windows and self.config.eval.order == "random" and len(stream) > length:
            seed = int(key(self.config.train.seed, list(self.val_streams).index(name), HELD_OUT)[0])
            starts = DataOrder(len(stream), length, "random", 0, seed).estimate(step).starts(0, windows)
            return window_batches(stream, starts, length, rows, self.world.rank, self.world.size)
        return self.in_order(stream, windows * length, rows)

    def in_order(self, stream: TokenStream, tokens: int, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches for this process of the first ``tokens`` of a stream; 0: of all."""
        length, stride, world = self.config.model.context_length, self.config.eval.stride, self.world
        return validation_batches(stream, length, rows, tokens, world.rank, world.size, stride)

    def windows_of(self, tokens: int) -> int:
        """The windows of each data set, if ``tokens`` are shared by all; 0 for 0."""
        return tokens and max(1, -(-tokens // len(self.val_streams)) // self.config.model.context_length)

    def takes_a_part(self) -> bool:
        """Whether validations before the last do not simply take every held-out token once."""
        tokens = self.windows_of(self.config.eval.tokens) * self.config.model.context_length
        drawn = self.config.eval.order == "random" or any(tokens < len(each) - 1 for each in self.val_streams.values())
        return tokens > 0 and drawn

    def core(self, check: Callable[[], None]) -> CoreResult:
        """CORE, or the mean over as many of its tasks as the bundle has; each process takes some of the questions."""
        world = self.world
        shared = {} if self.together else {"rank": world.rank, "world": world.size, "reduce": world.sum}
        with self.better_weights(), self.eager():
            scorer = GPTScorer(self.model, self.tokenizer, on_batch=check)  # in here: it keeps copies of weights
            self.parameters.gather()
            return evaluate_core(scorer, self.core_tasks, self.config.eval.core_max_per_task, **shared)

    def sample(self, check: Callable[[], None]) -> dict[str, str]:
        """The text that each prompt of ``config.sample`` begins; none in a process that rank 0 does not need for it.

        Each is made alone: in a batch, the others could change the last bits of its logits.
        """
        if not (self.together or self.world.is_rank0):
            return {}
        settings, texts = self.config.sample, {}
        for prompt in settings.prompts:
            pieces = sample_text(
                self.model,
                self.tokenizer,
                prompt,
                max_tokens=settings.max_tokens,
                temperature=settings.temperature,
                top_k=settings.top_k,
                seed=self.config.train.seed,
            )
            with self.better_weights(), self.eager():
                texts[prompt] = prompt + "".join(checked(pieces, check))
        return texts

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Without torch.compile while entered: where all lengths differ, each would be compiled anew."""
        in_blocks, self.model.in_blocks = self.model.in_blocks, False  # which is slow where it is not compiled
        try:
            with torch.compiler.set_stance("force_eager") if self.compiled else nullcontext():
                yield
        finally:
            self.model.in_blocks = in_blocks


def filled(batches: Iterable[tuple[Tensor, Tensor]], rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The same batches of inputs and targets (N, T), each of as many ``rows``: those added count for nothing."""
    for inputs, targets in batches:
        more = (0, 0, 0, rows - len(inputs))
        yield F.pad(inputs, more), F.pad(targets, more, value=IGNORE)


def total(results: Mapping[str, LossResult]) -> LossResult:
    """Of all data sets together; there must be one."""
    return functools.reduce(operator.add, results.values())


def checked(items: Iterable[T], check: Callable[[], None]) -> Iterator[T]:
    """The same items, with a call of ``check`` before each."""
    for item in items:
        check()
        yield item
