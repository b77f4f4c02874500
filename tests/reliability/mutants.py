"""Faults put into the package on purpose, one at a time: the tests must notice each.

    python -m tests.reliability.mutants [NAME ...]

Each mutant is a copy of the package with one piece of text replaced, on which tests run that pass on the package itself. A
mutant that no test notices is a hole in the tests.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
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
        "an expert is published before its copy has ended", "cache.py",
        "        copy.wait()\n        end = time", "        end = time",
        "tests/reliability/test_detect.py",
    ),
    Mutant(
        "the wait for a copy is dropped where a prediction had started it", "copies.py",
        "            while self.state not in OVER:", "            while self.state not in OVER and not self.was_guess:",
        "tests/reliability/test_detect.py tests/test_transfer.py tests/test_prefetch.py",
    ),
    Mutant(
        "slots are off by one", "cache.py",
        "            yield key[1], self._views[pool.held[key] if row is None else row]",
        "            yield key[1], self._views[pool.held[key] - 1 if row is None else row]",
        "tests/reliability/test_detect.py",
    ),
    Mutant(
        "w1 and w3 are swapped", "keys.py",
        '    "w1": "gate",', '    "w1": "up",',
        "tests/test_published_format.py",
    ),
    Mutant(
        "experts of the wrong layer", "store.py",
        "        return [(0, self._slab[self._row[expert]])]",
        "        return [(0, self._slab[self._row.get((expert[0] + 1, expert[1]), self._row[expert])])]",
        "tests/reliability/test_detect.py",
    ),
    Mutant(
        "a stale KV cache: a turn keeps the last turn's whole", "chat.py",
        "            self._past.crop(-surplus)", "            pass",
        "tests/test_chat.py tests/reliability/test_detect.py",
    ),
    Mutant(
        "routing weights are not the router's", "forward.py",
        "    return (y * top_k_weights.unsqueeze(-1)).sum(1).to(y.dtype)",
        "    return (y * top_k_weights.unsqueeze(-1) * 1.1).sum(1).to(y.dtype)",
        "tests/reliability/test_detect.py",
    ),
    Mutant(
        "a prediction takes a slot in use", "cache.py",
        "            used.update(pool.held.values())\n", "            used.update(list(pool.held.values())[1:])\n",
        "tests/reliability/test_detect.py tests/test_cache.py",
    ),
    Mutant(
        "the mask is cut at the wrong end", "pass_state.py",
        "    real = mask[:, positions].reshape(-1).bool()", "    real = mask[:, -shape[1] :].reshape(-1).bool()",
        "tests/test_passes.py -k masks_longer",
    ),
    Mutant(
        "results are summed in the order in which experts arrive", "forward.py",
        "    return torch.cat([results[expert] for expert in chosen]).to(x.dtype).unsqueeze(0)",
        "    return torch.cat(list(results.values())).to(x.dtype).unsqueeze(0)",
        "tests/reliability/test_detect.py",
    ),
    Mutant(
        "a forked child writes into the parent's slots", "store.py",
        "flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS", "flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS",
        "tests/test_passes.py -k forked",
    ),
    Mutant(
        "gradients use what the slots hold now", "forward.py",
        "            for expert, views in offload.cache.serve(ctx.module.layer, needed):",
        "            for expert, views in zip(needed, offload.cache._views):",
        "tests/test_passes.py -k gradients",
    ),
    Mutant(
        "an interrupted copy's slot is handed out while it is still written", "cache.py",
        "            copy.abandon()\n            pool.loading.pop(key)", "            pool.loading.pop(key)",
        "tests/test_cache.py",
    ),
    Mutant(
        "a quantized layer drops its bias", "quantization.py",
        "        if self.bias is not None:\n", "        if self.bias is None:\n",
        "tests/test_families.py -k quantized_attention",
    ),
    Mutant(
        "experts of another module are taken for the model's own", "keys.py",
        'module = self.module_name(match["module"])',
        'module = re.sub(r"^.*?layers", "model.layers", self.module_name(match["module"]))',
        "tests/test_keys.py",
    ),
    Mutant(
        "what config.json states about bits is not compared", "manifest.py",
        "    if matrix is not None and matrix.shape != shape:", "    if False:",
        "tests/test_manifest.py",
    ),
    Mutant(
        "a checksum is not compared", "checksums.py",
        "        if found != self.expected:", "        if False:",
        "tests/test_checksums.py",
    ),
)  # fmt: skip


def control(mutants: tuple[Mutant, ...] = MUTANTS) -> list[Mutant]:
    """For each set of tests, a mutant that changes nothing: it must not be noticed."""
    tests = dict.fromkeys(mutant.tests for mutant in mutants)
    return [
        Mutant(f"nothing ({of})", "cache.py", "class ExpertCache:", "class ExpertCache:", of) for of in tests
    ]


def short_control() -> list[Mutant]:
    """The same in two runs: the files whose tests all run, and those of which some are chosen; without the longest."""
    long = ("tests/test_cache.py", "tests/test_transfer.py", "tests/test_chat.py")
    whole = {
        name for of in control() if " -k " not in of.tests for name in of.tests.split() if name not in long
    }
    chosen = [of.tests.split(" -k ") for of in control() if " -k " in of.tests]
    names, words = ({of[number] for of in chosen} for number in (0, 1))
    tests = " ".join(sorted(whole)), f"{' '.join(sorted(names))} -k '{' or '.join(sorted(words))}'"
    return [replace(control()[0], what=f"nothing ({of})", tests=of) for of in tests]


def is_noticed(mutant: Mutant, timeout_s: float = TIMEOUT_S) -> bool:
    """Run the mutant's tests on a copy of the package with its fault; returns whether one of them fails, or hangs."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in ("mixtral_offload", "tests", "training", "pyproject.toml"):
            source = ROOT / part
            if source.is_dir():
                shutil.copytree(source, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / part)
        module = copy / "mixtral_offload" / mutant.file
        text = module.read_text()
        assert text.count(mutant.old) == 1, (
            f"{mutant.what}: {mutant.file} has changed, so this mutant must too"
        )
        module.write_text(text.replace(mutant.old, mutant.new))
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-n",
            "0",
            "-p",
            "no:cacheprovider",
            *shlex.split(mutant.tests),
        ]
        environment = os.environ | {"PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
        try:
            found = subprocess.run(
                command, cwd=copy, env=environment, capture_output=True, text=True, timeout=timeout_s
            )
        except subprocess.TimeoutExpired:
            return True
        assert found.returncode in (0, 1), found.stdout + found.stderr  # 2 and more: the tests did not run
        return found.returncode == 1


def check_mutants(mutants: tuple[Mutant, ...] = MUTANTS) -> Result:
    """Try each mutant; wrong are those that no test notices."""
    unnoticed = [mutant.what for mutant in mutants if not is_noticed(mutant)]
    unnoticed += [f"tests fail on {mutant.what}" for mutant in control(mutants) if is_noticed(mutant)]
    return Result(
        "faults put into the package that no test notices", len(unnoticed), len(mutants), "faults",
        details={"faults": [mutant.what for mutant in mutants], "unnoticed": unnoticed},
    )  # fmt: skip


if __name__ == "__main__":
    for mutant in (*MUTANTS, *control()):
        if len(sys.argv) == 1 or any(word in mutant.what for word in sys.argv[1:]):
            begin = time.perf_counter()
            noticed = is_noticed(mutant)
            print(
                f"{'noticed' if noticed else 'NOT NOTICED'}: {mutant.what} ({time.perf_counter() - begin:.0f} s)",
                flush=True,
            )
