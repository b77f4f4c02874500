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
def offloaded():
    """`from_pretrained` whose engines are closed after the test."""
    models = []

    def build(*arguments, **options):
        models.append(from_pretrained(*arguments, device=options.pop("device", "cpu"), **options))
        return models[-1]

    yield build
    for model in models:
        model.offload.cache.close()
