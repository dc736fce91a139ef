"""The data of CORE: a folder, a zip file or a URL becomes a list of tasks, all checked before anything is measured.

    place → open_bundle → folder: core.yaml, eval_meta_data.csv, eval_data/**.jsonl → read_tasks → Task, Task, ...

The layout is nanochat's, whose bundle holds the 22 tasks of DCLM's CORE (arXiv 2406.11794).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import random
import stat
import tempfile
import urllib.parse
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from pretrain.errors import DataError
from pretrain.io import cache_folder, sha256_of

DEFAULT_BUNDLE = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"

CORE_TASKS = (
    "agi_eval_lsat_ar", "arc_challenge", "arc_easy", "bigbench_cs_algorithms", "bigbench_dyck_languages",
    "bigbench_language_identification", "bigbench_operators", "bigbench_qa_wikidata", "bigbench_repeat_copy_logic",
    "boolq", "commonsense_qa", "copa", "coqa", "hellaswag", "hellaswag_zeroshot", "jeopardy", "lambada_openai",
    "openbook_qa", "piqa", "squad", "winograd", "winogrande",
)  # fmt: skip
"""The labels of all tasks of CORE; a mean over fewer is partial and compares with nothing published."""

SHUFFLE_SEED = 1337

# Far above what a bundle needs (22 files, some 200 MB), far below what would hurt.
MAX_FILES = 10_000
MAX_BYTES = 4 * 2**30
MAX_RATIO = 200
RATIO_FREE_BYTES = 2**24
"""Files up to this size may have any ratio: short texts that repeat compress well and can do no harm."""


@dataclass(frozen=True)
class Example:
    """A question with its possible answers: one of the contexts, and one of the continuations, are variable.

    Multiple choice: one context, several continuations. Schema: several contexts, one continuation. Language
    modeling: one of each.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int
    """Which of the options is right."""

    def options(self, delimiter: str) -> list[str]:
        """The text of each option, in order."""
        return [context + delimiter + answer for context in self.contexts for answer in self.continuations]


@dataclass(frozen=True)
class Task:
    """One task of CORE with its examples, in the order in which they are asked."""

    label: str
    kind: str
    """multiple_choice, schema or language_modeling."""
    shots: int
    """Solved examples before each question."""
    delimiter: str
    """What stands between context and continuation."""
    baseline: float
    """Accuracy of guessing, 0 to 1."""
    examples: tuple[Example, ...]

    def centered(self, accuracy: float) -> float:
        """Accuracy on the scale on which guessing is 0 and perfection 1."""
        return (accuracy - self.baseline) / (1 - self.baseline)


def open_bundle(place: str = "") -> Path:
    """The folder of a bundle: given as it is, unpacked from a zip file, or downloaded first; kept in the user's cache.

    Args:
        place: a folder, a .zip file or an https:// URL; empty stands for nanochat's.

    Raises:
        DataError: it is not there, cannot be fetched, is not a bundle, or is a zip file that is not safe to unpack.
    """
    place = place or DEFAULT_BUNDLE
    path = _download(place) if "://" in place else Path(place).expanduser()
    if not path.exists():
        raise DataError(f"{path}: no such CORE bundle; give a folder with core.yaml, a .zip file or a URL")
    if path.is_file():
        path = _unpack(path, name=place)
    for folder in (path, path / "eval_bundle"):
        if (folder / "core.yaml").is_file():
            return folder
    raise DataError(f"{place} is not a CORE bundle: it has no core.yaml (nor has a folder eval_bundle in it)")


def read_tasks(folder: Path) -> list[Task]:
    """Read and check every task of a bundle; the examples of each are shuffled by seed 1337.

    Raises:
        DataError: a file is missing or malformed (it names file and line), or a task has too few examples for its
            solved ones.
    """
    file = folder / "core.yaml"
    try:
        tree = yaml.safe_load(_read(file))
    except yaml.YAMLError as error:
        raise DataError(f"{file} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("icl_tasks"), list):
        raise DataError(f"{file}: it must be a mapping with a list 'icl_tasks'")
    if not tree["icl_tasks"]:
        raise DataError(f"{file}: icl_tasks is empty; nothing to measure")
    baselines = _read_baselines(folder / "eval_meta_data.csv")
    return [_read_task(folder, entry, baselines) for entry in tree["icl_tasks"]]


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else f"not UTF-8: {error}"
        raise DataError(f"{file} cannot be read ({why}); is the bundle complete?") from None


def _read_baselines(file: Path) -> dict[str, float]:
    baselines = {}
    reader = csv.DictReader(io.StringIO(_read(file)))
    try:
        for row in reader:
            percent = float(row["Random baseline"])
            if not 0 <= percent < 100:
                raise DataError(f"{file}, line {reader.line_num}: a random baseline of {percent} % is not in [0, 100)")
            baselines[row["Eval Task"]] = percent / 100
    except (KeyError, TypeError, ValueError, csv.Error):
        where = f"{file}, line {reader.line_num}"
        raise DataError(f"{where}: it needs 'Eval Task' and 'Random baseline', a number") from None
    return baselines


def _read_task(folder: Path, entry: Any, baselines: dict[str, float]) -> Task:
    where = folder / "core.yaml"
    try:
        label, kind, uri = str(entry["label"]), entry["icl_task_type"], str(entry["dataset_uri"])
        shots, delimiter = entry["num_fewshot"][0], entry.get("continuation_delimiter", " ")
    except (KeyError, TypeError, IndexError, AttributeError):
        wanted = "label, icl_task_type, dataset_uri and num_fewshot (a list)"
        raise DataError(f"{where}: the task {entry!r} must have {wanted}") from None
    if kind not in _FIELDS:
        raise DataError(f"{where}: task '{label}' is of the unknown kind {kind!r}; there are {', '.join(_FIELDS)}")
    if type(shots) is not int or shots < 0 or not isinstance(delimiter, str):
        raise DataError(f"{where}: task '{label}' needs num_fewshot of 0 or more and a text as continuation_delimiter")
    if label not in baselines:
        raise DataError(f"{folder / 'eval_meta_data.csv'}: there is no random baseline for task '{label}'")
    data = folder / "eval_data"
    file = data / uri
    if not file.resolve().is_relative_to(data.resolve()):
        raise DataError(f"{where}: task '{label}' reads {uri}, which is outside of the bundle")
    examples = []
    for number, line in enumerate(_read(file).split("\n"), start=1):
        try:
            if line.strip():
                examples.append(_example(json.loads(line), kind))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}, line {number}: {error}") from None
    if len(examples) <= shots:
        raise DataError(
            f"{file}: task '{label}' shows {shots} solved examples before each question, but there are only"
            f" {len(examples)} examples in all; give more, or fewer shots in core.yaml"
        )
    random.Random(SHUFFLE_SEED).shuffle(examples)
    return Task(label, kind, shots, delimiter, baselines[label], tuple(examples))


