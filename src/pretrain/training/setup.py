"""Set up a run, top to bottom: data, checkpoint, model, optimizers, state, callbacks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch

from pretrain.config import Config
from pretrain.device import Precision, choose_precision, free_memory, has_tf32
from pretrain.errors import CheckpointError, DataError
from pretrain.evaluation import Task, open_bundle, read_tasks
from pretrain.generation import encode_prompt
from pretrain.io import read_jsonl
from pretrain.model import GPT
from pretrain.optim import build_optimizers
from pretrain.runs import Run
from pretrain.runs.checkpoint import LAST, CheckpointWriter, newest
from pretrain.runs.environment import write_environment
from pretrain.runs.metrics import Smoothed, comparable_losses
from pretrain.sizing import meta_model, rows_that_fit
from pretrain.text.split import TEST, VAL
from pretrain.tokens import BatchesAhead, LiveBatches, Origin, TrainingBatches, find_text, training_order
from pretrain.training.average import WeightAverage
from pretrain.training.callbacks import Callback, RunFiles, TextProblems, Warnings
from pretrain.training.console import Console
from pretrain.training.evaluator import Evaluator
from pretrain.training.guard import Guard, LossScale
from pretrain.training.heartbeat import Heartbeat
from pretrain.training.init_from import load_initial
from pretrain.training.loggers import Logger, chosen
from pretrain.training.loop import Trainer
from pretrain.training.parallel import Parameters, choose_parallelism, init_parameters, parallelize, training_forward
from pretrain.training.state import Progress, TrainState
from pretrain.training.world import World

if TYPE_CHECKING:
    from pretrain.runs.copy import RunCopy


def set_up(
    run: Run,
    world: World,
    console: Console,
    started: float,
    went_back_to: int = 0,
    callbacks: Sequence[Callback] = (),
    copy: RunCopy | None = None,
) -> Trainer:
    """Make a run whose data is prepared ready to train, from its newest intact checkpoint if it has one.

    All processes call it. ``started`` is ``time.monotonic()`` when this job began; ``went_back_to`` the step to which
    ``--resume-from`` has just taken the run back, or 0; ``copy``, on rank 0, where the run is copied to.
    """
    config, device, say = run.config, world.device, console.say
    listeners: list[Callback] = [Heartbeat(run.folder, config, world)]

    # Data: batches are a function of the step, so nothing is read yet.
    corpus = run.corpus()
    tokenizer, rows, length = corpus.tokenizer, config.batch_rows, config.model.context_length
    bytes_per_token, training = corpus.bytes_per_token, None
    for prompt in config.sample.prompts if config.sample.max_tokens else ():
        try:
            encode_prompt(tokenizer, prompt)
        except DataError as error:
            raise DataError(f"sample.prompts: {prompt!r} cannot be sampled from ({error})") from None
    if config.data.stream:
        sizes = {"rows": rows, "length": length, "seed": config.train.seed, "rank": world.rank, "world": world.size}
        whole = Origin.load(run.folder).whole
        batches = LiveBatches(find_text(config.data), tokenizer, config.data, whole=whole, **sizes)
        bytes_per_token = batches.bytes_per_token
        listeners.append(TextProblems(batches.read, say))
    else:
        training = corpus.stream("train"), training_order(corpus, config)
        batches = TrainingBatches(*training, rows, world.rank, world.size)
    if device.type == "cuda":  # on the CPU a batch takes tens of microseconds: not worth a thread
        batches = BatchesAhead(batches, device)

    # The checkpoint decides the precision, and must be of this data.
    checkpoint, fork = newest(run.checkpoints, say, world), run.fork
    if fork and not checkpoint:
        whose = f"it begins with step {fork['step']} of {fork['parent']}"
        raise CheckpointError(f"{run.folder} has no checkpoint, and {whose}; fork that again, with another --out")
    progress = Progress.of(checkpoint)
    if checkpoint and progress.data != corpus.fingerprint:
        place = ", ".join(dataset.name for dataset in corpus.datasets)
        raise DataError(f"{place} is not what this run was trained on; restore it, or start again with --out")
    wanted = progress.precision or config.train.precision
    precision = Precision(world.broadcast(choose_precision(wanted, device).name), device)
    precision.set_products()
    if precision.name == "fp32" and has_tf32(device):
        say("precision fp32 in full; nanoGPT's and nanochat's fp32 on such a GPU is the faster --train.precision tf32")
    world.check_same_on_all_ranks(
        {
            "the configuration": hashlib.sha256(repr(config).encode()).hexdigest()[:12],
            "the data": corpus.fingerprint[:12],
            "the version of pretrain": version("pretrain"),
            "the version of torch": torch.__version__,
        }
    )
    progress.data, progress.precision = corpus.fingerprint, precision.name

    # The model: described on the meta device, made parallel, given memory, then values.
    torch.manual_seed(config.train.seed + world.rank)  # for dropout; everything else has its own generator
    parallelism = choose_parallelism(config, tokenizer.vocab_size, world)
    model = meta_model(config.model, tokenizer.vocab_size, tokenizer.bos_id)
    model.activation_dtype = precision.dtype
    compiled = parallelize(model, parallelism, config, world, precision, say)
    if checkpoint is None:

        def initial_values(whole: GPT) -> None:
            place = next(whole.parameters()).device
            whole.init_weights(torch.Generator(place).manual_seed(config.train.seed))
            if config.train.init_from:
                load_initial(whole, config, tokenizer)
                say(f"weights   from {config.train.init_from}")

        init_parameters(model, world, initial_values)

    # Optimizers work on what this process holds of the parameters.
    parameters = Parameters(model, parallelism, world)
    optimizers = build_optimizers(model, config.optim)
    parameters.distribute(optimizers, compiled)

    # The state, as the checkpoint has it.
    scale, guard = LossScale(precision), Guard(config.guard, device)
    average = WeightAverage(config.optim.ema, parameters) if config.optim.ema else None
    state = TrainState(config, world, model, model, parameters, optimizers, scale, guard, batches, progress, average)
    state.make_moments()
    if checkpoint:
        state.load_state_dict(checkpoint)
        if progress.pending and world.run_on_rank0(lambda: has_lines(run, progress.step)):
            state.progress.pending = None  # the last step is saved before its measurements, and they were finished
    state.progress.went_back_to = went_back_to or state.progress.went_back_to
    state.forward = training_forward(model, parallelism, world)
    # Rows of a micro-batch: unchanged on resume, so that sums round alike; at most the rows of this process.
    fit = progress.micro_rows or rows_that_fit(
        config, precision.dtype.itemsize, free_memory(device), device.type == "cpu"
    )
    micro_rows = config.train.micro_batch or world.broadcast(fit)
    state.progress.micro_rows = min(micro_rows, world.rows_per_rank(rows))

    # Callbacks: on rank 0 all of them, elsewhere only the heartbeat.
    losses: dict[int, float] = {}
    smoothed, model_of, copier = Smoothed(), (LAST, 1.0), None
    if world.is_rank0:
        # Without a checkpoint everything comes again, what was measured before the first step too.
        finished = progress.step - bool(state.progress.pending) if checkpoint else -1
        records = [record for record in read_jsonl(run.metrics) if record["step"] <= finished]
        begin = run.begin  # earlier checkpoints are another run's
        losses = {step: loss for step, loss in comparable_losses(records).items() if step >= begin}
        smoothed, model_of = Smoothed(records), run.model_of(finished)
        loggers = [Logger(kind, run.folder, config, finished, say) for kind in chosen(config.log.backends, say)]
        listeners += [RunFiles(run, finished, say), console, *loggers, Warnings(run, records), *callbacks]
        if copy:
            from pretrain.training.copier import Copier  # not above: most runs have no copy

            copier = Copier(copy)
            listeners.append(copier)
        write_environment(run.folder, device, step=progress.step, precision=precision.name, processes=world.size)
    val_streams, test_streams = (
        {each.name: each.stream(side) for each in corpus.datasets if each.tokens(side)} for side in (VAL, TEST)
    )
    tasks = core_tasks(config, world, say)
    together = parameters.sharded or world.size == 1
    evaluator = Evaluator(
        config,
        world,
        model,
        compiled,
        together,
        tokenizer,
        val_streams,
        test_streams,
        training,
        tasks,
        parameters,
        average,
        *world.broadcast(model_of),
    )
    writer = CheckpointWriter(run.checkpoints, parameters.part, world)
    writer.allocate(state.tensors())
    return Trainer(
        run=run,
        corpus=corpus,
        state=state,
        evaluator=evaluator,
        writer=writer,
        callbacks=listeners,
        console=console,
        clock_start=started - progress.seconds,
        val_losses=world.broadcast(losses),
        bytes_per_token=bytes_per_token,
        smoothed=smoothed,
        copier=copier,
    )


def has_lines(run: Run, step: int) -> bool:
    """Whether a step's line of metrics, the last that is written of it, and those of its samples are there."""
    samples = set(run.config.sample.prompts) if run.config.sample.max_tokens else ()
    written = sum(record["step"] == step for record in read_jsonl(run.samples))
    return any(record["step"] == step for record in read_jsonl(run.metrics)) and written >= len(samples)


def core_tasks(config: Config, world: World, say: Callable[[str], None]) -> list[Task]:
    """The tasks of CORE to measure; none where the usual bundle, not named by the configuration, is out of reach.

    All processes call it. Raises DataError for a bundle that the configuration names and that cannot be read.
    """
    if not config.eval.core_every:
        return []
    place = config.eval.core_bundle

    def problem() -> str:
        try:
            open_bundle(place)
        except DataError as error:
            return str(error)
        return ""

    if not place:
        # Rank 0 first: offline, one process waits for the network, not each in turn. Then those of other machines.
        found = world.broadcast(problem() if world.is_rank0 else "")
        found = found or next(filter(None, world.gather(problem())), "")
        if found:
            say(f"CORE      is not measured: {found}")
            return []
    return read_tasks(open_bundle(place))
