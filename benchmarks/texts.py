"""What is learned from a text in a given time, with no settings: ours, nanoGPT and general compressors.

    python benchmarks/texts.py FILE ... [--minutes 3] [--seeds 3] [--nanogpt DIR]

Ours is ``pretrain train --data FILE --train.minutes N``, with a seed and the share held out that all contenders have.
nanoGPT trains its model of characters, with its README's options for a CPU, for as many iterations as fit in the same
time, and keeps its best checkpoint. All numbers are bits per byte of the last 5 % of the characters, those of models in
windows that overlap by half; of several seeds the median, and the lowest and highest. To be run alone: two
programs that use all cores slow each other several times.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
from train import NANOGPT_CPU, prepare_nanogpt

from pretrain.report.compressors import bits_per_byte, compressors

SHARE = 0.95
"""Share of the characters to train on."""
CALIBRATION = 300
"""Iterations of nanoGPT from which it is computed how many fit in the time."""


def train_ours(file: Path, minutes: float, seed: int) -> tuple[float, float, list[str]]:
    """Bits per byte, seconds, and the lines that say which settings were chosen."""
    with tempfile.TemporaryDirectory() as folder:
        fixed = {"train.minutes": minutes, "train.seed": seed, "data.val_fraction": round(1 - SHARE, 6)}
        options = [word for name, value in fixed.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, "-m", "pretrain", "train", "--data", str(file), "--out", f"{folder}/run", *options]
        begin = time.perf_counter()
        result = subprocess.run(command, capture_output=True, text=True)
        seconds = time.perf_counter() - begin
        if result.returncode:
            raise SystemExit(f"training on {file} failed:\n{result.stderr}")
        summary = json.loads(Path(folder, "run", "summary.json").read_text(encoding="utf-8"))
    chosen = [line for line in (result.stdout + result.stderr).splitlines() if line.startswith("fitted")]
    return summary["val_bpb"], seconds, chosen


def train_nanogpt(nanogpt: str, file: Path, minutes: float, seed: int) -> tuple[float, float]:
    """Bits per byte of nanoGPT's model of the characters, and seconds."""
    with tempfile.TemporaryDirectory() as folder:
        data, text = Path(folder, "data"), file.read_text(encoding="utf-8")
        data.mkdir()
        prepare_nanogpt(data, text, SHARE)
        script, source = Path(folder, "train.py"), Path(nanogpt, "train.py").read_text(encoding="utf-8")
        script.write_text(source.replace("torch.manual_seed(1337 ", f"torch.manual_seed({1337 + seed} "))

        def run(iterations: int) -> tuple[float, str]:
            options = {"max_iters": iterations, "lr_decay_iters": iterations, "eval_interval": iterations // 10}
            options |= {
                "dataset": data,
                "out_dir": f"{folder}/out",
                "log_interval": 50,
                "always_save_checkpoint": False,
            }
            command = [sys.executable, str(script), "config/train_shakespeare_char.py", *NANOGPT_CPU.split()]
            command += [f"--{name}={value}" for name, value in options.items()]
            begin = time.perf_counter()
            environment = {**os.environ, "PYTHONPATH": nanogpt}
            done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=nanogpt, env=environment)
            return time.perf_counter() - begin, done.stdout

        seconds, output = run(CALIBRATION)
        iteration = statistics.median(float(ms) for ms in re.findall(r"time ([\d.]+)ms", output)) / 1000
        rest = 60 * minutes - (seconds - CALIBRATION * iteration)
        seconds, _ = run(max(CALIBRATION, int(rest / iteration)))
        script = str(Path(__file__).with_name("train.py"))
        loss = common.worker(script, "nanogpt-loss", nanogpt, f"{folder}/out/ckpt.pt", str(data), "overlapping")["loss"]
        held_out = text[int(SHARE * len(text)) :]
    return loss * (len(held_out) - 1) / math.log(2) / len(held_out[1:].encode()), seconds


def compressed(file: Path) -> str:
    """What xz, and PPMd where pyppmd is installed, reach on the held-out text."""
    text = file.read_text(encoding="utf-8")
    train, held_out = (part.encode() for part in (text[: int(SHARE * len(text))], text[int(SHARE * len(text)) :]))
    return "".join(f"   {name} {bits:.3f}" for name, bits in bits_per_byte(compressors(), train, held_out).values())


def shown(values: list[float]) -> str:
    """The median, and between which values."""
    spread = f" ({min(values):.3f}-{max(values):.3f})" if len(values) > 1 else ""
    return f"{statistics.median(values):.3f}{spread}"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--nanogpt", default="", help="a checkout of nanoGPT")
    arguments = parser.parse_args()
    for file in arguments.files:
        ours, seconds = [], []
        for seed in range(arguments.seeds):
            bits, took, chosen = train_ours(file, arguments.minutes, 1337 + seed)
            ours.append(bits)
            seconds.append(took)
            print("\n".join(chosen), flush=True)
        line = f"{file.name:<24} ours {shown(ours)} in {statistics.median(seconds):.0f} s"
        if arguments.nanogpt:
            bits, took = train_nanogpt(arguments.nanogpt, file, arguments.minutes, 0)
            line += f"   nanoGPT {bits:.3f} in {took:.0f} s"
        print(line + compressed(file), flush=True)


if __name__ == "__main__":
    main()
