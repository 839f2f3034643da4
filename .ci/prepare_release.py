"""
Make the working tree that of a release: `python .ci/prepare_release.py v0.2.0 https://host/owner/name`.

Ends with an error unless the tag is the version, and CITATION.cff and CHANGELOG.md know it. PyPI shows README.md away
from its repository, so its relative links and pictures, and the links of the project, get the repository's address.
"""

import re
import sys
from pathlib import Path


ROOT = Path(__file__).parent.parent
# The target of a link or picture in Markdown and in HTML
TARGET = re.compile(r"""(?P<before>\]\(|\b(?:href|src|srcset)=")(?P<target>[^)"\s]+)""")
PICTURES = (".gif", ".jpg", ".png", ".svg", ".webp")


def problems(tag: str, root: Path = ROOT) -> list[str]:
    """What keeps the tag from being released."""
    version = re.search(r'__version__ = "(.+)"', (root / "mentor_trl" / "version.py").read_text())[1]
    found = [] if tag == f"v{version}" else [f"the tag is {tag}, and mentor_trl/version.py says {version}"]
    if not re.search(rf"^version: {re.escape(version)}$", (root / "CITATION.cff").read_text(), re.MULTILINE):
        found.append(f"CITATION.cff does not name version {version}")
    heading = re.search(r"^## (\S+)", (root / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    return found if heading == version else [*found, f"CHANGELOG.md starts with {heading}, not {version}"]


def absolute(text: str, address: str, tag: str) -> str:
    """
    Markdown whose relative links lead to the repository.

    >>> absolute("[a](docs/a.md#b) ![c](d.png) [e](#f)", "https://host/o/n", "v1")
    '[a](https://host/o/n/blob/v1/docs/a.md#b) ![c](https://host/o/n/raw/v1/d.png) [e](#f)'
    """

    def lead(found: re.Match) -> str:
        target = found["target"]
        if re.match(r"#|[a-z]+:", target):
            return found[0]
        kind = "raw" if target.lower().endswith(PICTURES) else "blob"
        return f"{found['before']}{address}/{kind}/{tag}/{target}"

    return TARGET.sub(lead, text)


def main(tag: str, address: str, root: Path = ROOT) -> None:
    if found := problems(tag, root):
        sys.exit("\n".join(found))
    readme, project = root / "README.md", root / "pyproject.toml"
    readme.write_text(absolute(readme.read_text(), address, tag))
    urls = {"Repository": address, "Issues": f"{address}/issues", "Changelog": f"{address}/blob/{tag}/CHANGELOG.md"}
    lines = "".join(f'{name} = "{url}"\n' for name, url in urls.items())
    project.write_text(project.read_text().replace("[project.urls]\n", f"[project.urls]\n{lines}"))


if __name__ == "__main__":
    main(*sys.argv[1:])
