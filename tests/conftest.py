"""Fixtures of all tests. Those that need torch import it: `tests/core` runs without it, in seconds."""

import json
import os
import signal
from pathlib import Path

import pytest

# the tests' two processes would compete for the cores; before torch is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")

# background jobs of a non-interactive shell ignore SIGINT
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

PUBLISHED = Path(__file__).parent / "fixtures" / "published-format"


def pytest_collection_modifyitems(items):
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        import torch

        for item in on_gpu if not torch.cuda.is_available() else ():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def published() -> Path:
    """A small checkpoint in the published format: 3 layers of 8 experts at 2 bits, attention at 4."""
    return PUBLISHED


@pytest.fixture(scope="session")
def expected() -> dict:
    """fp32 logits, router logits and a greedy continuation, computed from the dequantized weights."""
    from safetensors.torch import load_file

    return load_file(PUBLISHED / "expected.safetensors")


@pytest.fixture
def by_length(tmp_path) -> Path:
    """The shipped model with position encodings that change when a pass is longer than 48 tokens."""
    from mixtral_offload.weights.source import DEMO

    folder = tmp_path / "by length"
    folder.mkdir()
    for path in (DEMO.parent / "fp16").iterdir():
        (folder / path.name).symlink_to(path)
    config = json.loads((folder / "config.json").read_text())
    half = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"]) // 2
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 48,
        "short_factor": [1.0] * half,
        "long_factor": [4.0] * half,
    }
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": rope, "rope_theta": None}))
    return folder


@pytest.fixture
def offloaded():
    """`from_pretrained` whose engines are closed after the test."""
    from mixtral_offload import from_pretrained

    models = []

    def build(*arguments, **options):
        models.append(from_pretrained(*arguments, device=options.pop("device", "cpu"), **options))
        return models[-1]

    yield build
    for model in models:
        model.offload.cache.close()
