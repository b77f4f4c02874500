"""Partial files of killed downloads are removed, those of running ones are not."""

import base64
import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import time

import pytest
from huggingface_hub import constants

from mixtral_offload.weights import hub
from mixtral_offload.weights.hub_leftovers import remove_leftovers
from tests.weights.hub_case import REPO, SHARDS, get, held, whole

pytestmark = pytest.mark.usefixtures("surroundings")


DOWNLOAD = """import sys
from huggingface_hub import constants
constants.HF_HUB_CACHE, constants.DOWNLOAD_CHUNK_SIZE = sys.argv[2], 1024
from mixtral_offload.weights import hub
hub.download(sys.argv[1], endpoint=sys.argv[3], local_dir=sys.argv[4] or None, progress=False)"""


def partial_files(tmp_path):
    return sorted(p for p in tmp_path.rglob("*") if p.is_file() and p.name.endswith((".incomplete", ".part")))


def in_another_process(server, place):
    """A download that will be slow with every large file; returns once some of each is there."""
    server.slow = dict.fromkeys(SHARDS, 0.05)
    arguments = [REPO, constants.HF_HUB_CACHE, server.endpoint, str(place.get("local_dir", ""))]
    other = subprocess.Popen([sys.executable, "-c", DOWNLOAD, *arguments], stderr=subprocess.PIPE)
    until = time.monotonic() + 60
    while not all(server.gets[shard] for shard in SHARDS) and time.monotonic() < until:
        time.sleep(0.02)
    return other


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_killed_download_left_is_removed_by_the_next_one(server, place, tmp_path, how):
    other = in_another_process(server, place)
    other.send_signal(how)
    other.communicate()
    server.slow = {}
    parts = partial_files(tmp_path)
    assert parts
    for path in (path for path in parts if path.suffix == ".part"):  # killed while it wrote the record
        os.utime(path, (time.time() - 120,) * 2)
    assert held(get(server, **place)) == whole(server)
    assert partial_files(tmp_path) == []


def test_small_files_that_a_killed_download_left_are_removed_once_nothing_can_write_them(
    server, place, tmp_path
):
    get(server, **place)
    job = hub._ask(REPO, None, server.endpoint, None, place.get("local_dir"), None)
    folders = [job.record.parent] + ([] if place.get("local_dir") else [job.store / "refs"])
    old, new = ([folder / f".{name}.{'0' * 12}.part" for folder in folders] for name in ("old", "new"))
    for path in (*old, *new):
        path.write_text("half")
    for path in old:
        os.utime(path, (time.time() - 120,) * 2)
    assert sorted(remove_leftovers(job)) == sorted(old)
    assert partial_files(tmp_path) == sorted(new)


def test_what_a_running_download_writes_is_left_alone(server, place, tmp_path):
    """Another process still fetches one file; this one finds all others complete, and leaves that one."""
    get(server, **place)
    folder = hub.plan_download(REPO, endpoint=server.endpoint, **place).folder
    for shard in SHARDS:
        (folder / shard).resolve().unlink()
        (folder / shard).unlink(missing_ok=True)
    server.gets.clear()
    other = in_another_process(server, place)
    job = hub._ask(REPO, None, server.endpoint, None, place.get("local_dir"), None)
    before = partial_files(tmp_path)
    assert len(before) == len(SHARDS)
    assert remove_leftovers(job) == [] and partial_files(tmp_path) == before
    assert other.communicate()[1] == b"" and other.returncode == 0
    assert held(folder) == whole(server) and partial_files(tmp_path) == []


def test_other_repositories_and_other_files_are_left_alone(server, place, tmp_path):
    get(server, **place)
    strangers = [tmp_path / "cache" / "models--someone--other" / "blobs" / f"{'a' * 64}.12345678.incomplete"]
    if place:
        strangers += [
            tmp_path / "mine" / "data.incomplete",
            tmp_path / "mine/.cache/huggingface/download/x.y.incomplete",
        ]
    for path in strangers:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"somebody else's")
    get(server, **place)
    assert partial_files(tmp_path) == sorted(strangers)


@pytest.mark.parametrize("old", [True, False])
def test_where_locks_exclude_no_process_only_old_leftovers_are_removed(
    server, place, tmp_path, monkeypatch, old
):
    """On some network file systems every process gets every lock."""
    folder = get(server, **place)
    if place:
        short = base64.urlsafe_b64encode(hashlib.sha1(b"config.json.metadata").digest()).decode()
        left = folder / ".cache" / "huggingface" / "download" / f"{short}.{'a' * 40}.12345678.incomplete"
    else:
        left = folder.parent.parent / "blobs" / f"{'a' * 40}.12345678.incomplete"
    left.write_bytes(b"partial")
    monkeypatch.setattr(
        "mixtral_offload.weights.hub_leftovers.WeakFileLock", lambda *a, **k: contextlib.nullcontext()
    )
    if old:
        os.utime(left, (0, 0))
    get(server, **place)
    assert left.exists() != old
