"""``pretrain data download``: choose the files, show progress and failures, say what to do next."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated
from urllib.parse import unquote, urlsplit

import tyro
from rich.filesize import decimal

from pretrain.cli.parsing import Command
from pretrain.config.schema import Count, Natural, Positive
from pretrain.errors import DataError, Interrupted, UsageError, did_you_mean

if TYPE_CHECKING:
    from pretrain.text.catalogue import TextSet
    from pretrain.text.download import Download


@dataclass
class DownloadCommand(Command):
    """Download a public set of text from the catalogue, or files by their URLs.

    Without NAME the catalogue is listed. Complete files are kept, partial ones resumed. Sizes and hashes are verified
    where the server gives them. HF_ENDPOINT, HF_TOKEN and HTTPS_PROXY are honoured.
    """

    names: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[NAME | URL ...]")] = ()
    """A set by name, or one or more http(s) URLs."""
    list: bool = False
    """List the catalogue."""
    shards: Annotated[Natural, tyro.conf.arg(aliases=["-n"])] = 0
    """Training files to download, besides the validation file. 0: all, which is refused for huge sets."""
    out: str = ""
    """The folder to put the files in. Default: data/NAME, or data/downloads for URLs."""
    workers: Count = 4
    """Files downloaded at once."""
    base_url: str = ""
    """The folder with the set's files on a mirror, instead of where they were published."""
    tries: Count = 5
    """Tries for each file, with longer and longer waits between."""
    timeout: Positive = 30.0
    """Seconds without a byte after which a connection counts as broken."""

    def __post_init__(self):
        if self.base_url and not _is_url(self.base_url):
            raise ValueError(f"--base-url must begin with http:// or https://, not {self.base_url!r}")

    def __call__(self) -> int:
        from pretrain.text.catalogue import CATALOGUE

        if self.list or not self.names:
            print("\n\n".join(map(_facts, CATALOGUE.values())))
            print("\npretrain data download NAME [-n FILES] [--out DIR]")
            return 0
        found, names = None, list(self.names)
        if all(map(_is_url, names)):
            if self.shards or self.base_url:
                raise UsageError("-n and --base-url choose from a set of the catalogue; leave them out with URLs")
            folder = Path(self.out or "data/downloads")
            items = _files_of_urls(names, folder)
        elif len(names) > 1:
            raise UsageError(f"one set at a time, or several URLs, not {shlex.join(names)}")
        elif (found := CATALOGUE.get(names[0].lower())) is None:
            raise UsageError(f"no set named '{names[0]}' in the catalogue{did_you_mean(names[0], CATALOGUE)}")
        elif not found.train:
            print(f"{found.name} comes with the installation. Next:\n  pretrain train")
            return 0
        else:
            folder = Path(self.out or f"data/{found.name}")
            items = _files_of_set(found, self.shards, self.base_url, folder)

        from pretrain.text.download import download_all

        try:
            with _progress(items) as finished:
                download_all(items, self.workers, self.tries, self.timeout, finished)
        except KeyboardInterrupt:
            whole = sum(item.state in ("fetched", "kept") for item in items)
            raise Interrupted(
                f"interrupted: {whole} of {len(items)} files are in {folder}; the same command resumes from here"
            ) from None
        if failed := [item for item in items if item.state == "failed"]:
            for item in failed:
                print(f"{item.file.name}  {item.problem} (tries: {item.tries})", file=sys.stderr)
            raise DataError(
                f"{len(failed)} of {len(items)} files could not be downloaded to {folder}, for the reasons above;"
                f" the same command tries them again"
            )
        kept = sum(item.state == "kept" for item in items)
        before = f", {kept} of them there before" if kept else ""
        print(f"{folder}: {len(items)} of {len(items)} files{before}, {decimal(sum(item.done for item in items))}")
        split = ""
        if found and found.validation:
            print(f"{found.validation}, the last of them, is to validate on.")
            split = "split last_file"
        data, tokens = shlex.quote(str(folder)), shlex.quote(f"{folder}-tokens")
        print(f"Next:\n  pretrain data prepare {data}{split and f' --{split}'} --out {tokens}")
        print(f"  pretrain train --data {data}{split and f' --data.{split}'}")
        return 0


def _is_url(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def _files_of_urls(urls: Sequence[str], folder: Path) -> list[Download]:
    from pretrain.text.download import Download

    items: dict[str, Download] = {}
    for url in urls:
        try:
            name = PurePosixPath(unquote(urlsplit(url).path)).name
        except ValueError as error:
            raise UsageError(f"{url} is not a URL ({error})") from None
        if not name or name == ".." or "\0" in name:
            raise UsageError(f"{url} does not end in the name of a file")
        if name in items:
            raise UsageError(f"two URLs end in the same name {name}; download them into two folders, one by one")
        items[name] = Download(url, folder / name)
    return list(items.values())


def _files_of_set(found: TextSet, train: int, base_url: str, folder: Path) -> list[Download]:
    """Raises DataError if the disk has not enough space for them."""
    from pretrain.text.download import Download

    items = []
    missing = 0
    for name in found.files(train):
        url, file = found.url(name, base_url), folder / found.saved_as.get(name, name)
        size, sha256 = found.sizes.get(name, 0), found.sha256.get(name, "")
        item = Download(url, file, size, sha256, total=found.size_about(name))
        if not file.exists():
            missing += item.total - (item.part.stat().st_size if item.part.exists() else 0)
        items.append(item)
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if missing > free:
        raise DataError(
            f"{folder}: the files take about {missing / 1e9:,.1f} GB and the disk has {free / 1e9:,.1f} GB free;"
            f" download fewer (-n), or to another disk (--out)"
        )
    return items


def _facts(each: TextSet) -> str:
    count = len(each.train) + bool(each.validation)
    about = "about " * each.huge
    units = {"characters": each.characters, "tokens of GPT-2": each.tokens}
    lines = [
        f"{each.name}  ({count:,} file{'s' * (count != 1)}, {about}{decimal(each.bytes)})",
        each.about,
        about + ", ".join(f"{number:,} {unit}" for unit, number in units.items() if number),
        f"validation: {each.validation}" if each.validation else "",
        f"licence: {each.licence}",
        each.page,
    ]
    return "\n  ".join(filter(None, lines))


@contextmanager
def _progress(items: list[Download]) -> Iterator[Callable[[Download], None]]:
    """Show on standard error a line for each finished file, and below them, on a terminal, a bar for all."""
    from rich import progress
    from rich.console import Console, RenderableType
    from rich.live import Live

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    bar = progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    task = bar.add_task("")

    def draw() -> RenderableType:
        ready = sum(item.state in ("fetched", "kept") for item in items)
        again = [
            f", {item.file.name}: try {item.tries}" for item in items if item.state == "running" and item.tries > 1
        ]
        done, total = sum(item.done for item in items), sum(item.total for item in items)
        text = f"{ready} of {len(items)} files{''.join(again)}"
        bar.update(task, description=text, completed=done, total=total or None)
        return bar

    def finished(item: Download) -> None:
        size = "there already" if item.state == "kept" else decimal(item.done)
        console.print(f"{item.file.name}  {item.problem or size}", markup=False)

    with Live(get_renderable=draw, console=console, transient=True):  # which is silent unless on a terminal
        yield finished
