"""The folders are layers: each imports only from those before it."""

import ast
from pathlib import Path

import pretrain

LAYERS = [
    "errors",
    "config",
    "io",
    "device",
    "model",
    "text",
    "tokenizer",
    "tokens",
    "sizing",
    "optim",
    "fitting",
    "runs",
    "hf",
    "generation",
    "evaluation",
    "training",
    "experiments",
    "plan",
    "report",
    "cli",
]
SOURCE = Path(pretrain.__file__).parent


def imported_folders(file: Path) -> set[str]:
    modules = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            modules += [node.module] if node.module != "pretrain" else [f"pretrain.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
    return {module.split(".")[1] for module in modules if module.startswith("pretrain.")}


def test_no_folder_imports_from_a_later_one():
    for file in SOURCE.rglob("*.py"):
        folder = file.relative_to(SOURCE).parts[0].removesuffix(".py")
        if folder in ("__init__", "__main__", "recipes"):
            continue
        later = LAYERS[LAYERS.index(folder) + 1 :]
        wrong = imported_folders(file) & set(later)
        assert not wrong, f"{file.relative_to(SOURCE)} imports from {wrong}, which come after {folder}"


def test_the_model_imports_only_the_configuration():
    for file in (SOURCE / "model").glob("*.py"):
        folders = imported_folders(file)
        assert folders <= {"config", "model"}, f"{file.name} imports {folders}"
        assert "distributed" not in file.read_text(encoding="utf-8")
