"""What `make docs` makes besides the pages in this folder.

- the start page from README.md, and pages from CONTRIBUTING.md and CHANGELOG.md
- the reference of keys and metrics (`reference.py`), and pages that mkdocstrings fills from
  docstrings
- a page with the source of every file, and the list of every folder, that a page links to: links
  like `../learner/losses.py` work on GitHub and, through these, in the site
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

import reference
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
FROM_ROOT = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changes.md"}
"""Pages that stand at the root of the repository, and their place in the site."""
LINK = re.compile(r"(?P<before>\]\(|\]: |(?:src|href)=\")(?P<target>[^)\s#\"]+)(?P<anchor>#[^)\s\"]*)?")
CODE = re.compile(r"`[^`]+`")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".md": "markdown", ".toml": "toml"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {target: (ROOT / name).read_text(encoding="utf-8") for name, target in FROM_ROOT.items()}
    pages |= {f"reference/{name}.md": text for name, text in reference.pages().items()}
    linked = set()
    for name in (*FROM_ROOT, *(f"docs/{file.src_uri}" for file in files.documentation_pages())):
        text = (ROOT / name).read_text(encoding="utf-8")
        linked |= {found for match in LINK.finditer(text) if (found := _outside(name, match["target"]))}
    pages |= {_source_page(name): _source(name) for name in sorted(linked)}
    for uri, text in pages.items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to files outside of docs/ at the pages made from them."""
    uri = page.file.src_uri
    name = next((name for name, target in FROM_ROOT.items() if target == uri), f"docs/{uri}")

    def moved(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(name), match["target"]))
        if path in FROM_ROOT:
            target = FROM_ROOT[path]
        elif _outside(name, match["target"]):
            target = _source_page(path)
        elif name in FROM_ROOT and path.startswith("docs/"):
            target = path.removeprefix("docs/")
        else:
            return match[0]
        return match["before"] + posixpath.relpath(target, posixpath.dirname(uri) or ".") + (match["anchor"] or "")

    return LINK.sub(moved, _for_python_markdown(markdown))


def _for_python_markdown(text: str) -> str:
    """Translate what GitHub reads otherwise.

    Two spaces nest in a list; an item needs no blank line before it; a pipe in a table's code needs
    a backslash.
    """
    lines = [""]
    fence, in_item, several_blocks = "", False, False
    for line in text.splitlines():
        if mark := re.match(r"`{3,}", line):
            fence = "" if mark[0] == fence else fence or mark[0]
        if fence:
            lines.append(line)
            continue
        after_blank = not lines[-1].strip()
        if re.match(r" *(-|\d+\.) ", line):
            if not after_blank and (several_blocks or not in_item):
                lines.append("")
            in_item, several_blocks = True, False
        elif after_blank and line.strip():
            in_item, several_blocks = in_item and line.startswith(" "), line.startswith(" ")
        if line.startswith("|"):
            line = CODE.sub(lambda code: code[0].replace("\\|", "|"), line)
        lines.append(" " * (len(line) - len(line.lstrip())) + line)
    return "\n".join(lines)


def _outside(page: str, target: str) -> str | None:
    """Return the path, from the root, of a linked file or folder that is no page of the site."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
    site = path.startswith("docs/") or path in FROM_ROOT or ":" in target
    return path if not site and (ROOT / path).exists() else None


def _source_page(path: str) -> str:
    return f"source/{path}.md"


def _source(path: str) -> str:
    place = ROOT / path
    if place.is_dir():
        entries = sorted(entry.name + "/" * entry.is_dir() for entry in place.iterdir() if entry.name[0] not in "._")
        text = "\n".join(f"- `{entry}`" for entry in entries)
        return f"# {path}/\n\n{text}\n"
    fence = "`" * 5
    code = place.read_text(encoding="utf-8").rstrip()
    return f"# {path}\n\n{fence}{LANGUAGES.get(place.suffix, 'text')}\n{code}\n{fence}\n"
