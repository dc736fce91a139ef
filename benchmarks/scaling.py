"""What several processes cost: throughput, the share of communication, weak scaling, and torchrun around one process.

    python benchmarks/scaling.py                        1 and 2 processes of one thread each, on the CPU
    python benchmarks/scaling.py --processes 1 4 8      on GPUs, one for each process
    python benchmarks/scaling.py --torchrun             one process as it is, and under torchrun

Each process trains on ``--rows`` rows of its own (weak scaling) through train_step.
``apart`` are as many processes that do not talk, so that what they cost one another in caches and memory is not taken
for communication: share = 1 - apart / together. Muon shares its work too, so its share may be below 0.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from common import training_state

from pretrain.config import ParallelConfig, load_config

KINDS, OPTIMIZERS = ("ddp", "fsdp"), ("adamw", "muon")
APART = "apart"


def measure(settings: dict) -> float:
    """Median seconds of a step in this process, which torchrun started among others."""
    import torch
    import torch.distributed as dist

    from pretrain.training.step import train_step
    from pretrain.training.world import join_world

    shape = {f"model.{name}": settings[name] for name in ("layers", "width", "heads", "context_length")}
    device, row_tokens = settings["device"], settings["rows"] * settings["context_length"]
    precision = "auto" if device == "cuda" else "fp32"
    fields = {"optim.kind": settings["optimizer"], "train.device": device, "train.precision": precision}
    with join_world(device, ParallelConfig()) as everybody:
        kind, world = settings["kind"], everybody
        if kind == APART or everybody.size == 1:
            kind, world = "none", replace(everybody, rank=0, size=1, control=None, store=None)
        fields |= {"train.batch_tokens": row_tokens * world.size}
        state = training_state(load_config("quickstart", **shape, **fields), settings["vocabulary"], world, kind)
        times = []
        for _ in range(settings["steps"] + 2):
            everybody.any(False)
            begin = time.perf_counter()
            train_step(state)
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        slowest = torch.tensor(statistics.median(times[2:]), dtype=torch.float64)
        if everybody.control is not None:
            dist.all_reduce(slowest, dist.ReduceOp.MAX, group=everybody.control)
        return float(slowest)


def start(settings: dict, processes: int) -> float:
    """The same in this many processes under torchrun; gives the seconds of the slowest."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    if settings["device"] == "cpu":
        environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=localhost"]
    command += [f"--nproc-per-node={processes}", __file__, "--worker", json.dumps(settings)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(result.stderr)
    return next(float(line) for line in result.stdout.splitlines() if line)


def table(settings: dict, counts: list[int], rounds: int) -> None:
    """Measure every way in turn, ``rounds`` times, and print medians."""
    cases = [
        (optimizer, kind, count)
        for optimizer in OPTIMIZERS
        for count in counts
        for kind in (("one",) if count == 1 else (APART, *KINDS))
    ]
    seconds: dict[tuple, list[float]] = {case: [] for case in cases}
    for _ in range(rounds):
        for optimizer, kind, count in cases:
            one = {**settings, "optimizer": optimizer, "kind": kind}
            seconds[optimizer, kind, count].append(start(one, count))
    print("| optimizer | processes | kind | step, ms | tokens/s | efficiency | communication |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for optimizer, kind, count in cases:
        step = statistics.median(seconds[optimizer, kind, count])
        alone = statistics.median(seconds.get((optimizer, "one", 1), [step]))
        apart = statistics.median(seconds[optimizer, APART, count]) if count > 1 else step
        tokens = count * settings["rows"] * settings["context_length"] / step
        share = f"{1 - apart / step:.0%}" if kind in KINDS else ""
        print(
            f"| {optimizer} | {count} | {kind} | {step * 1000:.1f} | {tokens:,.0f} | {alone / step:.0%} | {share} |",
            flush=True,
        )


def around_one(rounds: int, steps: int) -> None:
    """`pretrain train` as it is and under torchrun: whole seconds, and seconds of a step."""
    from pretrain.io import read_jsonl

    ways = {"plain": [], "torchrun": ["torch.distributed.run", "--standalone", "--local-addr=localhost", "-m"]}
    results: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, launcher in ways.items():
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-m", *launcher, "pretrain", "train", "--out", f"{folder}/run"]
                command += ["--train.steps", str(steps), "--eval.every", "0", "--eval.tokens", "4096"]
                begin = time.perf_counter()
                subprocess.run(command, check=True, capture_output=True)
                whole = time.perf_counter() - begin
                records = read_jsonl(Path(folder) / "run" / "metrics.jsonl")
            rates = [record["train/tokens_per_second"] for record in records[len(records) // 2 :]]
            results[way].append((whole, 1 / statistics.median(rates)))
    (plain, step), (whole, under) = ([statistics.median(c) for c in zip(*results[way], strict=True)] for way in ways)
    print(f"whole command: plain {plain:.1f} s, under torchrun {whole:.1f} s ({whole - plain:+.1f} s)")
    print(f"a step: under torchrun {under / step - 1:+.1%} of the time of the plain one")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=8, help="of each process")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--context-length", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--torchrun", action="store_true", help="one process, as it is and under torchrun")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        seconds = measure(json.loads(options.worker))
        if os.environ.get("RANK", "0") == "0":
            print(seconds, flush=True)
    elif options.torchrun:
        around_one(options.rounds, options.steps)
    else:
        from pretrain.device import choose_device

        device = choose_device(options.device).type
        table({**vars(options), "device": device}, options.processes, options.rounds)


if __name__ == "__main__":
    main()
