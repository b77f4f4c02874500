"""The stored notebooks and the two scripts in their folder. `.ci/run` executes the notebooks."""

import re
import runpy
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SLUG = runpy.run_path(ROOT / "notebooks" / "set_slug.py")
RUN = runpy.run_path(ROOT / "notebooks" / "run.py")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    found = nbformat.read(request.param, as_version=4)
    found.path = request.param
    return found


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def prose(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]


def test_they_are_numbered_and_linked():
    assert [path.name[0] for path in NOTEBOOKS] == [str(n) for n in range(len(NOTEBOOKS))]
    for path in NOTEBOOKS:
        for link in re.findall(r"\]\((\d_\w+\.ipynb)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / link).is_file(), f"{path.name} links to {link}"


def test_each_opens_in_colab_says_what_it_takes_and_what_to_do_if_it_fails(notebook):
    texts, name = prose(notebook), notebook.path.name
    slug = SLUG["slug"]()
    assert texts[0].startswith("# ")
    assert f"(https://colab.research.google.com/github/{slug}/blob/main/notebooks/{name})" in texts[0]
    for word in ("minute", "disk", "RAM", "VRAM"):
        assert word in texts[0]
    assert texts[-1].startswith("## If this failed")


def test_the_slug_stands_in_one_place(notebook):
    assert set(SLUG["slugs_in"](notebook.path)) == {SLUG["slug"]()}
    assert len(SLUG["slugs_in"](notebook.path)) == 2  # badge and setup cell


def test_the_first_cell_sets_up_the_same_everywhere(notebook):
    first = nbformat.read(NOTEBOOKS[0], as_version=4)
    assert code(notebook)[0].source == code(first)[0].source
    assert "upgrade" not in code(notebook)[0].source and "-U" not in code(notebook)[0].source


def test_cells_are_short_and_prose_is_about_as_long_as_code(notebook):
    lengths = [len(cell.source.splitlines()) for cell in code(notebook)[1:]]
    assert statistics.median(lengths) <= 7 and max(lengths) <= 16
    steps = [text for text in prose(notebook)[1:] if not text.startswith("## If this failed")]
    n_prose, n_code = sum(map(len, steps)), sum(len(cell.source) for cell in code(notebook)[1:])
    assert 0.5 < n_prose / n_code < 2.2
    assert not any(re.search(r"^\s*(def|class) ", cell.source, re.MULTILINE) for cell in code(notebook))


def test_they_are_stored_executed_without_errors_widgets_or_paths(notebook):
    assert [cell.execution_count for cell in code(notebook)] == [*range(1, len(code(notebook)) + 1)]
    assert "widgets" not in notebook.metadata
    for cell in code(notebook):
        for output in cell.outputs:
            assert output.output_type != "error"
            assert RUN["WIDGET"] not in output.get("data", {})
            text = output.get("text", "") + output.get("data", {}).get("text/plain", "")
            assert not re.search(r"(/(root|home|tmp|Users|work|opt|usr)/|[A-Z]:\\)", text), text
    assert sum(bool(cell.outputs) for cell in code(notebook)) >= 3


def test_pictures_are_stored_where_pictures_are_drawn(notebook):
    for cell in code(notebook):
        if cell.source.splitlines()[-1] == "figure":
            assert any("image/png" in output.get("data", {}) for output in cell.outputs)


def test_the_slug_is_written_everywhere(tmp_path):
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    shutil.copy(ROOT / "setup.py", tmp_path)
    subprocess.run([sys.executable, tmp_path / "notebooks" / "set_slug.py", "someone/else.where"], check=True)
    assert 'GITHUB = "someone/else.where"' in (tmp_path / "setup.py").read_text()
    for path in (tmp_path / "notebooks").glob("*.ipynb"):
        assert SLUG["slugs_in"](path) == ["someone/else.where"] * 2
        nbformat.validate(nbformat.read(path, as_version=4))


def test_what_differs_from_run_to_run_is_not_stored():
    bar = new_output("stream", name="stderr", text="\rexperts:  10%|#   |\rexperts: 100%|####|\n")
    view = new_output(
        "display_data", data={"text/plain": "<Box at 0x7f0a>", RUN["WIDGET"]: {"model_id": "1"}}
    )
    parts = [new_output("stream", name="stdout", text=text) for text in ("in ", "/tmp/folder/here\n")]
    cell = new_code_cell(
        "x", outputs=[bar, view, *parts], execution_count=7, metadata={"execution": {"t": "1"}}
    )
    notebook = new_notebook(cells=[cell], metadata={"widgets": {"state": {}}})
    RUN["normalise"](notebook, "/tmp/folder")
    assert (
        cell.execution_count == 1 and "execution" not in cell.metadata and "widgets" not in notebook.metadata
    )
    assert [output.get("text") or output.data for output in cell.outputs] == [
        {"text/plain": "<Box>"},
        "in ./here\n",
    ]


def run_one(tmp_path, source: str):
    path = tmp_path / "one.ipynb"
    path.write_text(nbformat.writes(new_notebook(cells=[new_code_cell(source)])))
    command = [sys.executable, ROOT / "notebooks" / "run.py", "--check", path]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_notebook_that_fails_or_wants_the_network_is_a_failure(tmp_path):
    done = run_one(tmp_path, "1 / 0")
    assert done.returncode == 1 and "ZeroDivisionError" in done.stdout
    done = run_one(tmp_path, "import socket; socket.create_connection(('203.0.113.1', 80), 3)")
    assert done.returncode == 1 and "the network is off" in done.stdout
    done = run_one(tmp_path, "import urllib.request; urllib.request.urlopen('http://example.com')")
    assert done.returncode == 1 and "the network is off" in done.stdout
    done = run_one(tmp_path, "1 + 1")
    assert done.returncode == 0 and "not as stored: cell 0: 1 + 1" in done.stdout
