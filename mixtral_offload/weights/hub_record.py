"""The record of one download: which files a commit has, where they belong, which were proven by their hash.

Knows the hub cache's folders and the record file beside them, `mixtral_offload/<repository>@<revision>.json`.
Does not know the network.
"""

import hashlib
import json
import logging
import re
import threading
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import constants

from mixtral_offload.errors import DownloadError
from mixtral_offload.system.files import replace_file
from mixtral_offload.system.safe_text import visible

AGAIN = "call again: complete files are kept, only the rest is fetched"
LONGEST = 1 << 26  # bytes of a record: more is none of ours
HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
COMMIT = re.compile(r"[0-9a-f]{7,64}")
log = logging.getLogger(__name__)


def is_safe(name: object) -> bool:
    """Whether this is a file's path inside a repository, in one plain spelling, that can be shown and stored anywhere."""
    if not isinstance(name, str) or visible(name, one_line=True) != name or set(name) & set("\\:"):
        return False
    return all(part not in ("", ".", "..") and len(part.encode()) <= 200 for part in name.split("/"))


def is_entry(entry: object) -> bool:
    """Whether this is [bytes, hash] of a file."""
    if not isinstance(entry, list) or len(entry) != 2:
        return False
    size, digest = entry
    return type(size) is int and size >= 0 and isinstance(digest, str) and bool(HASH.fullmatch(digest))


class Record:
    """The files of one commit: where they belong, what they must be, which of them were verified."""

    def __init__(self, repo_id, revision, local_dir, cache_dir=None):
        self.repo_id, self.revision = repo_id, revision or "main"
        cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
        self.store = cache / f"models--{str(repo_id).replace('/', '--')}"
        self.local_dir = None if local_dir is None else Path(local_dir).expanduser().absolute()
        base = self.local_dir / ".cache" if self.local_dir else self.store
        self.record = base / "mixtral_offload" / f"{quote(f'{repo_id}@{self.revision}', safe='@')}.json"
        self.lock = threading.Lock()
        # files: name -> [bytes, hash]; verified: name -> [bytes, hash, mtime_ns when it was hashed]
        self.commit, self.files, self.verified = None, {}, {}
        try:
            self.commit, self.files, self.verified = _read(self.record)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, RecursionError) as error:
            log.debug("the record %s is ignored, and written again: %s", self.record, error)

    @property
    def folder(self):
        return self.local_dir or self.store / "snapshots" / str(self.commit)

    def blob(self, name):
        return self.store / "blobs" / str(self.files[name][1])

    def intact(self, name, path=None):
        path = path or self.folder / name
        return path.is_file() and path.stat().st_size == self.files[name][0]

    def proven(self, name):
        return self.verified.get(name) == [*self.files[name], (self.folder / name).stat().st_mtime_ns]

    def save(self):
        """Write the record and the hub cache's own note of the revision. A read-only disk is no error."""
        texts = {self.record: json.dumps([self.commit, self.files, self.verified])}
        if not self.local_dir and self.revision != self.commit:
            texts[self.store / "refs" / self.revision] = self.commit
        try:
            for path, text in texts.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                replace_file(path, text)
        except OSError as error:
            log.debug("the record of %s was not written: %s", self.repo_id, error)

    def verify(self, name):
        """Hash one file; delete it and refuse when it is not what the hub has."""
        path, (size, digest) = self.folder / name, self.files[name]
        found = hash_of(path, digest)
        if self.intact(name) and found == digest:
            with self.lock:
                self.verified[name] = [size, digest, path.stat().st_mtime_ns]
                self.save()
            return
        found = f"{path.stat().st_size} bytes, hash {found}"
        cached = self.store / "snapshots" / str(self.commit) / name  # a local_dir is filled from it
        for each in (self.blob(name).resolve(), self.blob(name), cached, path):
            each.unlink(missing_ok=True)
        what = f"{name} of {self.repo_id} is damaged, not the bytes the hub has; it was deleted"
        hint = f"{AGAIN}; if it happens again, suspect the network, a proxy or the disk"
        raise DownloadError(what, path=path, expected=f"{size} bytes, hash {digest}", found=found, hint=hint)


def _read(path):
    """(commit, files, verified) of a record; ValueError where it is not one in every part."""
    if path.stat().st_size > LONGEST or not path.is_file():
        raise ValueError("not a record")
    record = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(record, list) or len(record) != 3:
        raise ValueError("not a list of three")
    commit, files, verified = record
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise ValueError("no commit")
    if not isinstance(files, dict) or not files or not isinstance(verified, dict):
        raise ValueError("no files")
    if not all(is_safe(name) and is_entry(entry) for name, entry in files.items()):
        raise ValueError("an impossible file")
    return commit, files, verified


def hash_of(path, like):
    """The file's hash, of the kind `like` is: sha256 (64 digits), or git's sha1 of a blob."""
    made = hashlib.sha256() if len(like) == 64 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            made.update(chunk)
    return made.hexdigest()
