"""Listings, records and indexes that no hub and no download writes."""

import json
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from mixtral_offload.errors import DownloadError
from mixtral_offload.weights import hub
from tests.weights.hub_case import NEEDED, REPO, get, held, whole

pytestmark = pytest.mark.usefixtures("surroundings")


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
