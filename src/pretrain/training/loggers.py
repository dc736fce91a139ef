"""Metrics and samples in TensorBoard, Weights & Biases and trackio.

A thread of its own imports, opens and feeds the tools, so that training waits for none of them. One that fails or is
not installed is named once and left out. ``loggers.json`` keeps each tool's names of the run and the last step that it
was given, so that a resumed run goes on as the same run there, without a step logged twice.
"""

from __future__ import annotations

import html
import importlib.util
import json
import netrc
import os
import queue
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import tomli_w

from pretrain.config import Config, config_to_dict
from pretrain.io import without_secrets, write_atomically
from pretrain.training.callbacks import Callback

STATE = "loggers.json"
LONGEST_QUEUE = 1000
"""Messages that may wait for a slow tool; beyond, they are left out."""
CLOSE_SECONDS, INTERRUPTED_SECONDS = 60.0, 3.0
"""How long the end of a run waits for the tools, and how long after a signal."""


class TensorBoard:
    """Event files in ``RUN/tensorboard``. A step that comes again, after a resume or a rollback, replaces the first."""

    def __init__(self, folder: Path, config: dict[str, Any], done: int):
        from torch.utils.tensorboard import SummaryWriter  # type: ignore[import-not-found]

        files, self.last = str(folder / "tensorboard"), done
        resumed = os.path.isdir(files) and os.listdir(files)
        self.open = lambda purge_step: SummaryWriter(files, purge_step=purge_step)
        self.writer = self.open(done + 1 if resumed else None)
        if not resumed:
            self.writer.add_text("config", f"```toml\n{tomli_w.dumps(config)}\n```", 0)

    def log(self, values: dict[str, Any], step: int) -> None:
        """A text for the sample, or a scalar for each number."""
        if "sample" in values:
            self.writer.add_text("sample", values["sample"], step)
            return
        if step <= self.last:
            self.writer.close()
            self.writer = self.open(step)
        self.last = step
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def finish(self) -> None:
        """Write the rest."""
        self.writer.close()


