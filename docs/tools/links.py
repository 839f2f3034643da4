"""
Hook of MkDocs. Pages link to files of the repository as on GitHub; of these, the ones outside docs/, and folders,
become pages of the site under source/. A link that is called by a file's name is called by its title.
"""

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
LINK = re.compile(r"\[([^\[\]]*)\]\(([^)\s#]+)(?=[)#])")
LANGUAGES = {".py": "python", ".slurm": "bash", ".sh": "bash", ".yaml": "yaml", ".toml": "toml", ".json": "json"}

# The file or folder behind each page that is made here
_origins: dict[str, Path] = {}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each file or folder that a page links to and that is none of the site."""
    _origins.clear()
    waiting = [(file.content_string, DOCS / file.src_uri) for file in files.documentation_pages()]
    while waiting:
        text, origin = waiting.pop()
        for target in _targets(text, origin):
            uri = _uri(target)
            if uri in _origins or _in_site(target, files) or not target.exists():
                continue
            _origins[uri] = target
            content = _content(target)
            files.append(File.generated(config, uri, content=content))
            if target.suffix == ".md" or target.is_dir():
                waiting.append((content, target))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to these files into links to their pages."""
    uri = page.file.src_uri
    origin = _origins.get(uri, DOCS / uri)
    if origin.is_file() and origin.suffix != ".md":
        return markdown

    def turned(match: re.Match) -> str:
        text, link = match.groups()
        target = _target(link, origin)
        if target is None or not target.exists():
            return match[0]
        to = target.relative_to(DOCS).as_posix() if _in_site(target, files) else _uri(target)
        name = _title(target) if text.endswith(".md") else text
        return f"[{name}]({os.path.relpath(to, Path(uri).parent).replace(os.sep, '/')}"

    return LINK.sub(turned, markdown)


def _target(link: str, origin: Path) -> Path | None:
    if ":" in link or link.startswith("/"):
        return None
    folder = origin if origin.is_dir() else origin.parent
    return Path(os.path.normpath(folder / link))


def _targets(text: str, origin: Path) -> list[Path]:
    found = (_target(link, origin) for _, link in LINK.findall(text))
    return [target for target in found if target is not None]


def _in_site(target: Path, files: Files) -> bool:
    if not target.is_relative_to(DOCS):
        return False
    file = files.get_file_from_path(target.relative_to(DOCS).as_posix())
    return file is not None and file.inclusion.is_included()


def _title(page: Path) -> str:
    heading = re.search(r"^# (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return heading[1] if heading else page.name


def _uri(target: Path) -> str:
    name = target.relative_to(ROOT).as_posix()
    return f"source/{name}" if target.suffix == ".md" else f"source/{name}.md"


def _content(target: Path) -> str:
    front = "---\nsearch:\n  exclude: true\n---\n\n"
    name = target.relative_to(ROOT).as_posix()
    if target.is_dir():
        # Only files: a folder in a folder would bring the whole repository
        names = sorted(path.name for path in target.iterdir() if path.is_file() and not path.name.startswith("."))
        inside = target.is_relative_to(DOCS)
        lines = [f"- [{one}]({one})" if inside and not one.endswith(".py") else f"- {one}" for one in names]
        return f"{front}# {name}/\n\n" + "\n".join(lines) + "\n"
    text = target.read_text(encoding="utf-8")
    if target.suffix == ".md":
        return front + text
    return f"{front}# {name}\n\n`````{LANGUAGES.get(target.suffix, 'text')}\n{text}\n`````\n"