# The fields of each kind of example: contexts, continuations.
_FIELDS = {
    "multiple_choice": ("query", "choices"),
    "schema": ("context_options", "continuation"),
    "language_modeling": ("context", "continuation"),
}


def _example(item: Any, kind: str) -> Example:
    """One line of a task's file. A ValueError says what is wrong with it."""
    if not isinstance(item, dict):
        raise ValueError("it must be a JSON object")
    contexts, continuations = (_texts(item, name) for name in _FIELDS[kind])
    if kind == "language_modeling":
        if not continuations[0].strip():
            raise ValueError("'continuation' is blank, so there is nothing to predict")
        # Some tasks have blanks around the context, which would become tokens of their own.
        return Example((contexts[0].strip(),), continuations, 0)
    gold, options = item.get("gold"), len(contexts) * len(continuations)
    if type(gold) is not int or not 0 <= gold < options:
        raise ValueError(f"'gold' must be the index of one of the {options} options, not {gold!r}")
    return Example(contexts, continuations, gold)


def _texts(item: dict[str, Any], name: str) -> tuple[str, ...]:
    value = item.get(name)
    several = name in ("choices", "context_options")
    texts = value if several else [value]
    if not isinstance(texts, list) or not texts or not all(isinstance(text, (str, int, float)) for text in texts):
        raise ValueError(f"'{name}' must be {'a list of texts' if several else 'a text'}, not {value!r}")
    return tuple(map(str, texts))


# Fetching and unpacking ------------------------------------------------------------------------------------------


def _download(url: str) -> Path:
    """The file behind a URL, from the cache if it was fetched before."""
    parts = urllib.parse.urlsplit(url)
    local = parts.hostname in ("127.0.0.1", "::1", "localhost")
    if parts.scheme != "https" and not (parts.scheme == "http" and local):
        raise DataError(f"{url}: only https:// is fetched; download it and give the file")
    from pretrain.text.download import download  # not above: most commands fetch nothing

    file = cache_folder() / "core/downloads" / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}.zip"
    try:
        return download(url, file, limit=MAX_BYTES)
    except DataError as error:
        raise DataError(f"{error}; fetch it elsewhere and give the file or folder: --core FILE") from None


def _unpack(file: Path, name: str) -> Path:
    """Unpack a zip file into the cache, once for each content. ``name`` is what the user calls it."""
    try:
        folder = cache_folder() / "core" / sha256_of(file)[:16]
        if folder.is_dir():
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="unpacking-") as temporary:
            with zipfile.ZipFile(file) as archive:
                _check(archive, name)
                archive.extractall(unpacked := Path(temporary, "bundle"))
            try:
                os.replace(unpacked, folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster
                    raise
        return folder
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise DataError(f"{name} is not a zip file that can be read ({error}); fetch it again") from None
    except OSError as error:
        raise DataError(f"{name} cannot be unpacked ({error}); give the folder of a bundle instead") from None


def _check(archive: zipfile.ZipFile, name: str) -> None:
    """Refuse what could write elsewhere or fill the disk; zipfile never unpacks more than an entry declares."""
    entries = archive.infolist()
    total = sum(entry.file_size for entry in entries)
    if len(entries) > MAX_FILES or total > MAX_BYTES:
        raise DataError(f"{name} would unpack to {len(entries):,} files of {total:,} bytes, which no CORE bundle has")
    for entry in entries:
        path = PurePosixPath(entry.filename)
        if path.is_absolute() or ".." in path.parts or "\\" in entry.filename or ":" in entry.filename:
            raise DataError(f"{name} has an entry '{entry.filename}' outside of its folder; not unpacked")
        if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise DataError(f"{name} has an entry '{entry.filename}' that is a link or a device; not unpacked")
        if entry.flag_bits & 1:
            raise DataError(f"{name} is encrypted; give one that is not")
        if entry.file_size > RATIO_FREE_BYTES and entry.file_size > MAX_RATIO * entry.compress_size:
            raise DataError(f"{name} has an entry '{entry.filename}' that is a zip bomb; not unpacked")
