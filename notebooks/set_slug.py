"""Write the repository's name on GitHub into the notebooks.

    python notebooks/set_slug.py [OWNER/NAME]

setup.py has it (`GITHUB`); badges and setup cells repeat it. With an argument, setup.py is changed first.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SETUP = re.compile(r'^GITHUB = "([^"]+)"', re.MULTILINE)
#: where a slug stands in a notebook: the badge's address and the address pip installs from
USES = re.compile(
    r"((?:colab\.research\.google\.com/github|git\+https://github\.com)/)([\w.-]+/[\w.-]+?)(?=/blob/|\\?\")"
)


def slug() -> str:
    return SETUP.search((ROOT / "setup.py").read_text(encoding="utf-8"))[1]


def slugs_in(path: Path) -> list[str]:
    return [found[1] for found in USES.findall(path.read_text(encoding="utf-8"))]


def write(new: str) -> None:
    setup = ROOT / "setup.py"
    setup.write_text(SETUP.sub(f'GITHUB = "{new}"', setup.read_text(encoding="utf-8")), encoding="utf-8")
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        path.write_text(USES.sub(rf"\g<1>{new}", path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    write(sys.argv[1] if len(sys.argv) > 1 else slug())
