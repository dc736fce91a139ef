"""A plan as words for a terminal."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from pretrain.io import duration, table
from pretrain.plan.plan import Plan

NAMES = {
    "value_embeddings": "value embeddings",
    "bigram_embedding": "bigram embedding",
    "mlp": "MLP",
    "other": "norms, scalars, positions",
}
LABEL, LINE = 11, 100
"""Characters before each line, and in a line of a warning."""


def describe(plan: Plan, warnings: list[str], forecast: str = "") -> str:
    """All of a plan, some twenty lines, what is predicted of it, and its warnings."""
    config, data, layout = plan.config, plan.data, plan.layout
    steps, batch, total = config.train.steps, config.train.batch_tokens, sum(plan.parameters.values())
    several, machines = layout.processes > 1, layout.machines > 1
    each, per_machine = " on each GPU" if several else "", " per machine" if machines else ""
    lines: list[str] = []

    def add(label: str, text: str) -> None:
        lines.append(f"{label:<{LABEL}}" + text.replace("\n", "\n" + " " * LABEL))

    hardware = plan.hardware.title
    if several:
        full = f", {layout.per_machine} per machine" if machines else ""
        hardware = f"{layout.processes:,} x {hardware}{full}, {layout.parallelism}"
    add("for", f"{hardware}, {plan.hardware.precision.name}")
    tokens = f"{rounded(data.train_tokens)} tokens to train on"
    add("data", f"{data.source}: {tokens}" if data.exact else f"{data.source}: about {tokens} (an estimate)")
    for line in data.left_out:
        label, _, text = line.partition("  ")
        add(label, text.strip())
    context = config.model.context_length
    add("model", f"{total:,} parameters, context {context:,}, vocabulary {data.vocab_size:,}")
    add("", table([(f"  {NAMES.get(k, k)}", f"{v:,}", f"{v / total:.0%}") for k, v in plan.parameters.items() if v]))
    seen = (
        f"{rounded(plan.tokens)} tokens, {ratio(plan.epochs)} epochs, {ratio(plan.tokens / total)} tokens per parameter"
    )
    add("training", f"{steps:,} steps of {batch:,} tokens = {seen}")
    for part in plan.mixture:
        stages = ", then ".join(rounded(tokens) if tokens else "none" for tokens in part["tokens"])
        add("", f"  {part['path']}: {stages} tokens, {ratio(part['epochs'])} epochs")
    times = f", {plan.micro_steps} accumulated" if plan.micro_steps > 1 else ""
    add("batch", f"{config.batch_rows:,} rows; micro-batches of {plan.micro_batch}{each}{times}")
    add("compute", f"{flop(plan.flops_per_token)} per token, {flop(plan.flops_per_token * plan.tokens)} in all")
    add("memory", f"{size(sum(plan.memory.values()))} of {size(plan.hardware.memory)}{each}")
    add("", table([(f"  {name}", size(value)) for name, value in plan.memory.items() if value]))
    if plan.host_memory:
        add("", f"and {size(sum(plan.host_memory.values()))} of host memory{each}")
    writing = f"{duration(plan.checkpoint_seconds)} at {plan.disk_rate / 1e9:g} GB/s{per_machine}"
    add("checkpoint", f"{size(plan.checkpoint_bytes)}, written in the background in {writing}")
    if several:
        sent = plan.traffic_bytes_per_step
        between = f", {size(sent['between'])} between machines" if machines else ""
        seconds = f"{plan.traffic_seconds_per_step:.2g} s at least, overlapped with compute"
        step = f"the step takes {plan.step_seconds:.2g} s"
        add("traffic", f"{size(sent['inside'])} sent by each GPU in a step{between}: {seconds}; {step}")
        add("loader", f"{size(plan.loader_bytes_per_second)}/s of tokens")
    share = f"{plan.utilisation:.0%} of {flop(plan.hardware.peak * layout.processes)}/s"
    add("time", f"{duration(plan.seconds)}: {plan.tokens_per_second:,.0f} tokens/s, {plan.speed}; {share}")
    if forecast:
        add("forecast", forecast)
    for line in plan.fitted:
        add("fitted", line)
    for line in plan.derived:
        add("derived", line)
    for warning in warnings:
        add("warning", textwrap.fill(warning, LINE - LABEL))
    return "\n".join(lines)


def in_units(count: float, units: Sequence[str]) -> str:
    """Three digits in the largest unit that fits; each is a thousand of the one before."""
    count = float(f"{count:.3g}")
    power = min(int(math.log10(max(1, count))) // 3, len(units) - 1)
    return f"{count / 1000**power:,.3g} {units[power]}"


def size(count: float) -> str:
    """Bytes for people."""
    return in_units(count, ("bytes", "kB", "MB", "GB", "TB", "PB"))


def flop(count: float) -> str:
    """Floating-point operations for people."""
    return in_units(count, [f"{prefix}FLOP" for prefix in ("", "k", "M", "G", "T", "P", "E", "Z")])


def rounded(count: float) -> str:
    """A large number for people."""
    if count < 1e6:
        return f"{float(f'{count:.2g}'):,.0f}"
    return in_units(count / 1e6, ("million", "billion", "trillion"))


def ratio(value: float) -> str:
    """Two digits, or all before the point."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
