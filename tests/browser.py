"""JupyterLab on localhost and headless Chromium: what a person with a notebook sees.

Needs jupyterlab, ipykernel and playwright from PyPI, and Debian's chromium on the PATH.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

# No look-ups in the background: the tests must not depend on the internet.
CHROMIUM_FLAGS = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
KERNEL_STATUS = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status"


def missing() -> str:
    """What the browser tests need and this machine lacks; empty if nothing."""
    modules = [
        name for name in ("playwright", "jupyterlab", "ipykernel") if not importlib.util.find_spec(name)
    ]
    return ", ".join(modules + ([] if shutil.which("chromium") else ["chromium"]))


@contextmanager
def jupyterlab(folder: Path):
    """Serve `folder`; gives the address as a format string: url.format("name.ipynb").

    Its own settings and kernel, so that nothing of this machine's Jupyter set-up gets in. Its output is in
    `folder/.jupyter/log`.
    """
    home = folder / ".jupyter"
    _configure(home)
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_PATH", "IPYTHONDIR")
    environment = os.environ | dict.fromkeys(names, str(home))
    with open(home / "log", "wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--allow-root"],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        yield _address(server, home)
    finally:
        _kill(server)


def _configure(home: Path) -> None:
    """Any free port, no browser, no question about news; the one kernel is this Python."""
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    files = {
        "kernels/python3/kernel.json": {"argv": argv, "display_name": "This Python", "language": "python"},
        "jupyter_lab_config.json": {
            "ServerApp": {"port": 0, "ip": "127.0.0.1", "root_dir": str(home.parent)},
            "LabApp": {"open_browser": False, "expose_app_in_browser": True, "user_settings_dir": str(home)},
        },
        "@jupyterlab/apputils-extension/notification.jupyterlab-settings": {
            "fetchNews": "false",
            "checkForUpdates": False,
        },
    }
    for name, content in files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(json.dumps(content))


def _address(server: subprocess.Popen, home: Path, seconds: float = 60) -> str:
    """Wait for the file in which the server tells its port and token."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and server.poll() is None:
        for path in home.glob("jpserver-*.json"):
            try:
                info = json.loads(path.read_text())
            except ValueError:  # half written
                continue
            return f"{info['url']}doc/tree/{{}}?token={info['token']}"
        time.sleep(0.1)
    raise RuntimeError(f"JupyterLab did not start:\n{(home / 'log').read_text()[-3000:]}")


def _kill(server: subprocess.Popen) -> None:
    """The kernels too: they run in process groups of their own."""
    try:
        processes = psutil.Process(server.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        processes = []
    server.terminate()
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


@contextmanager
def chromium(**options):
    """A page in a headless browser; `options` as for Playwright's `new_page`."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=CHROMIUM_FLAGS)
        try:
            yield browser.new_page(**options)
        finally:
            browser.close()


def open_notebook(page, url: str, name: str) -> None:
    """Open it as the single document and wait for its kernel."""
    page.goto(url.format(name))
    page.locator(".jp-Notebook .jp-Cell").first.wait_for()
    page.wait_for_function(f"{KERNEL_STATUS} === 'idle'")


def run_all(page) -> None:
    """Run every cell and wait for the last."""
    page.evaluate("jupyterapp.commands.execute('notebook:run-all-cells')")
