"""Download a model's files with huggingface_hub: plan, check the free space, fetch, verify every file by its
hash.

No devices, no torch, and nothing of what the files hold. Complete files are not fetched again after an
interrupt.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import re
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub import errors as hf
from huggingface_hub.utils import filter_repo_objects
from tqdm.auto import tqdm

from mixtral_offload.errors import DownloadError, OffloadError
from mixtral_offload.system.files import replace_file
from mixtral_offload.system.redaction import redact_chain
from mixtral_offload.system.safe_text import visible
from mixtral_offload.units import gb
from mixtral_offload.weights.hub_access import HINT as TOKEN
from mixtral_offload.weights.hub_access import hub_token
from mixtral_offload.weights.hub_leftovers import remove_leftovers

LEAVE = [
    "consolidated*",
    "*/consolidated*",
    "original/*",  # the same weights once more, in other layouts
    ".cache/*",
]  # the libraries' notes about a download; the records are there too
KEEP = ["*.safetensors", "*.json", "*.model", "*.jinja", "*.txt"]
RULES: dict[str, Any] = {"allow_patterns": KEEP, "ignore_patterns": LEAVE}
WORKERS = 8
LONGEST = 1 << 26  # bytes of a record: a larger file is no record
HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
COMMIT = re.compile(r"[0-9a-f]{7,64}")
AGAIN = "call again: complete files are kept, only the rest is fetched"
HTTP = next(k for k in hf.HfHubHTTPError.__mro__ if k.__name__ == "HTTPError")  # of the httpx the hub uses
INCOMPLETE = getattr(hf, "IncompleteSnapshotError", ())  # older versions return what is there
CAUSES = (  # the first match counts: kind of error, what happened, what to do
    (hf.HFValidationError, "{repo!r} is no repository id", "use owner/name as on the model's page"),
    (hf.LocalTokenNotFoundError, "token=True, but no token is stored here", TOKEN),
    (hf.GatedRepoError, "{repo} is gated", "accept the terms on {hub}/{repo} and " + TOKEN),
    (hf.RepositoryNotFoundError, "{hub} shows no repository {repo}", "check its name; if private, " + TOKEN),
    (hf.RevisionNotFoundError, "{repo} has no such revision", "use a branch, tag or commit of it"),
    (hf.RemoteEntryNotFoundError, "{repo} lists a file that the server lacks", "try another revision"),
    (401, "{hub} does not accept the token for {repo}", TOKEN),
    (403, "{hub} refuses access to {repo}", TOKEN),
    (hf.HfHubHTTPError, "{hub} answered with error {code}", "wait a few minutes, then " + AGAIN),
    (
        hf.OfflineModeIsEnabled,
        "HF_HUB_OFFLINE forbids connections to the hub",
        "unset it in a new process, " + AGAIN,
    ),
    (HTTP, "no connection to {hub}, or it broke", "check the network, then " + AGAIN),
    (errno.ENOSPC, "the disk became full while fetching {repo}", "make room there, then " + AGAIN),
    (errno.EDQUOT, "the quota ran out while fetching {repo}", "make room there, then " + AGAIN),
    (Exception, "fetching from {repo} failed", AGAIN),
)
log = logging.getLogger(__name__)
Token = str | bool | None
Folder = str | Path | None


@dataclass(frozen=True)
class DownloadPlan:
    """What a download would fetch.

    Attributes:
        revision: The commit.
        files: (name, bytes, present) of each file.
        free_bytes: Free on the disk of `folder`.
        folder: Where the files will be.
    """

    repo_id: str
    revision: str
    files: tuple[tuple[str, int, bool], ...]
    total_bytes: int
    remaining_bytes: int
    free_bytes: int
    folder: Path


def plan_download(
    repo_id: str,
    *,
    revision: str | None = None,
    endpoint: str | None = None,
    token: Token = None,
    local_dir: Folder = None,
    cache_dir: Folder = None,
) -> DownloadPlan:
    """List what a download needs; fetch nothing.

    Args:
        local_dir: As in `download`.
        cache_dir: As in `download`.

    Raises:
        DownloadError: If the hub does not answer, or has no model there.
    """
    with _explained(repo_id, endpoint):
        return _plan(_ask(repo_id, revision, endpoint, hub_token(token), local_dir, cache_dir))


def download(
    repo_id: str,
    *,
    revision: str | None = None,
    endpoint: str | None = None,
    token: Token = None,
    local_dir: Folder = None,
    cache_dir: Folder = None,
    local_files_only: bool = False,
    progress: bool = True,
    verify: bool = True,
) -> Path:
    """Fetch what is missing of a repository and verify it by its hashes.

    Without a connection, a complete earlier download is used as it is.

    Args:
        endpoint: URL of the hub. Default: huggingface_hub's own.
        local_dir: A folder for the files, in place of the hub's cache.
        cache_dir: Another folder for the hub's cache.
        local_files_only: Do not connect to the hub.

    Returns:
        The folder that holds the files.

    Raises:
        DownloadError: With what to do next.
    """
    with _explained(repo_id, endpoint):
        token = hub_token(token)
        try:
            if local_files_only:
                hint = "leave local_files_only out to fetch what is not here"
                raise DownloadError(
                    f"{repo_id}: there is no connection to the hub (local_files_only)", hint=hint
                )
            job = _ask(repo_id, revision, endpoint, token, local_dir, cache_dir)
        except DownloadError as error:
            return _without_hub(Record(repo_id, revision, local_dir, cache_dir), verify, error)
        plan = _plan(job)
        _check_room(plan)
        job.save()
        todo = [n for n in job.files if not job.intact(n) or (verify and not job.proven(n))]
        if todo:
            _fetch_all(job, todo, plan, {"endpoint": endpoint, "token": token}, progress, verify)
        remove_leftovers(job)
        return plan.folder


def fetch_file(
    repo_id: str, name: str, *, revision: str | None = None, endpoint: str | None = None, token: Token = None
) -> Path:
    """Fetch one small file of a repository into the hub's cache.

    Returns:
        Its path; that of an earlier copy if the hub does not answer.

    Raises:
        DownloadError: If there is no such file, or it cannot be fetched.
    """
    with _explained(repo_id, endpoint):
        token = hub_token(token)
        return Path(hf_hub_download(repo_id, name, revision=revision, endpoint=endpoint, token=token))


def is_safe(name: object) -> bool:
    """Return whether this is a path inside a repository, in one plain spelling, that is safe everywhere."""
    if not isinstance(name, str) or visible(name, one_line=True) != name or set(name) & set("\\:"):
        return False
    return all(part not in ("", ".", "..") and len(part.encode()) <= 200 for part in name.split("/"))


def is_entry(entry: object) -> bool:
    """Return whether this is [bytes, hash] of a file."""
    if not isinstance(entry, list) or len(entry) != 2:
        return False
    size, digest = entry
    return type(size) is int and size >= 0 and isinstance(digest, str) and bool(HASH.fullmatch(digest))


def hash_of(path: Path, like: str) -> str:
    """Hash a file like `like`: sha256 (64 digits), or git's sha1 of a blob (40)."""
    made = hashlib.sha256() if len(like) == 64 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            made.update(chunk)
    return made.hexdigest()


