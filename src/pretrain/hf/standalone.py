"""One of our modules as a single file: with all it uses of pretrain written into it, and nothing else of pretrain."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class _Module:
    """The top level of a module: what it defines, and where the names that it imports come from."""

    doc: str
    definitions: dict[str, tuple[ast.stmt, str]]  # name → its statement and source
    imports: dict[str, tuple[str, str | None, int]]  # name → (module, name there or None for the module, dots)


def standalone(module: str) -> str:
    """The source of ``module`` with every definition that it reaches in other modules of pretrain before its own.

    Imports of other packages, and relative ones, stay. Definitions come after those they use.
    """
    done: dict[str, str] = {}  # name → the module that defines it
    sources: list[str] = []
    imports: set[tuple[str, str | None, str, int]] = set()

    def include(home: str, name: str) -> None:
        top = _read(home)
        if name in top.definitions:
            if name in done:
                assert done[name] == home, f"{name} is defined in both {done[name]} and {home}"
                return
            statement, source = top.definitions[name]
            done.update(dict.fromkeys(_names(statement), home))
            for node in ast.walk(statement):
                if isinstance(node, ast.Name):
                    include(home, node.id)
            sources.append(source)
        elif name in top.imports:
            origin, original, dots = top.imports[name]
            if origin.split(".")[0] == "pretrain" and not dots:
                assert original == name, f"{home} renames {origin}.{original}, which cannot be written into one file"
                include(origin, name)
            else:
                imports.add((origin, original, name, dots))

    for name in _read(module).definitions:
        include(module, name)
    lines = sorted(_import_line(*each) for each in imports)
    head = f'"""{_read(module).doc}"""\n\nfrom __future__ import annotations\n\n' + "\n".join(lines)
    return "\n\n\n".join([head, *sources]) + "\n"


def _import_line(origin: str, original: str | None, name: str, dots: int) -> str:
    if original is None:
        return f"import {origin}" if origin == name else f"import {origin} as {name}"
    return f"from {'.' * dots}{origin} import {original}" + ("" if original == name else f" as {name}")


@cache
def _read(module: str) -> _Module:
    spec = find_spec(module)
    assert spec is not None, module
    assert spec.origin is not None, module
    text = Path(spec.origin).read_text(encoding="utf-8")
    lines, tree = text.splitlines(), ast.parse(text)
    definitions: dict[str, tuple[ast.stmt, str]] = {}
    imports: dict[str, tuple[str, str | None, int]] = {}
    for statement, following in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(statement, ast.Import):
            imports |= {alias.asname or alias.name: (alias.name, None, 0) for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom) and statement.module != "__future__":
            origin = statement.module or ""
            imports |= {alias.asname or alias.name: (origin, alias.name, statement.level) for alias in statement.names}
        for name in _names(statement):
            first = min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", []))])
            while first > 1 and lines[first - 2].startswith("#"):  # a comment that belongs to it
                first -= 1
            last = statement
            if isinstance(statement, (ast.Assign, ast.AnnAssign)) and _is_text(following):
                last = following  # the docstring of a constant
            assert last is not None
            definitions[name] = (statement, "\n".join(lines[first - 1 : last.end_lineno]))
    return _Module(ast.get_docstring(tree, clean=False) or "", definitions, imports)


def _names(statement: ast.stmt) -> list[str]:
    """The names that a statement at the top of a module defines."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    targets = [statement.target] if isinstance(statement, ast.AnnAssign) else targets
    return [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]


def _is_text(statement: ast.stmt | None) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )
