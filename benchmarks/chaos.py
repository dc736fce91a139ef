"""Kill a real training run with -9 at random moments, again and again, and compare it with one that was left alone.

    python benchmarks/chaos.py --kills 50 [--seed 0] [--stream] [--keep FOLDER]

Every start is a fresh process of the same command; it dies after a random time, in whatever it is doing then. At the
end the run must be, bit for bit, the one that nothing happened to: weights, moments, random states, metrics (all but
the clock), samples. Prints how often it died where, and the differences, of which there must be none.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from safetensors.torch import load_file

from pretrain.io import read_jsonl
from pretrain.runs import Run

OVERRIDES = {
    "train.steps": 500,
    "model.layers": 2,
    "model.dropout": 0.1,
    "train.micro_batch": 8,
    "checkpoint.every": 10,
    "eval.every": 25,
    "eval.tokens": 8192,
    "sample.max_tokens": 32,
    "tokenizer.vocab_size": 1024,
    "train.compile": "off",
}
CLOCK = ("time", "train/tokens_per_second")


def command(out: Path, extra: list[str]) -> list[str]:
    options = [text for name, value in OVERRIDES.items() for text in (f"--{name}", str(value))]
    return [sys.executable, "-m", "pretrain", "train", "--out", str(out), *options, *extra]


def phase(out: Path) -> str:
    """What a run is doing, seen from outside."""
    if any(out.glob("checkpoints/*.tmp")):
        return "writing a checkpoint"
    committed = [path for path in out.glob("checkpoints/step-*") if not (path / "COMMIT").exists()]
    if committed:
        return "committing a checkpoint"
    if not (out / "config.toml").exists():
        return "preparing the text"
    try:
        beat = json.loads((out / "heartbeat.json").read_text())
    except (OSError, ValueError):
        return "starting"
    return beat["phase"] if time.time() - beat["time"] < 1.5 else "starting"


def wait_for(target: str, out: Path, process: subprocess.Popen, seconds: float) -> None:
    """Wait ``seconds``, from the start or from when training goes on; or then, until a checkpoint is being written."""
    begun = time.time()
    if target != "anything":
        while process.poll() is None and not beats_since(out, begun):
            time.sleep(0.02)
    end = time.monotonic() + (seconds if target != "a save" else seconds / 3)
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    if target == "a save":
        while process.poll() is None and not any(out.glob("checkpoints/*.tmp")):
            pass
        time.sleep(seconds / 1000)


def beats_since(out: Path, moment: float) -> bool:
    try:
        beat = json.loads((out / "heartbeat.json").read_text())
    except (OSError, ValueError):
        return False
    return beat["time"] > moment and beat["beats"] > 0


def differences(one: Run, other: Run) -> list[str]:
    """Everything in which two finished runs differ, but for the clock."""
    found = []
    a, b = (load_file(next(run.newest_checkpoint().folder.glob("*.safetensors")), device="cpu") for run in (one, other))
    found += [f"tensor {name}" for name in a.keys() ^ b.keys()]
    found += [
        f"tensor {name}"
        for name in a.keys() & b.keys()
        if a[name].contiguous().view(-1).numpy().tobytes() != b[name].contiguous().view(-1).numpy().tobytes()
    ]
    for file in ("metrics", "samples"):
        x, y = (
            [{k: v for k, v in record.items() if k not in CLOCK} for record in read_jsonl(getattr(run, file))]
            for run in (one, other)
        )
        found += [f"{file}: {len(x)} and {len(y)} records"] if len(x) != len(y) else []
        found += [f"{file} of step {r['step']}" for r, s in zip(x, y, strict=False) if r != s]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stream", action="store_true", help="tokenize the text while training")
    parser.add_argument("--keep", type=Path, help="a folder for both runs, which then stay")
    arguments = parser.parse_args()
    extra = ["--data.stream", "True", "--data.split", "hash"] if arguments.stream else []
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = arguments.keep or Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        subprocess.run(command(root / "undisturbed", extra), check=True, stdout=subprocess.DEVNULL)
        usual = time.monotonic() - began
        print(f"undisturbed: {usual:.0f} s", flush=True)

        hit: Counter[str] = Counter()
        out = root / "killed"
        while hit.total() < arguments.kills:
            process = subprocess.Popen(
                command(out, extra), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            target = draw.choice(["anything", "a step", "a step", "a save", "a save"])
            wait_for(target, out, process, draw.uniform(0.0, 6.0))
            if process.poll() is None:
                where = phase(out)
                process.kill()
                process.wait()
                hit[where] += 1
                continue
            if process.returncode:
                print(f"a restart failed: {process.communicate()[1]}")
                return 1
            break
        subprocess.run(command(out, extra), check=True, stdout=subprocess.DEVNULL)
        found = differences(Run.open(root / "undisturbed"), Run.open(out))

    print(f"kills: {hit.total()}")
    for where, count in hit.most_common():
        print(f"  {count:3d}  while {where}")
    print(f"differences: {len(found)}")
    for line in found[:20]:
        print(f"  {line}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
