"""Building a model of more than 2 GB takes no more memory than its parts; measured in separate processes."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def loading():
    sys.path.insert(0, str(BENCHMARKS))
    import loading

    yield loading
    sys.path.remove(str(BENCHMARKS))


def test_building_stays_within_its_bound(loading, tmp_path):
    folder = tmp_path / "checkpoint"
    assert loading.make(folder, gb=2.0, vocab=4096) > 2e9
    cases = [
        loading.in_process(["--build", str(folder), store, str(size), "0"]) for store, size in loading.CASES
    ]
    assert {case["store"] for case in cases} == {"ram", "disk", None}
    for case in cases:
        assert case["peak_bytes"] <= case["bound_bytes"], case
        if case["store"] != "disk":
            assert case["peak_bytes"] > 2e9  # the measurement sees what is there
