"""Check a built site: `python docs/tools/check.py site`. Every link, picture and anchor must lead somewhere."""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class _Page(HTMLParser):
    """The links of a page, and what they may lead to in it."""

    def __init__(self, file: Path):
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = {""}
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        self.links += [given[name] for name in ("href", "src", "srcset") if given.get(name)]


def dead_links(site: Path) -> list[str]:
    """What leads nowhere, a line each: page and link. Links to other sites are not followed."""
    pages = {file.resolve(): _Page(file) for file in sorted(site.rglob("*.html"))}
    # The page of errors is served at any depth
    return [
        f"{file.relative_to(site.resolve())}: {link}"
        for file, page in pages.items()
        if file.name != "404.html"
        for link in dict.fromkeys(page.links)
        if not _leads_somewhere(link, file, pages)
    ]


def _leads_somewhere(link: str, file: Path, pages: dict[Path, _Page]) -> bool:
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return True
    target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
    if target.is_dir():
        target /= "index.html"
    return target.is_file() and (target not in pages or unquote(parts.fragment) in pages[target].anchors)


def main(folder: str) -> int:
    """Print dead links; returns the exit code."""
    site = Path(folder)
    if not (site / "index.html").is_file():
        print(f"{site} holds no built site: it has no index.html", file=sys.stderr)
        return 2
    dead = dead_links(site)
    print("\n".join(dead) or f"{len(list(site.rglob('*.html')))} pages, no dead link")
    return 1 if dead else 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
