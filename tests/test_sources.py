"""Three published trainings beside references written here from their documents, in plain torch and numpy.

    storybot    the pretraining page of "storybot": batches from a memory map, evaluation, loop, two checkpoints
    step3       the notebook "Step 3: Pretrain": characters, windows at every position, rates, loop
    gpt-6x384   the training page of the Korean GPT guide: batches, loss estimates, loop, resuming

The documents print no model, so one is written here too, from PyTorch's own layers. Of ``pretrain`` a reference is
given only what cannot be equal otherwise: the initial weights, and where the windows of random batches start. Where a
recipe differs from its document on purpose, the test says so and shows the difference.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from pretrain.cli import main
from pretrain.config import Config, load_config
from pretrain.io import read_jsonl
from pretrain.model.transformer import meta_model
from pretrain.optim import learning_rate_factor
from pretrain.runs import Run
from pretrain.sizing import resolve
from pretrain.tokens import DataOrder, TrainingBatches, training_order
from pretrain.tokens.order import HELD_OUT, key

T, LAYERS, HEADS, WIDTH, HIDDEN, STEPS = 32, 2, 2, 32, 128, 12
SMALL = {
    "model.layers": LAYERS,
    "model.heads": HEADS,
    "model.width": WIDTH,
    "model.mlp_width": HIDDEN,
    "model.context_length": T,
    "model.dropout": 0.0,  # its random numbers cannot be equal
    "train.steps": STEPS,
    "train.precision": "fp32",
    "train.device": "cpu",
    "eval.every": 0,
    "checkpoint.every": 0,
    "sample.max_tokens": 0,
    "log.backends": "none",
}
"""A recipe in small: what its document says of rates, batches and steps stays."""


# What the product does --------------------------------------------------------------------------------------------


def train(out: Path, recipe: str, data: Path, **changes) -> Run:
    """``pretrain train RECIPE`` at the size of SMALL; ``data`` is a text, or a folder with train.bin and val.bin."""
    options = {**SMALL, **({"tokenizer.kind": "byte"} if data.is_dir() else {}), **changes}
    words = [str(word) for name, value in options.items() for word in (f"--{name}", *np.atleast_1d(value))]
    assert main(["train", recipe, "--data", str(data), "--out", str(out), *words]) == 0
    return Run.open(out)


def metrics(run: Run, name: str) -> dict[int, float]:
    """A metric by the number of updates done."""
    return {record["step"]: record[name] for record in read_jsonl(run.metrics) if name in record}


def trained_weights(run: Run, step: int) -> dict[str, Tensor]:
    (file,) = run.checkpoint(step).folder.glob("*.safetensors")
    tensors = load_file(file).items()
    return {name.removeprefix("model."): tensor for name, tensor in tensors if name.startswith("model.")}


def initial_weights(run: Run) -> dict[str, Tensor]:
    config = run.config
    model = meta_model(config.model, run.tokenizer().vocab_size).to_empty(device="cpu")
    model.init_weights(torch.Generator().manual_seed(config.train.seed))
    return model.state_dict()


def drawn_starts(config: Config, tokens: int) -> DataOrder:
    """Where the windows of our batches start."""
    return DataOrder(tokens, config.model.context_length, config.data.order, config.data.stride, config.train.seed)


def held_out_order(run: Run, tokens: int) -> DataOrder:
    """Where those of a random validation start, for each step."""
    seed = int(key(run.config.train.seed, 0, HELD_OUT)[0])
    return DataOrder(tokens, run.config.model.context_length, "random", 0, seed)


@pytest.fixture
def bins(text_file: Path, tmp_path: Path) -> Path:
    """A folder with the token files that storybot and the guide read: train.bin and val.bin, uint16."""
    tokens = np.frombuffer(text_file.read_bytes(), np.uint8).astype(np.uint16)
    folder = tmp_path / "bins"
    folder.mkdir()
    tokens[:9000].tofile(folder / "train.bin")
    tokens[9000 : 9000 + 31 * T + 1].tofile(folder / "val.bin")
    return folder


# The references ---------------------------------------------------------------------------------------------------


class PlainBlock(nn.Module):
    def __init__(self, llama: bool):
        super().__init__()
        self.llama, bias = llama, not llama
        norm = nn.RMSNorm if llama else nn.LayerNorm
        self.attention_norm, self.mlp_norm = norm(WIDTH, eps=1e-5), norm(WIDTH, eps=1e-5)
        self.attention = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH, bias=bias) for name in ("q", "k", "v", "out")})
        self.mlp = nn.ModuleDict({"up": nn.Linear(WIDTH, HIDDEN, bias), "down": nn.Linear(HIDDEN, WIDTH, bias)})
        if llama:
            self.mlp["gate"] = nn.Linear(WIDTH, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, length, _ = x.shape
        h = self.attention_norm(x)
        q, k, v = (self.attention[n](h).view(B, length, HEADS, -1).transpose(1, 2) for n in ("q", "k", "v"))
        if self.llama:
            q, k = turned(q), turned(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, length, WIDTH)
        x = x + self.attention["out"](y)
        h = self.mlp_norm(x)
        inner = F.silu(self.mlp["gate"](h)) * self.mlp["up"](h) if self.llama else F.gelu(self.mlp["up"](h))
        return x + self.mlp["down"](inner)


def turned(x: Tensor) -> Tensor:
    """Rotary positions with theta 10,000, as multiplication of complex numbers."""
    first, second = x.float().chunk(2, dim=-1)
    half = first.shape[-1]
    angles = torch.outer(torch.arange(x.shape[-2]), 10000.0 ** (-torch.arange(half) / half))
    rotated = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((rotated.real, rotated.imag), dim=-1).to(x.dtype)


class PlainGPT(nn.Module):
    """Logits after each token, from PyTorch's layers: ``llama`` with RMSNorm, RoPE and SwiGLU, else GPT-2's block."""

    def __init__(self, weights: dict[str, Tensor], llama: bool = False):
        super().__init__()
        vocab_size = len(weights["head.weight"])
        self.embedding = nn.Embedding(vocab_size, WIDTH)
        if not llama:
            self.position_embedding = nn.Embedding(T, WIDTH)
        self.blocks = nn.ModuleList(PlainBlock(llama) for _ in range(LAYERS))
        self.norm = (nn.RMSNorm if llama else nn.LayerNorm)(WIDTH, eps=1e-5)
        self.head = nn.Linear(WIDTH, vocab_size, bias=False)
        self.load_state_dict({name: tensor.clone() for name, tensor in weights.items()})

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if hasattr(self, "position_embedding"):
            x = x + self.position_embedding(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    logits = model(x)
    return F.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1), reduction=reduction)


def batch_at(data: np.ndarray, starts: Tensor) -> tuple[Tensor, Tensor]:
    """The windows at ``starts`` and the same one token later, as all three documents cut them."""
    x, y = ([torch.from_numpy(data[i + d : i + d + T].astype(np.int64)) for i in starts.tolist()] for d in (0, 1))
    return torch.stack(x), torch.stack(y)


def sequential_starts(data: np.ndarray, batch_size: int, offset: int) -> Tensor | None:
    """storybot's ``get_batch(random=False)``: None when no whole window is left."""
    ix = torch.arange(offset, offset + batch_size * T, T)
    ix = ix[ix + T < len(data)]
    return ix if len(ix) else None