class Record:
    """The files of one commit: where they belong, their sizes and hashes, and which were verified.

    Kept as JSON in `mixtral_offload/<repository>@<revision>.json`, in the hub's cache or under `local_dir`.

    Attributes:
        files: Name -> [bytes, hash]. Large files have sha256, small ones git's sha1.
        verified: Name -> [bytes, hash, mtime_ns when it was hashed].
    """

    def __init__(self, repo_id: str, revision: str | None, local_dir: Folder, cache_dir: Folder = None):
        self.repo_id, self.revision = repo_id, revision or "main"
        cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
        self.store = cache / f"models--{str(repo_id).replace('/', '--')}"
        self.local_dir = None if local_dir is None else Path(local_dir).expanduser().absolute()
        base = self.local_dir / ".cache" if self.local_dir else self.store
        self.record = base / "mixtral_offload" / f"{quote(f'{repo_id}@{self.revision}', safe='@')}.json"
        self.lock = threading.Lock()
        self.commit: str | None = None
        self.files: dict[str, list] = {}
        self.verified: dict[str, list] = {}
        try:
            self.commit, self.files, self.verified = _read(self.record)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, RecursionError) as error:
            log.debug("the record %s is ignored, and written again: %s", self.record, error)

    @property
    def folder(self) -> Path:
        """Where the files belong."""
        return self.local_dir or self.store / "snapshots" / str(self.commit)

    def blob(self, name: str) -> Path:
        """Return where the hub's cache keeps a file's bytes."""
        return self.store / "blobs" / str(self.files[name][1])

    def intact(self, name: str, path: Path | None = None) -> bool:
        """Return whether the file is there (or at `path`) with its full size."""
        path = path or self.folder / name
        return path.is_file() and path.stat().st_size == self.files[name][0]

    def proven(self, name: str) -> bool:
        """Return whether the file was hashed, and has not changed since."""
        return self.verified.get(name) == [*self.files[name], (self.folder / name).stat().st_mtime_ns]

    def save(self) -> None:
        """Write the record and the hub cache's own note of the revision; a read-only disk is no error."""
        texts = {self.record: json.dumps([self.commit, self.files, self.verified])}
        if not self.local_dir and self.revision != self.commit:
            texts[self.store / "refs" / self.revision] = str(self.commit)
        try:
            for path, text in texts.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                replace_file(path, text)
        except OSError as error:
            log.debug("the record of %s was not written: %s", self.repo_id, error)

    def verify(self, name: str) -> None:
        """Hash one file; if it is not the hub's, delete it and raise DownloadError."""
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


