"""The site: pages made from the code, pictures made by commands, the check of links, and snippets that run."""

import re
import runpy
import sys
from functools import partial
from pathlib import Path

import datasets
import pytest

import mentor_trl
from mentor_trl import MentorGRPOConfig
from mentor_trl.cli import main, plot, train
from trainer_helpers import SETTINGS


DOCS = Path(__file__).parent.parent / "docs"
POLICY, EXPERT = "HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-360M-Instruct"
TINY = {**SETTINGS, "max_steps": 1}


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


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def newcomer(tmp_path, monkeypatch, tiny_model_dir, tiny_expert_dir):
    """A folder with the problems of the docs, and what turns a snippet into one with tiny models."""
    (rows,) = blocks("training.md", "json")
    (tmp_path / "my_problems.jsonl").write_text(rows)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mentor_trl, "MentorGRPOConfig", partial(MentorGRPOConfig, **TINY))
    return lambda text: text.replace(POLICY, str(tiny_model_dir)).replace(EXPERT, str(tiny_expert_dir))


def test_the_first_run_on_own_data(newcomer, capsys):
    command, look, *_ = blocks("training.md", "bash")
    words = newcomer(command).replace("\\\n", "").split()[2:]
    tiny = [text for name, value in TINY.items() for text in (f"--{name}", str(value))]
    train.run([*words, *tiny])
    assert Path("outputs/mine/recipe.yaml").exists()
    assert plot.main(look.split()[2:]) == 0 and "mixed" in capsys.readouterr().out


def test_a_config_file_that_fits(newcomer, capsys):
    make, dry_run, launch = newcomer(blocks("training.md", "bash")[2]).replace("\\\n", "").splitlines()
    assert main.main([*make.split()[1:], "--gpus", "0"]) == 0
    before = sorted(Path().rglob("*"))
    assert train.run(dry_run.split()[2:]) == 0
    assert "One step on 8 rollouts, 4 of them mixed" in " ".join(capsys.readouterr().out.split())
    assert sorted(Path().rglob("*")) == before and launch.split()[1:] == ["train", "--config", "mine.yaml"]


def test_the_script_on_own_data(newcomer):
    reward, script = blocks("training.md", "python")
    names: dict = {}
    exec(newcomer(script), names)
    assert names["trainer"].state.global_step == 1 and list(Path("outputs/mine/rollouts").iterdir())
    assert Path("outputs/mine/recipe.yaml").exists()
    exec(reward, names)
    short = names["short_answer_reward"]
    assert short(["It is 7", [{"role": "assistant", "content": "no\n"}]], answer=["7", "7"]) == [1.0, 0.0]


def test_the_algorithm_of_the_docs(newcomer):
    rows, (snippet,) = blocks("training.md", "python")[1].split("trainer =")[0], blocks("algorithms.md", "python")
    names: dict = {}
    exec(rows, names)
    exec(newcomer(snippet), names)
    (entry,) = [line for line in names["trainer"].state.log_history if "loss" in line]
    assert 0 <= entry["winners"] <= 1 and "mentor/alpha" not in entry


def test_every_page_of_the_navigation_is_there():
    listed = re.findall(r"(\S+\.md)$", (DOCS.parent / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_the_script_of_the_readme(newcomer, monkeypatch):
    (script,) = re.findall(r"```python\n(.*?)```", (DOCS.parent / "README.md").read_text(), re.DOTALL)
    rows = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(8)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: datasets.Dataset.from_list(rows))
    names: dict = {}
    exec(newcomer(script), names)
    assert names["trainer"].state.global_step == 1 and Path("outputs/mine/recipe.yaml").exists()
    assert len([line for line in script.splitlines() if line]) <= 17