@torch.no_grad()
def evaluate(model: nn.Module, data: np.ndarray, batch_size: int) -> tuple[float, int]:
    """storybot's ``evaluate``: the summed loss of all whole windows, and their tokens."""
    total_loss, total_tokens, batch = 0.0, 0, 0
    while (ix := sequential_starts(data, batch_size, batch * batch_size * T)) is not None:
        x, y = batch_at(data, ix)
        total_loss += cross_entropy(model, x, y, "sum").item()
        total_tokens, batch = total_tokens + x.numel(), batch + 1
    return total_loss, total_tokens


@torch.no_grad()
def estimate_loss(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]]) -> float:
    """The guide's: the mean of the batches' mean losses."""
    return torch.tensor([cross_entropy(model, x, y).item() for x, y in batches]).mean().item()


def update(model: nn.Module, optimizer: torch.optim.Optimizer, lr: float, x: Tensor, y: Tensor) -> tuple[float, float]:
    """One pass of a loop: the rate, forward, backward, clipping at 1.0, the optimizer. Returns loss and norm."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    loss = cross_entropy(model, x, y)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item(), norm.item()


def assert_same_training(run: Run, losses: list[float], norms: list[float], rates: list[float], model: nn.Module):
    """Rates to the last digits; losses, norms and weights but for the rounding of fp32 (measured: 2e-7 of a loss or a
    norm, 1.3e-6 of a weight). Decaying norms and biases or not is 1e-4 of a weight."""
    assert list(metrics(run, "train/lr").values()) == pytest.approx(rates, rel=1e-14)
    assert list(metrics(run, "train/loss").values()) == pytest.approx(losses, rel=2e-6)
    assert list(metrics(run, "train/grad_norm").values()) == pytest.approx(norms, rel=5e-6)
    assert max(norms) > 1, "nothing was clipped"
    ours = trained_weights(run, len(losses))
    for name, tensor in model.state_dict().items():
        assert torch.allclose(ours[name], tensor, rtol=0, atol=1e-5), name


# storybot ---------------------------------------------------------------------------------------------------------


def storybot_rate(i: int, learning_rate: float, warmup_iters: int, max_iters: int) -> float:
    """``get_lr`` is called but not printed: with these arguments, warmup and decay, it is commonly this."""
    if i < warmup_iters:
        return learning_rate * (i + 1) / warmup_iters
    return learning_rate * 0.5 * (1 + math.cos(math.pi * (i - warmup_iters) / (max_iters - warmup_iters)))


def test_storybots_rates_at_all_steps():
    config = load_config("storybot")
    rates = [config.optim.lr * learning_rate_factor(config.schedule, i, config.train.steps) for i in range(40_000)]
    assert rates == pytest.approx([storybot_rate(i, 0.001, 200, 40_000) for i in range(40_000)], rel=1e-12, abs=1e-18)
    assert config.train.batch_tokens == 32 * 256


@pytest.mark.parametrize("recipe", ["storybot", "gpt-6x384"])
def test_random_batches(recipe: str, bins: Path, tmp_path: Path):
    """Each row is the window at one start and the same one later, as ``get_batch`` cuts them from the memory map."""
    run = train(tmp_path / "run", recipe, bins, **{"train.batch_tokens": 4 * T, "train.steps": 2})
    data = np.memmap(bins / "train.bin", dtype=np.uint16, mode="r")
    corpus = run.corpus()
    batches = TrainingBatches(corpus.stream("train"), training_order(corpus, run.config), 4)
    for step in range(50):
        starts = drawn_starts(run.config, len(data)).starts(4 * step, 4)
        for ours, theirs in zip(batches.batch(step), batch_at(data, torch.from_numpy(starts)), strict=True):
            assert torch.equal(ours, theirs)


def test_random_starts_are_drawn_as_torch_randint_does():
    """Evenly, each by itself, and none past the end. ``torch.randint(len(data) - T - 1)`` never draws the last start,
    whose targets end with the last token; ours does."""
    tokens, draws = 200, 100_000
    config = load_config("storybot", **{"model.context_length": T, "train.batch_tokens": T})
    ours = drawn_starts(config, tokens).starts(0, draws)
    theirs = torch.randint(tokens - T - 1, (draws,), generator=torch.Generator().manual_seed(1)).numpy()
    assert sorted(set(theirs.tolist())) == list(range(tokens - T - 1))
    assert sorted(set(ours.tolist())) == list(range(tokens - T))  # len - T - 1 at most: one target past the window
    for starts, cells in ((theirs, tokens - T - 1), (ours, tokens - T)):
        expected = draws / cells
        chi_square = float(((np.bincount(starts) - expected) ** 2 / expected).sum())
        assert abs(chi_square - (cells - 1)) < 5 * math.sqrt(2 * cells)
        assert abs(np.corrcoef(starts[:-1], starts[1:])[0, 1]) < 5 / math.sqrt(draws)


@pytest.mark.parametrize("tokens", [7 * T + 1, 7 * T, 7 * T + 2, 8 * T])
def test_storybots_evaluation(tokens: int, bins: Path, tmp_path: Path):
    """``evaluate`` over sequential batches takes whole windows; ours also takes the tokens that are left over."""
    np.fromfile(bins / "val.bin", dtype=np.uint16)[:tokens].tofile(bins / "val.bin")
    data = np.memmap(bins / "val.bin", dtype=np.uint16, mode="r")
    run = train(tmp_path / "run", "storybot", bins, **{"train.batch_tokens": 4 * T, "train.steps": 3})
    model = PlainGPT(trained_weights(run, 3), llama=True)
    total, counted = evaluate(model, data, batch_size=3)
    assert counted == (tokens - 1) // T * T
    if rest := tokens - 1 - counted:
        last = torch.from_numpy(data[counted:].astype(np.int64))[None]
        total += cross_entropy(model, last[:, :-1], last[:, 1:], "sum").item()
    assert metrics(run, "val/loss") == {3: pytest.approx(total / (counted + rest), rel=1e-6)}


def test_storybots_loop(bins: Path, tmp_path: Path, capsys):
    """Twelve updates with every number of its own, and the weights after i = 5 and i = 10."""
    config = load_config("storybot")
    assert (config.eval.every, config.eval.offset, config.checkpoint.at) == (500, 1, (501, 5001))
    options = {"train.batch_tokens": 4 * T, "schedule.warmup_steps": 4, "checkpoint.at": [6, 11], "eval.every": 5}
    run = train(tmp_path / "run", "storybot", bins, **options)
    data = np.memmap(bins / "train.bin", dtype=np.uint16, mode="r")
    model, saved = PlainGPT(initial_weights(run), llama=True), {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.001)
    losses, norms, rates, evaluations = [], [], [], {}
    for i in range(STEPS):
        rates.append(storybot_rate(i, 0.001, 4, STEPS))
        starts = drawn_starts(run.config, len(data)).starts(4 * i, 4)
        loss, norm = update(model, optimizer, rates[-1], *batch_at(data, torch.from_numpy(starts)))
        losses.append(loss)
        norms.append(norm)
        if i % 5 == 0:
            total, counted = evaluate(model, np.memmap(bins / "val.bin", dtype=np.uint16, mode="r"), batch_size=4)
            evaluations[i + 1] = total / counted
        if i in (5, 10):
            saved[i] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert_same_training(run, losses, norms, rates, model)
    measured = metrics(run, "val/loss")
    assert list(measured) == [1, 6, 11, STEPS], "after i = 0, 5, 10, and the last"
    assert {step: measured[step] for step in evaluations} == pytest.approx(evaluations, rel=2e-6)
    for i, weights in saved.items():
        ours = trained_weights(run, i + 1)
        assert all(torch.allclose(ours[name], weights[name], rtol=0, atol=1e-5) for name in weights)
    capsys.readouterr()
    assert main(["eval", str(run.folder), "--step", "6", "--json", "--device", "cpu"]) == 0  # later, as the page says
    assert json.loads(capsys.readouterr().out)["val_loss"] == pytest.approx(evaluations[6], rel=2e-6)


def test_storybots_autocast(bins: Path, tmp_path: Path):
    """In bf16 our matrix products round as under autocast, but not each sum around them: losses to 1 in 1,000."""
    run = train(tmp_path / "run", "storybot", bins, **{"train.batch_tokens": 4 * T, "train.precision": "bf16"})
    data = np.memmap(bins / "train.bin", dtype=np.uint16, mode="r")
    model, losses = PlainGPT(initial_weights(run), llama=True), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.001)
    for i in range(STEPS):
        starts = drawn_starts(run.config, len(data)).starts(4 * i, 4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses.append(
                update(
                    model, optimizer, storybot_rate(i, 0.001, 200, STEPS), *batch_at(data, torch.from_numpy(starts))
                )[0]
            )
    assert list(metrics(run, "train/loss").values()) == pytest.approx(losses, rel=1e-3)


# step3 ------------------------------------------------------------------------------------------------------------


def step3_rate(step: int, warmup_steps: int, total_steps: int, max_lr: float, min_lr: float) -> float:
    """The notebook's demonstration."""
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return min_lr + 0.5 * (max_lr - min_lr) * (1 + math.cos(math.pi * progress))


