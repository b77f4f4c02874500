"""All checks in full, with a record.

    python -m tests.reliability.run [--only NAME ...] [--soak-turns 2000] [--soak-tokens 100000]

Each check that was run replaces its record in benchmarks/results/reliability.json, with the machine. The
README's table is made from that file (`python benchmarks/readme.py`).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from .at_once import check_at_once
from .drops import check_drops
from .fuzz import check_fuzz
from .identity import check_identity
from .interrupts import check_interrupts
from .malformed import check_malformed
from .mutants import check_mutants
from .read_errors import check_read_errors
from .result import Result, machine
from .soak import check_soak

RECORD = Path(__file__).parents[2] / "benchmarks" / "results" / "reliability.json"


def checks(soak_turns: int, soak_tokens: int) -> dict[str, Callable[[], Result]]:
    """Name -> the check in full, the short ones first."""

    def log(text: str) -> None:
        print(text, flush=True)

    return {
        "identity": check_identity,
        "interrupts": check_interrupts,
        "malformed": check_malformed,
        "drops": check_drops,
        "read errors": check_read_errors,
        "at once": check_at_once,
        "faults": check_mutants,
        "fuzz": lambda: check_fuzz(log=log),
        "soak": lambda: check_soak(soak_turns, soak_tokens, log=log),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", help="names of checks")
    parser.add_argument("--soak-turns", type=int, default=2000)
    parser.add_argument("--soak-tokens", type=int, default=100_000)
    arguments = parser.parse_args()
    of = checks(arguments.soak_turns, arguments.soak_tokens)
    record = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    wrong = 0
    for name in arguments.only or of:
        begin = time.perf_counter()
        result = of[name]()
        result.seconds = round(time.perf_counter() - begin, 1)
        wrong += result.wrong
        outcome = f"{result.wrong} of {result.tried} {result.unit}, {result.seconds:.0f} s"
        print(f"{result.what}: {outcome}; {result.details or ''}", flush=True)
        record[name] = result.asdict() | {"machine": machine(), "date": time.strftime("%Y-%m-%d")}
        RECORD.write_text(json.dumps({name: record[name] for name in of if name in record}, indent=1) + "\n")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
