"""Downloads against a hub on 127.0.0.1 that drops connections, flips bytes, refuses and lies."""

import base64
import collections
import contextlib
import errno
import hashlib
import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from mixtral_offload import from_pretrained, load_tokenizer
from mixtral_offload.apps.cli import main
from mixtral_offload.errors import CheckpointError, DownloadError, OptionError
from mixtral_offload.units import gb
from mixtral_offload.weights import hub
from mixtral_offload.weights.hub_leftovers import remove_leftovers
from mixtral_offload.weights.source import DEMO, local_folder, resolve
from tests.hub_server import HubServer

REPO = "someone/model"
SHARDS = [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
NEEDED = {
    "config.json",
    "model.safetensors.index.json",
    "tokenizer.model",
    "chat_template.jinja",
    "merges.txt",
    "extra/generation.json",
    *SHARDS,
}
USELESS = {"README.md", ".gitattributes", "pytorch_model.bin", "picture.png", "original/model.safetensors"}


@pytest.fixture(autouse=True, scope="module")
def no_proxy():
    """huggingface_hub reads the proxies when its one client is made: make it anew, without them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            patch.delenv(name, raising=False)
            patch.delenv(name.lower(), raising=False)
        huggingface_hub.close_session()
        yield
    huggingface_hub.close_session()


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    """A hub cache of its own, online and without a token whatever the environment says."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)


@pytest.fixture
def server(tmp_path):
    numbers, folder = random.Random(0), tmp_path / "served"
    for name in NEEDED | USELESS:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(numbers.randbytes(50_000 if name.endswith((".safetensors", ".bin")) else 700))
    index = {"weight_map": {f"layer.{i}": shard for i, shard in enumerate(SHARDS)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with HubServer(folder, REPO) as served:
        yield served


@pytest.fixture(params=["cache", "local_dir"])
def place(request, tmp_path):
    """Both ways to keep the files: the hub's cache and a folder of one's own."""
    return {} if request.param == "cache" else {"local_dir": tmp_path / "mine"}


@pytest.fixture
def no_waiting(monkeypatch):
    """huggingface_hub pauses a second before each retry."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def get(server, **options):
    return hub.download(REPO, endpoint=server.endpoint, **{"progress": False, **options})


def held(folder):
    """The files of a folder, without what the libraries keep under .cache."""
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith(".cache")}


def whole(server):
    return {name: data for name, data in server.files().items() if name in NEEDED}


def hashed(monkeypatch):
    """The names of files hashed from now on."""
    seen, real = [], hub.hash_of
    monkeypatch.setattr(hub, "hash_of", lambda path, like: seen.append(path.name) or real(path, like))
    return seen


def test_whole_download_is_bit_equal_and_leaves_out_what_no_model_needs(server, place):
    folder = get(server, **place)
    assert held(folder) == whole(server)
    assert folder == place.get("local_dir", folder)
    assert server.gets == dict.fromkeys(NEEDED, 1)


def test_second_call_fetches_and_hashes_nothing(server, place, monkeypatch):
    first, before = get(server, **place), server.gets.copy()
    names = hashed(monkeypatch)
    assert get(server, **place) == first
    assert (server.gets, names) == (before, [])


def test_a_file_changed_after_verification_is_hashed_again_and_replaced(server, place):
    folder = get(server, **place)
    data = bytearray((folder / SHARDS[0]).read_bytes())
    data[7] ^= 1
    (folder / SHARDS[0]).write_bytes(data)
    with pytest.raises(DownloadError, match="damaged"):
        get(server, **place)
    assert held(get(server, **place)) == whole(server)
    assert server.gets[SHARDS[0]] == 2


def test_a_truncated_file_on_disk_is_fetched_again(server, place):
    folder = get(server, **place)
    (folder / SHARDS[0]).write_bytes(b"short")
    assert held(get(server, **place)) == whole(server)
    assert server.gets == {**dict.fromkeys(NEEDED, 1), SHARDS[0]: 2}


def test_the_plan_is_known_before_any_fetch(server, place):
    plan = hub.plan_download(REPO, endpoint=server.endpoint, **place)
    size = sum(map(len, whole(server).values()))
    assert (plan.repo_id, plan.revision) == (REPO, server.commit())
    assert (plan.total_bytes, plan.remaining_bytes) == (size, size)
    assert {name: (n, here) for name, n, here in plan.files} == {
        name: (len(data), False) for name, data in whole(server).items()
    }
    assert plan.free_bytes > 0 and not server.gets and not server.heads
    assert get(server, **place) == plan.folder
    plan = hub.plan_download(REPO, endpoint=server.endpoint, **place)
    assert plan.remaining_bytes == 0 and all(here for _, _, here in plan.files)


def test_another_revision_shares_the_files_that_did_not_change(server):
    get(server)
    (server.folder / "config.json").write_text('{"new": 1}')
    plan = hub.plan_download(REPO, endpoint=server.endpoint)
    assert plan.remaining_bytes == 10
    folder = get(server, revision=server.commit())
    assert folder == plan.folder and held(folder) == whole(server)
    assert server.gets == {**dict.fromkeys(NEEDED, 1), "config.json": 2}


def test_too_little_disk_refuses_before_the_first_file(server, place, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 5000, 5000))
    with pytest.raises(DownloadError) as caught:
        get(server, **place)
    need = sum(map(len, whole(server).values()))
    for text in (f"{gb(need)} free", f"{gb(5000)} free", f"free {gb(need - 5000)} there", "local_dir="):
        assert text in str(caught.value)
    assert str(place.get("local_dir", constants.HF_HUB_CACHE)) in str(caught.value)
    assert not server.gets and not server.heads


def test_a_connection_that_breaks_once_heals_within_the_call(server, place, no_waiting):
    server.drop[SHARDS[1]], server.drops_left[SHARDS[1]] = 20_000, 1
    assert held(get(server, **place)) == whole(server)
    assert server.gets[SHARDS[1]] == 2 and server.ranges == [(SHARDS[1], server.ranges[0][1])]


def test_resume_after_a_broken_connection_fetches_only_the_rest(server, place, no_waiting, monkeypatch):
    monkeypatch.setattr(hub, "WORKERS", 1)
    server.drop[SHARDS[2]] = 20_000
    with pytest.raises(DownloadError, match=r"no connection to .*, or it broke") as caught:
        get(server, **place)
    assert SHARDS[2] in str(caught.value) and "call again" in str(caught.value)
    plan = hub.plan_download(REPO, endpoint=server.endpoint, **place)
    complete = {name for name, _, here in plan.files if here}
    assert {"config.json", SHARDS[0], SHARDS[1]} <= complete and SHARDS[2] not in complete
    before = server.gets.copy()
    server.drop.clear()
    assert held(get(server, **place)) == whole(server)
    again = server.gets - before
    assert again == dict.fromkeys(NEEDED - complete, 1)


def test_resume_after_the_user_interrupts(server, place, monkeypatch):
    """The interrupt arrives while one file is under way and all others are complete."""
    plan = hub.plan_download(REPO, endpoint=server.endpoint, **place)
    others = NEEDED - {SHARDS[3]}

    def interrupt(name):
        if name == SHARDS[3]:
            until = time.monotonic() + 5
            while not all((plan.folder / n).is_file() for n in others) and time.monotonic() < until:
                time.sleep(0.01)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            time.sleep(0.3)

    server.on_get, server.slow[SHARDS[3]] = interrupt, 0.02
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        get(server, **place)
    assert time.monotonic() - begin < 4  # the transfer under way was stopped, not waited for
    complete = {n for n in NEEDED if (plan.folder / n).is_file()}
    assert complete == others
    before, server.on_get = server.gets.copy(), None
    server.slow.clear()
    assert held(get(server, **place)) == whole(server)
    assert server.gets - before == {SHARDS[3]: 1}


@pytest.mark.parametrize("name", [SHARDS[0], "config.json"])
def test_a_flipped_byte_is_caught_deleted_and_healed(server, place, name):
    """sha256 proves large files, git's sha1 small ones; size alone would not notice."""
    server.flip[name] = 300
    with pytest.raises(DownloadError, match="damaged") as caught:
        get(server, **place)
    assert name in str(caught.value) and "expected" in str(caught.value) and "found" in str(caught.value)
    folder = hub.plan_download(REPO, endpoint=server.endpoint, **place).folder
    assert not (folder / name).exists()
    server.flip.clear()
    get(server, **place)  # fetches what the failure stopped
    assert held(folder) == whole(server)
    assert server.gets[name] == 2


def test_without_verification_a_flipped_byte_stays_until_verified(server, place):
    server.flip[SHARDS[0]] = 300
    assert held(get(server, **place, verify=False)) != whole(server)
    server.flip.clear()
    with pytest.raises(DownloadError, match="damaged"):
        get(server, **place)
    assert held(get(server, **place)) == whole(server)


def test_a_damaged_copy_in_the_cache_does_not_damage_a_local_folder_forever(server, tmp_path):
    server.flip[SHARDS[0]] = 300
    get(server, verify=False)
    server.flip.clear()
    with pytest.raises(DownloadError, match="damaged"):
        get(server, local_dir=tmp_path / "mine")
    assert held(get(server, local_dir=tmp_path / "mine")) == whole(server)


@pytest.mark.parametrize("how", ["unreachable", "offline", 503, 404])
def test_a_complete_copy_serves_without_the_hub(server, place, how, monkeypatch, caplog):
    folder = get(server, **place)
    names, before = hashed(monkeypatch), server.gets.copy()
    if how == "unreachable":
        server.close()
    elif how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        server.answer = how
    assert get(server, **place) == folder
    assert held(folder) == whole(server) and names == [] and server.gets == before
    assert "complete copy" in caplog.text


def test_an_incomplete_copy_without_the_hub_says_what_is_missing(server, place):
    folder = get(server, **place)
    (folder / SHARDS[1]).unlink()
    server.close()
    with pytest.raises(DownloadError, match="no connection") as caught:
        get(server, **place)
    assert f"missing: {SHARDS[1]}" in str(caught.value) and "1 files" in str(caught.value)


def test_nothing_here_and_no_hub(server, place):
    server.close()
    with pytest.raises(DownloadError, match="no connection to http://127") as caught:
        get(server, **place)
    assert "check the network" in str(caught.value)


def test_a_snapshot_other_programs_fetched_serves_without_the_hub(server):
    folder = huggingface_hub.snapshot_download(REPO, endpoint=server.endpoint, revision="main")
    server.close()
    assert get(server) == Path(folder)
    (Path(folder) / SHARDS[0]).unlink()
    with pytest.raises(DownloadError, match=SHARDS[0]):
        get(server)


def test_single_files_other_programs_fetched_are_no_complete_copy(server):
    huggingface_hub.hf_hub_download(REPO, "model.safetensors.index.json", endpoint=server.endpoint)
    server.close()
    with pytest.raises(DownloadError, match=r"missing: config\.json, model-00001"):
        get(server)


def test_other_programs_find_what_was_fetched(server):
    """The ordinary cache stays ordinary: found offline by huggingface_hub, and without a complaint of its scan."""
    folder = get(server)
    server.close()
    assert huggingface_hub.snapshot_download(REPO, local_files_only=True) == str(folder)
    scan = huggingface_hub.scan_cache_dir(constants.HF_HUB_CACHE)
    assert not scan.warnings and {r.repo_id for r in scan.repos} == {REPO}


@pytest.mark.parametrize(
    "answer, says",
    [
        (401, "shows no repository someone/model"),
        (404, "shows no repository someone/model"),
        ("gated", "gated.*accept the terms on http.*someone/model and set HF_TOKEN"),
        ("gated-files", "gated.*accept the terms on http.*someone/model and set HF_TOKEN"),
        (403, "refuses access"),
        (429, "answered with error 429"),
        (503, "answered with error 503"),
    ],
)
def test_refusals_are_told_apart(server, place, answer, says):
    server.answer = answer
    with pytest.raises(DownloadError, match=f"(?s){says}"):
        get(server, **place)
    assert not server.gets


def test_unknown_repository_revision_and_impossible_names(server):
    for repo, revision, says in (
        ("someone/else", None, "shows no repository someone/else"),
        (REPO, "no-such-branch", "no such revision"),
        ("not a name!", None, "'not a name!' is no repository id"),
        ("", None, "'' is no repository id"),
    ):
        with pytest.raises(DownloadError, match=says):
            hub.download(repo, revision=revision, endpoint=server.endpoint)


def test_a_file_the_server_lost_is_named_and_the_rest_is_kept(server, place, monkeypatch):
    monkeypatch.setattr(hub, "WORKERS", 1)
    server.missing.add(SHARDS[3])
    with pytest.raises(DownloadError, match="lists a file that the server lacks") as caught:
        get(server, **place)
    assert SHARDS[3] in str(caught.value)
    plan = hub.plan_download(REPO, endpoint=server.endpoint, **place)
    complete = {name for name, _, here in plan.files if here}
    assert set(SHARDS[:3]) <= complete
    before = server.gets.copy()
    server.missing.clear()
    assert held(get(server, **place)) == whole(server)
    assert server.gets - before == dict.fromkeys(NEEDED - complete, 1)


def test_a_disk_that_fills_up_on_the_way(server, place, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub, "hf_hub_download", full)
    with pytest.raises(DownloadError, match="disk became full") as caught:
        get(server, **place)
    assert "make room" in str(caught.value)


UNSAFE_NAMES = [
    "../x.json",
    "a/../../x.json",
    "/abs.json",
    "..\\x.json",
    "C:x.json",
    "a\nb.json",
    "a\x1b[31m.json",
    "a\u202e.json",
    "./x.json",
    "a//b.json",
    "a/./b.json",
    "x" * 300 + ".json",
    "nul\0.json",
    "config.json/x.json",
    "a/.json/",
]


@pytest.mark.parametrize("name", UNSAFE_NAMES)
def test_a_listing_with_an_impossible_name_is_refused_before_anything_is_fetched(
    server, place, name, tmp_path
):
    real = server.files
    server.files = lambda: {**real(), name: b"{}"}
    if name.endswith("/"):
        server.files = lambda: {**real(), name + "x.json": b"{}", name[:-1]: b"{}"}
    with pytest.raises(DownloadError, match=r"unsafe name|as a file and as a folder") as caught:
        get(server, **place)
    assert str(caught.value).isprintable() or "\x1b" not in str(caught.value)
    assert not server.gets and not list(tmp_path.rglob("x.json"))


@pytest.mark.parametrize(
    "size, digest", [(-1, "a" * 40), ("7", "a" * 40), (7, "../../x"), (7, None), (None, "a" * 40)]
)
def test_a_listing_with_an_impossible_size_or_hash_is_refused(server, monkeypatch, size, digest):
    real = hub.HfApi.model_info

    def model_info(*args, **kwargs):
        info = real(*args, **kwargs)
        info.siblings[0].rfilename, info.siblings[0].lfs = "config.json", None
        info.siblings[0].size, info.siblings[0].blob_id = size, digest
        return info

    monkeypatch.setattr(hub.HfApi, "model_info", model_info)
    with pytest.raises(DownloadError, match="without size or hash"):
        get(server)
    assert not server.gets


def test_notes_of_other_downloads_that_were_uploaded_are_left_out(server, place):
    """A listing cannot write where records are kept."""
    real = server.files
    server.files = lambda: {
        **real(),
        ".cache/mixtral_offload/x.json": b"[]",
        ".cache/huggingface/x.json": b"[]",
    }
    get(server, **place)
    assert not any(name.startswith(".cache") for name in server.gets)


DAMAGED_RECORDS = [
    b"",
    b"{}",
    b"null",
    b"[]",
    b"[1]",
    b"[1,2,3]",
    b'["a","b","c"]',
    b'{"a":1,"b":2,"c":3}',
    b"[null,{},{}]",
    b'["../../../../../tmp",{"config.json":[1,"a"]},{}]',
    b'["x",{"config.json":3},{}]',
    b'["x",[1,2],{}]',
    b'["aaaaaaa",{"config.json":3},{}]',
    b'["aaaaaaa",{"config.json":["a","b"]},{}]',
    b'["aaaaaaa",{},[]]',
    b'["aaaaaaa",{"../../x":[1,"%s"]},{}]' % (b"a" * 40),
    b'["aaaaaaa",{"config.json":[true,"%s"]},{}]' % (b"a" * 40),
    b'["aaaaaaa",{"config.json":[700,"%s"]},[]]' % (b"a" * 40),
    b"[" * 100_000,
    b"\xff\xfe",
    b"[1" + b"0" * 6000 + b",{},{}]",
]


@pytest.mark.parametrize("damage", DAMAGED_RECORDS)
def test_a_damaged_record_is_ignored_and_written_again(server, place, damage, tmp_path):
    folder = get(server, **place)
    record = next(tmp_path.rglob("mixtral_offload/*.json"))
    good = record.read_bytes()
    record.write_bytes(damage)
    assert get(server, **place) == folder and held(folder) == whole(server)
    assert json.loads(record.read_text())[:2] == json.loads(good)[:2]
    assert server.gets == dict.fromkeys(NEEDED, 1)
    record.write_bytes(damage)
    server.close()  # without the hub: what is here as other programs would find it, or one message
    if place:
        with pytest.raises(DownloadError, match="no connection"):
            get(server, **place)
    else:
        assert get(server) == folder


@pytest.mark.parametrize("kind", ["folder", "endless", "too large"])
def test_a_record_that_is_no_ordinary_file(server, kind, monkeypatch):
    get(server)
    record = next(Path(constants.HF_HUB_CACHE).rglob("mixtral_offload/*.json"))
    if kind == "too large":
        monkeypatch.setattr(hub, "LONGEST", 10)
    else:
        record.unlink()
        record.mkdir() if kind == "folder" else record.symlink_to("/dev/zero")
    assert held(get(server)) == whole(server)


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"weight_map":3}',
        b'{"weight_map":{"a":3}}',
        b'{"weight_map":{"a":"../../x"}}',
        b'{"weight_map":{"a":null}}',
        b"[" * 100_000,
        b"\xff",
    ],
)
def test_a_damaged_index_that_another_program_left_is_one_message(server, damage):
    folder = Path(huggingface_hub.snapshot_download(REPO, endpoint=server.endpoint, revision="main"))
    (folder / "model.safetensors.index.json").resolve().write_bytes(damage)
    server.close()
    with pytest.raises(DownloadError, match="damaged index") as caught:
        get(server)
    assert "model.safetensors.index.json" in str(caught.value) and "when the hub answers" in str(caught.value)


