"""A run's copy in a bucket or on another disk, from which a machine that has nothing else goes on.

    COPY/config.toml  first of all, then tokenizer.json, origin.json, metrics.jsonl, …
    COPY/data/        the token shards that were made for the run, once
    COPY/checkpoints/step-00000500/  COMMIT last, as on the disk: without it the checkpoint does not exist
    COPY/summary.json after the last checkpoint

A file takes its place whole, as objects in a bucket do, so that a copy cut off anywhere leaves all that was there.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from pretrain.config import Config, config_from_dict, differences
from pretrain.errors import CheckpointError, PretrainError, UsageError
from pretrain.io import read_jsonl, sha256_of, sync_file, without_secrets, write_atomically
from pretrain.runs.checkpoint import COMMIT, by_loss, checkpoints, remove, surplus
from pretrain.runs.metrics import comparable_losses
from pretrain.runs.run import FORK, HEARTBEAT, LOCK, Run
from pretrain.text.opening import filesystem, one_line_remote, protocol_of, retrying
from pretrain.tokens import ORIGIN, Origin

CONFIG, SUMMARY, MANIFEST = "config.toml", "summary.json", "data/manifest.json"
FIRST = (CONFIG, "tokenizer.json", ORIGIN, FORK)
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "memory"}
MAY_DIFFER = ("train.steps ", "data.paths ", "data.val_paths ")  # of the same run: made longer, or its data elsewhere
FINAL = (PretrainError, ImportError, PermissionError, FileNotFoundError, ValueError)  # trying again would not help
RETRYING = retrying(lambda error: not isinstance(error, FINAL))


class RunCopy:
    """The copy of a run at a URL or in a folder. What cannot be reached or written is a DataError."""

    def __init__(self, place: str):
        self.shown = without_secrets(place)
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # tracebacks of what is tried again anyway
        with one_line_remote(self.shown):
            self.fs, path = filesystem(place)
        self.path, self.store = path.rstrip("/"), protocol_of(place) in OBJECT_STORES
        self.closed = False
        """Set by another thread to end what :meth:`send` is doing."""
        self.held: int | None = None
        """The step of the checkpoint that is being copied, and must stay on the disk."""
        self.known: set[int] = set()
        """The steps of the checkpoints that :meth:`claim` found and :meth:`send` copied."""
        self.damaged: list[int] = []
        """The steps of newer checkpoints that :meth:`fetch` passed over."""
        self._sent: dict[str, tuple[int, int]] = {}  # size and time of the files that this process copied

    def config(self) -> Config | None:
        """The configuration of the run that is there, if there is one."""
        with one_line_remote(self.shown):
            return (
                config_from_dict(tomllib.loads(self._read(CONFIG)), self.shown)
                if CONFIG in RETRYING(self._list)
                else None
            )

    def fetch(self, folder: Path, say: Callable[[str], None]) -> bool:
        """Bring the newest whole checkpoint and the run's files, if ``folder`` has none as new; gives whether it did.

        Cut off anywhere, it can be done again. Raises UsageError if another run or something else is there, and
        CheckpointError if all checkpoints there are damaged.
        """
        with one_line_remote(self.shown):
            there = RETRYING(self._list)
            if begun := Run.exists(folder):
                self._refuse_others(Run.open(folder), there)
            steps, here = steps_in(there), [checkpoint.step for checkpoint in checkpoints(folder / "checkpoints")]
            if not steps or (here and here[-1] >= steps[-1]):
                if steps and here[-1] > steps[-1]:
                    say(f"copy      step {here[-1]:,} here is newer than step {steps[-1]:,} in {self.shown}")
                return False
            newer = f", newer than step {here[-1]:,} here" if here else ""
            say(f"fetching  step {steps[-1]:,} from {self.shown}{newer}")
            (folder / SUMMARY).unlink(missing_ok=True)
            if not begun:
                shutil.rmtree(folder / "data", ignore_errors=True)  # of a preparation that was cut off
            shards = json.loads(self._read(MANIFEST))["shards"] if MANIFEST in there else ()
            hashes = {f"data/{shard['file']}": shard["sha256"] for shard in shards}
            for name in run_files(there):
                self._get(name, folder / name, there[name], hashes.get(name, ""))
            # The newest checkpoint last: without it all is fetched again.
            for step in best(Run.open(folder), steps):
                if step != steps[-1]:
                    self._get_checkpoint(step, folder, there, say)
            if SUMMARY in there:
                self._get(SUMMARY, folder / SUMMARY, there[SUMMARY])
            while steps and not self._get_checkpoint(steps[-1], folder, there, say):
                self.damaged.append(steps.pop())
                (folder / SUMMARY).unlink(missing_ok=True)  # it is of a model that is not there
            if not steps:
                raise CheckpointError(f"every checkpoint in {self.shown} is damaged; give another --checkpoint.copy_to")
        return True

    def claim(self, run: Run) -> None:
        """Begin to copy ``run`` there. Raises UsageError if another run or something else is there."""
        with one_line_remote(self.shown):
            self._refuse_others(run, there := RETRYING(self._list))
            for step in self.damaged:  # which would pass for copied
                self._remove(step)
            self.known = {*steps_in(there)} - {*self.damaged}
            RETRYING(self._put, run.folder, CONFIG)

    def drop_after(self, step: int) -> None:
        """Remove the checkpoints of later steps, from which the run went back."""
        with one_line_remote(self.shown):
            for later in reversed(steps_in(RETRYING(self._list))):
                if later > step:
                    self._remove(later)

    def send(self, run: Run) -> None:
        """Copy the run's files, the newest checkpoint if it is not there, others that are kept; then prune there.

        Any failure ends it; call it again. CheckpointError: another process trains the same run, or ``closed`` is set.
        """
        with one_line_remote(self.shown):
            while self._send_one(run):
                pass
            if (run.folder / SUMMARY).exists():
                self._put(run.folder, SUMMARY)

    def _send_one(self, run: Run) -> bool:
        """Copy the run's files and a checkpoint; False if there was none to copy."""
        there, config = self._list(), run.config.checkpoint
        steps = {*steps_in(there)}
        if strange := steps - self.known:
            which = f"has a checkpoint of step {max(strange)} that another process copied"
            raise CheckpointError(f"{self.shown} {which}; this one copies no more, so that they are not mixed")
        if SUMMARY in there and not (run.folder / SUMMARY).exists():  # the run is being made longer
            self.fs.rm_file(f"{self.path}/{SUMMARY}")
        self._put_files(run, there)
        here = {checkpoint.step: checkpoint for checkpoint in checkpoints(run.checkpoints)}
        losses = comparable_losses(read_jsonl(run.metrics)) if config.keep_best else {}
        passed_over = surplus({*here, *steps}, replace(config, keep_last=min(1, config.keep_last)), losses)
        self.held = max(here.keys() - steps - {*passed_over}, default=None)
        if self.held is None:
            return False
        self._put_files(run, there)  # what is new in them meanwhile: no step of the checkpoint may be missing
        for name in (*sorted(here[self.held].hashes()), COMMIT):
            self._put(run.folder, f"checkpoints/{here[self.held].folder.name}/{name}")
        self.known.add(self.held)
        steps.add(self.held)
        cut_off = [step for step in steps_in(there, ".*") if step not in steps and step < max(steps)]
        for step in (*surplus(steps, config, losses), *cut_off):
            self._remove(step)
        self.held = None
        return True

    def _refuse_others(self, run: Run, there: Iterable[str]) -> None:
        """A UsageError if there is something else than a copy of ``run``, or of the same run on another machine."""
        problem = ""
        if LOCK in there:
            problem = "is a run directory itself"
        elif CONFIG in there:
            theirs = config_from_dict(tomllib.loads(self._read(CONFIG)), self.shown)
            different = [line for line in differences(theirs, run.config) if not line.startswith(MAY_DIFFER)]
            tokens = Origin.load(run.folder).tokens
            if ORIGIN in there and tokens and json.loads(self._read(ORIGIN))["tokens"] not in ("", tokens):
                different.append("other tokens")
            whole = steps_in(there) and checkpoints(run.checkpoints)  # else fork.json may not be there yet
            if whole and run.fork != (json.loads(self._read(FORK)) if FORK in there else None):
                different.append("a fork")
            problem = f"has a copy of another run ({'; '.join(different)})" if different else ""
        elif there:
            problem = "has files but no run"
        if problem:
            raise UsageError(f"{self.shown} {problem}; choose another --checkpoint.copy_to")

    def _list(self) -> dict[str, int]:
        """The size of each file there, by its name in the run directory."""
        self.fs.invalidate_cache()
        found = self.fs.find(self.path, detail=True)
        return {name.removeprefix(f"{self.path}/"): info["size"] for name, info in found.items()}

    def _read(self, name: str) -> str:
        return RETRYING(self.fs.cat_file, f"{self.path}/{name}").decode(errors="surrogateescape")

    def _put_files(self, run: Run, there: Mapping[str, int]) -> None:
        """Copy the files of a run that are not ``there`` as they are now; of the tokens a size is enough."""
        files = {f"{at}{file.name}": file for at in ("", "data/") for file in (run.folder / at).glob("*")}
        for name in run_files(name for name, file in files.items() if file.is_file()):
            if not name.startswith("data/") or there.get(name) != files[name].stat().st_size:
                self._put(run.folder, name)

    def _put(self, folder: Path, name: str) -> None:
        """Copy a file of the run directory there, unless this process did and it is the same since."""
        if self.closed:
            raise CheckpointError(f"copying to {self.shown} has ended")
        status = (folder / name).stat()
        if self._sent.get(name) == (stamp := (status.st_size, status.st_mtime_ns)):
            return
        path = f"{self.path}/{name}"
        arriving = path if self.store else f"{path}.tmp"
        if not self.store:
            self.fs.makedirs(os.path.dirname(path), exist_ok=True)
        self.fs.put_file(str(folder / name), arriving)
        if isinstance(self.fs, LocalFileSystem):
            sync_file(Path(arriving))
        if not self.store:
            self.fs.mv(arriving, path)
        self._sent[name] = stamp

    def _get(self, name: str, to: Path, size: int, sha256: str = "") -> None:
        """Bring a file. Raises ValueError if it is not the one with that hash."""
        if sha256 and to.is_file() and sha256_of(to) == sha256:
            return
        arriving = to.with_name(f"{to.name}.tmp")

        def get() -> None:
            self.fs.get_file(f"{self.path}/{name}", str(arriving))
            if arriving.stat().st_size != size:
                raise EOFError(f"{name} came cut short")

        to.parent.mkdir(parents=True, exist_ok=True)
        RETRYING(get)
        if sha256 and sha256_of(arriving) != sha256:
            raise ValueError(f"{name} is not what was written")
        sync_file(arriving)
        os.replace(arriving, to)

    def _get_checkpoint(self, step: int, folder: Path, there: dict[str, int], say: Callable[[str], None]) -> bool:
        """Bring a checkpoint, its marker last; False and a line if it is damaged."""
        name = f"checkpoints/step-{step:08d}"
        final, arriving = folder / name, folder / f"{name}.tmp"
        try:
            marker = self._read(f"{name}/{COMMIT}")
            for file, sha256 in dict(json.loads(marker)).items():
                self._get(f"{name}/{file}", arriving / Path(file).name, there[f"{name}/{file}"], sha256)
        except (ValueError, TypeError, KeyError) as error:
            say(f"skipping the damaged checkpoint of step {step} in {self.shown}: {error}")
            return False
        remove(final)
        arriving.rename(final)
        write_atomically(final / COMMIT, marker)
        return True

    def _remove(self, step: int) -> None:
        """Remove a checkpoint there, its marker first."""
        folder = f"{self.path}/checkpoints/step-{step:08d}"
        if self.fs.exists(f"{folder}/{COMMIT}"):
            self.fs.rm_file(f"{folder}/{COMMIT}")
        self.fs.rm(folder, recursive=True)


def steps_in(names: Iterable[str], file: str = COMMIT) -> list[int]:
    """The steps whose checkpoints are whole, by the names of the files of a copy."""
    found = (re.fullmatch(rf"checkpoints/step-(\d+)/{file}", name) for name in names)
    return sorted({int(match[1]) for match in found if match})


def run_files(names: Iterable[str]) -> list[str]:
    """The names of the files that are copied before checkpoints, in order."""
    own = [name for name in names if re.fullmatch(r"(data/)?[^/]+(?<!\.tmp)(?<!\.)", name)]
    own = [name for name in own if name not in (LOCK, HEARTBEAT, SUMMARY)]
    return sorted(own, key=lambda name: (name not in FIRST, name == MANIFEST, name))


def best(run: Run, steps: Iterable[int]) -> list[int]:
    """With ``checkpoint.keep_best`` the step, of those, with the lowest validation loss."""
    losses = comparable_losses(read_jsonl(run.metrics)) if run.config.checkpoint.keep_best else {}
    return by_loss(steps, losses)[:1]
