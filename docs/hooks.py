"""Hooks of the documentation's build: notebooks as stored, parts of the repository's Markdown files, the commands' help.

Read by mkdocs (`mkdocs.yml`, `hooks`). Needs neither torch nor Jupyter. Three comments are replaced in a page:

    <!-- include CHANGELOG.md -->                the whole file
    <!-- include README.md "In Python" -->       one section of it, without its heading
    <!-- command help -->                        what each command of `mixtral-offload` takes
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import posixpath
import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
INCLUDE = re.compile(r'^<!-- include (\S+?)(?: "(.+)")? -->$', re.MULTILINE)
COMMAND_HELP = "<!-- command help -->"
LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s]+)\)")
#: files of the repository that are pages here
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "LOG.md": "log.md",
}
#: sections of the README that are pages of their own
SECTIONS = {"measured": "measured.md", "reliability": "reliability.md", "how-it-is-built": "architecture.md"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Take the repository's address from setup.py, where `notebooks/set_slug.py` writes it."""
    slug = re.search(r'^GITHUB = "([^"]+)"', (ROOT / "setup.py").read_text(encoding="utf-8"), re.MULTILINE)
    config.repo_url = f"https://github.com/{slug[1]}"
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each notebook, with its pictures, and the pictures of the results."""
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for name, content in notebook_files(path):
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.png")):
        files.append(File.generated(config, f"results/{path.name}", content=path.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace the comments that this module's docstring lists."""

    def included(found: re.Match) -> str:
        text = (ROOT / found[1]).read_text(encoding="utf-8")
        text = section(text, found[2], found[1]) if found[2] else text
        return relinked(text, posixpath.dirname(found[1]), page.file.src_uri, config.repo_url)

    markdown = INCLUDE.sub(included, markdown)
    return markdown.replace(COMMAND_HELP, command_help()) if COMMAND_HELP in markdown else markdown


def section(text: str, heading: str, file: str) -> str:
    """Find what stands below a heading, up to the next one of the same or a higher level."""
    level, lines, in_code = 0, [], False
    for line in text.splitlines():
        in_code ^= line.startswith("```")
        found = None if in_code else re.match(r"(#+) (.*)", line)
        if found and level and len(found[1]) <= level:
            return "\n".join(lines).strip()
        if level:
            lines.append(line)
        elif found and found[2] == heading:
            level = len(found[1])
    if not level:
        raise PluginError(f"{file} has no section {heading!r}")
    return "\n".join(lines).strip()


def relinked(text: str, folder: str, page: str, repo_url: str) -> str:
    """Turn links that hold beside `folder` of the repository into links that hold in `page` of the documentation."""

    def new(found: re.Match) -> str:
        target = found[2]
        if re.match(r"[a-z]+:", target):
            return found[0]
        path, _, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(folder, path)) if path else "README.md"
        if path == "README.md" and anchor in SECTIONS:
            path, anchor = SECTIONS[anchor], ""
        elif path in PAGES:
            path = PAGES[path]
        elif path.startswith("docs/"):
            path = path.removeprefix("docs/")
        elif path.startswith("notebooks/") and path.endswith(".ipynb"):
            path = path.removesuffix("ipynb") + "md"
        elif path.startswith("benchmarks/results/") and path.endswith(".png"):
            path = path.removeprefix("benchmarks/")
        elif (ROOT / path).exists():
            return f"{found[1]}({repo_url}/blob/main/{path})"
        else:
            raise PluginError(f"{page}: a link to {target}, which does not exist")
        relative = posixpath.relpath(path, posixpath.dirname(page) or ".")
        return f"{found[1]}({relative}{'#' + anchor if anchor else ''})"

    return LINK.sub(new, text)


def notebook_files(path: Path) -> list[tuple[str, str | bytes]]:
    """Turn a stored notebook into a page and its pictures: (name, content)."""
    parts, pictures = [], []
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(relinked(source, "notebooks", f"notebooks/{path.stem}.md", ""))
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}_{number}.png"
                pictures.append((name, base64.b64decode("".join(data["image/png"]))))
                parts.append(f"![What cell {number} draws]({name})")
            else:
                text = "".join(output.get("text") or data.get("text/plain", ""))
                parts.append(f'````{{ .text .output title="Output" }}\n{text.rstrip()}\n````')
    return [(f"{path.stem}.md", "\n\n".join(parts) + "\n"), *pictures]


def command_help() -> str:
    """Print each command's own help."""
    sys.path.insert(0, str(ROOT))
    os.environ.update(COLUMNS="100", NO_COLOR="1")
    from mixtral_offload.apps.parser import COMMANDS, build_parser

    parts = []
    for name in COMMANDS:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            build_parser(dict.fromkeys(COMMANDS)).parse_args([name, "--help"])
        parts.append(f"### {name}\n\n```text\n{printed.getvalue().rstrip()}\n```")
    return "\n\n".join(parts)
