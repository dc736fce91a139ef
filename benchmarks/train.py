"""Training speed and memory beside rivals, in one run on one machine, as ratios.

    python benchmarks/train.py step [--nanogpt DIR]                    GPT-2 124M, B=4, T=256, one optimizer step
    python benchmarks/train.py memory                                  peak memory of the loss, V=50304, B=8, T=1024
    python benchmarks/train.py shakespeare --nanogpt DIR --data FILE   whole trainings: time and loss over --seeds

``--nanogpt`` is a checkout of github.com/karpathy/nanoGPT; LLMs-from-scratch takes part when ``pip install --no-deps
llms-from-scratch`` is there. Contenders run in processes of their own, in turn, ``--rounds`` times, or once with each
seed; medians are shown.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from pathlib import Path

import common

worker = partial(common.worker, __file__)
ROWS, LENGTH, VOCABULARY = 4, 256, 50257
SHAPE = {"model.context_length": LENGTH, "train.batch_tokens": ROWS * LENGTH}


def measure_step(contender: str, nanogpt: str, steps: int) -> dict[str, float]:
    """Median seconds of a step of one contender, after two to warm up."""
    import torch

    tokens, targets = torch.randint(0, VOCABULARY, (2, ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    if contender == "nanoGPT":
        step = nanogpt_step(nanogpt)
    else:
        step = book_step() if contender == "LLMs-from-scratch" else our_step(contender.split()[1])
    times = []
    for _ in range(steps + 2):
        begin = time.perf_counter()
        step(tokens, targets)
        times.append(time.perf_counter() - begin)
    return {"seconds": statistics.median(times[2:]), "peak_gb": common.peak_memory() / 1e9}


def our_step(precision: str) -> Callable:
    """GPT-2's shape with AdamW; train_step brings its own batch of the same size."""
    from pretrain.config import load_config
    from pretrain.training.step import train_step
    from pretrain.training.world import join_world

    fields = {"train.precision": precision, "train.device": "cpu", "train.compile": "off"}
    config = load_config("gpt2-124m", **SHAPE, **fields)
    with join_world("cpu", config.parallel) as world:
        state = common.training_state(config, VOCABULARY, world)
    return lambda tokens, targets: train_step(state)


def nanogpt_step(nanogpt: str) -> Callable:
    """NanoGPT's model and optimizer as its train.py uses them on a CPU (no compile, fp32)."""
    import torch

    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(nanogpt) / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.GPT(module.GPTConfig(block_size=LENGTH, vocab_size=50304, bias=False, dropout=0.0))
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cpu")

    def step(tokens: torch.Tensor, targets: torch.Tensor) -> None:
        _, loss = model(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def book_step() -> Callable:
    """The book's model and optimizer (chapter 5) on a CPU."""
    import torch
    from llms_from_scratch.ch04 import GPTModel  # type: ignore[import-not-found]

    shape = {"vocab_size": VOCABULARY, "context_length": LENGTH, "emb_dim": 768, "n_heads": 12, "n_layers": 12}
    model = GPTModel({**shape, "drop_rate": 0.1, "qkv_bias": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)

    def step(tokens: torch.Tensor, targets: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()

    return step


def measure_peak(dtype_name: str) -> dict[str, float]:
    """Operations per second of a large product of two square matrices."""
    import torch

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype_name]
    n = 2048
    a, b = torch.randn(2, n, n, generator=torch.Generator().manual_seed(0)).to(dtype)
    times = []
    for _ in range(12):
        begin = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - begin)
    return {"flops": 2 * n**3 / min(times)}


def measure_memory(contender: str) -> dict[str, float]:
    """Peak memory that loss and its gradients add, from hidden states of 8 x 1024 tokens to 50,304 logits."""
    import torch
    import torch.nn.functional as F

    from pretrain.model.loss import chunk_rows, linear_cross_entropy

    rows, width, vocabulary = 8 * 1024, 768, 50304
    x = torch.randn(rows, width, requires_grad=True)
    weight = (0.02 * torch.randn(vocabulary, width)).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,))
    before = common.peak_memory()
    if contender == "whole logits (nanoGPT)":
        loss = F.cross_entropy(x @ weight.T, targets)
    else:
        hidden = x.bfloat16() if contender.endswith("bf16") else x
        chunk = chunk_rows("cpu", vocabulary)
        loss = linear_cross_entropy(hidden, weight, targets, 0.0, "sum", vocabulary, chunk) / rows
    loss.backward()
    return {"seconds": 0.0, "peak_gb": (common.peak_memory() - before) / 1e9}


