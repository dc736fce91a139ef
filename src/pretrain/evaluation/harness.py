"""Tasks of EleutherAI's lm-evaluation-harness (extra ``lm-eval``), measured by its code with a GPT of ours.

    names of tasks → lm_eval → requests (texts) → Harness → scored in batches → lm_eval's metrics

The numbers are those that lm-eval's own ``hf`` loader has of the model's export, up to rounding: texts become tokens,
and what is too long loses its beginning, as there. Only the scoring differs: see :mod:`pretrain.evaluation.core`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from pretrain.config.sampling import SamplingOptions
from pretrain.errors import DataError, UsageError, did_you_mean
from pretrain.evaluation.core import BLOCK, Option, score_options
from pretrain.evaluation.scorer import GPTScorer, evaluating
from pretrain.generation.sample import ROWS_AT_ONCE, continue_prompts, encode_prompt


class Tasks(TaskManager):
    """Tasks, groups or tags of lm-eval and of the YAML files in ``folder``, by name; a UsageError if one is unknown.

    ``num_fewshot`` solved examples come before each question; None: as many as the task says.
    """

    def __init__(self, names: Sequence[str], folder: str | None = None, num_fewshot: int | None = None):
        super().__init__(include_path=folder)
        self.names, self.num_fewshot = list(names), num_fewshot
        for name in names:
            if name not in self.task_index:
                hint = did_you_mean(name, self.all_tasks) or "; 'lm-eval ls tasks' lists those of lm-eval"
                raise UsageError(f"--tasks: there is no task {name!r}{hint} (your own: --tasks-dir)")

    def load(self, task_list: Any) -> Any:
        """As in lm-eval, where this reads the tasks' data; but a PretrainError says what went wrong."""
        try:
            loaded = super().load(task_list)
        except Exception as error:  # of datasets, its network libraries, a task's YAML or its Python
            why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise DataError(
                f"--tasks {','.join(task_list)}: the data cannot be loaded ({why}); paths of data_files are from the"
                f" current folder; for a download without a connection, run it once where there is one and copy the"
                f" folder HF_HOME (~/.cache/huggingface) here"
            ) from error
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                raise UsageError(f"--tasks: {name} runs code that a model wrote, or needs pictures; leave it out")
        return loaded

    def measure(self, scorer: GPTScorer, max_per_task: int = 0) -> dict[str, dict[str, Any]]:
        """By task: ``examples``, ``num_fewshot``, ``version``; ``metrics``, each with its ``value`` and ``stderr``.

        Only the first ``max_per_task`` questions of each; 0: all. lm-eval seeds the global random state.
        """
        settings: dict[str, Any] = {"num_fewshot": self.num_fewshot, "limit": max_per_task or None}
        settings |= {"tasks": self.names, "task_manager": self, "log_samples": False}
        with redirect_stdout(sys.stderr):  # lm-eval prints what it is at
            found: Any = simple_evaluate(Harness(scorer), **settings)
        scores: dict[str, dict[str, Any]] = {}
        for name, results in found["results"].items():
            metrics = scores.setdefault(name, {"examples": found["n-samples"].get(name, {}).get("effective")})
            metrics |= {"num_fewshot": found["n-shot"].get(name), "version": found["versions"].get(name)}
            metrics = metrics.setdefault("metrics", {})
            for metric, way in (key.split(",") for key in results if "," in key and "_stderr," not in key):
                value, error = results[f"{metric},{way}"], results.get(f"{metric}_stderr,{way}", "N/A")
                shown = metric if way == "none" else f"{metric},{way}"
                metrics[shown] = {"value": float(value), "stderr": None if error == "N/A" else float(error)}
        return scores


class Harness(TemplateLM):
    """A GPT as lm-eval sees it."""

    def __init__(self, scorer: GPTScorer):
        super().__init__()
        self.scorer, self.text, self.context = scorer, scorer.tokenizer, scorer.model.config.context_length

    @property
    def eot_token_id(self) -> int:
        """What comes before a text without context: BOS, or what comes closest to it."""
        return encode_prompt(self.text, "")[0]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of a text: without BOS, unless the tokenizer.json puts it before every text by itself."""
        bos = self.text.bos
        if add_special_tokens is False or not self.text.hf.post_processor or (bos and string.startswith(bos)):
            return self.text.encode(string)
        return self.text.hf.encode(string).ids

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """The log-probability of each continuation after its context, nats, and whether it is the greedy one."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """The log-probability of each text, in windows of which the last has a full context."""
        windows = [
            [(request.args, *make_disjoint_window(pair)) for pair in pairs]
            for request in requests
            for pairs in [get_rolling_token_windows(self.tok_encode(*request.args), self.eot_token_id, self.context, 1)]
        ]
        scores = iter(self._loglikelihood_tokens([window for mine in windows for window in mine]))
        return [sum(next(scores)[0] for _ in mine) for mine in windows]

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any) -> list[Any]:
        options, by_context = [], {}
        for texts, before, continuation in requests:
            if not 0 < len(continuation) <= self.context:
                what = f"{texts[-1][:60]!r} ({len(continuation):,} tokens after its context)"
                raise DataError(
                    f"--tasks: {what} cannot be scored in a context of {self.context:,}; leave its task out"
                )
            tokens = ((before or [self.eot_token_id]) + continuation)[-self.context - 1 :]
            options.append(Option(tokens, len(tokens) - len(continuation), whole=True))
            by_context.setdefault(tuple(before), []).append(options[-1])
        questions = list(by_context.values())
        with evaluating(self.scorer.model):
            for start in range(0, len(questions), BLOCK):
                score_options(self.scorer, questions[start : start + BLOCK])
        return [(-sum(option.losses), all(option.hits)) for option in options]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """The text that follows each context, until one of its task's stop strings."""
        if self.scorer.device.type == "cpu":
            self.scorer.model.activation_dtype = torch.float32  # in which the scorer scores
        alike: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            alike.setdefault(repr(request.args[1]), []).append(index)
        answers = [""] * len(requests)
        for indices in alike.values():
            options = self._options(requests[indices[0]].args[1])
            # What the context has no room for goes on from its newest half; the hf loader refuses it.
            room = max(self.context - options.max_tokens, 0) or max(1, self.context // 2)
            for start in range(0, len(indices), ROWS_AT_ONCE):
                rows = indices[start : start + ROWS_AT_ONCE]
                prompts = [self.tok_encode(requests[row].args[0])[-room:] or [self.eot_token_id] for row in rows]
                for row, piece, _ in continue_prompts(self.scorer.model, self.text, prompts, options, rows):
                    answers[rows[row]] += piece
        return answers

    def _options(self, task: dict[str, Any]) -> SamplingOptions:
        """A task's ``generation_kwargs``."""
        settings: dict[str, Any] = dict(normalize_gen_kwargs(task, default_max_gen_toks=256))
        ends = tuple(filter(None, [*settings.pop("until"), self.text.bos]))
        settings |= {"temperature": settings.get("temperature", 1.0) if settings.pop("do_sample") else 0.0}
        settings |= {"max_tokens": settings.pop("max_gen_toks"), "stop": ends}
        try:
            return SamplingOptions(**settings)
        except (TypeError, ValueError) as error:
            raise UsageError(f"--tasks: the generation_kwargs of a task cannot be used here: {error}") from None
