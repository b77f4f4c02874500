"""Every program's checks; writes benchmarks/results/ecosystem.json.

python -m benchmarks.ecosystem.run [--only peft outlines]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from . import (
    checks,
    gradio_four_users,
    langchain_chat,
    llama_index_query,
    lm_eval_tasks,
    outlines_json,
    peft_lora,
)

RESULTS = Path(__file__).parents[1] / "results"
PROGRAMS = {
    "peft": peft_lora, "lm_eval": lm_eval_tasks, "outlines": outlines_json, "langchain": langchain_chat,
    "llama-index": llama_index_query, "gradio": gradio_four_users,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--out", type=Path, default=RESULTS / "ecosystem.json")
    arguments = parser.parse_args()
    found = [
        checks.run_program(name, PROGRAMS[name].PACKAGES, PROGRAMS[name].checks) for name in arguments.only
    ]
    machine, versions = checks.machine(), checks.versions(checks.COMMON)
    kept = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    is_same = kept.get("machine") == machine and kept.get("versions") == versions
    # of programs that were not run now, the record of this machine stays
    programs = (kept["programs"] if is_same else {}) | {program.name: program.asdict() for program in found}
    record = {"machine": machine, "versions": versions, "programs": programs}
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    failed = [program.name for program in found if not program.passed]
    n = sum(len(program.checks) for program in found)
    skipped = [program.name for program in found if program.skipped]
    print(f"{n} checks; failed: {', '.join(failed) or 'none'}; skipped: {', '.join(skipped) or 'none'}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