class Loggers(Callback):
    """All tools of a run of which ``done`` steps are done; later steps that were logged before come again."""

    def __init__(self, folder: Path, config: Config, done: int, say: Callable[[str], None]):
        self.folder, self.done, self.say = folder, done, say
        self.config, self.project = without_secrets(config_to_dict(config)), config.log.project
        self.name = config.log.name or folder.absolute().name
        self.kinds = chosen(config.log.backends, say)
        self._tools: dict[str, tuple[Any, Callable[[str], Any]]] = {}  # see _open
        self._state: dict[str, Any] = {}
        self._queue: queue.SimpleQueue[tuple[int, dict[str, Any]] | None] = queue.SimpleQueue()
        self._full = False
        self._thread = threading.Thread(target=self._work, name="loggers", daemon=True)
        self._thread.start()

    def on_step(self, record: dict[str, Any]) -> None:
        """Pass the numbers on."""
        self._put(record["step"], {k: v for k, v in record.items() if k != "step" and isinstance(v, (int, float))})

    def on_evaluation(self, record: dict[str, Any], sample: str | None) -> None:
        """Pass the sample on; the numbers came with the step."""
        if sample is not None:
            self._put(record["step"], {"sample": sample})

    def on_end(self, interrupted: bool) -> None:
        """Let the tools finish, but not long after a signal."""
        seconds = INTERRUPTED_SECONDS if interrupted else CLOSE_SECONDS
        self._queue.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            self.say(f"the loggers did not finish within {seconds:.0f} s; what they have not sent yet is lost")

    def _put(self, step: int, values: dict[str, Any]) -> None:
        if self._queue.qsize() < LONGEST_QUEUE:
            self._queue.put((step, values))
        elif self._thread.is_alive() and not self._full:
            self._full = True
            self.say("the loggers are slower than training; some steps are missing in them, none in metrics.jsonl")

    def _work(self) -> None:
        """The thread: open the tools, pass on what comes, close them."""
        with suppress(OSError, ValueError):
            self._state = json.loads((self.folder / STATE).read_text(encoding="utf-8"))
        for kind in self.kinds:
            with self._dropped_if_it_fails(kind):
                self._tools[kind] = self._open(kind)
        while self._tools and (message := self._queue.get()) is not None:
            step, values = message
            for kind, (tool, shown) in list(self._tools.items()):
                with self._dropped_if_it_fails(kind):
                    state = self._state.get(kind, {"last": -1})  # TensorBoard takes a step again
                    if step > state["last"] or (step == state["last"] and "sample" in values):
                        tool.log({k: shown(v) if k == "sample" else v for k, v in values.items()}, step=step)
                        state["last"] = step
            if self._queue.empty():
                self._store()
        for kind, (tool, _) in list(self._tools.items()):
            with self._dropped_if_it_fails(kind):
                tool.finish()
        self._store()

    def _open(self, kind: str) -> tuple[Any, Callable[[str], Any]]:
        """A tool, which has ``log`` and ``finish``, under the names that the run had there; and what shows a text."""

        def in_markdown(text: str) -> str:
            return "```text\n" + text.replace("```", "'''") + "\n```"

        if kind == "tensorboard":
            return TensorBoard(self.folder, self.config, self.done), in_markdown
        state = self._state.setdefault(kind, {"id": uuid.uuid4().hex[:8], "project": self.project, "last": 0})
        if kind == "trackio":
            import trackio  # type: ignore[import-not-found]

            name = state.setdefault("name", f"{self.name}-{state['id'][:4]}")  # trackio knows a run by its name
            run = trackio.init(project=state["project"], name=name, config=self.config, resume="allow", embed=False)
            return run, lambda text: trackio.Markdown(in_markdown(text))
        import wandb  # type: ignore[import-not-found]

        mode = None  # as WANDB_MODE says
        if "WANDB_MODE" not in os.environ and not has_wandb_key():
            mode, files = "offline", self.folder / "wandb"
            self.say(f"no key of Weights & Biases (wandb login); the run is kept in {files}, for: wandb sync")
        # No metadata: it would hold this process's command line, in which a URL may have a password.
        settings = wandb.Settings(silent=True, console="off", disable_code=True, x_disable_meta=True)
        run = wandb.init(
            project=state["project"], name=self.name, id=state["id"], resume="allow",
            dir=str(self.folder), config=self.config, mode=mode, settings=settings,
        )  # fmt: skip
        return run, lambda text: wandb.Html(f"<pre>{html.escape(text)}</pre>")

    @contextmanager
    def _dropped_if_it_fails(self, kind: str) -> Iterator[None]:
        try:
            yield
        except BaseException as error:  # whatever it raises, SystemExit too; training has nothing to do with it
            self._tools.pop(kind, None)
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.say(f"the logger {kind} failed ({without_secrets(first)}); training continues without it")

    def _store(self) -> None:
        if self._state:
            with suppress(OSError):  # a full disk is reported where it matters
                write_atomically(self.folder / STATE, json.dumps(self._state, indent=2) + "\n", sync=False)


def chosen(names: tuple[str, ...], say: Callable[[str], None]) -> list[str]:
    """The tools that a configuration asks for and that are installed; the others are named through ``say``."""
    if "none" in names:
        return []
    there = ["tensorboard"] if "auto" in names and installed("tensorboard") else []
    for name in names:
        if name != "auto" and installed(name):
            there.append(name)
        elif name != "auto":
            say(f"log.backends names {name}, which is missing: pip install 'pretrain[{name}]'; continuing without it")
    return list(dict.fromkeys(there))


def installed(module: str) -> bool:
    """Whether a module could be imported; a mere folder of that name, as the tools make them, is none."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def has_wandb_key() -> bool:
    """Whether Weights & Biases can log in without asking; asking would stop a thread for ever."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    with suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    return False