def compare_steps(nanogpt: str, rounds: int, steps: int) -> None:
    """The table of one training step."""
    contenders = ["pretrain fp32", "pretrain bf16"]
    if importlib.util.find_spec("llms_from_scratch"):
        contenders.insert(0, "LLMs-from-scratch")
    if nanogpt:
        contenders.insert(0, "nanoGPT")
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    peaks: dict[str, list[float]] = {"fp32": [], "bf16": []}
    memory = {}
    for _ in range(rounds):
        for name in contenders:
            result = worker("step", name, nanogpt, str(steps))
            seconds[name].append(result["seconds"])
            memory[name] = result["peak_gb"]
        for name in peaks:
            peaks[name].append(worker("peak", name)["flops"])
    from pretrain.config import load_config
    from pretrain.sizing import flops_per_token

    model = load_config("gpt2-124m", **SHAPE).model
    flops = flops_per_token(model, VOCABULARY)
    print(f"GPT-2 124M, one step of {ROWS} x {LENGTH} tokens, AdamW, median of {rounds} x {steps} steps")
    print(f"matrix products here: fp32 {max(peaks['fp32']) / 1e9:.0f}, bf16 {max(peaks['bf16']) / 1e9:.0f} GFLOP/s")
    first = contenders[0]
    for name in contenders:
        median = statistics.median(seconds[name])
        ratio = statistics.median(a / b for a, b in zip(seconds[first], seconds[name], strict=True))
        share = flops * ROWS * LENGTH / median / max(peaks["bf16" if name.endswith("bf16") else "fp32"])
        print(
            f"{name:<18} {ROWS * LENGTH / median:7.0f} tokens/s   {ratio:5.2f} x {first}"
            f"   {share:4.0%} of its peak   {memory[name]:4.1f} GB"
        )


def compare_memory() -> None:
    """The table of the loss's memory."""
    results = {name: worker("memory", name)["peak_gb"] for name in ("whole logits (nanoGPT)", "ours fp32", "ours bf16")}
    first = next(iter(results.values()))
    for name, peak in results.items():
        print(f"{name:<24} {peak:5.2f} GB   {peak / first:4.0%}")


NANOGPT_CPU = (
    "--device=cpu --compile=False --eval_iters=20 --log_interval=500 --block_size=64 --batch_size=12 --n_layer=4"
    " --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0 --eval_interval=2000"
    " --always_save_checkpoint=True"
)
"""Its README's options for a CPU, without evaluations in between."""


def compare_shakespeare(nanogpt: str, data: str, seeds: int) -> None:
    """Whole processes, from characters to a trained model, whose loss is measured on all held-out text.

    nanoGPT's recipe for a CPU, ours of the same training (shakespeare-char-cpu), and ours that is faster.
    """
    contenders = {"shakespeare": partial(train_ours, "shakespeare", data)}
    if nanogpt:
        prepare_nanogpt(shakespeare_folder(nanogpt), Path(data).read_text(encoding="utf-8"), 0.9)
        contenders["shakespeare-char-cpu"] = partial(train_ours, "shakespeare-char-cpu", data)
        contenders["nanoGPT"] = partial(train_nanogpt, nanogpt)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    losses: dict[str, list[float]] = {name: [] for name in contenders}
    for seed in range(seeds):
        for name, run in contenders.items():
            with tempfile.TemporaryDirectory() as folder:
                begin = time.perf_counter()
                loss_of = run(folder, seed)
                seconds[name].append(time.perf_counter() - begin)
                losses[name].append(loss_of())
                print(
                    f"seed {seed} {name:<20} {seconds[name][-1]:6.1f} s   val loss {losses[name][-1]:.4f}", flush=True
                )
    print(f"{f'{seeds} seeds':<20} median s   mean loss   lowest and highest, standard deviation")
    for name, values in losses.items():
        spread = f"{min(values):.4f} to {max(values):.4f}"
        deviation = f", {statistics.stdev(values):.4f}" if seeds > 1 else ""
        print(
            f"{name:<20} {statistics.median(seconds[name]):8.1f} {statistics.mean(values):11.4f}   {spread}{deviation}"
        )


def train_ours(recipe: str, data: str, folder: str, seed: int) -> Callable[[], float]:
    """Train a recipe of ours; gives what reads its loss."""
    command = [sys.executable, "-m", "pretrain", "train", recipe, "--data", data, "--out", f"{folder}/run"]
    subprocess.run([*command, "--train.seed", str(seed)], check=True, capture_output=True)
    return lambda: json.loads(Path(folder, "run", "summary.json").read_text())["val_loss"]


