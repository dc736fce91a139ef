"""What in a plan is unusual, in words: each says what, why it matters, and what would fix it."""

from __future__ import annotations

import math

from pretrain.io import duration
from pretrain.optim import find_optimizer
from pretrain.plan.plan import Plan
from pretrain.plan.words import rounded, size

EPOCHS = 4
"""Up to so many epochs, text seen again teaches nearly as much as new text (Muennighoff et al., arXiv 2305.16264)."""
TOKENS_PER_PARAMETER = 20
"""About where arithmetic is best spent between model and tokens (Hoffmann et al., arXiv 2203.15556)."""
VOCABULARY_SHARE = 0.5
TIMES_A_TOKEN = 20
BATCH_SPAN = 64
"""How many times smaller than the law's a batch may be; above it, an eighth of that."""


def warnings(plan: Plan) -> list[str]:
    """All warnings of a plan, the gravest first."""
    return [text for check in CHECKS if (text := check(plan))]


def does_not_fit(plan: Plan) -> str:
    """More memory than the device has."""
    needed, there = sum(plan.memory.values()), plan.hardware.memory
    if needed <= 0.95 * there:
        return ""
    train, fixes = plan.config.train, []
    if plan.micro_batch > 1:
        fixes.append("a smaller --train.micro_batch")
    if not train.activation_checkpointing and plan.memory["activations"] > 0.1 * needed:
        fixes.append("--train.activation_checkpointing")
    if plan.layout.kind == "ddp":
        fixes.append("--parallel fsdp")
    if plan.layout.kind in ("fsdp", "hsdp") and plan.micro_steps > 1:
        fixes.append("more GPUs or a smaller batch, so that a step is one micro-batch and no whole gradients wait")
    if plan.layout.kind == "none" and plan.hardware.device == "cuda":
        fixes.append("several GPUs with --parallel fsdp")
    fixes.append("a smaller model or context")
    verb = "hardly fits" if needed <= there else "does not fit"
    return f"It {verb} in memory: {size(needed)} of {size(there)}; what helps: {', '.join(fixes)}."


def text_too_small(plan: Plan) -> str:
    """Training would refuse the data."""
    return f"Training will refuse this: {plan.data.problem}." if plan.data.problem and not without_text(plan) else ""


def too_few_windows(plan: Plan) -> str:
    """Less text than one context."""
    length = plan.config.model.context_length
    if plan.data.train_tokens > length:
        return ""
    return f"{plan.data.train_tokens:,} training tokens are fewer than one context of {length}; give more text."


def too_many_epochs(plan: Plan) -> str:
    """The text seen too often."""
    if plan.epochs <= EPOCHS:
        return ""
    if without_text(plan):
        return (
            f"No text is given; of the embedded corpus this would be {plan.epochs:,.0f} epochs. Give yours with --data."
        )
    steps = int(EPOCHS * plan.data.train_tokens / plan.config.train.batch_tokens)
    fix = f"give more text, or stop after --train.steps {steps}" if steps else "give more text"
    return (
        f"{plan.epochs:,.0f} epochs: beyond about {EPOCHS}, text seen again teaches less and less, and the model begins"
        f" to learn it by heart (arXiv 2305.16264); {fix}."
    )


def without_text(plan: Plan) -> bool:
    """Whether a recipe for large data is planned without any."""
    return not plan.config.data.paths and plan.epochs > 100


def too_large_a_model(plan: Plan) -> str:
    """Fewer tokens than a model of this size can use."""
    parameters = sum(plan.parameters.values())
    ratio = plan.tokens / parameters
    if ratio >= 0.9 * TOKENS_PER_PARAMETER:
        return ""
    text = (
        f"{ratio:.2g} tokens for each parameter: with about {TOKENS_PER_PARAMETER} the same arithmetic teaches more"
        f" (arXiv 2203.15556)"
    )
    supported = EPOCHS * plan.data.train_tokens / TOKENS_PER_PARAMETER
    if supported < parameters:
        return f"{text}; even {EPOCHS} epochs of this text support only about {rounded(supported)} parameters."
    steps = math.ceil(TOKENS_PER_PARAMETER * parameters / plan.config.train.batch_tokens)
    return f"{text}: more steps (--train.steps {steps}), or a smaller model."


