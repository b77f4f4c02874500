"""Building a model of more than 2 GB never takes more memory than its parts; measured in processes of their own."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_building_stays_within_its_bound(tmp_path):
    command = [
        sys.executable,
        "benchmarks/loading.py",
        "--gb",
        "2.1",
        "--repeats",
        "1",
        "--json",
        str(tmp_path / "loading.json"),
    ]
    subprocess.run(command, cwd=ROOT, check=True, timeout=400)
    result = json.loads((tmp_path / "loading.json").read_text())
    assert result["checkpoint_bytes"] > 2e9
    assert {case["home"] for case in result["cases"]} == {"ram", "disk", None}
    for case in result["cases"]:
        assert case["peak_bytes"] <= case["bound_bytes"], case
        if case["home"] != "disk":
            assert case["peak_bytes"] > 2e9  # the measurement sees what is there
