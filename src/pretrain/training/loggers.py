"""The run in tools that people use: TensorBoard, Weights & Biases, trackio; and callbacks of one's own.

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
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import tomli_w

from pretrain.config import Config, config_to_dict
from pretrain.io import without_secrets

STATE = "loggers.json"
LONGEST_QUEUE = 1000
"""Messages that may wait for a slow logger; beyond, they are left out."""
STATE_SECONDS = 1.0
"""How often the last step logged is noted; after a crash so many seconds may be logged again."""
CLOSE_SECONDS = 60.0
"""How long the end of a run waits for loggers to send what they have."""


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

    What was logged after ``done`` steps, by a process that was stopped, is marked to be passed over. Steps that come
    again later, after a spike was rolled back, likewise replace the earlier ones.
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


class Loggers:
    """All loggers of a run.

    Args:
        run_folder: the run directory.
        config: of the run; ``config.log`` names the loggers.
        done_steps: steps done before; later ones that were logged already come again.
        say: hears of loggers that are missing or fail, once each.
    """

    def __init__(self, run_folder: Path, config: Config, done_steps: int, say: Callable[[str], None]):
        self.folder, self.config, self.done, self.say = run_folder, config, done_steps, say
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(LONGEST_QUEUE)
        self._thread: threading.Thread | None = None
        self._left_out = 0
        kinds = chosen(config.log.backends, say)
        if kinds:
            self._thread = threading.Thread(target=self._work, args=(kinds,), name="loggers", daemon=True)
            self._thread.start()

    def log(self, records: Iterable[dict[str, Any]]) -> None:
        """Take lines of metrics.jsonl."""
        for record in records:
            self._put("log", record)

    def text(self, step: int, sample: str) -> None:
        """Take a sampled text."""
        self._put("text", (step, sample))

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Let the loggers finish, but wait no longer than this."""
        if self._thread is None:
            return
        end = time.monotonic() + seconds
        with suppress(queue.Full):
            self._queue.put(("close", None), timeout=seconds)
        self._thread.join(max(0.0, end - time.monotonic()))
        if self._thread.is_alive():
            self.say(f"the loggers did not finish within {seconds:.0f} s; what they have not sent yet is left out")
        self._thread = None

    def _put(self, what: str, value: Any) -> None:
        if self._thread is None:
            return
        try:
            self._queue.put_nowait((what, value))
        except queue.Full:
            if not self._left_out:
                self.say("the loggers are slower than training; some steps are missing in them, none in metrics.jsonl")
            self._left_out += 1

    def _work(self, kinds: tuple[str, ...]) -> None:
        """The thread: open, take what comes, close."""
        state = self._read_state()
        backends: dict[str, Backend] = {}
        for kind in kinds:
            self._guarded(kind, backends, lambda kind=kind: backends.update({kind: self._open(kind, state)}))
        self._write_state(state)
        noted = time.monotonic()
        while backends:
            what, value = self._queue.get()
            if what == "close":
                break
            for kind, backend in list(backends.items()):
                self._guarded(kind, backends, functools.partial(_pass_on, kind, backend, what, value, state))
            if time.monotonic() - noted > STATE_SECONDS:
                self._write_state(state)
                noted = time.monotonic()
        for kind, backend in list(backends.items()):
            self._guarded(kind, backends, backend.close)
        self._write_state(state)

    def _open(self, kind: str, state: dict[str, Any]) -> Backend:
        """Make a logger, with the names that it had before."""
        config = without_secrets(config_to_dict(self.config))
        given = self.config.log
        name = given.name or self.folder.absolute().name
        project = given.project
        if kind == "tensorboard":
            return TensorBoard(self.folder, config, self.done)
        mine = state.setdefault(kind, {"id": uuid.uuid4().hex[:8], "project": project, "last": 0})
        if kind == "wandb":
            return WeightsAndBiases(self.folder, config, mine["project"], name, mine["id"], self.say)
        mine.setdefault("name", f"{name}-{mine['id'][:4]}")  # trackio knows a run by its name
        return Trackio(config, mine["project"], mine["name"])

    def _guarded(self, kind: str, backends: dict[str, Backend], work: Callable[[], Any]) -> None:
        """Do something with a logger, which is left out from then on if that fails."""
        try:
            work()
        except BaseException as error:  # whatever it raises, SystemExit too; training has nothing to do with it
            backends.pop(kind, None)
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.say(f"the logger {kind} failed ({without_secrets(first)}); training goes on without it")

    def _read_state(self) -> dict[str, Any]:
        with suppress(OSError, ValueError, AttributeError, TypeError):
            state = json.loads((self.folder / STATE).read_text(encoding="utf-8"))
            return {kind: mine for kind, mine in state.items() if {"id", "project", "last"} <= set(mine)}
        return {}

    def _write_state(self, state: dict[str, Any]) -> None:
        if not state:
            return
        temporary = self.folder / f"{STATE}.tmp"
        with suppress(OSError):  # a full disk is told where it matters
            temporary.write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
            os.replace(temporary, self.folder / STATE)


def _pass_on(kind: str, backend: Backend, what: str, value: Any, state: dict[str, Any]) -> None:
    """Give a message to a logger, unless it has that step already from before a resume."""
    mine = state.get(kind)
    if what == "log":
        step = value["step"]
        if mine is None or step > mine["last"]:
            backend.log(step, numbers(value))
            if mine is not None:
                mine["last"] = step
    elif mine is None or value[0] >= mine["last"]:
        backend.text(*value)


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
            say(f"log.backends names {kind}, which is missing: pip install 'pretrain[{kind}]'; going on without it")
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
