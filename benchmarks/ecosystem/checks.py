"""One line per check: what was compared, the figure, the tolerance, and the machine."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version

import torch

from mixtral_offload.system.machine import processor

#: instruction sets on which the speed and the last bits of a product depend
COMMON = ("torch", "transformers", "huggingface-hub")


@dataclass
class Check:
    """The outcome of one comparison.

    Attributes:
        what: What was compared.
        figure: The largest difference found, or the number of unequal answers.
        tolerance: The largest figure that passes.
        n: Number of values compared.
        unit: What was counted or measured.
        seconds: Wall time since the check before.
        message: Why it failed, where something was raised.
    """

    what: str
    figure: float | None
    tolerance: float
    n: int
    unit: str
    seconds: float = 0.0
    message: str | None = None

    @property
    def passed(self) -> bool:
        return self.figure is not None and self.figure <= self.tolerance

    def __str__(self) -> str:
        figure = "failed" if self.figure is None else f"{self.figure:.3g}"
        limit = f"at most {self.tolerance:g}; {self.unit}, {self.n}"
        line = f"{'ok ' if self.passed else 'BAD'} {self.what}: {figure} ({limit})"
        return f"{line}\n      {self.message}" if self.message else line


@dataclass
class Program:
    """What one program's checks found.

    Attributes:
        name: The script's name.
        packages: Distributions that it needs, the program's own first.
        skipped: Why nothing was run; None where it was.
    """

    name: str
    packages: tuple[str, ...]
    skipped: str | None = None
    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def asdict(self) -> dict:
        checks = [asdict(check) | {"passed": check.passed} for check in self.checks]
        return {"versions": versions(self.packages), "skipped": self.skipped, "checks": checks}


def run_program(name: str, packages: tuple[str, ...], checks: Callable[[], Iterable[Check]]) -> Program:
    """Run the checks of one program and print each; an exception ends them and counts as a failed check."""
    program = Program(name, packages)
    missing = [package for package in packages if versions([package])[package] is None]
    if missing:
        program.skipped = f"{missing[0]} is not installed (benchmarks/ecosystem/requirements.txt)"
        print(f"{name}: skipped, {program.skipped}", flush=True)
        return program
    print(f"{name}: {described(versions((*packages, *COMMON)))}; {described(machine())}", flush=True)
    for check in _until_raised(checks):
        program.checks.append(check)
        print(f"  {check}", flush=True)
    return program


def _until_raised(checks: Callable[[], Iterable[Check]]) -> Iterator[Check]:
    began_s = time.perf_counter()
    try:
        for check in checks():
            check.seconds, began_s = time.perf_counter() - began_s, time.perf_counter()
            yield check
    except Exception as error:  # of any program: reported, and the next program runs
        message = f"{type(error).__name__}: {str(error) or '(no message)'}"
        yield Check(
            "the program ran to its end", None, 0, 1, "programs", time.perf_counter() - began_s, message
        )


def refused(what: str, call: Callable[[], object], expected: type[Exception]) -> Check:
    """A check that passes where `call` is refused with an `expected` error."""
    try:
        call()
        message = "nothing was raised"
    except expected as error:
        return Check(what, 0, 0, 1, "calls not refused", message=str(error).splitlines()[0])
    except Exception as error:  # refused by somebody else, in other words
        message = f"{type(error).__name__}: {error}"
    return Check(what, 1, 0, 1, "calls not refused", message=message)


def equal(what: str, found: list, expected: list, unit: str = "unequal answers") -> Check:
    """Check that every answer is the expected one; keep the first unequal pair."""
    wrong = [(a, b) for a, b in zip(found, expected, strict=True) if a != b]
    message = f"{wrong[0][0]!r} instead of {wrong[0][1]!r}" if wrong else None
    return Check(what, len(wrong), 0, len(found), unit, message=message)


def close(
    what: str,
    found: list[torch.Tensor],
    expected: list[torch.Tensor],
    tolerance: float,
    relative: bool = True,
) -> Check:
    """A check of the largest difference; relative to the largest expected value of each tensor."""
    unit = "largest relative difference" if relative else "largest difference"
    if [of.shape for of in found] != [of.shape for of in expected]:
        n, message = len(found), f"{len(found)} tensors, {len(expected)} expected, or of other shapes"
        return Check(what, None, tolerance, n, unit, message=message)
    errors = []
    for a, b in zip(found, expected, strict=True):
        difference = (a.double() - b.double()).abs().max().item()
        errors.append(difference / max(b.abs().max().item(), 1e-12) if relative else difference)
    # max() may lose a NaN
    worst = float("inf") if any(error != error for error in errors) else max(errors)
    return Check(what, worst, tolerance, sum(tensor.numel() for tensor in found), unit)


def exit_with(program: Program) -> None:
    """End a script: 1 where a check failed."""
    sys.exit(0 if program.passed else 1)


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """The installed version of each distribution; None where it is not installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def machine() -> dict[str, str | int]:
    """Processor, its instruction sets, and threads."""
    name, sets = processor()
    return {
        "processor": name,
        "instruction_sets": sets,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }


def described(facts: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())