def step3_item(data: Tensor, idx: int) -> tuple[Tensor, Tensor]:
    """``__getitem__``, for the block size T."""
    return data[idx : idx + T], data[idx + 1 : idx + T + 1]


def test_step3s_rates_at_all_steps():
    config = load_config("step3")
    rates = [config.optim.lr * learning_rate_factor(config.schedule, i, config.train.steps) for i in range(1000)]
    assert rates == pytest.approx([step3_rate(i, 100, 1000, 1e-3, 1e-4) for i in range(1000)], rel=1e-14)
    assert config.batch_rows == 8


def test_step3s_characters_windows_and_loop(text_file: Path, tmp_path: Path):
    """The vocabulary, each window of the text once in an epoch, and twelve updates on them."""
    run = train(tmp_path / "run", "step3", text_file, **{"train.batch_tokens": 8 * T, "schedule.warmup_steps": 4})
    text = text_file.read_text(encoding="utf-8")
    char_to_idx = {char: index for index, char in enumerate(sorted(set(text)))}
    data = torch.tensor([char_to_idx[char] for char in text[: int(0.9 * len(text))]])
    corpus = run.corpus()
    assert run.tokenizer().vocab_size == len(char_to_idx)
    assert corpus.stream("train").windows(np.array([0]), len(data))[0].tolist() == data.tolist()
    assert corpus.tokens("train") == len(data)

    order = drawn_starts(run.config, len(data))
    epoch = order.starts(0, len(data) - T).tolist()
    assert sorted(epoch) == list(range(len(data) - T)), "a sample at every position, each once"
    assert epoch != sorted(epoch)

    model = PlainGPT(initial_weights(run))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses, norms, rates = [], [], []
    for step in range(STEPS):
        rates.append(step3_rate(step, 4, STEPS, 1e-3, 1e-4))
        samples = [step3_item(data, idx) for idx in epoch[8 * step : 8 * step + 8]]
        x, y = (torch.stack(part) for part in zip(*samples, strict=True))
        loss, norm = update(model, optimizer, rates[-1], x, y)
        losses.append(loss)
        norms.append(norm)
    assert_same_training(run, losses, norms, rates, model)


