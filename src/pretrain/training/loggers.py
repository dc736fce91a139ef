"""Metrics and samples in TensorBoard, Weights & Biases and trackio.

A thread for each tool imports, opens and feeds it, so that neither training nor another tool waits for it. One that
fails or is not installed is named once and left out. ``loggers.json`` keeps each tool's names of the run and the last
step that it was given, so that a resumed run goes on as the same run there, without a step logged twice.
"""

from __future__ import annotations

import functools
import html
import importlib.util
import json
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import tomli_w

from pretrain.config import Config, config_to_dict
from pretrain.io import without_secrets, write_atomically
from pretrain.training.callbacks import Callback

STATE = "loggers.json"
STATE_LOCK = threading.Lock()  # held while a tool changes its part of it
LONGEST_QUEUE = 1000  # messages that may wait for a slow tool; beyond, they are left out
CLOSE_SECONDS, INTERRUPTED_SECONDS = 60.0, 3.0  # how long the end of a run waits for a tool, and after a signal
Message = tuple[int, dict[str, Any] | tuple[str, str]]  # a step with its numbers, or with the name and text of a sample


class Logger(Callback):
    """A tool, for a run of which ``done`` steps are done; later ones that were logged come again. -1: it begins."""

    def __init__(self, kind: str, folder: Path, config: Config, done: int, say: Callable[[str], None]):
        self.kind, self.say = kind, say
        self._queue: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._full = False
        prompts = dict.fromkeys(config.sample.prompts)
        self._names = {prompt: f"sample/{n}" if len(prompts) > 1 else "sample" for n, prompt in enumerate(prompts, 1)}
        plain = _printable(without_secrets(config_to_dict(config)))
        self._thread = threading.Thread(target=self._work, args=(folder, plain, done), name="logger", daemon=True)
        self._thread.start()

    def on_step(self, record: dict[str, Any]) -> None:
        """Pass the numbers on."""
        self._put(record["step"], {k: v for k, v in record.items() if k != "step" and isinstance(v, (int, float))})

    def on_sample(self, step: int, prompt: str, text: str) -> None:
        """Pass it on; the numbers came with the step."""
        self._put(step, (self._names[prompt], text))

    def on_end(self, interrupted: bool) -> None:
        """Let the tool finish, but not long after a signal."""
        seconds = INTERRUPTED_SECONDS if interrupted else CLOSE_SECONDS
        self._queue.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            self.say(f"the logger {self.kind} did not finish within {seconds:.0f} s; what it has not sent yet is lost")

    def _put(self, step: int, values: dict[str, Any] | tuple[str, str]) -> None:
        if self._queue.qsize() < LONGEST_QUEUE:
            self._queue.put((step, values))
        elif self._thread.is_alive() and not self._full:
            self._full = True
            self.say(f"the logger {self.kind} is slower than training; it misses some steps, metrics.jsonl none")

    def _work(self, folder: Path, config: dict[str, Any], done: int) -> None:
        messages = iter(self._queue.get, None)
        try:
            if self.kind == "tensorboard":
                feed_tensorboard(messages, folder, config, done)
            else:
                feed_tracker(messages, folder, config, self.kind, self.say)
        except BaseException as error:  # whatever it raises, SystemExit too; training has nothing to do with it
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.say(f"the logger {self.kind} failed ({without_secrets(first)}); training continues without it")


def _printable(config: dict[str, Any]) -> dict[str, Any]:
    """The same values with ? in paths for what is not UTF-8, which the tools refuse."""
    return json.loads(json.dumps(config, ensure_ascii=False).encode(errors="replace"))