def train_nanogpt(nanogpt: str, folder: str, seed: int) -> Callable[[], float]:
    """Train nanoGPT by a copy of its train.py with another seed; gives what measures its loss."""
    script, place = Path(folder, "train.py"), "torch.manual_seed(1337 "
    text = Path(nanogpt, "train.py").read_text(encoding="utf-8")
    assert place in text
    script.write_text(text.replace(place, f"torch.manual_seed({1337 + seed} "), encoding="utf-8")
    command = [sys.executable, str(script), "config/train_shakespeare_char.py", *NANOGPT_CPU.split()]
    environment = {**os.environ, "PYTHONPATH": nanogpt}
    subprocess.run(
        [*command, f"--out_dir={folder}/nanogpt"], check=True, capture_output=True, cwd=nanogpt, env=environment
    )
    data = str(shakespeare_folder(nanogpt))
    return lambda: worker("nanogpt-loss", nanogpt, f"{folder}/nanogpt/ckpt.pt", data)["loss"]


def shakespeare_folder(nanogpt: str) -> Path:
    """Where nanoGPT has the characters of tinyshakespeare."""
    return Path(nanogpt) / "data" / "shakespeare_char"


def prepare_nanogpt(folder: Path, text: str, share: float) -> None:
    """Write nanoGPT's train.bin, val.bin and meta.pkl from the text, as its prepare.py does after downloading it.

    ``share`` of the characters are for training, rounded down.
    """
    import pickle

    import numpy as np

    characters = sorted(set(text))
    ids = np.array([characters.index(c) for c in characters], dtype=np.uint16)
    table = dict(zip(characters, ids, strict=True))
    encoded = np.array([table[c] for c in text], dtype=np.uint16)
    cut = int(Decimal(str(share)) * len(text))
    encoded[:cut].tofile(folder / "train.bin")
    encoded[cut:].tofile(folder / "val.bin")
    with (folder / "meta.pkl").open("wb") as out:
        meta = {"vocab_size": len(characters), "itos": dict(enumerate(characters))}
        pickle.dump({**meta, "stoi": {c: i for i, c in enumerate(characters)}}, out)


def nanogpt_loss(nanogpt: str, checkpoint: str, data: str, windows: str = "apart") -> dict[str, float]:
    """Loss of a nanoGPT checkpoint on all of the validation text in the folder ``data``, each character once.

    In windows one after the other, or ``overlapping`` by half as with ``eval.stride``.
    """
    import numpy as np
    import torch

    sys.path.insert(0, nanogpt)
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    saved = torch.load(checkpoint, map_location="cpu", weights_only=False)
    model = GPT(GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    model.eval()
    length = saved["model_args"]["block_size"]
    tokens = torch.from_numpy(np.fromfile(Path(data, "val.bin"), dtype=np.uint16).astype(np.int64))
    stride = length // 2 if windows == "overlapping" else length
    total, counted = 0.0, 0
    while counted < len(tokens) - 1:
        start = max(0, counted - (length - stride))
        window, seen = tokens[start : start + length + 1][None], counted - start
        with torch.no_grad():
            logits, _ = model(window[:, :-1], window[:, 1:])
        losses = torch.nn.functional.cross_entropy(logits[0, seen:], window[0, 1 + seen :], reduction="sum")
        total, counted = total + losses.item(), start + window.shape[1] - 1
    return {"loss": total / counted}


def main() -> None:
    """Read the command line."""
    if sys.argv[1:2] == ["worker"]:
        kind, *args = sys.argv[2:]
        run: dict[str, Callable[..., dict[str, float]]] = {
            "step": lambda name, nanogpt, steps: measure_step(name, nanogpt, int(steps)),
            "peak": measure_peak,
            "memory": measure_memory,
            "nanogpt-loss": nanogpt_loss,
        }
        print(json.dumps(run[kind](*args)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=["step", "memory", "shakespeare"])
    parser.add_argument("--nanogpt", default="", help="a checkout of nanoGPT")
    parser.add_argument("--data", default="", help="tinyshakespeare as a text file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=4, help="of shakespeare: trainings of each contender")
    parser.add_argument("--steps", type=int, default=5, help="timed steps in each round")
    args = parser.parse_args()
    nanogpt = os.path.abspath(args.nanogpt) if args.nanogpt else ""
    if args.work == "step":
        compare_steps(nanogpt, args.rounds, args.steps)
    elif args.work == "memory":
        compare_memory()
    else:
        compare_shakespeare(nanogpt, os.path.abspath(args.data), args.seeds)


if __name__ == "__main__":
    main()