# The Korean guide -------------------------------------------------------------------------------------------------


def test_the_guides_rate_is_constant():
    config = load_config("gpt-6x384")
    assert {learning_rate_factor(config.schedule, step, 20_000) * config.optim.lr for step in range(20_000)} == {3e-4}
    assert config.batch_rows == 16


def test_the_guides_loop_and_resume(bins: Path, tmp_path: Path):
    """Twelve updates, saved and loaded after the seventh as in the guide, and ours in one go and in two."""
    whole = train(tmp_path / "whole", "gpt-6x384", bins, **{"train.batch_tokens": 4 * T})
    parts = train(tmp_path / "parts", "gpt-6x384", bins, **{"train.batch_tokens": 4 * T, "train.steps": 7})
    parts = train(tmp_path / "parts", "gpt-6x384", bins, **{"train.batch_tokens": 4 * T})
    assert metrics(parts, "train/loss") == metrics(whole, "train/loss")
    resumed = trained_weights(parts, STEPS)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in trained_weights(whole, STEPS).items())

    data, file = np.memmap(bins / "train.bin", dtype=np.uint16, mode="r"), tmp_path / "ckpt.pt"
    losses, norms, start_step = [], [], 0
    for end in (7, STEPS):
        model = PlainGPT(initial_weights(whole))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
        if file.exists():
            ckpt = torch.load(file, map_location="cpu")
            model.load_state_dict(ckpt["model"])
            optimizer.load_state_dict(ckpt["optim"])
            start_step = ckpt["step"]
        for step in range(start_step, end):
            starts = drawn_starts(whole.config, len(data)).starts(4 * step, 4)
            loss, norm = update(model, optimizer, 3e-4, *batch_at(data, torch.from_numpy(starts)))
            losses.append(loss)
            norms.append(norm)
        torch.save({"model": model.state_dict(), "optim": optimizer.state_dict(), "step": end}, file)
    assert_same_training(whole, losses, norms, [3e-4] * STEPS, model)


