"""The site: pages made from the code, pictures made by commands, and the check of links."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from mentor_trl import MentorGRPOConfig
from mentor_trl.cli import main


DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def reference() -> dict:
    return runpy.run_path(str(DOCS / "tools" / "reference.py"))


@pytest.mark.parametrize("page", ["config", "cli"])
def test_reference_pages_are_those_of_the_code(reference, page):
    made = reference[f"{page}_page"]()
    assert (DOCS / "reference" / f"{page}.md").read_text() == made, "write them anew: make reference"


def test_every_field_and_every_command_has_an_entry():
    config, cli = ((DOCS / "reference" / page).read_text() for page in ("config.md", "cli.md"))
    assert re.findall(r'<a id="(\w+)">', config) == list(MentorGRPOConfig.__annotations__)
    assert set(re.findall(r"^## mentor-trl (\w+)$", cli, re.MULTILINE)) == set(main.COMMANDS)
    assert "### mentor-trl data trajectories\n" in cli and "### mentor-trl plot rollout\n" in cli
    assert "- **`--hint_fraction`** (`float`): If set" in cli and "<think>" not in cli


@pytest.mark.parametrize("name", ["engines", "step"])
def test_pictures_are_those_of_their_scripts(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(DOCS / "pictures")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", str(tmp_path)])
    runpy.run_path(str(DOCS / "pictures" / f"{name}.py"), run_name="__main__")
    assert {file.name for file in tmp_path.iterdir()} == {f"{name}.svg", f"{name}-dark.svg"}
    # matplotlib notes the words that it turns into outlines
    for file in tmp_path.iterdir():
        drawn, kept = (
            re.findall(r"<!-- (.*?) -->", path.read_text()) for path in (file, DOCS / "pictures" / file.name)
        )
        assert drawn == kept and len(drawn) > 10


SITE = {
    "index.html": '<a href="deep/page.html#there">x</a><img src="a.svg"><a href="#top">x</a><h1 id="top">x</h1>',
    "deep/page.html": '<h2 id="there">x</h2><a href="../index.html">x</a><a href="https://elsewhere.org/#x">x</a>',
    "a.svg": "<svg/>",
}


@pytest.mark.parametrize(
    ("page", "old", "new", "dead"),
    [
        ("index.html", "", "", []),
        ("index.html", "page.html#there", "gone.html", ["index.html: deep/gone.html"]),
        ("index.html", "#there", "#gone", ["index.html: deep/page.html#gone"]),
        ("index.html", "a.svg", "b.svg", ["index.html: b.svg"]),
        ("index.html", 'id="top"', "", ["index.html: #top"]),
        ("deep/page.html", "../index.html", "index.html", ["deep/page.html: index.html"]),
    ],
)
def test_dead_links_of_a_site_are_found(page, old, new, dead, tmp_path, capsys):
    check = runpy.run_path(str(DOCS / "tools" / "check.py"))
    for name, text in SITE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text.replace(old, new) if name == page and old else text)
    assert check["dead_links"](tmp_path) == dead
    assert check["main"](str(tmp_path)) == bool(dead) and (dead or ["2 pages, no dead link"]) == [
        line for line in capsys.readouterr().out.splitlines()
    ]


def test_every_page_of_the_navigation_is_there():
    listed = re.findall(r"(\S+\.md)$", (DOCS.parent / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_the_script_of_the_readme_is_short():
    (script,) = re.findall(r"```python\n(.*?)```", (DOCS.parent / "README.md").read_text(), re.DOTALL)
    assert len([line for line in script.splitlines() if line]) <= 17
