"""What is unusual about a plan, in words: each warning says what, why it matters, and what would fix it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from pretrain.io import duration
from pretrain.optim import find_optimizer
from pretrain.plan.plan import Plan
from pretrain.plan.words import rounded, size

EPOCHS = 4
"""Up to this many epochs, repeated text teaches nearly as much as new text (Muennighoff et al., arXiv 2305.16264)."""
TOKENS_PER_PARAMETER = 20
"""About where compute is best spent between model and tokens (Hoffmann et al., arXiv 2203.15556)."""


def warnings(plan: Plan) -> list[str]:
    """All warnings of a plan."""
    return [*_text(plan), *_machine(plan), *_settings(plan)]


def _text(plan: Plan) -> Iterator[str]:
    """Text that training refuses, seen often, hardly read, or too little for its vocabulary."""
    config, tokens = plan.config, plan.data.train_tokens
    batch, length = config.train.batch_tokens, config.model.context_length
    embedded = not config.data.paths and plan.epochs > 100  # a recipe for large data is planned without any
    if tokens <= length:
        yield f"{tokens:,} training tokens are fewer than one context of {length}; give more text."
    if embedded:
        yield f"No text is given, and the embedded corpus would be {plan.epochs:,.0f} epochs; give yours with --data."
    elif plan.data.problem:
        yield f"Training will refuse this: {plan.data.problem}."
    for caution in plan.data.cautions:
        yield f"{caution[0].upper()}{caution[1:]}."
    if plan.epochs > EPOCHS and not embedded:
        missing = {
            "--model.dropout 0.1": not config.model.dropout,
            "--optim.weight_decay": not config.optim.weight_decay,
            "--optim.ema": not config.optim.ema,
            "--checkpoint.keep_best": not config.checkpoint.keep_best,
        }
        *others, last = [option for option, absent in missing.items() if absent] or [""]
        given = f"{', '.join(others)} and {last} help" if others else f"{last} helps"
        helps = f"; where text is repeated, {given}" if last else ""
        yield (
            f"{plan.epochs:,.0f} epochs: beyond about {EPOCHS}, text seen again teaches less and less (arXiv"
            f" 2305.16264), and the held-out loss may rise again while the training loss falls{helps}."
        )

    # Where text is what lacks, a larger model, well regularised, learns more from it (arXiv 2509.14786); compute is
    # best spent by this rule only where there is text enough.
    parameters = sum(plan.parameters.values())
    ratio, enough = plan.tokens / parameters, EPOCHS * tokens >= TOKENS_PER_PARAMETER * parameters
    if ratio < 0.9 * TOKENS_PER_PARAMETER and enough:
        steps = math.ceil(TOKENS_PER_PARAMETER * parameters / batch)
        yield (
            f"{ratio:.2g} tokens per parameter: with about {TOKENS_PER_PARAMETER} the same compute teaches more"
            f" (arXiv 2203.15556): more steps (--train.steps {steps}), or a smaller model."
        )

    vocabulary = plan.data.vocab_size
    share = (plan.parameters["embedding"] + plan.parameters["head"]) / parameters
    if tokens < 20 * vocabulary and not embedded:
        yield (
            f"A vocabulary of {vocabulary:,} for {tokens:,} tokens: on average each is seen {tokens / vocabulary:.2g}"
            f" times per epoch, too seldom to learn it; use --tokenizer.kind bpe with a smaller --tokenizer.vocab_size."
        )
    elif share > 0.5:
        tied = "" if config.model.tied_head else ", or share the table with --model.tied_head"
        yield (
            f"{share:.0%} of the parameters are tables of the {vocabulary:,} tokens, which leaves few for the layers;"
            f" use a smaller --tokenizer.vocab_size{tied}."
        )


def _machine(plan: Plan) -> Iterator[str]:
    """More memory than the device has, GPUs without work, links slower than compute."""
    train, layout = plan.config.train, plan.layout
    needed, limit = sum(plan.memory.values()), plan.hardware.memory
    if needed > 0.95 * limit:
        recompute = not train.activation_checkpointing and plan.memory["activations"] > 0.1 * needed
        on_gpu = plan.hardware.precision.device.type == "cuda"
        several_passes = plan.micro_steps > 1
        fixes = {
            "a smaller --train.micro_batch": plan.micro_batch > 1,
            "--train.activation_checkpointing": recompute,
            "--parallel fsdp": layout.parallelism == "ddp",
            "more GPUs or a smaller batch, so that a step is one micro-batch": layout.shards > 1 and several_passes,
            "several GPUs with --parallel fsdp": layout.parallelism == "none" and on_gpu,
            "a smaller model or context": True,
        }
        verb = "hardly fits" if needed <= limit else "does not fit"
        helps = ", ".join(fix for fix, applies in fixes.items() if applies)
        yield f"It {verb} in memory: {size(needed)} of {size(limit)}; what helps: {helps}."

    rows, processes = plan.config.batch_rows, layout.processes
    if processes > rows:
        yield (
            f"{processes:,} GPUs for a batch of {rows:,} rows: {processes - rows:,} have nothing to do; use fewer, or a"
            f" larger --train.batch_tokens."
        )
    elif rows % processes:
        yield f"{rows:,} rows do not divide among {processes:,} GPUs: some wait for others; choose a divisor."

    if plan.traffic_seconds_per_step >= plan.step_seconds:
        hsdp = ", or --parallel hsdp" if layout.parallelism == "fsdp" else ""
        yield (
            f"The network is the bottleneck: a step's traffic takes {plan.traffic_seconds_per_step:.2g} s, longer than"
            f" its compute; use a larger --train.batch_tokens, fewer GPUs{hsdp}."
        )


def _settings(plan: Plan) -> Iterator[str]:
    """A batch or a learning rate far from what is usual, and checkpoints so rare that much can be lost."""
    train, optim, every = plan.config.train, plan.config.optim, plan.config.checkpoint.every
    # The batch that suits a horizon: 2**19 tokens for 1.32 billion, growing with its power 0.383 (see sizing.py).
    usual = 2**19 * (plan.tokens / 1.32e9) ** 0.383
    batch = f"A batch of {train.batch_tokens:,} tokens is {{}} for {rounded(plan.tokens)} tokens in all"
    if train.steps < 50:
        yield f"{train.steps} steps are hardly a training; use a smaller --train.batch_tokens."
    elif train.batch_tokens > 8 * usual:
        better = f"about {rounded(usual)} and more steps learn more from the same text"
        yield f"{batch.format('large')}: {better} (arXiv 2505.13738)."
    elif train.batch_tokens < usual / 64:
        why = f"its gradients are noisy and the hardware waits; about {rounded(usual)} is usual"
        yield f"{batch.format('small')}: {why} (arXiv 2505.13738)."

    parameters = sum(plan.parameters.values()) - plan.parameters["embedding"]
    low, common, high = find_optimizer(optim).usual_rates(optim, parameters)
    if not low <= optim.lr <= high:
        yield (
            f"optim.lr {optim.lr:g} is unusual for {optim.kind} at this size; {low:.1g} to {high:.1g} is common, about"
            f" {common:.1g} to begin with."
        )

    lost = every * plan.step_seconds if every else plan.seconds
    if lost >= 3600:
        when = f"every {every:,} steps" if every else "only at the end"
        half_an_hour = max(1, int(1800 / plan.step_seconds))
        yield (
            f"Checkpoints are written {when}: a crash may cost {duration(lost)}; --checkpoint.every {half_an_hour} is"
            f" about half an hour."
        )
