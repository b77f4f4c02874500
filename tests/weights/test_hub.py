"""Downloads from a hub on 127.0.0.1 that drops connections, flips bytes, refuses and lies."""

import collections
import errno
import signal
import threading
import time
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from mixtral_offload.errors import DownloadError
from mixtral_offload.units import gb
from mixtral_offload.weights import hub
from tests.weights.hub_case import NEEDED, REPO, SHARDS, get, held, whole

pytestmark = pytest.mark.usefixtures("surroundings")


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
    """The hub's cache stays valid: huggingface_hub finds the files offline, and its scan has no warnings."""
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
def test_each_refusal_has_its_message(server, place, answer, says):
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


def test_another_cache_and_no_connection_to_the_hub(server, tmp_path):
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
