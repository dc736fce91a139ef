"""The plan's predictions beside real runs: memory and time of whole ``pretrain train`` processes on this machine.

    python benchmarks/plan.py [--rounds 3] [--only NAME] [--cpu-time]

Plan and run take turns, so that what else the machine does falls on both; medians are shown. Memory is the most that a
process held (ru_maxrss); time is from the end of the first step to the end of the last, with one validation between.
On a machine that others use too, --cpu-time lets every clock of plan and run count the seconds that their process
computes (with OMP_NUM_THREADS=1), not those that it waits for others.
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
from pathlib import Path

CASES = {
    "quickstart, fp32": ("quickstart", 60, {"train.precision": "fp32"}),
    "quickstart, bf16": ("quickstart", 60, {"train.precision": "bf16"}),
    "quickstart, 16k tokens per step": ("quickstart", 10, {"train.batch_tokens": 16384}),
    "quickstart, checkpointed, 8 rows": (
        "quickstart",
        40,
        {"train.activation_checkpointing": True, "train.micro_batch": 8},
    ),
    "laptop, 4 rows": ("laptop", 6, {"train.micro_batch": 4}),
    "laptop, 32 rows, fp32": ("laptop", 4, {"train.precision": "fp32"}),
    "storybot, dropout": ("storybot", 6, {"tokenizer.vocab_size": 4096, "model.dropout": 0.1}),
    "GPT-2 124M, context 256": (
        "gpt2-124m",
        4,
        {"model.context_length": 256, "train.batch_tokens": 2048, "train.micro_batch": 4},
    ),
}

VALIDATED = 4096
"""Tokens of the validation that is measured."""

CPU_TIME = "PRETRAIN_BENCHMARK_CPU_TIME"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="")
    parser.add_argument("--cpu-time", action="store_true")
    arguments = parser.parse_args()
    if arguments.cpu_time:
        os.environ[CPU_TIME] = "1"
    print("| configuration | memory planned | measured | | time planned | measured | |\n|" + " --- |" * 7)
    with tempfile.TemporaryDirectory() as folder:
        for name, case in CASES.items():
            if arguments.only in name:
                rounds = [one_round(Path(folder), *case) for _ in range(arguments.rounds)]
                planned, held, predicted, took = (statistics.median(column) for column in zip(*rounds, strict=True))
                print(
                    f"| {name} | {planned / 1e6:,.0f} MB | {held / 1e6:,.0f} MB | {planned / held - 1:+.0%}"
                    f" | {predicted:.1f} s | {took:.1f} s | {predicted / took - 1:+.0%} |",
                    flush=True,
                )


def one_round(folder: Path, recipe: str, steps: int, fields: dict[str, object]) -> tuple[float, float, float, float]:
    """Memory planned and held, seconds planned and taken."""
    kind = "gpt2" if recipe == "gpt2-124m" else "bpe"
    size = fields.get("tokenizer.vocab_size", {"laptop": 8192}.get(recipe, 4096))
    tokens = folder / f"tokens-{kind}-{size}"
    if not tokens.exists():
        pretrain("data", "prepare", "--tokenizer", kind, "--vocab-size", size, "--val-fraction", 0.01, "--out", tokens)
    given = {
        **fields,
        "train.steps": steps,
        "eval.every": steps - 1,
        "eval.tokens": VALIDATED,
        "eval.order": "sequential",
        "eval.train_tokens": 0,
        "eval.at-start": False,
        "checkpoint.every": 0,  # saved once, after the last step
        "sample.max_tokens": 0,
    }
    flags = [text for field, value in given.items() for text in flag(field, value)]
    plan = json.loads(pretrain("plan", recipe, "--data", tokens, *flags, "--json")[0])
    run = folder / f"run-{time.monotonic_ns()}"
    _, held = pretrain("train", recipe, "--data", tokens, "--out", run, *flags)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    took = records[-1]["time"] - records[0]["time"]
    # The plan has two validations, the last one of all tokens (and of these, if they are fewer) after the last step.
    validation = plan["seconds"] - steps * plan["step_seconds"]
    here = min(VALIDATED, plan["data"]["val_tokens"])
    held_out = plan["data"]["val_tokens"]
    validation *= here / (here + held_out + (here if here < held_out else 0))
    return plan["memory"]["total"], held, (steps - 1) * plan["step_seconds"] + validation, took


def flag(field: str, value: object) -> list[str]:
    if value is False:
        section, _, name = field.partition(".")
        return [f"--{section}.no-{name}"]
    return [f"--{field}"] if value is True else [f"--{field}", str(value)]


def pretrain(*args: object) -> tuple[str, int]:
    """Run a command; gives what it printed, and the most memory it held."""
    command = [sys.executable, __file__, "worker", *map(str, args)]
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        output.seek(0)
        text = output.read().decode()
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{text}")
    return text, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def worker(args: list[str]) -> int:
    """Run a command in this process, by the clock that was asked for."""
    import threading  # noqa: F401 - it keeps the real clock for its waits

    if os.environ.get(CPU_TIME):
        time.perf_counter = time.monotonic = time.process_time
    from pretrain.cli import main

    return main(args)


if __name__ == "__main__":
    sys.exit(worker(sys.argv[2:]) if sys.argv[1:2] == ["worker"] else main())
