"""The folders are a one-way street: each imports only from those before it."""

import ast
from pathlib import Path

import pretrain

STREET = [
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
    "runs",
    "hf",
    "evaluation",
    "generation",
    "training",
    "plan",
    "report",
    "cli",
]
SOURCE = Path(pretrain.__file__).parent


def imported_rooms(file: Path) -> set[str]:
    modules = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            modules += [node.module] if node.module != "pretrain" else [f"pretrain.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
    return {module.split(".")[1] for module in modules if module.startswith("pretrain.")}


def test_no_room_imports_from_a_later_one():
    for file in SOURCE.rglob("*.py"):
        room = file.relative_to(SOURCE).parts[0].removesuffix(".py")
        if room in ("__init__", "__main__", "recipes"):
            continue
        later = STREET[STREET.index(room) + 1 :]
        wrong = imported_rooms(file) & set(later)
        assert not wrong, f"{file.relative_to(SOURCE)} imports from {wrong}, which come after {room}"


def test_the_model_knows_nothing_of_the_machine():
    for file in (SOURCE / "model").glob("*.py"):
        rooms = imported_rooms(file)
        assert rooms <= {"config", "model"}, f"{file.name} imports {rooms}"
        assert "distributed" not in file.read_text(encoding="utf-8")
