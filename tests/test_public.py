"""The public names: imported lazily, and visible to completion and type checkers."""

import ast
import importlib
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import mixtral_offload

ROOT = Path(mixtral_offload.__file__).parents[1]


def test_every_public_name_can_be_imported_and_type_checked():
    names = set(mixtral_offload.__all__)
    assert names == set(mixtral_offload._MODULES) and names <= set(dir(mixtral_offload))
    assert all(getattr(mixtral_offload, name) is not None for name in names)
    tree = ast.parse(Path(mixtral_offload.__file__).read_text())
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))  # if TYPE_CHECKING
    imported = {
        alias.name: node.module.removeprefix("mixtral_offload.")
        for node in checked.body
        for alias in node.names
    }
    assert imported == mixtral_offload._MODULES
    assert Path(mixtral_offload.__file__).with_name("py.typed").is_file()


def test_the_package_and_the_core_need_no_torch():
    modules = "mixtral_offload, mixtral_offload.errors, mixtral_offload.units"
    core = Path(mixtral_offload.__file__).with_name("core")
    modules += "".join(f", mixtral_offload.core.{path.stem}" for path in core.glob("[a-z]*.py"))
    code = f"import sys, {modules}; assert not {{'torch', 'transformers', 'matplotlib'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_tests_of_the_core_need_no_torch():
    code = "import sys; sys.modules['torch'] = None; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    options = ["-q", "-n", "0", "-p", "no:cacheprovider", "-o", "addopts=", "--collect-only", "tests/core"]
    subprocess.run([sys.executable, "-c", code, *options], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


#: private names of other libraries, where there is no public way: name -> why
FOREIGN = {
    "_apply_gate": "transformers: the activation of a family's experts, a method of its experts module",
    "_experts_implementation": "transformers: the implementation of experts that a configuration names",
    "_get_dtype_plan": "transformers: the modules that stay in float32",
    "_init_weights": "transformers: fills the buffers that no checkpoint has",
    "_keys_to_ignore_on_load_unexpected": "transformers: tensors that a family ignores",
    "_supports_default_dynamic_cache": "transformers: whether a model's KV cache is a DynamicCache",
    "_buffers": "torch.nn.Module: replaced without registering again",
    "_modules": "torch.nn.Module: the same",
    "_parameters": "torch.nn.Module: the same",
    "_non_persistent_buffers_set": "torch.nn.Module: the buffers that are not saved",
    "_forward_hooks": "torch.nn.Module: seen by a chat, whose KV cache depends on them",
    "_forward_pre_hooks": "torch.nn.Module: the same",
    "_version": "torch.Tensor: counts changes in place",
    "_is_owned": "threading.RLock: whether this thread holds it",
    "_replace": "namedtuple: public, in spite of its name",
}


def private(name: str | None) -> bool:
    return name is not None and name.startswith("_") and not name.endswith("__")


def of_itself(node: ast.Attribute) -> bool:
    """Whether it is an attribute of self, cls or super()."""
    return ast.unparse(node.value) in ("self", "cls", "super()")


def own_names(tree: ast.AST) -> set[str]:
    """Private names that a file defines: methods, fields, and attributes set on `self` or `cls`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and of_itself(node):
            found.add(node.attr)
    return found


def foreign_uses(path: Path) -> list[str]:
    """Private names that a file takes from another one: imports, and attributes of other objects."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    known, found = own_names(tree) | FOREIGN.keys(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names if private(alias.name)]
        elif isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in known:
            names = [] if of_itself(node) else [ast.unparse(node)]
        else:
            continue
        found += [f"{path.relative_to(ROOT)}:{node.lineno}: {name}" for name in names]
    return found


def test_private_names_stay_in_their_files():
    folders = ("mixtral_offload", "benchmarks", "training", "docs", "notebooks")
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    found = [use for path in paths for use in foreign_uses(path)]
    assert not found, "make public what other files need, or move it:\n" + "\n".join(found)


def imports(source: str) -> list[tuple[str, str]]:
    """(module, name) of each import from this package, also indented; cells may hold `%pip`."""
    found = re.findall(r"^ *from (mixtral_offload[\w.]*) import ([\w, ]+)", source, re.MULTILINE)
    return [(module, name.split(" as ")[0].strip()) for module, names in found for name in names.split(",")]


def test_what_the_notebooks_and_pages_import_exists():
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", ROOT / "docs" / "index.md")]
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        sources += ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    missing = {
        f"{module}: {name}"
        for module, name in itertools.chain.from_iterable(map(imports, sources))
        if not hasattr(importlib.import_module(module), name)
    }
    assert not missing
