"""Write the options' signature, Args and table from their declaration (`mixtral_offload/core/options.py`).

    python docs/options.py            the signature and the Args of `from_pretrained`, and the README's table
    python docs/options.py --check    fail where they differ from the declaration

Editors and documentation tools read signatures from source files, so they are written out there.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from mixtral_offload.core.options import declared  # noqa: E402

BUILD, README = ROOT / "mixtral_offload/runtime/build.py", ROOT / "README.md"
WIDTH = 110


def help_of(name: str) -> str:
    """Return the help of an option, with its default where the help does not state one."""
    option = declared()[name]
    states_none = option.default in (None, False) or "Default:" in option.metadata["help"]
    return option.metadata["help"] + ("" if states_none else f" Default: {option.default}.")


def signature() -> str:
    """Return the parameters of `from_pretrained` that are options."""
    return "".join(f"    {name}: {of.type} = {_literal(of.default)},\n" for name, of in declared().items())


def _literal(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def arguments() -> str:
    """Return their entries of `Args`."""
    entries = []
    for name in declared():
        indent, further = " " * 8, " " * 12
        entries += textwrap.wrap(
            f"{name}: {help_of(name)}", WIDTH, initial_indent=indent, subsequent_indent=further,
            break_on_hyphens=False,
        )  # fmt: skip
    return "\n".join(entries) + "\n"


def table() -> str:
    """Return the README's table."""
    rows = [f"| `{name}` | {help_of(name)} |" for name in declared()]
    return "\n".join(["| option | meaning |", "| --- | --- |", *rows]) + "\n"


def between(text: str, begin: str, end: str, content: str) -> str:
    """Replace what lies between two lines, which stay."""
    before, rest = text.split(begin, 1)
    _, after = rest.split(end, 1)
    return before + begin + content + end + after


def written() -> dict[Path, str]:
    """Return file -> its text as it should be."""
    build = BUILD.read_text(encoding="utf-8")
    build = between(
        build, "    # options: written by docs/options.py\n", "    # end of options\n", signature()
    )
    build = between(build, "that ships with the\n            package.\n", "        hub: ", arguments())
    readme = between(
        README.read_text(encoding="utf-8"), "<!-- options -->\n", "<!-- end of options -->", table()
    )
    return {BUILD: build, README: readme}


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the options into the files that show them.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail where something differs")
    check, status = parser.parse_args().check, 0
    for path, text in written().items():
        if path.read_text(encoding="utf-8") != text:
            status = int(check)
            print(f"{path.relative_to(ROOT)} {'differs: run python docs/options.py' if check else 'written'}")
            if not check:
                path.write_text(text, encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
