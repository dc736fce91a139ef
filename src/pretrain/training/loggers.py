"""Metrics and samples in TensorBoard, Weights & Biases and trackio.

    records of metrics.jsonl, samples ──queue──> a thread ──> tensorboard/, wandb/, trackio's folder

Everything happens in a thread of its own, so that training waits for no logger, nor for its import or its network. One
that fails, or is not installed, is named once and left out. A run that goes on continues the same run in each tool, by
the names kept in ``loggers.json``, without logging a step twice.
"""

from __future__ import annotations

import functools
import html
import importlib.util
import json
import netrc
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import tomli_w

from pretrain.config import Config, config_to_dict
from pretrain.io import without_secrets, write_atomically
from pretrain.training.callbacks import Callback

STATE = "loggers.json"
LONGEST_QUEUE = 1000
"""Messages that may wait for a slow logger; beyond, they are left out."""
STATE_SECONDS = 1.0
"""Interval at which the last logged step is stored; after a crash the steps since then may be logged again."""
CLOSE_SECONDS, INTERRUPTED_SECONDS = 60.0, 3.0
"""How long the end of a run waits for loggers to send what they have, and after a signal."""


class Backend(Protocol):
    """One tool."""

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Take the numbers of a step."""
        ...

    def text(self, step: int, text: str) -> None:
        """Take a sample of text."""
        ...

    def close(self) -> None:
        """Send or write what is left."""
        ...


class TensorBoard:
    """Event files in ``RUN/tensorboard``, as ``tensorboard --logdir RUN`` shows them.

    Steps after ``done`` that a stopped process logged are marked as purged. Steps repeated after a rollback likewise
    replace the earlier ones.
    """

    def __init__(self, folder: Path, config: dict[str, Any], done: int):
        from torch.utils.tensorboard import SummaryWriter  # type: ignore[import-not-found]

        self.folder, self.last = folder / "tensorboard", done
        there = self.folder.is_dir() and any(self.folder.iterdir())
        self._open = functools.partial(SummaryWriter, str(self.folder))
        self.writer = self._open(purge_step=done + 1 if there else None)
        if not there:
            self.writer.add_text("config", f"```toml\n{tomli_w.dumps(config)}\n```", 0)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """One scalar for each number."""
        if step <= self.last:
            self.writer.close()
            self.writer = self._open(purge_step=step)
        self.last = step
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def text(self, step: int, text: str) -> None:
        """The text as it is, in a block of its own."""
        self.writer.add_text("sample", "```text\n" + text.replace("```", "'''") + "\n```", step)

    def close(self) -> None:
        """Write the rest."""
        self.writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; without a key its files stay in ``RUN/wandb``, for ``wandb sync``."""

    def __init__(self, folder: Path, config: dict[str, Any], project: str, name: str, id: str, say: Callable):
        import wandb  # type: ignore[import-not-found]

        self.wandb = wandb
        mode = None  # as WANDB_MODE says
        if "WANDB_MODE" not in os.environ and not _has_wandb_key():
            mode = "offline"
            say(f"no key of Weights & Biases (wandb login); the run is kept in {folder / 'wandb'}, for: wandb sync")
        # No metadata: it would hold this process's command line, in which a URL may have a password.
        settings = wandb.Settings(silent=True, console="off", disable_code=True, x_disable_meta=True)
        self.run = wandb.init(
            project=project, name=name, id=id, resume="allow", dir=str(folder), config=config, mode=mode,
            settings=settings,
        )  # fmt: skip

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """All numbers of a step."""
        self.run.log(numbers, step=step)

    def text(self, step: int, text: str) -> None:
        """A page with the text."""
        self.run.log({"sample": self.wandb.Html(f"<pre>{html.escape(text)}</pre>")}, step=step)

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()


class Trackio:
    """A run of trackio, in its own folder on this machine (``trackio show``), or where its environment says."""

    def __init__(self, config: dict[str, Any], project: str, name: str):
        import trackio  # type: ignore[import-not-found]

        self.trackio = trackio
        self.run = trackio.init(project=project, name=name, config=config, resume="allow", embed=False)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """All numbers of a step."""
        self.run.log(numbers, step=step)

    def text(self, step: int, text: str) -> None:
        """The text as Markdown."""
        self.run.log({"sample": self.trackio.Markdown("```text\n" + text.replace("```", "'''") + "\n```")}, step=step)

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()