def feed_tensorboard(messages: Iterable[Message], folder: Path, config: dict[str, Any], done: int) -> None:
    """Event files in ``RUN/tensorboard``. A step that comes again, after a resume or a rollback, replaces the first."""
    from torch.utils.tensorboard import SummaryWriter  # type: ignore[import-not-found]

    writer_from = functools.partial(SummaryWriter, str(folder / "tensorboard"))
    writer, last = writer_from(purge_step=done + 1), done
    writer.add_text("config", f"```toml\n{tomli_w.dumps(config)}\n```", max(0, done))
    for step, values in messages:
        if isinstance(values, tuple):
            name, text = values
            writer.add_text(name, in_markdown(text), step)
            continue
        if step <= last:
            writer.close()
            writer = writer_from(purge_step=step)
        last = step
        for name, value in values.items():
            writer.add_scalar(name, value, step)
    writer.close()


def feed_tracker(
    messages: Iterable[Message], folder: Path, config: dict[str, Any], kind: str, say: Callable[[str], None]
) -> None:
    """A run in Weights & Biases or trackio, under the names that it has there since its beginning."""
    name, new = config["log"]["name"] or folder.absolute().name, uuid.uuid4().hex[:8]
    state = {"id": new, "project": config["log"]["project"], "name": f"{name}-{new[:4]}", "last": -1}
    state |= read_state(folder).get(kind, {})
    options = {"project": state["project"], "config": config, "resume": "allow"}
    if kind == "trackio":
        import trackio  # type: ignore[import-not-found]

        run = trackio.init(name=state["name"], embed=False, **options)  # trackio knows a run by its name

        def shown(text: str) -> Any:
            return trackio.Markdown(in_markdown(text))
    else:
        import wandb  # type: ignore[import-not-found]

        # No metadata: it would hold this process's command line, in which a URL may have a password.
        settings = wandb.Settings(silent=True, console="off", disable_code=True, x_disable_meta=True)
        wandb.setup(settings)
        if "WANDB_MODE" not in os.environ and not wandb.login(prompt=False, verify=False):
            options["mode"] = "offline"
            say(f"no key of Weights & Biases (wandb login); the run is kept in {folder / 'wandb'}, for: wandb sync")
        run = wandb.init(name=name, id=state["id"], dir=str(folder), settings=settings, **options)

        def shown(text: str) -> Any:
            return wandb.Html(f"<pre>{html.escape(text)}</pre>")

    stored = 0.0
    for step, values in messages:
        if step > state["last"] or (step == state["last"] and isinstance(values, tuple)):
            run.log({values[0]: shown(values[1])} if isinstance(values, tuple) else values, step=step)
            state["last"] = step
            if time.monotonic() > stored + 1:
                store_state(folder, kind, state)
                stored = time.monotonic()
    store_state(folder, kind, state)
    run.finish()


def read_state(folder: Path) -> dict[str, Any]:
    """What ``loggers.json`` has of each tool."""
    with suppress(OSError, ValueError):
        return json.loads((folder / STATE).read_text(encoding="utf-8"))
    return {}


def store_state(folder: Path, kind: str, state: dict[str, Any]) -> None:
    """Replace what it has of one tool."""
    with STATE_LOCK, suppress(OSError):  # a full disk is reported where it matters
        text = json.dumps(read_state(folder) | {kind: state}, indent=2) + "\n"
        write_atomically(folder / STATE, text, sync=False)


def in_markdown(text: str) -> str:
    """A text as it is, in Markdown."""
    return "```text\n" + text.replace("```", "'''") + "\n```"


def chosen(names: tuple[str, ...], say: Callable[[str], None]) -> list[str]:
    """The tools that a configuration asks for and that are installed; the others are named through ``say``."""
    if "none" in names:
        return []
    there = []
    for name in names:
        kind = "tensorboard" if name == "auto" else name
        if installed(kind):
            there.append(kind)
        elif name != "auto":
            say(f"log.backends names {name}, which is missing: pip install 'pretrain[{name}]'; continuing without it")
    return list(dict.fromkeys(there))


def installed(module: str) -> bool:
    """Whether a module could be imported; a mere folder of that name, as the tools make them, is none."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None
