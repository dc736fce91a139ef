"""One optimizer step, from top to bottom."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from pretrain.device import free_memory, passing_memory, reset_peak_memory
from pretrain.errors import DeviceMemoryError
from pretrain.model.loss import IGNORE
from pretrain.optim import learning_rate_factor
from pretrain.sizing import rows_measured, rows_up_to
from pretrain.training.guard import NOT_FINITE, SPIKE
from pretrain.training.parallel import set_gradient_sync
from pretrain.training.signals import Stopped
from pretrain.training.state import TrainState, random_state, set_random_state, update

FORWARD, BACKWARD, UPDATE = "in a forward pass", "in a backward pass", "updating"


def train_step(
    state: TrainState,
    on_phase: Callable[[str], None] = lambda phase: None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """One optimizer step on one global batch; a step that is skipped changes no bit of parameters and moments.

    ``on_phase`` is called with FORWARD, BACKWARD and UPDATE; it may raise before UPDATE, when nothing has changed yet.

    Returns the mean loss, the scheduled value of ``optim.lr``, the gradient norm before clipping, if the step was
    skipped, why, and as ``stop`` how many processes were asked to stop by ``stop_requested``; the tensors among them
    are still being computed on the device.
    """
    config, world, step = state.config, state.world, state.progress.step
    batch_tokens, clip = config.train.batch_tokens, config.train.grad_clip

    # This rank's rows of the global batch, (rows, T): a function of the step alone, whatever ran before.
    inputs, targets = state.batches.batch(step + state.progress.skipped_batches)
    if missing := world.rows_per_rank(config.batch_rows) - len(inputs):  # all ranks must run the same number of passes
        inputs = F.pad(inputs, (0, 0, 0, missing))
        targets = F.pad(targets, (0, 0, 0, missing), value=IGNORE)

    # Gradients add up over micro-batches; each is a part of the mean over all tokens of the global batch.
    loss = torch.zeros((), device=world.device)
    micro_batches = list(zip(*(x.split(state.progress.micro_rows) for x in (inputs, targets)), strict=True))
    for number, (x, y) in enumerate(micro_batches, start=1):
        set_gradient_sync(state.forward, last=number == len(micro_batches), reshard=config.parallel.reshard)
        on_phase(FORWARD)
        part = state.forward(x.to(world.device), y.to(world.device)) / batch_tokens
        on_phase(BACKWARD)
        state.loss_scale.scaled(part * world.size).backward()  # times size: DDP and FSDP take the mean over ranks
        loss += part.detach()

    on_phase(UPDATE)
    # That one process was asked to stop travels with the loss: all know it of the same step.
    loss, stop = world.sum(torch.stack((loss, torch.full_like(loss, stop_requested())))).unbind()
    gradients = state.parameters.gradients()
    state.loss_scale.unscale(gradients)
    norm = state.parameters.gradient_norm(gradients)
    if clip and step >= config.train.grad_clip_from:
        torch.nn.utils.clip_grads_with_norm_(state.parameters.local.values(), clip, norm)

    # Judged on the device, so that no step waits for it; the optimizers select the old values where it is skipped.
    not_finite, spike = state.guard.judge(loss, norm)
    skip = (not_finite | spike).float()
    update(state.optimizers, step, config, skip)
    if state.average:
        state.average.update(step + 1, skip)
    state.parameters.zero_grad()
    state.loss_scale.update(not_finite.float())
    state.progress.step += 1
    return {
        "train/loss": loss,
        "train/lr": config.optim.lr * learning_rate_factor(config.schedule, step, config.train.steps),
        "train/grad_norm": norm,
        "train/skipped": NOT_FINITE * not_finite + SPIKE * spike,
        "stop": stop,
    }


def measured_step(
    state: TrainState,
    on_phase: Callable[[str], None],
    on_retry: Callable[[str], None],
    stop_requested: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """:func:`train_step_with_oom_retry`, and as ``micro_rows`` the micro-batch that it shows to fit in all processes.

    Counted is what a step takes that is made anyway, and compiled: no trial, whose weights, gradients and random
    states would have to be put back, and no compilation for it. What it promises, the next step tests, which is done
    again with fewer rows if it runs out of memory.
    """
    config, world, progress, fit = state.config, state.world, state.progress, 0

    def noted(name: str) -> None:
        nonlocal fit
        if name == UPDATE:  # activations are gone; the gradients, which lie beside all but the first, are there
            passes, free = passing_memory(world.device), free_memory(world.device)
            fit = rows_measured(config, progress.micro_rows, passes, free)
        on_phase(name)

    reset_peak_memory(world.device)
    numbers = train_step_with_oom_retry(state, noted, on_retry, stop_requested)
    return numbers | {"micro_rows": min(world.gather(min(fit, world.rows_per_rank(config.batch_rows))))}


def train_step_with_oom_retry(
    state: TrainState,
    on_phase: Callable[[str], None],
    on_retry: Callable[[str], None],
    stop_requested: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """:func:`train_step`, retried with half the micro-batch while its passes run out of memory.

    The batch is a function of the step and the passes change no weight, so only dropout's random state is restored;
    also when ``on_phase`` raises Stopped.

    Raises:
        DeviceMemoryError: one row does not fit, the update ran out of memory, or several processes train, of which one
            alone cannot retry.
    """
    config, world, progress = state.config, state.world, state.progress
    phase = FORWARD

    def noted(name: str) -> None:
        nonlocal phase
        phase = name
        on_phase(name)

    while True:
        before = random_state(world.rank, world.device) if config.model.dropout else {}
        try:
            return train_step(state, noted, stop_requested)
        except Stopped:
            set_random_state(before, world.rank, world.device)
            raise
        except torch.OutOfMemoryError:
            if world.size > 1 or phase == UPDATE:  # a part of the update may be done already
                half = max(1, progress.micro_rows // 2)
                raise DeviceMemoryError(
                    f"rank {world.rank} is out of memory {phase}, with a micro-batch of {progress.micro_rows} rows;"
                    f" resume with --train.micro_batch {half}, or --train.activation_checkpointing"
                ) from None
            if progress.micro_rows == 1:
                raise DeviceMemoryError(
                    f"one row of {config.model.context_length} tokens does not fit in this device's memory;"
                    f" try --train.activation_checkpointing, or a smaller model or context"
                ) from None
        # Outside the handler, whose traceback would keep the tensors of the failed pass alive.
        state.parameters.zero_grad()
        set_random_state(before, world.rank, world.device)
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
        progress.micro_rows = rows_up_to(config, progress.micro_rows // 2)
        on_retry(f"out of memory: the micro-batch is now {progress.micro_rows} rows; the global batch is unchanged")
