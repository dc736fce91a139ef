import importlib.util
from pathlib import Path

from tests.conftest import TINY

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_train_in_python(text_file: Path, tmp_path: Path, capsys):
    spec = importlib.util.spec_from_file_location("example", EXAMPLES / "train_in_python.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main(str(text_file), str(tmp_path / "run"), **TINY)
    printed = capsys.readouterr().out
    assert "bits per byte" in printed
    assert "The " in printed
