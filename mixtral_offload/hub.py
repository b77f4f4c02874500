"""Fetching a model's files from a hub: plan, room on the disk, download, proof that every byte is right.

Knows which files of a repository a model needs, where the hub's cache keeps them, their sizes and hashes
(sha256 of large files, git's sha1 of small ones), and what a failure means for the reader. huggingface_hub
does the transfers: a file complete before an interruption is never fetched again, a partial one starts over. A
record beside the files, `mixtral_offload/<repository>@<revision>.json`, keeps the list and what was verified.
Does not know what is inside the files, which model they make, devices, or torch.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub import errors as hf
from huggingface_hub.utils import filter_repo_objects
from tqdm.auto import tqdm

from .errors import CheckpointError, DownloadError

LEAVE = ["consolidated*", "*/consolidated*", "original/*"]  # the same weights once more, in other layouts
KEEP = ["*.safetensors", "*.json", "*.model", "*.jinja", "*.txt"]
RULES = {"allow_patterns": KEEP, "ignore_patterns": LEAVE}
WORKERS = 8
AGAIN = "call again: complete files are kept, only the rest is fetched"
TOKEN = "set HF_TOKEN to a token that may read it, or pass token="
HTTP = next(k for k in hf.HfHubHTTPError.__mro__ if k.__name__ == "HTTPError")  # of the httpx the hub uses
CAUSES = (  # the first match counts: kind of error, what happened, what to do
    (hf.HFValidationError, "{repo!r} is no repository id", "use owner/name as on the model's page"),
    (hf.GatedRepoError, "{repo} is gated", "accept the terms on {hub}/{repo} and " + TOKEN),
    (hf.RepositoryNotFoundError, "{hub} shows no repository {repo}", "check its name; if private, " + TOKEN),
    (hf.RevisionNotFoundError, "{repo} has no such revision", "use a branch, tag or commit of it"),
    (hf.RemoteEntryNotFoundError, "{repo} lists a file that the server lacks", "try another revision"),
    (401, "{hub} does not accept the token for {repo}", TOKEN),
    (403, "{hub} refuses access to {repo}", TOKEN),
    (hf.HfHubHTTPError, "{hub} answered with error {code}", "wait a few minutes, then " + AGAIN),
    (hf.OfflineModeIsEnabled, "HF_HUB_OFFLINE forbids asking the hub", "unset it in a new process, " + AGAIN),
    (HTTP, "no connection to {hub}, or it broke", "check the network, then " + AGAIN),
    (errno.ENOSPC, "the disk became full while fetching {repo}", "make room there, then " + AGAIN),
    (errno.EDQUOT, "the quota ran out while fetching {repo}", "make room there, then " + AGAIN),
    (Exception, "fetching from {repo} failed", AGAIN),
)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DownloadPlan:
    """What a download would fetch, before it starts. revision: a commit; files: (name, bytes, present)."""

    repo_id: str
    revision: str
    files: tuple
    total_bytes: int
    remaining_bytes: int
    free_bytes: int
    folder: Path


class _Stopped(Exception):
    """Ends the other transfers after one has failed or the user has interrupted."""


class _Job:
    """The files of one commit: where they belong, what they must be, which of them were verified."""

    def __init__(self, repo_id, revision, local_dir):
        self.repo_id, self.revision = repo_id, revision or "main"
        self.store = Path(constants.HF_HUB_CACHE) / f"models--{str(repo_id).replace('/', '--')}"
        self.local_dir = None if local_dir is None else Path(local_dir).expanduser().absolute()
        base = self.local_dir / ".cache" if self.local_dir else self.store
        self.record = base / "mixtral_offload" / f"{quote(f'{repo_id}@{self.revision}', safe='@')}.json"
        self.lock = threading.Lock()
        # files: name -> [bytes, hash]; verified: name -> [bytes, hash, mtime_ns when it was hashed]
        self.commit, self.files, self.verified = None, {}, {}
        with contextlib.suppress(OSError, ValueError, TypeError):
            self.commit, self.files, self.verified = json.loads(self.record.read_text())

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
                part = path.with_name(f"{path.name}.{os.getpid()}.part")
                part.write_text(text)
                part.replace(path)
        except OSError as error:
            log.debug("the record of %s was not written: %s", self.repo_id, error)

    def verify(self, name):
        """Hash one file; delete it and refuse when it is not what the hub has."""
        path, (size, digest) = self.folder / name, self.files[name]
        found = _hash(path, digest)
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


class _Meter:
    """tqdm as huggingface_hub sees it: adds one file's bytes to the one bar, and can stop the transfer."""

    def __init__(self, bar, lock, stop):
        self.bar, self.lock, self.stop, self.seen = bar, lock, stop, 0

    def __call__(self, *args, **kwargs):
        return self

    def update(self, n=1):
        if self.stop.is_set():
            raise _Stopped
        with self.lock:
            self.seen += n
            self.bar.update(n)

    def close(self, *args, **kwargs):
        pass

    __enter__ = __call__
    __exit__ = update_transfer = set_postfix_str = set_transfer_postfix_str = close