def _read(path: Path) -> tuple[str, dict[str, list], dict[str, list]]:
    """Commit, files and verified of a record; raise ValueError unless it is one in every part."""
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


def _ask(
    repo_id: str,
    revision: str | None,
    endpoint: str | None,
    token: Token,
    local_dir: Folder,
    cache_dir: Folder = None,
) -> Record:
    """The files of a revision as the hub lists them, in one request."""
    with _explained(repo_id, endpoint):
        api = HfApi(endpoint=endpoint, token=token)
        info = api.model_info(repo_id, revision=revision, files_metadata=True, timeout=20)
        job = Record(repo_id, revision, local_dir, cache_dir)
        if not isinstance(info.sha, str) or not COMMIT.fullmatch(info.sha):
            raise DownloadError(f"{repo_id} has no commit", expected="a hash", found=info.sha)
        job.commit, job.files = info.sha, {}
        found = filter_repo_objects(info.siblings or (), key=lambda s: s.rfilename, **RULES)
        for file in sorted(found, key=lambda s: s.rfilename):
            entry = [file.size, file.blob_id]
            if file.lfs is not None:
                entry = [file.lfs.size, file.lfs.sha256]
            job.files[file.rfilename] = entry
            if not is_safe(file.rfilename) or not is_entry(entry):
                what = f"{repo_id} lists a file without size or hash, or with an unsafe name"
                hint = "use another repository or revision, or ask its owner to rename this file"
                raise DownloadError(what, path=file.rfilename, hint=hint)
        folders = {parent.as_posix(): name for name in job.files for parent in PurePosixPath(name).parents}
        if both := sorted(job.files.keys() & folders.keys()):
            what = f"{repo_id} lists one path as a file and as a folder"
            raise DownloadError(what, path=both[0], found=folders[both[0]])
        if not job.files:
            raise DownloadError(f"{repo_id} has none of the files a model needs", expected=" ".join(KEEP))
        return job


def _plan(job: Record) -> DownloadPlan:
    files = tuple(
        (name, size, job.intact(name) or _has_blob(job, name)) for name, (size, _) in job.files.items()
    )
    disk = next(p for p in (job.folder, *job.folder.absolute().parents) if p.exists())
    total, rest = sum(f[1] for f in files), sum(f[1] for f in files if not f[2])
    return DownloadPlan(
        job.repo_id, str(job.commit), files, total, rest, shutil.disk_usage(disk).free, job.folder
    )


def _has_blob(job: Record, name: str) -> bool:
    """Whether the hub's cache has the bytes, so that the file only needs a link to them."""
    return job.local_dir is None and job.intact(name, job.blob(name))


def _check_room(plan: DownloadPlan) -> None:
    if plan.remaining_bytes > plan.free_bytes:
        need, free, lack = map(
            gb, (plan.remaining_bytes, plan.free_bytes, plan.remaining_bytes - plan.free_bytes)
        )
        what = f"the disk has too little room for {plan.repo_id}; nothing was fetched"
        hint = f"free {lack} there, or use another disk: local_dir=..., or HF_HOME for the hub's cache"
        raise DownloadError(what, path=plan.folder, expected=f"{need} free", found=f"{free} free", hint=hint)


class _Stopped(Exception):
    """Ends the other transfers after one has failed or the user has interrupted."""


class _Meter:
    """tqdm as huggingface_hub uses it: adds one file's bytes to the common bar, and can stop the transfer."""

    def __init__(self, bar: tqdm, lock: threading.Lock, stop: threading.Event):
        self.bar, self.lock, self.stop, self.seen = bar, lock, stop, 0

    def __call__(self, *args: object, **kwargs: object) -> _Meter:
        return self

    def update(self, n: int = 1) -> None:
        if self.stop.is_set():
            raise _Stopped
        with self.lock:
            self.seen += n
            self.bar.update(n)

    def close(self, *args: object, **kwargs: object) -> None:
        pass

    __enter__ = __call__
    __exit__ = update_transfer = set_postfix_str = set_transfer_postfix_str = close


