"""Execute the notebooks from top to bottom and store their outputs.

    python notebooks/run.py [--check] [--network] [NOTEBOOK ...]

Each runs in an empty folder, without a network unless --network is given. Stored outputs are the same on
every run, except in cells tagged `measured` (times, memory, versions): widget state, paths, execution
counters and progress bars are removed. --check executes, writes nothing, and lists the other cells whose
outputs differ from the stored ones; a notebook that fails ends it with status 1.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

import mixtral_offload

HERE = Path(__file__).parent
MEASURED = "measured"
PROGRESS = re.compile(r"\d+%\|")
WIDGET = "application/vnd.jupyter.widget-view+json"
#: put on the kernel's path, it cuts the network off (except loopback, which the kernel itself uses)
NO_NETWORK = """
import socket
_connect = socket.socket.connect
def connect(self, address):
    is_local = str(address[0]).startswith(("127.", "::1", "localhost"))
    if self.family in (socket.AF_INET, socket.AF_INET6) and not is_local:
        raise OSError(101, "the network is off", address[0])
    return _connect(self, address)
socket.socket.connect = connect
socket.getaddrinfo = lambda *a, **k: (_ for _ in ()).throw(socket.gaierror(-2, "the network is off"))
"""


def execute(path: Path, network: bool) -> tuple[nbformat.NotebookNode, float]:
    """Execute and normalise a notebook; return it and the seconds it took.

    Raises:
        CellExecutionError: A cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as first_on_path:
        environment = dict(os.environ, PYDEVD_DISABLE_FILE_VALIDATION="1")
        if not network:
            (Path(first_on_path) / "sitecustomize.py").write_text(NO_NETWORK)
            environment["PYTHONPATH"] = os.pathsep.join([first_on_path, os.environ.get("PYTHONPATH", "")])
        client = NotebookClient(notebook, timeout=900, resources={"metadata": {"path": folder}})
        client.extra_arguments = ["--log-level=ERROR"]  # kernels warn of eavesdroppers on loopback
        client.execute(env=environment)
        normalise(notebook, folder)
    return notebook, time.perf_counter() - begin


def normalise(notebook: nbformat.NotebookNode, folder: str) -> None:
    """Remove what differs from run to run."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    number = 0
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        number += 1
        cell.execution_count = number
        cell.outputs = [clean(output, folder, number) for output in merged(cell.outputs)]
        cell.outputs = [output for output in cell.outputs if output.get("data") or output.get("text")]


def merged(outputs: list) -> list:
    """Join neighbouring pieces of the same stream."""
    found: list = []
    for output in outputs:
        same = found and output.output_type == "stream" == found[-1].output_type
        if same and found[-1].name == output.name:
            found[-1].text += output.text
        else:
            found.append(output)
    return found


def clean(output, folder: str, number: int):
    """Remove widgets, paths and overwritten lines from one output."""
    if output.output_type == "stream":
        lines = [line.rsplit("\r", 1)[-1] for line in output.text.split("\n")]
        text = "\n".join(line for line in lines if not PROGRESS.search(line))
        output.text = shorten(text, folder) if text.strip() else ""
        return output
    if "execution_count" in output:
        output.execution_count = number
    output.get("data", {}).pop(WIDGET, None)
    for kind in ("text/plain", "text/html"):
        if kind in output.get("data", {}):
            output.data[kind] = shorten(output.data[kind], folder)
    return output


def shorten(text: str, folder: str) -> str:
    """Write paths as a reader would, and remove addresses of objects."""
    package = str(Path(mixtral_offload.__file__).parent.parent)
    for long, short in (
        (os.path.realpath(folder), "."),
        (folder, "."),
        (package + os.sep, ""),
        (str(Path.home()), "~"),
    ):
        text = text.replace(long, short)
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def differences(new: nbformat.NotebookNode, old: nbformat.NotebookNode) -> list[str]:
    """Name the cells whose outputs are not the stored ones."""
    found = []
    for number, (a, b) in enumerate(zip(new.cells, old.cells)):
        if a.cell_type == "code" and MEASURED not in a.metadata.get("tags", []) and a.outputs != b.outputs:
            found.append(f"cell {number}: {a.source.splitlines()[0][:60]}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all")
    parser.add_argument("--check", action="store_true", help="write nothing, compare with what is stored")
    parser.add_argument("--network", action="store_true", help="do not cut the network off")
    arguments = parser.parse_args()
    failed, total = 0, 0.0
    for path in arguments.notebooks or sorted(HERE.glob("*.ipynb")):
        try:
            notebook, seconds = execute(path, arguments.network)
        except CellExecutionError as error:
            print(f"{path.name}: FAILED\n{error}", flush=True)
            failed += 1
            continue
        total += seconds
        changed = differences(notebook, nbformat.read(path, as_version=4))
        print(
            f"{path.name}: {seconds:.0f} s" + "".join(f"\n  not as stored: {line}" for line in changed),
            flush=True,
        )
        if not arguments.check:
            path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    print(f"{total:.0f} s in all, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