def plan_download(repo_id, *, revision=None, endpoint=None, token=None, local_dir=None) -> DownloadPlan:
    """Ask the hub what a download needs; fetches no file."""
    return _plan(_ask(repo_id, revision, endpoint, token, local_dir))


def download(
    repo_id, *, revision=None, endpoint=None, token=None, local_dir=None, progress=True, verify=True
) -> Path:
    """Fetch what is missing of a repository, prove it by its hashes, return the folder that holds the files.

    Without a connection a complete earlier download is used as it is.
    """
    try:
        job = _ask(repo_id, revision, endpoint, token, local_dir)
    except DownloadError as error:
        return _without_hub(_Job(repo_id, revision, local_dir), verify, error)
    plan = _plan(job)
    if plan.remaining_bytes > plan.free_bytes:
        lack = plan.remaining_bytes - plan.free_bytes
        need, free, lack = map(_human, (plan.remaining_bytes, plan.free_bytes, lack))
        what = f"the disk has too little room for {repo_id}; nothing was fetched"
        hint = f"free {lack} there, or use another disk: local_dir=..., or HF_HOME for the hub's cache"
        raise DownloadError(what, path=plan.folder, expected=f"{need} free", found=f"{free} free", hint=hint)
    job.save()
    todo = [n for n in job.files if not job.intact(n) or (verify and not job.proven(n))]
    if todo:
        _fetch_all(job, todo, plan, {"endpoint": endpoint, "token": token}, progress, verify)
    return plan.folder


def resolve(path_or_repo_id, **kwargs) -> Path:
    """A folder that exists is returned as it is; anything that is no path is a repository to download."""
    text = os.fspath(path_or_repo_id)
    path = Path(os.path.expanduser(text))
    if text and path.is_dir():
        return path
    is_path = not isinstance(path_or_repo_id, str) or text.startswith((".", "~")) or path.is_absolute()
    if is_path or (text and path.exists()) or text.count("/") > 1 or "\\" in text:
        what, hint = f"{text} is not a folder", "check the spelling and the working directory"
        expected = "a folder with a model's files, or a repository such as owner/name"
        found = "a file" if path.exists() else "nothing there"
        raise CheckpointError(what, path=path.absolute(), expected=expected, found=found, hint=hint)
    return download(text, **kwargs)


def _ask(repo_id, revision, endpoint, token, local_dir):
    try:
        api = HfApi(endpoint=endpoint, token=token)
        info = api.model_info(repo_id, revision=revision, files_metadata=True, timeout=20)
        job = _Job(repo_id, revision, local_dir)
        job.commit, job.files = info.sha, {}
        found = filter_repo_objects(info.siblings or (), key=lambda s: s.rfilename, **RULES)
        for file in sorted(found, key=lambda s: s.rfilename):
            size, digest = file.size, file.blob_id
            if file.lfs is not None:
                size, digest = file.lfs.size, file.lfs.sha256
            name = file.rfilename
            safe = ".." not in name.split("/") and name[0] != "/" and not set(name) & set("\\:")
            if size is None or not digest or not safe:
                what = f"{repo_id} lists a file without size or hash, or with an unsafe name"
                raise DownloadError(what, path=name)
            job.files[name] = [size, digest]
    except Exception as error:
        raise _explain(error, repo_id, endpoint) from error
    if not job.files:
        raise DownloadError(f"{repo_id} has none of the files a model needs", expected=" ".join(KEEP))
    return job


