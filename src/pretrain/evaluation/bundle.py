"""The data of CORE: a folder, a zip file or a URL becomes a list of tasks, all checked before anything is measured.

    place → open_bundle → folder: core.yaml, eval_meta_data.csv, eval_data/**.jsonl → read_tasks → Task, Task, ...

The layout is nanochat's, whose bundle holds the 22 tasks of DCLM's CORE (arXiv 2406.11794).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
import urllib.parse
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import yaml
from msgspec import Meta, Struct

from pretrain.errors import DataError
from pretrain.io import cache_folder, expand

DEFAULT_BUNDLE = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"

CORE_TASKS = (
    "agi_eval_lsat_ar", "arc_challenge", "arc_easy", "bigbench_cs_algorithms", "bigbench_dyck_languages",
    "bigbench_language_identification", "bigbench_operators", "bigbench_qa_wikidata", "bigbench_repeat_copy_logic",
    "boolq", "commonsense_qa", "copa", "coqa", "hellaswag", "hellaswag_zeroshot", "jeopardy", "lambada_openai",
    "openbook_qa", "piqa", "squad", "winograd", "winogrande",
)  # fmt: skip
"""The labels of all tasks of CORE; a mean over fewer is partial and compares with nothing published."""

MAX_BYTES = 4 * 2**30
"""Of a bundle's texts; the real one has some 200 MB."""

Folder = Path | zipfile.Path


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


def open_bundle(place: str = "") -> Folder:
    """The folder of a bundle, which may be inside a zip file. Zip files are never unpacked; downloads are kept.

    Args:
        place: a folder, a .zip file or an https:// URL; empty stands for nanochat's.

    Raises:
        DataError: it is not there, cannot be fetched, or is not a bundle.
    """
    place = place or DEFAULT_BUNDLE
    path: Folder = _download(place) if "://" in place else expand(place)
    if path.is_file():
        try:
            archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError) as error:
            raise DataError(f"{place} is not a zip file that can be read ({error}); fetch it again") from None
        if (total := sum(entry.file_size for entry in archive.infolist())) > MAX_BYTES:
            raise DataError(f"{place} would unpack to {total:,} bytes, which no CORE bundle has; give another")
        path = zipfile.Path(archive)
    for folder in (path, path / "eval_bundle"):
        if (folder / "core.yaml").is_file():
            return folder
    raise DataError(f"{place} is no CORE bundle: it has no core.yaml; give a folder that does, a .zip file or a URL")


def _download(url: str) -> Path:
    """The file behind a URL, from the cache if it was fetched before."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https" and parts.hostname not in ("127.0.0.1", "::1", "localhost"):
        raise DataError(f"{url}: only https:// is fetched; download it and give the file")
    from pretrain.text.download import download  # not above: most commands fetch nothing

    file = cache_folder() / "core/downloads" / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}.zip"
    try:
        return download(url, file, limit=MAX_BYTES)
    except DataError as error:
        options = "pretrain eval --core, pretrain train --eval.core_bundle"
        raise DataError(f"{error}; fetch it elsewhere and give the file or folder ({options})") from None


class _Entry(Struct):
    """A task in core.yaml."""

    label: str
    icl_task_type: Literal["multiple_choice", "schema", "language_modeling"]
    dataset_uri: str
    num_fewshot: Annotated[list[Annotated[int, Meta(ge=0)]], Meta(min_length=1)]
    continuation_delimiter: str = " "


class _Tasks(Struct):
    icl_tasks: Annotated[list[_Entry], Meta(min_length=1)]


def read_tasks(folder: Folder) -> list[Task]:
    """Read and check every task of a bundle; the examples of each are shuffled by seed 1337.

    Raises:
        DataError: a file is missing or malformed (it names file and line), or a task has too few examples for its
            solved ones.
    """
    file = folder / "core.yaml"
    try:
        entries = msgspec.convert(yaml.safe_load(_read(file)), _Tasks).icl_tasks
    except (yaml.YAMLError, msgspec.ValidationError) as error:
        raise DataError(f"{file} is not a list of CORE tasks: {' '.join(str(error).split())}") from None
    baselines = _read_baselines(folder / "eval_meta_data.csv")
    return [_read_task(folder, entry, baselines) for entry in entries]


def _read(file: Folder) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise DataError(f"{file} cannot be read ({error}); is the bundle complete?") from None


def _read_baselines(file: Folder) -> dict[str, float]:
    baselines, reader = {}, csv.DictReader(io.StringIO(_read(file)))
    try:
        for row in reader:
            baselines[row["Eval Task"]] = float(row["Random baseline"]) / 100
            if not 0 <= baselines[row["Eval Task"]] < 1:
                raise ValueError
    except (KeyError, TypeError, ValueError, csv.Error):
        wanted = "it needs 'Eval Task' and 'Random baseline', a percentage below 100"
        raise DataError(f"{file}, line {reader.line_num}: {wanted}") from None
    return baselines


def _read_task(folder: Folder, entry: _Entry, baselines: dict[str, float]) -> Task:
    label, kind, shots = entry.label, entry.icl_task_type, entry.num_fewshot[0]
    file = folder / "eval_data" / entry.dataset_uri
    if entry.dataset_uri.startswith("/") or ".." in entry.dataset_uri:
        raise DataError(f"{folder / 'core.yaml'}: task '{label}' reads a file outside of the bundle: {file}")
    if label not in baselines:
        raise DataError(f"{folder / 'eval_meta_data.csv'}: there is no random baseline for task '{label}'")
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
    random.Random(1337).shuffle(examples)
    return Task(label, kind, shots, entry.continuation_delimiter, baselines[label], tuple(examples))


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
