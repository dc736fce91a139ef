"""Schedules: pure functions of the step, so that resuming needs no state."""

import math

from pretrain.config import OptimConfig, ScheduleConfig


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
        decay_steps = schedule.decay_fraction * steps
        left = min(1.0, (steps - step) / decay_steps) if decay_steps else 1.0
        return schedule.final + (1 - schedule.final) * left
    return 1.0


def muon_momentum(optim: OptimConfig, step: int) -> float:
    """Muon's momentum at ``step``: from ``momentum_from`` to ``momentum`` over ``momentum_warmup_steps``."""
    share = min(1.0, step / optim.momentum_warmup_steps) if optim.momentum_warmup_steps else 1.0
    return optim.momentum_from + (optim.momentum - optim.momentum_from) * share
