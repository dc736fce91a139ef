"""``pretrain data download``: choose the files, show progress and failures, say what to do next."""

from __future__ import annotations

import shlex
import shutil
import sys
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from pretrain.cli.parsing import parse
from pretrain.errors import DataError, Interrupted, UsageError, did_you_mean

if TYPE_CHECKING:
    from pretrain.text.catalogue import TextSet
    from pretrain.text.download import Download


@dataclass
class DownloadArguments:
    """Download a public set of text from the catalogue, or files by their URLs.

    Without NAME the catalogue is listed. Complete files are kept, partial ones resumed. Sizes and hashes are verified
    where the server gives them. HF_ENDPOINT, HF_TOKEN and HTTPS_PROXY are honoured.
    """

    names: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[NAME | URL ...]")] = ()
    """A set by name, or one or more http(s) URLs."""
    list: bool = False
    """List the catalogue."""
    shards: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 0
    """Training files to download, besides the validation file. 0: all, which huge sets refuse."""
    out: str = ""
    """The folder to put the files in. Default: data/NAME, or data/downloads for URLs."""
    workers: int = 4
    """Files downloaded at once."""
    base_url: str = ""
    """The folder with the set's files on a mirror, instead of where they were published."""
    tries: int = 5
    """Tries for each file, with longer and longer waits between."""
    timeout: float = 30.0
    """Seconds without a byte after which a connection counts as broken."""

    def __post_init__(self):
        for name in ("workers", "tries"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if self.timeout <= 0:
            raise ValueError(f"--timeout must be more than 0 seconds, not {self.timeout:g}")
        if self.base_url and not _is_url(self.base_url):
            raise ValueError(f"--base-url must begin with http:// or https://, not {self.base_url!r}")


def download(args: list[str]) -> int:
    """Download a public set of text, or files by their URLs."""
    a = parse(DownloadArguments, args, "data download")
    from pretrain.text.catalogue import CATALOGUE

    if a.list or not a.names:
        print("\n\n".join(map(_facts, CATALOGUE.values())))
        print("\npretrain data download NAME [-n FILES] [--out DIR]")
        return 0
    found = None if all(map(_is_url, a.names)) else _find(a.names, CATALOGUE)
    if found is None:
        if a.shards or a.base_url:
            raise UsageError("-n and --base-url choose from a set of the catalogue; leave them out with URLs")
        folder = Path(a.out or "data/downloads")
    elif not found.train:
        print(f"{found.name} comes with the installation. Next:\n  pretrain train")
        return 0
    else:
        folder = Path(a.out or f"data/{found.name}")

    from pretrain.text.download import RetryPolicy, Unreachable, download_all

    items = _files_of_set(found, a.shards, a.base_url, folder) if found else _files_of_urls(a.names, folder)
    try:
        with _progress(items) as show:
            download_all(items, a.workers, RetryPolicy(a.tries, timeout=a.timeout), show)
    except Unreachable as error:
        raise DataError(
            f"{error}; check the network (behind a proxy: HTTPS_PROXY), or bring the files to {folder} from elsewhere"
        ) from None
    except KeyboardInterrupt:
        whole = sum(item.state in ("fetched", "kept") for item in items)
        raise Interrupted(
            f"interrupted: {whole} of {len(items)} files are in {folder}; the same command resumes from here"
        ) from None
    if failed := [item for item in items if item.state == "failed"]:
        width = max(len(item.file.name) for item in failed)
        print(f"{'file':<{width}}  tries  why", file=sys.stderr)
        for item in failed:
            print(f"{item.file.name:<{width}}  {item.tries:>5}  {item.problem}", file=sys.stderr)
        raise DataError(
            f"{len(failed)} of {len(items)} files could not be downloaded to {folder}, for the reasons above;"
            f" the same command tries them again"
        )
    kept = sum(item.state == "kept" for item in items)
    before = f", {kept} of them there before" if kept else ""
    print(f"{folder}: {len(items)} of {len(items)} files{before}, {_bytes(sum(item.done for item in items))}")
    last_file = bool(found and found.validation)
    if found and last_file:
        print(f"{found.validation}, the last of them, is to validate on.")
    data, tokens = shlex.quote(str(folder)), shlex.quote(f"{folder}-tokens")
    print(f"Next:\n  pretrain data prepare {data}{' --split last_file' * last_file} --out {tokens}")
    print(f"  pretrain train --data {data}{' --data.split last_file' * last_file}")
    return 0


def _find(names: Sequence[str], catalogue: dict[str, TextSet]) -> TextSet:
    """The set of that name. Raises UsageError with the nearest name if there is none."""
    if len(names) > 1:
        raise UsageError(f"one set at a time, or several URLs, not {shlex.join(names)}")
    if (found := catalogue.get(names[0].lower())) is not None:
        return found
    parts = [each for each in catalogue if names[0].lower() in each]
    hint = f"; did you mean '{parts[0]}'?" if len(parts) == 1 else did_you_mean(names[0], parts or [*catalogue])
    raise UsageError(f"no set named '{names[0]}' in the catalogue{hint}")


def _is_url(text: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        return False


def _files_of_urls(urls: Sequence[str], folder: Path) -> list[Download]:
    from pretrain.text.download import Download

    items: dict[str, Download] = {}
    for url in urls:
        name = urllib.parse.unquote(urllib.parse.urlsplit(url).path).rpartition("/")[2]
        if name in ("", ".", "..") or "\0" in name:
            raise UsageError(f"{url} does not end in the name of a file")
        if name in items:
            raise UsageError(f"two URLs end in the same name {name}; download them into two folders, one by one")
        items[name] = Download(url, folder / name)
    return list(items.values())


def _files_of_set(found: TextSet, train: int, base_url: str, folder: Path) -> list[Download]:
    """Raises DataError if the disk has no room for them."""
    from pretrain.text.download import Download

    items = []
    for name in found.files(train):
        url, file = found.url(name, base_url), folder / found.saved_as.get(name, name)
        size, sha256 = found.sizes.get(name, 0), found.sha256.get(name, "")
        items.append(Download(url, file, size, sha256, total=found.size_about(name)))
    missing = sum(
        item.total - (item.part.stat().st_size if item.part.exists() else 0) for item in items if not item.file.exists()
    )
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if missing > free:
        raise DataError(
            f"{folder}: the files take about {missing / 1e9:,.1f} GB and the disk has {free / 1e9:,.1f} GB free;"
            f" download fewer (-n), or to another disk (--out)"
        )
    return items


def _facts(each: TextSet) -> str:
    """A set of the catalogue, in a few lines."""
    count = len(each.train) + bool(each.validation)
    size = f"about {each.bytes / 1e9:,.0f} GB" if each.huge else _bytes(each.bytes)
    files = f"{count:,} file{'s' if count > 1 else ''}, {size}" if count else "nothing to download"
    amounts = [(each.characters, "characters"), (each.tokens, "tokens of GPT-2")]
    amount = ", ".join(
        f"{number / 1e9:,.0f} billion {unit}" if number >= 1e9 else f"{number:,} {unit}"
        for number, unit in amounts
        if number
    )
    validation = f"validation: {each.validation}" if each.validation else ""
    lines = [each.about, f"about {amount}" if each.huge else amount, validation, f"licence: {each.licence}", each.page]
    return "\n  ".join([f"{each.name}  ({files})", *filter(None, lines)])


def _bytes(number: int) -> str:
    from rich.filesize import decimal

    return decimal(number)


@contextmanager
def _progress(items: list[Download]) -> Iterator[Callable[[], None]]:
    """Show progress on standard error: bars on a terminal, else a line for each finished file."""
    from rich import progress as rich
    from rich.console import Console

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    bars = rich.Progress(
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.DownloadColumn(),
        rich.TransferSpeedColumn(),
        rich.TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    tasks = [bars.add_task(item.file.name, total=None, visible=False) for item in items]
    whole = bars.add_task(f"0 of {len(items)} files", total=None)
    ended: set[int] = set()

    def show() -> None:
        for number, item in enumerate(items):
            if item.state == "running":
                name = item.file.name + (f", try {item.tries}" if item.tries > 1 else "")
                total = item.total or None
                bars.update(tasks[number], visible=True, description=name, completed=item.done, total=total)
            elif item.state != "waiting" and number not in ended:
                ended.add(number)
                bars.update(tasks[number], visible=False)
                if not console.is_terminal:
                    what = {"kept": "there already", "failed": item.problem}.get(item.state, _bytes(item.done))
                    console.print(f"{item.file.name}  {what}", markup=False)
        ready = sum(item.state in ("fetched", "kept") for item in items)
        total = sum(item.total for item in items) or None
        bars.update(
            whole, description=f"{ready} of {len(items)} files", completed=sum(item.done for item in items), total=total
        )

    with bars:
        yield show
