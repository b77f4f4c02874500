"""Models by their names, in Python and on the command line."""

import json
from pathlib import Path

import pytest
from huggingface_hub import constants

from mixtral_offload import from_pretrained, load_tokenizer
from mixtral_offload.apps.cli import main
from mixtral_offload.errors import CheckpointError, DownloadError, OptionError
from mixtral_offload.weights import hub
from mixtral_offload.weights.source import DEMO, local_folder, resolve
from tests.hub_server import HubServer
from tests.twin import limit
from tests.weights.hub_case import REPO, held, whole

pytestmark = pytest.mark.usefixtures("surroundings")


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


@pytest.mark.both_products
def test_a_model_by_its_name_on_the_hub(published, expected, place):
    """Download, load and run the published format by repository name; the second time without the hub."""
    name = "lavawolfiee/Mixtral-8x7B-Instruct-v0.1-offloading-demo"
    with HubServer(published, name) as served:
        options = {"endpoint": served.endpoint, "progress": False, **place}
        for _ in range(2):
            model = from_pretrained(name, hub=options, device="cpu", cache_size=2)
            assert (model(expected["input_ids"]).logits - expected["logits"]).abs().max() < limit(1e-4, 2e-2)
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
