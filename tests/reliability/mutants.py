"""Faults put into the package on purpose, one at a time: the tests must notice each.

    python -m tests.reliability.mutants [NAME ...]

Each mutant is a copy of the package with one piece of text replaced. A test that passes on an unchanged copy
must fail on it; a mutant without such a test is a gap in the tests.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from .result import Result

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 300


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        what: What is wrong.
        file: Module of the package.
        old: Text of the module, once in it.
        new: What stands there instead.
        tests: pytest's arguments: tests that must fail.
    """

    what: str
    file: str
    old: str
    new: str
    tests: str


MUTANTS = (
    Mutant(
        "an expert is published before its copy has ended", "runtime/cache.py",
        "                _copy_of(load).wait()\n", "",
        "tests/reliability/test_detect.py",
    ),
    Mutant(
        "the wait for a copy is dropped where a prediction had started it", "runtime/cache.py",
        "                _copy_of(load).wait()\n",
        "                if not load.is_predicted: _copy_of(load).wait()\n",
        "tests/reliability/test_detect.py tests/runtime/test_prefetch.py",
    ),
    Mutant(
        "slots are off by one", "runtime/cache.py",
        "            yield key[1], self._views[held[key] if row is None else row]",
        "            yield key[1], self._views[held[key] - 1 if row is None else row]",
        "tests/reliability/test_detect.py",
    ),
    Mutant(
        "w1 and w3 are swapped", "models/family.py",
        '    "w1": "gate",', '    "w1": "up",',
        "tests/models/test_published_format.py",
    ),
    Mutant(
        "experts of the wrong layer", "runtime/store.py",
        "        return [(0, self._slab[self._row[expert]])]",
        "        return [(0, self._slab[self._row.get((expert[0] + 1, expert[1]), self._row[expert])])]",
        "tests/reliability/test_detect.py",
    ),
    Mutant(
        "a stale KV cache: a turn keeps the last turn's whole", "generation/turn_cache.py",
        "            self.past.crop(-surplus)", "            pass",
        "tests/generation/test_chat.py tests/reliability/test_detect.py",
    ),
    Mutant(
        "routing weights are not the router's", "runtime/forward.py",
        "    return _sum(module.offload, y, top_k_weights)\n",
        "    return _sum(module.offload, y, 1.1 * top_k_weights)\n",
        "tests/reliability/test_detect.py",
    ),
    Mutant(
        "a prediction takes a slot in use", "core/residency.py",
        "            rows += pool.held.values()\n", "            rows += list(pool.held.values())[1:]\n",
        "tests/reliability/test_detect.py tests/runtime/test_cache.py",
    ),
    Mutant(
        "the mask is cut at the wrong end", "runtime/pass_state.py",
        "    real = mask[:, positions].reshape(-1).bool()",
        "    real = mask[:, -shape[1] :].reshape(-1).bool()",
        "tests/runtime/test_pass_state.py -k masks_longer",
    ),
    Mutant(
        "results are summed in the order in which experts arrive", "runtime/forward.py",
        "    y = torch.cat([results[expert] for expert in chosen]).to(x.dtype).unsqueeze(0)",
        "    y = torch.cat(list(results.values())).to(x.dtype).unsqueeze(0)",
        "tests/reliability/test_detect.py",
    ),
    Mutant(
        "a forked child writes into the parent's slots", "runtime/store.py",
        "flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS", "flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS",
        "tests/runtime/test_pass_state.py -k forked",
    ),
    Mutant(
        "gradients use what the slots hold now", "runtime/forward.py",
        "            for expert, views in offload.cache.fetch(ctx.module.layer, needed):",
        "            for expert, views in zip(needed, offload.cache._views):",
        "tests/runtime/test_gradients.py",
    ),
    Mutant(
        "an interrupted copy's slot is handed out while it is still written", "runtime/cache.py",
        "        elif do is Do.ABANDON:\n            _abandon(load)\n", "",
        "tests/runtime/test_cache.py",
    ),
    Mutant(
        "a quantized layer drops its bias", "weights/hqq.py",
        "        return y if bias is None else y + bias\n", "        return y\n",
        "tests/models/test_families.py -k quantized_attention",
    ),
    Mutant(
        "experts of another module are taken for the model's own", "models/keys.py",
        'module = self.module_name(stored.module)',
        'module = re.sub(r"^.*?layers", "model.layers", self.module_name(stored.module))',
        "tests/models/test_keys.py",
    ),
    Mutant(
        "what config.json states about bits is not compared", "weights/manifest.py",
        "    if matrix is not None and matrix.shape != shape:", "    if False:",
        "tests/weights/test_manifest.py",
    ),
    Mutant(
        "a checksum is not compared", "weights/checksums.py",
        "        if found != self.expected:", "        if False:",
        "tests/weights/test_checksums.py",
    ),
)  # fmt: skip


def noticed_by(mutant: Mutant, timeout_s: float = TIMEOUT_S) -> str | None:
    """Run the mutant's tests on a copy of the package with its fault.

    Returns:
        The first test that fails or does not end in time, as pytest names it; None if all pass.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = _copy(Path(folder))
        module = copy / "mixtral_offload" / mutant.file
        text = module.read_text()
        assert text.count(mutant.old) == 1, (
            f"{mutant.what}: {mutant.file} has changed, so this mutant must too"
        )
        module.write_text(text.replace(mutant.old, mutant.new))
        return _first_failure(copy, shlex.split(mutant.tests), timeout_s)


def fails_without_a_fault(test: str, timeout_s: float = TIMEOUT_S) -> bool:
    """Run one test on an unchanged copy: if it fails there too, it did not notice a fault, but the copy."""
    with tempfile.TemporaryDirectory() as folder:
        return _first_failure(_copy(Path(folder)), [test], timeout_s) is not None


def check_mutants(mutants: tuple[Mutant, ...] = MUTANTS) -> Result:
    """Try each mutant; wrong are those without a test that fails on them and passes without the fault."""
    tests = {mutant.what: noticed_by(mutant) for mutant in mutants}
    wrong = [what for what, test in tests.items() if test is None or fails_without_a_fault(test)]
    return Result(
        "faults put into the package that no test notices",
        len(wrong),
        len(mutants),
        "faults",
        details={"noticed_by": tests, "unnoticed": wrong},
    )


def _copy(folder: Path) -> Path:
    for part in ("mixtral_offload", "tests", "training", "pyproject.toml"):
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / part)
    return folder


def _first_failure(copy: Path, tests: list[str], timeout_s: float) -> str | None:
    command = [sys.executable, "-m", "pytest", "-v", "-x", "-n", "0", "-o", "cache_dir=.cache", *tests]
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    try:
        found = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired as error:
        lines = [line for line in (error.stdout or b"").decode().splitlines() if "::" in line]
        assert lines, f"no test began in {timeout_s:g} s"
        return lines[-1].strip()  # the test that was running: its result is not behind it
    assert found.returncode in (0, 1), found.stdout + found.stderr  # 2 and more: the tests did not run
    if found.returncode == 0:
        return None
    (failed,) = json.loads((copy / ".cache/v/cache/lastfailed").read_text())
    return failed


if __name__ == "__main__":
    for mutant in MUTANTS:
        if len(sys.argv) == 1 or any(word in mutant.what for word in sys.argv[1:]):
            begin = time.perf_counter()
            test = noticed_by(mutant)
            end = time.perf_counter()
            state = f"noticed by {test}" if test else "NOT NOTICED"
            if test and fails_without_a_fault(test):
                state += ", which FAILS WITHOUT IT TOO"
            print(f"{mutant.what}: {state} ({end - begin:.0f} s)", flush=True)
