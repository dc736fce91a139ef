"""The run directory: the only thing that commands share. docs/design.md lists its files."""

from __future__ import annotations

import errno
import glob
import json
import math
import shutil
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
import torch
from filelock import FileLock, Timeout

from pretrain.config import Config, config_from_dict, config_to_dict
from pretrain.errors import CheckpointError, DataError, UsageError
from pretrain.io import read_jsonl, sha256_of, write_atomically
from pretrain.model import GPT, meta_model
from pretrain.runs.checkpoint import AVERAGE, COMMIT, LAST, Checkpoint, checkpoints, name_in_checkpoint, newest
from pretrain.runs.metrics import Smoothed
from pretrain.tokenizer import Tokenizer
from pretrain.tokens import ORIGIN, Corpus, Origin, is_tokens, open_corpus

LOCK = "lock"
HEARTBEAT = "heartbeat.json"
FORK = "fork.json"
"""Where a run that begins in the middle of another says of which: see ``pretrain.experiments.fork``."""
BEFORE_RUN = {"data", "data.tmp", "tokenizer.json", ORIGIN, LOCK}
"""What a run that was stopped while preparing leaves behind; it is overwritten."""
CORE_FILE = "core.jsonl"
"""Results of ``pretrain eval --core``, one per line."""
TASKS_FILE = "tasks.jsonl"
"""Results of ``pretrain eval --tasks``, one per line."""


@contextmanager
def lock_run(folder: Path, whatever: bool = False) -> Iterator[None]:
    """Let no second process train in ``folder`` while entered; the lock of a process that died holds nobody.

    Makes the folder, and takes it away again if nothing else came into it. With ``whatever`` any files may be in it.

    Raises:
        UsageError: the folder has other files, or cannot be written to.
        CheckpointError: another process has the lock.
    """
    lock = FileLock(folder / LOCK)
    made = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (whatever or Run.exists(folder)) and {path.name for path in folder.iterdir()} - BEFORE_RUN:
            raise UsageError(f"{folder} has files but is not a run; choose another folder with --out")
        lock.acquire(timeout=0)
    except Timeout:
        who = ""
        with suppress(OSError, ValueError, KeyError, TypeError):
            beat = json.loads((folder / HEARTBEAT).read_text(encoding="utf-8"))
            who = f" (process {beat['pid']} on {beat['host']}, at step {beat['step']})"
        raise CheckpointError(f"another process is training in {folder}{who}; wait, or use another --out") from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise UsageError(f"cannot write to {folder}: {error.strerror}; choose another folder with --out") from None
        # A file system without locks: two writers are then up to the user.
    try:
        yield
    finally:
        if {path.name for path in folder.iterdir()} <= {LOCK}:
            (folder / LOCK).unlink(missing_ok=True)
            with suppress(OSError):  # unless somebody else put something there meanwhile
                for path in made:
                    path.rmdir()
        lock.release()


