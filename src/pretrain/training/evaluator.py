"""What a run measures of its model on the way: held-out loss, CORE, samples."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from pretrain.config import Config
from pretrain.evaluation import CoreResult, GPTScorer, Task, evaluate_core, evaluate_loss
from pretrain.generation import sample_text
from pretrain.model import GPT
from pretrain.tokenizer import Tokenizer
from pretrain.tokens import TokenStream, validation_batches
from pretrain.training.world import World

T = TypeVar("T")

VALIDATION_TOKENS = 8192
"""Tokens in a validation batch at least: without a backward pass it may be larger than a micro-batch."""


@dataclass
class Evaluator:
    """Measures a model; ``check`` in its methods is called before each piece of work, and may raise to cut it short."""

    config: Config
    world: World
    model: GPT
    together: bool
    """All processes do the same in :meth:`core` and :meth:`sample`: one alone has no others, and those that a model is
    sharded over must compute together. There they may all be stopped together, too."""
    tokenizer: Tokenizer
    val_streams: dict[str, TokenStream]
    """The held-out tokens of each data set that has some."""
    core_tasks: list[Task]

    def __post_init__(self):
        self.token_bytes = self.tokenizer.token_bytes()

    def validate(self, all_tokens: bool, micro_rows: int, check: Callable[[], None]) -> dict[str, float]:
        """Validation loss and bits per byte, of each data set too where there are several; nothing without held-out
        text. ``all_tokens``: not only ``eval.tokens``.
        """
        length, results = self.config.model.context_length, {}
        rows = max(micro_rows, VALIDATION_TOKENS // length)
        limit = 0 if all_tokens else -(-self.config.eval.tokens // max(1, len(self.val_streams)))
        for name, stream in self.val_streams.items():
            batches = validation_batches(stream, length, rows, limit, self.world.rank, self.world.size)
            results[name] = evaluate_loss(self.model, checked(batches, check), self.token_bytes, self.world.sum)
        if not results:
            return {}
        whole = functools.reduce(operator.add, results.values())
        numbers = {"val/loss": whole.loss, "val/bpb": whole.bits_per_byte}
        if len(results) > 1:
            numbers |= {f"val/loss/{name}": result.loss for name, result in results.items()}
            numbers |= {f"val/bpb/{name}": result.bits_per_byte for name, result in results.items()}
        return numbers

    def core(self, check: Callable[[], None]) -> CoreResult:
        """CORE, or the mean over as many of its tasks as the bundle has; each process takes some of the tasks."""
        shares = 1 if self.together else self.world.size
        scorer = GPTScorer(self.model, self.tokenizer, on_batch=check)
        tasks = self.core_tasks[self.world.rank % shares :: shares]
        results = evaluate_core(scorer, tasks, self.config.eval.core_max_per_task).tasks
        return CoreResult(tuple(each for some in self.world.gather(results)[:shares] for each in some))

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
            texts[prompt] = prompt + "".join(checked(pieces, check))
        return texts


def checked(items: Iterable[T], check: Callable[[], None]) -> Iterator[T]:
    """The same items, with a call of ``check`` before each."""
    for item in items:
        check()
        yield item