def _plan(job):
    kept = (lambda n: False) if job.local_dir else (lambda n: job.intact(n, job.blob(n)))
    files = tuple((name, size, job.intact(name) or kept(name)) for name, (size, _) in job.files.items())
    disk = next(p for p in (job.folder, *job.folder.absolute().parents) if p.exists())
    total, rest = sum(f[1] for f in files), sum(f[1] for f in files if not f[2])
    return DownloadPlan(job.repo_id, job.commit, files, total, rest, shutil.disk_usage(disk).free, job.folder)


def _fetch_all(job, todo, plan, source, progress, verify):
    stop, lock, pool = threading.Event(), threading.Lock(), ThreadPoolExecutor(WORKERS)
    sizes = {"total": plan.total_bytes, "initial": plan.total_bytes - plan.remaining_bytes}
    bar = tqdm(**sizes, desc=job.repo_id, unit="B", unit_scale=True, disable=not progress)
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


def _fetch(job, name, meter, source, verify):
    path, blob, size = job.folder / name, job.blob(name), job.files[name][0]
    try:
        if not job.intact(name):
            counted = job.intact(name, blob) and not job.local_dir  # the bar began with it
            for wrong in (p for p in (path, blob) if not job.intact(name, p)):
                wrong.unlink(missing_ok=True)
            where = {"cache_dir": job.store.parent, "local_dir": job.local_dir, "revision": job.commit}
            hf_hub_download(job.repo_id, name, tqdm_class=meter, **where, **source)
            meter.update(0 if counted else size - meter.seen)
    except _Stopped:
        raise
    except Exception as error:
        raise _explain(error, job.repo_id, source["endpoint"], path) from error
    if not job.intact(name) or (verify and not job.proven(name)):
        job.verify(name)


def _without_hub(job, verify, error):
    """After `error` from the hub: a complete copy on this machine serves, anything less does not."""
    reason, missing = str(error).splitlines()[0], [n for n in job.files if not job.intact(n)]
    where = job.folder
    if not job.files and not job.local_dir:
        where, missing = _foreign_copy(job)
    if not job.files and (job.local_dir or where is None):
        raise error
    if missing:
        what = f"{len(missing)} files of {job.repo_id} are not here and cannot be fetched now: {reason}"
        found = f"missing: {', '.join(missing[:5])}{' ...' if missing[5:] else ''}"
        hint = f"when the hub answers, {AGAIN}"
        raise DownloadError(what, path=where, expected="a complete copy", found=found, hint=hint) from error
    for name in job.files:
        if verify and not job.proven(name):
            job.verify(name)
    log.warning("%s; using the complete copy in %s", reason, where)
    return where


def _foreign_copy(job):
    """A snapshot that other programs left in the hub cache: (folder, missing names), hashes unknown."""
    try:
        found = Path(snapshot_download(job.repo_id, revision=job.revision, local_files_only=True, **RULES))
    except hf.IncompleteSnapshotError as error:
        return job.store, [str(error).split(": ", 1)[-1]]
    except Exception:
        return None, []
    index = found / "model.safetensors.index.json"
    named = {"config.json", "model.safetensors"}
    if index.is_file():
        named = {"config.json", *json.loads(index.read_text())["weight_map"].values()}
    return found, sorted(name for name in named if not (found / name).is_file())


def _hash(path, like):
    """The file's hash, of the kind `like` is: sha256 (64 digits), or git's sha1 of a blob."""
    made = hashlib.sha256() if len(like) == 64 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            made.update(chunk)
    return made.hexdigest()


def _human(count):
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count:,} bytes"


def _explain(error, repo_id, endpoint, path=None):
    """One DownloadError for whatever huggingface_hub, the network or the disk raised."""
    if isinstance(error, DownloadError):
        return error
    if isinstance(error, hf.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    code = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "errno", None)
    same = (code == k if isinstance(k, int) else isinstance(error, k) for k, *_ in CAUSES)
    texts = next(cause[1:] for cause, fits in zip(CAUSES, same) if fits)
    hub = (endpoint or constants.ENDPOINT).rstrip("/")
    what, hint = (text.format(repo=repo_id, hub=hub, code=code) for text in texts)
    found = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    return DownloadError(what, path=path, found=found, hint=hint)