def clear_run(folder: Path) -> None:
    """Remove all but the lock; ``fork.json`` last, which says that the rest is ours."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == FORK):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


@dataclass(frozen=True)
class Run:
    """A run directory and the configuration it was made with."""

    folder: Path
    config: Config

    @staticmethod
    def exists(folder: Path) -> bool:
        """Whether ``folder`` is a run."""
        return (folder / "config.toml").is_file()

    @staticmethod
    def open(folder: str | Path) -> Run:
        """An existing run. A CheckpointError when the folder is not one."""
        folder = Path(folder)
        file = folder / "config.toml"
        if not Run.exists(folder):
            what = "is not a run directory (it has no config.toml)" if folder.exists() else "does not exist"
            raise CheckpointError(f"{folder} {what}; 'pretrain train --out {folder}' makes one")
        try:
            tree = tomllib.loads(file.read_text(encoding="utf-8", errors="surrogateescape"))
        except tomllib.TOMLDecodeError as error:
            raise CheckpointError(f"{file} is damaged: {error}") from None
        return Run(folder, config_from_dict(tree, source=str(file)))

    @staticmethod
    def create(folder: Path, config: Config) -> Run:
        """Make the directory and write ``config.toml``."""
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "config.toml", tomli_w.dumps(config_to_dict(config)))
        return Run(folder, config)

    @property
    def data(self) -> Path:
        """The folder of token shards."""
        return self.folder / "data"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.folder / "checkpoints"

    @property
    def metrics(self) -> Path:
        """metrics.jsonl."""
        return self.folder / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """samples.jsonl."""
        return self.folder / "samples.jsonl"

    @property
    def events(self) -> Path:
        """events.jsonl: skipped steps, full disks, hangs and other events."""
        return self.folder / "events.jsonl"

    @property
    def fork(self) -> dict[str, Any] | None:
        """What ``fork.json`` says of the run in whose middle this one begins; None for one from the first step."""
        file = self.folder / FORK
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    @property
    def begin(self) -> int:
        """The step after which this run begins: 0, or that of the checkpoint from which it was forked."""
        fork = self.fork
        return fork["step"] if fork else 0

    def reopen(self) -> None:
        """Remove ``summary.json``, which marks a finished run, so that training can go on."""
        (self.folder / "summary.json").unlink(missing_ok=True)

    @property
    def summary(self) -> dict[str, Any] | None:
        """The results of the finished run; None before its end."""
        file = self.folder / "summary.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def write_summary(self, seconds: float, **facts: Any) -> None:
        """Write ``summary.json`` from metrics.jsonl and ``facts``, which go before; with it the run is finished.

        Its held-out loss is that of the model which the run leaves: the weights ``model_weights`` of ``model_step``.
        """
        records = read_jsonl(self.metrics)
        last, train_loss = records[-1], Smoothed(records).loss
        summary = {
            "val_loss": last.get("val/loss"),
            "val_bpb": last.get("val/bpb"),
            **{f"test_{name}": last[f"test/{name}"] for name in ("loss", "bpb") if f"test/{name}" in last},
            "model_step": last["step"],
            "model_weights": self.weights(last["step"]),
            **({"model_temperature": self.model_of(last["step"])[1]} if self.config.eval.calibrate else {}),
            "last_val_loss": last.get("val/loss"),
            "train_loss": train_loss if math.isfinite(train_loss) else None,
            "steps": last["step"],
            "tokens": last["tokens"],
            "seconds": round(seconds, 1),
            "tokens_per_second": round(last["tokens"] / seconds),
            **facts,
        }
        write_atomically(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")

    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer."""
        return Tokenizer.load(self.folder / "tokenizer.json").with_bos(self.config.data.bos)

    @property
    def own_tokens(self) -> bool:
        """Whether the tokens of the run are in ``data``, made of its text, rather than shards at ``data.paths``."""
        return self.data.is_dir()

    def corpus(self) -> Corpus:
        """The tokens of the run: those made of its text, or the shards that its configuration names.

        Of a stream they are only the held-out ones. Raises DataError if they are no longer there, cut short, or others.
        """
        data = self.config.data
        shards = [str(self.data)] if self.own_tokens else data.paths
        lost = [path for path in shards if not Path(path).exists() and not glob.glob(path)]
        if not lost and not self.own_tokens and not is_tokens(shards):  # it is the text, and the tokens were deleted
            lost = [str(self.data)]
        if lost:
            raise DataError(f"{lost[0]}, on which {self.folder} was trained, is no longer there; put it back")
        corpus = open_corpus(shards, self.tokenizer(), data.bos, dtype=data.dtype)
        if (known := Origin.load(self.folder).tokens) and known != corpus.fingerprint:
            raise DataError(
                f"{', '.join(shards)} is not what {self.folder} was trained on; restore it, or start again with --out"
            )
        return corpus

    def newest_checkpoint(self) -> Checkpoint:
        """The newest intact checkpoint. A CheckpointError when there is none."""
        checkpoint = newest(self.checkpoints, say=lambda _: None)
        if checkpoint is None:
            raise CheckpointError(f"{self.folder} has no intact checkpoint yet; train it further first")
        return checkpoint

    def checkpoint(self, step: int) -> Checkpoint:
        """The checkpoint of a step. A CheckpointError when there is none, or it is damaged."""
        there = {checkpoint.step: checkpoint for checkpoint in checkpoints(self.checkpoints)}
        if step not in there:
            steps = ", ".join(map(str, there)) or "none"
            raise CheckpointError(f"{self.folder} has no checkpoint of step {step}; there are: {steps}")
        if problem := there[step].broken():
            raise CheckpointError(f"{there[step].folder} is damaged: {problem}; use another step")
        return there[step]

    def model_checkpoint(self, step: int = 0) -> Checkpoint:
        """The checkpoint that commands use: of ``step``; for 0 the model that the finished run leaves, else the newest.

        With ``checkpoint.keep_best`` a finished run may leave an earlier one than the newest, as summary.json says. A
        CheckpointError when there is none, or it is damaged.
        """
        if summary := self.summary:
            left = summary.get("model_step", summary["steps"])
            step = step or (left if left != summary["steps"] else 0)
        return self.checkpoint(step) if step else self.newest_checkpoint()

    def model_of(self, step: int) -> tuple[str, float]:
        """Which weights of the checkpoint of ``step`` are the model, ``average`` or ``last``, and its temperature.

        Those with the lowest loss in the newest validation up to that step. By the temperature the head's logits are
        divided (``eval.calibrate``).
        """
        weights, temperature = LAST, 1.0
        if self.config.optim.ema or self.config.eval.calibrate:
            for record in read_jsonl(self.metrics):
                if record.get("step", 0) <= step:
                    weights = record.get("val/weights") or weights
                    temperature = record.get("val/temperature") or temperature
        return AVERAGE if weights == AVERAGE else LAST, temperature

    def weights(self, step: int) -> str:
        """Which weights of the checkpoint of ``step`` are the model: see :meth:`model_of`."""
        return self.model_of(step)[0]

    def model_in_words(self, checkpoint: Checkpoint) -> str:
        """Which weights are the model of a checkpoint."""
        weights, temperature = self.model_of(checkpoint.step)
        average = "average of the " if weights == AVERAGE else ""
        divided = f", logits divided by {temperature:.2f}" if temperature != 1 else ""
        return f"the {average}weights of step {checkpoint.step:,}{divided}"

    def load_model(self, device: torch.device | None = None, checkpoint: Checkpoint | None = None) -> GPT:
        """The model of a checkpoint, by default of :meth:`model_checkpoint`, in evaluation mode.

        With ``optim.ema`` it has the average of the weights where that is the better one, and with ``eval.calibrate``
        its head divides by the temperature: see :meth:`model_of`.
        """
        checkpoint, tokenizer = checkpoint or self.model_checkpoint(), self.tokenizer()
        model = meta_model(self.config.model, tokenizer.vocab_size, tokenizer.bos_id).to_empty(device=device or "cpu")
        weights, temperature = self.model_of(checkpoint.step)
        checkpoint.load({name_in_checkpoint(name, weights): p.detach() for name, p in model.named_parameters()})
        if temperature != 1:
            model.head.weight.detach().div_(temperature)
        return model.eval()


def stored_core(run: Run, checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The latest measurement of CORE of this checkpoint with the most questions: as JSON has it, with its name."""
    weights = weights_id(checkpoint)
    found = [record for record in read_jsonl(run.folder / CORE_FILE) if record.get("weights") == weights]
    return max(reversed(found), key=lambda each: sum(t["examples"] for t in each["tasks"].values()), default=None)


def weights_id(checkpoint: Checkpoint) -> str:
    """What distinguishes a checkpoint from another of the same step."""
    return sha256_of(checkpoint.folder / COMMIT)
