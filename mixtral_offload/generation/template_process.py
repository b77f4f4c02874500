"""The process that renders chat templates (`template_worker.py`): started, asked, watched and killed.

It is started for the first rendering, in about 0.1 s, and kept; later ones take well under a millisecond.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

import psutil

from mixtral_offload.errors import TemplateError
from mixtral_offload.generation.template_worker import RENDER_S

START_S = 60.0  # for the process to start, on a busy machine too
MEMORY_BYTES = 512 << 20  # of that process
#: {"text"}, or {"error", "kind"}: see `template_worker.py`
Reply = dict[str, Any]


class Renderer:
    """A running process that renders templates."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        flags = getattr(subprocess, "CREATE_NO_WINDOW", 0)
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(Path(__file__).with_name("template_worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            creationflags=flags | getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
        assert self._process.stdin is not None and self._process.stdout is not None  # pipes
        self._requests = self._process.stdin
        self._replies: queue.SimpleQueue[Reply | None] = queue.SimpleQueue()
        threading.Thread(
            target=self._read, args=(self._process.stdout,), name="template-replies", daemon=True
        ).start()
        self._send({"path": [path for path in sys.path if path], "memory_bytes": MEMORY_BYTES})
        if "ready" not in (first := self.receive(START_S)):
            raise TemplateError("cannot start the process that renders chat templates", found=first["error"])

    def ask(self, request: dict[str, Any]) -> Reply:
        """Render one template, see `ask`."""
        self._send(request)
        return self.receive(RENDER_S)

    @property
    def is_alive(self) -> bool:
        """Whether the process runs, and is this process's own: a fork copies this object."""
        return self._process.poll() is None and self.pid == os.getpid()

    def close(self) -> None:
        """Kill the process; in a forked child do nothing, since it is the parent's."""
        if self.pid != os.getpid():
            return
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(OSError):
            self._requests.close()

    def _send(self, request: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the process has died: `receive` reports it
            self._requests.write(json.dumps(request).encode() + b"\n")
            self._requests.flush()

    def receive(self, most_s: float) -> Reply:
        """Return the next reply; kill the process at a bound, and return an error of kind time or memory."""
        deadline = time.monotonic() + most_s
        while True:
            try:
                reply = self._replies.get(timeout=0.02)
            except queue.Empty:
                pass
            else:
                if reply is not None:
                    return reply
                self.close()
                return {"kind": "memory", "error": "the process that renders it has died"}
            if time.monotonic() > deadline:
                self.close()
                return {"kind": "time", "error": f"it is not done after {most_s:g} s"}
            if self._used_bytes() > MEMORY_BYTES:
                self.close()
                return {"kind": "memory", "error": f"it needs more than {MEMORY_BYTES >> 20} MiB"}

    def _used_bytes(self) -> int:
        try:
            return int(psutil.Process(self._process.pid).memory_info().rss)
        except psutil.Error:
            return 0

    def _read(self, replies: IO[bytes]) -> None:
        """Runs in a thread: queue each reply, and None at the end."""
        with contextlib.suppress(OSError, ValueError), replies:
            for line in replies:
                self._replies.put(json.loads(line))
        self._replies.put(None)


_renderer: Renderer | None = None
_lock = threading.Lock()


def ask(request: dict[str, Any]) -> Reply:
    """Render a template within the bounds of time, memory and text; start the process if none runs.

    Args:
        request: {"template", "variables", "most_characters"}, in JSON's types.

    Returns:
        {"text"}, or {"error", "kind"} with kind "refused", "broken", "memory" or "time".

    Raises:
        TemplateError: The process cannot be started.
    """
    global _renderer
    with _lock:
        try:
            if _renderer is None or not _renderer.is_alive:
                _close()
                _renderer = Renderer()
            return _renderer.ask(request)
        except OSError as error:
            raise TemplateError(
                "cannot start the process that renders chat templates",
                path=sys.executable,
                found=error,
                hint="free resources for another process and about 50 MB of memory",
            ) from error
        except BaseException:  # an interrupt: the next reply would be of this request
            _close()
            raise


def _close() -> None:
    global _renderer
    if _renderer is not None:
        renderer, _renderer = _renderer, None
        renderer.close()


def _after_fork() -> None:
    """In a forked child: the process is the parent's, which may have held the lock."""
    global _renderer, _lock
    _renderer, _lock = None, threading.Lock()


atexit.register(_close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
