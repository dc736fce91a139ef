"""CORE beside nanochat's evaluator: the same model, the same questions, one run; seconds and answers compared.

    python benchmarks/core.py --bundle BUNDLE [--run RUN | --tokenizer gpt2 --layers 4 --width 256 --context 1024]
                              [--nanochat DIR] [--examples 50]

``--nanochat`` is a checkout of github.com/karpathy/nanochat, whose evaluator is then imported; without it a plain loop
of ours does what it does: the options of one question a forward, all logits of all positions. Everything in fp32. A
question at which nanochat stops at an assertion, such as one whose answer is longer than the context, is counted, and
left out of its time and of the comparison. The last line weighs each task by how many questions it has; it holds for
these tasks and this context.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.config import ModelConfig
from pretrain.device import keep_freed_memory
from pretrain.evaluation import GPTScorer, Task, answer_task, open_bundle, read_tasks
from pretrain.evaluation.core import prepare_questions
from pretrain.model import GPT
from pretrain.runs import Run
from pretrain.tokenizer import Tokenizer, build_tokenizer

Rival = Callable[[Task, int], bool | None]
"""Whether a question is answered correctly; None where the rival cannot ask it."""


def build(args: argparse.Namespace) -> tuple[GPT, Tokenizer]:
    if args.run:
        run = Run.open(args.run)
        return run.load_model(), run.tokenizer()
    tokenizer = build_tokenizer(args.tokenizer, 0, [])
    config = ModelConfig(
        layers=args.layers, heads=args.width // 64, width=args.width, context_length=args.context, init="gpt2"
    )
    model = GPT(config, tokenizer.vocab_size, tokenizer.bos_id)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.head.weight.mul_(20)  # so that options differ clearly, as they do for a trained model
    return model.eval(), tokenizer


def nanochat(folder: str, model: GPT, tokenizer: Tokenizer) -> Rival:
    """Nanochat's own function, with our model and tokenizer behind its interfaces."""
    sys.path.insert(0, folder)
    evaluator = importlib.import_module("nanochat.core_eval")

    class Theirs:
        def get_bos_token_id(self) -> int | None:
            return tokenizer.bos_id

        def __call__(self, texts: list[str], prepend: int) -> list[list[int]]:
            return [[prepend, *ids.tolist()] for _, ids in tokenizer.encode_documents(enumerate(texts))]

    class Model:
        max_seq_len = model.config.context_length

        def __call__(self, tokens: Tensor) -> Tensor:
            return model(tokens)

    def ask(task: Task, index: int) -> bool | None:
        meta = {"task_type": task.kind, "num_fewshot": task.shots, "continuation_delimiter": task.delimiter}
        if task.label not in items:  # once, before it is timed
            items[task.label] = [as_item(task, i) for i in range(len(task.examples))]
        data = items[task.label]
        try:
            return bool(evaluator.evaluate_example(index, Model(), Theirs(), data, torch.device("cpu"), meta))
        except AssertionError:
            return None

    items: dict[str, list[dict[str, Any]]] = {}
    return ask


def as_item(task: Task, index: int) -> dict[str, Any]:
    """An example as its line in the bundle."""
    example = task.examples[index]
    if task.kind == "multiple_choice":
        return {"query": example.contexts[0], "choices": list(example.continuations), "gold": example.gold}
    if task.kind == "schema":
        return {
            "context_options": list(example.contexts),
            "continuation": example.continuations[0],
            "gold": example.gold,
        }
    return {"context": example.contexts[0], "continuation": example.continuations[0]}


def plain(model: GPT, scorer: GPTScorer) -> Rival:
    """The options of one question in one forward pass, every logit computed."""

    @torch.no_grad()
    def ask(task: Task, index: int) -> bool:
        (options,) = prepare_questions(scorer, task, [index])
        tokens = torch.zeros(len(options), max(len(option.tokens) for option in options), dtype=torch.long)
        for row, option in zip(tokens, options, strict=True):
            row[: len(option.tokens)] = torch.tensor(option.tokens)
        logits = model(tokens)
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        losses, hits = losses.view(len(options), -1), logits.argmax(-1)[:, :-1] == tokens[:, 1:]
        spans = [slice(option.start - 1, len(option.tokens) - 1) for option in options]
        if task.kind == "language_modeling":
            return options[0].whole and bool(hits[0, spans[0]].all())
        means = [row[span].mean().item() for row, span in zip(losses, spans, strict=True)]
        return means.index(min(means)) == task.examples[index].gold

    return ask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--run", default="")
    parser.add_argument("--nanochat", default="")
    parser.add_argument("--examples", type=int, default=50, help="questions of each task; 0 for all")
    parser.add_argument("--tokenizer", default="gpt2")
    for name, value in (("layers", 4), ("width", 256), ("context", 1024)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    keep_freed_memory()
    model, tokenizer = build(args)
    scorer = GPTScorer(model, tokenizer)
    rival = nanochat(args.nanochat, model, tokenizer) if args.nanochat else plain(model, scorer)
    # With one thread the time of the processor, which other work on the machine does not change.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    print(f"{torch.get_num_threads()} threads, {tokenizer.vocab_size:,} tokens, context {model.config.context_length}")
    print(f"{'ms a question':<28} {'pretrain':>9} {'nanochat' if args.nanochat else 'plain':>9}   ratio  other answers")
    ours_all = theirs_all = 0.0
    tasks = read_tasks(open_bundle(args.bundle))
    for task in tasks:
        rival(task, 0)  # warm
        start = clock()
        answers = answer_task(scorer, task, args.examples)
        ours = (clock() - start) / len(answers)
        start = clock()
        others = [rival(task, index) for index in range(len(answers))]
        asked = len(others) - others.count(None)
        theirs = (clock() - start) / max(1, asked)
        differ = sum(other not in (None, answer.correct) for answer, other in zip(answers, others, strict=True))
        stopped = f", {others.count(None)} that it cannot ask" if None in others else ""
        numbers = f"{ours * 1e3:9.2f} {theirs * 1e3:9.2f} {theirs / ours:7.2f}  {differ} of {asked}{stopped}"
        print(f"{task.label:<28} {numbers}", flush=True)
        ours_all += ours * len(task.examples)
        theirs_all += theirs * len(task.examples)
    context = f"{len(tasks)} tasks, context {model.config.context_length:,}"
    numbers = f"{ours_all:9.1f} {theirs_all:9.1f} {theirs_all / ours_all:7.2f}"
    print(f"{'all questions, seconds':<28} {numbers}  {context}")


if __name__ == "__main__":
    main()
