"""How fast this machine trains: measured in some seconds with real models on random tokens."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable
from contextlib import nullcontext
from statistics import fmean

import torch

from pretrain.config import Config
from pretrain.config.sampling import SamplingOptions
from pretrain.device import Precision, free_memory, keep_freed_memory, synchronize
from pretrain.fitting import Machine
from pretrain.generation.decode import generate
from pretrain.optim import build_optimizers
from pretrain.sizing import Speed, flops_per_token, meta_model, rows_that_fit, validation_rows
from pretrain.training.parallel import Parameters, choose_parallelism, parallelize, set_gradient_sync, training_forward
from pretrain.training.state import update
from pretrain.training.world import World

SECONDS = 5.0
"""How long a measurement takes."""
MINIMUM = 4
"""Measurements that are taken all the same. Their mean counts: single ones may be twice the usual, in training too."""

SAMPLED = 8
"""Tokens that a measurement generates."""

MEASUREMENT_SHARE = 0.03
"""Of train.minutes, at most, for a measurement of the steps."""

PROBES = {"cpu": (128, 384), "cuda": (256, 1024), "mps": (128, 512)}
"""Widths of the small models that tell how fast a device is, before one is chosen."""
PROBE_SECONDS = 0.5
PROBE_TOKENS = 2048


def measure_speed(
    config: Config,
    vocab_size: int,
    rows: int,
    precision: Precision,
    seconds: float = SECONDS,
    world: World | None = None,
) -> Speed:
    """Time a few real micro-batches of ``rows``, and updates, on random tokens.

    Fewer rows are measured where that would take long, and their time multiplied. ``seconds`` is how long it may take,
    besides making the model; three times as long for ``MINIMUM`` measurements. All processes of a ``world`` call it
    with the same arguments, and get what rank 0 measured while they exchanged their gradients.
    """
    device, length = precision.device, config.model.context_length
    world = world or World(device)
    if device.type == "cpu":
        keep_freed_memory()

    def timed(work: Callable[[], object]) -> float:
        begin = time.perf_counter()
        work()
        synchronize(device)
        return time.perf_counter() - begin

    with torch.random.fork_rng(enabled=device.type == "cpu"):  # dropout draws from it
        parallelism = choose_parallelism(config, vocab_size, world)
        model = meta_model(config.model, vocab_size, bos_id=0)
        model.activation_dtype = precision.dtype
        compiled = parallelize(model, parallelism, config, world, precision, say=lambda _: None)
        parameters = Parameters(model, parallelism, world)
        optimizers = build_optimizers(model, config.optim)
        parameters.distribute(optimizers, compiled)
        if not parameters.sharded:
            model.init_weights(torch.Generator(device).manual_seed(0))
        else:
            for parameter in parameters.local.values():
                parameter.data.fill_(0.01)
        forward = training_forward(model, parallelism, world)
        set_gradient_sync(forward, last=True, reshard=config.parallel.reshard)
        held_out = torch.randint(vocab_size, (validation_rows(rows, length), length)).to(device)
        tokens = held_out[:rows]

        def micro_step(rows: int) -> None:
            (forward(tokens[:rows], tokens[:rows]) / (rows * length)).backward()

        def optimizer_step() -> None:
            norm = parameters.gradient_norm(parameters.gradients())
            torch.nn.utils.clip_grads_with_norm_(parameters.local.values(), 1.0, norm)
            update(optimizers, 0, config, skip=torch.zeros((), device=device))
            parameters.zero_grad()

        @torch.no_grad()
        def evaluate() -> None:
            model.eval()
            model(held_out, held_out)
            model.train()

        def sample() -> None:
            with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
                list(generate(model, [[0]], SamplingOptions(max_tokens=SAMPLED)))

        measured = rows
        if not compiled:  # which would be done anew for each number of rows
            first = world.broadcast(timed(lambda: micro_step(1)))
            while measured > 1 and first * measured > seconds:  # at the latest one row is measured
                measured = -(-measured // 2)
            held_out = held_out[:measured]
        works = (lambda: micro_step(measured), optimizer_step, evaluate, sample)
        for work in works:  # once unmeasured: memory is fetched and programs are compiled
            work()
        begin = time.perf_counter()
        micro, updates, evaluation, sampling = times = [[], [], [], []]
        going_on = True
        while going_on:
            for work, each in zip(works, times, strict=True):
                each.append(timed(work))
            limit = seconds if len(micro) >= MINIMUM else 3 * seconds
            going_on = world.broadcast(time.perf_counter() - begin < limit)
    evaluated, sampled = fmean(evaluation) / held_out.numel(), fmean(sampling) / SAMPLED
    return world.broadcast(Speed(fmean(micro) * rows / measured, fmean(updates), evaluated, sampled))


def measure_machine(config: Config, vocab_size: int, precision: Precision, seconds: float, world: World) -> Machine:
    """What models this machine can train: how fast, by two small ones, and how large. All processes call it.

    ``seconds`` are those left for training.
    """
    flops = {}
    for width in PROBES[precision.device.type]:
        shape = {"layers": 2, "width": width, "heads": width // 64, "context_length": 128, "dropout": 0.0}
        model = dataclasses.replace(config.model, depth=0, kv_heads=0, head_width=0, mlp_width=0, **shape)
        train = dataclasses.replace(config.train, batch_tokens=PROBE_TOKENS, micro_batch=0, compile="off")
        optim = dataclasses.replace(config.optim, groups={})  # which name parameters of the real model
        probe = dataclasses.replace(config, model=model, train=train, optim=optim)
        speed = measure_speed(probe, vocab_size, PROBE_TOKENS // 128, precision, PROBE_SECONDS, world)
        flops[width] = world.size * PROBE_TOKENS * flops_per_token(model, vocab_size) / speed.step(1)
    release(precision)
    free = min(world.gather(free_memory(precision.device)))
    here = 1 if precision.device.type == "cuda" else world.local_size
    return Machine(flops, free // here, seconds, precision.device.type != "cpu", precision.dtype.itemsize, world.size)


def measure_training(config: Config, vocab_size: int, precision: Precision, world: World) -> tuple[Speed, int]:
    """The speed of the steps of a configuration, and in how many micro-batches each is done. All processes call it."""
    each = world.rows_per_rank(config.batch_rows)
    device = precision.device
    fit = rows_that_fit(config, precision.dtype.itemsize, free_memory(device), device.type == "cpu")
    rows = min(config.train.micro_batch or world.broadcast(fit), each)
    seconds = min(SECONDS, MEASUREMENT_SHARE * 60 * config.train.minutes)
    speed = measure_speed(config, vocab_size, rows, precision, seconds, world)
    release(precision)
    return speed, -(-each // rows)


def release(precision: Precision) -> None:
    """Give back the memory of models that were only measured, which a GPU's allocator would keep."""
    gc.collect()
    if precision.device.type == "cuda":
        torch.cuda.empty_cache()
