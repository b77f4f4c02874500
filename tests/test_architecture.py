"""The walks of docs/architecture.md name what exists, in the stated number of steps; nothing is too long."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
STEP = re.compile(r"^\d\. \*\*`([\w/]+)\.py`, `([\w.]+)`\*\*", re.MULTILINE)


@pytest.mark.parametrize("title, count", [("One token's way", 7), ("One checkpoint's way", 6)])
def test_each_step_is_there(title, count):
    section = TEXT.split(f"## {title}\n")[1].split("\n## ")[0]
    steps = STEP.findall(section)
    assert len(steps) == len({file for file, _ in steps}) == count and section.count("\n") < 45
    for file, name in steps:
        found = importlib.import_module("mixtral_offload." + file.replace("/", "."))
        if name == "pieces":  # of both stores
            assert found.RamStore.pieces and found.FileStore.pieces
            continue
        for part in name.split("."):
            found = getattr(found, part)


def test_every_file_it_names_exists():
    assert all((ROOT / "mixtral_offload" / name).is_file() for name in re.findall(r"`([\w/]+\.py)`", TEXT))


def _body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its signature and docstring."""
    has_docstring = ast.get_docstring(function) is not None and len(function.body) > 1
    first = function.body[1 if has_docstring else 0]
    return function.end_lineno - first.lineno + 1


def test_no_file_and_no_function_is_long():
    package = ROOT / "mixtral_offload"
    files = [path for suffix in ("py", "c", "h") for path in package.rglob(f"*.{suffix}")]
    assert len(files) > 100
    assert [path for path in files if path.read_text(encoding="utf-8").count("\n") > 600] == []
    long = []
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _body_lines(node) > 50:
                long.append((path.name, node.name))
    assert long == []