def test_the_guides_loss_estimates_in_training(bins: Path, tmp_path: Path):
    """``estimate_loss`` of both splits every ``eval_interval`` steps, each time on other windows."""
    tokens = {"eval.tokens": 20 * 4 * T, "eval.train_tokens": 20 * 4 * T}
    options = {"eval.every": 2, "checkpoint.every": 2, "checkpoint.keep_last": 0, "train.steps": 5, **tokens}
    run = train(tmp_path / "run", "gpt-6x384", bins, **{"train.batch_tokens": 4 * T}, **options)
    held_out = {**metrics(run, "val/loss"), **metrics(run, "val/part_loss")}  # the last one takes all, and a part too
    assert list(held_out) == list(metrics(run, "train/eval_loss")) == [2, 4, 5]
    drawn = []
    for step in held_out:
        model = PlainGPT(trained_weights(run, step))
        for split, ours in (("train", metrics(run, "train/eval_loss")), ("val", held_out)):
            data = np.memmap(bins / f"{split}.bin", dtype=np.uint16, mode="r")
            order = training_order(run.corpus(), run.config) if split == "train" else held_out_order(run, len(data))
            starts = order.estimate(step).starts(0, 20 * 4)
            drawn.append(starts.tolist())
            estimate = estimate_loss(model, (batch_at(data, some) for some in torch.from_numpy(starts).split(4)))
            assert ours[step] == pytest.approx(estimate, rel=1e-6)
    assert len(set(map(tuple, drawn))) == 6
    settings = load_config("gpt-6x384").eval
    assert (settings.every, settings.tokens, settings.train_tokens) == (500, 100 * 16 * 256, 100 * 16 * 256)


