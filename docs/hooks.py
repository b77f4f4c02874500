"""Hooks of the documentation's build: notebooks, API pages, parts of Markdown files, commands' help.

Used by mkdocs (`mkdocs.yml`, `hooks`). Needs neither torch nor Jupyter. Three comments are replaced in a
page:

    <!-- include CHANGELOG.md -->                the whole file
    <!-- include README.md "In Python" -->       one section of it, without its heading
    <!-- command help -->                        the help of each command of `mixtral-offload`
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import os
import posixpath
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mixtral_offload"
INCLUDE = re.compile(r'^<!-- include (\S+?)(?: "(.+)")? -->$', re.MULTILINE)
COMMAND_HELP = "<!-- command help -->"
BADGE = re.compile(r"\[!\[(Open in Colab)\]\([^)]+\)\]")
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
    """Link to the repository. Not as `repo_url`: each visitor's browser would load numbers from GitHub."""
    config.extra["social"] = [{"icon": "fontawesome/brands/github", "link": repository()}]
    return config


def repository() -> str:
    """Find the repository's address in setup.py, where `notebooks/set_slug.py` writes it."""
    slug = re.search(r'^GITHUB = "([^"]+)"', (ROOT / "setup.py").read_text(encoding="utf-8"), re.MULTILINE)
    return f"https://github.com/{slug[1]}"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each notebook, with its pictures, the API's pages, and the pictures of the results."""
    for name, content in api_pages():
        files.append(File.generated(config, f"api/{name}.md", content=content))
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
        return relinked(text, posixpath.dirname(found[1]), page.file.src_uri)

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


def relinked(text: str, folder: str, page: str) -> str:
    """Turn links relative to `folder` of the repository into links of a page of the documentation."""

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
            return f"{found[1]}({repository()}/blob/main/{path})"
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
            parts.append(relinked(BADGE.sub(r"[\1]", source), "notebooks", f"notebooks/{path.stem}.md"))
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


def api_pages() -> list[tuple[str, str]]:
    """Write a page for the public names, one for each folder of the package, and one for its single files."""
    pages = [("index", public_names()), ("files", api_page("Single files", "", PACKAGE.glob("[a-z]*.py")))]
    for folder in sorted(path.parent for path in PACKAGE.glob("*/__init__.py")):
        intro = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
        modules = (path for path in folder.rglob("*.py") if not path.name.startswith("_"))
        pages.append((folder.name, api_page(folder.name, intro, modules)))
    return pages


def public_names() -> str:
    """Describe what `mixtral_offload` exports, in the order of `__all__`."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    modules = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mixtral_offload.")
        for alias in node.names
    }
    text = "# Public names\n\nWhat `from mixtral_offload import ...` gives. "
    text += "The next pages have the other modules, by folder.\n"
    for name in sorted(modules, key=str.lower):
        text += f"\n::: {modules[name]}\n    options: {{skip_local_inventory: true}}\n"
    return text


def api_page(title: str, intro: str, modules: Iterable[Path]) -> str:
    """Write a page with a section for each module."""
    text = f"# {title}\n\n{intro}\n"
    for path in sorted(modules):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        text += f"\n## {name.removeprefix('mixtral_offload.')}\n\n::: {name}\n"
        text += "    options: {show_root_heading: false, show_root_toc_entry: false}\n"
    return text


def command_help() -> str:
    """Print each command's own help."""
    sys.path.insert(0, str(ROOT))
    os.environ.update(COLUMNS="88", NO_COLOR="1")
    from mixtral_offload.apps.parser import COMMANDS, build_parser

    parts = []
    for name in COMMANDS:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            build_parser(dict.fromkeys(COMMANDS)).parse_args([name, "--help"])
        parts.append(f"### {name}\n\n```text\n{printed.getvalue().rstrip()}\n```")
    return "\n\n".join(parts)
