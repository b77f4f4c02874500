"""The public names: imported lazily, and visible to completion and type checkers."""

import ast
import subprocess
import sys
from pathlib import Path

import mixtral_offload


def test_every_public_name_exists():
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
    root = Path(mixtral_offload.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code, *options], cwd=root, check=True, stdout=subprocess.DEVNULL)
