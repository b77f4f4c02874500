import json
import os
import signal
from pathlib import Path

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # the tests' two processes would fight for the cores; before torch is imported

import pytest
import torch
from safetensors.torch import load_file

from mixtral_offload.runtime.build import from_pretrained
from mixtral_offload.weights.source import DEMO

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # a shell starts what it puts into the background deaf to Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

PUBLISHED = Path(__file__).parent / "fixtures" / "published-format"


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def published() -> Path:
    """A small checkpoint in the published format: 3 layers of 8 experts at 2 bits, attention at 4."""
    return PUBLISHED


@pytest.fixture(scope="session")
def expected() -> dict:
    """fp32 logits, router logits and a greedy continuation, computed from the dequantized weights."""
    return load_file(PUBLISHED / "expected.safetensors")


@pytest.fixture
def by_length(tmp_path) -> Path:
    """The shipped model with position encodings that depend on the length of a pass, which changes at 48 tokens."""
    folder = tmp_path / "by length"
    folder.mkdir()
    for path in (DEMO.parent / "fp16").iterdir():
        (folder / path.name).symlink_to(path)
    config = json.loads((folder / "config.json").read_text())
    half = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"]) // 2
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 48,
        "short_factor": [1.0] * half, "long_factor": [4.0] * half,
    }  # fmt: skip
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": rope, "rope_theta": None}))
    return folder


@pytest.fixture
def offloaded():
    """`from_pretrained` whose engines are closed after the test."""
    models = []

    def build(*arguments, **options):
        models.append(from_pretrained(*arguments, device=options.pop("device", "cpu"), **options))
        return models[-1]

    yield build
    for model in models:
        model.offload.cache.close()