def _fetch_all(
    job: Record, todo: list[str], plan: DownloadPlan, source: dict[str, Any], progress: bool, verify: bool
) -> None:
    stop, lock, pool = threading.Event(), threading.Lock(), ThreadPoolExecutor(WORKERS)
    bar = tqdm(
        total=plan.total_bytes,
        initial=plan.total_bytes - plan.remaining_bytes,
        desc=visible(job.repo_id, one_line=True),
        unit="B",
        unit_scale=True,
        disable=not progress,
    )
    try:
        tasks = [pool.submit(_fetch, job, n, _Meter(bar, lock, stop), source, verify) for n in todo]
        for task in as_completed(tasks):
            task.result()
    except BaseException:
        stop.set()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        bar.close()


def _fetch(job: Record, name: str, meter: _Meter, source: dict[str, Any], verify: bool) -> None:
    path, blob, size = job.folder / name, job.blob(name), job.files[name][0]
    with _explained(job.repo_id, source["endpoint"], path):
        if not job.intact(name):
            counted = _has_blob(job, name)  # the bar began with it
            for wrong in (p for p in (path, blob) if not job.intact(name, p)):
                wrong.unlink(missing_ok=True)
            where: dict[str, Any] = {"cache_dir": job.store.parent, "local_dir": job.local_dir}
            where |= {"revision": job.commit, "tqdm_class": meter}
            hf_hub_download(job.repo_id, name, **where, **source)
            meter.update(0 if counted else size - meter.seen)
    if not job.intact(name) or (verify and not job.proven(name)):
        job.verify(name)


def _without_hub(job: Record, verify: bool, error: DownloadError) -> Path:
    """After `error` from the hub: use a complete copy on this machine, or raise."""
    reason, missing = str(error).splitlines()[0], [n for n in job.files if not job.intact(n)]
    where: Path | None = job.folder
    if not job.files and not job.local_dir:
        where, missing = _foreign_copy(job)
    if where is None or (not job.files and job.local_dir):
        raise error
    if missing:
        what = f"{len(missing)} files of {job.repo_id} are not here and cannot be fetched now: {reason}"
        found = f"missing: {', '.join(missing[:5])}{' ...' if missing[5:] else ''}"
        hint = f"when the hub answers, {AGAIN}"
        raise DownloadError(what, path=where, expected="a complete copy", found=found, hint=hint) from error
    for name in job.files:
        if verify and not job.proven(name):
            job.verify(name)
    log.warning("%s; using the complete copy in %s", reason, visible(str(where), one_line=True))
    return where


def _foreign_copy(job: Record) -> tuple[Path | None, list[str]]:
    """A snapshot that other programs left in the hub cache: (folder, missing names), hashes unknown."""
    where = job.store.parent
    try:
        found = Path(
            snapshot_download(
                job.repo_id, revision=job.revision, cache_dir=where, local_files_only=True, **RULES
            )
        )
    except INCOMPLETE as error:
        return job.store, [str(error).split(": ", 1)[-1]]
    except Exception:
        return None, []
    index = found / "model.safetensors.index.json"
    named = {"config.json", "model.safetensors"}
    if index.is_file():
        named = {"config.json", *_shards(index)}
    return found, sorted(name for name in named if not (found / name).is_file())


def _shards(index: Path) -> list[str]:
    """The files that an index names; raise DownloadError for a damaged index."""
    found = "no weight_map of keys and file names"
    try:
        names = list(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        names, found = [None], f"{type(error).__name__}: {error}"
    if all(map(is_safe, names)):
        return names
    what = "the copy in the hub's cache has a damaged index, and the hub does not answer"
    expected, hint = "JSON with weight_map: key to file name", f"when the hub answers, {AGAIN}"
    raise DownloadError(what, path=index, expected=expected, found=found, hint=hint)


@contextmanager
def _explained(repo_id: object, endpoint: str | None, path: Path | None = None) -> Iterator[None]:
    """Turn whatever huggingface_hub, the network or the disk raises inside into one DownloadError."""
    try:
        yield
    except _Stopped:
        raise
    except OffloadError as error:
        redact_chain(error)
        raise error from error.__cause__
    except Exception as error:
        redact_chain(error)
        raise _explain(error, repo_id, endpoint, path) from error


def _explain(error: BaseException, repo_id: object, endpoint: str | None, path: Path | None) -> DownloadError:
    if isinstance(error, hf.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    code = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "errno", None)
    same = (code == k if isinstance(k, int) else isinstance(error, k) for k, *_ in CAUSES)
    texts = next(cause[1:] for cause, fits in zip(CAUSES, same) if fits)
    hub = (endpoint or constants.ENDPOINT).rstrip("/")
    what, hint = (text.format(repo=repo_id, hub=hub, code=code) for text in texts)
    found = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return DownloadError(what, path=path, found=found, hint=hint)