def test_the_guides_loss_estimates(bins: Path, tmp_path: Path, capsys):
    """The same of a finished run, by ``pretrain eval --batches``."""
    run = train(tmp_path / "run", "gpt-6x384", bins, **{"train.batch_tokens": 4 * T, "train.steps": 3})
    capsys.readouterr()
    assert main(["eval", str(run.folder), "--batches", "20", "--json", "--device", "cpu"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    model = PlainGPT(trained_weights(run, 3))
    for split in ("train", "val"):
        data = np.memmap(bins / f"{split}.bin", dtype=np.uint16, mode="r")
        starts = torch.from_numpy(drawn_starts(run.config, len(data)).starts(0, 20 * 4))
        estimate = estimate_loss(model, (batch_at(data, some) for some in starts.split(4)))
        assert numbers[f"{split}_loss_estimate"] == pytest.approx(estimate, rel=1e-6)


# nanochat and appendix D: the schedules their documents print -----------------------------------------------------


def test_nanochats_multiplier_at_all_steps():
    """No warmup, constant, linear to 0 over the last 20 %: 21,400 steps for depth 20."""
    schedule, steps = load_config("nanochat-d20").schedule, 21_400
    decay = round(0.2 * steps)
    wanted = [1.0 if it <= steps - decay else (steps - it) / decay for it in range(steps)]
    assert [learning_rate_factor(schedule, it, steps) for it in range(steps)] == pytest.approx(wanted, rel=1e-14)


@pytest.mark.parametrize(("initial_lr", "peak_lr", "min_lr"), [(1e-5, 1e-3, 1e-5), (1e-4, 1e-2, 1e-5)])
def test_the_books_rates_at_all_steps(initial_lr: float, peak_lr: float, min_lr: float):
    """Those of the training, and of the examples before it, whose lowest rate is a tenth of the initial one."""
    options = {"optim.lr": peak_lr, "schedule.warmup_from": initial_lr / peak_lr, "schedule.final": min_lr / peak_lr}
    config, _ = resolve(load_config("verdict", **options), vocab_size=50257, windows=18)  # from its epochs
    total, warmup = 9 * 15, 27
    assert (config.train.steps, config.schedule.warmup_steps) == (total, warmup)
    increment, wanted = (peak_lr - initial_lr) / warmup, []
    for step in range(total):
        cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
        wanted.append(initial_lr + step * increment if step < warmup else min_lr + (peak_lr - min_lr) * cosine)
    rates = [config.optim.lr * learning_rate_factor(config.schedule, step, total) for step in range(total)]
    assert rates == pytest.approx(wanted, rel=1e-13)