class Loggers(Callback):
    """All loggers of a run.

    Args:
        run_folder: the run directory.
        config: of the run; ``config.log`` names the loggers.
        done_steps: steps done before; later ones that were logged already come again.
        say: hears of loggers that are missing or fail, once each.
    """

    def __init__(self, run_folder: Path, config: Config, done_steps: int, say: Callable[[str], None]):
        self.folder, self.config, self.done, self.say = run_folder, config, done_steps, say
        self._queue: queue.Queue[tuple[int, dict[str, float] | str] | None] = queue.Queue(LONGEST_QUEUE)
        self._thread: threading.Thread | None = None
        self._full = False
        self._backends: dict[str, Backend] = {}
        self._state: dict[str, Any] = {}
        kinds = chosen(config.log.backends, say)
        if kinds:
            self._thread = threading.Thread(target=self._work, args=(kinds,), name="loggers", daemon=True)
            self._thread.start()

    def on_step(self, record: dict[str, Any]) -> None:
        """Pass the numbers on."""
        self._put(record["step"], numbers(record))

    def on_evaluation(self, record: dict[str, Any], sample: str | None) -> None:
        """Pass the sample on; the numbers came with the step."""
        if sample is not None:
            self._put(record["step"], sample)

    def on_end(self, interrupted: bool) -> None:
        """Let the loggers finish, but not long after a signal."""
        self.close(INTERRUPTED_SECONDS if interrupted else CLOSE_SECONDS)

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Let the loggers finish, but wait no longer than this."""
        if self._thread is None:
            return
        end = time.monotonic() + seconds
        with suppress(queue.Full):
            self._queue.put(None, timeout=seconds)
        self._thread.join(max(0.0, end - time.monotonic()))
        if self._thread.is_alive():
            self.say(f"the loggers did not finish within {seconds:.0f} s; what they have not sent yet is lost")
        self._thread = None

    def _put(self, step: int, message: dict[str, float] | str) -> None:
        if self._thread is None:
            return
        try:
            self._queue.put_nowait((step, message))
        except queue.Full:
            if not self._full:
                self.say("the loggers are slower than training; some steps are missing in them, none in metrics.jsonl")
            self._full = True

    def _work(self, kinds: tuple[str, ...]) -> None:
        """The thread: open, take what comes, close."""
        with suppress(OSError, ValueError, AttributeError, TypeError):
            state = json.loads((self.folder / STATE).read_text(encoding="utf-8"))
            self._state = {kind: mine for kind, mine in state.items() if {"id", "project", "last"} <= set(mine)}
        for kind in kinds:
            self._guarded(kind, self._open)
        self._write_state()
        noted = time.monotonic()
        while self._backends and (message := self._queue.get()) is not None:
            for kind in list(self._backends):
                self._guarded(kind, self._pass_on, *message)
            if time.monotonic() - noted > STATE_SECONDS:
                self._write_state()
                noted = time.monotonic()
        for kind in list(self._backends):
            self._guarded(kind, lambda kind: self._backends[kind].close())
        self._write_state()

    def _guarded(self, kind: str, work: Callable[..., None], *arguments: Any) -> None:
        """Do something with a logger, which is dropped if that fails."""
        try:
            work(kind, *arguments)
        except BaseException as error:  # whatever it raises, SystemExit too; training has nothing to do with it
            self._backends.pop(kind, None)
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.say(f"the logger {kind} failed ({without_secrets(first)}); training continues without it")

    def _open(self, kind: str) -> None:
        """Make a logger, with the names that it had before."""
        config, given = without_secrets(config_to_dict(self.config)), self.config.log
        name = given.name or self.folder.absolute().name
        if kind == "tensorboard":
            self._backends[kind] = TensorBoard(self.folder, config, self.done)
            return
        mine = self._state.setdefault(kind, {"id": uuid.uuid4().hex[:8], "project": given.project, "last": 0})
        if kind == "wandb":
            self._backends[kind] = WeightsAndBiases(self.folder, config, mine["project"], name, mine["id"], self.say)
        else:
            mine.setdefault("name", f"{name}-{mine['id'][:4]}")  # trackio knows a run by its name
            self._backends[kind] = Trackio(config, mine["project"], mine["name"])

    def _pass_on(self, kind: str, step: int, message: dict[str, float] | str) -> None:
        """Give a message to a logger, unless it has that step already from before a resume."""
        mine = self._state.get(kind, {"last": -1})
        if isinstance(message, str):
            if step >= mine["last"]:
                self._backends[kind].text(step, message)
        elif step > mine["last"] or kind not in self._state:
            self._backends[kind].log(step, message)
            mine["last"] = step

    def _write_state(self) -> None:
        if self._state:
            with suppress(OSError):  # a full disk is reported where it matters
                write_atomically(self.folder / STATE, json.dumps(self._state, indent=2) + "\n", sync=False)


def chosen(backends: tuple[str, ...], say: Callable[[str], None]) -> tuple[str, ...]:
    """The loggers that a configuration asks for and that are installed; the others are named through ``say``."""
    wanted = [] if "none" in backends else list(dict.fromkeys(backends))
    there = []
    for kind in wanted:
        if kind == "auto":
            there += ["tensorboard"] if installed("tensorboard") and "tensorboard" not in wanted else []
        elif installed(kind):
            there.append(kind)
        else:
            say(f"log.backends names {kind}, which is missing: pip install 'pretrain[{kind}]'; continuing without it")
    return tuple(there)


def installed(module: str) -> bool:
    """Whether a module could be imported; a mere folder of that name, as loggers make them, is none."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl, without those that are missing, and without the step."""
    return {
        name: value
        for name, value in record.items()
        if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def _has_wandb_key() -> bool:
    """Whether Weights & Biases can log in without asking; asking would stop a thread for ever."""
    if any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    with suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    return False
