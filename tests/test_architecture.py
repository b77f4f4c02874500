"""The walks of docs/architecture.md name files and functions that exist, in the stated number of steps."""

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
