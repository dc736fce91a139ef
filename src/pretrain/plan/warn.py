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
"""About where arithmetic is best spent between model and tokens (Hoffmann et al., arXiv 2203.15556)."""
VOCABULARY_SHARE = 0.5
TIMES_A_TOKEN = 20
BATCH_SPAN = 64
"""How many times smaller than the law's a batch may be; above it, an eighth of that."""


def warnings(plan: Plan) -> list[str]:
    """All warnings of a plan, the gravest first."""
    return [*_refusals(plan), *_machine(plan), *_text(plan), *_settings(plan)]


def without_text(plan: Plan) -> bool:
    """Whether a recipe for large data is planned without any."""
    return not plan.config.data.paths and plan.epochs > 100


def _refusals(plan: Plan) -> Iterator[str]:
    """Data that training would refuse, or that does not fill one context."""
    if plan.data.problem and not without_text(plan):
        yield f"Training will refuse this: {plan.data.problem}."
    length = plan.config.model.context_length
    if plan.data.train_tokens <= length:
        yield f"{plan.data.train_tokens:,} training tokens are fewer than one context of {length}; give more text."


def _machine(plan: Plan) -> Iterator[str]:
    """More memory than the device has, GPUs without work, links slower than arithmetic."""
    train, where = plan.config.train, plan.layout
    needed, limit = sum(plan.memory.values()), plan.hardware.memory
    if needed > 0.95 * limit:
        fixes = []
        if plan.micro_batch > 1:
            fixes.append("a smaller --train.micro_batch")
        if not train.activation_checkpointing and plan.memory["activations"] > 0.1 * needed:
            fixes.append("--train.activation_checkpointing")
        if where.kind == "ddp":
            fixes.append("--parallel fsdp")
        if where.kind in ("fsdp", "hsdp") and plan.micro_steps > 1:
            fixes.append("more GPUs or a smaller batch, so that a step is one micro-batch and no whole gradients wait")
        if where.kind == "none" and plan.hardware.precision.device.type == "cuda":
            fixes.append("several GPUs with --parallel fsdp")
        fixes.append("a smaller model or context")
        verb = "hardly fits" if needed <= limit else "does not fit"
        yield f"It {verb} in memory: {size(needed)} of {size(limit)}; what helps: {', '.join(fixes)}."

    rows, processes = plan.config.batch_rows, where.processes
    if processes > rows:
        yield (
            f"{processes:,} GPUs for a batch of {rows:,} rows: {processes - rows:,} have nothing to do; use fewer, or a"
            f" larger --train.batch_tokens."
        )
    elif rows % processes:
        yield f"{rows:,} rows do not divide among {processes:,} GPUs: some wait for others; choose a divisor."

    if plan.traffic_seconds >= plan.step_seconds:
        yield (
            f"The network decides: a step's traffic takes {plan.traffic_seconds:.2g} s, longer than its arithmetic; use"
            f" a larger --train.batch_tokens, fewer GPUs{', or --parallel hsdp' if where.kind == 'fsdp' else ''}."
        )


def _text(plan: Plan) -> Iterator[str]:
    """Text seen too often, and too little of it for the model or for the vocabulary."""
    tokens, batch = plan.data.train_tokens, plan.config.train.batch_tokens
    if plan.epochs > EPOCHS and without_text(plan):
        yield (
            f"No text is given; of the embedded corpus this would be {plan.epochs:,.0f} epochs. Give yours with --data."
        )
    elif plan.epochs > EPOCHS:
        steps = int(EPOCHS * tokens / batch)
        fix = f"give more text, or stop after --train.steps {steps}" if steps else "give more text"
        yield (
            f"{plan.epochs:,.0f} epochs: beyond about {EPOCHS}, text seen again teaches less and less, and the model"
            f" begins to learn it by heart (arXiv 2305.16264); {fix}."
        )

    parameters = sum(plan.parameters.values())
    ratio = plan.tokens / parameters
    if ratio < 0.9 * TOKENS_PER_PARAMETER:
        text = (
            f"{ratio:.2g} tokens for each parameter: with about {TOKENS_PER_PARAMETER} the same arithmetic teaches more"
            f" (arXiv 2203.15556)"
        )
        supported = EPOCHS * tokens / TOKENS_PER_PARAMETER
        if supported < parameters:
            yield f"{text}; even {EPOCHS} epochs of this text support only about {rounded(supported)} parameters."
        else:
            steps = math.ceil(TOKENS_PER_PARAMETER * parameters / batch)
            yield f"{text}: more steps (--train.steps {steps}), or a smaller model."

    vocabulary = plan.data.vocab_size
    share = (plan.parameters["embedding"] + plan.parameters["head"]) / parameters
    if tokens < TIMES_A_TOKEN * vocabulary and not without_text(plan):
        yield (
            f"A vocabulary of {vocabulary:,} for {tokens:,} tokens: on average each is seen {tokens / vocabulary:.2g}"
            f" times an epoch, too seldom to learn it; use --tokenizer.kind bpe with a smaller --tokenizer.vocab_size."
        )
    elif share > VOCABULARY_SHARE:
        tied = "" if plan.config.model.tied_head else ", or share the table with --model.tied_head"
        yield (
            f"{share:.0%} of the parameters are tables of the {vocabulary:,} tokens, little is left to think with; use"
            f" a smaller --tokenizer.vocab_size{tied}."
        )


def _settings(plan: Plan) -> Iterator[str]:
    """A batch or a learning rate far from what is usual, and checkpoints so rare that much can be lost."""
    train, optim, every = plan.config.train, plan.config.optim, plan.config.checkpoint.every
    batch, usual = train.batch_tokens, usual_batch(plan.tokens)
    if train.steps < 50:
        yield f"{train.steps} steps are hardly a training; use a smaller --train.batch_tokens."
    elif batch > usual * BATCH_SPAN / 8:
        yield (
            f"A batch of {batch:,} tokens is large for {rounded(plan.tokens)} tokens in all: about {rounded(usual)} and"
            f" more steps learn more from the same text (arXiv 2505.13738)."
        )
    elif batch < usual / BATCH_SPAN:
        yield (
            f"A batch of {batch:,} tokens is small for {rounded(plan.tokens)} tokens in all: its gradients are noisy"
            f" and the hardware waits; about {rounded(usual)} is usual (arXiv 2505.13738)."
        )

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
        yield (
            f"Checkpoints are written {when}: a crash may cost {duration(lost)}; --checkpoint.every"
            f" {max(1, int(1800 / plan.step_seconds))} is about half an hour."
        )


def usual_batch(tokens: float) -> float:
    """Tokens in a batch that suit a horizon: 2**19 for 1.32 billion, growing with its power 0.383 (see sizing.py)."""
    return 2**19 * (tokens / 1.32e9) ** 0.383
