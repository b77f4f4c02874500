"""A hub on 127.0.0.1 for tests: serves a folder as one repository, and misbehaves on demand.

Has the routes with which huggingface_hub reads a model: its description with file hashes, the tree listing,
and HEAD and GET of a file with ETag, commit, size and Range. No uploads, Xet or redirects.
"""

import contextlib
import functools
import hashlib
import json
import socket
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".model")


class HubServer:
    """Serve a folder; use as a context manager. The attributes may be set at any time.

    Attributes:
        drop: Name -> bytes after which the connection ends, each time (`drops_left` limits how often).
        flip: Name -> offset of a byte that arrives changed.
        slow: Name -> seconds of pause after each KiB.
        missing: Names that are listed and answer 404.
        answer: None, or for every request 401, 404, 503, "gated"; "gated-files" exempts the description.
        headers: More headers of every answer.
        on_headers: Called with the headers of every request.
        on_get: Called with the name before a file's body is sent.
    """

    def __init__(self, folder, repo_id="someone/model"):
        self.folder, self.repo_id = Path(folder), repo_id
        self.drop, self.drops_left, self.flip, self.slow = {}, {}, {}, {}
        self.missing, self.answer, self.on_get, self.headers = set(), None, None, {}
        self.on_headers = None
        self.gets, self.heads, self.ranges, self.requests = Counter(), Counter(), [], 0
        self.closed, self.connections = threading.Event(), []

    def files(self):
        return {
            p.relative_to(self.folder).as_posix(): p.read_bytes()
            for p in self.folder.rglob("*")
            if p.is_file()
        }

    def commit(self):
        listing = [(name, git_hash(data)) for name, data in sorted(self.files().items())]
        return hashlib.sha1(repr(listing).encode()).hexdigest()

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"hub": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *exc):
        self.close()

    def close(self):
        if not self.closed.is_set():
            self.closed.set()
            self.http.shutdown()
            self.http.server_close()
            for connection in self.connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self.thread.join()


@functools.lru_cache(500)
def git_hash(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _describe(name, data):
    """A file as the hub's listings show it."""
    about = {"size": len(data), "oid": git_hash(data)}
    if name.endswith(LARGE):
        sha = hashlib.sha256(data).hexdigest()
        about |= {"oid": git_hash(sha.encode()), "lfs": {"size": len(data), "pointerSize": 134}}
        about["lfs"] |= {"sha256": sha, "oid": sha}
    return about


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise each answer waits 40 ms
    hub = None

    def setup(self):
        super().setup()
        self.hub.connections.append(self.connection)

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET(head=True)

    def do_GET(self, head=False):
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.requests += 1
        if hub.on_headers:
            hub.on_headers(self.headers)
        if hub.closed.is_set():
            return self._hang_up()
        if hub.answer and not (hub.answer == "gated-files" and path.startswith("/api/")):
            return self._refuse(hub.answer)
        files = hub.files()
        if path in (f"/api/models/{hub.repo_id}", f"/api/models/{hub.repo_id}/revision/main") or (
            path == f"/api/models/{hub.repo_id}/revision/{hub.commit()}"
        ):
            return self._json(self._model(files))
        if path.startswith(f"/api/models/{hub.repo_id}/tree/"):
            return self._json([{"type": "file", "path": n, **_describe(n, d)} for n, d in files.items()])
        if path.startswith(f"/api/models/{hub.repo_id}/"):
            return self._refuse(404, "RevisionNotFound")
        prefix = f"/{hub.repo_id}/resolve/"
        if not path.startswith(prefix):
            return self._refuse(404, "RepoNotFound")
        name = path[len(prefix) :].split("/", 1)[1]
        if name not in files or name in hub.missing:
            return self._refuse(404, "EntryNotFound")
        return self._file(name, files[name], head)

    def _model(self, files):
        siblings = []
        for name, data in files.items():
            about = _describe(name, data)
            siblings.append({"rfilename": name, "blobId": about.pop("oid"), **about})
        return {"id": self.hub.repo_id, "sha": self.hub.commit(), "siblings": siblings, "tags": []}

    def _json(self, value):
        body = json.dumps(value).encode()
        self._head(200, {"Content-Type": "application/json", "Content-Length": len(body)})
        self.wfile.write(body)

    def _head(self, status, headers):
        self.send_response(status)
        for key, value in {**headers, **self.hub.headers}.items():
            self.send_header(key, str(value))
        self.end_headers()

    def _refuse(self, answer, code=None):
        if answer in ("gated", "gated-files"):
            answer, code = 403, "GatedRepo"
        if answer in (401, 404) and code is None:
            code = "RepoNotFound"
        headers = {"Content-Length": 0, **({"X-Error-Code": code} if code else {})}
        if code == "EntryNotFound":
            headers["X-Repo-Commit"] = self.hub.commit()
        self._head(answer, headers)

    def _file(self, name, data, head):
        hub, about, start = self.hub, _describe(name, data), 0
        headers = {"X-Repo-Commit": hub.commit(), "Accept-Ranges": "bytes", "ETag": f'"{about["oid"]}"'}
        if "lfs" in about:
            headers |= {"X-Linked-Size": len(data), "X-Linked-Etag": f'"{about["lfs"]["sha256"]}"'}
        if head:
            hub.heads[name] += 1
            return self._head(200, {**headers, "Content-Length": len(data)})
        hub.gets[name] += 1
        if "Range" in self.headers:
            start = int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
            hub.ranges.append((name, start))
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._head(206 if start else 200, {**headers, "Content-Length": len(data) - start})
        if name in hub.flip:
            data = bytearray(data)
            data[hub.flip[name]] ^= 1
        end = len(data)
        if name in hub.drop and hub.drops_left.get(name, 1) > 0:
            end = hub.drop[name]
            if name in hub.drops_left:
                hub.drops_left[name] -= 1
        if hub.on_get:
            hub.on_get(name)
        self._send(bytes(data[start:end]), hub.slow.get(name, 0))
        if end < len(data):
            self._hang_up()

    def _send(self, body, pause):
        try:
            for at in range(0, len(body), 1024 if pause else len(body) or 1):
                self.wfile.write(body[at : at + (1024 if pause else len(body))])
                self.hub.closed.wait(pause)
        except OSError:
            self._hang_up()

    def _hang_up(self):
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