def vocabulary_too_large(plan: Plan) -> str:
    """Most of the model in tables of tokens, or tokens hardly ever seen."""
    tables = plan.parameters["embedding"] + plan.parameters["head"]
    parameters = sum(plan.parameters.values())
    share, vocabulary = tables / parameters, plan.data.vocab_size
    if plan.data.train_tokens < TIMES_A_TOKEN * vocabulary and not without_text(plan):
        times = plan.data.train_tokens / vocabulary
        return (
            f"A vocabulary of {vocabulary:,} for {plan.data.train_tokens:,} tokens: on average each is seen"
            f" {times:.2g} times an epoch, too seldom to learn it; use --tokenizer.kind bpe with a smaller"
            f" --tokenizer.vocab_size."
        )
    if share <= VOCABULARY_SHARE:
        return ""
    tied = "" if plan.config.model.tied_head else ", or share the table with --model.tied_head"
    return (
        f"{share:.0%} of the parameters are tables of the {vocabulary:,} tokens, little is left to think with; use a"
        f" smaller --tokenizer.vocab_size{tied}."
    )


def unusual_batch(plan: Plan) -> str:
    """A batch far from what grows with the tokens."""
    batch, law = plan.config.train.batch_tokens, usual_batch(plan.tokens)
    if plan.config.train.steps < 50:
        return f"{plan.config.train.steps} steps are hardly a training; use a smaller --train.batch_tokens."
    if batch > law * BATCH_SPAN / 8:
        return (
            f"A batch of {batch:,} tokens is large for {rounded(plan.tokens)} tokens in all: about {rounded(law)} and"
            f" more steps learn more from the same text (arXiv 2505.13738)."
        )
    if batch < law / BATCH_SPAN:
        return (
            f"A batch of {batch:,} tokens is small for {rounded(plan.tokens)} tokens in all: its gradients are noisy"
            f" and the hardware waits; about {rounded(law)} is usual (arXiv 2505.13738)."
        )
    return ""


def usual_batch(tokens: float) -> float:
    """Tokens in a batch that suit a horizon: 2**19 for 1.32 billion, growing with its power 0.383 (see sizing.py)."""
    return 2**19 * (tokens / 1.32e9) ** 0.383


def idle_processes(plan: Plan) -> str:
    """More processes than rows, or hardly any rows for each."""
    rows, processes = plan.config.batch_rows, plan.layout.processes
    if processes > rows:
        return (
            f"{processes:,} GPUs for a batch of {rows:,} rows: {processes - rows:,} have nothing to do; use fewer, or a"
            f" larger --train.batch_tokens."
        )
    if rows % processes:
        return f"{rows:,} rows do not divide among {processes:,} GPUs: some wait for others; choose a divisor."
    return ""


def traffic_decides(plan: Plan) -> str:
    """Links slower than arithmetic."""
    if plan.traffic_seconds < plan.step_seconds:
        return ""
    return (
        f"The network decides: a step's traffic takes {plan.traffic_seconds:.2g} s, longer than its arithmetic; use a"
        f" larger --train.batch_tokens, fewer GPUs{', or --parallel hsdp' if plan.layout.kind == 'fsdp' else ''}."
    )


def unusual_rate(plan: Plan) -> str:
    """A learning rate far from what is common for this size."""
    optim, parameters = plan.config.optim, sum(plan.parameters.values()) - plan.parameters["embedding"]
    low, usual, high = find_optimizer(optim).usual_rates(optim, parameters)
    if low <= optim.lr <= high:
        return ""
    return (
        f"optim.lr {optim.lr:g} is unusual for {optim.kind} at this size; {low:.1g} to {high:.1g} is common, about"
        f" {usual:.1g} to begin with."
    )


def late_checkpoints(plan: Plan) -> str:
    """Much to lose."""
    every = plan.config.checkpoint.every
    lost = plan.seconds if every == 0 else every * plan.step_seconds
    if lost < 3600:
        return ""
    when = "only at the end" if every == 0 else f"every {every:,} steps"
    return (
        f"Checkpoints are written {when}: a crash may cost {duration(lost)}; --checkpoint.every"
        f" {max(1, int(1800 / plan.step_seconds))} is about half an hour."
    )


CHECKS = (
    text_too_small,
    too_few_windows,
    does_not_fit,
    idle_processes,
    traffic_decides,
    too_many_epochs,
    too_large_a_model,
    vocabulary_too_large,
    unusual_batch,
    unusual_rate,
    late_checkpoints,
)
