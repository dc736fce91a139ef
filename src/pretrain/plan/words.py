"""A plan as words for a terminal."""

from __future__ import annotations

import textwrap

from pretrain.io import duration
from pretrain.plan.plan import Plan

NAMES = {
    "value_embeddings": "value embeddings",
    "mlp": "MLP",
    "other": "norms, scalars, positions",
}
LINE = 100
"""Characters in a line of a warning."""


def describe(plan: Plan, warnings: list[str]) -> str:
    """All of a plan, some twenty lines, and its warnings."""
    config, data, where = plan.config, plan.data, plan.layout
    train, total = config.train, sum(plan.parameters.values())
    hardware = plan.hardware.title
    if where.processes > 1:
        per = f", {where.per_machine} a machine" if where.machines > 1 else ""
        hardware = f"{where.processes:,} x {hardware}{per}, {where.kind}"
    lines = [f"for        {hardware}, {plan.hardware.precision.name}"]
    about = "" if data.exact else "about "
    known = "" if data.exact else " (an estimate)"
    lines.append(f"data       {data.source}: {about}{rounded(data.train_tokens)} tokens to train on{known}")
    lines.append(
        f"model      {total:,} parameters, context {config.model.context_length:,}, vocabulary {data.vocab_size:,}"
    )
    lines += table([(NAMES.get(k, k), f"{v:,}", f"{v / total:.0%}") for k, v in plan.parameters.items() if v])
    lines.append(
        f"training   {train.steps:,} steps of {train.batch_tokens:,} tokens = {rounded(plan.tokens)} tokens,"
        f" {ratio(plan.epochs)} epochs, {ratio(plan.tokens / total)} tokens for each parameter"
    )
    passes = f", {plan.micro_steps} times" if plan.micro_steps > 1 else ""
    each = " on each GPU" if where.processes > 1 else ""
    lines.append(f"batch      {config.batch_rows:,} rows; {plan.micro_batch} at once{each}{passes}")
    flops = plan.flops_per_token
    lines.append(f"arithmetic {operations(flops)} a token, {operations(flops * plan.tokens)} in all")
    lines.append(f"memory     {size(sum(plan.memory.values()))} of {size(plan.hardware.memory)}{each}")
    lines += table([(name, size(value), "") for name, value in plan.memory.items() if value])
    if plan.host_memory:
        lines.append(f"           and {size(sum(plan.host_memory.values()))} of the machine's own{each}")
    lines.append(
        f"checkpoint {size(plan.checkpoint_bytes)}, written beside training in {duration(plan.checkpoint_seconds)} at"
        f" {plan.disk_rate / 1e9:g} GB/s{' a machine' if where.machines > 1 else ''}"
    )
    if where.processes > 1:
        lines.append(
            f"traffic    {size(plan.traffic['inside'])} sent by each GPU in a step"
            + (f", {size(plan.traffic['between'])} between machines" if where.machines > 1 else "")
            + f": {plan.traffic_seconds:.2g} s at least, beside arithmetic; the step takes {plan.step_seconds:.2g} s"
        )
        lines.append(f"loader     {size(plan.loader_rate)} of tokens a second")
    lines.append(
        f"time       {duration(plan.seconds)}: {plan.tokens_per_second:,.0f} tokens/s, {plan.speed};"
        f" {plan.utilisation:.0%} of {operations(plan.peak * where.processes)}/s"
    )
    lines += [f"derived    {line}" for line in plan.derived]
    for text in warnings:
        lines += textwrap.wrap(text, LINE, initial_indent="warning    ", subsequent_indent=" " * 11)
    return "\n".join(lines)


def table(rows: list[tuple[str, str, str]]) -> list[str]:
    """Rows of a name, a number and a share, in columns."""
    names, numbers, shares = (max((len(row[i]) for row in rows), default=0) for i in range(3))
    return [f"             {a:<{names}}  {b:>{numbers}}  {c:>{shares}}".rstrip() for a, b, c in rows]


def operations(count: float) -> str:
    """Operations for people."""
    for unit, scale in (("ZFLOP", 1e21), ("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if count >= scale:
            return f"{count / scale:,.3g} {unit}"
    return f"{count / 1e6:.3g} MFLOP"


def size(count: float) -> str:
    """Bytes for people."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}" if count < 999.5 * scale else f"{count / scale:,.0f} {unit}"
    return f"{count / 1e3:.3g} kB"


def ratio(value: float) -> str:
    """Two digits, or all before the point."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def rounded(count: float) -> str:
    """A large number for people."""
    for word, scale in (("trillion", 1e12), ("billion", 1e9), ("million", 1e6)):
        if count >= scale:
            return f"{count / scale:.3g} {word}"
    return f"{float(f'{count:.2g}'):,.0f}"
