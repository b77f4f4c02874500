"""Fixtures of the tests of downloads."""

import json
import random
import time

import huggingface_hub
import pytest
from huggingface_hub import constants

from tests.hub_server import HubServer
from tests.weights.hub_case import NEEDED, REPO, SHARDS, USELESS


@pytest.fixture(scope="module")
def no_proxy():
    """huggingface_hub reads the proxies when it makes its client: make a new one, without them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            patch.delenv(name, raising=False)
            patch.delenv(name.lower(), raising=False)
        huggingface_hub.close_session()
        yield
    huggingface_hub.close_session()


@pytest.fixture
def surroundings(tmp_path, monkeypatch, no_proxy):
    """A separate hub cache, online and without a token, whatever the environment states."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)


@pytest.fixture
def server(tmp_path, surroundings):
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
