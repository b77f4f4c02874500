"""The repository of the tests of downloads, and helpers."""

from mixtral_offload.weights import hub

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


def get(server, **options):
    return hub.download(REPO, endpoint=server.endpoint, **{"progress": False, **options})


def held(folder):
    """The files of a folder, without what the libraries keep under .cache."""
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith(".cache")}


def whole(server):
    return {name: data for name, data in server.files().items() if name in NEEDED}
