"""Schedules: pure functions of the step, so that resuming needs no state."""

import math

from pretrain.config import ScheduleConfig


def learning_rate_factor(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """The learning rate of ``step`` (0 for the first of ``steps``) as a share of its peak.

    Warmup: step 0 has ``warmup_from`` when that is positive (LLMs-from-scratch), otherwise 1 / warmup_steps (so that
    no step is wasted at 0), and the peak is reached right after the last warmup step. Then: cosine to ``final`` over
    all remaining steps (SGDR, arXiv 1608.03983); linear to ``final`` over the last ``decay_fraction`` of all steps;
    or constant.
    """
    warmup = schedule.warmup_steps
    if step < warmup:
        if schedule.warmup_from > 0:
            return schedule.warmup_from + (1 - schedule.warmup_from) * step / warmup
        return (step + 1) / warmup
    if schedule.kind == "cosine":
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return schedule.final + (1 - schedule.final) * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule.kind == "linear":
        return schedule.final + (1 - schedule.final) * stable_share(schedule, step, steps)
    return 1.0


def stable_share(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """1 until the linear decay begins, then falling to 0 at ``steps``."""
    decay_steps = round(schedule.decay_fraction * steps)
    return min(1.0, (steps - step) / decay_steps) if decay_steps else 1.0