TOKENS = [
    "hf_SECRETsecret",
    "hf_SECRET\n",
    "\r\n hf_SECRET \t",
    "hf_SECRET\nsecret",
    "hf_SECRET secret",
    "hf_SECRETé",
    "hf_SECRET\0x",
]


@pytest.fixture
def everything_logged(caplog):
    """All loggers at their most talkative, as where somebody looks for a fault."""
    caplog.set_level(logging.DEBUG)
    for name in ("huggingface_hub", "httpx", "httpcore"):
        caplog.set_level(logging.DEBUG, logger=name)
    return caplog


@pytest.mark.parametrize("answer", [None, 401, "gated", 503, "closed"])
@pytest.mark.parametrize("source", ["argument", "HF_TOKEN", "file"])
@pytest.mark.parametrize("token", TOKENS)
def test_a_token_is_sent_or_refused_and_never_shown(
    server, token, source, answer, everything_logged, monkeypatch, tmp_path, capfd
):
    sent, server.answer = [], None if answer == "closed" else answer
    server.headers = {
        "Set-Cookie": "id=cookieSECRET",
        "X-Next": "http://u:pwSECRET@h/x?X-Amz-Signature=abSECRET",
    }
    server.on_headers = lambda headers: sent.append(headers.get("Authorization"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    options = {}
    if source == "argument":
        options["token"] = token
    elif source == "file":
        (tmp_path / "token").write_text(token, encoding="utf-8")
    elif "\0" in token:
        pytest.skip("the environment holds no NUL")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    if answer == "closed":
        server.close()
    said = ""
    try:
        get(server, **options)
    except DownloadError as error:
        chain = error
        while chain is not None:
            said += f"{chain} {chain!r}\n" + "".join(traceback.format_exception(chain))
            chain = chain.__cause__ or chain.__context__
    good = re.fullmatch(r"\w+", token.strip(), re.ASCII)
    assert (said == "") == bool(good and answer is None)
    if good and answer != "closed":
        assert set(sent) == {f"Bearer {token.strip()}"}
    elif not good:
        assert "cannot be sent" in said and sent == []
    said += everything_logged.text + "".join(capfd.readouterr())
    assert "SECRET" not in said


def test_no_token_where_none_is_wanted(server, monkeypatch):
    sent = []
    server.on_headers = lambda headers: sent.append(headers.get("Authorization"))
    monkeypatch.setenv("HF_TOKEN", "hf_something")
    get(server, token=False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    get(server)
    assert set(sent) == {None}
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    with pytest.raises(DownloadError, match="no token is stored here"):
        hub.plan_download(REPO, endpoint=server.endpoint, token=True)


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


def test_small_files_that_a_killed_download_left_are_removed_once_nobody_can_write_them(
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
    """Another process still fetches one file; this one finds all others complete, and takes nothing from it."""
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
def test_where_locks_exclude_nobody_only_old_leftovers_are_removed(server, place, tmp_path, monkeypatch, old):
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


def test_one_progress_bar_counts_every_byte_once(server, place, monkeypatch):
    made, real = [], hub.tqdm
    monkeypatch.setattr(hub, "tqdm", lambda **options: made.append(real(**options)) or made[-1])
    folder = get(server, **place, progress=True)
    for name in SHARDS[:2]:
        (folder / name).resolve().unlink()
    get(server, **place, progress=True)
    get(server, **place, progress=True)
    size = sum(map(len, whole(server).values()))
    assert [(bar.initial, bar.n, bar.total) for bar in made] == [
        (0, size, size),
        (size - 100_000, size, size),
    ]


def test_one_file_alone(server):
    path = hub.fetch_file(REPO, "config.json", endpoint=server.endpoint)
    assert path.read_bytes() == server.files()["config.json"] and set(server.gets) == {"config.json"}
    with pytest.raises(DownloadError, match="shows no repository someone/else"):
        hub.fetch_file("someone/else", "config.json", endpoint=server.endpoint)
    with pytest.raises(DownloadError, match="lacks"):
        hub.fetch_file(REPO, "nothing.json", endpoint=server.endpoint)
    server.close()  # an earlier copy serves
    assert hub.fetch_file(REPO, "config.json", endpoint=server.endpoint) == path


def test_resolve(server, tmp_path, monkeypatch):
    assert resolve(tmp_path) == tmp_path and resolve(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own" / "model").mkdir(parents=True)
    (tmp_path / "weights.bin").write_bytes(b"")
    assert resolve("own/model") == Path("own/model")
    assert resolve("~/own") == tmp_path / "own"
    for wrong in (
        "./nothing",
        "../nothing",
        "~/nothing",
        "/nothing/here",
        "a/b/c",
        "weights.bin",
        Path("some/one"),
    ):
        with pytest.raises(CheckpointError, match="is not a folder") as caught:
            resolve(wrong)
        assert "next step" in str(caught.value)
    (tmp_path / "demo").mkdir()  # the name means the shipped model wherever the caller stands
    assert resolve() == resolve("demo") == local_folder(None) == local_folder("demo") == DEMO
    assert resolve("./demo") == Path("./demo")
    assert server.requests == 0
    assert held(resolve(REPO, endpoint=server.endpoint, progress=False)) == whole(server)


def test_no_torch_is_needed():
    assert "torch" not in vars(hub) and "import torch" not in Path(hub.__file__).read_text()


def test_a_model_by_its_name_on_the_hub(published, expected, place):
    """Download, load and run the published format by repository name; the second time without the hub."""
    name = "lavawolfiee/Mixtral-8x7B-Instruct-v0.1-offloading-demo"
    with HubServer(published, name) as served:
        options = {"endpoint": served.endpoint, "progress": False, **place}
        for _ in range(2):
            model = from_pretrained(name, hub=options, device="cpu", cache_size=2)
            assert (model(expected["input_ids"]).logits - expected["logits"]).abs().max() < 1e-4
            served.close()


def test_info_and_download_from_the_command_line(published, capsys, monkeypatch):
    """Before, after, and without the hub."""
    with HubServer(published, REPO) as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            served.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        )
        assert main(["info", "--model", REPO, "--device", "cpu"]) == 0
        assert "not here yet" in capsys.readouterr().out and not served.gets
        assert main(["download", REPO]) == 0
        assert "28 files" in (text := capsys.readouterr().out) and "are free" in text and "complete: " in text
        for command in (["info", "--model", REPO, "--device", "cpu"], ["download", REPO]):
            assert main(command) == 0
        assert "3 layers x 8 experts" in capsys.readouterr().out
        served.close()
        for command in (["info", "--model", REPO, "--device", "cpu"], ["download", REPO]):
            assert main(command) == 0
        assert "3 layers x 8 experts" in (text := capsys.readouterr().out) and "complete: " in text
        assert main(["info", "--model", "some/other"]) == 1
        assert "no connection" in capsys.readouterr().err


def test_another_cache_and_no_question_to_the_hub(server, tmp_path):
    cache = tmp_path / "another"
    folder = get(server, cache_dir=cache)
    assert cache in folder.parents and set(held(folder)) == NEEDED
    before = server.gets.copy()
    assert get(server, cache_dir=cache, local_files_only=True) == folder
    assert server.gets == before
    (folder / SHARDS[1]).unlink()
    with pytest.raises(DownloadError, match="local_files_only") as caught:
        get(server, cache_dir=cache, local_files_only=True)
    assert SHARDS[1] in str(caught.value)
    with pytest.raises(DownloadError, match="local_files_only"):
        get(server, local_files_only=True)


@pytest.fixture
def shipped(tmp_path):
    """The small model that ships with the package, as a repository on a server."""
    with HubServer(DEMO, REPO) as served:
        yield served


def test_model_and_tokenizer_take_the_same_arguments(shipped, tmp_path):
    seen, cache = set(), tmp_path / "another"
    shipped.on_headers = lambda headers: seen.add(headers.get("Authorization"))
    given = {"cache_dir": cache, "token": "hf_abcdefghijklmnopqrst", "revision": shipped.commit()}
    given |= {"trust_remote_code": False, "hub": {"endpoint": shipped.endpoint, "progress": False}}
    tokenizer = load_tokenizer(REPO, **given)
    assert seen == {f"Bearer {given['token']}"} and shipped.gets["tokenizer.json"] == 1
    before = shipped.gets.copy()
    model = from_pretrained(REPO, device="cpu", cache_size=2, **given)
    assert shipped.gets == before, "fetched a second time"
    assert cache in model.offload.checkpoint.folder.parents and not Path(constants.HF_HUB_CACHE).exists()
    model.offload.cache.close()
    shipped.close()
    again = load_tokenizer(REPO, **given, local_files_only=True)
    assert again.get_vocab() == tokenizer.get_vocab()
    with pytest.raises(DownloadError, match="local_files_only"):
        load_tokenizer(REPO, local_files_only=True)


def test_a_tokenizer_of_another_repository(shipped, tmp_path):
    """It takes the place and the token, not the model's revision nor its folder."""
    given = {"cache_dir": tmp_path / "another", "revision": "no-such-branch"}
    hub = {"endpoint": shipped.endpoint, "progress": False, "local_dir": tmp_path / "model"}
    load_tokenizer("some/other", tokenizer=REPO, hub=hub, **given)
    assert given["cache_dir"].exists() and not hub["local_dir"].exists()


@pytest.mark.parametrize("endpoint", [None, "http://127.0.0.1:9"])
def test_mixtrals_own_tokenizer_is_fetched_with_the_same_arguments(tmp_path, monkeypatch, endpoint):
    """A token for another endpoint is not sent to the usual one."""
    asked = []

    def from_pretrained(name, **arguments):
        asked.append(arguments)
        raise OSError(f"{name} is not here")

    monkeypatch.setattr("mixtral_offload.generation.tokenizer.AutoTokenizer.from_pretrained", from_pretrained)
    config = json.loads((DEMO / "config.json").read_text()) | {"vocab_size": 32000}
    (tmp_path / "config.json").write_text(json.dumps(config))
    given = {"cache_dir": tmp_path / "another", "local_files_only": True}
    with pytest.raises(DownloadError, match="has no tokenizer"):
        load_tokenizer(tmp_path, token="secret-1", revision="v1", hub={"endpoint": endpoint}, **given)
    assert asked == [given | ({} if endpoint else {"token": "secret-1"})] * 2


@pytest.mark.parametrize(
    "given", [{"dtype": "float16"}, {"cach_dir": "x"}, {"trust_remote_code": True}, {"subfolder": "x"}]
)
def test_arguments_that_a_tokenizer_does_not_have(given):
    with pytest.raises(OptionError, match=next(iter(given))):
        load_tokenizer(**given)
    load_tokenizer(**dict.fromkeys(given))  # None changes nothing
