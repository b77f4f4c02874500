"""Fetching a model's files from a hub: plan, room on the disk, download, proof that every byte is right.

Knows which files of a repository a model needs, where the hub's cache keeps them, their sizes and hashes
(sha256 of large files, git's sha1 of small ones), and what a failure means for the reader. huggingface_hub
does the transfers: a file complete before an interruption is never fetched again, a partial one starts over. What
is here already and was proven, `hub_record` knows. Does not know what is inside the files, which model they make, devices, or torch.
"""

import errno
import json
import logging
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub import errors as hf
from huggingface_hub.utils import filter_repo_objects
from tqdm.auto import tqdm

from mixtral_offload.errors import DownloadError, OffloadError
from mixtral_offload.system.redaction import redact_chain
from mixtral_offload.system.safe_text import visible
from mixtral_offload.units import gb
from mixtral_offload.weights.hub_access import HINT as TOKEN
from mixtral_offload.weights.hub_access import hub_token
from mixtral_offload.weights.hub_leftovers import remove_leftovers
from mixtral_offload.weights.hub_record import AGAIN, COMMIT, Record, is_entry, is_safe

LEAVE = [
    "consolidated*",
    "*/consolidated*",
    "original/*",  # the same weights once more, in other layouts
    ".cache/*",
]  # the libraries' notes about somebody else's download: ours are kept there
KEEP = ["*.safetensors", "*.json", "*.model", "*.jinja", "*.txt"]
RULES = {"allow_patterns": KEEP, "ignore_patterns": LEAVE}
WORKERS = 8
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


def plan_download(
    repo_id, *, revision=None, endpoint=None, token=None, local_dir=None, cache_dir=None
) -> DownloadPlan:
    """Ask the hub what a download needs; fetches no file."""
    try:
        return _plan(_ask(repo_id, revision, endpoint, hub_token(token), local_dir, cache_dir))
    except Exception as error:
        raise _explain(error, repo_id, endpoint) from _cause(error)


def download(
    repo_id, *, revision=None, endpoint=None, token=None, local_dir=None, cache_dir=None,
    local_files_only=False, progress=True, verify=True,
) -> Path:  # fmt: skip
    """Fetch what is missing of a repository, prove it by its hashes, return the folder that holds the files.

    Without a connection a complete earlier download is used as it is. cache_dir: in place of the hub's cache.
    local_files_only: do not ask the hub.
    """
    try:
        token = hub_token(token)
        return _download(
            repo_id, revision, endpoint, token, local_dir, cache_dir, local_files_only, progress, verify
        )
    except Exception as error:
        raise _explain(error, repo_id, endpoint) from _cause(error)


def _download(
    repo_id, revision, endpoint, token, local_dir, cache_dir, local_files_only, progress, verify
) -> Path:
    try:
        if local_files_only:
            hint = "leave local_files_only out to fetch what is not here"
            raise DownloadError(f"{repo_id}: the hub is not asked (local_files_only)", hint=hint)
        job = _ask(repo_id, revision, endpoint, token, local_dir, cache_dir)
    except DownloadError as error:
        return _without_hub(Record(repo_id, revision, local_dir, cache_dir), verify, error)
    plan = _plan(job)
    if plan.remaining_bytes > plan.free_bytes:
        lack = plan.remaining_bytes - plan.free_bytes
        need, free, lack = map(gb, (plan.remaining_bytes, plan.free_bytes, lack))
        what = f"the disk has too little room for {repo_id}; nothing was fetched"
        hint = f"free {lack} there, or use another disk: local_dir=..., or HF_HOME for the hub's cache"
        raise DownloadError(what, path=plan.folder, expected=f"{need} free", found=f"{free} free", hint=hint)
    job.save()
    todo = [n for n in job.files if not job.intact(n) or (verify and not job.proven(n))]
    if todo:
        _fetch_all(job, todo, plan, {"endpoint": endpoint, "token": token}, progress, verify)
    remove_leftovers(job)
    return plan.folder


def fetch_file(repo_id, name, *, revision=None, endpoint=None, token=None) -> Path:
    """One small file of a repository, in the hub's cache; an earlier copy where the hub does not answer."""
    try:
        where = {"revision": revision, "endpoint": endpoint, "token": hub_token(token)}
        return Path(hf_hub_download(repo_id, name, **where))
    except Exception as error:
        raise _explain(error, repo_id, endpoint) from _cause(error)


def _ask(repo_id, revision, endpoint, token, local_dir, cache_dir=None):
    try:
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
            raise DownloadError(
                f"{repo_id} lists one path as a file and as a folder", path=both[0], found=folders[both[0]]
            )
    except Exception as error:
        raise _explain(error, repo_id, endpoint) from _cause(error)
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
    bar = tqdm(
        **sizes, desc=visible(job.repo_id, one_line=True), unit="B", unit_scale=True, disable=not progress
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
        raise _explain(error, job.repo_id, source["endpoint"], path) from _cause(error)
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
    log.warning("%s; using the complete copy in %s", reason, visible(str(where), one_line=True))
    return where


def _foreign_copy(job):
    """A snapshot that other programs left in the hub cache: (folder, missing names), hashes unknown."""
    try:
        found = Path(
            snapshot_download(
                job.repo_id, revision=job.revision, cache_dir=job.store.parent, local_files_only=True, **RULES
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


def _shards(index):
    """The files that an index names; raises DownloadError for one that is damaged."""
    found = "no weight_map of keys and file names"
    try:
        names = list(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        names, found = [None], f"{type(error).__name__}: {error}"
    if all(map(is_safe, names)):
        return names
    what = "the copy in the hub's cache has a damaged index, and the hub cannot be asked for another"
    hint = f"when the hub answers, {AGAIN}"
    raise DownloadError(
        what, path=index, expected="JSON with weight_map: key to file name", found=found, hint=hint
    )


def _cause(error):
    """What to chain: the error itself, or for one of ours what it came from."""
    return error.__cause__ if isinstance(error, OffloadError) else error


def _explain(error, repo_id, endpoint, path=None):
    """One DownloadError for whatever huggingface_hub, the network or the disk raised."""
    redact_chain(error)
    if isinstance(error, OffloadError):
        return error
    if isinstance(error, hf.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    code = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "errno", None)
    same = (code == k if isinstance(k, int) else isinstance(error, k) for k, *_ in CAUSES)
    texts = next(cause[1:] for cause, fits in zip(CAUSES, same) if fits)
    hub = (endpoint or constants.ENDPOINT).rstrip("/")
    what, hint = (text.format(repo=repo_id, hub=hub, code=code) for text in texts)
    found = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return DownloadError(what, path=path, found=found, hint=hint)
